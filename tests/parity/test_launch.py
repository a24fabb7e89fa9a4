"""The three ways to start, and that a script ends in whatever order it takes things down."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastddp
from tests import ranks
from tests.conftest import require_native
from tests.models import Ladder, ladder_x, mean_x
from tests.parity.checks import assert_ladder
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
import fastddp
from tests.models import Ladder

model = fastddp.wrap(Ladder(), engine=sys.argv[1])
rank = dist.get_rank() if dist.is_initialized() else 0
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
for step in range(3):
    optimizer.zero_grad()
    model(6.0 * (rank + 1)).backward()
    optimizer.step()
result = [rank, dist.is_initialized(), model.a.unique().tolist(), model.a.grad.unique().tolist()]
with open(os.path.join(sys.argv[2], f"rank-{rank}"), "w") as file:
    file.write(repr(result))
how = sys.argv[3]
if how == "destroy, then drop":
    dist.destroy_process_group()
    del model, optimizer
elif how == "drop, then destroy":
    del model, optimizer
    dist.destroy_process_group()
elif how == "destroy, and keep":
    dist.destroy_process_group()
else:
    assert how == "leave"
"""


def _environment() -> dict[str, str]:
    environ = {k: v for k, v in os.environ.items() if k not in ranks.LAUNCHER_VARIABLES}
    environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    environ["PYTHONPATH"] = str(ROOT)
    return environ


