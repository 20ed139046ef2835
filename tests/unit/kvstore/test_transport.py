"""What a channel is made with: TLS files as they are now, and one of two carriers."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from lazymesh.errors import KvstoreError
from lazymesh.kvstore.config import Endpoint, EtcdConfig, parse_config
from lazymesh.kvstore.connection import make_channel
from lazymesh.kvstore.transport import Transport, read_tls_files

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


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "file/below"])
def test_a_name_that_no_file_can_have_is_told_as_one_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    """Not by whatever Python raises for it."""
    (tmp_path / "file").touch()
    config = EtcdConfig(
        (Endpoint("https", "a", 1),), cert_file=str(tmp_path / name), source=str(tmp_path / "b")
    )
    with pytest.raises(KvstoreError, match="cannot be read"):
        read_tls_files(config)


def test_missing_tls_file_is_named_with_the_file_that_names_it() -> None:
    """The kind is certificate: nothing is wrong with the network."""
    config = EtcdConfig((Endpoint("https", "a", 1),), ca_file="/nonexistent/ca.crt", source="/etc/mesh/b")
    with pytest.raises(
        KvstoreError, match=r"^/nonexistent/ca.crt: cannot be read .*; it is named in /etc/mesh/b"
    ) as caught:
        read_tls_files(config)
    assert caught.value.kind == "certificate"


@pytest.mark.parametrize(("kind", "made"), [("native", "NativeChannel"), ("grpcio", "GrpcioChannel")])
async def test_the_user_says_what_carries_the_calls(kind: str, made: str) -> None:
    """Both are channels; grpc itself is imported by one of them only."""
    config = parse_config("endpoints: ['http://127.0.0.1:1']", "test")
    channel = make_channel(config.endpoints[0], config, None, Transport(kind=kind))
    assert type(channel).__name__ == made
    await channel.close()


def test_the_native_channel_needs_no_grpcio() -> None:
    """It costs 20 MB, and threads."""
    code = "import sys, lazymesh.kvstore.client; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
