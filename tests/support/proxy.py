"""A TCP proxy between an agent and its etcd, in a process of its own, whose behaviour a test changes as it runs.

The delay is of answers only, and chunks keep their distance: a pipeline stays one. More ways to be bad go into
``_Link`` and get a word of the control language, one line on stdin each: ``delay SECONDS``.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from tests.support.namespaces import Namespace


class Proxy:
    """Up when entered: listens on loopback of a namespace and forwards to another port there."""

    def __init__(self, namespace: Namespace, port: int, target: int, delay_s: float = 0.0) -> None:
        self._namespace, self._port, self._target, self._delay_s = namespace, port, target, delay_s

    def __enter__(self) -> Self:
        words = (str(self._port), str(self._target))
        self._process = self._namespace.popen(
            *(sys.executable, "-I", "-S", str(Path(__file__)), *words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._process.stdout.readline() != "ready\n":
            self.__exit__()
            raise RuntimeError("the proxy did not start; see its words above")
        self.delay(self._delay_s)
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            pipe.close()

    def delay(self, seconds: float) -> None:
        """Let answers come so much later from now on."""
        self._say(f"delay {seconds}")

    def _say(self, words: str) -> None:
        self._process.stdin.write(words + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"


class _Link:
    """What the proxy does to connections at the moment."""

    delay_s = 0.0


async def _forward(
    link: _Link, target: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    there_reader, there_writer = await asyncio.open_connection("127.0.0.1", target)
    async with asyncio.TaskGroup() as group:
        group.create_task(_pump(reader, there_writer, lambda: 0.0))
        group.create_task(_pump(there_reader, writer, lambda: link.delay_s))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: object) -> None:
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def write() -> None:
        while True:
            came, data = await queue.get()
            # In steps: a shorter delay is for what waits already, too.
            while (wait := came + delay() - time.monotonic()) > 0:  # type: ignore[operator] # noqa: ASYNC110 (time passes)
                await asyncio.sleep(min(wait, 0.01))
            if not data:
                return
            writer.write(data)
            await writer.drain()

    writing = asyncio.create_task(write())
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            queue.put_nowait((time.monotonic(), data))
    queue.put_nowait((0.0, b""))
    with contextlib.suppress(OSError):
        await writing
    writer.close()


async def _obey(link: _Link) -> None:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).decode().split():
        if line[0] == "delay":
            link.delay_s = float(line[1])
        print("done", flush=True)


async def _serve(port: int, target: int) -> None:
    link = _Link()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ExceptionGroup):
            await _forward(link, target, reader, writer)

    await asyncio.start_server(connected, "127.0.0.1", port)
    print("ready", flush=True)
    await _obey(link)


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2])))
