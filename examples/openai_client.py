"""OpenAI's package with `qfllama serve`: questions about a document that is longer than the cache.

    pip install openai
    qfllama serve model-qf.gguf --max-length 2048
    python openai_client.py http://127.0.0.1:8080 book.txt "Who is Ada?" "Where does she live?"

Each answer comes piece by piece. The line after it is from the server's `timings`: only the first
question reads the document, and what a question is about is recalled from the archive.
"""

import sys
from pathlib import Path

from openai import OpenAI


def main(address: str, document: str, *questions: str) -> None:
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    messages = [{"role": "user", "content": Path(document).read_text(encoding="utf-8") + "\n\n"}]
    for question in questions:
        messages[-1]["content"] += question
        answer = ""
        for event in client.chat.completions.create(
            model="qfllama", messages=messages, max_tokens=100, stream=True
        ):
            if event.choices:
                piece = event.choices[0].delta.content or ""
                print(piece, end="", flush=True)
                answer += piece
        timings = event.timings  # of llama-server, in the last event; unknown to OpenAI's types
        read, known = timings["prompt_n"], timings["cache_n"]
        print(f"\n[{read} tokens read, {known} known, ", end="")
        print(f"reread {timings['reread']}, recalled {timings['recalled']}]\n")
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": ""}]


if __name__ == "__main__":
    main(*sys.argv[1:])
