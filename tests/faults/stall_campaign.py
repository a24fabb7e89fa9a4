"""Runs of the campaign of stalls: how one is chosen, carried out, and judged."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.holdings import shared_files_of
from tests.faults.stall_programs import PAUSE_S, STEPS, Fault, Run, be_rank, outcome
from tests.ranks import RankFailed, init_group, run_ranks

TRANSPORTS = ("shm", "gloo", "hosts")
DEATH_IS_TOLD_WITHIN_S = 5.0
DEADLOCK_ENDS_WITHIN_S = 12.0
"""After the threshold of 1 s; generous, because the machine has other work."""

SLOW = r"rank {v} waits for something that is not a collective"
LOOP = r"rank {v} (has )?left the training loop"
CAUSES = {
    Fault.SLOW_INPUT: r"the input of rank {v} is slow",
    Fault.SLOW_WORKER: r"the input of rank {v} is slow",
    Fault.SLEEP: SLOW,
    Fault.SLOW_RANK: SLOW,
    Fault.SLOW_SAVE: SLOW,
    Fault.LATE_START: rf"{SLOW}|rank {{v}} is slow, or does not call the same",
    Fault.HOLDS_LOCK: r"a call on rank {v} does not return",
    Fault.STOP: r"rank {v} was stopped from outside",
}
DEATHS = (
    Fault.KILL,
    Fault.INTERRUPT,
    Fault.DIES_EARLY,
    Fault.EXCEPTION,
    Fault.DISK_FULL,
    Fault.LEAVES,
)
DEADLOCKS = {
    Fault.LEAVES_TO_BARRIER: LOOP,
    Fault.LEAVES_TO_ALL_REDUCE: LOOP,
    Fault.LEAVES_TO_GATHER: LOOP,
    Fault.EXTRA: r"rank {v} is alone in calling|rank {v} has left .*, or is alone in calling",
    Fault.SKIPS: rf"rank {{v}} has begun another forward|{LOOP}",
    Fault.NO_BACKWARD: rf"rank {{v}} has begun another forward|{LOOP}",
    Fault.BRANCH: r"the ranks run (backwards of )?different models",
}
SIGNALS = {
    Fault.STOP: signal.SIGSTOP,
    Fault.FREEZE: signal.SIGSTOP,
    Fault.KILL: signal.SIGKILL,
    Fault.INTERRUPT: signal.SIGINT,
}
MIXES_ON_GLOO = (Fault.LEAVES_TO_ALL_REDUCE, Fault.EXTRA, Fault.LEAVES_TO_GATHER)
"""There the script's collective is taken for a part of the model's, and gloo ends the process."""
FAR = r"rank {v} is slow, or does not call the same collectives"
"""What is said of a rank on another host."""


@dataclass
class Seen:
    """What came of a run."""

    lines: dict[int, list[str]] = field(default_factory=dict)
    """What each rank has printed."""
    errors: dict[int, str] = field(default_factory=dict)
    """What each rank that could say so has ended with; empty if with nothing."""
    told_s: dict[int, float] = field(default_factory=dict)
    """When it ended, in seconds after the fault."""
    wrong: list[str] = field(default_factory=list)
    """What is not as it should be."""

    def said(self) -> list[str]:
        """Returns what all ranks have printed."""
        return [line for lines in self.lines.values() for line in lines]


def choose(seed: int, fault: Fault | None = None, transport: str | None = None) -> Run:
    """Returns the run that belongs to a seed."""
    rng = random.Random(seed)
    fault = fault or list(Fault)[seed % len(Fault)]
    transport = transport or TRANSPORTS[seed // len(Fault) % len(TRANSPORTS)]
    world_size = rng.choice([2, 3, 4] if transport != "hosts" else [2, 4])
    hosts = "a" * world_size if transport != "hosts" else "abab"[:world_size]
    return Run(
        seed=seed,
        fault=fault,
        transport=transport,
        engine=rng.choice(["native", "python"]),
        hosts=hosts,
        victim=0 if fault is Fault.DISK_FULL else rng.randrange(world_size),
        # A signal comes some steps later.
        step=rng.randrange(3, STEPS - (14 if fault in SIGNALS else 4)),
        buffers=rng.random() < 0.4,
        seconds=3.2 if fault is Fault.HOLDS_LOCK else 1.0,
        delay_s=0.1 * rng.random(),
    )


def carry_out(run: Run, keep: Path | None = None) -> Seen:
    """Runs the script on all ranks, and judges what came of it."""
    with tempfile.TemporaryDirectory(prefix="campaign-") as name:
        folder, scratch = Path(name), Path(name, "tmp")
        scratch.mkdir()
        env = {
            "FASTDDP_STALL_SECONDS": str(run.seconds),
            "FASTDDP_SHM": str(int(run.transport != "gloo")),
            "CAMPAIGN_FOLDER": name,
            "TMPDIR": str(scratch),
        }
        over = threading.Event()
        signals = threading.Thread(target=_send_signals, args=(run, folder, over))
        signals.start()
        seen = Seen()
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                timeout_s = 20 if run.transport == "hosts" and run.fault in DEADLOCKS else 45
                run_ranks(
                    _alone,
                    run.world_size,
                    run,
                    timeout_s,
                    env=env,
                    timeout=60,
                    expect_dead=range(run.world_size),
                    init_group=False,
                )
        except RankFailed as failed:
            seen.wrong.append(f"failed: {str(failed)[:3000]}")
        finally:
            over.set()
            signals.join()
        _read(run, folder, seen)
        pids = [int(path.read_text()) for path in folder.glob("pid-*")]
        if left := [*map(str, scratch.iterdir()), *shared_files_of(pids)]:
            seen.wrong.append(f"left behind: {left}")
    _judge(run, seen)
    return seen


def _alone(rank: int, world_size: int, run: Run, timeout_s: float) -> None:
    """Is a rank whose output is in a file of its own."""
    init_group(timeout_s=timeout_s)
    folder = Path(os.environ["CAMPAIGN_FOLDER"])
    output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    be_rank(rank, world_size, run)


def _send_signals(run: Run, folder: Path, over: threading.Event) -> None:
    number = SIGNALS.get(run.fault)
    if number is None:
        return
    while not (folder / "fault").exists():
        if over.wait(0.01):
            return
    pid = json.loads((folder / "fault").read_text())["pid"]
    time.sleep(run.delay_s)
    pids = [pid]
    if run.fault is Fault.FREEZE:
        pids = [int((folder / f"pid-{rank}").read_text()) for rank in range(run.world_size)]
    for pid in pids:
        os.kill(pid, number)
    if number == signal.SIGSTOP:
        time.sleep(PAUSE_S + (2 if run.fault is Fault.FREEZE else 0))
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _read(run: Run, folder: Path, seen: Seen) -> None:
    fault = folder / "fault"
    began = json.loads(fault.read_text())["at"] if fault.exists() else 0.0
    if not began and (run.fault in DEATHS or run.fault in DEADLOCKS or run.fault is Fault.STOP):
        seen.wrong.append("the fault did not come")
    for rank in range(run.world_size):
        output = folder / f"output-{rank}"
        seen.lines[rank] = output.read_text().splitlines() if output.exists() else []
        if (end := outcome(folder, rank)) is not None:
            seen.errors[rank] = end["error"]
            seen.told_s[rank] = end["at"] - began


# ---- what should have come of it -----------------------------------------------------------------


def _judge(run: Run, seen: Seen) -> None:
    survivors = [rank for rank in range(run.world_size) if rank != run.victim]
    said = seen.said()
    wrong = seen.wrong
    if run.fault in CAUSES:
        wrong += _of_stall(run, seen)
        wrong += [f"rank {r}: {error}" for r, error in seen.errors.items() if error]
        wrong += [f"rank {r} said nothing" for r in range(run.world_size) if r not in seen.errors]
    elif run.fault in DEATHS:
        for rank in survivors:
            if not seen.errors.get(rank):
                wrong.append(f"rank {rank} has no error")
            elif seen.told_s[rank] > DEATH_IS_TOLD_WITHIN_S:
                wrong.append(f"rank {rank} was told after {seen.told_s[rank]:.1f} s")
        likely = [line for line in said if "likely:" in line]
        right = rf"rank {run.victim} (has died|left the training loop|has ended)"
        wrong += [line for line in likely if not re.search(right, line)]
        wrong += [line for line in said if "is over after" in line]
    elif run.fault in DEADLOCKS:
        wrong += _of_deadlock(run, seen, survivors)
    else:
        wrong += [f"said: {line}" for line in said]
        wrong += [f"rank {r}: {error}" for r, error in seen.errors.items() if error]
        wrong += [f"rank {r} did not end" for r in range(run.world_size) if r not in seen.errors]


def _of_stall(run: Run, seen: Seen) -> list[str]:
    wrong = []
    first = {
        r: [line for line in lines if "has waited for" in line] for r, lines in seen.lines.items()
    }
    tellers = [r for r, lines in first.items() if lines]
    if not tellers or len({run.hosts[r] for r in tellers}) != len(tellers):  # one on each host
        return [f"told by {tellers}"]
    lines = seen.lines[tellers[0]]
    likely = [line for line in lines if "likely: " in line]
    right = CAUSES[run.fault]
    if run.transport == "hosts" and run.hosts[run.victim] != run.hosts[tellers[0]]:
        right += "|" + FAR
    right = right.format(v=run.victim)
    wrong += [f"cause: {line}" for line in likely if not re.search(right, line)]
    if len(likely) != len(first[tellers[0]]):
        wrong.append("a verdict without a cause")
    if not any(re.search(rf"rank {run.victim} has not come", line) for line in lines):
        wrong.append("the rank is not named")
    times = [float(re.findall(r"for ([\d.]+) s", line)[0]) for line in first[tellers[0]]]
    stalls = 2 if run.fault is Fault.SLOW_RANK else 1
    begun = [t for t in times if t < 2 * run.seconds]
    if not begun:  # as it is for ranks of which nothing is known
        begun = [t for t in times if t < 4 * run.seconds]
    if run.transport == "hosts":  # the second one may be over before there is an answer
        stalls = min(stalls, len(begun) or 1)
    if len(begun) != stalls:
        wrong.append(f"{len(begun)} verdicts begin a stall: {times}")
    ends = [line for line in lines if "is over after" in line]
    if len(ends) != stalls or not all(f"; rank {run.victim} came last" in end for end in ends):
        wrong.append(f"ends: {ends}")
    known = re.compile(r"fastddp: |  (waiting too|rank|ranks|likely|not there)")
    wrong += [f"said: {ln}" for own in seen.lines.values() for ln in own if not known.match(ln)]
    return wrong


def _of_deadlock(run: Run, seen: Seen, survivors: list[int]) -> list[str]:
    if run.transport != "shm" and run.fault in MIXES_ON_GLOO and run.victim not in seen.errors:
        return [f"rank {rank} has no error" for rank in survivors if not seen.errors.get(rank)]
    if run.transport == "hosts":
        return _of_deadlock_between_hosts(run, seen)
    wrong = []
    right = DEADLOCKS[run.fault].format(v=run.victim)
    for rank in survivors:
        error = seen.errors.get(rank)
        if not error:
            wrong.append(f"rank {rank} has no error")
        elif "the ranks do not agree: " in error:
            continue  # in shared memory that is seen at once where both are in the same group
        elif "none of them can ever go on" not in error:
            wrong.append(f"rank {rank} has another error: {error}")
        elif not re.search(right, error):
            wrong.append(f"rank {rank} has another cause: {error}")
        elif seen.told_s[rank] > DEADLOCK_ENDS_WITHIN_S:
            wrong.append(f"rank {rank} was told after {seen.told_s[rank]:.1f} s")
    return wrong


def _of_deadlock_between_hosts(run: Run, seen: Seen) -> list[str]:
    """It is told, and ends with the timeout of the group."""
    said = seen.said()
    wrong = [f"rank {r} has no error" for r in range(run.world_size) if not seen.errors.get(r)]
    if not any("likely: " in line for line in said):
        wrong.append("nothing is told")
    if not any(f"rank {run.victim} has" in line for line in said):
        wrong.append("the rank is not named")
    return wrong


def main(arguments: list[str]) -> None:
    """Tries many runs and prints what is wrong: first and last seed, then faults and transports."""
    first, last = int(arguments[0]), int(arguments[1])
    faults = [Fault[name] for name in arguments[2:] if name in Fault.__members__]
    transports = [name for name in arguments[2:] if name in TRANSPORTS]
    for seed in range(first, last):
        fault = faults[seed % len(faults)] if faults else None
        which = transports[seed // 3 % len(transports)] if transports else None
        run = choose(seed, fault, which)
        seen = carry_out(run)
        print(
            f"{'WRONG' if seen.wrong else 'right'} {run.seed} {run.fault.name} {run.transport}"
            f" {run.engine} {run.world_size} v={run.victim} step={run.step} buffers={run.buffers}"
            f" told={ {r: round(s, 1) for r, s in seen.told_s.items()} }",
            flush=True,
        )
        if seen.wrong or os.environ.get("CAMPAIGN_SHOW"):
            for line in seen.wrong:
                print("    ", line)
            for rank, lines in seen.lines.items():
                print(*(f"       {rank}| {line}" for line in lines), sep="\n")
            for rank, error in seen.errors.items():
                print(f"       {rank}! {error}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
