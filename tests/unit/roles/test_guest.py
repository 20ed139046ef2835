"""What can go wrong while Cilium is followed, and that it ends nothing; nodes as they are: in the mesh tier."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from lazymesh.core.ipcaches import ORPHAN_AFTER_S
from lazymesh.datapath.maps import View
from lazymesh.errors import DatapathError
from lazymesh.metrics import Metrics
from lazymesh.roles import guest as module
from lazymesh.roles.guest import GuestIpcaches

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from lazymesh.datapath.cilium import NodeView
    from lazymesh.datapath.program import Datapath


class Node:
    """A node as the test says it is."""

    def __init__(self) -> None:
        self.pins = {Path("/tc/globals/cilium_ipcache_v2"): 5}
        self.read = frozenset({5})
        self.tcx_in_use = False
        self.refuses: set[str] = set()
        self.refused: set[str] = set()
        self.shown: list[list[int]] = []

    async def ipcaches(self) -> frozenset[int]:
        """What programs read."""
        self._refuse("ipcaches")
        return self.read

    async def addresses(self) -> set[bytes]:
        """There are none."""
        self._refuse("addresses")
        return set()

    def show(self, maps: list[Any]) -> None:
        """Put maps in force."""
        self._refuse("show")
        self.shown.append([one.map_id for one in maps])

    def _refuse(self, what: str) -> None:
        if what in self.refuses:
            self.refused.add(what)
            raise DatapathError(f"no {what} today")


class FakeMap:
    """A map of which only the number counts."""

    view, max_entries = View.V2, 100

    def __init__(self, map_id: int) -> None:
        self.map_id = map_id

    def count(self) -> int:
        """Some entries."""
        return 3

    def close(self) -> None:
        """There is nothing to close."""


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    """Return one with a Cilium, which is looked at all the time."""
    made = Node()
    monkeypatch.setattr(module, "pinned_ipcaches", lambda _bpffs: made.pins)
    opened = SimpleNamespace(by_id=lambda number, _tag=0: FakeMap(number))
    monkeypatch.setattr(module, "IpcacheMap", opened)
    for pause in ("LOOK_EVERY_S", "READ_EVERY_S", "READ_SETTLED_S", "ADDRESSES_EVERY_S"):
        monkeypatch.setattr(module, pause, 0.001)
    return made


@contextlib.asynccontextmanager
async def following(node: Node) -> AsyncIterator[GuestIpcaches]:
    """Follow the node until the end of the block."""
    pins = SimpleNamespace(linked=set)
    datapath = cast("Datapath", SimpleNamespace(views=SimpleNamespace(show=node.show), pins=pins))
    guest = GuestIpcaches(Path("/sys/fs/bpf"), datapath, cast("NodeView", node))
    await guest.open(lambda _: None)
    task = asyncio.create_task(guest.run())
    try:
        yield guest
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Any) -> None:
    """Wait for something to come about."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 (whatever a test waits for)
            await asyncio.sleep(0.001)


async def test_kernel_that_does_not_answer_is_asked_again(node: Node) -> None:
    """What is in force stays so, and status says why nothing changes."""
    async with following(node) as guest:
        node.refuses = {"ipcaches", "addresses"}
        await until(lambda: node.refused == node.refuses and list(guest.problems()))
        assert list(guest.problems()) == ["no ipcaches today"]
        node.refuses = set()
        await until(lambda: not list(guest.problems()))
    assert node.shown == [[5]]


async def test_map_that_could_not_be_put_in_force_is_tried_again(node: Node) -> None:
    """It is a new one no more than once."""
    async with following(node) as guest:
        node.refuses, node.pins = {"show"}, {Path("/tc/globals/cilium_ipcache_v2"): 9}
        await until(lambda: list(guest.problems()))
        node.refuses = set()
        await until(lambda: not list(guest.problems()))
        assert node.shown == [[5], [9, 5]]
        assert guest.recreated_total == 1
        metrics = Metrics()
        guest.export(metrics)
        assert metrics.registry.get_sample_value("lazymesh_ipcache_recreated_total") == 1


async def test_pinned_map_that_nothing_reads_is_told(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the programs have had the time to take it up it is a start like any other."""
    node.read = frozenset({4})
    async with following(node) as guest:
        assert list(guest.problems()) == []
        assert node.shown == [[5, 4]]
        later = time.monotonic() + ORPHAN_AFTER_S + 1
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: later, time=time.time))
        await until(lambda: node.shown[-1] == [4])
        (line,) = guest.problems()
        assert "nothing reads the pinned ipcache (map 5), Cilium's programs are on map 4" in line
        assert [one["role"] for one in guest.describe()["maps"]] == ["read"]


async def test_pin_that_stays_away_is_told(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment without is part of each start; after that the agent has died in it, or is gone."""
    async with following(node) as guest:
        node.pins = {}
        await asyncio.sleep(0.01)
        assert list(guest.problems()) == []
        later = time.monotonic() + 60
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: later, time=time.time))
        assert "has not been pinned in /sys/fs/bpf/tc/globals for 60 s" in next(guest.problems())
        node.pins = {Path("/tc/globals/cilium_ipcache_v2"): 5}
        await until(lambda: not list(guest.problems()))
