"""`import fastddp` is silent and cheap: what it costs beyond `import torch`, and what docstrings
refer to, is seen here.
"""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import fastddp

REFERENCE = re.compile(r":(?:mod|class|func|meth|attr):`~?(fastddp[\w.]*)`")
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


def test_what_docstrings_refer_to_exists() -> None:
    package = Path(fastddp.__file__).parent
    texts = {path: path.read_text() for path in sorted(package.rglob("*.py"))}
    named = [(path, name) for path, text in texts.items() for name in REFERENCE.findall(text)]
    assert len(named) > 30
    assert [(path.name, name) for path, name in named if not exists(name)] == []


def exists(name: str) -> bool:
    """Returns whether there is a module, or something in one, of a name such as `fastddp.wrap`.

    A module that imports a package that is not installed here, such as Lightning, is read.
    """
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return is_written(name)
    return True


def is_written(name: str) -> bool:
    """Returns whether `name` is a module's, or that of a class or function that a file defines."""
    *parents, last = name.split(".")[1:]
    folder = Path(fastddp.__file__).parent
    if (folder.joinpath(*parents) / f"{last}.py").exists():
        return True
    source = folder.joinpath(*parents).with_suffix(".py")
    return source.exists() and any(
        isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == last
        for node in ast.parse(source.read_text()).body
    )
