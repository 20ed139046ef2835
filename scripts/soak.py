"""The soak: whatever can be broken is broken, in an order that is drawn from a seed, under traffic that is counted.

Exit 0: no packet to a known peer lost, no wrong identity, the map as the records say after every fault, memory flat.
1: not so. 2: wrong usage. 3: it could not run. 130: interrupted.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time

from tests.support.namespaces import tidy_signals
from tests.support.soak import Plan, soak


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--minutes", type=_minutes, default=2, help="how long (default: 2)")
    parser.add_argument(
        "--seed", type=int, help="what faults are drawn from (default: another one each time)"
    )
    parser.add_argument(
        "--beside", action="store_true", help="beside a stand-in for Cilium, which restarts too"
    )
    return parser.parse_args()


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"a number above 0, not {text}")
    return minutes


def main() -> int:
    """Run it and print what was seen."""
    options = parse_arguments()
    if os.geteuid() != 0:
        print("soak: needs root, for network namespaces and BPF", file=sys.stderr)
        return 3
    seed = options.seed if options.seed is not None else time.time_ns() % 1_000_000
    beside = " --beside" if options.beside else ""
    again = f"scripts/soak --minutes {options.minutes:g} --seed {seed}{beside}"
    print(f"replay with: {again}", flush=True)
    try:
        with tidy_signals():
            outcome = soak(
                Plan(options.minutes * 60, seed, options.beside), lambda line: print(line, flush=True)
            )
    except KeyboardInterrupt:
        print("soak: interrupted; everything it made is removed", file=sys.stderr)
        return 130
    except (OSError, RuntimeError, TimeoutError) as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    print(outcome)
    print("as it must be" if outcome.good else f"NOT as it must be; {again}")
    return 0 if outcome.good else 1


if __name__ == "__main__":
    sys.exit(main())
