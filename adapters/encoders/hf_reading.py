"""Layers of transformers vision encoders, read instead of listed.

What a layer does with its parts is found by running a copy of it once, on a few random tokens and with random weights:
which child is called on what, which parameter scales a branch, where residuals are added, what of the layer's arguments
its attention gets. The result is a :class:`~tokenreduce.adapters.encoders.hf_structure.Recipe`. It is kept only where
computing by it gives what the layer gave, bit for bit, and where the attention hands our
:class:`~tokenreduce.adapters.encoders.hf_attention.Call` on: a recipe that is not the layer's own is never used,
whatever the layer is called. So a family that is built as others are needs no line, and one that is not is refused,
with what was different.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.encoders.hf_layers import Context
from tokenreduce.adapters.encoders.hf_structure import (
    PLACES,
    QUERIES,
    RECIPE,
    ROTARY,
    SHARED,
    Recipe,
    StructuredLayer,
    core_of,
    hear,
    projects,
)
from tokenreduce.core.mixing import mixed, parts
from tokenreduce.core.undo import Undo

__all__ = ["TOKENS", "Reading", "UnlikeError", "read"]

TOKENS = 6


def read(layer: nn.Module, family: str, biased: bool = False, reading: type[Reading] | None = None) -> Recipe:
    """The recipe of a stock ``layer``; ``biased`` says that a bias by relative position reaches its attention,
    ``reading`` how its tokens come.

    Raises ``TypeError`` for a layer that computes in another way, with what was different.
    """
    kind = type(layer).__name__
    try:
        recipe = (reading or Reading)(trial_of(layer)).recipe()
        return replace(recipe, biased=biased)
    except UnlikeError as odd:
        raise TypeError(f"{family}: {kind} is not supported: {odd}") from None
    except Exception as error:
        raise TypeError(
            f"{family}: {kind} is not supported: it does not run by itself on tokens (B,N,C) "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error


class UnlikeError(Exception):
    """What of a layer is not as layers are."""


def trial_of(layer: nn.Module) -> nn.Module:
    """A copy of ``layer`` on the CPU in float32 with random weights, none of them zero or small."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    kept: dict[int, Any] = {}
    for p in (*layer.parameters(), *layer.buffers()):
        kept[id(p)] = torch.empty(p.shape, dtype=torch.float32 if p.is_floating_point() else p.dtype)
        if isinstance(p, nn.Parameter):
            kept[id(p)] = nn.Parameter(kept[id(p)], requires_grad=False)
    trial = copy.deepcopy(layer, kept).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trial.parameters():
            if p.is_floating_point():
                p.copy_(torch.rand(p.shape, generator=generator) + 0.5 if p.dim() == 1 else
                        torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)  # fmt: skip
        for b in trial.buffers():
            b.zero_()
    for module in trial.modules():
        module.__class__ = parts(type(module))[0]
        for name in hooks:
            getattr(module, name).clear()
        if getattr(module, SHARED, None) is not None:  # BiasedLayer knows what it does
            setattr(module, SHARED, None)
            module.__dict__.update(
                {"has_relative_position_bias": False} if hasattr(module, "has_relative_position_bias") else {}
            )
    return trial


