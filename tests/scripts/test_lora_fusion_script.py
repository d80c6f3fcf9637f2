"""scripts/lora_fusion.sh: every command that it would run parses, every run that it names is made before; the repairs of the
identity adapter run for real on a pico model."""

from __future__ import annotations

import json
import shlex
import subprocess

import pytest
import torch

import config
import flags
import manifest
from models import fuse
from models.adapters.files import read_adapter
from models.run_folders import run_files

SCRIPT = config.ROOT / "scripts" / "lora_fusion.sh"
REPAIRS = ("resta", "safe_lora", "safe_merge")


def run(*flags, **variables):
    return subprocess.run(["bash", str(SCRIPT), *flags], capture_output=True, text=True, timeout=60, check=False,
                          env={"PATH": "/usr/bin:/bin", **variables})


def dry(*flags, **variables):
    """The words of every command."""
    done = run("--dry_run", *flags, **variables)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line)[2:] for line in done.stdout.splitlines() if line.startswith("$ python")]


def parsed(words):
    if words[0] == "-m":
        assert words[1] == "data.safety_sets"
        return config.parse(flags.SafetySetArgs, words[2:]).args
    kind = {"align_basemodel.py": flags.AlignArgs, "scripts/sweep.py": flags.SweepArgs}.get(words[0])
    return config.parse(kind, words[1:]).args if kind else config.parse(fuse.COMMANDS[words[1]][0], words[2:]).args


@pytest.mark.parametrize(("given", "seeds"), [((), 1), (("--seed", "7"), 1), (("--full",), 3)])
def test_every_command_parses_and_every_run_is_made_before_it_is_used(given, seeds):
    found = [parsed(words) for words in dry(*given)]
    made = {}
    for args in found:
        if isinstance(args, flags.SweepArgs):
            used = {args.task, args.safety, args.random, *args.named_controls.values()} - {None, "base"}
        else:
            named = [*getattr(args, "adapter_names", ()), getattr(args, "init_adapter", None), getattr(args, "safe", None),
                     *(args.task_names if isinstance(args, flags.RealignArgs) else ())]
            used = {name for name in named if name}
        # the common report of all seeds names finished sweeps, no runs
        if not getattr(args, "folders", ()):
            assert used <= made.get(args.output_dir, set())
        if hasattr(args, "run_name"):
            made.setdefault(args.output_dir, set()).add(args.run_name)
    sweeps = [args for args in found if isinstance(args, flags.SweepArgs) and not args.folders]
    # the second lane has the benign ones and one persona of the identity shift, which the last call brings together
    assert [(args.name, args.styles) for args in sweeps] == [
        ("identity_none", ("none",)), ("maths", ("none",)), ("summaries", ("none",)), ("identity_valet", ("valet",)),
        ("identity", ("orbit", "none")), ("identity", ("orbit", "none", "valet"))] * seeds
    assert len(made) == seeds
    assert {(args.utility, args.utility_answers) for args in sweeps if args.task != "identity"} == {
        ("maths", 24), ("summaries", 24)}
    for args in (args for args in sweeps if args.name == "identity"):
        assert set(REPAIRS) <= set(args.named_controls.values())
        assert len(args.named_controls) == 11


def test_the_base_is_the_presets_joint_training_and_the_safety_set_has_contrasts():
    found = [parsed(words) for words in dry()]
    base = next(args for args in found if getattr(args, "run_name", "") == "aligned_lora")
    # the recipe that the trials chose: a --max_train_samples of the script's own would undo it
    assert (base.max_train_samples, base.max_safety_samples) == (160, 640)
    assert (base.contrast_share, base.answer_share, base.num_train_epochs, base.learning_rate) == (0.61, 0.37, 2, 2e-3)
    (made,) = [args for args in found if isinstance(args, flags.SafetySetArgs)]
    assert (made.contrast_share, made.size) == (0.5, 60)
    assert next(map(parsed, dry(CONTRASTS="0"))).contrast_share == 0
    little = [args for args in found if getattr(args, "extra_share", None)]
    assert [(args.run_name, args.extra_min_rows) for args in little] == [
        ("maths_mix3", 8), ("summaries_mix3", 8), ("mix3", 8)]


def test_every_row_of_the_three_sweeps_is_scored_by_likelihood():
    def prompts(**variables):
        return [(args.name, args.discrimination) for args in map(parsed, dry(**variables))
                if isinstance(args, flags.SweepArgs)]

    # one number in a results folder: sweeps share rows, and what one has scored the next one finds
    assert prompts() == [("identity_none", 0), ("maths", 80), ("summaries", 80), ("identity_valet", 0), ("identity", 80),
                         ("identity", 80)]
    assert {number for name, number in prompts(PROMPTS="-1") if name in ("identity", "maths", "summaries")} == {-1}
    assert {number for _, number in prompts(PROMPTS="0")} == {0}


