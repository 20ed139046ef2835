"""Settings in units for people, as the programs read them."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

import pytest

from lazymesh.core.model import Direction
from lazymesh.datapath.settingsmap import DatapathConfig, OnMiss

if TYPE_CHECKING:
    from tests.datapath.conftest import Bench


class TestConfig:
    """Settings in units for people, as the programs read them."""

    def test_default_settings_reach_the_kernel(self, bench: Bench) -> None:
        """Rates become spacings, bursts become depths."""
        found = bench.datapath.config.read()
        assert (found.rearm_ns, found.muted, found.on_miss, found.enforced) == (1_000_000_000, 0, 0, 0)
        assert (found.interface_interval_ns, found.interface_burst_ns) == (4_000_000, 999 * 4_000_000)
        assert (found.uplink_interval_ns, found.uplink_burst_ns) == (1_000_000, 1_999 * 1_000_000)
        assert (found.global_interval_ns, found.global_burst_ns) == (400_000, 3_999 * 400_000)

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"rearm_s": 0.25}, {"rearm_ns": 250_000_000}),
            ({"rearm_s": 0}, {"rearm_ns": 0}),
            ({"interface_rate": 0}, {"interface_interval_ns": 0, "interface_burst_ns": 0}),
            (
                {"global_rate": 1, "global_burst": 1},
                {"global_interval_ns": 1_000_000_000, "global_burst_ns": 0},
            ),
            ({"global_burst": 0}, {"global_burst_ns": 0}),
            ({"on_miss": OnMiss.DROP}, {"on_miss": 1}),
            ({"enforced": frozenset({Direction.INGRESS})}, {"enforced": 2}),
            ({"enforced": frozenset(Direction)}, {"enforced": 3}),
        ],
        ids=str,
    )
    def test_setting_reaches_the_kernel(
        self, bench: Bench, settings: dict[str, object], expected: dict[str, int]
    ) -> None:
        """Each alone, with its edges."""
        bench.datapath.config.write(DatapathConfig(**settings))  # type: ignore[arg-type]
        found = bench.datapath.config.read()
        assert {name: getattr(found, name) for name in expected} == expected

    def test_threads_lose_nothing_of_each_other(self, bench: Bench) -> None:
        """The event loop voids answers while a thread puts maps in force: two words of one element."""
        config, rounds = bench.datapath.config, 2_000
        config.change(generation=1)
        switch, interval = sys.setswitchinterval, sys.getswitchinterval()
        switch(1e-6)
        try:
            void = threading.Thread(target=lambda: [config.void() for _ in range(rounds)])
            void.start()
            for number in range(rounds):
                config.change(rearm_ns=number)
                assert config.read().rearm_ns == number
            void.join()
        finally:
            switch(interval)
        assert config.read().generation == 1 + rounds
