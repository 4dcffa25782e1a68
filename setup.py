"""Map the four rooms at the top level to ``chainwax.*``; all else stands in pyproject.toml."""

from setuptools import find_packages, setup

ROOMS = ("flows", "operators", "connectors", "router")

packages = [name for room in ROOMS for name in (room, *(f"{room}.{sub}" for sub in find_packages(room)))]
setup(
    packages=[f"chainwax.{name}" for name in packages],
    package_dir={f"chainwax.{name}": name.replace(".", "/") for name in packages},
)
