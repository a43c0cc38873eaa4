"""Tokens of an image or a video that stand for no patch, row ends and class tokens, counted before it is encoded.

No method looks at them, so that they stay beside ``keep``, or all go (``newlines``), as in a patched model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenreduce.adapters.language.alone import row_ends
from tokenreduce.integrations.vllm.families import ROW_ENDS

__all__ = ["blanks"]


def blanks(config: Any, modality: str, whole: int, image_size: Sequence[int] | None = None) -> int:
    """How many of the ``whole`` tokens of an item stand for no patch.

    Args:
        config: of the model.
        modality: "image" or "video".
        whole: placeholders that the library's processor writes for the item.
        image_size: (rows, columns) of an image in pixels, where the processor says it.

    Raises ``ValueError`` where the processor and the model disagree about an image: with other grids, for instance.
    """
    name = getattr(config, "model_type", None)
    if name in ROW_ENDS and modality == "video":
        return 1  # behind the last frame
    if name in ROW_ENDS:
        if image_size is None:
            raise ValueError(f"the processor of {name} does not say the size of an image, on which row ends depend")
        tokens, ends = row_ends(config, image_size)
        if tokens != whole:
            rows, columns = image_size
            raise ValueError(
                f"an image of {rows} x {columns} pixels has {tokens} tokens by the model's config and {whole} by its "
                f"processor; give both the same image_grid_pinpoints, patch size and vision_aspect_ratio"
            )
        return ends
    full = getattr(config, "vision_feature_select_strategy", None) == "full"
    if name == "video_llava" or (name == "llava" and full):
        # Images, or frames of a video, with the class token of the tower.
        patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        views, rest = divmod(whole, patches + 1)
        return 0 if rest or not whole % patches else views
    return 0
