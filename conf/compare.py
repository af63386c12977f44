"""What may change when a run is continued, and what may not.

The layout, the machine and the bookkeeping may; whatever decides what the weights become may not,
nor in which form the optimizer's state is saved.
"""

from collections.abc import Sequence
from typing import Any

from conf.compose import to_mapping
from conf.schema import Config

# Dotted keys, and everything below them, that a continued run may change.  The batch is the same
# under every layout, and paths only say where things lie: what lies there is checked by digest.
MAY_CHANGE = (
    "parallel",
    "cluster",
    "precision.grad_reduce_in_fp32",
    "stage.micro_batch_size",
    "stage.log_every",
    "stage.gpu_hours",
    "stage.checkpoint",
    "data.root",
    "data.tokenizer",
    "data.shard_bytes",
    "data.block_rows",
    "data.build_workers",
    "data.load_workers",
    "data.max_masked",
    "run",
    "runs_dir",
)
# But not these: the optimizer's state is saved in another form.
MUST_STAY = ("parallel.distributed_optimizer",)


def changed(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for every value that differs and must not, in the schema's order."""
    return [line for key, line in _differences(old, new).items() if not _may_change(key)]


def differing(old: Config, new: Config, passed_over: Sequence[str] = ()) -> list[str]:
    """`key: old -> new` for every value that differs, but for these keys and all below them."""
    return [line for key, line in _differences(old, new).items() if not _is_below(key, passed_over)]


def _differences(old: Config, new: Config) -> dict[str, str]:
    before, after = _flat(to_mapping(old)), _flat(to_mapping(new))
    return {
        key: f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in {**before, **after}
        if before.get(key, "absent") != after.get(key, "absent")
    }


def _may_change(key: str) -> bool:
    if key.startswith("data.sources.") and key.endswith(".input"):
        return True
    return key not in MUST_STAY and _is_below(key, MAY_CHANGE)


def _is_below(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
