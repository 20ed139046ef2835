"""Facts about TLS for messages: whom a client certificate names, and why a handshake really failed.

With TLS 1.3 a server refuses a certificate after the handshake, by closing the connection, and grpc reports every
failure as UNAVAILABLE; the user needs "expired" or "wrong authority". So after a failure, and only then, one separate
handshake is run to its end. etcd maps a certificate's common name to its user, hence the small DER walk: the ssl module
decodes only certificates of peers, and a library for these two fields would cost every agent several MB.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lazymesh.kvstore.config import Endpoint, EtcdConfig

_COMMON_NAME = bytes.fromhex("0603550403")  # OBJECT IDENTIFIER 2.5.4.3
_UTC_TIME = 0x17


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """What messages say about a client certificate."""

    common_name: str
    """Also the name of the etcd user."""
    not_after: datetime


def end_of_certificate(config: EtcdConfig) -> tuple[str, datetime] | None:
    """Return the path of the current client certificate and its expiry; None if there is no readable one."""
    path = config.with_files_at_hand().cert_file
    if path is None:
        return None
    try:
        facts = certificate_facts(Path(path).read_bytes())
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None
    return None if facts is None else (path, facts.not_after)


def certificate_facts(pem: bytes) -> CertificateFacts | None:
    """Return the facts of the first certificate in a PEM file's bytes; None if it cannot be decoded."""
    try:
        end = b"-----END CERTIFICATE-----"
        first = pem[pem.index(b"-----BEGIN") : pem.index(end)] + end
        der = ssl.PEM_cert_to_DER_cert(first.decode("ascii"))
        to_be_signed = _elements(_elements(der)[0][1])[0][1]
        fields = _elements(to_be_signed)
        # version [0] is optional; then serial, algorithm, issuer, validity, subject.
        _, _, _, validity, subject = fields[1:6] if fields[0][0] == 0xA0 else fields[:5]
        return CertificateFacts(_common_name(subject[1]), _time(*_elements(validity[1])[1]))
    except (ValueError, IndexError):
        return None


def _elements(der: bytes) -> list[tuple[int, bytes]]:
    """Split the content of a constructed DER element into (tag, content)."""
    found, at = [], 0
    while at < len(der):
        tag, length, at = der[at], der[at + 1], at + 2
        if length & 0x80:
            octets = length & 0x7F
            length = int.from_bytes(der[at : at + octets], "big")
            at += octets
        if at + length > len(der):
            raise ValueError("truncated")
        found.append((tag, der[at : at + length]))
        at += length
    return found


def _common_name(subject: bytes) -> str:
    at = subject.rindex(_COMMON_NAME) + len(_COMMON_NAME)
    return _elements(subject[at : at + 2 + subject[at + 1]])[0][1].decode("utf-8")


def _time(tag: int, content: bytes) -> datetime:
    layout = "%y%m%d%H%M%SZ" if tag == _UTC_TIME else "%Y%m%d%H%M%SZ"
    return datetime.strptime(content.decode("ascii"), layout).replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class HandshakeFailure:
    """Why there is no TLS connection, and what to do about it: a few words each."""

    reason: str
    advice: str


async def handshake_failure(
    endpoint: Endpoint, config: EtcdConfig, timeout_s: float
) -> HandshakeFailure | None:
    """Run one handshake and return why it fails; None when TLS is not the problem."""
    config = config.with_files_at_hand()
    try:
        context = client_context(config)
    except (OSError, ssl.SSLError) as exc:
        reason = f"the TLS files do not match ({_words(exc)})"
        return HandshakeFailure(reason, f"check those named in {config.source}")
    try:
        async with asyncio.timeout(timeout_s):
            return await _handshake(endpoint, context, config)
    except (OSError, TimeoutError):
        return None


def client_context(config: EtcdConfig) -> ssl.SSLContext:
    """Return a TLS context made from the current files; OSError, of which ssl.SSLError is one, if they do not match."""
    config = config.with_files_at_hand()
    context = ssl.create_default_context(cafile=config.ca_file)
    # Go's servers and Cilium's certificates do not meet the strict rules.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    # Sending must never have to wait for receiving; HTTP/2 forbids renegotiation anyway (RFC 9113).
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["h2"])
    if config.cert_file:
        # Without this argument OpenSSL would ask for the password of an encrypted key at the terminal.
        context.load_cert_chain(config.cert_file, config.key_file, password="")
    return context


async def _handshake(
    endpoint: Endpoint, context: ssl.SSLContext, config: EtcdConfig
) -> HandshakeFailure | None:
    writer = None
    try:
        reader, writer = await asyncio.open_connection(
            endpoint.dial_host, endpoint.port, ssl=context, server_hostname=endpoint.host
        )
        # With TLS 1.3 the refusal of our certificate arrives only after our side of the handshake is done.
        await reader.read(1)
    except ssl.SSLCertVerificationError as exc:
        reason = f"the server's certificate is refused: {exc.verify_message.rstrip('.')}"
        return HandshakeFailure(reason, f"check it against {config.ca_file or 'trusted-ca-file'}")
    except ssl.SSLError as exc:
        ours = f"client certificate {config.cert_file}" if config.cert_file else "missing cert-file"
        reason = f"the server ends the TLS handshake: {_words(exc)}"
        return HandshakeFailure(reason, f"check the {ours} in {config.source}")
    except ConnectionResetError:
        # A server without TLS may hang up before its answer, which says so, has arrived.
        if writer is not None:
            raise
        reason = "the server hangs up in the TLS handshake"
        return HandshakeFailure(reason, f"does it expect http? check the endpoints in {config.source}")
    finally:
        if writer is not None:
            writer.transport.abort()  # a clean shutdown would have to be awaited
            # asyncio complains about an error that was never retrieved.
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    return None


def _words(exc: OSError) -> str:
    reason = getattr(exc, "reason", None) or exc.strerror or str(exc)
    return str(reason).replace("_", " ").lower()
