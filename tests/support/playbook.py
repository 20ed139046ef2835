"""Conversations with the resolver, written down as plays: ``>>`` is an event told to it, ``<<`` a command it gives.

A play is strict: every command must be expected, in order, before the next event. Names instead of numbers for the
cast, so that a test reads as a story about pods and not about bytes.
"""

from __future__ import annotations

import ipaddress
import json
from dataclasses import replace
from typing import TYPE_CHECKING

from msgspec import structs

from lazymesh.core.clusters import ClusterInfo, MeshState
from lazymesh.core.events import (
    Answered,
    Changed,
    Evict,
    Install,
    InstallsEnded,
    KeyState,
    Misses,
    Read,
    ReadFailed,
    Report,
    Tick,
    Unwatch,
    Watch,
)
from lazymesh.core.identities import identity_range
from lazymesh.core.model import Entry, Reason, Space, format_address, parse_address
from lazymesh.core.records import NodeRecord, decode_pair, entry_of
from lazymesh.core.resolver import Judge, Resolver
from lazymesh.core.resolver.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lazymesh.core.clusters import ClusterTable
    from lazymesh.core.events import Command, Event
    from lazymesh.core.model import Address

DIRECT = (Space.PUSHED, Space.PULL_ONLY)
CACHE = (Space.CACHED,)

B1, B2, B3, B4, B5, B6, B7, B8 = (parse_address(f"10.2.0.{n}") for n in range(1, 9))
B_V6 = parse_address("fd02::1")
C1, C2, C3 = (parse_address(f"10.3.0.{n}") for n in range(1, 4))
CLAIMED_TWICE = parse_address("10.9.0.1")
STRANGER = parse_address("192.0.2.1")
NODE, OTHER_NODE = "172.18.0.3", "172.18.0.4"

WEB, DATABASE, MAIL = 131073, 131074, 131075
"""Identities of cluster b, whose id is 2."""
WEB_OF_C = 196609
ALL_IDENTITIES = frozenset({WEB, DATABASE, MAIL, WEB_OF_C})

NETWORKS = (
    ("b", "10.2.0.0/16"),
    ("b", "fd02::/64"),
    ("c", "10.3.0.0/16"),
    ("b", "10.9.0.0/16"),
    ("c", "10.9.0.0/16"),
)


def info(name: str, *groups: tuple[Space, ...]) -> ClusterInfo:
    """Return cluster b or c, read in these groups."""
    number = {"b": 2, "c": 3}[name]
    return ClusterInfo(name, number, identity_range(number, 255), groups or (DIRECT,))


def mesh(
    clusters: Iterable[ClusterInfo] = (info("b"), info("c")),
    networks: Iterable[tuple[str, str]] = NETWORKS,
    regions: Iterable[tuple[str, str]] = (),
) -> ClusterTable:
    """Return a table of clusters, of what they claim, and of cluster b's nodes and their regions."""
    state = MeshState(explicit=[(name, ipaddress.ip_network(text)) for name, text in networks])
    for cluster in clusters:
        assert state.join(cluster) is None
    for node, region in regions:
        assert state.upsert_node(NodeRecord(node, "b", 2, (parse_address(node),), (), region)) is None
    return state.table()


def record(address: Address, identity: int = WEB, host: str = NODE, scope: str | None = None) -> bytes:
    """Return what an exporter publishes of the address."""
    pair = {
        "IP": format_address(address),
        "Mask": None,
        "HostIP": host,
        "ID": identity,
        "Key": 0,
        "Metadata": "",
    }
    return json.dumps(pair | ({"SyncScope": scope} if scope else {})).encode()


def entry(identity: int = WEB, host: str = NODE) -> Entry:
    """Return what the map holds for such a record."""
    return entry_of(decode_pair(record(B1, identity, host), B1))


# --- events -------------------------------------------------------------------------------------------------------


def miss(address: Address, at: float = 0.0) -> Misses:
    """A pod sends to the address."""
    return Misses((address,), (at,))


def answered(
    revision: int,
    pushed: dict[Address, bytes | None] | None = None,
    pull_only: dict[Address, bytes | None] | None = None,
    cluster: str = "b",
) -> Answered:
    """The owner's store answers: these are pushed, these pull-only, what is in neither with a value is not there."""
    pushed, pull_only = pushed or {}, pull_only or {}
    addresses = tuple(pushed | pull_only)
    values = tuple(of.get(address) for address in addresses for of in (pushed, pull_only))
    return Answered(cluster, DIRECT, addresses, values, revision)


