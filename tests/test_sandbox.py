"""Stand-ins for hostile programs, in every room that this machine offers: each counts as failed, and harms nothing."""

import socket
import subprocess
import time
from pathlib import Path

import pytest
from filelock import FileLock

from kdcode import sandbox
from kdcode.config import ConfigError
from kdcode.sandbox import isolation, ISOLATIONS, Limits, run_program, run_programs

OFFERED = [room for room in ISOLATIONS if run_program("pass", room) == "passed"]
ISOLATED = [room for room in OFFERED if room != "none"]
MARK = "86423"  # seconds that a child sleeps: no other process has this number

HOSTILE = {
    "forks up to 200 children": f"import os, time\nfor _ in range(200):\n    if not os.fork(): time.sleep({MARK})\ntime.sleep(60)",
    "children that have children": f"import os, time\nfor _ in range(7): os.fork()\ntime.sleep({MARK})",
    "prints without end": "while True: print('x' * 4096, flush=True)",
    "prints errors without end": "import sys\nwhile True: sys.stderr.write('x' * 4096)",
    "allocates 4 GB": "memory = bytearray(4 << 30)",
    "fills its folder": "for number in range(200): open(str(number), 'wb').write(bytes(15 << 20))",
    "leaves a sleeping child": f"import subprocess\nsubprocess.Popen(['sleep', '{MARK}'], start_new_session=True)",
    "leaves a child of a child": f"import os, subprocess\nif not os.fork():\n    os.setsid()\n    subprocess.Popen(['sleep', '{MARK}'])\n    os._exit(0)\nos.wait()",
    "exits 0 before the tests": "import sys\nsys.exit(0)\nassert False",
    "exits without a word": "import os\nos._exit(0)\nassert False",
    "is killed by itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "ignores signals": "import signal\nfor number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)\nwhile True: pass",
    "crashes the interpreter": "import ctypes\nctypes.string_at(0)",
    "speaks for the supervisor": "import os\nopen(f'/proc/{os.getppid()}/fd/1', 'w').write('\"passed\"')\nos._exit(0)",
}
SPIES = {  # they pass where they get what they want
    "signals a process that is not its own": "import os\nreached = 0\nfor name in filter(str.isdigit, os.listdir('/proc')):\n    try: os.kill(int(name), 0)\n    except OSError: continue\n    reached += int(name) not in (1, os.getpid(), os.getppid())\nassert reached",
    "reads HF_TOKEN": "import os\nassert os.environ['HF_TOKEN']",
    "reads environments": "import os\nfound = ''\nfor name in os.listdir('/proc'):\n    try: found += open(f'/proc/{name}/environ').read()\n    except OSError: pass\nassert 'kdcode-test-secret' in found",
    "reads a private file": "assert open('{place}/private').read()",
    "writes outside its folder": "open('{place}/written', 'w').write('x')",
    "writes into Python": "import json\nopen(json.__file__, 'a').write('')",
}


@pytest.fixture(autouse=True)
def alone(tmp_path_factory):
    """One test at a time, so that what is left over is its own."""
    with FileLock(tmp_path_factory.getbasetemp().parent/"sandbox.lock"): yield


def left_over():
    """Command lines of processes that a room should have ended."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try: found.append(place.read_text())
        except OSError: pass
    return [line for line in found if "def supervise" in line or f"sleep\0{MARK}" in line]


@pytest.mark.parametrize("room", OFFERED)
def test_hostile_programs_fail(room):
    outcomes = dict(zip(HOSTILE, run_programs(HOSTILE.values(), room, Limits(seconds=1.5), workers=2)))
    if room in ("uid", "none"): outcomes.pop("fills its folder")  # only a room of its own bounds a folder
    assert "passed" not in outcomes.values(), outcomes
    assert not [outcome for outcome in outcomes.values() if outcome.startswith("no room")], outcomes
    assert not left_over()


@pytest.mark.parametrize("room", ISOLATED)
def test_spies_get_nothing(room, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "kdcode-test-secret")
    (tmp_path/"private").write_text("private")
    (tmp_path/"private").chmod(0o600)
    with subprocess.Popen(["sleep", "60"]) as other:  # has the secret in its environment
        outcomes = {name: run_program(program.replace("{place}", str(tmp_path)), room) for name, program in SPIES.items()}
        assert other.poll() is None
        other.kill()
    assert "passed" not in outcomes.values(), outcomes
    assert not (tmp_path/"written").exists()


def test_spies_can_spy(tmp_path, monkeypatch):
    """The negative control: without a room the same programs get what they want."""
    monkeypatch.setenv("HF_TOKEN", "kdcode-test-secret")
    (tmp_path/"private").write_text("private")
    with subprocess.Popen(["sleep", "60"]) as other:
        outcomes = {name: run_program(program.replace("{place}", str(tmp_path)), "none") for name, program in SPIES.items()}
        other.kill()
    outcomes.pop("reads HF_TOKEN")  # the environment is empty in any case
    outcomes.pop("writes into Python")  # only where Python belongs to who runs this
    assert set(outcomes.values()) == {"passed"}, outcomes


@pytest.mark.parametrize("room", [room for room in ("bubblewrap", "unshare") if room in OFFERED])
def test_no_network(room):
    assert run_program("import socket\nassert any(name != 'lo' for _, name in socket.if_nameindex())", room) != "passed"
    with socket.create_server(("127.0.0.1", 0)) as server:
        call = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)"
        assert run_program(call, room) != "passed" and run_program(call, "none") == "passed"


def test_without_isolation_nothing_runs(monkeypatch):
    broken = {room: lambda folder: (["/does/not/exist"], {}) for room in ISOLATIONS}
    monkeypatch.setattr(sandbox, "ROOMS", broken)
    isolation.cache_clear()
    try:
        with pytest.raises(ConfigError, match="can't be isolated on this machine .*bubblewrap: no room: No such file.*--unsafe"): isolation()
    finally: isolation.cache_clear()


def test_a_hung_room_ends(monkeypatch):
    monkeypatch.setitem(ISOLATIONS, "none", lambda folder: (["sleep", MARK], {}))
    monkeypatch.setattr(sandbox, "GRACE", .5)
    start = time.monotonic()
    assert run_program("pass", "none", Limits(seconds=.5)) == "took longer than 0.5 s"
    assert time.monotonic() - start < 30
