"""What agent and holder send each other: datagrams whose first byte says what follows."""

from __future__ import annotations

import struct

from lazymesh.core.hold import Cause

BEGIN, ANSWERS, SETTINGS, GO, QUIT = b"b", b"a", b"c", b"g", b"q"
"""Agent to holder: all is pinned, so open the TAP; answers, one behind the other; settings (JSON); start parking; give
everything back and end."""
UP, ON, ERROR = b"u", b"o", b"e"
"""Holder to agent: the TAP it has opened (JSON); it parks packets now; why it cannot work (one line)."""

ANSWER = struct.Struct("=B17sd")
"""Number of the cause; family and address, as in a slot; since when it holds, in seconds of the monotonic clock."""
CAUSES = (Cause.INSTALLED, Cause.NEGATIVE)
"""Causes of an answer, by number."""
CAUSE_NUMBERS = {cause: number for number, cause in enumerate(CAUSES)}
FAMILIES = {4: b"\x01", 16: b"\x02"}
"""Family by the address's length."""
