"""What can go wrong while Cilium is followed, and that it ends nothing; nodes as they are: in the mesh tier."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from lazymesh.core import ipcaches
from lazymesh.core.ipcaches import ORPHAN_AFTER_S
from lazymesh.datapath.ipcachemaps import IpcacheLayout
from lazymesh.errors import DatapathError
from lazymesh.metrics import Metrics
from lazymesh.roles import ciliumipcaches as module
from lazymesh.roles import room
from lazymesh.roles.carryover import SLICE
from lazymesh.roles.ciliumipcaches import CiliumIpcaches
from lazymesh.roles.room import MapRoom
from tests.support.playbook import B1, B2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

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
        self.show_takes_s = 0.0
        self.counts: list[int | None] = [3]
        """What counts of a map say, one after the other; the last one again and again."""

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
        time.sleep(self.show_takes_s)
        self._refuse("show")
        self.shown.append([one.map_id for one in maps])

    def _refuse(self, what: str) -> None:
        if what in self.refuses:
            self.refused.add(what)
            raise DatapathError(f"no {what} today")


NETLINK = cast("Any", SimpleNamespace(run=lambda coroutine: coroutine))
"""Runs it in this thread."""


class FakeMap:
    """A map of which only the number counts."""

    layout, max_entries = IpcacheLayout.V2, 100

    def __init__(self, map_id: int, counts: list[int | None]) -> None:
        self.map_id = map_id
        self._counts = counts

    def count(self) -> int | None:
        """Some entries."""
        return self._counts.pop(0) if len(self._counts) > 1 else self._counts[0]

    def close(self) -> None:
        """There is nothing to close."""


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    """Return one with a Cilium, which is looked at all the time."""
    made = Node()
    monkeypatch.setattr(module, "pinned_ipcaches", lambda _bpffs: made.pins)
    opened = SimpleNamespace(by_id=lambda number, _tag=0: FakeMap(number, made.counts))
    for reader in (module, room):
        monkeypatch.setattr(reader, "IpcacheMap", opened)
    for pause in ("LOOK_EVERY_S", "READ_EVERY_S", "READ_SETTLED_S", "ADDRESSES_EVERY_S"):
        monkeypatch.setattr(module, pause, 0.001)
    return made


class Installs:
    """Stands in for the installer."""

    def __init__(self) -> None:
        self.crowded, self.added, self.added_most = False, 0, math.inf
        self.on_full: Callable[[], None] = lambda: None
        self.owned: list[bytes] = [B1, B2]
        self.maps: list[int] = []
        self.withdrawn: set[tuple[int, bytes]] = set()
        self.looked_for: list[bytes] = []

    def use(self, maps: list[Any]) -> None:
        """Write into these maps from now on."""
        self.maps = [one.map_id for one in maps]

    def owned_addresses(self) -> list[bytes]:
        """All that are ours."""
        return self.owned

    def owns(self, _address: bytes) -> bool:
        """All are."""
        return True

    def carry_over(self, _address: bytes) -> None:
        """Into a new map: it always goes well."""

    def withdraw(self, ipcache: Any, address: bytes) -> None:
        """Take one out of a map."""
        self.withdrawn.add((ipcache.map_id, address))

    def is_lost(self, address: bytes) -> bool:
        """None is; note the question."""
        self.looked_for.append(address)
        return False


@contextlib.asynccontextmanager
async def following(node: Node, installs: Installs | None = None) -> AsyncIterator[CiliumIpcaches]:
    """Follow the node until the end of the block; installs: as one who writes there."""
    pins, recent = SimpleNamespace(linked=set), SimpleNamespace(newest_first=list)
    datapath = SimpleNamespace(visible=SimpleNamespace(show=node.show), pins=pins, recent=recent)
    cilium = CiliumIpcaches(Path("/sys/fs/bpf"), cast("Datapath", datapath), cast("NodeView", node), NETLINK)
    await cilium.open(lambda _: None)
    if installs is not None:
        others = SimpleNamespace(feed=lambda _event: None, owned=2)
        cilium.connect(cast("Any", installs), *[cast("Any", others)] * 3)
    task = asyncio.create_task(cilium.run())
    try:
        yield cilium
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
    async with following(node) as cilium:
        node.refuses = {"ipcaches", "addresses"}
        await until(lambda: node.refused == node.refuses and list(cilium.problems()))
        assert list(cilium.problems()) == ["no ipcaches today"]
        node.refuses = set()
        await until(lambda: not list(cilium.problems()))
    assert node.shown == [[5]]


async def test_map_that_could_not_be_put_in_force_is_tried_again(node: Node) -> None:
    """It is a new one no more than once."""
    async with following(node) as cilium:
        node.refuses, node.pins = {"show"}, {Path("/tc/globals/cilium_ipcache_v2"): 9}
        await until(lambda: list(cilium.problems()))
        node.refuses = set()
        await until(lambda: not list(cilium.problems()))
        assert node.shown == [[5], [9, 5]]
        assert cilium.recreated_total == 1
        metrics = Metrics()
        cilium.export(metrics)
        assert metrics.registry.get_sample_value("lazymesh_ipcache_recreated_total") == 1


async def test_misses_are_answered_while_the_kernel_takes_its_time(node: Node) -> None:
    """It lets nobody put a map in force, or take one out, before no program runs that may look into the one before."""
    async with following(node) as cilium:
        node.show_takes_s, node.pins = 0.3, {Path("/tc/globals/cilium_ipcache_v2"): 9}
        began, longest = time.monotonic(), 0.0
        while node.shown[-1] != [9, 5]:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - before)
        assert time.monotonic() - began >= 0.3
        assert longest < 0.15
        assert list(cilium.problems()) == []


async def test_pinned_map_that_nothing_reads_is_reported(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the programs have had the time to take it up it is a start like any other."""
    node.read = frozenset({4})
    async with following(node) as cilium:
        assert list(cilium.problems()) == []
        assert node.shown == [[5, 4]]
        later = time.monotonic() + ORPHAN_AFTER_S + 1
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: later, time=time.time))
        await until(lambda: node.shown[-1] == [4])
        (line,) = cilium.problems()
        assert "nothing reads the pinned ipcache (map 5), Cilium's programs read map 4" in line
        assert [one["role"] for one in cilium.describe()["maps"]] == ["read"]


