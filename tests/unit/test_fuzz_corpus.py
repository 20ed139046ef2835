"""What fuzzing has found interesting, replayed: every decoder keeps its word for all of it."""

from __future__ import annotations

import pytest

from tests.fuzz import corpus
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_decoder_raises_nothing_but_its_own_error(target: str) -> None:
    """Each input that once reached new code, or broke something; ``scripts/fuzz`` finds more."""
    inputs = corpus.kept(target)
    assert inputs, f"no corpus of {target}: make one with scripts/fuzz --keep {target}"
    for data in (b"", *TARGETS[target].seeds, *inputs):
        try:
            TARGETS[target].try_one(data)
        except Exception as error:
            raise AssertionError(f"{target} breaks on {data!r}") from error


def test_corpus_is_small_and_of_targets_that_there_are() -> None:
    """It is there to be fast; the rest is found again."""
    files = list(corpus.FOLDER.glob("*"))
    assert {path.stem for path in files} == set(TARGETS)
    assert sum(path.stat().st_size for path in files) < 300_000
