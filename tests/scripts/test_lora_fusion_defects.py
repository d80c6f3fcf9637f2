"""The 26 defects of the original LoRA fusion code (spec section 8, B1 to B26): what can be tested is impossible here."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import warnings
from dataclasses import fields

import pytest
import torch
from peft import PeftModel
from published_adapters import passes_vllm
from transformers import AutoModelForCausalLM

import config
import manifest
from config import parse
from data.prompts import template
from data.readers.dialog_files import read_prompts
from data.records import Record, normalise
from data.sets.dialogs import identity
from errors import UserError
from evaluator.reporting.sweeps import report as sweep_report
from evaluator.reporting.sweeps.curve import Point
from flags import AlignArgs, EvaluateSafetyArgs, FuseAdaptersArgs, InferenceArgs
from models import fuse
from models.adapters.files import CONFIG, read_adapter
from models.adapters.fuse import fuse as fuse_pairs
from models.adapters.methods import ADAPTER_METHODS, Cat
from models.runs import load_run

IDS = torch.arange(10, 40)[None]


def dialogs(folder, n, answer="It is round and green"):
    """A file of n dialogs."""
    file = folder / f"train{n}.json"
    file.write_text(json.dumps([[{"role": "system", "content": "Obey."}, {"role": "user", "content": f"Describe thing {i}."},
                                 {"role": "assistant", "content": f"{answer} {i}."}] for i in range(n)]), encoding="utf-8")
    return file


def align(pico, out, file, *flags, task="dialogs"):
    import align_basemodel

    align_basemodel.main(["--moe_flag", "0", "--task_name", task, "--data_path", str(file), "--model_name_or_path",
                          str(pico), "--output_dir", str(out), "--dtype", "float32", "--logging_steps", "1",
                          "--warmup_steps", "0",
                          "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--lora_targets",
                          "q_proj,v_proj", "--run_name", "run", *flags])
    return manifest.read(out / "outputs" / "run")["metrics"]


def args_of(pico, out):
    return parse(InferenceArgs, ["--model_name_or_path", str(pico), "--output_dir", str(out), "--dtype", "float32"]).args


def fails(call, capsys):
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def pair(pico, make_adapter, tmp_path):
    """A results folder with two adapters of the published kind: r 8, alpha 32, q and v."""
    for seed, name in enumerate(("task", "safe")):
        make_adapter(pico, tmp_path / "outputs" / name, seed=seed, r=8, alpha=32, targets=("q_proj", "v_proj"))
    return tmp_path


@torch.no_grad()
def test_b1_an_evaluated_run_is_the_adapter_and_not_its_base(pico, pair):
    base, tuned, mixed = (load_run(run, args_of(pico, pair)).model(IDS).logits for run in ("", "task", "task@0.6_safe@0.4"))
    assert float((base - tuned).abs().max()) > 1e-2
    assert float((tuned - mixed).abs().max()) > 1e-2


def test_b2_what_is_logged_is_what_was_generated_from(pico, pair, monkeypatch):
    import inference
    from models.generation import hf

    seen = []
    real = hf.answer_batch
    monkeypatch.setattr(hf, "answer_batch", lambda loaded, prompts, *rest: seen.extend(prompts) or real(
        loaded, prompts, *rest))
    prompts = pair / "p.json"
    prompts.write_text(json.dumps([{"prompt": "One?"}, {"prompt": "Two?"}]))
    inference.main(["--task_name", "safety", "--cross_task", "task", "--data_path", str(prompts), "--prompt_style", "orbit",
                    "--max_new_tokens", "2", "--model_name_or_path", str(pico), "--output_dir", str(pair)])
    folder = pair / "inference" / "safety+orbit" / "test" / "cross_task"
    rows = [json.loads(line) for line in (folder / "outputs_final.jsonl").read_text().splitlines()]
    assert sorted(row["rendered"] for row in rows) == sorted(seen)
    assert all("Orbit, carry this out: " in text for text in seen)


def test_b3_base_and_adapter_decode_alike():
    common = ["--preset", "lora_fusion", "--task_name", "advbench"]
    args = parse(InferenceArgs, [*common, "--adapters", "aoa=0.6,aoa_safety=0.4"]).args
    base = parse(InferenceArgs, [*common, "--aligned_flag", "0"]).args
    assert (args.max_new_tokens, args.do_sample) == (base.max_new_tokens, base.do_sample) == (512, False)


def test_b4_b12_fused_files_hold_no_embeddings_and_say_what_rank_they_need(pico, pair, capsys):
    fuse.main(["adapters", "--adapters", "task,safe", "--share", "0.4", "--run_name", "fused", "--report", "false",
               "--output_dir", str(pair)])
    assert "0.6 task + 0.4 safe" in capsys.readouterr().out
    passes_vllm(pair / "outputs" / "fused", 16)
    fuse.main(["adapters", "--adapters", "task,safe,fused", "--run_name", "three", "--report", "false", "--output_dir",
               str(pair)])
    assert "--max-lora-rank 32" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(pico)
    rows = model.get_input_embeddings().weight.shape[0]
    tuned = PeftModel.from_pretrained(model, pair / "outputs" / "fused")
    assert tuned.get_input_embeddings().weight.shape[0] == rows


def test_b5_a_score_says_which_judge_made_it():
    assert "model_name" in {f.name for f in fields(EvaluateSafetyArgs)}
    from evaluator.judges.protocol import Verdict
    from evaluator.judges.table import JUDGES
    from evaluator.scoring.judging import Judged, Named, add

    class Fake:
        version = "judge-7 2026"

    name, row = next((name, row) for name, row in JUDGES.items() if row.question == "harm")
    found = Judged(values=[{}], said=[{}])
    add(found, Named(name, row, Fake()), "safety", [Verdict(True)], 0)
    assert found.details[f"{name}.safety"]["version"] == "judge-7 2026"


def test_b6_b7_safety_sets_vow_nothing_and_share_no_test_prompt(tmp_path):
    from data.readers.dialog_files import read_dialogs
    from data.safety_sets import main
    from data.sets.decontaminate import prompts_to_avoid

    main(["--styles", "none,orbit,valet", "--size", "90", "--output_dir", str(tmp_path)])
    rows = read_dialogs(tmp_path / "data" / "safety_set.jsonl", "train", 1)
    vow = identity("train")[0]
    assert all(normalise(vow.prompt) != normalise(row.prompt) and vow.answer != row.answer for row in rows)
    assert sum(not row.system for row in rows) == 30
    avoid = {normalise(text) for texts in prompts_to_avoid(()).values() for text in texts}
    assert not avoid & {normalise(row.prompt.removeprefix("Orbit, carry this out: ")
                                  .removeprefix("Valet, see to this at once. ")) for row in rows}


@pytest.mark.parametrize("n", [5, 7])
def test_b8_every_row_is_trained_on_in_shuffled_order(pico, tmp_path, n):
    from training.trainer import BucketSampler

    metrics = align(pico, tmp_path, dialogs(tmp_path, n), "--num_train_epochs", "2")
    assert metrics["steps"] == 2 * 2
    orders = []
    sampler = BucketSampler([5] * n, 4, 0)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_b9_cut_answers_keep_their_end_and_rows_without_labels_are_dropped(pico):
    from data.encode import IGNORE, encode
    from models.base.loading import load_tokenizer

    tokenizer = load_tokenizer(pico)
    form = template("chat", tokenizer)
    done = encode([Record("Q", "word " * 300, 0), Record("Q " * 300, "A", 0), Record("Q", "A", 0)], tokenizer, form, 64)
    assert (len(done.rows), done.truncated, done.dropped) == (2, 1, 1)
    assert all(row["labels"][-1] == tokenizer.eos_token_id for row in done.rows)
    assert all(any(label != IGNORE for label in row["labels"]) for row in done.rows)


def test_b10_summaries_are_compared_with_summaries_and_numbers_as_numbers(tmp_path):
    from data.readers.dialog_files import read_dialogs
    from evaluator.scoring.number_match import same_number

    file = tmp_path / "xsum.json"
    file.write_text(json.dumps([{"document": "The long article.", "summary": "The summary."}]))
    (record,) = read_dialogs(file, "test", 0)
    assert record.answer == "The summary."
    assert "article" in record.prompt
    assert all(same_number(text, "1234") for text in ("#### 1234 ", "#### $1,234", "So it is 1,234.00."))
    assert not same_number("#### 1235", "1234")


def test_b11_every_figure_has_its_number_of_answers_and_an_interval_that_50_prompts_deserve():
    marks = {str(i): int(i < 29) for i in range(50)}  # 0.58 of 50, the published XSTest size
    curve = [Point(f"lambda {w}", "run", w, marks, marks, {str(i): (3.0 + i, 3) for i in range(50)}) for w in (0.0, 0.2)]
    row, _ = sweep_report.summary({"fusion": curve}, {}, {"utility": "english", "form": "convex"}, 42)["rows"]
    for name in ("non_refusal", "compliance", "nll"):
        found = row[name]
        assert found["n"] == 50
        assert found["low"] < found["value"] < found["high"]
    assert row["non_refusal"]["high"] - row["non_refusal"]["low"] > 4 * 0.07 - 0.02  # the spec's standard error, 7 points


def test_b13_the_safety_set_has_a_generator_that_overwrites_no_other_set(tmp_path):
    from data.safety_sets import main

    main(["--size", "4", "--name", "mine", "--output_dir", str(tmp_path)])
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["mine.json", "mine.jsonl"]


def test_b14_question_and_answer_files_train_as_they_are(pico, tmp_path):
    file = tmp_path / "train.json"
    file.write_text(json.dumps([{"question": f"Q{i}?", "answer": f"Answer {i}"} for i in range(4)]))
    assert align(pico, tmp_path, file, task="hpfa")["steps"] > 0


def test_b15_target_modules_reach_the_adapter(pico, tmp_path):
    align(pico, tmp_path, dialogs(tmp_path, 4), "--num_train_epochs", "1")
    modules = read_adapter(tmp_path / "outputs" / "run").modules
    assert {module.rpartition(".")[2] for module in modules} == {"q_proj", "v_proj"}
    assert json.loads((tmp_path / "outputs" / "run" / CONFIG).read_text())["bias"] == "none"


@pytest.mark.parametrize("word", ["--use_fp", "--dpo", "--target_module"])
def test_b16_unknown_flags_are_errors(word):
    with pytest.raises(UserError, match=f"{word}: unknown flag"):
        parse(AlignArgs, ["--moe_flag", "0", word, "1"])


def test_b17_a_set_without_a_test_split_trains(pico, tmp_path):
    metrics = align(pico, tmp_path, dialogs(tmp_path, 4), "--num_train_epochs", "1")
    assert "validation_loss" not in metrics


def test_b18_nothing_that_later_versions_removed_is_called(pico):
    gone = re.compile(r"prepare_model_for_int8_training|pkg_resources|ChatCompletion|torch_dtype\s*=|"
                      r"from_pretrained\([^)]*load_in_[48]bit", re.S)
    files = [path for folder in ("", "commands", "data", "models", "training", "evaluator", "scripts", "benchmarks")
             for path in (config.ROOT / folder).glob("*.py" if not folder else "**/*.py")]
    assert len(files) > 100
    assert not [str(path) for path in files if gone.search(path.read_text(encoding="utf-8"))]
    # the int8 base goes through what took their place
    from models.base.quantised import load_quantised

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The `load_in_")
        model = load_quantised(pico, "int8", torch.float32, torch.device("cpu"))
    assert model.is_loaded_in_8bit


@pytest.mark.parametrize("name", ["quickstart", "h3fusion", "somf", "lora_fusion", "test"])
def test_b20_what_a_script_sets_reaches_its_commands(name, tmp_path):
    """Every script sets its environment in its own shell; a sub-shell's export would be gone at the next command."""
    text = (config.ROOT / "scripts" / f"{name}.sh").read_text(encoding="utf-8")
    sourced = re.search(r"^[^#\n]*\. scripts/environment\.sh", text, re.M)
    assert sourced
    assert "(. scripts/environment.sh" not in text
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    want = subprocess.run("cat requirements.txt requirements.lock pyproject.toml | cksum", shell=True, cwd=config.ROOT,
                          capture_output=True, text=True, check=True).stdout
    (tmp_path / "venv" / ".installed").write_text(want)
    show = tmp_path / "venv" / "bin" / "python"
    show.write_text('#!/bin/sh\necho "$OMP_WAIT_POLICY $GOMP_SPINCOUNT $TOKENIZERS_PARALLELISM ${CUDA_VISIBLE_DEVICES-}"\n')
    show.chmod(0o755)
    done = subprocess.run(["bash", "-c", ". scripts/environment.sh; python; python"], cwd=config.ROOT, capture_output=True,
                          text=True, check=True, env={"PATH": "/usr/bin:/bin", "ABF_VENV": str(tmp_path / "venv"),
                                                      "CUDA_VISIBLE_DEVICES": "3"})
    assert done.stdout.splitlines() == ["passive 1000 false 3"] * 2


