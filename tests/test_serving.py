"""``hgrn2 serve`` as OpenAI's own client sees it."""

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import mlx_lm
import openai
import pytest

from hgrn2_mlx.convert import convert
from hgrn2_mlx.demo import CHECKPOINT

COMMAND = [sys.executable, "-m", "hgrn2_mlx", "serve"]
PROMPTS = ("ROMEO:", "JULIET:\n", "The king", "And the LORD said", "First Citizen:\n")
# How many requests the server answers at a time: few, so that a slot that is lost is missed.
SLOTS = 2
# Far more than can be written before the test's time is over.
ENDLESS = 1_000_000
SOAK_SECONDS = float(os.environ.get("SERVING_SOAK_SECONDS", "600"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The carried checkpoint, in the type that a CPU multiplies fastest."""
    folder = tmp_path_factory.mktemp("serving") / "model"
    convert(CHECKPOINT, folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def continuation(folder):
    """What the model writes after a prompt, without a server."""
    model, tokenizer = mlx_lm.load(str(folder))
    return lambda prompt, count: mlx_lm.generate(model, tokenizer, prompt, max_tokens=count)


class Server:
    """A server process that listens on a free port of its default address."""

    def __init__(self, folder, *options):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        command = [*COMMAND, "--model", folder, "--port", self.port, *options]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self):
        for _ in range(1200):
            assert self.process.poll() is None, "the server stopped"
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=60).close()
                return self
            except OSError:
                time.sleep(0.1)
        raise TimeoutError(self.address)

    def __exit__(self, *_):
        self.process.terminate()
        assert self.process.wait(timeout=60) == 0

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.address}/v1", api_key="none", timeout=240, max_retries=0
        )

    def post(self, body: bytes, path="/v1/completions") -> tuple[int, str]:
        """Status and content, without a client that would refuse to send ``body``."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=240)
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()

    def resident_bytes(self) -> int:
        size = subprocess.check_output(["ps", "-o", "rss=", "-p", str(self.process.pid)])
        return int(size) * 1024


@pytest.fixture(scope="module")
def server(folder):
    with Server(folder, "--decode-concurrency", SLOTS, "--prompt-concurrency", SLOTS) as server:
        yield server


def complete(client, prompt, count, **options):
    return client.completions.create(
        model="default_model", prompt=prompt, max_tokens=count, temperature=0, **options
    )


def test_a_completion_is_the_model_s_continuation(server, continuation):
    answer = complete(server.client(), "ROMEO:", 12)
    assert answer.choices[0].text == continuation("ROMEO:", 12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12


def test_a_streamed_completion_comes_in_pieces_and_is_the_same(server, continuation):
    stream = complete(
        server.client(), "JULIET:\n", 12, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == continuation("JULIET:\n", 12)
    assert sum(map(bool, pieces)) > 4
    assert chunks[-1].usage.completion_tokens == 12


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [" death", "eath", ["Mercutio", "th.\n\nRO"]])
def test_a_stop_word_ends_the_text_before_it(server, continuation, stop, stream):
    expected = continuation("ROMEO:", 24)
    first = stop if isinstance(stop, str) else stop[1]
    assert first in expected
    answer = complete(server.client(), "ROMEO:", ENDLESS, stop=stop, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == expected.partition(first)[0]
    assert choices[-1].finish_reason == "stop"


def test_a_chat_is_answered_whole_and_streamed(server):
    def chat(**options):
        return server.client().chat.completions.create(
            model="default_model",
            messages=[{"role": "user", "content": "Speak, my lord."}],
            max_tokens=12,
            temperature=0,
            **options,
        )

    whole = chat().choices[0].message
    pieces = [chunk.choices[0].delta.content or "" for chunk in chat(stream=True)]
    assert whole.role == "assistant"
    assert whole.content == "".join(pieces) != ""


def test_parallel_requests_get_what_each_gets_alone(server, continuation):
    counts = range(8, 8 + 2 * len(PROMPTS))

    def ask(prompt, count):
        return complete(server.client(), prompt, count).choices[0].text

    requests = [(PROMPTS[n % len(PROMPTS)], count) for n, count in enumerate(counts)]
    with ThreadPoolExecutor(len(requests)) as clients:
        answers = list(clients.map(lambda request: ask(*request), requests))
    assert answers == [continuation(*request) for request in requests]


def test_a_prompt_that_goes_on_starts_from_the_state_that_was_kept(server, continuation):
    beginning = "The king\n" * 40
    read = complete(server.client(), beginning, 4).usage
    assert not read.prompt_tokens_details.cached_tokens
    answer = complete(server.client(), beginning + "Then the king said", 12)
    # All but the last, which is read again for its logits.
    assert answer.usage.prompt_tokens_details.cached_tokens == read.prompt_tokens - 1
    assert answer.choices[0].text == continuation(beginning + "Then the king said", 12)


MALFORMED = {
    "not JSON": b"{",
    "not UTF-8": b"\xff\xfe",
    "a list": [1],
    "no prompt": {"max_tokens": 4},
    "an empty prompt": {"prompt": ""},
    "no string as prompt": {"prompt": None},
    "several prompts": {"prompt": ["ROMEO:", "JULIET:"]},
    "tokens as prompt": {"prompt": [5, 6]},
    "no tokens": {"prompt": "ROMEO:", "max_tokens": 0},
    "a word as number": {"prompt": "ROMEO:", "max_tokens": "four"},
    "a negative temperature": {"prompt": "ROMEO:", "temperature": -1},
    "a number as stop word": {"prompt": "ROMEO:", "stop": 5},
    "numbers as stop words": {"prompt": "ROMEO:", "stop": ["a", 5]},
    "a list as bias": {"prompt": "ROMEO:", "logit_bias": {"5": [1]}},
    "a negative seed": {"prompt": "ROMEO:", "seed": -1},
    "a huge seed": {"prompt": "ROMEO:", "seed": 1 << 64},
}


@pytest.mark.parametrize("request_body", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_request_gets_400_and_the_server_goes_on(server, request_body):
    body = request_body if isinstance(request_body, bytes) else json.dumps(request_body).encode()
    status, content = server.post(body)
    assert status == 400
    assert json.loads(content)["error"]
    assert complete(server.client(), "ROMEO:", 1).choices[0].text


def test_the_list_of_models_names_the_one_that_is_served(server, folder):
    assert str(folder) in [model.id for model in server.client().models.list()]


def test_the_client_raises_its_own_errors(server):
    client = server.client()
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="default_model", prompt="ROMEO:", temperature=-1)
    assert "temperature" in error.value.body
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="default_model", messages="hello")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="default_model", input="hello")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="no-such/model", prompt="ROMEO:")


def test_clients_that_leave_a_stream_free_their_slots(server, continuation):
    for _ in range(SLOTS + 1):
        stream = complete(server.client(), "The king", ENDLESS, stream=True)
        next(iter(stream))
        stream.close()
    assert complete(server.client(), "ROMEO:", 4).choices[0].text == continuation("ROMEO:", 4)


def test_clients_that_stop_waiting_free_their_slots(server, continuation):
    for _ in range(SLOTS + 1):
        with pytest.raises(openai.APITimeoutError):
            complete(server.client().with_options(timeout=1), "The king", ENDLESS)
    assert complete(server.client(), "ROMEO:", 4).choices[0].text == continuation("ROMEO:", 4)


def test_a_port_in_use_is_an_error_that_ends_the_server(server, folder):
    command = [*COMMAND, "--model", folder, "--port", server.port]
    second = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=240
    )
    # Not 1: on Linux, MLX's threads may abort a server that has ended otherwise.
    assert second.returncode != 0
    assert "hgrn2: error: Address already in use" in second.stderr.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere loopback is one address")
