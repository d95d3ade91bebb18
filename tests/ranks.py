"""Runs a command in several local processes that form an MLX group, as mlx.launch does.

mlx.launch itself ends with status 0 whatever its processes do, and takes fixed ports.
"""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path


def start(command: list[str], processes: int, folder: Path) -> list[subprocess.Popen]:
    """Starts ``python *command`` on the ring backend; ``folder`` is for the list of hosts.

    Output and errors of each are in one pipe. A single process is not in a group.
    """
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(processes)]))
    group = {"MLX_HOSTFILE": str(hosts)}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | ({} if processes == 1 else group | {"MLX_RANK": str(rank)}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]


def finish(ranks: list[subprocess.Popen], seconds: int = 60) -> list[tuple[int, str]]:
    """Status and output of each; whoever has not ended after so long is killed."""
    try:
        outputs = [rank.communicate(timeout=seconds)[0] for rank in ranks]
        return [(rank.returncode, output) for rank, output in zip(ranks, outputs)]
    finally:
        for rank in ranks:
            rank.kill()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
