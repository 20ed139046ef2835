"""Etcd's and grpc's ways to fail, in our words: one line naming endpoint, key, who we are, and what to do."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from lazymesh.errors import KvstoreError

_KINDS = {
    grpc.StatusCode.DEADLINE_EXCEEDED: "timeout",
    grpc.StatusCode.PERMISSION_DENIED: "permission",
    grpc.StatusCode.UNAUTHENTICATED: "permission",
    grpc.StatusCode.UNAVAILABLE: "unavailable",
    grpc.StatusCode.CANCELLED: "unavailable",
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

    def translate(self, error: grpc.RpcError, what: str) -> KvstoreError:
        """Return our error for grpc's."""
        code, details = status_of(error)
        kind = "permission" if any(words in details for words in _ABOUT_US) else _KINDS.get(code, "protocol")
        reason = details.removeprefix("etcdserver: ") or code.name.lower().replace("_", " ")
        if "required revision has been compacted" in details:
            return self.error(kind, what, reason, "it changes faster than it is read; reading starts over")
        return self.error(kind, what, reason)


def status_of(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """Return code and details; grpc.aio's only concrete error has both, its base class declares neither."""
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code(), error.details() or ""
    return grpc.StatusCode.UNKNOWN, str(error)


def is_stale_auth(error: grpc.RpcError) -> bool:
    """Say whether a new token (or for certificates: simply another try) may help."""
    code, details = status_of(error)
    return (code is grpc.StatusCode.UNAUTHENTICATED and "invalid auth token" in details) or (
        code is grpc.StatusCode.INVALID_ARGUMENT and "revision of auth store is old" in details
    )
