"""The keys of single addresses in one cluster's stores: reads on a miss, and watches on what was read."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import structlog

from lazymesh.core import events, keys
from lazymesh.core.model import Space
from lazymesh.errors import KvstoreError
from lazymesh.kvstore.requests import Reads, Whole
from lazymesh.roles.keywatches import KeyWatches
from lazymesh.roles.logs import OncePer

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazymesh.core.model import Address
    from lazymesh.kvstore.client import EtcdClient
    from lazymesh.kvstore.model import Change, Values, WatchLoss
    from lazymesh.roles.ownerstore import OwnerStore

log = structlog.get_logger()

READ_TIMEOUT_S = 5.0
"""A miss that was not answered for this long has failed (CFP-44921's own limit)."""
REWATCH_S = 1.0
"""Lost key watches are collected for this long before the cluster's addresses are read again."""
READ_PROBLEM_S = 600.0
"""How long a failed read is reported: on a quiet node none may follow for hours that succeeds."""
QUIET_S = 60.0
"""Failures that are alike are logged once in this time."""


class AddressReads:
    """Reads and watches the keys of one cluster's addresses.

    tell: takes events for the resolver.
    on_lost: called when watches were lost, once for all losses of a second; must call ``clear``.
    """

    def __init__(
        self,
        cluster: str,
        primary: EtcdClient,
        owner: OwnerStore,
        tell: Callable[[events.Event], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._cluster = cluster
        self._owner = owner
        self._tell = tell
        self._on_lost = on_lost
        apart = owner.client or primary
        self._clients = {space: primary if space is Space.CACHED else apart for space in Space}
        self._watches = {
            space: KeyWatches(
                client.watches,
                keys.ip_prefix(space, cluster),
                partial(self._on_key_changed, space),
                self._on_keys_lost,
            )
            for space, client in self._clients.items()
        }
        self._rewatch: asyncio.TimerHandle | None = None
        self._logged = OncePer(QUIET_S)
        self._failed: tuple[str, float] | None = None
        """Why the last read failed, and when; None when it did not, or when the owner's problem explains it."""

    @property
    def watched_keys(self) -> int:
        """How many keys are watched."""
        return sum(len(each) for each in self._watches.values())

    @property
    def watched_ranges(self) -> int:
        """How many watches that takes."""
        return sum(each.ranges for each in self._watches.values())

    @property
    def problem(self) -> str | None:
        """Why the last read failed; None when it did not, or when that was long ago."""
        if self._failed is None:
            return None
        why, at = self._failed
        return why if asyncio.get_running_loop().time() < at + READ_PROBLEM_S else None

    def read(self, command: events.Read) -> None:
        """Read the keys of some addresses; an event always follows, since the resolver counts on it."""
        apart, whole = command.addresses, []
        for count in command.whole:
            some, apart = apart[:count], apart[count:]
            text = keys.common_text(some[0])
            prefixes = [keys.ip_prefix(space, self._cluster) + text for space in command.spaces]
            whole.append(Whole(prefixes, keys.own_texts(some)))
        reads = Reads(keys.ip_keys(command.spaces, apart, self._cluster), whole)
        space = command.spaces[0]
        if not self._owner.complete and self._owner.holds(space):
            why = f"not watching the own etcd of {self._cluster}: {self._owner.problem}"
            error = KvstoreError(why, "unavailable")
            asyncio.get_running_loop().call_soon(self._on_read, command, error)
        else:
            self._clients[space].read_soon(reads, READ_TIMEOUT_S, partial(self._on_read, command))

    def watch(self, command: events.Watch) -> None:
        """Watch the keys of some addresses."""
        neighbours = list(keys.neighbours_of(command.addresses))
        for space in command.spaces:
            self._watches[space].follow(neighbours, command.after)

    def unwatch(self, address: Address) -> None:
        """Stop watching every key of the address."""
        for each in self._watches.values():
            each.unfollow(address)

    def clear(self) -> None:
        """Stop watching; forget losses not reported yet."""
        self.stop()
        for each in self._watches.values():
            each.clear()

    def stop(self) -> None:
        """Report no more losses."""
        if self._rewatch is not None:
            self._rewatch.cancel()
            self._rewatch = None

    def _on_read(self, command: events.Read, outcome: Values | KvstoreError) -> None:
        if isinstance(outcome, KvstoreError):
            now = asyncio.get_running_loop().time()
            kind: events.ReadFailure = outcome.kind
            if self._owner.holds(command.spaces[0]) and self._owner.problem:
                kind = "owner"
            else:
                self._failed = str(outcome), now
            if command.whole and self._logged("whole", now):
                log.warning("a /24 could not be read whole", cluster=self._cluster, error=str(outcome))
            self._tell(events.ReadFailed(self._cluster, command.addresses, kind, bool(command.whole)))
        else:
            self._failed = None
            self._tell(
                events.Answered(
                    self._cluster, command.spaces, command.addresses, outcome.values, outcome.revision
                )
            )

    def _on_key_changed(self, space: Space, address: Address, change: Change) -> None:
        self._tell(
            events.Changed(self._cluster, events.KeyState(address, space, change.value, change.mod_revision))
        )

    def _on_keys_lost(self, loss: WatchLoss) -> None:
        if loss.kind == "reset":
            return  # the client reports a replaced store itself, for all watches together
        if self._logged("lost", asyncio.get_running_loop().time()):
            log.warning("a key watch was lost", cluster=self._cluster, kind=loss.kind, error=str(loss.error))
        if self._rewatch is None:
            self._rewatch = asyncio.get_running_loop().call_later(REWATCH_S, self._on_lost)
