"""The maps in core terms, on real maps of the kernel's."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from lazymesh.core.model import Direction, Entry, EntryFlag, parse_address
from lazymesh.datapath import abi, libbpf
from lazymesh.datapath.libbpf import BPF_F_NO_PREALLOC, MAP_TYPE_HASH, MAP_TYPE_LPM_TRIE, Map, MapLayout
from lazymesh.datapath.maps import (
    CounterMap,
    DatapathConfig,
    IpcacheMap,
    Journal,
    MeshCidrs,
    OnMiss,
    PolicyMap,
    Standing,
    View,
    kernel_honours_noexist,
    open_map,
    window_of,
)
from lazymesh.errors import DatapathError, MapFullError
from lazymesh.roles.auditing import Auditor
from tests.datapath.conftest import key_of, network_of
from tests.datapath.test_abi_layout import GOLDEN_ENTRIES, GOLDEN_KEYS, tool
from tests.support import packets
from tests.support.bpfobject import map_exists
from tests.support.etcd import wait_until
from tests.support.packets import NODE_B, POD_B1, POD_B2, Flow, pod_of_b

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lazymesh.core.resolver import Resolver
    from tests.datapath.conftest import Bench

HERE = Path("/a/pin")
ENTRY = Entry(131_073, NODE_B.address(4), 0, 2)
OTHER = Entry(131_074, NODE_B.address(4), 3, 2)
B1, B2 = POD_B1.address(4), POD_B2.address(4)


@pytest.fixture
def make_map() -> Iterator[Callable[..., Map]]:
    """Return a function that makes maps which go with the test."""
    made: list[Map] = []

    def make(kind: int, key: int, value: int, size: int = 16, flags: int = BPF_F_NO_PREALLOC) -> Map:
        made.append(Map.create("lm_test", MapLayout(kind, key, value, size, flags)))
        return made[-1]

    yield make
    for opened in made:
        opened.close()


@pytest.fixture
def ipcache(make_map: Callable[..., Map]) -> IpcacheMap:
    """Return a small ipcache of today's layout."""
    return IpcacheMap(make_map(MAP_TYPE_LPM_TRIE, 24, 24), HERE)


