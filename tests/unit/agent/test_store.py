from __future__ import annotations

from pathlib import Path

from tandem.agent.store import Ending, PodRecord, Store
from tandem.cluster.process import ProcessId


def test_records_survive(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = store.pod("u")
    record = PodRecord({"metadata": {"name": "p"}}, "127.65.1.2", {"c": [0, 3]}, 5.0)
    folder.write(record)
    assert [pod.uid for pod in store.pods()] == ["u"]
    assert folder.read() == record
    assert store.pod("none").read() is None
    folder.remove()
    assert store.pods() == []


def test_runs_are_in_order_and_old_ones_go(tmp_path: Path) -> None:
    folder = Store(tmp_path).pod("u")
    for number in range(12):
        run = folder.run("c", number)
        run.path.mkdir(parents=True)
        run.log.write_text(str(number))
    assert [run.number for run in folder.runs("c")] == list(range(12))
    folder.prune("c")
    assert [run.number for run in folder.runs("c")] == [10, 11]
    assert sorted(path.name for path in (folder.path / "containers" / "c").glob("*.log")) == [
        "10.log",
        "11.log",
    ]
    assert len(folder.all_runs()) == 2
    assert folder.runs("other") == []


def test_what_a_shim_wrote_is_read(tmp_path: Path) -> None:
    run = Store(tmp_path).pod("u").run("c", 0)
    run.path.mkdir(parents=True)
    assert (run.started(), run.ending(), run.read_config()) == (None, None, None)
    (run.path / "started.json").write_text(
        '{"shim_pid": 1, "shim_start_ticks": 2, "pid": 3, "start_ticks": 4, "started_at_s": 5.5}'
    )
    started = run.started()
    assert started is not None
    assert (started.shim, started.process) == (ProcessId(1, 2), ProcessId(3, 4))
    run.write_ending(Ending(3, 0, 6.0))
    assert run.ending() == Ending(3, 0, 6.0)
