"""Held-out negative log-likelihood, HHH-helpful preference, and the answers in alpaca_eval's format.

    cd evaluator; python evaluate_helpfulness.py --task_name cross_RUN

The scores need the model only. Answers of inference.py --task_name helpfulness are exported when they exist, to
results/scores/cross_RUN/alpaca_eval.json and reference_model.json, for a pairwise judge elsewhere.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import config
from commands import EvaluateHelpfulnessArgs
from errors import exit_on_user_error

if TYPE_CHECKING:
    from evaluator.engine import Result, Subject, Work

NLL = "mean negative log-likelihood per token (nats) of held-out helpfulness answers, end of answer included"
HHH = "HHH-helpful: share of pairs whose preferred answer has the higher mean log-probability per token"


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        args: EvaluateHelpfulnessArgs = config.parse(EvaluateHelpfulnessArgs, argv).args
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        from evaluator import engine

        engine.evaluate(args, "evaluate_helpfulness", plan)
        for subject in engine.subjects(args):
            if engine.has_answers(args, "helpfulness", subject):
                print(f"alpaca_eval: {export(args, subject)} answers of {subject.name} exported")
            else:
                print(f"alpaca_eval: nothing to export; run {engine.inference_command(args, 'helpfulness', subject)}")


def plan(args: EvaluateHelpfulnessArgs, subject: Subject) -> Work:
    """What one subject's helpfulness scores depend on and how they are made."""
    from data.sources import load_choices, load_records
    from evaluator import engine

    model = engine.model_hash(args, subject)
    records = engine.subset(load_records("helpfulness", args.dataset_type), args.num_samples,
                            lambda record: record.prompt + record.input)
    choices = [] if args.lite else engine.subset(load_choices("hhh_helpful"), args.num_samples,
                                                 lambda choice: choice.id + choice.prompt)
    inputs = {"model": model, "records": engine.content_hash(records), "choices": engine.content_hash(choices)}
    return engine.Work(inputs, lambda: score(args, subject, records, choices))


def score(args: EvaluateHelpfulnessArgs, subject: Subject, records: list, choices: list) -> Result:
    """NLL over the records and, unless --lite, the preference over the pairs."""
    from evaluator import engine, metrics
    from evaluator.likelihood import answer_logprobs
    from evaluator.preferences import preference_score

    loaded = engine.load(args, subject)
    items = [(loaded.template.render(record.prompt, record.input), record.answer) for record in records]
    scored = answer_logprobs(loaded, items, args.batch_tokens, end=True)
    scores = [metrics.ratio([-total for total, _ in scored], [n for _, n in scored], "nll", NLL,
                            higher_is_better=False, seed=args.seed)]
    rows: list[dict[str, Any]] = [
        {"set": "nll", "id": record.id, "category": record.category, "values": {"nll": round(-total, 4), "tokens": n}}
        for record, (total, n) in zip(records, scored, strict=True)
    ]
    if choices:
        extra, more = preference_score(loaded, choices, "hhh_helpful", HHH, args.batch_tokens)
        scores.append(extra)
        rows += more
    return engine.Result(scores, rows)


def export(args: EvaluateHelpfulnessArgs, subject: Subject) -> int:
    """Write alpaca_eval.json (and reference_model.json where references are known); returns the number of answers.

    New lines stay: words on either side would be glued together. The end marker goes.
    """
    import manifest
    from data.prompts import END_MARKER
    from evaluator import engine

    rows = engine.subset(engine.answers(args, "helpfulness", subject), args.num_samples, lambda row: row["prompt"])
    folder = args.results / "scores" / subject.sub
    asked = [f"{row['prompt']}\n\n{row['input']}" if row["input"] else row["prompt"] for row in rows]
    manifest.write_json(folder / "alpaca_eval.json", [
        {"instruction": text, "output": row["output"].split(END_MARKER)[0].strip(), "generator": subject.name}
        for text, row in zip(asked, rows, strict=True)
    ])
    references = [{"instruction": text, "output": row["reference"], "generator": "reference"}
                  for text, row in zip(asked, rows, strict=True) if row["reference"]]
    if references:
        manifest.write_json(folder / "reference_model.json", references)
    return len(rows)


if __name__ == "__main__":
    main()
