from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymesh.core.model import Direction
from lazymesh.core.policy import (
    Operator,
    Policy,
    PolicyChange,
    PolicyEngine,
    Requirement,
    Rules,
    Selector,
    with_any_source,
)

EGRESS, INGRESS = Direction.EGRESS, Direction.INGRESS
WEB, API, DB = 131073, 131074, 131075
LABELS = {
    "k8s:app": "web",
    "k8s:tier": "",
    "container:image": "nginx",
    "k8s:io.cilium.k8s.policy.cluster": "b",
    "k8s:a:b": "colon",
}


def condition(key: str, operator: str = "Exists", *values: str) -> Requirement:
    """Return one requirement, the operator by its Kubernetes name."""
    return Requirement(key, Operator(operator), frozenset(values))


def app(*names: str) -> Selector:
    """Return a selector of ``any:app`` in these names."""
    return Selector((condition("any:app", "In", *names),))


def labels(name: str) -> dict[str, str]:
    """Return the labels of an app."""
    return {"k8s:app": name, "k8s:io.cilium.k8s.policy.cluster": "b"}


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        pytest.param(condition("k8s:app", "In", "web"), True, id="source and key"),
        pytest.param(condition("any:app", "In", "web"), True, id="any source"),
        pytest.param(condition("any:image", "In", "nginx"), True, id="any source, another one"),
        pytest.param(condition("container:app", "In", "web"), False, id="the wrong source"),
        pytest.param(condition("k8s:app", "In", "api", "web"), True, id="one of several values"),
        pytest.param(condition("k8s:app", "In", "api"), False, id="another value"),
        pytest.param(condition("k8s:none", "In", ""), False, id="a missing label is not an empty one"),
        pytest.param(condition("k8s:tier", "In", ""), True, id="an empty value"),
        pytest.param(condition("k8s:tier"), True, id="an empty value exists"),
        pytest.param(condition("any:none"), False, id="a missing label does not exist"),
        pytest.param(condition("k8s:app", "NotIn", "web"), False, id="not in, but it is"),
        pytest.param(condition("k8s:app", "NotIn", "api"), True, id="not in"),
        pytest.param(condition("any:none", "NotIn", "web"), True, id="not in holds without the label"),
        pytest.param(condition("any:app", "DoesNotExist"), False, id="does not exist, but it does"),
        pytest.param(condition("any:none", "DoesNotExist"), True, id="does not exist"),
        pytest.param(condition("any:a:b", "In", "colon"), True, id="a colon in the key"),
        pytest.param(condition("any:b"), False, id="what follows a colon in the key is no key"),
        pytest.param(condition("reserved:world"), False, id="a reserved label that no pod has"),
    ],
)
def test_a_requirement_looks_at_one_label(requirement: Requirement, expected: bool) -> None:
    """Kubernetes' operators over Cilium's label sources."""
    assert Selector((requirement,)).holds(with_any_source(LABELS)) is expected


def test_labels_are_seen_of_any_source_whatever_their_length() -> None:
    """Another cluster chooses their keys."""
    for key in ("app", "x" * 60_000):
        assert with_any_source({f"k8s:{key}": "1"}) == {f"k8s:{key}": "1", f"any:{key}": "1"}


def test_all_requirements_of_a_selector_must_hold() -> None:
    """An and; the or is between selectors."""
    seen = with_any_source(LABELS)
    assert Selector((condition("any:app", "In", "web"), condition("any:tier"))).holds(seen)
    assert not Selector((condition("any:app", "In", "web"), condition("any:none"))).holds(seen)
    assert Selector().holds(seen)


def test_identities_change_what_is_allowed_as_they_come_change_and_go() -> None:
    """Each change says exactly what to write and what to delete."""
    engine = PolicyEngine(
        Policy(Rules(enforced=True, selectors=(app("web", "api"),)), Rules(True, selectors=(app("web"),)))
    )
    assert engine.upsert(WEB, labels("web")) == PolicyChange(((EGRESS, WEB), (INGRESS, WEB)))
    assert engine.upsert(WEB, labels("web")) == PolicyChange()
    assert engine.upsert(WEB, labels("api")) == PolicyChange((), ((INGRESS, WEB),))
    assert engine.upsert(DB, labels("db")) == PolicyChange()
    assert engine.remove(WEB) == PolicyChange((), ((EGRESS, WEB),))
    assert engine.remove(WEB) == PolicyChange()


