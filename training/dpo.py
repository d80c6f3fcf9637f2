"""Direct preference optimisation through TRL: reference = the model as it is before the first step.

A new LoRA starts at no change, so its reference is the base; an adapter that is gone on with (--init_adapter), or a model
that trains in full, is its own reference. The reference log-probabilities are computed once and kept on disk
(``results/cache/dpo``), keyed by data and model.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer

import manifest
from data import encode, sources
from data.collate import mix
from data.prompts import Template, template
from data.records import Pair
from flags import DpoArgs, MaskArgs
from models.base.loading import base_path, load_tokenizer
from models.base.placement import set_up_torch
from models.checkpoints.fingerprints import fingerprint
from training.checkpoints import SafeCheckpoints
from training.packing import pack_forward, refuse_head_lora
from training.samples import source_of
from training.sft import save_adapter, started_from, to_train
from training.trainer import fit, settings_of, training_arguments

log = logging.getLogger(__name__)


class SafeDPOTrainer(SafeCheckpoints, DPOTrainer):
    """TRL's trainer with checkpoints that hold no pickle and batches that hold no padding."""

    def pack(self) -> None:
        """Read batches packed from now on, where the model allows it."""
        # under FSDP the reference may be a model of its own, for as long as it is asked
        for model in (self.model, self.ref_model):
            inner = model.get_base_model() if isinstance(model, PeftModel) else model
            # WPO's weights need a number that packing does not compute
            if inner is not None and (self.use_weighting or not pack_forward(inner)):
                log.info("preference data: batches of %s stay padded", inner.config.model_type)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        # TRL would tokenise texts its own way: one more BOS where the template writes it, the end cut off long answers
        if missing := {"prompt_ids", "chosen_ids", "rejected_ids"} - set(dataset.column_names):
            raise ValueError(f"preference rows come from data/encode.py; missing: {', '.join(sorted(missing))}")
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        # by now TRL's own scoring forward is in place; a reference read in another way would round in another way
        self.pack()
        return super()._precompute_ref_logps(dataset, name, batch_size)


def train(args: DpoArgs, extra: dict[str, Any], run: manifest.Run) -> None:
    """Train an adapter on preference pairs and write it, the tokenizer and the run's facts into ``run``."""
    base = base_path(args.model_name_or_path, args.cache_dir)
    tokenizer = load_tokenizer(base)
    form = template(args.template, tokenizer)
    rows = encode_pairs(drawn_pairs(args), tokenizer, form, args.model_max_length)
    device, dtype = set_up_torch(args)
    model = to_train(base, args, dtype, device)
    refuse_head_lora(model)
    arguments = training_arguments(
        # the reference is the model before its first step: asked once and kept, it needs no second model beside the first
        args, extra, DPOConfig, beta=args.beta, max_length=args.model_max_length, precompute_ref_log_probs=True,
        precompute_ref_batch_size=args.per_device_train_batch_size, remove_unused_columns=True,
        # on by default in TRL, at a fifth more time; --gradient_checkpointing still asks for it
        activation_checkpointing=False,
        # LoRA weights are fp32: without autocast their products would not match a bfloat16 base
        bf16=str(dtype) == "torch.bfloat16", fp16=str(dtype) == "torch.float16",
    )
    trainer = SafeDPOTrainer(model=model, ref_model=None, args=arguments, train_dataset=on_disk(rows, args),
                             processing_class=tokenizer)
    base_hash = fingerprint(base)

    def save(folder: Path) -> None:
        save_adapter(model, tokenizer, base_hash, folder)

    trainer.save_artifact = save
    run.metrics.update(fit(trainer, args, settings_of(args, extra)), pairs=len(rows))
    save(run.folder)
    run.inputs.update(base=base_hash, **started_from(args))


def drawn_pairs(args: DpoArgs | MaskArgs) -> list[Pair]:
    """The task's training pairs, ``--max_train_samples`` of them drawn with the seed: sources stand one after the other."""
    pairs = sources.load_pairs(args.task_name, "train", source=source_of(args))
    return mix(pairs, args.max_train_samples, "proportional", args.seed)


def encode_pairs(pairs: list[Pair], tokenizer: Any, form: Template, max_length: int) -> list[dict[str, list[int]]]:
    """Rows {prompt_ids, chosen_ids, rejected_ids} as ``data/encode.py`` makes them, what was cut and dropped said.

    Raises:
        UserError: no pair fits.
    """
    rows, facts = encode.encode_pairs(pairs, tokenizer, form, max_length)
    log.info("preference data: %d pairs, %d dropped because their prompt fills the window; at %d tokens %d answers cut",
             len(rows), facts.dropped, max_length, facts.truncated)
    return rows


def on_disk(rows: list[dict[str, Any]], args: DpoArgs) -> Dataset:
    """The pairs as a Dataset with a cache folder, where TRL keeps the reference log-probabilities."""
    import hashlib

    content = "\n".join(json.dumps(row, sort_keys=True) for row in rows)
    # "packed": a padded pass rounds otherwise, .3 nats over an answer in bfloat16 (docs/lab-log.md, 2026-11-22)
    key = hashlib.sha256(f"{content}{asdict(args)['model_name_or_path']}|packed".encode()).hexdigest()[:16]
    folder = args.results / "cache" / "dpo" / key
    # a file, not memory: TRL keeps its log-probabilities among the cache files that datasets makes of one
    if not (folder / "pairs.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pairs.jsonl").write_text(content + "\n", encoding="utf-8")
    return Dataset.from_json(str(folder / "pairs.jsonl"), cache_dir=str(folder))
