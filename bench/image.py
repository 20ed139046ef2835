"""How long the image takes to become ready: from the start of its container to the first /readyz of 200.

Privileged, and with the chart's capabilities and a runtime's default list of system calls. First the programs must be
compiled, with the image's own headers, as after a boot or an upgrade; then they are cached. Nothing is pinned before.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

from bench.report import Part, Row
from tests.support.container import image_root, in_lab, needed_capabilities
from tests.support.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Callable

REPEATS, MOST_S = 5, 5


def run(say: Callable[[str], None]) -> Part:
    """Measure."""
    say("building the image, if needed")
    root = image_root()
    kinds = {"privileged": None, "unprivileged": needed_capabilities()}
    took: dict[str, list[float]] = {words: [] for kind in kinds for words in (kind, f"{kind}, kept")}
    with Lab(pods=1) as lab:
        for number in range(REPEATS):
            say(f"start {number + 1} of {REPEATS}")
            for kind, capabilities in kinds.items():
                lab.program = in_lab(lab, root, capabilities).command
                (lab.directory / "run/programs.json").unlink(missing_ok=True)
                took[kind].append(start(lab))
                took[f"{kind}, kept"].append(start(lab))
    figures = {"ready_s": {kind: round(statistics.median(runs), 3) for kind, runs in took.items()}}
    worst = max(second for runs in took.values() for second in runs)
    rows = [
        Row(
            f"image ready, {kind}",
            f"{median:.2f} s",
            f"worst of {REPEATS} {max(took[kind]):.2f} s",
            median,
            None,
            "s",
        )
        for kind, median in figures["ready_s"].items()
    ]
    rows.append(Row("image ready, at worst", f"{worst:.2f} s", f"bound {MOST_S} s", worst, MOST_S, "s"))
    return Part(figures, rows, {f"ready_s.{kind}": runs for kind, runs in took.items()})


def start(lab: Lab) -> float:
    """Start a container, wait until it is ready, and let it clean up; return the seconds until it was ready."""
    began = time.monotonic()
    agent = lab.start_agent("--cleanup")
    took = time.monotonic() - began
    agent.stop()
    return took
