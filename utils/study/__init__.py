"""A study: every experiment of a table, trained and validated by one command (scripts/study.py)."""
