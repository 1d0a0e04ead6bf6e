"""Counter-based random words: Philox4x64-10 (Salmon et al., SC 2011), for many counters at once.

numpy's Philox gives one stream an object; an augmentation needs a short stream for each of thousands of views. The
words equal those of `Philox(key=key, counter=counter - 1).random_raw(4)` of numpy, which is tested. Permutations are
sorts of random words, or Feistel networks where only a few places of a large one are wanted: numpy promises the words
for ever, but not what Generator.permutation makes of them.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
_SPLITMIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_WEYL = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B))


def key_of(*parts: object) -> tuple[int, int]:
    """A 128-bit Philox key from anything that prints the same everywhere."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def _high_product(a: np.uint64, b: Words) -> Words:
    """The upper 64 bits of the 128-bit product."""
    a_low, a_high, b_low, b_high = a & _LOW, a >> _HALF, b & _LOW, b >> _HALF
    middle = a_high * b_low + ((a_low * b_low) >> _HALF)
    return a_high * b_high + (middle >> _HALF) + ((a_low * b_high + (middle & _LOW)) >> _HALF)


def philox(key: tuple[int, int], counters: Words) -> Words:
    """(n, 4) counters, least significant word first -> the four random words of each, (n, 4)."""
    with np.errstate(over="ignore"):
        c0, c1, c2, c3 = (counters[:, i] for i in range(4))
        k0, k1 = np.uint64(key[0]), np.uint64(key[1])
        for _ in range(10):
            high0, low0 = _high_product(_MULTIPLIERS[0], c0), _MULTIPLIERS[0] * c0
            high1, low1 = _high_product(_MULTIPLIERS[1], c2), _MULTIPLIERS[1] * c2
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
            k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
        return np.stack([c0, c1, c2, c3], axis=1)


def words(key: tuple[int, int], count: int, *counter: int) -> Words:
    """`count` random words of the stream (key, counter); up to three integers of 64 bits tell streams apart."""
    high = sum(part << 64 * (i + 1) for i, part in enumerate(counter))
    return np.random.Philox(key=key[0] | key[1] << 64, counter=high).random_raw(count)


def uniforms(random_words: Words) -> NDArray[np.float64]:
    """Words -> float64 in [0, 1), 53 bits each."""
    return (random_words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def view_uniforms(
    seed: int, epochs: NDArray[np.int64], sample_ids: NDArray[np.int64], num_views: int, count: int
) -> NDArray[np.float64]:
    """(n, num_views, count) uniforms for the augmentation, each view's a function of (seed, epoch, sample, view)."""
    counters = np.empty((len(sample_ids), num_views, -(-count // 4), 4), dtype=np.uint64)
    counters[..., 0] = np.arange(counters.shape[2], dtype=np.uint64)
    counters[..., 1] = np.arange(num_views, dtype=np.uint64)[:, None]
    counters[..., 2] = np.asarray(sample_ids).astype(np.uint64)[:, None, None]
    counters[..., 3] = np.asarray(epochs).astype(np.uint64)[:, None, None]
    drawn = uniforms(philox(key_of("augment", seed), counters.reshape(-1, 4)))
    return drawn.reshape(*counters.shape[:2], -1)[..., :count]


def permutation(key: tuple[int, int], count: int, *counter: int) -> NDArray[np.int64]:
    """A random permutation of range(count).

    The index fills the low bits of each word, so that all are distinct and every sort gives the same order.
    """
    mask = np.uint64((1 << max(count - 1, 0).bit_length()) - 1)
    keyed = (words(key, count, *counter) & ~mask) | np.arange(count, dtype=np.uint64)
    keyed.sort()
    return (keyed & mask).astype(np.int64)


def permuted(round_keys: Words, places: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where a random permutation of range(sizes[i]), made of the row round_keys[i], takes places[i]: O(1) each.

    A Feistel network over a grid of a x b places, the smallest that holds the size (Black and Rogaway, CT-RSA 2002):
    rounds add a hash of one coordinate to the other, in turn; what lands beyond the size goes through again. The keys
    are random words, (n, an even number of rounds); the hash is splitmix64's (Steele et al., OOPSLA 2014).
    """
    places = places.copy()
    walking = np.flatnonzero(sizes > 1)
    while len(walking):
        keys, a = round_keys[walking], np.ceil(np.sqrt(sizes[walking])).astype(np.int64)
        b = -(-sizes[walking] // a)
        row, column = np.divmod(places[walking], b)
        for i in range(0, keys.shape[1], 2):
            row = (row + _below(keys[:, i], column, a)) % a
            column = (column + _below(keys[:, i + 1], row, b)) % b
        places[walking] = row * b + column
        walking = walking[places[walking] >= sizes[walking]]
    return places


def _below(keys: Words, values: NDArray[np.int64], limits: NDArray[np.int64]) -> NDArray[np.int64]:
    """A hash of key and value in [0, limit), for limits up to 2^31."""
    with np.errstate(over="ignore"):
        x = keys + values.astype(np.uint64) * _WEYL[0]
        x = (x ^ (x >> np.uint64(30))) * _SPLITMIX[0]
        x = (x ^ (x >> np.uint64(27))) * _SPLITMIX[1]
        x ^= x >> np.uint64(31)
    return ((x >> _HALF) * limits.astype(np.uint64) >> _HALF).astype(np.int64)
