"""`tandem demo`: the main job from nothing to an answer, and a table of what happened.

Starts the local cluster, applies examples/01-quickstart, waits until the fleet is Ready, asks a
question through the gateway and leaves the cluster up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final

import openai
import typer
from rich.console import Console
from rich.table import Table
from tandem_runtime.contract import HEADER_TRACE

from tandem.cluster.running import Running
from tandem.cluster.spec import ClusterSpec
from tandem.cluster.up import REFUSALS, SOURCE, up

EXAMPLE: Final = SOURCE / "examples" / "01-quickstart"
FLEET: Final = "chat"
NAMESPACE: Final = "default"
QUESTION: Final = "What is the capital of France, and what is it known for?"
READY_TIMEOUT_S: Final = 300.0
POLL_S: Final = 0.3

console = Console(highlight=False, soft_wrap=True)


class DemoError(RuntimeError):
    """The demo cannot go on; the message says why and what to look at."""


@dataclass(frozen=True)
class Answer:
    """A streamed answer, and what the gateway says of it."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    trace: dict[str, Any]


def register(app: typer.Typer) -> None:
    """Adds the command to the `tandem` program."""
    app.command("demo")(demo_command)


def demo_command(
    question: Annotated[str, typer.Option(help="What to ask.")] = QUESTION,
    name: Annotated[str, typer.Option("--name", help="Which cluster.")] = ClusterSpec().name,
) -> None:
    """Start a cluster, apply the quickstart fleet and ask it a question."""
    begun_s = time.monotonic()

    def note(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - begun_s:6.1f} s[/dim]  {line}")

    try:
        running = up(ClusterSpec(name), note)
        note(f"kubectl apply -f {EXAMPLE.relative_to(SOURCE)}")
        running.kubectl("apply", f"--namespace={NAMESPACE}", "-f", str(EXAMPLE))
        fleet = _wait_ready(running, note)
        url, model = fleet["status"]["url"], fleet["status"]["servedNames"][0]
        note(f"the fleet serves {model} at {url}")
        answer = _ask(url, model, question)
    except (DemoError, openai.OpenAIError, *REFUSALS) as error:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(str(error))
        raise typer.Exit(1) from error
    console.print(_table(answer))
    console.print(running.kubectl("get", "inferencefleets,pools,pods", f"--namespace={NAMESPACE}"))
    note("done; the cluster stays up, `tandem down` ends it")
    console.print(f"export KUBECONFIG={running.kubeconfig}")


def _wait_ready(running: Running, note: Callable[[str], None]) -> dict[str, Any]:
    """Follows the fleet's conditions until it is Ready for its current generation."""
    path = f"/apis/tandem.dev/v1alpha1/namespaces/{NAMESPACE}/inferencefleets/{FLEET}"
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    said = ""
    while time.monotonic() < deadline_s:
        fleet: dict[str, Any] = json.loads(running.kubectl("get", "--raw", path))
        conditions = {c["type"]: c for c in fleet.get("status", {}).get("conditions", ())}
        ready = conditions.get("Ready")
        if ready is not None and ready["observedGeneration"] == fleet["metadata"]["generation"]:
            if ready["status"] == "True":
                return fleet
            if (line := f"{FLEET}: {ready['reason']}: {ready['message']}") != said:
                note(line)
                said = line
        if "Stalled" in conditions:
            raise DemoError(
                f"fleet {FLEET} is stalled: {conditions['Stalled']['message']}\n"
                f"Look at it with: kubectl --kubeconfig {running.kubeconfig} describe "
                f"inferencefleet {FLEET}"
            )
        time.sleep(POLL_S)
    raise DemoError(
        f"fleet {FLEET} was not Ready within {READY_TIMEOUT_S:.0f} s; its pods say why:\n"
        + running.kubectl("get", "pods", f"--namespace={NAMESPACE}", "-o", "wide")
    )


def _ask(url: str, model: str, question: str) -> Answer:
    """Streams the answer to the terminal."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused")
    console.print(f"\n[bold]> {question}[/bold]")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=96,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={HEADER_TRACE: "1"},
    )
    usage, trace = None, None
    for chunk in stream:
        for choice in chunk.choices:
            console.print(choice.delta.content or "", end="", markup=False)
        usage = chunk.usage or usage
        trace = (chunk.model_extra or {}).get("tandem") or trace
    console.print("\n")
    if usage is None or trace is None:
        raise DemoError("the stream ended without usage and trace: see the gateway's log")
    details = usage.prompt_tokens_details
    return Answer(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=(details.cached_tokens or 0) if details else 0,
        trace=trace,
    )


def _table(answer: Answer) -> Table:
    trace = answer.trace
    table = Table(box=None, show_header=False, title="this request", title_justify="left")
    table.add_row("time to first token", f"{trace['ttft_ms']:.0f} ms")
    table.add_row("time per output token", f"{trace['tpot_ms']:.1f} ms")
    table.add_row("prefill pod", str(trace["prefill_pod"]))
    table.add_row("decode pod", str(trace["decode_pod"]))
    table.add_row(
        "KV cache handed over",
        f"{trace['handoff_bytes']:,} bytes of {trace['handoff_tokens']} tokens "
        f"in {trace['handoff_ms']:.1f} ms",
    )
    table.add_row("prompt tokens", f"{answer.prompt_tokens}, {answer.cached_tokens} of them cached")
    table.add_row("output tokens", str(answer.completion_tokens))
    return table
