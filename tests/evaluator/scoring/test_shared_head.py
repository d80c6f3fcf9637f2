"""Scores by likelihood meet the output head in models/base/heads.py: caps, scales and divisors of a family count once."""

from __future__ import annotations

import ast

import pytest
import torch
from pico_families import make_family
from planted import flags, ids_of

import config
from evaluator.judges import local

#: What runs a head: its name on a model, and transformers' way to it.
_HEADS = ("lm_head", "embed_out", "get_output_embeddings")
#: The whole forward of a model, whose own head it is: rows that cannot share a pass, a probe, classifiers.
_WHOLE = {"evaluator/scoring/likelihood.py": 1, "evaluator/evaluate_utility.py": 1, "evaluator/judges/local.py": 1}


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "cohere2", "granite", "mistral", "phi3", "qwen2", "gpt2"])
def test_a_local_judge_reads_what_the_models_own_forward_gives(kind, tmp_path):
    source = local.find("guard", str(make_family(tmp_path / kind, kind)), flags())
    reader = local.Reader.load(source)
    rows = [ids_of("How do I bake bread at home?"), ids_of("Sorry.")]
    found = reader.next_logprobs(rows, (5, 77, 90))
    for row, mine in zip(rows, found, strict=True):
        with torch.no_grad():
            theirs = reader.model(torch.tensor([row]), use_cache=False).logits[0, -1].float().log_softmax(-1)
        assert torch.allclose(mine, theirs[[5, 77, 90]], atol=1e-4)


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_no_evaluator_runs_a_head_of_its_own():
    for path in sorted((config.ROOT / "evaluator").rglob("*.py")):
        name = path.relative_to(config.ROOT).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        # model.lm_head(x) and model.get_output_embeddings()(x); a look at the head's dtype runs nothing
        own = [node.lineno for node in calls(tree)
               if (isinstance(node.func, ast.Attribute) and node.func.attr in _HEADS[:2])
               or (isinstance(node.func, ast.Call) and isinstance(node.func.func, ast.Attribute)
                   and node.func.func.attr in _HEADS)]
        assert not own, f"{name}: lines {own} run a head; use answer_logits of models/base/heads.py"
        whole = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "logits"
                 and isinstance(node.value, ast.Call)]
        assert len(whole) == _WHOLE.get(name, 0), name
