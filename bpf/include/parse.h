/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * From a frame to what the verdict needs. Pure: reads the packet, touches no map.
 * Every function returns 0 when it found what it looked for, -1 when the packet does not concern us (no IP, VLAN,
 * truncated, malformed): such packets pass. Only parse_addresses has a third answer, LM_HIDDEN.
 */
#ifndef LAZYMESH_PARSE_H
#define LAZYMESH_PARSE_H

#include <uapi/linux/bpf.h>
#include <uapi/linux/icmpv6.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in6.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include "lazymesh_abi.h"

/*
 * IANA's numbers, as in linux/in.h and linux/icmp.h, which are not included: by BCC's paths they lead to the kernel's
 * own linux/socket.h and linux/if.h, and to read those is a third of the compiler's time.
 */
#define IPPROTO_ICMP 1
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define ICMP_ECHOREPLY 0
#define ICMP_ECHO 8

#define IPCACHE_STATIC_BITS (8 * __builtin_offsetof(struct ipcache_key, addr) - 32)
#define IP_OFFSET 0x1fff
#define IPV6_HEADERS_MAX 6
#define VLAN_ID 0x0fff

/*
 * A priority tag (VLAN id 0) with more tags behind it. The kernel strips all tags of id 0 and delivers the packet as if
 * it had none, so this would be a way around a policy; there is no legitimate use of such frames.
 */
#define LM_HIDDEN -2

/* Bits of the TCP flags byte; uapi only has them as bitfields. */
#define LM_TCP_FIN 0x01
#define LM_TCP_SYN 0x02
#define LM_TCP_RST 0x04

struct lm_packet {
	struct ipcache_key peer; /* at full length: ready for a lookup */
	__be32 local[4];
	__u32 l4_offset;
	__u8 protocol;
	__u8 later_fragment; /* has addresses, but no ports */
	__u8 pad[2];
};

struct lm_ports {
	__be16 local;
	__be16 peer;
	__u8 opens;   /* may start a flow */
	__u8 answers; /* may belong to a flow that the other side started */
	__u8 syn;
	__u8 closing; /* what the packet adds to lm_flow.closing */
};

static __always_inline int parse_ipv4(struct __sk_buff *skb, int direction, struct lm_packet *packet)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct iphdr *ip = data + ETH_HLEN;
	__u32 length;

	if ((void *)(ip + 1) > end)
		return -1;
	length = bpf_ntohs(ip->tot_len);
	if (!length && skb->gso_size)
		length = skb->len - ETH_HLEN; /* BIG TCP: more than the field can hold */
	if (ip->version != 4 || ip->ihl < 5 || length < ip->ihl * 4 || skb->len - ETH_HLEN < length)
		return -1;
	packet->peer.prefixlen = IPCACHE_STATIC_BITS + 32;
	packet->peer.family = IPCACHE_FAMILY_IPV4;
	packet->peer.addr[0] = direction == LM_EGRESS ? ip->daddr : ip->saddr;
	packet->local[0] = direction == LM_EGRESS ? ip->saddr : ip->daddr;
	packet->protocol = ip->protocol;
	packet->later_fragment = (bpf_ntohs(ip->frag_off) & IP_OFFSET) != 0;
	packet->l4_offset = ETH_HLEN + ip->ihl * 4;
	return 0;
}

static __always_inline int parse_ipv6(struct __sk_buff *skb, int direction, struct lm_packet *packet)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ipv6hdr *ip = data + ETH_HLEN;

	if ((void *)(ip + 1) > end)
		return -1;
	/* A payload length of 0 is a jumbogram (BIG TCP): nothing to compare. */
	if (ip->version != 6 || skb->len - ETH_HLEN - sizeof(*ip) < bpf_ntohs(ip->payload_len))
		return -1;
	packet->peer.prefixlen = IPCACHE_STATIC_BITS + 128;
	packet->peer.family = IPCACHE_FAMILY_IPV6;
	__builtin_memcpy(packet->peer.addr, direction == LM_EGRESS ? &ip->daddr : &ip->saddr, 16);
	__builtin_memcpy(packet->local, direction == LM_EGRESS ? &ip->saddr : &ip->daddr, 16);
	packet->protocol = ip->nexthdr;
	packet->l4_offset = ETH_HLEN + sizeof(*ip);
	return 0;
}

