"""--device_map auto: what it refuses, the map, and a model over two devices that gives the answers of one.

The CPU stands for both: torch takes "cpu:0" and "cpu:1" for two places, and accelerate's hooks carry between them.
"""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from accelerate import hooks
from pico import make_adapter, make_pico
from runs import OBJECTIVES
from torch import nn

from config import parse
from errors import UserError
from evaluator.judges import local
from evaluator.scoring.likelihood import answer_logprobs
from flags import EvaluateRefusalArgs, FuseMoeArgs, InferenceArgs
from models.base import loading, spread
from models.generation import Decoding, answer_batch, router_shares
from models.llama_moe import main as fuse_moe
from models.runs import keeping_base, load_run

PROMPTS = ["How do I", "What is the capital of France? The", "Write a short"]


def halves(model: nn.Module, *_) -> dict[str, str]:
    """The first layers on one device, the rest on another; a tied head is where its embedding is."""
    layers = [name for name, _ in model.named_modules() if name.endswith(tuple(f"layers.{i}" for i in range(99)))]
    stem = layers[0].partition("layers")[0]
    head = {name: "cpu:1" for name, _ in model.named_children() if name != stem.rstrip(".")}
    if getattr(model.config, "tie_word_embeddings", False) and "lm_head" in head:
        head["lm_head"] = "cpu:0"
    return {f"{stem}embed_tokens": "cpu:0", f"{stem}rotary_emb": "cpu:0", f"{stem}norm": "cpu:1", **head,
            **{name: f"cpu:{int(i >= len(layers) // 2)}" for i, name in enumerate(layers)}}


@pytest.fixture
def two_devices(monkeypatch):
    monkeypatch.setattr(spread, "over_devices", halves)
    monkeypatch.setattr(spread, "check", lambda args: None)
    # transformers has read each weight to its place; on "cpu:1" it says "cpu", and accelerate would move it once more
    monkeypatch.setattr(hooks, "set_module_tensor_to_device", lambda *_, **more: None)


def flags(pico, results, *words) -> InferenceArgs:
    return parse(InferenceArgs, ["--model_name_or_path", str(pico), "--output_dir", str(results), "--dtype", "float32",
                                 "--threads", "1", *words]).args


@pytest.mark.usefixtures("two_devices")
def test_every_kind_of_run_answers_as_on_one_device(pico, home):
    fuse_moe(["--model_name_or_path", str(pico), "--output_dir", str(home), "--dtype", "float32", "--router_init", "random"])
    one = flags(pico, home)
    two = dataclasses.replace(one, device_map="auto")
    runs = ("", "safety", "safety@0.6_helpfulness@0.4", "raw_moe", "truthfulness")
    items = [(prompt, f" answer {i}") for i, prompt in enumerate(PROMPTS)]
    found = []
    for args in (one, two):
        with keeping_base():
            for run in runs:
                loaded = load_run(run, args)
                places = getattr(loaded.model, "hf_device_map", {})
                assert bool(args.device_map) == ("cpu:1" in map(str, places.values()))
                shares = router_shares(loaded, PROMPTS).tolist() if run == "raw_moe" else []
                found.append((answer_batch(loaded, PROMPTS, Decoding(8), 0), answer_logprobs(loaded, items), shares))
    assert found[: len(runs)] == found[len(runs) :]
    assert len({answers[0].text for answers, _, _ in found}) == len(runs)


@pytest.mark.usefixtures("two_devices")
def test_every_layer_has_a_hook_for_its_device(pico):
    model = loading.load_base(pico, torch.float32, torch.device("cpu"), True)
    places = {name: str(module._hf_hook.execution_device) for name, module in model.named_modules()
              if hasattr(module, "_hf_hook")}
    assert places["model.layers.1"] == places["model.norm"] == "cpu:1"
    assert places["model.layers.0"] == places["lm_head"] == "cpu:0"


@pytest.mark.usefixtures("two_devices")
def test_a_judge_reads_as_on_one_device(pico):
    args = SimpleNamespace(dtype="float32", device="cpu", threads=1, seed=1, cache_dir=None, judge_max_length=0,
                           judge_batch_tokens=512, device_map="")
    rows = [[5, 17, 60], [5, 99, 3, 8, 11]]
    found = [local.Reader.load(local.find("guard", str(pico), one)).next_logprobs(rows, [4, 7, 9])
             for one in (args, SimpleNamespace(**{**vars(args), "device_map": "auto"}))]
    assert torch.equal(*found)


