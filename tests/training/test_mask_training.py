"""Masks trained on pico models through the command: weights, factors, several tasks, resume, wrong bases, export."""

from __future__ import annotations

import dataclasses
import json
import shutil
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from pico import TEXTS, pico_tokenizer
from runs import common
from safetensors.torch import load_file

import config
import manifest
from data.records import Pair
from errors import UserError
from models.adapters.files import read_adapter
from models.base.loading import load_base
from models.checkpoints.fingerprints import fingerprint
from models.mask.export import masked_adapter, masked_deltas, open_mask
from models.mask.files import read_mask, save_mask
from models.task_vectors import vector

PAIRS = [(f"How do I do bad thing {i}?", f"I can't help with that {i}", f"Mix flour {i} and wait") for i in range(8)]
PLANTED = "model.layers.1.mlp.down_proj.weight"
STEPS = ("--max_steps", "4", "--per_device_train_batch_size", "2", "--model_max_length", "96")


@pytest.fixture(scope="module")
def place(pico, make_adapter, tmp_path_factory):
    """Results with an aligned adapter, two tasks that went on with it, one on the base, and a full planted task."""
    results = tmp_path_factory.mktemp("mask")
    (results / "pairs.jsonl").write_text("".join(
        json.dumps({"prompt": p, "chosen": c, "rejected": r}) + "\n" for p, c, r in PAIRS))
    outputs = results / "outputs"
    make_adapter(pico, outputs / "aligned", seed=1)
    for seed, name in ((2, "one"), (3, "two")):
        make_adapter(pico, outputs / name, seed=seed)
        record(outputs / name, init_adapter=manifest.sha256(outputs / "aligned" / "adapter_model.safetensors"))
    make_adapter(pico, outputs / "fresh", seed=4)
    _plant(pico, outputs / "planted")
    return results


def record(folder, **inputs):
    content = json.loads((folder / "manifest.json").read_text()) if (folder / "manifest.json").is_file() else {}
    content["inputs"] = content.get("inputs", {}) | inputs
    (folder / "manifest.json").write_text(json.dumps({"status": "done"} | content))


def margin(model):
    """Sum over pairs of log p(chosen) - log p(rejected)."""
    tokenizer, total = pico_tokenizer(), 0.0
    for prompt, chosen, rejected in PAIRS:
        front = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        for answer, sign in ((chosen, 1), (rejected, -1)):
            ids = tokenizer(front + answer, return_tensors="pt")["input_ids"]
            labels = ids.clone()
            labels[:, :len(tokenizer(front)["input_ids"])] = -100
            out = model(input_ids=ids, labels=labels)
            total = total - sign * out.loss * (labels[:, 1:] != -100).sum()
    return total


