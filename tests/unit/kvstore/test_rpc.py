"""The feed of a stream: in order, and over when it is closed."""

from __future__ import annotations

from lazymesh.kvstore.rpc import RANGE, Outbox


async def test_outbox_gives_its_requests_in_order_and_ends_when_closed() -> None:
    """What was put in before closing is still sent."""
    outbox = Outbox("first")
    outbox.put("second")
    outbox.close()
    assert [request async for request in outbox] == ["first", "second"]


def test_methods_are_named_as_etcd_names_them() -> None:
    """The path carries etcd's package, whatever our messages' package is called."""
    assert RANGE.path == "/etcdserverpb.KV/Range"
