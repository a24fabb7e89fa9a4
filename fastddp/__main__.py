"""The command line: ``python -m fastddp`` and ``python -m fastddp report DIRECTORY``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastddp.installed import info
from fastddp.timeline.command import write_report


def main() -> None:
    """Prints :func:`fastddp.info`, or the report of a run."""
    parser = argparse.ArgumentParser(
        prog="python -m fastddp",
        description="Prints what is installed here and what fastddp.wrap would choose.",
    )
    commands = parser.add_subparsers(dest="command")
    report = commands.add_parser(
        "report",
        help="tell where the time of a run's steps went",
        description="Reads what the ranks of a run have recorded (FASTDDP_TRACE), prints where the"
        " time of their steps went, and writes trace.json, timeline.png and report.html.",
    )
    report.add_argument("directory", type=Path, help="the directory that FASTDDP_TRACE named")
    arguments = parser.parse_args()
    if arguments.command is None:
        print(info())
        return
    try:
        print(write_report(arguments.directory))
    except OSError as error:
        sys.exit(f"fastddp: {error}")


if __name__ == "__main__":
    main()
