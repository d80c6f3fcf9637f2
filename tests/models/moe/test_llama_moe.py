"""The command that fuses: each expert is its aligned model, wrong input is refused, the file on disk is the model.

Tests named ``test_s1_...`` show that a defect of the original's merge script (spec sections 4.2 and 9.1) cannot happen.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from itertools import combinations

import pytest
import torch
from peft import PeftModel
from pico import make_pico
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data.records import Record
from errors import UserError
from flags import InferenceArgs
from models.adapters.files import read_adapter
from models.checkpoints.fingerprints import fingerprint
from models.llama_moe import main
from models.moe.files import add_tuning, assemble, load_moe, moe_layers, read_config, save_moe
from models.moe.layer import PROJECTIONS, TuningConfig
from models.runs import load_run

OBJECTIVES, CPU = ("helpfulness", "safety", "truthfulness"), torch.device("cpu")
WEIGHTS, RAW = "adapter_model.safetensors", "raw_moe"
IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def build(results, base, experts, *flags):
    """Run the command; returns the folder of the fused model."""
    main(["--model_name_or_path", str(base), "--output_dir", str(results), "--experts", ",".join(map(str, experts)),
          "--router_init", "random", "--device", "cpu", "--dtype", "float32", "--threads", "2", *flags])
    return results / "outputs" / RAW


@pytest.fixture(scope="module")
def folders(adapters):
    return [adapters / "outputs" / name for name in OBJECTIVES]


@pytest.fixture(scope="module")
def fused(folders, pico, tmp_path_factory):
    return build(tmp_path_factory.mktemp("fused"), pico, folders)


def loaded(folder, base, **options):
    return assemble(folder, InferenceArgs(model_name_or_path=str(base)), torch.float32, CPU, **options)[0]


def peft_merged(base, folder):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    return model.merge_and_unload().state_dict()


def experts_of(model):
    """Per expert: {tensor name in the dense model: materialised matrix}."""
    layers = moe_layers(model)
    return [{f"model.layers.{i}.mlp.{kind}_proj.weight": matrix for i, layer in enumerate(layers)
             for kind, matrix in layer.materialise(e).items()} for e in range(layers[0].num_experts)]


@pytest.fixture
def refused(capsys, tmp_path):
    """Build in a fresh results folder, expect exit code 2 and nothing left; returns what was said."""
    def run(base, experts, *flags):
        with pytest.raises(SystemExit) as stop:
            build(tmp_path / "results", base, experts, *flags)
        assert stop.value.code == 2
        outputs = tmp_path / "results" / "outputs"
        assert not outputs.exists() or not list(outputs.iterdir())
        return capsys.readouterr().err
    return run


def copied(source, target, change=None, config=None):
    """A copy of an adapter with changed tensors and changed adapter_config.json entries."""
    shutil.copytree(source, target)
    if change:
        save_file({k: v.contiguous() for k, v in change(load_file(target / WEIGHTS)).items()}, target / WEIGHTS)
    if config:
        path = target / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | config), encoding="utf-8")
    return target


def test_every_expert_is_its_peft_model_tensor_by_tensor(fused, pico, folders):
    built = experts_of(loaded(fused, pico))
    for expert, folder in zip(built, folders, strict=True):
        merged = peft_merged(pico, folder)
        assert len(expert) == 6
        for name, matrix in expert.items():
            assert torch.allclose(matrix, merged[name], atol=1e-6), name


def test_everything_else_is_the_base(fused, pico):
    base = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).state_dict()
    mine = loaded(fused, pico).state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in base.items())
    assert {n.rsplit(".", 1)[-1] for n in set(mine) - set(base)} <= {"router", "a", "b"}


def test_s1_experts_are_never_aliased(fused, pico):
    """The original put one tensor into all three slots: base + delta_H + delta_S + delta_T."""
    model = loaded(fused, pico)
    base = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).state_dict()
    before = experts_of(model)
    for one, two in combinations(before, 2):
        assert all((one[name] - two[name]).norm() > 0.1 * one[name].norm() for name in one)
    for name in before[0]:
        summed = base[name] + sum(expert[name] - base[name] for expert in before)
        assert not any(torch.allclose(expert[name], summed, atol=1e-2) for expert in before)
    with torch.no_grad():
        for layer in moe_layers(model):
            for kind in PROJECTIONS:
                layer.experts[kind].b[0] += 1
    after = experts_of(model)
    assert not any(torch.allclose(before[0][name], after[0][name]) for name in before[0])
    assert all(torch.equal(before[e][name], after[e][name]) for e in (1, 2) for name in before[e])


@pytest.mark.parametrize("expert", range(3))
def test_s1_lora_scale_is_never_dropped(fused, pico, folders, expert):
    """The original added B A instead of (alpha / r) B A."""
    base = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).state_dict()
    tensors = load_file(folders[expert] / WEIGHTS)
    for name, matrix in experts_of(loaded(fused, pico))[expert].items():
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        product = tensors[f"{stem}B.weight"] @ tensors[f"{stem}A.weight"]
        assert torch.allclose(matrix - base[name], 0.5 * product, atol=1e-5)
        assert not torch.allclose(matrix - base[name], product, atol=1e-2)


def test_s1_adapters_never_meet_another_base(folders, tmp_path, refused):
    """The original added deltas of the base model onto its chat sibling: same shapes, other weights."""
    other = make_pico(tmp_path / "chat", seed=1)
    said = refused(other, folders)
    assert "trained on another base" in said
    assert "--model_name_or_path" in said


def test_s1_config_constants_come_from_the_checkpoint(pico, folders, tmp_path):
    """The original built a default config: eps 1e-6 and 2048 positions whatever the base has."""
    base = shutil.copytree(pico, tmp_path / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config |= {"rms_norm_eps": 3e-3, "max_position_embeddings": 160}
    config["rope_parameters"]["rope_theta"] = 500.0
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    own = [copied(folder, tmp_path / folder.name) for folder in folders]
    for folder in own:  # another config.json is another base: these are said to be its own
        (folder / "manifest.json").write_text(json.dumps({"inputs": {"base": fingerprint(base)}}), encoding="utf-8")
    model = loaded(build(tmp_path, base, own), base)
    assert (model.config.rms_norm_eps, model.config.max_position_embeddings) == (3e-3, 160)
    assert model.config.rope_parameters["rope_theta"] == 500.0
    assert [m.variance_epsilon for m in model.modules() if hasattr(m, "variance_epsilon")] == [3e-3] * 5
    # with all factors and routers aside, the fused model is the base with these constants
    for factors in (layer.experts[kind] for layer in moe_layers(model) for kind in PROJECTIONS):
        factors.b.zero_()
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, AutoModelForCausalLM.from_pretrained(base)(IDS).logits, atol=1e-5)


def test_s1_the_router_is_never_unseeded(fused, pico, folders, tmp_path):
    """The original drew the router from torch's unseeded global generator."""
    torch.manual_seed(1234)
    again = build(tmp_path / "again", pico, folders)
    other = build(tmp_path / "other", pico, folders, "--seed", "7")
    routers = [[layer.router for layer in moe_layers(loaded(f, pico))] for f in (fused, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(routers[0], routers[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(routers[0], routers[2], strict=True))
    assert not torch.equal(routers[0][0], routers[0][1])
    wide = moe_layers(loaded(build(tmp_path / "wide", pico, folders, "--router_std", "1"), pico))
    for found, std in ((routers[0], 0.02), ([layer.router for layer in wide], 1)):
        assert torch.cat(found).std().item() == pytest.approx(std, rel=0.3)
    assert (fused / "moe.safetensors").read_bytes() == (again / "moe.safetensors").read_bytes()


def test_router_from_data_is_wired_and_reproducible(pico, folders, tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.load_records", lambda task, split, **_: [
        Record(f"{task} {i}", f"about {task}", OBJECTIVES.index(task)) for i in range(9)])
    built = [build(tmp_path / name, pico, folders, "--router_init", "data") for name in "ab"]
    one, two = (moe_layers(loaded(folder, pico)) for folder in built)
    assert all(torch.equal(a.router, b.router) and a.router.std() > 0.05 for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("names", [("safety", "safety"), ("helpfulness", "safety", "helpfulness")])
def test_the_same_name_twice_is_refused(pico, adapters, refused, names):
    assert "the same adapter twice" in refused(pico, [adapters / "outputs" / n for n in names])


@pytest.mark.parametrize("factor", [1, 2])
def test_the_same_change_under_two_names_is_refused(pico, folders, tmp_path, refused, factor):
    """Also when A is twice and B half of the other's."""
    twin = copied(folders[0], tmp_path / "twin",
                  lambda ts: {k: v * (factor if "lora_A" in k else 1 / factor) for k, v in ts.items()})
    said = refused(pico, [folders[0], folders[1], twin])
    assert "are the same weights" in said
    assert "twin" in said
    assert "safety" not in said


def test_equal_folder_names_do_not_collide(pico, folders, tmp_path):
    """Two seeds' runs may both be called 'safety': either refused, or told apart in the configuration."""
    own = [copied(folder, tmp_path / f"seed{i}" / "adapter") for i, folder in enumerate(folders)]
    code, folder = None, None
    try:
        folder = build(tmp_path, pico, own)
    except SystemExit as stop:
        code = stop.code
    assert code == 2 or len(set(read_config(folder).experts)) == len(read_config(folder).sources) == 3


@pytest.mark.parametrize(("targets", "words"), [
    (("q_proj", "gate_proj", "up_proj", "down_proj"),
     ("model.layers.0.self_attn.q_proj", "and 1 more", "allowed: gate_proj, up_proj, down_proj")),
    (("gate_proj", "up_proj"), ("model.layers.0.mlp.down_proj", "2 of 6 missing")),
], ids=["trains attention", "misses a projection"])
def test_other_targets_are_refused_by_tensor_name(pico, folders, make_adapter, tmp_path, refused, targets, words):
    said = refused(pico, [folders[0], make_adapter(pico, tmp_path / "odd", targets=targets)])
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize(("change", "said"), [
    (lambda ts: ts | {"base_model.model.lm_head.weight": torch.ones(2, 2)}, "base_model.model.lm_head.weight"),
    (lambda ts: {k.replace("mlp", "ffn"): v for k, v in ts.items()}, "model.layers.0.ffn."),
    (lambda ts: {k: v for k, v in ts.items() if "layers.0.mlp.up_proj.lora_B" not in k}, "layers.0.mlp.up_proj"),
    (lambda ts: {k: v for k, v in ts.items() if "layers.1" not in k}, "model.layers.1."),
    (lambda ts: {k: v * float("nan") if "layers.1.mlp.up_proj.lora_A" in k else v for k, v in ts.items()}, "NaN"),
    (lambda ts: {k: v[:2] if "layers.1.mlp.up_proj.lora_A" in k else v for k, v in ts.items()}, "do not form a pair"),
], ids=["foreign tensor", "renamed", "half a pair", "a layer missing", "nan", "other rank"])
def test_keys_that_match_nothing_are_refused(pico, folders, tmp_path, refused, change, said):
    assert said in refused(pico, [folders[0], copied(folders[1], tmp_path / "odd", change)])


def test_dora_is_refused(pico, folders, tmp_path, refused):
    assert "use_dora" in refused(pico, [folders[0], copied(folders[1], tmp_path / "odd", config={"use_dora": True})])


@pytest.mark.parametrize("file", [WEIGHTS, "adapter_config.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_missing_or_damaged_adapter_file_is_named(pico, folders, tmp_path, refused, file, damage):
    odd = copied(folders[1], tmp_path / "odd")
    content = (odd / file).read_bytes()
    (odd / file).unlink()
    if damage == "cut":
        (odd / file).write_bytes(content[: len(content) // 2])
    assert file in refused(pico, [folders[0], odd])


def test_an_adapter_that_does_not_tell_its_base_is_refused(pico, folders, tmp_path, refused):
    """An adapter from elsewhere has no manifest: its base is looked at through the folder that it names."""
    other = make_pico(tmp_path / "other", seed=1)
    for i, (base, said) in enumerate((("some/one", "is no local folder"), (other, "trained on another base"))):
        odd = copied(folders[1], tmp_path / f"odd{i}", config={"base_model_name_or_path": str(base)})
        (odd / "manifest.json").unlink()
        assert said in refused(pico, [folders[0], odd])
    good = copied(odd, tmp_path / "good", config={"base_model_name_or_path": str(pico)})
    assert build(tmp_path / "results", pico, [folders[0], good], "--expert_topk", "1").is_dir()


@pytest.mark.parametrize("options", [
    {"r": 2, "alpha": 7}, {"r": 8, "alpha": 8, "use_rslora": True},
    {"alpha_pattern": {"down_proj": 16, r"layers\.1\.mlp\.up_proj": 1}}, {"rank_pattern": {"up_proj": 6}},
    {"rank_pattern": {"gate_proj": 1}, "alpha_pattern": {"gate_proj": 3}, "use_rslora": True},
], ids=["rank 2", "rslora", "alpha_pattern", "rank_pattern", "all of them"])
def test_ranks_and_scales_of_every_kind_equal_peft(pico, folders, make_adapter, tmp_path, options):
    odd = make_adapter(pico, tmp_path / "odd", seed=11, **options)
    built = experts_of(loaded(build(tmp_path, pico, [folders[0], odd], "--expert_topk", "1"), pico))
    for expert, folder in zip(built, (folders[0], odd), strict=True):
        merged = peft_merged(pico, folder)
        for name, matrix in expert.items():
            assert torch.allclose(matrix, merged[name], atol=2e-6), name


def test_no_dense_copies_on_disk_or_in_memory(fused, pico):
    with safe_open(fused / "moe.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert {name.split(".", 2)[2] for name in shapes} == {
        "router", *(f"{kind}.{half}" for kind in PROJECTIONS for half in "ab")}
    assert len(shapes) == 14
    assert all(4 in shape or name.endswith("router") for name, shape in shapes.items())
    assert sorted(p.name for p in fused.glob("*.safetensors")) == ["moe.safetensors"]
    model = loaded(fused, pico)
    base = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(pico).parameters())
    routers = sum(p.numel() for n, p in model.named_parameters() if n.endswith(".router"))
    assert routers == 2 * 3 * 32
    assert sum(p.numel() for p in model.parameters()) == base + routers
    factors = sum(b.numel() for n, b in model.named_buffers() if "experts" in n)
    assert factors == 2 * 3 * 4 * 3 * (32 + 64)
    assert [n for n, _ in model.named_buffers() if "experts" not in n and "inv_freq" not in n] == []


@pytest.mark.parametrize("attention", [None, TuningConfig(2, 4.0)], ids=["experts", "experts and attention"])
def test_save_load_generate_is_bit_equal_in_fp32(fused, pico, tmp_path, attention):
    model, tuning, config = loaded(fused, pico), TuningConfig(2, 3.0), read_config(fused)
    add_tuning(model, tuning, attention, seed=1)
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "tuned_" in name or "lora_" in name or name.endswith("router"):
                p.copy_(torch.randn(p.shape, generator=source) * 0.3)
    for folder in (first := tmp_path / "first", second := tmp_path / "second"):
        folder.mkdir()
    save_moe(first, model, dataclasses.replace(config, tuning=tuning, attention=attention))
    again = loaded(first, pico)
    save_moe(second, again, read_config(first))
    assert (first / "moe.safetensors").read_bytes() == (second / "moe.safetensors").read_bytes()
    assert (first / "moe_config.json").read_bytes() == (second / "moe_config.json").read_bytes()
    args = InferenceArgs(model_name_or_path=str(pico))
    ready, other, plain = (load_moe(folder, args, torch.float32, CPU, packed=packed)
                           for folder, packed in ((first, True), (second, True), (first, False)))
    with torch.no_grad():
        want = model.eval()(IDS).logits
        assert torch.equal(again(IDS).logits, want)
        got, packed = plain(IDS).logits, ready(IDS).logits
        assert torch.allclose(got, want, atol=1e-4) if attention else torch.equal(got, want)
        assert torch.allclose(packed, got, atol=1e-4)
        assert torch.equal(packed, other(IDS).logits)
        answers = [m.generate(IDS, max_new_tokens=8, do_sample=False) for m in (model, again, plain, ready)]
    assert all(torch.equal(answers[0], other) for other in answers[1:])
    assert not torch.equal(want, loaded(fused, pico)(IDS).logits)


def test_a_fused_model_answers_through_load_run(fused, pico):
    run = load_run(RAW, InferenceArgs(model_name_or_path=str(pico), output_dir=str(fused.parent.parent), device="cpu",
                                      dtype="float32", threads=2))
    with torch.no_grad():
        assert torch.allclose(run.model(IDS).logits, loaded(fused, pico)(IDS).logits, atol=1e-5)


def test_loading_on_another_base_or_with_an_impossible_top_k_is_refused(fused, pico, tmp_path):
    with pytest.raises(UserError, match="give that base"):
        loaded(fused, make_pico(tmp_path / "other", seed=1))
    for top_k in (0, 4, 99):
        with pytest.raises(UserError, match="allowed: 1 to 3"):
            loaded(fused, pico, top_k=top_k)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k_is_a_real_flag(pico, folders, tmp_path, fused, top_k):
    model = loaded(build(tmp_path, pico, folders, "--expert_topk", str(top_k)), pico)
    assert {layer.top_k for layer in moe_layers(model)} == {top_k}
    assert {layer.top_k for layer in moe_layers(loaded(fused, pico, top_k=top_k))} == {top_k}


@pytest.mark.parametrize("file", ["moe.safetensors", "moe_config.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_missing_or_damaged_file_of_a_fused_model_is_a_user_error(fused, pico, tmp_path, file, damage):
    folder = shutil.copytree(fused, tmp_path / "copy")
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if damage != "missing":
        (folder / file).write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        loaded(folder, pico)


@pytest.mark.parametrize("change", [
    lambda ts: {k: v for k, v in ts.items() if k != "layers.1.router"},
    lambda ts: {k: v for k, v in ts.items() if k != "layers.1.down.a"},
    lambda ts: ts | {"layers.2.router": torch.ones(3, 32)},
    lambda ts: {k: v[:2] if k == "layers.1.router" else v for k, v in ts.items()},
], ids=["no router", "no factor", "too many layers", "router of two experts"])
def test_tensors_that_do_not_match_the_configuration_are_a_user_error(fused, pico, tmp_path, change):
    folder = shutil.copytree(fused, tmp_path / "copy")
    save_file({k: v.contiguous() for k, v in change(load_file(folder / "moe.safetensors")).items()},
              folder / "moe.safetensors")
    with pytest.raises(UserError, match=r"moe\.safetensors"):
        loaded(folder, pico)


def test_the_command_records_what_went_in_and_does_finished_work_once(pico, folders, tmp_path, capsys):
    folder = build(tmp_path, pico, folders)
    stamp = folder.stat().st_ino
    content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert content["status"] == "done"
    assert content["parents"] == [str(f) for f in folders]
    assert content["inputs"] == {"base": read_config(folder).base_fingerprint} | {
        f.name: read_adapter(f).sha256 for f in folders}
    assert read_config(folder).experts == OBJECTIVES
    assert "3 experts of rank 4" in capsys.readouterr().out
    build(tmp_path, pico, folders)
    assert "already built" in capsys.readouterr().out
    assert folder.stat().st_ino == stamp
    assert len((tmp_path / "registry.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    with pytest.raises(SystemExit):
        build(tmp_path, pico, folders, "--seed", "1")
    assert "seed: 42 there, 1 here" in capsys.readouterr().err


def test_adapters_are_found_by_run_name_or_named_as_missing(pico, adapters, tmp_path, refused):
    assert "align_basemodel.py --moe_flag 0 --task_name safety" in refused(pico, ("safety", "truthfulness"))
    [shutil.copytree(adapters / "outputs" / name, tmp_path / "outputs" / name) for name in OBJECTIVES]
    assert read_config(build(tmp_path, pico, OBJECTIVES)).experts == OBJECTIVES
