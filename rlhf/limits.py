"""Sizes that the kernels keep to and the planner counts with: each stands here and nowhere else."""

from __future__ import annotations

CHUNK_VALUES = 1 << 25  # logits of ours that exist at once
CAST_VALUES = 1 << 19  # of a head in half precision that exist in float32 at once: what a core's cache holds
DRAWN_VALUES = {"cpu": 1 << 19, "cuda": 1 << 23}  # probabilities in float64 at once: a CPU's caches, a GPU's launches
SUMMED_BYTES = 1 << 28  # weights up to which sampling keeps W + s B A
FEATURES = 1024  # that the critic by least squares makes of a hidden state
FEATURE_ROWS = 1024  # states whose features exist at once
