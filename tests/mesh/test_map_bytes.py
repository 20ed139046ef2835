"""What stands in the map, byte by byte, as bpftool reads it: the golden vectors of cilium-formats 1.4."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.support.lab import REMOTE_CIDRS, Lab
from tests.support.node import connect, entries, raw_entries, send_udp, wait_identity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.lab import AgentProcess


GOLDEN = [
    (
        "10.2.0.5",
        ("172.18.0.2", 0),
        "40000000 0000 00 01 0a020005 000000000000000000000000",
        "01000200 ac120002 000000000000000000000000 0000 00 02",
    ),
    (
        "fd00:10:244:1::d643",
        ("172.18.0.2", 0),
        "a0000000 0000 00 02 fd00001002440001000000000000d643",
        "01000200 ac120002 000000000000000000000000 0000 00 02",
    ),
    (
        "10.2.0.6",
        ("fc00:c111::2", 0),
        "40000000 0000 00 01 0a020006 000000000000000000000000",
        "01000200 fc00c111000000000000000000000002 0000 00 06",
    ),
    (
        "10.2.0.7",
        ("172.18.0.2", 255),
        "40000000 0000 00 01 0a020007 000000000000000000000000",
        "01000200 ac120002 000000000000000000000000 0000 ff 02",
    ),
]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab whose cluster b claims wider pod CIDRs than the lab routes."""
    with Lab(pods=1) as built:
        built.publish_node("b-1", REMOTE_CIDRS)
        built.publish_node("b-2", ("10.1.0.128/25", "fd00:10:244:1::/64"))
        yield built


@pytest.fixture(scope="module", autouse=True)
def agent(lab: Lab) -> Iterator[AgentProcess]:
    """One agent without a policy: only the map matters here."""
    running = lab.start_agent()
    yield running
    running.stop()


@pytest.mark.parametrize(("ip", "host", "key", "value"), GOLDEN)
def test_installed_bytes_equal_the_golden_vectors(
    lab: Lab, ip: str, host: tuple[str, int], key: str, value: str
) -> None:
    """Key and value are Cilium's v2 layout to the last bit."""
    host_ip, encrypt_key = host
    record = {"IP": ip, "Mask": None, "HostIP": host_ip, "ID": 131_073, "Key": encrypt_key, "Metadata": ""}
    lab.store.put_many({f"cilium/state/ip/v1/default/{ip}": json.dumps(record)})
    send_udp(lab.pods[0].namespace, ip, 1)
    wait_identity(lab, ip, 131_073)
    assert raw_entries(lab)[bytes.fromhex(key)] == bytes.fromhex(value)


@pytest.mark.parametrize("ip", ["10.1.0.164", "10.2.1.0", "10.2.254.1"])
def test_addresses_are_not_reversed(lab: Lab, ip: str) -> None:
    """The CFP's proof of concept resolved 164.0.1.10 for 10.1.0.164."""
    lab.publish(ip)
    send_udp(lab.pods[0].namespace, ip, 1)
    wait_identity(lab, ip, 131_073)
    backwards = ".".join(reversed(ip.split(".")))
    assert backwards not in entries(lab)


def test_nothing_but_single_addresses_is_installed(lab: Lab) -> None:
    """Whatever was resolved so far, every entry is a /32 or a /128 with cluster id 0."""
    lab.publish("10.2.9.9")
    assert connect(lab.pods[0].namespace, "10.2.9.9") is not None
    wait_identity(lab, "10.2.9.9", 131_073)
    for key in raw_entries(lab):
        assert int.from_bytes(key[:4], "little") == (64 if key[7] == 1 else 160)
        assert key[4:7] == bytes(3)
