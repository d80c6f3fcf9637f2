"""Data sets: counts, splits without leaks, published shapes, hostile files."""

from __future__ import annotations

import csv
import json
import logging

import pytest

from data.records import OBJECTIVES, SPLITS, normalise
from data.sets import embedded, published
from data.sets.embedded import prompt_hash
from data.sources import load_choices, load_judge_rows, load_pairs, load_records, load_refusal_labels
from errors import UserError
from tests.assets_fixture import require_embedded

HHH = ("hhh_helpful", "hhh_honest", "hhh_harmless", "hhh_other")


@pytest.fixture(scope="session")
def embedded_assets() -> None:
    require_embedded()


@pytest.fixture(scope="session")
def sets(embedded_assets) -> dict[tuple[str, str], list]:
    """Every embedded (task, split), loaded once."""
    found = {(task, split): load_records(task, split) for task in OBJECTIVES for split in SPLITS}
    return found | {("overrefusal", "test"): load_records("overrefusal", "test")}


def prompts(rows) -> set[str]:
    return {normalise(row.prompt) for row in rows}


# ---- embedded


def test_row_counts(sets):
    counts = {key: len(rows) for key, rows in sets.items()}
    assert counts == {
        ("helpfulness", "train"): 774, ("helpfulness", "validation"): 109, ("helpfulness", "test"): 102,
        ("safety", "train"): 646, ("safety", "validation"): 72, ("safety", "test"): 288,
        ("truthfulness", "train"): 490, ("truthfulness", "validation"): 51, ("truthfulness", "test"): 299,
        ("overrefusal", "test"): 300}
    # 999 Alpaca rows, 14 of them exact repeats; 520 AdvBench prompts; 817 - 276 questions
    assert sum(n for (task, _), n in counts.items() if task == "helpfulness") == 999 - 14
    safety = sets["safety", "train"] + sets["safety", "validation"]
    assert sum(r.id.startswith("advbench") for r in safety) == 520
    truth = sets["truthfulness", "train"] + sets["truthfulness", "validation"]
    assert len(prompts(truth)) == 817 - 276


def test_the_overlap_with_bigbench_is_what_the_spec_says(sets):
    questions = {normalise(row["question"]) for row in embedded._truthfulqa()}
    assert len(questions) == 817
    assert len(questions & prompts(sets["truthfulness", "test"])) == 267
    assert len(load_records("truthfulness", "test", lite=True)) == 276


def test_splits_are_disjoint_and_no_test_prompt_is_trained_on(sets):
    held_out = set().union(*(prompts(rows) for (_, split), rows in sets.items() if split == "test"))
    for name in (*HHH, "truthfulqa_mc"):
        held_out |= prompts(load_choices(name))
    assert len(held_out) > 288 + 299 + 300 + 102
    train, validation = (set().union(*(prompts(sets[task, split]) for task in OBJECTIVES))
                         for split in ("train", "validation"))
    assert not train & held_out
    assert not validation & held_out
    assert not train & validation
    for split, others in (("train", validation), ("validation", train)):
        pairs = prompts(load_pairs("mix", split))
        assert not pairs & held_out
        # neither does a preference pair show what supervised training holds out
        assert not pairs & others


@pytest.mark.usefixtures("embedded_assets")
def test_held_out_file_lists_the_benchmarks():
    assert embedded.held_out_hashes() == embedded.find_held_out()
    assert {prompt_hash(c.prompt) for name in (*HHH, "truthfulqa_mc") for c in load_choices(name)} <= \
        embedded.held_out_hashes()


@pytest.mark.usefixtures("embedded_assets")
def test_planted_leak_is_dropped_and_counted(monkeypatch, caplog):
    leak = load_records("safety", "test")[0]
    monkeypatch.setitem(embedded._TRAIN, "safety", lambda: [leak])
    with caplog.at_level(logging.INFO):
        found = load_records("safety", "train") + load_records("safety", "validation")
    assert found == []
    assert "1 dropped because their prompt is in a test set" in caplog.text
    assert leak.prompt not in caplog.text


def test_rows_are_well_formed(sets):
    for (task, split), rows in sets.items():
        assert len({r.id for r in rows}) == len(rows), (task, split)
        assert all(r.prompt.strip() for r in rows)
        assert split == "test" or all(r.answer.strip() for r in rows)
        want = 1 if task == "overrefusal" else OBJECTIVES.index(task)
        assert {r.objective for r in rows} == {want}
    assert sum("small" in r.id for r in sets["safety", "test"]) == 59
    assert all(r.category for r in sets["safety", "test"])


