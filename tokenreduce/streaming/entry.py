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


#: Units of the short videos that show how a model places time.
_SHOWN = 16


class PackedEntry(Entry):
    """Positions of Qwen2-VL and Qwen2.5-VL: time, height and width, two frames to a unit of time.

    How the model counts is asked for short videos and then known for every later unit: the positions of the whole video
    so far, which grow with it, are never made.
    """

    joined = 2

    def __init__(self, loaded: Any, found: Any, fps: float) -> None:
        super().__init__(loaded, found, fps)
        self.grid: tuple[int, int] | None = None
        #: Of what one unit of time is worth in positions, as the model multiplies it.
        self.interval: Any = 1
        self.by_size = True

    def more(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"video_grid_thw": inputs["video_grid_thw"].to(self.device)}

    def behind(self) -> Tensor:
        return torch.empty(0, device=self.device)

    def block(self, question: Any, frames: int) -> Block:
        x, inputs = self.features(question.inputs), question.inputs
        units, high, wide = (int(v) for v in inputs["video_grid_thw"][0])
        side = self.found.inner.config.vision_config.spatial_merge_size
        grid = high // side, wide // side
        if self.grid is None:
            self._learn(grid, inputs.get("second_per_grid_ts"))
            self.grid = grid
        if self.grid != grid:
            raise ValueError(
                f"frames of {grid[0]} x {grid[1]} tokens in a stream of {self.grid[0]} x {self.grid[1]}; every frame "
                f"of a stream has the same size"
            )
        made = Block(x, self._places(self.units, units, grid), units)
        self._count(made)
        return made

    def words_at(self, start: int, count: int) -> Tensor:
        assert self.grid is not None
        first = start + self._after(self.units, self.grid)
        return torch.arange(first, first + count, device=self.device).expand(3, 1, -1)

    def prompt_at(self, count: int) -> Tensor:
        return super().prompt_at(count).expand(3, 1, -1)

    # -- how the model counts --------------------------------------------------------------------------------------
    def _learn(self, grid: tuple[int, int], seconds: Any) -> None:
        """Raises ``TypeError`` for a model that places a video otherwise than is known here."""
        rate = getattr(self.found.inner.config.vision_config, "tokens_per_second", None)
        if rate is not None and seconds is not None:
            self.interval = rate * torch.as_tensor(seconds)[0].to(self.device)
        # Long and thin, and short and broad: which axis the words behind it go on from differs between releases.
        videos = [(_SHOWN, (1, 1)), (2, grid), (_SHOWN, grid)]
        asked = [self._asked(units, size, seconds) for units, size in videos]
        for by_size in (True, False):
            self.by_size = by_size
            if all(self._is(units, size, got) for (units, size), got in zip(videos, asked, strict=True)):
                return
        raise TypeError(
            f"{type(self.found.inner).__name__} of this transformers release places the time of a video otherwise than "
            f"is known here, so that it cannot take a stream; ask about the whole video with tokenreduce generate"
        )

    def _is(self, units: int, grid: tuple[int, int], got: Tensor) -> bool:
        return bool(
            (got[..., :-1] == self._places(0, units, grid)).all() and (got[..., -1] == self._after(units, grid)).all()
        )

    def _asked(self, units: int, grid: tuple[int, int], seconds: Any) -> Tensor:
        """(3,1,N+1) positions that the model gives ``units`` x ``grid`` tokens of a video at 0, and a word behind."""
        inner, device = self.found.inner, self.device
        side = inner.config.vision_config.spatial_merge_size
        kinds = torch.tensor([[2] * (units * grid[0] * grid[1]) + [0]], device=device)
        ids = torch.where(kinds == 2, self.found.ids[-1], 0)
        thw = torch.tensor([[units, grid[0] * side, grid[1] * side]], device=device)
        more = {} if seconds is None else {"second_per_grid_ts": torch.as_tensor(seconds)[:1]}
        positions: Tensor = inner.get_rope_index(ids, mm_token_type_ids=kinds, video_grid_thw=thw, **more)[0]
        return positions

    def _time(self, first: int, units: int) -> Tensor:
        # As the model rounds: a step times a number of units drifts where a unit is worth no whole number of positions.
        return (torch.arange(first, first + units, device=self.device) * self.interval).long()

    def _places(self, first: int, units: int, grid: tuple[int, int]) -> Tensor:
        """(3,1,N) positions of ``units`` of time from number ``first`` on, of ``grid`` (H,W) tokens each."""
        high, wide = (torch.arange(n, device=self.device) for n in grid)
        axes = torch.meshgrid(self._time(first, units), high, wide, indexing="ij")
        return torch.stack(axes).reshape(3, 1, -1)

    def _after(self, units: int, grid: tuple[int, int]) -> int:
        """Position of the first word behind ``units`` of time."""
        return max(grid) if self.by_size else max(int(self._time(units - 1, 1)), *(n - 1 for n in grid)) + 1


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
