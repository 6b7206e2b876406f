"""The messages between gateway and pods: token ids, never text.

Every message is a msgspec struct, sent as JSON. Unknown fields are ignored, so that a gateway and
a pod of neighbouring versions understand each other; a field's meaning never changes.

Epochs (docs/design/contract.md): the gateway numbers each attempt of a stream; a pod stamps what
it sends with the epoch of the attempt, and whoever receives something of an older epoch drops it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from tandem_runtime.device_report import DeviceReport


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a stream's tokens are chosen; complete, so that any pod can continue the stream.

    The noise of position p is a counter-based function of (seed, p, token id): there is no
    generator state to carry from pod to pod.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    """None: none; 0: the chosen token's; n: also the n most likely tokens'."""
    top_k: int = 0
    """0: all."""
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """Least probability of a token, as a share of the likeliest one's."""
    repetition_penalty: float = 1.0
    """Divides positive logits, multiplies negative ones, of tokens of prompt and output."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens of the output."""
    frequency_penalty: float = 0.0
    """The same, for each time that the token is in the output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit); an id at most once."""
    min_tokens: int = 0
    """Until so many are generated, none of `stop_token_ids` is chosen."""
    grammar: str = ""
    """What the output must be, in llguidance's form (JSON or Lark); empty: anything."""

    @property
    def penalises(self) -> bool:
        return bool(
            self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        )

    @property
    def needs_history(self) -> bool:
        """Whether a token's choice needs the ids of those before it, not the logits alone."""
        return self.penalises or bool(self.grammar)

    @property
    def adjusts_logits(self) -> bool:
        """Whether logits are changed before temperature, top-k, top-p and min-p look at them."""
        return self.needs_history or bool(self.logit_bias) or self.min_tokens > 0


class PrefillTarget(msgspec.Struct, frozen=True):
    """The pod that a decode pod asks for a stream's KV cache."""

    pod: str
    host: str
    port: int


class Named(msgspec.Struct, frozen=True):
    """The named context that a prompt begins with."""

    id: str
    made_unix_s: float
    """Which content of that id: what is made later is another one."""
    tokens: int
    """Of the prompt, that are the context's."""


class GenerateRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One attempt of a stream. `output_ids` holds what earlier attempts already generated."""

    stream_id: str
    epoch: int
    prompt_ids: list[int]
    sampling: Sampling
    output_ids: list[int] = []
    prefill: PrefillTarget | None = None
    """None: compute the prompt here (aggregated pools, and a decode pod without a partner)."""
    tenant: str = "default"
    cache_salt: str = ""
    holder: PrefillTarget | None = None
    """A pod that holds more of the prompt than the one that computes it; its port is HTTP's."""
    context: str = ""
    """The named context that the prompt begins with; its metering is the gateway's."""
    begins: Named | None = None
    """The same, as those who hash the prompt know it."""
    take_from: PrefillTarget | None = None
    """The pod that decodes the stream now: take it over while it runs. That pod's attempt goes on
    until the first event of this one."""
    journal: bytes = b""
    """What a gateway needs to go on with the answer that the stream is of; the pod only keeps it.
    Empty: nobody can, and the stream ends with its connection. Otherwise its pod keeps the stream
    for a while when the connection breaks, and its tokens beyond its end; a newer attempt of it on
    that pod goes on with it behind `output_ids`."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithm of a token's probability before temperature and top-p."""

    token_id: int
    logprob: float


