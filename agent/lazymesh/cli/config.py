"""``lazymesh config``: change a running agent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lazymesh.cli.options import SettingsCommand, socket_option
from lazymesh.cli.output import print_words
from lazymesh.roles.control import ask

if TYPE_CHECKING:
    from pathlib import Path


@click.group()
def config() -> None:
    """Change a setting of the running agent, until it is restarted."""


@config.command("on-miss", cls=SettingsCommand)
@click.argument("action", type=click.Choice(["hold", "pass", "drop"]))
@socket_option
def on_miss(action: str, socket: Path) -> None:
    """Change what the agent does with a missed packet: hold, pass or drop it."""
    answer = next(ask(socket, "on-miss", action=action))
    click.echo(f"on miss: {answer['onMiss']}")
    if action == "hold" and answer["problem"]:
        print_words(f"Nothing is held, missed packets pass: {answer['problem']}")
