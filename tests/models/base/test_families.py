"""Every family of ``FAMILIES`` from its base to answers, each step against transformers' own forward on each row alone.

The steps that passed make the table of docs/reference/families.md.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from pico import make_adapter
from pico_families import WINDOW, make_family
from runs import align, common, losses, write_data
from torch import nn
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

import inference
from config import ROOT, parse
from data.encode import IGNORE
from data.prompts import template
from evaluator.scoring.likelihood import answer_logprobs
from flags import AlignArgs
from models import fuse, llama_moe
from models.adapters.files import read_adapter
from models.base.families import FAMILIES, decoder_layers, family_of
from models.base.loading import load_base, load_tokenizer
from models.generation import Decoding, answer_batch
from models.moe.files import assemble, load_moe
from models.moe.router import route
from models.runs import Loaded, load_run
from training.answers import AnswerModel
from training.packing import OUTPUTS, pack_forward

CPU = torch.device("cpu")
#: Columns of the table: what is done, in the order of a run.
STEPS = ("base", "train", "fuse", "tune", "infer", "merge adapters", "merge models", "score", "DPO")
LONG = "What is the capital of France, and on which river does it lie?"
ITEMS = ((LONG, "The capital of France is Paris, on the Seine."), (LONG, "The capital of France is Lyon."), ("Why?", "No."))


def own(folder: Path) -> nn.Module:
    """The model as transformers alone loads and runs it."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@torch.no_grad()
def own_logprobs(model: nn.Module, front: list[int], back: list[int]) -> torch.Tensor:
    """log p of each token of ``back``, from the model's own forward on this row alone."""
    logs = model(torch.tensor([front + back])).logits[0, len(front) - 1 : -1].log_softmax(-1)
    return logs.gather(1, torch.tensor(back)[:, None])[:, 0]


def ids_of(tokenizer, form) -> list[tuple[list[int], list[int]]]:
    rows = [(form.render(prompt, ""), answer) for prompt, answer in ITEMS]
    return [tuple(tokenizer(text, add_special_tokens=False)["input_ids"] for text in row) for row in rows]


def padded(rows, pad=0):
    time = max(len(front) + len(back) for front, back in rows)
    ids = [front + back + [pad] * (time - len(front) - len(back)) for front, back in rows]
    labels = [[IGNORE] * len(front) + back + [IGNORE] * (time - len(front) - len(back)) for front, back in rows]
    mask = [[1] * (len(front) + len(back)) + [0] * (time - len(front) - len(back)) for front, back in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}


class DenseExperts(nn.Module):
    """The family's own FFN once per expert, with materialised weights, weighted by the router."""

    def __init__(self, ffn, moe, family):
        super().__init__()
        self.moe, self.experts = moe, nn.ModuleList()
        for e in range(moe.num_experts):
            dense, made = copy.deepcopy(ffn), moe.materialise(e)
            parts = [made["gate"], made["up"]]
            if family.gate == family.up:
                getattr(dense, family.gate).weight.data = torch.cat(parts)
            else:
                getattr(dense, family.gate).weight.data, getattr(dense, family.up).weight.data = parts
            getattr(dense, family.down).weight.data = made["down"]
            self.experts.append(dense)

    def forward(self, hidden):
        _, weights, chosen = route(hidden.flatten(0, -2) @ self.moe.router.T, self.moe.top_k)
        shares = torch.zeros(len(weights), len(self.experts)).scatter(1, chosen, weights)
        return sum(dense(hidden) * shares[:, e].view(*hidden.shape[:-1], 1) for e, dense in enumerate(self.experts))


def dense_twin(base: Path, model: nn.Module) -> nn.Module:
    """A fused model's experts as dense FFNs in transformers' own model."""
    twin = own(base)
    family = family_of(twin.config)
    for layer, fused in zip(decoder_layers(twin, family), decoder_layers(model, family), strict=True):
        setattr(layer, family.ffn, DenseExperts(getattr(layer, family.ffn), getattr(fused, family.ffn), family))
    # the second stage trains attention too
    own_attention = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for name, module in own_attention.items():
        twin.get_submodule(name).weight.data += module.get_delta_weight("default")
    return twin


