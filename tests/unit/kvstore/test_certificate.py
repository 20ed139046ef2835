"""Who a certificate says we are, read without any library for it."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import ssl
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from lazymesh.kvstore.certificate import (
    CertificateFacts,
    certificate_facts,
    end_of_certificate,
    handshake_failure,
)
from lazymesh.kvstore.config import parse_config
from tests.support.etcd import Authority

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_is_no_certificate(name: str, tmp_path: Path) -> None:
    """It is read at every scrape, which has to succeed whatever one cluster's file says."""
    words = f"endpoints: ['https://a:1']\ncert-file: {json.dumps(str(tmp_path / name))}\nkey-file: k\n"
    assert end_of_certificate(parse_config(words, str(tmp_path / "b"))) is None


REMOTE = b"""\
-----BEGIN CERTIFICATE-----
MIIBozCCAUmgAwIBAgIULGiJe+c6L+ZQYBEE8n5LnZKZZ78wCgYIKoZIzj0EAwIw
IDENMAsGA1UECgwEZXRjZDEPMA0GA1UEAwwGcmVtb3RlMB4XDTI2MTEyMTA2MDky
NVoXDTM2MTExODA2MDkyNVowIDENMAsGA1UECgwEZXRjZDEPMA0GA1UEAwwGcmVt
b3RlMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEn3uvS+O0w5v3pobTCVnf8zh5
HWaWLChP3T2fOaB4PS9D+uQMI1/uYC1yP+GZ47nMGc6D/yuuBuJ17+/jmnLL86Nh
MF8wHQYDVR0OBBYEFO95N+OITOp0tkrPymLt8rAkVu5FMB8GA1UdIwQYMBaAFO95
N+OITOp0tkrPymLt8rAkVu5FMA8GA1UdEwEB/wQFMAMBAf8wDAYDVR0RBAUwA4IB
eDAKBggqhkjOPQQDAgNIADBFAiEA/QlH7xKPx/N6j6HU3tMIWnwDR8vXZhTsLwVj
xqZ2k/ICIA8BEOMvSjR1OIXjZhGQrsttyMnIu9mM/C9bM7BAscul
-----END CERTIFICATE-----
"""
"""Made by openssl: O=etcd, CN=remote, self-signed."""


def test_common_name_and_end_are_read_from_the_first_certificate() -> None:
    """The common name is the etcd user; a chain behind the certificate does not matter."""
    not_after = datetime(2036, 11, 18, 6, 9, 25, tzinfo=UTC)
    assert certificate_facts(b"some words\n" + REMOTE + REMOTE) == CertificateFacts("remote", not_after)


@pytest.mark.parametrize("size", range(0, len(REMOTE) - 60, 40))
def test_broken_file_has_no_facts_and_breaks_nothing(size: int) -> None:
    """Cut anywhere, it is not worth an exception: the handshake will tell what is wrong with it."""
    cut = REMOTE[:size]
    assert certificate_facts(cut) is None
    assert certificate_facts(cut + b"\n-----END CERTIFICATE-----\n") is None


def test_file_without_certificate_has_no_facts() -> None:
    """A key in the place of a certificate, for one."""
    assert certificate_facts(b"") is None
    assert certificate_facts(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----") is None


def test_end_of_a_certificate_is_that_of_the_file_as_it_is_now(tmp_path: Path) -> None:
    """A file that is not there, or is none, has no end; nor has a store that takes everybody."""
    words = f"endpoints: ['https://x:1']\ncert-file: {tmp_path}/a.crt\nkey-file: {tmp_path}/a.key\n"
    config = parse_config(words, str(tmp_path / "b"))
    assert end_of_certificate(config) is None
    (tmp_path / "a.crt").write_bytes(REMOTE)
    assert end_of_certificate(config) == (f"{tmp_path}/a.crt", datetime(2036, 11, 18, 6, 9, 25, tzinfo=UTC))
    (tmp_path / "a.crt").write_bytes(REMOTE[:200])
    assert end_of_certificate(config) is None
    assert end_of_certificate(parse_config("endpoints: ['http://x:1']", "b")) is None


async def test_refused_certificate_leaves_no_error_that_nobody_has_fetched(tmp_path: Path) -> None:
    """Asyncio would print it with a traceback, whenever it happens to be collected in the wrong order."""
    ours, theirs = Authority(tmp_path / "ours", "ours"), Authority(tmp_path / "theirs", "theirs")
    server, client = theirs.issue("server"), ours.issue("remote")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(theirs.cert))
    context.load_cert_chain(server.cert, server.key)
    context.verify_mode = ssl.CERT_REQUIRED

    def refuse(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, pytest.raises(ssl.SSLError):
            context.wrap_socket(connection, server_side=True)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        text = (
            f"endpoints: ['https://127.0.0.1:{listening.getsockname()[1]}']\ntrusted-ca-file: {theirs.cert}\n"
            f"cert-file: {client.cert}\nkey-file: {client.key}\n"
        )
        config = parse_config(text, "file-b")
        refusing = asyncio.create_task(asyncio.to_thread(refuse, listening))
        gc.disable()
        try:
            failure = await handshake_failure(config.endpoints[0], config, timeout_s=5)
            futures = [each for each in gc.get_objects() if isinstance(each, asyncio.Future)]
        finally:
            gc.enable()
        await refusing
    assert failure is not None
    assert "the server ends the TLS handshake" in failure.reason
    ours_alone = [each for each in futures if each.get_loop() is asyncio.get_running_loop()]
    assert ours_alone
    assert [each for each in ours_alone if each.done() and each._log_traceback] == []
