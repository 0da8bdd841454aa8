"""Pages of a KV cache: which sequence holds which, and which are free."""

import heapq
from collections.abc import Iterable

from ..ir.errors import IRError

PAGE = 16  # positions of a page: kPageTokens of the kernels


def pages_for(positions: int) -> int:
    """Pages that hold so many positions."""
    return -(-positions // PAGE)


class PagePool:
    """Free pages, the lowest taken first: the same requests get the same pages in every run."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))  # sorted, hence a heap
        self._held: set[int] = set()

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """So many pages, by rising number. Raises IRError when there are not enough: ask `free`."""
        if count > len(self._free):
            raise IRError(f"page pool: {count} pages asked for, {len(self._free)} are free")
        taken = [heapq.heappop(self._free) for _ in range(count)]
        self._held.update(taken)
        return taken

    def give(self, pages: Iterable[int]) -> None:
        """Pages back. Raises IRError for one that nobody holds."""
        for page in pages:
            if page not in self._held:
                raise IRError(f"page pool: page {page} given back, but nobody holds it")
            self._held.remove(page)
            heapq.heappush(self._free, page)


class PageTable:
    """The pages of one sequence, in the order of its positions."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self.pages: list[int] = []

    @property
    def positions(self) -> int:
        """Positions that have a page."""
        return len(self.pages) * PAGE

    def grow(self, positions: int) -> list[int] | None:
        """The pages that were missing for so many positions; None when the pool has too few."""
        missing = max(0, pages_for(positions) - len(self.pages))
        if missing > self._pool.free:
            return None
        new = self._pool.take(missing)
        self.pages += new
        return new

    def clear(self) -> None:
        """All pages back to the pool."""
        self._pool.give(self.pages)
        self.pages = []
