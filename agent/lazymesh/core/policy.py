"""The standalone policy: which identities may talk, by direction, as identities come and go.

A small part of Cilium's policy model: rules only allow, all of them count (a union), and a direction that has
rules denies the rest. Selectors look only at identities' labels and never select world, as in a clusterwide
policy of Cilium, which demands a namespace label of every selected peer (its ``getEndpointSelector``). Unlike
Cilium from 1.19 on (``policy-default-local-cluster``), a selector that names no cluster selects pods of every
cluster: here all peers are remote. Reading policies is left to policyfile.py, writing verdicts into the
kernel's map to the shell.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from lazymesh.core.identities import WORLD, WORLD_IDENTITIES
from lazymesh.core.model import Direction

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lazymesh.core.records import Labels

ANY_SOURCE = "any:"
_MAX_CACHED = 128
"""Characters of a label's key; a longer one is rare and is not cached."""
_MAX_RELEVANT = 512
"""Characters of all labels of an identity that a policy asks for; more are rare, and their verdict is not cached."""
_MOST_CACHED = 8_192


class Operator(enum.Enum):
    """What a requirement asks of a label; the value is Kubernetes' name for it."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


@dataclass(frozen=True, slots=True)
class Requirement:
    """One condition on one label."""

    key: str
    """``source:key``; the source ``any`` stands for every source."""
    operator: Operator
    values: frozenset[str] = frozenset()

    def holds(self, seen: Mapping[str, str]) -> bool:
        """Return whether the labels, as :func:`with_any_source` shows them, meet the condition.

        As in Kubernetes, NotIn also holds where the label is missing.
        """
        value = seen.get(self.key)
        match self.operator:
            case Operator.IN:
                return value in self.values
            case Operator.NOT_IN:
                return value not in self.values
            case Operator.EXISTS:
                return value is not None
            case Operator.DOES_NOT_EXIST:
                return value is None


@dataclass(frozen=True, slots=True)
class Selector:
    """Conditions that must all hold; a selector without any selects every known identity."""

    requirements: tuple[Requirement, ...] = ()

    def holds(self, seen: Mapping[str, str]) -> bool:
        """Return whether an identity with these labels, as :func:`with_any_source` shows them, is selected."""
        return all(requirement.holds(seen) for requirement in self.requirements)


def with_any_source(labels: Labels) -> dict[str, str]:
    """Return the labels both under their source and under ``any:``, so that a condition takes one lookup."""
    seen = dict(labels)
    for key, value in labels.items():
        seen.setdefault(_of_any_source(key), value)
    return seen


def _of_any_source(key: str) -> str:
    return ANY_SOURCE + key.partition(":")[2]


class _Asked(dict[str, bool]):
    """Whether a policy asks for the label with a key. Most are not asked for, and a mesh has a few hundred keys."""

    def __init__(self, selectors: Iterable[Selector]) -> None:
        self._keys = frozenset(one.key for selector in selectors for one in selector.requirements)

    def __missing__(self, key: str) -> bool:
        asked = key in self._keys or _of_any_source(key) in self._keys
        # Another cluster chooses the keys: neither long nor many are kept.
        if len(key) <= _MAX_CACHED:
            if len(self) >= _MOST_CACHED:
                self.clear()
            self[key] = asked
        return asked


@dataclass(frozen=True, slots=True)
class Rules:
    """What the policy says about one direction."""

    enforced: bool = False
    """What is not allowed is denied; False: there are no rules and everything passes."""
    allow_all: bool = False
    """Everything passes, known or not: entity ``all``."""
    allow_world: bool = False
    """Peers without an identity of their own pass: entity ``world``."""
    selectors: tuple[Selector, ...] = ()

    def __or__(self, other: Rules) -> Rules:
        """Return the union: what either allows is allowed."""
        return Rules(
            self.enforced or other.enforced,
            self.allow_all or other.allow_all,
            self.allow_world or other.allow_world,
            self.selectors + other.selectors,
        )


@dataclass(frozen=True, slots=True)
class Policy:
    """What is allowed, by direction; the default enforces nothing."""

    egress: Rules = Rules()
    ingress: Rules = Rules()

    def __or__(self, other: Policy) -> Policy:
        """Return the union of both directions."""
        return Policy(self.egress | other.egress, self.ingress | other.ingress)

    def of(self, direction: Direction) -> Rules:
        """Return the rules of the direction."""
        return self.egress if direction is Direction.EGRESS else self.ingress

    @property
    def enforced(self) -> frozenset[Direction]:
        """The directions in which some peer may be denied, so that the kernel must look at its policy map."""
        return frozenset(d for d in Direction if self.of(d).enforced and not self.of(d).allow_all)

    @property
    def tag(self) -> int:
        """A 64-bit number for what the policy says, never 0: the same whatever the order of rules, in every process."""
        said = repr([_said(self.of(direction)) for direction in Direction])
        return int.from_bytes(hashlib.sha256(said.encode()).digest()[:8]) or 1


def _said(rules: Rules) -> tuple[object, ...]:
    selectors = {
        tuple(sorted((one.key, one.operator.value, *sorted(one.values)) for one in selector.requirements))
        for selector in rules.selectors
    }
    return rules.enforced, rules.allow_all, rules.allow_world, sorted(selectors)


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """What to write into the kernel's policy map, and what to delete from it."""

    allowed: tuple[tuple[Direction, int], ...] = ()
    revoked: tuple[tuple[Direction, int], ...] = ()


