"""Files in YAML, read as the words that stand in them.

YAML takes ``no`` for false, ``010`` for 8 and ``1:30`` for 90. Here every word is the text it is, but for null, and
what it means is for those to say who asked for it.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_NULL = "tag:yaml.org,2002:null"


class _Words(yaml.BaseLoader):
    """Makes texts, lists and mappings of texts: no date, number or tag that could not be made out."""


_Words.add_implicit_resolver(_NULL, re.compile(r"(~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
_Words.add_constructor(_NULL, lambda _loader, _node: None)


class _WordsOnce(_Words):
    """Has no key twice, where YAML would take the last."""

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


def read_words(text: str, *, once: bool = False) -> Any:
    """Return what the text holds; a ValueError is a few words with the line, as far as that is known.

    once: a key that occurs twice is refused, too.
    """
    try:
        return yaml.load(text, _WordsOnce if once else _Words)  # noqa: S506 (see _Words)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    except (yaml.YAMLError, ValueError, OverflowError) as exc:  # PyYAML's own, and of numbers in escapes
        mark = getattr(exc, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{line}not YAML ({getattr(exc, 'problem', None) or 'malformed'})") from exc
