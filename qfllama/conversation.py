"""A conversation whose tokens only ever grow.

Rendering the chat template anew at each turn and tokenizing the result changes the history: the
tokenizer splits the model's answer into other tokens than were generated, or the template strips
the answer. From there on everything has to be read again. A bounded cache without an archive, or
with windowed or recurrent layers, can't even go back that far. So a conversation keeps its tokens
as they were read and generated. A turn appends only what the template puts between the last answer
and the next one.
"""

from __future__ import annotations

import codecs
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2
import llama_cpp
from llama_cpp.llama_chat_format import CHATML_CHAT_TEMPLATE, Jinja2ChatFormatter

from qfllama.beginning import before_user
from qfllama.config import QFilterError
from qfllama.recalling import Recalled
from qfllama.turns import stream_in_turn

if TYPE_CHECKING:
    from llama_cpp._internals import LlamaModel

    from qfllama.llama import Llama


class ContextFull(QFilterError):
    """The conversation doesn't fit into n_ctx positions."""


@dataclass
class Turn:
    """What one question and its answer cost.

    Attributes:
        prompt_tokens: read before the answer began.
        reread_tokens: of these, the ones that had been read before.
        prompt_seconds: from the question to the first token of the answer.
        answer_tokens: tokens of the answer.
        steps: tokens generated after the first, the end of the turn included.
        step_seconds: what they took.
        recalled: what came back from the archive for the question; None: nothing.
        ended: "stop", "length" (max_tokens), "context" (n_ctx) or "interrupted".
    """

    prompt_tokens: int = 0
    reread_tokens: int = 0
    prompt_seconds: float = 0.0
    answer_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    recalled: Recalled | None = None
    ended: str = "stop"


TEMPLATE = "tokenizer.chat_template"
"""The metadata key of a model's chat template."""


def chat_formatter(llm: Llama) -> Jinja2ChatFormatter:
    """The chat template in the model's file; if there is none, ChatML, as in llama.cpp."""
    return formatter(llm._model, llm.metadata.get(TEMPLATE, CHATML_CHAT_TEMPLATE))


def formatter(model: LlamaModel, template: str) -> Jinja2ChatFormatter:
    """Makes text of messages, by a chat template."""

    def text(token: int) -> str:
        return model.token_get_text(token) if token != -1 else ""

    return Jinja2ChatFormatter(
        template, eos_token=text(model.token_eos()), bos_token=text(model.token_bos())
    )


def tokenize_all(model: LlamaModel, text: str) -> list[int]:
    """Tokens of a whole conversation, with BOS if the vocabulary asks and the template has none."""
    tokens = model.tokenize(text.encode("utf-8", "replace"), add_bos=False, special=True)
    bos = model.token_bos()
    if model.add_bos_token() and bos != -1 and tokens[:1] != [bos]:
        tokens.insert(0, bos)
    return tokens


