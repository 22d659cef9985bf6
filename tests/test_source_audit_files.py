"""Which files the source audit reads, what it says of those it cannot, and libraries that make connections."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Final

import pytest
from click.testing import CliRunner, Result

from kaio.cli import cli
from kaio.tools.audit import audit, report

from .test_source_audit import check, marked, write_files

BARE: Final = "import socket\nsocket.socket()\n"

LIBRARIES: Final = """
    import smtplib, ftplib, imaplib, poplib, xmlrpc.client, xmlrpc.server, wsgiref.simple_server
    from multiprocessing.connection import Client, Listener
    import paramiko, pika, amqp, kombu, kafka, tornado.tcpclient, tornado.tcpserver, tornado.httpserver, trio, boto3
    import mysql.connector, httpcore, httpx2, flask, aiohappyeyeballs, socket, urllib.request
    from botocore.config import Config
    smtplib.SMTP("a")  #! smtplib.SMTP: .sock
    ftplib.FTP_TLS("a")  #! ftplib.FTP_TLS
    imaplib.IMAP4_SSL("a")  #! imaplib.IMAP4_SSL
    poplib.POP3("a")  #! poplib.POP3
    xmlrpc.client.ServerProxy("http://a")  #! xmlrpc.client.ServerProxy
    xmlrpc.server.SimpleXMLRPCServer(("", 0))  #! xmlrpc.server.SimpleXMLRPCServer
    wsgiref.simple_server.make_server("", 0, None)  #! wsgiref.simple_server.make_server
    Client(("a", 1))  #! multiprocessing.connection.Client
    Listener(("", 0), "AF_INET")  #! multiprocessing.connection.Listener
    Client("/run/x"), Listener(), Listener(address, "AF_UNIX"), Client(r"pipe", "AF_PIPE")
    bare = paramiko.SSHClient()  #! paramiko.SSHClient: set_keepalive
    ssh = paramiko.SSHClient()  #+ paramiko.SSHClient: sends its own pings
    ssh.connect("a")
    ssh.get_transport().set_keepalive(30)
    off = paramiko.Transport(("a", 22))  #! paramiko.Transport
    off.set_keepalive(0)
    pika.BlockingConnection(pika.ConnectionParameters("a"))  #+ pika.BlockingConnection: heartbeats
    amqp.Connection("a")  #+ amqp.Connection: its user timeout of 1 s
    kombu.Connection("amqp://a")  #+ kombu.Connection: py-amqp
    kafka.KafkaProducer(bootstrap_servers="a")  #+ kafka.KafkaProducer
    tornado.tcpclient.TCPClient()  #! tornado.tcpclient.TCPClient: kaio.run
    class Echo(tornado.tcpserver.TCPServer): ...
    Echo()  #! tornado.tcpserver.TCPServer
    async def main():
        await trio.open_tcp_stream("a", 1)  #! trio.open_tcp_stream
        await trio.serve_tcp(print, 0)  #! trio.serve_tcp
        await aiohappyeyeballs.start_connection([])  #! aiohappyeyeballs.start_connection
        await aiohappyeyeballs.start_connection([], socket_factory=f)  #+ aiohappyeyeballs.start_connection
    boto3.client("s3")  #! boto3.client: tcp_keepalive
    boto3.client("s3", config=Config(tcp_keepalive=True))  #+ boto3.client
    mysql.connector.connect(host="a")  #! mysql.connector.connect
    httpcore.ConnectionPool()  #! httpcore.ConnectionPool
    httpcore.ConnectionPool(socket_options=[(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)])  #+ httpcore.ConnectionPool
    httpx2.Client()  #! httpx2.Client
    app = flask.Flask("x")
    urllib.request.build_opener().open("http://a")  #! urllib.request.build_opener
    """


def kaio(*arguments: str) -> Result:
    """Run `kaio audit` in this process."""
    return CliRunner().invoke(cli, ["audit", *arguments], prog_name="kaio")


def test_libraries_that_make_connections(tmp_path: pathlib.Path) -> None:
    """None of them is passed over in silence."""
    write_files(tmp_path, {"sample.py": LIBRARIES})
    check(audit([tmp_path]), marked(tmp_path, "sample.py"))


def test_what_windows_has_alone_covers_nothing_here(tmp_path: pathlib.Path) -> None:
    """SIO_KEEPALIVE_VALS; beside SO_KEEPALIVE, that is the reason."""
    (tmp_path / "a.py").write_text(
        "import socket\n"
        "a = socket.socket()\na.ioctl(socket.SIO_KEEPALIVE_VALS, (1, 1, 1))\n"
        "b = socket.socket()\nb.ioctl(socket.SIO_KEEPALIVE_VALS, (1, 1, 1))\n"
        "b.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)\n"
    )
    first, second = audit([tmp_path])
    assert (first.covered, "Windows' alone" in first.why) == (False, True)
    assert (second.covered, second.why) == (True, "SO_KEEPALIVE is set on line 6")


def test_pymongo_is_credited_with_what_it_sets() -> None:
    """SO_KEEPALIVE in its own source, and not the branch for Windows."""
    pymongo = pytest.importorskip("pymongo")
    source = pathlib.Path(pymongo.__file__).parent / "pool_shared.py"
    whys = {finding.why.rpartition(" ")[0] for finding in audit([source]) if finding.call == "socket.socket"}
    assert whys == {"SO_KEEPALIVE is set on line"}


# -- files


def test_only_regular_files_are_read(tmp_path: pathlib.Path) -> None:
    """A pipe named a.py does not hang the command; what is beside it is read."""
    os.mkfifo(tmp_path / "a.py")
    (tmp_path / "b.py").write_text(BARE)
    (tmp_path / "c.py").mkdir()
    (tmp_path / "d.py").symlink_to("/dev/zero")
    (tmp_path / "e.py").symlink_to("e.py")
    (tmp_path / "f.pyi").write_text(BARE)
    found = report([tmp_path])
    assert (found.files, found.unreadable) == (1, 3)
    assert [(os.path.basename(each.path), each.call, each.why) for each in found.findings if not each.call] == [
        ("a.py", "", "cannot be read: not a regular file"),
        ("d.py", "", "cannot be read: not a regular file"),
        ("e.py", "", "cannot be read: Too many levels of symbolic links"),
    ]
    done = kaio(str(tmp_path / "a.py"), str(tmp_path / "b.py"))
    assert done.exit_code == 1
    assert done.stdout.splitlines()[-1] == "files: 1, unreadable: 1, places: 2, uncovered: 2"


def test_a_file_that_is_too_large_is_refused(tmp_path: pathlib.Path) -> None:
    """Without reading all of it."""
    with open(tmp_path / "a.py", "wb") as file:
        file.truncate(1 << 40)
    (finding,) = audit([tmp_path])
    assert finding.why == "cannot be read: larger than 16 MiB"


def test_names_that_a_terminal_would_obey(tmp_path: pathlib.Path) -> None:
    """Escapes, line feeds and bytes that are no UTF-8: one line each, and valid JSON."""
    names = [b"a\x1b]0;x\x07.py", b"b\n! c.py:1: forged.py", b"d\xff.py", "e\u202e.py".encode()]
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "w", encoding="ascii") as file:
            file.write(BARE)
    command = [sys.executable, "-W", "error", "-m", "kaio", "audit", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert len(done.stdout.splitlines()) == 5
    assert done.stdout.replace("\n", "").isprintable()
    output = subprocess.run([*command, "--json"], capture_output=True, check=False).stdout
    document = json.loads(output.decode("utf-8", "strict"))
    found = sorted(os.fsencode(each["path"]) for each in document["findings"])
    assert found == sorted(os.path.join(os.fsencode(tmp_path), name) for name in names)


def test_where_nothing_was_read_the_answer_is_not_yes(tmp_path: pathlib.Path) -> None:
    """An empty directory, one without Python, a tree of which nothing can be read: 3; a mistyped one: 2."""
    empty = tmp_path / "empty"
    empty.mkdir()
    done = kaio(str(empty))
    assert (done.exit_code, done.stdout) == (3, "")
    assert done.stderr == f"kaio: nothing to audit in {empty}: no Python file, no notebook\n"
    (empty / "README").write_text("x")
    assert kaio(str(empty)).exit_code == 3
    (empty / "a.py").write_text("def\n")
    done = kaio(str(empty))
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (3, "files: 0, unreadable: 1, places: 1, uncovered: 1")
    done = kaio(f"{tmp_path}/emty")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"kaio: {tmp_path}/emty: neither a process nor an existing path\n"


def test_the_good_ones_are_read_when_one_is_gone(tmp_path: pathlib.Path) -> None:
    """With their findings; the other is named, and the exit code is that of a mistake."""
    (tmp_path / "good.py").write_text(BARE)
    done = kaio(str(tmp_path / "good.py"), f"{tmp_path}/gone.py")
    assert done.exit_code == 2
    assert "good.py:2: socket.socket" in done.stdout
    assert done.stderr == f"kaio: {tmp_path}/gone.py: neither a process nor an existing path\n"
    document = json.loads(kaio(str(tmp_path / "good.py"), f"{tmp_path}/gone.py", "--json").stdout)
    assert (document["missing"], document["files"], document["uncovered"]) == ([f"{tmp_path}/gone.py"], 1, 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_a_directory_that_cannot_be_listed_is_told_of(tmp_path: pathlib.Path) -> None:
    """On standard error; what can be read is."""
    (tmp_path / "good.py").write_text(BARE)
    (tmp_path / "shut").mkdir(mode=0o700)
    for path in (tmp_path, *tmp_path.parents):
        if path.owner() == "root" and str(path) not in ("/", "/tmp"):
            path.chmod(0o755)
    code = (
        "import encodings.idna, os, sys, kaio.cli.audit\nfrom kaio.cli import cli\nos.setuid(65534)\n"
        "cli(['audit', sys.argv[1]], prog_name='kaio')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"kaio: {tmp_path}/shut: Permission denied\n"
    assert "good.py:2" in done.stdout


# -- notebooks


def notebook(*cells: str | list[str], kind: str = "code") -> str:
    """A notebook with these cells after a text cell."""
    text = {"cell_type": "markdown", "source": ["import socket; socket.socket()"]}
    return json.dumps({"cells": [text, *({"cell_type": kind, "source": cell} for cell in cells)], "nbformat": 4})


def test_the_code_cells_of_a_notebook_are_read(tmp_path: pathlib.Path) -> None:
    """As one module; lines and cells for IPython are left out, and places have the numbers of cell and line."""
    (tmp_path / "n.ipynb").write_text(
        notebook(
            ["%matplotlib inline\n", "!pip install x\n", "import socket\n", "socket?\n"],
            "%%bash\nfor x in *; do echo $x; done",
            "%%time\nif True:\n    !ls\nsock = socket.socket()\nprint('what?')",
            "other = socket.socket()\nother.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)",
        )
    )
    first, second = audit([tmp_path])
    assert (first.path, first.line, first.covered) == (f"{tmp_path}/n.ipynb[3]", 4, False)
    assert (second.path, second.line, second.covered) == (f"{tmp_path}/n.ipynb[4]", 1, True)


NO_NOTEBOOKS: Final = ["", "{", "[]", "null", '{"cells": 5}', '{"cells": [{"cell_type": "code"}]}', "[" * 99999]


@pytest.mark.parametrize("content", NO_NOTEBOOKS)
def test_what_is_no_notebook_is_one_finding(content: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "n.ipynb").write_text(content)
    (finding,) = audit([tmp_path])
    assert finding.why == "cannot be read: not a notebook of version 4"


# -- time


@pytest.mark.parametrize(
    "shape",
    [
        "sock = socket.socket()\nsock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)\n",
        "if x:\n    sock = socket.socket()\nsock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)\n",
        "s{n} = socket.socket()\ns{n}.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)\n",
        "def f{n}():\n    s = socket.socket()\n    return s\nf{n}()\n",
    ],
)
def test_the_time_grows_with_the_file_and_not_with_its_square(shape: str, tmp_path: pathlib.Path) -> None:
    """Counted in the bindings that are looked at and the expressions that are resolved, not in seconds."""
    counted = []
    for count in (200, 800):
        (tmp_path / "a.py").write_text("import socket\nx = 1\n" + "".join(shape.format(n=n) for n in range(count)))
        calls = 0

        def count_calls(*_: object) -> None:
            nonlocal calls
            calls += 1

        sys.setprofile(count_calls)
        try:
            findings = audit([tmp_path])
        finally:
            sys.setprofile(None)
        assert len(findings) == count
        counted.append(calls)
    assert counted[1] < 8 * counted[0]  # four times as long; the square would be sixteen times
