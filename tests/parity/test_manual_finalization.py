"""`require_manual_backward_finalization`: gradients are in `.grad` once the script asks for them.

The oracle is the same model wrapped without: it has to have the same bits, step after step.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import _apply_optimizer_in_backward

import fastddp
from tests.parity.checks import assert_same_bits, gradients
from tests.ranks import run_ranks

TRANSPORTS = {"shm": {}, "gloo": {"FASTDDP_SHM": "0"}}
WIDTH = 8
STEPS = 14  # beyond the rounds in which shared memory tries when to launch


class Layers(nn.Module):
    """Layers that a step may skip."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, used: str = "0123") -> Tensor:
        for nth in map(int, used):
            x = x + torch.tanh(self.layers[nth](x))
        return x


def _model() -> Layers:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Layers()


def _wrap(
    engine: str, model: nn.Module | None = None, **options: Any
) -> fastddp.DistributedDataParallel:
    model = _model() if model is None else model
    return fastddp.DistributedDataParallel(model, engine=engine, bucket_cap_mb=3e-4, **options)


def _manual(engine: str, **options: Any) -> fastddp.DistributedDataParallel:
    ours = _wrap(engine, **options)
    assert not ours.require_manual_backward_finalization
    ours.require_manual_backward_finalization = True
    return ours


def _x(rank: int, step: int) -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))


def _used(rank: int, step: int) -> str:
    """Another set on each rank; in some steps none has the last layer."""
    return ("0123", "01", "023", "12")[(step + rank) % 4 if step % 3 else 1 + step % 2]


def _compare(ours: nn.Module, plain: nn.Module, what: object) -> None:
    assert_same_bits(gradients(ours), gradients(plain), str(what))


# ---- after backward ------------------------------------------------------------------------------


def _after_backward(rank: int, world_size: int, engine: str, way: str) -> None:
    options: dict[str, Any] = {"comm_dtype": torch.bfloat16} if way == "comm_dtype" else {}
    ours, plain = _manual(engine, **options), _wrap(engine, **options)
    if way == "hook":
        for model in (ours, plain):
            model.register_comm_hook(None, default_hooks.allreduce_hook)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (ours, plain)]
    for step in range(STEPS):
        is_manual = step % 5 != 4
        ours.require_manual_backward_finalization = is_manual
        for model in (ours, plain):
            if step % 3 == 2:  # gradients of two micro-batches
                with model.no_sync():
                    model(_x(rank, step)).square().mean().backward()
            output = model(_x(rank, step + 50), _used(rank, step))
            assert not model.should_finalize_after_backward
            output.square().mean().backward()
        if is_manual:
            assert all(p.grad is None for p in ours.parameters()), "none is written yet"
            rounds = ours.stats().rounds
            ours.finalize_backward()
            assert ours.stats().rounds == rounds + 1
        _compare(ours, plain, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("way", ["plain", "hook", "comm_dtype"])
def test_after_backward_the_bits_are_those_of_an_automatic_one(
    engine: str, transport: str, way: str
) -> None:
    run_ranks(_after_backward, 2, engine, way, env=TRANSPORTS[transport])


def _not_waited_for(rank: int, world_size: int, engine: str) -> None:
    """Rank 1 begins its backward when rank 0's has returned."""
    ours = _manual(engine)
    barrier = dist.new_group()
    for step in range(3):
        loss = ours(_x(rank, step)).mean()
        if rank == 1:
            dist.barrier(barrier)
        loss.backward()
        if rank == 0:
            dist.barrier(barrier)
        ours.finalize_backward()
        assert ours.module.layers[0].weight.grad is not None
        ours.zero_grad()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_backward_does_not_wait_for_other_ranks(engine: str, transport: str) -> None:
    run_ranks(_not_waited_for, 2, engine, env=TRANSPORTS[transport])


# ---- inside backward -----------------------------------------------------------------------------


def _inside_backward(rank: int, world_size: int, engine: str) -> None:
    """The optimizer steps while the part of the graph before the model still runs."""
    ours, plain = _manual(engine), _wrap(engine)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (ours, plain)]
    before = nn.Parameter(torch.ones(WIDTH))  # what the model's input comes from
    seen: list[dict[str, Tensor | None]] = []

    def on_input(_: Tensor) -> None:
        ours.finalize_backward()
        seen.append(gradients(ours))
        assert before.grad is None, "that comes later in this backward"
        optimizers[0].step()

    for step in range(STEPS):
        x = _x(rank, step) * before
        x.register_hook(on_input)
        ours(x, _used(rank, step)).square().mean().backward()
        plain(_x(rank, step) * before.detach(), _used(rank, step)).square().mean().backward()
        assert before.grad is not None
        before.grad = None
        assert_same_bits(seen.pop(), gradients(plain), str(step))
        optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert_same_bits(ours.state_dict(), plain.state_dict(), "after all steps")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_inside_backward_the_optimizer_may_step(engine: str, transport: str) -> None:
    run_ranks(_inside_backward, 2, engine, env=TRANSPORTS[transport])


