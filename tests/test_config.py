"""Command lines: precedence, presets, suggestions, all errors at once, run names, exit codes."""

from __future__ import annotations

import errno
import math

import pytest
from safetensors import SafetensorError
from tqdm import tqdm

import config
from errors import SharedError, UserError, exit_on_user_error
from flags import ALL, AlignArgs, ExportArgs, FuseAdaptersArgs, FuseMoeArgs, ImportArgs, InferenceArgs, run_name


@pytest.fixture
def preset(tmp_path):
    """Write a preset and return the words that select it."""
    def write(text: str = "", name: str = "mine.yaml") -> list[str]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return ["--preset", str(tmp_path / name)]
    return write


def problems(command, argv) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        config.parse(command, argv)
    return caught.value.problems


def test_default_then_preset_then_flag(preset):
    words = preset("align:\n  lora_r: 16\n  seed: 7\n")
    assert config.parse(AlignArgs, preset("", "empty.yaml")).args.lora_r == 8
    assert config.parse(AlignArgs, words).args.lora_r == 16
    parsed = config.parse(AlignArgs, [*words, "--lora_r", "3"])
    assert (parsed.args.lora_r, parsed.args.seed) == (3, 7)
    assert parsed.given == {"lora_r"}


def test_a_flag_wins_even_when_it_equals_the_default(preset):
    words = preset("align:\n  lora_r: 16\n")
    assert config.parse(AlignArgs, [*words, "--lora_r", "8"]).args.lora_r == 8


@pytest.mark.parametrize(("argv", "rank"), [
    (["--moe_flag", "0", "--task_name", "safety"], 2), (["--moe_flag", "0"], 3), (["--moe_flag", "1"], 4), ([], 4),
    (["--moe_flag", "0", "--task_name", "safety", "--method", "dpo"], 5),
])
def test_sections_follow_the_kind_of_run(preset, argv, rank):
    words = preset("align: {lora_r: 1}\nalign_expert: {lora_r: 2}\nalign_mix: {lora_r: 3}\nalign_moe: {lora_r: 4}\n"
                   "align_dpo: {lora_r: 5}\n")
    assert config.parse(AlignArgs, [*words, *argv]).args.lora_r == rank


def test_common_serves_every_command_and_passes_over_keys_of_others(preset):
    words = preset("common: {seed: 9, max_new_tokens: 5, lora_r: 2}\n")
    assert config.parse(FuseMoeArgs, words).args.seed == 9
    assert config.parse(InferenceArgs, words).args.max_new_tokens == 5


@pytest.mark.parametrize("command", ALL, ids=lambda c: c.__name__)
def test_every_shipped_preset_parses_for_every_command(command):
    names = [path.stem for path in config.PRESETS.glob("*.yaml")]
    assert config.DEFAULT_PRESET in names
    # what these commands cannot do without, whatever the preset
    extra = ["--task_name", "cross_safety"] if command.__name__.startswith("Evaluate") else \
        ["--runs", "base,safety"] if command.__name__ == "AgreementArgs" else []
    for name in names:
        parsed = config.parse(command, ["--preset", name, *extra])
        assert parsed.preset == name


def test_the_published_command_line_parses():
    args = config.parse(AlignArgs, ["--moe_flag", "1", "--expert_topk", "2", "--gate_loss_weight", "0.01"]).args
    assert args.name == "mix_moe_reg_00000_00000_00000_gate_00100"
    args = config.parse(AlignArgs, ["--moe_flag", "0", "--task_name", "safety"]).args
    assert args.name == "safety"


@pytest.mark.parametrize(("argv", "said"), [
    (["--gate_los_weight", "1"], "did you mean gate_loss_weight?"),
    (["--weight_decy", "1"], "did you mean weight_decay?"),
    (["--task_name", "saftey"], "did you mean safety?"),
    (["--task_name", "nonsense"], "allowed: truthfulness, safety, helpfulness, mix"),
    (["--moe_flag", "2"], "allowed: 0, 1"),
    (["--lora_r", "two"], "needs a whole number"),
    (["--lora_r", "2.5"], "needs a whole number"),
    (["--learning_rate", "fast"], "needs a number"),
    (["--overwrite", "maybe"], "needs true or false"),
    (["stray"], "a value without a flag"),
    (["--preset", "embeded"], "did you mean embedded?"),
])
def test_a_wrong_word_is_named_with_what_is_allowed(argv, said):
    (problem,) = problems(AlignArgs, argv)
    assert said in problem
    assert argv[-1] in problem or argv[0] in problem


