"""YAML files whose scalars stay text.

YAML takes ``no`` for false, ``010`` for 8 and ``1:30`` for 90. Here every scalar except null is the text as written,
and what it means is left to the caller.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_NULL = "tag:yaml.org,2002:null"


class _PlainLoader(yaml.BaseLoader):
    """Makes only texts, lists and mappings of texts, so no date, number or tag can fail to be understood."""


_PlainLoader.add_implicit_resolver(_NULL, re.compile(r"(~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
_PlainLoader.add_constructor(_NULL, lambda _loader, _node: None)


class _UniqueKeyLoader(_PlainLoader):
    """Refuses a key that occurs twice, where YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused below
            if key.value in seen:
                problem = f"{key.value!r} occurs twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_plain_yaml(text: str, *, unique_keys: bool = False) -> Any:
    """Return what the text holds; a ValueError is a few words, with the line if it is known.

    unique_keys: a key that occurs twice is refused, too.
    """
    try:
        return yaml.load(text, _UniqueKeyLoader if unique_keys else _PlainLoader)  # noqa: S506 (see _PlainLoader)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    except (yaml.YAMLError, ValueError, OverflowError) as exc:  # the last two: of numbers in escapes
        mark = getattr(exc, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{line}not YAML ({getattr(exc, 'problem', None) or 'malformed'})") from exc
