"""``python -m tokenreduce.integrations.vllm.demo``: serve the embedded model with fewer tokens, and ask it over HTTP.

It asks one question about one picture with the server's own number of tokens, with two others and with all of them,
prints what the server counted, and ends with status 1 where that is not what was asked for.
"""

from __future__ import annotations

import argparse
import sys

from tokenreduce.integrations.vllm.client import ask, data_url, free_port, metrics, running
from tokenreduce.integrations.vllm.command import check_installed, server
from tokenreduce.integrations.vllm.counts import kept, method_of
from tokenreduce.integrations.vllm.source import EMBEDDED, config_of, source_of

__all__ = ["CPU", "main"]

#: What vLLM on a CPU is told: a small cache, no network, no statistics sent.
CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
}  # fmt: skip
ENGINE = ("--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--skip-mm-profiling")
WHOLE = 196


def main(reduce: str = "divprune:keep=49", seed: int = 7) -> int:
    """Run the demonstration; 0 where every prompt had as many tokens as was asked for."""
    check_installed()
    from tokenreduce.zoo.world import SPLITS, scene
    from tokenreduce.zoo.world import ask as questions

    made = scene(SPLITS["test"][seed])
    question, picture = questions(made, SPLITS["test"][seed], 1)[0], data_url(made.image)
    reducer = method_of(reduce)
    port = free_port()
    serving = server(source_of(EMBEDDED), config_of(EMBEDDED), reduce, name=EMBEDDED, port=port, more=ENGINE)
    print(serving.line, flush=True)
    wrong = False
    with running(serving.words, port, CPU) as base:
        whole = ask(base, EMBEDDED, picture, question.text, keep=1.0, tokens=1)
        text = whole.prompt_tokens - WHOLE
        print(f"\n{question.text}  (right: {question.answer})")
        print(f"{KEEP_HEAD:>16}  prompt tokens  answer")
        print(f"{'all (1.0)':>16}  {whole.prompt_tokens:13}  {whole.text.strip()}")
        for keep in (None, 98, 16):
            got = ask(base, EMBEDDED, picture, question.text, keep=keep, tokens=1)
            expected = text + kept(reducer, WHOLE, keep)
            wrong |= got.prompt_tokens != expected
            said = reduce if keep is None else str(keep)
            note = "" if got.prompt_tokens == expected else f"  expected {expected}"
            print(f"{said:>16}  {got.prompt_tokens:13}  {got.text.strip()}{note}")
        total = metrics(base).get("vllm:prompt_tokens_total")
    print(f"\nvllm:prompt_tokens_total {total:.0f}" if total is not None else "")
    return int(wrong)


KEEP_HEAD = "kept"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--reduce", default="divprune:keep=49", help="the method of the server")
    sys.exit(main(parser.parse_args().reduce))
