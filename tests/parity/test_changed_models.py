"""Models that change after they were wrapped: averaged from the next forward on, or an error.

The oracle is a plain copy that changes in the same way, its gradients averaged over the ranks.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.utils import parametrize

import fastddp
from tests.ranks import run_ranks
from tests.slow import slow_but_for

TRANSPORTS = {"shm": {}, "gloo": {"FASTDDP_SHM": "0"}}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.extra = nn.Linear(4, 4)
        self.late = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 6, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.body(self.embed(words))
        x = x if self.extra is None else x + self.extra(x)
        return self.head(self.late(x).to(self.head.weight.dtype))


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features) / 4)
        self.up = nn.Parameter(torch.randn(base.out_features, 2) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.t() @ self.up.t()


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _net() -> Net:
    torch.manual_seed(5)
    return Net()


def replace_layer(net: Net) -> None:
    net.body[2] = nn.Linear(4, 4)


def append_layer(net: Net) -> None:
    net.body.append(nn.Linear(4, 4))


def add_lora(net: Net) -> None:
    net.body[0] = Lora(net.body[0])


def resize_embeddings(net: Net) -> None:
    for name, layer in (("embed", nn.Embedding(9, 4)), ("head", nn.Linear(4, 9, bias=False))):
        with torch.no_grad():
            layer.weight[:6] = getattr(net, name).weight
        setattr(net, name, layer)


def load_and_assign(net: Net) -> None:
    state = {name: 1.5 * value for name, value in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    net.late.requires_grad_(False)


def replace_data(net: Net) -> None:
    net.head.weight.data = torch.randn(6, 4)


def replace_data_by_a_transpose(net: Net) -> None:
    net.head.weight.data = torch.randn(4, 6).t()


def replace_data_by_more(net: Net) -> None:
    net.head.weight.data = torch.randn(8, 4)
    net.head.out_features = 8


def set_memory(net: Net) -> None:
    with torch.no_grad():
        net.head.weight.set_(torch.randn(6, 4))


def to_double(net: Net) -> None:
    net.double()


def head_to_double(net: Net) -> None:
    net.head.double()


def clone_parameters(net: Net) -> None:
    net._apply(torch.clone)


def thaw(net: Net) -> None:
    net.late.requires_grad_(True)


def freeze(net: Net) -> None:
    net.body[0].requires_grad_(False)


def delete_layer(net: Net) -> None:
    net.extra = None


def tie(net: Net) -> None:
    net.head.weight = net.embed.weight


def untie(net: Net) -> None:
    net.body[2].weight = nn.Parameter(net.body[2].weight.detach().clone())


def parametrize_layer(net: Net) -> None:
    parametrize.register_parametrization(net.body[0], "weight", Double())


def several(net: Net) -> None:
    append_layer(net)
    thaw(net)
    replace_data(net)


CHANGES: dict[str, Callable[[Net], None]] = {
    fn.__name__: fn
    for fn in (
        *(replace_layer, append_layer, add_lora, resize_embeddings, load_and_assign),
        *(replace_data, replace_data_by_a_transpose, replace_data_by_more, set_memory),
        *(to_double, head_to_double, clone_parameters, thaw, freeze, delete_layer),
        *(tie, untie, parametrize_layer, several),
    )
}
# Not seen on a rank that makes them alone, or no change of what is averaged.
NOT_NOTICED = ("replace_data", "clone_parameters", "freeze")


def _words(rank: int, step: int) -> Tensor:
    return torch.randint(0, 6, (3, 5), generator=torch.Generator().manual_seed(10 * step + rank))


def _loss(model: nn.Module, words: Tensor) -> Tensor:
    return model(words).square().mean()


def _check(ours: nn.Module, plain: nn.Module, what: object) -> None:
    got, wanted = dict(ours.named_parameters()), dict(plain.named_parameters())
    assert got.keys() == wanted.keys()
    for name, p in wanted.items():
        local = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        want = local.double()
        dist.all_reduce(want)
        want /= dist.get_world_size()
        if got[name].grad is None:
            assert not want.any(), (what, name)
            continue
        grad = got[name].grad
        assert grad.dtype == p.dtype, (what, name)
        assert grad.shape == p.shape, (what, name)
        torch.testing.assert_close(
            grad.double(), want, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{what}, {n}: {m}"
        )


def _step(ours: nn.Module, plain: nn.Module, rank: int, step: int) -> None:
    for model in (ours, plain):
        model.zero_grad(set_to_none=step % 2 == 0)
        for p in model.parameters():
            if p.grad is not None and (p.grad.dtype != p.dtype or p.grad.shape != p.shape):
                p.grad = None  # plain torch could not add to it
        _loss(model, _words(rank, step)).backward()


def _change_all(rank: int, world_size: int, engine: str, transparent: bool, hook: bool) -> None:
    for steps_before in (0, 1, 4):
        for name, change in CHANGES.items():
            plain = _net()
            options = {"engine": engine, "bucket_cap_mb": 1e-4}
            ours = (
                fastddp.wrap(_net(), **options)
                if transparent
                else fastddp.DistributedDataParallel(_net(), **options)
            )
            if hook:
                ours.register_comm_hook(None, default_hooks.allreduce_hook)
            for step in range(steps_before):
                _step(ours, plain, rank, step)
                _check(ours.module, plain, (name, "before"))
            for model in (ours if transparent else ours.module, plain):
                torch.manual_seed(7)
                change(model)
            for step in range(11, 14):  # the first keeps `.grad`, zeroed in place
                _step(ours, plain, rank, step)
                _check(ours.module, plain, (name, steps_before, step))


@pytest.mark.parametrize("transport", slow_but_for(["shm"], TRANSPORTS))
def test_what_there_is_after_a_change_is_averaged(engine: str, transport: str) -> None:
    run_ranks(_change_all, 2, engine, False, False, env=TRANSPORTS[transport])


def test_the_same_for_what_wrap_returns(engine: str) -> None:
    run_ranks(_change_all, 2, engine, True, False)


def test_the_same_with_a_hook(engine: str) -> None:
    run_ranks(_change_all, 2, engine, False, True)


def _change_on_one_rank(rank: int, world_size: int, engine: str, alone: int) -> None:
    for name, change in CHANGES.items():
        if name in NOT_NOTICED:
            continue
        ours = fastddp.DistributedDataParallel(_net(), engine=engine, bucket_cap_mb=1e-4)
        for step in range(3):
            _loss(ours, _words(rank, step)).backward()
        if rank == alone:
            change(ours.module)
        ours.zero_grad()
        loss = _loss(ours, _words(rank, 3))
        try:
            loss.backward()
            pytest.fail(f"{name} was not noticed")
        except fastddp.MismatchError as error:
            text = str(error)
        assert "rank 0" in text, (name, text)
        assert "rank 1" in text, (name, text)
        assert "has changed" in text or "since it was wrapped" in text, (name, text)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("alone", [0, 1])
def test_a_change_on_one_rank_is_an_error_on_all(engine: str, transport: str, alone: int) -> None:
    run_ranks(_change_on_one_rank, 2, engine, alone, env=TRANSPORTS[transport])


def _other_values(rank: int, world_size: int, engine: str) -> None:
    ours = fastddp.wrap(_net(), engine=engine)
    _loss(ours, _words(rank, 0)).backward()
    torch.manual_seed(100 + rank)
    ours.body.append(nn.Linear(4, 4))  # every rank draws its own
    first = ours.body[-1].weight.detach().clone()
    ours.zero_grad()
    _loss(ours, _words(rank, 1)).backward()
    wanted = first.clone()
    dist.broadcast(wanted, 0)
    assert torch.equal(ours.body[-1].weight, wanted), "rank 0's, as when a model is wrapped"
    assert ours.stats().rounds > 0


def test_new_parameters_get_the_values_of_rank_0(engine: str) -> None:
    run_ranks(_other_values, 2, engine)


def _within_accumulation(rank: int, world_size: int, engine: str) -> None:
    ours, plain = fastddp.wrap(_net(), engine=engine), _net()
    _step(ours, plain, rank, 0)
    for model in (ours, plain):
        model.zero_grad()
    with ours.no_sync():
        for model in (ours, plain):
            _loss(model, _words(rank, 1)).backward()
        for model in (ours, plain):
            torch.manual_seed(7)
            append_layer(model)
            _loss(model, _words(rank, 2)).backward()
    for model in (ours, plain):
        _loss(model, _words(rank, 3)).backward()
    _check(ours.module, plain, "all three micro-batches")


def test_a_change_between_micro_batches(engine: str) -> None:
    run_ranks(_within_accumulation, 2, engine)


def _nothing_changed(rank: int, world_size: int, engine: str) -> int:
    """Counts the walks through the model in steps that register modules elsewhere."""
    from fastddp.ddp import changes

    walks = 0
    look = changes.ModelWatch.difference

    def counted(self: changes.ModelWatch) -> str:
        nonlocal walks
        walks += 1
        return look(self)

    changes.ModelWatch.difference = counted
    ours = fastddp.wrap(_net(), engine=engine)
    for step in range(3):
        nn.Sequential(nn.Linear(2, 2), copy.deepcopy(ours.body[0]))
        _loss(ours, _words(rank, step)).backward()
    return walks


def test_a_model_is_looked_at_only_when_something_is_registered_in_it(engine: str) -> None:
    assert run_ranks(_nothing_changed, 2, engine) == [0, 0]


def _replaced_behind_torchs_back(rank: int, world_size: int, engine: str) -> list[str]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("fastddp").addHandler(handler)
    ours = fastddp.wrap(nn.Linear(2, 2), engine=engine)
    ours(torch.ones(1, 2)).sum().backward()
    for name in ("weight", "bias"):
        ours.module._parameters[name] = nn.Parameter(torch.ones_like(getattr(ours.module, name)))
    for _ in range(2):
        ours(torch.ones(1, 2)).sum().backward()
    return records


def test_a_round_without_any_gradient_is_reported_once(engine: str) -> None:
    first, second = run_ranks(_replaced_behind_torchs_back, 2, engine)
    assert len(first) == 1
    assert "no rank had a gradient for any parameter of model 'Linear'" in first[0]
    assert second == []


class SubclassedTensor(Tensor):
    pass


def _subclass(rank: int, world_size: int, engine: str) -> list[list[float]]:
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(3).as_subclass(SubclassedTensor))
    model.forward = lambda x: (model.weight * x).sum()
    ours = fastddp.DistributedDataParallel(model, engine=engine)
    means = []
    for step in range(3):
        ours.zero_grad()
        ours(torch.tensor(float(2 * rank + step))).backward()
        means.append(model.weight.grad.tolist())
    return means


def test_a_parameter_of_a_subclass_is_averaged(engine: str) -> None:
    want = [[1.0] * 3, [2.0] * 3, [3.0] * 3]
    assert run_ranks(_subclass, 2, engine) == [want, want]


class Normalised(nn.Module):
    """Has a buffer, which every forward broadcasts; a factor that a hook can be put on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.norm(self.first(x))
        return self.last(self.hidden)


