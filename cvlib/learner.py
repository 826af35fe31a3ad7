"""Continued BPE, the algorithm: which pieces should a vocabulary gain so that a text takes fewest tokens?

Byte-pair encoding is greedy: add the piece that saves most tokens now, put it together everywhere, count again.
*Continued* means that we do not start from characters but from the text as an existing vocabulary cuts it. One heap
holds the candidates:

* a character that the base spells in three bytes saves two tokens every time it occurs;
* two neighbours that are both pieces already save one token every time they occur.

Counting again from scratch for every piece would take hours. A linked list does it in seconds: joining two symbols only
touches the pairs to their left and right. Entries of the heap are not updated but left to go stale, and skipped.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence


class Learner:
    """Continued BPE: one long linked list of symbols, and for every candidate what it saves and where.

    Args:
        runs: (symbols, weight) pairs; the symbols of a run as the base cuts it.
        known: symbols that are pieces already; any other symbol is a character that costs three byte tokens.
        allowed: whether a joined string may become a piece.

    >>> learner = Learner([("上海", 5), ("海上", 3), ("大海", 2)], known={"上", "大"}, allowed=str.isalpha)
    >>> list(learner.learn())      # 海 saves 2 × 10 tokens; then 上海 saves 5
    ['海', '上海', '海上', '大海']
    """

    def __init__(self, runs: Iterable[tuple[Sequence[str], int]], known: set[str], allowed: Callable[[str], object]):
        self.known, self.allowed = set(known), allowed
        self.symbol, self.weight = [""], [0]  # "" is the wall between two runs, or a place that was merged away
        for symbols, weight in runs:
            self.symbol += [*symbols, ""]
            self.weight += [weight] * (len(symbols) + 1)
        self.after = [*range(1, len(self.symbol)), 0]
        self.before = [len(self.symbol) - 1, *range(len(self.symbol) - 1)]
        self.saves: Counter[str] = Counter()
        self.places: defaultdict[str, list[int]] = defaultdict(list)
        self.touched: set[str] = set()
        for at, symbol in enumerate(self.symbol):
            if symbol in self.known:
                self._offer(at)
            elif symbol:
                self.saves[symbol] += 2 * self.weight[at]
                self.places[symbol].append(at)

    def learn(self, first: Iterable[str] = ()) -> Iterator[str]:
        """Pieces one by one: those of `first` that are missing, then always the one that saves most tokens."""
        for piece in first:
            if piece not in self.known:
                self._add(piece)
                yield piece
        heap = [(-saved, piece) for piece, saved in self.saves.items()]
        heapq.heapify(heap)
        while heap:
            saved, piece = heapq.heappop(heap)
            if piece in self.known or -saved != self.saves[piece]:
                continue  # an entry from before the count changed
            if saved >= 0:
                return
            self.touched.clear()
            self._add(piece)
            for candidate in self.touched - self.known:
                heapq.heappush(heap, (-self.saves[candidate], candidate))
            yield piece

    def _add(self, piece: str) -> None:
        """Make `piece` known and put it together everywhere, leftmost first."""
        self.known.add(piece)
        for at in sorted(self.places.pop(piece, ())):
            if self.symbol[at] == piece:  # a character: it was one symbol all along, now it has neighbours
                self._offer(at)
                if self.symbol[self.before[at]] != piece:
                    self._offer(self.before[at])
            elif self.symbol[at] and self.symbol[at] + self.symbol[self.after[at]] == piece:
                self._join(at)

    def _join(self, at: int) -> None:
        """Merge the symbols at `at` and behind it; go on while the result and a neighbour make a known piece."""
        symbol, before, after = self.symbol, self.before, self.after
        while True:
            right = after[at]
            self._withdraw(before[at])
            self._withdraw(right)
            symbol[at] += symbol[right]
            symbol[right] = ""
            after[at] = after[right]
            before[after[at]] = at
            self._offer(at)
            self._offer(before[at])
            if symbol[before[at]] and symbol[before[at]] + symbol[at] in self.known:
                at = before[at]
            elif not (symbol[after[at]] and symbol[at] + symbol[after[at]] in self.known):
                return

    def _offer(self, at: int) -> None:
        """Count the pair that begins at `at` as a candidate."""
        left, right = self.symbol[at], self.symbol[self.after[at]]
        if left in self.known and right in self.known:
            piece = left + right
            if piece in self.saves or (piece not in self.known and self.allowed(piece)):
                self.saves[piece] += self.weight[at]
                self.places[piece].append(at)
                self.touched.add(piece)

    def _withdraw(self, at: int) -> None:
        """Take the pair that begins at `at` back; its entry in `places` is recognised as stale later."""
        piece = self.symbol[at] + self.symbol[self.after[at]]
        if piece in self.saves and self.symbol[at] in self.known and self.symbol[self.after[at]] in self.known:
            self.saves[piece] -= self.weight[at]
            self.touched.add(piece)
