"""async_op=True: several in flight, waited for in any order, by anyone or by nobody."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.comm.common import case, expect, given, kinds_of_memory, operand, reduced, run_group
from tests.ranks import scratch_folder
from tests.slow import slow_but_for

DEADLINE_S = 20.0
WORLD_SIZES = pytest.mark.parametrize("world_size", slow_but_for([2, 3], [2, 3, 4]))
SIZES = (1, 100, 5000, 70_000, 400_000)


def _poll(is_true: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + DEADLINE_S
    while not is_true():
        assert time.monotonic() < until, f"no {what} after {DEADLINE_S:g} s"
        time.sleep(0.001)


def _any_order(rank: int, world_size: int, backend: str) -> None:
    for kind in kinds_of_memory(backend):
        for seed in range(5):
            with case(f"{kind}, order {seed}"):
                operands = [operand(kind, given(rank, n, start=i)) for i, n in enumerate(SIZES * 3)]
                works = [dist.all_reduce(x.tensor, async_op=True) for x in operands]
                # Another order on each rank.
                for i in random.Random(100 * seed + rank).sample(range(len(works)), len(works)):
                    works[i].wait()
                    n = operands[i].tensor.numel()
                    expect(operands[i].tensor, reduced(world_size, n, start=i))
                    operands[i].check_guards()


@WORLD_SIZES
def test_many_in_flight_waited_for_in_any_order(backend, world_size):
    run_group(_any_order, world_size, backend, backend)


def _mixed(rank: int, world_size: int) -> None:
    """Different collectives in flight at once; the last is waited for first."""
    for numel in SIZES:
        with case(str(numel)):
            summed, sent = given(rank, numel), given(rank, numel)
            gathered = torch.empty(world_size * numel)
            listed = [torch.empty(numel) for _ in range(world_size)]
            scattered, reduced_at_0 = torch.empty(numel), given(rank, numel)
            swapped = torch.empty(world_size * numel)
            works = [
                dist.all_reduce(summed, async_op=True),
                dist.broadcast(sent, 1, async_op=True),
                dist.all_gather_into_tensor(gathered, given(rank, numel), async_op=True),
                dist.reduce(reduced_at_0, 0, async_op=True),
                dist.barrier(async_op=True),
                dist.reduce_scatter_tensor(
                    scattered, given(rank, world_size * numel), async_op=True
                ),
                dist.all_to_all_single(swapped, given(rank, world_size * numel), async_op=True),
                dist.all_gather(listed, given(rank, numel), async_op=True),
            ]
            for work in reversed(works):
                work.wait()
            everyones = torch.cat([given(r, numel) for r in range(world_size)])
            expect(summed, reduced(world_size, numel))
            expect(sent, given(1, numel))
            expect(gathered, everyones)
            expect(scattered, reduced(world_size, numel, start=rank * numel))
            expect(torch.cat(listed), everyones)
            parts = [given(r, numel, start=rank * numel) for r in range(world_size)]
            expect(swapped, torch.cat(parts))
            if rank == 0:
                expect(reduced_at_0, reduced(world_size, numel))


@WORLD_SIZES
def test_different_collectives_in_flight(backend, world_size):
    run_group(_mixed, world_size, backend)


def _completes_alone(rank: int, world_size: int) -> None:
    for numel in SIZES:
        with case(str(numel)):
            x = given(rank, numel)
            work = dist.all_reduce(x, async_op=True)
            _poll(work.is_completed, "completion without wait()")
            expect(x, reduced(world_size, numel))
            work.wait()
            work.wait()  # again is no error
            assert work.is_completed()


@WORLD_SIZES
def test_work_completes_without_wait(backend, world_size):
    run_group(_completes_alone, world_size, backend)


def _not_before_the_last_has_come(rank: int, world_size: int) -> None:
    for numel in (1, 400_000):
        came = scratch_folder() / f"came-{numel}"
        x = given(rank, numel)
        if rank == 1:
            time.sleep(0.1)
            came.touch()
        work = dist.all_reduce(x, async_op=True)
        is_completed = work.is_completed()  # asked first: rank 1 may come in between
        assert came.exists() or not is_completed
        work.wait()
        assert came.exists()
        expect(x, reduced(world_size, numel))


def test_work_is_not_complete_before_all_have_come(backend):
    run_group(_not_before_the_last_has_come, 3, backend)


def _futures(rank: int, world_size: int) -> None:
    with case("value"):
        x = given(rank, 1000)
        value = dist.all_reduce(x, async_op=True).get_future().wait()
        assert isinstance(value, list)
        expect(value[0], reduced(world_size, 1000))
        assert value[0].data_ptr() == x.data_ptr()
    with case("then"):
        future = dist.all_reduce(given(rank, 1000), async_op=True).get_future()
        halved = future.then(lambda f: f.value()[0] / 2)
        expect(halved.wait(), reduced(world_size, 1000) / 2)
        # Also one that is added when all is over.
        expect(future.then(lambda f: f.value()[0] * 3).wait(), reduced(world_size, 1000) * 3)
    with case("no wait, callback only"):
        arrived = threading.Event()
        work = dist.all_reduce(given(rank, 70_000), async_op=True)
        work.get_future().add_done_callback(lambda _: arrived.set())
        assert arrived.wait(DEADLINE_S)
    with case("wait_all"):
        tensors = [given(rank, 100, start=i) for i in range(20)]
        futures = [dist.all_reduce(x, async_op=True).get_future() for x in tensors]
        for i, value in enumerate(torch.futures.wait_all(futures)):
            expect(value[0], reduced(world_size, 100, start=i))
    with case("a callback that starts the next collective"):
        second = given(rank, 1000, start=5)

        def start_next(_: torch.futures.Future) -> torch.futures.Future:
            return dist.all_reduce(second, async_op=True).get_future()

        first = dist.all_reduce(given(rank, 1000), async_op=True)
        expect(
            first.get_future().then(start_next).wait().wait()[0], reduced(world_size, 1000, start=5)
        )
    with case("a callback that raises"):
        future = dist.all_reduce(given(rank, 10), async_op=True).get_future()

        def fail(_: torch.futures.Future) -> None:
            raise ValueError("on purpose")

        with pytest.raises(Exception, match="on purpose"):
            future.then(fail).wait()
        x = given(rank, 10)
        dist.all_reduce(x)
        expect(x, reduced(world_size, 10))
    with case("other collectives"):
        x = given(rank, 10)
        expect(dist.broadcast(x, 1, async_op=True).get_future().wait()[0], given(1, 10))
        dist.barrier(async_op=True).get_future().wait()
        outputs = [torch.empty(10) for _ in range(world_size)]
        dist.all_gather(outputs, given(rank, 10), async_op=True).get_future().wait()
        expect(torch.cat(outputs), torch.cat([given(r, 10) for r in range(world_size)]))


@WORLD_SIZES
def test_futures(backend, world_size):
    run_group(_futures, world_size, backend)


def _futures_of_base_forms(rank: int, world_size: int) -> None:
    out = torch.empty(10)
    work = dist.reduce_scatter_tensor(out, given(rank, 10 * world_size), async_op=True)
    work.get_future().wait()
    expect(out, reduced(world_size, 10, start=10 * rank))


def test_reduce_scatter_has_a_future(backend):
    if backend == "gloo":
        with pytest.raises(Exception, match="getFuture not implemented"):
            run_group(_futures_of_base_forms, 2, backend)
    else:
        run_group(_futures_of_base_forms, 2, backend)


def _other_thread(rank: int, world_size: int) -> None:
    errors: list[BaseException] = []
    for numel in SIZES:
        x = given(rank, numel)
        work = dist.all_reduce(x, async_op=True)

        def wait(x: torch.Tensor = x, work: dist.Work = work) -> None:
            try:
                work.wait()
                expect(x, reduced(world_size, x.numel()))
            except BaseException as error:
                errors.append(error)

        # Several may wait for one work.
        threads = [threading.Thread(target=wait) for _ in range(3)]
        for thread in threads:
            thread.start()
        work.wait()
        for thread in threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), numel
    if errors:
        raise errors[0]


@WORLD_SIZES
def test_wait_in_other_threads(backend, world_size):
    run_group(_other_thread, world_size, backend)


def _issued_by_threads(rank: int, world_size: int) -> None:
    """One after the other, each from a thread of its own, as from autograd's."""
    for i in range(20):
        x = given(rank, 5000, start=i)
        thread = threading.Thread(target=dist.all_reduce, args=(x,))
        thread.start()
        thread.join(DEADLINE_S)
        expect(x, reduced(world_size, 5000, start=i))


