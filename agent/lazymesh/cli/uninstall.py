"""``lazymesh uninstall``: leave the node as it was before."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from lazymesh.cli.options import SettingsCommand, bpffs_option
from lazymesh.cli.output import output_option, print_json
from lazymesh.roles.uninstall import uninstall as remove

if TYPE_CHECKING:
    from pathlib import Path


@click.command(cls=SettingsCommand)
@bpffs_option
@output_option
def uninstall(bpffs: Path, output: str) -> None:
    """Detach our programs, delete our entries and nobody else's, and remove our pins. Stop the agent first."""
    removed = asyncio.run(remove(bpffs))
    if output == "json":
        print_json(asdict(removed))
        return
    click.echo(f"Programs: {'taken off ' + ', '.join(removed.interfaces) if removed.interfaces else 'none'}")
    click.echo(f"Entries:  {removed.entries or 'none'} in Cilium's ipcache")
    click.echo(f"Pins:     {'removed' if removed.pins else 'none'}")
