"""Benchmarks: every figure beside the thing it is to be compared with, measured in turns in the same run.

Machines are noisy, so a budget is of a ratio or a difference wherever it can be. One module is one part; ``report``
says what a part returns, ``__main__`` is ``scripts/bench``. Parts build their labs from tests/support.
"""
