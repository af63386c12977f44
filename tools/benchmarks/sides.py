"""Both sides of the CPU benchmarks: transformers' model and ours, on the same documents.

Each function here is called in a process of its own (`tools.benchmarks.turns`) and returns what one
turn does: all batches once, forward, backward and optimizer.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from conf.schema import Config, ModelConfig
from data_shards.batch import PackedBatch
from pipeline.objectives.base import Objective
from pipeline.objectives.preference import PreferenceObjective
from pipeline.objectives.sft import SupervisedObjective
from tools.benchmarks.documents import Document, padded_for_transformers, transformers_twin

Turn = Callable[[], dict[str, float]]
SPECIAL_IDS: dict[str, int | None] = {"bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 2}
SEED = 0


def twin(model: ModelConfig) -> Any:
    """The same weights in every process."""
    torch.manual_seed(SEED)
    return transformers_twin(model, SPECIAL_IDS)


def transformers_training(
    model: ModelConfig,
    batches: Sequence[Sequence[Document]],
    accumulation: int,
    config: Config,
    check: Sequence[Document],
    threads: int,
) -> Turn:
    """A plain loop around `LlavaNextForConditionalGeneration`, as the Trainer runs it, without the
    Trainer's own work: right padding to the longest of each micro-batch, loss summed over the
    step's targets and divided once (`num_items_in_batch`), clipped, fused AdamW."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    recipe, pad_id = config.stage.optimizer, SPECIAL_IDS["pad_token_id"]
    assert pad_id is not None
    network = twin(model).train()
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=config.stage.lr.language,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    inputs = [padded_for_transformers(batch, pad_id) for batch in batches]
    with torch.no_grad():
        check_loss = float(network(**padded_for_transformers(check, pad_id), use_cache=False).loss)
    counts = counts_of(batches)
    counts["row_tokens"] = float(sum(batch["input_ids"].numel() for batch in inputs))

    def turn() -> dict[str, float]:
        started = time.perf_counter()
        for first in range(0, len(inputs), accumulation):
            step = slice(first, first + accumulation)
            targets = sum(document.targets for batch in batches[step] for document in batch)
            for batch in inputs[step]:
                network(**batch, use_cache=False, num_items_in_batch=targets).loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
        return {"seconds": time.perf_counter() - started, "check_loss": check_loss, **counts}

    return turn


def our_training(
    model: ModelConfig,
    steps: Sequence[Sequence[PackedBatch]],
    counts: dict[str, float],
    config: Config,
    threads: int,
    check: PackedBatch | None = None,
) -> Turn:
    """`pipeline.step.train_step` on the model and optimizer of a training job of one rank."""
    from models.hf_state import from_hf
    from pipeline.batch import DeviceBatch
    from tools.benchmarks.training import alone, build_job

    weights = from_hf(twin(model).state_dict(), model)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = alone()  # the process ends without leaving it
    device = context.__enter__()
    job = build_job(config, device)
    job.load(weights)
    constants = dict(counts)
    constants["row_tokens"] = float(sum(len(b.tokens_T) for micro in steps for b in micro))
    if check is not None:
        with torch.no_grad():
            losses_T = job.network(**DeviceBatch.from_packed(check, device).model_inputs())
            mask_T = torch.from_numpy(check.loss_mask_T)
            total = (losses_T.reshape(-1) * mask_T).sum()
        constants["check_loss"] = float(total / mask_T.sum())
    objective = _objective(config, steps)

    def turn() -> dict[str, float]:
        started = time.perf_counter()
        for micro_batches in steps:
            job.step(micro_batches, objective)
        return {"seconds": time.perf_counter() - started, **constants}

    turn.alone = context  # type: ignore[attr-defined]  # kept open
    return turn


def _objective(config: Config, steps: Sequence[Sequence[PackedBatch]]) -> Objective:
    if config.stage.objective == "sft":
        return SupervisedObjective()
    # Stage 3 looks the reference model's numbers up; which they are does not change the work.
    ids = [batch.sample_ids for micro in steps for batch in micro]
    reference = {(int(which), int(row)): (0.0, 0.0) for part in ids for which, row in part}
    return PreferenceObjective(config.stage.preference.beta, reference)


def counts_of(batches: Sequence[Sequence[Document]]) -> dict[str, float]:
    documents = [document for batch in batches for document in batch]
    """What a pass over these documents counts."""
    return {
        "tokens": float(sum(map(len, documents))),
        "targets": float(sum(document.targets for document in documents)),
        "documents": float(len(documents)),
        "tiles": float(sum(len(document.tiles_NCHW) for document in documents)),
    }
