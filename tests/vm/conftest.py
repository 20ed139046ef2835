"""A virtual machine for the session, by Vagrant: its kernel is told by scripts/vm, which starts these tests."""

from __future__ import annotations

import os
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import vagrant

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
_REPORT = "/tmp/report.xml"
STORY_PATIENCE_S = 280


@dataclass(frozen=True)
class Case:
    """What became of one test in the machine."""

    name: str
    outcome: str
    """``passed``, ``failed`` or ``skipped``."""
    words: str
    """Why, unless it passed."""


class Machine:
    """A node with the checkout in it, reached by ssh."""

    def __init__(self, ssh_config: Path, name: str) -> None:
        self._ssh = ["ssh", "-F", str(ssh_config), name]

    def run(self, command: str, timeout: float = 60, *, check: bool = True) -> str:
        """Run a shell command as root in the checkout; return what it printed."""
        script = f"cd {ROOT} && export PYTHONPATH=agent:.cache/vm/python && {command}"
        done = subprocess.run(
            [*self._ssh, "sudo", "bash", "-s"],
            input=script, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{command}: exit {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    def tell(self, *tests: str) -> list[Case]:
        """Run tests of the other tiers in the machine, one after the other."""
        words = "--quiet --color=no --tb=short -p no:cacheprovider -p no:randomly -n 0"
        quoted = " ".join(f"'{test}'" for test in tests)
        command = f"python3 -m pytest {words} --junitxml={_REPORT} {quoted}"
        print(self.run(command, STORY_PATIENCE_S, check=False))
        cases = []
        for case in ET.fromstring(self.run(f"cat {_REPORT}")).iter("testcase"):
            outcome, words = "passed", ""
            for child in case:
                if child.tag in ("failure", "error", "skipped"):
                    outcome = "skipped" if child.tag == "skipped" else "failed"
                    words = child.get("message") or ""
            cases.append(Case(str(case.get("name")), outcome, words))
        return cases


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Bring one up, and take it away again."""
    box = vagrant.Vagrant(str(ROOT / "vm"), env=dict(os.environ))
    try:
        box.up()
        config = tmp_path_factory.mktemp("vm") / "ssh_config"
        config.write_text(box.ssh_config(), encoding="utf-8")
        yield Machine(config, "a")
    finally:
        box.destroy()


@pytest.fixture(scope="session")
def kernel(machine: Machine) -> tuple[int, ...]:
    """Return the machine's kernel, as (5, 10)."""
    release = machine.run("uname -r")
    return tuple(int(part) for part in release.split("-", maxsplit=1)[0].split("+")[0].split(".")[:2])
