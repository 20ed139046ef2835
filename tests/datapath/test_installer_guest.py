"""Our entries and Cilium's in Cilium's maps, in any order, restarts of both included.

On real maps of each layout. Cilium is the stand-in's own writer, which packs its bytes and forgets its map as the real
one does; what it wrote last is the truth that no step of ours may change.
"""

from __future__ import annotations

import contextlib
import ipaddress
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lazymesh.core.model import Entry, Reason, parse_address
from lazymesh.datapath.cilium import TAG
from lazymesh.datapath.installer import Installer
from lazymesh.datapath.journal import Journal
from lazymesh.datapath.kernelfeatures import kernel_honours_noexist
from lazymesh.datapath.libbpf import MAP_TYPE_HASH, Map, MapLayout
from tests.support.cilium_ipcache import V1, V2, Layout, Record, Writer, pack_value, unpack_key
from tests.support.installs import installs_of
from tests.support.mortal import Crash, Fuse, MortalIpcache, MortalJournal

NODE, HOST = ("192.168.100.1",), "192.168.100.2"
PEERS = ("10.2.0.5", "10.2.0.6", "fd00:10:2::5")
CIDRS = ("10.2.0.0/24", "0.0.0.0/0")
IDENTITIES = (131_073, 131_074)
KINDS: dict[str, tuple[Layout, int]] = {"v1": (V1, 1), "v2": (V2, 1), "v2-readonly": (V2, 129)}
MOST = 3
CLUSTER = 2
_TAG_BYTES = struct.pack("=H", TAG)

Table = dict[str, bytes]


class CiliumMap:
    """A map of Cilium's: what it wrote there, and what is there."""

    def __init__(
        self, layout: Layout, flags: int, fuse: Fuse | None = None, *, size: int = 64, honours: bool = True
    ) -> None:
        self.raw = layout.create(size, flags)
        self.theirs: Table = {}
        self.ours = MortalIpcache(self.raw, Path("/the/ipcache"), fuse or Fuse(), TAG, honours=honours)

    def read(self) -> Table:
        """Return everything in the map, by prefix."""
        return {unpack_key(key): value for key, value in self.raw.items()}

    def tagged(self) -> Table:
        """Return what is tagged as ours."""
        return {prefix: value for prefix, value in self.read().items() if value[-4:-2] == _TAG_BYTES}