def _raise(*_: object) -> None:
    raise ArithmeticError("one rank alone")


def _raise_in_the_middle(model: Normalised, loss: Tensor) -> None:
    model.hidden.register_hook(_raise)


def _raise_at_the_end(model: Normalised, loss: Tensor) -> None:
    """As the end of another model's round would, after this one's."""

    def queue(_: Tensor) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(_raise)

    model.hidden.register_hook(queue)


RAISES = {"in the middle": _raise_in_the_middle, "at the end": _raise_at_the_end}


def _raised_meanwhile(rank: int, world_size: int, engine: str, moment: str) -> None:
    torch.manual_seed(3)
    plain = Normalised()
    ours = fastddp.DistributedDataParallel(copy.deepcopy(plain), engine=engine, bucket_cap_mb=1e-4)
    inputs = torch.randn(4, world_size, 5, 4)
    for step in range(4):
        if step == 2:
            for module in (ours.module, plain):
                torch.manual_seed(8)
                module.last = nn.Linear(4, 4)
        for model in (ours, plain):
            model.zero_grad()
        plain(inputs[step, rank]).square().sum().backward()
        wanted = {name: p.grad / world_size for name, p in plain.named_parameters()}
        loss = ours(inputs[step, rank]).square().sum()
        if step == 2 and rank == 1:
            RAISES[moment](ours.module, loss)
            with pytest.raises(ArithmeticError):
                loss.backward()
            continue
        loss.backward()
        for grad in wanted.values():
            if step != 2:  # then the other rank has nothing to add, nor does it call this
                dist.all_reduce(grad)
        for name, p in ours.module.named_parameters():
            what = f"step {step}, {name}: "
            torch.testing.assert_close(p.grad, wanted[name], msg=lambda m, w=what: w + m)


