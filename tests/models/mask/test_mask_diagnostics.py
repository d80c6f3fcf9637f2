"""Numbers and pictures of masks: shares, entropy, agreement, overlap; the command that writes them; the memory plan."""

from __future__ import annotations

import json
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config import PRESETS, parse
from errors import UserError
from flags import AlignArgs, MaskArgs, MaskFiguresArgs
from flags.mask import EXCLUDABLE, GRANULARITIES, RESCALES, RULES
from models.mask import diagnostics, rescale, settings, units
from models.mask.diagnostics import agreement, mask_numbers, module_of, task_overlap
from models.mask.files import Mask, identity, open_models, save_mask
from models.mask.memory import memory_plan
from models.mask.settings import Readout, Rule, Settings
from models.mask.slots import Spec, kind_of, plan
from models.mask.units import Units, units_of


def make_mask(seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    logits = {f"model.layers.{i}.mlp.{m}.weight": torch.randn(400, generator=generator) + shift * i for i in range(3)
              for m in ("up_proj", "down_proj")}
    return Mask(Settings(), logits, {"name": "a"}, ({"name": "t"},), {})


def test_numbers_by_layer_and_module():
    mask = make_mask(shift=2.0)
    found = mask_numbers(mask)
    flat = torch.cat(list(mask.logits.values()))
    assert found["whole"]["kept"] == pytest.approx(float(torch.sigmoid(flat).mean()), abs=1e-6)
    assert found["whole"]["count"] == 2400
    assert found["whole"]["spread"] == pytest.approx(float(flat.std()), rel=1e-3)
    assert found["layers"]["0"]["kept"] < found["layers"]["1"]["kept"] < found["layers"]["2"]["kept"]
    cell, share = found["grid"]["up_proj"]["2"], torch.sigmoid(mask.logits["model.layers.2.mlp.up_proj.weight"])
    assert cell["kept"] == pytest.approx(float(share.mean()), abs=1e-6)
    bits = -(share * share.log2() + (1 - share) * (1 - share).log2())
    assert cell["entropy"] == pytest.approx(float(bits.mean()), abs=1e-5)
    untrained = Mask(Settings(), {"model.norm.weight": torch.zeros(5)}, {}, (), {})
    assert mask_numbers(untrained)["whole"]["entropy"] == 1
    assert mask_numbers(untrained)["layers"] == {"none": mask_numbers(untrained)["whole"]}


def test_agreement_of_masks():
    one, other = make_mask(0), make_mask(1)
    same = agreement({"a": one, "b": one})["pairs"][0]
    assert same["jaccard"] == 1
    assert same["spearman"] == pytest.approx(1)
    apart = agreement({"a": one, "b": other})["pairs"][0]
    assert apart["jaccard"] == pytest.approx(apart["chance"], abs=0.03)
    assert abs(apart["spearman"]) < 0.06
    mirror = Mask(Settings(), {n: -v for n, v in one.logits.items()}, {}, (), {})
    against = agreement({"a": one, "b": mirror}, Readout("threshold", 0.0))["pairs"][0]
    assert against["jaccard"] == 0
    assert against["spearman"] == pytest.approx(-1)
    from scipy.stats import spearmanr

    flat = [torch.cat(list(m.logits.values())).numpy() for m in (one, other)]
    assert apart["spearman"] == pytest.approx(spearmanr(*flat).statistic, abs=1e-9)


def test_agreement_walked_tensor_by_tensor_is_that_of_all_logits_at_once(monkeypatch):
    from scipy.stats import spearmanr

    monkeypatch.setattr(diagnostics, "SAMPLE", 100)
    source = torch.Generator().manual_seed(8)
    sizes = {"a": 701, "none": 0, "b": 3, "c": 400}
    masks = {name: Mask(Settings(), {n: torch.randn(size, generator=source) for n, size in sizes.items()}, {}, (), {})
             for name in ("one", "two")}
    (pair,) = agreement(masks, Readout("threshold", 0.3))["pairs"]
    one, two = (torch.cat(list(mask.logits.values())) for mask in masks.values())
    assert pair["jaccard"] == int(((one > 0.3) & (two > 0.3)).sum()) / int(((one > 0.3) | (two > 0.3)).sum())
    p, q = (float((flat > 0.3).double().mean()) for flat in (one, two))
    assert pair["chance"] == p * q / (p + q - p * q)
    assert pair["spearman"] == pytest.approx(spearmanr(one[::11], two[::11]).statistic, abs=1e-12)


def test_untrained_masks_agree_by_chance_whatever_the_read_out():
    masks = {name: Mask(Settings(), {"x": torch.zeros(40_000)}, {}, (), {}) for name in "ab"}
    for readout in (Readout("hard"), Readout("soft"), Readout("average", 1)):
        (pair,) = agreement(masks, readout)["pairs"]
        assert pair["jaccard"] == pytest.approx(pair["chance"], abs=0.02)


def test_heads_of_a_lora_factor_lie_on_the_weights_side_only():
    config = {"head_dim": 4}
    for rank in (4, 8, 6):  # also where the rank happens to be a multiple of the head's size
        q, o = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"
        assert units_of(q, (16, rank), "head", 1, config, "B").grid == (4, 1)
        assert units_of(q, (rank, 32), "head", 1, config, "A").grid == (rank, 1)
        assert units_of(o, (rank, 16), "head", 1, config, "A").grid == (1, 4)
        assert units_of(o, (32, rank), "head", 1, config, "B").grid == (32, 1)


def test_masks_of_other_shapes_are_not_compared():
    other = Mask(Settings(), {"x": torch.zeros(3)}, {}, (), {})
    with pytest.raises(UserError, match="b: masks other tensors"):
        agreement({"a": make_mask(), "b": other})
    with pytest.raises(UserError, match="two"):
        agreement({"a": make_mask()})


@pytest.fixture
def trained(pico, make_adapter, tmp_path):
    """Two hand-made masks over two adapters of the base."""
    outputs = tmp_path / "outputs"
    for seed, name in enumerate(("one", "two")):
        make_adapter(pico, outputs / name, seed=seed)
    args = SimpleNamespace(results=tmp_path, cache_dir=None, model_name_or_path=str(pico))
    with ExitStack() as stack:
        aligned, tasks = open_models(args, "", ("one", "two"), False, stack)
        what = Settings(rule=Rule("task_arithmetic", 0.3))
        specs = plan(what, aligned, tasks)
        for seed in (1, 2):
            generator = torch.Generator().manual_seed(seed)
            save_mask(outputs / f"m{seed}", what, {s.name: torch.randn(s.units.size, generator=generator) for s in specs},
                      identity(aligned), [identity(t) for t in tasks], {"steps": 1})
    return args


def test_overlap_of_tasks(trained):
    from models.mask.export import open_mask

    with ExitStack() as stack:
        mask, aligned, tasks = open_mask(trained.results / "outputs" / "m1", trained, stack)
        found = task_overlap(mask, aligned, tasks)
        ones = Mask(mask.settings, {n: torch.full_like(v, 90.0) for n, v in mask.logits.items()}, {}, (), {})
        whole = task_overlap(ones, aligned, [tasks[0], tasks[0]])
    assert all(0.4 < share < 0.6 for share in found["kept_energy"].values())
    assert abs(found["pairs"][0]["cosine"]) < 0.2
    assert 0.3 < found["pairs"][0]["same_sign"] < 0.7
    assert whole["pairs"][0]["cosine"] == pytest.approx(1)
    assert whole["pairs"][0]["same_sign"] == pytest.approx(1)
    assert whole["kept_energy"] == {"one": pytest.approx(1)}


def test_the_command_writes_numbers_and_pictures(trained, pico, capsys):
    from evaluator.mask_figures import main

    main(["--masks", "m1,m2", "--output_dir", str(trained.results), "--model_name_or_path", str(pico)])
    folder = trained.results / "masks" / "masks"
    content = json.loads((folder / "masks.json").read_text())
    assert set(content["masks"]) == {"m1", "m2"}
    assert content["masks"]["m1"]["overlap"]["kept_energy"].keys() == {"one", "two"}
    assert len(content["agreement"]["pairs"]) == 1
    for name in ("m1.png", "m1_overlap.png", "m2.png", "m2_overlap.png", "agreement.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "agreement.png" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["--masks", "m1,none", "--output_dir", str(trained.results), "--model_name_or_path", str(pico)])
    assert stopped.value.code == 2
    assert "holds no mask" in capsys.readouterr().err


@pytest.mark.parametrize(("logits", "says"), [
    ({}, "m: holds no logits, so nothing can be measured"), ({"model.norm.weight": torch.zeros(0)}, "m: holds no logits"),
    ({"model.norm.weight": torch.tensor([1.0, float("nan")])}, "m: logits of model.norm.weight and 0 more tensors are not"),
])
def test_a_mask_without_numbers_is_named(tmp_path, capsys, logits, says):
    from evaluator.mask_figures import main

    facts = {"name": "a", "folder": "a", "base": "x", "adapter": None}
    save_mask(tmp_path / "outputs" / "m", Settings(), logits, facts, [facts], {})
    save_mask(tmp_path / "outputs" / "n", Settings(), logits, facts, [facts], {})
    with pytest.raises(SystemExit) as stopped:
        main(["--masks", "m", "--output_dir", str(tmp_path), "--overlap", "false"])
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
    with pytest.raises(UserError, match=says.partition(" ")[0]):
        agreement({name: Mask(Settings(), logits, {}, (), {}) for name in "mn"})


def test_an_empty_tensor_beside_others_does_not_count():
    mask = Mask(Settings(), {"a.weight": torch.zeros(0), "b.weight": torch.full((4,), 2.0)}, {}, (), {})
    assert mask_numbers(mask)["whole"]["kept"] == pytest.approx(float(torch.sigmoid(torch.tensor(2.0))))
    assert list(mask_numbers(mask)["grid"]) == ["b"]


def test_what_stands_where_in_the_picture_of_overlap(tmp_path, monkeypatch):
    from evaluator import mask_figures

    drawn = []
    monkeypatch.setattr(mask_figures, "_picture", lambda panels, *more: drawn.append((panels[0].values, *more)))
    mask_figures.overlap_matrix({"kept_energy": {"a": 0.6, "b": 0.4}, "pairs": [
        {"one": "a", "two": "b", "cosine": 0.1, "same_sign": 0.55}]}, tmp_path / "x.png", "m")
    mask_figures.agreement_matrix({"readout": "hard", "pairs": [
        {"one": "a", "two": "b", "jaccard": 0.3, "chance": 0.33, "spearman": None}]}, ["a", "b"], tmp_path / "y.png")
    (overlap, across, down, *_), (agree, *_) = drawn
    assert (overlap.tolist(), across, down) == ([[0.6, 0.1], [0.55, 0.4]], ["a", "b"], ["a", "b"])
    assert agree[0, 1] == 0.3
    assert np.isnan([agree[1, 0], agree[0, 0], agree[1, 1]]).all()


def test_pictures_of_nothing(tmp_path):
    from evaluator.mask_figures import agreement_matrix, mask_heatmaps

    nothing = float("nan")
    for grid in ({}, {"up_proj": {}}, {"up_proj": {"0": {"kept": nothing, "entropy": nothing}}}):
        assert mask_heatmaps(grid, tmp_path / "x.png", "nothing").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least two masks"):
        agreement_matrix({"pairs": [], "readout": "hard"}, ["m"], tmp_path / "y.png")


def test_kinds_and_exclusion(trained, pico):
    assert [kind_of(n) for n in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight",
                                 "model.norm.weight", "model.layers.0.mlp.up_proj.weight")] == [
        "embeddings", "head", "norms", "norms", "matrix"]
    assert module_of("model.layers.0.mlp.up_proj.lora_A") == "up_proj A"
    assert module_of("model.norm.weight") == "norm"


def test_the_memory_plan_counts_bytes():
    """Spec 4.7: base 2 + task vector 2 + live 2 + logits 2 + gradient 2 + state 4 = 14 bytes with bfloat16 throughout."""
    shape = (1000, 100)
    spec = Spec("w", "w", "weight", shape, Units(shape))
    small = memory_plan([spec], Rule(), 1, 2, 2, 200_000, 2)
    assert small.per_scalar == 14
    assert small.held["frozen weights"] == 2 * 100_000
    assert memory_plan([spec], Rule(), 1, 4, 4, 100_000, 4).per_scalar == 28
    assert memory_plan([spec], Rule("ties", 0.4), 3, 4, 4, 100_000, 4).per_scalar == 36
    rows = memory_plan([Spec("w", "w", "weight", shape, Units(shape, 1, 100))], Rule(), 1, 2, 4, 100_000, 2)
    assert rows.per_scalar == pytest.approx(6.16)
    assert "14.0 bytes" in small.lines()[1]


def test_flags_name_what_the_models_know():
    assert (RULES, GRANULARITIES, RESCALES, EXCLUDABLE) == (
        settings.RULES, units.GRANULARITIES, rescale.RESCALES, settings.EXCLUDABLE)
    assert type(parse(AlignArgs, ["--method", "mask", "--tasks", "x"]).args) is MaskArgs
    assert type(parse(AlignArgs, ["--method=mask", "--tasks", "x"]).args) is MaskArgs
    assert not isinstance(parse(AlignArgs, ["--moe_flag", "0", "--method", "dpo", "--run_name", "mask"]).args, MaskArgs)
    args = parse(MaskArgs, ["--method", "mask", "--tasks", "a,b", "--merge_rule", "ties", "--mask_exclude", "none"]).args
    assert args.name == "mask_a_b"
    assert args.excluded == ()
    assert args.learning_rate == 5e-3


@pytest.mark.parametrize("preset", sorted(p.stem for p in PRESETS.glob("*.yaml") if "\nalign_mask:" in p.read_text()))
def test_presets_with_a_section_for_masks(preset):
    assert parse(MaskArgs, ["--method", "mask", "--tasks", "a", "--preset", preset]).args.moe_flag == 0
    assert parse(MaskFiguresArgs, ["--masks", "a", "--preset", preset]).args.mask_names == ("a",)
