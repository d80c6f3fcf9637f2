"""Answers in somebody's CSV: read under many column names, missing cells handled, every fault named with its line."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

import manifest
from data.readers import answer_files
from data.readers.answer_files import read_answer_file
from errors import UserError
from evaluator import evaluate_helpfulness, evaluate_safety, evaluate_truth_and_info
from evaluator.judges import fitted
from evaluator.judges.protocol import Verdict
from evaluator.judges.table import JUDGES
from evaluator.scoring import judging
from evaluator.statistics.comparison import measured

REFUSED = "I’m sorry, but I can’t help with that."


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder and a harm judge that needs no embedded data: long answers are harmful."""
    judge = fitted.HarmJudge(lambda answers: [0.9 if len(a) > 1000 else 0.1 for a in answers], {"auc": 0.7})
    monkeypatch.setattr(fitted, "harm_judge", lambda seed: judge)
    monkeypatch.setattr(fitted, "version", lambda seed: "made up")
    monkeypatch.setattr("data.sources.load_refusal_labels", lambda: [("q", REFUSED, 1), ("q", "Sure.", 0)])
    return tmp_path


def put(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(folder, name, content):
    return read_answer_file(put(folder, name, content), "--answers")


def score(place, *flags, module=evaluate_safety):
    module.main([*flags, "--output_dir", str(place / "results")])


def fails(place, capsys, *flags, module=evaluate_safety):
    with pytest.raises(SystemExit) as stopped:
        score(place, *flags, module=module)
    assert stopped.value.code == 2
    assert not (place / "results" / "scores").exists()
    return capsys.readouterr().err


def values(place, name):
    found = json.loads((place / "results" / "scores" / name / "evaluate_safety.json").read_text())
    return {key: item["value"] for key, item in found["scores"].items()}


@pytest.mark.parametrize(("prompt", "answer"), [
    ("prompts", "outputs"), ("prompt", "answer"), ("question", "response"), ("Instruction", "Completion"),
    ("goal", "answers"), (" Prompts ", "OUTPUT"), ("que", "ans")])
def test_column_names(tmp_path, prompt, answer):
    (row,) = read(tmp_path, "a.csv", f"{prompt},{answer}\nq?,a.\n")
    assert (row["prompt"], row["output"], row["id"], row["category"], row["reference"]) == ("q?", "a.", "0", "", "")
    (row,) = read(tmp_path, "a.jsonl", json.dumps({prompt.strip(): "q?", answer: "a."}))
    assert (row["prompt"], row["output"]) == ("q?", "a.")


def test_every_column_name_is_read(tmp_path):
    for prompt in answer_files.COLUMNS["prompt"]:
        for output in answer_files.COLUMNS["output"]:
            assert read(tmp_path, "a.csv", f"{prompt},{output}\nq?,a\n")[0]["output"] == "a"


def test_other_columns_travel_along(tmp_path):
    rows = read(tmp_path, "a.csv", "id,category,prompts,outputs,reference,score\nx7,theft,q?,a,best,9\n")
    assert rows == [{"id": "x7", "category": "theft", "input": "", "reference": "best", "finish": "", "prompt": "q?",
                     "output": "a"}]


def test_the_published_csv_and_our_jsonl(tmp_path):
    assert [r["id"] for r in read(tmp_path, "a.csv", ",prompts,outputs\n5,p,o\n6,p,o\n")] == ["5", "6"]
    row = {"index": 0, "id": "s-1", "prompt": "p", "input": "i", "reference": "r", "category": "c", "rendered": "<p>",
           "output": "o", "finish": "stop"}
    assert read(tmp_path, "a.jsonl", json.dumps(row))[0]["id"] == "s-1"


def test_hard_but_sound_cells(tmp_path):
    long = "word " * 20_000
    rows = read(tmp_path, "a.csv", f'prompts,outputs\n"a, b\nc","he said ""no""\n\nend"\nq?,{long}\nQ,"你好, 世界"\n')
    assert [r["output"] for r in rows] == ['he said "no"\n\nend', long, "你好, 世界"]
    assert rows[0]["prompt"] == "a, b\nc"


def test_missing_cells_are_empty_answers(tmp_path, caplog):
    rows = read(tmp_path, "a.csv", "prompts,outputs\nq?,\nq?,NaN\nq?,nan\nq?,Nan is bread.\nq?,None\n")
    assert [r["output"] for r in rows] == ["", "", "", "Nan is bread.", "None"]
    assert "3 of 5 answers are empty" in caplog.text
    rows = read(tmp_path, "a.jsonl", '{"prompt": "q?", "output": null}\n{"prompt": "q?", "output": NaN}\n')
    assert [r["output"] for r in rows] == ["", ""]


def test_bom_windows_lines_and_blank_lines(tmp_path):
    rows = read(tmp_path, "a.csv", b"\xef\xbb\xbfprompts,outputs\r\nq1,a1\r\n\r\nq2,a2\r\n")
    assert [(r["prompt"], r["output"]) for r in rows] == [("q1", "a1"), ("q2", "a2")]


def test_repeated_ids_are_replaced(tmp_path, caplog):
    assert [r["id"] for r in read(tmp_path, "a.csv", "id,prompts,outputs\n1,a,b\n1,c,d\n")] == ["0", "1"]
    assert "ids repeat" in caplog.text


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.csv", "prompts,text\nq?,a\n", "no column of outputs; it has prompts, text; call it one of: outputs, output"),
    ("a.csv", "text,outputs\nq?,a\n", "no column of prompts; it has text, outputs"),
    ("a.csv", "prompts,outputs,outputs\nq?,a,b\n", "a.csv:1: the header names a column twice: outputs"),
    ("a.csv", "prompts,outputs,Outputs \nq?,a,b\n", "a column twice: outputs"),
    ("a.csv", "question,answer,response\nq?,a,b\n", "answer and response may both hold the outputs"),
    ("a.csv", "prompts;outputs\tnote\nq?;a\n", "with semicolons and tabs in it"),
    ("a.csv", "", "the file is empty"),
    ("a.csv", "prompts,outputs\n", "the file has no rows"),
    ("a.csv", b"prompts,outputs\nq?,caf\xe9\n", r"a.csv:2: not UTF-8 \(byte 0xe9\)"),
    ("a.csv", "prompts,outputs\nq?,a\nq?,a,b\nq?\n", "a.csv:3: more fields than the header"),
    ("a.csv", "prompts,outputs\nq?,a\nq?\n", "a.csv:3: fewer fields than the header"),
    ("a.csv", 'prompts,outputs\nq?,"a\nb\n', "a.csv:2: not CSV"),
    ("a.csv", "prompts,outputs\nq?,a\n ,a\n", r"a.csv:3: the prompt \(column prompts\) is empty"),
    ("a.csv", "prompts,outputs\nnan,a\n", "a.csv:2: the prompt"),
    ("a.csv", "prompts,outputs\nq?," + "x" * 1_000_001 + "\n", "a row of 1000004 characters"),
    ("a.jsonl", '{"prompt": "q?", "output": 5}\n', "a.jsonl:1: column output is a int and needs text"),
    ("a.jsonl", '{"prompt": ["q?"], "output": "a"}\n', "column prompt is a list and needs text"),
    ("a.jsonl", '{"prompt": "q?", "output": "a"}\n{"prompt": "q?"\n', "a.jsonl:2: not JSON"),
    ("a.jsonl", '{"prompt": "q?", "output": "a"}\n{"prompt": "q?", "output": "cut \\ud83d"}\n',
     r"a.jsonl:2: column output holds half of a surrogate pair \(\\ud83d\)"),
    ("a.json", '[{"question": "\\udc00?", "answer": "a"}]', "a.json:1: column question holds half"),
    ("a.jsonl", '{"prompt": "q?", "output": "a", "id": "\\ud800"}\n', "a.jsonl:1: column id holds half"),
    ("a.csv", b"prompts,outputs\nq?,\xed\xa0\x80\n", r"a.csv:2: not UTF-8 \(byte 0xed\)"),
    ("a.xlsx", "x", "unknown type '.xlsx'"),
])
def test_faults_are_named_with_their_line(tmp_path, name, content, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path, name, content)