@pytest.mark.parametrize(("text", "said"), [
    ("align: {lora_rr: 8}", "align.lora_rr: unknown key (did you mean lora_r?)"),
    ("aline: {lora_r: 8}", "unknown section 'aline' (did you mean align?)"),
    ("common: {sead: 8}", "common.sead: unknown key (did you mean seed?)"),
    ("align: {lora_r: many}", "lora_r many: needs a whole number"),
    ("align: {lora_r: 2.5}", "lora_r 2.5: needs a whole number"),
    ("align: {gate_tokens: answr}", "did you mean answer?"),
    ("align: {lora_r: [", "not valid YAML"),
    ("align: 3", "align"),
    ("- align", "mine.yaml"),
])
def test_a_wrong_preset_is_named_with_what_is_allowed(preset, text, said):
    found = problems(AlignArgs, preset(text))
    assert any(said in problem and "mine.yaml" in problem for problem in found), found


def test_errors_of_flags_and_preset_come_together(preset):
    words = preset("align: {lora_rr: 8}\naline: {}\n")
    found = problems(AlignArgs, [*words, "--foo", "1", "--task_name", "saftey", "--lora_alpha", "x"])
    assert len(found) == 5, found


def test_errors_of_range_and_meaning_come_together():
    found = problems(AlignArgs, ["--lora_r", "0", "--gate_loss_weight", "-1", "--method", "dpo", "--run_name", "a/b"])
    assert len(found) == 4, found


def test_a_typo_does_not_hide_a_value_out_of_range():
    found = problems(AlignArgs, ["--foo", "1", "--gate_loss_weight", "-1", "--lora_dropout", "1"])
    assert [any(word in problem for problem in found) for word in ("foo", "gate_loss", "dropout")] == [True] * 3, found


@pytest.mark.parametrize("name", ["gate_loss_weight", "helpfulness_weight", "safety_weight", "truthfulness_weight"])
@pytest.mark.parametrize("value", ["-1", "-0.0001", "nan", "inf"])
def test_loss_weights_are_finite_and_not_negative(name, value):
    (problem,) = problems(AlignArgs, [f"--{name}", value])
    assert f"--{name}" in problem


def test_a_negative_weight_in_scientific_notation_is_an_error_about_that_flag():
    (problem,) = problems(AlignArgs, ["--safety_weight", "-1e-3"])
    assert "--safety_weight" in problem


@pytest.mark.parametrize(("argv", "known"), [
    (["--weight_decay", "0.01"], ("weight_decay", 0.01)),
    (["--weight_decay=0.01"], ("weight_decay", 0.01)),
    (["--weight_decay", "1e-3"], ("weight_decay", 0.001)),
    (["--max_steps", "5"], ("max_steps", 5)),
    (["--max_steps", "-1"], ("max_steps", -1)),
    (["--lr_scheduler_type", "cosine"], ("lr_scheduler_type", "cosine")),
    (["--gradient_checkpointing"], ("gradient_checkpointing", True)),
    (["--gradient_checkpointing", "false"], ("gradient_checkpointing", False)),
])
def test_training_arguments_pass_through(preset, argv, known):
    parsed = config.parse(AlignArgs, [*preset(), *argv])
    name, value = known
    assert parsed.training == {name: value}
    assert type(parsed.training[name]) is type(value)


def test_training_arguments_in_a_preset_yield_to_the_flag(preset):
    words = preset("align: {weight_decay: 0.5, warmup_steps: 3}\n")
    assert config.parse(AlignArgs, words).training == {"weight_decay": 0.5, "warmup_steps": 3}
    parsed = config.parse(AlignArgs, [*words, "--weight_decay", "0.1"])
    assert parsed.training == {"weight_decay": 0.1, "warmup_steps": 3}


def test_training_arguments_in_scientific_notation_in_a_preset_are_numbers(preset):
    assert config.parse(AlignArgs, preset("align: {weight_decay: 1e-4}\n")).training == {"weight_decay": 1e-4}


