"""Merges whose values or settings mean nothing, or something else than in mergekit: refused or told; costs foretold."""

from __future__ import annotations

import json
import os

import pytest
import torch
from synthetic import make_checkpoint, read_all

from models import fuse
from models.merging import budget
from models.merging.methods import METHODS


@pytest.fixture
def inputs(tmp_path):
    base = make_checkpoint(tmp_path / "base", scale=0.5, dtype=torch.float32)
    for i, name in enumerate("ab"):
        make_checkpoint(tmp_path / name, seed=i + 1, base=base, scale=0.2, dtype=torch.float32)
    return tmp_path


def merged(folder, text):
    path = folder / "r.yml"
    path.write_text(text.replace("$", f"{folder}/"))
    fuse.main(["merge", "--recipe", str(path), "--output_dir", str(folder / "r"), "--threads", "1"])
    return read_all(folder / "r" / "outputs" / "merged")


def refused(folder, capsys, text="", *flags):
    path = folder / "r.yml"
    path.write_text(text.replace("$", f"{folder}/"))
    given = ["--recipe", str(path)] if text else flags
    with pytest.raises(SystemExit) as stopped:
        fuse.main(["merge", *given, "--output_dir", str(folder / "r")])
    assert stopped.value.code == 2
    assert not (folder / "r" / "outputs" / "merged").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize("method", ["linear", "karcher", "passthrough"])
def test_in_our_recipes_a_base_that_no_input_names_lends_its_configuration(inputs, method, caplog):
    path = inputs / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 77}))
    names = ["a"] if method == "passthrough" else ["a", "b"]
    text = f"method: {method}\ninputs: [{', '.join(f'{{model: ${n}}}' for n in names)}]\n"
    with caplog.at_level("INFO"):
        out = merged(inputs, text + "base: $base\n")
    assert "lends its configuration" in caplog.text
    assert json.loads((inputs / "r" / "outputs" / "merged" / "config.json").read_text())["max_position_embeddings"] == 77
    (inputs / "r").rename(inputs / "before")
    torch.testing.assert_close(out, merged(inputs, text))


@pytest.mark.parametrize(("text", "says"), [
    ("merge_method: linear\nmodels: [{model: $a, parameters: {weight: 1}}, {model: $b, parameters: {weight: -1}}]",
     "weights 1, -1 add up to 0, by which they would be divided; set normalize to false"),
    ("merge_method: linear\nparameters: {weight: [{filter: mlp, value: 1}, {value: 0}]}\nmodels: [{model: $a}, {model: $b}]",
     "weights 0, 0 add up to 0"),
    ("method: karcher\ninputs: [{model: $a, weight: 2}, {model: $b, weight: -2}]", "weights 2, -2 add up to 0"),
    ("merge_method: multislerp\nmodels: [{model: $a, parameters: {weight: 1}}, {model: $b, parameters: {weight: -1}}]",
     "set normalize_weights to false"),
    ("base_model: $a\ngate_mode: random\nexperts: [{source_model: $a}]", "experts: is a recipe of mergekit-moe"),
])
def test_what_has_no_value_is_refused_once(inputs, capsys, text, says):
    said = refused(inputs, capsys, text)
    assert says in said
    assert f"{inputs / 'r.yml'}:" in said
    assert said.count("error:") == 1


def test_weights_that_cancel_are_a_difference_when_they_are_not_divided(inputs):
    out = merged(inputs, "merge_method: linear\nparameters: {normalize: false}\nmodels: [{model: $a, parameters: "
                         "{weight: 1}}, {model: $b, parameters: {weight: -1}}]\n")
    a, b = read_all(inputs / "a"), read_all(inputs / "b")
    torch.testing.assert_close(out, {name: a[name] - b[name] for name in a})


@pytest.mark.parametrize("method", ["slerp", "nearswap", "arcee_fusion", "wise_ft"])
def test_a_base_is_no_model_beside_itself(inputs, capsys, method):
    parameters = {"slerp": "t=0.5", "nearswap": "t=0.5", "wise_ft": "alpha=0.5"}.get(method)
    said = refused(inputs, capsys, "", "--method", method, "--base_model", str(inputs / "base"), "--models",
                   str(inputs / "base"), *(["--parameters", parameters] if parameters else []))
    assert f"{method} takes 1 beside the base; here: 0" in said


@pytest.mark.parametrize("settings", [{"eos_token_id": [1, 5]}, {"attention_multiplier": 0.5}, {"sliding_window": 9}])
def test_any_setting_that_two_configurations_give_otherwise_is_told(inputs, settings, caplog):
    (key, value), = settings.items()
    for name, given in (("a", value), ("b", 3)):
        path = inputs / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: given, "transformers_version": name}))
    with caplog.at_level("INFO"):
        merged(inputs, "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: $a}, {model: $b}]\n")
    assert f"differ in {key} {value} and 3: the result keeps {inputs / 'a'}'s" in caplog.text
    assert json.loads((inputs / "r" / "outputs" / "merged" / "config.json").read_text())[key] == value


