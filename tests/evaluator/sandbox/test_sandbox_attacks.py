"""Attacks on the code sandbox, run for real by an adversary who has read its source: none reaches anything, none passes.

A program cannot say what it saw except by its verdict: each attack returns what happened, and the task's test expects that
it failed. Effects outside are looked at from outside.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluator.sandbox import calls
from evaluator.scoring import code_sandbox

ROOT = Path(code_sandbox.__file__).resolve().parents[2]
LACK = code_sandbox.missing()
# where the probe says no, the command refuses: test_code_sandbox.py asserts that
pytestmark = pytest.mark.skipif(bool(LACK), reason=f"not confined here: {LACK}")
#: Calls that must fail, with their numbers on x86-64.
FORBIDDEN = {
    "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "socket": 41, "socketpair": 53, "connect": 42,
    "bind": 49, "kill": 62, "tkill": 200, "tgkill": 234, "pidfd_send_signal": 424, "ptrace": 101, "process_vm_readv": 310,
    "process_vm_writev": 311, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272,
    "setns": 308, "open_by_handle_at": 304, "open_tree": 428, "move_mount": 429, "mount_setattr": 442, "setuid": 105,
    "setresuid": 117, "capset": 126, "prctl": 157, "seccomp": 317, "setrlimit": 160, "prlimit64": 302, "keyctl": 250,
    "add_key": 248, "bpf": 321, "perf_event_open": 298, "io_uring_setup": 425, "userfaultfd": 323, "memfd_create": 319,
    "shmget": 29, "msgget": 68, "ioctl": 16, "clone3": 435, "setsid": 112, "setpgid": 109, "init_module": 175,
    "reboot": 169, "sethostname": 170, "mknod": 133, "flock": 73, "chown": 92, "pidfd_getfd": 438,
    "landlock_create_ruleset": 444, "io_setup": 206, "mbind": 237}
#: What system() gives where it could start no shell.
NO_SHELL = 127 << 8
#: For attacks that are written as expressions: what an expression gives, an exception as its name.
TELL = ("import ctypes, errno, gc, os, signal, sys\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def tell(work):\n    try:\n        return work()\n    except BaseException as error:\n"
        "        return type(error).__name__\n"
        "def call(number, *args):\n    ctypes.set_errno(0)\n    found = libc.syscall(number, *args)\n"
        "    return errno.errorcode.get(ctypes.get_errno()) if found < 0 else found\n")


def told(expression, expected, more=""):
    """The outcome of expecting that an expression, evaluated by the program, gives one of these values."""
    return code_sandbox.run("def attack():\n", f"    return tell(lambda: ({expression}))\n{TELL}{more}",
                            f"def check(candidate):\n    assert candidate() in {expected!r}\n", "attack", 5, 512)


def faked(answer, test="def check(candidate):\n    assert candidate(2, 3) == 5\n"):
    return code_sandbox.run("def add(a, b):\n", answer, test, "add", 3, 256)


@pytest.fixture
def victim():
    """A process of ours with a key in its environment."""
    process = subprocess.Popen(["sleep", "600"], env={**os.environ, "API_KEY": "sk-of-the-user"})
    yield process
    process.kill()
    process.wait()


def test_the_telling_itself_works():
    assert told("1 + 1", [2]).passed
    assert not told("1 + 1", [3]).passed
    assert told("1 / 0", ["ZeroDivisionError"]).passed


# --- the five that broke the guards in Python -------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["{folder}", "/", "/proc/self/cwd", "/dev", "/usr/lib", "{stdlib}"])
def test_no_descriptor_of_a_folder_leads_outside(tmp_path, start):
    kept = tmp_path / "kept"
    kept.write_text("whole")
    start = start.format(folder=tmp_path, stdlib=os.path.dirname(os.__file__))
    up = f"os.path.relpath('/', {start!r}) + {str(tmp_path)!r}"
    code = (f"def reach(flags, name):\n    fd = os.open({start!r}, os.O_RDONLY | os.O_DIRECTORY)\n"
            "    return os.open(name, flags, dir_fd=fd)\n")
    failed = ["FileNotFoundError", "PermissionError", "OSError", "NotADirectoryError"]
    assert told(f"reach(os.O_CREAT | os.O_WRONLY, {up} + '/new')", failed, code).passed
    assert told("reach(os.O_CREAT | os.O_WRONLY, 'new')", failed, code).passed
    assert told(f"os.remove({up} + '/kept', dir_fd=os.open({start!r}, os.O_RDONLY))", failed).passed
    assert told(f"os.remove({str(kept)!r})", failed).passed
    assert kept.read_text() == "whole"
    assert os.listdir(tmp_path) == ["kept"]


def test_no_signal_leaves(victim):
    for pid in (victim.pid, os.getpid()):
        assert told(f"signal.pidfd_send_signal(os.pidfd_open({pid}), 9)", ["PermissionError"]).passed
        assert told(f"os.kill({pid}, 9)", ["PermissionError"]).passed
    assert told("[call(434, pid, 0) for pid in range(70000)].count('EACCES')", [70000]).passed
    assert told("os.getppid()", [0]).passed  # the parent lies outside its pid namespace
    for words in ("os.kill(-1, 9)", "os.killpg(0, 9)", "os.kill(1, 9)", "signal.raise_signal(9)", "os.abort()"):
        assert not faked(f"    import os, signal\n    {words}\n").passed
    assert victim.poll() is None


def test_no_key_is_read_from_any_process(victim, monkeypatch):
    monkeypatch.setenv("API_KEY", "sk-of-the-user")
    for path in (f"/proc/{victim.pid}/environ", f"/proc/{os.getpid()}/environ", "/proc/self/environ", "/proc/self/mem",
                 "/proc/self/maps", "/proc", "/sys", "/etc/passwd", "/etc/hostname", "/etc/shadow", "/var/run",
                 str(ROOT / "README.md"), os.path.expanduser("~/.bashrc")):
        assert told(f"os.open({path!r}, os.O_RDONLY)", ["FileNotFoundError"]).passed, path
    assert told("sorted(os.environ)", [["LC_CTYPE", "PYTHONHASHSEED"], ["PYTHONHASHSEED"]]).passed
    buffer = "ctypes.byref(ctypes.create_string_buffer(64))"
    assert told(f"call(310, {victim.pid}, {buffer}, 1, {buffer}, 1, 0)", ["EACCES"]).passed  # process_vm_readv


@pytest.mark.parametrize("answer", [
    "    return 4\nimport os\nos._exit(0)\n", "    import sys\n    sys.exit(0)\n", "    raise SystemExit(0)\n",
    "    raise KeyboardInterrupt\n", "    return 4\nimport atexit, os\natexit.register(os._exit, 0)\n",
    # every frame's variables, every object: whatever can be called or written to is
    "    import sys\n    frame = sys._getframe()\n    while frame:\n        for name, value in frame.f_locals.items():\n"
    "            if name == 'reply': value(value=True, passed=True, status='passed')\n        frame = frame.f_back\n",
    "    import gc\n    for x in gc.get_objects():\n        if getattr(x, '__name__', '') in ('verdict', 'checker'):\n"
    "            x(True, 'passed')\n",
    # the verdict's own words into every descriptor
    "    import os\n    for fd in range(64):\n        try: os.write(fd, b'{\"passed\": true, \"status\": \"passed\"}\\n')\n"
    "        except OSError: pass\n    os._exit(0)\n",
    "    import os\n    os.write(max(fd for fd in range(64) if fd_is(fd)), b'{\"value\": true}\\n' * 99)\n    return 4\n"
    "def fd_is(fd):\n    import os\n    try: return os.fstat(fd)\n    except OSError: return False\n",
    # the runner's own modules, the built-ins and the assertion
    "    return 4\nimport sys\nfor m in list(sys.modules.values()):\n    for n in list(vars(m)):\n"
    "        if n in ('encode', 'decode', 'dumps', 'loads'): setattr(m, n, lambda *a, **k: True)\n",
    "    return 4\nimport builtins\nbuiltins.AssertionError = None\nbuiltins.int.__eq__ = lambda *a: True\n",
    "    return type('Same', (), {'__eq__': lambda s, o: True, '__bool__': lambda s: True})()\n",
    "    return 4\nadd.__code__ = (lambda a, b: 4).__code__\ncheck = lambda candidate: None\n",
    "    import sys\n    sys.settrace(lambda *a: None)\n    sys.modules['__main__'].check = print\n    return 4\n"])
def test_passed_is_not_faked(answer):
    assert not faked(answer).passed


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86-64")
def test_no_such_system_call():
    """Past every guard of Python: the raw call, by its number."""
    assert not FORBIDDEN.keys() & calls.ALLOWED.keys()
    made = f"[(name, call(number, 0, 0, 0, 0, 0, 0)) for name, number in {FORBIDDEN!r}.items()]"
    assert told(made, [[(name, "EACCES") for name in FORBIDDEN]]).passed


@pytest.mark.parametrize("work", [
    "os.fork()", "os.system('exit 5')", "os.execv('/bin/sh', ['sh'])", "os.posix_spawn('/bin/sh', ['sh'], {})",
    "__import__('subprocess').run(['/bin/sh'])", "__import__('pty').spawn('/bin/sh')", "os.setuid(0)", "libc.fork()",
    "__import__('socket').socket()", "__import__('socket').create_connection(('127.0.0.1', 22))",
    "__import__('urllib.request').request.urlopen('http://127.0.0.1/')", "__import__('threading').Thread(target=id).start()",
    "__import__('multiprocessing').Pool(1)", "__import__('resource').setrlimit(0, (-1, -1))", "libc.system(b'exit 5')"])
def test_no_process_no_thread_no_socket_no_shell(work):
    """Also with Python's own audit hooks and guards gone: there are none."""
    assert told(work, ["PermissionError", "FileNotFoundError", "RuntimeError", "ValueError", "OSError", "URLError", "error",
                       "gaierror", -1, NO_SHELL]).passed


