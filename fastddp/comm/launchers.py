"""What srun, MPI's launchers and batch systems say about a process: who it is, where ranks meet.

Functions of the environment alone, so that all ranks come to the same meeting point without having
talked. What it does not say is None; :mod:`fastddp.comm.environment` makes an error of it.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

LOOPBACK: Final = "127.0.0.1"
# Below the ports that systems give to outgoing connections, above those of services.
_FIRST_PORT: Final = 10_000
_NUM_PORTS: Final = 20_000
# Slurm counts the steps of a job from 0; ids from here on are not steps that srun started, but the
# batch script, the shell of salloc and their like: one process, whatever SLURM_NTASKS says.
_SLURM_RESERVED_STEPS: Final = 0xFFFFFFF0


@dataclass(frozen=True, slots=True)
class Launcher:
    """The variables of one launcher. Of several for one thing, the first that is set counts."""

    name: str
    rank: str
    """Is set in every rank, and only there: this is how a launcher is told."""
    size: tuple[str, ...] = ()
    local_rank: tuple[str, ...] = ()
    local_size: tuple[str, ...] = ()
    job: tuple[str, ...] = ()
    """Name this start of ranks together: the same in all of them, other ones in the next start."""


_SLURM: Final = Launcher(
    "srun",
    "SLURM_PROCID",
    ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    ("SLURM_LOCALID",),
    job=("SLURM_JOB_ID", "SLURM_STEP_ID"),
)
_HYDRA: Final = Launcher(
    "mpiexec (MPICH)", "PMI_RANK", ("PMI_SIZE",), ("MPI_LOCALRANKID",), ("MPI_LOCALNRANKS",)
)
_JSRUN: Final = Launcher(
    "jsrun",
    "JSM_NAMESPACE_RANK",
    ("JSM_NAMESPACE_SIZE",),
    ("JSM_NAMESPACE_LOCAL_RANK",),
    ("JSM_NAMESPACE_LOCAL_SIZE",),
    ("LSB_JOBID", "PMIX_NAMESPACE"),
)
_FLUX: Final = Launcher(
    "flux",
    "FLUX_TASK_RANK",
    ("FLUX_JOB_SIZE",),
    ("FLUX_TASK_LOCAL_ID",),
    job=("FLUX_JOB_ID",),
)
_PBSDSH: Final = Launcher("pbsdsh", "PBS_VNODENUM")
# Those that start others on the way come after them: mpirun has srun start its daemons, whose
# variables its ranks inherit. jsrun sets Open MPI's too.
_LAUNCHERS: Final = (
    _JSRUN,
    Launcher(
        "mpirun (Open MPI)",
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        ("PMIX_NAMESPACE",),
    ),
    _HYDRA,
    Launcher(
        "mpirun (MVAPICH2)",
        "MV2_COMM_WORLD_RANK",
        ("MV2_COMM_WORLD_SIZE",),
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher("mpiexec -pmi-port (MPICH)", "PMI_ID", job=("PMI_PORT",)),
    _FLUX,
    _SLURM,
    Launcher(
        "mpiexec (PALS)",
        "PALS_RANKID",
        ("PMI_SIZE",),
        ("PALS_LOCAL_RANKID", "PMI_LOCAL_RANK"),
        ("PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"),
        ("PALS_APID",),
    ),
    Launcher(
        "a PMI launcher",
        "PMI_RANK",
        ("PMI_SIZE",),
        ("PMI_LOCAL_RANK",),
        ("PMI_LOCAL_SIZE",),
        ("PMI_JOBID",),
    ),
    Launcher("a PMIx launcher", "PMIX_RANK", job=("PMIX_NAMESPACE",)),
    _PBSDSH,
)
# Where a launcher names no job of its own, or no host: the batch system's.
_BATCH_JOBS: Final = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")


@dataclass(frozen=True, slots=True)
class Place:
    """What a launcher said about this process; None where it said nothing."""

    launcher: str
    rank: int
    size: int | None
    local_rank: int | None
    host: str | None
    """Where rank 0 is."""
    host_from: str
    """The variable that said so, or those in which it was looked for."""
    job: str | None
    """The name of this start of ranks."""
    only_terminal: bool
    """Whether this may be a shell: ``srun --pty`` gives rank 0 the terminal, the others nothing."""

    @property
    def port(self) -> int | None:
        """Where rank 0 listens: the same number on all ranks, seldom another job's; 0 for any."""
        if self.size == 1:
            return 0
        if self.job is None:
            return None
        return _FIRST_PORT + zlib.crc32(self.job.encode()) % _NUM_PORTS


def find(environ: Mapping[str, str] | None = None) -> Place | None:
    """Returns what the launcher said that started this process as a rank; None if there is none.

    An allocation alone (``salloc``, a batch script) starts no ranks.

    Raises:
        RuntimeError: if a variable that should hold a number does not.
    """
    environ = os.environ if environ is None else environ
    launcher = next((each for each in _LAUNCHERS if _started_by(each, environ)), None)
    if launcher is None:
        return None
    rank = number(launcher.rank, environ)
    assert rank is not None  # `_started_by` has seen it
    size = _first_number(launcher.size, environ)
    one_host = size is not None and size in (1, _first_number(launcher.local_size, environ))
    for each, nodes in ((_SLURM, "SLURM_STEP_NUM_NODES"), (_FLUX, "FLUX_JOB_NNODES")):
        one_host = one_host or (launcher is each and number(nodes, environ) == 1)
    host, host_from = (LOOPBACK, "") if one_host else _first_host(launcher, environ)
    return Place(
        launcher=launcher.name,
        rank=rank,
        size=size,
        local_rank=_first_number(launcher.local_rank, environ),
        host=host,
        host_from=host_from,
        job=_job(launcher, environ, one_host),
        only_terminal=launcher is _SLURM and size != 1 and "SLURM_PTY_PORT" in environ,
    )