def test_issued_by_different_threads(backend):
    run_group(_issued_by_threads, 2, backend)


def _dropped(rank: int, world_size: int) -> None:
    for numel in SIZES:
        with case(f"work of {numel} dropped"):
            x = given(rank, numel)
            dist.all_reduce(x, async_op=True)
            expected = reduced(world_size, numel)
            _poll(lambda x=x, e=expected: torch.equal(x, e), "result of a dropped work")
        with case(f"work and tensor of {numel} dropped"):
            dist.all_reduce(given(rank, numel), async_op=True)
            # What takes the freed memory must not be reduced in its place.
            others = [torch.full((numel,), 5.0) for _ in range(4)]
            dist.barrier()
            for other in others:
                expect(other, torch.full((numel,), 5.0))
    with case("tensor dropped, work kept"):
        work = dist.all_reduce(given(rank, 70_000), async_op=True)
        work.wait()
        expect(work.get_future().value()[0], reduced(world_size, 70_000))


@WORLD_SIZES
def test_dropped_works_and_tensors(backend, world_size):
    run_group(_dropped, world_size, backend)


def _many(rank: int, world_size: int) -> None:
    """More in flight than any queue of fixed length would hold."""
    tensors = [given(rank, 10 + i % 5, start=i) for i in range(2000)]
    works = [dist.all_reduce(x, async_op=True) for x in tensors]
    for i in reversed(range(len(works))):
        works[i].wait()
        expect(tensors[i], reduced(world_size, 10 + i % 5, start=i))


