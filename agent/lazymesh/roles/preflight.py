"""What the agent decides and checks before it touches the node."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import TYPE_CHECKING

from lazymesh.core.policyfile import parse_policy
from lazymesh.datapath.cilium import is_pinned_here
from lazymesh.errors import DatapathError, SettingsError
from lazymesh.settings import CILIUM_INTERFACES

if TYPE_CHECKING:
    from lazymesh.core.policy import Policy
    from lazymesh.datapath.interfaces import InterfaceSelection
    from lazymesh.settings import AgentSettings


def resolve_mode(settings: AgentSettings) -> AgentSettings:
    """Decide what ``auto`` means on this node; SettingsError for options that exclude each other."""
    datapath = settings.datapath
    if datapath.mode == "auto":
        datapath = replace(datapath, mode="cilium" if is_pinned_here(datapath.bpffs) else "standalone")
    if datapath.mode == "cilium" and not datapath.interfaces and not datapath.uplinks:
        datapath = replace(datapath, interfaces=CILIUM_INTERFACES)
    if datapath.mode == "cilium" and settings.policy is not None:
        raise SettingsError(
            "--policy is for nodes without Cilium; beside Cilium its own policies decide: leave the option out, or use"
            " lazymesh's own ipcache with --datapath standalone"
        )
    return replace(settings, datapath=datapath)


def read_policy(settings: AgentSettings) -> Policy | None:
    """Read the file of ``--policy``; SettingsError if it cannot be used, or not with these interfaces."""
    if settings.policy is None:
        return None
    try:
        text = settings.policy.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"cannot read the policy {settings.policy}: {exc}") from exc
    policy, wanted = parse_policy(text, str(settings.policy)), settings.datapath
    if policy.enforced and not settings.shadow and not (wanted.interfaces and wanted.uplinks):
        missing = "--uplink (for example eth0)" if wanted.interfaces else "--interface (for example 'lxc+')"
        raise SettingsError(
            f"--policy needs {missing}, too: incoming traffic is judged at uplinks, outgoing traffic at pod interfaces,"
            " and a reply passes only if both have seen the request"
        )
    return policy


def check_interfaces(selection: InterfaceSelection) -> None:
    """Look for the interfaces named exactly; DatapathError before a second is spent on compiling."""
    for name in selection.exact_names():
        try:
            socket.if_nametoindex(name)
        except OSError as exc:
            raise DatapathError(f"no interface {name} on this node: `ip link` lists those there are") from exc
