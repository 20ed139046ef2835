"""What a machine of the quick lane does: load the datapath, try what kernels differ in, run rows of the datapath tier.

Runs in the guest as root, started by init, in the checkout. Its one argument is where the results go, as one JSON
object: ``kernel``, ``features`` (by name), ``check`` (the findings of `lazymesh check`) and ``tests`` (by group:
``passed``, ``failed`` and ``skipped``, the last two with their reasons).
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lazymesh.datapath import kept, libbpf
from lazymesh.datapath.capabilities import Circumstances, missing
from lazymesh.datapath.maps import kernel_honours_noexist
from lazymesh.datapath.pins import HOLD_FILTER, HOLD_PROGRAMS, INSTALL, PROGRAMS, Pins
from lazymesh.datapath.program import load
from lazymesh.datapath.source import origin
from lazymesh.datapath.tap import try_tap
from lazymesh.errors import DatapathError
from lazymesh.roles.check import check_node

BPFFS = Path("/sys/fs/bpf")
IPCACHE_SIZE = 20_000
"""As the tests expect it."""
TESTS = Path("tests/datapath")
GROUPS = {
    "miss": "test_verdicts",
    "answers": "test_answers",
    "policy": "test_policy_program",
    "hold": "test_hold_program",
    "hooks": "test_hooks",
    "perf": "test_signals",
    "maps": "test_maps",
    "batches": "test_libbpf",
    "rings": "test_perfbuffer",
    "writer": "test_writer",
    "installer": "test_installer",
    "guest": "test_installer_guest",
    "interfaces": "test_interfaces",
    "kept": "test_kept",
    "pins": "test_pins",
    "taps": "test_tap",
    "frames": "test_frames",
    "programs": "test_program",
    "cilium": "test_cilium",
}
"""By name in the results: the module of the datapath tier."""
NOT_HERE = {
    "test_abi_layout": "layouts of structs, which are the compiler's",
    "test_fuzzed_frames": "a great deal of what the others have rows of",
    "test_holdmaps": "plain maps, which `maps` tries",
    "test_loader": "the loader's process; every lane loads",
    "test_source": "text",
}
"""Modules of that tier that are not run on other kernels, and why."""
LEFT_OUT = (
    "ingress-IPv4", "egress-IPv6",
    # A great deal of each, of what does not depend on the kernel.
    "random_bytes", "cut_anywhere", "what_cannot_be_read", "every_shape", "every_miss_is_counted", "full_ring",
    "reader_receives", "ten_thousand", "every_prefix", "any_history", "whatever_lies_between",
)  # fmt: skip
"""Emulated processors are some twenty times slower than real ones. So of rows that differ in family and direction
alone, half are run: each way and each family once."""


def features() -> dict[str, object]:
    """Try each thing that kernels differ in."""
    began = time.monotonic()
    found: dict[str, object] = {"loads": True, "programs": [*PROGRAMS, *HOLD_PROGRAMS, HOLD_FILTER, INSTALL]}
    pins, file = Pins.under(BPFFS), Path("/tmp/programs.json")
    try:
        load(pins, IPCACHE_SIZE, file).close()
        found["load_s"] = round(time.monotonic() - began, 1)
    except DatapathError as exc:
        found |= {"loads": False, "complaint": str(exc)}
    try:
        found["keeps"] = _load_kept(pins, file)
    except DatapathError as exc:
        found["kept_complaint"] = str(exc)
    found["needs"] = missing(frozenset(), replace(Circumstances.here(), locked_unlimited=False))
    found["hook"] = "tcx" if libbpf.has_tcx() else "clsact"
    found["noexist"] = kernel_honours_noexist()
    found["batches"] = libbpf.has_lpm_batches()
    try:
        found["hold"], found["udp_gso"] = True, try_tap()
    except DatapathError as exc:
        found |= {"hold": False, "udp_gso": False, "hold_complaint": str(exc)}
    return found


def _load_kept(pins: Pins, file: Path) -> bool:
    """Load what the first start has kept, over which the tests go then; tell whether there was anything."""
    found = kept.read(file, origin())
    if found is not None:
        pins.remove()
        pins.prepare(IPCACHE_SIZE)
        kept.load(found, pins, IPCACHE_SIZE)
    return found is not None


async def findings() -> list[dict[str, str]]:
    """Return what `lazymesh check` says of this node; of a mesh it has none."""
    with tempfile.TemporaryDirectory() as empty:
        return [asdict(finding) async for finding in check_node(BPFFS, {"--clustermesh-config": Path(empty)})]


def start_tests(report: Path, groups: list[str], **environment: str) -> subprocess.Popen[bytes]:
    """Run some groups in one pytest, which writes a report."""
    words = ["-p", "no:cacheprovider", "--color=no", "-v", "--tb=short", "-n", "0", f"--junitxml={report}"]
    chosen = " and ".join(f"not {each}" for each in LEFT_OUT)
    files = [str(TESTS / f"{GROUPS[name]}.py") for name in groups]
    command = [sys.executable, "-m", "pytest", *words, "-k", chosen, *files]
    return subprocess.Popen(command, env=os.environ | environment)


def read_reports(*reports: Path) -> dict[str, dict[str, Any]]:
    """Return what became of every test, by group."""
    results: dict[str, dict[str, Any]] = {name: {"passed": 0, "failed": [], "skipped": []} for name in GROUPS}
    by_module = {module: name for name, module in GROUPS.items()}
    for case in [case for report in reports for case in ET.parse(report).iter("testcase")]:
        module = next(part for part in case.get("classname", "").split(".") if part in by_module)
        _count(results[by_module[module]], case)
    return results


def _count(group: dict[str, Any], case: ET.Element) -> None:
    for kind, tags in (("failed", ("failure", "error")), ("skipped", ("skipped",))):
        for tag in tags:
            if (found := case.find(tag)) is not None:
                words = (found.get("message") or "").splitlines()
                group[kind].append(f"{case.get('name')}: {words[0] if words else ''}")
                return
    group["passed"] += 1


def main() -> None:
    """Do it all, and write the results even when something broke.

    Two at a time, as there are two processors: holding, which loads a datapath of its own, and everything else.
    """
    subprocess.run(["modprobe", "tun"], check=False)
    results: dict[str, object] = {"kernel": os.uname().release, "version": os.uname().version}
    hold, others = Path("/tmp/hold.xml"), Path("/tmp/others.xml")
    try:
        with start_tests(hold, ["hold"]):
            results["features"] = features()
            results["check"] = asyncio.run(findings())
            start_tests(
                others, [name for name in GROUPS if name != "hold"], LAZYMESH_TEST_BPFFS=str(BPFFS)
            ).wait()
        results["tests"] = read_reports(hold, others)
    finally:
        results["uptime_s"] = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        Path(sys.argv[1]).write_text(json.dumps(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
