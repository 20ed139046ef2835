"""The programs of the stand-in for cilium-agent on the node's devices: loaded, attached and switched as Cilium does.

Each device has a generation of programs with its own program array for tail calls; the policy map, the flows and the
counters are older than any generation and outlive them all.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lazymesh.datapath import libbpf
from lazymesh.datapath.libbpf import MAP_TYPE_HASH, MAP_TYPE_LPM_TRIE, MAP_TYPE_LRU_HASH, Map, MapLayout
from tests.support import tcx
from tests.support.bpfobject import (
    BpfObject,
    ProgramInfo,
    compile_bpf,
    open_map_id,
    program_info_by_id,
)
from tests.support.tcx import Filter, TcxLink

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from tests.support.lab import Lab

MAP_TYPE_PROG_ARRAY = 3
FIRST_ENDPOINT = 101
_UPLINK = "eth0"
_OUTCOMES = ("forwarded", "reply", "denied", "missed tail call")
_DIRECTIONS = ("egress", "ingress")
_CALLS = ("tail_handle_ipv4_cont", "tail_handle_ipv6_cont", "tail_ipv4_policy")
"""By slot; the last one is also the endpoint's in cilium_call_policy."""
_U32 = struct.Struct("=I")
_VERDICT = struct.Struct("=IIBBBB")


@dataclass(frozen=True)
class Verdict:
    """Packets that met the same fate at one device.

    device: the pod's, in both directions.
    identity: the one that the peer was taken for; 0 for replies, which are not judged.
    tunnel: whether the entry named a tunnel endpoint.
    """

    device: str
    direction: str
    outcome: str
    identity: int
    tunnel: bool
    packets: int


@dataclass(frozen=True)
class LoadedProgram:
    """What the kernel says of Cilium's program on one device.

    calls: the programs behind its program array.
    ipcache_ids: the maps of an ipcache's shape that the program or its tail calls refer to.
    """

    device: str
    info: ProgramInfo
    calls: tuple[ProgramInfo, ...]
    ipcache_ids: frozenset[int]


@dataclass
class _Device:
    name: str
    program: str
    endpoint: int
    addresses: tuple[str, ...] = ()
    calls: Map | None = None
    link: TcxLink | None = None
    policy: Map | None = None

    @property
    def link_pin(self) -> Path:
        """Where the link is pinned, below the bpffs."""
        home = (
            Path("endpoints", str(self.endpoint))
            if self.endpoint
            else Path("devices", self.name.replace(".", "-"))
        )
        return "cilium" / home / "links" / self.program

    @property
    def filter_name(self) -> str:
        """The name of its clsact filter."""
        return f"{self.program}-{self.name}"


@dataclass(frozen=True)
class AttachSettings:
    """How programs get onto devices."""

    style: str = "tcx"
    """tcx or clsact."""
    priority: int = 1
    """bpf-filter-priority, of clsact filters."""
    dual_stack: bool = True
    wipes_filters: bool = True
    """Whether each program load deletes the clsact filters of others (seen on tcx nodes of 1.18 to 1.20)."""


