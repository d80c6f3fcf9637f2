"""SOMF's mask: DPO on safety pairs through TRL, where only the logits of a Concrete mask on task vectors train.

Before each forward pass the masked fusion is written into the live weights; their gradients become the logits' in hooks
(``models/mask/bank.py``). The reference's log-probabilities are computed once and kept on disk, keyed by what they
depend on; only the published random-mask reference runs beside the training.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn

import manifest
from data.prompts import template
from flags import MaskArgs
from flags.launch import processes, sharding
from flags.mask import SHARED_OUT
from models.base.loading import load_tokenizer
from models.base.placement import set_up_torch
from models.mask.bank import Draw, MaskBank
from models.mask.diagnostics import mask_numbers
from models.mask.files import LOGITS, identity, open_models, read_mask, save_mask
from models.mask.memory import Plan, memory_plan
from models.mask.optimiser import RoundedAdamW
from models.mask.settings import Settings
from models.task_vectors import Model
from training.checkpoints import load_optimizer, save_optimizer
from training.distributed.moments import share_out
from training.distributed.sharding import gathered_state, reshard
from training.dpo import SafeDPOTrainer, drawn_pairs, encode_pairs, preference_arguments
from training.mask_anchor import Anchor, anchor_rows, make_anchor
from training.mask_model import check_parting, live_model, reference_values, settings_for
from training.samples import contrast_inputs
from training.trainer import fit

log = logging.getLogger(__name__)


class MaskTrainer(SafeDPOTrainer):
    """The DPO trainer for a model that a bank rewrites before every forward pass."""

    weights_file = LOGITS
    optimizer: torch.optim.Optimizer | None

    def __init__(self, *args: Any, flags: MaskArgs, **kwargs: Any) -> None:
        self.flags = flags
        self._bank: MaskBank | None = None
        self.anchor: Anchor | None = None
        self._place = (-1, 0)
        # numbers of the logits that this process steps; None: all
        self._own: frozenset[int] | None = None
        super().__init__(*args, results=flags.results, **kwargs)

    @property
    def bank(self) -> MaskBank:
        """The mask; a RuntimeError before ``add_bank``."""
        if self._bank is None:
            raise RuntimeError("there is no mask before add_bank")
        return self._bank

    def add_bank(self, bank: MaskBank, anchor: Anchor | None) -> None:
        """Let the mask train from now on; until then the model is the reference."""
        self._bank, self.anchor = bank, anchor
        # a part of the model, so that its gradients are clipped and cleared like any other
        self.model.add_module("concrete_mask", bank)
        bank.attach()
        # the draws of a micro-step add their gradients up; this makes a mean of them
        bank.weight = 1 / self.flags.mask_draws

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if self.flags.reference == "random_mask":
            self.pack()
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if self.flags.logit_dtype == "bfloat16":
                # rounded to the nearest most steps would be none; flags/mask.py refuses every other optimiser
                kind, options = RoundedAdamW, {k: options[k] for k in ("lr", "betas", "eps")} | {"seed": self.flags.seed}
            group = {"params": list(self.bank.parameters()), "weight_decay": self.args.weight_decay}
            self.optimizer = kind([group], **options)
            if self._averages and getattr(self.args.optim, "value", self.args.optim) in SHARED_OUT and (
                    len(group["params"]) >= self.args.world_size):
                self._own = share_out(self.optimizer, self.args.process_index, self.args.world_size)
        return self.optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._own is None:
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            save_optimizer(Path(output_dir), self.optimizer, self.lr_scheduler, shared=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint and self._own is not None:
            load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler, self._own)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def draw(self, micro: int, number: int, trained: bool = True) -> Draw:
        """The mask of a forward pass: a function of seed, step, micro-step and number, so that resuming changes nothing."""
        flags, step = self.flags, self.state.global_step
        end = flags.temperature if flags.final_temperature is None else flags.final_temperature
        # the last step, number max_steps - 1, has the final temperature
        share = step / max(self.state.max_steps - 1, 1)
        # two draws of a pair share their key, hence their noise; the second one mirrors it
        pair = number // 2 if flags.antithetic else number
        return Draw(f"{flags.seed}|{'train' if trained else 'reference'}|{step}|{micro}|{pair}",
                    # geometric: temperatures halve in equal numbers of steps, wherever they start
                    flags.temperature * (end / flags.temperature) ** min(share, 1.0), flags.straight_through,
                    flags.antithetic and number % 2 == 1, trained)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        step = self.state.global_step
        # transformers does not say which micro-step this is: counted here, from 0 at each new step
        micro = self._place[1] + 1 if self._place[0] == step else 0
        self._place = (step, micro)
        total = torch.zeros((), device=self.accelerator.device)
        for number in range(self.flags.mask_draws):
            inputs = self._prepare_inputs(inputs)
            if self.flags.reference == "random_mask":
                self.bank.write(self.draw(micro, number, trained=False))
                chosen, rejected = self.compute_ref_log_probs(model, inputs)
                inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            self.bank.write(self.draw(micro, number))
            total += super().training_step(model, inputs, num_items_in_batch)
            self.bank.finish()
        if self.flags.keep_weight:
            # scaled as a loss is: by fp16's scaler, which the step takes off again, and by the accumulation
            scaler = self.accelerator.scaler
            self.bank.add_prior_gradient(self.flags.keep_prior, self.flags.keep_weight * (
                scaler.get_scale() if scaler else 1.0) / self.current_gradient_accumulation_steps)
        if self._averages and self.accelerator.sync_gradients:
            self._average_gradients()
        return total / self.flags.mask_draws

    @property
    def _reduces_itself(self) -> bool:
        # DDP would send every gradient of a live weight round, which the bank has turned into the logits' by then
        return self.args.world_size > 1

    @property
    def _averages(self) -> bool:
        """Whether every process has all logits; of parted ones the live weights' gradients come averaged from FSDP2."""
        return self.args.world_size > 1 and self.sharding is None

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[None]:
        # each draw has a mask of its own, whose logits' gradient is made at once: none can wait for the last micro-batch
        return nullcontext()

    def held_bytes(self) -> int:
        beside = [tensor for slot in self.bank.slots for tensor in (slot.base, *slot.deltas)]
        return super().held_bytes() + sum(tensor.numel() * tensor.element_size() for tensor in beside)

    def _average_gradients(self) -> None:
        """Of the logits, behind a step's last micro-batch. All processes drew the same mask: its key names none of them."""
        logits = self.bank.logits
        sent = [dist.all_reduce(parameter.grad, async_op=True) for parameter in logits]
        for work in sent:
            work.wait()
        torch._foreach_div_([parameter.grad for parameter in logits], float(self.args.world_size))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Tensor:
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.anchor is None or not model.training:
            return loss
        # the draws of a micro-step share its anchor rows: what differs between them is the mask alone
        turn = self._place[0] * self.args.gradient_accumulation_steps + self._place[1]
        anchor_loss = self.anchor.loss(model, turn, self.accelerator.device)
        self._metrics["train"]["anchor"].append(float(anchor_loss.detach()))
        return loss + self.flags.anchor_weight * anchor_loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # validated as it is used: the mask that realign reads out unless told otherwise, with the seed it takes
        self.bank.write(self._expected)
        return super().evaluation_loop(*args, **kwargs)

    @property
    def _expected(self) -> Draw:
        return Draw(f"{self.flags.seed}|readout|rule", expected=True)

    def validation_terms(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, tuple[float, int]]:
        if self.flags.reference == "random_mask":
            # one random mask for all rows: another one for each batch would make the loss a matter of the batches
            self.bank.write(Draw(f"{self.flags.seed}|reference|validation", self.flags.temperature, trained=False))
            chosen, rejected = self.compute_ref_log_probs(model, inputs)
            inputs = inputs | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            self.bank.write(self._expected)
        return super().validation_terms(model, inputs)

    def progress(self) -> dict[str, Any]:
        return super().progress() | {"zero_masks": int(self.bank.zero_masks)}

    def restore(self, progress: dict[str, Any]) -> None:
        super().restore(progress)
        self.bank.zero_masks = progress["zero_masks"]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save or self._all_save:
            self.save_artifact(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.bank.load_logits(read_mask(Path(resume_from_checkpoint)).logits)


def train(args: MaskArgs, extra: dict[str, Any], run: manifest.Run) -> None:
    """Train a mask and write it (mask.safetensors, mask.json, diagnostics.json) and the run's facts into ``run``."""
    parting = sharding(extra)
    with ExitStack() as stack:
        aligned, tasks = open_models(args, args.aligned, args.task_names, args.trust_base, stack)
        settings, specs = settings_for(args, aligned, tasks)
        if parting:
            check_parting(settings, specs, processes())
        # what files, flags and data can have wrong comes out here, before a model is loaded
        base = aligned.checkpoint.folder
        tokenizer = load_tokenizer(_tokenizer_folder(aligned), base)
        form = template(args.template, tokenizer)
        pairs, held_out = drawn_pairs(args, extra)
        rows = encode_pairs(pairs, tokenizer, form, args.model_max_length, base)
        validation = encode_pairs(held_out, tokenizer, form, args.model_max_length, base) if held_out else []
        anchors = anchor_rows(args, tokenizer, form, base)
        device, dtype = set_up_torch(args)
        arguments = preference_arguments(args, extra, dtype, len(rows), validates=bool(validation))
        # LoRA factors are small enough for fp32, whatever --storage says of whole weights
        storage = getattr(torch, args.storage) if specs[0].part == "weight" else torch.float32
        logit_dtype = getattr(torch, args.logit_dtype)
        needed = _plan(aligned, specs, settings, len(tasks), storage, logit_dtype, dtype)
        for line in needed.lines():
            log.info("%s", line)
        if parting:
            log.info("memory plan: FSDP2 parts all but what passes among %d processes", processes())
        model, slots = live_model(settings, specs, aligned, tasks, storage, dtype, device, parting)
        # a pass leaves the root's weights whole, and the next one would not see what is written into the parts
        bank = MaskBank(slots, settings, args.mask_init, logit_dtype, partial(reshard, model))
        # TRL asks the reference in its constructor: by then the live weights must be the reference's
        _become_reference(bank, args.reference, aligned, tasks)
        facts = [identity(model) for model in (aligned, *tasks)]
        known = _reference_facts(args, settings, facts, storage, dtype)
        trainer = MaskTrainer(model=model, ref_model=None, args=arguments, train_dataset=Dataset.from_list(rows),
                              eval_dataset=Dataset.from_list(validation) if validation else None,
                              processing_class=tokenizer, flags=args, reference=known)
        # a kl anchor asks each task's model through the live weights, so it comes before the mask writes to them
        anchor = make_anchor(args, anchors, tokenizer.pad_token_id, model, device, trainer.accelerator.autocast,
                             lambda i: bank.write_given(lambda spec: reference_values("task", spec, aligned, tasks, i)))
        trainer.add_bank(bank, anchor)

        def save(folder: Path) -> None:
            state = trainer.state
            # parted ones come to the first process, which alone writes them
            logits = bank.named_logits([*(gathered_state(bank) or {}).values()])
            if parting and not manifest.is_main():
                return
            save_mask(folder, settings, logits, facts[0], facts[1:], {
                "steps": state.global_step, "reference": args.reference, "first_temperature": args.temperature,
                "straight_through": args.straight_through, "seed": args.seed, "init": args.mask_init})
            manifest.write_json(folder / manifest.MANIFEST, {
                "status": "checkpoint", "inputs": {"base": facts[0]["base"], "aligned_adapter": facts[0]["adapter"]}})

        trainer.save_artifact = save
        run.metrics.update(fit(trainer, args, extra), pairs=len(rows))
        save(run.folder)
        if parting and not manifest.is_main():
            return
        numbers = mask_numbers(read_mask(run.folder))
        manifest.write_json(run.folder / "diagnostics.json", numbers)
        run.metrics.update(
            trainable_parameters=sum(p.numel() for p in bank.parameters()), masked=needed.masked, space=settings.space,
            bytes_per_masked=round(needed.per_scalar, 2), kept=numbers["whole"]["kept"], entropy=numbers["whole"]["entropy"],
            zero_masks=int(bank.zero_masks))
        run.parents = [fact["name"] for fact in facts]
        run.inputs.update({k: v for k, v in {"base": facts[0]["base"], "aligned_adapter": facts[0]["adapter"]}.items() if v})
        run.inputs.update({f"task_{fact['name']}": fact["adapter"] or fact["base"] for fact in facts[1:]},
                          **contrast_inputs(args.pair_contrast_share))


def _tokenizer_folder(aligned: Model) -> Path:
    own = (aligned.folder / "tokenizer_config.json").is_file()
    return aligned.folder if own else aligned.checkpoint.folder


def _plan(aligned: Model, specs: list, settings: Settings, tasks: int, storage: torch.dtype, logit: torch.dtype,
          dtype: torch.dtype) -> Plan:
    from math import prod

    parameters = sum(prod(info.shape) for info in aligned.checkpoint.tensors.values())
    weights = specs[0].part == "weight"
    return memory_plan(specs, settings.rule, tasks, storage.itemsize, logit.itemsize, parameters,
                       (storage if weights else dtype).itemsize)


def _become_reference(bank: MaskBank, kind: str, aligned: Model, tasks: list[Model]) -> None:
    """Write the reference's weights into the live model: no second model is needed to compute its log-probabilities."""
    if kind == "merge":
        bank.write_unmasked()
    else:
        bank.write_given(lambda spec: reference_values("task" if kind == "task" else "aligned", spec, aligned, tasks))


def _reference_facts(args: MaskArgs, settings: Settings, facts: list[dict[str, Any]], storage: torch.dtype,
                     dtype: torch.dtype) -> dict[str, Any]:
    """What the reference's log-probabilities depend on beside the encoded pairs; names and places do not count."""
    used = facts[:1] if args.reference == "aligned" else facts
    rule = settings.to_json()["rule"] if args.reference == "merge" else None
    return {"kind": args.reference, "models": [[fact["base"], fact["adapter"]] for fact in used], "rule": rule,
            "space": settings.space, "rank": settings.granularity == "rank", "storage": str(storage), "dtype": str(dtype)}
