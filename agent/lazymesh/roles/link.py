"""One cluster's link: its stores, what is followed in them, the reads and key watches of its addresses.

A store is believed only when it is complete: its cluster-config is there, and so are the sync canaries it announces.
Otherwise an apiserver that comes back with an empty etcd would look like a cluster whose pods have all gone. So after
each replacement of the store the followers wait for that again before they list (mark and sweep over what was told).
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import structlog

from lazymesh.core import events, keys
from lazymesh.core.model import Reason, Space
from lazymesh.core.records import RecordError, decode_cluster_config
from lazymesh.errors import KvstoreError
from lazymesh.kvstore.client import EtcdClient
from lazymesh.kvstore.follower import PrefixFollower
from lazymesh.kvstore.model import Connected
from lazymesh.kvstore.requests import Reads, Whole
from lazymesh.kvstore.supervisor import Options
from lazymesh.kvstore.transport import Transport
from lazymesh.roles.keywatches import KeyWatches, neighbours_of
from lazymesh.roles.logs import OncePer
from lazymesh.tasks import together

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from lazymesh.core.model import Address
    from lazymesh.core.records import ClusterConfig
    from lazymesh.kvstore.config import EtcdConfig
    from lazymesh.kvstore.model import Change, ClientEvent, Values, WatchLoss

log = structlog.get_logger()

READ_TIMEOUT_S = 5.0
"""A miss that was not answered for this long has failed (CFP-44921's own limit)."""
RETRY_S = 0.5
"""Between looks for a cluster-config or a canary that is not there yet."""
REWATCH_S = 1.0
"""Lost key watches are collected for this long before the cluster's addresses are read again."""

READ_PROBLEM_S = 600.0
"""Why a read failed is told for so long: on a quiet node none may follow for hours that succeeds."""

QUIET_S = 60.0
"""What goes wrong with many reads alike is logged once in this time."""

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
    """Runs one cluster; ``state`` is for people: connecting, incomplete, listing, ready, silent, refused, crashed."""

    def __init__(self, config: LinkConfig, observer: LinkObserver) -> None:
        self.name = config.name
        self.config = config
        self.state = "connecting"
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
        self._remote = EtcdClient(config.remote, options) if config.remote else None
        self._followers: list[PrefixFollower] = []
        self._synced: set[bytes] = set()
        self._followed = {space: self._key_watches(space) for space in Space}
        self._stale = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: asyncio.Future[None] | None = None
        self._rewatch: asyncio.TimerHandle | None = None
        self._said = OncePer(QUIET_S)
        self._read_failed: tuple[str, float] | None = None
        """Why the last read of addresses failed, and when; None when it did not, or owner_problem says it."""
        self._cached = False
        """The primary store is a local cache."""
        self._owner_complete = config.remote_error is None
        """Whether the owner's own store, behind a cache, may be believed; while not, it is looked at, if it can be."""
        self._owner_lacks = "it was not looked at yet"
        """Why it may not, as of the last look."""
        self._primary.on_crash = self.fail
        if self._remote is not None:
            self._remote.on_crash = self.fail

    @property
    def client(self) -> EtcdClient:
        """The store that nodes and identities come from."""
        return self._primary

    @property
    def watched_keys(self) -> int:
        """How many keys of addresses are being watched."""
        return sum(len(one) for one in self._followed.values())

    @property
    def watched_ranges(self) -> int:
        """How many watches that takes."""
        return sum(one.ranges for one in self._followed.values())

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of nodes and identities told so far."""
        return (len(self._followers[0]), len(self._followers[1])) if self._followers else (0, 0)

    @property
    def read_problem(self) -> str | None:
        """Why the last read of addresses failed, None when it did not, or that is long ago."""
        if self._read_failed is None:
            return None
        why, at = self._read_failed
        return why if asyncio.get_running_loop().time() < at + READ_PROBLEM_S else None

    @property
    def owner_problem(self) -> str | None:
        """Why the owner's own store, behind a cache, is not followed; None when it is, or was not given."""
        if self._remote is None:
            return self.config.remote_error
        info = self._remote.info
        lacks = None if self._owner_complete else self._owner_lacks
        return lacks if info.endpoint else info.last_error or lacks or "it does not answer"

    async def run(self) -> None:
        """Keep the link until cancelled; what raises in a callback of ours is raised here."""
        self._failure = asyncio.get_running_loop().create_future()
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._primary)
            if self._remote:
                await stack.enter_async_context(self._remote)
                self._remote.add_listener(self._on_remote_event)
                self._await_owner(self._remote, again=False)
            self._primary.add_listener(self._on_primary_event)
            stack.push_async_callback(self._stop_tasks)
            while not self._failure.done():
                self._stale.clear()
                described = await self._complete()
                if described is not None:
                    await self._follow(*described)
                else:
                    await asyncio.sleep(RETRY_S)
        self._failure.result()

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

    # --- reads and watches of single addresses ----------------------------------------------------------------------

    def read(self, command: events.Read) -> None:
        """Read the keys of some addresses; the answer comes as an event, in any case: the resolver counts on it."""
        apart, whole = command.addresses, []
        for count in command.whole:
            some, apart = apart[:count], apart[count:]
            text = keys.common_text(some[0])
            prefixes = [keys.ip_prefix(space, self.name) + text for space in command.spaces]
            whole.append(Whole(prefixes, keys.own_texts(some)))
        reads = Reads(keys.ip_keys(command.spaces, apart, self.name), whole)
        client = self._client_of(command.spaces[0])
        if not self._owner_complete and self._is_for_owner(command):
            why = f"the store of {self.name} itself is not followed: {self.owner_problem}"
            error = KvstoreError(why, "unavailable")
            asyncio.get_running_loop().call_soon(self._on_read, command, error)
        else:
            client.read_soon(reads, READ_TIMEOUT_S, partial(self._on_read, command))

    def _on_read(self, command: events.Read, outcome: Values | KvstoreError) -> None:
        if isinstance(outcome, KvstoreError):
            kind: events.ReadFailure = outcome.kind
            if self._is_for_owner(command) and self.owner_problem:
                kind = "owner"
            else:
                self._read_failed = str(outcome), asyncio.get_running_loop().time()
            if command.whole and self._said("whole", asyncio.get_running_loop().time()):
                log.warning("a /24 could not be read whole", cluster=self.name, error=str(outcome))
            self._tell(events.ReadFailed(self.name, command.addresses, kind, bool(command.whole)))
        else:
            self._read_failed = None
            self._tell(
                events.Answered(
                    self.name, command.spaces, command.addresses, outcome.values, outcome.revision
                )
            )

    def _tell(self, event: events.Event) -> None:
        try:
            self._observer.on_event(event)
        except Exception as exc:  # as in ``guard``
            self.fail(exc)

    def watch(self, command: events.Watch) -> None:
        """Watch the keys of some addresses."""
        neighbours = neighbours_of(command.addresses)
        for space in command.spaces:
            self._followed[space].follow(neighbours, command.after)

    def unwatch(self, address: Address) -> None:
        """Stop watching every key of the address."""
        for one in self._followed.values():
            one.unfollow(address)

    def _on_key_changed(self, space: Space, address: Address, change: Change) -> None:
        self._tell(
            events.Changed(self.name, events.KeyState(address, space, change.value, change.mod_revision))
        )

    def _on_keys_lost(self, loss: WatchLoss) -> None:
        """Keys are not watched any more: collect such losses, then have everything of the cluster read again."""
        if loss.kind == "reset":
            return  # told by the client's own event, for all of them together
        if self._said("lost", asyncio.get_running_loop().time()):
            log.warning("a key watch was lost", cluster=self.name, kind=loss.kind, error=str(loss.error))
        if self._rewatch is None:
            self._rewatch = asyncio.get_running_loop().call_later(REWATCH_S, self._reset)

    def _reset(self) -> None:
        """Forget every key watch; the resolver reads all addresses again and asks for new ones."""
        if self._rewatch is not None:
            self._rewatch.cancel()
            self._rewatch = None
        for one in self._followed.values():
            one.clear()
        self._observer.on_event(events.StoreReset(self.name))
        if self.state == "ready":
            self._observer.on_event(events.ClusterReady(self.name))

    def _client_of(self, space: Space) -> EtcdClient:
        return self._primary if space is Space.CACHED or self._remote is None else self._remote

    def _is_for_owner(self, command: events.Read) -> bool:
        """Tell whether a read is for the owner's own store, apart from the primary one."""
        return command.spaces[0] is not Space.CACHED and (self._cached or self._remote is not None)

    def _key_watches(self, space: Space) -> KeyWatches:
        watches, prefix = self._client_of(space).watches, keys.ip_prefix(space, self.name)
        return KeyWatches(watches, prefix, partial(self._on_key_changed, space), self._on_keys_lost)

    # --- the store as a whole ---------------------------------------------------------------------------------------

    async def _complete(self) -> tuple[ClusterConfig, int] | None:
        """Return how the store describes itself, at which revision; None when it is not complete, or refused."""
        try:
            config, revision, missing = await self._describe(self._primary)
            self._cached = config.cached if config else self._cached
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

    async def _describe(self, client: EtcdClient) -> _Description:
        """Ask a store for its cluster-config, and whether it is complete."""
        answer = await client.read_many([keys.cluster_config_key(self.name)])
        found, revision = answer.values[0], answer.revision
        if found is None:
            return _Description(None, revision, "no cluster-config in its store yet")
        config = decode_cluster_config(found.value)
        if not config.synced_canaries:
            return _Description(config, revision, None)
        wanted = [keys.canary_key(what, config.cached, self.name) for what in ("nodes", "identities", "ip")]
        result = await client.read_many(wanted)
        for key, canary in zip(wanted, result.values, strict=True):
            if canary is None:
                return _Description(config, revision, f"its store is not complete yet: no {key.decode()}")
        return _Description(config, revision, None)

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

    def _on_remote_event(self, event: ClientEvent) -> None:
        if not isinstance(event, Connected):
            log.warning("the owner's store is silent", cluster=self.name, error=str(event.error))
        elif event.reset and self._remote is not None:
            self._await_owner(self._remote, again=True)

    def _await_owner(self, remote: EtcdClient, *, again: bool) -> None:
        """Believe the owner's store once it is complete, and read everything again if it is another one."""
        if self._owner_complete:
            self._owner_complete = False
            self._start(self._look_at_owner(remote, again=again))

    async def _look_at_owner(self, remote: EtcdClient, *, again: bool) -> None:
        told = False
        while not self._owner_complete:
            try:
                epoch = remote.epoch
                missing = (await self._describe(remote)).missing
                self._owner_complete = missing is None and epoch == remote.epoch
                self._owner_lacks = missing or "it was replaced while it was looked at"
            except KvstoreError as exc:
                self._owner_lacks = str(exc)
            except RecordError as exc:
                self._owner_lacks = f"its cluster-config is {exc}"
            if not self._owner_complete:
                if not told:
                    log.warning(
                        "the owner's store is not followed", cluster=self.name, problem=self._owner_lacks
                    )
                told = True
                await asyncio.sleep(RETRY_S)
        if told:
            log.info("the owner's store is followed", cluster=self.name)
        if again:
            self._reset()

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

    async def _stop_tasks(self) -> None:
        if self._rewatch is not None:
            self._rewatch.cancel()
            self._rewatch = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class _Description(NamedTuple):
    """What a store says of itself."""

    config: ClusterConfig | None
    revision: int
    """Of the store, when it said so."""
    missing: str | None
    """What it lacks to be complete."""


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
