/*
 * empty TRACEPOINT...: attaches a BPF program that does nothing to each, until its standard input ends.
 *
 * What that costs is what the kernel takes for getting to a program at all: no inspector can cost less.
 * Raw tracepoints are reached the same way as the inspector's tp_btf ones, and need no BTF.
 */
#include <errno.h>
#include <linux/bpf.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int bpf(int command, union bpf_attr *attr)
{
	return syscall(SYS_bpf, command, attr, sizeof(*attr));
}

static int load(void)
{
	static const struct bpf_insn code[] = {
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0 },
		{ .code = BPF_JMP | BPF_EXIT },
	};
	union bpf_attr attr;

	memset(&attr, 0, sizeof(attr));
	attr.prog_type = BPF_PROG_TYPE_RAW_TRACEPOINT;
	attr.insns = (uintptr_t)code;
	attr.insn_cnt = sizeof(code) / sizeof(code[0]);
	attr.license = (uintptr_t) "GPL";
	return bpf(BPF_PROG_LOAD, &attr);
}

int main(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		union bpf_attr attr;

		memset(&attr, 0, sizeof(attr));
		attr.raw_tracepoint.name = (uintptr_t)argv[i];
		attr.raw_tracepoint.prog_fd = load();
		/* The descriptor is the attachment: it goes with the process. */
		if ((int)attr.raw_tracepoint.prog_fd < 0 || bpf(BPF_RAW_TRACEPOINT_OPEN, &attr) < 0) {
			fprintf(stderr, "empty: %s: %s\n", argv[i], strerror(errno));
			return 1;
		}
	}
	puts("{\"ready\":true}");
	fflush(stdout);
	while (getchar() != EOF)
		;
	return 0;
}
