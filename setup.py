"""Two folders, one package: `kernels/` at the top level installs as `titok_fast.kernels`."""

from setuptools import setup

setup(
    packages=[
        "titok_fast",
        "titok_fast.evaluation",
        "titok_fast.integrations",
        "titok_fast.kernels",
        "titok_fast.training",
    ],
    package_dir={"titok_fast": "titok_fast", "titok_fast.kernels": "kernels"},
    package_data={"titok_fast": ["py.typed", "*.cpp", "weights/*.md", "weights/*/*/*"]},
)
