"""Output shared by all commands: a plain table for people, JSON for programs."""

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
    """Standard output cannot be written.

    Not an OSError, on purpose: click turns a broken pipe into exit code 1, which here means that the answer is no.
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
    """Make every failed write to standard output raise OutputError from now on."""
    out = sys.__stdout__
    if out is not None and out is sys.stdout:  # otherwise it is closed, or replaced by a test
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
    """Print a message for people on stderr; if stderr is closed, go on: the answer and the exit code stay the same."""
    try:
        click.echo(words, err=True)
    except OSError:
        # Otherwise Python would fail on it again at exit, and change the exit code.
        sys.stderr = None


def print_json(value: object) -> None:
    """Print an object on one line, and flush: a pipe may be waiting for it."""
    sys.stdout.write(json.dumps(value, separators=(", ", ": ")) + "\n")
    sys.stdout.flush()


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print columns as wide as their widest cell, three blanks apart, as Cilium's tools do."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        click.echo("   ".join(padded).rstrip())
