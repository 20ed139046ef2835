"""How a connection behaves on the wire: over which transport, with which TLS files, how patient.

The TLS files are read once for each connection, so that a rotated certificate is in use from the next one on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lazymesh.errors import KvstoreError

if TYPE_CHECKING:
    from lazymesh.kvstore.config import EtcdConfig

KINDS = ("native", "grpcio")


@dataclass(frozen=True, slots=True)
class Transport:
    """How a connection behaves on the wire."""

    kind: str = "native"
    """native or grpcio."""
    dial_timeout_s: float = 5.0
    """Until the first answer, login and handshake included."""
    keepalive_s: float = 15.0
    """Cilium's etcd.keepaliveHeartbeat; etcd itself refuses pings closer than 5 s. (grpcio; natively the supervisor's
    questions are enough.)"""
    keepalive_timeout_s: float = 25.0
    """Cilium's etcd.keepaliveTimeout."""
    max_message_bytes: int = 4 << 20
    """A page of 1,000 records is some 500 KB, but one etcd value alone may have 1.5 MB. While one is taken apart, the
    agent holds several times as much as it is long."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Content of the files at the moment of one connection; None for those not configured."""

    ca: bytes | None
    cert: bytes | None
    key: bytes | None = None


def read_tls_files(config: EtcdConfig) -> TlsFiles:
    """Read what the configuration names; KvstoreError (certificate) names the file that cannot be read."""
    named = config.with_files_at_hand()
    return TlsFiles(
        *(_read(path, config.source) for path in (named.ca_file, named.cert_file, named.key_file))
    )


def _read(path: str | None, source: str) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        message = f"{path}: cannot be read ({exc.strerror}); {source} names it, check the mount"
        raise KvstoreError(message, "certificate") from exc