@pytest.mark.parametrize("moment", RAISES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_backward_that_raises_on_one_rank_while_the_model_changes(
    engine: str, transport: str, moment: str
) -> None:
    run_ranks(_raised_meanwhile, 2, engine, moment, env=TRANSPORTS[transport])


def _wrong_gradient_meanwhile(rank: int, world_size: int, engine: str) -> list[str]:
    """Rank 0's model changes; rank 1 learns of it in a round that ends with another error."""
    model = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in ("first", "second")})
    model.forward = lambda x: model["first"](x) if rank else model["second"](model["first"](x))
    ours = fastddp.DistributedDataParallel(model, engine=engine)
    for _ in range(2):
        ours(torch.ones(1, 3)).sum().backward()
    if rank == 0:
        ours.zero_grad()
        model["second"] = nn.Linear(3, 3, bias=False)
    else:
        model["second"].weight.grad.resize_(5)
    errors = []
    for _ in range(1 + rank):
        try:
            ours(torch.ones(1, 3)).sum().backward()
        except RuntimeError as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


def test_an_error_of_one_rank_does_not_keep_it_from_the_agreement(engine: str) -> None:
    (mismatch,), (shape, same_mismatch) = run_ranks(_wrong_gradient_meanwhile, 2, engine)
    assert "'second.weight' has shape" in shape
    for text in (mismatch, same_mismatch):
        assert text.startswith("MismatchError"), text
        assert "'second.weight' is replaced" in text, text


