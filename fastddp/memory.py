"""Memory for large CPU tensors that stays mapped between training steps.

Autograd allocates every gradient anew, and it is freed once it has been copied into its bucket.
glibc returns large blocks to the kernel when they are freed, so each step would fault in every page
of its gradients and activations again: a quarter of the step of a 100 MB model, even without
communication.

So the first model on the CPU that is wrapped in a group of two ranks or more changes the allocator
of **all** CPU tensors of the process, the model's or not, for good: tensors of 128 KiB or more come
from a cache of freed blocks (``csrc/core/block_cache.h``) in front of torch's own allocator. What
it holds stays within 5/4 of the most that such tensors ever had in use at once, and a block that
has long gone unused is freed. Other memory (small tensors, NumPy's, Python's) and the settings of
malloc are not touched, nor is an allocator that another library has given to torch.

``FASTDDP_KEEP_MEMORY=0`` leaves torch's allocator as it is. Without the extension it is left too.
"""

from __future__ import annotations

from fastddp import config, extension


def keep() -> bool:
    """Keeps freed blocks from now on, unless something is against it; returns whether it does."""
    native = extension.load()
    return config.keep_memory() and native is not None and bool(native.keep_memory(True))


def why_not() -> str | None:
    """Returns why :func:`keep` would do nothing, or None.

    Raises:
        ValueError: if ``FASTDDP_KEEP_MEMORY`` is neither 0 nor 1.
    """
    return extension.why_not() if config.keep_memory() else "FASTDDP_KEEP_MEMORY=0"
