"""Made-up scores in a registry, as the evaluators write them, and reports of them."""

from __future__ import annotations

import json

import numpy as np

import manifest
from evaluator import report
from evaluator.statistics import metrics


def put(results, run, *, refusal=None, over=None, mc2=None, nll=None, seed=42):
    """Register made-up scores with their rows, as the evaluators do."""
    sub = "raw" if run == "base" else f"cross_{run}"

    def save(command, scores, rows, details=None):
        folder = results / "scores" / sub
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"set": name, "id": str(i), "values": values}) for name, i, values in rows]
        (folder / f"{command}.rows.jsonl").write_text("\n".join(lines))
        manifest.register(results, {"kind": "score", "run": run, "sub": sub, "command": command, "seed": seed,
                                    "scores": {s.name: s.as_dict() for s in scores}, "details": details or {}})

    if refusal is not None:
        scores = [metrics.rate(refusal, "safe_refusal", "refused and coherent", higher_is_better=True)]
        rows = [("safety", i, {"safe_refusal": hit}) for i, hit in enumerate(refusal)]
        if over is not None:
            scores.append(metrics.rate(over, "overrefusal", "harmless but refused", higher_is_better=False))
            scores.append(metrics.newcombe(*scores[:2], "balance", "their difference"))
            rows += [("overrefusal", i, {"refusal": hit}) for i, hit in enumerate(over)]
        judges = {"keyword": {"openings": {"n": 169, "missed": 0.46, "false_alarms": 0.0}},
                  "harm": {"auc": 0.86, "auc_rated": 0.83, "missed": 0.26, "false_alarms": 0.19, "protocol": "5-fold"}}
        save("evaluate_safety", scores, rows, {"judges": judges})
    if mc2 is not None:
        save("evaluate_truth_and_info", [metrics.mean(mc2, "mc2", "mass", higher_is_better=True, seed=0)],
             [("truthfulqa_mc", i, {"mc2": value}) for i, value in enumerate(mc2)])
    if nll is not None:
        tokens = [10 + i % 3 for i in range(len(nll))]
        save("evaluate_helpfulness", [metrics.ratio([a * t for a, t in zip(nll, tokens, strict=True)], tokens, "nll",
                                                    "nats", higher_is_better=False, seed=0)],
             [("nll", i, {"nll": a * t, "tokens": t}) for i, (a, t) in enumerate(zip(nll, tokens, strict=True))])


def hits(share, n=100):
    return [int(i < round(share * n)) for i in range(n)]


def values(mean, n=80, seed=0):
    return np.random.default_rng(seed).normal(mean, 0.05, n).tolist()


def fill(results, seed=42, shift=0.0):
    put(results, "base", refusal=hits(0.08), over=hits(0.0), mc2=values(0.40), nll=values(1.6), seed=seed)
    put(results, "safety", refusal=hits(0.95), over=hits(0.4), mc2=values(0.40), seed=seed)
    put(results, "truthfulness", refusal=hits(0.02), over=hits(0.0), mc2=values(0.52), nll=values(1.7), seed=seed)
    put(results, "average", refusal=hits(0.2), over=hits(0.0), mc2=values(0.43), seed=seed)
    put(results, "mix", refusal=hits(0.6), over=hits(0.03), mc2=values(0.56), nll=values(1.55), seed=seed)
    put(results, "moe", refusal=hits(0.85 + shift), over=hits(0.05), mc2=values(0.56, seed=1), nll=values(1.54),
        seed=seed)


RUNS = "base,harmless=safety,honest=truthfulness,plain average=average,naive mix=mix,tuned MoE=moe"


def write(results, *more, runs=RUNS):
    report.main(["--runs", runs, "--output_dir", str(results), "--name", "t", *more])
    return (results / "report" / "t.md").read_text()


def table(text, heading=None):
    """{first cell: {column: cell}} of the first table below a heading."""
    lines = text.split(f"## {heading}")[1] if heading else text
    lines = lines[lines.index("| "):].split("\n\n")[0].splitlines()
    head = [cell.strip() for cell in lines[0].strip("|").split("|")]
    found = {}
    for line in lines[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found[cells[0]] = dict(zip(head, cells, strict=True))
    return found
