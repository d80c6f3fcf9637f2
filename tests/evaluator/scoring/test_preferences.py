"""Preferences between answers: dialogs are asked as turns, questions of one turn keep every bit of their scores."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from assets_fixture import require_embedded

from data.prompts import Template, template
from data.records import Choice
from data.sources import load_choices
from evaluator.scoring import preferences
from evaluator.scoring.engine import prompt_hash
from evaluator.scoring.likelihood import answer_logprobs
from models.base.loading import base_path, load_base, load_tokenizer
from models.runs import Loaded


@pytest.fixture(scope="module")
def loaded(pico):
    model, tokenizer = load_base(pico, torch.float32, torch.device("cpu")), load_tokenizer(pico)
    return Loaded(model, tokenizer, template("chat", tokenizer), "pico", torch.device("cpu"))


def single(i):
    return Choice(f"Is {i} odd?", ("Yes, it is.", "No, it is not."), (1, 0), 0, f"c{i}")


TWO = Choice("Hello?\n\nAssistant:  Hi.\n\nHuman:  Is bread good?", ("Yes.", "Never."), (1, 0), 0, "two",
             history=(("Hello?", "Hi."),), last="Is bread good?")
THREE = Choice("A?\n\nAssistant: B.\n\nHuman: C?\n\nAssistant: D.\n\nHuman: E?", ("F.", "G."), (1, 0), 0, "three",
               history=(("A?", "B."), ("C?", "D.")), last="E?")


def test_the_embedded_dialogs_are_read_as_turns():
    require_embedded()
    sets = {name: load_choices(f"hhh_{name}") for name in ("helpful", "honest", "harmless", "other")}
    dialogs = {name: [choice for choice in found if choice.history] for name, found in sets.items()}
    assert {name: (len(dialogs[name]), len(found)) for name, found in sets.items()} == {
        "helpful": (9, 59), "honest": (22, 61), "harmless": (6, 58), "other": (4, 43)}
    assert sorted({len(choice.history) for found in dialogs.values() for choice in found}) == [1, 2]
    for choice in (choice for found in sets.values() for choice in found):
        texts = [text for exchange in choice.history for text in exchange] + [choice.last] * bool(choice.history)
        # every word of the text is in one turn, and no mark of a turn is left
        assert not choice.history or "".join(choice.prompt.replace("\n\nAssistant:", "").replace("\n\nHuman:", "").split()) \
            == "".join("".join(texts).split())
        assert not any("Human:" in text or "Assistant:" in text for text in texts)
        assert bool(choice.history) == ("Assistant:" in choice.prompt)


def test_turns_in_the_template_of_smollm():
    """Two and three turns, by hand."""
    require_embedded()
    form = template("chat", load_tokenizer(base_path("embedded", None)))
    head = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    asked, said = "<|im_start|>user\n{}<|im_end|>\n".format, "<|im_start|>assistant\n{}<|im_end|>\n".format
    cue = "<|im_start|>assistant\n"
    holder = Loaded(None, None, form, "SmolLM", torch.device("cpu"))
    assert preferences._as_turns(holder, TWO) == head + asked("Hello?") + said("Hi.") + asked("Is bread good?") + cue
    assert preferences._as_turns(holder, THREE) == \
        head + asked("A?") + said("B.") + asked("C?") + said("D.") + asked("E?") + cue
    item = next(choice for choice in load_choices("hhh_other") if len(choice.history) == 2)
    text = preferences._as_turns(holder, item)
    assert text.count("<|im_start|>user\n") == 3
    assert text.count("<|im_start|>assistant\n") == 3
    assert "Human:" not in text


def test_dialogs_are_scored_as_turns_and_questions_of_one_turn_keep_every_bit(loaded):
    choices = [single(1), TWO, single(2), THREE, single(3)]
    # as it was: every dialog one text
    before = preferences.outcomes(loaded, [dataclasses.replace(c, history=(), last="") for c in choices], 60)
    found = preferences.outcomes(loaded, choices, 60)
    for i in (0, 2, 4):
        assert found[i] == before[i]
        assert found[i].row("x", {}) == before[i].row("x", {})
    for i in (1, 3):
        text = loaded.template.render(choices[i].last, "", history=choices[i].history)
        want = answer_logprobs(loaded, [(text, answer) for answer in choices[i].choices])
        assert found[i].logprobs == pytest.approx([total for total, _ in want], abs=1e-4)
        assert found[i].flattened == before[i].logprobs != found[i].logprobs
        row, old = (outcome.row("x", {}) for outcome in (found[i], before[i]))
        assert row["prompt_hash"] != old["prompt_hash"]
        assert row["flattened"] == old["logprobs"]
    # of one turn: the hash is that of every score file so far
    assert found[0].row("x", {})["prompt_hash"] == prompt_hash("Is 1 odd?", "Yes, it is.", "No, it is not.")


def test_the_definition_says_how_dialogs_were_asked(loaded):
    score, rows = preferences.preference_score(loaded, [single(1), TWO, THREE], "hhh_honest", "HHH", 512)
    assert score.definition == "HHH; of 2 items of several turns 2 are asked as turns"
    assert [("flattened" in row) for row in rows] == [False, True, True]
    assert preferences.preference_score(loaded, [single(1)], "factual", "pairs", 512)[0].definition == "pairs"


@pytest.mark.parametrize("form", ["alpaca", "wizardlm", "refuses"])
def test_a_template_without_turns_gets_one_text_and_says_so(loaded, form, caplog):
    caplog.set_level("INFO")
    tokenizer = loaded.tokenizer
    if form == "refuses":
        def render(prompt, input, system="", history=()):
            if history:
                raise preferences.UserError("--template chat: leaves the assistant turn out")
            return f"{prompt}\n"
        other = Template("chat", render, "", special_tokens=False, turns=True)
    else:
        other = template(form, tokenizer)
    flat = Loaded(loaded.model, tokenizer, other, "pico", torch.device("cpu"))
    score, rows = preferences.preference_score(flat, [single(1), TWO], "hhh_honest", "HHH", 512)
    assert score.definition == ("HHH; of 1 items of several turns 0 are asked as turns, 1 as one text, for the template "
                                "takes no turns")
    assert rows[1]["prompt_hash"] == prompt_hash(TWO.prompt, *TWO.choices)
    assert "flattened" not in rows[1]
    assert ("leaves the assistant turn out" in caplog.text) == (form == "refuses")
