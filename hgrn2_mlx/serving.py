"""What mlx-lm's server leaves open.

As of mlx-lm 0.32.2 one thread generates for all clients, and some malformed requests
end it (an empty prompt, stop words that are not strings), others get no answer at all:
here they are refused, with status 400, before they reach it. A stop word written in
other tokens than the tokenizer's own for it did not end a text: here it does. And an
answer that is not streamed is no longer written to its end for a client that left.
"""

import dataclasses
import functools
import json
import logging
import socket
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub.constants import HF_HUB_CACHE
from mlx_lm import server

SEEDS = 1 << 64


def guard_server() -> None:
    """Makes ``mlx_lm.server.main`` answer with :class:`GuardedHandler`."""
    # Its list of models fails where nothing was ever downloaded.
    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    generate = server.ResponseGenerator._generate
    server.ResponseGenerator._generate = _without_streams_left(generate)
    # Not run, which ignores the handler that it takes.
    server._run_http_server = functools.partial(_run, server._run_http_server)


def _without_streams_left(generate: Callable[[Any], None]) -> Callable[[Any], None]:
    """Ends the thread that generates so that the process can end.

    MLX's own threads for its streams would else still run, and abort the process every other time.
    """

    @functools.wraps(generate)
    def generate_and_clear(self: server.ResponseGenerator) -> None:
        try:
            generate(self)
        finally:
            mx.clear_streams()

    return generate_and_clear


def _run(
    run_http_server: Any, host: str, port: int, response_generator: server.ResponseGenerator
) -> None:
    try:
        run_http_server(
            host, port, response_generator, server_class=_Server, handler_class=GuardedHandler
        )
    finally:  # Or the process would go on, with an error or a signal behind it.
        response_generator.stop_and_join()


class _Server(ThreadingHTTPServer):
    # Connections that wait to be accepted. Python's 5 are too few for as many clients as
    # mlx-lm generates for at a time: further ones wait for seconds, and some are reset.
    request_queue_size = 128


class GuardedHandler(server.APIHandler):
    """mlx-lm's handler of one connection, with the checks that it lacks."""

    def do_POST(self) -> None:
        try:
            super().do_POST()
        except UnicodeDecodeError as error:
            self._set_completion_headers(400)
            self.end_headers()
            message = f"The request body is not UTF-8: {error}"
            self.wfile.write(json.dumps({"error": message}).encode())
        except ConnectionError:
            logging.info("The client left before the end of its answer")

    def validate_model_parameters(self) -> None:
        """Checks the request's body, ``self.body``.

        Raises:
            ValueError: If it is malformed; its message is what the client gets.
        """
        try:
            super().validate_model_parameters()
        except TypeError as error:  # logit_bias with values that are no numbers
            raise ValueError(str(error)) from None
        prompt = self.body.get("prompt", "not needed in a chat")
        if not isinstance(prompt, str) or not prompt:
            raise ValueError("prompt must be a string that is not empty")
        stop = self.body.get("stop") or []
        if not isinstance(stop, str) and not _are_strings(stop):
            raise ValueError("stop must be a string or a list of strings")
        if self.seed is not None and not 0 <= self.seed < SEEDS:
            raise ValueError("seed must be at least 0 and less than 2^64")

    def handle_completion(self, *arguments: Any) -> None:
        self.response_generator = _OneClient(self.response_generator, self.connection)
        super().handle_completion(*arguments)


def _are_strings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


class _OneClient:
    """mlx-lm's generator of responses, until a stop word or until the client has left.

    Where the responses end, mlx-lm's handler ends the text, and takes the stop word off.
    """

    def __init__(self, generator: server.ResponseGenerator, connection: socket.socket):
        self.generator = generator
        self.connection = connection
        self.cli_args = generator.cli_args

    def generate(
        self,
        request: server.CompletionRequest,
        arguments: server.GenerationArguments,
        **settings: Any,
    ) -> tuple[Any, Iterator[server.Response]]:
        context, responses = self.generator.generate(request, arguments, **settings)
        return context, self._until_the_end(responses, list(filter(None, arguments.stop_words)))

    def _until_the_end(
        self, responses: Iterator[server.Response], stop_words: list[str]
    ) -> Iterator[server.Response]:
        longest = max(map(len, stop_words), default=0)
        recent = ""  # in which a stop word may have begun
        for response in responses:
            if self._client_has_left():
                raise ConnectionAbortedError
            read = len(recent)
            recent += response.text
            ends = [recent.index(word) + len(word) for word in stop_words if word in recent]
            if ends and response.finish_reason != "stop":
                text = recent[read : min(ends)]
                yield dataclasses.replace(response, text=text, finish_reason=None)
                return
            recent = recent[max(0, len(recent) - longest) :]
            yield response

    def _client_has_left(self) -> bool:
        try:
            return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
