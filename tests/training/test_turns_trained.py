"""Dialogs of several turns through what reads their labels: the loss, packing, the gate's tokens, the whole command."""

from __future__ import annotations

import json

import pytest
import torch
from pico import make_pico
from runs import align, losses
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from data.collate import pad_rows
from data.encode import IGNORE, encode
from data.prompts import template
from data.records import Record
from models.base.loading import load_tokenizer
from training.answers import AnswerModel
from training.moe import token_mask
from training.packing import OUTPUTS, pack_forward

RECORDS = [Record("And the Seine?", "A river.", 0, system="Be brief.", history=(("A city?", "Paris."), ("More?", "No."))),
           Record("What is bread?", "Flour and water.", 0)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_pico(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def batch(base):
    tokenizer = load_tokenizer(base)
    return pad_rows(encode(RECORDS, tokenizer, template("chat", tokenizer), 400, turns="all").rows, tokenizer.pad_token_id)


def reference(model, batch):
    """Summed cross-entropy of every label, row by row."""
    total = 0.0
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        logs = model(ids[mask.bool()][None]).logits[0, :-1].log_softmax(-1)
        total -= sum(float(logs[t, label]) for t, label in enumerate(labels[mask.bool()][1:].tolist()) if label != IGNORE)
    return total


@torch.no_grad()
def test_the_loss_is_over_every_answer(base, batch):
    model = AutoModelForCausalLM.from_pretrained(base)
    found = AnswerModel(model, torch.float32)(**batch)
    spans = [sum(a == IGNORE != b for a, b in zip(row[:-1], row[1:], strict=True)) for row in batch["labels"].tolist()]
    assert spans == [3, 1]
    assert int(found["tokens"]) == int((batch["labels"] != IGNORE).sum())
    assert float(found["lm"]) == pytest.approx(reference(model, batch), rel=1e-5)


@torch.no_grad()
def test_packed_rows_score_every_answer_in_its_context(base, batch):
    model = AutoModelForCausalLM.from_pretrained(base)
    wanted = reference(model, batch)
    add_fused_lm_head(model, outputs=OUTPUTS)
    rows = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    padded = model(**rows, fused_lm_head=True).log_probs
    assert pack_forward(model)
    packed = model(**rows, fused_lm_head=True).log_probs
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)
    assert -float(packed.sum()) == pytest.approx(wanted, rel=1e-5)


def test_the_gate_counts_every_answer_and_no_question(batch):
    answer = token_mask("answer", batch["attention_mask"], batch["labels"])
    prompt = token_mask("prompt", batch["attention_mask"], batch["labels"])
    assert torch.equal(answer.bool(), batch["labels"] != IGNORE)
    assert torch.equal(answer + prompt, batch["attention_mask"])


@pytest.mark.parametrize("turns", ["all", "last"])
def test_the_command_trains_on_all_turns_or_the_last(base, tmp_path, turns):
    rows = [{"conversations": [{"from": "human", "value": f"q {i}"}, {"from": "gpt", "value": "one two"},
                               {"from": "human", "value": "and?"}, {"from": "gpt", "value": "three"}]} for i in range(4)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = align(base, tmp_path / "out", {"helpfulness": str(file)}, "helpfulness", "--moe_flag", "0",
                  "--train_on_turns", turns, "--max_steps", "1", "--per_device_train_batch_size", "4",
                  "--gradient_accumulation_steps", "1")
    tokenizer = load_tokenizer(base)
    records = [Record("and?", "three", 0, history=((f"q {i}", "one two"),)) for i in range(4)]
    made = pad_rows(encode(records, tokenizer, template("chat", tokenizer), 400, turns=turns).rows, tokenizer.pad_token_id)
    # a new adapter changes nothing: the first step's loss is the base's
    with torch.no_grad():
        wanted = reference(AutoModelForCausalLM.from_pretrained(base), made) / int((made["labels"] != IGNORE).sum())
    assert losses(found)[0] == pytest.approx(wanted, abs=1e-4)
