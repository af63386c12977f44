"""What one data-parallel replica reads: the packs of a step, as micro-batches.

`Loader.step` is a pure function of the step. Prefetching threads only change when the work is done,
never the result. Threads, not processes: reading, decoding, resizing and CRC, most of the work,
happen outside the interpreter lock, and tiles need not be copied between processes.
"""

import logging
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from data_shards.balance import PackCost, share
from data_shards.batch import PackedBatch
from data_shards.chat import ChatTokenizer, Encoded
from data_shards.collate import BadPicture, LoadedSample, collate
from data_shards.manifest import Manifest
from data_shards.plan import Plan
from data_shards.reader import BadSample, DescriptorCache, ShardReader
from data_shards.records import RecordEncoder
from models.anyres import AnyresGeometry

DEFAULT_COST = PackCost()

logger = logging.getLogger(__name__)


class LoaderError(ValueError):
    """Training data that must not be trained on; names file, sample, cause and remedy."""


@dataclass(frozen=True)
class _MicroBatch:
    batch: PackedBatch
    masked: tuple[tuple[tuple[int, int], str], ...]  # (sample id, reason)


class Loader:
    """Micro-batches of replica `dp_rank` of `dp_size`.

    A sample whose bytes are bad (CRC-32 differs, shard cut short, unreadable) is masked in place:
    its documents keep their lengths but hold padding, its loss mask is 0, its tiles are black. It
    is logged and counted; more than `max_masked` different ones raise LoaderError. Every rank that
    reads the same packs masks the same samples, because all of them check the CRCs, also those
    that decode no image.

    Args:
        plan: from `build_plan` or `sequential_plan`.
        manifests: data sets by name; at least those of the plan.
        tokenizer, geometry: must be those that the shards were built with.
        micro_batch_size: packs of one micro-batch.
        cost: what packs cost, by which `balance.share` levels replicas and micro-batches.
        need_images: False on ranks without the vision tower: `tiles_NCHW` is then one black tile,
            everything else is the same.
        workers: prefetching threads of `batches`; 0 loads in line.
        max_masked: most samples that may be masked.
        tile_share: (rank, ranks) of the context-parallel ranks, which share a micro-batch's tiles:
            a picture without a tile in this rank's share is not decoded and stays black; the
            model never looks there (`models.tile_sharing`).
    """

    def __init__(
        self,
        plan: Plan,
        manifests: Mapping[str, Manifest],
        tokenizer: ChatTokenizer,
        geometry: AnyresGeometry,
        *,
        micro_batch_size: int = 1,
        cost: PackCost = DEFAULT_COST,
        dp_rank: int = 0,
        dp_size: int = 1,
        need_images: bool = True,
        tile_share: tuple[int, int] = (0, 1),
        workers: int = 1,
        max_masked: int = 100,
        max_open_files: int = 64,
    ):
        self._plan, self._tokenizer, self._geometry = plan, tokenizer, geometry
        self._manifests = [manifests[name] for name in plan.names]
        tokenizer_digest, geometry_digest = tokenizer.digest(), geometry.digest()
        for manifest in self._manifests:
            manifest.check_environment(tokenizer_digest, geometry_digest)
            manifest.check_shards()
        self._descriptors = DescriptorCache(max_open_files)
        self._readers = [ShardReader(m, self._descriptors) for m in self._manifests]
        self._encoders = [RecordEncoder(m, tokenizer, geometry) for m in self._manifests]
        self._micro_batch_size, self._cost = micro_batch_size, cost
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._need_images, self._tile_share = need_images, tile_share
        self._workers = workers
        self._max_masked = max_masked
        self._masked: dict[tuple[int, int], str] = {}
        if plan.steps:
            self._micro_batches(0)  # raises where replicas do not divide the global batch

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of one step of this replica."""
        return self._plan.packs_per_step // (self._dp_size * self._micro_batch_size)

    @property
    def n_masked(self) -> int:
        """Different samples masked so far, by this loader."""
        return len(self._masked)

    @property
    def masked(self) -> Mapping[tuple[int, int], str]:
        """(data set number, manifest row) of each of them -> shard, sample and cause."""
        return MappingProxyType(self._masked)

    def step(self, step: int) -> list[PackedBatch]:
        """This replica's micro-batches of one step, loaded now, in the calling thread.

        Raises:
            PlanError: a step outside the plan.
            LoaderError: bytes that are whole but not what the manifest says, or too many bad ones.
        """
        return self._deliver(self._load(packs) for packs in self._micro_batches(step))

    def batches(
        self, start: int = 0, stop: int | None = None
    ) -> Generator[tuple[int, list[PackedBatch]], None, None]:
        """(step, micro-batches) from `start` up to `stop` (default: the plan's end), prefetched.

        Holds at most two micro-batches for each worker beside those being delivered. Close the
        iterator (or let it end) to stop its threads. Raises as `step`.
        """
        return self.chosen(range(start, self._plan.steps if stop is None else stop))

    def chosen(self, steps: Sequence[int]) -> Generator[tuple[int, list[PackedBatch]], None, None]:
        """As `batches`, for these steps, in their order."""
        if self._workers == 0:
            for step in steps:
                yield step, self.step(step)
            return
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="loader")
        pending: deque[Future[_MicroBatch]] = deque()
        work = (packs for step in steps for packs in self._micro_batches(step))

        def refill() -> None:
            while len(pending) < 2 * self._workers:
                packs = next(work, None)
                if packs is None:
                    return
                pending.append(pool.submit(self._load, packs))

        def taken() -> Iterator[_MicroBatch]:
            for _ in range(self.micro_batches_per_step):
                refill()
                yield pending.popleft().result()
                refill()

        try:
            for step in steps:
                yield step, self._deliver(taken())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            self.close()

    def close(self) -> None:
        """Close the shard files; they are opened again when needed."""
        self._descriptors.close()

    def _micro_batches(self, step: int) -> list[list[np.ndarray]]:
        """The packs of each micro-batch of this replica."""
        numbers = share(
            self._plan, step, self._dp_rank, self._dp_size, self._micro_batch_size, self._cost
        )
        return [[self._plan.pack(number) for number in part] for part in numbers]

    def _deliver(self, loaded: Iterator[_MicroBatch]) -> list[PackedBatch]:
        """Count and log masked samples in the order of the plan, whoever loaded them first."""
        batches = []
        for micro_batch in loaded:
            for sample_id, reason in micro_batch.masked:
                if sample_id in self._masked:
                    continue
                self._masked[sample_id] = reason
                logger.warning("masked sample: %s", reason)
                if len(self._masked) > self._max_masked:
                    raise LoaderError(
                        f"more than data.max_masked={self._max_masked} samples had bad bytes, the "
                        f"last: {reason}; python -m data_shards.validate names them all"
                    )
            batches.append(micro_batch.batch)
        return batches

    def _load(self, packs: Sequence[np.ndarray]) -> _MicroBatch:
        samples = [[self._sample(which, row) for which, row in pack.tolist()] for pack in packs]
        try:
            batch = collate(
                samples,
                self._geometry,
                sequence_length=self._plan.sequence_length,
                document_multiple=self._plan.document_multiple,
                pad_id=self._tokenizer.pad_id,
                need_images=self._need_images,
                tile_share=self._tile_share,
            )
        except BadPicture as error:
            which, row = error.sample_id
            raise LoaderError(self._mismatch(self._manifests[which], row, str(error))) from None
        masked = tuple(
            (sample.sample_id, sample.mask_reason)
            for pack in samples
            for sample in pack
            if sample.mask_reason is not None
        )
        return _MicroBatch(batch, masked)

    def _sample(self, which: int, row: int) -> LoadedSample:
        manifest = self._manifests[which]
        first, last = manifest.first_image[row], manifest.first_image[row + 1]
        image_hw = tuple((int(h), int(w)) for h, w in manifest.image_hw[first:last])
        lengths = [int(manifest.tokens[row])]
        if manifest.info.preference:
            lengths.append(int(manifest.tokens_rejected[row]))
        try:
            record, image_bytes = self._readers[which].read(row)
        except BadSample as error:
            blank = tuple(_blank(length, self._tokenizer.pad_id) for length in lengths)
            return LoadedSample((which, row), blank, image_hw, None, str(error))
        try:
            documents = self._encoders[which].encode(row, record)
        except ValueError as error:
            raise LoaderError(self._mismatch(manifest, row, str(error))) from None
        except Exception as error:
            error.add_note(f"while loading {self._name(manifest, row)}")
            raise
        return LoadedSample((which, row), documents, image_hw, tuple(image_bytes))

    def _mismatch(self, manifest: Manifest, row: int, cause: str) -> str:
        return (
            f"{self._name(manifest, row)}: {cause}; its bytes are whole, so another version built "
            "it, or the index is damaged: python -m data_shards.validate tells, make shards builds "
            "again"
        )

    def _name(self, manifest: Manifest, row: int) -> str:
        shard = manifest.info.shards[manifest.shard[row]].name
        return f"{manifest.shards_directory / shard}: sample {manifest.key(row)} (row {row})"


def _blank(length: int, pad_id: int) -> Encoded:
    return Encoded(np.full(length, pad_id, np.int64), np.zeros(length, bool), np.empty(0, np.int64))
