"""A pod's life: listen, load, serve, drain, end."""

from __future__ import annotations

import asyncio
import logging
import os
from functools import partial
from importlib import import_module
from typing import Any

from tandem_runtime.frontend.oip.grpc import bind, create_server
from tandem_runtime.frontend.process import stop_signal
from tandem_runtime.frontend.server import HttpServer
from tandem_runtime.serve.api import create_pod_app, inference_service
from tandem_runtime.serve.options import ServeOptions
from tandem_runtime.serve.pod import Pod
from tandem_runtime.serve.worker import EngineWorker

log = logging.getLogger(__name__)


async def run(options: ServeOptions) -> int:
    """The exit status. Raises `BadConfig`, and OSError for an address that cannot be used."""
    asked_to_stop = stop_signal()
    http = HttpServer(options.host, options.port)
    await http.start()
    worker = EngineWorker()
    pod = await _load(options, worker, asked_to_stop)
    if pod is None:
        log.info("asked to stop while loading")
        os._exit(0)  # the loading thread cannot be interrupted, and nothing was served
    await pod.open()
    inference = inference_service(pod)
    grpc = create_server(inference)
    bind(grpc, options.host, options.grpc_port)
    await grpc.start()
    http.app = create_pod_app(pod, inference)
    log.info("%s pod %s serves %s", options.role, options.pod, ", ".join(options.served_names))
    failed = await _until_stopped(pod, asked_to_stop)
    await grpc.stop(grace=5)
    await http.stop()
    await pod.close()
    return 1 if failed else 0


async def _load(
    options: ServeOptions, worker: EngineWorker, asked_to_stop: asyncio.Event
) -> Pod | None:
    """None when asked to stop before it was done."""
    # Torch takes seconds to import; by then the pod answers its probes.
    load = await asyncio.to_thread(import_module, "tandem_runtime.serve.load")
    stopping = asyncio.ensure_future(asked_to_stop.wait())
    loading = asyncio.ensure_future(worker.start(partial(load.load_engine, options)))
    await asyncio.wait({stopping, loading}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not loading.done():
        return None
    engine = loading.result()
    return Pod(options, worker, engine, await asyncio.to_thread(load.load_bundle, options, engine))


async def _until_stopped(pod: Pod, asked_to_stop: asyncio.Event) -> bool:
    """Serves until it is asked to stop and empty; True when the engine failed instead."""
    stopping = asyncio.ensure_future(asked_to_stop.wait())
    either: set[asyncio.Future[Any]] = {stopping, pod.worker.failed}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if stopping.done():
        log.info("draining: %d streams are left", pod.state().in_flight)
        pod.lifecycle.stop()
        emptying = asyncio.ensure_future(pod.empty())
        either = {emptying, pod.worker.failed}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        emptying.cancel()
    stopping.cancel()
    return pod.worker.failed.done()
