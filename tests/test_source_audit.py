"""The source audit finds exactly the places of some sample files that make connections.

In the samples, a comment marks each line that makes a connection: `#!` and the name of the call for an uncovered one,
`#+` for a covered one, followed by a colon and words from the reason. No other line may be reported.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import kaio
from kaio.cli import cli
from kaio.tools.audit import Finding, audit
from kaio.tools.audit._files import LARGEST
from kaio.tools.audit._kaio import LOOPS, PROTOCOLS, TAKES_SOCKETS
from kaio.tools.audit._libraries import TABLE

# Twenty places, imported and assigned under other names in every way that Python has.
TWENTY = {
    "client.py": """
        import socket
        import socket as s
        from socket import create_connection as dial, socket as Socket, AF_INET6
        import asyncio
        from asyncio import open_connection as oc
        sock = socket.socket()  #! socket.socket
        other = s.socket(s.AF_INET, s.SOCK_STREAM | s.SOCK_NONBLOCK)  #! socket.socket
        third = Socket(AF_INET6)  #! socket.socket
        print("socket.socket() in a string; socket.create_connection(('a', 1))")
        # asyncio.open_connection("a", 1)
        class Client:
            def __init__(self, loop):
                self._loop = loop
                self.sock = dial(("127.0.0.1", 1))  #! socket.create_connection
            async def go(self):
                reader, writer = await asyncio.wait_for(
                    oc("127.0.0.1", 1),  #! asyncio.open_connection
                    5,
                )
                await self._loop.create_connection(object, "a", 1)  #! loop.create_connection
        async def scan(hosts):
            return await asyncio.gather(*[oc(host, 1) for host in hosts])  #! asyncio.open_connection
    """,
    "package/server.py": """
        import asyncio, anyio, uvloop
        from anyio import connect_tcp
        import socketserver
        async def main():
            server = await asyncio.start_server(print, port=0)  #! asyncio.start_server
            await asyncio.get_running_loop().create_server(object, port=0)  #! loop.create_server
            async with await connect_tcp("a", 1) as stream:  #! anyio.connect_tcp
                await anyio.create_tcp_listener(local_port=0)  #! anyio.create_tcp_listener
        async def more(reactor: uvloop.Loop):
            await reactor.create_server(object, port=0)  #! loop.create_server
        class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
            pass
        Server(("", 0), None)  #! socketserver.TCPServer
    """,
    "package/deeper/libraries.py": '''
        """redis.Redis("in a docstring")"""
        import redis, httpx, asyncpg, grpc
        import redis.asyncio as aredis
        from aiohttp import ClientSession as Session
        pool = lambda: redis.ConnectionPool(max_connections=5)  #! redis.ConnectionPool
        cache = aredis.Redis.from_url("redis://a:1")  #! redis.asyncio.Redis.from_url
        http = httpx.AsyncClient()  #! httpx.AsyncClient
        async def main():
            async with Session() as http, asyncpg.create_pool("a"):  #! aiohttp.ClientSession, asyncpg.create_pool
                import requests; requests.Session()  #! requests.Session
        channel = grpc.insecure_channel("a:1", [("grpc.max_send_message_length", 1)])  #! grpc.insecure_channel
    ''',
    "package/decoys.py": """
        import asyncio, httpx, redis, socket, sqlite3, subprocess
        from redis.asyncio import Redis
        from . import asyncpg, nats
        from .redis import Redis as OurRedis
        import grpc
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        FAMILY = socket.AF_UNIX
        unix_again = socket.socket(FAMILY)
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp_again = socket.socket(type=socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, family=socket.AF_INET6)
        icmp = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_ICMP)
        netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
        there_already = socket.socket(fileno=3)
        pair = socket.socketpair()
        Redis(unix_socket_path="/run/redis.sock"), redis.from_url("unix:///run/redis.sock")
        grpc.insecure_channel("unix:/run/grpc.sock")
        httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds="/run/http.sock"))
        sqlite3.connect("file.db"), nats.connect("a"), asyncpg.connect("a"), OurRedis("a")
        text = "asyncio.open_connection('a', 1)"
        def shadowed(socket, asyncio=None, redis=None):
            socket.socket(), asyncio.open_connection("a", 1), redis.Redis()
        def shadowed_inside():
            asyncio = subprocess
            asyncio.open_connection("a", 1)
            return [socket.socket() for socket in ()]
        class socket_like:
            def socket(self): ...
            def create_connection(self, address): return self.create_connection(address)
        socket_like().socket(), socket_like().create_connection("a")
        class GameLoop:
            def create_server(self): ...
        loop = GameLoop()
        loop.create_server()
        engine = sqlite3.connect("file.db")
        engine.create_connection("a", 1), engine.create_server("a", 1)
        def typed(loop: GameLoop): loop.create_server()
        async def unix_only(loop):
            await asyncio.open_unix_connection("/run/a"), await asyncio.start_unix_server(print, "/run/a")
            await loop.create_unix_connection(object, "/run/a"), await loop.create_datagram_endpoint(object)
        def given(sock): return asyncio.open_connection(sock=sock)
        httpx = engine
        httpx.Client(), httpx.get("a")
    """,
    "notes.txt": "import socket\nsocket.socket()\n",
    ".hidden/a.py": "import socket\nsocket.socket()\n",
    "node_modules/a.py": "import socket\nsocket.socket()\n",
    "__pycache__/a.py": "import socket\nsocket.socket()\n",
    "env/pyvenv.cfg": "",
    "env/lib/a.py": "import socket\nsocket.socket()\n",
}

PACKAGE = ("package/decoys.py", "package/server.py", "package/deeper/libraries.py")

COVERED = {
    "sockets": """
        import functools, socket, ssl, kaio
        from contextlib import closing
        from socket import SOL_SOCKET, SO_KEEPALIVE
        a = socket.socket()  #+ socket.socket: SO_KEEPALIVE
        a.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        with socket.create_connection(("a", 1)) as b:  #+ socket.create_connection: SO_KEEPALIVE
            b.setsockopt(SOL_SOCKET, SO_KEEPALIVE, True)
        c = socket.create_server(("", 0))  #+ socket.create_server: kaio.apply
        kaio.apply(c, "20s:10s:4")
        d = socket.socket()  #+ socket.socket: SO_KEEPALIVE
        tls = ssl.create_default_context().wrap_socket(d)
        tls.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
        with closing(socket.socket()) as e:  #+ socket.socket: SO_KEEPALIVE
            for option in [(SOL_SOCKET, SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]:
                e.setsockopt(*option)
        def keep(sock, on=True):
            sock.setsockopt(SOL_SOCKET, SO_KEEPALIVE, on)
        f = socket.socket()  #+ socket.socket: the value of `on`
        keep(f)
        g = socket.socket()  #! socket.socket: SIO_KEEPALIVE_VALS on line 21 is for Windows only
        g.ioctl(socket.SIO_KEEPALIVE_VALS, (1, 20000, 10000))
        def accepting():
            listener = socket.create_server(("", 0))  #+ socket.create_server: SO_KEEPALIVE
            connection, address = listener.accept()
            connection.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
        class Holder:
            def __init__(self):
                self.sock = socket.socket()  #+ socket.socket: SO_KEEPALIVE
                self._set(self.sock)
            def _set(self, sock):
                sock.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
        class Late:
            def open(self):
                self.sock = socket.socket()  #+ socket.socket: SO_KEEPALIVE
            def set(self):
                self.sock.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
        if FAST:
            h = socket.socket()  #+ socket.socket: SO_KEEPALIVE
            h.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
        else:
            h = socket.socket()  #! socket.socket: kaio.apply
        def reused():
            i = socket.socket()  #! socket.socket: kaio.apply
            i.close()
            i = socket.socket()  #+ socket.socket: SO_KEEPALIVE
            i.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
        dial = functools.partial(socket.create_connection, timeout=5)
        j = dial(("a", 1))  #+ socket.create_connection: SO_KEEPALIVE
        j.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
        def module_wide():
            global k
            k = socket.socket()  #+ socket.socket: SO_KEEPALIVE
        k.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
        try:
            import socket as plug
        except ImportError:
            plug = None
        l = plug.socket()  #+ socket.socket: SO_KEEPALIVE
        l.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
    """,
    "not quite": """
        import socket, kaio
        a = socket.socket()  #! socket.socket: turned off on line 3
        a.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
        b = socket.socket()  #! socket.socket: kaio.apply
        b.setsockopt(socket.IPPROTO_TCP, socket.SO_KEEPALIVE, 1)
        b.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        c = socket.socket()  #! socket.socket: kaio.apply
        kaio.inspect(c), kaio.health(c), kaio.apply(c, "off")
        d = socket.socket()  #! socket.socket: kaio.apply
        other.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        def elsewhere(d):
            d.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # d.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    """,
    "asyncio": """
        import asyncio, socket, kaio
        from socket import SOL_SOCKET, SO_KEEPALIVE
        async def client():
            reader, writer = await asyncio.open_connection("a", 1)  #+ asyncio.open_connection: SO_KEEPALIVE
            writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
            loop = asyncio.get_running_loop()
            transport, protocol = await loop.create_connection(object, "a", 1)  #+ loop.create_connection: SO_KEEPALIVE
            sock = transport.get_extra_info("socket")
            sock.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
            mine = socket.socket()  #+ socket.socket: SO_KEEPALIVE
            transport, _ = await loop.create_connection(object, sock=mine)
            transport.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
            blocking = await asyncio.to_thread(socket.create_connection, ("a", 1))  #! socket.create_connection
            third = await loop.run_in_executor(None, socket.socket, socket.AF_UNIX)
        async def handle(reader, writer):
            kaio.apply(writer, "20s:10s:4")
        class Echo(asyncio.Protocol):
            def connection_made(self, transport):
                transport.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
        class Ours(kaio.KeepaliveProtocol):
            pass
        class Bare(asyncio.Protocol):
            pass
        async def servers(loop):
            await asyncio.start_server(handle, port=0)  #+ asyncio.start_server: kaio.apply
            await loop.create_server(Echo, port=0)  #+ loop.create_server: SO_KEEPALIVE
            await loop.create_server(lambda: Echo(), port=0)  #+ loop.create_server: SO_KEEPALIVE
            await loop.create_server(Ours, port=0)  #+ loop.create_server: its protocol is a subclass of kaio's
            await loop.create_server(Bare, port=0)  #! loop.create_server
            await asyncio.start_server(print, port=0, keep_alive=True)  #+ asyncio.start_server: keep_alive=True
            server = await asyncio.start_server(print, port=0)  #+ asyncio.start_server: SO_KEEPALIVE
            for sock in server.sockets:
                sock.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
    """,
    "kaio": """
        import kaio
        from kaio import serve
        async def main():
            await kaio.connect("a", 1)  #+ kaio.connect: kaio sets its policy
            await kaio.connect("a", 1, keepalive="detect=30s")  #+ kaio.connect: keepalive='detect=30s'
            await kaio.connect("a", 1, keepalive="off")  #! kaio.connect: turned off here
            await kaio.open_connection("a", 1, keepalive=kaio.Keepalive.OFF)  #! kaio.open_connection: turned off here
            async with serve(print, "0.0.0.0", 1) as server:  #+ kaio.serve: kaio sets its policy
                await server.serve_forever()
            async with serve(print, "unix:/run/a"):
                ...
    """,
    "kaio's modules": """
        import socket, kaio.net.client, kaio.kernel.sockets as ours
        from kaio.net.server import serve as listen
        from kaio.net import protocols
        async def main(loop):
            await kaio.net.client.connect("a", 1)  #+ kaio.connect: kaio sets its policy
            listen(print, "0.0.0.0", 1, keepalive="off")  #! kaio.serve: turned off here
            await loop.create_server(Ours, port=0)  #+ loop.create_server: its protocol is a subclass of kaio's
        class Ours(protocols.KeepaliveProtocol):
            def connect(self): self.connect()
        a = socket.socket()  #+ socket.socket: passed to kaio.apply
        ours.apply(a, "20s:10s:4")
        b = socket.socket()  #! socket.socket: call kaio.apply
        kaio.Connection.apply(b), kaio.other.thing(b), other.apply(b)
    """,
    "libraries": """
        import grpc, httpx, psycopg, redis, requests, urllib3, websockets, pymongo, aio_pika, nats, aiokafka
        from requests_toolbelt.adapters.socket_options import TCPKeepAliveAdapter
        from websockets.sync.client import connect
        import paho.mqtt.client as mqtt
        from socket import SOL_SOCKET, SO_KEEPALIVE
        redis.Redis("a", socket_keepalive=True)  #+ redis.Redis: socket_keepalive=True
        redis.Redis("a", socket_keepalive=False)  #! redis.Redis: pass socket_keepalive=True
        redis.Redis("a", socket_keepalive=settings.on)  #+ redis.Redis: the value of `settings.on`
        settings = {"socket_keepalive": True, "socket_timeout": 5}
        redis.Redis("a", **settings)  #+ redis.Redis: socket_keepalive=True
        redis.Redis("a", **dict(socket_keepalive=False))  #! redis.Redis: pass socket_keepalive=True
        redis.Redis("a", **unknown)  #! redis.Redis: pass socket_keepalive=True
        redis.from_url("redis://a?socket_keepalive=True")  #+ redis.from_url: in the address
        redis.from_url("redis://a?socket_keepalive=no")  #! redis.from_url
        redis.Redis(connection_pool=pool)
        psycopg.connect("host=a")  #+ psycopg.connect: turned on by libpq
        psycopg.connect("host=a keepalives=0")  #! psycopg.connect: turned off
        psycopg.connect(keepalives=0)  #! psycopg.connect: turned off
        psycopg.connect("host=/run/postgresql")
        OPTIONS = [("grpc.keepalive_time_ms", 10_000)]
        grpc.insecure_channel("a:1", OPTIONS)  #+ grpc.insecure_channel: grpc.keepalive_time_ms is in
        grpc.aio.secure_channel("a:1", None, options=[*OPTIONS])  #+ grpc.aio.secure_channel: grpc.keepalive_time_ms
        grpc.aio.server()  #! grpc.aio.server: grpc.keepalive_time_ms
        ours = [(SOL_SOCKET, SO_KEEPALIVE, 1)]
        transport = httpx.HTTPTransport(socket_options=ours)  #+ httpx.HTTPTransport: SO_KEEPALIVE
        httpx.Client(transport=transport)
        httpx.Client()  #! httpx.Client: transport=
        urllib3.PoolManager(socket_options=[])  #! urllib3.PoolManager: socket_options=
        requests.get("a")  #! requests.get
        session = requests.Session()  #+ requests.Session: adapter
        session.mount("https://", TCPKeepAliveAdapter(idle=20))
        websockets.connect("ws://a")  #+ websockets.connect: own pings, every 20 s
        connect("ws://a", ping_interval=None)  #! websockets.sync.client.connect: turned off
        pymongo.MongoClient()  #+ pymongo.MongoClient: 120 s
        aio_pika.connect_robust("amqp://a")  #+ aio_pika.connect_robust: heartbeats
        aio_pika.connect("amqp://a?heartbeat=0")  #! aio_pika.connect: heartbeat
        nats.connect("a")  #+ nats.connect: every 120 s
        aiokafka.AIOKafkaProducer()  #! aiokafka.AIOKafkaProducer: no keepalive option
        mqtt.Client()  #+ paho.mqtt.client.Client: every 60 s
    """,
    "systems": """
        import os, platform, socket, sys
        from socket import SOL_SOCKET, SO_KEEPALIVE
        a = socket.socket()  #! socket.socket: for Windows only
        if sys.platform == "win32":
            a.ioctl(socket.SIO_KEEPALIVE_VALS, (1, 10000, 3000))
        b = socket.socket()  #+ socket.socket: SO_KEEPALIVE is set on line 10
        if os.name == "nt":
            b.ioctl(socket.SIO_KEEPALIVE_VALS, (1, 10000, 3000))
        else:
            b.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
        c = socket.socket()  #! socket.socket: but not on Linux
        if platform.system() in ("Windows", "Darwin"):
            c.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
        d = socket.socket()  #! socket.socket: but not on Linux
        if sys.platform.startswith("linux"):
            pass
        elif sys.platform == "darwin":
            d.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
        e = socket.socket()  #+ socket.socket: SO_KEEPALIVE
        if not sys.platform.startswith(("win", "cygwin")) and FAST:
            e.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
        f = socket.socket()  #+ socket.socket: SO_KEEPALIVE
        if sys.platform != "win32" or FAST:
            f.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
        g = socket.socket()  #! socket.socket: but not on Linux
        if hasattr(socket, "SIO_KEEPALIVE_VALS"):
            g.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
        h = socket.socket()  #! socket.socket: but not on Linux
        while not h:
            if "linux" == FAST: pass
            elif sys.platform not in ["linux", "darwin"] and FAST:
                h.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
    """,
    "standard library": r"""
        import ftplib, imaplib, kaio, logging.handlers, poplib, smtplib, urllib.request, wsgiref.simple_server
        import xmlrpc.client, xmlrpc.server
        from multiprocessing.connection import Client, Listener
        from multiprocessing.managers import BaseManager
        smtplib.SMTP("a")  #! smtplib.SMTP: kaio.apply on its .sock
        with smtplib.SMTP_SSL("a") as mail:  #+ smtplib.SMTP_SSL: kaio.apply
            kaio.apply(mail.sock)
        smtplib.LMTP("/run/lmtp"), smtplib.LMTP("a")  #! smtplib.LMTP
        ftplib.FTP_TLS("a")  #! ftplib.FTP_TLS
        imap = imaplib.IMAP4_SSL("a")  #+ imaplib.IMAP4_SSL: kaio.apply
        kaio.apply(imap.socket())
        poplib.POP3("a")  #! poplib.POP3
        logging.handlers.SocketHandler("a", 1)  #! logging.handlers.SocketHandler
        xmlrpc.client.ServerProxy("http://a")  #! xmlrpc.client.ServerProxy
        xmlrpc.client.ServerProxy("http://a", transport=mine)
        xmlrpc.server.SimpleXMLRPCServer(("a", 1))  #! xmlrpc.server.SimpleXMLRPCServer
        server = wsgiref.simple_server.make_server("a", 1, app)  #+ wsgiref.simple_server.make_server: kaio.apply
        kaio.apply(server.socket)
        opener = urllib.request.build_opener()  #! urllib.request.build_opener
        Client(("a", 1))  #! multiprocessing.connection.Client
        Client("/run/a"), Client(r"\\.\pipe\a"), Client(("a", 1), family="AF_UNIX")
        Client(elsewhere)  #! multiprocessing.connection.Client
        PATH, PAIR = "/run/b", ("b", 1)
        Client(PATH), Listener(PATH), Listener(), Listener(None), Listener(family="AF_UNIX"), BaseManager()
        Listener(PAIR)  #! multiprocessing.connection.Listener
        Listener(family="AF_INET")  #! multiprocessing.connection.Listener
        class Manager(BaseManager): pass
        Manager(address=("", 1), authkey=b"a")  #! multiprocessing.managers.BaseManager
    """,
    "more clients": """
        import aiohappyeyeballs, amqp, boto3, botocore.session, celery, httpcore, httpcore2, httpx2, kafka, kombu
        import clickhouse_connect, mysql.connector, mysql.connector.aio, paramiko, pika, socket, trio, urllib3, valkey
        from botocore.config import Config
        from socket import SOL_SOCKET, SO_KEEPALIVE
        ON, OFF = [(SOL_SOCKET, SO_KEEPALIVE, 1)], [(SOL_SOCKET, SO_KEEPALIVE, 0)]
        boto3.client("s3")  #! boto3.client: tcp_keepalive
        boto3.client("s3", config=Config(tcp_keepalive=True))  #+ boto3.client: tcp_keepalive is in
        boto3.resource("s3", config=Config(tcp_keepalive=False))  #! boto3.resource: tcp_keepalive
        boto3.Session().client("s3", config=Config(region_name="a"))  #! boto3.Session().client: tcp_keepalive
        boto3.client("s3", config=Config(retries={}) if FAST else None)  #! boto3.client: tcp_keepalive
        boto3.client("s3", config=make_config())  #+ boto3.client: the value of `make_config()`
        ours = Config(tcp_keepalive=True)
        session = botocore.session.get_session()
        session.create_client("s3", config=ours)  #+ botocore.session.get_session().create_client: tcp_keepalive
        ssh = paramiko.SSHClient()  #+ paramiko.SSHClient: set_keepalive() is called on line 16
        ssh.get_transport().set_keepalive(30)
        paramiko.SSHClient()  #! paramiko.SSHClient: paramiko leaves it off
        zero = paramiko.Transport(("a", 22))  #! paramiko.Transport: turns it off
        zero.set_keepalive(0)
        wrapped = socket.create_connection(("a", 22))  #+ socket.create_connection: set_keepalive
        over = paramiko.Transport(wrapped)
        over.set_keepalive(30)
        parameters = pika.ConnectionParameters("a", heartbeat=0)  #! pika.ConnectionParameters: turned off
        pika.BlockingConnection(parameters)
        pika.ConnectionParameters("a")  #+ pika.ConnectionParameters: heartbeats that the broker proposes
        by_tcp = {"TCP_KEEPIDLE": 60}
        pika.ConnectionParameters("a", heartbeat=0, tcp_options=by_tcp)  #+ pika.ConnectionParameters: TCP_KEEP
        pika.BlockingConnection(pika.URLParameters("amqp://a?heartbeat=0"))  #! pika.URLParameters: turned off
        amqp.Connection("a")  #+ amqp.Connection: by py-amqp
        kombu.Connection("amqp://a")  #+ kombu.Connection: by py-amqp
        kombu.Connection()  #+ kombu.Connection: by py-amqp
        kombu.Connection("redis://a")  #! kombu.Connection: transport_options
        kombu.Connection(elsewhere)  #! kombu.Connection: transport_options
        on, off = {"socket_keepalive": True}, {"socket_keepalive": False}
        kombu.Connection("redis://a", transport_options=on)  #+ kombu.Connection: socket_keepalive
        kombu.Connection("redis://a", transport_options=off)  #! kombu.Connection: transport_options
        kombu.Connection("memory://")
        celery.Celery("a", broker="pyamqp://a")  #+ celery.Celery: by py-amqp
        celery.Celery("a", broker="redis://a")  #! celery.Celery: redis_socket_keepalive
        celery.Celery("a")  #! celery.Celery: redis_socket_keepalive
        kafka.KafkaConsumer("a")  #! kafka.KafkaConsumer: socket_options
        kafka.KafkaProducer(socket_options=ON)  #+ kafka.KafkaProducer: SO_KEEPALIVE
        kafka.KafkaProducer(socket_options=OFF)  #! kafka.KafkaProducer: socket_options
        mysql.connector.connect(host="a")  #! mysql.connector.connect: not in 26.10
        mysql.connector.connect(unix_socket="/run/a")
        mysql.connector.aio.connect(host="a")  #! mysql.connector.aio.connect: no keepalive option
        httpcore.ConnectionPool()  #! httpcore.ConnectionPool: socket_options
        httpcore2.AsyncConnectionPool(socket_options=ON)  #+ httpcore2.AsyncConnectionPool: SO_KEEPALIVE
        httpcore.request("GET", "a")  #! httpcore.request: ConnectionPool
        httpx2.Client()  #! httpx2.Client: transport=
        httpx2.HTTPTransport(socket_options=ON)  #+ httpx2.HTTPTransport: SO_KEEPALIVE
        clickhouse_connect.get_client(host="a")  #+ clickhouse_connect.get_client: 30 s and 3 probes
        urllib3.connection_from_url("http://a")  #! urllib3.connection_from_url: socket_options
        class More(valkey.Valkey): pass
        More.from_url("a")  #! valkey.Valkey.from_url: valkey leaves it off
        urllib3.request("GET", "a")  #! urllib3.request: PoolManager
        valkey.Valkey("a")  #! valkey.Valkey: valkey leaves it off
        async def main():
            stream = await trio.open_tcp_stream("a", 1)  #+ trio.open_tcp_stream: SO_KEEPALIVE
            stream.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
            await trio.serve_tcp(print, 1)  #! trio.serve_tcp
            trio.socket.socket()  #! trio.socket.socket
            trio.socket.socket(trio.socket.AF_UNIX), trio.socket.socket(type=trio.socket.SOCK_DGRAM)
            sock = await aiohappyeyeballs.start_connection(infos)  #+ aiohappyeyeballs.start_connection: SO_KEEPALIVE
            sock.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
            await aiohappyeyeballs.start_connection(infos)  #! aiohappyeyeballs.start_connection
            await aiohappyeyeballs.start_connection(infos, socket_factory=make)
    """,
    "pymongo": """
        import motor, pymongo
        from motor.motor_asyncio import AsyncIOMotorClient
        pymongo.MongoClient("a")  #+ pymongo.MongoClient: since 3.5, to at most 120 s
        pymongo.AsyncMongoClient("a")  #+ pymongo.AsyncMongoClient: since 3.5
        pymongo.MongoClient("a", socketKeepAlive=False)  #! pymongo.MongoClient: before 4.0
        pymongo.MongoClient("mongodb://a/?socketKeepAlive=false")  #! pymongo.MongoClient: before 4.0
        pymongo.MongoClient("mongodb://%2Frun%2Fmongodb-27017.sock"), pymongo.MongoClient("/run/mongodb-27017.sock")
        pymongo.MongoClient("mongodb://user@%2Frun%2Fa.sock/db?w=1")
        motor.MotorClient("a")  #+ motor.MotorClient: set by pymongo
        AsyncIOMotorClient("a")  #+ motor.motor_asyncio.AsyncIOMotorClient: set by pymongo
    """,
    "web servers": """
        import flask, quart, sanic, tornado.httpserver, tornado.tcpserver, tornado.web, tornado.websocket
        import waitress, gunicorn.app.base
        from granian import Granian
        from tornado.httpclient import AsyncHTTPClient
        from werkzeug.serving import run_simple
        app = flask.Flask(__name__)
        app.run()  #! flask.Flask().run
        quart.Quart(__name__).run()  #! quart.Quart().run
        sanic.Sanic("a").run()  #! sanic.Sanic().run
        run_simple("a", 1, app)  #! werkzeug.serving.run_simple
        waitress.serve(app)  #! waitress.serve
        Granian("a:app", port=1).serve()  #! granian.Granian
        Granian("a:app", uds="/run/a").serve()
        class Standalone(gunicorn.app.base.BaseApplication):
            def load(self): return app
        Standalone().run()  #! gunicorn.app.base.BaseApplication
        web = tornado.web.Application([])
        web.listen(1)  #! tornado.web.Application().listen
        tornado.httpserver.HTTPServer(web)  #! tornado.httpserver.HTTPServer
        AsyncHTTPClient()  #! tornado.httpclient.AsyncHTTPClient
        tornado.websocket.websocket_connect("a")  #! tornado.websocket.websocket_connect
        tornado.websocket.websocket_connect("a", ping_interval=9)  #+ tornado.websocket.websocket_connect: ping_interval
        class Echo(tornado.tcpserver.TCPServer): pass
        Echo()  #! tornado.tcpserver.TCPServer
        from twisted.internet import reactor
        from twisted.internet.endpoints import HostnameEndpoint
        reactor.listenTCP(1, factory)  #! twisted.internet.reactor.listenTCP: setTcpKeepAlive
        HostnameEndpoint(reactor, "a", 1)  #! twisted.internet.endpoints.HostnameEndpoint: setTcpKeepAlive
        class Page(tornado.web.Application): pass
        Page([]).listen(1)  #! tornado.web.Application().listen
        def other(app): app.run(), app.listen(1)
    """,
    "star": """
        from socket import *
        a = socket(AF_INET)  #! socket.socket
        b = create_connection(("a", 1))  #+ socket.create_connection: SO_KEEPALIVE
        b.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
        c = socket(AF_UNIX)
    """,
    "tangled": """
        import socket
        def f(a):
            a = g(a) or f(a) or a.b.c
            return a
        def g(a):
            while True:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                s = f(g(a)) or socket.socket()  #+ socket.socket: SO_KEEPALIVE
            return f(s)
        class A(A): ...
        class B(C): ...
        class C(B): ...
        C().sock.setsockopt(1, 2, 3)
        match f(1):
            case [socket, *rest] | {"a": socket, **rest}:
                socket.socket()
    """,
}

