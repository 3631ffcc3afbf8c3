"""Damaged and hostile inputs for every reader and command: `python -m fuzz` (see `make fuzz`)."""
