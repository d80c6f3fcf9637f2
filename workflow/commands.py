"""The published command lines that a step may be: which flags each reads, and what a line resolves to. Runs none of them."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from collections.abc import Sequence
from typing import Any

import config
import flags
import manifest
from errors import UserError

#: File of a command, relative to the repository -> its flags (a name of ``flags``).
COMMANDS = {
    "align_basemodel.py": "AlignArgs", "models/llama_moe.py": "FuseMoeArgs", "inference.py": "InferenceArgs",
    "evaluator/evaluate_helpfulness.py": "EvaluateHelpfulnessArgs", "evaluator/evaluate_refusal.py": "EvaluateRefusalArgs",
    "evaluator/evaluate_safety.py": "EvaluateSafetyArgs", "evaluator/evaluate_skills.py": "EvaluateSkillsArgs",
    "evaluator/evaluate_truth_and_info.py": "EvaluateTruthArgs", "evaluator/evaluate_utility.py": "EvaluateUtilityArgs",
    "data/safety_sets.py": "SafetySetArgs",
}
FUSE = "models/fuse.py"


def parse(words: Sequence[str]) -> config.Parsed:
    """A command line against its real flags and preset, in silence.

    Args:
        words: the file, relative to the repository, and what follows it.

    Raises:
        UserError: no such command, or what its own flags have to say.
    """
    file, *rest = words
    if file == FUSE:
        table = importlib.import_module("models.fuse").COMMANDS
        if not rest or rest[0] not in table:
            raise UserError(f"{FUSE} {rest[0] if rest else ''}: no such sub-command; allowed: {', '.join(table)}")
        command, rest = table[rest[0]][0], rest[1:]
    elif file in COMMANDS:
        command = getattr(flags, COMMANDS[file])
    else:
        raise UserError(f"{file}: no command that a step can be; allowed: {', '.join([*COMMANDS, FUSE])}")
    # what a command tells its user about presets belongs to its own output
    with contextlib.redirect_stderr(io.StringIO()):
        return config.parse(command, rest)


def settings(words: Sequence[str]) -> dict[str, Any]:
    """What decides a step's result, preset values included: all flags but those of places and of speed, as JSON has them."""
    parsed = parse(words)
    # align_basemodel.py knows which training arguments make another run; the other commands have none
    named = parsed.args.settings(parsed.training) if hasattr(parsed.args, "settings") else vars(parsed.args)
    return json.loads(json.dumps({name: value for name, value in named.items() if name not in manifest.PLACE}))