ON_KAIO_LOOP = """
    {imports}
    import asyncio, socket, aiohttp, requests, redis.asyncio, anyio
    async def main(loop):
        await asyncio.open_connection("a", 1)  #+ asyncio.open_connection: runs on kaio's loop
        await loop.create_server(object, port=0)  #+ loop.create_server: runs on kaio's loop
        await anyio.connect_tcp("a", 1)  #+ anyio.connect_tcp: runs on kaio's loop
        aiohttp.ClientSession()  #+ aiohttp.ClientSession: runs on kaio's loop
        redis.asyncio.Redis(socket_keepalive=False)  #+ redis.asyncio.Redis: runs on kaio's loop
        sock = socket.socket()  #+ socket.socket: runs on kaio's loop
        await loop.sock_connect(sock, ("a", 1))
        blocking = socket.socket()  #! socket.socket
        requests.get("a")  #! requests.get
    {run}
"""


def write_files(top: Path, tree: dict[str, str]) -> None:
    """Write the samples below a directory."""
    for name, text in tree.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedented(text))


def dedented(text: str) -> str:
    """The text without its first line's indentation."""
    lines = text.lstrip("\n").splitlines()
    margin = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    return "\n".join(line[margin:] for line in lines) + "\n"


def marked(top: Path, name: str) -> list[tuple[str, int, str, bool, str]]:
    """The places that a sample's comments mark: path, line, call, covered, words of the reason."""
    found = []
    for number, line in enumerate((top / name).read_text().splitlines(), 1):
        comment = re.search(r"#([!+]) ([\w.(), ]+)(?:: (.*))?$", line)
        for call in comment[2].split(", ") if comment else ():
            assert comment is not None
            found.append((str(top / name), number, call, comment[1] == "+", comment[3] or ""))
    return found


