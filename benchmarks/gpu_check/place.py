"""A Llama with random weights on the device, what it is fed, and how a training of it is timed."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Shape:
    """A Llama, and what it is fed: rows of SFT and MoE, pairs of (prompt, answer, answer), batches that answer prompts."""

    layers: int
    hidden: int
    width: int
    heads: int
    vocabulary: int
    rows: int
    tokens: int
    pairs: int
    prompt: int
    rank: int
    batches: tuple[int, ...]
    asked: int
    new: int
    steps: int

    @property
    def body(self) -> int:
        """Weights of all layers' matrices."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.width)

    @property
    def head(self) -> int:
        """Weights of the output head."""
        return self.vocabulary * self.hidden

    def training_operations(self, tokens: int, answers: int) -> int:
        """Of a step on frozen weights: 2 forwards, 2 back to the activations; the head sees answer tokens only."""
        return 4 * (self.body * tokens + self.head * answers)

    def generation_seconds(self, batch: int, itemsize: int, gemm: float, bandwidth: float) -> float:
        """Least seconds of a batch: its prompts through all weights, then every step's bytes; weights all the same size."""
        values = 2 * self.layers * self.hidden * itemsize * batch  # of one place, keys and values
        read = self.new * (self.body + self.head) * itemsize + values * sum(self.asked + i for i in range(self.new))
        return 2 * self.body * batch * self.asked / gemm + read / bandwidth


SHAPES = {"7b": Shape(32, 4096, 11008, 32, 32000, 8, 300, 4, 100, 256, (1, 32), 128, 64, 5),
          "pico": Shape(2, 64, 128, 4, 384, 4, 24, 2, 8, 4, (1, 4), 16, 6, 1)}
#: Steps that do not count: the first allocates, the second finds what is freed.
WARM = 2


@dataclass
class Place:
    """Where a part computes, and with what."""

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    tokenizer: Any
    results: Path

    def flags(self, *words: str) -> Any:
        """align_basemodel.py's own for these words: what a step of this size is called with."""
        from config import parse
        from flags import AlignArgs

        steps = WARM + self.shape.steps
        return parse(AlignArgs, [
            "--output_dir", str(self.results), "--device", self.device.type, "--dtype",
            str(self.dtype).removeprefix("torch."), "--max_steps", str(steps), "--save_strategy", "no", "--logging_steps",
            "1000000", "--model_max_length", str(self.shape.tokens), "--threads", str(len(os.sched_getaffinity(0))),
            *words])

    def base(self) -> Any:
        """A Llama of the shape with random weights on the device, as ``load_base`` gives one."""
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        from models.base.attention import implementation_for
        from models.base.loading import keep_ends

        s, ends = self.shape, self.tokenizer.eos_token_id
        config = LlamaConfig(vocab_size=s.vocabulary, hidden_size=s.hidden, intermediate_size=s.width,
                             num_hidden_layers=s.layers, num_attention_heads=s.heads, num_key_value_heads=s.heads,
                             tie_word_embeddings=False, bos_token_id=self.tokenizer.bos_token_id, eos_token_id=ends,
                             pad_token_id=self.tokenizer.pad_token_id)
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype,
                                                     attn_implementation=implementation_for(config, self.device))
            # its logit is 0, below the largest of thousands: no answer ends before its limit
            model.lm_head.weight.data[ends] = 0
        keep_ends(model)
        return model.eval()

    def drawn(self, count: int, seed: int) -> list[int]:
        """Random ids, none of them special."""
        import torch

        return torch.randint(3, self.shape.vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()

    def rows(self) -> list[dict[str, Any]]:
        """Encoded rows as ``training/samples.py`` gives them: half a prompt, half an answer."""
        asked, made = self.shape.tokens // 2, []
        for i in range(self.shape.rows * (WARM + self.shape.steps)):
            ids = self.drawn(self.shape.tokens, i)
            made.append({"input_ids": ids, "labels": [-100] * asked + ids[asked:], "objective": i % 3})
        return made

    def pairs(self) -> list[dict[str, list[int]]]:
        """Encoded pairs as ``training/dpo.py`` gives them."""
        asked, answer = self.shape.prompt, self.shape.tokens - self.shape.prompt
        return [{"prompt_ids": self.drawn(asked, 3 * i), "chosen_ids": self.drawn(answer, 3 * i + 1),
                 "rejected_ids": self.drawn(answer, 3 * i + 2)}
                for i in range(self.shape.pairs * (WARM + self.shape.steps))]

    def fit(self, trainer: Any, parsed: Any) -> float:
        """Seconds of a step, the first ones left out; our trainers run as ``training/trainer.py`` runs them."""
        from training.checkpoints import SafeCheckpoints
        from training.trainer import fit

        timer = _timer(self.device)
        trainer.add_callback(timer)
        if isinstance(trainer, SafeCheckpoints):
            fit(trainer, parsed.args, parsed.training)
        else:
            trainer.train()
        return (timer.end - timer.start) / self.shape.steps


def wait(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def _timer(device: Any) -> Any:
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        """The time at the end of the last step that does not count, and at the end of all."""

        start = end = 0.0

        def on_step_end(self, args, state, control, **kwargs):  # noqa: ANN001, ANN201 - transformers' signature
            if state.global_step in (WARM, state.max_steps):
                # twice in a training: between the two nothing waits that would not wait anyway
                wait(device)
                self.start, self.end = self.end, time.perf_counter()

    return Timer()
