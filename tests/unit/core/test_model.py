"""Addresses between their bytes and Cilium's text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymesh.core.model import format_address, parse_address


@pytest.mark.parametrize(
    ("text", "raw"),
    [
        ("10.1.0.164", "0a0100a4"),
        ("fd00:10:244:1::d643", "fd00001002440001000000000000d643"),
        ("::", "00" * 16),
    ],
)
def test_bytes_are_in_network_order(text: str, raw: str) -> None:
    """10.1.0.164 is never 164.0.1.10, on whatever machine."""
    assert parse_address(text) == bytes.fromhex(raw)
    assert format_address(bytes.fromhex(raw)) == text


@given(st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16))
def test_text_leads_back_to_the_bytes(address: bytes) -> None:
    """There and back is no change."""
    assert parse_address(format_address(address)) == address


@pytest.mark.parametrize("text", ["", "10.2.0", "10.2.0.5/32", "fd00::g", "010.2.0.5"])
def test_what_is_not_an_address_is_refused(text: str) -> None:
    """No guessing, not even of leading zeros."""
    with pytest.raises(ValueError, match="does not appear to be"):
        parse_address(text)
