"""Tensors that are lent to a transport, and what has to be given back before they are freed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator

import torch


class Loan:
    """A tensor that is lent to a transport, collective after collective.

    A transport's thread lets go of a tensor a moment after ``wait()`` has returned. If that were
    the last reference, the thread would need the GIL to free the Python object, perhaps at the
    moment at which the main thread holds it and joins the thread (``destroy_process_group``), or
    ends the interpreter: a deadlock or an abort. So the code that lends a tensor settles the loan
    before it drops the tensor. Tensors that only C++ has seen need none of this. Tensors on a GPU
    need none of it either: NCCL's watchdog leaves tensors to the threads that call it.

    Args:
        tensor: the tensor to be lent, of any shape, dtype and device; no work refers to it yet.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._references = tensor._use_count()  # type: ignore[attr-defined]

    def is_settled(self) -> bool:
        """Returns whether the transport has let go of the tensor."""
        if not self._tensor.is_cpu:
            return True
        return self._tensor._use_count() <= self._references  # type: ignore[attr-defined,no-any-return]


def settle(loans: Iterable[Loan], timeout_s: float = 1.0) -> None:
    """Waits until the transport has let go of every tensor, or gives up after ``timeout_s``.

    Args:
        loans: the loans to end, in any order.
        timeout_s: the most seconds to wait for all of them together.
    """
    deadline = time.monotonic() + timeout_s
    for loan in loans:
        while not loan.is_settled() and time.monotonic() < deadline:
            time.sleep(0)


@contextlib.contextmanager
def without_context() -> Iterator[None]:
    """Hides Python's context variables from what a collective copies of the thread's state.

    During a backward, torch keeps them in thread-local state, and a collective copies that into the
    work it returns. The transport's thread often frees the last copy, for which it needs the GIL;
    if the interpreter is ending at that moment, the process aborts.
    """
    if not torch._C._is_key_in_tls("context"):
        yield
        return
    context = torch._C._get_obj_in_tls("context")
    torch._C._remove_obj_from_tls("context")
    try:
        yield
    finally:
        torch._C._stash_obj_in_tls("context", context)
