"""`.grad` belongs to the script: whatever it does with it, the next round is right, `.grad` clean.

A model of two square matrices whose gradients are whole numbers: every element of a matrix's
gradient is the sum of the rank's inputs, times a factor of the matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastddp
from tests.conftest import flattening
from tests.ranks import run_ranks

TRANSPORTS = {"shm": {}, "gloo": {"FASTDDP_SHM": "0"}}
FACTORS = {"first": 1.0, "second": 4.0}


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in FACTORS:
            self.register_parameter(name, nn.Parameter(torch.ones(3, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return sum((factor * x * getattr(self, n)).sum() for n, factor in FACTORS.items())


def _input(rank: int, step: int) -> Tensor:
    return torch.tensor(float(8 * step + 2 * rank))


def _mean(step: int, world_size: int) -> float:
    return 8.0 * step + world_size - 1


def _replace_data(p: nn.Parameter) -> None:
    p.grad.data = p.grad.data * 2


def _set(p: nn.Parameter) -> None:
    p.grad.set_(p.grad.clone())


def _unsqueeze(p: nn.Parameter) -> None:
    p.grad.unsqueeze_(0)


def _transpose(p: nn.Parameter) -> None:
    p.grad.t_()


def _resize(p: nn.Parameter) -> None:
    p.grad.resize_(2, 2)


def _require_grad(p: nn.Parameter) -> None:
    p.grad.requires_grad_()


def _add_in_grad_mode(p: nn.Parameter) -> None:
    p.grad.add_(0.5 * p)


def _halve(p: nn.Parameter) -> None:
    p.grad.data = p.grad.data.half()


def _halve_and_back(p: nn.Parameter) -> None:
    p.grad.data = p.grad.data.half()
    p.grad.data = p.grad.data.float()


def _replace(p: nn.Parameter) -> None:
    p.grad = torch.full_like(p, 7.0)


def _columns_first(p: nn.Parameter) -> None:
    p.grad = torch.full((3, 3), 7.0).t()


def _expand(p: nn.Parameter) -> None:
    p.grad = torch.tensor(7.0).expand(3, 3)


def _scale_in_place(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.grad.mul_(3.0)


TOUCHES: dict[str, Callable[[nn.Parameter], None]] = {
    fn.__name__: fn
    for fn in (
        *(_replace_data, _set, _unsqueeze, _transpose, _resize, _require_grad, _add_in_grad_mode),
        *(_halve, _halve_and_back, _replace, _columns_first, _expand, _scale_in_place),
    )
}
# Autograd itself cannot add to what these leave.
NOT_ADDED_TO = ("_resize", "_expand")


def _check(model: nn.Module, want: float, what: object) -> None:
    for name, factor in FACTORS.items():
        p = model.get_parameter(name)
        assert p.grad is not None, (what, name)
        assert p.grad.unique().tolist() == [want * factor], (what, name, p.grad)
        assert p.grad.shape == p.shape, (what, name)
        assert p.grad.dtype == p.dtype, (what, name)
        assert not p.grad.requires_grad, (what, name)
        assert p.grad.grad_fn is None, (what, name)


def _engine(name: str) -> contextlib.AbstractContextManager[None]:
    return flattening() if name == "flattening" else contextlib.nullcontext()


def _wrap(engine: str) -> fastddp.DistributedDataParallel:
    with _engine(engine):
        name = "native" if engine == "flattening" else engine
        # A bucket for each of the two.
        return fastddp.DistributedDataParallel(Squares(), engine=name, bucket_cap_mb=1e-6)


def _touched(rank: int, world_size: int, engine: str) -> None:
    model = _wrap(engine)
    step = 0

    def backward(model: nn.Module) -> None:
        nonlocal step
        step += 1
        model(_input(rank, step)).backward()

    for _ in range(2):  # then the plan stays
        backward(model)
        model.zero_grad()
    for name, touch in TOUCHES.items():
        for ranks in ([0, 1], [1]):
            what = name, ranks, rank
            backward(model)
            if rank in ranks:
                touch(model.module.first)
            model.zero_grad(set_to_none=True)
            backward(model)
            _check(model.module, _mean(step, world_size), what)
            if name in NOT_ADDED_TO:
                continue
            if rank in ranks:
                touch(model.module.first)
            model.zero_grad(set_to_none=False)
            backward(model)
            _check(model.module, _mean(step, world_size), (*what, "zeroed in place"))
            model.zero_grad()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_round_after_a_touch_is_right_and_clean(engine: str, transport: str) -> None:
    run_ranks(_touched, 2, engine, env=TRANSPORTS[transport])


def test_the_same_where_a_bucket_is_filled_in_one_pass() -> None:
    run_ranks(_touched, 2, "flattening")


def _kept(rank: int, world_size: int, engine: str) -> None:
    model = _wrap(engine)
    first, second = model.module.first, model.module.second
    for step in range(2):
        model.zero_grad()
        model(_input(rank, step)).backward()
    keepers: dict[str, Callable[[Tensor], object]] = {
        "itself": lambda grad: grad,
        "a view": lambda grad: grad[1:],
        "numpy": lambda grad: grad.numpy(),
        "detached": lambda grad: grad.detach(),
    }
    for nth, (name, keep) in enumerate(keepers.items()):
        model.zero_grad()
        model(_input(rank, 10 * nth)).backward()
        kept = keep(first.grad)
        memory = second.grad.data_ptr()
        model.zero_grad()
        model(_input(rank, 10 * nth + 1)).backward()
        want = _mean(10 * nth, world_size)
        assert torch.as_tensor(kept).unique().tolist() == [want], (name, kept)
        _check(model.module, _mean(10 * nth + 1, world_size), name)
        assert second.grad.data_ptr() == memory, f"{name}: a bucket that nobody kept stays"
        del kept
    # With nothing kept any more the memory stays where it is.
    addresses = set()
    for step in range(3):
        model.zero_grad()
        model(_input(rank, step)).backward()
        addresses.add(first.grad.data_ptr())
    assert len(addresses) == 1


def test_a_gradient_that_is_kept_keeps_its_values(engine: str) -> None:
    run_ranks(_kept, 2, engine)


def _shared(rank: int, world_size: int, engine: str) -> None:
    model = _wrap(engine)
    first, second = model.module.first, model.module.second
    elsewhere = nn.Parameter(torch.zeros(3, 3))
    for step in range(4):
        model.zero_grad()
        model(_input(rank, step)).backward()
        _check(model.module, _mean(step, world_size), step)
        if step:
            want = _mean(step - 1, world_size)
            assert elsewhere.grad.unique().tolist() == [want], "it kept the one before"
        elsewhere.grad = first.grad  # to be stepped on by another optimizer, perhaps
    # The gradient of one parameter given to another, which no rank uses then.
    second.grad, first.grad = first.grad, None
    (first * _input(rank, 5)).sum().backward()
    assert second.grad.unique().tolist() == [_mean(3, world_size)]
    assert first.grad.unique().tolist() == [_mean(5, world_size)]


def test_a_gradient_that_is_shared_is_nobody_elses_to_write(engine: str) -> None:
    run_ranks(_shared, 2, engine)


def _same_object(rank: int, world_size: int, engine: str) -> None:
    model = _wrap(engine)
    grad = None
    for step in range(3):
        model.zero_grad(set_to_none=False)
        model(_input(rank, step)).backward()
        if step:
            assert model.module.first.grad is grad, "as with torch, where nobody has taken it away"
        grad = model.module.first.grad
        _check(model.module, _mean(step, world_size), step)


def test_a_gradient_that_stays_in_place_stays_the_same_tensor(engine: str) -> None:
    run_ranks(_same_object, 2, engine)


def _wrong_shape(rank: int, world_size: int, engine: str) -> str:
    model = _wrap(engine)
    model(_input(rank, 1)).backward()
    if rank == 0:
        model(_input(rank, 1)).backward()
        # (9 + 8) / 2, its own share alone: what there was, and what this backward brought.
        assert model.module.first.grad.unique().tolist() == [8.5]
        return ""
    model.module.first.grad.resize_(5)
    with pytest.raises(RuntimeError) as error:
        (0 * _input(rank, 1) * model.module.second).sum().backward()
    return str(error.value)


def test_a_gradient_of_a_shape_that_cannot_fit_is_named(engine: str) -> None:
    _, text = run_ranks(_wrong_shape, 2, engine)
    # Rank 0's round ended all the same.
    assert "rank 1: parameter 'first' has shape" in text
    assert "its .grad has shape" in text


def _put_back(rank: int, world_size: int, engine: str) -> None:
    model = _wrap(engine)
    first, second = model.module.first, model.module.second
    model(_input(rank, 1)).backward()
    second.grad.data = second.grad.data.half()
    memory = second.grad.data_ptr()
    model.module.forward = lambda x: (x * first).sum()
    for _ in range(2):  # no rank has a new one
        first.grad = None
        model(_input(rank, 2)).backward()
        assert first.grad.unique().tolist() == [_mean(2, world_size)]
        assert second.grad.dtype == torch.float16
        assert second.grad.data_ptr() == memory
        assert second.grad.unique().tolist() == [4 * _mean(1, world_size)]


def test_what_nobody_has_a_new_gradient_for_stays_as_the_script_made_it(engine: str) -> None:
    run_ranks(_put_back, 2, engine)
