"""Allocate the pages of the KV cache, and share them between sequences with a common prefix.

Prefix cache: pages with known tokens form a tree in which a page's parent is the preceding page of its sequence, so a
node stands for all tokens from the start. Lookups compare the tokens themselves, not a hash: no collisions.

Eviction: a page without users stays in the tree, including a sequence's partial last page, until its memory is needed.
Then the least recently used page goes first, children before parents. A prompt that matches only the beginning of a
page takes that page over if this loses nothing, and otherwise copies it.

Reservation: an allocation reserves the pages of its prompt but takes them one at a time, so prefill never waits for
other sequences and evicts no page early. Beyond the prompt it grows while there are pages; the scheduler decides what
happens to a sequence that gets none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Root:
    """The root of a tree. Sequences with different roots share nothing.

    Attributes:
        rope_table: see `ScheduledTokens`; another RoPE table gives other keys and values.
        salt: see `base.Request.cache_salt`.
    """

    rope_table: int = 0
    salt: str = ""


# A page, or the root, which is the parent of a sequence's first page.
Node = int | Root


@dataclass(eq=False)
class Allocation:
    """The pages of one sequence.

    Attributes:
        ids: the sequence's tokens; its owner appends to this list.
        block_table: its pages, in order.
        num_reused_tokens: prompt tokens found in the cache.
        num_computed_tokens: leading tokens whose keys and values are known to be in the cache.
        num_cached_pages: leading pages of the block table that are in the tree, namely all full, computed ones.
        num_reserved_pages: pages reserved but not taken yet.
        capacity: positions in the block table.
        root: its root in the tree.
    """

    ids: list[int]
    block_table: list[int]
    num_reused_tokens: int
    num_computed_tokens: int
    num_cached_pages: int
    num_reserved_pages: int
    capacity: int
    root: Root = Root()

    @property
    def num_pages(self) -> int:
        """Pages in the block table or reserved."""
        return len(self.block_table) + self.num_reserved_pages


class BlockManager:
    """Manages the pages of one KV cache.

    Args:
        count: number of pages, numbered from 0.
        size: positions per page.
        copy: copies the contents of a page (source, target).
    """

    def __init__(self, count: int, size: int, copy: Callable[[int, int], None]) -> None:
        self.count = count
        self.size = size
        self._copy = copy
        # A copy costs a few kernel launches per layer; computing a handful of tokens with the rest of the prompt is
        # cheaper.
        self._min_tokens_to_copy = max(size // 16, 1)
        self.reset()

    def reset(self) -> None:
        """Drop the cache and all allocations."""
        self._free = list(reversed(range(self.count)))
        self._users = [0] * self.count
        # Evictable pages (in the tree, without users) in order of eviction. `free` releases a sequence's pages from
        # its end, so children come before their parents.
        self._unused: OrderedDict[int, None] = OrderedDict()
        self._tokens: dict[int, Tokens] = {}
        self._parent: dict[int, Node] = {}
        self._children: dict[Node, set[int]] = {}
        self._full: dict[tuple[Node, Tokens], int] = {}
        self._allocations: set[Allocation] = set()
        self._num_reserved = 0

    @property
    def num_available(self) -> int:
        """Pages that are neither allocated nor reserved; evictable ones count."""
        return len(self._free) + len(self._unused) - self._num_reserved

    @property
    def num_allocated(self) -> int:
        """Pages in at least one block table."""
        return self.count - len(self._free) - len(self._unused)

    def pages_for(self, positions: int) -> int:
        """Number of pages for a number of positions."""
        return -(-positions // self.size)

    def allocate(
        self, ids: list[int], positions: int, root: Root = Root(), *, reuse: bool = True, spare: int = 0
    ) -> Allocation | None:
        """Allocate a sequence, reusing cached pages of its prompt.

        The prompt's last token is never taken from the cache, because its logits are needed.

        Args:
            ids: the prompt, at least one token.
            positions: positions to reserve, at most those of all pages.
            root: the sequence's root.
            reuse: use the prefix cache; False to compute the whole prompt.
            spare: pages that must stay available to other sequences.

        Returns:
            None if there is not enough room now.
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
        """Extend the block table to `positions`, as far as there are pages; returns whether it got there."""
        while allocation.capacity < positions:
            if not (allocation.num_reserved_pages or self.num_available):
                return False
            self._append(allocation, self._new_page())
        return True

    def mark_computed(self, allocation: Allocation, positions: int) -> None:
        """Record that the device has computed the first `positions` tokens, and enter full pages into the tree.

        If the tree already has a page with the same tokens, that page replaces this one in the block table. Ignored
        for a freed allocation.
        """
        if allocation not in self._allocations:
            return
        allocation.num_computed_tokens = positions
        while (allocation.num_cached_pages + 1) * self.size <= positions:
            self._cache_page(allocation)

    def free(self, allocation: Allocation) -> None:
        """Release the pages; computed tokens stay in the prefix cache. Idempotent."""
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
        """Walk down the tree along a prompt, without its last token; returns the matching full pages."""
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
        """Reuse part of a page: find the one that shares the longest prefix with the prompt's next page."""
        parent = self._parent_of(allocation)
        begin = allocation.num_computed_tokens
        wanted = tuple(allocation.ids[begin : min(begin + self.size, len(allocation.ids) - 1)])
        candidates = [(page, self._tokens[page]) for page in self._children.get(parent, ())]
        for other in self._allocations:
            # The page that another sequence is currently filling counts, up to its computed tokens.
            depth = other.num_cached_pages
            if other is allocation or depth != allocation.num_cached_pages or self._parent_of(other) != parent:
                continue
            if len(other.block_table) > depth:
                candidates.append((other.block_table[depth], tuple(other.ids[begin : other.num_computed_tokens])))
        best, common = max(
            ((page, _common(tokens, wanted)) for page, tokens in candidates),
            # Among equally long matches, prefer a page that can be taken over.
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
            self._use(best)  # so that it is not evicted to make room for the copy
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
        """Whether taking a page over loses no more cached tokens than evicting the oldest page for a copy."""
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
        """Enter the next full page into the tree, or replace it by an identical page that is already there."""
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
        """Take a free page, else evict the least recently used one."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._unused.popitem(last=False)
            self._drop(page)
        self._users[page] = 1
        return page

    # --- the tree -------------------------------------------------------------------------------------------------

    def _is_cached(self, parent: Node, tokens: Tokens) -> bool:
        """Whether a child of `parent` starts with these tokens; if so, mark it as most recently used."""
        for page in self._children.get(parent, ()):
            if self._tokens[page][: len(tokens)] == tokens:
                if page in self._unused:
                    self._unused.move_to_end(page)
                return True
        return False

    def _insert(self, page: int, parent: Node, tokens: Tokens) -> None:
        # Drop partial pages that are prefixes of this one. They have no users, since a user takes a page over.
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
        """Remove a leaf from the tree."""
        parent, tokens = self._parent.pop(page), self._tokens.pop(page)
        self._full.pop((parent, tokens), None)
        siblings = self._children[parent]
        siblings.remove(page)
        if not siblings:
            del self._children[parent]


def _common(a: Tokens, b: Tokens) -> int:
    """Length of the common prefix, by binary search over slice comparisons, which run in C."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
