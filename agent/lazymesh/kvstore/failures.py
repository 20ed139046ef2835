"""Errors of etcd and gRPC as one line: endpoint, user, what failed, why, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazymesh.errors import KvstoreError
from lazymesh.kvstore.channel import Code

if TYPE_CHECKING:
    from lazymesh.errors import KvstoreErrorKind
    from lazymesh.kvstore.channel import RpcError

_KINDS: dict[Code, KvstoreErrorKind] = {
    Code.DEADLINE_EXCEEDED: "timeout",
    Code.PERMISSION_DENIED: "permission",
    Code.UNAUTHENTICATED: "permission",
    Code.UNAVAILABLE: "unavailable",
    Code.CANCELLED: "unavailable",
    Code.RESOURCE_EXHAUSTED: "exhausted",
}

# These arrive as INVALID_ARGUMENT, although they are about our credentials.
_ABOUT_US = (
    "user name is empty",
    "authentication failed",
    "authentication is not enabled",
    "revision of auth store is old",
)

_ADVICE: dict[KvstoreErrorKind, str] = {
    "timeout": "it is slow or stopped; check its load",
    "permission": "grant that user's role the key, or use a certificate or user that may read it",
    "unavailable": "check that it runs and is reachable from here",
    "exhausted": "look for records of a megabyte, or an overloaded server",
    "protocol": "etcd 3.4 or later should not answer like this; check its log",
}


@dataclass(frozen=True, slots=True)
class Peer:
    """The two ends of a connection, for messages."""

    endpoint: str
    user: str
    """As whom we are known to etcd: the user name or the certificate's common name, in words."""

    def error(self, kind: KvstoreErrorKind, what: str, reason: str, advice: str = "") -> KvstoreError:
        """Return the error of one failed step: ``what`` is the step, ``reason`` is why, in the peer's words."""
        line = " ".join(
            f"etcd {self.endpoint}, {self.user}: cannot {what}: {reason}; {advice or _ADVICE[kind]}".split()
        )
        return KvstoreError(line, kind)

    def translate(self, error: RpcError, what: str) -> KvstoreError:
        """Translate gRPC's error."""
        code, details = error.code, error.details
        kind = _KINDS.get(code, "protocol")
        if any(words in details for words in _ABOUT_US):
            kind = "permission"
        if kind == "protocol" and "context deadline exceeded" in details:
            kind = "timeout"  # how a member without a leader says it
        reason = details.removeprefix("etcdserver: ") or code.name.lower().replace("_", " ")
        if "required revision has been compacted" in details:
            return self.error(
                kind, what, reason, "it changes faster than it can be read; reading starts over"
            )
        return self.error(kind, what, reason)


def is_stale_auth(error: RpcError) -> bool:
    """Return whether a new token (or with certificates just another attempt) may help."""
    return (error.code is Code.UNAUTHENTICATED and "invalid auth token" in error.details) or (
        error.code is Code.INVALID_ARGUMENT and "revision of auth store is old" in error.details
    )
