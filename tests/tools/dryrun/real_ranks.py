"""What a real rank of gloo is asked, seen by torch's dispatcher: the dry run must foresee it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conf.schema import Config

# torch's operators -> the dry run's names, and which operand's size it counts
OPERATORS = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
    "_allgather_base_": ("all_gather", 1),
    "allgather_into_tensor_coalesced_": ("all_gather", 1),
    "allgather_": ("all_gather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 0),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 0),
    "reduce_scatter_": ("reduce_scatter", 0),
    "send": ("send", 0),
    "recv_": ("recv", 0),
}
RENAMED = {  # since torch 2.13
    "all_gather_single": "_allgather_base_",
    "all_gather_single_": "_allgather_base_",
    "all_gather_single_coalesced_": "allgather_into_tensor_coalesced_",
    "reduce_scatter_single_": "_reduce_scatter_base_",
    "reduce_scatter_single_coalesced_": "reduce_scatter_tensor_coalesced_",
}


class Listener(TorchDispatchMode):
    """Lists (operation, dtype, numbers) of every call of torch.distributed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.namespace == "c10d" and "barrier" not in func.name():
            name = func.name().split("::")[1]
            name = RENAMED.get(name, name)
            op, which = OPERATORS[name]
            operand = args[which]
            while isinstance(operand, list) and isinstance(operand[0], list):
                operand = operand[0]
            for tensor in operand if isinstance(operand, list) else [operand]:
                assert isinstance(tensor, Tensor)
                dtype = str(tensor.dtype).removeprefix("torch.")
                self.calls.append((op, dtype, tensor.numel()))
        return func(*args, **(kwargs or {}))


def real_step(config: Config) -> tuple[list[tuple[str, str, int]], dict[str, int]]:
    """One optimizer step with numbers: the calls of its step, and bytes as the dry run counts."""
    from pipeline.distributed import session
    from pipeline.model import build_training_model
    from pipeline.objectives.sft import SupervisedObjective
    from pipeline.optimizer import build_optimizer
    from pipeline.step import train_step
    from tools.dryrun.batches import kinds_of, micro_batch, micro_batch_count
    from tools.dryrun.rank import _bytes

    with session(config.parallel, config.stage.seed) as ranks:
        models = build_training_model(config)
        optimizer = build_optimizer(models, config.stage, config.parallel, config.precision)
        batches = [
            micro_batch(config, kind, ranks.first_stage)
            for kind in kinds_of(ranks.data, ranks.data_size, micro_batch_count(config))
        ]
        objective = SupervisedObjective(ranks.context, ranks.context_size)
        with Listener() as listener:
            train_step(models, optimizer, objective, batches, config.stage, ranks.device)
        return listener.calls, _bytes(models, optimizer)