def _two_models(rank: int, world_size: int, engine: str) -> None:
    """One after the other in one graph; what is reached first is finalized inside or after."""
    pairs = [(_manual(engine), _manual(engine)), (_wrap(engine), _wrap(engine))]
    for step in range(STEPS):
        for first, second in pairs:
            h = first(_x(rank, step), _used(rank, step))
            if first is pairs[0][0] and step % 2:
                h.register_hook(lambda _: pairs[0][1].finalize_backward())
            second(h, _used(rank, step + 1)).square().mean().backward()
        ours, plain = pairs
        if step % 2:
            _compare(ours[1], plain[1], step)
            ours[0].finalize_backward()
        else:  # in either order, the same on all ranks or not
            for model in reversed(ours) if rank else ours:
                model.finalize_backward()
        for mine, other in zip(ours, plain, strict=True):
            _compare(mine, other, step)
            mine.zero_grad()
            other.zero_grad()
    # Out of turn: the model that backward reached first has not sent all that it has.
    x, errors = _x(rank, 0).requires_grad_(), []

    def on_input(_: Tensor) -> None:
        with pytest.raises(RuntimeError, match="finalize that one first") as error:
            pairs[0][0].finalize_backward()
        errors.append(error)

    x.register_hook(on_input)
    for first, second in pairs:
        second(first(x if first is pairs[0][0] else _x(rank, 0)), "2").square().mean().backward()
    assert len(errors) == 1
    for mine, other in zip(*pairs, strict=True):
        mine.finalize_backward()
        _compare(mine, other, "out of turn")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_two_models_are_finalized_each_by_itself(engine: str, transport: str) -> None:
    run_ranks(_two_models, 2, engine, env=TRANSPORTS[transport])


# ---- what cannot be ------------------------------------------------------------------------------


def _refused(rank: int, world_size: int, engine: str) -> None:
    ours, plain = _manual(engine), _wrap(engine)
    where = f"rank {rank}: "

    def backward(model: nn.Module) -> None:
        model(_x(rank, 1)).square().mean().backward()

    with pytest.raises(RuntimeError, match=f"{where}finalize_backward.*no gradients are in flight"):
        ours.finalize_backward()
    with ours.no_sync():
        backward(ours)
    with pytest.raises(RuntimeError, match="no gradients are in flight"):
        ours.finalize_backward()
    ours.zero_grad()
    for nth in range(2):
        backward(plain)
        loss = ours(_x(rank, 1)).square().mean()
        loss.backward(retain_graph=True)
        # In flight nothing may add to the gradients, or lose them.
        for call in (
            lambda: ours(_x(rank, 2)),
            lambda: ours.double(),
            lambda: ours.register_comm_hook(None, default_hooks.allreduce_hook),
            lambda: ours._update_process_group(dist.group.WORLD),
            functools.partial(loss.backward, retain_graph=True),
            lambda: ours.join_hook().main_hook(),
            lambda: ours.module.layers[0].weight.sum().backward(),
            ours.reducer._get_local_used_map,
        ):
            with pytest.raises(RuntimeError, match=f"{where}.*(finalize_backward|finalized)"):
                call()
        # What is no business of theirs may go on.
        with torch.no_grad():
            ours(_x(rank, 2))
        with ours.no_sync():
            unused = ours(_x(rank, 2))
        assert torch.autograd.grad(unused.sum(), [ours.module.layers[0].weight])
        copy.deepcopy(ours)
        copied = pickle.loads(pickle.dumps(ours))
        assert copied.require_manual_backward_finalization
        assert ours.stats().rounds == nth
        assert len(ours.plan().buckets) > 1
        ours.finalize_backward()
        _compare(ours, plain, "after all of that")
        with pytest.raises(RuntimeError, match="no gradients are in flight"):
            ours.finalize_backward()
        ours.zero_grad()
        plain.zero_grad()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_would_lose_gradients_in_flight_is_refused(engine: str, transport: str) -> None:
    run_ranks(_refused, 2, engine, env=TRANSPORTS[transport])


