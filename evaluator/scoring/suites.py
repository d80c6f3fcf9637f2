"""What --suite names: one table of the sets that are answered, the commands that score them, and the columns they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from data.sets import protocols
from errors import UserError
from evaluator.statistics.axes import DISCRIMINATION
from flags import EvaluateHelpfulnessArgs, EvaluateSafetyArgs, EvaluateTruthArgs
from flags.base import PROTOCOLS
from flags.judges import ASKED_BY, KNOWN
from flags.utility import PROBES

if TYPE_CHECKING:
    from flags.evaluate_models import EvaluateModelsArgs


@dataclass(frozen=True)
class Part:
    """One command that scores, and the answers that it reads.

    Args:
        command: a file of evaluator/, without its ending.
        flags: what it is told beside the models.
        answered: tasks of inference.py whose answers it always needs.
        judged: those that it needs for judges alone.
        likelihoods: sets of choices that it scores without answers.
    """

    command: str
    flags: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()
    judged: tuple[str, ...] = ()
    likelihoods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite:
    """Parts, and the scores (* stands for anything) that the table shows of them.

    Args:
        asked: those of them that a report shows when asked for (its --columns).
    """

    parts: tuple[Part, ...]
    columns: tuple[str, ...]
    asked: tuple[str, ...] = ()


def _published(name: str) -> Suite:
    """The suite of a published set: answered, and scored for what it was made for."""
    task = protocols.task_of(name)
    if task == "safety":
        # a rate of refusals alone would praise a model that refuses everything
        part = Part("evaluate_safety", ("--harmful_task", name), (name, "overrefusal"))
        # "?": the comma between two sets, which would end the name here
        return Suite((part,), (f"{name}.*", f"*.{name}", "overrefusal*", "*.overrefusal", f"{name}?overrefusal.balance"))
    if task == "overrefusal":
        unsafe = f"{name}_unsafe"
        harmful = unsafe if unsafe in PROTOCOLS else "safety"
        asked = ("--harmful_task", harmful) if harmful == unsafe else ()
        part = Part("evaluate_safety", (*asked, "--overrefusal_task", name), (harmful, name))
        return Suite((part,), (f"{name}.*", f"*.{name}", f"{harmful}.*" if asked else "safe_refusal", f"*.{harmful}",
                               f"{harmful}?{name}.balance"))
    command = "evaluate_helpfulness" if task == "helpfulness" else "evaluate_truth_and_info"
    return Suite((Part(command, ("--answers_task", name), judged=(name,)),), (f"*.{name}*",))


_LIKELIHOODS = {"truth": ("truthfulqa_mc", "hhh_honest"), "help": ("hhh_helpful",)}
_REFUSAL = Suite((Part("evaluate_refusal"),), DISCRIMINATION, DISCRIMINATION)
SUITES: dict[str, Suite] = {
    "safety": Suite((Part("evaluate_safety", answered=("safety", "overrefusal")), *_REFUSAL.parts),
                    ("safe_refusal", "overrefusal*", "balance", "*.safety", "*.overrefusal", *_REFUSAL.columns),
                    _REFUSAL.asked),
    "truth": Suite((Part("evaluate_truth_and_info", judged=("truthfulness",), likelihoods=_LIKELIHOODS["truth"]),),
                   ("mc1", "mc2", "factual", "hhh_honest", "*.truthfulness*")),
    "help": Suite((Part("evaluate_helpfulness", judged=("helpfulness",), likelihoods=_LIKELIHOODS["help"]),),
                  ("nll", "hhh_helpful", "*.helpfulness")),
    "utility": Suite((Part("evaluate_utility", ("--tasks", "probes")),), tuple(PROBES)),
}
SUITES["all"] = Suite(tuple(part for suite in SUITES.values() for part in suite.parts),
                      tuple(name for suite in SUITES.values() for name in suite.columns), _REFUSAL.asked)
SUITES["refusal"] = _REFUSAL
SUITES |= {name: _published(name) for name in PROTOCOLS}
#: Command -> the questions that its judges answer; evaluate_utility.py and evaluate_refusal.py have none.
QUESTIONS = {"evaluate_safety": EvaluateSafetyArgs.questions, "evaluate_helpfulness": EvaluateHelpfulnessArgs.questions,
             "evaluate_truth_and_info": EvaluateTruthArgs.questions}


def parts(args: EvaluateModelsArgs) -> tuple[Part, ...]:
    """The parts of the suites that were asked for, each once."""
    return tuple(dict.fromkeys(part for name in args.suites for part in SUITES[name].parts))


def columns(args: EvaluateModelsArgs) -> str:
    """--scores of the report: the suites' columns, and the further ones that were asked for."""
    names = [name for suite in args.suites for name in SUITES[suite].columns]
    return ",".join(dict.fromkeys([*names, *(name.strip() for name in args.columns.split(",") if name.strip())]))


