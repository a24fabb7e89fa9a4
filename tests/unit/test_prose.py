"""Prose that a reader can follow: argument descriptions say what the argument is, in whole phrases,
and files that documents and docstrings name exist.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Phrases that send the reader elsewhere. As a whole description they say nothing.
EMPTY = r"(?:whose|where|which|its|theirs|what|there|see there|as there|what and when)"
EMPTY_SENTENCE = re.compile(rf"(?:^|[.:]\s+){EMPTY}\.(?=\s|$)", re.IGNORECASE | re.MULTILINE)
# A description that begins with one of these leaves out the noun.
WITHOUT_A_NOUN = re.compile(r"(?:whose|where|which|its|theirs|see there|as there)\b", re.IGNORECASE)
LEAST_WORDS = 3
# "is no tuple", for "is not a tuple". What follows "there is no" or "is no longer" is right.
NO_FOR_NOT_A = re.compile(r"(?<!there )\b(?:is|are) no (?!longer\b)\w+", re.IGNORECASE)

SECTION = re.compile(
    r"^(?P<indent> *)(?:Args|Attributes):\n(?P<body>(?:(?P=indent) +.*\n|\n)*)", re.M
)
ENTRY = re.compile(r"^(?P<indent> +)(?P<names>[*\w`, ]+): (?P<text>.*(?:\n(?P=indent) +.*)*)", re.M)

DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")))
FOLDERS = ("fastddp", "csrc", "tests", "benchmarks", "examples", "docs")
FILE = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w/.*-]+|[\w/.*-]+\.(?:py|pyi|cpp|cu|h|md|jsonl)")


def descriptions(docstring: str) -> Iterator[tuple[str, str]]:
    """Yields the name and the description of each argument and attribute in a docstring."""
    for section in SECTION.finditer(f"{cleandoc(docstring)}\n"):
        for entry in ENTRY.finditer(section["body"]):
            yield entry["names"], " ".join(entry["text"].split())


def problems_of_docstring(docstring: str) -> Iterator[str]:
    """Yields the phrases of a docstring that say nothing, and those that are not English."""
    for found in EMPTY_SENTENCE.finditer(cleandoc(docstring)):
        yield f"an empty phrase, {found[0].strip()!r}"
    for found in NO_FOR_NOT_A.finditer(" ".join(docstring.split())):
        yield f"{found[0]!r} in place of 'not a'"
    for name, text in descriptions(docstring):
        sentence = re.split(r"[.;](?:\s|$)", text)[0]
        if len(sentence.split()) < LEAST_WORDS:
            yield f"{name}: {sentence!r} has fewer than {LEAST_WORDS} words"
        elif WITHOUT_A_NOUN.match(sentence):
            yield f"{name}: {sentence!r} does not name the thing"


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yields the line and the text of each string that stands alone as a statement."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            text = node.value.value
            if isinstance(text, str):
                yield node.lineno, text


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yields the first line and the text of each block of `//` comments in C++."""
    blocks = re.finditer(r"(?:^[ \t]*//.*\n)+|//.*\n", source, re.MULTILINE)
    for block in blocks:
        text = re.sub(r"^[ \t]*//+ ?", "", block[0], flags=re.MULTILINE)
        yield source.count("\n", 0, block.start()) + 1, text


def problems(path: Path) -> Iterator[str]:
    """Yields what is wrong in a file of Python or C++, with its line."""
    source = path.read_text()
    if path.suffix in (".py", ".pyi"):
        for line, text in docstrings(source):
            yield from (f"{path}:{line}: {problem}" for problem in problems_of_docstring(text))
    else:
        for line, text in comments(source):
            for found in EMPTY_SENTENCE.finditer(text):
                yield f"{path}:{line}: an empty phrase, {found[0].strip()!r}"
            for found in NO_FOR_NOT_A.finditer(" ".join(text.split())):
                yield f"{path}:{line}: {found[0]!r} in place of 'not a'"


