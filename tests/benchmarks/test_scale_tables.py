"""docs/scale.md has the tables that the command makes, and they say what their headings say."""

from __future__ import annotations

import re

import pytest

import align_basemodel
from benchmarks.memory import scale_tables
from benchmarks.memory.scale_tables import BASES, BEGIN, END, NO_RUNS, PAGE, SYSTEMS, peak
from models.footprint.shapes import shape_of


def test_the_page_has_the_tables_of_today():
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    assert scale_tables.inserted(page, scale_tables.markdown()) == page, "python -m benchmarks.memory.scale_tables --write"


def test_the_page_goes_from_one_core_to_a_cluster():
    headings = re.findall(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), re.M)
    places = [headings.index(name) for name in ("One core", "One GPU", "Several GPUs", "A cluster")]
    assert places == sorted(places)


def test_the_plan_that_the_page_explains_is_that_of_its_command(capsys):
    page = PAGE.read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        # experts that somebody made in results/ have ranks of their own
        align_basemodel.main(["--preset", "h3fusion", "--moe_flag", "1", "--plan", "--plan_gb", "24",
                              "--output_dir", NO_RUNS])
    told = capsys.readouterr()
    assert "```\n" + told.out + told.err + "```\n" in page


#: Of SYSTEMS: an expert, a mask on every weight of bfloat16.
EXPERT, MASK = SYSTEMS["H3Fusion"][0][1], SYSTEMS["SOMF"][4][1]


@pytest.mark.parametrize(("row", "words", "strategy", "devices"), [
    ("H3Fusion's expert", EXPERT, "one", 1),
    ("the same, `--gradient_checkpointing true`", SYSTEMS["H3Fusion"][1][1], "one", 1),
    ("the same, `--base_quantization nf4`", (*EXPERT, "--base_quantization", "nf4"), "one", 1),
    ("a mask on every weight, `--storage bfloat16 --logit_dtype bfloat16`", MASK, "one", 1),
    ("on two GPUs, FSDP2", MASK, "fsdp2", 2), ("on four, DDP", MASK, "ddp", 4),
    ("in fp32 on four, FSDP2", SYSTEMS["SOMF"][3][1], "fsdp2", 4),
    ("a logit for 64 neighbours, `--storage bfloat16 --granularity block`", SYSTEMS["SOMF"][5][1], "one", 1),
    ("a logit for a row, `--granularity row`", SYSTEMS["SOMF"][6][1], "one", 1),
])
def test_what_one_gpu_takes_is_planned(row, words, strategy, devices):
    each = " each" if devices > 1 else ""
    line = f"| {row} | {peak(words, BASES['7B'], strategy, devices):.0f} GB{each} | "
    assert line in PAGE.read_text(encoding="utf-8").split("## One GPU")[1]


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
