"""The quick lane: boot each kernel under plain QEMU, run vm/guest.py in it, write down what it found.

    python vm/quick.py SYSTEM PROJECT RESULTS [KERNEL ...]

SYSTEM is what vm/build made, PROJECT the disk with the checkout (vm/pack); a result is RESULTS/KERNEL.json, its console
RESULTS/KERNEL.log. When every kernel was run the matrix is written to docs/kernels.md. Exit 1 if a kernel failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
MATRIX = ROOT / "docs" / "kernels.md"
SHOWN = 10
"""Failures of one kernel that are told at once."""
PATIENCE_S = 600
"""For one kernel, boot included: about five times what it takes on two idle processors without KVM."""


def boot(kernel: str, system: Path, project: Path, results: Path) -> dict[str, Any]:
    """Run one kernel to its end and return its results; with an ``error`` when there are none."""
    log, answer = results / f"{kernel}.log", results / f"{kernel}.json"
    answer.unlink(missing_ok=True)
    driver = os.environ.get("VM_DRIVER", "tcg")
    processor = "host" if driver == "kvm" else "qemu64"
    accelerator = "kvm" if driver == "kvm" else "tcg,thread=multi,tb-size=512"
    line = (
        "root=/dev/vda rw console=ttyS0 net.ifnames=0 quiet panic=-1 init=/usr/local/sbin/lazymesh-init"
        f" lazymesh.root={ROOT} lazymesh.run=vm/guest.py"
    )
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
    """Return what is wrong with a kernel's results, a line each."""
    if "error" in found:
        return [found["error"]]
    if "tests" not in found:
        return ["broke off before the tests had ended"]
    wrong = [] if found["features"]["loads"] else [f"does not load: {found['features']['complaint']}"]
    for name, group in found["tests"].items():
        wrong += [f"{name}: {line}" for line in group["failed"]]
        if not group["passed"]:
            wrong.append(f"{name}: no test was run")
    return wrong + [f"check: {each['text']}" for each in found["check"] if each["verdict"] == "fail"]


def matrix(every: dict[str, dict[str, Any]]) -> str:
    """Return docs/kernels.md: what each kernel has, and what is done where it lacks something."""
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("kernel", lambda found: found["version"].partition("Debian ")[2].split()[0]),
        ("all programs load", lambda found: _yes(found["features"]["loads"])),
        ("miss", lambda found: _tests(found, "miss")),
        ("policy", lambda found: _tests(found, "policy")),
        ("hold", lambda found: _tests(found, "hold") if found["features"]["hold"] else "no"),
        ("hold of UDP segments (GSO)", lambda found: _yes(found["features"]["udp_gso"])),
        ("hook", lambda found: f"{found['features']['hook']}, {_tests(found, 'hooks')}"),
        ("signals: perf rings", lambda found: _tests(found, "perf")),
        ("maps, maps of maps", lambda found: _tests(found, "maps")),
        ("`BPF_NOEXIST` on LPM tries", lambda found: "yes" if found["features"]["noexist"] else "ignored"),
        ("batches on LPM tries", lambda found: _yes(found["features"]["batches"])),
        ("batches on hash maps", lambda found: _tests(found, "batches")),
    ]
    lines = [
        "# Kernels",
        "",
        "Written by `scripts/vm test --quick`, which boots each kernel of the distribution's package pool in a",
        "virtual machine, compiles the datapath there with the kernel's own headers, loads it, and runs tests of the",
        "datapath tier on it. A number says how many tests passed.",
        "",
        f"| | {' | '.join(every)} |",
        f"|---|{'---|' * len(every)}",
    ]
    lines += [f"| {name} | {' | '.join(cell(found) for found in every.values())} |" for name, cell in rows]
    lines += ["", "## What falls back", "", "As `lazymesh check` says it on that kernel:", ""]
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
        words += f" ({len(group['skipped'])} not for this kernel)"
    return f"yes, {words}"


def main() -> int:
    """Boot them one after the other."""
    system, project, results = (Path(word).resolve() for word in sys.argv[1:4])
    known = [line.split()[0] for line in (system / "kernels").read_text(encoding="utf-8").splitlines()]
    chosen = sys.argv[4:] or known
    if strange := set(chosen) - set(known):
        print(f"vm: no kernel {', '.join(sorted(strange))}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    results.mkdir(parents=True, exist_ok=True)
    every, status = {}, 0
    for kernel in chosen:
        found = every[kernel] = boot(kernel, system, project, results)
        wrong = failures(found)
        passed = sum(group["passed"] for group in found.get("tests", {}).values())
        words = f"{passed} passed, {len(wrong)} failed, {found['took_s']} s"
        print(f"vm: {kernel:<12} {found['kernel']:<28} {words}", flush=True)
        for line in wrong[:SHOWN]:
            print(f"vm: {kernel}: {line}", file=sys.stderr)
        if wrong:
            print(f"vm: {kernel}: everything is in {results / kernel}.log", file=sys.stderr)
            status = 1
    if not status and set(chosen) == set(known):
        MATRIX.write_text(matrix({kernel: every[kernel] for kernel in known}), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
