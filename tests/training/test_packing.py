"""A packed batch scores what a padded one does, with its gradients; prompts are read once; what cannot be packed says so."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

import config
from data.encode import IGNORE
from errors import UserError
from models.base.attention import NAME, PACKED
from models.base.families import FAMILIES
from training.dpo import SafeDPOTrainer
from training.packing import OUTPUTS, pack, pack_forward

#: prompt, answers: prompts that two rows share, one that is a prefix of another, and one of its own
PAIRS = [([11, 12, 13], [[21, 22], [23, 24, 25, 26]]), ([11, 12], [[27], [28, 29, 30]]), ([14], [[31, 32, 33, 34, 35]])]


def batch(pairs=PAIRS, pad=0):
    rows = [(prompt, answer) for prompt, answers in pairs for answer in answers]
    rows = rows[::2] + rows[1::2]  # those that share a prompt stand apart, as in TRL's batches
    time = max(len(p) + len(a) for p, a in rows)
    return {
        "input_ids": torch.tensor([p + a + [pad] * (time - len(p) - len(a)) for p, a in rows]),
        "attention_mask": torch.tensor([[1] * (len(p) + len(a)) + [0] * (time - len(p) - len(a)) for p, a in rows]),
        "labels": torch.tensor([[IGNORE] * len(p) + a + [IGNORE] * (time - len(p) - len(a)) for p, a in rows])}


def scored(model, rows, weights):
    """The model's fields, and the gradients of a weighted sum of its log-probabilities."""
    found = model(**rows, fused_lm_head=True)
    (found.log_probs * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found, gradients


@pytest.mark.parametrize("attention", [NAME, "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_equals_padded(pico, attention, checkpointing, monkeypatch):
    monkeypatch.setattr("models.base.attention.implementation", lambda device: attention)  # "sdpa" is what a GPU takes
    rows = batch()
    weights = torch.randn(rows["labels"][:, 1:].shape, generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(pico, attn_implementation=attention).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    add_fused_lm_head(model, outputs=OUTPUTS)
    wanted, gradients = scored(model, rows, weights)
    lengths = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: lengths.append(out.shape))
    assert pack_forward(model)
    assert model.config._attn_implementation == PACKED
    found, others = scored(model, rows, weights)
    tokens = sum(len(prompt) + sum(map(len, answers)) for prompt, answers in PAIRS)
    assert set(lengths) == {(1, tokens, model.config.hidden_size)}
    for name in (*OUTPUTS, "loss", "label_mask"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), atol=2e-5, rtol=1e-4)
    assert found.log_sum_sq_probs is None
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("attention", [NAME, "sdpa"])
def test_other_calls_stay_as_they_are(pico, attention, monkeypatch):
    monkeypatch.setattr("models.base.attention.implementation", lambda device: attention)
    rows = batch()
    logits = []
    for packs in (False, True):
        model = AutoModelForCausalLM.from_pretrained(pico, attn_implementation=attention).eval()
        add_fused_lm_head(model)
        assert not packs or pack_forward(model)
        with torch.no_grad():
            logits.append(model(**rows).logits[rows["attention_mask"].bool()])
    assert torch.equal(*logits)


def test_what_a_packed_row_holds():
    packed = pack(**batch())
    assert packed.tokens.tolist() == [[11, 12, 13, 21, 22, 23, 24, 25, 26, 11, 12, 27, 28, 29, 30, 14, 31, 32, 33, 34, 35]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 2, 2, 3, 4, 0, 1, 2, 3, 4, 5]]
    assert packed.spans.places == [slice(0, 9), slice(9, 15), slice(15, 21)]
    # the second answer's first token sees the prompt and itself
    assert packed.spans.seen[0][5].tolist() == [True] * 3 + [False] * 2 + [True] + [False] * 3
    before = dict(zip(packed.targets.tolist(), packed.sources.tolist(), strict=True))
    assert before[21] == before[23] == 2
    assert (before[22], before[24], before[27], before[28]) == (3, 5, 10, 10)
    assert len(set(packed.cells.tolist())) == len(before) == 15


def test_rows_without_a_prompt_or_without_an_answer(pico):
    rows = batch([([], [[21, 22, 23], [24, 25]]), ([11, 12], [[]])])
    model = AutoModelForCausalLM.from_pretrained(pico, attn_implementation=NAME).eval()
    add_fused_lm_head(model, outputs=OUTPUTS)
    with torch.no_grad():
        wanted = model(**rows, fused_lm_head=True)
        assert pack_forward(model)
        found = model(**rows, fused_lm_head=True)
    assert int(found.label_mask.sum()) == 3
    torch.testing.assert_close(found.log_probs, wanted.log_probs, atol=2e-5, rtol=1e-4)


def test_labels_may_skip_tokens_of_an_answer():
    rows = batch([([11, 12], [[21, 22, 23]])])
    rows["labels"][0, 3] = IGNORE
    packed = pack(**rows)
    assert packed.targets.tolist() == [21, 23]
    assert packed.sources.tolist() == [1, 3]


def test_padding_on_the_left_is_refused():
    rows = {name: values.flip(1) for name, values in batch().items()}
    with pytest.raises(ValueError, match="padded on the right"):
        pack(**rows)


SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_known_family_packed_equals_padded(family):
    from pico_families import SETTINGS  # here, for this file is also imported from outside pytest

    rows = batch()
    weights = torch.randn(rows["labels"][:, 1:].shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    sizes = SIZES | {"head_dim": 12, "initializer_range": 0.2, "pad_token_id": 0, "num_hidden_layers": 2}
    sizes |= SETTINGS[family]
    # windows end within a prompt, within an answer, and between the two
    sizes |= {"sliding_window": 3} if "sliding_window" in sizes else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).train()
    add_fused_lm_head(model, outputs=OUTPUTS)
    wanted, gradients = scored(model, rows, weights)
    assert pack_forward(model)
    assert "input_ids" in inspect.signature(model.forward).parameters
    found, others = scored(model, rows, weights)
    torch.testing.assert_close(found.log_probs, wanted.log_probs, atol=2e-5, rtol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=2e-5, rtol=1e-3)


def test_spans_reach_the_layers_that_fsdp_wraps():
    """FSDP casts the inputs of each layer: what it copies, the attention's mark does not come back from."""
    code = """
import torch, torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head
from tests.training.test_packing import SIZES, batch
from training.packing import OUTPUTS, pack_forward
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = LlamaForCausalLM(LlamaConfig(**SIZES))
add_fused_lm_head(model, outputs=OUTPUTS)
assert pack_forward(model)
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
for layer in model.model.layers:
    fully_shard(layer, mp_policy=policy)
fully_shard(model, mp_policy=policy)
model(**batch(), fused_lm_head=True).log_probs.sum().backward()
print("reached", sum(p.grad is not None for p in model.parameters()))
dist.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=config.ROOT, capture_output=True, text=True, check=False)
    assert "reached" in done.stdout, done.stderr[-2000:]


def test_models_that_look_ahead_and_other_families_stay_padded():
    for kind, extra in (("gemma", {"use_bidirectional_attention": True}), ("gpt_neox", {})):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **extra))
        before = model.config._attn_implementation
        assert not pack_forward(model)
        assert model.config._attn_implementation == before


def test_settings_that_a_family_ignores_are_ignored(pico):
    """TRL divides a Llama's logits by a ``logits_scaling`` that its own forward never reads."""
    model = AutoModelForCausalLM.from_pretrained(pico).eval()
    for name in ("logits_scaling", "final_logit_softcapping", "logit_scale"):
        setattr(model.config, name, 2.0)
    rows = batch()
    with torch.no_grad():
        own = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, :-1].log_softmax(-1)
        add_fused_lm_head(model, outputs=OUTPUTS)
        assert pack_forward(model)
        found = model(**rows, fused_lm_head=True)
    wanted = own.gather(2, rows["labels"][:, 1:].clamp_min(0)[..., None])[..., 0]
    torch.testing.assert_close(found.log_probs[found.label_mask], wanted[found.label_mask], atol=1e-5, rtol=1e-5)


