/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The registers of a thread that stands still, as one number: user space could read them only by
 * stopping the thread, which makes interrupted system calls return early.
 */
#ifndef CRAB_REGISTERS_H
#define CRAB_REGISTERS_H

#include "inspector.h"
#include "kernel.h"

/* Room for pt_regs, or for one state of the floating point unit; in words. */
#define REGISTER_WORDS 512

struct register_words {
	__u64 word[REGISTER_WORDS];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct register_words);
} register_words SEC(".maps");

/* Adds the words to the hash (FNV-1a by words, and a shift so that high bits come down). */
static __always_inline __u64 mix(__u64 hash, const struct register_words *words, __u32 bytes)
{
	for (int i = 0; i < REGISTER_WORDS; i++) {
		if (i * sizeof(__u64) >= bytes)
			break;
		hash = (hash ^ words->word[i]) * 0x100000001b3ull;
		hash ^= hash >> 29;
	}
	return hash;
}

/* Where x86 keeps the state of the floating point unit; NULL elsewhere. */
static __always_inline struct fpstate *fpstate_of(struct task_struct *task)
{
	struct fpu *fpu;

	if (!bpf_core_type_exists(struct fpstate))
		return NULL;
	if (bpf_core_field_exists(((struct thread_struct___with_fpu *)0)->fpu))
		fpu = (void *)task + bpf_core_field_offset(struct task_struct, thread) +
		      bpf_core_field_offset(struct thread_struct___with_fpu, fpu);
	else /* since 6.16 it lies behind the task */
		fpu = (void *)task + bpf_core_type_size(struct task_struct);
	return AS(struct fpu, fpu)->fpstate;
}

SEC("iter/task")
int registers(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	struct registers line = {};
	struct register_words *words;
	struct fpstate *fpstate;
	__u32 zero = 0, bytes;
	struct pt_regs *regs;

	if (!task || task->flags & PF_KTHREAD)
		return 0;
	words = bpf_map_lookup_elem(&register_words, &zero);
	if (!words)
		return 0;
	regs = (struct pt_regs *)bpf_task_pt_regs(task);
	bytes = bpf_core_type_size(struct pt_regs);
	if (!regs || bytes > sizeof(*words) || bpf_probe_read_kernel(words, bytes, regs))
		return 0;
	line.hash = mix(0xcbf29ce484222325ull, words, bytes);
	if (bpf_core_field_exists(((struct thread_struct *)0)->fsbase)) {
		words->word[0] = task->thread.fsbase;
		words->word[1] = task->thread.gsbase;
		line.hash = mix(line.hash, words, 2 * sizeof(__u64));
	}
	fpstate = fpstate_of(task);
	if (fpstate) {
		bytes = fpstate->size;
		if (bytes > sizeof(*words) ||
		    bpf_probe_read_kernel(words, bytes,
					  (void *)fpstate +
						  bpf_core_field_offset(struct fpstate, regs)))
			return 0;
		line.hash = mix(line.hash, words, bytes);
	}
	line.tid = task->pid;
	line.reader = bpf_get_current_cgroup_id();
	bpf_seq_write(ctx->meta->seq, &line, sizeof(line));
	return 0;
}

#endif
