"""`tandem simulate` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tandem.cli import app
from typer.testing import CliRunner, Result

FLEET = {
    "apiVersion": "tandem.dev/v1alpha1",
    "kind": "InferenceFleet",
    "metadata": {"name": "chat"},
    "spec": {
        "modelRef": {"name": "m"},
        "objectives": {
            "timeToFirstToken": {"percentile": 95, "targetMilliseconds": 800},
            "timePerOutputToken": {"percentile": 50, "targetMilliseconds": 25},
        },
        "prefill": {
            "accelerator": {"resource": "nvidia.com/gpu", "count": 1},
            "scaling": {"minReplicas": 1, "maxReplicas": 4},
        },
        "decode": {"accelerator": {"resource": "nvidia.com/gpu", "count": 2}, "replicas": 1},
    },
}
STEP = ["--load", "step", "--rate", "2", "--peak", "20", "--duration-s", "300"]


def write(folder: Path, fleet: object = FLEET) -> Path:
    file = folder / "fleet.yaml"
    model = {"kind": "Model", "metadata": {"name": "m"}}
    file.write_text(yaml.safe_dump_all([model, fleet]))
    return file


def simulate(fleet: Path, *more: str) -> Result:
    command = ["simulate", "--fleet", str(fleet), "--model", "llama-3.1-8b", *more]
    return CliRunner().invoke(app, command)


def test_a_run_writes_table_figures_and_pictures(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.json", "a.png", "a.html")]
    options = [part for kind, file in zip(("json", "png", "html"), files, strict=True)
               for part in (f"--{kind}", str(file))]  # fmt: skip
    answer = simulate(write(tmp_path), *STEP, *options)
    assert answer.exit_code == 0, answer.output
    assert "within both targets" in answer.output
    figures = json.loads(files[0].read_text())
    assert figures["pools"] == ["prefill", "decode"]
    assert figures["targets"] == {"ttft_s": 0.8, "tpot_s": 0.025}
    summary = figures["summary"]
    assert summary["finished"] == summary["offered"] > 2000
    assert sum(bucket["requests_per_s"] for bucket in figures["course"]) * 10 == pytest.approx(
        summary["offered"], rel=0.01
    )
    assert files[1].read_bytes().startswith(b"\x89PNG")
    page = files[2].read_text()
    assert "<svg" in page
    assert "within both targets" in page
    assert "<script" not in page
    assert "<link" not in page
    assert 'src="http' not in page


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    fleet = write(tmp_path)
    written = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        files = [tmp_path / f"{name}.json", tmp_path / f"{name}.html"]
        answer = simulate(
            fleet, *STEP, "--seed", seed, "--failures-s", "300",
            "--json", str(files[0]), "--html", str(files[1]),
        )  # fmt: skip
        assert answer.exit_code == 0, answer.output
        written.append([file.read_bytes() for file in files])
    assert written[0] == written[1]
    assert written[0] != written[2]


def test_a_trace_file_is_replayed(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{250 * i},{100 + i},20\n" for i in range(200))
    trace.write_text("timestamp_ms,input_tokens,output_tokens\n" + rows)
    answer = simulate(write(tmp_path), "--trace", str(trace), "--speed", "2")
    assert answer.exit_code == 0, answer.output
    assert "trace.csv: 200 requests in 25 s" in answer.output


def changed(**pool: object) -> dict[str, object]:
    spec = {**FLEET["spec"], "decode": {**FLEET["spec"]["decode"], **pool}}  # type: ignore[dict-item,index]
    return {**FLEET, "spec": spec}


@pytest.mark.parametrize(
    ("fleet", "sentence"),
    [
        ({"kind": "Pool"}, "holds 0 objects of kind InferenceFleet"),
        ({"kind": "InferenceFleet"}, "an object of kind InferenceFleet has no metadata.name"),
        ({"kind": "InferenceFleet", "metadata": {"name": "a"}}, "spec: input should be"),
        (changed(replicas="two"), "spec.decode.replicas: input should be a valid integer"),
        (changed(replicas=0), "spec.decode.replicas is 0: it must be at least 1"),
        (
            changed(scaling={"minReplicas": 1, "maxReplicas": 2}),
            "spec.decode: replicas and scaling exclude each other",
        ),
        (
            changed(replicas=None, scaling={"minReplicas": 3, "maxReplicas": 2}),
            "spec.decode.scaling: minReplicas exceeds maxReplicas",
        ),
        (changed(accelerator=None), "spec.decode has no accelerator"),
        (changed(accelerator={"count": 3}), "so many GPUs cannot share llama-3.1-8b evenly"),
    ],
)
def test_a_bad_fleet_is_refused_with_a_sentence(
    tmp_path: Path, fleet: object, sentence: str
) -> None:
    answer = simulate(write(tmp_path, fleet), *STEP)
    assert answer.exit_code == 1
    assert sentence in answer.output
    assert "Traceback" not in answer.output


@pytest.mark.parametrize(
    "option",
    ["--startup-s=-1", "--startup-s=nan", "--expiry-s=0", "--slowdown=0", "--failures-s=0",
     "--rate=nan", "--rate=-1", "--duration-s=0", "--prompt-tokens=0", "--price=nan",
     "--max-running=0", "--compute-efficiency=2"],
)  # fmt: skip
def test_a_senseless_number_is_refused_with_a_sentence(tmp_path: Path, option: str) -> None:
    answer = simulate(write(tmp_path), *STEP, option)
    assert answer.exit_code == 1
    assert len(answer.output.strip().splitlines()) == 1
    assert isinstance(answer.exception, SystemExit)


def test_other_bad_input(tmp_path: Path) -> None:
    fleet = write(tmp_path)
    neither = simulate(fleet)
    assert "give either --trace FILE or --load" in neither.output
    missing = simulate(tmp_path / "none.yaml", *STEP)
    assert "cannot be read" in missing.output
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    assert "is not YAML" in simulate(bad, *STEP).output
    large = simulate(fleet, *STEP, "--gpu", "L40S", "--model", "llama-3.1-70b")
    assert "llama-3.1-70b does not fit 2 L40S: 141 GB of bf16 weights" in large.output
    unknown = simulate(fleet, *STEP, "--model", "gpt-9")
    assert "no model of that name is known" in unknown.output
    assert {r.exit_code for r in (neither, missing, large, unknown)} == {1}


def scaled(policy: str | None = "calm") -> dict[str, object]:
    scaling = {"minReplicas": 1, "maxReplicas": 4}
    if policy:
        scaling["policyRef"] = {"name": policy}  # type: ignore[assignment]
    spec = dict(FLEET["spec"])  # type: ignore[call-overload]
    for pool in ("prefill", "decode"):
        spec[pool] = {"accelerator": {"count": 1}, "scaling": scaling}
    return {**FLEET, "spec": spec}


def policy_file(folder: Path, spec: object, name: str = "calm") -> str:
    file = folder / "policy.yaml"
    body = {"kind": "ScalingPolicy", "metadata": {"name": name}, "spec": spec}
    file.write_text(yaml.safe_dump(body))
    return str(file)


HEAVY = ["--load", "step", "--rate", "5", "--peak", "60", "--duration-s", "900",
         "--prompt-tokens", "2000"]  # fmt: skip


def largest(tmp_path: Path, *options: str) -> list[int]:
    file = tmp_path / "run.json"
    answer = simulate(write(tmp_path, scaled()), *HEAVY, *options, "--json", str(file))
    assert answer.exit_code == 0, answer.output
    return [p["max_replicas"] for p in json.loads(file.read_text())["summary"]["pools"]]


def test_the_policy_file_is_what_the_pools_follow(tmp_path: Path) -> None:
    free = largest(tmp_path, "--policy", policy_file(tmp_path, {}))
    assert max(free) == 4
    budget = largest(tmp_path, "--policy", policy_file(tmp_path, {"gpuBudget": 3}))
    assert sum(budget) <= 4
    assert max(budget) < 4
    shadow = largest(tmp_path, "--policy", policy_file(tmp_path, {"mode": "Shadow"}))
    assert shadow == [1, 1]


def test_idle_pools_sleep_and_are_woken(tmp_path: Path) -> None:
    scaling = {"minReplicas": 0, "maxReplicas": 2, "policyRef": {"name": "calm"}}
    pool = {"accelerator": {"count": 1}, "scaling": scaling}
    fleet = {**FLEET, "spec": {**FLEET["spec"], "prefill": pool, "decode": pool}}  # type: ignore[dict-item]
    trace = tmp_path / "trace.csv"
    trace.write_text("timestamp_ms,input_tokens,output_tokens\n0,100,20\n7200000,100,20\n")
    file = tmp_path / "run.json"
    answer = simulate(
        write(tmp_path, fleet), "--policy", policy_file(tmp_path, {}), "--trace", str(trace),
        "--startup-s", "20", "--json", str(file),
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    summary = json.loads(file.read_text())["summary"]
    assert summary["finished"] == 2
    assert summary["ttft_s"]["p50"] == pytest.approx(20, abs=1)
    assert 0 < summary["gpu_hours"] < 2


def test_a_schedule_goes_by_the_time_at_which_the_run_begins(tmp_path: Path) -> None:
    day = {"name": "day", "cron": "0 8 * * 1-5", "durationSeconds": 36000,
           "timeZone": "Europe/Berlin", "prefill": {"minReplicas": 3}}  # fmt: skip
    policy = policy_file(tmp_path, {"schedules": [day]})
    found = {}
    for begins in ("2024-01-01T07:50+01:00", "2023-12-31T07:50+01:00"):
        file = tmp_path / "run.json"
        answer = simulate(
            write(tmp_path, scaled()), "--load", "poisson", "--rate", "1", "--duration-s", "900",
            "--policy", policy, "--begins-at", begins, "--json", str(file),
        )  # fmt: skip
        assert answer.exit_code == 0, answer.output
        found[begins] = json.loads(file.read_text())["decisions"]
    monday, sunday = found.values()
    assert sunday == []
    # Ready, after 100 s, when the window begins.
    assert [d["at_s"] for d in monday] == [pytest.approx(490.0, abs=10.0)]
    assert [sum(d["sizes"]) for d in monday] == [4]
    assert "Schedule" in monday[0]["reasons"]
    bad = simulate(write(tmp_path, scaled()), *STEP, "--begins-at", "monday")
    assert bad.exit_code == 1
    assert "--begins-at monday is no date and time" in bad.output


@pytest.mark.parametrize(
    ("spec", "name", "sentence"),
    [
        ({}, "other", "ScalingPolicy calm does not exist in namespace"),
        ({"gpuBudget": 1}, "calm", "gpuBudget of ScalingPolicy calm is 1"),
        ({"mode": "Loud"}, "calm", "spec.mode: input should be 'Active' or 'Shadow'"),
        ({"bands": {"lowPercent": 95}}, "calm", "lowPercent must be under highPercent"),
        (
            {"schedules": [{"name": "s", "cron": "0 8 * *", "durationSeconds": 60}]},
            "calm",
            'schedule s: cron "0 8 * *" is not understood (it has 4 fields)',
        ),
    ],
)
def test_a_bad_policy_is_refused_with_a_sentence(
    tmp_path: Path, spec: object, name: str, sentence: str
) -> None:
    file = policy_file(tmp_path, spec, name)
    answer = simulate(write(tmp_path, scaled()), *STEP, "--policy", file)
    assert answer.exit_code == 1
    assert sentence in answer.output
