"""What the flags of train.py are made of, and how they go together."""
