"""Tells every agent of a cluster to clean up its node when it is stopped, and waits until all have taken note.

The mark is a key of the ConfigMap that all of them mount; kubelets bring it to the nodes within two minutes. An agent
that finds it is no longer ready (roles/status.py): that is what is waited for.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lazymesh.errors import LazymeshError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lazymesh.kube.api import Pod

MARK = "uninstall"
"""The key, which is the name of the file in the pods."""
TAKEN_BACK = (b"", b"false")
"""What the file contains when the mark no longer counts."""
REFRESH_S = 120.0
"""By then a kubelet has brought a changed ConfigMap to its pods."""
LOOK_EVERY_S = 2.0


@dataclass(frozen=True, slots=True)
class Time:
    """The clock; tests replace it, so as not to wait."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Api(Protocol):
    """The part of the Kubernetes API that is needed (kube/api.py)."""

    def set_config(self, name: str, values: dict[str, str]) -> None:
        """Set keys of a ConfigMap."""

    def pods(self, selector: str) -> list[Pod]:
        """Return the pods that have these labels."""


_TIME = Time()


def is_marked(mark: Path | None) -> bool:
    """Return whether the mark has reached this node, as the agent's ``--uninstall-mark``, and was not taken back."""
    try:
        return mark is not None and mark.read_bytes().strip().lower() not in TAKEN_BACK
    except OSError:  # usually because there is none
        return False


def announce(api: Api, configmap: str, selector: str, timeout_s: float, clock: Time = _TIME) -> int:
    """Return how many agents will clean up; after the timeout, LazymeshError names the nodes where that is uncertain.

    An agent that was ready and no longer is has seen the mark. One that was never ready, or not since it restarted,
    cannot show it: it is given the time in which the mark must have arrived. One that does not run cannot clean up.
    """
    unsure = _agents(api, selector)
    shown = {pod.container for pod in unsure if pod.ready}
    api.set_config(configmap, {MARK: "true"})
    began = clock.now()
    since: dict[str, float] = {}
    while True:
        waited = clock.now() - began
        try:
            pods, failed = _agents(api, selector), ""
        except LazymeshError as exc:  # the next request may succeed
            failed = f" (the last request failed: {exc})"
        else:
            shown |= {pod.container for pod in pods if pod.ready}
            since = {pod.container: since.get(pod.container, waited) for pod in pods if pod.container}
            sure = {name for name in since if name in shown or waited - since[name] >= REFRESH_S}
            unsure = [pod for pod in pods if pod.ready or pod.container not in sure]
            if not unsure:
                return len(pods)
        if waited >= timeout_s:
            nodes = ", ".join(sorted(map(_describe, unsure)))
            raise LazymeshError(
                f"after {waited:.0f} s it is not known that these nodes will be cleaned up: {nodes}; check their"
                f" agents, or run `lazymesh uninstall` there afterwards{failed}"
            )
        clock.sleep(LOOK_EVERY_S)


def _agents(api: Api, selector: str) -> list[Pod]:
    """Return the agents' pods; having none to tell is a failure, since nodes may still carry what agents left."""
    pods = api.pods(selector)
    if not pods:
        raise LazymeshError(
            f"no pod has the labels {selector}, so there is no agent to tell: run `lazymesh uninstall` where agents ran"
        )
    return pods


def _describe(pod: Pod) -> str:
    return (pod.node or f"that of {pod.name}") + ("" if pod.container else " (its agent is not running)")
