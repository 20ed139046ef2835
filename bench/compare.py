"""What changed since an earlier run, and whether that is more than noise."""

from __future__ import annotations

import json
import math
import statistics
from typing import TYPE_CHECKING, Any

from bench.report import columns

if TYPE_CHECKING:
    from collections.abc import Iterator

NOT_FIGURES = ("repeats", "samples", "runs", "counts")


def read(text: str) -> dict[str, Any]:
    """Return a run that was kept as JSON; ValueError, with what is wrong with it, if it is none."""
    run = json.loads(text)
    if not isinstance(run, dict):
        raise ValueError("it is no object")  # noqa: TRY004 (a value from outside, not a caller's mistake)
    loads = run.get("load", {})
    if not (isinstance(loads, dict) and all(map(_is_number, loads.values()))):
        raise ValueError("load: not numbers by name")
    for name, part in run.items():
        if name == "load":
            continue
        if not isinstance(part, dict):
            raise ValueError(f"{name}: no object")  # noqa: TRY004
        repeats = part.get("repeats", {})
        if not (isinstance(repeats, dict) and all(map(_are_numbers, repeats.values()))):
            raise ValueError(f"{name}.repeats: not lists of numbers by name")
        for figure, value in _figures(part):
            if not _is_number(value):
                raise ValueError(f"{name}.{figure}: no finite number")
    return run


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(map(_is_number, values))


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


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
