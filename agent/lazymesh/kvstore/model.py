"""What comes out of a store and what is told about it: plain values, and the protocols of those who are told.

Bytes stay bytes: what a key or a value means is known to the core only. Revisions are comparable within one
*epoch* of a client; a replaced store starts the next epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazymesh.errors import KvstoreError


class KeyValue(NamedTuple):
    """One key as it stands in the store. A tuple: a large mesh makes half a million of them in a listing."""

    key: bytes
    value: bytes
    mod_revision: int
    lease: int


class Change(NamedTuple):
    """One key written, or deleted (value None)."""

    key: bytes
    value: bytes | None
    mod_revision: int


@dataclass(frozen=True, slots=True)
class ReadResult:
    """Answer to a batch of reads; ``values`` in the order of the keys, None for one that does not exist."""

    revision: int
    """Store revision at which all of it was true."""
    values: list[KeyValue | None]


class Values(NamedTuple):
    """The same without what packets do not wait for: a value for each key, None for one that does not exist."""

    revision: int
    values: tuple[bytes | None, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a listing; all pages of one listing have the same revision and epoch."""

    revision: int
    epoch: int
    """The client's when it was read: a watch from ``revision + 1`` is good only while it stays the same."""
    items: list[KeyValue]


@dataclass(frozen=True, slots=True)
class Connected:
    """The store answers (again)."""

    endpoint: str
    cluster_id: int
    revision: int
    reset: bool
    """True: it is another store, or an older state of the same one; revisions seen so far mean nothing."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The store that answered does so no longer. Not repeated while attempts to reach it fail."""

    error: KvstoreError


ClientEvent = Connected | Disconnected


@dataclass(frozen=True, slots=True)
class WatchLoss:
    """A watch has ended and will not come back: what it watched is to be read again, then watched anew."""

    kind: str
    """``compacted``, ``reset`` (store replaced or gone back), ``cancelled`` by the server, ``permission``."""
    error: KvstoreError


class WatchListener(Protocol):
    """Who is told of one or many watches; called on the event loop, must not block, must not raise."""

    def on_live(self, watch_id: int, revision: int) -> None:
        """Know that the server has taken up the watch (again); ``revision`` is the store's."""

    def on_changes(self, watch_id: int, changes: Sequence[Change]) -> None:
        """Take changes, each key's in the order of the store's revisions; of many at once only a key's last is told."""

    def on_lost(self, watch_id: int, loss: WatchLoss) -> None:
        """Know that the watch is gone."""


@dataclass(frozen=True, slots=True)
class ClientInfo:
    """What a person wants to see of one store's client."""

    endpoint: str | None
    """In use, None while there is none."""
    cluster_id: int | None
    """Of the etcd cluster last spoken to."""
    version: str | None
    revision: int
    """Highest store revision seen in this epoch."""
    epoch: int
    """Number of times the store was found replaced."""
    connected_since: float | None
    """Seconds since 1970, None while not connected."""
    reconnects: int
    last_error: str | None
