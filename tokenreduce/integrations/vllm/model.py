"""The model class of the plug-in: vLLM's Transformers backend, whose images and videos come out with fewer tokens.

The number of tokens that stay comes with every image from the processor (:mod:`.processor`), so that placeholders and
embeddings agree by construction. Which ones stay is decided by the code that decides in a patched model
(:mod:`tokenreduce.adapters.language.alone`), of what the library's own vision tower saw. Nothing is decided
by a request's text: vLLM keeps what it made of an image for other requests.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenreduce.adapters.language.alone import Item, reduce_features, watch_features, watched
from tokenreduce.adapters.language.projector.seen import Encoded
from tokenreduce.core.undo import Undo
from tokenreduce.integrations.vllm.counts import method_of
from tokenreduce.integrations.vllm.families import ROW_ENDS, family_of
from tokenreduce.integrations.vllm.names import FIELD, MODALITIES, SETTING
from tokenreduce.integrations.vllm.parallel import whole_heads
from tokenreduce.integrations.vllm.positions import Run, ahead, packed, placed, whole_prompt
from tokenreduce.integrations.vllm.processor import DummyInputs, Info, Processor

__all__ = ["TokenReduceForConditionalGeneration", "check_engine"]


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=DummyInputs)
class TokenReduceForConditionalGeneration(TransformersMultiModalForCausalLM):
    """An image/video language model of transformers with fewer visual tokens, by ``hf_overrides={"architectures":
    ["TokenReduceForConditionalGeneration"], "tokenreduce": "divprune:keep=64"}``.

    Raises ``ValueError`` at the start for what cannot be right, see :mod:`.families` and :mod:`.counts`.
    """

    # vLLM asks models that prune for positions once more when their images are encoded.
    supports_multimodal_pruning = True
    supported_video_pruning_methods = ("evs",)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config
        self._spec = getattr(config.hf_config, SETTING, None)
        family = family_of(config.hf_config)
        reducer = method_of(self._spec)
        family.check_class(type(self).__name__)
        family.check(reducer)
        check_engine(vllm_config, family.axes)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._reducer, self._axes = reducer, family.axes
        self._undo = Undo((reducer,))
        found = watch_features(self.model, reducer, self._undo)
        if family.name not in ROW_ENDS and getattr(found.inner, "image_newline", None) is not None:
            raise ValueError(f"{family.name} has row ends whose number is not known; use tr.patch with transformers")
        self._projector = [None if found.vision is None else found.vision.projector]  # no second name for the module
        named = (getattr(self.config, f"{m}_token_{n}", None) for m in MODALITIES for n in ("id", "index"))
        self._media = frozenset(t for t in named if isinstance(t, int))

    # -- images and videos ---------------------------------------------------------------------------------------------
    def _process_image_input(self, **kwargs: Any) -> Any:
        return self._fewer("image", super()._process_image_input, kwargs)

    def _process_video_input(self, **kwargs: Any) -> Any:
        return self._fewer("video", super()._process_video_input, kwargs)

    def _fewer(self, modality: str, stock: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """What ``stock`` makes of the images of a step, each with as many tokens as the processor said."""
        counts = [kwargs.pop(f"{m}_{FIELD}", None) for m in MODALITIES][MODALITIES.index(modality)]
        given = dict(kwargs)
        with watched() as calls:
            features = stock(**kwargs)
        if features is None or counts is None:
            return features
        items = [Item(x, k, seen, at) for (x, seen, at), k in zip(
            _with_calls(features, calls), counts.flatten().tolist(), strict=True
        )]  # fmt: skip
        for seen in calls:
            whole_heads(seen, self.config.vision_config)
        left = reduce_features(
            items, modality, self._reducer, compact=not self._axes, projector=self._projector[0]
        )  # fmt: skip
        if not self._axes:
            return [kept.rows for kept in left]
        return [packed(kept.rows, self._places(modality, i, given)[kept.places.cpu()])
                for i, kept in enumerate(left)]  # fmt: skip

    # -- M-RoPE --------------------------------------------------------------------------------------------------------
    def _places(self, modality: str, i: int, given: dict[str, Any]) -> Tensor:
        """(n,3) time, row and column of the tokens of item ``i``, counted from its first: the model's own rule, asked
        about a prompt that is nothing but this item behind one token of text."""
        grid = given[f"{modality}_grid_thw"][i : i + 1].cpu()
        token = getattr(self.config, f"{modality}_token_id")
        ids = torch.tensor([[0] + [token] * self._whole(grid[0])])
        seconds = given.get("second_per_grid_ts")
        ask = {
            "input_ids": ids, "mm_token_type_ids": (ids == token).int() * (1 + MODALITIES.index(modality)),
            f"{modality}_grid_thw": grid, "second_per_grid_ts": None if seconds is None else seconds[i : i + 1].cpu(),
        }  # fmt: skip
        named = inspect.signature(self.model.get_rope_index).parameters
        positions, _ = self.model.get_rope_index(**{k: v for k, v in ask.items() if k in named})
        out: Tensor = (positions[:, 0, 1:] - 1).T
        return out

    def _whole(self, grid: Tensor) -> int:
        """Visual tokens of an image with ``grid`` (3,) patches in time, rows and columns."""
        return int(grid.prod()) // int(self.config.vision_config.spatial_merge_size) ** 2

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions (3,L) of the prompt, right for all text, and what decode adds to a column."""
        features = sorted(mm_features, key=lambda f: f.mm_position.offset)
        runs = [
            Run(f.mm_position.offset, f.mm_position.length, self._whole(f.data[f"{f.modality}_grid_thw"].data.view(-1)))
            for f in features
        ]
        whole = whole_prompt(input_tokens, runs, self._media)
        media = torch.tensor(sorted(self._media))
        longer = []
        for feature, run in zip(features, whole.runs, strict=True):
            embed = torch.isin(torch.tensor(whole.tokens[run.offset : run.offset + run.length]), media)
            place = replace(feature.mm_position, offset=run.offset, length=run.length, is_embed=embed)
            longer.append(replace(feature, mm_position=place))
        positions = super().get_mrope_input_positions(whole.tokens, longer)[0][:, whole.columns]
        return positions, ahead(positions)

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[Tensor], mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[list[Tensor], Tensor, int]:
        """The embeddings of a chunk, and positions with those of its visual tokens; runner V1 gives a list of ids."""
        ids = torch.as_tensor(input_ids, device=mrope_positions.device)
        media = torch.tensor(sorted(self._media), device=ids.device)
        clean, positions = placed(ids, multimodal_embeddings, mrope_positions, num_computed_tokens, media)
        return clean, positions, ahead(positions)


