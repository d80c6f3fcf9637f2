"""An adapter put into a loaded base: every key of it must fit, and the sum is what PEFT's unmerged forward computes.

PEFT itself loads what fits and goes on: an adapter whose keys carry another prefix changes nothing, and the base's answers
would stand under the adapter's name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from types import SimpleNamespace

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from errors import UserError
from models.adapters.files import CONFIG, WEIGHTS, Adapter, in_order
from models.operators.low_rank import Pair, product

log = logging.getLogger(__name__)
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
            "target_parameters")
#: What adapters are trained for beside a language model's answers.
_OTHER_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def check_fit(adapters: Iterable[Adapter], model: PreTrainedModel) -> None:
    """Refuse adapters of which any part would be lost: modules that the base has not, shapes, modules without factors.

    Args:
        model: the base, or its skeleton without weights.

    Raises:
        UserError: for each adapter the file, an example, what the base has instead, and how many there are.
    """
    there = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    problems = []
    for adapter in adapters:
        file = adapter.folder / WEIGHTS
        odd = [module for module in in_order([adapter]) if module not in there]
        if odd:
            problems.append(f"{file}: {len(odd)} of its {len(adapter.modules)} modules are not in this base, e.g. "
                            f"'{odd[0]}'; {_nearest(odd[0], there, model)}; give the adapter's own base with "
                            "--model_name_or_path, or save it again from the plain base with PeftModel.save_pretrained")
            continue
        wrong = {name: (shape, own) for name, (a, b) in adapter.modules.items()
                 if (shape := tuple(there[name].weight.shape)) != (own := _shape(a, b, _in_out(there[name])))}
        if wrong:
            name, (shape, own) = next(iter(wrong.items()))
            problems.append(f"{file}: {len(wrong)} modules do not fit this base, e.g. '{name}' is {own}, the base has "
                            f"{shape}; give the adapter's own base with --model_name_or_path")
        if (task := adapter.config.get("task_type")) in _OTHER_TASKS:
            problems.append(f"{file}: was trained for {task}, on a head of its own that this language model has not; give "
                            f"an adapter whose task_type in {CONFIG} is CAUSAL_LM")
        if lost := sorted(_targeted(adapter, there) - adapter.modules.keys()):
            problems.append(f"{file}: has no factors for {len(lost)} modules that its {CONFIG} names, e.g. '{lost[0]}'; "
                            "save the adapter again, or mend target_modules")
    if problems:
        raise UserError(*problems)


def _nearest(module: str, there: Iterable[str], model: nn.Module) -> str:
    """What the base has in the place of a module that it has not."""
    parts = module.split(".")
    # the longest end that both share: prefixes are what differs
    for start in range(1, len(parts)):
        end = ".".join(parts[start:])
        if found := next((name for name in there if f".{name}".endswith(f".{end}")), None):
            return f"the base calls it '{found}'"
    return f"the base ({type(model).__name__}) has e.g. '{next(iter(there), 'no linear layer')}'"


def _targeted(adapter: Adapter, there: Iterable[str]) -> set[str]:
    """Modules of the base that the adapter's configuration means, by PEFT's own rule."""
    targets = adapter.config.get("target_modules")
    # empty: PEFT's default for the architecture; the keys are all there is to go by
    if not targets or targets == "all-linear":
        return set()
    meant = SimpleNamespace(**{key: adapter.config.get(key) for key in _TARGETS})
    return {name for name in there if check_target_module_exists(meant, name)}


@torch.no_grad()
def add_to(model: PreTrainedModel, pairs: Mapping[str, Pair], scales: Mapping[str, float] | None = None) -> None:
    """Add B A, times its scale, to each named module's weight, in place; ``check_fit`` has seen to it that all fit.

    A head that shares its weight with the embedding gets one of its own first: the change is the head's alone.

    Args:
        scales: of each module; none: 1.
    """
    there = dict(model.named_modules())
    untie_head(model, pairs)
    for name, pair in pairs.items():
        # in place: the model is loaded already, and a second copy may not fit
        weight = there[name].weight
        weight += change_of(there[name], pair, None if scales is None else scales[name], weight)


def change_of(module: nn.Module, pair: Pair, scale: float | None, like: torch.Tensor) -> torch.Tensor:
    """What is added to a module's weight, as the layer keeps it, in the dtype and on the device of ``like``."""
    a, b = pair
    change = product((a.to(like), b.to(like)))
    # in this order, transposed, scaled, added, as PEFT merges: the same bits
    change = change.T if _in_out(module) else change
    return change if scale is None else change * scale


def untie_head(model: PreTrainedModel, changed: Iterable[str]) -> None:
    """Give a tied head a weight of its own where ``changed`` names it."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    name = next(name for name, module in model.named_modules() if module is head)
    if name in set(changed):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        # whoever ties weights again by the configuration would undo it
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
        log.info("%s shares its weight with the embedding; it gets its own, because an adapter changes it", name)


def _in_out(module: nn.Module) -> bool:
    """Whether a layer keeps its weight as (in, out), as GPT-2's do. PEFT goes by the layer, too, not by fan_in_fan_out."""
    return isinstance(module, Conv1D)


def _shape(a: torch.Tensor, b: torch.Tensor, transposed: bool) -> tuple[int, int]:
    return (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
