"""The tensors that a mask works on: of whole weights, of LoRA factors, or of the singular components of LoRA changes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from errors import UserError
from models.adapters.files import in_order
from models.mask.rescale import RESCALINGS
from models.mask.settings import Settings
from models.mask.units import RankLayout, Units, matrix_of, units_of
from models.operators.low_rank import Pair
from models.task_vectors import Model, differing, vector

# as transformers' families spell them: Llama and its kin, OPT, GPT-2, BLOOM, GPT-NeoX
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|embed_positions|wte|wpe|word_embeddings)\.")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.")
_NORM = re.compile(r"(^|\.)[^.]*norm[^.]*\.|(^|\.)ln_[^.]*\.")


@dataclass(frozen=True)
class Spec:
    """One tensor that receives the masked task vectors.

    Args:
        name: of the tensor: a weight's, or MODULE.lora_A, MODULE.lora_B.
        weight: the checkpoint's tensor that changes.
        part: "weight": the weight itself; "A", "B": a LoRA factor; "rank": a B whose columns are singular components, one
            unit each (``RankLayout``).
        units: what shares a logit; None: excluded, its task vector stays whole.
    """

    name: str
    weight: str
    part: str
    shape: tuple[int, ...]
    units: Units | None

    @property
    def required_units(self) -> Units:
        """The units; a ValueError where the tensor is excluded."""
        if self.units is None:
            raise ValueError(f"{self.name}: is not masked")
        return self.units

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns), as the units see the tensor."""
        return matrix_of(self.shape)

    @property
    def module(self) -> str:
        """The module that the weight belongs to, as adapters name it."""
        return self.weight.removesuffix(".weight")


def kind_of(name: str) -> str:
    """"embeddings", "head", "norms" or "matrix"."""
    # word_embeddings_layernorm. is a norm: "word_embeddings." needs its dot
    for kind, pattern in (("embeddings", _EMBEDDINGS), ("head", _HEAD), ("norms", _NORM)):
        if pattern.search(name):
            return kind
    return "matrix"


def plan(settings: Settings, aligned: Model, tasks: Sequence[Model]) -> list[Spec]:
    """Every tensor in which a task differs from the aligned model, with its units.

    Raises:
        UserError: factors or rank components of models that have none, or of shapes that differ; nothing to mask.
    """
    config = aligned.checkpoint.config
    # from headers and shapes: refusals must not wait for weights to be read
    if settings.space == "weights" and settings.granularity != "rank":
        specs = []
        for name in differing(tasks, aligned):
            shape = tuple(aligned.checkpoint.tensors[name].shape)
            excluded = kind_of(name) in settings.exclude
            specs.append(Spec(name, name, "weight", shape, None if excluded else
                              units_of(name, shape, settings.granularity, settings.block, config)))
    else:
        _check_adapters(aligned, tasks)
        modules = in_order([m.adapter for m in (*tasks, aligned) if m.adapter])
        if settings.granularity == "rank":
            specs = [_rank_spec(module, aligned, tasks) for module in modules]
        else:
            specs = [spec for module in modules for spec in _factor_specs(module, settings, aligned, tasks)]
        specs = [replace(spec, units=None) if kind_of(spec.weight) in settings.exclude else spec for spec in specs]
    if not any(spec.units is not None and spec.units.size for spec in specs):
        raise UserError("nothing to mask: the tasks differ from the aligned model in no tensor that is not excluded; check "
                        "--aligned, --tasks and --mask_exclude")
    return specs


def _check_adapters(aligned: Model, tasks: Sequence[Model]) -> None:
    """Factors can be masked where every task is a plain LoRA on the aligned model's checkpoint."""
    problems = []
    for task in tasks:
        if task.adapter is None or task.checkpoint.folder != aligned.checkpoint.folder:
            problems.append(f"--tasks {task.name}: no LoRA adapter on the aligned model's base; use --mask_on weights and "
                            "another granularity than rank")
        elif task.adapter.config.get("fan_in_fan_out"):
            problems.append(f"--tasks {task.name}: fan_in_fan_out layers; use --mask_on weights")
    if problems:
        raise UserError(*problems)


