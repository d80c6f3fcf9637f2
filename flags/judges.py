"""Which judges there are, what each answers, and the flags that choose among them. The standard library only."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import ClassVar

from config import flag
from flags.judge_flags import ApiFlags


@dataclass(frozen=True)
class Known:
    """A judge's name on the command line.

    Args:
        question: what it answers; decides which command takes it.
        model: whether it needs a model: NAME=FOLDER or NAME=HUB_NAME.
    """

    question: str
    model: bool = False

    def up(self, task: str) -> bool:
        """Whether more of its label is better on answers to a task: a refusal is, except of a harmless prompt."""
        return task != "overrefusal" if self.question == "refusal" else self.question not in ("harm", "coherence")


KNOWN: dict[str, Known] = {
    "keyword": Known("refusal"),
    "published": Known("refusal"),
    "coherence": Known("coherence"),
    "fitted": Known("harm"),
    "fitted-safer": Known("safer"),
    "moderation": Known("harm", model=True),
    "guard": Known("harm", model=True),
    "harmbench": Known("harm", model=True),
    "behaviour": Known("harm", model=True),
    "truth": Known("truth", model=True),
    "info": Known("info", model=True),
    "pairwise": Known("preference", model=True),
    "reward": Known("preference", model=True),
    "safer": Known("safer", model=True),
    "api-harm": Known("harm"),
    "api-strongreject": Known("harm"),
    "api-overrefusal": Known("refusal"),
    "api-truth": Known("truth"),
    "api-info": Known("info"),
    "api-preference": Known("preference"),
    "api-safety-preference": Known("safer"),
}
#: Families of --judges guard=MODEL; auto: by the chat template and the name.
GUARDS = ("auto", "llama_guard", "llama_guard_3", "shieldgemma", "wildguard", "qwen3guard", "granite_guardian",
          "granite_guardian_3_3")
#: Questions that compare an answer with another one.
COMPARING = ("preference", "safer")
#: Which command asks a question.
ASKED_BY = {"harm": "evaluate_safety.py", "refusal": "evaluate_safety.py", "coherence": "evaluate_safety.py",
            "safer": "evaluate_safety.py",
            "truth": "evaluate_truth_and_info.py", "info": "evaluate_truth_and_info.py",
            "preference": "evaluate_helpfulness.py"}


@dataclass(frozen=True)
class JudgeFlags(ApiFlags):
    """Flags that choose judges beside a command's own scores, and those of the API judges among them."""

    heading, general = "Judges", False
    judges: str = flag("", "more judges, NAME or NAME=MODEL separated by commas; MODEL: a folder, a hub name or 'embedded'")
    judge_max_length: int = flag(0, "longest input of a local judge in tokens, longer answers are cut on the right and "
                                    "counted; 0: 512 for moderation, else what the model takes, at most 4096", low=0)
    judge_batch_tokens: int = flag(4096, "tokens that a local judge reads in one pass", low=1)
    judge_prompts: str = flag("", "YAML that replaces prompts of evaluator/judges/prompts.yaml; empty: none")
    judge_guard: str = flag("auto", "family of the guard, where its chat template and its name do not tell", choices=GUARDS)
    judge_compat: str = flag("none", "published: the moderation head as the original ran it: 256 tokens, the whole "
                                     "templated prompt as the question", choices=("none", "published"))

    questions: ClassVar[tuple[str, ...]] = ()

    @property
    def named_judges(self) -> tuple[tuple[str, str], ...]:
        """(name, model) of every judge on the command line; model is "" for judges without one."""
        pairs = (item.strip().partition("=") for item in self.judges.split(",") if item.strip())
        return tuple((name.strip(), model.strip()) for name, _, model in pairs)

    def problems(self) -> list[str]:
        known = [name for name, _ in self.named_judges if name in KNOWN]
        return [*super().problems(), *judge_problems(self.named_judges, self.questions), *self.api_problems(known)]


def judge_problems(named: tuple[tuple[str, str], ...], questions: tuple[str, ...]) -> list[str]:
    """What is wrong with a list of judges for a command that asks ``questions``; nothing is loaded or looked up."""
    here = [name for name, known in KNOWN.items() if known.question in questions]
    found, seen = [], set()
    for name, model in named:
        known = KNOWN.get(name)
        if known is None:
            near = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.6)
            found.append(f"--judges {name}: no such judge{f' (did you mean {near[0]}?)' if near else ''}; "
                         f"known here: {', '.join(here)}")
            continue
        if known.question not in questions:
            found.append(f"--judges {name}: answers '{known.question}', which {ASKED_BY[known.question]} asks; "
                         f"known here: {', '.join(here)}")
        elif known.model and not model:
            found.append(f"--judges {name}: needs a model: {name}=FOLDER or {name}=HUB_NAME")
        elif model and not known.model:
            found.append(f"--judges {name}={model}: takes no model; write {name}")
        if name in seen:
            found.append(f"--judges {name}: named twice; score with one {name} judge at a time")
        seen.add(name)
    return found
