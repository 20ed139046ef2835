"""The mesh as a node sees it, with links that do nothing."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest
from structlog.testing import capture_logs

from lazymesh.core import events
from lazymesh.core.model import Direction, Network, Space
from lazymesh.core.policy import PolicyEngine
from lazymesh.core.policyfile import parse_policy
from lazymesh.core.records import ClusterConfig
from lazymesh.errors import DatapathError
from lazymesh.kvstore.model import Change
from lazymesh.roles import mesh as module
from lazymesh.roles.enforcement import Enforcement
from lazymesh.roles.mesh import Mesh
from lazymesh.settings import MeshSettings
from tests.support.etcd import eventually
from tests.support.lab import POLICY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from lazymesh.datapath.maps import MeshCidrs
    from lazymesh.roles.link import ClusterLink, LinkConfig

    Right = tuple[Direction, int]

FILE = "endpoints: ['http://127.0.0.1:1']\n"
CONFIG = ClusterConfig(2, 255, cached=False, synced_canaries=True)
SPACES = ((Space.PUSHED, Space.PULL_ONLY),)
CIDR = "10.2.0.0/16"


class StillLink:
    """A link that does nothing until it is told to crash."""

    nodes_prefix, identities_prefix = b"nodes/", b"ids/"

    def __init__(self, config: LinkConfig, _observer: object) -> None:
        self.config, self.name = config, config.name
        self.state, self.tried, self.problem = "connecting", False, None
        self.refused_total = dict.fromkeys(("node", "identity", "cluster-config"), 0)
        self.crash = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Wait."""
        await self.crash


class FakeCidrs(dict[Network, int]):
    """The kernel's map; ``full`` makes it refuse."""

    full = False

    def apply(self, upserts: Iterable[tuple[Network, int]], deletes: Iterable[Network]) -> None:
        """Write a difference."""
        upserts = list(upserts)
        if self.full and upserts:
            raise DatapathError("cannot write the mesh CIDRs: No space left on device")
        self.update(upserts)
        for network in deletes:
            self.pop(network, None)

    def items(self) -> Any:
        """Return a copy, as reading a map does."""
        return dict(super().items())


class FakePolicyMap:
    """The rights of an earlier agent; writes are recorded in one order with the events."""

    def __init__(self, rights: Iterable[Right], told: list[object]) -> None:
        self.rights = set(rights)
        self.told = told

    def items(self) -> set[Right]:
        """Return everything that is allowed."""
        return set(self.rights)

    def apply(self, allow: Iterable[Right], revoke: Iterable[Right]) -> None:
        """Take away, then add."""
        for words, pairs in (("revoked", set(revoke)), ("allowed", set(allow))):
            self.told += [(words, identity) for _, identity in sorted(pairs)]
            self.rights = self.rights - pairs if words == "revoked" else self.rights | pairs


class Stage:
    """A mesh whose directory and links a test plays with."""

    def __init__(self, directory: Path, *by_hand: tuple[str, str], rights: Iterable[Right] = ()) -> None:
        self.directory = directory
        self.cidrs = FakeCidrs()
        self.told: list[object] = []
        self.policy = FakePolicyMap(rights, self.told)
        given = tuple((name, ipaddress.ip_network(cidr)) for name, cidr in by_hand)
        settings = MeshSettings("a", 1, clustermesh_config=directory, mesh_cidrs=given)
        engine = PolicyEngine(parse_policy(POLICY, "p"))
        enforcement = Enforcement(cast("Any", self.policy), engine, keep=True)
        self.mesh = Mesh(settings, cast("MeshCidrs", self.cidrs), enforcement, self.told.append)

    def look(self) -> None:
        """Read the directory, as run does twice a second."""
        self.mesh._reconcile(self.mesh._read())

    def look_twice(self) -> None:
        """What is gone must be gone at two looks."""
        self.look()
        self.look()

    @property
    def link(self) -> ClusterLink:
        """Cluster b's link."""
        return self.mesh.links["b"]

    def node(self, name: str, cidr: str | None = CIDR) -> None:
        """Have b's link tell of a node, or of its end."""
        network = ipaddress.ip_network(cidr) if cidr else None
        mask = {"IP": str(network.network_address), "Mask": "//8AAA=="} if network else None
        record = {"Name": name, "Cluster": "b", "ClusterID": 2, "IPv4AllocCIDR": mask}
        value = json.dumps(record).encode() if cidr else None
        self.mesh.on_nodes(self.link, [Change(b"nodes/" + name.encode(), value, 1)])

    def identity(self, number: int, app: str = "x") -> None:
        """Have b's link tell of an identity."""
        labels = f"k8s:app={app};k8s:io.cilium.k8s.policy.cluster=b;".encode()
        self.mesh.on_identities(self.link, [Change(b"ids/%d" % number, labels, 1)])

    def join(self) -> str | None:
        """Have cluster b describe itself."""
        return self.mesh.on_config(self.link, CONFIG, SPACES)


