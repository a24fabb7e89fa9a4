"""The harness of the multi-rank tests: it neither hides nor outlasts a failure."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests import ranks
from tests.ranks import Died, RankFailed, run_ranks


def _sum_of_ranks(rank: int, world_size: int, scale: int) -> tuple[int, int, list[float]]:
    t = torch.full((3,), float(scale * (rank + 1)))
    dist.all_reduce(t)
    return rank, world_size, t.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_values_come_back_in_rank_order(world_size: int) -> None:
    total = 10.0 * sum(range(1, world_size + 1))
    want = [(rank, world_size, [total] * 3) for rank in range(world_size)]
    assert run_ranks(_sum_of_ranks, world_size, 10) == want


def _facts(_rank: int, _world_size: int) -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "backend": dist.get_backend() if dist.is_initialized() else None,
        "env": {name: os.environ.get(name) for name in ("SET", "REMOVED", "RANK", "INHERITED")},
    }


def test_each_rank_is_a_process_with_one_thread_and_the_callers_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("REMOVED", "here")
    monkeypatch.setenv("INHERITED", "yes")
    facts = run_ranks(_facts, 2, env={"SET": "1", "REMOVED": None})
    assert len({f["pid"] for f in facts} | {os.getpid()}) == 3
    for f in facts:
        assert f["threads"] == 1
        assert f["backend"] == "gloo"
        assert f["env"] == {"SET": "1", "REMOVED": None, "RANK": None, "INHERITED": "yes"}
    assert "SET" not in os.environ
    later = run_ranks(_facts, 2, init_group=False)
    assert [f["backend"] for f in later] == [None, None]
    assert [f["env"]["SET"] for f in later] == [None, None]  # type: ignore[index]
    assert not {f["pid"] for f in facts} & {f["pid"] for f in later}


def _own_group(rank: int, _world_size: int) -> tuple[bool, int]:
    before = dist.is_initialized()
    ranks.init_group()
    (ranks.scratch_folder() / f"was-here-{rank}").touch()
    dist.barrier()
    return before, len(list(ranks.scratch_folder().glob("was-here-*")))


def test_a_rank_can_make_its_own_group() -> None:
    assert run_ranks(_own_group, 2, init_group=False) == [(False, 2)] * 2


def _raise_on_one(rank: int, _world_size: int, culprit: int) -> None:
    if rank == culprit:
        print("said before failing")
        _deeper()
    dist.all_reduce(torch.ones(1))  # the others wait for the culprit


def _deeper() -> None:
    raise ValueError("the cause")


@pytest.mark.parametrize("culprit", [0, 2])
@pytest.mark.timeout(30)  # not 300 s: a failure ends the ranks that wait for the failed one
def test_a_failure_shows_its_rank_traceback_and_output(culprit: int) -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(_raise_on_one, 3, culprit, timeout=300)
    error = caught.value
    assert (error.rank, error.reason, error.error_type) == (culprit, "raised", "ValueError")
    text = str(error)
    assert text.startswith(f"rank {culprit} of 3 raised ValueError")
    assert "in _raise_on_one" in text
    assert "in _deeper" in text
    assert "ValueError: the cause" in text
    assert "said before failing" in text


def _all_raise_in_turn(rank: int, _world_size: int) -> None:
    dist.barrier()  # on a busy machine they start far apart
    time.sleep(0.02 if rank == 1 else 0.3)
    raise RuntimeError(f"from rank {rank}")


def test_of_several_failures_the_first_is_shown_first() -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(_all_raise_in_turn, 3)
    assert caught.value.rank == 1
    shown = [str(caught.value).index(f"RuntimeError: from rank {rank}") for rank in range(3)]
    assert min(shown) == shown[1]


def _kill_self(rank: int, _world_size: int, culprit: int) -> str:
    if rank == culprit:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError:
        if culprit == 0:
            raise  # what a dead peer usually leads to
        return "noticed"
    return "not noticed"


@pytest.mark.timeout(30)
def test_a_killed_rank_is_named_before_what_its_peers_raise() -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(_kill_self, 2, 0, timeout=300)
    assert (caught.value.rank, caught.value.reason) == (0, "died")
    assert str(caught.value).startswith("rank 0 of 2 died: killed by signal SIGKILL")
    assert run_ranks(_sum_of_ranks, 2, 1)[0] == (0, 2, [3.0] * 3)  # the next call has all its ranks


@pytest.mark.timeout(30)
def test_a_rank_may_die_where_the_test_expects_it() -> None:
    values = run_ranks(_kill_self, 3, 2, timeout=300, expect_dead=[2])
    assert values == ["noticed", "noticed", Died(-signal.SIGKILL)]


def _hang_on_one(rank: int, _world_size: int, pid_folder: str) -> None:
    Path(pid_folder, str(os.getpid())).touch()
    if rank == 1:
        if os.fork() == 0:  # a rank's own child must not survive it either
            Path(pid_folder, str(os.getpid())).touch()
            time.sleep(3600)
        _wait_for_ever()


def _wait_for_ever() -> None:
    threading.Event().wait()


def test_a_hang_is_killed_and_shows_where_the_rank_stood(tmp_path: Path) -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(_hang_on_one, 2, str(tmp_path), timeout=8, init_group=False)
    assert (caught.value.rank, caught.value.reason) == (1, "timeout")
    text = str(caught.value)
    assert text.startswith("rank(s) 1 of 2 had not finished after 8 s")
    assert "in _wait_for_ever" in text
    assert "in _hang_on_one" in text
    assert "rank 0: finished" in text
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 3
    assert [pid for pid in pids if _alive(pid)] == []


def _alive(pid: int) -> bool:
    deadline = time.monotonic() + 5  # an orphan's new parent takes a moment to reap it
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        if state == "Z":
            return False
        time.sleep(0.02)
    return True


def _stuck_in_collective(rank: int, _world_size: int) -> None:
    if rank == 0:
        dist.all_reduce(torch.ones(1))
    else:
        _wait_for_ever()


def test_all_ranks_of_a_hang_are_shown() -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(_stuck_in_collective, 2, timeout=8)
    assert caught.value.reason == "timeout"
    assert "rank(s) 0, 1 of 2" in str(caught.value)
    assert "all_reduce" in str(caught.value)
    assert "_wait_for_ever" in str(caught.value)


def _unpicklable(_rank: int, _world_size: int) -> object:
    return threading.Lock()


def test_what_cannot_travel_is_refused() -> None:
    with pytest.raises(TypeError, match="use a module-level function"):
        run_ranks(lambda _rank, _world_size: None, 2)
    with pytest.raises(RankFailed, match="cannot pickle"):
        run_ranks(_unpicklable, 1)


def _exit(_rank: int, _world_size: int) -> None:
    raise SystemExit(3)


def _leave(_rank: int, _world_size: int) -> None:
    os._exit(3)


def test_leaving_without_a_value_is_a_failure() -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(_exit, 1)
    assert caught.value.error_type == "SystemExit"
    with pytest.raises(RankFailed, match="rank 0 of 1 died: exit status 3 and no report"):
        run_ranks(_leave, 1)
