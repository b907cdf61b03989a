"""From pairs of copies to groups, without chains: every member of a group is a copy of its centre."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from influence_cli.inspection.copies import Links


@dataclass(frozen=True)
class Group:
    """Images that are copies of one of them.

    Attributes:
        rows: int64 [m], m ≥ 2, rising.
        exact: bool [m], whether another member has the same pixels.
        similarity: float64 [m], to the member that it is most like.
    """

    rows: np.ndarray
    exact: np.ndarray
    similarity: np.ndarray


def make_groups(links: Links, count: int) -> list[Group]:
    """Put images into groups.

    The connected components of the pairs may be chains, a like b like c, whose ends have nothing in common. So the
    image with the most copies is a centre, and takes all its copies that no centre has taken yet; then the next one.
    Images of the same pixels stay together.

    Args:
        links: the pairs.
        count: images.

    Returns:
        The groups, in the order of their first images.
    """
    exact = links.pairs[links.exact]
    first = np.arange(count)
    first[exact[:, 1]] = exact[:, 0]
    copies: dict[int, dict[int, float]] = {}
    for (a, b), similarity in zip(links.pairs[~links.exact], links.similarity[~links.exact], strict=True):
        for one, other in ((int(first[a]), int(first[b])), (int(first[b]), int(first[a]))):
            copies.setdefault(one, {})[other] = float(similarity)
    same: dict[int, list[int]] = {}
    for a, b in exact:
        same.setdefault(int(a), [int(a)]).append(int(b))
    left = set(copies) | set(same)
    groups = []
    for centre in sorted(left, key=lambda row: (-len(copies.get(row, ())), row)):
        if centre not in left:
            continue
        members = {centre, *left.intersection(copies.get(centre, ()))}
        left -= members
        rows = sorted(row for member in members for row in same.get(member, [member]))
        if len(rows) > 1:
            groups.append(_group(rows, first, copies))
    return sorted(groups, key=lambda group: int(group.rows[0]))


def _group(rows: list[int], first: np.ndarray, copies: dict[int, dict[int, float]]) -> Group:
    firsts = [int(first[row]) for row in rows]
    exact = np.array([firsts.count(one) > 1 for one in firsts])
    similarity = [
        1.0 if alike else max(copies.get(one, {}).get(other, 0.0) for other in firsts)
        for one, alike in zip(firsts, exact, strict=True)
    ]
    return Group(np.array(rows), exact, np.array(similarity))
