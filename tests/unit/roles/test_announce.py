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
    now: float = 0.0
    told_at: float | None = None
    config: dict[str, str | None] = field(default_factory=dict)

    def set_config(self, name: str, values: dict[str, str | None]) -> None:
        """Note the word."""
        assert name == "lazymesh"
        self.told_at = self.now
        self.config |= values

    def pods(self, selector: str) -> list[Pod]:
        """Tell who is ready."""
        assert selector == "app=lazymesh"
        return [Pod(name, f"node-of-{name}", self._ready(name)) for name in self.hears]

    def _ready(self, name: str) -> bool:
        after = self.hears[name]
        heard = self.told_at is not None and after is not None and self.now >= self.told_at + after
        return not heard and name not in self.deaf_before

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


def test_cluster_without_agents_is_done_at_once() -> None:
    """All of them are gone already."""
    cluster = Cluster({})
    assert cluster.announce() == 0
    assert cluster.now == 0


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