def cache_answered(revision: int, values: dict[Address, bytes | None], cluster: str = "b") -> Answered:
    """The local cache answers."""
    return Answered(cluster, CACHE, tuple(values), tuple(values.values()), revision)


def put(address: Address, revision: int, value: bytes | None = None, space: Space = Space.PUSHED) -> Changed:
    """A watched key of cluster b was written."""
    return Changed("b", KeyState(address, space, value if value is not None else record(address), revision))


def deleted(address: Address, revision: int, space: Space = Space.PUSHED) -> Changed:
    """A watched key of cluster b was deleted."""
    return Changed("b", KeyState(address, space, None, revision))


def failed(*addresses: Address, kind: str = "unavailable", cluster: str = "b") -> ReadFailed:
    """A read did not come back."""
    return ReadFailed(cluster, addresses, kind)


def stands(*addresses: Address) -> InstallsEnded:
    """The entries stand in the map."""
    return InstallsEnded(addresses, (None,) * len(addresses))


def refused(address: Address, error: Reason) -> InstallsEnded:
    """The map did not take the entry."""
    return InstallsEnded((address,), (error,))


# --- commands -----------------------------------------------------------------------------------------------------


def read(*addresses: Address, cluster: str = "b", spaces: tuple[Space, ...] = DIRECT) -> Read:
    """Read these addresses' keys in the owner's store."""
    return Read(cluster, spaces, addresses)


def install(address: Address, of: Entry | None = None, cluster_id: int = 2) -> Install:
    """Put the entry into the map."""
    return Install([address], of or entry(), cluster_id)


def watch(address: Address, after: int, *spaces: Space, cluster: str = "b") -> Watch:
    """Watch the address's keys: those of the owner's store, unless said otherwise."""
    return Watch(cluster, spaces or DIRECT, (address,), after)


def unwatch(address: Address, cluster: str = "b") -> Unwatch:
    """Stop watching the address."""
    return Unwatch(cluster, address)


def evict(address: Address, why: str) -> Evict:
    """Take the entry out of the map."""
    return Evict(address, why)


def report(
    address: Address,
    outcome: str,
    reason: Reason | None = None,
    *,
    missed_at: float | None = None,
    detail: str = "",
    cluster: str | None = "b",
    cached: bool = False,
) -> Report:
    """Tell how it ended."""
    return Report([address], cluster, outcome, reason, detail, [missed_at], cached)


def one_by_one(commands: Iterable[Command]) -> list[Command]:
    """Return the same commands, with one address in each that may have several."""
    single: list[Command] = []
    for command in commands:
        match command:
            case Install(addresses=addresses):
                single += [structs.replace(command, addresses=[address]) for address in addresses]
            case Report(addresses=addresses, missed_at=times):
                single += [
                    structs.replace(command, addresses=[address], missed_at=[at])
                    for address, at in zip(addresses, times, strict=True)
                ]
            case _:
                single.append(command)
    return single


def said_to(resolver: Resolver, event: Event, now: float) -> list[Command]:
    """Return what a resolver says to an event."""
    said: list[Command] = []
    resolver.step(event, now, said.append)
    return said


class Play:
    """One resolver on stage; ``now`` moves only when the script says so."""

    def __init__(
        self,
        limits: Limits | None = None,
        table: ClusterTable | None = None,
        identities: Iterable[int] = ALL_IDENTITIES,
        region: str | None = None,
        spread: float = 0.0,
    ) -> None:
        """Spread: of revalidation after a silence, drawn as large as it can be."""
        self.identities = set(identities)
        judge = Judge(table or mesh(), self.identities, region)
        self.resolver = Resolver(replace(limits or Limits(), revalidation_spread=spread), judge)
        self.now = 0.0
        self._said: list[Command] = []

    def __rshift__(self, event: Event) -> Play:
        """Tell the resolver an event, once every command so far was expected."""
        assert self._said == [], "commands that the script does not know"
        self._said = self.tell(event)
        return self

    def __lshift__(self, expected: Command | list[Command]) -> Play:
        """Expect the next command, or the next few."""
        for command in expected if isinstance(expected, list) else [expected]:
            assert self._said, f"the resolver says nothing more; expected {command}"
            assert self._said.pop(0) == command
        return self

    def tell(self, event: Event) -> list[Command]:
        """Tell an event off the script and return what the resolver says to it."""
        return one_by_one(said_to(self.resolver, event, self.now))

    def later(self, seconds: float) -> Play:
        """Let time pass, and let the resolver know."""
        self.now += seconds
        return self >> Tick()

    def end(self) -> None:
        """Expect nothing more."""
        assert self._said == []
