/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The kernel half of lazymesh: two TC programs, one for what pods send, one for what the network sends to them.
 *
 * Both look the peer up in the ipcache. A hit goes on untouched. A miss (the table in miss_of) is signalled once per
 * address and re-arm interval, within the token buckets, unless muted; then it goes on, or is dropped, as the settings
 * say. With a policy (standalone mode) mesh traffic is judged by the peer's identity. What is not ours is passed on:
 * the verdict is always TC_ACT_UNSPEC, "the next program decides", or TC_ACT_SHOT.
 */
#include <linux/types.h>
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>
#include "include/lazymesh_abi.h"
#include "include/maps.h"
#include "include/parse.h"

#define WORLD_ID 2
#define WORLD_IPV4_ID 9
#define WORLD_IPV6_ID 10
#define SCOPE_LOCAL 1 /* top byte of identities that only mean something on this node (CIDR and FQDN policy) */

#define SECOND 1000000000ULL
#define FLOW_LIFETIME (60 * SECOND)
#define FLOW_LIFETIME_TCP (8000 * SECOND) /* Cilium's defaults */
#define FLOW_LIFETIME_CLOSED (10 * SECOND)

enum miss {
	MISS_NO,
	MISS_YES,
	MISS_IF_MESH,
};

/* What the longest match says of the exact address; the map never tells how long the match was. */
static __always_inline enum miss miss_of(const struct ipcache_entry *entry)
{
	if (!entry)
		return MISS_IF_MESH;
	if (entry->sec_identity == WORLD_ID || entry->sec_identity == WORLD_IPV4_ID ||
	    entry->sec_identity == WORLD_IPV6_ID)
		return entry->flags & IPCACHE_FLAG_HAS_TUNNEL_EP ? MISS_YES : MISS_IF_MESH;
	if (entry->sec_identity >> 24 == SCOPE_LOCAL)
		return MISS_IF_MESH;
	return MISS_NO;
}

/*
 * One token from a bucket kept as its theoretical arrival time. Not atomic: CPUs that race may take a token too many,
 * each at most one.
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

/* Signal the miss, or count why not: exactly one counter beside `missed` moves. */
static __always_inline void report_miss(struct __sk_buff *skb, struct lm_packet *packet, int direction,
					u16 cluster_id, struct lm_config *config, struct lm_counters *counters)
{
	struct lm_dedup_key dedup = {};
	struct ipcache_miss miss = {};
	u64 now = bpf_ktime_get_ns(), *silent_until, until;

	counters->missed++;
	if (config->muted) {
		counters->muted++;
		return;
	}
	__builtin_memcpy(dedup.addr, packet->peer.addr, sizeof(dedup.addr));
	dedup.family = packet->peer.family;
	silent_until = lm_dedup.lookup(&dedup);
	if (silent_until && now < *silent_until) {
		counters->suppressed_dedup++;
		return;
	}
	/* ifindex is never 0, so key 0 is free for the bucket of all interfaces together */
	if (!take_token(skb->ifindex, config->interface_interval_ns, config->interface_burst_ns, now) ||
	    !take_token(0, config->global_interval_ns, config->global_burst_ns, now)) {
		counters->suppressed_rate++;
		return;
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
	} else {
		counters->signalled++;
	}
}

static __always_inline void flow_key_of(struct lm_packet *packet, struct lm_ports *ports, int initiator,
					struct lm_flow_key *key)
{
	__builtin_memcpy(key->local, packet->local, sizeof(key->local));
	__builtin_memcpy(key->peer, packet->peer.addr, sizeof(key->peer));
	key->local_port = ports->local;
	key->peer_port = ports->peer;
	key->family = packet->peer.family;
	key->protocol = packet->protocol;
	key->initiator = initiator;
}

static __always_inline int flow_alive(const struct lm_flow *flow, u8 protocol, u64 now)
{
	u64 lifetime = flow->closing == LM_FLOW_CLOSED ? FLOW_LIFETIME_CLOSED
		       : protocol == IPPROTO_TCP	? FLOW_LIFETIME_TCP
							: FLOW_LIFETIME;

	return now - flow->seen_ns < lifetime;
}

/* One more packet of a live flow. A closed one is not kept alive by what still comes. */
static __always_inline void touch_flow(struct lm_flow *flow, const struct lm_ports *ports, u64 now)
{
	if (flow->closing == LM_FLOW_CLOSED)
		return;
	flow->seen_ns = now;
	flow->closing |= ports->closing;
}

