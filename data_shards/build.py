"""Sources to shards and manifests: `python -m data_shards.build data=demo [only=[a,b]]`.

Four phases (docs/data/building.md): *examine* checks, tokenises and hashes every row, block by
block, and writes no shard; *duplicates* compares what was found within and across sources and with
evaluation sets; *write* makes the shards, block by block; *finish* makes the manifest and the card
and puts the data set under its name. Each goes on where it was killed. What is written depends
neither on the number of workers nor on who did which block.

    dry=1                             ten samples of each source as a page, nothing is built
    source=a phase=examine part=0/8   one share of the blocks of one phase, as an array runs them;
    source=a phase=write part=0/8     phase=write ends what is missing before it, and publishes
                                      when no block is left
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from conf.schema.data import DataConfig, SourceConfig
from conf.schema.model import ModelConfig
from data_shards.build_plan import BuildError, BuildPlan, Share
from data_shards.build_run import BuildRun
from data_shards.chat import ChatTokenizer
from data_shards.manifest import Manifest
from models.anyres import AnyresGeometry

__all__ = ["BuildError", "build_all", "build_dataset", "main"]


def build_all(
    data: DataConfig,
    model: ModelConfig,
    only: Sequence[str] | None = None,
    share: Share | None = None,
) -> None:
    """Build every source of `data`, or those named, or a share of one of them.

    Raises:
        BuildError, SourceError, TokenizerError: naming file, cause and remedy. Data sets that were
            finished before stay as they are.
    """
    tokenizer = ChatTokenizer.from_directory(data.tokenizer)
    tokenizer.require_model(model)
    geometry = AnyresGeometry.from_model(model)
    plan = BuildPlan(data, geometry, tokenizer.digest(), only)
    if BuildRun(plan).run(share):
        from data_shards.card.overview import write_overview  # Jinja, for this alone

        write_overview(Path(data.root), data.sources)


def build_dataset(
    name: str,
    source: SourceConfig,
    data: DataConfig,
    geometry: AnyresGeometry,
    tokenizer_digest: str,
) -> Manifest:
    """Build one data set under `data.root`/`name`, or return the one that is there already."""
    data = replace(data, sources={**data.sources, name: source})
    return BuildRun(BuildPlan(data, geometry, tokenizer_digest, [name])).run()[name]


def _preview(data: DataConfig, model: ModelConfig, only: Sequence[str] | None, folder: Path) -> int:
    """A page for each source; the exit status: 1 when a source could not be read."""
    from data_shards.preview import write_preview  # Jinja and Pillow, for this alone

    unknown = sorted(set(only or ()) - set(data.sources))
    if unknown:
        raise BuildError(
            f"only= names {', '.join(unknown)}; data.sources has {', '.join(data.sources)}"
        )
    status = 0
    for name, source in data.sources.items():
        if only is None or name in only:
            try:
                print(f"{name}: {write_preview(name, source, data, model, folder)}", flush=True)
            except ValueError as error:  # the others are still worth seeing
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
                status = 1
    return status


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status."""
    from conf.compose import compose  # Hydra is for commands only

    ours = {"only": "", "dry": "", "source": "", "phase": "", "part": "0/1"}
    overrides = []
    for word in arguments:
        key, _, value = word.partition("=")
        if key in ours:
            ours[key] = value
        else:
            overrides.append(word)
    only = [name.strip() for name in ours["only"].strip("[]").split(",") if name.strip()] or None
    try:
        share = Share.parse(ours["source"], ours["phase"], ours["part"])
        config = compose(overrides)
        config.data.check()
        if ours["dry"] not in ("", "0", "false"):
            folder = Path(config.runs_dir) / config.run / "preview"
            return _preview(config.data, config.model, only, folder)
        build_all(config.data, config.model, only, share)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
