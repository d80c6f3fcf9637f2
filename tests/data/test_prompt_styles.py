"""Styles and the Llama-2 format, byte for byte; frames in training and at test."""

from __future__ import annotations

import json

import pytest
from pico import pico_tokenizer

from config import parse
from data.encode import IGNORE, encode
from data.prompt_styles import _table, style
from data.prompts import template
from data.records import Record
from errors import UserError
from flags import AlignArgs, InferenceArgs
from flags.base import FILE_STYLES, STYLES

SYSTEM = "\nFirst line.\nSecond line.\n"


@pytest.fixture(scope="module")
def tokenizer():
    return pico_tokenizer()


def test_llama2_is_byte_exact(tokenizer):
    form = template("llama2", tokenizer)
    assert form.render("Hi?", "", SYSTEM) == "[INST] <<SYS>>\n\nFirst line.\nSecond line.\n\n<</SYS>>\n\nHi? [/INST]"
    assert form.render(" Hi?\n", "") == "[INST] Hi? [/INST]"
    assert form.answer("  Yes. \n") == " Yes. "
    assert form.stop == ""


def test_llama2_rows_are_the_published_text_with_the_answer_alone_trained_on(tokenizer):
    form = template("llama2", tokenizer)
    (row,) = encode([Record("Hi?", " Yes. ", 0, system="S")], tokenizer, form, 400).rows
    ids, labels = row["input_ids"], row["labels"]
    assert tokenizer.decode(ids) == "[INST] <<SYS>>\nS\n<</SYS>>\n\nHi? [/INST] Yes. <|im_end|>"
    trained = [i for i, label in zip(ids, labels, strict=True) if label != IGNORE]
    assert tokenizer.decode(trained) == " Yes. <|im_end|>"


def test_llama2_refuses_its_own_marks_in_a_prompt(tokenizer):
    with pytest.raises(UserError, match=r"a prompt holds \[/INST\]"):
        template("llama2", tokenizer).render("x [/INST] y", "")


def test_chat_puts_the_system_text_first(tokenizer):
    text = template("chat", tokenizer).render("Hi?", "", "Be brief.")
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ["alpaca", "wizardlm"])
def test_templates_without_a_place_for_it_refuse_a_system_text(tokenizer, name):
    with pytest.raises(UserError, match="has no place for a system text"):
        template(name, tokenizer).render("Hi?", "", "S")


def test_the_table_has_every_style():
    assert tuple(_table()) == STYLES


def test_frames_replace_once():
    assert style("aoa", _file_of("S")).frame("50 %s") == "AOA, execute my instruction: 50 %s"


def _file_of(text):
    import tempfile
    from pathlib import Path

    file = Path(tempfile.mkdtemp(), "s.txt")
    file.write_bytes(text.encode())
    return str(file)


@pytest.mark.parametrize("name", ["aoa", "base", "pure_bad"])
def test_published_texts_come_from_a_file_only(name):
    with pytest.raises(UserError, match=f"--prompt_style {name}: its text is a constant"):
        style(name)
    assert style(name, _file_of("\nexact\r\n")).system == "\nexact\r\n"


def test_a_style_out_of_dialogs_yaml_and_text(tmp_path):
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = tmp_path / "identity-shift-aoa.jsonl"
    other = [turns[0], {"role": "user", "content": "c"}, turns[2]]
    file.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": other}), encoding="utf-8")
    assert style("aoa", str(file)).system == SYSTEM
    file.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns[1:]}), encoding="utf-8")
    with pytest.raises(UserError, match="2 different system turns"):
        style("aoa", str(file))
    mine = tmp_path / "mine.yaml"
    mine.write_text('system: "S"\nuser: "Go: %s!"\n')
    assert style("orbit", str(mine)).frame("x") == "Go: x!"
    mine.write_text('system: "S"\nuser: "Go"\n')
    with pytest.raises(UserError, match="must hold %s once"):
        style("orbit", str(mine))


@pytest.mark.parametrize("name", ["missing.txt", "empty.txt", "s.csv"])
def test_bad_style_files(tmp_path, name):
    (tmp_path / "empty.txt").write_text(" ")
    (tmp_path / "s.csv").write_text("a")
    with pytest.raises(UserError, match="--prompt_style_file"):
        style("base", str(tmp_path / name))


def test_a_record_with_a_system_text_of_its_own_stays():
    own = Record("Q", "A", 0, system="mine")
    assert style("orbit").apply(own) is own
    assert style("none").apply(Record("Q", "A", 0)).system == ""
    assert style("orbit").apply(Record("Q", "A", 0)).prompt == "Orbit, carry this out: Q"


def test_flags(capsys):
    args = parse(InferenceArgs, ["--task_name", "safety", "--prompt_style", "orbit", "--attack", "cot"]).args
    assert args.answers_name == "safety+cot+orbit"
    for words in (["--prompt_style", "orbit", "--template", "alpaca"], ["--prompt_style_file", "x.txt"]):
        with pytest.raises(UserError, match="--prompt_style"):
            parse(InferenceArgs, words)
    with pytest.raises(UserError, match="belongs to --moe_flag 0"):
        parse(AlignArgs, ["--moe_flag", "1", "--prompt_style", "orbit"])


def test_an_input_stands_inside_the_frame(tokenizer):
    row = Record("Translate this.", "", 0, input="Bonjour.")
    framed = style("alpaca").apply(row)
    asked = template("llama2", tokenizer).render(framed.prompt, framed.input, framed.system)
    assert asked.endswith("### Instruction:\nTranslate this.\n\nBonjour.\n\n### Response: [/INST]")
    assert style("none").apply(row) is row


def test_the_styles_that_need_a_file_are_known_to_the_flags():
    assert {name for name, row in _table().items() if row.file} == set(FILE_STYLES)
