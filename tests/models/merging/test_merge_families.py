"""Merges of other families than Llama: the written folder, loaded by transformers, is the model built by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import fuse

SMALL = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64, initializer_range=0.2)
IDS = torch.arange(1, 21)[None]


def save(kind: str, folder: Path, seed: int = 0, **settings) -> torch.nn.Module:
    """A random model of a type, saved; returned in evaluation mode."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    torch.manual_seed(seed)
    # eager: sliding windows are the mask's, whatever the kernel
    config = CONFIG_MAPPING[kind](**settings, attn_implementation="eager")
    auto = {"t5": AutoModelForSeq2SeqLM, "llava": AutoModelForImageTextToText}.get(kind, AutoModelForCausalLM)
    model = auto.from_config(config, attn_implementation="eager").eval()
    # norms start at one in every model, and equal tensors prove nothing
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model


def load(folder: Path, auto: str = "AutoModelForCausalLM") -> torch.nn.Module:
    import transformers

    model, said = getattr(transformers, auto).from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    return model.eval()


def mean(tmp_path: Path, *words: str) -> Path:
    fuse.main(["merge", "--method", "linear", "--models", f"{tmp_path / 'a'},{tmp_path / 'b'}", "--output_dir",
               str(tmp_path / "r"), *words])
    return tmp_path / "r" / "outputs" / "merged"


def stacked(tmp_path: Path, *ranges: tuple[str, int, int]) -> Path:
    slices = "".join(f"  - sources: [{{model: {tmp_path / m}, layer_range: [{low}, {high}]}}]\n" for m, low, high in ranges)
    (tmp_path / "r.yml").write_text(f"slices:\n{slices}merge_method: passthrough\n")
    fuse.main(["merge", "--recipe", str(tmp_path / "r.yml"), "--output_dir", str(tmp_path / "r")])
    return tmp_path / "r" / "outputs" / "merged"


