"""Steps as forks: the same as processes of their own, to whoever starts, ends or reads them."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest

import config
from workflow import warm

pytestmark = pytest.mark.skipif(not warm.possible(), reason="needs Linux without a card")

SAYS = """
import json, os, sys
print(json.dumps({"words": sys.argv, "folder": os.getcwd(), "name": __name__, "variable": os.environ.get("ABF_TEST"),
                  "read": sys.stdin.read()}))
print("beside", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""
WAITS = """
import pathlib, signal, sys, time
def end(*_):
    pathlib.Path(sys.argv[2]).write_text("asked to end")
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1]).write_text("there")
time.sleep(60)
"""


@pytest.fixture(scope="module")
def door():
    with warm.started(["json"]) as (door, _):
        yield door


@pytest.fixture
def script(tmp_path):
    def make(text):
        path = tmp_path / "places" / "step.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return make


def line(door, *words):
    return [sys.executable, "-m", "workflow.warm", str(door), *map(str, words)]


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(config.ROOT), **more}


def run(words, folder, **more):
    return subprocess.run(words, cwd=folder, env=environment(**more), capture_output=True, text=True, timeout=60,
                          check=False, input="a line\n")


def wait(found, seconds=30):
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("code", [0, 3])
def test_a_fork_is_what_a_process_would_be(door, script, tmp_path, code):
    words = (script(SAYS), code, "two words")
    plain = run([sys.executable, *map(str, words)], tmp_path, ABF_TEST="kept")
    fork = run(line(door, *words), tmp_path, ABF_TEST="kept")
    assert (fork.returncode, fork.stdout, fork.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    said = json.loads(fork.stdout)
    assert said["name"] == "__main__"
    assert said["folder"] == str(tmp_path)
    assert said["read"] == "a line\n"
    assert said["variable"] == "kept"
    assert fork.returncode == code


@pytest.mark.parametrize(("text", "code", "said"), [
    ("raise ValueError('no such thing')", 1, "ValueError: no such thing"),
    ("import sys; sys.exit('a sentence')", 1, "a sentence"),
    ("import sys; sys.exit()", 0, ""), ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137, ""),
    ("import atexit; atexit.register(lambda: print('at the end'))", 0, "")])
def test_how_a_fork_ends(door, script, tmp_path, text, code, said):
    done = run(line(door, script(text)), tmp_path)
    assert done.returncode == code
    assert said in done.stderr
    assert ("at the end" in done.stdout) == ("atexit" in text)


def test_one_step_leaves_nothing_to_the_next(door, script, tmp_path):
    first = "import os, sys; sys.left = 1; os.environ['ABF_LEFT'] = '1'; os.chdir('/')"
    assert run(line(door, script(first)), tmp_path).returncode == 0
    second = "import os, sys; print(hasattr(sys, 'left'), 'ABF_LEFT' in os.environ, os.getcwd())"
    done = run(line(door, script(second)), tmp_path)
    assert done.stdout == f"False False {tmp_path}\n"


def test_a_step_is_asked_to_end(door, script, tmp_path):
    there, ended = tmp_path / "there", tmp_path / "ended"
    caller = subprocess.Popen(line(door, script(WAITS), there, ended), cwd=tmp_path, env=environment())
    wait(there.exists)
    caller.terminate()
    assert caller.wait(30) == 7
    assert ended.read_text() == "asked to end"


def test_a_step_ends_with_who_waits_for_it(door, script, tmp_path):
    there, ended = tmp_path / "there", tmp_path / "ended"
    caller = subprocess.Popen(line(door, script(WAITS), there, ended), cwd=tmp_path, env=environment())
    wait(there.exists)
    caller.kill()
    caller.wait()
    wait(ended.exists)


def test_without_anybody_behind_the_door_it_runs_by_itself(script, tmp_path):
    done = run(line(tmp_path / "nothing", script(SAYS), 3), tmp_path)
    assert done.returncode == 3
    assert json.loads(done.stdout)["words"][1:] == ["3"]


