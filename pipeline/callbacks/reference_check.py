"""The first preference step must cost ln 2: policy and reference are still the same weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pipeline.callbacks.base import Callback, StepEvent

if TYPE_CHECKING:
    from pipeline.trainer import Trainer

# Packing differs between the reference pass and the step, hence rounding; log-probabilities are
# sums over an answer, so BF16 errs by far more than FP32.
_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}


class ReferenceCheck(Callback):
    """Stops before the first checkpoint when stored log-probabilities are not the policy's."""

    def on_step(self, trainer: Trainer, event: StepEvent) -> None:
        loss = event.result.values["loss"]
        tolerance = _TOLERANCE[trainer.config.precision.params]
        if event.step == 1 and abs(loss - math.log(2)) > tolerance:
            raise ValueError(
                f"the first preference loss is {loss:.6f}, not ln 2 = {math.log(2):.6f}: the files "
                f"in {trainer.stage_dir / 'reference'} were not computed with these weights; "
                "remove that folder"
            )