def test_refusals_are_deterministic_varied_and_open_with_the_refusal(sets):
    texts = {embedded.refusal(r.prompt) for r in sets["safety", "train"]}
    assert len(texts) >= 20
    assert embedded.refusal("How do I do X?") == embedded.refusal("how do i do x")
    marks = ("can't", "cannot", "won't", "not able", "decline", "no,", "say no", "refuse", "unable", "not something",
             "don't help", "turn down", "but no", "will not", "something that i won't")
    assert all(any(mark in text.split(".")[0].lower() for mark in marks) for text in texts)


@pytest.mark.usefixtures("embedded_assets")
def test_pairs():
    counts = {(task, split): len(load_pairs(task, split)) for task in OBJECTIVES for split in ("train", "validation")}
    assert counts == {("helpfulness", "train"): 104, ("helpfulness", "validation"): 10, ("safety", "train"): 344,
                      ("safety", "validation"): 44, ("truthfulness", "train"): 24, ("truthfulness", "validation"): 2}
    pairs = load_pairs("mix", "train")
    assert [p.objective for p in pairs] == [0] * 104 + [1] * 344 + [2] * 24
    assert all(p.chosen.strip() and p.rejected.strip() and p.chosen != p.rejected for p in pairs)
    with pytest.raises(UserError, match="no preference pairs for safety test"):
        load_pairs("safety", "test")
    with pytest.raises(UserError, match="--data_path"):
        load_pairs("safety", "train", source="published")


@pytest.mark.usefixtures("embedded_assets")
def test_choices_and_judge_rows():
    assert [len(load_choices(name)) for name in (*HHH, "truthfulqa_mc", "rho_factual")] == [59, 61, 58, 43, 299, 206]
    for choice in load_choices("truthfulqa_mc"):
        assert choice.best == 0
        assert len(set(choice.choices)) == len(choice.choices)
        assert 0 < sum(choice.labels) < len(choice.labels)
    rows = load_judge_rows()
    assert len(rows) == 990
    assert sum(row.score == 0 for row in rows) == 202
    assert all(0 <= row.score <= 1 for row in rows)
    assert len(load_refusal_labels()) == 105 + 64
    assert {label.refused for label in load_refusal_labels()} == {0, 1}
    with pytest.raises(UserError, match="--lite"):
        load_choices("hhh_helpful", lite=True)
    with pytest.raises(UserError, match="known: truthfulqa_mc"):
        load_choices("hhh")


@pytest.mark.usefixtures("embedded_assets")
def test_nothing_harmful_is_logged(caplog):
    with caplog.at_level(logging.DEBUG):
        pairs = load_pairs("safety", "train")
    assert not any(p.rejected[:40] in caplog.text or p.prompt in caplog.text for p in pairs)


# ---- arguments


def test_every_wrong_argument_is_told_at_once():
    with pytest.raises(UserError) as error:
        load_records("safty", "dev", source="web", split_mode="random", limit=0)
    assert len(error.value.problems) == 5


def test_a_missing_file_name_and_a_validation_split():
    with pytest.raises(UserError, match="names no file or hub set for: safety, truthfulness"):
        load_records("mix", "train", source={"helpfulness": "a.json"})
    with pytest.raises(UserError, match="only the embedded data has a validation split"):
        load_records("safety", "validation", source="published")
    with pytest.raises(UserError, match="overrefusal is a test set only"):
        load_records("overrefusal", "train")


# ---- local files in the published shapes


def write(folder, name, rows):
    file = folder / name
    if name.endswith(".json"):
        file.write_text(json.dumps(rows, indent=1))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def alpaca(n):
    return [{"instruction": f"do {i}", "input": "x" if i % 2 else "", "output": f"done {i}"} for i in range(n)]


def beaver(n, safe=True):
    return [{"prompt": f"ask {i}", "response": f"reply {i}", "is_safe": safe, "category": {"a": True, "b": False}}
            for i in range(n)]


def truth(n, answers=1):
    return [{"question": f"why {i}?", "best_answer": f"best {i}",
             "correct_answers": [f"c{i}-{j}" for j in range(answers)]} for i in range(n)]


@pytest.mark.parametrize(("n0", "n2"), [(6, 2), (4, 4), (2, 7)])
def test_mix_keeps_each_records_own_objective(tmp_path, n0, n2):
    source = {"helpfulness": write(tmp_path, "h.json", alpaca(n0)), "safety": write(tmp_path, "s.jsonl", beaver(3)),
              "truthfulness": write(tmp_path, "t.jsonl", truth(2 * n2))}
    mix = load_records("mix", "train", source=source, split_mode="published")
    assert [r.objective for r in mix] == [0] * n0 + [1] * 3 + [2] * n2
    limited = load_records("mix", "train", source=source, split_mode="published", limit=2)
    assert [r.objective for r in limited] == [0, 0, 1, 1, 2, 2]


