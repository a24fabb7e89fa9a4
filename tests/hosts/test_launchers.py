"""Ranks that launchers put on two hosts: they meet where the first is."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fastddp
from benchmarks.common import namespaces
from benchmarks.common.namespaces import Host
from tests.ranks import run_ranks


def _variables(launcher: str, rank: int, world_size: int, first: str, job: str) -> dict[str, str]:
    if launcher == "Open MPI":
        return {
            "OMPI_COMM_WORLD_RANK": str(rank),
            "OMPI_COMM_WORLD_SIZE": str(world_size),
            "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
            "OMPI_MCA_orte_hnp_uri": f"{job}.0;tcp://{first}:43505",
            "PMIX_NAMESPACE": job,
        }
    assert launcher == "Slurm"
    prefix, last = first.rsplit(".", 1)
    return {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(world_size),
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": f"{prefix}.[{last}-9]",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
    }


def _on_its_host(
    rank: int, world_size: int, launcher: str, hosts: tuple[Host, Host], job: str
) -> list[Any]:
    hosts[rank].enter()
    if launcher == "Slurm" and rank == 0:  # the second host is not where rank 0 is
        os.environ.update(_variables(launcher, rank, world_size, hosts[1].address, job))
        with pytest.raises(RuntimeError, match=rf"meet on {hosts[1].address}.*Set MASTER_ADDR to"):
            fastddp.init_process_group()
    os.environ.update(_variables(launcher, rank, world_size, hosts[0].address, job))
    fastddp.init_process_group()
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    dist.barrier()
    return [dist.get_rank(), dist.get_world_size(), total.item()]


@pytest.mark.parametrize("launcher", ["Open MPI", "Slurm"])
def test_two_hosts(launcher: str) -> None:
    if (reason := namespaces.why_not()) is not None:
        pytest.skip(f"no network namespaces: {reason}")
    with namespaces.two_hosts() as hosts:
        job = f"{os.getpid()}"
        values = run_ranks(_on_its_host, 2, launcher, hosts, job, init_group=False)
    assert values == [[0, 2, 3.0], [1, 2, 3.0]]
