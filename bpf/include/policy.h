/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The standalone policy: mesh traffic by the identity of its peer, with a table of flows so that replies pass.
 * judge() returns TC_ACT_UNSPEC or TC_ACT_SHOT, and moves exactly one policy counter.
 */
#ifndef LAZYMESH_POLICY_H
#define LAZYMESH_POLICY_H

#include "lazymesh_abi.h"
#include "maps.h"
#include "parse.h"

#define SECOND 1000000000ULL
#define FLOW_LIFETIME (60 * SECOND)
#define FLOW_LIFETIME_TCP (8000 * SECOND) /* Cilium's defaults */
#define FLOW_LIFETIME_CLOSED (10 * SECOND)

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

/* Another packet of a live flow. Late packets do not keep a closed flow alive. */
static __always_inline void touch_flow(struct lm_flow *flow, const struct lm_ports *ports, u64 now)
{
	if (flow->closing == LM_FLOW_CLOSED)
		return;
	flow->seen_ns = now;
	flow->closing |= ports->closing;
}

/* Does the packet answer a flow that policy allowed in the other direction? */
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

	/* A SYN starts over: the ports of a closed connection may be reused. */
	if (flow && !ports->syn && flow_alive(flow, key->protocol, now))
		touch_flow(flow, ports, now);
	else
		lm_flows.update(key, &fresh);
}

/*
 * The standalone policy: replies of allowed flows pass, then the peer's identity decides. Later fragments always pass:
 * without their first one they are never reassembled.
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
		lm_flows.delete(&key); /* no longer allowed: its replies end, too */
	counters->policy_deny++;
	return TC_ACT_SHOT;
}

#endif
