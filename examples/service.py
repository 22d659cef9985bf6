"""A service to start from: a key-value store for lines over TLS, with limits, deadlines, metrics and an orderly end.

    python examples/service.py --bind 0.0.0.0:9443 --cert server.pem

    GET key | SET key value | STATS | QUIT
SIGTERM or Ctrl-C: connections finish the command that is under way; SIGHUP: the certificate is read again.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import ssl

import anyio

import kaio

logger = logging.getLogger("service")


class Store:
    """The data, and what is counted."""

    def __init__(self) -> None:
        self.data: dict[bytes, bytes] = {}
        self.deaths = 0

    def note(self, event: kaio.Event) -> None:
        """The monitor's hook: called with each suspicion, recovery and death."""
        if event.error is not None:
            self.deaths += 1

    async def handle(self, connection: kaio.Connection) -> None:
        """Serve one client until it leaves, is idle for too long, dies, or the service ends."""
        try:
            while not connection.draining:
                line = await connection.receive_until(b"\n", max_bytes=64 * 1024)
                answer = self.answer(line.split(maxsplit=2))
                if answer is None:
                    return
                await connection.send(answer + b"\n")
        except anyio.DelimiterNotFound:
            logger.info("line too long")
        except (kaio.IdleTimeoutError, kaio.SendTimeoutError) as exc:
            logger.info("%s", exc)

    def answer(self, words: list[bytes]) -> bytes | None:
        """Do what a line asks for; None ends the connection."""
        match words:
            case [b"GET", key]:
                return self.data.get(key, b"none")
            case [b"SET", key, value]:
                self.data[key] = value
                return b"ok"
            case [b"STATS"]:
                return f"keys={len(self.data)} deaths={self.deaths}".encode()
            case [b"QUIT"]:
                return None
        return b"error: GET key, SET key value, STATS or QUIT"


def make_tls(path: str) -> ssl.SSLContext:
    """Read a certificate and its key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


async def main() -> None:
    """Serve until a signal, then drain."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bind", default="127.0.0.1:9443")
    parser.add_argument("--cert", required=True)
    options = parser.parse_args()
    # fmt: off
    listener = kaio.Listener(
        options.bind, ssl=make_tls(options.cert), keepalive="detect=30s",
        max_connections=10_000, max_connections_per_peer=100,
        handshake_timeout=10, idle_timeout=300, send_timeout=60,
    )
    # fmt: on
    store = Store()
    kaio.get_monitor().hook = store.note
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, lambda: setattr(listener, "ssl", make_tls(options.cert)))
    async with kaio.serve(store.handle, listeners=[listener]) as server:
        logger.info("serving on %s", listener.address)
        await server.serve_until(signal.SIGTERM, signal.SIGINT, grace=30)
    logger.info("ended with %d keys", len(store.data))


if __name__ == "__main__":
    log = logging.StreamHandler()
    log.addFilter(kaio.ConnectionFilter())
    logging.basicConfig(level="INFO", format="%(asctime)s [%(connection)s] %(message)s", handlers=[log])
    kaio.run(main())
