"""What `wrap` returns is trained, averaged and used by frameworks as the model would be."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP
from torch.optim.swa_utils import AveragedModel

import fastddp
from tests.models import CASES, ConvNet, Ladder, ladder_x, loss_of, mean_x
from tests.parity.checks import assert_ladder, assert_same_bits, bits
from tests.parity.wrapped import assert_synchronises
from tests.ranks import run_ranks


def _optimizer(rank: int, world_size: int, engine: str) -> None:
    """Two training runs, one through torch's class and one through `wrap`, end at the same bits."""
    case = CASES["cnn"]
    theirs = TorchDDP(case.build())
    ours = fastddp.wrap(case.build(), engine=engine)
    runs = [(m, torch.optim.AdamW(m.parameters(), lr=0.01)) for m in (theirs, ours)]
    for step in range(4):
        for model, optimizer in runs:
            optimizer.zero_grad()
            loss_of(model(*case.inputs(rank, step))).backward()
            optimizer.step()
    want = {k.removeprefix("module."): v for k, v in theirs.state_dict().items()}
    assert_same_bits(ours.state_dict(), want, "after four steps")
    assert not torch.equal(ours.head.weight, case.build().head.weight), "it did learn"


def test_an_optimizer_made_from_wrapped_parameters(engine: str) -> None:
    run_ranks(_optimizer, 2, engine)


def _averaged_model(rank: int, world_size: int, engine: str) -> None:
    case = CASES["mlp"]
    for make in (fastddp.wrap, fastddp.DistributedDataParallel):
        ours = make(case.build(), engine=engine)
        average = AveragedModel(ours, avg_fn=lambda old, new, _: old + (new - old) / 4)
        optimizer = torch.optim.SGD(ours.parameters(), lr=0.5)
        want = [p.detach().clone() for p in ours.parameters()]
        for step in range(3):
            optimizer.zero_grad()
            loss_of(ours(*case.inputs(rank, step))).backward()
            optimizer.step()
            average.update_parameters(ours)
            new = [p.detach() for p in ours.parameters()]
            want = [w + (n - w) / 4 if step else n.clone() for w, n in zip(want, new, strict=True)]
        for got, wanted, current in zip(
            average.module.parameters(), want, ours.parameters(), strict=True
        ):
            assert bits(got) == bits(wanted)
            assert bits(got) != bits(current)
        (x,) = case.inputs(0, 0)
        with torch.no_grad():
            assert torch.equal(average(x), average.module.module(x))


def test_averaged_models(engine: str) -> None:
    run_ranks(_averaged_model, 2, engine)


def _tied_after_wrapping(rank: int, world_size: int, engine: str) -> None:
    """One parameter under two names is one slot, and stays tied in a copy."""
    case = CASES["transformer"]
    ours = fastddp.wrap(case.build(), engine=engine)
    for model in (ours, copy.deepcopy(ours)):
        assert model.head.weight is model.embed.weight
        loss_of(model(*case.inputs(rank, 0))).backward()
        slots = [slot.param for bucket in model.plan().buckets for slot in bucket.slots]
        assert len(slots) == len(set(slots)) == len(list(model.parameters()))


def test_tied_parameters_stay_tied(engine: str) -> None:
    run_ranks(_tied_after_wrapping, 2, engine)


class OwnNames(nn.Module):
    """Uses names that torch's class has too."""

    def __init__(self) -> None:
        super().__init__()
        self.ladder = Ladder()
        self.device = "mine"

    def gather(self, x: int) -> int:
        return x + 1

    def join(self) -> str:
        return "joined"

    def forward(self, x: float) -> Tensor:
        return self.ladder(x) * (1 if self.device == "mine" and self.gather(1) == 2 else 0)


def _own_names(rank: int, world_size: int, engine: str) -> None:
    ours = fastddp.wrap(OwnNames(), engine=engine)
    assert ours.device == "mine"
    assert ours.gather(1) == 2
    assert ours.join() == "joined"
    ours(ladder_x(rank, 0, world_size)).backward()
    assert_ladder(ours.ladder, mean_x(0, world_size), "own names")


def test_a_models_own_names_win(engine: str) -> None:
    run_ranks(_own_names, 2, engine)


def _detached(rank: int, world_size: int, engine: str) -> None:
    """Dropping the wrapper frees the model: its gradients are then its own."""
    for make in (fastddp.wrap, fastddp.DistributedDataParallel):
        model = Ladder()
        ours = make(model, engine=engine)
        assert_synchronises(ours, rank, world_size, "wrapped")
        del ours
        model.zero_grad()
        model(ladder_x(rank, 0, world_size)).backward()
        assert_ladder(model, ladder_x(rank, 0, world_size), "no longer wrapped")
        assert_synchronises(make(model, engine=engine), rank, world_size, "wrapped again")


def test_dropping_the_wrapper_unhooks_the_model(engine: str) -> None:
    run_ranks(_detached, 2, engine)


def _frameworks(rank: int, world_size: int, engine: str) -> None:
    """What Lightning and Accelerate read and call, in their order, by torch's private names too."""
    for make in (fastddp.DistributedDataParallel, fastddp.wrap):
        ladder = Ladder()
        ours = make(ladder, engine=engine, find_unused_parameters=True)
        assert ours.find_unused_parameters is True
        assert ours.static_graph is False
        ours._set_static_graph()

        with ours.no_sync():  # Accelerate's trigger_sync_in_backward
            loss = ours(ladder_x(rank, 0, world_size))
            ours.require_backward_grad_sync = True
            ours.require_forward_param_sync = True
            ours.reducer.prepare_for_backward([])
            loss.backward()
            ours.require_backward_grad_sync = False
        assert_ladder(ladder, mean_x(0, world_size), "forward in no_sync, synchronised by hand")

        ours.zero_grad()  # Lightning's manual optimisation
        loss = ours(ladder_x(rank, 1, world_size))
        ours.reducer._rebuild_buckets()
        ours.reducer.prepare_for_backward([loss])
        loss.backward()
        ours.reducer._delay_all_reduce()
        assert_ladder(ladder, mean_x(1, world_size), "prepared by hand")

        data = ours._get_ddp_logging_data()
        assert data["world_size"] == world_size
        assert data["module_name"] == "Ladder"
        assert not data.get("can_set_static_graph"), "Lightning would advise it"


def test_what_frameworks_call(engine: str) -> None:
    run_ranks(_frameworks, 2, engine)


def test_convnet_is_the_cnn_case() -> None:
    """The tests above read its layers by name."""
    assert isinstance(CASES["cnn"].build(), ConvNet)
