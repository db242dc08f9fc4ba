"""The block manager: allocation, prefix sharing, eviction."""

from __future__ import annotations

import pytest

from exl_cli.engines.exllamav2.block_manager import Allocation, BlockManager

SIZE = 4


class Copies(list[tuple[int, int]]):
    """Remembers which page was copied into which."""

    def __call__(self, source: int, target: int) -> None:
        self.append((source, target))


def make(count: int, size: int = SIZE) -> tuple[BlockManager, Copies]:
    copies = Copies()
    return BlockManager(count, size, copies), copies


def begin(pages: BlockManager, ids: list[int], room: int = 1) -> Allocation:
    allocation = pages.allocate(ids, len(ids) + room)
    assert allocation is not None
    return allocation


def compute(pages: BlockManager, ids: list[int], room: int = 1) -> Allocation:
    """A sequence whose tokens are all in the cache."""
    allocation = begin(pages, ids, room)
    pages.grow(allocation, len(ids))
    pages.mark_computed(allocation, len(ids))
    return allocation


def keep(pages: BlockManager, ids: list[int]) -> list[int]:
    """The pages of a sequence that was computed and has ended."""
    allocation = compute(pages, ids)
    table = [*allocation.block_table]
    pages.free(allocation)
    return table


def test_full_pages_are_shared_but_the_last_token_is_to_be_computed() -> None:
    pages, copies = make(10)
    first = compute(pages, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    second = begin(pages, [1, 2, 3, 4, 5, 6, 7, 8, 50])
    assert (second.num_reused_tokens, second.block_table) == (8, first.block_table[:2])
    # Of eight tokens the second page holds the last one, so that it cannot be shared: seven are copied.
    third = begin(pages, [1, 2, 3, 4, 5, 6, 7, 8])
    assert (third.num_reused_tokens, third.block_table[:1], copies) == (
        7,
        first.block_table[:1],
        [(first.block_table[1], third.block_table[1])],
    )


@pytest.mark.parametrize("length", range(1, 14))
def test_a_conversation_continues_in_its_last_page(length: int) -> None:
    pages, copies = make(10)
    ids = list(range(100, 100 + length))
    table = keep(pages, ids)
    allocation = begin(pages, [*ids, 1, 2])
    assert (allocation.num_reused_tokens, allocation.block_table, copies) == (length, table, [])
    assert allocation.num_computed_tokens == length


def test_the_computed_part_of_a_page_in_use_is_copied() -> None:
    pages, copies = make(10)
    first = begin(pages, [1, 2, 3, 4, 5, 6, 7])
    pages.grow(first, 7)
    pages.mark_computed(first, 6)
    second = begin(pages, [1, 2, 3, 4, 5, 6, 7, 8])
    assert (second.num_reused_tokens, copies) == (6, [(first.block_table[1], second.block_table[1])])
    # Whether the copy was made, too, is known only once something has been waited for.
    assert second.num_computed_tokens == 4


def test_a_few_tokens_are_not_copied_but_a_free_page_is_reused() -> None:
    pages, copies = make(10, size=64)
    held = compute(pages, list(range(40)))
    assert begin(pages, [0, 1, 2, 99]).num_reused_tokens == 0
    assert begin(pages, [*range(4), 99]).num_reused_tokens == 4
    assert len(copies) == 1
    keep(pages, [70, 71])
    assert begin(pages, [70, 71, 72]).num_reused_tokens == 2
    assert len(copies) == 1
    pages.free(held)


def test_a_page_with_more_than_is_wanted_is_copied_while_there_is_room() -> None:
    pages, copies = make(3)
    (page,) = keep(pages, [1, 2, 3, 4])
    allocation = begin(pages, [1, 2, 3, 9], room=0)
    assert (allocation.num_reused_tokens, copies) == (3, [(page, allocation.block_table[0])])
    pages.free(allocation)
    assert begin(pages, [1, 2, 3, 4, 5]).num_reused_tokens == 4


def test_without_room_the_page_itself_is_taken_rather_than_lose_as_much() -> None:
    pages, copies = make(2)
    keep(pages, [7, 7, 7, 7])
    (page,) = keep(pages, [1, 2, 3, 4])
    allocation = begin(pages, [1, 2, 3, 9], room=0)
    assert (allocation.block_table, allocation.num_reused_tokens, copies) == ([page], 3, [])
    pages.free(allocation)
    assert begin(pages, [7, 7, 7, 7, 7], room=-1).num_reused_tokens == 4
    # The oldest goes if it has less.
    pages, copies = make(2)
    (oldest,) = keep(pages, [7])
    (page,) = keep(pages, [1, 2, 3, 4])
    allocation = begin(pages, [1, 2, 9], room=0)
    assert (allocation.block_table, allocation.num_reused_tokens, copies) == ([oldest], 2, [(page, oldest)])


def test_the_least_recently_used_leaf_is_evicted_first() -> None:
    pages, _ = make(5)
    keep(pages, [1, 1, 1, 1, 1, 1, 1, 1])
    keep(pages, [2, 2, 2, 2, 2, 2, 2, 2])
    wide = begin(pages, [3] * 8, room=0)
    pages.grow(wide, 8)  # one page was free, one has to go: the second of the older conversation
    pages.free(wide)
    again = begin(pages, [1] * 8, room=-1)
    assert again.num_reused_tokens == 4
    pages.free(again)
    assert begin(pages, [2, 2, 2, 2, 2, 2, 2, 2, 2], room=0).num_reused_tokens == 8


def test_two_conversations_keep_what_they_have_while_there_is_room() -> None:
    pages, _ = make(12)
    texts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    for turn in range(4):
        for who, ids in enumerate(texts):
            allocation = compute(pages, ids)
            assert allocation.num_reused_tokens == (len(ids) - 3 if turn else 0)
            pages.free(allocation)
            texts[who] = [*ids, 10 + turn, 20 + turn, 30 + who]


def test_identical_pages_are_stored_once() -> None:
    pages, _ = make(10)
    first, second = begin(pages, [1, 2, 3, 4, 5]), begin(pages, [1, 2, 3, 4, 5])
    for allocation in (first, second):
        pages.grow(allocation, 5)
    for allocation in (first, second):
        pages.mark_computed(allocation, 5)
    assert first.block_table[0] == second.block_table[0]
    assert first.block_table[1] != second.block_table[1]
    assert pages.num_allocated == 3
    pages.free(first)
    pages.free(second)
    assert (pages.num_allocated, pages.num_available) == (0, 10)
    wide = begin(pages, [9] * 32, room=0)
    pages.grow(wide, 32)
    assert begin(pages, [1, 2, 3, 4, 5, 6]).num_reused_tokens == 5, "eight others can be had without losing these two"


@pytest.mark.parametrize("other", [[1, 2, 3], [1, 2, 3, 4], [1, 2]])
def test_identical_partial_pages_are_stored_once(other: list[int]) -> None:
    pages, _ = make(3)
    keep(pages, [7, 7, 7])
    first, second = begin(pages, other, room=0), begin(pages, [1, 2, 3], room=0)
    for allocation in (first, second):
        pages.grow(allocation, len(allocation.ids))
        pages.mark_computed(allocation, len(allocation.ids))
    pages.free(first)
    pages.free(second)
    pages.grow(begin(pages, [9], room=0), 1)
    assert begin(pages, [7, 7, 7, 7], room=0).num_reused_tokens == 3


def test_a_copy_that_fails_leaves_nothing_behind() -> None:
    def fail(source: int, target: int) -> None:
        raise RuntimeError("no")

    pages = BlockManager(4, SIZE, fail)
    held = compute(pages, [1, 2, 3])
    with pytest.raises(RuntimeError):
        pages.allocate([1, 2, 3, 4], 8)
    assert (pages.num_allocated, pages.num_available) == (1, 3)
    pages.free(held)


def test_promises_count_what_is_shared() -> None:
    pages, _ = make(4)
    first = compute(pages, [1] * 9, room=0)
    assert pages.num_available == 1
    second = begin(pages, [1] * 9, room=0)
    assert (pages.num_available, second.num_reused_tokens) == (0, 8)
    pages.free(second)
    pages.free(first)
    # The same pages, used by nobody: now they are part of what it takes.
    blocker = begin(pages, [2], room=3)
    assert pages.allocate([1] * 9, 13) is None
    assert begin(pages, [1] * 9, room=3).num_reused_tokens == 8
    assert pages.num_available == 0
    assert blocker.num_reserved_pages == 1


def test_releasing_twice_and_after_a_reset_does_nothing() -> None:
    pages, _ = make(4)
    allocation = compute(pages, [1, 2, 3, 4, 5])
    pages.free(allocation)
    pages.free(allocation)
    assert (pages.num_available, pages.num_allocated) == (4, 0)
    held = begin(pages, [1, 2, 3, 4, 5])
    pages.grow(held, 5)
    pages.reset()
    pages.mark_computed(held, 5)
    pages.free(held)
    assert (pages.num_available, pages.num_allocated) == (4, 0)
    assert begin(pages, [1, 2, 3, 4, 5]).num_reused_tokens == 0
