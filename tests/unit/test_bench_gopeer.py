"""The Go program that the benchmark compares with: it has what the agent has, and its absence or end is told."""

from __future__ import annotations

import mmap
import subprocess
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from bench import gopeer
from bench.gopeer import Peer
from lazymesh.datapath.signals import RING_PAGES

if TYPE_CHECKING:
    from pathlib import Path

    from bench.bed import Bed
    from tests.support.lab import Pod


def peer(*argv: str) -> Peer:
    """Return a peer whose process is another one."""
    bed = cast("Bed", SimpleNamespace(lab=None, url="http://127.0.0.1:2379", tls=None))
    made = Peer(bed, cast("Pod", None))
    pipe = subprocess.PIPE
    made._process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True)
    return made


def test_ring_is_as_large_as_the_agents() -> None:
    """With half of it the Go program lost signals in storms in which the agent lost none."""
    words = Peer(cast("Bed", SimpleNamespace(lab=None, url="x", tls=None)), cast("Pod", None))._words
    assert words[words.index("-ring") + 1] == str(RING_PAGES * mmap.PAGESIZE)


@pytest.mark.parametrize("killed", [False, True])
def test_end_of_the_program_is_told(killed: bool) -> None:
    """Whoever asks it, and whoever waits for its next entry; before the question or over it."""
    ended = peer("sh", "-c", "read line; exit 7")
    if killed:
        ended._process.kill()
        ended._process.wait()
    code = -9 if killed else 7
    with pytest.raises(
        RuntimeError, match=f"^the Go program has ended with exit code {code}; see its words above$"
    ):
        ended.counts()
    with pytest.raises(RuntimeError, match=f"exit code {code}"):
        ended.next_entry()
    ended._end()


def test_program_that_cannot_be_built_is_left_out_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without Go, or with one that refuses it: said meanwhile, and kept with the figures."""
    said: list[str] = []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gopeer.build(said.append) == {"Go": "no go on the PATH"}
    go = tmp_path / "go"
    go.write_text("#!/bin/sh\necho 'go: downloading' >&2\necho 'go: no network' >&2\nexit 1\n")
    go.chmod(0o755)
    monkeypatch.setattr(gopeer, "BINARY", tmp_path / "cache" / "peer")
    assert gopeer.build(said.append) == {"Go": "go: no network"}
    assert said == [
        "the Go program is left out: no go on the PATH",
        "the Go program is left out: go: no network",
    ]
    go.write_text("#!/bin/sh\n")
    assert gopeer.build(said.append) == {}
