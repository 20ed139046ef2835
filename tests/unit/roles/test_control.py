"""The control socket, over a real one in a temporary directory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest

from lazymesh.errors import DatapathError, LazymeshError
from lazymesh.roles import control
from lazymesh.roles.control import ControlServer, ask
from tests.support.etcd import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


LONG = 32 << 20
"""More than a socket's buffers hold."""


def _refuse(_request: dict[str, Any]) -> dict[str, Any]:
    raise DatapathError("cannot read the map: no memory")


MANY = {
    "none": [],
    "many": [{"n": number, "word": 'ä"\udcff'} for number in range(20_000)],
    "ö": {"a": [None]},
}


async def _take_time(request: dict[str, Any]) -> dict[str, Any]:
    await asyncio.sleep(0)
    return {} if request.get("few") else MANY


class Served:
    """A server, and what it reported."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.streaming: list[bool] = []
        answers = {
            "status": lambda _: {"ready": True},
            "loud": lambda request: {"word": request["word"].upper()},
            "broken": _refuse,
            "long": lambda _: {"word": "x" * LONG},
            "many": _take_time,
        }
        self.server = ControlServer(path, answers, self.streaming.append)

    async def open(self, words: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect and send bytes."""
        reader, writer = await asyncio.open_unix_connection(self.path)
        writer.write(words)
        return reader, writer


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """A running server."""
    served = Served(tmp_path / "run/agent.sock")
    await served.server.start()
    yield served
    await served.server.close()
    assert not served.path.exists()


async def line(reader: asyncio.StreamReader) -> Any:
    """Return the next object."""
    return json.loads(await asyncio.wait_for(reader.readline(), 5))


async def test_status_is_answered(served: Served) -> None:
    """And only root may ask."""
    answers = await asyncio.to_thread(lambda: list(ask(served.path, "status")))
    assert answers == [{"ready": True}]
    assert served.path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "words", [b"\n", b"{}\n", b"[]\n", b"7\n", b"\xff\n", b'{"ask": null}\n', b"[" * 70_000]
)
async def test_nonsense_is_answered_as_such(served: Served, words: bytes) -> None:
    """The server goes on."""
    reader, writer = await served.open(words)
    assert "error" in await line(reader)
    writer.close()


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"ask": "loud"}, "the arguments of loud make no sense: 'word'"),
        (
            {"ask": "loud", "word": None},
            "the arguments of loud make no sense: 'NoneType' object has no attribute 'upper'",
        ),
        (
            {"ask": "loud", "word": 5},
            "the arguments of loud make no sense: 'int' object has no attribute 'upper'",
        ),
        ({"ask": "broken"}, "cannot read the map: no memory"),
    ],
)
async def test_why_there_is_no_answer_is_the_answer(
    served: Served, request_: dict[str, Any], error: str
) -> None:
    """And the command ends with it."""
    reader, writer = await served.open(json.dumps(request_).encode() + b"\n")
    assert await line(reader) == {"error": error}
    writer.close()
    what = request_.pop("ask")
    with pytest.raises(LazymeshError) as caught:
        await asyncio.to_thread(lambda: list(ask(served.path, what, **request_)))
    assert str(caught.value) == error


async def test_answer_of_thousands_leaves_others_half_of_the_time(served: Served) -> None:
    """Nothing is held any more when the agent has shown no sign of life for a tenth of a second."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.0001)
            turns += 1

    waiting = asyncio.create_task(other())
    encoded = await control._encode(MANY)
    waiting.cancel()
    assert json.loads(encoded) == MANY
    assert turns >= 3
    assert await asyncio.to_thread(lambda: list(ask(served.path, "many"))) == [MANY]
    assert await asyncio.to_thread(lambda: list(ask(served.path, "many", few=True))) == [{}]


@pytest.mark.parametrize("words", [b"", b'{"ask": "status"'])
async def test_who_does_not_finish_asking_is_hung_up_on(
    served: Served, monkeypatch: pytest.MonkeyPatch, words: bytes
) -> None:
    """It would keep a descriptor for as long as it likes."""
    monkeypatch.setattr(control, "LIMIT_S", 0.1)
    reader, writer = await served.open(words)
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()


async def test_who_does_not_take_the_answer_is_hung_up_on(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends in the middle; before, it stayed in our memory."""
    monkeypatch.setattr(control, "LIMIT_S", 0.5)
    reader, writer = await served.open(b'{"ask": "long"}\n')
    assert await asyncio.wait_for(reader.readexactly(10), 10) == b'{"word": "'
    await asyncio.sleep(1)
    with contextlib.suppress(ConnectionError):
        assert len(await asyncio.wait_for(reader.read(), 10)) < LONG
    writer.close()


