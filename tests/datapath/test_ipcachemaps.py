"""The ipcache maps, our own and Cilium's, on real maps of the kernel's."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from lazymesh.core.model import Direction, Entry, EntryFlag, parse_address
from lazymesh.datapath import abi
from lazymesh.datapath.ipcachemaps import IpcacheLayout, IpcacheMap, Standing
from lazymesh.datapath.libbpf import MAP_TYPE_HASH, MAP_TYPE_LPM_TRIE, Map, MapLayout
from lazymesh.errors import DatapathError, MapFullError
from tests.datapath.conftest import key_of, network_of
from tests.datapath.test_abi_layout import GOLDEN_ENTRIES, GOLDEN_KEYS, tool
from tests.support import packets
from tests.support.bpfobject import map_exists
from tests.support.etcd import wait_until
from tests.support.packets import NODE_B, POD_B1, Flow, pod_of_b

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.datapath.conftest import Bench

HERE = Path("/a/pin")
ENTRY = Entry(131_073, NODE_B.address(4), 0, 2)
OTHER = Entry(131_074, NODE_B.address(4), 3, 2)
B1 = POD_B1.address(4)


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
        assert ipcache.layout is IpcacheLayout.V1
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
        """In the padding of either layout: another writer's equal entry has none; nothing else differs."""
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
            f"/a/pin is not an ipcache of a known layout (type {kind}, key {key}B, value {value}B"
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


class TestViews:
    """The maps that programs look into, while these are replaced."""

    @pytest.fixture
    def shown(self, bench: Bench) -> Iterator[Bench]:
        """Give the bench its own map back in the end."""
        yield bench
        bench.datapath.visible.show([bench.ipcache])

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
        shown.datapath.visible.show([theirs])
        assert not self.peer_is_a_hit(shown)
        theirs.replace(B1, ENTRY)
        assert self.peer_is_a_hit(shown)

    @pytest.mark.parametrize(
        ("value", "flags"), [(12, 1), (24, 1), (24, 129)], ids=["v1", "v2", "read-only v2"]
    )
    def test_world_behind_a_tunnel_is_a_miss_in_any_layout(
        self, shown: Bench, make_map: Callable[..., Map], value: int, flags: int
    ) -> None:
        """The route to a node's pods, of which no mesh CIDR says that they are ours; without the tunnel it is world."""
        raw = make_map(MAP_TYPE_LPM_TRIE, 24, value, flags=flags)
        theirs = IpcacheMap(raw, HERE)
        shown.datapath.visible.show([theirs])
        for found, expected in (
            (Entry(2, NODE_B.address(4), 0, EntryFlag.HAS_TUNNEL_EP), {"missed": 1, "lost": 1}),
            (Entry(2), {"not_mesh": 1}),
        ):
            theirs.replace(B1, found)
            shown.forget_counts()
            shown.send(Direction.EGRESS, Flow().udp())
            assert shown.counts(Direction.EGRESS) == expected

    @pytest.mark.parametrize("first", range(3), ids=["v1", "v2", "read-only v2"])
    def test_policy_goes_by_what_the_first_map_says(
        self, shown: Bench, make_map: Callable[..., Map], first: int
    ) -> None:
        """In whichever layout; the others say only whether it is known."""
        layouts = [(12, 1), (24, 1), (24, 129)]
        layouts.insert(0, layouts.pop(first))
        maps = [IpcacheMap(make_map(MAP_TYPE_LPM_TRIE, 24, v, flags=f), HERE) for v, f in layouts]
        shown.datapath.visible.show(maps)
        for one, found in zip(maps, (ENTRY, OTHER, OTHER), strict=True):
            one.replace(B1, found)
        shown.mesh({"10.2.0.0/16": 2})
        shown.configure(enforced=frozenset(Direction))
        for identity, expected in ((OTHER.identity, "policy_deny"), (ENTRY.identity, "policy_allow")):
            shown.datapath.policy.apply([(Direction.EGRESS, identity)], [])
            shown.forget_counts()
            shown.send(Direction.EGRESS, Flow().udp())
            assert shown.counts(Direction.EGRESS) == {"hit": 1, expected: 1}

    def test_every_map_has_to_know_the_peer(self, shown: Bench, make_map: Callable[..., Map]) -> None:
        """Three at once, of three layouts: a packet is a hit when it is one to all, whichever is missing it."""
        layouts = [(24, 129), (24, 1), (12, 1)]
        maps = [IpcacheMap(make_map(MAP_TYPE_LPM_TRIE, 24, v, flags=f), HERE) for v, f in layouts]
        shown.datapath.visible.show(maps)
        for one in maps:
            one.replace(B1, ENTRY)
        assert self.peer_is_a_hit(shown)
        for one in maps:
            assert one.delete(B1)
            assert not self.peer_is_a_hit(shown)
            one.replace(B1, ENTRY)
        maps[1].delete(B1)
        shown.datapath.visible.show([maps[0], maps[2]])
        assert self.peer_is_a_hit(shown), "the one in the middle is looked into no more"

    def test_map_that_the_kernel_refuses(self, shown: Bench) -> None:
        """A DatapathError; the next try starts where this one did."""
        with Path(os.devnull).open("rb") as no_map:
            refused = SimpleNamespace(layout=IpcacheLayout.V2, fd=no_map.fileno())
            with pytest.raises(DatapathError, match="cannot show the ipcache to our programs"):
                shown.datapath.visible.show([shown.ipcache, cast("IpcacheMap", refused)])
        shown.datapath.visible.show([shown.ipcache])
        shown.ipcache.replace(B1, ENTRY)
        assert self.peer_is_a_hit(shown)

    def test_map_that_is_shown_no_more_can_go(self, shown: Bench) -> None:
        """The kernel frees it: no element of any view map keeps it."""
        made = [Map.create("lm_test", MapLayout(MAP_TYPE_LPM_TRIE, 24, 24, 4, flags)) for flags in (1, 129)]
        numbers = [one.map_id for one in made]
        maps = [IpcacheMap(one, HERE) for one in made]
        shown.datapath.visible.show(maps)
        shown.datapath.visible.show([maps[1]])
        shown.datapath.visible.show([shown.ipcache])
        for one in maps:
            one.close()
        for number in numbers:
            wait_until(lambda number=number: not map_exists(number), 5, "the map freed")

    def test_other_threads_run_while_the_kernel_waits(
        self, shown: Bench, make_map: Callable[..., Map]
    ) -> None:
        """Each change waits until no program runs that began before it: 10 ms on some kernels."""
        maps = [IpcacheMap(make_map(MAP_TYPE_LPM_TRIE, 24, 24), HERE) for _ in range(2)]
        waiting, done, turns = False, False, 0

        def other() -> None:
            nonlocal turns
            while not done:
                turns += waiting
                time.sleep(0)

        thread = threading.Thread(target=other)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(10)  # so that nobody gets a turn who was not given one
        try:
            thread.start()
            outer, slot = shown.datapath.visible._outer[IpcacheLayout.V2], (2).to_bytes(4, sys.byteorder)
            for one in maps * 10:
                waiting = True
                outer.update(slot, one.fd.to_bytes(4, sys.byteorder))
                outer.delete(slot)
                waiting = False
        finally:
            done = True
            sys.setswitchinterval(interval)
            thread.join()
        assert turns > 0


def test_bpftool_reads_what_cilium_would(bench: Bench) -> None:
    """The golden vectors once more, read from the kernel by another tool."""
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
