"""``lazymesh agent``: the node agent, in the foreground."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lazymesh.cli.options import (
    DATAPATHS,
    PATH,
    Milliseconds,
    Period,
    SettingsCommand,
    bpffs_option,
    config_option,
    socket_option,
)
from lazymesh.datapath.program import find_programs
from lazymesh.kvstore.transport import KINDS as TRANSPORTS
from lazymesh.roles.logs import configure_logging
from lazymesh.settings import (
    DEFAULT_CLUSTERMESH_CONFIG,
    DEFAULT_PROGRAM_CACHE,
    IPCACHE_SIZE,
    AgentSettings,
    DatapathSettings,
    MeshSettings,
    parse_host_port,
    parse_mesh_cidr,
)


@click.command(cls=SettingsCommand)
@config_option
@click.option(
    "--datapath",
    type=DATAPATHS,
    default="auto",
    show_default=True,
    help="Which ipcache to fill. standalone: lazymesh's own. cilium: that of the Cilium agent on this node. auto:"
    " Cilium's if there is one.",
)
@click.option(
    "--interface",
    multiple=True,
    metavar="IF",
    help="Host-side interface of pods; 'lxc+' matches a prefix, and is the default beside Cilium. Repeatable; separate"
    " several by blanks in the environment.",
)
@click.option(
    "--uplink",
    multiple=True,
    metavar="IF",
    help="Interface to the network, where incoming packets may miss. Repeatable.",
)
@click.option(
    "--attach",
    type=click.Choice(["auto", "tcx", "clsact"]),
    default="auto",
    show_default=True,
    help="How programs are attached to interfaces. auto: by tcx where the kernel has it (6.6 and later).",
)
@click.option(
    "--clustermesh-config",
    type=PATH,
    default=DEFAULT_CLUSTERMESH_CONFIG,
    show_default=True,
    metavar="DIR",
    help="Cilium's directory of etcd client files, one per cluster.",
)
@click.option(
    "--remote-config",
    type=PATH,
    default=None,
    metavar="DIR",
    help="Directory of etcd client files for the clusters' own etcds, if those of --clustermesh-config lead to a"
    " kvstoremesh cache.",
)
@click.option(
    "--cluster-name",
    default="default",
    help="Name of this cluster, the same as Cilium's cluster-name (required).",
)
@click.option(
    "--cluster-id",
    type=int,
    default=0,
    help="Id of this cluster, the same as Cilium's cluster-id (required).",
)
@click.option(
    "--max-connected-clusters",
    type=click.Choice(["255", "511"]),
    default="255",
    show_default=True,
    help="Must match Cilium's setting in every cluster of the mesh.",
)
@click.option(
    "--mesh-cidr",
    multiple=True,
    metavar="CLUSTER=CIDR",
    help="Assign a pod CIDR to a cluster; overrides node records, or supplies the CIDR when they have none."
    " Repeatable.",
)
@click.option(
    "--cluster-region",
    default=None,
    help="Region of this cluster: records of scope `regional` from other regions are refused.",
)
@click.option(
    "--etcd-transport",
    type=click.Choice(TRANSPORTS),
    default="native",
    show_default=True,
    help="Transport of the etcd client. native: lazymesh's own HTTP/2, at half the latency. grpcio: Google's library.",
)
@click.option(
    "--on-miss",
    type=click.Choice(["hold", "pass", "drop"]),
    default="hold",
    show_default=True,
    help="What to do with a missed packet while its address is resolved: hold it, pass it as world, or drop it.",
)
@click.option(
    "--hold-timeout",
    type=Milliseconds(1, 10_000),
    default=250,
    show_default=True,
    metavar="MS",
    help="How long to hold a packet without an answer, in milliseconds.",
)
@click.option(
    "--hold-timeout-action",
    type=click.Choice(["pass", "drop"]),
    default="pass",
    show_default=True,
    help="What to do with a packet held that long: pass it as world, or drop it.",
)
@click.option(
    "--policy",
    type=PATH,
    default=None,
    metavar="FILE",
    help="Policies to enforce, as CiliumClusterwideNetworkPolicy documents (standalone mode; requires --interface and"
    " --uplink).",
)
@click.option(
    "--signal-rate",
    type=click.IntRange(min=0),
    default=250,
    show_default=True,
    help="Misses per second to resolve for one pod, after a burst of 1,000 (4 times as many for an uplink, 10 times for"
    " the node); 0 for no limit.",
)
@click.option(
    "--ipcache-size",
    type=click.IntRange(min=1_000),
    default=IPCACHE_SIZE,
    show_default=True,
    help="Size of lazymesh's own ipcache, in entries; at most one in twenty is a resolved address.",
)
@click.option(
    "--program-cache",
    type=PATH,
    default=str(DEFAULT_PROGRAM_CACHE),
    show_default=True,
    metavar="FILE",
    help="File caching the compiled BPF programs, so that later starts skip the compiler; 'off' disables it.",
)
@click.option(
    "--stale-limit",
    type=Period(),
    default="10m",
    show_default=True,
    help="How long to keep using entries of a cluster that cannot be reached: 90s, 15m, 1h30m.",
)
@click.option(
    "--shadow",
    is_flag=True,
    help="Resolve and report only: write nothing to the ipcache, enforce nothing, hold and drop nothing.",
)
@click.option("--cleanup", is_flag=True, help="When stopped, remove all pins, programs and entries.")
@click.option(
    "--uninstall-mark",
    type=PATH,
    default=None,
    metavar="FILE",
    help="While this file exists, unless it is empty or says 'false': act as with --cleanup, and report not ready. For"
    " uninstalling lazymesh from a whole cluster.",
)
@bpffs_option
@socket_option
@click.option(
    "--metrics-address",
    default="127.0.0.1:9968",
    show_default=True,
    metavar="HOST:PORT",
    help="Where to serve /metrics, /healthz and /readyz; 'off' disables it.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Form of the log lines on stderr.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Least severe lines to log.",
)
def agent(**options: Any) -> None:
    """Resolve ipcache misses on demand: run the node agent in the foreground."""
    configure_logging(options["log_format"], options["log_level"])
    settings = _settings(options)
    programs = find_programs(settings.datapath.program_cache)
    # While the compiler is at work: to import the agent takes half as long.
    from lazymesh.roles.agent import run_agent  # noqa: PLC0415

    run_agent(settings, programs)


def _settings(options: dict[str, Any]) -> AgentSettings:
    address, cache = options["metrics_address"], options["program_cache"]
    return AgentSettings(
        mesh=MeshSettings(
            cluster_name=options["cluster_name"],
            cluster_id=options["cluster_id"],
            max_connected_clusters=int(options["max_connected_clusters"]),
            clustermesh_config=options["clustermesh_config"],
            remote_config=options["remote_config"],
            mesh_cidrs=tuple(parse_mesh_cidr(text) for text in options["mesh_cidr"]),
            etcd_transport=options["etcd_transport"],
            region=options["cluster_region"],
        ),
        datapath=DatapathSettings(
            mode=options["datapath"],
            bpffs=options["bpffs"],
            interfaces=options["interface"],
            uplinks=options["uplink"],
            attach=options["attach"],
            on_miss=options["on_miss"],
            hold_limit_s=options["hold_timeout"] / 1000,
            drop_on_timeout=options["hold_timeout_action"] == "drop",
            signal_rate=options["signal_rate"],
            ipcache_size=options["ipcache_size"],
            program_cache=None if cache == Path("off") else cache,
        ),
        policy=options["policy"],
        shadow=options["shadow"],
        stale_limit_s=options["stale_limit"],
        cleanup=options["cleanup"],
        uninstall_mark=options["uninstall_mark"],
        socket=options["socket"],
        metrics_address=None if address == "off" else parse_host_port(address),
    )
