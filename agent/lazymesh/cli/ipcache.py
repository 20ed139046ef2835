"""``lazymesh ipcache``: the map as the datapath sees it; reads the pinned map, with or without an agent."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from lazymesh.cli.options import SettingsCommand, bpffs_option, socket_option
from lazymesh.cli.output import output_option, print_json, print_table, print_words
from lazymesh.core.model import EntryFlag
from lazymesh.errors import DatapathError, LazymeshError
from lazymesh.roles.control import ask
from lazymesh.roles.ipcachereader import IpcacheReader, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

_FLAG_NAMES = {
    EntryFlag.SKIP_TUNNEL: "skiptunnel",
    EntryFlag.HAS_TUNNEL_EP: "hastunnel",
    EntryFlag.IPV6_TUNNEL_EP: "ipv6tunnel",
    EntryFlag.REMOTE_CLUSTER: "remotecluster",
}
"""As Cilium prints them."""


@click.group()
def ipcache() -> None:
    """Inspect the ipcache map: list it, look up one address, or watch it change."""


@ipcache.command("list", cls=SettingsCommand)
@bpffs_option
@socket_option
@output_option
def list_(bpffs: Path, socket: Path, output: str) -> None:
    """List every entry with its owner: lazymesh or other.

    Entries of lazymesh are marked stale while their cluster cannot be reached; only a running agent knows that.
    """
    reader = _open(bpffs, _stale(socket))
    if output == "json":
        print_json({row.prefix: _as_json(row) for row in reader.rows()})
        return
    rows = list(reader.rows())
    if not rows:
        print_words("No entries found.")
        return
    print_table(
        ("IP PREFIX/ADDRESS", "IDENTITY", "OWNER"), [(r.prefix, _as_text(r), _owner(r)) for r in rows]
    )


@ipcache.command(cls=SettingsCommand)
@click.argument("ip")
@bpffs_option
@socket_option
@output_option
def get(ip: str, bpffs: Path, socket: Path, output: str) -> None:
    """Look up IP as the datapath would: the entry with the longest prefix. Exit 1 if there is none."""
    ip = _address(ip)
    row = _open(bpffs, _stale(socket)).get(ip)
    if row is None:
        (print_words if output == "json" else click.echo)(f"{ip} does not map to any identity")
        raise SystemExit(1)
    if output == "json":
        print_json({"address": ip, **_as_json(row)})
    else:
        click.echo(f"{ip} maps to identity {_as_text(row)} owner={_owner(row)}")


@ipcache.command(cls=SettingsCommand)
@bpffs_option
@click.option(
    "--interval",
    type=click.FloatRange(min=0.05),
    default=1.0,
    show_default=True,
    help="Seconds between two reads of the map.",
)
@output_option
def watch(bpffs: Path, interval: float, output: str) -> None:
    """Print each change of the map on a line, until interrupted."""
    reader = _open(bpffs)
    show: Callable[[str, Row], None] = _print_change_json if output == "json" else _print_change
    known = {row.prefix: row for row in reader.rows()}
    while True:
        time.sleep(interval)
        now = {row.prefix: row for row in reader.rows()}
        for prefix, row in now.items():
            if prefix not in known:
                show("added", row)
            elif known[prefix] != row:
                show("changed", row)
        for prefix, row in known.items():
            if prefix not in now:
                show("deleted", row)
        known = now


def _address(text: str) -> str:
    """Return an address without its full prefix length, which `list` prints."""
    host, _, length = text.partition("/")
    return host if length == ("128" if ":" in host else "32") else text


def _open(bpffs: Path, stale: Collection[str] = ()) -> IpcacheReader:
    try:
        return IpcacheReader.open(bpffs, stale)
    except DatapathError as exc:
        if isinstance(exc.__cause__, PermissionError):
            raise DatapathError(f"{exc}: that needs root") from exc
        raise


def _stale(socket: Path) -> frozenset[str]:
    """Ask the agent which entries are stale; without an agent, none is known to be."""
    try:
        answer = next(ask(socket, "stale"), {})
    except LazymeshError:
        return frozenset()
    return frozenset(answer.get("addresses", ()))


def _owner(row: Row) -> str:
    return f"{row.owner} (stale)" if row.stale else row.owner


def _print_change_json(event: str, row: Row) -> None:
    print_json({"event": event, "prefix": row.prefix, **_as_json(row)})


def _print_change(event: str, row: Row) -> None:
    click.echo(f"{event:<8} {row.prefix:<24} {_as_text(row)} owner={row.owner}")


def _flags(flags: int) -> list[str]:
    return [name for flag, name in _FLAG_NAMES.items() if flags & flag]


def _as_json(row: Row) -> dict[str, Any]:
    return {
        "identity": row.identity,
        "tunnelEndpoint": row.tunnel_endpoint,
        "encryptKey": row.encrypt_key,
        "flags": _flags(row.flags),
        "owner": row.owner,
        **({"stale": True} if row.stale else {}),
    }


def _as_text(row: Row) -> str:
    flags = ",".join(_flags(row.flags)) or "<none>"
    return f"identity={row.identity} encryptkey={row.encrypt_key} tunnelendpoint={row.tunnel_endpoint} flags={flags}"