def asked_columns(args: EvaluateModelsArgs) -> str:
    """--columns of the report: what the suites ask for, and what the user does."""
    names = [name for suite in args.suites for name in SUITES[suite].asked]
    return ",".join(dict.fromkeys([*names, *(name.strip() for name in args.columns.split(",") if name.strip())]))


def judges_of(part: Part, args: EvaluateModelsArgs) -> str:
    """--judges of a part: those that answer its questions."""
    asked = QUESTIONS.get(part.command, ())
    return ",".join(f"{name}={model}" if model else name for name, model in args.named_judges
                    if name in KNOWN and KNOWN[name].question in asked)


def answered(part: Part, args: EvaluateModelsArgs) -> tuple[str, ...]:
    """The tasks whose answers a part needs here."""
    return (*part.answered, *(part.judged if judges_of(part, args) else ()))


def problems(args: EvaluateModelsArgs, has_base: bool) -> list[str]:
    """What is wrong with suites, data and judges, found before any model is loaded; prompts are read for it.

    Args:
        has_base: whether the base is one of the models.
    """
    from data.sources import load_choices, load_records
    from evaluator.scoring import judging

    found, here = [], parts(args)
    for part in here:
        if part.judged and part.judged[0] in PROTOCOLS and not judges_of(part, args):
            kinds = " or ".join(name for name, known in KNOWN.items() if known.question in QUESTIONS[part.command])
            found.append(f"--suite {part.judged[0]}: only judges score its answers; add --judges ({kinds})")
    used = {part.command for part in here}
    found += [f"--judges {name}: answers '{known.question}', which {ASKED_BY[known.question]} asks, and no suite of "
              f"--suite {args.suite} runs it" for name, _ in args.named_judges
              if (known := KNOWN[name]) and ASKED_BY[known.question].removesuffix(".py") not in used]
    found += [f"--judges {name}: compares with the base model's answers; add base to --models"
              for name, _ in args.named_judges if KNOWN[name].question == "safer" and not has_base]
    tasks = dict.fromkeys(task for part in here for task in answered(part, args))
    found += [f"--data_path {name}={file}: no suite of --suite {args.suite} answers {name}"
              for name, file in args.files.items() if name not in tasks]
    for task in tasks:
        found += _caught(lambda task=task: _read(task, args) if task in PROTOCOLS else load_records(task, "test"))
    for name in dict.fromkeys(name for part in here for name in part.likelihoods):
        if not args.lite:
            found += _caught(lambda name=name: load_choices(name))
    return found + _caught(lambda: judging.make_judges(args))


def _read(task: str, args: EvaluateModelsArgs) -> None:
    """Read the prompts of a published set, as inference.py will."""
    path = args.file_of(task)
    if wrong := protocols.problems(task, path, args.data_source):
        raise UserError(*wrong)
    protocols.load(task, path, args.data_source)


def _caught(read) -> list[str]:  # noqa: ANN001 - a function without arguments
    try:
        read()
    except UserError as error:
        return list(error.problems)
    return []
