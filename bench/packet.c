/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The references for a packet through lazymesh's program: an empty program, and the one lookup that is unavoidable. */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <stddef.h>

#define SEC(name) __attribute__((section(name), used))

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;

struct key {
	__u32 length;
	__u16 cluster_id;
	__u8 pad;
	__u8 family;
	__u32 address[4];
};

struct value {
	__u8 bytes[24];
};

struct {
	int (*type)[BPF_MAP_TYPE_LPM_TRIE];
	int (*max_entries)[1];
	int (*map_flags)[BPF_F_NO_PREALLOC];
	struct key *key;
	struct value *value;
} bench_ipcache SEC(".maps");

SEC("tc") int empty(struct __sk_buff *skb)
{
	(void)skb;
	return -1;
}

SEC("tc") int lookup(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct iphdr *ip = data + sizeof(struct ethhdr);
	struct key key = {.length = 32 + 32, .family = 1};

	if ((void *)(ip + 1) > end)
		return 2;
	key.address[0] = ip->daddr;
	return bpf_map_lookup_elem(&bench_ipcache, &key) ? -1 : 2;
}

char _license[] SEC("license") = "Dual BSD/GPL";
