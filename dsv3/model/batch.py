"""What a model reads in one step: the contract between data, training and evaluation."""

from typing import NamedTuple

import jax
import numpy as np


class Batch(NamedTuple):
    """`B` rows of `T` next-token predictions; NumPy on the host, jax arrays on a device, and a pytree either way.

    tokens_BT       int32, the inputs
    targets_BT      int32, the token after each input: a row of T+1 tokens `a b c d` has inputs `a b c`, targets `b c d`
    weights_BT      float32, 1 where the target counts in the loss and 0 where it does not
    segment_ids_BT  int32, of the inputs: a token may attend to earlier tokens of its own segment; 0 marks padding
    """

    tokens_BT: jax.Array | np.ndarray
    targets_BT: jax.Array | np.ndarray
    weights_BT: jax.Array | np.ndarray
    segment_ids_BT: jax.Array | np.ndarray
