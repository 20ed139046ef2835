"""Load the datapath, try what kernels differ in, and run tests of the datapath tier, in a machine of the quick tests.

Runs in the guest as root, started by init, in the checkout. Its only argument is the file for the results, one JSON
object: ``kernel``, ``features`` (by name), ``check`` (the findings of `lazymesh check`) and ``tests`` (by group:
``passed``, ``failed`` and ``skipped``, the last two with their reasons).
"""

from __future__ import annotations

import asyncio
import contextlib
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

from lazymesh.datapath import kernelfeatures, programcache
from lazymesh.datapath.capabilities import Circumstances, missing
from lazymesh.datapath.kernelfeatures import kernel_honours_noexist
from lazymesh.datapath.pins import HOLD_FILTER, HOLD_PROGRAMS, INSTALL, PROGRAMS, Pins
from lazymesh.datapath.program import MeshMaps, load
from lazymesh.datapath.source import origin
from lazymesh.datapath.tap import try_tap
from lazymesh.errors import DatapathError
from lazymesh.roles.check import check_node

BPFFS = Path("/sys/fs/bpf")
COMPILED = Path("/tmp/programs.json")
"""What the first load has compiled; the tests load that."""
IPCACHE_SIZE = 20_000
"""As the tests expect it."""
TESTS = Path("tests/datapath")
GROUPS = {
    "miss": ("test_verdicts",),
    "answers": ("test_answers",),
    "policy": ("test_policy_program",),
    "hold": ("test_hold_program",),
    "hooks": ("test_hooks",),
    "perf": ("test_signals",),
    "maps": ("test_maps", "test_ipcachemaps", "test_settingsmap"),
    "batches": ("test_libbpf", "test_programs", "test_kernelfeatures"),
    "rings": ("test_perfbuffer",),
    "writer": ("test_writer", "test_journal"),
    "installer": ("test_installer",),
    "cilium": ("test_installer_guest", "test_cilium"),
    "interfaces": ("test_interfaces",),
    "pins": ("test_pins",),
    "taps": ("test_tap", "test_frames"),
}
"""The modules of the datapath tier for each group of results."""
AT_ONCE = ("installer", "cilium", "batches", "rings", "pins", "hold", "hooks", "taps")
"""Groups started while the programs are compiled, as the first of them need none. They take as long as the rest."""
LEFT_OUT_MODULES = {
    "test_abi_layout": "compares structs, without the kernel",
    "test_fuzzed_frames": "many frames of the kinds that the others try one by one",
    "test_program": "compiles many times; here programs are compiled and loaded once",
    "test_programcache": "the same; what was cached is loaded once",
    "test_holdmaps": "plain maps, as in test_maps",
    "test_compiler": "the compiler's process; every group loads what it compiles",
    "test_source": "reads text only",
}
"""Modules of that tier that do not run on other kernels, with the reason."""
LEFT_OUT = (
    "ingress-IPv4", "egress-IPv6",
    # Large numbers of cases that do not depend on the kernel.
    "random_bytes", "cut_anywhere", "what_cannot_be_read", "every_shape", "every_miss_is_counted", "full_ring",
    "any_interleaving", "hundred_pods", "reader_receives", "ten_thousand", "every_prefix", "any_history",
    "whatever_lies_between", "TestLives", "more_addresses_than", "storm_is_taken", "asked_at_the_same_time",
    # A race in which emulated processors do not take part as real ones do.
    "has_looked_wakes",
)  # fmt: skip
"""Emulated processors are some twenty times slower than real ones. So of tests that differ only in family and
direction, half are run: each direction and each family once."""


def features() -> dict[str, object]:
    """Try each feature that kernels differ in."""
    began = time.monotonic()
    found: dict[str, object] = {"loads": True, "programs": [*PROGRAMS, *HOLD_PROGRAMS, HOLD_FILTER, INSTALL]}
    pins = Pins.under(BPFFS)
    try:
        with contextlib.closing(MeshMaps(pins, IPCACHE_SIZE)) as maps:
            load(maps, COMPILED).close()
        found["load_s"] = round(time.monotonic() - began, 1)
    except DatapathError as exc:
        found |= {"loads": False, "complaint": str(exc)}
    COMPILED.touch(0o600)  # tests that wait for it have to compile themselves if it is empty
    try:
        found["keeps"] = _load_kept(pins)
    except DatapathError as exc:
        found["kept_complaint"] = str(exc)
    found["needs"] = missing(frozenset(), replace(Circumstances.here(), locked_unlimited=False))
    found["hook"] = "tcx" if kernelfeatures.has_tcx() else "clsact"
    found["noexist"] = kernel_honours_noexist()
    found["batches"] = kernelfeatures.has_lpm_batches()
    try:
        found["hold"], found["udp_gso"] = True, try_tap()
    except DatapathError as exc:
        found |= {"hold": False, "udp_gso": False, "hold_complaint": str(exc)}
    return found


def _load_kept(pins: Pins) -> bool:
    """Load what the first start has cached; return whether there was anything."""
    found = programcache.read(COMPILED, origin())
    if found is not None:
        pins.remove()
        pins.prepare(IPCACHE_SIZE)
        programcache.load(found, pins, IPCACHE_SIZE)
    return found is not None


async def findings() -> list[dict[str, str]]:
    """Return the findings of `lazymesh check` on this node, which has no mesh."""
    with tempfile.TemporaryDirectory() as empty:
        return [asdict(finding) async for finding in check_node(BPFFS, {"--clustermesh-config": Path(empty)})]


def start_tests(report: Path, groups: list[str]) -> subprocess.Popen[bytes]:
    """Start one pytest for some groups; it writes a report."""
    words = ["-p", "no:cacheprovider", "-p", "no:randomly", "-n", "0", "--color=no", "-v", "--tb=short"]
    words += ["--durations=20", f"--junitxml={report}"]
    chosen = " and ".join(f"not {each}" for each in LEFT_OUT)
    files = [str(TESTS / f"{module}.py") for name in groups for module in GROUPS[name]]
    command = [sys.executable, "-m", "pytest", *words, "-k", chosen, *files]
    return subprocess.Popen(command, env=os.environ | {"LAZYMESH_TEST_PROGRAMS": str(COMPILED)})


def read_reports(*reports: Path) -> dict[str, dict[str, Any]]:
    """Return the outcome of every test, by group."""
    results: dict[str, dict[str, Any]] = {name: {"passed": 0, "failed": [], "skipped": []} for name in GROUPS}
    by_module = {module: name for name, modules in GROUPS.items() for module in modules}
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
    """Run everything, and write the results even if something failed.

    Two pytests run at a time on the two processors.
    """
    subprocess.run(["modprobe", "tun"], check=False)
    results: dict[str, object] = {"kernel": os.uname().release, "version": os.uname().version}
    at_once, others = Path("/tmp/at_once.xml"), Path("/tmp/others.xml")
    left = [name for name in GROUPS if name not in AT_ONCE]
    try:
        with start_tests(at_once, [*AT_ONCE]):
            results["features"] = features()
            results["check"] = asyncio.run(findings())
            start_tests(others, left).wait()
        results["tests"] = read_reports(at_once, others)
    finally:
        results["uptime_s"] = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        Path(sys.argv[1]).write_text(json.dumps(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
