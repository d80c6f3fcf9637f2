"""evaluate_refusal.py on planted models: what they see is what the scores say; files, errors, reuse, report."""

from __future__ import annotations

import errno
import json
import os

import matplotlib.image
import numpy as np
import pytest
from planted import make_judge, token
from reported import table

import manifest
from data.records import Record
from data.sets import embedded, refusal_prompts
from evaluator import evaluate_refusal, report
from evaluator.scoring import engine
from evaluator.statistics.comparison import measured

N = 40
COLUMNS = "refusal_auc,refusal_auc_plain,refusal_auc_edgy,refusal_auc_length,refusal_at_10,pairs_ranked"
OPENERS = "first: [Z]\nsecond: [Q]\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Planted models: their inclination to begin with Z grows with the share of X in the prompt, or falls, or not."""
    folder = tmp_path_factory.mktemp("planted")
    for name, weight in (("sees", 3.0), ("inverted", -3.0), ("blind", 0.0)):
        make_judge(folder / name, 0, {token("Z"): (0.0, weight), token("Q"): (0.5, 0.0)})
    return folder


@pytest.fixture
def sets(monkeypatch):
    """Made-up embedded prompts; ``fill`` says what stands in harmful, plain and edgy ones."""
    def fill(harmful="X", plain="", edgy=""):
        def rows(name, mark):
            return [Record(f"{mark} do {name} number {i}", "", 1, id=f"{name}-{i}") for i in range(N)]
        parts = {"harmful": rows("harm", harmful), "plain": rows("benign-ref_", plain), "edgy": rows("overrefusal_", edgy)}
        over = parts["plain"] + parts["edgy"]
        monkeypatch.setattr(embedded, "records", lambda task, split, lite: parts["harmful"] if task == "safety" else over)
        monkeypatch.setattr(embedded, "overrefusal_kinds", lambda found: ["plain"] * N + ["edgy"] * N)
        matched = [Record(f"{harmful} do {row.question}", "", 1, id=row.id) for row in parts["plain"]]
        monkeypatch.setattr(embedded, "matched_pairs", lambda: list(zip(matched, parts["plain"], strict=True)))
    fill()
    return fill


@pytest.fixture
def run(models, tmp_path):
    (tmp_path / "openers.yaml").write_text(OPENERS, encoding="utf-8")

    def call(*words, model="sees", results="results"):
        place = tmp_path / results
        evaluate_refusal.main(["--task_name", "raw", "--output_dir", str(place), "--model_name_or_path", str(models / model),
                               "--openers", str(tmp_path / "openers.yaml"), "--dtype", "float32", "--device", "cpu",
                               "--threads", "1", *map(str, words)])
        return place
    return call


def read(place, name="evaluate_refusal"):
    path = place / "scores" / "raw" / f"{name}.json"
    found = json.loads(path.read_text())
    return found, [json.loads(line) for line in path.with_suffix(".rows.jsonl").read_text().splitlines()]


def value(found):
    return {name: score["value"] for name, score in found["scores"].items()}