def test_what_is_withdrawn_is_denied_until_its_next_change() -> None:
    """In the one direction that could not be written; then it is a change."""
    engine = PolicyEngine(
        Policy(Rules(enforced=True, selectors=(app("web"),)), Rules(True, selectors=(app("web"),)))
    )
    engine.upsert(WEB, labels("web"))
    engine.withdraw([(EGRESS, WEB), (INGRESS, DB)])
    assert not engine.verdict(EGRESS, WEB)
    assert engine.verdict(INGRESS, WEB)
    assert engine.upsert(WEB, labels("web")) == PolicyChange(((EGRESS, WEB),))


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        pytest.param(Rules(), {WEB: True, DB: True, 2: True}, id="no rules: nothing is enforced"),
        pytest.param(Rules(True), {WEB: False, DB: False, 2: False}, id="empty rules: nothing passes"),
        pytest.param(
            Rules(True, selectors=(app("web"),)),
            {WEB: True, DB: False, 2: False, 9: False},
            id="who is selected",
        ),
        pytest.param(
            Rules(True, allow_world=True),
            {WEB: False, DB: False, 2: True, 9: True, 10: True},
            id="world in all numbers",
        ),
        pytest.param(Rules(True, allow_all=True), {WEB: True, DB: True, 2: True}, id="all: known or not"),
        pytest.param(
            Rules(True, selectors=(Selector(),)),
            {WEB: True, DB: False, 2: False},
            id="the empty selector: whom we know, not the world",
        ),
    ],
)
def test_a_verdict_follows_the_rules_of_its_direction(rules: Rules, expected: dict[int, bool]) -> None:
    """WEB is known, DB is not; the other direction has no rules and lets all pass."""
    engine = PolicyEngine(Policy(egress=rules))
    engine.upsert(WEB, labels("web"))
    assert {identity: engine.verdict(EGRESS, identity) for identity in expected} == expected
    assert all(engine.verdict(INGRESS, identity) for identity in expected)


def test_world_is_in_what_a_new_policy_allows() -> None:
    """It has no labels and never comes as an identity: the policy alone admits it."""
    engine = PolicyEngine(Policy(ingress=Rules(True, allow_world=True)))
    assert engine.current() == PolicyChange(((INGRESS, 2),))


def test_the_kernel_enforces_only_where_a_peer_may_be_denied() -> None:
    """With ``all`` allowed there is nothing to look up, and nothing to write."""
    policy = Policy(Rules(True, allow_all=True, allow_world=True, selectors=(app("web"),)), Rules(True))
    engine = PolicyEngine(policy)
    assert engine.enforced == {INGRESS}
    assert engine.upsert(WEB, labels("web")) == engine.current() == PolicyChange()


def test_policies_add_up() -> None:
    """What one document allows, no other takes away."""
    both = Policy(Rules(True, selectors=(app("web"),))) | Policy(Rules(True, allow_world=True), Rules(True))
    assert both == Policy(Rules(True, allow_world=True, selectors=(app("web"),)), Rules(True))
    assert Policy() | both == both


KEYS = ("k8s:app", "container:app", "k8s:tier")
LABEL_SETS = st.permutations(KEYS).flatmap(
    lambda keys: st.lists(st.sampled_from(["web", "api"]), max_size=len(keys)).map(
        lambda values: dict(zip(keys, values, strict=False))
    )
)
SELECTORS = st.lists(
    st.builds(
        Requirement,
        st.sampled_from(["any:app", "k8s:app", "any:tier", "container:tier"]),
        st.sampled_from(list(Operator)),
        st.frozensets(st.sampled_from(["web", "api"]), min_size=1),
    ),
    max_size=3,
).map(lambda requirements: Selector(tuple(requirements)))


@given(st.lists(SELECTORS, min_size=1, max_size=3), st.lists(LABEL_SETS, min_size=8, max_size=16))
def test_who_is_selected_depends_on_all_labels_whatever_came_before(
    selectors: list[Selector], many: list[dict[str, str]]
) -> None:
    """Verdicts are remembered by the labels that are asked for; the first source of a key is the one that counts."""
    engine = PolicyEngine(Policy(egress=Rules(True, selectors=tuple(selectors))))
    for identity, said in enumerate(many, 1_000):
        engine.upsert(identity, said)
        selected = any(selector.holds(with_any_source(said)) for selector in selectors)
        assert engine.verdict(EGRESS, identity) is selected


