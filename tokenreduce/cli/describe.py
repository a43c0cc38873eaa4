"""``tokenreduce describe``: what can act where in a model, and what given methods would do to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenreduce.cli.shared import print_json
from tokenreduce.common.screen import console

if TYPE_CHECKING:
    from tokenreduce.adapters import Description
    from tokenreduce.bench.models import Loaded
    from tokenreduce.core.reducer import Reducer

__all__ = ["command"]


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="digits-vit, world-vit, world-vit-2, world-clip-2, timm:NAME, open_clip:NAME/TAG, hf:ID_OR_FOLDER or "
            "a folder."
        ),
    ],
    reduce: Annotated[str | None, typer.Option(help="Methods to try, for example 'tome:r=13'.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show the sites, tokens and fitting methods of a model; with --reduce also tokens per layer and FLOPs."""
    import tokenreduce as tr
    from tokenreduce.bench.models import load_model
    from tokenreduce.bench.vlms import is_vlm, load_vlm
    from tokenreduce.patching import reducers_for

    if is_vlm(model):
        answering = load_vlm(model, "cpu").model
        if reduce:
            tr.patch(answering, reduce)
        found = tr.describe(answering)
        if as_json:
            print_json({"model": model, **facts(found)})
            return
        out = console()
        _tell(str(found))
        if reduce:
            out.say("  tokens   tokenreduce generate shows them for your image, with time and cache")
        return
    loaded = load_model(model)
    chosen, _ = reducers_for(loaded.model, reduce) if reduce else ((), "")
    found = tr.describe(loaded.model)
    tried = _tried(loaded, chosen) if chosen else None
    if as_json:
        print_json({"model": model, **facts(found), "notes": list(loaded.notes), "reduced": tried})
        return
    _tell(str(found))
    for note in loaded.notes:
        _tell(f"  note     {note}")
    if tried is not None:
        _show(tried)


def facts(found: Description) -> dict[str, Any]:
    """A description as JSON can carry it."""
    from tokenreduce.core.labels import label_of

    towers = [
        {
            "name": t.name, "family": t.family, "layers": len(t.blocks), "grid": t.grid, "prefix": t.prefix,
            "class_token": t.cls, "evidence": list(t.evidence),
        }
        for t in found.towers
    ]  # fmt: skip
    language = found.language and {
        "name": found.language.name, "family": found.language.family, "layers": len(found.language.layers),
        "evidence": list(found.language.evidence), "projector_evidence": list(found.language.projector),
    }  # fmt: skip
    return {
        "class": found.model, "encoders": towers, "language": language or None,
        "methods": {stage: found.methods(stage) for stage in found.stages},
        "active": [label_of(r) for r in found.active],
    }  # fmt: skip


def _tried(loaded: Loaded, chosen: tuple[Reducer, ...]) -> dict[str, Any]:
    """Tokens and FLOPs of one random image with ``chosen``."""
    import torch

    import tokenreduce as tr
    from tokenreduce.core.flops import count_flops

    x = torch.randn(1, *loaded.input_size, generator=torch.Generator().manual_seed(0))
    stock = count_flops(loaded.forward, loaded.model, x)
    with torch.no_grad(), tr.patched(loaded.model, *chosen):
        with tr.record(loaded.model) as trace:
            loaded.forward(loaded.model, x)
        active = str(tr.describe(loaded.model)).splitlines()[-1]
    return {
        "active": active.removeprefix("  active   "), "tokens": trace.tokens, "flops": trace.flops,
        "stock_flops": stock, "image": list(loaded.input_size), "notes": list(trace.notes),
    }  # fmt: skip


def _show(tried: dict[str, Any]) -> None:
    from tokenreduce.bench.columns import compact
    from tokenreduce.core.flops import gmacs

    flops, stock = tried["flops"], tried["stock_flops"]
    share = f"{100 * flops / stock:.1f} %" if stock else "-"
    size = "x".join(map(str, tried["image"]))
    _tell(f"  active   {tried['active']}")
    _tell(f"  tokens   after each layer: {compact(tried['tokens'], whole=True)}")
    _tell(
        f"  FLOPs    {flops / 1e9:.3f} G of {stock / 1e9:.3f} G ({share}); "
        f"{gmacs(flops):.3f} of {gmacs(stock):.3f} GMACs; one random image of {size}"
    )
    for note in tried["notes"]:
        _tell(f"  note     {note}")


def _tell(text: str) -> None:
    console().say(text)
