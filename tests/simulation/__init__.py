"""Crash simulation: the caption job's own driver on simulated stores, clocks and workers; faults follow from a seed.

Run it with ``make simulate SEEDS=1000``; ``make simulate SEED=7`` replays one history.
"""
