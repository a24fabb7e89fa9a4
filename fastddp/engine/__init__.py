"""From gradients to averages: the plan of the buckets, and the two reducers that carry it out."""
