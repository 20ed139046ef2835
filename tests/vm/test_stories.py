"""The stories of a node on a kernel of its own, with that kernel's headers: real agent, real etcd, real packets.

They are those of the mesh tier, run in the machine; of each a part whose waits are long enough for an emulated
processor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.vm.conftest import Machine

FIRST = "tests/mesh/test_first_connection.py"
HOLD = "tests/mesh/test_holding_first_packets.py"
LIFE = "tests/mesh/test_stop_and_restart.py"

STORIES = {
    "the first connection to a pod nobody has told us of": [
        f"{FIRST}::test_first_connection_to_an_unsynced_pod_succeeds_and_all_later_packets_pass",
        f"{FIRST}::test_unsynced_remote_pod_reaches_a_local_pod",
    ],
    "a first packet is held": [f"{HOLD}::test_a_slow_store_costs_its_delay_and_no_syn"],
    "a restart is survived": [f"{LIFE}::test_restarted_agent_adopts_corrects_and_keeps"],
    "beside Cilium, and gone without a trace": [
        "tests/mesh/test_uninstall_from_node.py::test_uninstall_leaves_no_trace[v1-clsact]",
        "tests/mesh/test_uninstall_from_node.py::test_uninstall_leaves_no_trace[v2-clsact]",
    ],
    "an entry of others is never touched": ["tests/datapath/test_installer.py"],
}


@pytest.mark.patience(300)
@pytest.mark.parametrize("story", STORIES)
def test_story(machine: Machine, story: str) -> None:
    """Each as on the developer's kernel."""
    cases = machine.tell(*STORIES[story])
    assert [case for case in cases if case.outcome == "failed"] == []
    assert [case for case in cases if case.outcome == "passed"] != []


@pytest.mark.patience(120)
def test_check_names_what_the_kernel_lacks(machine: Machine, kernel: tuple[int, ...]) -> None:
    """A line each, with what is done instead."""
    said = machine.run("mkdir -p /tmp/mesh && python3 -m lazymesh check --clustermesh-config /tmp/mesh")
    assert ("clsact filters" in said) == (kernel < (6, 6))
    assert ("one by one" in said) == (kernel < (5, 13))
    assert ("UDP GSO" in said) == (kernel < (6, 2))
    assert "FAIL" not in said
