"""What BCC compiled is kept: the next start loads the same instructions, and compiles when anything is amiss."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import msgspec
import pytest

from lazymesh.core.model import Direction, Entry
from lazymesh.datapath import abi, libbpf, programcache, programs, source
from lazymesh.datapath.libbpf import BPF_F_NO_PREALLOC, MAP_TYPE_HASH, Map, MapLayout
from lazymesh.datapath.pins import (
    DOORBELL,
    HOLD_FILTER,
    HOLD_PROGRAMS,
    INSTALL,
    PROGRAMS,
    SIGNALS,
    VIEWS,
    Pins,
    expected_layouts,
    journal_size,
)
from lazymesh.datapath.program import open_own_ipcache
from lazymesh.datapath.programcache import Program, program_of
from lazymesh.datapath.settingsmap import DatapathConfig
from lazymesh.errors import DatapathError
from tests.datapath.conftest import mounted_bpffs, open_descriptors
from tests.datapath.test_abi_layout import tool
from tests.datapath.test_compiler import NO_CAPABILITIES
from tests.support.loaded import load
from tests.support.packets import POD_B1, Flow
from tests.support.prog_run import run_packet

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 1_000
ALL = (*PROGRAMS, *HOLD_PROGRAMS, HOLD_FILTER, INSTALL)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, object]]]:
    """Return the file that a first start leaves behind, and what the kernel says of the programs of that start."""
    file = tmp_path_factory.mktemp("kept") / "programs.json"
    with mounted_bpffs() as bpffs:
        pins = Pins.under(bpffs)
        load(pins, SIZE, file).close()
        yield file, described(pins)


@pytest.fixture
def pins() -> Iterator[Pins]:
    """Return pins of nothing yet."""
    with mounted_bpffs() as bpffs:
        yield Pins.under(bpffs)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiling fails."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python here"))


def described(pins: Pins) -> dict[str, object]:
    """Return what the kernel says of each program, and of the maps that it uses; both without what is new each time."""
    return {name: (_program(pins, name), _maps(pins, name)) for name in ALL}


def _bpftool(*words: str) -> dict[str, object]:
    done = subprocess.run([tool("bpftool"), *words, "-j"], capture_output=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def _program(pins: Pins, name: str) -> dict[str, object]:
    found = _bpftool("prog", "show", "pinned", str(pins.path(name)))
    return {key: found[key] for key in ("name", "type", "tag", "gpl_compatible", "bytes_xlated")}


def _maps(pins: Pins, name: str) -> list[tuple[str, MapLayout]]:
    fd = libbpf.open_pin(pins.path(name))
    try:
        ids = programs.describe_program(programs.program_id(fd)).map_ids
    finally:
        os.close(fd)
    found = []
    for each in ids:
        opened = Map.by_id(each)
        found.append((str(_bpftool("map", "show", "id", str(each))["name"]), opened.layout))
        opened.close()
    return sorted(found, key=str)


def test_second_start_loads_the_same_programs_without_a_compiler(
    first: tuple[Path, dict[str, object]], pins: Pins, no_compiler: None
) -> None:
    """Same instructions, same maps, same pins; an entry makes a hit as ever."""
    file, before = first
    datapath = load(pins, SIZE, file)
    maps = expected_layouts(SIZE).keys() - {"lm_ipcache"}
    assert {path.name for path in pins.directory.iterdir()} == {*maps, *VIEWS, *ALL, SIGNALS, DOORBELL}
    assert described(pins) == before
    ipcache = open_own_ipcache(pins, SIZE)
    datapath.visible.show([ipcache])
    ipcache.insert(POD_B1.address(4), Entry(131_073))
    run_packet(datapath.program(Direction.EGRESS)[1], Flow().udp(), repeat=3)
    assert datapath.counters.read(Direction.EGRESS).hit == 3
    ipcache.close()
    datapath.close()


def test_pinned_maps_are_used_again(
    first: tuple[Path, dict[str, object]], pins: Pins, no_compiler: None
) -> None:
    """As with a compiler: what an agent leaves is its successor's, but for signals and views."""
    file, _ = first
    one = load(pins, SIZE, file)
    one.config.write(DatapathConfig(rearm_s=7))
    signals = one.signals.events.map_id
    one.close()
    two = load(pins, SIZE, file)
    assert two.config.read().rearm_ns == 7_000_000_000
    assert two.signals.events.map_id != signals
    two.close()


def test_other_size_of_the_ipcache_needs_no_compiler(
    first: tuple[Path, dict[str, object]], pins: Pins, no_compiler: None
) -> None:
    """No program knows it."""
    load(pins, 2 * SIZE, first[0]).close()
    opened = Map.pinned(pins.path("lm_owned"))
    assert opened.layout.max_entries == journal_size(2 * SIZE)
    opened.close()


