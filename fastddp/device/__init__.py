"""Tensors, autograd and streams within one process. Nothing here knows ranks or groups."""
