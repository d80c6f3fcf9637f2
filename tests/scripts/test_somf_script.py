"""scripts/somf.sh: every command that it would run parses; wrong flags leave with code 2; presets hold their stages."""

from __future__ import annotations

import shlex
import subprocess

import pytest

import config
import flags
from flags import AttackTableArgs, EqualUtilityArgs, MaskArgs, MaskFiguresArgs
from flags.refusal import EvaluateRefusalArgs
from models import fuse

SCRIPT = config.ROOT / "scripts" / "somf.sh"
COMMANDS = {"inference.py": flags.InferenceArgs, "evaluator/equal_utility.py": EqualUtilityArgs,
            "evaluator/attack_table.py": AttackTableArgs, "evaluator/mask_figures.py": MaskFiguresArgs,
            "evaluator/evaluate_skills.py": flags.EvaluateSkillsArgs, "evaluator/evaluate_refusal.py": EvaluateRefusalArgs,
            "evaluator/evaluate_safety.py": flags.EvaluateSafetyArgs, "evaluator/report.py": flags.ReportArgs}


def run(*flags, **variables):
    return subprocess.run(["bash", str(SCRIPT), *flags], capture_output=True, text=True, timeout=60, check=False,
                          env={"PATH": "/usr/bin:/bin", **variables})


def parsed(line):
    words = shlex.split(line)[2:]
    if words[0] == "-m":
        return None
    name, rest = words[0], words[1:]
    if name == "models/fuse.py":
        return config.parse(fuse.COMMANDS[rest[0]][0], rest[1:]).args
    if name == "align_basemodel.py":
        return config.parse(flags.AlignArgs, rest).args
    return config.parse(COMMANDS[name], rest).args


@pytest.mark.parametrize(("given", "rows"), [((), 15), (("--task", "chinese"), 15), (("--full",), 31)])
def test_every_command_of_a_dry_run_parses(given, rows):
    done = run("--dry_run", *given)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("$ python")]
    found = [parsed(line) for line in lines]
    report = next(a for a in found if isinstance(a, flags.ReportArgs))
    listed = report.runs.split(",")
    assert len(listed) == rows
    pictures = [a for a in found if isinstance(a, MaskFiguresArgs)]
    runs = [a.run_name for a in found if a is not None and a not in pictures and getattr(a, "run_name", None)]
    assert len(set(runs)) == len(runs)
    made = set(runs)
    assert {mask for a in pictures for mask in a.mask_names} == {run for run in made if run.startswith("mask_")}
    assert report.columns == ("refusal_auc,refusal_auc_plain,refusal_auc_edgy,refusal_auc_length,refusal_at_10,pairs_ranked,"
                              "harm_rate,incoherent")
    made |= {a.task_name for a in found if isinstance(a, flags.AlignArgs) and not a.run_name}
    named = {run for row in listed for run in row.partition("=")[2].split("+")} - {"base"}
    assert named <= made
    answered = {r for a in found if isinstance(a, flags.InferenceArgs) for r in a.runs} - {""}
    assert named == answered
    scored = {f.removeprefix("cross_") for a in found if isinstance(a, flags.EvaluateSafetyArgs) for f in a.folders}
    assert scored - {"raw"} == named
    by_likelihood = [a for a in found if isinstance(a, EvaluateRefusalArgs)]
    assert {f.removeprefix("cross_") for a in by_likelihood for f in a.folders} == scored
    assert {a.num_samples for a in by_likelihood} == {120}
    asked = [a for a in found if isinstance(a, EqualUtilityArgs)]
    assert len(asked) == (30 if given == ("--full",) else 12)
    assert len({a.name for a in asked}) == len(asked)
    assert {run for a in asked for point in (*a.points, a.subjects) for run in point} <= named


def of_kind(done, kind):
    found = [parsed(line) for line in done.stdout.splitlines() if line.startswith("$ python")]
    return [args for args in found if isinstance(args, kind)]


def test_the_main_rows_are_asked_under_two_attacks():
    done = run("--dry_run", ATTACK_SAMPLES="20")
    asked = {a.attack: a for a in of_kind(done, flags.InferenceArgs) if a.attack != "none"}
    scored = {a.harmful_task: a for a in of_kind(done, flags.EvaluateSafetyArgs) if a.harmful_task != "safety"}
    (table,) = of_kind(done, AttackTableArgs)
    assert list(table.named_attacks) == ["cot", "suffix"]
    assert set(asked) == {"cot", "suffix"}
    assert set(scored) == {"safety+cot", "safety+suffix"}
    main = {run for _, runs in table.rows for run in runs}
    assert main == {"aligned", "english", "wise_english_50", "dpo_lora", "resta_english",
                    *(f"{kind}_english_hard_{seed}" for kind in ("somf", "random") for seed in (1, 2, 3))}
    for attack, args in asked.items():
        assert (set(args.runs), args.num_samples) == (main, 20)
        assert {f.removeprefix("cross_") for f in scored[f"safety+{attack}"].folders} == main
        # over-refusal is scored again here: its newest number must be that of all prompts
        assert scored[f"safety+{attack}"].num_samples == 60


