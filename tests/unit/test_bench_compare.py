"""What the benchmark calls a change, and what noise."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.compare import compare, read


def run(value: float, repeats: list[float], load: float = 1.0) -> dict[str, Any]:
    """Return a run of one part with one nested figure."""
    return {
        "load": {"before": load, "after": load},
        "part": {"us": {"p50": value}, "samples": {"x": [1]}, "repeats": {"us.p50": repeats}},
    }


def verdict(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the words of the only line."""
    return compare(old, new).splitlines()[1].split()


def test_repeats_that_do_not_overlap_are_a_change() -> None:
    """All of one run lie on one side of all of the other's."""
    assert verdict(run(100, [90, 100, 110]), run(50, [45, 50, 80])) == [
        "part",
        "-50.0%",
        "yes",
        "us.p50",
        "100",
        "50",
    ]


def test_repeats_that_overlap_are_noise() -> None:
    """However far the medians are apart."""
    assert verdict(run(100, [40, 100, 110]), run(50, [45, 50, 80]))[2] == "no"


def test_too_few_repeats_say_so() -> None:
    """Nobody knows the noise of a single run."""
    assert "unknown:" in verdict(run(100, [100]), run(50, [50]))


def test_parts_and_figures_of_one_run_alone_are_left_out() -> None:
    """There is nothing to compare them with; both loads are told."""
    new = run(50, [], load=7.25)
    new["other"] = {"x": 1}
    new["part"]["more"] = 1
    lines = compare(run(100, []), new).splitlines()
    assert len(lines) == 4
    assert lines[-1] == "Load average: old 1.0, new 7.2."


@pytest.mark.parametrize(
    "run",
    [
        5,
        {"load": 5},
        {"load": {"before": None}},
        {"load": {"before": float("nan")}},
        {"part": 5},
        {"part": {"repeats": []}},
        {"part": {"repeats": None}},
        {"part": {"repeats": {"us": 5}}},
        {"part": {"repeats": {"us": [None]}}},
        {"part": {"us": {"p50": float("inf")}}},
        {"part": {"us": 10**400}},
    ],
)
def test_what_is_no_run_is_refused_when_it_is_read(run: object) -> None:
    """Once everything is measured it is too late."""
    with pytest.raises(ValueError, match=r"^(it|load|part\S*): |^it is no object$"):
        read(json.dumps(run))


def test_what_is_a_run_is_read() -> None:
    """With loads or without, with parts of any figures, and words among them."""
    for kept in (
        {},
        run(50, [1, 2.5]),
        {"part": {"failed": "x"}},
        {"part": {"x": None, "y": "z", "rounds": [1]}},
    ):
        assert read(json.dumps(kept)) == kept
        assert compare(kept, run(50, []))
