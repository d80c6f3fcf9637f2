"""models/merging/recipes.py: both dialects, mergekit's rules of precedence, and every error with its key and line."""

from __future__ import annotations

import ast
import logging
import sys
from pathlib import Path
from random import Random

import pytest

import config
from errors import UserError
from models.merging.recipe_values import MAX_BYTES, Condition, MethodSpec, value_at
from models.merging.recipes import Slice, Source, parameter, read_recipe

RECIPES = Path(__file__).parent / "recipes"
WEIGHT, SHARE, FACTOR = (float, None, None), (float, 0, 1), (float, 0, None)
METHODS = {
    "linear": MethodSpec({"weight": WEIGHT, "normalize": (bool, None, None)}, frozenset({"weight"}), 2, takes_base=False),
    "slerp": MethodSpec({"t": SHARE}, frozenset(), 1, True, 1),
    "ties": MethodSpec({"weight": WEIGHT, "density": SHARE, "lambda": FACTOR, "normalize": (bool, None, None),
                        "scope": (str, None, None)}, frozenset({"weight", "density"}), 1, True),
    "karcher": MethodSpec({"max_iter": (int, 1, None)}, frozenset(), 2, takes_base=False),
    "passthrough": MethodSpec({}, frozenset(), 1, False, 1, takes_base=False),
}
METHODS["dare_ties"] = METHODS["ties"]
ATTENTION, MLP, NORM = (f"model.layers.3.{n}.weight" for n in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm"))
MODELS = "models: [{model: a}, {model: b}]\n"


def recipe(name):
    return read_recipe(RECIPES / name, METHODS)


def write(folder, text):
    path = folder / "recipe.yml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder, text):
    """What read_recipe says about a text, without the folder's name."""
    with pytest.raises(UserError) as error:
        read_recipe(write(folder, text), METHODS)
    return [problem.replace(f"{folder}/", "") for problem in error.value.problems]


def values(found, name, tensor, t, default=None):
    part = found.slices[0]
    return [parameter(found, part, source, name, tensor, t, default) for source in part.sources]


# -- the public shapes of mergekit's recipes

def test_linear():
    found = recipe("linear.yml")
    assert (found.method, found.whole, found.base_model, found.dtype) == ("linear", True, None, "float16")
    assert found.mergekit
    assert [s.model for s in found.slices[0].sources][2] == "north-pier/otter-7b"
    assert values(found, "weight", MLP, 0.7) == [1.0, 0.3, 0.5]
    assert parameter(found, found.slices[0], None, "normalize", MLP, 0, True) is True
    assert found.text == (RECIPES / "linear.yml").read_text(encoding="utf-8")


def test_slerp_with_gradients_and_filters():
    found = recipe("slerp.yml")
    assert not found.whole
    assert [s.layer_range for s in found.slices[0].sources] == [(0, 40), (0, 40)]

    def at(tensor, t):
        return parameter(found, found.slices[0], None, "t", tensor, t, None)

    # five points: each quarter of the layers between two of them
    assert [at(ATTENTION, t) for t in (0, 0.25, 0.5, 1)] == [0, 0.5, 0.3, 1]
    assert at(ATTENTION, 0.125) == pytest.approx(0.25)
    assert at(ATTENTION, 7 / 39) == pytest.approx(0 + (0.5 - 0) * 7 / 39 * 4)
    assert [at(MLP, t) for t in (0, 1)] == [1, 0]
    assert at("model.embed_tokens.weight", 0) == at("lm_head.weight", 1) == at(NORM, 0.3) == 0.5


def test_ties_with_density_gradient():
    found = recipe("ties.yml")
    assert found.base_model == "commons/plain-13b"
    assert values(found, "density", MLP, 0.5) == [0.7, 0.5, 0.33]
    assert values(found, "weight", MLP, 1) == [1.0, 1.0, 0.5]
    assert values(found, "weight", ATTENTION, 0) == [1.0, 0.0, 0.0]
    assert found.parameters == {"normalize": True}


def test_dare_ties_with_merged_keys_and_union(caplog):
    with caplog.at_level(logging.WARNING):
        found = recipe("dare_ties.yml")
    assert values(found, "density", MLP, 0.5, default=1.0) == [1.0, 0.53, 0.53]
    assert values(found, "weight", MLP, 0.5) == [None, 0.4, 0.3]
    assert found.parameters == {"normalize": False}
    assert (found.dtype, found.out_dtype, found.vocab, found.tokenizer_source) == ("float32", "bfloat16", "union", "union")
    assert [r.message.split("dare_ties.yml:")[1] for r in caplog.records] == [
        "17: dtype: no effect beside out_dtype: sums are fp32, out_dtype is written",
        "15: parameters.int8_mask: no effect: masks are exact here whatever their type",
    ]


def test_passthrough_slices():
    found = recipe("passthrough.yml")
    assert [(s.sources[0].model, s.sources[0].layer_range) for s in found.slices] == [
        ("north-pier/otter-7b", (0, 24)), ("meadow-labs/finch-7b-chat", (8, 32))]
    # the first model's tokenizer is the base's where there is no base
    assert (found.tokenizer_source, found.vocab) == ("base", "base")


def test_our_own_dialect():
    found = recipe("own.yml")
    assert (found.method, found.base_model, found.whole, found.dtype) == ("ties", "plain-7b", True, "bfloat16")
    assert (found.vocab, found.tokenizer_source, found.mergekit) == ("union", "union", False)
    assert values(found, "density", MLP, 1, 9) == [0.5, 0.4, 0.25]
    assert values(found, "density", ATTENTION, 0.5, 9) == [pytest.approx(0.35), 0.2, 0.25]
    assert values(found, "density", NORM, 0, 9) == [0.2, 0.3, 0.25]
    assert values(found, "weight", MLP, 0, 1.0) == [0.5, 0.1, 1.0]
    assert parameter(found, found.slices[0], None, "lambda", MLP, 0, 1.0) == 1.5


# -- the rules

@pytest.mark.parametrize(("setting", "t", "want"), [
    (0.3, 0.5, 0.3), ("model", 0, "model"), (True, 1, True), ((0.7,), 0.0, 0.7), ((0.7,), 1.0, 0.7),
    ((0.0, 1.0), 0.25, 0.25), ((1.0, 3.0, 2.0), 0.5, 3.0), ((1.0, 3.0, 2.0), 0.75, 2.5), ((1.0, 3.0, 2.0), 1.0, 2.0),
])
def test_a_gradient_is_linear_between_its_points(setting, t, want):
    assert value_at(setting, MLP, t) == want


@pytest.mark.parametrize(("filters", "want"), [
    (("self_attn", "mlp"), 1), (("mlp", "up_proj"), 0), ((None, "mlp"), 0), (("*", "mlp"), 0), (("q_proj", "*"), 1),
    (("q_proj", "k_proj"), None),
])
def test_the_first_filter_in_the_name_counts(filters, want):
    assert value_at(tuple(Condition(f, i) for i, f in enumerate(filters)), MLP, 0.5) == want


def test_source_goes_before_slice_before_recipe_before_default(tmp_path):
    found = read_recipe(write(tmp_path, """
merge_method: ties
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 4]}
      - {model: a, layer_range: [0, 4], parameters: {density: [{filter: mlp, value: 0.1}]}}
      - {model: b, layer_range: [0, 4]}
    parameters: {density: {filter: self_attn, value: [0.2, 0.4]}}
parameters: {density: [{filter: layernorm, value: 0.3}]}
"""), METHODS)
    assert values(found, "density", MLP, 1, 0.9) == [0.9, 0.1, 0.9]
    assert values(found, "density", ATTENTION, 1, 0.9) == [0.4, 0.4, 0.4]
    assert values(found, "density", NORM, 1, 0.9) == [0.3, 0.3, 0.3]


def test_numbers_with_an_exponent_and_booleans_as_numbers(tmp_path):
    text = MODELS + "merge_method: linear\nparameters: {weight: 1e-3, normalize: 1.0}"
    found = read_recipe(write(tmp_path, text), METHODS)
    assert found.parameters == {"weight": 0.001, "normalize": True}


def test_slices_may_have_bases_of_their_own(tmp_path):
    found = read_recipe(write(tmp_path, """
merge_method: slerp
slices:
  - {base_model: a, sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [1, 3]}]}
tokenizer_source: model:a
parameters: {t: 0.5}
"""), METHODS)
    part = found.slices[0]
    assert part == Slice((Source("a", (0, 2), {}), Source("b", (1, 3), {})), "a", {})
    assert found.tokenizer_source == "base"


@pytest.mark.parametrize(("text", "says"), [
    ("merge_method: linear\nmodels: [{model: a}, {model: a}]", "models[1]: a is listed twice and counts twice"),
    ("merge_method: linear\nbase_model: c\n" + MODELS, "base_model: c is not listed and takes part as one"),
    ("merge_method: ties\nbase_model: a\nmodels: [{model: a, parameters: {weight: 1}}, {model: b}]",
     "models[0]: weight of the base: no effect"),
    ("method: ties\nbase: a\ninputs: [{model: b, density: {proj: 1, q_proj: 0.5}}]",
     "inputs[0].density.q_proj: never used: an earlier filter"),
])
def test_what_changes_nothing_is_said(tmp_path, caplog, text, says):
    with caplog.at_level(logging.WARNING):
        read_recipe(write(tmp_path, text), METHODS)
    assert says in caplog.text


# -- errors

def test_every_error_of_a_file_at_once_in_order_of_lines():
    with pytest.raises(UserError) as error:
        recipe("broken.yml")
    found = [problem.split("broken.yml:")[1] for problem in error.value.problems]
    per_input = "allowed: density, weight"
    assert found == [
        "1: models: ties needs a base; add base_model: MODEL",
        f"4: models[0].parameters.densty: ties has no such parameter (did you mean density?); {per_input}",
        "5: models[0].parameters.normalize: one value serves the whole merge; give it under the recipe's parameters",
        "8: models[1].parameters.density: 1.5: out of range; needs a number between 0 and 1",
        "9: models[1].parameters.weight[1]: heavy: needs a number",
        "10: models[2].model: quarry/maths-7b@v2: a revision is not supported; name the folder of that revision",
        "11: models[2].revision: not supported; mergekit passes it over here; name the folder of that revision; "
        "allowed keys: model, parameters",
        "14: parameters.normalize: often: needs true or false",
        "15: parameters.normalise: ties has no such parameter (did you mean normalize?); "
        "allowed: density, lambda, normalize, scope, weight",
        "19: tokenizer.tokens.<pad>.source: zero would be a model's name; write {kind: zero}",
        "21: dtypes: unknown key (did you mean dtype?); allowed keys: merge_method, base_model, models, slices, modules, "
        "parameters, dtype, out_dtype, tokenizer_source, tokenizer, chat_template, head_at",
        "22: dtype: bfloat: not known (did you mean bfloat16?); allowed: float32, float16, bfloat16",
        "23: key 'dtype' stands twice, first in line 22; keep one",
    ]


SLICE = "merge_method: ties\nbase_model: a\nslices:\n- sources:\n"


@pytest.mark.parametrize(("text", "says"), [
    (MODELS, "1: needs either merge_method (mergekit's recipe) or method (ours); has neither"),
    ("merge_mehtod: ties\n" + MODELS, "merge_mehtod (did you mean merge_method?); has neither"),
    ("method: ties\nmerge_method: ties", "1: needs either merge_method (mergekit's recipe) or method (ours), not both"),
    ("merge_method: tise\n" + MODELS, "1: merge_method: tise: not known (did you mean ties?); allowed: linear, slerp, "
                                      "ties, karcher, passthrough, dare_ties"),
    ("merge_method: linear", "1: models: needs a list of models (or slices instead), one or more"),
    ("merge_method: linear\nmodels: []", "2: models: needs a list of models (or slices instead), one or more"),
    ("merge_method: linear\nslices: []\n" + MODELS, "2: slices: models and slices exclude each other; keep one"),
    ("merge_method: linear\nmodels: [a, b]", "2: models[0]: needs 'key: value' lines"),
    ("merge_method: linear\nmodels: [{model: 7}, {}]", "2: models[1].model: needs a model: text"),
    ("merge_method: linear\nmodels: [{model: a}]", "2: models: linear takes 2 or more model(s); here: 1"),
    ("merge_method: ties\n" + MODELS, "2: models: ties needs a base; add base_model: MODEL"),
    ("method: slerp\ninputs: [{model: a}, {model: b}]", "2: inputs: slerp needs a base; add base: MODEL"),
    ("method: ties\ninputs: [{model: a}]", "2: inputs: ties needs a base; add base: MODEL"),
    ("merge_method: ties\nbase_model: a\nmodels: [{model: a}]", "takes 1 or more model(s) beside the base; here: 0"),
    ("merge_method: slerp\nbase_model: c\n" + MODELS, "3: models: slerp takes 1 model(s) beside the base; here: 2"),
    ("merge_method: linear\nmodules: {}\n" + MODELS, "2: modules: takes one module, and neither"),
    ("merge_method: linear\ntokenizer_source: base\ntokenizer: {}\n" + MODELS, "3: tokenizer: tokenizer and tokenizer_s"),
    ("method: linear\nseed: 3\ninputs: [{model: a}, {model: b}]", "2: seed: not supported; give it with --seed"),
    ("method: linear\nmodels: []", "2: models: unknown key; allowed keys: method, base, inputs"),
    ("method: linear\ninputs: [{model: a}, {model: b}]\nvocab: both", "3: vocab: both: not known; allowed: base, union"),
    ("method: linear\ninputs: [{model: a}, {model: b}]\nvocab: pad\ntokenizer: union", "4: tokenizer: tokenizer union does"),
    (SLICE + "  - {model: b, layer_range: [0, 4]}\n  - {model: c, layer_range: [0, 5]}",
     "4: slices[0]: sources of one slice need as many layers each; here: b 4, c 5"),
    (SLICE + "  - {model: b, layer_range: [4, 0]}", "5: slices[0].sources[0].layer_range: [4, 0]: needs 0 <= first < last"),
    (SLICE + "  - {model: b, layer_range: [-1, 3]}", "[-1, 3]: needs 0 <= first < last"),
    (SLICE + "  - {model: b, layer_range: [1, 2, 3]}", "layer_range: needs two whole numbers"),
    (SLICE + "  - {model: b, layer_range: 3}", "layer_range: needs two whole numbers"),
    (SLICE + "  - {model: b}", "5: slices[0].sources[0].layer_range: needs two whole numbers"),
    (SLICE + "  - {model: b, layer_range: [0, 2]}\n  - {model: c, layer_range: [2, 4]}",
     "4: slices[0]: the base a is not among the sources, and their layers differ"),
    (SLICE + "  - {model: b, layer_range: [0, 2]}\n  - {model: b, layer_range: [2, 4]}",
     "6: slices[0].sources[1]: b stands twice"),
    ("merge_method: linear\nslices: [{}]", "2: slices[0].sources: needs a list of models, one or more"),
])
def test_structure(tmp_path, text, says):
    assert says in "\n".join(problem.removeprefix("recipe.yml:") for problem in problems(tmp_path, text))


@pytest.mark.parametrize(("name", "value", "says"), [
    ("weight", "true", "weight: true: needs a number"),
    ("weight", "'half'", "weight: half: needs a number"),
    ("weight", "", "weight: no value: needs a number"),
    ("weight", ".nan", "weight: nan: needs a number"),
    ("weight", "[.inf]", "weight[0]: inf: needs a number"),
    ("weight", "[]", "weight: an empty list"),
    ("weight", "[[1]]", "weight[0]: a list: needs a number"),
    ("weight", "[1, {value: 2}]", "weight[1]: a mapping: needs a number"),
    ("weight", "[{value: [1, x]}]", "weight[0].value[1]: x: needs a number"),
    ("weight", "[{filter: mlp}]", "weight[0].value: no value: needs a number"),
    ("weight", "[{filter: 5, value: 1}]", "weight[0].filter: 5: needs text that stands in tensor names"),
    ("weight", "[{patern: mlp, value: 1}]", "weight[0].patern: unknown key; allowed keys: filter, value"),
    ("weight", "[{value: [{value: 1}]}]", "weight[0].value[0]: a mapping: needs a number"),
    ("density", "[0.2, -0.1]", "density[1]: -0.1: out of range; needs a number between 0 and 1"),
    ("lambda", "-1", "lambda: -1.0: out of range; needs a number of 0 or more"),
    ("normalize", "2", "normalize: 2: needs true or false"),
    ("normalize", "[true, false]", "normalize: a layer gradient needs a parameter between whose values"),
    ("scope", "1", "scope: 1: needs text"),
    ("weight", "!!python/object:os.system x", "weight: tag tag:yaml.org,2002:python/object:os.system: not supported"),
    ("weight", "!!python/tuple [1]", "weight: tag tag:yaml.org,2002:python/tuple: not supported"),
    ("weight", "!!int abc", "weight: abc: not a value of type int"),
    ("weight", "0x" + "f" * 100, "not a value of type int"),
    ("weight", "1" + ":1" * 200_000, "not a value of type int"),
    ("density", "1" + "0" * 98, "out of range"),
])
def test_values(tmp_path, name, value, says):
    found = problems(tmp_path, f"merge_method: ties\nbase_model: c\n{MODELS}parameters:\n  {name}: {value}\n")
    assert found[0].startswith("recipe.yml:5: parameters.")
    assert says in found[0]


def test_whole_numbers(tmp_path):
    text = "merge_method: karcher\n" + MODELS + "parameters: {max_iter: %s}"
    assert read_recipe(write(tmp_path, text % "10.0"), METHODS).parameters == {"max_iter": 10}
    assert "0: out of range; needs a whole number of 1 or more" in problems(tmp_path, text % 0)[0]
    assert "2.5: needs a whole number of 1 or more" in problems(tmp_path, text % 2.5)[0]


# -- hostile files

BOMB = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
                 + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)])