@pytest.mark.parametrize(("chosen", "attacks"), [("", []), ("cou", ["cou"]), ("cot cou prefill", ["cot", "cou", "prefill"])])
def test_other_attacks_or_none(chosen, attacks):
    done = run("--dry_run", ATTACKS=chosen)
    assert done.returncode == 0, done.stderr
    asked = [a.attack for a in of_kind(done, flags.InferenceArgs) if a.attack != "none"]
    assert sorted(asked) == sorted(attacks)
    assert [list(a.named_attacks) for a in of_kind(done, AttackTableArgs)] == ([attacks] if attacks else [])


@pytest.mark.parametrize(("variables", "says"), [
    ({"ATTACKS": "cot gcg"}, "ATTACKS: no attack 'gcg'; allowed: cot, cou, suffix, prefill"),
    ({"ATTACK_SAMPLES": "many"}, "ATTACK_SAMPLES many: a number of prompts"),
    ({"LIKELIHOOD": "0"}, "LIKELIHOOD 0: a number of prompts of each set, or -1 for all"),
])
def test_wrong_variables_are_refused_before_the_first_step(variables, says):
    done = run("--dry_run", **variables)
    assert done.returncode == 2
    assert says in done.stderr
    assert "$ python" not in done.stdout


def test_the_preference_score_that_the_script_describes_parses(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    lines = [line.removeprefix("#").strip() for line in SCRIPT.read_text().splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("python evaluator/evaluate_safety.py"))
    words = shlex.split(" ".join(line.rstrip("\\") for line in lines[first:first + 3]))
    args = config.parse(flags.EvaluateSafetyArgs, words[2:]).args
    # with the offline one, whose scores would be gone otherwise
    assert args.named_judges == (("fitted-safer", ""), ("api-safety-preference", ""))
    assert {a.judges for a in of_kind(run("--dry_run"), flags.EvaluateSafetyArgs)} == {"fitted-safer", ""}
    made = {"cross_" + r for a in of_kind(run("--dry_run"), flags.InferenceArgs) for r in a.runs}
    assert set(args.folders) <= made


def test_three_mask_seeds_and_their_controls():
    out = run("--dry_run", SEEDS="4 5", READOUTS="soft").stdout
    for seed in "45":
        assert f"--mask mask_english_{seed} --readout soft --seed {seed}" in out
        assert f"--run_name random_english_soft_{seed}" in out
    assert "SOMF\\ soft=somf_english_soft_4+somf_english_soft_5" in out


@pytest.mark.parametrize(("flags", "says"), [
    (("--task", "hindi"), "needs one of english, chinese, maths, summaries"), (("--task",), "--task : needs one of"),
    (("--fast",), "--fast: unknown; allowed: --task NAME, --full, --dry_run"),
])
def test_wrong_flags(flags, says):
    done = run(*flags)
    assert done.returncode == 2
    assert says in done.stderr
    assert "usage" not in done.stdout


def test_help():
    done = run("--help")
    assert "bash scripts/somf.sh --task maths" in done.stdout
    assert "ATTACKS= none" in done.stdout
    assert done.stdout.rstrip().endswith("its report shows preference_score.")


@pytest.mark.parametrize("preset", ["somf_wizardlm", "somf_tinyllama"])
def test_the_published_stages_parse(preset):
    words = ["--preset", preset, "--moe_flag", "0"]
    first = config.parse(flags.AlignArgs, [*words, "--task_name", "safety"])
    go_on = ["--init_adapter", "safety"] if preset == "somf_wizardlm" else []
    second = config.parse(flags.AlignArgs, [*words, "--task_name", "safety", "--method", "dpo", *go_on])
    third = config.parse(flags.AlignArgs, [*words, "--task_name", "chinese"])
    mask = config.parse(MaskArgs, ["--preset", preset, "--tasks", "chinese"])
    for stage in (first, second, third, mask):
        assert stage.training["lr_scheduler_type"] == "cosine"
    full = preset == "somf_tinyllama"
    assert first.args.tuning == third.args.tuning == ("full" if full else None)
    assert third.args.lora_targets == (None if full else "q_proj,v_proj")
    rows = [s.args.per_device_train_batch_size * s.args.gradient_accumulation_steps for s in (first, second, third, mask)]
    assert rows == ([16, 16, 16, 32] if full else [32, 32, 64, 16])
    assert [s.args.learning_rate for s in (first, second, third, mask)] == (
        [1e-5, 2e-7, 1e-5, 5e-3] if full else [1e-5, 1e-5, 5e-5, 5e-3])
    assert mask.args.data_path == "PKU-Alignment/PKU-SafeRLHF:test"
    assert mask.args.reference == "aligned"
    assert mask.args.excluded == ()
