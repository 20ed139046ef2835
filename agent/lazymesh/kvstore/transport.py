"""How a channel to one endpoint is made: TLS files, names, keepalive, and what grpc's defaults get wrong.

The TLS files are read here, once for each connection, so that a rotated certificate is in use from the next
one on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from lazymesh.errors import KvstoreError

if TYPE_CHECKING:
    from lazymesh.kvstore.config import Endpoint, EtcdConfig


@dataclass(frozen=True, slots=True)
class Transport:
    """How a connection behaves on the wire."""

    dial_timeout_s: float = 5.0
    """Until the first answer, login and handshake included."""
    keepalive_s: float = 15.0
    """Cilium's etcd.keepaliveHeartbeat; etcd itself refuses pings closer than 5 s."""
    keepalive_timeout_s: float = 25.0
    """Cilium's etcd.keepaliveTimeout."""
    max_message_bytes: int = 256 << 20
    """A page of 10,000 records is some 5 MB, but one etcd value alone may have 1.5 MB."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Content of the files at the moment of one connection; None for those not configured."""

    ca: bytes | None
    cert: bytes | None
    key: bytes | None = None


def read_tls_files(config: EtcdConfig) -> TlsFiles:
    """Read what the configuration names; KvstoreError (certificate) names the file that cannot be read."""
    return TlsFiles(
        *(_read(path, config.source) for path in (config.ca_file, config.cert_file, config.key_file))
    )


def open_channel(endpoint: Endpoint, tls: TlsFiles | None, transport: Transport) -> grpc.aio.Channel:
    """Return a channel that dials when first used; ``tls`` None: in the clear."""
    options = channel_options(endpoint, transport)
    if tls is None:
        return grpc.aio.insecure_channel(endpoint.target, options)
    credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.cert)
    return grpc.aio.secure_channel(endpoint.target, credentials, options)


def channel_options(endpoint: Endpoint, transport: Transport) -> list[tuple[str, Any]]:
    """Return grpc's options for a channel to this endpoint."""
    options: list[tuple[str, Any]] = [
        ("grpc.keepalive_time_ms", int(transport.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(transport.keepalive_timeout_s * 1000)),
        # etcd answers pings of a connection without calls by GOAWAY; the supervisor probes when idle.
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", transport.max_message_bytes),
        ("grpc.max_send_message_length", transport.max_message_bytes),
        # A shared subchannel would hand a new connection the old one's transport, or its back-off.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
        # Half an hour without a call must not look like a lost connection.
        ("grpc.client_idle_timeout_ms", 2**31 - 1),
    ]
    # A literal IPv6 address travels percent-encoded as authority, and no certificate contains that.
    if endpoint.address or ":" in endpoint.host:
        options.append(("grpc.ssl_target_name_override", endpoint.host))
    return options


def _read(path: str | None, source: str) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        message = f"{path}: cannot be read ({exc.strerror}); {source} names it, check the mount"
        raise KvstoreError(message, "certificate") from exc
