from __future__ import annotations

import itertools
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymesh.core import keys
from lazymesh.core.model import Space, format_address, parse_address

if TYPE_CHECKING:
    from lazymesh.core.model import Address

NEARLY_DOTTED = st.lists(
    st.sampled_from(["0", "7", "10", "255", "256", "010", "", " 1", "-1", "1\n", "\u0661", ":", "1e1"]),
    min_size=1,
    max_size=6,
).map(".".join)

ADDRESSES = st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16))
SPARSE = st.lists(st.sampled_from([0, 0, 1, 0xD643]), min_size=8, max_size=8).map(
    lambda groups: b"".join(group.to_bytes(2) for group in groups)
)
ZEROS = st.lists(st.sampled_from([0, 0, 0, 1, 0xFF]), min_size=16, max_size=16).map(bytes)
"""IPv6 addresses with long runs of zeros."""


@pytest.mark.parametrize(
    ("space", "address", "key"),
    [
        pytest.param(
            Space.PUSHED,
            "10.2.0.5",
            b"cilium/state/ip/v1/default/10.2.0.5",
            id="pushed: the space Cilium watches",
        ),
        pytest.param(
            Space.PULL_ONLY, "10.2.0.5", b"cilium/state/ip/v1/ondemand/10.2.0.5", id="pull-only: beside it"
        ),
        pytest.param(
            Space.CACHED,
            "10.2.0.5",
            b"cilium/cache/ip/v1/b/10.2.0.5",
            id="cached: the cluster replaces the space",
        ),
        pytest.param(
            Space.PUSHED,
            "fd00:10:244:1:0:0:0:D643",
            b"cilium/state/ip/v1/default/fd00:10:244:1::d643",
            id="IPv6 in Go's canonical form",
        ),
    ],
)
def test_each_space_has_its_key(space: Space, address: str, key: bytes) -> None:
    """The strings are those of Cilium's schema, and of lazymesh's beside it."""
    assert keys.ip_key(space, parse_address(address), "b") == key


@given(ADDRESSES | SPARSE)
def test_fast_text_of_an_address_is_the_canonical_one(address: bytes) -> None:
    """The miss path's formatter and the model's are the same function, at different prices."""
    assert keys.address_text(address) == format_address(address)


@pytest.mark.parametrize(
    ("address", "text"),
    [
        pytest.param("1:0:2:3:4:5:6:7", "1:0:2:3:4:5:6:7", id="one zero group stays"),
        pytest.param("1:0:0:2:3:0:0:4", "1::2:3:0:0:4", id="of two equal runs the first is shortened"),
        pytest.param("1:0:0:2:0:0:0:4", "1:0:0:2::4", id="the longer run wins"),
        pytest.param("::", "::", id="all zeroes"),
    ],
)
def test_ipv6_is_shortened_as_go_does_it(address: str, text: str) -> None:
    """RFC 5952; a key that differs in one character is another key."""
    assert keys.address_text(parse_address(address)) == text


@given(st.one_of(NEARLY_DOTTED, st.ip_addresses().map(str), st.text(max_size=16)))
def test_dotted_addresses_are_those_that_the_standard_library_reads(text: str) -> None:
    """No other notation (leading zeros, another script's digits) is an address, as that would be a second key."""
    try:
        expected = IPv4Address(text).packed
    except ValueError:
        expected = None
    assert keys.dotted_address(text) == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        pytest.param(keys.nodes_prefix(False, "b"), b"cilium/state/nodes/v1/b/", id="nodes at the owner"),
        pytest.param(keys.nodes_prefix(True, "b"), b"cilium/cache/nodes/v1/b/", id="nodes in the cache"),
        pytest.param(
            keys.identities_prefix(False, "b"),
            b"cilium/state/identities/v1/id/",
            id="identities at the owner",
        ),
        pytest.param(
            keys.identities_prefix(True, "b"),
            b"cilium/cache/identities/v1/b/id/",
            id="identities in the cache",
        ),
        pytest.param(keys.cluster_config_key("b"), b"cilium/cluster-config/b", id="configuration"),
        pytest.param(
            keys.canary_key("identities", False, "b"),
            b"cilium/synced/b/cilium/state/identities/v1",
            id="canary at the owner",
        ),
        pytest.param(
            keys.canary_key("ip", True, "b"), b"cilium/synced/b/cilium/cache/ip/v1", id="canary in the cache"
        ),
    ],
)
def test_prefixes_and_single_keys_are_those_of_the_schema(key: bytes, expected: bytes) -> None:
    """Byte for byte what the reference's table of keys says."""
    assert key == expected


@given(st.integers(1, 2**24 - 1), st.booleans())
def test_an_identity_comes_back_out_of_its_key(identity: int, cached: bool) -> None:
    """Building and parsing are inverse."""
    prefix = keys.identities_prefix(cached, "b")
    assert keys.identity_of_key(prefix + str(identity).encode(), prefix) == identity


