"""The graph's words for SLURM, what a step asks for, jobs of a killed start; SLURM itself: tests/workflow/test_slurm.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from errors import UserError
from workflow import cluster
from workflow.plan import Step


@pytest.mark.parametrize(("words", "slurm"), [
    (["--executor", "slurm", "--jobs", "3"], True), (["--executor=slurm"], True), (["-e", "slurm"], True),
    (["--cores", "8"], False), (["--executor", "local"], False), ([], False), (["slurm"], False)])
def test_words_that_ask_for_slurm(words, slurm):
    assert cluster.asked(words) is slurm


def test_a_profile_may_ask_for_it(tmp_path):
    (tmp_path / "config.yaml").write_text("executor: slurm\n")
    assert cluster.asked(["--profile", str(tmp_path)])
    assert cluster.asked([f"--workflow-profile={tmp_path / 'config.yaml'}"])
    (tmp_path / "config.yaml").write_text("cores: 4\n")
    assert not cluster.asked(["--profile", str(tmp_path)])
    assert not cluster.asked(["--profile", "a_name_that_snakemake_knows"])


def test_our_profile_is_what_snakemake_reads():
    profile = yaml.safe_load(cluster.PROFILE.read_text())
    assert profile["executor"] == "slurm"
    assert profile["retries"] >= 1
    assert profile["slurm-requeue"] is True
    assert profile["latency-wait"] >= 60


@pytest.fixture
def tools(monkeypatch):
    """SLURM's programs, made up: name -> (exit code, what it prints); returns what was asked."""
    answers = {"sinfo": (0, "slurm 22.05"), "sacct": (1, ""), "squeue": (0, ""), "scancel": (0, "")}
    asked = []

    def run(*line):
        asked.append(line)
        code, text = answers[line[0]]
        return subprocess.CompletedProcess(line, code, text() if callable(text) else text, "why")

    monkeypatch.setattr(cluster, "_run", run)
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: None)
    return answers, asked


def test_words_in_front_of_snakemakes(tools, tmp_path):
    answers, _ = tools
    made = cluster.words(["--executor", "slurm"], tmp_path)
    assert made == ["--profile", str(cluster.PROFILE), "--slurm-jobname-prefix", cluster.job_name(tmp_path),
                    "--slurm-status-command", "squeue"]
    # with an accounting database, or where the user says who tells, that is left alone
    assert "--slurm-status-command" not in cluster.words(["--slurm-status-command", "sacct"], tmp_path)
    answers["sacct"] = (0, "")
    assert "--slurm-status-command" not in cluster.words([], tmp_path)


def test_a_name_of_jobs_is_a_folders(tmp_path):
    assert cluster.job_name(tmp_path / "a") != cluster.job_name(tmp_path / "b")
    assert cluster.job_name(tmp_path / "b" / ".." / "a") == cluster.job_name(tmp_path / "a")


def test_what_is_missing_is_said(tools, tmp_path, monkeypatch):
    answers, _ = tools
    answers["sinfo"] = (1, "")
    with pytest.raises(UserError, match=r"sinfo does not answer here; .*slurm_node\.sh"):
        cluster.words([], tmp_path)
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="executor for it is not installed; pip install -r requirements.txt"):
        cluster.words([], tmp_path)


def test_jobs_of_a_killed_start_are_cancelled_and_no_others(tools, tmp_path):
    answers, asked = tools
    ours = cluster.job_name(tmp_path)
    both, one, none = f"11 {ours}_x\n12 {ours}_x\n13 other\n", f"12 {ours}_x\n13 other\n", "13 other\n"
    queue = [both, both, one, none]
    answers["squeue"] = (0, lambda: queue.pop(0) if len(queue) > 1 else queue[0])
    assert cluster.cancel_orphans(tmp_path) == 2
    assert [line for line in asked if line[0] == "scancel"] == [("scancel", "11", "12"), ("scancel", "12")]
    assert cluster.cancel_orphans(tmp_path) == 0


def test_jobs_that_do_not_end_are_named(tools, tmp_path, monkeypatch):
    answers, _ = tools
    answers["squeue"] = (0, f"11 {cluster.job_name(tmp_path)}_x\n")
    monkeypatch.setattr(cluster, "GONE", -1)
    with pytest.raises(UserError, match="jobs of an earlier start do not end: 11; scancel them"):
        cluster.cancel_orphans(tmp_path)
    answers["squeue"] = (1, "")
    with pytest.raises(UserError, match="squeue: why; jobs of an earlier start cannot be told"):
        cluster.cancel_orphans(tmp_path)


@pytest.mark.parametrize(("cost", "asks"), [
    ({"seconds": 5, "memory_mb": 500}, {"memory_mb": 1025, "minutes": 10, "gpus": 0}),
    ({"seconds": 3600, "memory_mb": 8000, "gpu_gb": 34.0}, {"memory_mb": 10400, "minutes": 240, "gpus": 1}),
    ({"seconds": 60, "memory_mb": 1000, "gpu_gb": 178.0}, {"memory_mb": 1650, "minutes": 10, "gpus": 3})])
def test_what_a_job_asks_for(cost, asks):
    step = Step("a", "a", 1, ("x.py",), Path("m"), (), **cost)
    assert cluster.resources(step, card_gb=80.0) == asks
