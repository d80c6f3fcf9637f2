"""The system calls that a confined Python may make, as a seccomp filter: all others fail with a PermissionError.

Missing on purpose: fork, clone and exec, sockets, kill and its kin, ptrace, mount, namespaces, keyrings, bpf, io_uring,
memfd.
"""

from __future__ import annotations

import os
import struct

#: {call: (number on x86-64, number on arm64)}; -1: that machine has no such call.
ALLOWED: dict[str, tuple[int, int]] = {
    "read": (0, 63), "write": (1, 64), "open": (2, -1), "close": (3, 57), "stat": (4, -1), "fstat": (5, 80),
    "lstat": (6, -1), "poll": (7, -1), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215),
    "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66), "access": (21, -1),
    "pipe": (22, -1), "select": (23, -1), "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233),
    "dup": (32, 23), "dup2": (33, -1), "nanosleep": (35, 101), "getitimer": (36, 102), "alarm": (37, -1),
    "setitimer": (38, 103), "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160), "fsync": (74, 82),
    "fdatasync": (75, 83), "truncate": (76, 45), "ftruncate": (77, 46),
    "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "rename": (82, -1), "mkdir": (83, -1), "rmdir": (84, -1),
    "creat": (85, -1), "link": (86, -1), "unlink": (87, -1), "symlink": (88, -1), "readlink": (89, -1), "chmod": (90, -1),
    "fchmod": (91, 52), "umask": (95, 166), "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165),
    "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "getppid": (110, 173), "sigaltstack": (131, 132), "statfs": (137, 43), "fstatfs": (138, 44),
    "gettid": (186, 178), "time": (201, -1), "futex": (202, 98), "sched_getaffinity": (204, 123), "getdents64": (217, 61),
    "restart_syscall": (219, 128), "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115),
    "exit_group": (231, 94), "openat": (257, 56), "mkdirat": (258, 34), "newfstatat": (262, 79), "unlinkat": (263, 35),
    "renameat": (264, 38), "linkat": (265, 37), "symlinkat": (266, 36), "readlinkat": (267, 78), "fchmodat": (268, 53),
    "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73), "utimensat": (280, 88), "dup3": (292, 24),
    "pipe2": (293, 59), "renameat2": (316, 276), "getrandom": (318, 278), "statx": (332, 291), "faccessat2": (439, 439)}
#: Allowed with some commands only: copies and flags of descriptors (F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL,
#: F_DUPFD_CLOEXEC), but no lock and no lease, which files outside could be held with.
FCNTL, FCNTL_COMMANDS = (72, 25), (0, 1, 2, 3, 4, 1030)
#: AUDIT_ARCH of the kernel's table, its column above, and the first number of a second table that is never used.
_MACHINES = {"x86_64": (0xC000003E, 0, 0x40000000), "aarch64": (0xC00000B7, 1, 0x40000000)}
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
# "permission denied": Python takes it as a reason to try another way where it has one
_ALLOW, _KILL, _DENY = 0x7FFF0000, 0x80000000, 0x00050000 | 13


def program(machine: str | None = None) -> bytes:
    """The filter for a machine (this one by default), BPF instructions of 8 bytes."""
    arch, column, foreign = _MACHINES[machine or os.uname().machine]
    numbers = sorted(numbers[column] for numbers in ALLOWED.values() if numbers[column] >= 0)

    def step(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, true, false, value)

    # struct seccomp_data: the number at 0, the architecture at 4, the low half of the second argument at 24
    head = [step(_LOAD, 4), step(_EQUAL, arch, 1, 0), step(_RETURN, _KILL), step(_LOAD, 0),
            # the x32 table has the same architecture
            step(_AT_LEAST, foreign, 0, 1), step(_RETURN, _KILL)]
    # one test each, then those of fcntl, then the two ends: a jump counts the steps that it leaves out
    commands = len(FCNTL_COMMANDS)
    tests = [step(_EQUAL, number, len(numbers) - at + commands + 2, 0) for at, number in enumerate(numbers)]
    tests += [step(_EQUAL, FCNTL[column], 0, commands + 1), step(_LOAD, 24)]
    tests += [step(_EQUAL, command, commands - at, 0) for at, command in enumerate(FCNTL_COMMANDS)]
    return b"".join([*head, *tests, step(_RETURN, _DENY), step(_RETURN, _ALLOW)])
