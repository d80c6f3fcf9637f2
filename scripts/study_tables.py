"""Write the tables of README and of the studies out of docs/data: a page names rows and columns, the report has the numbers.

    python scripts/study_tables.py            # writes what changed and says which pages
    python scripts/study_tables.py --check    # writes nothing; exit code 1 where a page is old

What it makes stands between two lines of a page, `<!-- made from FILE: KIND; rows=..; columns=.. -->` and `<!-- end -->`:
FILE is a report of docs/data (`report.py --format json`) and KIND one of

    models       a row for each model: value and interval, rows without a model below; rows=labels, columns=scores,
                 without=labels of rows without a model, or none (all)
    seeds        a row for each model and seed
    differences  differences of the report; columns=scores
    declared     declared comparisons of a group: group=its title, else=what stands for "no difference"; of a durability
                 report the score is its group
    costs        what the rows cost; columns=seconds,all_seconds,memory_mb,stored,active,tokens_per_second
    findings     the report's own sentences that begin with one of starts=A|B (all)
    lines        answers of equal_utility.py ({"answers": [..]}, each with a title): a row for each
    attacks      a table of attack_table.py
    section      tables and bullets of a sweep's report (scripts/sweep.py) under the heading title=.. (rows: the first
                 table); rows=labels (all)
    sentences    those under name=.. of docs/data/sentences.yaml; their numbers are looked up, nobody types one

Numbers in them: {cell|SCORE|ROW}, {span|SCORE|ROW} with its interval, {diff|SCORE|ROW|OTHER} and {p|GROUP|SCORE|ROW|OTHER}
of a declared comparison (p corrected), {cost|COLUMN|ROW}; {cell@FILE|..} is of another report.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from config import ROOT
from errors import UserError, exit_on_user_error
from evaluator.reporting import costs
from evaluator.reporting.formats import interval, markdown_lines, number, p_text

DATA = ROOT / "docs" / "data"
_NUMBER = re.compile(r"\{(\w+(?:@\w+)?\|[^{}]+)\}")
_BLOCK = re.compile(r"(<!-- made from (\S+): (\w+)((?:; \w+=[^;\n]+)*) -->\n)(.*?)(<!-- end -->)", re.S)
Report = Mapping[str, Any]
Asked = Mapping[str, str]


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is old")
        check = parser.parse_args(argv).check
        made = {path: filled(path) for path in pages()}
        old = [path for path, text in made.items() if path.read_text(encoding="utf-8") != text]
        names = [path.relative_to(ROOT).as_posix() for path in old]
        if check and old:
            raise UserError(*(f"{name}: is old; run python scripts/study_tables.py" for name in names))
        for path in old:
            path.write_text(made[path], encoding="utf-8")
        print("\n".join(names) or "all tables are those of docs/data")


def pages() -> list[Path]:
    """README and every page of docs that has such a block."""
    return [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
            if "<!-- made from " in path.read_text(encoding="utf-8")]


def filled(path: Path) -> str:
    """A page with its blocks made anew.

    Raises:
        UserError: a block names a file, a kind, a row or a column that is not there.
    """
    def block(found: re.Match[str]) -> str:
        head, file, kind, words, _, end = found.groups()
        asked = {"file": file} | dict(word.split("=", 1) for word in words.split("; ")[1:])
        where = f"{path.relative_to(ROOT)}: {head.strip()}"
        if kind not in _KINDS or not (DATA / f"{file}.json").is_file():
            files = ", ".join(sorted(data.stem for data in DATA.glob("*.json")))
            raise UserError(f"{where}: allowed files: {files}; allowed kinds: {', '.join(_KINDS)}")
        try:
            lines = _KINDS[kind](_report(file), asked)
        except KeyError as error:
            raise UserError(f"{where}: {error.args[0]} is not in {file}.json") from None
        return head + "\n".join(lines) + "\n" + end

    return _BLOCK.sub(block, path.read_text(encoding="utf-8"))


def _report(file: str) -> Report:
    if not (path := DATA / f"{file}.json").is_file():
        raise KeyError(path.name)
    return _parsed(path)


@functools.cache
def _parsed(path: Path) -> Report:
    read: Report = json.loads(path.read_text(encoding="utf-8"))
    return read


def _picked(report: Report, asked: Asked) -> tuple[list[Any], list[str]]:
    """The rows and the columns' names that are asked for, in the order of the words; all without words."""
    rows = {row["label"]: row for row in report["rows"]}
    names = {column["name"]: None for column in report["columns"]}
    return ([rows[label] for label in _words(asked, "rows") or rows],
            [name for name in _words(asked, "columns") or names if names[name] is None])