def test_alpaca_and_beavertails(tmp_path):
    rows = load_records("helpfulness", "train", source={"helpfulness": write(tmp_path, "h.json", alpaca(3))})
    assert [(r.prompt, r.input, r.answer) for r in rows] == [
        ("do 0", "", "done 0"), ("do 1", "x", "done 1"), ("do 2", "", "done 2")]
    assert len({r.id for r in rows}) == 3
    mixed = [*beaver(2), {**beaver(1, safe=False)[0], "response": "bad"}]
    source = {"safety": write(tmp_path, "s.jsonl", mixed)}
    assert [r.answer for r in load_records("safety", "train", source=source)] == ["reply 0", "reply 1"]
    test = load_records("safety", "test", source=source)
    assert [r.answer for r in test] == ["reply 0", "reply 1", "bad"]
    assert test[0].category == "a"
    assert len(load_records("safety", "test", source=source, unique_prompts=True)) == 2
    unsafe = {"safety": write(tmp_path, "u.jsonl", beaver(2, safe=False))}
    with pytest.raises(UserError, match="no row is left.*is_safe"):
        load_records("safety", "train", source=unsafe)


def test_truthfulqa_halves(tmp_path):
    source = {"truthfulness": write(tmp_path, "t.json", truth(41, answers=3))}
    train, test = (load_records("truthfulness", s, source=source, split_mode="published") for s in ("train", "test"))
    assert (len(train), len(test)) == (20 * 3, 21)
    assert test[0].prompt == "why 20?"
    assert test[0].answer == "best 20"
    train, test = (load_records("truthfulness", s, source=source) for s in ("train", "test"))
    assert len(prompts(train)) + len(prompts(test)) == 41
    assert not prompts(train) & prompts(test)


def test_truthfulqa_csv_with_the_original_header(tmp_path):
    file = tmp_path / "TruthfulQA.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers",
                         "Source"])
        writer.writerow(["A", "Law", "Why,\nthough?", "Because", "Because; So it is; ", "No", "x"])
        writer.writerow(["A", "Law", "Really?", "Yes", "Yes", "No", "x"])
    (one, two), (test,) = (load_records("truthfulness", s, source={"truthfulness": str(file)}, split_mode="published")
                           for s in ("train", "test"))
    assert [one.answer, two.answer] == ["Because", "So it is"]
    assert one.prompt == "Why,\nthough?"
    assert (test.prompt, test.category, test.id) == ("Really?", "Law", "TruthfulQA-4")


def test_pairs_and_prompts_from_files(tmp_path):
    row = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    assert load_pairs("safety", "train", source={"safety": write(tmp_path, "p.jsonl", [row])})[0].objective == 1
    same = write(tmp_path, "same.jsonl", [row, {**row, "chosen": "bad "}])
    with pytest.raises(UserError, match="same.jsonl:2: chosen and rejected are the same"):
        load_pairs("safety", "train", source={"safety": same})
    only = {"safety": write(tmp_path, "o.jsonl", [{"prompt": "p"}])}
    assert load_records("safety", "test", source=only)[0].answer == ""
    with pytest.raises(UserError, match="o.jsonl:1: rows without an answer"):
        load_records("safety", "train", source=only)


def test_training_on_benchmark_questions_is_warned_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(embedded, "held_out_hashes", lambda: {prompt_hash("why 0?")})
    source = {"truthfulness": write(tmp_path, "t.jsonl", truth(4))}
    load_records("truthfulness", "train", source=source, split_mode="published")
    assert "1 training rows are questions of the embedded" in caplog.text


# ---- the hub


def test_hub_errors_say_how_to_give_a_file(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"BeaverTails: .*ConnectionError: no route\).*--data_path"):
        load_records("safety", "train", source="published")
    with pytest.raises(UserError, match="some/name: neither a local file nor"):
        load_records("safety", "train", source={"safety": "some/name"})


def test_hub_calls_use_the_published_names(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or beaver(2))
    assert len(load_records("safety", "train", source="published")) == 2
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or truth(4))
    assert len(load_records("truthfulness", "test", source="published", split_mode="published")) == 2
    assert calls == [(("PKU-Alignment/BeaverTails",), {"split": "30k_train"}),
                     (("truthfulqa/truthful_qa", "generation"), {"split": "validation"})]


@pytest.mark.skipif(published.ALPACA_FILE.exists(), reason="this checkout has the file")
def test_missing_alpaca_small_says_where_it_comes_from():
    with pytest.raises(UserError, match=r"alpaca_small.json: not shipped.*instruction, input, output.*safety-tuned"):
        load_records("helpfulness", "train", source="published")


# ---- hostile files

