"""Model FLOP utilisation: useful arithmetic per second over what the device could do."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

PEAK_FLOPS = {
    "NVIDIA H100": 989.5e12,
    "NVIDIA H200": 989.5e12,
    "NVIDIA H800": 989.5e12,
}
"""Dense bfloat16 peaks by device kind (NVIDIA's data sheets); MFU is against bfloat16 also where products are FP8."""


def measured_matmul_flops(size: int = 1024, repeats: int = 10) -> float:
    """FLOP/s of a float32 matrix product on the default device: stands in for a peak where none is published."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size ** 3 / min(times)


def peak_flops() -> float:
    """FLOP/s of the default device: the data sheet's for a known GPU, measured with a matrix product otherwise."""
    kind = jax.devices()[0].device_kind
    for name, flops in PEAK_FLOPS.items():
        if kind.startswith(name):
            return flops
    return measured_matmul_flops()


class Timer:
    """Seconds and tokens of training steps alone: compilation, validation and saving are paused."""

    def __init__(self) -> None:
        self.seconds, self.tokens, self._since = 0.0, 0, None
        self._taken_seconds, self._taken_tokens = 0.0, 0

    def resume(self) -> None:
        self._since = time.perf_counter()

    def pause(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
        self._since = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around something that is not training."""
        self.pause()
        yield
        self.resume()

    def take(self) -> float:
        """Tokens per second since the last call."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        self._taken_seconds += self.seconds
        self._taken_tokens += self.tokens
        self.seconds, self.tokens = 0.0, 0
        return rate

    def tokens_per_second(self) -> float:
        """Of everything taken so far, 0 before the first step."""
        return self._taken_tokens / self._taken_seconds if self._taken_seconds else 0.0