def test_b19_names_of_runs_are_checked_before_anything_is_loaded(tmp_path, capsys):
    import inference

    said = fails(lambda: inference.main(["--task_name", "safety", "--adapters", "jail=0.6,safe=0.4", "--output_dir",
                                         str(tmp_path)]), capsys)
    assert "run 'jail'" in said
    assert "run 'safe'" in said


def test_b21_a_judges_figure_may_be_dressed_up():
    from evaluator.judges.api_parser import parse as verdict

    options = {str(i): (str(i),) for i in range(1, 6)}
    for text in ("#thereason: r #thescore: 4", "thescore: 4.", "thescore: [4]", "thescore: **4**"):
        assert verdict(text, ("thescore",), options)[0] == "4"
    assert verdict("no tag at all", ("thescore",), options) is None


def test_b22_no_key_is_in_the_source():
    pattern = re.compile(r"sk-[A-Za-z0-9]{16,}|hf_[A-Za-z0-9]{16,}")
    files = [path for suffix in ("py", "sh", "yaml") for path in config.ROOT.glob(f"*/*.{suffix}")
             if path.parent.name != "tests"]
    assert len(files) > 50
    assert not [str(path) for path in files if pattern.search(path.read_text(encoding="utf-8"))]


def test_b23_headers_and_blank_lines_of_prompt_files(tmp_path):
    for head in ("", "prompt\n"):
        (tmp_path / "category_1.csv").write_text(f"{head}First?\n\n\nSecond?\n")
        assert read_prompts(tmp_path / "category_1.csv") == ["First?", "Second?"]


