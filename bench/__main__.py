"""``scripts/bench``: run the parts, print one table or one object. Exit 1 if a budget is not kept."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from bench import (
    first_packet,
    flood,
    image,
    memory,
    packet,
    resolve,
    restart,
    scan,
    startup,
    storm,
    throughput,
)
from bench.compare import compare as differences
from bench.report import table
from bench.stage import load
from tests.support.namespaces import tidy_signals

PARTS = {
    "resolve": resolve.run,
    "storm": storm.run,
    "packet": packet.run,
    "memory": memory.run,
    "startup": startup.run,
    "image": image.run,
    "first_packet": first_packet.run,
    "throughput": throughput.run,
    "scan": scan.run,
    "flood": flood.run,
    "restart": restart.run,
}
_BEGAN = time.monotonic()
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", multiple=True, type=click.Choice(list(PARTS)), help="Run this part. Repeatable.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option(
    "--plot", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Draw pictures there."
)
@click.option(
    "--compare", type=_FILE, metavar="OLD.json", help="Tell what changed since a run that was kept as JSON."
)
def main(only: tuple[str, ...], output: str, plot: Path | None, compare: Path | None) -> None:
    """Measure lazymesh against what it is to be compared with, on this machine, in namespaces of its own."""
    if os.geteuid() != 0:
        raise click.ClickException("needs root, for network namespaces and BPF")
    old = _read(compare) if compare is not None else None
    results = {}
    loads = {"before": load()}
    with tidy_signals():
        for name in only or PARTS:
            results[name] = PARTS[name](lambda words, name=name: say(f"{name}: {words}"))
    loads["after"] = load()
    found = {
        "load": loads,
        **{name: part.figures | {"repeats": part.repeats} for name, part in results.items()},
    }
    if output == "json":
        print(json.dumps(found))
    else:
        print(table(results))
        print(
            f"\nLoad average {loads['before']} before, {loads['after']} after; {os.cpu_count()} processors."
        )
    if old is not None:
        print(f"\n{differences(old, found)}", file=sys.stderr if output == "json" else sys.stdout)
    if plot is not None:
        from bench.plot import plot as draw  # noqa: PLC0415 (matplotlib takes a second)

        draw(found, plot, say)
    sys.exit(0 if all(row.kept for part in results.values() for row in part.rows) else 1)


def _read(path: Path) -> dict[str, Any]:
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise click.ClickException(f"{path} is no JSON of an earlier run ({exc})") from exc
    if not isinstance(old, dict):
        raise click.ClickException(f"{path} is no JSON of an earlier run")
    return old


def say(words: str) -> None:
    """Tell the person what is going on."""
    print(f"bench: {time.monotonic() - _BEGAN:5.1f} s  {words}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
