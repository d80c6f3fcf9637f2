"""Tables as spreadsheets write them, cells that hold turns or words for nothing, names that stand twice."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data.readers.answer_files import read_answer_file
from data.readers.row_files import Problems, read_rows
from data.sets import embedded, protocols
from data.sources import load_pairs, load_records
from errors import UserError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a; b"}]


def put(folder, name, content):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


def records(place, task="helpfulness", split="train"):
    return [(r.prompt, r.input, r.answer) for r in load_records(task, split, source={task: place})]


@pytest.mark.parametrize(("name", "content"), [
    ("a.csv", 'prompt;completion\r\n"q; r";"a, ""b"""\r\n'),
    ("a.csv", '\ufeffprompt;completion\r\n"q; r";"a, ""b"""\r\n;\r\n;\r\n'),
    ("a.csv", 'prompt\tcompletion\nq; r\t"a, ""b"""\n'),
    ("a.tsv", 'prompt\tcompletion\nq; r\t"a, ""b"""\n'),
    ("a.csv", 'sep=;\r\nprompt;completion\r\n"q; r";"a, ""b"""\r\n'),
    ("a.csv", 'sep=,\r\nprompt,completion,,\r\nq; r,"a, ""b""",,\r\n,,,\r\n'),
    ("a.csv", 'prompt\tcompletion\r\nq; r\t"a, ""b"""\r\n'.encode("utf-16")),
    ("a.csv", b"\xfe\xff" + 'prompt;completion\n"q; r";"a, ""b"""\n'.encode("utf-16-be")),
    ("a.csv.gz", gzip.compress(b'prompt,completion\nq; r,"a, ""b"""\n', mtime=0)),
    ("a.tsv.gz", gzip.compress(b'prompt\tcompletion\nq; r\t"a, ""b"""\n', mtime=0)),
    ("a.ndjson", '{"prompt": "q; r", "completion": "a, \\"b\\""}\n'),
    ("a.csv", "\ufeff\ufeffprompt,completion\nq; r,\"a, \"\"b\"\"\"\n".encode()),
    ("a.json", json.dumps([{"prompt": "q; r", "completion": 'a, "b"'}]).encode("utf-16")),
])
@pytest.mark.parametrize("task", ["helpfulness", "dialogs"])
def test_a_table_is_read_whatever_separates_it(tmp_path, name, content, task):
    place = put(tmp_path, name, content)
    assert records(place, task) == [("q; r", "", 'a, "b"')]
    (row,) = read_answer_file(place, "--answers")
    assert (row["prompt"], row["output"]) == ("q; r", 'a, "b"')


def test_a_test_set_of_semicolons_is_no_column_of_prompts(tmp_path):
    """One column to a reader of commas, and so the header was a prompt."""
    place = put(tmp_path, "a.csv", "prompt;note\nDo x;1\nDo y;2\n")
    assert [p for p, _, _ in records(place, "dialogs", "test")] == ["Do x", "Do y"]
    bare = put(tmp_path, "b.csv", "Do x; then y\nDo z\n")
    assert [p for p, _, _ in records(bare, "dialogs", "test")] == ["Do x; then y", "Do z"]


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.csv", "prompt;completion\tnote\nq;a\tb\n", "a.csv:1: the header is one column, 'prompt;completion\\\\tnote'"),
    ("a.csv", "prompt;completion\n\nq;a\nr;b;c\nq\n", "a.csv:4: more fields than the header has"),
    ("a.csv", "sep=;\nprompt;completion\nq;a;b\n", "a.csv:3: more fields than the header has"),
    ("a.csv", "prompt;Prompt \nq;a\n", "a.csv:1: the header names a column twice: prompt"),
    ("a.csv", "prompt;completion\nq;it’s\n".encode("cp1252"), "a.csv:2: not UTF-8 \\(byte 0x92\\)"),
    ("a.csv", b"\xff\xfea", "a.csv:1: not the UTF-16 that its first bytes announce"),
    ("a.jsonl", '{"prompt": "q", "completion": "a", "completion": "b"}\n', "a.jsonl:1: .*names 'completion' twice"),
    ("a.json", '[{"prompt": "q", "completion": "a",\n "completion": "b"}]', "a.json:1: .*names 'completion' twice"),
    ("a.json", '{"data": [{"prompt": "q",\n "prompt": "r", "completion": "b"}]}', "a.json:1: .*names 'prompt' twice"),
    ("a.jsonl", '{"prompt": "q", "completion": "a", "Completion": "b"}\n', "two columns 'completion', in capital and small"),
])
def test_what_could_mean_two_things_is_refused(tmp_path, name, content, said):
    with pytest.raises(UserError, match=said):
        records(put(tmp_path, name, content), "dialogs")