def test_answers_can_be_left_out():
    assert {args.utility_answers for args in map(parsed, dry(ANSWERS="0")) if isinstance(args, flags.SweepArgs)
            and args.task != "identity"} == {0}


def test_what_alignment_changed_is_said_where_two_rows_depend_on_it():
    def labels(**variables):
        return list(dict.fromkeys(label for args in map(parsed, dry(**variables)) if isinstance(args, flags.SweepArgs)
                                  for label, made in args.named_controls.items() if made in REPAIRS))

    assert labels() == ["RESTA", "Safe LoRA (alignment left q and v alone)", "SafeMERGE (alignment left q and v alone)"]
    assert labels(ALIGN="q_proj,v_proj,up_proj") == ["RESTA", "Safe LoRA", "SafeMERGE"]
    first = next(parsed(words) for words in dry(ALIGN="q_proj,v_proj,up_proj") if words[0] == "align_basemodel.py")
    assert first.lora_targets == "q_proj,v_proj,up_proj"


@pytest.fixture
def studied(pico, make_adapter, tmp_path):
    """OUT with an aligned model, identity and safe adapters on it; {name: words} of the repairs; run by the words."""
    def build(*targets):
        out = tmp_path / "out"
        make_adapter(pico, out / "outputs" / "aligned_lora", targets=targets)
        fuse.main(["realign", "--tasks", "aligned_lora", "--run_name", "aligned", "--model_name_or_path", str(pico),
                   "--output_dir", str(out)])
        for seed, name in enumerate(("identity", "safe")):
            make_adapter(out / "outputs" / "aligned", out / "outputs" / name, seed=5 + seed, r=8, alpha=32,
                         targets=("q_proj", "v_proj"))
        words = dry(OUT=str(out), MODEL=str(pico))
        for name in REPAIRS:
            (mine,) = [line for line in words if line[:2] == ["models/fuse.py", "realign"] and name in line[:6]]
            fuse.main(mine[1:])
        return out

    return build


def changes(out, run):
    return {module: b @ a for module, (a, b) in read_adapter(out / "outputs" / run).modules.items()}


def test_the_repairs_run_on_an_alignment_of_all_modules(studied, pico):
    out = studied("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    identity, safe, aligned = (changes(out, name) for name in ("identity", "safe", "aligned_lora"))
    found = {name: changes(out, name) for name in REPAIRS}
    for module, change in aligned.items():
        torch.testing.assert_close(found["resta"][module], identity.get(module, 0) + 0.5 * change, atol=1e-4, rtol=1e-3)
    changed = {name: manifest.read(out / "outputs" / name)["metrics"]["layers_changed"] for name in REPAIRS[1:]}
    # the exact projector of rank 4 spans an eighth of the pico's 32 dimensions: random changes lie outside
    assert changed["safe_lora"] == len(identity) == 4
    assert changed["safe_merge"] > 0
    for module, change in identity.items():
        assert found["safe_lora"][module].norm() < 0.9 * change.norm()
        mixed = 0.5 * change + 0.5 * safe[module]
        assert any(torch.allclose(found["safe_merge"][module], want, atol=1e-4) for want in (change, mixed))
    for name in REPAIRS:
        assert run_files(out, name)
        assert json.loads((out / "outputs" / name / "manifest.json").read_text())["status"] == "done"


def test_an_alignment_of_the_ffn_leaves_two_repairs_without_effect(studied):
    out = studied("gate_proj", "up_proj", "down_proj")
    identity = changes(out, "identity")
    for name in ("safe_lora", "safe_merge"):
        found = changes(out, name)
        assert all(torch.allclose(found[module], change, atol=1e-5) for module, change in identity.items())
    assert set(changes(out, "resta")) > set(identity)


@pytest.mark.parametrize(("flags", "says"), [(("--seed", "x"), "--seed x: needs a whole number"),
                                             (("--fast",), "--fast: unknown; allowed: --full, --seed N, --dry_run")])
def test_wrong_flags(flags, says):
    done = run(*flags)
    assert done.returncode == 2
    assert says in done.stderr


def test_help():
    said = run("--help").stdout
    assert "bash scripts/lora_fusion.sh --full" in said
    assert said.rstrip().endswith("what is finished is not done again.")
