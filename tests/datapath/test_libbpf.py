"""The thin layer over libbpf: system calls in batches, errors as the kernel has them, descriptors given back."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import pytest

from lazymesh.datapath import libbpf
from lazymesh.datapath.libbpf import BPF_F_NO_PREALLOC, BPF_NOEXIST, Map, MapLayout
from lazymesh.errors import DatapathError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BPF_EXIST = 2
HASH = MapLayout(libbpf.MAP_TYPE_HASH, 4, 8, 20_000, BPF_F_NO_PREALLOC)
LRU = MapLayout(libbpf.MAP_TYPE_LRU_HASH, 4, 8, 20_000, 0)
ARRAY = MapLayout(libbpf.MAP_TYPE_ARRAY, 4, 8, 5_000, 0)
TRIE = MapLayout(libbpf.MAP_TYPE_LPM_TRIE, 8, 8, 20_000, BPF_F_NO_PREALLOC)


def elements(kind: int, count: int) -> dict[bytes, bytes]:
    """Return that many different elements."""
    if kind == libbpf.MAP_TYPE_LPM_TRIE:
        return {
            (32).to_bytes(4, "little") + n.to_bytes(4, "big"): n.to_bytes(8, "little") for n in range(count)
        }
    return {n.to_bytes(4, "little"): n.to_bytes(8, "little") for n in range(count)}


@pytest.fixture
def opened(request: pytest.FixtureRequest) -> Iterator[Map]:
    """Return a new map of the layout that the test asks for."""
    made = Map.create("lm_test", request.param)
    yield made
    made.close()


@pytest.mark.parametrize(
    "opened", [HASH, LRU, ARRAY, TRIE], indirect=True, ids=["hash", "LRU", "array", "trie"]
)
@pytest.mark.parametrize("count", [5_000])
def test_elements_written_in_batches_are_read_in_batches(opened: Map, count: int) -> None:
    """More than one batch each way, every element exactly once."""
    wanted = elements(opened.layout.kind, count)
    opened.update_many(list(wanted.items()))
    listed = list(opened.items())
    assert len(listed) == count
    assert dict(listed) == wanted


@pytest.mark.parametrize("opened", [HASH, LRU, TRIE], indirect=True, ids=["hash", "LRU", "trie"])
@pytest.mark.parametrize("count", [0, 1, 4_096, 4_097])
def test_batch_borders_lose_nothing(opened: Map, count: int) -> None:
    """Empty, one, exactly a batch, one more; then deleted, some of it twice."""
    wanted = elements(opened.layout.kind, count)
    opened.update_many(list(wanted.items()))
    assert dict(opened.items()) == wanted
    assert opened.is_empty() is (count == 0)
    opened.delete_many([*wanted, *list(wanted)[:3]])
    assert list(opened.items()) == []
    assert opened.is_empty()


@pytest.mark.parametrize("opened", [ARRAY], indirect=True, ids=["array"])
def test_array_is_zeroed_whole(opened: Map) -> None:
    """Its first element, its last and what lies between."""
    last = opened.layout.max_entries - 1
    for index in (0, 1, last):
        opened.update(index.to_bytes(4, "little"), b"\xff" * opened.layout.value_size)
    opened.zero()
    values = [value for _, value in opened.items()]
    assert values == [bytes(opened.layout.value_size)] * (last + 1)


@pytest.mark.parametrize("opened", [HASH, TRIE], indirect=True, ids=["hash", "trie"])
def test_kernel_without_batches_is_read_one_by_one(opened: Map, monkeypatch: pytest.MonkeyPatch) -> None:
    """LPM tries have had batches since 5.13; older kernels say EINVAL or ENOTSUPP."""
    wanted = elements(opened.layout.kind, 300)

    class Old:
        """A libbpf on an old kernel."""

        def __getattr__(self, name: str) -> object:
            if name in ("bpf_map_lookup_batch", "bpf_map_update_batch"):
                return lambda *_: -libbpf.ENOTSUPP
            return getattr(libbpf.library(), name)

    monkeypatch.setattr(opened, "_lib", Old())
    opened.update_many(list(wanted.items()))
    assert dict(opened.items()) == wanted


@pytest.mark.parametrize("opened", [TRIE], indirect=True, ids=["trie"])
def test_interrupted_batch_is_taken_up_again(opened: Map, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels before 6.13 end a batch with EINTR when an element goes away under their hands."""
    wanted = elements(opened.layout.kind, 5_000)
    opened.update_many(list(wanted.items()))
    asked = []

    class Interrupted:
        """A libbpf on such a kernel: every second batch is empty, every other ends early."""

        def __getattr__(self, name: str) -> object:
            return self.batch if name == "bpf_map_lookup_batch" else getattr(libbpf.library(), name)

        def batch(self, *arguments: object) -> int:
            asked.append(1)
            count = arguments[5]._obj  # type: ignore[attr-defined]
            if len(asked) % 2:
                count.value = 0
                return -errno.EINTR
            count.value = min(count.value, 700)
            result: int = libbpf.library().bpf_map_lookup_batch(*arguments)
            return result or -errno.EINTR

    monkeypatch.setattr(opened, "_lib", Interrupted())
    listed = list(opened.items())
    assert dict(listed) == wanted
    assert len(listed) == 5_000