def check(findings: list[Finding], expected: list[tuple[str, int, str, bool, str]]) -> None:
    """Assert that the findings are the marked places, with the marked words in their reasons."""
    assert [(each.path, each.line, each.call, each.covered) for each in findings] == [each[:4] for each in expected]
    for finding, (*_, words) in zip(findings, expected, strict=True):
        assert words in finding.why, finding


def test_all_twenty_places_are_found_and_nothing_else(tmp_path: Path) -> None:
    write_files(tmp_path, TWENTY)
    expected = [place for path in ("client.py", *PACKAGE) for place in marked(tmp_path, path)]
    assert len(expected) == 20
    check(audit([tmp_path]), expected)


@pytest.mark.parametrize("sample", COVERED)
def test_settings_are_recognised(sample: str, tmp_path: Path) -> None:
    write_files(tmp_path, {"sample.py": COVERED[sample]})
    check(audit([tmp_path]), marked(tmp_path, "sample.py"))


@pytest.mark.parametrize(
    ("imports", "run"),
    [
        ("import kaio", "kaio.run(main(None))"),
        ("from kaio import run as go", "go(main(None))"),
        ("import kaio", "kaio.install(keepalive='20s:10s:4')"),
        ("import kaio", "asyncio.run(main(None), loop_factory=kaio.new_event_loop)"),
        ("import kaio as k", "asyncio.Runner(loop_factory=k.loop_factory(keepalive='on')).run(main(None))"),
        ("import kaio", "asyncio.set_event_loop_policy(kaio.EventLoopPolicy())"),
        ("import kaio", "anyio.run(main, None, backend_options={'loop_factory': kaio.new_event_loop})"),
        ("from kaio.loop import factories", "factories.run(main(None))"),
        ("import uvicorn", "uvicorn.run('app', loop='kaio:new_event_loop')  #+ uvicorn.run: kaio"),
    ],
)
def test_sockets_of_kaios_loop_are_covered(imports: str, run: str, tmp_path: Path) -> None:
    write_files(tmp_path, {"sample.py": ON_KAIO_LOOP.format(imports=imports, run=run)})
    check(audit([tmp_path]), marked(tmp_path, "sample.py"))


