"""Ctrl-C, and whatever else a signal handler raises, during each of our waits.

The other rank comes only once it has been told that this one was interrupted: an interrupt that
waits for the collective would last for the group's timeout, and be an error.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastddp
from tests.ranks import run_ranks

GROUP_TIMEOUT = timedelta(seconds=20)


def _wrap(group: Any, engine: str) -> nn.Module:
    return fastddp.wrap(nn.Linear(4, 2), engine=engine, process_group=group)


def _backward(model: nn.Module) -> None:
    model(torch.ones(2, 4)).sum().backward()


def _interrupt_me(with_signal: int) -> None:
    """Sends this process a signal in a moment, when it waits."""
    threading.Timer(0.5, os.kill, (os.getpid(), with_signal)).start()


def _raises_in(body: Callable[[], object], with_signal: int = signal.SIGINT) -> str:
    _interrupt_me(with_signal)
    try:
        body()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def _told_of_rank_0(store: Any, body: Callable[[], object]) -> str:
    store.wait(["interrupted"], GROUP_TIMEOUT)
    try:
        body()
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def _in_backward(rank: int, _size: int, engine: str) -> str:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the shell has set
    group = dist.new_group(timeout=GROUP_TIMEOUT)
    store = group.get_group_store()
    model = _wrap(group, engine)
    if rank == 0:
        raised = _raises_in(lambda: _backward(model))
        store.set("interrupted", b"")
        store.wait(["told"], GROUP_TIMEOUT)  # rank 1 is told while this rank lives
        return raised
    store.wait(["interrupted"], GROUP_TIMEOUT)
    # Gloo would not know before rank 0 ends.
    is_gloo = os.environ.get("FASTDDP_SHM") == "0"
    told = "" if is_gloo else _told_of_rank_0(store, lambda: _backward(model))
    store.set("told", b"")
    return told


def test_ctrl_c_in_a_backward_on_shared_memory(engine: str) -> None:
    raised, told = run_ranks(_in_backward, 2, engine)
    assert raised.startswith("KeyboardInterrupt")
    assert "failed: rank 0 was interrupted (KeyboardInterrupt)" in told


def test_ctrl_c_in_a_backward_on_gloo(engine: str) -> None:
    raised, _ = run_ranks(_in_backward, 2, engine, env={"FASTDDP_SHM": "0"})
    assert raised.startswith("KeyboardInterrupt")


def _in_wrap(rank: int, _size: int, engine: str) -> str:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    group = dist.new_group(timeout=GROUP_TIMEOUT)
    store = group.get_group_store()
    if rank == 0:
        raised = _raises_in(lambda: _wrap(group, engine))
        store.set("interrupted", b"")
        return raised
    store.wait(["interrupted"], GROUP_TIMEOUT)
    return ""


def test_ctrl_c_while_the_other_rank_has_not_wrapped_its_model(engine: str) -> None:
    raised, _ = run_ranks(_in_wrap, 2, engine)
    assert raised.startswith("KeyboardInterrupt")


CALLS: dict[str, Callable[[Any], object]] = {
    "all_reduce": lambda group: dist.all_reduce(torch.ones(8), group=group),
    "all_reduce of another thread": lambda group: dist.all_reduce(
        torch.ones(8), group=group, async_op=True
    ).wait(),
    "barrier": lambda group: dist.barrier(group=group),
    "all_to_all": lambda group: dist.all_to_all_single(torch.ones(2), torch.ones(2), group=group),
}


def _in_a_call_of_the_script(rank: int, _size: int, name: str) -> str:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    group = dist.new_group(backend="shm", timeout=GROUP_TIMEOUT)
    store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        raised = _raises_in(lambda: CALLS[name](group))
        store.set("interrupted", b"")
        store.wait(["told"], GROUP_TIMEOUT)
        return raised
    store.wait(["interrupted"], GROUP_TIMEOUT)
    told = _told_of_rank_0(store, lambda: CALLS[name](group))
    store.set("told", b"")
    return told


@pytest.mark.parametrize("name", CALLS)
def test_ctrl_c_in_a_collective_of_the_script_on_the_shm_backend(name: str) -> None:
    raised, told = run_ranks(_in_a_call_of_the_script, 2, name)
    assert raised.startswith("KeyboardInterrupt")
    if name in ("all_reduce", "barrier", "all_to_all"):
        assert "rank 0 was interrupted (KeyboardInterrupt)" in told


def _behind_another(rank: int, _size: int) -> str:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    group = dist.new_group(backend="shm", timeout=GROUP_TIMEOUT)
    store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        first = dist.all_reduce(torch.ones(8), group=group, async_op=True)
        raised = _raises_in(lambda: dist.barrier(group=group))
        store.set("interrupted", b"")
        assert first is not None
        with pytest.raises(RuntimeError, match="rank 0 was interrupted"):
            first.wait()
        store.wait(["told"], GROUP_TIMEOUT)
        return raised
    store.wait(["interrupted"], GROUP_TIMEOUT)
    told = _told_of_rank_0(store, lambda: dist.all_reduce(torch.ones(8), group=group))
    store.set("told", b"")
    return told


def test_ctrl_c_before_a_collective_has_its_turn() -> None:
    raised, told = run_ranks(_behind_another, 2)
    assert raised.startswith("KeyboardInterrupt")
    assert "rank 0 was interrupted (KeyboardInterrupt)" in told


def _with_a_handler(rank: int, _size: int, engine: str) -> str:
    def leave(*_: object) -> None:
        raise SystemExit("by the script's own handler")

    signal.signal(signal.SIGTERM, leave)
    group = dist.new_group(timeout=GROUP_TIMEOUT)
    store = group.get_group_store()
    model = _wrap(group, engine)
    if rank == 0:
        raised = _raises_in(lambda: _backward(model), signal.SIGTERM)
        store.set("interrupted", b"")
        store.wait(["told"], GROUP_TIMEOUT)
        return raised
    told = _told_of_rank_0(store, lambda: _backward(model))
    store.set("told", b"")
    return told


def test_what_another_handler_raises_ends_a_wait_too(engine: str) -> None:
    raised, told = run_ranks(_with_a_handler, 2, engine)
    assert raised == "SystemExit: by the script's own handler"
    assert "rank 0 was interrupted (SystemExit)" in told


def _with_a_harmless_handler(rank: int, _size: int, engine: str) -> tuple[int, list[float]]:
    seen: list[float] = []
    signal.signal(signal.SIGUSR2, lambda *_: seen.append(time.monotonic()))
    group = dist.new_group(timeout=GROUP_TIMEOUT)
    store = group.get_group_store()
    model = _wrap(group, engine)
    if rank == 0:
        _interrupt_me(signal.SIGUSR2)
        threading.Timer(1.5, store.set, ("seen", b"")).start()
    else:
        store.wait(["seen"], GROUP_TIMEOUT)
    _backward(model)
    grad = next(model.parameters()).grad
    assert grad is not None
    return len(seen), grad.flatten().tolist()


def test_a_handler_that_raises_nothing_runs_and_the_wait_goes_on(engine: str) -> None:
    (seen, grads), (_, others) = run_ranks(_with_a_harmless_handler, 2, engine)
    assert seen == 1
    assert grads == others == [2.0] * 8


def _handler_that_destroys_the_group(rank: int, _size: int) -> str:
    def leave(*_: object) -> None:
        dist.destroy_process_group()

    signal.signal(signal.SIGTERM, leave)
    group = dist.new_group(backend="shm", timeout=GROUP_TIMEOUT)
    store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        raised = _raises_in(lambda: dist.barrier(group=group), signal.SIGTERM)
        store.set("interrupted", b"")
        return raised
    store.wait(["interrupted"], GROUP_TIMEOUT)
    return _told_of_rank_0(store, lambda: dist.barrier(group=group))


def test_a_handler_that_uses_the_group_that_it_interrupts_gets_an_error() -> None:
    raised, told = run_ranks(_handler_that_destroys_the_group, 2)
    assert "a signal handler that was called within a collective has used the process" in raised
    assert "rank 0 " in told
