"""More packets than any sender in user space makes: live frames, made by the kernel, out of a pod's device.

BPF_PROG_TEST_RUN with BPF_F_TEST_XDP_LIVE_FRAMES (kernel 5.18): what the XDP program redirects is really sent. They
arrive on the host side as all of the pod's packets do, where an XDP program, which that device must have to take them,
counts them before anything else sees them.
"""

from __future__ import annotations

import ctypes
import ipaddress
import json
import os
import socket
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from lazymesh.datapath.libbpf import Map, MapLayout, library
from lazymesh.datapath.programs import TestRunOpts
from tests.support.bpfobject import BpfObject, compile_bpf

if TYPE_CHECKING:
    from tests.support.lab import Lab, Pod
    from tests.support.namespaces import Namespace

_MAP_TYPE_ARRAY, _LIVE_FRAMES = 2, 2
_CALL = 1 << 14
"""Frames for each call of the kernel: some milliseconds."""


class Storm:
    """While entered, a pod sends UDP datagrams to one address of a prefix after the other."""

    def __init__(self, lab: Lab, pod: Pod, prefix: str) -> None:
        network = ipaddress.IPv4Network(prefix)
        self._lab, self._pod = lab, pod
        self._where = {"BASE": int(network.network_address), "COUNT": network.num_addresses}
        self._stop = threading.Event()
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=pod.namespace.call, args=(self._run,))
        self.seconds = 0.0
        """How long it took, when it is over."""

    def __enter__(self) -> Self:
        namespace = self._pod.namespace
        # What the storm is about is over when the program has seen it; the router shall not be the bottleneck.
        prefix = f"{ipaddress.ip_address(self._where['BASE'])}/{33 - self._where['COUNT'].bit_length()}"
        self._lab.node_a.ip([f"route replace blackhole {prefix}"])
        ether = Ether(src=_mac(namespace, "eth0"), dst=_mac(self._lab.node_a, self._pod.interface))
        self._frame = bytes(
            ether / IP(src=self._pod.ipv4, dst="0.0.0.0") / UDP(sport=9, dport=9) / (b"storm" * 4)
        )
        self._map = Map.create("storm_count", MapLayout(_MAP_TYPE_ARRAY, 4, 8, 2, 0))
        with tempfile.TemporaryDirectory() as directory:
            device = namespace.call(socket.if_nametoindex, "eth0")
            source, target = Path(__file__).with_suffix(".c"), Path(directory, "storm.o")
            built = compile_bpf(source, target, IFINDEX=device, **self._where)
            self._program = BpfObject(built, ("storm", "arrived"), {"storm_count": self._map.fd})
        self._count_on(self._program.program("arrived"))
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.stop()
        finally:
            self._count_on(-1)
        self._program.close()
        self._map.close()

    def _count_on(self, program: int) -> None:
        def attach() -> None:
            result = library().bpf_xdp_attach(socket.if_nametoindex(self._pod.interface), program, 0, None)
            if result < 0:
                raise OSError(-result, f"XDP on {self._pod.interface}: {os.strerror(-result)}")

        self._lab.node_a.call(attach)

    def stop(self) -> int:
        """End it; return how many packets have arrived. OSError if the kernel refused to send."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._failure is not None:
            raise self._failure
        sent, arrived = self._count(0), self._count(1)
        assert arrived > sent / 2, f"of {sent} packets only {arrived} have arrived"
        return arrived

    def _count(self, which: int) -> int:
        (count,) = struct.unpack("=Q", self._map.lookup(which.to_bytes(4, sys.byteorder)) or bytes(8))
        return int(count)

    def _run(self) -> None:
        began = time.monotonic()
        options = TestRunOpts(
            sz=ctypes.sizeof(TestRunOpts),
            data_in=self._frame,
            data_size_in=len(self._frame),
            repeat=_CALL,
            flags=_LIVE_FRAMES,
        )
        while not self._stop.is_set():
            # A call into C: other threads of the test go on.
            result = library().bpf_prog_test_run_opts(self._program.program("storm"), ctypes.byref(options))
            if result < 0:
                self._failure = OSError(-result, f"live frames: {os.strerror(-result)}")
                return
        self.seconds = time.monotonic() - began


def _mac(namespace: Namespace, interface: str) -> str:
    (link,) = json.loads(namespace.run("ip", "-json", "link", "show", interface))
    return str(link["address"])
