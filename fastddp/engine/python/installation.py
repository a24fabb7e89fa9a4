"""Which plan a reducer has, and whether buckets are allocated for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastddp.comm.loans import settle
from fastddp.engine.hooks import Wait
from fastddp.engine.interface import Settings
from fastddp.engine.plan import BucketPlan, ParamSpec, plan_buckets
from fastddp.engine.python.bucket import Form
from fastddp.engine.python.buckets import Buckets
from fastddp.engine.python.context import Context
from fastddp.engine.python.former import Former
from fastddp.engine.python.parameters import Parameter


class Installation:
    """The plan of a reducer, and its buckets from one round to the next.

    Args:
        parameters: the hooked parameters, sparse ones last.
        settings: the settings of the reducer.
        context: the facts that all parts of the reducer share.
    """

    def __init__(
        self, parameters: Sequence[Parameter], settings: Settings, context: Context
    ) -> None:
        self.plan = BucketPlan(())
        self.buckets: Buckets | None = None
        """The plan's buckets, once they are installed."""
        self._parameters = parameters
        self._specs = [ParamSpec.of(param.tensor) for param in parameters if not param.is_sparse]
        self._settings = settings
        self._context = context
        self._former = Former(context.device)

    def settle(self) -> None:
        """Waits until no thread of the transport refers to the memory that is to be dropped."""
        buckets = [] if self.buckets is None else self.buckets.loans()
        settle([*self._former.loans(), *buckets])

    def replan(self, order: Sequence[int], form: Form) -> None:
        """Plans anew, with gradients that arrive in this order.

        Args:
            order: the indices of the dense parameters, equal on every rank.
            form: how the buckets are laid out.
        """
        plan = plan_buckets(self._specs, order, self._settings.caps_bytes, form.align_bytes)
        if plan != self.plan:
            self.plan = plan
            self.uninstall()

    def order(self) -> list[int]:
        """Returns the indices of the dense parameters as the plan has them."""
        return [slot.param for bucket in self.plan.buckets for slot in bucket.slots]

    def install(self, form: Form, *, has_changed: bool) -> Buckets:
        """Allocates the plan's buckets and returns them.

        Args:
            form: how buckets are laid out.
            has_changed: whether their marks say that this rank's model has changed.
        """
        self._former.release()
        self.buckets = Buckets(
            self.plan,
            self._parameters,
            form,
            self._context,
            is_lazy=self._settings.lazy,
            has_changed=has_changed,
        )
        return self.buckets

    def uninstall(self, waits: Iterable[Wait] = ()) -> None:
        """Has the next round begin with new buckets.

        Args:
            waits: functions that wait for the collectives that may still write to these.
        """
        self._former.keep(self.buckets, waits)
        self.buckets = None
