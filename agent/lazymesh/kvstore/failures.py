"""Etcd's and gRPC's ways to fail, in our words: one line naming endpoint, key, who we are, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazymesh.errors import KvstoreError
from lazymesh.kvstore.channel import Code

if TYPE_CHECKING:
    from lazymesh.kvstore.channel import RpcError

_KINDS = {
    Code.DEADLINE_EXCEEDED: "timeout",
    Code.PERMISSION_DENIED: "permission",
    Code.UNAUTHENTICATED: "permission",
    Code.UNAVAILABLE: "unavailable",
    Code.CANCELLED: "unavailable",
    Code.RESOURCE_EXHAUSTED: "exhausted",
}

# These come as INVALID_ARGUMENT, which says nothing about their being a matter of who we are.
_ABOUT_US = (
    "user name is empty",
    "authentication failed",
    "authentication is not enabled",
    "revision of auth store is old",
)

_ADVICE = {
    "timeout": "it is slow or stopped; check its load",
    "permission": "grant that user's role the key, or use the certificate or user that has it",
    "unavailable": "check that it runs and is reachable from here",
    "exhausted": "look for records of a megabyte, or a server with too much to do",
    "protocol": "this is not what etcd 3.4 or later should answer; look into its log",
}


@dataclass(frozen=True, slots=True)
class Peer:
    """The two ends of a connection, for messages."""

    endpoint: str
    user: str
    """Whom etcd takes us for: user name or certificate's common name, in words."""

    def error(self, kind: str, what: str, reason: str, advice: str = "") -> KvstoreError:
        """Return the error of one failed step; ``what`` is the step, ``reason`` the peer's words."""
        line = " ".join(
            f"etcd {self.endpoint}, {self.user}: cannot {what}: {reason}; {advice or _ADVICE[kind]}".split()
        )
        return KvstoreError(line, kind)

    def translate(self, error: RpcError, what: str) -> KvstoreError:
        """Return our error for gRPC's."""
        code, details = error.code, error.details
        kind = "permission" if any(words in details for words in _ABOUT_US) else _KINDS.get(code, "protocol")
        reason = details.removeprefix("etcdserver: ") or code.name.lower().replace("_", " ")
        if "required revision has been compacted" in details:
            return self.error(kind, what, reason, "it changes faster than it is read; reading starts over")
        return self.error(kind, what, reason)


def is_stale_auth(error: RpcError) -> bool:
    """Say whether a new token (or for certificates: simply another try) may help."""
    return (error.code is Code.UNAUTHENTICATED and "invalid auth token" in error.details) or (
        error.code is Code.INVALID_ARGUMENT and "revision of auth store is old" in error.details
    )
