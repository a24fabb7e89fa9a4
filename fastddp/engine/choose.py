"""The choice between the two engines.

A reducer averages gradients over the ranks of a process group while backward runs. ``native`` is
the C++ one (``csrc/reducer``). ``python`` is written in plain torch (``fastddp/engine/python``); it
is the specification of the other, and takes the place of it where there is no compiler. Both give
the same bits, and the ranks of one job may use different ones.
"""

from __future__ import annotations

from torch.distributed import ProcessGroup

from fastddp import config, extension
from fastddp.engine.interface import Reducer, Settings, Subject

NAMES = ("native", "python")


def choose(requested: str | None = None) -> str:
    """Returns the name of the engine to use: ``native`` or ``python``.

    Args:
        requested: the name of an engine; None for the environment variable ``FASTDDP_ENGINE`` if it
            is set, or else for the fastest engine that works here.

    Raises:
        ValueError: if there is no engine of this name.
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


def make_reducer(name: str, subject: Subject, group: ProcessGroup, settings: Settings) -> Reducer:
    """Hooks the parameters of a model and returns the reducer that averages their gradients.

    Args:
        name: the name of the engine, from :func:`choose`.
        subject: the model that the reducer serves.
        group: the ranks that average. The reducer does not keep it alive.
        settings: how the gradients are averaged.
    """
    if name == "native":
        from fastddp.engine.native import NativeReducer

        return NativeReducer(subject, group, settings)
    from fastddp.engine.python.reducer import PythonReducer

    return PythonReducer(subject, group, settings)
