"""What an export starts from: a base's files, and what a run adds to them. Headers are read, and small configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import manifest
from errors import UserError
from flags.export import ExportArgs
from flags.mixture import Parts, mixture_run, read_mixture
from models.adapters.adapted import adapter_changes
from models.adapters.changed import Change, Factor
from models.adapters.files import WEIGHTS as ADAPTER_WEIGHTS
from models.adapters.files import Adapter, read_adapter
from models.base.families import Family, family_of
from models.base.loading import base_path, check_base, skeleton
from models.checkpoints.configs import ties_head
from models.checkpoints.fingerprints import fingerprint, fingerprint_like, same_base
from models.checkpoints.names import EMBEDDINGS, HEADS, computed
from models.checkpoints.reader import Checkpoint
from models.moe.files import CONFIG as MOE
from models.moe.files import WEIGHTS as MOE_WEIGHTS
from models.moe.files import MoeConfig, read_config
from models.run_folders import ADAPTER, parts_of, run_folder

if TYPE_CHECKING:
    from models.checkpoints.header import TensorInfo

PROJECTIONS = ("gate", "up", "down")
_HEAD = "lm_head.weight"
#: A tensor's own name in the base's files -> what is added to it.
Changes = dict[str, list[Change]]


@dataclass(frozen=True)
class Expert:
    """An expert of a fused MoE: its name, and what it adds to the base's FFN."""

    name: str
    changes: Mapping[str, Sequence[Change]]


@dataclass(frozen=True)
class Source:
    """A run, open.

    Args:
        name: the run's, or that of a weighted sum.
        folders: of the run, or of every adapter of a sum.
        base: the files below it.
        tensors: the base's tensors by the names that a model with a head has; no copies, no computed buffers.
        family: where its parts lie; None where no row of models/base/families.py says it.
        common: what is added to the base outside the experts: attention's LoRA, or the adapters.
        head: what is added to a head that is the embedding in the base's files.
        experts, routers, moe: of a fused MoE; routers by layer, (E, d).
        hashes: what the result depends on.
    """

    name: str
    folders: tuple[Path, ...]
    base: Checkpoint
    tensors: Mapping[str, TensorInfo]
    family: Family | None
    common: Mapping[str, Sequence[Change]]
    hashes: Mapping[str, str]
    head: Sequence[Change] = ()
    experts: tuple[Expert, ...] = ()
    routers: tuple[TensorInfo, ...] = ()
    moe: MoeConfig | None = None
    moe_file: Checkpoint | None = None
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """The base's config.json."""
        return self.base.config

    @property
    def kind(self) -> str:
        return str(self.config.get("model_type"))

    @property
    def embedding(self) -> TensorInfo | None:
        return next((info for name, info in self.tensors.items()
                     if EMBEDDINGS.search(name) and "per_layer" not in name), None)

    @property
    def required_family(self) -> Family:
        """The family; a ValueError where no row says it, so that no fused MoE lies on it."""
        if self.family is None:
            raise ValueError(f"{self.name}: a {self.kind} is of no family")
        return self.family

    @property
    def required_moe(self) -> MoeConfig:
        """The configuration of a fused MoE; a ValueError for any other run."""
        if self.moe is None:
            raise ValueError(f"{self.name}: is no fused MoE")
        return self.moe


def open_source(args: ExportArgs, stack: ExitStack) -> Source:
    """The run that the flags name, with its base, everything checked that a header shows.

    Raises:
        UserError: no such run, another base, damaged files; all that can be told at once.
    """
    parts = _parts(args)
    if parts:
        folders = _folders([name for name, _ in parts], args)
        return _of_adapters(mixture_run(parts), parts, folders, open_base(args, stack), stack)
    (folder,) = _folders([args.run], args)
    if (folder / MOE).is_file():
        return open_moe(folder, open_base(args, stack), args, stack)
    if (folder / ADAPTER).is_file():
        return _of_adapters(folder.name, ((folder.name, 1.0),), [folder], open_base(args, stack), stack)
    # a whole model: itself the base
    return plain_source(folder.name, (folder,), stack.enter_context(Checkpoint.open(folder)).plain())


