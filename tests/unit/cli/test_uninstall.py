"""What was removed, in words and as an object."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from lazymesh.cli import uninstall as module
from lazymesh.roles.uninstall import Removed

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("removed", "lines"),
    [
        (
            Removed(12, ("lxc0", "lxc1"), pins=True),
            ["Programs: taken off lxc0, lxc1", "Entries:  12 in Cilium's ipcache", "Pins:     removed"],
        ),
        (
            Removed(0, (), pins=False),
            ["Programs: none", "Entries:  none in Cilium's ipcache", "Pins:     none"],
        ),
    ],
)
def test_says_what_there_was(monkeypatch: pytest.MonkeyPatch, removed: Removed, lines: list[str]) -> None:
    """Nothing to remove is no error: it may be run twice."""

    async def remove(_bpffs: Path) -> Removed:
        return removed

    monkeypatch.setattr(module, "remove", remove)
    assert CliRunner().invoke(module.uninstall).output.splitlines() == lines
    report = json.loads(CliRunner().invoke(module.uninstall, ["-o", "json"]).output)
    assert report == {
        "entries": removed.entries,
        "interfaces": list(removed.interfaces),
        "pins": removed.pins,
    }


def test_announces_instead_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this node is touched."""
    asked = []

    def tell(*words: object) -> int:
        asked.append(words[1:])
        return 3

    monkeypatch.setattr(module.KubeApi, "of_this_pod", lambda: None)
    monkeypatch.setattr(module, "tell", tell)
    monkeypatch.delattr(module, "remove")
    words = ["--announce", "lazymesh", "--selector", "a=b", "--timeout", "5"]
    assert (
        CliRunner().invoke(module.uninstall, words).output == "Agents:   3 clean up when they are stopped\n"
    )
    assert json.loads(CliRunner().invoke(module.uninstall, [*words, "-o", "json"]).output) == {"agents": 3}
    assert asked == [("lazymesh", "a=b", 5.0)] * 2
