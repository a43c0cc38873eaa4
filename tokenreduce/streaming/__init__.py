"""A video without end through an image/video language model whose KV cache has a hard cap."""

from tokenreduce.streaming.session import Reply, Stream, stream

__all__ = ["Reply", "Stream", "stream"]
