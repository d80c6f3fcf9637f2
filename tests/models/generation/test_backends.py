"""--backend: every back end gives the same greedy text in fp32 for every kind of run, or refuses it before it is loaded."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from pico import make_adapter, make_pico
from pico_families import make_family
from runs import common, write_data

import inference
import manifest
from config import parse
from data.encode import prompt_ids
from flags import InferenceArgs
from models import llama_moe
from models.base.families import FAMILIES, family_of
from models.base.loading import skeleton
from models.generation import Decoding, answer_batch
from models.generation.backends import BACKENDS, backend_of, resolved_backend
from models.runs import load_run

#: The longest is longer than the windows of these models (16 tokens).
PROMPTS = ("Hi", "Say it", "Why do I bake bread?", "What is the capital of France, and on which river does it lie?",
           "Write a short story about a dog who learns to sail on the Seine", "user", "No.")
GREEDY = Decoding(6)


def flags(base, out, *words):
    return parse(InferenceArgs, [*common(base, out)[:-2], "--batch_size", "2", *words]).args


def rendered(loaded):
    return [loaded.template.render(prompt, "") for prompt in PROMPTS]


def one_by_one(run, args):
    """What the back end hf gives to each prompt alone."""
    loaded = load_run(run, args)
    return [answer_batch(loaded, [text], GREEDY, 0)[0] for text in rendered(loaded)]


def answered(run, args, decoding=GREEDY, seed=0):
    """Every prompt through a back end, unit by unit, as inference.py does."""
    answerer = backend_of(args).open(run)
    texts = rendered(answerer.loaded)
    answerer.prepare(texts, decoding.max_new_tokens)
    return [answer for start in range(0, len(texts), answerer.unit)
            for answer in answerer.answer(texts[start : start + answerer.unit], decoding, seed + start)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Family -> its folder of runs: two adapters, and a fused MoE of them."""
    made = {}

    def of(kind):
        if kind not in made:
            out = tmp_path_factory.mktemp(kind)
            base = make_family(out / "base", kind, seed=3)
            family = family_of(skeleton(base).config)
            for seed, name in enumerate(("helpfulness", "safety", "truthfulness")):
                make_adapter(base, out / "outputs" / name, seed=seed, targets=family.projections)
            llama_moe.main([*common(base, out)[:-2], "--router_init", "random", "--expert_topk", "1", "--run_name",
                            "raw_moe"])
            made[kind] = base, out
        return made[kind]

    return of


@pytest.mark.parametrize("backend", ["static", "continuous"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3", "phi3"])
def test_greedy_text_is_that_of_each_prompt_alone(runs, kind, backend):
    base, out = runs(kind)
    args = flags(base, out, "--backend", backend)
    if (kind, backend) == ("gemma2", "continuous"):
        [problem] = backend_of(args).problems(("", "raw_moe"))[:1]
        assert "attn_logit_softcapping" in problem
        assert problem.startswith("--backend continuous: the base: ")
        assert problem.endswith("; use --backend hf")
        return
    assert backend_of(args).problems(("", "helpfulness", "raw_moe")) == []
    said = {}
    for run in ("", "helpfulness", "helpfulness@0.6_truthfulness@0.4", "raw_moe"):
        said[run] = one_by_one(run, args)
        assert answered(run, args) == said[run], run
    # four models, and none of them says one thing to everything
    assert len({json.dumps([a.text for a in answers]) for answers in said.values()}) == 4
    assert all(len({answer.text for answer in answers}) > 1 for answers in said.values())


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("run", ["", "raw_moe"])
def test_static_compiles_its_step_once(runs, kind, run):
    """As on a GPU, where transformers compiles by itself; here its graphs are run as they are."""
    from torch._dynamo.utils import counters
    from transformers import CompileConfig

    base, out = runs(kind)
    answerer = backend_of(flags(base, out, "--backend", "static")).open(run)
    texts = rendered(answerer.loaded)
    answerer.prepare(texts, 6)
    units = [texts[start : start + 2] for start in range(0, len(texts), 2)]
    plain = [answerer.answer(unit, GREEDY, 0) for unit in units]
    compiling = CompileConfig(backend="eager", mode=None)
    compiling._compile_all_devices = True
    answerer.loaded.model.generation_config.compile_config = compiling
    torch._dynamo.reset()
    counters.clear()
    try:
        # prompts of several lengths, and a last batch of one
        assert [answerer.answer(unit, GREEDY, 0) for unit in units] == plain
        graphs = counters["stats"]["unique_graphs"]
        # a window has steps before it is full, one that fills it, and steps after it
        assert graphs == 1 if kind == "llama" else graphs <= 3
        assert [answerer.answer(unit, GREEDY, 0) for unit in units] == plain
        assert counters["stats"]["unique_graphs"] == graphs
        assert not counters["graph_break"]
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - {"llama", "gemma2", "qwen3", "phi3"}))
def test_every_other_family_by_its_base(tmp_path, kind):
    base = make_family(tmp_path / "base", kind, seed=3)
    for backend in ("static", "continuous"):
        args = flags(base, tmp_path, "--backend", backend)
        assert backend_of(args).problems(("",)) == []
        assert answered("", args) == one_by_one("", args), backend


