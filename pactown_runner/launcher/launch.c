/*
 * launch - the only place where privileges go away.
 *
 * Theory of operation
 * -------------------
 *
 *     supervisor (root) --vfork+execve--> launch, parent half (root) --clone3--> launch, child half --execve--> program
 *
 *     launch <spec_fd> <status_fd> <cgroup_fd | -1> [<member_fd>]
 *
 * Who runs as whom. The parent half runs as the supervisor and does nothing but read the spec, make one child
 * and exit. The child is made with CLONE_PARENT: it is the supervisor's own child, which the supervisor waits
 * for. With CLONE_INTO_CGROUP it is born in the leaf of its sandbox: nothing of it was ever elsewhere, and
 * nothing had to be moved (a move waits for RCU, 20 ms). Where a container's filter refuses clone3, the child
 * joins by writing to cgroup.procs before it does anything else, and the records say so. The child half
 * begins as the supervisor's user and ends as the tenant, by the steps in `child_half`, whose order matters:
 *   - what needs privilege comes before `setresuid` (dropping from the bounding set needs CAP_SETPCAP,
 *     oom_score_adj and rlimits may need CAP_SYS_RESOURCE, namespaces need CAP_SYS_ADMIN);
 *   - groups before gid before uid, since each needs what the next one gives up;
 *   - what touches paths that a tenant can change comes after it, so that the tenant's own permissions
 *     decide;
 *   - what holds is read back from the kernel last, when nothing is left to change, and only then reported.
 *
 * Which descriptors. 0, 1 and 2 are the program's own and are not touched. `spec_fd` is a memfd with the spec
 * (see `struct spec`), `status_fd` the write end of a pipe, `cgroup_fd` the leaf's directory, `member_fd` a
 * pidfd of a process whose namespaces are joined, where the spec asks for some, instead of new ones. All of
 * them, and whatever else was inherited, become close-on-exec before the program is executed: it gets 0, 1, 2
 * and no others.
 *
 * What is reported. Records on `status_fd`, each one write of at most PIPE_BUF bytes, hence atomic; the two
 * halves write independently, so PID may come after REPORT.
 *   PID     parent half: the child's pid and how it was placed.
 *   REPORT  child half: what holds, read back. `execve` follows at once.
 *   FAILED  either half: the step that failed and its errno. The writer exits with 127.
 * A successful `execve` closes the pipe, so REPORT and then end-of-file means started. End-of-file without
 * REPORT means that the child was killed on the way.
 *
 * What it never does. It has no libc, no environment of its own (the program's is data in the spec, which
 * only `execve` sees), and no fallback: a step that cannot be done ends the start, except where the spec or a
 * comment below says otherwise. In user mode (an unprivileged supervisor) the steps that need privilege are
 * left out, the rest stays.
 *
 * Why without libc: start-up is most of its cost. posix_spawn to exit takes 0.54 ms for an empty static glibc
 * program, 0.17 for one like this.
 */

#include <asm/unistd.h>
#include <linux/errno.h>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int s32;

#define NULL ((void *)0)

/* Numbers and flags newer than the headers of some build hosts; both architectures share them. */
#ifndef __NR_clone3
#define __NR_clone3 435
#endif
#ifndef __NR_close_range
#define __NR_close_range 436
#endif
#define CLONE_PARENT 0x00008000ULL
#define CLONE_INTO_CGROUP 0x200000000ULL
#define CLONE_NEWUTS 0x04000000UL
#define CLONE_NEWIPC 0x08000000UL
#define CLONE_NEWNET 0x40000000UL
#define CLOSE_RANGE_CLOEXEC 4

