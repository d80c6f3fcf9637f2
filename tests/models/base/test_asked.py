"""Models that load without a complaint and are not what they should be: NaN, tokens that look ahead, padding that counts."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from pico import make_adapter, make_pico
from safetensors.torch import load_file, save_file

from data.prompts import template
from errors import UserError
from models.base.asked import reads_padding
from models.base.loading import base_path, load_base, load_tokenizer
from models.generation import Decoding, answer_batch, check_lengths, stop_ids
from models.runs import Loaded

CPU = torch.device("cpu")
SMALL = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "initializer_range": 0.3}


@pytest.fixture
def base(tmp_path):
    return make_pico(tmp_path / "base")


def of_type(base, name, config):
    """``base`` with random weights of another architecture, its tokenizer kept."""
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        (base / file).unlink()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(transformers, name)(config).save_pretrained(base)
    return base


def settings(base, file="config.json", **changes):
    content = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps(content | changes))


def loaded(base):
    tokenizer = load_tokenizer(base)
    return Loaded(load_base(base, torch.float32, CPU), tokenizer, template("chat", tokenizer), "base", CPU)


def test_nan_in_the_weights(base):
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its logits are NaN"):
        load_base(base, torch.float32, CPU)


def test_models_that_read_both_ways(base):
    of_type(base, "BertForMaskedLM", transformers.BertConfig(**SMALL))
    with pytest.raises(UserError, match="tokens of this BertLMHeadModel look ahead"):
        load_base(base, torch.float32, CPU)


def test_falcon_has_an_attention_of_its_own(base):
    of_type(base, "FalconForCausalLM", transformers.FalconConfig(**SMALL))
    ids = torch.tensor([[5, 17, 60, 99]])
    want = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(load_base(base, torch.float32, CPU)(ids).logits, want, atol=1e-5, rtol=1e-4)


def test_a_kernel_that_the_config_names_need_not_be_there(base):
    settings(base, _attn_implementation="flash_attention_2")
    load_base(base, torch.float32, CPU)


def test_a_model_that_reads_padding_answers_row_by_row(base):
    of_type(base, "RwkvForCausalLM", transformers.RwkvConfig(vocab_size=384, hidden_size=32, attention_hidden_size=32,
                                                             num_hidden_layers=2, context_length=64))
    run, prompts = loaded(base), ["How do I bake bread at home?", "Hi"]
    assert reads_padding(run.model)
    apart = [answer_batch(run, [prompt], Decoding(6), 0)[0] for prompt in prompts]
    assert answer_batch(run, prompts, Decoding(6), 0) == apart


def test_padding_is_nothing_to_a_model_with_a_mask(base):
    of_type(base, "GPT2LMHeadModel", transformers.GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    run = loaded(base)
    assert not reads_padding(run.model)
    # a table of positions ends
    check_lengths(run, ["Hi"], 8)
    with pytest.raises(UserError, match=r"--max_new_tokens 64: the longest prompt .* 64 positions; give at most"):
        check_lengths(run, ["Hi"], 64)


def test_prompts_beyond_the_positions_of_a_model(base):
    settings(base, max_position_embeddings=32)
    run = loaded(base)
    check_lengths(run, ["Hi"], 64)
    with pytest.raises(UserError, match="1 of 2 prompts are longer than the 32 positions of this model"):
        check_lengths(run, ["Hi", "bread " * 40], 8)


@pytest.mark.parametrize("kind", ["no end", "no end, no settings"])
def test_a_tokenizer_without_pad_and_end(base, kind):
    content = json.loads((base / "tokenizer_config.json").read_text())
    for name in ("eos_token", "pad_token"):
        del content[name]
    (base / "tokenizer_config.json").write_text(json.dumps(content))
    want = [1] if kind == "no end" else []
    if not want:
        settings(base, eos_token_id=None, pad_token_id=None)
        (base / "generation_config.json").unlink()
        # nor a special token that its template closes a turn with
        for file in base.glob("chat_template*"):
            file.write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    run, prompts = loaded(base), ["How do I bake bread at home?", "Hi"]
    assert stop_ids(run) == want
    assert answer_batch(run, prompts, Decoding(4), 0) == [answer_batch(run, [p], Decoding(4), 0)[0] for p in prompts]


def test_what_the_template_closes_an_answer_with_ends_it(base):
    # tuned on ChatML over a base that ends texts with another token, as its settings still say
    for file in ("config.json", "generation_config.json"):
        settings(base, file, eos_token_id=2)
    settings(base, "tokenizer_config.json", eos_token="<|pad|>")
    run = loaded(base)
    assert stop_ids(run) == [1, 2]
    run.template = template("alpaca", run.tokenizer)
    assert stop_ids(run) == [2]


@pytest.mark.parametrize(("damage", "says"), [
    (lambda base: make_adapter(base, base.parent / "a").joinpath("adapter_config.json").rename(base / "adapter_config.json"),
     "holds an adapter .* beside a model's weights"),
    (lambda base: (base / "generation_config.json").write_text("{"), r"generation_config.json: cannot be read"),
    (lambda base: settings(base, "generation_config.json", eos_token_id=[1, "</s>"]), r"eos_token_id holds '</s>'"),
    (lambda base: settings(base, num_attention_heads="4"), "its config.json holds what transformers cannot use"),
    (lambda base: settings(base, model_type=["llama"]), "names no model_type"),
    (lambda base: save_file(load_file(base / "model.safetensors") | {
        "model.layers.0.mlp.up_proj.weight": torch.ones(64, 32, dtype=torch.int8)}, base / "model.safetensors"),
     "quantised .*I8 codes"),
])
def test_folders_that_would_be_loaded_as_something_else(base, damage, says):
    damage(base)
    with pytest.raises(UserError, match=says):
        base_path(str(base))


@pytest.mark.parametrize("changes", [{"hidden_act": "foo"}, {"rope_parameters": {"rope_type": "su9", "rope_theta": 1e4}}])
def test_settings_that_no_class_can_be_made_of(base, changes):
    settings(base, **changes)
    with pytest.raises(UserError, match="transformers cannot make a model of it"):
        load_base(base, torch.float32, CPU)
