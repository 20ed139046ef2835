"""The quick tests: boot each kernel under plain QEMU, run vm/guest.py in it, and record its results.

    python vm/quick.py SYSTEM PROJECT RESULTS [--matrix FILE] [KERNEL ...]

SYSTEM is the output of vm/build, PROJECT the disk with the checkout; the result is RESULTS/KERNEL.json, the console
RESULTS/KERNEL.log. The matrix (docs/kernels.md) also includes the scenarios, whose reports are RESULTS/KERNEL.xml; it
is written only if nothing has failed. Exit 1 if a kernel failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

SHOWN = 10
"""The failures of one kernel that are shown."""
PATIENCE_S = 900
"""For one kernel, boot included: seven times the duration on two idle processors without KVM, which may be shared."""


def boot(kernel: str, system: Path, project: Path, results: Path) -> dict[str, Any]:
    """Run one kernel until it ends and return its results, with an ``error`` if there are none."""
    log, answer = results / f"{kernel}.log", results / f"{kernel}.json"
    answer.unlink(missing_ok=True)
    driver = os.environ.get("VM_DRIVER", "tcg")
    processor = "host" if driver == "kvm" else "qemu64"
    accelerator = "kvm" if driver == "kvm" else "tcg,thread=multi,tb-size=512"
    line = "root=LABEL=root rw console=ttyS0 net.ifnames=0 quiet panic=-1 init=/usr/local/sbin/lazymesh-init"
    words = [
        *(
            "qemu-system-x86_64",
            "-accel",
            accelerator,
            "-M",
            "q35",
            "-cpu",
            processor,
            "-m",
            "2048",
            "-smp",
            "2",
        ),
        *("-nodefaults", "-display", "none", "-no-reboot", "-append", line),
        *("-kernel", system / f"vmlinuz-{kernel}", "-initrd", system / f"initrd-{kernel}"),
        *("-serial", f"file:{log}", "-serial", f"file:{answer}"),
    ]
    for disk in (system / "root.img", project):
        words += ["-drive", f"if=virtio,file={disk},format=raw,snapshot=on"]
    began = time.monotonic()
    try:
        subprocess.run(words, check=True, timeout=PATIENCE_S)
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    except (subprocess.SubprocessError, OSError, ValueError) as exc:
        found = {"kernel": kernel, "error": " ".join(str(exc).split())[-200:]}
        answer.write_text(json.dumps(found) + "\n", encoding="utf-8")
    found["took_s"] = round(time.monotonic() - began)
    return found


def failures(found: dict[str, Any]) -> list[str]:
    """Return what is wrong with a kernel's results, one line for each problem."""
    if "error" in found:
        return [found["error"]]
    if "tests" not in found:
        return ["ended before the tests were finished"]
    features = found["features"]
    wrong = [] if features["loads"] else [f"does not load: {features['complaint']}"]
    wrong += (
        [] if features.get("keeps") else [f"does not load cached programs: {features.get('kept_complaint')}"]
    )
    for name, group in found["tests"].items():
        wrong += [f"{name}: {line}" for line in group["failed"]]
        if not group["passed"]:
            wrong.append(f"{name}: no test was run")
    return wrong + [f"check: {each['text']}" for each in found["check"] if each["verdict"] == "fail"]


