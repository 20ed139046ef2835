"""The benchmark's table and object: budgets kept and broken, ranks, columns."""

from __future__ import annotations

from bench.report import Part, Row, milliseconds, percentiles, table


def test_ranks_are_by_nearest_rank() -> None:
    """As the demo has them: of one value all are that value."""
    assert percentiles([5.0]) == {"p50": 5.0, "p99": 5.0}
    assert percentiles([float(n) for n in range(1, 101)]) == {"p50": 50.0, "p99": 99.0}


def test_a_row_knows_whether_its_budget_is_kept() -> None:
    """At the budget is kept; without one everything is."""
    assert Row("x", "2", "1", 2.0, 2.0).kept
    assert not Row("x", "2.1", "1", 2.1, 2.0).kept
    assert Row("x", "9", "1", 9.0).kept


def test_the_table_has_what_is_compared_first_and_marks_what_is_over() -> None:
    """A person looks at the second column, and for one word."""
    part = Part({}, [Row("first", "2 ms", "1 ms", 2.0, 1.5), Row("second", "1", "none", 0, 0, "packets")])
    lines = table({"part": part}).splitlines()
    assert lines[0].split() == ["PART", "COMPARED", "BUDGET", "FIGURE", "OURS", "AGAINST"]
    assert lines[1].split() == ["part", "2", "x", "1.5", "x", "OVER", "first", "2", "ms", "1", "ms"]
    assert lines[2].split() == ["part", "0", "packets", "0", "packets", "second", "1", "none"]


def test_milliseconds_have_three_digits() -> None:
    """And no more than make sense."""
    assert [milliseconds(value) for value in (0.01234, 1.234, 1234.5)] == ["0.0123 ms", "1.23 ms", "1234 ms"]


def test_what_is_left_out_leaves_a_trace() -> None:
    """In the table and in the object: who looks at them later does not see what was said meanwhile."""
    part = Part({"x": 1}, left_out={"Go": "no go on the PATH"})
    line = table({"part": part}).splitlines()[1]
    assert " ".join(line.split()) == "part left out Go no go on the PATH"
    assert part.as_object() == {"x": 1, "repeats": {}, "left_out": {"Go": "no go on the PATH"}}
    assert Part({"x": 1}, repeats={"x": [1.0]}).as_object() == {"x": 1, "repeats": {"x": [1.0]}}
