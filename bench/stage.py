"""Shared by the parts: an agent in the lab, blocks of first connections, counters."""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.burst import counters
from tests.support.lab import remote_address
from tests.support.node import launched, options
from tests.support.traffic import PORT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.lab import AgentProcess, Lab
    from tests.support.namespaces import Namespace

_numbers = itertools.count(100)


def fresh(count: int) -> list[str]:
    """Return addresses of remote pods that have not been used."""
    return [remote_address(number) for number in itertools.islice(_numbers, count)]


@contextlib.contextmanager
def running(lab: Lab, *words: str, **changes: str | None) -> Iterator[AgentProcess]:
    """Run an agent, and wait until it is ready."""
    with launched(lab, *options(lab, **changes), *words, "--cleanup") as agent:
        agent.wait_ready()
        yield agent


def connect_each(namespace: Namespace, addresses: list[str], pause_s: float = 0.0) -> list[float]:
    """Connect to the addresses one after the other; return milliseconds."""

    def run() -> list[float]:
        took = []
        for address in addresses:
            began = time.perf_counter()
            socket.create_connection((address, PORT), timeout=10).close()
            took.append((time.perf_counter() - began) * 1_000)
            time.sleep(pause_s)
        return took

    return namespace.call(run)


def syn_retransmits(namespace: Namespace) -> int:
    """Return the number of SYNs that were sent again."""
    return counters(namespace)["TcpExt.TCPSynRetrans"]


def cpu_s(pid: int) -> float:
    """Return the exact processor time of a process."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def load() -> float:
    """Return the load average of the last minute."""
    return float(Path("/proc/loadavg").read_text().split()[0])
