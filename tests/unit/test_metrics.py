"""The metrics and their little HTTP server, over real sockets on loopback."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from lazymesh import __version__
from lazymesh.errors import LazymeshError
from lazymesh.metrics import HttpServer, Metrics
from tests.support.etcd import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Served:
    """A server on a free port, and what it is told to answer."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.missing: str | None = None
        self.port = free_port()
        self.server = HttpServer(("127.0.0.1", self.port), self.metrics, lambda: self.missing)

    async def send(self, words: bytes) -> bytes:
        """Send bytes as they are; return the whole answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(words)
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


@pytest.mark.parametrize(
    "words", [b"", b"\r\n\r\n", b"\xff\xfe", b"GET", b"GET /" + b"x" * 200_000, b"GET / HTTP/1.1\r\n"]
)
async def test_strange_requests_cost_nobody_anything(served: Served, words: bytes) -> None:
    """The connection ends; the next client is served."""
    with contextlib.suppress(ConnectionError):
        await served.send(words)
    assert (await served.get("/healthz"))[0] == 200


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