class Handoff(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a stream's KV handoff moved."""

    prefill_pod: str
    tokens: int
    bytes: int
    duration_s: float
    """From the first to the last byte received."""


class GenerateEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the answer to a `GenerateRequest`.

    A line carries tokens, the end of the stream, or an error; never tokens after an end.
    """

    epoch: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each token of `token_ids`, when asked for."""
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    finish_reason: Literal["stop", "length", "abort"] | None = None
    """The engine's `abort` is an error here: `not_finite`."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose KV came from a prefix cache (on the prefill pod when there is one)."""
    queue_s: float = 0.0
    handoff: Handoff | None = None
    error: str | None = None
    """A sentence for the user."""
    error_code: str | None = None
    """Retryable: `draining`, `prefill_lost`, `overloaded`, `lease_expired`, `internal`, `moved`
    (the stream goes on elsewhere), `not_moved` (it goes on where it was). Not: `bad_request` (the
    client's fault), `not_finite` (the model's output is not a number), `superseded` (a newer
    attempt of the stream has begun, by another gateway)."""
    retryable: bool = False
    taken_over: bool = False
    """The first event of an attempt with `take_from`: the stream goes on here. `token_ids` are all
    that the other pod generated after the request's `output_ids`, sent by it or not."""
    failed_pod: str | None = None
    """Name of the pod at fault, where it is not the one that answers."""


class HeldStream(msgspec.Struct, frozen=True):
    """A stream that a pod has, or keeps beyond its end, and all that came of it."""

    request: GenerateRequest
    """As of its beginning, but with the epoch of the newest attempt."""
    so_far: GenerateEvent
    """All tokens behind the prompt as one event; with a finish, where it has one. The first ones
    may lack log probabilities: those that another pod generated before it failed."""


class HeldStreams(msgspec.Struct, frozen=True):
    """Those of one answer that a pod has."""

    streams: tuple[HeldStream, ...]


class StepSums(msgspec.Struct, frozen=True):
    """Sums over an engine's steps since it started, from which the cost of a step is fitted.

    Of each step: its seconds, its prompt tokens, and the streams that it gave their next token.
    """

    steps: float = 0.0
    seconds: float = 0.0
    prompt: float = 0.0
    streams: float = 0.0
    prompt_prompt: float = 0.0
    """Of prompt x prompt; the same for the following."""
    prompt_streams: float = 0.0
    streams_streams: float = 0.0
    seconds_prompt: float = 0.0
    seconds_streams: float = 0.0


class PodWork(msgspec.Struct, frozen=True):
    """What a pod was asked and did since it started, for whoever sizes its pool: two looks differ
    by what happened between them."""

    requests: int
    """Streams taken in; not those that ran on another pod before: they arrived there."""
    prompt_tokens: int
    """Admitted to be computed here and not found in the cache."""
    output_tokens: int
    steps: StepSums
    queued_tokens: int
    """Prompt tokens of streams that wait now."""
    kv_tokens: int
    """Tokens of KV cache that streams hold now."""
    step_tokens: int
    """Tokens that one step computes at most."""
    max_streams: int
    """Streams that run at the same time at most."""


class PodState(msgspec.Struct, frozen=True, omit_defaults=False):
    """What a runtime pod says of itself; the operator's only view into a pod."""

    pod: str
    role: str
    revision: str
    model: str
    ready: bool
    draining: bool
    running: int
    """Streams whose tokens are being computed."""
    waiting: int
    """Streams accepted and not yet running (queued, or awaiting KV)."""
    exporting: int
    """Streams whose KV is held for a decode pod that has not acknowledged it yet."""
    kv_usage: float
    """Share of KV blocks in use by live streams, 0..1."""
    kv_capacity_tokens: int
    started_unix_s: float
    context_tokens: int = 0
    """The longest prompt and answer together that the pod can hold; 0: it does not say."""
    work: PodWork | None = None
    """None: it does not say, or its engine is not built yet."""
    device: DeviceReport | None = None
    """None: it does not say."""
    pace: str = ""
    """ACCELERATOR:MODEL that a paced pod pretends; empty: its steps take what they take."""

    @property
    def in_flight(self) -> int:
        """Streams that would be lost if the pod were killed now."""
        return self.running + self.waiting + self.exporting


class DrainRequest(msgspec.Struct, frozen=True):
    """Asks a pod to empty itself.

    `drain`: admit nothing new, finish what runs. `end`: the same, but streams still running after
    `deadline_s` are ended with an error event. `cancel`: admit again (a drain that was undone).
    """

    mode: Literal["drain", "end", "cancel"]
    deadline_s: float | None = None


class FleetLatency(msgspec.Struct, frozen=True):
    """What one gateway measured for one fleet over the last minute, in seconds."""

    requests: int
    ttft_p50_s: float
    ttft_p95_s: float
    tpot_p50_s: float | None = None
    """None: no answer had two tokens."""
    tpot_p95_s: float | None = None
    tpot_requests: int | None = None
    """Of the requests, those whose answer had at least two tokens: TPOT is theirs. None: all."""


class GatewayState(msgspec.Struct, frozen=True):
    """What a gateway says of itself."""

    pod: str
    ready: bool
    streams: int
    api_view_age_s: float
    """Seconds since the Kubernetes API last confirmed the gateway's view of the pods."""
    fleets: dict[str, FleetLatency]
    held: dict[str, int] = {}
    """Requests that wait for a sleeping fleet to wake, by fleet."""


class Wakeable(msgspec.Struct, frozen=True):
    """Tells a gateway which fleets the operator wakes from zero pods, and the names they serve."""

    fleets: dict[str, tuple[str, ...]]


class TokenizerBundle(msgspec.Struct, frozen=True, omit_defaults=True):
    """Everything that turns text into a model's token ids and back."""

    digest: str
    """Of the weights: token ids of bundles with one digest mean the same."""
    tokenizer_json: str
    """The `tokenizers` library's serialised form."""
    context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None = None
    add_bos: bool = False
    chat_template: str | None = None
    special_tokens: dict[str, str] = {}
    """Names that chat templates use: bos_token, eos_token, ..."""
    block_tokens: int = 16
    cache_root: str = ""
    """Hex; the layout hash from which this model's prefix keys are chained (prefix.py)."""


class Context(msgspec.Struct, frozen=True, omit_defaults=True):
    """A named context as gateways and pods keep it. Its content never changes; the newer `version`
    of one that was created at the same time replaces the older one, wherever they meet."""

    id: str
    model: str
    """The served name that it was made for."""
    fleet: str
    tenant: str
    created_unix_s: float
    expires_unix_s: float
    cache_salt: str = ""
    """It is of use to requests of this tenant and salt alone."""
    prompt: str = ""
    messages: list[dict[str, Any]] = []
    """Instead of `prompt`: as a chat template takes them."""
    tokens: int = 0
    """As of its creation."""
    display_name: str = ""
    tier: str = ""
    """`accelerator` or a cache tier's name; empty: each pod's first below the accelerator."""
    copies: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Pods that keep it, of each revision."""
    version: int = 0
    updated_unix_s: float = 0.0
    deleted: bool = False
    """It has no content then, and is remembered until it would have expired."""
    origin: str = ""
    """Who declares it; empty: a client made it."""
    uri: str = ""
    """Where its content is (http://, https://, pvc://), which a gateway then reads."""
    role: str = ""
    """Whose message that is; empty: a prompt."""


class FileText(msgspec.Struct, frozen=True):
    """A file that a pod read for a gateway."""

    text: str


class ContextCopy(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one pod has of a context; without the content."""

    id: str
    created_unix_s: float
    version: int
    state: Literal["building", "ready", "failed"] = "building"
    reason: str = ""
    """Why it failed, a sentence."""
    tokens: int = 0
    bytes: int = 0
    """Of KV that is kept."""
    tier: str = ""
    token_compute_s: float = 0.0
    """What a token of it costs to compute; 0: not known."""
    byte_seconds: float = 0.0
    """What keeping it has cost so far."""


class ContextCopies(msgspec.Struct, frozen=True):
    """All contexts of a pod."""

    copies: tuple[ContextCopy, ...]


class ContextState(msgspec.Struct, frozen=True, omit_defaults=True):
    """A context as a gateway knows it."""

    context: Context
    """Without the content."""
    pods: dict[str, ContextCopy] = {}
    """By name."""
    requests: int = 0
    """That this gateway served with it; the same for the following."""
    cached_tokens: int = 0
    saved_s: float = 0.0
    """Of prefill."""
    reason: str = ""
    """Why a pod refused it, a sentence."""


class ContextStates(msgspec.Struct, frozen=True):
    """All contexts that a gateway knows."""

    contexts: tuple[ContextState, ...]
