"""Our entries and another writer's in one map: theirs are never touched, ours are never forgotten.

On real maps, on a kernel that honours BPF_NOEXIST and (by a wrapper) on one that ignores it. A crash is an exception
before a write; what follows is another life that has nothing but the pinned maps.
"""

from __future__ import annotations

import contextlib
import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lazymesh.core.events import Install
from lazymesh.core.model import Address, Entry, Reason, parse_address
from lazymesh.datapath import abi
from lazymesh.datapath.installer import Installer
from lazymesh.datapath.kernelfeatures import kernel_honours_noexist
from lazymesh.datapath.libbpf import BPF_F_NO_PREALLOC, MAP_TYPE_HASH, MAP_TYPE_LPM_TRIE, Map, MapLayout
from lazymesh.errors import DatapathError
from tests.datapath.conftest import key_of
from tests.support import packets
from tests.support.installs import installs_of
from tests.support.mortal import Crash, Fuse, MortalIpcache, MortalJournal
from tests.support.packets import NODE_B, POD_B1, POD_B2

if TYPE_CHECKING:
    from collections.abc import Iterator

ENDPOINT = NODE_B.address(4)
OURS = [Entry(131_073 + number, ENDPOINT, 0, 2) for number in range(3)]
THEIRS = [Entry(140_000 + number, ENDPOINT, 0, 2) for number in range(3)]
ROUTE, FALLBACK = Entry(2), Entry(2, ENDPOINT, 0, 2)
B1, B2 = POD_B1.address(4), POD_B2.address(4)
CLUSTER = 2
KERNELS = [
    pytest.param(True, id="kernel with BPF_NOEXIST", marks=pytest.mark.needs("BPF_NOEXIST")),
    pytest.param(False, id="kernel without"),
]


class World:
    """Pinned maps, one agent after the other, and another writer."""

    def __init__(self, honours: bool, size: int = 64, journal_size: int = 64) -> None:
        self.honours = honours
        self.fuse = Fuse()
        layouts = (
            MapLayout(MAP_TYPE_LPM_TRIE, 24, 24, size, BPF_F_NO_PREALLOC),
            MapLayout(MAP_TYPE_HASH, 24, 56, journal_size, 0),
        )
        self.raw, self.raw_journal = (Map.create("lm_test", layout) for layout in layouts)
        self.ipcache = MortalIpcache(self.raw, Path("/the/ipcache"), self.fuse, honours=honours)
        self.journal = MortalJournal(self.raw_journal, self.fuse)
        self.installer = Installer([self.ipcache], self.journal, honours)

    def close(self) -> None:
        """Let the maps go."""
        self.raw.close()
        self.raw_journal.close()

    def they_write(self, prefix: str, entry: Entry) -> None:
        """Write any prefix as the other writer."""
        self.raw.update(key_of(prefix), abi.pack_entry(entry))

    def they_delete(self, prefix: str) -> None:
        """Delete any prefix as the other writer."""
        self.raw.delete(key_of(prefix))

    def exact(self) -> dict[str, Entry]:
        """Return what is in the map, by prefix."""
        return {str(network): standing.entry for network, _, standing in self.ipcache.items()}

    def lines(self) -> dict[Address, abi.OwnedEntry]:
        """Return the journal."""
        return dict(self.journal.items())

    def restart(self) -> dict[Address, Entry]:
        """Begin another life; returns what it takes for its own."""
        self.fuse.left = None
        self.installer = Installer([self.ipcache], self.journal, self.honours)
        return {address: entry for address, entry, _ in self.installer.adopt()}


