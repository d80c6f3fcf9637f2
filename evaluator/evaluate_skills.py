"""What a model keeps of its tasks: likelihood of held-out answers, and scores of the answers that it generates.

    cd evaluator; python evaluate_skills.py --task_name cross_RUN --skills english,maths
    cd evaluator; python evaluate_skills.py --task_name cross_RUN --skills maths_answers,summaries_answers

The likelihood (SOMF's utility where no benchmark runs) needs the model only; TASK_answers reads what inference.py
--task_name TASK wrote. The likelihood of English goes to evaluate_skills.json, that of other tasks, or of several, to
evaluate_skills.TASKS.json, so that two studies on one model do not overwrite each other's scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import config
import console
import runtime
from errors import exit_on_user_error
from flags.base import SKILLS
from flags.skills import EvaluateSkillsArgs
from models.footprint.planned import planned

if TYPE_CHECKING:
    from evaluator.scoring.engine import Result, Subject, Work

NLL = "mean negative log-likelihood per token (nats) of held-out {} answers, end of answer included"


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        parsed = config.parse(EvaluateSkillsArgs, argv)
        args: EvaluateSkillsArgs = parsed.args
        if planned(parsed, print):
            return
        console.set_up(parsed.verbosity)
        runtime.collect_rarely()
        runtime.short_waits()
        from evaluator.scoring import engine

        likelihoods = [name for name in args.skill_names if name in SKILLS]
        # answers first: where some are missing, no model was loaded for nothing
        groups = [names for names in (*([name] for name in args.skill_names if name not in SKILLS), likelihoods) if names]
        paths = [path for names in groups
                 for path in engine.evaluate(dataclasses.replace(args, skills=",".join(names)), command(names), plan)]
        console.finish(paths, [*args.table, *console.same(parsed, "output_dir")])


def command(names: Sequence[str]) -> str:
    """The name of the score file of these tasks."""
    return "evaluate_skills" + ("" if list(names) == ["english"] else f".{'_'.join(names)}")


def plan(args: EvaluateSkillsArgs, subject: Subject) -> Work:
    """What one subject's utility scores depend on and how they are made."""
    from data.sources import load_records
    from evaluator.scoring import engine

    # ``main`` asks for generated answers task by task, so the first name says what this call is about
    if args.skill_names[0] not in SKILLS:
        return plan_answers(args, subject, args.skill_names[0].removesuffix("_answers"))
    records = {name: engine.subset(load_records(name, args.dataset_type), args.num_samples,
                                   lambda record: record.prompt + record.input) for name in args.skill_names}
    inputs = {"model": engine.model_hash(args, subject)}
    inputs |= {name: engine.content_hash(rows) for name, rows in records.items()}
    return engine.Work(inputs, lambda: score(args, subject, records))


def score(args: EvaluateSkillsArgs, subject: Subject, records: dict[str, list]) -> Result:
    """The likelihood of every task's answers, task by task."""
    from data.encode import render
    from evaluator.scoring import engine
    from evaluator.scoring.likelihood import answer_logprobs
    from evaluator.statistics import metrics

    loaded = engine.load(args, subject)
    scores, rows = [], []
    for name, task_records in records.items():
        items = [(render(loaded.template, record), record.answer) for record in task_records]
        # with the end of the answer, as in training: a model that would write on pays for it
        scored = answer_logprobs(loaded, items, args.batch_tokens, end=True)
        scores.append(metrics.ratio([-total for total, _ in scored], [n for _, n in scored], f"nll_{name}",
                                    NLL.format(name), higher_is_better=False, seed=args.seed))
        rows += [_row(f"nll_{name}", record, total, n) for record, (total, n) in zip(task_records, scored, strict=True)]
    return engine.Result(scores, rows)


def plan_answers(args: EvaluateSkillsArgs, subject: Subject, task: str) -> Work:
    """The scores of the answers that inference.py wrote for a task's held-out rows."""
    from evaluator.scoring import answer_scores, engine

    answers = engine.subset(engine.answers(args, task, subject), args.num_samples, lambda row: row["prompt"] + row["input"])
    rows = answer_scores.rows(task, answers)

    def compute() -> Result:
        values = {key: [row["values"][key] for row in rows] for key in rows[0]["values"]}
        # told beside the score: an answer that was cut may lack its number
        cut = sum(row["finish"] == "length" for row in answers)
        return engine.Result(answer_scores.scores(task, values, args.seed), rows,
                             {"answers": {"cut_at_limit": cut, "without_reference": len(answers) - len(rows)}})

    return engine.Work({"answers": engine.content_hash(answers)}, compute)


def _row(name: str, record: Any, total: float, tokens: int) -> dict[str, Any]:
    from evaluator.scoring import engine

    return {"set": name, "id": record.id, "category": record.category,
            "prompt_hash": engine.prompt_hash(record.prompt, record.input, record.answer),
            "values": {"nll": round(-total, 4), "tokens": tokens}}


if __name__ == "__main__":
    main()
