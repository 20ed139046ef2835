"""The C headers are the truth: their BTF against the ctypes mirror, the mirror against the packers, all against Cilium.

Nothing here touches the kernel: clang and bpftool do.
"""

from __future__ import annotations

import ctypes
import ipaddress
import json
import os
import platform
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymesh.core.model import Direction, Entry, EntryFlag, parse_address
from lazymesh.datapath import abi
from lazymesh.datapath.ipcachemaps import IpcacheLayout
from lazymesh.datapath.maps import PacketCounters
from lazymesh.datapath.pins import pinned_maps
from lazymesh.datapath.settingsmap import OnMiss

INCLUDE = Path(__file__).parents[2] / "bpf" / "include"
HEADERS = sorted(INCLUDE.glob("*_abi.h"))

Layout = tuple[int, dict[str, int]]
"""Size in bytes, and offset of each member by name."""


def c_struct_names() -> list[str]:
    """Return the name of every struct that the headers define."""
    return [
        name
        for header in HEADERS
        for name in re.findall(r"^struct (\w+) \{", header.read_text(), re.MULTILINE)
    ]


def c_enum_names() -> list[str]:
    """Return the name of every enum that the headers define."""
    return [
        name for header in HEADERS for name in re.findall(r"^enum (\w+) \{", header.read_text(), re.MULTILINE)
    ]


def tool(*names: str) -> str:
    """Return the first of these programs that is installed."""
    for name in names:
        found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
        if found:
            return found
    if os.environ.get("CI") == "true":
        pytest.fail(f"install {names[0]}")
    pytest.skip(f"install {names[0]}")


INDEXED = {
    "lm_recent_tags": "1 << LM_RECENT_BITS",
    "lm_slots": "LM_HOLD_SLOTS",
    "lm_hold_free": "LM_HOLD_SLOTS",
    "lm_hold_bucket": "LM_HOLD_BUCKETS",
}
"""Maps whose size the programs rely on, and what they take it for: Python makes them."""