def gpus(monkeypatch, *free: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number=0: (free[number], 2 * free[number]))


def test_the_map_shares_layers_out_and_keeps_a_tied_head_with_its_embedding(tmp_path, monkeypatch):
    empty = loading.skeleton(make_pico(tmp_path / "base", layers=8))
    size = 4 * sum(weight.numel() for weight in empty.parameters())
    gpus(monkeypatch, size, size)
    found = spread.over_devices(empty, torch.float32, "it")
    assert set(found.values()) == {0, 1}
    assert {name for name, _ in empty.named_parameters() if not any(name.startswith(part) for part in found)} <= {
        "lm_head.weight"}
    layers = [found[name] for name in sorted(found) if ".layers." in name]
    assert len(layers) == 8
    assert layers == sorted(layers)
    assert found["model.embed_tokens"] == found["lm_head"]
    # one that fits into one device is there whole
    gpus(monkeypatch, 3 * size)
    assert set(spread.over_devices(empty, torch.float32, "it").values()) == {0}


def test_a_model_that_does_not_fit_is_refused_with_its_size(tmp_path, monkeypatch):
    empty = loading.skeleton(make_pico(tmp_path / "base", layers=8))
    size = 4 * sum(weight.numel() for weight in empty.parameters())
    monkeypatch.setattr(spread, "GIB", size)
    gpus(monkeypatch, size // 2, size // 2)
    with pytest.raises(UserError, match=r"base takes 1.0 GiB in float32, and 2 GPUs have 0.[78] GiB for weights; .* have no "
                                        "place; free memory, or use more GPUs or a smaller --dtype"):
        spread.over_devices(empty, torch.float32, "base")
    # half as wide, it fits
    assert set(spread.over_devices(empty, torch.bfloat16, "base").values()) == {0, 1}


def test_where_it_makes_no_sense_it_is_refused(pico, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--device_map auto: spreads a model over GPUs, and --device cpu uses none"):
        flags(pico, tmp_path, "--device_map", "auto", "--device", "cpu")
    with pytest.raises(UserError, match="--device_map auto: goes with --backend hf alone; drop"):
        flags(pico, tmp_path, "--device_map", "auto", "--backend", "continuous")
    with pytest.raises(UserError, match="vLLM spreads models in its own way"):
        flags(pico, tmp_path, "--device_map", "auto", "--backend", "vllm")
    with pytest.raises(UserError, match="--device_map"):
        flags(pico, tmp_path, "--device_map", "balanced")
    # training puts a whole model on each device
    with pytest.raises(UserError, match="--device_map"):
        parse(FuseMoeArgs, ["--device_map", "auto"])
    args = parse(EvaluateRefusalArgs, ["--task_name", "raw", "--device_map", "auto"]).args
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees none here"):
        spread.check(args)
    with pytest.raises(UserError, match="torch sees none here"):
        load_run("", flags(pico, tmp_path, "--device_map", "auto"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started, each with a whole model"):
        parse(EvaluateRefusalArgs, ["--task_name", "raw", "--device_map", "auto"])


def test_a_model_for_one_gpu_is_read_right_there(pico, monkeypatch):
    asked = []
    monkeypatch.setattr(loading, "read_weights", lambda folder, **options: asked.append(options["device_map"]) or 1 / 0)
    for index in range(2):
        with pytest.raises(ZeroDivisionError):
            loading.load_base(pico, torch.float32, torch.device("cuda", index))
    assert asked == [{"": torch.device("cuda:0")}, {"": torch.device("cuda:1")}]


@pytest.mark.usefixtures("two_devices")
def test_adapters_share_a_base_over_devices_and_not_with_one_on_one(pico, tmp_path, monkeypatch):
    for seed, name in enumerate(OBJECTIVES):
        make_adapter(pico, tmp_path / "outputs" / name, seed=seed)
    loads = []
    real = loading.read_weights
    monkeypatch.setattr(loading, "read_weights", lambda folder, **more: loads.append(more.get("device_map")) or
                        real(folder, **more))
    one = flags(pico, tmp_path)
    two = dataclasses.replace(one, device_map="auto")
    with keeping_base():
        for args, run in itertools.product((one, two), OBJECTIVES):
            load_run(run, args)
    assert len(loads) == 2
    assert loads[0] is None
    assert loads[1]["model.layers.1"] == "cpu:1"
