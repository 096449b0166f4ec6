"""The bridge's own promises: typed messages both ways, garbage dropped, readers bounded, no pickle anywhere."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from fake_worker import FakeEngine

import powertrain.serve
from powertrain.checkpoint.unfinished import is_abandoned, locked
from powertrain.config import EngineConfig
from powertrain.serve import bridge, messages, worker
from powertrain.serve.bridge import EngineClient, EngineDeadError, EngineFaultError, OutputQueue
from powertrain.types import (
    EngineStats,
    FinishReason,
    PowertrainError,
    Request,
    SamplingParams,
    TokenLogprob,
    TokenOutput,
)

REQUEST = Request(
    request_id="r",
    prompt_token_ids=(70, 71),
    sampling=SamplingParams(n=2, max_tokens=3, logit_bias={5: 1.5}, stop=("x",), stop_token_ids=(7,)),
    eos_token_ids=(1,),
    cache_salt="salt",
)

GARBAGE = [
    b"",
    b"\x00",
    b"\xff" * 1000,
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x91" * 100_000,  # nested arrays
    pickle.dumps(REQUEST),
    msgspec.msgpack.encode({"type": "no such message"}),
    msgspec.msgpack.encode({"type": "add", "request": {"request_id": 5}}),
    msgspec.msgpack.encode(
        {"type": "add", "request": {"request_id": "a", "prompt_token_ids": [1], "sampling": {"n": 99}}}
    ),
    msgspec.msgpack.encode({"type": "abort", "request_id": ["r"]}),
]


def test_messages_survive_the_journey() -> None:
    inbox = messages.engine_inbox()
    for message in (messages.Add(REQUEST), messages.Abort("r", 1), messages.Abort("r"), messages.Shutdown()):
        assert inbox.decode(messages.encode(message)) == message
    output = TokenOutput(
        request_id="r",
        index=1,
        token_ids=[5, 6],
        logprobs=[TokenLogprob(5, -0.1234567890123456, 1, (5, 6), (-0.1234567890123456, -2.5))] * 2,
        prompt_logprobs=[None, TokenLogprob(6, -1e30, 300)],
        finish_reason=FinishReason.STOP,
        stop_token_id=6,
        num_cached_tokens=16,
    )
    web = messages.web_inbox()
    for reply in (
        messages.Outputs([output], EngineStats(num_steps=3), 1.5),
        messages.Rejected("r", "too long", "prompt"),
        messages.Heartbeat(EngineStats()),
        messages.Fatal("gone"),
    ):
        assert web.decode(messages.encode(reply)) == reply


@pytest.mark.parametrize("frame", GARBAGE)
def test_garbage_is_counted_and_dropped(frame: bytes) -> None:
    for inbox in (messages.engine_inbox(), messages.web_inbox()):
        assert inbox.decode(frame) is None
        assert inbox.num_dropped == 1
        assert inbox.decode(frame) is None
        assert inbox.num_dropped == 2


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[zmq.Socket[bytes]]:
    """A socket in the web process's place, with a worker thread on the other side."""
    address = f"ipc://{tmp_path}/engine"
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.RCVTIMEO, 10_000)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(address)
    launch = messages.Launch(model=str(tmp_path), address=address, parent_pid=0, engine_config=EngineConfig())
    thread = threading.Thread(target=worker.run, args=(launch, FakeEngine))
    thread.start()
    yield socket
    socket.send(messages.encode(messages.Shutdown()))
    thread.join(10)
    assert not thread.is_alive()
    socket.close()
    context.term()


def test_worker_survives_garbage_and_still_works(peer: zmq.Socket[bytes]) -> None:
    inbox = messages.web_inbox()
    assert isinstance(inbox.decode(peer.recv()), messages.Ready)
    for frame in GARBAGE:
        peer.send(frame)
    peer.send(messages.encode(messages.Add(REQUEST)))
    finished: set[int] = set()
    while len(finished) < 2:
        message = inbox.decode(peer.recv())
        if isinstance(message, messages.Outputs):
            finished |= {output.index for output in message.outputs if output.finish_reason is FinishReason.LENGTH}
    assert finished == {0, 1}


def test_idle_worker_sends_heartbeats_with_the_step_count(peer: zmq.Socket[bytes]) -> None:
    inbox = messages.web_inbox()
    received = [inbox.decode(peer.recv()) for _ in range(3)]
    assert isinstance(received[0], messages.Ready)
    assert all(isinstance(message, messages.Heartbeat) for message in received[1:])


async def test_slow_reader_is_given_up() -> None:
    queue = OutputQueue(max_buffered=2)
    output = TokenOutput(request_id="r", index=0, token_ids=[1])
    assert [queue.put(output) for _ in range(3)] == [True, True, False]
    assert await queue.get() is output
    assert await queue.get() is output
    with pytest.raises(EngineFaultError, match="too slowly"):
        await queue.get()


async def test_process_that_dies_at_once_is_an_error(tmp_path: Path) -> None:
    client = EngineClient(tmp_path, EngineConfig(), command=("false",))
    with pytest.raises(PowertrainError, match="status 1"):
        await client.start()
    with pytest.raises(EngineDeadError):
        client.add(REQUEST, OutputQueue())
    await client.close()


def test_no_pickle_in_the_package() -> None:
    folder = Path(powertrain.serve.__file__).parent
    for path in folder.glob("*.py"):
        for word in ("import pickle", "send_pyobj", "recv_pyobj", "cloudpickle"):
            assert word not in path.read_text(), path


def test_socket_folders_of_killed_servers_are_removed_and_no_others(tmp_path: Path) -> None:
    killed, alive, foreign = (tmp_path / f"powertrain-{name}" for name in ("killed", "alive", "foreign"))
    for folder in (killed, alive, foreign):
        folder.mkdir()
    for folder in (killed, alive):
        (folder / bridge.LOCK).touch()
    with locked(alive / bridge.LOCK):
        bridge._remove_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == [alive, foreign]


def test_a_servers_own_socket_folder_is_locked_and_goes() -> None:
    with bridge._private_directory() as own:
        assert not is_abandoned(Path(own) / bridge.LOCK)
        bridge._remove_abandoned(Path(own).parent)
        assert Path(own).is_dir()
    assert not Path(own).exists()