# --- more ---------------------------------------------------------------------------------------------------------------


def test_it_is_nobody_without_rights_in_namespaces_of_its_own():
    """Seen from outside, while a program sleeps."""
    job = {"program": "def f(): __import__('time').sleep(60)\n", "prompt": "", "entry_point": "f",
           "test": "def check(f):\n    f()\n"}
    flags = {"confined": True, "seconds": 5, "memory": 256 << 20, "file_bytes": 1 << 20}
    process = subprocess.Popen([sys.executable, "-s", "-S", str(code_sandbox._LAUNCHER), json.dumps(flags)],
                               stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        process.stdin.write(json.dumps(job).encode())
        process.stdin.close()
        sides = _wait(lambda: [pid for pid in _below(process.pid) if "2" in _status(pid, "Seccomp")], 2)
        for pid in sides:
            assert _status(pid, "CapEff") == _status(pid, "CapPrm") == ["0000000000000000"]
            assert _status(pid, "NoNewPrivs") == ["1"]
            assert _status(pid, "NSpid")[-1] == "1"
            assert "0" not in _status(pid, "Uid") + _status(pid, "Gid")
            if os.getuid() == 0:
                assert not _status(pid, "Groups")
            for name in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup"):
                assert os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")
        assert len({os.readlink(f"/proc/{pid}/ns/pid") for pid in sides}) == 2
        # and nothing of it outlives the one who asked
        process.kill()
        assert _wait(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in sides), True)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_nothing_outlives_an_evaluator_that_is_killed():
    code = ("from evaluator.scoring import code_sandbox as c\n"
            "c.run('def f():\\n', '    __import__(\"time\").sleep(99)\\n', 'def check(f):\\n    f()\\n', 'f', 30, 256)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    sides = _wait(lambda: [pid for pid in _below(process.pid) if "2" in _status(pid, "Seccomp")], 2)
    process.kill()
    process.wait()
    assert _wait(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in sides), True)