class TestIpcache:
    """What the installer and the command line build on."""

    @pytest.mark.parametrize("address", [B1, POD_B1.address(6)], ids=["IPv4", "IPv6"])
    def test_entry_comes_back_as_it_was_written(self, ipcache: IpcacheMap, address: bytes) -> None:
        """Insert, look up, replace, delete: the life of an entry."""
        assert ipcache.lookup(address) is None
        assert ipcache.insert(address, ENTRY)
        assert ipcache.lookup(address) == ENTRY
        ipcache.replace(address, OTHER)
        assert ipcache.lookup(address) == OTHER
        assert ipcache.delete(address)
        assert not ipcache.delete(address)
        assert ipcache.lookup(address) is None

    @pytest.mark.needs("BPF_NOEXIST")
    def test_insert_never_overwrites(self, ipcache: IpcacheMap) -> None:
        """The exact prefix that exists stays as it is."""
        assert ipcache.insert(B1, ENTRY)
        assert not ipcache.insert(B1, OTHER)
        assert ipcache.lookup(B1) == ENTRY

    def test_lookup_is_the_datapath_s_own(self, make_map: Callable[..., Map]) -> None:
        """The longest prefix answers, whichever was written first."""
        raw = make_map(MAP_TYPE_LPM_TRIE, 24, 24)
        ipcache = IpcacheMap(raw, HERE)
        for length, number in ((16, 16), (0, 2), (32, 32), (24, 24)):
            prefix = ipaddress.ip_network(f"{POD_B1.v4}/{length}", strict=False)
            raw.update(abi.pack_network_key(prefix), abi.pack_entry(Entry(number)))
        answers = [ipcache.lookup(parse_address(a)) for a in (POD_B1.v4, "10.2.0.6", "10.2.9.9", "192.0.2.1")]
        assert [answer.identity for answer in answers if answer] == [32, 24, 16, 2]
        assert ipcache.lookup(POD_B1.address(6)) is None

    def test_full_map_says_so(self, make_map: Callable[..., Map]) -> None:
        """New addresses find no room, the ones that are there can still be replaced and removed."""
        ipcache = IpcacheMap(make_map(MAP_TYPE_LPM_TRIE, 24, 24, size=2), HERE)
        assert ipcache.max_entries == 2
        assert ipcache.insert(pod_of_b(1).address(4), ENTRY)
        assert ipcache.insert(pod_of_b(2).address(4), ENTRY)
        for write in (ipcache.insert, ipcache.replace):
            with pytest.raises(MapFullError, match=r"the ipcache map is full \(2 entries\)"):
                write(pod_of_b(3).address(4), ENTRY)
        assert ipcache.delete(pod_of_b(1).address(4))
        assert ipcache.insert(pod_of_b(3).address(4), ENTRY)

    def test_every_prefix_is_listed(self, bench: Bench) -> None:
        """More elements than one batch holds, of both families and every length, each exactly once."""
        expected = {
            pod_of_b(number, version).prefix(version): ENTRY for number in range(6_000) for version in (4, 6)
        }
        expected |= {packets.WORLD[4]: Entry(2), packets.WORLD[6]: Entry(2), packets.PODS_OF_B[6]: OTHER}
        bench.entries(expected)
        listed = list(bench.ipcache.items())
        assert bench.ipcache.count() == len(expected)
        assert len(listed) == len(expected)
        assert {network: standing.entry for network, _, standing in listed} == {
            network_of(p): e for p, e in expected.items()
        }
        assert {cluster_id for _, cluster_id, _ in listed} == {0}

    def test_old_map_is_read_and_written_in_its_own_layout(self, make_map: Callable[..., Map]) -> None:
        """Cilium up to 1.17: twelve-byte values, more of them than one batch holds; no bits, no IPv6 endpoint."""
        raw = make_map(MAP_TYPE_LPM_TRIE, 24, 12, size=6_000)
        ipcache = IpcacheMap(raw, HERE)
        endpoint = tuple(NODE_B.address(4))
        value = bytes(abi.IpcacheEntryV1(sec_identity=131_073, tunnel_endpoint=endpoint, encrypt_key=9))
        raw.update_many([(key_of(pod_of_b(number).prefix(4)), value) for number in range(5_000)])

        expected = Entry(131_073, NODE_B.address(4), 9)
        assert ipcache.lookup(pod_of_b(7).address(4)) == expected
        listed = {network: standing.entry for network, _, standing in ipcache.items()}
        assert listed == {network_of(pod_of_b(number).prefix(4)): expected for number in range(5_000)}
        assert ipcache.view is View.V1
        entry = Entry(131_073, bytes.fromhex("ac120002"), 0, EntryFlag.HAS_TUNNEL_EP)
        six = Entry(131_073, bytes(16), 3, EntryFlag.HAS_TUNNEL_EP | EntryFlag.IPV6_TUNNEL_EP)
        ipcache.replace(B1, entry)
        assert raw.lookup(abi.pack_address_key(B1)) == bytes.fromhex("01000200 ac120002 0000 00 00")
        assert ipcache.lookup(B1) == ipcache.as_read_back(entry) == Entry(131_073, entry.tunnel_endpoint)
        ipcache.replace(B1, six)
        assert raw.lookup(abi.pack_address_key(B1)) == bytes.fromhex("01000200 00000000 0000 03 00")

    @pytest.mark.parametrize(("value", "flags"), [(12, 1), (24, 1), (24, 129)])
    def test_tag_tells_ours_from_everybody_else_s(
        self, make_map: Callable[..., Map], value: int, flags: int
    ) -> None:
        """In the padding of either layout: an equal entry of somebody else's has none; nothing else differs."""
        raw = make_map(MAP_TYPE_LPM_TRIE, 24, value, flags=flags)
        ours, theirs = IpcacheMap(raw, HERE, tag=0x6D6C), IpcacheMap(raw, HERE)
        assert ours.stands(B1) is None
        assert ours.insert(B1, ENTRY)
        read_back = ours.as_read_back(ENTRY)
        assert ours.stands(B1) == Standing(read_back, tagged=True)
        assert theirs.lookup(B1) == ours.lookup(B1) == read_back
        theirs.replace(B1, ENTRY)
        assert ours.stands(B1) == Standing(read_back, tagged=False)
        assert theirs.stands(B1) == Standing(read_back, tagged=False)

    @pytest.mark.parametrize(
        ("kind", "key", "value", "flags"),
        [
            (MAP_TYPE_LPM_TRIE, 24, 16, 1),
            (MAP_TYPE_LPM_TRIE, 20, 24, 1),
            (MAP_TYPE_HASH, 24, 24, 1),
            (MAP_TYPE_LPM_TRIE, 24, 24, 257),
            (MAP_TYPE_LPM_TRIE, 24, 12, 129),
        ],
        ids=["another value", "another key", "a hash", "other flags", "flags of another layout"],
    )
    def test_unknown_layout_is_refused_in_one_line(
        self, make_map: Callable[..., Map], kind: int, key: int, value: int, flags: int
    ) -> None:
        """The message says what was found, where, and what was expected."""
        with pytest.raises(DatapathError) as caught:
            IpcacheMap(make_map(kind, key, value, flags=flags), HERE)
        message = str(caught.value)
        assert message.startswith(
            f"/a/pin is no ipcache that lazymesh knows (type {kind}, key {key}B, value {value}B"
        )
        assert "24-byte (Cilium >= 1.18, flags 0x1 or 0x81) or 12-byte (<= 1.17, flags 0x1) values" in message
        assert "\n" not in message

    def test_write_that_the_kernel_refuses_names_the_map(self, make_map: Callable[..., Map]) -> None:
        """A descriptor that is gone stands for every other failure."""
        raw = make_map(MAP_TYPE_LPM_TRIE, 24, 24)
        ipcache = IpcacheMap(raw, HERE)
        ipcache.close()
        for action in (lambda: ipcache.insert(B1, ENTRY), lambda: ipcache.delete(B1)):
            with pytest.raises(DatapathError, match=r"the ipcache map at /a/pin: Bad file descriptor"):
                action()


