"""What the user may say, and what is refused."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymesh.errors import SettingsError
from lazymesh.settings import DatapathSettings, MeshSettings, parse_host_port, parse_mesh_cidr


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a.b", "x" * 33])
def test_cluster_name_that_cilium_refuses_is_refused(name: str) -> None:
    """The mesh's other members would not take it either."""
    with pytest.raises(SettingsError, match="--cluster-name"):
        MeshSettings(name, 1)


@pytest.mark.parametrize(("number", "most"), [(-1, 255), (256, 255), (512, 511)])
def test_cluster_id_outside_of_the_mesh_is_refused(number: int, most: int) -> None:
    """The range depends on the mesh's size."""
    with pytest.raises(SettingsError, match="--cluster-id"):
        MeshSettings("a", number, most)
    MeshSettings("a", most, most)


@pytest.mark.parametrize(("name", "number"), [("default", 0), ("default", 1), ("a", 0)])
def test_cluster_that_is_in_no_mesh_is_refused(name: str, number: int) -> None:
    """In the chart's words: another one with our id could not be told from us."""
    with pytest.raises(
        SettingsError, match=r"--cluster-name and --cluster-id: .*; give what Cilium's ConfigMap"
    ):
        MeshSettings(name, number)


def test_one_cidr_for_two_clusters_is_refused() -> None:
    """Whose addresses those are nobody could say."""
    network = ipaddress.ip_network("10.2.0.0/16")
    with pytest.raises(SettingsError, match=r"--mesh-cidr 10\.2\.0\.0/16: assigned to both b and c"):
        MeshSettings("a", 1, mesh_cidrs=(("b", network), ("c", network)))
    MeshSettings("a", 1, mesh_cidrs=(("b", network), ("b", network)))


def test_something_to_attach_to_is_needed() -> None:
    """An uplink alone is enough."""
    with pytest.raises(SettingsError, match="--interface"):
        DatapathSettings()
    DatapathSettings(uplinks=("eth0",))


def test_mesh_cidr_is_cluster_and_network() -> None:
    """Both families."""
    assert parse_mesh_cidr("b=10.2.0.0/16") == ("b", ipaddress.ip_network("10.2.0.0/16"))
    assert parse_mesh_cidr("b=fd00::/64") == ("b", ipaddress.ip_network("fd00::/64"))


@pytest.mark.parametrize("text", ["", "b", "=10.2.0.0/16", "b=", "b=10.2.0.1/16", "b=10.2.0.0/33"])
def test_other_mesh_cidrs_are_refused(text: str) -> None:
    """The message shows how to write one."""
    with pytest.raises(SettingsError, match="CLUSTER=CIDR"):
        parse_mesh_cidr(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("127.0.0.1:9968", ("127.0.0.1", 9968)), ("[::1]:1", ("::1", 1)), (":80", ("0.0.0.0", 80))],
)
def test_metrics_address_is_host_and_port(text: str, expected: tuple[str, int]) -> None:
    """No host means every one of ours."""
    assert parse_host_port(text) == expected


@given(st.text(max_size=20))
def test_any_other_text_is_an_address_or_a_settings_error(text: str) -> None:
    """Nothing else comes out."""
    try:
        host, port = parse_host_port(text)
    except SettingsError:
        return
    assert host
    assert 0 <= port <= 65535
