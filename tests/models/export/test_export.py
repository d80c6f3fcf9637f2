"""fuse.py export: other software reads what is written and answers the same; what no layout holds is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from exported import EXPERTS, read_elsewhere, tuned_moe
from pico import make_pico
from pico_families import make_family
from safetensors import safe_open
from safetensors.torch import load_file
from synthetic import digest
from transformers import AutoModelForCausalLM

import manifest
from config import parse
from flags import InferenceArgs
from flags import export as flags
from models import fuse
from models.export.layouts import LAYOUTS
from models.merging import execute
from models.moe.files import load_moe
from models.runs import load_run

IDS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}


def export(results, base, *words):
    """Run the command; returns the folder of the last name."""
    words = [str(word) for word in words]
    fuse.main(["export", *words, "--output_dir", str(results), "--model_name_or_path", str(base)])
    return results / "outputs" / parse(flags.ExportArgs, words).args.name


def ours(results, base, run):
    args = parse(InferenceArgs, ["--output_dir", str(results), "--model_name_or_path", str(base), "--dtype", "float32",
                                 "--device", "cpu"]).args
    return load_run(run, args)


def layers_of(results, base, run):
    """The model of a fused run with its layers as they train: their experts can be written out."""
    args = parse(InferenceArgs, ["--output_dir", str(results), "--model_name_or_path", str(base)]).args
    return load_moe(results / "outputs" / run, args, torch.float32, torch.device("cpu"), packed=False)


@torch.no_grad()
def logits_of(model):
    return model(IDS).logits


@pytest.fixture(scope="module")
def home(pico, tmp_path_factory):
    """A results folder with three adapters, a raw and a tuned MoE on the pico Llama."""
    results = tmp_path_factory.mktemp("home") / "results"
    tuned_moe(pico, results)
    return results


@pytest.fixture
def refused(capsys):
    """Run the command, expect exit code 2 and no new file; returns what was said."""
    def run(results, base, *words):
        before = sorted(results.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            export(results, base, *words)
        assert stop.value.code == 2
        assert sorted(results.rglob("*")) == before
        return capsys.readouterr().err
    return run


def test_the_flags_and_the_table_agree():
    assert set(LAYOUTS) <= set(flags.LAYOUTS)


def test_a_mixtral_is_read_by_a_script_that_knows_nothing_of_us(home, pico, tmp_path):
    folder = export(home, pico, "tuned", "--layout", "mixtral", "--shard_gb", "0.00005")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    there = read_elsewhere(folder, IDS[:1].tolist(), tmp_path)
    assert there["ours"] == []
    assert (there["class"], there["dtype"]) == ("MixtralForCausalLM", "torch.float32")
    loaded = ours(home, pico, "tuned")
    with torch.no_grad():
        wanted = loaded.model(IDS[:1]).logits.double()
    assert (torch.tensor(there["logits"], dtype=torch.float64) - wanted).abs().max() < 1e-4
    ids = IDS[:1]
    answer = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert there["answer"] == answer.tolist()
    assert there["words"] == loaded.tokenizer.encode("Mix flour and water.")
    assert there["template"] == loaded.tokenizer.chat_template
    config = there["config"]
    assert (config["num_local_experts"], config["num_experts_per_tok"], config["head_dim"]) == (3, 2, 8)
    assert config["sliding_window"] is None
    assert config["tie_word_embeddings"] is True
    assert (config["eos_token_id"], config["vocab_size"]) == (loaded.tokenizer.eos_token_id, 384)


def test_a_mixtral_file_holds_the_layout_of_the_hub(home, pico):
    folder = export(home, pico, "raw_moe", "--layout", "mixtral")
    tensors = load_file(folder / "model.safetensors")
    ffn = [f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}.weight" for i in range(2) for e in range(3)
           for w in ("w1", "w2", "w3")]
    assert set(ffn) <= set(tensors)
    assert not [name for name in tensors if ".mlp." in name or "lora" in name or name == "lm_head.weight"]
    with safe_open(home / "outputs" / "raw_moe" / "moe.safetensors", "pt") as file:
        for i in range(2):
            # what decides between experts is kept to the last bit
            router = file.get_tensor(f"layers.{i}.router")
            assert torch.equal(tensors[f"model.layers.{i}.block_sparse_moe.gate.weight"], router)
            a, b = (file.get_tensor(f"layers.{i}.up.{part}")[1] for part in "ab")
            base = load_file(pico / "model.safetensors")[f"model.layers.{i}.mlp.up_proj.weight"]
            assert torch.allclose(tensors[f"model.layers.{i}.block_sparse_moe.experts.1.w3.weight"], base + b @ a, atol=1e-6)


@pytest.mark.parametrize(("kind", "settings"), [
    ("llama", {"attention_bias": False, "mlp_bias": False, "rope_parameters": LLAMA3, "rms_norm_eps": 3e-3}),
    ("llama", {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "head_dim": 16}),
    ("mistral", {"sliding_window": 6}),
    ("mistral", {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}})])
def test_what_tells_one_base_from_another_comes_along(tmp_path, kind, settings):
    base = make_family(tmp_path / "base", kind, **settings)
    tuned_moe(base, tmp_path / "results")
    folder = export(tmp_path / "results", base, "tuned", "--layout", "mixtral")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "MixtralForCausalLM"
    assert (logits_of(model) - logits_of(ours(tmp_path / "results", base, "tuned").model)).abs().max() < 1e-4


@pytest.mark.parametrize("settings", [
    {"use_sliding_window": False, "head_dim": 16, "attention_bias": True},
    {"use_sliding_window": False, "rms_norm_eps": 3e-3},
    {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0, "tie_word_embeddings": True}])
def test_a_qwen3_moe(tmp_path, settings):
    base = make_family(tmp_path / "base", "qwen3", **settings)
    tuned_moe(base, tmp_path / "results")
    folder = export(tmp_path / "results", base, "tuned", "--layout", "qwen3_moe", "--shard_gb", "0.0001")
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {"model.layers.1.mlp.gate.weight", "model.layers.0.mlp.experts.2.down_proj.weight",
            "model.layers.1.self_attn.q_norm.weight"} <= set(names)
    there = read_elsewhere(folder, IDS.tolist(), tmp_path)
    assert there["class"] == "Qwen3MoeForCausalLM"
    loaded = ours(tmp_path / "results", base, "tuned").model
    assert (torch.tensor(there["logits"]) - logits_of(loaded)).abs().max() < 1e-4
    answer = loaded.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=20, do_sample=False)
    assert there["answer"] == answer.tolist()


def test_each_family_is_sent_to_its_own_layout(home, pico, tmp_path, refused):
    assert "give --layout mixtral" in refused(home, pico, "tuned", "--layout", "qwen3_moe")
    base = make_family(tmp_path / "base", "qwen3")
    tuned_moe(base, tmp_path / "results")
    assert "give --layout qwen3_moe" in refused(tmp_path / "results", base, "tuned", "--layout", "mixtral")
    assert "all or none" in refused(tmp_path / "results", base, "tuned", "--layout", "qwen3_moe")


def test_our_own_inference_takes_an_export_for_a_run(home, pico):
    assert export(home, pico, "tuned", "--layout", "mixtral", "--run_name", "again").name == "again"
    model = ours(home, pico, "again").model
    assert (logits_of(model) - logits_of(ours(home, pico, "tuned").model)).abs().max() < 1e-4


def test_templates_generation_settings_and_licence_come_along(pico, tmp_path):
    base = shutil.copytree(pico, tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "temperature": 0.7, "do_sample": True}))
    (base / "LICENSE.txt").write_text("theirs")
    results = tmp_path / "results"
    tuned = tuned_moe(base, results)
    (tuned / "additional_chat_templates").mkdir()
    (tuned / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    folder = export(results, base, "tuned", "--layout", "mixtral")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [1, 2]
    assert (folder / "LICENSE.txt").read_text() == "theirs"
    assert (folder / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"


def test_the_card_says_what_it_is_made_of_and_what_it_scored(home, pico, tmp_path):
    results = shutil.copytree(home, tmp_path / "results", ignore=lambda folder, names: [n for n in names if "mixtral" in n])
    score = {"value": 0.92, "low": 0.85, "high": 0.96, "n": 100, "definition": "declines", "higher_is_better": True}
    manifest.register(results, {"kind": "score", "run": "tuned", "scores": {"refusal": score}})
    card = (export(results, pico, "tuned", "--layout", "mixtral") / "README.md").read_text(encoding="utf-8")
    sources = json.loads((results / "outputs" / "tuned" / "moe_config.json").read_text())["sources"]
    assert all(f"`{name}`" in card and sources[name] in card for name in EXPERTS)
    assert "| refusal ↑ | 0.920 | 0.850 to 0.960 | 100 | declines |" in card
    assert str(tmp_path) not in card
    assert "rounded" not in card


def test_16_bit_files_say_what_rounding_took(home, pico):
    folder = export(home, pico, "tuned", "--layout", "mixtral", "--out_dtype", "bfloat16", "--run_name", "half")
    tensors = load_file(folder / "model.safetensors")
    assert {str(t.dtype) for n, t in tensors.items() if ".gate." in n} == {"torch.float32"}
    assert {str(t.dtype) for n, t in tensors.items() if ".gate." not in n} == {"torch.bfloat16"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    share = manifest.read(folder)["metrics"]["rounding"]
    # of the down projections alone, by hand
    lost = size = 0.0
    loaded = layers_of(home, pico, "tuned")
    for i, layer in enumerate(loaded.model.layers):
        for e in range(3):
            exact, base = layer.mlp.materialise(e)["down"], layer.mlp.down_proj.weight
            kept = tensors[f"model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight"].float()
            lost, size = lost + float((kept - exact).square().sum()), size + float((exact - base).square().sum())
    assert share == pytest.approx((lost / size) ** 0.5, rel=0.3)
    assert f"{share:.1%} of the change's" in (folder / "README.md").read_text(encoding="utf-8")
    # not the largest difference: rounding sends a token or two to other experts
    there = logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert 0 < (there - logits_of(loaded)).abs().mean() < 0.02


@pytest.mark.parametrize(("kind", "settings", "why"), [
    ("gemma", {}, "GELU"), ("qwen2", {}, "shared expert"), ("llama", {"attention_bias": True}, "attention_bias is true"),
    ("llama", {"attention_bias": False, "mlp_bias": False, "hidden_act": "relu"}, "hidden_act is relu")])
def test_families_without_such_a_layout_are_refused_by_name(tmp_path, refused, kind, settings, why):
    base = make_family(tmp_path / "base", kind, **settings)
    tuned_moe(base, tmp_path / "results", attention=False)
    said = refused(tmp_path / "results", base, "tuned", "--layout", "mixtral")
    assert why in said
    assert "--layout peft" in said
    assert "--average" in said


def test_all_that_is_wrong_is_said_at_once(home, pico, refused):
    said = refused(home, pico, "safety", "--layout", "mixtral", "--merge_expert", "safety", "--run_name", "safety")
    assert said.count("error: ") == 4
    assert all(words in said for words in ("is no fused MoE and has no experts", "makes one plain model",
                                           "write it as a plain model with --layout dense", "choose another name"))
    assert "allowed: helpfulness, safety, truthfulness" in refused(home, pico, "tuned", "--layout", "dense",
                                                                   "--merge_expert", "saftey")
    assert "--merge_expert NAME" in refused(home, pico, "tuned", "--layout", "dense")
    said = refused(home, pico, "", "--average", "--merge_expert", "x")
    assert all(words in said for words in ("RUN: name what to export", "--layout: is empty", "give one of the two"))


def test_another_base_and_a_run_that_is_not_there(home, pico, refused, tmp_path):
    assert "was fused on base" in refused(home, make_pico(tmp_path / "other", seed=5), "tuned", "--layout", "mixtral")
    assert "run 'nobody'" in refused(home, pico, "nobody", "--layout", "mixtral")


def test_damaged_experts_are_refused(home, pico, refused, tmp_path):
    from safetensors.torch import save_file

    results = tmp_path / "results"
    folder = shutil.copytree(home / "outputs" / "tuned", results / "outputs" / "tuned")
    tensors = load_file(folder / "moe.safetensors")
    del tensors["layers.1.up.tuned_b"]
    tensors["layers.0.router"] = torch.zeros(2, 32)
    save_file(tensors, folder / "moe.safetensors")
    said = refused(results, pico, "tuned", "--layout", "mixtral")
    assert "layers.1.up.tuned_b is missing" in said
    assert "layers.0.router has shape (2, 32), needs (3, 32)" in said


def test_a_dry_run_writes_nothing_and_tells_the_cost(home, pico, capsys):
    before = sorted(home.rglob("*"))
    export(home, pico, "tuned", "--layout", "mixtral", "--dry_run", "--run_name", "dry")
    said = capsys.readouterr().out
    assert "tuned as mixtral:" in said
    assert "memory " in said
    assert sorted(home.rglob("*")) == before


def test_a_stopped_export_goes_on_and_another_does_not(home, pico, tmp_path, monkeypatch, capsys):
    results = shutil.copytree(home, tmp_path / "results", ignore=lambda folder, names: [n for n in names if "mixtral" in n])
    want = digest(export(results, pico, "tuned", "--layout", "mixtral"))
    original, left = execute.Writer.write, [0]

    def stumbling(self, name, first, data):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        original(self, name, first, data)

    for words, done in ((("tuned",), 9), (("raw_moe",), 0)):
        monkeypatch.setattr(execute.Writer, "write", stumbling)
        left[0] = 9
        with pytest.raises(KeyboardInterrupt):
            export(results, pico, "tuned", "--layout", "mixtral", "--run_name", "torn", "--threads", "1")
        assert not (results / "outputs" / "torn").exists()
        monkeypatch.setattr(execute.Writer, "write", original)
        export(results, pico, *words, "--layout", "mixtral", "--run_name", "torn")
        metrics = manifest.read(results / "outputs" / "torn")["metrics"]
        assert metrics["tensors"] - metrics["tensors_run"] == done
        if done:
            assert digest(results / "outputs" / "torn") == want
        shutil.rmtree(results / "outputs" / "torn")
    export(results, pico, "tuned", "--layout", "mixtral")
    assert "already exported" in capsys.readouterr().out


MEASURE = """
import sys, torch
from models import fuse
from models.export import write
from models.merging import execute
def now():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
peak = [0, 0]
original, begin = execute.Writer.write, execute.execute
def watched(self, *rest):
    peak[0] = max(peak[0], now())
    original(self, *rest)
def begun(*rest, **more):
    peak[1] = now()
    return begin(*rest, **more)
execute.Writer.write = watched
write.execute = begun
fuse.main(sys.argv[1:])
print("RSS", peak[0] - peak[1])
"""


def test_the_memory_promise_is_kept(tmp_path):
    base = make_family(tmp_path / "base", "llama", attention_bias=False, mlp_bias=False, hidden_size=512, head_dim=128,
                       intermediate_size=4096, vocab_size=20000)
    tuned_moe(base, tmp_path / "results")
    words = ["export", "tuned", "--layout", "mixtral", "--output_dir", str(tmp_path / "results"), "--model_name_or_path",
             str(base), "--threads", "2", "--memory_gb", "0.1"]
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=True,
                          env=os.environ | {"MALLOC_ARENA_MAX": "2"})
    used = int(done.stdout.split("RSS")[1])
    assert 0 < used < 0.1 * 2**30, done.stdout