def test_everything_outside_its_folder_is_read_only_or_absent():
    stdlib = os.path.dirname(os.__file__)
    for path in ("/new", "/dev/new", "/usr/lib/new", f"{stdlib}/new", f"{stdlib}/os.py"):
        assert told(f"open({path!r}, 'a')", ["PermissionError", "OSError", "FileNotFoundError"]).passed, path
    assert told(f"os.chmod({stdlib!r} + '/os.py', 0o777)", ["PermissionError", "OSError"]).passed
    assert told("[tell(lambda: os.remove('/dev/null')), tell(lambda: os.rename('/sandbox', '/x'))]",
                [["PermissionError", "PermissionError"], ["OSError", "OSError"]]).passed
    assert told("sorted(os.listdir('/dev'))", [["null", "urandom"]]).passed
    assert told("open('/dev/tty')", ["FileNotFoundError"]).passed
    assert told("os.mknod('/sandbox/disk', 0o60600, os.makedev(254, 0))", ["PermissionError"]).passed


@pytest.mark.parametrize("work", [
    "os.utime('/dev/null')", "os.utime(0)", "os.fchmod(0, 0)", "os.chmod('/dev/null', 0)", "os.utime(os.__file__)",
    # locks and leases on files that others use
    "fcntl.flock(0, fcntl.LOCK_EX)", "fcntl.lockf(0, fcntl.LOCK_EX)", "fcntl.flock(open(os.__file__), fcntl.LOCK_SH)",
    "fcntl.fcntl(open(os.__file__), fcntl.F_SETLEASE, fcntl.F_RDLCK)", "fcntl.fcntl(0, 1031, 1 << 20)"])
