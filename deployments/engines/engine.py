"""The generation engine: one thread that schedules, runs, samples and emits, step by step.

::

    asyncio:  generate() ──add──► inbox ─┐                       ┌─► mailbox ──► deltas
    thread:                       expire → plan → run → sample → emit     (one hop a step)

Pure Python decides (``scheduler``), torch computes (``runner``), and they meet only here.
Text is made in this thread too: a stop string ends a sequence in the step that completes it.

What goes wrong stays small: an exception in one sequence ends that sequence; a failing
forward pass is told to every request in it, and the engine goes on. Should the thread itself
fail, every request is told, new ones are refused, and ``alive`` is false.

A slot that changes hands is clean, or the next owner would meet a NaN behind its mask: what
no finite logits have vouched for is wiped.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch

from deployments.config import EngineConfig, QueueConfig
from deployments.engines.accounts import Accounts, close
from deployments.engines.adapters import AdapterInfo, AdapterStore, Lease, Resolve
from deployments.engines.admission import Limits, admit, check_tokens, prompt_field
from deployments.engines.computing import Computing
from deployments.engines.grammar import Grammars
from deployments.engines.mailbox import Mailbox
from deployments.engines.output import Output
from deployments.engines.pace import Pace
from deployments.engines.prefixes import PrefixIndex
from deployments.engines.queue import WaitingQueue
from deployments.engines.runner import Runner
from deployments.engines.sampler import Drawn, logprobs_of, sample
from deployments.engines.scheduler import Scheduler
from deployments.engines.sequence import Call, Chunk, Save, Sequence, Step
from deployments.engines.text import TextCodec
from deployments.observability import logs
from deployments.observability.events import (
    BatchFailed,
    BatchRan,
    Emit,
    EngineState,
    RequestPreempted,
    RequestShed,
    RequestStarted,
    discard,
)
from models.contracts import Delta, FinishReason, GenerateRequest, Prompt, Timings, Usage
from models.errors import InternalError, Overloaded, PlatformError, Timeout, Unavailable

logger = logging.getLogger(__name__)


PLACE_S = 1.0
"""How often one that waits is told its place, at most."""
PLACES_S = 0.2
"""How often anybody is: to know one place is to go through the whole queue."""


@dataclass(slots=True)
class _Told:
    """What one that waits has been told."""

    at: float = -inf
    place: tuple[int, int] | None = None


class Engine:
    """A ``Generator`` over one local model.

    Create it anywhere; ``generate`` must be called from one event loop. The constructor waits
    for the model to be loaded, which takes seconds.

    Args:
        name: of the model, for events and messages.
        folder: config.json, safetensors and tokenizer.json.
        config: slots, context, step budget, dtype, device, threads.
        queue: the waiting room.
        resolve: finds the folder of an adapter that ``load_adapter`` was not called for.
        emit: told what happens, from the engine's thread; of full queues, from the caller's; of
            adapters, from whoever loads them.
        clock: seconds, never running backwards.

    Raises:
        ConfigError: the folder does not hold what the engine can run.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        config: EngineConfig,
        queue: QueueConfig,
        *,
        resolve: Resolve | None = None,
        emit: Emit = discard,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._emit = emit
        self._clock = clock
        self._config = config
        self._codec = TextCodec(folder)
        # The inbox, and everything the thread owns while it does not run a step.
        self._lock = threading.Condition()
        self._cancelled: list[Call] = []
        self._closing = False
        self._thread = Computing(config.threads, name=f"engine-{name}")
        self._runner = self._thread.call(lambda: Runner(folder, config))
        self._eos = frozenset(_eos_ids(self._runner))
        self._limits = Limits(
            context=self._runner.context,
            vocabulary=self._runner.vocab_size,
            max_choices=config.max_choices,
        )
        self._pace = Pace(config.stretch)
        self._scheduler = Scheduler(
            WaitingQueue(queue.classes(), capacity=queue.together, clock=clock),
            slots=config.slots,
            step_tokens=config.step_tokens,
            pace=self._pace,
            preemption=config.preemption,
            prefixes=PrefixIndex(self._runner.blocks),
            shared=config.prefix_cache.shared,
            clock=clock,
        )
        self._grammars = Grammars(self._codec.serialised, self._runner.vocab_size, self._eos)
        self._adapters = AdapterStore(
            name,
            self._runner.open_adapter,
            max_bytes=int(config.adapters.memory_mb * 2**20),
            resolve=resolve,
            emit=emit,
            clock=clock,
        )
        self._outputs: dict[Sequence, Output] = {}
        self._mailboxes: dict[Call, Mailbox] = {}
        self._posts: list[tuple[Mailbox, Delta | PlatformError]] = []
        self._saves: list[Save] = []
        """Of this step: to be kept before any of these slots changes hands."""
        self.accounts = Accounts()
        """Of requests with a receipt."""
        self._hopeful: dict[Call, _Told] = {}
        """Those that wait and want to know where they stand."""
        self._places_told = -inf
        self._state: EngineState | None = None
        self._thread.run(self._loop)

    @property
    def context(self) -> int:
        """Tokens of prompt and output together."""
        return self._runner.context

    @property
    def cache_bytes(self) -> int:
        """Memory the KV slots take once every position has been used."""
        return self._runner.cache.reserved_bytes

    @property
    def alive(self) -> bool:
        return self._thread.alive

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """See ``models.contracts.Generator``."""
        arrived = self._clock()
        account = self.accounts.open(request.receipt)
        lease: Lease | None = None
        submitted = False
        try:
            prompt = await self._codec.encode(request.prompt)
            call = admit(request, prompt, self._limits, arrived=arrived)
            call.account = account
            if (grammar := request.sampling.grammar) is not None:
                call.constraint = await self._grammars.compiled(grammar)
            mailbox = Mailbox(asyncio.get_running_loop())
            lease = await self._lease(call)
            self._submit(call, mailbox)
            submitted = True
            try:
                while True:
                    for delta in await mailbox.take():
                        yield delta
                        if delta.usage is not None:
                            return
            finally:
                if not mailbox.finished:
                    self._cancel(call)
        finally:
            if lease is not None:
                lease.release()
            if not submitted:
                close(account)
            self.accounts.leave(request.receipt)

    async def spent(self, request: GenerateRequest) -> Usage | None:
        """See ``models.contracts.Accountable``."""
        return None if request.receipt is None else await self.accounts.spent(request.receipt)

    async def tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        """See ``models.contracts.Tokenizes``."""
        tokens = await self._codec.encode(prompt)
        check_tokens(prompt_field(prompt), tokens, self._limits.vocabulary)
        return tokens

    async def detokenize(self, tokens: Items[int]) -> str:
        """See ``models.contracts.Tokenizes``."""
        check_tokens("tokens", tokens, self._limits.vocabulary)
        return await self._codec.spell(tokens)

    # --- called from any thread ---------------------------------------------------------

    def load_adapter(self, name: str, folder: Path) -> AdapterInfo:
        """Serve a PEFT LoRA adapter as ``GenerateRequest.adapter``; a newer version of the same
        name takes the place of the older one. Blocks while it reads; the engine goes on.

        Raises:
            InvalidInput: not an adapter that this model can serve; the message says why.
            Overloaded: there is no room while the others are in use.
        """
        return self._adapters.load(name, folder)

    def unload_adapter(self, name: str) -> None:
        """Requests that began with it end with it.

        Raises:
            NotFound: there is none of that name; the message names the others.
        """
        self._adapters.unload(name)

    def adapters(self) -> tuple[AdapterInfo, ...]:
        """By name: those in memory, and those that the next request would bring back."""
        return self._adapters.list()

    def close(self) -> None:
        """Stop after the running step; requests still in flight get ``Unavailable``."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        self._thread.join()
        self._adapters.close()
        self._runner.close()

    # --- called from asyncio ------------------------------------------------------------

    async def _lease(self, call: Call) -> Lease | None:
        """The call's adapter, in memory until the lease is released."""
        name = call.request.adapter
        if name is None:
            return None
        left = call.deadline - self._clock()
        lease = await self._adapters.lease(name, timeout_s=None if left == inf else left)
        call.adapter = lease.adapter
        return lease

    def _submit(self, call: Call, mailbox: Mailbox) -> None:
        try:
            with self._lock:
                if self._closing:
                    raise Unavailable(f"The engine of {self.name} is stopping.", retry_after=1)
                gone = self._scheduler.add(call)
                if gone is not None:
                    self._displace(gone)
                self._mailboxes[call] = mailbox
                if call.request.tell_place and call.request.stream:
                    self._hopeful[call] = _Told()
                self._lock.notify()
        except Overloaded:
            self._shed(call, "full")
            raise

    def _displace(self, call: Call) -> None:
        """Tell at once whoever lost its place to another: a step may take long. Holds the lock."""
        error = self._scheduler.queue.overloaded(call.request.priority)
        mailbox = self._mailboxes[call]
        self._drop(call, "displaced")
        Mailbox.deliver([(mailbox, error)])

    def _cancel(self, call: Call) -> None:
        with self._lock:
            self._cancelled.append(call)
            self._lock.notify()

    # --- the thread ---------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            while not self._closing:
                self._turn()
        except Exception:
            logger.exception("the engine of %s failed and stops", self.name)
        finally:
            self._refuse_all()

    def _turn(self) -> None:
        """Wait for work, do one step of it, and tell."""
        with self._lock:
            while not (self._closing or self._cancelled) and self._scheduler.idle:
                self._lock.wait()
            if self._closing:
                return
            step = self._schedule()
        self._post()  # whoever is late need not wait for a step that is not theirs
        if step is not None:
            began = self._clock()
            ran = self._run(step)
            self._post()  # whoever waits for the last word does not wait for what follows
            if ran:
                self._close_step(step, began)
        self._report_state()

    def _schedule(self) -> Step | None:
        """Let go who left or is late; then the next step. Holds the lock."""
        for call in self._cancelled:
            if call in self._mailboxes:
                reason = "cancelled" if call.started is None else None
                self._drop(call, reason)
        self._cancelled.clear()
        for call in self._scheduler.expire():
            waited = call.started is None
            where = "waiting for its turn" if waited else "being answered"
            after = self._clock() - call.arrived
            error = Timeout(
                f"The deadline passed after {after:.1f} s, while the request was {where}.",
                details={"phase": "queue" if waited else "generation"},
            )
            self._posts.append((self._mailboxes[call], error))
            self._drop(call, "expired" if waited else None)
        plan = self._scheduler.plan()
        for call in plan.preempted:
            self._emit(RequestPreempted(model=self.name, priority=call.request.priority))
        for call in plan.started:
            self._start(call)
        if self._hopeful:
            self._tell_places()
        return plan.step

    def _tell_places(self) -> None:
        """To those whose place has changed, to each at most once in ``PLACE_S``."""
        now = self._clock()
        if now - self._places_told < PLACES_S:
            return
        self._places_told = now
        for ticket, place in self._scheduler.queue.places():
            told = self._hopeful.get(ticket.item)
            if told is None or now - told.at < PLACE_S:
                continue
            if (place.position, place.waiting) != told.place:
                told.at, told.place = now, (place.position, place.waiting)
                self._posts.append((self._mailboxes[ticket.item], Delta(place=place)))

    def _start(self, call: Call) -> None:
        assert call.started is not None
        self._hopeful.pop(call, None)
        for sequence in call.sequences:
            self._outputs[sequence] = Output(sequence, self._codec, self._eos)
        self._emit(
            RequestStarted(
                model=self.name,
                priority=call.request.priority,
                queue_s=call.started - call.arrived,
            )
        )

    def _run(self, step: Step) -> bool:
        """Whether it came to its end; what there is to tell is in ``_posts``."""
        try:
            logits, chunks, predicted = self._runner.run(step)
            for chunk, rows in predicted:
                self._read(chunk, rows)
            drawn = sample(logits, [self._outputs[c.sequence].sampler for c in chunks])
        except Exception as error:  # whatever it was, these requests must hear of it
            self._fail_step(step, error)
            return False
        with self._lock:
            self._scheduler.commit(step)
            for chunk, row in zip(chunks, drawn, strict=True):
                self._advance(chunk, row)
        return True

    def _close_step(self, step: Step, began: float) -> None:
        self._save()  # without the lock: whoever submits need not wait for bytes to be copied
        took = self._clock() - began
        prefill_tokens, decode_tokens = step.prefill_tokens, step.decode_tokens
        self._pace.measured(
            decode_tokens=decode_tokens, prefill_tokens=prefill_tokens, seconds=took
        )
        self._emit(
            BatchRan(
                model=self.name,
                rows=len(step.chunks),
                duration_s=took,
                prefill_tokens=prefill_tokens,
                decode_tokens=decode_tokens,
            )
        )

    def _read(self, chunk: Chunk, logits: torch.Tensor) -> None:
        """Tell a sequence how likely its prompt was, as far as this chunk reads it in."""
        sequence, first = chunk.sequence, chunk.start + 1
        tokens = sequence.tokens[first : first + chunk.predicts]
        likely = logprobs_of(logits, tokens, sequence.call.request.sampling.logprobs or 0)
        self._outputs[sequence].read(first, tokens, likely)

    def _advance(self, chunk: Chunk, drawn: Drawn) -> None:
        """Take one drawn token into its sequence. Its failure is its own."""
        sequence = chunk.sequence
        call = sequence.call
        if drawn.token is None:
            self._runner.wipe(chunk.slot, sequence.computed)
        if sequence.finished:  # a sibling's failure ended the whole call in this very step
            return
        try:
            if drawn.token is None:
                raise InternalError("The model gave logits that are not finite numbers.")
            if call.first_token is None:
                call.first_token = self._clock()
            delta = self._accept(sequence, drawn, drawn.token)
        except Exception as error:  # one sequence, not the batch
            if not isinstance(error, PlatformError):
                logger.exception(
                    "sequence of request %s failed", call.request.id, extra=logs.about(call.request)
                )
                error = InternalError(f"Generating this answer failed: {error}")
            self._posts.append((self._mailboxes[call], error))
            self._drop(call, None)
            return
        if (sequence.finished or sequence.generated == 1) and (
            save := self._scheduler.keep(sequence, chunk.slot)
        ):
            self._saves.append(save)
        if delta is not None:
            self._posts.append((self._mailboxes[call], delta))
        if sequence.finished and call.done:
            self._drop(call, None)

    def _save(self) -> None:
        if not self._saves:
            return
        saves, self._saves = self._saves, []
        time.sleep(0)  # the interpreter to asyncio first, which has a last word to hand on
        try:
            self._runner.save(saves)
        except Exception:
            logger.exception("what was computed could not be kept for later requests")
            with self._lock:
                self._scheduler.forget_kept()

    def _accept(self, sequence: Sequence, drawn: Drawn, token: int) -> Delta | None:
        """Add a token; the delta to send now, if any."""
        output = self._outputs[sequence]
        sequence.tokens.append(token)
        if output.add(token, drawn):
            return self._finish(sequence, output, FinishReason.STOP)
        if sequence.generated >= sequence.max_tokens:
            return self._finish(sequence, output, FinishReason.LENGTH)
        return output.delta() if sequence.call.request.stream else None

    def _finish(self, sequence: Sequence, output: Output, reason: FinishReason) -> Delta:
        self._scheduler.finish(sequence)
        call = sequence.call
        if not call.done:
            return output.delta(reason)
        return output.delta(reason, call.usage, self._timings(call))

    def _timings(self, call: Call) -> Timings:
        now = self._clock()
        assert call.started is not None
        assert call.first_token is not None
        return Timings(
            queue_s=call.started - call.arrived,
            prefill_s=call.first_token - call.started,
            ttft_s=call.first_token - call.arrived,
            decode_s=now - call.first_token,
            total_s=now - call.arrived,
        )

    def _fail_step(self, step: Step, error: Exception) -> None:
        """Tell every request whose keys and values the failed pass was to write."""
        with self._lock:
            hit = [s for s in self._scheduler.running() if s.slot in step.written]
            calls = {sequence.call: None for sequence in hit}
            for sequence in hit:
                assert sequence.slot is not None
                self._runner.wipe(sequence.slot, len(sequence.tokens))
            for call in calls:
                failure = InternalError("The step that computed this answer failed; retry.")
                self._posts.append((self._mailboxes[call], failure))
                self._drop(call, None)
        ids = ", ".join([call.request.id for call in calls])
        logger.error("step with %d requests failed: %s", len(calls), ids, exc_info=error)
        self._emit(BatchFailed(model=self.name, rows=len(step.chunks), error=repr(error)))

    def _drop(self, call: Call, shed: str | None) -> None:
        """Forget a call; its slots are free."""
        for sequence in call.sequences:
            if sequence.slot is not None and not sequence.generated:  # no logits seen so far
                self._runner.wipe(sequence.slot, sequence.computed)
        close(call.account, call.usage)  # before its sequences are let go
        self._scheduler.cancel(call)
        self._mailboxes.pop(call, None)
        self._hopeful.pop(call, None)
        for sequence in call.sequences:
            self._outputs.pop(sequence, None)
        if shed is not None:
            self._shed(call, shed)

    def _shed(self, call: Call, reason: str) -> None:
        self._emit(RequestShed(model=self.name, priority=call.request.priority, reason=reason))

    def _post(self) -> None:
        """Everything this step made crosses to asyncio in one hop."""
        if self._posts:
            posts, self._posts = self._posts, []
            if not Mailbox.deliver(posts):
                with self._lock:
                    self._cancelled += [c for c, box in self._mailboxes.items() if box.lost]

    def _report_state(self) -> None:
        with self._lock:
            state = EngineState(
                model=self.name,
                running=self._scheduler.running_count,
                waiting=self._scheduler.queue.depth(),
            )
        if state != self._state:
            self._state = state
            self._emit(state)

    def _refuse_all(self) -> None:
        with self._lock:
            self._closing = True
            gone = Unavailable(f"The engine of {self.name} is stopping; retry.", retry_after=1)
            self._posts += [(mailbox, gone) for mailbox in self._mailboxes.values()]
            for call in self._mailboxes:
                close(call.account, call.usage)
            self._mailboxes.clear()
        self._post()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every invariant holds; for tests, between steps."""
        with self._lock:
            self._scheduler.check_integrity()
            for sequence in self._scheduler.running():
                assert sequence in self._outputs
                assert sequence.call in self._mailboxes
            if self._scheduler.idle:
                assert not self._outputs
                assert not self._mailboxes
                assert not self._hopeful
        self._adapters.check_integrity()


def _eos_ids(runner: Runner) -> list[int]:
    """End-of-sequence tokens, of the generation config before the model's."""
    for config in (runner.model.generation_config, runner.model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []
