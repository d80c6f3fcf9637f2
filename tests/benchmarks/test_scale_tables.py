"""docs/scale.md has the tables that the command makes, and they say what their headings say."""

from __future__ import annotations

import re

import pytest

from benchmarks.memory import scale_tables
from benchmarks.memory.scale_tables import BASES, BEGIN, END, PAGE, SYSTEMS, peak
from models.footprint.shapes import shape_of


def test_the_page_has_the_tables_of_today():
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    assert scale_tables.inserted(page, scale_tables.markdown()) == page, "python -m benchmarks.memory.scale_tables --write"


def test_the_page_goes_from_one_core_to_a_cluster():
    headings = re.findall(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), re.M)
    places = [headings.index(name) for name in ("One core", "One GPU", "Several GPUs", "A cluster")]
    assert places == sorted(places)


def test_the_bases_are_of_their_sizes():
    assert {size: round(shape_of(base).parameters / 1e9) for size, base in BASES.items()} == {
        "1B": 1, "7B": 7, "13B": 13, "70B": 69}


@pytest.mark.parametrize("system", SYSTEMS)
def test_larger_bases_take_more_and_more_devices_less(system):
    for _, words in SYSTEMS[system]:
        sizes = [peak(words, base) for base in BASES.values()]
        assert sizes == sorted(sizes)
        # two bytes a weight at the least, half of one in four bits
        assert sizes[-1] > 69 * (0.5 if "nf4" in words else 2)
        if scale_tables.parted(words):
            assert peak(words, BASES["70B"], "fsdp2", 8) < sizes[-1]