class Interleavings(RuleBasedStateMachine):
    """Cilium's agent, ours, and what each believes."""

    layout, flags = V2, 129
    peers, identities = st.sampled_from(PEERS), st.sampled_from(IDENTITIES)
    batches = st.dictionaries(peers, identities, min_size=1)

    @initialize()
    def begin(self) -> None:
        """Both agents start; Cilium's knows routes only."""
        self.world: dict[str, Record] = {cidr: Record(2, HOST) for cidr in CIDRS}
        self.maps: list[CiliumMap] = []
        self.fuse = Fuse()
        self.raw_journal = Map.create("lm_test", MapLayout(MAP_TYPE_HASH, 24, 56, 64, 0))
        self.believed: dict[str, Entry] = {}
        """What our resolver keeps watching."""
        self.cilium_restarts()
        self.fill(len(CIDRS))
        self.we_start()

    # What Cilium does.

    def cilium_restarts(self) -> None:
        """Make a new map; what the world says waits to be listed."""
        self.maps.insert(0, CiliumMap(self.layout, self.flags, self.fuse))
        self.writer = Writer(self.layout, NODE, [])
        self.writer.use(self.maps[0].raw)
        self.queue: list[tuple[str, Record | None]] = sorted(self.world.items())

    @rule(prefix=peers, identity=identities | st.just(2), host=st.sampled_from((HOST, NODE[0])))
    def upsert(self, prefix: str, identity: int, host: str) -> None:
        """A record comes, or changes; while a listing is under way it waits behind it."""
        self.world[prefix] = Record(identity, host)
        self.queue.append((prefix, self.world[prefix]))
        if len(self.queue) == 1:
            self.fill(1)

    @rule(prefix=peers)
    def delete(self, prefix: str) -> None:
        """A record goes."""
        self.world.pop(prefix, None)
        self.queue.append((prefix, None))
        if len(self.queue) == 1:
            self.fill(1)

    @rule(count=st.integers(1, 4))
    def fill(self, count: int) -> None:
        """Write some of what waits."""
        part, self.queue = self.queue[:count], self.queue[count:]
        for prefix, record in part:
            theirs = self.maps[0].theirs
            if record is None:
                if self.writer.delete(prefix):
                    theirs.pop(prefix, None)
            elif self.writer.upsert(prefix, record):
                theirs[prefix] = pack_value(self.layout, record, NODE)

    @precondition(lambda self: len(self.maps) < MOST)
    @rule()
    def restart(self) -> None:
        """Start again; our agent sees it, and carries its entries over."""
        self.cilium_restarts()
        self.installer.use([one.ours for one in self.maps])
        for address in self.installer.owned_addresses():
            if self.installer.owns(address) and self.installer.carry_over(address) is not None:
                self.believed.pop(_text(address))

    @precondition(lambda self: len(self.maps) > 1)
    @rule()
    def switch(self) -> None:
        """Its programs let go of the oldest map; once there is but one, our agent lets go of what is not its own."""
        self.maps.pop().raw.close()
        self.installer.use([one.ours for one in self.maps])
        self.sweep()

    # What we do.

    @rule(prefix=peers, identity=identities)
    def install(self, prefix: str, identity: int) -> None:
        """A miss, or a watch, brought a record."""
        entry = Entry(identity, parse_address(HOST), 0, 2)
        self.heed(prefix, entry, self.installer.install(parse_address(prefix), entry, CLUSTER))

    @rule(identity_of=batches)
    def install_many(self, identity_of: dict[str, int]) -> None:
        """Records of several came together: each ends as it would have by itself."""
        installs = [
            (parse_address(prefix), Entry(identity, parse_address(HOST), 0, 2), CLUSTER)
            for prefix, identity in identity_of.items()
        ]
        reasons = self.installer.install_many(installs_of(installs))
        for prefix, (_, entry, _), reason in zip(identity_of, installs, reasons, strict=True):
            self.heed(prefix, entry, reason)

    def heed(self, prefix: str, entry: Entry, reason: Reason | None) -> None:
        """Believe what an installation came to, as the resolver does."""
        if reason is None:
            self.believed[prefix] = entry
        else:
            assert reason in (Reason.TAKEN, Reason.NOT_OURS)
            assert prefix in self.maps[0].theirs, "refused without a reason"
            self.believed.pop(prefix, None)

    @rule(identity_of=batches, write=st.integers(0, 4))
    def die_installing_many(self, identity_of: dict[str, int], write: int) -> None:
        """Our agent is killed in the middle of it, and starts again."""
        self.fuse.left = write
        with contextlib.suppress(Crash):
            self.install_many(identity_of)
        self.fuse.left = None
        self.we_start()

    @rule(prefix=peers)
    def evict(self, prefix: str) -> None:
        """The record was deleted, or the budget is spent."""
        self.installer.evict(parse_address(prefix))
        self.believed.pop(prefix, None)

    @rule()
    def sweep(self) -> None:
        """Look for what is no longer ours, as the agent does once there is only one map."""
        if len(self.maps) > 1:
            return
        for address in self.installer.owned_addresses():
            if self.installer.is_lost(address):
                self.installer.forget(address)
                self.believed.pop(_text(address))
        assert set(self.maps[0].tagged()) == set(self.believed)

    @rule()
    def we_start(self) -> None:
        """Our agent is killed, and starts again with what is pinned."""
        journal = MortalJournal(self.raw_journal, self.fuse)
        self.installer = Installer(
            [one.ours for one in self.maps], journal, honours_noexist=kernel_honours_noexist(), shared=True
        )
        self.believed = {_text(address): entry for address, entry, _ in self.installer.adopt()}

    @precondition(lambda self: len(self.maps) < MOST)
    @rule()
    def both_restart(self) -> None:
        """The new map was pinned while our agent did not run."""
        self.cilium_restarts()
        self.we_start()

    # What must hold.

    @invariant()
    def nothing_of_ciliums_is_changed_or_removed(self) -> None:
        """Byte for byte."""
        for one in self.maps:
            stands = one.read()
            assert {prefix: stands.get(prefix) for prefix in one.theirs} == one.theirs

    @invariant()
    def nothing_of_ours_is_stale(self) -> None:
        """What carries our tag is what the resolver believes, and is watched by it."""
        for one in self.maps:
            for prefix, value in one.tagged().items():
                assert prefix in self.believed, "left behind"
                assert struct.unpack_from("=I", value)[0] == self.believed[prefix].identity

    @invariant()
    def every_crash_would_find_what_is_ours(self) -> None:
        """The journal covers all of ours in the map that Cilium writes."""
        lines = {_text(address) for address, _ in Journal(self.raw_journal).items()}
        assert set(self.maps[0].tagged()) <= lines

    def teardown(self) -> None:
        """Let the maps go."""
        for one in self.maps:
            one.raw.close()
        self.raw_journal.close()


