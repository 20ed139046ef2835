"""What settings and policy mean for the programs: rates, ``--on-miss``, the directions in which policy is enforced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog

from lazymesh.datapath.settingsmap import DatapathConfig, OnMiss, bits_of
from lazymesh.roles.enforcement import Enforcement

if TYPE_CHECKING:
    from lazymesh.core.policy import Policy, PolicyEngine
    from lazymesh.datapath.program import MeshMaps
    from lazymesh.datapath.settingsmap import SettingsMap
    from lazymesh.roles.holding import Holding
    from lazymesh.settings import AgentSettings

log = structlog.get_logger()


class ProgramSettings:
    """Tells the programs what the settings say: at the start, and when one is changed in the running agent."""

    def __init__(self, settings: AgentSettings, policy: Policy | None) -> None:
        self._settings = settings
        self._policy_tag = policy.tag if policy else 0
        self._enforced = policy.enforced if policy and not settings.shadow else frozenset()

    def enforcement(self, maps: MeshMaps, engine: PolicyEngine | None) -> Enforcement:
        """Begin with what an earlier life allowed if that was by this policy, otherwise with nothing."""
        config = maps.config.read()
        keep = engine is not None and config.policy_tag == self._policy_tag
        if not keep:
            # The tag of the rights written from now on follows once they are in force, as we may die before. And what
            # is no longer enforced must not be denied meanwhile, while the map is empty.
            maps.config.change(policy_tag=0, enforced=config.enforced & bits_of(self._enforced))
        return Enforcement(maps.policy, engine, keep)

    def write(self, config: SettingsMap) -> None:
        """Put everything in force."""
        settings = self._settings.datapath
        # Where no entry is ever written, holding and dropping would cut everything off.
        on_miss = OnMiss.PASS if self._settings.shadow else OnMiss[settings.on_miss.upper()]
        config.write(
            DatapathConfig(
                interface_rate=settings.signal_rate,
                uplink_rate=4 * settings.signal_rate,
                global_rate=10 * settings.signal_rate,
                on_miss=on_miss,
                remember=self._may_remember(on_miss),
                enforced=self._enforced,
                policy_tag=self._policy_tag,
            )
        )

    def switch_on_miss(self, config: SettingsMap, holding: Holding, action: str) -> dict[str, Any]:
        """Change at once what becomes of missed packets; return the answer to ``lazymesh config on-miss``."""
        if self._settings.shadow and action != "pass":
            return {"error": "in shadow mode missed packets are always passed on"}
        on_miss = OnMiss[action.upper()]
        config.change(on_miss=on_miss)
        config.remember(self._may_remember(on_miss))
        if action == "hold":
            holding.want()
        log.info("on miss", action=action)
        return {"onMiss": action, "holding": holding.summary, "problem": holding.problem}

    def _may_remember(self, on_miss: OnMiss) -> bool:
        """Return whether the programs may remember an answer until the next tick.

        Cilium's agent may remove an entry meanwhile: a packet then goes on as world, unless misses are to be held.
        """
        return self._settings.datapath.mode == "standalone" or on_miss is not OnMiss.HOLD
