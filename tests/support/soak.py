"""A long run of random faults over the real thing: everything that the harness can break, drawn from a seed.

Two clusters (one etcd behind a proxy; three that agree, with certificates and tokens), an agent, numbered traffic to
peers that never change, traffic to addresses that change all the time, and a witness of the map. Each round is one
fault, and ends when the map says again what the records say, of every address that was asked for.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lazymesh.datapath.libbpf import Map
from tests.support.churn import Churn, settle
from tests.support.cilium import Cilium
from tests.support.clockjump import ClockJump
from tests.support.etcd import Authority, EtcdCluster, EtcdSettings, Role, cilium_roles, free_port
from tests.support.lab import ETCD_PORT, OTHER_IDENTITY, SERVER_IDENTITY, AgentProcess, Lab, remote_address
from tests.support.neighbour import Neighbour
from tests.support.node import child_of, memory_mib, metric, options, pack_key, pack_value
from tests.support.proxy import Proxy
from tests.support.pulse import Pulse, Sender
from tests.support.witness import Witness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

    from tests.support.pulse import Fates
    from tests.support.witness import Wrong

KNOWN = [remote_address(number, 6 if number % 2 else 4) for number in range(8)]
CHANGING = [remote_address(number, 6 if number % 2 else 4) for number in range(100, 140)]
THIRD_CIDR, THIRD_ID, THIRD_IDENTITY = "10.3.0.0/24", 3, 196_609
THIRD_KNOWN = ["10.3.0.5", "10.3.0.6"]
THIRD_CHANGING = [f"10.3.0.{number}" for number in range(20, 28)]
SETTLE_S = 60.0
"""A frozen store is given up after 25 s; the rest is for a busy machine."""
COMPILED_EVERY = 4
"""Of so many starts one compiles, as after an upgrade; the others load what was kept."""
_HOUR = 3600


@dataclass(frozen=True)
class Plan:
    """What to do."""

    seconds: float
    seed: int
    beside: bool = False
    """Beside the stand-in for Cilium, which restarts too."""


@dataclass
class Outcome:
    """What was seen."""

    rounds: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    """How often each was injected."""
    slowest: tuple[float, str] = (0.0, "")
    """The longest time from a fault's end to everything being right again, and after which fault."""
    changes: int = 0
    looks: int = 0
    wrong: list[Wrong] = field(default_factory=list)
    sent: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)
    """Of known peers: when what was sent and never answered, in seconds from the beginning."""
    memory: dict[str, tuple[float, float]] = field(default_factory=dict)
    """MiB of agent and holder: after warm-up, and at the end."""
    complaints: list[str] = field(default_factory=list)
    """What an agent never must say: tracebacks, unexpected errors."""

    @property
    def lost(self) -> int:
        """How many packets to known peers were lost."""
        return sum(map(len, self.losses.values()))

    @property
    def good(self) -> bool:
        """Whether it is as it must be."""
        flat = all(end <= 1.2 * warm + 4 for warm, end in self.memory.values())
        return self.rounds > 0 and not self.wrong and not self.losses and not self.complaints and flat

    def __str__(self) -> str:
        memory = ", ".join(f"{who} {warm:.1f} -> {end:.1f}" for who, (warm, end) in self.memory.items())
        lines = [
            f"{self.rounds} faults: " + ", ".join(f"{name} {n}" for name, n in sorted(self.faults.items())),
            f"{self.sent:,} packets to known peers, {self.lost} lost",
            f"{self.changes:,} records changed, {self.looks:,} looks at the map, {len(self.wrong)} wrong identities",
            f"right again after at most {self.slowest[0]:.2f} s ({self.slowest[1]})",
            f"memory in MiB: {memory}",
            *(
                f"lost: {address} at {' '.join(f'{at:.2f}' for at in times)} s"
                for address, times in self.losses.items()
            ),
            *(f"wrong: {wrong}" for wrong in self.wrong[:20]),
            *(f"complaint: {complaint}" for complaint in self.complaints),
        ]
        return "\n".join(lines)


def soak(plan: Plan, say: Callable[[str], None]) -> Outcome:
    """Do it; a map that does not follow the records, or an agent that ends by itself, is a complaint and the end."""
    with contextlib.ExitStack() as stack:
        return Soak(plan, say, stack).run()


