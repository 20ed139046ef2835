"""The image as a node would run it: its root, read-only, under crun, with what the manifests allow and no more.

crun is given a cgroup file system without controllers: limits of memory and devices are the one thing that a pod
has and this has not.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tests.support.seccomp import default_profile

if TYPE_CHECKING:
    from tests.support.lab import Lab
    from tests.support.namespaces import Namespace

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "deploy" / "kubernetes"
_SERIAL = itertools.count()
_NAMESPACES = ("pid", "ipc", "uts", "mount")
"""As with hostNetwork: all but the network's."""


def image_root() -> Path:
    """Return the root of the image of this checkout, built if need be."""
    subprocess.run([ROOT / "scripts" / "image"], check=True, stdout=subprocess.DEVNULL)
    return ROOT / ".cache" / "image" / "root"


def in_lab(lab: Lab, root: Path, capabilities: tuple[str, ...] | None = None) -> Container:
    """Return a container on node a of a lab, which sees the lab's directory where the node does."""
    here, run = str(lab.directory), lab.directory / "run"
    run.mkdir(exist_ok=True)
    mounts = (Mount(here, here), Mount(str(run), "/run/lazymesh"), Mount("/dev/net/tun", "/dev/net/tun"))
    return Container(root, lab.directory / "containers", capabilities, mounts)


def needed_capabilities() -> tuple[str, ...]:
    """Return those that the chart gives the agent where it is not privileged."""
    values = yaml.safe_load((ROOT / "deploy" / "chart" / "values.yaml").read_text())
    return tuple(values["capabilities"]["needed"])


def manifest(kind: str, directory: Path = MANIFESTS) -> dict[str, Any]:
    """Return the one object of a kind in the plain manifests."""
    objects = [each for path in directory.glob("*.yaml") for each in yaml.safe_load_all(path.read_text())]
    (found,) = [each for each in objects if each and each.get("kind") == kind]
    return dict(found)


@dataclass(frozen=True)
class Mount:
    """Something of the node inside the container."""

    source: str
    target: str
    read_only: bool = False


@dataclass
class Container:
    """A way to run programs of the image; ``directory`` takes its bundles.

    capabilities: None: all, and every system call, as in a privileged container. Else the system calls are those that
    a runtime allows by default with these capabilities (``seccompProfile: RuntimeDefault``).
    """

    root: Path
    directory: Path
    capabilities: tuple[str, ...] | None = None
    mounts: tuple[Mount, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    uid: int = 0
    program: str = "lazymesh"

    def command(self, *args: str) -> list[str]:
        """Return the words that run ``lazymesh ARGS`` in a container of its own, in whatever network is around."""
        name = f"lm-{os.getpid()}-{next(_SERIAL)}"
        bundle = self.directory / name
        bundle.mkdir(parents=True)
        (bundle / "config.json").write_text(json.dumps(self._config(args)), encoding="utf-8")
        state = self.directory / "crun"
        # Whatever cgroups this machine has, crun gets to see none.
        script = f'mount -t tmpfs none /sys/fs/cgroup && exec crun --root "{state}" --cgroup-manager=disabled run "$@"'
        return [
            *("unshare", "--mount", "--propagation", "slave", "--", "sh", "-c", script),
            *("sh", "--bundle", str(bundle), name),
        ]

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run ``lazymesh ARGS`` to its end."""
        return subprocess.run(
            self.command(*args),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def _config(self, args: tuple[str, ...]) -> dict[str, Any]:
        names = _all_capabilities() if self.capabilities is None else self.capabilities
        capabilities = [f"CAP_{name}" for name in names]
        env = {"PATH": "/opt/lazymesh/bin:/usr/sbin:/usr/bin", "PYTHONDONTWRITEBYTECODE": "1", **self.env}
        privileged = self.capabilities is None
        return {
            "ociVersion": "1.0.0",
            "process": {
                "args": [self.program, *args],
                "env": [f"{key}={value}" for key, value in env.items()],
                "cwd": "/",
                "user": {"uid": self.uid, "gid": self.uid},
                "noNewPrivileges": not privileged,
                "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
            },
            "root": {"path": str(self.root), "readonly": True},
            "hostname": "node-a",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {
                    "destination": "/dev",
                    "type": "tmpfs",
                    "source": "tmpfs",
                    "options": ["nosuid", "mode=755"],
                },
                {
                    "destination": "/sys",
                    "type": "sysfs",
                    "source": "sysfs",
                    "options": ["nosuid", "nodev", "ro"],
                },
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=64m"]},
                *(
                    {
                        "destination": mount.target,
                        "source": mount.source,
                        "options": ["rbind", "ro" if mount.read_only else "rw"],
                    }
                    for mount in self.mounts
                ),
            ],
            "linux": {
                "namespaces": [{"type": kind} for kind in _NAMESPACES],
                # What container runtimes keep from a container that is not privileged.
                "readonlyPaths": []
                if privileged
                else ["/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus"],
                "maskedPaths": [] if privileged else ["/proc/kcore", "/proc/keys", "/sys/firmware"],
                **({} if privileged else {"seccomp": default_profile(names)}),
            },
        }


def filtered(node: Namespace) -> bool:
    """Tell whether the kernel filters the system calls of the agent that runs on a node."""
    (agent,) = [
        pid for pid in node.pids() if b"lazymesh\0agent\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    (mode,) = re.findall(r"^Seccomp:\s+(\d)$", Path(f"/proc/{agent}/status").read_text(), re.MULTILINE)
    return {"0": False, "2": True}[mode]


@functools.cache
def _all_capabilities() -> tuple[str, ...]:
    """Return what this machine lets anybody have: less than the kernel knows, in a sandbox."""
    names = subprocess.run(["capsh", "--print"], check=True, capture_output=True, text=True).stdout
    (line,) = [line for line in names.splitlines() if line.startswith("Bounding set")]
    return tuple(name.strip().removeprefix("cap_").upper() for name in line.partition("=")[2].split(","))
