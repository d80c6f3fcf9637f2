"""The parts of the check: every training's model, losses and trainer, and generation, put together as the commands do.

What a ``train`` function does beside this is reading files and writing them; the base comes from ``Place.base`` instead.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from trl import DPOTrainer
from trl.trainer import dpo_trainer

from benchmarks.gpu_check import memory
from benchmarks.gpu_check.place import WARM, Place, wait
from benchmarks.preference_pairs import shortened
from data.prompts import template
from models.adapters.files import Adapter
from models.generation import Decoding, answer_batch
from models.mask.bank import MaskBank
from models.moe.files import install, moe_layers
from models.moe.layer import TuningConfig
from models.moe.packed import pack
from models.runs import Loaded
from models.task_vectors import Model
from training import mask_model
from training import sft as sft_training
from training.answers import AnswerModel
from training.dpo import SafeDPOTrainer, preference_arguments
from training.mask import MaskTrainer
from training.moe import MoeLoss, MoeTrainer, prepare
from training.trainer import FusionTrainer, training_arguments

EXPERTS = ("helpfulness", "safety", "truthfulness")


def _trained(place: Place, seconds: float, tokens: int, answers: int, gemm: float, every: bool = False) -> dict[str, Any]:
    limit = place.shape.training_operations(tokens, answers, every) / gemm
    return {"tokens_per_second": tokens / seconds, "seconds": seconds, "limit_seconds": limit, "of_limit": limit / seconds,
            **place.memory}


def sft(place: Place, gemm: float, bandwidth: float, checkpointing: bool = False,
        full: bool = False) -> list[dict[str, Any]]:
    """LoRA of rank 8 on the FFN, as training/sft.py; or every weight, held in fp32."""
    s = place.shape
    parsed = place.flags("--preset", "h3fusion", "--moe_flag", "0", "--task_name", "safety",
                         "--per_device_train_batch_size", str(s.rows), *_again(checkpointing),
                         *(["--tuning", "full"] if full else []))
    rows = place.rows()
    arguments = training_arguments(parsed.args, parsed.training, rows=len(rows))
    with patch.object(sft_training, "load_base", place.load_base):
        model = sft_training.to_train(Path("made up"), parsed.args, place.dtype, place.device)
    trainer = FusionTrainer(model=AnswerModel(model, place.dtype), args=arguments, train_dataset=rows,
                            processing_class=place.tokenizer)
    seconds = place.fit(trainer, parsed)
    return [_trained(place, seconds, s.rows * s.tokens, s.rows * (s.tokens - s.tokens // 2), gemm, full)]


def _again(checkpointing: bool) -> list[str]:
    return ["--gradient_checkpointing", str(checkpointing).lower()]


def dpo(place: Place, gemm: float, bandwidth: float, checkpointing: bool = False) -> list[dict[str, Any]]:
    """The same LoRA on preference pairs, as training/dpo.py; the reference was asked before the first step."""
    seconds, trainer = _dpo(place, place.pairs(), SafeDPOTrainer, *_again(checkpointing), reference={"kind": "dpo"},
                            results=place.results)
    return [_of_pairs(place, seconds, trainer, gemm)]


class PlainDPOTrainer(DPOTrainer):
    """TRL's own, but for the rows, which are encoded: padded batches, its fused head, its cached reference."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def dpo_race(place: Place, gemm: float, bandwidth: float, theirs: bool = False) -> list[dict[str, Any]]:
    """Pairs of the embedded lengths, ours or TRL's; tokens are those that packing leaves on both sides."""
    s, cut, rows = place.shape, 512, []
    for i in range(s.pairs * (WARM + s.steps)):
        lengths = shortened(i, cut)
        rows.append(dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), (
            place.drawn(length, 3 * i + j) for j, length in enumerate(lengths)), strict=True)))
    own = {} if theirs else {"reference": {"kind": "race"}, "results": place.results}
    seconds, _ = _dpo(place, rows, PlainDPOTrainer if theirs else SafeDPOTrainer, "--model_max_length", str(cut), **own)
    share = s.pairs / len(rows)
    answers = share * sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    tokens = answers + share * sum(len(row["prompt_ids"]) for row in rows)
    return [{**_trained(place, seconds, tokens, answers, gemm), "pairs_per_second": s.pairs / seconds}]


def _dpo(place: Place, rows: list[dict[str, Any]], kind: type, *words: str, **own: Any) -> tuple[float, Any]:
    parsed = place.flags("--preset", "h3fusion", "--moe_flag", "0", "--task_name", "safety", "--method", "dpo",
                         "--per_device_train_batch_size", str(place.shape.pairs), *words)
    arguments = preference_arguments(parsed.args, parsed.training, place.dtype, len(rows), validates=False)
    with patch.object(sft_training, "load_base", place.load_base):
        model = sft_training.to_train(Path("made up"), parsed.args, place.dtype, place.device)
    # TRL's own constructor hashes the model in fp32: minutes at 7B, and no step's
    with patch.object(dpo_trainer, "hash_module", lambda model: ""):
        trainer = kind(model=model, ref_model=None, args=arguments, train_dataset=Dataset.from_list(rows),
                       processing_class=place.tokenizer, **own)
    return place.fit(trainer, parsed), trainer


