"""Putting reducers into a model and taking them out again."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from tokenreduce.core.auto import auto_of, chosen_for, is_auto, tell
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.registry import list_methods, parse
from tokenreduce.core.tuned import is_tuned, read_tuned
from tokenreduce.core.undo import MARK, Undo, _patches, reducers_of

__all__ = [
    "F", "M", "describe", "family_of", "kept_columns", "patch", "patched", "reduce_tokens", "reducers_for", "twin",
    "unpatch",
]  # fmt: skip


class Pipeline(Protocol):
    """What a pipeline of diffusers looks like: parts by name, the denoiser ``unet`` among them."""

    @property
    def components(self) -> dict[str, Any]: ...


M = TypeVar("M", bound=nn.Module | Pipeline)
N = TypeVar("N", bound=nn.Module)


F = TypeVar("F", bound=Callable[..., Any])


_MISSING = object()


def patch(model: M, *reducers: Reducer | str, logits: str = "auto") -> M:
    """Put one or more reducers into ``model``, in place, and return it.

    ``reducers`` are instances or text (``"tome:r=8+visionzip:keep=64"``), or the name of the ``tuned.json`` that
    ``tokenreduce tune`` wrote for a model of this family. The model may be a timm, open_clip or
    transformers model or any module that contains one, or a UNet or ControlNet of diffusers. Of a pipeline of
    diffusers its UNet is patched (patch ``pipe.controlnet`` by itself, where it is to be patched, too).

    ``"auto:flops=0.5"`` leaves the choice to the library: the methods that are best known at the stages that the model
    has, at the budget that is estimated to reach the target on it. Targets are shares of the unreduced model:
    ``flops=`` and ``ttft=`` (up to the first token; ``on=l4`` names the device), ``kv=``, ``tokens=``;
    ``stages=[projector]`` narrows them. What it stands for and why is logged (logger ``tokenreduce``, standard error
    where nobody listens), and :func:`describe` says it of the patched model.

    Pooled features and logits count every token by its size. Token sequences of ``model`` itself (``forward_features``,
    ``last_hidden_state``) are the tokens that are left, and so are outputs of single blocks, as a hook on them sees
    them. Where ``model`` is a module of your own around a vision transformer, or a subclass with token reading code of
    its own, that code is given all tokens again: merged ones as copies in every place they stand for, places of dropped
    ones hold the mean of what is left. A mean over them is right, and so is any reading of merged tokens.

    ``logits`` says at which columns an image/video language model returns its logits when it gets a prompt of L
    columns, K of which are left:

    - ``"auto"``: at the caller's L columns when ``labels``, ``shift_labels`` or ``num_items_in_batch`` are given, in
      training mode, and when ``logits_to_keep`` names columns (the last n, or a tensor of columns of the caller's
      prompt); else at the K columns that are left, which :func:`kept_columns` names.
    - ``"caller"``: always at the caller's columns, for evaluation whose loss or metrics are computed outside of the
      model from a call without any of these.

    At the caller's columns, the row of a dropped token in front of a kept one is that of the last kept token before it,
    so that ``logits[:, :-1]`` against ``labels[:, 1:]`` is the loss that the model computes; other rows of dropped
    tokens are zeros, and labels of dropped tokens do not count. Methods that choose by the text see all of the prompt
    that the model is given, an answer to be learned included.

    ``transformers.Trainer`` works as it does without us: with ``label_smoothing_factor`` it shifts no labels for models
    that it does not count as causal language models (all families but Gemma 3; compute that loss in
    ``compute_loss_func``). Of TRL's SFT, DPO and GRPO trainers, which load a reference model from the checkpoint,
    patch that one, too (``ref_model=`` or ``trainer.ref_model``), and patch with ``logits="caller"`` for an
    ``SFTTrainer`` that evaluates with ``compute_metrics`` or ``label_smoothing_factor``.

    Raises ``TypeError`` for a model without adapter, for models of timm, open_clip and transformers around a vision
    transformer whose reading of its tokens is not known (image/video language models outside the supported families
    among them), and for code that reads tokens between blocks; ``ValueError`` for a patched model, no method,
    settings that the model cannot serve, and a target of ``auto:`` that nothing known reaches. The model is then
    unchanged.
    """
    from tokenreduce.adapters import attach, module_of
    from tokenreduce.adapters.encoders.site import ON_BLOCK
    from tokenreduce.core.compiled import fix, refuse_script

    target = module_of(model)
    if any(MARK in m.__dict__ or ON_BLOCK in m.__dict__ for m in target.modules()):
        raise ValueError(
            "the model is patched already; call tr.unpatch(model) first (several methods go into one patch)"
        )
    if logits not in ("auto", "caller"):
        raise ValueError(f"logits={logits!r}: choose 'auto' or 'caller'")
    chosen, note = reducers_for(target, *reducers)
    if not chosen:
        raise ValueError(f"no method given; choose from {', '.join(list_methods())}")
    for reducer in chosen:
        fix(reducer)
    undo = Undo(chosen, target, logits=logits, note=note)
    try:
        undo.set(target, "__prepare_scriptable__", refuse_script)
        attach(target, chosen, undo)
    except BaseException:
        undo.revert()
        raise
    target.__dict__[MARK] = undo
    return model


def reducers_for(model: nn.Module, *reducers: Reducer | str) -> tuple[tuple[Reducer, ...], str]:
    """What :func:`patch` would put into ``model``, and what ``auto:`` stood for, "" where there was none, which is also
    logged. Texts may name tuned files. Raises what reading and choosing them raises."""
    from tokenreduce.adapters import default_stage

    if any(map(is_auto, reducers)):
        found = chosen_for(model, reducers)
        tell(found)
        return found.reducers, str(found)
    read = [read_tuned(r, family_of(model)).reduce if is_tuned(r) else r for r in reducers]  # type: ignore[arg-type]
    return parse(*read, stage=default_stage(model)), ""


def family_of(model: nn.Module) -> str:
    """What a tuned file is bound to: the class of an image/video language model's inside, or the family of a tower.

    Raises ``TypeError`` for a model without adapter.
    """
    found = describe(model)
    if found.denoisers:
        return str(found.denoisers[0].family)
    return str(found.towers[0].family if found.language is None else found.language.family)


def unpatch(model: M) -> M:
    """Take every patch out of ``model``; its outputs are bit-identical to before. Returns the model.

    Raises ``ValueError`` when the model is not patched, was patched as part of a larger one, is a shallow copy of a
    patched one, or has modules whose class was changed since.
    """
    from tokenreduce.adapters import module_of
    from tokenreduce.adapters.encoders.site import ON_BLOCK

    target = module_of(model)
    found = list(_patches(target))
    if not found:
        if any(ON_BLOCK in m.__dict__ for m in target.modules()):
            raise ValueError("this module was patched through its parent; unpatch the model that you gave to tr.patch")
        raise ValueError("the model is not patched; there is nothing to undo (tr.patch(model, ...) patches it)")
    for _, module, undo in found:
        undo.check(module)
    for _, module, undo in found:
        undo.revert()
        del module.__dict__[MARK]
    return model


class patched(ContextDecorator):  # noqa: N801 - a verb, used like open()
    """``with tr.patched(model, tr.ToMe(r=8)) as m: ...`` or as a decorator; unpatches also after errors."""

    def __init__(self, model: nn.Module | Pipeline, *reducers: Reducer | str, logits: str = "auto") -> None:
        self.model, self.reducers, self.logits = model, reducers, logits

    def __enter__(self) -> Any:
        return patch(self.model, *self.reducers, logits=self.logits)

    def __exit__(self, *error: object) -> None:
        unpatch(self.model)


def twin(model: N) -> N:
    """A copy that can be patched, or kept unpatched, on its own; weights are shared, so that it costs no memory."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def reduce_tokens(*reducers: Reducer | str, logits: str = "auto") -> Callable[[F], F]:
    """Decorate a function that returns a model, or an ``nn.Module`` class: what it builds comes out patched.

    A factory may return the model (or a pipeline of diffusers) alone or a tuple with it in it
    (``open_clip.create_model_and_transforms``). ``logits`` is that of :func:`patch`.
    """
    for given in reducers:  # a mistake shows here, not at the first model
        if is_auto(given):
            auto_of(str(given))
        elif not is_tuned(given):
            parse(given)

    def decorate(target: F) -> F:
        if isinstance(target, type) and issubclass(target, nn.Module):
            original = target.__init__

            @functools.wraps(original)
            def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
                original(self, *args, **kwargs)
                if type(self) is target:  # a subclass is still being built at this point
                    patch(self, *reducers, logits=logits)

            target.__init__ = init  # type: ignore[misc, method-assign]
            return target

        @functools.wraps(target)
        def factory(*args: Any, **kwargs: Any) -> Any:
            made = target(*args, **kwargs)
            parts = made if isinstance(made, tuple) else (made,)
            model = next((p for p in parts if isinstance(p, nn.Module) or hasattr(p, "components")), None)
            if model is None:
                raise TypeError(f"{target.__name__} returned {type(made).__name__}, which holds no nn.Module to patch")
            patch(model, *reducers, logits=logits)
            return made

        return factory  # type: ignore[return-value]

    return decorate


