"""The resolver: what to read, install, watch and evict, decided from one event at a time.

``machine`` takes events and returns commands; it knows how one address moves (``moves``, ``tracked``), whose records
may be believed (``judge``), what is sent when (``backlog``, ``waiting``, ``breaker``), which entries are ours
(``ledger``) and which answers were no (``negatives``). ``limits`` bounds all of it.
"""

from lazymesh.core.resolver.judge import Judge
from lazymesh.core.resolver.limits import Limits
from lazymesh.core.resolver.machine import Resolver

__all__ = ["Judge", "Limits", "Resolver"]
