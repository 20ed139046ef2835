"""The compiler's process: one JSON object out, every failure one line that says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from lazymesh.datapath import compiler, programcache, source
from lazymesh.datapath.pins import DOORBELL, HOLD_FILTER, HOLD_PROGRAMS, INSTALL, PROGRAMS, SIGNALS

if TYPE_CHECKING:
    from pathlib import Path

NO_CAPABILITIES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


def test_what_killed_compilers_have_left_is_removed(tmp_path: Path) -> None:
    """Not what one is at work in, nor what is another program's."""
    left, used, other = (
        tmp_path / name for name in ("lazymesh-headers-a", "lazymesh-headers-b", "other-headers")
    )
    for each in (left, used, other):
        (each / "include").mkdir(parents=True)
    for each in (left, other):
        os.utime(each, (0, 0))
    compiler.remove_left(tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {used.name, other.name}


def run(preamble: str = "", wrapper: tuple[str, ...] = (), parent: int = 0) -> str:
    """Run the compiler, after some lines of Python that break something, and return what it says."""
    code = f"{preamble}\nfrom lazymesh.datapath import compiler\ncompiler.main()"
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", code, str(parent or os.getpid())],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return line


def complaint(preamble: str = "", wrapper: tuple[str, ...] = ()) -> str:
    """Return the error, which must be one line and all there is."""
    said = json.loads(run(preamble, wrapper))
    assert list(said) == ["error"]
    text = said["error"]
    assert isinstance(text, str)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


def test_everything_is_compiled() -> None:
    """Every program, the maps that belong to one load, and what it was compiled from and by."""
    found = programcache.decode(run().encode())
    assert found.programs.keys() == {*PROGRAMS, *HOLD_PROGRAMS, HOLD_FILTER, INSTALL}
    assert found.fresh.keys() == {SIGNALS, DOORBELL, "lm_answers"}
    assert found.origin == source.origin()
    names = " ".join(found.compiler or ())
    assert "libbcc" in names
    assert "libLLVM" in names
    assert "bcc/__init__.py" in names


def test_a_compiler_whose_agent_is_dead_ends() -> None:
    """The agent was killed before this process could say with whom it ends."""
    words = [sys.executable, "-m", "lazymesh.datapath.compiler", "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "the agent has ended\n")


def test_missing_bcc_names_the_package() -> None:
    """It comes from the distribution, and only its interpreter sees it."""
    said = complaint("import sys; sys.modules['bcc'] = None")
    assert said.startswith("the Python package bcc is missing: install python3-bpfcc")
    assert "--system-site-packages" in said


def test_missing_headers_name_the_package() -> None:
    """Those of any kernel will do."""
    said = complaint(
        "from pathlib import Path\nfrom lazymesh.datapath import compiler, headers\n"
        "compiler.find_headers = lambda: headers.find_headers(Path('/nowhere'))"
    )
    assert said.startswith("no kernel headers found, which BCC needs to compile")


def test_missing_capability_is_the_kernel_s_word() -> None:
    """Root in a container that may not make maps."""
    said = complaint(wrapper=NO_CAPABILITIES)
    assert said.startswith("BCC could not compile the datapath: ")
    assert "Operation not permitted" in said


def test_broken_source_shows_the_compiler_s_first_error(tmp_path: Path) -> None:
    """Not its last line, which only counts the errors."""
    broken = tmp_path / "bpf"
    broken.mkdir()
    (broken / "lazymesh.c").write_text("int lm_from_pod(struct __sk_buff *skb) { return nonsense; }\n")
    said = complaint(
        "import pathlib\nfrom lazymesh.datapath import compiler\n"
        f"compiler.resources.files = lambda _: pathlib.Path({str(tmp_path)!r})"
    )
    assert "error: use of undeclared identifier 'nonsense'" in said


def test_a_bcc_that_is_another_inside_is_named() -> None:
    """Its functions in C are what we read its instructions by."""
    said = complaint("import bcc\nbcc.lib = None")
    assert said.startswith("BCC could not compile the datapath: AttributeError(")


def test_size_that_differs_is_not_compiled() -> None:
    """A mirror that does not fit the compiled struct would write rubbish into a live map."""
    said = complaint(
        "from dataclasses import replace\nfrom lazymesh.datapath import compiler\n"
        "ours = compiler.expected_layouts(0)\n"
        "ours['lm_owned'] = replace(ours['lm_owned'], value_size=12)\n"
        "compiler.expected_layouts = lambda ipcache_size: ours"
    )
    assert said.startswith("lm_owned is compiled as (type 1, key 24B, value 56B, ")
    assert "and made as (type 1, key 24B, value 12B, " in said


def test_compiler_that_was_replaced_meanwhile_is_not_named() -> None:
    """What it has compiled is loaded, and not cached."""
    code = (
        "from lazymesh.datapath import compiler\ncompiler.programcache.files = lambda _: [open('/nowhere')]"
    )
    assert programcache.decode(run(code).encode()).compiler is None
