"""The strategy for ``pytorch_lightning``; :mod:`fastddp.integrations.lightning` is its twin.

The two packages hold the same code twice, and each only takes its own classes.
"""

from __future__ import annotations

from typing import Any

from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry

from fastddp.patch import patch


class FastDDPStrategy(DDPStrategy):
    """As :class:`fastddp.integrations.lightning.FastDDPStrategy`.

    Example::

        from fastddp.integrations.pytorch_lightning import FastDDPStrategy

        trainer = Trainer(strategy=FastDDPStrategy(), devices=2)
    """

    def configure_ddp(self) -> None:
        """Wraps the model; Lightning calls it once per fit, in every process."""
        with patch():
            super().configure_ddp()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        strategy_registry.register("fastddp", cls, description="DDP strategy with fastddp's class")


FastDDPStrategy.register_strategies(StrategyRegistry)
