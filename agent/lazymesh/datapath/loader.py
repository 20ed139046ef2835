"""The loader: a process that compiles, loads and pins the datapath in a second, then gives LLVM's memory back.

Run as ``python -m lazymesh.datapath.loader`` with a JSON request on stdin: where to pin, how large the ipcache is,
optionally the parent process, with which it ends, and the file in which to cache what was compiled. Prints one JSON
object, ``{"ok": true}``, with ``"not_kept": "one line"`` if caching failed, or ``{"error": "one line"}``.
No other module imports bcc.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazymesh.datapath import libbpf, programcache
from lazymesh.datapath.headers import find_headers, merge_headers
from lazymesh.datapath.ipcachemaps import IpcacheLayout, make_outer_map
from lazymesh.datapath.libbpf import Map
from lazymesh.datapath.maps import pin_map
from lazymesh.datapath.pins import (
    HOLD_FILTER,
    HOLD_PROGRAMS,
    INSTALL,
    PROGRAMS,
    RINGS,
    VIEWS,
    expected_layouts,
    journal_size,
    pinned_maps,
)
from lazymesh.datapath.programs import program_type
from lazymesh.datapath.source import one_text, origin
from lazymesh.errors import DatapathError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazymesh.datapath.programcache import Kept

_PR_SET_PDEATHSIG = 1
_SCRATCH = "lazymesh-headers-"
_SCRATCH_S = 600.0
"""After this time no loader is at work in a scratch directory: one that was killed has left it."""


def die_with(parent: int) -> None:
    """End when the agent that started us ends: its successor has its own loader, and we would pin over its pins."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the agent has ended")


def load(pins: Path, ipcache_size: int) -> tuple[Any, dict[str, Any]]:
    """Compile bpf/lazymesh.c, load the programs, check sizes, pin everything under ``pins``.

    Return BCC's module and its function for each program.
    """
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
            f"-DLM_JOURNAL_SIZE={journal_size(ipcache_size)}",
            "-Wno-macro-redefined",
        ]
        try:
            bpf = BPF(text=one_text(source / "lazymesh.c"), cflags=flags)
            names = (*PROGRAMS, *HOLD_PROGRAMS, INSTALL)
            programs = {name: bpf.load_func(name, BPF.SCHED_CLS) for name in names}
            programs[HOLD_FILTER] = bpf.load_func(HOLD_FILTER, BPF.SOCKET_FILTER)
        except Exception as exc:  # bcc raises nothing narrower
            raise DatapathError(f"BCC could not load the datapath: {exc}") from exc
        _check_sizes(bpf, ipcache_size)
        for name in VIEWS:
            _new(pins, name).rename(pins / name)
    for name in RINGS:
        libbpf.pin(bpf[name.encode()].map_fd, pins / name)
    for name, function in programs.items():
        libbpf.pin(function.fd, pins / name)
    return bpf, programs


def _to_keep(made_of: str, bpf: Any, programs: dict[str, Any]) -> Kept:
    """Take from BCC what it compiled. Its instructions refer to maps by BCC's own file descriptors."""
    import bcc  # noqa: PLC0415 (as above)

    lib = bcc.lib
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()}
    compiler = [
        str(bcc.__file__),
        *sorted(each for each in mapped if re.search(r"/lib(bcc|LLVM|clang)", each)),
    ]

    lib.bpf_num_tables.argtypes = (ctypes.c_void_p,)
    lib.bpf_table_name.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    lib.bpf_table_name.restype = ctypes.c_char_p
    tables = [lib.bpf_table_name(bpf.module, number) for number in range(lib.bpf_num_tables(bpf.module))]
    names = {lib.bpf_table_fd(bpf.module, table): table.decode() for table in tables}
    words = lib.bpf_module_license(bpf.module).decode()
    lasting = {*expected_layouts(ipcache_size=0), *VIEWS}
    return programcache.Kept(
        made_of,
        programcache.files(compiler),
        {
            name: programcache.program_of(program_type(function.fd), words, bpf.dump_func(name), names)
            for name, function in programs.items()
        },
        {name: Map(os.dup(fd)).layout for fd, name in names.items() if name not in lasting},
    )


