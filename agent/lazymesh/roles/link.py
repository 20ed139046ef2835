"""One cluster's link: follows its nodes and identities for as long as the cluster is configured.

A store is trusted only when it is complete: its cluster-config is there, and so are the sync canaries it announces.
Otherwise an apiserver that comes back with an empty etcd would look like a cluster whose pods have all gone. So after
each replacement of the store the followers wait for that again before they list (mark and sweep over what was known).
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import structlog

from lazymesh.core import events, keys
from lazymesh.core.model import Reason, Space
from lazymesh.core.records import RecordError, decode_cluster_config
from lazymesh.errors import KvstoreError
from lazymesh.kvstore.client import EtcdClient
from lazymesh.kvstore.follower import PrefixFollower
from lazymesh.kvstore.model import Connected
from lazymesh.kvstore.supervisor import Options
from lazymesh.kvstore.transport import Transport
from lazymesh.roles.addressreads import AddressReads
from lazymesh.roles.ownerstore import OwnerStore
from lazymesh.roles.storeconfig import RETRY_S, describe_store
from lazymesh.tasks import together

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lazymesh.core.records import ClusterConfig
    from lazymesh.kvstore.config import EtcdConfig
    from lazymesh.kvstore.model import Change, ClientEvent, WatchLoss

log = structlog.get_logger()

State = Literal["connecting", "incomplete", "listing", "ready", "silent", "refused", "crashed"]

DIRECT = ((Space.PUSHED, Space.PULL_ONLY),)


class LinkObserver(Protocol):
    """Receives what a link learns, on the event loop."""

    def on_config(
        self, link: ClusterLink, config: ClusterConfig, spaces: tuple[tuple[Space, ...], ...]
    ) -> str | None:
        """Judge the cluster by its description of itself; return why it is refused, or None."""

    def on_nodes(self, link: ClusterLink, changes: Sequence[Change]) -> None:
        """Take changed node records; keys are below ``link.nodes_prefix``."""

    def on_identities(self, link: ClusterLink, changes: Sequence[Change]) -> None:
        """Take changed identities; keys are below ``link.identities_prefix``."""

    def on_event(self, event: events.Event) -> None:
        """Take an event for the resolver."""

    def on_listed(self, link: ClusterLink) -> None:
        """Note that all nodes and identities have been reported (again)."""

    def on_silent(self, link: ClusterLink) -> None:
        """Note that the store does not answer."""

    def on_relisting(self, link: ClusterLink) -> None:
        """Note that all are about to be reported again: what is not reported by on_listed is gone."""


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """Where to read a cluster's records.

    primary: Cilium's own configuration, for the cluster's store or the local cache.
    remote: direct access to the cluster's store, if configured separately.
    remote_error: why that configuration cannot be used; then remote is None.
    transport: carries the calls, native or grpcio.
    digests: of the files that all this is from; while they are equal, no reconnect is needed.
    """

    name: str
    primary: EtcdConfig
    remote: EtcdConfig | None = None
    remote_error: str | None = None
    transport: str = "native"
    digests: tuple[bytes, ...] = ()

    @property
    def stores(self) -> tuple[EtcdConfig, ...]:
        """All stores that are read."""
        return (self.primary,) if self.remote is None else (self.primary, self.remote)

    @property
    def names_owner(self) -> bool:
        """Whether direct access is configured, even if its configuration cannot be used."""
        return self.remote is not None or self.remote_error is not None


class ClusterLink:
    """Runs one cluster."""

    def __init__(self, config: LinkConfig, observer: LinkObserver) -> None:
        self.name = config.name
        self.config = config
        self.state: State = "connecting"
        self.problem: str | None = None
        """Why it is not ready, in one line; None when it is."""
        self.tried = False
        """Whether the first attempt to reach it is over, successful or not."""
        self.nodes_prefix = b""
        self.identities_prefix = b""
        self.refused_total: dict[str, int] = {"node": 0, "identity": 0, "cluster-config": 0}
        self._observer = observer
        options = Options(transport=Transport(kind=config.transport))
        self._primary = EtcdClient(config.primary, options)
        remote = EtcdClient(config.remote, options) if config.remote else None
        self._primary.on_crash = self.fail
        if remote is not None:
            remote.on_crash = self.fail
        self.owner = OwnerStore(config.name, remote, config.remote_error, self._reset)
        self.addresses = AddressReads(config.name, self._primary, self.owner, self._tell, self._reset)
        # Bound here, so that a miss pays for no call in between.
        self.read = self.addresses.read
        self.watch = self.addresses.watch
        self.unwatch = self.addresses.unwatch
        self._followers: list[PrefixFollower] = []
        self._synced: set[bytes] = set()
        self._stale = asyncio.Event()
        self._failure: asyncio.Future[None] | None = None

    @property
    def client(self) -> EtcdClient:
        """The store that nodes and identities come from."""
        return self._primary

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of nodes and identities known so far."""
        return (len(self._followers[0]), len(self._followers[1])) if self._followers else (0, 0)

    async def run(self) -> None:
        """Keep the link until cancelled; raise what its callbacks raise."""
        self._failure = asyncio.get_running_loop().create_future()
        async with self._primary:
            self._primary.add_listener(self._on_primary_event)
            try:
                await together(self.owner.run(), self._keep(self._failure))
            finally:
                self.addresses.stop()
        self._failure.result()

    async def _keep(self, failure: asyncio.Future[None]) -> None:
        """Follow the primary store, again after each replacement, until the link has failed."""
        while not failure.done():
            self._stale.clear()
            described = await self._complete()
            if described is not None:
                await self._follow(*described)
            else:
                await asyncio.sleep(RETRY_S)

    def guard(self, tell: Callable[[], None]) -> None:
        """Call on behalf of a watch or connection, which is shared, so that no exception of ours may end it."""
        try:
            tell()
        except Exception as exc:
            self.fail(exc)

    def fail(self, error: BaseException) -> None:
        """End the link: the fault is in lazymesh, not in the store."""
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)
            self._failure.exception()  # mark it retrieved: nothing may be waiting any more
            self._stale.set()

    def _tell(self, event: events.Event) -> None:
        try:
            self._observer.on_event(event)
        except Exception as exc:  # as in ``guard``
            self.fail(exc)

    def _reset(self) -> None:
        """Forget every key watch; the resolver reads all addresses again and asks for new watches."""
        self.addresses.clear()
        self._observer.on_event(events.StoreReset(self.name))
        if self.state == "ready":
            self._observer.on_event(events.ClusterReady(self.name))

    # --- the store as a whole ---------------------------------------------------------------------------------------

    async def _complete(self) -> tuple[ClusterConfig, int] | None:
        """Return the store's description of itself and its revision; None when it is incomplete or refused."""
        try:
            config, revision, missing = await describe_store(self._primary, self.name)
            if config is not None:
                self.owner.behind_cache = config.cached
            refusal = self._observer.on_config(self, config, self._spaces(config)) if config else None
        except KvstoreError as exc:
            self._fall_silent(exc)
            return None
        except RecordError as exc:
            self._refuse(f"its cluster-config is {exc.reason.value}: {exc.detail}")
            return None
        if refusal is not None:
            self._refuse(refusal)
            return None
        if config is None or missing:
            self._wait_for(missing or "")
            return None
        return config, revision

    def _spaces(self, config: ClusterConfig) -> tuple[tuple[Space, ...], ...]:
        if not config.cached:
            return DIRECT
        # An owner whose configuration is unusable counts as down: it may have what the cache has not.
        return ((Space.CACHED,), *DIRECT) if self.config.names_owner else ((Space.CACHED,),)

    def _wait_for(self, problem: str) -> None:
        self.tried = True
        if self.problem != problem:
            log.info("waiting for a cluster", cluster=self.name, problem=problem)
        self.state, self.problem = "incomplete", problem

    def _refuse(self, problem: str) -> None:
        self.tried = True
        self.refused_total["cluster-config"] += self.state != "refused"
        if self.state != "refused" or self.problem != problem:
            log.error("cluster refused", cluster=self.name, reason=Reason.FORGED.value, problem=problem)
        self.state, self.problem = "refused", problem

    async def _follow(self, config: ClusterConfig, revision: int) -> None:
        """Follow nodes and identities until the store is replaced or describes itself differently."""
        self.state = "listing"
        self.nodes_prefix = keys.nodes_prefix(config.cached, self.name)
        self.identities_prefix = keys.identities_prefix(config.cached, self.name)
        if [f.prefix for f in self._followers] != [self.nodes_prefix, self.identities_prefix]:
            self._observer.on_relisting(self)
            self._followers = [
                PrefixFollower(self._primary, prefix, _PrefixObserver(self, prefix))
                for prefix in (self.nodes_prefix, self.identities_prefix)
            ]
        self._synced.clear()
        key, watches = keys.cluster_config_key(self.name), self._primary.watches
        watch = watches.add(key, _ConfigObserver(self, config), revision + 1)
        try:
            await together(*(follower.run() for follower in self._followers), self._stale.wait())
        finally:
            watches.remove(watch)
        self._reset()

    def on_config_changed(self, known: ClusterConfig, value: bytes) -> None:
        """Start over if the description has changed: another id, for example."""
        with contextlib.suppress(RecordError):
            if decode_cluster_config(value) == known:
                return  # it is rewritten every few minutes
        self._fall_silent(KvstoreError("it describes itself differently and is listed again"))
        self._followers = []  # what was refused because of it must be reported once more
        self._stale.set()

    def on_prefix_changes(self, prefix: bytes, changes: Sequence[Change]) -> None:
        """Pass nodes and identities on."""
        if prefix == self.nodes_prefix:
            self._observer.on_nodes(self, changes)
        else:
            self._observer.on_identities(self, changes)

    def on_prefix_synced(self, prefix: bytes) -> None:
        """Make the cluster ready once both prefixes are listed."""
        self._synced.add(prefix)
        if len(self._synced) == len(self._followers):
            if self.state != "ready":
                log.info("cluster ready", cluster=self.name, nodes=self.sizes[0], identities=self.sizes[1])
            self.state, self.problem, self.tried = "ready", None, True
            self._observer.on_listed(self)

    def on_prefix_silent(self, prefix: bytes, error: KvstoreError) -> None:
        """Note lost contact: what is known stays for a while; the other prefix may still be followed."""
        self._synced.discard(prefix)
        self._fall_silent(error)

    def _fall_silent(self, error: KvstoreError) -> None:
        self.tried = True
        if self.state != "silent":
            log.warning("cluster silent", cluster=self.name, error=str(error))
            self.state = "silent"
            self._observer.on_silent(self)
        self.problem = str(error)

    def _on_primary_event(self, event: ClientEvent) -> None:
        if not isinstance(event, Connected):
            error = event.error
            self.guard(lambda: self._fall_silent(error))
        elif event.reset:
            log.warning(
                "the store was replaced or went back in time", cluster=self.name, endpoint=event.endpoint
            )
            self._stale.set()


@dataclass(frozen=True, slots=True)
class _ConfigObserver:
    link: ClusterLink
    known: ClusterConfig

    def on_live(self, _watch_id: int, _revision: int) -> None:
        """Do nothing: it does not matter when a watch is live."""

    def on_changes(self, _watch_id: int, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.value is not None:  # its deletion, when a cluster is about to leave, says nothing new
                value = change.value
                self.link.guard(lambda value=value: self.link.on_config_changed(self.known, value))  # type: ignore[misc]

    def on_lost(self, _watch_id: int, _loss: WatchLoss) -> None:
        """Do nothing: the key is read again when the store is replaced."""


@dataclass(frozen=True, slots=True)
class _PrefixObserver:
    link: ClusterLink
    prefix: bytes

    def on_changes(self, changes: Sequence[Change]) -> None:
        self.link.guard(lambda: self.link.on_prefix_changes(self.prefix, changes))

    def on_synced(self) -> None:
        self.link.guard(lambda: self.link.on_prefix_synced(self.prefix))

    def on_silent(self, error: KvstoreError) -> None:
        self.link.guard(lambda: self.link.on_prefix_silent(self.prefix, error))
