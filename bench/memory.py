"""The resident memory of agent and holder in meshes of different sizes, without traffic."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from bench.bed import Bed
from bench.report import Part, Row
from bench.stage import running
from bench.store import Store
from tests.support.lab import Lab
from tests.support.node import child_of, memory_mib

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = {"1k": 1_000, "100k": 100_000, "500k": 500_000}
MOST_MIB, MOST_GROWTH = 100, 1.05
SETTLE_S = 3
_IMPORT = "import lazymesh.roles.agent, sys; print(flush=True); sys.stdin.read()"


def run(say: Callable[[str], None]) -> Part:
    """Measure."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", _IMPORT], stdin=pipe, stdout=pipe) as alone:
        assert alone.stdout
        alone.stdout.readline()
        figures = {"import_mib": round(memory_mib(alone.pid), 1)}
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
                time.sleep(SETTLE_S)  # nothing but its start happens here
                figures[f"rss_{name}_mib"] = round(memory_mib(agent.pid), 1)
                figures[f"holder_{name}_mib"] = round(memory_mib(holder_of(agent.pid)), 1)
    return Part(figures, rows(figures))


def holder_of(agent: int) -> int:
    """Return the process id of an agent's holder."""
    holder = child_of(agent)
    if holder is None:
        raise RuntimeError("the agent has no holder")
    return holder


def rows(figures: dict[str, float]) -> list[Row]:
    """Return the comparisons."""
    small, large, alone = figures["rss_1k_mib"], figures["rss_500k_mib"], figures["import_mib"]
    holder, small_holder = figures["holder_500k_mib"], figures["holder_1k_mib"]
    return [
        Row("resident, 500,000 endpoints", f"{large} MiB", f"1,000: {small} MiB", large / small, MOST_GROWTH),
        Row("resident, 500,000 endpoints", f"{large} MiB", f"bound {MOST_MIB} MiB", large, MOST_MIB, "MiB"),
        Row("resident, 100,000 endpoints", f"{figures['rss_100k_mib']} MiB", f"imports alone {alone} MiB",
            figures["rss_100k_mib"] / alone),
        Row("holder resident, 500,000 endpoints", f"{holder} MiB", f"1,000: {small_holder} MiB", holder / small_holder),
    ]  # fmt: skip
