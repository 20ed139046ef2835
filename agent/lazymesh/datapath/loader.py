"""The loader: a process of a second that compiles, loads and pins the datapath, then gives LLVM's memory back.

Run as ``python -m lazymesh.datapath.loader`` with a request as JSON on stdin (where to pin, how large the ipcache is,
and the process whose end is ours, if any); prints one JSON object, ``{"ok": true}`` or ``{"error": "one line"}``. No
other module imports bcc.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazymesh.datapath import abi, libbpf
from lazymesh.datapath.headers import find_headers, merge_headers
from lazymesh.datapath.maps import View, layout_of
from lazymesh.datapath.pins import HOLD_FILTER, HOLD_PROGRAMS, PROGRAMS, SIGNALS, VIEWS
from lazymesh.errors import DatapathError

if TYPE_CHECKING:
    from collections.abc import Iterator

_VIEW = libbpf.MapLayout(libbpf.MAP_TYPE_ARRAY_OF_MAPS, 4, 4, len(abi.Config().view), 0)

_TABLES: dict[str, tuple[type[ctypes.Structure] | None, type[ctypes.Structure] | None]] = {
    "lm_mesh_cidrs": (abi.IpcacheKey, abi.MeshCidr),
    "lm_owned": (abi.IpcacheKey, abi.Owned),
    "lm_config": (None, abi.Config),
    "lm_counters": (None, abi.Counters),
    "lm_dedup": (abi.DedupKey, None),
    "lm_windows": (abi.DedupKey, abi.Window),
    "lm_policy": (abi.PolicyKey, None),
    "lm_flows": (abi.FlowKey, abi.Flow),
    "lm_slots": (None, abi.Slot),
    "lm_hold_control": (None, abi.HoldControl),
    "lm_hold_bucket": (None, abi.Outstanding),
    "lm_hold_if": (None, abi.Outstanding),
    "lm_hold_total": (None, abi.Outstanding),
    "lm_hold_count": (None, abi.HoldCounters),
    "lm_holder_stats": (None, abi.HolderStats),
}
"""Our types of each map's key and value, where they are structs."""


_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """End when the agent that asked for us ends: its successor has a loader of its own, and we would pin over it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the agent has ended")


def load(pins: Path, ipcache_size: int) -> None:
    """Compile bpf/lazymesh.c, load the programs, check sizes, pin everything under ``pins``."""
    try:
        from bcc import BPF  # noqa: PLC0415 (the import alone costs a tenth of a second and 70 MB)
    except ImportError as exc:
        raise DatapathError(
            "the Python package bcc is missing: install python3-bpfcc, and run lazymesh with /usr/bin/python3"
            " or an environment made from it with --system-site-packages"
        ) from exc
    libbpf.raise_memlock()
    with resources.as_file(resources.files("lazymesh") / "bpf") as source, _new_views(pins):
        flags = [
            f"-I{source}",
            f'-DLM_PIN_DIR="{pins}"',
            f"-DLM_IPCACHE_SIZE={ipcache_size}",
            "-Wno-macro-redefined",
        ]
        try:
            bpf = BPF(text=one_text(source / "lazymesh.c"), cflags=flags)
            programs = {name: bpf.load_func(name, BPF.SCHED_CLS) for name in (*PROGRAMS, *HOLD_PROGRAMS)}
            programs[HOLD_FILTER] = bpf.load_func(HOLD_FILTER, BPF.SOCKET_FILTER)
        except Exception as exc:  # bcc raises nothing narrower
            raise DatapathError(f"BCC could not load the datapath: {exc}") from exc
        _check_sizes(bpf)
        for name in VIEWS:
            _new(pins, name).rename(pins / name)
    libbpf.pin(bpf[SIGNALS.encode()].map_fd, pins / SIGNALS)
    for name, function in programs.items():
        libbpf.pin(function.fd, pins / name)


@contextlib.contextmanager
def _new_views(pins: Path) -> Iterator[None]:
    """Pin maps of maps for BCC to find; whatever has not got its lasting name by the end goes again.

    The maps that they take are like one made here, without BTF, as neither ours nor those of Cilium's agent have any:
    from 5.15 to 6.1 the kernel takes no map without BTF for one with it, and BCC would give it some.
    """
    try:
        for view, name in zip(View, VIEWS, strict=True):
            _pin_view(view, name, _new(pins, name))
        yield
    finally:
        for name in VIEWS:
            _new(pins, name).unlink(missing_ok=True)


def _pin_view(view: View, name: str, pin: Path) -> None:
    try:
        like = libbpf.Map.create("lm_like", layout_of(view))
        outer = libbpf.Map.create(name, _VIEW, like.fd)
        libbpf.pin(outer.fd, pin)
    except OSError as exc:
        raise DatapathError(f"cannot make the map {name} at {pin}: {exc.strerror}") from exc
    like.close()
    outer.close()


def _new(pins: Path, view: str) -> Path:
    return pins / f"{view}_new"


def one_text(source: Path) -> str:
    """Return a C file with our own headers put in where they are included, each once.

    BCC rewrites map accesses in its main file only, and we want them where they belong. ``#line`` keeps messages right.
    """
    seen: set[Path] = set()

    def inline(path: Path) -> str:
        seen.add(path)
        lines = [f'#line 1 "{path.name}"']
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            quoted = re.fullmatch(r'#include "(.+)"', line)
            if quoted is None:
                lines.append(line)
                continue
            header = (path.parent / quoted[1]).resolve()
            if header not in seen:
                lines.append(inline(header))
            lines.append(f'#line {number + 1} "{path.name}"')
        return "\n".join(lines)

    return inline(source.resolve()) + "\n"


def _check_sizes(bpf: Any) -> None:
    """Compare what the compiler made of our structs with what Python will write."""
    for table, (key, leaf) in _TABLES.items():
        for ours, theirs in ((key, bpf[table.encode()].Key), (leaf, bpf[table.encode()].Leaf)):
            element = getattr(theirs, "_type_", theirs) if hasattr(theirs, "_length_") else theirs
            if ours is not None and ctypes.sizeof(ours) != ctypes.sizeof(element):
                raise DatapathError(
                    f"{table}: {ours.__name__} is {ctypes.sizeof(ours)} bytes here and {ctypes.sizeof(element)}"
                    " in the compiled program: the installation is broken, reinstall lazymesh"
                )


def _first_complaint(words: str) -> str:
    """Return the one line of a compiler's or verifier's output that says what is wrong."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    for line in lines:
        if re.search(r"\berror:|Permission denied|Invalid argument|not permitted", line):
            return line
    return lines[-1] if lines else ""


def main() -> None:
    """Read the request, load, answer."""
    request = json.load(sys.stdin)
    if "parent" in request:
        die_with(request["parent"])
    answer: dict[str, object] = {"ok": True}
    # BCC, clang and the verifier talk on file descriptor 2: kept, and only shown (one line of it) when they fail.
    with (
        tempfile.TemporaryFile() as words,
        tempfile.TemporaryDirectory(prefix="lazymesh-headers-") as scratch,
    ):
        os.dup2(words.fileno(), 2)
        try:
            headers = find_headers()
            if not headers.running:
                os.environ["BCC_KERNEL_SOURCE"] = str(merge_headers(headers, Path(scratch)))
            load(Path(request["pins"]), request["ipcache_size"])
        except (DatapathError, OSError) as exc:
            words.seek(0)
            complaint = _first_complaint(words.read().decode(errors="replace"))
            answer = {"error": f"{exc}" + (f" ({complaint})" if complaint else "")}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
