"""Our etcd client alone, in a process on node ``a``: fills the store, and reads from it for comparison.

``Store`` is the benchmark's side, ``python -m bench.store CONFIG`` the process. Each request is a line with a JSON
array, a method's name and its arguments; each answer is a line with a JSON value.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from itertools import islice
from typing import TYPE_CHECKING, Any, Self

from bench import records
from lazymesh.kvstore.client import EtcdClient
from lazymesh.kvstore.config import load_config
from lazymesh.kvstore.requests import Reads
from lazymesh.kvstore.supervisor import Options
from lazymesh.kvstore.transport import Transport
from lazymesh.roles.logs import configure_logging

if TYPE_CHECKING:
    from pathlib import Path

    from lazymesh.errors import KvstoreError
    from lazymesh.kvstore.model import Values
    from tests.support.namespaces import Namespace

READS, IN_FLIGHT = 128, 8
"""Of the bare loop, the same as the agent's: etcd's limit for a transaction, and concurrent transactions."""


class Store:
    """The process; it runs while entered."""

    def __init__(self, node: Namespace, config: Path, transport: str = "native") -> None:
        self._words = (sys.executable, "-m", "bench.store", str(config), transport)
        self._node = node

    def __enter__(self) -> Self:
        self._process: subprocess.Popen[str] = self._node.popen(
            *self._words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()

    def fill(self, kind: str, *arguments: int) -> int:
        """Write the records that a function of bench.records yields; return their number."""
        return self._ask("fill", kind, *arguments)

    def read(self, keys: list[str], pause_s: float = 0) -> list[float]:
        """Read keys one after the other; return microseconds."""
        return self._ask("read", keys, pause_s)

    def bare(self, first: int, count: int) -> dict[str, float]:
        """Read pods in full transactions, and nothing else; return seconds, CPU seconds and the number found."""
        return self._ask("bare", first, count)

    def list(self, prefixes: list[str]) -> dict[str, float]:
        """List prefixes concurrently; return seconds, CPU seconds and the number of keys."""
        return self._ask("list", prefixes)

    def _ask(self, *words: object) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(words), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that reads the store has died; see its output above")
        return json.loads(line)


class _Worker:
    def __init__(self, client: EtcdClient) -> None:
        self._client = client

    async def fill(self, kind: str, *arguments: int) -> int:
        pairs = iter(getattr(records, kind)(*arguments))
        count = 0
        while window := [chunk for _ in range(16) if (chunk := list(islice(pairs, READS)))]:
            await asyncio.gather(*(self._client.write_many(chunk) for chunk in window))
            count += sum(map(len, window))
        return count

    async def read(self, keys: list[str], pause_s: float) -> list[float]:
        took = []
        for key in [key.encode() for key in keys]:
            began = time.perf_counter()
            found = (await self._client.read_many([key])).values[0]
            took.append((time.perf_counter() - began) * 1e6)
            if found is None:
                raise RuntimeError(f"no value for {key.decode()}")
            await asyncio.sleep(pause_s)
        return took

    async def bare(self, first: int, count: int) -> dict[str, float]:
        """As the agent does it: no task for a transaction; the next one is sent when an answer arrives."""
        spaces = (records.PUSHED, records.PULL_ONLY)
        left = iter(
            [[f"{s}{records.pod_ip(n)}".encode() for s in spaces] for n in range(first, first + count)]
        )
        ended = asyncio.get_running_loop().create_future()
        found = flying = 0

        def send() -> None:
            nonlocal flying
            keys = [key for pair in islice(left, READS // len(spaces)) for key in pair]
            if keys:
                flying += 1
                self._client.read_soon(Reads(keys), 10, take)
            elif not flying:
                ended.set_result(None)

        def take(answer: Values | KvstoreError) -> None:
            nonlocal flying, found
            flying -= 1
            if isinstance(answer, Exception):
                ended.set_exception(answer)
                return
            found += sum(value is not None for value in answer.values)
            send()

        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(IN_FLIGHT):
            send()
        await ended
        return {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu, "found": found}

    async def list(self, prefixes: list[str]) -> dict[str, float]:
        began, cpu = time.perf_counter(), time.process_time()
        listed = await asyncio.gather(*(self._client.get_prefix(prefix.encode()) for prefix in prefixes))
        found = sum(map(len, listed))
        return {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu, "found": found}


async def _serve(config: str, transport: str) -> None:
    options = Options(transport=Transport(kind=transport))
    async with EtcdClient(load_config(config), options) as client:
        await client.wait_connected()
        worker = _Worker(client)
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            method, *arguments = json.loads(line)
            print(json.dumps(await getattr(worker, method)(*arguments)), flush=True)


if __name__ == "__main__":
    configure_logging("text", "warning")
    asyncio.run(_serve(*sys.argv[1:]))