@pytest.mark.parametrize("backend", ["static", "continuous"])
def test_another_type_of_model_is_refused_before_it_is_loaded(tmp_path, backend, monkeypatch, capsys):
    base = make_family(tmp_path / "base", "gpt2")
    monkeypatch.setattr("models.base.loading.read_weights", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(SystemExit) as stop:
        inference.main([*common(base, tmp_path)[:-2], "--backend", backend])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"error: --backend {backend}: the base: model type 'gpt2' is of no family" in said
    assert "use --backend hf" in said


def ends_at(base, token):
    """Make a token one that ends answers."""
    content = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(content | {"eos_token_id": [1, token]}))


@pytest.mark.parametrize("backend", ["static", "continuous"])
def test_every_end_stops_its_row_and_makes_room(tmp_path, backend):
    base = make_pico(tmp_path / "base", seed=3)
    args = flags(base, tmp_path, "--backend", backend)
    loaded = load_run("", args)
    row = torch.tensor([prompt_ids(rendered(loaded)[0], loaded.tokenizer, loaded.template)])
    # the third token that the first prompt is answered with
    ends_at(base, int(loaded.model.generate(row, max_new_tokens=3, do_sample=False, pad_token_id=2)[0, -1]))
    wanted = one_by_one("", args)
    assert {answer.finish for answer in wanted} == {"stop", "length"}
    assert answered("", args) == wanted


@pytest.mark.parametrize("backend", ["static", "continuous"])
def test_a_stop_string_ends_an_answer(tmp_path, backend, monkeypatch):
    base = make_pico(tmp_path / "base", seed=3)
    args = flags(base, tmp_path, "--backend", backend, "--template", "alpaca")
    free = one_by_one("", args)
    marker = free[1].text[2:5]
    assert marker.strip()
    monkeypatch.setattr("data.prompts.END_MARKER", marker)
    wanted = one_by_one("", args)
    assert wanted[1].finish == "stop" != free[1].finish
    assert wanted[1].text == free[1].text[:2].strip()
    assert answered("", args) == wanted


@pytest.mark.parametrize("backend", ["static", "continuous"])
def test_draws_are_those_of_their_seed_and_top_p_reaches_them(tmp_path, backend):
    base = make_pico(tmp_path / "base", seed=3)
    args = flags(base, tmp_path, "--backend", backend)
    free, narrow = (Decoding(6, True, 1.5, top_p) for top_p in (1.0, 1e-6))
    assert answered("", args, free, 1) == answered("", args, free, 1) != answered("", args, free, 2)
    # of the likeliest token alone
    assert answered("", args, narrow, 1) == one_by_one("", args)


def test_a_model_keeps_its_own_attention_after_continuous(tmp_path):
    base = make_pico(tmp_path / "base")
    args = flags(base, tmp_path, "--backend", "continuous")
    answerer = backend_of(args).open("")
    answerer.prepare(PROMPTS, 3)
    before = answerer.loaded.model.config._attn_implementation
    answerer.answer(PROMPTS, Decoding(3), 0)
    assert answerer.loaded.model.config._attn_implementation == before != "sdpa"


def test_rows_that_end_make_room(tmp_path, monkeypatch):
    """Two places, one prompt of four tokens and five of one: four of these in turn beside the first, the last behind it."""
    from transformers.generation.continuous_batching.continuous_api import (
        ContinuousBatchingManager,
        ContinuousBatchProcessor,
    )

    base = make_pico(tmp_path / "base", seed=3)
    args = flags(base, tmp_path, "--backend", "continuous")
    answerer = backend_of(args).open("")
    texts = rendered(answerer.loaded)[:6]
    steps, lengths = [], iter([4, 1, 1, 1, 1, 1])
    step, add = ContinuousBatchProcessor._generation_step, ContinuousBatchingManager.add_request
    monkeypatch.setattr(ContinuousBatchProcessor, "_generation_step",
                        lambda self, model: (steps.append(1), step(self, model)))
    monkeypatch.setattr(ContinuousBatchingManager, "add_request",
                        lambda self, *a, **k: add(self, *a, **(k | {"max_new_tokens": next(lengths)})))
    answerer.prepare(texts, 6)
    assert len(answerer.answer(texts, GREEDY, 0)) == 6
    # batches of two would take 4 + 1 + 1, all at once 4
    assert len(steps) == 5


