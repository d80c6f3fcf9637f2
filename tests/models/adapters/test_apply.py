"""Adapters as people have them, put into a base: PEFT's unmerged logits, or a sentence with file, key and next step."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pico import FFN, make_adapter, make_pico
from safetensors.torch import load_file, save_file

from errors import UserError
from models.adapters.mixture import load_mix
from models.adapters.resident import ResidentBase
from models.base.loading import load_base
from models.run_folders import run_files
from models.runs import load_adapter

CPU, IDS = torch.device("cpu"), torch.tensor([[5, 17, 60, 99]])
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture
def home(pico, tmp_path):
    make_adapter(pico, tmp_path / "outputs" / "plain", seed=1, targets=(*ATTENTION, *FFN))
    return tmp_path


def resident(pico):
    return ResidentBase(pico, torch.float32, CPU)


def base_of(pico):
    return load_base(pico, torch.float32, CPU)


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def theirs(pico, folder):
    return logits(PeftModel.from_pretrained(base_of(pico), folder))


def ours(pico, folder):
    return logits(load_adapter(folder, resident(pico)))


def variant(home, name, rename=None, weights=None, **config):
    """A copy of the plain adapter with other keys, tensors or settings."""
    folder = home / "outputs" / name
    shutil.copytree(home / "outputs" / "plain", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {rename(key) if rename else key: value for key, value in tensors.items()}
    save_file(weights(tensors) if weights else tensors, folder / "adapter_model.safetensors")
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(content | config))
    return folder


@pytest.mark.parametrize("options", [
    {"targets": FFN, "r": 4, "alpha": 3}, {"targets": ("lm_head",), "r": 3, "alpha": 5},
    {"targets": (*ATTENTION, "lm_head"), "r": 4, "alpha": 7, "use_rslora": True},
    {"targets": (*ATTENTION, *FFN), "r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 9}},
    {"targets": ("q_proj", "up_proj"), "layers_to_transform": [1]},
])
def test_an_adapter_gives_pefts_unmerged_logits(pico, tmp_path, options):
    folder = make_adapter(pico, tmp_path / "a", seed=3, **options)
    torch.testing.assert_close(ours(pico, folder), theirs(pico, folder), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("alpha", [2, 3])
def test_merged_weights_are_pefts_to_the_bit(pico, tmp_path, alpha):
    folder = make_adapter(pico, tmp_path / "a", seed=3, r=5, alpha=alpha)
    merged = PeftModel.from_pretrained(base_of(pico), folder).merge_and_unload().state_dict()
    got = load_adapter(folder, resident(pico)).state_dict()
    assert merged.keys() == got.keys()
    assert all(torch.equal(merged[name], got[name]) for name in merged)


def test_a_tied_head_is_changed_alone(pico, tmp_path):
    for i, name in enumerate(("head", "other")):
        make_adapter(pico, tmp_path / "outputs" / name, seed=i, targets=("q_proj", "lm_head"), alpha=4)
    one = load_adapter(tmp_path / "outputs" / "head", resident(pico))
    plain = base_of(pico)
    assert torch.equal(one.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    assert not torch.equal(one.get_output_embeddings().weight, plain.get_output_embeddings().weight)
    both = load_mix(tmp_path, (("head", 1.0), ("other", 0.5)), resident(pico))
    reference = PeftModel.from_pretrained(base_of(pico), tmp_path / "outputs" / "head")
    reference.load_adapter(tmp_path / "outputs" / "other", "other")
    reference.add_weighted_adapter(["default", "other"], [1, 0.5], "sum", combination_type="cat")
    reference.set_adapter("sum")
    torch.testing.assert_close(logits(both), logits(reference), atol=2e-5, rtol=1e-4)
    assert torch.equal(both.get_input_embeddings().weight, plain.get_input_embeddings().weight)


def test_an_untied_head_stays_itself(tmp_path):
    base = make_pico(tmp_path / "base")
    model = base_of(base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 0.5)
    model.save_pretrained(base)
    folder = make_adapter(base, tmp_path / "a", targets=("lm_head",))
    torch.testing.assert_close(ours(base, folder), theirs(base, folder), atol=2e-5, rtol=1e-4)


def test_a_tied_head_that_trains_has_a_gradient(pico):
    from training.linear_loss import answer_loss

    model = get_peft_model(base_of(pico), LoraConfig(target_modules=["lm_head"], r=2))
    head = model.get_base_model().get_output_embeddings()
    with torch.no_grad():
        head.lora_B["default"].weight.normal_()
    hidden, targets = torch.randn(6, 32), torch.arange(6)
    loss = answer_loss(hidden, head, targets)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum"))
    loss.backward()
    assert head.lora_A["default"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["default", "safety"])
def test_keys_of_a_state_dict_are_understood(pico, home, name):
    folder = variant(home, "named", lambda key: key.replace("_A.weight", f"_A.{name}.weight").replace(
        "_B.weight", f"_B.{name}.weight"))
    assert torch.equal(ours(pico, folder), ours(pico, home / "outputs" / "plain"))


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("rename", "says"), [
    (lambda key: key.replace("base_model.model.", "base_model.model.base_model.model."),
     ["are nested", "wrapped by PEFT twice"]),
    (lambda key: key.replace("base_model.model.model.", "base_model.model.model.language_model."),
     ["are not in this base", "'model.language_model.layers.0.", "the base calls it 'model.layers.0.",
      "--model_name_or_path"]),
    (lambda key: key.replace("base_model.model.model.", "base_model.model."), ["'layers.0.", "calls it 'model.layers.0."]),
    (lambda key: key.replace("q_proj", "query"), ["'model.layers.0.self_attn.query'", "LlamaForCausalLM"]),
    (lambda key: key.replace("layers.1.", "layers.7."), ["'model.layers.7."]),
    (lambda key: key.removeprefix("base_model.model."), ["without PEFT's base_model.model. in front"]),
])
def test_keys_that_do_not_fit_are_errors(pico, home, rename, says):
    folder = variant(home, "odd", rename)
    for load in (lambda: ours(pico, folder), lambda: load_mix(home, (("odd", 1.0),), resident(pico))):
        with pytest.raises(UserError) as error:
            load()
        assert all(word in str(error.value) for word in [str(folder / "adapter_model.safetensors"), *says]), error.value


@pytest.mark.parametrize(("weights", "config", "says"), [
    (lambda ts: {k: v for k, v in ts.items() if "layers.1.mlp" not in k}, {}, "has no factors for 3 modules"),
    (lambda ts: ts | {f"{Q0}.lora_A.weight": torch.ones(4, 31)}, {}, "is (32, 31), the base has (32, 32)"),
    (None, {"r": 8}, "has rank 4, adapter_config.json says 8"),
    (None, {"use_dora": True}, "use_dora is set"), (None, {"bias": "all"}, "trained biases"),
    (None, {"modules_to_save": ["lm_head"]}, "modules_to_save is set"), (None, {"peft_type": "LOHA"}, "peft_type is LOHA"),
    (None, {"trainable_token_indices": [1]}, "trainable_token_indices is set"),
    (lambda ts: ts | {f"{Q0}.lora_magnitude_vector.weight": torch.ones(32)}, {}, "is a DoRA magnitude"),
    (lambda ts: ts | {"base_model.model.model.embed_tokens.weight": torch.ones(390, 32),
                      "base_model.model.lm_head.weight": torch.ones(390, 32)}, {}, "the vocabulary was resized"),
    (lambda ts: ts | {f"{Q0}.lora_A.other.weight": torch.ones(4, 32)}, {}, "holds the factors of several adapters"),
])
def test_what_fuse_refuses_loading_refuses(pico, home, weights, config, says):
    folder = variant(home, "odd", weights=weights, **config)
    with pytest.raises(UserError) as error:
        ours(pico, folder)
    assert says in str(error.value), error.value


def test_an_adapter_that_is_a_pickle_is_never_read(pico, home, capsys):
    import inference
    from models import fuse

    folder = variant(home, "bin")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    for load in (lambda: ours(pico, folder), lambda: run_files(home, "bin")):
        with pytest.raises(UserError, match="a pickle|pickled weights"):
            load()
    prompts = home / "p.jsonl"
    prompts.write_text('{"prompt": "Hi"}\n')
    for main, flags in ((inference.main, ["--task_name", "safety", "--data_path", str(prompts), "--cross_task", "bin",
                                          "--model_name_or_path", str(pico)]),
                        (fuse.main, ["adapters", "--adapters", "plain,bin", "--run_name", "f"])):
        with pytest.raises(SystemExit) as stop:
            main([*flags, "--output_dir", str(home)])
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert "adapter_model.bin only" in said
        assert "save_pretrained" in said


def test_adapters_of_quantised_bases(pico, home, tmp_path):
    def trained_on(name, **quantised):
        base = tmp_path / name
        shutil.copytree(pico, base)
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
        folder = variant(home, f"on_{name}", base_model_name_or_path=str(base))
        (folder / "manifest.json").unlink()
        return folder

    # QLoRA: the base was held in 4 bits while it trained, and the adapter belongs on the whole one
    assert torch.equal(ours(pico, trained_on("nf4", load_in_4bit=True, quant_method="bitsandbytes")),
                       ours(pico, home / "outputs" / "plain"))
    with pytest.raises(UserError, match=r"was trained on a quantised base \(gptq, 4 bits"):
        ours(pico, trained_on("gptq", quant_method="gptq", bits=4))
    other = trained_on("other", load_in_4bit=True)
    content = json.loads((tmp_path / "other" / "config.json").read_text()) | {"hidden_size": 64}
    (tmp_path / "other" / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="hidden_size is 64 there and 32 here"):
        ours(pico, other)


def test_going_on_with_an_adapter_that_does_not_fit(pico, home, capsys):
    import align_basemodel

    variant(home, "odd", lambda key: key.replace("base_model.model.model.", "base_model.model.model.language_model."))
    rows = home / "rows.json"
    rows.write_text(json.dumps([{"instruction": "Hi", "input": "", "output": "Hello"}]))
    with pytest.raises(SystemExit) as stop:
        align_basemodel.main(["--moe_flag", "0", "--task_name", "helpfulness", "--model_name_or_path", str(pico),
                              "--output_dir", str(home), "--run_name", "more", "--init_adapter", "odd",
                              "--data_path", str(rows)])
    assert stop.value.code == 2
    assert "are not in this base" in capsys.readouterr().err


def test_what_an_earlier_version_recorded_still_names_its_base(pico, home, tmp_path):
    from models.adapters.files import read_adapter
    from models.adapters.fuse import common_base
    from models.checkpoints.fingerprints import sampled_fingerprint

    base = shutil.copytree(pico, tmp_path / "base")
    old = variant(home, "old", base_model_name_or_path=str(base))
    (old / "manifest.json").write_text(json.dumps({"inputs": {"base": sampled_fingerprint(base)}}))
    assert torch.equal(ours(base, old), ours(base, home / "outputs" / "plain"))
    # records of both versions, told to be one base by the base itself
    both = [read_adapter(old, "old"), read_adapter(home / "outputs" / "plain", "plain")]
    assert common_base(both).startswith("v2-")
    weights = load_file(base / "model.safetensors")
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"] * 2}, base / "model.safetensors",
              metadata={"format": "pt"})
    for folder in (old, home / "outputs" / "plain"):
        with pytest.raises(UserError, match="was trained on another base"):
            ours(base, folder)
    with pytest.raises(UserError, match="trained on different bases"):
        common_base(both)


def test_the_layer_says_which_way_its_weight_lies_and_not_the_configuration(pico, home):
    folder = variant(home, "turned", fan_in_fan_out=True)
    torch.testing.assert_close(ours(pico, folder), theirs(pico, folder), atol=2e-5, rtol=1e-4)
    assert torch.equal(ours(pico, folder), ours(pico, home / "outputs" / "plain"))


@pytest.mark.parametrize(("config", "says"), [
    ({"rank_pattern": ["q_proj"]}, "rank_pattern must be whole numbers"), ({"r": "4"}, "r and the values"),
    ({"rank_pattern": {"(": 4}}, r"rank_pattern '\(' is not a regular"),
    ({"target_modules": "*proj"}, r"target_modules '\*proj' is not a regular"),
    ({"target_modules": [1]}, "target_modules must be a list"), ({"exclude_modules": "*q"}, "exclude_modules"),
    ({"layers_to_transform": "0"}, "layers_to_transform must be"), ({"use_rslora": "false"}, "use_rslora is 'false'"),
    ({"init_lora_weights": "loftq"}, "changes the base too"), ({"task_type": "SEQ_CLS"}, "was trained for SEQ_CLS"),
])
def test_settings_of_other_types_or_for_other_models(pico, home, config, says):
    with pytest.raises(UserError, match=says):
        ours(pico, variant(home, "odd", **config))


def test_factors_that_are_codes(pico, home):
    folder = variant(home, "codes", weights=lambda ts: {k: (v * 50).to(torch.int8) for k, v in ts.items()})
    with pytest.raises(UserError, match="28 factors are no floating-point numbers"):
        ours(pico, folder)


@pytest.mark.parametrize(("content", "says"), [("{", "cannot be read"), ("[]", "not a JSON object"),
                                               ('{"inputs": {"base": 5}}', "is no text")])
def test_damaged_manifests(pico, home, content, says):
    folder = variant(home, "odd")
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=says):
        ours(pico, folder)


@pytest.mark.parametrize("named", ["", None, ["x"], "/"])
def test_no_base_named_is_not_the_folder_that_one_stands_in(pico, home, named, monkeypatch):
    folder = variant(home, "nameless", base_model_name_or_path=named)
    (folder / "manifest.json").unlink()
    monkeypatch.chdir(pico)
    with pytest.raises(UserError, match="is no local folder of a model"):
        ours(pico, folder)


def test_going_on_with_the_factors_that_are_there(pico, home):
    from flags import ExpertArgs
    from training.sft import to_train

    variant(home, "named", lambda key: key.replace(".weight", ".safety.weight"))
    starts = [to_train(pico, ExpertArgs(task_name="safety", output_dir=str(home), init_adapter=name), torch.float32, CPU)
              for name in ("plain", "named")]
    want, got = ({k: v for k, v in model.state_dict().items() if "lora_" in k} for model in starts)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)
    assert any(value.abs().sum() for key, value in got.items() if "lora_B" in key)
