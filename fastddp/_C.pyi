"""The compiled extension, made by csrc/bind/. The headers in csrc/ have the details."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from torch import Tensor, dtype
from torch._C._distributed_c10d import Backend
from torch.distributed import ProcessGroup

class ParamSpec:
    """A parameter as the planner sees it: real elements, and bytes of one of them.

    Parameters share a bucket only when they are of the same `kind`.
    """

    def __init__(self, numel: int, element_bytes: int, kind: int) -> None: ...

class SlotPlan:
    """The place of one gradient in its bucket; `offset` and `numel` count elements."""

    @property
    def param(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def numel(self) -> int: ...

class BucketPlan:
    """One bucket: slots in the order of arrival, a flag for each slot, then the marks."""

    @property
    def kind(self) -> int: ...
    @property
    def slots(self) -> list[SlotPlan]: ...
    @property
    def flags_offset(self) -> int: ...
    @property
    def numel(self) -> int: ...

def plan_buckets(
    params: Sequence[ParamSpec],
    order: Sequence[int],
    caps_bytes: Sequence[int],
    align_bytes: int = 16,
) -> list[BucketPlan]:
    """Returns the buckets in the order in which they fill when gradients arrive in `order`.

    `order` is a permutation of the parameters. `caps_bytes` has the sizes at which the buckets of a
    kind are closed; the last entry serves all further buckets. Raises ValueError otherwise.
    """

has_cuda: bool
"""Whether the extension was built with kernels for GPUs."""

def flatten(
    flat: Tensor,
    tensors: Sequence[Tensor],
    offsets: Sequence[int],
    scale: float,
    moments: Tensor | None,
) -> None:
    """Writes `tensors`, multiplied by `scale`, to their `offsets` in the one-dimensional `flat`.

    The tensors are contiguous, of one dtype and on the device of `flat`; offsets count elements.
    `moments` gets two float64 elements: the sum of squares of what was written, and 1 if all of it
    is finite, else 0. On a GPU this is one kernel on the current stream.
    """

def unflatten(
    flat: Tensor, tensors: Sequence[Tensor], offsets: Sequence[int], scale: float
) -> None:
    """Writes the parts of `flat` at `offsets`, multiplied by `scale`, to `tensors`."""

def scale_copy(dst: Tensor, src: Tensor, scale: float) -> None:
    """dst = src * scale, for contiguous CPU tensors of one shape. For tests."""

def scale_add(dst: Tensor, src: Tensor, scale: float) -> None:
    """dst += src * scale, for contiguous CPU tensors of one shape. For tests."""

def keep_memory(on: bool, patience_s: float = 30.0) -> bool:
    """Turns the cache of large CPU tensors' memory on or off for this process.

    Memory that nobody asks for during `patience_s` seconds goes back to the system. Returns whether
    the cache is in use now: it never replaces another library's allocator.
    """

def release_memory() -> int:
    """Gives idle memory back to the system; returns the number of bytes. Thread-safe."""

class KeptMemory:
    """Bytes in the cache; `peak` is the most that was recently in use at once."""

    @property
    def in_use(self) -> int: ...
    @property
    def idle(self) -> int: ...
    @property
    def peak(self) -> int: ...

def kept_memory() -> KeptMemory:
    """Returns what the cache holds now. Thread-safe."""

def use_events(address: int) -> None:
    """Has C++ write its events to the ring at this address from now on; 0 for none.

    A ring that was in use must never be unmapped: a thread may be about to write to it.
    """

def record_event(kind: int, owner: int, a: int, b: int) -> None:
    """Records an event that happens now, see :func:`fastddp.watch.events.record`. Thread-safe."""

class Reducer:
    def __init__(
        self,
        params: Sequence[Tensor],
        names: Sequence[str],
        num_sparse: int,
        frozen: Sequence[Tensor],
        group: ProcessGroup,
        caps_bytes: Sequence[int],
        comm_dtype: dtype | None = None,
        flattens: bool | None = None,
        owner: int = 0,
        title: str = "the model",
        lazy: bool = False,
    ) -> None: ...
    @property
    def sync(self) -> bool: ...
    @sync.setter
    def sync(self, arg1: bool) -> None: ...
    @property
    def manual(self) -> bool: ...
    @manual.setter
    def manual(self, arg1: bool) -> None: ...
    def watch(self, outputs: Sequence[Tensor]) -> None: ...
    def set_divisor(self, divisor: float) -> None: ...
    def set_hook(
        self,
        hook: Callable[[int, int, Tensor, list[int], list[int]], Callable[[], None]],
        let_go: Callable[[], None],
    ) -> None: ...
    def set_after_round(self, callback: Callable[[], None] | None) -> None: ...
    def set_on_news(self, callback: Callable[[int], None]) -> None: ...
    @property
    def has_left_news(self) -> bool: ...
    @property
    def began_ns(self) -> int: ...
    @property
    def rounds(self) -> int: ...
    def read_left_news(self) -> bool: ...
    def leave_news(self) -> None: ...
    def is_stale(self) -> bool: ...
    def retire(self) -> None: ...
    def is_in_flight(self) -> bool: ...
    def finalize(self) -> None: ...
    def average(self) -> None: ...
    def outgrown(self) -> bool: ...
    def settle(self) -> bool: ...
    def shadow(self) -> None: ...
    def unused(self) -> list[str]: ...
    def error(self) -> str: ...
    def used_by(self) -> list[int]: ...
    def close(self) -> None: ...
    def stats(self) -> dict[str, Any]:
        """Returns the fields of :class:`fastddp.engine.stats.Stats`. Waits for no round."""

    def plan(self) -> list[BucketPlan]: ...

class ShmError(RuntimeError):
    """Shared memory could not be set up, or a collective in it failed; the text says why."""

class ShmAddress:
    """What a process of the same user needs to open a shared memory segment."""

    def __init__(self, pid: int, fd: int, bytes: int, high: int, low: int) -> None: ...
    def parts(self) -> tuple[int, int, int, int, int]: ...

class ShmSegment:
    """A shared memory segment. It ends with the last process that has it open or mapped."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def address(self) -> ShmAddress: ...

