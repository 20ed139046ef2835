/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The kernel half of lazymesh: two TC programs, one for what pods send, one for what the network sends to them. (The
 * holder's are in hold.h, and one that writes entries for the agent is in install.h.)
 *
 * Both look the peer up in the ipcache. A hit passes untouched. A miss (the table in miss_of) is signalled once per
 * address and re-arm interval, within the token buckets, unless muted; then it passes, is held or dropped, as the
 * settings say. With a policy (standalone mode) mesh traffic is judged by the peer's identity. Other traffic passes.
 * The verdict is TC_ACT_UNSPEC, "the next program decides", TC_ACT_SHOT, or that of a parked packet.
 */
#include <linux/types.h>
#include <uapi/asm-generic/errno-base.h>
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>
#include "include/lazymesh_abi.h"
#include "include/maps.h"
#include "include/parse.h"
#include "include/answers.h"
#include "include/hold.h"
#include "include/policy.h"
#include "include/install.h"

#define WORLD_ID 2
#define WORLD_IPV4_ID 9
#define WORLD_IPV6_ID 10
#define SCOPE_LOCAL 1 /* top byte of identities that are valid on this node only (CIDR and FQDN policy) */

/* In order of certainty: of several maps, the one that knows least decides. */
enum miss {
	MISS_NO,
	MISS_IF_MESH,
	MISS_YES,
};

/* What the longest match says about the exact address; the map does not report how long the match was. */
static __always_inline enum miss miss_of(u32 identity, int has_tunnel_ep)
{
	if (identity == WORLD_ID || identity == WORLD_IPV4_ID || identity == WORLD_IPV6_ID)
		return has_tunnel_ep ? MISS_YES : MISS_IF_MESH;
	return identity >> 24 == SCOPE_LOCAL ? MISS_IF_MESH : MISS_NO;
}

/*
 * Keeps two lookups from being compiled into one. The verifier then knows each one's kind of map, and calls its function
 * directly: through the helper for all kinds it is an indirect call, which costs several nanoseconds.
 */
#define lookup_of_its_own(kind) asm volatile("" : : "i"(kind))

/* Ask one of the ipcaches; without an answer the identity is left alone. */
static __always_inline enum miss ask(u32 view, u32 slot, struct ipcache_key *peer, u32 *identity)
{
	struct ipcache_entry_v1 *v1;
	struct ipcache_entry *v2;
	void *ipcache;

	if (view == LM_VIEW_V1) {
		ipcache = lm_view_v1.lookup(&slot);
		v1 = ipcache ? bpf_map_lookup_elem(ipcache, peer) : NULL;
		if (!v1)
			return MISS_IF_MESH;
		*identity = v1->sec_identity;
		return miss_of(v1->sec_identity, v1->tunnel_endpoint != 0);
	}
	if (view == LM_VIEW_V2) {
		ipcache = lm_view_v2.lookup(&slot);
		v2 = ipcache ? bpf_map_lookup_elem(ipcache, peer) : NULL;
		lookup_of_its_own(LM_VIEW_V2);
	} else {
		ipcache = lm_view_v2ro.lookup(&slot);
		v2 = ipcache ? bpf_map_lookup_elem(ipcache, peer) : NULL;
		lookup_of_its_own(LM_VIEW_V2_READONLY);
	}
	if (!v2)
		return MISS_IF_MESH;
	*identity = v2->sec_identity;
	return miss_of(v2->sec_identity, v2->flags & IPCACHE_FLAG_HAS_TUNNEL_EP);
}

/* Ask all ipcaches; the identity is the first one's. */
static __always_inline enum miss look_up(struct lm_config *config, struct ipcache_key *peer, u32 *identity)
{
	enum miss miss = ask(config->view[0], 0, peer, identity), other;
	u32 slot, ignored;

#pragma unroll
	for (slot = 1; slot < LM_VIEWS; slot++) {
		if (!config->view[slot])
			break;
		other = ask(config->view[slot], slot, peer, &ignored);
		if (other > miss)
			miss = other;
	}
	return miss;
}

/* The key of the peer's address in maps other than tries. */
static __always_inline struct lm_dedup_key address_key_of(const struct lm_packet *packet)
{
	struct lm_dedup_key key = {.family = packet->peer.family};

	__builtin_memcpy(key.addr, packet->peer.addr, sizeof(key.addr));
	return key;
}

/* Note a peer that this node talks to, once per epoch. */
static __always_inline void note_recent(const struct lm_packet *packet, u64 hash, u32 epoch)
{
	u64 tag = (hash & 0xffffffff00000000) | epoch, *last, value = epoch;
	u32 index = hash >> (64 - LM_RECENT_BITS);
	struct lm_dedup_key key;

	last = lm_recent_tags.lookup(&index);
	if (!last || *last == tag)
		return;
	*last = tag;
	key = address_key_of(packet);
	lm_recent.update(&key, &value);
}

/*
 * Take a token from a bucket, which is kept as its theoretical arrival time. Not atomic: CPUs that race may take at
 * most one token too many each.
 */
static __always_inline int take_token(u32 bucket, u64 interval_ns, u64 burst_ns, u64 now)
{
	u64 *arrival, next;

	if (!interval_ns)
		return 1;
	arrival = lm_rate.lookup(&bucket);
	next = arrival && *arrival > now ? *arrival : now;
	if (next - now > burst_ns)
		return 0;
	next += interval_ns;
	if (arrival)
		*arrival = next;
	else
		lm_rate.update(&bucket, &next);
	return 1;
}

/*
 * Wake the reader of the signals if it wants that. To wake it costs this CPU an interrupt, in a virtual machine twice as
 * much as the packet's whole way from the pod to here; so a reader that will look into the rings anyway is not woken. It
 * says what it wants before it looks, and we look at that after we have signalled: the addition keeps the order on x86.
 * Where it does not, the reader looks now and then unasked.
 */
static __always_inline void ring(struct __sk_buff *skb)
{
	struct lm_reader *reader;
	u32 zero = 0;

	reader = lm_reader.lookup(&zero);
	if (!reader)
		return;
	__sync_fetch_and_add(&reader->barrier, 1);
	if (!*(volatile u32 *)&reader->wake)
		return;
	reader->wake = 0;
	if (lm_doorbell.perf_submit(skb, &zero, sizeof(zero)))
		reader->wake = 1; /* the next signal tries again */
}

/*
 * Signal the miss, or count why not: exactly one counter besides `missed` moves. Returns why the packet may be held, if
 * it may: because an answer is on its way.
 */
static __always_inline enum hold report_miss(struct __sk_buff *skb, struct lm_packet *packet, int direction,
					u16 cluster_id, u64 now, struct lm_config *config,
					struct lm_counters *counters)
{
	struct lm_dedup_key dedup;
	struct ipcache_miss miss = {};
	u64 *silent_until, until, interval_ns, burst_ns;

	counters->missed++;
	if (config->muted) {
		counters->muted++;
		return HOLD_NOT;
	}
	dedup = address_key_of(packet);
	silent_until = lm_dedup.lookup(&dedup);
	if (silent_until && now < *silent_until) {
		counters->suppressed_dedup++;
		return config->hold_cookie && hold_pending(packet, 0) ? HOLD_BEHIND : HOLD_NOT;
	}
	interval_ns = direction == LM_EGRESS ? config->interface_interval_ns : config->uplink_interval_ns;
	burst_ns = direction == LM_EGRESS ? config->interface_burst_ns : config->uplink_burst_ns;
	/* ifindex is never 0, so key 0 is free for the bucket of all interfaces together */
	if (!take_token(skb->ifindex, interval_ns, burst_ns, now) ||
	    !take_token(0, config->global_interval_ns, config->global_burst_ns, now)) {
		counters->suppressed_rate++;
		return HOLD_NOT;
	}
	until = now + config->rearm_ns + (config->rearm_ns >> 10) * (bpf_get_prandom_u32() >> 24);
	lm_dedup.update(&dedup, &until);

	miss.signal = SIGNAL_IPCACHE_MISS;
	miss.family = packet->peer.family;
	miss.direction = direction;
	miss.cluster_id = cluster_id;
	miss.ifindex = skb->ifindex;
	__builtin_memcpy(miss.addr, packet->peer.addr, sizeof(miss.addr));
	miss.ktime_ns = now;
	if (lm_signals.perf_submit(skb, &miss, sizeof(miss))) {
		counters->lost++;
		lm_dedup.delete(&dedup);
		return HOLD_NOT;
	}
	counters->signalled++;
	ring(skb);
	return HOLD_FIRST;
}

/* The miss is answered: if the entry vanishes again, that is a new miss, which must be signalled at once. */
static __always_inline void rearm(const struct lm_packet *packet)
{
	struct lm_dedup_key dedup = address_key_of(packet);

	lm_dedup.delete(&dedup);
}

/* The open window: a packet of an address without an entry passed as world. */
static __always_inline void note_window(struct __sk_buff *skb, const struct lm_packet *packet, int direction,
					struct lm_counters *counters)
{
	struct lm_dedup_key key = address_key_of(packet);
	struct lm_window fresh = {}, *window;
	u64 now = bpf_ktime_get_ns();

	window = lm_windows.lookup(&key);
	if (window) {
		window->last_ns = now;
		__sync_fetch_and_add(&window->packets, 1);
		__sync_fetch_and_add(&window->bytes, skb->len);
		return;
	}
	fresh.first_ns = fresh.last_ns = now;
	fresh.packets = 1;
	fresh.bytes = skb->len;
	fresh.direction = direction;
	/* A window for which there is no room counts, too: so the agent learns that some are missing. */
	if (lm_windows.insert(&key, &fresh) != -EEXIST)
		counters->windows_opened++;
}

static __always_inline int handle(struct __sk_buff *skb, int direction)
{
	struct lm_packet packet = {};
	struct answer *answer;
	struct lm_mesh_cidr *mesh;
	struct lm_counters *counters;
	struct lm_config *config;
	enum miss miss;
	u32 zero = 0, slot = direction, identity = WORLD_ID;
	enum hold hold = HOLD_NOT;
	int parsed, verdict, missed = 0, arrived = 0, known = 0;
	u64 now, hash, moment;

	config = lm_config.lookup(&zero);
	counters = lm_counters.lookup(&slot);
	if (!config || !counters)
		return TC_ACT_UNSPEC; /* array elements always exist: for the verifier */
	if (config->hold_cookie && skb->mark >> LM_HOLD_COOKIE_SHIFT == config->hold_cookie)
		arrived = arrive(skb);
	parsed = parse_addresses(skb, direction, &packet);
	if (parsed) {
		counters->not_parsed++;
		if (parsed != LM_HIDDEN || !(config->enforced & (1 << direction)))
			return TC_ACT_UNSPEC;
		counters->policy_deny++;
		return TC_ACT_SHOT;
	}
	hash = hash_of(packet.peer.addr);
	answer = answer_at(hash, config);
	moment = moment_of(config); /* before the entry is looked up: it may go while we look */
	if (answer && is_answer(answer, &packet, hash, moment)) {
		known = 1;
		miss = MISS_NO;
		identity = answer->identity;
	} else {
		miss = look_up(config, &packet.peer, &identity);
	}
	/* A hit stays behind the held packets of its address. */
	if (miss == MISS_NO && config->hold_cookie && !arrived && hold_pending(&packet, HOLD_GATE_NS) &&
	    park(skb, &packet, HOLD_GATED, bpf_ktime_get_ns()))
		return config->park_verdict;
	if (arrived && miss == MISS_NO)
		rearm(&packet);
	if (miss == MISS_NO && !known) {
		note_recent(&packet, hash, config->epoch);
		if (answer)
			remember(answer, &packet, hash, identity, moment);
	}
	if (miss == MISS_NO && !config->enforced) {
		counters->hit++;
		return TC_ACT_UNSPEC;
	}
	mesh = lm_mesh_cidrs.lookup(&packet.peer);
	if (miss == MISS_NO) {
		counters->hit++;
	} else if (!mesh && miss == MISS_IF_MESH) {
		counters->not_mesh++;
	} else if (arrived) {
		counters->missed_again++;
		missed = 1;
		if (config->on_miss == LM_ON_MISS_DROP) {
			counters->missed_drop++;
			return TC_ACT_SHOT;
		}
	} else {
		missed = 1;
		now = bpf_ktime_get_ns();
		hold = report_miss(skb, &packet, direction, mesh ? mesh->cluster_id : 0, now, config, counters);
		if (config->on_miss == LM_ON_MISS_DROP) {
			counters->missed_drop++;
			return TC_ACT_SHOT;
		}
		if (hold != HOLD_NOT && config->on_miss == LM_ON_MISS_HOLD &&
		    park(skb, &packet, hold, now))
			return config->park_verdict;
	}
	verdict = TC_ACT_UNSPEC;
	if (mesh && config->enforced)
		verdict = judge(skb, &packet, direction, miss == MISS_NO ? identity : WORLD_ID, config, counters);
	if (missed && verdict != TC_ACT_SHOT)
		note_window(skb, &packet, direction, counters);
	return verdict;
}

int lm_from_pod(struct __sk_buff *skb)
{
	return handle(skb, LM_EGRESS);
}

int lm_from_uplink(struct __sk_buff *skb)
{
	return handle(skb, LM_INGRESS);
}
