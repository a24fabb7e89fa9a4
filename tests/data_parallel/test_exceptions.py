"""What a replica raises reaches the caller with the name of the replica."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.data_parallel.common import FOUR, Call, Scale, spread


class Odd(Exception):
    """Cannot be made from a message alone."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code


def _fails_on_second(error: BaseException) -> Any:
    def forward(module: Call, x: Tensor) -> Tensor:
        if x[0] > 0:
            raise error
        return module.scale(x)

    return spread(forward, scale=Scale())


@pytest.mark.parametrize("kind", [ValueError, KeyError, RuntimeError, StopIteration, SystemExit])
def test_an_exception_keeps_its_type_and_names_its_replica(kind: type[BaseException]) -> None:
    model = _fails_on_second(kind("no luck"))
    with pytest.raises(kind) as caught:
        model(torch.arange(2.0))
    assert type(caught.value) is kind
    text = "".join(map(str, caught.value.args))
    assert text.startswith(
        f"Caught {kind.__name__} in replica 1 on device cpu.\nOriginal Traceback"
    )
    assert "raise error" in text, "the line that failed"
    assert "no luck" in text
    assert "\n  File" in str(caught.value), "readable, not a repr"
    assert torch.equal(model(torch.zeros(2)), torch.zeros(2)), "the threads go on"


def test_an_exception_that_needs_more_than_a_message_is_raised_itself() -> None:
    error = Odd(7, "no luck")
    with pytest.raises(Odd) as caught:
        _fails_on_second(error)(torch.arange(2.0))
    assert caught.value is error
    assert "in replica 1 on device cpu" in str(caught.value.__cause__)


def test_the_first_replicas_exception_is_raised_once_all_have_ended() -> None:
    ended: list[int] = []

    def forward(module: Call, x: Tensor) -> Tensor:
        time.sleep(0.05 * (3 - x.item()))
        ended.append(x.item())
        raise ValueError(f"piece {x.item()}")

    with pytest.raises(ValueError, match=r"(?s)in replica 0 .*piece 0"):
        spread(forward, FOUR)(torch.arange(4))
    assert sorted(ended) == [0, 1, 2, 3]


def test_an_exception_keeps_nothing_alive() -> None:
    class Watched:
        pass

    alive: list[Any] = []

    def forward(module: Call, x: Tensor) -> Any:
        activation = Watched()
        alive.append(weakref.ref(activation))
        if x[0] > 0:
            raise ValueError("no luck")
        return activation

    model = spread(forward)
    gc.collect()
    gc.disable()
    try:
        try:
            model(torch.arange(2))
        except ValueError:
            failed = True
        assert failed
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()
