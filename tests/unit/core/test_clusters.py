from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazymesh.core.clusters import (
    MOST_ADDRESSES,
    MOST_LENGTHS,
    NO_OWNER,
    ClusterInfo,
    ClusterTable,
    MeshState,
)
from lazymesh.core.identities import identity_range
from lazymesh.core.model import Network, Space, parse_address
from lazymesh.core.records import NodeRecord

if TYPE_CHECKING:
    from collections.abc import Iterable

IDS = {"a": 1, "b": 2, "c": 3}


def cluster(name: str, cluster_id: int | None = None) -> ClusterInfo:
    """Return a cluster that is read at its owner's store."""
    number = cluster_id or IDS[name]
    return ClusterInfo(name, number, identity_range(number, 255), ((Space.PUSHED, Space.PULL_ONLY),))


def node(
    of: str,
    name: str,
    *cidrs: str,
    ips: Iterable[str] = (),
    region: str | None = None,
    cluster_id: int | None = None,
) -> NodeRecord:
    """Return a node's record."""
    networks = tuple(ipaddress.ip_network(cidr) for cidr in cidrs)
    addresses = tuple(map(parse_address, ips))
    return NodeRecord(name, of, cluster_id or IDS[of], addresses, networks, region)


def mesh(*nodes: NodeRecord, explicit: Iterable[tuple[str, str]] = (), clusters: str = "abc") -> MeshState:
    """Return a mesh of the named clusters with these nodes."""
    state = MeshState(99, [(of, ipaddress.ip_network(cidr)) for of, cidr in explicit])
    for name in clusters:
        assert state.join(cluster(name)) is None
    for record in nodes:
        assert state.upsert_node(record) is None
    return state


def owners(state: MeshState, address: str) -> tuple[str, ...]:
    """Return which clusters claim the textual address."""
    return state.table().owners(parse_address(address))


def cidrs(table: ClusterTable) -> dict[str, int]:
    """Return the mesh CIDRs as texts, each of which occurs once."""
    listed = [(str(network), cluster_id) for network, cluster_id in table.mesh_cidrs()]
    assert len(listed) == len(dict(listed))
    return dict(listed)


@pytest.mark.parametrize(
    ("state", "address", "expected"),
    [
        pytest.param(mesh(node("b", "n", "10.2.0.0/24")), "10.2.0.5", ("b",), id="a pod of a node"),
        pytest.param(mesh(node("b", "n", "10.2.0.0/24")), "10.2.1.5", (), id="outside every CIDR"),
        pytest.param(mesh(node("b", "n", "fd00:2::/64")), "fd00:2::5", ("b",), id="IPv6"),
        pytest.param(mesh(node("b", "n", "fd00::/32")), "10.2.0.5", (), id="the other family never matches"),
        pytest.param(mesh(node("b", "n", "10.2.0.5/32")), "10.2.0.5", ("b",), id="a single address"),
        pytest.param(
            mesh(explicit=[("b", "0.0.0.0/0")]), "8.8.8.8", ("b",), id="everything, by the operator"
        ),
        pytest.param(
            mesh(node("a", "n", "10.2.0.0/24"), node("b", "n", "10.2.0.0/24")),
            "10.2.0.5",
            ("a", "b"),
            id="the same CIDR in two clusters is ambiguous",
        ),
        pytest.param(
            mesh(node("a", "n", "10.2.0.0/24"), node("b", "n", "10.2.0.0/16")),
            "10.2.0.5",
            ("a", "b"),
            id="a CIDR inside another cluster's is ambiguous too",
        ),
        pytest.param(
            mesh(node("a", "n", "10.2.0.0/24"), node("b", "n", "10.2.0.0/16")),
            "10.2.1.5",
            ("b",),
            id="beside the inner CIDR the outer one has no rival",
        ),
        pytest.param(
            mesh(node("b", "m", "10.2.0.0/24"), node("b", "n", "10.2.0.0/16")),
            "10.2.0.5",
            ("b",),
            id="nested CIDRs of one cluster are not ambiguous",
        ),
        pytest.param(
            mesh(node("b", "n", "10.2.0.0/24"), explicit=[("b", "10.0.0.0/8")]),
            "10.2.0.5",
            ("b",),
            id="--mesh-cidr over the cluster's own nodes",
        ),
        pytest.param(
            mesh(node("b", "n", "10.2.0.0/24"), explicit=[("a", "10.0.0.0/8")]),
            "10.2.0.5",
            ("a",),
            id="--mesh-cidr is final, whatever nodes of another cluster claim",
        ),
        pytest.param(
            mesh(node("b", "n", "10.0.0.0/8"), explicit=[("a", "10.2.0.0/16")]),
            "10.2.0.5",
            ("a",),
            id="--mesh-cidr is final inside a wider claim",
        ),
        pytest.param(
            mesh(node("b", "n", "10.0.0.0/8"), explicit=[("a", "10.2.0.0/16")]),
            "10.3.0.5",
            ("b",),
            id="beside --mesh-cidr the wider claim counts",
        ),
        pytest.param(
            mesh(explicit=[("a", "10.0.0.0/8"), ("b", "10.2.0.0/16")]),
            "10.2.0.5",
            ("a", "b"),
            id="--mesh-cidr that contradicts itself is ambiguous",
        ),
        pytest.param(
            mesh(node("b", "n", "10.2.0.0/24"), explicit=[("a", "10.0.0.0/8")], clusters="b"),
            "10.2.0.5",
            ("a",),
            id="--mesh-cidr of a cluster that is not joined is no other's",
        ),
        pytest.param(
            mesh(explicit=[("a", "10.0.0.0/8"), ("b", "10.2.0.0/16")], clusters="b"),
            "10.2.0.5",
            ("a", "b"),
            id="--mesh-cidr that contradicts itself is ambiguous, whoever is joined",
        ),
    ],
)
def test_an_address_belongs_to_every_cluster_that_claims_it(
    state: MeshState, address: str, expected: tuple[str, ...]
) -> None:
    """One name: ask that one. Several: ambiguous, none is asked."""
    assert owners(state, address) == expected


