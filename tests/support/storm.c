/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Makes of one frame as many as there are runs, each to the next of COUNT addresses from BASE on, out of one device; and
 * counts, on the other side of that device, those that have arrived: the ring between the two may be full.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>

#define SEC(name) __attribute__((section(name), used))

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*bpf_redirect)(__u32 ifindex, __u64 flags) = (void *)BPF_FUNC_redirect;

struct {
	int (*type)[BPF_MAP_TYPE_ARRAY];
	int (*max_entries)[2]; /* sent, arrived */
	__u32 *key;
	__u64 *value;
} storm_count SEC(".maps");

SEC("xdp") int storm(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct iphdr *ip = data + sizeof(struct ethhdr);
	__u16 *word = (void *)ip;
	__u32 zero = 0, sum = 0;
	__u64 *sent = bpf_map_lookup_elem(&storm_count, &zero);
	int at;

	if (!sent || (void *)(ip + 1) > end)
		return XDP_DROP;
	ip->daddr = __builtin_bswap32((__u32)BASE + (__u32)(__sync_fetch_and_add(sent, 1) % COUNT));
	ip->check = 0;
#pragma unroll
	for (at = 0; at < 10; at++)
		sum += word[at];
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	ip->check = ~sum;
	return bpf_redirect(IFINDEX, 0);
}

SEC("xdp") int arrived(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct iphdr *ip = data + sizeof(struct ethhdr);
	__u32 one = 1;
	__u64 *count = bpf_map_lookup_elem(&storm_count, &one);

	if (count && (void *)(ip + 1) <= end && ip->version == 4 &&
	    __builtin_bswap32(ip->daddr) - (__u32)BASE < (__u32)COUNT)
		__sync_fetch_and_add(count, 1);
	return XDP_PASS;
}

char _license[] SEC("license") = "Dual BSD/GPL";
