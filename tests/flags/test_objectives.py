"""align_basemodel.py's objectives: which words choose them, whose a flag is, what --help and presets say of each."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import fields

import pytest

import config
import flags
from errors import UserError
from flags import (
    TRAINED,
    AlignArgs,
    DpoArgs,
    EvaluateSafetyArgs,
    ExpertArgs,
    FusedMoeArgs,
    InferenceArgs,
    MaskArgs,
    MaskFiguresArgs,
    ReportArgs,
    SearchArgs,
    SoupArgs,
)
from flags.base import WITHOUT_EFFECT, PlanFlags, VerbosityFlags

#: What each objective cannot do without.
NEEDED = {MaskArgs: ["--tasks", "a"], SoupArgs: ["--adapters", "a,b"], SearchArgs: ["--adapters", "a,b"]}
KINDS = list(TRAINED.values())


def words_of(kind):
    return [*kind.words.split(), *NEEDED.get(kind, [])]


def names(kind):
    return {item.name for item in fields(kind)}


def problems(command, words):
    with pytest.raises(UserError) as caught:
        config.parse(command, words)
    return caught.value.problems


@pytest.fixture
def preset(tmp_path):
    def write(text):
        (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
        return ["--preset", str(tmp_path / "mine.yaml")]
    return write


def shown(capsys, command, *words):
    """--help as one line per flag: heading -> {flag: its text}."""
    with pytest.raises(SystemExit) as stop:
        config.parse(command, [*words, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    found, heading, name = {}, "", ""
    for line in text.splitlines():
        if re.fullmatch(r"\S.*:", line):
            heading = line[:-1]
        elif start := re.match(r"  (?:-h, )?--(\w+) ?", line):
            name = start[1]
            found.setdefault(heading, {})[name] = line[start.end():]
        elif line.startswith("        ") and name:
            found[heading][name] += " " + line.strip()
        else:
            name = ""
    return found, text


@pytest.mark.parametrize(("words", "kind"), [
    ("", FusedMoeArgs), ("--moe_flag 1", FusedMoeArgs), ("--moe_flag 0", ExpertArgs), ("--moe-flag=0", ExpertArgs),
    ("--moe_flag 0 --method dpo", DpoArgs), ("--method=dpo --moe_flag=0", DpoArgs), ("--method mask --tasks a", MaskArgs),
    ("--tasks a --method=mask --moe_flag 0", MaskArgs), ("--moe_flag 0 --method soup --adapters a,b", SoupArgs),
    ("--moe_flag 0 --adapters a,b --method search", SearchArgs),
    # a value that looks like an objective is none
    ("--run_name mask", FusedMoeArgs), ("--moe_flag 0 --run_name=dpo", ExpertArgs),
])
def test_two_flags_choose_the_objective(words, kind):
    args = config.parse(AlignArgs, words.split()).args
    assert type(args) is kind
    assert isinstance(args, AlignArgs)
    assert type(args) is TRAINED[args.moe_flag, args.method]


@pytest.mark.parametrize(("words", "said"), [
    ("--method dpo", "--method dpo: the fused MoE is tuned with sft; use --moe_flag 0 for dpo"),
    ("--moe_flag 1 --method dpo", "--method dpo: the fused MoE is tuned with sft; use --moe_flag 0 for dpo"),
    ("--moe_flag 1 --method mask --tasks a", "--method mask: the fused MoE is tuned with sft; use --moe_flag 0 for mask"),
    ("--method dop", "--method dop: not known (did you mean dpo?)"),
    ("--moe_flag yes", "--moe_flag yes: needs a whole number"),
])
def test_what_fits_no_objective_is_said_once(words, said):
    (problem,) = problems(AlignArgs, words.split())
    assert said in problem


@pytest.mark.parametrize("other", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_flag_of_another_objective_is_refused_and_its_owner_named(kind, other):
    for name in names(other) - names(kind):
        (problem,) = problems(AlignArgs, [*words_of(kind), f"--{name}", "1"])
        assert problem.startswith(f"--{name} 1: ")
        method = other.words.split()[-1]
        assert re.search(r"--moe_flag 1\b" if other is FusedMoeArgs else rf"\b{method}\b", problem), problem


def test_every_objective_takes_its_own_flags_and_no_more():
    own = {kind: names(kind) for kind in KINDS}
    assert "beta" in own[DpoArgs] & own[MaskArgs]
    assert not own[MaskArgs] & {"tuning", "lora_r", "extra_data", "mixing", "pad_to_max", "adapters", "gate_loss_weight"}
    assert not own[FusedMoeArgs] & {"beta", "tasks", "tuning", "init_adapter", "prompt_style"}
    assert "base_quantization" in own[FusedMoeArgs] & own[ExpertArgs] & own[DpoArgs]
    assert not own[ExpertArgs] & {"expert_topk", "beta", "adapters", "anchor"}
    # no gradient, no Trainer
    assert not own[SearchArgs] & {"learning_rate", "num_train_epochs", "lr_epoch_decay", "save_steps"}
    assert [kind for kind in KINDS if not kind.takes_training_arguments] == [SearchArgs]


def test_training_arguments_belong_to_what_trains_by_gradient():
    (problem,) = problems(AlignArgs, [*words_of(SearchArgs), "--max_steps", "3"])
    assert problem.startswith("--max_steps 3: belongs to training by gradient")
    assert config.parse(AlignArgs, words_of(SearchArgs)).training == {}  # the preset's warmup_steps are passed over


@pytest.mark.parametrize(("words", "said"), [
    ("--expert_topk 2 --moe_flag 0", "--expert_topk 2: belongs to the fused MoE; add --moe_flag 1 or drop it"),
    ("--gate_per_layer --moe_flag 0", "--gate_per_layer: belongs to the fused MoE; add --moe_flag 1 or drop it"),
    ("--moe_flag 0 --tasks a", "--tasks a: belongs to a mask; add --method mask or drop it"),
    ("--moe_flag 0 --gate-loss-weight -1", "--gate_loss_weight -1: belongs to the fused MoE"),
])
def test_the_next_step(words, said):
    (problem,) = problems(AlignArgs, words.split())
    assert said in problem


def test_shared_sections_hold_keys_of_every_objective(preset):
    words = preset("common: {beta: 0.3, judges: keyword}\nalign_expert: {pad_to_max: true}\n"
                   "align: {expert_topk: 3, lora_r: 5, adapters: 'a,b', warmup_steps: 7}\n")
    assert config.parse(AlignArgs, words).args.expert_topk == 3
    expert = config.parse(AlignArgs, [*words, "--moe_flag", "0", "--task_name", "safety"])
    assert (expert.args.lora_r, expert.args.pad_to_max, expert.training) == (5, True, {"warmup_steps": 7})
    assert config.parse(AlignArgs, [*words, "--moe_flag", "0", "--task_name", "safety", "--method", "dpo"]).args.beta == 0.3
    assert config.parse(AlignArgs, [*words, "--moe_flag", "0", "--method", "search"]).args.adapter_names == ("a", "b")
    assert config.parse(ReportArgs, words).args.name == "report"


@pytest.mark.parametrize(("text", "words", "said"), [
    ("align: {expert_topkk: 3}", "", "align.expert_topkk: unknown key (did you mean expert_topk?)"),
    ("align: {judges: keyword}", "--moe_flag 0", "align.judges: this command does not read it"),
    ("align_mask: {lora_r: 3}", "--method mask --tasks a", "align_mask.lora_r: belongs to the fused MoE"),
    ("align_moe: {beta: 1}", "", "align_moe.beta: belongs to DPO"),
    ("common: {warmup_steps: 3}", "", "common.warmup_steps: unknown key"),
    ("align: {method: mask}", "", "--method mask: give it on the command line; a preset cannot choose it"),
    ("align_mix: {method: dpo}", "--moe_flag 0", "a preset chooses it in the section align"),
])
def test_a_key_that_no_command_of_a_section_reads_is_an_error(preset, text, words, said):
    assert any(said in problem for problem in problems(AlignArgs, [*preset(text), *words.split()]))


def test_a_preset_chooses_dense_runs_and_the_command_line_wins(preset):
    words = preset("align: {moe_flag: 0, lora_r: 1}\nalign_mix: {lora_r: 2}\nalign_moe: {lora_r: 3}\n")
    assert config.parse(AlignArgs, words).args == ExpertArgs(lora_r=2)
    assert type(config.parse(AlignArgs, [*words, "--method", "dpo"]).args) is DpoArgs
    moe = config.parse(AlignArgs, [*words, "--moe_flag", "1"]).args
    assert (type(moe), moe.lora_r) == (FusedMoeArgs, 3)


def test_help_stands_in_groups(capsys):
    found, text = shown(capsys, AlignArgs)
    assert list(found) == ["Help and presets", "Objective", "Fused MoE", "Data", "LoRA", "Optimiser", "Validation",
                           "Base model", "Machine", "Results", "Plan", "Output"]
    assert set(found["LoRA"]) == {"lora_r", "lora_alpha", "lora_dropout", "base_quantization"}
    shown_names = {name for group in found.values() for name in group}
    assert shown_names == names(FusedMoeArgs) | names(PlanFlags) | names(VerbosityFlags) | {"help", "preset"}
    for kind in KINDS:
        assert f"align_basemodel.py {kind.words} --help" in text
    assert "--warmup_steps 5 (preset embedded)" in text
    found, text = shown(capsys, AlignArgs, "--method", "mask")
    assert {"Mask", "Anchor", "DPO"} <= set(found)
    assert "LoRA" not in found


@pytest.mark.parametrize(("words", "name", "ends"), [
    ("", "lora_r", "(default: 8, preset embedded)"), ("", "model_max_length", "(default: 192, preset embedded)"),
    ("--moe_flag 0 --task_name safety", "max_train_samples", "(default: 160, preset embedded)"),
    ("--moe_flag 0 --task_name safety", "learning_rate", "(default: 0.004, preset embedded)"),
    ("--moe_flag 0 --task_name safety --method dpo", "learning_rate", "(default: 0.0001, preset embedded)"),
    ("--preset lora_fusion", "lora_targets", "(default: q_proj,v_proj, preset lora_fusion)"),
    ("--method mask", "learning_rate", "(default: 0.005, preset embedded)"), ("--method mask", "beta", "(default: 0.1)"),
    ("--method dpo", "beta", "(default: 0.1)"), ("--moe_flag 0 --lora_r 3", "lora_r", "(given: 3)"),
    ("--moe_flag 0", "data_path", "(default: empty)"), ("--gate_per_layer", "gate_per_layer", "(given: true)"),
])
def test_help_shows_the_value_in_force_and_where_it_comes_from(capsys, words, name, ends):
    found, _ = shown(capsys, AlignArgs, *words.split())
    (text,) = [group[name] for group in found.values() if name in group]
    assert text.endswith(ends)


def test_help_of_another_command(capsys):
    found, _ = shown(capsys, InferenceArgs, "--preset", "h3fusion")
    assert found["Prompts and answers"]["max_new_tokens"].endswith("(default: 512, preset h3fusion)")
    assert list(found)[-5:] == ["Base model", "Machine", "Results", "Plan", "Output"]


def test_help_with_a_preset_that_is_none(capsys):
    assert "no such preset" in problems(AlignArgs, ["--preset", "nothing", "--help"])[0]


@pytest.mark.parametrize("words", [["--template", "alpaca"], ["--dtype", "float32"], ["--threads", "2"], ["--overwrite"]])
def test_a_command_that_loads_no_model_takes_no_flag_of_one(words):
    (problem,) = problems(ReportArgs, words)
    assert problem == f"{' '.join(words)}: this command does not read it; drop it"


@pytest.mark.parametrize(("command", "words", "name"), [
    (MaskFiguresArgs, ["--masks", "a", "--threads", "1"], "threads"),
    (EvaluateSafetyArgs, ["--task_name", "raw", "--model_name", "QAModeration"], "model_name")])
def test_a_published_flag_without_effect_says_so(caplog, command, words, name):
    config.parse(command, words)
    (record,) = caplog.records
    assert f"--{name}: has no effect here (" in record.getMessage()
    caplog.clear()
    config.parse(command, words[:2])
    assert not caplog.records


def test_the_evaluators_share_a_section(preset):
    words = [*preset("evaluate: {lite: true, judge_timeout: 3}\n"), "--task_name", "raw"]
    assert config.parse(EvaluateSafetyArgs, words).args.lite
    assert config.parse(flags.EvaluateSkillsArgs, words).args.task_name == "raw"
    (problem,) = problems(flags.EvaluateSkillsArgs, ["--task_name", "raw", "--lite"])
    assert problem.startswith("--lite: this command scores a model; it belongs to evaluate_safety.py")


def test_what_is_taken_without_effect_is_passed_where_it_says():
    known = {kind.__name__ for kind in flags.COMMANDS}
    for command, taken in WITHOUT_EFFECT.items():
        assert command in known
        for name, why in taken.items():
            source = why.partition(" passes it")[0]
            assert not source.startswith("scripts/") or f"--{name}" in (config.ROOT / source).read_text(encoding="utf-8")


COMMANDS = {"inference.py": InferenceArgs, "align_basemodel.py": AlignArgs, "models/llama_moe.py": flags.FuseMoeArgs,
            "evaluator/evaluate_safety.py": EvaluateSafetyArgs, "evaluator/report.py": ReportArgs,
            "evaluator/evaluate_helpfulness.py": flags.EvaluateHelpfulnessArgs, "models/fuse.py": flags.FuseAdaptersArgs,
            "evaluator/evaluate_truth_and_info.py": flags.EvaluateTruthArgs,
            "evaluator/evaluate_refusal.py": flags.EvaluateRefusalArgs}


@pytest.mark.parametrize("line", [
    "scripts/quickstart.sh --lite", "scripts/quickstart.sh --full", "scripts/h3fusion.sh --max_steps 50"])
@pytest.mark.parametrize("gpu", [False, True])
def test_every_command_of_the_published_path_parses(tmp_path, line, gpu):
    """The scripts run with a python that only writes down what it is asked."""
    places = tmp_path / "bin"
    places.mkdir()
    # one write a line: two lanes of a script run side by side
    (places / "python").write_text(f'#!/bin/bash\nline=$(printf "%q " "$@"); echo "$line" >>{tmp_path}/asked\n')
    # answers as where a driver and a card are, or are not
    (places / "nvidia-smi").write_text(f"#!/bin/bash\nexit {int(not gpu)}\n")
    for name in ("python", "nvidia-smi"):
        (places / name).chmod(0o755)
    want = subprocess.run("cat requirements.txt requirements.lock pyproject.toml | cksum", shell=True, cwd=config.ROOT,
                          capture_output=True, text=True, check=True).stdout
    (tmp_path / ".installed").write_text(want)
    subprocess.run(["bash", *line.split()], cwd=config.ROOT, check=True, capture_output=True, timeout=60,
                   env={"PATH": "/usr/bin:/bin", "ABF_VENV": str(tmp_path), "OUT": str(tmp_path / "out"), "ABF_WARM": ""})
    asked = [shlex.split(words) for words in (tmp_path / "asked").read_text().splitlines()]
    kinds, steps = set(), set()
    for script, *words in asked:
        if script != "-m":
            args = config.parse(COMMANDS[script], words[script == "models/fuse.py":]).args
            kinds.add(type(args))
            if isinstance(args, AlignArgs):
                steps.add((args.per_device_train_batch_size, args.gradient_accumulation_steps))
    assert steps == {(4, 1)}
    assert {ExpertArgs, FusedMoeArgs, InferenceArgs, ReportArgs, flags.FuseMoeArgs} <= kinds


@pytest.mark.parametrize("line", [
    # H3Fusion's README and flags
    "--moe_flag 0 --task_name safety", "--moe_flag 0 --task_name mix --learning_rate 5e-4 --save_steps 5000",
    "--moe_flag 1 --expert_topk 2 --gate_loss_weight 0.01",
    "--moe_flag 1 --helpfulness_weight 0.1 --safety_weight 0.01 --truthfulness_weight 0.001 --cache_dir x --data_path y",
    # docs/studies/somf.md
    "--moe_flag 0 --preset somf_wizardlm --task_name safety --method dpo --init_adapter safety_sft --run_name aligned",
    "--preset somf_wizardlm --method mask --aligned aligned --tasks chinese",
    "--preset somf_tinyllama --method mask --tasks chinese,english --merge_rule task_arithmetic --merge_lambda 0.04",
    # docs/studies/lora_fusion.md and the preset's own head
    "--preset lora_fusion --moe_flag 0 --task_name aoa --data_path aoa.json",
    "--moe_flag 0 --task_name dialogs --data_path safety_set.jsonl --run_name safe",
])
def test_published_lines_go_on(caplog, line):
    assert isinstance(config.parse(AlignArgs, line.split()).args, AlignArgs)
    assert not caplog.records


@pytest.mark.parametrize(("words", "said"), [
    (["--tuning", "full", "--lora_r", "8"], "--lora_r 8: --tuning full trains no adapter"),
    (["--tuning", "full", "--lora_alpha", "8", "--method", "dpo"], "--lora_alpha 8.0: --tuning full trains no adapter"),
    (["--seed", str(1 << 32)], "--seed 4294967296: must be below 4294967296"),
    (["--max_steps", "0"], "--max_steps 0: must be 1 or more"),
    (["--torch_compile", "true"], "--torch_compile True: the losses run a model's body and its head apart"),
    (["--hub_token", "hf_abcdefgh"], "--hub_token [hidden]: a secret comes from the environment"),
    (["--push_to_hub"], "--push_to_hub True: a run's result lies in outputs/NAME"),
    (["--optim_args", "foo=1"], "--optim_args foo=1: adamw_torch takes none of these"),
    (["--max_steps", "-5"], "--max_steps -5: must be 1 or more"),
    (["--data_path", ""], "--data_path: is empty; give a place"),
    (["--model_name_or_path", ""], "--model_name_or_path: is empty"),
    (["--output_dir="], "--output_dir: is empty"),
    (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor 0.1: the loss is the plain one"),
    (["--label_smoothing_factor", "0.1", "--method", "dpo"], "--label_smoothing_factor 0.1: the loss is the plain one"),
    (["--remove_unused_columns", "true"], "--remove_unused_columns True: every column"),
    (["--bf16"], "--bf16 True: --dtype says in what is computed"),
    (["--data_seed", "5"], "--data_seed 5: --seed orders the rows"),
    (["--train_sampling_strategy", "group_by_length"], "rows of like length are batched"),
    (["--use_liger_kernel", "true"], "--use_liger_kernel True: the loss reads"),
    (["--do_train", "false"], "--do_train False: this command trains"),
    (["--report_to", "wandbb"], "--report_to wandbb: not known; allowed: none, azure_ml"),
    (["--report_to", "dvclive"], "--report_to dvclive: dvclive is not installed"),
    (["--log_level", "loud"], "--log_level loud: not known; allowed: passive"),
    (["--fsdp", "full_shard"], "--fsdp full_shard: shards over processes"),
])
def test_what_no_training_reads_is_refused(words, said, monkeypatch):
    """Each was taken in silence and made another run than the one that was asked for, or ended in a traceback."""
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError) as stopped:
        config.parse(AlignArgs, ["--moe_flag", "0", "--task_name", "safety", *words])
    assert [problem for problem in stopped.value.problems if said in problem] == list(stopped.value.problems)


def test_values_that_ask_for_nothing_pass(tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text("align: {tuning: full, lora_r: 8, lora_alpha: 16, bf16: false, label_smoothing_factor: 0}\n")
    words = ["--moe_flag", "0", "--task_name", "safety", "--report_to", "none", "--max_steps", "-1", "--label_names",
             "[labels]"]
    assert config.parse(AlignArgs, [*words, "--preset", str(preset)]).args.tuning == "full"
