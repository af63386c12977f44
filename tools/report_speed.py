"""What the report says of a stage's speed, from the figures in its metrics.jsonl."""

from collections.abc import Mapping, Sequence
from typing import Any

# In the order of the bar; as pipeline.timers.KINDS.
KINDS = ("data", "forward", "backward", "optimizer", "communication", "checkpoint", "other")
COLOURS = ("#8a6d1d", "#1f5fa8", "#5b93d1", "#2c8a4b", "#c2571a", "#7a4fa3", "#b9b9b2")


def speed_facts(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of a whole stage; {} where it was trained before they were recorded.

    Rates are totals over totals, so a slow step counts as long as it took.
    """
    told = [r for r in records if "tflops_per_gpu" in r and r.get("seconds", 0) > 0]
    seconds = sum(record["seconds"] for record in told)
    if not told or not seconds:
        return {}

    def over_time(name: str) -> float | None:
        known = [r for r in told if r.get(name) is not None]
        time = sum(r["seconds"] for r in known)
        return sum(r[name] * r["seconds"] for r in known) / time if time else None

    computed = sum(r["tokens"] / r["effective_tokens"] for r in told if r["effective_tokens"])
    kinds = {kind: sum(r.get(f"seconds_{kind}", 0.0) for r in told) for kind in KINDS}
    imbalance = [r["imbalance"].get("flops", 1.0) for r in told if "imbalance" in r]
    return {
        "tokens_per_second": over_time("tokens_per_second"),
        "images_per_second": over_time("images_per_second"),
        "tflops_per_gpu": over_time("tflops_per_gpu"),
        "mfu": over_time("mfu"),
        "effective_tokens": sum(r["tokens"] for r in told) / computed if computed else None,
        "imbalance": sum(imbalance) / len(imbalance) if imbalance else None,
        "peak_memory_gib": max(r.get("peak_memory_gib", 0.0) for r in told),
        "shares": {kind: value / seconds for kind, value in kinds.items()},
    }


def figures(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(value, what it is) as the page shows them; what is not known is left out."""
    tflops = facts["tflops_per_gpu"]
    rate = f"{tflops:.0f} TFLOP/s" if tflops >= 10 else f"{1000 * tflops:.3g} GFLOP/s"
    shown = [
        (f"{facts['tokens_per_second']:,.0f}", "tokens a second"),
        (f"{facts['images_per_second']:,.1f}", "pictures a second"),
        (rate, "model FLOPs a rank"),
    ]
    if facts["mfu"] is not None:
        shown.append((f"{100 * facts['mfu']:.1f} %", "MFU (BF16 peak)"))
    if facts["effective_tokens"] is not None:
        shown.append((f"{100 * facts['effective_tokens']:.1f} %", "of tokens no padding"))
    if facts["imbalance"] is not None:
        shown.append((f"{facts['imbalance']:.2f}", "replica imbalance"))
    shown.append((f"{facts['peak_memory_gib']:.1f} GiB", "peak memory of a rank"))
    return shown


def split(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Segments of the bar of a step's time: name, colour, share; what is nothing is left out."""
    return [
        {"name": kind, "colour": colour, "share": facts["shares"][kind]}
        for kind, colour in zip(KINDS, COLOURS, strict=True)
        if facts["shares"][kind] >= 0.0005
    ]
