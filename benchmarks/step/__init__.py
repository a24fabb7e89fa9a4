"""The time of a training step, and its memory."""