@pytest.mark.parametrize(
    "rest",
    [
        b"",
        b"x",
        b"-1",
        b"+1",
        b" 1",
        b"1_0",
        b"007",
        b"1/2",
        b"9" * 5000,
        "\N{ARABIC-INDIC DIGIT ONE}".encode(),
    ],
)
def test_keys_that_name_no_identity_are_recognised(rest: bytes) -> None:
    """Only a canonical decimal number is an identity: one identity, one key."""
    prefix = keys.identities_prefix(False, "b")
    assert keys.identity_of_key(prefix + rest, prefix) is None


def test_an_identity_key_of_another_prefix_is_not_ours() -> None:
    """A key is only parsed below the prefix that was listed."""
    key = keys.identities_prefix(True, "b") + b"131073"
    assert keys.identity_of_key(key, keys.identities_prefix(True, "c")) is None


@pytest.mark.parametrize(
    ("rest", "name"), [(b"kind-worker", "kind-worker"), (b"", None), (b"a/b", None), (b"\xff", None)]
)
def test_a_node_name_is_one_component_of_the_key(rest: bytes, name: str | None) -> None:
    """Deletes carry no value, so the name must come from the key."""
    prefix = keys.nodes_prefix(False, "b")
    assert keys.node_of_key(prefix + rest, prefix) == name


@given(st.binary(max_size=40))
def test_no_key_crashes_the_parsers(key: bytes) -> None:
    """Whatever bytes a store lists, the answer is a value or None."""
    for prefix in (b"", keys.nodes_prefix(False, "b")):
        assert keys.identity_of_key(key, prefix) is None or key.isdigit()
        assert keys.node_of_key(key, prefix) is None or key.isascii()


@given(spaces=st.lists(st.sampled_from(Space), min_size=1, unique=True), addresses=st.lists(ADDRESSES))
def test_keys_of_many_addresses_are_those_of_each(spaces: list[Space], addresses: list[bytes]) -> None:
    """Address by address, each in the order of the spaces."""
    expected = [keys.ip_key(space, address, "b") for address in addresses for space in spaces]
    assert keys.ip_keys(tuple(spaces), addresses, "b") == expected


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("10.2.0.1", b"10.2.0."),
        ("10.2.0.255", b"10.2.0."),
        ("fd00::1ab", b"fd00::1"),
        ("fd00::100", b"fd00::1"),
        ("fd00::ab", b"fd00::"),
        ("fd00:1:2:3:4:5:6:77", b"fd00:1:2:3:4:5:6:"),
        ("fd00:1:2:3:4:5:0:77", b"fd00:1:2:3:4:5:0:"),
        ("fd00:1:2:3:4:5::", b"fd00:1:2:3:4:5::"),
    ],
)
def test_texts_of_a_nodes_pods_begin_alike(address: str, text: bytes) -> None:
    """A /24 of IPv4, a /120 of IPv6."""
    assert keys.common_text(parse_address(address)) == text


@given(st.binary(min_size=4, max_size=4) | ZEROS, st.integers(0, 255))
def test_every_address_of_a_group_has_its_text(address: Address, last: int) -> None:
    """Whatever is compressed in it."""
    other = address[:-1] + bytes([last])
    assert keys.address_text(address).encode().startswith(keys.common_text(address))
    if keys.group_of(other) == keys.group_of(address):
        assert keys.common_text(other) == keys.common_text(address)


NEAR = st.binary(min_size=1, max_size=2).map(lambda end: bytes(16 - len(end)) + end)
MIXED = st.lists(st.binary(min_size=4, max_size=4) | NEAR | NEAR.map(lambda address: address[-4:]) | ZEROS)


@given(MIXED)
def test_texts_of_many_are_those_of_each(addresses: list[Address]) -> None:
    """Whoever stands beside whom."""
    assert keys.address_texts(addresses) == [keys.address_text(address) for address in addresses]


@given(MIXED)
def test_neighbours_are_of_one_group_and_none_is_lost(addresses: list[Address]) -> None:
    """In their order, so that a run is as long as it can be."""
    runs = list(keys.neighbours_of(addresses))
    assert [address for _, some in runs for address in some] == addresses
    for group, some in runs:
        assert {keys.group_of(address) for address in some} == {group}
    for (before, _), (after, _) in itertools.pairwise(runs):
        assert before != after


@given(st.lists(st.binary(min_size=4, max_size=4)))
def test_text_of_an_address_is_its_groups_and_its_own(addresses: list[Address]) -> None:
    """So that keys below a prefix can be told apart by what is left of them."""
    for address, own in zip(addresses, keys.own_texts(addresses), strict=True):
        assert keys.common_text(address) + own == keys.address_text(address).encode()
