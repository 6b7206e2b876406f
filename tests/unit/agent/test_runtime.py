"""Containers for real: namespaces, mounts, logs, ends. Needs what the agent needs (see
docs/concepts/local-cluster.md): root, or unprivileged user namespaces."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tandem.agent import runtime
from tandem.agent.exits import exit_of, write_start_error
from tandem.agent.images import image_paths
from tandem.agent.leftovers import end_pod
from tandem.agent.store import ContainerConfig, Ending, Mount, PodDir, RunDir, Started
from tandem.cluster.process import identify, is_running

PATH = "/usr/local/bin:/usr/bin:/bin"


def config_for(run: RunDir, *argv: str) -> ContainerConfig:
    message = run.path / "termination-log"
    message.parent.mkdir(parents=True, exist_ok=True)
    message.touch()
    return ContainerConfig(
        argv=list(argv),
        env={"PATH": PATH, "COLOUR": "blue"},
        working_dir="/",
        hostname="pod-1",
        log=str(run.log),
        mounts=[Mount(str(message), "/dev/termination-log")],
        private=["/tmp", "/run/secrets"],
        image_paths=image_paths(),
        devices=[],
        cgroups=[],
        read_only_root=False,
        rootless=os.geteuid() != 0,
        strikes=0,
        termination_log=str(message),
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return PodDir(tmp_path / "pods" / "uid-1").run("c", 0)


def output(run: RunDir) -> list[str]:
    """What the container printed, without times and tags."""
    return [line.split(" ", 3)[3] for line in run.log.read_text().splitlines()]


def on_machine(path: str) -> bool:
    """Whether the file exists outside the container."""
    return Path(path).exists()


async def run_to_end(run: RunDir, config: ContainerConfig) -> Ending:
    started = await runtime.start(run, config)
    async with asyncio.timeout(20):
        return await runtime.wait(run, started)


async def shell(run: RunDir, script: str, **changes: object) -> tuple[Ending, list[str]]:
    config = dataclasses.replace(config_for(run, "sh", "-c", script), **changes)
    return await run_to_end(run, config), output(run)


async def test_output_and_status(run: RunDir) -> None:
    ending, lines = await shell(run, "echo out; echo err >&2; exit 3")
    assert (ending.code, ending.signal) == (3, 0)
    assert sorted(lines) == ["err", "out"]


async def test_it_is_alone_in_its_namespaces(run: RunDir) -> None:
    _, lines = await shell(run, "echo $$; hostname; ls /proc | grep -c '^[0-9]'")
    assert lines[:2] == ["1", "pod-1"]
    assert int(lines[2]) < 10
    assert os.uname().nodename != "pod-1"


async def test_what_it_writes_outside_volumes_is_its_own(run: RunDir) -> None:
    mark = f"/etc/tandem-test-{os.getpid()}"
    ending, _ = await shell(run, f"echo x > {mark} && test -s {mark}")
    assert ending.code == 0
    assert not on_machine(mark)


async def test_private_folders_are_empty_but_the_image_is_there(run: RunDir) -> None:
    _, lines = await shell(run, "ls -A /tmp /run/secrets /dev/shm | grep -v : | grep -c .; exit 0")
    # Where the project itself lies below /tmp, its first folder shows there.
    below_tmp = {path.split("/")[2] for path in image_paths() if path.startswith("/tmp/")}
    assert int(lines[0]) == len(below_tmp)
    again = RunDir(run.path.parent / "1")
    ending, _ = await shell(again, f"test -e {image_paths()[0]}")
    assert ending.code == 0


async def test_a_private_folder_may_lie_in_another(run: RunDir) -> None:
    """Where the cluster's state lies below /tmp, for example."""
    ending, _ = await shell(run, "ls /tmp/a/b", private=["/tmp/a/b", "/tmp", "/run/secrets"])
    assert ending.code == 0


async def test_volumes(run: RunDir, tmp_path: Path) -> None:
    shared, file = tmp_path / "shared", tmp_path / "file"
    shared.mkdir()
    file.write_text("from outside\n")
    mounts = [
        Mount(str(shared), "/data/deep"),
        Mount(str(shared), "/frozen", read_only=True),
        Mount(str(file), "/var/run/secrets/x/token", read_only=True),
    ]
    script = (
        "cat /var/run/secrets/x/token; echo inside > /data/deep/new; cat /frozen/new; "
        "touch /frozen/no 2>&1 || true; test ! -w /var/run/secrets/x/token"
    )
    ending, lines = await shell(run, script, mounts=mounts)
    assert ending.code == 0
    assert lines[:2] == ["from outside", "inside"]
    assert "Read-only file system" in lines[2]
    assert (shared / "new").read_text() == "inside\n"
    assert not on_machine("/data/deep")


