/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The interface between the kernel half and the Python half of lazymesh: the signal, the settings, the counters, and
 * the elements of our maps. Same rules as ipcache_abi.h.
 */
#ifndef LAZYMESH_ABI_H
#define LAZYMESH_ABI_H

#include <linux/types.h>
#include "ipcache_abi.h"

#define SIGNAL_IPCACHE_MISS 3 /* as assigned by CFP-44921 */

enum lm_direction {
	LM_EGRESS = 0,  /* from a pod: the peer is the destination */
	LM_INGRESS = 1, /* from the network: the peer is the source */
};

enum lm_on_miss {
	LM_ON_MISS_PASS = 0,
	LM_ON_MISS_DROP = 1,
	LM_ON_MISS_HOLD = 2,
};

/* A perf record. Native endian except addr, which is in network order. */
struct ipcache_miss {
	__u32 signal;
	__u8 family; /* enum ipcache_family */
	__u8 direction;
	__u16 cluster_id; /* owner by the mesh CIDRs, 0 when unknown or ambiguous */
	__u32 ifindex;
	__be32 addr[4];
	__u32 pad;
	__u64 ktime_ns; /* CLOCK_MONOTONIC */
};

/*
 * The ipcaches in which a packet is looked up: all of them must know its peer. [0] is the one that Cilium's agent (or
 * ours) writes; while Cilium restarts, its programs keep reading an older one, each until it is replaced.
 */
#define LM_VIEWS 3

/* The layouts that the kernel distinguishes in a map of maps. */
enum lm_view {
	LM_VIEW_NONE = 0,
	LM_VIEW_V1 = 1,		 /* Cilium <= 1.17 */
	LM_VIEW_V2 = 2,		 /* 1.18, and our own map */
	LM_VIEW_V2_READONLY = 3, /* >= 1.19: programs may not write */
};

#define LM_RECENT_BITS 13

/* The settings that user space changes at run time; one element, written by the agent only. */
struct lm_config {
	__u64 rearm_ns; /* how long an address stays silent after a signal; up to a quarter is added at random */
	/* Token buckets as a spacing and a depth in time; interval 0 switches the bucket off. */
	__u64 interface_interval_ns; /* of a pod's interface */
	__u64 interface_burst_ns;
	__u64 uplink_interval_ns; /* of an uplink, behind which are all other nodes' pods */
	__u64 uplink_burst_ns;
	__u64 global_interval_ns;
	__u64 global_burst_ns;
	__u32 muted;
	__u32 on_miss;	/* enum lm_on_miss */
	__u32 enforced; /* bit LM_EGRESS, bit LM_INGRESS: default deny of mesh traffic in that direction */
	__u32 hold_cookie; /* upper 12 bits of the mark of packets that come back from the holder; 0: none do */
	__u32 park_verdict; /* the verdict for a packet whose clone is in the TAP */
	__u32 view[LM_VIEWS]; /* enum lm_view: how to read each element of the view maps */
	__u32 epoch;	      /* incremented every few seconds: lm_recent notes an address once in each */
	__u32 generation; /* changes when an entry is replaced or removed: voids answers.h; 0: nothing is remembered */
	__u64 policy_tag; /* the policy that lm_policy was filled for; used by user space only */
};

/*
 * Packets by what happened to them; one element per direction, one copy per CPU.
 * missed = signalled + suppressed_dedup + suppressed_rate + muted + lost, exactly.
 */
struct lm_counters {
	__u64 hit;
	__u64 not_mesh;
	__u64 not_parsed; /* no IP, VLAN, truncated or malformed: passed untouched (but see LM_HIDDEN) */
	__u64 missed;
	__u64 signalled;
	__u64 suppressed_dedup;
	__u64 suppressed_rate;
	__u64 muted;
	__u64 lost;	     /* no reader, or its ring was full */
	__u64 missed_drop;   /* dropped because on_miss says so */
	__u64 missed_again;  /* came back from the holder without an entry: passes as world */
	__u64 policy_allow;
	__u64 policy_reply;    /* passed because it answers an allowed flow */
	__u64 policy_fragment; /* later fragment of a packet whose first fragment was judged */
	__u64 policy_deny;
	__u64 windows_opened; /* not packets: elements added to lm_windows */
};

