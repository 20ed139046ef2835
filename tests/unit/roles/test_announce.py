"""Who has heard, who cannot show it, and who has not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from lazymesh.errors import LazymeshError
from lazymesh.kube.api import Pod
from lazymesh.roles.announce import REFRESH_S, Time, announce, is_marked

if TYPE_CHECKING:
    from pathlib import Path


@dataclass
class Cluster:
    """Pods that hear so many seconds after the word is given; None: never."""

    hears: dict[str, float | None]
    deaf_before: frozenset[str] = frozenset()
    """Never ready."""
    crashing: frozenset[str] = frozenset()
    """Each of its lives is one look long, and it waits for the next as long as a kubelet lets it."""
    restarts_at: float | None = None
    """When all are started again; each is not ready then for some seconds."""
    away: range = range(0)
    """Seconds in which the API does not answer."""
    now: float = 0.0
    told_at: float | None = None
    config: dict[str, str] = field(default_factory=dict)

    def set_config(self, name: str, values: dict[str, str]) -> None:
        """Note the word."""
        assert name == "lazymesh"
        self.told_at = self.now
        self.config |= values

    def pods(self, selector: str) -> list[Pod]:
        """Tell who is ready."""
        assert selector == "app=lazymesh"
        if int(self.now) in self.away:
            raise LazymeshError("https://api does not answer GET pods: timed out")
        return [Pod(name, f"node-of-{name}", self._ready(name), self._container(name)) for name in self.hears]

    def _container(self, name: str) -> str:
        if name in self.crashing:
            return f"{name}-{self.now}" if self.now % 40 == 0 else ""
        again = self.restarts_at is not None and self.now >= self.restarts_at
        return f"{name}-{int(again)}"

    def _ready(self, name: str) -> bool:
        after = self.hears[name]
        heard = self.told_at is not None and after is not None and self.now >= self.told_at + after
        starting = self.restarts_at is not None and 0 <= self.now - self.restarts_at < 6
        return not heard and not starting and name not in self.deaf_before | self.crashing

    def announce(self, timeout_s: float = 300.0) -> int:
        """Do it, in no time."""
        return announce(self, "lazymesh", "app=lazymesh", timeout_s, Time(lambda: self.now, self._sleep))

    def _sleep(self, seconds: float) -> None:
        self.now += seconds


def test_returns_as_soon_as_everybody_has_heard() -> None:
    """The slowest node decides."""
    cluster = Cluster({"x": 10.0, "y": 60.0})
    assert cluster.announce() == 2
    assert cluster.config == {"uninstall": "true"}
    assert cluster.now == 60.0


def test_nodes_that_have_not_heard_are_named() -> None:
    """The person knows where to look."""
    with pytest.raises(LazymeshError, match=r"after 30 s .*: node-of-y;"):
        Cluster({"x": 1.0, "y": None}).announce(30.0)


def test_agent_that_was_not_ready_before_is_given_the_time_it_needs() -> None:
    """It cannot show that it has heard; a kubelet has brought the word by then."""
    cluster = Cluster({"x": 1.0, "y": 1.0}, frozenset({"y"}))
    assert cluster.announce() == 2
    assert REFRESH_S <= cluster.now < REFRESH_S + 5


def test_agent_that_is_started_again_has_not_heard_because_it_is_not_ready() -> None:
    """It has when it was ready again in between."""
    cluster = Cluster({"x": 60.0}, restarts_at=4.0)
    assert cluster.announce() == 1
    assert cluster.now == 60.0
    with pytest.raises(LazymeshError, match="node-of-x;"):
        Cluster({"x": None}, restarts_at=4.0).announce()


def test_agent_that_is_started_again_late_is_given_the_time_from_then_on() -> None:
    """It has heard when it starts, and is never ready, as if it could not start."""
    cluster = Cluster({"x": 52.0}, restarts_at=50.0)
    assert cluster.announce() == 1
    assert 50 + REFRESH_S <= cluster.now < 50 + REFRESH_S + 5


def test_agent_that_does_not_live_long_enough_to_clean_up_is_named() -> None:
    """However long it is waited for: there is no process that could."""
    with pytest.raises(LazymeshError, match=r": node-of-x \(its agent is not running\);"):
        Cluster({"x": None, "y": 1.0}, crashing=frozenset({"x"})).announce()


def test_api_that_is_away_for_a_moment_ends_nothing() -> None:
    """The mark is set by then; whoever has not been seen at the end is named, with the reason."""
    cluster = Cluster({"x": 60.0}, away=range(10, 30))
    assert cluster.announce() == 1
    assert cluster.now == 60.0
    with pytest.raises(LazymeshError, match=r"node-of-x;.*the last request failed: https://api does not"):
        Cluster({"x": 60.0}, away=range(10, 400)).announce()


def test_to_have_told_nobody_is_no_success() -> None:
    """The labels may be wrong, or agents have gone that left their nodes as they were."""
    cluster = Cluster({})
    with pytest.raises(
        LazymeshError, match="no pod has the labels app=lazymesh, so there is no agent to tell"
    ):
        cluster.announce()
    assert cluster.config == {}


@pytest.mark.parametrize(
    ("text", "marked"),
    [("true", True), ("true\n", True), ("false", False), ("False\n", False), ("", False), (None, False)],
)
def test_word_counts_until_it_is_taken_back(tmp_path: Path, text: str | None, marked: bool) -> None:
    """By taking the key out, or as people do who set it to the opposite."""
    mark = tmp_path / "uninstall"
    if text is not None:
        mark.write_text(text)
    assert is_marked(mark) is marked
    assert is_marked(None) is False