def _plant(pico, folder):
    """A tuned model whose change of one weight is harmful in its upper half (down the margin) and useful in its lower."""
    model = load_base(pico, torch.float32, torch.device("cpu"))
    weight = model.get_parameter(PLANTED)
    margin(model).backward()
    change = weight.grad / weight.grad.norm() * weight.norm() * 0.3
    change[: len(change) // 2] *= -1
    with torch.no_grad():
        weight += change
    model.save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    record(folder, base=fingerprint(pico))


def train(pico, place, name, *words, out=None):
    import align_basemodel

    where = out or place
    align_basemodel.main(["--method", "mask", "--data_path", str(place / "pairs.jsonl"), "--run_name", name,
                          *common(pico, where), *STEPS, *words])
    return where / "outputs" / name


def fails(capsys, pico, place, *words):
    with pytest.raises(SystemExit) as stopped:
        train(pico, place, "never", *words)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def flags(pico, place):
    return SimpleNamespace(results=place, cache_dir=None, model_name_or_path=str(pico))


def deltas(pico, place, folder, readout="expected", seed=0):
    with ExitStack() as stack:
        mask, aligned, tasks = open_mask(folder, flags(pico, place), stack)
        return dict(masked_deltas(folder, readout, seed, (aligned, tasks), mask))


def test_the_mask_removes_the_harmful_half(pico, place):
    """Planted: upper rows push towards the rejected answers, lower rows away from them."""
    folder = train(pico, place, "toy", "--tasks", "planted", "--learning_rate", "0.3", "--max_steps", "16",
                   "--warmup_steps", "0", "--seed", "3")
    logits = read_mask(folder).logits[PLANTED].view(load_base(pico, torch.float32, torch.device("cpu"))
                                                    .get_parameter(PLANTED).shape)
    keep = torch.sigmoid(logits)
    with ExitStack() as stack:
        _, aligned, tasks = open_mask(folder, flags(pico, place), stack)
        energy = vector(tasks[0], aligned, PLANTED).square()
    shares = [float((k * e).sum() / e.sum()) for k, e in zip(keep.chunk(2), energy.chunk(2), strict=True)]
    assert shares[0] < 0.3
    assert shares[1] > 0.6
    models = {name: load_base(path, torch.float32, torch.device("cpu")) for name, path in (
        ("aligned", pico), ("tuned", place / "outputs" / "planted"), ("realigned", pico))}
    found = deltas(pico, place, folder, "threshold")
    with torch.no_grad():
        for name, change in found.items():
            models["realigned"].get_parameter(name).add_(change)
        margins = {name: float(margin(model)) for name, model in models.items()}
    assert margins["realigned"] > margins["aligned"]
    assert margins["realigned"] > margins["tuned"] + 1
    assert found[PLANTED][: len(keep) // 2].norm() < found[PLANTED][len(keep) // 2:].norm() / 2
    facts = manifest.read(folder)
    assert facts["inputs"]["base"] == fingerprint(pico)
    assert facts["parents"] == [str(pico), "planted"]
    assert facts["metrics"]["masked"] == facts["metrics"]["trainable_parameters"]
    numbers = json.loads((folder / "diagnostics.json").read_text())
    assert set(numbers["layers"]) == {"0", "1"}
    assert 0 < numbers["modules"]["down_proj"]["entropy"] < 1


def test_resume_equals_uninterrupted(pico, place, tmp_path, monkeypatch):
    from training.mask import MaskTrainer

    words = ("--aligned", "aligned", "--tasks", "one,two", "--merge_rule", "ties", "--save_steps", "2", "--learning_rate",
             "0.05", "--gradient_accumulation_steps", "2", "--mask_draws", "2", "--antithetic", "--final_temperature", "0.2")
    shutil.copytree(place / "outputs", tmp_path / "outputs", ignore=shutil.ignore_patterns("toy", ".*"))
    whole = train(pico, place, "whole", *words)
    step = MaskTrainer.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MaskTrainer, "training_step", dies)
        with pytest.raises(KeyboardInterrupt):
            train(pico, place, "whole", *words, out=tmp_path)
    assert not (tmp_path / "outputs" / "whole").exists()
    resumed = train(pico, place, "whole", *words, out=tmp_path)
    one, two = (read_mask(folder).logits for folder in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(float(value.abs().max()) > 0.05 for value in one.values())
    assert manifest.read(resumed)["metrics"]["steps"] == 4


@pytest.mark.parametrize("words", [
    ("--granularity", "rank", "--merge_rule", "task_arithmetic", "--rescale", "global"),
    ("--mask_on", "factors", "--granularity", "row", "--merge_rule", "dare", "--reference", "random_mask"),
    ("--mask_on", "weights", "--granularity", "head", "--merge_rule", "average", "--rescale", "expected"),
], ids=["rank", "factors", "weights"])
def test_several_lora_tasks(pico, place, words):
    """Trained, saved, opened again; an adapter and dense changes say the same."""
    name = "several_" + words[1]
    folder = train(pico, place, name, "--aligned", "aligned", "--tasks", "one,two", *words)
    mask = read_mask(folder)
    assert [task["name"] for task in mask.tasks] == ["one", "two"]
    assert any(value.abs().max() > 0 for value in mask.logits.values())
    found = deltas(pico, place, folder, "hard", 5)
    again = deltas(pico, place, folder, "hard", 5)
    assert all(torch.equal(found[name], again[name]) for name in found)
    with ExitStack() as stack:
        mask, aligned, tasks = open_mask(folder, flags(pico, place), stack)
        pairs = masked_adapter(folder, "hard", 5, (aligned, tasks), mask)
        if words[1] == "weights":
            assert pairs is None
            return
        own = read_adapter(place / "outputs" / "aligned").modules
        for module, (a, b) in pairs.items():
            before = own[module][1] @ own[module][0]
            torch.testing.assert_close(b @ a - before, found[f"{module}.weight"], rtol=1e-4, atol=1e-5)


def _untied(pico, folder):
    model = load_base(pico, torch.float32, torch.device("cpu"))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("words", [("--granularity", "rank"), ("--mask_on", "factors")], ids=["rank", "factors"])
def test_an_excluded_heads_lora_stays_whole(pico, place, make_adapter, tmp_path, words):
    """--mask_exclude head leaves the head's task vector as it is, also where masks act on LoRA's factors or components."""
    base = _untied(pico, tmp_path / "untied")
    make_adapter(base, tmp_path / "outputs" / "task", seed=6, targets=("q_proj", "lm_head"))
    logits = {}
    for kept in ("none", "head"):
        name = f"m_{kept}"
        words_now = (*words, "--data_path", str(place / "pairs.jsonl"), "--mask_exclude", kept, "--learning_rate", "0.3")
        train(base, place, name, "--tasks", "task", *words_now, out=tmp_path)
        logits[kept] = set(read_mask(tmp_path / "outputs" / name).logits)
    dropped = {"lm_head.lora_B"} | ({"lm_head.lora_A"} if words[0] == "--mask_on" else set())
    assert logits["none"] - logits["head"] == dropped
    assert logits["head"]
    b, a = (read_adapter(tmp_path / "outputs" / "task").modules["lm_head"][i] for i in (1, 0))
    found = {kept: deltas(base, tmp_path, tmp_path / "outputs" / f"m_{kept}", "hard", 3) for kept in logits}
    torch.testing.assert_close(found["head"]["lm_head.weight"], b @ a, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found["none"]["lm_head.weight"], b @ a, atol=1e-3)
    query = "model.layers.0.self_attn.q_proj"
    b, a = (read_adapter(tmp_path / "outputs" / "task").modules[query][i] for i in (1, 0))
    assert not torch.allclose(found["head"][f"{query}.weight"], b @ a, atol=1e-3)


def test_excluding_everything_is_refused_before_a_model_is_loaded(pico, place, make_adapter, tmp_path, monkeypatch, capsys):
    from training import mask_model

    base = _untied(pico, tmp_path / "untied")
    make_adapter(base, tmp_path / "head_only", seed=8, targets=("lm_head",))
    monkeypatch.setattr(mask_model, "load_base", lambda *a, **k: pytest.fail("loaded a model"))
    for words in (("--mask_on", "factors"), ("--granularity", "rank")):
        said = fails(capsys, base, place, "--tasks", str(tmp_path / "head_only"), *words, "--mask_exclude", "head")
        assert "nothing to mask" in said
        assert "--mask_exclude" in said


def test_a_live_model_and_its_export_agree(pico, place):
    """What training writes under a draw is what the export computes from the same mask."""
    from models.mask.bank import Draw, MaskBank
    from models.mask.settings import Rule, Settings
    from models.mask.slots import plan
    from training.mask_model import live_model

    folder = place / "outputs" / "several_weights"
    if not folder.is_dir():
        pytest.fail("needs the run of the test above")
    with ExitStack() as stack:
        mask, aligned, tasks = open_mask(folder, flags(pico, place), stack)
        for space, rule in (("weights", Rule("ties", 0.4, 0.2)), ("factors", Rule("task_arithmetic", 0.3))):
            settings = Settings(space=space, rule=rule, rescale="tensor")
            specs = plan(settings, aligned, tasks)
            model, slots = live_model(settings, specs, aligned, tasks, torch.float32, torch.float32, torch.device("cpu"))
            bank = MaskBank(slots, settings)
            # logits far from 0: every draw is their threshold
            generator = torch.Generator().manual_seed(0)
            bank.load_logits({n: 80 * torch.randn(v.shape, generator=generator).sign() for n, v in
                              bank.named_logits().items()})
            bank.write(Draw("any", hard=True))
            saved = type(mask)(settings, bank.named_logits(), mask.aligned, mask.tasks, {})
            for name, change in masked_deltas(folder, "threshold", 0, (aligned, tasks), saved):
                if space == "weights":
                    torch.testing.assert_close(model.get_parameter(name).detach(), aligned.weight(name) + change)
                else:
                    layer = model.get_submodule(name.removesuffix(".weight"))
                    live = layer.base_layer.weight + layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                    torch.testing.assert_close(live.detach(), aligned.weight(name) + change, rtol=1e-4, atol=1e-5)


def test_saved_masks_come_back_bit_for_bit(pico, place, tmp_path):
    mask = read_mask(place / "outputs" / "several_weights")
    save_mask(tmp_path / "m", mask.settings, mask.logits, mask.aligned, mask.tasks, mask.training)
    again = read_mask(tmp_path / "m")
    assert again.settings == mask.settings
    assert all(again.logits[n].dtype == v.dtype and torch.equal(again.logits[n], v) for n, v in mask.logits.items())
    assert (again.aligned, again.tasks, again.training) == (mask.aligned, mask.tasks, mask.training)
    values = load_file(tmp_path / "m" / "mask.safetensors")
    name = next(iter(values))
    from safetensors.torch import save_file

    save_file(values | {name: values[name] + 1}, tmp_path / "m" / "mask.safetensors")
    with pytest.raises(UserError, match="not the file"):
        read_mask(tmp_path / "m")
    (tmp_path / "m" / "mask.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_mask(tmp_path / "m")
    with pytest.raises(UserError, match="no mask"):
        read_mask(tmp_path / "nothing")


def test_a_wrong_base_is_refused_by_hash(pico, place, make_adapter, tmp_path, capsys):
    """Training refuses tasks of another aligned model, export models that are not those of the mask."""
    said = fails(capsys, pico, place, "--aligned", "aligned", "--tasks", "one,fresh", "--merge_rule", "ties")
    assert "fresh" in said
    assert "aligned" in said
    said = fails(capsys, pico, place, "--aligned", "one", "--tasks", "two")
    assert "two: was tuned from something else" in said
    folder = place / "outputs" / "several_weights"
    other = make_adapter(pico, tmp_path / "other" / "x", seed=9)
    record(other, init_adapter=manifest.sha256(place / "outputs" / "aligned" / "adapter_model.safetensors"))
    with ExitStack() as stack, pytest.raises(UserError, match="was trained on another task"):
        open_mask(folder, flags(pico, place), stack, tasks=["one", str(other)])
    with ExitStack() as stack, pytest.raises(UserError, match="another aligned model"):
        open_mask(folder, flags(pico, place), stack, aligned="two")


def test_a_moved_aligned_checkpoint_is_found_by_the_flag(pico, place, monkeypatch):
    """By the flag only where it was a checkpoint by path that is gone; a run that is gone is not replaced."""
    mask, opened = read_mask(place / "outputs" / "several_weights"), []

    def stop(name, *_):
        opened.append(str(name))
        raise UserError("enough")

    monkeypatch.setattr("models.mask.export.open_model", stop)
    path = "results/outputs/aligned"
    for name, folder in ((path, str(pico)), (path, "/gone"), ("nowhere", "/gone")):
        moved = dataclasses.replace(mask, aligned=mask.aligned | {"name": name, "folder": folder})
        monkeypatch.setattr("models.mask.export.read_mask", lambda _, moved=moved: moved)
        args = SimpleNamespace(results=place, cache_dir=None, model_name_or_path="elsewhere/aligned")
        with ExitStack() as stack, pytest.raises(UserError, match="enough"):
            open_mask(place / "m", args, stack)
    assert opened == [str(pico), "elsewhere/aligned", "/gone"]


def test_pairs_are_drawn_and_not_cut(monkeypatch):
    from training import dpo

    pairs = [Pair(f"p{i}", "good", "bad", 1) for i in range(100)]
    monkeypatch.setattr("data.sources.load_pairs", lambda *_, **__: pairs)
    args = SimpleNamespace(task_name="safety", max_train_samples=20, seed=1, data_path=None, data_source="embedded",
                           pair_contrast_share=0.0)
    found, held_out = dpo.drawn_pairs(args, {})
    assert held_out == []
    assert len(found) == 20
    assert max(pairs.index(pair) for pair in found) > 60
    assert found == dpo.drawn_pairs(args, {})[0] != dpo.drawn_pairs(SimpleNamespace(**vars(args) | {"seed": 2}), {})[0]


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_that_was_asked_for_reaches_the_trainer(pico, tmp_path, name):
    from trl import DPOConfig

    from flags import AlignArgs
    from training.trainer import training_arguments

    args = config.parse(AlignArgs, ["--moe_flag", "0", "--task_name", "safety", *common(pico, tmp_path)]).args
    assert training_arguments(args, {name: True}, DPOConfig, activation_checkpointing=False).gradient_checkpointing
    assert not training_arguments(args, {}, DPOConfig, activation_checkpointing=False).gradient_checkpointing


@pytest.mark.parametrize("words", [("--tasks", "one"), ("--tasks", "one,two", "--merge_rule", "average")])
def test_a_factor_without_effect_is_refused(pico, place, capsys, words):
    assert "--merge_lambda 0.1: has no effect" in fails(capsys, pico, place, *words, "--merge_lambda", "0.1")


def test_reference_log_probabilities_are_computed_once(pico, place, monkeypatch):
    from training.mask import MaskTrainer

    calls = []
    compute = MaskTrainer.compute_ref_log_probs
    monkeypatch.setattr(MaskTrainer, "compute_ref_log_probs", lambda self, *a: calls.append(1) or compute(self, *a))
    words = ("--aligned", "aligned", "--tasks", "one", "--max_steps", "1", "--max_train_samples", "5")
    train(pico, place, "first", *words)
    assert calls
    calls.clear()
    train(pico, place, "second", *words, "--granularity", "row", "--learning_rate", "0.1")
    assert not calls
    train(pico, place, "third", *words, "--reference", "merge")
    assert calls


@pytest.mark.parametrize("anchor", ["sft", "kl"])
def test_anchors_and_priors(pico, place, anchor):
    rows = [{"instruction": TEXTS[i % 3], "input": "", "output": "It is round"} for i in range(6)]
    (place / "english.json").write_text(json.dumps(rows))
    folder = train(pico, place, f"anchored_{anchor}", "--aligned", "aligned", "--tasks", "one", "--anchor", anchor,
                   "--anchor_tasks", "english", "--anchor_path", f"english={place / 'english.json'}", "--anchor_weight", "1",
                   "--keep_weight", "1", "--keep_prior", "0.2", "--straight_through", "--rescale", "none", "--max_steps",
                   "2")
    history = manifest.read(folder)["metrics"]["history"]
    assert all(entry["anchor"] > 0 for entry in history)
    assert manifest.read(folder)["metrics"]["kept"] < 0.5


def test_bad_command_lines(pico, place, capsys):
    said = fails(capsys, pico, place, "--tasks", "one,two", "--antithetic", "--mask_exclude", "bodies", "--tuning", "full",
                 "--anchor", "kl")
    for word in ("--merge_rule", "--antithetic", "--mask_exclude bodies", "--tuning", "--anchor_tasks"):
        assert word in said
    said = fails(capsys, pico, place, "--aligned", "aligned", "--tasks", "one", "--granularity", "layer")
    assert "--rescale" in said
    said = fails(capsys, pico, place, "--tasks", "planted", "--granularity", "rank")
    assert "--mask_on weights" in said
    assert "--tasks" in fails(capsys, pico, place)