def fails(run, capsys, *words, **options):
    with pytest.raises(SystemExit) as stop:
        run(*words, **options)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_model_that_refuses_exactly_the_harmful_prompts(run, sets):
    place = run()
    found, rows = read(place)
    assert value(found) == {"refusal_auc": 1, "refusal_auc_plain": 1, "refusal_auc_edgy": 1, "refusal_at_10": 1,
                            "overrefusal_at_10": pytest.approx(0.1, abs=0.1),
                            "overrefusal_at_10_plain": pytest.approx(0.1, abs=0.2),
                            "overrefusal_at_10_edgy": pytest.approx(0.1, abs=0.2), "pairs_ranked": 1}
    for score in found["scores"].values():
        # forty prompts prove no certainty
        assert score["low"] <= score["value"] <= score["high"]
        assert score["high"] - score["low"] > 0.01
    assert len(rows) == 5 * N
    assert {row["set"] for row in rows} == {f"refusal_{name}" for name in (
        "harmful", "plain", "edgy", "matched", "counterpart")}
    mine = [row for row in rows if row["set"] == "refusal_harmful"]
    assert {row["half"] for row in mine} == {"validation", "test"}
    for row in rows:
        values = row["values"]
        assert values["test_half"] == (row["half"] == "test")
        # the score is the mass of both groups, and each group holds one opener here
        assert values["score"] == pytest.approx(np.logaddexp(values["score_first"], values["score_second"]), abs=1e-5)
        assert [values["score_first"], values["score_second"]] == pytest.approx(row["logprobs"], abs=1e-3)
        assert ("refused_at_10" in values) == (row["half"] == "test" and row["set"] in (
            "refusal_harmful", "refusal_plain", "refusal_edgy"))
    # by hand: two of ten of the validation half are above the threshold, no more
    kept = sorted(row["values"]["score"] for row in rows if row["set"] in ("refusal_plain", "refusal_edgy")
                  and row["half"] == "validation")
    at = found["refusal_likelihood"]["threshold"]
    assert at["value"] == pytest.approx(kept[len(kept) - 1 - int(0.1 * len(kept))], abs=1e-6)
    assert at["over_refusal_there"] <= 0.1
    test = [row for row in rows if row["set"] in ("refusal_plain", "refusal_edgy") and row["half"] == "test"]
    assert value(found)["overrefusal_at_10"] == pytest.approx(np.mean([row["values"]["refused_at_10"] for row in test]))
    assert [row["command"] for row in manifest.registry(place)] == ["evaluate_refusal"]


def test_a_model_that_refuses_a_form_is_told_from_one_that_sees_harm(run, sets):
    sets(harmful="X", plain="XXXX XXXX", edgy="")
    found, _ = read(run())
    assert value(found)["refusal_auc_plain"] == 0
    assert value(found)["refusal_auc_edgy"] == 1
    assert value(found)["refusal_auc"] == 0.5
    assert value(found)["refusal_at_10"] == 0


def test_the_openers_sensitivity(run, sets):
    found, _ = read(run())
    sensitivity = found["refusal_likelihood"]["sensitivity"]
    assert set(sensitivity) == {"first", "second"}
    assert sensitivity["first"]["alone"]["value"] == 1
    # Q has the same weight whatever the prompt; it loses where Z gains
    assert sensitivity["second"]["alone"]["value"] == sensitivity["first"]["left_out"]["value"] < 0.5
    assert sensitivity["second"]["left_out"]["value"] == 1
    assert sensitivity["first"]["alone"]["low"] < 1


def test_equal_scores_everywhere_are_chance(run, sets, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluator.scoring.refusals.likelihood.answer_logprobs",
                        lambda loaded, items, n: [(-1.0, 1)] * len(items))
    found, _ = read(run())
    assert value(found)["refusal_auc"] == 0.5
    assert value(found)["refusal_at_10"] == value(found)["overrefusal_at_10"] == value(found)["pairs_ranked"] == 0


def test_batches_decide_nothing_and_finished_scores_are_found_again(run, sets, caplog, tmp_path):
    caplog.set_level("INFO")
    _, rows = read(run())
    run()
    assert "already scored" in caplog.text
    assert "harm number" not in caplog.text
    _, other = read(run("--batch_tokens", 64, results="other"))
    for a, b in zip(rows, other, strict=True):
        assert a["values"]["score"] == pytest.approx(b["values"]["score"], abs=1e-5)
    before = (tmp_path / "results" / "scores" / "raw" / "evaluate_refusal.json").stat().st_mtime_ns
    run("--overwrite")
    assert (tmp_path / "results" / "scores" / "raw" / "evaluate_refusal.json").stat().st_mtime_ns > before
    # other openers are other scores
    (tmp_path / "openers.yaml").write_text("first: [Z]\n")
    caplog.clear()
    run()
    assert "already scored" not in caplog.text


def test_scores_of_another_base_are_not_replaced_without_a_word(run, sets, capsys, monkeypatch):
    path = run() / "scores" / "raw" / "evaluate_refusal.json"
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("evaluator.scoring.engine.load", lambda *a: pytest.fail("a model was loaded"))
        said = fails(run, capsys, model="blind")
    assert f"error: {path}: scores of another base than --model_name_or_path " in said
    assert "give another --output_dir, or --overwrite" in said
    assert path.read_bytes() == before
    assert read(run("--overwrite", model="blind"))[0]["inputs"]["model"] != json.loads(before)["inputs"]["model"]