class Conversation:
    """A chat over one `Llama` that reads every token once, however long it gets::

        from qfllama import Conversation, Llama

        llm = Llama("model-qf.gguf", qfilters=True)
        chat = Conversation(llm, system="Answer in one sentence.")
        for piece in chat.ask("What is a KV cache?", max_tokens=200, temp=0.2):
            print(piece, end="", flush=True)
        print(chat.turn)  # tokens read and generated, seconds, why it ended

    `Llama.create_chat_completion` renders and tokenizes the whole history for each answer. It reads
    again from the first token that differs, and everything if a bounded cache can't go back so far
    (`rewind_limit`). A conversation keeps the tokens as they were read and generated, and only
    appends.

    Attributes:
        llm: the `Llama`; if other code uses it between the turns, the conversation is read again.
        messages: all of it, as `{"role": ..., "content": ...}`.
        tokens: all of it up to now, as read and generated; the first `llm.n_tokens` of them are
            in the cache.
        turn: what the latest question and its answer cost, a `Turn`.
    """

    def __init__(
        self,
        llm: Llama,
        system: str | None = None,
        document: str | None = None,
        prompt: str | os.PathLike | None = None,
    ) -> None:
        """
        Args:
            llm: the model in its cache; what it has read is forgotten.
            system: the system prompt.
            document: a text that goes before the first user message.
            prompt: a file of `qfllama compress`; its system prompt and document are in the cache
                from the start.

        Raises:
            QFilterError: `llm` can't load `prompt`, or the file holds no document for a chat.
        """
        self.llm, self._turns = llm, llm._turns
        self.document = document
        self.messages: list[dict[str, str]] = []
        self.tokens: list[int] = []
        self.turn = Turn()  # of the latest question
        self._format = chat_formatter(llm)
        self._mark = uuid.uuid4().hex  # stands for the answers when the template is rendered
        self._document_mark = f"{self._mark}-document-"
        self._rendered = ""  # the conversation with marks for answers, up to where `tokens` ends
        self._read = 0  # how many of `tokens` the engine had read after the latest turn
        self._prompt = prompt
        self._start_over()
        if prompt is not None:
            system = self._take_over_prompt()
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    # -- prompts that were read before

    def document_tokens(self) -> list[int]:
        """The conversation up to the end of the document: what `qfllama compress` reads.

        Returns:
            token numbers.

        Raises:
            QFilterError: the template doesn't put the document where a message begins.
        """
        return tokenize_all(self.llm._model, self.document_header() + self.document)

    def document_header(self) -> str:
        """What the template puts before the document.

        Raises:
            QFilterError: the template doesn't put the document where a message begins.
        """
        mark = self._document_mark
        before, found, _ = self._render(
            [*self.messages, {"role": "user", "content": f"{mark}\n\n{self._mark}"}]
        ).partition(mark)
        if not found:
            raise QFilterError(
                "the model's chat template has no place for a document: use chat with --file"
            )
        return before

    def _take_over_prompt(self) -> str | None:
        """Set `tokens` from the loaded file and `document` to a mark; returns its system prompt."""
        extra = self._loaded.extra.get("chat")
        if not isinstance(extra, dict):
            raise QFilterError(
                f"{self._prompt} holds no document for a chat: make one with `qfllama compress`"
            )
        self.document = self._document_mark
        self.tokens = self._loaded.tokens.tolist()
        self._read = len(self.tokens)
        return extra.get("system")

    def _start_over(self) -> None:
        """Reset the engine to where the conversation began."""
        self.llm.reset()
        if self._prompt is not None:
            self._loaded = self.llm.load_prompt(self._prompt)
            begin = self._loaded.tokens.tolist()
            if self.tokens and self.tokens[: len(begin)] != begin:
                raise QFilterError(f"{self._prompt} was replaced meanwhile: begin another chat")

    @stream_in_turn
    def ask(
        self,
        text: str,
        *,
        max_tokens: int | None = None,
        stopped: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda done, total: None,
        **sampling,
    ) -> Iterator[str]:
        """Add a user message and yield the answer in pieces of whole characters.

        Args:
            text: the user's message.
            max_tokens: of the answer; None: as many as n_ctx holds.
            stopped: called between batches and between tokens; True ends the answer. What was
                generated stays in the conversation; the next message reads what was not read yet.
            progress: called with the tokens read and the total.
            sampling: arguments of `Llama.generate`: temp, top_p, grammar, ...

        Raises:
            ContextFull: the conversation doesn't fit into n_ctx; nothing has changed.
            QFilterError: the chat template refuses the conversation; nothing has changed.
            RuntimeError: the engine failed; all is read again with the next message.
        """
        self._add_user(text)
        self.turn = turn = Turn()
        answer = ""
        try:
            for piece in self._answer(turn, max_tokens, stopped, progress, sampling):
                answer += piece
                yield piece
        except RuntimeError:  # llama_decode failed: nothing in the cache can be relied on
            self.llm.reset()
            raise
        finally:
            self.messages.append({"role": "assistant", "content": answer})
            self._read = self.llm.n_tokens

    # -- from messages to tokens

    @property
    def _begun(self) -> bool:
        """Was a question asked?"""
        return any(message["role"] == "user" for message in self.messages)

    @property
    def _reset_or(self) -> str:
        """Advice to /reset, if there is a conversation to give up."""
        return "/reset, or " if self._begun else ""

    def _add_user(self, text: str) -> None:
        """Append a user message to `messages` and what the template makes of it to `tokens`."""
        if self.document is not None and not self._begun:
            text = f"{self.document}\n\n{text}"
        messages = [*self.messages, {"role": "user", "content": text}]
        rendered = self._render(messages, marks=True)
        addition = self._addition(rendered)
        if addition is None and self._prompt is not None:
            raise QFilterError(
                "the model's chat template changes the beginning of a conversation as it goes on:"
                f" {self._reset_or}use --file in place of --state"
            )
        if addition is None:
            tokens = tokenize_all(self.llm._model, self._render(messages))
        else:
            tokens = self.tokens + self._tokenize_on(addition)
        n_ctx = self.llm.n_ctx()
        if len(tokens) >= n_ctx:
            raise ContextFull(
                f"context full: the conversation would take {len(tokens):,} of {n_ctx:,} positions;"
                f" {self._reset_or or 'shorten it, or '}start with a larger --n-ctx"
            )
        self.messages, self.tokens, self._rendered = messages, tokens, rendered

    def _render(self, messages: list[dict[str, str]], marks=False, answering=True) -> str:
        """The chat template's text, up to where the answer begins; not `answering`: without what
        opens it. With `marks` a mark stands for each answer. Then the text around the answers
        doesn't depend on what the template does to them (strip them, leave out the reasoning).
        """
        if marks:
            messages = [
                {**m, "content": f"{self._mark}-{i}-"} if m["role"] == "assistant" else m
                for i, m in enumerate(messages)
            ]
        try:
            self._format.add_generation_prompt = answering
            text = self._format(messages=messages).prompt
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise QFilterError(
                f"the model's chat template refuses this conversation: {error};"
                f" {self._reset_or}start without --system"
            ) from error
        # with a saved prompt, everything up to the end of the document has been read already
        return text if self._prompt is None else text.partition(self._document_mark)[2]

    def _addition(self, rendered: str) -> str | None:
        """What `rendered` has after the latest answer; None if its beginning isn't what was read.

        Some templates open an answer otherwise where it is to be generated (`<think>`) than where
        it was given (`<|channel|>final`). What was read stays as it is.
        """
        if not self._begun:
            return rendered if self._prompt is not None and rendered else None
        before, found, after = rendered.partition(f"{self._mark}-{len(self.messages) - 1}-")
        if found and not self._rendered.startswith(before):
            asked = self._render(self.messages[:-1], marks=True, answering=False)
            found = before.startswith(asked if self._rendered.startswith(asked) else self._rendered)
        return after if found else None

    def _tokenize_on(self, text: str) -> list[int]:
        """Tokens of a text that continues another one.

        SentencePiece vocabularies put a space before the first character that they see. Here that
        is a colon, whose tokens are cut off. If the colon merges with the text, the vocabulary is
        of another kind and adds no space.
        """
        tokenize = self.llm.tokenize
        colon = tokenize(b":", add_bos=False, special=True)
        tokens = tokenize(b":" + text.encode("utf-8", "replace"), add_bos=False, special=True)
        if tokens[: len(colon)] == colon:
            return tokens[len(colon) :]
        return tokenize(text.encode("utf-8", "replace"), add_bos=False, special=True)

    # -- from tokens to the answer

    def _answer(self, turn, max_tokens, stopped, progress, sampling) -> Iterator[str]:
        """Read what is new, generate, append each token to `tokens`; fills in `turn`."""
        start = time.perf_counter()
        n_before = self._rewind()
        self._keep_beginning()
        turn.reread_tokens = max(0, self._read - n_before)
        rest = self._read_batches(stopped, progress)
        if not rest:
            turn.prompt_tokens = self.llm.n_tokens - n_before
            turn.prompt_seconds = time.perf_counter() - start
            turn.ended = "interrupted"
            return
        turn.prompt_tokens = len(self.tokens) - n_before
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in self.llm.generate(rest, reset=False, **sampling):
            if turn.answer_tokens == 0:
                turn.prompt_seconds = time.perf_counter() - start
                turn.recalled = self.llm.recalled
            else:
                turn.steps = turn.answer_tokens
                turn.step_seconds = time.perf_counter() - start - turn.prompt_seconds
            if llama_cpp.llama_vocab_is_eog(self.llm._model.vocab, token):
                return
            self.tokens.append(token)
            turn.answer_tokens += 1
            piece = decoder.decode(self.llm.detokenize([token]))
            if piece:
                yield piece
            if stopped():
                turn.ended = "interrupted"
            elif max_tokens is not None and turn.answer_tokens >= max_tokens:
                turn.ended = "length"
            elif len(self.tokens) >= self.llm.n_ctx():
                turn.ended = "context"
            else:
                continue
            return

    def text(self, start: int, end: int) -> str:
        """The text of the positions from `start` to before `end`, special tokens in their own
        spelling."""
        return self.llm.detokenize(self.tokens[start:end], special=True).decode(errors="replace")

    def _keep_beginning(self) -> None:
        """Before anything is evicted. A saved prompt has its own number."""
        if self._prompt is None and self.llm.qfilter_config is not None:
            self.llm.keep_first(before_user(self.llm._model, self.tokens, self.messages))

    def _rewind(self) -> int:
        """Cut the engine's cache back to its common prefix with `tokens`; returns its length.

        There is something to cut only if the template has changed the beginning. A cache that
        can't go back starts over.
        """
        llm = self.llm
        n = llm.longest_token_prefix(llm._input_ids.tolist(), self.tokens)
        n = min(n, len(self.tokens) - 1)  # one is needed to get the logits from
        if n < llm.n_tokens and n > 0 and llm._ctx.kv_cache_seq_rm(-1, n, -1):
            llm.n_tokens = n
        elif n < llm.n_tokens or n == 0:
            self._start_over()
        return llm.n_tokens

    def _read_batches(self, stopped, progress) -> list[int]:
        """Evaluate whole batches; the rest (at least one token) is returned, [] if stopped."""
        llm, total = self.llm, len(self.tokens)
        while total - llm.n_tokens > llm.n_batch:
            if stopped():
                return []
            progress(llm.n_tokens, total)
            llm.eval(self.tokens[llm.n_tokens : llm.n_tokens + llm.n_batch])
        return [] if stopped() else self.tokens[llm.n_tokens :]
