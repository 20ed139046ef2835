"""What a person reads when etcd refuses: one line, the right kind, names and advice."""

from __future__ import annotations

import pytest

from lazymesh.kvstore.channel import Code, RpcError
from lazymesh.kvstore.failures import Peer, is_stale_auth

PEER = Peer("https://b:2379", "user 'remote' (the certificate's common name)")


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        (Code.PERMISSION_DENIED, "etcdserver: permission denied", "permission"),
        (Code.INVALID_ARGUMENT, "etcdserver: user name is empty", "permission"),
        (
            Code.INVALID_ARGUMENT,
            "etcdserver: authentication failed, invalid user ID",
            "permission",
        ),
        (Code.UNAUTHENTICATED, "etcdserver: invalid auth token", "permission"),
        (Code.DEADLINE_EXCEEDED, "Deadline Exceeded", "timeout"),
        (Code.UNKNOWN, "context deadline exceeded", "timeout"),
        (Code.UNAVAILABLE, "failed to connect\nto all addresses", "unavailable"),
        (Code.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted", "protocol"),
        (Code.INTERNAL, "", "protocol"),
    ],
)
def test_status_becomes_a_kind_and_one_line(code: Code, details: str, kind: str) -> None:
    """The line names the endpoint, who we are, and what could not be done."""
    error = PEER.translate(RpcError(code, details), "read cilium/cache/x")
    assert error.kind == kind
    line = str(error)
    assert line.startswith("etcd https://b:2379, user 'remote'")
    assert "cannot read cilium/cache/x: " in line
    assert "\n" not in line
    assert "etcdserver: " not in line


def test_only_tokens_and_changed_roles_are_worth_another_login() -> None:
    """A wrong password is not: asking again would only fill etcd's log."""
    assert is_stale_auth(RpcError(Code.UNAUTHENTICATED, "etcdserver: invalid auth token"))
    stale = "etcdserver: revision of auth store is old"
    assert is_stale_auth(RpcError(Code.INVALID_ARGUMENT, stale))
    wrong = "etcdserver: authentication failed, invalid user ID or password"
    assert not is_stale_auth(RpcError(Code.INVALID_ARGUMENT, wrong))
    assert not is_stale_auth(RpcError(Code.PERMISSION_DENIED, "etcdserver: permission denied"))