def _too_early(rank: int, world_size: int, engine: str) -> None:
    """Finalized before all gradients are there; then, as after any error, the next one is right."""
    ours, plain = _manual(engine), _wrap(engine)
    for step in range(3):
        output = ours(_x(rank, step))
        output.register_hook(lambda _: ours.finalize_backward())  # the model is still to come
        with pytest.raises(RuntimeError) as error:
            output.square().mean().backward()
        assert f"rank {rank}: parameter 'layers.3." in str(error.value)
        assert "after finalize_backward() was called in the same backward" in str(error.value)
        ours.zero_grad()
        for model in (ours, plain):
            model.zero_grad()
            model(_x(rank, step)).square().mean().backward()
        ours.finalize_backward()
        torch.testing.assert_close(gradients(ours), gradients(plain))
        # A backward that raises leaves nothing in flight.
        x = _x(rank, step).requires_grad_()
        x.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ours(x).sum().backward()
        with pytest.raises(RuntimeError, match="no gradients are in flight"):
            ours.finalize_backward()


def test_a_gradient_that_comes_later_is_an_error(engine: str) -> None:
    run_ranks(_too_early, 2, engine)


def _converted_behind(rank: int, world_size: int, engine: str) -> str:
    ours = _manual(engine)
    ours(_x(rank, 0)).mean().backward()
    ours.module.half()
    with pytest.raises(RuntimeError) as error:
        ours.finalize_backward()
    ours.module.float()
    ours(_x(rank, 0)).mean().backward()
    ours.finalize_backward()
    assert ours.module.layers[3].bias.grad.dtype == torch.float32
    return str(error.value)


def test_a_parameter_that_is_another_by_then_is_named(engine: str) -> None:
    for text in run_ranks(_converted_behind, 2, engine):
        assert "parameter 'layers.0.weight' had shape [8, 8] and dtype" in text
        assert "call finalize_backward() before the model is changed" in text


# ---- with the rest -------------------------------------------------------------------------------


def _changed(rank: int, world_size: int, engine: str) -> None:
    """Another layer: all ranks agree on it once backward is over."""
    ours = _manual(engine)
    for step in range(4):
        if step == 2:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(9)
                ours.module.layers[1] = nn.Linear(WIDTH, WIDTH)
        ours.zero_grad()
        x = 1 * _x(rank, step).requires_grad_()
        output = ours(x)
        assert ours.should_finalize_after_backward == (step == 2)
        failed: list[RuntimeError] = []
        if step >= 2:

            def on_input(_: Tensor, failed: list[RuntimeError] = failed) -> None:
                try:
                    ours.finalize_backward()
                except RuntimeError as error:
                    failed.append(error)

            x.register_hook(on_input)
        output.square().mean().backward()
        if step == 2:
            assert "has to wait for the end of this backward" in str(failed[0])
        if step <= 2:
            ours.finalize_backward()
        want = copy.deepcopy(ours.module)
        want.zero_grad()
        for other in range(world_size):
            (want(_x(other, step)).square().mean() / world_size).backward()
        torch.testing.assert_close(gradients(ours.module), gradients(want))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_change_is_agreed_upon_when_it_is_finalized(engine: str, transport: str) -> None:
    run_ranks(_changed, 2, engine, env=TRANSPORTS[transport])


def _delayed(rank: int, world_size: int, engine: str) -> None:
    models = [_model() for _ in range(2)]
    options = [
        {
            "delay_all_reduce_named_params": [("layers.0.weight", model.layers[0].weight)],
            "param_to_hook_all_reduce": model.layers[0].bias,
        }
        for model in models
    ]
    ours, plain = (_wrap(engine, m, **o) for m, o in zip(models, options, strict=True))
    ours.require_manual_backward_finalization = True
    for step in range(3):
        for model in (ours, plain):
            model.zero_grad()
            x = _x(rank, step).requires_grad_()
            output = model(x)
            assert model.should_finalize_after_backward
            if model is ours and step == 2:
                x.register_hook(lambda _: ours.finalize_backward())
                with pytest.raises(RuntimeError, match="gradients are delayed"):
                    output.square().mean().backward()
                return
            output.square().mean().backward()
        with pytest.raises(RuntimeError, match=f"rank {rank}: .*in flight"):
            ours(_x(rank, step))
        ours.finalize_backward()
        _compare(ours, plain, step)


def test_delayed_gradients_are_finalized_too(engine: str) -> None:
    run_ranks(_delayed, 2, engine)


