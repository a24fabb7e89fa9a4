"""The part that the strategies for ``lightning`` and ``pytorch_lightning`` share."""

from __future__ import annotations

from typing import Any

from fastddp.integrations.patch import patch


class WrapsInFastDDP:
    """A mixin for a ``DDPStrategy``, named before it, that wraps the model in fastddp's class."""

    def configure_ddp(self) -> None:
        """Wraps the model. Lightning calls it once per fit, in every process. Collective."""
        with patch():
            super().configure_ddp()  # type: ignore[misc]

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Registers the strategy under the name ``"fastddp"``.

        Args:
            strategy_registry: the registry of the Lightning package that the strategy is for.
        """
        strategy_registry.register("fastddp", cls, description="DDP strategy with fastddp's class")
