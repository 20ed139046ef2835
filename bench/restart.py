"""Packets lost while a Cilium agent restarts in a large mesh under traffic, without lazymesh and with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.report import Part, Row
from scripts import demo_restart

if TYPE_CHECKING:
    from collections.abc import Callable

ENDPOINTS = 200_000
NOTICE_MS = 100


def run(say: Callable[[str], None]) -> Part:
    """Measure."""
    figures = demo_restart.run(ENDPOINTS, say)
    return Part(figures, rows(figures))


def rows(figures: dict) -> list[Row]:
    """Return the comparisons."""
    ours, alone = figures["with"], figures["without"]
    lost = {side: _lost(figures[side]) for side in ("without", "with")}
    found = [
        Row("packets lost", str(lost["with"]), f"without {lost['without']:,}", lost["with"], 0, "packets"),
        Row(
            "first to last lost packet", f"{ours['lost_for_s']:.1f} s", f"without {alone['lost_for_s']:.1f} s",
            ours["lost_for_s"], 0, "s",
        ),
        Row("entries of Cilium overwritten", str(ours["overwritten"]), "none", ours["overwritten"], 0, "entries"),
        Row(
            "new map noticed after", f"{ours['noticed_ms']} ms", f"bound {NOTICE_MS} ms",
            ours["noticed_ms"] / NOTICE_MS, 1,
        ),
    ]  # fmt: skip
    if ours["first_ms"] and alone["first_ms"]:  # None where no connection was made
        made = {side: _made(figures[side]["connections"]) for side in ("without", "with")}
        found.append(
            Row(
                "new connections that were made, most of them hits, p50",
                f"{ours['first_ms']['p50']} ms ({made['with']})",
                f"without {alone['first_ms']['p50']} ms ({made['without']})",
                ours["first_ms"]["p50"] / alone["first_ms"]["p50"],
            )
        )
    return found


def _made(connections: dict) -> str:
    return f"{connections['attempted'] - connections['failed']:,} of {connections['attempted']:,}"


def _lost(result: dict) -> int:
    return result["flow_packets"]["lost"] + result["connections"]["failed"]
