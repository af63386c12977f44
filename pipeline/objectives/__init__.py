"""What is minimised; `build_objective` picks by `stage.objective`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.objectives.base import Objective

if TYPE_CHECKING:
    from pipeline.trainer import Trainer


def build_objective(trainer: Trainer) -> Objective:
    """The stage's objective; for DPO this runs or reads the reference pass."""
    ranks, stage = trainer.ranks, trainer.config.stage
    if stage.objective == "sft":
        from pipeline.objectives.sft import SupervisedObjective

        return SupervisedObjective(ranks.context, ranks.context_size)
    from pipeline.objectives.preference import PreferenceObjective
    from pipeline.reference import reference_log_probs

    return PreferenceObjective(
        stage.preference.beta, reference_log_probs(trainer), ranks.context, ranks.context_size
    )
