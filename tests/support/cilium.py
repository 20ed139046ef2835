"""A stand-in for cilium-agent on node ``a`` of the lab: its ipcache, its programs, its restarts, its manners.

Written from docs/reference/cilium-formats.md and cilium-live.md, to be held against real agents. It does what matters
beside it: the map with its pin and layout, programs that drop what the policy denies, the writer
that suppresses identical upserts and repairs nothing, and the start that puts an empty map under the pin.
Where it is simpler than a real agent, the module that is simpler says so.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from lazymesh.datapath import libbpf
from lazymesh.datapath.libbpf import Map
from tests.support.cilium_boot import INSTANT, Boot, Timeline
from tests.support.cilium_ipcache import (
    LAYOUTS,
    V1,
    V2,
    Entry,
    Record,
    Writer,
    belongs_to,
    canonical,
    pack_key,
    pack_value,
    unpack_key,
    unpack_value,
)
from tests.support.cilium_programs import AttachSettings, LoadedProgram, Programs, Verdict
from tests.support.cilium_world import CiliumSettings, RemoteNode, World, pod_record
from tests.support.lab import NODE_A, NODE_B, SERVER_IDENTITY

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from tests.support.lab import Lab


class Cilium:
    """An agent that has been started when entered, and everything of it gone when left."""

    def __init__(self, lab: Lab, **options: Any) -> None:
        self.lab, self.settings = lab, CiliumSettings(**options)
        self.layout = LAYOUTS[self.settings.layout]
        self.log: list[str] = []
        """The agent's warnings."""
        self._world = World(self.settings)
        self._map: Map | None = None
        self._writer: Writer | None = None
        self._boot: Boot | None = None
        self.lock = threading.RLock()
        how = AttachSettings(
            self.settings.attach,
            self.settings.filter_priority,
            self.settings.dual_stack,
            self.settings.wipes_filters,
        )
        self._programs = Programs(lab, self.settings.layout, how)
        self._programs.set_policy("egress", self.settings.allowed)
        self._programs.set_policy("ingress", self.settings.ingress_allowed)
        self._world.learn_node_a(lab.pods)
        self._world.learn_node(RemoteNode())
        if self.settings.upgraded:
            self._leave_stale_pin()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop it and remove every program, pin and map of it."""
        try:
            self.stop()
        finally:
            self._programs.close()
            if self._map:
                self._map.close()
                self._map = None

    # Life.

    def start(self, timeline: Timeline = INSTANT) -> Boot:
        """Start the agent; at once and whole, unless a timeline says otherwise."""
        boot = self.begin()
        if timeline is INSTANT:
            boot.pin()
            boot.fill()
            boot.switch()
        else:
            boot.run(timeline)
        return boot

    def begin(self) -> Boot:
        """Start an agent that takes its steps only as it is told: unpin, pin, fill, switch."""
        self.stop()
        with self.lock:
            self._writer = Writer(self.layout, NODE_A, self.log)
            self._boot = Boot(self)
            return self._boot

    def stop(self) -> None:
        """End the agent's process: programs, pins and maps stay, nobody writes."""
        boot, self._boot, self._writer = self._boot, None, None
        if boot:
            boot.cancel()

    def restart(self, **timeline: Any) -> Boot:
        """End the agent and start it again by the clock; see Timeline for the words."""
        return self.start(Timeline(**timeline))

    def become(self, layout: str) -> None:
        """Be of another version from the next start on; the pin of this one stays (cilium-formats 1.1)."""
        self.stop()
        self.settings = self._world.settings = replace(self.settings, layout=layout)
        self.layout = LAYOUTS[layout]
        self._programs.use_layout(layout)
        self._world.own = {}
        self._world.learn_node_a(self.lab.pods)
        self._world.learn_node(RemoteNode())

    def reload(self, device: str | None = None) -> None:
        """Regenerate one device's programs, or all, over the map that the agent has now."""
        for name in [device] if device else self.devices:
            self.load_programs(name)

    # What the agent learns.

    def upsert(self, prefix: str, identity: int = SERVER_IDENTITY, **more: Any) -> bool:
        """Learn a pod of the peer; True when that made a write.

        more: ``host_ip``, ``key``, ``pod`` and ``namespace`` of the pod's record, and ``cluster_id``, whose range the
        identity has to be of (None: of this cluster, which may say anything).
        While no agent runs, or before it has read the whole listing, the change waits.
        """
        cluster_id = more.pop("cluster_id", self.lab.remote_id)
        prefix = canonical(prefix)
        if cluster_id is not None and not belongs_to(identity, cluster_id):
            self.log.append(f"skipping {prefix}: identity {identity} is not of cluster {cluster_id}'s range")
            return False
        return self._change(prefix, pod_record(prefix, identity, more))

    def upsert_many(self, addresses: Iterable[str], identity: int = SERVER_IDENTITY, **more: Any) -> None:
        """Learn many pods at once."""
        records = {address: pod_record(address, identity, more) for address in addresses}
        with self.lock:
            self._world.pods.update(records)
            if self._writer and not self._waits(list(records.items())):
                self._writer.upsert_many(records.items())

    def delete(self, prefix: str) -> bool:
        """Learn that a pod is gone; True when the agent knew it, and so deleted its entry, whoever wrote it."""
        return self._change(canonical(prefix), None)

    def upsert_node(self, node: RemoteNode) -> None:
        """Learn a node of the peer: its addresses, and since 1.18 its pod CIDRs as a fallback."""
        with self.lock:
            for prefix, record in self._world.learn_node(node).items():
                if self._writer and not self._waits([(prefix, record)]):
                    self._writer.upsert(prefix, record)

    def allow(self, identity: int, direction: str = "egress") -> None:
        """Let every pod talk to an identity (0: to all)."""
        self._programs.allow(identity, direction)

    def revoke(self, identity: int, direction: str = "egress") -> None:
        """Take that back."""
        self._programs.revoke(identity, direction)

    # What there is to see.

    @property
    def pin(self) -> Path:
        """Where its ipcache is pinned."""
        return self._programs.globals / self.layout.name

    @property
    def stale_pin(self) -> Path:
        """Where an agent of the other layout had its own."""
        return self._programs.globals / (V2 if self.layout is V1 else V1).name

    @property
    def map_id(self) -> int | None:
        """The id of the map behind the pin; None while there is none."""
        with contextlib.suppress(FileNotFoundError), contextlib.closing(Map.pinned(self.pin)) as found:
            return found.map_id
        return None

    @property
    def devices(self) -> tuple[str, ...]:
        """The interfaces that carry its programs."""
        return self._programs.devices

    def entries(self) -> dict[str, Entry]:
        """Return what the map behind the pin holds, whoever wrote it, by canonical prefix."""
        with contextlib.closing(Map.pinned(self.pin)) as found:
            return {unpack_key(key): unpack_value(value) for key, value in found.items()}

    def write_from_outside(self, prefix: str, identity: int, host_ip: str = NODE_B[0], key: int = 0) -> None:
        """Write an entry behind the agent's back, as a second writer would."""
        value = pack_value(self.layout, Record(identity, host_ip, key), NODE_A)
        with contextlib.closing(Map.pinned(self.pin)) as found:
            found.update(pack_key(canonical(prefix)), value)

    def delete_from_outside(self, prefix: str) -> bool:
        """Delete an entry behind the agent's back; False when there was none."""
        with contextlib.closing(Map.pinned(self.pin)) as found:
            return found.delete(pack_key(canonical(prefix)))

    def verdicts(self) -> list[Verdict]:
        """Return what became of packets so far, by device, direction, outcome and the peer's identity."""
        return self._programs.verdicts()

    def packets(self, **where: object) -> int:
        """Count packets of the verdicts that match, such as ``outcome="denied", device="lxc0"``."""
        return sum(
            verdict.packets
            for verdict in self.verdicts()
            if all(getattr(verdict, name) == value for name, value in where.items())
        )

    def programs(self) -> dict[str, LoadedProgram]:
        """Ask the kernel what of it is attached, by device, and which ipcache that reads."""
        return self._programs.loaded()

    def orphan_pin(self) -> None:
        """Put an empty map under the pin that neither agent nor programs use (seen in the wild, #45196)."""
        with contextlib.closing(
            self.layout.create(self.settings.max_entries, self.settings.map_flags)
        ) as empty:
            libbpf.pin(empty.fd, self.pin)

    # The steps of a start (Boot says when).

    def listing(self) -> list[tuple[str, Record | None]]:
        """Return everything to be learnt at a start."""
        with self.lock:
            return self._world.listing()

    @property
    def own_entries(self) -> int:
        """How many entries need no peer."""
        return len(self._world.own)

    def unpin(self) -> None:
        """Remove the pin; the map lives on with the programs that use it."""
        self.pin.unlink(missing_ok=True)

    def pin_new_map(self) -> None:
        """Pin a new, empty map and let the agent write there."""
        with self.lock:
            old, self._map = self._map, self.layout.create(self.settings.max_entries, self.settings.map_flags)
            if old:
                old.close()
            libbpf.pin(self._map.fd, self.pin)
            if self._writer:
                self._writer.use(self._map)

    def write(self, changes: list[tuple[str, Record | None]]) -> None:
        """Write part of a listing, and of what came meanwhile."""
        with self.lock:
            if not self._writer:
                return
            if all(record is not None for _, record in changes):
                self._writer.upsert_many([(prefix, record) for prefix, record in changes if record])
                return
            for prefix, record in changes:
                self._writer.delete(prefix) if record is None else self._writer.upsert(prefix, record)

    def load_programs(self, device: str) -> None:
        """Load and attach a device's programs over the agent's map."""
        assert self._map is not None, "no map to load programs for: pin() comes before switch()"
        self._programs.load(device, self._map)

    # Inside.

    def _change(self, prefix: str, record: Record | None) -> bool:
        with self.lock:
            if record is None:
                self._world.pods.pop(prefix, None)
            else:
                self._world.pods[prefix] = record
            if not self._writer or self._waits([(prefix, record)]):
                return False
            return self._writer.delete(prefix) if record is None else self._writer.upsert(prefix, record)

    def _waits(self, changes: Iterable[tuple[str, Record | None]]) -> bool:
        boot = self._boot
        # A boot takes all of them or none: it cannot end while we hold the lock.
        return boot is not None and all(boot.later(*change) for change in changes)

    def _leave_stale_pin(self) -> None:
        other = V2 if self.layout is V1 else V1
        with contextlib.closing(other.create(self.settings.max_entries)) as stale:
            writer = Writer(other, NODE_A, [])
            writer.use(stale)
            writer.upsert_many(self._world.own.items())
            libbpf.pin(stale.fd, self.stale_pin)
