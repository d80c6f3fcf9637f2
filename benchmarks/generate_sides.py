"""The sides of the generation race: our back ends, the pipeline, lm-eval, generate_batch; their models, prompts, memory."""

from __future__ import annotations

import contextlib
import ctypes
import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, pipeline
from transformers.generation import ContinuousBatchingConfig

from data.encode import render
from data.prompts import template
from data.sources import load_records
from models.base import attention
from models.base.loading import base_path, keep_ends, load_tokenizer
from models.generation.answers import Answer, Decoding, answer_of, encoded, pad_id, stop_ids
from models.generation.continuous import ContinuousAnswerer
from models.generation.hf import HfAnswerer
from models.generation.static import StaticAnswerer
from models.moe.files import install, moe_layers
from models.moe.packed import pack
from models.runs import Loaded, load_run

#: A run of all prompts: the answers in their order.
Side = Callable[[], list[str]]
OURS = {"hf": HfAnswerer, "static": StaticAnswerer, "continuous": ContinuousAnswerer}
PEERS = ("pipeline", "lm-eval", "generate_batch")
#: Llama-2-7B's; the vocabulary is the embedded tokenizer's, half as large again.
SHAPE_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "max_position_embeddings": 4096}
#: Experts, experts per token and rank of the MoE shape.
MOE = (3, 2, 8)
TASKS = ("helpfulness", "safety", "truthfulness", "overrefusal")
#: As in ours (models/generation/continuous.py).
_PAGE = 16


def opened(args: Any) -> Loaded:
    """The model of the race: the embedded one, or random weights at 7B shapes, dense or with experts."""
    if args.shape == "embedded":
        return load_run("", SimpleNamespace(
            model_name_or_path=args.model, cache_dir=None, template="chat", device=args.device, dtype=args.dtype,
            threads=args.threads, seed=0, results=Path("results")))
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    tokenizer = load_tokenizer(base_path("embedded"))
    config = LlamaConfig(**SHAPE_7B, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id)
    torch.manual_seed(0)
    # made where it answers, in its dtype: a 7B model in fp32 on the CPU would be 27 GB
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype,
                                                 attn_implementation=attention.implementation_for(config, device))
    keep_ends(model.requires_grad_(False))
    if args.shape == "7b-moe":
        _with_experts(model, dtype)
    return Loaded(model.eval(), tokenizer, template("chat", tokenizer), args.shape, device)


def _with_experts(model: Any, dtype: torch.dtype) -> None:
    """Random experts and routers in every layer, folded, and packed on a GPU, as a run is loaded."""
    experts, top_k, rank = MOE
    hidden, width = model.config.hidden_size, model.config.intermediate_size
    draw = torch.Generator().manual_seed(1)
    factors, routers = [], []
    for _ in range(model.config.num_hidden_layers):
        factors.append({name: (torch.randn(experts, rank, inner, generator=draw) * inner**-0.5,
                               torch.randn(experts, out, rank, generator=draw) * 0.02)
                        for name, inner, out in (("gate", hidden, width), ("up", hidden, width), ("down", width, hidden))})
        routers.append(torch.randn(experts, hidden, generator=draw) * hidden**-0.5)
    install(model, factors, routers, top_k)
    for moe in moe_layers(model):
        for part in moe.experts.values():
            part.fold_(dtype)
    if model.device.type == "cuda":
        pack(model)


def prompts(loaded: Loaded, count: int) -> list[str]:
    """Rendered test prompts of the embedded sets, one of each set in turn."""
    sets = [load_records(task, "test") for task in TASKS]
    turns = [rows[i] for i in range(max(map(len, sets))) for rows in sets if i < len(rows)]
    if count > len(turns):
        raise SystemExit(f"--prompts {count}: the embedded test sets hold {len(turns)}; give at most as many")
    return [render(loaded.template, record) for record in turns[:count]]


def ours(loaded: Loaded, texts: Sequence[str], backend: str, batch: int, new: int) -> Side:
    """A back end as inference.py uses it: like lengths together, unit by unit."""
    answerer = OURS[backend](loaded, batch)
    answerer.prepare(texts, new)
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))

    def run() -> list[str]:
        found: dict[int, Answer] = {}
        for start in range(0, len(order), answerer.unit):
            part = order[start : start + answerer.unit]
            found |= zip(part, answerer.answer([texts[i] for i in part], Decoding(new), start), strict=True)
        return [found[i].text for i in range(len(texts))]

    return run


