"""Large CPU tensors get memory that stays mapped; tests/cpp/block_cache_test.cpp has the cache."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastddp
from fastddp import extension, info
from fastddp.device import memory
from tests.ranks import RankFailed, run_ranks

needs_extension = pytest.mark.skipif(extension.load() is None, reason="the cache is C++")
MiB = 1 << 20


def page_faults() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def resident() -> int:
    """Returns the bytes of this process's memory that have pages."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def is_kept() -> bool:
    """Whether a block that was freed is idle in the cache."""
    native = extension.load()
    if native is None:
        return False
    torch.empty(MiB)
    return native.kept_memory().idle >= 4 * MiB


def train_wide(_rank: int, _world_size: int, engine: str) -> int:
    """Returns the page faults of five steps of a model with one gradient of 48 MiB."""
    model = fastddp.wrap(nn.Linear(512, 24 * 1024, bias=False), engine=engine)
    inputs = torch.randn(2, 512)
    before = 0
    for step in range(9):
        if step == 4:
            before = page_faults()
        model.zero_grad()
        model(inputs).sum().backward()
    return page_faults() - before


def wrap_and_look(_rank: int, _world_size: int) -> bool:
    fastddp.wrap(nn.Linear(2, 2))
    return is_kept()


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="other kernels count page faults otherwise")
def test_steps_fault_in_no_fresh_memory(engine: str) -> None:
    kept = run_ranks(train_wide, 2, engine)
    usual = run_ranks(train_wide, 2, engine, env={"FASTDDP_KEEP_MEMORY": "0"})
    assert max(kept) < 0.1 * min(usual)


@needs_extension
def test_it_takes_two_ranks_and_no_opt_out() -> None:
    assert run_ranks(wrap_and_look, 2) == [True, True]
    assert run_ranks(wrap_and_look, 1) == [False]
    assert run_ranks(wrap_and_look, 2, env={"FASTDDP_KEEP_MEMORY": "0"}) == [False, False]


def test_another_value_is_refused_when_a_model_is_wrapped() -> None:
    with pytest.raises(RankFailed, match="FASTDDP_KEEP_MEMORY='yes' is not one of 0, 1"):
        run_ranks(wrap_and_look, 2, env={"FASTDDP_KEEP_MEMORY": "yes"})


def wrap_without_extension(_rank: int, _world_size: int) -> bool:
    extension._find = lambda: (None, "it was left out for this test")
    model = fastddp.wrap(nn.Linear(2, 2), engine="python")
    model(torch.ones(1, 2)).sum().backward()
    return isinstance(model.module.weight.grad, torch.Tensor)


def test_without_the_extension_nothing_is_kept_and_training_goes_on() -> None:
    assert run_ranks(wrap_without_extension, 2) == [True, True]


def change_allocators(_rank: int, _world_size: int) -> None:
    native = extension.load()
    assert native is not None
    before = torch.ones(MiB)
    assert native.keep_memory(True)
    assert native.kept_memory().peak == 0
    kept = torch.full((MiB,), 2.0)
    address = kept.data_ptr()
    assert native.kept_memory().in_use == 4 * MiB
    assert before.sum().item() == MiB
    del before  # goes back to where it came from
    assert native.kept_memory().idle == 0
    assert not native.keep_memory(False)
    del kept  # and so does this
    assert native.kept_memory().idle == 4 * MiB
    assert torch.empty(MiB).data_ptr() != address
    assert native.keep_memory(True)
    assert torch.empty(MiB).data_ptr() == address
    torch.empty(1024)
    assert native.kept_memory().in_use == 0  # small ones never come here


@needs_extension
def test_blocks_go_back_to_where_they_came_from() -> None:
    run_ranks(change_allocators, 1)


def release_idle(_rank: int, _world_size: int) -> None:
    native = extension.load()
    assert native is not None
    assert memory.release() == 0  # before anything is kept
    torch.ones(6 * MiB)  # from now on malloc has blocks of up to 24 MiB in its heap
    native.keep_memory(True)
    in_use = torch.full((2 * MiB,), 3.0)
    large, in_heap = torch.ones(16 * MiB), torch.ones(4 * MiB)
    above = torch.ones(5 * MiB)  # keeps malloc from shrinking its heap
    del large, in_heap
    before = resident()
    assert native.kept_memory().idle == 80 * MiB
    assert memory.release() == 80 * MiB
    assert before - resident() > 78 * MiB
    assert native.kept_memory().idle == 0
    assert memory.release() == 0
    assert in_use.min().item() == in_use.max().item() == 3
    assert above.min().item() == above.max().item() == 1
    del above
    assert native.kept_memory().idle == 20 * MiB  # goes on to be kept
    assert not native.keep_memory(False)
    assert memory.release() == 20 * MiB


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_release_gives_idle_memory_back_to_the_system() -> None:
    run_ranks(release_idle, 1)


