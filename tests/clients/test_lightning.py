"""Lightning: `Trainer(strategy=FastDDPStrategy())`; Fabric: `with fastddp.patch():`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.clients.common import (
    TORCH,
    Outcome,
    Train,
    assert_resumed_alike,
    assert_trained_alike,
    copy_weights,
    engine_by_environment,
    needs,
    patched,
    rounds_of,
    train_all_ways,
)
from tests.models import CASES

pytestmark = needs("lightning", "pytorch_lightning")

MICRO_BATCHES = 4  # per rank and epoch


def _data() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(MICRO_BATCHES * 8, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(data), batch_size=4, shuffle=True)


def _loss(model: Any, batch: list[Tensor]) -> Tensor:
    return model(batch[0]).square().mean()


def _fit(pl: Any, strategy: Any, manual: bool = False, **options: Any) -> tuple[Any, Any]:
    """Train the small model; return it, and what wrapped it meanwhile."""

    wrappers = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not manual
            self.net = CASES["cnn"].build()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.net.parameters(), lr=0.01)

        def training_step(self, batch: list[Tensor]) -> Tensor | None:
            loss = _loss(self.net, batch)
            if not manual:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

        def on_train_end(self) -> None:
            wrappers.append(self.trainer.model)  # it is gone after fit

    ckpt_path = options.pop("ckpt_path", None)
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, "max_epochs": 1} | options,
    )
    pl.seed_everything(1)
    module = Module()
    trainer.fit(module, _data(), ckpt_path=ckpt_path)
    return module, wrappers[0]


def _strategy(way: str, package: str, **options: Any) -> Any:
    if way == TORCH:
        return importlib.import_module(f"{package}.strategies").DDPStrategy(**options)
    ours = importlib.import_module(f"fastddp.integrations.{package.partition('.')[0]}")
    return ours.FastDDPStrategy(engine=way, **options)


def _outcome(module: nn.Module, wrapper: Any) -> Outcome:
    return Outcome(type(wrapper).__module__, rounds_of(wrapper), copy_weights(module.state_dict()))


def _automatic(way: str, rank: int, folder: Path) -> Outcome:
    import lightning.pytorch as pl

    def fit(**options: Any) -> tuple[Any, Any]:
        return _fit(
            pl,
            _strategy(way, "lightning.pytorch"),
            accumulate_grad_batches=2,
            gradient_clip_val=0.1,
            enable_checkpointing=True,
            default_root_dir=str(folder),
            max_epochs=2,
            **options,
        )

    every_epoch = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    outcome = _outcome(*fit(callbacks=[every_epoch]))
    outcome.saved_keys = sorted(torch.load(folder / "epoch=1.ckpt")["state_dict"])
    resumed, _ = fit(ckpt_path=str(folder / "epoch=0.ckpt"))
    outcome.resumed = copy_weights(resumed.state_dict())
    return outcome


def _twin_package(way: str, rank: int, folder: Path) -> Outcome:
    import pytorch_lightning as pl

    return _outcome(*_fit(pl, _strategy(way, "pytorch_lightning")))


def _manual(way: str, rank: int, folder: Path) -> Outcome:
    import lightning.pytorch as pl

    return _outcome(*_fit(pl, _strategy(way, "lightning.pytorch"), manual=True))


def _manual_static_graph(way: str, rank: int, folder: Path) -> Outcome:
    import lightning.pytorch as pl

    strategy = _strategy(way, "lightning.pytorch", static_graph=True)
    return _outcome(*_fit(pl, strategy, manual=True))


def _by_name(way: str, rank: int, folder: Path) -> Outcome:
    import lightning.pytorch as pl

    if way == TORCH:
        return _outcome(*_fit(pl, "ddp"))
    import fastddp.integrations.lightning  # noqa: F401  (registers the name)

    with engine_by_environment(way):
        return _outcome(*_fit(pl, "fastddp"))


def _fabric(way: str, rank: int, folder: Path) -> Outcome:
    import lightning

    fabric = lightning.Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    net = CASES["cnn"].build()
    with patched(way):
        model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.01))
    torch.manual_seed(1)
    for index, batch in enumerate(fabric.setup_dataloaders(_data())):
        accumulates = index % 2 == 0
        with fabric.no_backward_sync(model, enabled=accumulates):
            fabric.backward(_loss(model, batch))
        if not accumulates:
            fabric.clip_gradients(model, optimizer, max_norm=0.1)
            optimizer.step()
            optimizer.zero_grad()
    return _outcome(net, model._forward_module)


STEPS = {
    _automatic: 2 * MICRO_BATCHES // 2,  # two epochs, two backwards a step
    _twin_package: MICRO_BATCHES,
    _manual: MICRO_BATCHES,
    _manual_static_graph: MICRO_BATCHES,
    _by_name: MICRO_BATCHES,
    _fabric: MICRO_BATCHES // 2,
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, list[Outcome]]]:
    return train_all_ways(*STEPS)


@pytest.mark.parametrize("train", STEPS, ids=lambda train: train.__name__)
def test_trains_as_with_torch(
    outcomes: dict[str, dict[str, list[Outcome]]], train: Train, engine: str
) -> None:
    assert_trained_alike(outcomes[train.__name__], engine, STEPS[train])


def test_resumes(outcomes: dict[str, dict[str, list[Outcome]]], engine: str) -> None:
    assert_resumed_alike(outcomes[_automatic.__name__], engine)