def sources(place: Path) -> list[Path]:
    """Lists the files of Python and C++ in a folder, or the one file that the place is."""
    kinds = {".py", ".pyi", ".h", ".cpp", ".cu"}
    return sorted(p for p in (place, *place.rglob("*")) if p.is_file() and p.suffix in kinds)


@pytest.mark.parametrize("folder", ["fastddp", "csrc", "benchmarks", "examples"])
def test_descriptions_are_whole_phrases(folder: str) -> None:
    files = list(sources(ROOT / folder))
    assert files
    assert [problem for path in files for problem in problems(path)] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('"""Does it.\n\nArgs:\n    module: whose.\n"""', "an empty phrase, ': whose.'"),
        ('"""Does it.\n\n    Args:\n        group: where. Not kept alive.\n    """', ": where."),
        ('class A:\n    """B.\n\n    Attributes:\n        rank: which.\n    """', ": which."),
        ('"""Does it.\n\nRaises:\n    ValueError, TypeError: as there.\n"""', ": as there."),
        ('"""See there. There is nothing to do."""', "See there."),
        (
            '"""What is no\ntuple. There is no limit, and it is no longer needed."""',
            "'is no tuple'",
        ),
        ('"""Does it.\n\nArgs:\n    scale: a factor.\n"""', "scale: 'a factor' has fewer than 3"),
        ('"""Does it.\n\nArgs:\n    a: the first one.\n    b: where it goes on.\n"""', "b: 'where"),
    ],
)
def test_an_empty_description_is_found(tmp_path: Path, text: str, found: str) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(text)
    assert any(found in problem for problem in problems(planted))


def test_an_empty_comment_is_found(tmp_path: Path) -> None:
    planted = tmp_path / "planted.h"
    planted.write_text("int a;  // the group's size\n// Takes a group:\n// as there.\nint b;\n")
    (problem,) = problems(planted)
    assert problem.startswith(f"{planted}:2: an empty phrase")


def names_of_files(text: str) -> Iterator[str]:
    """Yields the files and folders that a text names in backticks, but for code blocks."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for quoted in re.findall(r"`+([^`\n]+)`+", text):
        if FILE.fullmatch(quoted):
            yield quoted


def exists(name: str, beside: Path) -> bool:
    """Returns whether a name is that of a file, in full or from any folder of the repository on."""
    if any(True for _ in beside.glob(name)) or any(True for _ in ROOT.glob(name)):
        return True
    return any(True for folder in FOLDERS for _ in (ROOT / folder).rglob(name))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_documents_name_exist(document: str) -> None:
    path = ROOT / document
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    gone = [link for link in links if not (path.parent / link).exists()]
    gone += [name for name in names_of_files(text) if not exists(name, path.parent)]
    assert gone == []


def test_files_that_docstrings_name_exist() -> None:
    named = [
        (path, name)
        for folder in ("fastddp", "benchmarks", "examples")
        for path in sources(ROOT / folder)
        if path.suffix == ".py"
        for _, text in docstrings(path.read_text())
        for name in names_of_files(text)
    ]
    assert len(named) > 10
    assert [(path.name, name) for path, name in named if not exists(name, path.parent)] == []


def test_the_table_of_environment_variables_is_complete() -> None:
    files = [ROOT / "setup.py", *sources(ROOT / "fastddp"), *sources(ROOT / "tests")]
    texts = [path.read_text() for path in files if path.suffix == ".py"]
    read = {name for text in texts for name in re.findall(r"\"(FASTDDP_[A-Z_]+)\"", text)}
    assert "FASTDDP_ENGINE" in read
    table = set(re.findall(r"`(FASTDDP_[A-Z_]+)`", (ROOT / "docs/environment.md").read_text()))
    assert read == table


def test_a_file_that_is_gone_is_found() -> None:
    text = (
        "`csrc/core/gone.h`, `tests/gone`, `test_prose.py` and `python gone.py`\n```\n`gone.h`\n```"
    )
    gone = [name for name in names_of_files(text) if not exists(name, ROOT)]
    assert gone == ["csrc/core/gone.h", "tests/gone"]
