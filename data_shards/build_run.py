"""The phases of a build, one after the other, together with other builds of the same sources."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from data_shards.build_plan import BuildPlan, Examination, Share, Target
from data_shards.duplicates import NamedFingerprints, find_duplicates
from data_shards.finish import finish
from data_shards.locks import FileLock
from data_shards.manifest import Manifest
from data_shards.quarantine import first_refused
from data_shards.sources.blocks import Block
from data_shards.stamped_folder import FolderInUse
from data_shards.workers import EXAMINE, WRITE, Task, Workers


class BuildRun:
    """Runs a plan. Locks (data_shards/stamped_folder.py) are held until the end."""

    def __init__(self, plan: BuildPlan):
        self._plan = plan

    def run(self, share: Share | None = None) -> dict[str, Manifest]:
        """Every target, or a share of one; returns the data sets that are finished by now."""
        targets = self._plan.targets(share)
        finished: dict[str, Manifest] = {}
        stale: list[Target] = []
        for target in targets:
            manifest = self._repaired(target)
            if manifest is None:
                stale.append(target)
            else:
                finished[target.name] = manifest
                print(f"{target.name}: up to date, {len(manifest)} samples", flush=True)
        if not stale:
            return finished
        with ExitStack() as stack:
            examinations = self._needed(stale, share)
            for one in examinations:
                stack.enter_context(one.folder.stamped().opened(one.digest))
            workers = stack.enter_context(
                Workers(self._plan.data.build_workers, self._plan.recipes()).closing()
            )
            self._examine(workers, examinations, share)
            if share is not None and share.phase == EXAMINE:
                return finished
            stale = [target for target in stale if self._open(stack, target, finished)]
            while stale:
                try:
                    self._leave_out(stale)
                    self._write(workers, stale, share)
                    for target in stale:
                        self._finish(target, share, finished)
                    break
                except FileNotFoundError:
                    # Another build may have published what we were looking at.
                    published = {t.name: m for t in stale if (m := t.existing()) is not None}
                    if not published:
                        raise
                    finished |= published
                    stale = [target for target in stale if target.name not in published]
        return finished

    def _repaired(self, target: Target) -> Manifest | None:
        with self._finish_lock(target) as lock:
            if lock.try_exclusive():
                target.folder.repair()
        return target.existing()

    def _needed(self, stale: Sequence[Target], share: Share | None) -> list[Examination]:
        """What must be examined before the shards of `stale` can be written."""
        if share is not None and share.phase == EXAMINE:
            return [target.examination for target in stale]
        found = {one.key: one for one in self._plan.evaluation}
        for target in stale:
            for one in (*target.before, target.examination):
                found[one.key] = one
        return list(found.values())

    def _examine(
        self, workers: Workers, examinations: Sequence[Examination], share: Share | None
    ) -> None:
        tasks, names = [], []
        for one in examinations:
            blocks, done = one.blocks(), one.folder.done()
            if share is not None and share.phase == EXAMINE:
                blocks = share.of(blocks)
            missing = [block for block in blocks if block.number not in done]
            tasks += [Task(EXAMINE, one.key, block) for block in missing]
            names += [one.key] if missing else []
        workers.run(f"{', '.join(names)}: examined", tasks)

    def _open(self, stack: ExitStack, target: Target, finished: dict[str, Manifest]) -> bool:
        """Have the building folder; False where another build has published meanwhile."""
        try:
            alone = stack.enter_context(target.folder.stamped().opened(target.digest))
        except FolderInUse:
            alone = False
            if target.existing() is None:
                raise
        manifest = target.existing()
        if manifest is None:
            target.folder.make()
            return True
        if alone:
            shutil.rmtree(target.folder.building, ignore_errors=True)
        finished[target.name] = manifest
        return False

    def _leave_out(self, targets: Sequence[Target]) -> None:
        """Phase duplicates: one search for all targets that have not had theirs."""
        with ExitStack() as stack:
            for target in targets:  # only one process at a time: it takes a lot of memory
                if not target.folder.has_left_out():
                    stack.enter_context(self._finish_lock(target)).exclusive()
            missing = [target for target in targets if not target.folder.has_left_out()]
            if missing and not any(target.existing() for target in missing):
                self._search(missing)

    def _search(self, missing: Sequence[Target]) -> None:
        self._tell_not_compared(missing)
        found = (
            self._duplicates(missing)
            if self._plan.data.duplicates.across_sources
            else {name: r for target in missing for name, r in self._duplicates([target]).items()}
        )
        for target in missing:
            blocks = target.examination.blocks()
            rejected = first_refused(target.examination.folder, blocks)
            target.folder.write_left_out(found.get(target.name, {}), rejected)

    def _tell_not_compared(self, targets: Sequence[Target]) -> None:
        """Whatever the search cannot see is said, not passed over."""
        for one in self._plan.evaluation:
            refused = [r for b in one.blocks() for r in one.folder.refused(b.number)]
            if refused:
                print(
                    f"note: {len(refused)} rows of evaluation set {one.settings.name} cannot be "
                    f"compared, the first ({refused[0].origin}): {refused[0].reason}",
                    flush=True,
                )
        names = list(self._plan.data.sources)
        for target in targets if self._plan.data.duplicates.across_sources else ():
            counted = {one.settings.name for one in target.before}
            left = [n for n in names[: names.index(target.name)] if n not in counted]
            if left:
                print(
                    f"note: {target.name} is not compared with {', '.join(left)}, not examined yet",
                    flush=True,
                )

    def _duplicates(self, targets: Sequence[Target]) -> Mapping[str, dict[int, str]]:
        last = targets[-1]  # those before it include all that the others are compared with
        sources = [*last.before, last.examination]
        return find_duplicates(
            [_named(one) for one in sources],
            [_named(one) for one in self._plan.evaluation],
            self._plan.data.duplicates,
            {one.settings.name: one.settings.source.unique_images for one in sources},
        )

    def _write(self, workers: Workers, targets: Sequence[Target], share: Share | None) -> None:
        tasks, names = [], []
        for target in targets:
            blocks: Sequence[Block] = target.examination.blocks()
            target.folder.forget_damaged(target.folder.done())
            done = target.folder.done()
            if share is not None:
                blocks = share.of(blocks)
            missing = [block for block in blocks if block.number not in done]
            tasks += [Task(WRITE, target.name, block) for block in missing]
            names += [target.name] if missing else []
        workers.run(f"{', '.join(names)}: written", tasks)

    def _finish(self, target: Target, share: Share | None, finished: dict[str, Manifest]) -> None:
        """Publish a data set all of whose blocks are written, unless another build has."""
        blocks = {block.number for block in target.examination.blocks()}
        left = blocks - target.folder.done()
        manifest = target.existing()
        if left and manifest is None:
            assert share is not None, "blocks were left out"
            print(f"{target.name}: {len(blocks) - len(left)} of {len(blocks)} blocks are written")
            return
        with self._finish_lock(target) as lock:
            lock.exclusive()
            manifest = target.existing()
            if manifest is None:
                finish(target, self._plan)
                manifest = target.existing()
        assert manifest is not None
        finished[target.name] = manifest

    def _finish_lock(self, target: Target) -> FileLock:
        final = target.folder.final
        return FileLock(final.with_name(f".{final.name}.lock"))


def _named(one: Examination) -> NamedFingerprints:
    return NamedFingerprints(one.settings.name, one.folder.fingerprints())