@pytest.fixture
async def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    """A mesh with cluster b configured."""
    monkeypatch.setattr(module, "ClusterLink", StillLink)
    monkeypatch.setattr(module, "RESTART_S", 0.01)
    monkeypatch.setattr(module, "RETRY_TABLE_S", 0.01)
    (tmp_path / "b").write_text(FILE)
    stage = Stage(tmp_path)
    stage.look()
    yield stage
    for name in list(stage.mesh.links):
        stage.mesh._stop(name)
    await asyncio.sleep(0)


async def test_cidrs_reach_the_kernel_and_the_resolver(stage: Stage) -> None:
    """Once the cluster has joined; they go with it."""
    assert stage.join() is None
    stage.node("n1")
    await eventually(lambda: stage.cidrs == {ipaddress.ip_network(CIDR): 2})
    assert any(isinstance(event, events.TableChanged) for event in stage.told)
    (stage.directory / "b").unlink()
    stage.look_twice()
    assert stage.cidrs == {}
    assert events.ClusterGone("b") in stage.told


async def test_resolver_is_told_once_when_all_clusters_are_listed(stage: Stage) -> None:
    """One whose file cannot be read may have entries of an earlier life, too."""
    (stage.directory / "c").write_text("endpoints: [\n", encoding="ascii")
    stage.look()
    assert stage.join() is None
    stage.link.state = "ready"
    stage.mesh.on_listed(stage.link)
    assert events.AllListed() not in stage.told
    (stage.directory / "c").unlink()
    for _ in range(2):
        stage.look_twice()
        stage.mesh.on_listed(stage.link)
    assert stage.told.count(events.AllListed()) == 1


async def test_directory_that_is_empty_at_first_is_not_taken_for_a_mesh_without_clusters(
    tmp_path: Path,
) -> None:
    """What an earlier life left serves until the files come, or for as long as a cluster that is silent is trusted."""
    rights = [(Direction.EGRESS, 131_073)]
    stage = Stage(tmp_path, rights=rights)
    stage.look()
    stage.look()
    assert stage.mesh.no_cluster
    assert events.AllListed() not in stage.told
    assert stage.policy.rights == set(rights)
    (stage.directory / "b").write_text(FILE, encoding="ascii")
    stage.look()
    stage.join()
    cast("Any", stage.link).state = "ready"
    stage.mesh.on_listed(stage.link)
    assert stage.told.count(events.AllListed()) == 1