def matrix(every: dict[str, dict[str, Any]]) -> str:
    """Return docs/kernels.md: what each kernel has, and the fallback for what it lacks."""
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("kernel", lambda found: found["version"].partition("Debian ")[2].split()[0]),
        ("fewest capabilities", lambda found: ", ".join(found["features"]["needs"])),
        ("all programs load", lambda found: _yes(found["features"]["loads"])),
        ("cached programs load", lambda found: _yes(found["features"]["keeps"])),
        ("miss", lambda found: _tests(found, "miss")),
        ("hits cached for a tick", lambda found: _tests(found, "answers")),
        ("policy", lambda found: _tests(found, "policy")),
        ("hold", lambda found: _tests(found, "hold") if found["features"]["hold"] else "no"),
        ("hold of UDP segments (GSO)", lambda found: _yes(found["features"]["udp_gso"])),
        ("hook", lambda found: f"{found['features']['hook']}, {_tests(found, 'hooks')}"),
        ("signals", lambda found: _tests(found, "perf")),
        ("perf rings", lambda found: _tests(found, "rings")),
        ("maps, maps of maps", lambda found: _tests(found, "maps")),
        ("`BPF_NOEXIST` on LPM tries", lambda found: "yes" if found["features"]["noexist"] else "ignored"),
        ("entries written in batches by a program, journal", lambda found: _tests(found, "writer")),
        ("batches on LPM tries", lambda found: _yes(found["features"]["batches"])),
        ("batches on hash maps", lambda found: _tests(found, "batches")),
        ("entries", lambda found: _tests(found, "installer")),
        ("entries in Cilium's map", lambda found: _tests(found, "cilium")),
        ("interfaces that come and go", lambda found: _tests(found, "interfaces")),
        ("pins", lambda found: _tests(found, "pins")),
        ("TAPs, odd frames", lambda found: _tests(found, "taps")),
        ("scenarios on one node", lambda found: f"yes, {found['stories']['test_stories']}"),
        ("scenarios on two nodes", lambda found: f"yes, {found['stories']['test_two_nodes']}"),
    ]
    lines = [
        "# Kernels",
        "",
        "Generated by `scripts/vm test --all`. It boots kernels from the distribution's package pool in virtual",
        "machines, compiles the datapath there with the kernel's own headers, loads it, and runs tests of the",
        "datapath tier. The scenarios are those of `tests/vm`: agent, etcd and pods in Vagrant machines, on one",
        "node and on two nodes that are a cluster each. In one of them the agent has only the fewest capabilities,",
        "and each is taken away in turn. A number is the number of tests passed.",
        "",
        f"| | {' | '.join(every)} |",
        f"|---|{'---|' * len(every)}",
    ]
    lines += [f"| {name} | {' | '.join(cell(found) for found in every.values())} |" for name, cell in rows]
    lines += ["", "## Fallbacks", "", "As reported by `lazymesh check` on these kernels:", ""]
    said: dict[str, list[str]] = {}
    for kernel, found in every.items():
        for each in found["check"]:
            if each["verdict"] == "warn" and each["name"] != "clustermesh":
                said.setdefault(f"{each['name']}: {each['text']}", []).append(kernel)
    lines += [f"- {', '.join(kernels)}: {text}" for text, kernels in said.items()]
    return "\n".join(lines) + "\n"


def _yes(what: object) -> str:
    return "yes" if what else "no"


def _tests(found: dict[str, Any], name: str) -> str:
    group = found["tests"][name]
    words = f"{group['passed']}"
    if group["skipped"]:
        words += f" ({len(group['skipped'])} not applicable)"
    return f"yes, {words}"


def stories(report: Path) -> dict[str, int]:
    """Return how many scenarios have passed, by module, from pytest's report; exit if one has not."""
    if not report.exists():
        raise SystemExit(f"vm: {report.stem}: its scenarios were not run")
    passed: dict[str, int] = {}
    for case in ET.parse(report).iter("testcase"):
        if len(case):
            raise SystemExit(f"vm: {report.stem}: {case.get('name')}: {case[0].tag}")
        module = str(case.get("classname")).rpartition(".")[2]
        passed[module] = passed.get(module, 0) + 1
    return passed


def main() -> int:
    """Boot the kernels one after the other."""
    parser = argparse.ArgumentParser()
    for name in ("system", "project", "results"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--matrix", type=Path)
    parser.add_argument("kernels", nargs="*")
    asked = parser.parse_intermixed_args()
    system, project, results = (each.resolve() for each in (asked.system, asked.project, asked.results))
    known = [line.split()[0] for line in (system / "kernels").read_text(encoding="utf-8").splitlines()]
    if strange := set(asked.kernels) - set(known):
        print(f"vm: no kernel {', '.join(sorted(strange))}; choose from {', '.join(known)}", file=sys.stderr)
        return 2
    results.mkdir(parents=True, exist_ok=True)
    every, status = {}, 0
    for kernel in asked.kernels or known:
        found = every[kernel] = boot(kernel, system, project, results)
        wrong = failures(found)
        passed = sum(group["passed"] for group in found.get("tests", {}).values())
        words = f"{passed} passed, {len(wrong)} failed, {found['took_s']} s"
        print(f"vm: {kernel:<12} {found['kernel']:<28} {words}", flush=True)
        for line in wrong[:SHOWN]:
            print(f"vm: {kernel}: {line}", file=sys.stderr)
        if wrong:
            print(f"vm: {kernel}: the full output is in {results / kernel}.log", file=sys.stderr)
            status = 1
    if asked.matrix and not status:
        for kernel, found in every.items():
            found["stories"] = stories(results / f"{kernel}.xml")
        asked.matrix.write_text(matrix(every), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
