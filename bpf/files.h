/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Inodes that change: how one is named, whose it is, and where it is noted. What tells of the changes is in
 * timestamps.h, or for older kernels in functions.h. Here is what is common to both: the kernel marks
 * pages dirty where it sets no time.
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
	__u32 bits; /* SEEN_*: what of it was noted */
	__u64 epoch; /* the number of the one in which it was */
	__u32 owner; /* slot + 1 of whose epoch; 0: in none */
	__u32 strange;
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

/* Whether what was noted in an epoch stands in the one that its slot is in now. */
static __always_inline bool is_current(const struct recent *old)
{
	return !old->owner || old->epoch == epoch_number(old->owner - 1);
}

/*
 * Whether this CPU dealt with the same already. One program may interrupt another on a CPU: the second
 * keeps its hands off.
 */
static __always_inline bool known(struct memory *memory, const struct recent *now)
{
	struct recent *old = &memory->table[(now->ino ^ now->via) & (CRAB_RECENT - 1)];
	bool same;

	if (memory->busy)
		return false;
	memory->busy = 1;
	barrier();
	same = old->ino == now->ino && old->dev == now->dev && old->via == now->via &&
	       old->cgroup == now->cgroup && old->generation == now->generation &&
	       old->tgid == now->tgid && !(now->bits & ~old->bits) && is_current(old);
	barrier();
	memory->busy = 0;
	return same;
}

/* To be called once it is noted. */
static __always_inline void remember(struct memory *memory, const struct recent *now)
{
	struct recent *old = &memory->table[(now->ino ^ now->via) & (CRAB_RECENT - 1)];

	if (memory->busy)
		return;
	memory->busy = 1;
	barrier();
	*old = *now;
	barrier();
	memory->busy = 0;
}

static __always_inline bool is_new(struct inode *inode)
{
	if (bpf_core_field_exists(((struct inode___enum *)0)->i_state))
		return ((struct inode___enum *)AS(struct inode, inode))->i_state & STATE(I_NEW);
	if (bpf_core_field_exists(((struct inode___word *)0)->i_state))
		return ((struct inode___word *)AS(struct inode, inode))->i_state & STATE(I_NEW);
	return ((struct inode___wrapped *)AS(struct inode, inode))->i_state.__state & STATE(I_NEW);
}

/* As stat() shows it; false while it has no number yet. */
static __always_inline bool identify(struct inode *inode, unsigned long magic, struct inode_key *key)
{
	key->ino = inode->i_ino;
	key->dev = inode->i_sb->s_dev;
	key->strange = 0;
	if (magic == MAGIC_XFS && bpf_core_type_exists(struct xfs_inode))
		key->ino = LONG_AT(BESIDE(struct xfs_inode, i_vnode, i_ino, inode));
	/* Numbers are unique in a subvolume, and stat() shows the subvolume's own device. */
	if (magic == MAGIC_BTRFS && bpf_core_type_exists(struct btrfs_inode))
		key->dev = INT_AT(LONG_AT(BESIDE(struct btrfs_inode, vfs_inode, root, inode)) +
				  bpf_core_field_offset(struct btrfs_root, anon_dev));
	else if (magic == MAGIC_BTRFS)
		key->strange = 1;
	/* btrfs keeps its trees in inodes of no subvolume. */
	return key->ino != 0 && key->dev != 0;
}

/* The inode in the writable layer behind one of an overlay; NULL: it is still a lower one. */
static __always_inline struct inode *upper_of(struct inode *inode)
{
	unsigned long upper = LONG_AT(BESIDE(struct ovl_inode, vfs_inode, __upperdentry, inode));

	return upper ? AS(struct dentry, upper)->d_inode : NULL;
}

/* S_IFMT and S_IFDIR. */
#define MODE_TYPE 0170000
#define MODE_DIRECTORY 0040000

/* The mode of /proc/PID/mem. */
#define PROC_MEM_MODE 0100600
/* The way here from whoever makes an inode has ten frames; the first ones are those of the helper. */
#define FRAMES 20

/*
 * Whether an inode of /proc with that mode is just being made, and is none of a process. The kernel gives
 * such an inode its times before its mode, and until then it shows that of the inode which was at the same
 * place of memory before. What it was made by is all that tells.
 */
__noinline int is_made_by_others(void)
{
	__u64 frames[FRAMES];
	struct makers *their;
	__u32 zero = 0;
	long bytes;

	their = bpf_map_lookup_elem(&makers, &zero);
	bytes = bpf_get_task_stack(bpf_get_current_task_btf(), frames, sizeof(frames), 0);
	if (!their)
		return 0;
	for (int i = 0; i < FRAMES && (i + 1) * 8 <= bytes; i++) {
		for (int j = 0; j < MAKERS; j++) {
			if (frames[i] > their->all[j].start && frames[i] < their->all[j].end)
				return 1;
		}
	}
	return 0;
}

