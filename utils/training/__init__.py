"""Training: the loop, its steps, what they minimise, what a run saves and goes on from."""