@pytest.mark.parametrize("imports", ["import kaio", "from kaio import run", "from other import kaio"])
def test_importing_kaio_covers_nothing(imports: str, tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text(f"{imports}\nimport asyncio\nasyncio.open_connection('a', 1)\ndef f(kaio): kaio.run(1)\n")
    (finding,) = audit([path])
    assert (finding.line, finding.covered) == (3, False)


@pytest.mark.parametrize(
    ("source", "line", "words"),
    [
        (b"import socket\nsocket.socket(\n", 2, "was never closed"),
        (b"print 'two'\n", 1, "Missing parentheses"),
        (b"\xff\xfe", 1, "cannot be read"),
        (b"# coding: nonsense\n", 1, "unknown encoding"),
        (b"a = '\x00'\n", 1, "null bytes"),
        (b"x = " + b"(" * 5000, 1, "cannot be read"),
        (b"import socket\nx" + b".y()" * 600 + b"\nsocket.socket()\n", 3, "kaio.apply"),
        (b"def f(:\n", 1, "syntax error"),
    ],
    ids=["open", "python 2", "not text", "encoding", "null", "nested", "long chain", "no"],
)
def test_an_unreadable_file_is_one_finding(source: bytes, line: int, words: str, tmp_path: Path) -> None:
    """The other files are audited all the same."""
    (tmp_path / "bad.py").write_bytes(source)
    (tmp_path / "good.py").write_text("import socket\nsocket.socket()\n")
    *bad, good = audit([tmp_path])
    assert (good.call, good.line) == ("socket.socket", 2)
    assert [(each.path, each.line, each.covered) for each in bad] == [(str(tmp_path / "bad.py"), line, False)]
    assert words in bad[0].why
    assert "\n" not in bad[0].why


def test_each_file_is_audited_once_however_it_is_named(tmp_path: Path) -> None:
    write_files(tmp_path, {".hidden/tool": "import socket\nsocket.socket()\n", "a.py": "", "b.py": ""})
    (tmp_path / "link.py").symlink_to(tmp_path / ".hidden" / "tool")
    (tmp_path / "broken.py").symlink_to(tmp_path / "nowhere")
    named = audit([tmp_path / ".hidden" / "tool", str(tmp_path / ".hidden"), tmp_path])
    assert [(each.path, each.call) for each in named] == [
        (str(tmp_path / ".hidden" / "tool"), "socket.socket"),
        (str(tmp_path / "broken.py"), ""),
    ]


# -- files


def run(*arguments: str | Path) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(cli, ["audit", *map(str, arguments)], prog_name="kaio")


BARE = "import socket\nsocket.socket()\n"
KEPT = "import kaio, socket\nkaio.apply(socket.socket())\n"


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device"])
def test_only_regular_files_are_opened(kind: str, tmp_path: Path) -> None:
    """A FIFO would be waited on for ever. The other files are read, whether it was named or found."""
    special = tmp_path / "a.py"
    with contextlib.ExitStack() as stack:
        if kind == "FIFO":
            os.mkfifo(special)
        elif kind == "socket":
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(special))
        else:
            special.symlink_to("/dev/zero")
        (tmp_path / "b.py").write_text(KEPT)
        for result in (run(tmp_path), run(special, tmp_path / "b.py")):
            lines = result.output.splitlines()
            assert lines[0] == f"! {special}:1: cannot be read: it is a {kind}, not a regular file"
            assert lines[1].startswith(f"  {tmp_path}/b.py:2: socket.socket: ")
            assert lines[2:] == ["files: 1, unreadable: 1, places: 1, uncovered: 0"]
            assert result.exit_code == 1
        assert run(special).exit_code == 3


