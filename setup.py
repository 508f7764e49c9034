"""What pip installs: the library as `wan_core`, everything else inside of the package `wancore`.

Metadata is in pyproject.toml, which cannot say that a folder goes into a package of another name with all below it.
"""

from setuptools import find_packages, setup

INSIDE = ("nodes", "headless", "trainer")

setup(
    packages=[
        *find_packages(include=["wan_core", "wan_core.*"]),
        *(f"wancore.{name}" for name in find_packages(include=[part for top in INSIDE for part in (top, f"{top}.*")])),
        "wancore.workflows",
    ],
    # By name and not as all files of the root, among which quickstart.py is.
    py_modules=["wancore.pack"],
    package_dir={
        "wan_core": "wan_core",
        "wancore": ".",
        **{f"wancore.{name}": name for name in (*INSIDE, "workflows")},
    },
    package_data={
        "wan_core": ["trained/*"],
        "wancore.trainer": ["accelerate/*.yaml"],
        "wancore.workflows": ["api/*.json", "assets/**"],
    },
)