def _parts(args: ExportArgs) -> Parts:
    # "a=0.6,b=0.4" as inference.py --adapters has it, or the run's name that it makes of that
    return read_mixture(args.run) if "=" in args.run else () if "/" in args.run else parts_of(args.run)


def _folders(names: Sequence[str], args: ExportArgs) -> list[Path]:
    found: list[Path] = []
    problems: list[str] = []
    for name in names:
        try:
            given = Path(name).expanduser()
            found.append(given.resolve() if "/" in name and given.is_dir() else run_folder(args.results, name))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return found


def open_base(args: Any, stack: ExitStack) -> Checkpoint:
    """The files of --model_name_or_path, open as long as ``stack``."""
    return stack.enter_context(Checkpoint.open(base_path(args.model_name_or_path, args.cache_dir))).plain()


def plain_source(name: str, folders: tuple[Path, ...], base: Checkpoint) -> Source:
    """The base alone, under the names that a model with a head has."""
    try:
        family = family_of(SimpleNamespace(**base.config))
    except UserError:
        family = None
    tensors = {n: info for n, info in base.tensors.items() if not computed(info)}
    home = family.layers if family else ""
    # saved from the class without a head: layers.0 instead of model.layers.0
    if home and not any(n.startswith(f"{home}.") for n in tensors):
        prefix = home.partition(".")[0]
        tensors = {n if HEADS.search(n) else f"{prefix}.{n}": info for n, info in tensors.items()}
    source = Source(name, folders, base, tensors, family, {}, {"base": fingerprint(base.folder)})
    heads = [n for n in tensors if HEADS.search(n)]
    if heads and ties_head(base.config) and source.embedding and base.equal(tensors[heads[0]], source.embedding):
        # a copy of the embedding, which every reader ties again
        return replace(source, tensors={n: info for n, info in tensors.items() if n not in heads})
    return source


def _of_adapters(name: str, parts: Parts, folders: Sequence[Path], base: Checkpoint, stack: ExitStack) -> Source:
    from models.adapters.apply import check_fit
    from models.adapters.fuse import common_base

    source = plain_source(name, tuple(folders), base)
    embedding = source.embedding.name if source.embedding else ""
    common, head = Changes(), list[Change]()
    problems: list[str] = []
    known: list[Adapter] = []
    model = skeleton(base.folder)
    for (part, weight), folder in zip(parts, folders, strict=True):
        try:
            adapter = read_adapter(folder, part)
            check_base(folder, base.folder)
            check_fit([adapter], model)
            # the factors are let go: one adapter at a time is in memory
            known.append(replace(adapter, modules={}))
            del adapter
            for tensor, change in adapter_changes(base, folder, part, stack, weight, embedding).items():
                # a head of its own grows out of a tied one
                (head if tensor == _HEAD and tensor not in base.tensors else common.setdefault(tensor, [])).append(change)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    common_base(known)
    hashes = {part: manifest.sha256(folder / ADAPTER_WEIGHTS) for (part, _), folder in zip(parts, folders, strict=True)}
    # the configuration holds the scale, which no hash of weights sees
    configs = {f"{part} (configuration)": manifest.sha256(folder / ADAPTER)
               for (part, _), folder in zip(parts, folders, strict=True)}
    return replace(source, common=common, head=head, hashes={**source.hashes, **hashes, **configs},
                   weights=dict(parts) if len(parts) > 1 or parts[0][1] != 1 else {})


