"""A small server that speaks NDIF's protocol, for tests: it takes jobs, queues them, runs them, sends results.

The parts of the protocol that a blocking job uses: a websocket that gives a session id and then tells the job's status,
and a form post that brings the job. The job is unpacked and run on a model that the server holds.
"""

from __future__ import annotations

import asyncio
import io
import json
import linecache
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def serve(model: Any, key: str = "a-key") -> Iterator[tuple[str, list[str]]]:
    """Address of a server that holds a large model, and the list of what it has told: statuses, and refusals."""
    from tornado import web
    from tornado.httpserver import HTTPServer
    from tornado.netutil import bind_sockets
    from tornado.websocket import WebSocketHandler

    sockets: dict[str, Any] = {}
    told: list[str] = []

    class Subscribe(WebSocketHandler):
        def open(self) -> None:
            session = f"session-{len(sockets)}"
            sockets[session] = self
            self.write_message(json.dumps({"session_id": session}))

    class Request(web.RequestHandler):
        def post(self) -> None:
            from nnsight.schema.response import ResponseModel, Status

            if self.request.headers.get("ndif-api-key") != key:
                told.append("refused")
                self.set_status(401)
                self.finish(json.dumps({"detail": "API key is not valid"}))
                return
            envelope = json.loads(self.get_body_argument("data"))
            blob = self.request.files["blob"][0]["body"]
            self.finish(ResponseModel(id="job", status=Status.RECEIVED).model_dump_json())
            asyncio.get_event_loop().call_later(0.01, self.work, envelope, blob)

        def work(self, envelope: dict, blob: bytes) -> None:
            from nnsight.schema.response import ResponseModel, Status

            socket = sockets[envelope["session_id"]]

            def tell(status: Status, description: str = "") -> None:
                told.append(status.value)
                socket.write_message(ResponseModel(id="job", status=status, description=description).model_dump_json())

            tell(Status.QUEUED, "1 job before this one")
            tell(Status.RUNNING)
            try:
                result = run(model, blob, envelope["compress"])
            except Exception as error:
                tell(Status.ERROR, f"{type(error).__name__}: {error}")
                return
            told.append(Status.COMPLETED.value)
            done = ResponseModel(id="job", status=Status.COMPLETED, data=result)
            socket.write_message(done.pickle(), binary=True)

    ports: list[int] = []
    ready, loop = threading.Event(), asyncio.new_event_loop()

    def main() -> None:
        asyncio.set_event_loop(loop)
        bound = bind_sockets(0, "127.0.0.1")
        ports.append(bound[0].getsockname()[1])
        handlers = [("/subscribe", Subscribe), ("/request", Request)]
        server = HTTPServer(web.Application(handlers), max_buffer_size=2**30)
        server.add_sockets(bound)
        loop.call_soon(ready.set)
        loop.run_forever()

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield f"http://127.0.0.1:{ports[0]}", told
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def run(model: Any, blob: bytes, compress: bool) -> bytes:
    """Unpack a job, run it on this model, pack what it saved."""
    import torch
    from nnsight.schema.request import RequestModel
    from nnsight.tracing.tracer import dec, inc

    known = dict(linecache.cache)
    tracer = RequestModel.deserialize(blob, model.nn._remoteable_persistent_objects(), compress)
    linecache.cache.clear()  # unpacking registers its own source under our files' names; a real server is elsewhere
    linecache.cache.update(known)
    names = set(tracer.info.frame.f_locals)
    inc()
    try:
        tracer.execute(tracer.info.code)
    finally:
        dec()
    saved = {name: value for name, value in tracer.info.frame.f_locals.items() if name not in names}
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    if not compress:
        return buffer.getvalue()
    import zstandard

    return zstandard.ZstdCompressor().compress(buffer.getvalue())
