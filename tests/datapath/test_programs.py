"""Programs and links by libbpf alone; how links behave on a hook is in test_hooks.py."""

from __future__ import annotations

import os

from lazymesh.datapath import programs


def test_an_idle_program_leaves_packets_to_the_next() -> None:
    """Twice the same is two programs, which a hook takes beside each other."""
    first, second = programs.load_idle(), programs.load_idle()
    try:
        assert programs.run_program(first, bytes(64)) == (0xFFFFFFFF, bytes(64))  # TC_ACT_UNSPEC, TCX_NEXT
        assert programs.program_id(first) != programs.program_id(second)
    finally:
        os.close(first)
        os.close(second)
