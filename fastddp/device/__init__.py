"""What is true of tensors, autograd and streams of one process: no ranks, no groups."""
