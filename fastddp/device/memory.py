"""Memory for large CPU tensors that stays mapped between training steps.

Autograd allocates memory for every gradient, and frees it once the gradient has been copied into
its bucket. glibc returns large blocks to the kernel when they are freed, so each step would fault
in every page of its gradients and activations again. For a model of 100 MB that takes a quarter of
the step, even without communication.

So wrapping the first CPU model in a group of two ranks or more changes the allocator of **all** CPU
tensors of the process, for as long as the process lives: tensors of 128 KiB or more come from a
cache of freed blocks (``csrc/core/block_cache.h``) in front of torch's own allocator. Other memory
(small tensors, NumPy's, Python's) and the settings of malloc do not change. If another library has
given torch an allocator, that one stays.

**The most it costs.** Blocks in use and idle blocks together stay within 5/4 of the most that such
tensors had in use at once during the last 30 to 60 seconds. A block that nobody has asked for in 30
seconds goes back to the system. So a checkpoint that is loaded after wrapping is forgotten within a
minute. These limits are checked when CPU tensors are allocated or freed: at every large one, and at
one in 256 small ones of a thread. A process that does neither for a long time can call
:func:`release`.

With ``FASTDDP_KEEP_MEMORY=0``, or without the extension, torch's allocator stays as it is.
"""

from __future__ import annotations

from fastddp import config, extension


def keep() -> bool:
    """Keeps freed blocks from now on, if the environment and the build allow it.

    Not collective. Any thread may call it at any time.

    Returns:
        Whether freed blocks are kept.

    Raises:
        ValueError: if ``FASTDDP_KEEP_MEMORY`` is neither 0 nor 1.
    """
    native = extension.load()
    return config.keep_memory() and native is not None and bool(native.keep_memory(True))


def why_not() -> str | None:
    """Returns why :func:`keep` would do nothing, or None if it would keep memory.

    Raises:
        ValueError: if ``FASTDDP_KEEP_MEMORY`` is neither 0 nor 1.
    """
    return extension.why_not() if config.keep_memory() else "FASTDDP_KEEP_MEMORY=0"


def release() -> int:
    """Gives the idle memory that is kept back to the system now.

    Useful when something else needs the memory: a large NumPy array, another process, an evaluation
    with tensors of other shapes. Tensors in use do not change. Memory that is freed later is kept
    again, so the next step faults in its pages once more. Not collective. Any thread may call it at
    any time.

    Returns:
        The number of bytes that were given back; 0 without the extension.
    """
    native = extension.load()
    return 0 if native is None else int(native.release_memory())