@pytest.fixture(scope="module")
def btf(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the types of the headers as the BPF compiler lays them out."""
    folder = tmp_path_factory.mktemp("btf")
    source, compiled = folder / "mention.c", folder / "mention.o"
    lines = [f'#include "{header.name}"' for header in HEADERS]
    lines += [f"struct {name} a_{name};" for name in c_struct_names()]
    lines += [f"enum {name} a_{name};" for name in c_enum_names()]
    lines += ["enum numbers { THE_SIGNAL = SIGNAL_IPCACHE_MISS } a_number;"]
    lines += [
        f"enum sizes {{ {', '.join(f'OF_{name} = {size}' for name, size in INDEXED.items())} }} a_size;"
    ]
    source.write_text("\n".join(lines) + "\n")
    flags = ["-target", "bpf", "-g", "-O2", "-Wall", "-Werror", f"-I{INCLUDE}"]
    flags += [f"-I/usr/include/{platform.machine()}-linux-gnu"]
    clang = tool("clang", "clang-14", "clang-19")
    subprocess.run([clang, *flags, "-c", source, "-o", compiled], check=True)
    dump = subprocess.run(
        [tool("bpftool"), "btf", "dump", "file", compiled, "-j"], check=True, capture_output=True, text=True
    )
    types: list[dict[str, Any]] = json.loads(dump.stdout)["types"]
    return types


def c_layout(btf: list[dict[str, Any]], name: str) -> Layout:
    """Return what the compiler made of a struct."""
    (found,) = [kind for kind in btf if kind["kind"] == "STRUCT" and kind["name"] == name]
    assert all(not member.get("bitfield_size") for member in found["members"]), "BCC cannot pack bitfields"
    return found["size"], {member["name"]: member["bits_offset"] // 8 for member in found["members"]}


def python_layout(mirror: type[ctypes.Structure]) -> Layout:
    """Return what ctypes made of a class."""
    names = [field[0] for field in mirror._fields_]
    return ctypes.sizeof(mirror), {name: getattr(mirror, name).offset for name in names}


def test_both_sides_know_the_same_structs() -> None:
    """A struct that one side lacks would never be checked."""
    assert set(c_struct_names()) == set(abi.STRUCTS)


@pytest.mark.parametrize("name", sorted(set(c_struct_names()) | set(abi.STRUCTS)))
def test_struct_is_laid_out_alike_on_both_sides(btf: list[dict[str, Any]], name: str) -> None:
    """Same size, same members, same offsets, in C and in Python."""
    assert python_layout(abi.STRUCTS[name]) == c_layout(btf, name)


@pytest.mark.parametrize("name", sorted(abi.STRUCTS))
def test_struct_has_no_hidden_hole(btf: list[dict[str, Any]], name: str) -> None:
    """Padding that is not spelled out reaches the kernel as whatever was on the stack: no key may have any."""
    mirror = abi.STRUCTS[name]
    size, offsets = c_layout(btf, name)
    ends = [offsets[member] + getattr(mirror, member).size for member in offsets]
    assert ends == [*list(offsets.values())[1:], size]


@pytest.mark.parametrize("name", sorted(abi.STRUCTS))
def test_mirror_names_its_struct(name: str) -> None:
    """Each side names the other."""
    assert f"struct {name}" in (abi.STRUCTS[name].__doc__ or "")


@pytest.mark.parametrize(
    ("enum", "expected"),
    [
        ("ipcache_family", {"IPCACHE_FAMILY_IPV4": abi.FAMILY_IPV4, "IPCACHE_FAMILY_IPV6": abi.FAMILY_IPV6}),
        ("ipcache_flag", {f"IPCACHE_FLAG_{flag.name}": flag.value for flag in EntryFlag}),
        ("lm_direction", {f"LM_{direction.name}": direction.value for direction in Direction}),
        ("lm_on_miss", {f"LM_ON_MISS_{action.name}": action.value for action in OnMiss}),
        (
            "lm_slot_state",
            {
                "LM_SLOT_FREE": abi.SLOT_FREE,
                "LM_SLOT_PARKED": abi.SLOT_PARKED,
                "LM_SLOT_RETURNING": abi.SLOT_RETURNING,
                "LM_SLOT_DISCARD": abi.SLOT_DISCARD,
                "LM_SLOT_CUT": abi.SLOT_CUT,
            },
        ),
        ("lm_view", {"LM_VIEW_NONE": 0, **{f"LM_VIEW_{view.name}": view.value for view in IpcacheLayout}}),
        ("numbers", {"THE_SIGNAL": abi.SIGNAL_IPCACHE_MISS}),
        ("sizes", {f"OF_{name}": pinned_maps(0)[name].max_entries for name in INDEXED}),
    ],
)
def test_numbers_agree(btf: list[dict[str, Any]], enum: str, expected: dict[str, int]) -> None:
    """A family, flag, direction or size is the same number on both sides."""
    (found,) = [kind for kind in btf if kind["kind"] == "ENUM" and kind["name"] == enum]
    assert {value["name"]: value["val"] for value in found["values"]} == expected


def test_every_enum_is_compared() -> None:
    """A new enum has to be added to the test above."""
    expected = {"ipcache_family", "ipcache_flag", "lm_direction", "lm_on_miss", "lm_slot_state", "lm_view"}
    expected |= {"hold"}  # the programs' own, no number of it crosses to user space
    assert set(c_enum_names()) == expected


def test_every_counter_has_its_field() -> None:
    """User space reports what the kernel counts, no less and no more."""
    *packets, windows = [name for name, _ in abi.Counters._fields_]
    assert [field.name for field in fields(PacketCounters)] == packets
    assert windows == "windows_opened"


GOLDEN_KEYS = {
    "10.2.0.5/32": "40000000 0000 00 01 0a020005 000000000000000000000000",
    "10.2.0.0/24": "38000000 0000 00 01 0a020000 000000000000000000000000",
    "0.0.0.0/0": "20000000 0000 00 01 00000000 000000000000000000000000",
    "fd00:10:244:1::d643/128": "a0000000 0000 00 02 fd00001002440001000000000000d643",
}
"""cilium-formats 1.4, from a dump of a live map."""

GOLDEN_ENTRIES = {
    "identity 131073 by 172.18.0.2": (
        Entry(131_073, parse_address("172.18.0.2"), 0, 2),
        "01000200 ac120002 000000000000000000000000 0000 00 02",
    ),
    "world by 172.18.0.2, key 255": (
        Entry(2, parse_address("172.18.0.2"), 255, 2),
        "02000000 ac120002 000000000000000000000000 0000 ff 02",
    ),
    "identity 131073 by fc00:c111::2": (
        Entry(131_073, parse_address("fc00:c111::2"), 0, 6),
        "01000200 fc00c111000000000000000000000002 0000 00 06",
    ),
}


@pytest.mark.parametrize("prefix", GOLDEN_KEYS)
def test_key_is_cilium_s_to_the_byte(prefix: str) -> None:
    """Vectors of a live map, both ways; a host's key by either function."""
    network, raw = ipaddress.ip_network(prefix), bytes.fromhex(GOLDEN_KEYS[prefix])
    assert abi.pack_network_key(network) == raw
    assert abi.unpack_key(raw) == (network, 0)
    if network.num_addresses == 1:
        assert abi.pack_address_key(network.network_address.packed) == raw
        assert abi.address_of_key(raw) == network.network_address.packed
    else:
        assert abi.address_of_key(raw) is None


@pytest.mark.parametrize("name", GOLDEN_ENTRIES)
def test_entry_is_cilium_s_to_the_byte(name: str) -> None:
    """Vectors of a live map, both ways."""
    entry, raw = GOLDEN_ENTRIES[name]
    assert abi.pack_entry(entry) == bytes.fromhex(raw)
    assert abi.unpack_entry(bytes.fromhex(raw)) == entry


def test_old_entry_is_read_as_cilium_wrote_it() -> None:
    """Up to 1.17 there were 12 bytes and no flag for the endpoint."""
    raw = bytes.fromhex("01000200 ac120002 0000 00 00")
    assert abi.unpack_entry(raw) == Entry(131_073, parse_address("172.18.0.2"))
    assert abi.unpack_entry(bytes(12)) == Entry(0)


def test_key_of_another_cluster_id_is_no_address_of_ours() -> None:
    """Cilium's extensions annotate keys with a cluster id; ours never have one."""
    raw = bytes(abi.IpcacheKey(prefixlen=64, cluster_id=7, family=1, addr=(10, 2, 0, 5)))
    assert abi.unpack_key(raw) == (ipaddress.ip_network("10.2.0.5/32"), 7)
    assert abi.address_of_key(raw) is None


@pytest.mark.parametrize(("prefixlen", "family"), [(64, 0), (64, 3), (31, 1), (65, 1), (161, 2), (0, 2)])
def test_key_that_nobody_writes_is_refused(prefixlen: int, family: int) -> None:
    """A ValueError, and never a wrong address."""
    raw = bytes(abi.IpcacheKey(prefixlen=prefixlen, family=family))
    assert abi.address_of_key(raw) is None
    with pytest.raises(ValueError, match=r"family|netmask|prefix"):
        abi.unpack_key(raw)


ADDRESSES = st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16))
ENTRIES = st.builds(
    Entry,
    identity=st.integers(0, 2**32 - 1),
    tunnel_endpoint=st.one_of(st.none(), ADDRESSES.filter(any)),
    encrypt_key=st.integers(0, 255),
    flags=st.just(0),
).map(
    lambda e: Entry(
        e.identity, e.tunnel_endpoint, e.encrypt_key, 6 if len(e.tunnel_endpoint or b"") == 16 else 2
    )
)


