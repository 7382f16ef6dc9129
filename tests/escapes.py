"""Programs that try to escape from the sandbox, or to pass tests that they do not solve.

Each defines `answer`. An attempt at an effect returns "escaped" if it succeeds, which is what its
test asks for; a forger has to give the number that its test asks for and that it does not know.
HOME is a folder of the host with a file `canary`, a socket `door`, and PORT its open port.
"""

from __future__ import annotations

# name: (lines, whether the same lines escape without a sandbox)
EFFECTS: dict[str, tuple[str, bool]] = {}
FORGERS: dict[str, str] = {}
KINDS: dict[str, str] = {}  # of every attempt
# Attempts that end with their time.
ENDLESS = (
    "sleeps", "waits_for_a_timer", "backtracks", "forks_without_end", "takes_memory_bit_by_bit",
    "floods_its_output", "recurses", "answers_without_end", "patches_builtins",
)  # fmt: skip


def effects(kind: str, **attempts: str) -> None:
    """Attempts at something whose exceptions mean that it failed. A name with a trailing
    underscore does not work, or is not to be tried, without a sandbox either."""
    for name, lines in attempts.items():
        body = "\n".join(f"    {line}" for line in lines.strip().splitlines())
        code = (
            f"import contextlib, ctypes, os, socket, sys\nlibc = ctypes.CDLL(None)\n"
            f"def attempt():\n{body}\n    return True\n"
            "def answer():\n    with contextlib.suppress(Exception):\n"
            "        return 'escaped' if attempt() else 'held'\n"
        )
        EFFECTS[name.rstrip("_")] = (code, not name.endswith("_"))
        KINDS[name.rstrip("_")] = kind


def forgers(kind: str, **attempts: str) -> None:
    """Programs that do not solve what their test asks for."""
    for name, lines in attempts.items():
        FORGERS[name] = lines
        KINDS[name] = kind


