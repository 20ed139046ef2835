from __future__ import annotations

import contextlib
import json
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymesh.core import records
from lazymesh.core.keys import address_text
from lazymesh.core.model import Entry, Reason, parse_address
from lazymesh.core.records import (
    BadRecord,
    ClusterConfig,
    IpRecord,
    RecordError,
    decode_cluster_config,
    decode_identity,
    decode_node,
    decode_pair,
    decode_pairs,
    entry_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

POD = parse_address("10.244.1.79")
GOLDEN_PAIR = (
    b'{"IP":"10.244.1.79","Mask":null,"HostIP":"172.18.0.3","ID":199472,"Key":0,"Metadata":"",'
    b'"K8sNamespace":"foo","K8sPodName":"cep-001","K8sServiceAccount":"default"}'
)


def pair(**fields: Any) -> bytes:
    """Return the golden pair with fields changed, or left out where they are ``...``."""
    document = {**json.loads(GOLDEN_PAIR), **fields}
    return json.dumps({name: value for name, value in document.items() if value is not ...}).encode()


def test_a_pair_as_the_apiserver_writes_it_is_read() -> None:
    """The reference's compact form, to the byte."""
    expected = IpRecord(199472, parse_address("172.18.0.3"), 0, "")
    assert decode_pair(GOLDEN_PAIR, POD) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({"Key": 255}, {"encrypt_key": 255}, id="WireGuard's key index is passed on"),
        pytest.param(
            {"SyncScope": "regional"}, {"scope": "regional"}, id="scope as the proof of concept spells it"
        ),
        pytest.param({"syncScope": "regional"}, {"scope": "regional"}, id="scope as the CFP spells it"),
        pytest.param(
            {"HostIP": "fc00:c111::2"}, {"host_ip": parse_address("fc00:c111::2")}, id="IPv6 underlay"
        ),
        pytest.param(
            {"HostIP": "::ffff:172.18.0.2"},
            {"host_ip": parse_address("172.18.0.2")},
            id="IPv4-mapped is IPv4",
        ),
        pytest.param({"ID": 0}, {"identity": 0}, id="identity 0 is read: the check of identities refuses it"),
        pytest.param(
            {"NamedPorts": [{"Name": "http", "Port": 8080, "Protocol": "TCP"}]}, {}, id="named ports of 1.20"
        ),
        pytest.param(
            {"ours": {"deep": [1, {}]}, "id": "x"}, {}, id="unknown fields, and known ones in another case"
        ),
        pytest.param({"Mask": ..., "Key": ..., "Metadata": ...}, {}, id="only what is needed"),
    ],
)
def test_pairs_of_all_versions_are_read(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    """Tolerant of what is new, exact about what is used."""
    record = decode_pair(pair(**fields), POD)
    assert {name: getattr(record, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        pytest.param(b"", "Input data was truncated", id="nothing"),
        pytest.param(b"pod", "invalid character", id="not JSON"),
        pytest.param(b"[]", "Expected `object`", id="not an object"),
        pytest.param(GOLDEN_PAIR + b" " * 65536, "bytes", id="over 64 KiB, though it is good JSON"),
        pytest.param(b'{"x":' * 12000, "recursion", id="nested deeper than any decoder goes"),
        pytest.param(
            GOLDEN_PAIR.replace(b"172.18", b"\xff"), "-8", id="not UTF-8, as 0.22 or 0.23 of msgspec says"
        ),
        pytest.param(pair(HostIP=...), "HostIP", id="no HostIP"),
        pytest.param(pair(HostIP=""), "HostIP", id="empty HostIP, as of an endpoint without a node"),
        pytest.param(pair(HostIP="node-1"), "HostIP", id="HostIP is a name"),
        pytest.param(pair(HostIP="0.0.0.0"), "HostIP", id="HostIP that the map would read as none"),
        pytest.param(pair(HostIP="fe80::1%eth0"), "HostIP", id="HostIP with a zone"),
        pytest.param(pair(HostIP="1" * 9000), "HostIP", id="HostIP of 9,000 characters"),
        pytest.param(pair(ID=...), "`ID`", id="no ID"),
        pytest.param(pair(ID=-1), "$.ID", id="negative ID"),
        pytest.param(pair(ID=1.5), "$.ID", id="fractional ID"),
        pytest.param(pair(ID="199472"), "$.ID", id="ID in quotes"),
        pytest.param(pair(ID=True), "$.ID", id="ID is true"),
        pytest.param(pair(ID=2**32), "$.ID", id="ID of 33 bits"),
        pytest.param(b'{"ID":' + b"9" * 5000 + b"}", "$.ID", id="ID of 5,000 digits"),
        pytest.param(pair(Key=256), "$.Key", id="Key over a byte"),
        pytest.param(pair(Key=-1), "$.Key", id="negative Key"),
        pytest.param(pair(IP=...), "`IP`", id="no IP"),
        pytest.param(pair(IP="10.244.1.80"), "wrong key form", id="another address's record"),
        pytest.param(pair(IP="10.244.01.79"), "wrong key form", id="leading zero"),
        pytest.param(pair(IP="::ffff:10.244.1.79"), "wrong key form", id="the same address, IPv4-mapped"),
        pytest.param(pair(IP="10.244.1.79/32"), "wrong key form", id="a prefix"),
        pytest.param(pair(Mask="/////w=="), "wrong key form", id="a mask, even the full one"),
        pytest.param(pair(Mask=""), "wrong key form", id="an empty mask"),
        pytest.param(pair(SyncScope=1), "$.SyncScope", id="scope is no text"),
    ],
)
def test_pairs_that_we_would_not_act_on_are_malformed(value: bytes, detail: str) -> None:
    """Each refusal says in few words what is wrong."""
    refused = decode_pair(value, POD)
    assert isinstance(refused, BadRecord)
    assert refused.reason is Reason.MALFORMED
    assert detail in refused.detail
    assert len(refused.detail) < 250
    assert refused.detail.isprintable()
    good = decode_pair(GOLDEN_PAIR, POD)
    together = decode_pairs([GOLDEN_PAIR, value, GOLDEN_PAIR], [POD] * 3)
    assert together == [good, refused, good], "a bad record is nobody else's fault"


@pytest.mark.parametrize("name", ["SyncScope", "syncScope"])
def test_a_long_scope_is_read_and_not_kept(name: str) -> None:
    """Records are kept for each address, tens of thousands: that many of 60 KB would be gigabytes."""
    record = decode_pair(pair(**{name: "regional" + "x" * 60_000}), POD)
    assert len(record.scope) < 100
    assert record.scope != "regional"


def test_pairs_that_are_read_together_each_belong_to_their_address() -> None:
    """Two records that swapped places are both another's."""
    there = parse_address("10.244.1.80")
    values = [pair(ID=7), pair(IP="10.244.1.80", ID=8)]
    assert decode_pairs(values, [POD, there]) == [decode_pair(values[0], POD), decode_pair(values[1], there)]
    swapped = decode_pairs(values[::-1], [POD, there])
    assert all(isinstance(each, BadRecord) for each in swapped)
    assert decode_pairs([], []) == []


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        pytest.param("fd00:10:244:1::d643", True, id="canonical"),
        pytest.param("fd00:10:244:1:0:0:0:d643", False, id="not compressed"),
        pytest.param("FD00:10:244:1::D643", False, id="upper case"),
    ],
)
def test_an_ipv6_pair_must_be_in_canonical_form(text: str, accepted: bool) -> None:
    """Cilium's reader refuses a key suffix that is not the canonical text, and so do we."""
    record = decode_pair(pair(IP=text), parse_address("fd00:10:244:1::d643"))
    if accepted:
        assert record.identity == 199472
    else:
        assert record.detail.startswith("wrong key form")


