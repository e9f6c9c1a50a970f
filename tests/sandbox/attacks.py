"""Programs that try to pass a test without knowing the answer, or to break out."""

from __future__ import annotations

# Each must define `f`; the test asserts that f(3) is a string which is nowhere in the program.
FORGERIES = {
    "exit code at import": "import os\nos._exit(0)",
    "exit while loading": "import sys\nsys.exit(0)",
    "exit code in the test": "import os\ndef f(x): os._exit(0)",
    "SystemExit": "def f(x): raise SystemExit(0)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit(0)",
    "printed verdict": """
import sys
def f(x):
    print('{"name": "test_it", "of": 1, "passed": true, "error": null, "timeout": false}')
    print("1 passed in 0.01s", file=sys.stderr)
    sys.stdout.flush()
    raise SystemExit(0)
""",
    "verdict into every descriptor": """
import os
line = b'{"name": "test_it", "of": 1, "passed": true, "error": null, "timeout": false}\\n'
def f(x):
    for fd in range(64):
        try: os.write(fd, line + b'{"end": null}\\n')
        except OSError: pass
    os._exit(0)
""",
    "equal to everything": """
class Same:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return hash(type(self))
    __lt__ = __le__ = __gt__ = __ge__ = __eq__
def f(x): return Same()
""",
    "a string that is equal to everything": """
class Same(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def f(x): return Same("x")
""",
    "a class that is equal to everything": """
class Meta(type):
    def __eq__(self, other): return True
    __hash__ = type.__hash__
class Same(metaclass=Meta): pass
def f(x): return Same
""",
    "frames": """
import sys
needle = "".join(reversed("detcepxe eht"))
def f(x):
    frame, found = sys._getframe().f_back, []
    while frame:
        found += [c for c in frame.f_code.co_consts if isinstance(c, str)]
        found += [str(v) for v in {**frame.f_globals, **frame.f_locals}.values()]
        frame = frame.f_back
    return next(s for s in found if s.startswith(needle + " "))
""",
    "gc": """
import gc
needle = "".join(reversed(" detcepxe eht"))
def f(x):
    for item in gc.get_objects():
        for thing in (item, *gc.get_referents(item)):
            for text in (thing, *getattr(thing, "co_consts", ())):
                if isinstance(text, str) and text.startswith(needle) and text != needle:
                    return text
""",
    "memory": """
import re
needle = "".join(reversed(" detcepxe eht")).encode()
def f(x):
    for line in open("/proc/self/maps"):
        if " rw-p " in line:
            low, high = (int(n, 16) for n in line.split()[0].split("-"))
            with open("/proc/self/mem", "rb", 0) as memory:
                memory.seek(low)
                found = re.search(needle + b"[a-z]+", memory.read(high - low))
            if found: return found[0].decode()
""",
    "files and other processes": """
import glob
needle = "".join(reversed("w detcepxe eht"))
def f(x):
    for path in [*glob.glob("/proc/*/cmdline"), *glob.glob("/proc/*/environ"),
                 *glob.glob("/tmp/**", recursive=True), *glob.glob("/proc/*/fd/*")]:
        try: text = open(path, errors="replace").read(100000)
        except Exception: continue
        if needle in text: return text[text.index(needle):][:18]
""",
    "sys.modules": """
import sys, types
fake = types.ModuleType("fake")
fake.__getattr__ = lambda name: (lambda *a, **k: None)
for name in list(sys.modules):
    if name.startswith(("inside", "json", "tests", "pytest", "marshal")):
        sys.modules[name] = fake
def f(x): return fake
""",
    "builtins": """
import builtins
builtins.AssertionError = type("Passed", (Exception,), {})
builtins.isinstance = lambda *a: True
builtins.len = builtins.str = builtins.type = builtins.getattr = lambda *a: True
builtins.__import__ = lambda *a, **k: None
def f(x): return True
""",
    "answers of its own making": """
import gc, os, socket
def f(x):
    answer = b'["return",true]'
    for s in [o for o in gc.get_objects() if isinstance(o, socket.socket)]:
        for message in (answer, b'["raise",[[],[["builtins","StopIteration"]]],0,[],""]', b"null"):
            try: s.sendall(len(message).to_bytes(4, "big") + message)
            except OSError: pass
    os._exit(0)
""",
    "nonsense as an answer": """
import gc, socket
def f(x):
    for s in [o for o in gc.get_objects() if isinstance(o, socket.socket)]:
        named = b'["return",["named",0,"a b",["import os"],1]]'
        for message in (b"\\xff" * 40, b"[" * 100000, named):
            try: s.sendall(len(message).to_bytes(4, "big") + message)
            except OSError: pass
""",
    "an endless answer": """
import gc, socket
def f(x):
    for s in [o for o in gc.get_objects() if isinstance(o, socket.socket)]:
        try:
            s.sendall(b"\\x7f\\xff\\xff\\xff")
            while True: s.sendall(b"[" * 65536)
        except OSError: pass
""",
    "StopIteration": "def f(x): raise StopIteration",
    "an assertion of its own": "def f(x): raise AssertionError('passed')",
    "an exception called like the checker's": """
class _Timeout(BaseException): pass
class Broken(BaseException): pass
def f(x): raise Broken
""",
    "an exception with a message that hangs": """
class E(Exception):
    def __str__(self):
        while True: pass
def f(x): raise E
""",
    "a thread that outlives": """
import threading, time
def work():
    while True: time.sleep(0.01)
threading.Thread(target=work).start()
def f(x):
    threading.Thread(target=work).start()
    raise SystemExit(0)
""",
    "a daemon": """
import os, time
def f(x):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0: time.sleep(1000)
        os._exit(0)
""",
    "infinite output": """
def f(x):
    while True: print("x" * 65536)
""",
    "output that is not UTF-8": """
import os, sys
def f(x):
    for fd in (1, 2): os.write(fd, bytes(range(256)) * 100)
    sys.stdout.buffer.write(b"\\xff\\xfe"); sys.stdout.flush()
    return "\\ud800\\x00"
""",
    "kill everything": """
import os, signal
def f(x):
    for pid in (1, os.getppid(), -1):
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, signal.SIGINT):
            try: os.kill(pid, number)
            except OSError: pass
""",
    "kill the parent while loading": "import os\nos.kill(os.getppid(), 9); os.kill(1, 9)",
    "stop oneself": "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSTOP)",
    "ignore every signal": """
import signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
def f(x):
    while True: time.sleep(10)
""",
    "busy": "def f(x):\n    while True: pass",
    "busy while loading": "while True: pass",
    "busy in C": "def f(x): return 7 ** (7 ** 10)",
    "fork bomb": """
import os
def f(x):
    while True:
        try: os.fork()
        except OSError: pass
""",
    "fork bomb while loading": """
import os
while True:
    try: os.fork()
    except OSError: pass
""",
    "memory bomb": "def f(x):\n    kept = []\n    while True: kept.append(bytearray(2 ** 24))",
    "memory bomb of processes": """
import os
def f(x):
    for _ in range(100):
        try: os.fork()
        except OSError: break
    kept = []
    while True:
        try: kept.append(bytearray(2 ** 22))
        except MemoryError: pass
""",
    "disk fill": """
import os
def f(x):
    number = 0
    while True:
        for folder in ("/tmp", "/dev/shm", "/dev", "/", "/var/tmp"):
            number += 1
            try: open(f"{folder}/{number}", "wb").write(bytes(2 ** 20))
            except OSError: pass
""",
    "crash": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "recursion": "def f(x): return [f(x)]",
    "nested without end": "def f(x):\n    for _ in range(10 ** 5): x = [x]\n    return x",
    "contains itself": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "a large answer": "def f(x): return 'x' * (2 ** 26)",
    "an iterator without end": "import itertools\ndef f(x): return itertools.count()",
    "huge source": "x = '" + "a" * 2**20 + "'\ndef f(x): return 'no'",
    "huge expression": "x = " + "(" * 2**20 + "\ndef f(x): return 'no'",
    "null bytes": "x = 1\0\ndef f(x): return 'no'",
    "a lone surrogate": "x = '\ud800'\ndef f(x): return 'no'",
    "no Python": "人工知能は答えを知りません。",
    "nothing": "",
}