#define AT_FDCWD (-100)
#define O_WRONLY 1
#define O_CLOEXEC 02000000
#define SIGKILL 9
#define SIGSTOP 19
#define NSIG 64
#define SIG_SETMASK 2
#define PRIO_PROCESS 0
#define SCHED_OTHER 0
#define IOPRIO_WHO_PROCESS 1
#define KEYCTL_JOIN_SESSION_KEYRING 1
#define PR_CAPBSET_READ 23
#define PR_CAPBSET_DROP 24
#define PR_SET_NO_NEW_PRIVS 38
#define PR_GET_NO_NEW_PRIVS 39
#define PR_CAP_AMBIENT 47
#define PR_CAP_AMBIENT_IS_SET 1
#define PR_CAP_AMBIENT_CLEAR_ALL 4
#define CAPABILITY_VERSION_3 0x20080522
#define AF_INET 2
#define SOCK_DGRAM 2
#define SOCK_CLOEXEC 02000000
#define SIOCGIFFLAGS 0x8913
#define SIOCSIFFLAGS 0x8914
#define IFF_UP 1
/* PIPE_BUF, less room for the other records: nobody reads before the pipe has ended, and it may hold two
 * pages only. */
#define REPORT_MAX (4096 - 96)
#define PATH_MAX 4096
#define MAX_GROUPS 256
#define NO_ID 0xffffffffU /* to setresuid this means "leave it as it is" */

/* The spec: this header, then `rlimits` rlimits, then room for the pointers of argv and env (each
 * NULL-terminated), filled in here, then strings, each NUL-terminated: directories, argv, env, and the PATH
 * to search. Little-endian, as are both architectures that this program is built for. The Python side is
 * spec.py. */

#define SPEC_MAGIC 0x4e4c5450 /* "PTLN" */
#define SPEC_VERSION 1
#define SPEC_MAX (16 << 20)
#define FLAG_ROOT 1
#define FLAG_OOM_SCORE_ADJ 2
#define FLAG_NEW_NET 4
#define FLAG_NEW_IPC 8
#define FLAG_NEW_UTS 16
#define FLAG_FORCE_JOIN 32

struct spec {
	u32 magic, version;
	u32 size; /* of the whole spec, in bytes */
	u32 flags;
	u32 uid, gid;
	s32 nice, oom_score_adj;
	u32 rlimits, directories, argc, envc;
};

struct spec_rlimit {
	u64 resource, soft, hard;
};

/* A directory's string begins with the letter that says what to do. Each is relative to the one before it. */
#define DIRECTORY_ENTER '='
#define DIRECTORY_MAKE_AND_ENTER '+'

/* The Python side, status.py, names them in the same order. */
enum step {
	STEP_SPEC,
	STEP_CLONE3,
	STEP_JOIN,
	STEP_SETSID,
	STEP_KEYRING,
	STEP_SIGNALS,
	STEP_PRIORITY,
	STEP_OOM_SCORE_ADJ,
	STEP_RLIMITS,
	STEP_NAMESPACES,
	STEP_BOUNDING,
	STEP_SETGROUPS,
	STEP_SETRESGID,
	STEP_SETRESUID,
	STEP_CAPABILITIES,
	STEP_REGAIN,
	STEP_NO_NEW_PRIVS,
	STEP_DIRECTORIES,
	STEP_CLOSE_RANGE,
	STEP_READBACK,
	STEP_EXECVE,
};

#define RECORD_PID 1
#define RECORD_REPORT 2
#define RECORD_FAILED 3

enum placement { PLACED_NOT, PLACED_BORN, PLACED_JOINED };

struct pid_record {
	u32 type, size;
	s32 pid;
	u32 placement;
};

struct failed_record {
	u32 type, size;
	s32 pid; /* of the child, 0 if the parent half failed */
	u32 step;
	s32 error;
	u32 detail; /* which rlimit or directory, counted from 0 */
};

#define REPORT_NO_NEW_PRIVS 1
#define REPORT_CGROUP_KNOWN 2

struct report_record {
	u32 type, size;
	s32 pid;
	u32 placement;
	u32 uid[4], gid[4]; /* real, effective, saved, file system */
	u64 inheritable, permitted, effective, bounding, ambient;
	u32 flags, namespaces; /* REPORT_*, and FLAG_NEW_* of the spec */
	s32 keyring_error;
	u32 groups, cgroup_size;
	u32 padding;
	/* then groups (u32 each), then the cgroup's path */
};

struct launch {
	struct spec *spec;
	struct spec_rlimit *rlimits;
	char *directories;
	char **argv, **env;
	char *path;
	s32 status_fd, cgroup_fd, member_fd;
	s32 pid;
	enum placement placement;
	s32 keyring_error;
};

