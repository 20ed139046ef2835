"""Benchmarks: every figure beside a reference, measured in turns in the same run.

Machines are noisy, so budgets are ratios or differences where possible. Each module is one part; ``report`` defines
what a part returns, ``__main__`` is ``scripts/bench``. Parts build their labs from tests/support.
"""
