"""The metrics and their little HTTP server, over real sockets on loopback."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymesh import __version__, metrics
from lazymesh.errors import LazymeshError
from lazymesh.metrics import CONNECTIONS, HttpServer, Metrics
from tests.support.etcd import eventually, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Served:
    """A server on a free port, and what it is told to answer."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.missing: str | None = None
        self.port = free_port()
        self.server = HttpServer(("127.0.0.1", self.port), self.metrics, lambda: self.missing)

    async def open(self, words: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect and send bytes as they are."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(words)
        return reader, writer

    def hung_up(self, why: str) -> float | None:
        """Return how many were hung up on."""
        name = "lazymesh_http_connections_dropped_total"
        return self.metrics.registry.get_sample_value(name, {"reason": why})

    async def send(self, words: bytes) -> bytes:
        """Send bytes as they are; return the whole answer."""
        reader, writer = await self.open(words)
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        return answer

    async def get(self, path: str) -> tuple[int, str]:
        """Return status and body of a page."""
        answer = (await self.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())).decode()
        head, _, body = answer.partition("\r\n\r\n")
        assert f"Content-Length: {len(body)}" in head
        return int(head.split()[1]), body


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """A running server."""
    served = Served()
    await served.server.start()
    yield served
    await served.server.close()


async def test_version_and_process_are_told(served: Served) -> None:
    """A rollout over a hundred clusters is watched by them."""
    lines = (await served.get("/metrics"))[1].splitlines()
    assert f'lazymesh_build_info{{version="{__version__}"}} 1.0' in lines
    assert any(line.startswith("process_resident_memory_bytes ") for line in lines)


async def test_readiness_says_what_is_missing(served: Served) -> None:
    """503 with one line, then 200; liveness does not depend on it."""
    served.missing = "clusters not listed yet: b"
    assert await served.get("/readyz") == (503, "clusters not listed yet: b\n")
    assert await served.get("/healthz") == (200, "ok\n")
    served.missing = None
    assert await served.get("/readyz?verbose") == (200, "ok\n")
    assert (await served.get("/"))[0] == 404


async def test_counts_and_readings_are_exported(served: Served) -> None:
    """What is kept elsewhere is read at the moment of the scrape."""
    state = {"b": 1.0}
    served.metrics.collect_gauge("x_ready", "x", ("cluster",), lambda: [((c,), n) for c, n in state.items()])
    served.metrics.collect_counter("x_things", "x", (), lambda: [((), 7)])
    served.metrics.signals.labels("egress").inc(3)
    state["c"] = 0.0
    body = (await served.get("/metrics"))[1]
    for line in (
        'x_ready{cluster="b"} 1.0',
        'x_ready{cluster="c"} 0.0',
        "x_things_total 7.0",
        'cilium_ipcache_miss_signal_total{direction="egress"} 3.0',
    ):
        assert line in body.splitlines()


@pytest.mark.parametrize("error", [OSError("denied"), ValueError("odd"), KeyError("b")])
async def test_collector_that_fails_is_an_error_and_not_a_client_that_has_left(
    served: Served, error: Exception
) -> None:
    """The scrape fails with a status, and the agent is told; the next one may succeed."""
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
    errors = [error]

    def read() -> list[tuple[tuple[str, ...], float]]:
        if errors:
            raise errors.pop()
        return [((), 1.0)]

    served.metrics.collect_gauge("x_ready", "x", (), read)
    assert await served.get("/metrics") == (500, "cannot answer: see the agent's log\n")
    assert reported == [error]
    assert "x_ready 1.0" in (await served.get("/metrics"))[1]


