"""Training files in the shapes that people have: each is read as it is meant, down to the token ids, or refused by name."""

from __future__ import annotations

import gzip
import json
import logging

import pytest
from pico import pico_tokenizer

from data.encode import IGNORE, encode, encode_pairs, prompt_ids, render
from data.prompts import template
from data.records import Pair, Record
from data.sources import load_pairs, load_records
from errors import UserError


def U(text):
    return {"role": "user", "content": text}


def A(text):
    return {"role": "assistant", "content": text}


def H(text):
    return {"from": "human", "value": text}


def G(text):
    return {"from": "gpt", "value": text}


S = {"role": "system", "content": "You are a pirate."}
TWO = (("q1", "a1"),)
NAN = float("nan")


def write(folder, content, name="rows.json"):
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(file)


def records(folder, content, task="helpfulness", split="train", name="rows.json"):
    return load_records(task, split, source={task: write(folder, content, name)})


def pairs(folder, content, task="safety", name="rows.json"):
    return load_pairs(task, "train", source={task: write(folder, content, name)})


def said(record):
    return record.system, record.history, record.prompt, record.input, record.answer


#: row -> (system, history, prompt, input, answer), by whatever task it is read
ANSWERS = {
    "messages": ({"messages": [U("q"), A("a")]}, ("", (), "q", "", "a")),
    "system turn": ({"messages": [S, U("q"), A("a")]}, ("You are a pirate.", (), "q", "", "a")),
    "sharegpt": ({"conversations": [{"from": "system", "value": "s"}, H("q"), G("a")], "id": "x"}, ("s", (), "q", "", "a")),
    "system beside": ({"conversations": [H("q"), G("a")], "system": "s", "tools": ""}, ("s", (), "q", "", "a")),
    "same system twice": ({"conversations": [{"from": "system", "value": "s"}, H("q"), G("a")], "system": "s "},
                          ("s", (), "q", "", "a")),
    "several turns": ({"conversations": [H("q1"), G("a1"), H("q"), G("a")]}, ("", TWO, "q", "", "a")),
    "role model": ({"messages": [U("q"), {"role": "model", "content": "a"}]}, ("", (), "q", "", "a")),
    "content parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"},
                                                                  {"type": "text", "text": "?"}]}, A("a")]},
                      ("", (), "q?", "", "a")),
    "neutral keys": ({"messages": [U("q"), A("a") | {"tool_calls": [], "weight": 1, "train": True}], "images": [],
                      "weight": 1.0}, ("", (), "q", "", "a")),
    "prompt, completion": ({"prompt": "q", "completion": "a"}, ("", (), "q", "", "a")),
    "prompt, completion of turns": ({"prompt": [S, U("q")], "completion": [A("a")]},
                                    ("You are a pirate.", (), "q", "", "a")),
    "swift": ({"query": "q", "response": "a", "system": "s", "history": [["q1", "a1"]]}, ("s", TWO, "q", "", "a")),
    "OpenOrca": ({"id": "1", "system_prompt": "s", "question": "q", "response": "a"}, ("s", (), "q", "", "a")),
    "Dolly": ({"instruction": "q", "context": "c", "response": "a", "category": "x"}, ("", (), "q", "c", "a")),
    "alpaca, system and history": ({"instruction": "q", "input": "i", "output": "a", "system": "s",
                                    "history": [["q1", "a1"]]}, ("s", TWO, "q", "i", "a")),
    "alpaca, nothing in them": ({"instruction": "q", "input": NAN, "output": "a", "system": NAN, "history": []},
                                ("", (), "q", "", "a")),
    "number": ({"instruction": "1+1", "input": None, "output": 2}, ("", (), "1+1", "", "2")),
    "number of GSM8K": ({"question": "1+1", "answer": -12}, ("", (), "1+1", "", "-12")),
}


@pytest.mark.parametrize("task", ["helpfulness", "dialogs", "english"])
@pytest.mark.parametrize("name", ANSWERS)
def test_answers_are_read_as_they_are_meant(tmp_path, name, task):
    row, wanted = ANSWERS[name]
    assert [said(record) for record in records(tmp_path, [row], task)] == [wanted]


