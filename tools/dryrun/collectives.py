"""Do the ranks' calls fit together? Where they do not, the job would hang or mix up numbers."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, zip_longest

import numpy as np

from tools.dryrun.report import Call, Group, RankReport


@dataclass
class GroupCalls:
    """The calls of a group's simulated members, in order; sends and receives apart."""

    group: Group
    collective: dict[int, list[Call]] = field(default_factory=dict)  # by rank
    point_to_point: dict[int, list[Call]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of what every member asks; the members are told apart only by sends and receives."""
        seen = hashlib.sha256()
        first = next(iter(self.collective.values()), [])
        for call in first:
            seen.update(repr(call.signature).encode())
        for rank in sorted(self.point_to_point):
            for call in self.point_to_point[rank]:
                seen.update(repr((rank, *call.signature)).encode())
        return seen.hexdigest()[:12]


def by_group(reports: Sequence[RankReport]) -> list[GroupCalls]:
    """Calls by group, groups in the order in which they are first used."""
    groups: dict[Group, GroupCalls] = {}
    for report in reports:
        entries = [groups.setdefault(group, GroupCalls(group)) for group in report.groups]
        for entry in entries:
            entry.collective.setdefault(report.rank, [])
            entry.point_to_point.setdefault(report.rank, [])
        for call in report.calls:
            entry = entries[call.group]
            kept = entry.point_to_point if call.point_to_point else entry.collective
            kept[report.rank].append(call)
    return list(groups.values())


def digest(reports: Sequence[RankReport]) -> str:
    """Of all calls of all simulated ranks."""
    seen = hashlib.sha256()
    for report in reports:
        for call in report.calls:
            group = report.groups[call.group]
            seen.update(repr((report.rank, group.kind, group.ranks, *call.signature)).encode())
    return seen.hexdigest()[:16]


def differences(reports: Sequence[RankReport]) -> list[str]:
    """The first difference of every group, of every pair of pipeline neighbours, of every pair of
    ranks; nothing where the calls fit together."""
    groups = by_group(reports)
    problems = [problem for entry in groups for problem in _members(entry)]
    problems += _unused(reports, groups)
    if not problems:
        problems += [problem for entry in groups for problem in _neighbours(entry)]
    return problems or list(_interleaved(reports))


def _members(entry: GroupCalls) -> Iterator[str]:
    """Every member asks the same."""
    ranks = sorted(entry.collective)
    for rank in ranks[1:]:
        pairs = zip_longest(entry.collective[ranks[0]], entry.collective[rank])
        for position, (one, other) in enumerate(pairs):
            if one is None or other is None or one.signature != other.signature:
                yield (
                    f"{entry.group}, call {position}: rank {ranks[0]} {_said(one)}, but rank "
                    f"{rank} {_said(other)}"
                )
                break


def _unused(reports: Sequence[RankReport], groups: Sequence[GroupCalls]) -> Iterator[str]:
    """A group that a simulated member never uses while another does."""
    simulated = {report.rank for report in reports}
    for entry in groups:
        silent = sorted(simulated & set(entry.group.ranks) - set(entry.collective))
        speaking = [rank for rank, calls in sorted(entry.collective.items()) if calls]
        if silent and speaking:
            call = entry.collective[speaking[0]][0]
            yield (
                f"{entry.group}, call 0: rank {speaking[0]} {_said(call)}, but rank {silent[0]} "
                "never uses this group"
            )


def _neighbours(entry: GroupCalls) -> Iterator[str]:
    """What one rank sends another receives: as often, in the same order and shape."""
    for source in sorted(entry.point_to_point):
        for target in sorted(entry.point_to_point):
            sent = [c for c in entry.point_to_point[source] if (c.op, c.peer) == ("send", target)]
            got = [c for c in entry.point_to_point[target] if (c.op, c.peer) == ("recv", source)]
            for position, (one, other) in enumerate(zip_longest(sent, got)):
                if (
                    one is None
                    or other is None
                    or (one.dtype, one.shape) != (other.dtype, other.shape)
                ):
                    yield (
                        f"{entry.group}, transfer {position} from rank {source} to {target}: the "
                        f"sender {_said(one)}, the receiver {_said(other)}"
                    )
                    break


def _interleaved(reports: Sequence[RankReport]) -> Iterator[str]:
    """Two ranks that share several groups use them in the same order, or each waits for the
    other in another group."""
    numbers: dict[Group, int] = {}
    calls = {
        report.rank: [call for call in report.calls if not call.point_to_point]
        for report in reports
    }
    used = {
        report.rank: np.array(
            [
                numbers.setdefault(report.groups[call.group], len(numbers))
                for call in calls[report.rank]
            ],
            dtype=np.int64,
        )
        for report in reports
    }
    shared: dict[tuple[int, int], list[int]] = defaultdict(list)
    for group, number in numbers.items():
        for pair in combinations(sorted(set(group.ranks) & used.keys()), 2):
            shared[pair].append(number)
    groups = list(numbers)
    for (one, other), common in shared.items():
        if len(common) < 2:
            continue
        ours = np.flatnonzero(np.isin(used[one], common))
        theirs = np.flatnonzero(np.isin(used[other], common))
        length = min(len(ours), len(theirs))
        unequal = np.flatnonzero(used[one][ours[:length]] != used[other][theirs[:length]])
        if len(unequal):
            position = int(unequal[0])
            mine, yours = int(ours[position]), int(theirs[position])
            yield (
                f"ranks {one} and {other}, call {position} of the groups that they share: rank "
                f"{one} {_said(calls[one][mine])} in {groups[used[one][mine]]}, but rank {other} "
                f"{_said(calls[other][yours])} in {groups[used[other][yours]]}"
            )


def _said(call: Call | None) -> str:
    return "has no further call" if call is None else f"asks for {call}, at {call.place}"