def test_negative_weights_divide_by_their_size_and_that_is_told(inputs, caplog):
    text = ("merge_method: ties\nbase_model: $base\nparameters: {normalize: true, density: 1}\n"
            "models: [{model: $a, parameters: {weight: -0.5}}]\n")
    with caplog.at_level("INFO"):
        out = merged(inputs, text)
    base, a = read_all(inputs / "base"), read_all(inputs / "a")
    # mergekit gives a itself: -0.5 / -0.5
    torch.testing.assert_close(out, {name: base[name] - (a[name] - base[name]) for name in a})
    assert "mergekit divides by the signed sum" in caplog.text


def test_one_folder_in_two_spellings_is_refused(inputs, capsys):
    said = refused(inputs, capsys, "merge_method: ties\nbase_model: $base\nmodels: [{model: $base/}, {model: $a}]\n")
    assert f"{inputs}/base and {inputs}/base/ are one folder" in said
    said = refused(inputs, capsys, "", "--method", "linear", "--models", f"{inputs}/a,{inputs}/base/../a")
    assert said.count("error:") == 1
    assert "--models: " in said


def test_a_model_that_is_not_there_is_told_by_its_own_flag(inputs, capsys):
    said = refused(inputs, capsys, "", "--method", "ties", "--base_model", f"{inputs}/no", "--models", f"{inputs}/a,no/such",
                   "--parameters", "density=1")
    assert f"--base_model {inputs}/no: " in said
    assert "--models no/such: " in said
    assert f"{inputs / 'r.yml'}: {inputs}/no: " in refused(inputs, capsys, "merge_method: linear\nmodels: [{model: $no}]\n")


def test_a_model_without_a_configuration_gives_none_and_that_is_told(inputs, caplog):
    (inputs / "a" / "config.json").unlink()
    with caplog.at_level("INFO"):
        merged(inputs, "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: $a}, {model: $b}]\n")
    assert f"{inputs / 'a'} has no config.json, so the result has none" in caplog.text


def test_keys_that_resemble_none_are_passed_over(inputs, caplog):
    with caplog.at_level("INFO"):
        merged(inputs, "license: mit\nmerge_method: linear\nparameters: {weight: 1}\nmodels: [{model: $a}, {model: $b}]\n")
    assert "license: no key of mergekit's" in caplog.text


@pytest.mark.parametrize(("scope", "rescale", "reads"), [("tensor", False, 3), ("model", False, 4), ("model", True, 5)])
def test_ties_over_the_model_is_foretold_with_its_fourth_walk(inputs, monkeypatch, scope, rescale, reads, capsys):
    from models.merging.execute import FileBlocks

    walks, original = [], FileBlocks.__iter__
    monkeypatch.setattr(FileBlocks, "__iter__", lambda self: walks.append(self.job.name) or original(self))
    flags = ["merge", "--method", "ties", "--base_model", str(inputs / "base"), "--models", f"{inputs / 'a'},{inputs / 'b'}",
             "--parameters", f"density=0.3; scope={scope}; rescale={str(rescale).lower()}", "--output_dir",
             str(inputs / "r"), "--threads", "1"]
    fuse.main([*flags, "--dry_run"])
    assert f"{reads} x at most" in capsys.readouterr().out
    fuse.main(flags)
    assert walks.count("model.norm.weight") == reads


def test_a_disk_too_full_for_a_probe_does_not_stop_a_plan(inputs, monkeypatch, capsys):
    def full(handle):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(budget.os, "fdatasync", full)
    fuse.main(["merge", "--method", "linear", "--models", f"{inputs / 'a'},{inputs / 'b'}", "--output_dir",
               str(inputs / "r"), "--dry_run"])
    assert "linear of 2 models" in capsys.readouterr().out


def test_sums_along_the_first_axis_are_part_of_the_promise():
    from types import SimpleNamespace

    parameters = METHODS["nuslerp"].parameters
    shape = (4, 64, 4096)

    def needed(**given):
        return budget.worker_bytes(SimpleNamespace(shape=shape, by_rows=True, tokens=None, pieces=(),
                                                   parameters=parameters((1.0, 1.0), **given)))

    plain = needed(nuslerp_flatten=False)
    # three sums in fp64 for each of the 64 x 4096 vectors, and as much again at once
    assert needed(nuslerp_flatten=False, nuslerp_row_wise=True) - plain >= 6 * 8 * 64 * 4096
    assert needed(nuslerp_row_wise=True) == plain
