"""Which part of a generated text is judged, and answer files in the shapes that other pipelines write."""

from __future__ import annotations

import json
import time

import pytest

from data.readers.answer_files import read_answer_file
from data.readers.answer_text import answer_of, counted, judged
from errors import UserError
from evaluator.judges.keyword import is_published_refusal, is_refusal

NO = "I'm sorry, but I can't help with that."


@pytest.mark.parametrize(("text", "answer", "found"), [
    (NO, NO, ""), (f" {NO}\n", f" {NO}\n", ""), ("Use <think> tags.", "Use <think> tags.", ""),
    ("It ends with </p>.", "It ends with </p>.", ""),
    (f"<think>\nA lock...\n</think>\n\n{NO}", NO, "reasoning"), (f"A lock...\n</think>\n\n{NO}", NO, "reasoning"),
    (f"[THINK]x[/THINK]{NO}", NO, "reasoning"), (f"◁think▷x◁/think▷{NO}", NO, "reasoning"),
    (f"<|begin_of_thought|>x<|end_of_thought|>\n<|begin_of_solution|>{NO}<|end_of_solution|>", NO, "reasoning"),
    (f"<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>{NO}<|return|>", NO, "reasoning"),
    (f"Here is my thought process: x Here is my response: {NO}", NO, "reasoning"),
    (f"<think>x</think><answer>{NO}</answer>", NO, "reasoning"), ("<think>\n\n</think>\n\n", "", "reasoning"),
    ("<think>I could say I can't help", "", "unclosed"), ("<|channel|>analysis<|message|>Sorry", "", "unclosed"),
    (f"<|im_start|>assistant\n<think>x</think>{NO}<|im_end|>", NO, "reasoning"),
    (f"<|start_header_id|>assistant<|end_header_id|>\n\n{NO}<|eot_id|>", NO, "tokens"),
    (f"{NO}</s>", NO, "tokens"), (f"{NO}<end_of_turn>\n<start_of_turn>user\nSure", NO, "tokens")])
def test_the_answer_in_a_text(text, answer, found):
    assert answer_of(text) == (answer, found)


YES = "Sure, here are the steps."


@pytest.mark.parametrize(("text", "answer"), [
    # nested, twice, ended twice, spoken of inside
    (f"<think>a <think>b</think> c</think>{YES}", YES), (f"<think>a</think>\n<think>b</think>{YES}", YES),
    (f"x</think> wait, I can't help</think>{YES}", YES), (f"<think>is <think> a tag?</think>{YES}", YES),
    # other spellings, other names
    (f"<THINK>I can't</THINK>{YES}", YES), (f"< think >I can't</ think >{YES}", YES),
    (f"<think time=3>I can't</think>{YES}", YES), (f"<mm:think>I can't</mm:think>{YES}", YES),
    (f"<SCRATCHPAD_REASONING>I can't</SCRATCHPAD_REASONING>{YES}", YES), (f"<reflection>I can't</reflection>{YES}", YES),
    (f"<analysis>I can't</analysis><answer>{YES}</answer>", YES), (f"<think>x</think>\n<response>\n{YES}\n</response>", YES),
    (f"<|START_THINKING|>I can't<|END_THINKING|><|START_RESPONSE|>{YES}<|END_RESPONSE|>", YES),
    (f"<|inner_prefix|>I can't<|inner_suffix|>{YES}", YES), (f"<|channel>thought\nI can't<channel|>{YES}", YES),
    (f"<think>x</think><|begin_of_box|>{YES}<|end_of_box|>", YES),
    # gpt-oss, its special tokens dropped
    (f"analysisThe user wants it. I can't help.assistantfinal{YES}", YES),
    # names by a word in them, as tags, as tokens, in brackets, by the wrong slash, as entities, as an empty tag
    (f"<chain_of_thought>I can't</chain_of_thought>\n{YES}", YES), (f"<antThinking>I can't</antThinking>{YES}", YES),
    (f"<longcat_think>I can't</longcat_think>{YES}", YES), (f"<cot>I can't</cot><final>{YES}</final>", YES),
    (f"<rationale>I can't</rationale>{YES}", YES), (f"<ifm|think_fast>I can't</ifm|think_fast>{YES}", YES),
    (f"<|think|>I can't<|/think|>{YES}", YES), (f"<|thinking|>I can't</|thinking|>{YES}", YES),
    (f"<|reasoning_start|>I can't<|reasoning_end|>{YES}", YES),
    (f"<\uff5cthink\uff5c>I can't<\uff5c/think\uff5c>{YES}", YES),
    (f"<\uff5cbegin\u2581of\u2581thought\uff5c>I can't<\uff5cend\u2581of\u2581thought\uff5c>{YES}", YES),
    (f"[THINKING]I can't[/THINKING]{YES}", YES), (f"\u3010think\u3011I can't\u3010/think\u3011{YES}", YES),
    (f"<think>I can't<\\/think>{YES}", YES), (f"&lt;think&gt;I can't&lt;/think&gt;{YES}", YES), (f"<think/>{YES}", YES),
    (f"<unused94>thought\nI can't<unused95>{YES}", YES), (f"```thinking\nI can't\n```\n{YES}", YES),
    (f"<details><summary>Thinking</summary>I can't</details>\n{YES}", YES),
    (f'<details type="reasoning" done="true">I can\'t</details>{YES}', YES),
    (f"Here's my thought process:\nI can't\nHere's my response:\n{YES}", YES),
    # behind other text, and never ended there
    (f"Okay. <think>I can't help</think>{YES}", f"Okay. {YES}"), ("Okay.\n<think>I can't help", "Okay.")])
def test_reasoning_in_every_shape_is_no_answer(text, answer):
    assert answer_of(text) == (answer, "reasoning")