ADDRESSES = st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16))


@given(ADDRESSES, st.ip_addresses(), st.integers(0, 2**32 - 1), st.integers(0, 255))
def test_every_good_pair_is_read_as_written(address: bytes, host: Any, identity: int, key: int) -> None:
    """Round trip through JSON as Go writes it."""
    value = pair(IP=address_text(address), HostIP=str(host), ID=identity, Key=key)
    if not host.is_unspecified and getattr(host, "ipv4_mapped", None) is None:
        assert decode_pair(value, address) == IpRecord(identity, host.packed, key, "")


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.just("10.244.1.79")
)
NAMES = st.sampled_from(
    [
        "IP",
        "Mask",
        "HostIP",
        "ID",
        "Key",
        "SyncScope",
        "Name",
        "Cluster",
        "IPAddresses",
        "ClusterID",
        "Labels",
    ]
)
NAMES |= st.sampled_from(["IPv4AllocCIDR", "id", "capabilities", "cached", "maxConnectedClusters"])
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(), inner, max_size=8)
)


DECODERS: list[Callable[[bytes], object]] = [
    lambda value: decode_pair(value, POD),
    lambda value: decode_node(value, "b"),
    decode_identity,
    decode_cluster_config,
]


@given(st.binary() | DOCUMENTS.map(lambda document: json.dumps(document).encode()))
def test_no_bytes_crash_a_decoder(value: bytes) -> None:
    """Values come from other clusters: whatever they are, the outcome is a record or a RecordError."""
    for decode in DECODERS:
        with contextlib.suppress(RecordError):
            decode(value)


