"""Nothing is lost, reordered or hoarded between the engine's thread and its consumers."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.engines.mailbox import Mailbox, merge
from models.contracts import Delta, FinishReason, Timings, TokenLogprob, Usage
from models.errors import InternalError

USAGE = Usage(prompt_tokens=1, completion_tokens=1)
TIMINGS = Timings(queue_s=0, prefill_s=0, ttft_s=0, decode_s=0, total_s=0)


def delta(index: int, token: int) -> Delta:
    logprob = TokenLogprob(token_id=token, token=str(token), logprob=-1.0)
    return Delta(index=index, text=f"{token} ", token_ids=(token,), logprobs=(logprob,))


def last(index: int) -> Delta:
    return Delta(index=index, finish_reason=FinishReason.STOP, usage=USAGE, timings=TIMINGS)


@given(
    st.lists(
        st.just("take") | st.integers(0, 3),
        max_size=40,
    )
)
def test_any_mixture_of_posts_and_takes(actions: list[str | int]) -> None:
    async def run() -> None:
        mailbox = Mailbox(asyncio.get_running_loop())
        sent: dict[int, list[int]] = defaultdict(list)
        got: dict[int, list[int]] = defaultdict(list)
        text: dict[int, str] = defaultdict(str)

        async def take() -> list[Delta]:
            deltas = await asyncio.wait_for(mailbox.take(), 1)
            assert len({d.index for d in deltas}) == len(deltas), "one delta a choice"
            for d in deltas:
                got[d.index] += d.token_ids
                text[d.index] += d.text
                assert [p.token_id for p in d.logprobs or ()] == list(d.token_ids)
            return deltas

        for token, action in enumerate(actions):
            if isinstance(action, int):
                mailbox.put(delta(action, token))
                sent[action].append(token)
            elif sent != got:
                await take()
                assert sent == got
        assert not mailbox.finished
        mailbox.put(last(9))
        assert mailbox.finished
        deltas = await take()
        assert deltas[-1].usage == USAGE, "what ends the request comes last"
        assert got.pop(9) == []
        assert got == sent
        assert {i: t for i, t in text.items() if t} == {
            i: "".join(f"{token} " for token in tokens) for i, tokens in sent.items()
        }

    asyncio.run(run())


def test_merging_keeps_the_end() -> None:
    first, second = delta(2, 7), last(2)
    merged = merge(first, second)
    assert merged == Delta(
        index=2,
        text="7 ",
        token_ids=(7,),
        logprobs=first.logprobs,
        finish_reason=FinishReason.STOP,
        usage=USAGE,
        timings=TIMINGS,
    )
    plain = merge(Delta(text="a"), Delta(text="b"))
    assert (plain.text, plain.logprobs) == ("ab", None)


async def test_an_error_is_raised_after_what_came_before_it() -> None:
    mailbox = Mailbox(asyncio.get_running_loop())
    mailbox.put(delta(0, 1))
    mailbox.put(InternalError("broken"))
    assert mailbox.finished
    assert [d.token_ids for d in await mailbox.take()] == [(1,)]
    with pytest.raises(InternalError, match="broken"):
        await mailbox.take()


async def test_one_wake_up_for_a_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    calls: list[Any] = []
    forward: Callable[..., Any] = loop.call_soon_threadsafe

    def counted(*args: Any) -> Any:
        calls.append(args)
        return forward(*args)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    mailboxes = [Mailbox(loop) for _ in range(5)]
    posts = [(m, delta(0, i)) for i, m in enumerate(mailboxes)]
    thread = threading.Thread(target=Mailbox.deliver, args=(posts,))
    thread.start()
    taken = await asyncio.gather(*(m.take() for m in mailboxes))
    thread.join()
    assert [deltas[0].token_ids for deltas in taken] == [(i,) for i in range(5)]
    assert len(calls) == 1


async def test_a_closed_loop_disturbs_nobody_else() -> None:
    gone = asyncio.new_event_loop()
    lost, living = Mailbox(gone), Mailbox(asyncio.get_running_loop())
    assert Mailbox.deliver([(lost, delta(0, 1))])
    gone.close()
    assert not Mailbox.deliver([(lost, delta(0, 1)), (living, delta(0, 2))])
    assert lost.lost
    assert not living.lost
    assert [d.token_ids for d in await living.take()] == [(2,)]
