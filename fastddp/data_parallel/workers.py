"""Threads that stay between calls and pass their exceptions to the caller."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import torch
from torch._utils import KeyErrorMessage


class Workers:
    """Runs tasks at the same time, the task at each position always in the same thread.

    A thread is made when it is first needed. Threads end with this object or with the interpreter.
    A copy, a pickle or a forked child starts without threads.

    Each thread gets an equal share of the caller's intra-op threads, so that N tasks use as many
    cores as one task did. Several threads may call :meth:`run` at once.
    """

    def __init__(self) -> None:
        # One executor per thread. Each thread has its own intra-op settings and its own sequence
        # numbers, by which autograd orders a backward. With one executor for all, timing would
        # decide which thread runs a task, and so the order of the backward.
        self._threads: list[ThreadPoolExecutor] = []
        self._pid = os.getpid()

    def __reduce__(self) -> tuple[type[Workers], tuple[()]]:
        return Workers, ()

    def run(self, tasks: Sequence[Callable[[], Any]], places: Sequence[str]) -> list[Any]:
        """Runs tasks and waits until all of them have ended.

        There is no timeout, because the tasks are computations of this process, which cannot
        disappear like another process.

        Args:
            tasks: the functions to run, each in its own thread.
            places: a description of each task's place, for the message of an exception.

        Returns:
            The results of the tasks, in their order.

        Raises:
            BaseException: the exception of the first task that failed, in the order of the tasks.
                It has the same type; the message begins with the place and holds the original
                traceback.
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
            # A thread that sets its own number of threads also sets the number with which threads
            # that are made later begin.
            torch.set_num_threads(num_threads)
        for result, place in zip(results, places, strict=True):
            if isinstance(result, _Failure):
                result.reraise(place)
        return results

    def _get(self, count: int) -> list[ThreadPoolExecutor]:
        if self._pid != os.getpid():  # a fork copies no threads, so nobody would serve the queues
            self._threads, self._pid = [], os.getpid()
        # The list is replaced in one assignment and never changed in place, so that threads that
        # call this at the same time need no lock.
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

    The traceback travels as text, because the frames in it would keep all activations of the
    replica alive.
    """

    def __init__(self, error: BaseException) -> None:
        self._text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self._error = error.with_traceback(None)

    def reraise(self, place: str) -> NoReturn:
        kind = type(self._error)
        text = f"Caught {kind.__name__} {place}.\nOriginal {self._text}"
        # A KeyError shows the repr of its argument; the repr of this one keeps its line breaks.
        message = KeyErrorMessage(text) if isinstance(self._error, KeyError) else text
        try:
            error = kind(message)
        except Exception:
            error = self._error  # the type takes other arguments: keep it, and add the text to it
            error.__cause__ = RuntimeError(text)
        try:
            raise error
        finally:
            del error, self._error  # else this frame and the traceback would hold each other alive