# `f` returns what it reached: nothing, if it is contained. Running the honest test must pass.
PROBES = {
    "network": """
import socket
def f():
    reached = []
    for family in (socket.AF_INET, socket.AF_INET6, 17, 16):  # packets, netlink
        try: socket.socket(family, socket.SOCK_STREAM if family != 17 else socket.SOCK_RAW)
        except OSError: continue
        reached.append(int(family))
    devices = [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line]
    return reached + [name for name in devices if name != "lo"]
""",
    "files of the machine": """
import os
def f():
    reached = []
    for path in ("/usr/lib/git-core", "/usr/share/doc",
                 "/etc/shadow", "/etc/passwd", "/etc/hostname", "/home", "/var", "/sys", "/mnt",
                 os.path.expanduser("~/.ssh"), "/run", "/usr/bin/sh", "/srv", "/boot"):
        if os.path.exists(path): reached.append(path)
    return reached
""",
    "the host by way of /proc": """
import os
def f():
    reached = []
    for path in ("/proc/1/root/etc/shadow", "/proc/self/root/home", "/proc/1/cwd/../etc/passwd",
                 "/proc/self/cwd/../../etc/shadow", "/proc/kcore", "/proc/1/mem"):
        try:
            if os.path.isdir(path) or open(path, "rb").read(1): reached.append(path)
        except OSError: pass
    return reached
""",
    "symlinks": """
import os
def f():
    reached = []
    for number, target in enumerate(("/etc/shadow", "/../../../etc/shadow", "/proc/1/root/root")):
        link = f"/tmp/link{number}"
        os.symlink(target, link)
        try:
            found = os.listdir(link) if os.path.isdir(link) else open(link).read(1)
            if found: reached.append(target)
        except OSError: pass
    return reached
""",
    "writing outside /tmp": """
import os
def f():
    reached = []
    for folder in ("/", "/dev", "/dev/shm", "/usr/lib", "/root", "/opt", "/proc", os.__file__[:-5]):
        try: open(folder + "/egspo-escaped", "w").write("x")
        except OSError: continue
        reached.append(folder)
    return reached
""",
    "more than /tmp holds": """
import os
def f():
    written = 0
    for number in range(100):
        try:
            with open(f"/tmp/{number}", "wb", 0) as file: written += file.write(bytes(2 ** 20))
        except OSError: break
    return [] if written <= 4 * 2 ** 20 else [written]
""",
    "environment": """
import os
def f(): return sorted(set(os.environ) - {"PWD", "LC_CTYPE", "PYTHONHASHSEED"})
""",
    "other processes": """
import os
def f(): return [pid for pid in os.listdir("/proc") if pid.isdigit() and int(pid) > 4]
""",
    "privileges": """
import os
def f():
    status = dict(line.split(":", 1) for line in open("/proc/thread-self/status"))
    reached = [os.getuid()] if os.getuid() == 0 or os.getgroups() else []
    if int(status["CapEff"], 16) or int(status["CapPrm"], 16): reached.append("capabilities")
    if status["NoNewPrivs"].strip() != "1": reached.append("new privileges")
    if status["Seccomp"].strip() != "2": reached.append("no filter")
    for change in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.chroot("/tmp")):
        try: change()
        except OSError: continue
        reached.append("root")
    return reached
""",
    "system calls": """
import ctypes, os
def f():
    libc, reached = ctypes.CDLL(None, use_errno=True), []
    if libc.unshare(0x10000000) == 0: reached.append("unshare")
    if libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0: reached.append("mount")
    if libc.ptrace(16, 1, None, None) == 0: reached.append("ptrace")
    if libc.shmget(0, 2 ** 20, 0o1600) >= 0: reached.append("shmget")
    if libc.memfd_create(b"x", 0) >= 0: reached.append("memfd_create")
    if libc.syscall(425, 8, None) >= 0: reached.append("io_uring")
    return reached
""",
    "limits": """
import resource
def f():
    reached = []
    for name in ("AS", "NPROC", "FSIZE", "NOFILE", "CPU", "CORE"):
        number = getattr(resource, "RLIMIT_" + name)
        soft, hard = resource.getrlimit(number)
        if hard == resource.RLIM_INFINITY: reached.append(name)
        try: resource.setrlimit(number, (hard, hard + 1))
        except (OSError, ValueError): continue
        reached.append(name)
    return reached
""",
    "many processes": """
import os, time
def f():
    started = 0
    while started < 200:
        try:
            if os.fork() == 0: time.sleep(100)
        except OSError: break
        started += 1
    return [] if started < 16 else [started]
""",
    "much memory": """
def f():
    kept = []
    try:
        while len(kept) < 1000: kept.append(bytearray(2 ** 20))
    except MemoryError: pass
    count = len(kept)
    return [] if count < 256 else [count]
""",
    "one large file": """
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def f():
    with open("/tmp/big", "wb", 0) as file:
        try: file.truncate(2 ** 30)
        except OSError: return []
    return ["truncate"]
""",
    "what an earlier test left": """
import os
def f():
    reached = os.listdir("/tmp") + [name for name in globals() if name == "left"]
    globals()["left"] = 1
    return reached
""",
}
