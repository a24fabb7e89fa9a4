"""How many collectives this process has begun in a group, as the group itself counts."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import distributed_c10d

_c10d: Any = distributed_c10d


def sequence_of(group_name: str) -> int | None:
    """Returns how many collectives were begun in a group, on all of its devices together.

    To be called while the main thread waits: it might otherwise destroy the group meanwhile, and
    this thread would be the last one to have it.

    Args:
        group_name: the ``group_name`` of the process group.

    Returns:
        None for a group that is not known, or does not count.
    """
    try:
        group = _c10d._resolve_process_group(group_name)
        # A group of several backends, such as that of init_process_group(None), has no count.
        found = [group._get_backend(torch.device(device)) for device in group._device_types]
        backends = {id(backend): backend for backend in found}
        return sum(int(each._get_sequence_number_for_group()) for each in backends.values())
    except (RuntimeError, AttributeError, TypeError, ValueError, KeyError):
        return None