async def test_directory_that_stays_empty_is_a_mesh_without_clusters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All clusters have left while no agent ran: what they left goes."""
    stage = Stage(tmp_path, rights=[(Direction.EGRESS, 131_073)])
    stage.look()
    assert events.AllListed() not in stage.told
    monkeypatch.setattr(module, "EMPTY_S", 0.0)
    stage.look_twice()
    assert stage.told.count(events.AllListed()) == 1
    assert stage.policy.rights == set()


async def test_agent_without_a_remote_cluster_says_so(stage: Stage) -> None:
    """A Secret of another name, or our own cluster's name for the peer's, would else be silence."""
    assert stage.mesh.no_cluster is None
    (stage.directory / "b").rename(stage.directory / "a")
    stage.look_twice()
    assert (
        stage.mesh.no_cluster
        == f"no cluster but this one (a) is described in {stage.directory}: nothing can be resolved"
    )
    (stage.directory / "a").write_text("endpoint: ['http://127.0.0.1:1']\n", encoding="ascii")
    stage.look_twice()
    assert stage.mesh.no_cluster == f"no cluster is described in {stage.directory}: nothing can be resolved"
    (stage.directory / "c").write_text("endpoints: [\n", encoding="ascii")
    stage.look()
    assert stage.mesh.no_cluster is None, "c is refused, which is told in other words"


async def test_cidrs_by_hand_of_a_cluster_that_is_not_configured_are_named(stage: Stage) -> None:
    """A slip in its name."""
    given = tuple((name, ipaddress.ip_network(f"10.{n}.0.0/16")) for n, name in enumerate(("bb", "b")))
    stage.mesh._settings = replace(stage.mesh._settings, mesh_cidrs=given)
    assert stage.mesh.unknown_owners == {"bb"}


async def test_cidrs_by_hand_are_mesh_traffic_from_the_start_to_the_end(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without a remote cluster: policy holds for them. What an earlier agent left goes when all are listed."""
    given, left = ipaddress.ip_network("10.7.0.0/16"), ipaddress.ip_network("10.8.0.0/16")
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.01)
    stage = Stage(tmp_path, ("b", str(given)))
    stage.cidrs.update({given: 2, left: 3})
    following = asyncio.create_task(stage.mesh.run())
    await eventually(lambda: stage.cidrs == {given: 0, left: 3})
    await eventually(lambda: "b" in stage.mesh.links)
    assert stage.join() is None
    assert stage.cidrs == {given: 2, left: 3}
    cast("Any", stage.link).state = "ready"
    await eventually(lambda: stage.cidrs == {given: 2})
    (stage.directory / "b").unlink()
    await eventually(lambda: stage.cidrs == {given: 0})
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


async def test_file_that_is_empty_for_a_moment_is_no_farewell(stage: Stage) -> None:
    """Somebody is writing it: entries that are gone would cost every peer its first packets."""
    link = stage.link
    (stage.directory / "b").write_text("", encoding="ascii")
    stage.look()
    (stage.directory / "b").write_text(FILE, encoding="ascii")
    stage.look()
    (stage.directory / "b").unlink()
    stage.look()
    assert stage.link is link
    assert not any(isinstance(event, events.ClusterGone) for event in stage.told)
    stage.look()
    assert stage.mesh.links == {}


async def test_file_that_cannot_be_used_keeps_the_link(stage: Stage) -> None:
    """The complaint stands until the file is whole again."""
    link = stage.link
    (stage.directory / "b").write_text("endpoints: [")
    stage.look()
    assert stage.link is link
    assert "not YAML" in stage.mesh.file_errors["b"]
    (stage.directory / "b").write_text(FILE)
    stage.look()
    assert stage.mesh.file_errors == {}
    assert stage.link is link, "nothing has changed"


async def test_owners_file_that_cannot_be_used_costs_the_cache_nothing(stage: Stage) -> None:
    """The cluster runs without it; only a link that follows both is kept, and the complaint stands as above."""
    direct = stage.directory / "direct"
    direct.mkdir()
    stage.mesh._settings = replace(stage.mesh._settings, remote_config=direct)

    def owner(text: str) -> tuple[bool, str | None, str | None]:
        (direct / "b").write_text(text)
        stage.look()
        config = stage.link.config
        return config.remote is not None, config.remote_error, stage.mesh.file_errors.get("b")

    followed, problem, refused = owner("endpoints: [")
    assert "not YAML" in (problem or "")
    assert (followed, refused) == (False, None)
    assert owner(FILE) == (True, None, None)
    link = stage.link
    assert owner("") == owner(FILE) == (True, None, None)
    assert stage.link is link, "it was being written"
    followed, problem, refused = owner("endpoints: [")
    assert stage.link is link
    assert "not YAML" in (refused or "")
    (stage.directory / "b").write_text(FILE.replace(":1'", ":2'"))
    followed, problem, refused = owner("endpoints: [")
    assert "not YAML" in (problem or "")
    assert (followed, refused) == (False, None), "the cache has moved, and is followed there"


