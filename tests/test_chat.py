"""The chat command and the conversation under it, on the real model."""

import codecs
import os
import pty
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from gguf_files import rectangular

QFLLAMA = str(Path(sys.executable).with_name("qfllama"))
STREAMING = ["--policy", "streaming", "--max-length", "256"]
GREEDY = ["--temperature", "0", "--threads", "1"]
STATUS = re.compile(
    r"\[(?P<used>[\d,]+)/(?P<allocated>[\d,]+) cells · "
    r"KV (?P<mib>[\d.]+) MiB \(full cache (?P<full>[\d.]+)\) · "
    r"(?P<evictions>[\d,]+) evictions? · (?P<positions>[\d,]+) positions( · (?P<rest>.*))?\]"
)
COUNT = "Count from 1 to 100 in words, one per line."


def run(*args, stdin="", timeout=300):
    """The finished process of `qfllama ARGS`."""
    return subprocess.run(
        [QFLLAMA, *map(str, args)],
        check=False,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def statuses(stderr):
    """Every status line in `stderr`: its figures as numbers, the rest as text."""
    found = [m.groupdict() for m in STATUS.finditer(stderr)]
    return [
        {k: v if k == "rest" else float(v.replace(",", "")) for k, v in status.items()}
        for status in found
    ]


def assert_one_line(process, *words):
    """The process ended with code 2 and one line on stderr that has `words`."""
    assert process.returncode == 2, process.stderr
    assert process.stdout == ""
    assert process.stderr.count("\n") == 1, process.stderr
    assert process.stderr.startswith("qfllama: ")
    for word in words:
        assert word in process.stderr


# -- the conversation


@pytest.fixture(scope="module")
def llm(smollm2):
    """A bounded cache of 128 cells that keeps the sinks and the newest; no filters needed."""
    from qfllama import Llama, QFilterConfig

    return Llama(
        str(smollm2),
        n_ctx=1024,
        n_threads=1,
        n_threads_batch=1,
        qfilters=QFilterConfig(max_length=128, policy="streaming"),
        verbose=False,
    )


@pytest.fixture
def evaluated(llm, monkeypatch):
    """The tokens that the engine is given to evaluate, in order, from here on."""
    tokens = []
    evaluate = llm.eval

    def watched(batch):
        tokens.extend(batch)
        evaluate(batch)

    monkeypatch.setattr(llm, "eval", watched)
    return tokens


def with_template(llm, monkeypatch, old, new):
    """The model's own chat template with `old` replaced by `new`."""
    template = llm.metadata["tokenizer.chat_template"]
    assert old in template
    monkeypatch.setitem(llm.metadata, "tokenizer.chat_template", template.replace(old, new))


def rendered(llm, messages):
    """The whole conversation by upstream's formatter, up to where an answer begins."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = llm.metadata["tokenizer.chat_template"]
    return Jinja2ChatFormatter(template, eos_token="", bos_token="")(messages=messages).prompt


def ask(conversation, text, **options):
    """The whole greedy answer."""
    return "".join(conversation.ask(text, temp=0.0, **options))


QUESTIONS = [
    "Hello! Who are you?",
    "Name three colours.",
    "¿Y en español? 🎨",
    "Write a very short poem about the first one.",
    "  Thanks,\n  that was all.  ",
]


def test_five_turns_are_read_once_and_are_what_the_template_renders(llm, evaluated):
    from qfllama.conversation import Conversation

    before = llm.qfilter_stats()["evictions"]
    conversation = Conversation(llm, system="You are a helpful assistant.")
    for question in QUESTIONS:
        assert ask(conversation, question, max_tokens=40)
        assert conversation.turn.reread_tokens == 0

    assert llm.qfilter_stats()["evictions"] > before, "the cache was never full: nothing is shown"
    assert evaluated == conversation.tokens[: llm.n_tokens]
    assert len(conversation.tokens) - llm.n_tokens <= 1  # the last one has not been needed yet
    *history, answer = conversation.messages
    text = rendered(llm, history) + answer["content"]
    utf8 = codecs.getincrementaldecoder("utf-8")()  # the answer may be cut in a character
    assert utf8.decode(llm.detokenize(conversation.tokens, special=True)) == text


def test_a_template_that_alters_answers_does_not_make_history_be_read_again(
    llm, evaluated, monkeypatch
):
    """As templates do that leave out the reasoning; here it ends with the first full stop."""
    from qfllama.conversation import Conversation

    with_template(
        llm,
        monkeypatch,
        "message['content']",
        "(message['content'].split('.', 1)[-1] | trim)",
    )
    conversation = Conversation(llm)
    for question in QUESTIONS[:3]:
        ask(conversation, question, max_tokens=40)

    assert evaluated == conversation.tokens[: llm.n_tokens]
    answers = [m["content"] for m in conversation.messages if m["role"] == "assistant"]
    whole = llm.detokenize(conversation.tokens, special=True).decode()
    assert all(answer in whole for answer in answers)
    assert whole != rendered(llm, conversation.messages[:-1]) + answers[-1]


@pytest.mark.parametrize(
    ("generated", "given"),
    [
        ("<|im_start|>assistant", "<|im_start|>assistant<|final|>"),  # gpt-oss
        ("<|im_start|>assistant\n<think>", "<|im_start|>assistant\n"),  # Qwen3
        ("<|im_start|>assistant\n<think>", "<|im_start|>assistant\n<think></think>"),  # GLM
        ("<|im_start|>assistant<|analysis|>", "<|im_start|>assistant<|final|>"),
    ],
)
def test_answers_may_be_opened_otherwise_than_they_were(
    llm, evaluated, monkeypatch, generated, given
):
    from qfllama.conversation import Conversation

    template = (
        "{% for m in messages %}{{ 'GIVEN' if m.role == 'assistant' else '<|im_start|>' + m.role }}"
        "{{ '\n' + m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}GENERATED{% endif %}"
    ).replace("GENERATED", generated).replace("GIVEN", given)  # fmt: skip
    monkeypatch.setitem(llm.metadata, "tokenizer.chat_template", template)
    conversation = Conversation(llm)
    for question in QUESTIONS[:3]:
        assert ask(conversation, question, max_tokens=20)
        assert conversation.turn.reread_tokens == 0
    assert evaluated == conversation.tokens[: llm.n_tokens]


def test_a_template_that_changes_the_beginning_is_read_again_and_gives_the_right_answer(
    llm, monkeypatch
):
    from qfllama.conversation import Conversation

    with_template(
        llm, monkeypatch, "{% for message", "{{ messages | length }} messages\n{% for message"
    )
    conversation = Conversation(llm)
    ask(conversation, QUESTIONS[0], max_tokens=20)
    assert conversation.turn.reread_tokens == 0
    read = llm.n_tokens
    answer = ask(conversation, QUESTIONS[1], max_tokens=20)
    assert 0 < conversation.turn.reread_tokens <= read

    prompt = llm.tokenize(
        rendered(llm, conversation.messages[:-1]).encode(), add_bos=False, special=True
    )
    n_answer = conversation.turn.answer_tokens
    assert conversation.tokens[:-n_answer] == prompt
    llm.reset()
    fresh = llm.create_completion(prompt, max_tokens=20, temperature=0.0)
    assert answer == fresh["choices"][0]["text"]


def test_a_reading_that_was_stopped_goes_on_with_the_next_message(llm, evaluated):
    from qfllama.conversation import Conversation

    presses = iter([False, False, True])
    conversation = Conversation(llm, document="The sky is blue. " * 60)
    assert ask(conversation, "What colour?", stopped=lambda: next(presses)) == ""
    assert conversation.turn.ended == "interrupted"
    assert 0 < llm.n_tokens == len(evaluated) == conversation.turn.prompt_tokens
    assert llm.n_tokens < len(conversation.tokens)

    assert ask(conversation, "Answer, please.", max_tokens=10)
    assert evaluated == conversation.tokens[: llm.n_tokens]
    *history, answer = conversation.messages
    text = rendered(llm, history) + answer["content"]
    assert llm.detokenize(conversation.tokens, special=True).decode() == text


def test_what_was_generated_of_a_stopped_answer_stays_in_the_conversation(llm, evaluated):
    from qfllama.conversation import Conversation

    conversation = Conversation(llm)
    presses = iter([False] * 6 + [True])  # asked once before the answer, then after each token
    partial = ask(conversation, COUNT, stopped=lambda: next(presses))
    assert conversation.turn.ended == "interrupted"
    assert conversation.turn.answer_tokens == 6
    assert conversation.messages[-1] == {"role": "assistant", "content": partial}

    assert ask(conversation, "Go on.", max_tokens=10)
    assert evaluated == conversation.tokens[: llm.n_tokens]
    *history, answer = conversation.messages
    text = rendered(llm, history) + answer["content"]
    assert llm.detokenize(conversation.tokens, special=True).decode() == text


def test_a_sentencepiece_vocabulary_puts_no_spaces_between_the_turns(tmp_path):
    """It puts one before every text that it is given; a turn isn't a text of its own."""
    from llama_cpp import LlamaGrammar
    from qfllama.convert import export

    from qfllama import Llama
    from qfllama.conversation import Conversation

    tiny_models.write_llama(tmp_path / "checkpoint")
    export.checkpoint_to_gguf(tmp_path / "checkpoint", tmp_path / "tiny.gguf")
    llm = Llama(str(tmp_path / "tiny.gguf"), n_ctx=512, n_threads=1, verbose=False)
    assert llm.detokenize(llm.tokenize(b"a", add_bos=False)) == b" a"
    llm.metadata["tokenizer.chat_template"] = (
        "{{ bos_token }}{% for m in messages %}"
        "{{ 'Q: ' + m.content + '\nA:' if m.role == 'user' else m.content + '. ' }}{% endfor %}"
    )
    words = LlamaGrammar.from_string('root ::= " " [a-z]+ root', verbose=False)
    conversation = Conversation(llm)
    for question in ("Who?", "Why?", "When?"):
        ask(conversation, question, max_tokens=5, grammar=words)
    answers = [m["content"] for m in conversation.messages if m["role"] == "assistant"]
    text = "Q: Who?\nA:{}. Q: Why?\nA:{}. Q: When?\nA:{}".format(*answers)
    assert llm.detokenize(conversation.tokens).decode() == text


@pytest.mark.parametrize("max_tokens", [None, 2, 3, 5])
def test_an_answer_comes_in_whole_characters(llm, max_tokens):
    """The grammar makes the model write characters that take several tokens each."""
    from llama_cpp import LlamaGrammar

    from qfllama.conversation import Conversation

    text = "🦊🪿é日本語𓀀!"
    grammar = LlamaGrammar.from_string(f'root ::= "{text}"', verbose=False)
    conversation = Conversation(llm)
    pieces = list(conversation.ask("Hi", max_tokens=max_tokens, grammar=grammar))
    assert len(pieces) < conversation.turn.answer_tokens, "no character was split: nothing is shown"
    assert "\ufffd" not in "".join(pieces)
    if max_tokens is None:
        assert "".join(pieces) == text
    else:
        assert text.startswith("".join(pieces))
        assert conversation.turn.ended == "length"


def test_a_message_beyond_n_ctx_is_refused_and_changes_nothing(llm):
    from qfllama.conversation import ContextFull, Conversation

    conversation = Conversation(llm)
    ask(conversation, "Hello", max_tokens=10)
    messages, tokens = list(conversation.messages), list(conversation.tokens)
    with pytest.raises(ContextFull, match=r"1,024 positions.*/reset.*--n-ctx"):
        ask(conversation, "word " * 1100)
    assert conversation.messages == messages
    assert conversation.tokens == tokens
    ask(conversation, "Still there?", max_tokens=10)
    assert conversation.turn.reread_tokens == 0


def test_an_answer_ends_where_the_context_ends(llm):
    from llama_cpp import LlamaGrammar

    from qfllama.conversation import Conversation

    endless = LlamaGrammar.from_string('root ::= "word " root', verbose=False)
    conversation = Conversation(llm, document="word " * 950)
    ask(conversation, "Go on", grammar=endless)
    assert conversation.turn.ended == "context"
    assert len(conversation.tokens) == llm.n_ctx()


# -- the command, as a process


def upstream_answers(model, questions, **options):
    """Greedy answers of the stock chat completion, one message after the other."""
    from llama_cpp import Llama

    stock = Llama(
        str(model), n_ctx=1024, n_threads=1, n_threads_batch=1, flash_attn=True, verbose=False
    )
    messages, answers = [], []
    for question in questions:
        messages.append({"role": "user", "content": question})
        message = stock.create_chat_completion(messages, temperature=0.0, **options)
        messages.append(message["choices"][0]["message"])
        answers.append(messages[-1]["content"])
    return answers


def test_prompt_answers_as_upstream_does_and_exits(smollm2):
    question = "What is the capital of France?"
    process = run(
        "chat", smollm2, "--policy", "knorm", "--prompt", question, "--max-tokens", 40, *GREEDY
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == upstream_answers(smollm2, [question], max_tokens=40)[0] + "\n"
    assert len(statuses(process.stderr)) == 1
    assert process.stderr.count("\n") == 1, process.stderr


def test_piped_lines_are_turns_of_one_conversation(smollm2):
    questions = ["What is the capital of France?", "And which language do they speak there?"]
    process = run(
        "chat", smollm2, *STREAMING, *GREEDY, "--max-tokens", 30, stdin="\n".join(questions) + "\n"
    )
    assert process.returncode == 0, process.stderr
    answers = upstream_answers(smollm2, questions, max_tokens=30)
    assert process.stdout == "".join(answer + "\n" for answer in answers)
    first, second = statuses(process.stderr)
    assert first["positions"] < second["positions"] < 256
    assert first["used"] < second["used"] <= second["allocated"] == 256
    assert "tok/s" in second["rest"]
    assert "re-read" not in second["rest"]


def test_the_status_line_shows_the_bound_at_work(smollm2, tmp_path):
    document = tmp_path / "doc.txt"
    document.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    bounded, full = (
        run(
            "chat", smollm2, *cache, *GREEDY, "--n-ctx", 2048, "--file", document,
            "--prompt", "What does the fox do?", "--max-tokens", 20,
        )
        for cache in (STREAMING, ["--full"])
    )  # fmt: skip
    assert bounded.returncode == 0, bounded.stderr
    assert full.returncode == 0, full.stderr
    (ours,), (stock,) = statuses(bounded.stderr), statuses(full.stderr)
    assert ours["positions"] > 600
    assert ours["evictions"] > 5
    assert ours["used"] <= ours["allocated"] == 256
    # 30 layers, K and V, 3 KV heads of 64 halves
    assert ours["mib"] == pytest.approx(256 * 30 * 2 * 3 * 64 * 2 / 2**20, abs=0.06)
    assert ours["full"] == pytest.approx(8 * ours["mib"], abs=1)
    assert stock["evictions"] == 0
    assert stock["used"] == pytest.approx(ours["positions"], abs=20)
    assert stock["mib"] == stock["full"] == ours["full"]


def test_reset_starts_over(smollm2):
    question = "What is the capital of France?"
    process = run(
        "chat", smollm2, *STREAMING, *GREEDY, "--max-tokens", 20,
        stdin=f"{question}\nTell me more.\n/reset\n{question}\n",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    first, second, third = statuses(process.stderr)
    assert first["positions"] < second["positions"]
    assert first["positions"] == third["positions"]
    answer = upstream_answers(smollm2, [question], max_tokens=20)[0] + "\n"
    assert process.stdout.startswith(answer)
    assert process.stdout.endswith(answer)


def test_commands_are_obeyed_and_not_sent_to_the_model(smollm2):
    process = run("chat", smollm2, *STREAMING, stdin="/stats\n/help\n/nonsense\n\n/quit\nHello\n")
    assert process.returncode == 0, process.stderr
    assert process.stdout == ""
    assert statuses(process.stderr) == []
    assert re.search(r"^evictions +0$", process.stderr, re.MULTILINE)
    assert re.search(r"^kv_bytes +[1-9][\d,]+$", process.stderr, re.MULTILINE)
    assert "/reset" in process.stderr
    assert "unknown command /nonsense" in process.stderr


def test_a_full_context_is_said_in_a_line_and_the_chat_goes_on(smollm2):
    process = run(
        "chat", smollm2, "--policy", "streaming", "--max-length", 192, "--n-ctx", 256, *GREEDY,
        "--max-tokens", 10, stdin=f"Hello\n{'word ' * 300}\n/reset\nHello\n",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    first, second = statuses(process.stderr)
    assert first["positions"] == second["positions"]
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("qfllama: ")]
    assert "/reset" in line
    assert "--n-ctx" in line


def test_bytes_that_are_not_utf8_do_not_end_the_chat(smollm2):
    process = subprocess.run(
        [QFLLAMA, "chat", str(smollm2), *STREAMING, *GREEDY, "--max-tokens", "5"],
        check=False,
        input=b"caf\xe9?\nHello\n",
        capture_output=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert len(statuses(process.stderr.decode())) == 2


# -- what can go wrong


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    assert_one_line(run("chat", tmp_path / "nothing.gguf"), "nothing.gguf", "does not exist")


@pytest.mark.parametrize("cache", [[], STREAMING, ["--full"]])
def test_a_file_that_is_not_a_gguf_is_one_line(tmp_path, cache):
    path = tmp_path / "notes.gguf"
    path.write_text("not a model at all " * 100)
    assert_one_line(run("chat", path, *cache), "notes.gguf", "GGUF")


@pytest.mark.parametrize("cache", [[], STREAMING, ["--full"]])
def test_a_truncated_model_is_one_line(smollm2, tmp_path, cache):
    path = tmp_path / "half.gguf"
    with smollm2.open("rb") as model:
        path.write_bytes(model.read(50_000_000))
    assert_one_line(run("chat", path, *cache), "half.gguf")


def test_a_model_without_filters_is_sent_to_convert(smollm2):
    assert_one_line(run("chat", smollm2, "--prompt", "Hi"), "qfllama convert")


@pytest.fixture(scope="module")
def filtered(smollm2, tmp_path_factory):
    """The real model with filters that point anywhere: enough for the way through the command."""
    from qfllama import gguf_copy

    weight = np.random.default_rng(0).standard_normal((30, 3, 64)).astype(np.float32)
    weight /= np.linalg.norm(weight, axis=-1, keepdims=True)
    path = tmp_path_factory.mktemp("filtered") / "model.gguf"
    gguf_copy.write(smollm2, path, rectangular(weight))
    return path


def with_value(path, key, old, new):
    """Overwrite the beginning of a value in the GGUF at `path`, `old` as it must be there now."""
    header = path.read_bytes()[:20_000_000]
    start = header.index(old, header.index(key.encode()))
    with path.open("r+b") as file:
        file.seek(start)
        file.write(new)


def test_filters_in_the_file_are_used_without_being_asked_for(filtered):
    process = run(
        "chat", filtered, "--max-length", 128, *GREEDY, "--max-tokens", 5,
        "--prompt", "The sky is blue. " * 40,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    (status,) = statuses(process.stderr)
    assert status["evictions"] > 0
    assert status["used"] <= 128 < status["positions"]


def test_filters_that_cannot_be_used_are_one_line(filtered, tmp_path):
    from qfllama import schema

    path = shutil.copy(filtered, tmp_path / "model.gguf")
    first = schema.read(path).vectors["filters"][0][0, 0].tobytes()
    with_value(path, "qfilters.filters", first, np.float32(np.nan).tobytes())
    assert_one_line(run("chat", path), "model.gguf", "qfllama convert")

    with_value(path, "qfilters.filters", np.float32(np.nan).tobytes(), first)
    for key, old, new in (("head_count_kv", 3, 6), ("head_dim", 64, 32)):
        old, new = (np.full(30, value, "<u4").tobytes() for value in (old, new))
        with_value(path, f"qfilters.{key}", old, new)
    assert_one_line(run("chat", path), "6 KV heads x 32", "3 KV heads x 64", "qfllama convert")


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--policy", "streaming", "--max-length", "8"], "max_length"),
        (["--policy", "streaming", "--max-length", "256", "--window-length", "256"], "window"),
        (["--policy", "streaming", "--max-length", "256", "--interval", "252"], "interval"),
        (["--policy", "streaming", "--max-length", "-1"], "--max-length"),
        (["--policy", "streaming", "--type-k", "q9_9"], "q9_9"),
        (["--policy", "magic"], "magic"),
        (["--full", "--max-length", "256"], "--max-length"),
        (["--n-ctx", "lots"], "--n-ctx"),
        (["--n-ctx", str(2**40)], "--n-ctx"),
        (["--temperature", "nan"], "nan is not a finite number"),
        (["--temperature", "inf"], "inf is not a finite number"),
        (["--top-p", "nan"], "nan is not a finite number"),
        (["--seed", str(2**32 - 1)], "--seed"),  # llama.cpp's word for a random one
        (["--state", "/nonexistent/book.qfstate"], "book.qfstate"),
        (["--file", "/nonexistent/doc.txt"], "doc.txt"),
    ],
)
def test_settings_that_cannot_work_are_one_line(smollm2, args, word):
    assert_one_line(run("chat", smollm2, *args), word)


def test_a_document_that_is_not_text_is_one_line(smollm2):
    process = run("chat", smollm2, *STREAMING, "--file", smollm2, "--prompt", "Hi")
    assert_one_line(process, "UTF-8")


def test_a_prompt_beyond_n_ctx_is_one_line(smollm2):
    process = run("chat", smollm2, *STREAMING, "--n-ctx", 512, "--prompt", "word " * 1000)
    assert_one_line(process, "--n-ctx", "shorten it")
    assert "/reset" not in process.stderr


def test_nothing_to_say_is_one_line(smollm2, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\n")
    for words in (["--prompt", ""], ["--prompt", " "]):
        assert_one_line(run("chat", smollm2, *STREAMING, *words), "--prompt is empty")
    for command in (["chat", "--prompt", "Hi"], ["compress", "-o", tmp_path / "out"]):
        name, *more = command
        process = run(name, smollm2, *more, "--file", tmp_path / "blank.txt")
        assert_one_line(process, "blank.txt is empty")


@pytest.mark.parametrize("cache", [STREAMING, ["--full"], ["--policy", "streaming"]])
def test_positions_beyond_the_training_are_said_in_one_line(smollm2, cache):
    for n_ctx, said in ((8448, 1), (8192, 0)):
        process = run(
            "chat", smollm2, *cache, "--n-ctx", n_ctx, "--prompt", "Hi", "--max-tokens", 1
        )
        assert process.returncode == 0, process.stderr
        assert process.stderr.count("trained for 8,192") == said
        assert process.stderr.count("\n") == said + 1  # the status


def test_too_little_memory_is_one_line(smollm2):
    process = subprocess.run(
        [QFLLAMA, "chat", str(smollm2), *STREAMING, "--n-ctx", str(2**30), "--prompt", "Hi"],
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 2, process.stderr
    last = process.stderr.splitlines()[-1]  # before it, llama.cpp's warnings about such a length
    assert last.startswith("qfllama: not enough memory for 1,073,741,824 positions")
    assert last.endswith("use a smaller --n-ctx")
    assert "Traceback" not in process.stderr


def test_a_piped_chat_ends_with_1_if_no_message_was_answered(smollm2):
    process = run("chat", smollm2, *STREAMING, "--n-ctx", 512, stdin="word " * 1000 + "\n")
    assert process.returncode == 1
    assert process.stdout == ""
    assert "--n-ctx" in process.stderr
    assert run("chat", smollm2, *STREAMING, stdin="/stats\n").returncode == 0


def test_control_characters_in_an_answer_do_not_reach_a_terminal(llm, monkeypatch):
    """The grammar makes the model write what would colour the screen and set its title."""
    from llama_cpp import LlamaGrammar

    from qfllama.commands import chat
    from qfllama.conversation import Conversation

    grammar = LlamaGrammar.from_string(
        r'root ::= "a" "\x1b" "[31mb" "\x07" "\t" "c" "\n" "d"', verbose=False
    )
    master, slave = pty.openpty()
    with os.fdopen(slave, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        chat.answer(Conversation(llm), "Hi", {"max_tokens": 30, "grammar": grammar})
        terminal.flush()
        monkeypatch.undo()
        shown = b""  # a terminal hands over what it has, not what was written at once
        while not shown.endswith(b"d\r\n") and select.select([master], [], [], 10)[0]:
            shown += os.read(master, 65536)
    os.close(master)
    assert shown.decode() == "a\\x1b[31mb\\x07\tc\r\nd\r\n"


def test_control_characters_in_the_name_of_a_file_do_not_reach_a_terminal(tmp_path):
    path = tmp_path / "\x1b]0;title\x07.gguf"
    path.write_text("not a model at all " * 100)
    process = run("chat", path)
    assert process.returncode == 2
    assert "title" in process.stderr
    assert not set(process.stderr) & {"\x1b", "\x07"}


def test_help_comes_without_loading_the_engine():
    code = (
        "import sys\n"
        "from qfllama.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "print(sorted({'llama_cpp', 'numpy', 'torch', 'jinja2'} & set(sys.modules)))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    *text, loaded = process.stdout.splitlines()
    assert loaded == "[]"
    for name in ("chat", "compress", "convert", "inspect"):
        assert any(line.split()[:1] == [name] for line in text)


# -- Ctrl-C


def start_piped(model, *args):
    """A running chat that reads its messages from a pipe."""
    return subprocess.Popen(
        [QFLLAMA, "chat", str(model), *STREAMING, *GREEDY, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=0,
    )


def test_an_interrupt_while_the_command_is_imported_is_quiet(tmp_path):
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    process = subprocess.run(
        [sys.executable, "-m", "qfllama", "plan", "model.gguf"],
        check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "")
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '\nqfllama = "qfllama.__main__:main"\n' in project


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_an_interrupt_while_the_model_is_loaded_is_not_lost(smollm2):
    process = start_piped(smollm2, "--max-tokens", "200", "--prompt", COUNT)
    maps, end = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
    while str(smollm2) not in maps.read_text():
        assert process.poll() is None
        assert time.monotonic() < end
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGINT, "which a shell shows as 130"
    assert stdout == stderr == ""


def test_an_interrupt_stops_the_answer_and_not_the_program(smollm2):
    process = start_piped(smollm2, "--max-tokens", "200")
    process.stdin.write(COUNT + "\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate("Now say hello.\n", timeout=300)
    assert process.returncode == 0, stderr
    stopped, second = statuses(stderr)
    assert "stopped" in stopped["rest"]
    assert "stopped" not in second["rest"]
    assert stopped["positions"] < second["positions"]
    assert "Traceback" not in stderr


def test_an_interrupted_prompt_ends_with_code_130(smollm2):
    process = start_piped(smollm2, "--max-tokens", "200", "--prompt", COUNT)
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert "stopped" in statuses(stderr)[0]["rest"]
    assert "Traceback" not in stderr


class Terminal:
    """`qfllama ARGS` on a terminal of its own."""

    def __init__(self, *args):
        self.text = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # nohup: ignored
            os.execv(QFLLAMA, [QFLLAMA, *map(str, args)])

    def type(self, text):
        os.write(self.fd, text.encode())

    def expect(self, pattern, timeout=120):
        """Wait until `pattern` shows up; returns and forgets the text up to its end."""
        end = time.monotonic() + timeout
        while not (match := re.search(pattern, self.text)):
            ready, _, _ = select.select([self.fd], [], [], max(0, end - time.monotonic()))
            try:
                data = os.read(self.fd, 65536) if ready else b""
            except OSError:  # the other side is closed
                data = b""
            assert data, f"no {pattern!r} in {self.text!r}"
            self.text += data.decode("utf-8", "replace")
        shown, self.text = self.text[: match.end()], self.text[match.end() :]
        return shown

    def press(self, key, pattern):
        """Type `key` until `pattern` shows up: it is lost if the line editor isn't ready yet."""
        for _ in range(20):
            self.type(key)
            try:
                return self.expect(pattern, timeout=3)
            except AssertionError:
                pass
        raise AssertionError(f"{key!r} typed 20 times, but no {pattern!r}")

    def close(self):
        """Wait for the end of the process; its exit code."""
        _, code = os.waitpid(self.pid, 0)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(code)


def test_on_a_terminal_ctrl_c_stops_answers_and_ctrl_d_leaves(smollm2):
    terminal = Terminal("chat", smollm2, *STREAMING, *GREEDY, "--max-tokens", 200)
    terminal.expect("> ")
    terminal.press("\x03", "/quit or Ctrl-D to leave")  # at the prompt: nothing to stop
    terminal.expect("> ")
    terminal.type(COUNT + "\r")
    terminal.expect(r"per line\.\r\n")
    terminal.expect(r"\w")
    terminal.type("\x03")
    assert "stopped" in terminal.expect(STATUS.pattern)
    terminal.expect("> ")
    terminal.type("Hello\r")
    assert "stopped" not in terminal.expect(STATUS.pattern)
    terminal.expect("> ")
    terminal.press("\x1b[A", "Hello")  # arrow up: the history
    terminal.type("\x15\x04")  # the line away, then the end of the input
    assert terminal.close() == 0
