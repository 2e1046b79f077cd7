"""A bridge is trained on pairs, on one machine or on a Ray cluster."""