#: row -> what the error says beside file and line
NO_ANSWERS = {
    "tool turns": ({"conversations": [H("q"), {"from": "function_call", "value": "{}"},
                                      {"from": "observation", "value": "1"}, G("a")]},
                   "turn 2 has the role 'function_call': tool use is not trained on"),
    "tool role": ({"messages": [U("q"), A("a"), {"role": "tool", "content": "1"}, A("b")]}, "turn 3 has the role 'tool'"),
    "tool calls": ({"messages": [U("q"), A("a") | {"tool_calls": [{"id": 1}]}]}, "turn 2 has 'tool_calls'"),
    "weight of a turn": ({"messages": [U("q"), A("a") | {"weight": 0}]}, "turn 2 has 'weight'"),
    "tools": ({"messages": [U("q"), A("a")], "tools": [{"name": "f"}]}, "column 'tools' holds tools"),
    "images": ({"messages": [U("<image>q"), A("a")], "images": ["x.png"]}, "column 'images' holds images"),
    "picture part": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, A("a")]},
                     "turn 1 has a content part of type 'image_url'"),
    "weights": ({"instruction": "q", "output": "a", "weight": 0.5}, "column 'weight' holds weights of rows"),
    "kto": ({"prompt": "q", "completion": "a", "label": True}, "column 'label' holds a label of one answer .KTO."),
    "unsafe": ({"prompt": "q", "completion": "a", "is_safe": False}, "column 'is_safe' holds whether an answer is safe"),
    "pairs": ({"instruction": "q", "output": "a", "rejected": "b"}, "column 'rejected' .*add --method dpo"),
    "two systems": ({"messages": [S, U("q"), A("a")], "system": "other"}, "a system turn and another text"),
    "system that is no text": ({"instruction": "q", "output": "a", "system": {"a": 1}}, "field 'system' needs text"),
    "history beside turns": ({"messages": [U("q"), A("a")], "history": [["q1", "a1"]]}, "column 'history' holds earlier"),
    "history that is none": ({"instruction": "q", "output": "a", "history": ["q1", "a1"]}, "'history' needs a list of"),
    "turns and answer": ({"messages": [U("q"), A("a")], "prompt": "q", "response": "b"}, "has turns in messages, and is"),
    "both columns of turns": ({"messages": [U("q"), A("a")], "conversations": [H("q"), G("a")]},
                              "turns in messages and conversations"),
    "user last": ({"messages": [U("q"), A("a"), U("q2")]}, "its turns are user, assistant, user; needed"),
    "assistant first": ({"messages": [A("hello"), U("q"), A("a")]}, "its turns are assistant, user, assistant"),
    "blank": ({"messages": [U("q"), A(" ")]}, "content that is text and not blank"),
    "NaN turn": ({"messages": [U("q"), A(NAN)]}, "content that is text and not blank"),
    "NaN answer": ({"instruction": "q", "output": NAN}, "needs text"),
    "no answer": ({"instruction": "q", "output": None}, "needs text"),
    "float answer": ({"instruction": "q", "output": 2.0}, "2.0 can be written in several ways"),
    "true answer": ({"question": "q", "answer": True}, "needs text"),
    "text of NaN": ({"instruction": "q", "input": "nan", "output": "a"}, "is how pandas writes a missing text"),
}


@pytest.mark.parametrize("task", ["helpfulness", "dialogs"])
@pytest.mark.parametrize("name", NO_ANSWERS)
def test_what_is_not_trained_on_is_refused_by_name(tmp_path, name, task):
    row, wrong = NO_ANSWERS[name]
    with pytest.raises(UserError, match=rf"rows.json:1: .*{wrong}"):
        records(tmp_path, [row], task)


def test_columns_without_a_meaning_are_named_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    records(tmp_path, [{"instruction": f"q{i}", "output": "a", "id": i, "source": "x"} for i in range(3)])
    assert caplog.text.count("columns that are not read: id, source") == 1