/* ---- the machine ---- */

#if defined(__x86_64__)

__asm__(".globl _start\n"
	"_start:\n"
	"	xor %ebp, %ebp\n"
	"	mov %rsp, %rdi\n"
	"	and $-16, %rsp\n"
	"	call launch_main\n"
	"	hlt\n");

static long system_call(long number, long a, long b, long c, long d, long e)
{
	long result;
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
			 : "rcx", "r11", "memory");
	return result;
}

#elif defined(__aarch64__) && defined(__AARCH64EL__)

__asm__(".globl _start\n"
	"_start:\n"
	"	mov x29, #0\n"
	"	mov x30, #0\n"
	"	mov x0, sp\n"
	"	bl launch_main\n"
	"	brk #0\n");

static long system_call(long number, long a, long b, long c, long d, long e)
{
	register long x8 __asm__("x8") = number;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	__asm__ volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4) : "memory");
	return x0;
}

#else
#error "launch.c knows x86-64 and little-endian arm64"
#endif

/* A system call's result, or a negated errno. */
static int call(long number, long a, long b, long c, long d, long e)
{
	return (int)system_call(number, a, b, c, d, e);
}

#define call5(name, a, b, c, d, e) call(__NR_##name, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e))
#define call4(name, a, b, c, d) call5(name, a, b, c, d, 0)
#define call3(name, a, b, c) call5(name, a, b, c, 0, 0)
#define call2(name, a, b) call5(name, a, b, 0, 0, 0)
#define call1(name, a) call5(name, a, 0, 0, 0, 0)
#define call0(name) call5(name, 0, 0, 0, 0, 0)

/* The compiler may call these even when told that there is no libc. */
void *memset(void *to, int byte, unsigned long size)
{
	volatile u8 *p = to; /* volatile, lest the loop become a call to memset */
	while (size--)
		*p++ = (u8)byte;
	return to;
}

void *memcpy(void *to, const void *from, unsigned long size)
{
	volatile u8 *p = to;
	const u8 *q = from;
	while (size--)
		*p++ = *q++;
	return to;
}

static _Noreturn void leave(int code)
{
	for (;;)
		call1(exit_group, code);
}

static unsigned long length_of(const char *text)
{
	const char *p = text;
	while (*p)
		p++;
	return (unsigned long)(p - text);
}

static _Noreturn void fail(const struct launch *launch, enum step step, long result, u32 detail)
{
	struct failed_record record = {
		.type = RECORD_FAILED,
		.size = sizeof record,
		.pid = launch->pid,
		.step = step,
		.error = (s32)-result,
		.detail = detail,
	};
	call3(write, launch->status_fd, &record, sizeof record);
	leave(127);
}

static void must(const struct launch *launch, enum step step, long result)
{
	if (result < 0)
		fail(launch, step, result, 0);
}

/* ---- the parent half ---- */

/* Bytes beyond the spec would be read by nobody, strings beyond it by everybody: each walk stays within
 * `end`, and the last byte is NUL. */
static char *take_strings(const struct launch *launch, char *p, const char *end, u32 count, char **pointers)
{
	for (u32 i = 0; i < count; i++) {
		if (p >= end)
			fail(launch, STEP_SPEC, -EINVAL, 0);
		if (pointers)
			pointers[i] = p;
		p += length_of(p) + 1;
	}
	return p;
}

static void check_identity(const struct launch *launch)
{
	const struct spec *spec = launch->spec;
	if (spec->flags & FLAG_ROOT) {
		/* A supervisor's mistake must not become a tenant with uid 0, or one that keeps the
		 * supervisor's. */
		if (spec->uid == 0 || spec->gid == 0 || spec->uid == NO_ID || spec->gid == NO_ID)
			fail(launch, STEP_SPEC, -EPERM, 0);
	} else if (call0(geteuid) == 0) {
		fail(launch, STEP_SPEC, -EPERM, 0);
	}
}

