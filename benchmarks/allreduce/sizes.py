"""Sizes with units, as in a command line."""

from __future__ import annotations

import argparse
import re

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def size_bytes(text: str) -> int:
    """Returns a size such as `25MiB` in bytes."""
    match = re.fullmatch(r"(\d+)(B|KiB|MiB|GiB)", text)
    if match is None or int(match[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 64KiB or 25MiB")
    return int(match[1]) * UNITS[match[2]]


def size(text: str) -> str:
    size_bytes(text)
    return text