static __always_inline void pseudo(struct inode *inode, unsigned long magic, __u32 tgid,
				   __u64 levels)
{
	__u32 its = 0, others, slot;

	switch (magic) {
	case MAGIC_PIPE:
		its = DID_PIPE;
		others = HAPPENED_PIPE;
		break;
	case MAGIC_MQUEUE:
		others = HAPPENED_QUEUE;
		break;
	case MAGIC_PROC:
		/* Elsewhere a function tells of it (functions.h). */
		if (!bpf_core_type_exists(struct trace_event_raw_ctime_ns_xchg))
			return;
		if (inode->i_mode != PROC_MEM_MODE || is_made_by_others())
			return;
		others = HAPPENED_REACH;
		break;
	default:
		return;
	}
	if (its && did(tgid, its))
		return;
	slot = slot_of_task(levels);
	if (slot != NOBODY)
		happened(slot, others);
}

static __always_inline bool is_pseudo(unsigned long magic)
{
	switch (magic) {
	case MAGIC_PIPE:
	case MAGIC_MQUEUE:
	case MAGIC_SOCKET:
	case MAGIC_ANON_INODE:
	case MAGIC_AIO:
	case MAGIC_BDEV: /* a file system's own blocks, or a device that is the host's */
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

/*
 * Records it in the slot's epoch, and says in which. The number is read once: what is remembered stands in
 * the epoch that is remembered.
 */
static __always_inline void record_and_tell(__u32 slot, const struct inode_key *key, __u32 bits,
					    struct recent *now)
{
	now->owner = slot + 1;
	now->epoch = epoch_number(slot);
	record(slot, now->epoch, key, bits);
}

/*
 * An inode changed that the CPU does not remember. A program of its own, as its many registers and its
 * stack are not the business of the short way.
 */
static __noinline int note(struct inode *inode, struct recent *now)
{
	volatile struct control *control = controls();
	struct super_block *sb = inode->i_sb;
	unsigned long magic = sb->s_magic;
	struct inode_key key = { .ino = now->ino, .dev = now->dev, .strange = now->strange };
	__u32 bits = now->bits, slot;

	if (!control)
		return 0;
	if (is_pseudo(magic)) {
		pseudo(inode, magic, now->tgid, control->levels);
		return 0;
	}
	slot = slot_of_task(control->levels);
	if (now->via) {
		__u32 owner = slot_of_overlay(now->via);

		bits |= SEEN_OVERLAY;
		/* One that is in an overlay already has its mode. */
		if ((inode->i_mode & MODE_TYPE) == MODE_DIRECTORY)
			bits |= SEEN_DIRECTORY;
		if (owner != slot)
			bits |= SEEN_OUTSIDE;
		if (slot != NOBODY)
			did(now->tgid, DID_FILE);
		slot = owner;
	}
	if (slot == NOBODY)
		return 0;
	if (is_memory(sb, magic)) {
		if (!did(now->tgid, DID_MEMORY))
			happened(slot, HAPPENED_MEMORY);
	} else if (!now->via) {
		did(now->tgid, DID_FILE);
	}
	record_and_tell(slot, &key, bits, now);
	return 0;
}

/* Who does it, and in which generation; false: cannot be told. */
static __always_inline bool fill(struct recent *now, struct inode_key *key)
{
	volatile struct control *control = controls();
	struct task_struct *task = bpf_get_current_task_btf();

	if (!control)
		return false;
	/* Before the sandbox is looked up: what was found in an old generation must carry its number. */
	now->generation = control->generation;
	now->ino = key->ino;
	now->dev = key->dev;
	now->strange = key->strange;
	now->tgid = task->tgid;
	now->cgroup = AS(struct task_struct, task)->cgroups->dfl_cgrp->kn->id;
	return true;
}

static __always_inline int changed(struct inode *given, __u32 bits, bool unless_new)
{
	struct inode *inode = AS(struct inode, given), *upper = inode;
	struct super_block *sb = inode->i_sb;
	struct recent now = { .bits = bits };
	struct memory *memory;
	struct inode_key key;
	__u32 zero = 0;

	if (sb->s_magic == MAGIC_OVERLAY) {
		now.via = sb->s_dev;
		upper = upper_of(inode);
		if (!upper)
			return 0;
		sb = upper->i_sb;
	}
	if (!identify(upper, sb->s_magic, &key))
		return 0;
	memory = bpf_map_lookup_elem(&memories, &zero);
	if (!memory || !fill(&now, &key) || known(memory, &now))
		return 0;
	if (unless_new && is_new(inode))
		return 0;
	note(upper, &now);
	remember(memory, &now);
	return 0;
}

SEC("tp_btf/writeback_mark_inode_dirty")
int BPF_PROG(writeback_mark_inode_dirty, struct inode *inode, int flags)
{
	/* Anything less is a time of access. */
	if (!(flags & STATE(I_DIRTY_PAGES)))
		return 0;
	return changed(inode, SEEN_PAGES, false);
}

#endif
