"""Whether a record may become an entry here."""

import pytest

from lazymesh.core.model import Reason
from lazymesh.core.records import IpRecord, decode_pairs
from lazymesh.core.resolver.judge import Judge, Refusal
from tests.support.playbook import B1, B2, NODE, OTHER_NODE, WEB, WEB_OF_C, info, mesh, record

FAR_NODE = "172.18.0.66"
TABLE = mesh(regions=[(NODE, "north"), (FAR_NODE, "south")])

GOOD = {
    "any scope from the own region": record(B1, host=NODE, scope="regional"),
    "regional from a node of unknown region": record(B1, host=OTHER_NODE, scope="regional"),
    "global from another region": record(B1, host=FAR_NODE, scope="global"),
    "no scope from another region": record(B1, host=FAR_NODE),
}

BAD = {
    "garbage": (b"{", Reason.MALFORMED, 0),
    "another address": (record(B2), Reason.MALFORMED, 0),
    "another cluster's identity": (record(B1, WEB_OF_C), Reason.FORGED, WEB_OF_C),
    "reserved identity": (record(B1, 2), Reason.FORGED, 2),
    "unknown identity": (record(B1, 131999), Reason.UNKNOWN_IDENTITY, 131999),
    "regional from another region": (record(B1, host=FAR_NODE, scope="regional"), Reason.OUT_OF_SCOPE, WEB),
    "forged counts before unknown and scope": (record(B1, 9, FAR_NODE, "regional"), Reason.FORGED, 9),
}


def judged(value: bytes, region: str | None = "north") -> IpRecord | Refusal:
    """Return what becomes of the record of B1, on a node in this region."""
    (found,) = decode_pairs([value], [B1])
    return Judge(TABLE, {WEB}, region).verdict(found, info("b"))


@pytest.mark.parametrize("value", GOOD.values(), ids=GOOD)
def test_a_good_record_is_returned_decoded(value: bytes) -> None:
    """What may be installed comes back as a record."""
    verdict = judged(value)
    assert isinstance(verdict, IpRecord)
    assert verdict.identity == WEB


@pytest.mark.parametrize(("value", "reason", "identity"), BAD.values(), ids=BAD)
def test_a_bad_record_is_refused_with_its_reason(value: bytes, reason: Reason, identity: int) -> None:
    """The identity is named as far as it could be read: the address may be waiting for it."""
    verdict = judged(value)
    assert isinstance(verdict, Refusal)
    assert (verdict.reason, verdict.identity) == (reason, identity)


def test_a_node_that_does_not_know_its_region_is_in_every_scope() -> None:
    """Scope saves traffic; without a region nothing is saved and no peer is cut off."""
    regional = BAD["regional from another region"][0]
    verdict = judged(regional, region=None)
    assert isinstance(verdict, IpRecord)
