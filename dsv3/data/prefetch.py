"""Work done ahead of its use by threads."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor


def prefetch[A, B](function: Callable[[A], B], items: Iterable[A], *, threads: int, ahead: int) -> Iterator[B]:
    """`map(function, items)`, in order, with up to `ahead` results computed before they are asked for.

    `items` itself is advanced by the caller's thread, and may be endless. The threads start with the first result that
    is asked for. They end when the iterator is exhausted, closed or dropped, and they do not keep the interpreter from
    exiting. An error of `function` is raised in place of its result.
    """
    pending: collections.deque[Future[B]] = collections.deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        pool.shutdown(wait=False)  # when the interpreter exits the threads have ended, and waiting would fail