def test_probe_of_noexist_agrees_with_the_kernel(make_map: Callable[..., Map]) -> None:
    """What the probe says is what an insert over an existing prefix does."""
    ipcache = IpcacheMap(make_map(MAP_TYPE_LPM_TRIE, 24, 24), HERE)
    ipcache.insert(B1, ENTRY)
    refused = not ipcache.insert(B1, OTHER)
    assert kernel_honours_noexist() is refused
    assert (ipcache.lookup(B1) == ENTRY) is refused


class TestJournal:
    """Which entries are ours."""

    def test_line_comes_back_as_it_was_written(self, bench: Bench) -> None:
        """Written, replaced, struck out; twice does no harm."""
        journal = bench.datapath.journal
        first, second = abi.OwnedEntry(ENTRY, ENTRY, 2), abi.OwnedEntry(OTHER, ENTRY, 3)
        for address in (B1, POD_B1.address(6)):
            journal.write(address, first)
            journal.write(address, second)
        assert dict(journal.items()) == {B1: second, POD_B1.address(6): second}
        assert journal.read(B1) == second
        assert journal.read(B2) is None
        for _ in range(2):
            journal.remove(B1)
        assert dict(journal.items()) == {POD_B1.address(6): second}

    def test_more_lines_than_a_batch_come_back(self, make_map: Callable[..., Map]) -> None:
        """A restarted agent adopts them all."""
        journal = Journal(make_map(MAP_TYPE_HASH, 24, 56, size=5_000, flags=0))
        line = abi.OwnedEntry(ENTRY, ENTRY, 2)
        for number in range(5_000):
            journal.write(pod_of_b(number).address(4), line)
        assert dict(journal.items()) == {pod_of_b(n).address(4): line for n in range(5_000)}

    def test_foreign_keys_are_passed_over(self, bench: Bench) -> None:
        """A prefix, or a key of another cluster id, is no line of ours."""
        value = abi.pack_owned(abi.OwnedEntry(ENTRY, ENTRY, 2))
        bench.maps["lm_owned"].update(key_of("10.2.0.0/24"), value)
        bench.maps["lm_owned"].update(bytes(abi.IpcacheKey(prefixlen=64, cluster_id=1, family=1)), value)
        assert list(bench.datapath.journal.items()) == []

    def test_full_journal_says_so(self, make_map: Callable[..., Map]) -> None:
        """Before anything is written to the ipcache."""
        journal = Journal(make_map(MAP_TYPE_HASH, 24, 56, size=1, flags=0))
        line = abi.OwnedEntry(ENTRY, ENTRY, 2)
        journal.write(B1, line)
        journal.write(B1, line)
        with pytest.raises(MapFullError, match="the ownership journal is full"):
            journal.write(B2, line)

    def test_refused_writes_are_one_line(self, make_map: Callable[..., Map]) -> None:
        """A descriptor that is gone stands for every other failure."""
        raw = make_map(MAP_TYPE_HASH, 24, 56)
        journal = Journal(raw)
        raw.close()
        with pytest.raises(DatapathError, match="cannot write to the ownership journal: Bad file"):
            journal.write(B1, abi.OwnedEntry(ENTRY, ENTRY, 2))
        with pytest.raises(DatapathError, match="cannot delete from the ownership journal: Bad file"):
            journal.remove(B1)


