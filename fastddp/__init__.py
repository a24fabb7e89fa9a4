"""Data-parallel training for PyTorch: torch's wrapper class with a faster engine behind it.

Example::

    import fastddp

    model = fastddp.wrap(model)  # under torchrun, mp.spawn or plain python
"""

from fastddp.comm.launch import init_process_group
from fastddp.comm.shm import register as _register_shm
from fastddp.comm.spawn.start import spawn
from fastddp.data.gather import gather_unpadded
from fastddp.data.sampler import DistributedSampler
from fastddp.data_parallel.module import DataParallel
from fastddp.ddp.accumulate import accumulate
from fastddp.ddp.wrap import wrap
from fastddp.ddp.wrapper import DistributedDataParallel
from fastddp.device import memory
from fastddp.device.flat import flatten, unflatten
from fastddp.errors import MismatchError, RankError
from fastddp.installed import info
from fastddp.integrations.patch import patch
from fastddp.timeline.live import report
from fastddp.version import __version__
from fastddp.watch.events import trace

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
    "memory",
    "patch",
    "report",
    "spawn",
    "trace",
    "unflatten",
    "wrap",
]

_register_shm()
