"""A datapath as tests and figures load it: with the mesh maps, which it closes as well."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lazymesh.datapath import program
from lazymesh.datapath.program import Datapath, MeshMaps
from lazymesh.errors import DatapathError
from tests.support.etcd import wait_until

if TYPE_CHECKING:
    from lazymesh.datapath.pins import Pins


COMPILED = os.environ.get("LAZYMESH_TEST_PROGRAMS", "")
"""A file of compiled programs that somebody is writing: compiling takes a minute where the processor is emulated."""
COMPILED_WITHIN_S = 300.0


class LoadedDatapath(Datapath):
    """The programs and all pinned maps."""

    def __init__(self, maps: MeshMaps) -> None:
        self._mesh = maps
        self.mesh_cidrs, self.policy = maps.cidrs, maps.policy
        super().__init__(maps)

    def close(self) -> None:
        """Close the mesh maps, too."""
        super().close()
        self._mesh.close()


def load(pins: Pins, ipcache_size: int, keep: Path | None = None) -> LoadedDatapath:
    """Load as the agent does, and open what was loaded."""
    if keep is None and COMPILED:
        keep = Path(COMPILED)
        wait_until(keep.exists, COMPILED_WITHIN_S, f"the compiled programs in {keep}")
    maps = MeshMaps(pins, ipcache_size)
    try:
        program.load(maps, keep).close()
    except DatapathError:
        maps.close()
        raise
    return LoadedDatapath(maps)


def open_loaded(pins: Pins, ipcache_size: int) -> LoadedDatapath:
    """Open what is loaded already."""
    return LoadedDatapath(MeshMaps(pins, ipcache_size))
