"""Warnings come to stderr once, however logging is set up."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest

from fastddp.watch.say import say

LINES = ["fastddp: rank 0 has waited", "  rank 1 has not come"]
TEXT = "\n".join(LINES) + "\n"


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The logger of fastddp, cut off from the handlers of pytest."""
    logger = logging.getLogger("fastddp")
    before, logger.handlers, logger.propagate = logger.handlers, [], False
    yield logger
    logger.handlers, logger.propagate = before, True
    logger.setLevel(logging.NOTSET)


def said(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> str:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        say(LINES)
    return "" if stream.closed else stream.getvalue()


def test_without_a_handler(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "handlers", [])
    assert said(monkeypatch, io.StringIO()) == TEXT


def test_with_a_handler_that_leads_to_stderr(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    logger.addHandler(logging.StreamHandler(stream))
    assert said(monkeypatch, stream) == TEXT


def test_with_a_handler_that_leads_elsewhere(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = io.StringIO()
    logger.addHandler(logging.StreamHandler(elsewhere))
    assert said(monkeypatch, io.StringIO()) == TEXT
    assert elsewhere.getvalue() == TEXT


def test_with_a_level_that_wants_no_warnings(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger.setLevel(logging.ERROR)
    assert said(monkeypatch, io.StringIO()) == ""


def test_with_a_stderr_that_is_closed(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger.addHandler(logging.NullHandler())
    closed = io.StringIO()
    closed.close()
    assert said(monkeypatch, closed) == ""
