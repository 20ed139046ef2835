/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Entries of our own ipcache, written by the kernel for the agent, which passes a batch as if it were a packet
 * (BPF_PROG_TEST_RUN) and reads the results from it. Two system calls for each address would take twice the time. This
 * program is never attached.
 */
#ifndef LAZYMESH_INSTALL_H
#define LAZYMESH_INSTALL_H

#include "lazymesh_abi.h"
#include "maps.h"

/* As for an entry that is written alone: first the line in the journal, and never over another writer's entry. */
static __always_inline int install(void *ipcache, struct lm_install *line)
{
	struct lm_owned owned = {
		.entry = line->entry,
		.previous = line->entry,
		.cluster_id = line->cluster_id,
	};
	int error = lm_owned.update(&line->key, &owned);

	return error ?: bpf_map_update_elem(ipcache, &line->key, &line->entry, BPF_NOEXIST);
}

int lm_install(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct lm_install *line;
	u32 slot = 0;
	void *ipcache = lm_view_v2.lookup(&slot);
	int i;

	if (!ipcache)
		return TC_ACT_SHOT;
#pragma clang loop unroll(disable)
	for (i = 0; i < LM_INSTALL_MOST; i++) {
		line = data + LM_INSTALL_HEAD + i * sizeof(*line);
		if ((void *)(line + 1) > end)
			break;
		line->error = install(ipcache, line);
	}
	return TC_ACT_OK;
}

#endif
