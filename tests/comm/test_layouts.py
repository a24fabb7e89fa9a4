"""Tensors that are not simply contiguous memory: right values, or an error that breaks nothing.

Often through the group's own methods: some functions of torch.distributed refuse conjugated views.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.comm.common import case, expect, given, not_gloo, reduced, run_group

CFLOAT = torch.complex64


def _numbers(rank: int, numel: int, start: int = 0) -> torch.Tensor:
    """Return complex numbers, whose conjugates differ from them in most places."""
    return given(rank, numel, CFLOAT, start=start)


class _Conjugated:
    """Lazily conjugated views; what is read has to be conjugated, and back what is written."""

    @staticmethod
    def view(value: torch.Tensor) -> torch.Tensor:
        view = value.conj_physical().conj()
        assert view.is_conj()
        return view

    given = staticmethod(_numbers)

    @staticmethod
    def reduced(count: int, numel: int, start: int = 0) -> torch.Tensor:
        return reduced(count, numel, CFLOAT, start=start)


class _Negated:
    """Lazily negated views: the imaginary parts of conjugated ones."""

    @staticmethod
    def view(value: torch.Tensor) -> torch.Tensor:
        view = torch.complex(torch.zeros_like(value), -value).conj().imag
        assert view.is_neg()
        assert torch.equal(view.resolve_neg(), value)
        return view

    given = staticmethod(given)

    @staticmethod
    def reduced(count: int, numel: int, start: int = 0) -> torch.Tensor:
        return reduced(count, numel, start=start)


class _Strided(_Negated):
    """Every other element."""

    @staticmethod
    def view(value: torch.Tensor) -> torch.Tensor:
        view = value.repeat_interleave(2)[::2]
        assert not view.is_contiguous() or view.numel() < 2
        return view


class _Transposed(_Negated):
    """Dense, but in another order than that of the elements."""

    @staticmethod
    def view(value: torch.Tensor) -> torch.Tensor:
        return value.view(3, -1).t().contiguous().t()


def _equal(view: torch.Tensor, expected: torch.Tensor) -> None:
    expect(view.resolve_conj().resolve_neg().flatten(), expected)


def _collectives(rank: int, world_size: int, inference: bool) -> None:
    with torch.inference_mode(inference):
        _each_collective(rank, world_size)


def _each_collective(rank: int, world_size: int) -> None:
    group, n = dist.group.WORLD, 30_003  # more than travels with the first step
    for kind in (_Conjugated, _Negated, _Strided, _Transposed):
        for numel in (9, n):
            mine = kind.given(rank, numel)
            everyones = [kind.given(r, numel) for r in range(world_size)]
            parts = kind.given(rank, world_size * numel)
            my_parts = [kind.given(r, numel, start=rank * numel) for r in range(world_size)]

            def fresh(count: int = world_size, like=mine, kind=kind) -> list[torch.Tensor]:
                return [kind.view(torch.full_like(like, 7)) for _ in range(count)]

            with case(f"all_reduce, {kind.__name__} {numel}"):
                x = kind.view(mine)
                group.allreduce([x]).wait()
                _equal(x, kind.reduced(world_size, numel))
            with case(f"broadcast, {kind.__name__} {numel}"):
                x = kind.view(mine)
                group.broadcast(x, 1).wait()
                _equal(x, everyones[1])
            with case(f"all_gather, {kind.__name__} {numel}"):
                outputs = fresh()
                group.allgather([outputs], [kind.view(mine)]).wait()
                for x, expected in zip(outputs, everyones, strict=True):
                    _equal(x, expected)
            with case(f"all_gather_into_tensor, {kind.__name__} {numel}"):
                (x,) = fresh(1, parts)
                group._allgather_base(x, kind.view(mine)).wait()
                _equal(x, torch.cat(everyones))
            with case(f"reduce_scatter, {kind.__name__} {numel}"):
                (x,) = fresh(1)
                inputs = [kind.view(part) for part in parts.chunk(world_size)]
                group.reduce_scatter([x], [inputs]).wait()
                _equal(x, kind.reduced(world_size, numel, start=rank * numel))
            with case(f"reduce_scatter_tensor, {kind.__name__} {numel}"):
                (x,) = fresh(1)
                group._reduce_scatter_base(x, kind.view(parts)).wait()
                _equal(x, kind.reduced(world_size, numel, start=rank * numel))
            with case(f"reduce, {kind.__name__} {numel}"):
                x = kind.view(mine)
                dist.reduce(x, 1)
                if rank == 1:
                    _equal(x, kind.reduced(world_size, numel))
            with case(f"gather, {kind.__name__} {numel}"):
                outputs = fresh()
                dist.gather(kind.view(mine), outputs if rank == 0 else None)
                for x, expected in zip(outputs, everyones if rank == 0 else [], strict=rank == 0):
                    _equal(x, expected)
            with case(f"scatter, {kind.__name__} {numel}"):
                (x,) = fresh(1)
                inputs = [kind.view(part) for part in kind.given(1, len(parts)).chunk(world_size)]
                options = dist.ScatterOptions()
                options.rootRank = 1
                group.scatter([x], [inputs] if rank == 1 else [], options).wait()
                _equal(x, kind.given(1, numel, start=rank * numel))
            with case(f"all_to_all, {kind.__name__} {numel}"):
                outputs = fresh()
                group.alltoall(outputs, [kind.view(p) for p in parts.chunk(world_size)]).wait()
                for x, expected in zip(outputs, my_parts, strict=True):
                    _equal(x, expected)
            if kind is not _Transposed:  # its rows are what is split
                with case(f"all_to_all_single, {kind.__name__} {numel}"):
                    (x,) = fresh(1, parts)
                    group.alltoall_base(x, kind.view(parts), [], []).wait()
                    _equal(x, torch.cat(my_parts))


@not_gloo
@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
def test_views_of_any_kind_are_right(backend, inference):
    run_group(_collectives, 2, backend, inference)


def _inference_tensors(rank: int, world_size: int) -> None:
    """In inference mode or after it, waited for at once or later, by shared memory or by gloo."""
    group = dist.group.WORLD
    for mode in (True, False):
        for in_background in (True, False):
            with torch.inference_mode():
                x, y = (_Strided.view(given(rank, 9)) for _ in range(2))
                gathered = [_Strided.view(torch.zeros(9)) for _ in range(world_size)]
            normal = _Strided.view(given(rank, 9).requires_grad_()).detach()
            version = normal._version
            options = dist.AllreduceOptions()
            to_all = dist.distributed_c10d.AllgatherOptions()
            reduce = dist.ReduceOptions()
            options.asyncOp = to_all.asyncOp = reduce.asyncOp = in_background
            reduce.rootRank = 1
            with case(f"mode {mode}, background {in_background}"), torch.inference_mode(mode):
                works = [
                    group.allreduce([x], options),
                    group.allgather([gathered], [_Strided.view(given(rank, 9))], to_all),
                    group.reduce([y], reduce),
                    group.allreduce([normal], options),
                ]
                for work in works:
                    work.wait()
                expect(x.clone(), reduced(world_size, 9))
                for other, z in enumerate(gathered):
                    expect(z.clone(), given(other, 9))
                if rank == 1:
                    expect(y.clone(), reduced(world_size, 9))
                expect(normal.clone(), reduced(world_size, 9))
            assert normal._version > version  # autograd is to notice, whatever the mode


@not_gloo
def test_inference_tensors_are_written_to(backend):
    run_group(_inference_tensors, 2, backend)


def _expanded() -> torch.Tensor:
    return torch.ones(1, dtype=torch.int32).expand(8)


def _staircase() -> torch.Tensor:
    """Rows that overlap in all but one element."""
    return torch.ones(10, dtype=torch.int32).as_strided((4, 2), (1, 1))


def _writes(x: torch.Tensor, world_size: int) -> dict[str, Callable[[], object]]:
    """Map what writes to a tensor to a call that would."""
    group, root = dist.group.WORLD, dist.get_rank() == 0
    like = x.clone()
    whole = torch.cat([like] * world_size)
    return {
        "all_reduce": lambda: dist.all_reduce(x),
        "average": lambda: dist.all_reduce(x, dist.ReduceOp.AVG),
        "all_reduce_coalesced": lambda: group.allreduce_coalesced([like, x]).wait(),
        "broadcast": lambda: dist.broadcast(x, 0),
        "reduce": lambda: dist.reduce(x, 0),
        "all_gather": lambda: dist.all_gather([x, like], like),
        "all_gather_into_tensor": lambda: group._allgather_base(x, like.flatten()[:4]).wait(),
        "all_gather_coalesced": lambda: group.allgather_coalesced([[x], [x]], [like]).wait(),
        "reduce_scatter": lambda: dist.reduce_scatter(x, [like, like]),
        "reduce_scatter_tensor": lambda: group._reduce_scatter_base(x, whole).wait(),
        "scatter": lambda: dist.scatter(x, [like, like] if root else None),
        "all_to_all": lambda: group.alltoall([x, like], [like, like]).wait(),
        "all_to_all_single": lambda: dist.all_to_all_single(x, like),
    }


def _overlapping(rank: int, world_size: int) -> None:
    for make in (_expanded, _staircase):
        for name in _writes(make(), world_size):
            with case(f"{name} into {make.__name__}"):
                x = make()
                with pytest.raises(ValueError, match=r"overlap.*clone\(\)"):
                    _writes(x, world_size)[name]()
                assert bool((x == 1).all())
                # All ranks refused it: the group goes on.
                y = given(rank, 9)
                dist.all_reduce(y)
                expect(y, reduced(world_size, 9))
        with case(f"gather into {make.__name__}"):  # the root alone writes, and hears why
            x, group = make(), dist.new_group()
            outputs = [x, x.clone()] if rank == 0 else None
            said = "overlap" if rank == 0 else "rank 0 called a collective with wrong arguments"
            with pytest.raises((ValueError, RuntimeError), match=said):
                dist.gather(x.clone(), outputs, group=group)
            assert bool((x == 1).all())
    with case("reading"):
        outputs = [torch.zeros(8, dtype=torch.int32) for _ in range(world_size)]
        dist.all_gather(outputs, _expanded())
        for x in outputs:
            expect(x, torch.ones(8, dtype=torch.int32))
    with case("strides that interleave without a collision"):
        base = torch.full((9,), 1.0)
        x = base.as_strided((2, 3), (3, 2))
        dist.all_reduce(x)
        expect(base, torch.tensor([2.0, 1, 2, 2, 2, 2, 1, 2, 1]))
    with case("one rank alone"):
        group = dist.new_group()
        x = _expanded() if rank == 1 else torch.ones(8, dtype=torch.int32)
        said = "overlap" if rank == 1 else "rank 1 called a collective with wrong arguments"
        with pytest.raises((ValueError, RuntimeError), match=said):
            dist.all_reduce(x, group=group)
        assert bool((x == 1).all())


@not_gloo
def test_nothing_is_written_into_tensors_that_overlap_themselves(backend):
    run_group(_overlapping, 2, backend)
