"""A rank that sends something else than it should: an error that names it, and nothing is run."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fastddp
from fastddp.comm.objects import gather_if_different
from fastddp.watch.notes import Notes
from tests.models import Ladder, ladder_x, mean_x
from tests.parity.checks import assert_ladder
from tests.ranks import init_group, run_ranks, scratch_folder


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def send(text: bytes, size: int | None = None, digest: bytes | None = None) -> None:
    """Take the hostile rank's part in a comparison."""

    def exchange(data: bytes) -> list[bytes]:
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, mine)
        return [bytes(tensor.numpy()) for tensor in gathered]

    exchange(hashlib.sha256(text).digest() if digest is None else digest)
    sizes = exchange((len(text) if size is None else size).to_bytes(8, "little"))
    if size is None:
        exchange(text.ljust(max(int.from_bytes(s, "little") for s in sizes)))


def _wrap() -> None:
    fastddp.wrap(Ladder())


def _gather() -> None:
    fastddp.gather_unpadded(torch.ones(3, 2))


def offer(shape: object = (3, 2), dtype: object = "float32", order: object = "rank order") -> bytes:
    """What `gather_unpadded` sends, with something else in it."""
    return json.dumps([shape, dtype, "cpu", order, "dst=None"]).encode()


UNREADABLE: dict[str, bytes] = {
    "garbage": bytes(range(256)),
    "not UTF-8": b'["\xff"]',
    "half a text": b'[["parameter',
    "nothing but a number": b"7",
    "a number without end": b"9" * 100_000,
    "depth without end": b"[" * 100_000,
    "null": b"null",
    "a list of lists": b'[["a", 1]]',
}
OF_GATHER: dict[str, bytes] = {
    "a negative size": offer(shape=[-1]),
    "a size that is no number": offer(shape=["7"]),
    "a size that is a truth": offer(shape=[True]),
    "more than there is": offer(shape=[2**62, 2**62]),
    "no dimensions": offer(shape=[]),
    "a function for a dtype": offer(dtype="load"),
    "an order that is none": offer(order=[1]),
}


def _hostile(rank: int, world_size: int) -> dict[str, str]:
    said: dict[str, str] = {}
    trace = scratch_folder() / "trace"

    def attack(what: str, call: Callable[[], None], *message: Any) -> None:
        if rank == 1:
            send(*message)
            return
        with pytest.raises(fastddp.MismatchError) as caught:
            call()
        said[f"{call.__name__}: {what}"] = str(caught.value)
        assert not trace.exists()

    for call in (_wrap, _gather):
        attack("a pickle", call, pickle.dumps(Bomb(trace)))
        for what, text in (UNREADABLE | (OF_GATHER if call is _gather else {})).items():
            attack(what, call, text)
        attack("a huge size", call, b"", 2**63)
        attack("no size", call, b"", 0)
        attack("not what was announced", call, b"[]", None, bytes(32))

    # A note in the store that is none.
    store = dist.group.WORLD.get_group_store()
    if rank == 1:
        store.set("fastddp waits/1", b"\xff\n" * 10_000)
    dist.barrier()
    if rank == 0:
        notes = Notes(0)
        notes.read(store, range(2))
        said["a note"] = "; ".join(f"rank {r} waits in {note}" for r, note in notes.others.items())

    model = fastddp.wrap(Ladder())  # the group is as good as before
    model(ladder_x(rank, 0, world_size)).backward()
    assert_ladder(model.module, mean_x(0, world_size), "after all that")
    return said


def test_what_a_peer_sends_is_read_as_data_and_checked() -> None:
    said, _ = run_ranks(_hostile, 2)
    assert len(said) == 2 * (len(UNREADABLE) + 4) + len(OF_GATHER) + 1
    assert said.pop("a note") == "rank 1 waits in something unreadable"
    for what, text in said.items():
        assert "rank 1" in text, (what, text)
        assert "do all ranks run the same version of fastddp?" in text, (what, text)
        assert len(text) < 600, (what, text)


def _ranks_agree_on_what_they_compare(rank: int, world_size: int) -> None:
    """Digests are of bytes that every version of Python makes alike."""
    texts: list[bytes] = []
    sha256 = hashlib.sha256
    hashlib.sha256 = lambda data: texts.append(bytes(data)) or sha256(data)  # type: ignore
    fastddp.wrap(torch.nn.Linear(2, 1))
    hashlib.sha256 = sha256
    text = next(text for text in texts if text.startswith(b"["))  # there are other digests too
    described = json.loads(text)
    assert ["parameter 'weight'", "shape (1, 2), torch.float32, strides (2, 1), requires grad"] in (
        described
    )
    assert text == json.dumps(described, sort_keys=True, separators=(",", ":")).encode()


def test_what_is_compared_is_canonical_text() -> None:
    run_ranks(_ranks_agree_on_what_they_compare, 2)


def _meet_in_store(rank: int, world_size: int) -> None:
    """Ranks compare in the store what they cannot compare by collectives, which they launch."""
    group = dist.group.WORLD
    assert gather_if_different(group, ["same"], list, "a test", "topic/1") is None
    others = dist.all_reduce(torch.ones(1), async_op=True) if rank == 0 else None
    found = gather_if_different(group, ["mine", str(rank)], list, "a test", "topic/2")
    assert found == [["mine", str(other)] for other in range(world_size)]
    if rank == 1:
        others = dist.all_reduce(torch.ones(1), async_op=True)
    if others is not None:
        others.wait()


def test_ranks_that_are_out_of_step_compare_in_the_store() -> None:
    run_ranks(_meet_in_store, 2)


def _nobody_comes(rank: int, world_size: int) -> str:
    init_group("gloo", 1)
    if rank == 1:
        return ""
    with pytest.raises(dist.DistBackendError) as error:
        gather_if_different(dist.group.WORLD, ["alone"], list, "a test", "topic")
    return str(error.value)


def test_a_meeting_in_the_store_has_a_deadline() -> None:
    text, _ = run_ranks(_nobody_comes, 2, init_group=False)
    assert "rank 0: a test failed" in text


def test_a_rank_that_puts_garbage_into_the_store_is_named() -> None:
    run_ranks(_garbage_in_store, 2)


def _garbage_in_store(rank: int, world_size: int) -> None:
    store = dist.group.WORLD.get_group_store()
    if rank == 1:
        for what, value in {
            "digest": b"?" * 32,
            "size": b"\3" + bytes(7),
            "text": b"\xff[[",
        }.items():
            store.set(f"fastddp topic/{what}/1", value)
        return
    with pytest.raises(fastddp.MismatchError, match="rank 1 has sent cannot be understood"):
        gather_if_different(dist.group.WORLD, ["mine"], list, "a test", "topic")
