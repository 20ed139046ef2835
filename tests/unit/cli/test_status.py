"""The one screen."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from click.testing import CliRunner

from lazymesh.cli import status as module

if TYPE_CHECKING:
    import pytest

ANSWER: dict[str, Any] = {
    "version": "0.1.0",
    "uptimeSeconds": 61.5,
    "cluster": "a",
    "ready": True,
    "notReady": None,
    "datapath": {
        "mode": "standalone",
        "shadow": False,
        "interfaces": {"lxc0": "egress"},
        "attach": "tcx",
        "onMiss": "pass",
        "holding": "off",
        "policy": "none",
        "ipcache": {"maps": [{"id": 3, "layout": "v2", "role": "own", "size": 512_000}]},
        "packets": {"egress": {"hit": 5, "missed": 1}, "ingress": {"hit": 0, "missed": 0}},
    },
    "entries": {"owned": 5, "stale": 4, "budget": 25_600, "mapSize": 512_000},
    "queue": {"waiting": 0, "inFlight": 0, "negative": 2, "muted": True, "admitted": 0.5},
    "clusters": [
        {
            "name": "b",
            "id": None,
            "state": "silent",
            "nodes": 0,
            "identities": 0,
            "breaker": "open",
            "endpoint": None,
        }
    ],
    "wrong": ["cluster b is silent: gone"],
}


def test_screen_shows_what_is_wrong_and_exits_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing values are dashes."""
    monkeypatch.setattr(module, "ask", lambda *_: iter([ANSWER]))
    result = CliRunner().invoke(module.status)
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert "Queue:      0 waiting, 0 in flight, 2 negative, MUTED, 50% of misses admitted" in lines
    assert "Entries:    5 of at most 25600 ours, 4 stale, map of 512000" in lines
    assert "WRONG: cluster b is silent: gone" in lines
    assert ["b", "-", "silent", "0", "0", "open", "-"] in [line.split() for line in lines]
    assert ["hit", "5", "0"] in [line.split() for line in lines]


def test_nothing_wrong_exits_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON is the agent's own answer."""
    monkeypatch.setattr(module, "ask", lambda *_: iter([ANSWER | {"wrong": []}]))
    screen = CliRunner().invoke(module.status).output
    assert "Nothing is wrong." in screen
    assert "Not ready" not in screen
    result = CliRunner().invoke(module.status, ["-o", "json"])
    assert (result.exit_code, json.loads(result.output)) == (0, ANSWER | {"wrong": []})


def test_agent_that_has_no_parts_yet_has_a_screen_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it waits for, and what that means."""
    head = {key: ANSWER[key] for key in ("version", "uptimeSeconds", "cluster")}
    starting = head | {"ready": False, "notReady": "waiting for Cilium", "wrong": ["nothing is resolved"]}
    monkeypatch.setattr(module, "ask", lambda *_: iter([starting]))
    result = CliRunner().invoke(module.status)
    assert (result.exit_code, result.output.splitlines()) == (
        1,
        [
            "lazymesh 0.1.0, up 62 s, cluster a",
            "",
            "Not ready: waiting for Cilium",
            "WRONG: nothing is resolved",
        ],
    )
    report = CliRunner().invoke(module.status, ["-o", "json"])
    assert (report.exit_code, json.loads(report.output)) == (1, starting)


def test_what_readiness_waits_for_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no fault, so the exit code does not change."""
    marked = {"wrong": [], "ready": False, "notReady": "marked to be uninstalled"}
    monkeypatch.setattr(module, "ask", lambda *_: iter([ANSWER | marked]))
    result = CliRunner().invoke(module.status)
    assert (result.exit_code, "Not ready: marked to be uninstalled" in result.output) == (0, True)
