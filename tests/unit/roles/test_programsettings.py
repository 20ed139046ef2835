"""What the programs are told: the rights of which policy, and what becomes of missed packets."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from lazymesh.core.model import Direction
from lazymesh.core.policy import PolicyEngine
from lazymesh.core.policyfile import parse_policy
from lazymesh.datapath.settingsmap import OnMiss
from lazymesh.roles.programsettings import ProgramSettings
from tests.support.agentsettings import settings
from tests.support.lab import BOTH_WAYS, POLICY

if TYPE_CHECKING:
    from pathlib import Path

    from lazymesh.datapath.settingsmap import DatapathConfig
    from lazymesh.roles.holding import Holding


class FakeMaps:
    """The kernel's settings and policy map; ``order`` tells what was written, one after the other."""

    def __init__(self, tag: int, enforced: int) -> None:
        self.order: list[object] = []
        self.settings = SimpleNamespace(policy_tag=tag, enforced=enforced)
        self.config = self.policy = self

    def read(self) -> SimpleNamespace:
        """Return the settings."""
        return self.settings

    def change(self, **words: int) -> None:
        """Change settings."""
        self.order.append(words)

    def items(self) -> set[tuple[Direction, int]]:
        """Return what an earlier life has allowed."""
        return {(Direction.EGRESS, 7)}

    def apply(self, allow: object, revoke: object) -> None:
        """Write the policy map."""
        self.order.append((list(cast("Any", allow)), list(cast("Any", revoke))))


@pytest.mark.parametrize(
    ("policy", "shadow", "enforced"),
    [
        pytest.param(POLICY, False, 1, id="another policy"),
        pytest.param(BOTH_WAYS, False, 3, id="another one, both ways"),
        pytest.param(POLICY, True, 0, id="another policy, in shadow mode"),
        pytest.param(None, False, 0, id="no policy any more"),
    ],
)
def test_rights_of_another_policy_are_nobodys_before_they_change(
    tmp_path: Path, policy: str | None, shadow: bool, enforced: int
) -> None:
    """The agent may die half-way; and what is not enforced any more is not denied while the map is empty."""
    maps = FakeMaps(17, 3)
    parsed = parse_policy(policy, "p") if policy else None
    programs = ProgramSettings(replace(settings(tmp_path), shadow=shadow), parsed)
    programs.enforcement(cast("Any", maps), PolicyEngine(parsed) if parsed else None)
    assert maps.order == [{"policy_tag": 0, "enforced": enforced}, ([], [(Direction.EGRESS, 7)])]


def test_rights_of_the_same_policy_stay(tmp_path: Path) -> None:
    """A restart is none of its flows' business."""
    policy = parse_policy(POLICY, "p")
    maps = FakeMaps(policy.tag, 1)
    ProgramSettings(settings(tmp_path), policy).enforcement(cast("Any", maps), PolicyEngine(policy))
    assert maps.order == []


class FakeConfig:
    """Notes what is written, and whether the programs may remember."""

    def __init__(self) -> None:
        self.written: list[DatapathConfig] = []
        self.changed: list[object] = []

    def write(self, words: DatapathConfig) -> None:
        """Take all settings."""
        self.written.append(words)

    def change(self, **words: object) -> None:
        """Take one."""
        self.changed.append(words)

    def remember(self, on: bool) -> None:
        """Take whether answers may be remembered."""
        self.changed.append(on)


@pytest.mark.parametrize(
    ("mode", "shadow", "on_miss", "remember"),
    [
        ("standalone", False, OnMiss.HOLD, True),
        ("cilium", False, OnMiss.HOLD, False),
        ("cilium", True, OnMiss.PASS, True),
    ],
)
def test_settings_are_put_in_force_at_the_start(
    tmp_path: Path, mode: str, shadow: bool, on_miss: OnMiss, remember: bool
) -> None:
    """In shadow mode nothing is held; beside Cilium nothing is remembered while packets may be held."""
    given = settings(tmp_path, shadow=shadow)
    config = FakeConfig()
    programs = ProgramSettings(replace(given, datapath=replace(given.datapath, mode=mode)), None)
    programs.write(cast("Any", config))
    (words,) = config.written
    assert (words.on_miss, words.remember) == (on_miss, remember)
    assert (words.interface_rate, words.uplink_rate, words.global_rate) == (250, 1_000, 2_500)


def test_on_miss_is_switched_at_once(tmp_path: Path) -> None:
    """With a holder, if there has to be one; in shadow mode packets are passed on, whatever is asked for."""
    config, wanted = FakeConfig(), []
    holding = cast(
        "Holding", SimpleNamespace(want=lambda: wanted.append(True), summary="starting", problem=None)
    )
    programs = ProgramSettings(settings(tmp_path), None)
    answer = programs.switch_on_miss(cast("Any", config), holding, "drop")
    assert (answer["onMiss"], wanted, config.changed) == ("drop", [], [{"on_miss": OnMiss.DROP}, True])
    assert programs.switch_on_miss(cast("Any", config), holding, "hold")["holding"] == "starting"
    assert wanted == [True]
    shadow = ProgramSettings(settings(tmp_path, shadow=True), None)
    assert "error" in shadow.switch_on_miss(cast("Any", FakeConfig()), holding, "hold")
    assert shadow.switch_on_miss(cast("Any", FakeConfig()), holding, "pass")["onMiss"] == "pass"
