"""Data-parallel training for PyTorch, faster and calmer.

Example::

    import fastddp

    model = fastddp.wrap(model)  # under torchrun, mp.spawn or plain python
"""

from fastddp.data_parallel import DataParallel
from fastddp.ddp import DistributedDataParallel
from fastddp.errors import MismatchError
from fastddp.info import info
from fastddp.version import __version__
from fastddp.wrap import wrap

__all__ = [
    "DataParallel",
    "DistributedDataParallel",
    "MismatchError",
    "__version__",
    "info",
    "wrap",
]
