"""Rows of different numbers on 2 and 3 ranks, in rank order and in the dataset's."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.utils.data

import fastddp
from tests.ranks import run_ranks

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.complex64, torch.int64, torch.uint8, torch.bool),
]
LENGTHS = {  # rows by rank
    2: [[3, 3], [0, 2], [5, 1], [0, 0]],
    3: [[2, 2, 2], [0, 4, 1], [1, 0, 0], [2, 3, 0]],
}
FORMS = [
    *(((2,), dtype) for dtype in DTYPES),
    *((row, torch.float32) for row in ((), (2, 0), (1, 3))),
]


def share(rank: int, length: int, row: tuple[int, ...]) -> torch.Tensor:
    """Rows of integers that no other rank has."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 90, (length, *row), generator=generator)


def equal(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    assert a is not None
    same_form = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    return same_form and torch.equal(*(t.view(-1).view(torch.uint8) for t in (a, b)))


def _all_forms(rank: int, world_size: int) -> int:
    num_checked = 0
    for lengths in LENGTHS[world_size]:
        for row, dtype in FORMS:
            integers = [share(r, lengths[r], row) for r in range(world_size)]
            mine, whole = integers[rank].to(dtype), torch.cat(integers).to(dtype)
            assert equal(fastddp.gather_unpadded(mine), whole), (lengths, row, dtype)
            dst = num_checked % world_size
            gathered = fastddp.gather_unpadded(mine, dst=dst)
            assert equal(gathered, whole) if rank == dst else gathered is None
            num_checked += 1
    return num_checked


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_lengths_rows_and_dtypes(world_size):
    assert run_ranks(_all_forms, world_size) == [4 * len(FORMS)] * world_size


def _odd_tensors(rank: int, world_size: int) -> None:
    mine = torch.arange(12.0).view(3, 4)[: rank + 1]
    both = torch.cat([torch.arange(4.0).view(1, 4), torch.arange(8.0).view(2, 4)])
    # A view with strides, a lazy conjugate, a lazy negative, a parameter.
    wide = torch.arange(12.0).view(3, 4).t().contiguous().t()[: rank + 1]
    assert equal(fastddp.gather_unpadded(wide), both)
    assert torch.equal(fastddp.gather_unpadded((1j * mine).conj()), -1j * both)
    assert torch.equal(fastddp.gather_unpadded((1j * mine).conj().imag), -both)
    gathered = fastddp.gather_unpadded(torch.nn.Parameter(mine))
    assert equal(gathered, both)
    assert not gathered.requires_grad
    assert type(gathered) is torch.Tensor
    before = mine.clone()
    gathered.zero_()
    assert torch.equal(mine, before), "the result is new memory"


def test_views_lazy_tensors_and_parameters():
    run_ranks(_odd_tensors, 2)


def _nothing(rank: int, world_size: int) -> None:
    """A rank without a batch has torch.empty(0), and knows neither the row's shape nor dtype."""
    mine = torch.full((3, 2), 7) if rank == 1 else torch.empty(0)
    assert equal(fastddp.gather_unpadded(mine), torch.full((3, 2), 7))
    assert equal(fastddp.gather_unpadded(torch.empty(0)), torch.empty(0))


def test_a_rank_that_knows_no_shape():
    run_ranks(_nothing, 3)


# --- with a sampler -------------------------------------------------------------------------------


def _dataset_order(rank: int, world_size: int) -> None:
    for length in range(8):
        data = 10 * torch.arange(length)
        for pad in ("none", "wrap"):
            sampler = fastddp.DistributedSampler(data, shuffle=False, pad=pad)
            mine = data[torch.tensor(list(sampler), dtype=torch.int64)]
            assert equal(fastddp.gather_unpadded(mine, sampler=sampler), data), (length, pad)
            last = fastddp.gather_unpadded(mine.view(-1, 1), sampler=sampler, dst=world_size - 1)
            assert (last is None) == (rank < world_size - 1)
            assert last is None or equal(last, data.view(-1, 1))
        if length >= world_size:
            sampler = torch.utils.data.DistributedSampler(data, shuffle=False, drop_last=True)
            mine = data[list(sampler)]
            kept = data[: length // world_size * world_size]
            assert equal(fastddp.gather_unpadded(mine, sampler=sampler), kept)


@pytest.mark.parametrize("world_size", [2, 3])
def test_with_a_sampler_rows_have_the_datasets_order(world_size):
    run_ranks(_dataset_order, world_size)


# --- groups ---------------------------------------------------------------------------------------


def _subgroup(rank: int, world_size: int) -> None:
    group = dist.new_group([2, 0])  # c10d sorts the ranks
    if rank == 1:
        with pytest.raises(ValueError, match="this rank is not in the process group"):
            fastddp.gather_unpadded(torch.ones(1), group=group)
        return
    mine = torch.full((1 + rank,), rank)
    expected = torch.tensor([0, 2, 2, 2])
    assert equal(fastddp.gather_unpadded(mine, group=group), expected)
    gathered = fastddp.gather_unpadded(mine, group=group, dst=1)  # of the group: rank 2
    assert equal(gathered, expected) if rank == 2 else gathered is None


def test_a_group_of_some_ranks():
    run_ranks(_subgroup, 3)


def _alone(rank: int, world_size: int) -> None:
    mine = torch.arange(4.0).requires_grad_()
    sampler = fastddp.DistributedSampler(range(4), shuffle=False)
    for options in ({}, {"dst": 0}, {"sampler": sampler}):
        gathered = fastddp.gather_unpadded(mine, **options)
        assert equal(gathered, mine.detach())
        assert not gathered.requires_grad


@pytest.mark.parametrize("with_group", [False, True])
def test_a_world_of_one(with_group):
    run_ranks(_alone, 1, init_group=with_group)


# --- errors: on every rank, the same --------------------------------------------------------------


def _mismatch(rank: int, world_size: int, what: str) -> str:
    shape, dtype, options = (4 + rank, 2), torch.float32, {}
    if rank == 1:
        shape = (5, 3) if what == "shape" else (5, 2, 1) if what == "dims" else shape
        dtype = torch.float64 if what == "dtype" else dtype
        options = {"dst": 0} if what == "dst" else options
    if what == "sampler" and rank == 0:
        options["sampler"] = fastddp.DistributedSampler(range(8), shuffle=False)
    if what == "length":
        options["sampler"] = fastddp.DistributedSampler(range(8 + rank), shuffle=False)
        shape = (len(options["sampler"]), 2)
    if what == "empty" and rank == 1:
        shape = (0, 3)
    with pytest.raises(fastddp.MismatchError) as caught:
        fastddp.gather_unpadded(torch.zeros(shape, dtype=dtype), **options)
    # Nothing is left under way: the next one is right.
    assert fastddp.gather_unpadded(torch.zeros(rank)).shape == (sum(range(world_size)),)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("shape", r"shape (5, 3) on rank 1, (4, 2) on rank 0"),
        ("dims", r"shape (5, 2, 1) on rank 1, (4, 2) on rank 0"),
        ("empty", r"shape (0, 3) on rank 1, (4, 2) on rank 0"),
        ("dtype", "torch.float64 on rank 1, torch.float32 on rank 0 (shapes (5, 2) and (4, 2))"),
        ("dst", "rank 1 gathers with dst=0, rank 0 with dst=None"),
        ("sampler", "rank 1 gathers with rank order, rank 0 with the order of 8 samples padded to"),
        ("length", "rank 1 gathers with the order of 9 samples"),
    ],
)
def test_what_does_not_fit_is_the_same_error_on_every_rank(what, text):
    world_size = 3 if what in ("shape", "dtype") else 2
    messages = run_ranks(_mismatch, world_size, what)
    assert len(set(messages)) == 1
    assert text in messages[0]