def _text(address: bytes) -> str:
    return str(ipaddress.ip_address(address))


@pytest.mark.parametrize("kind", KINDS)
def test_any_interleaving(kind: str) -> None:
    """A thousand of them in all."""
    machine = type(kind, (Interleavings,), dict(zip(("layout", "flags"), KINDS[kind], strict=True)))
    case = machine.TestCase
    case.settings = settings(
        max_examples=334, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
    )
    case("runTest").runTest()


class Node:
    """Cilium's maps and our agent over them, which may restart."""

    def __init__(self, *, honours: bool | None = None) -> None:
        """Honours: whether inserts never replace; None: as on this kernel."""
        self.honours = kernel_honours_noexist() if honours is None else honours
        self.maps = [CiliumMap(V2, 129, honours=self.honours)]
        self.journal = Map.create("lm_test", MapLayout(MAP_TYPE_HASH, 24, 56, 64, 0))
        self.start()

    def start(self) -> list[bytes]:
        """Begin another life; return what it takes over."""
        maps = [one.ours for one in self.maps]
        self.installer = Installer(maps, Journal(self.journal), self.honours, shared=True)
        return [address for address, _, _ in self.installer.adopt()]

    def use(self, *maps: CiliumMap) -> None:
        """Let other maps count."""
        self.maps = list(maps)
        self.installer.use([one.ours for one in maps])


PEER = parse_address(PEERS[0])
FIRST, SECOND = (Entry(identity, parse_address(HOST), 0, 2) for identity in IDENTITIES)


def test_what_cilium_writes_while_we_write_the_journal_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """We looked before that: our entry is replaced only if it is still there."""
    node = Node()
    writer = Writer(V2, NODE, [])
    writer.use(node.maps[0].raw)
    node.installer.install(PEER, FIRST, CLUSTER)
    write = Journal.write

    def slowly(*words: Any) -> None:
        write(*words)
        writer.upsert(PEERS[0], Record(IDENTITIES[0], HOST))

    monkeypatch.setattr(Journal, "write", slowly)
    assert node.installer.install(PEER, SECOND, CLUSTER) is Reason.TAKEN
    assert node.maps[0].tagged() == {}
    assert set(node.maps[0].read()) == {PEERS[0]}
    assert not node.installer.owns(PEER)


def test_what_no_line_stands_for_goes_at_the_next_start() -> None:
    """The journal may be lost: with its directory, as advised when another version made it."""
    node = Node()
    node.installer.install(PEER, FIRST, CLUSTER)
    theirs = node.maps[0]
    writer = Writer(V2, NODE, [])
    writer.use(theirs.raw)
    writer.upsert(PEERS[1], Record(IDENTITIES[0], HOST))
    node.journal = Map.create("lm_test", MapLayout(MAP_TYPE_HASH, 24, 56, 64, 0))
    maps = [one.ours for one in node.maps]
    assert Installer(
        maps, Journal(node.journal), honours_noexist=kernel_honours_noexist(), shared=True
    ).has_leftovers()
    assert node.start() == []
    assert not node.installer.has_leftovers()
    assert set(theirs.read()) == {PEERS[1]}


def test_entry_is_carried_into_a_map_that_came_while_no_agent_ran() -> None:
    """Programs that still read the old one keep it meanwhile; where Cilium has written, its entry stays."""
    node = Node()
    other = parse_address(PEERS[1])
    for address in (PEER, other):
        node.installer.install(address, FIRST, CLUSTER)
    fresh, old = CiliumMap(V2, 129), node.maps[0]
    writer = Writer(V2, NODE, [])
    writer.use(fresh.raw)
    writer.upsert(PEERS[1], Record(IDENTITIES[1], HOST))
    node.maps = [fresh, old]
    assert set(node.start()) == {PEER, other}
    assert set(fresh.tagged()) == {PEERS[0]}
    assert set(old.tagged()) == set(PEERS[:2])


