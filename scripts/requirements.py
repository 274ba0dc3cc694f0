"""Prints what pyproject.toml's extras need, for pip: python scripts/requirements.py EXTRA ..."""

import pathlib
import sys

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

project = tomllib.loads((pathlib.Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
names = sys.argv[1:]
print(*project["dependencies"], *(r for name in names for r in project["optional-dependencies"][name]), sep="\n")