@pytest.mark.parametrize("small", ["10.2.0.64/26", "10.2.0.65/32", "fd00:2::40/122", "fd00:2::41/128"])
@pytest.mark.parametrize("large", ["10.2.0.0/16", "10.2.0.0/24", "fd00:2::/64", "fd00:2::/120"])
def test_addresses_are_told_apart_by_their_owners(small: str, large: str) -> None:
    """Neighbours, too: a CIDR may be smaller than a /24 or a /120. Whatever is claimed in the other family."""
    table = mesh(explicit=[("a", small), ("b", large)]).table()
    numbers = (0, 63, 64, 65, 66, 127, 128, 255)
    texts = [f"10.2.{net}.{n}" for n in numbers for net in (0, 1)] + [f"fd00:2::{n:x}" for n in numbers]
    addresses = list(map(parse_address, texts))
    expected: dict[tuple[str, ...], list[bytes]] = {}
    for address in addresses:
        expected.setdefault(table.owners(address), []).append(address)
    assert table.by_owners(addresses) == expected


def test_the_kernel_gets_each_cidr_once_and_id_0_where_ambiguous() -> None:
    """Its longest-prefix match must answer as the table does."""
    state = mesh(
        node("a", "n", "10.1.0.0/24", "10.2.0.0/24"),
        node("b", "n", "10.2.0.0/16"),
        node("c", "n", "fd00:3::/64"),
    )
    assert cidrs(state.table()) == {
        "10.1.0.0/24": 1,
        "10.2.0.0/16": 2,
        "10.2.0.0/24": NO_OWNER,
        "fd00:3::/64": 3,
    }


def test_a_wide_claim_and_its_withdrawal_reach_all_cidrs_inside() -> None:
    """Changes are by difference, also for prefixes that were not touched."""
    state = mesh(node("a", "n", "10.1.0.0/24", "10.2.0.0/24"), node("c", "n", "172.16.0.0/24"))
    before = state.table()
    state.upsert_node(node("b", "wide", "10.2.0.0/16"))
    claimed = state.table()
    assert {(str(cidr), n) for cidr, n in claimed.changes_since(before).written} == {
        ("10.2.0.0/16", 2),
        ("10.2.0.0/24", NO_OWNER),
    }
    state.delete_node("b", "wide")
    changes = state.table().changes_since(claimed)
    assert [(str(cidr), n) for cidr, n in changes.written] == [("10.2.0.0/24", 1)]
    assert list(map(str, changes.deleted)) == ["10.2.0.0/16"]


def test_a_table_never_changes() -> None:
    """The resolver may keep one for as long as it likes."""
    state = mesh(node("b", "n", "10.2.0.0/24", ips=["172.18.0.2"], region="eu"))
    table = state.table()
    state.leave("b")
    assert table.owners(parse_address("10.2.0.5")) == ("b",)
    assert table.cluster("b") == table.by_id(2) == cluster("b")
    assert table.region_of(parse_address("172.18.0.2")) == "eu"
    assert cidrs(table) == {"10.2.0.0/24": 2}


