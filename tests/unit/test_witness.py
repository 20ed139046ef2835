"""The witness of the map: whoever looks no more has not seen that all is well."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.support import witness
from tests.support.witness import Witness

if TYPE_CHECKING:
    from pathlib import Path


class NoMap:
    """In place of the map: cannot be opened, and counts how often that was tried."""

    def __init__(self, error: OSError) -> None:
        self.error, self.asked = error, 0

    def pinned(self, pin: Path) -> None:  # noqa: D102
        self.asked += 1
        raise self.error

    def wait(self, times: int) -> None:
        """Return when it was tried so often."""
        until = time.monotonic() + 10
        while self.asked < times:
            assert time.monotonic() < until
            time.sleep(0.001)


def test_what_ends_its_looking_is_raised_at_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty list of wrong identities would mean nothing."""
    no_map = NoMap(OSError(24, "Too many open files"))
    monkeypatch.setattr(witness, "Map", no_map)
    looking = Witness(tmp_path / "pin", every_s=0).__enter__()
    looking._thread.join(10)
    words = r"ended after 0 looks: .*Too many open files"
    with pytest.raises(RuntimeError, match=words):
        looking.insist()
    with pytest.raises(RuntimeError, match=words):
        looking.__exit__(None, None, None)


def test_failure_of_the_block_itself_is_not_hidden_behind_the_witness(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ctrl-C stays Ctrl-C; it is told what else there was."""
    no_map = NoMap(OSError(24, "Too many open files"))
    monkeypatch.setattr(witness, "Map", no_map)
    looking, error = Witness(tmp_path / "pin", every_s=0).__enter__(), KeyboardInterrupt()
    looking._thread.join(10)
    looking.__exit__(KeyboardInterrupt, error, None)
    assert "Too many open files" in error.__notes__[0]


def test_pin_that_is_away_for_a_moment_ends_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A map is being replaced."""
    no_map = NoMap(FileNotFoundError(2, "No such file or directory"))
    monkeypatch.setattr(witness, "Map", no_map)
    with Witness(tmp_path / "pin", every_s=0) as looking:
        no_map.wait(3)
        looking.insist()
