"""One rank of one stage: `python -m pipeline.train --config runs/NAME/stage1/config.yaml`.

Shards become packed batches, batches train the model, the stage ends in a checkpoint and a
DONE.json from which the next stage begins.
"""

import time

STARTED = time.monotonic()  # before anything slow: STOP_AFTER_SECONDS counts from here

import argparse  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from pipeline import early_signals  # noqa: E402

if __name__ == "__main__":  # the checkpoint writer spawns a process that imports this module
    early_signals.arm()

from conf.check import check  # noqa: E402
from conf.compose import load  # noqa: E402
from conf.schema import Config  # noqa: E402
from pipeline.handoff import DONE, read_done  # noqa: E402


def run(config: Config) -> int:
    """Train the stage to its end; 0 when done, 128 + signal number when stopped before."""
    # Imported here: reading and refusing a configuration must not wait for torch.
    from pipeline.callbacks import standard_callbacks
    from pipeline.data import open_data
    from pipeline.distributed import session
    from pipeline.hardware import detect
    from pipeline.model import build_training_model
    from pipeline.objectives import build_objective
    from pipeline.trainer import Trainer

    stage_dir = Path(config.runs_dir) / config.run / config.stage.name
    if (stage_dir / DONE).is_file():
        read_done(stage_dir)  # ValueError when damaged
        print(f"[{config.stage.name}] done already: {stage_dir / DONE}")
        return 0
    check(config, detect())
    with session(config.parallel, config.stage.seed) as ranks:
        data = open_data(config, ranks)
        models = build_training_model(config)
        trainer = Trainer(config, ranks, data, models, stage_dir)
        trainer.check_predecessor()
        objective = build_objective(trainer)  # for DPO, the reference pass comes first
        trainer.begin()
        return trainer.fit(objective, standard_callbacks(trainer, STARTED))


def main() -> None:
    """Entry point; configuration, data and file errors become one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, type=Path, help="resolved YAML of one stage")
    arguments = parser.parse_args()
    try:
        code = run(load(arguments.config))
    except (ValueError, OSError, FloatingPointError) as error:
        sys.stdout.flush()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
