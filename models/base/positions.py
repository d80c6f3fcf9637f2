"""How long a text a model can read: its positions, as its configuration counts them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import UserError

#: Kinds of RoPE that stretch the positions which ``max_position_embeddings`` counts before the stretch.
_STRETCHED = ("linear", "dynamic", "yarn")


def positions(config: Any) -> int | None:
    """Tokens that a model of this transformers configuration reads at most; None where nothing says.

    Linear, dynamic and YaRN scaling stretch by a factor, and files differ on whether ``max_position_embeddings`` has it
    already: the longer reading counts, so that nothing is refused which a model can read.
    """
    config = config.get_text_config()
    counted = getattr(config, "max_position_embeddings", None)
    if not isinstance(counted, int) or counted <= 0:
        return None
    return max(counted, *(int((rope.get("original_max_position_embeddings") or counted) * (rope.get("factor") or 1))
                          for rope in ropes(config) if rope.get("rope_type") in _STRETCHED), 0)


def ropes(config: Any) -> list[dict[str, Any]]:
    """A model's RoPE settings: one for all layers, or one by layer type (Gemma 3)."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [part for part in (rope, *rope.values()) if isinstance(part, dict)]


def steady(config: Any, longest: int) -> bool:
    """Whether rows of up to ``longest`` tokens may stand in one pass.

    LongRoPE and dynamic scaling take their frequencies from the longest row of a pass beyond the original length.
    """
    reaches = [rope.get("original_max_position_embeddings") or config.max_position_embeddings
               for rope in ropes(config) if rope.get("rope_type") in ("longrope", "dynamic")]
    return all(longest <= reach for reach in reaches)


def check_rows(base: Path, lengths: Sequence[int], window: int) -> None:
    """Refuse to train on rows beyond the positions of a base: RoPE goes on there, and what is learned is noise.

    Args:
        lengths: tokens of each row, cut at the window.
        window: --model_max_length.
    """
    from transformers import AutoConfig

    reach = positions(AutoConfig.from_pretrained(base, trust_remote_code=False))
    if reach and (beyond := sum(length > reach for length in lengths)):
        raise UserError(f"--model_max_length {window}: {beyond} of {len(lengths)} rows are longer than the {reach} "
                        f"positions of this base (the longest: {max(lengths)} tokens); give --model_max_length {reach}, "
                        "which cuts them, or a base that reads more")
