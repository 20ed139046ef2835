"""How a connection behaves on the wire: its transport, its TLS files, its timeouts.

The TLS files are read once for each connection, so a rotated certificate is used from the next connection on.
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
    """Until the first answer, including login and handshake."""
    keepalive_s: float = 15.0
    """Cilium's etcd.keepaliveHeartbeat; etcd itself refuses pings closer than 5 s. (grpcio only: natively the
    supervisor's probes are enough.)"""
    keepalive_timeout_s: float = 25.0
    """Cilium's etcd.keepaliveTimeout."""
    max_message_bytes: int = 4 << 20
    """A page of 1,000 records is about 500 KB, but a single etcd value may have 1.5 MB. While a message is decoded, the
    agent holds several times its length."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Content of the files when a connection is made; None for those not configured."""

    ca: bytes | None
    cert: bytes | None
    key: bytes | None = None


def read_tls_files(config: EtcdConfig) -> TlsFiles:
    """Read the configured files; KvstoreError (certificate) names the one that cannot be read."""
    named = config.with_files_at_hand()
    return TlsFiles(
        *(_read(path, config.source) for path in (named.ca_file, named.cert_file, named.key_file))
    )


def _read(path: str | None, source: str) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc  # ValueError: a NUL in the name
        message = f"{path}: cannot be read ({reason}); it is named in {source}, check the mount"
        raise KvstoreError(message, "certificate") from exc
