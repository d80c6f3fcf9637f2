"""One base in memory, one change after the other: the bits of a sum in fp32 rounded once, whatever came before."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pico import make_adapter, make_pico
from pico_families import SETTINGS, make_family
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import models.adapters.resident as resident_module
from models.adapters.apply import add_to
from models.adapters.files import read_adapter
from models.adapters.resident import ResidentBase
from models.base.loading import load_base, settled, skeleton
from models.base.stored import keeps
from models.runs import keeping_base, load_run, release_base

CPU, IDS = torch.device("cpu"), torch.tensor([[5, 17, 60, 99]])


def whole(base, pairs, scales, dtype):
    """A whole model in fp32, changed, then cast: what the memory of two models buys."""
    model = load_base(base, torch.float32, CPU)
    add_to(model, pairs, scales)
    return settled(model, dtype, CPU)


def same(one, two):
    one, two = one.state_dict(), two.state_dict()
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


def changes_of(base, seed, heads=False):
    """Random changes of every linear layer, or of all but the head."""
    generator = torch.Generator().manual_seed(seed)
    model = load_base(base, torch.float32, CPU)
    pairs = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and (heads or module is not model.get_output_embeddings()):
            rows, columns = module.weight.shape[:: -1 if isinstance(module, Conv1D) else 1]
            pairs[name] = (torch.randn(3, columns, generator=generator), torch.randn(rows, 3, generator=generator))
    return pairs, {name: 0.01 * i for i, name in enumerate(pairs, 1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", sorted(SETTINGS))
def test_every_family_gets_the_bits_of_a_whole_sum(tmp_path, monkeypatch, kind, dtype):
    base = make_family(tmp_path / kind, kind)
    pairs, scales = changes_of(base, 1)
    want = whole(base, pairs, scales, dtype)
    # the matrices are read from the file: a whole model in fp32 is for what transformers renames
    monkeypatch.setattr(resident_module, "add_to", lambda *_: pytest.fail("summed in a whole fp32 model"))
    assert same(ResidentBase(base, dtype, CPU).changed(pairs, scales), want)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_counts_not_what_is_loaded(pico, tmp_path, stored, dtype):
    model = load_base(pico, torch.float32, CPU)
    base = tmp_path / "base"
    model.to(stored).save_pretrained(base)
    pairs, scales = changes_of(base, 2)
    assert same(ResidentBase(base, dtype, CPU).changed(pairs, scales), whole(base, pairs, scales, dtype))


def test_a_change_leaves_nothing_of_the_one_before(pico):
    resident = ResidentBase(pico, torch.bfloat16, CPU)
    first, scales = changes_of(pico, 3, heads=True)
    second = {name: pair for i, (name, pair) in enumerate(changes_of(pico, 4)[0].items()) if i % 2}
    model = resident.changed(first, scales)
    assert same(model, whole(pico, first, scales, torch.bfloat16))
    assert resident.changed(second) is model  # the same memory
    expected = whole(pico, second, None, torch.bfloat16).state_dict()
    # the first one gave the tied head a weight of its own, which is the embedding's again
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    plain = load_base(pico, torch.bfloat16, CPU).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in resident.plain().state_dict().items())


def test_no_parameter_is_held_in_fp32(pico, monkeypatch):
    asked = []
    monkeypatch.setattr(resident_module, "load_base", lambda *words: asked.append(words[1]) or load_base(*words))
    pairs, scales = changes_of(pico, 5)
    resident = ResidentBase(pico, torch.bfloat16, CPU)
    for _ in range(3):
        model = resident.changed(pairs, scales)
    assert asked == [torch.bfloat16]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("odd", ["names", "values"])
def test_weights_that_are_loaded_as_others_are_summed_whole(pico, monkeypatch, caplog, odd):
    pairs, scales = changes_of(pico, 6)
    want = whole(pico, pairs, scales, torch.bfloat16)

    def turned(*words):
        model = load_base(*words)
        if odd == "values" and words[1] is torch.bfloat16:
            # what a library that reorders rows as it loads would give
            model.model.layers[1].mlp.up_proj.weight.data = model.model.layers[1].mlp.up_proj.weight.data.flip(0)
        return model

    monkeypatch.setattr(resident_module, "load_base", turned)
    if odd == "names":
        monkeypatch.setattr(resident_module.StoredWeights, "hold", lambda *_: False)
    with caplog.at_level("INFO"):
        assert same(ResidentBase(pico, torch.bfloat16, CPU).changed(pairs, scales), want)
    assert "summed in fp32 on the CPU" in caplog.text


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("odd", ["names", "values"])
def test_joined_weights_that_were_not_rounded_are_summed_in_place(pico, tmp_path, monkeypatch, stored, odd):
    base = tmp_path / "base"
    load_base(pico, torch.float32, CPU).to(stored).save_pretrained(base)
    flipped = "model.layers.1.mlp.up_proj"

    def turned(*words):
        model = load_base(*words)
        if odd == "values":
            weight = model.get_submodule(flipped).weight
            weight.data = weight.data.flip(0)
        return model

    pairs, scales = changes_of(base, 7)
    want = {}
    for seed in (7, 8):
        model = turned(base, torch.float32, CPU)
        add_to(model, changes_of(base, seed)[0], scales)
        want[seed] = settled(model, stored, CPU)
    plain = turned(base, stored, CPU)
    monkeypatch.setattr(resident_module, "load_base", turned)
    if odd == "names":
        monkeypatch.setattr(resident_module.StoredWeights, "hold", lambda *_: False)
    monkeypatch.setattr(resident_module, "settled", lambda *_: pytest.fail("summed in a whole fp32 model"))
    resident = ResidentBase(base, stored, CPU)
    # one change after the other, each from the matrices as they were
    for seed in (7, 8, 7):
        assert same(resident.changed(changes_of(base, seed)[0], scales), want[seed])
    assert same(resident.plain(), plain)


def test_a_sweep_reads_its_factors_alone_where_matrices_may_stay(pico, monkeypatch):
    pairs, scales = changes_of(pico, 9)
    reads, skeletons, sizes = [], [], []
    real = resident_module.StoredWeights.read
    monkeypatch.setattr(resident_module.StoredWeights, "read", lambda self, name: reads.append(name) or real(self, name))
    monkeypatch.setattr(resident_module, "skeleton", lambda *words: skeletons.append(words) or skeleton(*words))

    def room(device, size, held):
        # all but one of the largest
        sizes.append(held + size)
        return name_of[len(sizes)] != "model.layers.1.mlp.up_proj"

    name_of = dict(enumerate(pairs, 1))
    monkeypatch.setattr(resident_module, "keeps", room)
    resident = ResidentBase(pico, torch.bfloat16, CPU)
    for weight in (0.1, 0.2, 0.3):
        resident.shapes()
        now = {name: scale * weight for name, scale in scales.items()}
        assert same(resident.changed(pairs, now), whole(pico, pairs, now, torch.bfloat16))
        if weight == 0.1:
            assert sorted(reads) == sorted(pairs)
            name_of |= dict.fromkeys(range(len(pairs), 99), "model.layers.1.mlp.up_proj")
    assert reads[len(pairs) :] == ["model.layers.1.mlp.up_proj"] * 2
    assert len(skeletons) == 1
    # what stays is counted: fp32 here, as the file has it
    model = load_base(pico, torch.float32, CPU)
    assert sizes[0] == model.get_submodule(next(iter(pairs))).weight.nbytes
    assert max(sizes) <= sum(model.get_submodule(name).weight.nbytes for name in pairs)
    resident.release()
    assert not resident._kept


def test_what_may_stay_on_a_gpu(monkeypatch):
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (800, 1000))
    assert keeps(gpu, 200, 0)
    assert not keeps(gpu, 201, 0)
    # 100 stay already, so 900 were free before
    assert keeps(gpu, 125, 100)
    assert not keeps(gpu, 126, 100)
    # the file system's cache is a CPU's memory
    assert not keeps(CPU, 1, 0)


def test_runs_of_one_base_share_it(tmp_path, pico, monkeypatch):
    results = tmp_path / "results"
    for i, name in enumerate(("one", "two")):
        make_adapter(pico, results / "outputs" / name, seed=i)
    args = SimpleNamespace(model_name_or_path=str(pico), cache_dir=None, dtype="bfloat16", device="cpu", threads=1, seed=1,
                           template="auto", results=results)
    runs = ("", "one", "one@0.6_two@0.4", "two", "one@1_two@-0.5", "")
    alone = [load_run(run, args).model.state_dict() for run in runs]
    loads = []
    monkeypatch.setattr(resident_module, "load_base", lambda *words: loads.append(words) or load_base(*words))
    with keeping_base():
        before = None
        for run, want in zip(runs, alone, strict=True):
            with keeping_base():
                loaded = load_run(run, args)
            assert all(torch.equal(value, want[name]) for name, value in loaded.model.state_dict().items())
            # what came before would no longer be what its name says
            assert before is None or before.model is None
            before = loaded
        assert len(loads) == 1
        release_base()
        assert before.model is None
        load_run("one", args)
        assert len(loads) == 2
    load_run("", args)
    assert len(loads) == 3


def test_another_base_takes_the_place_of_the_first(tmp_path, pico):
    other = make_pico(tmp_path / "other", seed=9)
    args = SimpleNamespace(cache_dir=None, dtype="float32", device="cpu", threads=1, seed=1, template="auto",
                           results=tmp_path)
    with keeping_base():
        for base in (pico, other, pico):
            args.model_name_or_path = str(base)
            assert same(load_run("", args).model, load_base(base, torch.float32, CPU))


def test_an_adapter_read_again_counts_as_it_is_now(tmp_path, pico):
    folder = make_adapter(pico, tmp_path / "a", seed=1)
    resident = ResidentBase(pico, torch.float32, CPU)
    one = read_adapter(folder, scaled=False)
    first = {name: value.clone() for name, value in resident.changed(one.modules, one.scales).state_dict().items()}
    file = folder / "adapter_model.safetensors"
    save_file({name: value * 2 for name, value in load_file(file).items()}, file)
    two = read_adapter(folder, scaled=False)
    model = resident.changed(two.modules, two.scales)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, first[name])]
    assert sorted(changed) == sorted(f"{name}.weight" for name in two.modules)
