"""``lazymesh config``: what is said to the agent, and what it says back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from lazymesh.cli import config as module

if TYPE_CHECKING:
    from pathlib import Path


def answer_with(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Give every question this answer; return the questions."""
    questions: list[dict[str, Any]] = []

    def ask(_path: Path, what: str, **arguments: Any) -> Any:
        questions.append({"ask": what, **arguments})
        return iter([answer])

    monkeypatch.setattr(module, "ask", ask)
    return questions


@pytest.mark.parametrize("action", ["hold", "pass", "drop"])
def test_action_is_passed_on(monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    """And repeated once it is in force."""
    asked = answer_with(monkeypatch, {"onMiss": action, "problem": None})
    result = CliRunner().invoke(module.config, ["on-miss", action])
    assert (result.exit_code, result.output) == (0, f"on miss: {action}\n")
    assert asked == [{"ask": "on-miss", "action": action}]


def test_holding_that_is_impossible_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode is switched; that it helps nobody is worth a line."""
    answer_with(monkeypatch, {"onMiss": "hold", "problem": "cannot open /dev/net/tun"})
    result = CliRunner().invoke(module.config, ["on-miss", "hold"])
    assert result.exit_code == 0
    assert "Nothing is held, missed packets pass: cannot open /dev/net/tun" in result.output


def test_other_actions_are_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are three."""
    asked = answer_with(monkeypatch, {})
    assert CliRunner().invoke(module.config, ["on-miss", "queue"]).exit_code == 2
    assert asked == []
