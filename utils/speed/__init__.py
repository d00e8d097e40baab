"""Timing: what is timed, and how."""
