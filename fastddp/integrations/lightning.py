"""The strategy for ``lightning``; :mod:`fastddp.integrations.pytorch_lightning` is its twin."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from fastddp.integrations.strategy import WrapsInFastDDP


class FastDDPStrategy(WrapsInFastDDP, DDPStrategy):
    """Lightning's DDP strategy, around :class:`fastddp.DistributedDataParallel`.

    Takes the arguments of ``DDPStrategy`` and those of fastddp's class, for example ``engine``.
    Importing this module also registers it as ``"fastddp"``.

    Example::

        from fastddp.integrations.lightning import FastDDPStrategy

        trainer = Trainer(strategy=FastDDPStrategy(), devices=2)
    """


FastDDPStrategy.register_strategies(StrategyRegistry)