@pytest.mark.parametrize(("text", "says"), [
    ("", "empty"),
    ("- a\n- b", "recipe.yml:1: a recipe is a mapping"),
    ("merge_method: [", "recipe.yml:1: cannot be read as YAML"),
    ("method: a\n---\nmethod: b", "recipe.yml:2: cannot be read as YAML: but found another document"),
    ("method: *nowhere", "recipe.yml:1: cannot be read as YAML: found undefined alias 'nowhere'"),
    ("method: \x00", "cannot be read as YAML"),
    (BOMB, "more than 100000 values, aliases expanded"),
    ("a: &a [*a]", "more than 16 levels, aliases expanded"),
    ("a: &a {<<: *a}", "more than 16 levels, aliases expanded"),
    ("a: " + "[" * 50_000, "nested deeper than 16 levels"),
    ("<<: 5\nmethod: ties", "<< takes a mapping"),
    ("[a]: 5\nmethod: ties", "a key must be text"),
    (f"? {'k' * 300_000}\n: [{'1,' * 10_000}]\n", "a key must be text of 100 characters or less"),
    ("x" * (MAX_BYTES + 1), "larger than 1000 kB"),
])
def test_hostile_text(tmp_path, text, says):
    assert says in "\n".join(problems(tmp_path, text))


