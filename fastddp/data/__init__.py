"""The data of a rank: its share of a dataset to read, and its results to gather."""
