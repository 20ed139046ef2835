"""Keeps a lease alive for a writer, and gets a new one when it is lost.

Keys written under a lost lease are gone, or soon will be: the writer receives the new lease and writes them again,
as Cilium's own writers do. The keys are the writer's business, and so is revoking the lease at a clean exit.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import TYPE_CHECKING

from lazymesh.core.backoff import Backoff, BackoffLimits
from lazymesh.errors import KvstoreError
from lazymesh.kvstore.model import Connected

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazymesh.kvstore.client import EtcdClient
    from lazymesh.kvstore.model import ClientEvent


class LeaseKeeper:
    """``run`` it as a task; ``on_lease`` receives the first lease, and each one that replaces a lost one."""

    def __init__(
        self, client: EtcdClient, ttl_s: int, on_lease: Callable[[int], None], backoff: Backoff | None = None
    ) -> None:
        self.lease: int | None = None
        """The lease believed to be alive."""
        self._client = client
        self._ttl_s = ttl_s
        self._on_lease = on_lease
        self._backoff = backoff or Backoff(BackoffLimits(), random.random)
        self._replaced = asyncio.Event()
        """Set when the store was replaced, and the lease with it."""

    async def run(self) -> None:
        """Keep a lease until cancelled; after that it expires by itself, unless it is revoked."""
        self._client.add_listener(self._on_client_event)
        try:
            while True:
                await self._client.wait_connected()
                with contextlib.suppress(KvstoreError):
                    await self._keep(await self._grant())
                self.lease = None
                await asyncio.sleep(self._backoff.next_s())
        finally:
            self._client.remove_listener(self._on_client_event)

    async def _grant(self) -> int:
        self._replaced.clear()
        self.lease = await self._client.grant_lease(self._ttl_s)
        self._backoff.reset()
        self._on_lease(self.lease)
        return self.lease

    async def _keep(self, lease: int) -> None:
        """Return when the lease is lost."""
        expires_at = time.monotonic() + self._ttl_s
        while not self._replaced.is_set() and time.monotonic() < expires_at:
            with contextlib.suppress(TimeoutError):
                # Three attempts within a lease's TTL, as in etcd's own client.
                async with asyncio.timeout(self._ttl_s / 3):
                    await self._replaced.wait()
            with contextlib.suppress(KvstoreError):
                asked_at = time.monotonic()
                granted_s = await self._client.renew_lease(lease)
                expires_at = asked_at + granted_s

    def _on_client_event(self, event: ClientEvent) -> None:
        if isinstance(event, Connected) and event.reset:
            self._replaced.set()
