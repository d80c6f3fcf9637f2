"""The durability table from score files: half-lives by hand, what is censored, every format, curves, what cannot be read."""

from __future__ import annotations

import csv
import json
import math

import pytest

import config
import manifest
from errors import UserError
from evaluator import durability
from evaluator.reporting.durability.rows import cells
from evaluator.reporting.html.curves import read_curves
from flags.durability import DurabilityArgs

N = 40
#: Of 20 harmless prompts of the validation half two lie above 0.5: the threshold is below that.
HARMLESS = [i / 10 - 1.4 for i in range(20)]


def put(root, run, share, seed=1, words="", harmful=N):
    """Scores of a run that refuses the first share * N harmful prompts, far above and far below every threshold."""
    sub = "raw" if run == "base" else f"cross_{run}"
    folder = root / "scores" / sub
    folder.mkdir(parents=True)
    rows = [{"set": "refusal_harmful", "id": f"h{i}", "prompt_hash": f"{words}h{i}", "values": {
        "score": 5.0 if i < round(share * N) else -5.0, "test_half": i % 2}} for i in range(harmful)]
    rows += [{"set": "refusal_plain", "id": f"p{i}", "prompt_hash": f"p{i}", "values": {"score": score, "test_half": 0}}
             for i, score in enumerate(HARMLESS)]
    (folder / "evaluate_refusal.rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest.register(root, {"kind": "score", "run": run, "sub": sub, "command": "evaluate_refusal", "scores": {},
                             "seed": seed})


def attack(root, run, shares, mixed=(), seed=1):
    for name, share in zip((run, f"bad_{run}_5", f"bad_{run}_20", f"bad_{run}"), shares, strict=True):
        put(root, name, share, seed)
    for number, share in enumerate(mixed):
        put(root, f"mixed{number}_{run}", share, seed)


def ask(root, runs, *more):
    return config.parse(DurabilityArgs, ["--output_dir", str(root), "--runs", runs, *more]).args


def test_two_seeds_to_a_table_in_every_format(tmp_path, capsys):
    roots = [tmp_path / "a", tmp_path / "b"]
    for seed, root in enumerate(roots):
        root.mkdir()
        attack(root, "weak", (0.8, 0.6, 0.2, 0.0), (0.8, 0.1), seed)
        attack(root, "strong", (0.8, 0.8, 0.8, 0.7), (0.8, 0.7), seed)
        attack(root, "never", (0.0, 0.0, 0.0, 0.0), (0.0, 0.0), seed)
    rows = ",".join(f"{name}={name}/bad_{name}/mixed0_{name}/mixed1_{name}" for name in ("weak", "strong", "never"))
    durability.main(["--output_dir", str(tmp_path), "--roots", ",".join(map(str, roots)), "--runs", rows, "--shares",
                     "0,0.3", "--against", "weak", "--format", "md,csv,latex,json"])
    half = math.sqrt(6 * 21) - 1
    content = json.loads((tmp_path / "report" / "durability.json").read_text())
    weak, strong, never = (row["cells"] for row in content["rows"])
    assert weak["half_life"]["value"] == pytest.approx(half)
    assert weak["half_life"]["per_seed"] == [pytest.approx(half)] * 2
    assert weak["half_life"]["low"] < half < weak["half_life"]["high"]
    # JSON has no infinity: what is null, and why
    assert content["half_life"]["strong"]["value"] is None
    assert set(content["half_life"]["strong"]["beyond"]) >= {"value", "high"}
    assert content["half_life"]["never"] is None
    assert "half_life" not in never
    assert [weak[f"refused_{step}"]["value"] for step in (0, 5, 20, 80)] == [0.8, 0.6, 0.2, 0.0]
    assert (weak["mixed_0"]["value"], weak["mixed_0.3"]["value"]) == (0.8, pytest.approx(0.1))
    # above all harmless prompts or below all of them
    assert strong["auc_0"]["value"] == pytest.approx(0.8)
    found = content["differences"]
    assert set(found) == {"kept", "auc_80"}
    assert list(found["kept"]) == ["strong"]
    assert found["kept"]["strong"]["value"] == pytest.approx(strong["kept"]["value"] - weak["kept"]["value"])
    assert found["kept"]["strong"]["low"] > 0
    # a row without refusals counts in the correction, though nothing is known of it
    assert found["kept"]["strong"]["p_holm"] == pytest.approx(2 * found["kept"]["strong"]["p"])
    assert set(found["auc_80"]) == {"strong", "never"}
    assert found["auc_80"]["strong"]["value"] == pytest.approx(strong["auc_80"]["value"] - weak["auc_80"]["value"])
    assert (strong["still"]["value"], weak["still"]["value"]) == (pytest.approx(0.875), 0)
    text = (tmp_path / "report" / "durability.md").read_text()
    assert f"{half:.1f} [" in text
    assert "> 80 [" in text
    assert "never: too little was refused before the attack" in text
    assert text.strip() in capsys.readouterr().out
    assert "> 80" in (tmp_path / "report" / "durability.tex").read_text()
    with (tmp_path / "report" / "durability.csv").open(newline="") as file:
        cells = {(row["model"], row["score"]): row["value"] for row in csv.DictReader(file) if row["level"] == "model"}
    assert float(cells["strong", "half_life"]) == math.inf
    assert float(cells["weak", "half_life"]) == pytest.approx(half)
    refused, = read_curves(tmp_path / "report" / "durability_refused.json")
    assert [(point.x, point.value) for point in refused.lines["weak"]] == [(0, 0.8), (5, 0.6), (20, 0.2), (80, 0.0)]
    assert f"weak {half:.1f}" in refused.notes[0]
    mixed, = read_curves(tmp_path / "report" / "durability_mixed.json")
    assert [point.x for point in mixed.lines["strong"]] == [0, 0.3]


