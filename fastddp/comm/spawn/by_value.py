"""Pickling values for another Python process, also those that it cannot import by name.

Plain pickle sends functions and classes by name. Those of a notebook, of ``python -c``, of a script
on standard input, lambdas and functions inside functions have no name that another process could
import: they travel by value, if cloudpickle is installed.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import sys
from collections import ChainMap
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any


class Parcel:
    """Pickled, as an argument of a process to start, it becomes the value that it holds.

    Not before: tensors are shared with the process that is being started at that moment.
    """

    def __init__(self, value: Any) -> None:
        self._value = value

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        return pickle.loads, (_dump(self._value, shares=True),)


def dumps(value: Any) -> bytes:
    """Pickles a value for another process that exists already; tensors are copied.

    Raises:
        Exception: any error that the value's classes raise on pickling.
    """
    return _dump(value, shares=False)


def main_can_be_imported() -> bool:
    """Whether another process can import this one's ``__main__``, as multiprocessing has it do."""
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", None)
    if name is not None:  # python -m; of a package, multiprocessing leaves it alone
        return str(name).rpartition(".")[2] != "__main__"
    path = getattr(main, "__file__", None)
    return path is not None and os.path.exists(path)


@contextlib.contextmanager
def main_left_alone() -> Iterator[None]:
    """Processes started inside do not import a ``__main__`` that cannot be imported.

    One on standard input says that it is in a file named ``<stdin>``.
    """
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path is None or os.path.exists(path):
        yield
        return
    del main.__file__
    try:
        yield
    finally:
        main.__file__ = path


def can_send_by_value() -> bool:
    """Whether cloudpickle is installed."""
    try:
        import cloudpickle  # noqa: F401
    except ImportError:
        return False
    return True


def _dump(value: Any, shares: bool) -> bytes:
    if main_can_be_imported() or not can_send_by_value():
        try:
            return bytes(ForkingPickler.dumps(value)) if shares else pickle.dumps(value)
        except Exception:  # anything may go wrong in what a class does on pickling
            if not can_send_by_value():
                raise
    return _dump_by_value(value, shares)


def _dump_by_value(value: Any, shares: bool) -> bytes:
    import cloudpickle

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        if shares:  # as multiprocessing's own does
            dispatch_table = ChainMap(
                cloudpickle.Pickler.dispatch_table, ForkingPickler(io.BytesIO()).dispatch_table
            )

    file = io.BytesIO()
    Pickler(file).dump(value)
    return file.getvalue()
