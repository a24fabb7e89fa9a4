"""`fastddp.info()`: it reports, and changes nothing."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from fastddp import extension, info
from fastddp.comm import launch
from fastddp.extension import BuildInfo
from fastddp.version import __version__

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHER, "FASTDDP_ENGINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_find", lambda: (None, "it was left out for this test"))
    monkeypatch.setattr(extension, "warn_once", extension.warn_once.__wrapped__)


@pytest.fixture
def one_rank_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_reports_versions_and_backends() -> None:
    found = info()
    assert found.version == __version__
    assert found.torch == str(torch.__version__)
    assert ("gloo" in found.backends) == dist.is_gloo_available()
    assert ("nccl" in found.backends) == dist.is_nccl_available()
    assert found.cuda_devices == torch.cuda.device_count()
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.version = "2"  # type: ignore[misc]


def test_an_extension_is_either_described_or_explained() -> None:
    found = info()
    if extension.load() is None:
        assert found.engines == ("python",)
        assert found.extension is None
        assert found.why_no_extension == extension.why_not()
    else:
        assert found.engines == ("native", "python")
        assert f"torch {torch.__version__}" in str(found.extension)
        assert found.why_no_extension is None


@pytest.mark.parametrize(
    ("cuda", "why", "reported"),
    [
        ("13.0", None, "CUDA kernels   built with CUDA 13.0 for 9.0"),
        (
            None,
            "nvcc was not found; install it",
            "CUDA kernels   none: nvcc was not found; install it, ",
        ),
    ],
)
def test_cuda_kernels_are_either_described_or_explained(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, why: str | None, reported: str
) -> None:
    built = BuildInfo(str(torch.__version__), cuda, "9.0", "g++", None, why)
    monkeypatch.setattr(extension, "build_info", lambda: built)
    monkeypatch.setattr(extension, "_find", lambda: (extension, None))
    assert reported in str(info())


@pytest.mark.usefixtures("no_extension")
def test_without_an_extension_the_report_says_why_and_does_not_warn() -> None:
    found = info()
    assert (found.engine.what, found.engine.why) == ("python", "it was left out for this test")
    assert "extension      not used: it was left out for this test" in str(found)


@pytest.mark.usefixtures("no_extension")
def test_an_engine_that_cannot_be_had_is_reported_not_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASTDDP_ENGINE", "native")
    found = info()
    assert found.engine.what == "none"
    assert "left out for this test" in found.engine.why


def test_the_environment_chooses_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDDP_ENGINE", "python")
    assert str(info().engine) == "python  (FASTDDP_ENGINE=python)"
    monkeypatch.setenv("FASTDDP_ENGINE", "rust")
    assert info().engine.what == "none"
    assert "'rust'" in info().engine.why


def test_one_process_needs_no_group() -> None:
    assert info().process_group.what == "none"
    assert "one process" in info().process_group.why


def test_a_launched_process_would_get_a_group_and_none_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in zip(LAUNCHER, ("2", "4", "0", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    group = info().process_group
    assert launch.default_backend() in group.what
    assert group.why == "launched as rank 2 of 4"
    assert not dist.is_initialized()


def test_half_an_environment_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    assert info().process_group.what == "none"
    assert "WORLD_SIZE" in info().process_group.why


@pytest.mark.usefixtures("one_rank_group")
def test_an_existing_group_is_taken() -> None:
    assert str(info().process_group) == "the default group  (it exists: gloo, rank 0 of 1)"


def test_it_opens_no_device() -> None:
    probe = "import fastddp, torch; fastddp.info(); assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", probe], check=True)


def test_it_is_printed_by_the_command() -> None:
    command = [sys.executable, "-m", "fastddp"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.startswith(f"fastddp {__version__}\n")
    assert "wrap() would choose\n  engine" in printed