async def test_what_a_follower_of_the_stream_says_is_not_kept(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is only listened to so that its leaving is heard; and the limit is not for it."""
    monkeypatch.setattr(control, "LIMIT_S", 1.0)
    tracemalloc.start()
    try:
        reader, writer = await served.open(b'{"ask": "misses"}\n')
        assert await line(reader) == {"streaming": "misses"}
        for _ in range(64):
            writer.write(b"x" * (1 << 20))
            await writer.drain()
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    await asyncio.sleep(1.1)
    served.server.publish({"address": "10.2.0.5"})
    assert await line(reader) == {"address": "10.2.0.5"}
    writer.close()
    await eventually(lambda: served.streaming[-1:] == [False])


async def test_stream_is_shared_and_told_when_somebody_listens(served: Served) -> None:
    """Lines go to all who listen; the last to leave switches it off."""
    one, one_writer = await served.open(b'{"ask": "misses"}\n')
    assert await line(one) == {"streaming": "misses"}
    two, two_writer = await served.open(b'{"ask": "misses"}\n')
    assert await line(two) == {"streaming": "misses"}
    served.server.publish({"address": "10.2.0.5"})
    assert await line(one) == await line(two) == {"address": "10.2.0.5"}
    one_writer.close()
    two_writer.close()
    await eventually(lambda: served.streaming[-1:] == [False])
    assert served.streaming == [True, True, False]


async def test_stream_that_began_before_there_were_misses_goes_on(served: Served) -> None:
    """An agent answers people while it waits for Cilium; what it is asked from then on, its parts answer."""
    reader, writer = await served.open(b'{"ask": "misses"}\n')
    assert await line(reader) == {"streaming": "misses"}
    told: list[bool] = []
    served.server.use({"status": lambda _: {"ready": False}}, told.append)
    assert told == [True]
    assert await asyncio.to_thread(lambda: list(ask(served.path, "status"))) == [{"ready": False}]
    served.server.publish({"address": "10.2.0.5"})
    assert await line(reader) == {"address": "10.2.0.5"}
    writer.close()
    await eventually(lambda: told == [True, False])
    assert served.streaming == [True]


async def test_nobody_who_streams_no_misses_has_them_switched_on(served: Served) -> None:
    """They cost each miss a line."""
    told: list[bool] = []
    served.server.use({}, told.append)
    assert told == []


async def test_refusal_of_the_agent_is_an_error_in_its_own_words(served: Served) -> None:
    """The command was well formed."""
    words = "in shadow mode missed packets are always passed on"
    served.server.use({"on-miss": lambda _: {"error": words}}, served.streaming.append)
    with pytest.raises(LazymeshError, match=words) as refusal:
        await asyncio.to_thread(lambda: list(ask(served.path, "on-miss")))
    assert refusal.value.exit_code == 3


async def test_reader_that_is_too_slow_loses_lines_and_they_are_counted(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent's memory is worth more than the newest line."""
    monkeypatch.setattr(control, "STREAM_BACKLOG", 2)
    reader, writer = await served.open(b'{"ask": "misses"}\n')
    await line(reader)
    for number in range(10):
        served.server.publish({"n": number})
    assert served.server.dropped >= 7
    writer.close()


async def test_second_server_is_refused_and_a_dead_ones_socket_is_taken_over(served: Served) -> None:
    """Somebody who answers keeps it; a file that nobody listens on is in nobody's way."""
    with pytest.raises(LazymeshError, match="another agent listens"):
        await ControlServer(served.path, {}).start()
    stale = served.path.parent / "stale.sock"
    first = ControlServer(stale, {})
    await first.start()
    assert first._server is not None
    first._server.close()
    second = ControlServer(stale, {})
    await second.start()
    await second.close()


async def test_what_is_no_socket_is_not_replaced(tmp_path: Path) -> None:
    """A file that somebody named by mistake is what it was, also after the agent has stopped."""
    file = tmp_path / "precious"
    file.write_text("data")
    server = ControlServer(file, {})
    with pytest.raises(LazymeshError, match="it is not a socket; remove it, or choose another --socket"):
        await server.start()
    await server.close()
    assert file.read_text() == "data"


def test_nobody_answers(tmp_path: Path) -> None:
    """A line for each way to be absent."""
    for path in (tmp_path / "none", tmp_path / ("x" * 200), tmp_path):
        with pytest.raises(LazymeshError, match="no agent answers"):
            list(ask(path, "status"))


async def test_agent_that_leaves_without_an_answer(tmp_path: Path) -> None:
    """It was about to stop: a line for every command, no traceback."""

    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.close()

    path = tmp_path / "agent.sock"
    async with await asyncio.start_unix_server(leave, path):
        with pytest.raises(LazymeshError, match="without an answer"):
            await asyncio.to_thread(lambda: next(ask(path, "audit", since=60)))


@pytest.mark.parametrize("waiting", [0, 1], ids=["first in the queue", "the queue is full"])
def test_agent_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: int
) -> None:
    """The kernel takes the connection and the question; somebody who looks whether all is well wants to know."""
    monkeypatch.setattr(control, "LIMIT_S", 0.1)
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as agent, contextlib.ExitStack() as others:
        agent.bind(str(path))
        agent.listen(0)
        for _ in range(waiting):
            others.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))
        with pytest.raises(LazymeshError, match=r"agent\.sock does not answer: it hangs") as caught:
            list(ask(path, "status"))
        assert caught.value.exit_code == 3


async def test_stream_that_has_begun_is_waited_for(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next line comes with the next miss, and that may be tomorrow."""
    monkeypatch.setattr(control, "LIMIT_S", 1.0)
    lines = ask(served.path, "misses")
    assert await asyncio.to_thread(next, lines) == {"streaming": "misses"}
    waiting = asyncio.create_task(asyncio.to_thread(next, lines))
    await asyncio.sleep(1.3)
    served.server.publish({"address": "10.2.0.5"})
    assert await waiting == {"address": "10.2.0.5"}
    lines.close()