def test_nothing_changed_gives_the_same_table() -> None:
    """A kvstoremesh that restarts rewrites every record; that must cost nothing."""
    state = mesh(node("b", "n", "10.2.0.0/24"))
    table = state.table()
    state.upsert_node(node("b", "n", "10.2.0.0/24"))
    state.delete_node("b", "unknown")
    state.delete_node("unknown", "n")
    state.leave("unknown")
    assert state.table() is table


def test_a_node_that_moves_to_another_cidr_leaves_the_old_one() -> None:
    """An update is the new record and nothing of the old one."""
    state = mesh(node("b", "n", "10.2.0.0/24"))
    state.upsert_node(node("b", "n", "10.2.9.0/24"))
    assert (owners(state, "10.2.0.5"), owners(state, "10.2.9.5")) == ((), ("b",))


def test_a_cidr_handed_to_a_new_node_survives_the_old_node() -> None:
    """Node pools hand CIDRs and addresses on before the old record is deleted."""
    state = mesh(
        node("b", "old", "10.2.0.0/24", ips=["172.18.0.2"], region="eu"),
        node("b", "new", "10.2.0.0/24", ips=["172.18.0.2"], region="eu"),
    )
    state.delete_node("b", "old")
    assert owners(state, "10.2.0.5") == ("b",)
    assert state.table().region_of(parse_address("172.18.0.2")) == "eu"


def test_what_many_nodes_claim_is_claimed_until_the_last_one_goes() -> None:
    """Each counts once, however often its record says it."""
    address = parse_address("172.18.0.2")
    state = mesh(node("a", "n", "10.1.0.0/24"))
    for number in range(50):
        record = node("b", f"n{number}", *["10.2.0.0/24"] * 9, ips=["172.18.0.2"] * 9, region="eu")
        assert state.upsert_node(record) is None
    for number in range(50):
        assert (owners(state, "10.2.0.5"), state.table().region_of(address)) == (("b",), "eu")
        state.delete_node("b", f"n{number}")
    assert (cidrs(state.table()), state.table().region_of(address)) == ({"10.1.0.0/24": 1}, None)


def test_the_region_of_a_node_that_is_gone_or_moved_is_forgotten() -> None:
    """Else its address would be in two regions for good, and so in none that counts."""
    address = parse_address("172.18.0.2")
    state = mesh(node("b", "n", ips=["172.18.0.2"], region="eu"))
    state.upsert_node(node("b", "n", ips=["172.18.0.2"], region="us"))
    assert state.table().region_of(address) == "us"
    state.delete_node("b", "n")
    assert state.table().region_of(address) is None
    state.upsert_node(node("b", "m", ips=["172.18.0.2"], region="eu"))
    assert state.table().region_of(address) == "eu"
    state.upsert_node(node("b", "m", ips=["172.18.0.2"]))
    assert state.table().region_of(address) is None


def test_a_host_has_a_region_only_if_its_nodes_agree() -> None:
    """Unknown and contradicting are the same answer: None."""
    state = mesh(
        node("a", "n", ips=["172.18.0.2"], region="eu"),
        node("b", "n", ips=["172.18.0.2", "172.18.0.3"], region="us"),
        node("c", "n", ips=["172.18.0.4"]),
    )
    regions = [state.table().region_of(parse_address(f"172.18.0.{n}")) for n in (2, 3, 4, 5)]
    assert regions == [None, "us", None, None]


def test_a_cluster_that_leaves_takes_its_nodes_and_cidrs_along() -> None:
    """And is empty when it comes back, except for what the operator said."""
    state = mesh(node("b", "n", "10.2.0.0/24"), explicit=[("b", "10.99.0.0/16")])
    state.leave("b")
    assert (state.table().cluster("b"), cidrs(state.table())) == (None, {"10.99.0.0/16": NO_OWNER})
    state.join(cluster("b"))
    assert cidrs(state.table()) == {"10.99.0.0/16": 2}


def test_a_cluster_that_joins_again_keeps_its_nodes() -> None:
    """After a reconnect its description may differ; its nodes are followed by their own keys."""
    state = mesh(node("b", "n", "10.2.0.0/24"), explicit=[("b", "10.99.0.0/16")])
    cached = ClusterInfo("b", 2, identity_range(2, 255), ((Space.CACHED,), (Space.PUSHED, Space.PULL_ONLY)))
    state.join(cached)
    assert state.table().cluster("b") == cached
    assert cidrs(state.table()) == {"10.2.0.0/24": 2, "10.99.0.0/16": 2}
    state.leave("b")
    assert cidrs(state.table()) == {"10.99.0.0/16": NO_OWNER}


