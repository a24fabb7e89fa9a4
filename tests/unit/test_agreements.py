"""What the ranks agree on between two rounds is not forgotten if it could not be read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastddp.engine.python.agreements import Agreements


class FailsOnce:
    """An exchange whose first wait fails, as one that was interrupted does."""

    def __init__(self, error: BaseException) -> None:
        self.errors = [error]

    def wait(self) -> None:
        if self.errors:
            raise self.errors.pop()


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("a peer has gone"), dist.DistBackendError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_an_order_that_could_not_be_read_is_waited_for_again(
    error: BaseException, raised: type[BaseException]
) -> None:
    group = SimpleNamespace(broadcast=lambda _: FailsOnce(error))
    context: Any = SimpleNamespace(
        device=torch.device("cpu"),
        number=1,
        rank=0,
        group=lambda: group,
        wait_for=lambda work, _: work.wait(),
    )
    agreements = Agreements(context)
    agreements.start_with_order([2, 0, 1])
    with pytest.raises(raised):
        agreements.await_order()
    assert agreements.is_order_under_way
    assert agreements.await_order() == [2, 0, 1]
    assert not agreements.is_order_under_way
    assert agreements.await_order() is None
