"""The directory under the BPF file system: what may be there, who holds it, what is left of it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from lazymesh.datapath import abi, libbpf, pins
from lazymesh.datapath.libbpf import Map, MapLayout
from lazymesh.datapath.pins import Pins, alone, check_bpffs, expected_layouts
from lazymesh.datapath.program import open_own_ipcache
from lazymesh.datapath.programs import load_idle
from lazymesh.errors import DatapathError
from tests.datapath.conftest import open_descriptors
from tests.support.namespaces import NamespaceSet

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.datapath.conftest import Bench
    from tests.support.namespaces import Namespace

SIZE = 1_000


def pin_map(path: Path, layout: MapLayout) -> None:
    """Leave a map behind, as another life of lazymesh would."""
    made = Map.create("lm_test", layout)
    libbpf.pin(made.fd, path)
    made.close()


@pytest.mark.parametrize("struct", ["key", "value"])
def test_expected_sizes_are_those_of_the_structs(struct: str) -> None:
    """The table of layouts repeats numbers that the header decides."""
    sizes = {name: getattr(layout, f"{struct}_size") for name, layout in expected_layouts(SIZE).items()}
    structs = {
        "key": {
            "lm_ipcache": abi.IpcacheKey,
            "lm_mesh_cidrs": abi.IpcacheKey,
            "lm_owned": abi.IpcacheKey,
            "lm_dedup": abi.DedupKey,
            "lm_policy": abi.PolicyKey,
            "lm_flows": abi.FlowKey,
        },
        "value": {
            "lm_ipcache": abi.IpcacheEntry,
            "lm_mesh_cidrs": abi.MeshCidr,
            "lm_owned": abi.Owned,
            "lm_config": abi.Config,
            "lm_counters": abi.Counters,
            "lm_flows": abi.Flow,
        },
    }[struct]
    assert {name: sizes[name] for name in structs} == {
        name: ctypes.sizeof(mirror) for name, mirror in structs.items()
    }


def test_loaded_maps_have_the_expected_layouts(bench: Bench) -> None:
    """What the program made is what a later load will insist on."""
    size = bench.ipcache.max_entries
    assert {name: opened.layout for name, opened in bench.maps.items()} == expected_layouts(size)


def test_place_that_is_no_bpf_file_system_is_told_how_to_become_one(tmp_path: Path) -> None:
    """Also one that does not exist."""
    for path in (tmp_path, tmp_path / "nowhere"):
        expected = rf"{path} is not a BPF file system: run `mount -t bpf bpf {path}`.*--bpffs"
        with pytest.raises(DatapathError, match=expected):
            Pins.under(path).prepare(SIZE)


def test_mount_point_may_have_blanks_in_its_name(tmp_path: Path) -> None:
    """The kernel's list of mounts writes them as octal numbers."""
    directory = tmp_path / "a b\\c"
    directory.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", directory], check=True)
    try:
        check_bpffs(directory)
    finally:
        subprocess.run(["umount", directory], check=True)


def test_fresh_directory_is_ours_alone(bpffs: Path) -> None:
    """Nobody but root reads pins, and preparing twice does no harm."""
    place = Pins.under(bpffs)
    for _ in range(2):
        place.prepare(SIZE)
    assert place.directory == bpffs / "lazymesh"
    assert place.directory.stat().st_mode & 0o777 == 0o700


def test_pins_of_this_version_are_accepted(bpffs: Path) -> None:
    """That is how entries outlive an agent."""
    place = Pins.under(bpffs)
    place.prepare(SIZE)
    for name, layout in expected_layouts(SIZE).items():
        pin_map(place.path(name), layout)
    place.prepare(SIZE)


@pytest.mark.parametrize("name", sorted(set(expected_layouts(SIZE)) - set(pins.LASTING)))
def test_pin_of_another_layout_is_made_anew(bpffs: Path, name: str) -> None:
    """Another version of lazymesh was here: what it held is learned again, all other pins stay."""
    place = Pins.under(bpffs)
    place.prepare(SIZE)
    for other, layout in expected_layouts(SIZE).items():
        pin_map(place.path(other), layout if other != name else MapLayout(libbpf.MAP_TYPE_HASH, 4, 12, 77, 0))
    assert place.prepare(SIZE) == [name]
    assert {path.name for path in place.directory.iterdir()} == set(expected_layouts(SIZE)) - {name}