def test_the_server_listens_on_one_loopback_address_by_default(server):
    # A server that listens on every address of the machine answers on this one too.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.port), timeout=60)


@pytest.mark.slow
def test_32_clients_for_minutes_get_no_error_and_no_growing_server(folder, continuation):
    """``SERVING_SOAK_SECONDS`` says for how long, 600 by default."""
    requests = [(prompt, count) for prompt in PROMPTS for count in (4, 16, 40)]
    expected = {request: continuation(*request) for request in requests}
    sizes: list[int] = []

    with Server(folder) as server:
        end = time.monotonic() + SOAK_SECONDS
        answered = [0] * 32

        def ask(number: int) -> None:
            client = server.client()
            while time.monotonic() < end:
                prompt, count = request = requests[(number + answered[number]) % len(requests)]
                stream = bool(number % 2)
                answer = complete(client, prompt, count, stream=stream)
                choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
                assert "".join(choice.text for choice in choices) == expected[request]
                answered[number] += 1

        def watch() -> None:
            while time.monotonic() < end:
                time.sleep(SOAK_SECONDS / 60)
                sizes.append(server.resident_bytes())

        watching = threading.Thread(target=watch)
        watching.start()
        with ThreadPoolExecutor(32) as clients:
            list(clients.map(ask, range(32)))
        watching.join()

    print(f"{sum(answered)} answers; MB resident: {[size // 1_000_000 for size in sizes]}")
    assert min(answered) > 0
    # The first third fills the caches of prompts and of memory; then peaks are compared.
    third = len(sizes) // 3
    assert max(sizes[-third:]) < 1.1 * max(sizes[third:-third])
