"""The two pictures that people ask for: how long a miss takes beside a bare read, and memory against mesh size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_CURVES = {
    "etcd_read": ("bare read of etcd", "0.6", "-"),
    "miss_to_entry": ("miss to entry", "tab:blue", "-"),
    "go_read": ("bare read, Go", "0.6", ":"),
    "go_miss_to_entry": ("miss to entry, Go", "tab:orange", "--"),
}


def plot(results: dict[str, Any], directory: Path, say: Callable[[str], None]) -> None:
    """Draw what there are figures for."""
    directory.mkdir(parents=True, exist_ok=True)
    for part, name, draw in (("resolve", "latency.png", _latency), ("memory", "memory.png", _memory)):
        if part not in results:
            say(f"no {name}: there are no figures of the part {part}")
            continue
        draw(results[part]).savefig(directory / name, dpi=150)
        say(f"{directory / name}")


def _latency(figures: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, words, of in zip(axes, ("in the clear", "over TLS"), (figures, figures["tls"]), strict=True):
        for name, (label, colour, style) in _CURVES.items():
            values = sorted(of["samples"].get(name, []))
            if values:
                shares = [(rank + 1) / len(values) for rank in range(len(values))]
                axis.plot(values, shares, style, color=colour, label=label)
        axis.set(xscale="log", xlabel="microseconds", title=f"One address at a time, {words}", ylim=(0, 1))
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("share of reads, of misses")
    axes[1].legend(loc="lower right")
    return figure


def _memory(figures: dict[str, float]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    sizes = {1_000: "rss_1k_mib", 100_000: "rss_100k_mib", 500_000: "rss_500k_mib"}
    axis.plot(list(sizes), [figures[name] for name in sizes.values()], "o-", label="agent")
    axis.axhline(figures["import_mib"], color="0.6", label="its imports alone")
    axis.axhline(100, color="tab:red", linestyle=":", label="bound")
    axis.set(xscale="log", xlabel="endpoints in the mesh", ylabel="resident MiB", ylim=(0, 110))
    axis.set_title("Memory of the agent")
    axis.legend()
    axis.grid(alpha=0.3)
    return figure