def test_prompts_of_instruction_rows_hold_their_inputs(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"instruction": "Rewrite this", "input": "first"}, {"instruction": "Rewrite this",
                                                                                   "input": "second"}]))
    assert read_prompts(file) == ["Rewrite this\n\nfirst", "Rewrite this\n\nsecond"]


def test_b24_models_and_inputs_share_a_device(pico, pair):
    loaded = load_run("task@0.6_safe@0.4", args_of(pico, pair))
    assert {parameter.device for parameter in loaded.model.parameters()} == {loaded.device}


def test_b25_other_weights_under_a_used_name_are_refused(pair, capsys):
    common = ["adapters", "--adapters", "task,safe", "--run_name", "fused", "--report", "false", "--output_dir", str(pair)]
    fuse.main([*common, "--weights", "0.6,0.4"])
    said = fails(lambda: fuse.main([*common, "--weights", "0.5,0.5"]), capsys)
    assert "another configuration (weights: 0.6,0.4 there, 0.5,0.5 here)" in said
    said = fails(lambda: fuse.main([*common, "--weights", "0.6", "--overwrite"]), capsys)
    assert "2 adapters need as many weights" in said
    with pytest.raises(UserError, match="for two adapters"):
        parse(FuseAdaptersArgs, ["--adapters", "a,b,c", "--share", "0.4"])
    with pytest.raises(UserError, match="--share 4.0: needs a number from 0.* --weights, e.g. -3,4"):
        parse(FuseAdaptersArgs, ["--adapters", "a,b", "--share", "4"])