def release_while_threads_allocate(_rank: int, _world_size: int) -> int:
    native = extension.load()
    assert native is not None
    native.keep_memory(True)
    done = threading.Event()
    wrong: list[int] = []

    def work(value: int) -> None:
        while not done.is_set():
            tensors = [torch.full((MiB // 8,), float(value + i)) for i in range(3)]
            wrong.extend(i for i in range(3) if not (tensors[i] == value + i).all())

    threads = [threading.Thread(target=work, args=(10 * i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    released, deadline = 0, time.monotonic() + 30
    while released < 100 * MiB and time.monotonic() < deadline:
        released += memory.release()
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    memory.release()
    kept = native.kept_memory()
    assert (kept.in_use, kept.idle) == (0, 0)
    return released


@needs_extension
def test_any_thread_may_release_at_any_time() -> None:
    (released,) = run_ranks(release_while_threads_allocate, 1)
    assert released >= 100 * MiB


def nothing_to_release(_rank: int, _world_size: int) -> int:
    fastddp.wrap(nn.Linear(2, 2))
    torch.ones(MiB)
    return memory.release()


def test_nothing_is_released_where_nothing_is_kept() -> None:
    assert run_ranks(nothing_to_release, 2, env={"FASTDDP_KEEP_MEMORY": "0"}) == [0, 0]


def load_then_stay_small(_rank: int, _world_size: int) -> None:
    native = extension.load()
    assert native is not None
    native.keep_memory(True, patience_s=3600)
    torch.ones(16 * MiB)
    for _ in range(2000):
        torch.empty(8)
    assert native.kept_memory().idle == 64 * MiB
    before = resident()
    native.keep_memory(True, patience_s=0.01)
    deadline = time.monotonic() + 30
    while native.kept_memory().idle > 0 and time.monotonic() < deadline:
        torch.empty(8)
    assert native.kept_memory().idle == 0
    assert before - resident() > 62 * MiB


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_idle_memory_goes_back_also_when_all_that_follows_is_small() -> None:
    run_ranks(load_then_stay_small, 1)


def train_after_loading(_rank: int, _world_size: int, engine: str) -> tuple[int, int]:
    """Returns the peak and what is idle, in steps of 1 MiB after 256 MiB were loaded."""
    native = extension.load()
    assert native is not None
    model = fastddp.wrap(nn.Linear(256, 1024, bias=False), engine=engine)
    inputs = torch.randn(2, 256)

    def step() -> None:
        model.zero_grad()
        model(inputs).sum().backward()

    step()
    checkpoint = [torch.ones(4 * MiB) for _ in range(16)]
    del checkpoint
    assert native.kept_memory().idle >= 256 * MiB
    native.keep_memory(True, patience_s=0.2)
    deadline = time.monotonic() + 30
    waits = torch.ones(1)
    while waits.item() > 0:  # on both ranks or none
        step()
        waits.fill_(native.kept_memory().peak > 8 * MiB and time.monotonic() < deadline)
        dist.all_reduce(waits)
    native.keep_memory(True)  # a step that this machine delays is no reason to lose its blocks
    for _ in range(3):
        step()
    assert memory.release() > 0  # steps keep what they need
    step()
    return native.kept_memory().peak, native.kept_memory().idle


@needs_extension
def test_a_checkpoint_loaded_after_wrapping_is_not_kept(engine: str) -> None:
    for peak, idle in run_ranks(train_after_loading, 2, engine):
        assert MiB <= peak <= 8 * MiB
        assert MiB <= idle <= peak * 5 // 4


def profile(_rank: int, _world_size: int) -> list[int]:
    from torch.profiler import profile as torch_profile

    native = extension.load()
    assert native is not None
    sizes = []
    for on in (False, True, True):
        native.keep_memory(on)
        with torch_profile(profile_memory=True) as seen:
            torch.empty(MiB)
        sizes.append(
            sum(event.cpu_memory_usage for event in seen.events() if event.name != "[memory]")
        )
    return sizes


@needs_extension
@pytest.mark.filterwarnings("ignore")  # torch's profiler deprecates parts of itself
def test_the_profiler_sees_kept_memory_as_it_sees_torchs() -> None:
    (sizes,) = run_ranks(profile, 1)
    assert sizes[0] == 4 * MiB
    assert sizes == [sizes[0]] * 3


def fork_while_allocating(_rank: int, _world_size: int) -> None:
    native = extension.load()
    assert native is not None
    assert native.keep_memory(True)
    done = threading.Event()

    def allocate() -> None:
        while not done.is_set():
            torch.empty(MiB)
            memory.release()

    threads = [threading.Thread(target=allocate) for _ in range(2)]
    for thread in threads:
        thread.start()
    children = []
    try:
        for _ in range(30):
            child = os.fork()
            if child == 0:
                torch.empty(MiB)
                os._exit(0 if memory.release() >= 4 * MiB else 1)
            children.append(child)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    deadline = time.monotonic() + 10
    statuses = []
    while children and time.monotonic() < deadline:
        ended = [os.waitpid(child, os.WNOHANG) for child in children]
        statuses += [status for pid, status in ended if pid != 0]
        children = [child for child, (pid, _) in zip(children, ended, strict=True) if pid == 0]
        time.sleep(0.01)
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert not children, f"{len(children)} children wait for a mutex that nobody holds"
    assert statuses == [0] * 30  # and what they had idle was theirs to release


@needs_extension
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_while_another_thread_allocates_leaves_the_child_able_to() -> None:
    run_ranks(fork_while_allocating, 1)


def test_the_report_says_what_becomes_of_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDDP_KEEP_MEMORY", "0")
    assert str(info().memory) == "left to torch's allocator  (FASTDDP_KEEP_MEMORY=0)"
    monkeypatch.setenv("FASTDDP_KEEP_MEMORY", "2")
    assert info().memory.what == "none"
    monkeypatch.delenv("FASTDDP_KEEP_MEMORY")
    native = extension.load() is not None
    assert (info().memory.what == "kept between steps") == native