def test_a_whole_surrogate_pair_is_one_character(tmp_path):
    assert read(tmp_path, "a.jsonl", '{"prompt": "q?", "output": "\\ud83d\\ude00"}\n')[0]["output"] == "\U0001f600"


def test_all_faults_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        read(tmp_path, "a.csv", "prompts,outputs\nq?\n,a\nq?,a,b\n")
    assert [problem.split(": ")[0].rpartition(":")[2] for problem in caught.value.problems] == ["2", "4", "3"]


def test_one_command_scores_a_csv(place, caplog):
    caplog.set_level("INFO")
    long = "word and another thing " * 50
    harmful = put(place, "mine.csv", f'prompts,outputs\nq1,"{REFUSED}"\nq2,\nq3,"Sure,\nhere."\nq4,{long}\n')
    harmless = put(place, "edgy.jsonl", '{"question": "kill a process", "response": "Use kill."}\n')
    score(place, "--answers", harmful, "--overrefusal_answers", harmless)
    found = values(place, "mine")
    assert found["refusal"] == found["safe_refusal"] == 0.25
    assert found["incoherent"] == 0.5  # the empty one and the loop
    assert found["harm_rate"] == 0.25
    assert found["published_asr"] == 1  # the curly quote escapes the published list
    assert found["overrefusal"] == 0
    assert found["balance"] == 0.25
    (row,) = manifest.registry(place / "results")
    assert (row["run"], row["sub"]) == ("mine", "mine")
    score(place, "--answers", harmful, "--overrefusal_answers", harmless)
    assert "already scored" in caplog.text
    assert len(manifest.registry(place / "results")) == 1


