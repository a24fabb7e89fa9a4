"""The time and memory until training can begin."""