def test_a_cluster_under_another_id_starts_over() -> None:
    """Cilium drains everything of a peer whose id changed."""
    state = mesh(node("b", "n", "10.2.0.0/24"), explicit=[("b", "10.99.0.0/16")])
    before = state.table()
    assert state.join(cluster("b", 7)) is None
    assert cidrs(state.table()) == {"10.99.0.0/16": 7}
    assert state.table().by_id(2) is None
    assert [(str(cidr), n) for cidr, n in state.table().changes_since(before).written] == [
        ("10.99.0.0/16", 7)
    ]


@pytest.mark.parametrize(
    ("cluster_id", "holder"),
    [pytest.param(1, "a", id="another cluster's"), pytest.param(99, "this", id="our own")],
)
def test_a_cluster_with_an_id_that_is_taken_is_refused_and_out(cluster_id: int, holder: str) -> None:
    """Two clusters under one id would answer for each other's identities."""
    state = mesh(node("b", "n", "10.2.0.0/24"))
    assert f"cluster id {cluster_id} is already used by {holder}" in (
        state.join(cluster("b", cluster_id)) or ""
    )
    assert (state.table().cluster("b"), owners(state, "10.2.0.5")) == (None, ())


def test_a_node_that_contradicts_its_cluster_is_refused_and_forgotten() -> None:
    """Its earlier record is no longer true either."""
    state = mesh(node("b", "n", "10.2.0.0/24"))
    assert "cluster id 3" in (state.upsert_node(node("b", "n", "10.2.0.0/24", cluster_id=3)) or "")
    assert owners(state, "10.2.0.5") == ()


def test_a_node_of_a_cluster_that_is_not_joined_is_refused() -> None:
    """Its answers could not be checked."""
    assert "not joined" in (mesh(clusters="a").upsert_node(node("b", "n", "10.2.0.0/24")) or "")


@pytest.mark.parametrize(
    "cidr",
    [
        "0.0.0.0/0",
        "10.0.0.0/7",
        "127.0.1.0/24",
        "169.254.0.0/16",
        "224.0.0.0/24",
        "::/0",
        "fd00::/31",
        "fe80::/64",
    ],
)
def test_a_node_that_claims_what_no_pods_can_have_is_refused(cidr: str) -> None:
    """Else one record would make other clusters' addresses ambiguous, or take the node's own for the mesh's."""
    state = mesh(node("a", "n", "10.2.0.0/24"), node("b", "n", "10.3.0.0/24"))
    assert "pod CIDR" in (state.upsert_node(node("b", "n", "10.4.0.0/24", cidr)) or "")
    assert cidrs(state.table()) == {"10.2.0.0/24": 1}, "what the node said before is not true any more"


def test_pod_cidrs_of_one_cluster_are_bounded() -> None:
    """The kernel's map is for all clusters; what is withdrawn makes room again."""
    state = mesh(node("a", "n", "10.2.0.0/24"))
    many = [str(network) for network in ipaddress.ip_network("10.64.0.0/10").subnets(new_prefix=26)][:10_000]
    assert state.upsert_node(node("b", "m", *many)) is None
    assert state.upsert_node(node("b", "n", *many)) is None
    assert "more than 20000" in (state.upsert_node(node("b", "o", "10.3.0.0/24")) or "")
    assert state.upsert_node(node("b", "m", "10.5.0.0/24")) is None
    assert state.upsert_node(node("b", "o", "10.3.0.0/24")) is None
    assert owners(state, "10.2.0.5") == ("a",)
    state.leave("b")
    state.join(cluster("b"))
    assert state.upsert_node(node("b", "m", *many)) is None
    assert state.upsert_node(node("b", "n", *many)) is None


def test_lengths_of_one_cluster_are_bounded() -> None:
    """A lookup tries every length there is; one that is withdrawn is no longer tried."""
    lengths = range(97, 97 + MOST_LENGTHS)
    state = mesh(node("b", "n", *[f"fd00::/{length}" for length in lengths]), node("a", "n", "fd00:1::/64"))
    refusal = state.upsert_node(node("b", "m", "fd00::/96"))
    assert refusal == "pod CIDRs of more than 32 lengths in one cluster"
    assert state.upsert_node(node("b", "m", "fd00:2::/97")) is None
    assert state.upsert_node(node("a", "m", "fd00:3::/96")) is None, "the bound is each cluster's own"
    assert len(state.table()._search[16]) == MOST_LENGTHS + 2
    state.delete_node("b", "n")
    assert len(state.table()._search[16]) == 3
    assert state.upsert_node(node("b", "m", "fd00::/95")) is None
    assert [owners(state, address) for address in ("fd00::5", "fd00:2::5", "fd00:1::5")] == [
        ("b",),
        (),
        ("a",),
    ]


