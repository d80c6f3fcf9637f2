"""A paper's tables as arms, endpoints and cells: workflow/papers/PAPER.yaml, for one of its tracks.

A track is one way to run the paper: in miniature on the embedded base, or as published on a preset of its own. The file has
arms in the format of workflow/arms.yaml and, beside them:

    arms:    each: {task: [..]} makes one arm of every value ({task} in its name and lines; a value may be a mapping of
             several names); track: [..] names the tracks that have it, else all; data: [..] files of the user's that it
             reads, {file_NAME} in its line; any value may be given by track: {TRACK: .., else: ..}.
    tables:  rows and columns, each with what decides a cell: arm, measure, category; {name} in these is a value of the row
             or the column. why: such cells are empty because. Rows that only the published table has are empty too; ours:
             true marks a row that it does not have.
    tracks:  preset, words, endpoints (their after may name "base.ENDPOINT", the base's own), measures (endpoint, score,
             title, scale, offset), absent {arm or value: why}, files, hub (what it fetches, a line each).
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from config import ROOT
from errors import UserError, nearest
from flags.judge_flags import is_loopback
from workflow import plan

FOLDER = ROOT / "workflow" / "papers"
_TOP = {"paper", "experts", "arms", "tables", "tracks"}
_TRACK = {"preset", "says", "words", "endpoints", "measures", "absent", "files", "costs", "miniature", "hub"}
_TABLE = {"title", "keys", "rows", "columns", "why", "says"}
_MEASURE = {"endpoint", "score", "title", "higher", "scale", "offset", "why"}
_OWN_ARM, _OWN_ENDPOINT = ("each", "track", "data"), ("data", "env")


@dataclass(frozen=True)
class Measure:
    """What stands in a cell: a score of an endpoint, times ``scale`` plus ``offset``.

    Args:
        title: as people read it.
        why: it cannot be measured here, because; then the rest is empty.
    """

    name: str
    endpoint: str = ""
    score: str = ""
    title: str = ""
    higher: bool = True
    scale: float = 1.0
    offset: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Cell:
    """An arm and what is measured of it, or why there is nothing; ``category``: of the prompts of this category alone."""

    arm: str = ""
    measure: Measure | None = None
    category: str = ""
    why: str = ""


@dataclass(frozen=True)
class PaperTable:
    """One table: its rows by their keys, a cell for each of its columns."""

    name: str
    title: str
    keys: tuple[str, ...]
    columns: tuple[str, ...]
    rows: Mapping[tuple[str, ...], Mapping[str, Cell]]
    says: str = ""


@dataclass(frozen=True)
class Track:
    """One way to run a paper.

    Args:
        says: what a reader of the table must know of it.
        miniature: whether it only shows that everything runs, on small data.
        table: arms and endpoints, as the graph takes them.
        absent: arm or endpoint -> why it is not made.
        lacking: place of a file of the user's that is not there -> what is said of it.
        keys: endpoint -> environment variable that its judge needs and that is not set.
        hub: what it fetches from the Hugging Face hub, with sizes and terms, a line each.
    """

    name: str
    preset: str
    says: str
    miniature: bool
    table: plan.Table
    tables: Mapping[str, PaperTable]
    absent: Mapping[str, str] = field(default_factory=dict)
    lacking: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    hub: Sequence[str] = ()

    def scored(self, names: Sequence[str]) -> dict[str, set[str]]:
        """Arm -> its endpoints that cells of these tables need, with what those read."""
        found: dict[str, set[str]] = {}
        wanted = [(cell.arm, cell.measure.endpoint) for cell in self.cells(names)]
        first: list[str] = []
        # the list grows while it is read
        for arm, endpoint in wanted:
            found.setdefault(arm, set()).add(endpoint)
            wanted += (more := [plan.whose_endpoint(other, arm) for other in self.table.endpoints[endpoint].after])
            first += [whose for whose, _ in more if whose != arm]
        # steps are planned in this order, and what others are judged against comes before them
        return {name: found[name] for name in dict.fromkeys((*first, *found))}

    def cells(self, names: Sequence[str]) -> list[Cell]:
        """The cells of these tables that can be made."""
        return [cell for name in names for row in self.tables[name].rows.values() for cell in row.values()
                if cell.measure and not cell.why]


def papers() -> tuple[str, ...]:
    """The papers that have a file."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def tracks(paper: str, folder: Path = FOLDER) -> dict[str, str]:
    """A paper's tracks -> the preset of each, the first one in miniature."""
    return {name: body["preset"] for name, body in _content(paper, folder)["tracks"].items()}


