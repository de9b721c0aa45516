"""One Llama used by several threads, asyncio tasks and processes: calls take turns, streams are one
turn each, a forked copy says what is wrong."""

import asyncio
import gc
import multiprocessing
import os
import threading
import traceback
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from qfllama import Conversation, Llama, QFilterConfig, QFilterError

PROMPTS = ["The sky is", "Once upon a time", "My name is", "The capital of France"]
SMALL = QFilterConfig(max_length=128, window_length=32, interval=32, policy="knorm")
N_TOKENS = 8


@pytest.fixture(scope="module")
def llm(smollm2):
    llm = Llama(
        str(smollm2), qfilters=SMALL, n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False
    )
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def expected(llm) -> dict[str, str]:
    """What one thread alone gets."""
    return {prompt: answer(llm, prompt) for prompt in PROMPTS}


def answer(llm, prompt) -> str:
    return text(llm.create_completion(prompt, max_tokens=N_TOKENS, temperature=0))


def stream(llm, prompt):
    return llm.create_completion(prompt, max_tokens=N_TOKENS, temperature=0, stream=True)


def text(completion) -> str:
    return completion["choices"][0]["text"]


def in_threads(*functions) -> list:
    """What the functions return, each called in a thread of its own, all at once."""
    results = [None] * len(functions)

    def run(i, function):
        results[i] = function()

    threads = [
        threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(functions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "it waits for ever"
    return results


def started(function) -> tuple[threading.Thread, list]:
    """A thread that runs the function, and the list that gets the result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    return thread, results


def ends(thread) -> bool:
    thread.join(60)
    return not thread.is_alive()


def test_answers_of_threads_at_once_are_those_of_one_thread(llm, expected):
    found = in_threads(*(lambda prompt=prompt: answer(llm, prompt) for prompt in PROMPTS))
    assert found == list(expected.values())


def test_streams_of_threads_at_once_are_those_of_one_thread(llm, expected):
    found = in_threads(
        *(lambda prompt=prompt: "".join(map(text, stream(llm, prompt))) for prompt in PROMPTS)
    )
    assert found == list(expected.values())


def test_chats_of_threads_at_once_are_those_of_one_thread(llm):
    def ask(question):
        message = {"role": "user", "content": question}
        pieces = llm.create_chat_completion(
            [message], max_tokens=N_TOKENS, temperature=0, stream=True
        )
        return "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)

    alone = [ask(question) for question in PROMPTS]
    assert in_threads(*(lambda question=question: ask(question) for question in PROMPTS)) == alone


def test_conversations_of_threads_on_one_llama_are_those_of_one_thread(llm):
    def talk(question):
        conversation = Conversation(llm)
        return [
            "".join(conversation.ask(words, max_tokens=N_TOKENS, temp=0.0))
            for words in (question, "Go on.")
        ]

    alone = [talk(question) for question in PROMPTS[:2]]
    together = in_threads(*(lambda question=question: talk(question) for question in PROMPTS[:2]))
    assert together == alone


def test_another_thread_waits_until_a_stream_has_ended(llm, expected):
    pieces = stream(llm, PROMPTS[0])
    start = text(next(pieces))
    thread, results = started(lambda: answer(llm, PROMPTS[1]))
    looking, stats = started(llm.qfilter_stats)
    thread.join(1)
    assert thread.is_alive() and looking.is_alive() and not results and not stats
    assert start + "".join(map(text, pieces)) == expected[PROMPTS[0]]
    assert ends(thread) and ends(looking)
    assert results == [expected[PROMPTS[1]]]


@pytest.mark.parametrize("end", ["closed", "collected"])
def test_another_thread_gets_its_turn_when_a_stream_is_left(llm, expected, end):
    pieces = stream(llm, PROMPTS[0])
    next(pieces)
    thread, results = started(lambda: answer(llm, PROMPTS[1]))
    if end == "closed":
        pieces.close()
    else:
        del pieces
        gc.collect()
    assert ends(thread)
    assert results == [expected[PROMPTS[1]]]


def test_a_stream_that_was_left_in_a_cycle_of_references_keeps_nobody_out(llm, expected):
    gc.disable()  # it might run by chance
    try:
        pieces = stream(llm, PROMPTS[0])
        next(pieces)
        cycle = [pieces]
        cycle.append(cycle)
        del pieces, cycle
        thread, results = started(lambda: answer(llm, PROMPTS[1]))
        assert ends(thread)
    finally:
        gc.enable()
    assert results == [expected[PROMPTS[1]]]


def test_a_llama_that_dies_with_its_stream_is_not_waited_for(smollm2):
    """Both are in a cycle of references, and another thread took the pieces."""
    llm = Llama(str(smollm2), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    llm.mine = llm.create_completion("Once", max_tokens=8, stream=True)
    taker = threading.Thread(target=next, args=(llm.mine,))
    taker.start()
    taker.join()
    model = weakref.ref(llm._model)
    del llm
    collector = threading.Thread(target=gc.collect, daemon=True)
    collector.start()
    collector.join(60)
    assert not collector.is_alive() and model() is None


def test_code_that_leaves_its_own_stream_ends_it_with_its_next_call(llm, expected):
    for piece in (pieces := stream(llm, PROMPTS[0])):
        assert text(piece)
        break
    assert answer(llm, PROMPTS[1]) == expected[PROMPTS[1]]
    with pytest.raises(QFilterError, match="ended"):
        next(pieces)
    assert answer(llm, PROMPTS[2]) == expected[PROMPTS[2]]


def test_a_stream_taken_over_by_another_thread_is_not_ended_by_the_first(llm, expected):
    pieces = stream(llm, PROMPTS[0])
    start = text(next(pieces))
    (more,) = in_threads(lambda: text(next(pieces)))
    thread, results = started(lambda: "".join(map(text, pieces)))
    assert answer(llm, PROMPTS[1]) == expected[PROMPTS[1]], "waits for it"
    assert ends(thread)
    assert start + more + results[0] == expected[PROMPTS[0]]


def test_calls_within_a_stream_of_the_same_thread_belong_to_it(llm, expected):
    def watch(input_ids, scores):
        assert llm.qfilter_stats()["cells_used"] == len(input_ids)
        return scores

    pieces = llm.create_completion(
        PROMPTS[0], max_tokens=N_TOKENS, temperature=0, stream=True, logits_processor=[watch]
    )
    found = "".join(map(text, pieces))
    assert found == expected[PROMPTS[0]]


def test_a_failed_stream_lets_others_in(llm, expected):
    class Failing:
        def __iter__(self):
            raise KeyError("on purpose")

    with pytest.raises(KeyError):
        list(llm.generate(Failing()))
    (found,) = in_threads(lambda: answer(llm, PROMPTS[1]))
    assert found == expected[PROMPTS[1]]


# -- asyncio


def test_tasks_that_call_from_threads_get_the_answers_of_one_thread(llm, expected):
    async def piecewise(prompt):
        pieces, found = await asyncio.to_thread(stream, llm, prompt), ""
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            found += text(piece)
        return found

    async def all_at_once():
        # one for each task: all of a smaller pool may wait for a stream whose next piece needs one
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2 * len(PROMPTS)))
        whole = [asyncio.to_thread(answer, llm, prompt) for prompt in PROMPTS]
        return await asyncio.gather(*map(piecewise, PROMPTS), *whole)

    found = asyncio.run(asyncio.wait_for(all_at_once(), 120))
    assert found == list(expected.values()) * 2


def test_a_task_that_would_stop_its_own_event_loop_is_told(llm, expected):
    async def one_streams_another_calls():
        pieces = await asyncio.to_thread(stream, llm, PROMPTS[0])
        start = text(await asyncio.to_thread(next, pieces))
        with pytest.raises(QFilterError, match="event loop.*to_thread"):
            answer(llm, PROMPTS[1])
        return start + "".join(map(text, pieces))

    assert asyncio.run(one_streams_another_calls()) == expected[PROMPTS[0]]
    assert answer(llm, PROMPTS[1]) == expected[PROMPTS[1]]


# -- fork

USES = {
    "complete": lambda llm: llm.create_completion("Hi", max_tokens=1),
    "stream": lambda llm: list(llm.create_completion("Hi", max_tokens=1, stream=True)),
    "eval": lambda llm: llm.eval([5]),
    "stats": lambda llm: llm.qfilter_stats(),
    "kept": lambda llm: llm.kept_positions(0, 0),
    "compress": lambda llm: llm.compress(ratio=2),
    "save": lambda llm: llm.save_state(),
    "reset": lambda llm: llm.reset(),
}


def try_all(llm, queue) -> None:
    """In a child: the names of what was refused with the reason, and of what was not."""
    for name, use in USES.items():
        try:
            use(llm)
            queue.put((name, "worked"))
        except QFilterError as error:
            queue.put((name, "fork" in str(error)))
        except BaseException:
            queue.put((name, traceback.format_exc()))
    llm.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_refused_each_use_of_its_parents_llama(llm, expected):
    """Also while another thread of the parent has its turn, which in the child nobody has."""
    pieces = stream(llm, PROMPTS[0])
    start = text(next(pieces))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=try_all, args=(llm, queue))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert {name: result for name, result in (queue.get() for _ in USES)} == dict.fromkeys(
        USES, True
    )
    assert start + "".join(map(text, pieces)) == expected[PROMPTS[0]], "the parent's is whole"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_ends_without_freeing_what_is_its_parents(llm, expected):
    pieces = stream(llm, PROMPTS[0])
    next(pieces)
    child = os.fork()
    if child == 0:
        pieces.close()
        pieces = None
        llm.close()
        gc.collect()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    pieces.close()
    assert answer(llm, PROMPTS[1]) == expected[PROMPTS[1]]
