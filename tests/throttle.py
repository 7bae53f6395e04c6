"""A proxy that makes a server of this machine as far away as one would like: a latency for each answer, a bandwidth for each connection.

Requests can also be held, so that work stands still at a known place for as long as a test looks at it.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_CHUNK_BYTES = 64 << 10
_HEAD = re.compile(rb"[A-Z]+ \S+ HTTP/")  # of a request: bodies come in chunks, too
_RANGE = re.compile(rb"^range: *bytes=(\d+)-", re.IGNORECASE | re.MULTILINE)


def nothing(request: bytes) -> bool:
    """Everything passes."""
    del request
    return False


def asks_from(offset_bytes: int) -> Callable[[bytes], bool]:
    """Requests for what lies behind an offset in a file."""
    return lambda request: (found := _RANGE.search(request)) is not None and int(found[1]) >= offset_bytes


@dataclass
class Throttle:
    """How slow; may be changed while it runs. `bytes_per_second` is each connection's and direction's, 0 for no limit.

    `holds` tells by the head of a request whether it waits here until it is not held any more.
    """

    port: int = 0
    latency_seconds: float = 0.0
    bytes_per_second: float = 0.0
    passed_bytes: int = 0
    holds: Callable[[bytes], bool] = nothing


@contextmanager
def throttled(server_port: int, *, latency_seconds: float = 0.0, bytes_per_second: float = 0.0) -> Iterator[Throttle]:
    """Run the proxy in a thread; `port` is where it listens."""
    throttle = Throttle(latency_seconds=latency_seconds, bytes_per_second=bytes_per_second)
    loop, ready, over = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def serve() -> None:
        server = await asyncio.start_server(
            lambda reader, writer: _connect(reader, writer, server_port, throttle), "127.0.0.1", 0
        )
        throttle.port = server.sockets[0].getsockname()[1]
        ready.set()
        await over.wait()
        server.close()

    thread = threading.Thread(target=_run, args=(loop, serve()), name="throttle", daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield throttle
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()


def _run(loop: asyncio.AbstractEventLoop, serving: Coroutine[None, None, None]) -> None:
    asyncio.set_event_loop(loop)
    loop.run_until_complete(serving)
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.close()


async def _connect(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, server_port: int, throttle: Throttle
) -> None:
    try:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", server_port)
    except OSError:
        writer.close()
        return
    asked = asyncio.Event()
    await asyncio.gather(
        _pump(reader, far_writer, throttle, asked, is_answer=False),
        _pump(far_reader, writer, throttle, asked, is_answer=True),
    )


async def _pump(
    source: asyncio.StreamReader,
    target: asyncio.StreamWriter,
    throttle: Throttle,
    asked: asyncio.Event,
    *,
    is_answer: bool,
) -> None:
    try:
        while chunk := await source.read(_CHUNK_BYTES):
            if is_answer and asked.is_set():  # the first of an answer
                asked.clear()
                await asyncio.sleep(throttle.latency_seconds)
            elif not is_answer:
                asked.set()
                while _HEAD.match(chunk) and throttle.holds(chunk):
                    await asyncio.sleep(0.01)
            if throttle.bytes_per_second:
                await asyncio.sleep(len(chunk) / throttle.bytes_per_second)
            throttle.passed_bytes += len(chunk)
            target.write(chunk)
            await target.drain()
    except OSError:  # either side has hung up
        pass
    finally:
        target.close()
