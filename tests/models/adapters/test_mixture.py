"""Weighted sums by name: parsing, and models that are fused while they load."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from config import parse
from errors import UserError
from flags import InferenceArgs
from flags.mixture import mixture_parts, mixture_run, read_mixture
from models import fuse
from models.adapters.files import read_adapter
from models.adapters.mixture import load_mix, read_parts
from models.adapters.resident import ResidentBase
from models.adapters.weights import matched, norm
from models.run_folders import run_files

IDS = torch.arange(10, 40)[None]


@pytest.fixture
def home(adapters, tmp_path):
    shutil.copytree(adapters / "outputs", tmp_path / "outputs")
    return tmp_path


@torch.no_grad()
def logits(home, run, base):
    return load_mix(home, mixture_parts(run), ResidentBase(base, torch.float32, torch.device("cpu")))(IDS).logits


@pytest.mark.parametrize("parts", [(("task", 0.6), ("safety", 0.4)), (("a_b", -0.5), ("c_1", 1e-4), ("d", 2.0)),
                                   (("x", 1.0),)])
def test_names_go_both_ways(parts):
    assert mixture_parts(mixture_run(parts)) == parts
    assert read_mixture(",".join(f"{name}={weight}" for name, weight in parts)) == parts


def test_ordinary_runs_are_no_sums():
    assert mixture_parts("mix_moe_reg_00010") == ()


@pytest.mark.parametrize("text", ["task", "task=x", "task=nan", "a=1,a=2", "a@b=1", "out/a=1", "=1"])
def test_bad_sums_on_the_command_line(text):
    with pytest.raises(ValueError, match="'|twice|number|finite"):
        read_mixture(text)
    with pytest.raises(UserError, match="--adapters"):
        parse(InferenceArgs, ["--adapters", text])


@pytest.mark.parametrize("run", ["@1", "a@", "a@1_", "a@1_b", "a@x_b@1"])
def test_bad_names(run):
    with pytest.raises(ValueError, match="needed|number"):
        mixture_parts(run)


def test_flags_become_runs():
    args = parse(InferenceArgs, ["--adapters", "task=0.6,safety=0.4; task=1"]).args
    assert args.runs == ("task@0.6_safety@0.4", "task@1")
    with pytest.raises(UserError, match="drop --cross_task"):
        parse(InferenceArgs, ["--adapters", "a=1", "--cross_task", "b"])


def test_loading_equals_the_fused_file(pico, home):
    fuse.main(["adapters", "--adapters", "helpfulness,safety", "--weights", "0.6,0.4", "--run_name", "both", "--report",
               "false", "--output_dir", str(home)])
    written = logits(home, "both@1", pico)
    torch.testing.assert_close(logits(home, "helpfulness@0.6_safety@0.4", pico), written, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(home, "safety@0.4_helpfulness@0.6", pico), written, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(home, "helpfulness@0.6", pico), written, atol=1e-3)


def test_files_of_a_sum_are_those_of_its_parts(home):
    files = run_files(home, "helpfulness@0.6_safety@0.4")
    assert [file.parent.name for file in files] == ["helpfulness", "safety"]
    with pytest.raises(UserError) as error:
        run_files(home, "gone@0.6_away@0.4")
    assert len(error.value.problems) == 2
    with pytest.raises(UserError, match="is no weighted sum"):
        run_files(home, "safety@1_")


def test_another_base_is_refused(home):
    config = home / "outputs" / "safety" / "manifest.json"
    config.write_text(json.dumps({"inputs": {"base": "other"}}))
    with pytest.raises(UserError, match="trained on different bases"):
        read_parts(home, (("helpfulness", 1.0), ("safety", 1.0)))


def test_inference_answers_with_a_sum_and_scores_find_it(pico, home, tmp_path):
    import inference
    from evaluator.scoring import engine

    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me {i}."}) + "\n" for i in range(3)))
    inference.main(["--task_name", "safety", "--adapters", "helpfulness=0.6,safety=0.4", "--prompt_style", "orbit",
                    "--data_path", str(prompts), "--model_name_or_path", str(pico), "--output_dir", str(home),
                    "--max_new_tokens", "4"])
    folder = home / "inference" / "safety+orbit" / "test" / "cross_helpfulness@0.6_safety@0.4"
    rows = engine.read_answers(folder)
    assert [row["prompt"] for row in rows] == ["Tell me 0.", "Tell me 1.", "Tell me 2."]
    assert "Orbit, carry this out: Tell me 0." in rows[0]["rendered"]
    subject = engine.Subject("cross_helpfulness@0.6_safety@0.4", "helpfulness@0.6_safety@0.4")
    args = SimpleNamespace(results=home, model_name_or_path=str(pico), cache_dir=None, checkpoint_number=-1)
    assert len(engine.model_hash(args, subject).split(",")) == 3


@pytest.mark.parametrize("scope", ["model", "module"])
def test_matched_norms(home, scope):
    pair = [read_adapter(home / "outputs" / name) for name in ("helpfulness", "safety")]
    (first, second), factors = matched(pair, scope)
    assert first is pair[0]
    assert norm(second) == pytest.approx(norm(first), rel=1e-5)
    assert (len(set(factors["safety"])) == 1) == (scope == "model")
    for module, (a, b) in second.modules.items():
        if scope == "module":
            other_a, other_b = first.modules[module]
            assert float((b @ a).norm()) == pytest.approx(float((other_b @ other_a).norm()), rel=1e-4)


def test_lambda_and_random_directions_on_the_command_line(home, caplog):
    common = ["--report", "false", "--output_dir", str(home)]
    with caplog.at_level("INFO"):
        fuse.main(["adapters", "--adapters", "helpfulness,safety", "--share", "0.4", "--run_name", "lam", *common])
    base = json.loads((home / "outputs" / "lam" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert f"--cross_task lam --model_name_or_path {base} --output_dir" in caplog.text
    fuse.main(["adapters", "--adapters", "helpfulness,safety", "--weights", "0.6,0.4", "--run_name", "free", *common])
    fuse.main(["adapters", "--adapters", "safety", "--method", "random", "--run_name", "rand", *common])
    lam, free, rand, safe = (read_adapter(home / "outputs" / name) for name in ("lam", "free", "rand", "safety"))
    for module, (a, b) in lam.modules.items():
        torch.testing.assert_close(b @ a, free.modules[module][1] @ free.modules[module][0])
        ra, rb = rand.modules[module]
        sa, sb = safe.modules[module]
        assert ra.shape == sa.shape
        assert float((rb @ ra).norm()) == pytest.approx(float((sb @ sa).norm()), rel=1e-4)
        cosine = float(((rb @ ra) * (sb @ sa)).sum() / (sb @ sa).norm() ** 2)
        assert abs(cosine) < 0.25
    with pytest.raises(SystemExit):
        fuse.main(["adapters", "--adapters", "helpfulness,safety", "--share", "0.4", "--weights", "1,1", *common])
