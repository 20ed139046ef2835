"""The stories of a node on a kernel of its own, with that kernel's headers: real agent, real etcd, real packets.

They are those of the mesh tier, run in the machine; of each a part whose waits are long enough for an emulated
processor. (Those of holding are not; test_two_nodes.py tells of it.) A test that the machine's kernel could not run
would fail there.
"""

from __future__ import annotations

import itertools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.vm.conftest import KERNEL, KERNEL_NAME, STORY_PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.vm.conftest import Case, Machine

FIRST = "tests/mesh/test_first_connection.py"
LIFE = "tests/mesh/test_stop_and_restart.py"
OTHERS = "tests/mesh/test_shadow_and_drop.py"
UNINSTALL = "tests/mesh/test_uninstall_from_node.py::test_uninstall_leaves_no_trace"
HAS_TCX = KERNEL >= (6, 6)

STORIES = {
    "a miss is resolved from etcd": [
        f"{FIRST}::test_first_connection_to_an_unsynced_pod_succeeds_and_all_later_packets_pass",
        f"{FIRST}::test_unsynced_remote_pod_reaches_a_local_pod",
    ],
    "a killed agent comes back": [f"{LIFE}::test_restarted_agent_adopts_corrects_and_keeps[kill]"],
    "the fewest capabilities are enough": ["tests/mesh/test_capabilities.py"],
    "beside Cilium, and gone without a trace": [f"{UNINSTALL}[v2-{'tcx' if HAS_TCX else 'clsact'}]"],
}
if KERNEL_NAME == "5.10-oldest":  # the one that ignores BPF_NOEXIST
    STORIES["entries of others stand"] = [
        f"{OTHERS}::test_entry_that_somebody_writes_while_we_ask_is_left_alone"
    ]


@pytest.fixture(scope="module")
def told(machines: Mapping[str, Machine]) -> Iterator[dict[str, Future[list[Case]]]]:
    """Have all of them told, on both machines at once: each keeps one processor busy."""
    pools = [(machine, ThreadPoolExecutor(1)) for machine in machines.values()]
    turns = zip(STORIES.items(), itertools.cycle(pools), strict=False)
    yield {story: pool.submit(machine.tell, *tests) for (story, tests), (machine, pool) in turns}
    for _, pool in pools:
        pool.shutdown(cancel_futures=True)


@pytest.mark.patience(STORY_PATIENCE_S + 60)
@pytest.mark.parametrize("story", STORIES)
def test_story(told: dict[str, Future[list[Case]]], story: str) -> None:
    """Each as on the developer's kernel."""
    cases = told[story].result()
    assert [case for case in cases if case.outcome != "passed"] == []
    assert len(cases) >= len(STORIES[story])


@pytest.mark.patience(120)
def test_check_names_what_the_kernel_lacks(machines: Mapping[str, Machine]) -> None:
    """A line each, with what is done instead."""
    machine = machines["a"]
    assert machine.run("uname -r").startswith(f"{KERNEL[0]}.{KERNEL[1]}.")
    said = machine.run("mkdir -p /tmp/mesh && lazymesh check --clustermesh-config /tmp/mesh")
    assert ("clsact filters" in said) == (not HAS_TCX)
    assert ("one by one" in said) == (KERNEL < (5, 13))
    assert ("UDP GSO" in said) == (KERNEL < (6, 2))
    assert "FAIL" not in said