static void read_spec(struct launch *launch, s32 spec_fd)
{
	/* Untouched pages of .bss cost nothing, so that one read serves a spec of any size. */
	static char room[SPEC_MAX] __attribute__((aligned(8)));
	struct spec *header = (struct spec *)room;
	long got = call4(pread64, spec_fd, room, sizeof room, 0);
	must(launch, STEP_SPEC, got);
	if (got < (long)sizeof *header || header->magic != SPEC_MAGIC || header->version != SPEC_VERSION ||
	    header->size != (u32)got || header->argc == 0)
		fail(launch, STEP_SPEC, -EINVAL, 0);
	launch->spec = header;

	u64 pointers = ((u64)header->argc + 1 + header->envc + 1) * sizeof(char *);
	u64 strings = sizeof *header + header->rlimits * (u64)sizeof(struct spec_rlimit) + pointers;
	char *p = room + strings;
	char *end = room + got;
	if (strings >= (u64)got || end[-1] != 0)
		fail(launch, STEP_SPEC, -EINVAL, 0);

	launch->rlimits = (struct spec_rlimit *)(header + 1);
	launch->argv = (char **)(launch->rlimits + header->rlimits);
	launch->env = launch->argv + header->argc + 1;
	launch->directories = p;
	p = take_strings(launch, p, end, header->directories, NULL);
	p = take_strings(launch, p, end, header->argc, launch->argv);
	p = take_strings(launch, p, end, header->envc, launch->env);
	launch->path = p;
	if (take_strings(launch, p, end, 1, NULL) != end)
		fail(launch, STEP_SPEC, -EINVAL, 0);
	check_identity(launch);
}

/* What filters in containers answer for a system call that they do not know or do not want, and old kernels
 * for flags that they lack. A cgroup's own refusals are others: EAGAIN (pids.max), EBUSY (it has controllers
 * enabled), EOPNOTSUPP, ENODEV (it was removed), EACCES. */
static int is_filtered(long result)
{
	return result == -ENOSYS || result == -EPERM || result == -EINVAL || result == -E2BIG;
}

/* The child's pid in the parent half, 0 in the child half. With CLONE_PARENT the signal at exit is the
 * launcher's own, that is SIGCHLD to the supervisor; naming one here is EINVAL. */
static s32 make_child(struct launch *launch)
{
	struct {
		u64 flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size;
		u64 cgroup;
	} arguments = { .flags = CLONE_PARENT | CLONE_INTO_CGROUP, .cgroup = (u64)launch->cgroup_fd };
	long result;

	if (launch->cgroup_fd >= 0) {
		launch->placement = PLACED_BORN;
		result = call2(clone3, &arguments, sizeof arguments);
		if (result >= 0)
			return (s32)result;
		if (!is_filtered(result))
			fail(launch, STEP_CLONE3, result, 0);
		launch->placement = PLACED_JOINED;
	}
	result = call5(clone, CLONE_PARENT, 0, 0, 0, 0);
	must(launch, STEP_CLONE3, result);
	return (s32)result;
}

/* ---- the child half, step by step ---- */

static void join_cgroup(const struct launch *launch)
{
	if (launch->placement != PLACED_JOINED)
		return;
	long fd = call4(openat, launch->cgroup_fd, "cgroup.procs", O_WRONLY | O_CLOEXEC, 0);
	must(launch, STEP_JOIN, fd);
	must(launch, STEP_JOIN, call3(write, fd, "0", 1));
	call1(close, fd);
}

/* A session keyring is inherited, setsid or not, and what it holds with it. Filters of containers commonly
 * refuse keyctl, and a tenant cannot use it under them either: tolerated, and reported. */
static void new_keyring(struct launch *launch)
{
	long result = call2(keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL);
	if (result >= 0)
		return;
	if ((launch->spec->flags & FLAG_ROOT) && result != -ENOSYS && result != -EPERM && result != -EACCES)
		fail(launch, STEP_KEYRING, result, 0);
	launch->keyring_error = (s32)-result;
}

