/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Who clears the kernel's marks of written pages (soft-dirty). Dumps that build upon each other go by them:
 * a page whose mark somebody else took away would be missing in the next dump. The marks are cleared in one
 * place alone, by a write to /proc/PID/clear_refs. Other numbers than that of soft-dirty clear nothing of
 * interest, but are counted, too: what is written is not looked at here.
 */
#ifndef CRAB_MARKS_H
#define CRAB_MARKS_H

#include "maps.h"

/* The process behind an open file of /proc/PID; 0 if there is none any more. */
static __always_inline __u32 tgid_of(struct file *file)
{
	struct pid *pid = AROUND(struct proc_inode, vfs_inode, file->f_inode)->pid;
	struct hlist_node *first;

	if (!pid)
		return 0;
	/* The first list is that of the thread with this number. */
	first = AS(struct hlist_head, (unsigned long)pid + bpf_core_field_offset(struct pid, tasks))->first;
	return first ? AROUND(struct task_struct, pid_links, first)->tgid : 0;
}

/*
 * After it is done, so that what a sandbox does itself is noted before it can be frozen. By whoever is in
 * it, whichever process's marks these are: of one that came since the last dump nothing is known here. And
 * by anybody else, if it is a process of the last dump: but not by who dumps, which is a child of the
 * sandbox's shim, in the same cgroup.
 */
SEC("fexit/clear_refs_write")
int BPF_PROG(clear_refs_write, struct file *file)
{
	volatile struct control *control = controls();
	__u32 tgid = tgid_of(file), slot;
	struct watched *process;

	process = bpf_map_lookup_elem(&watched, &tgid);
	if (process && process->keeper != bpf_get_current_cgroup_id())
		happened(process->slot, HAPPENED_CLEARED);
	if (!control)
		return 0;
	slot = slot_of_task(control->levels);
	if (slot != NOBODY)
		happened(slot, HAPPENED_CLEARED);
	return 0;
}

#endif
