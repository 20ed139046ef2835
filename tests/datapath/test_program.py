"""Loading for real: pins are used again, nothing heavy stays behind, and the verifier has an easy life."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazymesh.core.model import Direction, Entry
from lazymesh.datapath import abi, libbpf, program
from lazymesh.datapath.libbpf import Map
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
)
from lazymesh.datapath.program import Datapath, MeshMaps, open_own_ipcache
from lazymesh.datapath.programs import load_idle
from lazymesh.datapath.settingsmap import DatapathConfig
from lazymesh.errors import DatapathError
from tests.datapath.conftest import IPCACHE_SIZE, mounted_bpffs, open_descriptors
from tests.datapath.test_abi_layout import tool
from tests.support.loaded import LoadedDatapath, load, open_loaded
from tests.support.packets import POD_B1, Flow
from tests.support.prog_run import TC_ACT_UNSPEC, run_packet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.datapath.conftest import Bench

SIZE = 1_000


def prog_ids(datapath: Datapath) -> list[int]:
    """Return the kernel's ids of both programs."""
    return [int(_fdinfo(datapath.program(direction)[1])["prog_id"]) for direction in Direction]


def _fdinfo(descriptor: int) -> dict[str, str]:
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@pytest.fixture(scope="module")
def own_bpffs() -> Iterator[Path]:
    """Return a BPF file system where pins may come and go."""
    with mounted_bpffs() as directory:
        yield directory


def test_second_load_uses_what_is_pinned(own_bpffs: Path) -> None:
    """Entries, journal, settings, policy and counters outlive an agent; programs and signals are new."""
    pins = Pins.under(own_bpffs)
    first = load(pins, SIZE)
    address, entry = POD_B1.address(4), Entry(131_073)
    line = abi.OwnedEntry(entry, entry, 2)
    ipcache = open_own_ipcache(pins, SIZE)
    first.visible.show([ipcache])
    ipcache.insert(address, entry)
    first.journal.write(address, line)
    first.policy.apply([(Direction.EGRESS, 131_073)], [])
    first.config.write(DatapathConfig(rearm_s=3))
    assert run_packet(first.program(Direction.EGRESS)[1], Flow().udp(), repeat=5).verdict == TC_ACT_UNSPEC
    before = prog_ids(first), ipcache.map_id, first.signals.events.map_id
    ipcache.close()
    first.close()

    second = load(pins, SIZE)

    again = open_own_ipcache(pins, SIZE)
    second.visible.show([again])
    assert again.lookup(address) == entry
    assert dict(second.journal.items()) == {address: line}
    assert second.policy.items() == {(Direction.EGRESS, 131_073)}
    assert second.config.read().rearm_ns == 3_000_000_000
    assert second.counters.read(Direction.EGRESS).hit == 5
    ids, ipcache_id, signals_id = prog_ids(second), again.map_id, second.signals.events.map_id
    assert ipcache_id == before[1]
    assert signals_id != before[2]
    assert not set(ids) & set(before[0])
    assert run_packet(second.program(Direction.EGRESS)[1], Flow().udp()).verdict == TC_ACT_UNSPEC
    assert second.counters.read(Direction.EGRESS).hit == 6

    again.close()
    second.close()
    pins.remove()
    assert not pins.directory.exists()
    assert_gone_from_the_kernel(map_id=ipcache_id)


def assert_gone_from_the_kernel(map_id: int) -> None:
    """Wait until nothing holds a map any more; the kernel frees it in its own time."""
    deadline = time.monotonic() + 10
    while _exists(map_id):
        assert time.monotonic() < deadline, f"somebody still holds map {map_id}"
        time.sleep(0.02)


