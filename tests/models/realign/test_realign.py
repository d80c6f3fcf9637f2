"""models/fuse.py realign on pico models: adapters and checkpoints, one task and several, wrong bases, bad flags."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from pico import make_pico
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import manifest
from models.adapters.files import read_adapter
from models.checkpoints.fingerprints import fingerprint
from models.fuse import main
from models.operators.noise import uniform
from models.realign import walk

IDS = torch.arange(10, 40)[None]


@pytest.fixture
def realign(pico, home):
    def run(*flags, base=pico, name="out"):
        main(["realign", "--model_name_or_path", str(base), "--output_dir", str(home), "--run_name", name, *flags])
        return home / "outputs" / name
    return run


@pytest.fixture
def fails(realign, home, capsys):
    def run(*flags, **options):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            realign(*flags, name="bad", **options)
        assert stop.value.code == 2
        assert not (home / "outputs" / "bad").exists()
        return capsys.readouterr().err
    return run


def weights(folder):
    return load_file(folder / "model.safetensors")


def delta(home, name, module):
    a, b = read_adapter(home / "outputs" / name).modules[module]
    return b @ a


def modules(home, name="safety"):
    return sorted(read_adapter(home / "outputs" / name).modules)


def logits(folder, base=None):
    with torch.no_grad():
        if base is None:
            return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)(IDS).logits


def test_a_plain_merge_is_the_tuned_model_as_a_checkpoint(pico, home, realign, capsys):
    folder = realign("--tasks", "safety")
    torch.testing.assert_close(logits(folder), logits(home / "outputs" / "safety", pico), atol=1e-4, rtol=1e-4)
    made = manifest.read(folder)
    assert made["inputs"]["base"] == fingerprint(pico)
    assert set(made["inputs"]) == {"base", "safety"}
    assert made["metrics"]["change_norm"] == pytest.approx(made["metrics"]["task_norm"])
    assert (folder / "tokenizer_config.json").is_file()
    assert weights(folder).keys() == weights(pico).keys()
    changed = {f"{m}.weight" for m in modules(home)}
    assert all(torch.equal(v, weights(pico)[k]) for k, v in weights(folder).items() if k not in changed)
    capsys.readouterr()
    realign("--tasks", "safety")
    assert "already realigned" in capsys.readouterr().out


def test_an_adapter_holds_low_rank_results_without_loss(pico, home, realign):
    folder = realign("--tasks", "safety,helpfulness", "--rule", "task_arithmetic", "--rule_parameters", "lambda=0.4",
                     "--output", "adapter")
    for module in modules(home):
        want = 0.4 * (delta(home, "safety", module) + delta(home, "helpfulness", module))
        torch.testing.assert_close(delta(home, "out", module), want, atol=1e-5, rtol=1e-4)
    assert read_adapter(folder).config["r"] == 8
    dense = realign("--tasks", "safety,helpfulness", "--rule", "task_arithmetic", "--rule_parameters", "lambda=0.4",
                    name="dense")
    torch.testing.assert_close(logits(folder, pico), logits(dense), atol=1e-4, rtol=1e-4)
    # a realigned adapter is an adapter of this base like any other
    again = realign("--tasks", "out", "--method", "wise_ft", "--parameters", "alpha=0.5", "--output", "adapter", name="half")
    torch.testing.assert_close(delta(home, "half", modules(home)[0]), delta(home, "out", modules(home)[0]) / 2, atol=1e-5,
                               rtol=1e-4)
    assert again.is_dir()


def test_a_masked_change_needs_a_declared_rank_and_reports_its_error(home, realign, fails, capsys):
    flags = ("--tasks", "safety", "--method", "dare", "--output", "adapter")
    assert "has no low rank; add --rank N" in fails(*flags)
    folder = realign(*flags, "--rank", "6")
    found = json.loads((folder / "truncation.json").read_text())
    module = found[0]["module"]
    name = f"{module}.weight"
    whole = delta(home, "safety", module)
    keep = uniform(42, f"dare/{name}", 0, 0, whole.numel()).view(whole.shape) >= 0.3
    dropped = whole * keep / 0.7
    lost = float((dropped - delta(home, "out", module)).norm() / dropped.norm())
    assert found[0]["error"] == pytest.approx(lost, rel=1e-3)
    assert lost > 0.1
    assert "of the norm cut off" in capsys.readouterr().out


def test_checkpoints_as_tasks(pico, home, realign):
    realign("--tasks", "safety", name="one")
    realign("--tasks", "helpfulness", name="two")
    old, one, two = (weights(f) for f in (pico, home / "outputs" / "one", home / "outputs" / "two"))
    folder = realign("--tasks", "one,two", "--rule", "ties")
    flat = [torch.cat([(new[k] - old[k]).flatten() for k in sorted(old)]) for new in (one, two)]
    kept = []
    for vector in flat:
        k = int(0.2 * len(vector) + 1e-6)
        places = vector.abs().topk(k).indices
        kept.append(torch.zeros_like(vector).index_copy(0, places, vector[places]))
    sign = (kept[0] + kept[1]).sign()
    want = 0.4 * sum(torch.where(v.sign() == sign, v, torch.zeros(())) for v in kept)
    got = weights(folder)
    have = torch.cat([(got[k] - old[k]).flatten() for k in sorted(old)])
    torch.testing.assert_close(have, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_the_magnitude_mask_keeps_its_share_of_the_model_or_of_each_tensor(home, pico, realign, scope):
    got = weights(realign("--tasks", "safety", "--method", "magnitude", "--parameters", f"kept=0.25; scope={scope}"))
    old, names = weights(pico), [f"{m}.weight" for m in modules(home)]
    shares = [float(((got[n] - old[n]).abs() > 1e-7).float().mean()) for n in names]
    whole = sum(s * old[n].numel() for s, n in zip(shares, names, strict=True)) / sum(old[n].numel() for n in names)
    assert whole == pytest.approx(0.25, abs=0.01)
    assert (max(shares) - min(shares) < 0.01) == (scope == "tensor")
    if scope == "model":
        left = min(float((got[n] - old[n]).abs()[(got[n] - old[n]).abs() > 1e-7].min()) for n in names)
        gone = max(float(delta(home, "safety", n.removesuffix(".weight"))[(got[n] - old[n]).abs() <= 1e-7].abs().max())
                   for n in names)
        assert gone <= left + 1e-5


def test_ties_on_tensors_and_magnitude_together(home, realign):
    folder = realign("--tasks", "safety,helpfulness", "--method", "magnitude", "--parameters", "kept=0.5; scope=tensor",
                     "--rule", "ties", "--rule_parameters", "density=0.2; scope=tensor; lambda=1")
    rows = json.loads((folder / "realign.json").read_text())
    assert len(rows) == len(modules(home))
    assert all(0 < row["change"] < row["tasks"] * 2 for row in rows)


def test_random_masks_differ_by_seed_and_repeat_by_seed(realign, pico, home):
    flags = ("--tasks", "safety", "--method", "random_mask", "--parameters", "kept=0.4")
    one, two, three = (weights(realign(*flags, "--seed", seed, name=f"m{i}")) for i, seed in enumerate(("1", "1", "2")))
    name = f"{modules(home)[0]}.weight"
    assert torch.equal(one[name], two[name])
    assert not torch.equal(one[name], three[name])
    rates = manifest.read(home / "outputs" / "m0")["metrics"]
    assert rates["kept"] == pytest.approx(0.4, abs=0.03)


def test_safety_vectors_of_an_unaligned_model(pico, tmp_path, home, realign):
    """Aligned: pico + safety, baked; tuned from it: an adapter on that; unaligned: pico."""
    from pico import make_adapter

    aligned = realign("--tasks", "safety", name="aligned")
    make_adapter(aligned, home / "outputs" / "tuned", seed=9)
    got = weights(realign("--tasks", "tuned", "--method", "resta", "--parameters", "gamma=0.25", "--unaligned", str(pico),
                          base=aligned))
    name = f"{modules(home)[0]}.weight"
    want = weights(aligned)[name] + delta(home, "tuned", modules(home)[0]) + 0.25 * delta(home, "safety", modules(home)[0])
    torch.testing.assert_close(got[name], want, atol=1e-5, rtol=1e-4)
    for method, extra in (("safe_lora", ()), ("safe_merge", ("--safe", "aligned"))):
        folder = realign("--tasks", "tuned", "--method", method, "--parameters", "tau=0.9", "--unaligned", str(pico), *extra,
                         base=aligned, name=method)
        assert manifest.read(folder)["metrics"]["layers_changed"] > 0
    # the safe model is the aligned one: flagged layers keep half of the task's change
    half = weights(home / "outputs" / "safe_merge")[name] - weights(aligned)[name]
    torch.testing.assert_close(half, delta(home, "tuned", modules(home)[0]) / 2, atol=1e-5, rtol=1e-4)


def test_an_aligned_adapter_and_what_goes_on_from_it(pico, home, realign, fails):
    """The published LoRA track: tasks continue the aligned adapter; the task vector is B_i A_i - B_s A_s."""
    said = fails("--aligned", "safety", "--tasks", "helpfulness")
    assert "nothing records that it was tuned from the adapter safety" in said
    path = home / "outputs" / "helpfulness" / "manifest.json"
    content = json.loads(path.read_text())
    content["inputs"]["init_adapter"] = manifest.sha256(home / "outputs" / "safety" / "adapter_model.safetensors")
    path.write_text(json.dumps(content))
    module = modules(home)[0]
    safe, tuned = delta(home, "safety", module), delta(home, "helpfulness", module)
    flags = ("--aligned", "safety", "--tasks", "helpfulness", "--method", "wise_ft", "--parameters", "alpha=0.25")
    got = weights(realign(*flags))[f"{module}.weight"]
    want = weights(pico)[f"{module}.weight"] + 0.75 * safe + 0.25 * tuned
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    realign(*flags, "--output", "adapter", name="low")
    torch.testing.assert_close(delta(home, "low", module), 0.75 * safe + 0.25 * tuned, atol=1e-5, rtol=1e-4)
    assert read_adapter(home / "outputs" / "low").config["r"] == 8
    content["inputs"]["init_adapter"] = "0" * 64
    path.write_text(json.dumps(content))
    assert "(fingerprint 000000000000, not" in fails(*flags, "--trust_base")


def test_another_base_is_refused_by_its_hash(home, tmp_path, realign, fails):
    other = make_pico(tmp_path / "other", seed=5)
    said = fails("--tasks", "safety,helpfulness", "--rule", "average", base=other)
    assert said.count("was tuned from something else than the checkpoint") == 2
    # a checkpoint without a record: only on the user's word; with another hash: never
    copy = shutil.copytree(realign("--tasks", "safety", name="tuned"), tmp_path / "copy")
    assert "something else" in fails("--tasks", str(copy), "--trust_base", base=other)
    (copy / "manifest.json").unlink()
    assert "nothing records" in fails("--tasks", str(copy))
    realign("--tasks", str(copy), "--trust_base")


def test_models_of_another_shape_and_missing_ones(tmp_path, fails):
    deep = make_pico(tmp_path / "deep", layers=3)
    said = fails("--tasks", f"{deep},nothing/here", "--rule", "average", "--trust_base")
    assert "tensors do not fit the aligned model" in said
    assert "--tasks nothing/here: neither a local folder nor to be had from the hub" in said


def test_every_bad_flag_at_once(fails):
    said = fails("--tasks", "safety,safety", "--method", "resta", "--rank", "4", "--mask", "m", "--safe", "x", "--run_name",
                 "a/b")
    for part in ("the same model twice", "--rule: 2 tasks need one of task_arithmetic", "--unaligned: resta needs it",
                 "--rank 4: a checkpoint has none", "--mask m: resta reads none", "--safe x: resta reads none",
                 "--run_name a/b"):
        assert part in said
    said = fails("--tasks", "safety", "--method", "wise_ft", "--parameters", "alpha=3; beta=1", "--rule_parameters", "x=1")
    for part in ("out of range", "beta=1: not a parameter here", "--rule_parameters x=1: not a parameter"):
        assert part in said
    assert "--mask: name the run" in fails("--method", "mask")
    assert "did you mean wise_ft" in fails("--tasks", "safety", "--method", "wiseft")


def test_help_of_the_parameters(realign, capsys):
    realign("--parameters", "help")
    assert "--rule ties: arXiv 2306.01708" in capsys.readouterr().out


def test_an_input_is_not_overwritten_and_a_changed_one_is_noticed(home, realign, capsys):
    with pytest.raises(SystemExit):
        realign("--tasks", "safety", name="safety")
    assert "is an input" in capsys.readouterr().err
    realign("--tasks", "safety")
    shutil.copy(home / "outputs" / "helpfulness" / "adapter_model.safetensors", home / "outputs" / "safety")
    with pytest.raises(SystemExit):
        realign("--tasks", "safety")
    assert "another configuration (inputs:" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "passes"), [
    ((), 1),
    (("--method", "magnitude", "--parameters", "kept=0.5"), 3),
    (("--method", "magnitude", "--parameters", "kept=0.5; scope=tensor"), 1),
    (("--rule", "ties"), 3),
    (("--rule", "ties", "--rule_parameters", "scope=tensor"), 1),
    (("--method", "magnitude", "--parameters", "kept=0.5", "--rule", "ties"), 5),
])
def test_models_are_read_as_often_as_the_selection_needs(home, realign, monkeypatch, flags, passes):
    reads, read = [], walk.vector
    monkeypatch.setattr(walk, "vector", lambda model, other, name: reads.append(name) or read(model, other, name))
    tasks = ("safety", "helpfulness") if "--rule" in flags else ("safety",)
    realign("--tasks", ",".join(tasks), *flags)
    assert len(reads) == passes * len(tasks) * len(modules(home))
    # one weight at a time, in the same order in every pass
    once = list(dict.fromkeys(reads))
    assert reads == [name for name in once for _ in tasks] * passes