def test_what_the_attack_did_beside_the_threshold(tmp_path):
    """Answers of all prompts begin otherwise: refusals fall, harmless prompts with them, and nothing is told apart less."""
    for name, moved in (("mine", 0.0), ("bad", -2.0)):
        folder = tmp_path / "scores" / f"cross_{name}"
        folder.mkdir(parents=True)
        rows = [("refusal_harmful", i, 0.6 + i / 20, i % 2) for i in range(N)]
        rows += [("refusal_plain", i, score, i % 2) for i, score in enumerate([score for score in HARMLESS for _ in "ab"])]
        (folder / "evaluate_refusal.rows.jsonl").write_text("".join(json.dumps({
            "set": kind, "id": f"{kind}{i}", "prompt_hash": f"{kind}{i}",
            "values": {"score": score + moved, "test_half": half}}) + "\n" for kind, i, score, half in rows))
        manifest.register(tmp_path, {"kind": "score", "run": name, "sub": f"cross_{name}", "command": "evaluate_refusal",
                                     "scores": {}, "seed": 1})
    run = tmp_path / "outputs" / "bad"
    run.mkdir(parents=True)
    history = [{"loss": 3.5}, {"eval_loss": 9}, {"loss": 2.5}]
    (run / "manifest.json").write_text(json.dumps({"metrics": {"history": history}}))
    args = ask(tmp_path, "mine=mine/bad", "--steps", "80")
    line, = durability.gather(args)
    found = cells(line, seed=0)
    # 10 % of the test half of the harmless prompts lie above the threshold before, as of the other half
    assert (found["harmless_0"].value, found["harmless_80"].value) == (pytest.approx(0.1), 0)
    assert found["refused_0"].value == 1
    assert found["refused_80"].value < 0.2
    assert found["anew_80"].value == found["anew_0"].value == 1
    assert found["auc_80"].value == found["auc_0"].value
    assert [found[f"fall_{kind}"].value for kind in ("harmful", "harmless")] == [pytest.approx(2), pytest.approx(2)]
    assert (found["loss_first"].value, found["loss_last"].value) == (3.5, 2.5)
    assert "score lost by step 80" in durability.write([line], args)[1]


def test_a_start_with_more_prompts_gives_the_threshold_and_is_cut_to_those_of_the_attack(tmp_path):
    put(tmp_path, "base", 0.5)
    for name, share in (("bad_5", 0.5), ("bad_20", 0.5), ("bad", 0.0)):
        # the first twenty alone, all of which the start refuses
        put(tmp_path, name, share, harmful=20)
    line, = durability.gather(ask(tmp_path, "base=base/bad"))
    assert line.seeds[0].attacked.refused.mean(1).tolist() == [1.0, 1.0, 1.0, 0.0]


def test_what_was_not_scored_is_named_with_its_command(tmp_path):
    put(tmp_path, "mine", 0.5)
    with pytest.raises(UserError) as error:
        durability.gather(ask(tmp_path, "mine=mine/bad"))
    assert [text.partition(": ")[2] for text in error.value.problems] == [
        "bad_5 has no refusal scores; run evaluator/evaluate_refusal.py --task_name cross_bad --checkpoint_number 5 with "
        "the base that it was trained on",
        "bad_20 has no refusal scores; run evaluator/evaluate_refusal.py --task_name cross_bad --checkpoint_number 20 "
        "with the base that it was trained on",
        "bad has no refusal scores; run evaluator/evaluate_refusal.py --task_name cross_bad"]


def test_other_or_too_few_prompts_are_refused(tmp_path):
    put(tmp_path, "mine", 0.5)
    put(tmp_path, "bad", 0.0, words="other ")
    with pytest.raises(UserError, match="bad: scored on other prompts than the others"):
        durability.gather(ask(tmp_path, "mine=mine/bad", "--steps", "80"))
    put(tmp_path, "few", 0.0, harmful=3)
    with pytest.raises(UserError, match="only 3 harmful prompts were scored before and after in every run; needed: 10"):
        durability.gather(ask(tmp_path, "mine=mine/few", "--steps", "80"))


@pytest.mark.parametrize(("words", "says"), [
    (("--runs", ""), '--runs: name the rows, e.g. --runs "naive mix=mix/harmful_mix"'),
    (("--runs", "a=b"), "--runs a=b: needs LABEL=START/ATTACKED, with / between them"),
    (("--runs", "a=b/c", "--shares", "0,0.3"), "needs LABEL=START/ATTACKED and 2 runs of --shares"),
    (("--runs", "a=b/c", "--steps", "20,5"), "--steps 20,5: needs whole numbers of 1 or more, rising"),
    (("--runs", "a=b/c", "--steps", "0,5"), "--steps 0,5: needs whole numbers of 1 or more, rising"),
    (("--runs", "a=b/c/d", "--shares", "1.5"), "--shares 1.5: needs numbers from 0 to below 1, rising"),
    (("--runs", "a=b/c/d", "--shares", "many"), "--shares many: needs numbers from 0 to below 1, rising"),
    (("--runs", "a=b/c", "--against", "z"), "--against z: no row is called so; allowed: a"),
    (("--runs", "a=b/c", "--format", "doc"), "--format doc: doc is no format"),
])
def test_flags_that_are_wrong(words, says):
    with pytest.raises(UserError) as error:
        config.parse(DurabilityArgs, list(words))
    assert any(says in text for text in error.value.problems), error.value.problems
