"""The packages of a build, and where they are; all else is in ``pyproject.toml``.

A build takes ``dora_cache.backends`` from ``backends/``, not through the link to it in
``dora_cache/``: git makes none where symbolic links are switched off, as on Windows.
"""

from setuptools import find_packages, setup

LINKED = "dora_cache.backends"

setup(
    packages=[*find_packages(include=["dora_cache*"], exclude=[LINKED]), LINKED],
    package_dir={LINKED: "backends"},
)