async def test_a_read_only_root(run: RunDir) -> None:
    ending, lines = await shell(run, "touch /etc/x 2>&1; touch /tmp/x", read_only_root=True)
    assert ending.code == 0
    assert "Read-only file system" in lines[0]


async def test_environment_and_working_folder(run: RunDir) -> None:
    _, lines = await shell(run, "pwd; echo $COLOUR; echo ${HOME-none}", working_dir="/usr")
    assert lines == ["/usr", "blue", "none"]


@pytest.mark.parametrize(
    ("argv", "changes", "sentence"),
    [
        (("no-such-program",), {}, 'exec: "no-such-program": executable file not found in $PATH'),
        (("/etc/hosts",), {}, 'exec: "/etc/hosts": Exec format error'),
        (("true",), {"working_dir": "/no/such"}, "workingDir /no/such: No such file or directory"),
        (("true",), {"mounts": [Mount("/no/such", "/x")]}, "No such file or directory"),
        (("true",), {"mounts": [Mount("/etc", "/proc/x")]}, "cannot make the mount point /proc/x"),
    ],
)
async def test_what_cannot_start_says_why(
    run: RunDir, argv: tuple[str, ...], changes: dict[str, object], sentence: str
) -> None:
    config = dataclasses.replace(config_for(run, *argv), **changes)
    with pytest.raises(runtime.StartError) as failure:
        await runtime.start(run, config)
    assert sentence in str(failure.value)
    assert "Traceback" not in str(failure.value)
    assert run.started() is None


async def test_signals(run: RunDir) -> None:
    script = "trap 'echo caught; exit 7' TERM; echo ready; while :; do sleep 0.05; done"
    started = await runtime.start(run, config_for(run, "sh", "-c", script))
    await says(run, "ready")
    runtime.terminate(started)
    ending = await runtime.wait(run, started)
    assert (ending.code, ending.signal) == (7, 0)
    assert output(run) == ["ready", "caught"]


async def says(run: RunDir, line: str) -> None:
    await eventually(lambda: run.log.exists() and line in output(run))


async def eventually(happened: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not happened():  # noqa: ASYNC110 (another process does it, no event will tell)
            await asyncio.sleep(0.02)


def children_of(started: Started) -> list[int]:
    """The machine's pids of all processes in the container's PID namespace."""
    space = os.readlink(f"/proc/{started.process.pid}/ns/pid")
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "ns" / "pid") == space:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


async def test_nothing_of_a_container_survives_it(run: RunDir) -> None:
    script = "setsid sleep 600 & setsid sh -c 'sleep 600 & sleep 600' & echo ready; wait"
    started = await runtime.start(run, config_for(run, "sh", "-c", script))
    await says(run, "ready")
    pids = children_of(started)
    assert len(pids) >= 3
    runtime.kill(started)
    ending = await runtime.wait(run, started)
    assert (ending.code, ending.signal) == (137, signal.SIGKILL)
    assert [pid for pid in pids if identify(pid)] == []


