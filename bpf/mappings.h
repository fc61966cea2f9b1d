/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Shared mappings of files. A store into one that is already writable and dirty runs no code of the
 * kernel, so its making is noted, and those that outlive a turn are listed at its end.
 */
#ifndef CRAB_MAPPINGS_H
#define CRAB_MAPPINGS_H

#include "files.h"

/* A shared mapping was made that the CPU does not remember. */
static __noinline int note_mapping(struct inode *inode, struct recent *now)
{
	volatile struct control *control = controls();
	unsigned long magic = inode->i_sb->s_magic;
	struct inode_key key = { .ino = now->ino, .dev = now->dev, .strange = now->strange };
	__u32 slot, bits = now->bits;

	if (!control)
		return 0;
	slot = slot_of_task(control->levels);
	if (slot == NOBODY && now->via) {
		slot = slot_of_overlay(now->via);
		bits |= SEEN_OUTSIDE;
	}
	if (slot == NOBODY)
		return 0;
	if (is_pseudo(magic))
		return 0;
	if (is_memory(inode->i_sb, magic)) {
		if (!did(now->tgid, DID_MEMORY))
			happened(slot, HAPPENED_MEMORY);
	} else {
		did(now->tgid, DID_FILE);
	}
	record_and_tell(slot, &key, bits, now);
	return 0;
}

SEC("tp_btf/ma_write")
int BPF_PROG(ma_write, const char *caller, struct ma_state *mas, unsigned long pivot, void *value)
{
	struct recent now = { .bits = SEEN_MAPPED };
	struct vm_area_struct *vma;
	struct task_struct *task;
	struct vfsmount *mount;
	struct memory *memory;
	struct inode_key key;
	struct inode *inode;
	struct file *file;
	unsigned long magic;
	__u32 zero = 0;

	if (!value)
		return 0;
	/* Many trees hold other things than mappings: what is read of those means nothing, until the
	 * tree is known to be the current task's. */
	vma = AS(struct vm_area_struct, value);
	file = vma->vm_file;
	if (!file || !(vma->vm_flags & VM_SHARED))
		return 0;
	task = AS(struct task_struct, bpf_get_current_task_btf());
	if (!task->mm || (unsigned long)AS(struct ma_state, mas)->tree !=
			 (unsigned long)task->mm + bpf_core_field_offset(struct mm_struct, mm_mt))
		return 0;
	inode = file->f_inode;
	magic = inode->i_sb->s_magic;
	if (magic == MAGIC_OVERLAY) {
		inode = upper_of(inode);
		if (!inode)
			return 0;
		magic = inode->i_sb->s_magic;
	} else {
		/*
		 * Of a file in an overlay the mapping holds the upper one, and remembers the other. Whether
		 * a file is of that kind no bit says that stays in one place from kernel to kernel; behind
		 * another kind lies something else, at worst an overlay whose sandbox then has an inode to
		 * compare.
		 */
		mount = AROUND(struct backing_file, file, file)->user_path.mnt;
		if (mount && mount->mnt_sb->s_magic == MAGIC_OVERLAY)
			now.via = mount->mnt_sb->s_dev;
	}
	if (!identify(inode, magic, &key))
		return 0;
	memory = bpf_map_lookup_elem(&memories, &zero);
	if (!memory || !fill(&now, &key) || known(memory, &now))
		return 0;
	note_mapping(inode, &now);
	remember(memory, &now);
	return 0;
}

/* The inode of a file as stat() shows it, for the iterators; false: none that counts. */
static __always_inline bool inode_of(struct file *file, struct inode_key *key, bool *aio)
{
	struct inode *inode = file->f_inode;
	unsigned long magic = inode->i_sb->s_magic;

	if (magic == MAGIC_OVERLAY) {
		inode = upper_of(inode);
		if (!inode)
			return false;
		magic = inode->i_sb->s_magic;
	}
	*aio = magic == MAGIC_AIO || magic == MAGIC_ANON_INODE;
	return *aio || (!is_pseudo(magic) && identify(inode, magic, key));
}

static __always_inline void report(struct seq_file *seq, struct task_struct *task, struct file *file)
{
	struct mapping mapping = {};
	struct inode_key key = {};
	bool aio = false;

	if (!inode_of(file, &key, &aio))
		return;
	mapping.ino = key.ino;
	mapping.dev = key.dev;
	mapping.strange = key.strange;
	mapping.tgid = task->tgid;
	mapping.kind = aio ? MAPPING_AIO : MAPPING_FILE;
	bpf_seq_write(seq, &mapping, sizeof(mapping));
}

/* Lists the files that one process can write through its descriptors. */
SEC("iter/task_file")
int open_files(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;

	if (task && file && file->f_mode & FMODE_WRITE)
		report(ctx->meta->seq, task, file);
	return 0;
}

/* Lists the shared mappings of one process. */
SEC("iter/task_vma")
int shared_mappings(struct bpf_iter__task_vma *ctx)
{
	struct task_struct *task = ctx->task;
	struct vm_area_struct *vma = ctx->vma;
	struct file *file;

	if (!task || !vma || !(vma->vm_flags & VM_SHARED))
		return 0;
	file = vma->vm_file;
	if (file)
		report(ctx->meta->seq, task, file);
	return 0;
}

#endif
