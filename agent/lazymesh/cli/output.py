"""Output that every command shares: a plain table for people, JSON for programs."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

STDOUT = 1


class OutputError(Exception):
    """Standard output takes no more.

    No OSError, on purpose: of a broken pipe click makes exit code 1, which here means that the answer is no.
    """

    def __init__(self, cause: OSError) -> None:
        super().__init__(f"cannot write to standard output: {cause.strerror}")
        self.errno = cause.errno


class _CheckedOutput(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as exc:
            raise OutputError(exc) from exc


def check_stdout() -> None:
    """Have whatever writes to standard output from now on raise OutputError if that fails."""
    out = sys.__stdout__
    if out is not None and out is sys.stdout:  # else it is closed, or a test's
        file = io.BufferedWriter(_CheckedOutput(STDOUT, "w", closefd=False))
        sys.stdout = io.TextIOWrapper(file, out.encoding, out.errors, line_buffering=out.line_buffering)


def output_option(command: F) -> F:
    """Add ``-o, --output table|json``."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="Form of the output.",
    )(command)


def print_words(words: str) -> None:
    """Print words for people on stderr, where there may be nobody to read them; what is done and answered stays so."""
    try:
        click.echo(words, err=True)
    except OSError:
        # Left in place, Python would fail on it once more at exit, and change the code.
        sys.stderr = None


def print_json(value: object) -> None:
    """Print one object on one line, at once: it may go to a pipe that waits for it."""
    sys.stdout.write(json.dumps(value, separators=(", ", ": ")) + "\n")
    sys.stdout.flush()


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print columns as wide as what stands in them, three blanks apart, as Cilium's own tools do."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        click.echo("   ".join(padded).rstrip())
