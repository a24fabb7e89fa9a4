"""The choice between the two engines.

A reducer averages gradients over the ranks of a process group while backward runs. ``native`` is
the C++ one (``csrc/reducer``); ``python`` is plain torch (``fastddp/engine/python``), the
specification of the other and its stand-in where there is no compiler. Both give the same bits and
may be mixed in one job.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.distributed import ProcessGroup

from fastddp import config, extension
from fastddp.engine.interface import Reducer

NAMES = ("native", "python")


def choose(requested: str | None = None) -> str:
    """Returns the name of the engine to use: ``native`` or ``python``.

    Args:
        requested: a name, or None for ``FASTDDP_ENGINE`` if set, else the fastest that works here.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if ``native`` is asked for and the extension cannot be used; says why.
    """
    name = requested or config.engine()
    if name not in (None, *NAMES):
        raise ValueError(f"engine={name!r} is not one of {', '.join(NAMES)}")
    if name == "python":
        return name
    if extension.load() is not None:
        return "native"
    if name == "native":
        raise RuntimeError(f"fastddp: the native engine was asked for, but {extension.why_not()}")
    extension.warn_once()
    return "python"


def make_reducer(
    name: str,
    params: Sequence[torch.nn.Parameter],
    names: Sequence[str],
    num_sparse: int,
    frozen: Sequence[torch.Tensor],
    group: ProcessGroup,
    caps_bytes: Sequence[int],
    comm_dtype: torch.dtype | None = None,
    owner: int = 0,
    title: str = "the model",
    lazy: bool = False,
) -> Reducer:
    """Hooks ``params`` and returns their reducer.

    Args:
        name: the engine, from :func:`choose`.
        params: each is floating point or complex and requires grad, at least now and then; all on
            one device. The same ones, in the same order, on every rank.
        names: theirs, for messages.
        num_sparse: how many of the last of them get sparse gradients, with one index dimension.
        frozen: the model's other parameters, see :meth:`Reducer.outgrown`.
        group: where to reduce. The reducer does not keep it alive.
        caps_bytes: see :func:`fastddp.engine.plan.plan_buckets`; the same on every rank.
        comm_dtype: what gradients are cast to for the all-reduce, but for float64 ones; None for
            what they are. The same on every rank.
        owner: 32 bits that tell this model's collectives from another's on the same group; the same
            on every rank.
        title: what messages call the model.
        lazy: allocate a bucket when its first gradient arrives, and leave it to the script at the
            end of the round.
    """
    make: Callable[..., Reducer]
    if name == "native":
        from fastddp.engine.native import NativeReducer as make
    else:
        from fastddp.engine.python.reducer import PythonReducer as make
    return make(
        params,
        names,
        num_sparse,
        frozen,
        group,
        caps_bytes,
        comm_dtype,
        owner=owner,
        title=title,
        lazy=lazy,
    )
