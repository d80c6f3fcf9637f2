"""Held-out negative log-likelihood, HHH-helpful preference, and the answers in alpaca_eval's format.

    cd evaluator; python evaluate_helpfulness.py --task_name cross_RUN

The scores need the model only. Answers of inference.py --task_name helpfulness are exported when they exist, to
results/scores/cross_RUN/alpaca_eval.json and reference_model.json, for a pairwise judge elsewhere; --judges pairwise=MODEL
compares them with the references here, --alpaca_eval 50 runs the alpaca_eval command on the first 50.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import config
import console
import manifest
import runtime
from errors import UserError, exit_on_user_error
from flags import EvaluateHelpfulnessArgs
from models.footprint.planned import planned

if TYPE_CHECKING:
    from evaluator.scoring.engine import Result, Subject, Work
    from evaluator.scoring.judging import Named

NLL = "mean negative log-likelihood per token (nats) of held-out helpfulness answers, end of answer included"
HHH = "HHH-helpful: share of pairs whose preferred answer has the higher mean log-probability per token"


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        parsed = config.parse(EvaluateHelpfulnessArgs, argv)
        args: EvaluateHelpfulnessArgs = parsed.args
        if planned(parsed, print):
            return
        console.set_up(parsed.verbosity)
        runtime.collect_rarely()
        runtime.short_waits()
        from evaluator.scoring import alpaca, engine

        if args.alpaca_eval:
            alpaca.check(args)
        # after the check above: a command that is not installed must not show after an hour of scoring
        command = engine.command_of("evaluate_helpfulness", (args.answers_task, "helpfulness"))
        paths = engine.evaluate(args, command, plan)
        if not manifest.is_main():
            return
        for subject in engine.subjects(args):
            if engine.has_answers(args, args.answers_task, subject):
                said = f"{export(args, subject)} answers of {subject.name} exported"
            else:
                said = f"nothing to export; run {engine.inference_command(args, args.answers_task, subject)}"
            console.show(f"alpaca_eval: {said}", "")
        if args.alpaca_eval:
            alpaca.evaluate(args)
        console.finish(paths, [*args.table, *console.same(parsed, "output_dir")])


def plan(args: EvaluateHelpfulnessArgs, subject: Subject) -> Work:
    """What one subject's helpfulness scores depend on and how they are made."""
    from data.sets.protocols import wrong_task
    from data.sources import load_choices, load_records
    from evaluator.scoring import engine, judging

    if wrong := wrong_task("answers_task", args.answers_task, "helpfulness"):
        raise UserError(*wrong)
    if args.answers:
        return judging.work_on_file(args, subject, args.answers_task)
    model = engine.model_hash(args, subject)
    records = engine.subset(load_records("helpfulness", args.dataset_type), args.num_samples,
                            lambda record: record.prompt + record.input)
    choices = [] if args.lite else engine.subset(load_choices("hhh_helpful"), args.num_samples,
                                                 lambda choice: choice.id + choice.prompt)
    inputs = {"model": model, "records": engine.content_hash(records), "choices": engine.content_hash(choices)}
    judges, answers = judging.make_judges(args), []
    if judges:
        answers = _with_references(args, subject)
        inputs["answers"] = engine.content_hash(answers)
    return judging.work(inputs, judges, lambda: score(args, subject, records, choices, judges, answers))


def _with_references(args: EvaluateHelpfulnessArgs, subject: Subject) -> list[dict[str, Any]]:
    """The answers that have a reference to compare with; a UserError when none has."""
    from evaluator.scoring import engine, judging

    rows = engine.subset(judging.own_answers(args, args.answers_task, subject), args.num_samples,
                         lambda row: row["prompt"])
    # some prompt sets have no reference answers, or not for every row
    comparable = [row for row in rows if row["reference"]]
    if not comparable:
        folder = engine.answers_folder(args, args.answers_task, subject)
        raise UserError(f"--judges: none of the answers in {folder} has a reference to compare with; make them with: "
                        f"{engine.inference_command(args, args.answers_task, subject)}")
    return comparable


def score(args: EvaluateHelpfulnessArgs, subject: Subject, records: list, choices: list, judges: Sequence[Named] = (),
          answers: Sequence[dict[str, Any]] = ()) -> Result:
    """NLL over the records, unless --lite the preference over the pairs, and the judges' preferences over the answers."""
    from data.encode import render
    from evaluator.scoring import baselines, engine, judging
    from evaluator.scoring.likelihood import answer_logprobs
    from evaluator.scoring.preferences import preference_score
    from evaluator.statistics import metrics

    # before the model is loaded: a local judge and the model need not be in memory together
    judged = judging.judge_answers(args, judges, args.answers_task, answers)
    loaded = engine.load(args, subject)
    items = [(render(loaded.template, record), record.answer) for record in records]
    # with the end of the answer, as in training: a model that would write on pays for it
    scored = answer_logprobs(loaded, items, args.batch_tokens, end=True)
    scores = [metrics.ratio([-total for total, _ in scored], [n for _, n in scored], "nll", NLL,
                            higher_is_better=False, seed=args.seed)]
    rows: list[dict[str, Any]] = [
        {"set": "nll", "id": record.id, "category": record.category,
         "prompt_hash": engine.prompt_hash(record.prompt, record.input, record.answer),
         "values": {"nll": round(-total, 4), "tokens": n}}
        for record, (total, n) in zip(records, scored, strict=True)
    ]
    details: dict[str, Any] = {}
    if choices:
        extra, more = preference_score(loaded, choices, "hhh_helpful", HHH, args.batch_tokens)
        scores.append(extra)
        rows += more
        details["baselines"] = baselines.preference(choices, "hhh_helpful")
    if judges:
        scores += judged.scores
        rows += judging.new_rows(args.answers_task, answers, judged)
        details["judged"] = judged.details
    return engine.Result(scores, rows, details)


def export(args: EvaluateHelpfulnessArgs, subject: Subject) -> int:
    """Write alpaca_eval.json (and reference_model.json where references are known); returns the number of answers."""
    from evaluator.scoring import alpaca, engine

    rows = engine.subset(engine.answers(args, args.answers_task, subject), args.num_samples, lambda row: row["prompt"])
    folder = args.results / "scores" / subject.sub
    outputs, references = alpaca.layout(rows, subject.name)
    manifest.write_json(folder / "alpaca_eval.json", outputs)
    if references:
        manifest.write_json(folder / "reference_model.json", references)
    return len(rows)


if __name__ == "__main__":
    main()
