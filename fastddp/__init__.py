"""Data-parallel training for PyTorch, faster and calmer.

Example::

    import fastddp

    model = fastddp.wrap(model)  # under torchrun, mp.spawn or plain python
"""

from fastddp.accumulate import accumulate
from fastddp.data_parallel import DataParallel
from fastddp.ddp import DistributedDataParallel
from fastddp.errors import MismatchError, RankError
from fastddp.flat import flatten, unflatten
from fastddp.gather import gather_unpadded
from fastddp.info import info
from fastddp.launch import init_process_group
from fastddp.patch import patch
from fastddp.sampler import DistributedSampler
from fastddp.shm import register as _register_shm
from fastddp.spawn import spawn
from fastddp.version import __version__
from fastddp.wrap import wrap

__all__ = [
    "DataParallel",
    "DistributedDataParallel",
    "DistributedSampler",
    "MismatchError",
    "RankError",
    "__version__",
    "accumulate",
    "flatten",
    "gather_unpadded",
    "info",
    "init_process_group",
    "patch",
    "spawn",
    "unflatten",
    "wrap",
]

_register_shm()
