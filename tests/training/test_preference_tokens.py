"""Preference pairs are the ids of training on answers and of inference, whatever the tokenizer and its template add."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from pico import make_pico
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference

from data import encode
from data.prompts import template
from data.records import Pair, Record
from training.dpo import SafeDPOTrainer

BOS, EOS = "<|im_start|>", "<|im_end|>"
#: The chat template's own turns; BOS is a token that occurs nowhere else in them.
TURNS = ("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
         "{% if add_generation_prompt %}[assistant] {% endif %}")
PAIRS = [Pair("What is bread?", "Flour and water.", "No idea.", 1, id="a"),
         Pair("Name a city.", "Paris, on the Seine. " * 60, " A city, ends in a space ", 1, input="in France", id="b"),
         Pair("word " * 300, "x", "y", 1, id="too long")]
LENGTH = 330


def made(folder, adds, writes, closes=False):
    """A pico base whose tokenizer adds BOS (and EOS), whose template writes BOS, both or neither."""
    make_pico(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if adds or closes:
        single = f"{BOS + ' ' if adds else ''}$A{' ' + EOS if closes else ''}"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=single, special_tokens=[(BOS, tokenizer.bos_token_id), (EOS, tokenizer.eos_token_id)])
    tokenizer.chat_template = ("{{ bos_token }}" if writes else "") + TURNS
    tokenizer.save_pretrained(folder)
    return folder


def trainer_of(folder, rows, tmp_path):
    arguments = DPOConfig(output_dir=str(tmp_path / "out"), max_length=LENGTH, precompute_ref_log_probs=True,
                          report_to="none", per_device_train_batch_size=len(rows), use_cpu=True, bf16=False,
                          dataloader_pin_memory=False, precompute_ref_batch_size=len(rows))
    # a tokenizer of its own: TRL may change it
    return SafeDPOTrainer(model=AutoModelForCausalLM.from_pretrained(folder), ref_model=None, args=arguments,
                          train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(folder),
                          reference={"base": str(folder)}, results=folder / "results")


@pytest.mark.parametrize("name", ["chat", "alpaca", "wizardlm", "llama2"])
@pytest.mark.parametrize(("adds", "writes", "closes"), [(False, False, False), (True, False, False), (False, True, False),
                                                        (True, True, False), (True, True, True), (False, False, True)])
def test_pairs_are_the_ids_of_answers_and_inference(tmp_path, name, adds, writes, closes):
    folder = made(tmp_path / "base", adds, writes, closes)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    form = template(name, tokenizer)
    rows, facts = encode.encode_pairs(PAIRS, tokenizer, form, LENGTH)
    assert (len(rows), facts.dropped) == (2, 1)
    batch = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=LENGTH)(rows)
    lengths = batch["attention_mask"].sum(1).tolist()
    for i, (pair, row) in enumerate(zip(PAIRS, rows, strict=False)):
        asked = encode.prompt_ids(form.render(pair.prompt, pair.input), tokenizer, form)
        assert row["prompt_ids"] == asked
        wanted = writes if name == "chat" else adds
        assert asked[: 1] == [tokenizer.bos_token_id] if wanted else tokenizer.bos_token_id not in asked
        assert asked.count(tokenizer.bos_token_id) == wanted
        assert tokenizer.eos_token_id not in asked
        for side, place in (("chosen", i), ("rejected", len(rows) + i)):
            answered = encode.encode([Record(pair.prompt, getattr(pair, side), 1, pair.input)], tokenizer, form, LENGTH)
            (single,) = answered.rows
            assert row["prompt_ids"] + row[f"{side}_ids"] == single["input_ids"]
            assert len(single["input_ids"]) <= LENGTH
            assert [i for i, id in enumerate(single["input_ids"]) if id == tokenizer.eos_token_id] == [lengths[place] - 1]
            # what the model is given: nothing added, nothing cut, labels where training on answers has them
            assert batch["input_ids"][place, : lengths[place]].tolist() == single["input_ids"]
            assert batch["completion_mask"][place].sum() == sum(label != encode.IGNORE for label in single["labels"])
    assert facts.truncated == 1


def test_the_reference_and_the_loss_are_those_of_these_ids(tmp_path):
    folder = made(tmp_path / "base", True, True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows, _ = encode.encode_pairs(PAIRS[:2], tokenizer, template("chat", tokenizer), LENGTH)
    trainer = trainer_of(folder, rows, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    assert sorted(ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)) \
        == sorted(row["prompt_ids"] + row[side] for row in rows for side in ("chosen_ids", "rejected_ids"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    for row, kept in zip(rows, trainer.train_dataset, strict=True):
        for side in ("chosen", "rejected"):
            ids, answer = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]]), row[f"{side}_ids"]
            with torch.no_grad():
                logs = model(ids).logits[0, :-1].log_softmax(-1)
            wanted = logs[-len(answer):].gather(1, torch.tensor(answer)[:, None]).sum()
            assert kept[f"ref_{side}_logps"] == pytest.approx(float(wanted), rel=1e-5)


def test_texts_are_no_preference_rows(tmp_path):
    folder = made(tmp_path / "base", False, False)
    with pytest.raises(ValueError, match="missing: chosen_ids, prompt_ids, rejected_ids"):
        trainer_of(folder, [{"prompt": "p", "chosen": "a", "rejected": "b"}], tmp_path)
