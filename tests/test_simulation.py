"""The crash simulation: 500 histories hold every invariant, and seeds that once failed hold them now."""

from __future__ import annotations

import pytest
from simulation.history import play
from simulation.mutations import MUTATIONS, Mutation, mutated

SEEDS = range(500)
# Seeds that found a fault of the job when it was made; their histories differ since the simulation has grown.
FOUND = {
    2: "an OSError of a local disk left the job as a traceback",
    30: "a ledger segment that was compacted between listing and reading ended the run with exit code 2",
    55: "a local store that stumbled was exit code 2",
    108: "a lock outlasted its expiry where the reader's clock was behind the store's",
    116: "the record of a task that ran twice was counted twice",
    150: "rows of a fragment that could not be read at once were captioned again",
    139: "a run that ended took the state's folder away from one that was taking the lock (exit code 2)",
    473: "two runs that began to fill one output at once: one was told that it belongs to another input (exit code 2)",
    789: "the same, between making the folder and opening it",
    1064: "of two runs that claimed a new state at once one was told that it holds other files (exit code 2)",
    270: "a live lock on a store was taken away by a host whose clock was ahead",
}


def test_five_hundred_histories_hold_every_invariant() -> None:
    failed = {seed: outcome.failure for seed in SEEDS if (outcome := play(seed)).failure is not None}
    assert failed == {}


@pytest.mark.parametrize("seed", FOUND)
def test_a_seed_that_found_a_fault_holds(seed: int) -> None:
    assert play(seed).failure is None, FOUND[seed]


def test_a_seed_plays_the_same_history_every_time() -> None:
    assert play(11).lines == play(11).lines


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_a_mutation_of_the_job_is_found_within_two_thousand_seeds(mutation: Mutation) -> None:
    with mutated(mutation):
        assert any(play(seed).failure is not None for seed in range(mutation.seed, mutation.seed + 2000))
