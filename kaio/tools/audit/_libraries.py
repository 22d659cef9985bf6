"""The library calls that make TCP connections: what sets keepalive in each, and what to do when nothing does.

Rules kept here: data only. A row lists calls that follow the same rule. What a library does by default was read in its
source (releases are named where they differ); the texts are printed as they are.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Final

__all__ = ["TABLE", "Rule"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How keepalive is set for a call that makes connections."""

    advice: str = ""
    """What to do when nothing sets keepalive; empty when something always does."""
    argument: str | None = None
    """The argument that sets it; also recognised in addresses (`redis://...?socket_keepalive=1`)."""
    position: int | None = None
    """The argument's position, where it may be passed by position."""
    mentions: str | None = None
    """The word that the argument's value must contain."""
    itself: str | None = None
    """What sets keepalive by default, without an argument."""
    elsewhere: frozenset[str] = frozenset()
    """Arguments that pass an existing connection, pool or transport, which is a place of its own."""
    alternative: Rule | None = None
    """Another argument that sets it."""
    schemes: str | None = None
    """A pattern of the addresses for which `itself` holds, where the library speaks several protocols."""
    local: str | None = None
    """A pattern of the addresses that are Unix sockets."""
    pair: bool = False
    """Whether the address is that of a Unix socket or a pipe, unless it is a tuple (or `family` says so)."""
    wraps: bool = False
    """Whether the first argument may be an existing connection, which is a place of its own."""
    on_loop: bool = False
    """Whether its sockets use asyncio's event loop, so that kaio's loop covers them."""


_SWEEP: Final = "call kaio.sweep() while it is open"
_RUN: Final = "run on kaio's loop (kaio.run)"


def _on_loop(rule: Rule) -> Rule:
    """The same rule for a library that uses asyncio's event loop."""
    advice = f"{rule.advice}; or {_RUN}" if rule.advice else ""
    return replace(rule, advice=advice, on_loop=True)


def _without(library: str, *elsewhere: str) -> Rule:
    """An asyncio library without an option for keepalive."""
    return Rule(advice=f"{library} has no keepalive option: {_RUN}", elsewhere=frozenset(elsewhere), on_loop=True)


def _asyncio(twin: str) -> Rule:
    """asyncio's own functions; `keep_alive` is an argument of its servers since Python 3.13."""
    advice = f"{_RUN}, or use {twin}"
    return Rule(advice=advice, argument="keep_alive", elsewhere=frozenset({"sock"}), on_loop=True)


def _pings(itself: str, argument: str) -> Rule:
    return Rule(
        advice=f"turned off here: remove {argument}=",
        argument=argument,
        itself=itself,
        elsewhere=frozenset({"sock"}),
    )


