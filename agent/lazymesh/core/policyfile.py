"""Reads the policy of standalone mode from Cilium's own format, CiliumClusterwideNetworkPolicy in YAML.

Supported are rules for all pods of the node that select peers by labels, or all, or the world. Everything
else is refused with its line and never ignored: half a policy is a hole. What rules mean is taken from
Cilium's documentation and its ``Rule.Sanitize``:

- a direction is enforced (default deny) once it has a rule, even an empty one: ``egress: [{}]`` denies
  everything, while ``egress: []`` and no ``egress`` at all enforce nothing;
- selectors, rules and documents are a union; ``toEndpoints`` beside ``toEntities`` in one rule is refused;
- ``toEndpoints: []`` selects no peer, ``toEndpoints: [{}]`` every known identity, but not world.

Opening the file is left to the shell, applying the result to policy.py.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import NoReturn

import yaml

from lazymesh.core.policy import ANY_SOURCE, Operator, Policy, Requirement, Rules, Selector
from lazymesh.errors import SettingsError

API_VERSION = "cilium.io/v2"
KIND = "CiliumClusterwideNetworkPolicy"

_ENTITIES = ("all", "world")
_NULL = "tag:yaml.org,2002:null"
_TEXT = "tag:yaml.org,2002:str"
_MAPPING = "tag:yaml.org,2002:map"
_LIST = "tag:yaml.org,2002:seq"


class _RefusalError(Exception):
    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def parse_policy(text: str, file: str) -> Policy:
    """Return the union of the policies in the text; a SettingsError is one line that begins with ``file:line``."""
    try:
        return _documents(list(yaml.compose_all(text, Loader=yaml.SafeLoader)))
    except _RefusalError as refused:
        line, reason = refused.line, str(refused)
    except yaml.reader.ReaderError as error:
        line, reason = text.count("\n", 0, error.position) + 1, f"not YAML: {error.reason}"
    except yaml.MarkedYAMLError as error:
        line, reason = error.problem_mark.line + 1 if error.problem_mark else 1, f"not YAML: {error.problem}"
    except RecursionError:
        line, reason = 1, "nested too deeply"
    except (ValueError, OverflowError) as error:  # from numbers in escapes and directives
        line, reason = 1, f"not YAML: {error}"
    raise SettingsError(f"{file}:{line}: {' '.join(reason.split())}")


def _documents(documents: list[yaml.Node | None]) -> Policy:
    policies: dict[str, Policy] = {}
    for document in documents:
        if document is None or document.tag == _NULL:  # nothing between two separators
            continue
        name, policy = _document(document)
        if name in policies:
            _refuse(document, f"a second policy named {name!r}: Kubernetes would keep only one of them")
        policies[name] = policy
    if not policies:
        raise _RefusalError(1, f"no policy found: write one or more {KIND} documents")
    return reduce(or_, policies.values())


def _document(node: yaml.Node) -> tuple[str, Policy]:
    parts = _mapping(node, "a policy", ("apiVersion", "kind", "metadata", "spec", "specs"))
    _constant(node, parts, "apiVersion", API_VERSION)
    _constant(node, parts, "kind", KIND)
    if "metadata" not in parts:
        _refuse(node, "metadata is missing")
    metadata = _mapping(parts["metadata"], "metadata", ("name",))
    if "name" not in metadata:
        _refuse(parts["metadata"], "metadata has no name")
    specs = [parts["spec"]] if "spec" in parts else []
    specs += _list(parts["specs"], "specs") if "specs" in parts else []
    if not specs:
        _refuse(node, "spec is missing, or specs is empty")
    return _text(metadata["name"], "name"), reduce(or_, map(_spec, specs))


def _spec(node: yaml.Node) -> Policy:
    parts = _mapping(node, "spec", ("description", "endpointSelector", "egress", "ingress"))
    if "description" in parts:
        _text(parts["description"], "description")
    if "endpointSelector" not in parts:
        _refuse(node, "endpointSelector is missing")
    if _mapping(parts["endpointSelector"], "endpointSelector", None):
        _refuse(parts["endpointSelector"], "endpointSelector: only {} is supported, all pods of the node")
    if "egress" not in parts and "ingress" not in parts:
        _refuse(node, "spec has neither egress nor ingress")
    return Policy(_direction(parts, "egress", "to"), _direction(parts, "ingress", "from"))


def _direction(parts: dict[str, yaml.Node], name: str, side: str) -> Rules:
    rules = _list(parts[name], name) if name in parts else []
    return reduce(or_, (_rule(rule, name, side) for rule in rules), Rules())


def _rule(node: yaml.Node, direction: str, side: str) -> Rules:
    endpoints, entities = f"{side}Endpoints", f"{side}Entities"
    parts = _mapping(node, f"an {direction} rule", (endpoints, entities))
    selectors = _list(parts[endpoints], endpoints) if endpoints in parts else []
    names = _list(parts[entities], entities) if entities in parts else []
    if selectors and names:
        _refuse(node, f"{endpoints} and {entities} in one rule: Cilium refuses that too, write two rules")
    chosen = {_entity(name, entities) for name in names}
    return Rules(True, "all" in chosen, "world" in chosen, tuple(map(_selector, selectors)))


def _entity(node: yaml.Node, where: str) -> str:
    name = _text(node, f"an entity of {where}")
    if name not in _ENTITIES:
        _refuse(node, f"entity {name!r} is not supported: only {', '.join(_ENTITIES)}")
    return name


def _selector(node: yaml.Node) -> Selector:
    parts = _mapping(node, "a selector", ("matchLabels", "matchExpressions"))
    requirements = []
    if "matchLabels" in parts:
        for key, value in _mapping(parts["matchLabels"], "matchLabels", None).items():
            text = _text(value, f"the value of {key!r}")
            requirements.append(Requirement(_key(value, key), Operator.IN, frozenset({text})))
    if "matchExpressions" in parts:
        requirements += map(_expression, _list(parts["matchExpressions"], "matchExpressions"))
    return Selector(tuple(requirements))


def _expression(node: yaml.Node) -> Requirement:
    parts = _mapping(node, "an expression", ("key", "operator", "values"))
    if "key" not in parts or "operator" not in parts:
        _refuse(node, "an expression needs key and operator")
    word = _text(parts["operator"], "operator")
    if word not in {operator.value for operator in Operator}:
        _refuse(
            parts["operator"],
            f"operator {word!r}: only {', '.join(o.value for o in Operator)} are supported",
        )
    operator = Operator(word)
    values = _list(parts["values"], "values") if "values" in parts else []
    if bool(values) != (operator in (Operator.IN, Operator.NOT_IN)):
        _refuse(node, f"operator {word} {'takes no' if values else 'needs'} values")
    texts = frozenset(_text(value, "a value") for value in values)
    return Requirement(_key(parts["key"], _text(parts["key"], "key")), operator, texts)


def _key(node: yaml.Node, text: str) -> str:
    full = text if ":" in text else ANY_SOURCE + text
    source, _, name = full.partition(":")
    if not source or not name:
        _refuse(node, f"label key {text!r}: write SOURCE:KEY or KEY")
    if source == "reserved":
        _refuse(node, f"label key {text!r}: no peer here has it, use the entities {', '.join(_ENTITIES)}")
    return full


def _constant(node: yaml.Node, parts: dict[str, yaml.Node], name: str, expected: str) -> None:
    if name not in parts:
        _refuse(node, f"{name} is missing: only {expected} is supported")
    if _text(parts[name], name) != expected:
        _refuse(parts[name], f"{name}: only {expected} is supported")


def _mapping(node: yaml.Node, what: str, known: tuple[str, ...] | None) -> dict[str, yaml.Node]:
    """Return the values by key; ``known`` are the keys that may occur, None: any."""
    if not isinstance(node, yaml.MappingNode) or node.tag != _MAPPING:
        _refuse(node, f"{what} must be a mapping")
    parts: dict[str, yaml.Node] = {}
    for key_node, value in node.value:
        key = _text(key_node, f"a key of {what}")
        if key in parts:
            _refuse(key_node, f"{key!r} occurs twice in {what}")
        if known is not None and key not in known:
            _refuse(key_node, f"{key!r} is not supported in {what}: only {', '.join(known)}")
        parts[key] = value
    return parts


def _list(node: yaml.Node, what: str) -> list[yaml.Node]:
    if not isinstance(node, yaml.SequenceNode) or node.tag != _LIST:
        _refuse(node, f"{what} must be a list")
    return list(node.value)


def _text(node: yaml.Node, what: str) -> str:
    if not isinstance(node, yaml.ScalarNode) or node.tag != _TEXT:
        _refuse(node, f"{what} must be text, in quotes if it looks like something else")
    return str(node.value)


def _refuse(node: yaml.Node, reason: str) -> NoReturn:
    raise _RefusalError(node.start_mark.line + 1, reason)
