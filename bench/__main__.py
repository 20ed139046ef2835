"""``scripts/bench``: run the parts, print one table or one object.

Exit 0: every budget kept. 1: one was not. 2 wrong usage, 3 a need is missing, 4 a part has failed, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from bench.compare import read
from bench.report import Part, table
from bench.stage import load
from tests.support.namespaces import tidy_signals

if TYPE_CHECKING:
    from collections.abc import Callable

NOT_KEPT, NEED, FAILED, INTERRUPTED = 1, 3, 4, 130
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


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--only", multiple=True, type=click.Choice(list(PARTS)), help="Run this part. Repeatable.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option(
    "--plot",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Draw pictures there, of the parts resolve and memory.",
)
@click.option(
    "--compare", type=_FILE, metavar="OLD.json", help="Tell what changed since a run that was kept as JSON."
)
@click.option("-v", "--verbose", is_flag=True, help="Show the traceback of a part that fails.")
def main(only: tuple[str, ...], output: str, plot: Path | None, compare: Path | None, verbose: bool) -> None:
    """Measure lazymesh against what it is to be compared with, on this machine, in namespaces of its own.

    Figures go to stdout, words to stderr; the table marks with OVER what does not keep its budget. A part that fails
    takes none of the others' figures with it, and Ctrl-C none of those that are there.

    Exit codes: 0 every budget that could be judged is kept, 1 one is not, 2 wrong usage, 3 a needed part is missing,
    4 a part has failed, 130 interrupted.
    """
    old = _read(compare) if compare is not None else None
    if os.geteuid() != 0:
        raise Need("needs root, for network namespaces and BPF")
    loads = {"before": load()}
    results: dict[str, Part] = {}
    interrupted = False
    with tidy_signals():
        try:
            for name in only or PARTS:
                results[name] = attempt(name, PARTS[name], verbose=verbose)
        except KeyboardInterrupt:
            interrupted = True
            say("interrupted; everything it made is removed")
    loads["after"] = load()
    found = {"load": loads, **{name: part.as_object() for name, part in results.items()}}
    if output == "json":
        print(json.dumps(found))
    else:
        print(table(results))
        print(
            f"\nLoad average {loads['before']} before, {loads['after']} after; {os.cpu_count()} processors."
        )
    if old is not None:
        print(f"\n{differences(old, found)}", file=sys.stderr if output == "json" else sys.stdout)
    outcomes = list(results.values())
    if plot is not None and not interrupted:
        outcomes.append(attempt("plot", lambda tell: _draw(results, plot, tell), verbose=verbose))
    sys.exit(INTERRUPTED if interrupted else exit_code(outcomes))


def attempt(name: str, run: Callable[[Callable[[str], None]], Part], *, verbose: bool) -> Part:
    """Run a part; if it fails, say in a line why, and return that."""
    try:
        return run(lambda words: say(f"{name}: {words}"))
    except Exception as exc:
        if verbose:
            traceback.print_exc()
        reason = why(exc)
        print(f"bench: {name}: {reason}", file=sys.stderr, flush=True)
        return Part({}, failed=reason)


def why(error: Exception) -> str:
    """Return what an error says, in a line: of several the first and the last, where a log ends."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OSError | RuntimeError | subprocess.SubprocessError) and lines:
        return " ".join(lines if len(lines) == 1 else (lines[0], lines[-1]))
    return ": ".join((type(error).__name__, *lines[:1]))


def exit_code(outcomes: list[Part]) -> int:
    """Return the most important that there is to say: without a figure nobody knows whether a budget is kept."""
    if any(part.failed is not None for part in outcomes):
        return FAILED
    return 0 if all(part.kept for part in outcomes) else NOT_KEPT


def _draw(results: dict[str, Part], directory: Path, tell: Callable[[str], None]) -> Part:
    from bench.plot import plot  # noqa: PLC0415 (matplotlib takes a second)

    plot({name: part.figures for name, part in results.items() if part.failed is None}, directory, tell)
    return Part({})


def _read(path: Path) -> dict[str, Any]:
    try:
        return read(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as exc:
        raise click.UsageError(f"{path} is no JSON of an earlier run: {exc}") from exc


def say(words: str) -> None:
    """Tell the person what is going on."""
    print(f"bench: {time.monotonic() - _BEGAN:5.1f} s  {words}", file=sys.stderr, flush=True)


class Need(click.ClickException):
    """Something without which nothing can be measured."""

    exit_code = NEED


def run(*words: str) -> None:
    """Run the command line and exit; in a line, what is wrong with it."""
    try:
        main.main(words or None, prog_name="scripts/bench", standalone_mode=False)
    except click.UsageError as exc:
        _fail(f"{exc.format_message()} (see scripts/bench --help)", exc.exit_code)
    except click.ClickException as exc:
        _fail(exc.format_message(), exc.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(INTERRUPTED)


def _fail(words: str, code: int) -> None:
    print(f"bench: {' '.join(words.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    run()
