"""What a rank reads and what it gives back: its share of a dataset, and the ranks' results."""
