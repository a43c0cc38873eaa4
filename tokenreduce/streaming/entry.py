"""How frames of a stream enter a language model: features block by block, at the positions of one long video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.find import find
from tokenreduce.measure.frames import frames_question

__all__ = ["Block", "Entry", "entry_of"]


@dataclass(frozen=True)
class Block:
    """Features (N,C) of a few frames, their positions (1,N) or (3,1,N) behind the first visual token's, and how many
    ``units`` of time (frames, or groups of frames that the tower joins) they are, of N / units tokens each."""

    x: Tensor
    positions: Tensor
    units: int


class Entry:
    """One-dimensional positions, frames one after the other, and ``newline`` behind the whole video."""

    #: Frames that the tower joins to one unit.
    joined = 1

    def __init__(self, loaded: Any, found: Any, fps: float) -> None:
        self.loaded, self.found, self.fps = loaded, found, fps
        #: Visual tokens and units of time so far.
        self.tokens = self.units = 0

    def question(self, frames: Any, prompt: str) -> Any:
        return frames_question(self.loaded, frames, prompt, times=[i / self.fps for i in range(len(frames))])

    def words(self, question: Any) -> tuple[Tensor, Tensor]:
        """Ids (1,P) in front of the video and (1,S) behind it."""
        ids = question.inputs["input_ids"].to(self.device)
        at = torch.isin(ids[0], torch.tensor(self.found.ids, device=ids.device)).nonzero().flatten()
        return ids[:, : int(at[0])], ids[:, int(at[-1]) + 1 :]

    @property
    def device(self) -> torch.device:
        return next(self.found.text.parameters()).device

    def features(self, inputs: dict[str, Any]) -> Tensor:
        """(N,C) of the video of ``inputs``, without what is put behind it."""
        like = next(self.found.inner.parameters())
        made = self.found.inner.get_video_features(
            inputs["pixel_values_videos"].to(like.device, like.dtype), **self.more(inputs), return_dict=True
        )
        rows = made.pooler_output
        flat = torch.cat(list(rows)) if isinstance(rows, list | tuple) else rows.flatten(0, -2)
        return flat[: len(flat) - len(self.behind())]

    def more(self, inputs: dict[str, Any]) -> dict[str, Any]:
        config = self.found.inner.config
        return {
            "vision_feature_layer": config.vision_feature_layer,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        }

    def behind(self) -> Tensor:
        """(R,C) embeddings that the model puts behind a video."""
        return self.found.inner.image_newline[None]

    def block(self, question: Any, frames: int) -> Block:
        x = self.features(question.inputs)
        made = Block(x, torch.arange(self.tokens, self.tokens + len(x), device=x.device)[None], frames)
        self._count(made)
        return made

    def _count(self, block: Block) -> None:
        self.tokens += len(block.x)
        self.units += block.units

    def words_at(self, start: int, count: int) -> Tensor:
        """Positions of ``count`` tokens behind the video, whose first visual token is at ``start``."""
        first = start + self.tokens
        return torch.arange(first, first + count, device=self.device)[None]

    def prompt_at(self, count: int) -> Tensor:
        """Positions of the tokens in front of the video."""
        return torch.arange(count, device=self.device)[None]


class PackedEntry(Entry):
    """Positions of Qwen2-VL and Qwen2.5-VL: time, height and width, two frames to a unit of time."""

    joined = 2

    def __init__(self, loaded: Any, found: Any, fps: float) -> None:
        super().__init__(loaded, found, fps)
        self.grid: tuple[int, int] | None = None
        self.seconds: Any = None
        self.shift = 0

    def more(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"video_grid_thw": inputs["video_grid_thw"].to(self.device)}

    def behind(self) -> Tensor:
        return torch.empty(0, device=self.device)

    def block(self, question: Any, frames: int) -> Block:
        x, inputs = self.features(question.inputs), question.inputs
        units, high, wide = (int(v) for v in inputs["video_grid_thw"][0])
        if self.grid is None:
            self.grid, self.seconds = (high, wide), inputs.get("second_per_grid_ts")
            two = self._index(2, 0)[0, 0]
            self.step = int(two[-1] - two[0])
        if self.grid != (high, wide):
            raise ValueError(
                f"frames of {high} x {wide} patches in a stream of {self.grid[0]} x {self.grid[1]}; every frame of a "
                f"stream has the same size"
            )
        positions = self._index(units, 0)
        positions[0] += self.step * self.units
        made = Block(x, positions, units)
        self._count(made)
        return made

    def _index(self, units: int, words: int) -> Tensor:
        """(3,1,N+W) positions of a video of so many units, at 0, and of ``words`` behind it."""
        assert self.grid is not None
        inner, device = self.found.inner, self.device
        each = self.grid[0] * self.grid[1] // inner.config.vision_config.spatial_merge_size**2
        kinds = torch.tensor([[2] * (each * units) + [0] * words], device=device)
        ids = torch.where(kinds == 2, self.found.ids[-1], 0)
        grid = torch.tensor([[units, *self.grid]], device=device)
        seconds = None if self.seconds is None else torch.as_tensor(self.seconds)[:1]
        more = {} if seconds is None else {"second_per_grid_ts": seconds}
        positions: Tensor = inner.get_rope_index(ids, mm_token_type_ids=kinds, video_grid_thw=grid, **more)[0]
        return positions

    def words_at(self, start: int, count: int) -> Tensor:
        return self._index(self.units, count)[..., -count:] + start

    def prompt_at(self, count: int) -> Tensor:
        return super().prompt_at(count).expand(3, 1, -1)


ENTRIES: dict[str, type[Entry]] = {
    "LlavaOnevisionModel": Entry, "Qwen2VLModel": PackedEntry, "Qwen2_5_VLModel": PackedEntry,
}  # fmt: skip


def entry_of(loaded: Any, fps: float) -> Entry:
    """Raises ``TypeError`` for a model that does not take a video as one run of frames, ``ValueError`` for one whose
    layers forget by themselves."""
    found = find(loaded.model)
    if found is None or found.family not in ENTRIES:
        raise TypeError(
            f"{type(loaded.model).__name__} cannot take a stream: frames must enter one after the other, with nothing "
            f"between them; models that do are LLaVA-OneVision, Qwen2-VL and Qwen2.5-VL"
        )
    config: Any = found.text.config
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    if kinds != {"full_attention"}:
        raise ValueError(
            f"layers of kind {', '.join(sorted(kinds - {'full_attention'}))} forget the beginning of a stream by "
            f"themselves; load the model with full attention in every layer"
        )
    return ENTRIES[found.family](loaded, found, fps)
