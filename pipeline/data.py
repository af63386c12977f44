"""What a stage reads: its plan, and this replica's micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.schema import Config
from data_shards.batch import PackedBatch
from data_shards.chat import ChatTokenizer
from data_shards.loader import Loader
from data_shards.manifest import Manifest, read_manifest
from data_shards.plan import Plan, build_plan, sequential_plan
from models.anyres import AnyresGeometry
from pipeline.callbacks.base import BatchCounts
from pipeline.distributed import Ranks


@dataclass(frozen=True)
class StageData:
    """The data of one stage on one rank; everything but the loaders is the same on all ranks."""

    plan: Plan
    everything: Plan  # each sample of the mixture once, for passes that look at all of them
    manifests: dict[str, Manifest]
    tokenizer: ChatTokenizer
    geometry: AnyresGeometry
    micro_batch_size: int
    workers: int
    ranks: Ranks

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.plan.steps

    @property
    def manifest_digests(self) -> list[str]:
        """Content digests of the data sets, in the order of their numbers."""
        return [self.manifests[name].info.digest for name in self.plan.names]

    def _loader(self, plan: Plan) -> Loader:
        return Loader(
            plan,
            self.manifests,
            self.tokenizer,
            self.geometry,
            micro_batch_size=self.micro_batch_size,
            dp_rank=self.ranks.data,
            dp_size=self.ranks.data_size,
            need_images=self.ranks.first_stage,
            workers=self.workers,
        )

    def batches(self, start: int) -> Iterator[tuple[int, list[PackedBatch]]]:
        """(step, this replica's micro-batches) from `start` to the end of the stage."""
        return self._loader(self.plan).batches(start)

    def every_sample(self, steps: Sequence[int]) -> Iterator[tuple[int, list[PackedBatch]]]:
        """(step, micro-batches) of these steps of a pass over all samples; every replica has as
        many."""
        return self._loader(self.everything).chosen(steps)

    def counts(self, step: int, masked: int) -> BatchCounts:
        """What the global batch of `step` holds, by the manifests."""
        tokens = samples = images = tiles = 0
        for pack in self.plan.packs(step):
            samples += len(pack)
            for which, row in pack.tolist():
                manifest = self.manifests[self.plan.names[which]]
                tokens += int(manifest.tokens[row]) + int(manifest.tokens_rejected[row])
                tiles += int(manifest.tiles[row])
                images += int(manifest.first_image[row + 1] - manifest.first_image[row])
        return BatchCounts(tokens, samples, images, tiles, masked)


def open_data(config: Config, ranks: Ranks) -> StageData:
    """Read manifests and tokenizer of the stage's mixture and plan it.

    Raises:
        ValueError: a manifest, shard or tokenizer is missing, damaged or does not fit; the message
            names the file and the remedy.
    """
    stage = config.stage
    weights = config.data.mix.get(stage.name)
    if not weights:
        raise ValueError(f"data.mix has no entry {stage.name!r}; add one to conf/data/*.yaml")
    manifests = {
        name: read_manifest(Path(config.data.root) / name / "manifest.parquet")
        for name, weight in weights.items()
        if weight > 0
    }
    tokenizer = ChatTokenizer.from_directory(config.data.tokenizer)
    tokenizer.require_model(config.model)
    return StageData(
        plan=build_plan(manifests, weights, stage),
        everything=sequential_plan(manifests, weights, stage),
        manifests=manifests,
        tokenizer=tokenizer,
        geometry=AnyresGeometry.from_model(config.model),
        micro_batch_size=stage.micro_batch_size,
        workers=config.data.load_workers,
        ranks=ranks,
    )
