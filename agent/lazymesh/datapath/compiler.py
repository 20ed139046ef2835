"""The compiler: a process that compiles the datapath in a second, then gives LLVM's memory back.

Run as ``python -m lazymesh.datapath.compiler PARENT``, with the process that started it and with which it ends. It
prints one JSON object: what it has compiled (``programcache.Compiled``), or ``{"error": "one line"}``. It depends on
nothing but the installation and the kernel, and changes nothing: the agent starts it before it has read anything, and
loads the programs itself. No other module imports bcc.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from lazymesh.datapath import libbpf, programcache
from lazymesh.datapath.headers import find_headers, merge_headers
from lazymesh.datapath.libbpf import Map, MapLayout
from lazymesh.datapath.pins import HOLD_FILTER, HOLD_PROGRAMS, INSTALL, PROGRAMS, VIEWS, expected_layouts
from lazymesh.datapath.programcache import Compiled
from lazymesh.datapath.programs import PROG_TYPE_SCHED_CLS, PROG_TYPE_SOCKET_FILTER
from lazymesh.datapath.source import one_text, origin
from lazymesh.errors import DatapathError

_PR_SET_PDEATHSIG = 1
_SCRATCH = "lazymesh-headers-"
_SCRATCH_S = 600.0
"""After this time no compiler is at work in a scratch directory: one that was killed has left it."""
_KINDS = {
    **dict.fromkeys((*PROGRAMS, *HOLD_PROGRAMS, INSTALL), PROG_TYPE_SCHED_CLS),
    HOLD_FILTER: PROG_TYPE_SOCKET_FILTER,
}


def die_with(parent: int) -> None:
    """End when the agent that started us ends: nobody else wants the answer."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the agent has ended")


def compile_programs() -> Compiled:
    """Compile bpf/lazymesh.c; DatapathError if that fails, or if its structs are not those that Python writes."""
    try:
        import bcc  # noqa: PLC0415 (the import alone costs a tenth of a second and 70 MB)
    except ImportError as exc:
        raise DatapathError(
            "the Python package bcc is missing: install python3-bpfcc, and run lazymesh with /usr/bin/python3"
            " or an environment made from it with --system-site-packages"
        ) from exc
    libbpf.raise_memlock()
    with resources.as_file(resources.files("lazymesh") / "bpf") as source:
        try:
            bpf = bcc.BPF(text=one_text(source / "lazymesh.c"), cflags=["-Wno-macro-redefined"])
            names = _map_names(bcc.lib, bpf.module)
            words = bcc.lib.bpf_module_license(bpf.module).decode()
            programs = {
                name: programcache.program_of(kind, words, bpf.dump_func(name), names)
                for name, kind in _KINDS.items()
            }
        except Exception as exc:
            # BCC itself raises nothing narrower; anything else is another version, which differs inside.
            why = f"{exc}" if type(exc) is Exception else repr(exc)
            raise DatapathError(f"BCC could not compile the datapath: {why}") from exc
    layouts = {name: _layout_of(fd) for fd, name in names.items()}
    _check_sizes(layouts)
    fresh = {name for each in programs.values() for name in each.maps.values()} - {
        *expected_layouts(ipcache_size=0),
        *VIEWS,
    }
    return Compiled(origin(), _files_of(bcc), programs, {name: layouts[name] for name in fresh})


def _map_names(lib: Any, module: Any) -> dict[int, str]:
    """Return the names of BCC's maps by their file descriptors, by which its instructions refer to them."""
    lib.bpf_num_tables.argtypes = (ctypes.c_void_p,)
    lib.bpf_table_name.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    lib.bpf_table_name.restype = ctypes.c_char_p
    tables = [lib.bpf_table_name(module, number) for number in range(lib.bpf_num_tables(module))]
    return {lib.bpf_table_fd(module, table): table.decode() for table in tables}


def _layout_of(fd: int) -> MapLayout:
    opened = Map(os.dup(fd))
    try:
        return opened.layout
    finally:
        opened.close()


def _check_sizes(layouts: dict[str, MapLayout]) -> None:
    """Compare maps as compiled with those that the agent makes, but for how many elements they have, and flags."""
    for name, ours in expected_layouts(ipcache_size=0).items():
        found = layouts.get(name)
        if found is not None and found != replace(ours, max_entries=found.max_entries, flags=found.flags):
            raise DatapathError(
                f"{name} is compiled as ({found}), and made as ({ours}): the installation is broken, reinstall lazymesh"
            )


def _files_of(bcc: Any) -> dict[str, tuple[int, int]] | None:
    """Return the compiler's own files, as ``programcache.files`` does; None if one was replaced meanwhile."""
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()}
    found = sorted(each for each in mapped if re.search(r"/lib(bcc|LLVM|clang)", each))
    try:
        return programcache.files([str(bcc.__file__), *found])
    except OSError:
        return None


def _first_complaint(words: str) -> str:
    """Return the line of the compiler's output that says what is wrong."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    for line in lines:
        if re.search(r"\berror:|Permission denied|Invalid argument|not permitted", line):
            return line
    return lines[-1] if lines else ""


def remove_left(directory: Path) -> None:
    """Remove the scratch directories of compilers that were killed, together with their agent, while at work."""
    for left in directory.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.lstat().st_mtime > _SCRATCH_S:
                shutil.rmtree(left)


def main() -> None:
    """Compile, answer."""
    # Stopping a service may signal all its processes; the agent waits for us, and we end when it does.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with(int(sys.argv[1]))
    # BCC and clang write to file descriptor 2: if they fail, one line of that is shown.
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
            answer = programcache.encode(compile_programs()).decode()
        except (DatapathError, OSError) as exc:
            words.seek(0)
            complaint = _first_complaint(words.read().decode(errors="replace"))
            answer = json.dumps({"error": f"{exc}" + (f" ({complaint})" if complaint else "")})
    print(answer)


if __name__ == "__main__":
    main()
