"""scripts/slurm_job.sh on a real SLURM of one node: told to end, a command saves and is queued anew; a failed one is not."""

from __future__ import annotations

import subprocess

import pytest
from slurm import node, until

from config import ROOT

SCRIPT = ROOT / "scripts" / "slurm_job.sh"
#: Ends as a training with --save_on_signal does: what it saves takes longer than SLURM waits with a job that it kills.
SAVES = "trap 'sleep 8; echo saved; exit 143' TERM; echo begun; while true; do sleep 0.2; done"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    with node(tmp_path_factory.mktemp("job") / "node") as slurm:
        yield slurm


def submitted(slurm, log, command):
    """The number of a job that runs this line of shell."""
    return slurm.ask("sbatch", "--parsable", f"--output={log}", f"--chdir={log.parent}", str(SCRIPT), "bash", "-c",
                     command).strip()


def said(log):
    return log.read_text(encoding="utf-8") if log.is_file() else ""


def test_a_job_whose_time_is_up_saves_and_waits_in_the_queue(here, tmp_path):
    log = tmp_path / "log"
    job = submitted(here, log, SAVES)
    until(lambda: "begun" in said(log))
    # as SLURM does --signal seconds before the time is up: to the script alone
    here.ask("scancel", "--batch", "--signal=TERM", job)
    until(lambda: here.jobs("PENDING") == [job])
    assert "saved" in said(log)
    assert "Restarts=1" in here.ask("scontrol", "show", "job", job)
    here.ask("scancel", job)


def test_a_command_that_fails_ends_the_job_with_its_code(here, tmp_path):
    job = submitted(here, tmp_path / "log", "echo error: wrong; exit 2")
    until(lambda: job in here.jobs("FAILED"))
    shown = here.ask("scontrol", "show", "job", job)
    assert "ExitCode=2:0" in shown
    assert "Restarts=0" in shown


def test_without_slurm_it_says_how_it_is_started():
    done = subprocess.run(["bash", str(SCRIPT), "true"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
                          timeout=60, check=False)
    assert done.returncode == 2
    assert "sbatch --gpus=8" in done.stdout