_SOCKET: Final = Rule(advice="call kaio.apply on the socket")
_LISTENING: Final = Rule(advice="call kaio.apply on the socket; accepted sockets inherit it on Linux")
_SERVER: Final = Rule(advice="call kaio.apply on its .socket; accepted sockets inherit it on Linux")
_HTTP_CLIENT: Final = Rule(advice="call kaio.apply on its .sock after connect()")
_URLOPEN: Final = Rule(advice=f"use a client that takes socket options, or {_SWEEP}")
_SOCK: Final = Rule(advice="call kaio.apply on its .sock once it is connected")
_LMTP: Final = replace(_SOCK, local="^/")
_PICKLES: Final = Rule(advice=f"it has no keepalive option: {_SWEEP}", pair=True)
_XMLRPC: Final = Rule(advice=f"pass a transport= that sets it, or {_SWEEP}", elsewhere=frozenset({"transport"}))
_LOGGING: Final = Rule(advice="override makeSocket(), and call kaio.apply on what it returns")
_KAIO: Final = Rule(advice="turned off here: remove keepalive=", argument="keepalive", itself="kaio sets its policy")
_BY_ITSELF: Final = Rule(itself="turned on by the library, with the system's times")
_REDIS: Final = Rule(  # 7.4: off, 8.0: on
    advice="pass socket_keepalive=True: redis-py before 8.0 leaves it off",
    argument="socket_keepalive",
    elsewhere=frozenset({"connection_pool"}),
)
_LIBPQ: Final = Rule(
    advice="turned off here: remove keepalives=0",
    argument="keepalives",
    itself="turned on by libpq, with the system's times unless keepalives_idle= is set",
)
_MONGO: Final = Rule(  # 3.5 to 3.13 have the option; 4.0 and later ignore it
    advice="turned off here for pymongo before 4.0: remove socketKeepAlive=",
    argument="socketKeepAlive",
    itself="set by pymongo since 3.5, to at most 120 s, 10 s and 9 probes (on macOS the idle time is the system's)",
    local=r"\.sock\b",
)
_HTTPX: Final = Rule(
    advice="pass a transport= with SO_KEEPALIVE in its socket_options=", elsewhere=frozenset({"transport"})
)
_OPTIONS: Final = Rule(
    advice="pass SO_KEEPALIVE in socket_options=", argument="socket_options", mentions="SO_KEEPALIVE"
)
_POOL: Final = Rule(advice="use a ConnectionPool with SO_KEEPALIVE in its socket_options=")
_HTTPX_PINGS: Final = _pings("sends its own pings, every 20 s", "keepalive_ping_interval_seconds")
_REQUESTS: Final = Rule(advice="mount requests_toolbelt's TCPKeepAliveAdapter on a Session")
_URLLIB3: Final = Rule(advice="use a PoolManager with SO_KEEPALIVE in its socket_options=")
_GRPC: Final = Rule(
    advice='pass options=[("grpc.keepalive_time_ms", ...)]', argument="options", mentions="grpc.keepalive_time_ms"
)
_WEBSOCKETS: Final = _pings("sends its own pings, every 20 s", "ping_interval")
_NATS: Final = _pings("sends its own pings, every 120 s", "ping_interval")
_AMQP: Final = _pings("sends its own heartbeats, every 30 s", "heartbeat")
_PAHO: Final = Rule(itself="sends its own pings, every 60 s unless connect() is passed keepalive=")
_AIOMQTT: Final = _pings("sends its own pings, every 60 s", "keepalive")
_PARAMIKO: Final = Rule(advice="call set_keepalive() on its transport: paramiko leaves it off", wraps=True)
_PIKA: Final = Rule(
    advice='turned off here: remove heartbeat=0, or pass tcp_options={"TCP_KEEPIDLE": ...}',
    argument="heartbeat",
    itself="has the heartbeats that the broker proposes",
    alternative=Rule(argument="tcp_options", mentions="TCP_KEEP"),
)
_PIKA_CONNECTION: Final = replace(_PIKA, elsewhere=frozenset({"parameters"}), wraps=True)
_PY_AMQP: Final = "turned on by py-amqp: 60 s, 10 s and 9 probes, with a user timeout of 1 s"
_BY_PY_AMQP: Final = Rule(itself=_PY_AMQP)
_KOMBU: Final = Rule(
    advice='pass transport_options={"socket_keepalive": True} for Redis; py-amqp turns it on by itself',
    argument="transport_options",
    mentions="socket_keepalive",
    itself=_PY_AMQP,
    schemes="^(amqps?|pyamqp)://|^[^:/]*$",
)
_CELERY: Final = Rule(
    advice='for Redis, set broker_transport_options to {"socket_keepalive": True}, and redis_socket_keepalive;'
    " py-amqp turns it on by itself",
    itself=_PY_AMQP,
    schemes="^(amqps?|pyamqp)://",
)
_BOTO: Final = Rule(
    advice="pass config=Config(tcp_keepalive=True), or set tcp_keepalive in the AWS configuration",
    argument="config",
    mentions="tcp_keepalive",
)
_MYSQL: Final = Rule(  # seen in both releases, with the C extension; its Python code has no option
    advice=f"mysql.connector has no keepalive option (its C extension had it on in 8.4, not in 26.10): {_SWEEP}"
)
_TWISTED: Final = Rule(advice="call transport.setTcpKeepAlive(True) in connectionMade()")
_CLICKHOUSE: Final = Rule(
    itself="turned on by clickhouse-connect: 30 s, 30 s and 3 probes", elsewhere=frozenset({"pool_mgr"})
)
_TORNADO: Final = Rule(advice=_RUN, on_loop=True)
_TORNADO_PINGS: Final = replace(_TORNADO, advice=f"pass ping_interval=; or {_RUN}", argument="ping_interval")
_TRIO: Final = Rule(advice="call its setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)")
_TRIO_SERVER: Final = Rule(advice="call setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1) on each of its sockets")
_EYEBALLS: Final = Rule(
    advice=f"call kaio.apply on the socket; or {_RUN}", elsewhere=frozenset({"socket_factory"}), on_loop=True
)
_WSGI: Final = Rule(advice="its sockets have no keepalive: use `kaio run`, or `kaio attach` on its process")
_WAITRESS: Final = replace(_WSGI, elsewhere=frozenset({"sockets", "unix_socket"}))
_VALKEY: Final = replace(_REDIS, advice="pass socket_keepalive=True: valkey leaves it off")
_ASYNCSSH: Final = _pings("turned on by asyncssh, with the system's times", "tcp_keepalive")
_UVICORN: Final = Rule(
    advice='pass loop="kaio:new_event_loop"', argument="loop", mentions="kaio", elsewhere=frozenset({"uds", "fd"})
)
_WEB: Final = replace(_BY_ITSELF, elsewhere=frozenset({"sock", "path"}), on_loop=True)

