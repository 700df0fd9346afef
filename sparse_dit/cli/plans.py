"""`sparse-dit plans`: the plans that `patch(pipe, "auto")` has learned and kept on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..tables import out, show_kept, show_plan


def plans(
    shown: Annotated[str | None, typer.Option("--show", help="Name of one to show.")] = None,
    remove: Annotated[
        list[str] | None, typer.Option(help="Name of one to delete; repeatable.")
    ] = None,
    remove_all: Annotated[bool, typer.Option("--remove-all", help="Delete all of them.")] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Their folder; default the user's cache folder.")
    ] = None,
) -> int:
    """List, show or delete the plans that patch(pipe, "auto") has learned.

    A listed plan's file is a plan like any other: give it to patch, show or eval.
    """
    from ..auto import PlanStore

    store = PlanStore(cache)
    if shown is not None:
        if (plan := store.find(shown)) is None:
            raise ValueError(
                f"{store.folder} has no plan {shown!r} that can be read; `sparse-dit plans` lists them"
            )
        show_plan(plan)
        return 0
    for name in remove or ():
        store.remove(name)
        out.print(f"deleted {name}", markup=False, highlight=False)
    if remove_all:
        for name in store.names():
            store.remove(name)
            out.print(f"deleted {name}", markup=False, highlight=False)
    if not (remove or remove_all):
        show_kept(list(store), store.folder)
    return 0
