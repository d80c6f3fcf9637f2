"""The live model of a mask's training: the aligned model with slots where task vectors go in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from errors import UserError
from flags import MaskArgs
from flags.launch import Sharding
from models.base.loading import load_base
from models.mask.bank import Slot, make_slot
from models.mask.settings import Settings, rule_for
from models.mask.slots import Spec, check_units, components, down_factor, plan, tensors_of
from models.task_vectors import Model
from training.distributed.sharding import shard


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
               dtype: torch.dtype, device: torch.device, parting: Sharding | None = None,
               ) -> tuple[PreTrainedModel, list[Slot]]:
    """The aligned model, nothing of it trainable, and its slots.

    Args:
        storage: of live weights; LoRA factors are fp32.
        dtype: of weights that stay as they are.
        parting: part it among the processes; each keeps its rows of the slots' tensors, which are made one by one.
    """
    folder = aligned.checkpoint.folder
    # what is parted starts on the CPU: as a whole it may be larger than a device
    loaded_on = torch.device("cpu") if parting else device
    if specs[0].part == "weight":
        model = load_base(folder, storage, loaded_on)
    else:
        model = _with_factors(load_base(folder, dtype, loaded_on), specs)
    places = _places(model, specs)
    if absent := [spec.name for spec in specs if spec.name not in places]:
        raise UserError(f"{aligned.name}: {absent[0]} and {len(absent) - 1} more tensors are no parameters of the model "
                        "that transformers makes of it; give a checkpoint of a known architecture")
    # the bank turns the masked ones on again when it is attached; until then nothing collects gradients
    model.requires_grad_(False)
    model.config.use_cache = False
    if parting:
        # FSDP2 asks at its first pass which gradients there will be
        for spec in specs:
            places[spec.name].requires_grad_(spec.units is not None)
        shard(model, parting, device)
        places = _places(model, specs)
    names = dict(model.named_parameters())
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


def check_parting(settings: Settings, specs: Sequence[Spec], processes: int) -> None:
    """Refuse a mask that FSDP2 cannot part by rows, before a model is loaded.

    Raises:
        UserError: with the flags to change.
    """
    ddp = "or start with --config_file scripts/accelerate/ddp.yaml"
    if settings.rule.name == "ties":
        raise UserError("--merge_rule ties: its cuts are ranks in a whole task vector, of which FSDP2 gives each process a "
                        f"part; use another rule, {ddp}")
    for spec in specs:
        if spec.units is not None and (spec.units.index is not None or spec.units.rows > 1):
            raise UserError(f"--granularity {settings.granularity}: rows of {spec.name} share a logit, and FSDP2 parts "
                            f"tensors by rows; use element, row, or block with --mask_exclude norms, {ddp}")
        if not spec.shape or spec.shape[0] < processes:
            raise UserError(f"{processes} processes: FSDP2 parts tensors by rows, and {spec.name} has "
                            f"{spec.shape[0] if spec.shape else 1}; start fewer, {ddp}")


def _places(model: PreTrainedModel, specs: Sequence[Spec]) -> dict[str, nn.Parameter]:
    """Each spec's parameter, where the model has it."""
    # tied weights go by two names, and a checkpoint may store them under either
    names = dict(model.named_parameters(remove_duplicate=False))
    wanted = {spec.name: spec.weight if spec.part == "weight" else
              f"{spec.module}.lora_{'A' if spec.part == 'A' else 'B'}.default.weight" for spec in specs}
    return {name: names[place] for name, place in wanted.items() if place in names}


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
