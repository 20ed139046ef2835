"""The soak's own judgement: what it takes for a good end, and what it notes of an agent's life."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from scripts.soak import parse_arguments
from tests.support import soak
from tests.support.soak import Outcome, Plan, Soak
from tests.support.witness import Witness

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass
class FakeAgent:
    """An agent that has ended by itself, if it has an exit code."""

    code: int | None = None
    log: str = ""
    killed: bool = False
    process: FakeAgent = field(init=False)

    def __post_init__(self) -> None:
        self.process = self

    def poll(self) -> int | None:  # noqa: D102
        return self.code

    def kill(self) -> None:  # noqa: D102
        self.killed = True

    def wait_ready(self) -> None:  # noqa: D102
        assert not self.killed


class Stage(Soak):
    """The soak with agents that are given, the first of them running, and nothing else."""

    def __init__(self, agents: Iterable[FakeAgent], seed: int = 0) -> None:
        self._agents = iter(agents)
        self.agent = next(self._agents)
        self._outcome, self._dice = Outcome(), random.Random(seed)

    def _start_agent(self) -> FakeAgent:
        return next(self._agents)

    def _calm(self, seconds: float, *, b: bool = True, c: bool = True) -> None:
        pass

    @property
    def complaints(self) -> list[str]:
        """What was noted."""
        return self._outcome.complaints


@pytest.fixture(autouse=True)
def no_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every agent count no unexpected error."""
    monkeypatch.setattr(soak, "metric", lambda *_: 0)


@pytest.mark.parametrize("fault", ["kill_agent", "kill_starting_agent"])
def test_agent_that_has_died_by_itself_is_noted_before_it_is_killed(fault: str) -> None:
    """Afterwards nobody can tell the one from the other."""
    stage = Stage([FakeAgent(code=1), *(FakeAgent() for _ in range(3))])
    getattr(stage, fault)()
    assert stage.complaints == ["the agent ended by itself, with exit code 1"]


def test_logs_of_successors_that_are_killed_as_they_start_are_read_once_each() -> None:
    """What they say is as much of a complaint; the last one lives on, and is read when its end comes."""
    seed = next(seed for seed in range(100) if random.Random(seed).randrange(1, 4) == 3)
    agents = [FakeAgent(log=f"{number}: Traceback") for number in range(4)]
    stage = Stage(agents, seed)
    stage.kill_starting_agent()
    assert stage.complaints == ["0: Traceback", "1: Traceback", "2: Traceback"]
    assert [agent.killed for agent in agents] == [True, True, True, False]


def test_agent_that_runs_and_counts_errors_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked while it can answer: not while it starts."""
    monkeypatch.setattr(soak, "metric", lambda *_: 1)
    stage = Stage(
        [FakeAgent() for _ in range(4)], next(s for s in range(100) if random.Random(s).randrange(1, 4) == 3)
    )
    stage.kill_starting_agent()
    assert stage.complaints == ["the agent counts unexpected errors"]


def test_soak_without_a_single_fault_is_not_good() -> None:
    """Nothing was lost, because nothing was tried."""
    assert not Outcome().good
    assert Outcome(rounds=1).good
    assert not Outcome(rounds=1, complaints=["x"]).good
    assert not Outcome(rounds=1, memory={"agent": (10, 17)}).good


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "two"])
def test_soak_takes_a_finite_number_of_minutes_above_none(
    minutes: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others would end at once, or never."""
    monkeypatch.setattr(sys, "argv", ["soak", "--minutes", minutes])
    with pytest.raises(SystemExit) as left:
        parse_arguments()
    assert left.value.code == 2
    assert f"a number above 0, not {minutes}" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["soak", "--minutes", "0.5"])
    assert parse_arguments().minutes == 0.5


def test_soak_ends_when_the_witness_has() -> None:
    """Hours of faults that nobody looks at would prove nothing."""
    stage = Stage([FakeAgent()])
    stage._plan, stage._say, stage._began = Plan(60, 0), lambda _: None, 0.0
    stage._faults = lambda: {"a fault": lambda: None}  # type: ignore[method-assign]
    stage.witness = Witness(Path("/nowhere"))
    stage.witness._failure = OSError(24, "Too many open files")
    with pytest.raises(RuntimeError, match="the witness ended"):
        stage._break_things()
