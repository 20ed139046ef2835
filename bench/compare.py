"""What changed since an earlier run, and whether that is more than noise."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from bench.report import columns

if TYPE_CHECKING:
    from collections.abc import Iterator

NOT_FIGURES = ("repeats", "samples", "runs", "counts")


def compare(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Draw both runs' figures. Beyond noise: all repeats of one run lie on one side of all of the other's."""
    lines = [("PART", "CHANGE", "BEYOND NOISE", "FIGURE", "OLD", "NEW")]
    for part in (name for name in new if name != "load" and isinstance(old.get(name), dict)):
        before, after = dict(_figures(old[part])), dict(_figures(new[part]))
        repeats = old[part].get("repeats", {}), new[part].get("repeats", {})
        for name in (name for name in after if name in before):
            change = (
                f"{after[name] / before[name] - 1:+.1%}"
                if before[name]
                else f"{after[name] - before[name]:+g}"
            )
            beyond = _beyond_noise(*(each.get(name, []) for each in repeats), before[name] == after[name])
            lines.append((part, change, beyond, name, f"{before[name]:g}", f"{after[name]:g}"))
    loads = ", ".join(f"{words} {_load(run)}" for words, run in (("old", old), ("new", new)))
    return f"{columns(lines)}\n\nLoad average: {loads}."


def _beyond_noise(old: list[float], new: list[float], same: bool) -> str:
    if same:
        return "no"
    if min(len(old), len(new)) < 3:
        return "unknown: too few repeats"
    apart = min(new) > max(old) or max(new) < min(old)
    return "yes" if apart else "no"


def _figures(of: dict[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    for name, value in of.items():
        if name in NOT_FIGURES:
            continue
        if isinstance(value, dict):
            yield from _figures(value, f"{before}{name}.")
        elif isinstance(value, int | float):
            yield before + name, value


def _load(run: dict[str, Any]) -> str:
    return f"{statistics.fmean(run['load'].values()):.1f}" if run.get("load") else "unknown"