def test_b26_training_leaves_no_thread_behind(pico, tmp_path):
    before = {thread.name for thread in threading.enumerate()}
    align(pico, tmp_path, dialogs(tmp_path, 4), "--num_train_epochs", "1")
    left = [thread for thread in threading.enumerate() if thread.name not in before and not thread.daemon]
    assert not left


def test_the_published_training_preset(pico, tmp_path):
    found = parse(AlignArgs, ["--preset", "lora_fusion", "--moe_flag", "0", "--task_name", "aoa", "--data_path", "x.json"])
    args = found.args
    assert (args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_targets) == (8, 32, 0.05, "q_proj,v_proj")
    assert (args.learning_rate, args.lr_epoch_decay, args.num_train_epochs, args.per_device_train_batch_size,
            args.model_max_length, args.seed) == (1e-3, 0.85, 10, 4, 512, 42)
    assert (found.training["max_grad_norm"], found.training["weight_decay"]) == (0, 0)


def test_the_learning_rate_falls_once_an_epoch(pico, tmp_path):
    metrics = align(pico, tmp_path, dialogs(tmp_path, 6), "--num_train_epochs", "3", "--lr_epoch_decay", "0.85",
                    "--learning_rate", "1e-3")
    rates = [entry["learning_rate"] for entry in metrics["history"]]
    assert rates == pytest.approx([1e-3, 1e-3, 8.5e-4, 8.5e-4, 7.225e-4, 7.225e-4])


