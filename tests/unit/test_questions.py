"""Questions to ranks of other hosts, through a store."""

from __future__ import annotations

import torch.distributed as dist

from fastddp.watch.questions import Questions


def test_a_question_is_answered_once() -> None:
    store = dist.HashStore()
    first, second = Questions(0), Questions(1)
    first.ask(store, [1])
    second.answer(store, lambda: "SLEEPS at a.py:1")
    second.answer(store, lambda: "never asked for")
    first.ask(store, [1])
    assert first.answers == {1: "SLEEPS at a.py:1"}


def test_each_of_several_who_ask_has_the_answer() -> None:
    store = dist.HashStore()
    asking = [Questions(0), Questions(2), Questions(3)]
    answering = Questions(1)
    for one in asking:
        one.ask(store, [1])
    answering.answer(store, lambda: "SLEEPS at a.py:1")
    for one in asking:
        one.ask(store, [1])
        assert one.answers == {1: "SLEEPS at a.py:1"}


def test_an_old_answer_is_not_taken_for_a_new_one() -> None:
    store = dist.HashStore()
    first, second = Questions(0), Questions(1)
    for what in ("SLEEPS at a.py:1", "SLEEPS at a.py:2"):
        for _ in range(2):
            first.ask(store, [1], about=what)
            assert first.answers == {}
        second.answer(store, lambda what=what: what)
        first.ask(store, [1], about=what)
        assert first.answers == {1: what}
    first.ask(store, [], about=what)
    assert first.answers == {}