@pytest.mark.parametrize(
    ("record", "entry"),
    [
        pytest.param(
            IpRecord(131073, parse_address("172.18.0.2"), 3, ""),
            Entry(131073, parse_address("172.18.0.2"), 3, 0x02),
            id="IPv4 endpoint: hastunnel",
        ),
        pytest.param(
            IpRecord(131073, parse_address("fc00:c111::2"), 0, ""),
            Entry(131073, parse_address("fc00:c111::2"), 0, 0x06),
            id="IPv6 endpoint: hastunnel and ipv6tunnel",
        ),
    ],
)
def test_an_entry_has_the_flags_of_the_golden_vectors(record: IpRecord, entry: Entry) -> None:
    """The value bytes of the reference: flags 02 and 06, the key copied."""
    assert entry_of(record) == entry


NODE: dict[str, Any] = {
    "Name": "b-worker",
    "Cluster": "b",
    "IPAddresses": [
        {"Type": "InternalIP", "IP": "172.18.0.2"},
        {"Type": "ExternalIP", "IP": ""},
        {"Type": "CiliumInternalIP", "IP": "fd00:10:2::1"},
    ],
    "IPv4AllocCIDR": {"IP": "10.2.0.0", "Mask": "////AA=="},
    "IPv4SecondaryAllocCIDRs": [{"IP": "10.99.0.0", "Mask": "//8AAA=="}],
    "IPv6AllocCIDR": {"IP": "fd00:10:2::", "Mask": "//////////8AAAAAAAAAAA=="},
    "IPv6SecondaryAllocCIDRs": None,
    "IPv4HealthIP": "10.2.0.77",
    "ClusterID": 2,
    "Source": "custom-resource",
    "EncryptionKey": 0,
    "Labels": {"topology.kubernetes.io/region": "eu-west-1", "kubernetes.io/os": "linux"},
    "NodeIdentity": 0,
    "BootID": "",
}


CIDR = {"IP": "10.99.0.0", "Mask": "//8AAA=="}


def node(**fields: Any) -> bytes:
    """Return the node record above with fields changed."""
    return json.dumps({**NODE, **fields}).encode()


