"""LangChain with `qfllama serve`: a chat about a document that is longer than the cache.

    pip install langchain-openai
    qfllama serve model-qf.gguf --max-length 2048
    python langchain_chat.py http://127.0.0.1:8080 book.txt "Who is Ada?" "Where does she live?"

The history only grows, and nothing of it is cut off. The line after each answer says how long the
prompt was, and how much of it the server knew from the turn before.
"""

import sys
from pathlib import Path

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI


def main(address: str, document: str, *questions: str) -> None:
    # with an address of one's own, LangChain asks for token counts only if it is told to
    llm = ChatOpenAI(
        base_url=f"{address}/v1", api_key="none", model="qfllama", max_tokens=100, stream_usage=True
    )
    text, messages = Path(document).read_text(encoding="utf-8") + "\n\n", []
    for question in questions:
        messages.append(HumanMessage(text + question))
        answer, text = None, ""
        for piece in llm.stream(messages):
            print(piece.content, end="", flush=True)
            answer = piece if answer is None else answer + piece
        usage = answer.usage_metadata
        known = usage["input_token_details"]["cache_read"]
        print(f"\n[a prompt of {usage['input_tokens']} tokens, {known} known]\n")
        messages.append(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