def test_many_values_stop_early(tmp_path):
    assert "more than 100000 values" in problems(tmp_path, "[" + "1," * 120_000 + "]")[0]


def test_a_damaged_recipe_is_read_or_refused_and_nothing_else(tmp_path):
    """Random edits of the fixtures: bytes replaced, lines dropped, repeated and shifted."""
    random = Random(0)
    texts = [path.read_text(encoding="utf-8") for path in sorted(RECIPES.glob("*.yml"))]
    refused = []
    for _ in range(300):
        lines = random.choice(texts).splitlines()
        for _ in range(random.randint(1, 3)):
            i = random.randrange(len(lines))
            j = random.randrange(len(lines[i]) + 1)
            lines[i] = random.choice(("", " " + lines[i], lines[i] + "\n" + random.choice(lines),
                                      lines[i][:j] + random.choice("[]{}:&*!|>'\"#%@-,?\t~\x85é0") + lines[i][j + 1:]))
        try:
            read_recipe(write(tmp_path, "\n".join(lines)), METHODS)
        except UserError as error:
            refused.append(error.problems)
    assert 100 < len(refused) < 300
    assert all("recipe.yml" in problem for problems in refused for problem in problems)


def test_unreadable_files(tmp_path):
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00method")
    for path, says in ((tmp_path / "none.yml", "No such file"), (tmp_path, "Is a directory"),
                       (tmp_path / "binary.yml", "not a text in UTF-8")):
        with pytest.raises(UserError, match=says):
            read_recipe(path, METHODS)


@pytest.mark.parametrize("name", ["recipes", "recipe_values", "recipe_fields", "recipe_tokens", "mergekit_keys"])
def test_the_standard_library_and_yaml_are_enough(name):
    module = ast.parse((config.ROOT / "models" / "merging" / f"{name}.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(module) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(module) if isinstance(node, ast.ImportFrom)}
    own = {f"models.merging.{part}" for part in ("recipe_values", "recipe_fields", "recipe_tokens", "mergekit_keys")}
    assert imported <= {*sys.stdlib_module_names, "collections.abc", "yaml", "errors", *own}
