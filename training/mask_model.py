"""The live model of a mask's training: the aligned model with slots where task vectors go in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from errors import UserError
from flags import MaskArgs
from models.base.loading import load_base
from models.mask.bank import Slot, make_slot
from models.mask.settings import Settings, rule_for
from models.mask.slots import Spec, check_units, components, down_factor, plan, tensors_of
from models.task_vectors import Model


def settings_for(args: MaskArgs, aligned: Model, tasks: Sequence[Model]) -> tuple[Settings, list[Spec]]:
    """What the flags mean for these models, and every tensor concerned; nothing heavy is loaded.

    Raises:
        UserError: factors of models that have none; a mask that its rescaling undoes.
    """
    rule = rule_for(args.merge_rule or "single", len(tasks), args.merge_lambda, args.ties_density, args.dare_drop)
    settings = Settings(
        space=_space(args, aligned, tasks), granularity=args.granularity, block=args.mask_block, rescale=args.rescale,
        # the mask is read out at the temperature that training ended with
        rule=rule, temperature=args.temperature if args.final_temperature is None else args.final_temperature,
        exclude=args.excluded, seed=args.seed)
    specs = plan(settings, aligned, tasks)
    check_units(specs, settings)
    return settings, specs


def _space(args: MaskArgs, aligned: Model, tasks: Sequence[Model]) -> str:
    """``auto``: factors where every task went on with the aligned adapter, so that factors can be subtracted."""
    # ranks are rows of a factor: whole weights have none
    if args.granularity == "rank":
        return "factors"
    if args.mask_on != "auto":
        return args.mask_on
    if aligned.adapter is None:
        return "weights"
    shapes = {module: [f.shape for f in pair] for module, pair in aligned.adapter.modules.items()}
    return "factors" if all(task.adapter and task.checkpoint.folder == aligned.checkpoint.folder and shapes == {
        module: [f.shape for f in pair] for module, pair in task.adapter.modules.items()} for task in tasks) else "weights"


def live_model(settings: Settings, specs: Sequence[Spec], aligned: Model, tasks: Sequence[Model], storage: torch.dtype,
               dtype: torch.dtype, device: torch.device) -> tuple[PreTrainedModel, list[Slot]]:
    """The aligned model, nothing of it trainable, and its slots.

    Args:
        storage: of live weights; LoRA factors are fp32.
        dtype: of weights that stay as they are.
    """
    folder = aligned.checkpoint.folder
    if specs[0].part == "weight":
        model = load_base(folder, storage, device)
        # tied weights go by two names, and a checkpoint may store them under either
        names = dict(model.named_parameters(remove_duplicate=False))
        places = {spec.name: names.get(spec.weight) for spec in specs}
    else:
        model = _with_factors(load_base(folder, dtype, device), specs)
        names = dict(model.named_parameters())
        places = {spec.name: names.get(f"{spec.module}.lora_{'A' if spec.part == 'A' else 'B'}.default.weight")
                  for spec in specs}
    if absent := [name for name, place in places.items() if place is None]:
        raise UserError(f"{aligned.name}: {absent[0]} and {len(absent) - 1} more tensors are no parameters of the model "
                        "that transformers makes of it; give a checkpoint of a known architecture")
    # the bank turns the masked ones on again when it is attached; until then nothing collects gradients
    model.requires_grad_(False)
    model.config.use_cache = False
    slots, taken = [], set()
    for spec in specs:
        live = places[spec.name]
        if id(live) in taken:
            raise UserError(f"{aligned.name}: {spec.name} shares its values with another tensor, but the checkpoint stores "
                            "both; save it again with transformers, which writes tied tensors once")
        taken.add(id(live))
        parts = components(spec.module, aligned, tasks) if spec.part == "rank" else None
        if parts is not None:
            names[f"{spec.module}.lora_A.default.weight"].data.copy_(down_factor(spec, aligned, parts))
        slots.append(make_slot(spec, live, *tensors_of(spec, aligned, tasks, parts), settings))
    return model, slots


def _with_factors(model: PreTrainedModel, specs: Sequence[Spec]) -> PreTrainedModel:
    """LoRA layers of scale 1 in place of the modules that the specs name; the wrapper around the model is left off."""
    # alpha = rank is a scale of 1: a slot's factors multiply as they are
    ranks = {spec.module: spec.shape[0] if spec.part == "A" else spec.shape[1] for spec in specs}
    largest = max(ranks.values())
    other = {module: rank for module, rank in ranks.items() if rank != largest}
    wrapped = get_peft_model(model, LoraConfig(
        r=largest, lora_alpha=largest, rank_pattern=other, alpha_pattern=other, bias="none", task_type="CAUSAL_LM",
        target_modules=sorted(ranks)))
    return wrapped.get_base_model()


def reference_values(kind: str, spec: Spec, aligned: Model, tasks: Sequence[Model], task: int = 0) -> torch.Tensor:
    """A slot's tensor in the aligned model ("aligned") or in a task's tuned one ("task")."""
    base, deltas = tensors_of(spec, aligned, tasks)
    return base if kind == "aligned" else base + deltas[task]
