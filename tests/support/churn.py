"""Pods that come, go, and give their addresses to others, drawn from a seed; and what a node must know of them then."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from tests.support.etcd import wait_until

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from tests.support.witness import Witness


class Publisher(Protocol):
    """A cluster, as the lab and its neighbours are."""

    def publish(self, ip: str, identity: int) -> None:
        """Write a pod's record."""

    def withdraw(self, ip: str) -> None:
        """Delete it."""


class Churn:
    """Some addresses of one cluster, with the identities that they may be given, and a witness who is told first."""

    def __init__(
        self,
        cluster: Publisher,
        witness: Witness,
        addresses: Sequence[str],
        identities: Sequence[int],
        dice: random.Random,
    ) -> None:
        self.truth: dict[str, int | None] = dict.fromkeys(addresses)
        """What the records say; None: there is none."""
        self.changes = 0
        self._cluster, self._witness, self._dice = cluster, witness, dice
        self._identities = identities
        for address in addresses:
            witness.may_be(address)

    def change(self, count: int = 1) -> None:
        """Let so many addresses, drawn at random, be withdrawn or published, with the same identity or another."""
        for address in self._dice.sample(sorted(self.truth), count):
            if self.truth[address] is not None and self._dice.random() < 0.4:
                self._set(address, None)
            else:
                self._set(address, self._dice.choice(self._identities))

    def write_all(self) -> None:
        """Write every record anew, into a store that has lost them."""
        for address, identity in self.truth.items():
            if identity is not None:
                self._cluster.publish(address, identity)

    def differences(self) -> dict[str, tuple[int | None, int | None]]:
        """Return where the map is not what the records say: its identity, and theirs."""
        found = self._witness.now(self.truth)
        return {
            address: (found[address], identity)
            for address, identity in self.truth.items()
            if found[address] != identity
        }

    def settle(self) -> None:
        """Tell the witness that nothing but the present records is true: the map was seen to follow them."""
        for address, identity in self.truth.items():
            self._witness.only(address, *() if identity is None else (identity,))

    def _set(self, address: str, identity: int | None) -> None:
        self.changes += 1
        if identity is None:
            self._cluster.withdraw(address)
        else:
            self._witness.may_be(address, identity)
            self._cluster.publish(address, identity)
        self.truth[address] = identity


def settle(churns: Sequence[Churn], timeout_s: float = 30.0) -> float:
    """Wait until the map says what the records say, of every address; return how many seconds that took.

    Somebody has to send packets to all of them meanwhile: nobody else asks for what is not there.
    """
    began = time.monotonic()

    def same() -> bool:
        return not any(churn.differences() for churn in churns)

    try:
        wait_until(same, timeout_s)
    except TimeoutError:
        different = {address: pair for churn in churns for address, pair in churn.differences().items()}
        raise TimeoutError(
            f"after {timeout_s:g} s the map still differs from the records: {different}"
        ) from None
    for churn in churns:
        churn.settle()
    return time.monotonic() - began