@dataclass
class Programs:
    """Everything that the stand-in has loaded on one node."""

    lab: Lab
    layout: str
    settings: AttachSettings
    _devices: dict[str, _Device] = field(default_factory=dict)
    _shared: dict[str, Map] = field(default_factory=dict)
    _loading: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.use_layout(self.layout)
        self.globals = self.lab.bpffs / "tc" / "globals"
        self.globals.mkdir(parents=True, exist_ok=True)
        self._make_shared()
        self._devices[_UPLINK] = _Device(_UPLINK, "cil_from_netdev", 0)
        for pod in self.lab.pods:
            self._add_endpoint(pod.interface, FIRST_ENDPOINT + pod.number, (pod.ipv4, pod.ipv6))

    def use_layout(self, layout: str) -> None:
        """Load programs for this form of the ipcache from now on."""
        self.layout = layout
        source, target = Path(__file__).with_name("cilium_bpf.c"), self.lab.directory / f"cilium_{layout}.o"
        self._object = compile_bpf(source, target, IPCACHE_LAYOUT=int(layout[1:]))

    def _make_shared(self) -> None:
        layouts = {
            "cilium_call_policy": MapLayout(MAP_TYPE_PROG_ARRAY, 4, 4, 65_535, 0),
            "cilium_lxc": MapLayout(MAP_TYPE_HASH, 20, 4, 65_535, 0),
            "standin_ct": MapLayout(MAP_TYPE_LRU_HASH, 40, 4, 65_536, 0),
            "standin_verdict": MapLayout(MAP_TYPE_HASH, 12, 8, 16_384, 0),
        }
        self._shared = {name: Map.create(name, layout) for name, layout in layouts.items()}
        libbpf.pin(self._shared["cilium_call_policy"].fd, self.globals / "cilium_call_policy")

    def _add_endpoint(self, interface: str, endpoint: int, addresses: tuple[str, ...]) -> None:
        name = f"cilium_policy_v2_{endpoint:05}"
        policy = Map.create(name, MapLayout(MAP_TYPE_HASH, 8, 4, 16_384, 0))
        libbpf.pin(policy.fd, self.globals / name)
        device = _Device(interface, "cil_from_container", endpoint, addresses, policy=policy)
        self._devices[interface] = device
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            key = socket.inet_pton(family, address).ljust(16, b"\0") + _U32.pack(2 if ":" in address else 1)
            self._shared["cilium_lxc"].update(key, _U32.pack(endpoint))

    @property
    def devices(self) -> tuple[str, ...]:
        """The uplink and the pods' devices."""
        return tuple(self._devices)

    # Loading.

    def load(self, name: str, ipcache: Map) -> None:
        """Give a device new programs over this ipcache; whatever is attached now works until they are in place."""
        with self._loading:
            self._load(self._devices[name], ipcache)

    def _load(self, device: _Device, ipcache: Map) -> None:
        fresh = Map.create(self._calls_name(device), MapLayout(MAP_TYPE_PROG_ARRAY, 4, 4, 48, 0))
        maps = {name: shared.fd for name, shared in self._shared.items()}
        maps |= {"cilium_ipcache": ipcache.fd, "cilium_calls": fresh.fd}
        if device.policy:
            maps["cilium_policy"] = device.policy.fd
        programs = (device.program, *(_CALLS if device.endpoint else ()))
        constants = {".rodata.config": struct.pack("=II", device.endpoint, self.settings.dual_stack)}
        with BpfObject(self._object, programs, maps, constants) as loaded:
            for slot, call in enumerate(programs[1:]):
                fresh.update(_U32.pack(slot), _U32.pack(loaded.program(call)))
            self.lab.node_a.call(self._attach, device, loaded.program(device.program))
            if device.endpoint:
                policy = _U32.pack(loaded.program(_CALLS[-1]))
                self._shared["cilium_call_policy"].update(_U32.pack(device.endpoint), policy)
        self._keep_calls(device, fresh)

    def _attach(self, device: _Device, program: int) -> None:
        ours = None if self.settings.style == "tcx" else "cil_"
        if self.settings.style == "tcx":
            if device.link and device.link.follows(device.name):
                device.link.update(program)
            else:
                device.link = TcxLink.attach(program, device.name)
                device.link.pin(self.lab.bpffs / device.link_pin)
        else:
            place = Filter(self.settings.priority, 1, device.filter_name, 0)
            tcx.replace_filter(device.name, place, program)
        if self.settings.wipes_filters:
            tcx.remove_filters(device.name, spare=ours)

    def _keep_calls(self, device: _Device, fresh: Map) -> None:
        """Replace the old array last: with its last pin and descriptor the kernel would empty it under its program."""
        if device.endpoint:
            libbpf.pin(fresh.fd, self.globals / self._calls_name(device))
        if device.calls:
            device.calls.close()
        device.calls = fresh

    @staticmethod
    def _calls_name(device: _Device) -> str:
        return f"cilium_calls_{device.endpoint:05}" if device.endpoint else "cilium_calls_netdev"

    # Policy.

    def set_policy(self, direction: str, allowed: Collection[int] | None) -> None:
        """Let every pod talk to these identities only; None: to whom it likes."""
        wanted = {0} if allowed is None else set(allowed)
        for policy in self._policies():
            for key, _ in list(policy.items()):
                identity, code = struct.unpack("=II", key)
                if code == _DIRECTIONS.index(direction) and identity not in wanted:
                    policy.delete(key)
        for identity in wanted:
            self.allow(identity, direction)

    def allow(self, identity: int, direction: str = "egress") -> None:
        """Add an identity to every pod's policy map."""
        for policy in self._policies():
            policy.update(struct.pack("=II", identity, _DIRECTIONS.index(direction)), _U32.pack(1))

    def revoke(self, identity: int, direction: str = "egress") -> None:
        """Take an identity out of every pod's policy map."""
        for policy in self._policies():
            policy.delete(struct.pack("=II", identity, _DIRECTIONS.index(direction)))

    def _policies(self) -> Iterable[Map]:
        return (device.policy for device in self._devices.values() if device.policy)

    # What tests look at.

    def verdicts(self) -> list[Verdict]:
        """Return all counters."""
        names = {device.endpoint: device.name for device in self._devices.values()}
        found = []
        for key, value in self._shared["standin_verdict"].items():
            endpoint, identity, direction, outcome, tunnel, _ = _VERDICT.unpack(key)
            where, what = _DIRECTIONS[direction], _OUTCOMES[outcome]
            packets = int.from_bytes(value, "little")
            found.append(Verdict(names[endpoint], where, what, identity, bool(tunnel), packets))
        return found

    def loaded(self) -> dict[str, LoadedProgram]:
        """Ask the kernel what of ours is attached, by device."""
        found = {}
        for device in self._devices.values():
            for info in self.lab.node_a.call(self._attached, device):
                calls = tuple(self._calls_of(device))
                ids = {one for program in (info, *calls) for one in program.map_ids}
                found[device.name] = LoadedProgram(
                    device.name, info, calls, frozenset(filter(_is_ipcache, ids))
                )
        return found

    def _attached(self, device: _Device) -> list[ProgramInfo]:
        if self.settings.style == "tcx":
            infos = [program_info_by_id(one) for one in tcx.tcx_programs(device.name)]
            return [info for info in infos if info.name == device.program[:15]]
        ids = [one.program_id for one in tcx.filters(device.name) if one.name == device.filter_name]
        return [program_info_by_id(one) for one in ids]

    @staticmethod
    def _calls_of(device: _Device) -> Iterable[ProgramInfo]:
        for slot in range(len(_CALLS) if device.calls and device.endpoint else 0):
            raw = device.calls.lookup(_U32.pack(slot)) if device.calls else None
            if raw:
                yield program_info_by_id(_U32.unpack(raw)[0])

    # The end.

    def close(self) -> None:
        """Detach everything and remove every pin: the node is as it was before."""
        for device in self._devices.values():
            shutil.rmtree((self.lab.bpffs / device.link_pin).parent, ignore_errors=True)
            if device.link:
                device.link.close()
            self.lab.node_a.call(tcx.remove_clsact, device.name)
            for one in (device.calls, device.policy):
                if one:
                    one.close()
        for shared in self._shared.values():
            shared.close()
        shutil.rmtree(self.lab.bpffs / "cilium", ignore_errors=True)
        shutil.rmtree(self.lab.bpffs / "tc", ignore_errors=True)


def _is_ipcache(map_id: int) -> bool:
    with contextlib.suppress(OSError):
        found = Map(open_map_id(map_id))
        layout = found.layout
        found.close()
        return (layout.kind, layout.key_size) == (MAP_TYPE_LPM_TRIE, 24)
    return False