def test_a_step_outlives_who_started_all_and_ends_with_the_process_that_it_is_a_fork_of(script, tmp_path):
    """As snakemake goes on where the leaderboard's process was killed: it holds the life line too."""
    there, ended = tmp_path / "there", tmp_path / "ended"
    step = line("{door}", script(WAITS), there, ended)
    starts = (f"import os, subprocess\nfrom workflow import warm\n"
              f"with warm.started(['json']) as (door, life):\n"
              f"    words = [word.replace('{{door}}', str(door)) for word in {step!r}]\n"
              f"    process = subprocess.Popen(words, pass_fds=(life,))\n"
              f"    print(process.pid, flush=True)\n    process.wait()\n")
    first = subprocess.Popen([sys.executable, "-c", starts], cwd=config.ROOT, env=environment(), stdout=subprocess.PIPE,
                             text=True)
    caller = int(first.stdout.readline())
    wait(there.exists)
    first.kill()
    first.wait()
    time.sleep(0.5)
    assert not ended.exists()
    os.kill(caller, signal.SIGTERM)
    wait(ended.exists)


def test_a_library_that_warns_when_it_is_imported_does_not_warn_the_graph(tmp_path, monkeypatch, caplog):
    (tmp_path / "a_noisy_library.py").write_text("import logging\nlogging.getLogger('a').warning('no kernel')\n")
    monkeypatch.syspath_prepend(tmp_path)
    warm._load(["a_noisy_library", "not_installed"])
    logging.getLogger("a").warning("a step")
    assert "a_noisy_library" in sys.modules
    assert caplog.messages == ["a step"]


LANE = """
set -euo pipefail
cd {root}; logs={logs}
. scripts/lanes.sh
beside second say python {step} 0
say python {step} 0
join
say python {step} 3
"""
WHO = """
import sys
print('fork' if '--serve' in open('/proc/self/cmdline').read() else 'process')
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("door", [True, False])
def test_a_scripts_commands_are_forks_where_there_is_a_door(tmp_path, script, door):
    step = script(WHO)
    (tmp_path / "lane.sh").write_text(LANE.format(root=config.ROOT, logs=tmp_path / "logs", step=step))
    around = f"import sys; from workflow import warm; sys.exit(warm.around(['bash', '{tmp_path}/lane.sh'], ['json']))"
    words = [sys.executable, "-c", around] if door else ["bash", f"{tmp_path}/lane.sh"]
    done = run(words, tmp_path, PATH=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    what = "fork" if door else "process"
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines()[-4:] == [f"$ python {step} 0", what, f"$ python {step} 3", what]
    assert (tmp_path / "logs" / "second.log").read_text() == f"$ python {step} 0\n{what}\n"


TWO_LANES = """
set -euo pipefail
cd {root}; logs={folder}/logs
. scripts/lanes.sh
beside second say python {step} {folder}/one {folder}/one.end
say python {step} {folder}/two {folder}/two.end
"""


@pytest.mark.parametrize("forks", [True, False])
@pytest.mark.parametrize("ends", [signal.SIGTERM, signal.SIGINT])
def test_a_script_that_ends_early_leaves_no_lane_behind(tmp_path, script, ends, forks):
    lane = tmp_path / "lane.sh"
    lane.write_text(TWO_LANES.format(root=config.ROOT, folder=tmp_path, step=script(WAITS)))
    around = f"import sys; from workflow import warm; sys.exit(warm.around(['bash', '{lane}'], ['json']))"
    words = [sys.executable, "-c", around] if forks else ["bash", str(lane)]
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    process = subprocess.Popen(words, cwd=tmp_path, env=environment(PATH=path), start_new_session=True)
    wait(lambda: (tmp_path / "one").exists() and (tmp_path / "two").exists())
    # Ctrl-C reaches everything that the terminal has in front; a plain shell waits for its own step's end before it ends
    os.killpg(process.pid, ends) if ends == signal.SIGINT or not forks else process.send_signal(ends)
    assert process.wait(timeout=30) != 0
    # a fork is in front of the terminal too, and hears Ctrl-C itself
    wait(lambda: (tmp_path / "one.end").exists() or (forks and ends == signal.SIGINT))
    wait(lambda: not alive(process.pid))


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
