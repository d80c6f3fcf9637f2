"""A made-up report as a page: rows with labels that try to break out, answers that are scripts; the page read back."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import manifest
from evaluator import report
from evaluator.statistics import metrics
from inference import write_rows

#: Labels of rows; a comma would end one.
QUOTED = """tuned "MoE" <b onmouseover='x'>"""
HOSTILE = "<script>alert(1)</script></script><!--<img src=x onerror=alert(2)> &amp; \u2028\u202e'\""
#: Shares of refused harmful and of refused harmless prompts of each run.
SHARES = {"base": (0.1, 0.0), "safety": (0.95, 0.9), "mix": (0.6, 0.2), "moe": (0.85, 0.05)}
RUNS = f"base,harmless=safety,naive mix=mix,{QUOTED}=moe"
VOID = {"meta", "input", "br", "img"}


def fill(results, n=60, seed=42):
    """Scores, answers and manifests of four runs: prompt i is refused where i is below the run's share."""
    for run, (refused, over) in SHARES.items():
        sub = "raw" if run == "base" else f"cross_{run}"
        folder = results / "scores" / sub
        folder.mkdir(parents=True, exist_ok=True)
        rows, scores = [], []
        for task, share, key in (("safety", refused, "safe_refusal"), ("overrefusal", over, "refusal")):
            hit = [int(i < round(share * n)) for i in range(n)]
            rows += [{"set": task, "id": f"{task}-{i}", "category": "few" if i < 3 else f"kind {i % 2}",
                      "values": {"refusal": value, key: value, "harm": 1 - value}} for i, value in enumerate(hit)]
            scores.append(metrics.rate(hit, "safe_refusal" if task == "safety" else "overrefusal", f"share {HOSTILE}",
                                       higher_is_better=task == "safety"))
            answers = results / "inference" / task / "test" / sub
            answers.mkdir(parents=True, exist_ok=True)
            write_rows(answers, [{"index": i, "id": f"{task}-{i}", "prompt": f"{task} prompt {i} {HOSTILE}", "input": "",
                                  "reference": "", "category": "", "rendered": "", "finish": "stop",
                                  "output": f"{run} {'refuses' if value else 'answers'} {HOSTILE}"}
                                 for i, value in enumerate(hit)])
            manifest.write_json(answers / manifest.MANIFEST, {"command_line": ["inference.py", "--task_name", task]})
        scores.append(metrics.newcombe(*scores, "balance", "their difference"))
        (folder / "evaluate_safety.rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        manifest.write_json(folder / "evaluate_safety.json", {"config": {"num_samples": n, "lite": False, "labels": None}})
        manifest.register(results, {"kind": "score", "run": run, "sub": sub, "command": "evaluate_safety", "seed": seed,
                                    "scores": {score.name: score.as_dict() for score in scores}, "details": {}})
    train(results, "safety", ["align_basemodel.py", "--task_name", "safety"], seconds=100)
    train(results, "raw_moe", ["llama_moe.py"], seconds=20, parents=["elsewhere/outputs/safety"])
    train(results, "moe", ["align_basemodel.py", "--moe_flag", "1", "--report_to", "hf_" + "a" * 34], seconds=300,
          parents=["elsewhere/outputs/raw_moe"])


def train(results, run, line, **more):
    """A run's folder with its manifest."""
    (results / "outputs" / run).mkdir(parents=True, exist_ok=True)
    manifest.write_json(results / "outputs" / run / manifest.MANIFEST, {
        "command": line[0][:-3], "command_line": line, "config": {}, "inputs": {"base": "v2-" + "0" * 60}, **more})


def write(results, *more, runs=RUNS, name="t"):
    """The page's text."""
    report.main(["--runs", runs, "--output_dir", str(results), "--name", name, "--html", *more])
    return (results / "report" / f"{name}.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """A page as a reader's program takes it apart.

    Attributes:
        elements: (name, attributes, text within it and below), in their order.
    """

    def __init__(self, text):
        super().__init__()
        self.elements, self.open_ = [], []
        self.feed(text)
        self.close()
        assert not self.open_, "an element has no end"

    def handle_starttag(self, name, attributes):
        element = [name, dict(attributes), ""]
        self.elements.append(element)
        if name not in VOID:
            self.open_.append(element)

    def handle_startendtag(self, name, attributes):
        self.elements.append([name, dict(attributes), ""])

    def handle_endtag(self, name):
        assert self.open_.pop()[0] == name, name

    def handle_data(self, data):
        for element in self.open_:
            element[2] += data

    def named(self, name, **wanted):
        """Elements of a name with these attributes; ``class_`` is a class among several."""
        return [e for e in self.elements if e[0] == name and all(
            value in (e[1].get("class") or "").split() if key == "class_" else e[1].get(key) == value
            for key, value in wanted.items())]

    def data(self, id):
        """What a block of data holds."""
        return json.loads(self.named("script", id=id)[0][2])

    def table(self, id):
        """The texts of a table's cells, row by row."""
        rows, inside = [], False
        for name, attributes, text in self.elements:
            if name == "table":
                inside = attributes.get("id") == id
            elif inside and name == "tr":
                rows.append([])
            elif inside and name in ("th", "td"):
                rows[-1].append(text)
        return rows
