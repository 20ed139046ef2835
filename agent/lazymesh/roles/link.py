"""One cluster's link: its stores, what is followed in them, the reads and key watches of its addresses.

A store is believed only when it is complete: its cluster-config is there, and so are the sync canaries it announces.
Otherwise an apiserver that comes back with an empty etcd would look like a cluster whose pods have all gone. So after
each replacement of the store the followers wait for that again before they list (mark and sweep over what was told).
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
    """Who is told what a link learns; called on the event loop."""

    def on_config(
        self, link: ClusterLink, config: ClusterConfig, spaces: tuple[tuple[Space, ...], ...]
    ) -> str | None:
        """The cluster described itself; return why it is refused, or None."""

    def on_nodes(self, link: ClusterLink, changes: Sequence[Change]) -> None:
        """Node records changed; keys are below ``link.nodes_prefix``."""

    def on_identities(self, link: ClusterLink, changes: Sequence[Change]) -> None:
        """Identities changed; keys are below ``link.identities_prefix``."""

    def on_event(self, event: events.Event) -> None:
        """Something for the resolver."""

    def on_listed(self, link: ClusterLink) -> None:
        """Nodes and identities are all told (again)."""

    def on_silent(self, link: ClusterLink) -> None:
        """The store does not answer."""

    def on_relisting(self, link: ClusterLink) -> None:
        """All nodes and identities will be told from the start: what is not told until on_listed is no more."""


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """Where a cluster's records are to be read.

    primary: Cilium's own configuration, of the cluster's store or of the local cache.
    remote: direct access to the cluster's store, if given apart.
    remote_error: why that cannot be used as it was given; then remote is None.
    transport: what carries the calls, native or grpcio.
    """

    name: str
    primary: EtcdConfig
    remote: EtcdConfig | None = None
    remote_error: str | None = None
    transport: str = "native"

    @property
    def stores(self) -> tuple[EtcdConfig, ...]:
        """All that is read."""
        return (self.primary,) if self.remote is None else (self.primary, self.remote)

    @property
    def names_owner(self) -> bool:
        """Tell whether direct access was given, were it of no use."""
        return self.remote is not None or self.remote_error is not None


class ClusterLink:
    """Runs one cluster."""

    def __init__(self, config: LinkConfig, observer: LinkObserver) -> None:
        self.name = config.name
        self.config = config
        self.state: State = "connecting"
        self.problem: str | None = None
        """One line saying why it is not ready, None when it is."""
        self.tried = False
        """The first attempt to reach it is over, well or ill."""
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
        """Numbers of nodes and identities told so far."""
        return (len(self._followers[0]), len(self._followers[1])) if self._followers else (0, 0)

    async def run(self) -> None:
        """Keep the link until cancelled; what raises in a callback of ours is raised here."""
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
        """Call on behalf of a watch or a connection, which many share and no exception of ours must end."""
        try:
            tell()
        except Exception as exc:
            self.fail(exc)

    def fail(self, error: BaseException) -> None:
        """End the link: something is wrong with us, not with the store."""
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)
            self._failure.exception()  # seen: it may come when nobody waits any more
            self._stale.set()

    def _tell(self, event: events.Event) -> None:
        try:
            self._observer.on_event(event)
        except Exception as exc:  # as in ``guard``
            self.fail(exc)

    def _reset(self) -> None:
        """Forget every key watch; the resolver reads all addresses again and asks for new ones."""
        self.addresses.clear()
        self._observer.on_event(events.StoreReset(self.name))
        if self.state == "ready":
            self._observer.on_event(events.ClusterReady(self.name))

    # --- the store as a whole ---------------------------------------------------------------------------------------

    async def _complete(self) -> tuple[ClusterConfig, int] | None:
        """Return how the store describes itself, at which revision; None when it is not complete, or refused."""
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
        # An owner that cannot be asked is as good as down: what the cache does not have may be there all the same.
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
        """Follow nodes and identities until the store is replaced, or describes itself differently."""
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
        """Begin anew if it says something else now: another id, for one."""
        with contextlib.suppress(RecordError):
            if decode_cluster_config(value) == known:
                return  # it is written again every few minutes
        self._fall_silent(KvstoreError("it describes itself differently, and is listed anew"))
        self._followers = []  # what was refused because of it is to be told once more
        self._stale.set()

    def on_prefix_changes(self, prefix: bytes, changes: Sequence[Change]) -> None:
        """Pass nodes and identities on."""
        if prefix == self.nodes_prefix:
            self._observer.on_nodes(self, changes)
        else:
            self._observer.on_identities(self, changes)

    def on_prefix_synced(self, prefix: bytes) -> None:
        """Once both are told, the cluster is ready."""
        self._synced.add(prefix)
        if len(self._synced) == len(self._followers):
            if self.state != "ready":
                log.info("cluster ready", cluster=self.name, nodes=self.sizes[0], identities=self.sizes[1])
            self.state, self.problem, self.tried = "ready", None, True
            self._observer.on_listed(self)

    def on_prefix_silent(self, prefix: bytes, error: KvstoreError) -> None:
        """Contact is lost: what is known stays, for a while. The other prefix may be followed as before."""
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
                "the store was replaced, or went back in time", cluster=self.name, endpoint=event.endpoint
            )
            self._stale.set()


@dataclass(frozen=True, slots=True)
class _ConfigObserver:
    link: ClusterLink
    known: ClusterConfig

    def on_live(self, _watch_id: int, _revision: int) -> None:
        """Nothing hangs on it."""

    def on_changes(self, _watch_id: int, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.value is not None:  # a cluster that is about to leave says nothing else of itself
                value = change.value
                self.link.guard(lambda value=value: self.link.on_config_changed(self.known, value))  # type: ignore[misc]

    def on_lost(self, _watch_id: int, _loss: WatchLoss) -> None:
        """It is looked at again with the next connection to another store."""


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
