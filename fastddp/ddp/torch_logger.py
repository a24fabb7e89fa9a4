"""What scripts and tools call on the logger of torch's class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class TorchLogger:
    """The methods of torch's logger, for the wrapper's own entries of the logging data.

    Args:
        wrapper: the wrapper that has the entries.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper

    def set_error_and_log(self, error: str) -> None:
        """Has the logging data say that there was an error, and the latest one's text."""
        self._wrapper._logged |= {"has_error": 1, "error": error}

    def _set_comm_hook_name(self, comm_hook: str) -> None:
        self._wrapper._logged["comm_hook"] = comm_hook

    def _set_uneven_input_join(self) -> None:
        self._wrapper._logged["join_uneven_inputs"] = 1

    def _set_static_graph(self) -> None:
        self._wrapper._set_static_graph()

    def set_runtime_stats_and_log(self) -> None:
        """Nothing to set: that is done before each forward."""

    def _get_ddp_logging_data(self) -> LoggingData:
        return LoggingData(self._wrapper._get_ddp_logging_data())


class LoggingData:
    """The logging data in the shape in which torch's logger has it.

    Args:
        entries: the logging data by name, as torch's class returns it.
    """

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self.strs_map = {name: value for name, value in entries.items() if isinstance(value, str)}
        self.ints_map = {
            name: value for name, value in entries.items() if name not in self.strs_map
        }
