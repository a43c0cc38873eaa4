"""Models by name: a file for each library that models come from; see tokenreduce.bench.models."""
