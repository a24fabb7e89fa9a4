"""What a stack tells of the script: the place, a breakpoint, a collective that it is in."""

from __future__ import annotations

import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch

from fastddp.watch import stack
from fastddp.watch.stack import Frame
from tests.unit.forks import Forks

STDLIB = sysconfig.get_path("stdlib")
TORCH = Path(torch.__file__).parent
PACKAGES = sysconfig.get_path("purelib")
OURS = Path(stack.__file__).parents[1]

SCRIPT = Frame("/home/someone/train.py", 22, "main")
WAITS = Frame(f"{STDLIB}/threading.py", 324, "wait")
BACKWARD = Frame(f"{TORCH}/_tensor.py", 500, "backward")
REDUCER = Frame(f"{OURS}/engine/python/reducer.py", 9, "wait")
TRAINER = Frame(f"{PACKAGES}/lightning/trainer.py", 70, "fit")
IMPORTS = Frame("<frozen importlib._bootstrap>", 1, "_find")
GENERATED = Frame("<string>", 3, "__init__")
TYPED = Frame("<stdin>", 1, "<module>")
CELL = Frame("/tmp/ipykernel_77/1234.py", 5, "<module>")
ELSEWHERE = Frame("/opt/conda/lib/python3.12/socket.py", 5, "accept")
DEBIAN = Frame("/usr/lib/python3/dist-packages/numpy/core.py", 5, "dot")
INDUCTOR = Frame("/tmp/torchinductor_someone/ab/cabc.py", 90, "call")
COMPILED = Frame("<eval_with_key>.7", 5, "forward")


@pytest.mark.parametrize(
    ("frames", "place"),
    [
        ([WAITS, REDUCER, BACKWARD, SCRIPT], SCRIPT),
        ([SCRIPT, TRAINER, Frame("/home/someone/run.py", 1, "<module>")], SCRIPT),
        ([ELSEWHERE, DEBIAN, IMPORTS, COMPILED, TRAINER, SCRIPT], SCRIPT),
        ([Frame("train.py", 2, "f"), BACKWARD], Frame("train.py", 2, "f")),
        ([GENERATED, SCRIPT], SCRIPT),
        ([BACKWARD, GENERATED], GENERATED),
        ([BACKWARD, TYPED], TYPED),
        ([WAITS, CELL, TRAINER], CELL),
        ([INDUCTOR, COMPILED, BACKWARD, SCRIPT], SCRIPT),
        ([WAITS, BACKWARD, TRAINER, REDUCER], TRAINER),
        ([WAITS, BACKWARD], WAITS),
        ([], None),
    ],
)
def test_place_in_script(frames: list[Frame], place: Frame | None) -> None:
    assert stack.place_in_script(frames) == place


def test_a_frame_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "removed"
    folder.mkdir()
    monkeypatch.chdir(folder)
    frame = Frame(f"{folder}/sub/train.py", 3, "main")
    assert str(frame) == "sub/train.py:3 in main"
    assert str(SCRIPT) == "/home/someone/train.py:22 in main"
    folder.rmdir()
    assert str(frame) == f"{folder}/sub/train.py:3 in main"


PDB = Frame(f"{STDLIB}/pdb.py", 300, "interaction")
BDB = Frame(f"{STDLIB}/bdb.py", 600, "run")
PYDEVD = Frame(f"{PACKAGES}/debugpy/_vendored/pydevd/pydevd.py", 2000, "_do_wait_suspend")
IPDB = Frame(f"{PACKAGES}/IPython/core/debugger.py", 10, "cmdloop")
OTHERS = Frame(f"{TORCH}/distributed/__init__.py", 140, "breakpoint")
BARRIER = Frame(f"{TORCH}/distributed/distributed_c10d.py", 5000, "barrier")


@pytest.mark.parametrize(
    ("frames", "is_at_one"),
    [
        ([Frame(f"{STDLIB}/cmd.py", 126, "cmdloop"), PDB, BDB, SCRIPT], True),
        ([PDB, BDB, BACKWARD, SCRIPT], True),
        ([WAITS, PYDEVD, SCRIPT, PYDEVD], True),
        ([IPDB, SCRIPT], True),
        ([BARRIER, OTHERS, SCRIPT], True),
        ([BARRIER, SCRIPT], False),
        ([WAITS, SCRIPT, BDB, PDB], False),  # python -m pdb train.py
        ([BACKWARD, GENERATED, PYDEVD], False),
        ([Frame("/home/someone/pdb/train.py", 1, "main")], False),
        ([], False),
    ],
)
def test_is_at_breakpoint(frames: list[Frame], is_at_one: bool) -> None:
    assert stack.is_at_breakpoint(frames) is is_at_one