async def test_pin_that_stays_away_is_reported(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment without is part of each start; after that the agent has died in it, or is gone."""
    async with following(node) as cilium:
        node.pins = {}
        await asyncio.sleep(0.01)
        assert list(cilium.problems()) == []
        later = time.monotonic() + 60
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: later, time=time.time))
        assert "has not been pinned in /sys/fs/bpf/tc/globals for 60 s" in next(cilium.problems())
        node.pins = {Path("/tc/globals/cilium_ipcache_v2"): 5}
        await until(lambda: not list(cilium.problems()))


async def test_count_that_would_crowd_the_map_is_taken_twice(node: Node) -> None:
    """A count may be far too high, and what it makes us take out is gone: the smaller one is believed."""
    node.counts = [99, 50, 50]
    async with following(node, Installs()) as cilium:
        await until(lambda: cilium.describe()["entriesInMap"] == 50)
        assert list(cilium.problems()) == []
    node.counts = [99, 97, 97]
    installs = Installs()
    async with following(node, installs) as cilium:
        await until(lambda: installs.crowded)
        assert "nearly full (97 of 100 entries)" in next(cilium.problems())
    node.counts = [97, 99, 99]
    installs = Installs()
    async with following(node, installs) as cilium:
        await until(lambda: installs.crowded)
        assert "nearly full (97 of 100 entries)" in next(cilium.problems())


async def test_count_that_cannot_be_is_none(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the first one nor one that is to confirm another; then it is counted again at once."""
    monkeypatch.setattr(room, "COUNTS_APART_S", 0.001)
    believed = believed_counts(monkeypatch)
    node.counts = [None, 99, None, 40]
    async with following(node, Installs()) as cilium:
        await until(lambda: cilium.describe()["entriesInMap"] == 40)
        assert set(believed) == {40}


def believed_counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list of counts that limit our entries."""
    believed: list[int] = []
    monkeypatch.setattr(MapRoom, "limit", lambda _self, used, *_: believed.append(used) or iter(()))
    return believed


@pytest.mark.parametrize("installs", [Installs(), None], ids=["with entries of ours", "without"])
async def test_map_that_vanishes_while_it_is_counted_ends_nothing(
    node: Node, monkeypatch: pytest.MonkeyPatch, installs: Installs | None
) -> None:
    """It is counted by its id, which may no longer exist."""
    for pause in ("COUNTS_APART_S", "ROOM_EVERY_S"):
        monkeypatch.setattr(room, pause, 0.001)
    counts = [OSError(errno.ENOENT, "no such map"), 40]

    def count(_map: FakeMap) -> int:
        found = counts.pop(0) if len(counts) > 1 else counts[0]
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr(FakeMap, "count", count)
    async with following(node, installs) as cilium:
        await until(lambda: cilium.describe()["entriesInMap"] == 40)


@pytest.mark.parametrize("installs", [Installs(), None], ids=["with entries of ours", "without"])
async def test_count_of_the_last_map_is_not_taken_for_the_new_ones(
    node: Node, monkeypatch: pytest.MonkeyPatch, installs: Installs | None
) -> None:
    """Cilium has started while the last one was counted."""
    for pause in ("COUNTS_APART_S", "ROOM_EVERY_S"):
        monkeypatch.setattr(room, pause, 0.001)
    counting, done, used = threading.Event(), threading.Event(), set[int]()

    def count(one: FakeMap) -> int:
        if one.map_id != 5:
            return 3
        counting.set()
        done.wait(5)
        return 50

    monkeypatch.setattr(FakeMap, "count", count)
    believed = believed_counts(monkeypatch)
    async with following(node, installs) as cilium:
        await until(counting.is_set)
        node.pins = {Path("/tc/globals/cilium_ipcache_v2"): 9}
        await until(lambda: node.shown[-1] == [9, 5])
        done.set()
        await until(lambda: used.add(cilium.describe()["entriesInMap"]) or 3 in used)
        assert used == {0, 3}
        assert set(believed) == ({3} if installs else set())


async def test_map_is_counted_when_the_kernel_has_no_room(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though by the last count the next one is not due for a minute."""
    monkeypatch.setattr(room, "COUNTS_APART_S", 0.001)
    monkeypatch.setattr(FakeMap, "max_entries", 1_000_000)
    installs = Installs()
    async with following(node, installs) as cilium:
        await until(lambda: cilium.describe()["entriesInMap"] == 3)
        node.counts[:] = [990_000]
        await asyncio.sleep(0.02)
        assert not installs.crowded
        installs.on_full()
        await until(lambda: installs.crowded)


async def test_maps_that_do_not_count_any_more_keep_nothing_of_ours(node: Node) -> None:
    """Nobody would keep it true; not all of them go with their last program."""
    installs = Installs()
    async with following(node, installs):
        node.pins = {Path("/tc/globals/cilium_ipcache_v2"): 9}
        await until(lambda: node.shown[-1] == [9, 5])
        assert installs.withdrawn == set()
        node.read = frozenset({9})
        await until(lambda: node.shown[-1] == [9])
        await until(lambda: installs.withdrawn)
        assert installs.withdrawn == {(5, B1), (5, B2)}


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the maps that were closed, without those opened to be counted; an unread map goes soon."""
    found: list[int] = []
    monkeypatch.setattr(ipcaches, "LETTING_GO_S", 0.05)
    monkeypatch.setattr(FakeMap, "close", lambda one: found.append(one.map_id))
    monkeypatch.setattr(room, "_count", lambda _map_id: 3)
    return found


async def test_new_map_has_room_until_it_is_counted(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written to it; when an old map goes, the first one is not new."""
    monkeypatch.setattr(ipcaches, "LETTING_GO_S", 0.05)
    begun: list[int] = []
    monkeypatch.setattr(MapRoom, "begin", lambda _self: begun.append(len(node.shown)))
    async with following(node, Installs()):
        node.pins = {Path("/tc/globals/cilium_ipcache_v2"): 9}
        await until(lambda: node.shown[-1] == [9, 5])
        node.read = frozenset({9})
        await until(lambda: node.shown[-1] == [9])
    assert begun == [1]


async def test_each_map_that_is_no_longer_used_is_closed_once(node: Node, closed: list[int]) -> None:
    """The second time, its descriptor could be another file's."""
    async with following(node, Installs()):
        for number, before in ((9, 5), (11, 9)):
            node.pins = {Path("/tc/globals/cilium_ipcache_v2"): number}
            await until(lambda number=number, before=before: node.shown[-1] == [number, before])
            node.read = frozenset({number})
            await until(lambda before=before: before in closed)
    assert closed == [5, 9]


async def test_map_that_went_while_nothing_could_be_put_in_force_is_cleaned_and_closed(
    node: Node, closed: list[int]
) -> None:
    """It is in force until then."""
    installs = Installs()
    async with following(node, installs):
        node.refuses = {"show"}
        node.pins = {Path("/tc/globals/cilium_ipcache_v2"): 9}
        await until(lambda: installs.maps == [9, 5])
        node.read = frozenset({9})
        await until(lambda: installs.maps == [9])
        assert closed == []
        node.refuses = set()
        await until(lambda: closed)
    assert node.shown == [[5], [9]]
    assert installs.withdrawn == {(5, B1), (5, B2)}
    assert closed == [5]


async def test_map_that_cannot_be_opened_leaves_no_other_open(
    node: Node, closed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that were opened together with it; the one in force stays open."""

    def by_id(number: int, _tag: int = 0) -> FakeMap:
        if number == 4:
            raise DatapathError("map 4 is of another layout")
        return FakeMap(number, node.counts)

    async with following(node) as cilium:
        monkeypatch.setattr(module.IpcacheMap, "by_id", by_id)
        node.read, node.pins = frozenset({4, 5}), {Path("/tc/globals/cilium_ipcache_v2"): 9}
        await until(lambda: closed)
        assert list(cilium.problems()) == ["map 4 is of another layout"]
        assert [one.map_id for one in cilium.maps] == [5]
    assert set(closed) == {9}


async def test_map_that_vanished_with_its_last_program_is_left_out(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the programs and its opening."""

    def by_id(number: int, _tag: int = 0) -> FakeMap:
        if number == 6:
            raise FileNotFoundError
        return FakeMap(number, node.counts)

    async with following(node) as cilium:
        monkeypatch.setattr(module.IpcacheMap, "by_id", by_id)
        node.read, node.pins = frozenset({5, 6}), {Path("/tc/globals/cilium_ipcache_v2"): 9}
        await until(lambda: node.shown[-1] == [9, 5])
        assert list(cilium.problems()) == []


async def test_new_map_is_filled_for_a_moment_before_it_is_in_force(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest follows while it is."""
    installs = Installs()
    installs.owned = [bytes((10, 2, number >> 8, number & 255)) for number in range(3 * SLICE)]
    shown_before: list[int] = []
    monkeypatch.setattr(Installs, "carry_over", lambda *_: shown_before.append(len(node.shown)))
    monkeypatch.setattr(module, "FIRST_S", -1.0)
    async with following(node, installs):
        node.pins = {Path("/tc/globals/cilium_ipcache_v2"): 9}
        await until(lambda: len(shown_before) == len(installs.owned))
        assert installs.maps == [9, 5]
        assert shown_before == [1] * SLICE + [2] * 2 * SLICE


async def test_lost_entries_are_looked_for_as_soon_as_one_map_is_left(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, and each time an old map has gone."""
    monkeypatch.setattr(module, "SWEEP_EVERY_S", 1_000.0)
    monkeypatch.setattr(ipcaches, "LETTING_GO_S", 0.05)
    installs = Installs()
    async with following(node, installs):
        await until(lambda: installs.looked_for == [B1, B2])
        node.pins = {Path("/tc/globals/cilium_ipcache_v2"): 9}
        await until(lambda: node.shown[-1] == [9, 5])
        node.read = frozenset({9})
        await until(lambda: installs.looked_for == [B1, B2, B1, B2])


async def test_search_for_lost_entries_lets_others_have_their_turn(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends when there is a second map, which may come in between."""
    installs = Installs()
    installs.owned = [bytes((10, 2, number >> 8, number & 255)) for number in range(2 * SLICE)]

    def is_lost(_self: Installs, address: bytes) -> bool:
        installs.looked_for.append(address)
        if len(installs.looked_for) == SLICE:
            asyncio.get_running_loop().call_soon(
                cilium._arrangement.step, frozenset({9}), frozenset({5}), time.monotonic()
            )
        return False

    monkeypatch.setattr(Installs, "is_lost", is_lost)
    async with following(node, installs) as cilium:
        await until(lambda: node.shown[-1] == [9, 5])
        assert installs.looked_for == installs.owned[:SLICE]


async def test_programs_are_looked_at_as_soon_as_a_map_is_pinned(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the pins again after that: they change meanwhile."""
    for pause in ("READ_EVERY_S", "READ_SETTLED_S"):
        monkeypatch.setattr(module, pause, 1_000.0)

    async def ipcaches(_node: Node) -> frozenset[int]:
        if node.pins == {Path("/tc/globals/cilium_ipcache_v2"): 9}:
            node.pins = {Path("/tc/globals/cilium_ipcache_v2"): 11}
            return frozenset({11})
        return node.read

    async with following(node):
        monkeypatch.setattr(Node, "ipcaches", ipcaches)
        node.pins = {Path("/tc/globals/cilium_ipcache_v2"): 9}
        await until(lambda: len(node.shown) > 1)
        assert node.shown == [[5], [11, 5]]


async def test_looking_at_programs_takes_a_tenth_of_the_time_at_most(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be hundreds of interfaces."""
    looks: list[float] = []

    async def ipcaches(_node: Node) -> frozenset[int]:
        looks.append(time.monotonic())
        await asyncio.sleep(0.01)
        return node.read

    async with following(node):
        monkeypatch.setattr(Node, "ipcaches", ipcaches)
        await until(lambda: len(looks) == 3)
    assert looks[2] - looks[1] >= 0.1


async def test_addresses_that_the_node_no_longer_has_are_forgotten(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another node may have them next."""
    found = {B1}

    async def addresses(_node: Node) -> set[bytes]:
        return found

    monkeypatch.setattr(Node, "addresses", addresses)
    async with following(node) as cilium:
        assert B1 in cilium.here
        found = {B2}
        await until(lambda: B2 in cilium.here)
        assert B1 not in cilium.here


async def test_wait_for_the_pin_is_reported_once(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked for every second; if it is gone again at once, that is an error."""
    looks = [{}, {}, {}, node.pins, {}]
    monkeypatch.setattr(
        module, "pinned_ipcaches", lambda _bpffs: looks.pop(0) if len(looks) > 1 else looks[0]
    )
    node.read = frozenset()
    sleep, slept = asyncio.sleep, list[float]()
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: slept.append(seconds) or sleep(0))
    cilium = CiliumIpcaches(Path("/sys/fs/bpf"), cast("Datapath", None), cast("NodeView", node), NETLINK)
    told: list[Path] = []
    with pytest.raises(DatapathError, match="no ipcache is pinned in /sys/fs/bpf/tc/globals any more"):
        await cilium.open(told.append)
    assert told == [Path("/sys/fs/bpf/tc/globals")]
    assert slept == [1, 1, 1]


async def test_programs_behind_ciliums_tcx_programs_are_reported(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filters on clsact never run there; tcx links of ours run first."""
    node.tcx_in_use = True
    async with following(node) as cilium:
        assert "our programs on clsact never run" in next(cilium.problems())
        monkeypatch.setattr(cilium._datapath.pins, "linked", lambda: {3})
        assert list(cilium.problems()) == []


async def test_what_is_lost_is_not_looked_for_in_a_map_that_is_being_filled(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lacks most of our entries."""
    monkeypatch.setattr(module, "SWEEP_EVERY_S", 0.001)
    installs = Installs()
    async with following(node, installs):
        await until(lambda: installs.looked_for[-2:] == [B1, B2])
        node.pins = {Path("/tc/globals/cilium_ipcache_v2"): 9}
        await until(lambda: node.shown[-1] == [9, 5])
        installs.looked_for.clear()
        await asyncio.sleep(0.05)
        assert installs.looked_for == []
        node.read = frozenset({9})
        await until(lambda: installs.looked_for)


async def test_pinned_map_that_is_left_alone_makes_no_new_one_of_what_programs_read(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was pinned, so there is nothing to count, and no moment at which it was noticed."""
    monkeypatch.setattr(ipcaches, "ORPHAN_AFTER_S", 0.001)
    node.pins = {Path("/tc/globals/cilium_ipcache_v2"): 9}
    async with following(node) as cilium:
        await until(lambda: node.shown[-1] == [5])
        assert "nothing reads the pinned ipcache (map 9)" in next(cilium.problems())
        assert (cilium.recreated_total, cilium.describe()["noticedMs"]) == (0, None)
