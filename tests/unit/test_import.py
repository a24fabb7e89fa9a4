"""`import fastddp` is silent and cheap: what it costs beyond `import torch` is seen here."""

from __future__ import annotations

import subprocess
import sys

PROBE = """
import sys
import torch
before = set(sys.modules)
import fastddp
new = set(sys.modules) - before
heavy = ("torch._dynamo", "torch._inductor", "sympy", "fastddp._C", "fastddp._build_info")
assert "fastddp" in new, "the probe saw nothing"
assert not [m for m in new if m.startswith(heavy)], sorted(new)
assert not torch.cuda.is_initialized(), "a device was opened"
assert not torch.distributed.is_initialized(), "a process group was made"
"""


def test_import_does_nothing_but_import() -> None:
    command = [sys.executable, "-W", "error", "-c", PROBE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
