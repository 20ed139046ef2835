"""``lazymesh audit``: what went through as world while its address had no entry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lazymesh.cli.options import Period, SettingsCommand, socket_option
from lazymesh.cli.output import output_option, print_json, print_table, print_words
from lazymesh.roles.control import ask

if TYPE_CHECKING:
    from pathlib import Path


@click.command(cls=SettingsCommand)
@click.option(
    "--since",
    type=Period(),
    default="1h",
    show_default=True,
    help="How far to look back: 90s, 15m, 1h30m, 7d.",
)
@socket_option
@output_option
def audit(since: float, socket: Path, output: str) -> None:
    """List the windows in which an address was open as world, and what policy says of the peer now that it is known.

    The agent remembers at most 10,000 closed windows, the kernel some 16,000 open ones: the record begins when the
    agent was started, or later. VERDICT is that of the agent's own --policy, and `allowed` without one; beside Cilium
    it is always `unknown`, as Cilium's policy cannot be asked.
    """
    answer = next(ask(socket, "audit", since=since))
    if output == "json":
        print_json(answer)
        return
    windows = answer["windows"]
    if windows:
        _show(windows)
    else:
        print_words("Nothing went through unresolved.")
    print_words(f"Recorded since {answer['recordedSince']}: earlier windows may have been forgotten.")


def _show(windows: list[dict[str, Any]]) -> None:
    header = (
        "SINCE",
        "ADDRESS",
        "DIRECTION",
        "CLUSTER",
        "SECONDS",
        "PACKETS",
        "BYTES",
        "IDENTITY",
        "VERDICT",
    )
    print_table(
        header,
        [
            (
                w["since"], w["address"], w["direction"], w["cluster"] or "-", f"{w['seconds']:.3f}", w["packets"],
                w["bytes"], w["identity"] or "-", w["verdict"] + (" (open)" if w["open"] else ""),
            )
            for w in windows
        ],
    )  # fmt: skip
