"""The graph on a real SLURM of one node: jobs killed and requeued, both controllers restarted, the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import yaml
from pico import make_adapter
from slurm import node, until

import config
import manifest

#: Rows of the grid: the weights of two adapters.
WEIGHTS = ("0.5,0.5", "0.2,0.8", "0.8,0.2")


@pytest.fixture(scope="module")
def table(pico, tmp_path_factory):
    """A grid of weights over two adapters, and a sum of its first two rows."""
    folder = tmp_path_factory.mktemp("slurm")
    for seed in (1, 2):
        make_adapter(pico, folder / f"adapter_{seed}", seed=seed)
    both, fuse = f"{folder}/adapter_1,{folder}/adapter_2", "models/fuse.py adapters --report false"
    arms = {f"row_{i}": {"make": f"{fuse} --adapters {both} --weights {weight} --run_name row_{i}"}
            for i, weight in enumerate(WEIGHTS)}
    arms["total"] = {"needs": ["row_0", "row_1"], "make": f"{fuse} --adapters row_0,row_1 --run_name total"}
    body = {"arms": {name: {"kind": "merge", "cost": "fuse", **arm} for name, arm in arms.items()},
            "costs": {"fuse": {"seconds": 5, "memory_mb": 500}}}
    (folder / "arms.yaml").write_text(yaml.safe_dump(body))
    return folder


def words(table, name, *theirs):
    return [sys.executable, "-m", "workflow.leaderboard", "--arms", str(table / "arms.yaml"), "--seeds", "7", "--name", name,
            "--output_dir", str(table), "--", *theirs]


SLURM = ("--executor", "slurm", "--jobs", "3", "--slurm-init-seconds-before-status-checks", "2", "--latency-wait", "30")


def weights(table, name):
    """Run -> hash of its weights, of the finished runs."""
    outputs = table / name / "seed_7" / "outputs"
    return {path.parent.name: manifest.sha256(path.parent / "adapter_model.safetensors")
            for path in outputs.glob("[!.]*/manifest.json")}


def test_a_grid_survives_a_killed_job_a_requeued_one_and_restarted_controllers(table, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    calm = subprocess.run(words(table, "calm", "--cores", "1"), cwd=config.ROOT, env=environment, capture_output=True,
                          text=True, timeout=600, check=False)
    assert calm.returncode == 0, calm.stderr
    with node(tmp_path / "node") as slurm:
        environment |= {name: slurm.environment[name] for name in ("SLURM_CONF", "PATH")}
        # a group of its own: the start and its snakemake are killed at once, SLURM's jobs are not of it
        first = subprocess.Popen(words(table, "storm", *SLURM), cwd=config.ROOT, env=environment, preexec_fn=os.setpgrp,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            job = until(lambda: slurm.jobs("RUNNING"))[0]
            slurm.ask("scancel", job)
            # that step is tried again, under another number
            until(lambda: [other for other in slurm.jobs("RUNNING") if int(other) > int(job)])
            until(lambda: weights(table, "storm"))
            until(lambda: slurm.jobs("PENDING,RUNNING"))
        finally:
            os.killpg(first.pid, signal.SIGKILL)
        told = first.communicate()[0]
        assert "failed, SLURM status is: 'CANCELLED'" in told
        finished = weights(table, "storm")
        assert finished
        assert len(finished) < 4
        left = slurm.jobs("PENDING,RUNNING")
        assert left
        slurm.script("restart")
        second = subprocess.Popen(words(table, "storm", *SLURM), cwd=config.ROOT, env=environment, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True)
        # as after a preemption: back into the queue under its number
        job = until(lambda: [job for job in slurm.jobs("RUNNING") if job not in left])[0]
        slurm.ask("scontrol", "requeue", job)
        told = second.communicate(timeout=600)[0]
        assert second.returncode == 0, told
        assert "jobs of an earlier start are still in the queue: cancelled" in told
        assert not slurm.jobs("PENDING,RUNNING")
        # what they asked for: the plan's memory and what snakemake takes, the plan's minutes
        asked = slurm.ask("squeue", "--noheader", "--states=COMPLETED", "--format=%m %l").split("\n")
        assert "1025M 10:00" in asked
    assert weights(table, "storm") == weights(table, "calm")
    assert finished.items() <= weights(table, "storm").items()
    again = subprocess.run(words(table, "storm", "--cores", "1"), cwd=config.ROOT, env=environment, capture_output=True,
                           text=True, timeout=300, check=False)
    # by manifests and records: a step that SLURM made is finished for any executor
    assert "4 steps, 0 to do" in again.stdout
