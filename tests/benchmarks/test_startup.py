"""benchmarks/startup.py: every command is timed, plans included, and what --help of a sub-command loads."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import peers

HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "numpy", "pandas", "matplotlib"}


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    # as where the race is started by its path
    monkeypatch.setitem(sys.modules, "peers", peers)


@pytest.fixture
def race():
    from benchmarks import startup

    return startup


def test_every_command_sub_command_and_objective_has_a_line(race):
    named = {line.name for line in race.help_lines()}
    assert {"align_basemodel.py --help", "inference.py --help", "-m data.assets --help", "scripts/sweep.py --help",
            "evaluator/evaluate_safety.py --help", "models/fuse.py --help", "models/fuse.py merge --help",
            "models/fuse.py export --help", "evaluator/registry.py compare --help", "align_basemodel.py --moe_flag 1 --help",
            "align_basemodel.py --method mask --help", "align_basemodel.py --moe_flag 0 --method dpo --help"} <= named
    from evaluator.registry import COMMANDS as registry
    from flags import TRAINED
    from models.fuse import COMMANDS as fuse

    assert len(named) == len(race.command_files()) + len(fuse) + len(registry) + len(TRAINED)


def test_every_command_that_plans_has_a_plan(race, tmp_path):
    flags = race.planning_commands()
    assert set(flags) == set(race.PLANS), "give the command that plans a line in PLANS of benchmarks/startup.py"
    lines = race.plan_lines(tmp_path)
    assert {line.name.rpartition(" --")[2] for line in lines} <= set(race.PLANNING)
    assert {"scripts/somf.sh --dry_run", "scripts/lora_fusion.sh --dry_run"} <= {line.name for line in lines}
    assert sum(line.words[0] == sys.executable for line in lines) == sum(map(len, race.PLANS.values()))


@pytest.mark.parametrize("name", [*(f"models/fuse.py {name}" for name in ("merge", "export", "import")),
                                  "align_basemodel.py --method mask", "evaluator/registry.py compare", "scripts/sweep.py"])
def test_help_as_people_ask_for_it_loads_no_torch(race, name):
    line = next(line for line in race.help_lines() if line.name.startswith(name))
    report = subprocess.run([sys.executable, "-X", "importtime", *line.words[1:]], cwd=race.ROOT, capture_output=True,
                            text=True, check=True).stderr
    loaded = {package for package, _ in race.slowest_imports(report, 10_000)}
    assert "argparse" in loaded
    assert not loaded & HEAVY


def test_imports_are_summed_by_package(race):
    report = ("import time: self [us] | cumulative | imported package\nimport time:      1000 |       1000 |   numpy.lib\n"
              "import time:      3000 |       5000 | numpy\nnoise\nimport time:    900000 |     905000 | torch._C\n")
    assert race.slowest_imports(report) == [("torch", 0.9), ("numpy", 0.004)]
    assert race.slowest_imports(report, 1) == [("torch", 0.9)]


def test_a_race_as_json_and_table(race, tmp_path, monkeypatch, capsys):
    calls = []

    def timed(words):
        calls.append(words)
        # the round that does not count is slow; what is asked last are the imports
        late = "import time:      2000000 |  2 | torch\n" if "-X" in words else ""
        return (9.0 if len(calls) <= 3 else 0.2 + 0.2 * ("--help" in words)), 0.05, late

    monkeypatch.setattr(race, "timed", timed)
    monkeypatch.setattr(race, "peer_lines", lambda make: [race.Line("peer", "other", ("other", "--help"))])
    file = tmp_path / "startup.json"
    race.main(["--only", "fuse.py merge --help", "--pairs", "3", "--json", str(file)])
    found = json.loads(file.read_text())
    floor, ours, peer = found["rows"]
    assert (floor["kind"], ours["command"], peer["command"]) == ("floor", "models/fuse.py merge --help", "other")
    assert (ours["seconds"], ours["limit"], ours["met"], ours["imports"]) == (0.4, 0.3, False, [["torch", 2.0]])
    assert (floor["limit"], floor["met"], peer["met"], peer["imports"]) == (None, None, None, [])
    assert len(ours["all"]) == 3
    # one by one, and the imports once
    assert [len(words) for words in calls[:3]] == [3, 4, 2]
    assert len(calls) == 4 * 3 + 1
    assert "| models/fuse.py merge --help | 0.40 | 0.3 | NO | 0.05 | torch 2.00 |" in capsys.readouterr().out


def test_a_command_that_fails_does_not_win(race):
    with pytest.raises(SystemExit, match="no such flag|unknown|not known"):
        race.timed([sys.executable, "models/fuse.py", "merge", "--no_such_flag", "1"])


def test_peers_are_asked_only_where_they_are_installed(race, tmp_path, monkeypatch):
    monkeypatch.setenv("ABF_PEERS", str(tmp_path))
    assert not [line for line in race.peer_lines(make=False) if line.name.startswith("mergekit")]
    (tmp_path / ".installed").touch()
    line = race.peer_lines(make=False)[-1]
    assert line.words == (str(tmp_path / "bin" / "mergekit-yaml"), "--help")
