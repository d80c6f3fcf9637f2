"""Tuning of the fused MoE: language-model loss + lambda * gating loss + sum of gamma_i * drift_i (H3Fusion, section 5)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import manifest
from data.encode import IGNORE
from data.records import OBJECTIVES
from errors import UserError
from flags import FusedMoeArgs
from models.base.loading import base_path, load_tokenizer
from models.base.parted import whole
from models.base.placement import set_up_torch
from models.base.quantised import whole_weight
from models.moe.files import MoeConfig, add_tuning, assemble, moe_layers, read_config, save_moe
from models.moe.layer import PROJECTIONS, SharedMoe, TuningConfig
from models.moe.router import drift, gate_loss, low_rank_norm, mean_probabilities, published_weight_norm
from models.run_folders import run_folder
from training.answers import AnswerModel
from training.distributed.batches import BLANK
from training.samples import contrast_inputs, training_rows
from training.trainer import LOSS, FusionTrainer, fit, loaded_on, training_arguments

log = logging.getLogger(__name__)


class MoeLoss(AnswerModel):
    """The answer loss plus routing and drift terms of a fused model.

    forward returns, beside ``lm`` and ``tokens``: ``gate``, the summed gating loss of the samples; ``drift_NAME`` per
    expert; and ``share_right``, the summed mean probability of each sample's own expert.
    """

    def __init__(self, lm: nn.Module, dtype: torch.dtype, experts: tuple[str, ...], args: FusedMoeArgs) -> None:
        super().__init__(lm, dtype)
        self.moe = moe_layers(lm)
        self.experts, self.published = experts, args.compat == "published"
        # the published term averages over prompts and pads as well (spec section 5.2)
        self.gate_tokens = "all" if self.published else args.gate_tokens
        self.per_layer, self.drift_mode = args.gate_per_layer, args.drift_mode
        self.gate_weight = args.gate_loss_weight
        #: The experts whose drift trains something; that of the others is only told.
        self.held = tuple(name for name, gamma in zip(experts, args.gammas, strict=False) if gamma)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, objectives: Tensor,
                predicting: Tensor | None = None) -> dict[str, Tensor]:
        """As the answer loss; a layer's probabilities are (batch, time, experts), their means (layers, batch, experts)."""
        with self._recorded() as probabilities:
            parts = super().forward(input_ids, attention_mask, labels, objectives, predicting)
        # by sample, not by batch: a sample with few tokens weighs as much as one with many (H3Fusion's spec, section 5.2)
        means = mean_probabilities(probabilities,
                                   token_mask(self.gate_tokens, attention_mask, labels))
        if not self.gate_weight:
            # a term of weight 0 is told, and pulls no graph behind it
            means = means.detach()
        # a blank row, with which several processes fill a short batch up, counts for nothing
        counts, right = (objectives != BLANK).float(), objectives.clamp_min(0)
        parts["gate"] = (gate_loss(means, right, per_layer=self.per_layer, published=self.published) * counts).sum()
        parts["share_right"] = (means.detach().mean(0).gather(1, right[:, None])[:, 0] * counts).sum()
        parts |= self.drifts(self.held if self.training else self.experts)
        return parts

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[list[Tensor]]:
        """Fills the list with each layer's router probabilities (batch, time, experts) of the pass within.

        In that pass alone: when checkpointed layers are computed again, what they kept would hold each layer's whole graph
        until the next step.
        """
        kept: list[Tensor] = []
        for layer in self.moe:
            layer.record = True
        try:
            yield kept
            kept += [layer.probabilities for layer in self.moe]
        finally:
            for layer in self.moe:
                layer.record, layer.probabilities = False, None

    def drifts(self, names: Sequence[str]) -> dict[str, Tensor]:
        """{"drift_NAME": regulariser of that expert in the chosen mode}; what all share is computed once."""
        if not names:
            return {}
        of = {name: self.experts.index(name) for name in names}
        if self.published:
            factors = [layer.experts[name] for layer in self.moe for name in PROJECTIONS]
            return {f"drift_{name}": published_weight_norm([[whole(f.tuned_a)[i], whole(f.tuned_b)[i]] for f in factors],
                                                           self.aligned_norms[i].tolist(), len(self.moe))
                    for name, i in of.items()}
        norms = change_norms(self.moe)
        bases = self.aligned_norms if self.drift_mode == "relative" else norms
        return {f"drift_{name}": drift(norms[i], bases[i], self.drift_mode) for name, i in of.items()}

    @functools.cached_property
    def aligned_norms(self) -> Tensor:
        """(experts, matrices): norms of the aligned weights, for the modes that compare with them."""
        return torch.stack([n for layer in self.moe for n in aligned_norms(layer)], 1)


