"""``lazymesh audit``: periods, and the list of open windows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from lazymesh.cli import audit as module

if TYPE_CHECKING:
    from pathlib import Path

WINDOW = {
    "address": "10.2.0.5",
    "direction": "egress",
    "cluster": "b",
    "since": "2026-11-21T07:00:00.000+00:00",
    "seconds": 0.25,
    "packets": 3,
    "bytes": 180,
    "identity": 131_073,
    "verdict": "denied",
    "open": True,
}
SINCE = "2026-11-21T06:00:00.000+00:00"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Answer with one window; return what was asked."""
    questions: list[dict[str, Any]] = []

    def answer(_path: Path, what: str, **arguments: Any) -> Any:
        questions.append({"ask": what, **arguments})
        return iter([{"windows": [WINDOW], "recordedSince": SINCE}])

    monkeypatch.setattr(module, "ask", answer)
    return questions


@pytest.mark.parametrize(
    ("period", "seconds"),
    [
        ("90s", 90),
        ("15m", 900),
        ("1h", 3600),
        ("7d", 604_800),
        ("1h30m", 5400),
        ("1d2h3m4s", 93_784),
        ("0s", 0),
    ],
)
def test_period_is_passed_on_in_seconds(asked: list[dict[str, Any]], period: str, seconds: int) -> None:
    """As people write it."""
    assert CliRunner().invoke(module.audit, ["--since", period]).exit_code == 0
    assert asked == [{"ask": "audit", "since": seconds}]


@pytest.mark.parametrize(
    "period", ["", "1", "h", "-1h", "1w", "1.5h", "1h30", "30m1h", "1h 30m", "9" * 400 + "d"]
)
def test_strange_period_is_wrong_usage(asked: list[dict[str, Any]], period: str) -> None:
    """With examples of what is none."""
    result = CliRunner().invoke(module.audit, ["--since", period])
    assert result.exit_code == 2
    assert "write 90s, 15m, 1h30m or 7d" in result.output
    assert asked == []


def test_window_is_a_line_and_says_that_it_is_open(asked: list[dict[str, Any]]) -> None:
    """What went through, for how long, and what policy says of it."""
    header, row = CliRunner().invoke(module.audit, []).stdout.splitlines()
    assert header.split() == [
        "SINCE", "ADDRESS", "DIRECTION", "CLUSTER", "SECONDS", "PACKETS", "BYTES", "IDENTITY", "VERDICT",
    ]  # fmt: skip
    assert row.split()[1:] == ["10.2.0.5", "egress", "b", "0.250", "3", "180", "131073", "denied", "(open)"]


def test_json_is_the_agents_own_answer(asked: list[dict[str, Any]]) -> None:
    """One object."""
    assert json.loads(CliRunner().invoke(module.audit, ["-o", "json"]).output) == {
        "windows": [WINDOW],
        "recordedSince": SINCE,
    }


@pytest.mark.parametrize("windows", [[], [WINDOW]])
def test_people_are_told_how_far_back_the_record_goes(
    monkeypatch: pytest.MonkeyPatch, windows: list[dict[str, Any]]
) -> None:
    """Nothing in it is no news of what was before the agent was started."""
    monkeypatch.setattr(module, "ask", lambda *_, **__: iter([{"windows": windows, "recordedSince": SINCE}]))
    result = CliRunner().invoke(module.audit, [])
    assert f"Recorded since {SINCE}" in result.stderr
    assert ("Nothing went through unresolved." in result.stderr) is (not windows)


def test_help_tells_whose_verdict_it_is() -> None:
    """Nobody is to wait for one that cannot be had."""
    words = " ".join(CliRunner().invoke(module.audit, ["--help"]).output.split())
    assert "beside Cilium it is always `unknown`" in words
