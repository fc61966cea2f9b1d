/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the programs and src/inspector/abi.rs agree upon. A change here changes the build's hash, and
 * with it the place of the pins: two builds never share a map.
 */
#ifndef CRAB_INSPECTOR_H
#define CRAB_INSPECTOR_H

#include <linux/types.h>

/* Sandboxes that one host can watch at once. */
#define CRAB_SLOTS 4096
/* Epochs of one sandbox that the programs may write to: that of an even number, and of an odd one. */
#define CRAB_SIDES 2
/* Places in each CPU's memory of what it has just recorded; a power of two. */
#define CRAB_RECENT 64

/* An inode, as stat() shows it. Keys whose ino is 0 are the epoch's own: see `enum own_keys`. */
struct inode_key {
	__u64 ino;
	__u32 dev; /* the kernel's dev_t: major << 20 | minor */
	__u32 strange; /* not 0: stat() shows it otherwise. Its file system is a module that came later. */
};

enum own_keys {
	OWN_HEADER = 0, /* EPOCH_* and the number of inodes */
	OWN_EVENTS = 1, /* HAPPENED_* */
};

/* Of an inode: how it was seen to change. */
struct seen {
	__u32 bits;
	__u32 count;
};

enum seen_bits {
	SEEN_CTIME = 1 << 0,   /* its ctime was set, or would have been but for the clock's tick */
	SEEN_PAGES = 1 << 1,   /* pages of it became dirty */
	SEEN_MAPPED = 1 << 2,  /* a shared mapping of it was made or moved */
	SEEN_OVERLAY = 1 << 3, /* through the sandbox's root file system */
	SEEN_OUTSIDE = 1 << 4, /* by a task outside of the sandbox's cgroup */
	SEEN_DIRECTORY = 1 << 5, /* and it is a directory; told of what is SEEN_OVERLAY alone */
};

enum epoch_bits {
	EPOCH_OVERFLOW = 1 << 0, /* an inode could not be recorded: everything may have changed */
};

/* What happened besides changes of files. Set by the sandbox's own tasks, but for the last one. */
enum happened_bits {
	HAPPENED_FORK = 1 << 0,
	HAPPENED_EXEC = 1 << 1,
	HAPPENED_EXIT = 1 << 2,
	HAPPENED_SOCKET = 1 << 3, /* these three by tasks that are not watched */
	HAPPENED_PIPE = 1 << 4,
	HAPPENED_MEMORY = 1 << 5, /* memory that lives in the kernel's own tmpfs: memfd, SysV */
	HAPPENED_QUEUE = 1 << 6,  /* a POSIX message queue, by anybody */
	HAPPENED_WATCHED = 1 << 7, /* a watched process did something, or had it done to it */
	HAPPENED_REACH = 1 << 8, /* somebody looked up a /proc/PID/mem for the first time */
	HAPPENED_CLEARED = 1 << 9, /* marks of written pages were cleared by somebody who does not dump */
};

/* What a watched process did, or had done to it, since it is watched. */
struct watched {
	__u32 slot;
	__u32 did;
	__u64 keeper; /* the cgroup of the shim, and of those whom it has dump the sandbox */
};

enum did_bits {
	DID_FILE = 1 << 0,
	DID_SEND = 1 << 1,
	DID_RECEIVE = 1 << 2,
	DID_PIPE = 1 << 3,
	DID_FORK = 1 << 4,
	DID_EXEC = 1 << 5,
	DID_SIGNAL = 1 << 6,
	DID_GET_SIGNAL = 1 << 7,
	DID_MEMORY = 1 << 8,
	DID_EXIT = 1 << 9, /* one of its threads */
};

/* What user space tells the programs; mapped by every shim. */
struct control {
	__u64 generation; /* grows whenever what a CPU remembers may be wrong */
	__u64 levels;     /* bit n: a sandbox's cgroup is n levels below the root */
	__u64 watching;   /* not 0: somebody is watched */
};

/* A function of the kernel: from where to where; 0 and 0: not known. */
struct code {
	__u64 start;
	__u64 end;
};

#define MAKERS 4

/* Those that make inodes of /proc other than those of processes; user space fills it. */
struct makers {
	struct code all[MAKERS];
};

/* A shared mapping or an open file, as the iterators report it. */
struct mapping {
	__u64 ino;
	__u32 dev;
	__u32 tgid;
	__u32 kind; /* MAPPING_* */
	__u32 strange; /* as in the key */
};

/* The registers of a thread, as the iterator reports them. */
struct registers {
	__u32 tid;
	__u32 unused;
	__u64 hash;
	__u64 reader; /* the cgroup of whoever asks */
};

enum mapping_kind {
	MAPPING_FILE = 0,
	MAPPING_AIO = 1,
};

#endif