def test_nothing_that_is_shared_is_touched_or_locked(work):
    assert told(work, ["PermissionError", "OSError"], "import fcntl\n").passed


def test_landlock_is_a_lock_of_its_own(tmp_path):
    """Without namespaces and seccomp: what it alone holds, where the kernel has it."""
    code = ("import os, socket, sys\nfrom evaluator.sandbox import kernel\nkernel.WORK = sys.argv[1]\n"
            "kernel._libc.prctl(38, 1, 0, 0, 0)\nif not kernel.landlock(): sys.exit(7)\n"
            "open(sys.argv[1] + '/inside', 'w').close()\nopen('/dev/null', 'w').close()\n"
            "for work in (lambda: open(sys.argv[1] + '/../outside', 'w'), lambda: os.remove(sys.argv[2]),\n"
            "             lambda: os.truncate(sys.argv[2], 0), lambda: os.execv('/bin/sh', ['sh'])):\n"
            "    try: work()\n    except PermissionError: continue\n    sys.exit(1)\n")
    (tmp_path / "work").mkdir()
    (tmp_path / "kept").write_text("whole")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "work", tmp_path / "kept"], cwd=ROOT, capture_output=True)
    assert done.returncode in (0, 7), done.stderr
    assert (tmp_path / "kept").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "work"]
    # 7: a kernel without it, as the same question put by hand says
    libc = ctypes.CDLL(None)
    there = libc.syscall(ctypes.c_long(444), None, ctypes.c_long(0), ctypes.c_long(1)) > 0
    assert done.returncode == (0 if there else 7)


def test_descriptors_are_copied_as_ever():
    assert told("fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 20)", [20], "import fcntl\n").passed
    assert told("os.set_inheritable(0, True)", [None]).passed
    assert told("fcntl.fcntl(0, fcntl.F_GETFL) & os.O_RDWR", [os.O_RDWR], "import fcntl\n").passed


def test_a_way_up_ends_at_its_own_root():
    climb = ("def climb():\n    os.chdir('/sandbox')\n    for i in range(99): os.chdir('..')\n"
             "    return sorted(os.listdir('.'))\n")
    outcome = code_sandbox.run("def attack():\n", f"    return climb()\n{TELL}{climb}",
                               "def check(f):\n    assert {'dev', 'sandbox'} <= set(f())\n"
                               "    assert not {'etc', 'proc', 'sys', 'var', 'boot', 'mnt', 'bin', 'run'} & set(f())\n",
                               "attack", 5, 256)
    assert outcome.passed
    link = "os.symlink('/etc/passwd', 'link') or open('link')"
    assert told(link, ["FileNotFoundError"]).passed
    assert told("open('/sandbox/../etc/passwd')", ["FileNotFoundError"]).passed


