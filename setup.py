"""Packaging: the wheel ships the library alone; an editable install adds models and experiments."""

import pathlib

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "ecmh_jax" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
REQUIREMENTS = [
    line
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
# torch and transformers are the reference that the models are compared with; without them those
# tests skip. An unpinned torch may bring several GB of CUDA libraries.
PARITY = ["torch==2.13.0", "transformers>=5.0"]
QUANTISE = ["qwix>=0.1.8"]
ARVIZ = ["arviz-base[h5netcdf]>=0.8", "arviz-stats[xarray]>=0.8"]
# What the evaluation needs beyond sampling: figures, and comparing mathematical answers.
EVALUATE = ["math-verify>=0.9,<0.10", "matplotlib>=3.8"]
LM_EVAL = ["lm_eval>=0.4.13,<0.5"]
PAGE_TESTS = ["playwright>=1.50"]  # drives the browser that is installed; brings none

setup(
    name="ecmh_jax",
    version=VERSION,
    description="Entropy-Cut Metropolis-Hastings: exact power sampling of language models in JAX",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The explicit root makes an editable install put the whole checkout on the path.
    package_dir={"": "."},
    packages=find_packages(include=["ecmh_jax", "ecmh_jax.*"]),
    install_requires=REQUIREMENTS,
    extras_require={
        "parity": PARITY,
        "quantise": QUANTISE,
        "arviz": ARVIZ,
        "evaluate": EVALUATE,
        "lm_eval": LM_EVAL,
        "dev": [
            *("build", "pyright[nodejs]", "pytest>=8", "pytest-xdist", "ruff"),
            *PARITY,
            *QUANTISE,
            *ARVIZ,
            *EVALUATE,
            *LM_EVAL,
            *PAGE_TESTS,
        ],
    },
)
