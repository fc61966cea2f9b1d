/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Changes of inodes by the tracepoints of time stamps (kernel 6.13 and newer).
 *
 * The kernel sets an inode's ctime wherever it changes one. Through overlay every write sets the overlay
 * inode's ctime after the data, even when nothing of the upper inode is left to mark: that closes the holes
 * of "already dirty" and "same tick".
 */
#ifndef CRAB_TIMESTAMPS_H
#define CRAB_TIMESTAMPS_H

#include "files.h"

SEC("tp_btf/inode_set_ctime_to_ts")
int BPF_PROG(inode_set_ctime_to_ts, struct inode *given)
{
	struct inode *inode = AS(struct inode, given);

	/* An inode that is being read in changes nothing. XFS then gives it its number later. */
	if (inode->i_sb->s_magic == MAGIC_XFS && !inode->i_ino)
		return 0;
	return changed(inode, SEEN_CTIME, true);
}

SEC("tp_btf/ctime_ns_xchg")
int BPF_PROG(ctime_ns_xchg, struct inode *inode)
{
	return changed(inode, SEEN_CTIME, false);
}

SEC("tp_btf/ctime_xchg_skip")
int BPF_PROG(ctime_xchg_skip, struct inode *inode)
{
	return changed(inode, SEEN_CTIME, false);
}

#endif
