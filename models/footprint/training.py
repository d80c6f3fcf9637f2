"""What a training holds on a device, from its flags and the shape of its base: the same formulas for --plan and workflow/.

Weights below an adapter are held in the compute type, what trains in fp32 with its gradient and the optimiser's state; what
a forward pass keeps is ``activations.py``'s; a mask's tensors are ``models/mask/memory.py``'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from flags import DpoArgs, FusedMoeArgs, MaskArgs, SearchArgs, SoupArgs
from flags.base import OBJECTIVES
from flags.mask import SHARED_OUT
from models.footprint.activations import Pass, answering, head, kept, passing
from models.footprint.shapes import ATTENTION, FFN, Shape
from models.footprint.strategies import Footprint
from models.mask.memory import Sizes, bytes_of
from models.mask.settings import rule_for

#: Bytes a process holds beside its tensors: on a GPU the CUDA context and the products' workspace; on a CPU the interpreter
#: with torch, transformers and trl (tests measure growth beyond it).
CONTEXT = {True: 1.0e9, False: 0.7e9}
#: Shares that a GPU's caching allocator keeps beside tensors, of what comes and goes and, where every weight trains, of
#: weights, gradients and optimiser: no less than an H200 showed (docs/performance.md).
ALLOCATOR, ALLOCATOR_EVERY = 0.25, 0.1
#: Bytes of state a number that trains; others as AdamW: two moments in fp32.
STATES = {"sgd": 0.0, "adafactor": 0.02, "adagrad": 4.0, "lion_32bit": 4.0, "lion_8bit": 1.0, "paged_lion_8bit": 1.0,
          "adamw_8bit": 2.0, "adamw_bnb_8bit": 2.0, "paged_adamw_8bit": 2.0}
#: Bytes of a weight in few bits: codes, and scales of the blocks.
_BITS = {"int8": 1.0, "nf4": 0.53}
#: A LoRA whose folder is not there yet: SOMF's rank on q and v; the experts' on the FFN.
_UNSEEN = (256, ("q_proj", "v_proj"))


@dataclass(frozen=True)
class Place:
    """Where a command computes: on a GPU or not, bytes of the compute type."""

    cuda: bool
    compute: int


def base_bytes(shape: Shape, place: Place, bits: str = "") -> float:
    """Bytes of a frozen base; in few bits its embeddings, head and norms are fp32."""
    if not bits:
        return shape.parameters * place.compute
    return shape.linear * _BITS[bits] + (shape.parameters - shape.linear) * 4


def training(args: Any, extra: Mapping[str, Any], shape: Shape, place: Place, tokens: int = 0) -> Footprint:
    """One device's share of a step of ``align_basemodel.py``, undivided.

    Args:
        args: of an objective (``flags.TRAINED``).
        extra: training arguments of the command line and the preset.
        tokens: of the longest row; 0: --model_max_length.
    """
    if isinstance(args, SearchArgs) and not isinstance(args, SoupArgs):
        return _search(args, shape, place, tokens)
    bits = getattr(args, "base_quantization", None) or ""
    step, trained, data, mask = _parts(args, extra, shape, place, tokens)
    states = STATES.get(str(extra.get("optim") or ""), 8.0)
    if mask:
        held = dict(mask.held)
        gradients, optimiser = held.pop("their gradient"), held.pop("optimiser") * states / 8
        # whole weights under a mask are the model's own, factors and what they are made of stand beside it
        weights = held.pop("frozen weights") + (held.pop("live weights") if step.masked else 0)
        data, copied = sum(held.values()), mask.masked
    else:
        weights = shape.parameters * 4.0 if step.every else base_bytes(shape, place, bits) + trained * 4.0
        gradients, optimiser = trained * 4.0, trained * states
        copied = shape.linear + shape.vocabulary * shape.hidden if step.every else trained
    # what is held in fp32 and has a gradient computes in copies that live as long as the pass
    wide = place.compute < 4 and not (step.masked and args.storage == "bfloat16")
    activations = kept(shape, step) + place.compute * copied * wide
    moment = max(passing(shape, step), mask.passing if mask else 0.0)
    found = _whole(shape, place, trained, weights, data, gradients, optimiser, activations, moment)
    if step.every and not mask:
        slack = ALLOCATOR_EVERY * (weights + gradients + optimiser) if place.cuda else 0.0
        found = replace(found, allocator=found.allocator + slack, in_turn=args.gradient_accumulation_steps == 1)
    return replace(found, shared=bool(mask) and str(extra.get("optim") or SHARED_OUT[0]) in SHARED_OUT)


def on_weights(args: Any) -> bool:
    """Whether a mask works on whole weights, not on LoRA factors; where tasks went on with the aligned adapter they are
    factors."""
    return args.granularity != "rank" and (args.mask_on == "weights" or args.mask_on == "auto" and not args.aligned)


def _whole(shape: Shape, place: Place, trained: int, weights: float, data: float, gradients: float, optimiser: float,
           activations: float, moment: float) -> Footprint:
    one = place.compute
    return Footprint(
        shape.parameters, trained, weights, gradients, optimiser, activations, moment, context=CONTEXT[place.cuda],
        allocator=ALLOCATOR * (activations + moment) if place.cuda else 0.0, data=data,
        unit=weights * shape.layer / shape.parameters, root=shape.embeddings * (4 if gradients >= shape.parameters else one))


def _parts(args: Any, extra: Mapping[str, Any], shape: Shape, place: Place, tokens: int
           ) -> tuple[Pass, int, float, Any]:
    """(the pass, numbers that train, bytes beside the model, a mask's plan) of an objective."""
    rows, length = args.per_device_train_batch_size, tokens or args.model_max_length
    again = bool(extra.get("gradient_checkpointing") or extra.get("activation_checkpointing")
                 or getattr(args, "base_quantization", None))
    pairs = isinstance(args, DpoArgs | MaskArgs)
    length *= 2 if pairs else 1
    common = {"rows": rows, "tokens": length, "answers": rows * length, "compute": place.compute, "cuda": place.cuda,
              "checkpointing": again, "pairs": pairs}
    if isinstance(args, FusedMoeArgs):
        # three experts of the same rank where the MoE is not built yet
        experts, rank = fused(args.results / "outputs" / args.raw_moe, args.lora_r)
        experts = experts or len(OBJECTIVES)
        attention = ATTENTION if args.attention_lora else ()
        trained = shape.lora(args.lora_r, FFN) * experts + shape.lora(args.lora_r, attention) + (
            experts * shape.hidden * shape.layers)
        step = Pass(**common, modules=(*attention, *FFN), dropout=args.lora_dropout > 0, experts=experts,
                    ranks=rank + args.lora_r)
        return step, trained, 4.0 * experts * shape.lora(rank, FFN), None
    if isinstance(args, MaskArgs):
        return _mask(args, shape, place, common)
    if isinstance(args, SoupArgs):
        loras = [_lora(args.results, name, (8, FFN)) for name in args.adapter_names]
        step = Pass(**common, mixed=tuple(modules for _, modules in loras))
        return step, shape.layers * len(loras), 4.0 * sum(shape.lora(rank, modules) for rank, modules in loras), None
    if args.tuning == "full":
        return Pass(**common, every=True), shape.parameters, 0.0, None
    modules = tuple(name.strip() for name in (args.lora_targets or "").split(",") if name.strip()) or FFN
    rank = args.lora_r
    if args.init_adapter:
        rank, modules = _lora(args.results, args.init_adapter, (rank, modules))
    # TRL turns every dropout off
    step = Pass(**common, modules=modules, dropout=args.lora_dropout > 0 and not pairs)
    return step, shape.lora(rank, modules), 0.0, None


def _mask(args: MaskArgs, shape: Shape, place: Place, common: Mapping[str, Any]) -> tuple[Pass, int, float, Any]:
    tasks = max(len(args.task_names), 1)
    rule = rule_for(args.merge_rule or "single", tasks, args.merge_lambda, args.ties_density, args.dare_drop)
    rank, modules = _lora(args.results, args.aligned or (args.task_names or ("",))[0], _UNSEEN)
    whole = on_weights(args)
    logit = {"float32": 4, "bfloat16": 2}[args.logit_dtype]
    if not whole:
        inner, outer = shape.widths(modules)
        entries = masked = shape.layers * rank * (inner + outer)
        if args.granularity == "rank":
            # factors of the aligned model and of every task side by side; their singular values are masked
            entries = masked = masked * (1 + 2 * tasks)
        rows_of = 2 * rank * shape.layers * len(modules) if args.granularity == "row" else 0
        sizes = Sizes(entries, masked, _units(args, masked, rows_of, shape, len(modules) * 2, rank), 0,
                      rank * max(shape.hidden, shape.intermediate), 0)
        held = bytes_of(sizes, rule, tasks, 4, logit, shape.parameters, place.compute)
        step = Pass(**common, modules=modules)
    else:
        storage = {"float32": 4, "bfloat16": 2}[args.storage]
        # an adapter changes its own modules; a tuned model differs in every tensor
        found = _lora(args.results, (args.task_names or ("",))[0], None)
        changed = found[1] if found else (*ATTENTION, *FFN)
        masked = shape.matrices(changed) if args.excluded or found else shape.parameters
        entries = masked if found else shape.parameters
        sizes = Sizes(entries, masked, _units(args, masked, shape.layers * shape.widths(changed)[1], shape, len(changed), 0),
                      entries, shape.hidden * shape.intermediate, 0)
        held = bytes_of(sizes, rule, tasks, storage, logit, shape.parameters, storage)
        step = Pass(**common, modules=changed, masked=True)
    return step, sizes.logits, 0.0, held


def _units(args: MaskArgs, masked: int, rows: int, shape: Shape, tensors: int, rank: int) -> int:
    """How many logits a granularity has."""
    return {"element": masked, "row": rows, "block": ceil(masked / args.mask_block), "head": shape.layers * 4 * shape.heads,
            "layer": shape.layers * tensors, "rank": shape.layers * 2 * rank * tensors // 2}[args.granularity]


def _search(args: SearchArgs, shape: Shape, place: Place, tokens: int) -> Footprint:
    rows, length = args.per_device_train_batch_size, tokens or args.model_max_length
    loras = [_lora(args.results, name, (8, FFN)) for name in args.adapter_names]
    data = 4.0 * sum(shape.lora(rank, modules) for rank, modules in loras)
    step = Pass(rows, length, rows * length, place.compute, place.cuda)
    moment = max(answering(shape, rows, length, place.compute, place.cuda), head(shape, step))
    return _whole(shape, place, 0, base_bytes(shape, place), data, 0.0, 0.0, 0.0, moment)


def fused(folder: Path, rank: int) -> tuple[int, int]:
    """(experts, ranks of their aligned and tuned factors together) of a fused MoE; (0, ``rank``) where there is none."""
    try:
        experts = len(json.loads((folder / "moe_config.json").read_text(encoding="utf-8"))["experts"])
        with (folder / "moe.safetensors").open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        factors = [header[name]["shape"][1] for part in ("a", "tuned_a") if (name := f"layers.0.gate.{part}") in header]
        return experts, sum(factors)
    except (OSError, ValueError, LookupError, TypeError):
        return 0, rank


def _lora(results: Path, name: str, unseen: Any) -> Any:
    """(rank, modules) of an adapter, a run or a folder; ``unseen`` where it is not there yet."""
    folder = Path(name).expanduser() if "/" in name else results / "outputs" / name
    try:
        content = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        modules = content["target_modules"]
        return int(content["r"]), tuple(sorted({module.rpartition(".")[2] for module in modules}))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return unseen
