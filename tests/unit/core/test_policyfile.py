from __future__ import annotations

import contextlib
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymesh.core.policy import Operator, Policy, Requirement, Rules, Selector
from lazymesh.core.policyfile import parse_policy
from lazymesh.errors import SettingsError

HEAD = """\
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata:
  name: NAME
"""


def document(spec: str, name: str = "p") -> str:
    """Return a policy whose spec begins on line 6."""
    return (
        HEAD.replace("NAME", name)
        + "spec:\n"
        + textwrap.indent(textwrap.dedent(spec).strip("\n"), "  ")
        + "\n"
    )


def rules(text: str) -> str:
    """Return a policy with these fields beside an empty endpointSelector; they begin on line 7."""
    return document("endpointSelector: {}\n" + textwrap.dedent(text).strip("\n"))


def label(key: str, *values: str) -> Requirement:
    """Return the requirement that a label has one of these values."""
    return Requirement(key, Operator.IN, frozenset(values))


def test_a_policy_as_people_write_it_is_read() -> None:
    """Labels with and without source, expressions, entities, both directions."""
    text = rules("""
        description: shop and world
        egress:
        - toEndpoints:
          - matchLabels:
              app: web
              k8s:io.cilium.k8s.policy.cluster: b
          - matchExpressions:
            - {key: any:tier, operator: NotIn, values: [db, cache]}
            - {key: app, operator: Exists}
        - toEntities: [world]
        ingress:
        - fromEndpoints:
          - matchExpressions:
            - {key: k8s:app, operator: DoesNotExist}
    """)
    web = Selector((label("any:app", "web"), label("k8s:io.cilium.k8s.policy.cluster", "b")))
    rest = Selector(
        (
            Requirement("any:tier", Operator.NOT_IN, frozenset({"db", "cache"})),
            Requirement("any:app", Operator.EXISTS),
        )
    )
    nobody = Selector((Requirement("k8s:app", Operator.DOES_NOT_EXIST),))
    assert parse_policy(text, "p.yaml") == Policy(
        Rules(True, allow_world=True, selectors=(web, rest)), Rules(True, selectors=(nobody,))
    )


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        pytest.param("egress: []", Rules(), id="no rules: nothing is enforced"),
        pytest.param("egress: [{}]", Rules(True), id="the empty rule: default deny, nothing allowed"),
        pytest.param("egress: [{toEndpoints: []}]", Rules(True), id="no selectors select no peer"),
        pytest.param("egress: [{toEntities: []}]", Rules(True), id="no entities"),
        pytest.param(
            "egress: [{toEndpoints: [], toEntities: [world]}]",
            Rules(True, False, True),
            id="an empty list beside",
        ),
        pytest.param(
            "egress: [{toEndpoints: [{}]}]", Rules(True, selectors=(Selector(),)), id="the empty selector"
        ),
        pytest.param(
            "egress: [{toEndpoints: [{matchLabels: {}, matchExpressions: []}]}]",
            Rules(True, selectors=(Selector(),)),
            id="the empty selector, spelled out",
        ),
        pytest.param("egress: [{toEntities: [all]}]", Rules(True, allow_all=True), id="all"),
        pytest.param(
            "egress: [{toEntities: [world]}, {}]",
            Rules(True, allow_world=True),
            id="an empty rule adds nothing",
        ),
        pytest.param(
            "egress: [{toEndpoints: [{matchLabels: {app: '1'}}]}]",
            Rules(True, selectors=(Selector((label("any:app", "1"),)),)),
            id="a number in quotes is a text",
        ),
    ],
)
def test_sections_mean_what_they_mean_to_cilium(section: str, expected: Rules) -> None:
    """Default deny begins with the first rule, and only for its direction; both sides read alike."""
    assert parse_policy(rules(section), "p.yaml") == Policy(egress=expected)
    mirrored = section.replace("egress", "ingress").replace("toE", "fromE")
    assert parse_policy(rules(mirrored), "p.yaml") == Policy(ingress=expected)