/* Between the programs and the reader of the signals, which maps it into its memory. */
struct lm_reader {
	__u64 barrier; /* added to by the programs, for the order of their reads and writes; the sum says nothing */
	__u32 wake;    /* set by the reader: the next signal must wake it; cleared by whoever does that, and by the reader */
	__u32 pad;
};

/* Value of lm_mesh_cidrs, whose key is an ipcache_key: the pod CIDRs of the mesh. */
struct lm_mesh_cidr {
	__u16 cluster_id;
	__u16 pad;
};

struct lm_dedup_key {
	__be32 addr[4];
	__u32 family;
};

/* What passed as world for an address without an entry; the key is an lm_dedup_key. */
struct lm_window {
	__u64 first_ns;
	__u64 last_ns;
	__u64 packets;
	__u64 bytes;
	__u32 direction;
	__u32 pad;
};

struct lm_policy_key {
	__u32 identity; /* 2 (world) is every peer without an identity of its own */
	__u32 direction;
};

/* A flow as its pod sees it; initiator is the direction of the packets that policy allowed. */
struct lm_flow_key {
	__be32 local[4];
	__be32 peer[4];
	__be16 local_port; /* ICMP echo: the identifier */
	__be16 peer_port;
	__u8 family;
	__u8 protocol;
	__u8 initiator;
	__u8 pad;
};

#define LM_FLOW_CLOSED 3 /* lm_flow.closing when both sides are done */

struct lm_flow {
	__u64 seen_ns; /* once closed: of the packet that closed it */
	__u32 closing; /* a FIN was seen: bit LM_EGRESS from the pod, bit LM_INGRESS from the peer; an RST sets both */
	__u32 pad;
};

/*
 * Value of lm_owned, the ownership journal, whose key is an ipcache_key. Written before the ipcache when an entry is
 * installed or replaced and after it when one is evicted; `previous` covers a crash between the two writes.
 */
struct lm_owned {
	struct ipcache_entry entry;
	struct ipcache_entry previous;
	__u16 cluster_id;
	__u16 pad1;
	__u32 pad2;
};

/* A line of the packet that lm_install is run over: what to install, and the result. */
struct lm_install {
	struct ipcache_key key;
	struct ipcache_entry entry;
	__u16 cluster_id;
	__u16 pad;
	__s32 error; /* written by the program: 0, or -errno of the first write that failed */
};

#define LM_INSTALL_HEAD 16 /* bytes before the first line: an Ethernet header, which a test run must have */
#define LM_INSTALL_MOST 56 /* so a test run's packet fits into a page, however many fragments an skb may have */

/* --- holding (hold.h) --- */

enum lm_slot_state {
	LM_SLOT_FREE = 0,
	LM_SLOT_PARKED = 1,    /* in the TAP, or with the holder */
	LM_SLOT_RETURNING = 2, /* given back, not yet seen at its interface */
	LM_SLOT_DISCARD = 3,   /* set by the holder: drop it when it comes by */
	LM_SLOT_CUT = 4,       /* the TAP would have received it in pieces */
};

/* Why a packet is held. */
enum hold {
	HOLD_NOT,
	HOLD_FIRST,  /* its miss was just signalled: the answer will come */
	HOLD_BEHIND, /* a miss while others of its address still wait */
	HOLD_GATED,  /* a hit: parked only to stay behind them */
};

#define LM_HOLD_COOKIE_SHIFT 20
#define LM_HOLD_SLOTS 16384
#define LM_HOLD_BUCKETS 65536

