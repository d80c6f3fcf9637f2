"""What a configuration says by layer, when slices give the layers another order: values, numbers, rules."""

from __future__ import annotations

import pytest

from errors import UserError
from models.merging.layer_settings import mixed, sliced


def picked(part: dict, layers: list[int], other: dict | None = None) -> dict:
    """``other``: the settings of a second model, of which the last layer comes."""
    origins = [("a", layer) for layer in layers]
    if other is not None:
        origins[-1] = ("b", origins[-1][1])
    return sliced({"a": part, "b": part if other is None else other}, "a", origins)


@pytest.mark.parametrize(("settings", "layers", "want"), [
    # a value for each layer, whatever it is called
    ({"layers_block_type": ["mamba", "attention", "mamba", "mamba"]}, [1, 1, 3], {
        "layers_block_type": ["attention", "attention", "mamba"]}),
    ({"num_kv_heads": [1, 2, 3, 4], "ffn_multipliers": [0.5, 1, 2, 4]}, [3, 0], {
        "num_kv_heads": [4, 1], "ffn_multipliers": [4, 0.5]}),
    ({"no_rope_layers": [1, 0, 1, 0]}, [1, 2, 3], {"no_rope_layers": [0, 1, 0]}),
    # numbers of layers
    ({"mlp_only_layers": [0, 3]}, [3, 1, 3, 2], {"mlp_only_layers": [0, 2]}),
    ({"cross_attention_layers": [1]}, [0, 1, 1], {"cross_attention_layers": [1, 2]}),
    # rules that still hold
    ({"decoder_sparse_step": 2}, [0, 1, 2, 3, 2, 3], {"decoder_sparse_step": 2}),
    ({"attn_layer_period": 2, "attn_layer_offset": 1}, [2, 3, 0, 1], {"attn_layer_period": 2, "attn_layer_offset": 1}),
    # thresholds that move
    ({"first_k_dense_replace": 1}, [0, 0, 2, 3], {"first_k_dense_replace": 2}),
    ({"first_k_dense_replace": 2}, [2, 3], {"first_k_dense_replace": 0}),
    ({"first_k_dense_replace": 3}, [0, 1], {"first_k_dense_replace": 3}),
    # of no account without windows
    ({"max_window_layers": 2, "use_sliding_window": False}, [2, 0], {"max_window_layers": 2}),
    # about something else, though as long as the model is deep
    ({"eos_token_id": [1, 2, 3, 4], "architectures": ["X"]}, [1, 2], {"eos_token_id": [1, 2, 3, 4]}),
])
def test_settings_follow_their_layers(settings, layers, want):
    made = picked({"num_hidden_layers": 4} | settings, layers)
    assert {key: made[key] for key in want} == want
    assert made["num_hidden_layers"] == len(layers)


@pytest.mark.parametrize(("settings", "layers", "says"), [
    ({"decoder_sparse_step": 2}, [1, 0], "decoder_sparse_step 2"),
    ({"attn_layer_period": 2, "attn_layer_offset": 1}, [0, 0, 1], "attn_layer_period 2"),
    ({"first_k_dense_replace": 1}, [0, 1, 0, 1], "first_k_dense_replace 1"),
    ({"moe_layer_start_index": 2}, [1, 2, 3], "moe_layer_start_index 2"),
    ({"num_kv_shared_layers": 2}, [0, 1, 2], "num_kv_shared_layers 2"),
    ({"scale_attn_by_inverse_layer_idx": True}, [2, 3], "scale_attn_by_inverse_layer_idx"),
    ({"attn_layers": [[0, 1], [2]]}, [1, 2], "attn_layers"),
    ({"skipped_layers": [7]}, [1, 2], "skipped_layers"),
])
def test_what_no_setting_can_say_is_refused(settings, layers, says):
    with pytest.raises(UserError, match=says) as refused:
        picked({"num_hidden_layers": 4} | settings, layers)
    assert "without layer_range" in str(refused.value)


def test_all_layers_in_their_order_change_nothing():
    part = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "unknown_pattern": 3, "layer_types": list("abcd")}
    assert picked(part, [0, 1, 2, 3]) == part


def test_each_layer_takes_the_value_of_its_own_model():
    part, other = ({"num_hidden_layers": 2, "layer_types": kinds} for kinds in (["x", "y"], ["x", "z"]))
    assert picked(part, [0, 1, 1], other)["layer_types"] == ["x", "y", "z"]
    with pytest.raises(UserError, match="layer_types has no value"):
        picked(part, [0, 1, 1], {"num_hidden_layers": 2})


def test_layers_of_two_kinds_that_become_one_are_named():
    parts = dict.fromkeys("ab", {"num_hidden_layers": 2, "layer_types": ["x", "y"]})
    assert mixed(parts, [("a", 0), ("b", 0)]) is None
    assert mixed(parts, [("a", 0), ("b", 1)]) == "layer_types x in layer 0 of a, y in layer 1 of b"


def test_attention_of_gpt_neo_is_written_its_way():
    part = {"model_type": "gpt_neo", "num_layers": 4, "attention_types": [[["global", "local"], 2]], "hidden_size": 32,
            "num_heads": 4}
    made = picked(part, [0, 2, 3])
    assert made["attention_types"] == [[["global", "global", "local"], 1]]
    assert made["num_layers"] == 3