def _unfit(rank: int, world_size: int, what: str) -> str:
    tensor: object = torch.zeros(2)
    options: dict[str, object] = {}
    if rank == 1:
        if what == "type":
            tensor = [1.0, 2.0]
        elif what == "scalar":
            tensor = torch.tensor(1.0)
        elif what == "sparse":
            tensor = torch.ones(2).to_sparse()
        elif what == "dst":
            options["dst"] = 2
        elif what == "sampler type":
            options["sampler"] = range(2)
        elif what == "shuffle":
            options["sampler"] = fastddp.DistributedSampler(range(4))
        elif what == "place":
            options["sampler"] = fastddp.DistributedSampler(range(4), 3, 1, shuffle=False)
        elif what == "rows":
            options["sampler"] = fastddp.DistributedSampler(range(8), shuffle=False)
    try:
        fastddp.gather_unpadded(tensor, **options)  # type: ignore[arg-type]
    except (TypeError, ValueError, fastddp.MismatchError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("type", "TypeError: fastddp.gather_unpadded: expected a tensor, got list"),
        ("scalar", "ValueError: fastddp.gather_unpadded: a tensor without dimensions"),
        ("sparse", "TypeError: fastddp.gather_unpadded: a tensor of layout torch.sparse_coo"),
        ("dst", "ValueError: fastddp.gather_unpadded: dst=2 is not in 0 ... world size-1 = 1"),
        ("sampler type", "TypeError: fastddp.gather_unpadded: expected a DistributedSampler, got"),
        ("shuffle", "ValueError: fastddp.gather_unpadded: this sampler shuffles"),
        ("place", "ValueError: fastddp.gather_unpadded: the sampler is that of rank 1 of 3, the"),
        ("rows", "ValueError: fastddp.gather_unpadded: rank 1 has 2 rows, shape (2,), for the 4"),
    ],
)
def test_an_unfit_argument_is_an_error_on_the_other_ranks_too(what, error):
    other, own = run_ranks(_unfit, 2, what)
    assert own.startswith(error), own
    assert other == f"MismatchError: fastddp: rank 1 could not gather: {own}"
