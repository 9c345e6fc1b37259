"""Duplicates against sets of word tuples compared pair by pair."""

import builtins
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.config import UserError
from dsv3.data.corpus import Document
from dsv3.data.dedup import Deduplicator, NearConfig, deduplicate, digest, jaccard, sketch

NEAR = NearConfig(unit="words", shingle=5, num_perm=128, threshold=0.8, seed=0)
SMALL = NearConfig(unit="words", shingle=2, num_perm=16, threshold=0.5, seed=1)
CHARACTERS = NearConfig(unit="characters", shingle=3, num_perm=16, threshold=0.5, seed=1)


def named(texts):
    return [Document(f"d{index}", text) for index, text in enumerate(texts)]


def oracle_shingles(text, config):
    units = re.findall(r"\w+", text.lower()) if config.unit == "words" else " ".join(text.lower().split())
    n = min(config.shingle, len(units))
    return {tuple(units[start:start + n]) for start in range(len(units) - n + 1)} if units else set()


def oracle_jaccard(left, right, config=NEAR):
    a, b = oracle_shingles(left, config), oracle_shingles(right, config)
    return len(a & b) / len(a | b) if a | b else 0.0


def pair(rng, n_words, changed):
    """A text and a copy in which a run of `changed` words is replaced by others."""
    text = [f"w{value}" for value in rng.integers(0, 10**6, n_words)]
    start = rng.integers(0, n_words - changed + 1)
    other = [f"v{value}" for value in rng.integers(0, 10**6, changed)]
    return " ".join(text), " ".join(text[:start] + other + text[start + changed:])


def test_the_first_of_exact_duplicates_stays():
    documents = named(["a b c", "x", "a b c", "x", "A b c", ""])
    kept = list(deduplicate(documents + named([""]), None))
    assert [document.name for document in kept] == ["d0", "d1", "d4", "d5"]


def test_near_duplicates_above_the_threshold_are_found_and_only_they():
    """600 pairs of Jaccard index 0.6 to 1; the LSH finds 97.5% of pairs at 0.85 and more above it."""
    rng = np.random.default_rng(0)
    above, missed, between, dropped_below = 0, 0, 0, 0
    seen = Deduplicator(NEAR)
    for index in range(600):
        left, right = pair(rng, int(rng.integers(100, 400)), int(rng.integers(1, 40)))
        exact = oracle_jaccard(left, right)
        assert seen.duplicate_of(f"{index}", digest(left), sketch(left, NEAR)) is None
        found = seen.duplicate_of("right", digest(right), sketch(right, NEAR))
        assert found in (None, ("near", f"{index}"))
        above += exact >= 0.85
        missed += exact >= 0.85 and found is None
        between += 0.7 < exact < 0.8
        dropped_below += exact < NEAR.threshold and found is not None
    seen.close()
    assert above > 200 and between > 50
    assert missed <= 0.01 * above
    assert dropped_below == 0


def test_minima_agree_as_often_as_the_jaccard_index():
    """Mean over 200 pairs with seeds of their own; four standard errors of independent hash functions."""
    rng = np.random.default_rng(1)
    errors, variance = [], 0.0
    for seed in range(200):
        left, right = pair(rng, 300, 30)
        config = NearConfig(unit="words", shingle=5, num_perm=128, threshold=0.8, seed=seed)
        exact = oracle_jaccard(left, right)
        agreement = np.mean(sketch(left, config).minima == sketch(right, config).minima)
        errors.append(agreement - exact)
        variance += exact * (1 - exact) / config.num_perm
    assert abs(np.sum(errors)) < 4 * variance ** 0.5
    assert np.std(errors) < 1.3 * (variance / len(errors)) ** 0.5


documents = st.lists(
    st.lists(st.sampled_from(["a", "b", "c", "+", "é"]), max_size=8).map(" ".join), max_size=12).map(named)
configs = st.sampled_from([SMALL, CHARACTERS, None])


@settings(deadline=None)
@given(documents, configs, st.data())
def test_later_documents_change_nothing_for_earlier_ones(corpus, config, data):
    first = corpus[:data.draw(st.integers(0, len(corpus)))]
    names = {document.name for document in first}
    whole = [document for document in deduplicate(corpus, config) if document.name in names]
    assert whole == list(deduplicate(first, config))


@settings(deadline=None)
@given(documents, configs)
def test_what_is_kept_has_no_duplicates_left(corpus, config):
    kept = list(deduplicate(corpus, config))
    assert list(deduplicate(kept, config)) == kept
    assert len({document.text for document in kept}) == len(kept)
    assert {document.text for document in kept} == {document.text for document in corpus} or config is not None


@settings(deadline=None)
@given(documents, st.sampled_from([SMALL, CHARACTERS]))
def test_every_dropped_document_is_like_one_kept_before_it(corpus, config):
    kept = {document.name for document in deduplicate(corpus, config)}
    for index, document in enumerate(corpus):
        before = [other for other in corpus[:index] if other.name in kept]
        likeness = max((oracle_jaccard(other.text, document.text, config) for other in before), default=0.0)
        assert document.name in kept or likeness >= config.threshold or document in [
            Document(document.name, other.text) for other in before]


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcde"), max_size=20), st.lists(st.sampled_from("abcde"), min_size=1, max_size=20),
       st.sampled_from([SMALL, CHARACTERS]))
def test_jaccard_is_that_of_the_sets(left, right, config):
    left, right = " ".join(left), " ".join(right)
    found = jaccard(sketch(left, config).shingles, sketch(right, config).shingles)
    assert found == oracle_jaccard(left, right, config)


def test_a_chain_of_small_changes_keeps_its_dissimilar_end():
    """Each is like its neighbour only: the second goes for the first, the third is compared with the first alone."""
    words = [f"w{index}" for index in range(400)]
    chain = [" ".join(words[start:start + 200]) for start in (0, 15, 30)]
    assert oracle_jaccard(chain[0], chain[1]) >= 0.85 and oracle_jaccard(chain[0], chain[2]) < 0.78
    assert [document.name for document in deduplicate(named(chain), NEAR)] == ["d0", "d2"]


def test_documents_without_words_are_never_near():
    corpus = named(["+", "-", "", "!?", "+"])
    assert [document.name for document in deduplicate(corpus, SMALL)] == ["d0", "d1", "d2", "d3"]


@pytest.mark.parametrize("threshold, num_perm", [(1.0, 128), (0.99, 16), (0.1, 16)])
def test_every_threshold_finds_equal_sets_of_shingles(threshold, num_perm):
    config = NearConfig(unit="words", shingle=3, num_perm=num_perm, threshold=threshold, seed=0)
    text = "the same words with other marks between them"
    assert len(list(deduplicate(named([text, text.replace(" ", ", ").upper()]), config))) == 1


@pytest.mark.parametrize("changes", [
    {"shingle": 0}, {"num_perm": 8}, {"threshold": 0.0}, {"threshold": 1.1}, {"threshold": float("nan")},
    {"unit": "lines"}, {"seed": -1},
])
def test_impossible_settings(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        NearConfig(**{"unit": "words", "shingle": 5, "num_perm": 128, "threshold": 0.8, "seed": 0} | changes)


def test_without_datasketch_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **keywords):
        if name.split(".")[0] == "datasketch":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"dsv3\[data\]") as caught:
        Deduplicator(NEAR)
    assert "\n" not in str(caught.value)
    assert len(list(deduplicate(named(["a", "a"]), None))) == 1