/* Does the packet answer a flow that policy allowed the other way round? */
static __always_inline int is_reply(struct lm_flow_key *key, struct lm_ports *ports, u64 now)
{
	struct lm_flow *flow;

	if (!ports->answers)
		return 0;
	flow = lm_flows.lookup(key);
	if (!flow || !flow_alive(flow, key->protocol, now))
		return 0;
	touch_flow(flow, ports, now);
	return 1;
}

static __always_inline void remember_flow(struct lm_flow_key *key, struct lm_ports *ports, u64 now)
{
	struct lm_flow fresh = {.seen_ns = now, .closing = ports->closing}, *flow = lm_flows.lookup(key);

	/* A SYN starts over: the ports of a closed connection may be used again. */
	if (flow && !ports->syn && flow_alive(flow, key->protocol, now))
		touch_flow(flow, ports, now);
	else
		lm_flows.update(key, &fresh);
}

/*
 * The standalone policy: replies of allowed flows pass, then the peer's identity decides. Later fragments pass with
 * their first one: without it they are never put together.
 */
static __always_inline int judge(struct __sk_buff *skb, struct lm_packet *packet, int direction, u32 identity,
				 struct lm_config *config, struct lm_counters *counters)
{
	struct lm_policy_key policy = {.identity = identity, .direction = direction};
	struct lm_flow_key key = {};
	struct lm_ports ports = {};
	u64 now = bpf_ktime_get_ns();
	int has_ports;

	if (packet->peer.family == IPCACHE_FAMILY_IPV6 && parse_extensions(skb, packet))
		packet->protocol = 0xff;
	has_ports = !parse_ports(skb, direction, packet, &ports);

	if (has_ports) {
		flow_key_of(packet, &ports, !direction, &key);
		if (is_reply(&key, &ports, now)) {
			counters->policy_reply++;
			return TC_ACT_UNSPEC;
		}
		key.initiator = direction;
	}
	if (!(config->enforced & (1 << direction)) || lm_policy.lookup(&policy)) {
		if (has_ports && ports.opens)
			remember_flow(&key, &ports, now);
		counters->policy_allow++;
		return TC_ACT_UNSPEC;
	}
	if (packet->later_fragment) {
		counters->policy_fragment++;
		return TC_ACT_UNSPEC;
	}
	if (has_ports)
		lm_flows.delete(&key); /* allowed once, not any more: its replies end too */
	counters->policy_deny++;
	return TC_ACT_SHOT;
}

static __always_inline int handle(struct __sk_buff *skb, int direction)
{
	struct lm_packet packet = {};
	struct ipcache_entry *entry;
	struct lm_mesh_cidr *mesh;
	struct lm_counters *counters;
	struct lm_config *config;
	enum miss miss;
	u32 zero = 0, slot = direction;
	int parsed;

	config = lm_config.lookup(&zero);
	counters = lm_counters.lookup(&slot);
	if (!config || !counters)
		return TC_ACT_UNSPEC; /* array elements always exist: for the verifier */
	parsed = parse_addresses(skb, direction, &packet);
	if (parsed) {
		counters->not_parsed++;
		if (parsed != LM_HIDDEN || !(config->enforced & (1 << direction)))
			return TC_ACT_UNSPEC;
		counters->policy_deny++;
		return TC_ACT_SHOT;
	}
	entry = lm_ipcache.lookup(&packet.peer);
	miss = miss_of(entry);
	if (miss == MISS_NO && !config->enforced) {
		counters->hit++;
		return TC_ACT_UNSPEC;
	}
	mesh = lm_mesh_cidrs.lookup(&packet.peer);
	if (miss == MISS_NO) {
		counters->hit++;
	} else if (mesh || miss == MISS_YES) {
		report_miss(skb, &packet, direction, mesh ? mesh->cluster_id : 0, config, counters);
		if (config->on_miss == LM_ON_MISS_DROP) {
			counters->missed_drop++;
			return TC_ACT_SHOT;
		}
	} else {
		counters->not_mesh++;
	}
	if (!mesh || !config->enforced)
		return TC_ACT_UNSPEC;
	return judge(skb, &packet, direction, miss == MISS_NO ? entry->sec_identity : WORLD_ID, config, counters);
}

int lm_from_pod(struct __sk_buff *skb)
{
	return handle(skb, LM_EGRESS);
}

int lm_from_uplink(struct __sk_buff *skb)
{
	return handle(skb, LM_INGRESS);
}