def test_a_file_is_not_read_beyond_a_limit(tmp_path: Path) -> None:
    large, small = tmp_path / "large.py", tmp_path / "small.py"
    with large.open("wb") as file:
        file.truncate(LARGEST + 1)
    small.write_text(KEPT)
    notebooks = {"output.ipynb": notebook(BARE, output="x" * LARGEST), "code.ipynb": notebook("#" * LARGEST, BARE)}
    write_files(tmp_path, {name: text + "\n" for name, text in notebooks.items()})
    assert [(each.call, each.why) for each in audit([tmp_path / "code.ipynb", tmp_path / "output.ipynb"])] == [
        ("", "cannot be read: it has more than 4 MiB"),
        ("socket.socket", "call kaio.apply on the socket"),
    ]
    result = run(large, small)
    assert f"! {large}:1: cannot be read: it has more than 4 MiB\n" in result.output
    assert result.output.endswith("files: 1, unreadable: 1, places: 1, uncovered: 0\n")


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    growing = tmp_path / "a.py"
    growing.write_text("")
    monkeypatch.setattr(os, "read", lambda descriptor, size: b"#" * size)
    (finding,) = audit([growing])
    assert finding.why == "cannot be read: it has more than 4 MiB"


def test_a_directory_that_vanishes_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or cannot be listed; the others are read."""
    write_files(tmp_path, {"a/a.py": KEPT, "b/b.py": KEPT, "c.py": KEPT})
    scandir = os.scandir

    def vanishing(path: str) -> Iterator[os.DirEntry[str]]:
        if path == str(tmp_path / "a"):
            shutil.rmtree(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    found = audit([tmp_path])
    assert [(each.path, each.why) for each in found if not each.call] == [
        (str(tmp_path / "a"), "cannot be read: No such file or directory")
    ]
    assert [each.path for each in found if each.call] == [str(tmp_path / "c.py"), str(tmp_path / "b" / "b.py")]


def test_directories_of_any_depth_are_walked(tmp_path: Path) -> None:
    """Deeper than Python's stack; a path that is too long for the kernel is reported."""
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(2100):
            os.mkdir("d", dir_fd=here)
            inner = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = inner
    finally:
        os.close(here)
    (tmp_path / "a.py").write_text(KEPT)
    try:
        covered, deep = audit([tmp_path])
    finally:
        subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # shutil.rmtree() calls itself for each level
    assert covered.covered
    assert deep.why == "cannot be read: File name too long"


