"""The published numbers: complete, marked as the specification marks them, checked when read."""

from __future__ import annotations

import copy

import pytest
import yaml

from errors import UserError
from evaluator.reporting.published_numbers import FOLDER, MARKS, Cell, papers, published

SETS = {"catqa": "CATQA", "beavertails": "BeaverTails", "harmfulqa": "HarmfulQA", "shadow": "Shadow",
        "dangerous": "Dangerous"}
TASKS = ("zh", "hi", "en", "code", "math")
METHODS = ("SFT", "SOMF Mask", "SOMF Binary", "DARE", "RESTA")


def marked(table):
    return {(*key, column): cell.mark for key, row in table.rows.items() for column, cell in row.items() if cell.mark}


def test_three_papers_with_sources_and_marks():
    assert papers() == ("h3fusion", "lora_fusion", "somf")
    for name in papers():
        found = published(name)
        assert found.tables
        assert {t.provenance for t in found.tables.values()} <= set(found.provenance)
        assert set(found.marks) <= set(MARKS)
        assert {mark for t in found.tables.values() for mark in marked(t).values()} <= set(found.marks)


def test_somf_cells_and_marks():
    somf = published("somf").tables
    assert somf["aligned_models"].cell("WizardLM-7B-Uncensored", "SFT then DPO", "3", column="CATQA") == Cell(76.15)
    assert somf["aligned_models"].cell("WizardLM-7B-Uncensored", "SFT 50k", "1", column="HarmfulQA") == Cell(None)
    assert somf["safety_dangerous"].cell("PEFT", "SFT", column="en") == Cell(7.58, "suspicious")
    assert somf["safety_catqa"].cell("full", "DARE", column="code") == Cell(15.6, "invalid")
    for name in SETS:
        table = somf[f"safety_{name}"]
        assert set(table.rows) == {(track, method) for track in ("PEFT", "full") for method in METHODS}
        # RESTA in full: the English model for every task
        assert {c for c in TASKS if table.cell("full", "RESTA", column=c).mark == "invalid"} == set(TASKS) - {"en"}
        assert table.cell("full", "DARE", column="code").mark == "invalid"
    suspicious = {(name, *place) for name in SETS for place, mark in marked(somf[f"safety_{name}"]).items()
                  if mark == "suspicious"}
    assert suspicious == {("harmfulqa", "PEFT", "DARE", "math"), ("shadow", "PEFT", "DARE", "math"),
                          ("dangerous", "PEFT", "SFT", "en")}
    for table in (somf["utility_multi_task"], somf["safety_multi_task"]):
        bad = {key[1] for key, row in table.rows.items() if all(c.mark == "invalid" for c in row.values())}
        assert bad == {"SOMF Binary"}
    gains = somf["safety_multi_task_gain"]
    assert all(row["BeaverTails"].mark == "invalid" for row in gains.rows.values())


def test_the_computed_means_are_the_means_of_the_cells():
    somf = published("somf").tables
    for (track, method), row in somf["safety_means"].rows.items():
        for name, column in SETS.items():
            values = [somf[f"safety_{name}"].cell(track, method, column=task).value for task in TASKS]
            assert row[column].value == pytest.approx(sum(values) / 5, abs=0.06), (track, method, name)
        assert row["mean"].value == pytest.approx(sum(row[c].value for c in SETS.values()) / 5, abs=0.11)
    for (track, method), row in somf["utility_single_task"].rows.items():
        if row["mean"].value is not None:
            assert row["mean"].value == pytest.approx(sum(row[t].value for t in TASKS) / 5, abs=0.11), (track, method)


def test_the_corrected_differences_are_against_the_right_mean():
    somf = published("somf").tables
    for key, row in somf["safety_multi_task_gain_corrected"].rows.items():
        whole = somf["safety_multi_task"].rows[key]["BeaverTails"].value
        assert row["BeaverTails"].value == pytest.approx(whole - 8.14, abs=0.011)
        assert somf["safety_multi_task_gain"].rows[key]["BeaverTails"].value == pytest.approx(whole - 28.35, abs=0.011)


