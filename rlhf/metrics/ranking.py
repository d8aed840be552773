"""How well scores order K responses to one prompt that have grades: the higher, the better."""

from __future__ import annotations

import numpy
from numpy.typing import ArrayLike, NDArray

Array = NDArray[numpy.float64]


def kendall_tau_b(grades: ArrayLike, scores: ArrayLike) -> float:
    """Kendall's tau-b of two [K] orders, which takes ties of either into account.

        tau_b = (P - Q) / sqrt((P + Q + T) (P + Q + U))

    P pairs are ordered alike, Q oppositely, T are tied in the grades alone, U in the scores alone. nan where all grades
    or all scores are equal.

    Reference: Kendall 1945, The treatment of ties in ranking problems.
    """
    first, second = (_signs(values) for values in (grades, scores))
    size = float((first**2).sum() * (second**2).sum()) ** 0.5
    return float((first * second).sum()) / size if size else float("nan")


def ndcg(gains: ArrayLike, scores: ArrayLike) -> float:
    """Normalised discounted cumulative gain of the order of the scores [K]: 1 for the best possible one.

        DCG = sum_r g_r / log2(r + 1),   NDCG = DCG / (DCG of the gains in descending order)

    g_r is the gain [K] of the response at place r = 1 .. K, as it is (no 2^g - 1). Responses with equal scores share
    their places: each counts with the mean of their gains. nan where no gain is above 0.

    Raises:
        ValueError: for a gain below 0.

    Reference: Jarvelin and Kekalainen 2002, Cumulated gain-based evaluation of IR techniques; ties as in McSherry and
    Najork 2008, Computing information retrieval performance measures efficiently in the presence of tied scores.
    """
    gain, score = (numpy.asarray(values, dtype=float) for values in (gains, scores))
    if (gain < 0).any():
        raise ValueError("gains must be at least 0")
    _, group = numpy.unique(-score, return_inverse=True)
    shared = (numpy.bincount(group, gain) / numpy.bincount(group))[group]
    discounts = 1 / numpy.log2(numpy.arange(2, len(gain) + 2))
    best = float(numpy.sort(gain)[::-1] @ discounts)
    return float(shared[numpy.argsort(group, kind="stable")] @ discounts) / best if best > 0 else float("nan")


def _signs(values: ArrayLike) -> Array:
    """[K (K - 1) / 2] the order of each pair: 1, 0 or -1."""
    array = numpy.asarray(values, dtype=float)
    return numpy.sign(array[:, None] - array[None])[numpy.triu_indices(len(array), 1)]  # type: ignore[no-any-return]