@pytest.mark.parametrize("opened", [replace(TRIE, max_entries=5_000)], indirect=True, ids=["trie"])
def test_count_that_cannot_be_is_none(opened: Map, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the element at which the kernel has arrived is deleted, it starts the trie over and returns elements again."""
    wanted = elements(opened.layout.kind, 5_000)
    opened.update_many(list(wanted.items()))
    assert opened.count() == 5_000
    batches, one_by_one = opened._batches, opened._items_one_by_one

    def while_they_go() -> Iterator[tuple[bytes, bytes, int]]:
        for keys, values, count in batches():
            yield keys, values, count
            opened.delete(keys[8 * (count - 1) : 8 * count])

    monkeypatch.setattr(opened, "_batches", while_they_go)
    # Kernels without batches of a trie do so with some elements only, by their neighbours: here, with all.
    monkeypatch.setattr(opened, "_items_one_by_one", lambda: chain(one_by_one(), one_by_one()))
    assert opened.count() is None
    assert opened._sum(1 for _ in opened._items_one_by_one()) is None


@pytest.mark.parametrize("opened", [HASH], indirect=True, ids=["hash"])
def test_flags_are_the_kernel_s(opened: Map) -> None:
    """BPF_NOEXIST and BPF_EXIST refuse with EEXIST and ENOENT."""
    key, value = bytes(4), bytes(8)
    with pytest.raises(FileNotFoundError):
        opened.update(key, value, BPF_EXIST)
    opened.update(key, value, BPF_NOEXIST)
    with pytest.raises(FileExistsError):
        opened.update(key, value, BPF_NOEXIST)
    assert opened.lookup(key) == value
    assert opened.lookup(b"else") is None
    assert opened.delete(key)
    assert not opened.delete(key)


def test_closed_map_stays_closed() -> None:
    """Closing twice must not close another descriptor."""
    made = Map.create("lm_test", HASH)
    number = made.fd
    made.close()
    reused = os.open("/dev/null", os.O_RDONLY)
    try:
        assert reused == number
        made.close()
        assert os.fstat(reused)
    finally:
        os.close(reused)
    with pytest.raises(OSError, match="Bad file descriptor"):
        made.lookup(bytes(4))


def test_layout_reads_like_bpftool_s() -> None:
    """It appears in messages to people."""
    assert str(HASH) == "type 1, key 4B, value 8B, max_entries 20000, flags 0x1"


def test_map_is_the_same_behind_its_pin(bpffs: Path) -> None:
    """Pinned, replaced by another, opened again: the id shows which."""
    first, second = Map.create("lm_test", HASH), Map.create("lm_test", HASH)
    path = bpffs / "a_map"
    libbpf.pin(first.fd, path)
    again = Map.pinned(path)
    assert (again.map_id, again.layout) == (first.map_id, HASH)
    libbpf.pin(second.fd, path)
    replaced = Map.pinned(path)
    assert replaced.map_id == second.map_id != first.map_id
    for opened in (first, second, again, replaced):
        opened.close()


def test_missing_libbpf_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the distribution's, so pip cannot have brought it."""

    def missing(*_: object, **__: object) -> None:
        raise OSError("cannot open shared object file")

    monkeypatch.setattr(libbpf.ctypes, "CDLL", missing)
    with pytest.raises(DatapathError, match=r"libbpf\.so\.1 is missing: install the package libbpf1"):
        libbpf.library.__wrapped__()
