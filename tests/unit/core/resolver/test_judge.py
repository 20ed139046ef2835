"""Whether a record may become an entry here."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymesh.core.model import Reason
from lazymesh.core.records import IpRecord
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


@pytest.mark.parametrize("value", GOOD.values(), ids=GOOD)
def test_a_good_record_is_returned_decoded(value: bytes) -> None:
    """What may be installed comes back as a record."""
    ((verdict, _),) = Judge(TABLE, {WEB}, "north").verdicts([value], [B1], info("b"))
    assert isinstance(verdict, IpRecord)
    assert verdict.identity == WEB


@pytest.mark.parametrize(("value", "reason", "identity"), BAD.values(), ids=BAD)
def test_a_bad_record_is_refused_with_its_reason(value: bytes, reason: Reason, identity: int) -> None:
    """The identity is named as far as it could be read: the address may be waiting for it."""
    ((verdict, _),) = Judge(TABLE, {WEB}, "north").verdicts([value], [B1], info("b"))
    assert isinstance(verdict, Refusal)
    assert (verdict.reason, verdict.identity) == (reason, identity)


def test_a_node_that_does_not_know_its_region_is_in_every_scope() -> None:
    """Scope saves traffic; without a region nothing is saved and no peer is cut off."""
    regional = BAD["regional from another region"][0]
    ((verdict, _),) = Judge(TABLE, {WEB}, None).verdicts([regional], [B1], info("b"))
    assert isinstance(verdict, IpRecord)


@given(st.lists(st.sampled_from([*GOOD.values(), *(value for value, *_ in BAD.values())])))
def test_records_that_are_judged_together_are_judged_as_each_alone(values: list[bytes]) -> None:
    """Whatever is judged beside them: a bad one does not affect the others."""
    judge, cluster = Judge(TABLE, {WEB}, "north"), info("b")
    alone = [verdict for value in values for verdict, _ in judge.verdicts([value], [B1], cluster)]
    together = judge.verdicts(values, [B1] * len(values), cluster)
    assert {index: verdict for verdict, indexes in together for index in indexes} == dict(enumerate(alone))
    assert sorted(index for _, indexes in together for index in indexes) == list(range(len(values)))
