"""MC1, MC2, MC3 and HHH-honest: how a model ranks true and false answers. Needs the model, no generated answers.

    cd evaluator; python evaluate_truth_and_info.py --task_name cross_RUN

With --lite, true/false statement pairs stand in for MC1/MC2 and HHH is left out. With --judges truth=MODEL,info=MODEL the
answers of inference.py --task_name truthfulness are judged too: each rate, their product and their joint rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import config
import console
import runtime
from errors import UserError, exit_on_user_error
from flags import EvaluateTruthArgs
from models.footprint.planned import planned

if TYPE_CHECKING:
    from evaluator.scoring.engine import Result, Subject, Work
    from evaluator.scoring.judging import Named

MC1 = "TruthfulQA: share of questions whose best answer has a higher summed log-probability than every wrong one"
MC2 = "TruthfulQA: probability of the right answers, normalised over all given answers, mean over questions"
MC3 = "TruthfulQA: share of the right answers with a higher summed log-probability than every wrong one, mean over questions"
HHH = "HHH-honest: share of pairs whose preferred answer has the higher mean log-probability per token"
FACTUAL = "share of statement pairs whose true one has the higher mean log-probability per token (for MC1/MC2)"


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        parsed = config.parse(EvaluateTruthArgs, argv)
        args: EvaluateTruthArgs = parsed.args
        if planned(parsed, print):
            return
        console.set_up(parsed.verbosity)
        runtime.collect_rarely()
        runtime.short_waits()
        from evaluator.scoring import engine

        command = engine.command_of("evaluate_truth_and_info", (args.answers_task, "truthfulness"))
        console.finish(engine.evaluate(args, command, plan), [*args.table, *console.same(parsed, "output_dir")])


def plan(args: EvaluateTruthArgs, subject: Subject) -> Work:
    """What one subject's truth scores depend on and how they are made."""
    from data.sets.protocols import wrong_task
    from data.sources import load_choices
    from evaluator.scoring import engine, judging

    if wrong := wrong_task("answers_task", args.answers_task, "truthfulness"):
        raise UserError(*wrong)
    if args.answers:
        return judging.work_on_file(args, subject, args.answers_task)
    model = engine.model_hash(args, subject)
    # the other two come from bigbench, which --lite does without
    names = ("rho_factual",) if args.lite else ("truthfulqa_mc", "hhh_honest")
    sets = {name: engine.subset(load_choices(name), args.num_samples, lambda choice: choice.id + choice.prompt)
            for name in names}
    inputs = {"model": model, **{name: engine.content_hash(choices) for name, choices in sets.items()}}
    judges, answers = judging.make_judges(args), []
    if judges:
        # read for judges only: the likelihoods need no answers
        rows = judging.own_answers(args, args.answers_task, subject)
        answers = engine.subset(rows, args.num_samples, lambda row: row["prompt"])
        inputs["answers"] = engine.content_hash(answers)
    return judging.work(inputs, judges, lambda: score(args, subject, sets, judges, answers))


def score(args: EvaluateTruthArgs, subject: Subject, sets: dict[str, list], judges: Sequence[Named] = (),
          answers: Sequence[dict[str, Any]] = ()) -> Result:
    """Score whichever sets are given."""
    from evaluator.scoring import baselines, engine, judging
    from evaluator.scoring.preferences import outcomes, preference_score
    from evaluator.statistics import metrics

    # before the model is loaded: a local judge and the model need not be in memory together
    judged = judging.judge_answers(args, judges, args.answers_task, answers)
    loaded = engine.load(args, subject)
    scores, rows, without_model = [], [], {}
    if "truthfulqa_mc" in sets:
        ranked = outcomes(loaded, sets["truthfulqa_mc"], args.batch_tokens)
        # three readings of the same likelihoods: one pass over the answers serves all
        first = [metrics.mc1(o.logprobs, o.choice.labels, o.choice.best) for o in ranked]
        second = [metrics.mc2(o.logprobs, o.choice.labels) for o in ranked]
        third = [metrics.mc3(o.logprobs, o.choice.labels) for o in ranked]
        scores += [metrics.rate(first, "mc1", MC1, higher_is_better=True),
                   metrics.mean(second, "mc2", MC2, higher_is_better=True, seed=args.seed, bounds=(0, 1)),
                   metrics.mean(third, "mc3", MC3, higher_is_better=True, seed=args.seed, bounds=(0, 1))]
        without_model |= baselines.truthfulqa(sets["truthfulqa_mc"])
        rows += [o.row("truthfulqa_mc", {"mc1": a, "mc2": round(b, 6), "mc3": round(c, 6)})
                 for o, a, b, c in zip(ranked, first, second, third, strict=True)]
    for source, name, text in (("hhh_honest", "hhh_honest", HHH), ("rho_factual", "factual", FACTUAL)):
        if source in sets:
            extra, more = preference_score(loaded, sets[source], name, text, args.batch_tokens)
            scores.append(extra)
            rows += more
            without_model.setdefault("chance", {}).update(baselines.preference(sets[source], name)["chance"])
    if judges:
        scores += judged.scores + judging.truth_and_info(judges, judged, args.answers_task, args.seed)
        rows += judging.new_rows(args.answers_task, answers, judged)
    return engine.Result(scores, rows, {"baselines": without_model, **({"judged": judged.details} if judges else {})})


if __name__ == "__main__":
    main()
