"""Hostile programs under every isolation that this machine supports: each of them fails and harms nothing."""

import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from kdcode import sandbox
from kdcode.config import ConfigError
from kdcode.sandbox import isolation, ISOLATIONS, Limits, run_program, run_programs

SUPPORTED = [name for name in ISOLATIONS if run_program("pass", name) == "passed"]
ISOLATED = [name for name in SUPPORTED if name != "none"]
MARK = "86423"  # seconds that a child sleeps: identifies our processes

HOSTILE = {
    "forks up to 200 children":
        f"import os, time\nfor _ in range(200):\n    if not os.fork(): time.sleep({MARK})\ntime.sleep(60)",
    "forks children that fork": f"import os, time\nfor _ in range(7): os.fork()\ntime.sleep({MARK})",
    "prints forever": "while True: print('x' * 4096, flush=True)",
    "prints to stderr forever": "import sys\nwhile True: sys.stderr.write('x' * 4096)",
    "allocates 4 GiB": "memory = bytearray(4 << 30)",
    "fills its folder": "for number in range(200): open(str(number), 'wb').write(bytes(15 << 20))",
    "leaves a child behind": f"import subprocess\nsubprocess.Popen(['sleep', '{MARK}'], start_new_session=True)",
    "leaves a grandchild behind":
        "import os, subprocess\nif not os.fork():\n    os.setsid()\n"
        f"    subprocess.Popen(['sleep', '{MARK}'])\n    os._exit(0)\nos.wait()",
    "exits with 0 before the tests": "import sys\nsys.exit(0)\nassert False",
    "exits without cleanup": "import os\nos._exit(0)\nassert False",
    "kills itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "ignores signals":
        "import signal\nfor number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):\n"
        "    signal.signal(number, signal.SIG_IGN)\nwhile True: pass",
    "crashes the interpreter": "import ctypes\nctypes.string_at(0)",
    "forges the supervisor's output":
        "import os\nopen(f'/proc/{os.getppid()}/fd/1', 'w').write('\"passed\"')\nos._exit(0)",
}
PROBES = {  # they pass if they reach something that isolation should protect
    "signals another process":
        "import os\nreached = 0\nfor name in filter(str.isdigit, os.listdir('/proc')):\n"
        "    try: os.kill(int(name), 0)\n    except OSError: continue\n"
        "    reached += int(name) not in (1, os.getpid(), os.getppid())\nassert reached",
    "reads HF_TOKEN": "import os\nassert os.environ['HF_TOKEN']",
    "reads the environment of a process":
        "import os\nfound = ''\nfor name in os.listdir('/proc'):\n"
        "    try: found += open(f'/proc/{name}/environ').read()\n    except OSError: pass\n"
        "assert 'kdcode-test-secret' in found",
    "reads a private file": "assert open('{folder}/private').read()",
    "writes outside its folder": "open('{folder}/written', 'w').write('x')",
    "writes into Python": "import json\nopen(json.__file__, 'a').write('')",
}


@pytest.fixture(autouse=True)
def one_test_at_a_time(tmp_path_factory):
    """Hold a lock, so that remaining processes belong to this test."""
    with FileLock(tmp_path_factory.getbasetemp().parent/"sandbox.lock"):
        yield


def command_line(pid):
    """Return the command line of a process; empty if there is none any more."""
    try: return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError: return ""


def owner(pid):
    """Return the nearest ancestor of a process that runs tests; None for an orphan."""
    while pid := next((int(line.split()[1]) for line in status_of(pid) if line.startswith("PPid:")), 0):
        if any(word in command_line(pid) for word in ("execnet", "pytest", "nbdev_test")): return pid
    return None


def status_of(pid):
    """Return the lines of a process's status; none if it has ended."""
    try: return Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError: return []


def remaining_processes():
    """Return the command lines of processes that should have been killed, without those of tests beside this one."""
    found = {int(folder.name): command_line(folder.name) for folder in Path("/proc").glob("[0-9]*")}
    ours = {pid: line for pid, line in found.items() if "def supervise" in line or f"sleep\0{MARK}" in line}
    return [line for pid, line in ours.items() if owner(pid) in (None, os.getpid())]


def run_probes(name, folder):
    """Return the outcomes of the probes, while another process has the secret in its environment."""
    (folder/"private").write_text("private")
    (folder/"private").chmod(0o600)
    with subprocess.Popen(["sleep", "60"]) as other:
        outcomes = {key: run_program(probe.replace("{folder}", str(folder)), name) for key, probe in PROBES.items()}
        assert other.poll() is None
        other.kill()
    return outcomes


@pytest.mark.parametrize("name", SUPPORTED)
def test_hostile_programs_fail(name):
    outcomes = dict(zip(HOSTILE, run_programs(HOSTILE.values(), name, Limits(seconds=1.5), workers=2)))
    if name in ("uid", "none"):  # only namespaces bound the size of the folder
        outcomes.pop("fills its folder")
    assert "passed" not in outcomes.values(), outcomes
    assert not [outcome for outcome in outcomes.values() if outcome.startswith("isolation failed")], outcomes
    assert not remaining_processes()


