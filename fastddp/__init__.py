"""Data-parallel training for PyTorch, faster and calmer.

Example::

    import fastddp

    model = fastddp.wrap(model)  # under torchrun, mp.spawn or plain python
"""

from fastddp.ddp import DistributedDataParallel
from fastddp.errors import MismatchError
from fastddp.info import info
from fastddp.patch import patch
from fastddp.version import __version__
from fastddp.wrap import wrap

__all__ = ["DistributedDataParallel", "MismatchError", "__version__", "info", "patch", "wrap"]
