from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymesh.core.identities import (
    WORLD,
    WORLD_IDENTITIES,
    IdentityRange,
    check_identity,
    check_labels,
    identity_range,
)

CLUSTER_TWO = identity_range(2, 255)


@pytest.mark.parametrize(
    ("cluster_id", "limit", "first", "last"),
    [
        pytest.param(2, 255, 131072, 196607, id="the reference's example"),
        pytest.param(2, 511, 65536, 98303, id="511 clusters: one bit less for identities"),
        pytest.param(255, 255, 255 << 16, (1 << 24) - 1, id="the last cluster of 255"),
        pytest.param(511, 511, 511 << 15, (1 << 24) - 1, id="the last cluster of 511"),
        pytest.param(0, 255, 256, 65535, id="cluster 0 begins after the reserved numbers"),
    ],
)
def test_a_cluster_allocates_from_its_range(cluster_id: int, limit: int, first: int, last: int) -> None:
    """Cluster bits are on top of the 24, their number follows from the size of the mesh."""
    assert identity_range(cluster_id, limit) == IdentityRange(first, last)


@pytest.mark.parametrize(("cluster_id", "limit"), [(256, 255), (512, 511), (-1, 255), (1, 256), (1, 0)])
def test_a_range_that_cannot_be_is_refused(cluster_id: int, limit: int) -> None:
    """Ids and sizes come checked; anything else is a bug."""
    with pytest.raises(ValueError, match="cluster"):
        identity_range(cluster_id, limit)


@pytest.mark.parametrize(
    ("identity", "why"),
    [
        pytest.param(0, "identity 0", id="0: unknown, what pairs without an identity carry"),
        pytest.param(2, "reserved", id="2: world, would look like a miss for ever"),
        pytest.param(255, "reserved", id="255: the last one a user may have fixed"),
        pytest.param(0x01000001, "local to a node", id="scope 1: a CIDR on another node"),
        pytest.param(0x02000001, "local to a node", id="scope 2: a remote node"),
        pytest.param(0xFFFFFFFF, "local to a node", id="the largest number"),
        pytest.param(131071, "not in the cluster's range", id="one below the range"),
        pytest.param(196608, "not in the cluster's range", id="one above the range"),
    ],
)
def test_identities_that_must_never_be_installed_say_why(identity: int, why: str) -> None:
    """Each kind of wrong has its own words."""
    assert why in (check_identity(identity, CLUSTER_TWO) or "")


@pytest.mark.parametrize("identity", [131072, 131073, 196607])
def test_identities_of_the_cluster_may_be_installed(identity: int) -> None:
    """Both ends of the range belong to it."""
    assert check_identity(identity, CLUSTER_TWO) is None


def test_a_range_that_is_too_wide_does_not_admit_local_or_reserved_identities() -> None:
    """The absolute rules hold whatever range the caller believes in."""
    everything = IdentityRange(0, 2**32 - 1)
    assert [bool(check_identity(n, everything)) for n in (0, 255, 256, 2**24 - 1, 2**24)] == [1, 1, 0, 0, 1]


@given(st.integers(0, 2**24 - 1), st.sampled_from([255, 511]))
def test_an_identity_is_in_the_range_of_one_cluster(identity: int, limit: int) -> None:
    """Whose id is in its top bits."""
    owners = [n for n in range(limit + 1) if check_identity(identity, identity_range(n, limit)) is None]
    assert owners == ([identity >> (16 if limit == 255 else 15)] if identity >= 256 else [])


@pytest.mark.parametrize("limit", [255, 511])
@pytest.mark.parametrize("identity", [0, 2, 255, 0x01000001, 0x02000001])
def test_reserved_and_node_local_identities_belong_to_no_cluster_of_the_mesh(
    identity: int, limit: int
) -> None:
    """Ids of clusters in a mesh are 1 to 255, or 511."""
    assert all(check_identity(identity, identity_range(n, limit)) for n in range(1, limit + 1))


def test_world_has_a_number_in_single_stack_and_two_in_dual_stack() -> None:
    """The three numbers of the miss definition."""
    assert WORLD in WORLD_IDENTITIES
    assert sorted(WORLD_IDENTITIES) == [2, 9, 10]


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        pytest.param({"k8s:io.cilium.k8s.policy.cluster": "b", "k8s:app": "x"}, None, id="its own name"),
        pytest.param(
            {"k8s:io.cilium.k8s.policy.cluster": "a"}, "labels of cluster 'a'", id="another cluster's"
        ),
        pytest.param({"k8s:app": "x"}, "no cluster label", id="none"),
        pytest.param(
            {"container:io.cilium.k8s.policy.cluster": "b"}, "no cluster label", id="from another source"
        ),
        pytest.param(
            {"container:io.cilium.k8s.policy.cluster": "a", "k8s:io.cilium.k8s.policy.cluster": "b"},
            "a second cluster label",
            id="its own name, and another's from another source",
        ),
    ],
)
def test_an_identity_must_carry_the_name_of_its_cluster(labels: dict[str, str], why: str | None) -> None:
    """Else a peer could pose as another cluster's pod."""
    assert check_labels(labels, "b") == why