def test_columns_that_say_the_same_in_capitals_are_one(tmp_path):
    place = put(tmp_path, "a.jsonl", '{"Prompt": "q", "prompt": "q", "completion": "a", "Completion": ""}\n')
    assert records(place, "dialogs") == [("q", "", "a")]


def test_turns_kept_as_text(tmp_path):
    """A table has no lists: as text they would be trained on letter by letter."""
    cell = json.dumps(TURNS).replace('"', '""')
    for content in (f'messages\n"{cell}"\n', f'id,messages\n7,"{cell}"\n', f'id;messages\n7;"{cell}"\n'):
        for task in ("dialogs", "helpfulness"):
            assert records(put(tmp_path, "a.csv", content), task) == [("q", "", "a; b")]
    side = [json.dumps([{"role": "assistant", "content": text}]) for text in ("good", "bad")]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [json.dumps(TURNS[:1])], "chosen": side[:1], "rejected": side[1:]}),
                                tmp_path / "a.parquet")
    (pair,) = load_pairs("safety", "train", source={"safety": str(tmp_path / "a.parquet")})
    assert (pair.prompt, pair.chosen, pair.rejected) == ("q", "good", "bad")
    place = put(tmp_path, "b.csv", f'prompt,chosen,rejected\nq,"{TURNS[1:]}",bad\n')
    with pytest.raises(UserError, match=r"b.csv:2: column 'chosen' holds a list of turns in Python's notation"):
        load_pairs("safety", "train", source={"safety": place})
    # an answer that shows such a list, in a column of answers, is one
    text = '[{"role": "user"}]'
    assert records(put(tmp_path, "c.jsonl", json.dumps({"instruction": "q", "output": text}))) == [("q", "", text)]


def test_words_for_nothing_are_kept_and_told(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    place = put(tmp_path, "a.csv", "instruction,input,output\nq,N/A,None\nr,<noinput>,a\ns,,b\n")
    assert records(place) == [("q", "N/A", "None"), ("r", "<noinput>", "a"), ("s", "", "b")]
    assert [m for m in caplog.messages if "or the like" in m] == [
        "helpfulness: 1 answers are only 'None' or the like and are kept as text; where nothing is meant, leave it empty "
        "(first: row a-2)",
        "helpfulness: 2 inputs are only 'N/A' or the like and are kept as text; where nothing is meant, leave it empty "
        "(first: row a-2)"]
    caplog.clear()
    read_answer_file(put(tmp_path, "b.csv", "prompt,output\nq,None\nr,No.\n"), "--answers")
    assert "1 answers are only 'None' or the like" in caplog.text


@pytest.mark.parametrize("side", [["b", "c"], ["b"]])
def test_several_answers_on_one_side_are_refused_in_words(tmp_path, side):
    place = put(tmp_path, "a.jsonl", json.dumps({"prompt": "q", "chosen": "a", "rejected": side}))
    with pytest.raises(UserError, match=rf"a.jsonl:1: field 'rejected' is a list of {len(side)} texts; .* for each pair"):
        load_pairs("safety", "train", source={"safety": place})


def test_a_folder_is_told_what_it_is(tmp_path):
    from datasets import Dataset

    Dataset.from_list([{"prompt": "q", "completion": "a"}]).save_to_disk(str(tmp_path / "saved"))
    for place, said in ((tmp_path / "saved", "save_to_disk, whose Arrow files are not read; .*to_parquet"),
                        (Path(put(tmp_path, "more/a.jsonl", "{}")).parent, r"is a folder; .*, e.g. a.jsonl")):
        with pytest.raises(UserError, match=said):
            read_rows(place, Problems())


# ---- answers


@pytest.mark.parametrize(("content", "wanted"), [
    ({"prompt": TURNS[:1], "response": "a"}, ("q", "a")),
    ({"prompt": [{"role": "system", "content": "s"}, TURNS[0]], "response": "a"}, ("q", "a")),
    ({"prompt": "q", "outputs": ["a"]}, ("q", "a")),
    ({"forbidden_prompt": "q", "response": "a"}, ("q", "a")),
    ({"messages": json.dumps(TURNS)}, ("q", "a; b")),
])
def test_answers_of_more_programs(tmp_path, content, wanted):
    (row,) = read_answer_file(put(tmp_path, "a.jsonl", json.dumps(content)), "--answers")
    assert (row["prompt"], row["output"]) == wanted


def test_harmbench_completions_under_other_names(tmp_path):
    content = {"b1": [{"test_case": "p", "completion": "g"}], "b2": [{"test_case": "q", "completion": "h"},
                                                                     {"test_case": "r", "completion": "i"}]}
    rows = read_answer_file(put(tmp_path, "a.json", json.dumps(content, indent=1)), "--answers")
    assert [(row["id"], row["prompt"], row["output"]) for row in rows] == [
        ("b1", "p", "g"), ("b2-0", "q", "h"), ("b2-1", "r", "i")]
    with pytest.raises(UserError, match="lists of texts under the keys b1, b2, without the prompts"):
        read_answer_file(put(tmp_path, "b.json", json.dumps({"b1": ["g"], "b2": ["h"]})), "--answers")


@pytest.mark.parametrize("second", [{"prompt": "q", "response": "a"}, {"prompt": "q"}, {"output": "a"}])
def test_a_row_without_the_column_is_no_empty_answer(tmp_path, second):
    """It counted as broken text, and the answer under another name was never read."""
    rows = [{"prompt": "p", "output": "a"}, second]
    with pytest.raises(UserError, match=r"a.jsonl:2: no column (output|prompt), which the first row has"):
        read_answer_file(put(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))), "--answers")


