"""A strategy for ``lightning`` that trains through fastddp.

:mod:`fastddp.integrations.pytorch_lightning` has the same for the package ``pytorch_lightning``.
"""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from fastddp.integrations.strategy import WrapsInFastDDP


class FastDDPStrategy(WrapsInFastDDP, DDPStrategy):
    """Lightning's DDP strategy, with :class:`fastddp.DistributedDataParallel` around the model.

    It takes the arguments of ``DDPStrategy``, and hands those that ``DDPStrategy`` does not know to
    fastddp's class, for example ``engine``. Importing this module also registers the strategy under
    the name ``"fastddp"``. Lightning wraps the model when a fit starts. That is collective: the
    ranks compare their models.

    Raises:
        MismatchError: when the model is wrapped, if the ranks' models differ.

    Example::

        from fastddp.integrations.lightning import FastDDPStrategy

        trainer = Trainer(strategy=FastDDPStrategy(), devices=2)
    """


FastDDPStrategy.register_strategies(StrategyRegistry)