_REDIS_NAMES: Final = " ".join(
    f"{name} {name}.from_url"
    for name in ("Redis", "StrictRedis", "ConnectionPool", "BlockingConnectionPool", "RedisCluster")
)
_VERBS: Final = "get post put patch delete head options request"

# (rule, modules, names in each of them)
_ROWS: Final[tuple[tuple[Rule, str, str], ...]] = (
    (_SOCKET, "socket", "socket SocketType create_connection"),
    (_LISTENING, "socket", "create_server"),
    (_asyncio("kaio.open_connection"), "asyncio asyncio.streams", "open_connection"),
    (_asyncio("kaio.start_server"), "asyncio asyncio.streams", "start_server"),
    (_asyncio("kaio.create_connection"), "loop", "create_connection"),
    (_asyncio("kaio.create_server"), "loop", "create_server"),
    (_asyncio("kaio.connect"), "anyio", "connect_tcp"),
    (_asyncio("kaio.serve"), "anyio", "create_tcp_listener"),
    (_HTTP_CLIENT, "http.client", "HTTPConnection HTTPSConnection"),
    (_URLOPEN, "urllib.request", "urlopen urlretrieve build_opener"),
    (_SOCK, "smtplib", "SMTP SMTP_SSL"),
    (_LMTP, "smtplib", "LMTP"),
    (_SOCK, "ftplib", "FTP FTP_TLS"),
    (_SOCK, "imaplib", "IMAP4 IMAP4_SSL"),
    (_SOCK, "poplib", "POP3 POP3_SSL"),
    (_SOCK, "nntplib", "NNTP NNTP_SSL"),
    (_SOCK, "telnetlib", "Telnet"),
    (_LOGGING, "logging.handlers", "SocketHandler"),
    (_XMLRPC, "xmlrpc.client", "ServerProxy Server"),
    (_SERVER, "xmlrpc.server", "SimpleXMLRPCServer MultiPathXMLRPCServer DocXMLRPCServer"),
    (_SERVER, "wsgiref.simple_server", "make_server WSGIServer"),
    (_PICKLES, "multiprocessing.connection", "Client Listener"),
    (_PICKLES, "multiprocessing.managers", "BaseManager SyncManager"),
    (_TRIO, "trio", "open_tcp_stream open_ssl_over_tcp_stream"),
    (_TRIO_SERVER, "trio", "serve_tcp open_tcp_listeners serve_ssl_over_tcp open_ssl_over_tcp_listeners"),
    (_TRIO, "trio.socket", "socket"),
    (_EYEBALLS, "aiohappyeyeballs", "start_connection"),
    (_SERVER, "socketserver", "TCPServer ThreadingTCPServer ForkingTCPServer"),
    (_SERVER, "http.server", "HTTPServer ThreadingHTTPServer"),
    (_KAIO, "kaio", "connect open_connection create_connection serve start_server create_server"),
    (_REDIS, "redis redis.client redis.cluster redis.connection", f"from_url {_REDIS_NAMES}"),
    (_REDIS, "redis redis.connection", "Connection SSLConnection"),
    (_REDIS, "redis redis.sentinel", "Sentinel"),
    (
        _on_loop(_REDIS),
        "redis.asyncio redis.asyncio.client redis.asyncio.cluster redis.asyncio.connection",
        f"from_url {_REDIS_NAMES}",
    ),
    (_on_loop(_REDIS), "redis.asyncio redis.asyncio.connection", "Connection SSLConnection"),
    (_on_loop(_REDIS), "redis.asyncio redis.asyncio.sentinel", "Sentinel"),
    (_VALKEY, "valkey valkey.client valkey.connection", "from_url Valkey Valkey.from_url ConnectionPool"),
    (_on_loop(_VALKEY), "valkey.asyncio valkey.asyncio.client", "from_url Valkey Valkey.from_url ConnectionPool"),
    (_without("asyncpg"), "asyncpg", "connect create_pool"),
    (_LIBPQ, "psycopg", "connect Connection.connect"),
    (_LIBPQ, "psycopg2", "connect"),
    (_LIBPQ, "psycopg_pool", "ConnectionPool"),
    (_on_loop(_LIBPQ), "psycopg", "AsyncConnection.connect"),
    (_on_loop(_LIBPQ), "psycopg_pool", "AsyncConnectionPool"),
    (_BY_ITSELF, "pymysql", "connect"),
    (_on_loop(_BY_ITSELF), "aiomysql", "connect create_pool"),
    (_CLICKHOUSE, "clickhouse_connect clickhouse_connect.driver", "get_client create_client"),
    (_MYSQL, "mysql.connector mysql.connector.pooling", "connect Connect MySQLConnectionPool MySQLConnection"),
    (_without("mysql.connector.aio"), "mysql.connector.aio", "connect MySQLConnection MySQLConnectionPool"),
    (_MONGO, "pymongo pymongo.mongo_client pymongo.synchronous.mongo_client", "MongoClient"),
    (_MONGO, "pymongo pymongo.asynchronous.mongo_client", "AsyncMongoClient"),
    (_MONGO, "motor.motor_asyncio", "AsyncIOMotorClient"),  # pymongo's client in threads, both of them
    (_MONGO, "motor motor.motor_tornado", "MotorClient"),
    (_without("aiohttp", "connector"), "aiohttp aiohttp.client", "ClientSession request"),
    (_without("aiohttp", "socket_factory"), "aiohttp aiohttp.connector", "TCPConnector"),
    (_WEB, "aiohttp.web", "run_app TCPSite"),
    (_HTTPX, "httpx httpx2", f"Client stream {_VERBS}"),
    (_HTTPX, "httpx2", "query"),
    (_HTTPX_PINGS, "httpx2", "websocket"),
    (_on_loop(_HTTPX), "httpx httpx2", "AsyncClient"),
    (_OPTIONS, "httpx httpx2", "HTTPTransport"),
    (_on_loop(_OPTIONS), "httpx httpx2", "AsyncHTTPTransport"),
    (_OPTIONS, "httpcore httpcore2", "ConnectionPool HTTPProxy HTTPConnection"),
    (_on_loop(_OPTIONS), "httpcore httpcore2", "AsyncConnectionPool AsyncHTTPProxy AsyncHTTPConnection"),
    (_POOL, "httpcore httpcore2", "request stream SOCKSProxy"),
    (_on_loop(_POOL), "httpcore httpcore2", "AsyncSOCKSProxy"),
    (_REQUESTS, "requests requests.sessions", f"Session session {_VERBS}"),
    (_OPTIONS, "urllib3 urllib3.poolmanager", "PoolManager ProxyManager"),
    (_OPTIONS, "urllib3 urllib3.poolmanager", "proxy_from_url"),
    (_OPTIONS, "urllib3 urllib3.connectionpool", "HTTPConnectionPool HTTPSConnectionPool connection_from_url"),
    (_URLLIB3, "urllib3", "request"),
    (_BOTO, "boto3", "client resource"),
    (_BOTO, "boto3.Session() boto3.session.Session()", "client resource"),
    (_BOTO, "botocore.session.get_session() botocore.session.Session()", "create_client"),
    (replace(_GRPC, position=1), "grpc grpc.aio", "insecure_channel"),
    (replace(_GRPC, position=2), "grpc grpc.aio", "secure_channel"),
    (replace(_GRPC, position=3), "grpc grpc.aio", "server"),
    (
        _on_loop(_WEBSOCKETS),
        "websockets websockets.client websockets.asyncio.client websockets.legacy.client",
        "connect",
    ),
    (
        _on_loop(_WEBSOCKETS),
        "websockets websockets.server websockets.asyncio.server websockets.legacy.server",
        "serve",
    ),
    (_WEBSOCKETS, "websockets.sync.client", "connect"),
    (_WEBSOCKETS, "websockets.sync.server", "serve"),
    (_on_loop(_AMQP), "aio_pika", "connect connect_robust"),
    (_on_loop(_AMQP), "aiormq", "connect"),
    (_on_loop(_NATS), "nats", "connect"),
    (_on_loop(_NATS), "nats.aio.client", "Client"),
    (_without("aiokafka"), "aiokafka", "AIOKafkaProducer AIOKafkaConsumer"),
    (_OPTIONS, "kafka", "KafkaProducer KafkaConsumer KafkaAdminClient"),
    (_BY_PY_AMQP, "amqp amqp.connection", "Connection"),
    (_KOMBU, "kombu kombu.connection", "Connection BrokerConnection"),
    (_CELERY, "celery celery.app celery.app.base", "Celery"),
    (_PIKA, "pika pika.connection", "ConnectionParameters URLParameters"),
    (_PIKA_CONNECTION, "pika", "BlockingConnection SelectConnection"),
    (_PIKA_CONNECTION, "pika.adapters", "BlockingConnection SelectConnection AsyncioConnection"),
    (_PIKA_CONNECTION, "pika.adapters.blocking_connection", "BlockingConnection"),
    (_PIKA_CONNECTION, "pika.adapters.select_connection", "SelectConnection"),
    (_PIKA_CONNECTION, "pika.adapters.asyncio_connection", "AsyncioConnection"),
    (_PARAMIKO, "paramiko paramiko.client", "SSHClient"),
    (_PARAMIKO, "paramiko paramiko.transport", "Transport"),
    (_PAHO, "paho.mqtt.client", "Client"),
    (_on_loop(_AIOMQTT), "aiomqtt aiomqtt.client", "Client"),
    (_on_loop(_ASYNCSSH), "asyncssh", "connect create_connection listen create_server"),
    (_UVICORN, "uvicorn", "run"),
    (_on_loop(_UVICORN), "uvicorn", "Config"),
    (_without("hypercorn"), "hypercorn.asyncio", "serve"),
    (_WSGI, "hypercorn.run", "run"),
    (_WSGI, "hypercorn.trio", "serve"),
    (_TWISTED, "twisted.internet.reactor", "connectTCP connectSSL listenTCP listenSSL"),
    (_TWISTED, "twisted.internet.endpoints", "TCP4ClientEndpoint TCP6ClientEndpoint HostnameEndpoint"),
    (_TWISTED, "twisted.internet.endpoints", "TCP4ServerEndpoint TCP6ServerEndpoint SSL4ServerEndpoint"),
    (_TORNADO, "tornado.httpserver", "HTTPServer"),
    (_TORNADO, "tornado.tcpserver", "TCPServer"),
    (_TORNADO, "tornado.web.Application()", "listen"),
    (_TORNADO, "tornado.netutil", "bind_sockets"),
    (_TORNADO, "tornado.tcpclient", "TCPClient"),
    (_TORNADO, "tornado.httpclient", "AsyncHTTPClient HTTPClient"),
    (_TORNADO_PINGS, "tornado.websocket", "websocket_connect"),
    (_WSGI, "flask.Flask() flask.app.Flask()", "run"),
    (_WSGI, "quart.Quart() quart.app.Quart()", "run run_task"),
    (_WSGI, "sanic.Sanic() sanic.app.Sanic()", "run create_server"),
    (_WSGI, "werkzeug werkzeug.serving", "run_simple"),
    (_SERVER, "werkzeug.serving", "make_server"),
    (_WSGI, "gunicorn.app.base", "BaseApplication Application"),
    (_WSGI, "gunicorn.app.wsgiapp", "WSGIApplication"),
    (_WAITRESS, "waitress", "serve"),
    (_WAITRESS, "waitress.server", "create_server"),
    (_WSGI, "daphne.server", "Server"),
    (_WSGI, "granian", "Granian"),
    (_WSGI, "granian.server granian.server.embed", "Server"),
)

TABLE: Final = {
    f"{module}.{name}": rule for rule, modules, names in _ROWS for module in modules.split() for name in names.split()
}
"""The rules by the full names of the calls; `loop` stands for any asyncio event loop."""
