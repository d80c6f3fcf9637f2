"""--backend vllm: what the engine is asked for, what of its replies becomes an answer, what is refused.

vLLM is not installed where these tests run. The engine here has the names and arguments of vLLM's own classes, takes no
others, and computes with transformers and PEFT: it holds our side of the interface, not vLLM's numbers.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import PeftModel
from pico import make_adapter, make_pico
from runs import common, write_data
from transformers import AutoModelForCausalLM, AutoTokenizer

import inference
from config import parse
from flags import InferenceArgs
from models import fuse, llama_moe
from models.generation import Decoding, answer_batch
from models.generation.backends import backend_of
from models.runs import load_run

PROMPTS = ("Hi", "Why do I bake bread?", "What is the capital of France, and on which river does it lie?")


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class Engine:
    """vLLM's ``LLM``: stops at its ids and texts, and leaves the token that ended an answer in it or out of it."""

    made: list[dict] = []
    keeps_end = True

    def __init__(self, model, *, tokenizer, dtype, seed, max_num_seqs, trust_remote_code, generation_config,
                 enable_lora=False, max_lora_rank=16):
        Engine.made.append({"model": model, "dtype": dtype, "max_num_seqs": max_num_seqs, "max_lora_rank": max_lora_rank,
                            "trust_remote_code": trust_remote_code, "generation_config": generation_config})
        self.folder, self.lora, self.rank = model, enable_lora, max_lora_rank
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.asked: list[SamplingParams] = []

    def generate(self, prompts, sampling_params, *, lora_request=None, use_tqdm=True):
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        if lora_request:
            assert self.lora
            model = PeftModel.from_pretrained(model, lora_request.lora_path).eval()
            assert max(config.r for config in model.peft_config.values()) <= self.rank
        self.asked += sampling_params
        return [SimpleNamespace(outputs=[self.one(model, prompt["prompt_token_ids"], params)])
                for prompt, params in zip(prompts, sampling_params, strict=True)]

    @torch.no_grad()
    def one(self, model, ids, params):
        assert params.temperature == 0, "this engine is greedy"
        new, reason = [], "length"
        while len(new) < params.max_tokens and reason == "length":
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
            if new[-1] in params.stop_token_ids:
                reason = "stop"
                if not self.keeps_end:
                    new.pop()
            elif any(stop in self.tokenizer.decode(new) for stop in params.stop or ()):
                reason = "stop"
        return SimpleNamespace(token_ids=tuple(new), finish_reason=reason)


@pytest.fixture
def vllm(monkeypatch):
    """The package as it would lie there."""
    package, lora, request = (ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    package.LLM, package.SamplingParams, request.LoRARequest = Engine, SamplingParams, LoRARequest
    for module in (package, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("models.generation.vllm_engine.installed", lambda: True)
    monkeypatch.setattr(Engine, "made", [])
    return package


def flags(base, out, *words):
    return parse(InferenceArgs, [*common(base, out)[:-2], "--backend", "vllm", "--batch_size", "2", *words]).args


def test_base_adapters_and_whole_models_answer_as_here(tmp_path, vllm, monkeypatch):
    base = make_pico(tmp_path / "base", seed=3)
    free = load_run("", flags(base, tmp_path))
    ids = free.tokenizer(free.template.render(PROMPTS[1], ""), add_special_tokens=False, return_tensors="pt").input_ids
    # the third token of an answer ends answers, and the rest of the file is nobody's business
    end = int(free.model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=2)[0, -1])
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, end], "pad_token_id": 2,
                                                             "do_sample": True, "temperature": 9.0}))
    make_adapter(base, tmp_path / "outputs" / "safety", r=12, use_rslora=True)
    make_adapter(base, tmp_path / "outputs" / "safety_2", seed=1)
    fuse.main(["export", "safety", "--layout", "dense", "--model_name_or_path", str(base), "--output_dir", str(tmp_path),
               "--run_name", "whole"])
    args = flags(base, tmp_path)
    names = ("", "safety", "safety_2", "whole")
    wanted = {}
    for run in names:
        loaded = load_run(run, args)
        texts = [loaded.template.render(prompt, "") for prompt in PROMPTS]
        wanted[run] = [answer_batch(loaded, [text], Decoding(6), 0)[0] for text in texts]
    assert "stop" in {answer.finish for answers in wanted.values() for answer in answers}
    assert len({str(answers) for answers in wanted.values()}) == 3
    for keeps in (True, False):
        monkeypatch.setattr(Engine, "keeps_end", keeps)
        backend = backend_of(args)
        assert backend.problems(names) == []
        for run in names:
            answerer = backend.open(run)
            answerer.prepare(texts, 6)
            assert answerer.unit == 16
            assert answerer.answer(texts, Decoding(6), 0) == wanted[run], (run, keeps)
    # one engine for a base and its adapters, another for the whole model
    assert [made["model"] for made in Engine.made[:2]] == [str(base), str(tmp_path / "outputs" / "whole")]
    assert len(Engine.made) == 4
    assert Engine.made[0] == {"model": str(base), "dtype": "float32", "max_num_seqs": 2, "max_lora_rank": 16,
                              "trust_remote_code": False, "generation_config": "vllm"}


