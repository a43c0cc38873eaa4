"""Benchmarks that ask language models: a source of questions, a runner and a meter, put together by a task."""
