"""The packed score against transformers one by one; groups; models that open with reasoning."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data.encode import prompt_ids
from data.prompts import template
from data.sets import refusal_openers
from errors import UserError
from evaluator.scoring.refusals.likelihood import check_answers_first, mass, opener_logprobs
from models.base.loading import load_base, load_tokenizer
from models.runs import Loaded

QUESTIONS = ("What is the capital of France?", "How do I bake bread at home?", "Why?", "Write a short story about a dog.",
             "How do I bake bread at sea?", "What is the capital of France? Say it twice, and then again.")


@pytest.fixture(scope="module")
def loaded(pico):
    model, tokenizer = load_base(pico, torch.float32, torch.device("cpu")), load_tokenizer(pico)
    return Loaded(model, tokenizer, template("chat", tokenizer), "pico", torch.device("cpu"))


@pytest.fixture(scope="module")
def prompts(loaded):
    return [loaded.template.render(question, "") for question in QUESTIONS]


def alone(loaded, prompt, opener):
    """One forward pass of transformers for one prompt and one opener, nothing shared, nothing of ours but the ids."""
    front = prompt_ids(prompt, loaded.tokenizer, loaded.template)
    back = loaded.tokenizer(opener, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([front + back])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(front) - 1 + i, token]) for i, token in enumerate(back))


def test_packed_is_one_by_one_whatever_the_batches(loaded, prompts):
    openers = refusal_openers.load().texts
    want = np.array([[alone(loaded, prompt, opener) for opener in openers] for prompt in prompts])
    for batch_tokens in (64, 150, 4096):
        found = opener_logprobs(loaded, prompts, openers, batch_tokens)
        assert found.shape == (6, len(openers))
        assert np.abs(mass(found) - np.log(np.exp(want).sum(1))).max() < 1e-5
        assert np.abs(found - want).max() < 1e-4
    # neither the order nor the company of a prompt counts
    turned = opener_logprobs(loaded, prompts[:1:-1], openers, 64)
    assert np.abs(mass(turned) - mass(found)[:1:-1]).max() < 1e-5


def test_the_mass_is_a_probability():
    table = np.log([[0.1, 0.2, 0.3], [0.5, 0.25, 0.25]])
    assert mass(table) == pytest.approx([math.log(0.6), 0.0])
    # beyond what a double could hold as a number of its own
    assert mass(np.array([[-2000.0, -2000.0]])) == pytest.approx([-2000 + math.log(2)])


def test_the_openers_of_one_model_exclude_each_other(loaded, prompts):
    openers = refusal_openers.load().texts
    ids = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in openers]
    assert not [(a, b) for a in ids for b in ids if a is not b and b[: len(a)] == a]
    assert (mass(opener_logprobs(loaded, prompts, openers, 512)) < 0).all()


def test_a_template_that_opens_with_reasoning_is_refused(loaded):
    thinking = [f"{loaded.template.render(question, '')}<think>\n" for question in QUESTIONS]
    with pytest.raises(UserError, match=r"--task_name pico: its template opens every answer with a block of reasoning.*"
                                        r"inference.py and score with evaluate_safety.py"):
        opener_logprobs(loaded, thinking, ("No",), 512)
    # closed again it is an empty thought, behind which the answer begins
    empty = [f"{text}\n</think>\n\n" for text in thinking]
    assert opener_logprobs(loaded, empty, ("No",), 512).shape == (6, 1)


def test_a_model_that_opens_with_reasoning_is_refused(loaded, prompts, pico):
    model, tokenizer = load_base(pico, torch.float32, torch.device("cpu")), load_tokenizer(pico)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))
    own = Loaded(model, tokenizer, loaded.template, "thinker", loaded.device)
    # it knows the mark and does not use it
    check_answers_first(own, prompts, 512)
    with torch.no_grad():
        rows = model.get_output_embeddings().weight
        rows[tokenizer.convert_tokens_to_ids("<think>")] = 40 * last_state(own, prompts[0]).sign()
    with pytest.raises(UserError, match=r"thinker: opens its answers with reasoning \(<think>, probability 1.00\), so no"):
        check_answers_first(own, prompts[:1], 512)


def last_state(loaded, prompt):
    ids = torch.tensor([prompt_ids(prompt, loaded.tokenizer, loaded.template)])
    with torch.inference_mode():
        return loaded.model.model(ids).last_hidden_state[0, -1]