def token_mask(which: str, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """(batch, time): the tokens that the gating loss averages over."""
    answer = (labels != IGNORE).long()
    return {"answer": answer, "prompt": attention_mask * (1 - answer), "nonpad": attention_mask,
            "all": torch.ones_like(attention_mask)}[which]


def change_norms(layers: Sequence[SharedMoe]) -> Tensor:
    """(experts, matrices): ||(alpha / r) B'_e A'_e||_F of gate, up and down of every layer, layer by layer.

    Matrices of a shape go through one product each: by themselves they are hundreds of small ones a pass.
    """
    norms = []
    for name in PROJECTIONS:
        factors = [layer.experts[name] for layer in layers]
        # outside of the layers' own passes FSDP2 has them in parts
        a, b = (torch.stack([whole(getattr(f, part)) for f in factors]) for part in ("tuned_a", "tuned_b"))
        norms.append(factors[0].scale * low_rank_norm(a, b))  # (layers, experts)
    return torch.stack(norms, 1).flatten(0, 1).T.contiguous()


@torch.no_grad()
def aligned_norms(layer: SharedMoe) -> list[Tensor]:
    """(experts,) per projection: ||W + B A||_F of the aligned experts, without forming any of them.

    Shapes: W (out, in), A (experts, rank, in), B (experts, out, rank).
    """
    norms = []
    for name, linear in zip(PROJECTIONS, (layer.gate_proj, layer.up_proj, layer.down_proj), strict=True):
        factors, weight = layer.experts[name], whole(whole_weight(linear)).float()
        a, b = factors.a.float(), factors.b.float()
        # ||W + B A||^2 = ||W||^2 + 2 <B' W, A> + <B' B, A A'>; fp32, for these are sums of millions of squares
        cross = ((b.mT @ weight) * a).sum((-1, -2))
        own = ((b.mT @ b) * (a @ a.mT)).sum((-1, -2))
        # a square, but rounding may leave it just below 0, and the root would be NaN
        norms.append((weight.square().sum() + 2 * cross + own).clamp_min(0).sqrt())
    return norms


def train(args: FusedMoeArgs, extra: dict[str, Any], run: manifest.Run) -> None:
    """Tune a raw MoE and write routers, experts, attention LoRA, configuration and tokenizer into ``run``."""
    raw = run_folder(args.results, args.raw_moe)
    config = read_config(raw)
    check(args, config)
    base = base_path(args.model_name_or_path, args.cache_dir)
    tokenizer = load_tokenizer(raw, base)
    train_rows, validation = training_rows(args, tokenizer, base)
    device, dtype = set_up_torch(args)
    # three gammas, one for each objective; a MoE of fewer experts takes the first ones
    gammas = {f"drift_{name}": gamma for name, gamma in zip(config.experts, args.gammas, strict=False)}
    arguments = training_arguments(args, extra, rows=len(train_rows), validates=bool(validation), measured={
        **LOSS, "gate": False, **dict.fromkeys(gammas, False), "share_right": True})
    model, config = assemble(raw, args, dtype, loaded_on(arguments, device), top_k=args.expert_topk,
                             bits=args.base_quantization)
    experts = TuningConfig(args.lora_r, args.lora_alpha, args.lora_dropout)
    attention = experts if args.attention_lora else None
    config = dataclasses.replace(config, top_k=args.expert_topk, tuning=experts, attention=attention)
    prepare(model, args, experts, attention)
    trainer = MoeTrainer(
        router_lr=args.router_learning_rate, model=MoeLoss(model, dtype, config.experts, args), args=arguments,
        train_dataset=train_rows, eval_dataset=validation or None, processing_class=tokenizer,
        pad_to=args.model_max_length if args.pad_to_max else None,
        # share_right trains nothing: at weight 0 it is only logged
        weights={"gate": args.gate_loss_weight, **gammas, "share_right": 0.0}, per_sample=("gate", "share_right"),
    )

    def save(folder: Path) -> None:
        save_moe(folder, model, config)
        tokenizer.save_pretrained(folder)

    trainer.save_artifact = save
    run.metrics.update(fit(trainer, args, extra))
    save(run.folder)
    run.parents.append(str(raw))
    run.inputs.update(base=config.base_fingerprint, raw_moe=manifest.sha256(raw / "moe.safetensors"),
                      **contrast_inputs(args.contrast_share))


def prepare(model: nn.Module, args: FusedMoeArgs, experts: TuningConfig, attention: TuningConfig | None) -> None:
    """Add the second-stage LoRA and set what trains: LoRA always, the router unless told otherwise."""
    add_tuning(model, experts, attention, args.seed)
    train_router = args.train_router and args.compat != "published"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("tuned_" in name or "lora_" in name or (name.endswith(".router") and train_router))
        if parameter.requires_grad:
            # what trains is fp32: Adam in bfloat16 stops learning A below a rate of 1e-4 (docs/lab-log.md, 2026-11-21)
            parameter.data = parameter.data.float()


class MoeTrainer(FusionTrainer):
    """FusionTrainer with a learning rate of its own for the router."""

    optimizer: torch.optim.Optimizer | None

    def __init__(self, *args: Any, router_lr: float | None = None, **kwargs: Any) -> None:
        self.router_lr = router_lr
        super().__init__(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            loss: MoeLoss = self.accelerator.unwrap_model(self.model)
            with torch.no_grad():
                # drifts that train nothing, as they stand now: in every step they would cost more than they tell
                told = loss.drifts([name for name in loss.experts if name not in loss.held])
            logs |= {f"loss_{name}": round(float(value), 5) for name, value in told.items()}
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is None and self.router_lr is not None:
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            decay = {"weight_decay": self.args.weight_decay}
            self.optimizer = kind([
                {"params": [p for n, p in named if not n.endswith(".router")], **decay},
                # no decay: it would pull every row of the router to 0, which is an equal share for each expert
                {"params": [p for n, p in named if n.endswith(".router")], "lr": self.router_lr, "weight_decay": 0.0},
            ], **options)
        return super().create_optimizer(*args, **kwargs)


def check(args: FusedMoeArgs, config: MoeConfig) -> None:
    """Every disagreement between the flags and the raw MoE, before a model is loaded."""
    problems = []
    if args.expert_topk > len(config.experts):
        problems.append(f"--expert_topk {args.expert_topk}: '{args.raw_moe}' has {len(config.experts)} experts; "
                        f"allowed: 1 to {len(config.experts)}")
    if config.tuning is not None:
        problems.append(f"--raw_moe {args.raw_moe}: is tuned already; start from a raw one (models/llama_moe.py)")
    if args.gate_loss_weight and len(config.experts) < len(OBJECTIVES):
        problems.append(f"--gate_loss_weight {args.gate_loss_weight}: the data has {len(OBJECTIVES)} objectives but "
                        f"'{args.raw_moe}' {len(config.experts)} experts; use 0")
    if problems:
        raise UserError(*problems)
