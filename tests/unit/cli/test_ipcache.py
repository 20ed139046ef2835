"""The map's rows as Cilium prints them, and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from lazymesh.cli import ipcache as module
from lazymesh.roles.ipcachereader import Row

if TYPE_CHECKING:
    from collections.abc import Iterator

ROW = Row("10.2.0.5/32", 131_073, "172.18.0.2", 255, 0b1111, "lazymesh")
PLAIN = Row("0.0.0.0/0", 2, "0.0.0.0", 0, 0, "other")


class View:
    """Stands in for the open map; ``looks`` are what each look at it shows."""

    def __init__(self, *looks: list[Row]) -> None:
        self._looks = list(looks)

    def rows(self) -> Iterator[Row]:
        """Show the next look, then end as Ctrl-C does."""
        if not self._looks:
            raise KeyboardInterrupt
        return iter(self._looks.pop(0))

    def get(self, text: str) -> Row | None:
        """Know one address."""
        return ROW if text == "10.2.0.5" else None


def invoke(monkeypatch: pytest.MonkeyPatch, view: View, *argv: str) -> tuple[int, str]:
    """Run the command on that view."""
    monkeypatch.setattr(module.IpcacheReader, "open", lambda _bpffs, _stale=(): view)
    result = CliRunner().invoke(module.ipcache, argv)
    return result.exit_code, result.stdout


def test_flags_have_ciliums_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """All four; none is an empty list, or <none>."""
    _, out = invoke(monkeypatch, View([ROW, PLAIN]), "list", "-o", "json")
    shown = json.loads(out)
    assert shown["10.2.0.5/32"]["flags"] == ["skiptunnel", "hastunnel", "ipv6tunnel", "remotecluster"]
    assert shown["0.0.0.0/0"] == {
        "identity": 2,
        "tunnelEndpoint": "0.0.0.0",
        "encryptKey": 0,
        "flags": [],
        "owner": "other",
    }
    _, out = invoke(monkeypatch, View([PLAIN]), "list")
    assert "flags=<none>" in out


def test_what_nobody_confirms_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """For people and programmes; what is confirmed has no such mark."""
    stale = replace(ROW, stale=True)
    _, out = invoke(monkeypatch, View([stale, PLAIN]), "list", "-o", "json")
    assert [row.get("stale") for row in json.loads(out).values()] == [True, None]
    assert "lazymesh (stale)" in invoke(monkeypatch, View([stale]), "list")[1]


def test_an_agent_is_asked_what_is_stale_and_need_not_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The map is read without one."""
    asked = []
    monkeypatch.setattr(
        module.IpcacheReader, "open", lambda _bpffs, stale: asked.append(stale) or View([ROW])
    )
    assert CliRunner().invoke(module.ipcache, ["list", "--socket", "/nowhere"]).exit_code == 0
    monkeypatch.setattr(module, "ask", lambda *_: iter([{"addresses": ["10.2.0.5"]}]))
    CliRunner().invoke(module.ipcache, ["list"])
    assert asked == [frozenset(), {"10.2.0.5"}]


def test_get_exits_1_when_nothing_covers_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """A programme gets no half an object."""
    assert invoke(monkeypatch, View(), "get", "10.2.0.6", "-o", "json") == (1, "")
    code, out = invoke(monkeypatch, View(), "get", "10.2.0.5", "-o", "json")
    assert (code, json.loads(out)["address"]) == (0, "10.2.0.5")


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("10.2.0.5/32", "10.2.0.5"),
        ("fd00::5/128", "fd00::5"),
        ("10.2.0.0/16", "10.2.0.0/16"),
        ("fd00::/32",) * 2,
    ],
)
def test_get_takes_an_address_as_the_list_has_it(
    monkeypatch: pytest.MonkeyPatch, text: str, asked: str
) -> None:
    """Of full length it is one; what is shorter is not."""
    seen: list[str] = []
    view = SimpleNamespace(get=lambda ip: seen.append(ip) or ROW)
    monkeypatch.setattr(module.IpcacheReader, "open", lambda *_: view)
    result = CliRunner().invoke(module.ipcache, ["get", text, "-o", "json"])
    assert json.loads(result.output)["address"] == asked
    assert seen == [asked]


def test_watch_tells_differences_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Added, changed, deleted; what stays is not told."""
    changed = Row("10.2.0.5/32", 131_074, "172.18.0.2", 255, 2, "lazymesh")
    view = View([PLAIN], [PLAIN, ROW], [PLAIN, changed], [changed])
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    _, out = invoke(monkeypatch, view, "watch", "-o", "json")
    events = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [(e["event"], e["prefix"], e["identity"]) for e in events] == [
        ("added", "10.2.0.5/32", 131_073),
        ("changed", "10.2.0.5/32", 131_074),
        ("deleted", "0.0.0.0/0", 2),
    ]
