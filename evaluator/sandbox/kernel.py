"""Confine this process through the kernel: namespaces, a root of its own, no rights, limits, Landlock, seccomp.

Standard library only: it runs under ``python -s -S``. Every step raises ``Refused`` with the step's name where the kernel
says no, so that nothing goes on half confined. Linux 5.12 or newer on x86-64 or arm64.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys

#: "nobody": the id inside, and outside too where the evaluator runs as root.
NOBODY = 65534
#: The tmpfs that the program may write to, and what fits into it.
WORK, WORK_BYTES, WORK_FILES = "/sandbox", 8 << 20, 256

_CLONE_NEW = {"mount": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000,
              "pid": 0x20000000, "network": 0x40000000}
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1 << 5, 1 << 12, 1 << 14, 1 << 18
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_AT_FDCWD, _AT_RECURSIVE, _MNT_DETACH = -100, 0x8000, 2
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 24, 38, 22
_MACHINE = os.uname().machine
#: System calls without a function in libc.
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(_MACHINE, -1)
_MOUNT_SETATTR, _LANDLOCK = 442, (444, 445, 446)
#: Where shared libraries of the standard library lie, beside Python's own folders.
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store")
_libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """The kernel refused a step."""


def _try(step: str, result: int) -> int:
    if result < 0:
        raise Refused(f"{step}: {os.strerror(ctypes.get_errno())}")
    return result


def _syscall(number: int, *args: object) -> int:
    # a plain int would go in as 32 bits
    return _libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args])


def leave_namespaces() -> None:
    """Move to new user, mount, pid (for children), network, ipc, uts and cgroup namespaces; ids are mapped from outside."""
    if sys.platform != "linux" or _PIVOT_ROOT < 0:
        raise Refused(f"namespaces: not on {sys.platform} {_MACHINE}")
    _try("namespaces (unshare)", _libc.unshare(sum(_CLONE_NEW.values())))


def map_ids(pid: int) -> None:
    """Give the user namespace of another process its ids: nobody, and for root also root, which sets up and then leaves."""
    user, group = os.geteuid(), os.getegid()
    if user:
        maps = (("setgroups", "deny"), ("gid_map", f"{NOBODY} {group} 1"), ("uid_map", f"{NOBODY} {user} 1"))
    else:
        both = f"0 0 1\n{NOBODY} {NOBODY} 1"
        maps = (("gid_map", both), ("uid_map", both))
    for name, content in maps:
        try:
            with open(f"/proc/{pid}/{name}", "w") as file:
                file.write(content)
        except OSError as error:
            raise Refused(f"user namespace ({name}): {error.strerror}") from None


def enter_root() -> None:
    """Change to a root of its own: Python's library read-only, /dev/null, /dev/urandom, a writable tmpfs; no /proc."""
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    # /proc is a folder that every system has and that no source below lies in; it is the new root and then gone
    root = "/proc"
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=256k,mode=755")
    for source in _needed():
        place = root + source
        os.makedirs(place, mode=0o755, exist_ok=True)
        _mount(source, place, None, _MS_BIND | _MS_REC)
        _read_only(place)
    for source in _LIBRARIES:
        if os.path.islink(source):
            os.symlink(os.readlink(source), root + source)
    os.makedirs(root + "/dev", mode=0o755)
    for source in ("/dev/null", "/dev/urandom"):
        os.close(os.open(root + source, os.O_CREAT | os.O_WRONLY, 0o644))
        _mount(source, root + source, None, _MS_BIND)
        # a device can be written to all the same, but its times and mode are the system's
        _read_only(root + source, devices=True)
    os.mkdir(root + WORK)
    _mount("tmpfs", root + WORK, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC,
           f"size={WORK_BYTES},nr_inodes={WORK_FILES},mode=700,uid={NOBODY},gid={NOBODY}")
    _mount("tmpfs", root, "tmpfs", _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV, "size=256k,mode=755")
    os.chdir(root)
    _try("root (pivot_root)", _syscall(_PIVOT_ROOT, b".", b"."))
    # the old root now lies on top of the new one
    _try("root (umount)", _libc.umount2(b".", _MNT_DETACH))
    os.chdir(WORK)
    _try("host name", _libc.sethostname(b"sandbox", 7))


