/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The maps that the programs use (except lm_answers, see answers.h). The agent makes and pins them, and says how large
 * they are (datapath/pins.py); an existing pin is reused, so entries, journal, flows and counters outlive an agent.
 * Here they have one element each, since BCC makes them once more to compile, and throws them away. It rewrites accesses
 * in its main file only: so it is passed all our files as one.
 */
#ifndef LAZYMESH_MAPS_H
#define LAZYMESH_MAPS_H

#include "lazymesh_abi.h"

#define LM_MAP(type, key, leaf, name) BPF_TABLE(type, key, leaf, name, 1)
#define LM_TRIE(leaf, name) BPF_F_TABLE("lpm_trie", struct ipcache_key, leaf, name, 1, BPF_F_NO_PREALLOC)

/*
 * The ipcaches, by layout and flags; lm_config.view says which slot holds which. Set by the agent, which makes our own,
 * lm_ipcache, where there is no Cilium.
 */
#define LM_VIEW(name) BPF_TABLE("array_of_maps$lm_some_ipcache", u32, u32, name, 1)
LM_TRIE(struct ipcache_entry, lm_some_ipcache);
LM_VIEW(lm_view_v1);
LM_VIEW(lm_view_v2);
LM_VIEW(lm_view_v2ro);

/* Written by the agent from node records and --mesh-cidr. Decides what may miss, and what policy applies to. */
LM_TRIE(struct lm_mesh_cidr, lm_mesh_cidrs);

/* Which entries of the ipcache the agent wrote. Read and written by the agent, and written for it by lm_install. */
LM_MAP("hash", struct ipcache_key, struct lm_owned, lm_owned);

LM_MAP("array", u32, struct lm_config, lm_config);
LM_MAP("percpu_array", u32, struct lm_counters, lm_counters);

/* Value: until when (ktime) the address stays silent. Eviction costs one more signal, nothing else. */
LM_MAP("lru_hash", struct lm_dedup_key, u64, lm_dedup);

/*
 * The peers that this node talks to: written by the programs on hits, read by the agent when Cilium starts a new map.
 * Value: the epoch. The tags keep nearly every packet away from the hash table; what a collision loses comes back.
 */
LM_MAP("lru_hash", struct lm_dedup_key, u64, lm_recent);
LM_MAP("array", u32, u64, lm_recent_tags);

/* Written by the programs, removed by the agent once the address has its entry. */
LM_MAP("lru_hash", struct lm_dedup_key, struct lm_window, lm_windows);

/* Value: the bucket's theoretical arrival time (GCRA). Key: ifindex, or 0 for the global bucket. */
LM_MAP("lru_hash", u32, u64, lm_rate);

/* Presence allows. Written by the agent as identities come and go. */
LM_MAP("hash", struct lm_policy_key, u32, lm_policy);

/* Written and read by the programs. An evicted live flow is restored by its next packet in the allowed direction. */
LM_MAP("lru_hash", struct lm_flow_key, struct lm_flow, lm_flows);

/* Holding. Slots and control are mapped into the holder's memory. Everything is cleared when a holder starts. */
LM_MAP("array", u32, struct lm_slot, lm_slots);
LM_MAP("array", u32, struct lm_hold_control, lm_hold_control);
LM_MAP("array", u32, struct lm_outstanding, lm_hold_bucket);
LM_MAP("hash", u32, struct lm_outstanding, lm_hold_if);
LM_MAP("array", u32, struct lm_outstanding, lm_hold_total);
LM_MAP("percpu_array", u32, struct lm_hold_counters, lm_hold_count);
BPF_QUEUE(lm_hold_free, u32, 1);

/* The signals, and the event that wakes their reader (ring). New with each load: their rings belong to one agent. */
BPF_PERF_OUTPUT(lm_signals);
BPF_PERF_OUTPUT(lm_doorbell);

/* Whether the reader wants to be woken. What an earlier one wanted does no harm. */
LM_MAP("array", u32, struct lm_reader, lm_reader);

#endif
