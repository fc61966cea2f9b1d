/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Processes: those that a dump holds are watched, of the others it is enough to know that they did
 * something. Nothing here runs when a task is switched to or woken.
 */
#ifndef CRAB_TASKS_H
#define CRAB_TASKS_H

#include "maps.h"

/* include/trace/events/signal.h */
#define TRACE_SIGNAL_IGNORED 1

static __always_inline void lived(__u32 its, __u32 others)
{
	volatile struct control *control = controls();
	struct task_struct *task = bpf_get_current_task_btf();
	__u32 slot;

	if (!control || !control->watching)
		return;
	did(task->tgid, its);
	slot = slot_of_task(control->levels);
	if (slot != NOBODY)
		happened(slot, others);
}

SEC("tp_btf/sched_process_fork")
int BPF_PROG(sched_process_fork)
{
	lived(DID_FORK, HAPPENED_FORK);
	return 0;
}

SEC("tp_btf/sched_process_exec")
int BPF_PROG(sched_process_exec)
{
	lived(DID_EXEC, HAPPENED_EXEC);
	return 0;
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(sched_process_exit)
{
	lived(DID_EXIT, HAPPENED_EXIT);
	return 0;
}

SEC("tp_btf/signal_generate")
int BPF_PROG(signal_generate, int sig, struct kernel_siginfo *info, struct task_struct *target,
	     int group, int result)
{
	volatile struct control *control = controls();
	struct task_struct *task = bpf_get_current_task_btf();

	if (!control || !control->watching)
		return 0;
	/* One that nobody waits for changes nothing at its target; but a tracee tells its tracer so. */
	if (result != TRACE_SIGNAL_IGNORED)
		did(target->tgid, DID_GET_SIGNAL);
	did(task->tgid, DID_SIGNAL);
	return 0;
}

static __always_inline int moved(int length, __u32 its)
{
	volatile struct control *control = controls();
	struct task_struct *task = bpf_get_current_task_btf();
	__u32 slot;

	if (length < 0 || !control || !control->watching)
		return 0;
	if (did(task->tgid, its))
		return 0;
	slot = slot_of_task(control->levels);
	if (slot != NOBODY)
		happened(slot, HAPPENED_SOCKET);
	return 0;
}

SEC("tp_btf/sock_send_length")
int BPF_PROG(sock_send_length, struct sock *sk, int length)
{
	return moved(length, DID_SEND);
}

SEC("tp_btf/sock_recv_length")
int BPF_PROG(sock_recv_length, struct sock *sk, int length)
{
	return moved(length, DID_RECEIVE);
}

#endif
