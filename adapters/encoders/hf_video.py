"""Layers of transformers video encoders with joint space-time attention (VideoMAE, ViViT) that reduce their tokens.

All tubelets of a clip are one sequence, so every encoder method works across frames as well as inside them. Models
whose blocks reshape tokens to frames and places (divided attention) cannot lose tokens one by one: :data:`REFUSED`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.videomae import modeling_videomae as videomae
from transformers.models.vivit import modeling_vivit as vivit

from tokenreduce.adapters.encoders.hf_attention import Call, attend
from tokenreduce.adapters.encoders.hf_layers import ReducedViTLayer, _Layer

__all__ = [
    "REFUSED",
    "ListeningVideoMAESelfAttention",
    "ReducedVideoMAELayer",
    "ReducedVivitLayer",
    "check_head",
    "clip_grid",
    "token_size",
]

_DIVIDED = (
    "its blocks attend over time and over space in turn and reshape the tokens to frames x places for it, so single "
    "tokens cannot go; use fewer frames or a smaller image, or a model with joint attention (VideoMAE, ViViT)"
)
#: Video models without an adapter, by the name of their class, and why.
REFUSED = {"TimesformerModel": _DIVIDED}


class ReducedVideoMAELayer(_Layer, videomae.VideoMAELayer):
    """The second branch is in two modules, the latter of which adds the residual."""

    norms = ("layernorm_before", "layernorm_after")
    by_keyword = True

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.output(self.intermediate(self.layernorm_after(x)), x)


class ListeningVideoMAESelfAttention(videomae.VideoMAESelfAttention):
    """VideoMAE's attention takes no mask and hands none on; this one takes a :class:`Call` by keyword.

    Without a call it is the stock forward.
    """

    def forward(self, hidden_states: Tensor | None = None, tokenreduce_call: Call | None = None) -> tuple[Tensor, Any]:
        if tokenreduce_call is None or hidden_states is None:
            return super().forward(hidden_states)
        shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.query, self.key, self.value))
        out, weights = attend(
            self, q, k, v, tokenreduce_call, is_causal=self.is_causal, scaling=self.scaling,
            dropout=self.dropout_prob if self.training else 0.0,
        )  # fmt: skip
        return out.flatten(2), weights

    def _get_name(self) -> str:
        return "VideoMAESelfAttention"


class ReducedVivitLayer(_Layer, vivit.VivitLayer):
    norms = ReducedViTLayer.norms
    _residual = ReducedViTLayer._residual
    _feed_forward = ReducedViTLayer._feed_forward


def token_size(config: Any) -> tuple[int, ...]:
    """Pixels of one token: (rows, columns), or (frames, rows, columns) of the tubelets of a clip."""
    patch = getattr(config, "patch_size", None)
    sides = (patch, patch) if isinstance(patch, int) else tuple(patch or ())
    tubelet = getattr(config, "tubelet_size", None)
    if tubelet is None:
        return sides
    return (tubelet, *sides) if isinstance(tubelet, int) else tuple(tubelet)


def clip_grid(config: Any, image: tuple[int, int]) -> tuple[int, int, int] | None:
    """(frames, rows, columns) of the tubelets of a clip of ``config.num_frames`` images; None for an image model."""
    size = token_size(config)
    return (config.num_frames // size[0], image[0] // size[1], image[1] // size[2]) if len(size) == 3 else None


def check_head(reader: nn.Module) -> None:
    """Raise ``ValueError`` for a classifier that reads the first tubelet alone: it may be gone, or another's."""
    if isinstance(reader, videomae.VideoMAEForVideoClassification) and reader.fc_norm is None:
        raise ValueError(
            "VideoMAE with use_mean_pooling=False classifies by its first token, which is a patch like any other and "
            "cannot be told from what it is merged with; use a checkpoint with use_mean_pooling=True"
        )