def _run(arguments: list[str], tmp_path: Path) -> dict[int, Any]:
    """Run Python; a script that does not end is killed by the timeout, which fails the test."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = {}
    for path in tmp_path.glob("rank-*"):
        rank, *rest = eval(path.read_text())
        results[rank] = rest
    return results


@pytest.mark.parametrize(
    ("how", "engine"),
    [
        ("leave", "native"),
        ("destroy, then drop", "native"),
        ("destroy, and keep", "native"),
        ("drop, then destroy", "native"),
        ("destroy, then drop", "python"),
    ],
)
def test_torchrun(how: str, engine: str, tmp_path: Path) -> None:
    """Whole processes, with their exits. (Each takes seconds: the engines are not crossed.)"""
    if engine == "native":
        require_native()
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    results = _run([*torchrun, str(script), engine, str(tmp_path), how], tmp_path)
    # Gradients 6 and 12: their average is 9, three steps from 1.
    assert results == {rank: [True, [1.0 - 27.0], [9.0]] for rank in (0, 1)}


def test_plain_python(engine: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    results = _run([str(script), engine, str(tmp_path), "leave"], tmp_path)
    assert results == {0: [False, [1.0 - 18.0], [6.0]]}


def test_a_world_of_one_is_complete(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ranks.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    model = Ladder()
    ours = fastddp.wrap(model, engine=engine)
    assert not dist.is_initialized()
    assert ours.process_group is None
    with ours.no_sync():
        ours(2.0).backward()
    ours(3.0).backward()
    assert_ladder(model, 5.0, "accumulated")
    assert list(ours.state_dict()) == list(Ladder().state_dict())
    assert ours.plan().buckets == ()
    assert ours.stats().rounds == 0


def _one_rank_environment(rank: int, world_size: int, engine: str) -> tuple[bool, int]:
    ours = fastddp.wrap(Ladder(), engine=engine)
    ours(2.0).backward()
    assert_ladder(ours.module, 2.0, "alone")
    return dist.is_initialized(), dist.get_world_size()


def test_a_launcher_that_starts_one_rank(engine: str) -> None:
    env = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    assert run_ranks(_one_rank_environment, 1, engine, env=env, init_group=False) == [(True, 1)]


def _spawned(rank: int, world_size: int, store: str, engine: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    ours = fastddp.wrap(Ladder(), engine=engine)
    for step in range(3):
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size)).backward()
        assert_ladder(ours.module, mean_x(step, world_size), step)
    Path(folder, f"done-{rank}").touch()
    dist.destroy_process_group()


def test_spawn(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    mp.spawn(_spawned, args=(2, str(tmp_path / "store"), engine, str(tmp_path)), nprocs=2)
    assert sorted(path.name for path in tmp_path.glob("done-*")) == ["done-0", "done-1"]


# --- taking down ----------------------------------------------------------------------------------


def _take_down(rank: int, world_size: int, make_name: str, how: str, engine: str) -> None:
    ranks.init_group()
    make = getattr(fastddp, make_name)
    ours = make(Ladder(), engine=engine)
    ours(ladder_x(rank, 0, world_size)).backward()
    assert_ladder(ours.module, mean_x(0, world_size), "before")
    model = ours.module
    if how == "drop first":
        del ours
        dist.destroy_process_group()
    elif how == "destroy first":
        dist.destroy_process_group()
        del ours
    elif how == "in a cycle":
        model.cycle = [ours]
        dist.destroy_process_group()
        del ours, model  # the collector, in the harness, finds them
        return
    else:
        assert how == "in the middle of accumulation"
        with ours.no_sync():
            ours(1.0).backward()
        dist.destroy_process_group()
        del ours
    model.zero_grad()
    model(1.0).backward()
    assert_ladder(model, 1.0, "the model is still a model")


@pytest.mark.parametrize("make_name", ["DistributedDataParallel", "wrap"])
@pytest.mark.parametrize(
    "how", ["drop first", "destroy first", "in a cycle", "in the middle of accumulation"]
)
def test_group_and_wrapper_go_in_either_order(how: str, make_name: str, engine: str) -> None:
    run_ranks(_take_down, 2, make_name, how, engine, init_group=False, timeout=30)


class _Context:
    """Stands in for what a backward keeps in thread-local state, and tells who frees it."""

    freed_by: ClassVar[list[int]] = []

    def __del__(self) -> None:
        self.freed_by.append(threading.get_native_id())


def _who_frees(rank: int, world_size: int, engine: str) -> None:
    torch.autograd.graph.contextvars = types.SimpleNamespace(copy_context=_Context)  # type: ignore
    ours = fastddp.wrap(Ladder(), engine=engine)
    for _ in range(300):
        ours.zero_grad()
        ours(1.0).backward()
    assert len(_Context.freed_by) >= 299
    assert set(_Context.freed_by) == {threading.get_native_id()}


def test_no_python_object_is_left_to_a_thread_of_the_transport(engine: str) -> None:
    """Such a thread needs the GIL to free it: it aborts when the interpreter ends just then.

    torch's backward keeps a Python object in thread-local state, and a collective that is launched
    inside the backward copies that state. (torch's own class fails this test.)
    """
    run_ranks(_who_frees, 2, engine)


def _after_destroy(rank: int, world_size: int, engine: str) -> None:
    """Using what lost its group is an error that says so, and no hang or crash."""
    ranks.init_group()
    ours = fastddp.DistributedDataParallel(Ladder(), engine=engine)
    ours(ladder_x(rank, 0, world_size)).backward()
    dist.destroy_process_group()
    loss = ours(1.0)
    with pytest.raises(RuntimeError, match=r"process group.*destroyed"):
        loss.backward()


def test_a_backward_after_the_group_is_gone(engine: str) -> None:
    run_ranks(_after_destroy, 2, engine, init_group=False)


def _again(rank: int, world_size: int, engine: str) -> None:
    """A process may make a second group, and wrap the same model again."""
    model = Ladder()
    for nth in range(2):
        ours = fastddp.wrap(model, engine=engine)
        for step in range(2):
            ours.zero_grad()
            ours(ladder_x(rank, step, world_size)).backward()
            assert_ladder(model, mean_x(step, world_size), (nth, step))
        del ours
        dist.destroy_process_group()
        if nth == 0:
            store = dist.FileStore(str(ranks.scratch_folder() / "second"), world_size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)


def test_a_second_group_in_the_same_process(engine: str) -> None:
    run_ranks(_again, 2, engine)
