"""The ways to start, and that a script ends in whatever order it takes things down."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
import types
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastddp
from fastddp.comm import environment, launch
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


def _run(arguments: list[str], tmp_path: Path, launcher: Sequence[str] = ()) -> dict[int, Any]:
    """Run Python; a script that does not end is killed by the timeout, which fails the test."""
    done = subprocess.run(
        [*launcher, sys.executable, *arguments],
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
        pytest.param("destroy, then drop", "native", marks=pytest.mark.slow),
        pytest.param("destroy, and keep", "native", marks=pytest.mark.slow),
        pytest.param("drop, then destroy", "native", marks=pytest.mark.slow),
        pytest.param("destroy, then drop", "python", marks=pytest.mark.slow),
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


def _place(launcher: str, rank: int, world_size: int, job: str) -> dict[str, str]:
    """What a launcher sets in a rank, all on one host."""
    if launcher == "Open MPI":
        return {
            "OMPI_COMM_WORLD_RANK": str(rank),
            "OMPI_COMM_WORLD_SIZE": str(world_size),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
            "OMPI_COMM_WORLD_LOCAL_SIZE": str(world_size),
            "PMIX_NAMESPACE": job,
        }
    assert launcher == "Slurm"
    return {
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "elsewhere,localhost",
        "SLURM_NTASKS": "64",  # of the job: one step need not use all
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(world_size),
        "SLURM_STEP_NODELIST": "localhost",  # found by name: the number of hosts is not given
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


def _launched_by(rank: int, world_size: int, launcher: str, engine: str, job: str) -> list[Any]:
    os.environ.update(_place(launcher, rank, world_size, job))
    ours = fastddp.wrap(Ladder(), engine=engine)
    for step in range(3):
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size)).backward()
        assert_ladder(ours.module, mean_x(step, world_size), step)
    found = [dist.get_rank(), dist.get_world_size(), dist.get_backend()]
    del ours
    dist.destroy_process_group()
    # Another one, also when this rank is there before rank 0 has left the first.
    fastddp.init_process_group("gloo", timeout=timedelta(seconds=30))
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    return [*found, dist.get_backend(), total.item()]


@pytest.mark.parametrize("launcher", ["Open MPI", "Slurm"])
def test_ranks_of_other_launchers(launcher: str, engine: str) -> None:
    """Nothing but its variables says who the ranks are: no rank trains a model of its own."""
    values = run_ranks(
        _launched_by, 2, launcher, engine, f"job-{os.getpid()}-{engine}", init_group=False
    )
    backend = launch.default_backend()
    assert values == [[rank, 2, backend, "gloo", 3.0] for rank in (0, 1)]


def _call_again(rank: int, world_size: int, job: str) -> None:
    os.environ.update(_place("Open MPI", rank, world_size, job))
    gave_up = ranks.scratch_folder() / "gave up"
    for _ in range(2):
        if rank == 0:
            with pytest.raises(
                RuntimeError, match=r"rank\(s\) 1, which have not come within 0.3 s"
            ):
                fastddp.init_process_group("gloo", timeout=timedelta(seconds=0.3))
    if rank == 0:
        gave_up.touch()
    while not gave_up.exists():
        time.sleep(0.01)
    for nth in range(2):
        if rank == 1 and nth == 1:
            with pytest.raises(RuntimeError, match=r"rank 1 of 2.* has not heard from rank 0 that"):
                fastddp.init_process_group("gloo", timeout=timedelta(seconds=0.3))
            gave_up.unlink()
        while rank == 0 and nth == 1 and gave_up.exists():
            time.sleep(0.01)
        fastddp.init_process_group("gloo", timeout=timedelta(seconds=20))
        total = torch.tensor([rank + 1.0])
        dist.all_reduce(total)
        assert total.item() == 3.0
        dist.destroy_process_group()


def test_ranks_meet_after_one_has_called_in_vain() -> None:
    run_ranks(_call_again, 2, f"again-{os.getpid()}", init_group=False)


ALONE = """
import torch, fastddp
fastddp.wrap(torch.nn.Linear(1, 1))
assert not torch.distributed.is_initialized()
"""


def _start_others(rank: int, world_size: int, job: str) -> None:
    """A rank starts a script of its own, which inherits the launcher's variables."""
    os.environ.update(_place("Open MPI", rank, world_size, job))
    fastddp.init_process_group("gloo", timeout=timedelta(seconds=30))
    command = [sys.executable, "-c", ALONE]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "FASTDDP_LAUNCHER": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=40)
    said = {
        0: r"cannot listen at 127.0.0.1:\d+; .* if rank 0 started this process, set FASTDDP_LAUNC",
        1: rf"rank 1 of 2, started by mpirun \(Open MPI\), is 'process {os.getpid()} on .* already,"
        r" not this 'process \d+ on .*set FASTDDP_LAUNCHER=0",
    }
    assert done.returncode != 0
    assert re.search(said[rank], done.stderr), done.stderr
    environ["FASTDDP_LAUNCHER"] = "0"
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=40)
    assert done.returncode == 0, done.stderr
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)  # the ranks' own group is as it was
    assert total.item() == 3.0


def test_what_a_rank_starts_is_no_rank() -> None:
    run_ranks(_start_others, 2, f"others-{os.getpid()}", init_group=False)


ONE_OF_TWO = """
import sys, time, torch, fastddp
import torch.distributed as dist
fastddp.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
assert total.item() == 3.0
rank = dist.get_rank()
dist.destroy_process_group()
if rank == 0:
    time.sleep(float(sys.argv[1]))
"""


def _run_programs(rank: int, world_size: int, job: str) -> None:
    """What `srun sh -c "python a.py; python b.py"` does; rank 0 of the first one ends late."""
    environ = os.environ | _place("Open MPI", rank, world_size, job) | {"PYTHONPATH": str(ROOT)}
    for late_s in (2, 0):
        command = [sys.executable, "-c", ONE_OF_TWO, str(late_s)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=40)
        assert done.returncode == 0, done.stderr


def test_a_second_program_meets_when_the_first_has_ended() -> None:
    run_ranks(_run_programs, 2, f"programs-{os.getpid()}", init_group=False)


def _who(rank: int) -> list[int | None]:
    return [dist.get_rank(), dist.get_world_size(), environment.find_local_rank()]


def test_spawn_by_a_launcher_s_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _place("Slurm", 3, 8, f"spawn-{os.getpid()}").items():
        monkeypatch.setenv(name, value)
    assert fastddp.spawn(_who, 2) == [[0, 2, 0], [1, 2, 1]]


def _mpiexec(kind: str) -> list[str]:
    """Returns a command that starts two ranks by an MPI of that kind; skips where there is none."""
    for name in (str(Path(sys.executable).with_name("mpiexec")), "mpiexec", f"mpiexec.{kind}"):
        path = shutil.which(name)
        if path is None:
            continue
        version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        if kind == "openmpi" and re.search("Open ?MPI|OpenRTE|PRRTE", version, re.IGNORECASE):
            return [path, "--allow-run-as-root", "--oversubscribe", "-n", "2"]
        if kind == "hydra" and "HYDRA" in version:
            return [path, "-n", "2"]
    pytest.skip(f"there is no mpiexec of {kind}")


@pytest.mark.parametrize("kind", ["openmpi", "hydra"])
def test_mpiexec(kind: str, tmp_path: Path) -> None:
    command = _mpiexec(kind)
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    arguments = [str(script), "python", str(tmp_path), "destroy, then drop"]
    results = _run(arguments, tmp_path, command)
    assert results == {rank: [True, [1.0 - 27.0], [9.0]] for rank in (0, 1)}


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
