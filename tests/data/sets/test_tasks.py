"""SOMF's data and stages: splits without leaks, published shapes, PKU pairs; LoRA, full and continued training."""

from __future__ import annotations

import json

import pytest
import torch
from runs import align
from safetensors.torch import load_file

import manifest
from data.records import OBJECTIVES, SPLITS, Pair, normalise
from data.sets import skills
from data.sources import load_choices, load_pairs, load_records
from errors import UserError
from flags.base import SKILLS
from models.adapters.files import read_adapter
from models.checkpoints.fingerprints import fingerprint
from tests.assets_fixture import require_embedded


@pytest.fixture(scope="session")
def embedded_assets() -> None:
    require_embedded()


@pytest.fixture(scope="session")
def sets(embedded_assets):
    return {(task, split): load_records(task, split) for task in skills.EMBEDDED for split in SPLITS}


def prompts(rows):
    return {normalise(row.prompt) for row in rows}


# ---- embedded tasks


def test_row_counts(sets):
    assert {key: len(rows) for key, rows in sets.items()} == {
        ("english", "train"): 774, ("english", "validation"): 109, ("english", "test"): 102,
        ("chinese", "train"): 794, ("chinese", "validation"): 89, ("chinese", "test"): 109,
        ("maths", "train"): 1841, ("maths", "validation"): 223, ("maths", "test"): 240,
        ("summaries", "train"): 818, ("summaries", "validation"): 84, ("summaries", "test"): 97}


def test_no_test_prompt_is_in_training_data_of_any_task_or_objective(sets):
    test = set().union(*(prompts(rows) for (_, split), rows in sets.items() if split == "test"))
    for task in (*OBJECTIVES, "overrefusal"):
        test |= prompts(load_records(task, "test"))
    for name in ("truthfulqa_mc", "hhh_helpful", "hhh_honest", "hhh_harmless", "hhh_other"):
        test |= prompts(load_choices(name))
    for split in ("train", "validation"):
        mine = set().union(*(prompts(sets[task, split]) for task in skills.EMBEDDED),
                           *(prompts(load_records(task, split)) for task in OBJECTIVES), prompts(load_pairs("mix", split)))
        assert not mine & test
    for task in skills.EMBEDDED:
        assert not prompts(sets[task, "train"]) & prompts(sets[task, "validation"])


def test_preference_pairs_are_in_no_test_set(sets):
    pairs = load_pairs("safety", "train")
    held_out = prompts(load_records("safety", "test")) | prompts(load_records("overrefusal", "test"))
    assert len(pairs) == 344
    assert not prompts(pairs) & held_out
    # harmful answers against refusals, and human-rated answers of one question
    assert sum(p.id.startswith("many-shot") for p in pairs) > 100
    assert sum(p.id.startswith("rated") for p in pairs) > 20


def test_a_word_problem_and_an_article_are_on_one_side(sets):
    def stories(split):
        return {normalise(r.prompt).rsplit(" how ", 1)[0] for r in sets["maths", split]}
    assert not stories("train") & stories("test")
    rows = sets["summaries", "train"]
    assert all(r.prompt.startswith(skills.SUMMARISE) and len(r.prompt) < skills.ARTICLE + 60 for r in rows)
    assert {r.objective for found in sets.values() for r in found} == {0}
    assert all(len({r.id for r in found}) == len(found) for found in sets.values())


def test_the_opening_of_an_article():
    assert skills.opening("One. Two. Three.") == "One. Two. Three."
    assert skills.opening("One two. Three four.", 12) == "One two."
    assert skills.opening("nothing stops here", 12) == "nothing"
    assert skills.opening("x" * 20, 12) == "x" * 12


def test_tasks_that_are_not_embedded_say_where_they_are(embedded_assets):
    with pytest.raises(UserError, match=f"embedded: {', '.join(skills.EMBEDDED)};"):
        load_records("hindi", "train")
    with pytest.raises(UserError, match="no published set for summaries train"):
        load_records("summaries", "train", source="published")
    with pytest.raises(UserError, match="no preference pairs for english train"):
        load_pairs("english", "train")


# ---- published shapes


