"""Both verdicts on a text, kept apart: the rules' and, where a model file is staged, the model's.

The label of a sample is always the rules'. What the model says is counted among the hits, under
names of its own, so that the card can show both and how often they agree.
"""

from dataclasses import replace

from data_shards.fasttext_model import FastTextModel
from data_shards.variety import Verdict, classify

MODEL = "model: "  # + label: samples that the model gave it
AGREEMENT = "rules and model: "  # + the rules' label, comma, the model's


class Judge:
    """Judges texts; one in each worker process.

    Args:
        model: a fastText file (data.variety_model), or None.

    Raises:
        ModelError: the file is not such a model, or the fasttext package is missing.
    """

    def __init__(self, model: str | None = None):
        self._model = FastTextModel(model) if model else None

    def __call__(self, text: str) -> Verdict:
        """The rules' verdict; the model's is counted in its hits unless it is another language."""
        verdict = classify(text)
        if self._model is None or verdict.label == "other":
            return verdict
        label = self._model.classify(text).label
        both = {f"{MODEL}{label}": 1, f"{AGREEMENT}{verdict.label}, {label}": 1}
        return replace(verdict, hits={**verdict.hits, **both})
