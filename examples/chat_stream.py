"""Stream one chat answer from a Powertrain server, with the OpenAI client.

python examples/chat_stream.py http://127.0.0.1:8000 "Why is the sky blue?"
"""

from __future__ import annotations

import sys
import time
import urllib.error
import urllib.request

import openai


def wait_until_ready(server: str, timeout_s: float = 120.0) -> None:
    """A server that has just been started loads its model first; /health says when it takes work."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            urllib.request.urlopen(f"{server}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                sys.exit(f"error: {server} is not ready after {timeout_s:.0f} s: {error}")
            time.sleep(0.2)


def main(server: str, question: str) -> None:
    wait_until_ready(server)
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    model = client.models.list().data[0].id
    start = time.perf_counter()
    first_token_s = 0.0
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=96,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in answer:
        first_token_s = first_token_s or time.perf_counter() - start
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        if chunk.usage:
            seconds = time.perf_counter() - start
            num_tokens = chunk.usage.completion_tokens
            print(f"\n\n[{num_tokens} tokens in {seconds:.1f} s, the first after {first_token_s * 1000:.0f} ms]")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} SERVER_URL QUESTION")
    main(sys.argv[1], sys.argv[2])
