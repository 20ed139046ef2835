"""What a channel is made with: TLS files as they are now, and the name that the server must prove."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lazymesh.errors import KvstoreError
from lazymesh.kvstore.config import Endpoint, EtcdConfig
from lazymesh.kvstore.transport import Transport, channel_options, read_tls_files

if TYPE_CHECKING:
    from pathlib import Path


def test_tls_files_are_read_anew_each_time(tmp_path: Path) -> None:
    """A certificate rotated on disk is the next connection's."""
    path = tmp_path / "tls.crt"
    config = EtcdConfig((Endpoint("https", "a", 1),), cert_file=str(path))
    path.write_bytes(b"old")
    assert read_tls_files(config).cert == b"old"
    path.write_bytes(b"new")
    assert read_tls_files(config).cert == b"new"
    assert read_tls_files(config).ca is None


def test_missing_tls_file_is_named_with_the_file_that_names_it() -> None:
    """The kind is certificate: nothing is wrong with the network."""
    config = EtcdConfig((Endpoint("https", "a", 1),), ca_file="/nonexistent/ca.crt", source="/etc/mesh/b")
    with pytest.raises(
        KvstoreError, match=r"^/nonexistent/ca.crt: cannot be read .*; /etc/mesh/b names it"
    ) as caught:
        read_tls_files(config)
    assert caught.value.kind == "certificate"


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
    assert options["grpc.max_receive_message_length"] >= 64 << 20