def number(name: str, environ: Mapping[str, str]) -> int | None:
    """Returns a variable's value, or None where it is not set.

    Raises:
        RuntimeError: if the value is not a number.
    """
    text = environ.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise RuntimeError(f"fastddp: {name}={text!r} in the environment is not a number") from None


def first_of_nodelist(nodes: str) -> str:
    """Returns the first host of Slurm's short form: ``gpu03`` of ``gpu[03-07,12],cpu1``."""
    # A comma inside brackets does not end a host's name.
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match[0]) if match else ""


def _started_by(launcher: Launcher, environ: Mapping[str, str]) -> bool:
    if launcher.rank not in environ:
        return False
    if _JSRUN.rank in environ and _FLUX.rank in environ:
        # jsrun has started Flux, whose jobs have its variables then, with Open MPI's.
        return launcher is _FLUX
    if launcher is _HYDRA:
        return launcher.local_rank[0] in environ
    if launcher is _SLURM:
        step = number("SLURM_STEP_ID", environ)
        return step is not None and 0 <= step < _SLURM_RESERVED_STEPS
    if launcher is _PBSDSH:  # 0 is also the batch script's
        return number(launcher.rank, environ) != 0
    return True


def _first_number(names: tuple[str, ...], environ: Mapping[str, str]) -> int | None:
    return next((number(name, environ) for name in names if name in environ), None)


def _first_host(launcher: Launcher, environ: Mapping[str, str]) -> tuple[str | None, str]:
    """Returns the host on which launchers put rank 0, and the variable that names it."""
    names = []
    for name, host in _hosts(launcher, environ):
        if host:
            return host, name
        names.append(name)
    return None, ", ".join(names)


def _hosts(launcher: Launcher, environ: Mapping[str, str]) -> Iterator[tuple[str, str | None]]:
    if launcher is _FLUX:  # it does not say, and is on some of the hosts of another batch system
        return
    # A step may be on some of the job's hosts. But that of mpirun's daemons leaves out its own.
    names = ("SLURM_STEP_NODELIST",) if launcher is _SLURM else ()
    for name in (*names, "SLURM_JOB_NODELIST"):
        yield name, first_of_nodelist(environ.get(name, ""))
    yield "PBS_NODEFILE", next(iter(_lines(environ.get("PBS_NODEFILE"))), None)
    hosts = _lines(environ.get("LSB_DJOB_HOSTFILE")) or environ.get("LSB_HOSTS", "").split()
    hosts = hosts or environ.get("LSB_MCPU_HOSTS", "").split()[::2]  # each with its number of slots
    hosts = list(dict.fromkeys(hosts))
    # jsrun leaves out the first, on which the batch script runs.
    skip = 1 if launcher is _JSRUN and len(hosts) > 1 else 0
    yield "LSB_HOSTS", next(iter(hosts[skip:]), None)
    # Where mpirun runs: Open MPI 4 says `JOB;tcp://ADDRESS,ADDRESS:PORT;...`, 5 has it in the
    # job's name, `prterun-HOST-PID@JOB`.
    uri = re.search(r"tcp://([^,:;]+)", environ.get("OMPI_MCA_orte_hnp_uri", ""))
    yield "OMPI_MCA_orte_hnp_uri", uri and uri[1]
    namespace = re.match(r"prterun-(.+)-\d+@", environ.get("PMIX_NAMESPACE", ""))
    yield "PMIX_NAMESPACE", namespace and namespace[1]
    if launcher is _SLURM:
        yield "SLURM_LAUNCH_NODE_IPADDR", environ.get("SLURM_LAUNCH_NODE_IPADDR")


def _lines(path: str | None) -> list[str]:
    """Returns the words of a list of hosts; none where it cannot be read on this host."""
    try:
        return Path(path).read_text().split() if path else []
    except OSError:
        return []


def _job(launcher: Launcher, environ: Mapping[str, str], one_host: bool) -> str | None:
    names = [name for name in launcher.job if name in environ]
    if not names and one_host:
        return _starter(launcher.rank if launcher is not _HYDRA else launcher.local_rank[0])
    names = names or [name for name in _BATCH_JOBS if name in environ]
    return " ".join(f"{name}={environ[name]}" for name in names) or None


def _starter(mark: str) -> str:
    """Names the process that started the ranks: the nearest ancestor that is not a rank itself."""
    pid = os.getppid()
    while f"{mark}=".encode() in _read(pid, "environ"):
        parent = _stat(pid)[1:2]
        if not parent:  # it has ended meanwhile
            break
        pid = int(parent[0])
    return " ".join(["process", str(pid), "started at", *_stat(pid)[19:20]])


def _stat(pid: int) -> list[str]:
    """Returns a process's state, parent and so on; its name, before them, may hold anything."""
    return _read(pid, "stat").decode(errors="replace").rpartition(")")[2].split()


def _read(pid: int, what: str) -> bytes:
    """Returns what the system tells of a process; nothing of another user's process."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""
