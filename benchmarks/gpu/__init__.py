"""Times on GPUs: passes over a bucket, tiny tensors, training steps."""
