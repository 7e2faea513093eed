"""What is installed, and the build of the compiled operators.

The two libraries are installed always; in an editable install (`-e`) also the script packages of the checkout, so that
scripts and tests find each other from any folder.

SSM_OPS_BUILD=auto|none|cpu chooses what to compile. "auto" tries everything and installs without what fails to build;
a name makes its failure an error, which shows the reason. Building needs neither torch nor a GPU.
"""

import os
import sys

from setuptools import Extension, find_packages, setup

LIBRARIES = {"ssm_ops": "kernels", "ssm_models": "classification"}
SCRIPTS = ("classification", "analyze")
BUILDS = ("auto", "none", "cpu")

build = os.environ.get("SSM_OPS_BUILD", "auto")
if build not in BUILDS:
    sys.exit(f"SSM_OPS_BUILD={build!r} is not one of {', '.join(BUILDS)}")

packages = []
for library, where in LIBRARIES.items():
    packages += find_packages(where, include=[library, f"{library}.*"])
if "editable_wheel" in sys.argv:
    packages += [name for folder in SCRIPTS for name in find_packages(".", include=[folder, f"{folder}.*"])]
    packages = [name for name in packages if not name.startswith("classification.ssm_models")]


def cpu_extension() -> Extension:
    """A plain shared library (no Python or torch headers), loaded by ssm_ops/_native.py."""
    folder = "kernels/csrc/cpu"
    flags = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
    if sys.platform == "linux":
        flags += ["-fopenmp", "-fvisibility=hidden"]
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        flags += ["-mprefer-vector-width=512"]
    return Extension(
        "ssm_ops._cpu",
        sources=[f"{folder}/selective_scan.cpp", f"{folder}/ss2d_scan.cpp"],
        depends=[f"{folder}/lanes.h", f"{folder}/recurrence.h"],
        extra_compile_args=flags,
        extra_link_args=["-fopenmp"] if sys.platform == "linux" else [],
        optional=build == "auto",
    )


setup(
    packages=packages,
    package_dir={library: f"{where}/{library}" for library, where in LIBRARIES.items()},
    ext_modules=[cpu_extension()] if build in ("auto", "cpu") else [],
)
