"""--compat peft against PEFT's own add_weighted_adapter on a pico Llama: the same numbers for all eleven types."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from models.adapters import fuse as fusion
from models.adapters.files import read_adapter
from models.fuse import main

TYPES = ("cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
DENSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")


@pytest.fixture(scope="module")
def sources(pico, make_adapter, tmp_path_factory):
    """Two adapters of rank 4 on attention and FFN; the second has rsLoRA, an alpha pattern and no down projection."""
    results = tmp_path_factory.mktemp("peft")
    make_adapter(pico, results / "outputs" / "one", seed=1, alpha=8, targets=("q_proj", "down_proj", "up_proj"))
    make_adapter(pico, results / "outputs" / "two", seed=2, alpha=3, targets=("q_proj", "up_proj"), use_rslora=True,
                 alpha_pattern={"layers.1.self_attn.q_proj": 5})
    return results


def peft_says(pico, results, kind, weights, density=0.5, **options):
    """PEFT's factors and changes: module -> (A, B, scale x B A)."""
    model = AutoModelForCausalLM.from_pretrained(pico)
    model = PeftModel.from_pretrained(model, results / "outputs" / "one", adapter_name="one")
    model.load_adapter(results / "outputs" / "two", adapter_name="two")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.base_model.add_weighted_adapter(["one", "two"], list(weights), "both", kind, density=density, **options)
    state = get_peft_model_state_dict(model, adapter_name="both", save_embedding_layers=False)
    found = {}
    for key in state:
        if "lora_A" in key:
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a, b = state[key], state[key.replace("lora_A", "lora_B")]
            found[module] = (a, b, b @ a)
    return found


def we_say(pico, results, *flags):
    main(["adapters", "--adapters", "one,two", "--compat", "peft", "--model_name_or_path", str(pico), "--output_dir",
          str(results), "--run_name", "ours", "--overwrite", "--report", "false", *flags])
    return read_adapter(results / "outputs" / "ours").modules


@pytest.fixture
def same_masks(monkeypatch):
    """PEFT and we drop the same entries: a mask that follows from the shape alone."""
    def mask(shape):
        return (torch.arange(torch.Size(shape).numel()) % 3 > 0).float().view(shape)

    monkeypatch.setattr(torch, "bernoulli", lambda full: mask(full.shape))
    monkeypatch.setattr(fusion, "_draw", lambda seed, module, which, shape: 1 - mask(shape))


@pytest.mark.parametrize("weights", ["0.6,0.4", "0.7,-0.5"])
@pytest.mark.parametrize("kind", TYPES)
def test_types_on_factors(pico, sources, same_masks, kind, weights):
    theirs = peft_says(pico, sources, kind, map(float, weights.split(",")))
    density = ("--density", "0.5") if kind in DENSE else ()
    ours = we_say(pico, sources, "--method", kind, "--weights", weights, *density)
    assert set(ours) == set(theirs)
    for module, (a, b, change) in theirs.items():
        torch.testing.assert_close(ours[module][1] @ ours[module][0], change, atol=2e-5, rtol=1e-4)
        if kind not in ("cat", "svd"):
            torch.testing.assert_close(ours[module][0], a, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(ours[module][1], b, atol=1e-6, rtol=1e-5)
        if kind == "cat":
            rank = ours[module][0].shape[0]
            torch.testing.assert_close(ours[module][0], a[:rank], atol=1e-6, rtol=1e-5)
            assert not a[rank:].any()


@pytest.mark.parametrize("kind", DENSE)
def test_types_on_dense_changes(pico, sources, same_masks, kind):
    theirs = peft_says(pico, sources, f"{kind}_svd", (0.6, 0.4), svd_rank=5)
    ours = we_say(pico, sources, "--method", kind, "--weights", "0.6,0.4", "--density", "0.5", "--space", "dense",
                  "--rank", "5")
    for module, (a, b, change) in theirs.items():
        torch.testing.assert_close(ours[module][1] @ ours[module][0], change, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(ours[module][0].norm(dim=1), a.norm(dim=1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours[module][1].norm(dim=0), b.norm(dim=0), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_both_ways_to_elect_signs(pico, sources, method):
    theirs = peft_says(pico, sources, "ties", (0.6, 0.4), density=0.8, majority_sign_method=method)
    ours = we_say(pico, sources, "--method", "ties", "--weights", "0.6,0.4", "--density", "0.8",
                  "--majority_sign_method", method)
    for module, (a, b, _) in theirs.items():
        torch.testing.assert_close(ours[module][0], a, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours[module][1], b, atol=1e-6, rtol=1e-5)


def test_the_default_rank_of_svd_is_the_largest_anywhere(pico, sources):
    theirs = peft_says(pico, sources, "svd", (0.6, 0.4))
    ours = we_say(pico, sources, "--method", "svd", "--weights", "0.6,0.4")
    assert {a.shape[0] for a, _ in ours.values()} == {a.shape[0] for a, _, _ in theirs.values()} == {4}


def test_peft_linear_has_cross_terms_and_ours_has_not(pico, sources):
    one, two = (read_adapter(sources / "outputs" / n).modules for n in ("one", "two"))
    peft = we_say(pico, sources, "--method", "linear", "--weights", "0.6,0.4")
    main(["adapters", "--adapters", "one,two", "--weights", "0.6,0.4", "--method", "linear", "--rank", "8", "--output_dir",
          str(sources), "--run_name", "exact", "--overwrite"])
    exact = read_adapter(sources / "outputs" / "exact").modules
    for module in two:
        want = 0.6 * one[module][1] @ one[module][0] + 0.4 * two[module][1] @ two[module][0]
        assert (exact[module][1] @ exact[module][0] - want).norm() < 1e-5 * want.norm()
        assert (peft[module][1] @ peft[module][0] - want).norm() > 0.5 * want.norm()


def test_unequal_ranks_are_refused_where_peft_refuses_them(pico, sources, make_adapter, capsys):
    make_adapter(pico, sources / "outputs" / "wide", r=6, targets=("q_proj",))
    words = ["adapters", "--adapters", "one,wide", "--compat", "peft", "--output_dir", str(sources), "--run_name", "none"]
    with pytest.raises(SystemExit):
        main([*words, "--method", "linear"])
    assert "ranks must be equal (model.layers.0.self_attn.q_proj: one: 4, wide: 6)" in capsys.readouterr().err
    main([*words, "--method", "svd"])