def test_addresses_of_one_clusters_nodes_are_bounded() -> None:
    """They are kept for their region, so without one they are not counted either."""
    many = [str(ipaddress.ip_address(0x0B000000 + number)) for number in range(MOST_ADDRESSES)]
    state = mesh(node("b", "m", ips=many, region="eu"))
    assert state.upsert_node(node("b", "n", "10.2.0.0/24", ips=["172.18.0.2"])) is None
    assert state.upsert_node(node("a", "n", ips=["172.18.0.3"], region="eu")) is None
    refusal = state.upsert_node(node("b", "n", "10.2.0.0/24", ips=["172.18.0.2"], region="eu"))
    assert refusal == "more than 40000 node addresses in one cluster"
    assert owners(state, "10.2.0.5") == (), "refused is forgotten"
    assert state.upsert_node(node("b", "m", ips=many[1:], region="eu")) is None
    assert state.upsert_node(node("b", "n", ips=["172.18.0.2"], region="eu")) is None
    assert state.table().region_of(parse_address("172.18.0.2")) == "eu"


def test_nodes_that_claim_nothing_are_not_kept() -> None:
    """There may be as many as keys in a store."""
    state = mesh(
        node("b", "m", "10.2.0.0/24"), node("b", "n", ips=["172.18.0.2"]), node("b", "o", region="eu")
    )
    assert state.node_names("b") == {"m"}
    assert state.upsert_node(node("b", "m")) is None
    assert (state.node_names("b"), cidrs(state.table())) == (set(), {})


def test_what_a_table_was_made_for_is_not_made_again() -> None:
    """Else each table would cost more than the one before."""
    state = mesh(node("b", "n", "10.2.0.0/24"))
    state.table()
    assert not state._touched


NETWORKS = st.tuples(st.integers(0, 15), st.integers(28, 32)).map(
    lambda drawn: ipaddress.ip_network((drawn[0], drawn[1]), strict=False)
)
NODES = st.tuples(st.sampled_from("abc"), st.sampled_from("mn"), st.lists(NETWORKS, max_size=3))
PLAYS = st.lists(
    st.one_of(
        NODES.map(lambda drawn: ("upsert", *drawn)),
        st.tuples(st.just("delete"), st.sampled_from("abc"), st.sampled_from("mn")),
        st.tuples(st.sampled_from(["leave", "join", "look"]), st.sampled_from("abc")),
    ),
    max_size=25,
)


@settings(max_examples=300)
@given(PLAYS)
def test_any_play_of_events_ends_where_a_fresh_start_would(play: list[tuple[object, ...]]) -> None:
    """Incremental building, the differences between tables and the plain definition of ownership agree."""
    state, model = mesh(explicit=[("a", "0.0.0.8/29")]), dict[tuple[str, str], list[Network]]()
    joined, kernel, seen = set("abc"), dict[Network, int](), MeshState().table()
    for what, name, *rest in [*play, ("look", "a")]:
        assert isinstance(name, str)
        match what, rest:
            case "upsert", [str(label), list(networks)]:
                if name in joined:
                    model[name, label] = networks
                state.upsert_node(node(name, label, *map(str, networks)))
            case "delete", [str(label)]:
                model.pop((name, label), None)
                state.delete_node(name, label)
            case "leave", _:
                joined.discard(name)
                model = {key: value for key, value in model.items() if key[0] != name}
                state.leave(name)
            case "join", _:
                joined.add(name)
                state.join(cluster(name))
            case _:
                changes = state.table().changes_since(seen)
                seen = state.table()
                kernel.update(changes.written)
                for network in changes.deleted:
                    del kernel[network]
                assert kernel == dict(seen.mesh_cidrs())

    claims = [(key[0], network) for key, networks in model.items() for network in networks]
    claims += [("a", ipaddress.ip_network("0.0.0.8/29"))]
    for number in range(16):
        address = ipaddress.ip_address(number)
        expected = {name for name, network in claims if address in network}
        if 8 <= number <= 15:
            expected = {"a"}
        assert seen.owners(address.packed) == tuple(sorted(expected))
        around = [network for network in kernel if address in network]
        match_id = kernel[max(around, key=lambda network: network.prefixlen)] if around else None
        ids = [IDS[name] for name in expected & joined]
        assert match_id == (None if not expected else ids[0] if ids and len(expected) == 1 else NO_OWNER)