class TestMeshCidrs:
    """What may miss."""

    def test_difference_is_applied(self, bench: Bench) -> None:
        """Additions, changes of owner, deletions, and a deletion of what never was."""
        cidrs = bench.datapath.mesh_cidrs
        v4, v6, narrow = (
            network_of(text) for text in (packets.PODS_OF_B[4], packets.PODS_OF_B[6], "10.2.7.0/24")
        )
        cidrs.apply([(v4, 2), (v6, 2)], [])
        assert cidrs.items() == {v4: 2, v6: 2}
        cidrs.apply([(v4, 0), (narrow, 3)], [v6, network_of("192.0.2.0/24")])
        assert cidrs.items() == {v4: 0, narrow: 3}
        cidrs.apply([], [v4, narrow])
        assert cidrs.items() == {}

    def test_ten_thousand_nodes_fit(self, bench: Bench) -> None:
        """A CIDR a node, in a few system calls, all read back."""
        base = int(ipaddress.ip_address("10.0.0.0"))
        networks = [ipaddress.IPv4Network((base + (number << 8), 24)) for number in range(10_000)]
        bench.datapath.mesh_cidrs.apply([(network, 1 + i % 511) for i, network in enumerate(networks)], [])
        assert bench.datapath.mesh_cidrs.items() == {n: 1 + i % 511 for i, n in enumerate(networks)}
        bench.datapath.mesh_cidrs.apply([], networks)
        assert bench.datapath.mesh_cidrs.items() == {}

    def test_failure_is_one_line(self, make_map: Callable[..., Map]) -> None:
        """Full, of all things: the only failure that a live map can have."""
        cidrs = MeshCidrs(make_map(MAP_TYPE_LPM_TRIE, 24, 4, size=1))
        with pytest.raises(DatapathError, match="cannot write the mesh CIDRs: No space left on device"):
            cidrs.apply([(network_of("10.2.0.0/24"), 2), (network_of("10.3.0.0/24"), 3)], [])


