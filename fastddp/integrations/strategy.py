"""What the strategies for ``lightning`` and ``pytorch_lightning`` share."""

from __future__ import annotations

from typing import Any

from fastddp.integrations.patch import patch


class WrapsInFastDDP:
    """A mixin for a ``DDPStrategy``, to be named before it."""

    def configure_ddp(self) -> None:
        """Wraps the model; Lightning calls it once per fit, in every process."""
        with patch():
            super().configure_ddp()  # type: ignore[misc]

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Registers the strategy as ``"fastddp"``."""
        strategy_registry.register("fastddp", cls, description="DDP strategy with fastddp's class")