def one_by_one(loaded: Loaded, texts: Sequence[str], new: int) -> Side:
    """transformers' text-generation pipeline, a prompt at a time."""
    pipe = pipeline("text-generation", model=loaded.model, tokenizer=loaded.tokenizer, device=loaded.device)
    options = {"max_new_tokens": new, "do_sample": False, "return_full_text": False, "add_special_tokens": False,
               "eos_token_id": stop_ids(loaded), "pad_token_id": pad_id(loaded.tokenizer)}

    def run() -> list[str]:
        with torch_attention(loaded):
            return [pipe(text, **options)[0]["generated_text"].strip() for text in texts]

    return run


def lm_eval(loaded: Loaded, texts: Sequence[str], batch: int, new: int) -> Side:
    """lm-eval's ``hf`` model, ``generate_until``; on a GPU in the batch that its ``auto`` finds before the clock starts."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    longest = max(map(len, encoded(loaded, texts))) + new
    with _silent():
        model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, backend="causal", max_length=longest,
                     batch_size=batch, max_batch_size=len(texts), add_bos_token=False)
        if loaded.device.type == "cuda":
            # on a CPU nothing stops auto at the memory that there is: it gets our batch there
            model.batch_size_per_gpu = model._detect_batch_size()
    requests = [Instance("generate_until", {}, (text, {"until": [], "max_gen_toks": new, "do_sample": False}), i)
                for i, text in enumerate(texts)]

    def run() -> list[str]:
        with torch_attention(loaded), _silent():
            return [text.strip() for text in model.generate_until(requests, disable_tqdm=True)]

    return run


def generate_batch(loaded: Loaded, texts: Sequence[str], batch: int, new: int) -> Side:
    """transformers' ``generate_batch``; its own settings on a GPU, a cache for ``batch`` rows on a CPU (its own takes 60 %
    of the memory)."""
    rows, ends = encoded(loaded, texts), stop_ids(loaded)
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=ends or [-1],
                                pad_token_id=pad_id(loaded.tokenizer))
    pages = batch * (math.ceil((max(map(len, rows)) + new) / _PAGE) + 1)
    small = {} if loaded.device.type == "cuda" else {
        "page_size": _PAGE, "num_blocks": pages, "max_batch_tokens": max(512, batch), "max_requests_per_batch": batch}

    def run() -> list[str]:
        with torch_attention(loaded):
            found = loaded.model.generate_batch(rows, settings, ContinuousBatchingConfig(**small))
        return [answer_of(output.generated_tokens, ends, loaded).text for output in found.values()]

    return run


def torch_attention(loaded: Loaded) -> contextlib.AbstractContextManager[None]:
    """The attention that transformers takes by itself, for peers: ours is for our sides."""
    return attention.attention_of(loaded.model, "sdpa")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def new_tokens(loaded: Loaded, answers: Sequence[str], new: int) -> int:
    """Tokens of answers, each with the one that ended it, at most ``new``."""
    return sum(min(new, len(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1) for text in answers)


def peak_above(run: Callable[[], Any], device: str) -> tuple[Any, int]:
    """What a call returns, and the most bytes it held beyond those before it: of the GPU, or resident in the process."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = run()
        torch.cuda.synchronize()
        return found, torch.cuda.max_memory_allocated() - before
    # what was freed goes back to the kernel, and its mark of the most that was resident to what is resident now
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    found = run()
    return found, max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def limit(loaded: Loaded, texts: Sequence[str], batch: int, new: int, gemm: float, bandwidth: float) -> float:
    """The most new tokens a second that this machine could decode, ``batch`` rows at a time.

    A step reads every weight but the embedding's table once, and the keys and values of all rows, at half of their growth;
    or it multiplies every weight with every row. Whichever takes longer.
    """
    config, model = loaded.model.config.get_text_config(), loaded.model
    table = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight.data_ptr() == table.data_ptr()
    held = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values()
    weights = sum(t.nbytes for t in held) - (0 if tied else table.nbytes)
    numbers = sum(t.numel() for t in held) - (0 if tied else table.numel())
    context = sum(map(len, encoded(loaded, texts))) / len(texts) + new / 2
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize * context  # bytes a row
    return batch / max((weights + batch * cached) / bandwidth, 2 * numbers * batch / gemm)
