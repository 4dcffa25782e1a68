"""Map the four rooms at the top level to ``chainwax.*``; all else stands in pyproject.toml."""

from setuptools import Extension, find_packages, setup

ROOMS = ("flows", "operators", "connectors", "router")

packages = [name for room in ROOMS for name in (room, *(f"{room}.{sub}" for sub in find_packages(room)))]
setup(
    packages=[f"chainwax.{name}" for name in packages],
    package_dir={f"chainwax.{name}": name.replace(".", "/") for name in packages},
    # Without a compiler numpy does the same (router/learning/kernel.py).
    ext_modules=[
        Extension(
            "chainwax.router.learning._kernel",
            ["router/learning/_kernel.c"],
            extra_compile_args=["-O2", "-ffp-contract=off"],
            optional=True,
        )
    ],
)
