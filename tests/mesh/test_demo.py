"""scripts/demo, as a newcomer runs it: it shows what it promises and leaves nothing behind, also when interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.namespaces import RUN_DIR

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, str(ROOT / "scripts" / "demo.py"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def left_of(pid: int) -> list[str]:
    """Return what a run has left: namespaces, directories with mounts in them, processes of its own."""
    names = [path.name for path in RUN_DIR.iterdir()] if RUN_DIR.is_dir() else []
    made = [name for name in names if name.startswith(f"lm-{pid}-")]
    made += [str(path) for path in Path("/dev/shm").glob(f"lm-{pid}-*")]
    mounts = Path("/proc/mounts").read_text(encoding="utf-8")
    made += [line for line in mounts.splitlines() if f"/lm-{pid}-" in line]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"/lm-{pid}-" in path.read_text(encoding="utf-8", errors="replace"):
                made.append(path.parent.name)
        except OSError:
            continue
    return made


def test_demo_shows_the_difference_and_leaves_nothing() -> None:
    """Nothing passes without, everything with; one object with the agreed keys."""
    with subprocess.Popen(
        [*COMMAND, "--output", "json", "--connections", "4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    ) as demo:
        out, _ = demo.communicate(timeout=90)
    assert demo.returncode == 0
    results = json.loads(out)
    assert {"without", "with", "ipcache"} <= set(results)
    for name, answered in (("without", 0), ("with", 4)):
        run = results[name]
        assert (run["tcp"]["attempted"], run["tcp"]["connected"]) == (4, answered)
        assert (run["udp"]["sent"], run["udp"]["answered"]) == (4, answered)
        assert set(run["tcp"]["first_ms"]) == set(run["tcp"]["steady_ms"]) == {"p50", "p99"}
    assert results["ipcache"] == {"before": 0, "after": 8}
    assert left_of(demo.pid) == []


@pytest.mark.parametrize("after_s", [0.5, 3.5])
def test_interrupted_demo_leaves_nothing(after_s: float) -> None:
    """Ctrl-C while the lab is built, and while traffic flows."""
    with subprocess.Popen(
        COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as demo:
        time.sleep(after_s)
        demo.send_signal(signal.SIGINT)
        out, err = demo.communicate(timeout=30)
    # On a busy machine half a second is before its first line has run: then there is nothing to tell.
    if demo.returncode != -signal.SIGINT:
        assert (demo.returncode, out) == (130, "")
        assert re.search(r"interrupted; everything that it created is removed\n$", err)
    assert left_of(demo.pid) == []
