/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Changes of inodes by functions of the kernel, where it has no tracepoints of time stamps (before 6.13).
 * Nothing can be attached to the function that sets a ctime, as it returns a structure; some file systems
 * do not call it, either. So these are the functions through which changes come to every file system.
 *
 * A change through overlay ends in ovl_copyattr of the overlay's inode. Upper inodes that have no part in
 * that (directories that are copied up, whiteouts, a link's target) are changed by overlay with the calls of
 * everybody else. A program runs after the change wherever it can, so that what an outsider does around a
 * cut is noted in the epoch in which it became true, or a later one. The exceptions are the writes to what
 * is in no overlay, where outsiders are not known anyway; those of insiders have ended when they are frozen.
 */
#ifndef CRAB_FUNCTIONS_H
#define CRAB_FUNCTIONS_H

#include "files.h"

struct mnt_idmap;
struct iattr;

/* errno.h */
#define EPERM 1
#define EACCES 13

static __noinline int touched(struct inode *inode)
{
	return inode ? changed(inode, SEEN_CTIME, false) : 0;
}

/* Of overlay: it takes over times and size of the upper inode, after the change. */
SEC("fentry/ovl_copyattr")
int BPF_PROG(ovl_copyattr, struct inode *inode)
{
	/* Or it reads it in. */
	return changed(inode, SEEN_CTIME, true);
}

/* A directory, and what a name in it stands for. */
static __always_inline int named(struct dentry *dentry, struct inode *inode)
{
	touched(dentry->d_parent->d_inode);
	return touched(inode);
}

/* A name came, in one of two ways; at the end of making a file, a link or anything else. */
SEC("fentry/d_instantiate")
int BPF_PROG(d_instantiate, struct dentry *dentry, struct inode *inode)
{
	return named(dentry, inode);
}

SEC("fentry/d_instantiate_new")
int BPF_PROG(d_instantiate_new, struct dentry *dentry, struct inode *inode)
{
	return named(dentry, inode);
}

/*
 * A number of an inode is taken, or one more name counts. With the others this only tells of whiteouts that a
 * rename leaves behind: the file system makes these by itself.
 */
SEC("fentry/insert_inode_locked")
int BPF_PROG(insert_inode_locked, struct inode *inode)
{
	return touched(inode);
}

SEC("fentry/insert_inode_locked4")
int BPF_PROG(insert_inode_locked4, struct inode *inode)
{
	return touched(inode);
}

SEC("fentry/inc_nlink")
int BPF_PROG(inc_nlink, struct inode *inode)
{
	return touched(inode);
}

/* A name went. */
SEC("fentry/d_delete")
int BPF_PROG(d_delete, struct dentry *dentry)
{
	return named(dentry, dentry->d_inode);
}

/* A name became another one. */
SEC("fentry/d_move")
int BPF_PROG(d_move, struct dentry *dentry, struct dentry *target)
{
	named(dentry, dentry->d_inode);
	return named(target, target->d_inode);
}

SEC("fentry/d_exchange")
int BPF_PROG(d_exchange, struct dentry *dentry, struct dentry *target)
{
	named(dentry, dentry->d_inode);
	return named(target, target->d_inode);
}

/* Mode, owner, times, and size when it is set. */
SEC("fexit/notify_change")
int BPF_PROG(notify_change, struct mnt_idmap *idmap, struct dentry *dentry, struct iattr *attributes,
	     struct inode **delegated, int result)
{
	/* Asked for before anything is done. Other errors may come in the midst of it. */
	if (result == -EPERM || result == -EACCES)
		return 0;
	return touched(dentry->d_inode);
}

SEC("fexit/vfs_setxattr")
int BPF_PROG(vfs_setxattr, struct mnt_idmap *idmap, struct dentry *dentry)
{
	return touched(dentry->d_inode);
}

SEC("fexit/vfs_removexattr")
int BPF_PROG(vfs_removexattr, struct mnt_idmap *idmap, struct dentry *dentry)
{
	return touched(dentry->d_inode);
}

SEC("fexit/vfs_set_acl")
int BPF_PROG(vfs_set_acl, struct mnt_idmap *idmap, struct dentry *dentry)
{
	return touched(dentry->d_inode);
}

SEC("fexit/vfs_remove_acl")
int BPF_PROG(vfs_remove_acl, struct mnt_idmap *idmap, struct dentry *dentry)
{
	return touched(dentry->d_inode);
}

/* chattr. */
SEC("fexit/vfs_fileattr_set")
int BPF_PROG(vfs_fileattr_set, struct mnt_idmap *idmap, struct dentry *dentry)
{
	return touched(dentry->d_inode);
}

SEC("fexit/vfs_fallocate")
int BPF_PROG(vfs_fallocate, struct file *file)
{
	return touched(file->f_inode);
}

/* Each file system calls one of these four when a write begins. */
SEC("fentry/file_update_time")
int BPF_PROG(file_update_time, struct file *file)
{
	return changed(file->f_inode, SEEN_CTIME, false);
}

SEC("fentry/file_modified")
int BPF_PROG(file_modified, struct file *file)
{
	return changed(file->f_inode, SEEN_CTIME, false);
}

SEC("fentry/kiocb_modified")
int BPF_PROG(kiocb_modified, struct kiocb *iocb)
{
	return changed(iocb->ki_filp->f_inode, SEEN_CTIME, false);
}

SEC("fentry/file_remove_privs")
int BPF_PROG(file_remove_privs, struct file *file)
{
	return changed(file->f_inode, SEEN_CTIME, false);
}

/* What besides a file's change is known by the times of an inode where these have tracepoints. */
static __noinline int of_task(__u32 bits)
{
	volatile struct control *control = controls();
	__u32 slot;

	if (!control)
		return 0;
	slot = slot_of_task(control->levels);
	if (slot != NOBODY)
		happened(slot, bits);
	return 0;
}

/* A message of a queue, POSIX's or System V's, is taken from a task. */
SEC("fentry/load_msg")
int BPF_PROG(load_msg)
{
	return of_task(HAPPENED_QUEUE);
}

/* And is given to one. */
SEC("fentry/store_msg")
int BPF_PROG(store_msg)
{
	return of_task(HAPPENED_QUEUE);
}

/* Of /proc/PID/mem. */
SEC("fentry/mem_open")
int BPF_PROG(mem_open)
{
	return of_task(HAPPENED_REACH);
}

#endif
