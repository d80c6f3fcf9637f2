"""Scores by likelihood meet the output head in models/base/heads.py: caps, scales and divisors of a family count once."""

from __future__ import annotations

import ast

import pytest
import torch
from pico_families import make_family
from planted import flags, ids_of
from transformers import AutoModelForCausalLM

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


@pytest.mark.parametrize(("kind", "settings"), [
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
               "max_position_embeddings": 32}),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [6.0] * 4,
                                  "original_max_position_embeddings": 32, "rope_theta": 1e4},
              "original_max_position_embeddings": 32, "sliding_window": None})])
def test_no_row_gets_the_frequencies_of_a_longer_one(kind, settings, tmp_path):
    """LongRoPE and dynamic scaling look at the longest row of a pass; a row's verdict must not depend on its batch."""
    folder = make_family(tmp_path / kind, kind, seed=1, **settings)
    reader = local.Reader.load(local.find("guard", str(folder), flags()))
    rows = [list(range(5, 5 + length)) for length in (40, 30, 36)]
    found = reader.next_logprobs(rows, (1, 7, 99))
    for row, mine in zip(rows, found, strict=True):
        alone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            theirs = alone(torch.tensor([row]), use_cache=False).logits[0, -1].log_softmax(-1)
        assert torch.allclose(mine, theirs[[1, 7, 99]], atol=1e-5)


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
