"""Hugging Face Accelerate: `with fastddp.patch():` around `Accelerator.prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.clients.common import (
    Outcome,
    assert_resumed_alike,
    assert_trained_alike,
    copy_weights,
    needs,
    patched,
    rounds_of,
    train_all_ways,
)
from tests.models import CASES, Ladder, ladder_x, mean_x
from tests.parity.checks import assert_ladder

pytestmark = needs("accelerate")

MICRO_BATCHES = 5  # per rank and epoch; odd, so that the last accumulation is cut short
STEPS = 2 * 3  # of the optimizer: two epochs of two full accumulations and one of a single batch


def _epoch(accelerator: Any, model: Any, optimizer: Any, loader: Any) -> None:
    for (images,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(images).square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()


def _train(way: str, rank: int, folder: Path) -> Outcome:
    from accelerate import Accelerator
    from safetensors import safe_open

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    plain = CASES["cnn"].build()
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(MICRO_BATCHES * 8, 3, 8, 8, generator=generator))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    with patched(way):
        model, optimizer, loader = accelerator.prepare(
            plain, optimizer, DataLoader(data, batch_size=4)
        )
    assert accelerator.unwrap_model(model) is plain
    assert list(accelerator.get_state_dict(model)) == list(plain.state_dict())

    _epoch(accelerator, model, optimizer, loader)
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()  # rank 0 writes the model, and nobody waits for it
    with safe_open(folder / "model.safetensors", "pt") as file:
        saved_keys = sorted(file.keys())
    _epoch(accelerator, model, optimizer, loader)
    weights, rounds = copy_weights(plain.state_dict()), rounds_of(model)
    accelerator.load_state(str(folder))
    _epoch(accelerator, model, optimizer, loader)
    resumed = copy_weights(plain.state_dict())
    accelerator.free_memory()
    return Outcome(type(model).__module__, rounds, weights, resumed, saved_keys)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[Outcome]]:
    return train_all_ways(_train)["_train"]


def test_trains_as_with_torch(outcomes: dict[str, list[Outcome]], engine: str) -> None:
    assert_trained_alike(outcomes, engine, STEPS)


def test_resumes(outcomes: dict[str, list[Outcome]], engine: str) -> None:
    assert_resumed_alike(outcomes, engine)


def _sync_by_hand(way: str, rank: int, folder: Path) -> None:
    """Several forwards under no_sync, and the last backward alone synchronised."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    ladder = Ladder()
    with patched(way):
        model = accelerator.prepare(ladder)
    for step, inside in ((0, True), (2, False)):
        model.zero_grad()
        with accelerator.no_sync(model):
            first = model(ladder_x(rank, step, 2))
            last = model(ladder_x(rank, step + 1, 2))
            if inside:
                accelerator.backward(first)
        if inside:
            assert_ladder(ladder, ladder_x(rank, step, 2), f"{way}: under no_sync")
        else:  # torch decides at the forward, so this is not averaged; ours is, and again below
            accelerator.backward(first)
        with accelerator.trigger_sync_in_backward(model):
            accelerator.backward(last)
        want = mean_x(step, 2) + mean_x(step + 1, 2)
        assert_ladder(ladder, want, f"{way}, first backward inside: {inside}")
    assert rounds_of(model) in (None, 1 + 2)


def test_trigger_sync_in_backward() -> None:
    train_all_ways(_sync_by_hand)


def _sync_batch_norm(way: str, rank: int, folder: Path) -> str:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(CASES["cnn"].build())
    with patched(way), pytest.raises(ValueError, match="SyncBatchNorm") as raised:
        accelerator.prepare(model)(torch.zeros(4, 3, 8, 8))
    return str(raised.value)


def test_sync_batch_norm_is_refused_on_cpu() -> None:
    train_all_ways(_sync_batch_norm)