def test_loops_of_links_end(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "a.py").symlink_to(tmp_path / "a.py")
    (tmp_path / "b.py").write_text(KEPT)
    loop, covered = audit([tmp_path])
    assert loop.why == "cannot be read: Too many levels of symbolic links"
    assert covered.covered
    result = run(tmp_path / "a.py")
    assert (result.exit_code, "Too many levels" in result.stdout) == (3, True)


COOKIES = [
    *("utf-16", "utf-32", "utf-7", "rot13", "hex", "zip", "bz2", "base64", "uu", "idna", "punycode", "undefined"),
    *("unicode_escape", "raw_unicode_escape", "mbcs", "oem", "ascii", "nonsense", "charmap", "quopri", "utf_8_sig"),
]


@pytest.mark.parametrize("cookie", COOKIES)
def test_a_coding_cookie_that_lies_is_no_traceback(cookie: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"# coding: " + cookie.encode() + b"\nx = '\xc3\xa9\\ud800'\n" + BARE.encode())
    (tmp_path / "b.py").write_text(BARE)
    *_, good = audit([tmp_path])
    assert (good.path, good.call) == (str(tmp_path / "b.py"), "socket.socket")
    assert run(tmp_path).exit_code == 1


def test_which_files_are_python(tmp_path: Path) -> None:
    """With a byte order mark, in another encoding, without a console; stubs are not audited."""
    (tmp_path / "bom.py").write_bytes(b"\xef\xbb\xbf" + BARE.encode())
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\nx = '\xe9'\n" + BARE.encode())
    write_files(tmp_path, {"window.pyw": BARE, "stub.pyi": BARE, "data.py.txt": BARE})
    named = ["bom.py", "latin.py", "window.pyw"]
    assert [each.path for each in audit([tmp_path])] == [str(tmp_path / name) for name in named]
    assert audit([tmp_path / "stub.pyi"]) == []
    result = run(tmp_path / "stub.pyi")
    assert (result.exit_code, result.stderr) == (3, f"kaio: nothing to audit in {tmp_path}/stub.pyi\n")


NESTED = {
    "brackets": "[" * 150 + "socket.socket()" + "]" * 150,
    "minus": "-" * 3000 + "1",
    "attributes": "x" + ".a" * 3000,
    "calls": "x" + "()" * 900,
    "lambdas": "lambda: " * 90 + "1",
    "ternaries": "1 if x else " * 300 + "2",
    "text": "f'" + "{x}" * 3000 + "'",
    "no end": "(" * 10_000,
}


@pytest.mark.parametrize("expression", NESTED)
def test_deeply_nested_expressions_end_with_an_answer(expression: str, tmp_path: Path) -> None:
    """Passed as an argument too, and shown: in one line, and not at any length."""
    write_files(
        tmp_path,
        {
            "a.py": f"import socket\nx = {NESTED[expression]}\n",
            "b.py": f"import redis\nredis.Redis(socket_keepalive={NESTED[expression]})\n",
            "c.py": BARE,
        },
    )
    result = run(tmp_path)
    assert result.exit_code == 1
    assert f"! {tmp_path}/c.py:2: socket.socket: " in result.output
    assert all(len(line) < len(str(tmp_path)) + 300 for line in result.output.splitlines())


