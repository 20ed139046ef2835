"""Settings that several tests of the agent's parts begin with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lazymesh.settings import AgentSettings, DatapathSettings, MeshSettings

if TYPE_CHECKING:
    from pathlib import Path


def settings(
    tmp_path: Path,
    *,
    policy: Path | None = None,
    interface: str = "lxc+",
    uplinks: tuple[str, ...] = (),
    shadow: bool = False,
) -> AgentSettings:
    """Return the settings of an agent on an empty directory."""
    mesh = MeshSettings("a", 1, clustermesh_config=tmp_path)
    return AgentSettings(
        mesh, DatapathSettings(tmp_path, (interface,), uplinks), policy=policy, shadow=shadow
    )