def greedy(model: nn.Module, front: list[int], tokenizer) -> str:
    """Four tokens from the model's own generate, on this row alone."""
    made = model.generate(torch.tensor([front]), max_new_tokens=4, do_sample=False, eos_token_id=tokenizer.eos_token_id,
                          pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(made[0, len(front):], skip_special_tokens=True).strip()


def close(found: nn.Module, wanted: nn.Module, rows) -> bool:
    with torch.no_grad():
        for front, back in rows:
            ids = torch.tensor([front + back])
            torch.testing.assert_close(found(ids).logits, wanted(ids).logits, atol=1e-5, rtol=1e-5)
    return True


def make(kind: str, out: Path) -> dict[str, bool]:
    """Take a family through every step; a step that is not right raises."""
    base, family, data = make_family(out / "base", kind), FAMILIES[kind], write_data(out / "data", 4, 4, 4)
    model, tokenizer, twin = load_base(base, torch.float32, CPU), load_tokenizer(base), own(base)
    form = template("chat", tokenizer)
    rows = ids_of(tokenizer, form)
    assert max(map(len, rows[0])) > WINDOW["sliding_window"]
    done = {"base": close(model, twin, rows)}
    # likelihoods
    loaded = Loaded(model, tokenizer, form, kind, CPU)
    wanted = [own_logprobs(twin, *row) for row in rows]
    scored = answer_logprobs(loaded, [(form.render(prompt, ""), answer) for prompt, answer in ITEMS])
    for (total, n), logs in zip(scored, wanted, strict=True):
        assert total / n == pytest.approx(float(logs.mean()), abs=1e-5)
    done["score"] = True
    # the training loss, and its first and second step through the command
    batch = padded(rows)
    with torch.no_grad():
        lm = float(AnswerModel(model, torch.float32)(**batch, objectives=torch.zeros(3))["lm"])
    assert lm / sum(map(len, wanted)) == pytest.approx(-float(torch.cat(wanted).mean()), abs=1e-5)
    steps = ("--num_train_epochs", "1", "--max_steps", "2", "--learning_rate", "0.01", "--warmup_steps", "0")
    found = align(base, out, data, "safety", "--moe_flag", "0", *steps)
    assert losses(found)[1] < losses(found)[0]
    done["train"] = True
    # preference pairs, packed
    add_fused_lm_head(model, outputs=OUTPUTS)
    assert pack_forward(model)
    with torch.no_grad():
        packed = model(**batch, fused_lm_head=True).log_probs[batch["labels"][:, 1:] != IGNORE]
    torch.testing.assert_close(packed, torch.cat(wanted), atol=1e-5, rtol=1e-5)
    pairs = out / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"How do I do bad thing {i}?", "chosen": "I can't help with that.",
                                         "rejected": "Sure."}) + "\n" for i in range(4)))
    align(base, out, {"safety": str(pairs)}, "safety", "--moe_flag", "0", "--method", "dpo", "--run_name", "dpo", *steps)
    done["DPO"] = True
    # the fused MoE, raw and tuned
    for seed, name in enumerate(("helpfulness", "truthfulness")):
        make_adapter(base, out / "outputs" / name, seed=seed, targets=family.projections)
    llama_moe.main([*common(base, out)[:-2], "--router_init", "random", "--expert_topk", "2", "--run_name", "raw_moe"])
    args = parse(AlignArgs, common(base, out)).args
    raw, _ = assemble(out / "outputs" / "raw_moe", args, torch.float32, CPU)
    done["fuse"] = close(raw, dense_twin(base, raw), rows)
    align(base, out, data, "mix", "--moe_flag", "1", "--run_name", "tuned", "--expert_topk", "2", *steps)
    tuned, _ = assemble(out / "outputs" / "tuned", args, torch.float32, CPU)
    twin_of_tuned = dense_twin(base, tuned)
    done["tune"] = close(tuned.eval(), twin_of_tuned, rows) and not torch.equal(
        tuned(torch.tensor([rows[0][0]])).logits, raw(torch.tensor([rows[0][0]])).logits)
    # answers, of the model that is loaded for them
    answering = load_moe(out / "outputs" / "tuned", args, torch.float32, CPU)
    close(answering, twin_of_tuned, rows)
    answers = answer_batch(Loaded(answering, tokenizer, form, kind, CPU), [form.render(prompt, "") for prompt, _ in ITEMS],
                           Decoding(4), seed=0)
    assert [answer.text for answer in answers] == [greedy(twin_of_tuned, front, tokenizer) for front, _ in rows]
    inference.main(["--task_name", "safety", "--data_path", data["safety"], "--max_new_tokens", "4", "--batch_size", "4",
                    *common(base, out)[:-2], "--cross_task", "tuned,safety"])
    done["infer"] = len(list((out / "inference").rglob("outputs_final.csv"))) == 2
    # a weighted sum of adapters, and of whole models
    fuse.main(["adapters", "--adapters", "helpfulness,truthfulness", "--weights", "0.6,0.4", "--output_dir", str(out),
               "--run_name", "sum"])
    summed, halves = own(base), [read_adapter(out / "outputs" / name) for name in ("helpfulness", "truthfulness")]
    for share, adapter in zip((0.6, 0.4), halves, strict=True):
        for module, (a, b) in adapter.modules.items():
            summed.get_submodule(module).weight.data += share * (b @ a)
    done["merge adapters"] = close(load_run("sum", args).model, summed, rows)
    other = make_family(out / "other", kind, seed=1)
    fuse.main(["merge", "--method", "linear", "--models", f"{base},{other}", "--parameters", "weight=0.5",
               "--output_dir", str(out), "--run_name", "mean"])
    mean, second = own(base), dict(own(other).named_parameters())
    for name, parameter in mean.named_parameters():
        parameter.data = (parameter.data + second[name].data) / 2
    done["merge models"] = close(own(out / "outputs" / "mean"), mean, rows)
    return done


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """What ``make`` found for a family; each is taken through once."""
    return cache(lambda kind: make(kind, tmp_path_factory.mktemp(kind)))


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_every_step_of_every_family(taken, kind):
    found = taken(kind)
    assert set(found) == set(STEPS)
    assert all(found.values())
    line = f"| `{kind}` | {' | '.join('yes' if found[step] else 'no' for step in STEPS)} |"
    assert line in table_of_the_page(), f"docs/reference/families.md shall hold:\n\n{line}"


def table_of_the_page() -> list[str]:
    """The lines of the first table of docs/reference/families.md."""
    page = (ROOT / "docs" / "reference" / "families.md").read_text(encoding="utf-8")
    return [line for line in page.split("\n## ")[0].split("\n\n")[2].splitlines() if line.startswith("|")]


def test_the_table_has_every_family_and_no_other():
    head = [f"| family | {' | '.join(STEPS)} |", f"|---|{'---|' * len(STEPS)}"]
    families = [f"| `{kind}` | {' | '.join(['yes'] * len(STEPS))} |" for kind in sorted(FAMILIES)]
    assert table_of_the_page() == head + families
