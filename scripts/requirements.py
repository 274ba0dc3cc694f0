"""Prints what pyproject.toml needs, for pip: python scripts/requirements.py build, to build the package; with names of
extras, to run it with them."""

import pathlib
import sys

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

content = tomllib.loads((pathlib.Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())
project, names = content["project"], sys.argv[1:]
if names == ["build"]:
    needed = content["build-system"]["requires"]
else:
    needed = [*project["dependencies"], *(r for name in names for r in project["optional-dependencies"][name])]
print(*needed, sep="\n")
