"""What a stage reads: its plan, and this replica's micro-batches."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conf.schema import Config, StageConfig
from conf.schema.data import DataConfig
from data_shards.balance import PackCost, assign
from data_shards.batch import PackedBatch
from data_shards.chat import ChatTokenizer
from data_shards.loader import Loader
from data_shards.manifest import Manifest, read_manifest
from data_shards.plan import Plan, PlanError, plan_inputs
from data_shards.plan_file import ensure_plan, plan_folder, read_plan
from models.anyres import AnyresGeometry
from models.flops import batch_flops, training_flops
from pipeline.callbacks.base import BatchCounts, Work
from pipeline.distributed import Ranks
from pipeline.one_for_all import one_for_all
from pipeline.stages import trainable_modules

_LATE = 30  # seconds until a file that another node wrote is visible


@dataclass(frozen=True)
class StageData:
    """The data of one stage on one rank; everything but the loaders is the same on all ranks."""

    plan: Plan
    sequential: Plan | None  # each sample of the mixture once; where a pass looks at all of them
    manifests: dict[str, Manifest]
    tokenizer: ChatTokenizer
    geometry: AnyresGeometry
    micro_batch_size: int
    workers: int
    max_masked: int
    cost: PackCost
    ranks: Ranks

    @property
    def everything(self) -> Plan:
        """Each sample of the mixture once; for a preference stage, which needs them."""
        assert self.sequential is not None, "only the reference pass looks at every sample"
        return self.sequential

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
            cost=self.cost,
            max_masked=self.max_masked,
            need_images=self.ranks.first_stage,
            tile_share=(self.ranks.context, self.ranks.context_size),
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
        plan, replicas = self.plan, self.ranks.data_size
        shares = assign(plan, step, replicas, self.micro_batch_size, self.cost)
        packs = [[plan.pack(n) for part in share for n in part] for share in shares]
        samples = np.concatenate([pack for mine in packs for pack in mine])
        owner = np.repeat(np.arange(replicas), [sum(map(len, mine)) for mine in packs])
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
        sums = np.zeros((replicas, 5), np.int64)
        np.add.at(sums, owner, columns)
        tokens, _, _, tiles, images = sums.sum(0).tolist()
        return BatchCounts(
            tokens=tokens,
            samples=len(samples),
            images=images,
            tiles=tiles,
            masked=masked,
            positions=plan.packs_per_step * plan.sequence_length,
            replicas=tuple(Work(*share[:4]) for share in sums.tolist()),
        )


def pack_cost(config: Config) -> PackCost:
    """FLOPs of a tile and of a pair of tokens in this stage, forward and backward."""
    trained = trainable_modules(config.stage.lr)

    def flops(attended: int, tiles: int) -> float:
        return training_flops(batch_flops(config.model, 0, attended, 0, tiles), trained).total

    return PackCost(tile=flops(0, 1), pair=flops(1, 0))


def open_data(config: Config, ranks: Ranks, plans_in: Path | None = None) -> StageData:
    """Read manifests and tokenizer of the stage's mixture and plan it.

    The plan lies in the stage's directory, or in `plans_in`; rank 0 writes it where it is not there
    yet, or damaged.

    Raises:
        ValueError: a manifest, shard or tokenizer is missing, damaged or does not fit; the message
            names the file and the remedy.
    """
    stage, data = config.stage, config.data
    if not data.phases(stage.name):
        raise ValueError(f"data.mix has no entry {stage.name!r}; add one to conf/data/*.yaml")
    manifests = {
        name: read_manifest(Path(data.root) / name / "manifest.parquet")
        for name in data.drawn(stage.name)
    }
    tokenizer = ChatTokenizer.from_directory(data.tokenizer)
    tokenizer.require_model(config.model)
    kinds = ["training", "sequential"] if stage.objective == "dpo" else ["training"]
    root = plans_in or Path(config.runs_dir) / config.run / stage.name
    plans = _plans(kinds, root / "plan", manifests, data, stage)
    return StageData(
        plan=plans["training"],
        sequential=plans.get("sequential"),
        manifests=manifests,
        tokenizer=tokenizer,
        geometry=AnyresGeometry.from_model(config.model),
        micro_batch_size=stage.micro_batch_size,
        workers=data.load_workers,
        max_masked=data.max_masked,
        cost=pack_cost(config),
        ranks=ranks,
    )


def _plans(
    kinds: Sequence[str],
    root: Path,
    manifests: Mapping[str, Manifest],
    data: DataConfig,
    stage: StageConfig,
) -> dict[str, Plan]:
    """Plans by kind, the same on all ranks."""

    def say(message: str) -> None:
        print(f"[{stage.name}] {message}", flush=True)

    def ensure() -> str:
        return " ".join(
            ensure_plan(kind, root, manifests, data, stage, say).digest for kind in kinds
        )

    digests = one_for_all(ensure).split()
    found = {}
    for kind, digest in zip(kinds, digests, strict=True):
        folder = plan_folder(root, plan_inputs(kind, manifests, data, stage))
        found[kind] = _seen(folder)
        if found[kind].digest != digest:
            raise PlanError(
                f"{folder} is not the plan that rank 0 has read; remove it and start again"
            )
    return found


def _seen(folder: Path) -> Plan:
    """The plan that rank 0 wrote; a shared file system may show it a moment later."""
    for _ in range(_LATE):
        try:
            return read_plan(folder)
        except PlanError:
            time.sleep(1)
    return read_plan(folder)