def test_two_thousand_in_flight(backend):
    run_group(_many, 2, backend)


def _sync_behind_async(rank: int, world_size: int) -> None:
    """One that is waited for at once, behind others that are not."""
    for i in range(30):
        numel = SIZES[i % len(SIZES)]
        behind, ahead = given(rank, numel, start=i), given(rank, 70_000, start=i)
        work = dist.all_reduce(ahead, async_op=True)
        dist.all_reduce(behind)
        expect(behind, reduced(world_size, numel, start=i))
        work.wait()
        expect(ahead, reduced(world_size, 70_000, start=i))


@WORLD_SIZES
def test_sync_behind_async(backend, world_size):
    run_group(_sync_behind_async, world_size, backend)


def _uneven_arrival(rank: int, world_size: int) -> None:
    """Ranks come late in turn, and wait late in turn."""
    for i in range(2 * world_size):
        x = given(rank, 50_000, start=i)
        if i % world_size == rank:
            time.sleep(0.02)
        work = dist.all_reduce(x, async_op=True)
        if (i + 1) % world_size == rank:
            time.sleep(0.02)
        work.wait()
        expect(x, reduced(world_size, 50_000, start=i))


@WORLD_SIZES
def test_ranks_that_come_and_wait_late(backend, world_size):
    run_group(_uneven_arrival, world_size, backend)


def _wait_with_timeout(rank: int, world_size: int) -> None:
    with case("in time"):
        x = given(rank, 10)
        assert dist.all_reduce(x, async_op=True).wait(timedelta(seconds=DEADLINE_S))
        expect(x, reduced(world_size, 10))
    group = dist.new_group(timeout=timedelta(seconds=DEADLINE_S))
    with case("not in time"):
        if rank == 0:
            work = dist.all_reduce(given(rank, 10), group=group, async_op=True)
            with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
                work.wait(timedelta(milliseconds=200))
            (scratch_folder() / "over").touch()
        else:
            _poll((scratch_folder() / "over").exists, "error on rank 0")


def test_wait_with_a_timeout(backend):
    run_group(_wait_with_timeout, 2, backend)
