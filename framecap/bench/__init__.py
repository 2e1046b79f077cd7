"""What `jobs/benchmark.py` runs: framecap's stages beside what people would use instead.

Imports torch, transformers, Pillow and numpy only; Ray, pyarrow and pydantic come in with the ``job`` stage.
"""