def test_no_descriptor_is_inherited(tmp_path):
    with open(tmp_path / "ours", "w") as ours:
        os.set_inheritable(ours.fileno(), True)
        kinds = ("def kinds():\n    import stat\n    found = []\n    for fd in range(4096):\n"
                 "        try: m = os.fstat(fd).st_mode\n        except OSError: continue\n"
                 "        found.append('p' if stat.S_ISFIFO(m) else 'c' if stat.S_ISCHR(m) else '?')\n"
                 "    return ''.join(sorted(found))\n")
        # three times /dev/null, and the two pipes to the checker
        assert told("kinds()", ["cccpp"], kinds).passed


def test_its_memory_holds_neither_the_tests_nor_the_expected_values():
    search = ("def seen():\n    texts, todo, done = [], list(gc.get_objects()), set()\n    frame = sys._getframe()\n"
              "    while frame:\n        todo += list(frame.f_locals.values()) + list(frame.f_globals.values())\n"
              "        frame = frame.f_back\n    while todo:\n        x = todo.pop()\n        if id(x) in done: continue\n"
              "        done.add(id(x))\n        if isinstance(x, (str, bytes)): texts.append(str(x))\n"
              "        elif isinstance(x, (list, tuple, set)): todo += list(x)\n"
              "        elif isinstance(x, dict): todo += list(x.keys()) + list(x.values())\n"
              "    return any('zw'[::-1] + 'ard' in text for text in texts)\n")
    test = "def check(f):\n    expected = 'wzard'\n    assert f() is False\n"
    program = f"    return seen()\n{TELL}{search}"
    assert code_sandbox.run("def attack():\n", program, test, "attack", 5, 512).passed
    # the search finds what is there
    assert not code_sandbox.run("def attack():\n", program + "kept = 'wzard'\n", test, "attack", 5, 512).passed


@pytest.mark.parametrize("reply", [
    b'{"raised": "passed", "text": ""}', b'{"passed": true, "status": "passed"}', b'{"value": ["opaque", true]}',
    b'{"raised": "SystemExit", "text": ""}', b'{"raised": "StopIteration", "text": ""}', b'{"raised": 1, "text": 1}',
    b"[" * 100_000, b'{"value": ["tuple", 5]}', b'{"value": ["list"]}', b'{"value": ["__import__", "os"]}', b"", b"\xff\xfe",
    b'{"value": ["number", "os", "x"]}', b'{"value": ["dict", [[["list", []], 1]]]}',
    b'{"value": ["int", "' + b"f" * 10**5 + b'"]}',
    b'{"value": ["range", 0, ["int", "0x5"], 1]}', b'{"raised": "UnicodeDecodeError", "text": ""}'])
def test_hostile_replies_are_failures(reply):
    """The program writes to the pipe by itself, at the start and as an answer."""
    write = (f"import os, stat\nfor fd in range(3, 64):\n    try:\n        if stat.S_ISFIFO(os.fstat(fd).st_mode): "
             f"os.write(fd, {reply!r}[:60000] + b'\\n')\n    except OSError: pass\n")
    test = "def check(candidate):\n    assert list(map(candidate, [2], [3])) == [5]\n"
    assert not faked("    return 4\n" + write, test).passed
    body = "    return 4 + go()\ndef go():\n" + "".join(f"    {line}\n" for line in write.splitlines()) + "    return 0\n"
    assert not faked(body, test).passed


@pytest.mark.parametrize("first", ['{"loaded": true}', '{"to": "", "loaded": true}'])
def test_an_answer_before_its_question_is_none(first):
    """Right ones too: the function itself never returns."""
    write = ("import os, stat\nfor fd in range(3, 64):\n    try:\n        if stat.S_ISFIFO(os.fstat(fd).st_mode): "
             f"os.write(fd, {first!r}.encode() + b'\\n' + b'{{\"value\": [\"int\", \"0x5\"]}}\\n' * 50)\n"
             "    except OSError: pass\n")
    assert faked("    while True: pass\n" + write).status == "unreadable reply"
    assert faked("    return 5\n").passed


def test_an_error_of_the_program_does_not_end_the_tests_loop():
    test = "def check(candidate):\n    for _ in map(candidate, [1, 2], [3, 4]): assert False\n"
    assert faked("    raise StopIteration\n", test).status == "RuntimeError"


