"""A strategy for ``pytorch_lightning`` that trains through fastddp.

``lightning`` and ``pytorch_lightning`` hold the same code twice, and each takes only classes of its
own. :mod:`fastddp.integrations.lightning` has the strategy for the other package.
"""

from __future__ import annotations

from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry

from fastddp.integrations.strategy import WrapsInFastDDP


class FastDDPStrategy(WrapsInFastDDP, DDPStrategy):
    """Lightning's DDP strategy, with :class:`fastddp.DistributedDataParallel` around the model.

    It behaves like :class:`fastddp.integrations.lightning.FastDDPStrategy`, and is for code that
    imports ``pytorch_lightning``.

    Example::

        from fastddp.integrations.pytorch_lightning import FastDDPStrategy

        trainer = Trainer(strategy=FastDDPStrategy(), devices=2)
    """


FastDDPStrategy.register_strategies(StrategyRegistry)
