"""Two folders, one package: `kernels/` at the top level installs as `titok_fast.kernels`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["titok_fast", "titok_fast.*"]), "titok_fast.kernels"],
    package_dir={"titok_fast": "titok_fast", "titok_fast.kernels": "kernels"},
    package_data={
        "titok_fast": [
            "py.typed",
            "backends/*.cpp",
            "recipes/*.md",
            *(f"recipes/{'*/' * depth}*.yaml" for depth in (1, 2, 3)),
            "weights/*.md",
            "weights/*/*/*",
        ]
    },
)
