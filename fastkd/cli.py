"""The command line: ``fastkd info`` and ``fastkd demo``."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

from .config import show_config

app = typer.Typer(help="Fast, exact knowledge distillation for PyTorch.", no_args_is_help=False,
                  add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        info()


@app.command()
def info() -> None:
    """Print versions, CUDA support, instruction set and threads."""
    table = Table(title="fastkd", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for key, value in show_config().items():
        shown = " ".join(value) if isinstance(value, list) else {None: "-", True: "yes", False: "no"}.get(value, value)
        table.add_row(key, str(shown) or "-")
    Console().print(table)


@app.command()
def demo(
    epochs: int = typer.Option(200, min=1, help="Epochs of training for each network."),
    seeds: int = typer.Option(5, min=1, help="Students per row; the table shows mean and 95 % interval."),
) -> None:
    """Distil a graph network on scikit-learn's digits, with and without LSP."""
    from .demo import run

    run(epochs=epochs, seeds=seeds)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
