"""``python -m simulation --seeds N``: play histories, print what they came to and the first that failed."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator

from simulation.history import Outcome, play

_SHOWN = 70  # lines of a failed history


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 if a history failed."""
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="play this many")
    parser.add_argument("--first", type=int, default=0, help="from this seed on")
    parser.add_argument("--seed", type=int, help="play this one and print its whole history")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--go-on", action="store_true", help="do not stop at the first failure")
    arguments = parser.parse_args(argv)
    if arguments.seed is not None:
        outcome = play(arguments.seed)
        print("\n".join(outcome.lines))
        print(f"seed {outcome.seed}: {outcome.failure or 'every invariant held'}")
        return int(outcome.failure is not None)
    begun, played, operations, faults, runs, failed = time.monotonic(), 0, 0, 0, 0, 0
    for outcome in outcomes(range(arguments.first, arguments.first + arguments.seeds), arguments.jobs):
        played, operations = played + 1, operations + outcome.operations
        faults, runs = faults + outcome.faults, runs + outcome.runs
        if time.monotonic() - begun > 60 * arguments.minutes:
            break
        if outcome.failure is not None:
            failed += 1
            if arguments.go_on:
                print(f"seed {outcome.seed}: {outcome.failure.splitlines()[-1][:220]}", flush=True)
                continue
            print("\n".join(outcome.lines[-_SHOWN:]))
            print(f"seed {outcome.seed} failed: {outcome.failure}\nreplay it: make simulate SEED={outcome.seed}")
            break
    seconds = time.monotonic() - begun
    print(
        f"{played} histories, {runs} runs, {operations} operations ({operations / played:.0f} each), {faults} faults "
        f"({faults / played:.1f} each), {failed} failed; {seconds:.0f} s ({played / seconds:.0f} histories/s)"
    )
    return int(failed > 0)


def outcomes(seeds: range, jobs: int) -> Iterator[Outcome]:
    """Outcomes in the order of the seeds."""
    if jobs == 1:
        yield from map(play, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(play, seeds, chunksize=20)


if __name__ == "__main__":
    sys.exit(main())
