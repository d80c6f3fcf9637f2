"""MC1 and MC2 against lm-eval's own truthfulqa tasks: same model, same questions, same context, float32."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from data.prompts import Template
from data.records import Choice
from evaluator.scoring import harness
from evaluator.scoring.preferences import outcomes
from evaluator.statistics import metrics

# our own questions in the layout of the published multiple_choice set: in mc1 the right answer stands first
QUESTIONS = [
    ("Is bread baked?", ["Yes, with yeast.", "No, it is frozen.", "Only on the Seine."],
     ["Yes, with yeast.", "Yes.", "It is frozen.", "No, never."], [1, 1, 0, 0]),
    ("Where does the Seine flow?", ["Through Paris.", "Through a boat."],
     ["Through Paris.", "In France.", "Through a boat.", "It does not."], [1, 1, 0, 0]),
    ("Can a dog sail?", ["Nobody taught one yet.", "Every dog can.", "Dogs are boats.", "Only in the morning."],
     ["Nobody taught one yet.", "Every dog can.", "Dogs are boats."], [1, 0, 0]),
    ("What do you mix with salt?", ["Flour", "The capital"], ["Flour", "Water", "The capital"], [1, 1, 0]),
    ("Who took the boat?", ["The dog took it.", "The salt took it."], ["The dog took it.", "I can't help."], [1, 0]),
    ("How long do you wait?", ["Until it has risen.", "A year."], ["Until it has risen.", "A year.", "Not at all."],
     [1, 0, 0]),
]


@pytest.fixture(scope="module")
def loaded(pico):
    from types import SimpleNamespace

    from models.runs import load_run

    return load_run("", SimpleNamespace(model_name_or_path=str(pico), cache_dir=None, dtype="float32", device="cpu",
                                        threads=1, seed=0, template="chat"))


@pytest.fixture(scope="module")
def theirs(loaded, tmp_path_factory):
    """lm-eval's samples of both tasks, from a local file: {task: [sample]}; the tasks' own YAML, other data source."""
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks._yaml_loader import load_yaml

    file = tmp_path_factory.mktemp("truth") / "validation.jsonl"
    file.write_text("".join(json.dumps({
        "question": question, "mc1_targets": {"choices": one, "labels": [1] + [0] * (len(one) - 1)},
        "mc2_targets": {"choices": many, "labels": labels}}) + "\n" for question, one, many, labels in QUESTIONS))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = {}
    for name in ("truthfulqa_mc1", "truthfulqa_mc2"):
        content = load_yaml(Path(lm_eval.tasks.__file__).parent / "truthfulqa" / f"{name}.yaml")
        content |= {"dataset_path": "json", "dataset_name": None,
                    "dataset_kwargs": {"data_files": {"validation": str(file)}}}
        content.pop("tag", None)
        task = ConfigurableTask(config=content)
        task.set_fewshot_seed(0)
        result = evaluate(lm=harness.wrapped(loaded, 4), task_dict={"tasks": {name: task}}, bootstrap_iters=0)
        found[name] = (result["results"][name]["acc,none"], result["samples"][name])
    return found


def ours(loaded, samples, answers):
    """Our outcomes on lm-eval's own context. Two things differ and are made equal here: lm-eval puts its target delimiter,
    one space, before an answer, and it asks in plain text, where our evaluators use the model's chat template."""
    contexts = [sample["arguments"][0][0] for sample in samples]
    # lm-eval cuts what exceeds the model's window; here nothing does
    longest = max(len(loaded.tokenizer(text)["input_ids"]) for text in contexts)
    assert longest < loaded.model.config.max_position_embeddings - 30
    plain = Template("plain", lambda prompt, input: prompt, "", special_tokens=True)
    choices = [Choice(context, tuple(f" {text}" for text in texts), tuple(labels), 0, str(i))
               for i, (context, (texts, labels)) in enumerate(zip(contexts, answers, strict=True))]
    loaded = type(loaded)(loaded.model, loaded.tokenizer, plain, loaded.name, loaded.device)
    return outcomes(loaded, choices, 512)


def test_mc1_agrees(loaded, theirs):
    value, samples = theirs["truthfulqa_mc1"]
    made = ours(loaded, samples, [(one, [1] + [0] * (len(one) - 1)) for _, one, _, _ in QUESTIONS])
    for mine, sample in zip(made, samples, strict=True):
        assert mine.logprobs == pytest.approx([total for total, _ in sample["filtered_resps"]], rel=1e-6)
        # without ties both rules are one: lm-eval takes the first of equal answers, and the right one stands first, where
        # ours wants it strictly ahead of every wrong one
        assert len(set(mine.logprobs)) == len(mine.logprobs)
        assert metrics.mc1(mine.logprobs, mine.choice.labels, 0) == sample["acc"]
    assert sum(metrics.mc1(o.logprobs, o.choice.labels, 0) for o in made) / len(made) == pytest.approx(value, abs=1e-6)
    assert len({sample["acc"] for sample in samples}) == 2, "a test where all rows agree would show nothing"


def test_mc2_agrees(loaded, theirs):
    value, samples = theirs["truthfulqa_mc2"]
    made = ours(loaded, samples, [(many, labels) for _, _, many, labels in QUESTIONS])
    found = [metrics.mc2(o.logprobs, o.choice.labels) for o in made]
    assert found == pytest.approx([float(sample["acc"]) for sample in samples], abs=1e-6)
    assert sum(found) / len(found) == pytest.approx(value, abs=1e-6)
    assert 0.01 < value < 0.99


def test_a_tie_counts_for_lm_eval_and_not_for_us():
    import numpy as np

    tied = [-2.0, -2.0, -3.0]
    assert np.argmax(tied) == 0
    assert metrics.mc1(tied, [1, 0, 0], 0) == 0
    assert metrics.mc1([-1.9, -2.0, -3.0], [1, 0, 0], 0) == 1


def test_the_context_holds_the_preset_examples(theirs):
    context = theirs["truthfulqa_mc1"][1][0]["arguments"][0][0]
    assert context.count("Q: ") == 7
    assert context.endswith("Q: Is bread baked?\nA:")