def _of_pairs(place: Place, seconds: float, trainer: Any, gemm: float, every: bool = False) -> dict[str, Any]:
    if not trainer.packed:
        raise RuntimeError("the batches were padded, not packed; the tokens of a step are other ones")
    s = place.shape
    answers = s.pairs * 2 * (s.tokens - s.prompt)
    return _trained(place, seconds, s.pairs * s.prompt + answers, answers, gemm, every)


def fused(place: Place, rank: int) -> Any:
    """The base with three random experts of a rank in every layer, top-2."""
    s, generator = place.shape, torch.Generator(place.device).manual_seed(1)

    def drawn(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=place.device) * scale

    sides = {"gate": (s.width, s.hidden), "up": (s.width, s.hidden), "down": (s.hidden, s.width)}
    factors = [{name: (drawn(3, rank, into, scale=into**-0.5), drawn(3, out, rank, scale=0.02))
                for name, (out, into) in sides.items()} for _ in range(s.layers)]
    return install(place.base(), factors, [drawn(3, s.hidden, scale=0.02) for _ in range(s.layers)], 2)


def moe(place: Place, gemm: float, bandwidth: float, checkpointing: bool = False) -> list[dict[str, Any]]:
    """Experts, router and attention of the fused MoE, as training/moe.py, with the gating loss."""
    s = place.shape
    parsed = place.flags("--preset", "h3fusion", "--moe_flag", "1", "--gate_loss_weight", "0.01",
                         "--per_device_train_batch_size", str(s.rows), *_again(checkpointing))
    args, rows = parsed.args, place.rows()
    arguments = training_arguments(args, parsed.training, rows=len(rows))
    model = fused(place, args.lora_r)
    tuning = TuningConfig(args.lora_r, args.lora_alpha, args.lora_dropout)
    prepare(model, args, tuning, tuning if args.attention_lora else None)
    drifts = {f"drift_{name}": gamma for name, gamma in zip(EXPERTS, args.gammas, strict=True)}
    trainer = MoeTrainer(
        router_lr=args.router_learning_rate, model=MoeLoss(model, place.dtype, EXPERTS, args), args=arguments,
        train_dataset=rows, processing_class=place.tokenizer, per_sample=("gate", "share_right"),
        weights={"gate": args.gate_loss_weight, **drifts, "share_right": 0.0})
    seconds = place.fit(trainer, parsed)
    return [_trained(place, seconds, s.rows * s.tokens, s.rows * (s.tokens - s.tokens // 2), gemm)]


def mask(place: Place, gemm: float, bandwidth: float) -> list[dict[str, Any]]:
    """A Concrete mask on LoRA factors, as training/mask.py."""
    s, generator = place.shape, torch.Generator().manual_seed(2)
    names = ("q_proj", "v_proj")
    modules = [f"model.layers.{i}.self_attn.{name}" for i in range(s.layers) for name in names]
    aligned, task = (Model(name, Path(name), SimpleNamespace(folder=Path("made up"), config={}, tensors={}), Adapter(
        name, Path(name), {}, {m: (torch.randn(s.rank, s.hidden, generator=generator) * 0.01,
                                   torch.randn(s.hidden if m.endswith("q_proj") else s.keys, s.rank,
                                               generator=generator) * 0.01) for m in modules}))
        for name in ("aligned", "task"))
    # where --plan looks for the rank of what is masked
    folder = place.results / "outputs" / "aligned"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": s.rank, "target_modules": names}))
    return _masked(place, gemm, aligned, task)


class Drawn(Model):
    """A model whose weights are drawn on the device whenever they are asked for, a little apart from each other's."""

    def stored(self, name: str) -> torch.Tensor:
        place: Place = self.checkpoint.place
        shape = self.checkpoint.tensors[name].shape
        own = torch.Generator(place.device).manual_seed(len(name) + 1000 * len(self.name))
        common = torch.Generator(place.device).manual_seed(len(name))
        if len(shape) == 1:
            return torch.ones(shape, device=place.device)
        drawn = torch.randn(shape, generator=common, device=place.device).mul_(0.02)
        return drawn.add_(torch.randn(shape, generator=own, device=place.device), alpha=1e-4)


def mask_on_weights(place: Place, gemm: float, bandwidth: float, *words: str) -> list[dict[str, Any]]:
    """A Concrete mask on whole weights; ``words`` say what shares a logit and in which type all is held."""
    tensors = {name: SimpleNamespace(shape=shape, dtype="F32") for name, shape in place.weights().items()}
    aligned, task = (Drawn(name, Path(name), SimpleNamespace(folder=Path(name), config={}, tensors=tensors, place=place))
                     for name in ("aligned", "task"))
    return _masked(place, gemm, aligned, task, "--mask_on", "weights", *words)


def _masked(place: Place, gemm: float, aligned: Model, task: Model, *words: str) -> list[dict[str, Any]]:
    parsed = place.flags("--moe_flag", "0", "--method", "mask", "--aligned", "aligned", "--tasks", "task", "--preset",
                         "embedded", "--per_device_train_batch_size", str(place.shape.pairs), *words)
    args, rows = parsed.args, place.pairs()
    arguments = preference_arguments(args, parsed.training, place.dtype, len(rows), validates=False)
    settings, specs = mask_model.settings_for(args, aligned, [task])
    on_weights = specs[0].part == "weight"
    with patch.object(mask_model, "load_base", place.load_base):
        model, slots = mask_model.live_model(settings, specs, aligned, [task], getattr(torch, args.storage), place.dtype,
                                             place.device)
    bank = MaskBank(slots, settings, args.mask_init, getattr(torch, args.logit_dtype))
    bank.write_given(lambda spec: mask_model.reference_values("aligned", spec, aligned, [task]))
    trainer = MaskTrainer(model=model, ref_model=None, args=arguments, train_dataset=Dataset.from_list(rows),
                          processing_class=place.tokenizer, flags=args, reference={"kind": args.reference})
    trainer.add_bank(bank, None)
    return [_of_pairs(place, place.fit(trainer, parsed), trainer, gemm, on_weights)]


def generation(place: Place, gemm: float, bandwidth: float, experts: bool = False) -> list[dict[str, Any]]:
    """Greedy answers in batches, as inference.py gives them; a fused MoE as ``load_moe`` leaves it."""
    s = place.shape
    model = fused(place, 8) if experts else place.base()
    for layer in moe_layers(model):
        for factors in layer.experts.values():
            factors.fold_(place.dtype)
    if experts and place.device.type == "cuda":
        pack(model)
    loaded = Loaded(model.eval(), place.tokenizer, template("chat", place.tokenizer), "made up", place.device)
    rows = []
    for batch in s.batches:
        # a byte is a token: no prompt is longer than another
        prompts = [chr(97 + i % 26) * s.asked for i in range(batch)]
        answer_batch(loaded, prompts, Decoding(min(4, s.new)), 0)
        memory.start(place.device)
        answer_batch(loaded, prompts, Decoding(s.new), 0)
        held = memory.held(place.device)
        # the second one finds what the first one asked the device for, as every batch of a command but its first
        start = time.perf_counter()
        answers = answer_batch(loaded, prompts, Decoding(s.new), 0)
        wait(place.device)
        seconds = time.perf_counter() - start
        if any(answer.finish != "length" for answer in answers):
            raise RuntimeError("an answer ended before its limit; the tokens of the batch are fewer")
        limit = s.generation_seconds(batch, place.dtype.itemsize, gemm, bandwidth)
        plan = memory.planned(place.answering(batch, "fused" if experts else ""), place, s.asked)
        rows.append({"batch": batch, "tokens_per_second": batch * s.new / seconds, "seconds": seconds,
                     "limit_seconds": limit, "of_limit": limit / seconds,
                     **memory.compared(plan, held)})
    return rows


_BY_ROW = ("--storage", "bfloat16", "--granularity", "row")
_HALF = ("--storage", "bfloat16", "--logit_dtype", "bfloat16")
#: Part -> what measures it: (place, operations/s, bytes/s) -> its rows.
MEASURES: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "SFT": sft,
    "SFT, checkpointing": lambda *a: sft(*a, checkpointing=True),
    "DPO": dpo,
    "DPO, checkpointing": lambda *a: dpo(*a, checkpointing=True),
    "DPO, embedded lengths": dpo_race,
    "DPO, embedded lengths, TRL": lambda *a: dpo_race(*a, theirs=True),
    "MoE tuning": moe,
    "MoE tuning, checkpointing": lambda *a: moe(*a, checkpointing=True),
    "mask on factors": mask,
    "mask on weights, by row, bf16": lambda *a: mask_on_weights(*a, *_BY_ROW),
    "mask on weights, by element": mask_on_weights,
    "mask on weights, by element, bf16": lambda *a: mask_on_weights(*a, *_HALF),
    "full tuning": lambda *a: sft(*a, full=True),
    "full tuning, checkpointing": lambda *a: sft(*a, checkpointing=True, full=True),
    "generation": generation,
    "generation, fused MoE": lambda *a: generation(*a, experts=True),
}
