"""The agent's control socket: one JSON object asks, one answers; a stream sends one per line until either side leaves.

Requests: ``{"ask": "misses"}`` for the stream, otherwise one of the agent's answers (``status``, ``audit``,
``on-miss``), with arguments beside it. Only root can open the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from lazymesh.errors import LazymeshError
from lazymesh.tasks import FairShare

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

Answer = Callable[[dict[str, Any]], dict[str, Any] | Awaitable[dict[str, Any]]]
"""Takes the request and returns the object to send; an object that takes long to make is awaited."""

LIMIT_S = 10.0
"""How long each side waits for the other: a command for its answer, the agent for the request and the answer taken."""
STREAM_BACKLOG = 10_000
"""Lines kept for a reader that is slower than the misses; beyond that the newest are dropped and counted."""


class ControlServer:
    """Serves the agent's answers and the stream of misses."""

    def __init__(
        self,
        path: Path,
        answers: Mapping[str, Answer],
        streaming: Callable[[bool], None] = lambda _on: None,
    ) -> None:
        """Streaming: called with True when the first reader of misses arrives, with False when the last one left."""
        self._path = path
        self._answers = answers
        self._streaming = streaming
        self._streams: set[asyncio.Queue[str]] = set()
        self._server: asyncio.Server | None = None
        self.dropped = 0
        """Lines of the stream that slow readers never got."""

    async def start(self) -> None:
        """Listen; LazymeshError if another agent does already, or the path cannot be used."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if await self._is_taken():
                raise LazymeshError(
                    f"another agent listens on {self._path}: stop it, or choose another --socket"
                )
            if self._path.exists() and not self._path.is_socket():
                raise LazymeshError(
                    f"cannot listen on {self._path}: it is not a socket; remove it, or choose another --socket"
                )
            # The socket that a dead agent left is replaced: asyncio does that.
            self._server = await asyncio.start_unix_server(self._serve, self._path)
            self._path.chmod(0o600)
        except OSError as exc:
            raise LazymeshError(
                f"cannot listen on {self._path}: {exc.strerror or exc}; choose another --socket"
            ) from exc

    async def close(self) -> None:
        """Stop listening and remove the socket."""
        if self._server is not None:
            self._server.close()
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()

    def use(self, answers: Mapping[str, Answer], streaming: Callable[[bool], None]) -> None:
        """Answer with these from now on; streams of misses that are open continue."""
        self._answers, self._streaming = answers, streaming
        if self._streams:
            streaming(True)

    def publish(self, line: dict[str, Any]) -> None:
        """Send one object to every reader of misses."""
        text = json.dumps(line)
        for queue in self._streams:
            try:
                queue.put_nowait(text)
            except asyncio.QueueFull:
                self.dropped += 1

    async def _is_taken(self) -> bool:
        try:
            _, writer = await asyncio.open_unix_connection(self._path)
        except OSError:
            return False
        writer.close()
        return True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Then what is drained has been handed to the kernel, and closing waits for no reader.
        writer.transport.set_write_buffer_limits(0)
        try:
            async with asyncio.timeout(LIMIT_S) as limit:
                request = await read_request(reader)
                if request is not None and request.get("ask") == "misses":
                    limit.reschedule(None)
                    await self._stream(reader, writer)
                elif request is not None:
                    writer.write(await _encode(await self._answer(request)))
                    await writer.drain()
        except (ConnectionError, TimeoutError):
            pass
        finally:
            writer.transport.abort()

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the object that answers a request; an ``error`` if it makes no sense or cannot be answered."""
        answer = self._answers.get(str(request.get("ask")))
        if answer is None:
            return {"error": f"ask for misses, {', '.join(sorted(self._answers))}"}
        try:
            found = answer(request)
            return found if isinstance(found, dict) else await found
        except LazymeshError as exc:
            return {"error": str(exc)}
        except (ArithmeticError, AttributeError, LookupError, ValueError, TypeError) as exc:
            return {"error": f"the arguments of {request['ask']} make no sense: {exc}"}

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        queue: asyncio.Queue[str] = asyncio.Queue(STREAM_BACKLOG)
        self._streams.add(queue)
        self._streaming(True)
        gone = asyncio.create_task(_left(reader))
        try:
            writer.write(b'{"streaming": "misses"}\n')
            while not gone.done():
                line = asyncio.create_task(queue.get())
                await asyncio.wait({gone, line}, return_when=asyncio.FIRST_COMPLETED)
                if not line.done():
                    line.cancel()
                    break
                writer.write(line.result().encode() + b"\n")
                await writer.drain()
        finally:
            gone.cancel()
            self._streams.discard(queue)
            if not self._streams:
                self._streaming(False)


async def _encode(answer: dict[str, Any]) -> bytes:
    """Return an object as a line of JSON; lists, which may have thousands of elements, are encoded in pieces."""
    texts = []
    for name, value in answer.items():
        text = await _encode_list(value) if isinstance(value, list) else json.dumps(value)
        texts.append(f"{json.dumps(name)}: {text}")
    return f"{{{', '.join(texts)}}}\n".encode()


async def _encode_list(values: list[Any]) -> str:
    texts: list[str] = []
    await FairShare().work(values, lambda some: texts.extend(map(json.dumps, some)))
    return f"[{', '.join(texts)}]"


async def _left(reader: asyncio.StreamReader) -> None:
    """Return when the other side has left; what it sends until then is ignored and not kept."""
    while await reader.read(65_536):
        pass


async def read_request(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """Read a request; an empty object for what makes no sense, None if the other side left without one."""
    try:
        line = await reader.readline()
        request = json.loads(line) if line else None
    except (ValueError, RecursionError):
        return {}
    return request if request is None or isinstance(request, dict) else {}


def ask(path: Path, what: str, **arguments: object) -> Iterator[dict[str, Any]]:
    """Ask the agent behind a socket; yield its answer, or the objects of a stream as they arrive: at least one.

    LazymeshError if there is no answer, or with the message of an agent that cannot answer.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(LIMIT_S)
        try:
            sock.connect(str(path))
        except PermissionError as exc:
            raise LazymeshError(f"cannot reach the agent on {path}: that needs root") from exc
        except BlockingIOError as exc:  # the kernel queues no more connections
            raise _hangs(path) from exc
        except OSError as exc:
            raise LazymeshError(
                f"no agent answers on {path} ({exc.strerror or exc}): start `lazymesh agent`, or name its --socket"
            ) from exc
        answered = False
        try:
            sock.sendall(json.dumps({"ask": what, **arguments}).encode() + b"\n")
            with sock.makefile("r", encoding="utf-8") as lines:
                for line in lines:
                    answered = True
                    sock.settimeout(None)  # the next line of a stream arrives when something happens
                    answer = json.loads(line)
                    if "error" in answer:
                        raise LazymeshError(answer["error"])
                    yield answer
        except TimeoutError as exc:
            raise _hangs(path) from exc
        except (OSError, ValueError) as exc:
            raise LazymeshError(
                f"the agent behind {path} stopped in the middle of its answer: {exc}"
            ) from exc
        if not answered:
            raise LazymeshError(
                f"the agent behind {path} closed the connection without an answer: it is about to stop"
            )


def _hangs(path: Path) -> LazymeshError:
    return LazymeshError(
        f"the agent behind {path} does not answer: it hangs or is overloaded; if that lasts, read its log and"
        " restart it"
    )
