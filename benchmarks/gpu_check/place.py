"""A Llama with random weights on the device, what it is fed, and how a training of it is timed."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu_check import memory
from models.footprint.shapes import Shape as Counted

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
    key_heads: int = 0  # 0: as many as heads

    @property
    def keys(self) -> int:
        """Width of all key heads together."""
        return self.hidden // self.heads * (self.key_heads or self.heads)

    @property
    def body(self) -> int:
        """Weights of all layers' matrices."""
        return self.layers * (2 * self.hidden * (self.hidden + self.keys) + 3 * self.hidden * self.width)

    @property
    def head(self) -> int:
        """Weights of the output head."""
        return self.vocabulary * self.hidden

    def counted(self) -> Counted:
        """The numbers that --plan reads off a config.json."""
        parameters = self.body + 2 * self.head + (2 * self.layers + 1) * self.hidden
        return Counted(parameters, self.layers, self.hidden, self.width, self.vocabulary, self.keys, self.hidden, self.heads)

    def training_operations(self, tokens: int, answers: int, every: bool = False) -> int:
        """Of a step: 2 forwards, 2 back to the activations, 2 to the weights where every one trains; the head sees answer
        tokens only."""
        return (6 if every else 4) * (self.body * tokens + self.head * answers)

    def generation_seconds(self, batch: int, itemsize: int, gemm: float, bandwidth: float) -> float:
        """Least seconds of a batch: its prompts through all weights, then every step's bytes; weights all the same size."""
        values = 2 * self.layers * self.keys * itemsize * batch  # of one place, keys and values
        read = self.new * (self.body + self.head) * itemsize + values * sum(self.asked + i for i in range(self.new))
        return 2 * self.body * batch * self.asked / gemm + read / bandwidth


SHAPES = {"7b": Shape(32, 4096, 11008, 32, 32000, 8, 300, 4, 100, 256, (1, 32), 128, 64, 5),
          "1b": Shape(22, 2048, 5632, 32, 32000, 4, 512, 2, 128, 256, (1, 32), 128, 64, 3, key_heads=4),
          "pico": Shape(2, 64, 128, 4, 384, 4, 24, 2, 8, 4, (1, 4), 16, 6, 1)}
#: Shape -> that of the parts whose state would not fit a card at it: every weight trains, or has a logit of its own.
SMALLER = {"7b": "1b"}
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
    #: What the last ``fit`` held beside its plan (``memory.compared``).
    memory: dict[str, Any] = field(default_factory=dict)

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

    def answering(self, batch: int, run: str) -> Any:
        """inference.py's own flags for a batch, of the base or of a fused MoE with experts of rank 8."""
        import json

        from config import parse
        from flags import InferenceArgs

        folder = self.results / "outputs" / run
        if run and not folder.is_dir():
            # where --plan looks for the ranks of experts: the header of a file of safetensors
            folder.mkdir(parents=True)
            header = json.dumps({"layers.0.gate.a": {"dtype": "F32", "shape": [3, 8, self.shape.hidden],
                                                     "data_offsets": [0, 96 * self.shape.hidden]}}).encode()
            (folder / "moe_config.json").write_text(json.dumps({"experts": ["a", "b", "c"]}))
            (folder / "moe.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        return parse(InferenceArgs, [
            "--output_dir", str(self.results), "--device", self.device.type, "--dtype",
            str(self.dtype).removeprefix("torch."), "--batch_size", str(batch), "--max_new_tokens", str(self.shape.new),
            *(["--cross_task", run] if run else [])])

    def base(self, dtype: torch.dtype | None = None) -> Any:
        """A Llama of the shape with random weights on the device, as ``load_base`` gives one."""
        import torch
        from transformers import AutoModelForCausalLM

        from models.base.attention import implementation_for
        from models.base.loading import keep_ends

        config = self._config()
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or self.dtype,
                                                     attn_implementation=implementation_for(config, self.device))
            # its logit is 0, below the largest of thousands: no answer ends before its limit
            model.lm_head.weight.data[self.tokenizer.eos_token_id] = 0
        keep_ends(model)
        return model.eval()

    def load_base(self, folder: Path, dtype: torch.dtype, *_: Any) -> Any:
        """In place of ``models/base/loading.load_base``, for a folder that is not there."""
        return self.base(dtype)

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every weight of the base; takes no memory."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return {name: tuple(p.shape) for name, p in AutoModelForCausalLM.from_config(
                self._config()).named_parameters()}

    def _config(self) -> Any:
        from transformers import LlamaConfig

        s, tokenizer = self.shape, self.tokenizer
        return LlamaConfig(vocab_size=s.vocabulary, hidden_size=s.hidden, intermediate_size=s.width,
                           num_hidden_layers=s.layers, num_attention_heads=s.heads,
                           num_key_value_heads=s.key_heads or s.heads, tie_word_embeddings=False,
                           bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                           pad_token_id=tokenizer.pad_token_id)

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
        """Seconds of a step, the first ones left out; our trainers run as ``training/trainer.py`` runs them.

        What the training held beside its plan goes to ``memory``; making the model is over by then.
        """
        from training.checkpoints import SafeCheckpoints
        from training.trainer import fit

        timer = _timer(self.device)
        trainer.add_callback(timer)
        ours = isinstance(trainer, SafeCheckpoints)
        memory.start(self.device)
        if ours:
            fit(trainer, parsed.args, parsed.training)
        else:
            trainer.train()
        # the plan is of our trainers
        self.memory = memory.compared(memory.planned(parsed, self) if ours else None, memory.held(self.device))
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