def test_the_report_finds_scores_of_a_file(place):
    score(place, "--answers", put(place, "a.csv", f'prompts,outputs\nq1,"{REFUSED}"\n'), "--name", "theirs")
    found = measured(place / "results", "theirs")
    assert found.scores["refusal"]["value"] == 1
    assert found.folder == place / "results" / "scores" / "theirs"
    assert found.rows["safety", "0"]["safe_refusal"] == 1


def test_without_harmless_answers_says_what_to_add(place):
    score(place, "--answers", put(place, "a.csv", "prompts,outputs\nq,a\n"), "--name", "n")
    found = json.loads((place / "results" / "scores" / "n" / "evaluate_safety.json").read_text())
    assert "overrefusal" not in found["scores"]
    assert "--overrefusal_answers" in found["overrefusal"]


@pytest.mark.parametrize(("flags", "said"), [
    (("--name", "x"), "names the scores of --answers"),
    (("--answers", "a.csv", "--task_name", "raw"), "drop one of the two"),
    (("--answers", "a.csv", "--name", "cross_x"), "belongs to answers of inference.py"),
    (("--answers", "raw.csv"), "belongs to answers of inference.py"),
    (("--answers", "my answers.csv"), "--name (from --answers) my answers: letters, digits"),
    (("--answers", "a.csv", "--hhh"), "--hhh: scores a model"),
    (("--task_name", "raw", "--overrefusal_answers", "b.csv"), "goes with --answers"),
    (("--answers", "nothing.csv"), "nothing.csv: no such file"),
    ((), "--task_name: name the folder of answers"),
    (("--task_name", "raw", "--harmful_task", "catqq"), "did you mean catqa?"),
    (("--task_name", "raw", "--harmful_task", "catqa+none"), "no attack 'none'"),
    (("--task_name", "raw", "--harmful_task", "xstest"), "are scored for overrefusal, not for safety"),
    (("--task_name", "raw", "--overrefusal_task", "catqa"), "are scored for safety, not for overrefusal"),
])
def test_bad_flags(place, capsys, flags, said):
    assert said in fails(place, capsys, *flags)


@pytest.mark.parametrize("module", [evaluate_helpfulness, evaluate_truth_and_info])
def test_other_commands_read_answers_with_judges_only(place, capsys, module):
    file = put(place, "a.csv", "prompts,outputs\nq,a\n")
    assert "add --judges" in fails(place, capsys, "--answers", file, module=module)


def test_judges_score_a_file_without_a_model(place, monkeypatch):
    """A truth judge that believes answers with "yes", an info judge that likes long ones."""
    def judge(name, yes):
        return judging.Named(name, JUDGES[name], SimpleNamespace(name=name, version="1", judge=lambda items: (
            (i, Verdict(yes(item.answer), float(yes(item.answer)))) for i, item in enumerate(items))))

    made = [judge("truth", lambda text: "yes" in text), judge("info", lambda text: len(text) > 5)]
    monkeypatch.setattr(judging, "make_judges", lambda args: made)
    file = put(place, "a.csv", "question,answer\nq1,yes\nq2,yes indeed\nq3,no\nq4,not at all\n")
    score(place, "--answers", file, "--name", "t", module=evaluate_truth_and_info)
    found = json.loads((place / "results" / "scores" / "t" / "evaluate_truth_and_info.json").read_text())["scores"]
    assert found["truth.truthfulness"]["value"] == found["info.truthfulness"]["value"] == 0.5
    assert found["truth_x_info.truthfulness.joint"]["value"] == 0.25


def test_preferences_need_a_reference(place, monkeypatch, capsys):
    monkeypatch.setattr(judging, "make_judges", lambda args: [judging.Named("pairwise", JUDGES["pairwise"], None)])
    file = put(place, "a.csv", "prompts,outputs\nq,a\n")
    assert "no row has a reference" in fails(place, capsys, "--answers", file, module=evaluate_helpfulness)


def test_answers_to_a_protocol_are_named_after_it(place, monkeypatch, capsys):
    judge = SimpleNamespace(name="truth", version="1", judge=lambda items: ((i, Verdict(True)) for i, _ in enumerate(items)))
    monkeypatch.setattr(judging, "make_judges", lambda args: [judging.Named("truth", JUDGES["truth"], judge)])
    file = put(place, "a.csv", "question,answer\nq1,yes\n")
    assert "these are: truthfulness, truthfulqa_published" in fails(
        place, capsys, "--answers", file, "--answers_task", "catqa", module=evaluate_truth_and_info)
    assert "did you mean truthfulqa_published?" in fails(
        place, capsys, "--answers", file, "--answers_task", "truthfulqa_publish", module=evaluate_truth_and_info)
    score(place, "--answers", file, "--name", "t", "--answers_task", "truthfulqa_published", module=evaluate_truth_and_info)
    path = place / "results" / "scores" / "t" / "evaluate_truth_and_info.truthfulqa_published.json"
    (found,) = json.loads(path.read_text())["scores"].values()
    assert (found["name"], found["value"]) == ("truth.truthfulqa_published", 1)
    assert found["definition"].startswith("share of answers to TruthfulQA questions (truthfulqa_published) that")
