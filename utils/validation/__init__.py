"""Validation: predictions, what is counted of them, curves over budgets, pictures."""
