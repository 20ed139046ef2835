"""docs/ speaks of what there is: messages that the program says, reasons that it gives, files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lazymesh.core.model import Reason

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
GENERATED = {"kernels.md"}
"""Written by the run that fills it."""


def rows(head: str) -> list[str]:
    """Return the first cells of the tables in troubleshooting.md whose first column is headed so."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    found = re.findall(rf"^\| {head} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [re.match(r"\| `(.*?)` ", line)[1] for table in found for line in table.splitlines()]  # type: ignore[index]


@pytest.mark.parametrize("message", [*rows("its last line says"), *rows("it says")])
def test_message_is_one_of_the_programs(message: str) -> None:
    """A line that was reworded is reworded in the docs too."""
    sources = " ".join(path.read_text() for path in (ROOT / "agent" / "lazymesh").rglob("*.py"))
    assert message in re.sub(r'"\s+f?"', "", sources)


def test_reasons_are_the_programs() -> None:
    """Each is explained, none is invented."""
    assert set(rows("reason")) == {reason.value for reason in Reason}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    """To other pages, and to sections of them."""
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, section = target.partition("#")
        if name in GENERATED:
            continue
        path = page.parent / name if name else page
        assert path.exists(), target
        if section:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert section in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, (
                target
            )


def test_cited_sections_exist() -> None:
    """Comments cite the pages of docs/reference as "cilium-formats 4.1", or "cilium-formats 4.1 to 4.5"."""
    sources = [
        path for name in ("agent", "bpf", "bench", "tests") for path in (ROOT / name).rglob("*.[pch]*")
    ]
    text = " ".join(path.read_text() for path in sources if path.suffix in {".py", ".c", ".h"})
    cited = re.findall(r"(cilium-(?:formats|live)) (\d[\d.]*\d|\d)", text)
    assert cited
    for name, section in cited:
        page = (ROOT / "docs" / "reference" / f"{name}.md").read_text()
        assert re.search(rf"^##+ {re.escape(section)}\.? ", page, re.MULTILINE), f"{name} {section}"
