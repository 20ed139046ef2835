"""``lazymesh check``: whether this node has what lazymesh needs, one line for each need."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import click

from lazymesh.cli.options import DATAPATHS, PATH, SettingsCommand, bpffs_option
from lazymesh.cli.output import output_option, print_json
from lazymesh.roles.check import check_node
from lazymesh.roles.logs import configure_logging
from lazymesh.settings import CILIUM_INTERFACES, DEFAULT_CLUSTERMESH_CONFIG

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from lazymesh.roles.checkresult import CheckResult

_MARKS = {"ok": ("ok", "green"), "warn": ("WARN", "yellow"), "fail": ("FAIL", "red")}


@click.command(cls=SettingsCommand)
@bpffs_option
@click.option(
    "--clustermesh-config",
    type=PATH,
    default=DEFAULT_CLUSTERMESH_CONFIG,
    show_default=True,
    metavar="DIR",
    help="Cilium's directory of etcd client files.",
)
@click.option(
    "--remote-config",
    type=PATH,
    default=None,
    metavar="DIR",
    help="As for the agent: directory of etcd client files for the clusters' own etcds.",
)
@click.option(
    "--interface",
    multiple=True,
    default=CILIUM_INTERFACES,
    show_default=True,
    metavar="IF",
    help="As for the agent: host-side interface of pods. Repeatable.",
)
@click.option(
    "--datapath",
    type=DATAPATHS,
    default="auto",
    show_default=True,
    help="As for the agent; with cilium, there must be a Cilium.",
)
@output_option
def check(output: str, **options: Any) -> None:
    """Check kernel, headers, bcc, bpffs, Cilium, etcd and certificates. Exit 3 if something required is missing."""
    configure_logging("text", "error")  # the results say what is wrong
    directories = {"--clustermesh-config": options["clustermesh_config"]}
    if options["remote_config"] is not None:
        directories["--remote-config"] = options["remote_config"]
    results = check_node(options["bpffs"], directories, options["interface"], options["datapath"])
    if asyncio.run(_run(results, output)):
        raise SystemExit(3)


async def _run(check: AsyncIterator[CheckResult], output: str) -> bool:
    """Print results as they arrive; return whether one failed."""
    failed, results = False, []
    async for result in check:
        failed |= result.verdict == "fail"
        results.append({"name": result.name, "verdict": result.verdict, "text": result.text})
        if output == "table":
            _show(result)
    if output == "json":
        print_json({"ok": not failed, "findings": results})
    return failed


def _show(result: CheckResult) -> None:
    word, colour = _MARKS[result.verdict]
    click.echo(f"{click.style(f'{word:<5}', fg=colour)} {result.name:<22} {result.text}")
