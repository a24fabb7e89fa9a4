"""The strategy for ``pytorch_lightning``; :mod:`fastddp.integrations.lightning` is its twin.

The two packages hold the same code twice, and each only takes its own classes.
"""

from __future__ import annotations

from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry

from fastddp.integrations.strategy import WrapsInFastDDP


class FastDDPStrategy(WrapsInFastDDP, DDPStrategy):
    """As :class:`fastddp.integrations.lightning.FastDDPStrategy`.

    Example::

        from fastddp.integrations.pytorch_lightning import FastDDPStrategy

        trainer = Trainer(strategy=FastDDPStrategy(), devices=2)
    """


FastDDPStrategy.register_strategies(StrategyRegistry)
