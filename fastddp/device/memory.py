"""Memory for large CPU tensors that stays mapped between training steps.

Autograd allocates every gradient anew, and it is freed once it has been copied into its bucket.
glibc returns large blocks to the kernel when they are freed, so each step would fault in every page
of its gradients and activations again: a quarter of the step of a 100 MB model, even without
communication.

So the first model on the CPU that is wrapped in a group of two ranks or more changes the allocator
of **all** CPU tensors of the process, the model's or not, for good: tensors of 128 KiB or more come
from a cache of freed blocks (``csrc/core/block_cache.h``) in front of torch's own allocator. Other
memory (small tensors, NumPy's, Python's) and the settings of malloc are not touched, nor is an
allocator that another library has given to torch.

**What it costs at most.** Blocks in use and idle together stay within 5/4 of the most that such
tensors had in use at once in the last 30 to 60 seconds, and a block that nobody has asked for in 30
seconds goes back to the system. So a checkpoint that is loaded after wrapping is forgotten within a
minute, and what is idle then is at most 5/4 of what recent steps used. That is looked after when
CPU tensors are allocated or freed: at every large one, and at one in 256 small ones of a thread. A
process that does neither for long can call :func:`release`.

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


def release() -> int:
    """Gives memory that is kept idle back to the system now; returns how many bytes.

    For a moment when something else needs it: a large NumPy array, another process, an evaluation
    of another shape. Tensors in use stay as they are, and memory goes on to be kept: the next step
    faults in its pages once more. Any thread may call it at any time; it is not collective.
    """
    native = extension.load()
    return 0 if native is None else int(native.release_memory())