HOSTILE = [
    (b"\xff\xfe.py", r"\xff\xfe.py"),
    (b"a\n! forged.py:1: b.py", r"a\n! forged.py:1: b.py"),
    (b"\x1b[2J\x1b]0;owned\x07.py", r"\x1b[2J\x1b]0;owned\x07.py"),
    ("\u202egnp.py".encode(), r"\u202egnp.py"),
    (b"\xed\xa0\x80.py", r"\xed\xa0\x80.py"),
    (b"a\rb\x0bc\x85d.py", r"a\rb\x0bc\x85d.py"),
]


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "shown"), HOSTILE, ids=[shown for _, shown in HOSTILE])
@pytest.mark.parametrize("source", [BARE, "socket.(\n"], ids=["place", "unreadable"])
def test_names_of_files_are_shown_and_not_obeyed(name: bytes, shown: str, source: str, tmp_path: Path) -> None:
    """Through a pipe, in one line each; in JSON as text, and as bytes where the text is not the whole truth."""
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "w") as file:
        file.write(source)
    for words in ([b"audit", os.fsencode(tmp_path)], [b"audit", path]):
        done = subprocess.run([sys.executable, "-m", "kaio", *words], capture_output=True, check=False, timeout=60)
        assert done.stderr == b""
        line, summary = done.stdout.decode("ascii").splitlines()
        assert line.startswith(f"! {tmp_path}/{shown}:")
        assert summary.startswith("files: ")
        done = subprocess.run([sys.executable, "-m", "kaio", *words, b"--json"], capture_output=True, check=False)
        (finding,) = json.loads(done.stdout.decode("utf-8"))["findings"]
        finding["path"].encode("utf-8")  # no half characters, which strict parsers refuse
        exact = finding["path"].encode() if finding["path_bytes"] is None else bytes.fromhex(finding["path_bytes"])
        assert exact == path


@pytest.mark.parametrize("path", ["{}", "{}/notes", "{}/data.txt/", "{}/nowhere/../notes"])
def test_nothing_to_audit_is_not_a_success(path: str, tmp_path: Path) -> None:
    """An empty directory, one without Python, and one that was meant to be another."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "nowhere").mkdir()
    given = path.format(tmp_path)
    result = run(given)
    if "data.txt" in given:
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == f"kaio: {given}: neither a process nor an existing path\n"
    else:
        assert result.exit_code == 3
        assert result.stdout == "files: 0, unreadable: 0, places: 0, uncovered: 0\n"
        assert result.stderr == f"kaio: nothing to audit in {given}\n"
        assert json.loads(run(given, "--json").stdout)["empty"] == [given]


def test_an_empty_directory_beside_others_is_named(tmp_path: Path) -> None:
    write_files(tmp_path, {"full/a.py": KEPT})
    (tmp_path / "empty").mkdir()
    result = run(tmp_path / "full", tmp_path / "empty")
    assert (result.exit_code, result.stderr) == (0, f"kaio: nothing to audit in {tmp_path}/empty\n")


@pytest.mark.parametrize(
    ("tree", "code", "summary"),
    [
        ({"a.py": KEPT}, 0, "files: 1, unreadable: 0, places: 1, uncovered: 0"),
        ({"a.py": ""}, 0, "files: 1, unreadable: 0, places: 0, uncovered: 0"),
        ({"a.py": KEPT, "b.py": BARE}, 1, "files: 2, unreadable: 0, places: 2, uncovered: 1"),
        ({"a.py": KEPT, "b.py": "x ="}, 1, "files: 1, unreadable: 1, places: 1, uncovered: 0"),
        ({"a.py": "(", "b.py": "x ="}, 3, "files: 0, unreadable: 2, places: 0, uncovered: 0"),
    ],
)
def test_the_summary_says_how_much_was_read(tree: dict[str, str], code: int, summary: str, tmp_path: Path) -> None:
    """And the exit code: an unreadable file may hold anything, so it is no success."""
    write_files(tmp_path, tree)
    result = run(tmp_path)
    assert (result.exit_code, result.stderr) == (code, "")
    assert result.output.splitlines()[-1] == summary
    document = json.loads(run(tmp_path, "--json").stdout)
    assert summary == ", ".join(f"{key}: {document[key]}" for key in ("files", "unreadable", "places", "uncovered"))


@pytest.mark.parametrize("gone", ["gone.py", "gone/", "x" * 5000 + ".py", "a\0b.py", "a.py/b.py"])
def test_a_missing_path_does_not_hide_the_others(gone: str, tmp_path: Path) -> None:
    write_files(tmp_path, {"a.py": BARE})
    for words in ((tmp_path / "a.py", f"{tmp_path}/{gone}"), (f"{tmp_path}/{gone}", tmp_path / "a.py")):
        result = run(*words)
        assert result.exit_code == 2
        assert result.stdout.startswith(f"! {tmp_path}/a.py:2: socket.socket: ")
        assert result.stdout.endswith("files: 1, unreadable: 0, places: 1, uncovered: 1\n")
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"kaio: {tmp_path}/")
        assert line.endswith(": neither a process nor an existing path")
        assert len(line) < 1100


# -- notebooks


def notebook(*cells: object, **metadata: object) -> str:
    """A notebook with these cells: text of code, or a cell as it is."""
    made = [{"cell_type": "code", "source": cell} if isinstance(cell, (str, list)) else cell for cell in cells]
    return json.dumps({"cells": made, "metadata": metadata, "nbformat": 4})


def test_the_code_of_notebooks_is_audited(tmp_path: Path) -> None:
    """Names are known in later cells, and IPython's lines are skipped."""
    cells = [
        {"cell_type": "markdown", "source": ["socket.socket()"]},
        ["import socket\n", "%matplotlib inline\n", "a = socket.socket()"],
        "!pip install x \\\n  socket.socket()\nfiles = !ls\nhelp?\n?help\nif files:\n    !ls\nb = socket.socket()",
        "%%bash\nsocket.socket(",
        "%%time\nawait asyncio.sleep(1)\nc = socket.socket()",
        "def broken(:",
        f"a{_ON}\nx = (5\n  % 3)",
        {"cell_type": "raw", "source": "socket.socket()"},
    ]
    path = tmp_path / "a.ipynb"
    path.write_text(notebook(*cells))
    found = [(each.cell, each.line, each.call, each.covered) for each in audit([tmp_path])]
    assert found == [
        (2, 3, "socket.socket", True),
        (3, 8, "socket.socket", False),
        (5, 3, "socket.socket", False),
        (6, 1, "", False),
    ]
    result = run(path)
    assert f"  {path}:cell 2:3: socket.socket: SO_KEEPALIVE is set on line 1 of cell 7\n" in result.output
    assert f"! {path}:cell 6:1: cannot be read: syntax error: " in result.output
    assert result.output.endswith("files: 1, unreadable: 1, places: 3, uncovered: 2\n")
    assert [row["cell"] for row in json.loads(run(path, "--json").stdout)["findings"]] == [2, 3, 5, 6]


