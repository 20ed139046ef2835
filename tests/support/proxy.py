"""A TCP proxy between an agent and its etcd, in a process of its own, whose behaviour a test changes as it runs.

The delay is of answers only, and chunks keep their distance: a pipeline stays one. Each way to be bad is a field of
``_Link`` and a word of the control language, one line on stdin each: ``delay SECONDS``.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
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

    def cut(self) -> None:
        """Reset every connection that there is; new ones are welcome."""
        self._say("cut")

    def refuse(self, on: bool) -> None:
        """Reset what is there and each new connection at once, as a host without the service."""
        self._say(f"refuse {on:d}")

    def blackhole(self, on: bool) -> None:
        """Take everything and pass nothing on, in either direction; what came meanwhile goes on afterwards."""
        self._say(f"blackhole {on:d}")

    def throttle(self, bytes_per_s: float) -> None:
        """Let answers through at this rate only, over all connections; 0: at any."""
        self._say(f"throttle {bytes_per_s}")

    def garble(self, on: bool) -> None:
        """Answer with bytes that mean nothing."""
        self._say(f"garble {on:d}")

    def heal(self) -> None:
        """Be a good proxy again."""
        self._say("heal")

    def _say(self, words: str) -> None:
        self._process.stdin.write(words + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"


@dataclass
class _Link:
    """What the proxy does to connections at the moment."""

    delay_s: float = 0.0
    refuse: bool = False
    blackhole: bool = False
    throttle: float = 0.0
    garble: bool = False
    writers: set[asyncio.StreamWriter] = field(default_factory=set)
    """The clients' ends of all connections."""

    def cut(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


async def _forward(
    link: _Link, target: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    there_reader, there_writer = await asyncio.open_connection("127.0.0.1", target)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_pump(link, reader, there_writer, answers=False))
            group.create_task(_pump(link, there_reader, writer, answers=True))
    finally:
        there_writer.close()


async def _pump(
    link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool
) -> None:
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def write() -> None:
        while True:
            came, data = await queue.get()
            # In steps: a shorter delay, or the end of a black hole, is for what waits already, too.
            while link.blackhole or (answers and time.monotonic() < came + link.delay_s):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            if not data:
                return
            writer.write(random.randbytes(len(data)) if answers and link.garble else data)
            await writer.drain()
            if answers and link.throttle:
                await asyncio.sleep(len(data) / link.throttle)

    writing = asyncio.create_task(write())
    with contextlib.suppress(OSError):
        while data := await reader.read(4_096 if link.throttle else 65_536):
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
        match line:
            case ["delay", seconds]:
                link.delay_s = float(seconds)
            case ["cut"]:
                link.cut()
            case ["heal"]:
                link.delay_s, link.throttle = 0.0, 0.0
                link.refuse = link.blackhole = link.garble = False
            case ["throttle", rate]:
                link.throttle = float(rate)
            case [word, on]:
                setattr(link, word, on == "1")
                if link.refuse:
                    link.cut()
        print("done", flush=True)


async def _serve(port: int, target: int) -> None:
    link = _Link()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if link.refuse:
            writer.transport.abort()
            return
        link.writers.add(writer)
        try:
            with contextlib.suppress(OSError, ExceptionGroup):
                await _forward(link, target, reader, writer)
        finally:
            link.writers.discard(writer)
            writer.close()

    await asyncio.start_server(connected, "127.0.0.1", port)
    print("ready", flush=True)
    await _obey(link)


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2])))
