"""The conflict report: every number against the dense weight changes, and three files that say the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from models.adapters import conflicts
from models.adapters.conflict_figure import grid
from models.adapters.conflicts import measure, summary
from models.adapters.files import Adapter, read_adapter
from models.fuse import main


def adapter(name, **modules):
    return Adapter(name, Path(name), {}, modules)


@pytest.fixture
def pair():
    """Two adapters that share one output axis of three, on one module."""
    torch.manual_seed(0)
    a, b = torch.randn(3, 20), torch.randn(30, 3)
    other = torch.cat([b[:, :1], torch.randn(30, 2)], 1)
    return adapter("one", m=(a, b)), adapter("two", m=(torch.randn(3, 20), 2 * other))


def test_every_number_is_that_of_the_dense_changes(pair):
    (found,) = measure(pair, seed=0)
    one, two = (p.modules["m"][1] @ p.modules["m"][0] for p in pair)
    bases = [torch.linalg.svd(d.double())[0][:, :3].numpy() for d in (one, two, one.T, two.T)]
    out, into = np.cos(subspace_angles(*bases[:2])), np.cos(subspace_angles(*bases[2:]))
    assert found.cosine == pytest.approx(float((one * two).sum() / one.norm() / two.norm()), abs=1e-6)
    assert found.norm_ratio == pytest.approx(float(two.norm() / one.norm()), rel=1e-5)
    assert found.overlap == pytest.approx((out**2).mean(), abs=1e-6)
    assert found.overlap_in == pytest.approx((into**2).mean(), abs=1e-6)
    assert found.angle == pytest.approx(0, abs=0.05)
    assert found.sign == pytest.approx(float((one * two < 0).float().mean()), abs=1e-3)


def test_equal_opposed_and_empty_changes(pair):
    a, b = pair[0].modules["m"]
    rows = measure([adapter("same", m=(a, b)), adapter("scaled", m=(a * 2, b)), adapter("opposed", m=(a, -b)),
                    adapter("empty", m=(a, b * 0))], seed=0)
    found = {(c.one, c.two): c for c in rows}
    same, opposed, empty = (found["same", other] for other in ("scaled", "opposed", "empty"))
    assert (same.cosine, same.norm_ratio, same.overlap, same.sign) == pytest.approx((1, 2, 1, 0), abs=1e-6)
    assert (opposed.cosine, opposed.overlap, opposed.sign) == pytest.approx((-1, 1, 1), abs=1e-6)
    assert (empty.cosine, empty.norm_ratio, empty.overlap, empty.angle, empty.sign) == (0, 0, 0, 90, 0)


def test_signs_of_large_modules_come_from_random_rows(monkeypatch):
    torch.manual_seed(1)
    parts = [adapter(n, m=(torch.randn(2, 50), torch.randn(2000, 2))) for n in "ab"]
    whole = [p.modules["m"][1] @ p.modules["m"][0] for p in parts]
    want = float((whole[0] * whole[1] < 0).float().mean())
    first = measure(parts, seed=0)[0].sign
    assert first == pytest.approx(want, abs=0.05)
    assert measure(parts, seed=0)[0].sign == first
    assert measure(parts, seed=1)[0].sign != first
    monkeypatch.setattr(conflicts, "SIGN_ROWS", 2000)
    assert measure(parts, seed=0)[0].sign == pytest.approx(want, abs=1e-6)


def test_the_summary_is_of_the_whole_changes():
    torch.manual_seed(2)
    parts = [adapter(n, **{m: (torch.randn(2, 9), size * torch.randn(9, 2)) for m, size in (("x", 1), ("y", 5))})
             for n in "ab"]
    (total,) = summary(measure(parts, seed=0))
    flat = [torch.cat([(p.modules[m][1] @ p.modules[m][0]).flatten() for m in "xy"]) for p in parts]
    assert total.cosine == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)), abs=1e-6)
    assert total.norm_ratio == pytest.approx(float(flat[1].norm() / flat[0].norm()), rel=1e-5)


def test_the_command_writes_json_table_and_picture(pico, adapters):
    main(["adapters", "--output_dir", str(adapters), "--run_name", "reported", "--overwrite"])
    folder = adapters / "outputs" / "reported"
    content = json.loads((folder / "conflicts.json").read_text())
    assert len(content["pairs"]) == 3
    assert len(content["modules"]) == 3 * len(read_adapter(adapters / "outputs" / "safety").modules)
    table = (folder / "conflicts.md").read_text()
    assert table.count("| all | helpfulness | safety |") == 1
    assert f"| {content['modules'][0]['cosine']:.3f} |" in table
    assert (folder / "conflicts.png").read_bytes()[:4] == b"\x89PNG"
    main(["adapters", "--output_dir", str(adapters), "--run_name", "silent", "--report", "false", "--overwrite"])
    assert not list((adapters / "outputs" / "silent").glob("conflicts*"))


def test_adapters_that_share_nothing(pico, make_adapter, tmp_path):
    for name, target in (("one", "q_proj"), ("two", "up_proj")):
        make_adapter(pico, tmp_path / "outputs" / name, targets=(target,))
    main(["adapters", "--adapters", "one,two", "--output_dir", str(tmp_path), "--run_name", "both"])
    folder = tmp_path / "outputs" / "both"
    assert "share no module" in (folder / "conflicts.md").read_text()
    assert not (folder / "conflicts.png").exists()


def test_the_grid_of_the_picture():
    row = conflicts.Conflict("", "a", "b", 1, 1, 0.5, 1, 0, 90, 0, 0.5)
    names = ("model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj", "model.layers.2.self_attn.q_proj", "lm_head")
    rows = [replace(row, module=name, cosine=i) for i, name in enumerate(names)]
    values, kinds = grid(rows, "cosine")
    assert kinds == ["mlp.up_proj", "self_attn.q_proj", "lm_head"]
    np.testing.assert_array_equal(values, [[0, np.nan, 1], [np.nan, np.nan, 2], [3, np.nan, np.nan]])
