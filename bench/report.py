"""What a part of the benchmark returns, and how it is shown: one table for people, one object for programs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, against what, and whether that keeps its budget."""

    figure: str
    ours: str
    against: str
    compared: float
    """What the budget is of: a ratio, or a difference in ``unit``."""
    budget: float | None = None
    """The most that ``compared`` may be; None: for information."""
    unit: str = "x"

    @property
    def kept(self) -> bool:
        """Whether the budget is kept."""
        return self.budget is None or self.compared <= self.budget


@dataclass(frozen=True)
class Part:
    """One part's results."""

    figures: dict[str, Any]
    """For programs; times as their keys' ends say."""
    rows: list[Row] = field(default_factory=list)
    repeats: dict[str, list[float]] = field(default_factory=dict)
    """What each run of a figure gave, by the figure's name (``miss_to_entry_us.p50``): its noise, for a comparison."""
    left_out: dict[str, str] = field(default_factory=dict)
    """What nothing could be compared with, and why."""
    failed: str | None = None
    """Why there are no figures."""

    @property
    def kept(self) -> bool:
        """Whether all budgets are kept."""
        return all(row.kept for row in self.rows)

    def as_object(self) -> dict[str, Any]:
        """Return it for programs."""
        if self.failed is not None:
            return {"failed": self.failed}
        left_out = {"left_out": self.left_out} if self.left_out else {}
        return self.figures | {"repeats": self.repeats} | left_out


def percentiles(values: Iterable[float], digits: int = 3) -> dict[str, float]:
    """Return p50 and p99 by nearest rank."""
    ranked = sorted(values)
    return {
        f"p{percent}": round(ranked[math.ceil(percent / 100 * len(ranked)) - 1], digits)
        for percent in (50, 99)
    }


def repeated(blocks: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, list[float]]:
    """Return the percentiles of each block of a figure's values, as Part has repeats."""
    return {
        f"{name}.{rank}": [percentiles(block)[rank] for block in each if block]
        for name, each in blocks.items()
        for rank in ("p50", "p99")
    }


def milliseconds(value: float) -> str:
    """Format with about three digits."""
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def table(parts: dict[str, Part]) -> str:
    """Draw all parts; what the budget is of comes first."""
    head = ("PART", "COMPARED", "BUDGET", "FIGURE", "OURS", "AGAINST")
    lines = [head]
    for name, part in parts.items():
        lines += [(name, *_cells(row)) for row in part.rows]
        lines += [(name, "left out", "", who, "", why) for who, why in part.left_out.items()]
        if part.failed is not None:
            lines.append((name, "failed", "", "", "", part.failed))
    return columns(lines)


def columns(lines: Sequence[tuple[str, ...]]) -> str:
    """Draw lines of equally many cells."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "   ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cells(row: Row) -> tuple[str, ...]:
    budget = "" if row.budget is None else f"{row.budget:g} {row.unit}"
    if not row.kept:
        budget += " OVER"
    return f"{row.compared:.3g} {row.unit}", budget, row.figure, row.ours, row.against
