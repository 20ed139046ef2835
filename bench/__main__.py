"""``scripts/bench``: run the parts, print one table or one object. Exit 1 if a budget is not kept."""

from __future__ import annotations

import json
import os
import sys
import time

import click

from bench import first_packet, flood, packet, restart, scan
from bench.report import table
from bench.stage import load
from tests.support.namespaces import tidy_signals

PARTS = {
    "first_packet": first_packet.run,
    "scan": scan.run,
    "flood": flood.run,
    "restart": restart.run,
    "packet": packet.run,
}
_BEGAN = time.monotonic()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", multiple=True, type=click.Choice(list(PARTS)), help="Run this part. Repeatable.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def main(only: tuple[str, ...], output: str) -> None:
    """Measure lazymesh against what it is to be compared with, on this machine, in namespaces of its own."""
    if os.geteuid() != 0:
        raise click.ClickException("needs root, for network namespaces and BPF")
    results = {}
    loads = {"before": load()}
    with tidy_signals():
        for name in only or PARTS:
            results[name] = PARTS[name](lambda words, name=name: say(f"{name}: {words}"))
    loads["after"] = load()
    if output == "json":
        print(json.dumps({"load": loads, **{name: part.figures for name, part in results.items()}}))
    else:
        print(table(results))
        print(
            f"\nLoad average {loads['before']} before, {loads['after']} after; {os.cpu_count()} processors."
        )
    sys.exit(0 if all(row.kept for part in results.values() for row in part.rows) else 1)


def say(words: str) -> None:
    """Tell the person what is going on."""
    print(f"bench: {time.monotonic() - _BEGAN:5.1f} s  {words}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
