"""Parameters as dataclasses declare them, for the three tables of methods alike."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from models.adapters.methods import ADAPTER_METHODS, PEFT_METHODS
from models.merging.methods import METHODS
from models.operators.declared import Declared, assignments, number, scalar
from models.realign.methods import METHODS as REALIGN
from models.realign.methods import RULES, Dare, DareSum, Magnitude, RandomMask, Resta

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Example:
    lambda_: float = number(None, "must be given")
    density: float = number(0.5, "a share", 0, 1)
    rescale: bool = number(True, "yes or no")
    scope: str = number("tensor", "where", choices=("tensor", "model"))


@dataclass(frozen=True)
class Row(Declared):
    parameters: type


ROW = Row(Example)


def test_fields_go_by_the_name_of_the_flag():
    assert list(ROW.fields()) == ["lambda", "density", "rescale", "scope"]
    assert ROW.rule("density") == (float, 0, 1)
    assert ROW.rule("lambda") == (float, None, None)
    assert [ROW.rule(name)[0] for name in ("rescale", "scope")] == [bool, str]


def test_only_what_has_no_default_is_missing():
    assert ROW.missing({}) == ["lambda"]
    assert ROW.missing({"lambda": 1.0}) == []
    # plain dataclass fields, as the adapters' table has them
    assert ADAPTER_METHODS["ties"].missing({}) == ["density"]
    assert ADAPTER_METHODS["svd"].missing({}) == []


@pytest.mark.parametrize(("name", "value"), [("density", 0.0), ("density", 1.0), ("lambda", -3.0), ("rescale", False),
                                             ("scope", "model")])
def test_values_that_fit_come_back(name, value):
    assert ROW.checked(name, value) == value


@pytest.mark.parametrize(("name", "value", "says"), [
    ("density", 1.5, "1.5 is out of range; allowed: 0 to 1"), ("density", float("nan"), "nan is not a number"),
    ("density", True, "True is not a number"), ("lambda", "much", "much is not a number"),
    ("rescale", 1.0, "1.0 is not true or false"), ("scope", 2.0, "2.0 is not a word"),
    ("scope", "layer", "layer is not known; allowed: tensor, model"),
])
def test_values_that_do_not_fit_say_what_would(name, value, says):
    with pytest.raises(ValueError, match=says):
        ROW.checked(name, value)


def test_words_become_values():
    assert [scalar(word) for word in ("0.5", "1e-3", "True", "false", "model")] == [0.5, 1e-3, True, False, "model"]


def test_assignments_keep_what_was_written():
    assert list(assignments(" a = 1 ;; b=2,3; lonely ;x=y=z")) == [
        ("a = 1", "a", "1"), ("b=2,3", "b", "2,3"), ("lonely", "", ""), ("x=y=z", "x", "y=z")]


@pytest.mark.parametrize("table", [METHODS, ADAPTER_METHODS, PEFT_METHODS, REALIGN, RULES],
                         ids=["merging", "adapters", "peft", "realign", "rules"])
def test_every_row_of_every_table_declares_its_parameters(table):
    for row in table.values():
        assert isinstance(row, Declared)
        assert set(row.missing({})) <= set(row.fields())


def test_what_users_call_drop_or_kept_is_a_density_inside():
    assert [row.density for row in (Dare(drop=0.25), Resta(drop=0.25), DareSum(drop=0.25))] == [0.75] * 3
    assert [row.density for row in (RandomMask(kept=0.4), Magnitude(kept=0.4))] == [0.4] * 2


def test_the_tables_load_no_torch():
    tables = ", ".join(f"models.{wing}.methods" for wing in ("merging", "adapters", "realign"))
    subprocess.run([sys.executable, "-c", f"import sys, {tables}; assert 'torch' not in sys.modules"], check=True, cwd=ROOT)