/* Ignored signals stay ignored over execve; CPython restores only SIGPIPE and SIGXFSZ. */
static void reset_signals(const struct launch *launch)
{
	struct {
		u64 handler, flags, restorer, mask;
	} standard = { 0 };
	u64 none = 0;
	for (int number = 1; number <= NSIG; number++)
		if (number != SIGKILL && number != SIGSTOP)
			must(launch, STEP_SIGNALS, call4(rt_sigaction, number, &standard, NULL, sizeof none));
	must(launch, STEP_SIGNALS, call4(rt_sigprocmask, SIG_SETMASK, &none, NULL, sizeof none));
}

/* In user mode a supervisor that was made nicer cannot undo it, nor can its children. */
static void reset_priority(const struct launch *launch)
{
	int root = launch->spec->flags & FLAG_ROOT;
	s32 parameter = 0;
	long result = call3(sched_setscheduler, 0, SCHED_OTHER, &parameter);
	if (result >= 0)
		result = call3(setpriority, PRIO_PROCESS, 0, launch->spec->nice);
	if (result < 0 && root)
		fail(launch, STEP_PRIORITY, result, 0);
	result = call3(ioprio_set, IOPRIO_WHO_PROCESS, 0, 0);
	if (result < 0 && result != -ENOSYS && root)
		fail(launch, STEP_PRIORITY, result, 0);
}

