"""What the trainer's network makes of the same tokens, on the ranks of a layout.

    RANK=.. WORLD_SIZE=.. python -m tools.parity.megatron_rank SPEC.json

SPEC names the checkpoint, the model, the layout, and a folder of micro-batches; logits and image
features of each are written beside them by the ranks that have them. Everything in float32.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from conf.compose import from_mapping
from conf.schema import PrecisionConfig
from pipeline.distributed import session


def run_case(chunks: list[Any], batch: dict[str, Tensor], stages: int) -> Tensor | None:
    """Logits [T, V] on the ranks of the last stage, else None; all ranks call it."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward(batches: Any, module: Any) -> tuple[Tensor, Any]:
        logits: Tensor = module(**next(batches))
        return logits, lambda logits, non_loss_data: logits

    reports = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter([batch] * stages) for _ in chunks],
        model=chunks,
        num_microbatches=stages,  # as many as an interleaved schedule wants
        seq_length=len(batch["tokens_T"]),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not reports:
        return None
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(reports[0]) for _ in range(group.size())]
    dist.all_gather(parts, reports[0].contiguous(), group=group)
    return torch.cat(parts, dim=1)


@torch.no_grad()
def main(arguments: list[str]) -> int:
    """Command line; see the module's docstring."""
    spec = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    config = from_mapping(spec["config"], arguments[0])
    parallel, folder = config.parallel, Path(spec["folder"])
    with session(parallel, seed=1234) as ranks:
        from models.build import build_chunks
        from pipeline.checkpoint import load_model

        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max((os.cpu_count() or 1) // parallel.world_size, 1))
        chunks = build_chunks(config.model, parallel, PrecisionConfig())
        load_model(chunks, Path(spec["checkpoint"]))
        rounded = getattr(torch, spec["rounded"])
        for chunk in chunks:
            chunk.eval()
            for parameter in chunk.parameters():
                parameter.copy_(parameter.to(rounded))
        for name in spec["cases"]:
            with np.load(folder / f"{name}.batch.npz") as arrays:
                batch = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
            batch = {key: tensor.to(ranks.device) for key, tensor in batch.items()}
            keep = int(batch.pop("first"))
            batch["max_seqlen"] = int(batch["max_seqlen"])  # type: ignore[assignment]
            if ranks.first_stage:
                features = chunks[0].feature_table(batch["tiles_NCHW"])[batch["image_rows_P"]]
                if ranks.reports:
                    np.save(folder / f"{name}.features.npy", features.float().cpu().numpy())
            logits = run_case(chunks, batch, parallel.pipeline)
            if logits is not None and ranks.rank == parallel.world_size - 1:
                logits = logits.float()
                np.savez(
                    folder / f"{name}.logits.npz",
                    top=logits.topk(5).indices.cpu().numpy(),
                    logits=logits[keep:].cpu().numpy(),
                )
            if ranks.reports:
                print(f"trainer's network: {name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
