"""Hostile frames by the ten thousand: what becomes of each is what an independent reading of the design says.

``--frames-seed N`` sends others, or the same ones again; ``scripts/fuzz frames`` sends a million, or a single one.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests.support import frames
from tests.support.barrage import SETTINGS, Barrage
from tests.support.prog_run import Tap

if TYPE_CHECKING:
    from tests.datapath.conftest import Bench
    from tests.support.namespaces import Namespace

COUNTS = {"pass": 200_000, "drop": 20_000, "policy": 60_000}
ON_A_DEVICE = 80_000


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Return the seed that was asked for, or a new one; either way it is printed when a test fails."""
    asked = request.config.getoption("--frames-seed")
    chosen = random.SystemRandom().randrange(1 << 32) if asked is None else int(asked)
    print(f"frames of --frames-seed {chosen}")
    return chosen


@pytest.mark.parametrize("mode", SETTINGS)
def test_frames_become_what_the_reference_says(bench: Bench, seed: int, mode: str) -> None:
    """Never a wrong miss, never a wrong signal, each counted once, and passed on whole unless the settings drop it."""
    barrage = Barrage(bench, mode)
    barrage.send(seed, range(COUNTS[mode]))
    causes = barrage.tally.causes
    assert causes.total() == COUNTS[mode]
    assert all(causes[cause] > COUNTS[mode] // 50 for cause in ("hit", "missed", "not_mesh", "not_parsed"))


def test_frames_on_a_device_become_what_the_reference_says(bench: Bench, node: Namespace, seed: int) -> None:
    """As a device delivers them: of any length, in page fragments, and with the outer tag taken off."""
    barrage = Barrage(bench)
    with Tap(node, bench.datapath.pins.path("lm_from_pod")) as tap:
        barrage.receive(tap, seed, range(ON_A_DEVICE))
    assert barrage.tally.causes["missed"] > ON_A_DEVICE // 50


def test_one_frame_that_is_judged_differently_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail, and says which frame it was."""
    number = next(n for n in range(1_000) if frames.expected(frames.frame(3, n)).cause == "hit")
    peer = frames.expected(frames.frame(3, number)).peer
    right = frames.judge
    monkeypatch.setattr(frames, "judge", lambda who: ("not_mesh", 0) if who == peer else right(who))
    with pytest.raises(
        AssertionError, match=f"^seed 3, frame {number} .*counted .*'hit'.*expected .*'not_mesh'"
    ):
        Barrage(bench).send(3, range(1_000))
    monkeypatch.setattr(frames, "judge", right)
    Barrage(bench).send(3, range(1_000))
