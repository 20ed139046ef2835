"""Programs and links by libbpf alone; how links behave on a hook is in test_hooks.py."""

from __future__ import annotations

import errno
import os
import struct

import pytest

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


def test_a_program_that_the_verifier_refuses_is_refused_with_its_words() -> None:
    """An errno alone would be "Invalid argument" for every mistake."""
    returns_nothing = struct.pack("=BBhi", 0x95, 0, 0, 0)  # r0 was never set
    # "R0 !read_ok"; from 7.3 on it says what to do instead: "Initialize R0 on every path before this instruction."
    with pytest.raises(OSError, match=r"Permission denied \(.*R0 .*\)$") as refused:
        programs.load_program("lm_wrong", programs.PROG_TYPE_SCHED_CLS, "GPL", returns_nothing)
    assert refused.value.errno == errno.EACCES


def test_the_complaint_is_the_last_line_before_the_statistics() -> None:
    """As a kernel writes them; without a log there is none."""
    log = "0: (95) exit\nR0 !read_ok\nverification time 36 usec\nstack depth 0\nprocessed 1 insns (limit 1000000)\n\n"
    assert programs.complaint_of(log) == "R0 !read_ok"
    assert programs.complaint_of("x" * 300) == "x" * 200
    assert programs.complaint_of("") == ""
