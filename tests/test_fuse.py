"""models/fuse.py: the concatenated adapter is the weighted sum of the weight changes, and PEFT loads it."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from models.adapter_files import read_adapter
from models.fuse import main


def _fuse(pico, results, *flags):
    main(["--model_name_or_path", str(pico), "--output_dir", str(results), *flags])


def _delta(adapter, module):
    a, b = adapter.modules[module]
    return b @ a


@pytest.mark.parametrize(("flags", "weights"), [((), (1 / 3, 1 / 3, 1 / 3)), (("--weights", "0.5,-1,2"), (0.5, -1, 2))])
def test_the_sum_is_exact(pico, adapters, flags, weights):
    _fuse(pico, adapters, *flags, "--run_name", "sum", "--overwrite")
    parts = [read_adapter(adapters / "outputs" / n) for n in ("helpfulness", "safety", "truthfulness")]
    fused = read_adapter(adapters / "outputs" / "sum")
    assert set(fused.modules) == set(parts[0].modules)
    for module in fused.modules:
        want = sum(w * _delta(part, module) for w, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(_delta(fused, module), want, atol=1e-6, rtol=1e-5)


def test_peft_loads_it_with_the_logits_of_the_sum(pico, adapters):
    _fuse(pico, adapters, "--run_name", "loaded")
    folder = adapters / "outputs" / "loaded"
    ids = torch.arange(10, 26)[None]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico), folder)
    dense = AutoModelForCausalLM.from_pretrained(pico)
    with torch.no_grad():
        for module in (fused := read_adapter(folder)).modules:
            dense.get_submodule(module).weight += _delta(fused, module)
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("flags", "says"), [
    (("--weights", "1,2"), "3 adapters need as many weights"),
    (("--weights", "1,x,2"), "needs numbers"),
    (("--adapters", "helpfulness,nothing"), "adapter 'nothing'"),
    (("--method", "ties"), "not known"),
])
def test_bad_input(pico, adapters, capsys, flags, says):
    with pytest.raises(SystemExit) as stop:
        _fuse(pico, adapters, *flags, "--run_name", "bad")
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
    assert not (adapters / "outputs" / "bad").exists()
