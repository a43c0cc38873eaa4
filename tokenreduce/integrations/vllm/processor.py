"""The processor of the plug-in: it says how many tokens of every image stay, before any is encoded.

It runs in the server's own process, where an error is the answer 400 to one request; in a worker it would end the
engine. So everything that a request can get wrong is looked at here. Parameters are named as in vLLM, which gives some
of them by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
    _get_embed_token_id,
)
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails

from tokenreduce.integrations.vllm.blanks import blanks
from tokenreduce.integrations.vllm.counts import check_runs, kept, method_of, requested, shortened
from tokenreduce.integrations.vllm.families import ROW_ENDS, family_of
from tokenreduce.integrations.vllm.names import FIELD, KEEP, MODALITIES, SETTING

__all__ = ["DummyInputs", "Info", "Processor", "Shortening"]

Info = MultiModalProcessingInfo
DummyInputs = MultiModalDummyInputsBuilder


class Shortening:
    """Mixin of vLLM's processors: shortens the placeholders of every image and video to the tokens that will stay.

    :meth:`_counts` and :meth:`_shorter` are those of the Transformers backend.
    """

    info: Any

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        keep = requested(hf_kwargs)
        _check_given(mm_items)
        kwargs = {k: v for k, v in hf_kwargs.items() if k != KEEP}
        out = super()._apply_hf_processor_main(mm_items, kwargs)  # type: ignore[misc]
        for modality in MODALITIES:
            if counts := self._counts(modality, out, keep):
                out[f"{modality}_{FIELD}"] = torch.tensor(counts)
        return out

    def _counts(self, modality: str, out: Any, keep: int | float | None) -> list[int]:
        """How many tokens of every item of ``out``, the library's outputs, stay."""
        if out.get(f"{modality}_replacement_ids") is None:
            return []
        config = self.info.get_hf_config()
        reducer, family = method_of(getattr(config, SETTING, None)), family_of(config)
        tiles, sizes = out.get("num_image_patches"), out.get("image_sizes")
        if family.name in ROW_ENDS:
            _check_side(out.get("pixel_values_videos" if modality == "video" else "pixel_values"), config)
        counts = []
        for i, ids in enumerate(
            out[f"{modality}_replacement_ids"].split(out[f"{modality}_replacement_sizes"].tolist())
        ):
            token = _get_embed_token_id(ids)
            whole = int((ids == token).sum())
            size = None if sizes is None or modality == "video" else torch.as_tensor(sizes[i]).tolist()
            parts = int(tiles[i]) if modality == "image" and family.tiled and tiles is not None else 1
            check_runs(ids.tolist(), token, parts)
            counts.append(kept(
                reducer, whole, keep, modality=modality, frames=_frames(modality, out, i), tiles=parts,
                blank=blanks(config, modality, whole, size),
            ))  # fmt: skip
        return counts

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        own = {name: hf_inputs.pop(name) for m in MODALITIES if (name := f"{m}_{FIELD}") in hf_inputs}
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))  # type: ignore[misc]
        for name, values in own.items():
            hf_inputs[name] = values
            fields[name] = MultiModalFieldConfig.batched(name.removesuffix(f"_{FIELD}"), keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        kwargs = {k: v for k, v in hf_processor_mm_kwargs.items() if k != KEEP}
        updates = super()._get_prompt_updates(mm_items, kwargs, out_mm_kwargs)  # type: ignore[misc]
        return [self._shorter(update, out_mm_kwargs) for update in updates]

    def _shorter(self, update: Any, out_mm_kwargs: Any) -> Any:
        """``update`` with the placeholders of what stays."""
        return _shorter(update, out_mm_kwargs[update.modality], family_of(self.info.get_hf_config()).tiled)


class Processor(Shortening, MultiModalProcessor):
    """That of the Transformers backend."""


def _check_side(pixels: Any, config: Any) -> None:
    """Raise ``ValueError`` for tiles or frames that are not of the tower's size: a request may tell the library's
    processor another one, and the tower would fail."""
    side = config.vision_config.image_size
    for one in () if pixels is None else pixels:
        if tuple(one.shape[-2:]) != (side, side):
            raise ValueError(f"tiles and frames of this model are {side} x {side} pixels, not {tuple(one.shape[-2:])}")


def _frames(modality: str, out: Any, i: int) -> int:
    """How many frames item ``i`` of ``out`` has, as the language model counts them; 1 for an image."""
    if modality != "video":
        return 1
    if (grids := out.get("video_grid_thw")) is not None:
        return int(grids[i][0])
    pixels = out.get("pixel_values_videos")
    return 1 if pixels is None else len(pixels[i])


def _shorter(update: Any, items: Any, tiled: bool) -> Any:
    """``update``, whose replacement of an item has the placeholders of what stays."""
    modality = update.modality

    def replacement(item: int) -> Any:
        whole = list(update.replacement(item).full)
        token = _get_embed_token_id(torch.tensor(whole))
        keep = int(items[item][f"{modality}_{FIELD}"].data)
        tiles = int(items[item]["num_image_patches"].data) if tiled and modality == "image" else 1
        return PromptUpdateDetails.select_token_id(shortened(whole, token, keep, tiles), token)

    return PromptReplacement(modality=modality, target=update.target, replacement=replacement)


def _check_given(mm_items: Any) -> None:
    """Raise ``ValueError`` for images that come as embeddings: their tower was not seen by us, and a request's numbers
    would be laid into the prompt as they are."""
    from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems

    for modality, items in mm_items.items():
        if isinstance(items, EmbeddingItems | DictEmbeddingItems):
            raise ValueError(
                f"this server takes {modality}s, not embeddings of them, since it chooses among their tokens"
            )
