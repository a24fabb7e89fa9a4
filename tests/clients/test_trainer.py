"""Hugging Face's Trainer: `with fastddp.patch():` around `Trainer.train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

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

pytestmark = needs("accelerate", "transformers")

STEPS = 4  # of the optimizer, each after two backwards


def _trainer(folder: Path) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

    set_seed(1)
    config = GPT2Config(
        vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
    )
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(2, 32, (64, 8), generator=generator)
    return Trainer(
        model=GPT2LMHeadModel(config),  # tied weights, dropout
        args=TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_grad_norm=0.5,
            learning_rate=0.01,
            max_steps=STEPS,
            save_steps=STEPS // 2,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
    )


def _train(way: str, rank: int, folder: Path) -> Outcome:
    from safetensors import safe_open
    from transformers import GPT2LMHeadModel

    trainer = _trainer(folder)
    with patched(way):
        trainer.train()
    model, weights = trainer.model_wrapped, copy_weights(trainer.model.state_dict())
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert any(norm > 0.5 for norm in norms), f"nothing was clipped: {norms}"

    trainer.accelerator.wait_for_everyone()
    last, middle = folder / f"checkpoint-{STEPS}", folder / f"checkpoint-{STEPS // 2}"
    with safe_open(last / "model.safetensors", "pt") as file:
        saved_keys = sorted(file.keys())
    loaded = GPT2LMHeadModel.from_pretrained(last)
    assert all(torch.equal(p, weights[name]) for name, p in loaded.state_dict().items())

    resumed = _trainer(folder)
    with patched(way):
        resumed.train(resume_from_checkpoint=str(middle))
    return Outcome(
        type(model).__module__,
        rounds_of(model),
        weights,
        copy_weights(resumed.model.state_dict()),
        saved_keys,
    )


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[Outcome]]:
    return train_all_ways(_train)["_train"]


def test_trains_as_with_torch(outcomes: dict[str, list[Outcome]], engine: str) -> None:
    assert_trained_alike(outcomes, engine, STEPS)


def test_resumes(outcomes: dict[str, list[Outcome]], engine: str) -> None:
    assert_resumed_alike(outcomes, engine)
