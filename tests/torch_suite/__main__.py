"""Judge torch's own class too: `python -m tests.torch_suite [NAME ...]`.

Runs tests with torch's class and with both engines, all that this torch has unless some are named,
and prints an outcome for each. A test is worth listing as passed or different only if torch's own
class passes it. Takes a quarter of an hour.
"""

from __future__ import annotations

import sys

from tests.ranks import RankFailed, run_ranks
from tests.torch_suite import judge
from tests.torch_suite.expected import DIFFERENT, NOT_RUN, PASSES, world_size


def main(names: list[str]) -> None:
    with_rpc = [name for name in (*PASSES, *DIFFERENT, *NOT_RUN) if "." in name]
    for name in names or [*run_ranks(judge.tests_of_ddp, 1, init_group=False)[0], *with_rpc]:
        for subject in ("torch", "native", "python"):
            print(f"{name} {subject}: {outcome(name, subject)}", flush=True)


def outcome(name: str, subject: str) -> str:
    try:
        values = run_ranks(
            judge.run_test, world_size(name), name, subject, init_group="." not in name
        )
    except RankFailed as failure:
        return f"{failure.reason} {failure.error_type}"
    return ", ".join(sorted(set(values)))


if __name__ == "__main__":
    main(sys.argv[1:])
