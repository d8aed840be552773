"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path | None, typer.Option("-c", "--config", help="Config file.", show_default=False)]
Bare = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="The same as --set: a.b=c.", show_default=False),
]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override one key: a.b=c. Repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON on standard output.")]