@contextlib.contextmanager
def _new_views(pins: Path) -> Iterator[None]:
    """Pin maps of maps for BCC to find; those not given their lasting names by the end are removed."""
    try:
        for view, name in zip(IpcacheLayout, VIEWS, strict=True):
            outer = make_outer_map(view, name)
            pin_map(outer, _new(pins, name))
            outer.close()
        yield
    finally:
        for name in VIEWS:
            _new(pins, name).unlink(missing_ok=True)


def _new(pins: Path, view: str) -> Path:
    return pins / f"{view}_new"


def _check_sizes(bpf: Any, ipcache_size: int) -> None:
    """Compare the sizes of compiled keys and values with those that Python will write."""
    for name, ours in pinned_maps(ipcache_size).items():
        table = bpf[name.encode()]
        pairs = [(ours.value, table.Leaf)]
        if ours.key is not None:  # a queue has no keys
            pairs.append((ours.key, table.Key))
        for mine, its in pairs:
            element = getattr(its, "_type_", its) if hasattr(its, "_length_") else its  # a copy for each CPU
            if ctypes.sizeof(mine) != ctypes.sizeof(element):
                raise DatapathError(
                    f"{name}: {mine.__name__} is {ctypes.sizeof(mine)} bytes here and {ctypes.sizeof(element)}"
                    " in the compiled program: the installation is broken, reinstall lazymesh"
                )


def _keep(path: Path, made_of: str, bpf: Any, programs: dict[str, Any]) -> dict[str, str]:
    """Write what BCC compiled to a file if its inputs are unchanged; return what to answer if that fails."""
    try:
        if origin() != made_of:
            raise OSError(errno.EAGAIN, "lazymesh was replaced while it was compiled")
        programcache.write(path, _to_keep(made_of, bpf, programs))
    except OSError as exc:
        return {"not_kept": f"{path}: {exc.strerror}"}
    except Exception as exc:  # another BCC's internals: what it loaded is good all the same
        return {"not_kept": f"{path}: {type(exc).__name__}: {exc}"}
    return {}


def _first_complaint(words: str) -> str:
    """Return the line of a compiler's or verifier's output that says what is wrong."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    for line in lines:
        if re.search(r"\berror:|Permission denied|Invalid argument|not permitted", line):
            return line
    return lines[-1] if lines else ""


def remove_left(directory: Path) -> None:
    """Remove the scratch directories of loaders that were killed, together with their agent, while they compiled."""
    for left in directory.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.lstat().st_mtime > _SCRATCH_S:
                shutil.rmtree(left)


def main() -> None:
    """Read the request, load, answer."""
    # Stopping a service may signal all its processes; the agent waits for us, and we end when it does.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    request = json.load(sys.stdin)
    if "parent" in request:
        die_with(request["parent"])
    answer: dict[str, object] = {"ok": True}
    file = request.get("keep")
    # BCC, clang and the verifier write to file descriptor 2: if they fail, one line of that is shown.
    with (
        tempfile.TemporaryFile() as words,
        tempfile.TemporaryDirectory(prefix=_SCRATCH) as scratch,
    ):
        remove_left(Path(scratch).parent)
        os.dup2(words.fileno(), 2)
        try:
            headers = find_headers()
            if not headers.running:
                os.environ["BCC_KERNEL_SOURCE"] = str(merge_headers(headers, Path(scratch)))
            made_of = origin()
            loaded = load(Path(request["pins"]), request["ipcache_size"])
            if file is not None:
                answer |= _keep(Path(file), made_of, *loaded)
        except (DatapathError, OSError) as exc:
            words.seek(0)
            complaint = _first_complaint(words.read().decode(errors="replace"))
            answer = {"error": f"{exc}" + (f" ({complaint})" if complaint else "")}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
