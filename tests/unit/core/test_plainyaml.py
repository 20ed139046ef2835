"""YAML files whose scalars stay text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymesh.core.plainyaml import read_plain_yaml


@pytest.mark.parametrize(
    "word", ["no", "off", "010", "1:30", "1e3", "2024-01-31", "nobody", "Nullable", "=", "0x1F"]
)
def test_a_scalar_is_the_text_as_written(word: str) -> None:
    """YAML makes booleans, numbers, dates and times of most of these."""
    assert read_plain_yaml(f"key: {word}") == {"key": word}


@pytest.mark.parametrize("word", ["", "~", "null", "Null", "NULL"])
def test_null_alone_is_none(word: str) -> None:
    """In quotes it is a text as well."""
    assert read_plain_yaml(f"key: {word}") == {"key": None}
    assert read_plain_yaml(f"key: '{word}'") == {"key": word}


def test_a_key_that_occurs_twice_is_refused_where_that_is_wanted() -> None:
    """At any depth; YAML takes the last without a word."""
    twice = "a: 1\nb:\n  c: 2\n  c: 3\n"
    assert read_plain_yaml(twice) == {"a": "1", "b": {"c": "3"}}
    with pytest.raises(ValueError, match=r"^line 4: not YAML \('c' occurs twice\)$"):
        read_plain_yaml(twice, unique_keys=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("a: [", "line 1: not YAML", id="a list without end"),
        pytest.param("a: 1\n\tb: 2", "line 2: not YAML", id="a tab"),
        pytest.param("[" * 2000, "nested too deeply", id="2,000 lists"),
        pytest.param('"\\U00110000"', "not YAML", id="no character"),
        pytest.param('"\\UFFFFFFFF"', "not YAML", id="a number that no character has"),
        pytest.param(f"%YAML {'1' * 5000}.1\n---\na", "not YAML", id="a version of 5,000 digits"),
        pytest.param("\x00", "not YAML", id="a zero byte"),
        pytest.param("? [a]\n: b", "not YAML", id="a list for a key"),
        pytest.param("*nowhere", "not YAML", id="an alias of nothing"),
    ],
)
@pytest.mark.parametrize("unique_keys", [False, True])
def test_what_is_not_yaml_is_refused_in_one_line(text: str, said: str, unique_keys: bool) -> None:
    """Also what PyYAML raises beside its own errors."""
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        read_plain_yaml(text, unique_keys=unique_keys)
    assert said in str(caught.value)


@given(st.text(alphabet='aN~n:-[]{}"\\Ux0%\n ?!&*|>', max_size=40), st.booleans())
def test_any_text_is_read_or_refused(text: str, unique_keys: bool) -> None:
    """Nothing but texts and None comes out."""

    def check(found: Any) -> None:
        if isinstance(found, dict):
            for key, value in found.items():
                check(key)
                check(value)
        elif isinstance(found, list):
            for value in found:
                check(value)
        else:
            assert found is None or isinstance(found, str)

    try:
        found = read_plain_yaml(text, unique_keys=unique_keys)
    except ValueError:
        return
    check(found)
