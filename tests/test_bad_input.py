"""Bad input: the message names the flag or file, the value, what is allowed and the next step; code 2; nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import align, common, write_data

import align_basemodel
import config


@pytest.fixture
def fails(pico, tmp_path, capsys):
    """Run align_basemodel with flags that must fail; returns what stderr says."""
    def run(*flags, base=pico):
        with pytest.raises(SystemExit) as stop:
            align_basemodel.main([*common(base, tmp_path / "results"), *flags])
        assert stop.value.code == 2
        outputs = tmp_path / "results" / "outputs"
        assert not outputs.exists() or not list(outputs.iterdir())
        return capsys.readouterr().err
    return run


@pytest.mark.parametrize(("flags", "says"), [
    (("--task_name", "safty"), ["--task_name safty", "did you mean safety?", "allowed:"]),
    (("--moe_flag", "0", "--method", "ppo"), ["--method ppo", "allowed: sft, dpo"]),
    (("--moe_flag", "2"), ["--moe_flag 2", "allowed: 0, 1"]),
    (("--preset", "nothing"), ["--preset nothing", "embedded", "h3fusion"]),
    (("--gate_loss_weight", "-0.5"), ["--gate_loss_weight -0.5", "0 or more"]),
    (("--safety_weight", "-1e-3"), ["--safety_weight -0.001", "0 or more"]),
    (("--learning_rate", "fast"), ["--learning_rate fast", "a number"]),
    (("--lora_dropout", "1.5"), ["--lora_dropout 1.5", "below 1"]),
    (("--run_name", "../up"), ["--run_name ../up"]),
    (("--moe_flag", "0", "--gate_loss_weight", "1"), ["add --moe_flag 1"]),
    (("--task_name", "safty", "--learning_rate", "x", "--seed", "-1", "--nmu_train_epochs", "1"),
     ["--task_name safty", "--learning_rate x", "--seed -1", "did you mean num_train_epochs?"]),
])
def test_flags(fails, flags, says):
    err = fails(*flags)
    assert all(word in err for word in says), err


LONG = json.dumps({"prompt": "x" * 1_100_000, "response": "y", "is_safe": True})
GOOD = json.dumps({"prompt": "a", "response": "b", "is_safe": True})


@pytest.mark.parametrize(("content", "says"), [
    ("", "empty"), (f"{GOOD}\n{{\n", ":2"), (f"{GOOD}\n{LONG}\n", ":2"),
    (f'{GOOD}\n{{"prompt": "a"}}\n', ":2"), (b"\xff\xfe\x00bad\n", "UTF-8"),
])
def test_data_files(fails, tmp_path, content, says):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    err = fails("--moe_flag", "0", "--task_name", "safety", "--data_path", str(path))
    assert "rows.jsonl" in err
    assert says in err, err


def test_missing_data_and_broken_mix(fails, tmp_path):
    missing = str(tmp_path / "nothing.jsonl")
    assert "nothing.jsonl" in fails("--moe_flag", "0", "--task_name", "safety", "--data_path", missing)
    err = fails("--moe_flag", "0", "--task_name", "mix", "--data_path", "helpful=x.json")
    assert "helpfulness=FILE" in err


def test_duplicate_rows_are_reported_with_their_line(pico, tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p {i}", "response": "no, I can't", "is_safe": True} for i in range(8)]
    path.write_text("\n".join(json.dumps(row) for row in [*rows, rows[2]]) + "\n")
    with caplog.at_level("INFO"):
        align(pico, tmp_path, {"safety": str(path)}, "safety", "--moe_flag", "0")
    assert "rows.jsonl:9" in caplog.text
    assert "training data: 8 rows" in caplog.text


@pytest.mark.parametrize(("base", "says"), [
    ("./nowhere", "no such folder"), ("a/b/c", "no such folder"), ("someone/unknown-model", "allowed: 'embedded'"),
])
def test_base_models(fails, tmp_path, base, says):
    data = write_data(tmp_path)
    err = fails("--moe_flag", "0", "--task_name", "safety", "--data_path", data["safety"], base=base)
    assert base in err
    assert says in err


def test_a_folder_without_weights(fails, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "needs config.json and *.safetensors" in fails("--moe_flag", "0", "--task_name", "safety",
                                                          base=tmp_path / "empty")


def test_template_hash_mismatch(fails, monkeypatch, tmp_path):
    from data import prompts

    text, want = prompts.ALPACA_HASHES["with input"]
    monkeypatch.setitem(prompts.ALPACA_HASHES, "with input", (text + " ", want))
    data = write_data(tmp_path)
    err = fails("--moe_flag", "0", "--task_name", "safety", "--data_path", data["safety"], "--template", "alpaca")
    assert "Alpaca template with input" in err
    assert want in err


def test_full_disk_leaves_nothing(fails, monkeypatch, tmp_path):
    from training import sft

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "adapter_model.safetensors")

    monkeypatch.setattr(sft, "save_adapter", full)
    data = write_data(tmp_path)
    err = fails("--moe_flag", "0", "--task_name", "safety", "--data_path", data["safety"])
    assert "the disk is full" in err


def test_same_name_other_configuration(pico, tmp_path, capsys):
    data = write_data(tmp_path / "data")
    align(pico, tmp_path, data, "safety", "--moe_flag", "0")
    before = (tmp_path / "outputs" / "safety" / "manifest.json").read_text()
    with pytest.raises(SystemExit) as stop:
        align(pico, tmp_path, data, "safety", "--moe_flag", "0", "--lora_r", "2")
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "lora_r: 16 there, 2 here" in err
    assert "--overwrite" in err
    assert (tmp_path / "outputs" / "safety" / "manifest.json").read_text() == before
    assert align(pico, tmp_path, data, "safety", "--moe_flag", "0", "--lora_r", "2", "--overwrite")["config"]["lora_r"] == 2


def test_flag_errors_load_no_torch():
    code = ("import sys, align_basemodel\n"
            "try: align_basemodel.main(['--task_name', 'safty'])\n"
            "except SystemExit as stop: assert stop.code == 2\n"
            "assert 'torch' not in sys.modules and 'transformers' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=config.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "did you mean safety?" in done.stderr
    assert Path(config.ROOT, "align_basemodel.py").is_file()
