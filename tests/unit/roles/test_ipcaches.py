"""The map of a node without Cilium."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from lazymesh.datapath.ipcachemaps import IpcacheLayout
from lazymesh.roles import ipcaches as module
from lazymesh.roles.ipcaches import OwnIpcache

if TYPE_CHECKING:
    from pathlib import Path

    from lazymesh.datapath.program import Datapath


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[OwnIpcache, list[Any]]:
    """Return one over fakes, and what was put in force."""
    shown: list[Any] = []
    ipcache = SimpleNamespace(map_id=7, layout=IpcacheLayout.V2, max_entries=100)
    monkeypatch.setattr(module, "open_own_ipcache", lambda _pins, _size: ipcache)
    datapath = SimpleNamespace(pins=None, visible=SimpleNamespace(show=shown.append))
    return OwnIpcache(cast("Datapath", datapath), 100, tmp_path), shown


def test_cilium_that_comes_later_is_reported(own: tuple[OwnIpcache, list[Any]], tmp_path: Path) -> None:
    """An agent that was quicker at the node's boot would resolve in vain."""
    pin = tmp_path / "tc" / "globals" / "cilium_ipcache_v2"
    pin.parent.mkdir(parents=True)
    pin.touch()
    assert "restart this agent with --datapath cilium" in next(own[0].problems())


def test_map_that_keeps_its_size_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It was made by an agent with another setting."""
    pinned = SimpleNamespace(map_id=7, layout=IpcacheLayout.V2, max_entries=100)
    monkeypatch.setattr(module, "open_own_ipcache", lambda _pins, _size: pinned)
    datapath = SimpleNamespace(pins=None, visible=SimpleNamespace(show=lambda _ipcaches: None))
    (line,) = OwnIpcache(cast("Datapath", datapath), 200, tmp_path).problems()
    assert (
        "made for 100 entries and keeps that size: --ipcache-size 200 takes effect after `lazymesh uninstall`"
        in line
    )


async def test_it_is_put_in_force_and_stays(own: tuple[OwnIpcache, list[Any]]) -> None:
    """Nobody else writes there, and nothing can be wrong with it."""
    ipcaches, shown = own
    assert shown == [[ipcaches.maps[0]]]
    assert (ipcaches.mode, ipcaches.shared, len(ipcaches.here)) == ("standalone", False, 0)
    assert list(ipcaches.problems()) == []
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(ipcaches.run(), 0.01)


def test_it_is_described(own: tuple[OwnIpcache, list[Any]]) -> None:
    """For status."""
    assert own[0].describe() == {"maps": [{"id": 7, "layout": "v2", "size": 100, "role": "own"}]}
