"""The CPU attention gives what torch's own gives, with masks, groups, caches and gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from models.base.attention import NAME, grouped_attention


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_torch(heads, key_heads, masked):
    torch.manual_seed(0)
    q = torch.randn(2, heads, 5, 8, requires_grad=True)
    k, v = (torch.randn(2, key_heads, 7, 8, requires_grad=True) for _ in range(2))
    mask = torch.zeros(2, 1, 5, 7).masked_fill(torch.rand(2, 1, 5, 7) < 0.3, float("-inf")) if masked else None
    if masked:
        mask[..., 0] = 0
    mine, _ = grouped_attention(torch.nn.Identity(), q, k, v, mask, scaling=8**-0.5)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(mine)
    for a, b in zip(torch.autograd.grad((mine * weight).sum(), (q, k, v)),
                    torch.autograd.grad((theirs * weight).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_left_padded_model_answers_as_with_torch_attention(pico):
    ids = torch.randint(5, 200, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    answers = []
    for name in (NAME, "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(pico, attn_implementation=name).eval()
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
            text = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        answers.append((logits, text))
    torch.testing.assert_close(answers[0][0], answers[1][0], atol=1e-4, rtol=1e-4)
    assert torch.equal(answers[0][1], answers[1][1])


@torch.no_grad()
def by_both(model, ids):
    """Logits by the eager kernel and by ours, which stays set."""
    logits = []
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        logits.append(model(input_ids=ids).logits)
    return logits


def test_gemma_2_caps_its_scores():
    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=1, attn_logit_softcapping=0.5,
                          initializer_range=0.5, sliding_window=3)
    model = Gemma2ForCausalLM(config).eval()
    ids = torch.randint(0, 64, (2, 9))
    logits = by_both(model, ids)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    model.config.attn_logit_softcapping = model.model.layers[0].self_attn.attn_logit_softcapping = None
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits, logits[0], atol=1e-2)


def test_sinks_are_those_of_the_eager_kernel():
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=4,
                          initializer_range=0.2)
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, 1.0, 2.0)
    ids = torch.randint(0, 64, (2, 9))
    logits = by_both(model, ids)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    # they count
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.self_attn.sinks, -99.0)
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits, logits[0], atol=1e-2)


def test_scores_that_it_does_not_know_are_refused():
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="position_bias"):
        grouped_attention(torch.nn.Identity(), q, q, q, None, scaling=1.0, position_bias=torch.zeros(1))
