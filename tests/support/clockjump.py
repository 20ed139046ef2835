"""A wall clock that jumps, for one process and its children: as after a wrong NTP answer, or a resumed machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class ClockJump:
    """The clock of whoever is started with ``env``: right, until told otherwise."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "clock-offset"
        self._library = directory / "clockjump.so"
        self._file.write_bytes(bytes(8))
        source = Path(__file__).with_suffix(".c")
        argv = ["clang-14", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", self._library, source]
        subprocess.run(argv, check=True)

    @property
    def env(self) -> Mapping[str, str]:
        """What to start a process with."""
        return {"LD_PRELOAD": str(self._library), "CLOCK_JUMP_FILE": str(self._file)}

    def jump(self, seconds: int) -> None:
        """Let the clock be off by so much, from now on; 0: be right again."""
        with self._file.open("r+b") as file:  # not replaced: whoever has it mapped must see it
            file.write(seconds.to_bytes(8, sys.byteorder, signed=True))
