"""``lazymesh uninstall``: leave the node as it was before lazymesh."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from lazymesh.cli.options import SettingsCommand, bpffs_option
from lazymesh.cli.output import output_option, print_json
from lazymesh.kube.api import KubeApi
from lazymesh.roles.announce import announce as tell
from lazymesh.roles.uninstall import uninstall as remove

if TYPE_CHECKING:
    from pathlib import Path


@click.command(cls=SettingsCommand)
@bpffs_option
@click.option(
    "--announce",
    metavar="CONFIGMAP",
    default=None,
    help="In a pod: leave this node alone, tell all agents that mount this ConfigMap to clean up when they are stopped,"
    " and wait until they have taken note.",
)
@click.option(
    "--selector",
    metavar="LABELS",
    default="app.kubernetes.io/name=lazymesh",
    show_default=True,
    help="With --announce: labels of the agents' pods.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=300,
    show_default=True,
    help="With --announce: how long to wait, in seconds.",
)
@output_option
def uninstall(bpffs: Path, announce: str | None, selector: str, timeout: float, output: str) -> None:
    """Remove lazymesh's programs, pins and entries, and nothing else, from this node. Stop the agent first."""
    if announce is not None:
        agents = tell(KubeApi.of_this_pod(), announce, selector, timeout)
        if output == "json":
            print_json({"agents": agents})
        else:
            click.echo(f"Agents:   {agents} clean up when they are stopped")
        return
    removed = asyncio.run(remove(bpffs))
    if output == "json":
        print_json(asdict(removed))
        return
    click.echo(f"Programs: {'taken off ' + ', '.join(removed.interfaces) if removed.interfaces else 'none'}")
    click.echo(f"Entries:  {removed.entries or 'none'} in Cilium's ipcache")
    click.echo(f"Pins:     {'removed' if removed.pins else 'none'}")