class Soak:
    """The stage and what is broken on it."""

    def __init__(self, plan: Plan, say: Callable[[str], None], stack: contextlib.ExitStack) -> None:
        self._plan, self._say = plan, say
        self._dice = random.Random(plan.seed)
        self._pods = random.Random(plan.seed + 1)
        """Apart, because how often records change depends on how fast the machine is; which faults come must not."""
        self._outcome = Outcome()
        self._starts = 0
        self._began = time.monotonic()
        self.lab = stack.enter_context(Lab(pods=2))
        self._proxy_port = free_port()
        self.proxy = stack.enter_context(Proxy(self.lab.node_a, self._proxy_port, ETCD_PORT))
        self.third = stack.enter_context(Third(self.lab))
        self.clock = ClockJump(self.lab.directory)
        self.cilium = stack.enter_context(Cilium(self.lab)) if plan.beside else None
        pin = self.cilium.pin if self.cilium else self.lab.bpffs / "lazymesh/lm_ipcache"
        self.witness = stack.enter_context(Witness(pin, every_s=0.005))
        self._publish()
        self.agent = self._start_agent()
        stack.callback(self._stop_agent)
        self.agent.wait_ready()
        self._stack = stack

    def _publish(self) -> None:
        (self.lab.config / "b").write_text(f"endpoints: ['http://127.0.0.1:{self._proxy_port}']\n")
        self.lab.publish_many(KNOWN)
        for address in THIRD_KNOWN:
            self.third.publish(address, THIRD_IDENTITY)
        for address in (*KNOWN, *THIRD_KNOWN):
            self.witness.may_be(address, SERVER_IDENTITY if address in KNOWN else THIRD_IDENTITY)
        if self.cilium:
            self.cilium.allow(THIRD_IDENTITY)
            self.cilium.upsert_many(KNOWN[::2])
        self.churn = Churn(self.lab, self.witness, CHANGING, (SERVER_IDENTITY, OTHER_IDENTITY), self._pods)
        self.third_churn = Churn(
            self.third, self.witness, THIRD_CHANGING, (THIRD_IDENTITY, THIRD_IDENTITY + 1), self._pods
        )
        self.churn.change(len(CHANGING))
        self.third_churn.change(len(THIRD_CHANGING))

    def run(self) -> Outcome:
        """Let traffic flow and break things until the time is over."""
        outcome, known = self._outcome, [*KNOWN, *THIRD_KNOWN]
        changing = [*CHANGING, *THIRD_CHANGING]
        with Sender(self.lab.pods[1].namespace, Pulse(changing, [], flow_every_s=0.3)):
            with Sender(self.lab.pods[0].namespace, Pulse(known, [])):
                self._settle("the start")
                wait_for(lambda: None not in self.witness.now(known).values(), "every known peer's entry")
            with Sender(self.lab.pods[0].namespace, Pulse(known, [])) as sender:
                self._began = time.monotonic()
                try:
                    self._break_things()
                except (RuntimeError, TimeoutError) as exc:
                    at = time.monotonic() - self._began
                    outcome.complaints.append(f"ended early, after {at:.0f} s: {exc}")
                finally:
                    fates = sender.stop()
                    self._count(fates)
        return outcome

    def _break_things(self) -> None:
        until = time.monotonic() + self._plan.seconds
        warm_at = time.monotonic() + min(60.0, self._plan.seconds / 3)
        faults = self._faults()
        bag: list[str] = []
        warm: dict[str, float] = {}
        while time.monotonic() < until:
            if not bag:  # each once, in an order that is drawn, before any comes again
                bag = self._dice.sample(sorted(faults), len(faults))
            name = bag.pop()
            self._say(f"{time.monotonic() - self._began:7.1f} s  {name}")
            faults[name]()
            self.witness.insist()
            took = self._settle(name)
            self._outcome.rounds += 1
            self._outcome.faults[name] = self._outcome.faults.get(name, 0) + 1
            if not warm and time.monotonic() > warm_at:
                warm = self._memory()
            self._calm(self._dice.uniform(0, 2))
            self._say(f"{time.monotonic() - self._began:7.1f} s  right again after {took:.2f} s")
        end = self._memory()
        self._outcome.memory = {who: (warm.get(who, size), size) for who, size in end.items()}
        self._check_agent()

    def _count(self, fates: Fates) -> None:
        outcome = self._outcome
        outcome.sent = len(fates.flows)
        outcome.losses = {
            address: [at - self._began for at in times] for address, times in fates.losses().items()
        }
        outcome.changes = self.churn.changes + self.third_churn.changes
        outcome.looks, outcome.wrong = self.witness.looks, self.witness.wrong

    def _settle(self, what: str) -> float:
        # Changed only now, so that none can be right from before.
        self.churn.change(5)
        self.third_churn.change(2)
        try:
            took = settle([self.churn, self.third_churn], SETTLE_S)
        except TimeoutError as exc:
            raise RuntimeError(f"after {what}: {exc}\n{self.agent.log[-3000:]}") from exc
        if took > self._outcome.slowest[0]:
            self._outcome.slowest = (took, what)
        return took

    def _calm(self, seconds: float, *, b: bool = True, c: bool = True) -> None:
        """Let time pass, and records change in the stores that can be written to."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
            if b:
                self.churn.change()
            if c and self._pods.random() < 0.2:
                self.third_churn.change()

    # --- the agent --------------------------------------------------------------------------------------------------

    def _start_agent(self) -> AgentProcess:
        changes = {"program_cache": "off"} if self._starts % COMPILED_EVERY == 0 else {}
        self._starts += 1
        words = options(self.lab, **changes)
        if self.cilium:
            words = options(self.lab, datapath="cilium", policy=None, **changes)
        return AgentProcess(self.lab.node_a, words, self.lab.directory / "agent.log", self.clock.env)

    def _check_agent(self, *, starting: bool = False) -> None:
        """Note what must not have happened in this agent's life, before we end it or when all ends."""
        code = self.agent.process.poll()
        if code is not None:
            self._outcome.complaints.append(f"the agent ended by itself, with exit code {code}")
        elif not starting and metric(self.agent, "lazymesh_unexpected_errors_total"):
            self._outcome.complaints.append("the agent counts unexpected errors")
        self._outcome.complaints += [
            line.strip() for line in self.agent.log.splitlines() if "Traceback" in line or "crashed" in line
        ]

    def _memory(self) -> dict[str, float]:
        sizes = {"agent": memory_mib(self.agent.pid)}
        holder = child_of(self.agent.pid)
        return sizes | ({"holder": memory_mib(holder)} if holder else {})

    def _stop_agent(self) -> None:
        self.agent.stop()

    def kill_agent(self) -> None:
        """Kill it, and start it again after a moment."""
        self._check_agent()
        self.agent.kill()
        self._calm(self._dice.uniform(0, 2))
        self.agent = self._start_agent()
        self.agent.wait_ready()

    def kill_starting_agent(self) -> None:
        """Kill it, and its successors before they have become ready."""
        for number in range(self._dice.randrange(1, 4)):
            self._check_agent(starting=number > 0)
            self.agent.kill()
            self.agent = self._start_agent()
            self._calm(self._dice.uniform(0, 2.5))
        self.agent.wait_ready()

    def stop_agent(self) -> None:
        """Stop it in good order, and start it again."""
        self._check_agent()
        code = self.agent.stop()
        if code:
            self._outcome.complaints.append(f"the agent ended with exit code {code} when it was stopped")
        self._calm(self._dice.uniform(0, 1))
        self.agent = self._start_agent()
        self.agent.wait_ready()

    def pause_agent(self) -> None:
        """Stop the process for a while, without ending it."""
        self._pause(self.agent.pid)

    def kill_holder(self) -> None:
        """Kill the process that keeps parked packets; the agent starts another."""
        if holder := child_of(self.agent.pid):
            os.kill(holder, signal.SIGKILL)
            self._calm(1)
            wait_for(lambda: child_of(self.agent.pid) not in (None, holder), "another holder")

    def pause_holder(self) -> None:
        """Stop that process for a while."""
        if holder := child_of(self.agent.pid):
            self._pause(holder)

    def _pause(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        try:
            self._calm(self._dice.uniform(0.1, 3))
        finally:
            with contextlib.suppress(ProcessLookupError):  # a holder that hung for too long was replaced
                os.kill(pid, signal.SIGCONT)

    def jump_clock(self) -> None:
        """Let the agent's wall clock jump, and be right again later."""
        self.clock.jump(self._dice.choice((-_HOUR, _HOUR, -5 * _HOUR, 20 * _HOUR, -1)))
        self._calm(2)
        self.proxy.cut()
        self._calm(2)
        self.clock.jump(0)

    # --- cluster b's store ------------------------------------------------------------------------------------------

    def kill_etcd(self) -> None:
        """Kill it; it comes back with its data."""
        self.lab.etcd.kill()
        self._calm(self._dice.uniform(0, 6), b=False)
        self.lab.etcd.start()

    def freeze_etcd(self) -> None:
        """Let it answer nothing for a while."""
        self.lab.etcd.freeze()
        try:
            self._calm(self._dice.uniform(0.5, 8), b=False)
        finally:
            self.lab.etcd.thaw()

    def replace_etcd(self) -> None:
        """Put another, empty one behind its address, which is filled a moment later."""
        self._refill(f"another-{self._dice.random()}")

    def restore_etcd(self) -> None:
        """Set it back to the beginning: the same cluster id, lower revisions, the records of now."""
        self._refill(None)

    def _refill(self, token: str | None) -> None:
        self.lab.etcd.wipe(token)
        self._calm(self._dice.uniform(0, 2), b=False)
        self.lab.publish_many(KNOWN)
        self.churn.write_all()
        # Last what says that it is complete: a store that says so and is not takes its pods away.
        self.lab.publish_cluster()

    def compact(self) -> None:
        """Forget everything that the agent would resume from, while it is cut off."""
        self.proxy.refuse(True)
        self._calm(self._dice.uniform(0.2, 2))
        self.lab.etcd.compact(self.lab.etcd.revision())
        self.proxy.heal()

    def cut_connection(self) -> None:
        """Reset the agent's connections."""
        self.proxy.cut()

    def refuse_connections(self) -> None:
        """Reset them, and every new one for a while."""
        self.proxy.refuse(True)
        self._bad_for_a_while(6)

    def swallow(self) -> None:
        """Let nothing through, in either direction."""
        self.proxy.blackhole(True)
        self._bad_for_a_while(8)

    def slow_down(self) -> None:
        """Let every answer come late."""
        self.proxy.delay(self._dice.uniform(0.02, 1.0))
        self._bad_for_a_while(4)

    def throttle(self) -> None:
        """Let few bytes through."""
        self.proxy.throttle(self._dice.uniform(5_000, 50_000))
        self._bad_for_a_while(4)

    def garble(self) -> None:
        """Let it speak nonsense."""
        self.proxy.garble(True)
        self._bad_for_a_while(4)

    def _bad_for_a_while(self, most_s: float) -> None:
        self._calm(self._dice.uniform(0.2, most_s))
        self.proxy.heal()

    # --- cluster c's stores -----------------------------------------------------------------------------------------

    def move_leader(self) -> None:
        """Have another member lead."""
        self.third.etcd.move_leader()

    def kill_leader(self) -> None:
        """Kill the one that leads; it comes back."""
        leader = self.third.etcd.wait_leader()
        leader.kill()
        self._calm(self._dice.uniform(0.2, 4))
        leader.start()

    def freeze_member(self) -> None:
        """Let one member hang: the one that the agent talks to, or another."""
        member = self._dice.choice(self.third.etcd.members)
        member.freeze()
        try:
            self._calm(self._dice.uniform(0.5, 5))
        finally:
            member.thaw()

    def overtake_member(self) -> None:
        """Let one sleep while records change, then be there when the others restart: it is behind them."""
        sleeper, *others = self._dice.sample(self.third.etcd.members, 3)
        sleeper.freeze()
        try:
            for _ in range(5):
                self.third_churn.change()
            for member in others:
                member.kill()
        finally:
            sleeper.thaw()
            for member in others:
                member.start(wait=False)
            for member in others:
                member.wait_ready()

    def revoke_tokens(self) -> None:
        """Make every token worthless."""
        self.third.revoke_tokens()

    def rotate_certificates(self) -> None:
        """Replace the client's certificate on disk, first by one that has expired, and let it reconnect each time."""
        for expired in (self._dice.random() < 0.5, False):
            self.third.install_certificate(expired=expired)
            member = self._dice.choice(self.third.etcd.members)
            member.kill()
            self._calm(self._dice.uniform(0.2, 3))
            member.start()

    def compact_third(self) -> None:
        """Forget old revisions under the agent's watches."""
        leader = self.third.etcd.wait_leader()
        leader.compact(leader.revision())

    # --- the node ---------------------------------------------------------------------------------------------------

    def remove_interface(self) -> None:
        """Delete the interface of the pod that talks to changing peers, under its traffic, and make it again."""
        pod = self.lab.pods[1]
        self.lab.unplug(pod)
        self._calm(self._dice.uniform(0, 2))
        self.lab.plug(pod)

    def fill_map(self) -> None:
        """Let somebody else fill the ipcache to the last entry, and go again."""
        with fill(self.lab):
            self._calm(2)

    def tear_off(self) -> None:
        """Remove the pins of the programs' links: the kernel takes the programs off every interface."""
        for pin in (self.lab.bpffs / "lazymesh/links").iterdir():
            pin.unlink()

    # --- Cilium beside us -------------------------------------------------------------------------------------------

    def restart_cilium(self) -> None:
        """Let its agent start anew, with a new map that fills slowly."""
        self._boot().wait("switched")

    def restart_cilium_twice(self) -> None:
        """Once more before the first start is over."""
        self._boot()
        self._calm(self._dice.uniform(0.3, 2))
        self._boot().wait("switched")

    def restart_cilium_without_etcd(self) -> None:
        """Let it start anew while cluster b's store is down."""
        self.lab.etcd.kill()
        try:
            self._calm(1, b=False)
            boot = self._boot()
            self._calm(self._dice.uniform(0.5, 3), b=False)
            boot.wait("switched")
        finally:
            self.lab.etcd.start()

    def reload_cilium(self) -> None:
        """Let it load its programs anew."""
        assert self.cilium
        self.cilium.reload()

    def _boot(self):
        assert self.cilium
        return self.cilium.restart(
            repin_after=self._dice.uniform(0.1, 1), fill_rate=10, switch_after=self._dice.uniform(1, 3)
        )

    def _faults(self) -> dict[str, Callable[[], None]]:
        faults = [
            self.kill_agent, self.kill_starting_agent, self.stop_agent, self.pause_agent, self.kill_holder,
            self.pause_holder, self.jump_clock, self.kill_etcd, self.freeze_etcd, self.replace_etcd, self.restore_etcd,
            self.compact, self.cut_connection, self.refuse_connections, self.swallow, self.slow_down, self.throttle,
            self.garble, self.move_leader, self.kill_leader, self.freeze_member, self.overtake_member,
            self.revoke_tokens, self.rotate_certificates, self.compact_third, self.remove_interface, self.tear_off,
        ]  # fmt: skip
        if self.cilium:
            faults += [
                self.restart_cilium, self.restart_cilium_twice, self.restart_cilium_without_etcd, self.reload_cilium,
            ]  # fmt: skip
        else:
            faults.append(self.fill_map)
        return {fault.__name__.replace("_", " "): fault for fault in faults}


class Third(Neighbour):
    """A cluster whose etcd has three members, certificates, and tokens that live for seconds."""

    def __init__(self, lab: Lab) -> None:
        self._authority = Authority(lab.directory / "ca")
        self._cert, self._key = lab.directory / "tls.crt", lab.directory / "tls.key"
        self._role = Role("remote", cilium_roles("c")[0].prefixes, cilium_roles("c")[0].keys, password="pw")
        extra = ("--auth-token-ttl=3", "--bcrypt-cost=4")
        settings = EtcdSettings(command_prefix=tuple(lab.node_a.command()), tls=self._authority, extra=extra)
        access = "\n".join(
            [
                f"trusted-ca-file: {self._authority.cert}",
                f"cert-file: {self._cert}",
                f"key-file: {self._key}",
                "username: remote",
                "password: pw",
            ]
        )
        self.etcd: EtcdCluster
        super().__init__(lab, "c", THIRD_ID, etcd=EtcdCluster(settings), access=access)

    def __enter__(self) -> Self:
        super().__enter__()
        self.fill(cidrs=[THIRD_CIDR], identities=[THIRD_IDENTITY, THIRD_IDENTITY + 1])
        self.etcd.enable_auth([self._role], root_password="rootpw")
        self.connect(THIRD_CIDR)
        self.install_certificate()
        self.join()
        return self

    def install_certificate(self, *, expired: bool = False) -> None:
        """Put a new certificate where the client looks for it, its key first, as a rotation does."""
        pair = self._authority.issue("remote", expired=expired)
        for source, target in ((pair.key, self._key), (pair.cert, self._cert)):
            fresh = target.with_suffix(".fresh")
            shutil.copy(source, fresh)
            fresh.rename(target)

    def revoke_tokens(self) -> None:
        """Make every token worthless."""
        self.etcd.wait_leader().revoke_tokens(self._role)


@contextlib.contextmanager
def fill(lab: Lab) -> Iterator[None]:
    """Let a stranger have every entry of the ipcache that is free, until the end of the block."""
    with contextlib.closing(Map.pinned(lab.bpffs / "lazymesh/lm_ipcache")) as ipcache:
        room = ipcache.layout.max_entries - sum(1 for _ in ipcache.items())
        first = int(ipaddress.ip_address("100.64.0.1"))
        keys = [pack_key(str(ipaddress.ip_address(first + number))) for number in range(room)]
        value = pack_value(77)
        with contextlib.suppress(OSError):  # an entry of ours came meanwhile
            ipcache.update_many([(key, value) for key in keys])
        try:
            yield
        finally:
            ipcache.delete_many(keys)


def wait_for(check: Callable[[], object], what: str) -> None:
    """Wait until it is so; RuntimeError when it is not after a minute."""
    until = time.monotonic() + SETTLE_S
    while not check():
        if time.monotonic() > until:
            raise RuntimeError(f"{what}: not after {SETTLE_S:g} s")
        time.sleep(0.02)
