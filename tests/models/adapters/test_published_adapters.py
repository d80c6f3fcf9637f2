"""Two adapters of the published shape: fused exactly, without a base model, as vLLM serves them; the time is printed."""

from __future__ import annotations

import time

import torch
from published_adapters import passes_vllm, published_shape

from models import fuse
from models.adapters.files import WEIGHTS, read_adapter
from models.adapters.fuse import fuse as fuse_pairs
from models.adapters.methods import ADAPTER_METHODS, Cat


def test_two_published_adapters_fuse_exactly_without_a_base_model(tmp_path, capsys):
    for seed, name in enumerate(("aoa", "aoa_safety")):
        published_shape(tmp_path / "outputs" / name, seed)
    start = time.perf_counter()
    done = fuse_pairs([read_adapter(tmp_path / "outputs" / name) for name in ("aoa", "aoa_safety")], ADAPTER_METHODS["cat"],
                      Cat(), (0.6, 0.4), {}, 0)
    in_memory, start = time.perf_counter() - start, time.perf_counter()
    fuse.main(["adapters", "--adapters", "aoa,aoa_safety", "--share", "0.4", "--report", "false", "--run_name", "fused",
               "--output_dir", str(tmp_path)])
    files = time.perf_counter() - start
    folder = tmp_path / "outputs" / "fused"
    passes_vllm(folder, 16)
    # two adapters of 64 modules and 4,194,304 weights: the factors alone, no copy of the embeddings
    assert 2 * 4_194_304 * 4 < (folder / WEIGHTS).stat().st_size < 2 * 4_194_304 * 4 + 50_000
    assert len(done) == 64
    with capsys.disabled():
        print(f"\ntwo published adapters: read and fused in {in_memory:.2f} s; from files to file in {files:.2f} s")
    fused, *parts = (read_adapter(tmp_path / "outputs" / name) for name in ("fused", "aoa", "aoa_safety"))
    assert len(fused.modules) == 64
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.31.self_attn.v_proj"):
        (a, b), (at, bt), (as_, bs) = (adapter.modules[module] for adapter in (fused, *parts))
        torch.testing.assert_close(b @ a, 0.6 * bt @ at + 0.4 * bs @ as_, atol=1e-6, rtol=1e-5)
