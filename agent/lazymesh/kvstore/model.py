"""The values that come out of a store, the events about it, and the protocols of their listeners.

Bytes stay bytes: only the core knows what a key or a value means. Revisions are comparable within one *epoch* of
a client; a replaced store starts the next epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazymesh.errors import KvstoreError


class KeyValue(Struct, frozen=True, gc=False):
    """One key as it is in the store. Listing a large mesh creates half a million of them, and structs are made in C."""

    key: bytes
    value: bytes
    mod_revision: int
    lease: int


class Change(Struct, frozen=True, gc=False):
    """One key written, or deleted (value None)."""

    key: bytes
    value: bytes | None
    mod_revision: int


@dataclass(frozen=True, slots=True)
class ReadResult:
    """Answer to a batch of reads; ``values`` in the order of the keys, None for one that does not exist."""

    revision: int
    """Store revision at which all values were read."""
    values: list[KeyValue | None]


class Values(Struct, frozen=True):
    """The same for the miss path: only the value of each key, None for one that does not exist."""

    revision: int
    values: tuple[bytes | None, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a listing; all pages of one listing have the same revision and epoch."""

    revision: int
    epoch: int
    """The client's epoch when the page was read: a watch from ``revision + 1`` is valid only within it."""
    items: list[KeyValue]


@dataclass(frozen=True, slots=True)
class Connected:
    """The store answers (again)."""

    endpoint: str
    cluster_id: int
    revision: int
    reset: bool
    """True: it is another store, or an older state of the same one; revisions seen so far are void."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The store has stopped answering. Not repeated while attempts to reach it fail."""

    error: KvstoreError


ClientEvent = Connected | Disconnected


@dataclass(frozen=True, slots=True)
class WatchLoss:
    """A watch has ended for good: read its keys again, then start a new watch."""

    kind: str
    """``compacted``, ``reset`` (store replaced or gone back), ``cancelled`` by the server, ``permission``."""
    error: KvstoreError


class WatchListener(Protocol):
    """Receives the events of one or many watches; called on the event loop, must not block, must not raise."""

    def on_live(self, watch_id: int, revision: int) -> None:
        """The server has started the watch (again); ``revision`` is the store's."""

    def on_changes(self, watch_id: int, changes: Sequence[Change]) -> None:
        """Take changes, each key's in revision order; a large batch has only the last change of each key."""

    def on_lost(self, watch_id: int, loss: WatchLoss) -> None:
        """The watch has ended for good."""


@dataclass(frozen=True, slots=True)
class ClientInfo:
    """State of one store's client, for status output."""

    endpoint: str | None
    """The endpoint in use, None while there is none."""
    cluster_id: int | None
    """Id of the etcd cluster last connected to."""
    revision: int
    """Highest store revision seen in this epoch."""
    reconnects: int
    last_error: str | None
