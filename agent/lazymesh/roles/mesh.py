"""The mesh as this node sees it: a link per configured cluster, one table of pod CIDRs, the identities and the policy.

Order of effects for every identity: policy map first, then the resolver, so that no entry is installed before policy
has judged its identity. For every CIDR, the kernel's map and the resolver's table change together.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from lazymesh.core import events, keys
from lazymesh.core.clusters import ClusterInfo, MeshState
from lazymesh.core.identities import check_identity, check_labels, identity_range
from lazymesh.core.records import RecordError, decode_identity, decode_node
from lazymesh.errors import DatapathError, SettingsError
from lazymesh.roles.configdir import LOOK_EVERY_S, ClusterFile, read_directory
from lazymesh.roles.link import ClusterLink, LinkConfig
from lazymesh.roles.logs import OncePer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lazymesh.core.model import Network, Space
    from lazymesh.core.records import ClusterConfig
    from lazymesh.datapath.maps import MeshCidrs
    from lazymesh.kvstore.model import Change
    from lazymesh.roles.enforcement import Enforcement
    from lazymesh.settings import MeshSettings

log = structlog.get_logger()

TABLE_DELAY_S = 0.02
"""Node records that come in a burst lead to one new table, not one each."""
TABLE_SHARE = 3
"""The next table is made after this many times the last one's duration: a cluster may write nodes endlessly."""
COMPLAIN_EVERY_S = 600.0
RESTART_S = 5.0
"""A link that ended by a bug of lazymesh, or because its map is full, is started again after this long."""
EMPTY_S = 10.0
"""Without any cluster's file for this long, there is none: a Secret may be mounted while the agent starts."""
RETRY_TABLE_S = 1.0
"""Between attempts to write pod CIDRs that the kernel has refused."""
_KEY_SHOWN = 100
_NOTHING: tuple[set[str], set[int]] = (set(), set())


