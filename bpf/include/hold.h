/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Holding: a missed packet is parked in a TAP device until its address is answered, then returns to its interface.
 *
 *   pod -> lxcX ingress [park: clone_redirect] -> TAP egress [lm_hold_out] -> ring -> holder reads, waits, writes
 *   lxcX ingress [arrive] <- redirect(INGRESS) <- TAP ingress [lm_hold_back]
 *
 * A packet in the TAP carries its slot's number in place of its source MAC; the slot keeps everything else. A packet
 * that cannot be parked passes. Counters go up in park and down in arrive (or discard), never in user space.
 */
#ifndef LAZYMESH_HOLD_H
#define LAZYMESH_HOLD_H

#include "lazymesh_abi.h"
#include "maps.h"
#include "parse.h"

#define HOLD_TOKEN_0 0x02 /* locally administered */
#define HOLD_TOKEN_1 0x4c
#define HOLD_SIZE_MAX 65535 /* the TAP segments anything larger, and the segments would share one token */
/* A holder that hangs loses what does not fit into its TAP, so soon nothing more is parked. */
#define HOLD_HOLDER_STALE_NS 100000000ULL
/* An agent that hangs makes packets late at worst: if it answers again within their time limit, they are not lost. */
#define HOLD_AGENT_STALE_NS 500000000ULL
#define HOLD_GATE_NS 50000000ULL

/*
 * The mark of a packet on its way back: cookie and slot, around the bits that Cilium (0x0f00) and kube-proxy (0xc000) read,
 * because it may pass its interface while we are not on the hook.
 */
#define HOLD_MARK_FOREIGN 0xcf00

static __always_inline u32 hold_mark_of(u32 cookie, u32 id)
{
	return cookie << LM_HOLD_COOKIE_SHIFT | (id & 0x3c00) << 6 | (id & 0x300) << 4 | (id & 0xff);
}

static __always_inline u32 hold_slot_in(u32 mark)
{
	return (mark >> 6 & 0x3c00) | (mark >> 4 & 0x300) | (mark & 0xff);
}

/* The generation distinguishes a late frame from the next one in its slot. */
struct hold_token {
	__u8 magic[2];
	__be16 generation;
	__be16 slot;
} __attribute__((packed));

static __always_inline __be16 hold_generation_of(const struct lm_slot *slot)
{
	return bpf_htons(slot->parked_ns >> 10);
}

static __always_inline u32 hold_bucket_of(const __be32 *a)
{
	u32 h = a[0] * 0x9e3779b1 ^ a[1] * 0x85ebca6b ^ a[2] * 0xc2b2ae35 ^ a[3] * 0x27d4eb2f;

	return (h ^ h >> 16) & (LM_HOLD_BUCKETS - 1);
}

/* What is out in a bucket, of an interface, and in all: a packet moves all three. */
struct hold_account {
	struct lm_outstanding *bucket, *interface, *total;
};

static __always_inline int hold_account_of(u32 bucket, u32 ifindex, struct hold_account *account)
{
	struct lm_outstanding none = {};
	u32 zero = 0;

	account->bucket = lm_hold_bucket.lookup(&bucket);
	account->interface = lm_hold_if.lookup_or_try_init(&ifindex, &none);
	account->total = lm_hold_total.lookup(&zero);
	return account->bucket && account->interface && account->total ? 0 : -1;
}

static __always_inline void hold_count(struct hold_account *account, s64 packets, s64 bytes)
{
	__sync_fetch_and_add(&account->bucket->packets, packets);
	__sync_fetch_and_add(&account->bucket->bytes, bytes);
	__sync_fetch_and_add(&account->interface->packets, packets);
	__sync_fetch_and_add(&account->interface->bytes, bytes);
	__sync_fetch_and_add(&account->total->packets, packets);
	__sync_fetch_and_add(&account->total->bytes, bytes);
}

/*
 * Is anything of this address (or one that shares its bucket) on its way through the holder? Only for a while after the
 * last signalled one: otherwise a stream so fast that some of it is always on the way would take the detour forever.
 */
static __always_inline int hold_pending(const struct lm_packet *packet, u64 grace_ns)
{
	struct lm_hold_control *control;
	struct lm_outstanding *out;
	u32 key = 0;

	out = lm_hold_total.lookup(&key);
	if (!out || !out->packets)
		return 0;
	control = lm_hold_control.lookup(&key);
	key = hold_bucket_of(packet->peer.addr);
	out = lm_hold_bucket.lookup(&key);
	return control && out && out->packets > 0 &&
	       (s64)(bpf_ktime_get_ns() - out->moment) < (s64)(control->limit_ns + grace_ns);
}