def test_h3fusion_and_lora_fusion():
    h3 = published("h3fusion").tables
    assert [row["gain"].value for row in h3["gains"].rows.values()] == [11.37, 13.77, 6.18]
    assert all(c.mark == "unverified" for row in h3["index_of_other_papers"].rows.values() for c in row.values()
               if c.value is not None)
    assert h3["index_of_other_papers"].cell("Computational efficiency, LLaMA-2-7B, total time (unit not given)",
                                            column="TrinityX") == Cell(None)
    lora = published("lora_fusion").tables
    assert lora["lambda_sweep"].cell("0.4", column="harmfulness_rate") == Cell(0.02, "unverified")
    for name in ("lambda_sweep", "fusion_or_mixing", "demo_judge"):  # neither judge nor scoring method is stated
        assert {c.mark for row in lora[name].rows.values() for c in row.values() if c.value is not None} == {"unverified"}
    assert lora["lambda_sweep"].cell("0.1", column="harmfulness_rate") == Cell(None)
    assert len(lora["hexphi_categories"].rows) == 12
    for column in lora["hexphi_categories"].columns:
        values = [row[column].value for key, row in lora["hexphi_categories"].rows.items() if key != ("mean",)]
        assert lora["hexphi_categories"].cell("mean", column=column).value == pytest.approx(sum(values) / 11, abs=0.06)
    assert set(marked(lora["xsum_rouge"]).values()) == {"invalid"}


@pytest.fixture
def broken(tmp_path):
    """Write a file with one thing changed; returns the sentence that reading it gives."""
    def run(change):
        content = copy.deepcopy(yaml.safe_load((FOLDER / "somf.yaml").read_text(encoding="utf-8")))
        change(content)
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        with pytest.raises(UserError) as error:
            published("x", tmp_path)
        return " ".join(error.value.problems)
    return run


@pytest.mark.parametrize(("change", "says"), [
    (lambda c: c.pop("arxiv"), "'arxiv' is missing"),
    (lambda c: c["tables"]["safety_catqa"].pop("unit"), "safety_catqa: 'unit' is missing"),
    (lambda c: c["tables"]["safety_catqa"].update(unt="x"), "unknown key 'unt'"),
    (lambda c: c["tables"]["safety_catqa"].update(provenance="hearsay"), "'hearsay' is not explained"),
    (lambda c: c["tables"]["safety_catqa"]["rows"][0]["values"].append(3), "6 values for 5 columns"),
    (lambda c: c["tables"]["safety_catqa"]["rows"][0]["values"].__setitem__(0, "40?"), "'40?' is no number"),
    (lambda c: c["tables"]["safety_catqa"]["rows"][0]["key"].pop(), "a key of 1 parts"),
    (lambda c: c["tables"]["safety_catqa"]["rows"][1].update(c["tables"]["safety_catqa"]["rows"][0]), "stands there twice"),
    (lambda c: c["tables"]["safety_catqa"]["rows"][0].update(marks={"fr": "invalid"}), "which is no column"),
    (lambda c: c["tables"]["safety_catqa"]["rows"][0].update(marks={"zh": "odd"}), "mark 'odd' is not explained"),
    (lambda c: c["marks"].update(odd="x"), "mark 'odd' is not known"),
])
def test_a_broken_file_is_told(broken, change, says):
    assert says in broken(change)


def test_an_unknown_paper_and_a_file_that_is_no_mapping(tmp_path):
    with pytest.raises(UserError, match="known: h3fusion, lora_fusion, somf"):
        published("resta")
    (tmp_path / "x.yaml").write_text("- 1")
    with pytest.raises(UserError, match="must be a mapping"):
        published("x", tmp_path)
