"""What grpcio's channel is made with: the name that the server must prove, patience, sizes."""

from __future__ import annotations

import pytest

from lazymesh.kvstore.config import Endpoint
from lazymesh.kvstore.grpcio import channel_options
from lazymesh.kvstore.transport import Transport


@pytest.mark.parametrize(
    ("endpoint", "name"),
    [
        (Endpoint("https", "b.mesh.cilium.io", 1, "192.0.2.7"), "b.mesh.cilium.io"),
        (Endpoint("https", "fd00::1", 1), "fd00::1"),
        (Endpoint("https", "b.mesh.cilium.io", 1), None),
    ],
    ids=["aliased", "IPv6 literal", "plain name"],
)
def test_server_must_prove_the_configured_host(endpoint: Endpoint, name: str | None) -> None:
    """Where something else is dialled, or grpc would ask for an escaped address, the name is given."""
    assert dict(channel_options(endpoint, Transport())).get("grpc.ssl_target_name_override") == name


def test_keepalive_and_message_size_are_what_was_asked_for() -> None:
    """Cilium's 15 s and 25 s are the defaults; a page of a big mesh fits."""
    options = dict(channel_options(Endpoint("http", "a", 1), Transport()))
    assert options["grpc.keepalive_time_ms"] == 15_000
    assert options["grpc.keepalive_timeout_ms"] == 25_000
    assert options["grpc.max_receive_message_length"] >= 4 << 20
