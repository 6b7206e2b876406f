"""A run in one picture: load, replicas, TTFT and TPOT against their targets. PNG, SVG and HTML."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tandem.simulate.report import Bucket, Summary, course
from tandem.simulate.run import Run

_HOUR_S: Final = 3600.0
_COLOURS: Final = ("#1f77b4", "#d95f02", "#7570b3")
_STYLE: Final = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;border-bottom:1px solid "
    "#ddd;text-align:left}td:last-child{text-align:right}svg{max-width:100%;height:auto}"
)


def write_png(run: Run, title: str, path: Path) -> None:
    """The picture."""
    _figure(run, title).savefig(path, format="png", dpi=110)


def write_html(run: Run, rows: Sequence[tuple[str, str]], title: str, path: Path) -> None:
    """The picture and the summary in one file that needs nothing else."""
    drawn = io.StringIO()
    # Without a date and with fixed ids: the same run writes the same file.
    _figure(run, title).savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    cells = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>"
        f"<h1>{html.escape(title)}</h1>\n<table>{cells}</table>\n{svg}</body></html>\n"
    )


def _figure(run: Run, title: str) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "tandem"
    buckets = course(run)
    scale, unit = (60.0, "minutes") if run.ended_s < 3 * _HOUR_S else (_HOUR_S, "hours")
    times = [bucket.from_s / scale for bucket in buckets]
    figure = Figure(figsize=(11, 10), layout="constrained")
    load, replicas, ttft, tpot = figure.subplots(4, 1, sharex=True)
    figure.suptitle(title)
    _draw_load(load, times, buckets)
    for index, spec in enumerate(run.setup.pools):
        colour = _COLOURS[index % len(_COLOURS)]
        sizes = [bucket.sizes[index] for bucket in buckets]
        ready = [bucket.ready[index] for bucket in buckets]
        # Thinner from pool to pool, so that equal sizes do not hide each other.
        look = {"where": "post", "color": colour, "linewidth": 3.5 / (1 + 1.5 * index)}
        replicas.step(times, sizes, label=f"{spec.name}, asked for", **look)
        replicas.step(times, ready, linestyle=":", label=f"{spec.name}, serving", **look)
    replicas.set_ylabel("replicas")
    replicas.set_ylim(bottom=0)
    replicas.yaxis.get_major_locator().set_params(integer=True)
    setup = run.setup
    _draw_latency(
        ttft,
        times,
        [b.ttft_s for b in buckets],
        setup.ttft_s,
        f"TTFT p{100 * setup.ttft_quantile:g}",
    )
    _draw_latency(
        tpot,
        times,
        [b.tpot_s for b in buckets],
        setup.tpot_s,
        f"TPOT p{100 * setup.tpot_quantile:g}",
    )
    tpot.set_xlabel(unit)
    for axes in (load, replicas, ttft, tpot):
        axes.grid(visible=True, alpha=0.3)
        axes.margins(x=0)
        if axes is not load:
            axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _draw_load(axes: Any, times: list[float], buckets: Sequence[Bucket]) -> None:
    rates = [bucket.requests_per_s for bucket in buckets]
    axes.step(times, rates, where="post", color="black", label="requests/s")
    axes.set_ylabel("requests/s")
    axes.set_ylim(bottom=0)
    tokens = axes.twinx()
    tokens.step(
        times,
        [bucket.prompt_tokens_per_s for bucket in buckets],
        where="post",
        color="tab:green",
        alpha=0.6,
        label="prompt tokens/s",
    )
    tokens.set_ylabel("prompt tokens/s", color="tab:green")
    tokens.set_ylim(bottom=0)


def _draw_latency(
    axes: Any, times: list[float], values_s: Sequence[float | None], target_s: float, name: str
) -> None:
    """Milliseconds on a logarithmic scale; answers that never came at the upper edge."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    known = [1e3 * v for v in values_s if v is not None and v > 0 and not math.isinf(v)]
    top = 2 * max([1e3 * target_s, *known])
    drawn = [math.nan if v is None else min(1e3 * v, top) if v > 0 else math.nan for v in values_s]
    axes.semilogy(times, drawn, ".", markersize=4, color="black")
    over = [v if v > 1e3 * target_s else math.nan for v in drawn]
    axes.semilogy(times, over, ".", markersize=5, color="crimson", label="over the target")
    axes.axhline(
        1e3 * target_s, color="crimson", linewidth=1, label=f"target {1e3 * target_s:g} ms"
    )
    axes.set_ylabel(f"{name}, ms")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def summary_rows(summary: Summary) -> list[tuple[str, str]]:
    """The summary for people."""

    def ms(value: float | None) -> str:
        return "-" if value is None else f"{1e3 * value:.4g} ms"

    rows = [
        ("requests offered", f"{summary.offered:,}"),
        ("finished", f"{summary.finished:,}"),
        ("given up before a first token", f"{summary.expired:,}"),
        ("refused: longer than a replica's KV cache", f"{summary.refused:,}"),
        ("within both targets", "-" if summary.attained is None else f"{summary.attained:.2%}"),
    ]
    for name, values in (("TTFT", summary.ttft_s), ("TPOT", summary.tpot_s)):
        rows.append(
            (f"{name} p50 / p95 / p99", " / ".join(map(ms, (values.p50, values.p95, values.p99))))
        )
    rows.append(("prompt tokens from the prefix cache", f"{summary.cached_share:.1%}"))
    for pool in summary.pools:
        rows.append(
            (
                f"{pool.name}: GPU-hours, mean and most replicas, scale events, busy",
                f"{pool.gpu_hours:.2f}, {pool.mean_replicas:.2f}, {pool.max_replicas}, "
                f"{pool.scale_events}, {pool.busy_share:.0%}",
            )
        )
    rows.append(("GPU-hours", f"{summary.gpu_hours:.2f}"))
    rows.append(("dollars", f"{summary.usd:,.2f}"))
    rows.append(("preemptions, failed replicas", f"{summary.preemptions}, {summary.failures}"))
    return rows
