"""The agent's resident memory beside meshes of different sizes, none of whose pods is talked to."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench.bed import Bed
from bench.report import Part, Row
from bench.stage import running
from bench.store import Store
from tests.support.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = {"1k": 1_000, "100k": 100_000, "500k": 500_000}
MOST_MIB, MOST_GROWTH = 100, 1.05
SETTLE_S = 3
_IMPORT = "import lazymesh.roles.agent, sys; print(open('/proc/self/status').read()); sys.stdout.flush()"


def run(say: Callable[[str], None]) -> Part:
    """Measure."""
    alone = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True).stdout
    figures = {"import_mib": _mib(alone)}
    with Lab(pods=1) as lab, contextlib.ExitStack() as stack:
        bed = Bed(lab, "plain", lab.etcd.url)
        store = stack.enter_context(Store(lab.node_a, bed.file))
        store.fill("cluster_b", 1)
        there = 0
        for name, size in SIZES.items():
            say(f"{size:,} endpoints")
            store.fill("pods", there, size - there)
            there = size
            with running(lab, clustermesh_config=str(bed.config)) as agent:
                time.sleep(SETTLE_S)  # beside its start nothing happens here
                figures[f"rss_{name}_mib"] = _mib(
                    Path(f"/proc/{agent.pid}/status").read_text(encoding="ascii")
                )
    return Part(figures, rows(figures))


def _mib(status: str) -> float:
    found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    if found is None:
        raise RuntimeError("the kernel does not tell VmRSS")
    return round(int(found[1]) / 1024, 1)


def rows(figures: dict[str, float]) -> list[Row]:
    """Say what is to be compared."""
    small, large, alone = figures["rss_1k_mib"], figures["rss_500k_mib"], figures["import_mib"]
    return [
        Row("resident, 500,000 endpoints", f"{large} MiB", f"1,000: {small} MiB", large / small, MOST_GROWTH),
        Row("resident, 500,000 endpoints", f"{large} MiB", f"bound {MOST_MIB} MiB", large, MOST_MIB, "MiB"),
        Row("resident, 100,000 endpoints", f"{figures['rss_100k_mib']} MiB", f"imports alone {alone} MiB",
            figures["rss_100k_mib"] / alone),
    ]  # fmt: skip
