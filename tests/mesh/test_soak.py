"""Everything that the harness can break for 90 s, in an order drawn from a seed; ``scripts/soak`` runs longer."""

from __future__ import annotations

import pytest

from tests.support.soak import Plan, soak


@pytest.mark.needs("clang")
@pytest.mark.patience(900)
def test_random_faults_leave_everything_right(fault_seed: int) -> None:
    """No wrong identity at any moment, no packet to a known peer lost, the map as the records say after each fault."""
    print(f"seed {fault_seed}: replay with --fault-seed {fault_seed}, or scripts/soak --seed {fault_seed}")
    outcome = soak(Plan(90, fault_seed), print)
    print(outcome)
    assert outcome.wrong == []
    assert outcome.losses == {}
    assert outcome.complaints == []
    assert outcome.good, "memory has grown"
