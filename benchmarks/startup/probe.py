"""The process that one measurement of start-up runs in.

`python -m benchmarks.startup.probe torch` (or `fastddp`) prints one JSON object. A module must not
be imported before its import is timed, so this file imports only the standard library at its top.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.common.machine import rss_bytes

LATER_WRAPS = 5


def timed_ms(call: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call(*args)
    return 1e3 * (time.perf_counter() - start), result


def import_wrapper(side: str) -> type:
    """Returns the class that wraps a module. Torch is imported already."""
    if side == "fastddp":
        import fastddp

        return fastddp.DistributedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel


def probe(side: str) -> dict[str, float]:
    import torch
    import torch.distributed as dist

    from benchmarks.step.models import MODELS

    import_ms, wrapper = timed_ms(import_wrapper, side)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    module = torch.nn.Linear(2, 2)
    before = rss_bytes()
    first_wrap_ms, wrapped = timed_ms(wrapper, module)
    after_wrap = rss_bytes()
    optimizer_ms, _ = timed_ms(torch.optim.SGD, list(wrapped.parameters()))
    after_optimizer = rss_bytes()

    later_ms: list[float] = []
    for seed in range(LATER_WRAPS):
        later_ms.append(timed_ms(wrapper, MODELS["tiny"].build(seed))[0])
    dist.destroy_process_group()
    return {
        "import_ms": import_ms,
        "first_wrap_ms": first_wrap_ms,
        "optimizer_ms": optimizer_ms,
        "ready_ms": import_ms + first_wrap_ms + optimizer_ms,
        "later_wrap_ms": median(later_ms),
        "first_wrap_rss_mb": (after_wrap - before) / 1e6,
        "ready_rss_mb": (after_optimizer - before) / 1e6,
    }


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1])))