class Reading:
    """One run of a layer: what each child was called on and gave."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer
        self.events: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []
        signature = inspect.signature(type(layer).forward)
        names = list(signature.parameters)[1:]
        if names[:1] != ["hidden_states"]:
            raise UnlikeError(f"its forward takes {', '.join(names)}")
        kinds = inspect.Parameter
        self.open = any(p.kind is kinds.VAR_KEYWORD for p in signature.parameters.values())
        self.arguments = tuple(
            n for n in names[1:] if signature.parameters[n].kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
        )
        attention = [(n, m) for n, m in layer.named_children() if _attends(m)]
        if len(attention) != 1:
            raise UnlikeError(f"it has {len(attention)} attention modules whose queries and keys can be seen")
        self.name, self.attn = attention[0]
        self.core: Any = core_of(self.attn)
        self.width = int(_norm_width(layer, self.core))
        generator = torch.Generator().manual_seed(1)
        self.x = self._tokens(generator)
        self.given = self._given(generator)
        needs = (n for n in self.arguments if signature.parameters[n].default is inspect.Parameter.empty)
        if missing := [n for n in needs if n not in self.given]:
            raise UnlikeError(f"it needs {', '.join(missing)}")

    def _tokens(self, generator: torch.Generator) -> Tensor:
        """Tokens to run the layer on."""
        # Laid out as convolutions leave it: a sum is laid out as its first term, and some kernels sum in that order.
        return torch.randn(2, self.width, TOKENS, generator=generator).transpose(1, 2)

    def _given(self, generator: torch.Generator) -> dict[str, Any]:
        """What the layer is given besides."""
        given: dict[str, Any] = {"attention_mask": None} if "attention_mask" in self.arguments else {}
        if ROTARY in self.arguments or ROTARY in self._asks():
            angle = torch.rand(TOKENS, _head_dim(self.core) // 2, generator=generator)
            angle = torch.cat([angle, angle], -1)
            given[ROTARY] = (angle.cos(), angle.sin())
        return given

    def _asks(self) -> Any:
        """What the attention takes, by name."""
        return inspect.signature(inspect.unwrap(type(self.attn).forward)).parameters

    @torch.no_grad()
    def recipe(self) -> Recipe:
        layer, marker = self.layer, object()
        extra = {"tokenreduce_probe": marker} if self.open else {}
        handles = [m.register_forward_hook(self._noter(n), with_kwargs=True) for n, m in layer.named_children()]
        try:
            try:
                out = layer(self.x, **self.given, **extra)
            except TypeError:  # the attention takes no other keywords
                self.events.clear()
                extra = {}
                out = layer(self.x, **self.given)
        finally:
            for handle in handles:
                handle.remove()
        several = len(out) - 1 if isinstance(out, tuple) else None
        want = out[0] if isinstance(out, tuple) else out
        middle, first, second = self._steps(want)
        at = next(i for i, (_, name) in enumerate(first) if name == self.name)
        _, args, kwargs, _ = next(e for e in self.events if e[0] == self.name)
        recipe = Recipe(
            tuple(first[:at]), self.name, tuple(first[at + 1 :]), tuple(second), self.arguments, several=several,
            rest=bool(extra) and kwargs.get("tokenreduce_probe") is marker, **self._asked(args, kwargs),
        )  # fmt: skip
        del middle
        return self._checked(recipe, want)

    def _noter(self, name: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.events.append((name, args, kwargs, output))

        return note

    def _asked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """How the attention is called."""
        keyword = next((k for k, v in kwargs.items() if isinstance(v, Tensor) and v.shape == self.x.shape), None)
        if (keyword is None) == (not args):
            raise UnlikeError("its attention is called without its tokens")
        mask = "keyword" if "attention_mask" in kwargs else "position" if len(args) > 1 and args[1] is None else None
        if mask == "position" and "attention_mask" not in self.arguments:
            mask = None
        passed = tuple(
            (old, new) for old, v in self.given.items() for new, w in kwargs.items()
            if v is not None and w is v
        )  # fmt: skip
        names = {n for n in self.arguments if n in kwargs and n not in self.given}
        return dict(keyword=keyword, mask=mask, passed=(*passed, *((n, n) for n in sorted(names))))

    def _steps(self, want: Tensor) -> tuple[Tensor, list[tuple[str, str]], list[tuple[str, str]]]:
        """The middle of the layer, and the steps of both branches, from what children were called on."""
        walk = _Walk(self.layer, self.x)
        for name, args, kwargs, output in self.events:
            tensors = [a for a in (*args, *kwargs.values()) if _are_tokens(a, self.x)]
            if not tensors:
                raise UnlikeError(f"its part {name} is called on something else than its tokens")
            walk.call(name, tensors, output, closes=name != self.name)
        found = walk.end(want)
        if len(found) != 2 or not any(n == self.name for _, n in found[0]):
            raise UnlikeError(f"it has {len(found)} residual branches, not one of attention and one behind it")
        return walk.start, found[0], found[1]

    # -- checking
    def _checked(self, recipe: Recipe, want: Tensor) -> Recipe:
        layer, undo = self.layer, Undo()
        hear(self.core, undo, {})
        layer.__dict__[RECIPE] = recipe
        layer.__class__ = mixed(type(layer), StructuredLayer)
        try:
            context = Context(None, {k: v for k, v in self.given.items() if k != "attention_mask"})
            if not torch.equal(self._both(context, self.x, None), want):
                raise UnlikeError("computing by its parts gives something else")
            for carries in ("mask", "keyword", "context"):
                if carries == "mask" and recipe.mask is None:
                    continue
                layer.__dict__[RECIPE] = made = replace(recipe, carries=carries)
                if (done := self._carried(made, context, want)) is not None:
                    return done
        finally:
            del layer.__dict__[RECIPE]
        raise UnlikeError(
            "its attention does not look its function up in transformers' registry, or takes no mask there"
        )

    def _both(self, context: Context, x: Tensor, bias: Tensor | None, needs: tuple[str, ...] = ()) -> Tensor:
        got = self.layer._attention(x, bias, needs, context)
        if needs and (got.keys is None or got.keys.dim() != 4 or got.keys.shape[2] != x.shape[1]):
            raise UnlikeError("its attention shows no keys of single tokens")
        return self.layer._feed_forward(self.layer._residual(x, got.out))

    def _carried(self, recipe: Recipe, context: Context, want: Tensor) -> Recipe | None:
        """``recipe`` with what is missing in it, None where calls do not reach the attention function by it."""
        try:
            seen = self._both(context, self.x, None, ("keys",))
        except (RuntimeError, TypeError, ValueError):
            return None
        if not torch.equal(seen, want):
            return None
        odd, left = 2, torch.tensor([0, 1, 3, 4, 5])
        hidden = torch.zeros(1, 1, 1, TOKENS)
        hidden[..., odd] = float("-inf")
        tables = context.kwargs.get(ROTARY)
        cut: dict[str, Any] = {} if tables is None else {ROTARY: tuple(t[left] for t in tables)}
        if PLACES in recipe.arguments:
            cut[PLACES] = left.expand(2, -1)
        fewer = self._both(context._replace(kwargs={**context.kwargs, **cut}), self.x[:, left], None)
        for turn in (None,) if tables is None else ("halves", "pairs"):
            self.layer.__dict__[RECIPE] = made = replace(recipe, turn=turn)
            more = {} if tables is None else {ROTARY: tuple(t.expand(2, 1, -1, -1) for t in tables)}
            masked = self._both(Context(None, {**context.kwargs, **more}, plain=False), self.x, hidden)[:, left]
            if torch.allclose(masked, fewer, rtol=1e-3, atol=1e-4 * float(fewer.abs().max())):
                return made
        raise UnlikeError(
            "hiding a token from its attention is something else than leaving it out (it counts places by itself)"
        )


class _Walk:
    """Follows the tokens of a layer through its parts: the ``start`` of a residual branch, what they are ``now``, the
    branch's ``steps`` so far, and the branches ``found``."""

    def __init__(self, layer: Any, x: Tensor) -> None:
        self.layer, self.x, self.start, self.now = layer, x, x, x
        self.scales = [n for n, p in layer.named_parameters(recurse=False) if p.shape[-1:] == x.shape[-1:]]
        self.steps: list[tuple[str, str]] = []
        self.found: list[list[tuple[str, str]]] = []

    def call(self, name: str, tensors: list[Tensor], output: Any, closes: bool) -> None:
        """The part ``name`` was called on ``tensors``; two of them close a branch, where it may do that."""
        self._settle(tensors[0])
        self.now = output[0] if isinstance(output, tuple) else output
        if not _are_tokens(self.now, self.x):
            raise UnlikeError(f"its part {name} returns something else than as many tokens")
        if len(tensors) == 1 or not closes:
            self.steps.append(("call", name))
            return
        if not torch.equal(tensors[1], self.start):
            raise UnlikeError(f"its part {name} is called on tokens of two kinds")
        self.found.append([*self.steps, ("close", name)])
        self.steps, self.start = [], self.now

    def end(self, want: Tensor) -> list[list[tuple[str, str]]]:
        """The branches of a layer that returns ``want``."""
        if self.steps:
            self._settle(want)
        elif not torch.equal(self.now, want):
            raise UnlikeError("it changes its tokens behind its MLP")
        return self.found

    def _settle(self, wanted: Tensor) -> None:
        """Steps between children that make ``wanted`` of what was last computed."""
        for chain in ((), *((n,) for n in self.scales)):
            y = self.now
            for n in chain:
                y = getattr(self.layer, n) * y
            scaled = [("times", n) for n in chain]
            if torch.equal(y, wanted):
                self.steps += scaled
                self.now = wanted
                return
            if self.steps and y.shape == self.start.shape and (kind := self._added(y, wanted)) is not None:
                self.found.append([*self.steps, *scaled, (kind, "")])
                self.steps, self.start, self.now = [], wanted, wanted
                return
        raise UnlikeError("something other than norms, scales, residuals, attention and MLP happens to its tokens")

    def _added(self, y: Tensor, wanted: Tensor) -> str | None:
        """How the branch ``y`` and its start make ``wanted``."""
        sums = (("add", y + self.start), ("onto", self.start + y))
        return next((kind for kind, made in sums if _alike(made, wanted)), None)


def _alike(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are equal and laid out alike."""
    return one.stride() == two.stride() and torch.equal(one, two)


def _are_tokens(value: Any, x: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() == x.dim() and value.shape[:-1] == x.shape[:-1]


def _attends(module: nn.Module) -> bool:
    return projects(core_of(module))


def _norm_width(layer: nn.Module, core: Any) -> int:
    first = next(getattr(core, n) for n in QUERIES if hasattr(core, n))
    return int(first.in_features)


def _head_dim(core: Any) -> int:
    return int(core.head_dim if hasattr(core, "head_dim") else core.attention_head_size)
