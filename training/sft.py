"""Supervised fine-tuning: LoRA (on the FFN projections unless told otherwise) or every weight; loss on answer tokens."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.peft_model import PeftModel
from transformers import PreTrainedModel

import manifest
from errors import UserError
from flags import DpoArgs, ExpertArgs
from models.adapters.apply import check_fit
from models.adapters.files import WEIGHTS, read_adapter
from models.base.families import family_of
from models.base.loading import base_path, check_base, load_base, load_tokenizer, skeleton
from models.base.placement import set_up_torch
from models.base.quantised import load_quantised
from models.checkpoints.fingerprints import fingerprint
from models.run_folders import run_folder
from training.answers import AnswerModel
from training.distributed.sharding import gathered_state, is_sharded
from training.samples import contrast_inputs, training_rows
from training.trainer import FusionTrainer, fit, loaded_on, training_arguments

log = logging.getLogger(__name__)


def train(args: ExpertArgs, extra: dict[str, Any], run: manifest.Run) -> None:
    """Train an adapter and write it, the tokenizer and the run's facts into ``run``."""
    base = base_path(args.model_name_or_path, args.cache_dir)
    tokenizer = load_tokenizer(base)
    train_rows, validation = training_rows(args, tokenizer, base)
    device, dtype = set_up_torch(args)
    arguments = training_arguments(args, extra, rows=len(train_rows), validates=bool(validation))
    model = to_train(base, args, dtype, loaded_on(arguments, device))
    trainer = FusionTrainer(
        model=AnswerModel(model, dtype), args=arguments, train_dataset=train_rows,
        eval_dataset=validation or None, processing_class=tokenizer,
        pad_to=args.model_max_length if args.pad_to_max else None, epoch_decay=args.lr_epoch_decay,
    )
    base_hash = fingerprint(base)

    def save(folder: Path) -> None:
        # beside a checkpoint's parts no whole copy: models/fuse.py gather makes one
        save_adapter(model, tokenizer, base_hash, folder, weights=folder == run.folder or not is_sharded(trainer.model))

    trainer.save_artifact = save
    run.metrics.update(fit(trainer, args, extra))
    save(run.folder)
    run.inputs.update(base=base_hash, **started_from(args), **contrast_inputs(args.contrast_share))


def to_train(base: Path, args: ExpertArgs | DpoArgs, dtype: torch.dtype,
             device: torch.device) -> PreTrainedModel | PeftModel:
    """The model that ``args`` ask for: LoRA on the base in the compute dtype, an adapter to go on with, or every weight.

    Weights that train stay fp32; their products run in ``dtype`` under autocast. The base below an adapter
    is held as --base_quantization says.

    Raises:
        UserError: this machine cannot hold the base so; --init_adapter is no adapter of this base; --lora_targets names
            modules that the base has not.
    """
    if args.tuning == "full":
        # fp32: a step of full tuning is smaller than the last bit of a bfloat16 weight and would be lost
        model = load_base(base, torch.float32, device)
        model.config.use_cache = False
        return model

    def frozen() -> PreTrainedModel:
        kind = args.base_quantization
        return load_quantised(base, kind, dtype, device) if kind else load_base(base, dtype, device)

    if not args.init_adapter:
        return with_lora(frozen(), args)
    folder = adapter_folder(args)
    check_base(folder, base)
    # the same checks as for fusing it: a plain LoRA, nothing else
    adapter = read_adapter(folder, args.init_adapter, scaled=False)
    # PEFT would leave out what fits nowhere, and start it anew
    check_fit([adapter], skeleton(base))
    trained = {module.rpartition(".")[2] for module in adapter.modules}
    # PEFT would train the adapter's own modules and never mention the flag
    if args.lora_targets and trained != set(targets_of(args)):
        raise UserError(f"--lora_targets {args.lora_targets}: --init_adapter {args.init_adapter} trains "
                        f"{','.join(sorted(trained))}; give these, or leave the flag out")
    own = adapter.config
    log.info("--init_adapter %s: goes on with its own rank %s, alpha %s and dropout %s, not with --lora_r and its kin",
             args.init_adapter, own.get("r"), own.get("lora_alpha"), own.get("lora_dropout"))
    torch.manual_seed(args.seed)
    model = PeftModel.from_pretrained(frozen(), folder, is_trainable=True)
    with torch.no_grad():
        for name, module in model.get_base_model().named_modules():
            # PEFT finds no factors under a state_dict()'s names (lora_A.default.weight) and starts them anew
            for part, factor in zip((module.lora_A, module.lora_B), adapter.modules[name], strict=True) \
                    if name in adapter.modules else ():
                part["default"].weight.copy_(factor)
    return model


