"""``lazymesh status``: datapath, clusters, queue, entries and what is wrong, on one screen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lazymesh.cli.options import SettingsCommand, socket_option
from lazymesh.cli.output import output_option, print_json, print_table
from lazymesh.roles.control import ask

if TYPE_CHECKING:
    from pathlib import Path


@click.command(cls=SettingsCommand)
@socket_option
@output_option
def status(socket: Path, output: str) -> None:
    """Show the state of the agent. Exit 1 if something is wrong."""
    answer = next(ask(socket, "status"))
    if output == "json":
        print_json(answer)
    else:
        _show(answer)
    if answer["wrong"]:
        raise SystemExit(1)


def _show(answer: dict[str, Any]) -> None:
    click.echo(
        f"lazymesh {answer['version']}, up {answer['uptimeSeconds']:.0f} s, cluster {answer['cluster']}"
    )
    if "datapath" in answer:  # an agent that is still starting has none
        _show_parts(answer)
    click.echo("")
    if answer["notReady"]:
        click.echo(f"Not ready: {answer['notReady']}")
    for line in answer["wrong"]:
        click.echo(f"WRONG: {line}")
    if not answer["wrong"]:
        click.echo("Nothing is wrong.")


def _show_parts(answer: dict[str, Any]) -> None:
    datapath, entries, queue = answer["datapath"], answer["entries"], answer["queue"]
    interfaces = (
        ", ".join(f"{name} ({direction})" for name, direction in datapath["interfaces"].items()) or "none"
    )
    mode = datapath["mode"] + (", shadow" if datapath["shadow"] else "")
    click.echo(
        f"Datapath:   {mode}, attached by {datapath['attach']}, on miss: {datapath['onMiss']},"
        f" policy: {datapath['policy']}"
    )
    click.echo(f"Interfaces: {interfaces}")
    click.echo(f"Holding:    {datapath['holding']}")
    maps = [f"{one['id']} ({one['layout']}, {one['role']})" for one in datapath["ipcache"]["maps"]]
    click.echo(f"Ipcache:    map {', '.join(maps)}")
    would = f"; not written: {entries['shadowChanges']} changes" if datapath["shadow"] else ""
    stale = f", {entries['stale']} stale" if entries["stale"] else ""
    click.echo(
        f"Entries:    {entries['owned']} of at most {entries['budget']} ours{stale}, map of {entries['mapSize']}{would}"
    )
    muted = ", MUTED" if queue["muted"] else ""
    muted += f", {queue['admitted']:.0%} of misses admitted" if queue["admitted"] < 1 else ""
    click.echo(
        f"Queue:      {queue['waiting']} waiting, {queue['inFlight']} in flight, {queue['negative']} negative{muted}"
    )
    click.echo("")
    rows = [
        (
            c["name"], c["id"] if c["id"] is not None else "-", c["state"], c["nodes"], c["identities"], c["breaker"],
            c["endpoint"] or "-",
        )
        for c in answer["clusters"]
    ]  # fmt: skip
    print_table(("CLUSTER", "ID", "STATE", "NODES", "IDENTITIES", "BREAKER", "ENDPOINT"), rows)
    click.echo("")
    counters = datapath["packets"]
    print_table(
        ("PACKETS", *counters),
        [(name, *(counters[d][name] for d in counters)) for name in counters["egress"]],
    )