def test_a_node_has_its_addresses_cidrs_and_region() -> None:
    """Primary and secondary CIDRs of both families; empty addresses are skipped."""
    record = decode_node(node(), "b")
    assert (record.name, record.cluster, record.cluster_id, record.region) == (
        "b-worker",
        "b",
        2,
        "eu-west-1",
    )
    assert record.node_ips == (parse_address("172.18.0.2"), parse_address("fd00:10:2::1"))
    assert record.pod_cidrs == tuple(map(ip_network, ("10.2.0.0/24", "fd00:10:2::/64", "10.99.0.0/16")))


def test_a_node_with_nothing_but_its_name_is_a_node() -> None:
    """As on platforms without pod CIDRs; lists that are absent or null are empty."""
    record = decode_node(
        b'{"Name":"n","Cluster":"b","IPAddresses":null,"IPv4AllocCIDR":null,"Labels":null}', "b"
    )
    assert (record.node_ips, record.pod_cidrs, record.region, record.cluster_id) == ((), (), None, 0)


def test_a_node_may_have_many_cidrs_and_addresses() -> None:
    """The first addresses are those that its pods' records name."""
    addresses = [{"Type": "InternalIP", "IP": f"172.18.0.{number}"} for number in range(1, 100)]
    record = decode_node(node(IPv4SecondaryAllocCIDRs=[CIDR] * 510, IPAddresses=addresses), "b")
    assert len(record.pod_cidrs) == 512
    assert record.node_ips == tuple(parse_address(f"172.18.0.{number}") for number in range(1, 9))
    region = "e" * 63
    assert decode_node(node(Labels={"topology.kubernetes.io/region": region}), "b").region == region


def test_a_node_of_another_cluster_is_forged() -> None:
    """A store speaks for its own cluster only."""
    with pytest.raises(RecordError) as caught:
        decode_node(node(Cluster="c"), "b")
    assert caught.value.reason is Reason.FORGED


def test_host_bits_of_a_pod_cidr_are_cleared() -> None:
    """As Cilium does with every prefix."""
    record = decode_node(node(IPv4AllocCIDR={"IP": "10.2.0.5", "Mask": "////AA=="}), "b")
    assert record.pod_cidrs[0] == ip_network("10.2.0.0/24")


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"Name": ""}, id="empty name"),
        pytest.param({"IPv4AllocCIDR": {"IP": "10.2.0.0", "Mask": "/wD/AA=="}}, id="mask with a hole"),
        pytest.param({"IPv4AllocCIDR": {"IP": "10.2.0.0", "Mask": "!"}}, id="mask that is no base64"),
        pytest.param({"IPv4AllocCIDR": {"IP": "10.2.0.0", "Mask": ""}}, id="empty mask"),
        pytest.param({"IPv4AllocCIDR": {"IP": "10.2.0.0", "Mask": None}}, id="null mask"),
        pytest.param({"IPv6AllocCIDR": {"IP": "fd00::", "Mask": "////AA=="}}, id="mask of the other family"),
        pytest.param({"IPv4AllocCIDR": {"IP": "", "Mask": "////AA=="}}, id="CIDR without an address"),
        pytest.param({"ClusterID": -1}, id="negative cluster id"),
        pytest.param({"IPv4SecondaryAllocCIDRs": [CIDR] * 511}, id="more pod CIDRs than a node can have"),
        pytest.param({"Labels": {"topology.kubernetes.io/region": "e" * 64}}, id="region that is no label"),
    ],
)
def test_a_node_with_a_broken_part_is_malformed(fields: dict[str, Any]) -> None:
    """Half a node is not a node: the reader learns so, and keeps what it had or nothing."""
    with pytest.raises(RecordError) as caught:
        decode_node(node(**fields), "b")
    assert caught.value.reason is Reason.MALFORMED
    assert caught.value.detail.isprintable()


