"""The capabilities that the kernel demands; in a container, root alone does not have them."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path

from lazymesh.datapath.kernelfeatures import kernel_version
from lazymesh.errors import DatapathError

NUMBERS = {"NET_ADMIN": 12, "SYS_ADMIN": 21, "SYS_RESOURCE": 24}
"""Bits of CapEff, by linux/capability.h."""
FOR = {
    "NET_ADMIN": "to attach programs to interfaces and make a TAP",
    "SYS_ADMIN": "to load programs, read the miss signals, and open maps and programs by their numbers",
    "SYS_RESOURCE": "because kernels before 5.11 charge maps to a limit (ulimit -l)",
}
UNLIMITED_SINCE = (5, 11)


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What determines which capabilities are needed."""

    kernel: tuple[int, ...]
    locked_unlimited: bool
    """RLIMIT_MEMLOCK is already unlimited."""

    @classmethod
    def here(cls) -> Circumstances:
        """Return those of this kernel and process."""
        unlimited = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] == resource.RLIM_INFINITY
        return cls(kernel_version(), unlimited)


def missing(held: frozenset[str], where: Circumstances) -> list[str]:
    """Return which capabilities are needed and not held.

    BPF and PERFMON would do, but Cilium's maps and programs are opened by id. For that the kernel demands SYS_ADMIN,
    which includes both.
    """
    needed = ["NET_ADMIN", "SYS_ADMIN"]
    if where.kernel < UNLIMITED_SINCE and not where.locked_unlimited:
        needed.append("SYS_RESOURCE")
    return [name for name in sorted(needed) if name not in held]


def held_here(status: Path = Path("/proc/self/status")) -> frozenset[str]:
    """Return which of the relevant capabilities are effective in this process."""
    (line,) = [line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("CapEff:")]
    bits = int(line.split()[1], 16)
    return frozenset(name for name, number in NUMBERS.items() if bits >> number & 1)


def check_capabilities() -> list[str]:
    """Return those held; DatapathError names those missing, and what they are for."""
    held = held_here()
    lacking = missing(held, Circumstances.here())
    if lacking:
        words = "; CAP_".join(f"{name}, {FOR[name]}" for name in lacking)
        raise DatapathError(
            f"missing CAP_{words}: add {'it' if len(lacking) == 1 else 'them'} to the container's capabilities,"
            " or make it privileged"
        )
    return sorted(held)