@pytest.mark.parametrize("name", ["learning-rate", "output-dir", "num-train-epochs", "run-name"])
def test_a_flag_of_ours_with_hyphens_is_no_training_argument(preset, name):
    """``--learning-rate 0.25`` must set our flag or be refused: beside it, two values would be in force."""
    ours = name.replace("-", "_")
    said, parsed = "", None
    try:
        parsed = config.parse(AlignArgs, [*preset(), f"--{name}", "0.25"])
    except UserError as error:
        said = str(error)
    if parsed is None:
        assert name in said or ours in said
    else:
        assert ours not in parsed.training
        assert float(getattr(parsed.args, ours)) == 0.25


def test_commands_without_training_refuse_training_arguments():
    (problem,) = problems(InferenceArgs, ["--weight_decay", "0.1"])
    assert "--weight_decay: unknown flag" in problem


@pytest.mark.parametrize(("argv", "said"), [
    (["--expert_topk", "4"], "allowed: 1 to 3"),
    (["--expert_topk", "0"], "must be 1 or more"),
    (["--experts", "a,b", "--expert_topk", "3"], "there are 2 experts"),
    (["--experts", "a", "--expert_topk", "1"], "two adapters or more"),
    (["--experts", "a,b,a"], "the same adapter twice"),
    (["--router_std", "nan"], "--router_std nan"),
    (["--run_name", "../up"], "--run_name ../up"),
    (["--run_name", ".hidden"], "--run_name .hidden"),
])
def test_fused_moe_arguments(argv, said):
    (problem,) = problems(FuseMoeArgs, argv)
    assert said in problem


@pytest.mark.parametrize(("argv", "said"), [
    (["--weights", "1,2"], "3 adapters need as many weights"),
    (["--weights", "1,x,2"], "numbers separated by commas"),
    (["--weights", "1,nan,2"], "--weights 1,nan,2"),
    (["--adapters", ""], "--"),
])
def test_adapter_fusion_arguments(argv, said):
    assert any(said in problem for problem in problems(FuseAdaptersArgs, argv))


def test_adapter_weights_are_equal_by_default():
    assert math.isclose(sum(config.parse(FuseAdaptersArgs, []).args.adapter_weights), 1)


@pytest.mark.parametrize(("value", "text"), [
    (0, "00000"), (0.0001, "00001"), (0.001, "00010"), (0.01, "00100"), (0.1, "01000"), (1.0, "10000"),
    (0.00004, "00000"),
])
def test_run_name_digits(value, text):
    assert run_name("mix", (value, 0, 0), 0) == f"mix_moe_reg_{text}_00000_00000_gate_00000"
    assert run_name("safety", (0, 0, 0), value) == f"safety_moe_reg_00000_00000_00000_gate_{text}"


def test_given_run_name_wins():
    args = config.parse(AlignArgs, ["--run_name", "mine"]).args
    assert args.name == "mine"


def test_user_error_exits_2_with_every_problem_on_stderr(capsys):
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise UserError("one thing", "another thing")
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "error: one thing\nerror: another thing\n")


def test_an_error_stands_on_a_line_of_its_own_behind_a_progress_bar(capsys):
    bar = tqdm(total=2)
    with pytest.raises(SystemExit), exit_on_user_error():
        raise UserError("one thing")
    bar.close()
    assert "error: one thing" in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("rank", "said"), [("0", "error: lost\n"), ("1", "")])
def test_what_all_processes_find_at_once_is_said_by_the_first(capsys, monkeypatch, rank, said):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise SharedError("lost")
    assert stop.value.code == 2
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(("code", "said"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "no permission"),
                                            (errno.EROFS, "read-only")])
def test_full_disk_and_the_like_exit_2_with_advice(capsys, code, said):
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise OSError(code, "oh", "somewhere/file")
    assert stop.value.code == 2
    assert "somewhere/file" in (text := capsys.readouterr().err)
    assert said in text


def test_a_full_disk_met_by_safetensors_exits_2_with_advice(capsys):
    """safetensors wraps the OSError of its writer into an exception of its own."""
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert stop.value.code == 2
    assert "disk is full" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(errno.EIO, "oh"), RuntimeError("a bug"), KeyError("x")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)) as caught, exit_on_user_error():
        raise error
    assert caught.value is error