/* Take a hold from the interface's rate (GCRA, as in take_token; the account is the bucket). */
static __always_inline int hold_take_rate(struct lm_outstanding *interface, const struct lm_hold_control *control, u64 now)
{
	u64 next = interface->moment > now ? interface->moment : now;

	if (!control->interface_interval_ns)
		return 1;
	if (next - now > control->interface_burst_ns)
		return 0;
	interface->moment = next + control->interface_interval_ns;
	return 1;
}

/* Why this packet may not be parked: the counter to move, or NULL if it may. */
static __always_inline __u64 *hold_refusal(struct __sk_buff *skb, const struct lm_hold_control *control,
					 struct hold_account *account, __u8 protocol, enum hold hold,
					 u64 now, struct lm_hold_counters *counters)
{
	if (!control->tap_ifindex)
		return &counters->refused_off;
	if (now - control->agent_beat_ns > HOLD_AGENT_STALE_NS && now > control->agent_beat_ns)
		return &counters->refused_stale;
	if (now - control->holder_beat_ns > HOLD_HOLDER_STALE_NS && now > control->holder_beat_ns)
		return &counters->refused_stale;
	if (skb->len > HOLD_SIZE_MAX)
		return &counters->refused_size;
	if (skb->vlan_present)
		return &counters->refused_vlan;
	/* The TAP segments what it cannot take whole, and only one of the pieces would find its way back. */
	if (skb->gso_size && protocol != IPPROTO_TCP && !(protocol == IPPROTO_UDP && control->udp_gso))
		return &counters->refused_gso;
	if (account->bucket->packets >= control->address_packets)
		return &counters->refused_address;
	if (account->interface->packets >= control->interface_packets)
		return &counters->refused_interface;
	if (account->bucket->bytes + skb->len > control->address_bytes ||
	    account->interface->bytes + skb->len > control->interface_bytes ||
	    account->total->bytes + skb->len > control->total_bytes)
		return &counters->refused_bytes;
	/* The rate is of addresses, not packets: an address that waits already has been charged. */
	if (hold == HOLD_FIRST && !hold_take_rate(account->interface, control, now))
		return &counters->refused_rate;
	return NULL;
}

/* Fill in the slot and put its number on the frame. */
static __always_inline int hold_label(struct __sk_buff *skb, const struct lm_packet *packet, enum hold hold, u64 now,
				      u32 id, struct lm_slot *slot)
{
	struct hold_token token = {.magic = {HOLD_TOKEN_0, HOLD_TOKEN_1},
				   .slot = bpf_htons(id)};

	if (bpf_skb_load_bytes(skb, ETH_ALEN, slot->source_mac, ETH_ALEN))
		return -1;
	slot->parked_ns = now;
	slot->ifindex = skb->ifindex;
	slot->mark = skb->mark;
	slot->hash = bpf_get_hash_recalc(skb);
	slot->length = skb->len;
	__builtin_memcpy(slot->addr, packet->peer.addr, sizeof(slot->addr));
	slot->family = packet->peer.family;
	slot->hold = hold;
	slot->state = LM_SLOT_PARKED;
	token.generation = hold_generation_of(slot);
	return bpf_skb_store_bytes(skb, ETH_ALEN, &token, sizeof(token), 0);
}

/*
 * Park the packet: 1 when a clone of it is in the TAP and this one must be dropped, 0 when it passes as it is.
 * clone_redirect reports whether the ring took it, so a dead holder costs nothing but the attempt. The time is that of
 * the signal, before which it cannot have been answered.
 */
static __always_inline int park(struct __sk_buff *skb, const struct lm_packet *packet, enum hold hold, u64 now)
{
	u32 zero = 0, bucket = hold_bucket_of(packet->peer.addr), ifindex = skb->ifindex, id, length = skb->len;
	struct lm_hold_counters *counters;
	struct hold_account account = {};
	struct lm_hold_control *control;
	struct lm_slot *slot;
	__u64 *refused;

	counters = lm_hold_count.lookup(&zero);
	control = lm_hold_control.lookup(&zero);
	if (!counters || !control)
		return 0; /* array elements always exist: for the verifier */
	if (hold_account_of(bucket, ifindex, &account)) {
		counters->park_failed++; /* more interfaces than lm_hold_if has room for */
		return 0;
	}
	refused = hold_refusal(skb, control, &account, packet->protocol, hold, now, counters);
	if (refused) {
		(*refused)++;
		return 0;
	}
	if (lm_hold_free.pop(&id)) {
		counters->refused_slots++;
		return 0;
	}
	slot = lm_slots.lookup(&id);
	if (!slot)
		return 0; /* user space fills the queue with valid numbers only */
	hold_count(&account, 1, length);
	if (hold == HOLD_FIRST)
		account.bucket->moment = now;
	if (!hold_label(skb, packet, hold, now, id, slot)) {
		if (!bpf_clone_redirect(skb, control->tap_ifindex, 0) && slot->state != LM_SLOT_CUT) {
			if (hold == HOLD_GATED)
				counters->gated++;
			else
				counters->held++;
			return 1;
		}
		bpf_skb_store_bytes(skb, ETH_ALEN, slot->source_mac, ETH_ALEN, 0);
	}
	counters->park_failed++;
	hold_count(&account, -1, -(s64)length);
	slot->state = LM_SLOT_FREE;
	lm_hold_free.push(&id, 0);
	return 0;
}