static void set_oom_score_adj(const struct launch *launch)
{
	if (!(launch->spec->flags & FLAG_OOM_SCORE_ADJ))
		return;
	char text[12];
	char *p = text + sizeof text;
	s32 value = launch->spec->oom_score_adj;
	u32 rest = value < 0 ? -(u32)value : (u32)value;
	do
		*--p = (char)('0' + rest % 10);
	while (rest /= 10);
	if (value < 0)
		*--p = '-';
	long fd = call4(openat, AT_FDCWD, "/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC, 0);
	must(launch, STEP_OOM_SCORE_ADJ, fd);
	must(launch, STEP_OOM_SCORE_ADJ, call3(write, fd, p, text + sizeof text - p));
	call1(close, fd);
}

/* A hard limit can be raised only with CAP_SYS_RESOURCE, which root in a container often lacks. What is asked
 * for is an upper bound, so the lower one that is in force already serves. */
static void set_rlimits(const struct launch *launch)
{
	for (u32 i = 0; i < launch->spec->rlimits; i++) {
		const struct spec_rlimit *wanted = &launch->rlimits[i];
		u64 now[2];
		u64 limit[2] = { wanted->soft, wanted->hard };
		long result = call4(prlimit64, 0, wanted->resource, limit, NULL);
		if (result == -EPERM && call4(prlimit64, 0, wanted->resource, NULL, now) == 0) {
			limit[1] = limit[1] < now[1] ? limit[1] : now[1];
			limit[0] = limit[0] < limit[1] ? limit[0] : limit[1];
			result = call4(prlimit64, 0, wanted->resource, limit, NULL);
		}
		if (result < 0)
			fail(launch, STEP_RLIMITS, result, i);
	}
}

static void enter_namespaces(const struct launch *launch)
{
	u32 flags = launch->spec->flags;
	unsigned long wanted = 0;
	wanted |= flags & FLAG_NEW_NET ? CLONE_NEWNET : 0;
	wanted |= flags & FLAG_NEW_IPC ? CLONE_NEWIPC : 0;
	wanted |= flags & FLAG_NEW_UTS ? CLONE_NEWUTS : 0;
	if (!wanted)
		return;
	if (launch->member_fd >= 0) {
		/* All of them or none, setns(2). They are never the host's: a tenant's process leaves those that it
		 * was born in for none but such as it made itself. */
		must(launch, STEP_NAMESPACES, call2(setns, launch->member_fd, wanted));
		return;
	}
	must(launch, STEP_NAMESPACES, call1(unshare, wanted));
	if (!(flags & FLAG_NEW_NET))
		return;
	/* A new network namespace has a loopback device that is down: without it 127.0.0.1 is unreachable. */
	struct {
		char name[16];
		u16 flags;
		u8 rest[22];
	} device = { .name = "lo" };
	long fd = call3(socket, AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	must(launch, STEP_NAMESPACES, fd);
	must(launch, STEP_NAMESPACES, call3(ioctl, fd, SIOCGIFFLAGS, &device));
	device.flags |= IFF_UP;
	must(launch, STEP_NAMESPACES, call3(ioctl, fd, SIOCSIFFLAGS, &device));
	call1(close, fd);
}

/* EINVAL is how the kernel says that it knows no capability of that number, nor a higher one. */
static void drop_bounding(const struct launch *launch)
{
	int root = launch->spec->flags & FLAG_ROOT;
	for (int capability = 0; capability < 64; capability++) {
		long result = call5(prctl, PR_CAPBSET_DROP, capability, 0, 0, 0);
		if (result == -EINVAL)
			break;
		if (result < 0 && root)
			fail(launch, STEP_BOUNDING, result, (u32)capability);
		if (result < 0)
			break;
	}
	must(launch, STEP_BOUNDING, call5(prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0));
}

/* In user mode real, effective and saved ids all become the effective ones, which needs no privilege. */
static void drop_ids(const struct launch *launch)
{
	u32 uid = launch->spec->uid;
	u32 gid = launch->spec->gid;
	if (launch->spec->flags & FLAG_ROOT) {
		must(launch, STEP_SETGROUPS, call2(setgroups, 0, NULL));
	} else {
		uid = (u32)call0(geteuid);
		gid = (u32)call0(getegid);
	}
	must(launch, STEP_SETRESGID, call3(setresgid, gid, gid, gid));
	must(launch, STEP_SETRESUID, call3(setresuid, uid, uid, uid));
}

struct capability_header {
	u32 version;
	s32 pid;
};

struct capability_data {
	u32 effective, permitted, inheritable;
};

/* setresuid empties them only if a uid was 0 before, and never the inheritable set. */
static void drop_capabilities(const struct launch *launch)
{
	struct capability_header header = { CAPABILITY_VERSION_3, 0 };
	struct capability_data none[2] = { { 0 }, { 0 } };
	must(launch, STEP_CAPABILITIES, call2(capset, &header, none));
}

/* Each way that could lead back is tried. A success of any of them is the failure of this step. */
static void prove_no_way_back(const struct launch *launch)
{
	u32 zero = 0;
	int back = call3(setresuid, 0, 0, 0) == 0 || call3(setresuid, -1, 0, -1) == 0 || call1(setuid, 0) == 0 ||
		   call2(setreuid, 0, 0) == 0 || call2(setgroups, 1, &zero) == 0 || call2(setgroups, 0, NULL) == 0;
	call1(setfsuid, 0);
	back |= call1(setfsuid, -1) == 0;
	/* An unprivileged user whose own group is 0 loses nothing by keeping it. */
	if ((launch->spec->flags & FLAG_ROOT) || call0(getegid) != 0) {
		back |= call3(setresgid, 0, 0, 0) == 0 || call1(setgid, 0) == 0 || call2(setregid, 0, 0) == 0;
		call1(setfsgid, 0);
		back |= call1(setfsgid, -1) == 0;
	}
	if (back)
		fail(launch, STEP_REGAIN, -EPERM, 0);
}

static void enter_directories(const struct launch *launch)
{
	const char *p = launch->directories;
	/* Where the supervisor stands may lie below a directory that the tenant could never have entered. */
	must(launch, STEP_DIRECTORIES, call1(chdir, "/"));
	for (u32 i = 0; i < launch->spec->directories; i++) {
		if (*p == DIRECTORY_MAKE_AND_ENTER) {
			long result = call3(mkdirat, AT_FDCWD, p + 1, 0700);
			if (result < 0 && result != -EEXIST)
				fail(launch, STEP_DIRECTORIES, result, i);
		} else if (*p != DIRECTORY_ENTER) {
			fail(launch, STEP_SPEC, -EINVAL, 0);
		}
		long result = call1(chdir, p + 1);
		if (result < 0)
			fail(launch, STEP_DIRECTORIES, result, i);
		p += length_of(p) + 1;
	}
}

/* ---- reading back ---- */

static char scratch[16384];

/* The size of the path in the line `0::PATH` of /proc/self/cgroup, copied to `to`, or -1 if that cannot be told. */
static int read_cgroup(char *to, u32 room)
{
	u32 size = 0;
	int got;
	int fd = call4(openat, AT_FDCWD, "/proc/self/cgroup", O_CLOEXEC, 0);
	if (fd < 0)
		return -1;
	do {
		got = call3(read, fd, scratch + size, sizeof scratch - size);
		size += got > 0 ? (u32)got : 0;
	} while (got > 0);
	call1(close, fd);
	for (u32 line = 0, end; line < size; line = end + 1) {
		for (end = line; end < size && scratch[end] != '\n'; end++)
			;
		if (end - line < 4 || scratch[line] != '0' || scratch[line + 1] != ':' || scratch[line + 2] != ':')
			continue;
		line += 3;
		if (end == size || end - line > room)
			return -1;
		memcpy(to, scratch + line, end - line);
		return (int)(end - line);
	}
	return -1;
}

static void read_capabilities(const struct launch *launch, struct report_record *report)
{
	struct capability_header header = { CAPABILITY_VERSION_3, 0 };
	struct capability_data data[2];
	must(launch, STEP_READBACK, call2(capget, &header, data));
	report->inheritable = data[0].inheritable | (u64)data[1].inheritable << 32;
	report->permitted = data[0].permitted | (u64)data[1].permitted << 32;
	report->effective = data[0].effective | (u64)data[1].effective << 32;
	for (int capability = 0; capability < 64; capability++) {
		long bounding = call5(prctl, PR_CAPBSET_READ, capability, 0, 0, 0);
		if (bounding == -EINVAL)
			break;
		must(launch, STEP_READBACK, bounding);
		report->bounding |= (u64)(bounding != 0) << capability;
		/* "No capability can ever be ambient if it is not both permitted and inheritable", capabilities(7). As a rule
		 * that spares 41 system calls. */
		if (!((report->permitted & report->inheritable) >> capability & 1))
			continue;
		long ambient = call5(prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, capability, 0, 0);
		must(launch, STEP_READBACK, ambient);
		report->ambient |= (u64)(ambient != 0) << capability;
	}
}

/* The kernel's answers must be what was asked for, or nothing is executed. */
static void check_report(const struct launch *launch, const struct report_record *report)
{
	int root = launch->spec->flags & FLAG_ROOT;
	int good = (report->flags & REPORT_NO_NEW_PRIVS) && !(report->inheritable | report->permitted | report->effective) &&
		   !report->ambient;
	u32 uid = root ? launch->spec->uid : report->uid[1];
	u32 gid = root ? launch->spec->gid : report->gid[1];
	for (int i = 0; i < 4; i++)
		good = good && report->uid[i] == uid && report->gid[i] == gid;
	if (root)
		good = good && !report->bounding && !report->groups;
	if (!good || uid == 0)
		fail(launch, STEP_READBACK, -EPERM, 0);
}

static void report(const struct launch *launch)
{
	union {
		struct report_record record;
		char bytes[REPORT_MAX];
	} out;
	struct report_record *record = &out.record;
	memset(record, 0, sizeof *record);
	record->type = RECORD_REPORT;
	record->pid = launch->pid;
	record->placement = launch->placement;
	record->keyring_error = launch->keyring_error;
	record->namespaces = launch->spec->flags & (FLAG_NEW_NET | FLAG_NEW_IPC | FLAG_NEW_UTS);
	must(launch, STEP_READBACK, call3(getresuid, &record->uid[0], &record->uid[1], &record->uid[2]));
	must(launch, STEP_READBACK, call3(getresgid, &record->gid[0], &record->gid[1], &record->gid[2]));
	record->uid[3] = (u32)call1(setfsuid, -1);
	record->gid[3] = (u32)call1(setfsgid, -1);
	read_capabilities(launch, record);
	if (call5(prctl, PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1)
		record->flags |= REPORT_NO_NEW_PRIVS;

	u32 size = sizeof *record;
	int groups = call2(getgroups, MAX_GROUPS, out.bytes + size);
	must(launch, STEP_READBACK, groups);
	record->groups = (u32)groups;
	size += record->groups * (u32)sizeof(u32);
	int cgroup = read_cgroup(out.bytes + size, (u32)sizeof out - size);
	if (cgroup >= 0) {
		record->flags |= REPORT_CGROUP_KNOWN;
		record->cgroup_size = (u32)cgroup;
		size += (u32)cgroup;
	}
	record->size = size;
	check_report(launch, record);
	/* SIGPIPE, which is no longer ignored, ends the child if the supervisor is gone: nobody could watch
	 * the program. */
	if (call3(write, launch->status_fd, out.bytes, size) != (int)size)
		leave(127);
}

/* ---- execve ---- */

/* As execvp(3), except that a file which is no program is not handed to a shell: what was asked for is what
 * runs. */
static int execute(const struct launch *launch)
{
	const char *name = launch->argv[0];
	unsigned long name_size = length_of(name) + 1;
	int denied = 0;
	int result = -ENOENT;
	for (const char *p = name; *p; p++)
		if (*p == '/')
			return call3(execve, name, launch->argv, launch->env);
	if (!*name)
		return -ENOENT;
	for (const char *p = launch->path, *end;; p = end + 1) {
		for (end = p; *end && *end != ':'; end++)
			;
		unsigned long size = (unsigned long)(end - p);
		if (size + 1 + name_size <= PATH_MAX) {
			memcpy(scratch, p, size);
			scratch[size] = '/';
			/* An empty entry is the current directory. */
			memcpy(scratch + size + (size != 0), name, name_size);
			result = call3(execve, scratch, launch->argv, launch->env);
			if (result == -EACCES)
				denied = 1;
			else if (result != -ENOENT && result != -ENOTDIR && result != -ESTALE && result != -ENODEV &&
				 result != -ETIMEDOUT)
				return result;
		}
		if (!*end)
			return denied ? -EACCES : -ENOENT;
	}
}

static _Noreturn void child_half(struct launch *launch)
{
	launch->pid = call0(getpid);
	join_cgroup(launch);
	must(launch, STEP_SETSID, call0(setsid));
	new_keyring(launch);
	reset_signals(launch);
	reset_priority(launch);
	set_oom_score_adj(launch);
	set_rlimits(launch);
	enter_namespaces(launch);
	drop_bounding(launch);
	drop_ids(launch);
	drop_capabilities(launch);
	prove_no_way_back(launch);
	must(launch, STEP_NO_NEW_PRIVS, call5(prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	call1(umask, 077);
	enter_directories(launch);
	must(launch, STEP_CLOSE_RANGE, call3(close_range, 3, ~0U, CLOSE_RANGE_CLOEXEC));
	report(launch);
	fail(launch, STEP_EXECVE, execute(launch), 0);
}

/* A descriptor's number, -1 for "-1", -2 for what is neither. */
static s32 number_from(const char *text)
{
	s32 number = 0;
	if (text[0] == '-' && text[1] == '1' && !text[2])
		return -1;
	if (!*text)
		return -2;
	for (; *text; text++) {
		if (*text < '0' || *text > '9' || number > 100000000)
			return -2;
		number = number * 10 + (*text - '0');
	}
	return number;
}

_Noreturn void launch_main(const long *stack);

/* `stack` is as the kernel leaves it: argc, then the arguments. */
_Noreturn void launch_main(const long *stack)
{
	char **arguments = (char **)(stack + 1);
	struct launch launch = { 0 };
	s32 spec_fd;
	if (stack[0] != 4 && stack[0] != 5)
		leave(126);
	spec_fd = number_from(arguments[1]);
	launch.status_fd = number_from(arguments[2]);
	launch.cgroup_fd = number_from(arguments[3]);
	launch.member_fd = stack[0] == 5 ? number_from(arguments[4]) : -1;
	if (spec_fd < 3 || launch.status_fd < 3 || (launch.cgroup_fd != -1 && launch.cgroup_fd < 3) ||
	    (launch.member_fd != -1 && launch.member_fd < 3))
		leave(126);
	read_spec(&launch, spec_fd);

	s32 pid = make_child(&launch);
	if (pid == 0)
		child_half(&launch);
	struct pid_record record = { RECORD_PID, sizeof record, pid, launch.placement };
	call3(write, launch.status_fd, &record, sizeof record);
	leave(0);
}
