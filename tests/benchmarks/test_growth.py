"""--growth of benchmarks/merge.py and adapters.py: slopes of known laws, limits linear in bytes, small runs of both."""

from __future__ import annotations

import json
import sys

import pytest
from safetensors.torch import load_file

from benchmarks import growth, peers


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    # as where the races are started by their path
    monkeypatch.setitem(sys.modules, "growth", growth)
    monkeypatch.setitem(sys.modules, "peers", peers)


def test_slopes_of_known_laws():
    points = [{"n": n, "square": 3.0 * n * n, "late": 7.0 if n < 8 else n, "few": 5 * n if n > 4 else None}
              for n in (1, 2, 4, 8, 16)]
    slopes = growth.with_slopes("n", points, ("square", "late", "few", "nowhere"))["slopes"]
    assert slopes == pytest.approx({"square": 2, "late": pytest.approx(0.596, abs=1e-3), "few": 1})


def test_a_picture_of_all_axes_and_units(tmp_path):
    points = [{"n": n, "ours": n / 2, "limit": 1.0} for n in (1, 2)]
    part = growth.with_slopes("n", points, ("ours", "limit"))
    growth.plot({"n, linear": part}, {"s": ("ours", "limit"), "GiB": ("nothing",)}, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000
    assert growth.told({"n, linear": part}) == "n, linear: ours 1.00, limit 0.00"


@pytest.fixture
def merge(monkeypatch):
    from benchmarks import merge

    # a small vocabulary: 2 M weights and not 17 M are the least
    monkeypatch.setitem(merge.SHAPES, "1.1B", (22, 2048, 5632, 256, 384))
    monkeypatch.setattr(merge, "apart", lambda function, *words: function(*words))
    return merge


@pytest.mark.parametrize("weights", [2e6, 2e7, 1e9])
def test_a_shape_has_about_the_weights_asked_for(merge, weights):
    layers, hidden, ffn, kv, vocabulary = merge.shape_of(weights)
    made = layers * (2 * hidden**2 + 2 * hidden * kv + 3 * hidden * ffn) + 2 * vocabulary * hidden
    assert made == pytest.approx(weights, rel=0.2)
    assert hidden % 32 == 0
    assert kv % (hidden // 32) == 0


def test_growth_of_merges(merge, tmp_path, monkeypatch, capsys):
    seen = []

    def timed(command):
        if "--recipe" not in command:
            return 0.5, 2**20
        text = (tmp_path / "work" / f"{command[command.index('--run_name') + 1]}.yml").read_text()
        seen.append(text.count("- model:"))
        # a start-up of .5 s and a second for each input
        return 0.5 + seen[-1], 2**30

    monkeypatch.setattr(merge, "timed", timed)
    monkeypatch.setattr(merge, "io_seconds", lambda files, written, *_: (len(files) / 3, 1.0))
    monkeypatch.setattr(merge, "GROWTH", {"weights": (2e6, 4e6), "models": (2, 3, 4, 8), "at": 2e6})
    file = tmp_path / "growth.json"
    words = ["--growth", str(file), "--methods", "linear,ties", "--pairs", "1", "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["merge.py", *words])
    merge.main()
    found = json.loads(file.read_text())
    assert set(found["axes"]) == {"weights, linear", "models, linear", "weights, ties", "models, ties"}
    # linear takes the base as one more input, three models beside it along the weights
    assert seen == [4, 4, 3, 4, 5, 9, 3, 3, 2, 3, 4, 8]
    part = found["axes"]["models, linear"]
    assert [p["models"] for p in part["points"]] == [2, 3, 4, 8]
    assert [p["work"] for p in part["points"]] == [3, 4, 5, 9]
    # the base is read, and the result written, whatever the number of models
    size = part["points"][0]["written_bytes"]
    assert [p["read_bytes"] for p in part["points"]] == pytest.approx([3 * size, 4 * size, 5 * size, 9 * size], rel=1e-3)
    speed = found["bytes_per_second"]
    for p in part["points"]:
        assert p["limit"] == pytest.approx(p["read_bytes"] / speed["read"] + size / speed["write"])
    assert 0 < part["slopes"]["limit"] < 1
    assert found["axes"]["weights, linear"]["slopes"]["limit"] == pytest.approx(1)
    assert file.with_suffix(".png").stat().st_size > 1000
    assert "models, ties: ours" in capsys.readouterr().out


def test_a_merge_of_growth_is_a_merge(merge, tmp_path):
    inputs = {name: tmp_path / name for name in ("base", "m0", "m1")}
    for seed, folder in enumerate(inputs.values()):
        merge.synthesise(folder, seed, (2, 64, 96, 32, 128), 2, inputs["base"] if seed else None)
    rows, ours, _ = merge.in_turn("linear", inputs, tmp_path, 1, None, 1)
    assert set(rows) == {"ours"}
    assert rows["ours"][0][1] > 2**20

    def weight(folder):
        return next(tensors[name] for file in folder.glob("*.safetensors") if name in (tensors := load_file(file))).float()

    name = "model.layers.1.mlp.up_proj.weight"
    # .33 of each, in bfloat16
    wanted = 0.33 * sum(weight(folder) for folder in inputs.values())
    assert (weight(ours) - wanted).abs().max() < 2**-8 * wanted.abs().max()


def test_growth_of_adapters(tmp_path, monkeypatch):
    from benchmarks import adapters

    monkeypatch.setattr(adapters, "GROWTH", {"hidden": (64, 128), "adapters": (2, 3), "at": 64})
    monkeypatch.setattr(adapters, "_machine", lambda threads: {"copy": 1e6, "product": 1e6})
    # in this process: that each is a fresh one is the race's affair
    monkeypatch.setattr(adapters, "_worker", lambda side, name, folder, threads: adapters.grown(name, folder, threads))
    file = tmp_path / "growth.json"
    adapters.main(["--growth", str(file), "--layers", "1", "--pairs", "1", "--threads", "1"])
    axes = json.loads(file.read_text())["axes"]
    assert set(axes) == {f"{axis}, {name}" for axis in ("hidden", "adapters") for name in adapters.GROWN}
    cat, svd = (axes[f"adapters, {name}"]["points"] for name in ("cat", "svd to r 8"))
    # factors of rank 8 on four d x d and three f x d matrices, fp32
    one = 8 * (4 * 2 * 64 + 3 * (64 + 172)) * 4
    assert [p["limit MB"] * 2**20 for p in cat] == [4 * one, 6 * one]
    assert [p["limit MB"] * 2**20 for p in svd] == [3 * one, 4 * one]
    assert cat[0]["limit"] == pytest.approx(4 * one / 1e6)
    # two QRs and two products: quadratic in the rank of all together
    assert svd[1]["limit"] / svd[0]["limit"] == pytest.approx(9 / 4)
    assert all(p["ours"] > 0 and p["peak MB"] > 1 for part in axes.values() for p in part["points"])
    assert axes["hidden, cat"]["slopes"]["limit"] == pytest.approx(1, abs=0.01)
    assert file.with_suffix(".png").stat().st_size > 1000
