"""``lazymesh check``: does this node have what it takes, a line each."""

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
@click.option("--remote-config", type=PATH, default=None, metavar="DIR", help="The agent's --remote-config.")
@click.option(
    "--interface",
    multiple=True,
    default=CILIUM_INTERFACES,
    show_default=True,
    metavar="IF",
    help="The agent's interfaces.",
)
@click.option(
    "--datapath",
    type=DATAPATHS,
    default="auto",
    show_default=True,
    help="The agent's; with cilium there must be one.",
)
@output_option
def check(output: str, **options: Any) -> None:
    """Check kernel, headers, bcc, bpffs, Cilium, etcd and certificates. Exit 3 if a needed part is missing."""
    configure_logging("text", "error")  # what is wrong is told by the results
    directories = {"--clustermesh-config": options["clustermesh_config"]}
    if options["remote_config"] is not None:
        directories["--remote-config"] = options["remote_config"]
    results = check_node(options["bpffs"], directories, options["interface"], options["datapath"])
    if asyncio.run(_run(results, output)):
        raise SystemExit(3)


async def _run(check: AsyncIterator[CheckResult], output: str) -> bool:
    """Print results as they come; tell whether one failed."""
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