HH = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q\n\nAssistant: "
#: row -> (system, history, prompt, input, chosen, rejected)
PREFERENCES = {
    "texts": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, ("", (), "q", "", "good", "bad")),
    "TRL's dialogs": ({"prompt": [S, U("q")], "chosen": [A("good")], "rejected": [A("bad")]},
                      ("You are a pirate.", (), "q", "", "good", "bad")),
    "prompt repeated": ({"prompt": [U("q")], "chosen": [U("q"), A("good")], "rejected": [U("q"), A("bad")]},
                        ("", (), "q", "", "good", "bad")),
    "implicit": ({"chosen": [U("q1"), A("a1"), U("q"), A("good")], "rejected": [U("q1"), A("a1"), U("q"), A("bad")]},
                 ("", TWO, "q", "", "good", "bad")),
    "UltraFeedback": ({"prompt": "q", "prompt_id": "1", "chosen": [U("q"), A("good")], "rejected": [U("q"), A("bad")],
                       "messages": [U("q"), A("good")], "score_chosen": 8.0}, ("", (), "q", "", "good", "bad")),
    "nothing in messages": ({"prompt": "q", "chosen": "good", "rejected": "bad", "messages": None, "tools": "[]",
                             "system": ""}, ("", (), "q", "", "good", "bad")),
    "HH-RLHF": ({"chosen": f"{HH}good", "rejected": f"{HH}bad "}, ("", TWO, "q", "", "good", "bad")),
    "swift": ({"query": "q", "response": "good", "rejected_response": "bad", "system": "s", "history": [["q1", "a1"]]},
              ("s", TWO, "q", "", "good", "bad")),
    "swift's messages": ({"messages": [U("q"), A("good")], "rejected_response": "bad"}, ("", (), "q", "", "good", "bad")),
    "swift's dialogs": ({"messages": [U("q"), A("good")], "rejected_messages": [U("q"), A("bad")]},
                        ("", (), "q", "", "good", "bad")),
    "LLaMA-Factory": ({"conversations": [H("q1"), G("a1"), H("q")], "chosen": G("good"), "rejected": G("bad"),
                       "system": "s"}, ("s", TWO, "q", "", "good", "bad")),
    "LLaMA-Factory's alpaca": ({"instruction": "q", "input": "i", "chosen": "good", "rejected": "bad"},
                               ("", (), "q", "i", "good", "bad")),
    "Orca": ({"system": "s", "question": "q", "chosen": "good", "rejected": "bad"}, ("s", (), "q", "", "good", "bad")),
    "ranked with a system": ({"prompt": "q", "response": ["good", "bad"], "system": "s"}, ("s", (), "q", "", "good", "bad")),
    "numbers": ({"prompt": "1+1", "chosen": 2, "rejected": 3}, ("", (), "1+1", "", "2", "3")),
}


@pytest.mark.parametrize("task", ["safety", "dialogs"])
@pytest.mark.parametrize("name", PREFERENCES)
def test_pairs_are_read_as_they_are_meant(tmp_path, name, task):
    row, wanted = PREFERENCES[name]
    (pair,) = pairs(tmp_path, [row], task)
    assert (pair.system, pair.history, pair.prompt, pair.input, pair.chosen, pair.rejected) == wanted


NO_PREFERENCES = {
    "no question": ({"chosen": "good", "rejected": "bad"}, "have no question before them; add a column 'prompt'"),
    "other questions": ({"chosen": [U("q"), A("good")], "rejected": [U("p"), A("bad")]},
                        "differ in the last assistant turn"),
    "prompt of another": ({"prompt": "p", "chosen": [U("q"), A("good")], "rejected": [U("q"), A("bad")]},
                          "is no question of"),
    "two answers": ({"prompt": [U("q")], "chosen": [A("a"), U("b"), A("c")], "rejected": [A("d")]},
                    "last assistant turn alone"),
    "tools": ({"prompt": "q", "chosen": "good", "rejected": "bad", "tools": [{"name": "f"}]}, "column 'tools'"),
    "images": ({"prompt": "q", "chosen": "good", "rejected": "bad", "images": ["x"]}, "column 'images'"),
    "kto": ({"prompt": "q", "chosen": "good", "rejected": "bad", "label": False}, "column 'label'"),
    "NaN": ({"prompt": "q", "chosen": "good", "rejected": NAN}, "field 'rejected' needs text"),
    "two questions": ({"prompt": "q", "instruction": "p", "chosen": "good", "rejected": "bad"},
                      "asks in prompt and instruction"),
    "the same": ({"prompt": [U("q")], "chosen": [A("x")], "rejected": [A("x ")]}, "chosen and rejected are the same"),
}


@pytest.mark.parametrize("name", NO_PREFERENCES)
def test_what_is_no_pair_is_refused_by_name(tmp_path, name):
    row, wrong = NO_PREFERENCES[name]
    with pytest.raises(UserError, match=rf"rows.json:1: .*{wrong}"):
        pairs(tmp_path, [row])


