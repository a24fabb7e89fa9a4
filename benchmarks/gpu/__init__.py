"""The same on GPUs: passes over a bucket, tiny tensors, steps."""