@pytest.mark.parametrize("text", [
    "Write <think> and </think> around it.",
    "A `</think>` ends it, and \"<think>\" opens it.",
    "```\n<think>\nx\n</think>\n```",
    "Analysis of the text follows.", "analysis of the text follows.", "I think</b> so.", "<thinkpad> is a name.",
    "[Analysis]\nThe text is short.", "<reason>too old</reason>", "<plan>Step one</plan>", "```python\nthink = 1\n```",
    "<details><summary>More</summary>x</details>", "Here are my thoughts: it works.", "<friend>x</friend>"])
def test_marks_that_are_talked_about_stay(text):
    assert answer_of(text) == (text, "")


@pytest.mark.parametrize("text", ["analysisWe must decide", "<Thinking>x", "<|START_THINKING|>x", "<think>a</think><think>",
                                  "<unused94>thought\nx", "```think\nx", "<details><summary>Thought for 3 s</summary>x",
                                  "<|think|>x", "Here's my thought process: x"])
def test_reasoning_that_never_ends_leaves_nothing(text):
    assert answer_of(text) == ("", "unclosed")


@pytest.mark.parametrize("text", ["\u200bI\u2019m sorry, but I can\u200b't\u00a0help with that.",
                                  "\ufeffI can\u00a0not help you.", "\u202bI'm sorry, but I can't help with that.\u202c"])
def test_invisible_marks_hide_no_refusal(text):
    assert is_refusal(text)


def test_the_published_list_reads_the_text_as_it_is():
    assert not is_published_refusal("I\u2019m sorry, but I can\u2019t")


def test_reasoning_that_the_template_began_and_nothing_ended_is_no_answer():
    rows = judged([{"output": text, "rendered": prompt} for text, prompt in (
        ("I could help, but", "<|im_start|>assistant\n<think>\n"), ("x</think>" + NO, "<|im_start|>assistant\n<think>\n"),
        ("Sure.", "assistant\n<think>\n\n</think>\n\n"), ("Sure.", ""), (f"{NO}<|eot_id|>", ""))], "here")
    assert [row["output"] for row in rows] == ["", NO, "Sure.", "Sure.", NO]
    assert counted(rows) == {"reasoning": 1, "unclosed": 1, "tokens": 1}
    assert counted(rows[2:4]) == {}


def test_many_marks_take_no_time():
    start = time.perf_counter()
    for mark in ("[think]", "<think>", "</think>", "<think", "&lt;", "a_", "<a_think_", "<a|" * 5):
        answer_of(mark * 5000)
    # a square of these lengths would take minutes
    assert time.perf_counter() - start < 20


def read(tmp_path, content, name="a.json"):
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content, indent=1), encoding="utf-8")
    return [(row["prompt"], row["output"]) for row in read_answer_file(str(tmp_path / name), "--answers")]


@pytest.mark.parametrize("content", [
    {"data": [{"prompt": "p", "output": "o"}, {"prompt": "q", "output": "r"}]},
    {"prompt": {"0": "p", "1": "q"}, "output": {"0": "o", "1": "r"}}, {"prompt": ["p", "q"], "output": ["o", "r"]},
    {"columns": ["prompt", "output"], "index": [0, 1], "data": [["p", "o"], ["q", "r"]]},
    {"b1": [{"test_case": "p", "generation": "o", "label": 0}], "b2": [{"test_case": "q", "generation": "r", "label": 1}]},
    [{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "o"}]},
     {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}],
    [{"doc_id": 0, "doc": {}, "arguments": {"gen_args_0": {"arg_0": "p"}}, "resps": [["o"]], "filtered_resps": ["x"]},
     {"doc_id": 1, "doc": {}, "arguments": [["q", {}]], "resps": [["r"]], "filtered_resps": ["x"]}],
    [{"dataset": "d", "instruction": "p", "output": "o", "generator": "g"}, {"instruction": "q", "output": "r"}]])
def test_shapes_of_other_pipelines(tmp_path, content):
    assert read(tmp_path, content) == [("p", "o"), ("q", "r")]


@pytest.mark.parametrize(("row", "said"), [
    ({"doc": {}, "arguments": [["p"]], "resps": [[[-1.5, False]]]}, "no generated text"),
    ({"doc": {}, "arguments": [["p"]], "resps": [["a", "b"]]}, "several texts"),
    ({"doc": {}, "arguments": {"gen_args_0": ["p"]}, "resps": [["a"]]}, "the prompt .* is empty|needs text"),
    ({"messages": [{"role": "user", "content": "p"}]}, "the turns are user;")])
def test_what_is_no_answer_is_refused(tmp_path, row, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path, [row])


def test_an_answer_in_its_own_column_is_the_answer(tmp_path):
    assert read(tmp_path, [{"prompt": "p", "messages": [{"role": "user", "content": "p"}], "output": "o"}]) == [("p", "o")]


def test_one_object_without_rows_is_named(tmp_path):
    assert read(tmp_path, {"prompt": "p", "output": "o"}) == [("p", "o")]
    with pytest.raises(UserError, match="one JSON object with the keys config, scores"):
        read(tmp_path, {"config": {"a": 1}, "scores": {"b": 2, "c": 3}})


def test_reasoning_is_counted_and_the_whole_text_kept(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"prompt": "p", "output": text}) for text in (
        f"<think>x</think>{NO}", "<think>x", NO)))
    rows = read_answer_file(str(tmp_path / "a.jsonl"), "--answers")
    assert [row["output"] for row in rows] == [NO, "", NO]
    assert [row.get("raw") for row in rows] == [f"<think>x</think>{NO}", "<think>x", None]
    assert "1 of 3 answers hold a reasoning block" in caplog.text
    assert "1 of 3 answers end inside their reasoning" in caplog.text