def adapter_folder(args: ExpertArgs | DpoArgs) -> Path:
    """Where --init_adapter lies: a run's folder, or the folder given; a ValueError without the flag."""
    given = args.init_adapter
    if given is None:
        raise ValueError("no --init_adapter")
    return Path(given).expanduser() if "/" in given else run_folder(args.results, given)


def started_from(args: ExpertArgs | DpoArgs) -> dict[str, str]:
    """The manifest's entry for the adapter that a run went on from."""
    return {"init_adapter": manifest.sha256(adapter_folder(args) / WEIGHTS)} if args.init_adapter else {}


def targets_of(args: ExpertArgs | DpoArgs) -> list[str]:
    """The modules that --lora_targets names; none where the FFN is meant."""
    return [name.strip() for name in (args.lora_targets or "").split(",") if name.strip()]


def with_lora(model: Any, args: ExpertArgs | DpoArgs) -> PeftModel:
    """Wrap a base model with LoRA on --lora_targets, by default its FFN projections; seeded."""
    targets = targets_of(args)
    if absent := [name for name in targets if not any(n.rpartition(".")[2] == name for n, _ in model.named_modules())]:
        family = family_of(model.config)
        raise UserError(f"--lora_targets {args.lora_targets}: this model has no module {', '.join(absent)}; it has "
                        f"{', '.join((*family.projections, *family.attention))}")
    # A starts from random values: two runs of one seed start alike, whatever drew numbers before
    torch.manual_seed(args.seed)
    return get_peft_model(model, LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, bias="none", task_type="CAUSAL_LM",
        target_modules=targets or list(family_of(model.config).projections),
    ))


def save_adapter(model: PreTrainedModel | PeftModel, tokenizer: Any, base_hash: str, folder: Path,
                 weights: bool = True) -> None:
    """Adapter or full model, with tokenizer and the fingerprint of the base beside it: a checkpoint can be fused too.

    Every process must ask, and the first one writes.

    Args:
        weights: write a full model's; without, its configuration alone. An adapter's are small and always written.
    """
    adapter = isinstance(model, PeftModel)
    state = gathered_state(model, trained=adapter) if weights or adapter else None
    if not manifest.is_main():
        return
    if adapter:
        # the vocabulary never grows here, so no copy of the embeddings belongs into an adapter; TRL adds a second
        # adapter, its reference
        model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=["default"], state_dict=state)
        _write_card(folder, model.peft_config["default"])
    elif weights:
        model.save_pretrained(folder, state_dict=state)
    else:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    manifest.write_json(folder / manifest.MANIFEST, {"status": "checkpoint", "inputs": {"base": base_hash}})


def _write_card(folder: Path, config: LoraConfig) -> None:
    """README.md of an adapter, in place of PEFT's, which is a form to fill in."""
    base = config.base_model_name_or_path
    (folder / "README.md").write_text("\n".join([
        "---", "library_name: peft", f"base_model: {json.dumps(base)}", "tags:", "- lora", "---", "", "# LoRA adapter", "",
        f"Of rank {config.r}, on {', '.join(sorted(config.target_modules))}.",
        f"`{manifest.MANIFEST}` has the command, every setting, hashes of base and data, and the losses.", "",
        "```python", "from peft import PeftModel", "", "model = PeftModel.from_pretrained(base_model, FOLDER)", "```", "",
        "To fuse it, score it or write it for other software: `models/fuse.py` and `evaluator/evaluate.py` of "
        "Alignment-by-Fusion.", ""]), encoding="utf-8")
