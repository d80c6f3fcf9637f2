"""API judges through a command: answers in a CSV, scores and registry out, killed and gone on with."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from fault_server import FaultServer, serving

import config
import manifest
from evaluator import evaluate_truth_and_info
from evaluator.judges import api_client, api_limits

KEY = "sk-test-command-not-a-real-key"


@pytest.fixture
def server():
    def say(messages):
        text = messages[0]["content"]
        return '{"reason": "it is so", "verdict": "%s"}' % ("yes" if "truthful" in text or "right" in text else "no")

    with serving(FaultServer(say)) as running:
        yield running


@pytest.fixture
def words(server, tmp_path, monkeypatch):
    """A command line: 12 answers, two judges, a key in the environment."""
    monkeypatch.setattr(api_limits, "FIRST_DELAY", 0.002)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    api_client.client.cache_clear()
    with (tmp_path / "answers.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *((f"Is {i}; a number?", "right" if i % 4 else "No idea.")
                                                             for i in range(12))])
    return ["--answers", str(tmp_path / "answers.csv"), "--judges", "api-truth,api-info", "--judge_model", "m",
            "--judge_base_url", server.url, "--judge_retries", "1", "--judge_concurrency", "3",
            "--output_dir", str(tmp_path / "results")]


def scores(tmp_path):
    found = json.loads((tmp_path / "results/scores/answers/evaluate_truth_and_info.json").read_text())
    del found["seconds"]
    return found


def test_failures_are_counted_and_made_good(server, words, tmp_path, caplog, capfd):
    caplog.set_level("INFO")
    server.script = {"Is 3;": ["500"], "Is 5;": ["malformed"]}
    evaluate_truth_and_info.main(words)
    found = scores(tmp_path)
    counts = found["judged"]["api-info.truthfulness"]
    assert (counts["answers"], counts["scored"], counts["notes"]) == (12, 10, {"failed": 2})
    assert found["scores"]["api-truth.truthfulness"]["value"] == 1
    assert found["scores"]["api-info.truthfulness"]["value"] == pytest.approx(7 / 10)
    assert "api-info: 2 failed, 10 parsed; 28 requests" in caplog.text
    assert "api-info.truthfulness: 2 failed of 12 answers; the first failure: " in caplog.text
    assert "; the same command asks them again" in caplog.text
    before, server.script = len(server.seen), {}
    api_client.client.cache_clear()
    evaluate_truth_and_info.main(words)
    assert len(server.seen) - before == 4
    assert set(server.paid.values()) == {1}
    final = scores(tmp_path)
    assert final["judged"]["api-info.truthfulness"]["notes"] == {}
    assert final["scores"]["api-info.truthfulness"]["value"] == 0.75
    assert len(manifest.registry(tmp_path / "results")) == 2
    api_client.client.cache_clear()
    evaluate_truth_and_info.main(words)
    assert len(server.seen) - before == 4
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in written.decode("utf-8", "replace") + caplog.text + "".join(capfd.readouterr())


def test_a_killed_command_goes_on(server, words, tmp_path):
    """kill -9 with six replies in and three requests under way: only what had no reply is asked, the scores are the same."""
    server.script, server.slow = {"Is": [*["ok"] * 6, "slow"]}, 3600.0
    run = [sys.executable, str(config.ROOT / "evaluator" / "evaluate_truth_and_info.py"), *words]
    environment = os.environ | {"PYTHONPATH": str(config.ROOT)}
    with subprocess.Popen(run, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + 200
        while len(server.seen) < 9 and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    # all three workers wait, each after it has kept its last reply
    assert [what for _, what, _ in server.seen] == [*["ok"] * 6, *["slow"] * 3]
    # the killed one may have left its lock, which holds nobody
    assert not [path for path in (tmp_path / "results/scores").rglob("*.json*") if path.suffix != ".lock"]
    server.script = {}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(server.seen) == 9 + 18
    assert len(server.paid) == 24
    assert set(server.paid.values()) == {1}
    interrupted = scores(tmp_path)
    (tmp_path / "results").rename(tmp_path / "first")
    evaluate_truth_and_info.main(words)
    assert scores(tmp_path) == interrupted
