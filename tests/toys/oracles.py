"""What a reduced model must equal: the stock model on a prompt that is as short, one row at a time and without padding.

Nothing here uses the adapters. Ids, positions and features of what was dropped are left out before the stock model sees
them; where tokens are dropped at a decoder layer, a hook on the stock layers takes columns out of one unpadded row.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from toys.build import IMAGE, inner_of
from toys.inputs import features

TYPES = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")


def mend_stock() -> None:
    """Llama 4 of 5.24 reads an attribute that its language model's output lacks."""
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
        MoeCausalLMOutputWithPast.image_outputs = None


def generate(model: Any, inputs: dict[str, Any], new: int = 3, **settings: Any) -> tuple[Any, Any]:
    """(sequences, logits (B,new,V)), greedy."""
    given = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **settings}
    with torch.no_grad():
        out = model.generate(**given, max_new_tokens=new, **settings)
    return out.sequences, torch.stack(out.logits, 1)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference over the largest number, of logits that are not masked."""
    there = (got.abs() < 1e30) & (want.abs() < 1e30)
    return float((got - want)[there].abs().max() / want[there].abs().max())


@dataclass(frozen=True)
class Stock:
    """A toy with its inputs, what it generates unpatched, the position ids that ``generate`` hands to its inner model
    (None where that counts itself), and its features."""

    model: Any
    inputs: dict[str, Any]
    sequences: torch.Tensor
    logits: torch.Tensor
    positions: torch.Tensor | None
    ready: Any


def stock(model: Any, inputs: dict[str, Any]) -> Stock:
    found: dict[str, Any] = {}

    def note(module: Any, args: Any, kwargs: Any) -> None:
        found.setdefault("ids", kwargs.get("position_ids"))

    hook = inner_of(model).register_forward_pre_hook(note, with_kwargs=True)
    sequences, logits = generate(model, inputs)
    hook.remove()
    return Stock(model, inputs, sequences, logits, found["ids"], features(model, inputs))


def short_prompts(
    toy: Stock, stay: torch.Tensor, sequences: torch.Tensor, *, layer: int = -1, compact: bool = False
) -> torch.Tensor:
    """Logits (B,T,V) of the stock model without the columns that do not ``stay`` (B,L), from ``layer`` on (-1: before
    the model), along the new tokens of ``sequences``."""
    model, inputs, made, ready = toy.model, toy.inputs, toy.positions, toy.ready
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    rows = []
    for b in range(len(ids)):
        columns = (stay[b] & real[b] if layer < 0 else real[b]).nonzero().flatten()
        given = {
            "input_ids": ids[b : b + 1, columns], "attention_mask": torch.ones(1, len(columns), dtype=torch.long),
            "mm_encoder_outputs": {"image": _of_row(ready, ids, b, columns)},
            **{k: inputs[k][b : b + 1, columns] for k in TYPES if k in inputs},
        }  # fmt: skip
        at, last = _places(made, b, columns, ids.shape[1], compact)
        hooks = [] if layer < 0 else _take_columns(model, layer, stay[b, columns].nonzero().flatten())
        with torch.no_grad():
            rows.append(_steps(model, given, at, last, sequences[b : b + 1, ids.shape[1] :]))
        for hook in hooks:
            hook.remove()
    return torch.cat(rows)


def _places(made: Any, b: int, columns: torch.Tensor, length: int, compact: bool) -> tuple[Any, Any]:
    """Position ids of a row's prompt, and of its last token in the caller's count."""
    if made is None:
        at = torch.arange(len(columns))[None] if compact else columns[None]
        return at, at[..., -1:] if compact else torch.tensor([[length - 1]])
    row = made if made.shape[-2] == 1 else made[..., b : b + 1, :]
    if compact:
        at = torch.arange(len(columns))[None] + row[..., columns[:1]]
        return at, at[..., -1:]
    return row[..., columns], row[..., -1:]


def _steps(model: Any, given: dict[str, Any], at: Any, last: Any, tokens: torch.Tensor) -> torch.Tensor:
    out = model(**given, position_ids=at, use_cache=True)
    logits, cache = [out.logits[:, -1]], out.cache
    # What generate leaves out behind the prompt, it leaves out by the model's own preparation.
    later = [k for k in TYPES if k in given and k != "token_type_ids"]
    prepared = model.prepare_inputs_for_generation(
        tokens[:, :1], cache=cache, attention_mask=None, use_cache=True,
        **{k: torch.zeros(1, 1, dtype=torch.long) for k in later},
    )  # fmt: skip
    later = [k for k in later if prepared.get(k) is not None]
    for t in range(tokens.shape[1] - 1):
        more = {k: torch.zeros(1, 1, dtype=torch.long) for k in later}
        out = model(input_ids=tokens[:, t : t + 1], position_ids=last + t + 1, cache=cache, use_cache=True, **more)
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


def _rows(value: Any) -> Any:
    parts = [value] if isinstance(value, torch.Tensor) else value
    return torch.cat([p.reshape(-1, p.shape[-1]) for p in parts])


def _count(value: Any) -> int:
    """Rows of a tensor or of a list of them, -1 for what has none."""
    parts = [value] if isinstance(value, torch.Tensor) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(p, torch.Tensor) and p.dim() > 1 for p in parts):
        return -1
    return sum(p.numel() // p.shape[-1] for p in parts)


def _of_row(ready: Any, ids: torch.Tensor, b: int, columns: torch.Tensor) -> Any:
    """The features ``ready`` of a batch, of the ``columns`` of one row."""
    visual = ids == IMAGE
    number = torch.full_like(ids, -1)
    number[visual] = torch.arange(int(visual.sum()))
    mine = number[b, columns]
    mine, out = mine[mine >= 0], copy.copy(ready)

    def form(value: Any) -> Any:
        taken = _rows(value)[mine]
        if isinstance(value, torch.Tensor):
            return taken if value.dim() == 2 else taken.view(*[1] * (value.dim() - 2), *taken.shape)
        return [taken]

    for name, value in list(ready.items()):
        if name in ("hidden_states", "attentions") or value is None:
            continue
        total = int(visual.sum())
        if _count(value) == total:
            out[name] = form(value)
        elif isinstance(value, list | tuple) and value and all(_count(v) == total for v in value):
            out[name] = [form(v) for v in value]  # features of later layers
    return out


def _take_columns(model: Any, layer: int, keep: torch.Tensor) -> list[Any]:
    """Hooks on the stock decoder layers: one unpadded row without its columns from ``layer`` on."""
    layers = inner_of(model).get_decoder().layers

    def take(module: Any, args: Any, kwargs: Any) -> Any:
        if args[0].shape[1] == 1:
            return None
        x = args[0][:, keep] if module is layers[layer] else args[0]
        tables, mask = kwargs.get("position_embeddings"), kwargs.get("attention_mask")
        if tables is not None:
            kwargs["position_embeddings"] = tuple(t[..., keep, :] for t in tables)
        if mask is not None:
            kwargs["attention_mask"] = mask[..., keep, :][..., keep] if mask.dim() == 4 else mask[:, keep]
        for name in ("position_ids", *TYPES):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][..., keep]
        more = (a[:, keep] if isinstance(a, torch.Tensor) and a.dim() == 3 else a for a in args[1:])
        return (x, *more), kwargs

    return [one.register_forward_pre_hook(take, with_kwargs=True) for one in layers[layer:]]
