"""One test of torch's, run in the processes of this repository's ranks instead of torch's own.

Torch starts new interpreters for every test and skips most tests where there is no GPU. Here a rank
is a fork, devices are the CPU (see `cpu_as_cuda`), and the class that the tests know as torch's is
the one under judgement.
"""

from __future__ import annotations

import functools
import os
import unittest
from typing import Any

import torch.distributed as dist
from torch import nn

from tests.ranks import scratch_folder
from tests.torch_suite.cpu_as_cuda import cpu_as_cuda

MODULE = "torch.testing._internal.distributed.distributed_test"
RPC_MODULE = "torch.testing._internal.distributed.ddp_under_dist_autograd_test"

MISSING = "missing"
PASSED = "passed"


def run_test(rank: int, world_size: int, name: str, subject: str) -> str:
    """Runs one test on this rank.

    Args:
        name: of a method of the base class of torch's distributed tests, or `Class.method` of its
            tests of DDP with RPC.
        subject: "torch" for torch's own class, else the engine of ours.

    Returns:
        "passed", "missing" if this torch has no such test, or why the test does not apply.

    Raises:
        Whatever the test raises.
    """
    _put_in_place(subject)
    _set_environment(rank, world_size)
    _without_conditions()
    case = _case(name, rank, world_size)
    if case is None:
        return MISSING
    from torch.testing._internal.common_utils import set_rng_seed

    set_rng_seed()  # the tests rely on equal models and batches on all ranks
    method = name.rpartition(".")[2]
    try:
        with cpu_as_cuda(world_size):
            getattr(case, method)()
    except unittest.SkipTest as reason:
        return f"does not apply: {reason}"
    return PASSED


def tests_of_ddp(rank: int, world_size: int) -> list[str]:
    """Lists the tests that this torch has and that mention its class, by any name."""
    import inspect

    _set_environment(rank, world_size)
    _without_conditions()
    base = _base_class()
    source = inspect.getsource(base)
    helpers = {
        name for name in vars(base) if f"def {name}(" in source and not name.startswith("test_")
    }

    def mentions(name: str, seen: frozenset[str] = frozenset()) -> bool:
        text = inspect.getsource(inspect.unwrap(vars(base)[name]))
        if "DistributedDataParallel(" in text or "DistributedDataParallel._" in text:
            return True
        called = {h for h in helpers - seen if f"self.{h}(" in text}
        return any(mentions(h, seen | called) for h in called)

    return sorted(n for n in vars(base) if n.startswith("test_") and mentions(n))


def _put_in_place(subject: str) -> None:
    """Makes the class under judgement the one that torch's tests import."""
    if subject == "torch":
        cls: Any = nn.parallel.DistributedDataParallel
        cls._passing_sync_batchnorm_handle = lambda *_: None  # refuses SyncBatchNorm on a CPU
    else:
        from fastddp import DistributedDataParallel as cls

        os.environ["FASTDDP_ENGINE"] = subject
    init = cls.__init__

    @functools.wraps(init)
    def without_devices(
        self: Any,
        module: Any,
        device_ids: Any = None,
        output_device: Any = None,
        *args: Any,
        **kw: Any,
    ) -> None:
        init(self, module, None, None, *args, **kw)  # what CPU modules must not be given

    cls.__init__ = without_devices
    nn.parallel.DistributedDataParallel = cls
    nn.parallel.distributed.DistributedDataParallel = cls


def _set_environment(rank: int, world_size: int) -> None:
    """Sets what the tests' modules read when they are imported."""
    folder = scratch_folder()
    os.environ.update(
        BACKEND="gloo",
        WORLD_SIZE=str(world_size),
        TEMP_DIR=str(folder),
        # As torch's own runs have it: then the tests also save and load models.
        INIT_METHOD=f"file://{folder}/init",
        PYTORCH_PRINT_REPRO_ON_FAILURE="0",
    )


def _without_conditions() -> None:
    """Lets no decorator skip a test for want of GPUs, or because it fails on torch's machines."""
    from torch.testing._internal import common_distributed, common_utils

    def always(*_: Any, **__: Any) -> Any:
        return lambda test: test

    for name in ("skip_if_lt_x_gpu", "nccl_skip_if_lt_x_gpu", "require_n_gpus_for_nccl_backend"):
        setattr(common_distributed, name, always)
    for name in ("skip_if_no_gpu", "skip_if_rocm_multiprocess"):
        setattr(common_distributed, name, lambda test: test)
    common_utils.skip_but_pass_in_sandcastle_if = always
    unittest.skip = unittest.skipIf = always  # type: ignore[assignment]


def _base_class() -> Any:
    from torch.testing._internal.distributed import distributed_test

    return distributed_test.DistributedTest._DistTestBase


def _case(name: str, rank: int, world_size: int) -> Any:
    """Makes the object that has the test, or None if this torch has not."""
    from torch.testing._internal.common_utils import TestCase

    class_name, _, method = name.rpartition(".")
    bases: tuple[Any, ...] = (_base_class(),) if not class_name else _rpc_classes(class_name)
    if not all(bases) or not hasattr(bases[0], method):
        return None
    attributes = {
        "rank": rank,
        "world_size": world_size,
        "file_name": f"{scratch_folder()}/file",
        "init_method": f"file://{scratch_folder()}/file",
        # Torch's is a barrier of lock files, because NCCL's may hang.
        "_barrier": lambda *_, **__: dist.barrier(),
    }
    return type("Case", (*bases, TestCase), attributes)(method)


def _rpc_classes(class_name: str) -> tuple[Any, ...]:
    from torch.testing._internal.distributed import ddp_under_dist_autograd_test
    from torch.testing._internal.distributed.rpc import tensorpipe_rpc_agent_test_fixture as fixture

    cls = getattr(ddp_under_dist_autograd_test, class_name, None)
    return (cls, fixture.TensorPipeRpcAgentTestFixture)