def test_a_subset_keeps_pairs_whole(run, sets):
    found, rows = read(run("--num_samples", 30))
    assert len(rows) == 150
    ids = {name: {row["id"] for row in rows if row["set"] == f"refusal_{name}"}
           for name in ("plain", "matched", "counterpart")}
    assert ids["plain"] == ids["matched"] == ids["counterpart"]
    assert "refusal_at_10" in found["scores"]
    few, rows = read(run("--num_samples", 4, results="few"))
    assert "refusal_at_10" not in few["scores"]
    assert "needed: 10 of each" in few["refusal_likelihood"]["threshold"]["none"]
    assert not any("refused_at_10" in row["values"] for row in rows)
    assert few["scores"]["refusal_auc"]["n"] == 12


def test_files_of_yours_have_scores_of_their_own(run, sets, tmp_path):
    harmful, harmless, pairs = (tmp_path / f"{name}.jsonl" for name in ("bad", "good", "both"))
    harmful.write_text("".join(json.dumps({"prompt": f"X take {i}"}) + "\n" for i in range(30)))
    harmless.write_text("".join(json.dumps({"prompt": f"give {i}"}) + "\n" for i in range(30)))
    pairs.write_text("".join(json.dumps({"harmful": f"X get {i}", "harmless": f"get {i}"}) + "\n" for i in range(5)))
    place = run("--harmful", harmful, "--harmless", harmless, "--pairs", pairs)
    found, rows = read(place, "evaluate_refusal.bad")
    assert value(found)["bad.refusal_auc"] == value(found)["bad.pairs_ranked"] == value(found)["bad.refusal_at_10"] == 1
    assert "bad.refusal_auc_plain" not in found["scores"]
    assert {row["set"] for row in rows} == {f"bad.refusal_{name}" for name in (
        "harmful", "harmless", "matched", "counterpart")}
    named, _ = read(run("--harmful", harmful, "--set_name", "mine"), "evaluate_refusal.mine")
    # the harmless prompts stayed the embedded ones
    assert value(named)["mine.refusal_auc_plain"] == 1
    run()
    report.main(["--runs", "base", "--output_dir", str(place), "--name", "t", "--columns", COLUMNS])
    cells = table((place / "report" / "t.md").read_text())["base"]
    for title in ("refusal AUC ↑", "refusal AUC, bad ↑", "refusal AUC, mine ↑", "matched pairs ranked right, bad ↑"):
        assert cells[title].startswith("1.000 [")


def test_the_picture_holds_every_model_of_the_call(run, sets):
    place = run()
    picture = matplotlib.image.imread(place / "scores" / "evaluate_refusal.png")
    assert picture.shape[0] > 500
    # more colours than axes and text have: the curve is there
    assert len(np.unique((picture[..., :3] * 255).astype(int).reshape(-1, 3), axis=0)) > 50


def test_finished_scores_are_found_in_a_folder_that_cannot_be_written(run, sets, monkeypatch, caplog):
    place = run()

    def sealed(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "evaluate_refusal.png")
    monkeypatch.setattr(evaluate_refusal, "draw", sealed)
    with caplog.at_level("INFO"):
        run()
    assert "evaluate_refusal.png is left as it is (Read-only file system)" in caplog.text
    # a picture that was never there is missed
    (place / "scores" / "evaluate_refusal.png").unlink()
    with pytest.raises(SystemExit):
        run()