_NOWHERE: frozenset[Direction] = frozenset()
_NO_CHANGE = PolicyChange()


class PolicyEngine:
    """Judges each identity's labels by the policy once, and keeps only the verdicts.

    Labels may be long and many, and another cluster may make them longer, so none is kept. World is identity 2 in every
    change; changes do not mention directions that are not enforced.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.enforced = policy.enforced
        """The directions in which the kernel must enforce."""
        self._asked = _Asked([one for each in self.enforced for one in policy.of(each).selectors])
        self._verdicts: dict[tuple[tuple[str, str], ...], frozenset[Direction]] = {}
        """By the labels that the policy asks for: 100,000 identities have few combinations of those."""
        self._allowed: dict[int, frozenset[Direction]] = {}
        """The directions in which an identity may talk; of those that may not, there is nothing."""
        self._settle(WORLD, frozenset(each for each in self.enforced if policy.of(each).allow_world))

    def current(self) -> PolicyChange:
        """Return all that is allowed, as a change from nothing."""
        return PolicyChange(
            tuple(sorted((each, identity) for identity, allowed in self._allowed.items() for each in allowed))
        )

    def upsert(self, identity: int, labels: Labels) -> PolicyChange:
        """Add an identity, or update its labels."""
        return self._settle(identity, self._admitting(labels))

    def remove(self, identity: int) -> PolicyChange:
        """Forget an identity, known or not."""
        return self._settle(identity, _NOWHERE)

    def withdraw(self, pairs: Iterable[tuple[Direction, int]]) -> None:
        """Count as denied what could not be written, so that it is a change the next time."""
        for direction, identity in pairs:
            self._settle(identity, self._allowed.get(identity, _NOWHERE) - {direction})

    def verdict(self, direction: Direction, identity: int) -> bool:
        """Return whether the identity's traffic passes; where rules are enforced, an unknown one's does not."""
        if direction not in self.enforced:
            return True
        return direction in self._allowed.get(WORLD if identity in WORLD_IDENTITIES else identity, _NOWHERE)

    def _admitting(self, labels: Labels) -> frozenset[Direction]:
        if not self.enforced:
            return _NOWHERE
        asked = self._asked
        relevant = tuple([label for label in labels.items() if asked[label[0]]])
        known = self._verdicts.get(relevant)
        if known is not None:
            return known
        seen = with_any_source(dict(relevant))
        admitting = frozenset(
            direction
            for direction in self.enforced
            if any(one.holds(seen) for one in self._policy.of(direction).selectors)
        )
        if sum(map(len, chain.from_iterable(relevant))) <= _MAX_RELEVANT:
            if len(self._verdicts) >= _MOST_CACHED:
                self._verdicts.clear()
            self._verdicts[relevant] = admitting
        return admitting

    def _settle(self, identity: int, admitting: frozenset[Direction]) -> PolicyChange:
        before = self._allowed.get(identity, _NOWHERE)
        if before == admitting:
            return _NO_CHANGE
        if admitting:
            self._allowed[identity] = admitting
        else:
            del self._allowed[identity]
        return PolicyChange(
            tuple((direction, identity) for direction in sorted(admitting - before)),
            tuple((direction, identity) for direction in sorted(before - admitting)),
        )