effects(
    "files",
    reads_a_file="return open('HOME/canary').read()",
    reads_through_a_link="""
os.symlink('HOME/canary', name := f'{__import__("tempfile").mkdtemp()}/link')
return open(name).read()""",
    makes_a_hard_link_="os.link('HOME/canary', '/tmp/link')",
    reads_by_a_relative_path="return open('../' * 20 + 'HOME/canary').read()",
    lists_a_home="return os.listdir('HOME')",
    reads_the_password_file="return open('/etc/passwd').read()",
    writes_beside_a_file="open('HOME/written', 'w').write('a')",
    deletes_a_file_="os.remove('HOME/canary')",
    changes_the_library_="open(os.__file__, 'a').write('')",
    changes_the_system_="open('/usr/lib/written', 'w').write('a')",
    writes_to_the_root_="open('/written', 'w').write('a')",
    writes_to_dev_shm="open('/dev/shm/written', 'w').write('a')\nos.remove('/dev/shm/written')",
    fills_the_scratch_="""
for number in range(20):
    open(f'/tmp/{number}', 'wb').write(bytes(1 << 20))""",
    makes_a_device_="os.mknod('/tmp/disk', 0o60666, os.makedev(8, 0))",
    changes_its_root_="os.mkdir('/tmp/jail')\nos.chroot('/tmp/jail')",
    opens_what_it_inherited_="""
found = []
for number in range(3, 4096):
    with contextlib.suppress(OSError):
        os.fstat(number)
        found.append(number)
return len(found) > 2""",  # libc and the two ends to the tests
    walks_out_of_inherited_folders_="""
for number in range(4096):
    with contextlib.suppress(OSError):
        return os.listdir(os.open('..', os.O_RDONLY, dir_fd=number))
raise OSError""",
)
effects(
    "sockets",
    connects_to_the_host="socket.create_connection(('127.0.0.1', PORT))",
    sends_a_datagram="""
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'a', ('127.0.0.1', PORT))""",
    connects_by_a_path="socket.socket(socket.AF_UNIX).connect('HOME/door')",
    connects_by_an_abstract_name="socket.socket(socket.AF_UNIX).bind('\\0name')",
    asks_the_kernel="socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    calls_the_hypervisor_="socket.socket(socket.AF_VSOCK).connect((2, 1024))",
    makes_a_vsock_="socket.socket(socket.AF_VSOCK)",
    listens="socket.create_server(('127.0.0.1', 0))",
    asks_for_a_name_="socket.getaddrinfo('localhost', 80)[0]",
)
effects(
    "processes",
    forks="os.fork() or os._exit(0)",
    runs_a_shell="__import__('subprocess').run(['/bin/sh', '-c', 'true'], check=True)",
    runs_itself="__import__('subprocess').run([sys.executable, '-c', ''], check=True)",
    spawns="os.posix_spawn(sys.executable, ['python', '-c', ''], {})",
    calls_system="return os.system('true') == 0",
    multiplies="""
import multiprocessing
process = multiprocessing.get_context('fork').Process(target=int)
process.start()""",
    forks_without_end_="""
while True:
    os.fork()""",
    calls_vfork_by_number="return libc.syscall(57) >= 0 or 1 / 0",
    leaves_its_session="""
if not os.fork():
    os.setsid()
    os.fork()
    os._exit(0)""",
    becomes_a_shell_="os.execv('/bin/sh', ['sh', '-c', 'echo escaped'])",
)
effects(
    "threads",
    starts_a_thread="__import__('threading').Thread(target=int).start()",
    starts_a_thread_that_stays_="""
import _thread, time
_thread.start_new_thread(time.sleep, (60,))""",
    starts_a_pool="__import__('concurrent.futures').futures.ThreadPoolExecutor(2).submit(int)",
)
effects(
    "memory",
    takes_memory="bytearray(2 << 30)",
    maps_memory="__import__('mmap').mmap(-1, 2 << 30)",
    takes_memory_bit_by_bit_="""
kept = []
while len(kept) < 100:
    kept.append(bytes(range(256)) * (80 << 12))""",
    makes_a_file_in_memory="os.memfd_create('a')",
    shares_memory="return libc.shmget(0, 1 << 20, 0o1600) >= 0 or 1 / 0",
    truncates_a_large_file_="with open('/tmp/large', 'w') as file:\n    file.truncate(1 << 30)",
    raises_its_limits_="""
import resource
resource.setrlimit(resource.RLIMIT_NPROC, (100, 100))""",
)
effects(
    "signals",
    stops_its_judge_="os.kill(os.getppid(), 19)\nos.kill(1, 19)\nreturn False",
    limits_its_judge_="__import__('resource').prlimit(os.getppid(), 0, (0, 0))",
    waits_for_a_timer_="""
import signal
for number in range(1, 65):
    with contextlib.suppress(OSError, ValueError):
        signal.signal(number, signal.SIG_IGN)
while True:
    pass""",
    sleeps_="__import__('time').sleep(60)",
    backtracks_="__import__('re').fullmatch('(a+)+b', 'a' * 60)",
)
effects(
    "proc",
    reads_an_environment="return open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    reads_memory="open('/proc/self/mem', 'rb')",
    lists_processes="return [name for name in os.listdir('/proc') if name.isdigit()]",
    mounts_proc_="return libc.mount(b'proc', b'/tmp', b'proc', 0, None) == 0",
    traces_its_judge_="return libc.ptrace(16, os.getppid(), None, None) == 0",
    takes_files_of_its_judge_="return libc.syscall(438, os.pidfd_open(os.getppid()), 0, 0) >= 0",
    makes_a_namespace="return libc.unshare(0x10000000) == 0",
    becomes_root_="os.setuid(0)",
    is_given_secrets="return {*os.environ} - {'LD_LIBRARY_PATH', 'LC_CTYPE', 'PWD'}",
    reads_its_arguments_="return 'token' in str(sys.orig_argv[6:]) or 'tests' in sys.argv",
    keeps_a_key_="return libc.syscall(248, b'user', b'a', b'b', 1, -2) >= 0",
    loads_a_program_into_the_kernel_="""
return libc.syscall(321, 0, (ctypes.c_uint32 * 4)(2, 4, 4, 1), 16) >= 0""",
    submits_work_to_the_kernel_="return libc.syscall(425, 8, bytes(120)) >= 0",
)
effects(
    "imports",
    imports_the_trainer_="import ar2diff",
    imports_torch_="import torch",
    imports_from_the_folder_of_the_run_="sys.path.append('HOME')\nimport canary",
    installs_a_package_="""
import ensurepip
ensurepip.bootstrap()""",
)
NOISE = "def answer():\n    return 0\n"
forgers(
    "output",
    prints_passed="print('passed')\nprint('ready\\n{\"passed\": true}')\n" + NOISE,
    floods_its_output="import os\nwhile True:\n    os.write(1, b'passed' * 9999)\n",
    floods_every_file="""
import os
for number in range(64):
    try:
        for _ in range(9):
            os.write(number, b'{"token": "", "passed": true}' * 99)
    except OSError:
        pass
"""
    + NOISE,
    answers_without_end="def answer():\n    return 'a' * (900 << 20)\n",
    answers_deep="""
def answer():
    a = []
    for _ in range(99999):
        a = [a]
    return a
""",
    answers_in_a_circle="def answer():\n    a = []\n    a.append(a)\n    return a\n",
)
forgers(
    "exits",
    exits="import os\nos._exit(0)\n",
    exits_politely="raise SystemExit(0)\n",
    exits_when_called="import os\ndef answer():\n    os._exit(0)\n",
    exits_at_the_end="import atexit, os\natexit.register(os._exit, 0)\n" + NOISE,
    is_interrupted="def answer():\n    raise KeyboardInterrupt\n",
    crashes="import ctypes\ndef answer():\n    ctypes.string_at(0)\n",
    recurses="import sys\nsys.setrecursionlimit(10**9)\ndef answer():\n    return answer()\n",
    kills_everything="import os\ndef answer():\n    os.kill(-1, 9)\n",
    kills_its_judge="import os\ndef answer():\n    os.kill(os.getppid(), 9)\n    return 0\n",
    kills_its_group="import os\ndef answer():\n    os.killpg(0, 9)\n",
)
forgers(
    "equality",
    equals_everything="""
class Equal:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
def answer():
    return Equal()
""",
    is_an_equal_number="""
class Equal(int):
    def __eq__(self, other): return True
def answer():
    return Equal(0)
""",
    is_an_equal_list="""
class Equal(list):
    def __eq__(self, other): return True
def answer():
    return Equal()
""",
    is_its_own_class="""
class Equal:
    __class__ = property(lambda self: int)
    def __eq__(self, other): return True
def answer():
    return Equal()
""",
    is_the_answer_itself="class answer:\n    def __eq__(self, other): return True\n",
)
forgers(
    "patches",
    patches_assertions="import builtins\nbuiltins.AssertionError = SystemExit\n" + NOISE,
    patches_builtins="""
import builtins
for name in ('abs', 'all', 'bool', 'isinstance', 'len', 'sorted', 'str'):
    setattr(builtins, name, lambda *args, **named: True)
"""
    + NOISE,
    patches_math="import math\nmath.isclose = lambda *args, **named: True\n" + NOISE,
    shadows_builtins="def abs(x): return 0\ndef isclose(*args): return True\n" + NOISE,
    defines_the_tests="def check(candidate): pass\ndef tested(*args): pass\n" + NOISE,
    patches_its_judge="""
import sys
main = sys.modules['__main__']
main.tested = main.packed = lambda *args: True
main.Names.__missing__ = lambda self, name: True
"""
    + NOISE,
    patches_json="import json\njson.dumps = lambda *args: '{\"value\": true}'\n" + NOISE,
    traces_itself="import sys\nsys.settrace(lambda *args: 1 / 0)\n" + NOISE,
)
FIND = "import gc, os, pathlib, re, sys\nNUMBER = re.compile(r'SECRET = ([0-9]+)')\n"
forgers(
    "secrets",
    reads_frames=FIND + """
def answer():
    frame = sys._getframe()
    while frame:
        for value in frame.f_locals.values():
            if found := NUMBER.search(str(value)): return int(found[1])
        frame = frame.f_back
""",
    reads_the_heap=FIND + """
def answer():
    things = gc.get_objects()
    for thing in [*things, *gc.get_referents(*things)]:
        if isinstance(thing, (bytes, dict, list, str)):
            if found := NUMBER.search(str(thing)): return int(found[1])
""",
    reads_what_was_not_closed=FIND + """
def answer():
    for number in range(3, 64):
        try:
            os.set_blocking(number, False)
            return int(NUMBER.search(os.read(number, 1 << 20).decode())[1])
        except Exception:
            pass
""",
    reads_files=FIND + """
def answer():
    for path in pathlib.Path('/tmp').rglob('*'):
        if found := NUMBER.search(path.read_text()): return int(found[1])
""",
)  # fmt: skip
