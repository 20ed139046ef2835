/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the stand-in for cilium-agent loads: program names, tail calls and ipcache lookups where a real agent has them,
 * and of its datapath only what decides whether a packet lives. Layouts are spelled out from cilium-formats.md, not
 * taken from lazymesh's headers: the program must agree with Cilium, not with itself.
 *
 * Compiled with IPCACHE_LAYOUT=1 (Cilium <= 1.17) or 2. All maps are made by cilium_programs.py.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>

#define SEC(name) __attribute__((section(name), used))
#define __uint(name, value) int(*name)[value]
#define __type(name, value) typeof(value) *name
#define htons(x) __builtin_bswap16(x)

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value,
				   __u64 flags) = (void *)BPF_FUNC_map_update_elem;
static long (*bpf_tail_call)(void *ctx, void *calls, __u32 slot) = (void *)BPF_FUNC_tail_call;
static long (*bpf_skb_load_bytes)(const void *skb, __u32 offset, void *to,
				  __u32 len) = (void *)BPF_FUNC_skb_load_bytes;

enum direction { EGRESS, INGRESS };
enum outcome { FORWARDED, REPLY, DENIED, MISSED_TAIL_CALL };
enum call { CALL_IPV4_CONT, CALL_IPV6_CONT, CALL_POLICY };
enum { WORLD = 2, WORLD_IPV4 = 9, WORLD_IPV6 = 10, FIRST_ALLOCATED = 256 };
enum { FAMILY_IPV4 = 1, FAMILY_IPV6 = 2, FLAG_HAS_TUNNEL_EP = 2 };

/* One object is loaded for each device, with constants of its own. */
struct config {
	__u32 endpoint;
	__u32 dual_stack;
};

const volatile struct config config SEC(".rodata.config");

struct ipcache_key {
	__u32 prefixlen;
	__u16 cluster_id;
	__u8 pad1;
	__u8 family;
	__u8 addr[16];
};

struct remote_endpoint_info {
	__u32 sec_identity;
#if IPCACHE_LAYOUT == 1
	__u32 tunnel_endpoint[1];
#else
	__u32 tunnel_endpoint[4];
#endif
	__u16 pad;
	__u8 key;
	__u8 flags;
};

/* A packet, and a flow from the one who began it. */
struct flow {
	__u8 src[16];
	__u8 dst[16];
	__be16 sport;
	__be16 dport;
	__u8 proto;
	__u8 family;
	__u16 pad;
};

struct lxc_key {
	__u8 addr[16];
	__u32 family;
};

struct policy_key {
	__u32 identity; /* 0: any */
	__u32 direction;
};

struct verdict_key {
	__u32 endpoint;
	__u32 identity;
	__u8 direction;
	__u8 outcome;
	__u8 tunnel;
	__u8 pad;
};