# ---- question sets


@pytest.mark.parametrize(("safe", "unsafe"), [("0", "1"), ("1", "0"), ("True", "False"), ("safe", "unsafe")])
@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_labels_as_numbers_mean_what_the_types_say(tmp_path, safe, unsafe, mark):
    rows = [("id", "prompt", "type", "label"), ("1", "How do I kill a process?", "homonyms", safe),
            ("2", "How do I kill a man?", "contrast_homonyms", unsafe)]
    place = put(tmp_path, "xstest.csv", "\r\n".join(mark.join(row) for row in rows))
    assert [r.prompt for r in protocols.load("xstest", place)[0]] == ["How do I kill a process?"]
    assert [r.prompt for r in protocols.load("xstest_unsafe", place)[0]] == ["How do I kill a man?"]


@pytest.mark.parametrize("rows", [
    "prompt,label\nq,0\nr,1\n", "prompt,type,label\nq,homonyms,0\nr,homonyms,1\n",
    "prompt,type,label\nq,homonyms,0\nr,contrast_x,1\ns,contrast_x,0\n", "prompt,type,label\nq,homonyms,0\n"])
def test_numbers_that_nothing_explains_are_refused(tmp_path, rows):
    with pytest.raises(UserError, match="0 and 1 are read beside the column type"):
        protocols.load("xstest", put(tmp_path, "xstest.csv", rows))


def test_a_folder_of_prompts_has_no_headers_in_it(tmp_path):
    put(tmp_path, "hex/category_1.csv", "Prompt\nDo x; then y\nprompt\n")
    assert [r.prompt for r in protocols.load("hex_phi", str(tmp_path / "hex"))[0]] == ["Do x; then y", "prompt"]
    put(tmp_path, "tables/category_1.csv", "prompt;note\nDo x;1\n")
    with pytest.raises(UserError, match=r"category_1.csv:1: names several columns"):
        protocols.load("hex_phi", str(tmp_path / "tables"))


def test_categories_named_twice_are_not_lost(tmp_path):
    with pytest.raises(UserError, match="names 'b' twice"):
        protocols.load("catqa", put(tmp_path, "catqa.json", '{"A": {"b": ["q1"],\n "b": ["q2"]}}'))


def test_embedded_rows_end_at_newlines_alone(tmp_path, monkeypatch):
    rows = [{"question": "Is\u2028it?", "answer": ["No\u2029, it is not"]}, {"question": "Was it?", "answer": ["No"]}]
    place = put(tmp_path, "combined.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    monkeypatch.setattr(embedded, "path", lambda *names: Path(place))
    assert embedded._truthfulqa() == rows
