"""The one thing pyproject.toml cannot say: a C file that may fail to build (Pillow does its work then)."""

import sys

from setuptools import Extension, setup

FLAGS = [] if sys.platform == "win32" else ["-O3"]

setup(
    ext_modules=[
        Extension("framecap.model._resample", ["framecap/model/_resample.c"], extra_compile_args=FLAGS, optional=True)
    ]
)