async def test_a_killed_shim_takes_its_container_along(run: RunDir) -> None:
    started = await runtime.start(run, config_for(run, "sleep", "600"))
    os.kill(started.shim.pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        ending = await runtime.wait(run, started)
    assert (ending.code, ending.signal) == (137, signal.SIGKILL)
    assert not is_running(started.process)
    assert run.ending() == ending


async def test_a_container_outlives_who_started_it(run: RunDir) -> None:
    """As containers outlive a killed agent: its successor reads the records and waits."""
    run.write_config(config_for(run, "sh", "-c", "sleep 0.5; echo late; exit 5"))
    in_background = '"$@" $$ >/dev/null 2>&1 & until test -e "$0"; do sleep 0.05; done'
    starter = await asyncio.create_subprocess_exec(
        "sh", "-c", in_background, str(run.path / "started.json"),
        *runtime.SHIM, "run", str(run.path), env=runtime.SHIM_ENV,
    )  # fmt: skip
    assert await starter.wait() == 0
    started = run.started()
    assert started is not None
    assert is_running(started.process)
    async with asyncio.timeout(60):
        ending = await runtime.wait(run, started)
    assert ending.code == 5
    assert output(run) == ["late"]


async def test_a_start_that_nobody_waits_for_does_not_happen(run: RunDir) -> None:
    """The agent was killed while the shim prepared: the next one knows nothing of this run."""
    run.write_config(config_for(run, "sleep", "600"))
    stranger = "1"
    starter = await asyncio.create_subprocess_exec(
        *runtime.SHIM, "run", str(run.path), stranger, env=runtime.SHIM_ENV
    )
    assert await starter.wait() == 0
    assert run.started() is None


async def test_exec(run: RunDir) -> None:
    started = await runtime.start(run, config_for(run, "sleep", "600"))
    script = "hostname; echo $COLOUR; echo err >&2; exit 4"
    result = await runtime.execute(run, ["sh", "-c", script], 10)
    assert result.code == 4
    assert sorted(result.output.split("\n")) == ["blue", "err", "pod-1"]
    missing = await runtime.execute(run, ["no-such-program"], 10)
    assert missing.code == 126
    assert "executable file not found" in missing.output
    with pytest.raises(TimeoutError):
        await runtime.execute(run, ["sleep", "600"], 0.2)
    runtime.kill(started)
    await runtime.wait(run, started)
    gone = await runtime.execute(run, ["true"], 10)
    assert gone.code == 126


async def test_termination_message(run: RunDir) -> None:
    ending, _ = await shell(run, "printf 'the reason' > /dev/termination-log; exit 1")
    assert exit_of(run, ending, {}).message == "the reason"


async def test_termination_message_falls_back_to_the_log(run: RunDir) -> None:
    ending, _ = await shell(run, "echo first; echo last words; exit 1")
    assert exit_of(run, ending, {}).message == ""
    policy = {"terminationMessagePolicy": "FallbackToLogsOnError"}
    assert exit_of(run, ending, policy).message == "first\nlast words\n"


def test_a_start_error_is_remembered(run: RunDir) -> None:
    run.path.mkdir(parents=True)
    write_start_error(run, "no such program", 5.0)
    ending = run.ending()
    assert ending is not None
    exit_ = exit_of(run, ending, {})
    assert (exit_.code, exit_.reason, exit_.message) == (128, "StartError", "no such program")


async def test_leftovers_are_ended(tmp_path: Path) -> None:
    folder = PodDir(tmp_path / "pods" / "uid-2")
    stubborn = "trap '' TERM; while :; do sleep 0.05; done"
    runs = [folder.run("a", 0), folder.run("b", 0)]
    started = [await runtime.start(run, config_for(run, "sh", "-c", stubborn)) for run in runs]
    begun_s = time.monotonic()
    assert await asyncio.to_thread(end_pod, folder, 0.3) == 2
    assert time.monotonic() - begun_s < 30
    for run, one in zip(runs, started, strict=True):
        await runtime.wait(run, one)
        assert run.ending() is not None
    assert await asyncio.to_thread(end_pod, folder, 0.3) == 0


def test_without_root() -> None:
    """An unprivileged user gets the same container by way of a user namespace."""
    if os.geteuid() != 0:
        pytest.skip("every other test here runs without root already")
    folder = Path("/tmp") / f"tandem-rootless-{os.getpid()}"
    run = PodDir(folder / "pods" / "uid-3").run("c", 0)
    config = config_for(run, "sh", "-c", "echo $$; id -u; touch /etc/x && echo wrote")
    config = dataclasses.replace(config, rootless=True, image_paths=[])
    run.write_config(config)
    try:
        subprocess.run(["chown", "-R", "65534:65534", str(folder)], check=True)
        answer = subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
             "/usr/bin/python3", *runtime.SHIM[1:], "run", str(run.path), str(os.getpid())],
            env=readable_shim(folder),
            capture_output=True,
            text=True,
            timeout=20,
        )  # fmt: skip
        assert "error" not in json.loads(answer.stdout), answer.stdout
        assert output(run) == ["1", "0", "wrote"]
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=True)


def readable_shim(folder: Path) -> dict[str, str]:
    """A copy of the shim that a user without rights to this source tree can import."""
    target = folder / "client" / "tandem" / "agent"
    target.mkdir(parents=True)
    source = Path(runtime.__file__).parent
    subprocess.run(["cp", "-r", str(source / "shim"), str(target)], check=True)
    for package in (target, target.parent):
        (package / "__init__.py").touch()
    return {"PYTHONPATH": str(folder / "client")}
