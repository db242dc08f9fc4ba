"""Which sequence owns which page of the KV cache, and what the pages hold.

Full pages are shared by content: the pages whose tokens are known form a tree, in which the parent of a page is the one
before it in its sequence, and the place of a page stands for all tokens from the first one on. Pages are looked up by
the tokens themselves rather than by a hash of them, so there are no false hits.

Nothing is forgotten before its room is needed. A page without users stays in the tree, a sequence's last page with as
many tokens as it has; when a page is wanted and none is free, the least recently used one is evicted, children before
their parents. A prompt that shares only the first tokens of a page takes that page over if nothing is lost by it, and a
copy of it otherwise.

An allocation reserves the pages of its prompt, but takes them one by one: prefill never waits for other sequences, and
evicts nothing before it gets there. Beyond the prompt an allocation grows while there are pages; what becomes of a
sequence that gets none is the scheduler's business.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Root:
    """Where sequences begin in the tree: those of different roots share nothing.

    Attributes:
        rope_table: keys and values of other tables are others; see `ScheduledTokens`.
        salt: see `base.Request`.
    """

    rope_table: int = 0
    salt: str = ""


# A page, or where the first one of a sequence hangs.
Node = int | Root


@dataclass(eq=False)
class Allocation:
    """The pages of one sequence.

    Attributes:
        ids: the sequence's tokens, which its owner goes on appending to.
        block_table: its pages, in order.
        num_reused_tokens: tokens of the prompt that were in the cache already.
        num_computed_tokens: tokens, from the first one on, that the cache is certain to hold.
        num_cached_pages: pages of the block table that are in the tree: all that are full and computed.
        num_reserved_pages: pages that it is certain to get.
        capacity: positions in its block table.
        root: where in the tree it begins.
    """

    ids: list[int]
    block_table: list[int]
    num_reused_tokens: int
    num_computed_tokens: int
    num_cached_pages: int
    num_reserved_pages: int
    capacity: int
    root: Root = Root()


class BlockManager:
    """The pages of one KV cache.

    Args:
        count: how many there are, numbered from 0.
        size: positions in each.
        copy: copies the content of one page (first argument) into another.
    """

    def __init__(self, count: int, size: int, copy: Callable[[int, int], None]) -> None:
        self.count = count
        self.size = size
        self._copy = copy
        # Copying takes some launches a layer: fewer tokens are as cheaply computed with the rest of the prompt.
        self._min_tokens_to_copy = max(size // 16, 1)
        self.reset()

    def reset(self) -> None:
        """Forget everything, and end all allocations."""
        self._free = list(reversed(range(self.count)))
        self._users = [0] * self.count
        # Pages of the tree without users, the next to be evicted first: children before their parents.
        self._unused: OrderedDict[int, None] = OrderedDict()
        self._tokens: dict[int, Tokens] = {}
        self._parent: dict[int, Node] = {}
        self._children: dict[Node, set[int]] = {}
        self._full: dict[tuple[Node, Tokens], int] = {}
        self._allocations: set[Allocation] = set()
        self._num_reserved = 0

    @property
    def num_available(self) -> int:
        """Pages that are neither allocated nor reserved."""
        return len(self._free) + len(self._unused) - self._num_reserved

    @property
    def num_allocated(self) -> int:
        """Pages in at least one block table."""
        return self.count - len(self._free) - len(self._unused)

    def pages_for(self, positions: int) -> int:
        """Pages that so many positions take up."""
        return -(-positions // self.size)

    def allocate(
        self, ids: list[int], positions: int, root: Root = Root(), *, reuse: bool = True, spare: int = 0
    ) -> Allocation | None:
        """Allocate pages for a sequence, sharing those that hold the beginning of its prompt.

        The last token of the prompt is never taken from the cache, since its logits are wanted.

        Args:
            ids: the prompt, at least one token.
            positions: reserved for the sequence, at most as many as all pages hold.
            root: where it begins.
            reuse: share pages; False where all of the prompt is to be computed.
            spare: pages to leave for others.

        Returns:
            None while there is no room for it.
        """
        shared = self._cached_prefix(ids, root) if reuse else []
        reserved = self.pages_for(positions) - len(shared)
        if reserved + sum(not self._users[page] for page in shared) + spare > self.num_available:
            return None
        for page in shared:
            self._use(page)
        reused = len(shared) * self.size
        allocation = Allocation(ids, shared, reused, reused, len(shared), reserved, reused, root)
        self._num_reserved += reserved
        self._allocations.add(allocation)
        try:
            if reuse:
                self._reuse_partial_page(allocation)
        except Exception:
            self.free(allocation)
            raise
        return allocation

    def grow(self, allocation: Allocation, positions: int) -> bool:
        """Extend the block table to so many positions, as far as there are pages; returns whether there were."""
        while allocation.capacity < positions:
            if not (allocation.num_reserved_pages or self.num_available):
                return False
            self._append(allocation, self._new_page())
        return True

    def mark_computed(self, allocation: Allocation, positions: int) -> None:
        """Note that the cache holds the sequence's first `positions` tokens: the device has finished them.

        If another sequence has filled a page with the same tokens, that page replaces this one's in the block table.
        Nothing happens once the allocation has been freed.
        """
        if allocation not in self._allocations:
            return
        allocation.num_computed_tokens = positions
        while (allocation.num_cached_pages + 1) * self.size <= positions:
            self._cache_page(allocation)

    def free(self, allocation: Allocation) -> None:
        """Give the pages back; computed tokens stay in the cache. A second time does nothing."""
        if allocation not in self._allocations:
            return
        self._allocations.remove(allocation)
        self._num_reserved -= allocation.num_reserved_pages
        allocation.num_reserved_pages = 0
        rest = tuple(allocation.ids[allocation.num_cached_pages * self.size : allocation.num_computed_tokens])
        for page in reversed(allocation.block_table[allocation.num_cached_pages + 1 :]):
            self._unuse(page)
        if len(allocation.block_table) > allocation.num_cached_pages:
            last = allocation.block_table[allocation.num_cached_pages]
            parent = self._parent_of(allocation)
            if rest and not self._is_cached(parent, rest):
                self._insert(last, parent, rest)
            self._unuse(last)
        for page in reversed(allocation.block_table[: allocation.num_cached_pages]):
            self._unuse(page)

    # --- allocations ----------------------------------------------------------------------------------------------

    def _cached_prefix(self, ids: list[int], root: Root) -> list[int]:
        """The full pages that hold the beginning of a prompt, its last token left out."""
        pages: list[int] = []
        parent: Node = root
        for begin in range(0, len(ids) - self.size, self.size):
            page = self._full.get((parent, tuple(ids[begin : begin + self.size])))
            if page is None:
                break
            pages.append(page)
            parent = page
        return pages

    def _reuse_partial_page(self, allocation: Allocation) -> None:
        """Take over or copy the page that agrees with the most of the prompt's next tokens."""
        parent = self._parent_of(allocation)
        begin = allocation.num_computed_tokens
        wanted = tuple(allocation.ids[begin : min(begin + self.size, len(allocation.ids) - 1)])
        candidates = [(page, self._tokens[page]) for page in self._children.get(parent, ())]
        for other in self._allocations:
            # The page that another sequence is writing, as far as it has been computed.
            depth = other.num_cached_pages
            if other is allocation or depth != allocation.num_cached_pages or self._parent_of(other) != parent:
                continue
            if len(other.block_table) > depth:
                candidates.append((other.block_table[depth], tuple(other.ids[begin : other.num_computed_tokens])))
        best, common = max(
            ((page, _common(tokens, wanted)) for page, tokens in candidates),
            # Of several that agree equally far, one that can be taken over.
            key=lambda match: (match[1], match[0] in self._unused and match[1] == len(self._tokens[match[0]])),
            default=(-1, 0),
        )
        if not common:
            return
        if best in self._unused and self._cheaper_to_take_over(best, common):
            self._drop(best)
            del self._unused[best]
            self._users[best] = 1
            self._append(allocation, best)
            allocation.num_computed_tokens += common
        elif common >= self._min_tokens_to_copy:
            self._use(best)  # keeps it from being evicted for the copy
            page = self._new_page()
            self._append(allocation, page)
            try:
                self._copy(best, page)
            finally:
                self._unuse(best)
        else:
            return
        allocation.num_reused_tokens += common

    def _cheaper_to_take_over(self, page: int, common: int) -> bool:
        """Whether taking over an unused page loses no more cached tokens than evicting another for a copy of it."""
        lost = len(self._tokens[page]) - common
        if not lost and page not in self._children:
            return True
        if self._free or page in self._children:
            return False
        oldest = next(iter(self._unused))
        return oldest == page or lost <= len(self._tokens[oldest])

    def _parent_of(self, allocation: Allocation) -> Node:
        count = allocation.num_cached_pages
        return allocation.block_table[count - 1] if count else allocation.root

    def _append(self, allocation: Allocation, page: int) -> None:
        allocation.block_table.append(page)
        allocation.capacity += self.size
        if allocation.num_reserved_pages:
            allocation.num_reserved_pages -= 1
            self._num_reserved -= 1

    def _cache_page(self, allocation: Allocation) -> None:
        """Enter the next full page into the tree, or replace it by the page of the same tokens that is there."""
        index = allocation.num_cached_pages
        page, parent = allocation.block_table[index], self._parent_of(allocation)
        tokens = tuple(allocation.ids[index * self.size : (index + 1) * self.size])
        same = self._full.get((parent, tokens))
        if same is None:
            self._insert(page, parent, tokens)
        else:
            self._use(same)
            allocation.block_table[index] = same
            self._unuse(page)
        allocation.num_cached_pages += 1

    # --- pages ----------------------------------------------------------------------------------------------------

    def _use(self, page: int) -> None:
        self._users[page] += 1
        self._unused.pop(page, None)

    def _unuse(self, page: int) -> None:
        self._users[page] -= 1
        if self._users[page]:
            return
        if page in self._tokens:
            self._unused[page] = None
        else:
            self._free.append(page)

    def _new_page(self) -> int:
        """A page to write into: a free one, else the least recently used."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._unused.popitem(last=False)
            self._drop(page)
        self._users[page] = 1
        return page

    # --- the tree -------------------------------------------------------------------------------------------------

    def _is_cached(self, parent: Node, tokens: Tokens) -> bool:
        """Whether a page begins with these tokens; if so, it becomes the most recently used."""
        for page in self._children.get(parent, ()):
            if self._tokens[page][: len(tokens)] == tokens:
                if page in self._unused:
                    self._unused.move_to_end(page)
                return True
        return False

    def _insert(self, page: int, parent: Node, tokens: Tokens) -> None:
        # Partial pages that this one extends are of no further use. They have no users: those took them over.
        for other in [*self._children.get(parent, ())]:
            if tokens[: len(self._tokens[other])] == self._tokens[other]:
                self._drop(other)
                del self._unused[other]
                self._free.append(other)
        self._tokens[page] = tokens
        self._parent[page] = parent
        self._children.setdefault(parent, set()).add(page)
        if len(tokens) == self.size:
            self._full[parent, tokens] = page

    def _drop(self, page: int) -> None:
        """Remove a page without children from the tree."""
        parent, tokens = self._parent.pop(page), self._tokens.pop(page)
        self._full.pop((parent, tokens), None)
        siblings = self._children[parent]
        siblings.remove(page)
        if not siblings:
            del self._children[parent]


def _common(a: Tokens, b: Tokens) -> int:
    """How many tokens two sequences have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
