"""Data sets: embedded, composed, and from folders."""