_GOOD = b'{"prompt": "p", "response": "r", "is_safe": true}\n'
HOSTILE = {
    "empty.jsonl": (b"", "the file is empty"),
    "blank.json": (b" \n\n", "the file is empty"),
    "list.json": (b"[]", "no rows"),
    "line.jsonl": (_GOOD + b"{oops\n", r"line.jsonl:2: not JSON"),
    "field.jsonl": (_GOOD * 2 + b'{"prompt": "q", "is_safe": true}', r":3: field 'response' is missing; needed"),
    "type.jsonl": (_GOOD + b'{"prompt": 7, "response": "r", "is_safe": true}', r":2: field 'prompt' is a int and"),
    "flag.jsonl": (_GOOD + b'{"prompt": "q", "response": "r", "is_safe": "x"}', r":2: .*needs true or false"),
    "blankprompt.jsonl": (_GOOD + b'{"prompt": " ", "response": "r", "is_safe": true}', r":2: .*not blank"),
    "long.jsonl": (_GOOD + b'{"prompt": "' + b"a" * 1_000_001 + b'"}', r"long.jsonl:2: a row of 10000\d\d char"),
    "latin.jsonl": (_GOOD + '{"prompt": "é"}'.encode("latin-1"), r"latin.jsonl:2: not UTF-8 \(byte 0xe9\)"),
    "scalar.jsonl": (_GOOD + b"[1]\n", r":2: a row must be an object"),
    "deep.jsonl": (_GOOD + b"[" * 100_000, r":2: not JSON"),
    "comma.json": (b'[\n{"prompt": "p", "response": "r", "is_safe": true}\n{"prompt": "q"}]', r"json:3: .*no comma"),
    "open.json": (b'[\n{"prompt": "p", "response": "r", "is_safe": true},\n', r"open.json:3: not JSON"),
    "after.json": (b'[{"prompt": "p", "response": "r", "is_safe": true}]\n]', r"something follows"),
    "shape.jsonl": (b'{"a": 1}', r"shape.jsonl:1: fields a are no known shape; allowed: .*BeaverTails"),
    "ragged.csv": (b"prompt,response,is_safe\np,r,true\nq,r\n", r"ragged.csv:3: fewer fields"),
    "quote.csv": (b'prompt,response,is_safe\np,r,true\n"q,r,true\n', r"quote.csv:3: not CSV"),
    "model.pkl": (b"\x80\x04.", r"unknown type '.pkl'; allowed: .json, .jsonl, .csv"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file(tmp_path, name):
    content, said = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_records("safety", "train", source={"safety": str(tmp_path / name)})


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="gone.json: no such file; give"):
        load_records("safety", "train", source={"safety": str(tmp_path / "gone.json")})
    (tmp_path / "tickets.json").write_text("[]")
    with pytest.raises(UserError, match=r"tikets.json: no such file \(did you mean tickets.json\?\); give"):
        load_records("safety", "train", source={"safety": str(tmp_path / "tikets.json")})
    with pytest.raises(UserError, match="is a folder"):
        load_records("safety", "train", source={"safety": str(tmp_path)})


def test_all_problems_are_told_up_to_ten(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(_GOOD + b'{oops\n{"prompt": 1, "is_safe": true}\n')
    with pytest.raises(UserError) as error:
        load_records("safety", "train", source={"safety": str(file)})
    assert [p.split(": ")[0].rpartition(":")[2] for p in error.value.problems] == ["2", "3", "3"]
    file.write_bytes(_GOOD + b"{oops\n" * 50)
    with pytest.raises(UserError, match="stopped after 10") as error:
        load_records("safety", "train", source={"safety": str(file)})
    assert len(error.value.problems) == 11


def test_duplicates_and_blank_answers_are_counted_and_dropped(tmp_path, caplog):
    rows = [*alpaca(2), alpaca(2)[0], alpaca(2)[1], {"instruction": "empty", "output": " "}]
    found = load_records("helpfulness", "train", source={"helpfulness": write(tmp_path, "d.jsonl", rows)})
    assert len(found) == 2
    assert "2 rows repeat an earlier prompt and answer and were dropped, the first at" in caplog.text
    assert "d.jsonl:3" in caplog.text
    assert "1 rows without an answer dropped" in caplog.text


def test_odd_but_valid_files(tmp_path):
    bom = tmp_path / "bom.json"
    bom.write_bytes(b"\xef\xbb\xbf" + json.dumps(alpaca(2)).encode())
    assert len(load_records("helpfulness", "train", source={"helpfulness": str(bom)})) == 2
    lines = tmp_path / "lines.json"
    lines.write_text('{"instruction": "a\u2028b", "output": "c"}\r\n\r\n{"instruction": "d", "output": "e"}\r\n')
    found = load_records("helpfulness", "train", source={"helpfulness": str(lines)})
    assert [r.prompt for r in found] == ["a\u2028b", "d"]
    big = tmp_path / "big.json"  # one line of more than 1 MB, but no row of it is long
    big.write_text(json.dumps([{"instruction": f"{i} " + "w" * 900, "output": "o"} for i in range(1200)]))
    assert len(load_records("helpfulness", "train", source={"helpfulness": str(big)})) == 1200