def test_an_identity_is_a_string_of_labels() -> None:
    """The golden value of the reference, an empty value and a value with an equals sign."""
    value = (
        b"k8s:app=baz;k8s:io.cilium.k8s.policy.cluster=cluster3;k8s:io.kubernetes.pod.namespace=bar;"
        b"k8s:noval=;container:x=a=b;"
    )
    assert decode_identity(value) == {
        "k8s:app": "baz",
        "k8s:io.cilium.k8s.policy.cluster": "cluster3",
        "k8s:io.kubernetes.pod.namespace": "bar",
        "k8s:noval": "",
        "container:x": "a=b",
    }


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        pytest.param(b"", "no labels", id="no labels, which Cilium never publishes"),
        pytest.param(b";", "no labels", id="separators only"),
        pytest.param(b"app=baz;", "label 'app=baz'", id="no source"),
        pytest.param(b":app=baz;", "label", id="empty source"),
        pytest.param(b"k8s:=baz;", "label", id="empty key"),
        pytest.param(b"any:app=baz;", "label 'any:app=baz'", id="the source that stands for all of them"),
        pytest.param(b"k8s:app=a;k8s:app=b;", "label", id="one label with two values"),
        pytest.param(b"k8s:app=\xff;", "UTF-8", id="not UTF-8"),
        pytest.param(b"k8s:app=" + b"x" * 65536, "bytes", id="over 64 KiB"),
        pytest.param(
            b"".join(b"k:%d;" % n for n in range(1025)), "1024 labels", id="more labels than any has"
        ),
        pytest.param(b"app=" + b"x" * 200 + b";", "label 'app=", id="no source, and long"),
    ],
)
def test_an_identity_whose_labels_are_unclear_is_malformed(value: bytes, detail: str) -> None:
    """Labels decide which peers may talk, so nothing is guessed."""
    with pytest.raises(RecordError, match=detail):
        decode_identity(value)


def test_an_identity_may_have_many_labels() -> None:
    """With and without a separator at the end, as for few."""
    value = ";".join(f"k8s:{number}=x" for number in range(1024)).encode()
    assert len(decode_identity(value)) == len(decode_identity(value + b";")) == 1024


def test_long_labels_are_read_and_not_kept() -> None:
    """A cache bounds how many it has; 8,192 of 60 KB would be a gigabyte."""
    kept = records._label.cache_info().currsize
    value = "x" * 60_000
    assert decode_identity(f"k8s:app={value};".encode()) == {"k8s:app": value}
    assert records._label.cache_info().currsize == kept
    assert decode_identity(b"k8s:never-seen-before=1;") == {"k8s:never-seen-before": "1"}
    assert records._label.cache_info().currsize == kept + 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(
            b'{"id":3,"capabilities":{"syncedCanaries":true,"maxConnectedClusters":255,"serviceExportsEnabled":false}}',
            ClusterConfig(3, 255, cached=False, synced_canaries=True),
            id="the apiserver's",
        ),
        pytest.param(
            b'{"id":3,"capabilities":{"syncedCanaries":true,"cached":true,"maxConnectedClusters":511,'
            b'"endpointSlicesExportMode":"services-and-endpointslices"}}',
            ClusterConfig(3, 511, cached=True, synced_canaries=True),
            id="a kvstoremesh's of 1.20",
        ),
        pytest.param(
            b'{"id":3}',
            ClusterConfig(3, 255, cached=False, synced_canaries=False),
            id="all that is empty left out",
        ),
    ],
)
def test_a_cluster_config_is_read(value: bytes, expected: ClusterConfig) -> None:
    """Everything in it is omitted when empty."""
    assert decode_cluster_config(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b"{}", id="no id"),
        pytest.param(b'{"id":0}', id="id 0: no mesh"),
        pytest.param(b'{"id":256}', id="id over a mesh of 255"),
        pytest.param(b'{"id":1,"capabilities":{"maxConnectedClusters":300}}', id="a mesh size that is none"),
    ],
)
def test_a_cluster_config_that_cilium_refuses_is_malformed(value: bytes) -> None:
    """A wrong id would make every identity of the cluster look right or wrong at random."""
    with pytest.raises(RecordError) as caught:
        decode_cluster_config(value)
    assert caught.value.reason is Reason.MALFORMED