async def test_readiness_that_cannot_be_told_is_an_error(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same way, with a status that takes the pod out of service."""
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
    error = OSError("odd")

    def fail() -> str | None:
        raise error

    monkeypatch.setattr(served.server, "_ready", fail)
    assert await served.get("/readyz") == (500, "cannot answer: see the agent's log\n")
    assert reported == [error]
    assert await served.get("/healthz") == (200, "ok\n")


@pytest.mark.parametrize(
    "words", [b"", b"\r\n\r\n", b"\xff\xfe", b"GET", b"GET /" + b"x" * 200_000, b"GET / HTTP/1.1\r\n"]
)
async def test_strange_requests_cost_nobody_anything(served: Served, words: bytes) -> None:
    """The connection ends; the next client is served."""
    with contextlib.suppress(ConnectionError):
        await served.send(words)
    assert (await served.get("/healthz"))[0] == 200


@pytest.mark.parametrize("name", ["Accept", "accept", "ACCEPT"])
async def test_form_of_the_metrics_is_what_the_client_accepts(served: Served, name: str) -> None:
    """A header's name has no case."""
    head = f"GET /metrics HTTP/1.1\r\n{name}: application/openmetrics-text; version=1.0.0\r\n\r\n"
    answer = await served.send(head.encode())
    assert b"Content-Type: application/openmetrics-text" in answer
    assert answer.endswith(b"# EOF\n")


@pytest.mark.parametrize("words", [b"", b"GET /healthz HTTP/1.1\r\n"])
async def test_client_that_does_not_finish_its_request_is_hung_up_on(
    served: Served, monkeypatch: pytest.MonkeyPatch, words: bytes
) -> None:
    """It would keep a descriptor for as long as it likes."""
    monkeypatch.setattr(metrics, "REQUEST_LIMIT_S", 0.1)
    reader, writer = await served.open(words)
    assert await asyncio.wait_for(reader.read(), 10) == b""
    assert served.hung_up("late") == 1
    writer.close()


async def test_client_that_does_not_take_its_answer_is_hung_up_on(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel does not take of it would stay in our memory for as long as the client likes."""
    monkeypatch.setattr(metrics, "REQUEST_LIMIT_S", 0.1)
    size = 32 << 20
    served.metrics.collect_gauge("x_long", "x", ("word",), lambda: [(("x" * size,), 1)])
    reader, writer = await served.open(b"GET /metrics HTTP/1.1\r\n\r\n")
    await eventually(lambda: served.hung_up("late") == 1)
    taken = 0
    with contextlib.suppress(ConnectionError):
        while part := await asyncio.wait_for(reader.read(1 << 20), 10):
            taken += len(part)
    assert taken < size
    writer.close()


async def test_idle_connections_are_few_and_in_nobodys_way(served: Served) -> None:
    """For one too many the oldest goes: probes and scrapes are answered, however many others say nothing."""
    idle = [await served.open(b"") for _ in range(3 * CONNECTIONS)]
    assert (await served.get("/healthz"))[0] == 200
    await eventually(lambda: sum(reader.at_eof() for reader, _ in idle) == 2 * CONNECTIONS + 1)
    assert [reader.at_eof() for reader, _ in idle[-CONNECTIONS + 1 :]] == [False] * (CONNECTIONS - 1)
    assert served.hung_up("crowded") == 2 * CONNECTIONS + 1
    assert (await served.get("/healthz"))[0] == 200
    for _, writer in idle:
        writer.close()


async def test_taken_port_is_one_line_that_says_what_to_do(served: Served) -> None:
    """Address, reason, option."""
    with pytest.raises(LazymeshError) as caught:
        await HttpServer(("127.0.0.1", served.port), served.metrics, lambda: None).start()
    assert str(caught.value) == (
        f"cannot serve metrics on 127.0.0.1:{served.port}: Address already in use; choose another --metrics-address"
    )


async def test_host_that_is_not_ours_is_refused() -> None:
    """TEST-NET is on no machine."""
    with pytest.raises(LazymeshError, match=r"192\.0\.2\.1:1234: Cannot assign"):
        await HttpServer(("192.0.2.1", 1234), Metrics(), lambda: None).start()


def test_durations_are_a_histogram_by_outcome() -> None:
    """A bucket holds what is no longer than its bound, and all that is in the ones before."""
    metrics = Metrics()
    for seconds in (0.0002, 0.003, 60.0):
        metrics.duration.observe("installed", [seconds])
    name = "cilium_ipcache_miss_resolution_duration_seconds"

    def sample(kind: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"{name}_{kind}", {"outcome": "installed", **labels})

    found = [sample("bucket", le=bound) for bound in ("0.0002", "0.002", "0.005", "5.0", "+Inf")]
    assert found == [1, 1, 2, 2, 3]
    assert sample("count") == 3
    assert sample("sum") == pytest.approx(60.0032)


@pytest.mark.parametrize("times", [1, 100])
def test_what_came_before_its_miss_took_no_time(times: int) -> None:
    """Clocks are read on two processors; such a duration counts, and takes nothing off the sum."""
    metrics = Metrics()
    metrics.duration.observe("installed", [0.5, -2.0, 0.25] * times)
    name, labels = "cilium_ipcache_miss_resolution_duration_seconds", {"outcome": "installed"}
    assert metrics.registry.get_sample_value(f"{name}_sum", labels) == 0.75 * times
    assert metrics.registry.get_sample_value(f"{name}_count", labels) == 3 * times


SECONDS = st.sampled_from(metrics.RESOLUTION_BUCKETS) | st.floats(-1, 10)


@given(durations=st.lists(SECONDS, min_size=1, max_size=50))
def test_durations_count_the_same_together_and_one_by_one(durations: list[float]) -> None:
    """Those on a bound, too."""
    together, apart = Metrics(), Metrics()
    together.duration.observe("installed", durations)
    for one in durations:
        apart.duration.observe("installed", [one])
    (expected,), (found,) = apart.duration.collect(), together.duration.collect()
    assert [each.value for each in found.samples] == pytest.approx([each.value for each in expected.samples])
