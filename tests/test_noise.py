"""The counter-based random numbers: Philox's published outputs, and distributions."""

from __future__ import annotations

import numpy as np
import pytest

from exl_cli.engines.sampling.noise import exponential, philox, uniform


@pytest.mark.parametrize(
    ("block", "position", "seed", "words"),
    [
        (0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),  # Random123's kat_vectors, philox4x32 10
    ],
)
def test_philox_gives_its_published_output(block: int, position: int, seed: int, words: tuple[int, ...]) -> None:
    assert philox(np.array([block]), position, 0, seed)[:, 0].tolist() == list(words)


def test_noise_is_exponential() -> None:
    noise = np.sort(np.concatenate([exponential(7, position, np.arange(4000)) for position in range(25)]))
    steps = np.arange(1, len(noise) + 1) / len(noise)
    distance = np.abs(1 - np.exp(-noise.astype(np.float64)) - steps).max()
    assert distance < 1.95 / np.sqrt(len(noise))  # Kolmogorov and Smirnov's 0.1 % point
    assert noise[0] > 0


def test_a_tokens_noise_does_not_depend_on_the_others() -> None:
    ids = np.array([0, 3, 77, 1000, 31999, 128255])
    few = exponential(2**63 + 5, 12, ids)
    assert (exponential(2**63 + 5, 12, np.arange(128256))[ids] == few).all()
    assert (exponential(2**63 + 5 - 2**64, 12, ids) == few).all()
    assert (exponential(2**63 + 6, 12, ids) != few).all()
    assert (exponential(2**63 + 5, 13, ids) != few).all()


def test_uniform_numbers_are_between_0_and_1() -> None:
    numbers = np.sort([uniform(3, position) for position in range(5000)])
    assert numbers[0] > 0
    assert numbers[-1] < 1
    assert np.abs(numbers - np.arange(5000) / 5000).max() < 1.95 / np.sqrt(5000)
