"""Parameters that --plan counts: those that transformers makes, without a weight in memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from pico_families import make_family

from models.base.loading import skeleton
from models.footprint import command, fusing
from models.footprint.shapes import ATTENTION, FFN, counted, of_skeleton, shape_of


def test_the_configurations_arithmetic_is_the_models(pico):
    """Of a known family both ways agree in every number, so that it does not matter which one a command takes."""
    assert counted(pico)
    assert of_skeleton(pico) == shape_of(str(pico))


@pytest.mark.parametrize(("kind", "arithmetic"), [("qwen2", True), ("llama", False), ("gemma2", False), ("phi3", False)])
def test_every_family_is_counted_to_the_last_number(kind, arithmetic, tmp_path):
    folder = make_family(tmp_path / kind, kind)
    # biases that a Llama has only when it is asked to are not in the arithmetic
    assert counted(folder) is arithmetic
    found = command._shape(SimpleNamespace(model_name_or_path=str(folder)))
    assert found.parameters == sum(parameter.numel() for parameter in skeleton(folder).parameters())


def test_parts_of_a_shape_are_the_whole():
    shape = shape_of("meta-llama/Llama-2-7b-hf")
    norms = (2 * shape.layers + 1) * shape.hidden
    assert shape.linear + shape.embeddings + norms == shape.parameters
    assert shape.matrices((*ATTENTION, *FFN)) == shape.linear
    assert shape.widths(("q_proj", "down_proj")) == (4096 + 11008, 2 * 4096)


def test_an_adapters_numbers_come_from_its_header(adapters):
    size, largest = fusing.numbers(adapters / "outputs" / "safety")
    # rank 4 on gate, up and down of two layers, 32 and 64 wide
    assert (size, largest) == (2 * 3 * 4 * (32 + 64), 32 * 64)
    assert fusing.numbers(adapters / "outputs" / "nothing") == (0, 0)
    args = SimpleNamespace(results=adapters, adapter_names=("safety", "helpfulness"), space=None, compat="")
    assert fusing.adapters(args).data == 4 * 2 * size
