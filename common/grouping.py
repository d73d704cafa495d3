"""Items divided into groups of a limited size, in order."""

from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def in_groups(
    items: Iterable[Item], largest: int, size_of: Callable[[Item], int]
) -> list[list[Item]]:
    """Divide items into groups, in order.

    For example, `in_groups([3, 4, 9, 1], 8, lambda item: item)` gives `[[3, 4], [9], [1]]`.

    Args:
        items: Items of any type.
        largest: Largest total size of a group. A single item may be larger.
        size_of: Function that returns the size of an item.

    Returns:
        Groups of at least one item each.
    """
    groups: list[list[Item]] = []
    group_size = 0
    for item in items:
        size = size_of(item)
        if not groups or group_size + size > largest:
            groups.append([])
            group_size = 0
        groups[-1].append(item)
        group_size += size
    return groups