def test_a_head_that_trl_would_score_wrongly_is_refused():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **SIZES, logit_scale=2.0))
    add_fused_lm_head(model, outputs=OUTPUTS)
    with pytest.raises(UserError, match="would score other logits than those of model type 'gpt_neox'"):
        pack_forward(model)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **SIZES))
    add_fused_lm_head(plain, outputs=OUTPUTS)
    assert not pack_forward(plain)


def with_head_lora(model, dropout=0.0):
    lora = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], lora_dropout=dropout)
    model = get_peft_model(model, lora).get_base_model()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    return model


def test_a_lora_on_the_head_is_scored_and_gets_its_gradient():
    torch.manual_seed(0)
    model = with_head_lora(LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.2)))
    rows = batch()
    own = model(input_ids=rows["input_ids"]).logits[:, :-1].log_softmax(-1)
    wanted = own.gather(2, rows["labels"][:, 1:].clamp_min(0)[..., None])[..., 0] * (rows["labels"][:, 1:] != IGNORE)
    wanted.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    add_fused_lm_head(model, outputs=OUTPUTS)
    assert pack_forward(model)
    found, others = scored(model, rows, torch.ones_like(wanted))
    torch.testing.assert_close(found.log_probs, wanted, atol=2e-5, rtol=1e-4)
    assert any("lm_head.lora_B" in name for name in gradients)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=2e-5, rtol=1e-3)


def test_a_lora_on_the_head_is_refused_where_it_cannot_be_scored():
    rows = batch()
    dropped = with_head_lora(LlamaForCausalLM(LlamaConfig(**SIZES)), dropout=0.1)
    add_fused_lm_head(dropped, outputs=OUTPUTS)
    pack_forward(dropped)
    with pytest.raises(UserError, match="--lora_dropout 0"):
        dropped(**rows, fused_lm_head=True)
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo", **SIZES))
    with pytest.raises(UserError, match="model type 'olmo' takes no LoRA on the output head"):
        pack_forward(with_head_lora(other))


def test_a_model_that_swallows_arguments_is_refused():
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    add_fused_lm_head(model, outputs=OUTPUTS)
    assert pack_forward(model)
    real = model.model.forward
    model.model.forward = types.MethodType(lambda self, spans=None, **kwargs: real(**kwargs), model.model)
    with pytest.raises(RuntimeError, match="cannot be packed"):
        model(**batch(), fused_lm_head=True)


def test_a_reference_model_of_its_own_is_packed_too(pico):
    """As TRL keeps one under FSDP: read padded, it would round in another way than the policy."""
    models = [AutoModelForCausalLM.from_pretrained(pico) for _ in range(2)]
    SafeDPOTrainer.pack(types.SimpleNamespace(model=models[0], ref_model=models[1], use_weighting=False))
    assert [model.config._attn_implementation for model in models] == [PACKED] * 2
    weighted = AutoModelForCausalLM.from_pretrained(pico)
    SafeDPOTrainer.pack(types.SimpleNamespace(model=weighted, ref_model=None, use_weighting=True))
    assert weighted.config._attn_implementation != PACKED
