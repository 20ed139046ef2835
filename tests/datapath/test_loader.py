"""The loader's process: JSON in, one JSON object out, every failure one line that says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from lazymesh.datapath import loader
from lazymesh.datapath.pins import (
    DOORBELL,
    HOLD_FILTER,
    HOLD_PROGRAMS,
    INSTALL,
    IPCACHE,
    JOURNAL_SPARE,
    PROGRAMS,
    SHARE_OF_MAP,
    SIGNALS,
    VIEWS,
    Pins,
    expected_layouts,
)
from tests.datapath.conftest import mounted_bpffs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NO_CAPABILITIES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


def test_what_killed_loaders_have_left_is_removed(tmp_path: Path) -> None:
    """Not what one is at work in, nor what is another program's."""
    left, used, other = (
        tmp_path / name for name in ("lazymesh-headers-a", "lazymesh-headers-b", "other-headers")
    )
    for each in (left, used, other):
        (each / "include").mkdir(parents=True)
    for each in (left, other):
        os.utime(each, (0, 0))
    loader.remove_left(tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {used.name, other.name}


@pytest.fixture(scope="module")
def place() -> Iterator[Pins]:
    """Return a prepared directory for pins."""
    with mounted_bpffs() as bpffs:
        pins = Pins.under(bpffs)
        pins.prepare(100)
        yield pins


def answer(
    place: Pins,
    preamble: str = "",
    size: int = 100,
    wrapper: tuple[str, ...] = (),
    keep: Path | None = None,
) -> dict[str, object]:
    """Run the loader, after some lines of Python that break something, and return what it says."""
    code = f"{preamble}\nfrom lazymesh.datapath import loader\nloader.main()"
    asked = {"pins": str(place.directory), "ipcache_size": size}
    request = json.dumps(asked if keep is None else asked | {"keep": str(keep)})
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", code],
        input=request,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    said: dict[str, object] = json.loads(line)
    return said


def complaint(said: dict[str, object]) -> str:
    """Return the error, which must be one line and all there is."""
    assert list(said) == ["error"]
    text = said["error"]
    assert isinstance(text, str)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


def test_load_says_ok_and_pins_everything(place: Pins) -> None:
    """Every map, every program, and those maps that belong to one load."""
    assert answer(place) == {"ok": True}
    pinned = {path.name for path in place.directory.iterdir()}
    maps = expected_layouts(100).keys() - {IPCACHE}  # which the agent makes, if anybody
    assert pinned == {*maps, *VIEWS, *PROGRAMS, *HOLD_PROGRAMS, HOLD_FILTER, INSTALL, SIGNALS, DOORBELL}
    place.remove()
    place.prepare(100)


def test_missing_bcc_names_the_package(place: Pins) -> None:
    """It comes from the distribution, and only its interpreter sees it."""
    said = complaint(answer(place, "import sys; sys.modules['bcc'] = None"))
    assert said.startswith("the Python package bcc is missing: install python3-bpfcc")
    assert "--system-site-packages" in said


def test_missing_headers_name_the_package(place: Pins) -> None:
    """Those of any kernel will do."""
    preamble = (
        "from pathlib import Path\nfrom lazymesh.datapath import headers, loader\n"
        "loader.find_headers = lambda: headers.find_headers(Path('/nowhere'))"
    )
    assert complaint(answer(place, preamble)).startswith(
        "no kernel headers found, which BCC needs to compile"
    )


def test_missing_capability_is_the_kernel_s_word(place: Pins) -> None:
    """Root in a container that may not load programs."""
    said = complaint(answer(place, wrapper=NO_CAPABILITIES))
    assert said.startswith("cannot make the map ")
    assert "Operation not permitted" in said


def test_map_that_the_kernel_refuses_is_named(place: Pins) -> None:
    """A journal without elements stands for every map that cannot be made."""
    place.remove()
    place.prepare(100)
    said = complaint(answer(place, size=-SHARE_OF_MAP * JOURNAL_SPARE // 2))
    assert said.startswith("BCC could not load the datapath: ")
    assert "Invalid argument" in said


def test_broken_source_shows_the_compiler_s_first_error(place: Pins, tmp_path: Path) -> None:
    """Not its last line, which only counts the errors."""
    broken = tmp_path / "bpf"
    broken.mkdir()
    (broken / "lazymesh.c").write_text("int lm_from_pod(struct __sk_buff *skb) { return nonsense; }\n")
    preamble = (
        "import pathlib\nfrom lazymesh.datapath import loader\n"
        f"loader.resources.files = lambda _: pathlib.Path({str(tmp_path)!r})"
    )
    said = complaint(answer(place, preamble))
    assert "error: use of undeclared identifier 'nonsense'" in said


def test_size_that_differs_stops_before_any_program_is_pinned(place: Pins) -> None:
    """A mirror that does not fit the compiled struct would write rubbish into a live map."""
    place.remove()
    place.prepare(100)
    preamble = (
        "from lazymesh.datapath import abi, loader, pins\n"
        "wrong = pins.PinnedMap(0, abi.IpcacheKey, abi.IpcacheEntryV1, 0)\n"
        "loader.pinned_maps = lambda _: {'lm_owned': wrong}"
    )
    said = complaint(answer(place, preamble))
    assert said.startswith("lm_owned: IpcacheEntryV1 is 12 bytes here and 56 in the compiled program")
    assert not place.path("lm_from_pod").exists()


@pytest.mark.parametrize(
    ("preamble", "words"),
    [
        ("loader.programcache.program_of = {}.__getitem__", "TypeError"),
        ("import itertools\nloader.origin = map(str, itertools.count()).__next__", "was replaced while"),
        ("loader.programcache.files = lambda paths: [open('/nowhere')]", "No such file"),
    ],
    ids=["another BCC", "upgraded meanwhile", "no files"],
)
def test_what_cannot_be_kept_is_loaded_all_the_same(
    place: Pins, tmp_path: Path, preamble: str, words: str
) -> None:
    """The next start compiles again, and this one says why."""
    file = tmp_path / "programs.json"
    said = answer(place, f"from lazymesh.datapath import loader\n{preamble}", keep=file)
    assert said.keys() == {"ok", "not_kept"}
    assert str(said["not_kept"]).startswith(f"{file}: ")
    assert words in str(said["not_kept"])
    assert place.path("lm_from_pod").exists()
    assert list(tmp_path.iterdir()) == []
