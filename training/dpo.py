"""Direct preference optimisation through TRL: reference = the model as it is before the first step.

A new LoRA starts at no change, so its reference is the base; an adapter that is gone on with (--init_adapter), or a model
that trains in full, is its own reference. The reference log-probabilities are computed once and kept on disk
(``results/cache/reference``), keyed by what they depend on: models, encoded pairs, types.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trl import DPOConfig, DPOTrainer
from trl.models.utils import prepare_deepspeed
from trl.trainer import dpo_trainer

import manifest
from data import encode, sources
from data.collate import mix
from data.prompts import Template, template
from data.records import SAFETY, Pair
from data.sets import contrasts
from errors import SharedError, UserError
from flags import AlignArgs, DpoArgs, MaskArgs
from models.adapters.files import CONFIG, WEIGHTS
from models.base.loading import base_path, load_tokenizer
from models.base.placement import set_up_torch
from models.base.positions import check_rows
from models.checkpoints.fingerprints import fingerprint
from training.checkpoints import SafeCheckpoints
from training.distributed.sharding import is_sharded
from training.packing import check_padded, pack_forward, refuse_head_lora
from training.samples import VALIDATION_ROWS, contrast_inputs, source_of
from training.sft import adapter_folder, save_adapter, started_from, to_train
from training.trainer import fit, loaded_on, training_arguments, validates_on_the_way
from training.validation import WholeMeans, divide

log = logging.getLogger(__name__)


#: What validation on preference pairs tells, each a mean over pairs -> whether more is better.
MEASURED = {"loss": False, "rewards/accuracies": True, "rewards/margins": True, "rewards/chosen": True,
            "rewards/rejected": False, "logps/chosen": True, "logps/rejected": False}
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


class SafeDPOTrainer(WholeMeans, SafeCheckpoints, DPOTrainer):
    """TRL's trainer with checkpoints that hold no pickle and batches that hold no padding.

    Args:
        reference: what the reference's log-probabilities depend on beside the encoded pairs; names and places do not count.
        results: root of the folder that they are kept in.
    """

    def __init__(self, *args: Any, reference: dict[str, Any], results: Path, **kwargs: Any) -> None:
        self.reference, self.results = reference, results
        with _unhashed():
            super().__init__(*args, **kwargs)

    def pack(self) -> None:
        """Read batches packed from now on, where the model allows it."""
        self.packed = True
        # under FSDP the reference may be a model of its own, for as long as it is asked
        for model in (self.model, self.ref_model):
            inner = model.get_base_model() if isinstance(model, PeftModel) else model
            # WPO's weights need a number that packing does not compute
            if inner is not None and self.use_weighting:
                check_padded(inner)
            if inner is not None and (self.use_weighting or not pack_forward(inner)):
                self.packed = False
                log.info("preference data: batches of %s stay padded", inner.config.model_type)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        # TRL would tokenise texts its own way: one more BOS where the template writes it, the end cut off long answers
        if missing := {"prompt_ids", "chosen_ids", "rejected_ids"} - set(dataset.column_names):
            raise ValueError(f"preference rows come from data/encode.py; missing: {', '.join(sorted(missing))}")
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """The rows with the reference's log-probabilities, from disk where they were computed before."""
        # by now TRL's own scoring forward and its copy of an adapter are in place
        self.shard()
        # a reference read in another way would round in another way
        self.pack()
        file = self.results / "cache" / "reference" / f"{self._reference_key(dataset)}.safetensors"
        # asked by all before one of them writes it
        there = file.is_file()
        self.accelerator.wait_for_everyone()
        if not there:
            values = self._reference_logps(dataset, batch_size)
            if manifest.is_main():
                file.parent.mkdir(parents=True, exist_ok=True)
                # whole or not there: two runs of one reference may score it at the same time
                staging = file.with_suffix(f".{os.getpid()}.partial")
                save_file(values, staging)
                staging.replace(file)
            self.accelerator.wait_for_everyone()
        values = load_file(file)
        for column in _REFERENCE:
            dataset = dataset.add_column(column, values[column].tolist())
        return dataset

    def _reference_key(self, dataset: Dataset) -> str:
        columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
        digest = hashlib.sha256(json.dumps(self.reference, sort_keys=True).encode())
        # the collator cuts rows, so their ids do not show where
        digest.update(json.dumps([self.args.max_length, self.args.truncation_mode, self.ld_alpha]).encode())
        # a padded pass rounds otherwise, .3 nats over an answer in bfloat16 (docs/lab-log.md, 2026-11-22)
        digest.update(b"packed" if self.packed else b"padded")
        for row in dataset.select_columns(columns):
            digest.update(json.dumps([row[column] for column in columns]).encode())
        return digest.hexdigest()[:32]

    def _reference_logps(self, dataset: Dataset, batch_size: int) -> dict[str, Tensor]:
        """Log-probabilities (rows,) of the chosen and the rejected answers, fp32."""
        loader = self.accelerator.prepare(DataLoader(dataset, batch_size, collate_fn=self.data_collator))
        # a sharded model must be gathered before it can be asked
        sharded = self.ref_model is None and self.is_deepspeed_enabled
        model = prepare_deepspeed(self.model, self.accelerator) if sharded else self.ref_model or self.model
        # a loader draws a number when it starts: a run that finds its reference on disk must train alike
        with torch.random.fork_rng([self.args.device.index or 0] if self.args.device.type == "cuda" else []):
            found = [self.accelerator.gather_for_metrics(self.compute_ref_log_probs(model, batch)) for batch in loader]
        return {column: torch.cat([pair[i].float().cpu() for pair in found]) for i, column in enumerate(_REFERENCE)}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        # transformers leaves a NaN out of the losses that it logs and trains on, into Adam's moments and checkpoints
        value = float(loss)
        if found := self.first_of_all(0 if math.isfinite(value) else self.state.global_step + 1, value):
            raise SharedError(f"the loss became {found[1]} at step {found[0]}; lower --learning_"
                            f"rate (now {self.args.learning_rate}), or use --dtype float32")
        return loss

    def validation_terms(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, tuple[float, int]]:
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        # TRL's own figures are means of batches; what is left of them here would be logged over ours
        batch = {name: values[-1] for name, values in self._metrics["eval"].items() if name in MEASURED}
        self._metrics["eval"].clear()
        # half of the rows are chosen answers, the other half the rejected ones
        pairs = len(inputs["input_ids"]) // 2
        return {name: (float(value) * pairs, pairs) for name, value in {"loss": loss, **batch}.items()}

    def progress(self) -> dict[str, Any]:
        return super().progress() | {"pair_tokens": self._total_train_tokens, "figures": dict(self._metrics["train"])}

    def restore(self, progress: dict[str, Any]) -> None:
        super().restore(progress)
        self._total_train_tokens = progress["pair_tokens"]
        self._metrics["train"].update(progress["figures"])