/* Sizes here are those that the maps have which take these places. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 512000);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct ipcache_key);
	__type(value, struct remote_endpoint_info);
} cilium_ipcache SEC(".maps");

/* Tail calls of this endpoint. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 48);
	__type(key, __u32);
	__type(value, __u32);
} cilium_calls SEC(".maps");

/* Every endpoint's ingress policy program, by endpoint id. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 65535);
	__type(key, __u32);
	__type(value, __u32);
} cilium_call_policy SEC(".maps");

/* Local addresses to endpoint ids. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65535);
	__type(key, struct lxc_key);
	__type(value, __u32);
} cilium_lxc SEC(".maps");

/* Whom this endpoint may talk to. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, struct policy_key);
	__type(value, __u32);
} cilium_policy SEC(".maps");

/* Flows that the policy has let begin, so that their answers pass; kept over restarts. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct flow);
	__type(value, __u32);
} standin_ct SEC(".maps");

/* Packets by what became of them; only here for tests to read. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, struct verdict_key);
	__type(value, __u64);
} standin_verdict SEC(".maps");

static __always_inline void count(struct verdict_key key)
{
	__u64 *packets = bpf_map_lookup_elem(&standin_verdict, &key), none = 0;

	if (!packets) {
		bpf_map_update_elem(&standin_verdict, &key, &none, BPF_NOEXIST);
		packets = bpf_map_lookup_elem(&standin_verdict, &key);
	}
	if (packets)
		__sync_fetch_and_add(packets, 1);
}

static __always_inline int read_ports(struct __sk_buff *skb, __u32 offset, struct flow *flow)
{
	if (flow->proto != IPPROTO_TCP && flow->proto != IPPROTO_UDP)
		return 0;
	return bpf_skb_load_bytes(skb, offset, &flow->sport, 4);
}

/* Fill in the flow; 0 for what the policy has no say in here: other protocols, what keeps IPv6 alive, garbage. */
static __always_inline int read_packet(struct __sk_buff *skb, struct flow *flow)
{
	struct iphdr ip4;
	struct ipv6hdr ip6;
	__u8 type;

	__builtin_memset(flow, 0, sizeof(*flow));
	if (skb->protocol == htons(ETH_P_IP)) {
		if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip4, sizeof(ip4)))
			return 0;
		flow->family = FAMILY_IPV4;
		flow->proto = ip4.protocol;
		__builtin_memcpy(flow->src, &ip4.saddr, 4);
		__builtin_memcpy(flow->dst, &ip4.daddr, 4);
		if (ip4.frag_off & htons(0x1fff))
			return 1; /* no ports in here */
		return !read_ports(skb, ETH_HLEN + ip4.ihl * 4, flow);
	}
	if (skb->protocol == htons(ETH_P_IPV6)) {
		if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip6, sizeof(ip6)))
			return 0;
		flow->family = FAMILY_IPV6;
		flow->proto = ip6.nexthdr;
		__builtin_memcpy(flow->src, &ip6.saddr, 16);
		__builtin_memcpy(flow->dst, &ip6.daddr, 16);
		if (flow->dst[0] == 0xff)
			return 0; /* multicast: a pod's kernel reports its groups whenever it likes */
		if (flow->proto == IPPROTO_ICMPV6 && !bpf_skb_load_bytes(skb, ETH_HLEN + sizeof(ip6), &type, 1) &&
		    type >= 133 && type <= 137)
			return 0;
		return !read_ports(skb, ETH_HLEN + sizeof(ip6), flow);
	}
	return 0;
}

static __always_inline int answers(const struct flow *flow)
{
	struct flow begun = { .proto = flow->proto, .family = flow->family };

	__builtin_memcpy(begun.src, flow->dst, 16);
	__builtin_memcpy(begun.dst, flow->src, 16);
	begun.sport = flow->dport;
	begun.dport = flow->sport;
	return !!bpf_map_lookup_elem(&standin_ct, &begun);
}

static __always_inline struct remote_endpoint_info *lookup(const __u8 *addr, __u8 family)
{
	struct ipcache_key key = { .prefixlen = family == FAMILY_IPV4 ? 64 : 160, .family = family };

	__builtin_memcpy(key.addr, addr, 16);
	return bpf_map_lookup_elem(&cilium_ipcache, &key);
}

static __always_inline __u32 identity_of(const struct remote_endpoint_info *info, __u8 family)
{
#if IPCACHE_LAYOUT == 1
	if (info && info->sec_identity)
		return info->sec_identity;
#else
	if (info)
		return info->sec_identity; /* whatever it is: 0 does not fall back to world */
#endif
	if (!config.dual_stack)
		return WORLD;
	return family == FAMILY_IPV4 ? WORLD_IPV4 : WORLD_IPV6;
}

static __always_inline int tunnels(const struct remote_endpoint_info *info)
{
#if IPCACHE_LAYOUT == 1
	return info && info->tunnel_endpoint[0];
#else
	return info && info->flags & FLAG_HAS_TUNNEL_EP;
#endif
}

