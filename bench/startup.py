"""How long an agent takes to become ready in a mesh of 1, 10 and 100 clusters, beside a bare list of the same records.

The clusters' nodes and identities are in one etcd, as a kvstoremesh stores them. Ready means that every cluster is
listed and its addresses can be resolved; the time starts with the process. First the programs must be compiled, as
after a boot or an upgrade; then they are cached.
"""

from __future__ import annotations

import compileall
import contextlib
import shutil
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lazymesh
from bench import records
from bench.report import Part, Row
from bench.stage import cpu_s
from bench.store import Store
from tests.support.lab import Lab
from tests.support.node import launched, options, status

if TYPE_CHECKING:
    from collections.abc import Callable

CLUSTERS, NODES, IDENTITIES, REPEATS = (1, 10, 100), 50, 1_000, 3
FIRST_ID = 10
MOST_S = 3


def run(say: Callable[[str], None]) -> Part:
    """Measure."""
    # As pip and the image leave an installation; in a checkout PYTHONDONTWRITEBYTECODE may have prevented it.
    compileall.compile_dir(Path(lazymesh.__file__).parent, quiet=1)
    ready: dict[int, list[dict[str, float]]] = {count: [] for count in CLUSTERS}
    again: dict[int, list[dict[str, float]]] = {count: [] for count in CLUSTERS}
    bare: dict[int, list[float]] = {count: [] for count in CLUSTERS}
    with Lab(pods=1) as lab, contextlib.ExitStack() as stack:
        config, kept = lab.directory / "clusters", lab.directory / "programs.json"
        _configure(config, lab.etcd.url, 1)
        store = stack.enter_context(Store(lab.node_a, config / f"cluster-{FIRST_ID}"))
        say(f"publishing {max(CLUSTERS)} clusters of {NODES} nodes and {IDENTITIES:,} identities")
        store.fill("mesh", FIRST_ID, max(CLUSTERS), NODES, IDENTITIES)
        for number in range(REPEATS):
            say(f"round {number + 1} of {REPEATS}: {', '.join(map(str, CLUSTERS))} clusters")
            for count in CLUSTERS:
                _configure(config, lab.etcd.url, count)
                kept.unlink(missing_ok=True)
                ready[count].append(start(lab, config, count, kept))
                again[count].append(start(lab, config, count, kept))
                bare[count].append(store.list(records.mesh_prefixes(FIRST_ID, count))["seconds"])
    figures: dict[str, Any] = {"bare_list_s": {str(count): _median(runs) for count, runs in bare.items()}}
    repeats = {f"bare_list_s.{count}": runs for count, runs in bare.items()}
    for name, each, starts in (
        ("ready_s", "ready_s", ready),
        ("cpu_s", "cpu_s", ready),
        ("again_s", "ready_s", again),
        ("again_cpu_s", "cpu_s", again),
    ):
        figures[name] = {str(count): _median([one[each] for one in runs]) for count, runs in starts.items()}
        repeats |= {f"{name}.{count}": [one[each] for one in runs] for count, runs in starts.items()}
    return Part(figures, rows(figures), repeats)


def start(lab: Lab, config: Path, count: int, kept: Path) -> dict[str, float]:
    """Start an agent and wait until it is ready; return the seconds, and its processor time."""
    words = options(lab, clustermesh_config=str(config), program_cache=str(kept))
    began = time.monotonic()
    with launched(lab, *words, "--cleanup") as agent:
        agent.wait_ready()
        took, cpu = time.monotonic() - began, cpu_s(agent.pid)
        clusters = status(lab)["clusters"]
        listed = [one for one in clusters if (one["nodes"], one["identities"]) == (NODES, IDENTITIES)]
        if len(listed) != count:
            raise RuntimeError(f"{len(listed)} of {count} clusters are listed completely: {clusters}")
    return {"ready_s": took, "cpu_s": cpu}


def _configure(directory: Path, url: str, count: int) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for number in range(FIRST_ID, FIRST_ID + count):
        (directory / f"cluster-{number}").write_text(f"endpoints:\n- {url}\n", encoding="ascii")


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 3)


def rows(figures: dict[str, Any]) -> list[Row]:
    """Return the comparisons."""
    found = []
    for count, took in figures["ready_s"].items():
        bare = figures["bare_list_s"][count]
        words = f"ready, {count} clusters"
        found.append(Row(words, f"{took:.2f} s", f"bare list {bare:.2f} s", took / bare))
        after = figures["again_s"][count]
        found.append(
            Row(f"{words}, cached programs", f"{after:.2f} s", f"compiled {took:.2f} s", after / took)
        )
    most = figures["ready_s"][str(max(CLUSTERS))]
    found.append(
        Row(f"ready, {max(CLUSTERS)} clusters", f"{most:.2f} s", f"bound {MOST_S} s", most, MOST_S, "s")
    )
    return found
