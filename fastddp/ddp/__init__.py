"""The wrapper that a script sees, and what keeps the copies of its model equal on all ranks."""
