"""Image/video language models: before, inside and behind the prefill of their language model."""
