"""Flags of evaluator/evaluate_skills.py."""

from __future__ import annotations

from dataclasses import dataclass

from config import flag
from flags.base import SKILLS
from flags.evaluate import EvaluateArgs

#: Tasks whose generated answers are scored (evaluator/scoring/answer_scores.py).
ANSWERED_SKILLS = ("maths", "summaries")
#: What --skills takes: a task's likelihood, or the scores of its answers.
_KNOWN = (*SKILLS, *(f"{name}_answers" for name in ANSWERED_SKILLS))


@dataclass(frozen=True)
class EvaluateSkillsArgs(EvaluateArgs):
    """Held-out likelihood of task answers and scores of generated ones: what realignment must not cost.

    cd evaluator; python evaluate_skills.py --task_name cross_RUN --skills english,maths
    """

    heading, general = "What is scored", False
    skills: str = flag("english", "tasks whose held-out rows are scored, separated by commas: TASK for their likelihood, "
                                 "maths_answers and summaries_answers for what inference.py answered to them")

    @property
    def skill_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.skills.split(",") if name.strip())

    def problems(self) -> list[str]:
        unknown = [name for name in self.skill_names if name not in _KNOWN]
        found = super().problems()
        if unknown or not self.skill_names:
            found.append(f"--skills {self.skills}: {', '.join(unknown) or 'nothing'} is no task; "
                         f"allowed: {', '.join(_KNOWN)}")
        return found
