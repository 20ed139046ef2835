/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The ipcache map's layout, which is Cilium's: the source of truth for datapath/abi.py and the loader.
 *
 * Includes only <linux/types.h>, so that BCC, clang -target bpf and a host compiler can all read this file.
 * No bitfields (BCC drops the packing), only unsigned members, all padding spelled out.
 */
#ifndef LAZYMESH_IPCACHE_ABI_H
#define LAZYMESH_IPCACHE_ABI_H

#include <linux/types.h>

enum ipcache_family {
	IPCACHE_FAMILY_IPV4 = 1,
	IPCACHE_FAMILY_IPV6 = 2,
};

/* Bits of the flags byte. Others may appear in a live map: never set them, and ignore them. */
enum ipcache_flag {
	IPCACHE_FLAG_SKIP_TUNNEL = 1,
	IPCACHE_FLAG_HAS_TUNNEL_EP = 2,
	IPCACHE_FLAG_IPV6_TUNNEL_EP = 4,
	IPCACHE_FLAG_REMOTE_CLUSTER = 8,
};

/* Cilium >= 1.15. An IPv4 address is in addr[0], the rest is zero; host bits beyond the prefix are zero. */
struct ipcache_key {
	__u32 prefixlen;  /* 32 bits of cluster id, padding and family, plus the address' prefix length */
	__u16 cluster_id; /* 0 in every standard mesh */
	__u8 pad1;
	__u8 family;
	__be32 addr[4];
};

/* Cilium >= 1.18 (cilium_ipcache_v2), and our own map. */
struct ipcache_entry {
	__u32 sec_identity;
	__be32 tunnel_endpoint[4]; /* an IPv4 endpoint is in [0] */
	__u16 pad;
	__u8 encrypt_key;
	__u8 flags;
};

/* Cilium <= 1.17 (cilium_ipcache). */
struct ipcache_entry_v1 {
	__u32 sec_identity;
	__be32 tunnel_endpoint;
	__u16 pad;
	__u8 encrypt_key;
	__u8 flags;
};

_Static_assert(sizeof(struct ipcache_key) == 24, "ipcache_key is not Cilium's");
_Static_assert(sizeof(struct ipcache_entry) == 24, "ipcache_entry is not Cilium's v2");
_Static_assert(sizeof(struct ipcache_entry_v1) == 12, "ipcache_entry_v1 is not Cilium's v1");

#endif
