"""Which servers' reports on all watches may move them along, and servers that end every stream at once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import pytest

from lazymesh.errors import KvstoreError
from lazymesh.kvstore import etcd_pb2 as pb
from lazymesh.kvstore.hub import WatchHub, reports_are_ordered
from lazymesh.kvstore.supervisor import Options

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


@pytest.mark.parametrize(
    ("version", "ordered"),
    [
        ("3.4.23", False),
        ("3.4.25", True),
        ("3.5.0", False),
        ("3.5.7", False),
        ("3.5.8", True),
        ("3.5.21", True),
        ("3.6.0-rc.1", True),
        ("", False),
    ],
)
def test_report_on_all_watches_is_believed_from_the_fixed_versions_on(version: str, ordered: bool) -> None:
    """Before, it overtakes events (etcd issue 15220)."""
    assert reports_are_ordered(version) is ordered


class Refusing:
    """A connection on which a stream ends as soon as it is opened: with an error, or by a refusal of the token."""

    version, login, login_at = "3.4.23", (), None

    def __init__(self, *, fails: bool) -> None:
        self.fails = fails
        self.streams = 0
        self.peer: Any = None

    async def stream(self, _method: object, _requests: object, _what: object) -> AsyncGenerator[Any, None]:
        """End it."""
        self.streams += 1
        if self.fails:
            raise KvstoreError("it leaves")
        yield pb.WatchResponse(watch_id=1, created=True, canceled=True, cancel_reason="invalid auth token")

    async def renew_login(self, _login: object) -> None:
        """Get a token that is no better."""

    def fail(self, error: KvstoreError) -> None:
        """Be down already."""


@pytest.mark.parametrize("fails", [True, False], ids=["error", "refusal"])
async def test_server_that_ends_each_stream_at_once_is_not_asked_without_end(fails: bool) -> None:
    """The event loop would belong to that one store, or half a processor."""
    connection = Refusing(fails=fails)

    class Supervisor:
        listeners: list[object] = []  # noqa: RUF012 (a stand-in)

        async def wait_connected(self) -> Refusing:
            return connection

    hub = WatchHub(cast("Any", Supervisor()), Options(dice=lambda: 1.0))
    hub.add(b"a", cast("Any", None), 5)
    running = asyncio.create_task(hub.run())
    await asyncio.sleep(0.9)
    assert not running.done()
    assert 2 <= connection.streams <= 3, "the second comes after 0.25 s, the third after half a second more"
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
