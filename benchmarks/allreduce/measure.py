"""The work of a rank: prepare every variant of an all-reduce, verify its results, then time it.

Words: a *case* is one variant with operands of one dtype. A *batch* is a number of calls of one
case in a row, timed together. A *round* times one batch of every case, in an order that changes
from round to round.
"""

from __future__ import annotations

import importlib.util
import mmap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.allreduce.loops import compiled_loops
from benchmarks.allreduce.mpi import find_mpiexec
from benchmarks.common.trials import no_collector_pauses, refuse_on_any_rank, turn_order

PERIOD = 13
MOST_RANKS = 256 // (PERIOD - 1)  # bfloat16 holds every whole number up to 256
BATCH_S = 0.02
MOST_CALLS = 4096

Loop = Callable[[int], float]
"""Makes the given number of calls in a row, and returns the seconds that they took together."""


@dataclass(frozen=True)
class Operand:
    """The tensor that a case reduces in place (None for the floor), and the loop of calls."""

    loop: Loop
    tensor: Tensor | None = None


@dataclass(frozen=True)
class Variant:
    """One way to all-reduce.

    Attributes:
        name: the name in the command line and in records.
        prepare: the function that makes the operand from a group, a number of elements and a dtype.
            It is called on every rank.
        backend: the backend of that group, which has all ranks.
        gloo: the name of the variant that calls gloo in the same way; None if there is none.
        compiled: whether it needs `compiled_loops`.
        dtypes: the dtypes that it can reduce.
    """

    name: str
    prepare: Callable[[dist.ProcessGroup, int, torch.dtype], Operand]
    backend: str = "gloo"
    gloo: str | None = None
    compiled: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    variant: Variant
    dtype: torch.dtype
    operand: Operand

    @property
    def name(self) -> str:
        return f"{self.variant.name} {dtype_name(self.dtype)}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The variants to measure; every rank gets the same plan."""

    elements: int
    variants: tuple[Variant, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    rounds: int = 20

    def __post_init__(self) -> None:
        if self.elements < 1 or self.rounds < 1:
            raise ValueError(
                f"{self.elements} elements in {self.rounds} rounds: at least one of each is needed"
            )


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """One rank's part of the measurement of one case: microseconds per call, a value per round."""

    variant: str
    dtype: str
    verified: str
    calls: int
    us: list[float]


def measure(plan: Plan) -> list[CaseResult]:
    """Verifies and times all cases of a plan. Collective: every rank has the same plan."""
    if dist.get_world_size() > MOST_RANKS:
        raise ValueError(
            f"{dist.get_world_size()} ranks: sums over more than {MOST_RANKS} are not exact in"
            " bfloat16, so they could not be verified"
        )
    groups = {backend: _group(backend) for backend in _backends(plan)}
    cases = [
        Case(variant, dtype, variant.prepare(groups[variant.backend], plan.elements, dtype))
        for variant in plan.variants
        for dtype in plan.dtypes
        if dtype in variant.dtypes
    ]
    refuse_on_any_rank(check_sums(cases))
    for case in cases:
        if case.operand.tensor is not None:
            case.operand.tensor.zero_()  # so that any number of sums in a row stays finite
    loops = {case.name: case.operand.loop for case in cases}
    calls = {name: calls_per_batch(loop) for name, loop in loops.items()}
    us: dict[str, list[float]] = {name: [] for name in loops}
    with no_collector_pauses():
        for number in range(plan.rounds):
            for name in turn_order(list(loops), number):
                us[name].append(timed_us(loops[name], calls[name]))
    refuse_on_any_rank(check_sums(cases))
    return [
        CaseResult(
            variant=case.variant.name,
            dtype=dtype_name(case.dtype),
            verified="no" if case.operand.tensor is None else "bitwise",
            calls=calls[case.name],
            us=us[case.name],
        )
        for case in cases
    ]


def _backends(plan: Plan) -> list[str]:
    """Lists each backend of a plan once, in the same order on every rank."""
    return list(dict.fromkeys(variant.backend for variant in plan.variants))


def _group(backend: str) -> dist.ProcessGroup:
    if backend == dist.get_backend():
        assert dist.group.WORLD is not None, "run_ranks initialises the default group"
        return dist.group.WORLD
    import fastddp  # noqa: F401 - registers its backends

    group = dist.new_group(backend=backend)
    assert isinstance(group, dist.ProcessGroup)
    return group


def timed_us(loop: Loop, calls: int) -> float:
    """Returns the microseconds per call, after one call that is not timed.

    Ranks leave a barrier tens of microseconds apart. The call that is not timed brings them
    together, and brings the operands into the caches.
    """
    dist.barrier()
    loop(1)
    return 1e6 * loop(calls) / calls


def calls_per_batch(loop: Loop) -> int:
    """Doubles the calls until a batch lasts `BATCH_S` on the slowest rank, as `timeit` does.

    So every case is timed for about as long, however fast it is. The ranks agree on the number,
    because a batch with fewer calls on one rank would never end on the others.
    """
    calls = 1
    while calls < MOST_CALLS:
        dist.barrier()
        slowest = torch.tensor([loop(calls)], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        if slowest.item() >= BATCH_S:
            break
        calls *= 2
    return calls


# Verification -------------------------------------------------------------------------------------


def check_sums(cases: Sequence[Case]) -> str | None:
    """Reduces known values once with every case, and compares every element with the exact sum.

    Element i of rank r is (i + r) mod 13. Sums over the ranks are whole numbers up to 256, which
    every dtype represents exactly. Elements that were swapped with those of another block are
    noticed, because no block has a length of 13. All cases are run in any case, because a rank that
    stopped early would leave the others waiting.

    Returns:
        The first problem; None if there is none.
    """
    problem = None
    ranks = torch.arange(dist.get_world_size())
    table = (torch.arange(PERIOD) + ranks[:, None]) % PERIOD  # a row for each rank
    for case in cases:
        tensor = case.operand.tensor
        if tensor is None:
            continue
        _fill(tensor, table[dist.get_rank()])
        case.operand.loop(1)
        expected = torch.empty_like(tensor)
        _fill(expected, table.sum(0))
        if problem is None and not torch.equal(tensor, expected):
            wrong = int((tensor != expected).nonzero()[0])
            problem = (
                f"{case.name}: element {wrong} of {tensor.numel()} is {tensor[wrong]:g}"
                f" where the sum is {expected[wrong]:g}"
            )
    return problem


def _fill(tensor: Tensor, period: Tensor) -> None:
    """Repeats `period` until the tensor is full."""
    tensor.copy_(period.to(tensor.dtype).repeat(tensor.numel() // PERIOD + 1)[: tensor.numel()])


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}


# Variants -----------------------------------------------------------------------------------------


def through_torch(
    group: dist.ProcessGroup,
    elements: int,
    dtype: torch.dtype,
    *,
    direct: bool = False,
    native: bool = False,
) -> Operand:
    """Makes an operand for `torch.distributed`, called from Python or, if `native`, from C++.

    `direct` operands are in the backend's own memory, so that it does not have to copy them.
    """
    cpu = torch.device("cpu")
    if direct:
        tensor = group._get_backend(cpu).allocate_tensor(elements, dtype=dtype, device=cpu)
    else:
        tensor = torch.empty(elements, dtype=dtype)
    if native:
        return Operand(partial(compiled_loops().all_reduce, group, tensor), tensor)
    return Operand(_python_loop(partial(dist.all_reduce, tensor, group=group)), tensor)


def through_mpi(_group: dist.ProcessGroup, elements: int, dtype: torch.dtype) -> Operand:
    """Makes an operand for MPI_Allreduce, called from Python. MPI has no bfloat16."""
    from mpi4py import MPI

    tensor = torch.empty(elements, dtype=dtype)
    buffer = [tensor.numpy(), MPI.FLOAT]
    call = partial(MPI.COMM_WORLD.Allreduce, MPI.IN_PLACE, buffer, MPI.SUM)
    return Operand(_python_loop(call), tensor)


def memory_floor(_group: dist.ProcessGroup, elements: int, dtype: torch.dtype) -> Operand:
    """Makes the loop d = s = d + s over half as many elements in each of two shared buffers.

    However many ranks there are, each has to read its share of every rank's operand and to write
    that share of every rank's result: it reads as many elements as the message has, and writes as
    many. This loop does that and nothing else. No other rank uses a rank's share, so each rank maps
    only its own.
    """
    count = max(elements // 2, 1)
    shares = [_shared_zeros(count, dtype) for _ in range(2)]
    return Operand(partial(compiled_loops().add_into_both, *shares))


def _shared_zeros(count: int, dtype: torch.dtype) -> Tensor:
    """Makes a tensor in shared pages, which have other sizes than private pages."""
    memory = mmap.mmap(-1, count * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype, count=count).zero_()


def _python_loop(call: Callable[[], object]) -> Loop:
    def loop(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return time.perf_counter() - start

    return loop


GLOO, MPI, FLOOR = "gloo", "mpi", "floor"
FLOAT32 = (torch.float32,)
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(GLOO, through_torch),
        Variant("gloo-cpp", partial(through_torch, native=True), compiled=True),
        Variant("shm", partial(through_torch, direct=True), "shm", gloo=GLOO),
        Variant(
            "shm-cpp",
            partial(through_torch, direct=True, native=True),
            "shm",
            gloo="gloo-cpp",
            compiled=True,
        ),
        Variant("shm-copied", through_torch, "shm", gloo=GLOO),
        Variant(
            "shm-copied-cpp",
            partial(through_torch, native=True),
            "shm",
            gloo="gloo-cpp",
            compiled=True,
        ),
        Variant(MPI, through_mpi, gloo=GLOO, dtypes=FLOAT32),
        Variant(FLOOR, memory_floor, compiled=True, dtypes=FLOAT32),
    )
}


def unavailable(names: Sequence[str]) -> dict[str, str]:
    """Returns the reason for each of the named variants that this installation cannot run."""
    reasons: dict[str, str] = {}
    for name in names:
        if not has_backend(backend := VARIANTS[name].backend):
            reasons[name] = f"this fastddp registers no backend named {backend}"
        elif name == MPI and importlib.util.find_spec("mpi4py") is None:
            reasons[name] = "mpi4py is not installed"
        elif name == MPI and find_mpiexec() is None:
            reasons[name] = "there is no mpiexec beside the interpreter or on PATH"
    return reasons


def has_backend(name: str) -> bool:
    if importlib.util.find_spec("fastddp") is not None:
        import fastddp  # noqa: F401 - registers its backends
    return name in dist.Backend.backend_list
