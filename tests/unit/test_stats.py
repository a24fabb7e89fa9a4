"""What `stats()` returns, as people and as programs read it."""

from __future__ import annotations

import dataclasses

import pytest

from fastddp.engine.stats import Stats

SOME = Stats(
    rounds=4,
    wait_us_total=12_345.0,
    wait_us_last=2_000.0,
    bytes_per_round=3 << 20,
    num_buckets=2,
    overlaps=False,
    began_ns=1,
    backward_us_last=750.0,
    comm_us_last=1_500_000.0,
    unused_bytes_last=2048,
    is_static=False,
)


def test_it_prints_as_lines_with_units() -> None:
    assert str(SOME).splitlines() == [
        "4 synchronised backwards",
        "  buckets               2, 3 MiB in all, launched at the end of backward",
        "  waiting               3.09 ms per backward, 12.3 ms in all",
        "  latest backward       750 us, then 2 ms of waiting",
        "  latest communication  1.5 s from first launch to last result",
        "  unused parameters     2 KiB in the latest backward, others before",
    ]


def test_other_words_for_other_figures() -> None:
    text = str(dataclasses.replace(SOME, rounds=1, overlaps=True, is_static=True))
    assert text.startswith("1 synchronised backward\n")
    assert "launched while backward runs" in text
    assert "2 KiB in the latest backward, the same in all" in text
    assert "unused parameters     none" in str(Stats(rounds=1))
    assert str(Stats()) == "no synchronised backward so far"


def test_as_dict_is_plain_and_whole() -> None:
    assert SOME.as_dict() == {
        field.name: getattr(SOME, field.name) for field in dataclasses.fields(Stats)
    }
    assert Stats(**SOME.as_dict()) == SOME


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SOME.rounds = 5  # type: ignore[misc]
