"""The strategy for ``lightning``; :mod:`fastddp.integrations.pytorch_lightning` is its twin."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from fastddp.patch import patch


class FastDDPStrategy(DDPStrategy):
    """Lightning's DDP strategy, around :class:`fastddp.DistributedDataParallel`.

    Takes the arguments of ``DDPStrategy`` and those of fastddp's class, for example ``engine``.
    Importing this module also registers it as ``"fastddp"``.

    Example::

        from fastddp.integrations.lightning import FastDDPStrategy

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