def change(folder: Path, **settings) -> None:
    """Settings of a config.json; None takes one out."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def halfway(one: torch.nn.Module, two: torch.nn.Module) -> torch.nn.Module:
    """The model with the mean of both states, without a file."""
    out, other = copy.deepcopy(one), two.state_dict()
    out.load_state_dict({k: (v + other[k]) / 2 if v.is_floating_point() else v for k, v in one.state_dict().items()})
    return out


DEEPSEEK = SMALL | dict(num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
                        topk_group=1, moe_intermediate_size=16, n_shared_experts=1, kv_lora_rank=8, q_lora_rank=8,
                        qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4)
WHOLE = {
    "gpt_neox": dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False),
    "gpt2": dict(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
    "deepseek_v3": DEEPSEEK,
    "phi3": SMALL | dict(num_hidden_layers=2, pad_token_id=0),
    "qwen2": SMALL | dict(num_hidden_layers=2, tie_word_embeddings=False),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_merge_is_the_mean_of_the_models(tmp_path, kind):
    one, two = (save(kind, tmp_path / name, seed, **WHOLE[kind]) for seed, name in enumerate("ab"))
    out = mean(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load(out)(IDS).logits, halfway(one, two)(IDS).logits, rtol=1e-5, atol=1e-5)
    before, after = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "a", out))
    # a configuration is the anchor's: nothing is invented
    assert {k: v for k, v in before.items() if after.get(k) != v} == {}


def test_an_encoder_of_another_depth_than_its_decoder(tmp_path):
    settings = dict(vocab_size=96, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=3, num_decoder_layers=2,
                    decoder_start_token_id=0)
    one, two = (save("t5", tmp_path / name, seed, **settings) for seed, name in enumerate("ab"))
    # an older transformers wrote the shared embedding once for each user of it
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    tensors |= {f"{part}.embed_tokens.weight": tensors["shared.weight"].clone() for part in ("encoder", "decoder")}
    save_file(tensors, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    out = load(mean(tmp_path), "AutoModelForSeq2SeqLM")
    with torch.no_grad():
        torch.testing.assert_close(out(input_ids=IDS, decoder_input_ids=IDS).logits,
                                   halfway(one, two)(input_ids=IDS, decoder_input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


LLAVA = dict(
    text_config=dict(model_type="llama", **SMALL, num_hidden_layers=3, tie_word_embeddings=False),
    vision_config=dict(model_type="clip_vision_model", hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                       num_attention_heads=2, image_size=16, patch_size=8, projection_dim=16),
    image_token_index=95, tie_word_embeddings=False)


@pytest.fixture
def llava(tmp_path):
    return tmp_path, [save("llava", tmp_path / name, seed, **LLAVA) for seed, name in enumerate("ab")]


def test_a_vision_tower_and_nested_settings(llava):
    tmp_path, (one, two) = llava
    out = mean(tmp_path, "--out_dtype", "float32")
    want, got = halfway(one, two).state_dict(), load(out, "AutoModelForImageTextToText").state_dict()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
    config = json.loads((out / "config.json").read_text())
    assert "num_hidden_layers" not in config
    assert config["text_config"]["num_hidden_layers"] == 3


def test_slices_of_a_nested_model_pick_the_layers_of_words(llava):
    tmp_path, (one, _) = llava
    out = stacked(tmp_path, ("a", 0, 3), ("b", 1, 3))
    config = json.loads((out / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 5
    assert "num_hidden_layers" not in config
    assert config["vision_config"]["num_hidden_layers"] == 2
    model = load(out, "AutoModelForImageTextToText")
    assert len(model.model.language_model.layers) == 5
    torch.testing.assert_close(model.model.vision_tower.state_dict(), one.model.vision_tower.state_dict())


def test_slices_of_an_encoder_and_decoder_are_refused(tmp_path, capsys):
    save("t5", tmp_path / "a", vocab_size=96, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2)
    with pytest.raises(SystemExit):
        stacked(tmp_path, ("a", 0, 1))
    assert "encoder.block." in (said := capsys.readouterr().err)
    assert "without layer_range" in said


def by_hand(models: dict[str, torch.nn.Module], picked: list[tuple[str, int]]) -> torch.nn.Module:
    """The first model with these layers in their order, each with the settings that it had."""
    first = next(iter(models.values()))
    out = copy.deepcopy(first)
    out.model.layers = torch.nn.ModuleList(copy.deepcopy(models[m].model.layers[i]) for m, i in picked)
    for config in {id(c): c for c in (out.config, out.model.config)}.values():
        config.num_hidden_layers = len(picked)
        for key in ("layer_types", "no_rope_layers"):
            if isinstance(getattr(config, key, None), list):
                setattr(config, key, [getattr(models[m].config, key)[i] for m, i in picked])
    return out


#: type -> settings of a model of six layers whose kinds a stack of 0..3 and 2..6 gives another order
LAYERED = {
    "gemma2": dict(sliding_window=4, head_dim=8),
    "gemma3_text": dict(sliding_window=4, head_dim=8, sliding_window_pattern=3),
    "qwen2": dict(use_sliding_window=True, sliding_window=4, max_window_layers=3),
    "cohere2": dict(sliding_window=4, sliding_window_pattern=2, pad_token_id=0),
    "smollm3": dict(no_rope_layer_interval=3, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "olmo3": dict(sliding_window=4, pad_token_id=0, bos_token_id=1, eos_token_id=2),
}


@pytest.mark.parametrize("listed", [True, False], ids=["lists written", "lists implied"])
@pytest.mark.parametrize("kind", LAYERED)
def test_slices_keep_the_kind_of_every_layer(tmp_path, kind, listed):
    settings = SMALL | dict(num_hidden_layers=6) | LAYERED[kind]
    models = {name: save(kind, tmp_path / name, seed, **settings) for seed, name in enumerate("ab")}
    if not listed:
        for name in "ab":
            change(tmp_path / name, layer_types=None, no_rope_layers=None, _sliding_window_pattern=None,
                   sliding_window_pattern=LAYERED[kind].get("sliding_window_pattern"))
    # layers 0, 1, 2 of one and 2, 3, 4, 5 of the other
    out = load(stacked(tmp_path, ("a", 0, 3), ("b", 2, 6)))
    hand = by_hand(models, [("a", 0), ("a", 1), ("a", 2), ("b", 2), ("b", 3), ("b", 4), ("b", 5)])
    if hasattr(hand, "lm_head") and not hand.config.tie_word_embeddings:
        hand.model.norm, hand.lm_head = models["b"].model.norm, models["b"].lm_head
    else:
        hand.model.norm = models["b"].model.norm
    with torch.no_grad():
        torch.testing.assert_close(out(IDS, use_cache=False).logits, hand(IDS, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_slices_move_the_number_of_dense_layers(tmp_path):
    save("deepseek_v3", tmp_path / "a", **DEEPSEEK)
    out = stacked(tmp_path, ("a", 0, 1), ("a", 0, 3))
    assert json.loads((out / "config.json").read_text())["first_k_dense_replace"] == 2
    assert len(load(out).model.layers) == 4


def test_slices_that_no_setting_can_say_are_refused(tmp_path, capsys):
    save("deepseek_v3", tmp_path / "a", **DEEPSEEK)
    with pytest.raises(SystemExit):
        stacked(tmp_path, ("a", 0, 2), ("a", 0, 3))
    said = capsys.readouterr().err
    assert "first_k_dense_replace 1" in said
    assert ".x.xx" in said
    assert not (tmp_path / "r").exists()


def test_a_gpt2_slice_counts_its_layers_by_its_own_name(tmp_path):
    save("gpt2", tmp_path / "a", **WHOLE["gpt2"])
    config = json.loads((stacked(tmp_path, ("a", 0, 2), ("a", 1, 2)) / "config.json").read_text())
    assert config["n_layer"] == 3
    assert "num_hidden_layers" not in config