def read(paper: str, track: str, given: Mapping[str, str] | None = None, *, all_files: bool = False,
         judge: tuple[str, str] = ("", ""), folder: Path = FOLDER) -> Track:
    """A paper's tables for one of its tracks.

    Args:
        given: name -> place of files of the user's.
        judge: (model, address) that API judges ask in place of the paper's; empty: the paper's, OpenAI's. alpaca_eval has
            its own.
        all_files: plan as if every file and key were there; without it what needs a missing one is absent.

    Raises:
        UserError: everything that is wrong with the file.
    """
    content, problems = _content(paper, folder), []
    where, body = f"{paper}.yaml", content["tracks"][track]
    problems += _unknown(where, content, _TOP) + _unknown(f"{where}: {track}", body, _TRACK)
    absent = dict(body.get("absent") or {})
    files = {name: (given or {}).get(name, str(known["place"])) for name, known in (body.get("files") or {}).items()}
    problems += [f"--files {name}: no file of this track{nearest(name, files)}; its files: {', '.join(files) or 'none'}"
                 for name in given or {} if name not in files]
    lost = {name: f"needs a file of yours: --files {name}=FILE ({body['files'][name]['what']})"
            for name, place in files.items() if not Path(place).expanduser().exists()}
    # planned with a place that is given, it would fail hours later
    problems += [f"--files {name}={files[name]}: no such file; give {body['files'][name]['what']}"
                 for name in given or {} if name in lost]
    lacking = {files[name]: why for name, why in lost.items()}
    lost = {} if all_files else lost
    arms = _arms(content["arms"], track, absent, lost, content.get("experts") or [])
    declared = {name: _asking(one, judge) for name, one in (body.get("endpoints") or {}).items()}
    keys = {name: key for name, one in declared.items() if (key := one.get("env")) and not os.environ.get(key, "").strip()}
    endpoints = _endpoints(declared, absent, lost, {} if all_files else keys)
    places = {f"file_{name}": shlex.quote(place) for name, place in files.items()}
    words = {**{name: _filled(text, places) for name, text in (body.get("words") or {}).items()}, **places}
    costs = {**yaml.safe_load((ROOT / "workflow" / "arms.yaml").read_text(encoding="utf-8"))["costs"],
             **(body.get("costs") or {})}
    try:
        graph = plan.checked({"experts": content.get("experts") or [], "arms": arms, "endpoints": endpoints, "words": words,
                              "costs": costs}, where)
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    measures = {}
    for name, one in (body.get("measures") or {}).items():
        problems += _unknown(f"{where}: {track}: measure {name}", one, _MEASURE)
        measures[name] = Measure(name, **{key: value for key, value in one.items() if key in _MEASURE})
        if not measures[name].why and measures[name].endpoint not in {*endpoints, *absent}:
            problems.append(f"{where}: {track}: measure {name}: no endpoint {measures[name].endpoint}")
    reader = _Cells(where, track, set(arms), measures, absent, problems)
    known = _published(paper)
    tables = {name: reader.table(name, one or {}, known.get(name)) for name, one in content["tables"].items()}
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return Track(track, body["preset"], body.get("says", ""), bool(body.get("miniature")), graph, tables,
                 {**absent, **lost}, lacking, keys, tuple(body.get("hub") or ()))


def _content(paper: str, folder: Path) -> dict[str, Any]:
    path = folder / f"{paper}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = papers()
        raise UserError(f"--paper {paper}: no such paper{nearest(paper, known)}; allowed: {', '.join(known)}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML ({type(error).__name__})") from None
    if not isinstance(content, dict) or any(not isinstance(content.get(key), dict) for key in ("arms", "tables", "tracks")):
        raise UserError(f"{path}: needs arms, tables and tracks")
    return content


def _published(paper: str) -> Mapping[str, Any]:
    """The paper's published tables by name."""
    from evaluator.reporting.published_numbers import published

    return published(paper).tables


def _unknown(where: str, body: Mapping[str, Any], allowed: set[str]) -> list[str]:
    return [f"{where}: {key}: unknown{nearest(key, allowed)}; allowed: {', '.join(sorted(allowed))}"
            for key in body if key not in allowed]


def _asking(endpoint: Mapping[str, Any], judge: tuple[str, str]) -> Mapping[str, Any]:
    """An endpoint whose API judge asks this model at this address; one on this machine needs no key."""
    if not endpoint.get("env") or "evaluate_safety.py" not in endpoint["run"]:
        return endpoint
    words = [f"{flag} {shlex.quote(value)}" for flag, value in zip(("--judge_model", "--judge_base_url"), judge, strict=True)
             if value]
    changed = {**endpoint, "run": " ".join((endpoint["run"], *words))}
    return {key: value for key, value in changed.items() if key != "env"} if judge[1] and is_loopback(judge[1]) else changed


def _arms(declared: Mapping[str, Any], track: str, absent: dict[str, str], lost: Mapping[str, str], experts: Sequence[str]
          ) -> dict[str, Any]:
    """The track's arms, one for each value of ``each``; those that cannot be made go to ``absent``."""
    arms: dict[str, Any] = {}
    whys: dict[str, list[str]] = {}
    for name, body in declared.items():
        if track not in body.get("track", [track]):
            continue
        for here in _combined(body.get("each") or {}):
            own = _filled(name, here)
            whys[own] = [absent[word] for word in (own, *here.values()) if word in absent]
            whys[own] += [lost[file] for file in body.get("data", ()) if file in lost]
            arms[own] = {key: _filled(_of_track(value, track), here) for key, value in body.items() if key not in _OWN_ARM}
    for body in arms.values():
        if body.get("needs") == "experts":
            body["needs"] = list(experts)
        if isinstance(body.get("needs"), list):
            # an arm of another track is no need of this one
            body["needs"] = [other for other in body["needs"] if other in arms or not _elsewhere(other, declared)]
    # what is made of something that is not there is not there either, however far down
    grown = True
    while grown:
        grown = False
        for name, body in arms.items():
            for other in body.get("needs") if isinstance(body.get("needs"), list) else ():
                more = [why for why in whys.get(other, ()) if why not in whys[name]]
                whys[name] += more
                grown |= bool(more)
    absent.update({name: "; ".join(dict.fromkeys(found)) for name, found in whys.items() if found})
    return {name: body for name, body in arms.items() if name not in absent}


