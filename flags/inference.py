"""Flags of inference.py."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from config import flag
from flags.base import ATTACKS, PROTOCOLS, SKILLS, STYLES, DeviceMapFlags, ModelCommand, name_problems
from flags.mixture import mixture_run, read_mixture

#: Tasks with a test set of prompts of their own; the rest of --task_name are published protocols and SKILLS.
ANSWERED = ("helpfulness", "safety", "truthfulness", "overrefusal")

#: What --backend takes.
BACKENDS = ("auto", "hf", "static", "continuous", "vllm")


def answers_problems(name: str, value: str) -> list[str]:
    """What is wrong with TASK, TASK+ATTACK, TASK+STYLE or TASK+ATTACK+STYLE, the name of a folder of answers."""
    task, *ways = value.split("+")
    known = (*ANSWERED, *PROTOCOLS)
    allowed = [set(ATTACKS[1:]), set(STYLES[1:])]
    if task in known and (not ways or len(ways) == 1 and ways[0] in allowed[0] | allowed[1]
                          or len(ways) == 2 and ways[0] in allowed[0] and ways[1] in allowed[1]):
        return []
    near = difflib.get_close_matches(task, known, n=1, cutoff=0.6)
    wrong = (f"no attack '{'+'.join(ways)}'" if task in known else
             f"no such task{f' (did you mean {near[0]}?)' if near else ''}")
    return [f"{name} {value}: {wrong}; allowed: TASK or TASK+ATTACK, TASK one of {', '.join(known)}, ATTACK one of "
            f"{', '.join(ATTACKS[1:])}, or a style of --prompt_style: {', '.join(STYLES[1:])}"]


@dataclass(frozen=True)
class InferenceArgs(ModelCommand, DeviceMapFlags):
    """Answer a test set with one or several trained runs.

    python inference.py --task_name safety --cross_task mix_moe_reg_00000_00000_00000_gate_00100 --dataset_type test
    """

    heading, general = "Prompts and answers", False
    task_name: str = flag("helpfulness", "whose prompts: an objective's test set, over-refusal, a published protocol, or a "
                                         "task's held-out rows (maths)", choices=(*ANSWERED, *PROTOCOLS, *SKILLS))
    cross_task: str = flag("", "run to answer with (several: separated by commas); empty: the raw base model")
    dataset_type: str = flag("test", "split", choices=("train", "validation", "test"))
    attack: str = flag("none", "put every prompt in an attack wrapper; judges still see the prompt itself", choices=ATTACKS)
    attack_file: str | None = flag(None, "text of the wrapper with <question> in it (prefill: start of the answer); "
                                         "empty: our own wording")
    prompt_style: str = flag("none", "system text and frame around every prompt; judges still see the prompt itself",
                             choices=STYLES)
    prompt_style_file: str | None = flag(None, "file with the style's exact text: .txt, .yaml, or dialogs")
    adapters: str | None = flag(None, "answer with a weighted sum of adapters, fused while loading: task=0.6,safety=0.4; "
                                      "several sums: between ';'. A run named task@0.6_safety@0.4 is the same")
    unique_prompts: bool = flag(False, "leave out prompts that repeat an earlier one; without it they are only counted")
    aligned_flag: int = flag(1, "0: the raw base model, whatever --cross_task says", choices=(0, 1))
    checkpoint_number: int = flag(-1, "a checkpoint of the run instead of its end; -1: the end", low=-1)
    num_samples: int = flag(-1, "n prompts, drawn by a hash of the text; -1: all", low=-1)
    data_path: str | None = flag(None, "local file, folder or hub name of the prompts; empty: --data_source")
    data_source: str = flag("embedded", "where prompts come from without --data_path", choices=("embedded", "published"))
    split_mode: str = flag("leak_free", "published: TruthfulQA's unshuffled halves", choices=("leak_free", "published"))
    do_sample: bool = flag(False, "sample instead of greedy decoding")
    temperature: float = flag(0.6, "sampling temperature", low=0.01)
    top_p: float = flag(1.0, "nucleus", low=0.01)
    max_new_tokens: int = flag(512, "answer length limit", low=1)
    batch_size: int = flag(32, "prompts per batch", low=1)
    backend: str = flag("auto", "what decodes: hf (padded batches), static (a cache of one length, compiled on a GPU), "
                                "continuous (rows that end make room for others), vllm (where installed); auto: hf",
                        choices=BACKENDS)

    @classmethod
    def sections(cls, given: dict[str, Any]) -> tuple[str, ...]:
        return ("common", "inference")

    @property
    def answers_name(self) -> str:
        """The folder of the answers below results/inference: the task, with its attack and style."""
        return "+".join([self.task_name, *(way for way in (self.attack, self.prompt_style) if way != "none")])

    @property
    def runs(self) -> tuple[str, ...]:
        if not self.aligned_flag:
            return ("",)
        if self.adapters:
            return tuple(mixture_run(read_mixture(text)) for text in self.adapters.split(";"))
        names = [name.strip() for name in self.cross_task.split(",")]
        return tuple("" if name in ("base", "raw") else name for name in names)

    def problems(self) -> list[str]:
        found = [*super().problems()]
        if self.task_name in PROTOCOLS and self.dataset_type != "test":
            found.append(f"--dataset_type {self.dataset_type}: {self.task_name} is a test set only; use --dataset_type test")
        try:
            for run in self.runs if self.adapters else ():
                found += name_problems("--adapters", run)
        except ValueError as error:
            found.append(f"--adapters {self.adapters}: {error}")
        if self.adapters and (self.cross_task or not self.aligned_flag or self.checkpoint_number >= 0):
            found.append("--adapters: names the model itself; drop --cross_task, --aligned_flag and --checkpoint_number")
        if self.prompt_style_file and self.prompt_style == "none":
            found.append("--prompt_style_file: belongs to a style; add --prompt_style")
        if self.prompt_style != "none" and self.template in ("alpaca", "wizardlm"):
            found.append(f"--prompt_style {self.prompt_style}: --template {self.template} has no place for a system text; "
                         "use --template chat or llama2")
        if self.device_map and self.backend not in ("auto", "hf"):
            found.append(f"--device_map {self.device_map}: goes with --backend hf alone"
                         + (" (vLLM spreads models in its own way)" if self.backend == "vllm" else "; drop one of the two"))
        if self.attack_file and self.attack == "none":
            found.append("--attack_file: says how, but not which; add --attack cot, cou, suffix or prefill")
        return found
