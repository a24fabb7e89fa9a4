"""A process group on the stand-in device that behaves like NCCL to streams, and keeps a log.

It claims any rank of any number of ranks, in one process. The others are taken to hold what this
one holds: a sum is the value times their number. What rank 0 broadcasts can be replayed to the
others, see ``replay``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed import ProcessGroup, ReduceOp, Work
from torch.distributed.distributed_c10d import AllreduceOptions, BroadcastOptions

from tests.streams import device


class Collective(NamedTuple):
    """One entry of the log."""

    op: str
    numel: int
    dtype: torch.dtype


class RecordingGroup(ProcessGroup):
    """See above.

    As with NCCL, a collective waits for the stream that it was called on and runs on one of its
    own; ``Work.wait`` has the current stream wait and not the host; tensors are kept until then, or
    until the collective has ended if nobody waits for it. One that is not asynchronous runs on the
    current stream.

    Args:
        rank: which one to be.
        size: how many there are.
        replay: what rank 0 has broadcast, ``sent`` of its group; for the other ranks.
    """

    def __init__(self, rank: int = 0, size: int = 2, replay: Sequence[torch.Tensor] = ()) -> None:
        super().__init__(rank, size)
        self.log: list[Collective] = []
        self.sent: list[torch.Tensor] = []
        self.stream = device.stream("the group's stream")
        self._replay = list(replay)

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device(device.NAME)]

    def getBackendName(self) -> str:
        return "recording"

    def _get_backend(self, _device: torch.device) -> _Backend:
        return _Backend()

    def allreduce(
        self, tensors: Any, opts: AllreduceOptions | ReduceOp.RedOpType | None = None
    ) -> Work:
        if isinstance(opts, ReduceOp.RedOpType):
            op, opts = opts, AllreduceOptions()
            opts.reduceOp = op
        opts = opts or AllreduceOptions()
        tensors = _as_list(tensors)
        factor = {ReduceOp.SUM: self.size(), ReduceOp.AVG: 1, ReduceOp.MAX: 1}[opts.reduceOp.op]

        def reduce() -> None:
            for tensor in tensors:
                tensor.mul_(factor)

        return self._start("allreduce", tensors, reduce, opts.asyncOp)

    def broadcast(self, tensors: Any, opts: BroadcastOptions | None = None, root: int = 0) -> Work:
        root = opts.rootRank if opts is not None else root
        tensors = _as_list(tensors)

        def send() -> None:
            for tensor in tensors:
                if self.rank() == root:
                    self.sent.append(tensor.to("cpu", non_blocking=True))
                else:
                    tensor.copy_(self._replay.pop(0), non_blocking=True)

        return self._start("broadcast", tensors, send)

    def allgather(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], _opts: Any = None
    ) -> Work:
        pairs = [(t, out) for t, outs in zip(inputs, outputs, strict=True) for out in outs]

        def gather() -> None:
            for tensor, output in pairs:
                output.copy_(tensor)

        return self._start("allgather", [*inputs, *(output for _, output in pairs)], gather)

    def _start(
        self,
        op: str,
        tensors: list[torch.Tensor],
        body: Callable[[], None],
        is_async: bool = True,
    ) -> Work:
        name = f"{op} {len(self.log)}"
        self.log.append(Collective(op, sum(t.numel() for t in tensors), tensors[0].dtype))
        caller = torch.accelerator.current_stream()
        stream = self.stream if is_async else caller
        stream.wait_event(caller.record_event())
        with torch.no_grad(), stream, device.label(name):
            body()
        return RecordedWork(stream, tensors)


class _Backend:
    """All that Python asks of it."""

    def supports_tensor_alloc(self, _device: torch.device) -> bool:
        return False


class RecordedWork(Work):
    """See :class:`RecordingGroup`."""

    def __init__(self, stream: torch.Stream, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self._stream = stream
        self._end = stream.record_event()
        self._kept = tensors
        # Done at once, like NCCL's: whoever takes the result has its stream wait.
        self._future = torch.futures.Future[list[torch.Tensor]](
            devices=[torch.device(device.NAME, 0)]
        )
        with stream:
            self._future.set_result(tensors)

    def __del__(self) -> None:
        for tensor in self._kept:  # the memory is not used again before the collective has ended
            tensor.record_stream(self._stream)

    def wait(self, _timeout: Any = None) -> bool:
        torch.accelerator.current_stream().wait_event(self._end)
        self._kept = []
        return True

    def is_completed(self) -> bool:
        return bool(self._end.query())

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        return self._future


def _as_list(tensors: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