def test_another_clusters_long_labels_are_judged_and_not_kept() -> None:
    """Nor are many, and those that no selector asks for take no room."""
    engine = PolicyEngine(Policy(egress=Rules(True, selectors=(app("web"),))))
    long = "x" * 60_000
    for said in ({f"{long}:app": "web"}, {"k8s:app": "web", long: "1"}):
        engine.upsert(WEB, said)
        assert engine.verdict(EGRESS, WEB)
    engine.upsert(WEB, {"k8s:app": long})
    assert not engine.verdict(EGRESS, WEB)
    assert (list(engine._asked), list(engine._verdicts)) == (["k8s:app"], [(("k8s:app", "web"),)])
    for number in range(10_000):
        engine.upsert(WEB, {"k8s:app": str(number), f"k8s:{number}": "1"})
    assert len(engine._asked) <= 8_192
    assert len(engine._verdicts) <= 8_192


RULES = st.builds(
    Rules,
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.lists(st.sampled_from([app("web"), app("api"), Selector()]), max_size=2).map(tuple),
)
POLICIES = st.builds(Policy, RULES, RULES)
STEPS = st.one_of(
    st.tuples(st.just("upsert"), st.sampled_from([WEB, API, DB]), st.sampled_from(["web", "api", "db"])),
    st.tuples(st.just("remove"), st.sampled_from([WEB, API, DB])),
)


@given(POLICIES, st.lists(STEPS, max_size=12))
def test_changes_add_up_to_the_verdicts(policy: Policy, steps: list[tuple[object, ...]]) -> None:
    """A kernel map that follows the changes gives the verdicts of the engine, without superfluous writes."""
    engine = PolicyEngine(policy)
    kernel = set(engine.current().allowed)
    for step in steps:
        match step:
            case "upsert", int(identity), str(name):
                change = engine.upsert(identity, labels(name))
            case "remove", int(identity):
                change = engine.remove(identity)
        assert kernel.isdisjoint(change.allowed)
        assert kernel.issuperset(change.revoked)
        kernel = (kernel | set(change.allowed)) - set(change.revoked)
        assert kernel == set(engine.current().allowed)
        for direction in Direction:
            for identity in (2, WEB, API, DB):
                passes = direction not in engine.enforced or (direction, identity) in kernel
                assert engine.verdict(direction, identity) is passes


WEB_OR_API = Policy(Rules(True, selectors=(app("web", "api"), Selector((condition("k8s:tier"),)))))


@pytest.mark.parametrize(
    ("other", "same"),
    [
        pytest.param(
            Policy(Rules(True, selectors=(Selector((condition("k8s:tier"),)), app("api", "web")))),
            True,
            id="in another order",
        ),
        pytest.param(WEB_OR_API | WEB_OR_API, True, id="said twice"),
        pytest.param(Policy(ingress=WEB_OR_API.egress), False, id="in the other direction"),
        pytest.param(WEB_OR_API | Policy(Rules(allow_world=True)), False, id="and the world"),
        pytest.param(WEB_OR_API | Policy(Rules(allow_all=True)), False, id="and all"),
        pytest.param(Policy(Rules(True, selectors=(app("web", "api"),))), False, id="a selector less"),
        pytest.param(
            Policy(Rules(True, selectors=(app("web"), app("api"), Selector((condition("k8s:tier"),))))),
            False,
            id="in other words",
        ),
        pytest.param(
            Policy(Rules(True, selectors=(app("web", "api"), Selector((condition("k8s:tier", "NotIn"),))))),
            False,
            id="with another operator",
        ),
        pytest.param(Policy(), False, id="nothing"),
    ],
)
def test_a_tag_tells_whether_a_policy_says_the_same(other: Policy, same: bool) -> None:
    """Over a restart: rights by another policy must not stay, those by the same one must."""
    assert (other.tag == WEB_OR_API.tag) is same
    assert 0 < other.tag < 1 << 64


def test_a_tag_is_the_same_in_every_process() -> None:
    """And in the next version: else an upgrade denies every peer until all clusters are listed."""
    assert WEB_OR_API.tag == 0x748A24787D4C828A
