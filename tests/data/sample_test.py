"""Sampling by digest: the shortest prefix of all documents in digest order, in whatever order they arrive."""

import hypothesis
import hypothesis.strategies as st

from dsv3.data.corpus import Document
from dsv3.data.sample import HashSample

items = st.lists(st.tuples(st.binary(min_size=1, max_size=1), st.integers(0, 9)), max_size=30)


def sampled(limit, numbered):
    sample = HashSample(limit)
    for number, (digest, size) in numbered:
        sample.add(digest, size, Document(str(number), ""))
    return [int(document.name) for document in sample.documents()]


@hypothesis.given(items, st.integers(1, 60), st.randoms())
def test_it_is_the_shortest_prefix_in_digest_order(items, limit, random):
    ordered = sorted(enumerate(items), key=lambda item: item[1][0])  # stable: of equal digests the first comes first
    expected, total = [], 0
    for number, (_, size) in ordered:
        if total >= limit:
            break
        expected.append(number)
        total += size
    assert sampled(limit, enumerate(items)) == expected
    if len({digest for digest, _ in items}) == len(items):
        shuffled = list(enumerate(items))
        random.shuffle(shuffled)
        assert sampled(limit, shuffled) == expected


def test_it_forgets_what_it_does_not_need():
    sample = HashSample(10)
    for digest in range(10_000, 0, -1):
        sample.add(digest.to_bytes(4, "big"), 5, Document(str(digest), ""))
        assert len(sample._heap) <= 2
    assert [document.name for document in sample.documents()] == ["1", "2"]
