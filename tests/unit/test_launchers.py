"""What launchers' variables are taken for. The variables are those that the launchers set."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastddp
from fastddp.comm import environment, launchers, rendezvous
from fastddp.comm.launchers import LOOPBACK, find, first_of_nodelist
from fastddp.ddp.wrap import choose_device
from tests.ranks import LAUNCHER_VARIABLES

OPEN_MPI_4 = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1985150976.0;tcp://192.0.2.2,198.51.100.7:43505;tcp6://[fd00::2]:44103",
    "PMIX_NAMESPACE": "1985150977",
    "PMIX_RANK": "1",
}
OPEN_MPI_5 = {
    **{name: OPEN_MPI_4[name] for name in OPEN_MPI_4 if "orte" not in name},
    "PMIX_NAMESPACE": "prterun-gpu-a-6845@1",
    "PMIX_SERVER_URI41": "prterun-gpu-a-6845@0.0;tcp4://127.0.0.1:33967",
}
MPICH = {
    "MPI_LOCALNRANKS": "2",
    "MPI_LOCALRANKID": "1",
    "PMI_FD": "8",
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
}
ALLOCATION = {  # the shell of salloc, in which nothing was started by srun
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "gpu[03-04]",
    "SLURM_NTASKS": "4",
    "SLURM_NPROCS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
BATCH_SCRIPT = ALLOCATION | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = BATCH_SCRIPT | {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_LAUNCH_NODE_IPADDR": "192.0.2.9",
}
# mpirun's daemons are tasks of srun, and what they start has their variables.
INSIDE_STEP = STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "b"}
JSRUN = {
    "JSM_NAMESPACE_RANK": "5",
    "JSM_NAMESPACE_SIZE": "8",
    "JSM_NAMESPACE_LOCAL_RANK": "1",
    "JSM_NAMESPACE_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "LSB_JOBID": "99",
    "LSB_MCPU_HOSTS": "batch1 1 node4 42 node5 42",
}
PALS = {
    "PALS_RANKID": "2",
    "PALS_LOCAL_RANKID": "0",
    "PALS_APID": "c2d4",
    "PMI_RANK": "2",
    "PMI_SIZE": "4",
    "PMI_LOCAL_SIZE": "2",
    "PBS_JOBID": "12.server",
}
FLUX = {
    "FLUX_JOB_ID": "\u0192cMJWq3kK",
    "FLUX_JOB_SIZE": "4",
    "FLUX_JOB_NNODES": "1",
    "FLUX_TASK_RANK": "3",
    "FLUX_TASK_LOCAL_ID": "1",
    "FLUX_URI": "local:///run/flux/local",
    "PMI_FD": "8",
    "PMI_RANK": "3",
    "PMI_SIZE": "4",
    "LSB_HOSTS": "a a b b",
}
TWO_HOSTS = {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("environ", "launcher", "rank", "size", "local_rank", "host"),
    [
        (OPEN_MPI_4, "mpirun (Open MPI)", 1, 2, 1, LOOPBACK),
        (OPEN_MPI_4 | TWO_HOSTS, "mpirun (Open MPI)", 1, 2, 0, "192.0.2.2"),
        (OPEN_MPI_5 | TWO_HOSTS, "mpirun (Open MPI)", 1, 2, 0, "gpu-a"),
        (OPEN_MPI_4 | TWO_HOSTS | INSIDE_STEP, "mpirun (Open MPI)", 1, 2, 0, "gpu03"),
        (MPICH, "mpiexec (MPICH)", 1, 2, 1, LOOPBACK),
        (MPICH | INSIDE_STEP, "mpiexec (MPICH)", 1, 2, 1, LOOPBACK),
        (MPICH | {"MPI_LOCALNRANKS": "1"}, "mpiexec (MPICH)", 1, 2, 1, None),
        (MPICH | {"MPI_LOCALNRANKS": "1"} | ALLOCATION, "mpiexec (MPICH)", 1, 2, 1, "gpu03"),
        (STEP, "srun", 3, 4, 1, "gpu03"),
        (STEP | {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_JOBID": "7.2"}, "srun", 3, 4, 1, "gpu03"),
        (STEP | {"PMIX_RANK": "3", "PMIX_NAMESPACE": "slurm.7.2"}, "srun", 3, 4, 1, "gpu03"),
        (STEP | {"SLURM_STEP_NODELIST": "gpu04"}, "srun", 3, 4, 1, "gpu04"),
        (STEP | {"SLURM_STEP_NUM_NODES": "1"}, "srun", 3, 4, 1, LOOPBACK),
        (JSRUN, "jsrun", 5, 8, 1, "node4"),
        (PALS, "mpiexec (PALS)", 2, 4, 0, None),
        (FLUX, "flux", 3, 4, 1, LOOPBACK),
        (FLUX | {"FLUX_JOB_NNODES": "2"}, "flux", 3, 4, 1, None),
        (FLUX | JSRUN | {"FLUX_JOB_NNODES": "2"}, "flux", 3, 4, 1, None),  # Flux inside of jsrun
        (OPEN_MPI_4 | FLUX, "mpirun (Open MPI)", 1, 2, 1, LOOPBACK),  # mpirun inside of Flux
        (
            {"PMIX_RANK": "1", "PMIX_NAMESPACE": "prterun-a-1@1"},
            "a PMIx launcher",
            1,
            None,
            None,
            "a",
        ),
        (
            {"PMI_ID": "1", "PMI_PORT": "a:1", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            "mpiexec -pmi-port (MPICH)",
            1,
            None,
            None,
            None,
        ),
        ({"PBS_VNODENUM": "1", "PBS_JOBID": "3"}, "pbsdsh", 1, None, None, None),
    ],
)
def test_the_place_of_a_rank(environ, launcher, rank, size, local_rank, host) -> None:
    place = find(environ)
    assert place is not None
    assert (place.launcher, place.rank, place.size) == (launcher, rank, size)
    assert (place.local_rank, place.host) == (local_rank, host)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        ALLOCATION,
        BATCH_SCRIPT,
        STEP | {"SLURM_STEP_ID": "4294967291"},  # the batch script, as newer Slurm counts it
        STEP | {"SLURM_STEP_ID": "4294967290"},  # the shell of salloc with use_interactive_step
        {"PBS_JOBID": "3", "PBS_VNODENUM": "0", "PBS_NODEFILE": "/nowhere"},
        {"LSB_JOBID": "99", "LSB_HOSTS": "a a b b"},
        {"FLUX_URI": "local:///run/flux/local"},  # the batch script of `flux batch`
    ],
)
def test_an_allocation_starts_no_ranks(environ) -> None:
    assert find(environ) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node", "node"),
        ("a,b", "a"),
        ("gpu[03-07,12],cpu1", "gpu03"),
        ("gpu[12,03-07]", "gpu12"),
        ("r[1-2]c[0-3]n8,x", "r1c0n8"),
        ("n-a[7],b", "n-a7"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_nodelist(nodes: str, first: str) -> None:
    assert first_of_nodelist(nodes) == first


def test_hosts_in_files(tmp_path: Path) -> None:
    file = tmp_path / "nodes"
    file.write_text("n17\nn17\nn18\n")
    place = find(PALS | {"PBS_NODEFILE": str(file)})
    assert place is not None
    assert (place.host, place.host_from) == ("n17", "PBS_NODEFILE")
    place = find(JSRUN | {"LSB_DJOB_HOSTFILE": str(file)})
    assert place is not None
    assert place.host == "n18"  # jsrun leaves out the host of the batch script


@pytest.mark.parametrize(
    ("environ", "another_rank", "another_start"),
    [
        (OPEN_MPI_5, {"OMPI_COMM_WORLD_RANK": "0"}, {"PMIX_NAMESPACE": "prterun-gpu-a-6846@1"}),
        (STEP, {"SLURM_PROCID": "0"}, {"SLURM_STEP_ID": "3"}),
        (PALS, {"PMI_RANK": "0", "PALS_RANKID": "0"}, {"PALS_APID": "c2d5"}),
        (FLUX, {"FLUX_TASK_RANK": "0", "PMI_RANK": "0"}, {"FLUX_JOB_ID": "\u0192cMJWq3kL"}),
        (
            MPICH | TWO_HOSTS | {"MPI_LOCALNRANKS": "1", "PBS_JOBID": "1"},
            {"PMI_RANK": "0"},
            {"PBS_JOBID": "2"},
        ),
    ],
)
def test_all_ranks_of_a_start_have_one_port(environ, another_rank, another_start) -> None:
    place, same, other = (find(environ | more) for more in ({}, another_rank, another_start))
    assert place is not None
    assert same is not None
    assert other is not None
    assert place.rank != same.rank
    assert place.port == same.port
    assert 10_000 <= place.port < 30_000
    assert other.port != place.port
    assert other.job != place.job


def test_a_start_without_a_name_is_that_of_its_parent(tmp_path: Path) -> None:
    """MPICH on one host: the ranks, each in a shell or not, agree that one process started them."""
    script = tmp_path / "port.py"
    folder = str(Path(launchers.__file__).parent)
    script.write_text(
        f"import sys; sys.path.append({folder!r})\nimport launchers\nprint(launchers.find().port)\n"
    )
    plain = [sys.executable, str(script)]

    def port(command: list[str], environ: dict[str, str]) -> int:
        done = subprocess.run(
            command, env=os.environ | environ, stdout=subprocess.PIPE, text=True, check=True
        )
        return int(done.stdout)

    zero = port(plain, MPICH | {"PMI_RANK": "0", "MPI_LOCALRANKID": "0"})
    assert zero == port(["sh", "-c", f"{' '.join(plain)}; true"], MPICH)
    assigned = " ".join(f"{name}={value}" for name, value in MPICH.items())
    assert zero != port(["sh", "-c", f"{assigned} {' '.join(plain)}; true"], {})


# --- together with torchrun's variables -----------------------------------------------------------


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def give(environ: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        environ.setenv(name, value)


TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "6",
    "LOCAL_RANK": "2",
    "MASTER_ADDR": "m",
    "MASTER_PORT": "1",
}


def test_torchrun_s_variables_win(environ: pytest.MonkeyPatch) -> None:
    give(environ, OPEN_MPI_4 | STEP | TORCHRUN)
    found = environment.describe_environment()
    assert (found.rank, found.world_size, found.local_rank) == (5, 6, 2)
    assert found.meeting is None  # torch's own env:// is to look


def test_they_complete_what_a_launcher_says(environ: pytest.MonkeyPatch) -> None:
    give(environ, STEP | {"MASTER_ADDR": "m", "WORLD_SIZE": "4"})
    found = environment.describe_environment()
    assert (found.rank, found.world_size, found.local_rank) == (3, 4, 1)
    assert found.meeting is not None
    assert (found.meeting.host, found.meeting.host_from) == ("m", None)
    give(environ, {"MASTER_PORT": "17", "LOCAL_RANK": "0"})
    found = environment.describe_environment()
    assert found.meeting is not None
    assert (found.meeting.port, found.local_rank) == (17, 0)


def test_launchers_can_be_turned_off(environ: pytest.MonkeyPatch) -> None:
    give(environ, STEP | {"FASTDDP_LAUNCHER": "0"})
    assert not environment.describe_environment().launched
    assert environment.find_local_rank() is None
    assert fastddp.info().launcher == "none  (FASTDDP_LAUNCHER=0)"
    train_alone()
    assert not dist.is_initialized()
    give(environ, TORCHRUN)
    assert environment.describe_environment().rank == 5
    environ.delenv("RANK")
    give(environ, {"FASTDDP_LAUNCHER": "no"})
    for call in (environment.describe_environment, fastddp.init_process_group):
        with pytest.raises(ValueError, match="FASTDDP_LAUNCHER='no' is not one of 0, 1"):
            call()
    assert fastddp.info().launcher == "FASTDDP_LAUNCHER='no' is not one of 0, 1"
    give(environ, {"FASTDDP_LAUNCHER": "1", "LOCAL_RANK": "1"})
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environ.delenv(name)
    assert environment.describe_environment().rank == 3


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        (STEP | {"WORLD_SIZE": "8"}, r"WORLD_SIZE=8, but srun, which started this process, says 4"),
        (STEP | {"RANK": "0"}, r"RANK=0, but srun.* says 3.* or leave RANK out"),
        (STEP | {"SLURM_PROCID": "four"}, r"PROCID='four' in the environment is not a number"),
        (STEP | {"SLURM_PROCID": "4"}, r"RANK=4 is not in 0 ... WORLD_SIZE-1=3"),
        (STEP | {"SLURM_PTY_PORT": "1"}, r"rank 3 of 4 of 'srun --pty', whose other ranks have no"),
        (
            MPICH | {"MPI_LOCALNRANKS": "1"},
            r"mpiexec \(MPICH\) started this process as rank 1 of 2, but does not say MASTER_ADDR,"
            r" MASTER_PORT \(nothing in SLURM_JOB_NODELIST, PBS_NODEFILE, LSB_HOSTS.*\). Set"
            r" MASTER_ADDR to rank 0's host, MASTER_PORT to a free port there, the same on all",
        ),
        (
            FLUX | {"FLUX_JOB_NNODES": "2"},
            r"flux started this process as rank 3 of 4, but does not say MASTER_ADDR. Set MASTER_AD"
            r"DR to rank 0's host, the same on all",
        ),
        (
            {"PBS_VNODENUM": "1", "PBS_JOBID": "3", "MASTER_ADDR": "m"},
            r"pbsdsh started this process as rank 1, but does not say WORLD_SIZE. Set WORLD_SIZE to"
            r" the number of ranks, the same",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_named(environ, variables, text) -> None:
    give(environ, variables)
    for call in (environment.describe_environment, fastddp.init_process_group, train_alone):
        with pytest.raises(RuntimeError, match=text):
            call()
    assert not dist.is_initialized()


def train_alone() -> None:
    fastddp.wrap(nn.Linear(1, 1))


def test_rank_0_has_to_be_where_the_ranks_would_meet(environ: pytest.MonkeyPatch) -> None:
    give(environ, STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "192.0.2.[77-78]"})
    with pytest.raises(
        RuntimeError, match=r"meet on 192.0.2.77, .*SLURM_STEP_NODELIST. Set MASTER"
    ):
        fastddp.init_process_group()


def test_a_port_that_is_taken_is_named(environ: pytest.MonkeyPatch) -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        give(environ, OPEN_MPI_4 | {"OMPI_COMM_WORLD_RANK": "0", "MASTER_PORT": str(port)})
        with pytest.raises(
            RuntimeError, match=rf"cannot listen at 127.0.0.1:{port}; set MASTER_ADD"
        ):
            fastddp.init_process_group()


@pytest.mark.parametrize("patience_ms", [50, 200])
def test_rank_0_names_the_ranks_it_waits_for(environ, caplog, patience_ms) -> None:
    give(environ, OPEN_MPI_4 | {"OMPI_COMM_WORLD_RANK": "0", "MASTER_PORT": "0"})
    environ.setattr(rendezvous, "_PATIENCE", timedelta(milliseconds=patience_ms))
    waits = r"rank 0 of 2, started by mpirun \(Open MPI\), waits for rank\(s\) 1"
    with pytest.raises(RuntimeError, match=f"{waits}, which have not come within 0.2 s"):
        fastddp.init_process_group(timeout=timedelta(seconds=0.2))
    (record,) = caplog.records
    assert re.search(f"{waits}; have they failed", record.getMessage())


# --- which GPU ------------------------------------------------------------------------------------


@pytest.fixture
def gpus(environ: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Has this process see so many GPUs."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        environ.delenv(name, raising=False)
    environ.setattr(torch.cuda, "is_available", lambda: True)
    environ.setattr(torch.cuda, "current_device", lambda: 0)
    yield lambda count: environ.setattr(torch.cuda, "device_count", lambda: count)
    environ.undo()


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_device_needs_no_rendezvous(environ, gpus, group_of_one) -> None:
    """The group exists: half of torchrun's variables are nobody's business then."""
    gpus(4)
    give(environ, {"RANK": "1", "WORLD_SIZE": "2"})
    assert choose_device(nn.Linear(1, 1)) == torch.device("cuda", 0)
    give(environ, {"LOCAL_RANK": "3"})
    assert choose_device(nn.Linear(1, 1)) == torch.device("cuda", 3)


def test_the_launcher_s_local_rank_counts(environ, gpus) -> None:
    gpus(4)
    give(environ, MPICH)
    assert choose_device(nn.Linear(1, 1)) == torch.device("cuda", 1)


def test_but_not_for_ranks_that_the_launcher_s_one_process_started(
    environ, gpus, group_of_one
) -> None:
    gpus(4)
    environ.setattr(torch.cuda, "current_device", lambda: 2)
    give(environ, MPICH)  # rank 1 of 2; the group says 0 of 1
    assert choose_device(nn.Linear(1, 1)) == torch.device("cuda", 2)


def test_more_local_ranks_than_devices(environ, gpus) -> None:
    gpus(1)
    give(environ, {"LOCAL_RANK": "2"})
    with pytest.raises(
        RuntimeError, match=r"no GPU for local rank 2: this process sees 1\. Start no"
    ):
        choose_device(nn.Linear(1, 1))
    assert str(fastddp.info().device) == "none  (there is no GPU for local rank 2)"
    give(environ, {"CUDA_VISIBLE_DEVICES": "6"})  # each rank is shown one
    assert choose_device(nn.Linear(1, 1)) == torch.device("cuda", 0)
    assert str(fastddp.info().device) == "cuda:0  (local rank 2)"
    gpus(2)
    with pytest.raises(RuntimeError, match="no GPU for local rank 2: this process sees 2"):
        choose_device(nn.Linear(1, 1))


# --- what is reported -----------------------------------------------------------------------------


def test_the_report_names_the_launcher(environ: pytest.MonkeyPatch) -> None:
    assert fastddp.info().launcher == "none"
    give(environ, STEP)
    port = find(STEP).port
    said = f"srun: rank 3 of 4, local rank 1; ranks meet at gpu03:{port}"
    assert fastddp.info().launcher == said
    assert f"launcher       {said}\n" in str(fastddp.info())
    assert fastddp.info().process_group.why == "launched as rank 3 of 4"
    give(environ, {"SLURM_PTY_PORT": "1"})
    assert "whose other ranks have no terminal" in fastddp.info().launcher
    give(environ, TORCHRUN)
    assert fastddp.info().launcher == "torchrun's variables: rank 5 of 6, local rank 2"


def test_the_sampler_s_place_is_the_launcher_s(environ: pytest.MonkeyPatch) -> None:
    give(environ, STEP)
    assert list(fastddp.DistributedSampler(range(8), shuffle=False)) == [3, 7]
    give(environ, {"WORLD_SIZE": "9"})  # nothing that makes sense; nobody needs to ask
    assert list(fastddp.DistributedSampler(range(4), 2, 1, shuffle=False)) == [1, 3]