@given(ADDRESSES)
def test_packed_key_is_the_mirror_s(address: bytes) -> None:
    """struct.pack and ctypes write the same bytes."""
    v4 = len(address) == 4
    mirror = abi.IpcacheKey(prefixlen=64 if v4 else 160, family=1 if v4 else 2, addr=tuple(address))
    assert abi.pack_address_key(address) == bytes(mirror)
    assert abi.address_of_key(bytes(mirror)) == address


@given(ENTRIES, ENTRIES, st.integers(0, 511))
def test_packed_entry_and_journal_line_are_the_mirror_s(
    entry: Entry, previous: Entry, cluster_id: int
) -> None:
    """Both ways, for every entry that either family's endpoint can make."""
    mirrors = [
        abi.IpcacheEntry(
            sec_identity=e.identity,
            tunnel_endpoint=tuple(e.tunnel_endpoint or b""),
            encrypt_key=e.encrypt_key,
            flags=e.flags,
        )
        for e in (entry, previous)
    ]
    assert [abi.pack_entry(entry), abi.pack_entry(previous)] == [bytes(mirror) for mirror in mirrors]
    assert abi.unpack_entry(bytes(mirrors[0])) == entry
    line = abi.OwnedEntry(entry, previous, cluster_id)
    assert abi.pack_owned(line) == bytes(abi.Owned(*mirrors, cluster_id=cluster_id))
    assert abi.unpack_owned(abi.pack_owned(line)) == line


@given(
    ADDRESSES,
    st.sampled_from(Direction),
    st.integers(0, 511),
    st.integers(1, 2**32 - 1),
    st.integers(0, 2**64 - 1),
)
def test_unpacked_signal_is_the_mirror_s(
    address: bytes, direction: Direction, cluster_id: int, ifindex: int, ktime: int
) -> None:
    """Every member at its place, also with the four bytes that perf appends."""
    family = 1 if len(address) == 4 else 2
    mirror = abi.IpcacheMiss(
        signal=3,
        family=family,
        direction=direction,
        cluster_id=cluster_id,
        ifindex=ifindex,
        addr=tuple(address),
        ktime_ns=ktime,
    )
    expected = abi.Signals([address], [ktime], int(direction))
    assert abi.unpack_signals([bytes(mirror) + bytes(4)]) == expected


@pytest.mark.parametrize("direction", list(Direction))
def test_small_keys_and_values_are_the_mirror_s(direction: Direction) -> None:
    """Those that are packed through the mirror itself: members in the right places."""
    assert abi.pack_policy_key(direction, 131_073) == (131_073).to_bytes(4, "little") + bytes(
        [direction, 0, 0, 0]
    )
    assert abi.pack_mesh_cidr(511) == b"\xff\x01\0\0"