def test_entry_that_is_old_in_a_map_that_counts_again_is_brought_up_to_date() -> None:
    """Programs may take up a pinned map after all."""
    node = Node()
    orphan, read = node.maps[0], CiliumMap(V2, 129)
    node.installer.install(PEER, FIRST, CLUSTER)
    node.use(read)
    node.installer.carry_over(PEER)
    node.installer.install(PEER, SECOND, CLUSTER)
    node.use(orphan, read)
    assert node.installer.carry_over(PEER) is None
    assert orphan.tagged() == read.tagged() != {}


def test_old_map_says_what_the_first_one_does_after_a_crash_between_the_two() -> None:
    """With the bits that its own layout has: the first one is of a Cilium that was rolled back."""
    node, fuse = Node(), Fuse()
    fresh, old = CiliumMap(V1, 1, fuse), CiliumMap(V2, 129)
    node.use(fresh, old)
    node.installer.install(PEER, FIRST, CLUSTER)
    before = old.read()
    fuse.left = 0
    with pytest.raises(Crash):
        node.installer.install(PEER, SECOND, CLUSTER)
    fuse.left = None
    assert old.read() != before
    assert node.start() == [PEER]
    assert old.read() == before


def test_map_that_does_not_count_any_more_keeps_nothing_of_ours() -> None:
    """And everything of Cilium's."""
    node = Node()
    left = node.maps[0]
    node.installer.install(PEER, FIRST, CLUSTER)
    node.use(CiliumMap(V2, 129))
    writer = Writer(V2, NODE, [])
    writer.use(left.raw)
    writer.upsert(PEERS[1], Record(IDENTITIES[0], HOST))
    for prefix in PEERS[:2]:
        node.installer.withdraw(left.ours, parse_address(prefix))
    assert set(left.read()) == {PEERS[1]}


def test_entry_is_put_into_every_map_that_counts_and_removed_from_each() -> None:
    """Programs of Cilium's read any of them."""
    node = Node()
    node.use(*(CiliumMap(layout, flags) for layout, flags in KINDS.values()))
    for entry in (FIRST, SECOND):
        assert node.installer.install(PEER, entry, CLUSTER) is None
        assert [one.ours.lookup(PEER) for one in node.maps] == [
            one.ours.as_read_back(entry) for one in node.maps
        ]
        assert [set(one.tagged()) for one in node.maps] == [{PEERS[0]}] * 3
    assert node.installer.evict(PEER)
    assert [one.read() for one in node.maps] == [{}] * 3


@pytest.mark.parametrize(
    "honours",
    [
        pytest.param(True, id="kernel with BPF_NOEXIST", marks=pytest.mark.needs("BPF_NOEXIST")),
        pytest.param(False, id="kernel without"),
    ],
)
def test_what_cilium_wrote_into_an_old_map_stands_whatever_becomes_of_ours(honours: bool) -> None:
    """Ours is in the other two."""
    node = Node(honours=honours)
    node.use(*(CiliumMap(V2, 129, honours=honours) for _ in range(3)))
    old = node.maps[1]
    writer = Writer(V2, NODE, [])
    writer.use(old.raw)
    writer.upsert(PEERS[0], Record(IDENTITIES[0], HOST))
    theirs = old.read()
    for entry in (FIRST, SECOND):
        assert node.installer.install(PEER, entry, CLUSTER) is None
        assert [set(one.tagged()) for one in node.maps] == [{PEERS[0]}, set(), {PEERS[0]}]
        assert old.read() == theirs
    assert node.installer.evict(PEER)
    assert [one.read() for one in node.maps] == [{}, theirs, {}]


def test_entry_without_room_in_the_first_map_is_in_no_old_one() -> None:
    """It is not ours, so nothing would keep it true."""
    node = Node()
    node.use(*(CiliumMap(V2, 129) for _ in range(3)))
    node.installer.crowded = True
    assert node.installer.install(PEER, FIRST, CLUSTER) is Reason.MAP_FULL
    assert [one.read() for one in node.maps] == [{}] * 3


def test_entry_that_an_old_map_has_no_room_for_is_in_the_others() -> None:
    """Only what still reads that one misses."""
    node = Node()
    node.use(*(CiliumMap(V2, 129, size=size) for size in (64, 1, 64)))
    writer = Writer(V2, NODE, [])
    writer.use(node.maps[1].raw)
    writer.upsert(PEERS[1], Record(IDENTITIES[0], HOST))
    assert node.installer.install(PEER, FIRST, CLUSTER) is None
    assert [set(one.tagged()) for one in node.maps] == [{PEERS[0]}, set(), {PEERS[0]}]
