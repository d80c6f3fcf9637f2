"""--save_on_signal under accelerate launch: SIGTERM of all processes, one whole checkpoint, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import two_processes
from runs import common, write_data

import config
import manifest
from training.resume import fault, numbered

STEPS = 300


def line(pico, out, data, rows, *flags):
    return ["--moe_flag", "0", "--task_name", "helpfulness", "--data_path", data["helpfulness"], *common(pico, out),
            "--device", "cpu", "--threads", "1", "--max_steps", str(STEPS), "--per_device_train_batch_size", str(rows),
            "--gradient_accumulation_steps", "1", "--save_steps", "100000", *flags]


def test_sigterm_saves_on_all_processes_and_the_command_goes_on(pico, tmp_path):
    data, log = write_data(tmp_path / "data"), tmp_path / "log"
    with log.open("wb") as stream:
        launch = subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
             str(config.ROOT / "scripts" / "accelerate" / "fsdp2.yaml"), "--num_processes", "2", "--main_process_port",
             "29533", str(config.ROOT / "align_basemodel.py"), *line(pico, tmp_path, data, 4, "--save_on_signal")],
            env=os.environ | {"PYTHONPATH": str(config.ROOT)}, stdout=stream, stderr=subprocess.STDOUT)
    try:
        end = time.time() + 900
        # the first logged step: from here on there is something to save
        while b"step 1/" not in log.read_bytes() and launch.poll() is None and time.time() < end:
            time.sleep(0.2)
        launch.send_signal(signal.SIGTERM)
        launch.wait(timeout=300)
    finally:
        launch.kill()
    said = log.read_text(errors="replace")
    assert launch.returncode, said[-3000:]
    assert said.count("whose checkpoint is whole; the same command goes on") == 1, said[-3000:]
    (checkpoint,) = numbered(tmp_path / "checkpoints" / "helpfulness")
    step = int(checkpoint.name.partition("-")[2])
    assert 0 < step < STEPS
    assert fault(checkpoint, ["rng_0.safetensors", "rng_1.safetensors"], [("-", "weight_shards")]) is None
    assert not (tmp_path / "outputs" / "helpfulness").exists()
    # the job is requeued, on one device now
    losses = two_processes.run(line(pico, tmp_path, data, 8))
    assert len(losses) == STEPS - step
    assert manifest.read(tmp_path / "outputs" / "helpfulness")["metrics"]["steps"] == STEPS


def test_without_the_flag_sigterm_ends_as_ever(pico, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    two_processes.run([*line(pico, tmp_path, write_data(tmp_path / "data"), 8), "--max_steps", "1"])
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("at", [2, STEPS])
def test_a_signal_of_one_process_ends_behind_its_step(pico, tmp_path, monkeypatch, at):
    """Behind the last step nothing is to be saved for later: the run is written."""
    from training.trainer import FusionTrainer

    steps, own = (4, FusionTrainer.training_step)
    at = min(at, steps)

    def told(self, *args, **kwargs):
        if self.state.global_step == at - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(self, *args, **kwargs)

    before, data = signal.getsignal(signal.SIGTERM), write_data(tmp_path / "data")
    words = [*line(pico, tmp_path, data, 8, "--save_on_signal"), "--max_steps", str(steps)]
    with monkeypatch.context() as patch:
        patch.setattr(FusionTrainer, "training_step", told)
        if at < steps:
            with pytest.raises(SystemExit) as stop:
                two_processes.run(words)
            assert stop.value.code == 143
        else:
            two_processes.run(words)
    assert signal.getsignal(signal.SIGTERM) is before
    found = [path.name for path in numbered(tmp_path / "checkpoints" / "helpfulness")]
    assert f"checkpoint-{at}" in found
    if at < steps:
        # neither the flag nor its lack makes it another run
        assert len(two_processes.run([word for word in words if word != "--save_on_signal"])) == steps - at
    assert manifest.read(tmp_path / "outputs" / "helpfulness")["metrics"]["steps"] == steps