def _combined(each: Mapping[str, Sequence[Any]]) -> list[dict[str, str]]:
    """Every combination of the values, as text by name."""
    found = []
    for values in itertools.product(*each.values()):
        here: dict[str, str] = {}
        for name, value in zip(each, values, strict=True):
            here |= {key: str(text) for key, text in (value if isinstance(value, Mapping) else {name: value}).items()}
        # a value may hold another one's name
        found.append({name: _filled(value, here) for name, value in here.items()})
    return found


def _of_track(value: Any, track: str) -> Any:
    """A value that may be given by track."""
    return value.get(track, value.get("else")) if isinstance(value, Mapping) else value


def _elsewhere(name: str, declared: Mapping[str, Any]) -> bool:
    return name in declared and "track" in declared[name]


def _filled(value: Any, values: Mapping[str, str]) -> Any:
    """Text with {name} replaced; other braces are the command line's own."""
    if isinstance(value, list):
        return [_filled(one, values) for one in value]
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), value) if isinstance(value, str) else value


def _endpoints(declared: Mapping[str, Any], absent: dict[str, str], lost: Mapping[str, str], keys: Mapping[str, str]
               ) -> dict[str, Any]:
    for name, body in declared.items():
        whys = [lost[file] for file in body.get("data", ()) if file in lost]
        if name in keys:
            whys.append(f"its judge needs a key: export {keys[name]}")
        whys += [absent[other] for other in body.get("after", ()) if other in absent]
        if whys and name not in absent:
            absent[name] = "; ".join(dict.fromkeys(whys))
    return {name: {"rows": "all", **{key: value for key, value in body.items() if key not in _OWN_ENDPOINT}}
            for name, body in declared.items() if name not in absent}


@dataclass(frozen=True)
class _Cells:
    """Makes tables out of rows and columns."""

    where: str
    track: str
    arms: set[str]
    measures: Mapping[str, Measure]
    absent: Mapping[str, str]
    problems: list[str]

    def table(self, name: str, body: Mapping[str, Any], published: Any) -> PaperTable:
        """One table; ``published``: the paper's own, whose rows and columns it then has."""
        self.problems.extend(_unknown(f"{self.where}: table {name}", body, _TABLE))
        keys = published.keys if published else tuple(body.get("keys") or ("row",))
        columns = {**dict.fromkeys(published.columns if published else ()), **(body.get("columns") or {})}
        rows = {}
        for row in body.get("rows") or ():
            key = tuple(map(str, row["key"]))
            if published and key not in published.rows and not row.get("ours"):
                self.problems.append(f"{self.where}: table {name}: row {' / '.join(key)}: not in the published table")
            rows[key] = row
        order = [*(published.rows if published else ()), *rows]
        why = self._mine(body.get("why")) or "not made here"
        cells = {key: {column: self.cell(name, rows.get(key), columns[column], why) for column in columns}
                 for key in dict.fromkeys(order)}
        title = body.get("title") or (published.title if published else name)
        return PaperTable(name, title, keys, tuple(columns), cells, self._mine(body.get("says")) or "")

    def cell(self, table: str, row: Mapping[str, Any] | None, column: Mapping[str, Any] | None, why: str) -> Cell:
        """A cell by its row and its column; None: the file does not have it."""
        if row is None or column is None:
            return Cell(why=why)
        if self.track not in row.get("track", [self.track]):
            return Cell(why=f"of another track: --track {row['track'][0]}")
        both = {**column, **row}
        if why := self._mine(both.get("why")):
            return Cell(why=why)
        values = {key: str(value) for key, value in both.items() if isinstance(value, str | int | float)}
        # a value may itself name another: arm "mask_{task}", task from the column
        arm, measure, category = (_filled(self._mine(both.get(key)) or "", values) for key in ("arm", "measure", "category"))
        for word in (arm, measure, *values.values()):
            if word in self.absent:
                return Cell(why=self.absent[word])
        if arm not in self.arms or measure not in self.measures:
            self.problems.append(f"{self.where}: table {table}: a cell of {self.track}: no arm '{arm}' or no measure "
                                 f"'{measure}'")
            return Cell()
        found = self.measures[measure]
        if found.why or found.endpoint in self.absent:
            return Cell(arm, found, category, found.why or self.absent[found.endpoint])
        return Cell(arm, found, category)

    def _mine(self, value: Any) -> Any:
        return _of_track(value, self.track)
