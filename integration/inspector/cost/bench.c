/*
 * bench DIR: times single operations on files in DIR, at the command of its standard input.
 *
 * A line "OP BATCHES MICROSECONDS" is answered by one line: the nanoseconds of CPU time that one OP
 * took in the fastest of BATCHES batches of about MICROSECONDS each. CPU time of the thread, not time of day, as the
 * machine has other work; the fastest batch, as interrupts and cold caches only ever add.
 * "count OP N" does OP exactly N times and answers "done": for those who count events.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 16 };

static int file, pipe_ends[2], sockets[2];
static char page[PAGE];

static void die(const char *what)
{
	fprintf(stderr, "bench: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void op_getppid(void)
{
	syscall(SYS_getppid);
}

static void op_pread(void)
{
	if (pread(file, page, PAGE, 0) != PAGE)
		die("pread");
}

static void op_stat(void)
{
	struct stat stat_of;

	if (stat("file", &stat_of))
		die("stat");
}

static void op_open(void)
{
	int fd = open("file", O_RDONLY);

	if (fd < 0)
		die("open");
	close(fd);
}

static void op_pwrite(void)
{
	static unsigned int n;

	if (pwrite(file, page, PAGE, (off_t)(n++ % PAGES) * PAGE) != PAGE)
		die("pwrite");
}

static void op_create(void)
{
	int fd = open("new", O_RDWR | O_CREAT | O_EXCL, 0600);

	if (fd < 0)
		die("create");
	if (write(fd, page, PAGE) != PAGE)
		die("write");
	close(fd);
	if (unlink("new"))
		die("unlink");
}

/* Ever more files; for those who count. */
static void op_create_only(void)
{
	static unsigned int n;
	char name[32];
	int fd;

	snprintf(name, sizeof(name), "new-%u", n++);
	fd = open(name, O_RDWR | O_CREAT | O_EXCL, 0600);
	if (fd < 0)
		die("create");
	close(fd);
}

static void map(int flags, int fd, int store)
{
	char *memory = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, flags, fd, 0);

	if (memory == MAP_FAILED)
		die("mmap");
	if (store)
		*(volatile char *)memory = 1;
	if (munmap(memory, PAGE))
		die("munmap");
}

static void op_map_anon(void)
{
	map(MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static void op_map_anon_store(void)
{
	map(MAP_PRIVATE | MAP_ANONYMOUS, -1, 1);
}

static void op_map_shared(void)
{
	map(MAP_SHARED, file, 0);
}

static void op_map_shared_store(void)
{
	map(MAP_SHARED, file, 1);
}

static void move_byte(int to, int from)
{
	char byte = 0;

	if (write(to, &byte, 1) != 1 || read(from, &byte, 1) != 1)
		die("write, read");
}

static void op_pipe(void)
{
	move_byte(pipe_ends[1], pipe_ends[0]);
}

static void op_socket(void)
{
	move_byte(sockets[0], sockets[1]);
}

static const struct {
	const char *name;
	void (*run)(void);
} OPS[] = {
	{ "getppid", op_getppid },
	{ "pread4k", op_pread },
	{ "stat", op_stat },
	{ "open+close", op_open },
	{ "pwrite4k", op_pwrite },
	{ "create+write+unlink", op_create },
	{ "create", op_create_only },
	{ "pipe write+read", op_pipe },
	{ "socket write+read", op_socket },
	{ "mmap+munmap", op_map_anon },
	{ "mmap+store+munmap", op_map_anon_store },
	{ "mmap+munmap shared", op_map_shared },
	{ "mmap+store+munmap shared", op_map_shared_store },
};

static double cpu_ns(void)
{
	struct timespec now;

	if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now))
		die("clock_gettime");
	return now.tv_sec * 1e9 + now.tv_nsec;
}

static double batch(void (*run)(void), long count)
{
	double start = cpu_ns();

	for (long i = 0; i < count; i++)
		run();
	return (cpu_ns() - start) / count;
}

static void (*find(const char *name))(void)
{
	for (size_t i = 0; i < sizeof(OPS) / sizeof(OPS[0]); i++)
		if (!strcmp(OPS[i].name, name))
			return OPS[i].run;
	fprintf(stderr, "bench: no such operation: %s\n", name);
	exit(1);
}

static double fastest(const char *name, long batches, double microseconds)
{
	void (*run)(void) = find(name);
	double best = batch(run, 10);
	long count = (long)(microseconds * 1e3 / best) + 1;

	best = 1e18;
	for (long i = 0; i < batches; i++) {
		double took = batch(run, count);

		if (took < best)
			best = took;
	}
	return best;
}

int main(int argc, char **argv)
{
	char line[128], name[64];
	double microseconds;
	long batches;

	if (argc != 2 || chdir(argv[1]))
		die("usage: bench DIR");
	file = open("file", O_RDWR | O_CREAT, 0600);
	if (file < 0)
		die("file");
	if (pipe(pipe_ends) || socketpair(AF_UNIX, SOCK_STREAM, 0, sockets))
		die("pipe, socketpair");
	for (int i = 0; i < PAGES; i++)
		op_pwrite();
	while (fgets(line, sizeof(line), stdin)) {
		if (sscanf(line, "count %63[^\t]\t%ld", name, &batches) == 2) {
			for (void (*run)(void) = find(name); batches; batches--)
				run();
			puts("done");
		} else if (sscanf(line, "%63[^\t]\t%ld\t%lf", name, &batches, &microseconds) == 3) {
			printf("%.2f\n", fastest(name, batches, microseconds));
		} else {
			fprintf(stderr, "bench: not understood: %s", line);
			return 1;
		}
		fflush(stdout);
	}
	return 0;
}
