"""The fast inference path: see `compile.py`, and `eager.py` for what single operations take."""
