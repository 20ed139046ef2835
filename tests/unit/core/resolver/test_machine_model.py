"""Everything at once, in every order: the resolver against a model of stores, watches, caches and the map.

The world below does what a real one may do: reads are executed and answered late, or fail; watch events come late and
twice; a cache lags behind its owner; stores are replaced, clusters leave and return; entries vanish and installs are
refused. Meanwhile no entry is ever wrong beyond what was delivered; at the end, the map says what the records say.
Only what ``step`` returns is looked at.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lazymesh.core.events import (
    Adopted,
    AllListed,
    Answered,
    Changed,
    ClusterGone,
    ClusterReady,
    ClusterSilent,
    Command,
    Evict,
    IdentitiesKnown,
    IdentityGone,
    Install,
    InstallsEnded,
    KeyState,
    Lost,
    Misses,
    Read,
    ReadFailed,
    Report,
    Shrink,
    StoreReset,
    TableChanged,
    Tick,
    Unwatch,
    Used,
    Watch,
)
from lazymesh.core.model import Entry, Reason, Space
from lazymesh.core.records import IpRecord, decode_pair, decode_pairs, entry_of
from lazymesh.core.resolver import Judge, Resolver
from lazymesh.core.resolver.limits import Limits
from tests.support.playbook import (
    ALL_IDENTITIES,
    B1,
    B2,
    B3,
    C1,
    C2,
    CACHE,
    DATABASE,
    DIRECT,
    MAIL,
    WEB,
    WEB_OF_C,
    info,
    mesh,
    one_by_one,
    record,
)
from tests.support.storemodel import Cluster, Key, Store

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazymesh.core.clusters import ClusterTable
    from lazymesh.core.events import Event
    from lazymesh.core.model import Address

INFOS = {"b": info("b", DIRECT), "c": info("c", CACHE, DIRECT)}
ADDRESSES = {B1: "b", B2: "b", B3: "b", C1: "c", C2: "c"}
IDENTITIES = {"b": (WEB, DATABASE, MAIL, 2, 131999), "c": (WEB_OF_C, WEB, 196700)}
"""What the stores may hold; each cluster also has one identity that is forged and one that is unknown."""
NETWORKS = (("b", "10.2.0.0/16"), ("c", "10.3.0.0/16"))
DISPUTE = (("c", "10.2.0.1/32"),)
IN_FLIGHT, KEYS = 2, 4

addresses = st.sampled_from(sorted(ADDRESSES))
clusters = st.sampled_from(sorted(INFOS))


class World(RuleBasedStateMachine):
    """The shell and the world around the resolver."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.identities = set(ALL_IDENTITIES)
        self.clusters = {name: Cluster(name) for name in INFOS}
        self.budget = 0
        self.disputed = False
        self.map: dict[Address, Entry] = {}
        self.last: dict[Address, Entry] = {}
        """What was put into the map last, unless it was evicted since."""
        self.foreign: set[Address] = set()
        """Foreign entries, which programs take for the world."""
        self.taken: set[Address] = set()
        """The map's owner has entries there by which programs know the peer."""
        self.results: list[tuple[Address, Reason | None]] = []
        self.refusal: Reason | None = None
        self.unanswered: dict[Address, int] = {}
        self.asked: set[Address] = set()

    @initialize(
        budget=st.sampled_from([2, 100]),
        negatives=st.sampled_from([1, 3]),
        adopted=st.dictionaries(addresses, st.booleans()),
        late=st.sets(clusters),
    )
    def begin(self, budget: int, negatives: int, adopted: dict[Address, bool], late: set[str]) -> None:
        """Start the agent over what an earlier life left in the map; some clusters have not joined by then."""
        self.budget = budget
        for name in late:
            self.clusters[name].joined = False
        limits = Limits(
            owned=budget,
            transactions_in_flight=IN_FLIGHT,
            keys_per_transaction=KEYS,
            whole_at=2,
            queue=3,
            negatives=negatives,
            revalidation_spread=2.0,
        )
        self.resolver = Resolver(limits, Judge(self.table(), self.identities))
        for address, known in itertools.islice(adopted.items(), budget):
            name = ADDRESSES[address]
            self.map[address] = entry_of(decode_pair(record(address, IDENTITIES[name][0]), address))
            self.last[address] = self.map[address]
            self.feed(Adopted(address, self.map[address], INFOS[name].cluster_id if known else 200))
        for address, name in ADDRESSES.items():
            self.pod_is_published(address, 0, Space.PUSHED)
            self.something_big_happens(name, "ready")

    # --- the shell ------------------------------------------------------------------------------------------------

    def feed(self, event: Event) -> None:
        """Tell the resolver and carry out what it says, as soon as it says it."""
        self.resolver.step(event, self.now, self.carry_out_apart)

    def carry_out_apart(self, command: Command) -> None:
        """Do it for each address by itself."""
        for single in one_by_one([command]):
            self.carry_out(single)

    def carry_out(self, command: Command) -> None:
        """Do what the shell would do, and insist on the rules of the contract."""
        match command:
            case Read(cluster=name):
                self.send(self.clusters[name], command)
            case Watch(cluster=name, spaces=spaces, addresses=some, after=after):
                cluster = self.clusters[name]
                for address, space in itertools.product(some, spaces):
                    assert (address, space) not in cluster.watches, "a key is watched once"
                    cluster.watches[address, space] = (cluster.store(space), after)
            case Unwatch(cluster=name, address=address):
                keys = [key for key in self.clusters[name].watches if key[0] == address]
                assert keys, "nothing to unwatch"
                for key in keys:
                    del self.clusters[name].watches[key]
            case Install():
                self.install(command)
            case Evict(address=address):
                self.map.pop(address, None)
                self.last.pop(address, None)
            case Report(addresses=[address], missed_at=[missed_at]) if missed_at is not None:
                assert self.unanswered.pop(address, None) is not None, "nobody asked"

    def send(self, cluster: Cluster, read: Read) -> None:
        """Put a read in flight."""
        others = [a for r in cluster.reads for a in r.addresses]
        others += [a for _, answer in cluster.executed for a in answer.addresses]
        assert not set(read.addresses) & set(others), "single flight"
        cluster.reads.append(read)
        assert len(cluster.reads) + len(cluster.executed) <= IN_FLIGHT
        whole = sum(read.whole)
        assert (len(read.whole) + len(read.addresses) - whole) * len(read.spaces) <= KEYS
        groups = itertools.groupby(read.addresses[:whole], lambda address: address[:-1])
        assert tuple(len(list(group)) for _, group in groups) == read.whole
        assert cluster.ready, "a cluster that is not ready is not read"

    def install(self, command: Install) -> None:
        """Write to the map, unless it refuses, and keep the result for later."""
        (address,), entry = command.addresses, command.entry
        assert address not in dict(self.results), "one Install at a time"
        assert entry.identity in self.identities, "an identity nobody knows"
        # The same again is no news: it puts back what somebody took away.
        assert self.last.get(address) == entry or self.may_say(address, entry), "out of date"
        standing = Reason.TAKEN if address in self.taken else Reason.NOT_OURS
        error = standing if address in self.foreign | self.taken else self.refusal
        self.refusal = None
        if error is None:
            self.map[address] = entry
            assert len(self.map) <= self.budget
        self.last[address] = entry
        self.results.append((address, error))

    def may_say(self, address: Address, entry: Entry) -> bool:
        """Return whether the record delivered last, or one written since, makes this entry."""
        cluster = self.clusters[ADDRESSES[address]]
        values = cluster.owner.recent(address, DIRECT) | cluster.cache.recent(address, CACHE)
        return entry in [self.judged(address, value) for value in values]

    def judged(self, address: Address, value: bytes | None) -> Entry | None:
        """Return what the map should hold for a record."""
        if value is None:
            return None
        (record_,) = decode_pairs([value], [address])
        verdict = Judge(self.table(), self.identities, None).verdict(record_, INFOS[ADDRESSES[address]])
        return entry_of(verdict) if isinstance(verdict, IpRecord) else None

    def expected(self, address: Address) -> Entry | None:
        """Return what the map should hold when all is quiet."""
        owner = self.clusters[ADDRESSES[address]].owner
        return self.judged(
            address, owner.value(address, Space.PUSHED) or owner.value(address, Space.PULL_ONLY)
        )

    def table(self) -> ClusterTable:
        """Return the clusters that are joined, and what they claim."""
        joined = [INFOS[name] for name, cluster in self.clusters.items() if cluster.joined]
        return mesh(joined, NETWORKS + DISPUTE if self.disputed else NETWORKS)

    # --- what happens ---------------------------------------------------------------------------------------------

    @rule(address=addresses)
    def packet_misses(self, address: Address) -> None:
        """A pod sends, and the map has no entry, or had none when the kernel looked."""
        self.packets_miss([address])

    @rule(some=st.lists(addresses, min_size=2, unique=True))
    def packets_miss(self, some: list[Address]) -> None:
        """Several packets miss at one moment."""
        self.asked.update(some)
        for address in some:
            self.unanswered[address] = self.unanswered.get(address, 0) + 1
        self.feed(Misses(tuple(some), (self.now,) * len(some)))

    @rule(address=addresses, which=st.sampled_from([0, 0, 1, 1, 2, 3, 4]), space=st.sampled_from(DIRECT))
    def pod_is_published(self, address: Address, which: int, space: Space) -> None:
        """An address gets a record, perhaps another pod's; what the other space holds goes a moment later."""
        name = ADDRESSES[address]
        owner, identities = self.clusters[name].owner, IDENTITIES[name]
        owner.write(address, space, record(address, identities[which % len(identities)]))
        owner.write(address, DIRECT[space is Space.PUSHED], None)

    @rule(address=addresses)
    def pod_is_withdrawn(self, address: Address) -> None:
        """Its record is deleted."""
        for space in DIRECT:
            self.clusters[ADDRESSES[address]].owner.write(address, space, None)

    @rule(choices=st.lists(st.integers(0, 999), min_size=1, max_size=8))
    def what_is_under_way_arrives(self, choices: list[int]) -> None:
        """A few of the things under way go one step on, in any order."""
        for choice in choices:
            ways = self.under_way()
            if ways:
                ways[choice % len(ways)]()

    def under_way(self) -> list[Callable[[], None]]:
        """Return the steps that could come next."""
        ways: list[Callable[[], None]] = []
        for cluster in self.clusters.values():
            ways += [partial(self.execute, cluster, read) for read in cluster.reads]
            ways += [partial(self.deliver, cluster, answer) for answer in cluster.executed]
            if cluster.ready:
                ways += [partial(self.tell_change, cluster, *due) for due in cluster.pending()]
            if cluster.mirrored < len(cluster.owner.history):
                ways.append(cluster.mirror)
        if self.results:
            ways.append(self.answer_install)
        return ways

    def execute(self, cluster: Cluster, read: Read) -> None:
        """The store answers; the answer is on its way."""
        cluster.reads.remove(read)
        store = cluster.store(read.spaces[0])
        states = store.snapshot(read)
        values = tuple(state.value for state in states)
        answer = Answered(cluster.name, read.spaces, read.addresses, values, states[0].as_of)
        cluster.executed.append((store, answer))

    def deliver(self, cluster: Cluster, answer: tuple[Store, Answered]) -> None:
        """The answer arrives."""
        cluster.executed.remove(answer)
        store, said = answer
        keys = itertools.product(said.addresses, said.spaces)
        store.tell([KeyState(*key, value, said.as_of) for key, value in zip(keys, said.values, strict=True)])
        self.feed(said)

    def tell_change(self, cluster: Cluster, key: Key, state: KeyState) -> None:
        """A watch event arrives."""
        store, _ = cluster.watches[key]
        cluster.watches[key] = (store, state.as_of)
        store.tell([state])
        self.feed(Changed(cluster.name, state))

    def answer_install(self) -> None:
        """A result comes, in the order of the commands."""
        self.answer_installs(1)

    @rule(count=st.integers(2, 8))
    def answer_installs(self, count: int) -> None:
        """Results of several come together."""
        ended, self.results = self.results[:count], self.results[count:]
        if ended:
            addresses, errors = zip(*ended, strict=True)
            self.feed(InstallsEnded(addresses, errors))

    @rule(name=clusters, which=st.integers(0, 99))
    def watch_event_arrives_again(self, name: str, which: int) -> None:
        """A store's connection that resumes may repeat any of its events, even for watches given up since."""
        history = self.clusters[name].owner.history
        told = [s for s in history if s.as_of <= self.clusters[name].owner.told.get((s.address, s.space), -1)]
        if told:
            self.feed(Changed(name, told[which % len(told)]))

    @rule(name=clusters, kind=st.sampled_from(["timeout", "permission", "owner", "exhausted"]))
    def read_fails(self, name: str, kind: str) -> None:
        """The store does not answer, or refuses."""
        cluster = self.clusters[name]
        if cluster.reads:
            read = cluster.reads.pop(0)
            self.feed(ReadFailed(name, read.addresses, kind, bool(read.whole)))

    @rule(address=addresses, stranger=st.booleans())
    def entry_vanishes(self, address: Address, stranger: bool) -> None:
        """Another program removes ours, and perhaps puts its own entry there; or takes that away again."""
        self.map.pop(address, None)
        self.foreign ^= {address} if stranger else set()

    @rule(address=addresses)
    def owner_writes_or_deletes(self, address: Address) -> None:
        """The map's owner overwrites ours, or takes its own away again."""
        self.map.pop(address, None)
        self.taken ^= {address}

    @rule()
    def shell_finds_what_is_lost(self) -> None:
        """It looks at the map once in a while, and gives such entries up first."""
        lost = [address for address in self.last if address not in self.map]
        for address in lost:
            if address not in dict(self.results):
                self.last.pop(address)
        self.feed(Lost(tuple(lost)))

    @rule(entries=st.integers(1, 2))
    def map_gets_crowded(self, entries: int) -> None:
        """Some of our entries have to go."""
        before = self.resolver.owned
        self.feed(Shrink(entries))
        assert self.resolver.owned == max(0, before - entries)

    @rule(some=st.sets(addresses))
    def node_talks_to(self, some: set[Address]) -> None:
        """And the shell says so."""
        self.feed(Used(tuple(some)))

    @rule(reason=st.sampled_from([Reason.MAP_FULL, Reason.INSTALL_FAILED]))
    def next_install_will_fail(self, reason: Reason) -> None:
        """The kernel refuses once."""
        self.refusal = reason

    @rule(identity=st.sampled_from([WEB, DATABASE, MAIL, WEB_OF_C]))
    def identity_comes_or_goes(self, identity: int) -> None:
        """The shell's set changes before the event reports it."""
        self.identities ^= {identity}
        self.feed(IdentitiesKnown((identity,)) if identity in self.identities else IdentityGone(identity))

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 31.0, 601.0]))
    def time_passes(self, seconds: float) -> None:
        """And the shell says so."""
        self.now += seconds
        self.feed(Tick())

    @rule(
        name=clusters,
        what=st.sampled_from(["ready", "ready", "ready", "silent", "replaced", "joined", "disputed"]),
    )
    def something_big_happens(self, name: str, what: str) -> None:
        """To a whole cluster."""
        cluster = self.clusters[name]
        match what:
            case "ready" if cluster.joined:
                cluster.ready = True
                self.feed(ClusterReady(name))
            case "silent":
                cluster.ready = False
                self.feed(ClusterSilent(name))
            case "replaced":
                cluster.replace()
                self.feed(StoreReset(name))
                assert not cluster.watches, "watches of a store that no longer is"
            case "joined":
                self.join_or_leave(cluster)
            case "disputed":
                self.dispute()

    @rule()
    def all_are_listed(self) -> None:
        """The shell says so once every cluster has been."""
        if all(cluster.ready for cluster in self.clusters.values()):
            self.feed(AllListed())

    def join_or_leave(self, cluster: Cluster) -> None:
        """A cluster that returns has new stores."""
        cluster.joined = not cluster.joined
        cluster.ready = False
        if cluster.joined:
            cluster.replace()
        else:
            self.feed(ClusterGone(cluster.name))
            assert not cluster.watches, "watches of a cluster that is gone"
            assert cluster.name not in {ADDRESSES[a] for a in self.map}, "entries of a cluster that is gone"
        self.feed(TableChanged(self.table()))

    def dispute(self) -> None:
        """Cluster c claims one of cluster b's addresses, or no longer does."""
        self.disputed = not self.disputed
        self.feed(TableChanged(self.table()))
        assert B1 not in self.map or len(self.table().owners(B1)) < 2, "an address claimed by two"

    # --- what must hold -------------------------------------------------------------------------------------------

    @invariant()
    def no_entry_has_an_unknown_identity(self) -> None:
        """The policy would not know it; only while an update is unanswered may the previous entry remain."""
        answered = self.map.keys() - dict(self.results).keys()
        assert {self.map[address].identity for address in answered} <= self.identities

    def quiet_down(self) -> None:
        """Let everything under way arrive, and pauses end."""
        for _ in range(5):
            while ways := self.under_way():
                ways[-1]()
            self.time_passes(1.0)

    def heal(self) -> None:
        """End everything that keeps addresses from being resolved."""
        self.refusal = None
        self.foreign.clear()
        self.taken.clear()
        if self.disputed:
            self.dispute()
        for name, cluster in self.clusters.items():
            if not cluster.joined:
                self.join_or_leave(cluster)
            self.something_big_happens(name, "ready")
        self.all_are_listed()

    def all_is_quiet(self) -> None:
        """Nothing wrong, nothing forgotten, nothing leaked; and whatever misses now is resolved."""
        self.heal()
        self.quiet_down()
        assert self.map == {address: self.expected(address) for address in self.map}
        assert not self.unanswered, "a miss without an answer"
        self.time_passes(61.0)
        self.quiet_down()
        watched = {address for cluster in self.clusters.values() for address, _ in cluster.watches}
        assert watched >= set(self.map)
        assert watched == {address for address in ADDRESSES if self.resolver.describe(address) is not None}
        for address in sorted(self.asked):
            self.packet_misses(address)
            self.quiet_down()
        wanted = {address: entry for address in self.asked if (entry := self.expected(address))}
        assert self.map.items() <= {address: self.expected(address) for address in ADDRESSES}.items()
        if self.budget > len(ADDRESSES):
            assert wanted.items() <= self.map.items()
        else:
            assert len(self.map) >= min(self.budget, len(wanted))

    def teardown(self) -> None:
        """However the play went, it ends well."""
        if self.budget:
            self.all_is_quiet()


World.TestCase.settings = settings(
    max_examples=300, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck)
)
TestResolverInTheWorld = World.TestCase
