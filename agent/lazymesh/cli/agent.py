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
from lazymesh.kvstore.transport import KINDS as TRANSPORTS
from lazymesh.roles.agent import run_agent
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
    help="standalone: an ipcache of our own. cilium: that of the Cilium agent here. auto: Cilium's, if there is any.",
)
@click.option(
    "--interface",
    multiple=True,
    metavar="IF",
    help="Pods' host-side interface; 'lxc+' matches a prefix, and is the default beside Cilium. Repeatable; in the"
    " environment, several are separated by blanks.",
)
@click.option(
    "--uplink",
    multiple=True,
    metavar="IF",
    help="Interface to the network, for misses of packets coming in. Repeatable.",
)
@click.option(
    "--attach",
    type=click.Choice(["auto", "tcx", "clsact"]),
    default="auto",
    show_default=True,
    help="How programs get onto interfaces. auto: tcx where the kernel has it (6.6 and later).",
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
    help="The same for direct access to the owners' etcds, where the other leads to a kvstoremesh cache.",
)
@click.option(
    "--cluster-name", default="default", help="Our own cluster's name, to be given, as Cilium has it."
)
@click.option("--cluster-id", type=int, default=0, help="Our own cluster's id, in the same way.")
@click.option(
    "--max-connected-clusters",
    type=click.Choice(["255", "511"]),
    default="255",
    show_default=True,
    help="As in the whole mesh.",
)
@click.option(
    "--mesh-cidr",
    multiple=True,
    metavar="CLUSTER=CIDR",
    help="Pod CIDR of a cluster, which then no other can claim; also for node records that have none. Repeatable.",
)
@click.option(
    "--cluster-region",
    default=None,
    help="Our region: records of scope `regional` from other regions are refused.",
)
@click.option(
    "--etcd-transport",
    type=click.Choice(TRANSPORTS),
    default="native",
    show_default=True,
    help="native: HTTP/2 of our own, at half the latency. grpcio: Google's library.",
)
@click.option(
    "--on-miss",
    type=click.Choice(["hold", "pass", "drop"]),
    default="hold",
    show_default=True,
    help="What becomes of a missed packet while its address is resolved: held back, passed on as world, dropped.",
)
@click.option(
    "--hold-timeout",
    type=Milliseconds(1, 10_000),
    default=250,
    show_default=True,
    metavar="MS",
    help="Milliseconds after which a held packet is let go without an answer.",
)
@click.option(
    "--hold-timeout-action",
    type=click.Choice(["pass", "drop"]),
    default="pass",
    show_default=True,
    help="Whether such a packet goes on as world, or is dropped.",
)
@click.option(
    "--policy",
    type=PATH,
    default=None,
    metavar="FILE",
    help="CiliumClusterwideNetworkPolicy documents to enforce, which takes --interface and --uplink.",
)
@click.option(
    "--signal-rate",
    type=click.IntRange(min=0),
    default=250,
    show_default=True,
    help="Misses per second that a pod may have resolved, after a burst of 1,000 (uplink: 4 times as many,"
    " all together: 10 times); 0: no limit.",
)
@click.option(
    "--ipcache-size",
    type=click.IntRange(min=1_000),
    default=IPCACHE_SIZE,
    show_default=True,
    help="Entries of an ipcache of our own; one in twenty may be a resolved address.",
)
@click.option(
    "--program-cache",
    default=str(DEFAULT_PROGRAM_CACHE),
    show_default=True,
    metavar="FILE",
    help="Keeps the programs as they were compiled, so that the next start needs no compiler; 'off' for nowhere.",
)
@click.option(
    "--stale-limit",
    type=Period(),
    default="10m",
    show_default=True,
    help="How long an entry is served that its cluster does not confirm because it is silent: 90s, 15m, 1h30m.",
)
@click.option(
    "--shadow",
    is_flag=True,
    help="Resolve and report; write nothing into the ipcache, enforce nothing, drop nothing.",
)
@click.option("--cleanup", is_flag=True, help="When stopped, leave no pin, no filter and no entry behind.")
@click.option(
    "--uninstall-mark",
    type=PATH,
    default=None,
    metavar="FILE",
    help="The same while this file exists, unless it is empty or says 'false': so a whole cluster's agents can be told."
    " Such an agent is not ready.",
)
@bpffs_option
@socket_option
@click.option(
    "--metrics-address",
    default="127.0.0.1:9968",
    show_default=True,
    metavar="HOST:PORT",
    help="Where /metrics, /healthz and /readyz are served; 'off' for nowhere.",
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
def agent(**options: Any) -> None:
    """Run the node agent in the foreground: page missed addresses into the ipcache."""
    configure_logging(options["log_format"], options["log_level"])
    run_agent(_settings(options))


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
            program_cache=None if cache == "off" else Path(cache),
        ),
        policy=options["policy"],
        shadow=options["shadow"],
        stale_limit_s=options["stale_limit"],
        cleanup=options["cleanup"],
        uninstall_mark=options["uninstall_mark"],
        socket=options["socket"],
        metrics_address=None if address == "off" else parse_host_port(address),
    )