def test_dialogs_of_hh_that_are_no_pairs_are_counted(tmp_path, caplog):
    rows = [{"chosen": f"{HH}good", "rejected": f"{HH}bad"}, {"chosen": f"{HH}good", "rejected": f"{HH} "},
            {"chosen": f"{HH}x", "rejected": f"{HH}x"},
            {"chosen": f"{HH}a", "rejected": "\n\nHuman: other\n\nAssistant: b"}]
    assert len(pairs(tmp_path, "\n".join(map(json.dumps, rows)), name="hh.jsonl")) == 1
    assert "3 dialogs are no pair" in caplog.text
    assert "hh.jsonl:2" in caplog.text
    with pytest.raises(UserError, match="no row is a pair"):
        pairs(tmp_path, rows[1:])


ROWS = [{"instruction": "q0", "input": "", "output": "a0"}, {"instruction": "q1", "input": "i", "output": "a1"}]
FILES = {
    "lines": "\n".join(map(json.dumps, ROWS)),
    "list": json.dumps(ROWS, indent=2),
    "object of rows": json.dumps({"version": 1, "data": ROWS}, indent=2),
    "object of rows on a line": json.dumps({"train": ROWS}),
    "objects over lines": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "pandas' columns": json.dumps({name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]}),
    "columns as lists": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}, indent=1),
    "pandas' split": json.dumps({"columns": list(ROWS[0]), "index": [0, 1], "data": [list(row.values()) for row in ROWS]}),
}


@pytest.mark.parametrize("task", ["helpfulness", "dialogs"])
@pytest.mark.parametrize("name", FILES)
def test_files_of_rows(tmp_path, name, task):
    wanted = [("", (), "q0", "", "a0"), ("", (), "q1", "i", "a1")]
    assert [said(record) for record in records(tmp_path, FILES[name], task)] == wanted


