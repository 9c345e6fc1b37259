"""The four products of a recipe on Hopper, with the tuning that each shape gets."""

from functools import cache, partial

import jax
import jax.numpy as jnp

from dsv3.kernels.scaled import TILE, Blocks, Tiles
from dsv3.kernels.scaled_dot import Products
from dsv3.kernels.scaled_dot_hopper import MULTIPROCESSORS, rows_times_blocks, weight_gradient
from dsv3.kernels.scaled_warpgroups_hopper import HALF, ROWS, Tuning
from dsv3.kernels.tuning import rounded_up, tuned

NARROW, WIDE = Tuning(width=128, stages=6), Tuning(width=192, stages=5)
HALVES = tuple(Tuning(width, stages, rows=HALF) for width, stages in (
    (16, 21), (32, 17), (48, 15), (64, 13), (96, 10), (128, 8)))
"""For few rows: the narrowest whose tiles all run at once, as all multiprocessors together read the weights. Of up to
64 rows half of a whole tile would be for nobody; of 128 a multiprocessor reads half, which is most of what it reads."""
WHOLE = tuple(Tuning(width, stages) for width, stages in ((32, 10), (64, 8), (128, 6), (192, 5)))
"""For few rows of many columns, where two rows of tiles do not all run at once."""
ALIGNED = 8, 32
"""What the rows and columns of a result are multiples of: no part that the copy engine writes may be cut."""
WIDE_ADVANTAGE = 1.06
"""How much more a column of a narrow tile costs than one of a wide tile, which loads fewer bytes for a product."""


def refusal(interval: int, accumulator: str) -> str | None:
    """Why a rule cannot be carried out on tensor cores, or None."""
    if accumulator != "float32":
        return f"the accumulator model {accumulator!r}: a tensor core has its own"
    return None if interval == TILE else f"promotion every {interval} products: it must be every {TILE}"


def refuses_operands(a: Tiles, b: Tiles | Blocks) -> str | None:
    """Why two operands cannot be multiplied, or None."""
    other = [x.values.dtype.name for x in (a, b) if x.values.dtype not in (jnp.float8_e4m3fn, jnp.float8_e5m2)]
    return f"operands in {other[0]}: they must be E4M3 or E5M2" if other else None


def cost(m: int, n: int, width: int) -> float:
    """Rounds of all multiprocessors over the tiles of [m, n], in columns: the narrow ones load more for a product."""
    rounds = -(-(-(-m // ROWS) * -(-n // width)) // MULTIPROCESSORS)
    return rounds * width * (1 if width >= 160 else WIDE_ADVANTAGE)


def default_tuning(m: int, n: int) -> Tuning:
    """The width whose tiles fill whole rounds of all multiprocessors best; of few rows, the first that fits one."""
    if m <= ROWS:
        at_once = lambda tuning: -(-m // tuning.rows) * -(-n // tuning.width) <= MULTIPROCESSORS
        return next(filter(at_once, (*HALVES, *WHOLE)), WIDE)
    return min(NARROW, WIDE, key=lambda tuning: cost(m, n, tuning.width))


def dense_entry(m: int, n: int, k: int) -> tuple[int, ...]:
    """Which entry of the tuning table a product of these sizes has: m rounded up, to 64 at least, n, k."""
    return rounded_up(max(m, HALF)), n, k


def grouped_entry(m: int, e: int, n: int, k: int) -> tuple[int, ...]:
    """The same for m rows of e experts, of which all but the padding (`padded_rows`) are shared out evenly.

    The entry names the experts and the rows of each: 8 experts with 33,664 rows in all have (8, 4096, n, k).
    """
    return e, rounded_up(max(1, (m - e * (TILE - 1)) // e)), n, k


def scaled_dot(a: Tiles, b: Blocks, shape: tuple[int, int], dtype: jnp.dtype, *, kind: str) -> jax.Array:
    (m, n), (n_padded, k) = shape, b.values.shape
    tuning = tuned(kind, "scaled_dot", dense_entry(m, n_padded, k), default_tuning(m, n))
    rows, columns = (-(-size // multiple) * multiple for size, multiple in zip(shape, ALIGNED, strict=True))
    return rows_times_blocks(a, b, None, jax.ShapeDtypeStruct((rows, columns), dtype), tuning)[:m, :n]


def scaled_grouped_dot(a: Tiles, b: Blocks, expert_Z: jax.Array, out_dtype: jnp.dtype, *, kind: str) -> jax.Array:
    (m, k), (e, n, _) = a.values.shape, b.values.shape
    tuning = tuned(kind, "scaled_grouped_dot", grouped_entry(m, e, n, k), default_tuning(m, n))
    return rows_times_blocks(a, b, expert_Z, jax.ShapeDtypeStruct((m, n), out_dtype), tuning)


def scaled_weight_gradient(a: Tiles, b: Tiles, *, kind: str) -> jax.Array:
    d, f = a.values.shape[0], b.values.shape[0]
    # Not t: however many tokens, the tiles are those of d x f.
    return weight_gradient(a, b, None, None, tuned(kind, "scaled_weight_gradient", (d, f), NARROW))


def scaled_grouped_weight_gradient(
    a: Tiles, b: Tiles, start_E: jax.Array, steps_E: jax.Array, *, kind: str,
) -> jax.Array:
    d, f = a.values.shape[0], b.values.shape[0]
    tuning = tuned(kind, "scaled_grouped_weight_gradient", (len(start_E), d, f), NARROW)
    return weight_gradient(a, b, start_E, steps_E, tuning)


@cache
def products(kind: str) -> Products:
    """For a device of this kind, as the tuning table names it.

    Each is compiled by itself, so that a model with many equal layers lowers every kernel once.
    """
    static = {scaled_dot: (2, 3), scaled_grouped_dot: 3, scaled_weight_gradient: (), scaled_grouped_weight_gradient: ()}
    return Products(*(jax.jit(partial(function, kind=kind), static_argnums=numbers)
                      for function, numbers in static.items()))
