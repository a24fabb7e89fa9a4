"""What all tests share: the engine fixture, and what keeps one test from disturbing another."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest

from fastddp import extension
from tests import leftovers

# A test says what is right, not how long it takes on a machine that has other work.
hypothesis.settings.register_profile("fastddp", deadline=None)
hypothesis.settings.load_profile("fastddp")

# The tests may themselves be run by srun or mpirun, whose ranks they are not.
for _name in list(os.environ):
    if _name.startswith(
        ("SLURM_", "OMPI_", "PMI_", "PMIX_", "PALS_", "MPI_LOCAL", "MV2_", "JSM_", "PBS_")
    ):
        del os.environ[_name]

# What a shell starts in the background, or nohup starts, ignores SIGINT, and so would every script
# that a test starts. A handler is not inherited by a new program as an ignored signal is.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: None)

leftovers.name_this_run()


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """End what a test has left running, so that no later test fails for it, and say what it was."""
    before = leftovers.running()
    yield
    if left := leftovers.end(before):
        pytest.fail("the test has left what it started:\n" + "\n".join(left), pytrace=False)


@pytest.fixture(params=["native", "python"])
def engine(request: pytest.FixtureRequest) -> str:
    """Name an engine; both must pass the same tests."""
    name: str = request.param
    if name == "native":
        require_native()
    return name


@contextlib.contextmanager
def flattening() -> Iterator[None]:
    """Have native reducers fill their buckets in one pass, as they do on a GPU, on the CPU too."""
    from fastddp import _C

    plain = _C.Reducer
    _C.Reducer = functools.partial(plain, flattens=True)
    try:
        yield
    finally:
        _C.Reducer = plain


def require_native() -> None:
    """Skip the test where the extension is not built, or fail it where CI says that it must be."""
    if extension.load() is None:
        if os.environ.get("FASTDDP_REQUIRE_NATIVE") == "1":
            pytest.fail(f"FASTDDP_REQUIRE_NATIVE=1, but {extension.why_not()}")
        pytest.skip(f"no native engine: {extension.why_not()}")
