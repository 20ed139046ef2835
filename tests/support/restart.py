"""The scene to win: a Cilium agent starts again, and its programs switch to a map that is half filled."""

from __future__ import annotations

import contextlib
import ipaddress
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazymesh.datapath.libbpf import Map
from tests.support.cilium_boot import FILLED, PINNED, SWITCHED, Timeline
from tests.support.lab import REMOTE_CIDRS
from tests.support.pulse import Fates, Pulse, Sender

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.cilium import Cilium
    from tests.support.lab import Pod

_MOST_IPV4 = 60_000
_TAG = b"lm"
"""What lazymesh leaves in the padding of a value: where the bytes 'pad' of Cilium's struct are."""


@dataclass(frozen=True)
class Scene:
    """How big it is, and how fast."""

    endpoints: int
    fill_rate: float
    """Entries per second that the agent writes."""
    switch_after_s: float
    """When programs move to the new map, counted from the agent's start."""
    flows: int = 50
    fresh_every_s: float = 0.01
    lead_s: float = 1.0
    """Of quiet traffic before the restart, and behind it."""


@dataclass(frozen=True)
class Outcome:
    """What was seen."""

    fates: Fates
    events: dict[str, float]
    """``restart``, ``pinned``, ``switched``, ``filled``: seconds since the traffic began."""
    overwritten: int
    """Entries of ours that stand where the agent has written its own."""

    @property
    def lost_for_s(self) -> float:
        """How long the longest loss of one moment to the next good one was: from first to last lost packet."""
        lost = [at for at, took in (*self.fates.flows, *self.fates.fresh) if took is None]
        return max(lost) - min(lost) if lost else 0.0


def addresses(count: int) -> list[str]:
    """Return remote pods' addresses, of both families."""
    four, six = (ipaddress.ip_network(cidr) for cidr in REMOTE_CIDRS)
    ipv4 = min(count // 2, _MOST_IPV4)
    return [str(four[5 + n]) for n in range(ipv4)] + [str(six[5 + n]) for n in range(count - ipv4)]


def play(cilium: Cilium, pod: Pod, scene: Scene, say: Callable[[str], None] = lambda _: None) -> Outcome:
    """Let traffic flow, restart the agent under it, and wait until everything is as before.

    The agent has to know the endpoints (``addresses``), and so has the cluster's store.
    """
    peers = addresses(scene.endpoints)
    dice = random.Random(7)
    # Spread over the listing, which goes by the text of the addresses.
    flows = sorted(peers)[:: max(1, len(peers) // scene.flows)][: scene.flows]
    pulse = Pulse(flows, dice.sample(peers, len(peers)), fresh_every_s=scene.fresh_every_s)
    with Sender(pod.namespace, pulse) as sender:
        time.sleep(scene.lead_s)
        restarted = time.monotonic()
        say("the Cilium agent restarts")
        boot = cilium.start(
            Timeline(repin_after=0.5, fill_rate=scene.fill_rate, switch_after=scene.switch_after_s)
        )
        for step in (SWITCHED, FILLED):
            boot.wait(step, timeout=30 + scene.switch_after_s + scene.endpoints / scene.fill_rate)
            say(f"its programs have {step}" if step == SWITCHED else f"its new map is {step}")
        time.sleep(scene.lead_s)
        fates = sender.stop()
    events = {step: restarted + boot.times[step] - fates.began for step in (PINNED, SWITCHED, FILLED)}
    return Outcome(fates, {"restart": restarted - fates.began, **events}, _overwritten(cilium, set(peers)))


def _overwritten(cilium: Cilium, peers: set[str]) -> int:
    """Count our entries among those that the agent has written: a map that is filled has none."""
    found = 0
    with contextlib.closing(Map.pinned(cilium.pin)) as ipcache:
        for key, value in ipcache.items():
            size = 4 if key[7] == 1 else 16
            tag = value[-4:-2]
            found += tag == _TAG and str(ipaddress.ip_address(key[8 : 8 + size])) in peers
    return found