def _with_calls(features: Sequence[Tensor], calls: Sequence[Encoded]) -> list[tuple[Tensor, Encoded | None, int]]:
    """Each item's features with the call of the tower that made them, and its first token there."""
    ends: list[tuple[int, int, Encoded]] = []
    start = 0
    for seen in calls:
        ends.append((start, start + seen.tokens, seen))
        start += seen.tokens
    out: list[tuple[Tensor, Encoded | None, int]] = []
    at = 0
    for x in features:
        call = next(((first, seen) for first, end, seen in ends if first <= at and at + len(x) <= end), None)
        out.append((x, None, 0) if call is None else (x, call[1], at - call[0]))
        at += len(x)
    return out


def check_engine(vllm_config: Any, axes: bool) -> None:
    """Raise ``ValueError`` for engine arguments that do not go with the model, whose positions are ``axes`` or not."""
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError("tokenreduce serves one pipeline stage; use tensor_parallel_size for several devices")
    settings = vllm_config.model_config.multimodal_config
    pruning = settings is not None and settings.is_multimodal_pruning_enabled()
    if axes and not pruning:
        raise ValueError(
            "a model with M-RoPE needs the engine argument video_pruning_rate=1e-17 (--video-pruning-rate 1e-17) "
            "beside tokenreduce: without it vLLM never asks for the positions of the tokens that are left"
        )
    if pruning and float(settings.video_pruning_rate or 0) > 1e-9:
        raise ValueError(
            f"video_pruning_rate={settings.video_pruning_rate} is vLLM's own pruning of videos; leave it out, or leave "
            f"tokenreduce out"
        )
    told = [k for k in getattr(settings, "mm_processor_kwargs", None) or {} if k.startswith("tokenreduce")]
    if told:
        raise ValueError(f"{told[0]} is for single requests; for all of them, set keep in the method: divprune:keep=64")
    if settings is not None and getattr(settings, "mm_encoder_tp_mode", "weights") == "data":
        raise ValueError("mm_encoder_tp_mode='data' gives every rank other images, and methods compare heads of one")