def open_moe(folder: Path, base: Checkpoint, args: Any, stack: ExitStack) -> Source:
    """A fused MoE on an open base, every tensor of it held to the base's shapes; a UserError where one differs."""
    config = read_config(folder)
    if not same_base(config.base_fingerprint, base.folder):
        have = fingerprint_like(config.base_fingerprint, base.folder)
        raise UserError(f"{folder}: was fused on base {config.base} (fingerprint {config.base_fingerprint[:12]}), "
                        f"but --model_name_or_path {args.model_name_or_path} has {have[:12]}; give that base")
    source = plain_source(folder.name, (folder,), base)
    file = stack.enter_context(Checkpoint.open(folder / MOE_WEIGHTS))
    problems: list[str] = []
    experts = [Changes() for _ in config.experts]
    routers: list[TensorInfo] = []
    for layer in range(base.config["num_hidden_layers"]):
        router = _tensor(file, f"layers.{layer}.router", (len(experts), base.config["hidden_size"]), problems)
        routers += [router] if router else []
        for projection in PROJECTIONS:
            own, rows, first, columns = _matrix(source, layer, projection)
            factors = [("a", "b", 1.0)] + ([("tuned_a", "tuned_b", config.tuning.scale)] if config.tuning else [])
            for a, b, scale in factors:
                names = [f"layers.{layer}.{projection}.{part}" for part in (a, b)]
                rank = file.tensors[names[0]].shape[1] if names[0] in file.tensors else 0
                down = _tensor(file, names[0], (len(experts), rank, columns), problems)
                out = _tensor(file, names[1], (len(experts), rows, rank), problems)
                if down is None or out is None:
                    continue
                for place, changes in enumerate(experts):
                    one, two = Factor.of_stack(file, down, place), Factor.of_stack(file, out, place)
                    changes.setdefault(own, []).append(Change(one, two, scale, first_row=first))
    common = _attention(source, file, config.attention.scale, problems) if config.attention else {}
    if problems:
        raise UserError(*(f"{folder / MOE_WEIGHTS}: {problem}; build the fused model again" for problem in problems[:6]))
    hashes = {"moe": manifest.sha256(folder / MOE_WEIGHTS), "moe_config": manifest.sha256(folder / MOE)}
    return replace(source, common=common, hashes={**source.hashes, **hashes}, routers=tuple(routers), moe=config,
                   moe_file=file, experts=tuple(
                       Expert(name, changes) for name, changes in zip(config.experts, experts, strict=True)))


def _matrix(source: Source, layer: int, projection: str) -> tuple[str, int, int, int]:
    """(own name of the base's tensor, rows, first row, columns) of a projection of a layer's FFN."""
    family = source.required_family
    name = f"{family.layers}.{layer}.{family.ffn}.{getattr(family, projection)}.weight"
    if name not in source.tensors:
        raise UserError(f"{source.base.folder}: has no tensor {name}, which the family {source.kind} keeps its FFN in; give "
                        "the base that the model was fused on")
    info = source.tensors[name]
    rows, columns = info.shape
    # Phi-3: gate above up in one matrix
    if family.gate == family.up and projection != "down":
        return info.name, rows // 2, 0 if projection == "gate" else rows // 2, columns
    return info.name, rows, 0, columns


def _tensor(file: Checkpoint, name: str, shape: tuple[int, ...], problems: list[str]) -> TensorInfo | None:
    info = file.tensors.get(name)
    if info is None:
        problems.append(f"tensor {name} is missing")
    elif info.shape != shape:
        problems.append(f"{name} has shape {info.shape}, needs {shape}")
    else:
        return info
    return None


def _attention(source: Source, file: Checkpoint, scale: float, problems: list[str]) -> Changes:
    """The second stage's LoRA on attention, by the base's tensors."""
    changes = Changes()
    for name, a in file.tensors.items():
        if not (name.startswith("attention.") and name.endswith(".lora_A.weight")):
            continue
        module = name.removeprefix("attention.").removesuffix(".lora_A.weight")
        b = file.tensors.get(f"attention.{module}.lora_B.weight")
        info = source.tensors.get(f"{module}.weight")
        if info is None or b is None or info.shape != (b.shape[0], a.shape[1]) or b.shape[1] != a.shape[0]:
            problems.append(f"{name}: does not fit the base's {module}")
        else:
            changes[info.name] = [Change(Factor.whole(file, a), Factor.whole(file, b), scale)]
    if not changes and not problems:
        problems.append("names a LoRA on attention in moe_config.json and holds none")
    return changes
