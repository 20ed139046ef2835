/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The maps (except lm_answers, see answers.h), each pinned under LM_PIN_DIR, which the loader defines; an existing pin
 * is reused, so entries, journal, flows and counters outlive an agent. BCC turns each line into a map, and rewrites
 * accesses in its main file only: the loader therefore passes it all our files as one.
 */
#ifndef LAZYMESH_MAPS_H
#define LAZYMESH_MAPS_H

#include "lazymesh_abi.h"

#ifndef BPF_F_MMAPABLE
#define BPF_F_MMAPABLE 1024
#endif

#define LM_PINNED(type, key, leaf, name, size, flags) \
	BPF_F_TABLE(type ":" LM_PIN_DIR "/" #name, key, leaf, name, size, flags)

/*
 * The ipcaches, by layout and flags; lm_config.view says which slot holds which. Set by the agent, which makes our own,
 * lm_ipcache, where there is no Cilium. The loader creates and pins these before it compiles, because their template
 * matters (make_outer_map), and gives them their lasting names when all is well.
 */
#define LM_VIEW(name) BPF_F_TABLE("array_of_maps:" LM_PIN_DIR "/" #name "_new", u32, u32, name, LM_VIEWS, 0)
LM_VIEW(lm_view_v1);
LM_VIEW(lm_view_v2);
LM_VIEW(lm_view_v2ro);

/* Written by the agent from node records and --mesh-cidr. Decides what may miss, and what policy applies to. */
LM_PINNED("lpm_trie", struct ipcache_key, struct lm_mesh_cidr, lm_mesh_cidrs, 131072, BPF_F_NO_PREALLOC);

/* Which entries of the ipcache the agent wrote. Read and written by the agent, and written for it by lm_install. */
LM_PINNED("hash", struct ipcache_key, struct lm_owned, lm_owned, LM_JOURNAL_SIZE, 0);

LM_PINNED("array", u32, struct lm_config, lm_config, 1, 0);
LM_PINNED("percpu_array", u32, struct lm_counters, lm_counters, 2, 0);

/* Value: until when (ktime) the address stays silent. Eviction costs one more signal, nothing else. */
LM_PINNED("lru_hash", struct lm_dedup_key, u64, lm_dedup, 65536, 0);

/*
 * The peers that this node talks to: written by the programs on hits, read by the agent when Cilium starts a new map.
 * Value: the epoch. The tags keep nearly every packet away from the hash table; what a collision loses comes back.
 */
LM_PINNED("lru_hash", struct lm_dedup_key, u64, lm_recent, 16384, 0);
LM_PINNED("array", u32, u64, lm_recent_tags, LM_RECENT_TAGS, 0);

/* Written by the programs, removed by the agent once the address has its entry. */
LM_PINNED("lru_hash", struct lm_dedup_key, struct lm_window, lm_windows, 16384, 0);

/* Value: the bucket's theoretical arrival time (GCRA). Key: ifindex, or 0 for the global bucket. */
LM_PINNED("lru_hash", u32, u64, lm_rate, 4096, 0);

/* Presence allows. Written by the agent as identities come and go. */
LM_PINNED("hash", struct lm_policy_key, u32, lm_policy, 262144, BPF_F_NO_PREALLOC);

/* Written and read by the programs. An evicted live flow is restored by its next packet in the allowed direction. */
LM_PINNED("lru_hash", struct lm_flow_key, struct lm_flow, lm_flows, 65536, 0);

/* Holding. Slots and control are mapped into the holder's memory. Everything is cleared when a holder starts. */
LM_PINNED("array", u32, struct lm_slot, lm_slots, LM_HOLD_SLOTS, BPF_F_MMAPABLE);
LM_PINNED("array", u32, struct lm_hold_control, lm_hold_control, 1, BPF_F_MMAPABLE);
LM_PINNED("array", u32, struct lm_outstanding, lm_hold_bucket, LM_HOLD_BUCKETS, 0);
LM_PINNED("hash", u32, struct lm_outstanding, lm_hold_if, 4096, BPF_F_NO_PREALLOC);
LM_PINNED("array", u32, struct lm_outstanding, lm_hold_total, 1, 0);
LM_PINNED("percpu_array", u32, struct lm_hold_counters, lm_hold_count, 1, 0);
BPF_QUEUESTACK("queue:" LM_PIN_DIR "/lm_hold_free", lm_hold_free, u32, LM_HOLD_SLOTS, 0);

/* The holder's; no program touches it. */
LM_PINNED("array", u32, struct lm_holder_stats, lm_holder_stats, 1, BPF_F_MMAPABLE);

/*
 * The signals, and the event that wakes their reader (ring). Their rings belong to one agent, so the loader pins new
 * maps each time.
 */
BPF_PERF_OUTPUT(lm_signals);
BPF_PERF_OUTPUT(lm_doorbell);

/* Whether the reader wants to be woken. What an earlier one wanted does no harm. */
LM_PINNED("array", u32, struct lm_reader, lm_reader, 1, BPF_F_MMAPABLE);

#endif
