"""Which folders are installed: the two libraries always; in an editable install (`-e`) also the script packages of the
checkout, so that scripts and tests find each other from any folder without `sys.path` edits."""

import sys

from setuptools import find_packages, setup

LIBRARIES = {"ssm_ops": "kernels", "ssm_models": "classification"}
SCRIPTS = ("classification", "analyze")

packages = []
for library, where in LIBRARIES.items():
    packages += find_packages(where, include=[library, f"{library}.*"])
if "editable_wheel" in sys.argv:
    packages += [name for folder in SCRIPTS for name in find_packages(".", include=[folder, f"{folder}.*"])]
    packages = [name for name in packages if not name.startswith("classification.ssm_models")]

setup(packages=packages, package_dir={library: f"{where}/{library}" for library, where in LIBRARIES.items()})