def _noticed_at_different_times(rank: int, world_size: int, engine: str) -> None:
    ours, plain = fastddp.wrap(_net(), engine=engine), _net()
    for step in range(2):
        _step(ours, plain, rank, step)
    for model in (ours, plain):
        torch.manual_seed(7)
        append_layer(model)
        if rank == 1:
            _loss(model, _words(rank, 5))  # whose graph is dropped
        replace_layer(model)
        set_memory(model)
        thaw(model)
    for step in range(2, 4):
        _step(ours, plain, rank, step)
        _check(ours, plain, step)


def test_what_a_rank_has_noticed_early_is_compared_with_what_others_notice_later(
    engine: str,
) -> None:
    run_ranks(_noticed_at_different_times, 2, engine)


def _again_without_a_forward(rank: int, world_size: int, engine: str, moment: str) -> None:
    torch.manual_seed(3)
    ours = fastddp.DistributedDataParallel(Normalised(), engine=engine, bucket_cap_mb=1e-4)
    x = torch.ones(5, 4) * torch.arange(5.0)[:, None] * (rank + 1)
    ours(x).square().sum().backward()
    torch.manual_seed(8)
    ours.module.last = nn.Linear(4, 4)
    ours.zero_grad()
    loss = ours(x).square().sum()
    if rank == 1:
        RAISES[moment](ours.module, loss)
        with pytest.raises(ArithmeticError):
            loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="run a forward in grad mode"):
            loss.backward()
        ours.zero_grad()
    else:
        loss.backward()
    ours.zero_grad()
    ours(x).square().sum().backward()
    for name, p in ours.module.named_parameters():
        other = p.grad.clone()
        dist.broadcast(other, 0)
        assert torch.equal(other, p.grad), name


@pytest.mark.parametrize("moment", RAISES)
def test_another_backward_waits_for_the_agreement(engine: str, moment: str) -> None:
    run_ranks(_again_without_a_forward, 2, engine, moment)


def _the_first_of_two(rank: int, world_size: int, engine: str) -> None:
    """The second model's change is agreed on before the first one's forward broadcasts buffers."""
    torch.manual_seed(3)
    plain = nn.ModuleList([Normalised(), Normalised()])
    first, second = (
        fastddp.DistributedDataParallel(copy.deepcopy(model), engine=engine) for model in plain
    )
    for step in range(4):
        if step == 1:
            for model in (second.module, plain[1]):
                torch.manual_seed(8)
                model.last = nn.Linear(4, 4)
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * step + rank))
        for model in (first, second, plain):
            model.zero_grad()
        hidden = first(x)
        loss = second(hidden).square().sum()
        if step == 1 and rank == 1:
            first.module.hidden.register_hook(_raise)
            with pytest.raises(ArithmeticError):
                loss.backward()
            continue
        loss.backward()
        if step == 1:
            continue
        plain[1](plain[0](x)).square().sum().backward()
        for mine, model in zip((first, second), plain, strict=True):
            wanted = _mean_gradients(model)
            for name, p in mine.module.named_parameters():
                torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-4)


def _mean_gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    for grad in grads.values():
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
    return grads


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_agreement_comes_before_another_models_forward(engine: str, transport: str) -> None:
    run_ranks(_the_first_of_two, 2, engine, env=TRANSPORTS[transport])