@pytest.mark.parametrize("name", ISOLATED)
def test_probes_reach_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "kdcode-test-secret")
    outcomes = run_probes(name, tmp_path)
    assert "passed" not in outcomes.values(), outcomes
    assert not (tmp_path/"written").exists()


def test_probes_succeed_without_isolation(tmp_path, monkeypatch):
    """The negative control."""
    monkeypatch.setenv("HF_TOKEN", "kdcode-test-secret")
    outcomes = run_probes("none", tmp_path)
    outcomes.pop("reads HF_TOKEN")  # the environment is empty in any case
    outcomes.pop("writes into Python")  # succeeds only if this user owns Python
    assert set(outcomes.values()) == {"passed"}, outcomes


@pytest.mark.parametrize("name", [name for name in ("bubblewrap", "unshare") if name in SUPPORTED])
def test_no_network(name):
    assert run_program("import socket\nassert any(name != 'lo' for _, name in socket.if_nameindex())", name) != "passed"
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)"
        assert run_program(connect, name) != "passed"
        assert run_program(connect, "none") == "passed"


def test_no_isolation_is_an_error(monkeypatch):
    for name in ISOLATIONS:
        monkeypatch.setitem(ISOLATIONS, name, lambda folder: (["/does/not/exist"], {}))
    isolation.cache_clear()
    message = "cannot be isolated on this machine .*bubblewrap: isolation failed: No such file.*--unsafe"
    try:
        with pytest.raises(ConfigError, match=message):
            isolation()
    finally:
        isolation.cache_clear()


def test_a_hanging_isolation_is_stopped(monkeypatch):
    monkeypatch.setitem(ISOLATIONS, "none", lambda folder: (["sleep", MARK], {}))
    monkeypatch.setattr(sandbox, "GRACE", .5)
    monkeypatch.setattr(sandbox, "WALL_CLOCK_FACTOR", 2)
    assert run_program("pass", "none", Limits(seconds=.5)) == "took longer than 1 s"


CHILDREN = """import os, time
for _ in range({count}):
    if not os.fork():
        while time.process_time() < .1: pass
        os._exit(0)
    if {wait}: os.wait()
if not {wait}:
    for _ in range({count}): os.wait()"""


@pytest.mark.parametrize("name", SUPPORTED)
def test_time_limit_is_cpu_time(name, monkeypatch):
    """A program that waits is within the limit; children count, one after the other or at once."""
    assert run_program("import time\ntime.sleep(1)", name, Limits(seconds=.5)) == "passed"
    monkeypatch.setattr(sandbox, "WALL_CLOCK_FACTOR", 1000)  # the machine may be busy
    for wait in (True, False):
        assert run_program(CHILDREN.format(count=2, wait=wait), name, Limits(seconds=.5)) == "passed"
        outcome = run_program(CHILDREN.format(count=8, wait=wait), name, Limits(seconds=.5))
        assert outcome == "used more than 0.5 s of CPU time"


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_program_that_waits_forever_ends(name, monkeypatch):
    monkeypatch.setattr(sandbox, "WALL_CLOCK_FACTOR", 2)
    assert run_program(f"import time\ntime.sleep({MARK})", name, Limits(seconds=.5)) == "took longer than 1 s"
    assert not remaining_processes()


def test_as_many_programs_at_once_as_available_cpus(monkeypatch):
    allowed = os.sched_getaffinity(0)
    threads = set()

    def record(*arguments):
        threads.add(threading.get_ident())
        time.sleep(.05)  # so that a second worker would take the next program
        return "passed"
    monkeypatch.setattr(sandbox, "run_program", record)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert run_programs(["pass"] * 4, "none") == ["passed"] * 4
    finally:
        os.sched_setaffinity(0, allowed)
    assert len(threads) == 1


MAIN_PROGRAMS = [
    "import unittest\n    unittest.main()", "print(f(int(input())))", "import sys\n    sys.exit(f(0))", "exit()",
    "quit()", "import os\n    os._exit(0)",
    "import sys\n    for line in sys.stdin.read().split(): f(int(line))\n    assert False"]


@pytest.mark.parametrize("main", MAIN_PROGRAMS)
def test_main_programs_do_not_run(main):
    function = "def f(x):\n    return x\n"
    guarded = f"{function}\nif __name__ == '__main__':\n    {main}\n\nassert f(1) == 1"
    assert run_program(guarded, SUPPORTED[0]) == "passed"
    assert run_program(guarded.replace("f(1) == 1", "f(1) == 2"), SUPPORTED[0]) == "AssertionError: "


MODULE_USES = [
    "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    a: int = 1\nA()",
    "import typing\nclass A:\n    next: 'A'\nassert typing.get_type_hints(A) == {'next': A}",
    "import pickle\nclass A: pass\nassert type(pickle.loads(pickle.dumps(A()))) is A"]


@pytest.mark.parametrize("program", MODULE_USES)
def test_a_program_is_a_module(program):
    assert run_program(program, SUPPORTED[0]) == "passed"