def test_documents_and_specs_are_a_union() -> None:
    """Several documents in a file, several specs in a document, nothing between two separators."""
    specs = HEAD.replace("NAME", "two") + textwrap.dedent("""\
        spec: {endpointSelector: {}, ingress: [{}]}
        specs:
        - {endpointSelector: {}, egress: [{toEntities: [world]}]}
        - {endpointSelector: {}, egress: [{toEndpoints: [{}]}]}
    """)
    text = (
        "---\n---\n"
        + document("{endpointSelector: {}, egress: [{toEndpoints: [{matchLabels: {a: b}}]}]}")
        + "---\n"
        + specs
    )
    assert parse_policy(text, "p.yaml") == Policy(
        Rules(True, allow_world=True, selectors=(Selector((label("any:a", "b"),)), Selector())), Rules(True)
    )


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        pytest.param("", 1, "no policy found", id="an empty file"),
        pytest.param("# nothing\n---\n", 1, "no policy found", id="comments only"),
        pytest.param("kind:\n\t- x\n", 2, "not YAML", id="a tab"),
        pytest.param("a: [\n", 2, "not YAML", id="YAML that ends too early"),
        pytest.param("a: b\n\x07\n", 2, "not YAML", id="a control character"),
        pytest.param("[" * 3000, 1, "nested too deeply", id="nested beyond all measure"),
        pytest.param('a: "\\U00110000"', 1, "not YAML", id="a character that there is not"),
        pytest.param('a: "\\UFFFFFFFF"', 1, "not YAML", id="a character beyond all numbers"),
        pytest.param("%YAML " + "1" * 5000 + ".1\n--- {}", 1, "not YAML", id="a version beyond all numbers"),
        pytest.param("- a\n", 1, "a policy must be a mapping", id="a list"),
        pytest.param("kind: x\nkind: y\n", 2, "'kind' occurs twice in a policy", id="a key twice"),
        pytest.param("1: x\n", 1, "a key of a policy must be text", id="a key that is a number"),
        pytest.param(
            "status: {}\n",
            1,
            "'status' is not supported in a policy: only apiVersion, kind",
            id="unknown key",
        ),
        pytest.param("metadata: {name: x}\n", 1, "apiVersion is missing", id="no apiVersion"),
        pytest.param(HEAD.replace("v2", "v1"), 1, "apiVersion: only cilium.io/v2", id="another version"),
        pytest.param(
            HEAD.replace("Clusterwide", ""), 2, "kind: only CiliumClusterwide", id="a namespaced policy"
        ),
        pytest.param(HEAD, 1, "spec is missing", id="no spec"),
        pytest.param(HEAD + "specs: []\n", 1, "specs is empty", id="empty specs"),
        pytest.param(HEAD + "spec:\n", 5, "spec must be a mapping", id="a spec without content"),
        pytest.param(
            HEAD + "  namespace: x\n", 5, "'namespace' is not supported in metadata", id="a namespace"
        ),
        pytest.param(HEAD.replace("  name: NAME", "  {}"), 4, "metadata has no name", id="no name"),
        pytest.param(
            rules("egress: [{}]").replace("name: p", "name: 1"),
            4,
            "name must be text",
            id="a name that is a number",
        ),
        pytest.param(
            "\n".join(HEAD.split("\n")[:2]) + "\nspec: {}\n", 1, "metadata is missing", id="no metadata"
        ),
        pytest.param(document("egress: [{}]"), 6, "endpointSelector is missing", id="no endpointSelector"),
        pytest.param(document("endpointSelector: {}"), 6, "neither egress nor ingress", id="no direction"),
        pytest.param(
            document("endpointSelector: {matchLabels: {a: b}}\negress: [{}]"),
            6,
            "only {} is supported",
            id="a subject",
        ),
        pytest.param(rules("egressDeny: [{}]"), 7, "'egressDeny' is not supported in spec", id="deny rules"),
        pytest.param(
            rules("enableDefaultDeny: {egress: false}"), 7, "is not supported in spec", id="default allow"
        ),
        pytest.param(rules("egress:"), 7, "egress must be a list", id="a direction without content"),
        pytest.param(rules("egress: {}"), 7, "egress must be a list", id="a direction that is no list"),
        pytest.param(rules("egress:\n-"), 8, "an egress rule must be a mapping", id="a rule without content"),
        pytest.param(
            rules("egress:\n- toEndpoints: [{}]\n  toPorts: [{}]"),
            9,
            "'toPorts' is not supported in an egress rule: only toEndpoints, toEntities",
            id="ports",
        ),
        pytest.param(rules("egress: [{toCIDR: [10.0.0.0/8]}]"), 7, "'toCIDR' is not supported", id="CIDRs"),
        pytest.param(
            rules("ingress: [{toEndpoints: [{}]}]"),
            7,
            "'toEndpoints' is not",
            id="the other direction's field",
        ),
        pytest.param(
            rules("egress: [{toEndpoints: [{}], toEntities: [world]}]"),
            7,
            "in one rule",
            id="endpoints and entities",
        ),
        pytest.param(rules("egress: [{toEntities: [cluster]}]"), 7, "only all, world", id="another entity"),
        pytest.param(
            rules("egress: [{toEntities: world}]"), 7, "toEntities must be a list", id="an entity, no list"
        ),
        pytest.param(
            rules("egress: [{toEndpoints: [{app: x}]}]"), 7, "not supported in a selector", id="bare labels"
        ),
        pytest.param(
            rules("egress: [{toEndpoints: [{matchLabels: {app: 1}}]}]"),
            7,
            "the value of 'app' must be text",
            id="a number",
        ),
        pytest.param(
            rules("egress: [{toEndpoints: [{matchLabels: {reserved:world: ''}}]}]"),
            7,
            "no peer here has it",
            id="reserved",
        ),
        pytest.param(
            rules("egress: [{toEndpoints: [{matchLabels: {':a': b}}]}]"), 7, "SOURCE:KEY", id="no source"
        ),
        pytest.param(
            rules("egress: [{toEndpoints: [{matchLabels: {'': b}}]}]"), 7, "label key ''", id="no key"
        ),
        pytest.param(
            rules("egress: [{toEndpoints: [{matchExpressions: [{key: a}]}]}]"),
            7,
            "needs key and operator",
            id="no operator",
        ),
        pytest.param(
            rules("egress: [{toEndpoints: [{matchExpressions: [{key: a, operator: Gt, values: ['1']}]}]}]"),
            7,
            "operator 'Gt': only In, NotIn, Exists, DoesNotExist",
            id="another operator",
        ),
        pytest.param(
            rules("egress: [{toEndpoints: [{matchExpressions: [{key: a, operator: In}]}]}]"),
            7,
            "operator In needs values",
            id="In what?",
        ),
        pytest.param(
            rules("egress: [{toEndpoints: [{matchExpressions: [{key: a, operator: Exists, values: [b]}]}]}]"),
            7,
            "operator Exists takes no values",
            id="Exists what?",
        ),
        pytest.param(rules("egress: !ours [{}]"), 7, "egress must be a list", id="a tag on a list"),
        pytest.param(rules("egress: [!ours {}]"), 7, "an egress rule must be a mapping", id="a private tag"),
        pytest.param(
            rules("egress: [{}]") + "---\n" + rules("egress: [{toEntities: [all]}]"),
            9,
            "a second policy named 'p'",
            id="twice",
        ),
    ],
)
def test_what_is_not_supported_is_refused_with_its_line(text: str, line: int, words: str) -> None:
    """One line for the person at the terminal: where, what, and what would be supported."""
    with pytest.raises(SettingsError) as caught:
        parse_policy(text, "/etc/policy.yaml")
    message = str(caught.value)
    assert message.startswith(f"/etc/policy.yaml:{line}: ")
    assert words in message
    assert "\n" not in message


PIECES = st.sampled_from(
    [
        *"{}[]:-,'\"\n\t &*!|>%@#?",
        "  ",
        "a",
        "- ",
        ": ",
        "spec",
        "egress",
        "toEndpoints",
        "matchLabels",
        "---\n",
        "%YAML 1.1\n",
        '"\\U00110000"',
        '"\\UFFFFFFFF"',
        HEAD,
    ]
)


@given(st.lists(PIECES, max_size=30).map("".join) | st.text())
def test_no_text_crashes_the_parser(text: str) -> None:
    """A policy, or a SettingsError of one line."""
    with contextlib.suppress(SettingsError):
        parse_policy(text, "p.yaml")