async def test_directory_that_cannot_be_read_is_reported_until_it_can(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clusters are followed as before; that no other comes or goes would go unnoticed."""
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.01)
    direct = stage.directory / "direct"
    stage.mesh._settings = replace(stage.mesh._settings, remote_config=direct)
    running = asyncio.create_task(stage.mesh.run())
    await eventually(lambda: stage.mesh.unread)
    assert stage.mesh.unread == f"cannot read the clustermesh directory {direct}: No such file or directory"
    assert stage.mesh.links.keys() == {"b"}
    direct.mkdir()
    await eventually(lambda: stage.mesh.unread is None)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_replaced_link_has_no_last_word(stage: Stage) -> None:
    """What it still reports is about a store that is no longer the cluster's."""
    stage.join()
    old = stage.link
    (stage.directory / "b").write_text(FILE + "# new\n")
    stage.look()
    assert stage.link is not old
    told = len(stage.told)
    assert stage.mesh.on_config(old, CONFIG, SPACES) is not None
    stage.mesh.on_identities(old, [Change(b"ids/131073", b"k8s:io.cilium.k8s.policy.cluster=b;", 1)])
    stage.mesh.on_listed(old)
    stage.mesh.on_silent(old)
    assert (len(stage.told), stage.mesh.identities) == (told, set())


async def test_what_a_new_link_does_not_tell_again_is_forgotten(stage: Stage) -> None:
    """Nodes and identities that went while the configuration changed."""
    stage.join()
    for name in ("n1", "n2"):
        stage.node(name, {"n1": CIDR, "n2": "10.3.0.0/16"}[name])
    for number in (131_073, 131_074):
        stage.identity(number)
    stage.mesh.on_listed(stage.link)
    (stage.directory / "b").write_text(FILE + "# new\n")
    stage.look()
    stage.join()
    stage.mesh.on_relisting(stage.link)
    stage.node("n1")
    stage.identity(131_073)
    stage.mesh.on_listed(stage.link)
    assert stage.mesh.identities == {131_073}
    assert stage.cidrs == {ipaddress.ip_network(CIDR): 2}
    assert events.IdentityGone(131_074) in stage.told


async def test_link_that_crashes_is_started_again(stage: Stage) -> None:
    """One cluster's strange records cost the others nothing; it is counted, and shown."""
    link = cast("Any", stage.link)
    link.crash.set_exception(RuntimeError("strange record"))
    await eventually(lambda: link.state == "crashed")
    assert link.problem == "RuntimeError: strange record"
    assert stage.mesh.crashes == {"b": 1}
    assert events.ClusterSilent("b") in stage.told
    await eventually(lambda: stage.link is not link)
    assert stage.link.state == "connecting"


async def test_full_kernel_map_is_reported_and_tried_again(stage: Stage) -> None:
    """Once there is room the table follows."""
    stage.join()
    stage.cidrs.full = True
    stage.node("n1")
    await eventually(lambda: stage.mesh.problem)
    stage.cidrs.full = False
    await eventually(lambda: stage.cidrs)
    assert stage.mesh.problem is None


async def test_bad_identity_is_counted_and_a_good_one_that_turns_bad_goes(stage: Stage) -> None:
    """Out of range, or with labels of another cluster."""
    stage.join()
    stage.identity(131_073)
    assert stage.mesh.identities == {131_073}
    stage.identity(5)
    stage.mesh.on_identities(stage.link, [Change(b"ids/131073", b"k8s:io.cilium.k8s.policy.cluster=c;", 2)])
    assert stage.mesh.identities == set()
    assert stage.link.refused_total["identity"] == 2
    assert stage.told[-1] == events.IdentityGone(131_073)


@pytest.mark.parametrize("ends", ["known", "gone"])
async def test_only_what_an_identity_ended_as_in_a_batch_counts(stage: Stage, ends: str) -> None:
    """After an outage its end and its return arrive together, in either order."""
    stage.join()
    stage.identity(131_073)
    gone = Change(b"ids/131073", None, 2)
    back = Change(b"ids/131073", b"k8s:io.cilium.k8s.policy.cluster=b;", 3)
    stage.mesh.on_identities(stage.link, [gone, back] if ends == "known" else [back, gone])
    assert stage.mesh.identities == ({131_073} if ends == "known" else set())


async def test_an_identity_has_its_rights_before_it_is_known_and_until_its_entries_are_gone(
    stage: Stage,
) -> None:
    """Else an entry would be judged by rights that are not there, or the number's next owner inherits them."""
    stage.join()
    stage.told.clear()
    stage.identity(131_073, "server")
    assert stage.told == [("allowed", 131_073), events.IdentitiesKnown((131_073,))]
    stage.mesh.on_identities(stage.link, [Change(b"ids/131073", None, 2)])
    assert stage.told[2:] == [events.IdentityGone(131_073), ("revoked", 131_073)]


async def test_identities_of_a_cluster_under_another_id_are_others(stage: Stage) -> None:
    """What its former numbers stood for no longer belongs to any cluster."""
    stage.join()
    stage.identity(131_073, "server")
    stage.told.clear()
    renumbered = ClusterConfig(7, 255, cached=False, synced_canaries=True)
    assert stage.mesh.on_config(stage.link, renumbered, SPACES) is None
    assert stage.mesh.identities == set()
    gone, ended, revoked, *_ = stage.told
    assert (gone, ended, revoked) == (
        events.ClusterGone("b"),
        events.IdentityGone(131_073),
        ("revoked", 131_073),
    )


async def test_rights_of_an_earlier_life_go_with_the_listing_of_their_cluster(
    stage: Stage, tmp_path: Path
) -> None:
    """Those of others may not be listed for long, or have a file that cannot be read: theirs stay until all are."""
    mine, others = (Direction.EGRESS, 131_073), (Direction.EGRESS, 7 << 16)
    (tmp_path / "c").write_text("endpoints: [", encoding="ascii")
    stage = Stage(tmp_path, rights=[mine, others])
    stage.look()
    stage.join()
    assert stage.policy.rights == {mine, others}
    cast("Any", stage.link).state = "ready"
    stage.mesh.on_listed(stage.link)
    assert stage.policy.rights == {others}
    stage.look()
    assert stage.policy.rights == {others}
    (tmp_path / "c").unlink()
    stage.look_twice()
    stage.look()
    assert stage.policy.rights == set()


async def test_refusals_are_logged_once_and_for_each_cluster_separately(stage: Stage) -> None:
    """One that floods us silences itself alone, and says so; all are counted."""
    (stage.directory / "c").write_text(FILE)
    stage.look()
    stage.join()
    other = ClusterConfig(3, 255, cached=False, synced_canaries=True)
    assert stage.mesh.on_config(stage.mesh.links["c"], other, SPACES) is None
    with capture_logs() as logs:
        for number in [*range(300, 3_300), *range(300, 3_300)]:
            stage.identity(number)
        stage.mesh.on_identities(
            stage.mesh.links["c"], [Change(b"ids/7", b"x", 1), Change(b"ids/x", b"x", 1)]
        )
    assert stage.link.refused_total["identity"] == 6_000
    of_b = [entry for entry in logs if entry["cluster"] == "b"]
    assert 0 < len(of_b) < 1_100
    assert len({entry.get("name") for entry in of_b}) == len(of_b)
    assert [entry["event"] for entry in of_b].count(of_b[-1]["event"]) == 1
    assert "only counted" in of_b[-1]["event"]
    assert [entry["name"] for entry in logs if entry["cluster"] == "c"] == [7, b"ids/x"]
    assert stage.mesh.links["c"].refused_total["identity"] == 2


async def test_a_cluster_that_writes_without_end_leaves_time_between_tables(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What took long is not done again at once."""
    stage.join()
    stage.mesh._table_took_s = 0.1
    stage.node("n1")
    assert stage.mesh._due is not None
    assert stage.mesh._due.when() - asyncio.get_running_loop().time() > 0.2
    await eventually(lambda: stage.cidrs)