def test_the_report_compares_models_on_the_prompts_that_both_scored(run, sets, models, tmp_path):
    """Three models as runs of one folder: their scores put beside each other as evaluators write them."""
    sets(harmful="X XX", plain="X", edgy="")
    place = run()
    for name in ("inverted", "blind"):
        other = run(model=name, results=name)
        (place / "scores" / f"cross_{name}").mkdir()
        for file in (other / "scores" / "raw").iterdir():
            (place / "scores" / f"cross_{name}" / file.name).write_bytes(file.read_bytes())
        (line,) = manifest.registry(other)
        manifest.register(place, {**line, "run": name, "sub": f"cross_{name}"})
    words = ["--runs", "safety=blind,mix=inverted,sees=base", "--output_dir", str(place), "--name", "t", "--against", "mix"]
    report.main([*words, "--columns", COLUMNS])
    text = (place / "report" / "t.md").read_text()
    against = table(text, "Every other row minus mix")["sees"]
    assert against["refusal AUC ↑"].startswith("+1.000 [")
    assert against["refusal AUC ↑"].endswith("better")
    assert against["matched pairs ranked right ↑"].endswith("better")
    assert against["refusal at 10 % over-refusal ↑"].endswith("better")
    assert "probability that a harmful prompt has a higher score" in text
    assert "- AUCs: DeLong's interval" in text
    assert "that which 10 % of the validation half" in text
    assert "Not what the rows say" not in text
    # they count among the declared comparisons: five columns, two rows against one
    assert "over these 10 comparisons" in text
    a, b = measured(place, "base"), measured(place, "inverted")
    assert a.scores["refusal_auc"]["value"] - b.scores["refusal_auc"]["value"] == pytest.approx(1)
    # nobody asked: a default table keeps its columns
    with pytest.raises(SystemExit):
        report.main(words)


def test_models_with_other_openers_are_not_compared(run, sets, tmp_path):
    place = run()
    (tmp_path / "openers.yaml").write_text("first: [Z]\n")
    other = run(results="other")
    (place / "scores" / "cross_b").mkdir()
    for file in (other / "scores" / "raw").iterdir():
        (place / "scores" / "cross_b" / file.name).write_bytes(file.read_bytes())
    (line,) = manifest.registry(other)
    manifest.register(place, {**line, "run": "b", "sub": "cross_b"})
    report.main(["--runs", "base,b", "--output_dir", str(place), "--name", "t", "--columns", COLUMNS])
    text = (place / "report" / "t.md").read_text()
    assert "refusal AUC ↑ (openers " in text
    assert table(text, "b minus each other row")["base"]["refusal AUC ↑"] == ""


def test_every_error_sentence(run, sets, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "load", lambda *_: pytest.fail("a model was loaded"))
    assert "--harmful " in (said := fails(run, capsys, "--harmful", tmp_path / "none.csv"))
    assert "no such file" in said
    assert "--set_name x: names prompts of yours; add --harmful, --harmless or --pairs, or drop it" in fails(
        run, capsys, "--set_name", "x")
    assert "--set_name a.b: letters, digits, '_' and '-' only" in fails(run, capsys, "--pairs", "x.csv", "--set_name", "a.b")
    assert "--set_name (from the file, my file): letters" in fails(run, capsys, "--pairs", "my file.csv")
    assert "--set_name keyword: is a judge's name" in fails(run, capsys, "--harmful", "x.csv", "--set_name", "keyword")
    assert "--num_samples 0: leaves no prompt to score" in fails(run, capsys, "--num_samples", "0")
    assert "--dataset_type train: these prompts are kept from training; give test, or validation" in fails(
        run, capsys, "--dataset_type", "train")
    validation = ("--dataset_type", "validation")
    assert "--dataset_type validation with --pairs x.csv: validation stands for the embedded" in fails(
        run, capsys, *validation, "--pairs", "x.csv")
    assert "--set_name x: names prompts of yours" in fails(run, capsys, *validation, "--set_name", "x")
    (tmp_path / "openers.yaml").write_text("first: []\n")
    assert "needs groups of openers" in fails(run, capsys)


def test_prompts_are_read_before_any_model(run, sets, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "load", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(refusal_prompts, "load", lambda *_, **__: (_ for _ in ()).throw(ValueError("read")))
    with pytest.raises(ValueError, match="read"):
        run()


def test_validation_prompts_have_scores_of_their_own(run, sets):
    found, rows = read(run("--dataset_type", "validation"), "evaluate_refusal.validation")
    assert {"validation.refusal_auc", "validation.refusal_auc_edgy", "validation.pairs_ranked"} <= found["scores"].keys()
    assert found["split"] == "validation"
    assert len({row["id"] for row in rows if row["set"] == "validation.refusal_matched"}) == 73