class Mesh:
    """Owns the links; tells the resolver through ``feed``."""

    def __init__(
        self,
        settings: MeshSettings,
        cidrs: MeshCidrs,
        enforcement: Enforcement,
        feed: Callable[[events.Event], None],
    ) -> None:
        self.links: dict[str, ClusterLink] = {}
        self.identities: set[int] = set()
        """Identities whose labels are known and judged."""
        self.file_errors: dict[str, str] = {}
        """Clusters whose configuration file cannot be used, and why."""
        self._settings = settings
        self._cidrs = cidrs
        self._enforcement = enforcement
        self.on_event = feed
        """Takes events for the resolver, ours and the links'; an answer pays for no call in between."""
        self._state = MeshState(settings.cluster_id, settings.mesh_cidrs)
        self.table = MeshState().table()
        """The table in force; it has the operator's CIDRs once ``run`` has written them."""
        self._leftovers: set[Network] = set()
        """CIDRs that an earlier agent left in the kernel, and no cluster has claimed so far."""
        self._files: dict[str, tuple[ClusterFile, ClusterFile | None]] = {}
        self._direct: dict[str, ClusterFile] = {}
        """Contents of the directory for direct access at the last look."""
        self._missing: set[str] = set()
        """Clusters that were gone at the last look: a file may be in the middle of being written."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._complained = OncePer(COMPLAIN_EVERY_S)
        self._refusals: dict[str, OncePer] = {}
        """By cluster: one with a flood of bad records silences only itself."""
        self.unread: str | None = None
        """Why the directories could not be read at the last look; their former contents are still followed."""
        self.problem: str | None = None
        """Why the pod CIDRs in the kernel are not those of ``table``; None when they are."""
        self._described = False
        """Whether the node's own cluster has a configuration file, too."""
        self.crashes: dict[str, int] = {}
        """How often each cluster's link has crashed."""
        self._unconfirmed: dict[str, tuple[set[str], set[int]]] = {}
        """While a cluster is listed again: nodes and identities known from before and not reported again yet."""
        self._due: asyncio.TimerHandle | None = None
        self._table_took_s = 0.0
        self._swept = False
        self._empty_since: float | None = None
        """Since when there is no cluster's file."""

    @property
    def complete(self) -> bool:
        """Whether every configured cluster has been listed."""
        every = all(link.state == "ready" for link in self.links.values())
        return every and not self.file_errors and (bool(self.links) or self._stays_empty)

    @property
    def _stays_empty(self) -> bool:
        return self._empty_since is not None and time.monotonic() - self._empty_since >= EMPTY_S

    @property
    def no_cluster(self) -> str | None:
        """Why no cluster is followed; None when one is, or its configuration is refused."""
        if self.links or self.file_errors:
            return None
        but = f" but this one ({self._settings.cluster_name})" if self._described else ""
        return f"no cluster{but} is described in {self._settings.clustermesh_config}: nothing can be resolved"

    @property
    def unknown_owners(self) -> set[str]:
        """Clusters named by --mesh-cidr that are not configured."""
        return {name for name, _ in self._settings.mesh_cidrs} - self.links.keys() - self.file_errors.keys()

    async def run(self) -> None:
        """Follow the configuration directories until cancelled."""
        self._leftovers = set(self._cidrs.items())
        self._refresh_table()
        try:
            while True:
                try:
                    self._reconcile(self._read())
                    self.unread = None
                except SettingsError as exc:
                    self.unread = str(exc)
                    if self._complained("directory", time.monotonic()):
                        log.error("cannot read the cluster configuration", error=str(exc))
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    # --- the configuration directories ------------------------------------------------------------------------------

    def _read(self) -> dict[str, tuple[ClusterFile, ClusterFile | None]]:
        files = read_directory(self._settings.clustermesh_config)
        direct = read_directory(self._settings.remote_config) if self._settings.remote_config else {}
        # As with clusters, a file that is missing at a single look is being written.
        remote, self._direct = self._direct | direct, direct
        self._described = files.pop(self._settings.cluster_name, None) is not None
        return {name: (file, remote.get(name)) for name, file in files.items()}

    def _reconcile(self, files: dict[str, tuple[ClusterFile, ClusterFile | None]]) -> None:
        missing = self._files.keys() - files.keys()
        for name in missing & self._missing:
            self._remove(name)
            log.info("cluster left the configuration", cluster=name)
        self._missing = missing - self._missing
        files = files | {name: self._files[name] for name in self._missing}
        for name, pair in files.items():
            if self._files.get(name) != pair:
                self._configure(name, pair)
        self._files = files
        self._note_whether_empty(time.monotonic())
        if not self._swept and self.complete:
            self._sweep()

    def _note_whether_empty(self, now: float) -> None:
        why = self.no_cluster
        if why is None:
            self._empty_since = None
            return
        if self._empty_since is None:
            self._empty_since = now
        if self._complained("no cluster", now):
            log.warning("no remote cluster configured", why=why)

    def _configure(self, name: str, pair: tuple[ClusterFile, ClusterFile | None]) -> None:
        file, remote = pair
        owner, owner_error = (remote.config, remote.error) if remote else (None, None)
        # A cache is followed even without its owner, but not in place of a link that follows both.
        running = self.links.get(name)
        both = running is not None and running.config.primary == file.config and running.config.remote
        error = file.error or (owner_error if both else None)
        if error or file.config is None:
            # Perhaps half written: a running link is worth more than a configuration that cannot be read.
            self.file_errors[name] = error or "no configuration"
            log.error("cluster configuration refused", cluster=name, error=error, kept=name in self.links)
            return
        self.file_errors.pop(name, None)
        digests = tuple([each.digest for each in pair if each is not None])
        transport = self._settings.etcd_transport
        config = LinkConfig(name, file.config, owner, owner_error, transport, digests)
        if running is not None and running.config == config:
            log.info("cluster configuration is as before again", cluster=name)
            return
        if owner_error:
            log.error("not watching the cluster's own etcd", cluster=name, problem=owner_error)
        self._start(config)
        log.info("cluster configured", cluster=name)

    def _start(self, config: LinkConfig) -> None:
        """Start a link in place of the running one."""
        link = ClusterLink(config, self)
        before = self.links.get(config.name)
        link.tried = before is not None and before.tried  # new certificates must not cost readiness
        self._stop(config.name)
        self.links[config.name] = link
        task = asyncio.create_task(link.run(), name=f"cluster {config.name}")
        task.add_done_callback(lambda ended: self._link_ended(link, ended))
        self._tasks[config.name] = task

    def _stop(self, name: str) -> None:
        """End a link; what it reported stays until its successor, or _remove, changes it."""
        self.links.pop(name, None)
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()
            self.on_event(events.ClusterSilent(name))
            self.on_event(events.StoreReset(name))  # its key watches go with it

    def _link_ended(self, link: ClusterLink, task: asyncio.Task[None]) -> None:
        """Restart a link that has crashed: one cluster's strange records must not affect the others."""
        if not self._current(link) or task.cancelled() or (error := task.exception()) is None:
            return
        link.state, link.problem, link.tried = "crashed", f"{type(error).__name__}: {error}", True
        self.crashes[link.name] = self.crashes.get(link.name, 0) + 1
        log.error("cluster link crashed", cluster=link.name, error=link.problem, exc_info=error)
        self.on_event(events.ClusterSilent(link.name))
        self.on_event(events.StoreReset(link.name))
        again = lambda: self._start(link.config) if self._current(link) else None  # noqa: E731
        task.get_loop().call_later(RESTART_S, again)

    def _current(self, link: ClusterLink) -> bool:
        """Tell whether this is its cluster's present link: one that was replaced may still report something."""
        return self.links.get(link.name) is link

    def _remove(self, name: str) -> None:
        self._stop(name)
        self.file_errors.pop(name, None)
        self._unconfirmed.pop(name, None)
        self._refusals.pop(name, None)
        info = self.table.cluster(name)
        self.on_event(events.ClusterGone(name))
        if info is not None:
            self._forget_identities([i for i in self.identities if i in info.identities])
        self._state.leave(name)
        self._refresh_due()

    # --- reports of links -------------------------------------------------------------------------------------------

    def on_config(
        self, link: ClusterLink, config: ClusterConfig, spaces: tuple[tuple[Space, ...], ...]
    ) -> str | None:
        """Let the cluster join, unless its id or mesh size contradicts our settings."""
        if not self._current(link):
            return "its configuration has changed"
        ours = self._settings.max_connected_clusters
        if config.max_connected_clusters != ours:
            return f"its max-connected-clusters is {config.max_connected_clusters}, ours is {ours}"
        if not 0 < config.cluster_id <= ours:
            return f"its cluster id {config.cluster_id} is not in 1..{ours}"
        known = self.table.cluster(link.name)
        if known is not None and known.cluster_id != config.cluster_id:
            self.on_event(events.ClusterGone(link.name))
            self._forget_identities([i for i in self.identities if i in known.identities])
        info = ClusterInfo(link.name, config.cluster_id, identity_range(config.cluster_id, ours), spaces)
        refusal = self._state.join(info)
        self._refresh_table()
        return refusal

    def on_nodes(self, link: ClusterLink, changes: Sequence[Change]) -> None:
        """Take nodes; the table follows in a moment."""
        if not self._current(link):
            return
        unconfirmed = self._unconfirmed.get(link.name, _NOTHING)[0]
        for change in changes:
            name = keys.node_of_key(change.key, link.nodes_prefix)
            if name is None:
                self._complain(link, "node", change.key[:_KEY_SHOWN], "the key does not name a node")
                continue
            unconfirmed.discard(name)
            if change.value is None:
                self._state.delete_node(link.name, name)
                continue
            try:
                node = decode_node(change.value, link.name)
                refusal = (
                    self._state.upsert_node(node)
                    if node.name == name
                    else f"it calls itself {node.name[:64]!r}"
                )
            except RecordError as exc:
                refusal = exc.detail
            if refusal:
                self._state.delete_node(link.name, name)
                self._complain(link, "node", name, refusal)
        if self._due is None:
            delay = max(TABLE_DELAY_S, TABLE_SHARE * self._table_took_s)
            self._due = asyncio.get_running_loop().call_later(delay, self._refresh_due)

    def on_identities(self, link: ClusterLink, changes: Sequence[Change]) -> None:
        """Judge identities, then make them known; a deleted one loses its entries before its rights."""
        info = self.table.cluster(link.name)
        if info is None or not self._current(link):
            return
        unconfirmed = self._unconfirmed.get(link.name, _NOTHING)[1]
        known: list[int] = []
        gone: list[int] = []
        # An identity may go and come back in one batch: only its last state counts.
        for change in {change.key: change for change in changes}.values():
            identity = keys.identity_of_key(change.key, link.identities_prefix)
            if identity is None:
                self._complain(link, "identity", change.key[:_KEY_SHOWN], "the key does not name an identity")
                continue
            unconfirmed.discard(identity)
            if change.value is not None and self._judge(link, info, identity, change.value):
                known.append(identity)
            elif identity in self.identities and identity in info.identities:
                gone.append(identity)
        self._enforcement.flush()
        self.identities.update(known)
        if known:
            self.on_event(events.IdentitiesKnown(tuple(known)))
        self._forget_identities(gone)

    def on_listed(self, link: ClusterLink) -> None:
        """Make the cluster ready: its CIDRs first, then its addresses."""
        if not self._current(link):
            return
        nodes, identities = self._unconfirmed.pop(link.name, _NOTHING)
        for name in nodes:
            self._state.delete_node(link.name, name)
        self._forget_identities(list(identities))
        if (info := self.table.cluster(link.name)) is not None:
            self._enforcement.sweep(info.identities)  # other clusters may not be listed for a long time
        self._refresh_table()
        self.on_event(events.ClusterReady(link.name))
        if not self._swept and self.complete:
            self._sweep()

    def on_silent(self, link: ClusterLink) -> None:
        """Tell the resolver; entries stay for a while."""
        if self._current(link):
            self.on_event(events.ClusterSilent(link.name))

    def on_relisting(self, link: ClusterLink) -> None:
        """Note what is known: what is not reported again was deleted while the link was down."""
        info = self.table.cluster(link.name)
        if info is not None and self._current(link):
            identities = {identity for identity in self.identities if identity in info.identities}
            self._unconfirmed[link.name] = self._state.node_names(link.name), identities

    def _judge(self, link: ClusterLink, info: ClusterInfo, identity: int, value: bytes) -> bool:
        refusal = check_identity(identity, info.identities)
        if refusal is None:
            try:
                labels = decode_identity(value)
            except RecordError as exc:
                refusal = exc.detail
            else:
                refusal = check_labels(labels, link.name)
        if refusal is not None:
            self._complain(link, "identity", identity, refusal)
            return False
        self._enforcement.upsert(identity, labels)
        return True

    def _forget_identities(self, gone: list[int]) -> None:
        for identity in gone:
            self.identities.discard(identity)
            self.on_event(events.IdentityGone(identity))
            self._enforcement.remove(identity)
        self._enforcement.flush()

    def _complain(self, link: ClusterLink, kind: str, what: object, refusal: str) -> None:
        link.refused_total[kind] += 1
        complained = self._refusals.setdefault(link.name, OncePer(COMPLAIN_EVERY_S))
        if complained((kind, what), time.monotonic()):
            log.warning("record refused", kind=kind, cluster=link.name, name=what, reason=refusal)
            if complained.full:
                log.warning(
                    "further refused records of this cluster are only counted for a while", cluster=link.name
                )

    # --- pod CIDRs --------------------------------------------------------------------------------------------------

    def _refresh_due(self) -> None:
        try:
            self._refresh_table()
        except DatapathError as exc:
            self.problem = str(exc)
            if self._complained("table", time.monotonic()):
                log.error("cannot write pod CIDRs", error=str(exc))
            self._due = asyncio.get_running_loop().call_later(RETRY_TABLE_S, self._refresh_due)

    def _refresh_table(self) -> None:
        """Put the present table in force, in the kernel and in the resolver."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        began = time.monotonic()
        table = self._state.table()
        if table is self.table:
            return
        changes = table.changes_since(self.table)
        self._cidrs.apply(changes.written, changes.deleted)
        self._leftovers.difference_update(network for network, _ in changes.written)
        self.table, self.problem = table, None
        self.on_event(events.TableChanged(table))
        self._table_took_s = time.monotonic() - began

    def _sweep(self) -> None:
        """Once all clusters are listed, remove what an earlier agent left behind and no cluster has claimed."""
        self._swept = True
        self._cidrs.apply((), self._leftovers)
        self._leftovers.clear()
        self._enforcement.sweep()
        self.on_event(events.AllListed())
