"""E4M3 with one float32 scale per block of 128 x 128: how the released weights are stored (report section 3.3.2)."""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

BLOCK = 128
LARGEST = 448.0
"""The largest finite E4M3."""
SMALLEST_AMAX = 1e-4
"""A block of zeros needs a scale as well; the released kernel's bound."""


class Blocks(NamedTuple):
    """A matrix (or a stack of them) as E4M3 `values` [.., rows, columns] and float32 `scales` of its blocks.

    `scales` is [.., ceil(rows / 128), ceil(columns / 128)]: blocks at the end may be ragged. V3's kv_a_proj of 576 x
    7168 has 5 x 56. The matrix is value * scale of its block.
    """

    values: Any
    scales: Any


def n_blocks(size: int) -> int:
    """Blocks along an axis of `size`, the last one possibly ragged."""
    return -(-size // BLOCK)


def quantize_blocks(matrix: np.ndarray) -> Blocks:
    """scale = amax / 448 of each block, value = matrix / scale rounded to nearest even; `matrix` is [rows, columns]."""
    rows, columns = matrix.shape
    padded = np.zeros((n_blocks(rows) * BLOCK, n_blocks(columns) * BLOCK), np.float32)
    padded[:rows, :columns] = matrix
    blocks = padded.reshape(n_blocks(rows), BLOCK, n_blocks(columns), BLOCK)
    amax = np.maximum(np.max(np.abs(blocks), axis=(1, 3)), np.float32(SMALLEST_AMAX))
    scales = amax / np.float32(LARGEST)
    blocks /= scales[:, None, :, None]
    return Blocks(padded[:rows, :columns].astype(ml_dtypes.float8_e4m3fn), scales)


def dequantize_blocks(values: np.ndarray, scales: np.ndarray, first: tuple[int, int] = (0, 0)) -> np.ndarray:
    """float32 value * scale. `values` [rows, columns] may be a part of the matrix that begins at `first`."""
    row, column = ((start + np.arange(size)) // BLOCK for start, size in zip(first, values.shape, strict=True))
    matrix = values.astype(np.float32)
    matrix *= scales[row[:, None], column[None, :]]
    return matrix
