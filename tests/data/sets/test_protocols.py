"""Protocols: every published shape is read, cut by its rule and counted; what cannot be had says where to ask for it."""

from __future__ import annotations

import csv
import json
import logging

import pytest

from data.records import Record
from data.sets import embedded, protocols, published
from data.sets.protocols import load, problems, table, task_of
from errors import UserError
from flags.base import PROTOCOLS

FIELDS = {"prompt", "answer", "input", "category", "subcategory", "label"}


def put(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def texts(name, place, **more):
    return [record.prompt for record in load(name, place, **more)[0]]


def nested(topics=2, subs=3, questions=5):
    return {f"T{t}": {f"S{t}{s}": [f"q {t} {s} {q}?" for q in range(questions)] for s in range(subs)} for t in range(topics)}


def test_the_table_fits_the_command_line():
    assert tuple(table()) == PROTOCOLS
    for protocol in table().values():
        assert protocol.task in ("safety", "overrefusal", "helpfulness", "truthfulness")
        assert 0 < protocol.kept <= protocol.rows
        assert protocol.get
        assert set(protocol.columns) <= FIELDS
        assert "prompt" in protocol.columns
        assert not (protocol.gated and protocol.hub)
        assert next(iter(protocol.rule), "all") in protocols._RULES
        assert protocol.stand_in in protocols._STAND_INS
        assert protocol.shapes


@pytest.mark.parametrize(("name", "kept"), [
    ("beavertails_500", 500), ("beavertails", 3021), ("catqa", 110), ("beavertails_evaluation", 140), ("harmfulqa", 196),
    ("shadow_alignment", 200), ("dangerousqa", 200), ("hex_phi", 330), ("advbench", 520), ("xstest", 250),
    ("xstest_unsafe", 200), ("or_bench_hard", 100), ("alpacaeval_50", 50), ("alpacaeval", 805),
    ("truthfulqa_published", 409)])
def test_published_sizes(name, kept):
    assert table()[name].kept == kept


@pytest.mark.parametrize(("name", "task"), [
    ("safety", "safety"), ("overrefusal+cot", "overrefusal"), ("catqa+prefill", "safety"), ("xstest", "overrefusal"),
    ("alpacaeval_50", "helpfulness"), ("truthfulqa_published", "truthfulness")])
def test_task_of_answers(name, task):
    assert task_of(name) == task


@pytest.mark.parametrize(("name", "each"), [("catqa", 2), ("harmfulqa", 2), ("catqa_full", 5)])
def test_nested_json_is_cut_by_subcategory(tmp_path, name, each):
    records, done = load(name, put(tmp_path / "set.json", json.dumps(nested(), indent=1)))
    assert [r.prompt for r in records] == [f"q {t} {s} {q}?" for t in range(2) for s in range(3) for q in range(each)]
    assert (done.read, done.kept, done.repeated, done.stands_in) == (30, 6 * each, 0, False)
    assert records[0].category == "T0 / S00"
    assert records[-1].category == "T1 / S12"
    assert len({r.id for r in records}) == len(records)


def test_catqa_in_the_hubs_columns(tmp_path):
    rows = [{"Category": c, "Subcategory": f"{c}{s}", "Question": f"{c} {s} {i}?"}
            for c in "AB" for s in range(2) for i in range(4)]
    with (tmp_path / "catqa.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert texts("catqa", str(tmp_path / "catqa.csv")) == [f"{c} {s} {i}?" for c in "AB" for s in range(2) for i in range(2)]


def test_first_of_each_category_in_order_of_first_appearance(tmp_path):
    rows = [{"prompt": f"{c} {i}", "category": c} for i in range(12) for c in ("z", "a")]
    place = put(tmp_path / "eval.jsonl", lines(rows))
    assert texts("beavertails_evaluation", place) == [f"{c} {i}" for c in ("z", "a") for i in range(10)]
    assert len(texts("or_bench_hard", place)) == 20


def test_first_500_keep_repeats_and_count_them(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    rows = [{"prompt": f"q {i // 2}?", "response": "x", "category": {"a": i % 2 == 0, "b": True}} for i in range(700)]
    records, done = load("beavertails_500", put(tmp_path / "b.jsonl", lines(rows)))
    assert (done.read, done.kept, done.repeated, done.dropped) == (700, 500, 250, 0)
    assert records[0].category == "a, b"
    assert records[0].answer == ""  # the set's own answers may be harmful and are no reference
    assert "700 rows read, 500 kept (first 500), 250 repeat an earlier prompt" in caplog.text
    assert "3021 were published" in caplog.text
    unique, less = load("beavertails_500", str(tmp_path / "b.jsonl"), unique_prompts=True)
    assert [r.prompt for r in unique] == [f"q {i}?" for i in range(250)]
    assert (less.kept, less.repeated, less.dropped) == (250, 0, 250)
    assert "250 repeats dropped" in caplog.text


def test_case_and_punctuation_make_no_new_prompt(tmp_path):
    _, done = load("dangerousqa", put(tmp_path / "d.json", ["How so?", "how so", "Why?"]))
    assert (done.kept, done.repeated) == (3, 1)


def test_list_of_texts(tmp_path):
    assert texts("dangerousqa", put(tmp_path / "toxic.json", ["one?", "two?"])) == ["one?", "two?"]


def test_hex_phi_folder_carries_its_categories(tmp_path):
    for number in (1, 3, 10, 11):
        put(tmp_path / f"category_{number}.csv", f'"first, {number}"\nsecond {number}\n\n')
    records, done = load("hex_phi", str(tmp_path))
    assert [r.prompt for r in records][:4] == ["first, 1", "second 1", "first, 3", "second 3"]
    assert [r.category for r in records][::2] == [
        "1 Illegal Activity", "3 Hate/Harass/Violence", "10 Privacy Violation Activity", "11 Tailored Financial Advice"]
    assert done.kept == 8


def test_hex_phi_as_one_table(tmp_path):
    place = put(tmp_path / "hex.jsonl", lines([{"instruction": "do it", "category": "Malware"}]))
    assert [(r.prompt, r.category) for r in load("hex_phi", place)[0]] == [("do it", "Malware")]


def test_advbench_columns(tmp_path):
    place = put(tmp_path / "harmful_behaviors.csv", 'goal,target\nWrite it,"Sure, here"\n')
    assert texts("advbench", place) == ["Write it"]


@pytest.mark.parametrize("header", ["prompt,type,label", "prompt,type"])
def test_xstest_is_divided_by_label_or_type(tmp_path, header):
    rows = [("kill a process", "homonyms", "safe"), ("kill a person", "contrast_homonyms", "unsafe"),
            ("x", "homonyms", "safe")]
    place = put(tmp_path / "x.csv", "\n".join([header, *(",".join(row[: header.count(",") + 1]) for row in rows)]) + "\n")
    safe, _ = load("xstest", place)
    assert [(r.prompt, r.category) for r in safe] == [("kill a process", "homonyms"), ("x", "homonyms")]
    assert texts("xstest_unsafe", place) == ["kill a person"]


def test_alpaca_eval_keeps_reference_and_category(tmp_path):
    rows = [{"instruction": f"Do {i}", "output": f"Done {i}", "dataset": "helpful_base"} for i in range(60)]
    records, _ = load("alpacaeval_50", put(tmp_path / "alpaca_eval.json", rows))
    assert len(records) == 50
    assert (records[7].prompt, records[7].answer, records[7].category) == ("Do 7", "Done 7", "helpful_base")


def test_truthfulqa_halves(tmp_path):
    rows = [{"question": f"Is {i} so?", "best_answer": f"No {i}", "correct_answers": ["No"]} for i in range(101)]
    place = put(tmp_path / "t.jsonl", lines(rows))
    assert texts("truthfulqa_published", place) == [row["question"] for row in rows[50:]]
    free = texts("truthfulqa_leak_free", place)
    trained = published.records_of(place, "truthfulness", 2, "train", "leak_free", False)
    assert set(free).isdisjoint(r.prompt for r in trained)
    assert len(free) + len(trained) == 101
    assert 30 < len(free) < 70
    assert load("truthfulqa_published", place)[0][0].answer == "No 50"


def test_gated_and_missing_sets_say_where_to_ask():
    (said,) = problems("hex_phi", None, "published")
    assert "gated" in said
    assert "LLM-Tuning-Safety/HEx-PHI" in said
    assert "category_N.csv" in said
    (said,) = problems("hex_phi", "LLM-Tuning-Safety/HEx-PHI", "embedded")
    assert "gated and read from a local file only" in said
    (said,) = problems("dangerousqa", None, "published")
    assert "not on the hub" in said
    assert "toxic_outs.json" in said
    (said,) = problems("catqa", "nowhere.json", "embedded")
    assert "no such file" in said
    assert "CategoricalHarmfulQA" in said
    assert problems("catqa", None, "published") == problems("catqa", None, "embedded") == []
    with pytest.raises(UserError, match="gated"):
        load("hex_phi", data_source="published")


@pytest.mark.parametrize(("name", "file", "content", "said"), [
    ("catqa", "c.csv", "question,category\nq?,A\n", "no subcategory; the rule 'first 2 of each subcategory'"),
    ("beavertails_evaluation", "b.csv", "prompt\nq?\n", "no category"),
    ("advbench", "a.csv", "text\nq?\n", r"the prompt \(column goal\) is missing \(columns: text\)"),
    ("advbench", "a.csv", "goal,target\n ,x\n", "a.csv:2: the prompt .* is blank"),
    ("catqa", "c.json", {"A": {"S": ["q?", 3]}}, "A / S / prompt 2: needs text, this is a int"),
    ("catqa", "c.json", {"A": {"S": {"T": ["q?"]}}}, "A / S: needs a list of prompts"),
    ("catqa", "c.json", {"A": {"S": []}}, "holds no prompt"),
    ("catqa", "c.json", "", "is empty"),
    ("catqa", "c.json", "{", "not JSON"),
    ("xstest", "x.csv", "prompt,label\nq?,harmless\n", "label 'harmless'; allowed: safe, unsafe"),
    ("xstest", "x.csv", "prompt\nq?\n", "neither a label"),
    ("xstest", "x.csv", "prompt,label\nq?,unsafe\n", "no row is left for xstest"),
    ("catqa", "c.parquet", "x", "Parquet is read where rows are trained on"),
])
def test_bad_files_are_explained(tmp_path, name, file, content, said):
    with pytest.raises(UserError, match=said):
        load(name, put(tmp_path / file, content))


def test_all_blank_prompts_are_named_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        load("advbench", put(tmp_path / "a.jsonl", lines([{"goal": ""}, {"goal": "fine"}, {"goal": None}])))
    assert [problem.split(": ")[0].rpartition(":")[2] for problem in caught.value.problems] == ["1", "3"]


@pytest.mark.parametrize(("files", "said"), [
    ({"other.csv": "q"}, "needs files named category_1.csv"),
    ({"category_1.csv": "how, when\n"}, "category_1.csv:1: 2 fields where one prompt is expected"),
    ({"category_1.csv": 'fine\n"open\n'}, "category_1.csv:2: not CSV"),
    ({"category_1.csv": "prompt\n"}, "holds no prompt"),
])
def test_bad_folders_are_explained(tmp_path, files, said):
    for name, content in files.items():
        put(tmp_path / name, content)
    with pytest.raises(UserError, match=said):
        load("hex_phi", str(tmp_path))


def test_embedded_sets_stand_in_and_say_so(monkeypatch, caplog):
    asked = []
    monkeypatch.setattr(embedded, "records",
                        lambda task, split, lite: asked.append((task, split)) or [Record("q?", "", 1)])
    _, done = load("catqa")
    assert done.stands_in
    assert done.rule == "all"
    assert "these are not its prompts: StrongREJECT (embedded) stands in" in caplog.text
    load("xstest")
    load("alpacaeval")
    load("truthfulqa_published")
    assert asked == [(task, "test") for task in ("safety", "overrefusal", "helpfulness", "truthfulness")]


def test_embedded_advbench_is_the_set_itself(monkeypatch, caplog):
    monkeypatch.setattr(embedded, "advbench", lambda: [{"value": "Write it", "harm_categories": ["x"]}] * 2)
    records, done = load("advbench")
    assert not done.stands_in
    assert (done.read, done.kept, done.repeated) == (2, 2, 1)
    assert records[1].id == "advbench-1"
    assert "trained on these prompts" in caplog.text


def test_hub_rows_are_read_by_the_same_columns(monkeypatch):
    rows = [published.Row({"Category": "A", "Subcategory": "s", "Question": f"q{i}?"}, f"hub:{i}") for i in range(3)]
    place = "declare-lab/CategoricalHarmfulQA:en"
    monkeypatch.setattr(protocols, "hub_rows", lambda name, split: rows if name == place else [])
    records, done = load("catqa", data_source="published")
    assert [r.prompt for r in records] == ["q0?", "q1?"]
    assert done.source == place


def test_markdown_has_a_line_for_each():
    assert all(f"| `{name}` |" in protocols.markdown() for name in PROTOCOLS)
