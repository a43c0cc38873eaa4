"""``tokenreduce describe``: what can act where in a model, and what given methods would do to it."""

from __future__ import annotations

from typing import Annotated

import typer

from tokenreduce.cli.shared import console

__all__ = ["command"]


def command(
    model: Annotated[
        str, typer.Argument(help="digits-vit, world-vit, timm:NAME, open_clip:NAME/TAG, hf:ID_OR_FOLDER or a folder.")
    ],
    reduce: Annotated[str | None, typer.Option(help="Methods to try, for example 'tome:r=13'.")] = None,
) -> None:
    """Show the sites, tokens and fitting methods of a model; with --reduce also tokens per layer and FLOPs."""
    import torch

    import tokenreduce as tr
    from tokenreduce.bench.columns import compact
    from tokenreduce.bench.models import load_model
    from tokenreduce.bench.vlms import is_vlm, load_vlm
    from tokenreduce.measure.flops import count_flops, gmacs

    if is_vlm(model):
        answering = load_vlm(model, "cpu").model
        if reduce:
            tr.patch(answering, reduce)
        console().print(str(tr.describe(answering)), markup=False, soft_wrap=True)
        if reduce:
            console().print(
                "  tokens   tokenreduce generate shows them for your image, with time and cache", markup=False
            )
        return
    chosen = tr.parse(reduce) if reduce else ()
    loaded = load_model(model)
    out = console()
    out.print(str(tr.describe(loaded.model)), markup=False, soft_wrap=True)
    for note in loaded.notes:
        out.print(f"  note     {note}", markup=False)
    if not chosen:
        return
    x = torch.randn(1, *loaded.input_size, generator=torch.Generator().manual_seed(0))
    stock = count_flops(loaded.forward, loaded.model, x)
    with torch.no_grad(), tr.patched(loaded.model, *chosen):
        with tr.record(loaded.model) as trace:
            loaded.forward(loaded.model, x)
        active = str(tr.describe(loaded.model)).splitlines()[-1]
    out.print(active, markup=False, soft_wrap=True)
    out.print(f"  tokens   after each layer: {compact(trace.tokens, whole=True)}", markup=False, soft_wrap=True)
    share = f"{100 * trace.flops / stock:.1f} %" if stock else "-"
    size = "x".join(map(str, loaded.input_size))
    out.print(
        f"  FLOPs    {trace.flops / 1e9:.3f} G of {stock / 1e9:.3f} G ({share}); "
        f"{gmacs(trace.flops):.3f} of {gmacs(stock):.3f} GMACs; one random image of {size}",
        markup=False,
        soft_wrap=True,
    )
    for note in trace.notes:
        out.print(f"  note     {note}", markup=False, soft_wrap=True)
