"""What a person reads when etcd refuses: one line, the right kind, names and advice."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest

from lazymesh.kvstore.failures import Peer, is_stale_auth

PEER = Peer("https://b:2379", "user 'remote' (the certificate's common name)")


def failure(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    """Return the error that grpc.aio raises for this status."""
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        (grpc.StatusCode.PERMISSION_DENIED, "etcdserver: permission denied", "permission"),
        (grpc.StatusCode.INVALID_ARGUMENT, "etcdserver: user name is empty", "permission"),
        (
            grpc.StatusCode.INVALID_ARGUMENT,
            "etcdserver: authentication failed, invalid user ID",
            "permission",
        ),
        (grpc.StatusCode.UNAUTHENTICATED, "etcdserver: invalid auth token", "permission"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", "timeout"),
        (grpc.StatusCode.UNAVAILABLE, "failed to connect\nto all addresses", "unavailable"),
        (grpc.StatusCode.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted", "protocol"),
        (grpc.StatusCode.INTERNAL, "", "protocol"),
    ],
)
def test_status_becomes_a_kind_and_one_line(code: grpc.StatusCode, details: str, kind: str) -> None:
    """The line names the endpoint, who we are, and what could not be done."""
    error = PEER.translate(failure(code, details), "read cilium/cache/x")
    assert error.kind == kind
    line = str(error)
    assert line.startswith("etcd https://b:2379, user 'remote'")
    assert "cannot read cilium/cache/x: " in line
    assert "\n" not in line
    assert "etcdserver: " not in line


def test_only_tokens_and_changed_roles_are_worth_another_login() -> None:
    """A wrong password is not: asking again would only fill etcd's log."""
    assert is_stale_auth(failure(grpc.StatusCode.UNAUTHENTICATED, "etcdserver: invalid auth token"))
    stale = "etcdserver: revision of auth store is old"
    assert is_stale_auth(failure(grpc.StatusCode.INVALID_ARGUMENT, stale))
    wrong = "etcdserver: authentication failed, invalid user ID or password"
    assert not is_stale_auth(failure(grpc.StatusCode.INVALID_ARGUMENT, wrong))
    assert not is_stale_auth(failure(grpc.StatusCode.PERMISSION_DENIED, "etcdserver: permission denied"))
