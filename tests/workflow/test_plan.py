"""The table of arms: every command line parses against its real flags, everything needed is made, errors are sentences."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import replace

import pytest
import yaml

import config
import flags
import manifest
from errors import UserError
from workflow import commands, leaderboard, plan, records

FILE = config.ROOT / "workflow" / "arms.yaml"
TABLE = plan.read(FILE)
TRIALS = plan.read(config.ROOT / "workflow" / "trials.yaml")
NAMES = plan.chosen(TABLE, (), quick=False, more=True)


@pytest.fixture(scope="module")
def all_steps(tmp_path_factory):
    return plan.steps(TABLE, NAMES, (42,), tmp_path_factory.mktemp("results"))


def test_the_table_has_the_arms_of_the_study():
    shown = {name: arm for name, arm in TABLE.arms.items() if arm.shown}
    assert len(shown) >= 45
    assert sum(not arm.more for arm in shown.values()) >= 30
    wanted = """base mix mix_second mix_dpo average arithmetic_50 ties dare della breadcrumbs slerp model_stock knots tsv
        isotropic wise_ft_50 resta safe_lora safe_merge soup lora_fusion_50 somf_single_hard somf_multi somf_multi_hard
        random_mask magnitude_mask raw_moe raw_k1 router_only tuned_moe tuned_no_gate tuned_no_drift tuned_neither
        tuned_k2 tuned_k3 mix_4e_3"""
    assert set(wanted.split()) <= shown.keys()
    # labels and runs tell rows apart in a report
    assert len({arm.label for arm in shown.values()}) == len({arm.run for arm in shown.values()}) == len(shown)


def test_every_step_makes_the_folder_that_its_arm_is_called(all_steps):
    made = [step for step in all_steps if "__" not in step.name]
    assert {step.arm for step in made} == {name for name, arm in TABLE.arms.items() if arm.make}
    for step in made:
        args = commands.parse(step.words).args
        name = args.name if isinstance(args, flags.AlignArgs) else args.run_name
        assert step.makes == args.results / "outputs" / name / "manifest.json"


def test_everything_that_is_needed_is_made_first(all_steps):
    made = set()
    for step in all_steps:
        assert set(step.needs) <= made, step.name
        made.add(step.makes)
    # no two steps write the same file
    assert len(made) == len(all_steps)
    assert len({step.name for step in all_steps}) == len(all_steps)


def test_an_arm_is_made_of_nothing_that_it_does_not_name(all_steps):
    """A run that a command line names, but not the table, would be read before it is made."""
    for step in all_steps:
        if "__" in step.name:
            continue
        args = commands.parse(step.words).args
        named = {word for field in ("adapters", "tasks", "experts", "safe", "unaligned", "mask", "init_adapter", "models")
                 for word in str(getattr(args, field, None) or "").replace("embedded+", "").split(",")}
        named |= {args.raw_moe} if isinstance(args, flags.FusedMoeArgs) else set()
        assert named & TABLE.arms.keys() <= {*TABLE.arms[step.arm].needs}, step.name


def test_equal_budgets():
    """What is compared with the MoE's tuning has its rows and steps; the masks have those of SOMF's own preset."""
    parsed = {name: commands.parse(shlex.split(TABLE.arms[name].make.format(
        base="embedded", experts=",".join(TABLE.experts), **TABLE.words))).args for name in (
        "tuned_moe", "mix_second", "mask_multi", "tuned_no_gate", "tuned_no_drift", "tuned_neither", "router_only")}
    moe, second = parsed["tuned_moe"], parsed["mix_second"]
    for name in ("max_train_samples", "learning_rate", "num_train_epochs", "per_device_train_batch_size",
                 "gradient_accumulation_steps", "model_max_length"):
        assert getattr(moe, name) == getattr(second, name), name
    somf = config.parse(flags.MaskArgs, ["--preset", "somf", "--tasks", "x"]).args
    for name in ("max_train_samples", "num_train_epochs", "model_max_length"):
        assert getattr(parsed["mask_multi"], name) == getattr(somf, name), name
    # rate and contrasts are those that the trials chose
    trial = commands.parse(shlex.split(TRIALS.arms["mask_03_005_c"].make.format(
        base="embedded", experts=",".join(TRIALS.experts), **TRIALS.words))).args
    for name in ("learning_rate", "pair_contrast_share"):
        assert getattr(parsed["mask_multi"], name) == getattr(trial, name), name
    off = {"tuned_no_gate": (0.0, 0.001), "tuned_no_drift": (0.1, 0.0), "tuned_neither": (0.0, 0.0),
           "tuned_moe": (0.1, 0.001)}
    for name, (gate, drift) in off.items():
        assert (parsed[name].gate_loss_weight, parsed[name].gammas) == (gate, (drift,) * 3)
    # nothing but the router moves
    assert (parsed["router_only"].learning_rate, parsed["router_only"].attention_lora) == (0, False)
    assert parsed["router_only"].router_learning_rate == moe.router_learning_rate


def test_endpoints_read_what_another_one_makes(tmp_path):
    steps = {step.name: step for step in plan.steps(TABLE, ["lora_fusion_50", "base"], (42,), tmp_path)}
    run = TABLE.arms["lora_fusion_50"].run
    answers = tmp_path / "seed_42/inference/safety/test" / f"cross_{run}" / "manifest.json"
    assert steps["s42_lora_fusion_50__answers_harmful"].makes == answers
    assert answers in steps["s42_lora_fusion_50__generated"].needs
    # a weighted sum is answered with the adapters that it is a sum of, which have no endpoints here
    experts = {tmp_path / f"seed_42/outputs/{name}/manifest.json" for name in TABLE.experts}
    assert set(steps["s42_lora_fusion_50__nll"].needs) == experts
    assert "s42_safety" in steps
    assert "s42_safety__nll" not in steps
    assert steps["s42_base__nll"].makes == tmp_path / "seed_42/scores/raw/evaluate_helpfulness.json"
    assert steps["s42_base__nll"].needs == ()
    found = commands.parse(steps["s42_lora_fusion_50__answers_harmful"].words).args
    assert found.runs == (run,)


def test_the_plan_fits_three_hours_on_two_cores(tmp_path):
    steps = plan.steps(TABLE, plan.chosen(TABLE, (), quick=False, more=False), (42, 43, 44), tmp_path)
    # the likelihood of refusals counts too where its command is not there yet
    rows = sum(arm.shown and not arm.more for arm in TABLE.arms.values())
    absent = sum(TABLE.costs[TABLE.endpoints[name].cost]["seconds"] for name in plan.missing_commands(TABLE)) * rows * 3
    assert (sum(step.seconds for step in steps) + absent) / 2 <= 3 * 3600


def test_quick_is_a_few_steps_of_one_seed(tmp_path):
    names = plan.chosen(TABLE, (), quick=True, more=False)
    args = config.parse(flags.LeaderboardArgs, ["--quick"]).args
    steps = plan.steps(TABLE, names, args.seed_numbers, tmp_path, quick=True)
    assert args.seed_numbers == (42,)
    assert {"base", "raw_moe", "tuned_moe", "mix"} <= set(names)
    for step in steps:
        parsed = commands.parse(step.words)
        if isinstance(parsed.args, flags.AlignArgs):
            assert (parsed.training["max_steps"], parsed.args.max_train_samples) == (2, 16)
        elif hasattr(parsed.args, "num_samples"):
            assert parsed.args.num_samples == 8
    assert sum(step.seconds for step in steps) / 2 < 12 * 60
    # what has no steps has words of its own
    searched = plan.steps(TABLE, ["searched"], (42,), tmp_path, quick=True)
    assert commands.parse(next(step.words for step in searched if step.name == "s42_searched")).args.max_train_samples == 4


def test_a_preset_goes_to_every_step(tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text(yaml.safe_dump({"common": {"model_name_or_path": "org/other"}, "fuse": {"router_init": "data"}}))
    for step in plan.steps(TABLE, ["della", "raw_moe"], (1,), tmp_path, preset=str(preset)):
        assert step.words[-2:] == ("--preset", str(preset))
        if step.arm == "della" and "__" not in step.name:
            args = commands.parse(step.words).args
            assert (args.base_model, args.models.split(",")[0]) == ("org/other", "org/other+helpfulness")


@pytest.mark.parametrize(("change", "says"), [
    ({"arms": {"a": {"kind": "merge", "needs": ["b"]}}}, "a needs b, which is no arm"),
    ({"arms": {"a": {"kind": "merge", "needs": ["c"]}, "c": {"kind": "merge", "needs": ["a"]}}},
     "a -> c -> a: an arm cannot be made of itself"),
    ({"arms": {"a": {"kind": "merg"}}}, "a: kind merg: allowed: control, expert"),
    ({"arms": {"a": {"kind": "merge", "labl": "x"}}}, "a: labl: unknown; allowed: cost, durability, key"),
    ({"arms": {"a": {"kind": "merge", "label": "x, y"}}}, "a: label x, y: a comma ends a row"),
    ({"arms": {"a": {"kind": "merge", "cost": "mrge"}}, "costs": {"merge": {}}},
     "cost mrge: has no line in costs (did you mean merge?)"),
    ({"arms": {"a": {"kind": "merge"}}, "endpoints": {"e": {"rows": "some", "run": "x", "makes": "y"}}},
     "e: rows some: allowed: all, key"),
    ({"arms": {"a b": {"kind": "merge"}}}, "a b: letters, digits and '_' only"),
    ({"arm": {}}, "needs a mapping with arms and endpoints"),
])
def test_tables_that_cannot_be_read(tmp_path, change, says):
    path = tmp_path / "arms.yaml"
    path.write_text(yaml.safe_dump(change))
    with pytest.raises(UserError, match=says.replace("(", r"\(").replace(")", r"\)").replace("?", r"\?")):
        plan.read(path)


def test_a_line_that_its_flags_refuse_names_its_arm(tmp_path):
    arms = {"a": replace(TABLE.arms["ties"], name="a", make="models/fuse.py adapters --densty 0.5 --run_name a")}
    with pytest.raises(UserError, match=r"arm a: models/fuse.py adapters --densty \.\.: .*did you mean density"):
        plan.steps(replace(TABLE, arms={**TABLE.arms, **arms}), ["a"], (1,), tmp_path)
    with pytest.raises(UserError, match="no command that a step can be"):
        commands.parse(("rm", "-r"))
    with pytest.raises(UserError, match=r"--only tuned: no such arm.*tuned_moe"):
        plan.chosen(TABLE, ["tuned"], quick=False, more=False)


def test_states(tmp_path, all_steps):
    first = replace(all_steps[0], arm="one", makes=tmp_path / "a.json", needs=(), settings={"x": 1})
    second = replace(all_steps[1], arm="two", makes=tmp_path / "b.json", needs=(first.makes,), settings={})
    steps = [first, second]

    def now():
        return [records.states(steps, tmp_path)[step.name] for step in steps]

    assert now() == [records.NEW, records.NEW]
    for step in steps:
        step.makes.write_text("{}")
    assert now() == [records.UNRECORDED, records.UNRECORDED]
    written = [{"name": step.name, "makes": str(step.makes), "made_of": [str(need) for need in step.needs],
                "mark": str(records.mark_path(tmp_path, step.name)), "settings": dict(step.settings)} for step in steps]
    manifest.write_json(tmp_path / "plan.json", {"steps": written})
    for step in steps:
        records.write(tmp_path / "plan.json", step.name)
    assert now() == [records.DONE, records.DONE]
    # --overwrite: the arms that are asked for, and what is made of them
    for anew, wanted in (({first.arm}, [records.OUTDATED] * 2), ({second.arm}, [records.DONE, records.OUTDATED])):
        assert list(records.states(steps, tmp_path, anew).values()) == wanted
    steps[0] = replace(first, settings={"x": 2})
    assert now() == [records.OUTDATED, records.OUTDATED]
    steps[0] = first
    # made by somebody else in the meantime: what read the old one is outdated
    first.makes.write_text('{"other": 1}')
    assert now() == [records.OUTDATED, records.OUTDATED]
    first.makes.unlink()
    assert now() == [records.NEW, records.OUTDATED]
    with pytest.raises(UserError, match="not in"):
        records.write(tmp_path / "plan.json", "s1_nothing")
    with pytest.raises(UserError, match="ended without"):
        records.write(tmp_path / "plan.json", first.name)


def test_another_preset_value_is_another_setting(tmp_path):
    kept = {}
    for rate in (1e-3, 2e-3):
        preset = tmp_path / "p.yaml"
        preset.write_text(yaml.safe_dump({"align": {"learning_rate": rate}}))
        (step,) = [s for s in plan.steps(TABLE, ["safety"], (1,), tmp_path, preset=str(preset)) if s.name == "s1_safety"]
        kept[rate] = step.settings
    assert {k for k in kept[1e-3] if kept[1e-3][k] != kept[2e-3][k]} == {"learning_rate"}


def test_snakemake_plans_every_arm(tmp_path, all_steps):
    """The Snakefile reads the plan: no rule is missing, every step is a job."""
    states = records.states(all_steps, tmp_path)
    words = leaderboard.prepare(all_steps, states, tmp_path, ["--dry-run"])
    done = subprocess.run(words, cwd=config.ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    jobs = [line.partition(": ")[2] for line in (done.stdout + done.stderr).splitlines() if line.startswith("Job ")]
    assert sorted(jobs) == sorted(shlex.join(("python", *step.words)) for step in all_steps)


def test_the_front_door():
    script = config.ROOT / "scripts" / "leaderboard.sh"
    shown = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert shown.returncode == 0
    assert "bash scripts/leaderboard.sh --quick" in shown.stdout
    assert shown.stdout.rstrip().endswith("docs/leaderboard_protocol.md.")
    wrong = subprocess.run(["bash", str(script), "--dry_run", "--seeds", "1,1", "--ony", "x"], capture_output=True,
                           text=True, timeout=60, check=False)
    assert wrong.returncode == 2
    assert "--seeds 1,1: the same seed twice" in wrong.stderr
    assert "did you mean only" in wrong.stderr


def test_the_report_has_a_row_for_each_arm(tmp_path):
    args = config.parse(flags.LeaderboardArgs, []).args
    words = leaderboard.report_words(args, TABLE, NAMES, tmp_path)
    report = config.parse(flags.ReportArgs, words[1:]).args
    assert report.against == "naive mix"
    assert len(report.runs.split(",")) == sum(arm.shown for arm in TABLE.arms.values())
    assert report.roots.split(",") == [str(tmp_path / f"seed_{seed}") for seed in (42, 43, 44)]


@pytest.mark.parametrize(("file", "preset"), [("trials.yaml", ""), ("trials_somf.yaml", "somf")])
def test_trials_look_at_validation_prompts_alone(tmp_path, file, preset):
    table = plan.read(FILE.with_name(file))
    names = plan.chosen(table, (), quick=False, more=True)
    scored = [step for step in plan.steps(table, names, (42,), tmp_path, preset=preset) if "__" in step.name]
    assert len(scored) == 2 * sum(arm.shown for arm in table.arms.values())
    # every command parses, and none of those that score reads a test split
    assert all(step.settings["dataset_type"] == "validation" for step in scored)


def test_trials_are_of_the_leaderboards_own_experts():
    for name in ("helpfulness", "safety", "truthfulness"):
        assert TRIALS.arms[name].make == TABLE.arms[name].make