def shm_heap() -> ShmAddress:
    """Returns the address of the heap of this process, which the other ranks of a host can map."""

def shm_heap_used() -> int:
    """Returns the bytes in use in this process's heap. For tests."""

def shm_control(ranks: int) -> ShmSegment:
    """Makes the segment through which `ranks` ranks of one host keep step."""

def set_label(label: int) -> int:
    """Labels what this thread launches from now on; returns the previous label. 0 is none."""

def name_owner(owner: int, text: str) -> None:
    """Sets how error messages name the owner of a label. Thread-safe."""

class ShmBackend(Backend):
    """The c10d backend `shm`. `ranks` are those of this host; `inner` carries all other traffic."""

    def __init__(
        self,
        rank: int,
        size: int,
        inner: Backend,
        ranks: Sequence[int],
        heaps: Sequence[ShmAddress],
        control: ShmAddress,
        timeout_s: float,
        name: str,
    ) -> None: ...
    def _set_default_timeout(self, timeout: timedelta) -> None: ...
    def set_lanes(self, count: int, ranks: list[int], backend: Backend | None) -> None: ...
    @property
    def is_idle(self) -> bool: ...
    @property
    def spans_hosts(self) -> bool: ...

def board_layout() -> dict[str, int]:
    """Returns the numbers of `csrc/core/board.h`, by their names in `fastddp/watch/layout.py`."""

def board_group_id(name: str) -> int: ...
def use_board(address: int) -> None:
    """Has this process write to the board at `address` from now on; 0 for none."""

def note_issuer() -> None:
    """Notes that this thread begins a collective."""

def fail_wait(place: int, since_ns: int, text: str) -> bool:
    """Orders the wait at a place to fail; False if the wait that began then is over."""
