"""``python -m fastkd`` is the command line."""

from .cli import main

main()
