"""A model of experts read back into routers and low-rank factors on a base. The command behind ``models/fuse.py import``.

Two ways. A folder that ``export`` wrote holds the run's own files: they are taken, bit for bit, after every weight of the
folder was held to what they give. Any other is told apart from the base: what an expert's matrices add must be of low rank.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import console
import manifest
from errors import UserError
from flags.export import ImportArgs
from models.checkpoints.configs import filled_known
from models.checkpoints.fingerprints import fingerprint
from models.checkpoints.header import KINDS, TensorInfo
from models.checkpoints.reader import INDEX, Checkpoint
from models.export.companions import FACTORS, TEMPLATES
from models.export.layouts import LAYOUTS, MoeLayout, moe_settings
from models.export.plan import moe_plan
from models.export.recover import last_place, recover
from models.export.sources import PROJECTIONS, Source, open_base, open_moe, plain_source
from models.merging.merge import COMPANIONS
from models.moe.files import CONFIG, FORMAT, WEIGHTS, MoeConfig
from models.moe.layer import TuningConfig
from models.operators.low_rank import Pair
from models.operators.spans import spans

log = logging.getLogger(__name__)
#: Settings of config.json that say what the weights compute.
_COMPARED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters", "sliding_window",
             "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "attention_bias")
_SHOWN = 4


def import_moe(args: ImportArgs) -> str:
    """Read a folder in a layout of experts back into ``results/outputs/NAME``, a run; returns what to say.

    Raises:
        UserError: no such layout, another base, weights beside the experts that differ from the base's, or experts that
            are no low-rank changes of it.
    """
    folder, target = _folder(args), args.results / "outputs" / args.name
    with ExitStack() as stack:
        file = stack.enter_context(Checkpoint.open(folder)).plain()
        base = plain_source(args.name, (folder,), open_base(args, stack))
        layout = _layout(file, base)
        settings = asdict(args) | {"folder": folder.name, "run_name": args.name, "inputs": {
            "base": base.hashes["base"], "model": fingerprint(folder)}}
        if not args.overwrite and manifest.finished(target, settings):
            return f"{target}: already imported"
        kept = _verified(folder, file, layout, args, stack)
        found = None if kept else _recovered(file, base, layout, args)
        with manifest.writing(target, "import", settings, overwrite=args.overwrite) as run:
            if found is None:
                for name in (WEIGHTS, CONFIG):
                    shutil.copyfile(folder / FACTORS / name, run.folder / name)
                said = f"the factors that it was written from, every weight of the folder held to them ({kept})"
            else:
                tensors, config, said = found
                save_file(tensors, run.folder / WEIGHTS, metadata={"format": "pt"})
                manifest.write_json(run.folder / CONFIG, {"format": FORMAT, **asdict(config)})
            _companions(folder, run.folder)
            run.parents.append(str(folder))
            run.inputs.update(settings["inputs"])
            run.metrics.update(layout=layout.name, exact=bool(kept), said=said)
    manifest.register(args.results, {"kind": "run", "command": "import", "run": args.name, **run.metrics})
    return f"{target}: {said}"


def _folder(args: ImportArgs) -> Path:
    run = args.results / "outputs" / args.folder
    return (run if "/" not in args.folder and run.is_dir() else Path(args.folder).expanduser()).resolve()


def _layout(file: Checkpoint, base: Source) -> MoeLayout:
    """The layout of the folder; a UserError where it, or the base below it, is another model than the two can be."""
    kind = file.config.get("model_type")
    if kind not in LAYOUTS:
        raise UserError(f"{file.folder}: its model_type is {kind}; import reads {' and '.join(LAYOUTS)}")
    layout, problems = LAYOUTS[kind], []
    if base.kind not in layout.families:
        raise UserError(f"{file.folder}: a {kind} is an upcycled {' or '.join(layout.families)}, but --model_name_or_path "
                        f"{base.base.folder} is a {base.kind}; give the model that its experts were made from")
    have = filled_known(file.config)
    want = filled_known(moe_settings(layout, base, have.num_experts, have.num_experts_per_tok, None))
    for key in _COMPARED:
        one, two = (_setting(config, key) for config in (have, want))
        if one != two:
            problems.append(f"{file.folder}: {key} is {one}, and {two} in a model of the base {base.base.folder}; give the "
                            "base that it was made from")
    if problems:
        raise UserError(*problems)
    return layout


def _setting(config: Any, key: str) -> Any:
    value = getattr(config, key, None)
    # what a configuration leaves open: every class computes it so
    return config.hidden_size // config.num_attention_heads if key == "head_dim" and value is None else value


def _verified(folder: Path, file: Checkpoint, layout: MoeLayout, args: ImportArgs, stack: ExitStack) -> str:
    """How nearly the run's own files give the folder's weights; empty where there are none, or they give others."""
    if not (folder / FACTORS / CONFIG).is_file():
        return ""
    try:
        source = open_moe(folder / FACTORS, open_base(args, stack), args, stack)
        plan = moe_plan(source, layout, "")
    except UserError as error:
        log.info("%s: not used, the weights are looked at instead: %s", folder / FACTORS, error)
        return ""
    names = {job.name for job in plan.jobs}
    if names != set(file.tensors) or source.required_moe.top_k != file.config.get("num_experts_per_tok"):
        log.info("%s: holds another model than the folder; the weights are looked at instead", folder / FACTORS)
        return ""
    unequal = 0
    for job in tqdm(plan.jobs, "comparing", disable=console.hidden() or None):
        piece, info = job.pieces[0], file.tensors[job.name]
        if info.shape != job.shape or info.dtype not in ("F32", "F16", "BF16"):
            return ""
        for first, shape in spans(job.shape, by_rows=False):
            count = prod(shape)
            mine = piece.checkpoint.read(piece.info, first, count, _buffer(count, piece.info)).double()
            there = file.read(info, first, count, _buffer(count, info))
            unequal += int((mine.float().to(there.dtype) != there).sum())
            place = last_place(there.double(), info.dtype)
            # half a unit is rounding; the sum before it may differ by as much from machine to machine, and where its terms
            # cancel, by a unit of theirs
            if ((mine - there.double()).abs() > place.maximum(place.square().mean().sqrt())).any():
                log.info("%s: %s is not what %s gives; the weights are looked at instead", folder, job.name, FACTORS)
                return ""
    return f"{unequal} of {sum(prod(job.shape) for job in plan.jobs)} values differ in their last place"


def _recovered(file: Checkpoint, base: Source, layout: MoeLayout, args: ImportArgs
               ) -> tuple[dict[str, Tensor], MoeConfig, str]:
    """Factors out of the weights alone."""
    config, family = filled_known(file.config), base.required_family
    experts, layers = config.num_experts, config.num_hidden_layers
    names = args.expert_names or tuple(f"expert_{i}" for i in range(experts))
    if len(names) != experts:
        raise UserError(f"--experts {args.experts}: the folder has {experts}; name as many")
    looked = _Looked(file, base, args)
    parts = {name: getattr(family, name) for name in PROJECTIONS}
    ffn = {f"{family.layers}.{i}.{family.ffn}.{part}.weight": (i, name) for i in range(layers)
           for name, part in parts.items()}
    tensors: dict[str, Tensor] = {}
    attention: dict[str, Pair] = {}
    for tensor in tqdm(base.tensors, "importing", disable=console.hidden() or None):
        if tensor not in ffn:
            if (pair := looked.beside(tensor)) is not None:
                attention[tensor.removesuffix(".weight")] = pair
            continue
        layer, name = ffn[tensor]
        changes = [looked.change(tensor, layout.expert.format(layer=layer, expert=e, part=layout.parts[name]))
                   for e in range(experts)]
        pairs = [change for change in changes if change is not None]
        if len(pairs) == experts:
            a, b = _stacked(pairs)
            tensors |= {f"layers.{layer}.{name}.a": a, f"layers.{layer}.{name}.b": b}
    for layer in range(layers):
        tensors[f"layers.{layer}.router"] = looked.router(layout.router.format(layer=layer), experts)
    looked.refuse_rest({layout.router.format(layer=i) for i in range(layers)})
    if looked.problems:
        more = len(looked.problems) - _SHOWN
        raise UserError(*looked.problems[:_SHOWN], *([f"{file.folder}: and {more} more like these"] if more > 0 else []))
    lora = None
    if attention:
        lora = TuningConfig(r := max(a.shape[0] for a, _ in attention.values()), float(r))
        tensors |= _attention(attention, base, r)
    made = MoeConfig(names, config.num_experts_per_tok, args.model_name_or_path, base.hashes["base"], {}, None, lora)
    return tensors, made, (
        f"{experts} experts of rank {looked.rank} at most" + (f", a LoRA of rank {lora.r} on attention" if lora else "")
        + f"; what they leave of the file is {looked.left:.2f} times what rounding alone would, at most")


class _Looked:
    """The folder's tensors against the base's, and what was found on the way."""

    def __init__(self, file: Checkpoint, base: Source, args: ImportArgs) -> None:
        self.file, self.base, self.args = file, base, args
        self.problems: list[str] = []
        self.used: set[str] = set()
        self.rank, self.left = 0, 0.0

    def beside(self, tensor: str) -> Pair | None:
        """A tensor outside the experts: the base's own (None), or attention with a low-rank change."""
        pair = self._pair(tensor, tensor)
        if pair is None:
            return None
        stored, own = pair
        if torch.equal(stored, own.to(stored.dtype)):
            return None
        if tensor.rpartition(".")[0].rpartition(".")[2] not in self.base.required_family.attention or stored.dim() != 2:
            self.problems.append(f"{self.file.folder}: {tensor} is not the base's, and a fused MoE shares all but experts "
                                 "and attention with it; give the base that it was made from")
            return None
        return self._change(tensor, own, stored)

    def change(self, tensor: str, name: str) -> Pair | None:
        """What an expert's matrix ``name`` adds to the base's ``tensor``."""
        pair = self._pair(tensor, name)
        return None if pair is None else self._change(name, pair[1], pair[0])

    def router(self, name: str, experts: int) -> Tensor:
        info = self.file.tensors.get(name)
        if info is None or info.shape != (experts, self.base.config["hidden_size"]):
            self.problems.append(f"{self.file.folder}: has no router {name} of {experts} experts")
            return torch.empty(0)
        return _values(self.file, info).float()

    def refuse_rest(self, routers: set[str]) -> None:
        if rest := sorted(self.file.tensors.keys() - self.used - routers):
            self.problems.append(f"{self.file.folder}: {len(rest)} tensors have no place in a fused MoE on this base, e.g. "
                                 f"{rest[0]}; import reads models whose experts are changes of one base")

    def _pair(self, tensor: str, name: str) -> tuple[Tensor, Tensor] | None:
        info, own = self.file.tensors.get(name), self.base.tensors[tensor]
        self.used.add(name)
        if info is None or info.shape != own.shape or info.dtype not in ("F32", "F16", "BF16"):
            there = f"{info.dtype} {list(info.shape)}" if info else "absent"
            self.problems.append(f"{self.file.folder}: {name} is {there}, the base's is {own.dtype} {list(own.shape)}")
            return None
        return _values(self.file, info), _values(self.base.base, own)

    def _change(self, name: str, own: Tensor, stored: Tensor) -> Pair | None:
        most = self.args.max_rank or max(min(own.shape) // 4, 1)
        found = recover(own, stored, self.file.tensors[name].dtype, most, self.args.seed)
        if found is None:
            self.problems.append(f"{self.file.folder}: {name} differs from the base by more than rank {most}, so it is no "
                                 "low-rank change of it; give the base that its experts were made from, a larger "
                                 "--max_rank, or use the folder as it is (inference.py, models/fuse.py merge)")
            return None
        self.rank, self.left = max(self.rank, found.rank), max(self.left, found.left)
        return found.pair


def _stacked(pairs: list[Pair]) -> Pair:
    """(a (E, R, in), b (E, out, R)); smaller ranks are padded with zeros, which changes nothing."""
    rank = max(a.shape[0] for a, _ in pairs)
    padded = [_padded(pair, rank) for pair in pairs]
    return torch.stack([a for a, _ in padded]), torch.stack([b for _, b in padded])


def _padded(pair: Pair, rank: int) -> Pair:
    a, b = pair
    lack = rank - a.shape[0]
    return torch.nn.functional.pad(a, (0, 0, 0, lack)), torch.nn.functional.pad(b, (0, lack))


def _attention(found: dict[str, Pair], base: Source, rank: int) -> dict[str, Tensor]:
    """A LoRA on every projection of attention, of scale 1: zeros where nothing changed."""
    tensors: dict[str, Tensor] = {}
    for name, info in base.tensors.items():
        module = name.removesuffix(".weight")
        if module == name or module.rpartition(".")[2] not in base.required_family.attention:
            continue
        nothing = torch.zeros(1, info.shape[1]), torch.zeros(info.shape[0], 1)
        a, b = _padded(found.get(module, nothing), rank)
        tensors |= {f"attention.{module}.lora_A.weight": a.contiguous(), f"attention.{module}.lora_B.weight": b.contiguous()}
    return tensors


def _values(file: Checkpoint, info: TensorInfo) -> Tensor:
    return file.read(info, 0, prod(info.shape), torch.empty(info.nbytes, dtype=torch.uint8)).view(info.shape)


def _buffer(count: int, info: TensorInfo) -> Tensor:
    return torch.empty(count * KINDS[info.dtype][0], dtype=torch.uint8)


def _companions(folder: Path, target: Path) -> None:
    for file in (file for pattern in COMPANIONS for file in folder.glob(pattern)):
        if file.is_file() and file.name not in (INDEX, "generation_config.json"):
            shutil.copyfile(file, target / file.name)
    if (folder / TEMPLATES).is_dir():
        shutil.copytree(folder / TEMPLATES, target / TEMPLATES)
