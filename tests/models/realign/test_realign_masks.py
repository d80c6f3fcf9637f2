"""models/fuse.py realign with a trained mask, and with the same mask at random places."""

from __future__ import annotations

import json
from argparse import Namespace
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file

import manifest
from models.adapters.files import read_adapter
from models.fuse import main
from models.mask.files import identity, open_models, read_mask, save_mask
from models.mask.settings import Settings, rule_for
from models.mask.slots import plan
from models.realign.masks import shuffled

TASKS = ("safety", "helpfulness")


@pytest.fixture
def make_mask(pico, home):
    """Save a mask of random (or constant) logits for tasks on ``pico``; returns its name."""
    def make(name="m", tasks=TASKS[:1], constant=None, seed=0, **options):
        settings = Settings(rule=rule_for("task_arithmetic", len(tasks)), **options)
        args = Namespace(results=home, cache_dir=None, model_name_or_path=str(pico))
        generator = torch.Generator().manual_seed(seed)
        with ExitStack() as stack:
            aligned, found = open_models(args, "", tasks, False, stack)
            logits = {s.name: torch.full((s.units.size,), constant) if constant is not None else
                      2 * torch.randn(s.units.size, generator=generator)
                      for s in plan(settings, aligned, found) if s.units is not None}
            save_mask(home / "outputs" / name, settings, logits, identity(aligned), [identity(t) for t in found], {})
        return name
    return make


@pytest.fixture
def realign(pico, home):
    def run(*flags, name="out", base=pico):
        main(["realign", "--model_name_or_path", str(base), "--output_dir", str(home), "--run_name", name, *flags])
        return home / "outputs" / name
    return run


@pytest.fixture
def fails(realign, capsys):
    def run(*flags, **options):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            realign(*flags, name="bad", **options)
        assert stop.value.code == 2
        return capsys.readouterr().err
    return run


def change(folder, base):
    old, new = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    return {k: new[k] - old[k] for k in old if not torch.equal(old[k], new[k])}


def test_a_mask_that_keeps_all_is_the_plain_merge(pico, home, realign, make_mask):
    make_mask(constant=50.0)
    got, want = (change(realign(*flags, name=name), pico) for name, flags in (
        ("masked", ("--method", "mask", "--mask", "m")), ("plain", ("--tasks", "safety"))))
    assert got.keys() == want.keys()
    for key, value in got.items():
        torch.testing.assert_close(value, want[key], atol=1e-6, rtol=1e-5)


def test_all_task_vectors_are_in_the_export(pico, home, realign, make_mask):
    """The published export kept the first task's vector alone."""
    make_mask(tasks=TASKS, constant=50.0)
    folder = realign("--method", "mask", "--mask", "m")
    got = change(folder, pico)
    parts = [read_adapter(home / "outputs" / name).modules for name in TASKS]
    for key, value in got.items():
        want = 0.3 * sum(part[key.removesuffix(".weight")][1] @ part[key.removesuffix(".weight")][0] for part in parts)
        torch.testing.assert_close(value, want, atol=1e-5, rtol=1e-4)
    assert manifest.read(folder)["metrics"]["tasks"] == list(TASKS)
    assert set(manifest.read(folder)["inputs"]) == {"base", "mask", *TASKS}
    assert manifest.read(folder)["parents"][-1].endswith("outputs/m")


def test_a_hard_draw_repeats_by_seed_and_is_zero_where_the_mask_is(pico, realign, make_mask):
    make_mask()
    flags = ("--method", "mask", "--mask", "m", "--readout", "hard")
    one, two, three = (change(realign(*flags, "--seed", seed, name=f"h{i}"), pico) for i, seed in enumerate(("1", "1", "2")))
    key = next(iter(one))
    assert torch.equal(one[key], two[key])
    assert not torch.equal(one[key], three[key])
    assert 0.3 < float((one[key].abs() > 1e-7).float().mean()) < 0.7


@pytest.mark.parametrize("readout", ["expected", "threshold", "top:0.3", "hard"])
def test_the_control_keeps_as_much_at_other_places(pico, home, realign, make_mask, readout):
    make_mask(rescale="none")
    flags = ("--mask", "m", "--readout", readout)
    mine, control, other = (change(realign("--method", method, *flags, "--seed", seed, name=name), pico)
                            for name, method, seed in (("a", "mask", "1"), ("b", "random_mask", "1"),
                                                       ("c", "random_mask", "2")))
    key = next(iter(mine))
    if readout != "expected":
        kept = [float((x[key].abs() > 1e-7).float().mean()) for x in (mine, control)]
        assert kept[0] == pytest.approx(kept[1], abs=0.02 if readout == "hard" else 1e-3)
    assert not torch.allclose(mine[key], control[key], atol=1e-3)
    assert not torch.equal(control[key], other[key])


def test_shuffling_keeps_every_value(home, make_mask):
    mask = read_mask(home / "outputs" / make_mask())
    other = shuffled(mask, 3)
    assert mask.logits.keys() == other.logits.keys()
    for name, values in mask.logits.items():
        assert torch.equal(values.sort().values, other.logits[name].sort().values)
        assert not torch.equal(values, other.logits[name])
    assert all(torch.equal(v, shuffled(mask, 3).logits[k]) for k, v in other.logits.items())


def test_rank_and_factor_masks_are_adapters_without_loss(pico, home, realign, make_mask):
    for name, options in (("rank", {"granularity": "rank"}), ("factors", {"space": "factors"})):
        make_mask(name, **options)
        flags = ("--method", "mask", "--mask", name, "--readout", "threshold")
        dense = change(realign(*flags, name=f"{name}_dense"), pico)
        folder = realign(*flags, "--output", "adapter", name=f"{name}_low")
        modules = read_adapter(folder).modules
        for key, value in dense.items():
            a, b = modules[key.removesuffix(".weight")]
            torch.testing.assert_close(b @ a, value, atol=1e-5, rtol=1e-4)
        assert all(row["error"] == 0 for row in json.loads((folder / "truncation.json").read_text()))


def test_an_element_mask_needs_a_rank_for_an_adapter(home, realign, make_mask, fails):
    make_mask()
    flags = ("--method", "mask", "--mask", "m", "--readout", "hard", "--output", "adapter")
    assert "has no low rank; add --rank N" in fails(*flags)
    folder = realign(*flags, "--rank", "5")
    assert manifest.read(folder)["metrics"]["truncation_error"] > 0.05


def test_other_models_and_bad_flags(pico, home, tmp_path, make_mask, fails):
    from pico import make_pico

    make_mask()
    assert "was trained on another task" in fails("--method", "mask", "--mask", "m", "--tasks", "helpfulness")
    other = make_pico(tmp_path / "other", seed=4)
    assert "was trained on another aligned model" in fails("--method", "mask", "--mask", "m", "--aligned", str(other))
    assert "holds no mask" in fails("--method", "mask", "--mask", "safety")
    assert "--readout top: needs the share" in fails("--method", "mask", "--mask", "m", "--readout", "top")
    said = fails("--method", "mask", "--mask", "m", "--rule", "ties", "--parameters", "x=1")
    assert "--rule ties: stands in the mask's own manifest" in said
    assert "--parameters x=1: stands in" in said
    assert "--readout hard: belongs to a trained mask" in fails("--tasks", "safety", "--readout", "hard")
