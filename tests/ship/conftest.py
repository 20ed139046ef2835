"""The image, built once for all of the tier: minutes the first time, nothing when nothing has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.container import image_root

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def image() -> Path:
    """Return the image's unpacked root."""
    return image_root()
