"""A cluster's own store, read directly while its primary store is a local kvstoremesh cache.

A store that comes back empty would have every entry removed that the cache does not hold, so it is trusted only once it
is complete, and checked again after each replacement.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from lazymesh.core.model import Space
from lazymesh.core.records import RecordError
from lazymesh.errors import KvstoreError
from lazymesh.kvstore.model import Connected
from lazymesh.roles.storeconfig import RETRY_S, describe_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazymesh.kvstore.client import EtcdClient
    from lazymesh.kvstore.model import ClientEvent

log = structlog.get_logger()


class OwnerStore:
    """The state of one cluster's own store.

    client: direct access to it, None if none was configured or its configuration cannot be used.
    error: why the configuration cannot be used.
    on_replaced: called when another store has taken its place and is complete.
    """

    def __init__(
        self, cluster: str, client: EtcdClient | None, error: str | None, on_replaced: Callable[[], None]
    ) -> None:
        self.client = client
        self.complete = client is None and error is None
        """False while reads of its keys must fail; where nothing was configured there is nothing to wait for."""
        self.behind_cache = False
        """Set once the primary store has described itself as a local cache."""
        self._cluster = cluster
        self._error = error
        self._on_replaced = on_replaced
        self._missing = "it has not been checked yet"
        """Why it is not complete, as of the last check."""
        self._replaced = asyncio.Event()

    @property
    def problem(self) -> str | None:
        """Why it is not watched; None when it is, or when direct access was not configured."""
        if self.client is None:
            return self._error
        info = self.client.info
        missing = None if self.complete else self._missing
        return missing if info.endpoint else info.last_error or missing or "it does not answer"

    def holds(self, space: Space) -> bool:
        """Tell whether a space's keys are in this store, apart from the primary one."""
        return space is not Space.CACHED and (self.behind_cache or self.client is not None)

    async def run(self) -> None:
        """Watch over the store, if there is a client for it, until cancelled."""
        client = self.client
        if client is None:
            await asyncio.Event().wait()
            return
        async with client:
            client.add_listener(self._on_event)
            await self._wait_until_complete(client)
            while True:
                await self._replaced.wait()
                self._replaced.clear()
                await self._wait_until_complete(client)
                self._on_replaced()

    def _on_event(self, event: ClientEvent) -> None:
        if not isinstance(event, Connected):
            log.warning("the cluster's own etcd is silent", cluster=self._cluster, error=str(event.error))
        elif event.reset and self.complete:  # else it is being checked already
            self.complete = False
            self._replaced.set()

    async def _wait_until_complete(self, client: EtcdClient) -> None:
        logged = False
        while True:
            try:
                epoch = client.epoch
                missing = (await describe_store(client, self._cluster)).missing
                self.complete = missing is None and epoch == client.epoch
                self._missing = missing or "it was replaced while it was being checked"
            except KvstoreError as exc:
                self._missing = str(exc)
            except RecordError as exc:
                self._missing = f"its cluster-config is {exc}"
            if self.complete:
                break
            if not logged:
                log.warning(
                    "not watching the cluster's own etcd", cluster=self._cluster, problem=self._missing
                )
                logged = True
            await asyncio.sleep(RETRY_S)
        if logged:
            log.info("watching the cluster's own etcd", cluster=self._cluster)
