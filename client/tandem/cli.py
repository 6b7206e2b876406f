"""The `tandem` command: each group of subcommands lives in its own module."""

from __future__ import annotations

import typer

from tandem import demo, explain, rollout
from tandem.cluster import commands as cluster_commands
from tandem.plan import commands as plan_commands
from tandem.simulate import commands as simulate_commands

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
cluster_commands.register(app)
demo.register(app)
explain.register(app)
plan_commands.register(app)
simulate_commands.register(app)
app.add_typer(rollout.app, name="rollout")


def main() -> None:
    """Entry point of the `tandem` script."""
    app()


if __name__ == "__main__":
    main()
