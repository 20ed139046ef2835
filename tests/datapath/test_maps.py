"""The maps in core terms, on real maps of the kernel's."""

from __future__ import annotations

import ipaddress
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from lazymesh.core.model import Direction
from lazymesh.datapath import abi, libbpf
from lazymesh.datapath.libbpf import MAP_TYPE_HASH, MAP_TYPE_LPM_TRIE, Map
from lazymesh.datapath.maps import CounterMap, MeshCidrs, PolicyMap, open_map, window_of
from lazymesh.datapath.settingsmap import OnMiss
from lazymesh.errors import DatapathError, MapFullError
from lazymesh.roles.auditing import Auditor
from tests.datapath.conftest import network_of
from tests.support import packets
from tests.support.packets import POD_B1, POD_B2, Flow

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lazymesh.core.resolver import Resolver
    from tests.datapath.conftest import Bench

B1, B2 = POD_B1.address(4), POD_B2.address(4)


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

    @pytest.mark.parametrize("direction", list(Direction), ids=["egress", "ingress"])
    def test_window_says_when_how_much_and_which_way(self, passing: Bench, direction: Direction) -> None:
        """From its first packet to its last one."""
        times, frames = [time.monotonic()], [Flow(POD_B1, direction).udp(bytes(n)) for n in (10, 200)]
        for frame in frames:
            passing.send(direction, frame)
            times.append(time.monotonic())
        window = passing.datapath.windows.take(B1)
        assert window
        assert times[0] <= window.first <= times[1] <= window.last <= times[2]
        assert (window.packets, window.bytes) == (2, sum(map(len, frames)))
        assert window.direction is direction

    def test_packet_that_is_dropped_opens_none(self, passing: Bench) -> None:
        """By the policy, or because missed ones are: nothing went through."""
        for settings in ({"enforced": frozenset(Direction)}, {"on_miss": OnMiss.DROP}):
            passing.configure(**settings)
            passing.send(Direction.EGRESS, Flow(POD_B1).udp())
        assert passing.datapath.counters.windows_opened() == 0
        assert passing.datapath.windows.is_empty()

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
    """A file that is not on a BPF file system is not a map."""
    (tmp_path / "file").touch()
    with pytest.raises(DatapathError, match=r"cannot open the map at .*/file: "):
        open_map(tmp_path / "file")