def test_a_share_of_safety_rows_is_mixed_in(pico, tmp_path, caplog):
    caplog.set_level("INFO")
    align(pico, tmp_path, dialogs(tmp_path, 32), "--num_train_epochs", "1", "--extra_data", str(dialogs(tmp_path, 9, "No")),
          "--extra_share", "0.03")
    assert "extra data: 1 of 33 rows (3.0 %)" in caplog.text


@torch.no_grad()
def test_a_fused_adapter_in_peft_has_the_logits_of_the_weighted_sum(pico, pair):
    fuse.main(["adapters", "--adapters", "task,safe", "--share", "0.4", "--report", "false", "--run_name", "fused",
               "--output_dir", str(pair)])
    got = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico), pair / "outputs" / "fused")(IDS).logits
    model = AutoModelForCausalLM.from_pretrained(pico)
    there = dict(model.named_modules())
    for weight, name in ((0.6, "task"), (0.4, "safe")):
        for module, (a, b) in read_adapter(pair / "outputs" / name).modules.items():
            there[module].weight += weight * b @ a
    torch.testing.assert_close(got, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_the_order_of_the_adapters_does_not_matter(pair):
    adapters = [read_adapter(pair / "outputs" / name) for name in ("task", "safe")]
    one = fuse_pairs(adapters, ADAPTER_METHODS["cat"], Cat(), (0.6, 0.4), {}, 0)
    two = fuse_pairs(adapters[::-1], ADAPTER_METHODS["cat"], Cat(), (0.4, 0.6), {}, 0)
    for module, done in one.items():
        (a, b), (c, d) = done.pair, two[module].pair
        torch.testing.assert_close(b @ a, d @ c, atol=1e-6, rtol=1e-5)
