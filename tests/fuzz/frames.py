"""``scripts/fuzz frames``: as many hostile frames as are wanted, through programs loaded for it."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

from lazymesh.datapath.pins import Pins
from tests.datapath.conftest import IPCACHE_SIZE, Bench, mounted_bpffs
from tests.support.barrage import SETTINGS, Barrage
from tests.support.loaded import load
from tests.support.namespaces import NamespaceSet
from tests.support.prog_run import Tap

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARES = {"pass": 0.6, "drop": 0.05, "policy": 0.15}
"""Of the frames, by setting; the rest goes over a device."""


def send(seed: int, numbers: range) -> bool:
    """Send frames under every setting and print what became of them; False when one went wrong."""
    with _bench() as bench:
        for mode in SETTINGS:
            share = numbers if len(numbers) == 1 else numbers[: round(SHARES[mode] * len(numbers))]
            if not _one(f"test runs, {mode}", Barrage(bench, mode), share, seed):
                return False
        share = numbers if len(numbers) == 1 else numbers[: round((1 - sum(SHARES.values())) * len(numbers))]
        with (
            NamespaceSet(["node"]) as spaces,
            Tap(spaces["node"], bench.datapath.pins.path("lm_from_pod")) as tap,
        ):
            return _one("device", Barrage(bench), share, seed, tap)


def _one(what: str, barrage: Barrage, numbers: range, seed: int, tap: Tap | None = None) -> bool:
    began = time.monotonic()
    try:
        if tap is None:
            barrage.send(seed, numbers)
        else:
            barrage.receive(tap, seed, numbers)
    except AssertionError as wrong:
        print(f"{what}: WRONG: {wrong}", file=sys.stderr)
        return False
    print(f"{what}: {len(numbers):,} frames in {time.monotonic() - began:.1f} s: {barrage.tally}", flush=True)
    return True


@contextlib.contextmanager
def _bench() -> Iterator[Bench]:
    with mounted_bpffs() as bpffs:
        pins = Pins.under(bpffs)
        datapath = load(pins, IPCACHE_SIZE)
        bench = Bench(datapath)
        try:
            yield bench
        finally:
            bench.close()
            datapath.close()
            pins.remove()