def write(folder, rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def pku(i, safe_0, safe_1, safer):
    return {"prompt": f"ask {i}", "response_0": f"zero {i}", "response_1": f"one {i}", "is_response_0_safe": safe_0,
            "is_response_1_safe": safe_1, "safer_response_id": safer, "severity": 3}


PKU = [pku(0, True, False, 0), pku(1, False, True, 1), pku(2, True, True, 0), pku(3, False, False, 1),
       pku(4, True, False, 0)]


def test_pku_pairs_have_exactly_one_safe_answer(tmp_path):
    pairs = load_pairs("safety", "train", source={"safety": write(tmp_path, PKU)})
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [
        ("ask 0", "zero 0", "one 0"), ("ask 1", "one 1", "zero 1"), ("ask 4", "zero 4", "one 4")]
    assert {p.objective for p in pairs} == {1}
    assert [r.answer for r in load_records("safety", "train", source={"safety": write(tmp_path, PKU)})] == \
        ["zero 0", "one 1", "zero 4"]


def test_ranked_pairs_and_a_csv_of_pku(tmp_path):
    rows = [{"prompt": "ask", "response": ["good", "bad"]}]
    assert load_pairs("safety", "train", source={"safety": write(tmp_path, rows)})[0].rejected == "bad"
    (tmp_path / "p.csv").write_text("prompt,response_0,response_1,is_response_0_safe,is_response_1_safe,safer_response_id\n"
                                    "a,x,y,False,True,1\nb,x,y,True,True,1\n")
    pairs = load_pairs("safety", "train", source={"safety": str(tmp_path / "p.csv")})
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [("a", "y", "x")]


@pytest.mark.parametrize(("rows", "says"), [
    ([pku(0, True, False, 2)], "safer_response_id.*needs 0 or 1"),
    ([pku(0, "maybe", False, 0)], "is_response_0_safe.*needs true or false"),
    ([pku(0, True, True, 0)], "in none of 1 rows exactly one of the two answers is labelled safe"),
    ([{k: v for k, v in pku(0, True, False, 0).items() if "is_response_1" not in k}], "'is_response_1_safe' is missing"),
    ([{"prompt": "a", "response": ["one"]}], "needs two texts"),
    ([pku(0, True, False, 0) | {"response_1": "zero 0"}], "chosen and rejected are the same text"),
])
def test_pku_rows_that_do_not_fit(tmp_path, rows, says):
    with pytest.raises(UserError, match=says):
        load_pairs("safety", "train", source={"safety": write(tmp_path, rows)})


def test_questions_with_answers_and_a_named_hub_split(tmp_path, monkeypatch):
    rows = [{"question": "2 + 2?", "answer": "4 #### 4"}]
    found = load_records("maths", "train", source={"maths": write(tmp_path, rows)})
    assert (found[0].prompt, found[0].answer, found[0].objective) == ("2 + 2?", "4 #### 4", 0)
    asked = {}

    def load_dataset(*names, split, **options):
        asked[names] = split
        return PKU
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    load_pairs("safety", "train", source={"safety": "PKU-Alignment/PKU-SafeRLHF:test"})
    load_pairs("safety", "train", source={"safety": "PKU-Alignment/PKU-SafeRLHF"})
    assert asked == {("PKU-Alignment/PKU-SafeRLHF",): "train"}
    load_pairs("safety", "train", source={"safety": "PKU-Alignment/PKU-SafeRLHF:test"})
    assert asked == {("PKU-Alignment/PKU-SafeRLHF",): "test"}


def test_published_tasks_name_their_hub_sets(monkeypatch):
    asked = []

    def load_dataset(*names, split, **options):
        asked.append((*names, split))
        return [{"instruction": "do", "input": "", "output": "done"}] if "gsm8k" not in names[0] else \
            [{"question": "why", "answer": "so"}]
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for task in ("english", "chinese", "hindi", "code", "maths"):
        assert load_records(task, "train", source="published")
    assert asked == [("llamafactory/alpaca_gpt4_en", "train"), ("llamafactory/alpaca_gpt4_zh", "train"),
                     ("iamshnoo/alpaca-cleaned-hindi", "train"), ("sahil2801/CodeAlpaca-20k", "train"),
                     ("openai/gsm8k", "main", "train")]


# ---- training on top of another model


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "task.json"
    file.write_text(json.dumps([{"instruction": f"Say {i}", "output": "so it is " * (1 + i % 3)} for i in range(8)]))
    return {task: str(file) for task in SKILLS}


FLAGS = ("--moe_flag", "0", "--learning_rate", "0.01", "--max_steps", "2")


def test_every_weight_trains_in_full_and_is_its_base_plus_a_change(pico, tmp_path, rows):
    made = align(pico, tmp_path, rows, "english", *FLAGS, "--tuning", "full", "--learning_rate", "0.001",
                 "--save_steps", "1")
    folder = tmp_path / "outputs" / "english"
    old, new = load_file(pico / "model.safetensors"), load_file(folder / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(not torch.equal(old[k], new[k]) for k in old)
    assert made["inputs"]["base"] == fingerprint(pico)
    assert made["metrics"]["trainable_parameters"] == sum(v.numel() for v in new.values())
    assert (tmp_path / "checkpoints" / "english" / "checkpoint-1" / "model.safetensors").is_file()


def test_lora_on_other_modules_and_a_run_that_goes_on(pico, tmp_path, rows):
    align(pico, tmp_path, rows, "chinese", *FLAGS, "--lora_targets", "q_proj,v_proj", "--lora_r", "3")
    first = read_adapter(tmp_path / "outputs" / "chinese")
    assert {m.rpartition(".")[2] for m in first.modules} == {"q_proj", "v_proj"}
    made = align(pico, tmp_path, rows, "hindi", *FLAGS, "--init_adapter", "chinese", "--learning_rate", "0.001")
    second = read_adapter(tmp_path / "outputs" / "hindi")
    assert second.config["r"] == 3
    assert made["inputs"]["init_adapter"] == first.sha256
    for module, (a, _) in first.modules.items():
        assert 0 < float((second.modules[module][0] - a).abs().max()) < 0.01


def test_dpo_that_goes_on_takes_its_start_for_the_reference_and_saves_one_adapter(pico, tmp_path, rows, monkeypatch):
    pairs = [Pair(f"question {i}", "I can't help with that", "Sure, here it is", 1) for i in range(8)]
    monkeypatch.setattr("data.sources.load_pairs", lambda *a, **k: pairs)
    align(pico, tmp_path, rows | {"safety": rows["english"]}, "safety", *FLAGS, "--learning_rate", "0.05")
    made = align(pico, tmp_path, rows | {"safety": rows["english"]}, "safety", *FLAGS, "--method", "dpo", "--init_adapter",
                 "safety", "--run_name", "after", "--warmup_steps", "0")
    # reference = start: the first loss is log 2
    assert made["metrics"]["history"][0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    folder = tmp_path / "outputs" / "after"
    assert not [p for p in folder.iterdir() if p.is_dir()]
    assert set(made["inputs"]) == {"base", "init_adapter"}
    assert read_adapter(folder).modules.keys() == read_adapter(tmp_path / "outputs" / "safety").modules.keys()


def test_dpo_in_full(pico, tmp_path, rows, monkeypatch):
    pairs = [Pair(f"question {i}", "I can't help with that", "Sure, here it is", 1) for i in range(8)]
    monkeypatch.setattr("data.sources.load_pairs", lambda *a, **k: pairs)
    made = align(pico, tmp_path, rows | {"safety": rows["english"]}, "safety", *FLAGS, "--method", "dpo", "--tuning", "full",
                 "--learning_rate", "0.001")
    assert made["metrics"]["history"][0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert (tmp_path / "outputs" / "safety" / "model.safetensors").is_file()


@pytest.mark.parametrize(("words", "says"), [
    (("--moe_flag", "1"), "--task_name english: the fused MoE is tuned on"),
    (("--method", "dpo", "--data_path="), "needs preference pairs"),
    (("--tuning", "full", "--lora_targets", "q_proj"), "--lora_targets q_proj: --tuning full trains no adapter"),
    (("--moe_flag", "1", "--init_adapter", "x"), "--init_adapter x: belongs to dense runs"),
    (("--lora_targets", "nothing"), "this model has no module nothing; it has gate_proj"),
    (("--init_adapter", "absent"), "run 'absent': nothing in"),
    (("--init_adapter", "chinese", "--lora_targets", "q_proj"), "trains down_proj,gate_proj,up_proj"),
])
def test_flags_that_do_not_fit(pico, tmp_path, rows, words, says, capsys):
    if "chinese" in words:
        align(pico, tmp_path, rows, "chinese", *FLAGS)
    with pytest.raises(SystemExit) as stop:
        align(pico, tmp_path, rows, "english", *FLAGS, *words)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "outputs" / "english").exists()


def test_an_adapter_of_another_base_is_not_gone_on_with(pico, tmp_path, rows, capsys):
    from pico import make_pico

    align(pico, tmp_path, rows, "chinese", *FLAGS)
    with pytest.raises(SystemExit):
        align(make_pico(tmp_path / "other", seed=3), tmp_path, rows, "english", *FLAGS, "--init_adapter", "chinese")
    assert "was trained on another base" in capsys.readouterr().err
    assert manifest.read(tmp_path / "outputs" / "chinese")["inputs"]["base"] == fingerprint(pico)
