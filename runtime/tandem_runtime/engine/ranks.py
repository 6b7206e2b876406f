"""The ranks of one pod: rank 0 is the serving process, the others are its children.

Rank 0 decides and tells; a follower does what it is told, in order, and meets the others in the
collectives of the model. So a follower needs no scheduler, no clock and no address of its own:

    rank 0   scheduler -> plan --+--> TorchRunner -> sampled tokens
    rank r                       +--> TorchRunner    (a process and a channel each: follower.py)

A rank that ends takes the pod with it: a step cannot be computed without its share of the model.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist

from tandem_runtime.config import EngineConfig
from tandem_runtime.contract import EXIT_BAD_CONFIG
from tandem_runtime.engine.batch import Batch, SampleRow
from tandem_runtime.engine.runner import TorchRunner
from tandem_runtime.engine.sequence import SampledToken
from tandem_runtime.kv.layout import Payload
from tandem_runtime.model.parallel import RankLost, Ranks
from tandem_runtime.model.sharding import Sharding

LOOPBACK: Final = "127.0.0.1"
_END_S: Final = 10.0
"""How long a process may take to end, or the system to say how one ended."""


def rank_device(config: EngineConfig, rank: int) -> torch.device:
    """Rank r computes on the r-th of the devices that the pod sees."""
    return torch.device("cuda", rank) if config.device == "cuda" else torch.device("cpu")


def join_group(config: EngineConfig, rank: int, port: int, listen_fd: int | None = None) -> Ranks:
    """Meet the other ranks at a port of rank 0, whose listening socket it is; waits for all.

    NCCL and gloo look for a network by themselves; these ranks share a machine and need none.
    """
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device, size = rank_device(config, rank), config.tensor_parallel
    store = dist.TCPStore(  # type: ignore[attr-defined]
        LOOPBACK, port, is_master=rank == 0, wait_for_workers=False, master_listen_fd=listen_fd
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        # Of a pod that nobody watches; in a served one the watchdog is earlier.
        timeout=timedelta(minutes=30),
        device_id=device if device.type == "cuda" else None,
    )
    return Ranks(size, rank)


class Followers:
    """The processes of ranks 1 to n - 1, from start to end.

    Args:
        config: the engine's, the same for all.
        lost: called once, from another thread, when a process ends that should not: with
            `RankLost`, or with ValueError where it refused its configuration.
    """

    def __init__(self, config: EngineConfig, lost: Callable[[Exception], None]) -> None:
        self._config = config
        self._lost = lost
        self._ending = False
        self._fault: Exception | None = None
        self._faulty = threading.Event()
        self._listener = socket.create_server((LOOPBACK, 0))
        self._port: int = self._listener.getsockname()[1]
        started = [self._start(rank) for rank in range(1, config.tensor_parallel)]
        self._processes = [process for process, _ in started]
        self._channels = [channel for _, channel in started]
        for rank, process in enumerate(self._processes, 1):
            threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()

    def _start(self, rank: int) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            process = subprocess.Popen(
                [sys.executable, "-m", "tandem_runtime.engine.follower", str(fd), str(os.getpid())],
                pass_fds=[fd],
            )
        channel = Connection(ours.detach())
        channel.send((self._config, rank, self._port))
        return process, channel

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        if self._ending or self._fault is not None:
            return
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        sentence = f"rank {rank} of {self._config.tensor_parallel} ended with {how}"
        if status == EXIT_BAD_CONFIG:
            self._fault = ValueError(f"{sentence}; its own last line says why")
        else:
            self._fault = RankLost(sentence)
        self._lost(self._fault)
        self._faulty.set()

    def join(self) -> Ranks:
        """Rank 0's meeting with them."""
        return join_group(self._config, 0, self._port, self._listener.detach())

    def tell(self, rank: int, method: str, *args: object) -> None:
        """Have a rank's runner do this, after all that it was told before."""
        self._channels[rank - 1].send((method, args))

    def hear(self, rank: int) -> bytes:
        """The answer to what a rank was told last."""
        return self._channels[rank - 1].recv_bytes()

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Whatever goes wrong inside because a rank is gone is raised as that rank's end."""
        try:
            yield
        except (RankLost, OSError, EOFError):
            if self._faulty.wait(_END_S) and self._fault is not None:
                raise self._fault from None
            raise

    @contextlib.contextmanager
    def ended_on_error(self) -> Iterator[None]:
        """While the engine is built: an error here leaves no process behind."""
        try:
            with self.named():
                yield
        except BaseException:
            self._ending = True
            for process in self._processes:
                process.kill()
            self.close()
            raise

    def close(self) -> None:
        """Ends the processes; waits until they are gone."""
        self._ending = True
        for channel in self._channels:
            channel.close()
        for process in self._processes:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if dist.is_initialized():
            dist.destroy_process_group()


class ParallelRunner:
    """Every rank's share of each call, the others told of it. Implements `flight.Runner`."""

    def __init__(self, own: TorchRunner, followers: Followers, sharding: Sharding) -> None:
        self._own = own
        self.overlaps = own.overlaps
        self.reads_beside = False
        self._followers = followers
        self._sharding = sharding

    def launch(self, batch: Batch) -> object:
        """See `flight.Runner`. Followers sample nothing: they are told of the rows alone."""
        rows = [SampleRow(sample.row, sample.position, sample.sampling) for sample in batch.samples]
        told = replace(batch, samples=rows)
        with self._followers.named():
            for rank in range(1, self._sharding.size):
                self._followers.tell(rank, "launch", told)
            return self._own.launch(batch)

    def collect(self, launched: Any) -> list[SampledToken | None]:
        """See `flight.Runner`."""
        with self._followers.named():
            return self._own.collect(launched)

    def read_kv(self, block_ids: list[int], start: int, end: int) -> memoryview:
        """Canonical bytes of tokens [start, end): each kv head once, from a rank that holds it."""
        owners = self._sharding.kv_owners()
        with self._followers.named():
            for rank in owners[1:]:
                self._followers.tell(rank, "read_kv", block_ids, start, end)
            parts: list[Payload] = [self._own.read_kv(block_ids, start, end)]
            parts += [self._followers.hear(rank) for rank in owners[1:]]
        heads = self._sharding.local.kv_heads
        pages = [self._heads(part, heads) for part in parts]
        return np.concatenate(pages, axis=1).data.cast("B")

    def read_beside(self, block_ids: list[int], start: int, end: int) -> memoryview | None:
        """None: followers do one thing after the other, as rank 0's engine tells them."""
        return None

    def write_kv(
        self, block_ids: list[int], start: int, payload: Payload, layers: range | None = None
    ) -> None:
        """Store canonical bytes from token `start` on, each rank its own kv heads."""
        page = self._heads(payload, self._sharding.config.kv_heads, layers)
        with self._followers.named():
            for rank in range(self._sharding.size):
                heads = self._sharding.kv_heads_of(rank)
                part = page[:, heads.start : heads.stop].tobytes()
                if rank == 0:
                    self._own.write_kv(block_ids, start, part, layers)
                else:
                    self._followers.tell(rank, "write_kv", block_ids, start, part, layers)

    def _heads(
        self, payload: Payload, heads: int, layers: range | None = None
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """[planes, kv heads, bytes of a head's tokens] of a canonical page with so many heads."""
        planes = 2 * len(layers or range(self._sharding.config.layers))
        return np.frombuffer(payload, np.uint8).reshape(planes, heads, -1)

    def close(self) -> None:
        """Ends the other ranks."""
        self._followers.close()
