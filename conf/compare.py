"""What may change when a run is continued, and what may not.

The layout, the machine and the bookkeeping may; whatever decides what the weights become may not.
"""

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
    "data.build_workers",
    "data.load_workers",
    "run",
    "runs_dir",
)


def changed(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for every value that differs and must not, in the schema's order."""
    before, after = _flat(to_mapping(old)), _flat(to_mapping(new))
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in {**before, **after}
        if before.get(key, "absent") != after.get(key, "absent") and not _may_change(key)
    ]


def _may_change(key: str) -> bool:
    if key.startswith("data.sources.") and key.endswith(".input"):
        return True
    return any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
