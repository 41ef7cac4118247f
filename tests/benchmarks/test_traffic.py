"""What requests of each workload share, and with whom."""

from __future__ import annotations

import base64
import io
from collections import Counter

import pytest
from PIL import Image

from relay_benchmarks.traffic import Ask, Traffic, Workload, distinct_contexts, make_requests

TEXT = [workload for workload in Workload if workload not in (Workload.NONE, Workload.IMAGE)]


def traffic(workload: Workload, **changes: object) -> Traffic:
    plain = {"requests": 64, "shared_tokens": 80, "question_tokens": (3, 9), "contexts": 4}
    return Traffic(workload=workload, **{**plain, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("workload", list(Workload))
def test_a_seed_makes_the_same_requests_and_another_does_not(workload: Workload) -> None:
    first = make_requests(traffic(workload), 1)
    assert first == make_requests(traffic(workload), 1)
    assert first != make_requests(traffic(workload), 2)


@pytest.mark.parametrize("workload", TEXT)
def test_every_request_shares_as_many_words_as_asked_for(workload: Workload) -> None:
    requests = make_requests(traffic(workload), 0)
    assert {len(ask.shared.split()) for ask in requests} == {80}
    assert {len(ask.question.split()) for ask in requests} <= set(range(3, 10))
    assert min(Counter(ask.shared for ask in requests).values()) >= 2  # with somebody


@pytest.mark.parametrize("workload", TEXT)
def test_longer_words_are_fewer(workload: Workload) -> None:
    (ask, *_) = make_requests(traffic(workload), 0, tokens_per_word=2.0)
    assert len(ask.shared.split()) == 40


def test_another_round_asks_other_questions_about_the_same() -> None:
    first, second = (make_requests(traffic(Workload.RAG), 0, number=number) for number in (0, 1))
    assert {ask.shared for ask in first} == {ask.shared for ask in second}
    assert not {ask.question for ask in first} & {ask.question for ask in second}


def test_a_chat_has_one_system_prompt_and_nothing_else_in_common() -> None:
    requests = make_requests(traffic(Workload.CHAT), 0)
    assert len({ask.shared for ask in requests}) == 1
    assert len({ask.question for ask in requests}) == 64


def test_tenants_are_as_unequal_as_zipf_says() -> None:
    shares = [
        sorted(
            Counter(
                ask.shared for ask in make_requests(traffic(Workload.TENANTS, requests=4000, zipf=zipf), 0)
            ).values()
        )
        for zipf in (0.0, 1.0)
    ]
    assert len(shares[0]) == len(shares[1]) == 4
    assert shares[0][-1] / shares[0][0] < 1.2
    assert 3 < shares[1][-1] / shares[1][0] < 5.5  # the first of four has four times the share of the last


def test_documents_begin_alike_and_go_on_apart() -> None:
    texts = sorted({ask.shared for ask in make_requests(traffic(Workload.RAG), 0)})
    assert len(texts) == 4
    assert len({tuple(text.split()[:10]) for text in texts}) == 1
    assert len({text.split()[10] for text in texts}) > 1


def test_agents_make_a_tree() -> None:
    texts = {tuple(ask.shared.split()) for ask in make_requests(traffic(Workload.AGENT), 0)}
    assert [len({text[:depth] for text in texts}) for depth in (40, 60, 80)] == [1, 4, 8]


def test_nothing_is_shared_where_nothing_is_to_be() -> None:
    requests = make_requests(traffic(Workload.NONE, shared_tokens=0), 0)
    assert {ask.shared for ask in requests} == {""}
    assert distinct_contexts(requests) == []


def test_all_ask_about_one_picture_which_comes_before_the_question() -> None:
    requests = make_requests(traffic(Workload.IMAGE, shared_tokens=0), 0)
    assert len({ask.picture for ask in requests}) == 1
    (message,) = requests[0].messages()
    picture, question = message["content"]  # type: ignore[misc]
    assert question == {"type": "text", "text": requests[0].question}
    Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].partition(",")[2]))).verify()


def test_a_prompt_and_a_chat_begin_with_what_is_shared() -> None:
    ask = Ask("You are kind.", "Why?")
    assert ask.prompt() == "You are kind. Why?"
    assert [message["role"] for message in ask.messages()] == ["system", "user"]
    assert Ask("", "Why?").messages() == [{"role": "user", "content": "Why?"}]


def test_each_context_is_cached_once() -> None:
    requests = make_requests(traffic(Workload.AGENT), 0)
    contexts = distinct_contexts(requests)
    assert sorted(ask.shared for ask in contexts) == sorted({ask.shared for ask in requests})
    assert {ask.question for ask in contexts} == {"Hello"}