/* The packet of this slot is no longer out. */
static __always_inline void hold_settle(u32 id, struct lm_slot *slot)
{
	struct hold_account account = {};

	if (!hold_account_of(hold_bucket_of(slot->addr), slot->ifindex, &account))
		hold_count(&account, -1, -(s64)slot->length);
	slot->state = LM_SLOT_FREE;
	lm_hold_free.push(&id, 0);
}

/*
 * Is this a packet that comes back from the holder? Then it is counted out, and its own mark is restored. One that was
 * given up meanwhile, or returned unseen by us at its interface, loses our mark.
 */
static __always_inline int arrive(struct __sk_buff *skb)
{
	u32 id = hold_slot_in(skb->mark), zero = 0;
	struct lm_hold_counters *counters;
	struct lm_slot *slot;

	counters = lm_hold_count.lookup(&zero);
	slot = lm_slots.lookup(&id);
	if (!counters || !slot || skb->mark & HOLD_MARK_FOREIGN)
		return 0; /* another program's mark that looks like ours */
	if (slot->state != LM_SLOT_RETURNING || slot->ifindex != skb->ifindex) {
		skb->mark = 0;
		return 0;
	}
	skb->mark = slot->mark;
	counters->returned++;
	hold_settle(id, slot);
	return 1;
}

/* The slot of a frame in the TAP, by its token. */
static __always_inline struct lm_slot *hold_slot_of(struct __sk_buff *skb, u32 *id)
{
	struct hold_token token;
	struct lm_slot *slot;

	if (bpf_skb_load_bytes(skb, ETH_ALEN, &token, sizeof(token)) || token.magic[0] != HOLD_TOKEN_0 ||
	    token.magic[1] != HOLD_TOKEN_1)
		return NULL;
	*id = bpf_ntohs(token.slot);
	slot = lm_slots.lookup(id);
	return slot && token.generation == hold_generation_of(slot) ? slot : NULL;
}

/* TAP egress: only parked packets enter the ring, whatever else the stack sends to this interface. */
int lm_hold_out(struct __sk_buff *skb)
{
	struct lm_slot *slot;
	u32 id = 0;

	slot = hold_slot_of(skb, &id);
	return slot && slot->state == LM_SLOT_PARKED ? TC_ACT_OK : TC_ACT_SHOT;
}

/*
 * The TAP's socket filter, behind all segmentation: pieces share one token, and only one of them would find its way
 * back. They are dropped here, and the packet itself passes. (clone_redirect does not report lost pieces.)
 */
int lm_hold_whole(struct __sk_buff *skb)
{
	struct lm_slot *slot;
	u32 id = 0;

	slot = hold_slot_of(skb, &id);
	if (!slot)
		return 0;
	if (slot->length == skb->len)
		return skb->len;
	slot->state = LM_SLOT_CUT;
	return 0;
}

/* TAP ingress: what the holder writes returns to its interface, or is dropped if the holder says so. */
int lm_hold_back(struct __sk_buff *skb)
{
	struct lm_hold_counters *counters;
	struct lm_config *config;
	struct lm_slot *slot;
	u32 id = 0, zero = 0;

	config = lm_config.lookup(&zero);
	counters = lm_hold_count.lookup(&zero);
	if (!config || !counters)
		return TC_ACT_SHOT;
	slot = hold_slot_of(skb, &id);
	if (slot && slot->state == LM_SLOT_DISCARD) {
		counters->discarded++;
		hold_settle(id, slot);
		return TC_ACT_SHOT;
	}
	if (!slot || slot->state != LM_SLOT_PARKED) {
		counters->stray++;
		return TC_ACT_SHOT;
	}
	if (bpf_skb_store_bytes(skb, ETH_ALEN, slot->source_mac, ETH_ALEN, 0))
		return TC_ACT_SHOT;
	slot->state = LM_SLOT_RETURNING;
	bpf_set_hash(skb, slot->hash); /* otherwise its flow's first packet may take another path than the rest */
	skb->mark = hold_mark_of(config->hold_cookie, id);
	return bpf_redirect(slot->ifindex, BPF_F_INGRESS);
}

#endif