@pytest.mark.parametrize("name", pins.LASTING)
def test_entries_or_journal_of_another_layout_are_refused_by_name(bpffs: Path, name: str) -> None:
    """Attaching over it would read and write nonsense; the message says which map and what to do."""
    place = Pins.under(bpffs)
    place.prepare(SIZE)
    pin_map(place.path(name), MapLayout(libbpf.MAP_TYPE_HASH, 4, 12, 77, 0))
    with pytest.raises(DatapathError) as caught:
        place.prepare(SIZE)
    message = str(caught.value)
    assert message.startswith(
        f"{place.path(name)} has another layout (type 1, key 4B, value 12B, max_entries 77,"
    )
    assert "remove" in message
    assert "--cleanup" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("lines", "bytes_of_line", "serves"),
    [(9_000, 56, True), (1_100, 56, True), (1_024, 56, False), (9_000, 48, False)],
)
def test_journal_of_another_size_serves_if_it_has_room(
    bpffs: Path, lines: int, bytes_of_line: int, serves: bool
) -> None:
    """Its lines are read as ever, however they were made, and our budget is by them; with too few there is none."""
    place = Pins.under(bpffs)
    place.prepare(SIZE)
    other = MapLayout(libbpf.MAP_TYPE_HASH, 24, bytes_of_line, lines, libbpf.BPF_F_NO_PREALLOC)
    pin_map(place.path(pins.JOURNAL), other)
    with contextlib.nullcontext() if serves else pytest.raises(DatapathError, match="another layout"):
        place.prepare(SIZE)
    assert place.path(pins.JOURNAL).exists()


@pytest.mark.parametrize(
    ("map_size", "journal_of", "expected"),
    [(512_000, 512_000, 25_600), (20_000, 512_000, 1_000), (2_000_000, 512_000, 25_600)],
)
def test_budget_is_a_twentieth_of_the_map_and_no_more_than_the_journal_is_for(
    map_size: int, journal_of: int, expected: int
) -> None:
    """Cilium's map may be larger than the one that the journal was made for."""
    assert pins.budget(map_size, pins.journal_size(journal_of)) == expected


def test_ipcache_of_another_size_stays(bpffs: Path) -> None:
    """A map cannot grow, and a changed value in a chart must not end every agent: status reports it."""
    place = Pins.under(bpffs)
    place.prepare(SIZE)
    pin_map(place.path("lm_ipcache"), expected_layouts(SIZE)["lm_ipcache"])
    place.prepare(2 * SIZE)
    ipcache = open_own_ipcache(place, 2 * SIZE)
    assert ipcache.max_entries == SIZE
    ipcache.close()


def test_program_in_place_of_a_map_is_refused(bpffs: Path) -> None:
    """Whatever is there, one line names it."""
    place = Pins.under(bpffs)
    place.prepare(SIZE)
    program = load_idle()
    libbpf.pin(program, place.path("lm_owned"))
    os.close(program)
    with pytest.raises(DatapathError, match=r"lm_owned is not a BPF map"):
        place.prepare(SIZE)