/* The addresses: all that a hit or a miss needs. */
static __always_inline int parse_addresses(struct __sk_buff *skb, int direction, struct lm_packet *packet)
{
	__u32 needed;

	if (skb->vlan_present) {
		if (skb->vlan_tci & VLAN_ID)
			return -1;
		if (skb->protocol == bpf_htons(ETH_P_8021Q) || skb->protocol == bpf_htons(ETH_P_8021AD))
			return LM_HIDDEN;
	}
	if (skb->protocol == bpf_htons(ETH_P_IP))
		needed = ETH_HLEN + sizeof(struct iphdr);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		needed = ETH_HLEN + sizeof(struct ipv6hdr);
	else
		return -1;
	/* Headers may be in page fragments: rare, and only then worth a copy. */
	if ((void *)(long)skb->data + needed > (void *)(long)skb->data_end && bpf_skb_pull_data(skb, needed))
		return -1;
	return skb->protocol == bpf_htons(ETH_P_IP) ? parse_ipv4(skb, direction, packet)
						    : parse_ipv6(skb, direction, packet);
}

/* Walk IPv6 extension headers up to the transport; sets protocol, l4_offset and later_fragment. */
static __always_inline int parse_extensions(struct __sk_buff *skb, struct lm_packet *packet)
{
	struct {
		__u8 next;
		__u8 length;
		__be16 offset;
	} header;
	int i;

#pragma unroll
	for (i = 0; i < IPV6_HEADERS_MAX; i++) {
		__u32 size;

		if (packet->protocol != IPPROTO_HOPOPTS && packet->protocol != IPPROTO_ROUTING &&
		    packet->protocol != IPPROTO_DSTOPTS && packet->protocol != IPPROTO_FRAGMENT)
			return 0;
		if (bpf_skb_load_bytes(skb, packet->l4_offset, &header, sizeof(header)))
			return -1;
		size = (header.length + 1) * 8;
		if (packet->protocol == IPPROTO_FRAGMENT) {
			size = 8;
			if (header.offset & bpf_htons(0xfff8))
				packet->later_fragment = 1;
		}
		packet->protocol = header.next;
		packet->l4_offset += size;
		if (packet->later_fragment)
			return 0;
	}
	return -1;
}

/*
 * The ports of TCP and UDP, the identifier of an ICMP echo. -1: a protocol without ports, or one that we do not track;
 * policy then depends on the peer's identity alone.
 */
static __always_inline int parse_ports(struct __sk_buff *skb, int direction, struct lm_packet *packet,
				       struct lm_ports *ports)
{
	__be16 pair[2];
	__u8 flags;

	if (packet->later_fragment)
		return -1;
	if (packet->protocol == IPPROTO_ICMP || packet->protocol == IPPROTO_ICMPV6) {
		struct {
			__u8 type, code;
			__u16 checksum;
			__be16 id;
		} echo;

		if (bpf_skb_load_bytes(skb, packet->l4_offset, &echo, sizeof(echo)))
			return -1;
		ports->opens = packet->protocol == IPPROTO_ICMP ? echo.type == ICMP_ECHO
								 : echo.type == ICMPV6_ECHO_REQUEST;
		ports->answers = !ports->opens;
		if (ports->answers &&
		    echo.type != (packet->protocol == IPPROTO_ICMP ? ICMP_ECHOREPLY : ICMPV6_ECHO_REPLY))
			return -1;
		ports->local = echo.id;
		ports->peer = 0;
		return 0;
	}
	if (packet->protocol != IPPROTO_TCP && packet->protocol != IPPROTO_UDP)
		return -1;
	if (bpf_skb_load_bytes(skb, packet->l4_offset, pair, sizeof(pair)))
		return -1;
	ports->local = direction == LM_EGRESS ? pair[0] : pair[1];
	ports->peer = direction == LM_EGRESS ? pair[1] : pair[0];
	ports->opens = 1;
	ports->answers = 1;
	if (packet->protocol == IPPROTO_TCP) {
		if (bpf_skb_load_bytes(skb, packet->l4_offset + 13, &flags, sizeof(flags)))
			return -1;
		ports->syn = (flags & LM_TCP_SYN) != 0;
		ports->closing = flags & LM_TCP_RST ? LM_FLOW_CLOSED : flags & LM_TCP_FIN ? 1 << direction : 0;
	}
	return 0;
}

#endif
