"""Data sets, and what training makes of a batch."""
