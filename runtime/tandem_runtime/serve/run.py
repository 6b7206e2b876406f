"""A pod's life: listen, load, serve, drain, end."""

from __future__ import annotations

import asyncio
import logging
import os
from functools import partial
from importlib import import_module
from typing import Any

from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.frontend.oip.grpc import bind, create_server
from tandem_runtime.frontend.process import leave_word, stop_signal
from tandem_runtime.frontend.server import HttpServer
from tandem_runtime.serve.api import create_pod_app, inference_service
from tandem_runtime.serve.model import fitted, open_model, read_bundle
from tandem_runtime.serve.options import ServeOptions
from tandem_runtime.serve.pod import Pod
from tandem_runtime.serve.worker import EngineFailed, EngineWorker

log = logging.getLogger(__name__)


async def run(options: ServeOptions) -> int:
    """The exit status. Raises `BadConfig`, and OSError for an address that cannot be used."""
    worker = EngineWorker()
    try:
        await _run(options, worker)
    except ModelError as error:
        leave_word(str(error))
        return 1  # a source that does not answer now; what no restart mends is `BadConfig`
    except EngineFailed as failure:
        leave_word(str(failure))
        os._exit(1)  # the engine's thread may wait for a rank that is gone
    finally:
        await worker.stop()
    return 0


async def _run(options: ServeOptions, worker: EngineWorker) -> None:
    """Raises `EngineFailed` when the streams have been told."""
    asked_to_stop = stop_signal()
    http = HttpServer(options.host, options.port)
    await http.start()
    loading = asyncio.ensure_future(_load(options, worker))
    stopping = asyncio.ensure_future(asked_to_stop.wait())
    await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not loading.done():
        log.info("asked to stop while loading")
        os._exit(0)  # the loading threads cannot be interrupted, and nothing was served
    pod = loading.result()
    await pod.open()
    inference = inference_service(pod)
    grpc = create_server(inference)
    bind(grpc, options.host, options.grpc_port)
    await grpc.start()
    http.app = create_pod_app(pod, inference)
    log.info("%s pod %s serves %s", options.role, options.pod, ", ".join(options.served_names))
    await _until_stopped(pod, asked_to_stop)
    await grpc.stop(grace=5)
    await http.stop()
    await pod.close()
    if worker.failed.done():
        await worker.failed


async def _load(options: ServeOptions, worker: EngineWorker) -> Pod:
    checkpoint = await asyncio.to_thread(open_model, options.engine)
    bundle = await asyncio.to_thread(read_bundle, checkpoint)
    # Torch takes seconds to import; by now the pod answers its probes.
    load = await asyncio.to_thread(import_module, "tandem_runtime.serve.load")
    engine = await worker.start(partial(load.load_engine, options, worker.fail))
    return Pod(options, worker, engine, fitted(bundle, engine))


async def _until_stopped(pod: Pod, asked_to_stop: asyncio.Event) -> None:
    """Serves until it is asked to stop and empty, or the engine fails."""
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