def _exists(map_id: int) -> bool:
    command = [tool("bpftool"), "map", "show", "id", str(map_id)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_loading_leaves_the_parent_light(own_bpffs: Path) -> None:
    """BCC and LLVM are imported in the compiler's process only, and their memory goes with it."""
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom lazymesh.datapath import program, interfaces, signals\n"
        "from lazymesh.datapath.pins import Pins\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"datapath = program.load(program.MeshMaps(Pins.under(Path(sys.argv[1])), {SIZE}))\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "datapath.close()\ndatapath.pins.remove()\n"
        "print('bcc' in sys.modules, after - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, own_bpffs], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    imported, grown_kb = done.stdout.split()
    assert imported == "False"
    assert int(grown_kb) < 5_000


def test_closed_datapath_keeps_no_descriptor(loaded: LoadedDatapath) -> None:
    """Maps and programs go back to the kernel; pins stay."""
    before = open_descriptors()
    again = open_loaded(loaded.pins, IPCACHE_SIZE)
    assert open_descriptors() > before
    again.close()
    again.close()
    assert open_descriptors() == before


def test_names_in_the_kernel_are_ours(bench: Bench) -> None:
    """Cilium takes everything that starts with cil_ for its own, and removes it."""
    pins = bench.datapath.pins
    for name in PROGRAMS:
        command = [tool("bpftool"), "prog", "show", "pinned", pins.path(name), "-j"]
        found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        assert found["name"] == name
        assert found["type"] == "sched_cls"
    for name, opened in bench.maps.items():
        command = [tool("bpftool"), "map", "show", "id", str(opened.map_id), "-j"]
        assert json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["name"] == name


@pytest.mark.parametrize("direction", list(Direction), ids=["egress", "ingress"])
def test_verifier_has_an_easy_life(bench: Bench, direction: Direction) -> None:
    """Far from every limit of a 5.10 kernel: stack, instructions, and no helper that it lacks."""
    name, descriptor = bench.datapath.program(direction)
    info = _fdinfo(descriptor)
    if "verified_insns" in info:  # since 5.16
        assert int(info["verified_insns"]) < 100_000
    command = [tool("bpftool"), "prog", "dump", "xlated", "pinned", bench.datapath.pins.path(name)]
    listing = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert len(listing.splitlines()) < 4_096
    assert max(int(depth) for depth in re.findall(r"r10 -\s?(\d+)", listing)) <= 320
    helpers = {
        "bpf_clone_redirect",
        "bpf_get_hash_recalc",
        "bpf_ktime_get_ns",
        "bpf_skb_event_output",
        "bpf_skb_load_bytes",
        "bpf_skb_pull_data",
        "bpf_skb_store_bytes",
        "bpf_user_rnd_u32",
    }
    called = set(re.findall(r"call (\w+)#", listing))
    assert "trie_lookup_elem" in called
    assert "bpf_map_lookup_elem" not in called, "lookups in two kinds of map were compiled into one"
    assert {helper for helper in called if "map_" not in helper and "trie_" not in helper} <= helpers


@pytest.fixture
def prepared(own_bpffs: Path) -> Iterator[Pins]:
    """Return pins of nothing yet."""
    pins = Pins.under(own_bpffs)
    yield pins
    pins.remove()


def as_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """Put a shell script in place of the interpreter that runs the compiler."""
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))


def test_dead_compiler_is_reported_with_its_last_words(
    prepared: Pins, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Killed for memory, no module of that name: whatever it said last."""
    as_compiler(monkeypatch, tmp_path, "echo first >&2; echo 'No module named lazymesh' >&2; exit 7")
    with pytest.raises(
        DatapathError, match="the datapath's compiler died with status 7: No module named lazymesh"
    ):
        load(prepared, SIZE)
    as_compiler(monkeypatch, tmp_path, "kill -9 $$")
    with pytest.raises(DatapathError, match="the datapath's compiler died with status -9: no output"):
        load(prepared, SIZE)


def test_slow_compiler_is_given_up(prepared: Pins, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A node that cannot compile in a minute has other troubles, and the message says so."""
    as_compiler(monkeypatch, tmp_path, "exec sleep 30")
    monkeypatch.setattr(program, "COMPILE_TIMEOUT_S", 0.05)
    with pytest.raises(DatapathError, match=r"compiling the datapath took more than 0\.05 s"):
        load(prepared, SIZE)


def test_refusal_of_the_compiler_is_passed_on(
    prepared: Pins, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its one line is the error's message."""
    as_compiler(monkeypatch, tmp_path, """echo '{"error": "one line"}'""")
    with pytest.raises(DatapathError, match=r"^one line$"):
        load(prepared, SIZE)


@pytest.mark.parametrize("missing", ["lm_owned", "lm_counters", "lm_view_v1", "lm_from_uplink"])
def test_missing_pin_is_an_error_that_keeps_no_descriptor(prepared: Pins, missing: str) -> None:
    """A pin may be removed at any moment: it is named in one line, and nothing stays open."""
    prepared.prepare(SIZE)
    some = expected_layouts(SIZE)["lm_config"]
    for name, layout in {
        **expected_layouts(SIZE),
        **dict.fromkeys((SIGNALS, DOORBELL, *VIEWS), some),
    }.items():
        made = Map.create("lm_test", layout)
        libbpf.pin(made.fd, prepared.path(name))
        made.close()
    for name in (*PROGRAMS, *HOLD_PROGRAMS, HOLD_FILTER, INSTALL):
        empty = load_idle()
        libbpf.pin(empty, prepared.path(name))
        os.close(empty)
    maps = MeshMaps(prepared, SIZE)
    Datapath(maps).close()
    prepared.path(missing).unlink()
    before = open_descriptors()
    with pytest.raises(DatapathError, match=rf"no map at|cannot open the program at .*/lazymesh/{missing}"):
        Datapath(maps)
    assert open_descriptors() == before
    maps.close()


def test_map_type_of_signals_is_a_perf_event_array(bench: Bench) -> None:
    """Of our own: a second reader of Cilium's would steal its events."""
    signals = bench.datapath.signals.events
    assert signals.layout.kind == 4
    opened = Map.pinned(bench.datapath.pins.path("lm_signals"))
    assert opened.map_id == signals.map_id
    opened.close()
