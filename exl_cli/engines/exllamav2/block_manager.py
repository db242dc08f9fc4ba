"""Who owns which page of the KV cache, and what the pages hold.

Sequences lease pages. Full ones are shared by content: the pages whose tokens are known form a tree, the parent of a
page being the one before it in its sequence, so that a page's place in the tree says all tokens from the first one on.
They are looked up by the tokens themselves, not by a hash of them: there are no false hits.

Nothing is forgotten before its room is needed. A page that nobody leases any more stays in the tree, a sequence's last
one with as many tokens as it has, and goes when a page is wanted and none is free: the one unused for the longest time
first, and none before those that follow it. Where a new prompt agrees with only the first tokens of a page, it takes
that page over if nothing is lost by it, else a copy.

A lease is promised all the pages that its sequence may come to need, but takes them one by one: so a sequence that was
admitted never waits for another, and what it does not use in the end has pushed nothing out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

_ROOT = -1

Tokens = tuple[int, ...]


@dataclass(eq=False)
class Lease:
    """The pages of one sequence.

    Attributes:
        ids: the sequence's tokens, which its owner goes on appending to.
        table: its pages, in order.
        reused: positions that were in the cache when the lease began.
        settled: positions from the first one on of which it is certain that the cache holds them.
        known: how many pages of the table are in the tree: all that are full and settled.
        promised: pages that it may still take.
    """

    ids: list[int]
    table: list[int]
    reused: int
    settled: int
    known: int
    promised: int


class Pages:
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
        # A copy is some launches for each layer; so few tokens are as cheaply computed with the others of the prompt.
        self._worth_copying = max(size // 16, 1)
        self.reset()

    def reset(self) -> None:
        """Forget everything, the leases included, which have ended with that."""
        self._free = list(reversed(range(self.count)))
        self._users = [0] * self.count
        # Of the pages in the tree; unused ones in the order in which they are to go, so that children precede parents.
        self._unused: OrderedDict[int, None] = OrderedDict()
        self._tokens: dict[int, Tokens] = {}
        self._parent: dict[int, int] = {}
        self._children: dict[int, set[int]] = {}
        self._full: dict[tuple[int, Tokens], int] = {}
        self._leases: set[Lease] = set()
        self._promised = 0

    @property
    def available(self) -> int:
        """Pages that are neither leased nor promised."""
        return len(self._free) + len(self._unused) - self._promised

    @property
    def leased(self) -> int:
        """Pages in at least one lease's table."""
        return self.count - len(self._free) - len(self._unused)

    def needed(self, positions: int) -> int:
        """How many pages hold so many positions."""
        return -(-positions // self.size)

    def lease(self, ids: list[int], positions: int) -> Lease | None:
        """Begin a sequence with whatever of its prompt is known, its last token excepted: that one is to be computed.

        Args:
            ids: the prompt, at least one token.
            positions: the most that the sequence can come to, at most as many as all pages hold.

        Returns:
            None where there is no room for it now.
        """
        shared = self._known(ids)
        promised = self.needed(positions) - len(shared)
        if promised + sum(not self._users[page] for page in shared) > self.available:
            return None
        for page in shared:
            self._use(page)
        found = len(shared) * self.size
        lease = Lease(ids, shared, found, found, len(shared), promised)
        self._promised += promised
        self._leases.add(lease)
        try:
            self._begin_within_page(lease)
        except BaseException:
            self.release(lease)
            raise
        return lease

    def grow(self, lease: Lease, positions: int) -> None:
        """Have pages in the table for so many positions; never more than were asked for when the lease began."""
        while len(lease.table) * self.size < positions:
            self._append(lease, self._fresh())

    def settle(self, lease: Lease, positions: int) -> None:
        """Note that the cache holds the sequence's first `positions` tokens: the device is known to have finished.

        A page that another sequence has filled with the same tokens takes the place of this one's own in the table.
        Nothing happens once the lease has ended.
        """
        if lease not in self._leases:
            return
        lease.settled = positions
        while (lease.known + 1) * self.size <= positions:
            self._enter(lease)

    def release(self, lease: Lease) -> None:
        """End a sequence. What is settled stays to be found, what is not is forgotten. A second time does nothing."""
        if lease not in self._leases:
            return
        self._leases.remove(lease)
        self._promised -= lease.promised
        lease.promised = 0
        rest = tuple(lease.ids[lease.known * self.size : lease.settled])
        for page in reversed(lease.table[lease.known + 1 :]):
            self._leave(page)
        if len(lease.table) > lease.known:
            last = lease.table[lease.known]
            parent = self._parent_of(lease)
            if rest and not self._is_known(parent, rest):
                self._insert(last, parent, rest)
            self._leave(last)
        for page in reversed(lease.table[: lease.known]):
            self._leave(page)

    # --- leases ---------------------------------------------------------------------------------------------------

    def _known(self, ids: list[int]) -> list[int]:
        """The pages that hold the beginning of a prompt, as far as whole pages without its last token go."""
        pages: list[int] = []
        parent = _ROOT
        for begin in range(0, len(ids) - self.size, self.size):
            page = self._full.get((parent, tuple(ids[begin : begin + self.size])))
            if page is None:
                break
            pages.append(page)
            parent = page
        return pages

    def _begin_within_page(self, lease: Lease) -> None:
        """Find a page that begins as the prompt goes on, and make what they have in common the lease's own."""
        parent = self._parent_of(lease)
        begin = lease.settled
        wanted = tuple(lease.ids[begin : min(begin + self.size, len(lease.ids) - 1)])
        candidates = [(page, self._tokens[page]) for page in self._children.get(parent, ())]
        for other in self._leases:
            # Of a sequence that is going on, what is settled of the page it is writing.
            alike = other is not lease and other.known == lease.known and self._parent_of(other) == parent
            if alike and len(other.table) > other.known:
                candidates.append((other.table[other.known], tuple(other.ids[begin : other.settled])))
        best, common = max(
            ((page, _common(tokens, wanted)) for page, tokens in candidates),
            # Of equals one that can be taken over.
            key=lambda found: (found[1], found[0] in self._unused and found[1] == len(self._tokens[found[0]])),
            default=(_ROOT, 0),
        )
        if not common:
            return
        if best in self._unused and self._loses_least(best, common):
            self._forget(best)
            del self._unused[best]
            self._users[best] = 1
            self._append(lease, best)
            lease.settled += common
        elif common >= self._worth_copying:
            self._use(best)  # so that it is not the one that goes
            page = self._fresh()
            self._append(lease, page)
            try:
                self._copy(best, page)
            finally:
                self._leave(best)
        else:
            return
        lease.reused += common

    def _loses_least(self, page: int, common: int) -> bool:
        """Whether an unused page had better be taken over than copied: less is lost than by making room for a copy."""
        lost = len(self._tokens[page]) - common
        if not lost and page not in self._children:
            return True
        if self._free or page in self._children:
            return False
        oldest = next(iter(self._unused))
        return oldest == page or lost <= len(self._tokens[oldest])

    def _parent_of(self, lease: Lease) -> int:
        return lease.table[lease.known - 1] if lease.known else _ROOT

    def _append(self, lease: Lease, page: int) -> None:
        lease.table.append(page)
        lease.promised -= 1
        self._promised -= 1

    def _enter(self, lease: Lease) -> None:
        """Put the lease's first page that is not in the tree there, or use the one of the same tokens that is."""
        index = lease.known
        page, parent = lease.table[index], self._parent_of(lease)
        tokens = tuple(lease.ids[index * self.size : (index + 1) * self.size])
        same = self._full.get((parent, tokens))
        if same is None:
            self._insert(page, parent, tokens)
        else:
            self._use(same)
            lease.table[index] = same
            self._leave(page)
        lease.known += 1

    # --- pages ----------------------------------------------------------------------------------------------------

    def _use(self, page: int) -> None:
        self._users[page] += 1
        self._unused.pop(page, None)

    def _leave(self, page: int) -> None:
        self._users[page] -= 1
        if self._users[page]:
            return
        if page in self._tokens:
            self._unused[page] = None
        else:
            self._free.append(page)

    def _fresh(self) -> int:
        """A page to write into."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._unused.popitem(last=False)
            self._forget(page)
        self._users[page] = 1
        return page

    # --- the tree -------------------------------------------------------------------------------------------------

    def _is_known(self, parent: int, tokens: Tokens) -> bool:
        """Whether a page begins with these tokens; if so, it counts as just used."""
        for page in self._children.get(parent, ()):
            if self._tokens[page][: len(tokens)] == tokens:
                if page in self._unused:
                    self._unused.move_to_end(page)
                return True
        return False

    def _insert(self, page: int, parent: int, tokens: Tokens) -> None:
        # Ends of sequences that this page begins with; nobody uses those, who did took them over.
        for other in [*self._children.get(parent, ())]:
            if tokens[: len(self._tokens[other])] == self._tokens[other]:
                self._forget(other)
                del self._unused[other]
                self._free.append(other)
        self._tokens[page] = tokens
        self._parent[page] = parent
        self._children.setdefault(parent, set()).add(page)
        if len(tokens) == self.size:
            self._full[parent, tokens] = page

    def _forget(self, page: int) -> None:
        """Take a page that has no children out of the tree."""
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
