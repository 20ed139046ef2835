"""Two virtual machines for the session, by Vagrant; scripts/vm, which starts these tests, says with which kernel."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import vagrant

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).parents[2]
CHECKOUT = "/opt/lazymesh"
"""Where a machine has this checkout."""
ADDRESSES = {"a": "192.168.56.11", "b": "192.168.56.12"}
"""On the network that the nodes share."""
KERNEL_NAME = os.environ.get("LAZYMESH_VM_KERNEL", "6.1")
"""What vm/build calls it."""
KERNEL = tuple(int(part) for part in KERNEL_NAME.partition("-")[0].split("."))
"""The same, as (5, 10)."""
STORY_PATIENCE_S = 600
"""Several times what one takes on two idle processors: most of that is LLVM, which compiles in half a minute there."""


@dataclass(frozen=True)
class Case:
    """What became of one test in a machine."""

    name: str
    outcome: str
    """``passed``, ``failed`` or ``skipped``."""
    words: str
    """Why, unless it passed."""
    took_s: float


class Machine:
    """A node with the checkout in it, reached by ssh."""

    def __init__(self, name: str, ssh_config: Path) -> None:
        self.name, self.address = name, ADDRESSES[name]
        found = re.search(
            rf"^Host node-{name}\n +HostName (\S+)", ssh_config.read_text(encoding="utf-8"), re.MULTILINE
        )
        assert found
        self.reached_at = found[1]
        """Its address on the network that it shares with us."""
        # One connection for all of them: to greet each other takes two emulated processors a second.
        shared = (
            "-o",
            "ControlMaster=auto",
            "-o",
            "ControlPersist=yes",
            "-o",
            f"ControlPath={ssh_config}.%n",
        )
        self._ssh = ["ssh", "-F", str(ssh_config), *shared, f"node-{name}"]

    def run(self, script: str, timeout_s: float = 60, *, check: bool = True) -> str:
        """Run a shell script as root in the checkout; return what it printed."""
        words = f"cd {CHECKOUT} && export PYTHONPATH=agent:.cache/vm/python\n{script}\n"
        done = subprocess.run(
            [*self._ssh, "sudo", "bash", "-e", "-s"],
            input=words, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"node {self.name}: {script}: exit {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    @contextlib.contextmanager
    def cut_off(self) -> Iterator[None]:
        """Pull the cable to the other node for a while; ours stays."""
        address = self.run("cat /sys/class/net/eth1/address").strip()
        links = json.loads(subprocess.check_output(["ip", "-json", "link"]))
        # This side of it has the same hardware address, but for the first byte.
        (cable,) = [link["ifname"] for link in links if link["address"][2:] == address[2:]]
        subprocess.run(["ip", "link", "set", cable, "down"], check=True)
        try:
            yield
        finally:
            subprocess.run(["ip", "link", "set", cable, "up"], check=True)

    def tell(self, *tests: str) -> list[Case]:
        """Run tests of the other tiers in the machine, one after the other; what would be skipped fails there."""
        words = "-q -n 0 --color=no --tb=short -p no:cacheprovider -p no:randomly -o junit_family=xunit1"
        patience = f"CI=true LAZYMESH_TEST_PATIENCE={STORY_PATIENCE_S} LAZYMESH_IPCACHE_SIZE=20000"
        quoted = " ".join(f"'{test}'" for test in tests)
        report = "/tmp/report.xml"
        script = f"{patience} python3 -m pytest {words} --junitxml={report} {quoted} 2>&1"
        print(self.run(script, STORY_PATIENCE_S, check=False))
        return [_case(row) for row in ET.fromstring(self.run(f"cat {report}; rm {report}")).iter("testcase")]


def _case(row: ET.Element) -> Case:
    outcome, words = "passed", ""
    for child in row:
        if child.tag in ("failure", "error", "skipped"):
            outcome = "skipped" if child.tag == "skipped" else "failed"
            words = child.get("message") or ""
    return Case(str(row.get("name")), outcome, words, float(row.get("time") or 0))


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Machine]]:
    """Bring both up, and take them away again."""
    said = vagrant.make_file_cm(os.environ["LAZYMESH_VM_LOG"])
    box = vagrant.Vagrant(str(ROOT / "vm"), env=dict(os.environ), out_cm=said, err_cm=said)
    try:
        try:
            box.up()
        except subprocess.CalledProcessError:
            pytest.exit(
                f"the machines did not start; the whole story is in {os.environ['LAZYMESH_VM_LOG']}", 1
            )
        config = tmp_path_factory.mktemp("vm") / "ssh"
        config.write_text("".join(box.ssh_config(f"node-{name}") for name in ADDRESSES), encoding="utf-8")
        found = {name: Machine(name, config) for name in ADDRESSES}
        for machine in found.values():
            assert machine.run("uname -r").startswith(f"{KERNEL[0]}.{KERNEL[1]}."), "another kernel"
        yield found
    finally:
        box.destroy()