static __always_inline int allows(__u32 identity, __u32 direction)
{
	struct policy_key exact = { identity, direction }, any = { 0, direction };

	return bpf_map_lookup_elem(&cilium_policy, &exact) || bpf_map_lookup_elem(&cilium_policy, &any);
}

/* The policy's word on one packet that is no answer: also on those of a flow that it let begin. */
static __always_inline int judge(const struct flow *flow, __u32 identity, __u8 direction, __u8 tunnel)
{
	struct verdict_key key = { config.endpoint, identity, direction, DENIED, tunnel, 0 };
	__u32 began = 1;

	if (!allows(identity, direction)) {
		count(key);
		return TC_ACT_SHOT;
	}
	bpf_map_update_elem(&standin_ct, flow, &began, BPF_ANY);
	key.outcome = FORWARDED;
	count(key);
	return TC_ACT_OK;
}

static __always_inline int leave_container(struct __sk_buff *skb)
{
	struct remote_endpoint_info *info;
	struct flow flow;

	if (!read_packet(skb, &flow))
		return TC_ACT_OK;
	if (answers(&flow)) {
		count((struct verdict_key){ config.endpoint, 0, EGRESS, REPLY, 0, 0 });
		return TC_ACT_OK;
	}
	info = lookup(flow.dst, flow.family);
	return judge(&flow, identity_of(info, flow.family), EGRESS, tunnels(info));
}

SEC("tc") int tail_handle_ipv4_cont(struct __sk_buff *skb)
{
	return leave_container(skb);
}

SEC("tc") int tail_handle_ipv6_cont(struct __sk_buff *skb)
{
	return leave_container(skb);
}

/* At the ingress of a pod's host-side device. Does not know the ipcache itself. */
SEC("tc") int cil_from_container(struct __sk_buff *skb)
{
	if (skb->protocol == htons(ETH_P_IP))
		bpf_tail_call(skb, &cilium_calls, CALL_IPV4_CONT);
	else if (skb->protocol == htons(ETH_P_IPV6))
		bpf_tail_call(skb, &cilium_calls, CALL_IPV6_CONT);
	else
		return TC_ACT_OK;
	count((struct verdict_key){ config.endpoint, 0, EGRESS, MISSED_TAIL_CALL, 0, 0 });
	return TC_ACT_SHOT;
}

/* An endpoint's word on what comes in; the caller's view of the source is in cb, and checked again if it is reserved. */
SEC("tc") int tail_ipv4_policy(struct __sk_buff *skb)
{
	struct remote_endpoint_info *info;
	__u32 identity = skb->cb[0];
	struct flow flow;

	if (!read_packet(skb, &flow))
		return TC_ACT_OK;
	if (identity < FIRST_ALLOCATED) {
		info = lookup(flow.src, flow.family);
		if (info)
			identity = identity_of(info, flow.family);
	}
	return judge(&flow, identity, INGRESS, 0);
}

/* At the ingress of the uplink. */
SEC("tc") int cil_from_netdev(struct __sk_buff *skb)
{
	struct verdict_key key = { .direction = INGRESS, .outcome = REPLY };
	struct lxc_key local = {};
	struct flow flow;
	__u32 *endpoint;

	if (!read_packet(skb, &flow))
		return TC_ACT_OK;
	__builtin_memcpy(local.addr, flow.dst, 16);
	local.family = flow.family;
	endpoint = bpf_map_lookup_elem(&cilium_lxc, &local);
	if (!endpoint)
		return TC_ACT_OK;
	key.endpoint = *endpoint;
	skb->cb[0] = identity_of(lookup(flow.src, flow.family), flow.family);
	if (answers(&flow)) {
		count(key);
		return TC_ACT_OK;
	}
	bpf_tail_call(skb, &cilium_call_policy, key.endpoint);
	key.outcome = MISSED_TAIL_CALL;
	count(key);
	return TC_ACT_SHOT;
}

char _license[] SEC("license") = "Dual BSD/GPL";