def test_a_stop_string_and_a_draw_are_passed_on(tmp_path, vllm, monkeypatch):
    base = make_pico(tmp_path / "base", seed=3)
    args = flags(base, tmp_path, "--template", "alpaca")
    loaded = load_run("", args)
    text = loaded.template.render("Hi", "")
    marker = answer_batch(loaded, [text], Decoding(6), 0)[0].text[2:5]
    monkeypatch.setattr("data.prompts.END_MARKER", marker)
    backend = backend_of(args)
    assert backend.problems(("",)) == []
    answerer = backend.open("")
    assert answerer.answer([text], Decoding(6), 0) == answer_batch(load_run("", args), [text], Decoding(6), 0)
    assert backend._engine.asked[-1].stop == [marker]
    monkeypatch.setattr(Engine, "one", lambda *_: SimpleNamespace(token_ids=(), finish_reason="length"))
    answerer.answer([text] * 3, Decoding(6, True, 0.7, 0.9), 5)
    asked = backend._engine.asked[-3:]
    assert {(p.temperature, p.top_p) for p in asked} == {(0.7, 0.9)}
    assert len({p.seed for p in asked}) == 3


def test_what_it_cannot_serve_is_refused_with_what_to_do(tmp_path, vllm, capsys):
    base = make_pico(tmp_path / "base", seed=3)
    for seed, name in enumerate(("helpfulness", "safety", "truthfulness")):
        make_adapter(base, tmp_path / "outputs" / name, seed=seed)
    make_adapter(base, tmp_path / "outputs" / "uneven", alpha_pattern={"up_proj": 16})
    llama_moe.main([*common(base, tmp_path)[:-2], "--router_init", "random", "--run_name", "raw_moe"])
    found = backend_of(flags(base, tmp_path)).problems(("raw_moe", "safety@0.5_helpfulness@0.5", "uneven", "safety"))
    assert len(found) == 3
    for problem, say in zip(found, ("models/fuse.py export raw_moe --layout mixtral", "models/fuse.py adapters",
                                    "models/fuse.py export uneven --layout dense"), strict=True):
        assert say in problem
        assert problem.endswith("use --backend hf")
    other = make_pico(tmp_path / "other", seed=4)
    assert "another base" in backend_of(flags(other, tmp_path)).problems(("safety",))[0]
    assert Engine.made == []


def test_without_the_package_nothing_is_loaded(tmp_path, monkeypatch, capsys):
    base, data = make_pico(tmp_path / "base"), write_data(tmp_path / "data", 4, 4, 4)
    monkeypatch.setattr("models.generation.vllm_engine.installed", lambda: False)
    monkeypatch.setattr("models.base.loading.read_weights", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(SystemExit) as stop:
        inference.main(["--task_name", "safety", "--data_path", data["safety"], *common(base, tmp_path)[:-2], "--backend",
                        "vllm"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "error: --backend vllm: the package vllm is not installed here; pip install vllm" in said
