"""Learn the weights of trained adapters: by gradient (LoRA Soups) or without one (LoraHub's way, with COBYQA).

    align_basemodel.py --moe_flag 0 --method soup --adapters identity,safe --task_name dialogs --data_path few.jsonl
    align_basemodel.py --moe_flag 0 --method search --adapters identity,safe --task_name dialogs --data_path few.jsonl

soup: adapters stay as they are, one logit per adapter and layer trains, Delta^l = sum_i softmax(a^l)_i s_i B_i A_i, all
equal at the start (Prabhakar et al. 2024, arXiv 2410.13025). search: one free weight per adapter in [-1.5, 1.5], which
minimises the mean loss of the rows' kinds (refusals, answers) plus 0.05 mean |w| (Huang et al. 2023, arXiv 2307.13269), on
the exact sum of the changes and not on LoraHub's product of sums. Both write the fused adapter and weights.json.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import manifest
from data.collate import pad_rows
from data.records import OBJECTIVES
from errors import UserError
from flags import SearchArgs, SoupArgs
from flags.launch import processes
from models.adapters.apply import check_fit
from models.adapters.files import Adapter, in_order, layer_of, read_adapter, targets_of, write_adapter
from models.adapters.fuse import common_base, fuse
from models.adapters.methods import ADAPTER_METHODS, Cat
from models.base.loading import base_path, check_base, load_base, load_tokenizer, skeleton
from models.base.parted import whole
from models.base.placement import set_up_torch
from models.run_folders import run_folder
from training.answers import AnswerModel
from training.samples import contrast_inputs, training_rows
from training.trainer import FusionTrainer, fit, loaded_on, training_arguments

log = logging.getLogger(__name__)
WEIGHTS = "weights.json"
#: LoraHub's: bounds of a weight, evaluations, and the price of its size.
BOUND, BUDGET, PRICE = 1.5, 40, 0.05


class MixedModel(AnswerModel):
    """A frozen causal LM with sum_i w_i B_i A_i x added to the output of every adapted module.

    Args:
        adapters: scale applied to B; a module that only some of them train gets those.
        per_layer: a softmax over logits per layer (soup); else the plain ``weights`` (search).
        device: where the model answers, to which the adapters go; None: where its weights are.
    """

    def __init__(self, lm: nn.Module, dtype: torch.dtype, adapters: Sequence[Adapter], per_layer: bool,
                 device: torch.device | None = None) -> None:
        super().__init__(lm.requires_grad_(False), dtype)
        modules = in_order(adapters)
        layers = sorted({layer for module in modules if (layer := layer_of(module)) is not None})
        self.layers: list[int | None] = [*layers] or [None]
        # equal logits: every adapter starts at the same share
        self.logits = nn.Parameter(torch.zeros(len(self.layers), len(adapters)), requires_grad=per_layer)
        self.weights: Tensor | None = None
        there = dict(lm.named_modules())
        if absent := [module for module in modules if module not in there]:
            raise UserError(f"--adapters: this base has no module {absent[0]}; give the adapters' own base with "
                            "--model_name_or_path")
        for module in modules:
            place = device or there[module].weight.device
            parts = [tuple(t.to(place) for t in adapter.modules[module]) if module in adapter.modules else None
                     for adapter in adapters]
            there[module].register_forward_hook(self._hook(layer_of(module), parts))

    def _hook(self, layer: int | None, parts: Sequence[tuple[Tensor, Tensor] | None]) -> Any:
        """Adds to outputs (batch, time, out) from inputs (batch, time, in); A is (rank, in), B (out, rank)."""
        # a module outside the layers has no logits of its own and takes the first layer's, as ``save_fused`` does
        row = self.layers.index(layer) if layer in self.layers else 0

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            weights = self.shares()[row]
            hidden = inputs[0].to(self.dtype)
            for weight, part in zip(weights, parts, strict=True):
                if part is not None:
                    a, b = (t.to(self.dtype) for t in part)
                    # by A, then by B: B A itself would be (out, in) for every adapter
                    output = output + (weight * ((hidden @ a.T) @ b.T)).to(output.dtype)
            return output

        return add

    def shares(self) -> Tensor:
        """(layers, adapters): what each adapter counts in each layer."""
        return self.logits.softmax(1) if self.weights is None else self.weights.expand(len(self.layers), -1)


def train(args: SearchArgs, extra: dict[str, Any], run: manifest.Run) -> None:
    """Find the weights, write the fused adapter, its weights and the run's facts into ``run``."""
    if args.method == "search" and processes() > 1:
        raise UserError("--method search: searches in one process; start it without a launcher")
    base = base_path(args.model_name_or_path, args.cache_dir)
    folders = [Path(n).expanduser() if "/" in n else run_folder(args.results, n) for n in args.adapter_names]
    adapters = [read_adapter(folder, name) for folder, name in zip(folders, args.adapter_names, strict=True)]
    common_base(adapters)
    # each of them raises for any other base, so there is one hash
    base_hash = {check_base(folder, base) for folder in folders}.pop()
    check_fit(adapters, skeleton(base))
    tokenizer = load_tokenizer(base)
    rows, validation = training_rows(args, tokenizer, base)
    device, dtype = set_up_torch(args)
    arguments = None
    if isinstance(args, SoupArgs):
        arguments = training_arguments(args, extra, rows=len(rows), validates=bool(validation))
    where = loaded_on(arguments, device) if arguments else device
    model = MixedModel(load_base(base, dtype, where), dtype, adapters, isinstance(args, SoupArgs), device)

    def save(folder: Path) -> None:
        save_fused(model, adapters, args, folder)
        if not manifest.is_main():
            return
        tokenizer.save_pretrained(folder)
        manifest.write_json(folder / manifest.MANIFEST, {"status": "checkpoint", "inputs": {"base": base_hash}})

    if isinstance(args, SoupArgs):
        trainer = FusionTrainer(model=model, args=arguments, train_dataset=rows,
                                eval_dataset=validation or None, processing_class=tokenizer, epoch_decay=args.lr_epoch_decay)
        trainer.save_artifact = save
        run.metrics.update(fit(trainer, args, extra))
    else:
        run.metrics.update(search(model.to(device), rows, tokenizer.pad_token_id, args, len(adapters)))
    save(run.folder)
    run.metrics["weights"] = {name: round(float(value), 5) for name, value in zip(
        args.adapter_names, whole(model.shares().detach()).mean(0), strict=True)}
    run.parents.extend(map(str, folders))
    run.inputs.update(base=base_hash, **{adapter.name: adapter.sha256 for adapter in adapters},
                      **contrast_inputs(args.contrast_share))