def test_journal_of_an_earlier_version_is_written_on(
    first: tuple[Path, dict[str, object]], pins: Pins, no_compiler: None
) -> None:
    """It had as many lines as the ipcache has entries, and made them one by one."""
    pins.prepare(SIZE)
    older = Map.create("lm_owned", MapLayout(MAP_TYPE_HASH, 24, 56, 512_000, BPF_F_NO_PREALLOC))
    libbpf.pin(older.fd, pins.path("lm_owned"))
    key, line = abi.pack_address_key(bytes(4)), abi.pack_owned(abi.OwnedEntry(Entry(2), Entry(2), 1))
    older.update(key, line)
    older.close()
    opened = load(pins, SIZE, first[0])
    assert opened.journal.size == 512_000
    assert dict(opened.journal.items()) == {bytes(4): abi.unpack_owned(line)}
    opened.close()


def test_file_is_readable_by_its_owner_alone(first: tuple[Path, dict[str, object]]) -> None:
    """What is in it goes into the kernel."""
    found = first[0].stat()
    assert (found.st_uid, found.st_mode & 0o777) == (os.geteuid(), 0o600)
    assert [path.name for path in first[0].parent.iterdir()] == [first[0].name]


def truncated(content: bytes) -> bytes:
    """Cut a file in two."""
    return content[: len(content) // 2]


def of_other_origin(content: bytes) -> bytes:
    """Make it that of another version."""
    return programcache.encode(msgspec.structs.replace(programcache.decode(content), origin="0" * 64))


def of_other_compiler(content: bytes) -> bytes:
    """Make it that of another BCC under the same name."""
    found = programcache.decode(content)
    (first, (size, time)), *rest = (found.compiler or {}).items()
    return programcache.encode(
        msgspec.structs.replace(found, compiler=dict([(first, (size, time + 1)), *rest]))
    )


def of_compiler_that_is_gone(content: bytes) -> bytes:
    """Make it that of a BCC that has been removed."""
    found = programcache.decode(content)
    return programcache.encode(msgspec.structs.replace(found, compiler={"/nowhere/libbcc.so": (1, 1)}))


def of_compiler_that_is_unknown(content: bytes) -> bytes:
    """Make it that of a BCC that was replaced while it compiled."""
    return programcache.encode(msgspec.structs.replace(programcache.decode(content), compiler=None))


def of_other_form(_content: bytes) -> bytes:
    """Change its owner."""
    return b'{"programs": []}'


def of_no_text(content: bytes) -> bytes:
    """Flip a bit, so that it is no UTF-8 any more."""
    return content.replace(b'"GPL"', b'"\xc7PL"')


def with_another_instruction(content: bytes) -> bytes:
    """Exchange some of a program's code for what is as long."""
    return content.replace(b"AAAA", b"AAAB", 1)


def too_deep(_content: bytes) -> bytes:
    """Nest it deeper than anybody reads."""
    return b'{"nothing":' + b"[" * 100_000


@pytest.mark.parametrize(
    "spoil",
    [
        truncated,
        of_other_origin,
        of_other_compiler,
        of_compiler_that_is_gone,
        of_compiler_that_is_unknown,
        of_other_form,
        of_no_text,
        with_another_instruction,
        too_deep,
    ],
)
def test_useless_file_is_taken_for_none(first: tuple[Path, dict[str, object]], tmp_path: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    """Of another version or kernel, truncated, or not ours."""
    file = tmp_path / "programs.json"
    spoilt = spoil(first[0].read_bytes())
    assert spoilt != first[0].read_bytes()
    file.write_bytes(spoilt)
    assert programcache.read(first[0], source.origin()) is not None
    assert programcache.read(file, source.origin()) is None


@pytest.mark.parametrize("mode", [0o620, 0o602], ids=["group", "others"])
def test_file_that_others_may_write_is_taken_for_none(
    first: tuple[Path, dict[str, object]], tmp_path: Path, mode: int
) -> None:
    """They would write into the kernel."""
    file = tmp_path / "programs.json"
    file.write_bytes(first[0].read_bytes())
    file.chmod(0o600)
    assert programcache.read(file, source.origin()) is not None
    file.chmod(mode)
    assert programcache.read(file, source.origin()) is None


@pytest.mark.parametrize("change", [{"origin": "0" * 64}, {"compiler": None}], ids=["lazymesh", "compiler"])
def test_what_was_compiled_while_something_was_replaced_is_not_kept(
    first: tuple[Path, dict[str, object]], tmp_path: Path, change: dict[str, object]
) -> None:
    """Nobody knows what it was compiled from."""
    found = programcache.read(first[0], source.origin())
    assert found is not None
    with pytest.raises(OSError, match="replaced meanwhile"):
        programcache.write(tmp_path / "programs.json", msgspec.structs.replace(found, **change), found.origin)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))]
)
def test_pipe_or_device_is_read_by_nobody_and_replaced_by_nobody(
    pins: Pins, tmp_path: Path, make, capsys
) -> None:  # type: ignore[no-untyped-def]
    """``--program-cache /dev/null`` for "nowhere" must not cost the node its /dev/null."""
    path = tmp_path / "null"
    make(path)
    before = path.stat()
    load(pins, SIZE, path).close()
    assert "not a regular file" in capsys.readouterr().out
    assert (path.stat().st_ino, path.stat().st_mode) == (before.st_ino, before.st_mode)
    assert pins.path("lm_from_pod").exists()


