"""The processor of Qwen3-VL in vLLM's own class: as :mod:`.processor`, whose parts it shares, for that class's prompts.

A video comes frame by frame, each behind its time as text. Methods that look across frames may leave any number of
tokens in each, so the encoder brings the whole run, text and all, as in vLLM's own pruning of videos: the prompt has as
many tokens as are left, and all of them in the first frame.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails

from tokenreduce.integrations.vllm.counts import kept, method_of, shortened
from tokenreduce.integrations.vllm.names import FIELD, SETTING
from tokenreduce.integrations.vllm.positions import FARTHEST, extent
from tokenreduce.integrations.vllm.processor import Shortening

__all__ = ["NativeDummyInputs", "NativeInfo", "NativeProcessor", "merged"]

NativeInfo = Qwen3VLProcessingInfo
NativeDummyInputs = Qwen3VLDummyInputsBuilder


class NativeProcessor(Shortening, Qwen3VLMultiModalProcessor):
    """That of Qwen3-VL."""

    def _counts(self, modality: str, out: Any, keep: int | float | None) -> list[int]:
        config = self.info.get_hf_config()
        reducer = method_of(getattr(config, SETTING, None))
        counts = []
        for grid in () if (grids := out.get(f"{modality}_grid_thw")) is None else grids:
            frames, rows, columns = merged(grid, config)
            parts = 1 if reducer.temporal else frames
            counts.append(kept(reducer, frames * rows * columns, keep, modality=modality, frames=frames, tiles=parts))
        return counts

    def _shorter(self, update: Any, out_mm_kwargs: Any) -> Any:
        config, modality = self.info.get_hf_config(), update.modality
        token = getattr(config, f"{modality}_token_id")

        def replacement(item: int) -> Any:
            whole, given = update.replacement(item), out_mm_kwargs[modality][item]
            ids = list(getattr(whole, "full", whole))
            frames, rows, columns = merged(given[f"{modality}_grid_thw"].data, config)
            if (far := extent(len(ids) - ids.count(token), frames, rows, columns)) > FARTHEST:
                raise ValueError(f"a {modality} of {frames} frames takes {far} positions, of at most {FARTHEST}")
            short = shortened(ids, token, int(given[f"{modality}_{FIELD}"].data))
            if modality == "image":
                return PromptUpdateDetails.select_token_id(short, token)
            return PromptUpdateDetails.from_seq(short)

        return PromptReplacement(modality=modality, target=update.target, replacement=replacement)


def merged(grid: torch.Tensor, config: Any) -> tuple[int, int, int]:
    """Frames, rows and columns of the visual tokens of an image or video with ``grid`` (3,) patches."""
    frames, rows, columns = (int(n) for n in grid.flatten())
    side = int(config.vision_config.spatial_merge_size)
    return frames, rows // side, columns // side