def _delayed_and_changed(rank: int, world_size: int, engine: str) -> None:
    def wrapped(wrap: Any) -> fastddp.DistributedDataParallel:
        model = _model()
        model.layers[2].weight.requires_grad_(False)
        return wrap(
            engine,
            model=model,
            delay_all_reduce_named_params=[("layers.0.weight", model.layers[0].weight)],
            param_to_hook_all_reduce=model.layers[1].weight,
        )

    ours, plain = wrapped(_manual), wrapped(_wrap)
    for step in range(STEPS):
        for each in (ours, plain):
            if step == 3:
                each.module.layers[2].weight.requires_grad_(True)
            each.zero_grad()
            each(_x(rank, step)).sum().backward()
        ours.finalize_backward()
        _compare(ours, plain, step)
        assert (ours.module.layers[2].weight.grad is not None) == (step >= 3)


def test_a_model_that_changes_while_gradients_are_delayed(engine: str) -> None:
    run_ranks(_delayed_and_changed, 2, engine)


def _buffers(rank: int, world_size: int, engine: str) -> None:
    """Futures of a buffer hook, and optimizers that step in backward, are due when finalized."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, affine=False))
    with torch.no_grad():
        model[0].weight.fill_(3.0)
    ours = _wrap(engine, model)
    ours.require_manual_backward_finalization = True
    future: torch.futures.Future[None] = torch.futures.Future()
    ours._register_buffer_comm_hook(None, lambda *_: [future])
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.5})
    ours(torch.tensor([[1.0], [2.0]]))
    (model[0].weight * (2.0 + 2 * rank)).sum().backward()
    assert model[0].weight.item() == 3.0, "it has not stepped"
    future.set_result(None)  # else it would be waited for until the group's timeout
    ours.finalize_backward()
    assert model[0].weight.item() == 1.5, "3 - 0.5 * (2 + 4) / 2"


def test_what_follows_a_round_follows_its_finalization(engine: str) -> None:
    run_ranks(_buffers, 2, engine)


def _joined(rank: int, world_size: int, engine: str) -> list[float]:
    """Rank 1 has more inputs; a rank without any waits for the others' in its own time."""
    ours = fastddp.DistributedDataParallel(nn.Linear(1, 1, bias=False), engine=engine)
    ours.require_manual_backward_finalization = True
    got = []
    with Join([ours]):
        for step in range(2 + rank):
            ours.zero_grad()
            ours(torch.full((1, 1), 2.0 + step + rank)).sum().backward()
            ours.finalize_backward()
            got.append(ours.module.weight.grad.item())
    return got


def test_join(engine: str) -> None:
    assert run_ranks(_joined, 2, engine) == [[2.5, 3.5], [2.5, 3.5, 2.5]]


def _alone(rank: int, world_size: int, engine: str) -> None:
    ours = fastddp.wrap(_model(), engine=engine)
    ours.require_manual_backward_finalization = True
    assert ours.require_manual_backward_finalization
    for _ in range(2):
        output = ours(_x(rank, 0))
        assert not ours.should_finalize_after_backward
        output.mean().backward()
        ours.finalize_backward()
        assert ours.layers[0].weight.grad is not None


def test_a_world_of_one_has_nothing_to_finalize(engine: str) -> None:
    run_ranks(_alone, 1, engine, init_group=False)


def _wrapped(rank: int, world_size: int, engine: str) -> None:
    """What `wrap` returns; and one that is dropped with gradients in flight."""
    ours = fastddp.wrap(_model(), engine=engine)
    ours.require_manual_backward_finalization = True
    assert not hasattr(ours.module, "require_manual_backward_finalization")
    ours(_x(rank, 0)).mean().backward()
    assert ours.layers[0].weight.grad is None
    with pytest.raises(RuntimeError, match=r"half\(\) while the gradients"):
        ours.half()
    ours.finalize_backward()
    assert ours.layers[0].weight.grad is not None
    ours.zero_grad()
    ours(_x(rank, 0)).mean().backward()
    ours._remove_autograd_hooks()
    ours.finalize_backward()
    assert ours.layers[0].weight.grad is not None, "it was in flight"
    ours.finalize_backward()  # gradients are this rank's own from now on
    other = fastddp.wrap(_model(), engine=engine)
    other.require_manual_backward_finalization = True
    other(_x(rank, 0)).mean().backward()
    del other
    with contextlib.suppress(RuntimeError):
        dist.barrier()


def test_what_wrap_returns(engine: str) -> None:
    run_ranks(_wrapped, 2, engine)