def test_prompts_share_what_they_begin_with(tmp_path, monkeypatch):
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    base = make_pico(tmp_path / "base", seed=3)
    args = flags(base, tmp_path, "--backend", "continuous")
    answerer = backend_of(args).open("")
    texts = [answerer.loaded.template.render(f"Say in a word, and do not explain it: {prompt}", "") for prompt in PROMPTS]
    shared, search = [], PagedAttentionCache.search_prefix_match
    monkeypatch.setattr(PagedAttentionCache, "search_prefix_match",
                        lambda self, *a: (shared.append(search(self, *a)), shared[-1])[1])
    answerer.prepare(texts, 6)
    answers = answerer.answer(texts, GREEDY, 0)
    # whole pages, of all but the two prompts that are read first
    assert sorted(shared)[:2] == [0, 0]
    assert all(tokens >= 16 for tokens in sorted(shared)[2:])
    assert len(shared) == len(texts)
    assert answers == [answer_batch(load_run("", args), [text], GREEDY, 0)[0] for text in texts]


def test_the_thread_that_decodes_may_fail(tmp_path, monkeypatch):
    base = make_pico(tmp_path / "base")
    args = flags(base, tmp_path, "--backend", "continuous")
    answerer = backend_of(args).open("")
    answerer.prepare(PROMPTS, 3)
    monkeypatch.setattr(answerer.loaded.model, "forward", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        answerer.answer(PROMPTS[:2], Decoding(3), 0)


def test_auto_is_hf_and_answers_do_not_say_so(tmp_path, caplog):
    base, data = make_pico(tmp_path / "base"), write_data(tmp_path / "data", 4, 4, 4)
    assert {resolved_backend(SimpleNamespace(backend=name)) for name in ("auto", "hf")} == {"hf"}
    assert set(BACKENDS) == {"hf", "static", "continuous", "vllm"}
    words = ["--task_name", "safety", "--data_path", data["safety"], "--max_new_tokens", "3", "--batch_size", "2",
             *common(base, tmp_path)[:-2]]
    inference.main(words)
    folder = tmp_path / "inference" / "safety" / "test" / "raw"
    assert "backend" not in manifest.read(folder)["config"]
    caplog.set_level("INFO")
    inference.main([*words, "--backend", "hf"])
    assert f"{folder}: already answered" in caplog.text


@pytest.mark.parametrize("backend", ["static", "continuous"])
def test_answers_of_another_back_end_are_other_answers_and_resume_by_unit(tmp_path, backend, monkeypatch, capsys):
    base, data = make_pico(tmp_path / "base"), write_data(tmp_path / "data", 4, 12, 4)
    monkeypatch.setattr("models.generation.continuous.ROUNDS", 2)
    words = ["--task_name", "safety", "--data_path", data["safety"], "--max_new_tokens", "3", "--batch_size", "3",
             "--backend", backend, "--do_sample", *common(base, tmp_path)[:-2]]

    def rows(folder):
        return (folder / "outputs_final.jsonl").read_text()

    inference.main(words)
    folder = tmp_path / "inference" / "safety" / "test" / "raw"
    assert manifest.read(folder)["config"]["backend"] == backend
    with pytest.raises(SystemExit):
        inference.main([word if word != backend else "hf" for word in words])
    assert f"backend: {backend} there, None here" in capsys.readouterr().err
    whole = rows(folder)
    shutil.rmtree(folder)
    kind = {"static": "models.generation.static.StaticAnswerer",
            "continuous": "models.generation.continuous.ContinuousAnswerer"}[backend]
    module, name = kind.rsplit(".", 1)
    answerer = getattr(__import__(module, fromlist=[name]), name)
    real, calls = answerer.answer, []

    def dies(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(answerer, "answer", dies)
        with pytest.raises(KeyboardInterrupt):
            inference.main(words)
    counted = []
    monkeypatch.setattr(answerer, "answer", lambda self, *args: (counted.append(1), real(self, *args))[1])
    inference.main(words)
    assert rows(folder) == whole
    units = -(-len(whole.splitlines()) // (3 if backend == "static" else 6))
    assert len(counted) == units - 1