@pytest.fixture(params=KERNELS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """Return a world with a default route and a node's pod CIDR, as Cilium has them."""
    made = World(request.param)
    made.they_write(packets.WORLD[4], ROUTE)
    made.they_write(packets.NODE_PODS_OF_B[4], FALLBACK)
    yield made
    made.close()


BACKGROUND = {packets.WORLD[4]: ROUTE, packets.NODE_PODS_OF_B[4]: FALLBACK}


class TestInstall:
    """New, in place of ours, and where another writer's is."""

    def test_new_entry_goes_over_world_and_is_ours(self, world: World) -> None:
        """In the map and in the journal; the entries around it stay."""
        assert world.installer.install(B1, OURS[0], CLUSTER) is None
        assert world.exact() == BACKGROUND | {POD_B1.prefix(4): OURS[0]}
        assert world.lines()[B1].entry == OURS[0]
        assert world.lines()[B1].cluster_id == CLUSTER
        assert len(world.installer.owned_addresses()) == 1

    def test_ours_is_replaced_by_ours(self, world: World) -> None:
        """The pod's address was given to another: one entry, the new one."""
        for entry in (OURS[0], OURS[1], OURS[1], OURS[2]):
            assert world.installer.install(B1, entry, CLUSTER) is None
            assert world.exact()[POD_B1.prefix(4)] == entry
        assert len(world.installer.owned_addresses()) == 1

    @pytest.mark.parametrize("theirs", [THEIRS[0], OURS[0]], ids=["another value", "the very same value"])
    def test_theirs_is_left_alone(self, world: World, theirs: Entry) -> None:
        """Whatever we would write, however equal: not ours to replace, nor to evict later."""
        world.they_write(POD_B1.prefix(4), theirs)
        assert world.installer.install(B1, OURS[0], CLUSTER) is Reason.NOT_OURS
        assert not world.installer.evict(B1)
        assert world.exact() == BACKGROUND | {POD_B1.prefix(4): theirs}
        assert world.lines() == {}
        assert len(world.installer.owned_addresses()) == 0

    @pytest.mark.parametrize("theirs", [THEIRS[0], OURS[0]], ids=["another value", "the very same value"])
    def test_theirs_among_many_is_left_alone(self, world: World, theirs: Entry) -> None:
        """It was written after the address had missed; the others are installed."""
        world.they_write(POD_B1.prefix(4), theirs)
        reasons = world.installer.install_many([Install([B1, B2], OURS[0], CLUSTER)])
        assert reasons == [Reason.NOT_OURS, None]
        assert world.exact() == BACKGROUND | {POD_B1.prefix(4): theirs, POD_B2.prefix(4): OURS[0]}
        assert set(world.lines()) == {B2}
        assert not world.installer.evict(B1)

    def test_theirs_that_took_the_place_of_ours_is_left_alone(self, world: World) -> None:
        """The agent learnt of the pod after all: it knows better, and we forget ours."""
        world.installer.install(B1, OURS[0], CLUSTER)
        world.they_write(POD_B1.prefix(4), THEIRS[0])
        assert world.installer.install(B1, OURS[1], CLUSTER) is Reason.NOT_OURS
        assert world.exact()[POD_B1.prefix(4)] == THEIRS[0]
        assert world.lines() == {}
        assert len(world.installer.owned_addresses()) == 0

    def test_ours_that_they_deleted_is_written_again(self, world: World) -> None:
        """A deletion of theirs is not a claim."""
        world.installer.install(B1, OURS[0], CLUSTER)
        world.they_delete(POD_B1.prefix(4))
        assert world.installer.install(B1, OURS[1], CLUSTER) is None
        assert world.exact()[POD_B1.prefix(4)] == OURS[1]

    def test_empty_map_takes_an_entry(self, world: World) -> None:
        """Standalone there may be nothing at all to look up."""
        for prefix in BACKGROUND:
            world.they_delete(prefix)
        assert world.installer.install(B1, OURS[0], CLUSTER) is None
        assert world.installer.install(POD_B1.address(6), OURS[0], CLUSTER) is None
        assert len(world.installer.owned_addresses()) == 2


@pytest.mark.needs("BPF_NOEXIST")
def test_exact_world_entry_of_theirs_is_left_alone() -> None:
    """Where the kernel honours BPF_NOEXIST even an entry that says world is told from a route."""
    world = World(honours=True)
    world.they_write(POD_B1.prefix(4), ROUTE)
    assert world.installer.install(B1, OURS[0], CLUSTER) is Reason.NOT_OURS
    assert world.exact() == {POD_B1.prefix(4): ROUTE}
    assert world.lines() == {}
    world.close()


def test_without_noexist_every_identity_is_taken_for_theirs() -> None:
    """A CIDR policy's prefix may be a /32 or not: the lookup cannot tell, so it is left alone."""
    world = World(honours=False)
    world.they_write("10.2.0.0/24", Entry(0x0100_0001))
    assert world.installer.install(B1, OURS[0], CLUSTER) is Reason.NOT_OURS
    assert world.exact() == {"10.2.0.0/24": Entry(0x0100_0001)}
    world.close()


class TestEvict:
    """Only what is ours, and still as we wrote it."""

    def test_ours_goes_and_its_line_too(self, world: World) -> None:
        """And the routes around it answer again."""
        world.installer.install(B1, OURS[0], CLUSTER)
        assert world.installer.evict(B1)
        assert world.exact() == BACKGROUND
        assert world.lines() == {}
        assert len(world.installer.owned_addresses()) == 0
        assert not world.installer.evict(B1)

    def test_theirs_stays(self, world: World) -> None:
        """Never ours, or no longer ours."""
        world.they_write(POD_B2.prefix(4), THEIRS[1])
        world.installer.install(B1, OURS[0], CLUSTER)
        world.they_write(POD_B1.prefix(4), THEIRS[0])
        assert not world.installer.evict(B1)
        assert not world.installer.evict(B2)
        assert world.exact() == BACKGROUND | {POD_B1.prefix(4): THEIRS[0], POD_B2.prefix(4): THEIRS[1]}
        assert world.lines() == {}

    def test_entry_that_is_gone_from_under_a_shorter_prefix_is_not_said_to_be_removed(
        self, world: World
    ) -> None:
        """What a lookup finds then has the same value, in a map without tags."""
        world.installer.install(B1, OURS[0], CLUSTER)
        covering = str(ipaddress.ip_interface(f"{POD_B1.v4}/28").network)
        world.they_write(covering, OURS[0])
        world.they_delete(POD_B1.prefix(4))
        added = world.installer.added
        assert not world.installer.evict(B1)
        assert world.installer.added == added
        assert world.exact() == BACKGROUND | {covering: OURS[0]}
        assert world.lines() == {}

    def test_gone_already_is_no_error(self, world: World) -> None:
        """It was deleted: nothing to do but to forget it."""
        world.installer.install(B1, OURS[0], CLUSTER)
        world.they_delete(POD_B1.prefix(4))
        assert not world.installer.evict(B1)
        assert world.lines() == {}


@pytest.mark.parametrize("honours", KERNELS)
class TestNoRoom:
    """A map is full, or a write fails: nothing is half there."""

    def test_full_ipcache_leaves_no_line(self, honours: bool) -> None:
        """The address stays unresolved, and is not claimed later."""
        world = World(honours, size=1)
        world.they_write(packets.WORLD[4], ROUTE)
        assert world.installer.install(B1, OURS[0], CLUSTER) is Reason.MAP_FULL
        assert world.lines() == {}
        assert len(world.installer.owned_addresses()) == 0
        assert world.restart() == {}
        world.close()

    def test_full_journal_leaves_no_entry(self, honours: bool) -> None:
        """What we could not write down we must not install."""
        world = World(honours, journal_size=1)
        assert world.installer.install(B1, OURS[0], CLUSTER) is None
        assert world.installer.install(B2, OURS[1], CLUSTER) is Reason.MAP_FULL
        assert world.exact() == {POD_B1.prefix(4): OURS[0]}
        assert len(world.installer.owned_addresses()) == 1
        world.close()

    def test_failed_write_of_a_new_entry_leaves_nothing(
        self, honours: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The reason is returned, ownership is not claimed."""
        world = World(honours)
        with monkeypatch.context() as broken:
            broken.setattr(world.ipcache, "insert", _refuse)
            assert world.installer.install(B1, OURS[0], CLUSTER) is Reason.INSTALL_FAILED
        assert (world.exact(), world.lines(), len(world.installer.owned_addresses())) == ({}, {}, 0)
        assert world.installer.install(B1, OURS[0], CLUSTER) is None
        world.close()

    def test_failed_replacement_keeps_the_old_entry_ours(
        self, honours: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is still there, so this agent or the next must evict it one day."""
        world = World(honours)
        world.installer.install(B1, OURS[0], CLUSTER)
        with monkeypatch.context() as broken:
            broken.setattr(world.ipcache, "replace", _refuse)
            assert world.installer.install(B1, OURS[1], CLUSTER) is Reason.INSTALL_FAILED
        assert len(world.installer.owned_addresses()) == 1
        assert world.restart() == {B1: OURS[0]}
        assert world.installer.evict(B1)
        assert (world.exact(), world.lines()) == ({}, {})
        world.close()


def test_no_more_goes_in_than_there_was_room_for_when_the_map_was_counted(world: World) -> None:
    """Until it is counted again, which is requested; removing ours makes room, replacing takes none."""
    told: list[None] = []
    installer = world.installer
    installer.on_full = lambda: told.append(None)
    installer.added_most = 2
    first, second, third, fourth = (bytes([10, 2, 9, number]) for number in range(4))
    for address in (first, second):
        assert installer.install(address, OURS[0], CLUSTER) is None
    assert installer.install(first, OURS[1], CLUSTER) is None
    assert told == []
    assert installer.install(third, OURS[0], CLUSTER) is Reason.MAP_FULL
    assert (len(told), third in world.lines()) == (1, False)
    assert installer.evict(first)
    assert installer.install_many([Install([third, fourth], OURS[0], CLUSTER)]) == [None, Reason.MAP_FULL]
    installer.added_most = 3
    assert installer.install_many([Install([fourth], OURS[0], CLUSTER)]) == [None]
    assert installer.added == len(installer.owned_addresses()) == 3


def test_only_what_is_added_takes_room_and_only_what_is_removed_makes_it(world: World) -> None:
    """Another writer removes the first entry, which a prefix of its own equals, and replaces the second."""
    third, fourth, fifth = (f"10.2.9.{number}" for number in range(3))
    world.they_write(f"{third}/32", THEIRS[0])
    world.they_write(f"{fourth}/32", THEIRS[0])
    installs = [(parse_address(text), OURS[0], CLUSTER) for text in (third, fourth, fifth)]
    assert world.installer.install(*installs[0]) is Reason.NOT_OURS
    assert world.installer.install_many(installs_of(installs[1:])) == [Reason.NOT_OURS, None]
    for address in (B1, B2):
        assert world.installer.install(address, OURS[0], CLUSTER) is None
    assert world.installer.added == 3
    world.they_delete(POD_B1.prefix(4))
    world.they_write(packets.NODE_PODS_OF_B[4], OURS[0])
    world.they_write(POD_B2.prefix(4), THEIRS[0])
    for address in (B1, B2, POD_B1.address(6)):
        world.installer.evict(address)
    assert world.installer.added == 3
    assert world.installer.evict(installs[2][0])
    assert world.installer.added == 2


def _refuse(*_: object) -> bool:
    raise DatapathError("the kernel refused")


class TestAdopt:
    """Another life takes over."""

    def test_everything_that_stands_is_taken_over(self, world: World) -> None:
        """Address, entry and cluster; both families."""
        expected = {B1: (OURS[0], 2), B2: (OURS[1], 3), POD_B1.address(6): (OURS[2], 0)}
        for address, (entry, cluster_id) in expected.items():
            world.installer.install(address, entry, cluster_id)
        fresh = Installer([world.ipcache], world.journal, world.honours)
        assert {address: (entry, cluster) for address, entry, cluster in fresh.adopt()} == expected
        assert len(fresh.owned_addresses()) == 3
        assert all(fresh.evict(address) for address in expected)
        assert world.exact() == BACKGROUND

    def test_what_is_gone_or_theirs_is_struck_out(self, world: World) -> None:
        """Meanwhile one was deleted, one replaced, and one of theirs was never ours."""
        for address in (B1, B2):
            world.installer.install(address, OURS[0], CLUSTER)
        world.they_delete(POD_B1.prefix(4))
        world.they_write(POD_B2.prefix(4), THEIRS[0])
        world.they_write(POD_B1.prefix(6), THEIRS[1])
        assert world.restart() == {}
        assert world.lines() == {}
        assert world.exact() == BACKGROUND | {POD_B2.prefix(4): THEIRS[0], POD_B1.prefix(6): THEIRS[1]}

    def test_recreated_map_has_nothing_of_ours(self, world: World) -> None:
        """Cilium makes a new map at each start: the journal outlives the entries."""
        world.installer.install(B1, OURS[0], CLUSTER)
        recreated = World(world.honours)
        world.ipcache = recreated.ipcache
        assert world.restart() == {}
        assert world.lines() == {}
        recreated.close()


BEFORE = {
    "nothing stands there": (),
    "ours stands there": ("ours",),
    "theirs stands there": ("theirs",),
    "theirs stands there, equal to the new one": ("equal",),
    "theirs took the place of ours": ("ours", "theirs"),
    "ours was deleted": ("ours", "deleted"),
}


@pytest.mark.parametrize("write", range(5), ids=lambda n: f"before write {n + 1}")
@pytest.mark.parametrize("action", ["install", "evict"])
@pytest.mark.parametrize("before", BEFORE)
def test_crash_at_any_write_loses_no_ownership(world: World, before: str, action: str, write: int) -> None:
    """The next agent owns exactly our entries in the map, and theirs are unchanged."""
    for step in BEFORE[before]:
        if step == "ours":
            world.installer.install(B1, OURS[0], CLUSTER)
        elif step == "deleted":
            world.they_delete(POD_B1.prefix(4))
        else:
            world.they_write(POD_B1.prefix(4), THEIRS[0] if step == "theirs" else OURS[1])
    theirs = BEFORE[before][-1:] in (("theirs",), ("equal",))
    stood = world.exact().get(POD_B1.prefix(4))

    world.fuse.left = write
    try:
        if action == "install":
            world.installer.install(B1, OURS[1], CLUSTER)
        else:
            world.installer.evict(B1)
    except Crash:
        pass
    adopted = world.restart()

    stands = world.exact().get(POD_B1.prefix(4))
    if theirs:
        assert stands == stood
        assert adopted == {}
    else:
        assert stands in (None, *OURS)
        assert adopted == ({B1: stands} if stands else {})
    assert set(world.lines()) == set(adopted)
    assert world.installer.evict(B1) is (B1 in adopted)
    assert world.exact() == BACKGROUND | ({POD_B1.prefix(4): stood} if theirs else {})


PEERS = [POD_B1, POD_B2, packets.POD_A2]


class Lives(RuleBasedStateMachine):
    """Any order of installs, evictions, foreign writes and crashes, against a model of who wrote what.

    Our values and theirs are different, so the map itself shows whose an entry is.
    """

    peers = st.sampled_from(PEERS)
    ours = st.sampled_from(OURS)

    @initialize(honours=st.booleans())
    def begin(self, honours: bool) -> None:
        """Start with routes only."""
        self.world = World(honours and kernel_honours_noexist())
        self.theirs: dict[str, Entry] = {}
        for prefix, entry in BACKGROUND.items():
            self.they_write_a_prefix(prefix, entry)

    def they_write_a_prefix(self, prefix: str, entry: Entry) -> None:
        """Write and remember."""
        self.world.they_write(prefix, entry)
        self.theirs[prefix] = entry

    @rule(peer=peers, entry=st.sampled_from(THEIRS))
    def they_write(self, peer: packets.Host, entry: Entry) -> None:
        """The other writer learns of a pod."""
        self.they_write_a_prefix(peer.prefix(4), entry)

    @rule(peer=peers)
    def they_delete(self, peer: packets.Host) -> None:
        """The other writer deletes a pod, whoever wrote it."""
        self.world.they_delete(peer.prefix(4))
        self.theirs.pop(peer.prefix(4), None)

    @rule(peer=peers, entry=ours)
    def install(self, peer: packets.Host, entry: Entry) -> None:
        """We install."""
        reason = self.world.installer.install(peer.address(4), entry, CLUSTER)
        assert reason is (Reason.NOT_OURS if peer.prefix(4) in self.theirs else None)

    @rule(entries=st.dictionaries(peers, ours, max_size=3))
    def install_many(self, entries: dict[packets.Host, Entry]) -> None:
        """We install several at once: each ends as it would have by itself."""
        reasons = self.world.installer.install_many(
            installs_of((peer.address(4), entry, CLUSTER) for peer, entry in entries.items())
        )
        assert reasons == [Reason.NOT_OURS if peer.prefix(4) in self.theirs else None for peer in entries]

    @rule(entries=st.dictionaries(peers, ours, min_size=1, max_size=3), write=st.integers(0, 4))
    def die_installing_many(self, entries: dict[packets.Host, Entry], write: int) -> None:
        """We crash in the middle of it, and live again."""
        self.world.fuse.left = write
        with contextlib.suppress(Crash):
            self.world.installer.install_many(
                installs_of((peer.address(4), entry, CLUSTER) for peer, entry in entries.items())
            )
        self.restart()

    @rule(peer=peers)
    def evict(self, peer: packets.Host) -> None:
        """We evict."""
        stood = self.world.exact().get(peer.prefix(4))
        assert self.world.installer.evict(peer.address(4)) is (stood in OURS)

    @rule(peer=peers, entry=st.one_of(st.none(), ours), write=st.integers(0, 3))
    def die(self, peer: packets.Host, entry: Entry | None, write: int) -> None:
        """We crash while we install or evict, and live again."""
        self.world.fuse.left = write
        try:
            if entry:
                self.world.installer.install(peer.address(4), entry, CLUSTER)
            else:
                self.world.installer.evict(peer.address(4))
        except Crash:
            pass
        self.restart()

    @rule()
    def restart(self) -> None:
        """Restart, and own exactly our entries in the map."""
        adopted = self.world.restart()
        standing = self.world.exact()
        assert adopted == {p.address(4): e for p in PEERS if (e := standing.get(p.prefix(4))) in OURS}
        assert set(self.world.lines()) == set(adopted)
        assert len(self.world.installer.owned_addresses()) == len(adopted)

    @invariant()
    def theirs_is_as_they_wrote_it(self) -> None:
        """Theirs are never touched, and ours are never without a line in the journal."""
        if not hasattr(self, "world"):
            return
        standing = self.world.exact()
        assert {prefix: entry for prefix, entry in standing.items() if entry not in OURS} == self.theirs
        lines = self.world.lines()
        assert all(peer.address(4) in lines for peer in PEERS if standing.get(peer.prefix(4)) in OURS)

    def teardown(self) -> None:
        """Let the maps go."""
        if hasattr(self, "world"):
            self.world.close()


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)
