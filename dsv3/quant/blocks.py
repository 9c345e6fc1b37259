"""E4M3 with one float32 scale per block of 128 x 128: how the released weights are stored (report section 3.3.2).

NumPy, for files of any size, tensor by tensor, and bit by bit what the released kernels do: scales of at least 1e-4 /
448, and a division. `tiles.py` quantises arrays of a program, where neither is wanted.
"""

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


def block_scales(matrix: np.ndarray) -> np.ndarray:
    """amax / 448 of each block of `matrix` [rows, columns], float32."""
    by_rows = np.maximum.reduceat(np.abs(matrix), np.arange(0, matrix.shape[0], BLOCK), axis=0)
    amax = np.maximum.reduceat(by_rows, np.arange(0, matrix.shape[1], BLOCK), axis=1).astype(np.float32)
    return np.maximum(amax, np.float32(SMALLEST_AMAX)) / np.float32(LARGEST)


def quantize_blocks(matrix: np.ndarray) -> Blocks:
    """value = matrix / scale of its block, rounded to nearest even; `matrix` is [rows, columns]."""
    scales, scaled = block_scales(matrix), matrix.astype(np.float32)
    columns = np.arange(matrix.shape[1]) // BLOCK
    for block in range(len(scales)):
        scaled[block * BLOCK:(block + 1) * BLOCK] /= scales[block, columns][None]
    return Blocks(scaled.astype(ml_dtypes.float8_e4m3fn), scales)


def dequantize_blocks(values: np.ndarray, scales: np.ndarray, first: tuple[int, int] = (0, 0)) -> np.ndarray:
    """float32 value * scale. `values` [rows, columns] may be a part, from `first` on, of the matrix of `scales`."""
    matrix = values.astype(np.float32)
    columns = (first[1] + np.arange(values.shape[1])) // BLOCK
    block, start = first[0] // BLOCK, 0
    while start < len(matrix):
        stop = (block + 1) * BLOCK - first[0]
        matrix[start:stop] *= scales[block, columns][None]
        block, start = block + 1, stop
    return matrix
