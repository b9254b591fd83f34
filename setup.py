"""Package layout. Metadata lives in pyproject.toml.

The Triton sources live in `kernels/fused` and are installed as `fastdpo.kernels`. `kernels/` itself must not be
importable: a top-level package of that name would shadow Hugging Face's `kernels`, which transformers imports.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastdpo", "fastdpo.*"]), "fastdpo.kernels"],
    package_dir={"fastdpo.kernels": "kernels/fused"},
)