@contextmanager
def _unhashed() -> Iterator[None]:
    """TRL's constructor without the hash of the whole model in fp32 (minutes at 7B): ``_reference_key`` replaces it."""
    theirs = dpo_trainer.hash_module
    dpo_trainer.hash_module = lambda model: ""
    try:
        yield
    finally:
        dpo_trainer.hash_module = theirs


def train(args: DpoArgs, extra: dict[str, Any], run: manifest.Run) -> None:
    """Train an adapter on preference pairs and write it, the tokenizer and the run's facts into ``run``."""
    base = base_path(args.model_name_or_path, args.cache_dir)
    tokenizer = load_tokenizer(base)
    form = template(args.template, tokenizer)
    pairs, held_out = drawn_pairs(args, extra)
    rows = encode_pairs(pairs, tokenizer, form, args.model_max_length, base)
    validation = encode_pairs(held_out, tokenizer, form, args.model_max_length, base) if held_out else []
    device, dtype = set_up_torch(args)
    arguments = preference_arguments(args, extra, dtype, len(rows), validates=bool(validation))
    model = to_train(base, args, dtype, loaded_on(arguments, device))
    refuse_head_lora(model)
    base_hash = fingerprint(base)
    trainer = SafeDPOTrainer(
        model=model, ref_model=None, args=arguments, train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(validation) if validation else None, processing_class=tokenizer,
        reference=_reference_facts(args, base_hash, dtype, device), results=args.results)

    def save(folder: Path) -> None:
        save_adapter(model, tokenizer, base_hash, folder, weights=folder == run.folder or not is_sharded(trainer.model))

    trainer.save_artifact = save
    run.metrics.update(fit(trainer, args, extra), pairs=len(rows))
    save(run.folder)
    run.inputs.update(base=base_hash, **started_from(args), **contrast_inputs(args.pair_contrast_share))


