"""The Go program of bench/peer on node ``a``, over a datapath of its own: what the agent is measured against.

The kernel's half is the same, loaded a second time and attached to another pod: the signals of that pod's misses go to
the Go program.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import mmap
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bench.records import POD_CIDR
from lazymesh.core.model import Direction
from lazymesh.datapath.libbpf import Map
from lazymesh.datapath.pins import IPCACHE, Pins
from lazymesh.datapath.program import open_own_ipcache
from lazymesh.datapath.programs import attach_tcx
from lazymesh.datapath.settingsmap import DatapathConfig, OnMiss
from lazymesh.datapath.signals import RING_PAGES
from tests.datapath.conftest import mounted_bpffs
from tests.support.loaded import load

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.bed import Bed
    from tests.support.lab import Pod

SOURCE = Path(__file__).parent / "peer"
BINARY = Path(__file__).parent.parent / ".cache" / "peer"


def build(say: Callable[[str], None]) -> dict[str, str]:
    """Build it; where that cannot be done, say and return why, as bench.report has what is left out."""
    reason = _build()
    if reason is None:
        return {}
    say(f"the Go program is left out: {reason}")
    return {"Go": reason}


def _build() -> str | None:
    go = shutil.which("go")
    if go is None:
        return "no go on the PATH"
    BINARY.parent.mkdir(exist_ok=True)
    done = subprocess.run(
        [go, "build", "-o", BINARY, "."], cwd=SOURCE, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["go build failed"])[-1]
    return None


class Peer:
    """The program at work for one pod, up when entered.

    batch: many addresses in a transaction, instead of a goroutine for each. size: of its ipcache.
    """

    def __init__(self, bed: Bed, pod: Pod, *, batch: bool = False, size: int = 512_000) -> None:
        self._lab, self._pod, self._size = bed.lab, pod, size
        # As much room for signals as the agent has.
        self._words = ["-endpoint", bed.url, "-ring", str(RING_PAGES * mmap.PAGESIZE)]
        if bed.tls is not None:
            authority, pair = bed.tls
            self._words += ["-ca", str(authority), "-cert", str(pair.cert), "-key", str(pair.key)]
        if batch:
            self._words.append("-batch")
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            pins = Pins.under(stack.enter_context(mounted_bpffs()))
            pins.directory.mkdir(mode=0o700)
            stack.callback(pins.remove)
            datapath = load(pins, self._size)
            stack.callback(datapath.close)
            own = open_own_ipcache(pins, self._size)
            stack.callback(own.close)
            self.ipcache = Map.pinned(pins.path(IPCACHE))
            stack.callback(self.ipcache.close)
            self._counters = datapath.counters
            datapath.config.write(DatapathConfig(interface_rate=0, global_rate=0, on_miss=OnMiss.DROP))
            datapath.visible.show([own])
            datapath.mesh_cidrs.apply([(ipaddress.ip_network(POD_CIDR), self._lab.remote_id)], [])
            program = datapath.program(Direction.EGRESS)[1]
            link = self._lab.node_a.call(
                lambda: attach_tcx(program, socket.if_nametoindex(self._pod.interface))
            )
            stack.callback(os.close, link)
            self._process: subprocess.Popen[str] = self._lab.node_a.popen(
                BINARY,
                "-pins",
                pins.directory,
                *self._words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(self._end)
            self._line()  # it is ready
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def read(self, keys: list[str], pause_s: float) -> list[float]:
        """Read keys one after the other; return microseconds."""
        return [ns / 1_000 for ns in self._ask(json.dumps({"keys": keys, "pause": int(pause_s * 1e9)}))]

    def counts(self) -> dict[str, int]:
        """Return how many entries it has written, how many it could not, how many signals it has lost."""
        counts: dict[str, int] = self._ask("")
        return counts | {"lost_in_kernel": self._counters.read(Direction.EGRESS).lost}

    def next_entry(self) -> tuple[str, float]:
        """Return an address that has its entry, and how many microseconds it took; not of batches."""
        address, took = json.loads(self._line())
        return address, took / 1_000

    def _ask(self, line: str) -> Any:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended, which is told below
            print(line, file=self._process.stdin, flush=True)
        return json.loads(self._line())

    def _line(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait(10)
            raise RuntimeError(f"the Go program has ended with exit code {code}; see its words above")
        return line

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()
