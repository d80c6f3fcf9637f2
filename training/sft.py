"""Supervised fine-tuning of one expert: LoRA on the FFN projections, loss on answer tokens (H3Fusion, section 3)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.peft_model import PeftModel

import manifest
from commands import AlignArgs
from models.families import family_of
from models.loading import base_path, fingerprint, load_base, load_tokenizer, set_up_torch
from training.answers import AnswerModel
from training.samples import training_rows
from training.trainer import FusionTrainer, fit, settings_of, training_arguments

log = logging.getLogger(__name__)


def train(args: AlignArgs, extra: dict[str, Any], run: manifest.Run) -> None:
    """Train an adapter and write it, the tokenizer and the run's facts into ``run``."""
    base = base_path(args.model_name_or_path, args.cache_dir)
    tokenizer = load_tokenizer(base)
    train_rows, validation = training_rows(args, tokenizer)
    device, dtype = set_up_torch(args)
    model = with_lora(load_base(base, dtype, device), args)
    trainer = FusionTrainer(
        model=AnswerModel(model, dtype), args=training_arguments(args, extra), train_dataset=train_rows,
        eval_dataset=validation or None, processing_class=tokenizer,
        pad_to=args.model_max_length if args.pad_to_max else None,
    )
    base_hash = fingerprint(base)

    def save(folder: Path) -> None:
        save_adapter(model, tokenizer, base_hash, folder)

    trainer.save_artifact = save
    run.metrics.update(fit(trainer, args, settings_of(args, extra)))
    save(run.folder)
    run.inputs["base"] = base_hash


def with_lora(model: Any, args: AlignArgs) -> PeftModel:
    """Wrap a base model with LoRA on its FFN projections; seeded."""
    torch.manual_seed(args.seed)
    return get_peft_model(model, LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, bias="none", task_type="CAUSAL_LM",
        target_modules=list(family_of(model.config).projections),
    ))


def save_adapter(model: PeftModel, tokenizer: Any, base_hash: str, folder: Path) -> None:
    """PEFT adapter and tokenizer, with the fingerprint of the base beside it: a checkpoint can be fused too."""
    # the vocabulary never grows here, so no copy of the embeddings belongs into an adapter
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    manifest.write_json(folder / manifest.MANIFEST, {"status": "checkpoint", "inputs": {"base": base_hash}})