class TestPolicy:
    """Who may talk."""

    def test_difference_is_applied(self, bench: Bench) -> None:
        """Allowed and revoked, a direction at a time; what was revoked and allowed again stays allowed."""
        policy = bench.datapath.policy
        both = {(direction, 131_073) for direction in Direction}
        policy.apply(both, [])
        assert policy.items() == both
        policy.apply([(Direction.EGRESS, 131_074)], [(Direction.EGRESS, 131_073)])
        assert policy.items() == {(Direction.INGRESS, 131_073), (Direction.EGRESS, 131_074)}
        policy.apply([(Direction.EGRESS, 131_074)], [(Direction.EGRESS, 131_074)])
        assert (Direction.EGRESS, 131_074) in policy.items()

    def test_full_map_says_what_to_do(self, make_map: Callable[..., Map]) -> None:
        """A selector that selects too much is the user's to narrow."""
        policy = PolicyMap(make_map(MAP_TYPE_HASH, 8, 4, size=2, flags=0))
        with pytest.raises(MapFullError, match="the policy map is full: select fewer identities"):
            policy.apply([(Direction.EGRESS, number) for number in range(3)], [])


class TestViews:
    """The maps that programs look into, while these are replaced."""

    @pytest.fixture
    def shown(self, bench: Bench) -> Iterator[Bench]:
        """Give the bench its own map back in the end."""
        yield bench
        bench.datapath.views.show([bench.ipcache])

    def peer_is_a_hit(self, bench: Bench) -> bool:
        """Send a packet of a pod in no mesh CIDR: it is a hit or nothing."""
        bench.forget_counts()
        bench.send(Direction.EGRESS, Flow().udp())
        return bench.counts(Direction.EGRESS) == {"hit": 1}

    @pytest.mark.parametrize(
        ("value", "flags"), [(12, 1), (24, 1), (24, 129)], ids=["v1", "v2", "read-only v2"]
    )
    def test_programs_look_into_any_layout(
        self, shown: Bench, make_map: Callable[..., Map], value: int, flags: int
    ) -> None:
        """No reload for any of them."""
        raw = make_map(MAP_TYPE_LPM_TRIE, 24, value, flags=flags)
        theirs = IpcacheMap(raw, HERE)
        shown.datapath.views.show([theirs])
        assert not self.peer_is_a_hit(shown)
        theirs.replace(B1, ENTRY)
        assert self.peer_is_a_hit(shown)

    def test_every_map_has_to_know_the_peer(self, shown: Bench, make_map: Callable[..., Map]) -> None:
        """Three at once, of three layouts: a packet is a hit when it is one to all, whichever is missing it."""
        layouts = [(24, 129), (24, 1), (12, 1)]
        maps = [IpcacheMap(make_map(MAP_TYPE_LPM_TRIE, 24, v, flags=f), HERE) for v, f in layouts]
        shown.datapath.views.show(maps)
        for one in maps:
            one.replace(B1, ENTRY)
        assert self.peer_is_a_hit(shown)
        for one in maps:
            assert one.delete(B1)
            assert not self.peer_is_a_hit(shown)
            one.replace(B1, ENTRY)
        maps[1].delete(B1)
        shown.datapath.views.show([maps[0], maps[2]])
        assert self.peer_is_a_hit(shown), "the one in the middle is looked into no more"

    def test_map_that_the_kernel_refuses(self, shown: Bench) -> None:
        """An error of ours; the next try begins where this one did."""
        with Path(os.devnull).open("rb") as no_map:
            refused = SimpleNamespace(view=View.V2, fd=no_map.fileno())
            with pytest.raises(DatapathError, match="cannot show the ipcache to our programs"):
                shown.datapath.views.show([shown.ipcache, cast("IpcacheMap", refused)])
        shown.datapath.views.show([shown.ipcache])
        shown.ipcache.replace(B1, ENTRY)
        assert self.peer_is_a_hit(shown)

    def test_map_that_is_shown_no_more_can_go(self, shown: Bench) -> None:
        """The kernel frees it: no element of any view map keeps it."""
        made = [Map.create("lm_test", MapLayout(MAP_TYPE_LPM_TRIE, 24, 24, 4, flags)) for flags in (1, 129)]
        numbers = [one.map_id for one in made]
        maps = [IpcacheMap(one, HERE) for one in made]
        shown.datapath.views.show(maps)
        shown.datapath.views.show([maps[1]])
        shown.datapath.views.show([shown.ipcache])
        for one in maps:
            one.close()
        for number in numbers:
            wait_until(lambda number=number: not map_exists(number), 5, "the map freed")


