"""Memory, files and tasks stay bounded: large bodies, slow ones, and a thousand at once."""

from __future__ import annotations

import asyncio
import hashlib
import json
import resource
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import anyio
import pytest

from tests.support import done, event, line, turn, write_agent
from tests.test_faults import (
    CHUNKED,
    EMPTY,
    MEGABYTE,
    STATUS,
    House,
    Reader,
    Serve,
    Writer,
    answer_of,
    body_after,
    built,
    connection,
    nothing,
    until,
)
from tests.test_osp import starting, with_agents

SIZE = 2048 * MEGABYTE
BLOCK = b"0123456789abcdef" * 2**14  # a quarter of a megabyte
PATIENCE = 50  # seconds for the largest of bodies
STREAMS = 1000
KEPT = 64  # upstream connections
HEAD = STATUS + b"Content-Type: application/x-ndjson\r\n" + CHUNKED
SHOUTS = """
class Shouts(BaseAgent):
    async def on_chunk(self, text):
        return text.upper()
"""

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory and files are read from /proc"
)


class Outside(House):
    """A house whose proxy is a process of its own."""

    pid: int
    address: str

    def memory(self, name: str) -> int:
        """Return VmRSS (now) or VmHWM (at most), in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return 1024 * int(status.split(f"{name}:")[1].split()[0])

    def files(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    @asynccontextmanager
    async def flat(self, serve: Serve, megabytes: int = 32) -> AsyncIterator[tuple[Reader, Writer]]:
        """Yield a connection while `serve` answers; assert that the proxy grows by less."""
        self.serve = serve
        before = self.memory("VmRSS")
        with anyio.fail_after(PATIENCE):
            async with connection(self.address) as (reader, writer):
                yield reader, writer
        assert self.memory("VmHWM") - before < megabytes * MEGABYTE


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[Outside]:
    """The command line before an upstream; it has answered a few requests already."""
    config = tmp_path / "osp.toml"
    config.write_text(f"server.max_body = {MEGABYTE}\n", encoding="utf-8")
    write_agent(tmp_path / "plugins", "shouts", SHOUTS)
    house = Outside(nothing)
    await house.open()
    flags = ("--config", str(config), "--upstream", f"http://127.0.0.1:{house.port}")
    async with starting(*flags, env=with_agents(tmp_path / "plugins")) as proxy:
        async with proxy.client() as client:
            for text in ("x", "/shouts x"):
                await client.post("/api/chat", json=turn(text))
        house.pid, house.address = proxy.process.pid, str(client.base_url)
        assert proxy.process.stderr
        reading = asyncio.create_task(proxy.process.stderr.read())  # or its log would block it
        yield house
        reading.cancel()
        await asyncio.wait({reading})
    await house.close()


@pytest.fixture
def many_files() -> Iterator[None]:
    """Let this process and its children open some thousand files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * STREAMS
    if limits[1] != resource.RLIM_INFINITY and limits[1] < wanted:
        pytest.skip(f"only {limits[1]} open files are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], wanted), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def head_of(path: str, framing: str, size: int) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n".encode()
    return head + (CHUNKED if framing == "chunked" else b"Content-Length: %d\r\n\r\n" % size)


async def write_body(writer: Writer, framing: str, size: int) -> None:
    part = b"%x\r\n%s\r\n" % (len(BLOCK), BLOCK) if framing == "chunked" else BLOCK
    for _ in range(size // len(BLOCK)):
        writer.write(part)
        await writer.drain()
    writer.write(b"0\r\n\r\n" if framing == "chunked" else b"")


async def parts(reader: Reader, head: bytes) -> AsyncGenerator[bytes, None]:
    """Yield the body that `head` announces without keeping it."""
    if b"chunked" not in head.lower():
        left = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        while left:
            part = await reader.read(min(left, MEGABYTE))
            assert part, f"{left} bytes are missing"
            left -= len(part)
            yield part
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)


async def count(reader: Reader, head: bytes) -> int:
    async with aclosing(parts(reader, head)) as body:
        return sum([len(part) async for part in body])


def little(writer: Writer) -> None:
    """Let the kernel keep but little of what this end sends and receives."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, option, len(BLOCK))


def kernel_buffers() -> int:
    """Return what the kernel may keep of what the proxy receives and sends on one connection."""
    limits = [Path(f"/proc/sys/net/ipv4/tcp_{kind}mem").read_text("ascii") for kind in "rw"]
    return sum(int(limit.split()[2]) for limit in limits)


async def stalled(progress: list[int]) -> int:
    """Return the last progress, once it has not changed for a while."""
    seen, since = -1, anyio.current_time()
    with anyio.fail_after(10):
        while anyio.current_time() - since < 0.4:
            if progress[-1] != seen:
                seen, since = progress[-1], anyio.current_time()
            await asyncio.sleep(0.02)  # between two looks: that nothing happens is no event
    return seen


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_large_upload_passes_in_flat_memory(house: Outside, framing: str) -> None:
    got: list[int] = []

    async def serve(reader: Reader, writer: Writer, head: bytes) -> None:
        got.append(await count(reader, head))
        writer.write(EMPTY)

    async with house.flat(serve) as (reader, writer):
        writer.write(head_of("/api/blobs/sha256:0", framing, SIZE))
        await write_body(writer, framing, SIZE)
        head = await reader.readuntil(b"\r\n\r\n")

    assert head.startswith(STATUS) and got == [SIZE]


async def test_a_large_download_passes_in_flat_memory(house: Outside) -> None:
    async def serve(reader: Reader, writer: Writer, head: bytes) -> None:
        writer.write(HEAD)
        await write_body(writer, "chunked", SIZE)

    async with house.flat(serve) as (reader, writer):
        writer.write(b"GET /api/large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        got = await count(reader, await reader.readuntil(b"\r\n\r\n"))

    assert got == SIZE


async def test_a_chat_that_is_too_large_to_parse_is_not_collected(house: Outside) -> None:
    size = 64 * MEGABYTE
    digests: list[bytes] = []

    async def serve(reader: Reader, writer: Writer, head: bytes) -> None:
        digest = hashlib.sha256()
        async with aclosing(parts(reader, head)) as body:
            async for part in body:
                digest.update(part)
        digests.append(digest.digest())
        writer.write(EMPTY)

    start, end = json.dumps(turn("/shouts ")).encode().split(b"/shouts ")
    start += b"/shouts "
    async with house.flat(serve, megabytes=48) as (reader, writer):
        writer.write(head_of("/api/chat", "length", size + len(start + end)) + start)
        await write_body(writer, "length", size)
        writer.write(end)
        head = await reader.readuntil(b"\r\n\r\n")

    sent = hashlib.sha256(start)
    for part in (*[BLOCK] * (size // len(BLOCK)), end):
        sent.update(part)
    assert head.startswith(STATUS) and digests == [sent.digest()]


async def test_a_slow_client_slows_the_upstream_and_its_leaving_closes_it(house: Outside) -> None:
    accepted = [0]
    closed = asyncio.Event()

    async def serve(reader: Reader, writer: Writer, head: bytes) -> None:
        little(writer)
        writer.write(HEAD)
        try:
            while True:
                writer.write(b"%x\r\n%s\r\n" % (len(BLOCK), BLOCK))
                await writer.drain()
                accepted.append(accepted[-1] + len(BLOCK))
        finally:
            closed.set()

    async with house.flat(serve) as (reader, writer):
        little(writer)
        writer.write(b"GET /api/endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readexactly(MEGABYTE)
        at_most = await stalled(accepted)

    with anyio.fail_after(1):
        await closed.wait()
    assert MEGABYTE <= at_most < kernel_buffers() + 8 * MEGABYTE


async def test_an_upstream_that_stops_reading_slows_the_client(house: Outside) -> None:
    over = asyncio.Event()

    async def serve(reader: Reader, writer: Writer, head: bytes) -> None:
        little(writer)
        await over.wait()
        writer.close()

    accepted = [0]

    async def upload(writer: Writer) -> None:
        while True:
            await write_body(writer, "length", len(BLOCK))
            accepted.append(accepted[-1] + len(BLOCK))

    async with house.flat(serve) as (_, writer):
        little(writer)
        writer.write(head_of("/api/blobs/sha256:0", "length", SIZE))
        uploading = asyncio.create_task(upload(writer))
        at_most = await stalled(accepted)
        over.set()
        uploading.cancel()
        await asyncio.wait({uploading})

    assert len(BLOCK) <= at_most < kernel_buffers() + 8 * MEGABYTE


async def test_a_thousand_streams_at_once_leave_nothing_open(
    many_files: None, house: Outside
) -> None:
    """Half of them have an agent in play; all are open before the first one ends."""
    first, rest = line("some "), line("text") + done()
    loud = line("SOME ") + line("TEXT") + done()
    arrived = [0]
    go = asyncio.Event()

    async def serve(reader: Reader, writer: Writer, head: bytes) -> None:
        await body_after(reader, head)
        writer.write(HEAD + b"%x\r\n%s\r\n" % (len(first), first))
        await go.wait()
        writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(rest), rest))

    async def chat(text: str) -> bytes:
        async with connection(house.address) as (reader, writer):
            body = json.dumps(turn(text)).encode()
            writer.write(head_of("/api/chat", "length", len(body)) + body)
            head = await reader.readuntil(b"\r\n\r\n")
            async with aclosing(parts(reader, head)) as frames:
                got = await anext(frames)
                arrived[0] += 1
                return got + b"".join([frame async for frame in frames])

    house.serve = serve
    before = house.files()
    chats = [asyncio.create_task(chat(text)) for text in ("x", "/shouts x") * (STREAMS // 2)]
    await until(lambda: arrived[0] == STREAMS, PATIENCE)
    open_then = house.files()
    go.set()
    with anyio.fail_after(PATIENCE):
        answers = await asyncio.gather(*chats)

    assert answers == [first + rest, loud] * (STREAMS // 2)
    assert open_then >= before + 2 * STREAMS - KEPT
    await until(lambda: house.files() <= before + KEPT, 5)
    async with connection(house.address) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await answer_of(reader))[0].startswith(STATUS)


async def test_streams_leave_no_task_behind_whether_they_end_or_are_left(tmp_path: Path) -> None:
    paths = ["/api/chat", "/v1/chat/completions", "/api/generate", "/api/pull"]
    arrived: list[bytes] = []
    go = asyncio.Event()

    async def serve(reader: Reader, writer: Writer, head: bytes) -> None:
        arrived.append(await body_after(reader, head))
        frame, end = (event("a"), event(None, "stop")) if b"/v1/" in head else (line("a"), done())
        writer.write(HEAD + b"%x\r\n%s\r\n" % (len(frame), frame))
        leaving = asyncio.create_task(reader.read())
        going = asyncio.create_task(go.wait())
        await asyncio.wait({leaving, going}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        going.cancel()
        writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(end), end))
        writer.close()

    async with built(tmp_path, shouts=SHOUTS) as house:
        house.serve = serve

        async def chat(nth: int) -> None:
            async with connection(house.url) as (reader, writer):
                body = json.dumps(turn("/shouts x" if nth % 8 < 4 else "x", stream=True)).encode()
                writer.write(head_of(paths[nth % 4], "length", len(body)) + body)
                head = await reader.readuntil(b"\r\n\r\n")
                if nth % 10 >= 3:
                    assert await count(reader, head)

        await house.hang_up()
        before = len(asyncio.all_tasks())
        chats = [asyncio.create_task(chat(nth)) for nth in range(100)]
        await until(lambda: len(arrived) == 100 and sum(task.done() for task in chats) == 30)
        go.set()
        await asyncio.gather(*chats)

        await until(lambda: len(asyncio.all_tasks()) == before)
