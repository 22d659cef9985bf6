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
    on_loop: bool = False
    """Whether its sockets use asyncio's event loop, so that kaio's loop covers them."""


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
_URLOPEN: Final = Rule(advice="use a client that takes socket options, or call kaio.sweep() while it is open")
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
_MONGO: Final = Rule(itself="set by pymongo, to at most 120 s, 10 s and 9 probes")
_HTTPX: Final = Rule(
    advice="pass a transport= with SO_KEEPALIVE in its socket_options=", elsewhere=frozenset({"transport"})
)
_OPTIONS: Final = Rule(
    advice="pass SO_KEEPALIVE in socket_options=", argument="socket_options", mentions="SO_KEEPALIVE"
)
_REQUESTS: Final = Rule(advice="mount requests_toolbelt's TCPKeepAliveAdapter on a Session")
_GRPC: Final = Rule(
    advice='pass options=[("grpc.keepalive_time_ms", ...)]', argument="options", mentions="grpc.keepalive_time_ms"
)
_WEBSOCKETS: Final = _pings("sends its own pings, every 20 s", "ping_interval")
_NATS: Final = _pings("sends its own pings, every 120 s", "ping_interval")
_AMQP: Final = _pings("sends its own heartbeats, every 30 s", "heartbeat")
_PAHO: Final = Rule(itself="sends its own pings, every 60 s unless connect() is passed keepalive=")
_AIOMQTT: Final = _pings("sends its own pings, every 60 s", "keepalive")
_ASYNCSSH: Final = _pings("turned on by asyncssh, with the system's times", "tcp_keepalive")
_UVICORN: Final = Rule(
    advice='pass loop="kaio:new_event_loop"', argument="loop", mentions="kaio", elsewhere=frozenset({"uds", "fd"})
)
_SOCK: Final = Rule(advice="call kaio.apply on its .sock once it is connected")
_FTP: Final = Rule(advice="call kaio.apply on its .sock once it is connected; data connections have their own")
_XMLRPC: Final = Rule(
    advice="pass a transport= whose make_connection() calls kaio.apply, or call kaio.sweep() while it is open"
)
_PIPE: Final = Rule(advice="call kaio.apply on socket.socket(fileno=os.dup(connection.fileno()))")
_PARAMIKO: Final = Rule(advice="call get_transport().set_keepalive(30) once it is connected")
_PIKA: Final = Rule(itself="sends heartbeats as often as the server asks (RabbitMQ: 60 s), unless heartbeat=0")
_PY_AMQP: Final = Rule(
    itself="turned on by py-amqp (60 s, 10 s, 9 probes), but its user timeout of 1 s ends it on the first lost probe:"
    ' pass socket_settings={"TCP_USER_TIMEOUT": 150000} (transport_options in kombu)'
)
_KAFKA: Final = Rule(itself="turned on by kafka-python, with the system's times", elsewhere=frozenset({"kafka_client"}))
_TRIO: Final = Rule(advice="call kaio.apply on its .socket")
_BOTO: Final = Rule(
    advice="pass config=botocore.config.Config(tcp_keepalive=True)", argument="config", mentions="tcp_keepalive"
)
_MYSQL: Final = Rule(advice="mysql.connector has no keepalive option: call kaio.sweep() while it is open")
_FLASK: Final = Rule(advice="its development server has no keepalive option: use one for production, or kaio.sweep()")
_HAPPY: Final = Rule(
    advice="pass socket_factory=policy.socket_factory, or call kaio.apply on the socket",
    argument="socket_factory",
    on_loop=True,
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
    (_URLOPEN, "urllib.request", "urlopen"),
    (_SOCK, "smtplib", "SMTP SMTP_SSL LMTP"),
    (_SOCK, "imaplib", "IMAP4 IMAP4_SSL"),
    (_SOCK, "poplib", "POP3 POP3_SSL"),
    (_FTP, "ftplib", "FTP FTP_TLS"),
    (_XMLRPC, "xmlrpc.client", "ServerProxy Server"),
    (_SERVER, "xmlrpc.server", "SimpleXMLRPCServer DocXMLRPCServer"),
    (_SERVER, "wsgiref.simple_server", "make_server WSGIServer"),
    (_PIPE, "multiprocessing.connection", "Client Listener"),
    (_URLOPEN, "urllib.request", "build_opener URLopener"),
    (_SERVER, "socketserver", "TCPServer ThreadingTCPServer ForkingTCPServer"),
    (_SERVER, "http.server", "HTTPServer ThreadingHTTPServer"),
    (_KAIO, "kaio", "connect open_connection create_connection serve start_server create_server"),
    (_REDIS, "redis redis.client redis.cluster redis.connection", f"from_url {_REDIS_NAMES}"),
    (_REDIS, "redis redis.sentinel", "Sentinel"),
    (
        _on_loop(_REDIS),
        "redis.asyncio redis.asyncio.client redis.asyncio.cluster redis.asyncio.connection",
        f"from_url {_REDIS_NAMES}",
    ),
    (_on_loop(_REDIS), "redis.asyncio redis.asyncio.sentinel", "Sentinel"),
    (_without("asyncpg"), "asyncpg", "connect create_pool"),
    (_LIBPQ, "psycopg", "connect Connection.connect"),
    (_LIBPQ, "psycopg2", "connect"),
    (_LIBPQ, "psycopg_pool", "ConnectionPool"),
    (_on_loop(_LIBPQ), "psycopg", "AsyncConnection.connect"),
    (_on_loop(_LIBPQ), "psycopg_pool", "AsyncConnectionPool"),
    (_BY_ITSELF, "pymysql", "connect"),
    (_on_loop(_BY_ITSELF), "aiomysql", "connect create_pool"),
    (_MONGO, "pymongo pymongo.mongo_client", "MongoClient"),
    (_MONGO, "pymongo pymongo.asynchronous.mongo_client", "AsyncMongoClient"),
    (_MONGO, "motor.motor_asyncio", "AsyncIOMotorClient"),
    (_without("aiohttp", "connector"), "aiohttp aiohttp.client", "ClientSession request"),
    (_without("aiohttp", "socket_factory"), "aiohttp aiohttp.connector", "TCPConnector"),
    (_WEB, "aiohttp.web", "run_app TCPSite"),
    (_HTTPX, "httpx", f"Client stream {_VERBS}"),
    (_on_loop(_HTTPX), "httpx", "AsyncClient"),
    (_OPTIONS, "httpx", "HTTPTransport"),
    (_on_loop(_OPTIONS), "httpx", "AsyncHTTPTransport"),
    (_REQUESTS, "requests requests.sessions", f"Session session {_VERBS}"),
    (_OPTIONS, "urllib3 urllib3.poolmanager", "PoolManager ProxyManager"),
    (_OPTIONS, "urllib3 urllib3.connectionpool", "HTTPConnectionPool HTTPSConnectionPool"),
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
    (_PARAMIKO, "paramiko paramiko.client", "SSHClient"),
    (_PARAMIKO, "paramiko paramiko.transport", "Transport"),
    (
        _PIKA,
        "pika pika.adapters.blocking_connection pika.adapters.select_connection",
        "BlockingConnection SelectConnection",
    ),
    (_on_loop(_PIKA), "pika.adapters.asyncio_connection", "AsyncioConnection"),
    (_PY_AMQP, "amqp amqp.connection", "Connection"),
    (_PY_AMQP, "kombu kombu.connection", "Connection BrokerConnection"),
    (_KAFKA, "kafka", "KafkaProducer KafkaConsumer KafkaAdminClient"),
    (_on_loop(_without("tornado")), "tornado.tcpclient", "TCPClient"),
    (_on_loop(_without("tornado")), "tornado.tcpserver", "TCPServer"),
    (_on_loop(_without("tornado")), "tornado.httpserver", "HTTPServer"),
    (_on_loop(_without("tornado")), "tornado.httpclient", "AsyncHTTPClient"),
    (_TRIO, "trio", "open_tcp_stream open_tcp_listeners serve_tcp open_ssl_over_tcp_stream serve_ssl_over_tcp"),
    (_BOTO, "boto3 boto3.session", "client resource Session.client Session.resource"),
    (_BOTO, "botocore.session", "Session.create_client"),
    (_MYSQL, "mysql.connector", "connect MySQLConnection pooling.MySQLConnectionPool"),
    (_MYSQL, "mysql.connector.aio", "connect"),
    (_OPTIONS, "httpcore", "ConnectionPool HTTPProxy SOCKSProxy"),
    (_on_loop(_OPTIONS), "httpcore", "AsyncConnectionPool AsyncHTTPProxy AsyncSOCKSProxy"),
    (_HTTPX, "httpx2", f"Client stream {_VERBS}"),
    (_on_loop(_HTTPX), "httpx2", "AsyncClient"),
    (_OPTIONS, "httpx2", "HTTPTransport"),
    (_on_loop(_OPTIONS), "httpx2", "AsyncHTTPTransport"),
    (_FLASK, "flask", "Flask.run"),
    (_FLASK, "werkzeug.serving", "run_simple make_server"),
    (_HAPPY, "aiohappyeyeballs", "start_connection"),
    (_on_loop(_AMQP), "aio_pika", "connect connect_robust"),
    (_on_loop(_AMQP), "aiormq", "connect"),
    (_on_loop(_NATS), "nats", "connect"),
    (_on_loop(_NATS), "nats.aio.client", "Client"),
    (_without("aiokafka"), "aiokafka", "AIOKafkaProducer AIOKafkaConsumer"),
    (_PAHO, "paho.mqtt.client", "Client"),
    (_on_loop(_AIOMQTT), "aiomqtt aiomqtt.client", "Client"),
    (_on_loop(_ASYNCSSH), "asyncssh", "connect create_connection listen create_server"),
    (_UVICORN, "uvicorn", "run"),
    (_on_loop(_UVICORN), "uvicorn", "Config"),
    (_without("hypercorn"), "hypercorn.asyncio", "serve"),
)

TABLE: Final = {
    f"{module}.{name}": rule for rule, modules, names in _ROWS for module in modules.split() for name in names.split()
}
"""The rules by the full names of the calls; `loop` stands for any asyncio event loop."""