/* What a parked packet cannot carry itself. Memory-mapped by the holder. */
struct lm_slot {
	__u64 parked_ns;
	__u32 ifindex;
	__u32 mark;
	__u32 hash;
	__u32 length;
	__be32 addr[4];
	__u8 source_mac[6];
	__u8 family;
	__u8 pad;
	__u32 hold;  /* enum hold */
	__u32 state; /* enum lm_slot_state */
};

/* Settings and heartbeats of holding; each word has one writer. A tap_ifindex of 0 switches it off. */
struct lm_hold_control {
	__u64 agent_beat_ns;  /* the agent: ktime of its last heartbeat */
	__u64 holder_beat_ns; /* the holder: the same */
	__u64 interface_interval_ns; /* rate of newly held addresses of one interface, as in lm_config */
	__u64 interface_burst_ns;
	__u64 limit_ns; /* the longest time that a packet waits */
	__s64 address_packets; /* limits of what may be out at once */
	__s64 address_bytes;
	__s64 interface_packets;
	__s64 interface_bytes;
	__s64 total_bytes;
	__u32 tap_ifindex;
	__u32 udp_gso; /* the TAP accepts UDP GSO */
};

struct lm_outstanding {
	__s64 packets;
	__s64 bytes;
	__u64 moment; /* an interface's token bucket; an address': when a packet with a signal of its own was last parked */
};

/*
 * One copy per CPU. Whenever nothing moves, held + gated = returned + discarded + still out, plus what dead holders
 * took with them (lost in lm_holder_stats).
 */
struct lm_hold_counters {
	__u64 held;
	__u64 gated;
	__u64 returned;
	__u64 discarded;
	__u64 park_failed;
	__u64 stray;
	__u64 refused_off;
	__u64 refused_stale;
	__u64 refused_size;
	__u64 refused_vlan;
	__u64 refused_gso;
	__u64 refused_address;
	__u64 refused_interface;
	__u64 refused_bytes;
	__u64 refused_rate;
	__u64 refused_slots;
};

/* Written only by the holder, through a memory map: why packets were given back. */
struct lm_holder_stats {
	__u64 installed;
	__u64 negative;
	__u64 timeout;
	__u64 late;
	__u64 gated;
	__u64 shutdown;
	__u64 lost; /* in the hands of a holder that died */
	__u64 never_arrived; /* given back, but its interface did not take it: then discarded */
	__u64 write_errors;
	__u64 strays;
};

_Static_assert(sizeof(struct ipcache_miss) == 40, "ipcache_miss has a hole");
_Static_assert(sizeof(struct lm_config) == 104, "lm_config has a hole");
_Static_assert(sizeof(struct lm_counters) == 128, "lm_counters has a hole");
_Static_assert(sizeof(struct lm_reader) == 16, "lm_reader has a hole");
_Static_assert(sizeof(struct lm_mesh_cidr) == 4, "lm_mesh_cidr has a hole");
_Static_assert(sizeof(struct lm_dedup_key) == 20, "lm_dedup_key has a hole");
_Static_assert(sizeof(struct lm_window) == 40, "lm_window has a hole");
_Static_assert(sizeof(struct lm_policy_key) == 8, "lm_policy_key has a hole");
_Static_assert(sizeof(struct lm_flow_key) == 40, "lm_flow_key has a hole");
_Static_assert(sizeof(struct lm_flow) == 16, "lm_flow has a hole");
_Static_assert(sizeof(struct lm_owned) == 56, "lm_owned has a hole");
_Static_assert(sizeof(struct lm_install) == 56, "lm_install has a hole");
_Static_assert(sizeof(struct lm_slot) == 56, "lm_slot has a hole");
_Static_assert(sizeof(struct lm_hold_control) == 88, "lm_hold_control has a hole");
_Static_assert(sizeof(struct lm_outstanding) == 24, "lm_outstanding has a hole");
_Static_assert(sizeof(struct lm_hold_counters) == 128, "lm_hold_counters has a hole");
_Static_assert(sizeof(struct lm_holder_stats) == 80, "lm_holder_stats has a hole");

#endif
