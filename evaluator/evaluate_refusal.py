"""How well a model tells harmful prompts from harmless ones, by the likelihood that its answer begins with a refusal.

    cd evaluator; python evaluate_refusal.py --task_name raw,cross_mix,cross_raw_moe
    cd evaluator; python evaluate_refusal.py --task_name cross_RUN --harmful mine.csv --harmless harmless.csv
    cd evaluator; python evaluate_refusal.py --task_name cross_TRIAL --dataset_type validation

No answer is generated: every prompt counts, and no threshold of the model's own. The scores of the embedded prompts go to
evaluate_refusal.json, those of your files to evaluate_refusal.NAME.json, of the validation prompts, by which settings are
chosen, to evaluate_refusal.validation.json; the ROC curves of all models of the call to
results/scores/evaluate_refusal.png. Chat models whose answers begin with a block of reasoning are refused by name.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import config
import console
import manifest
import runtime
from errors import exit_on_user_error
from flags.refusal import EvaluateRefusalArgs
from models.footprint.planned import planned

if TYPE_CHECKING:
    from data.sets.refusal_openers import Openers
    from data.sets.refusal_prompts import Prompt
    from evaluator.scoring.engine import Result, Subject, Work


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        parsed = config.parse(EvaluateRefusalArgs, argv)
        args: EvaluateRefusalArgs = parsed.args
        if planned(parsed, print):
            return
        console.set_up(parsed.verbosity)
        runtime.collect_rarely()
        runtime.short_waits()
        from evaluator.scoring import engine

        command = ".".join(filter(None, ("evaluate_refusal", args.set_prefix[:-1])))
        paths = engine.evaluate(args, command, plan)
        if manifest.is_main():
            _tell_picture(args, command, paths)
        # reports show the embedded prompts' scores alone
        table = [*args.table, "--columns", "refusal_auc,refusal_at_10,pairs_ranked", *console.same(parsed, "output_dir")]
        console.finish(paths, [] if args.set_prefix else table)


def plan(args: EvaluateRefusalArgs, subject: Subject) -> Work:
    """What one subject's scores depend on and how they are made."""
    from data.sets import refusal_openers, refusal_prompts
    from evaluator.scoring import engine

    openers = refusal_openers.load(args.openers)
    prompts = subset(refusal_prompts.load(args.harmful, args.harmless, args.pairs, args.dataset_type), args.num_samples)
    inputs = {"model": engine.model_hash(args, subject), "openers": engine.content_hash(openers.groups.items()),
              "prompts": engine.content_hash((p.set, p.half, p.record) for p in prompts)}
    return engine.Work(inputs, lambda: score(args, subject, prompts, openers))


def subset(prompts: Sequence[Prompt], n: int) -> list[Prompt]:
    """n prompts of every set, drawn by hash; the two of a pair by the harmless one's, so that pairs stay whole."""
    from evaluator.scoring import engine

    asked = {p.record.id: p.record.question for p in prompts if p.set == "counterpart"}
    return [p for name in dict.fromkeys(p.set for p in prompts)
            for p in engine.subset([p for p in prompts if p.set == name], n, lambda p: asked[p.record.id]
                                   if p.set in ("matched", "counterpart") else p.record.question)]


def score(args: EvaluateRefusalArgs, subject: Subject, prompts: Sequence[Prompt], openers: Openers) -> Result:
    """Score every prompt once, a text that stands in several sets too."""
    from data.encode import render
    from evaluator.scoring import engine
    from evaluator.scoring.refusals import endpoints
    from evaluator.scoring.refusals.likelihood import opener_logprobs

    loaded = engine.load(args, subject)
    texts = [render(loaded.template, p.record) for p in prompts]
    # plain prompts stand again in pairs
    each = list(dict.fromkeys(texts))
    table = opener_logprobs(loaded, each, openers.texts, args.batch_tokens)
    place = {text: i for i, text in enumerate(each)}
    lines = endpoints.rows(prompts, table[[place[text] for text in texts]], openers, args.set_prefix)
    scores, details = endpoints.scores(lines, args.set_prefix, args.seed)
    details["openers"] = list(openers.texts)
    baselines = {"length": endpoints.by_length(prompts, args.set_prefix, args.seed)}
    details["sensitivity"] = endpoints.sensitivity(lines, args.set_prefix, openers)
    return engine.Result(scores, lines, {"refusal_likelihood": details, "baselines": baselines})


def _tell_picture(args: EvaluateRefusalArgs, command: str, paths: Sequence[Path]) -> None:
    log, picture = logging.getLogger(__name__), picture_of(args, command)
    try:
        log.info("ROC curves: %s", draw(args, command, paths))
    except OSError as error:
        # scores that are all there are read in a folder that cannot be written, too
        if error.errno not in (errno.EROFS, errno.EACCES) or not picture.is_file():
            raise
        log.info("ROC curves: %s is left as it is (%s)", picture, error.strerror)


def picture_of(args: EvaluateRefusalArgs, command: str) -> Path:
    return args.results / "scores" / f"{command}.png"


def draw(args: EvaluateRefusalArgs, command: str, paths: Sequence[Path]) -> Path:
    """The ROC curves of these score files in one picture."""
    from data.sets.refusal_prompts import HARMLESS
    from evaluator.reporting.figures import roc_curves
    from evaluator.scoring import engine
    from evaluator.statistics.discrimination import roc

    wanted, curves = {f"{args.set_prefix}refusal_{name}" for name in HARMLESS}, {}
    for subject, path in zip(engine.subjects(args), paths, strict=True):
        with path.with_suffix(".rows.jsonl").open(encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        harmful, harmless = ([line["values"]["score"] for line in lines if line["set"] in names]
                             for names in ({f"{args.set_prefix}refusal_harmful"}, wanted))
        area = json.loads(path.read_text(encoding="utf-8"))["scores"][f"{args.set_prefix}refusal_auc"]["value"]
        curves[f"{subject.name} ({area:.3f})"] = roc(harmful, harmless)
    sets = f", {args.set_prefix[:-1]}" if args.set_prefix else ""
    title = f"Refusal by likelihood{sets} (area under the curve)"
    return roc_curves(curves, picture_of(args, command), title)


if __name__ == "__main__":
    main()