def _needed() -> list[str]:
    """Folders that Python's standard library is read from; none inside another one, no link."""
    library = os.path.dirname(os.__file__)
    # the libraries of a Python that stands by itself lie beside its modules
    wanted = [library, *(path for path in _LIBRARIES if not os.path.islink(path))]
    wanted += [os.path.dirname(library)] if sys.base_prefix not in ("/", "/usr") else []
    real = sorted({os.path.realpath(path) for path in wanted if os.path.isdir(path)})
    return [path for path in real if not any(path.startswith(other + os.sep) for other in real)]


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    _try(f"mount {source}", _libc.mount(source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags),
                                        options.encode() or None))


def _read_only(path: str, *, devices: bool = False) -> None:
    # mounts inside it too, which a remount would leave as they are
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY | _ATTR_NOSUID | (0 if devices else _ATTR_NODEV), 0, 0, 0)
    _try(f"read-only {path} (mount_setattr)", _syscall(_MOUNT_SETATTR, _AT_FDCWD, path.encode(), _AT_RECURSIVE,
                                                       ctypes.byref(attributes), ctypes.sizeof(attributes)))


def limit(seconds: int, memory: int, file_bytes: int) -> None:
    """Resource limits, soft and hard: CPU seconds, address space, file size in bytes; open files; no process, no core."""
    for what, most in (("CPU", seconds), ("AS", memory), ("FSIZE", file_bytes), ("NOFILE", 32), ("NPROC", 0), ("CORE", 0),
                       ("MEMLOCK", 0), ("MSGQUEUE", 0)):
        number = getattr(resource, f"RLIMIT_{what}", None)
        if number is None:
            continue
        hard = resource.getrlimit(number)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(number, (most, most))
        except (ValueError, OSError) as error:
            # macOS has a limit on address space that cannot be set
            if sys.platform == "linux":
                raise Refused(f"limit {what}: {error}") from None


def drop_rights() -> None:
    """Become nobody, without capabilities and without a way to regain any."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        for number in range(64):
            if _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) < 0:
                break
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _try("capabilities (capset)", _libc.capset(header, nothing))
    _try("no new privileges", _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    # a change of id has cleared it
    end_with_parent()


def end_with_parent() -> None:
    """Be killed when the parent ends, however it ends."""
    if sys.platform == "linux":
        _try("parent's death", _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def landlock() -> bool:
    """A second lock on files, sockets and signals where the kernel has Landlock: writes below the work folder only.

    Returns whether it is there; namespaces and seccomp hold without it.
    """
    create, add, restrict = _LANDLOCK
    version = _syscall(create, None, 0, 1)
    if version < 1:
        return False
    # execute and every right to change: bits 0, 1, 4-12, then refer (2), truncate (3), device ioctl (5)
    files = 0b1111111110011 | sum(1 << bit for bit, since in ((13, 2), (14, 3), (15, 5)) if version >= since)
    rules = (ctypes.c_uint64 * 3)(files, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _try("Landlock", _syscall(create, ctypes.byref(rules), size, 0))
    for path, rights in ((WORK, files & ~1), ("/dev/null", files & (1 << 1 | 1 << 14))):
        place = os.open(path, os.O_PATH)
        # 64 bits of rights, 32 of descriptor, packed
        rule = (ctypes.c_uint32 * 3)(rights, 0, place)
        _try("Landlock", _syscall(add, ruleset, 1, ctypes.byref(rule), 0))
        os.close(place)
    _try("Landlock", _syscall(restrict, ruleset, 0))
    os.close(ruleset)
    return True


def filter_calls(program: bytes) -> None:
    """Install a seccomp filter: BPF instructions of 8 bytes each."""
    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    _try("seccomp", _libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(Program(len(program) // 8, program)), 0, 0))
