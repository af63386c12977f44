"""Runs parts one after another in one process; started by `__main__`, which watches the files."""

import importlib
import json
import sys
import time
from pathlib import Path

PARTS = ("smoke", "speed", "parity", "curve", "resume")


def main(settings: dict[str, str]) -> int:
    """0 when every part had its turn, 3 when the GPU is lost and a new process must go on."""
    import pipeline  # noqa: F401  # before Megatron, whose warnings it silences
    from tools.benchmarks.gpu.report import FAILED, OK, RUNNING, Report, Stopwatch, one_line

    out = Path(settings["out"])
    parts = settings["parts"].split(",")
    budgets = json.loads(settings["budgets"])
    first = Report(parts[0], out / f"{parts[0]}.json")
    first.write()  # imports and process groups count as the first part's time
    import torch

    from tools.benchmarks.gpu.context import Context
    from tools.benchmarks.gpu.shapes import real, tiny
    from tools.benchmarks.training import alone

    shapes = tiny() if settings["shape"] == "tiny" else real(int(settings["layers"]))
    torch.backends.cudnn.allow_tf32 = False  # FP32 is what others are compared with
    with alone() as device:
        for part in parts:
            report, watch = Report(part, out / f"{part}.json"), Stopwatch()
            report.write()
            context = Context(
                device=device,
                shapes=shapes,
                out=out,
                batches=Path(settings["batches"]),
                deadline=min(time.monotonic() + budgets[part], float(settings["end"]) - 3),
            )
            torch.manual_seed(0)
            module = importlib.import_module(f"tools.benchmarks.gpu.{part}")
            if report.attempt(part, lambda m=module, c=context, r=report: m.run(c, r)):  # type: ignore[misc]
                if report.status == RUNNING:
                    report.status = OK
            report.seconds = watch()
            report.write()
            try:
                context.free()
                context.synchronize()
            except RuntimeError as error:  # an illegal access spoils the process for good
                report.status, report.error = FAILED, one_line(error)
                report.write()
                return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(dict(word.split("=", 1) for word in sys.argv[1:])))