class TestConfig:
    """Settings in units for people, as the programs read them."""

    def test_default_settings_reach_the_kernel(self, bench: Bench) -> None:
        """Rates become spacings, bursts become depths."""
        found = bench.datapath.config.read()
        assert (found.rearm_ns, found.muted, found.on_miss, found.enforced) == (1_000_000_000, 0, 0, 0)
        assert (found.interface_interval_ns, found.interface_burst_ns) == (4_000_000, 999 * 4_000_000)
        assert (found.uplink_interval_ns, found.uplink_burst_ns) == (1_000_000, 1_999 * 1_000_000)
        assert (found.global_interval_ns, found.global_burst_ns) == (400_000, 3_999 * 400_000)

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"rearm_s": 0.25}, {"rearm_ns": 250_000_000}),
            ({"rearm_s": 0}, {"rearm_ns": 0}),
            ({"interface_rate": 0}, {"interface_interval_ns": 0, "interface_burst_ns": 0}),
            (
                {"global_rate": 1, "global_burst": 1},
                {"global_interval_ns": 1_000_000_000, "global_burst_ns": 0},
            ),
            ({"global_burst": 0}, {"global_burst_ns": 0}),
            ({"on_miss": OnMiss.DROP}, {"on_miss": 1}),
            ({"enforced": frozenset({Direction.INGRESS})}, {"enforced": 2}),
            ({"enforced": frozenset(Direction)}, {"enforced": 3}),
        ],
        ids=str,
    )
    def test_setting_reaches_the_kernel(
        self, bench: Bench, settings: dict[str, object], expected: dict[str, int]
    ) -> None:
        """Each alone, with its edges."""
        bench.datapath.config.write(DatapathConfig(**settings))  # type: ignore[arg-type]
        found = bench.datapath.config.read()
        assert {name: getattr(found, name) for name in expected} == expected


class TestWindows:
    """What went through as world."""

    @pytest.fixture
    def passing(self, bench: Bench) -> Bench:
        """Return a bench that passes on whatever misses."""
        bench.mesh({"10.2.0.0/16": 2, "fd00:2::/64": 2})
        bench.configure(on_miss=OnMiss.PASS, interface_rate=0, uplink_rate=0, global_rate=0)
        return bench

    def test_window_is_opened_once_by_whoever_comes_first(self, passing: Bench) -> None:
        """Closed, its address opens another one."""
        windows, counters = passing.datapath.windows, passing.datapath.counters
        for _ in range(2):
            for version in (4, 6):
                passing.send(Direction.EGRESS, Flow(POD_B1, version=version).udp())
            passing.send(Direction.INGRESS, Flow(POD_B2, Direction.INGRESS).udp())
        assert (counters.windows_opened(), len(windows.elements())) == (3, 3)
        window = windows.take(B1)
        assert window
        assert window.packets == 2
        passing.send(Direction.EGRESS, Flow(POD_B1).udp())
        assert (counters.windows_opened(), len(windows.elements())) == (4, 3)
        assert {window_of(each).address for each in windows.elements()} == {B1, B2, POD_B1.address(6)}

    async def test_more_addresses_than_there_is_room_for_are_known_to_be_forgotten(
        self, passing: Bench
    ) -> None:
        """Each has let a packet through, and the audit does not claim to have them all."""
        resolver = SimpleNamespace(describe=lambda _: None)
        datapath = passing.datapath
        auditor = Auditor(datapath.windows, datapath.counters, None, cast("Resolver", resolver))
        began, count = auditor.log.complete_since, 18_000
        frame = bytearray(Flow(POD_B1).udp())
        at = frame.index(B1)
        for number in range(count):
            frame[at : at + 4] = bytes((10, 2, number >> 8, number & 255))
            passing.send(Direction.EGRESS, bytes(frame))
        told = (await auditor.describe(3600.0))["windows"]
        assert len(told) <= 16_384
        assert auditor.log.forgotten_total == count - len(told) > 0
        assert auditor.log.complete_since > began
        auditor.installed([bytes((10, 2, number >> 8, number & 255)) for number in range(count)])
        await auditor.describe(3600.0)
        assert auditor.log.windows_total + auditor.log.forgotten_total == count