@pytest.mark.parametrize(("argv", "value"), [
    (["--lr_scheduler_kwargs", '{"min_lr": 1e-6}'], {"min_lr": 1e-6}),
    (["--lr_scheduler_kwargs", "{min_lr: 1E-6, list: [1e3, -2e-5, .5], deep: {again: 1e+2}}"],
     {"min_lr": 1e-6, "list": [1000.0, -2e-5, 0.5], "deep": {"again": 100.0}}),
    (["--lr_scheduler_kwargs", '{"num_cycles": 010, "day": 2024-01-02, "text": "no", "on": true}'],
     {"num_cycles": 10, "day": "2024-01-02", "text": "no", "on": True}),
    (["--save_strategy", "no"], "no"), (["--eval_strategy", "no"], "no"), (["--report_to", "none"], "none"),
    (["--full_determinism", "yes"], True), (["--tf32", "off"], False), (["--disable_tqdm", "on"], True),
    (["--bf16", "no"], False),
    (["--max_steps", "1e3"], 1000), (["--warmup_steps", "010"], 10), (["--eval_steps", "0.1"], 0.1),
    (["--save_total_limit", "null"], None), (["--resume_from_checkpoint", "no"], False),
    (["--resume_from_checkpoint"], True),
    (["--resume_from_checkpoint", "results/checkpoint-5"], "results/checkpoint-5"),
])
def test_values_of_training_arguments_are_read_as_yaml_1_2(preset, argv, value):
    """YAML 1.1 makes a text of 1e-6, False of no, 8 of 010, a date of 2024-01-02; nested, too."""
    name = argv[0].removeprefix("--")
    found = config.parse(AlignArgs, [*preset(), *argv]).training
    assert found == {name: value}
    assert type(found[name]) is type(value)
    if len(argv) > 1 and '"' not in argv[1]:
        assert config.parse(AlignArgs, preset(f"align: {{{name}: {argv[1]}}}\n")).training == {name: value}


@pytest.mark.parametrize(("argv", "said"), [
    (["--weight_decay", "much"], "--weight_decay much: needs a number"),
    (["--max_steps", "2.5"], "--max_steps 2.5: needs a whole number"),
    (["--max_steps", "true"], "needs a whole number"),
    (["--bf16", "maybe"], "--bf16 maybe: needs true or false"),
    (["--lr_scheduler_kwargs", "1e-6"], "needs a mapping"),
    (["--lr_scheduler_kwargs", "{min_lr"], "is neither a value nor JSON"),
    (["--gradient_checkpointing_kwargs", "{use_reentrant: no, deep: [off]}"], "no, off: write true or false, or quotes"),
])
def test_values_of_training_arguments_that_do_not_fit_are_refused(preset, argv, said):
    (problem,) = problems(AlignArgs, [*preset(), *argv])
    assert said in problem


def test_words_of_yaml_1_1_in_a_preset_are_values_of_our_flags(preset):
    args = config.parse(AlignArgs, [*preset("align: {pad_to_max: on, run_name: no, attention_lora: off}\n")]).args
    assert (args.pad_to_max, args.run_name, args.attention_lora) == (True, "no", False)
    assert type(args.run_name) is str


def test_a_first_word_without_a_flag_is_the_command_s_own_value(capsys):
    args = config.parse(ExportArgs, ["raw_moe", "--layout", "mixtral"]).args
    assert (args.run, args.layout, args.name) == ("raw_moe", "mixtral", "raw_moe_mixtral")
    # with its equals signs; or given as a flag all the same
    assert config.parse(ExportArgs, ["a=0.6,b=0.4", "--layout", "dense"]).args.name == "a@0.6_b@0.4_dense"
    assert config.parse(ImportArgs, ["--folder", "runs/one"]).args.name == "one_moe"
    assert problems(ExportArgs, ["--layout=mixtral", "raw_moe"])[0].startswith("raw_moe: a value without a flag")
    with pytest.raises(SystemExit):
        config.parse(ExportArgs, ["--help"])
    assert "RUN [--FLAG VALUE ...]" in capsys.readouterr().out
