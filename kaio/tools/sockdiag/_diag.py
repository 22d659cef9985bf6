"""Listing the kernel's TCP connections through NETLINK_SOCK_DIAG (sock_diag(7)), with pyroute2.

Rules kept here: pyroute2 encodes and sends the request and receives the reply, which `_answer` decodes.
"""

from __future__ import annotations

import socket
from collections.abc import Container, Generator, Iterator
from typing import Final

from pyroute2.netlink import (  # type: ignore[import-untyped]
    NETLINK_SOCK_DIAG,
    NLM_F_DUMP,
    NLM_F_MULTI,
    NLM_F_REQUEST,
    NLMSG_DONE,
)
from pyroute2.netlink.diag import SOCK_DIAG_BY_FAMILY, inet_diag_req  # type: ignore[import-untyped]
from pyroute2.netlink.marshal import Marshal  # type: ignore[import-untyped]
from pyroute2.netlink.nlsocket import NetlinkSocket  # type: ignore[import-untyped]

from ...kernel.descriptors import call_in_network
from ...kernel.tcpinfo import TcpState
from ._answer import INET_DIAG_INFO, Answer, decode

__all__ = ["Diag"]

_STATES: Final = sum(
    1 << state
    for state in (
        TcpState.ESTABLISHED,
        TcpState.SYN_SENT,
        TcpState.FIN_WAIT1,
        TcpState.FIN_WAIT2,
        TcpState.CLOSE_WAIT,
        TcpState.LAST_ACK,
        TcpState.CLOSING,
    )
)


class Diag:
    """A netlink socket in a network namespace, given by its path; None: the current one. Raises OSError."""

    def __init__(self, network: str | None) -> None:
        self._socket = NetlinkSocket(family=NETLINK_SOCK_DIAG, fileno=None if network is None else _open_in(network))
        self._socket.bind()

    def ask(self, unwanted: Container[int] = ()) -> Iterator[Answer]:
        """Iterate over all connections except those with unwanted inodes."""
        self._socket.set_marshal(_Decoder(unwanted))
        for family in (socket.AF_INET, socket.AF_INET6):
            request = inet_diag_req()
            request["sdiag_family"] = family
            request["sdiag_protocol"] = socket.IPPROTO_TCP
            request["idiag_states"] = _STATES
            request["idiag_ext"] = 1 << (INET_DIAG_INFO - 1)
            for message in self._socket.nlm_request(request, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP):
                yield from message["answers"]

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def _open_in(network: str) -> int:
    """Return the descriptor of a netlink socket in another network namespace. pyroute2 would fork a process for it."""

    def make() -> int:
        return socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_SOCK_DIAG).detach()

    with open(network, "rb") as file:
        return call_in_network(file.fileno(), make)


class _Decoder(Marshal):  # type: ignore[misc]
    """A decoder for pyroute2, which turns all that was received at once into one message, and the end into another."""

    def __init__(self, unwanted: Container[int]) -> None:
        super().__init__()
        self._unwanted = unwanted

    def parse(  # pyright: ignore[reportIncompatibleMethodOverride] - of pyroute2, whose messages are dictionaries
        self, data: bytes, seq: int | None = None, callback: object = None, skip_alien_seq: bool = False
    ) -> Generator[dict[str, object], None, None]:
        """Yield messages for pyroute2, which stops at the type NLMSG_DONE and raises the header's error."""
        part = decode(data, self._unwanted)
        header = {"type": SOCK_DIAG_BY_FAMILY, "flags": NLM_F_MULTI, "error": None}
        yield {"header": header, "answers": part.answers}
        if part.done:
            yield {"header": {**header, "type": NLMSG_DONE, "error": part.error}}