@pytest.mark.parametrize(
    ("line", "asks"),
    [
        ("answer = input('Go on? ')", True),
        ("breakpoint()", True),
        ("for line in sys.stdin:", True),
        ("loss = model.input(x)", False),
        ("x = make_input(y)", False),
        ("train(input=x)", False),
    ],
)
def test_a_line_that_reads_from_the_terminal(tmp_path: Path, line: str, asks: bool) -> None:
    path = tmp_path / "train.py"
    path.write_text(f"import sys\n{line}\n")
    frame = Frame(str(path), 2, "main")
    assert stack.is_at_breakpoint([frame]) is asks
    assert not stack.is_at_breakpoint([WAITS, frame])


@pytest.mark.skipif(sys.platform != "linux", reason="stacks are read through /proc")
@pytest.mark.parametrize("stops", ["breakpoint()", "input()"])
def test_a_real_process_that_waits_for_a_person(children: Forks, stops: str) -> None:
    path = children.start(f"""
import os, sys
let_ask()
sys.stdin, sys.stdout = os.fdopen(os.pipe()[0]), open(os.devnull, "w")
{stops}
pass
""")
    asked = children.read_asked()
    deadline = time.monotonic() + 60.0
    while not stack.is_at_breakpoint(frames := stack.ask(*asked, patience_s=60.0)):
        assert time.monotonic() < deadline, frames
    place = stack.place_in_script(frames)
    assert place is not None
    assert place.file == path


COUNTED = 5
RANK = """
import pathlib, threading, time
from datetime import timedelta
import torch, torch.distributed as dist
from fastddp.watch import stack

rank, folder = {rank}, pathlib.Path({folder!r})
dist.init_process_group("gloo", init_method=f"file://{{folder}}/store", rank=rank, world_size=2)
pair = dist.new_group([0, 1])
ones, objects = torch.ones(2), [None, None]
COUNTED = {counted}
calls = [
    lambda: dist.barrier(),
    lambda: dist.barrier(),
    lambda: dist.barrier(pair),
    lambda: dist.all_reduce(ones, group=pair),
    lambda: dist.all_gather_object(objects, "something"),
    lambda: dist.monitored_barrier(timeout=timedelta(seconds=100)),
    lambda: dist.broadcast(ones, 1),
    lambda: dist.all_reduce(ones, async_op=True).wait(),
    lambda: sleep(),
]

def sleep():
    while rank == 0 and not (folder / str(len(calls) - 1)).exists():
        time.sleep(0.01)

def watch():
    for i in range(len(calls)):
        while len(begun) <= i:
            time.sleep(0.01)
        found = []
        while len(found) < 20 or (call is None and i < COUNTED):  # the same one many times
            time.sleep(0.005)
            call = stack.collective_of_script()
            found = [call] if found and call != found[-1] else [*found, call]
        names = {{dist.group.WORLD.group_name: "default", pair.group_name: "pair"}}
        tell(*([call.call, names[call.group_name], call.frame_key] if call else [None]))
        (folder / str(i)).touch()

begun = []
if rank == 0:
    threading.Thread(target=watch, daemon=True).start()
for i, call in enumerate(calls):
    while rank == 1 and not (folder / str(i)).exists():
        time.sleep(0.01)
    begun.append(i)
    call()
sleep()
dist.destroy_process_group()
"""


def test_collective_of_the_script(children: Forks, tmp_path: Path) -> None:
    for rank in range(2):
        children.start(RANK.format(rank=rank, counted=COUNTED, folder=str(tmp_path)))
    told = [children.read() for _ in range(9)]
    keys = [key for _, _, key in told[:COUNTED]]
    assert [call[:2] for call in told[:COUNTED]] == [
        ["barrier", "default"],
        ["barrier", "default"],
        ["barrier", "pair"],
        ["all_reduce", "pair"],
        ["all_gather_object", "default"],
    ]
    assert told[COUNTED:] == [[None]] * 4
    assert len(set(keys)) == len(keys)


def test_there_is_no_collective_here() -> None:
    assert stack.collective_of_script() is None
