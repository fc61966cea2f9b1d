// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Keeps what the kernel would send from one of a network namespace's sockets to another from arriving: see
 * src/packet_lock.rs.
 */
#include "kernel.h"

/* criu/include/net.h: the packets by which CRIU restores connections that one side has closed. */
#define SOCCR_MARK 0xc114
/* include/linux/if.h: in each namespace lo is the first interface. */
#define LOOPBACK_IFINDEX 1

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct net_device {
	int ifindex;
};

struct nf_hook_state {
	struct net_device *out;
};

struct sk_buff {
	__u32 mark;
};

struct bpf_nf_ctx {
	const struct nf_hook_state *state;
	struct sk_buff *skb;
};

#pragma clang attribute pop

enum { DROP, ACCEPT };

SEC("netfilter")
int packet_lock(struct bpf_nf_ctx *ctx)
{
	if (ctx->state->out->ifindex != LOOPBACK_IFINDEX || ctx->skb->mark == SOCCR_MARK)
		return ACCEPT;
	return DROP;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
