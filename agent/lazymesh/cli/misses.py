"""``lazymesh misses``: the live stream of misses and their outcomes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lazymesh.cli.options import SettingsCommand, socket_option
from lazymesh.cli.output import output_option, print_json
from lazymesh.errors import LazymeshError
from lazymesh.roles.control import ask

if TYPE_CHECKING:
    from pathlib import Path


@click.command(cls=SettingsCommand)
@socket_option
@output_option
@click.option("--count", type=click.IntRange(min=1), default=None, help="Stop after this many misses.")
def misses(socket: Path, output: str, count: int | None) -> None:
    """Follow misses and their outcomes, one per line, until interrupted or the agent stops."""
    seen = 0
    for event in ask(socket, "misses"):
        if "streaming" in event:
            if output == "table":
                click.echo(
                    _line(
                        {"address": "ADDRESS", "cluster": "CLUSTER", "outcome": "OUTCOME", "reason": "REASON"}
                    )
                )
            continue
        if output == "json":
            print_json(event)
        else:
            click.echo(_line(event))
        seen += 1
        if seen == count:
            return
    raise LazymeshError("the agent stopped")


def _line(event: dict[str, Any]) -> str:
    latency = event.get("latency_ms")
    ended = "LATENCY" if event["address"] == "ADDRESS" else "-" if latency is None else f"{latency:.3f} ms"
    cells = (event["address"], event["cluster"] or "-", event["outcome"], event["reason"] or "-", ended)
    return "{:<26} {:<14} {:<10} {:<17} {}".format(*cells)