def describe(model: nn.Module | Pipeline, *, detail: bool = False) -> Any:
    """What can act where in ``model``: its sites, tokens, evidence and the methods that fit; prints as a table.

    With ``detail``, also the steps that a patch put around each decoder layer of a language model, in their order.
    Raises ``TypeError`` for a model without adapter.
    """
    from tokenreduce.adapters import describe as by_adapter

    return by_adapter(model, detail=detail)


def kept_columns(source: Any) -> tuple[Tensor, Tensor]:
    """Which columns of the caller's prompt came out of a patched image/video language model.

    Args:
        source: the output object of a forward or of ``generate`` (with its cache), or the model: its last forward in
            this thread.

    Returns:
        ``(columns, valid)``, (B,K) long and bool, of the prompt of L columns: ``out.logits[b, i]`` stands for column
        ``columns[b, i]`` where ``valid[b, i]``, when logits come at the columns that are left (see :func:`patch`).
        Columns ascend, padding is among them, and slots that are not valid, where samples keep different numbers, come
        first. All L columns where nothing was dropped. In decode they are those of the prompt. ``hidden_states`` and
        ``attentions`` of layers before the last have the columns that were left there.

    Raises ``ValueError`` for a model that is not patched or has not run, and for an output that does not say.
    """
    from tokenreduce.adapters.language.labels import kept_of

    if isinstance(source, nn.Module) and not reducers_of(source):
        raise ValueError("the model is not patched, nothing is dropped; tr.patch(model, ...) patches it")
    return kept_of(source)