def _factor_specs(module: str, settings: Settings, aligned: Model, tasks: Sequence[Model]) -> list[Spec]:
    """The specs of a module's A and B, each with logits of its own."""
    config = aligned.checkpoint.config
    # theta_i - theta_s of factors means something only where A_i and B_i started from A_s and B_s (spec section 4.1)
    example = _some_factors(module, (*tasks, aligned))
    shapes = [factor.shape for factor in example]
    odd = [model.name for model in (aligned, *tasks) if [f.shape for f in factors(model, module, example)] != shapes]
    if odd:
        raise UserError(f"{module}: rank differs between {', '.join(odd)} and the others; factors can be masked where tasks "
                        "went on with the aligned adapter (--init_adapter), or use --mask_on weights")
    specs = []
    for part, tensor in zip("AB", example, strict=True):
        shape = tuple(tensor.shape)
        specs.append(Spec(f"{module}.lora_{part}", f"{module}.weight", part, shape,
                          units_of(module, shape, settings.granularity, settings.block, config, part)))
    return specs


def _rank_spec(module: str, aligned: Model, tasks: Sequence[Model]) -> Spec:
    """The spec of a module's components, from shapes alone: nothing is decomposed for a plan."""
    example_a, example_b = _some_factors(module, (*tasks, aligned))
    out, inputs = example_b.shape[0], example_a.shape[1]
    aligned_rank = _rank_of(aligned, module)
    # a task's change B_i A_i - B_s A_s stacks both ranks; an SVD has no more values than the matrix has rows or columns
    ranks = [min((_rank_of(task, module) + aligned_rank) or example_a.shape[0], out, inputs) for task in tasks]
    layout = RankLayout(aligned_rank, max(ranks), len(tasks))
    return Spec(f"{module}.lora_B", f"{module}.weight", "rank", (out, layout.width), layout.units(out))


def factors(model: Model, module: str, like: Pair) -> Pair:
    """The (A (r, in), B (out, r)) of a module; zeros of the shapes of ``like`` where the model has none."""
    own = _own_factors(model, module)
    return own if own is not None else (torch.zeros_like(like[0]), torch.zeros_like(like[1]))


def aligned_factors(module: str, aligned: Model) -> Pair | None:
    """The aligned model's own (A (r, in), B (out, r)) of a module; None where it has none."""
    return _own_factors(aligned, module)


def _own_factors(model: Model, module: str) -> Pair | None:
    return model.adapter.modules.get(module) if model.adapter else None


def _rank_of(model: Model, module: str) -> int:
    own = _own_factors(model, module)
    return own[0].shape[0] if own else 0


def _some_factors(module: str, models: Sequence[Model]) -> Pair:
    """The factors of the first model that has some, for their shapes."""
    return next(own for model in models if (own := _own_factors(model, module)) is not None)


def components(module: str, aligned: Model, tasks: Sequence[Model]) -> list[Pair]:
    """Each task's B_i A_i - B_s A_s by its singular components, largest first: (V (R, in), U (out, R)), S split evenly.

    R is common to the tasks, so that one index means one place in each task's spectrum.
    """
    example = _some_factors(module, (*tasks, aligned))
    pairs = [_singular_pair(*_stacked_difference(module, aligned, task, example)) for task in tasks]
    rank = max(a.shape[0] for a, _ in pairs)
    # to fp32 last: split square roots lose nothing more
    return [(_padded(a, rank, 0).float(), _padded(b, rank, 1).float()) for a, b in pairs]


def _stacked_difference(module: str, aligned: Model, task: Model, example: Pair) -> Pair:
    """B_i A_i - B_s A_s as one product [B_i, -B_s] [A_i; A_s]: (A (r_i + r_s, in), B (out, r_i + r_s)), fp64."""
    signed = [(own, sign) for own, sign in ((_own_factors(task, module), 1), (_own_factors(aligned, module), -1)) if own]
    stack = [(a, sign * b) for (a, b), sign in signed] or [(torch.zeros_like(example[0]), torch.zeros_like(example[1]))]
    # two nearly equal products cancel: a task that went on with the aligned adapter differs from it by little
    return torch.cat([a for a, _ in stack]).double(), torch.cat([b for _, b in stack], 1).double()