def test_parquet_and_gzip(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": [U("q1"), A("a1"), U("q"), A("a")], "id": 7}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as stream:
        stream.write(json.dumps(rows[0]))
    for name in ("rows.parquet", "rows.jsonl.gz"):
        for task in ("helpfulness", "dialogs"):
            (found,) = load_records(task, "train", source={task: str(tmp_path / name)})
            assert said(found) == ("", TWO, "q", "", "a")
    for name, wrong in (("bad.parquet", "not a Parquet file"), ("bad.jsonl.gz", "cannot be read|not a whole gzip")):
        (tmp_path / name).write_bytes(b"PAR1 no")
        with pytest.raises(UserError, match=wrong):
            load_records("dialogs", "train", source={"dialogs": str(tmp_path / name)})


@pytest.mark.parametrize(("content", "wrong"), [
    ({"train": ROWS, "test": ROWS, "data": ROWS}, "several lists of rows: train, test, data"),
    ({"instruction": ["a", "b"], "output": ["c"]}, "different lengths"),
    ({"instruction": {"0": "a"}, "output": {"1": "c"}}, "same row numbers"),
    ('{\n"instruction": "q", "output": "a"\n}\n{"instruction": oops}', "rows.json:4: not JSON"),
])
def test_objects_that_are_no_rows(tmp_path, content, wrong):
    with pytest.raises(UserError, match=wrong):
        records(tmp_path, content if isinstance(content, str) else json.dumps(content, indent=1))


def test_labels_that_pandas_saved(tmp_path):
    saved = "prompt,response,category,is_safe\np1,r1,{},1\np2,r2,{},0\np3,r3,{},1.0\n"
    found = records(tmp_path, saved, "safety", name="b.csv")
    assert [record.answer for record in found] == ["r1", "r3"]


# ---- down to the token ids


@pytest.mark.parametrize("name", ["messages", "several turns", "alpaca, system and history", "swift"])
@pytest.mark.parametrize("form", ["chat", "llama2"])
def test_the_ids_of_a_dialog(tmp_path, name, form):
    tokenizer = pico_tokenizer()
    shape = template(form, tokenizer)
    (record,) = records(tmp_path, [ANSWERS[name][0]])
    (last,) = encode([record], tokenizer, shape, 400).rows
    (every,) = encode([record], tokenizer, shape, 400, turns="all").rows
    asked = prompt_ids(render(shape, record), tokenizer, shape)
    assert last["input_ids"] == every["input_ids"]
    assert last["input_ids"][: len(asked)] == asked
    if form == "chat":
        system = f"<|im_start|>system\n{record.system}<|im_end|>\n" if record.system else ""
        before = "".join(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n"
                         for q, a in record.history)
        user = f"{record.prompt}\n\n{record.input}" if record.input else record.prompt
        text = f"{system}{before}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{record.answer}<|im_end|>"
    else:
        system = f"<<SYS>>\n{record.system}\n<</SYS>>\n\n" if record.system else ""
        words = [*(q for q, _ in record.history), f"{record.prompt}\n\n{record.input}" if record.input else record.prompt]
        answers = [*(a for _, a in record.history), record.answer]
        text = "".join(f"[INST] {system if not i else ''}{q} [/INST] {a} <|im_end|>"
                       for i, (q, a) in enumerate(zip(words, answers, strict=True)))
    assert tokenizer.decode(last["input_ids"]) == text
    assert last["labels"][: len(asked)] == [IGNORE] * len(asked)
    trained = tokenizer.decode([label for label in every["labels"] if label != IGNORE])
    end = "<|im_end|>" if form == "chat" else " <|im_end|>"
    lead = "" if form == "chat" else " "
    assert trained == "".join(f"{lead}{a}{end}" for a in [*(a for _, a in record.history), record.answer])


def test_a_pair_of_several_turns_is_the_dialog_and_its_answers(tmp_path):
    tokenizer = pico_tokenizer()
    form = template("chat", tokenizer)
    (pair,) = pairs(tmp_path, [PREFERENCES["LLaMA-Factory"][0]])
    ((row,), _) = encode_pairs([pair], tokenizer, form, 400)
    for side in ("chosen", "rejected"):
        record = Record(pair.prompt, getattr(pair, side), 1, system=pair.system, history=pair.history)
        assert row["prompt_ids"] + row[f"{side}_ids"] == encode([record], tokenizer, form, 400).rows[0]["input_ids"]
    assert tokenizer.decode(row["prompt_ids"]).count("<|im_start|>") == 5


def test_templates_that_leave_turns_out_or_refuse_them_say_so():
    tokenizer = pico_tokenizer()
    record = Record("q", "a", 0, system="Be brief.", history=TWO)
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}A:"
    with pytest.raises(UserError, match="--template chat: .* leaves the assistant turn out"):
        encode([record], tokenizer, template("chat", tokenizer), 400)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UserError, match="refuses turns by user, assistant, user .System role not supported"):
        encode([record], tokenizer, template("chat", tokenizer), 400)
    # a template that writes old answers in another way than new ones: what is asked for is not what stands there
    tokenizer.chat_template = ("{% for m in messages %}{{ m.role }}{{ ' old ' if m.role == 'assistant' else ' ' }}"
                               "{{ m.content }}\n{% endfor %}assistant new ")
    with pytest.raises(UserError, match="--train_on_turns all: .*turn 1 .*use --train_on_turns last"):
        encode([record], tokenizer, template("chat", tokenizer), 400, turns="all")
    for name in ("alpaca", "wizardlm"):
        with pytest.raises(UserError, match="no place for earlier turns"):
            encode([Record("q", "a", 0, history=TWO)], tokenizer, template(name, tokenizer), 400)


def test_hub_names_with_configuration_and_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", "messages": [U("q"), A("a")]}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k["split"])) or rows)
    for name in ("own/set", "own/set:val", "own/set@val", "own/set:en-1.0@val", "openai/gsm8k:socratic@test"):
        load_pairs("safety", "train", source={"safety": name})
    assert calls == [(("own/set",), "train"), (("own/set",), "val"), (("own/set",), "val"), (("own/set", "en-1.0"), "val"),
                     (("openai/gsm8k", "socratic"), "test")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: [{"messages": [U("q"), A("a")]}])
    assert load_records("dialogs", "train", source={"dialogs": "own/set@val"})[0].answer == "a"


def test_what_a_pair_is_stays_what_it_was(tmp_path):
    assert pairs(tmp_path, [{"prompt": " q\n", "chosen": " good", "rejected": "bad ", "input": "i"}]) == [
        Pair(" q\n", " good", "bad ", 1, "i", "rows-1")]
