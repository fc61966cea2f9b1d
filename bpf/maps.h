/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The maps, and how a sandbox is found in them. */
#ifndef CRAB_MAPS_H
#define CRAB_MAPS_H

#include "inspector.h"
#include "kernel.h"

/*
 * One epoch of one sandbox: what changed in it. User space makes it and puts it into `epochs`, at its
 * slot's place for even or for odd numbers.
 */
struct epoch {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(struct inode_key));
	__uint(value_size, sizeof(struct seen));
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, CRAB_SIDES * CRAB_SLOTS);
	__type(key, __u32);
	__array(values, struct epoch);
} epochs SEC(".maps");

/* slot -> number of its epoch, which user space increments to begin another one. Mapped by every shim. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, CRAB_SLOTS);
	__type(key, __u32);
	__type(value, __u64);
} epoch_numbers SEC(".maps");

/* cgroup id (of cgroup v2's hierarchy) -> slot */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, CRAB_SLOTS);
	__type(key, __u64);
	__type(value, __u32);
} cgroups SEC(".maps");

/* device of a sandbox's overlay -> slot */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, CRAB_SLOTS);
	__type(key, __u32);
	__type(value, __u32);
} overlays SEC(".maps");

/* process -> what it did */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 16);
	__type(key, __u32);
	__type(value, struct watched);
} watched SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct control);
} control SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct makers);
} makers SEC(".maps");

#define NOBODY ((__u32)-1)

static __always_inline volatile struct control *controls(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&control, &zero);
}

/*
 * Functions that are not static are checked once for a program, and not once more for each way that leads
 * to them: that makes loading the programs five times as fast. These are not on the short way of an event.
 */

/* The sandbox in whose cgroup, or below it, the current task is. */
__noinline __u32 slot_of_task(__u64 levels)
{
	for (int level = 1; level < 24; level++) {
		__u64 id;
		__u32 *slot;

		if (!(levels >> level))
			break;
		if (!(levels >> level & 1))
			continue;
		id = bpf_get_current_ancestor_cgroup_id(level);
		if (!id)
			break;
		slot = bpf_map_lookup_elem(&cgroups, &id);
		if (slot)
			return *slot;
	}
	return NOBODY;
}

static __always_inline __u32 slot_of_overlay(__u32 dev)
{
	__u32 *slot = bpf_map_lookup_elem(&overlays, &dev);

	return slot ? *slot : NOBODY;
}

static __always_inline void set_bits(__u32 *word, __u32 bits)
{
	if ((*(volatile __u32 *)word & bits) != bits)
		__sync_fetch_and_or(word, bits);
}

/* The number of the epoch that a slot is in. */
static __always_inline __u64 epoch_number(__u32 slot)
{
	volatile __u64 *number = bpf_map_lookup_elem(&epoch_numbers, &slot);

	return number ? *number : 0;
}

static __always_inline void *epoch_of(__u32 slot, __u64 number)
{
	__u32 place = CRAB_SIDES * slot + number % CRAB_SIDES;

	return bpf_map_lookup_elem(&epochs, &place);
}

__noinline int happened(__u32 slot, __u32 bits)
{
	void *epoch = epoch_of(slot, epoch_number(slot));
	struct inode_key own = {};
	struct seen *seen;

	if (!epoch)
		return 0;
	own.dev = OWN_EVENTS;
	seen = bpf_map_lookup_elem(epoch, &own);
	if (seen)
		set_bits(&seen->bits, bits);
	return 0;
}

/* Not in a program of its own: a call costs more than the code. */
static __always_inline void record(__u32 slot, __u64 number, const struct inode_key *key, __u32 bits)
{
	struct inode_key header = {};
	struct seen first = { .bits = bits };
	void *epoch = epoch_of(slot, number);
	struct seen *seen;

	if (!epoch)
		return;
	seen = bpf_map_lookup_elem(epoch, key);
	if (!seen) {
		long error = bpf_map_update_elem(epoch, key, &first, BPF_NOEXIST);

		if (!error) {
			seen = bpf_map_lookup_elem(epoch, &header);
			if (seen)
				__sync_fetch_and_add(&seen->count, 1);
			return;
		}
		/* Another CPU was faster, or there is no room. */
		seen = bpf_map_lookup_elem(epoch, key);
		if (!seen) {
			seen = bpf_map_lookup_elem(epoch, &header);
			bits = EPOCH_OVERFLOW;
		}
	}
	if (seen)
		set_bits(&seen->bits, bits);
}

/* Whether the current process is watched; notes what it did if so. */
__noinline int did(__u32 tgid, __u32 bits)
{
	struct watched *process = bpf_map_lookup_elem(&watched, &tgid);

	if (!process)
		return 0;
	if ((*(volatile __u32 *)&process->did & bits) != bits) {
		__sync_fetch_and_or(&process->did, bits);
		happened(process->slot, HAPPENED_WATCHED);
	}
	return 1;
}

#endif
