"""Draw the restart scene: packets per 100 ms over time, sent and lost; without lazymesh above, with it below."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

from scripts.demo_restart import BIN_S, SIDES

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

_EVENTS = {"restart": "agent restarts", "switched": "programs switch", "filled": "map filled"}
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "lazymesh", "font.size": 10}
"""Keeps text as text, and makes the same file from the same numbers."""


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the picture, as SVG or PNG according to the file's name."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        panels = figure.subplots(2, 1, sharex=True, sharey=True)
        for panel, (side, name) in zip(panels, SIDES.items(), strict=True):
            _panel(panel, results[side], name)
        panels[1].set_xlabel("seconds since the restart of the Cilium agent")
        panels[1].legend(loc="lower right", ncols=2, framealpha=0.9)
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(panel: Axes, result: dict[str, Any], name: str) -> None:
    began = result["events_s"]["restart"]
    sent, lost = result["per_100ms"]["sent"], result["per_100ms"]["lost"]
    edges = [number * BIN_S - began for number in range(len(sent) + 1)]
    panel.stairs(sent, edges, fill=True, color="#9ec5e8", label="sent and answered")
    panel.stairs(lost, edges, fill=True, color="#c62828", label="lost")
    for event, words in _EVENTS.items():
        at = result["events_s"][event] - began
        panel.axvline(at, color="#555555", linewidth=0.8, linestyle=":")
        if panel.get_subplotspec().is_first_row():
            panel.text(
                at, 1.02, words, transform=panel.get_xaxis_transform(), ha="center", va="bottom", size=9
            )
    total = result["flow_packets"]["lost"] + result["connections"]["failed"]
    panel.text(
        0.01, 0.88, f"{name}: {total:,} lost", transform=panel.transAxes, va="top", weight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2},
    )  # fmt: skip
    panel.set_ylabel("packets / 100 ms")
    panel.margins(x=0)