def _singular_pair(a: Tensor, b: Tensor) -> Pair:
    """B A, (out, r) by (r, in), as (sqrt(S) V^T, U sqrt(S)): QR of both factors, an SVD of r x r, never of out x in."""
    basis_out, core_b = torch.linalg.qr(b)
    basis_in, core_a = torch.linalg.qr(a.T)
    # B = Q_b R_b and A^T = Q_a R_a, so that B A = Q_b (R_b R_a^T) Q_a^T, and the Qs keep singular vectors orthonormal
    u, singular_values, vh = torch.linalg.svd(core_b @ core_a.T, full_matrices=False)
    root = singular_values.sqrt()
    return root[:, None] * (vh @ basis_in.T), (basis_out @ u) * root


def _padded(tensor: Tensor, size: int, dim: int) -> Tensor:
    """Zeros added along ``dim``: components that a task of smaller rank does not have."""
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def tensors_of(spec: Spec, aligned: Model, tasks: Sequence[Model], parts: Sequence[Pair] | None = None,
               ) -> tuple[Tensor, list[Tensor]]:
    """(theta_s, [theta_i - theta_s]) of a spec, each of the spec's shape, fp32.

    Args:
        parts: for ``rank``: what ``components`` gave, when it is at hand.
    """
    if spec.part == "weight":
        return _weight_tensors(spec, aligned, tasks)
    if spec.part == "rank":
        return _rank_tensors(spec, aligned, components(spec.module, aligned, tasks) if parts is None else parts)
    return _factor_tensors(spec, aligned, tasks)


def _weight_tensors(spec: Spec, aligned: Model, tasks: Sequence[Model]) -> tuple[Tensor, list[Tensor]]:
    """W_s and W_i - W_s; zeros for a task that leaves the weight as it is."""
    base = aligned.weight(spec.weight)
    vectors = [vector(task, aligned, spec.weight) for task in tasks]
    return base, [torch.zeros_like(base) if delta is None else delta for delta in vectors]


def _factor_tensors(spec: Spec, aligned: Model, tasks: Sequence[Model]) -> tuple[Tensor, list[Tensor]]:
    """A_s and A_i - A_s, or B_s and B_i - B_s."""
    side = "AB".index(spec.part)
    example = _some_factors(spec.module, (*tasks, aligned))
    base = factors(aligned, spec.module, example)[side].clone()
    return base, [factors(task, spec.module, example)[side] - base for task in tasks]


def _rank_tensors(spec: Spec, aligned: Model, parts: Sequence[Pair]) -> tuple[Tensor, list[Tensor]]:
    """B_s in the aligned columns, each task's U in its own, zeros elsewhere: B times the common A is the sum of all."""
    layout, own = _layout_of(spec.module, aligned, parts), aligned_factors(spec.module, aligned)
    base = torch.zeros(spec.shape)
    if own:
        base[:, layout.aligned_columns] = own[1]
    deltas = []
    for task, (_, b) in enumerate(parts):
        delta = torch.zeros(spec.shape)
        delta[:, layout.columns_of_task(task)] = b
        deltas.append(delta)
    return base, deltas


def down_factor(spec: Spec, aligned: Model, parts: Sequence[Pair]) -> Tensor:
    """The A (width, in) that goes with a ``rank`` spec's B: the aligned model's rows, then each task's components."""
    layout, own = _layout_of(spec.module, aligned, parts), aligned_factors(spec.module, aligned)
    down = torch.zeros(layout.width, parts[0][0].shape[1])
    if own:
        down[layout.aligned_columns] = own[0]
    for task, (a, _) in enumerate(parts):
        down[layout.columns_of_task(task)] = a
    return down


def _layout_of(module: str, aligned: Model, parts: Sequence[Pair]) -> RankLayout:
    return RankLayout(_rank_of(aligned, module), parts[0][0].shape[0], len(parts))


def check_units(specs: Sequence[Spec], settings: Settings) -> None:
    """Refuse a mask that its own rescaling undoes: one unit per tensor, divided by itself.

    Raises:
        UserError: with the flags to change.
    """
    masked = [spec.units for spec in specs if spec.units is not None]
    if RESCALINGS[settings.rescale].undoes_one_unit and all(units.size == 1 for units in masked):
        raise UserError(f"--rescale {settings.rescale}: with --granularity {settings.granularity} each tensor has one "
                        "logit, and its mask divided by its mean is always 1; use --rescale none or global")
