"""Samples into packs: online best fit among many open packs, with a limit on tiles.

Online, so that a pack's content does not correlate with sample length (sorting first packs a little
tighter but puts long with long). Open packs are kept in order of the room they have left, so a
sample finds its pack by bisection: 256 open packs cost hardly more than 16.

Best fit alone spoils packs where small samples are rare: the tightest pack is left with room that
nothing fits into. With `Packer.short` a sample passes over a pack that it would leave so, unless
that is the pack's end (`_FULL`): image-only packs are then 99.2 % full instead of 97.5 %. It
depends on the lengths whether that helps; the planner tries it on a mixture's first samples.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_OPEN, LEAST_OPEN = 256, 16
_LEFT = 16  # times as many packs are to come as may be open
_SLOT_BITS = 12  # of a key: (room, slot) in one integer
_SLOT = (1 << _SLOT_BITS) - 1
_FULL = 0.99  # of a pack: then nothing more is needed
_LOOKED_AT = 16  # open packs that are tried for their tiles, from the tightest on
_OLDEST = 32  # times as many samples as there may be open packs: then a pack is closed as it is
_NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class PackLimits:
    """What fits into one pack.

    Attributes:
        tokens, tiles: most of each; tiles None: as many as the tokens allow.
        open_packs: packs that may be filled at the same time.
        packing: False: one sample a pack.
        least_tokens, least_tiles: of any sample; a pack with less room is full.
    """

    tokens: int
    tiles: int | None = None
    open_packs: int = MOST_OPEN  # at least LEAST_OPEN
    packing: bool = True
    least_tokens: int = 1
    least_tiles: int = 0


class Packer:
    """Packs samples that come in parts.

    A sample goes to the open pack that it fills best among those with tiles to spare. When none has
    room a new pack is opened, and the fullest is closed if there are too many, or the oldest if it
    has been open for too long: so a sample stands near those that were drawn with it.

    Args:
        expected: packs that there will be, about; towards the end fewer are kept open, as those
            that are open then stay as they are.

    Attributes:
        target: packs to fill, or None; a sample that would need another one is refused, and with
            it all that follow.
        begun: packs opened so far.
        tiles: limit of packs that are opened from now on.
        short: tokens that few samples fall short of; less room than that is hard to fill. 0: take
            the tightest pack always.
    """

    def __init__(self, limits: PackLimits, expected: float, target: int | None = None):
        assert limits.open_packs <= _SLOT + 1
        self._expected = expected
        self.target, self.begun = target, 0
        self.tiles, self.short = limits.tiles, 0
        self._limits = limits
        slots = limits.open_packs
        self._keys: list[int] = []  # (room, slot) of each open pack, in order
        self._tiles_left, self._born = [0] * slots, [0] * slots
        self._content: list[list[int]] = [[] for _ in range(slots)]
        self._free = list(range(slots))[::-1]
        self._by_age: deque[tuple[int, int]] = deque()  # (born, slot), closed ones too
        self._seen = 0
        self._closed: list[int] = []  # codes
        self._lengths: list[int] = []

    def add(self, codes: Sequence[int], tokens: Sequence[int], tiles: Sequence[int]) -> int:
        """Place samples, named by `codes`, none larger than the limits; how many found a place."""
        if not self._limits.packing:
            return self._add_alone(codes)
        limits, keys, tiles_left = self._limits, self._keys, self._tiles_left
        content = self._content
        waste = limits.tokens - int(_FULL * limits.tokens) << _SLOT_BITS
        short = self.short << _SLOT_BITS
        for index, (code, size, wanted) in enumerate(zip(codes, tokens, tiles, strict=True)):
            taken = size << _SLOT_BITS
            place = bisect_left(keys, taken)
            stop = min(place + _LOOKED_AT, len(keys))
            while place < stop and tiles_left[keys[place] & _SLOT] < wanted:
                place += 1
            fits = place < stop
            if fits and waste < keys[place] - taken < short:
                better = bisect_left(keys, taken + short, place)
                stop = min(better + _LOOKED_AT, len(keys))
                while better < stop and tiles_left[keys[better] & _SLOT] < wanted:
                    better += 1
                if better < stop:
                    place = better
                else:
                    fits = len(keys) >= self._most_open() or self.begun == self.target
            if fits:
                key = keys.pop(place) - taken
                slot = key & _SLOT
                content[slot].append(code)
                left = tiles_left[slot] - wanted
                tiles_left[slot] = left
                if left < limits.least_tiles or key >> _SLOT_BITS < limits.least_tokens:
                    self._close(slot)
                else:
                    insort(keys, key)
                continue
            if self.begun == self.target:
                return index
            self._make_room(self._seen + index)
            slot = self._free.pop()
            content[slot] = [code]
            left = (_NO_LIMIT if self.tiles is None else self.tiles) - wanted
            tiles_left[slot] = left
            self.begun += 1
            if left < limits.least_tiles or limits.tokens - size < limits.least_tokens:
                self._close(slot)
                continue
            self._born[slot] = self._seen + index
            self._by_age.append((self._seen + index, slot))
            insort(keys, (limits.tokens - size) << _SLOT_BITS | slot)
        self._seen += len(codes)
        return len(codes)

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """Packs closed since the last call: (codes of all, int64; samples of each pack, int64)."""
        closed = np.array(self._closed, np.int64), np.array(self._lengths, np.int64)
        self._closed, self._lengths = [], []
        return closed

    def close(self) -> None:
        """Close every pack, in the order in which they were opened."""
        for key in sorted(self._keys, key=lambda key: self._born[key & _SLOT]):
            self._close(key & _SLOT)
        self._keys.clear()

    def _add_alone(self, codes: Sequence[int]) -> int:
        left = len(codes) if self.target is None else self.target - self.begun
        placed = list(codes[: max(left, 0)])
        self._closed += placed
        self._lengths += [1] * len(placed)
        self.begun += len(placed)
        return len(placed)

    def _most_open(self) -> int:
        left = self._expected - self.begun
        return int(min(max(left // _LEFT, LEAST_OPEN), self._limits.open_packs))

    def _make_room(self, now: int) -> None:
        """Close the oldest pack if it has been open for too long, and the fullest ones if no other
        may be opened beside them."""
        ages, keys = self._by_age, self._keys
        while ages and (self._born[ages[0][1]] != ages[0][0] or not self._content[ages[0][1]]):
            ages.popleft()  # closed meanwhile
        most = self._most_open()
        if ages and now - ages[0][0] > _OLDEST * most:
            slot = ages[0][1]
            del keys[next(n for n, key in enumerate(keys) if key & _SLOT == slot)]
            self._close(slot)
        while len(keys) >= most:
            self._close(keys.pop(0) & _SLOT)

    def _close(self, slot: int) -> None:
        self._closed += self._content[slot]
        self._lengths.append(len(self._content[slot]))
        self._content[slot] = []
        self._free.append(slot)
