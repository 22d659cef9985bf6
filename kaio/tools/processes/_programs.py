"""What well-known programs set on the connections they accept, and which setting an administrator changes first.

An idle listening socket does not show what the program will set on what it accepts, so this is known by the program's
name: for notes beside its sockets, and so that Redis without a client does not look worse than Redis with one.

Rules kept here: data only; each fact with its source, for the release that Debian 12 has or newer. Where releases
differ, the program does not count as one that sets its own times.
"""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ["RENAMED", "note", "sets_own_times"]


class _Program(NamedTuple):
    names: tuple[str, ...]
    """As the kernel has them: fifteen bytes at most."""
    own_times: bool
    """Whether it sets times on accepted connections by default."""
    note: str


_PROGRAMS: Final = (
    # redis.conf, tcp-keepalive; src/anet.c, anetKeepAlive: the interval is a third of the time, with 3 probes.
    _Program(
        ("redis-server", "valkey-server", "keydb-server"),
        own_times=True,
        note="sets keepalive by `tcp-keepalive` in its configuration (default 300: a dead client is detected after"
        " 600 s); CONFIG SET tcp-keepalive 60 applies to new connections",
    ),
    # As above, since a sentinel accepts clients with the same code; it has no CONFIG SET of this setting.
    _Program(
        ("redis-sentinel", "valkey-sentinel"),
        own_times=True,
        note="sets keepalive by itself: a dead client is detected after 600 s",
    ),
    # nginx.org/en/docs/http/ngx_http_core_module.html#listen, so_keepalive; ngx_http_proxy_module.html
    _Program(
        ("nginx",),
        own_times=False,
        note="sets no keepalive on clients unless a `listen` has it: listen 80 so_keepalive=20s:10s:4; and"
        " `proxy_socket_keepalive on` for its upstreams, with the system's times",
    ),
    # postgresql.org/docs/current/runtime-config-connection.html; src/backend/libpq/pqcomm.c turns SO_KEEPALIVE on
    _Program(
        ("postgres", "postmaster"),
        own_times=False,
        note="turns keepalive on with the system's times; `tcp_keepalives_idle = 20`, `tcp_keepalives_interval = 10`,"
        " `tcp_keepalives_count = 4` and `tcp_user_timeout = 60s` in postgresql.conf, then reload: new sessions have"
        " them at once, others from their next command on",
    ),
    # docs.haproxy.org, clitcpka, clitcpka-idle, srvtcpka, tcp-ut
    _Program(
        ("haproxy",),
        own_times=False,
        note="sets no keepalive unless `option clitcpka` (clients) and `option srvtcpka` (servers) are given, with"
        " clitcpka-idle, clitcpka-intvl, clitcpka-cnt; `tcp-ut 60s` on a bind or server line is the user timeout",
    ),
    # sshd_config(5), TCPKeepAlive, ClientAliveInterval
    _Program(
        ("sshd", "sshd-session", "sshd-auth"),
        own_times=False,
        note="turns keepalive on with the system's times (TCPKeepAlive); `ClientAliveInterval 20` and"
        " `ClientAliveCountMax 3` in sshd_config ask the client itself",
    ),
    # dev.mysql.com/doc, wait_timeout; vio/viosocket.cc, vio_keepalive; mariadb.com/kb, tcp_keepalive_time
    _Program(
        ("mysqld", "mariadbd"),
        own_times=False,
        note="turns keepalive on with the system's times; MariaDB has tcp_keepalive_time, tcp_keepalive_interval and"
        " tcp_keepalive_probes, MySQL only `kaio enforce`, or the system's times",
    ),
    # mongodb.com/docs/manual/faq/diagnostics: at most 300 s; src/mongo/util/net/socket_utils.cpp: and 1 s in between,
    # but in some releases the times that it compares with these are not those of the socket, and nothing is set
    _Program(
        ("mongod", "mongos"),
        own_times=False,
        note="turns keepalive on, in some releases with at most 300 s and then 1 s, in others with the system's times,"
        " which alone can be changed: net.ipv4.tcp_keepalive_time=120",
    ),
    # rabbitmq.com/docs/networking, tcp_listen_options.keepalive; rabbitmq.com/docs/heartbeats
    _Program(
        ("beam.smp",),
        own_times=False,
        note="as RabbitMQ: `tcp_listen_options.keepalive = true` in rabbitmq.conf turns keepalive on with the system's"
        " times; heartbeats (60 s) end dead clients, unless these have declined them",
    ),
    # nodejs.org/api/net.html, socket.setKeepAlive, and the options keepAlive of net.createServer
    _Program(
        ("node",),
        own_times=False,
        note="sets no keepalive unless asked: net.createServer({ keepAlive: true, keepAliveInitialDelay: 20000 });"
        " its 10 probes are 1 s apart",
    ),
)

RENAMED: Final = {"MainThread": "node", "node-MainThread": "node"}
"""Names that programs give to themselves, and the programs' own: newer Node.js does (src/node.cc)."""

_BY_NAME: Final = {name: program for program in _PROGRAMS for name in program.names}


def note(name: str) -> str | None:
    """What to know about a program's keepalive, in one sentence; None for programs that are not known."""
    program = _BY_NAME.get(name)
    return None if program is None else program.note


def sets_own_times(name: str) -> bool:
    """Whether a program is known to set times on the connections it accepts."""
    program = _BY_NAME.get(name)
    return program is not None and program.own_times
