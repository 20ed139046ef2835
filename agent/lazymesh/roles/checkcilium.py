"""Checks a Cilium on this node as the agent would: which ipcache is in use, which programs come first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lazymesh.core.ipcaches import running_ipcache
from lazymesh.datapath.cilium import NodeView, pinned_ipcaches, pins_directory
from lazymesh.datapath.interfaces import InterfaceSelection
from lazymesh.datapath.ipcachemaps import IpcacheMap
from lazymesh.datapath.pins import PROGRAMS
from lazymesh.errors import DatapathError
from lazymesh.roles.checkresult import CheckResult

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from lazymesh.datapath.hooks import Attachment

_STARTING = "expected for a minute or two while Cilium's agent starts; if it lasts, restart that agent"


async def check_cilium(
    bpffs: Path, interfaces: tuple[str, ...], datapath: str = "auto"
) -> AsyncIterator[CheckResult]:
    """Yield results for Cilium's maps, its programs and ours beside them; a single one if there is no Cilium."""
    try:
        pinned = pinned_ipcaches(bpffs)
        async with NodeView(InterfaceSelection(interfaces)) as node:
            read = await node.ipcaches()
            chains, netkit = await node.chains(), await node.netkit()
    except (DatapathError, OSError) as exc:
        yield CheckResult("cilium", "fail", f"cannot read Cilium's maps and programs: {exc}")
        return
    if netkit:
        yield CheckResult(
            "interfaces",
            "fail",
            f"{_some(netkit)}: netkit devices, which lazymesh does not support yet; have Cilium make veth pairs with"
            " bpf.datapathMode=veth",
        )
    if pinned:
        for result in _maps(pinned, read):
            yield result
    else:
        none = f"no Cilium ipcache in {pins_directory(bpffs)}"
        if datapath == "cilium":
            yield CheckResult(
                "cilium",
                "fail",
                f"{none}, which the agent waits for: check that Cilium's agent starts here, with this BPF file system,"
                " or use --datapath standalone",
            )
        else:
            yield CheckResult("cilium", "ok", f"{none}: lazymesh uses its own")
    for result in _order(chains, tcx_in_use=node.tcx_in_use):
        yield result


def _maps(pinned: dict[Path, int], read: frozenset[int]) -> Iterator[CheckResult]:
    running = running_ipcache(pinned.values(), read)
    for path, map_id in pinned.items():
        name = f"cilium {path.name.removeprefix('cilium_')}"
        try:
            ipcache = IpcacheMap.pinned(path)
        except DatapathError as exc:
            yield CheckResult(name, "fail", str(exc))
            continue
        text = f"map {map_id}: {ipcache.layout.words}, {ipcache.max_entries} entries"
        ipcache.close()
        if running is not None and map_id < running:
            others = f"the running agent's is map {running}"
            yield CheckResult(
                name, "warn", f"{text}; left by another version of Cilium ({others}): it can be removed"
            )
        elif not read:
            yield CheckResult(
                name,
                "warn",
                f"{text}; no program on this node reads it: check that --interface matches the pods' interfaces",
            )
        elif map_id not in read:
            old = ", ".join(map(str, sorted(read)))
            yield CheckResult(
                name, "warn", f"{text}; Cilium's programs still read map {old} instead: {_STARTING}"
            )
        elif len(read) > 1:
            old = ", ".join(map(str, sorted(read - {map_id})))
            yield CheckResult(
                name, "warn", f"{text}; some of Cilium's programs still read map {old}: {_STARTING}"
            )
        else:
            yield CheckResult(name, "ok", text)


def _order(chains: dict[str, list[Attachment]], *, tcx_in_use: bool) -> Iterator[CheckResult]:
    """Yield where in the chains our programs are, if they are attached at all."""
    ours = {name: [each.name in PROGRAMS for each in chain] for name, chain in chains.items()}
    carried = [name for name, places in ours.items() if any(places)]
    clsact = [name for name in carried if chains[name][ours[name].index(True)].style == "clsact"]
    behind = {name: chains[name][0].name for name in carried if not ours[name][0]}
    if tcx_in_use and clsact:
        yield CheckResult(
            "attachment",
            "fail",
            f"{_some(clsact)}: our program is a clsact filter, but Cilium uses tcx, which comes first, and deletes the"
            " filters of others: restart the agent without --attach clsact",
        )
    elif behind:
        name, first = next(iter(behind.items()))
        yield CheckResult(
            "attachment",
            "warn",
            f"{_some(list(behind))}: {first} is ahead of our program on {name}, which does not see"
            " what that one decides; the agent moves ours back to the front every few seconds",
        )
    elif carried:
        yield CheckResult("attachment", "ok", f"our program is the first on {_some(carried)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