def search(model: MixedModel, rows: Sequence[dict[str, Any]], pad_id: int, args: SearchArgs, count: int) -> dict[str, Any]:
    """Set the model's weights to the best found within the budget, from 0 on; returns metrics. Deterministic.

    The loss is the mean over the kinds of rows that there are, so that many answers do not outweigh few refusals.
    """
    from scipy.optimize import Bounds, minimize

    kinds = {name: [row for row in rows if row["objective"] == i] for i, name in enumerate(OBJECTIVES)}
    kinds = {name: kind_rows for name, kind_rows in kinds.items() if kind_rows}
    tried: list[tuple[float, list[float]]] = []

    def objective(weights: Any) -> float:
        model.weights = torch.tensor(weights, dtype=torch.float32, device=model.logits.device)
        losses = [mean_loss(model, kind_rows, pad_id, args.per_device_train_batch_size) for kind_rows in kinds.values()]
        value = sum(losses) / len(losses) + PRICE * float(abs(weights).mean())
        tried.append((value, [float(w) for w in weights]))
        log.info("weights %s: %.4f", " ".join(f"{w:+.3f}" for w in weights), value)
        return value

    minimize(objective, [0.0] * count, method="COBYQA", bounds=Bounds([-BOUND] * count, [BOUND] * count),
             options={"maxfev": BUDGET, "initial_tr_radius": 0.5, "final_tr_radius": 0.01})
    # of all that were tried: the budget may end COBYQA on a worse point
    best, weights = min(tried)
    model.weights = torch.tensor(weights, dtype=torch.float32, device=model.logits.device)
    # the first evaluation is at weights of 0, the base itself
    return {"loss": best, "loss_at_start": tried[0][0], "evaluations": len(tried),
            "kinds": {name: len(kind_rows) for name, kind_rows in kinds.items()}}


@torch.inference_mode()
def mean_loss(model: MixedModel, rows: Sequence[dict[str, Any]], pad_id: int, batch: int) -> float:
    """Loss per answer token over rows."""
    total, tokens = 0.0, 0
    # like lengths together, for less padding; sums do not depend on the order
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(ordered), batch):
        inputs = {k: v.to(model.logits.device) for k, v in pad_rows(ordered[start : start + batch], pad_id).items()}
        parts = model(**inputs)
        total, tokens = total + float(parts["lm"]), tokens + int(parts["tokens"])
    return total / max(tokens, 1)


def save_fused(model: MixedModel, adapters: Sequence[Adapter], args: SearchArgs, folder: Path) -> None:
    """The adapter that the weights make of the others, exactly, and the weights layer by layer."""
    folder.mkdir(parents=True, exist_ok=True)
    shares = whole(model.shares().detach()).cpu().tolist()
    if not manifest.is_main():
        return
    by_layer = {layer: row for layer, row in zip(model.layers, shares, strict=True) if layer is not None}
    fused = fuse(adapters, ADAPTER_METHODS["cat"], Cat(), shares[0], by_layer, args.seed)
    write_adapter(folder, {m: done.pair for m, done in fused.items()}, targets_of(adapters), adapters[0].config)
    layers = {str(layer): row for layer, row in zip(model.layers, shares, strict=True)}
    manifest.write_json(folder / WEIGHTS, {"adapters": list(args.adapter_names), "method": args.method, "layers": layers})
