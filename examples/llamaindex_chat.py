"""LlamaIndex with `qfllama serve`: a chat about a document that is longer than the cache.

    pip install llama-index-llms-openai-like
    qfllama serve model-qf.gguf --max-length 2048
    python llamaindex_chat.py http://127.0.0.1:8080 book.txt "Who is Ada?" "Where does she live?"

There is no index and no embedding: the whole document is in the prompt. The line after each answer
is from the server's `timings`: only the first question reads the document.
"""

import sys
from pathlib import Path

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike


def main(address: str, document: str, *questions: str) -> None:
    llm = OpenAILike(
        api_base=f"{address}/v1", api_key="none", model="qfllama", is_chat_model=True,
        max_tokens=100, temperature=0, timeout=600,
    )  # fmt: skip
    text, messages = Path(document).read_text(encoding="utf-8") + "\n\n", []
    for question in questions:
        messages.append(ChatMessage(text + question, role="user"))
        text = ""
        for piece in llm.stream_chat(messages):
            print(piece.delta or "", end="", flush=True)
        timings = piece.raw.timings  # of llama-server, in the last piece
        read, known = timings["prompt_n"], timings["cache_n"]
        print(f"\n[{read} tokens read, {known} known, ", end="")
        print(f"reread {timings['reread']}, recalled {timings['recalled']}]\n")
        messages.append(piece.message)


if __name__ == "__main__":
    main(*sys.argv[1:])
