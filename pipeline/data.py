"""What a stage reads: its plan, and this replica's micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conf.schema import Config
from data_shards.batch import PackedBatch
from data_shards.chat import ChatTokenizer
from data_shards.loader import Loader
from data_shards.manifest import Manifest, read_manifest
from data_shards.plan import Plan, build_plan, sequential_plan
from models.anyres import AnyresGeometry
from pipeline.callbacks.base import BatchCounts, Work
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
        """What the global batch of `step` holds, by the manifests; the same on all ranks."""
        packs, replicas = self.plan.packs(step), self.ranks.data_size
        samples = np.concatenate([*packs, np.empty((0, 2), np.int32)])
        # Replica r takes packs [r::replicas].
        owner = np.repeat(np.arange(len(packs)) % replicas, [len(pack) for pack in packs])
        columns = np.zeros((len(samples), 5), np.int64)
        for which, name in enumerate(self.plan.names):
            mine = np.flatnonzero(samples[:, 0] == which)
            rows, manifest = samples[mine, 1], self.manifests[name]
            chosen = manifest.tokens[rows].astype(np.int64)
            rejected = manifest.tokens_rejected[rows].astype(np.int64)
            columns[mine, 0] = chosen + rejected
            columns[mine, 1] = (chosen * (chosen + 1) + rejected * (rejected + 1)) // 2
            columns[mine, 2] = manifest.target_tokens[rows]
            columns[mine, 3] = manifest.tiles[rows]
            columns[mine, 4] = manifest.first_image[rows + 1] - manifest.first_image[rows]
        shares = np.zeros((replicas, 5), np.int64)
        np.add.at(shares, owner, columns)
        tokens, _, _, tiles, images = shares.sum(0).tolist()
        return BatchCounts(
            tokens=tokens,
            samples=len(samples),
            images=images,
            tiles=tiles,
            masked=masked,
            positions=len(packs) * self.plan.sequence_length,
            replicas=tuple(Work(*share[:4]) for share in shares.tolist()),
        )


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
