"""From flags to encoded training and validation rows, everything counted and printed before a model is loaded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import manifest
from data import sources
from data.collate import mix
from data.encode import encode
from data.prompt_styles import style
from data.prompts import template
from data.readers.dialog_files import read_dialogs
from data.records import OBJECTIVES, SAFETY, Record
from data.sets import contrasts, reattack
from errors import UserError
from flags import AlignArgs, ExpertArgs, FusedMoeArgs, SearchArgs
from models.base.positions import check_rows
from training.validation import divide

log = logging.getLogger(__name__)
#: Validation rows per objective that are scored at the end of a run.
VALIDATION_ROWS = 32


def source_of(args: Any) -> Any:
    """What ``data.sources`` takes: ``--data_source``, or {task: file or hub name} from ``--data_path``."""
    if not args.data_path:
        return args.data_source
    if args.task_name != "mix":
        return {args.task_name: args.data_path}
    pairs = [part.partition("=") for part in args.data_path.split(",")]
    wrong = [key for key, equals, value in pairs if key not in OBJECTIVES or not equals or not value]
    if wrong:
        raise UserError(f"--data_path {args.data_path}: for --task_name mix give helpfulness=FILE,safety=FILE,"
                        f"truthfulness=FILE; not understood: {', '.join(wrong)}; one file of rows of any kind is trained on "
                        "with --task_name dialogs")
    return {key: value for key, _, value in pairs}


def with_extra(records: list[Record], args: ExpertArgs | SearchArgs) -> list[Record]:
    """The records and those of --extra_data, where it is given: all of them, or as many as make up --extra_share of the
    whole, --extra_min_rows at least.

    Raises:
        UserError: the file has problems, or fewer rows than the share asks for.
    """
    if not args.extra_data:
        return records
    extra = reattack.records("train") if args.extra_data == reattack.NAME else read_dialogs(
        Path(args.extra_data).expanduser(), "train", OBJECTIVES.index("safety"))
    if args.extra_share is not None:
        # e / (n + e) = share, solved for e; at least one row, or the flag would do nothing
        needed = max(args.extra_min_rows, round(len(records) * args.extra_share / (1 - args.extra_share)))
        if needed > len(extra):
            raise UserError(f"--extra_share {args.extra_share}: {len(records)} rows need {needed} from {args.extra_data}, "
                            f"which has {len(extra)}; lower the share or --max_train_samples, or make a larger set")
        extra = mix(extra, needed, "proportional", args.seed)
    log.info("extra data: %d of %d rows (%.1f %%) from %s", len(extra), len(records) + len(extra),
             100 * len(extra) / (len(records) + len(extra)), args.extra_data)
    return [*records, *extra]


def with_contrasts(records: list[Record], args: ExpertArgs | SearchArgs | FusedMoeArgs) -> list[Record]:
    """The records, with safety rows in which --contrast_share are contrasts and --answer_share answers to plain requests.

    Raises:
        UserError: there are fewer of either than the shares ask for.
    """
    if not (args.contrast_share or args.answer_share):
        return records
    answers: list[Record] = []
    if args.answer_share:
        helpful = sources.load_records("helpfulness", "train")
        # the same draw as the helpful expert's of this seed: two experts that learn the same rows are harder to tell apart
        drawn = {row.id for row in mix(helpful, args.max_train_samples, "proportional", args.seed)}
        answers = [row for row in helpful if row.id not in drawn]
    mixed = contrasts.mixed_in(records, args.contrast_share, args.answer_share, args.safety_limit, args.seed, answers)
    ids, plain = [row.id for row in mixed if row.objective == SAFETY], {row.id for row in answers}
    log.info("safety rows: %d, %d of them contrasts, %d answers to plain requests", len(ids),
             sum(id.startswith(contrasts.PREFIX) for id in ids), sum(id in plain for id in ids))
    return mixed


def limits_of(args: ExpertArgs | SearchArgs | FusedMoeArgs) -> dict[int, int]:
    """The objectives whose rows --max_train_samples does not count."""
    return {} if args.max_safety_samples is None else {SAFETY: args.max_safety_samples}


def contrast_inputs(share: float) -> dict[str, str]:
    """The manifest's entry for the contrasts that a run trained on, where it has a share of them."""
    return {"contrasts": manifest.sha256(contrasts.FILE)} if share else {}


def training_rows(args: ExpertArgs | SearchArgs | FusedMoeArgs, tokenizer: Any, base: Path,
                  ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Encoded rows to train on and to validate on: of own data what ``divide`` gives, else the embedded sets' own.

    Args:
        base: folder of the model that is to read them.

    Raises:
        UserError: data or flags have problems; rows are longer than the base can read.
    """
    def read(given: AlignArgs) -> list[Record]:
        return sources.load_records(args.task_name, "train", source=source_of(given), split_mode=args.split_mode)

    source = source_of(args)
    records, held_out = divide(args, read(args), read)
    records = mix(with_contrasts(records, args), args.max_train_samples, args.mixing, args.seed, limits_of(args))
    framed = style("none")
    if not isinstance(args, FusedMoeArgs):  # which has none of these flags
        records = with_extra(records, args)
        framed = style(args.prompt_style or "none", args.prompt_style_file)
    records = [framed.apply(record) for record in records]
    form = template(args.template, tokenizer)
    train = encode(records, tokenizer, form, args.model_max_length, args.train_on_turns)
    log.info("training data: %s", train.report(args.model_max_length))
    check_rows(base, [len(row["input_ids"]) for row in train.rows], args.model_max_length)
    counts = {name: sum(r["objective"] == i for r in train.rows) for i, name in enumerate(OBJECTIVES)}
    if len(told := [f"{name} {count}" for name, count in counts.items() if count]) > 1:
        log.info("rows by objective: %s", ", ".join(told))
    if not held_out and source != "embedded":
        return train.rows, []
    # drawn like the training rows, so that every seed has its own validation rows too
    if not held_out:
        held_out = mix(sources.load_records(args.task_name, "validation"), VALIDATION_ROWS, "proportional", args.seed)
    return train.rows, encode([framed.apply(record) for record in held_out], tokenizer, form, args.model_max_length).rows
