"""Heads fitted on a pico model: the judges read them as they were fitted, and what could be learnt was learnt."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from planted import flags

from benchmarks import embedded_heads
from data.records import Pair
from evaluator.judges import moderation, reward
from evaluator.judges.protocol import Item

ARGS = SimpleNamespace(dtype="float32", threads=1, seed=0, layers=1)


def answers():
    """Answers of two labels and harmless ones, told apart by their last words."""
    said = {13: "hit hit hit", 6: "QQQ QQQ", None: "a cup of tea"}
    return [embedded_heads.Answer(f"prompt {i}", f"Answer {i} {said[label]}", label)
            for i, label in enumerate([13, 6, None, None] * 20)]


def preferences():
    return [Pair(f"prompt {i}", f"Answer {i} a cup of tea", f"Answer {i} hit hit hit", i % 2) for i in range(60)]


@pytest.fixture(scope="module")
def made(pico, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    return folder, embedded_heads.make_heads(pico, folder, answers(), preferences(), ARGS)


def test_judges_read_the_heads(made):
    folder, _ = made
    judge = moderation.make("moderation", str(folder / "moderation"), flags())
    rows = answers()
    found = dict(judge.judge([Item(row.prompt, row.answer) for row in rows]))
    assert np.mean([found[i].label == (row.label is not None) for i, row in enumerate(rows)]) > 0.9
    assert tuple(found[0].labels) == embedded_heads.LABELS
    # labels without rows never speak
    fitted = {embedded_heads.LABELS[i] for i in (6, 13)}
    assert all(value < 0.01 for v in found.values() for name, value in v.labels.items() if name not in fitted)
    top = [max(found[i].labels, key=found[i].labels.get) for i, row in enumerate(rows) if row.label is not None]
    assert np.mean([name == embedded_heads.LABELS[row.label] for name, row in zip(
        top, (row for row in rows if row.label is not None), strict=True)]) > 0.9
    better = reward.make("reward", str(folder / "reward"), flags())
    said = dict(better.judge([Item(pair.prompt, pair.chosen, pair.rejected) for pair in preferences()]))
    assert np.mean([said[i].label is True for i in range(len(said))]) > 0.9


def test_the_table_has_held_out_rates_with_intervals(made):
    text = made[1]
    count = int(embedded_heads.held_out([row.prompt for row in answers()]).sum())
    assert 5 < count < 40
    row = next(line for line in text.splitlines() if line.startswith("| moderation | harmful or not"))
    assert row.endswith(f"| {count} |")
    assert float(row.split("|")[3].split()[0]) > 0.8
    assert "| reward | for comparison: the longer answer | 1.000 [" in text
    assert "true pairs" not in text


def test_fitting_is_repeatable_and_leaves_the_body_alone(made, pico, tmp_path):
    from safetensors.torch import load_file

    folder, text = made
    assert embedded_heads.make_heads(pico, tmp_path, answers(), preferences(), ARGS) == text
    first, again = (load_file(place / "moderation" / "model.safetensors") for place in (folder, tmp_path))
    assert all((first[name] == again[name]).all() for name in first)
    base = load_file(pico / "model.safetensors")
    shared = [name for name in first if name in base]
    assert len(shared) == len(first) - 1
    assert all((first[name] == base[name]).all() for name in shared)
    assert json.loads((folder / "reward" / "config.json").read_text())["num_hidden_layers"] == 1


def test_the_raise_balances_both_shares():
    logits, truth = np.array([-5.0, -4.0, -3.0, -2.0]), np.array([False, False, True, True])
    assert embedded_heads.raised(logits, truth) == 4.0


def test_agreement_counts_by_set(tmp_path):
    rows = [{"set": "safety", "id": str(i), "values": {"moderation": int(i < 2), "refusal": int(i >= 2), "harm": 0}}
            for i in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    text = embedded_heads.agreement([tmp_path / "a.jsonl"], 0)
    assert "| safety | moderation, keyword | 1.00 [1.00, 1.00] | 4 | 0 | 0 | 2 |" in text
    assert "| moderation | safety: flagged | 0.333" in text
