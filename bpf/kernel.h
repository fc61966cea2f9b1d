/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The few fields of the kernel's structures that the programs read. Their places are found when the
 * programs are loaded (CO-RE); names and types are those of the kernel.
 */
#ifndef CRAB_KERNEL_H
#define CRAB_KERNEL_H

#include <linux/bpf.h>
#include <linux/types.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

/* Magic numbers of file systems (statfs(2)). */
#define MAGIC_OVERLAY 0x794c7630
#define MAGIC_XFS 0x58465342
#define MAGIC_BTRFS 0x9123683e
#define MAGIC_TMPFS 0x01021994
#define MAGIC_PIPE 0x50495045
#define MAGIC_SOCKET 0x534f434b
#define MAGIC_ANON_INODE 0x09041934
#define MAGIC_AIO 0xa10a10a1
#define MAGIC_MQUEUE 0x19800202
#define MAGIC_BDEV 0x62646576
#define MAGIC_DEVPTS 0x1cd1
#define MAGIC_PROC 0x9fa0
#define MAGIC_SYSFS 0x62656572
#define MAGIC_CGROUP 0x27e0eb
#define MAGIC_CGROUP2 0x63677270
#define MAGIC_BPF 0xcafe4a11
#define MAGIC_NSFS 0x6e736673
#define MAGIC_HUGETLB 0x958458f6
#define MAGIC_SECRETMEM 0x5345434d

#define SB_KERNMOUNT (1 << 22)
#define VM_SHARED 0x8
#define FMODE_WRITE 2
#define PF_KTHREAD 0x00200000

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct super_block {
	__u32 s_dev;
	unsigned long s_flags;
	unsigned long s_magic;
};

/* Their values differ from kernel to kernel: ask for them by STATE(). */
enum inode_state_flags_t {
	I_NEW = 1,
	I_DIRTY_PAGES = 2,
};

enum inode_state_flags_enum {
	I_NEW___2 = 1,
	I_DIRTY_PAGES___2 = 2,
};

/* Before they were an enumeration; and before 6.12, when they were given new numbers and the word became a
 * short one. */
#define SHORT_I_NEW (1 << 0)
#define SHORT_I_DIRTY_PAGES (1 << 5)
#define LONG_I_NEW (1 << 3)
#define LONG_I_DIRTY_PAGES (1 << 2)

#define STATE(name)                                                                                \
	(bpf_core_enum_value_exists(enum inode_state_flags_t, name) ?                              \
		 bpf_core_enum_value(enum inode_state_flags_t, name) :                             \
	 bpf_core_enum_value_exists(enum inode_state_flags_enum, name##___2) ?                     \
		 bpf_core_enum_value(enum inode_state_flags_enum, name##___2) :                    \
	 bpf_core_field_size(((struct inode___word *)0)->i_state) == 4 ? SHORT_##name :            \
									 LONG_##name)

struct inode {
	unsigned short i_mode;
	struct super_block *i_sb;
	unsigned long i_ino;
};

/* i_state has had three types so far. */
struct inode___word {
	unsigned long i_state;
};

struct inode___enum {
	enum inode_state_flags_t i_state;
};

struct inode_state_flags {
	enum inode_state_flags_t __state;
};

struct inode___wrapped {
	struct inode_state_flags i_state;
};

struct vfsmount {
	struct super_block *mnt_sb;
};

struct dentry {
	struct dentry *d_parent;
	struct inode *d_inode;
};

struct path {
	struct vfsmount *mnt;
	struct dentry *dentry;
};

struct file {
	struct inode *f_inode;
	unsigned int f_mode;
	struct path f_path;
};

struct kiocb {
	struct file *ki_filp;
};

struct backing_file {
	struct file file;
	struct path user_path;
};

struct vm_area_struct {
	unsigned long vm_start;
	unsigned long vm_flags;
	struct file *vm_file;
};

struct maple_tree {
	unsigned int ma_flags;
};

struct ma_state {
	struct maple_tree *tree;
};

struct mm_struct {
	struct maple_tree mm_mt;
};

struct kernfs_node {
	__u64 id;
};

struct cgroup {
	struct kernfs_node *kn;
};

struct css_set {
	struct cgroup *dfl_cgrp;
};

struct thread_struct {
	unsigned long fsbase;
	unsigned long gsbase;
};

struct hlist_node {
	struct hlist_node *next;
};

struct hlist_head {
	struct hlist_node *first;
};

struct pid {
	struct hlist_head tasks[1];
};

struct task_struct {
	unsigned int flags;
	struct thread_struct thread;
	int pid;
	int tgid;
	struct hlist_node pid_links[1];
	struct mm_struct *mm;
	struct css_set *cgroups;
};

struct proc_inode {
	struct pid *pid;
	struct inode vfs_inode;
};

struct ovl_inode {
	struct inode vfs_inode;
	struct dentry *__upperdentry;
};

struct xfs_inode {
	__u64 i_ino;
	struct inode i_vnode;
};

struct btrfs_root {
	__u32 anon_dev;
};

struct btrfs_inode {
	struct btrfs_root *root;
	struct inode vfs_inode;
};

struct seq_file {
	char unused;
};

struct bpf_iter_meta {
	struct seq_file *seq;
};

struct bpf_iter__task_vma {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	struct vm_area_struct *vma;
};

struct bpf_iter__task_file {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	struct file *file;
};

struct bpf_iter__task {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
};

struct fpregs_state {
	char unused;
};

struct fpstate {
	unsigned int size;
	struct fpregs_state regs;
};

struct fpu {
	struct fpstate *fpstate;
};

struct thread_struct___with_fpu {
	struct fpu fpu;
};

struct pt_regs {
	char unused;
};

struct kernel_siginfo {
	int si_code;
};

struct sock {
	char unused;
};

struct linux_binprm {
	char unused;
};

/* Where it exists, times of inodes have tracepoints (6.13 and newer). */
struct trace_event_raw_ctime_ns_xchg {
	char unused;
};

#pragma clang attribute pop

/*
 * A pointer that is not the verifier's own: loads through it cannot fault, they read 0. Pointers are always
 * read through such a one, even if another was given: of each pointer that is read through one that it trusts
 * the verifier looks up whether that can be trusted, too, up to four times through the names of all types of
 * the kernel. That was most of the time that it took.
 */
void *bpf_rdonly_cast(const void *object, __u32 btf_id) __ksym;

#define AS(type, pointer) ((type *)bpf_rdonly_cast((void *)(pointer), bpf_core_type_id_kernel(type)))
#define AROUND(type, field, pointer) \
	AS(type, (unsigned long)(pointer) - bpf_core_field_offset(type, field))

/*
 * File systems may be modules, and to a module's types the verifier casts nothing. Where a field lies in
 * one is known all the same; it is then read as one of the kernel's own that has its size.
 */
#define BESIDE(type, from, field, pointer)                                                         \
	((unsigned long)(pointer) - bpf_core_field_offset(type, from) +                            \
	 bpf_core_field_offset(type, field))
#define LONG_AT(address) (AROUND(struct inode, i_ino, address)->i_ino)
#define INT_AT(address) (AROUND(struct super_block, s_dev, address)->s_dev)

#endif
