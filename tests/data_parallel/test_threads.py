"""Each replica has a thread of its own, which is kept and ends with the object."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import defaultdict

import pytest
import torch
from torch import nn

import fastddp
from fastddp.data_parallel.workers import Workers
from tests.data_parallel.common import FOUR, THREE, TWO, Scale, spread
from tests.models import ConvNet


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("fastddp")}


def test_threads_are_kept_and_each_replica_has_its_own() -> None:
    seen: dict[int, set[int]] = defaultdict(set)
    model = spread(lambda _, x: (seen[int(x[0])].add(threading.get_ident()), x)[1], THREE)
    for _ in range(5):
        model(torch.arange(3))
    assert [len(threads) for threads in seen.values()] == [1, 1, 1]
    assert len(set.union(*seen.values())) == 3
    assert threading.get_ident() not in set.union(*seen.values())


def test_threads_end_with_the_object() -> None:
    before = _threads()
    model = fastddp.DataParallel(Scale(), FOUR)
    assert _threads() <= before, "none until there is work"  # those of earlier tests may end
    model(torch.ones(4)).sum().backward()
    ours = _threads() - before
    assert len(ours) == 4
    del model
    for thread in ours:
        thread.join(timeout=10)
        assert not thread.is_alive()


EXIT = """
import torch, fastddp
model = fastddp.DataParallel(torch.nn.Linear(2, 2), ["cpu", "cpu"])
model(torch.ones(4, 2)).sum().backward()
print("done")
"""


def test_idle_threads_do_not_hold_the_interpreter() -> None:
    command = [sys.executable, "-c", EXIT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_makes_threads_of_its_own() -> None:
    workers = Workers()
    assert workers.run([lambda: 1, lambda: 2], ["", ""]) == [1, 2]
    child = os.fork()
    if child == 0:
        results = workers.run([os.getpid, lambda: 2], ["", ""])
        os._exit(0 if results == [os.getpid(), 2] else 1)
    for _ in range(200):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child waits for threads that are its parent's")
    assert status == 0


def test_several_threads_may_use_one_object() -> None:
    model = fastddp.DataParallel(ConvNet().eval(), THREE)
    batches = [
        torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)
    ]
    want = [model(batch) for batch in batches]
    wrong: list[int] = []

    def use(index: int) -> None:
        torch.set_num_threads(1)
        for _ in range(10):
            if not torch.equal(model(batches[index]), want[index]):
                wrong.append(index)

    threads = [threading.Thread(target=use, args=[index]) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_nested_in_itself() -> None:
    inner = fastddp.DataParallel(Scale(), TWO)
    outer = fastddp.DataParallel(nn.Sequential(inner), TWO)
    for _ in range(2):
        outer.zero_grad()
        outer(torch.arange(8.0)).sum().backward()
        assert inner.module.weight.grad.item() == 28
