"""Threads that are kept between calls, and exceptions that travel from them."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import torch
from torch._utils import KeyErrorMessage


class Workers:
    """Runs tasks side by side, the same position always on the same thread.

    Threads are made when they are first needed. They end with this object, or when the
    interpreter does. A copy, a pickle or a forked child starts with none.

    Each thread gets an equal share of the caller's intra-op threads, so that N tasks use as many
    cores as one did. May be called from several threads at once.
    """

    def __init__(self) -> None:
        # One executor per thread: which thread runs a task must not depend on timing, because
        # intra-op settings and autograd's sequence numbers, which order a backward, are a thread's.
        self._threads: list[ThreadPoolExecutor] = []
        self._pid = os.getpid()

    def __reduce__(self) -> tuple[type[Workers], tuple[()]]:
        return Workers, ()

    def run(self, tasks: Sequence[Callable[[], Any]], places: Sequence[str]) -> list[Any]:
        """Returns what the tasks return, in their order, once all of them have ended.

        There is no deadline: a task is computation of this process, and cannot vanish.

        Args:
            tasks: what to run.
            places: where each runs, for the message of an exception.

        Raises:
            BaseException: what the first of the tasks that failed raised: the same type, the
                message preceded by the place and the original traceback.
        """
        num_threads = torch.get_num_threads()
        share = max(1, num_threads // len(tasks))
        futures = [
            thread.submit(_attempt, task, share)
            for thread, task in zip(self._get(len(tasks)), tasks, strict=True)
        ]
        try:
            results = [future.result() for future in futures]
        finally:
            # A thread that set its own share has also set what later threads begin with.
            torch.set_num_threads(num_threads)
        for result, place in zip(results, places, strict=True):
            if isinstance(result, _Failure):
                result.reraise(place)
        return results

    def _get(self, count: int) -> list[ThreadPoolExecutor]:
        if self._pid != os.getpid():  # threads do not survive a fork: their queues would fill
            self._threads, self._pid = [], os.getpid()
        # Assigned at once, and only ever longer: callers side by side need no lock.
        threads = self._threads
        if len(threads) < count:
            names = (f"fastddp-replica-{index}" for index in range(len(threads), count))
            threads = [*threads, *(ThreadPoolExecutor(1, name) for name in names)]
            self._threads = threads
        return threads[:count]


def _attempt(task: Callable[[], Any], num_threads: int) -> Any:
    try:
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        return task()
    except BaseException as error:
        return _Failure(error)


class _Failure:
    """An exception on its way to another thread.

    Its traceback travels as text: the frames would keep a whole replica's activations alive.
    """

    def __init__(self, error: BaseException) -> None:
        self._text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self._error = error.with_traceback(None)

    def reraise(self, place: str) -> NoReturn:
        kind = type(self._error)
        text = f"Caught {kind.__name__} {place}.\nOriginal {self._text}"
        # A KeyError shows the repr of its argument, which this one leaves readable.
        message = KeyErrorMessage(text) if isinstance(self._error, KeyError) else text
        try:
            error = kind(message)
        except Exception:
            error = self._error  # made from other arguments; keep it, and say the rest beside it
            error.__cause__ = RuntimeError(text)
        try:
            raise error
        finally:
            del error, self._error  # the traceback has this frame: a cycle of all that it holds