def preference_arguments(args: DpoArgs | MaskArgs, extra: dict[str, Any], dtype: torch.dtype, rows: int, *,
                         validates: bool) -> DPOConfig:
    """TRL's arguments for pairs whose reference is asked once, before the first step.

    Raises:
        UserError: as ``training_arguments``, and noise on embeddings.
    """
    if extra.get("neftune_noise_alpha") is not None:
        raise UserError(f"--neftune_noise_alpha {extra['neftune_noise_alpha']}: its noise is scaled by the length of a "
                        "row, and preference pairs are packed into one row a batch; use it with --method sft, or drop it")
    return training_arguments(
        # the reference is the model before its first step: asked once and kept, it needs no second model beside the first
        args, extra, DPOConfig, rows=rows, validates=validates, measured=MEASURED, beta=args.beta,
        max_length=args.model_max_length, precompute_ref_log_probs=True, remove_unused_columns=True,
        precompute_ref_batch_size=args.per_device_train_batch_size,
        # on by default in TRL, at a fifth more time; --gradient_checkpointing still asks for it
        activation_checkpointing=False,
        # LoRA weights are fp32: without autocast their products would not match a bfloat16 base
        bf16=dtype == torch.bfloat16,
    )


def _reference_facts(args: DpoArgs, base_hash: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    adapter = [manifest.sha256(adapter_folder(args) / name) for name in (WEIGHTS, CONFIG)] if args.init_adapter else []
    full = args.tuning == "full"
    return {"kind": "dpo", "base": base_hash, "adapter": adapter, "held": "float32" if full else args.base_quantization or
            str(dtype), "dtype": str(dtype), "device": device.type}


def drawn_pairs(args: DpoArgs | MaskArgs, extra: dict[str, Any]) -> tuple[list[Pair], list[Pair]]:
    """The task's training pairs, ``--max_train_samples`` of them drawn with the seed, and the pairs to validate on.

    Of the safety pairs --pair_contrast_share are contrasts. Embedded pairs are validated on where
    transformers is asked to validate. Sources stand one after the other.
    """
    def read(given: AlignArgs) -> list[Pair]:
        return sources.load_pairs(args.task_name, "train", source=source_of(given))

    pairs, held_out = divide(args, read(args), read)
    if not held_out and source_of(args) == "embedded" and validates_on_the_way(extra):
        held_out = mix(sources.load_pairs(args.task_name, "validation"), VALIDATION_ROWS, "proportional", args.seed)
    pairs = contrasts.paired_in(pairs, args.pair_contrast_share, args.max_train_samples, args.seed)
    if args.pair_contrast_share:
        log.info("safety pairs: %d, %d of them contrasts", sum(pair.objective == SAFETY for pair in pairs),
                 sum(pair.id.startswith(contrasts.PREFIX) for pair in pairs))
    return mix(pairs, args.max_train_samples, "proportional", args.seed), held_out


def encode_pairs(pairs: list[Pair], tokenizer: Any, form: Template, max_length: int,
                 base: Path) -> list[dict[str, list[int]]]:
    """Rows {prompt_ids, chosen_ids, rejected_ids} as ``data/encode.py`` makes them, what was cut and dropped said.

    Args:
        base: folder of the model that is to read them.

    Raises:
        UserError: no pair fits, or some are longer than the base can read.
    """
    rows, facts = encode.encode_pairs(pairs, tokenizer, form, max_length)
    log.info("preference data: %d pairs, %d dropped because their prompt fills the window; at %d tokens %d answers cut",
             len(rows), facts.dropped, max_length, facts.truncated)
    check_rows(base, [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows],
               max_length)
    return rows
