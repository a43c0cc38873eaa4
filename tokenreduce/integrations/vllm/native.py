"""Qwen3-VL with fewer visual tokens: a subclass of vLLM's own class, whose Transformers backend leaves DeepStack out.

In that class a visual token's row is its embedding and, in further columns, what DeepStack adds to it in the first
layers, so one index cuts both. Where a method mixes tokens, their embeddings are mixed and what DeepStack adds is that
of the token whose place the result takes, as in a patched model. Which ones stay is decided as in :mod:`.model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenreduce.adapters.language.alone import Item, reduce_features
from tokenreduce.adapters.language.projector.entries import entries
from tokenreduce.core.undo import Undo
from tokenreduce.integrations.vllm.counts import method_of
from tokenreduce.integrations.vllm.families import family_of
from tokenreduce.integrations.vllm.model import check_engine
from tokenreduce.integrations.vllm.names import FIELD, MODALITIES, SETTING
from tokenreduce.integrations.vllm.native_processor import NativeDummyInputs, NativeInfo, NativeProcessor, merged
from tokenreduce.integrations.vllm.native_tower import watch_tower
from tokenreduce.integrations.vllm.parallel import whole_heads
from tokenreduce.integrations.vllm.positions import ahead, arrived, extent, packed, places_in, waiting

__all__ = ["TokenReduceQwen3VLForConditionalGeneration"]


@MULTIMODAL_REGISTRY.register_processor(NativeProcessor, info=NativeInfo, dummy_inputs=NativeDummyInputs)
class TokenReduceQwen3VLForConditionalGeneration(Qwen3VLForConditionalGeneration):
    """Qwen3-VL with fewer visual tokens, by ``hf_overrides={"architectures":
    ["TokenReduceQwen3VLForConditionalGeneration"], "tokenreduce": "divprune:keep=64"}``.

    Raises ``ValueError`` at the start for what cannot be right, see :mod:`.families` and :mod:`.counts`.
    """

    # A tower's adapters are given rows by the number of embeddings, which are fewer.
    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: Any, prefix: str = "model") -> None:
        config = vllm_config.model_config.hf_config
        family, reducer = family_of(config), method_of(getattr(config, SETTING, None))
        family.check_class(type(self).__name__)
        family.check(reducer)
        check_engine(vllm_config, family.axes)
        _check_encoder(vllm_config.compilation_config, bool(reducer.tower_blocks()))
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._reducer, self._undo = reducer, Undo((reducer,))
        self._tower = watch_tower(self.visual, reducer, self._undo)

    # -- images and videos ---------------------------------------------------------------------------------------------
    def embed_multimodal(self, **kwargs: Any) -> tuple[Tensor, ...] | None:
        """Rows of every image, and of every video with the text between its frames, each of as many tokens as the
        processor said: embedding, what DeepStack adds, and place."""
        counts = {m: kwargs.pop(f"{m}_{FIELD}", None) for m in MODALITIES}
        given = self._parse_and_validate_multimodal_inputs(**kwargs)
        made = [rows for m, media in given.items() for rows in self._fewer(m, media, counts[m].flatten().tolist())]
        return tuple(made) if made else None

    def _fewer(self, modality: str, media: Any, counts: list[int]) -> list[Tensor]:
        """The rows of the images of a step, of which ``counts`` visual tokens stay."""
        grids = media[f"{modality}_grid_thw"]
        stock = self._process_image_input if modality == "image" else self._process_video_input
        with self._tower.watched(grids) as seen:
            features = stock(media)
        seen.entries = entries(self, modality, seen, features, {})
        whole_heads(seen, self.config.vision_config)
        parts = [1 if self._reducer.temporal else int(grid[0]) for grid in grids]
        items, first = [], 0
        for x, n, count in zip(features, parts, counts, strict=True):
            for part in x[:, : self.visual_dim].chunk(n):
                items.append(Item(part, count // n, seen, first))
                first += len(part)
        left = iter(reduce_features(items, modality, self._reducer, compact=False))
        made = []
        for i, (x, n) in enumerate(zip(features, parts, strict=True)):
            some = [next(left) for _ in range(n)]
            places = torch.cat([kept.places + part * (len(x) // n) for part, kept in enumerate(some)])
            rows = torch.cat([torch.cat([kept.rows for kept in some]), x[places, self.visual_dim :]], 1)
            times = media["timestamps"][i] if modality == "video" else None
            made.append(self._laid(modality, rows, places.cpu(), grids[i], times))
        return made

    def _laid(self, modality: str, rows: Tensor, places: Tensor, grid: Tensor, times: Any) -> Tensor:
        """``rows`` (K,D) of the visual tokens ``places`` (K,) of an image or video with those of the text between, all
        with their places."""
        frames, height, width = merged(grid, self.config)
        token = getattr(self.config, f"{modality}_token_id")
        ids = torch.full((frames * height * width,), token)
        if times is not None:
            ids = torch.tensor(NativeProcessor.get_video_repl(
                tokens_per_frame=[height * width] * frames, timestamps=times, tokenizer=self._tokenizer,
                vision_start_token_id=self.config.vision_start_token_id,
                vision_end_token_id=self.config.vision_end_token_id, video_token_id=token,
            ).full)  # fmt: skip
        visual = ids == token
        stay = ~visual
        stay[visual.nonzero().flatten()[places]] = True
        here = visual[stay].to(rows.device)
        out = rows.new_zeros(len(here), rows.shape[1])
        out[here] = rows
        if not bool(visual.all()):
            words = self.get_language_model().embed_input_ids(ids[~visual].to(rows.device))
            out[~here, : self.visual_dim] = words.to(rows)
        return packed(out, places_in(visual, height, width)[stay])

    # -- M-RoPE --------------------------------------------------------------------------------------------------------
    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions (3,L) of the prompt, right for all text outside of images and videos, and what decode adds to a
        column."""
        runs = []
        for feature in mm_features:
            at, token = feature.mm_position, getattr(self.config, f"{feature.modality}_token_id")
            frames, rows, columns = merged(feature.data[f"{feature.modality}_grid_thw"].data, self.config)
            text = sum(one != token for one in input_tokens[at.offset : at.offset + at.length])
            runs.append((at.offset, at.length, extent(text, frames, rows, columns)))
        positions = waiting(len(input_tokens), runs)
        return positions, ahead(positions)

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[Tensor], mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[list[Tensor], Tensor, int]:
        """The embeddings of a chunk, and positions with those of its visual tokens."""
        clean, positions = arrived(multimodal_embeddings, mrope_positions, num_computed_tokens)
        return clean, positions, ahead(positions)


def _check_encoder(compilation: Any, looks: bool) -> None:
    """Raise ``ValueError`` for graphs of the tower that would go round the reduction, or round what a method sees."""
    if getattr(compilation, "cudagraph_mm_encoder", False):
        raise ValueError("cudagraph_mm_encoder replays the tower alone, and no token would be dropped; leave it out")
    if looks and getattr(compilation, "compile_mm_encoder", False):
        raise ValueError("compile_mm_encoder hides the tower's attention, at which the method looks; leave it out")