def test_old_and_foreign_notebooks(tmp_path: Path) -> None:
    """Version 3 of the format keeps its cells in worksheets; a notebook in R has nothing to audit."""
    old = {"worksheets": [{"cells": [{"cell_type": "code", "input": [BARE]}]}], "nbformat": 3}
    (tmp_path / "a.ipynb").write_text(json.dumps(old), encoding="utf-8-sig")
    (finding,) = audit([tmp_path])
    assert (finding.cell, finding.line) == (1, 2)
    (tmp_path / "a.ipynb").write_text(notebook("x <- 1", kernelspec={"language": "R"}))
    assert run(tmp_path).exit_code == 3
    (tmp_path / "a.ipynb").write_text(notebook())
    assert run(tmp_path).exit_code == 3


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"cells": 1}', "[" * 100_000, "\xff", '{"worksheets": [1]}', "9" * 5000],
    ids=range(10),
)
def test_what_is_not_a_notebook_is_unreadable(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.ipynb").write_bytes(text.encode("latin-1"))
    result = run(tmp_path)
    assert result.exit_code == 3
    if text != '{"worksheets": [1]}':
        assert "cannot be read: it is not a notebook: " in result.stdout


def test_strange_cells_are_no_traceback(tmp_path: Path) -> None:
    cells = [1, None, {}, {"cell_type": "code"}, {"cell_type": "code", "source": [1, "x = 1"]}, "\ud800", "\0", "?", ""]
    (tmp_path / "a.ipynb").write_text(notebook(*cells, kernelspec=1, language_info={"name": 5}))
    result = run(tmp_path, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["unreadable"] == 2


def test_a_missing_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        audit([tmp_path / "nowhere"])


def test_deeply_nested_source_does_not_overflow_the_stack(tmp_path: Path) -> None:
    """Generated source has sums of thousands of terms, each of which is a level of the tree."""
    (tmp_path / "a.py").write_text(f"import socket\nx = {'+'.join(['y'] * 2500)}\nsocket.socket()\n")
    assert [each.line for each in audit([tmp_path])] == [3]


_ON = ".setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)"

# What is repeated, and what stands before it: shapes of generated source.
REPEATED = {
    "one name": ("import socket", f"s = socket.socket()\ns{_ON}"),
    "in one function": ("import socket\ndef f():", f"    s = socket.socket()\n    s{_ON}"),
    "in branches": ("import socket", f"if x:\n    s = socket.socket()\n    s{_ON}"),
    "after branches": ("import socket", f"if x:\n    s = socket.socket()\ns{_ON}"),
    "elif": ("import socket\nif x: pass", f"elif x:\n    s = socket.socket()\n    s{_ON}"),
    "imports": ("", "import socket\nsocket.socket()"),
    "guarded imports": ("", "try:\n    import socket\nexcept ImportError:\n    socket = None\nsocket.socket()"),
    "stars": ("", "from a import *\nfrom socket import *\nsocket()"),
    "globals": ("import socket", f"def f():\n    global s\n    s = socket.socket()\n    s{_ON}"),
    "attributes": (
        "import socket\nclass A:",
        f"    def f(self): self.s = socket.socket()\n    def g(self): self.s{_ON}",
    ),
    "arguments": (f"import socket\ndef f(s):\n    s{_ON}", "s = socket.socket()\nf(s)"),
    "one class": ("import socket\nclass A(socket.socket):\n    x = [MANY]", "A()"),
    "one list": ("import grpc\nx = [MANY]", "grpc.insecure_channel('a', x)"),
}


@pytest.mark.heavy
@pytest.mark.parametrize("shape", REPEATED)
def test_the_work_grows_as_the_source(shape: str, tmp_path: Path) -> None:
    """Eight times as many sockets are eight times the work and no more, counted in calls of functions."""
    before, repeated = REPEATED[shape]
    work = {}
    for times in (100, 800):
        path = tmp_path / f"{times}.py"
        path.write_text("\n".join([before.replace("MANY", "1, " * times), *[repeated] * times]) + "\n")
        calls = [0]

        def count(frame: object, event: str, argument: object, calls: list[int] = calls) -> None:
            calls[0] += 1

        sys.setprofile(count)
        try:
            findings = audit([path])
        finally:
            sys.setprofile(None)
        assert len(findings) == times
        work[times] = calls[0]
    assert work[800] < 12 * work[100]


@pytest.mark.parametrize("names", ["s", "s{number}"])
def test_all_of_many_sockets_are_followed(names: str, tmp_path: Path) -> None:
    """Into a loop over a list, into a function that all are passed to, and through an attribute."""
    lines = ["import socket", "def keep(sock):", f"    sock{_ON}", "class A:", "    def __init__(self):"]
    lines += ["        self.s = socket.socket()"] * 300 + ["    def keep(self):", f"        self.s{_ON}"]
    lines += ["some = [", *["socket.socket(),"] * 300, "]", "for each in some:", f"    each{_ON}"]
    for number in range(300):
        name = names.format(number=number)
        lines += [f"{name} = socket.socket()", f"keep({name})"]
    (tmp_path / "a.py").write_text("\n".join(lines) + "\n")
    findings = audit([tmp_path])
    assert len(findings) == 900
    assert all(finding.covered for finding in findings)


@pytest.mark.parametrize("name", ["x", "y"])
def test_an_elif_chain_is_one_choice(name: str, tmp_path: Path) -> None:
    """What one arm sets is not set in another, and what an arm's condition made is known in its body."""
    write_files(tmp_path, {"sample.py": ELIF.replace("NAME", name)})
    check(audit([tmp_path]), marked(tmp_path, "sample.py"))


ELIF = """
    import socket
    if NAME == 1:
        s = socket.socket()  #! socket.socket
    elif NAME == 2:
        s = socket.socket()  #+ socket.socket: SO_KEEPALIVE
        s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    elif (t := socket.socket()):  #+ socket.socket: SO_KEEPALIVE
        s = socket.socket()  #! socket.socket
        t.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    else:
        s = socket.socket()  #+ socket.socket: SO_KEEPALIVE
        s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    u = None
    if NAME == 3:
        u = socket.socket()  #+ socket.socket: SO_KEEPALIVE
    elif NAME == 4:
        u = socket.socket()  #+ socket.socket: SO_KEEPALIVE
    u.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
"""


def test_source_is_not_imported_or_executed(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import sys\nsys.modules['ran'] = sys\nraise SystemExit\n")
    assert audit([tmp_path]) == []
    assert "ran" not in sys.modules


def test_the_names_of_kaio_are_public() -> None:
    """A name that is moved or renamed does not stay behind in the audit."""
    names = {name for name in TABLE if name.startswith("kaio.")} | TAKES_SOCKETS | LOOPS | PROTOCOLS
    assert {name.removeprefix("kaio.") for name in names} <= set(kaio.__all__)
