/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Inodes that change.
 *
 * The kernel sets an inode's ctime wherever it changes one, and marks pages dirty where it does not.
 * Through overlay every write sets the overlay inode's ctime after the data, even when nothing of the
 * upper inode is left to mark: that closes the holes of "already dirty" and "same tick".
 */
#ifndef CRAB_FILES_H
#define CRAB_FILES_H

#include "maps.h"

/* What this CPU has just dealt with: compared by value, as memory of inodes is used again. */
struct recent {
	__u64 ino;
	__u32 dev;
	__u32 via; /* device of the overlay, or 0 */
	__u64 cgroup;
	__u64 generation;
	__u32 tgid;
	__u32 unused;
};

struct memory {
	__u64 busy;
	struct recent table[CRAB_RECENT];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct memory);
} memories SEC(".maps");

static __always_inline bool is_new(struct inode *inode)
{
	if (bpf_core_field_exists(((struct inode___enum *)0)->i_state))
		return ((struct inode___enum *)AS(struct inode, inode))->i_state & I_NEW;
	if (bpf_core_field_exists(((struct inode___word *)0)->i_state))
		return ((struct inode___word *)AS(struct inode, inode))->i_state & I_NEW;
	return ((struct inode___wrapped *)AS(struct inode, inode))->i_state.__state & I_NEW;
}

/* As stat() shows it; false while it has no number yet. */
static __always_inline bool identify(struct inode *inode, unsigned long magic, struct inode_key *key)
{
	key->ino = inode->i_ino;
	key->dev = inode->i_sb->s_dev;
	key->unused = 0;
	if (magic == MAGIC_XFS && bpf_core_type_exists(struct xfs_inode))
		key->ino = AROUND(struct xfs_inode, i_vnode, inode)->i_ino;
	/* Numbers are unique in a subvolume, and stat() shows the subvolume's own device. */
	if (magic == MAGIC_BTRFS && bpf_core_type_exists(struct btrfs_inode))
		key->dev = AROUND(struct btrfs_inode, vfs_inode, inode)->root->anon_dev;
	return key->ino != 0;
}

/* The inode in the writable layer behind one of an overlay; NULL: it is still a lower one. */
static __always_inline struct inode *upper_of(struct inode *inode)
{
	struct dentry *upper = AROUND(struct ovl_inode, vfs_inode, inode)->__upperdentry;

	return upper ? upper->d_inode : NULL;
}

static __always_inline void pseudo(unsigned long magic, __u32 tgid, __u64 levels)
{
	__u32 its = 0, epochs_bit, slot;

	switch (magic) {
	case MAGIC_PIPE:
		its = DID_PIPE;
		epochs_bit = EPOCH_PIPE;
		break;
	case MAGIC_MQUEUE:
		epochs_bit = EPOCH_QUEUE;
		break;
	default:
		return;
	}
	if (its && did(tgid, its))
		return;
	slot = slot_of_task(levels);
	if (slot != NOBODY)
		set_epoch_bits(slot, epochs_bit);
}

static __always_inline bool is_pseudo(unsigned long magic)
{
	switch (magic) {
	case MAGIC_PIPE:
	case MAGIC_MQUEUE:
	case MAGIC_SOCKET:
	case MAGIC_ANON_INODE:
	case MAGIC_AIO:
	case MAGIC_DEVPTS:
	case MAGIC_PROC:
	case MAGIC_SYSFS:
	case MAGIC_CGROUP:
	case MAGIC_CGROUP2:
	case MAGIC_BPF:
	case MAGIC_NSFS:
		return true;
	}
	return false;
}

/* Memory that looks like a file: memfd, SysV and anonymous shared memory. */
static __always_inline bool is_memory(struct super_block *sb, unsigned long magic)
{
	return (magic == MAGIC_TMPFS && sb->s_flags & SB_KERNMOUNT) || magic == MAGIC_HUGETLB ||
	       magic == MAGIC_SECRETMEM;
}

/* An inode changed that the CPU does not remember. */
static __always_inline void note(struct inode *inode, struct super_block *sb, struct inode_key *key,
				 __u32 via, __u32 tgid, __u32 bits, __u64 levels)
{
	__u32 slot = slot_of_task(levels);

	if (via) {
		__u32 owner = slot_of_overlay(via);

		bits |= SEEN_OVERLAY;
		if (owner != slot)
			bits |= SEEN_OUTSIDE;
		if (slot != NOBODY)
			did(tgid, DID_FILE);
		slot = owner;
	}
	if (slot == NOBODY)
		return;
	if (is_memory(sb, sb->s_magic)) {
		if (!did(tgid, DID_MEMORY))
			set_epoch_bits(slot, EPOCH_MEMORY);
	} else if (!via) {
		did(tgid, DID_FILE);
	}
	record(slot, key, bits);
}

static __always_inline int changed(struct inode *inode, __u32 bits)
{
	volatile struct control *control = controls();
	struct task_struct *task = bpf_get_current_task_btf();
	struct super_block *sb = inode->i_sb;
	unsigned long magic = sb->s_magic;
	__u64 generation, cgroup;
	struct inode_key key;
	struct memory *memory;
	struct recent *recent;
	__u32 zero = 0, via = 0, tgid;

	if (!control)
		return 0;
	if (magic == MAGIC_OVERLAY) {
		via = sb->s_dev;
		inode = upper_of(inode);
		if (!inode)
			return 0;
		sb = inode->i_sb;
		magic = sb->s_magic;
	}
	tgid = task->tgid;
	if (is_pseudo(magic)) {
		pseudo(magic, tgid, control->levels);
		return 0;
	}
	if (!identify(inode, magic, &key))
		return 0;
	/* Before the epoch is looked up: an entry made in an old epoch must carry an old number. */
	generation = control->generation;
	cgroup = task->cgroups->dfl_cgrp->kn->id;
	memory = bpf_map_lookup_elem(&memories, &zero);
	if (!memory)
		return 0;
	if (memory->busy) {
		note(inode, sb, &key, via, tgid, bits, control->levels);
		return 0;
	}
	memory->busy = 1;
	barrier();
	recent = &memory->table[(key.ino ^ via) & (CRAB_RECENT - 1)];
	if (recent->ino != key.ino || recent->dev != key.dev || recent->via != via ||
	    recent->cgroup != cgroup || recent->generation != generation || recent->tgid != tgid) {
		note(inode, sb, &key, via, tgid, bits, control->levels);
		recent->ino = key.ino;
		recent->dev = key.dev;
		recent->via = via;
		recent->cgroup = cgroup;
		recent->generation = generation;
		recent->tgid = tgid;
	}
	barrier();
	memory->busy = 0;
	return 0;
}

SEC("tp_btf/inode_set_ctime_to_ts")
int BPF_PROG(inode_set_ctime_to_ts, struct inode *inode)
{
	/* An inode that is being read in changes nothing. */
	if (is_new(inode))
		return 0;
	return changed(inode, SEEN_CTIME);
}

SEC("tp_btf/ctime_ns_xchg")
int BPF_PROG(ctime_ns_xchg, struct inode *inode)
{
	return changed(inode, SEEN_CTIME);
}

SEC("tp_btf/ctime_xchg_skip")
int BPF_PROG(ctime_xchg_skip, struct inode *inode)
{
	return changed(inode, SEEN_CTIME);
}

SEC("tp_btf/writeback_mark_inode_dirty")
int BPF_PROG(writeback_mark_inode_dirty, struct inode *inode, int flags)
{
	/* Anything less is a time of access. */
	if (!(flags & I_DIRTY_PAGES))
		return 0;
	return changed(inode, SEEN_PAGES);
}

#endif
