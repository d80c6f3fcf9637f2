"""The rule behind a head: read off a family's row, asked of any other model, refused where no rule gives its logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pico_families import SETTINGS, make_family
from transformers import AutoConfig, AutoModelForCausalLM

from errors import UserError
from models.base import attention
from models.base.attention import NAME, implementation_for
from models.base.families import FAMILIES, family_of
from models.base.heads import LogitRule, answer_logits, logit_rule
from models.base.loading import load_base
from training.answers import AnswerModel

IDS = torch.tensor([[5, 9, 2, 7, 11, 3]])


def made(kind, tmp_path, **settings):
    return load_base(make_family(tmp_path / kind, kind, **settings), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("kind", sorted(SETTINGS))
def test_body_and_head_give_the_models_own_logits(kind, tmp_path):
    model = made(kind, tmp_path).train()
    with torch.no_grad():
        hidden = model.eval().base_model(input_ids=IDS, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(answer_logits(model, hidden), model(IDS).logits[0], atol=1e-5, rtol=1e-5)


def test_the_rules_of_known_families(tmp_path):
    assert logit_rule(made("granite", tmp_path)) == LogitRule(scale=0.25)
    assert logit_rule(made("cohere", tmp_path)) == LogitRule(scale=0.25)
    assert logit_rule(made("gemma2", tmp_path)) == LogitRule(cap=5.0)
    assert logit_rule(made("gemma3_text", tmp_path / "none", final_logit_softcapping=None)) == LogitRule()
    # settings of other families, which its forward never reads
    assert logit_rule(made("llama", tmp_path, logits_scaling=8.0, final_logit_softcapping=1.0)) == LogitRule()


@pytest.mark.parametrize(("settings", "does", "rule"), [
    ({"logit_scale": 0.5}, lambda x: x * 0.5, LogitRule(0.5)),
    ({"logit_scale": 0.5}, lambda x: x, LogitRule()),
    ({"logits_scaling": 4.0}, lambda x: x / 4, LogitRule(0.25)),
    ({"logits_scaling": 4.0}, lambda x: x * 4, LogitRule(4.0)),
    ({"lm_head_multiplier": 2.0, "final_logit_softcapping": 3.0}, lambda x: 3 * torch.tanh(x * 2 / 3), LogitRule(2.0, 3.0)),
])
def test_an_unknown_family_is_asked(settings, does, rule, tmp_path, monkeypatch):
    model = made("gpt_neox", tmp_path, **settings).train()
    real = type(model).forward

    def forward(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        out.logits = does(out.logits)
        return out

    monkeypatch.setattr(type(model), "forward", forward)
    assert logit_rule(model) == rule
    # dropout is off while it is asked, and on again afterwards
    assert model.training


def test_logits_that_no_rule_gives_are_refused(tmp_path, monkeypatch):
    model = made("gpt_neox", tmp_path)
    real = type(model).forward

    def forward(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        out.logits = out.logits.roll(1, -1)
        return out

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(UserError, match=r"model type 'gpt_neox' makes its logits otherwise.*inference.py answers"):
        logit_rule(model)


def test_a_model_without_a_body_of_its_own_is_refused():
    model = SimpleNamespace(config=SimpleNamespace(model_type="odd", get_text_config=lambda: SimpleNamespace(vocab_size=9)),
                            device="cpu", training=False, eval=lambda: None, train=lambda mode: None,
                            get_output_embeddings=lambda: None, base_model=lambda **kwargs: ())
    with pytest.raises(UserError, match="model type 'odd'.*no body and output head"):
        logit_rule(model)


def test_families_that_are_refused_say_what_works():
    with pytest.raises(UserError) as error:
        family_of(SimpleNamespace(model_type="gpt2"))
    said = str(error.value)
    assert all(kind in said for kind in FAMILIES)
    assert "--lora_targets or --tuning full" in said
    with pytest.raises(UserError, match="Its text model is of the known type gemma3_text: give that alone"):
        family_of(AutoConfig.for_model("gemma3"))
    # a config.json as it lies on disk
    with pytest.raises(UserError, match="known type qwen2: give that alone"):
        family_of(SimpleNamespace(model_type="llava", text_config={"model_type": "qwen2"}))


def test_models_that_look_ahead_are_refused(tmp_path):
    with pytest.raises(UserError, match="look ahead .*use_bidirectional_attention"):
        made("gemma3_text", tmp_path, use_bidirectional_attention=True)
    # made in another way, past the door
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gemma3_text")
    for refused in (lambda: family_of(model.config), lambda: AnswerModel(model, torch.float32)):
        with pytest.raises(UserError, match="use_bidirectional_attention is set"):
            refused()


def test_capped_scores_never_meet_a_kernel_without_caps(monkeypatch):
    gpu = torch.device("cuda")
    assert implementation_for(AutoConfig.for_model("gemma2"), gpu) == NAME
    assert implementation_for(AutoConfig.for_model("gemma2", attn_logit_softcapping=None), gpu) == "sdpa"
    assert implementation_for(AutoConfig.for_model("llama"), gpu) == "sdpa"
    # packed without spans, as on a GPU: the layer's own config decides, and its mask is made for the same attention
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "gemma2", vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, attn_logit_softcapping=0.5, query_pre_attn_scalar=1)).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = model(IDS, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]])).logits[:, 1:]
        monkeypatch.setattr(attention, "implementation", lambda device: "sdpa")
        model.set_attn_implementation(attention.PACKED)
        found = model(IDS, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]])).logits[:, 1:]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