class TestCounters:
    """What the programs counted."""

    def test_copies_of_all_processors_are_summed(self, bench: Bench) -> None:
        """Per direction, every counter its own sum."""
        copies = (abi.Counters * libbpf.possible_cpus())()
        for cpu, copy in enumerate(copies):
            for offset, (name, _) in enumerate(abi.Counters._fields_):
                setattr(copy, name, 1_000 * cpu + offset)
        bench.maps["lm_counters"].update((1).to_bytes(4, "little"), bytes(copies))
        found = bench.datapath.counters.read(Direction.INGRESS)
        cpus = len(copies)
        *packets, _windows = (name for name, _ in abi.Counters._fields_)
        expected = [1_000 * cpus * (cpus - 1) // 2 + cpus * offset for offset in range(len(packets) + 1)]
        assert [getattr(found, name) for name in packets] == expected[:-1]
        assert bench.datapath.counters.windows_opened() == expected[-1]
        assert bench.counts(Direction.EGRESS) == {}

    def test_packet_counts_where_it_ran(self, bench: Bench) -> None:
        """A second reader sees the same."""
        bench.send(Direction.EGRESS, Flow().udp(), repeat=3)
        reader = CounterMap(bench.maps["lm_counters"])
        assert reader.read(Direction.EGRESS).not_mesh == 3


def test_missing_pin_says_what_to_start(tmp_path: Path) -> None:
    """The first thing that a person at the terminal gets wrong."""
    with pytest.raises(DatapathError, match=r"no map at .*/nowhere: start `lazymesh agent` first.*--bpffs"):
        open_map(tmp_path / "nowhere")


def test_pin_that_is_no_map_is_named(tmp_path: Path) -> None:
    """A file that is not on a BPF file system is no map."""
    (tmp_path / "file").touch()
    with pytest.raises(DatapathError, match=r"cannot open the map at .*/file: "):
        open_map(tmp_path / "file")


def test_bpftool_reads_what_cilium_would(bench: Bench) -> None:
    """The golden vectors once more, out of the kernel by somebody else's tool."""
    prefixes = [prefix for prefix in GOLDEN_KEYS if prefix != "0.0.0.0/0"]
    written = dict(zip(prefixes, (entry for entry, _ in GOLDEN_ENTRIES.values()), strict=True))
    bench.entries(written)
    pin = bench.datapath.pins.path("lm_ipcache")
    dump = subprocess.run(
        [tool("bpftool"), "map", "dump", "pinned", pin, "-j"], check=True, capture_output=True
    )
    found = {_bytes(element["key"]): _bytes(element["value"]) for element in json.loads(dump.stdout)}
    expected_values = [bytes.fromhex(raw) for _, raw in GOLDEN_ENTRIES.values()]
    assert found == dict(zip((bytes.fromhex(GOLDEN_KEYS[p]) for p in prefixes), expected_values, strict=True))


def _bytes(numbers: list[str]) -> bytes:
    return bytes(int(number, 16) for number in numbers)