def test_bombs_burst_inside():
    assert told("[open(f'/sandbox/{i}', 'wb').write(bytes(1 << 19)) for i in range(99)]", ["OSError"]).passed
    assert told("[open(f'/sandbox/{i}', 'w').close() for i in range(9999)]", ["OSError"]).passed
    assert told("[os.dup(0) for i in range(99)]", ["OSError"]).passed
    assert told("'x' * (1 << 40)", ["MemoryError"]).passed
    assert not faked("    return 'x' * (1 << 26)\n").passed
    assert not faked("    x = []\n    x.append(x)\n    return x\n").passed
    assert not faked("    return iter(int, 1)\n").passed
    # a reply without an end, one that drips, exceptions whose text does either
    assert faked("    return 4\nimport os\nwhile True: os.write(6, b'x' * 65536)\n").status == "unreadable reply"
    assert faked("    raise type('E', (Exception,), {'__str__': lambda self: 'x' * 10 ** 8})\n").status == "ended"
    assert faked("    raise type('E', (Exception,), {'__str__': lambda self: exit()})\n").status == "ended"
    assert not faked("    import decimal\n    return decimal.Decimal('1e999999999')\n",
                     "def check(f):\n    assert int(f(2, 3)) == 5\n").passed


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers and machine code of x86-64")
def test_no_way_around_by_another_table_or_by_machine_code():
    """The x32 table; int 0x80 and fork as code that the program writes itself."""
    assert not told("call(0x40000000 + 39) or True", [True, "ENOSYS", "EACCES", "EFAULT"]).passed
    run = ("def machine(code):\n    import mmap\n    memory = mmap.mmap(-1, 4096, prot=7)\n"
           "    memory.write(bytes.fromhex(code))\n    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))\n"
           "    return ctypes.CFUNCTYPE(ctypes.c_long)(at)()\n")
    assert told("machine('b82a000000c3')", [42], run).passed
    assert told("machine('b814000000cd80c3')", [1], run).status == "ended"
    assert told("machine('b8390000000f05c3')", [-errno.EACCES], run).passed


def test_nothing_to_be_seen_can_be_written_or_spoken_to():
    """Every folder that it can list; sockets, pipes and devices, which a read-only mount would not hold."""
    walk = ("def walk():\n    import stat\n    wrote, odd = [], []\n    for folder, _, names in os.walk('/'):\n"
            "        for name in names:\n            mode = os.lstat(folder + '/' + name).st_mode\n"
            "            if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)): odd.append(folder + '/' + name)\n"
            "        if folder != '/sandbox':\n            try: os.open(folder + '/new', os.O_CREAT | os.O_WRONLY)\n"
            "            except OSError: continue\n            wrote.append(folder)\n    return wrote, sorted(odd)\n")
    outcome = code_sandbox.run("def attack():\n", f"    return walk()\n{TELL}{walk}",
                               "def check(f):\n    assert f() == ([], ['/dev/null', '/dev/urandom'])\n", "attack", 30, 512)
    assert outcome.passed, outcome


@pytest.mark.parametrize(("machine", "column", "header"), [
    ("x86_64", 0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", 1, "/usr/include/asm-generic/unistd.h")])
def test_the_numbers_are_the_kernels(machine, column, header):
    assert len(calls.program(machine)) // 8 == 10 + len(calls.FCNTL_COMMANDS) + sum(
        numbers[column] >= 0 for numbers in calls.ALLOWED.values())
    if not os.path.exists(header):
        return
    found = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text()))
    generic = {"newfstatat": "fstatat"} if column else {}
    for name, numbers in {**calls.ALLOWED, "fcntl": calls.FCNTL}.items():
        if numbers[column] >= 0:
            assert int(found[generic.get(name, name)]) == numbers[column], name


def _below(pid):
    """The process numbers of all descendants."""
    tasks = Path(f"/proc/{pid}/task").glob("*")
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return children + [below for child in children for below in _below(child)]


def _status(pid, name):
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return []
    return next(line.split()[1:] for line in text.splitlines() if line.startswith(f"{name}:"))


def _wait(look, wanted):
    until = time.monotonic() + 20
    while time.monotonic() < until:
        found = look()
        if found is wanted or (isinstance(found, list) and len(found) == wanted):
            return found
        time.sleep(0.05)
    raise AssertionError(f"still {found}")
