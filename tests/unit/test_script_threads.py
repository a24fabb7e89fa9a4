"""Which threads besides the main one might begin a collective, and how many a group has begun."""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from fastddp.watch.clerk import Clerk
from fastddp.watch.frames import own
from fastddp.watch.script_call import collective_of_script
from fastddp.watch.script_threads import may_begin_collectives
from fastddp.watch.sequences import sequence_of

WAITS = """
def wait(inside, over, timeout_s):
    inside.set()
    over.wait(timeout_s)
"""


@pytest.fixture(autouse=True)
def only_threads_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the threads of pytest and of earlier tests."""
    current_frames = sys._current_frames
    before = current_frames().keys() - {threading.main_thread().ident}
    monkeypatch.setattr(
        sys,
        "_current_frames",
        lambda: {i: frame for i, frame in current_frames().items() if i not in before},
    )


def in_file(file: str) -> Callable[..., None]:
    """Returns a function that waits, and claims to be of some file."""
    scope: dict[str, Callable[..., None]] = {}
    exec(compile(WAITS, file, "exec"), scope)
    return scope["wait"]


@pytest.mark.parametrize(
    ("file", "may"),
    [
        ("/home/someone/train.py", True),
        ("<string>", True),
        ("/env/lib/python3.12/site-packages/trainer/loop.py", True),
        (str(Path(dist.__file__).parent / "checkpoint/state_dict_saver.py"), True),
        (str(Path(dist.__file__).parents[1] / "utils/data/_utils/pin_memory.py"), False),
        ("/env/lib/python3.12/site-packages/tqdm/_monitor.py", False),
        (threading.__file__, False),
    ],
)
def test_a_thread_that_might_begin_a_collective(file: str, may: bool) -> None:
    assert not may_begin_collectives()
    assert may_one_that_waits(file, 60.0) == may


def test_a_thread_that_only_another_one_can_wake_does_not_count() -> None:
    assert not may_one_that_waits("/home/someone/train.py", None)


def may_one_that_waits(file: str, timeout_s: float | None) -> bool:
    inside, over = threading.Event(), threading.Event()
    thread = threading.Thread(target=in_file(file), args=(inside, over, timeout_s))
    thread.start()
    try:
        assert inside.wait(60)
        time.sleep(0.1)  # now it waits
        return may_begin_collectives()
    finally:
        over.set()
        thread.join()


class Local:
    """What a function of the main thread refers to."""


def _asked_in_another_thread() -> weakref.ref[Local]:
    local = Local()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(may_begin_collectives).result()
        pool.submit(own).result()
        pool.submit(collective_of_script).result()
    return weakref.ref(local)


def test_looking_at_threads_keeps_nothing_of_theirs_alive() -> None:
    gc.disable()
    try:
        assert _asked_in_another_thread()() is None
    finally:
        gc.enable()


def test_idle_threads_and_our_own_do_not_count() -> None:
    clerk = Clerk()
    clerk.start()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        time.sleep(0.05)
        assert not may_begin_collectives()
    clerk.stop()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[str]:
    dist.init_process_group(init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


def test_a_group_counts_what_was_begun_in_it(world: str) -> None:
    before = sequence_of(world)
    assert before is not None
    dist.barrier()
    work = dist.barrier(async_op=True)
    assert sequence_of(world) == before + 2
    assert work is not None
    work.wait()
    assert sequence_of("there is no such group") is None
