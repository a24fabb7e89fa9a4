"""The words of a board, as ``csrc/core/board.h`` has them; ``tests/unit/test_board.py`` compares.

A board is what a process says of itself, in memory that other processes can read: 64-bit words, in
the byte order of the machine. Times are nanoseconds of ``time.monotonic_ns()``, which is the same
clock in all processes of a host, and stands still while the machine sleeps.
"""

from __future__ import annotations

from enum import IntEnum

MAGIC = 0x3130_4444_5453_4146
"""The first word: which version of this layout the board has."""

HEADER_WORDS = 32
MODEL_WORDS, MODELS = 8, 16
NATIVE_MODELS = 8
"""The first models are written by C++, the others by Python."""
WAIT_WORDS, WAITS = 16, 32
NATIVE_WAITS = 16
"""The first waits are written by C++, the others by Python."""
TEXT_BYTES = 384

MODELS_AT = HEADER_WORDS
WAITS_AT = MODELS_AT + MODELS * MODEL_WORDS
WAIT_STRIDE = WAIT_WORDS + TEXT_BYTES // 8
SEQUENCES_AT, SEQUENCES = 16, 8
"""In the header: pairs of a group's :func:`id_of` and the collectives begun in it, plus 1.

They are written as long as the process waits, by Python."""
WORDS = WAITS_AT + WAITS * WAIT_STRIDE


class Header(IntEnum):
    """The words at the beginning of a board."""

    MAGIC = 0
    PID = 1
    BORN = 2
    """When the process began, in the kernel's clock ticks since the boot: a pid may be reused."""
    RANK = 3
    """Its rank in the default group, else in the group that it was first seen in."""
    SEEN = 4
    """When the watcher's thread last ran: a process whose GIL is held for long has an old one."""
    STACK_SIGNAL = 5
    """The signal that has it write its threads' stacks; 0 where there is none."""
    STACK_FILE = 6
    """The descriptor of the file that it writes them to."""
    MAIN_THREAD = 7
    """``threading.main_thread().ident``, as the written stacks have it."""
    ENDING = 8
    """See :class:`Ending`."""
    ISSUER = 9
    """The kernel's number of the thread that began the latest collective."""
    HAND_OVERS = 10
    """How often another thread began a collective than did before: 0 for one thread only."""
    DEADLOCK = 11
    """When the process found itself in a deadlock for certain; 0 if it has not."""
    SCRIPT_THREADS = 12
    """Whether other threads than the main one may begin collectives: 1 if so, while it waits."""


class Ending(IntEnum):
    """Whether the process is about to end."""

    NO = 0
    INTERRUPTED = 1
    """KeyboardInterrupt, or what else a signal handler raised, has ended a wait."""
    EXITING = 2
    """The interpreter is ending."""


class Model(IntEnum):
    """The words of a model: what its reducer has come to."""

    OWNER = 0
    """See :class:`fastddp.comm.labels.Owner`; 0 for a place that is not taken."""
    GROUP = 1
    """See :func:`id_of`."""
    PHASE = 2
    """The number of a phase of a reducer, see ``csrc/core/phase.h``."""
    STEPS = 3
    """Rounds that have ended."""
    LAST_PARAM = 4
    """The index of the parameter that got a gradient last, plus 1; 0 for none in this round."""
    LAUNCHED = 5
    """Collectives that the round under way has launched."""
    CHANGED = 6
    """When the phase changed."""


class Wait(IntEnum):
    """The words of a wait. Its text, for people, comes behind them."""

    SEQUENCE = 0
    """Odd while the wait is being written."""
    SINCE = 1
    """When it began; 0 for a place that is not taken."""
    GROUP = 2
    """See :func:`id_of`; 0 for no group."""
    NUMBER = 3
    """The collective's number in its group; 0 where it is not known."""
    LABEL = 4
    """The model's number times 2**32, plus the bucket's number; see ``csrc/shm/label.h``."""
    THREAD = 5
    """The kernel's number of the thread that waits."""
    SOURCE = 6
    """See :class:`Source`."""
    MISSING = 7
    """Bit i: rank i of the group has not called it, as far as is known; 64 ranks at most."""
    UNFINISHED = 8
    """Bit i: rank i of the group has called it and has not done its part yet."""


class Source(IntEnum):
    """Who writes a wait."""

    SHM = 1
    """A collective in shared memory."""
    BACKWARD = 2
    """A reducer's collective on another transport."""
    NAMED = 3
    """A wait that :class:`fastddp.comm.waiting.waiting` names."""
    OWN_THREAD = 4
    """A collective that another thread of this process carries out."""
    SCRIPT = 5
    """A collective of the script's own, as the watcher finds it in the stack."""


def id_of(group_name: str) -> int:
    """Returns a number for a group's name, the same in every process and both languages.

    It is the 64-bit FNV-1a hash (G. Fowler, L. Noll, K.-P. Vo, "The FNV Non-Cryptographic Hash
    Algorithm") of the name in UTF-8, and never 0.

    Args:
        group_name: the ``group_name`` of a process group; a counterpart has that of its group.
    """
    value = 0xCBF29CE484222325
    for byte in group_name.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value or 1
