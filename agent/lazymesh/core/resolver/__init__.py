"""The resolver: what to read, install, watch and evict, decided from one event at a time.

``machine`` takes events and returns commands. Its parts: how one address moves (``moves``, ``tracked``), what happens
to whole clusters (``lifecycle``), which records are believed (``judge``), what is sent when (``backlog``, ``waiting``,
``breaker``), which entries are ours (``ledger``), which answers were no (``negatives``), how many misses the kernel may
signal (``admission``). ``limits`` bounds all of it.
"""

from lazymesh.core.resolver.judge import Judge
from lazymesh.core.resolver.limits import Limits
from lazymesh.core.resolver.machine import Resolver

__all__ = ["Judge", "Limits", "Resolver"]