def test_who_may_not_write_there_is_told_so(bpffs: Path) -> None:
    """One line, no traceback: the commonest mistake is a missing sudo."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom lazymesh.datapath.pins import Pins\n"
        "from lazymesh.errors import DatapathError\n"
        "try:\n    Pins.under(Path(sys.argv[1])).prepare(10)\nexcept DatapathError as exc:\n    print(exc)\n"
    )
    bpffs.chmod(0o755)
    nobody = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--reuid=65534", "--clear-groups"]
    done = subprocess.run(
        [*nobody, sys.executable, "-c", code, bpffs], capture_output=True, text=True, check=False
    )
    assert done.stdout == f"cannot make {bpffs}/lazymesh: Permission denied (lazymesh runs as root)\n", (
        done.stderr
    )


@pytest.fixture
def nodes() -> Iterator[NamespaceSet]:
    """Return two network namespaces in which no agent runs."""
    with NamespaceSet(["one", "other"]) as spaces:
        yield spaces


def hold(namespace: Namespace, *directories: Path) -> contextlib.ExitStack:
    """Be the only one there, until the stack is closed."""
    stack = contextlib.ExitStack()
    namespace.call(stack.enter_context, alone(*directories))
    return stack


def test_second_agent_finds_the_directory_taken(nodes: NamespaceSet, bpffs: Path) -> None:
    """Two agents would evict each other's entries, from wherever; when the first is gone the second may."""
    place = Pins.under(bpffs)
    place.prepare(SIZE)
    with hold(nodes["one"], place.directory):
        holder = rf"another lazymesh agent \(process {os.getpid()}\) holds .*/lazymesh: stop it first"
        for namespace in ("one", "other"):
            with pytest.raises(DatapathError, match=holder):
                hold(nodes[namespace], place.directory)
    hold(nodes["other"], place.directory).close()


def test_second_agent_with_other_pins_is_refused_too(nodes: NamespaceSet, tmp_path: Path) -> None:
    """They would be on the same interfaces, and the one's uninstallation would take off the other's programs."""
    for name in ("pins", "others"):
        (tmp_path / name).mkdir()
    with hold(nodes["one"], tmp_path / "pins"):
        holder = (
            rf"another lazymesh agent \(process {os.getpid()}\) runs in this network namespace: stop it first"
        )
        with pytest.raises(DatapathError, match=holder):
            hold(nodes["one"], tmp_path / "others")
        with pytest.raises(DatapathError, match=holder):
            hold(nodes["one"])
        hold(nodes["other"], tmp_path / "others").close()
    hold(nodes["one"]).close()


def test_refused_lock_keeps_no_descriptor(nodes: NamespaceSet, tmp_path: Path) -> None:
    """Or waiting for the other agent to end would take forever."""
    with hold(nodes["one"], tmp_path):
        before = open_descriptors()
        for _ in range(3):
            with pytest.raises(DatapathError):
                hold(nodes["one"], tmp_path)
            with pytest.raises(DatapathError):
                hold(nodes["one"])
        assert open_descriptors() == before


def test_pins_that_somebody_removed_are_named(bench: Bench) -> None:
    """The ipcache is missed only where it is ours."""
    place = bench.datapath.pins
    assert place.missing(own_ipcache=True) == []
    ours = {path.name for path in place.directory.glob("lm_*")}
    for name in ours:
        place.path(name).rename(place.path("away_" + name))
    try:
        assert set(place.missing(own_ipcache=True)) == ours
        assert set(place.missing(own_ipcache=False)) == ours - {pins.IPCACHE}
    finally:
        for name in ours:
            place.path("away_" + name).rename(place.path(name))


def test_remove_leaves_nothing_of_ours(bpffs: Path) -> None:
    """Maps, programs and the directory; twice does no harm."""
    place = Pins.under(bpffs)
    place.prepare(SIZE)
    for name, layout in expected_layouts(SIZE).items():
        pin_map(place.path(name), layout)
    pin_map(place.path(pins.SIGNALS), expected_layouts(SIZE)["lm_config"])
    pin_map(place.path("lm_of_another"), expected_layouts(SIZE)["lm_config"])
    for name in pins.PROGRAMS:
        program = load_idle()
        libbpf.pin(program, place.path(name))
        os.close(program)
    for _ in range(2):
        place.remove()
    assert not place.directory.exists()


def test_remove_leaves_what_is_not_ours(bpffs: Path) -> None:
    """A foreign pin in our directory stays, and so does the directory."""
    place = Pins.under(bpffs)
    place.prepare(SIZE)
    pin_map(place.path("somebody_else_s"), expected_layouts(SIZE)["lm_config"])
    place.remove()
    assert [path.name for path in place.directory.iterdir()] == ["somebody_else_s"]
