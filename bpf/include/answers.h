/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What a CPU remembers of the ipcache for a moment.
 *
 * A walk through an LPM trie costs several times as much as everything else that is done for a hit, and the packets of
 * one moment go to few peers. So a hit is remembered: until the clock's next tick (1 to 10 ms, by the kernel's HZ), in
 * which time Cilium may have removed the entry, and until the agent itself replaces or removes any entry, which voids
 * all answers. A miss is never remembered: an entry counts as soon as it is written.
 */
#ifndef LAZYMESH_ANSWERS_H
#define LAZYMESH_ANSWERS_H

#include "lazymesh_abi.h"
#include "parse.h"

#define ANSWER_BITS 10

/* The seal ties address, identity and moment together, so that a half-written answer is invalid. */
struct answer {
	u64 seal;
	__be32 addr[4];
	u32 family;
	u32 identity;
};

/* Not pinned: a new load of the programs must not take over what an earlier one remembered. */
BPF_PERCPU_ARRAY(lm_answers, struct answer, 1 << ANSWER_BITS);

static __always_inline u64 hash_of(const __be32 *a)
{
	return ((u64)(a[0] ^ a[2]) << 32 | (a[1] ^ a[3])) * 0x9e3779b97f4a7c15;
}

static __always_inline u64 moment_of(const struct lm_config *config)
{
	return config->generation ? bpf_jiffies64() << 32 | config->generation : 0;
}

static __always_inline u64 seal_of(u64 hash, u32 identity, u64 moment)
{
	return hash ^ (u64)identity << 16 ^ moment;
}

/* Where the answer about an address would be; NULL when nothing may be remembered. */
static __always_inline struct answer *answer_at(u64 hash, const struct lm_config *config)
{
	u32 index = hash >> (64 - ANSWER_BITS);

	return config->generation ? lm_answers.lookup(&index) : NULL;
}

static __always_inline int is_answer(const struct answer *answer, const struct lm_packet *packet, u64 hash,
				     u64 moment)
{
	const __be32 *a = packet->peer.addr, *b = answer->addr;

	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3] && packet->peer.family == answer->family &&
	       answer->seal == seal_of(hash, answer->identity, moment);
}

static __always_inline void remember(struct answer *answer, const struct lm_packet *packet, u64 hash, u32 identity,
				     u64 moment)
{
	__builtin_memcpy(answer->addr, packet->peer.addr, sizeof(answer->addr));
	answer->family = packet->peer.family;
	answer->identity = identity;
	answer->seal = seal_of(hash, identity, moment);
}

#endif
