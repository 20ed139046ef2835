"""The agent's control socket: one JSON object asks, one answers; a stream answers with one a line until someone leaves.

Requests: ``{"ask": "status"}`` and ``{"ask": "misses"}``. Only root can open the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import TYPE_CHECKING, Any

from lazymesh.errors import LazymeshError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

STREAM_BACKLOG = 10_000
"""Lines kept for a reader that is slower than the misses; beyond, the newest are dropped and counted."""


class ControlServer:
    """Serves status and the stream of misses."""

    def __init__(
        self,
        path: Path,
        status: Callable[[], dict[str, Any]],
        streaming: Callable[[bool], None] = lambda _on: None,
    ) -> None:
        """``streaming`` is called with True when the first reader of misses comes, False when the last has left."""
        self._path = path
        self._status = status
        self._streaming = streaming
        self._streams: set[asyncio.Queue[str]] = set()
        self._server: asyncio.Server | None = None
        self.dropped = 0
        """Stream lines that a slow reader never got."""

    async def start(self) -> None:
        """Listen; LazymeshError when somebody else does already, or the directory cannot be made."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if await self._answers():
                raise LazymeshError(
                    f"another agent listens on {self._path}: stop it, or choose another --socket"
                )
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()
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

    def publish(self, line: dict[str, Any]) -> None:
        """Send one object to everyone who streams misses."""
        text = json.dumps(line)
        for queue in self._streams:
            try:
                queue.put_nowait(text)
            except asyncio.QueueFull:
                self.dropped += 1

    async def _answers(self) -> bool:
        try:
            _, writer = await asyncio.open_unix_connection(self._path)
        except OSError:
            return False
        writer.close()
        return True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            ask = await _asked(reader)
            if ask == "misses":
                await self._stream(reader, writer)
            elif ask == "status":
                writer.write(json.dumps(self._status()).encode() + b"\n")
            elif ask is not None:
                writer.write(b'{"error": "ask for status or misses"}\n')
            await writer.drain()

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        queue: asyncio.Queue[str] = asyncio.Queue(STREAM_BACKLOG)
        self._streams.add(queue)
        self._streaming(True)
        gone = asyncio.create_task(reader.read())  # the reader never writes: this returns when it leaves
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


async def _asked(reader: asyncio.StreamReader) -> str | None:
    """Read what somebody asks for; "" for what makes no sense, None if nothing was asked."""
    try:
        line = await reader.readline()
        return str(json.loads(line)["ask"]) if line else None
    except (ValueError, TypeError, LookupError, RecursionError):
        return ""


def ask(path: Path, what: str) -> Iterator[dict[str, Any]]:
    """Ask the agent behind a socket; yields its answer, or the objects of a stream as they come."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(str(path))
        except OSError as exc:
            raise LazymeshError(
                f"no agent answers on {path} ({exc.strerror or exc}): start `lazymesh agent`, or name its --socket"
            ) from exc
        try:
            sock.sendall(json.dumps({"ask": what}).encode() + b"\n")
            with sock.makefile("r", encoding="utf-8") as lines:
                for line in lines:
                    yield json.loads(line)
        except (OSError, ValueError) as exc:
            raise LazymeshError(
                f"the agent behind {path} broke off in the middle of its answer: {exc}"
            ) from exc
