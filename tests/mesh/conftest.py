"""An agent of Cilium's beside whatever is tested, and flows to see what it lets through.

A module brings its own ``lab``: how many pods there are is its own business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.cilium import Cilium
from tests.support.cilium_world import KINDS
from tests.support.flow import Flow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.lab import Lab, Pod


def _needs(kind: tuple[str, str]) -> list[pytest.MarkDecorator]:
    return [pytest.mark.needs("tcx")] if "tcx" in kind else []


@pytest.fixture(params=[pytest.param(kind, marks=_needs(kind), id="-".join(kind)) for kind in KINDS])
def cilium(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Cilium]:
    """Bring up an agent of each layout and each way to attach."""
    layout, attach = request.param
    with Cilium(lab, layout=layout, attach=attach) as agent:
        yield agent


@pytest.fixture
def agent(lab: Lab) -> Iterator[Cilium]:
    """Bring up a current agent: v2 and tcx."""
    with Cilium(lab) as running:
        yield running


@pytest.fixture
def flow() -> Iterator[Callable[[Pod, str], Flow]]:
    """Begin flows of pods, which end with the test."""
    opened: list[Flow] = []

    def begin(pod: Pod, address: str) -> Flow:
        opened.append(Flow(pod, address))
        return opened[-1]

    yield begin
    for one in opened:
        one.close()
