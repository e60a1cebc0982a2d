"""Several ranks on one machine: time of a step and bytes sent, against one process; through a slow network, if asked.

    python tests/benchmarks/ranks.py --model MODEL --data DATA [--ranks 2] [--split data] [--steps 30]
        [--delay-ms 20 --mbit 10]

Bytes are those that the kernel counts at the sockets of rank 0 (TCP_INFO, Linux). With `--delay-ms` and `--mbit`
the ranks' connections go through relays, which hold every byte up so long and let no more than so many through. All
ranks share this machine's processors, so that the step does not get faster: what the figures show is what talking
costs.
"""

import zo_mlx  # isort: skip  # noqa: F401  (first, so that MLX gets a fast BLAS)

import argparse
import contextlib
import json
import os
import queue
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

# Where struct tcp_info has tcpi_bytes_sent, in include/uapi/linux/tcp.h.
BYTES_SENT = 200


def bytes_sent() -> int:
    """By all TCP sockets of this process."""
    total = 0
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            copy = socket.socket(fileno=os.dup(int(path.name)))
            with copy:
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 280)
                total += struct.unpack_from("<Q", info, BYTES_SENT)[0]
    return total


def worker(args: argparse.Namespace) -> None:
    """One rank; the first prints what it found."""
    found: list[tuple[float, int]] = []

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "train":
            found.append((time.perf_counter(), bytes_sent()))

    zo_mlx.train(
        model=args.model, data=args.data, adapter_path=args.adapter_path, iters=args.steps, split=args.split,
        gradient=args.gradient, val_batches=0, steps_per_report=args.steps // 3, save_every=10**6, report=note,
        progress=False,
    )  # fmt: skip
    if os.environ.get("MLX_RANK", "0") == "0":
        (start, sent), *_, (end, all_sent) = found
        steps = args.steps // 3 * (len(found) - 1)
        print(json.dumps({"seconds": (end - start) / steps, "bytes": (all_sent - sent) / steps}))


class Relay:
    """Passes a TCP connection on, with every byte held up so long, and no more than so many in a second."""

    def __init__(self, port: int, delay: float, rate: float):
        self._to, self._delay, self._rate = port, delay, rate
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, far = self._server.accept()[0], None
            while far is None:
                with contextlib.suppress(ConnectionRefusedError):
                    far = socket.create_connection(("127.0.0.1", self._to))
            for source, target in ((near, far), (far, near)):
                target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                held: queue.Queue[tuple[float, bytes]] = queue.Queue()
                threading.Thread(target=self._receive, args=(source, held), daemon=True).start()
                threading.Thread(target=self._send, args=(target, held), daemon=True).start()

    def _receive(self, source: socket.socket, held: "queue.Queue[tuple[float, bytes]]") -> None:
        free = 0.0
        while True:
            try:
                content = source.recv(1 << 14)
            except OSError:
                content = b""
            free = max(free, time.monotonic()) + len(content) / self._rate
            held.put((free + self._delay, content))
            if not content:
                return

    def _send(self, target: socket.socket, held: "queue.Queue[tuple[float, bytes]]") -> None:
        while True:
            due, content = held.get()
            time.sleep(max(0.0, due - time.monotonic()))
            if not content:
                target.close()
                return
            with contextlib.suppress(OSError):
                target.sendall(content)


def measured(args: argparse.Namespace, count: int, slow: bool) -> dict[str, float]:
    """Start so many ranks; what the first one prints."""
    with tempfile.TemporaryDirectory() as work:
        servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
        ports = [server.getsockname()[1] for server in servers]
        for server in servers:
            server.close()
        processes = []
        for rank in range(count):
            hosts = [f"127.0.0.1:{port}" for port in ports]
            if slow:  # all addresses but its own are relays
                relays = [Relay(port, args.delay_ms / 1e3, args.mbit * 1e6 / 8) for port in ports]
                hosts = [own if r == rank else relays[r].address for r, own in enumerate(hosts)]
            file = Path(work, f"hosts-{rank}")
            file.write_text(json.dumps([[host] for host in hosts]))
            own = {} if count == 1 else {"MLX_HOSTFILE": str(file), "MLX_RANK": str(rank)}
            command = [sys.executable, *sys.argv, "--adapter-path", f"{work}/run"]
            environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", **own}
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        return json.loads([p.communicate()[0] for p in processes][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--split", default="data")
    parser.add_argument("--gradient", default="zo")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--mbit", type=float, default=1000.0)
    parser.add_argument("--adapter-path", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.adapter_path:
        worker(args)
        return
    arms = {"one process": (1, False), f"{args.ranks} ranks": (args.ranks, False)}
    if args.delay_ms:
        arms[f"{args.ranks} ranks, {args.delay_ms:g} ms and {args.mbit:g} Mbit/s"] = (args.ranks, True)
    for name, (count, slow) in arms.items():
        found = measured(args, count, slow)
        print(f"{name:32} {1e3 * found['seconds']:9.1f} ms a step   {found['bytes']:9.0f} bytes sent by rank 0")


if __name__ == "__main__":
    main()
