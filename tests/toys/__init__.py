"""The smallest random-weight image/video language models of every transformers folder that has some, with prompts."""
