"""What it costs until training can begin."""