def test_file_of_another_user_is_taken_for_none(
    first: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    """It may be a trap, in a directory where anybody may write."""
    file = tmp_path / "programs.json"
    file.write_bytes(first[0].read_bytes())
    os.chown(file, 65_534, 65_534)
    assert programcache.read(file, source.origin()) is None


def test_useless_file_is_compiled_over(pins: Pins, tmp_path: Path) -> None:
    """So the start after it has what it needs."""
    file = tmp_path / "below" / "programs.json"
    file.parent.mkdir()
    file.write_text("no JSON", encoding="ascii")
    load(pins, SIZE, file).close()
    assert programcache.read(file, source.origin()) is not None


def refused(one: Program) -> Program:
    """Have a program end in the middle."""
    return msgspec.structs.replace(one, code=one.code[:-8])


def of_unknown_map(one: Program) -> Program:
    """Have a program name a map that there is not."""
    return msgspec.structs.replace(one, maps=dict.fromkeys(one.maps, "lm_nothing"))


@pytest.mark.parametrize(
    ("change", "words"), [(refused, "the kernel refuses lm_from_pod"), (of_unknown_map, "'lm_nothing'")]
)
def test_what_does_not_load_is_compiled_anew(  # type: ignore[no-untyped-def]  # noqa: PLR0917
    first: tuple[Path, dict[str, object]], pins: Pins, tmp_path: Path, change, words: str, capsys
) -> None:
    """With a word about it, and no trace of the attempt but maps."""
    found = programcache.read(first[0], source.origin())
    assert found is not None
    file = tmp_path / "programs.json"
    changed = {name: change(one) for name, one in found.programs.items()}
    programcache.write(file, msgspec.structs.replace(found, programs=changed), found.origin)
    pins.prepare(SIZE)
    before = open_descriptors()
    with pytest.raises(DatapathError, match=words):
        programcache.load(programcache.decode(file.read_bytes()), pins, SIZE)
    assert open_descriptors() == before
    assert not pins.path("lm_from_pod").exists()
    assert not pins.path("lm_view_v1").exists()
    load(pins, SIZE, file).close()
    assert "compiling again" in capsys.readouterr().out
    assert described(pins) == first[1]
    assert programcache.read(file, found.origin) == found


def test_file_that_cannot_be_written_is_said_and_harms_nobody(pins: Pins, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    """A read-only file system: each start compiles."""
    blocked = tmp_path / "file"
    blocked.touch()
    load(pins, SIZE, blocked / "programs.json").close()
    words = capsys.readouterr().out
    assert "could not be cached" in words
    assert "Not a directory" in words
    assert pins.path("lm_from_pod").exists()


def test_missing_capability_is_the_kernel_s_word(first: tuple[Path, dict[str, object]], pins: Pins) -> None:
    """In one line, whichever way was tried first."""
    pins.prepare(SIZE)
    code = (
        "import sys\nfrom pathlib import Path\nfrom lazymesh.datapath.pins import Pins\n"
        "from lazymesh.datapath.program import MeshMaps, load\nfrom lazymesh.errors import DatapathError\n"
        f"try: load(MeshMaps(Pins(Path(sys.argv[1])), {SIZE}), Path(sys.argv[2]))\n"
        "except DatapathError as exc: print('said:', exc)\n"
    )
    words = [*NO_CAPABILITIES, sys.executable, "-c", code, str(pins.directory), str(first[0])]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("said:")]
    assert said.startswith("said: cannot make the map ")
    assert "Operation not permitted" in said


def test_maps_are_found_in_instructions_by_their_opcode_alone() -> None:
    """The second half of a wide instruction, or a constant, may look like anything."""
    wide = bytes((0x18, 0x11, 0, 0, 7, 0, 0, 0)) + bytes((0x18, 0x11, 0, 0, 7, 0, 0, 0))
    constant = bytes((0x18, 0x01, 0, 0, 7, 0, 0, 0)) + bytes(8)
    move = bytes((0xB7, 0x10, 0, 0, 7, 0, 0, 0))
    found = program_of(3, "GPL", move + constant + wide + move, {7: "lm_owned"})
    assert found.maps == {3: "lm_owned"}
    with pytest.raises(KeyError):
        program_of(3, "GPL", wide, {})
