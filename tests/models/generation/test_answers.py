"""Every id that ends an answer for the model ends it here, alone and in a batch."""

from __future__ import annotations

import json

import pytest
import torch
from pico import make_pico
from transformers import AutoModelForCausalLM, GenerationConfig

from data.prompts import template
from models.base.loading import load_base, load_tokenizer
from models.generation import Decoding, answer_batch, stop_ids
from models.runs import Loaded

CPU = torch.device("cpu")
PROMPTS = ("Say hi", "What is the capital of France?", "Write a short story about a dog who learns to sail")


def opened(base):
    tokenizer = load_tokenizer(base)
    return Loaded(load_base(base, torch.float32, CPU), tokenizer, template("chat", tokenizer), "base", CPU)


def theirs(base, prompt, limit):
    """What transformers answers: text, and whether it stopped before the limit."""
    loaded = opened(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = loaded.tokenizer(loaded.template.render(prompt, ""), add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        new = model.generate(ids, max_new_tokens=limit, do_sample=False)[0, ids.shape[1]:].tolist()
    ends = model.generation_config.eos_token_id
    stopped = new[-1] in (ends if isinstance(ends, list) else [ends])
    return loaded.tokenizer.decode(new[:-1] if stopped else new, skip_special_tokens=True).strip(), stopped


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_every_id_of_the_models_list_stops_an_answer(tmp_path, where):
    base = make_pico(tmp_path / "base", seed=3)
    first = opened(base)
    texts = [first.template.render(prompt, "") for prompt in PROMPTS]
    plain = answer_batch(first, texts, Decoding(10), 0)
    # the third token of each free answer stands for <end_of_turn>, <|eot_id|> or <|end|>
    ids = [first.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in texts]
    with torch.no_grad():
        ends = [int(first.model.generate(row, max_new_tokens=3, do_sample=False, pad_token_id=2)[0, -1]) for row in ids[:2]]
    if where == "config.json":
        (base / "generation_config.json").unlink(missing_ok=True)
        config = json.loads((base / where).read_text())
        (base / where).write_text(json.dumps(config | {"eos_token_id": [1, *ends]}))
    else:
        GenerationConfig(bos_token_id=0, eos_token_id=[1, *ends], pad_token_id=2).save_pretrained(base)
    loaded = opened(base)
    assert stop_ids(loaded) == sorted({1, *ends})
    batched = answer_batch(loaded, texts, Decoding(10), 0)
    assert batched[0].finish == batched[1].finish == "stop"
    assert batched[0] != plain[0]
    for prompt, text, answer in zip(PROMPTS, texts, batched, strict=True):
        assert answer_batch(loaded, [text], Decoding(10), 0) == [answer]
        want, stopped = theirs(base, prompt, 10)
        assert (answer.text, answer.finish) == (want, "stop" if stopped else "length")


def test_the_tokenizers_own_end_counts_where_the_model_lists_another(tmp_path):
    base = make_pico(tmp_path / "base")
    GenerationConfig(eos_token_id=7).save_pretrained(base)
    assert stop_ids(opened(base)) == [1, 7]


def test_marks_of_reasoning_stay_in_the_text_and_no_other_special_token_does():
    from pico import pico_tokenizer

    from data.readers.answer_text import answer_of
    from models.generation.answers import text_of

    tokenizer = pico_tokenizer()
    plain = [*tokenizer("Paris.")["input_ids"], 2, *tokenizer(" Yes")["input_ids"]]
    assert text_of(plain, tokenizer) == tokenizer.decode(plain, skip_special_tokens=True) == "Paris. Yes"
    thinking = pico_tokenizer()
    # special tokens, as Magistral's and gpt-oss' are
    thinking.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]", "<|channel|>", "<|message|>"]})
    for text, whole in (("[THINK]I could help[/THINK]I can't.<|pad|>", "[THINK]I could help[/THINK]I can't."),
                        ("<|channel|>final<|message|>I can't.", "<|channel|>final<|message|>I can't.")):
        found = text_of(thinking(text)["input_ids"], thinking)
        assert found == whole
        assert answer_of(found) == ("I can't.", "reasoning")
