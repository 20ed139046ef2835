"""The stream as people and programs see it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from click.testing import CliRunner

from lazymesh.cli import misses as module
from lazymesh.errors import LazymeshError

if TYPE_CHECKING:
    import pytest

EVENTS: list[dict[str, Any]] = [
    {"streaming": "misses"},
    {"address": "10.2.0.5", "cluster": "b", "outcome": "installed", "reason": None, "latency_ms": 1.5},
    {"address": "10.9.0.5", "cluster": None, "outcome": "absent", "reason": "no-cluster", "latency_ms": None},
]


def test_table_has_a_header_and_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing values are dashes; the agent's end is an error."""
    monkeypatch.setattr(module, "ask", lambda *_: iter(EVENTS))
    result = CliRunner().invoke(module.misses)
    rows = [line.split() for line in result.output.splitlines()]
    assert rows == [
        ["ADDRESS", "CLUSTER", "OUTCOME", "REASON", "LATENCY"],
        ["10.2.0.5", "b", "installed", "-", "1.500", "ms"],
        ["10.9.0.5", "-", "absent", "no-cluster", "-"],
    ]
    assert isinstance(result.exception, LazymeshError)


def test_count_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """One object a line, without the greeting."""
    monkeypatch.setattr(module, "ask", lambda *_: iter(EVENTS))
    result = CliRunner().invoke(module.misses, ["-o", "json", "--count", "1"])
    assert (result.exit_code, json.loads(result.output)) == (0, EVENTS[1])
