"""One synchronised backward: an object that is made when it begins, and dropped when it ends.

It is never reset, so nothing of one round can get into the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastddp.device.profiled import profiled
from fastddp.device.streams import has_streams, home_of
from fastddp.engine.launch_order import Turn
from fastddp.engine.python.bucket import Bucket
from fastddp.engine.python.buckets import Buckets
from fastddp.engine.python.context import Context
from fastddp.engine.python.figures import Times
from fastddp.engine.python.fill import Filling, OneByOne
from fastddp.engine.python.launchers import Launch, Launcher
from fastddp.engine.python.manner import Gives, Manner
from fastddp.engine.python.parameters import Parameter
from fastddp.engine.python.tensors import bytes_in, put_back
from fastddp.watch.events import Kind


class Round:
    """One round: gradients go in, buckets go out, and reduced gradients become ``.grad``.

    Args:
        manner: how the round goes.
        step: how many rounds have ended before.
        parameters: the hooked parameters.
        buckets: the installed plan.
        launcher: the object that sends buckets.
        turn: the place of the reducer in the order of launching.
        context: the facts that all parts of the reducer share.
    """

    def __init__(
        self,
        manner: Manner,
        step: int,
        parameters: Sequence[Parameter],
        buckets: Buckets,
        launcher: Launcher,
        turn: Turn,
        context: Context,
    ) -> None:
        self.manner = manner
        self.step = step
        """How many rounds have ended before this one."""
        self.times = Times()
        self.stream = home_of(context.device)
        """The stream that the round began on."""
        self.launches: list[Launch] = []
        """The collectives under way, in the order of launching."""
        self.fill = OneByOne(manner, context)
        self.buckets = buckets
        self._parameters = parameters
        self._launcher = launcher
        self._turn = turn
        self._context = context
        slots = [len(bucket.slots) for bucket in buckets.plan.buckets]
        slots += [1] * (len(buckets) - len(slots))  # sparse gradients
        self._fillings = [Filling(num_slots) for num_slots in slots]
        self._next = 0

    # ---- gradients in ----------------------------------------------------------------------------

    def take(self, param: Parameter) -> None:
        """Puts a gradient of the backward into its place, and launches the full buckets."""
        grad = param.tensor.grad
        if grad is None:
            return
        number = self.buckets.number_of(param)
        self._allocate(number)
        self.fill.put(self.buckets.place_of(param), self._fillings[number], grad)
        if param.is_sparse or not self.manner.knows_counts or not self.manner.is_early:
            return
        while self._is_next_full() and self._turn.has_come():
            self._launch_next(waits=False)
        if self.is_all_launched():
            self._turn.end()

    def _is_next_full(self) -> bool:
        # Sparse gradients are launched at the end of backward, whatever has arrived.
        return self._next < self.buckets.num_dense and self._fillings[self._next].missing == 0

    def is_all_launched(self) -> bool:
        """Returns whether the round has launched its buckets, and nothing is to follow them."""
        return self._next >= self.buckets.num_dense and not self.manner.is_followed

    def order(self) -> list[int]:
        """Returns the dense parameters in the order of arrival, then the others in plan order."""
        arrival = [param.index for param in self.fill.arrival if not param.is_sparse]
        slots = (slot.param for bucket in self.buckets.plan.buckets for slot in bucket.slots)
        return arrival + [index for index in slots if index not in self.fill.taken]

    # ---- buckets out -----------------------------------------------------------------------------

    def launch_rest(self, *, waits: bool) -> None:
        """Launches every bucket that is left, the sparse gradients, and the loose flags.

        Args:
            waits: whether :meth:`wait` comes next.
        """
        self.times.note_end_of_backward()
        waits = waits and self._launcher.may_launch_late
        while self._next < self.buckets.num_dense:
            self._launch_next(waits=waits)
        while self._next < len(self.buckets):
            self._launch_next(waits=False)
        self.launches = self._launcher.end_buckets(self.launches)
        if self.buckets.flags is not None:
            for filling in self._fillings:
                filling.touched.by_current_after_all(self._context.device)
            self.buckets.flags.seal()
            self._note_launch(self.buckets.flags)
            self.launches.append(self._launcher.start_flags(self.buckets.flags))

    def _launch_next(self, *, waits: bool) -> None:
        """Fills the places that got no gradient, then sends the next bucket."""
        self.times.note_launch()
        self._allocate(self._next)
        bucket, filling = self.buckets[self._next], self._fillings[self._next]
        self._context.record(Kind.FILL_BEGIN, bucket.collective.number)
        with profiled("fastddp.reducer::fill_bucket"):
            filling.touched.by_current_after_all(self._context.device)
            bucket.seal()
            for place in bucket.places:
                if place.param.index not in self.fill.taken:
                    self.fill.put_leftover(place)
        filling.is_launched = True
        self._next += 1
        self._note_launch(bucket)
        self.launches.append(self._launcher.start(bucket, waits))

    def _note_launch(self, bucket: Bucket) -> None:
        self._context.record(Kind.LAUNCH, bucket.collective.number, bytes_in(bucket.sent()))

    def _allocate(self, number: int) -> None:
        if self.buckets.allocate(number):
            self._fillings[number].is_new = True
            self._fillings[number].touched.by_current(self._context.device)

    def wait(self) -> None:
        """Waits for all launches, and casts their results back to the gradients' dtype.

        Raises:
            torch.distributed.DistBackendError: if a collective has failed; says which.
        """
        for launch in self.launches:
            self._context.record(Kind.WAIT_BEGIN, launch.bucket.collective.number)
            self._wait_for(launch)
            self._context.record(Kind.WAIT_END, launch.bucket.collective.number)
            launch.bucket.cast_back()

    def _wait_for(self, launch: Launch) -> None:
        try:
            launch.wait()
        except RuntimeError as error:
            what = f"the all-reduce of {launch.bucket.collective.text}"
            raise torch.distributed.DistBackendError(
                f"fastddp: rank {self._context.rank}: {what} failed: {error}"
            ) from error

    # ---- gradients out ---------------------------------------------------------------------------

    def hand_out(self) -> None:
        """Makes each ``.grad`` the reduced slot, unless no rank had a gradient for it."""
        for param in self._parameters:
            param.forget_left()
        if self.manner.is_retired:
            return
        for param in self._parameters:
            param.expected = max(param.expected, self.fill.taken[param.index])
            alias = self.fill.aliases.get(param.index)
            reduced = self.buckets.place_of(param).handed_out() if alias is None else alias
            param.tensor.grad = reduced
        self._read_flags()
        for bystander in self.fill.bystanders:
            if not bystander.param.used:
                put_back(bystander.param.tensor, bystander.grad)
        self.buckets.keep_for_current()

    def _read_flags(self) -> None:
        """Reads for each bystander whether any rank had a gradient; from a GPU all at once.

        This is where the host waits, on a rank that has bystanders. A graph cannot wait, so there
        the flags count that were read last.
        """
        bystanders = self.fill.bystanders
        if not bystanders or self.manner.is_captured:
            return
        places = [self.buckets.place_of(bystander.param) for bystander in bystanders]
        flags = torch.stack([place.flag for place in places])
        for place, flag in zip(places, flags.tolist(), strict=True):
            place.param.used = flag != 0

    def leave_buckets(self) -> None:
        """Leaves lazy buckets to the script: no reference of this round keeps their memory."""
        self.launches.clear()
        self._launcher.let_go()
        self.buckets.leave_to_script()

    # ---- what it was like ------------------------------------------------------------------------

    def unused_here(self) -> list[Parameter]:
        """Returns the parameters for which this rank had no gradient."""
        return [bystander.param for bystander in self.fill.bystanders]

    def unused_by_all(self) -> list[Parameter]:
        """Returns the parameters for which no rank had a gradient; known after :meth:`hand_out`."""
        if self.manner.is_retired:
            return []
        return [param for param in self.unused_here() if not param.used]

    def is_empty(self) -> bool:
        """Returns whether no rank had a gradient for any parameter, as far as the host knows."""
        manner = self.manner
        if self.fill.taken or manner.is_retired or manner.gives is Gives.WHAT_IS_THERE:
            return False
        if has_streams(self._context.device):
            return False
        everything = len(self.fill.bystanders) == len(self._parameters)
        return everything and not any(param.used for param in self._parameters)
