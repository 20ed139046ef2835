/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Somebody else's program on a hook: counts packets and hands them on. */
#include <linux/bpf.h>

#define SEC(name) __attribute__((section(name), used))

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;

/* Packets, in its one element. */
struct {
	int (*type)[BPF_MAP_TYPE_ARRAY];
	int (*max_entries)[1];
	__u32 *key;
	__u64 *value;
} bystander_seen SEC(".maps");

SEC("tc") int bystander(struct __sk_buff *skb)
{
	__u32 slot = 0;
	__u64 *packets = bpf_map_lookup_elem(&bystander_seen, &slot);

	(void)skb;
	if (packets)
		__sync_fetch_and_add(packets, 1);
	return -1; /* TCX_NEXT, TC_ACT_UNSPEC: the next one decides */
}

char _license[] SEC("license") = "Dual BSD/GPL";
