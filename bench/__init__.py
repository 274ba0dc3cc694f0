"""Benchmarks of fastkd against other ways to compute the same. See README.md."""

import sys
from pathlib import Path

# `python -m bench.X` puts the repository's root first, whose fastkd/ is sources without a native module: the installed
# package comes before it. For pytest, pytest.ini says so.
_root = Path(__file__).resolve().parents[1]
sys.path.sort(key=lambda entry: Path(entry or ".").resolve() == _root)
