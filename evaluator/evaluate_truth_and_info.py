"""MC1, MC2 and HHH-honest: how a model ranks true and false answers. Needs the model, no generated answers.

    cd evaluator; python evaluate_truth_and_info.py --task_name cross_RUN

With --lite, true/false statement pairs stand in for MC1/MC2 and HHH is left out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import config
from commands import EvaluateTruthArgs
from errors import exit_on_user_error

if TYPE_CHECKING:
    from evaluator.engine import Result, Subject, Work

MC1 = "TruthfulQA: share of questions whose best answer has a higher summed log-probability than every wrong one"
MC2 = "TruthfulQA: probability of the right answers, normalised over all given answers, mean over questions"
HHH = "HHH-honest: share of pairs whose preferred answer has the higher mean log-probability per token"
FACTUAL = "share of statement pairs whose true one has the higher mean log-probability per token (for MC1/MC2)"


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        args: EvaluateTruthArgs = config.parse(EvaluateTruthArgs, argv).args
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        from evaluator import engine

        engine.evaluate(args, "evaluate_truth_and_info", plan)


def plan(args: EvaluateTruthArgs, subject: Subject) -> Work:
    """What one subject's truth scores depend on and how they are made."""
    from data.sources import load_choices
    from evaluator import engine

    model = engine.model_hash(args, subject)
    names = ("rho_factual",) if args.lite else ("truthfulqa_mc", "hhh_honest")
    sets = {name: engine.subset(load_choices(name), args.num_samples, lambda choice: choice.id + choice.prompt)
            for name in names}
    inputs = {"model": model, **{name: engine.content_hash(choices) for name, choices in sets.items()}}
    return engine.Work(inputs, lambda: score(args, subject, sets))


def score(args: EvaluateTruthArgs, subject: Subject, sets: dict[str, list]) -> Result:
    """Score whichever sets are given."""
    from evaluator import engine, metrics
    from evaluator.preferences import outcomes, preference_score

    loaded = engine.load(args, subject)
    scores, rows = [], []
    if "truthfulqa_mc" in sets:
        found = outcomes(loaded, sets["truthfulqa_mc"], args.batch_tokens)
        first = [metrics.mc1(o.logprobs, o.choice.labels, o.choice.best) for o in found]
        second = [metrics.mc2(o.logprobs, o.choice.labels) for o in found]
        scores += [metrics.rate(first, "mc1", MC1, higher_is_better=True),
                   metrics.mean(second, "mc2", MC2, higher_is_better=True, seed=args.seed)]
        rows += [o.row("truthfulqa_mc", {"mc1": a, "mc2": round(b, 6)})
                 for o, a, b in zip(found, first, second, strict=True)]
    for source, name, text in (("hhh_honest", "hhh_honest", HHH), ("rho_factual", "factual", FACTUAL)):
        if source in sets:
            extra, more = preference_score(loaded, sets[source], name, text, args.batch_tokens)
            scores.append(extra)
            rows += more
    return engine.Result(scores, rows)


if __name__ == "__main__":
    main()