def _words(asked: Asked, name: str) -> list[str]:
    return [word.strip() for word in asked[name].split(",")] if name in asked else []


def _titles(report: Report, names: Sequence[str]) -> list[str]:
    titles = {column["name"]: column["title"] for column in report["columns"]}
    return [titles[name] for name in names]


def _text(report: Report, row: Mapping[str, Any], name: str) -> str:
    """A cell; of a half-life with one digit, and "> 80" where the attack was too short."""
    if name != "half_life" or (half := report["half_life"][row["label"]]) is None:
        return _cell(row["cells"].get(name))
    value, low, high = (f"> {report['steps'][-1]}" if end in half["beyond"] else f"{half[end]:.1f}"
                        for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _cell(cell: Mapping[str, Any] | None, signed: bool = False) -> str:
    if cell is None:
        return ""
    low, high = (float("nan") if cell[end] is None else cell[end] for end in ("low", "high"))
    return number(cell["value"], signed) + interval(low, high)


def _models(report: Report, asked: Asked) -> list[str]:
    rows, names = _picked(report, asked)
    lines = [[row["label"], *(_text(report, row, name) for name in names)] for row in rows]
    others = report.get("without_model", {})
    without = [[f"({label})", *(number(others[label].get(name)) for name in names)]
               for label in _words(asked, "without") or others if label != "none"]
    return markdown_lines(["model", *_titles(report, names)], lines + [line for line in without if any(line[1:])])


def _seeds(report: Report, asked: Asked) -> list[str]:
    rows, names = _picked(report, asked)
    lines = [[row["label"], seed, *(number(row["cells"][name]["per_seed"][at]) if name in row["cells"] else ""
                                    for name in names)]
             for row in rows for at, seed in enumerate(row["seeds"])]
    return markdown_lines(["model", "seed", *_titles(report, names)], lines)


def _differences(report: Report, asked: Asked) -> list[str]:
    rows, names = _picked(report, asked)
    found = {(item["row"], item["against"], item["column"]): item for item in report["differences"]}
    wanted = {row["label"] for row in rows}
    pairs = dict.fromkeys(key[:2] for key in found if key[0] in wanted and key[1] in wanted)
    lines = [[row, other, *(f"{_cell(d, True)} {d['verdict']}" if (d := found.get((row, other, name))) else ""
                            for name in names)] for row, other in pairs]
    return markdown_lines(["row", "against", *_titles(report, names)], lines)


def _declared(report: Report, asked: Asked) -> list[str]:
    wanted = [item for item in _comparisons(report) if item["group"] == asked["group"]]
    if not wanted:
        raise KeyError(asked["group"])
    lines = [[item["row"], item["against"], item["column"], _cell(item, True), p_text(_known(item["p"])),
              p_text(_known(item["p_holm"])), asked.get("else", item["verdict"]) if item["verdict"] == "no difference" else
              item["verdict"]] for item in wanted]
    return markdown_lines(["row", "against", "score", "difference", "p", "p corrected", "verdict"], lines)


def _comparisons(report: Report) -> list[Mapping[str, Any]]:
    """Comparisons, undeclared ones in the group ""; of a durability report those of what rows keep, by their corrected p."""
    if "half_life" not in report:
        return [{"group": "", "score": item["column"]} | item for item in report["findings"]["comparisons"]]
    titles = {column["name"]: column["title"] for column in report["columns"]}
    return [{"group": score, "score": score, "row": label, "against": report["against"], "column": titles[score],
             "verdict": _verdict(item["value"], _known(item["p_holm"]))} | item
            for score, rows in report["differences"].items() for label, item in rows.items()]


def _verdict(value: float, p: float) -> str:
    # an unknown p is no small one
    return ("better" if value > 0 else "worse") if p < 0.05 else "no difference"


def _known(p: float | None) -> float:
    return float("nan") if p is None else p


def _costs(report: Report, asked: Asked) -> list[str]:
    rows, _ = _picked(report, {name: asked[name] for name in asked if name == "rows"})
    names = _words(asked, "columns") or list(costs.COLUMNS)
    lines = [[row["label"], *(costs.text(report["costs"][row["label"]][name], name) for name in names)] for row in rows]
    return markdown_lines(["model", *(costs.COLUMNS[name][0] for name in names)], lines)


def _findings(report: Report, asked: Asked) -> list[str]:
    starts = tuple(f"- {start.strip()}" for start in asked.get("starts", "").split("|"))
    lines = [line for line in report["findings"]["sentences"] if line.startswith(starts)]
    if not lines:
        raise KeyError(asked.get("starts", "findings"))
    return lines


def _lines(report: Report, asked: Asked) -> list[str]:
    rows = []
    for answer in report["answers"]:
        met = answer["difference"] is not None
        other = f"the line's {answer['line_safety']:.3f}" if met else f"the nearest end's {answer['end']:.3f}"
        difference = _cell(answer | {"value": answer["difference"]}, True) if met else ""
        seeds = interval(answer["seed_low"], answer["seed_high"]).strip() if answer["seed_low"] is not None else ""
        where = "" if answer["equal"] else " (not equal)"
        rows.append([answer["title"], f"{answer['skill']} {answer['utility']:.3f}{where}", answer["safety_is"],
                     f"{answer['safety']:.3f}, {other}", difference, seeds, answer["verdict"]])
    return markdown_lines(["against", "NLL", "safety", "both", "difference, over prompts", "over seeds", "verdict"], rows)


def _attacks(report: Report, asked: Asked) -> list[str]:
    titles = {"as_asked": "{}'s prompts as asked ↑", "attacked": "{} ↑", "change": "{}: change"}
    heads = [title.format(attack) for attack in report["attacks"] for title in titles.values()]
    lines = [[row["label"], str(next(iter(row["cells"].values()))["as_asked"]["n"]),
              *(_cell(row["cells"][attack][kind], kind == "change") for attack in report["attacks"] for kind in titles)]
             for row in report["rows"]]
    return markdown_lines(["model", "prompts", *heads], lines)


def _section(report: Report, asked: Asked) -> list[str]:
    from evaluator.reporting.sweeps.report import markdown

    lines = markdown(report, "rows")
    heads = [*(at for at, line in enumerate(lines) if line.startswith("#")), len(lines)]
    parts = {lines[at].lstrip("# "): lines[at + 1:end] for at, end in itertools.pairwise(heads)}
    found = [line for line in parts[asked["title"]] if line.startswith(("|", "- "))]
    if not (wanted := _words(asked, "rows")):
        return found
    by_label = {line.split(" | ")[0].removeprefix("| "): line for line in found}
    return [*found[:2], *(by_label[label] for label in wanted)]


def _sentences(_: Report, asked: Asked) -> list[str]:
    sentences = yaml.safe_load((DATA / "sentences.yaml").read_text(encoding="utf-8"))
    return [_NUMBER.sub(lambda found: _looked_up(found.group(1), asked["file"]), sentence)
            for sentence in sentences[asked["name"]]]


def _looked_up(words: str, file: str) -> str:
    """The text of one number of a sentence."""
    kind, *names = words.split("|")
    kind, _, other = kind.partition("@")
    report = _report(other or file)
    if kind in ("cell", "span"):
        score, label = names
        row = next((row for row in report["rows"] if row["label"] == label and score in row["cells"]), None)
        if row is None:
            raise KeyError(words)
        return _short(_text(report, row, score).split(" [")[0] if kind == "cell" else _text(report, row, score))
    if kind == "cost":
        column, label = names
        return costs.text(report["costs"][label][column], column)
    group, (score, label, against) = (names[0], names[1:]) if kind == "p" else (None, names)
    for item in _comparisons(report):
        if group in (None, item["group"]) and (item["score"], item["row"], item["against"]) == (score, label, against):
            return _short(p_text(_known(item["p_holm"])) if kind == "p" else _cell(item, True))
    raise KeyError(words)


def _short(text: str) -> str:
    """Without the zero before the point, as the text writes numbers below one."""
    return re.sub(r"\b0\.", ".", text)


_KINDS: dict[str, Callable[[Report, Asked], list[str]]] = {
    "models": _models, "seeds": _seeds, "differences": _differences, "declared": _declared, "costs": _costs,
    "findings": _findings, "lines": _lines, "attacks": _attacks, "section": _section, "sentences": _sentences}

if __name__ == "__main__":
    main()
