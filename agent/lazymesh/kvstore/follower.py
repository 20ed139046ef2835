"""Follows a prefix: reports all keys, then every change, and makes up for what was missed.

List at one revision, watch from the next. When the watch is lost for good (store replaced, compacted, cancelled) it
lists again, reports what is new, and what has vanished as deleted: mark and sweep over the keys reported so far. It
keeps those keys with their revisions, never the values, whose meaning only the observer knows.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from typing import TYPE_CHECKING, Protocol

from lazymesh.core.backoff import Backoff, BackoffLimits
from lazymesh.errors import KvstoreError
from lazymesh.kvstore.model import Change, Disconnected, WatchLoss
from lazymesh.tasks import FairShare

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazymesh.kvstore.client import EtcdClient
    from lazymesh.kvstore.model import ClientEvent, Page

MOST_KEYS = 200_000
"""No cluster has so many nodes or identities; one that claims it would fill our memory."""
LONGEST_KEY = 512
"""Longer keys mean nothing to any observer: they are reported, but not remembered."""


class Observer(Protocol):
    """Receives what happens to a prefix; called on the event loop, must not block, must not raise."""

    def on_changes(self, changes: Sequence[Change]) -> None:
        """Take keys written or (value None) deleted; in the store's order, except for those of a listing."""

    def on_synced(self) -> None:
        """All keys have been reported and changes follow; after a reconnect, missed changes come next."""

    def on_silent(self, error: KvstoreError) -> None:
        """Contact is lost: what was reported may be out of date until the next on_synced."""


class PrefixFollower:
    """``run`` it as a task: one for each prefix, any number of them for each client."""

    def __init__(
        self, client: EtcdClient, prefix: bytes, observer: Observer, backoff: Backoff | None = None
    ) -> None:
        self.prefix = prefix
        self._client = client
        self._observer = observer
        self._backoff = backoff or Backoff(BackoffLimits(), random.random)
        self._told: dict[bytes, int] = {}
        """mod_revision of each key that the observer believes to exist."""
        self._epoch = client.epoch
        self._share = FairShare()
        self._ended = asyncio.Event()
        """Set when the watch is gone and a listing is due."""
        self._loss: WatchLoss | None = None

    def __len__(self) -> int:
        return len(self._told)

    async def run(self) -> None:
        """Follow until cancelled."""
        self._client.add_listener(self._on_client_event)
        try:
            while True:
                await self._client.wait_connected()
                try:
                    await self._follow()
                except KvstoreError as exc:
                    self._observer.on_silent(exc)
                    await asyncio.sleep(self._backoff.next_s())
        finally:
            self._client.remove_listener(self._on_client_event)

    async def _follow(self) -> None:
        """List, then watch until the watch is lost for good."""
        revision, epoch = await self._list()
        if epoch != self._client.epoch:
            # The store was replaced during the listing: the revision is not one of the new store.
            return
        self._ended.clear()
        self._loss = None
        watch_id = self._client.watches.add(self.prefix, self, revision + 1, prefix=True)
        try:
            await self._ended.wait()
        finally:
            self._client.watches.remove(watch_id)
        if self._loss and self._loss.kind != "reset":
            raise self._loss.error

    async def _list(self) -> tuple[int, int]:
        seen: set[bytes] = set()
        revision = epoch = 0
        async with aclosing(self._client.list_prefix(self.prefix)) as pages:
            async for page in pages:
                revision, epoch = page.revision, page.epoch
                changes = self._news_of(page)
                await self._share.work(changes, lambda piece: self.on_changes(0, piece))
                seen.update(item.key for item in page.items if len(item.key) <= LONGEST_KEY)
                if len(seen) > MOST_KEYS:
                    raise self._too_many()
        gone = [Change(key, None, revision) for key in self._told if key not in seen]
        await self._share.work(gone, lambda piece: self.on_changes(0, piece))
        return revision, epoch

    def _news_of(self, page: Page) -> list[Change]:
        same_store = page.epoch == self._epoch
        if not same_store:
            # Revisions of another store say nothing about this one's values, so every key counts as changed.
            self._told = dict.fromkeys(self._told, 0)
            self._epoch = page.epoch
        told = self._told
        return [
            Change(item.key, item.value, item.mod_revision)
            for item in page.items
            if told.get(item.key) != item.mod_revision
        ]

    def on_changes(self, _watch_id: int, changes: Sequence[Change]) -> None:
        """Pass changes on, and remember which keys the observer now believes to exist."""
        for change in changes:
            if change.value is None:
                self._told.pop(change.key, None)
            elif len(change.key) <= LONGEST_KEY:
                self._told[change.key] = change.mod_revision
        self._observer.on_changes(changes)
        if len(self._told) > MOST_KEYS:
            self._loss = WatchLoss("cancelled", self._too_many())
            self._ended.set()

    def _too_many(self) -> KvstoreError:
        prefix = self.prefix.decode(errors="replace")
        return KvstoreError(
            f"there are more than {MOST_KEYS} keys below {prefix}: find out what writes them", "protocol"
        )

    def on_live(self, _watch_id: int, _revision: int) -> None:
        """Report that the prefix is followed (again)."""
        self._backoff.reset()
        self._observer.on_synced()

    def on_lost(self, _watch_id: int, loss: WatchLoss) -> None:
        """List the prefix again."""
        self._loss = loss
        self._ended.set()

    def _on_client_event(self, event: ClientEvent) -> None:
        if isinstance(event, Disconnected):
            self._observer.on_silent(event.error)
