"""Tests of llm_proxy.py, in the order of its sections.

    python -m unittest                      # all of them, well under a minute
    python -m unittest -k limit_reply       # those that are named so
    python test_llm_proxy.py --soak         # those of the last section for minutes, with their figures

Most go through real sockets on loopback: a Client that takes nothing for granted, the proxy, and a Stub in
the place of the endpoint, whose every byte the test decides. Nobody sleeps for a refill: the clock is an
argument. What happens in another thread is waited for with `wait_for`; its bound only tells "never" from
"not yet".
"""
import ast
import base64
import collections
import contextlib
import dis
import errno
import fcntl
import fractions
import gc
import hashlib
import itertools
import json
import math
import os
import queue
import random
import re
import select
import selectors
import signal
import socket
import socketserver
import sqlite3
import ssl
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import types
import unittest
import urllib.parse
import warnings
from unittest import mock

import llm_proxy
from llm_proxy import (SETTINGS, UNITS, Buckets, ConfigFaults, Limits, LimitReached, Malformed, build, parse_json,
                       read_config)

FILE = os.path.abspath(llm_proxy.__file__)
FOLDER = os.path.dirname(FILE)
PATIENCE = 10  # seconds after which what has not happened never will
CHAT = "/v1/chat/completions"
ALL_SETTINGS = [setting for group in SETTINGS.values() for setting in group]


# ------------------------------------------------------------------------------------------------------------
# Doubles: the clock, the log's stream, the caller, the endpoint
# ------------------------------------------------------------------------------------------------------------

def wait_for(condition, what="the condition"):
    """-> the first true value of `condition()`."""
    end = time.monotonic() + PATIENCE
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > end:
            raise AssertionError("%s was not met within %d s" % (what, PATIENCE))
        time.sleep(0.002)


class Clock:
    """Time that passes when a test says so."""

    def __init__(self, now=1000.0):
        self.now = now

    def monotonic(self):
        return self.now

    def time_ns(self):
        return 1700000000 * 10 ** 9 + int(self.now * 10 ** 9)


class Lines:
    """The raw binary stream that the log writes to; keeps what was written."""

    def __init__(self):
        self.data = b""

    def write(self, data):
        self.data += bytes(data)
        return len(data)

    def text(self):
        return self.data.decode("ascii")

    def entries(self):
        """The access lines of LOG_FORMAT=json, but for those of /health, which tests ask in between."""
        rows = [json.loads(row) for row in self.text().splitlines(True) if row.endswith("\n")]
        return [row for row in rows if "outcome" in row and row["path"] != "/health"]


class Cut(Exception):
    """A connection ended where it must not: 'closed' by a FIN or 'reset' by a RST."""


class Reader:
    """HTTP/1.1 from a socket, strictly, for both doubles: neither accepts what the other may not send."""

    def __init__(self, sock):
        self.sock, self.data = sock, bytearray()

    def more(self):
        try:
            data = self.sock.recv(65536)
        except ConnectionError:
            raise Cut("reset") from None
        if not data:
            raise Cut("closed")
        self.data += data

    def until(self, mark):
        while mark not in self.data:
            self.more()
        end = self.data.index(mark) + len(mark)
        taken = bytes(self.data[:end])
        del self.data[:end]
        return taken

    def head(self):
        """-> (the bytes as they came, the start line, [(lower-case name, value)])"""
        head = self.until(b"\r\n\r\n")
        start, *rows = head[:-4].decode("latin-1").split("\r\n")
        fields = []
        for row in rows:
            name, colon, value = row.partition(":")
            assert colon and re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name), "no header field: %r" % row
            fields.append((name.lower(), value.strip(" \t")))
        return head, start, fields

    def body(self, fields, at_the_end_of_stream=False):
        """-> the payload in pieces, as they come. Raises Cut where it is not whole."""
        lengths = [value for name, value in fields if name == "content-length"]
        codings = [value for name, value in fields if name == "transfer-encoding"]
        assert len(lengths) + len(codings) < 2, "ambiguous framing: %r" % fields
        if lengths:
            assert re.fullmatch("[0-9]+", lengths[0]), lengths
            return self.sized(int(lengths[0]))
        if codings:
            assert codings == ["chunked"], codings
            return self.chunked()
        return self.to_the_end() if at_the_end_of_stream else iter(())

    def sized(self, left):
        while left:
            if not self.data:
                self.more()
            piece = bytes(self.data[:left])
            del self.data[:len(piece)]
            left -= len(piece)
            yield piece

    def chunked(self):
        while True:
            line = self.until(b"\r\n")
            assert re.fullmatch(rb"[0-9A-Fa-f]+(;[^\r\n]*)?\r\n", line), "not a chunk's size: %r" % line
            size = int(line.partition(b";")[0], 16)
            yield from self.sized(size)
            assert self.until(b"\r\n") == b"\r\n", "something stands between two chunks"
            if not size:
                return

    def to_the_end(self):
        while True:
            if self.data:
                yield bytes(self.data)
                self.data.clear()
            try:
                self.more()
            except Cut as cut:
                if str(cut) == "closed":
                    return
                raise


class Answered:
    """What a Client got: status, fields, body, and whether the body came to its proper end."""

    def __init__(self, start, fields):
        self.status, self.fields = int(start.split(" ")[1]), fields
        self.body, self.whole = b"", False
        assert re.fullmatch(r"HTTP/1\.1 [1-5][0-9][0-9] .*", start), start

    def get(self, name):
        found = [value for key, value in self.fields if key == name.lower()]
        return ", ".join(found) if found else None

    def json(self):
        return json.loads(self.body.decode())

    def error(self):
        """The four members of an OpenAI error, or an AssertionError."""
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        return error


class Client:
    """A caller that sends exactly the bytes it is told to."""

    def __init__(self, address, receive_buffer=None):
        self.sock = socket.socket()
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(PATIENCE)
        try:
            self.sock.connect(address)
        except OSError:
            self.sock.close()
            raise
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reader, self.pieces = Reader(self.sock), iter(())

    def send(self, data):
        self.sock.sendall(data)
        return self

    def head(self, method="POST"):
        """Read an answer's head; its body is read by `expect` and `rest`."""
        _, start, fields = self.reader.head()
        answered = self.answered = Answered(start, fields)
        bodiless = method == "HEAD" or answered.status < 200 or answered.status in (204, 304)
        self.pieces = iter(()) if bodiless else self.reader.body(fields, at_the_end_of_stream=True)
        return answered

    def expect(self, payload):
        """Read as much payload as `payload` is long; it must be the same."""
        found = b""
        while len(found) < len(payload):
            found += next(self.pieces)
        assert found == payload, "%r is not %r" % (found, payload)
        self.answered.body += found

    def rest(self):
        """Read the body to its end, or to its cut."""
        found = [self.answered.body]
        try:
            found.extend(self.pieces)
            self.answered.whole = True
        except Cut:
            pass
        self.answered.body = b"".join(found)
        return self.answered

    def read(self, method="POST"):
        self.head(method)
        return self.rest()

    def ending(self):
        """Wait for the end of the connection: 'closed' or 'reset'. Nothing may come before it."""
        try:
            self.reader.more()
        except Cut as cut:
            return str(cut)
        raise AssertionError("unexpected bytes: %r" % bytes(self.reader.data))

    def close(self):
        self.sock.close()

    def reset(self):
        """Hang up with a RST."""
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass
        self.sock.close()


class Asked:
    """One request as the Stub got it, and the way to answer it."""

    def __init__(self, sock, reader):
        self.sock, self.reader = sock, reader
        self.head, start, self.fields = reader.head()
        self.method, self.target, _ = start.split(" ")
        self.body, self.size, self.digest = b"", 0, None
        self.over, self.kept = threading.Event(), True

    def read_body(self):
        """Read the body: as a whole where it is small, as size and SHA-256 always."""
        digest = hashlib.sha256()
        for piece in self.reader.body(self.fields):
            digest.update(piece)
            self.size += len(piece)
            self.body = self.body + piece if self.size < 100000 else b""
        self.digest = digest.hexdigest()

    def get(self, name):
        found = [value for key, value in self.fields if key == name]
        return ", ".join(found) if found else None

    def json(self):
        return json.loads(self.body.decode())

    def send(self, data):
        self.sock.sendall(data)

    def finish(self):
        """The answer is complete; the connection waits for its next request."""
        self.over.set()

    def close(self):
        self.kept = False
        self.sock.shutdown(socket.SHUT_RDWR)
        self.over.set()

    def reset(self):
        self.kept = False
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()
        self.over.set()

    def wait_for_hang_up(self):
        """Fails unless the proxy closes this connection."""
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionError:
            pass


class Stub:
    """The endpoint, played by a test: it counts connections, keeps requests, and answers whatever it is told.

    `answer` is called with each Asked, in the thread of its connection. Where it is None, the test takes the
    Asked from `next()` and answers in its own time, byte by byte if it likes. `reads`: whether bodies are
    read before that."""

    def __init__(self, answer=None, reads=True, port=0, tls=None):
        """`tls` is the SSLContext of one that speaks HTTPS."""
        self.answer, self.reads, self.tls = answer, reads, tls
        self.requests, self.connections, self.waiting = [], 0, queue.Queue()
        self.listener = socket.create_server(("127.0.0.1", port), backlog=512)
        self.port = self.listener.getsockname()[1]
        self.sockets, self.threads = [], []
        self.thread = threading.Thread(target=self.accept, daemon=True)
        self.thread.start()

    def accept(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            sock.settimeout(PATIENCE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sockets.append(sock)
            self.threads.append(threading.Thread(target=self.converse, args=(sock,), daemon=True))
            self.threads[-1].start()

    def converse(self, sock):
        asked = None
        try:
            if self.tls:
                sock = self.tls.wrap_socket(sock, server_side=True)
                self.sockets.append(sock)
            reader = Reader(sock)
            while asked is None or asked.kept:
                asked = Asked(sock, reader)
                if self.reads:
                    asked.read_body()
                self.requests.append(asked)
                if self.answer:
                    self.answer(asked)
                else:
                    self.waiting.put(asked)
                    asked.over.wait(PATIENCE)
        except (Cut, OSError):
            pass
        finally:
            sock.close()

    def next(self):
        return self.waiting.get(timeout=PATIENCE)

    @property
    def calls(self):
        return len(self.requests)

    def refuse_connections(self):
        for act in (lambda: self.listener.shutdown(socket.SHUT_RDWR), self.listener.close):
            try:
                act()
            except OSError:
                pass
        self.thread.join(PATIENCE)

    def close(self):
        self.refuse_connections()
        for asked in self.requests:
            asked.over.set()
        for sock in self.sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self.threads:
            thread.join(PATIENCE)


def request(method="POST", path=CHAT, body=b"", *fields, key=None, host="proxy.test", version="1.1"):
    """A well-formed request. `fields` are whole lines, such as 'X-Name: value'."""
    rows = ["%s %s HTTP/%s" % (method, path, version), "Host: " + host, *fields]
    if key:
        rows.append("Authorization: Bearer " + key)
    if body or method == "POST":
        rows.append("Content-Length: %d" % len(body))
    return "\r\n".join(rows + ["", ""]).encode("latin-1") + body


def unsized(path, *fields, key=None):
    """The head of a POST whose framing is among `fields`; its body is up to the test."""
    return request("POST", path, b"", *fields, key=key).replace(b"Content-Length: 0\r\n", b"", 1)


def chat(**payload):
    """The body of a small chat call; its prompt has the 10 characters of 'user hello'."""
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}], **payload}).encode()


def call(key=None, *fields, **payload):
    return request("POST", CHAT, chat(**payload), *fields, key=key)


def answer(body=b'{"said": "hi"}', status="200 OK", *fields):
    """A well-formed answer, by Content-Length."""
    rows = ["HTTP/1.1 " + status, "Content-Length: %d" % len(body), *fields]
    if not any(row.startswith("Content-Type") for row in fields):
        rows.append("Content-Type: application/json")
    return "\r\n".join(rows + ["", ""]).encode("latin-1") + body


def says(*arguments):
    """A Stub's `answer` that always gives this answer."""
    return lambda asked: asked.send(answer(*arguments))


def sends(data, close=True):
    """A Stub's `answer` that sends these bytes."""
    def act(asked):
        asked.send(data)
        if close:
            asked.close()
    return act


def chunk(payload):
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def event(number):
    return b'data: {"choices": [{"delta": {"content": "word %d"}}]}\n\n' % number


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"
CHUNKED = "Transfer-Encoding: chunked"


KEY_AND_CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgpuAxXY8tGXRYFL4R
+XD/126UZcFxfCbfCxTFdJ1Ax0mhRANCAATB4HdxRMtG5+/v+QpKxHlPYQwQdI0V
E5cM9TrCeXNhh84yQaAUavWL8nhkVRa9YsP3hy80rswEogQNoIog0K9X
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBmjCCAUCgAwIBAgIUPIdc+Aiov/jyVfCPmwvXUCbvRYAwCgYIKoZIzj0EAwIw
GTEXMBUGA1UEAwwObGxtX3Byb3h5IHRlc3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEx
OTEyMDgwMDAwMDBaMBkxFzAVBgNVBAMMDmxsbV9wcm94eSB0ZXN0MFkwEwYHKoZI
zj0CAQYIKoZIzj0DAQcDQgAEweB3cUTLRufv7/kKSsR5T2EMEHSNFROXDPU6wnlz
YYfOMkGgFGr1i/J4ZFUWvWLD94cvNK7MBKIEDaCKINCvV6NkMGIwHQYDVR0OBBYE
FBbzb10wJVCj2SC4YDCJz4ud7gfkMB8GA1UdIwQYMBaAFBbzb10wJVCj2SC4YDCJ
z4ud7gfkMA8GA1UdEwEB/wQFMAMBAf8wDwYDVR0RBAgwBocEfwAAATAKBggqhkjO
PQQDAgNIADBFAiBOMZr9c++DKxE9b1EFAAEX8JVINnRNCupi5k5HJqesfAIhALi2
j8lkO7clW4WdI2z0UzPgGNYkqTefwSnR0kaik4qA
-----END CERTIFICATE-----
"""  # for 127.0.0.1, until 2119; of no use elsewhere


def pem_file(case, text=KEY_AND_CERTIFICATE):
    """A file of its own for a test; -> its path."""
    folder = tempfile.TemporaryDirectory()
    case.addCleanup(folder.cleanup)
    path = os.path.join(folder.name, "file.pem")
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
    return path


@contextlib.contextmanager
def no_threads():
    """The proxy can start none; what stands in for callers and the upstream can. -> a list of the attempts."""
    attempts = []

    def fail(*_):
        attempts.append(1)
        raise RuntimeError("can't start new thread")
    unable = type("Unable", (threading.Thread,), {"start": fail})
    theirs = types.SimpleNamespace(**{**vars(threading), "Thread": unable})
    with mock.patch.object(llm_proxy, "threading", theirs), (
            mock.patch.object(llm_proxy, "_thread", types.SimpleNamespace(start_new_thread=fail))):
        yield attempts


class ProxyCase(unittest.TestCase):
    """`start` runs a proxy of this test's own, between a Stub and Clients; all is gone when the test ends."""

    @classmethod
    def setUpClass(cls):
        pause = mock.patch.object(llm_proxy.Log, "PAUSE", 0.002)  # most tests wait for a line of the log
        pause.start()
        cls.addClassCleanup(pause.stop)

    def start(self, answer=says(), clock=time, base="", reads=True, **settings):
        """`settings` are llm_proxy's; buckets are large, and the log is JSON, unless they say otherwise."""
        self.stub = stub = Stub(answer, reads)
        self.addCleanup(stub.close)
        settings = {"BASE_API_URL": "http://127.0.0.1:%d%s" % (stub.port, base), "LOG_FORMAT": "json",
                    "MAX_TOKENS": 1000, "DATABASE": "off", **settings}
        config = read_config({name: str(value) for name, value in settings.items()})
        self.lines, self.tracebacks = Lines(), 0
        database = None if config.database == "off" else llm_proxy.Database(config.database)
        self.proxy = proxy = build(config, self.lines, clock, database)
        self.server = server = llm_proxy.Server(proxy, "127.0.0.1", 0, config.max_connections)
        self.address = server.server_address[:2]
        accepting = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        accepting.start()
        self.addCleanup(self.stop, proxy, server, accepting, self.lines)

    def stop(self, proxy, server, accepting, lines):
        server.drain(0)
        accepting.join(PATIENCE)
        wait_for(lambda: not server.open and not proxy.relay.flows, "the end of every connection")
        proxy.routes.close_stale(everything=True)
        relay = proxy.relay  # it is made to run as long as the process does; here it must not
        relay.post(sys.exit)
        relay.thread.join(PATIENCE)
        for part in filter(None, (relay.selector, relay.hangups, relay.bell, relay.ear)):
            part.close()
        proxy.books.close(PATIENCE)
        self.assertEqual(lines.data.count(b"Traceback"), self.tracebacks, lines.text())

    def connect(self, **options):
        client = Client(self.address, **options)
        self.addCleanup(client.reset)
        return client

    def ask(self, data, method=None):
        """Send one request on a connection of its own; -> the Answered."""
        client = self.connect()
        answered = client.send(data).read(method or data.split(b" ", 1)[0].decode("latin-1"))
        client.close()
        return answered

    def send_apart(self, client, *pieces):
        """Send each piece when the proxy has read the one before it."""
        theirs = wait_for(lambda: [sock for sock in list(self.server.open) if self.are_peers(sock, client.sock)])[0]
        for piece in pieces:
            client.send(piece)
            wait_for(lambda: self.nothing_unread(client.sock, theirs), "the reading of %r" % piece)

    @staticmethod
    def are_peers(one, other):
        with contextlib.suppress(OSError):  # closed
            return one.getpeername() == other.getsockname()

    @staticmethod
    def nothing_unread(sender, receiver):
        """Whether all that was sent has arrived and was read, or can no longer be."""
        try:
            left = [fcntl.ioctl(*asked, bytes(4)) for asked in ((sender, termios.TIOCOUTQ),
                                                                (receiver, termios.FIONREAD))]
        except (OSError, ValueError):  # closed
            return True
        return left == [bytes(4)] * 2

    def entry(self, number=0):
        """What the log says of the call with this number. Calls on different connections may be logged in any
        order; a test to which it matters waits for each."""
        return wait_for(lambda: self.lines.entries()[number:number + 1], "an access line")[0]

    def left(self, key=None):
        """What is left in a caller's bucket, as /health tells it."""
        return self.ask(request("GET", "/health", key=key)).json()["quota"]["remaining"]

    def assert_ending(self, outcome, left, number=0, key=None):
        """How the call with this number ended, in the log and in the bucket. The log comes last."""
        self.assertEqual((self.entry(number)["outcome"], self.left(key)), (outcome, left))


class ManyCase(ProxyCase):
    """A proxy with several upstreams, each a Stub of its own."""

    def stub_of(self, name, answer=None, **options):
        stub = Stub(answer or says(b'{"from": "%s"}' % name.encode()), **options)
        self.addCleanup(stub.close)
        return stub

    def silent_stub(self, name):
        """The test answers for it, in its own time."""
        stub = self.stub_of(name)
        stub.answer = None
        return stub

    def start_many(self, stubs, answer=None, base=True, clock=time, **settings):
        """`stubs`: {name: Stub}, each an upstream by that name."""
        urls = {"UPSTREAM_%s_URL" % name.upper(): "http://127.0.0.1:%d/v1" % stub.port for name, stub in stubs.items()}
        self.start(answer or says(b'{"from": "base"}'), clock, **{
            **urls, **settings, **({} if base else {"BASE_API_URL": ""})})

    def came_from(self, data):
        return self.ask(data).json()["from"]

    def states(self):
        return self.ask(request("GET", "/health")).json()["upstreams"]


# ------------------------------------------------------------------------------------------------------------
# The file itself
# ------------------------------------------------------------------------------------------------------------

def source():
    with open(FILE, encoding="utf-8") as file:
        return file.read()


def banners(text):
    """-> [(line number, section)]"""
    found = re.finditer(r"^# -{20,}\n# (\w+): ", text, re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


class FileTest(unittest.TestCase):
    def test_the_table_of_contents_names_every_section_in_order(self):
        text = source()
        contents = ast.get_docstring(ast.parse(text)).partition("Contents")[2]
        listed = re.findall(r"^ {4}(\w+) {2,}\S", contents, re.MULTILINE)
        self.assertGreater(len(listed), 10)
        self.assertEqual(listed, [name for _, name in banners(text)])

    def test_a_section_uses_only_what_stands_above_it(self):
        """Names come from the compiled code of each statement: locals and string annotations don't count."""
        text = source()
        starts = banners(text)
        statements = [(sum(line <= statement.lineno for line, _ in starts), statement)
                      for statement in ast.parse(text).body]
        homes = {}
        for section, statement in statements:
            for name in self.defined(statement):
                homes.setdefault(name, section)
        for section, statement in statements:
            module = ast.Module([statement], [])
            for name in self.globals_in(compile(module, FILE, "exec", dont_inherit=True)):
                with self.subTest(section=starts[section - 1][1] if section else "front", name=name):
                    self.assertLessEqual(homes.get(name, 0), section, "it is defined further down")

    @staticmethod
    def defined(statement):
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            return [statement.name]
        return [node.id for node in ast.walk(statement)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]

    def globals_in(self, code):
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
                yield instruction.argval
        for constant in code.co_consts:
            if hasattr(constant, "co_code"):
                yield from self.globals_in(constant)

    @unittest.skipUnless(hasattr(sys, "stdlib_module_names"), "only Python 3.10+ knows its modules")
    def test_nothing_is_imported_but_the_standard_library(self):
        for file in (FILE, __file__):
            with open(file, encoding="utf-8") as opened:
                tree = ast.parse(opened.read())
            for node in ast.walk(tree):
                names = [name.name for name in node.names] if isinstance(node, ast.Import) else \
                    [node.module] if isinstance(node, ast.ImportFrom) else []
                for name in names:
                    with self.subTest(file=os.path.basename(file), module=name):
                        self.assertIn(name.partition(".")[0], sys.stdlib_module_names | {"llm_proxy"})

    def test_no_module_state_is_changed_by_a_global_statement(self):
        found = [node.lineno for node in ast.walk(ast.parse(source())) if isinstance(node, ast.Global)]
        self.assertEqual(found, [])

    def test_no_function_is_longer_than_60_lines(self):
        for node in ast.walk(ast.parse(source())):
            if isinstance(node, ast.FunctionDef):
                with self.subTest(function=node.name):
                    self.assertLessEqual(node.end_lineno - node.lineno + 1, 60)


# ------------------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------------------

class ConfigTest(unittest.TestCase):
    HERE = {"BASE_API_URL": "http://127.0.0.1:8000/v1"}

    def faults(self, dotenv="", **environ):
        with self.assertRaises(ConfigFaults) as caught:
            read_config(environ, dotenv)
        return str(caught.exception).splitlines()

    def test_all_faults_are_told_at_once_with_the_value_and_what_would_be_right(self):
        self.assertEqual(self.faults(PORT="99999", MAX_TOKENS="+5", LOG_FORMAT="xml", READ_TIMEOUT="soon",
                                     **self.HERE), [
            "READ_TIMEOUT must be a number of seconds between 0.1 and 86400 (got 'soon')",
            "PORT must be between 1 and 65535 (got '99999')",
            "MAX_TOKENS must be between 1 and 1000000000000 (got '+5')",
            "LOG_FORMAT must be text or json (got 'xml')"])

    def test_values_that_int_or_a_url_parser_would_take_are_faults(self):
        table = {
            "PORT": ("0", "65536", "-1", "8_8", "0x10", "²", "8899.0", "1e3"),
            "MAX_TOKENS": ("0", "1_0", "٣", "10000000000000"),
            "READ_TIMEOUT": ("0", "-1", "inf", "nan", "1e3"),
            "TOKEN_COST_MODE": ("REQUEST", "tokens"),
            "BASE_API_KEY": ("two words", "schlüssel"),
            "CORS_ORIGINS": ("chat.example.org", "*,https://a.example", ","),
            "LIMIT_MESSAGE": ("two\nlines",),
            "CPU_AFFINITY": ("none", "-1"),
            "PROXY_API_KEYS": ("a,,b", "alice=", "a b", "same,same", "x=same,y=same", "c2VjcmV0==", "sk/1=x"),
            "MODEL_ALIASES": ("fast", "=m", "fast=", "a=b,a=c", "a=b,,", "a=b,b=c"), "UPSTREAM_TLS_VERIFY": ("no",),
            "UPSTREAM_CA_FILE": ("/nowhere.pem", FILE), "UPSTREAM_ORDER": ("openai",),
            "UPSTREAM_X_URL": ("host", "http://a,http://a"), "UPSTREAM_OPENAI_MODELS": (",", "two words"),
            "UPSTREAM_OPENAI_DIALECT": ("OpenAI",), "UPSTREAM_OPENAI_MAX_CONCURRENCY": ("-1",),
            "MAX_CONCURRENCY": ("-1", "many"), "QUEUE_SECONDS": ("0",), "EARLY_STREAM_SECONDS": ("-1",),
            "KEY_WEIGHTS": ("alice", "alice=0", "alice=1.5", "alice=1,alice=2", "=3", "alice=1000"),
            "MAX_CONNECTIONS_PER_ADDRESS": ("0",), "TRUSTED_PROXIES": ("nginx", "10.0.0.0/33", "10.0.0.1/8", ","),
            "CALLER_HEADER": ("X User", "Authorization", "Content-Length", "X-Forwarded-For", "X:", "content-encoding", "TE",
                              "X-LLM-Proxy-Timeout-Ms", "User-Agent", "x-request-id", "Proxy-Authorization"),
            "TLS_CERT_FILE": ("/nowhere.pem", "/"), "TLS_KEY_FILE": ("/nowhere.pem",),
            "UPSTREAM_OPENAI_HEADERS": ("X", "X Y: z", "Host: x", "content-length: 1", "X: a|", "X: \u20ac"),
            "BASE_API_URL": ("http://a,http://a", "http://a,", "localhost:8000", "ftp://host", "http://", "http://user:pw@host",
                             "http://host?a=b", "http://host#x", "http://host:0", "http://host:65536",
                             "http://host:", "http://ho st", "http://host/a b", "http://host\r\nX: y"),
        }
        for name, values in table.items():
            for value in values:
                with self.subTest(name=name, value=value):
                    faults = self.faults(**{**self.HERE, name: value})
                    self.assertEqual([fault.split(" ")[0] for fault in faults], [name])

    def test_a_key_that_is_given_instead_of_its_file_is_not_shown(self):
        for name in ("TLS_KEY_FILE", "TLS_CERT_FILE"):
            faults = self.faults(**self.HERE, **{name: KEY_AND_CERTIFICATE})
            self.assertNotIn("BEGIN", "".join(faults))
            self.assertTrue(faults[0].startswith(name + " must be a PEM file"))

    def test_a_host_may_stand_in_brackets(self):
        self.assertEqual(read_config({**self.HERE, "HOST": "[::1]"}).host, "::1")

    def test_a_certificate_and_a_key_must_be_a_pair(self):
        both = pem_file(self)
        certificate = pem_file(self, KEY_AND_CERTIFICATE[KEY_AND_CERTIFICATE.index("-----BEGIN CERT"):])
        for settings in ({"TLS_CERT_FILE": both}, {"TLS_CERT_FILE": certificate, "TLS_KEY_FILE": both}):
            read_config({**self.HERE, **settings})
        for settings, fault in (({"TLS_CERT_FILE": certificate}, "TLS_CERT_FILE and TLS_KEY_FILE must be"),
                                ({"TLS_KEY_FILE": both}, "TLS_KEY_FILE needs TLS_CERT_FILE")):
            with self.subTest(settings=list(settings)):
                self.assertTrue(self.faults(**self.HERE, **settings)[0].startswith(fault))

    def test_what_would_come_to_nothing_is_warned_of(self):
        config = read_config({**self.HERE, "KEY_WEIGHTS": "bob=2,alice=3", "PROXY_API_KEYS": "alice=sk-1",
                              "CALLER_HEADER": "X-User"})
        slow = read_config({**self.HERE, "MAX_CALL_SECONDS": "300", "PROXY_API_KEYS": "sk-1"})
        self.assertIn("MAX_CALL_SECONDS ends calls before FIRST_BYTE_TIMEOUT", slow.warnings()[0])
        slow.first_byte_timeout = 100
        self.assertEqual(slow.warnings(), [])
        self.assertEqual(config.warnings(), ["KEY_WEIGHTS speaks of 'bob', which no key in PROXY_API_KEYS is named",
                                             "CALLER_HEADER is believed from nobody: TRUSTED_PROXIES is unset"])

    def test_a_fault_in_a_secret_does_not_show_it(self):
        for name in ("BASE_API_KEY", "PROXY_API_KEYS", "HTTPS_PROXY", "UPSTREAM_OPENAI_KEY", "UPSTREAM_OPENAI_HEADERS",
                     "UPSTREAM_X_URL"):
            with self.subTest(name=name):
                value = "http://me:hush@x" if name.endswith("URL") else "hush hush,, hush"
                fault, = self.faults(**{**self.HERE, "BASE_API_URL": "https://x", name: value})
                self.assertNotIn("hush", fault)
                self.assertTrue(fault.startswith(name + " must "), fault)

    def test_an_empty_value_counts_as_unset(self):
        config = read_config({**self.HERE, "PORT": "", "BASE_MODEL": "  ", "PROXY_API_KEYS": ""})
        self.assertEqual((config.port, config.base_model, config.proxy_api_keys), (8899, None, None))

    def test_the_defaults_are_the_documented_ones(self):
        config = read_config(self.HERE)
        documented = dict(
            host="0.0.0.0", port=8899, max_tokens=10, refill_tokens=2, refill_interval_seconds=300,
            request_token_cost=1, token_cost_mode="request", response_token_reserve=256,
            limit_message="limit reached, wait {wait}", open_timeout=10, read_timeout=600,
            max_body_bytes=32 << 20, cors_origins=("*",), log_format="text", drain_seconds=30,
            max_connections=1024, base_api_key=None, base_model=None, proxy_api_keys=None)
        self.assertEqual({name: getattr(config, name) for name in documented}, documented)

    def test_the_environment_wins_over_dotenv(self):
        dotenv = "PORT=7000\nMAX_TOKENS=3\nBASE_API_URL=http://from.dotenv\n"
        config = read_config({"PORT": "8000", "MAX_TOKENS": ""}, dotenv)
        self.assertEqual((config.port, config.max_tokens, config.base_api_url[0].host), (8000, 3, "from.dotenv"))

    def test_dotenv_understands_export_quotes_and_comments(self):
        values, faults = llm_proxy.read_dotenv("\n".join([
            "# a comment", "", "A=1", "export B=2", "C = 'single # quoted'", 'D="double"  # comment', "E=",
            "F=x#y # z", "G=a=b"]))
        self.assertEqual(values, {"A": "1", "B": "2", "C": "single # quoted", "D": "double", "E": "",
                                  "F": "x#y", "G": "a=b"})
        self.assertEqual(faults, [])

    def test_a_bad_line_of_dotenv_is_told_by_its_number_only(self):
        fault, = self.faults("BASE_API_URL=http://host\n\nBASE_API_KEY sk-secret\n")
        self.assertEqual(fault, ".env line 3 is not NAME=value")

    def test_a_missing_endpoint_says_how_to_start(self):
        fault, = self.faults()
        self.assertIn("BASE_API_URL=http://", fault)
        self.assertIn("python llm_proxy.py", fault)
        self.assertIn("--demo", fault)

    def test_names_of_keys_are_split_off_at_the_first_equals_sign(self):
        table = {
            "sk-1": {"sk-1": None}, "alice=sk-1, sk-2": {"sk-1": "alice", "sk-2": None},
            "a=b=c": {"b=c": "a"}, "bob@x.org=c2VjcmV0==": {"c2VjcmV0==": "bob@x.org"}}
        for text, keys in table.items():
            with self.subTest(text=text):
                self.assertEqual(read_config({**self.HERE, "PROXY_API_KEYS": text}).proxy_api_keys, keys)

    def test_named_upstreams_are_those_of_which_something_is_said(self):
        self.assertEqual(read_config(self.HERE).upstreams, [])
        config = read_config({"UPSTREAM_GPU_BOX_URL": "http://127.0.0.1:1/v1,http://127.0.0.1:2/v1",
                              "UPSTREAM_GPU_BOX_MODELS": "gemma*, qwen3", "UPSTREAM_ANTHROPIC_KEY": "sk-1",
                              "UPSTREAM_GPU_BOX_HEADERS": "X-A: b | X-C: d", "UPSTREAM_EMPTY_KEY": ""})
        anthropic, box = config.upstreams
        self.assertEqual((box.name, [url.port for url in box.url], box.models, box.dialect, box.headers),
                         ("gpu_box", [1, 2], ("gemma*", "qwen3"), "openai", {"x-a": "X-A: b", "x-c": "X-C: d"}))
        self.assertEqual((anthropic.url[0].origin, anthropic.key, anthropic.dialect),
                         ("https://api.anthropic.com", "sk-1", "anthropic"))

    def test_upstreams_stand_in_the_order_of_upstream_order_then_of_dotenv_then_of_their_names(self):
        dotenv = "\n".join("UPSTREAM_%s_KEY=k" % name for name in ("OPENAI", "GROQ", "MISTRAL"))
        environ = {"UPSTREAM_OPENROUTER_KEY": "k", "UPSTREAM_GROK_KEY": "k", "UPSTREAM_ORDER": "mistral, grok"}
        self.assertEqual([one.name for one in read_config(environ, dotenv).upstreams],
                         ["mistral", "grok", "openai", "groq", "openrouter"])

    def test_an_upstream_that_cannot_be_is_a_fault_that_names_its_variable(self):
        table = {"UPSTREAM_BOX_KEY": "UPSTREAM_BOX_URL is not set", "UPSTREAM_V1_URL": "UPSTREAM_V1_URL must have",
                 "UPSTREAM_HEALTH_URL": "UPSTREAM_HEALTH_URL must have", "UPSTREAM__URL": "UPSTREAM__URL must have",
                 "UPSTREAM_THREADS_URL": "UPSTREAM_THREADS_URL must have"}  # its messages would look like a thread's
        for name, fault in table.items():
            with self.subTest(name=name):
                self.assertIn(fault, self.faults(**{**self.HERE, name: "http://127.0.0.1"})[0])
        for name in ("UPSTREAM_OPENAI_KEY", "BASE_API_KEY"):
            fault, = self.faults(**{**self.HERE, name: "passthrough", "PROXY_API_KEYS": "sk-1"})
            self.assertIn(name + " must not be passthrough", fault)

    def test_a_proxy_on_the_way_out_is_no_fault_where_nothing_goes_through_it(self):
        for value in ("socks5://host:1080", "http://", "http://host:0", "http://user:pw@"):
            with self.subTest(value=value):
                self.assertIsNone(read_config({**self.HERE, "HTTPS_PROXY": value}).https_proxy)
                for more in ({"BASE_API_URL": "https://x"}, {"UPSTREAM_GROQ_KEY": "k"}):
                    fault, = self.faults(**{**self.HERE, "https_proxy": value, **more})
                    self.assertTrue(fault.startswith("HTTPS_PROXY must be http://"), fault)
        self.assertEqual(read_config({"BASE_API_URL": "https://x", "HTTPS_PROXY": "proxy:3128"}).https_proxy,
                         ("proxy", 3128, {}))

    def test_certificates_that_are_not_checked_are_warned_of(self):
        warnings = read_config({**self.HERE, "PROXY_API_KEYS": "sk-1", "UPSTREAM_TLS_VERIFY": "off"}).warnings()
        self.assertEqual(len(warnings), 1)
        self.assertIn("UPSTREAM_TLS_VERIFY=off", warnings[0])

    def test_there_is_one_warning_where_callers_are_not_checked_and_none_where_they_are(self):
        warning, = read_config(self.HERE).warnings()
        self.assertIn("PROXY_API_KEYS", warning)
        self.assertEqual(read_config({**self.HERE, "PROXY_API_KEYS": "sk-1"}).warnings(), [])

    def test_a_reserve_that_no_bucket_can_hold_is_warned_of(self):
        keyed = {**self.HERE, "PROXY_API_KEYS": "sk-1", "TOKEN_COST_MODE": "estimate"}
        warning, = read_config(keyed).warnings()
        self.assertIn("RESPONSE_TOKEN_RESERVE 256", warning)
        self.assertIn("MAX_TOKENS 10", warning)
        self.assertEqual(read_config({**keyed, "MAX_TOKENS": "256"}).warnings(), [])

    def test_a_price_that_no_bucket_can_hold_is_warned_of(self):
        warning, = read_config({**self.HERE, "PROXY_API_KEYS": "sk-1", "REQUEST_TOKEN_COST": "11"}).warnings()
        self.assertIn("REQUEST_TOKEN_COST 11", warning)

    def test_a_name_in_dotenv_that_is_no_setting_is_warned_of(self):
        warning, = read_config({**self.HERE, "PROXY_API_KEYS": "sk-1"}, "MAX_TOKEN=3\nPORT=8000").warnings()
        self.assertIn("MAX_TOKEN ", warning)
        dotenv = "UPSTREAM_OPENAI_KEY=\nUPSTREAM_GROQ_KEY=k"
        warning, = read_config({**self.HERE, "PROXY_API_KEYS": "sk-1", "UPSTREAM_GROQ_KYE": "k"}, dotenv).warnings()
        self.assertIn("UPSTREAM_GROQ_KYE ", warning)

    def test_a_name_in_the_environment_that_looks_like_a_setting_is_warned_of(self):
        keyed = {**self.HERE, "PROXY_API_KEYS": "sk-1"}
        for name in ("MAX_TOKEN", "BREAKER_SECOND", "UPSTREAM_OPENAI_MODLES", "UPSTREAM_MY-BOX_URL"):
            with self.subTest(name=name):
                warning, = read_config({**keyed, name: "1"}).warnings()
                self.assertIn(name + " is not a setting", warning)
        for name in ("PATH", "HOSTNAME", "HTTP_PROXY", "http_proxy", "OLDPWD", "LOGNAME", "TOKENS", "DATABASE_URL"):
            self.assertEqual(read_config({**keyed, name: "1"}).warnings(), [])

    def test_a_rule_of_an_upstream_that_is_not_there_is_warned_of(self):
        keyed = {**self.HERE, "PROXY_API_KEYS": "sk-1", "UPSTREAM_OPENAI_KEY": "k"}
        warning, = read_config({**keyed, "LIMITS": "upstream:opnai 5 usd per day; upstream:o* 1 usd per day"}).warnings()
        self.assertIn("'upstream:opnai 5 usd per day' speaks of no upstream there is: base, openai", warning)

    def test_upstreams_that_only_a_prefix_leads_to_are_warned_of(self):
        warning, = read_config({"UPSTREAM_OPENAI_KEY": "k", "PROXY_API_KEYS": "sk-1"}).warnings()
        self.assertIn("/openai/v1", warning)

    def test_readme_names_every_setting_and_its_default(self):
        with open(os.path.join(FOLDER, "README.md"), encoding="utf-8") as file:
            rows = file.read().splitlines()
        for setting in ALL_SETTINGS + list(llm_proxy.UPSTREAM_SETTINGS):
            with self.subTest(name=setting.name):
                rows_of_it = [row for row in rows if re.search(r"\b%s\b" % setting.name, row)]
                found = any((setting.default or "") in row for row in rows_of_it)
                self.assertTrue(found, "no row names it together with its default %s" % setting.default)


# ------------------------------------------------------------------------------------------------------------
# Refusals
# ------------------------------------------------------------------------------------------------------------

class RulesTest(unittest.TestCase):
    def fault(self, text):
        with self.assertRaises(ConfigFaults) as caught:
            read_config({"BASE_API_URL": "http://h", "LIMITS": text})
        return str(caught.exception)

    def test_a_rule_is_a_bucket(self):
        table = [  # text, unit, capacity, seconds to gain one
            ("each 60 requests per minute", "requests", 60, 1), ("each 100000 tokens per day", "tokens", 100000, .864),
            ("all 200 requests per minute burst 50", "requests", 50, .3),
            ("address 7 input_tokens per 7d", "input_tokens", 7, 86400),
            ("model:gpt-4* 30 output_tokens per 30s", "output_tokens", 30, 1),
            ("key:alice 0.5 usd per hour burst 2", "usd", 2 * 10 ** 12, 3600 / (5 * 10 ** 11)),
            ("key:a*,model:gpt-4 1 requests per month", "requests", 1, 30 * 86400),
            ("each unlimited tokens per week", "tokens", None, None)]
        for text, unit, capacity, interval in table:
            with self.subTest(text):
                rule = llm_proxy.rule(text)
                self.assertEqual((rule.text, UNITS[rule.unit], rule.capacity), (text, unit, capacity))
                if capacity:
                    self.assertAlmostEqual(rule.interval / rule.refill / interval, 1)

    def test_rules_are_separated_by_semicolons_or_lines(self):
        found = llm_proxy.rules(" each  60 requests per minute;\n\nall 1 usd per day ; ")
        self.assertEqual([rule.text for rule in found], ["each 60 requests per minute", "all 1 usd per day"])

    def test_a_faulty_rule_is_named_with_the_word_that_is_wrong(self):
        table = [
            ("each 60 request per minute", "'request'"), ("every 1 requests per day", "'every'"),
            ("each x requests per day", "'x'"), ("each 0 requests per day", "'0'"),
            ("each 1.5 requests per day", "'1.5'"), ("each -1 requests per day", "'-1'"),
            ("each 1 requests a day", "'a'"), ("each 1 requests per fortnight", "'fortnight'"),
            ("each 1 requests per 0s", "'0s'"), ("each 1 requests per day burst", "the end"),
            ("each 1 requests per day burst many", "'many'"), ("each 1 requests per day now", "'now'"),
            ("each 1 requests per day burst 2 3", "'3'"), ("each 1 requests per day burst unlimited", "'unlimited'"),
            ("key: 1 requests per day", "'key:'"), ("each,key:a 1 requests per day", "'each,key:a'"),
            ("all,address 1 requests per day", "'all,address'"), ("each", "the end"),
            ("each 1 usd per day burst 0.0000001", "'0.0000001'")]
        for text, word in table:
            with self.subTest(text):
                told = self.fault("all 1 requests per day; " + text)
                self.assertTrue(told.startswith("LIMITS must be rules such as"), told)
                self.assertIn("in '%s' " % text, told)
                self.assertIn(word, told)

    def test_no_rule_at_all_and_the_same_rule_twice_are_faults(self):
        self.assertIn("at least one rule", self.fault(" ; "))
        self.assertIn("twice", self.fault("all 1 usd per day;all  1 usd per day"))


class NamesWithColonsTest(ProxyCase):
    def test_a_rule_for_a_name_with_a_colon_holds_for_all_of_it(self):
        self.start(LIMITS="model:llama3:8b 1 requests per hour", LIMIT_REPLY="error")
        statuses = [self.ask(call(model=model)).status for model in ("llama3:8b", "llama3", "llama3", "llama3:8b")]
        self.assertEqual(statuses, [200, 200, 200, 429])


class PriceFileTest(unittest.TestCase):
    def read(self, text):
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write(text)
            file.flush()
            return llm_proxy.price_file(file.name)

    def test_both_shapes_are_read_exactly(self):
        costs = '{"input": 0.15, "output": 0.6, "cache_read": 0.075, "cache_write": 0.1875}'
        for text in ('{"openai": {"id": "openai", "models": {"a": {"id": "a", "cost": %s}, "free": {}}}}' % costs,
                     '{"a": %s}' % costs):
            self.assertEqual(self.read(text), {"a": (150000, 600000, 75000, 187500)})
        self.assertEqual(self.read('{"b*": {"input": 3}}'), {"b*": (3000000, 0, 3000000, 3000000)})

    def test_of_a_model_that_many_sell_the_makers_price_counts(self):
        table = {"reseller": {"models": {"a": {"cost": {"input": 9, "output": 9}}, "b": {"cost": {"input": 0, "output": 0}}}},
                 "openai": {"models": {"a": {"cost": {"input": 2, "output": 8}}}},
                 "other": {"models": {"a": {"cost": {"input": 0, "output": 0}}, "b": {"cost": {"input": 1, "output": 1}}}}}
        found = self.read(json.dumps(table))
        self.assertEqual([found[name].input for name in "ab"], [2000000, 1000000])

    def test_what_is_no_file_of_prices_is_a_fault(self):
        for text in ("", "[]", "{", "3", '{"a": 1}', '{"a": {"input": "1"}}', '{"a": {"output": 1}}', '{"a": {"input": -1}}',
                     '{"a": {"input": NaN}}', '{"a": {"models": 3}}', '{"a": {"models": {"m": {"cost": 1}}}}', "[" * 100000):
            with self.subTest(text=text[:40]), self.assertRaisesRegex(ValueError, "^must be a JSON file of prices"):
                self.read(text)
        with self.assertRaisesRegex(ValueError, "^must be a file that can be read"):
            llm_proxy.price_file("/nonexistent/prices.json")


class RefusalsTest(unittest.TestCase):
    def test_every_refusal_has_a_status_and_one_of_the_documented_types(self):
        kinds = {"invalid_request_error", "authentication_error", "upstream_error", "timeout_error",
                 "rate_limit_error", "server_error"}
        todo, found = [llm_proxy.Refusal], 0
        while todo:
            refusal = todo.pop()
            todo.extend(refusal.__subclasses__())
            found += 1
            with self.subTest(refusal=refusal.__name__):
                self.assertIn(refusal.kind, kinds)
                self.assertTrue(400 <= refusal.status < 600)
        self.assertGreater(found, 10)


# ------------------------------------------------------------------------------------------------------------
# Callers
# ------------------------------------------------------------------------------------------------------------

class CallersTest(ProxyCase):
    def test_a_bearer_token_and_an_api_key_header_of_the_same_text_share_a_bucket(self):
        self.start(MAX_TOKENS=3)
        for fields in (["Authorization: Bearer k"], ["X-Api-Key: k"],
                       ["authorization: bearer k", "x-api-key: k"]):
            self.assertEqual(self.ask(call(None, *fields)).body, b'{"said": "hi"}')
        self.assertEqual(self.left("k"), 0)
        self.assertEqual(self.left("another"), 3)

    def test_two_different_credentials_are_refused(self):
        self.start()
        answered = self.ask(call(None, "Authorization: Bearer a", "X-Api-Key: b"))
        self.assertEqual((answered.status, answered.error()["type"]), (400, "invalid_request_error"))
        self.assertEqual(self.stub.calls, 0)
        self.assertEqual(self.entry()["outcome"], "refused")

    def test_without_a_credential_the_address_is_the_caller(self):
        self.start(MAX_TOKENS=5)
        self.ask(call())
        self.assertEqual((self.left(), self.left("k")), (4, 5))
        self.assertEqual(self.entry()["caller"], "127.0.0.1")

    def test_a_bearer_that_spells_an_address_is_not_that_address(self):
        self.start(MAX_TOKENS=5)
        self.ask(call("127.0.0.1"))
        self.assertEqual((self.left(), self.left("127.0.0.1")), (5, 4))

    def test_an_unknown_key_is_refused_on_every_path_but_health_and_preflights(self):
        self.start(PROXY_API_KEYS="alice=sk-1", BASE_MODEL="m")
        table = [("POST", CHAT), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("HEAD", "/v1/models"),
                 ("POST", "/v1/files"),
                 ("GET", "/"), ("DELETE", "/v1/files/1"), ("GET", "//health"), ("GET", "/health/"),
                 ("POST", "/health")]
        for (method, path), key in itertools.product(table,
                                                     (None, "sk-2", "sk-1x", "alice", "alice=sk-1",
                                                      "127.0.0.1")):
            with self.subTest(method=method, path=path, key=key):
                answered = self.ask(request(method, path, chat() if method == "POST" else b"", key=key))
                self.assertEqual((answered.status, answered.get("www-authenticate")), (401, "Bearer"))
                if method != "HEAD":
                    error = answered.error()
                    self.assertEqual((error["type"], error["code"]),
                                     ("authentication_error", "invalid_api_key"))
        for method, path, status in (("GET", "/health", 200), ("HEAD", "/health", 200),
                                     ("OPTIONS", CHAT, 204)):
            with self.subTest(method=method, path=path):
                self.assertEqual(self.ask(request(method, path)).status, status)
        self.assertEqual(self.stub.calls, 0)

    def test_a_known_key_is_let_in(self):
        self.start(PROXY_API_KEYS="alice=sk-1,sk-2")
        for key in ("sk-1", "sk-2"):
            self.assertEqual(self.ask(call(key)).status, 200)

    def test_a_key_outside_ascii_is_unknown_and_no_error(self):
        self.start(PROXY_API_KEYS="alice=sk-1")
        for field in ("Authorization: Bearer \xff\xe9", "X-Api-Key: \xff", "Authorization: B\xe4r sk-1",
                      "Authorization:", "X-Api-Key:"):
            with self.subTest(field=field):
                self.assertEqual(self.ask(call(None, field)).status, 401)

    def test_the_log_shows_a_name_or_a_digest_but_never_a_key(self):
        self.start(PROXY_API_KEYS="alice=sk-alice-secret,sk-nameless-secret")
        for number, key in enumerate(("sk-alice-secret", "sk-nameless-secret", "sk-wrong-secret")):
            self.ask(call(key))
            self.entry(number)
        callers = [entry["caller"] for entry in self.lines.entries()]
        self.assertEqual((callers[0], callers[2]), ("alice", "127.0.0.1"))
        self.assertRegex(callers[1], "^key:[0-9a-f]{8}$")
        self.assertNotIn("secret", self.lines.text())

    def test_two_proxies_show_the_same_key_under_different_digests(self):
        """So that a digest from a log cannot be looked up in a table."""
        labels = set()
        for _ in range(2):
            self.start()
            self.ask(call("k"))
            self.ask(call("k"))
            self.assertEqual(self.entry(0)["caller"], self.entry(1)["caller"])
            labels.add(self.entry()["caller"])
        self.assertEqual(len(labels), 2)


class TrustTest(ProxyCase):
    """Who is believed to speak for others. All tests come from 127.0.0.1."""

    def who(self, *fields, key=None):
        """-> (the caller, the address) that the log names."""
        number = len(self.lines.entries())
        self.ask(call(key, *fields))
        entry = self.entry(number)
        return entry["caller"], self.row["address"]

    def setUp(self):
        record = llm_proxy.Books.record

        def spy(books, entry):
            self.row = dict(zip([name for name, _ in llm_proxy.COLUMNS], entry.as_row()))
            record(books, entry)
        patch = mock.patch.object(llm_proxy.Books, "record", spy)
        patch.start()
        self.addCleanup(patch.stop)

    def test_from_anywhere_else_nobody_is_believed(self):
        for trusted in ("", "10.0.0.0/8,::1"):
            self.start(TRUSTED_PROXIES=trusted, CALLER_HEADER="X-User")
            for name in ("X-Forwarded-For", "Forwarded", "X-Real-IP", "True-Client-IP", "X-User"):
                self.assertEqual(self.who(name + ": 192.0.2.1"), ("127.0.0.1", "127.0.0.1"))
                self.assertIsNone(self.stub.requests[-1].get(name.lower()))

    def test_a_trusted_proxy_names_the_last_address_that_is_none(self):
        table = [("192.0.2.1", "192.0.2.1"), ("203.0.113.9, 192.0.2.1", "192.0.2.1"), ("192.0.2.1, 10.1.2.3", "192.0.2.1"),
                 ("evil, 192.0.2.1, 10.1.2.3, 10.9.9.9", "192.0.2.1"), ("192.0.2.1, evil", "127.0.0.1"),
                 ("evil, 10.1.2.3", "10.1.2.3"), ("10.1.2.3", "10.1.2.3"), ("", "127.0.0.1"), (",", "127.0.0.1"),
                 ("192.0.2.1:4711", "192.0.2.1"), ("[2001:db8:1:2::3]:443", "2001:db8:1:2::/64"),
                 ("2001:db8:1:2::4", "2001:db8:1:2::/64"), ("::ffff:192.0.2.7", "192.0.2.7"),
                 (", ".join(["192.0.2.%d" % number for number in range(200)]), "192.0.2.199")]
        self.start(TRUSTED_PROXIES="10.0.0.0/8, 127.0.0.1")
        for text, address in table:
            with self.subTest(text=text):
                self.assertEqual(self.who("X-Forwarded-For: " + text), (address, address))
        self.assertEqual(self.who("X-Forwarded-For: 192.0.2.1", "X-Forwarded-For: 192.0.2.2")[1], "192.0.2.2")
        self.assertEqual(self.who("X-Real-IP: 192.0.2.1")[1], "127.0.0.1")

    def test_each_address_behind_it_has_a_bucket_of_its_own(self):
        self.start(TRUSTED_PROXIES="127.0.0.1", LIMITS="address 1 requests per hour", LIMIT_REPLY="error")
        for text, status in (("192.0.2.1", 200), ("192.0.2.1", 429), ("192.0.2.2", 200), ("192.0.2.2, 192.0.2.1", 429)):
            self.assertEqual(self.ask(call("k", "X-Forwarded-For: " + text)).status, status)

    def test_one_shared_key_splits_into_the_people_behind_it(self):
        self.start(TRUSTED_PROXIES="127.0.0.1", CALLER_HEADER="X-OpenWebUI-User-Id", PROXY_API_KEYS="webui=sk-1,alice=sk-2",
                   LIMITS="key:alice 9 requests per hour; key:webui/vip 2 requests per hour; each 1 requests per hour",
                   LIMIT_REPLY="error")
        for key, person, caller, statuses in (
                ("sk-1", "u1", "webui/u1", (200, 429)), ("sk-1", "u2", "webui/u2", (200, 429)),
                ("sk-1", "alice", "webui/alice", (200, 429)), ("sk-1", "vip", "webui/vip", (200, 200, 429)),
                ("sk-1", "J\xf6rg von und zu", "webui/J%F6rg%20von%20und%20zu", (200, 429)), ("sk-1", None, "webui", (200, 429)),
                ("sk-2", "u1", "alice/u1", (200, 429)), ("sk-2", None, "alice", (200, 200))):
            fields = [] if person is None else ["X-OpenWebUI-User-Id: " + person]
            with self.subTest(caller=caller):
                for status in statuses:
                    number = len(self.lines.entries())
                    self.assertEqual(self.ask(call(key, *fields)).status, status)
                    self.assertEqual(self.entry(number)["caller"], caller)
        self.assertEqual(self.ask(call("wrong", "X-OpenWebUI-User-Id: u1")).status, 401)
        self.assertFalse([asked for asked in self.stub.requests if asked.get("x-openwebui-user-id")])

    def test_people_are_told_apart_whatever_their_names_and_wherever_they_are(self):
        self.start(TRUSTED_PROXIES="127.0.0.1", CALLER_HEADER="X-User", MAX_TOKENS=10)
        long = "x" * 70
        names = [self.who("X-User: " + name)[0] for name in (long + "1", long + "2", "zoe")]
        self.assertEqual((len(set(names)), names[2]), (3, "-/zoe"))
        self.assertEqual(self.who("X-User: zoe", "X-Forwarded-For: 192.0.2.9"), ("-/zoe", "192.0.2.9"))
        self.assertEqual(self.entry(3)["remaining"], 8)

    def test_a_mapped_address_may_be_trusted_too(self):
        for trusted in ("::ffff:127.0.0.1", "::ffff:127.0.0.0/104"):
            self.start(TRUSTED_PROXIES=trusted)
            self.assertEqual(self.who("X-Forwarded-For: 192.0.2.1, fe80::1%eth0")[1], "fe80::1")

    def test_people_behind_a_key_have_its_weight(self):
        self.start(None, MAX_CONCURRENCY=1, PROXY_API_KEYS="webui=a", KEY_WEIGHTS="webui=5", TRUSTED_PROXIES="127.0.0.1",
                   CALLER_HEADER="X-User")
        self.connect().send(call("a", "X-User: u"))
        self.stub.next()
        self.assertEqual([guest.weight for guest in self.proxy.routes.base.line.guests.values()], [5])

    def test_two_people_are_not_one_because_their_key_and_name_join_alike(self):
        callers = llm_proxy.Callers(None, b"", llm_proxy.networks("127.0.0.1"), "x-user")
        head = {"x-user": "b"}
        one, two = (callers.person(head, "127.0.0.1", llm_proxy.Caller(("key", key), None)).key for key in (b"a", b"ab"))
        self.assertNotEqual(one, two)

    def test_addresses_are_told_apart_as_their_owners_are(self):
        table = {"192.0.2.1": "192.0.2.1", "::ffff:192.0.2.1": "192.0.2.1", "::1": "::1", "2001:db8::1": "2001:db8::/64",
                 "2001:db8:0:0:ffff::1": "2001:db8::/64", "fe80::1%eth0": "fe80::1", "fd00:1:2:3:4::5": "fd00:1:2:3::/64"}
        for host, address in table.items():
            with self.subTest(host=host):
                self.assertEqual(llm_proxy.address_of(host), address)


# ------------------------------------------------------------------------------------------------------------
# Limits
# ------------------------------------------------------------------------------------------------------------

class ModelBucket:
    """The rule written down a second time, tick by tick and in fractions: what Buckets is compared with."""

    def __init__(self, capacity, refill, interval):
        self.capacity, self.refill, self.interval = capacity, refill, interval
        self.level, self.tick = capacity, None

    def advance(self, now):
        while self.tick is not None and self.tick <= now:
            self.level = min(self.capacity, self.level + self.refill)
            self.tick = None if self.level == self.capacity else self.tick + self.interval

    def add(self, now, amount):
        self.level = min(self.capacity, self.level + amount)
        if self.level == self.capacity:
            self.tick = None
        elif self.tick is None:
            self.tick = now + self.interval


def costs(amount):
    """The same in every unit."""
    return (amount,) * len(UNITS)


class LimitsTest(unittest.TestCase):
    def buckets(self, capacity=10, refill=2, interval=300, **options):
        self.clock = Clock()
        self.rule = llm_proxy.Rule("each N tokens", (("each", ""),), UNITS.index("tokens"), capacity, refill, interval,
                                   (refill, interval))
        return Buckets(self.clock, **options)

    def want(self, key, cost):
        return [llm_proxy.Take(self.rule, ("each N tokens", key), cost)]

    def take(self, buckets, key, cost):
        """-> (taken, seconds to wait, the bucket afterwards)"""
        short, tightest = buckets.take(self.want(key, cost))
        return not short, short[0][0] if short else 0, self.quota(tightest)

    @staticmethod
    def quota(tightest):
        return llm_proxy.quota_of(tightest[0].rule, *tightest[1:])

    def peek(self, buckets, key):
        return buckets.peek(self.want(key, 0))[0]

    def wait(self, buckets, key, cost):
        return buckets.peek(self.want(key, cost))[1]

    def test_a_bucket_starts_full_and_is_empty_after_its_capacity(self):
        buckets = self.buckets()
        self.assertEqual([self.take(buckets, "a", 1)[0] for _ in range(12)], [True] * 10 + [False] * 2)
        self.assertEqual(self.peek(buckets, "a")[:2], (10, 0))

    def test_it_gains_by_whole_intervals_from_the_moment_it_stopped_being_full(self):
        buckets = self.buckets()
        self.take(buckets, "a", 10)
        table = ((0, 0, 300), (299.875, 0, 1), (0.125, 2, 300), (299.5, 2, 1), (0.5, 4, 300), (900, 10, 0),
                 (9999, 10, 0))
        for seconds, remaining, reset in table:
            self.clock.now += seconds
            with self.subTest(now=self.clock.now):
                quota = self.peek(buckets, "a")
                self.assertEqual((quota.remaining, quota.reset_seconds), (remaining, reset))

    def test_any_schedule_gives_what_the_exact_model_gives(self):
        choose = random.Random(20)
        for capacity, refill, interval in ((10, 2, 300), (7, 3, 1), (100, 7, 60), (1, 1, 5), (5, 100, 10)):
            buckets, model = self.buckets(capacity, refill, interval), ModelBucket(capacity, refill, interval)
            self.clock.now = fractions.Fraction(1, 3)
            for step in range(500):
                self.clock.now += fractions.Fraction(choose.randrange(interval * 20),
                                                     choose.choice((7, 10, 40)))
                model.advance(self.clock.now)
                cost = choose.randint(1, capacity)
                taken, _, quota = self.take(buckets, "a", cost)
                self.assertEqual(taken, model.level >= cost, step)
                if taken:
                    model.add(self.clock.now, -cost)
                    if choose.random() < 0.3:
                        back = choose.randint(-3, cost)
                        quota = self.quota(buckets.settle(self.want("a", cost), costs(cost - back))[1])
                        model.add(self.clock.now, back)
                self.assertEqual(quota.remaining, max(0, model.level), step)

    def test_the_wait_that_is_told_is_enough_and_no_moment_less_is(self):
        for cost in (1, 2, 3, 10):
            buckets = self.buckets()
            self.take(buckets, "a", 9)
            self.clock.now += 130
            self.take(buckets, "a", 1)
            _, wait, _ = self.take(buckets, "a", cost)
            self.assertEqual(self.wait(buckets, "a", cost), wait)
            self.clock.now += wait - 0.5
            self.assertFalse(self.take(buckets, "a", cost)[0])
            self.clock.now += 0.5
            self.assertTrue(self.take(buckets, "a", cost)[0])

    def test_a_shortage_takes_nothing(self):
        buckets = self.buckets()
        self.take(buckets, "a", 8)
        self.assertFalse(self.take(buckets, "a", 3)[0])
        self.assertTrue(self.take(buckets, "a", 2)[0])

    def test_threads_at_a_bucket_with_room_for_some_get_exactly_so_many(self):
        buckets, taken, gate = self.buckets(capacity=50), [], threading.Barrier(200)

        def run():
            gate.wait(PATIENCE)
            taken.append(self.take(buckets, "a", 1)[0])
        threads = [threading.Thread(target=run) for _ in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual((len(taken), sum(taken)), (200, 50))

    def admit(self, cost, caller="a", message="limit reached, wait {wait}"):
        limits = Limits([self.rule], self.shared, message)
        return limits.admit(llm_proxy.Caller(("address", caller), caller), caller, "", costs(cost))

    def test_a_hold_ends_once(self):
        self.shared = buckets = self.buckets()
        hold = self.admit(5)
        hold.settle(costs(3))
        hold.settle(costs(1))
        hold.give_back()
        self.assertEqual(self.peek(buckets, ("address", "a")).remaining, 7)

    def test_a_hold_that_nobody_settled_is_given_back(self):
        self.shared = buckets = self.buckets()
        with self.assertRaises(ZeroDivisionError), self.admit(5):
            self.assertEqual(self.peek(buckets, ("address", "a")).remaining, 5)
            1 / 0
        self.assertEqual(self.peek(buckets, ("address", "a")).remaining, 10)

    def test_a_call_that_cost_more_than_it_held_leaves_a_debt_that_is_waited_for(self):
        self.shared = buckets = self.buckets()
        with self.admit(10) as hold:
            hold.settle(costs(13))
        self.assertEqual(self.peek(buckets, ("address", "a")).remaining, 0)
        self.assertEqual(self.wait(buckets, ("address", "a"), 1), 600)

    def test_giving_back_never_overfills(self):
        self.shared = buckets = self.buckets()
        with self.admit(5):
            self.clock.now += 3000
        self.assertEqual(self.peek(buckets, ("address", "a")).remaining, 10)

    def test_a_cost_above_the_capacity_is_told_as_such_and_never_as_a_wait(self):
        self.shared = self.buckets()
        with self.assertRaises(LimitReached) as caught:
            self.admit(11)
        self.assertRegex(str(caught.exception), "11.*10")
        self.assertNotIn("wait", str(caught.exception))
        self.assertIsNone(caught.exception.wait)
        self.assertNotIn("Retry-After", caught.exception.fields)

    def test_a_limit_tells_the_wait_in_the_words_of_the_operator(self):
        self.shared = self.buckets()
        self.admit(10)
        with self.assertRaises(LimitReached) as caught:
            self.admit(1, message="{wait}, {please}: 100%")
        self.assertEqual(str(caught.exception), "5 min, {please}: 100%")
        self.assertEqual(caught.exception.fields, {"Retry-After": 300})

    def test_waits_are_spelled_in_seconds_below_a_minute_and_in_minutes_rounded_up_above(self):
        for seconds, text in ((0.2, "1s"), (12, "12s"), (59, "59s"), (59.5, "1 min"), (61, "2 min"),
                              (300, "5 min"), (300.1, "6 min")):
            with self.subTest(seconds=seconds):
                self.assertEqual(llm_proxy.spell_wait(seconds), text)

    def test_a_hundred_thousand_keys_fit_into_a_bounded_table(self):
        buckets = self.buckets()
        for number in range(100000):
            self.take(buckets, number, 1)
        self.assertLessEqual(len(buckets.levels), 10000)
        self.assertEqual(self.peek(buckets, 99999).remaining, 9)

    def test_the_least_recently_used_bucket_goes_first(self):
        buckets = self.buckets(room=3)
        for key in "abcabda":
            self.take(buckets, key, 1)
        self.assertEqual([self.peek(buckets, key).remaining for key in "abcd"], [7, 8, 10, 9])

    def test_buckets_that_are_full_by_now_are_dropped(self):
        buckets = self.buckets()
        for number in range(100):
            self.take(buckets, number, 1)
        self.clock.now += 300
        for number in range(100, 160):
            self.take(buckets, number, 1)
        self.assertEqual({key for _, key in buckets.levels}, set(range(100, 160)))

    def test_looking_at_a_bucket_makes_none(self):
        buckets = self.buckets()
        self.assertEqual((self.peek(buckets, "a").remaining, self.wait(buckets, "a", 1)), (10, 0))
        self.assertEqual(len(buckets.levels), 0)


class RulesTogetherTest(unittest.TestCase):
    def limits(self, text, **options):
        self.clock = Clock()
        return Limits(llm_proxy.rules(text), Buckets(self.clock, **options), "{wait} {rule} {limit} {unit}")

    @staticmethod
    def caller(name="alice"):
        return llm_proxy.Caller(("key", b"digest of " + name.encode()), name)

    def levels(self, limits):
        return {key[0]: record[0] for key, record in limits.buckets.levels.items()}

    def test_the_first_rule_of_a_family_that_matches_counts(self):
        text = ("key:alice unlimited requests per minute; key:b* 5 requests per 60s; each 2 requests per minute;"
                "each 9 tokens per minute; each 100 requests per day; model:gpt-4* 3 requests per minute;"
                "model:* 4 requests per minute; all 7 requests per minute; key:alice,model:o* 1 requests per hour")
        table = [
            ("alice", "gpt-4o", {"each 9 tokens per minute", "each 100 requests per day",
                                 "model:gpt-4* 3 requests per minute", "all 7 requests per minute"}),
            ("bob", "GPT-4", {"key:b* 5 requests per 60s", "each 9 tokens per minute", "each 100 requests per day",
                              "model:gpt-4* 3 requests per minute", "all 7 requests per minute"}),
            ("carl", "", {"each 2 requests per minute", "each 9 tokens per minute", "each 100 requests per day",
                          "model:* 4 requests per minute", "all 7 requests per minute"}),
            ("alice", "o3", {"each 9 tokens per minute", "each 100 requests per day", "model:* 4 requests per minute",
                             "all 7 requests per minute", "key:alice,model:o* 1 requests per hour"})]
        limits = self.limits(text)
        for name, model, texts in table * 2:
            with self.subTest(name=name, model=model):
                found = limits.matching(self.caller(name), "10.0.0.1", model)
                self.assertEqual({rule.text for rule, _ in found}, texts)

    def test_an_address_is_no_key_whatever_it_spells(self):
        limits = self.limits("key:* 1 requests per day")
        self.assertEqual(limits.matching(llm_proxy.Caller(("address", "10.0.0.1"), "10.0.0.1"), "10.0.0.1", ""), [])

    def test_buckets_are_shared_by_those_whom_their_scope_names(self):
        limits = self.limits("each 9 requests per day; address 9 requests per day; all 9 requests per day;"
                             "model:a* 9 requests per day; each,address 9 requests per day")
        for name, address, model in (("a", "1", "ab"), ("b", "1", "ac"), ("a", "2", "b")):
            limits.admit(self.caller(name), address, model, costs(1))
        left = sorted((key[0].split(" ")[0], record[0]) for key, record in limits.buckets.levels.items())
        self.assertEqual(left, [("address", 7), ("address", 8), ("all", 6), ("each", 7), ("each", 8),
                                ("each,address", 8), ("each,address", 8), ("each,address", 8), ("model:a*", 7)])

    def test_a_call_refused_by_one_rule_leaves_every_other_bucket_untouched(self):
        limits = self.limits("each 5 requests per day; all 2 requests per hour; each 100 tokens per day")
        for _ in range(2):
            limits.admit(self.caller(), "1", "", (1, 10) + costs(0)[2:])
        before = self.levels(limits)
        for _ in range(5):
            with self.assertRaises(LimitReached):
                limits.admit(self.caller(), "1", "", (1, 10) + costs(0)[2:])
        self.assertEqual(self.levels(limits), before)

    def test_the_longest_wait_is_told_with_its_rule(self):
        limits = self.limits("each 1 requests per minute; all 1 requests per hour; address 1 requests per second")
        limits.admit(self.caller(), "1", "", costs(1))
        with self.assertRaises(LimitReached) as caught:
            limits.admit(self.caller(), "1", "", costs(1))
        self.assertEqual(str(caught.exception), "60 min all 1 requests per hour 1 requests")
        self.assertEqual(caught.exception.fields, {"Retry-After": 3600})

    def test_two_hundred_threads_at_three_rules_are_let_in_exactly(self):
        limits, gate, held = self.limits("each 70 requests per day; all 50 requests per day; each 90 tokens per day"
                                         ), threading.Barrier(200), []

        def run():
            gate.wait(PATIENCE)
            try:
                held.append(limits.admit(self.caller(), "1", "", (1, 1) + costs(0)[2:]))
            except LimitReached:
                pass
        threads = [threading.Thread(target=run) for _ in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual(len(held), 50)
        self.assertEqual(set(self.levels(limits).values()), {20, 0, 40})
        for hold in held:
            hold.give_back()
        self.assertEqual(set(self.levels(limits).values()), {70, 50, 90})

    def test_a_cost_of_nothing_is_taken_from_an_empty_table(self):
        limits = self.limits("all 5 usd per day")
        for _ in range(3):
            with limits.admit(self.caller(), "1", "", (1,) + costs(0)[1:]) as hold:
                hold.settle((1,) + costs(0)[1:])

    def test_the_tightest_bucket_is_the_one_that_is_shown(self):
        limits = self.limits("each 100 requests per day; all 2.5 usd per day; each 50 tokens per day")
        hold = limits.admit(self.caller(), "1", "", (1, 5, 0, 0, 10 ** 11, 0))
        self.assertEqual(hold.quota, (50, 45, 50, 86400, 1728))
        hold.settle((1, 5, 0, 0, 2 * 10 ** 12, 0))
        self.assertEqual(hold.quota, ("2.5", "0.5", "2.5", 86400, 1))
        self.assertEqual(hold.charges(), "each 100 requests per day=1;all 2.5 usd per day=2000000000000;"
                                         "each 50 tokens per day=5")

    def test_no_wait_is_a_moment_too_short_or_too_long(self):
        choose = random.Random(3)
        for text in ("each 200 requests per minute", "each 7 requests per hour", "each 1000000 tokens per day",
                     "each 0.3 usd per day", "each 10 requests per second"):
            limits = self.limits(text)
            rule, = limits.rules
            for _ in range(200):
                self.clock.now += choose.random() * rule.interval * 3
                cost = choose.randint(1, rule.capacity)
                try:
                    limits.admit(self.caller(), "1", "", costs(cost))
                except LimitReached as refusal:
                    self.clock.now += refusal.wait - rule.interval / 2
                    with self.assertRaises(LimitReached):
                        limits.admit(self.caller(), "1", "", costs(cost))
                    self.clock.now += rule.interval / 2
                    limits.admit(self.caller(), "1", "", costs(cost))


class LimitsOverHttpTest(ProxyCase):
    def test_two_hundred_callers_at_a_bucket_of_fifty_make_fifty_calls(self):
        self.start(MAX_TOKENS=50)
        answers, gate = [], threading.Barrier(200)

        def run():
            client = Client(self.address)
            gate.wait(PATIENCE)
            answers.append(client.send(call("k")).read().body)
            client.close()
        threads = [threading.Thread(target=run) for _ in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual(self.stub.calls, 50)
        self.assertEqual((len(answers), sum(b"limit reached" in body for body in answers)), (200, 150))

    def test_a_refill_lets_the_next_calls_in(self):
        clock = Clock()
        self.start(clock=clock, MAX_TOKENS=2, REFILL_TOKENS=1, REFILL_INTERVAL_SECONDS=60)
        for seconds, calls in ((0, 1), (0, 2), (0, 2), (59, 2), (1, 3), (0, 3), (600, 4), (0, 5), (0, 5)):
            clock.now += seconds
            self.ask(call())
            self.assertEqual(self.stub.calls, calls)


# ------------------------------------------------------------------------------------------------------------
# Usage
# ------------------------------------------------------------------------------------------------------------

class UsageTest(ProxyCase):
    def test_the_length_of_a_payload_is_that_of_its_strings_joined_by_spaces_without_the_model(self):
        table = [
            ({}, 0), ({"model": "long-name"}, 0), ({"a": "abc"}, 3), ({"a": "abc", "b": "de"}, 6),
            ({"a": ""}, 0), ({"a": ["", ""]}, 1), ({"a": 1, "b": None, "c": True, "d": 1.5}, 0),
            ({"model": "x", "a": {"model": "abc"}}, 3),
            ({"messages": [{"role": "user", "content": "hello"}]}, 10), ({"a": ["x", ["y", {"z": "w"}]]}, 5),
            ({"a": "äöü€"}, 4)]
        for payload, length in table:
            with self.subTest(payload=payload):
                self.assertEqual(llm_proxy.text_length(payload, "model", llm_proxy.is_media), (length, 0))

    def test_images_and_the_like_count_a_fixed_number_and_never_their_length(self):
        data = "x" * 100000
        table = [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64," + data}},
            {"type": "input_image", "image_url": data}, {"type": "image", "source": {"type": "base64", "data": data}},
            {"inlineData": {"mimeType": "image/png", "data": data}}, {"inline_data": {"data": data}},
            {"type": "input_audio", "input_audio": {"data": data}}, {"type": "document", "source": {"data": data}}]
        self.start(MAX_TOKENS=100000, TOKEN_COST_MODE="estimate", IMAGE_TOKENS=500)
        for number, part in enumerate(table):
            with self.subTest(part=str(part)[:40]):
                messages = [{"role": "user", "content": [{"type": "text", "text": "12345"}, part]}]
                self.ask(call(str(number), messages=messages, max_tokens=1))  # 'user text 12345'
                self.assertEqual(100000 - self.left(str(number)), 500 + 4 + 1)

    def test_an_estimate_cannot_be_talked_down(self):
        self.start(MAX_TOKENS=100000, TOKEN_COST_MODE="estimate")
        table = [("/v1/completions", {"prompt": "x" * 40, "max_tokens": 4000, "max_completion_tokens": 0}, 4010),
                 ("/v1/responses", {"input": "x" * 40, "max_output_tokens": 4000, "max_tokens": 0}, 4010),
                 ("/v1/completions", {"prompt": list(range(2000)), "max_tokens": 1}, 2001),
                 ("/v1/completions", {"prompt": [[1, 2, 3]] * 10, "max_tokens": 1}, 31),
                 (CHAT, {"messages": [{"role": "user", "type": "file", "content": "x" * 39990}], "max_tokens": 1}, 10001)]
        for number, (path, body, cost) in enumerate(table):
            with self.subTest(path=path, body=str(body)[-60:]):
                self.ask(request("POST", path, json.dumps(body).encode(), key=str(number)))
                self.assertEqual(100000 - self.left(str(number)), cost)

    def test_a_fixed_price_is_the_same_for_every_call(self):
        self.start(REQUEST_TOKEN_COST=7)
        self.ask(call(messages="x" * 1000, max_tokens=5))
        self.assertEqual(self.left(), 993)

    def test_an_estimate_is_the_prompt_and_the_output_it_may_have(self):
        self.start(MAX_TOKENS=100000, TOKEN_COST_MODE="estimate")
        table = [  # 'user hello' has 10 characters, which are 3 tokens
            ({}, 259), ({"max_tokens": 7}, 10), ({"max_completion_tokens": 5, "max_tokens": 7}, 8),
            ({"max_tokens": 0}, 3), ({"max_completion_tokens": 0, "max_tokens": 7}, 3),
            ({"max_tokens": None}, 259), ({"max_completion_tokens": None, "max_tokens": 7}, 10),
            ({"messages": "x" * 8, "max_tokens": 1}, 3), ({"messages": "x" * 9, "max_tokens": 1}, 4),
            ({"messages": [], "max_tokens": 0}, 1)]
        for number, (payload, cost) in enumerate(table):
            with self.subTest(payload=payload):
                self.assertEqual(self.ask(call(str(number), **payload)).status, 200)
                self.assertEqual(100000 - self.left(str(number)), cost)

    def test_a_maximum_that_is_no_whole_number_is_refused(self):
        self.start(TOKEN_COST_MODE="estimate")
        values = (True, False, -1, "5", 1.5, 5.0, [], {}, "")
        for name, value in itertools.product(("max_tokens", "max_completion_tokens"), values):
            with self.subTest(name=name, value=value):
                answered = self.ask(call(**{name: value}))
                self.assertEqual((answered.status, answered.error()["type"]), (400, "invalid_request_error"))
                self.assertIn(name, answered.error()["message"])
        self.assertEqual((self.stub.calls, self.left()), (0, 1000))

    def test_a_maximum_beyond_every_bucket_is_told_as_such(self):
        self.start(TOKEN_COST_MODE="estimate")
        answered = self.ask(call(max_tokens=10 ** 30))
        said = answered.json()["choices"][0]["message"]["content"]
        self.assertIn("the limit is 1000", said)
        self.assertNotIn("wait", said)
        self.assertIsNone(answered.get("retry-after"))
        self.assertEqual((self.stub.calls, self.left()), (0, 1000))


class PricesTest(unittest.TestCase):
    def test_a_cost_is_exact_and_cached_tokens_have_their_own_price(self):
        prices = llm_proxy.Prices({"m": llm_proxy.price({"input": 3, "output": 15, "cache_read": 0.3 and 1, "cache_write": 4})})
        used = llm_proxy.Usage(input=1000, output=10, cached=300, cache_write=200, reasoning=5)
        self.assertEqual(prices.cost(used, "m"), ((500 * 3 + 10 * 15 + 300 * 1 + 200 * 4) * 10 ** 6, True))

    def test_a_thousandth_of_a_cent_is_not_lost(self):
        prices = llm_proxy.Prices(None)
        cost, _ = prices.cost(llm_proxy.Usage(1, 1), "gpt-4o-mini")
        self.assertEqual((cost, llm_proxy.spell_usd(cost * 3)), (750000, "0.00000225"))

    def test_dated_and_prefixed_names_are_the_same_model_and_others_are_unpriced(self):
        prices = llm_proxy.Prices(None)
        for name, same in (("gpt-4o-2024-08-06", "gpt-4o"), ("openai/gpt-4o", "gpt-4o"),
                           ("claude-sonnet-4-5-20250929", "claude-sonnet-4-5"),
                           ("anthropic/claude-sonnet-4:beta", "claude-sonnet-4"), ("claude-3-5-haiku-latest", "claude-3-5-haiku")):
            with self.subTest(name):
                self.assertIsNotNone(prices.find(name))
                self.assertEqual(prices.find(name), prices.find(same))
        for name in ("", "gemma4", "gpt-4o-audio-preview", "gpt-5-pro", "x" * 300):
            self.assertEqual(prices.cost(llm_proxy.Usage(10, 10), name), (0, False))

    def test_the_operators_prices_go_before_the_usual_ones_and_may_be_globs(self):
        own = {"gpt-*": llm_proxy.price({"input": 1, "output": 1}), "gpt-4o": llm_proxy.price({"input": 7, "output": 7})}
        prices = llm_proxy.Prices(own)
        self.assertEqual([prices.find(name).input for name in ("gpt-4o", "gpt-4o-mini")], [7000000, 1000000])

    def test_invented_models_do_not_fill_the_memory(self):
        prices = llm_proxy.Prices(None)
        for number in range(5000):
            prices.find("model-%d" % number)
        self.assertLessEqual(len(prices.known), llm_proxy.KNOWN_MODELS)


# ------------------------------------------------------------------------------------------------------------
# Dialects
# ------------------------------------------------------------------------------------------------------------

class JsonTest(ProxyCase):
    def test_plain_objects_are_read(self):
        for text in ('{}', ' {"a": [1, -2.5e3, true, null, "\\u00e4"]} ', '{"a": {"a": 1}, "b": {"a": 1}}',
                     '{"a": "[[[{{{"}'):
            with self.subTest(text=text):
                self.assertEqual(parse_json(text.encode()), json.loads(text))

    def test_what_json_loads_would_take_or_choke_on_is_refused(self):
        table = {
            "nothing": b"", "white space": b"  ", "an array": b"[]", "a string": b'"x"', "a number": b"1",
            "null": b"null", "NaN": b'{"a": NaN}', "Infinity": b'{"a": Infinity}',
            "-Infinity": b'{"a": -Infinity}', "1e999": b'{"a": 1e999}', "a key twice": b'{"a": 1, "a": 2}',
            "a key twice, deep": b'{"x": [{"a": 1, "\\u0061": 2}]}', "UTF-16": '{"a": 1}'.encode("utf-16"),
            "UTF-16 without a mark": '{"a": 1}'.encode("utf-16-le"),
            "a byte order mark": b'\xef\xbb\xbf{"a": 1}', "latin-1": b'{"a": "\xe4"}', "two values": b'{} {}',
            "a comma too many": b'{"a": 1,}', "a control character": b'{"a": "\n"}',
            "single quotes": b"{'a': 1}", "a comment": b'{} // x', "cut short": b'{"a": "x',
            "arrays 129 deep": b'{"a": ' + b"[" * 128 + b"]" * 128 + b"}",
            "arrays 100000 deep": b'{"a": ' + b"[" * 100000 + b"]" * 100000 + b"}",
            "objects 100000 deep": b'{"a":' * 100000 + b"1" + b"}" * 100000, "only opened": b"[" * 1000000,
            "deep behind a quote": b'{"a": "\\"", "b": ' + b"[" * 200 + b"]" * 200 + b"}"}
        for name, body in table.items():
            with self.subTest(name):
                with self.assertRaises(llm_proxy.BadRequest):
                    parse_json(body)

    def test_brackets_in_strings_do_not_make_a_body_deep(self):
        self.assertEqual(parse_json(b'{"a": "%s\\"["}' % (b"[" * 1000))["a"], "[" * 1000 + '"[')

    def test_an_integer_of_5000_digits_is_no_crash(self):
        """Newer Pythons refuse to read it, older ones read it; both are fine."""
        self.start(TOKEN_COST_MODE="estimate")
        for name in ("max_tokens", "seed"):
            answered = self.ask(request("POST", CHAT, b'{"%s": %s}' % (name.encode(), b"9" * 5000)))
            self.assertIn(answered.status, (200, 400))

    def test_a_bad_body_is_a_400_in_the_shape_of_openai_and_costs_nothing(self):
        self.start()
        for body in (b"", b"[]", b"{", b'{"a": ' + b"[" * 50000 + b"]" * 50000 + b"}", b'{"a": NaN}',
                     b"\xff"):
            with self.subTest(body=body[:20]):
                answered = self.ask(request("POST", CHAT, body))
                self.assertEqual((answered.status, answered.error()["type"]), (400, "invalid_request_error"))
        self.assertEqual((self.stub.calls, self.left()), (0, 1000))

    def test_a_key_in_another_case_is_refused_where_we_read_it(self):
        """An upstream in Go would take "MODEL" for "model", and we would have read another one."""
        self.start()
        for key in ("Model", "MAX_TOKENS", "Stream", "max_Completion_tokens", "\u017ftream"):
            with self.subTest(key=key):
                self.assertEqual(self.ask(call(**{key: 1})).status, 400)
        self.assertEqual(self.ask(call(Temperature=1)).status, 200)
        self.assertEqual(self.stub.calls, 1)

    def test_a_model_has_at_most_256_characters(self):
        self.start()
        self.assertEqual([self.ask(call(model="x" * size)).status for size in (256, 257)], [200, 400])

    def test_half_of_a_surrogate_pair_is_no_crash(self):
        self.start(MAX_TOKENS=1, LOG_FORMAT="text", BASE_MODEL="m")
        for _ in range(2):
            answered = self.ask(request("POST", CHAT,
                                        b'{"model": "\\ud800", "messages": [{"content": "\\udfff"}]}'))
            self.assertEqual(answered.status, 200)


class PathsTest(ProxyCase):
    SAME_ENDPOINT = [
        CHAT, CHAT + "?x=1", CHAT + "/", CHAT + "//", CHAT + "/?x", CHAT + "/.", CHAT + "/./",
        "//v1/chat/completions", "///v1/chat/completions", "/v1//chat/completions", "/v1/chat//completions",
        "/./v1/chat/completions", "/v1/./chat/./completions", "/v1/chat/%63ompletions",
        "/v1/%63hat/completions", "/%76%31/%63%68%61%74/completions", "/v1/chat/%2563ompletions",
        "/v1/chat/%252563ompletions", "/v1%2fchat%2fcompletions", "/v1%2Fchat/completions",
        "/v1/chat%252Fcompletions", "/%2fv1/chat/completions", CHAT + "%2f", CHAT + "%2F%2F", CHAT + "/%2e",
        CHAT + "/%2E/", "/v1/%2e/chat/completions", "/V1/CHAT/COMPLETIONS", "/v1/Chat/Completions",
        "/v1/chat/COMPLETION%53", CHAT + ";x", CHAT + ";x=1", CHAT + "/;x", CHAT + "%3bx=1",
        "/v1;a/chat;b/completions;c", "/v1\\chat\\completions", "/v1/chat%5ccompletions",
        "\\v1/chat/completions", CHAT + "\\", CHAT + "%5C", "/v1/x/../chat/completions",
        "/v1/chat/x/../completions", "/v1/x%3F/../chat/completions", "/v1/x%23/../../admin",
        "/v1/%2e%2e/v1/chat/completions", "/v1/.%2E/v1/chat/completions",
        "/v1/x/%252e%252e/chat/completions", "/v1/x/..;/chat/completions", "/v1/x/..\\chat/completions",
        CHAT + "/x/..", CHAT + "%00", CHAT + "%0a", CHAT + "%0d%0aX:%20y", CHAT + "%09", "/%00" + CHAT,
        "/chat/completions", "/chat//completions/", "/openai/v1/chat/completions",
        "/any/prefix/v1/chat/completions", "/v1/engines/davinci/completions", "/v1/completions",
        "/v1/completions/", "/v1//completions", "/v1/Completions", "/v1/%63ompletions", "/completions",
        "http://proxy.test" + CHAT, "HTTP://PROXY.test/v1//chat/completions",
        "https://proxy.test/v1/completions/", "http://other.test" + CHAT, "v1/chat/completions", "*",
        CHAT + "#x", CHAT + "%3f",
        CHAT + "%3Fx=1", CHAT + "%23x", CHAT + "%20", "/v1/chat%20/completions"]

    def test_no_spelling_of_a_metered_path_gets_past_an_empty_bucket(self):
        """Each is limited (200, as an assistant) or refused (400)."""
        self.start(MAX_TOKENS=1)
        self.ask(call())
        for path in self.SAME_ENDPOINT:
            with self.subTest(path=path):
                answered = self.ask(request("POST", path, chat(prompt="x")))
                self.assertEqual((answered.status in (200, 400), self.stub.calls), (True, 1))
                self.assertIn("limit reached" if answered.status == 200 else '"error"',
                              answered.body.decode())

    def test_a_spelled_out_path_goes_upstream_under_its_plain_name(self):
        self.start()
        for path, plain in (
                (CHAT + "?x=1", CHAT + "?x=1"), ("/v1//chat/./completions/", CHAT),
                ("/V1/Chat/%43ompletions", CHAT), ("/v1%2fcompletions;x", "/v1/completions"),
                ("/pre/v1/chat/completions", "/pre/v1/chat/completions"), ("http://proxy.test" + CHAT, CHAT),
                ("/chat/completions", "/chat/completions")):
            with self.subTest(path=path):
                self.assertEqual(self.ask(request("POST", path, chat())).status, 200)
                self.assertEqual(self.stub.requests[-1].target, plain)
        self.assertEqual(self.left(), 1000 - 7)

    def test_other_methods_and_paths_are_forwarded_as_they_are_and_unmetered(self):
        self.start(MAX_TOKENS=1)
        self.ask(call())
        for method, path in (
                ("GET", CHAT), ("DELETE", CHAT + "/x"), ("POST", "/v1/files"),
                ("POST", "/v1/chat/completions/x/cancel"), ("PUT", CHAT),
                ("PATCH", "/a/b?c=/v1/chat/completions"), ("POST", "/v1/files/a%20b?x=%2f"),
                ("POST", "/v1//audio/./x"), ("GET", "/"), ("POST", "/v1/xcompletions"), ("HEAD", "/v1/files"),
                ("GET", "/v1/models"), ("QUERY", "/v1/x"), ("GET", "/x?a=b?c")):
            with self.subTest(method=method, path=path):
                self.assertEqual(self.ask(request(method, path,
                                                  b"" if method in ("GET", "HEAD") else b"not json")).status,
                                                  200)
                asked = self.stub.requests[-1]
                self.assertEqual((asked.method, asked.target), (method, path))

    def test_the_method_cannot_be_overridden_further_on(self):
        self.start(MAX_TOKENS=1)
        self.ask(request("GET", CHAT, b"", "X-HTTP-Method-Override: POST"))
        self.assertIsNone(self.stub.requests[0].get("x-http-method-override"))
        self.assertEqual(self.ask(request("post", CHAT, chat())).status, 400)
        self.assertEqual(self.stub.calls, 1)


USAGE_TABLE = [  # dialect, what is told, (input, output, cached, cache_write, reasoning)
    ("openai", {"prompt_tokens": 12, "completion_tokens": 2, "total_tokens": 14}, (12, 2, 0, 0, 0)),
    ("openai", {"prompt_tokens": 12, "completion_tokens": 9, "total_tokens": 21,
                "prompt_tokens_details": {"cached_tokens": 8}, "completion_tokens_details": {"reasoning_tokens": 5}},
     (12, 9, 8, 0, 5)),
    ("openai", {"input_tokens": 12, "input_tokens_details": {"cached_tokens": 8}, "output_tokens": 9,
                "output_tokens_details": {"reasoning_tokens": 5}, "total_tokens": 21}, (12, 9, 8, 0, 5)),
    ("openai", {"prompt_tokens": 7, "total_tokens": 7}, (7, 0, 0, 0, 0)),
    ("openai", {"total_tokens": 7}, (7, 0, 0, 0, 0)),
    ("openai", {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 40}, (10, 30, 0, 0, 0)),
    ("openai", {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12, "prompt_cache_hit_tokens": 4,
                "prompt_tokens_details": None}, (10, 2, 4, 0, 0)),
    ("openai", {"prompt_tokens": -1, "completion_tokens": "2"}, None), ("openai", {"prompt_tokens": True}, None),
    ("openai", {"prompt_tokens": 1e300}, None), ("openai", {}, None),
    ("openai", {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12,
                "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 5}}, (10, 2, 4, 5, 0)),
    ("anthropic", {"input_tokens": 10, "output_tokens": 5}, (10, 5, 0, 0, 0)),
    ("anthropic", {"input_tokens": 1, "output_tokens": 5, "output_tokens_details": {"thinking_tokens": 3}}, (1, 5, 0, 0, 3)),
    ("anthropic", {"input_tokens": 10, "cache_read_input_tokens": 100, "cache_creation_input_tokens": 20,
                   "output_tokens": 5}, (130, 5, 100, 20, 0)),
    ("gemini", {"promptTokenCount": 10, "candidatesTokenCount": 5, "totalTokenCount": 15}, (10, 5, 0, 0, 0)),
    ("gemini", {"promptTokenCount": 10, "candidatesTokenCount": 5, "thoughtsTokenCount": 7,
                "cachedContentTokenCount": 4, "toolUsePromptTokenCount": 3, "totalTokenCount": 25}, (13, 12, 4, 0, 7)),
    ("gemini", {"candidatesTokenCount": 5}, None)]


def events(*payloads, end="\n\n"):
    return b"".join([b"data: " + (json.dumps(one) if one != "[DONE]" else one).encode() + end.encode()
                     for one in payloads])


def delta(text, **more):
    return {"id": "c", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], **more}


TOLD = {"prompt_tokens": 20, "completion_tokens": 4, "total_tokens": 24}
LAST_DELTA = {"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
USAGE_EVENT = {"id": "c", "choices": [], "usage": TOLD}
ANTHROPIC_EVENTS = [
    {"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 20, "cache_read_input_tokens": 5,
                                                               "output_tokens": 1}}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hello you"}},
    {"type": "message_delta", "delta": {"stop_reason": None}, "usage": {"output_tokens": 3}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 7}},
    {"type": "message_stop"}]
RESPONSE_EVENTS = [
    {"type": "response.created", "response": {"id": "r", "usage": None, "tools": [{"usage": {"input_tokens": 1}}]}},
    {"type": "response.output_text.delta", "delta": "hello you"},
    {"type": "response.output_text.done", "text": "hello you"},
    {"type": "response.completed", "response": {"id": "r", "output": [{"content": [{"text": "hello you"}]}],
                                                "usage": {"input_tokens": 25, "output_tokens": 7, "total_tokens": 32}}}]
GEMINI_EVENTS = [
    {"candidates": [{"content": {"parts": [{"text": "hello"}]}}],
     "usageMetadata": {"promptTokenCount": 25, "candidatesTokenCount": 1}},
    {"candidates": [{"content": {"parts": [{"text": " you"}]}, "finishReason": "STOP"}],
     "usageMetadata": {"promptTokenCount": 25, "candidatesTokenCount": 7}}]


class ListenerTest(unittest.TestCase):
    """What is heard of an answer, in whatever pieces it comes."""

    def listener(self, endpoint="chat", dialect=None, streamed=True, added=False, readable=True):
        call = llm_proxy.Call(dialect or llm_proxy.OpenAI(), endpoint, CHAT, "")
        call.added = added
        return llm_proxy.Listener(call, streamed, readable)

    def hear(self, listener, data, step=None):
        """-> what went on."""
        pieces = [data[at:at + step] for at in range(0, len(data), step)] if step else [data]
        return b"".join([listener.feed(piece) for piece in pieces]) + listener.rest()

    def test_usage_is_read_in_every_dialect(self):
        dialects = {one.name: one for one in (llm_proxy.OpenAI(), llm_proxy.Anthropic(), llm_proxy.Gemini())}
        for name, told, expected in USAGE_TABLE:
            with self.subTest(name=name, told=told):
                found = dialects[name].usage(told)
                self.assertEqual(found and found[:5], expected)

    def test_the_usage_of_a_stream_is_what_its_events_say_in_the_end(self):
        table = [
            ("chat", llm_proxy.OpenAI(), [delta("hello you"), LAST_DELTA, USAGE_EVENT, "[DONE]"], (20, 4), 9),
            ("chat", llm_proxy.OpenAI(), [delta("hello you", usage=None), {**LAST_DELTA, "usage": TOLD}, "[DONE]"], (20, 4), 9),
            ("responses", llm_proxy.OpenAI(), RESPONSE_EVENTS, (25, 7), 9),
            ("messages", llm_proxy.Anthropic(), ANTHROPIC_EVENTS, (25, 7), 9),
            ("generate", llm_proxy.Gemini(), GEMINI_EVENTS, (25, 7), 9)]
        for (endpoint, dialect, told, expected, spoken), end in itertools.product(table, ("\n\n", "\r\n\r\n")):
            data = b": ping" + end.encode() + events(*told, end=end)
            for step in (None, 1, 7, 64):
                with self.subTest(endpoint=endpoint, end=end, step=step, told=str(told)[:30]):
                    listener = self.listener(endpoint, dialect)
                    self.assertEqual(self.hear(listener, data, step), data)
                    used, final = listener.told(True)
                    self.assertEqual((used[:2], final, listener.spoken()), (expected, True, spoken))

    def test_a_stream_that_was_cut_tells_what_it_told_and_how_much_was_said(self):
        table = [("chat", llm_proxy.OpenAI(), [delta("hello"), delta(" you")], None),
                 ("messages", llm_proxy.Anthropic(), ANTHROPIC_EVENTS[:3], (25, 1)),
                 ("responses", llm_proxy.OpenAI(), RESPONSE_EVENTS[:2], None),
                 ("generate", llm_proxy.Gemini(), GEMINI_EVENTS[:1], (25, 1))]
        for endpoint, dialect, told, expected in table:
            with self.subTest(endpoint):
                listener = self.listener(endpoint, dialect)
                self.hear(listener, events(*told) + b'data: {"choi')
                used, final = listener.told(False)
                self.assertEqual((used and used[:2], final), (expected, False))
                self.assertEqual(listener.spoken(), 5 if endpoint == "generate" else 9)

    def test_the_usage_of_json_is_that_of_the_answer_and_no_other(self):
        planted = {"usage": {"prompt_tokens": 1, "completion_tokens": 0, "total_tokens": 1}}
        said = {"choices": [{"message": {"content": json.dumps(planted)}}]}
        table = [{**said, "usage": TOLD}, {"usage": TOLD, **said}, {**said, "usage": TOLD, "metadata": planted},
                 {"usage": TOLD, "tools": [planted]}, {**said, "usage": TOLD, "timings": {"n": 1}},
                 {"usage": TOLD, "data": [{"embedding": [0.5]}] * 200}]
        for told in table:
            for text in (json.dumps(told), json.dumps(told, indent=2) + "\n", json.dumps(told, separators=(",", ":"))):
                with self.subTest(text=text[:60]):
                    listener = self.listener(streamed=False)
                    self.hear(listener, text.encode(), 50)
                    self.assertEqual(listener.told(True), (llm_proxy.Usage(20, 4), True))

    def test_a_stream_of_gemini_as_a_json_array_is_heard(self):
        data = json.dumps(GEMINI_EVENTS).encode()
        listener = self.listener("generate", llm_proxy.Gemini(), streamed=False)
        self.assertEqual(self.hear(listener, data, 30), data)
        self.assertEqual(listener.told(True)[0][:2], (25, 7))
        self.assertEqual(listener.spoken(), 9)

    def test_large_answers_are_not_kept_and_tell_their_usage_all_the_same(self):
        big = b'{"data": ["%b"], "usage": %b}' % (b"x" * (3 << 20), json.dumps(TOLD).encode())
        listener = self.listener("other", streamed=False)
        self.hear(listener, big, 65536)
        self.assertLess(sum(map(len, listener.pieces)), 2 << 20)
        self.assertEqual(listener.told(True)[0][:2], (20, 4))
        long = events(*[delta("word ")] * 5000, USAGE_EVENT, "[DONE]")
        listener = self.listener()
        self.assertEqual(self.hear(listener, long, 1000), long)
        self.assertLess(sum(map(len, listener.pieces)), 1 << 17)
        self.assertEqual(listener.told(True)[0][:2], (20, 4))
        self.assertAlmostEqual(listener.spoken(), 25000, delta=100)

    def test_what_is_said_in_chunks_is_counted_as_a_parser_would(self):
        said = ["hello", "", "\n\t\"\\", "ä€\U0001f600", '"content": "x"', "\x7f", "a" * 1000]
        chunks = [delta(text) for text in said] + [
            {"choices": [{"text": "more", "delta": {"content": None, "role": "assistant"}}]},
            {"choices": [{"delta": {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": "b"}'}}],
                                    "reasoning_content": "why"}}]}]
        dialect = llm_proxy.OpenAI()
        for ascii_only in (True, False):
            data = b"".join([b"data: " + json.dumps(one, ensure_ascii=ascii_only).encode() + b"\n\n" for one in chunks])
            self.assertEqual(llm_proxy.spoken_in_chunks(data), sum(map(dialect.spoken, chunks)))

    def test_a_line_longer_than_what_is_kept_tells_its_usage(self):
        for size in (100000, 3 << 20):
            with self.subTest(size=size):
                told = {"type": "response.completed", "response": {"instructions": "x" * size, "usage": TOLD}}
                listener = self.listener("responses")
                self.hear(listener, events(delta("hello"), told), 16384)
                self.assertEqual(listener.told(True)[0][:2], (20, 4))
                self.assertLess(sum(map(len, listener.pieces)), 5 << 20)

    def test_pictures_in_an_answer_are_not_counted_as_text(self):
        picture = {"candidates": [{"content": {"parts": [{"inlineData": {"data": "x" * (3 << 20)}}]}, "finishReason": "STOP"}],
                   "usageMetadata": {"promptTokenCount": 20, "candidatesTokenCount": 4}}
        for told, streamed in ((json.dumps(picture).encode(), False), (events(picture), True)):
            listener = self.listener("generate", llm_proxy.Gemini(), streamed)
            self.hear(listener, told, 65536)
            self.assertEqual((listener.told(True), listener.spoken()), ((llm_proxy.Usage(20, 4), True), 0))

    def test_an_answer_nested_too_deeply_for_a_parser_is_no_crash(self):
        for data in (b'{"usage": ' + b"[" * 100000 + b"]" * 100000 + b"}", b"[" * 100000, b'{"usage": {"a": ' + b"[" * 100000,
                     b'{"a": ' + b"[" * 100000 + b"]" * 100000 + b', "usage": {"prompt_tokens": 1}, "x": 1}'):
            for streamed in (True, False):
                listener = self.listener(streamed=streamed, added=streamed)
                self.hear(listener, b"data: " + data + b"\n\n" if streamed else data)
                listener.told(True)
                listener.spoken()

    def test_what_json_tells_that_was_cut_is_not_believed(self):
        listener = self.listener("responses", streamed=False)
        self.hear(listener, b'{"tools": [{"usage": {"input_tokens": 0, "output_tokens": 0}}], "usa')
        self.assertEqual(listener.told(False), (None, False))

    def test_only_the_event_that_was_not_asked_for_is_kept_from_the_caller(self):
        azure = {"choices": [], "prompt_filter_results": []}
        kept = [azure, delta("a", usage=None), delta('"choices":[]'), LAST_DELTA]
        for end in ("\n\n", "\r\n\r\n"):
            data = events(*kept, USAGE_EVENT, "[DONE]", end=end)
            shown = events(*kept, "[DONE]", end=end)
            for step in (None, *range(1, 40), 200):
                with self.subTest(end=end, step=step):
                    listener = self.listener(added=True)
                    self.assertEqual(self.hear(listener, data, step), shown)
                    self.assertEqual(listener.told(True), (llm_proxy.Usage(20, 4), True))

    def test_an_event_that_is_whole_is_never_held_back(self):
        listener = self.listener(added=True)
        self.assertEqual(listener.feed(events(delta("a"))), events(delta("a")))
        self.assertEqual(listener.feed(b": ping\n\n"), b": ping\n\n")
        self.assertEqual(listener.feed(events(delta("b")) + b"data: {"), events(delta("b")))
        self.assertEqual(listener.rest(), b"data: {")


class DialectsTest(ProxyCase):
    def ask_at(self, path, body, *fields, key="k"):
        return self.ask(request("POST", path, json.dumps(body).encode(), *fields, key=key))

    def test_errors_come_in_the_shape_of_the_dialect(self):
        self.start(PROXY_API_KEYS="sk-1")
        table = [("/v1/messages", lambda told: (told["type"], told["error"]["type"]), ("error", "authentication_error")),
                 ("/v1beta/models/m:generateContent", lambda told: (told["error"]["code"], told["error"]["status"]),
                  (401, "UNAUTHENTICATED")),
                 ("/v1/responses", lambda told: (told["error"]["type"], told["error"]["code"]),
                  ("authentication_error", "invalid_api_key"))]
        for path, find, expected in table:
            with self.subTest(path):
                answered = self.ask_at(path, {}, key="wrong")
                self.assertEqual((answered.status, find(answered.json())), (401, expected))

    def test_every_kind_of_credential_is_the_same_caller_and_none_goes_upstream(self):
        self.start(MAX_TOKENS=10)
        shows = [("", "Authorization: Bearer sk-1"), ("", "x-api-key: sk-1"), ("", "x-goog-api-key: sk-1"),
                 ("?key=sk-1", "X-A: b"), ("?a=b&key=sk%2D1&c=d", "X-A: b"), ("?k%65y=sk-1", "x-api-key: sk-1")]
        for number, (query, field) in enumerate(shows):
            with self.subTest(query=query, field=field):
                answered = self.ask_at(CHAT + query, {"model": "m"}, field, key=None)
                self.assertEqual(answered.get("x-ratelimit-remaining"), str(9 - number))
                asked = self.stub.requests[-1]
                self.assertNotIn(b"sk-1", asked.head)
                self.assertNotIn("key", asked.target)
        self.assertEqual(self.stub.requests[4].target, CHAT + "?a=b&c=d")
        self.assertNotIn("sk-1", self.lines.text())
        self.assertEqual(self.ask_at(CHAT + "?key=sk-2", {}, key="sk-1").status, 400)

    def test_our_own_key_is_shown_as_each_api_wants_it(self):
        self.start(BASE_API_KEY="sk-up")
        for path, name, value in ((CHAT, "authorization", "Bearer sk-up"), ("/v1/messages", "x-api-key", "sk-up"),
                                  ("/v1/messages/count_tokens", "x-api-key", "sk-up"),
                                  ("/v1beta/models/m:generateContent", "x-goog-api-key", "sk-up")):
            self.ask_at(path, {})
            shown = {key: shown for key, shown in self.stub.requests[-1].fields
                     if key in ("authorization", "x-api-key", "x-goog-api-key")}
            self.assertEqual(shown, {name: value}, path)

    def test_every_api_is_metered_in_whatever_spelling_and_counting_tokens_is_not(self):
        self.start(MAX_TOKENS=1)
        metered = ["/v1/responses", "//v1/responses/", "/v1/embeddings", "/v1/%65mbeddings", "/v1/messages", "/v1/Messages",
                   "/messages", "/x/v1/messages", "/v1beta/models/m:generateContent", "/v1/models/m:streamGenerateContent",
                   "/v1beta/tunedModels/m:generateContent", "/v1/rerank", "/v1/images/generations"]
        for path in metered:
            with self.subTest(path):
                self.ask_at(path, {"model": "m"}, key=path)
                calls = self.stub.calls
                self.ask_at(path, {"model": "m"}, key=path)
                self.assertEqual(self.stub.calls, calls)
        for path in ("/v1beta/models/m%3AgenerateContent", "/v1beta/models/m:generatecontent", "/v1beta//models/m:generateContent"):
            self.assertEqual(self.ask_at(path, {}).status, 400, path)
        for path in ("/v1/messages/count_tokens", "/v1beta/models/m:countTokens", "/v1/threads/t/messages",
                     "/v1/responses/r/cancel"):
            for _ in range(3):
                self.assertIsNone(self.ask_at(path, {}, key=path).get("x-ratelimit-limit"), path)

    def test_the_model_is_replaced_wherever_it_stands(self):
        self.start(BASE_MODEL="real")
        for path in ("/v1/responses", "/v1/messages", "/v1/embeddings"):
            self.ask_at(path, {"model": "asked"})
            self.assertEqual(self.stub.requests[-1].json()["model"], "real")
        self.ask_at("/v1beta/models/asked:streamGenerateContent?alt=sse", {})
        self.assertEqual(self.stub.requests[-1].target, "/v1beta/models/real:streamGenerateContent?alt=sse")

    def test_estimates_know_each_api_s_maximum(self):
        self.start(MAX_TOKENS=100000, TOKEN_COST_MODE="estimate")
        table = [("/v1/responses", {"input": "x" * 40, "max_output_tokens": 100}, 110),
                 ("/v1/messages", {"messages": "x" * 40, "max_tokens": 100}, 110),
                 ("/v1beta/models/m:generateContent", {"contents": "x" * 40, "generationConfig": {"maxOutputTokens": 100}}, 110),
                 ("/v1beta/models/m:generateContent", {"contents": "x" * 40, "generation_config": {"max_output_tokens": 5}}, 15),
                 ("/v1beta/models/m:generateContent", {"contents": "x" * 40}, 266)]
        for number, (path, body, cost) in enumerate(table):
            with self.subTest(path=path, body=str(body)[-40:]):
                self.assertEqual(self.ask_at(path, body, key=str(number)).status, 200)
                self.assertEqual(100000 - self.left(str(number)), cost)
        self.assertEqual(self.ask_at("/v1beta/models/m:generateContent", {"generationConfig": 3}).status, 400)

    def limited(self, path, body, *fields):
        self.ask_at(path, body, *fields)
        return self.ask_at(path, body, *fields)

    def test_the_limit_reply_of_each_api(self):
        table = [
            ("/v1/responses", {"model": "asked"}, lambda told: (told["object"], told["status"], told["model"],
                                                               told["output"][0]["content"][0]["text"])),
            ("/v1/messages", {"model": "asked"}, lambda told: (told["type"], told["stop_reason"], told["model"],
                                                              told["content"][0]["text"])),
            ("/v1beta/models/asked:generateContent", {}, lambda told: (
                len(told["candidates"]), told["candidates"][0]["finishReason"], told["modelVersion"],
                told["candidates"][0]["content"]["parts"][0]["text"]))]
        self.start(MAX_TOKENS=1)
        for (path, body, find), expected in zip(table, (("response", "completed"), ("message", "end_turn"), (1, "STOP"))):
            with self.subTest(path):
                self.stub.requests.clear()
                answered = self.ask_at(path, body, key=path) and self.ask_at(path, body, key=path)
                self.assertEqual((answered.status, self.stub.calls), (200, 1))
                self.assertEqual(find(answered.json()), (*expected, "asked", "limit reached, wait 5 min"))

    def test_the_streamed_limit_reply_of_each_api(self):
        table = [
            ("/v1/responses", {"stream": True}, ["response.created", "response.in_progress", "response.output_item.added",
             "response.content_part.added", "response.output_text.delta", "response.output_text.done",
             "response.content_part.done", "response.output_item.done", "response.completed"]),
            ("/v1/messages", {"stream": True}, ["message_start", "content_block_start", "content_block_delta",
             "content_block_stop", "message_delta", "message_stop"])]
        self.start(MAX_TOKENS=1)
        for path, body, kinds in table:
            with self.subTest(path):
                answered = self.ask_at(path, body, key=path) and self.ask_at(path, body, key=path)
                self.assertEqual(answered.get("content-type"), "text/event-stream")
                blocks = [block.split(b"\n") for block in answered.body.split(b"\n\n")[:-1]]
                told = [json.loads(data[len(b"data: "):]) for _, data in blocks]
                self.assertEqual([one["type"] for one in told], kinds)
                self.assertEqual([name for name, _ in blocks], [b"event: " + kind.encode() for kind in kinds])
                self.assertIn("limit reached, wait 5 min", json.dumps(told))
        path = "/v1beta/models/m:streamGenerateContent"
        for query, kind in (("?alt=sse", "text/event-stream"), ("", "application/json")):
            answered = self.ask_at(path + query, {}, key=query) and self.ask_at(path + query, {}, key=query)
            self.assertEqual(answered.get("content-type"), kind)
            told = json.loads(answered.body[6:]) if query else answered.json()[0]
            self.assertEqual(told["candidates"][0]["finishReason"], "STOP")

    def test_where_no_assistant_can_speak_the_limit_is_an_error(self):
        self.start(MAX_TOKENS=1)
        answered = self.limited("/v1/embeddings", {"input": "x"})
        self.assertEqual((answered.status, answered.get("retry-after"), answered.error()["type"]),
                         (429, "300", "rate_limit_error"))

    def test_who_parses_the_answer_as_json_is_refused_in_a_way_that_parsers_understand(self):
        self.start(MAX_TOKENS=1)
        shape = {"format": {"type": "json_schema", "name": "x", "schema": {}}}
        told = self.limited("/v1/responses", {"text": shape}).json()
        self.assertEqual(told["output"][0]["content"], [{"type": "refusal", "refusal": "limit reached, wait 5 min"}])
        streamed = self.ask_at("/v1/responses", {"text": shape, "stream": True}).body
        self.assertIn(b"event: response.refusal.delta\n", streamed)
        self.assertNotIn(b"output_text", streamed)
        for body in ({"output_config": {"format": {"type": "json_schema"}}}, {"output_format": {"type": "json_schema"}}):
            answered = self.ask_at("/v1/messages", body)
            self.assertEqual((answered.status, answered.get("x-should-retry")), (429, "false"))

    def test_gemini_embeddings_are_metered_and_limited_by_an_error(self):
        self.start(MAX_TOKENS=1)
        for method in ("embedContent", "batchEmbedContents"):
            self.ask_at("/v1beta/models/m:" + method, {"content": {"parts": [{"text": "x" * 40}]}}, key=method)
            self.assertEqual(self.entry(0)["input"], 10)
            answered = self.ask_at("/v1beta/models/m:" + method, {}, key=method)
            self.assertEqual((answered.status, answered.json()["error"]["status"]), (429, "RESOURCE_EXHAUSTED"))

    def test_googles_clients_are_known_by_their_header_under_any_path(self):
        self.start(BASE_API_KEY="sk-up")
        self.ask(request("GET", "/v1/models", b"", "x-goog-api-key: k"))
        self.assertEqual(self.stub.requests[-1].get("x-goog-api-key"), "sk-up")

    def test_programs_may_be_told_by_an_error(self):
        browser, webui = "User-Agent: Mozilla/5.0 (X11)", "X-OpenWebUI-User-Id: 7"
        table = [("assistant", (), 200), ("error", (), 429), ("error", (browser,), 429), ("auto", (), 429),
                 ("auto", ("User-Agent: OpenAI/Python 1.0",), 429), ("auto", (browser,), 200), ("auto", (webui,), 200)]
        for mode, fields, status in table:
            with self.subTest(mode=mode, fields=fields):
                self.start(MAX_TOKENS=1, LIMIT_REPLY=mode)
                answered = self.limited(CHAT, {"model": "m", "stream": True}, *fields)
                self.assertEqual((answered.status, answered.get("retry-after")), (status, "300"))
                self.assertEqual(answered.get("x-should-retry"), "false" if status == 429 else None)
        self.start(MAX_TOKENS=1, LIMIT_REPLY="error", REFILL_INTERVAL_SECONDS=60)
        answered = self.limited("/v1/messages", {})
        self.assertEqual((answered.get("x-should-retry"), answered.json()["error"]["type"]), (None, "rate_limit_error"))

    def test_who_the_callers_user_is_does_not_go_upstream(self):
        self.start()
        self.ask(call("k", "X-OpenWebUI-User-Email: a@example.org"))
        self.assertNotIn(b"example.org", self.stub.requests[-1].head)


class LimitReplyTest(ProxyCase):
    """The assistant that says 'limit reached', in its four shapes."""

    def limited(self, path=CHAT, **payload):
        """A call at an empty bucket; -> (Answered, its payload or its events)"""
        self.start(clock=Clock(), MAX_TOKENS=1)
        self.ask(call())
        answered = self.ask(request("POST", path, json.dumps({"model": "asked-for", **payload}).encode()))
        self.assertEqual((answered.status, answered.whole, self.stub.calls), (200, True, 1))
        if not payload.get("stream"):
            return answered, answered.json()
        events = answered.body.decode().split("\n\n")
        self.assertEqual(events.pop(), "")
        self.assertEqual(events.pop(), "data: [DONE]")
        self.assertTrue(all(event.startswith("data: {") and "\n" not in event for event in events), events)
        return answered, [json.loads(event[6:]) for event in events]

    ZERO = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}

    def test_chat_as_json(self):
        answered, payload = self.limited(messages=[])
        self.assertEqual(answered.get("content-type"), "application/json")
        self.assertTrue(payload.pop("id").startswith("chatcmpl-"))
        message = {"role": "assistant", "content": "limit reached, wait 5 min"}
        self.assertEqual(payload, {
            "object": "chat.completion", "created": 1700001000, "model": "asked-for", "usage": self.ZERO,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]})

    def test_completions_as_json(self):
        _, payload = self.limited("/v1/completions", prompt="x")
        self.assertTrue(payload.pop("id").startswith("cmpl-"))
        self.assertEqual(payload, {
            "object": "text_completion", "created": 1700001000, "model": "asked-for", "usage": self.ZERO,
            "choices": [{"index": 0, "text": "limit reached, wait 5 min", "logprobs": None,
                         "finish_reason": "stop"}]})

    def test_chat_as_a_stream(self):
        answered, chunks = self.limited(messages=[], stream=True)
        self.assertEqual(answered.get("content-type"), "text/event-stream")
        self.assertEqual({(chunk["object"], chunk["model"], chunk["id"]) for chunk in chunks},
                         {("chat.completion.chunk", "asked-for", chunks[0]["id"])})
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        self.assertEqual(deltas[0]["role"], "assistant")
        self.assertEqual("".join(delta.get("content") or "" for delta in deltas), "limit reached, wait 5 min")
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
        self.assertEqual(reasons, [None] * (len(chunks) - 1) + ["stop"])
        self.assertTrue(all("usage" not in chunk for chunk in chunks))

    def test_completions_as_a_stream(self):
        _, chunks = self.limited("/v1/completions", prompt="x", stream=True)
        self.assertEqual({chunk["object"] for chunk in chunks}, {"text_completion"})
        self.assertEqual("".join(chunk["choices"][0]["text"] for chunk in chunks),
                         "limit reached, wait 5 min")
        self.assertEqual(chunks[-1]["choices"][0]["finish_reason"], "stop")

    def test_a_stream_tells_its_usage_where_that_was_asked_for(self):
        for path in (CHAT, "/v1/completions"):
            _, chunks = self.limited(path, stream=True, stream_options={"include_usage": True})
            self.assertEqual((chunks[-1]["choices"], chunks[-1]["usage"]), ([], self.ZERO))
            self.assertTrue(all(chunk["usage"] is None for chunk in chunks[:-1]))

    def test_as_many_choices_are_given_as_were_asked_for(self):
        _, payload = self.limited(n=3)
        self.assertEqual([choice["index"] for choice in payload["choices"]], [0, 1, 2])
        _, chunks = self.limited(n=2, stream=True)
        self.assertEqual({choice["index"] for chunk in chunks for choice in chunk["choices"]}, {0, 1})
        _, payload = self.limited("/v1/completions", prompt=["a", "b"], n=2)
        self.assertEqual(len(payload["choices"]), 4)

    def test_odd_options_do_not_break_it(self):
        for odd in ({"n": 0}, {"n": -5}, {"n": True}, {"n": "3"}, {"n": None}, {"n": 10 ** 9},
                    {"stream_options": []}, {"response_format": 1},
                    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
                    {"stream": "yes"}):
            with self.subTest(odd=odd):
                _, payload = self.limited(**{**odd, "stream": False})
                self.assertEqual(payload["choices"][0]["message"]["content"], "limit reached, wait 5 min")
                self.assertLessEqual(len(payload["choices"]), 128)

    def test_where_json_was_asked_for_the_message_says_that_it_is_a_refusal(self):
        """SDKs that parse the content stop there."""
        _, payload = self.limited(response_format={"type": "json_schema",
                                                   "json_schema": {"name": "x", "schema": {}}})
        self.assertEqual(payload["choices"][0]["message"]["refusal"], "limit reached, wait 5 min")

    def test_it_tells_the_wait_and_the_bucket_in_its_header(self):
        answered, _ = self.limited()
        names = ("limit", "remaining", "refill-tokens", "refill-seconds", "reset-seconds")
        self.assertEqual([answered.get("x-ratelimit-" + name) for name in names],
                         ["1", "0", "2", "300", "300"])
        self.assertEqual(answered.get("retry-after"), "300")

    def test_a_message_of_the_operator_is_sent_whatever_it_contains(self):
        message = 'dis "donc" – {wait} \\ 100% {x}'
        self.start(MAX_TOKENS=1, LIMIT_MESSAGE=message, REFILL_INTERVAL_SECONDS=7)
        self.ask(call())
        said = self.ask(call()).json()["choices"][0]["message"]["content"]
        self.assertEqual(said, message.replace("{wait}", "7s"))


# ------------------------------------------------------------------------------------------------------------
# Wire
# ------------------------------------------------------------------------------------------------------------

class HeadTest(ProxyCase):
    def head(self, *rows, start="POST /v1/files HTTP/1.1", body=b""):
        return "\r\n".join([start, *rows, "", ""]).encode("latin-1") + body

    def test_well_formed_heads_are_taken(self):
        self.start()
        host, length = "Host: x", "Content-Length: 0"
        table = {
            "the usual": self.head(host, length),
            "no white space": self.head("Host:x", "Content-Length:0"),
            "tabs around values": self.head("Host:\t x \t", length),
            "any case": self.head("hOST: x", "CONTENT-length: 0"),
            "an empty value": self.head(host, length, "X-Empty:"),
            "bytes beyond ASCII": self.head(host, length, "X-Name: \xe4\xff"),
            "every token character": self.head(host, length, "!#$%&'*+-.^_`|~09AZaz: x"),
            "leading zeros": self.head(host, "Content-Length: 0002", body=b"{}"),
            "100 fields": self.head(host, length, *["X-%d: x" % number for number in range(98)]),
            "a long value": self.head(host, length, "X-Long: " + "x" * 8000),
            "a long head": self.head(host, length, *["X-Long: " + "x" * 8000] * 7),
            "a long target": self.head(host, length, start="POST /v1/%s HTTP/1.1" % ("x" * 8000)),
            "a port": self.head("Host: x.example:8899", length),
            "IPv6": self.head("Host: [::1]:8899", length),
            "an empty host": self.head("Host:", length),
            "fields twice": self.head(host, length, "Accept: a", "Accept: b"),
            "absolute form": self.head("Host: x:1", length, start="POST http://x:1/v1/files HTTP/1.1"),
            "HTTP/1.0": self.head(host, length, start="POST /v1/files HTTP/1.0"),
            "HTTP/1.0 without Host": self.head(length, start="POST /v1/files HTTP/1.0"),
            "chunked": self.head(host, "Transfer-Encoding: chunked", body=b"2\r\n{}\r\n0\r\n\r\n"),
            "Chunked": self.head(host, "transfer-encoding: CHUNKED", body=b"2\r\n{}\r\n0\r\n\r\n"),
            "options of the whole server": self.head(host, start="OPTIONS * HTTP/1.1")}
        for name, data in table.items():
            with self.subTest(name):
                self.assertLess(self.ask(data).status, 300)

    def test_everything_else_is_refused_and_ends_the_connection(self):
        self.start()
        host, length, five, chunked = "Host: x", "Content-Length: 0", "Content-Length: 5", CHUNKED
        lengths = ("+5", "-1", "-0", "1_0", "0x10", "5,5", "5, 5", "", "²", "5 5", "5;", "5.0", "9" * 27)
        table = [("length %r" % value, 400, self.head(host, "Content-Length: " + value, body=b"hello"))
                 for value in lengths]
        table += [(name, status, data) for name, (status, data) in {
            "a bare LF behind the start line": (400, b"GET /v1/x HTTP/1.1\nHost: x\r\n\r\n"),
            "bare LFs only": (400, b"GET / HTTP/1.1\nHost: x\n\n"),
            "a bare LF in a value": (400, self.head(host, length, "X-A: b\nX-C: d")),
            "a bare CR in a value": (400, self.head(host, length, "X-A: b\rX-C: d")),
            "a folded line": (400, self.head(host, length, "X-A: b", " folded")),
            "a first line that is folded": (400, self.head(" " + host, length)),
            "a space before the colon": (400, self.head(host, "Content-Length : 0")),
            "a tab before the colon": (400, self.head("Host\t: x", length)),
            "no colon": (400, self.head(host, length, "X-A")),
            "no name": (400, self.head(host, length, ": x")),
            "a name that is no token": (400, self.head(host, length, "X(A): x")),
            "a name beyond ASCII": (400, self.head(host, length, "X-\xe4: x")),
            "NUL": (400, self.head(host, length, "X-A: b\x00c")),
            "a control character": (400, self.head(host, length, "X-A: b\x1bc")),
            "DEL": (400, self.head(host, length, "X-A: b\x7fc")),
            "two Hosts": (400, self.head(host, host, length)),
            "two Hosts that differ in case": (400, self.head("host: a", "HOST: b", length)),
            "no Host": (400, self.head(length)),
            "a Host with a path": (400, self.head("Host: x/y", length)),
            "a Host with a user": (400, self.head("Host: a@x", length)),
            "a list of Hosts": (400, self.head("Host: a b", length)),
            "two equal lengths": (400, self.head(host, five, five, body=b"hello")),
            "two different lengths": (400, self.head(host, five, "content-length: 6", body=b"hello!")),
            "a length and chunks": (400, self.head(host, five, chunked, body=LAST)),
            "chunks and a length": (400, self.head(host, chunked, five, body=LAST)),
            "another coding": (501, self.head(host, "Transfer-Encoding: gzip")),
            "another coding before chunked": (501, self.head(host, "Transfer-Encoding: gzip, chunked")),
            "chunked twice": (400, self.head(host, chunked, chunked, body=LAST)),
            "chunked, with a control character": (400,
                                                  self.head(host, "Transfer-Encoding: \x0bchunked",
                                                            body=LAST)),
            "a coding that only looks like chunked": (501,
                                                      self.head(host, "Transfer-Encoding: xchunked",
                                                                body=LAST)),
            "an empty coding": (501, self.head(host, "Transfer-Encoding:")),
            "chunks in HTTP/1.0": (400, self.head(host, chunked, start="POST /v1/x HTTP/1.0", body=LAST)),
            "a credential twice": (400, self.head(host, length, "Authorization: Bearer a",
                                                  "Authorization: Bearer b")),
            "HTTP/2.0": (505, self.head(host, start="GET / HTTP/2.0")),
            "HTTP/1.2": (505, self.head(host, start="GET / HTTP/1.2")),
            "no version": (400, self.head(host, start="GET /")),
            "a small version": (400, self.head(host, start="GET / http/1.1")),
            "two spaces": (400, self.head(host, start="GET  / HTTP/1.1")),
            "a tab between": (400, self.head(host, start="GET\t/ HTTP/1.1")),
            "a space at the end": (400, self.head(host, start="GET / HTTP/1.1 ")),
            "a space in the target": (400, self.head(host, start="GET /a b HTTP/1.1")),
            "a target beyond ASCII": (400, self.head(host, start="GET /\xe4 HTTP/1.1")),
            "a control character in the target": (400, self.head(host, start="GET /\x01 HTTP/1.1")),
            "a fragment": (400, self.head(host, start="GET /#x HTTP/1.1")),
            "no slash": (400, self.head(host, start="GET x HTTP/1.1")),
            "absolute form for another host": (400, self.head(host, start="GET http://y/ HTTP/1.1")),
            "absolute form with a user": (400, self.head(host, start="GET http://a@x/ HTTP/1.1")),
            "CONNECT": (501, self.head(host, start="CONNECT x:443 HTTP/1.1")),
            "a star": (400, self.head(host, start="GET * HTTP/1.1")),
            "a small method": (400, self.head(host, start="get / HTTP/1.1")),
            "101 fields": (431, self.head(host, length, *["X-%d: x" % number for number in range(99)])),
            "a head of 70 KB": (431, self.head(host, length, *["X-A: " + "x" * 1000] * 70)),
            "a line of 10 KB": (431, self.head(host, length, "X-A: " + "x" * 10000)),
            "a line of 70 KB": (431, self.head(host, length, "X-A: " + "x" * 70000)),
            "a target of 10 KB": (414, self.head(host, start="GET /%s HTTP/1.1" % ("x" * 10000))),
            "a target of 70 KB": (414, self.head(host, start="GET /%s HTTP/1.1" % ("x" * 70000))),
            "TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
            "nothing but a line end and LF": (400, b"\r\n\n"),
        }.items()]
        for name, status, data in table:
            with self.subTest(name):
                client = self.connect().send(data)
                answered = client.read("GET")
                self.assertEqual((answered.status, answered.error()["type"]),
                                 (status, "invalid_request_error"))
                self.assertEqual(answered.get("connection"), "close")
                self.assertEqual(client.ending(), "closed")
        self.assertEqual(self.stub.calls, 0)
        wait_for(lambda: len(self.lines.entries()) == len(table), "a line for each")
        self.assertEqual({entry["outcome"] for entry in self.lines.entries()}, {"refused"})

    def test_a_line_that_cannot_be_right_is_refused_before_the_head_is_complete(self):
        self.start()
        for start in (b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n", b"GET / HTTP/1.1\r\nHost: x\nX: y",
                      b"GET / HTTP/1.1\nHost: x", b"GET / HTTP/1.1\r\n folded: x\r\n",
                      b"GET / HTTP/1.1\r\nHost: x\rX", b"GET / HTTP/1.1\r\nX-A : x\r\nX"):
            with self.subTest(start=start):
                self.assertEqual(self.connect().send(start).read().status, 400)

    def test_a_request_may_come_one_byte_at_a_time(self):
        self.start()
        client = self.connect()
        for byte in call("k"):
            client.send(bytes([byte]))
        self.assertEqual(client.read().status, 200)
        self.assertEqual(self.stub.requests[0].body, chat())

    def test_a_head_may_come_in_any_three_pieces(self):
        """Each piece is sent when the one before it was read. Of all ways, one in thirteen is tried."""
        self.start()
        head = b"GET /v1/x HTTP/1.1\r\nHost: x\r\nX-A: b\r\n\r\n"
        for first, second in itertools.combinations(range(1, len(head)), 2):
            if (first * 7 + second) % 13:
                continue
            with self.subTest(first=first, second=second):
                client = self.connect()
                self.send_apart(client, head[:first], head[first:second], head[second:])
                self.assertEqual(client.read("GET").status, 200)
                client.close()

    def test_a_caller_who_leaves_within_a_head_is_no_error_of_ours(self):
        self.start()
        for hang_up in (Client.close, Client.reset):
            hang_up(self.connect().send(b"POST /v1/x HTTP/1.1\r\nHost:"))
        self.assertEqual(self.ask(call()).status, 200)

    def test_a_caller_who_resets_an_idle_connection_is_no_error_of_ours(self):
        self.start()
        client = self.connect()
        client.send(call()).read()
        client.reset()
        wait_for(lambda: not self.server.open, "the end of the connection")

    def test_ten_requests_in_one_segment_are_answered_in_order(self):
        self.start(lambda asked: asked.send(answer(asked.body)))
        client = self.connect()
        paths = (CHAT, "/v1/files")
        client.send(b"".join(request("POST", paths[number % 2], chat(seed=number)) for number in range(10)))
        self.assertEqual([client.read().json()["seed"] for _ in range(10)], list(range(10)))


class RepeatedHeadTest(ProxyCase):
    """Nothing learned from one head of a connection may be used for the next, however alike they are."""

    HEAD = "POST /v1/files HTTP/1.1\r\nHost: x\r\n%s\r\n"

    def second(self, first, second):
        """Two requests on one connection; -> (status of the second answer, bodies that went upstream)"""
        self.start()
        client = self.connect().send(first)
        self.assertEqual(client.read().status, 200)
        status = client.send(second).read().status
        return status, [asked.body for asked in self.stub.requests]

    def head(self, *rows):
        return (self.HEAD % "".join(row + "\r\n" for row in rows)).encode()

    def test_the_length_of_the_first_is_not_that_of_the_second(self):
        found = self.second(self.head("Content-Length: 5") + b"hello", self.head("Content-Length: 2") + b"ho")
        self.assertEqual(found, (200, [b"hello", b"ho"]))

    def test_a_second_one_without_a_length_has_no_body(self):
        found = self.second(self.head("Content-Length: 5") + b"hello", self.head())
        self.assertEqual(found, (200, [b"hello", b""]))

    def test_a_length_beside_the_one_that_was_there_is_refused(self):
        found = self.second(self.head("Content-Length:5") + b"hello",
                            self.head("Content-Length: 2", "Content-Length:5") + b"hello")
        self.assertEqual(found, (400, [b"hello"]))

    def test_a_length_beside_chunks_that_were_there_is_refused(self):
        chunks = b"5\r\nhello\r\n0\r\n\r\n"
        found = self.second(self.head("Transfer-Encoding: chunked") + chunks,
                            self.head("Transfer-Encoding: chunked", "Content-Length: 2") + chunks)
        self.assertEqual(found, (400, [b"hello"]))

    def test_another_length_that_is_wrong_is_refused(self):
        found = self.second(self.head("Content-Length: 5") + b"hello",
                            self.head("Content-Length: +5") + b"hello")
        self.assertEqual(found, (400, [b"hello"]))

    def test_another_key_is_another_caller(self):
        self.start()
        client = self.connect()
        for key in ("a", "b", "b"):
            client.send(call(key)).read()
        self.assertEqual((self.left("a"), self.left("b")), (999, 998))


class EchoTest(ProxyCase):
    def test_methods_that_make_an_upstream_echo_what_it_got_are_not_passed_on(self):
        self.start(BASE_API_KEY="sk-up")
        for method in ("TRACE", "TRACK", "CONNECT"):
            answered = self.ask(request(method, "/v1/x"))
            self.assertEqual((answered.status, answered.error()["type"]), (405, "invalid_request_error"))
        self.assertEqual(self.stub.calls, 0)


class RepeatedAnswerTest(ProxyCase):
    def test_a_length_in_an_unusual_spelling_is_a_length_the_second_time_too(self):
        for spelling in ("Content-length: 2", "CONTENT-LENGTH: 2", "Content-Length:2", "Content-Length:  2", "Content-Length: 2 ",
                         "content-length: 2", "Content-Length: 02"):
            with self.subTest(spelling):
                data = ("HTTP/1.1 200 OK\r\n%s\r\n\r\n{}" % spelling).encode()
                self.start(sends(data, close=False))
                client = self.connect()
                for _ in range(3):
                    answered = client.send(request("GET", "/v1/files")).read("GET")
                    self.assertEqual((answered.get("content-length"), answered.body), ("2", b"{}"))
                self.assertEqual(self.stub.connections, 1)

    def test_the_length_of_one_answer_is_not_that_of_the_next(self):
        self.start(lambda asked: asked.send(answer(b"x" * int(asked.target[4:]))))
        client = self.connect()
        for length in (1, 10, 9, 100, 0, 99):
            self.assertEqual(client.send(request("GET", "/v1/%d" % length)).read("GET").body, b"x" * length)


class ChunkedTest(unittest.TestCase):
    BODY = (b"5;name=value\r\nhello\r\n0006 ; x=\"y\"\r\n world\r\nA\r\n0123456789\r\n"
            b"0\r\nX-Trailer: x\r\n\r\n")
    PASSED = BODY.replace(b"X-Trailer: x\r\n", b"")

    @staticmethod
    def feed(*pieces):
        """-> (framing, what was passed on, the payload); what comes after the end is `excess`."""
        framing, passed, payload = llm_proxy.Chunked(), b"", b""
        for piece in pieces:
            if framing.ended:
                framing.excess += piece
                continue
            same, part = framing.feed(piece)
            passed, payload = passed + same, payload + part
        return framing, passed, payload

    def test_every_split_of_a_body_gives_the_same_payload_and_no_trailers(self):
        data = self.BODY + b"NEXT"
        for first in range(len(data)):
            for second in range(first, len(data), 5):
                framing, passed, payload = self.feed(data[:first], data[first:second], data[second:])
                found = (framing.ended, framing.end_of_stream(), framing.excess, passed, payload)
                self.assertEqual(found, (True, True, b"NEXT", self.PASSED, b"hello world0123456789"),
                                 (first, second))

    def test_a_body_may_come_byte_by_byte(self):
        _, passed, payload = self.feed(*(bytes([byte]) for byte in self.BODY))
        self.assertEqual((passed, payload), (self.PASSED, b"hello world0123456789"))

    def test_a_body_that_stops_anywhere_has_not_ended(self):
        for size in range(len(self.BODY)):
            framing, passed, _ = self.feed(self.BODY[:size])
            self.assertEqual((framing.ended, framing.end_of_stream()), (False, False), size)
            self.assertFalse(passed.endswith(LAST), "the last chunk was passed on before it had come")

    def test_broken_chunks_are_malformed_however_they_come(self):
        table = {
            "no size": b"\r\nhello\r\n", "a bare LF": b"5\nhello\r\n", "a sign": b"+5\r\nhello\r\n",
            "a minus": b"-5\r\nhello\r\n", "0x": b"0x5\r\nhello\r\n", "an underscore": b"0_5\r\nhello\r\n",
            "no hex": b"g\r\n", "a space before": b" 5\r\nhello\r\n", "a space behind": b"5 \r\nhello\r\n",
            "17 digits": b"00000000000000005\r\nhello\r\n", "a comma": b"5,5\r\nhello\r\n",
            "a control character in an extension": b"5;a\x00\r\nhello\r\n",
            "a bare CR in an extension": b"5;a\rb\r\nhello\r\n",
            "a bare LF in an extension": b"5;a\nb\r\nhello\r\n", "a size that ends in CR": b"5\rhello\r\n",
            "an endless extension": b"5;" + b"x" * 2000, "too short": b"6\r\nhello\r\n0\r\n\r\n",
            "too long": b"4\r\nhello\r\n0\r\n\r\n", "no line end": b"5\r\nhello0\r\n\r\n",
            "LF behind a chunk": b"5\r\nhello\n0\r\n\r\n", "CR behind a chunk": b"5\r\nhello\r0\r\n\r\n",
            "a wrong byte": b"5\r\nhelloX\r\n", "a bare LF behind the last": b"0\n\n",
            "a bare LF at the very end": b"0\r\n\n", "a bare LF in a trailer": b"0\r\nX: y\n\r\n",
            "a trailer without a colon": b"0\r\nno colon\r\n\r\n",
            "a folded trailer": b"0\r\nX: y\r\n z\r\n\r\n",
            "a trailer with a space before its colon": b"0\r\nX : y\r\n\r\n",
            "NUL in a trailer": b"0\r\nX: \x00\r\n\r\n", "endless trailers": b"0\r\n" + b"X: y\r\n" * 2000}
        for name, data in table.items():
            step = 1 if len(data) < 100 else 97
            for pieces in ((data,), [data[at:at + step] for at in range(0, len(data), step)]):
                with self.subTest(name, pieces=len(pieces)):
                    with self.assertRaises(Malformed):
                        self.feed(*pieces)

    def test_a_sized_body_ends_at_its_size(self):
        framing = llm_proxy.Sized(5)
        self.assertEqual((framing.feed(b"hel"), framing.ended, framing.end_of_stream()),
                         ((b"hel", b"hel"), False, False))
        self.assertEqual((framing.feed(b"loNEXT"), framing.ended, framing.excess),
                         ((b"lo", b"lo"), True, b"NEXT"))
        self.assertTrue(llm_proxy.Sized(0).ended)

    def test_a_body_until_the_close_ends_with_it(self):
        framing = llm_proxy.UntilClose()
        self.assertEqual((framing.feed(b"hello"), framing.ended), ((b"hello", b"hello"), False))
        self.assertTrue(framing.end_of_stream())


class PassageTest(unittest.TestCase):
    CHUNKS = b"5\r\nhello\r\n1;x\r\n!\r\n0\r\n\r\n"

    def test_framing_is_kept_dropped_or_made_as_the_two_sides_need_it(self):
        passage, chunked, close = llm_proxy.Passage, llm_proxy.Chunked, llm_proxy.UntilClose
        table = [(chunked(), passage.AS_IS, self.CHUNKS, self.CHUNKS),
                 (chunked(), passage.PLAIN, self.CHUNKS, b"hello!"),
                 (llm_proxy.Sized(6), passage.AS_IS, b"hello!", b"hello!"),
                 (close(), passage.AS_IS, b"hello!", b"hello!"),
                 (close(), passage.CHUNKED, b"hello!", b"6\r\nhello!\r\n0\r\n\r\n")]
        for framing, style, data, out in table:
            with self.subTest(framing=type(framing).__name__, style=style):
                one = passage(framing, style)
                found = one.feed(data)
                if not framing.ended:
                    whole, rest = one.end_of_stream()
                    self.assertTrue(whole)
                    found += rest
                self.assertEqual((found, one.passed), (out, 6))


# ------------------------------------------------------------------------------------------------------------
# Relay
# ------------------------------------------------------------------------------------------------------------

class StreamTest(ProxyCase):
    def begin(self, head=STREAM, client=None, **payload):
        """Start a call whose answer the test sends itself; -> (Client that has read the head, Asked)"""
        client = client or self.connect()
        client.send(call(stream=True, **payload))
        asked = self.stub.next()
        asked.send(head)
        client.head()
        return client, asked

    def test_every_event_reaches_the_caller_before_the_next_one_is_sent(self):
        self.start(None)
        client, asked = self.begin()
        for number in range(20):
            asked.send(chunk(event(number)))
            client.expect(event(number))
        asked.send(LAST)
        asked.finish()
        self.assertEqual((client.rest().whole, client.answered.get("content-type")),
                         (True, "text/event-stream"))
        self.assertEqual(self.entry()["bytes"], sum(len(event(number)) for number in range(20)))
        self.assertTrue(self.entry()["stream"])

    def test_the_bytes_of_a_stream_pass_unchanged_chunk_by_chunk(self):
        self.start(None)
        client, asked = self.begin()
        chunks = (event(1) + event(2), event(3)[:7], event(3)[7:], b"data: [DONE]\n\n")
        body = b"2;x=y\r\n: \r\n" + b"".join(map(chunk, chunks)) + LAST
        for byte in body:
            asked.send(bytes([byte]))
        self.assertEqual(client.reader.until(b"\r\n0\r\n\r\n"), body)

    def test_text_that_looks_like_the_end_of_a_stream_does_not_end_it(self):
        self.start(None)
        client, asked = self.begin()
        for payload in (b"data: [DONE]\n\n", b"0\r\n\r\n", b'data: {"text": " [DONE]"}\n\n'):
            asked.send(chunk(payload))
            client.expect(payload)
        asked.send(LAST)
        self.assertTrue(client.rest().whole)

    def test_answers_of_every_framing_reach_callers_of_both_versions(self):
        self.start()
        payload = b"".join(map(event, range(50)))
        ok, sized = b"HTTP/1.1 200 OK\r\n", b"Content-Length: %d\r\n\r\n%b" % (len(payload), payload)
        table = {
            "sized": sends(ok + sized, close=False),
            "chunked": sends(STREAM + chunk(payload) + LAST, close=False),
            "until close": sends(ok + b"\r\n" + payload),
            "HTTP/1.0": sends(b"HTTP/1.0 200 OK\r\n\r\n" + payload),
            "HTTP/1.0, sized": sends(b"HTTP/1.0 200 OK\r\n" + sized)}
        for (name, act), version in itertools.product(table.items(), ("1.1", "1.0")):
            with self.subTest(name, version=version):
                self.stub.answer = act
                client = self.connect().send(request("POST", CHAT, chat(), version=version))
                answered = client.read()
                self.assertEqual((answered.status, answered.whole, answered.body == payload),
                                 (200, True, True))
                if version == "1.0":
                    self.assertIsNone(answered.get("transfer-encoding"))
                    self.assertEqual(client.ending(), "closed")
                else:
                    self.assertEqual(client.send(call()).read().body,
                                     payload)  # the connection carries another call

    def test_answers_without_a_body_end_with_their_head(self):
        self.start()
        for method, head, length in (
                ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", "1000"),
                ("HEAD", b"HTTP/1.1 200 OK\r\n\r\n", None),
                ("HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", None),
                ("POST", b"HTTP/1.1 204 No Content\r\n\r\n", None),
                ("GET", b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n", None),
                ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", "9"),
                ("POST", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "0")):
            with self.subTest(method=method, head=head):
                self.stub.answer = sends(head, close=False)
                client = self.connect()
                for _ in range(2):
                    answered = client.send(request(method, "/v1/x")).read(method)
                    self.assertEqual((answered.body, answered.whole), (b"", True))
                    self.assertEqual((answered.get("content-length"), answered.get("transfer-encoding")),
                                     (length, None))

    def test_trailers_are_dropped(self):
        self.start(sends(STREAM + chunk(b"x") + b"0\r\nX-Trailer: y\r\nSet-Cookie: z\r\n\r\n", close=False))
        client = self.connect().send(call())
        client.head()
        self.assertEqual(client.reader.until(b"0\r\n\r\n"), chunk(b"x") + LAST)
        self.assertEqual(client.send(call()).read().body, b"x")

    def test_a_caller_may_send_its_next_request_while_a_stream_is_running(self):
        self.start(None)
        client, asked = self.begin()
        asked.send(chunk(b"one"))
        client.expect(b"one")
        client.send(call(seed=2))
        asked.send(chunk(b"two"))
        client.expect(b"two")
        self.assertEqual(self.stub.calls, 1)
        asked.send(LAST)
        asked.finish()
        self.assertEqual(client.rest().body, b"onetwo")
        second = self.stub.next()
        self.assertEqual(second.json()["seed"], 2)
        second.send(answer(b"three"))
        self.assertEqual(client.read().body, b"three")

    def flood(self, asked):
        """Send 64 MB, as far as they are taken; -> ([bytes sent], the thread that sends, SHA-256)"""
        sent, digest = [0], hashlib.sha256()

        def run():
            try:
                for number in range(1024):
                    block = b"%08d" % number * 8192
                    digest.update(block)
                    asked.send(chunk(block))
                    sent[0] += len(block)
                asked.send(LAST)
            except OSError:
                pass
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return sent, thread, digest

    def test_a_caller_who_does_not_read_stops_its_own_upstream_and_nobody_elses(self):
        """What is on its way is bounded by socket buffers; a proxy that took all would soon have 64 MB."""
        self.start(None)
        slow, flooding = self.begin(client=self.connect(receive_buffer=65536))
        sent, thread, digest = self.flood(flooding)
        quick, asked = self.begin()
        seen = list(range(-10, 0))
        while len(set(seen)) > 1:  # until nothing moved for a while, or all was taken
            seen = seen[1:] + [sent[0]]
            asked.send(chunk(event(1)))
            quick.expect(event(1))
            time.sleep(0.02)
        self.assertLess(sent[0], 48 << 20)
        found = hashlib.sha256()
        for piece in slow.pieces:
            found.update(piece)
        thread.join(PATIENCE)
        self.assertEqual(found.hexdigest(), digest.hexdigest())

    def test_a_caller_who_does_not_read_and_leaves_closes_its_upstream(self):
        self.start(None)
        for hang_up in (Client.close, Client.reset):
            with self.subTest(hang_up=hang_up.__name__):
                slow, flooding = self.begin(client=self.connect(receive_buffer=65536))
                sent, thread, _ = self.flood(flooding)
                wait_for(lambda: sent[0] > 1 << 20)
                hang_up(slow)
                thread.join(PATIENCE)
                self.assertFalse(thread.is_alive())
                self.assertLess(sent[0], 64 << 20)
        self.assertEqual([self.entry(number)["outcome"] for number in (0, 1)], ["caller_gone"] * 2)

    def test_a_large_download_passes_whole(self):
        block = bytes(range(256)) * 256

        def large(asked):
            asked.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(block) * 320))
            for _ in range(320):
                asked.send(block)
        self.start(large)
        client = self.connect().send(request("GET", "/v1/files/1/content"))
        client.head("GET")
        digest, size = hashlib.sha256(), 0
        for piece in client.pieces:
            digest.update(piece)
            size += len(piece)
        self.assertEqual((size, digest.hexdigest()), (20 << 20, hashlib.sha256(block * 320).hexdigest()))

    def test_many_streams_run_at_once(self):
        self.start(None, MAX_TOKENS=100)
        streams = [self.begin() for _ in range(40)]
        for number in range(5):
            for _, asked in streams:
                asked.send(chunk(event(number)))
            for client, _ in streams:
                client.expect(event(number))
        for client, asked in streams:
            asked.send(LAST)
            self.assertTrue(client.rest().whole)


# ------------------------------------------------------------------------------------------------------------
# Line
# ------------------------------------------------------------------------------------------------------------

class LineTest(unittest.TestCase):
    """Turns, as steps: who enters, who leaves, who runs then."""

    def line(self, most=1, queue=100, per_caller=100):
        self.crowd = llm_proxy.Crowd(queue, per_caller, 30)
        return llm_proxy.Line(most, self.crowd, Clock())

    @staticmethod
    def order(line, running, waiting):
        """Let one after another leave; -> whose call begins each time."""
        found = []
        while waiting:
            running.pop(0).leave()
            for slot in [slot for slot in waiting if slot.running]:
                waiting.remove(slot)
                running.append(slot)
                found.append(slot.guest.key)
        return "".join(found)

    def test_one_call_waits_for_at_most_one_call_whatever_another_caller_has_queued(self):
        for most in (1, 2, 4):
            with self.subTest(most=most):
                line = self.line(most)
                slots = [line.enter("a", 1) for _ in range(50 + most)]
                late = line.enter("b", 1)
                self.assertFalse(late.running)
                slots[0].leave()
                self.assertTrue(late.running)

    def test_callers_take_turns(self):
        table = [({"a": 1, "b": 1}, "aaaabbbb", "babababa"), ({"a": 3, "b": 1}, "aaaaaabb", "baaabaaa"),
                 ({"a": 1, "b": 1, "c": 1}, "aaabbbccc", "bcabcabca"), ({"a": 1, "b": 2}, "aabbbb", "bababb")]
        for weights, waiting, expected in table:
            with self.subTest(weights=weights):
                line = self.line()
                first = line.enter("a", weights["a"])
                waiting = [line.enter(key, weights[key]) for key in waiting]
                self.assertEqual(self.order(line, [first], waiting), expected)

    def test_nobody_who_waits_is_starved_by_those_who_come_again_and_again_or_are_ever_new(self):
        for most, flood, weight in itertools.product((1, 2), (False, True), (1, 3)):
            with self.subTest(most=most, flood=flood, weight=weight):
                line, begun, names = self.line(most, 10 ** 6, 10 ** 6), collections.Counter(), itertools.count()
                slots = [line.enter("a", weight) for _ in range(3)] + [line.enter(key, 1) for key in "bc"]
                for turn in range(3000):
                    running = [slot for slot in slots if slot.running]
                    slot = min(running, key=lambda one: one.guest.last)  # who began first ends first
                    slots.remove(slot)
                    slot.leave()
                    begun[slot.guest.key] += 1
                    if slot.guest.key in ("a", "b", "c"):
                        slots.append(line.enter(slot.guest.key, weight if slot.guest.key == "a" else 1))
                    if flood and turn % 2:
                        slots.append(line.enter("new %d" % next(names), 1))
                    self.assertLess(len(line.guests), 20 + len(slots))
                shares = [begun[key] / (weight if key == "a" else 1) for key in "abc"]
                self.assertGreater(min(shares), 0.6 * max(shares))
                self.assertGreater(min(shares), 50)

    def test_who_comes_back_owes_nothing_and_is_owed_nothing(self):
        line = self.line()
        for _ in range(10):
            line.enter("a", 1).leave()
        self.assertEqual(line.guests, {})
        first = line.enter("c", 1)
        self.assertEqual(self.order(line, [first], [line.enter(key, 1) for key in "aabb"]), "abab")

    def test_the_line_is_bounded_in_all_and_for_each(self):
        line = self.line(queue=3, per_caller=2)
        other = llm_proxy.Line(1, self.crowd, Clock())
        self.assertTrue(line.enter("a", 1).running and other.enter("a", 1).running)
        line.enter("a", 1), other.enter("a", 1)
        with self.assertRaisesRegex(llm_proxy.NotInTurn, "busy"):
            line.enter("a", 1)
        slot = line.enter("b", 1)
        with self.assertRaises(llm_proxy.NotInTurn):
            other.enter("c", 1)
        slot.leave()
        self.assertFalse(other.enter("c", 1).running)

    def test_a_place_is_left_once_from_the_line_or_from_a_slot(self):
        line = self.line()
        first, second, third = (line.enter(key, 1) for key in "abc")
        self.assertEqual([line.ahead(slot) for slot in (first, second, third)], [0, 0, 1])
        second.leave()
        second.leave()
        self.assertEqual((line.ahead(third), self.crowd.waiting), (0, 1))
        first.leave()
        first.leave()
        self.assertEqual((third.running, line.running, self.crowd.waiting), (True, 1, 0))
        third.leave()
        self.assertEqual((line.running, line.guests, self.crowd.by_caller), (0, {}, {}))

    def test_whatever_happens_no_slot_is_idle_while_somebody_waits_and_each_caller_is_served_in_order(self):
        chance = random.Random(7)
        for most in (1, 3):
            line, slots, begun = self.line(most), [], collections.defaultdict(list)
            for _ in range(3000):
                if chance.random() < 0.5 and len(slots) < 60:
                    with contextlib.suppress(llm_proxy.NotInTurn):
                        slots.append(line.enter(chance.choice("abcde"), chance.choice((1, 2))))
                elif slots:
                    slots.pop(chance.randrange(len(slots))).leave()
                running, waiting = ([slot for slot in slots if slot.running is state] for state in (True, False))
                self.assertEqual((line.running, self.crowd.waiting), (len(running), len(waiting)))
                self.assertFalse(waiting and len(running) < most)
                for slot in waiting:
                    later = slots[slots.index(slot) + 1:]
                    self.assertFalse([one for one in later if one.running and one.guest is slot.guest])
            for slot in slots:
                slot.leave()
            self.assertEqual((line.running, line.guests, self.crowd.waiting, self.crowd.by_caller), (0, {}, 0, {}))


class QueueTest(ManyCase):
    """The line as callers meet it."""

    def state(self):
        return self.ask(request("GET", "/health")).json()["upstreams"]["base"]

    def waiting(self, number):
        wait_for(lambda: self.state()["queue"]["waiting"] == number, "%d in line" % number)

    def start_busy(self, **settings):
        """-> a client whose call runs, and that call at the upstream."""
        self.start(None, **{"MAX_CONCURRENCY": 1, "MAX_TOKENS": 100, **settings})
        client = self.connect().send(call("busy"))
        return client, self.stub.next()

    def finish(self, asked, client):
        asked.send(answer())
        asked.finish()
        return client.read()

    def test_one_runs_the_next_waits_and_is_told_how_long(self):
        first, asked = self.start_busy()
        second = self.connect().send(call("next"))
        self.waiting(1)
        self.assertEqual((self.stub.calls, self.state()["in_flight"]), (1, 1))
        self.assertEqual(self.finish(asked, first).get("x-queue-ms"), "0")
        answered = self.finish(self.stub.next(), second)
        self.assertEqual(answered.status, 200)
        self.assertGreaterEqual(int(answered.get("x-queue-ms")), 1)
        self.waiting(0)
        wait_for(lambda: self.lines.entries()[1:])
        self.assertIn(int(answered.get("x-queue-ms")), [row["queue_ms"] for row in self.lines.entries()])

    def test_without_a_cap_nobody_is_told_of_a_line(self):
        self.start()
        self.assertIsNone(self.ask(call()).get("x-queue-ms"))
        self.assertNotIn("queue", self.state())

    def test_one_caller_with_many_jobs_delays_another_by_one_call(self):
        first, asked = self.start_busy()
        many = [self.connect().send(call("busy", stream=False, user="%d" % number)) for number in range(6)]
        self.waiting(6)
        single = self.connect().send(call("single", user="single"))
        self.waiting(7)
        self.finish(asked, first)
        asked = self.stub.next()
        self.assertEqual(asked.json()["user"], "single")
        self.finish(asked, single)
        for client in many:
            asked = self.stub.next()
            self.finish(asked, many[int(asked.json()["user"])])

    def test_a_named_key_has_as_many_turns_as_its_weight(self):
        self.start(None, MAX_CONCURRENCY=1, PROXY_API_KEYS="alice=a,bob=b", KEY_WEIGHTS="alice=2")
        order, clients = [], []
        for key in "baaaabb":
            clients.append(self.connect().send(call(key, user=key)))
            if len(clients) == 1:
                asked = self.stub.next()
            else:
                wait_for(lambda: self.state_of_line() == len(clients) - 1)
        for _ in clients:
            asked.send(answer())
            asked.finish()
            if len(order) < 6:
                asked = self.stub.next()
                order.append(asked.json()["user"])
        self.assertEqual("".join(order), "ababaa")
        self.assertEqual({client.read().status for client in clients}, {200})

    def state_of_line(self):
        return self.proxy.routes.base.line.told()["waiting"]

    def test_beyond_the_line_a_call_is_a_503_at_once_and_costs_nothing(self):
        for settings, key in (({"MAX_QUEUE": 1}, "other"), ({"MAX_QUEUE_PER_CALLER": 1}, "next"), ({"MAX_QUEUE": 0}, None)):
            with self.subTest(settings=settings):
                first, asked = self.start_busy(**settings)
                if key:
                    second = self.connect().send(call("next"))
                    self.waiting(1)
                answered = self.ask(call(key, stream=True))
                self.assertEqual((answered.status, answered.error()["type"], answered.get("retry-after"),
                                  answered.get("x-llm-proxy-error-class")), (503, "server_error", "5", "queue_full"))
                self.assert_ending("refused", left=100 - (key == "next"), key=key)
                self.assertEqual(self.entry()["cause"], "queue full")
                self.finish(asked, first)
                if key:
                    self.finish(self.stub.next(), second)

    def test_who_waits_too_long_gets_a_503_and_costs_nothing(self):
        first, asked = self.start_busy(QUEUE_SECONDS="0.1")
        answered = self.ask(call("next"))
        self.assertEqual((answered.status, answered.get("x-llm-proxy-error-class")), (503, "queue_timeout"))
        self.assertGreaterEqual(int(answered.get("x-queue-ms")), 100)
        self.assert_ending("refused", left=100, key="next")
        self.assertEqual(self.state()["queue"], {"waiting": 0, "longest_ms": 0})
        self.finish(asked, first)

    def test_who_leaves_the_line_is_gone_from_it(self):
        for leave in (Client.close, Client.reset):
            with self.subTest(leave=leave.__name__):
                first, asked = self.start_busy()
                second, third = self.connect().send(call("next")), None
                self.waiting(1)
                third = self.connect().send(call("third"))
                self.waiting(2)
                leave(second)
                self.waiting(1)
                self.assertEqual(self.entry()["outcome"], "caller_gone")
                self.assertEqual(self.left("next"), 100)  # nothing was sent
                self.finish(asked, first)
                self.assertEqual(self.finish(self.stub.next(), third).status, 200)
                self.assertEqual(self.stub.calls, 2)

    def test_what_is_not_metered_does_not_wait(self):
        first, asked = self.start_busy()
        client = self.connect().send(request("GET", "/v1/models"))
        self.assertEqual(self.finish(self.stub.next(), client).status, 200)
        self.finish(asked, first)

    def test_a_slot_is_free_again_after_every_ending(self):
        def cut(asked):
            asked.send(STREAM + chunk(event(1)))
            asked.close()
        endings = {"ok": says(), "status": says(b"{}", "500 No"), "nonsense": sends(b"nonsense\r\n\r\n"),
                   "closed": Asked.close, "cut": cut}
        self.start(MAX_CONCURRENCY=1, BREAKER_FAILURES=100)
        for name, self.stub.answer in endings.items():
            with self.subTest(name=name):
                self.ask(call(stream=True))
                wait_for(lambda: self.proxy.routes.base.line.running == 0)
        for answered in (None, STREAM, STREAM + chunk(event(1))):
            with self.subTest(gone_after=answered):
                self.stub.answer = None
                client = self.connect().send(call(stream=True))
                asked = self.stub.next()
                if answered:
                    asked.send(answered)
                    client.head()
                client.reset()
                asked.wait_for_hang_up()
                asked.finish()
                wait_for(lambda: self.proxy.routes.base.line.running == 0)
        self.assertEqual(self.proxy.routes.base.line.guests, {})

    def test_the_end_of_a_drain_sends_nobody_who_stands_in_line_upstream(self):
        first, asked = self.start_busy()
        clients = [self.connect().send(call("%d" % number)) for number in range(3)]
        self.waiting(3)
        self.assertEqual(self.server.drain(0.05), 4)
        self.assertEqual(self.stub.calls, 1)
        wait_for(lambda: self.lines.entries()[3:])
        self.assertEqual(sorted(entry["cost"] for entry in self.lines.entries()), [0, 0, 0, 1])

    def test_before_an_upstream_that_is_left_alone_nobody_stands_in_line(self):
        first, asked = self.start_busy(BREAKER_FAILURES=1, FIRST_BYTE_TIMEOUT="0.2", QUEUE_SECONDS="9")
        asked.send(STREAM)
        first.head()
        self.assertEqual(self.ask(request("GET", "/v1/files")).status, 504)
        answered = self.ask(call("next"))
        self.assertEqual((answered.status, answered.get("x-llm-proxy-error-class")), (503, "upstream_open"))
        asked.send(LAST)

    def test_a_slow_reader_holds_no_slot_once_the_upstream_has_done_its_part(self):
        self.start(None, MAX_CONCURRENCY=1)
        client = self.connect(receive_buffer=2048).send(call(stream=True))
        asked, line = self.stub.next(), self.proxy.routes.base.line
        next(iter(self.server.open)).setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        body = b"data: " + b"x" * 14000 + b"\n\n"
        asked.send(STREAM + chunk(event(1)))
        client.head()
        client.expect(event(1))
        asked.send(chunk(body) + LAST)
        asked.finish()
        wait_for(lambda: line.running == 0)
        self.assertTrue(self.proxy.relay.flows)  # it is still read
        answered = client.rest()
        self.assertEqual((answered.whole, answered.body), (True, event(1) + body))

    def test_who_finds_one_line_too_slow_goes_on_to_the_next_upstream_and_hears_of_it(self):
        busy, other = self.silent_stub("a"), self.silent_stub("b")
        self.start_many({"a": busy, "b": other}, EARLY_STREAM_SECONDS="0.3", QUEUE_SECONDS="0.1", UPSTREAM_ORDER="a,b",
                        UPSTREAM_A_MODELS="m", UPSTREAM_B_MODELS="m", UPSTREAM_A_MAX_CONCURRENCY=1)
        self.connect().send(call())
        busy.next()
        client = self.connect().send(call("next", stream=True))
        asked = other.next()
        client.head()
        client.expect(b": waiting for the model\n\n")
        asked.send(STREAM + LAST)
        self.assertTrue(client.rest().whole)

    def test_all_lines_together_take_no_longer_than_one_and_are_told_as_one(self):
        stubs = {name: self.silent_stub(name) for name in ("one", "two")}
        self.start_many(stubs, QUEUE_SECONDS="0.3", UPSTREAM_ORDER="one,two", **{
            "UPSTREAM_%s_%s" % (name.upper(), setting): value
            for name in stubs for setting, value in (("MODELS", "m"), ("MAX_CONCURRENCY", 1))})
        for name, stub in stubs.items():
            self.connect().send(request("POST", "/%s%s" % (name, CHAT), chat()))
            asked = stub.next()
        answered = self.ask(call("next"))
        self.assertEqual(answered.status, 503)
        self.assertIn(int(answered.get("x-queue-ms")), range(300, 550))
        client = self.connect().send(call("next"))
        wait_for(lambda: self.proxy.routes.by_name["one"].line.told()["waiting"])
        asked.send(answer())
        asked.finish()
        asked = stubs["two"].next()
        asked.send(answer())
        self.assertGreaterEqual(int(client.read().get("x-queue-ms")), 300)

    def test_addresses_have_no_weight(self):
        self.start(None, MAX_CONCURRENCY=1, KEY_WEIGHTS="127.0.0.1=3")
        self.connect().send(call())
        self.stub.next()
        self.assertEqual([guest.weight for guest in self.proxy.routes.base.line.guests.values()], [1])

    def test_a_caller_who_has_its_answer_may_call_again_at_once(self):
        self.start(MAX_CONCURRENCY=1, MAX_QUEUE=0)
        client = self.connect()
        for _ in range(20):
            self.assertEqual(client.send(call()).read().status, 200)


class EarlyStreamTest(ProxyCase):
    def start_early(self, *arguments, **settings):
        self.start(*arguments, **{"EARLY_STREAM_SECONDS": "0.05", **settings})

    def test_a_stream_that_waits_begins_with_comments_and_goes_on_unchanged(self):
        self.start_early(None)
        client = self.connect().send(call(stream=True))
        asked = self.stub.next()
        head = client.head()
        self.assertEqual((head.status, head.get("content-type"), head.get("x-ratelimit-remaining")),
                         (200, "text/event-stream", "999"))
        client.expect(b": waiting for the model\n\n")
        asked.send(STREAM + chunk(event(1)) + chunk(event(2)) + LAST)
        asked.finish()
        answered = client.rest()
        self.assertEqual((answered.whole, answered.body), (True, b": waiting for the model\n\n" + event(1) + event(2)))
        self.assert_ending("ok", left=999)
        self.assertEqual(self.ask_again(client), 200)

    def ask_again(self, client):
        self.stub.answer = says()
        return client.send(call()).read().status

    def test_every_ten_seconds_there_is_another_comment(self):
        self.start_early(None)
        with mock.patch.object(llm_proxy.Watch, "SPEAK_SECONDS", 0.05):
            client = self.connect().send(call(stream=True))
            asked = self.stub.next()
            client.head()
            client.expect(b": waiting for the model\n\n" * 3)
            asked.send(answer(event(1), "200 OK", "Content-Type: text/event-stream"))
            asked.finish()
            self.assertTrue(client.rest().whole)
        self.assertEqual(client.answered.body.replace(b": waiting for the model\n\n", b""), event(1))

    def test_in_line_it_is_told_how_many_are_ahead(self):
        self.start_early(None, MAX_CONCURRENCY=1)
        first = self.connect().send(call("a"))
        asked = self.stub.next()
        second = self.connect().send(call("b"))
        line = self.proxy.routes.base.line
        wait_for(lambda: line.told()["waiting"] == 1)
        third = self.connect().send(call("c", stream=True))
        third.head()
        third.expect(b": waiting, 1 ahead\n\n")
        for client in (first, second):
            asked.send(answer())
            asked.finish()
            client.read()
            asked = self.stub.next()
        asked.send(STREAM + chunk(event(1)) + LAST)
        asked.finish()
        self.assertTrue(third.rest().body.endswith(event(1)))
        self.assertTrue(third.answered.whole)

    def test_a_caller_of_http_1_0_gets_it_unframed(self):
        self.start_early(None)
        client = self.connect().send(request("POST", CHAT, chat(stream=True), version="1.0"))
        asked = self.stub.next()
        client.head()
        client.expect(b": waiting for the model\n\n")
        asked.send(STREAM + chunk(event(1)) + LAST)
        self.assertEqual(client.rest().body, b": waiting for the model\n\n" + event(1))

    def test_what_goes_wrong_then_is_an_error_event_and_a_cut(self):
        anthropic = request("POST", "/v1/messages", chat(stream=True, max_tokens=1))
        told = b'{"error":{"message":"too long","code":7}}'
        could_not = "The upstream could not be reached or did not answer properly"
        table = [
            (call(stream=True), says(told, "400 Bad Request"), b"data: " + told, "upstream_status"),
            (call(stream=True), says(b"not JSON", "500 Oops"), b"did not answer with a stream", "upstream_status"),
            (call(stream=True), says(b'{"choices": []}'), b"did not answer with a stream", "upstream_status"),
            (call(stream=True), Asked.close, could_not.encode(), "upstream_failed"),
            (anthropic, says(told, "400 Bad Request"), b"event: error\ndata: " + told, "upstream_status"),
            (anthropic, Asked.close, b'event: error\ndata: {"type": "error"', "upstream_failed")]
        self.start_early(None, BREAKER_FAILURES=100)
        for number, (data, act, expected, outcome) in enumerate(table):
            with self.subTest(data=data[:40], expected=expected):
                client = self.connect().send(data)
                asked = self.stub.next()
                client.head()
                client.expect(b": waiting for the model\n\n")
                act(asked)
                asked.finish()
                answered = client.rest()
                self.assertFalse(answered.whole)
                self.assertIn(expected, answered.body)
                self.assertTrue(answered.body.endswith(b"\n\n"))
                self.assert_ending(outcome, left=1000, number=number)

    def test_a_stream_that_breaks_off_later_is_told_so_between_two_events(self):
        self.start_early(None)
        for sent, told in ((chunk(event(1)), True), (chunk(event(1)) + chunk(b"data: {"), False),
                           (chunk(event(1)) + b"20\r\ndata", False)):
            with self.subTest(sent=sent):
                client = self.connect().send(call(stream=True))
                asked = self.stub.next()
                client.head()
                client.expect(b": waiting for the model\n\n")
                asked.send(STREAM + sent)
                client.expect(event(1))
                asked.close()
                answered = client.rest()
                self.assertEqual((answered.whole, b"upstream_error" in answered.body), (False, told))

    def test_nothing_is_put_into_what_a_caller_has_not_taken(self):
        self.start_early(None, MAX_CALL_SECONDS="0.5")
        client = self.connect(receive_buffer=2048).send(call(stream=True))
        asked = self.stub.next()
        client.head()
        client.expect(b": waiting for the model\n\n")
        next(iter(self.server.open)).setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        asked.send(STREAM + chunk(event(1)))
        client.expect(event(1))
        asked.send(chunk(b"data: " + b"x" * 14000 + b"\n\n"))
        wait_for(lambda: any(flow.unsent for flow in self.proxy.relay.flows))
        self.entry()
        answered = client.rest()
        self.assertEqual((answered.whole, b"error" in answered.body), (False, False))

    def test_half_an_event_that_was_held_back_is_not_mistaken_for_a_whole_one(self):
        self.start_early(None, TOKEN_COST_MODE="usage", MAX_TOKENS=100000)
        client = self.connect().send(call(stream=True))
        asked = self.stub.next()
        client.head()
        client.expect(b": waiting for the model\n\n")
        asked.send(STREAM + chunk(event(1)) + chunk(event(2)[:30]))
        client.expect(event(1))
        asked.close()
        answered = client.rest()
        self.assertEqual((answered.whole, answered.body.endswith(event(1) + event(2)[:30])), (False, True))

    def test_where_early_streams_are_on_a_stream_whose_head_came_at_once_is_kept_alive_too(self):
        with mock.patch.object(llm_proxy.Relay, "TICK", 0.01), mock.patch.object(llm_proxy.Watch, "SPEAK_SECONDS", 0.05):
            self.start_early(None)
            client = self.connect().send(call(stream=True))
            asked = self.stub.next()
            asked.send(STREAM)
            client.head()
            client.expect(b": waiting for the model\n\n")
            asked.send(chunk(event(1)) + LAST)
            self.assertTrue(client.rest().whole)

    def test_a_stream_that_is_compressed_has_no_room_for_comments(self):
        with mock.patch.object(llm_proxy.Relay, "TICK", 0.01):
            self.start(None, STREAM_HEARTBEAT_SECONDS="0.05")
            client = self.connect().send(request("GET", "/v1/responses/r?stream=true", b"", "Accept-Encoding: gzip"))
            asked = self.stub.next()
            asked.send(STREAM.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n"))
            client.head()
            self.assertFalse(select.select([client.sock], [], [], 0.15)[0])
            asked.send(chunk(b"\x1f\x8b") + LAST)
            self.assertEqual(client.rest().body, b"\x1f\x8b")

    def test_what_is_no_stream_and_what_comes_soon_stays_as_it_was(self):
        self.start_early(None)
        client = self.connect().send(call())
        asked = self.stub.next()
        self.assertFalse(select.select([client.sock], [], [], 0.1)[0])
        asked.send(answer())
        asked.finish()
        self.assertEqual(client.read().body, b'{"said": "hi"}')
        self.stub.answer = says(b"{}", "400 Bad Request")
        self.assertEqual(self.ask(call(stream=True)).status, 400)

    def test_gemini_has_no_comments_because_its_clients_take_them_for_data(self):
        self.start_early(None, STREAM_HEARTBEAT_SECONDS="0.05")
        with mock.patch.object(llm_proxy.Relay, "TICK", 0.01):
            path = "/v1beta/models/m:streamGenerateContent?alt=sse"
            client = self.connect().send(request("POST", path, b'{"contents": []}'))
            asked = self.stub.next()
            self.assertFalse(select.select([client.sock], [], [], 0.1)[0])
            asked.send(STREAM + chunk(event(1)))
            client.head()
            client.expect(event(1))
            self.assertFalse(select.select([client.sock], [], [], 0.1)[0])
            asked.send(LAST)
            asked.finish()
            self.assertTrue(client.rest().whole)

    def test_a_caller_who_leaves_meanwhile_is_noticed(self):
        self.start_early(None)
        client = self.connect().send(call(stream=True))
        asked = self.stub.next()
        client.head()
        client.expect(b": waiting for the model\n\n")
        client.close()
        asked.wait_for_hang_up()
        self.assertEqual(self.entry()["outcome"], "caller_gone")

    def test_a_pause_in_a_running_stream_is_filled_between_two_events(self):
        comment = b": waiting for the model\n\n"
        table = [(STREAM, chunk), (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", bytes)]
        for head, framed in table:
            with self.subTest(head=head), mock.patch.object(llm_proxy.Relay, "TICK", 0.01):
                self.start(None, STREAM_HEARTBEAT_SECONDS="0.05")
                client = self.connect().send(call(stream=True))
                asked = self.stub.next()
                asked.send(head + framed(event(1)))
                client.head()
                client.expect(event(1) + comment * 2)
                half = event(2)[:9]
                asked.send(framed(half))
                body = b""
                while not body.endswith(half):  # one more comment may have come before it
                    body += next(client.pieces)
                self.assertEqual(body.replace(comment, b""), half)
                self.assertFalse(select.select([client.sock], [], [], 0.15)[0])
                asked.send(framed(event(2)[9:]) + (LAST if framed is chunk else b""))
                asked.close()
                answered = client.rest()
                self.assertEqual((answered.whole, answered.body.replace(comment, b"")), (True, event(1) + event(2)[9:]))

    def test_a_sized_stream_has_room_for_it_and_an_answer_that_is_none_has_not(self):
        comment = b": waiting for the model\n\n"
        for kind in ("text/event-stream", "application/json"):
            with self.subTest(kind=kind), mock.patch.object(llm_proxy.Relay, "TICK", 0.01):
                self.start(None, STREAM_HEARTBEAT_SECONDS="0.05")
                client = self.connect().send(call(stream=True))
                asked = self.stub.next()
                body = event(1) + event(2)
                asked.send(answer(body, "200 OK", "Content-Type: " + kind)[:-len(event(2))])
                client.head()
                client.expect(event(1) + (comment if kind == "text/event-stream" else b""))
                if kind != "text/event-stream":
                    self.assertFalse(select.select([client.sock], [], [], 0.1)[0])
                asked.send(event(2))
                asked.finish()
                answered = client.rest()
                self.assertEqual((answered.whole, answered.body.replace(comment, b"")), (True, body))

    def test_the_end_of_a_drain_is_told_to_those_whose_stream_has_begun(self):
        self.start_early(None, MAX_CONCURRENCY=1)
        running = self.connect().send(call("a", stream=True))
        asked = self.stub.next()
        waiting = self.connect().send(call("b", stream=True))
        for client in (running, waiting):
            client.head()
        self.assertEqual(self.server.drain(0.05), 2)
        for client in (running, waiting):
            answered = client.rest()
            self.assertFalse(answered.whole)
        self.assertIn(b"try again in a moment", waiting.answered.body)
        asked.finish()

class DeadlinesTest(ManyCase):
    def test_the_first_byte_has_a_time_of_its_own(self):
        self.start(None, FIRST_BYTE_TIMEOUT="0.1", READ_TIMEOUT="5")
        self.assertEqual(self.ask(call()).status, 504)
        self.start(None, FIRST_BYTE_TIMEOUT="5", READ_TIMEOUT="0.1")
        client = self.connect().send(call(stream=True))
        asked = self.stub.next()
        self.assertFalse(select.select([client.sock], [], [], 0.2)[0])
        asked.send(STREAM + chunk(event(1)))
        self.assertFalse(client.read().whole)
        self.assertEqual(self.entry()["outcome"], "upstream_cut")

    def test_a_caller_may_shorten_every_wait_and_lengthen_none(self):
        self.start(None, READ_TIMEOUT="5", BREAKER_FAILURES=1)
        answered = self.ask(call(None, "X-LLM-Proxy-Timeout-Ms: 100"))
        self.assertEqual((answered.status, answered.error()["type"]), (504, "timeout_error"))
        self.assertIsNone(self.stub.next().get("x-llm-proxy-timeout-ms"))
        client = self.connect().send(call(None, "X-LLM-Proxy-Timeout-Ms: 200", stream=True))  # no breaker is open
        self.stub.next().send(STREAM + chunk(event(1)))
        self.assertFalse(client.read().whole)
        self.start(None, READ_TIMEOUT="0.1")
        self.assertEqual(self.ask(call(None, "X-LLM-Proxy-Timeout-Ms: 60000")).status, 504)

    def test_nothing_is_sent_when_nobody_would_wait_for_the_answer(self):
        self.start(None)
        data = call(None, "X-LLM-Proxy-Timeout-Ms: 100", user="x")
        client = self.connect()
        self.send_apart(client, data[:-5])
        self.assertEqual(client.read().status, 408)
        busy, other = self.silent_stub("a"), self.silent_stub("b")
        self.start_many({"a": busy, "b": other}, UPSTREAM_A_MODELS="m", UPSTREAM_A_MAX_CONCURRENCY=1, UPSTREAM_B_MODELS="m")
        self.connect().send(call())
        busy.next()
        self.assertEqual(self.ask(call("next", "X-LLM-Proxy-Timeout-Ms: 100")).status, 504)
        self.assertEqual((busy.calls, other.calls, self.stub.calls), (1, 0, 0))

    def test_it_holds_for_an_error_whose_body_does_not_come(self):
        self.start(None, EARLY_STREAM_SECONDS="0.05", READ_TIMEOUT="9")
        client = self.connect().send(call(None, "X-LLM-Proxy-Timeout-Ms: 200", stream=True))
        asked, began = self.stub.next(), time.monotonic()
        client.head()
        asked.send(b"HTTP/1.1 500 No\r\nContent-Length: 9\r\n\r\n")
        self.assertFalse(client.rest().whole)
        self.assertLess(time.monotonic() - began, 5)

    def test_it_holds_for_one_call_alone(self):
        self.start(None)
        client = self.connect()
        self.assertEqual(client.send(call(None, "X-LLM-Proxy-Timeout-Ms: 50")).read().status, 504)
        self.stub.next()
        client.send(call())
        asked = self.stub.next()
        self.assertFalse(select.select([client.sock], [], [], 0.1)[0])
        asked.send(answer())
        self.assertEqual(client.read().status, 200)

    def test_it_counts_the_time_in_line(self):
        self.start(None, MAX_CONCURRENCY=1)
        client = self.connect().send(call())
        asked = self.stub.next()
        self.assertEqual(self.ask(call(None, "X-LLM-Proxy-Timeout-Ms: 50")).status, 504)
        asked.send(answer())
        asked.finish()
        self.assertEqual(client.read().status, 200)

    def test_what_is_no_number_of_milliseconds_is_a_400(self):
        self.start()
        for text in ("", "0", "-1", "1.5", "soon", "9999999999"):
            with self.subTest(text=text):
                answered = self.ask(call(None, "X-LLM-Proxy-Timeout-Ms: " + text))
                self.assertEqual((answered.status, answered.error()["type"]), (400, "invalid_request_error"))

    def test_an_upload_and_a_reader_that_last_too_long_are_cut(self):
        for data in (request("POST", "/v1/files", b"x" * 10)[:-5], call()[:-5]):
            self.start(None, MAX_CALL_SECONDS="0.2")
            self.assertEqual(self.connect().send(data).read().status, 408)
        self.start(None, MAX_CALL_SECONDS="0.5", MAX_CONCURRENCY=1)
        client = self.connect(receive_buffer=2048).send(call())
        asked = self.stub.next()
        next(iter(self.server.open)).setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        asked.send(answer(b"x" * 100000))
        self.assertEqual(self.entry()["outcome"], "caller_gone")
        self.assertEqual(self.proxy.routes.base.line.running, 0)

    def test_a_call_that_lasts_too_long_is_cut(self):
        self.start(None, MAX_CALL_SECONDS="0.3")
        with mock.patch.object(llm_proxy.Relay, "TICK", 0.01):
            client = self.connect().send(call(stream=True))
            asked = self.stub.next()
            asked.send(STREAM)
            began, number = time.monotonic(), 0
            with contextlib.suppress(OSError):
                while time.monotonic() < began + 5:
                    asked.send(chunk(event(number)))
                    number += 1
                    asked.over.wait(0.02)
        self.assertLess(time.monotonic(), began + 4)
        self.assertFalse(client.read().whole)
        self.assertEqual(self.entry()["outcome"], "upstream_cut")
        client = self.connect().send(call())
        self.assertEqual(client.read().status, 504)


# ------------------------------------------------------------------------------------------------------------
# Upstreams
# ------------------------------------------------------------------------------------------------------------

class UpstreamsTest(ProxyCase):
    def test_two_calls_in_a_row_share_an_upstream_connection(self):
        self.start()
        client = self.connect()
        for _ in range(3):
            self.assertTrue(client.send(call()).read().whole)
        self.entry(2)
        self.ask(call())
        self.assertEqual((self.stub.calls, self.stub.connections), (4, 1))

    def test_a_connection_is_used_again_after_a_stream_has_settled(self):
        """Some upstreams close after a stream although they promised not to: so it has to settle first."""
        self.start(sends(STREAM + chunk(b"x") + LAST, close=False))
        self.ask(call())
        self.entry()
        settled = time.monotonic() + 0.1
        wait_for(lambda: time.monotonic() > settled)
        self.ask(call())
        self.assertEqual((self.stub.calls, self.stub.connections), (2, 1))

    def test_a_connection_is_not_used_again_after_anything_odd(self):
        table = {
            "extra bytes": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}X",
            "an answer nobody asked for": answer(b"{}") + answer(b"poison"),
            "extra bytes behind chunks": STREAM + chunk(b"{}") + LAST + b"HTTP/1.1 200",
            "Connection: close": answer(b"{}", "200 OK", "Connection: close"),
            "Connection: Close among others": answer(b"{}", "200 OK", "Connection: x, Close"),
            "HTTP/1.0": answer(b"{}").replace(b"HTTP/1.1", b"HTTP/1.0"),
            "a body where none may be": b"HTTP/1.1 204 No Content\r\n\r\n{}"}
        for name, data in table.items():
            with self.subTest(name):
                self.start(sends(data, close=False))
                for _ in range(2):
                    self.assertIn(self.ask(call()).body, (b"{}", b""))
                self.assertEqual((self.stub.calls, self.stub.connections), (2, 2))

    def test_a_connection_that_was_closed_or_spoke_while_idle_is_not_used_again(self):
        for late in (b"", b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n"):
            with self.subTest(late=late):
                self.start(None)
                client = self.connect().send(call())
                asked = self.stub.next()
                asked.send(answer())
                client.read()
                self.entry()
                asked.send(late)
                if not late:
                    asked.close()
                client.send(call())
                self.stub.next().send(answer(b"second"))
                self.assertEqual(client.read().body, b"second")
                self.assertEqual(self.stub.connections, 2)

    def test_an_answer_that_is_not_proper_http_is_a_502_that_names_no_address_and_costs_nothing(self):
        table = {
            "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
            "two equal lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
            "a list of lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\n{}",
            "a length with a sign": b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\n{}",
            "a length and chunks": STREAM[:-2] + b"Content-Length: 2\r\n\r\n" + chunk(b"{}") + LAST,
            "another coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n{}",
            "another coding before chunked": STREAM.replace(b"chunked", b"gzip, chunked") + LAST,
            "chunks in HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "another protocol": b"ICY 200 OK\r\n\r\n", "another version": b"HTTP/2 200 OK\r\n\r\n",
            "no version": b"200 OK\r\n\r\n", "a short status": b"HTTP/1.1 20 OK\r\n\r\n",
            "a long status": b"HTTP/1.1 2000 OK\r\n\r\n", "no status": b"HTTP/1.1 OK\r\n\r\n",
            "status 099": b"HTTP/1.1 099 OK\r\n\r\n", "a space too many": b"HTTP/1.1  200 OK\r\n\r\n",
            "HTTP/0.9": b"<html>It works!</html>", "empty lines": b"\r\n\r\n",
            "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
            "a bare CR": b"HTTP/1.1 200 OK\r\nX-A: b\rX-C: d\r\nContent-Length: 2\r\n\r\n{}",
            "bare LFs": b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}",
            "NUL": b"HTTP/1.1 200 OK\r\nX: \x00\r\nContent-Length: 2\r\n\r\n{}",
            "a folded line": b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 2\r\n\r\n{}",
            "a space before the colon": b"HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\n{}",
            "a header of 70 KB": answer(b"{}", "200 OK", "X: " + "x" * 70000),
            "101 fields": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 101 + b"\r\n",
            "half a head": b"HTTP/1.1 200 OK\r\nContent-Le", "nothing": b"",
            "an interim answer alone": b"HTTP/1.1 100 Continue\r\n\r\n",
            "an upgrade": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n" + answer(),
            "interim answers without end": b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 20 + answer(),
            "a broken first chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nXYZ\r\n"}
        self.start()
        for name, data in table.items():
            with self.subTest(name):
                self.stub.answer = sends(data)
                answered = self.ask(call())
                self.assertEqual((answered.status, answered.error()["type"]), (502, "upstream_error"))
                self.assertNotIn("127.0.0.1", str(answered.fields) + answered.body.decode())
                self.assertNotIn(str(self.stub.port), answered.body.decode())
                self.assertEqual(self.left(), 1000)
        self.entry(len(table) - 1)
        self.assertEqual({entry["outcome"] for entry in self.lines.entries()}, {"upstream_failed"})
        self.assertTrue(all(entry["cause"] for entry in self.lines.entries()))

    def test_interim_answers_are_skipped(self):
        hints = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
        for data in (hints + answer(), hints * 5 + answer(), b"HTTP/1.1 100 Continue\r\n\r\n" + answer()):
            self.start(sends(data, close=False))
            client = self.connect()
            for _ in range(2):
                self.assertEqual(client.send(call()).read().body, b'{"said": "hi"}')

    def test_what_a_caller_sends_about_itself_and_its_connection_does_not_go_upstream(self):
        self.start(BASE_API_KEY="sk-upstream")
        never = ["Authorization: Bearer sk-caller", "X-Api-Key: sk-caller", "Api-Key: sk-caller",
                 "X-Goog-Api-Key: sk-caller", "Cookie: session=hush", "X-Forwarded-For: 10.1.2.3",
                 "Forwarded: for=10.1.2.3", "X-Real-IP: 10.1.2.3", "Via: 1.1 me", "X-Forwarded-Host: x",
                 "X-Forwarded-Proto: https", "Proxy-Authorization: Basic x",
                 "Connection: keep-alive, X-Private", "X-Private: hush", "Keep-Alive: timeout=5",
                 "TE: trailers", "Trailer: X", "Upgrade: h2c", "Proxy-Connection: keep-alive"]
        always = ["Accept: text/event-stream", "User-Agent: test/1", "OpenAI-Beta: x", "X-Twice: a",
                  "X-Twice: b", "X-Empty:", "Accept-Language: \xe4"]
        for path in (CHAT, "/v1/files"):
            with self.subTest(path=path):
                self.assertEqual(self.ask(request("POST", path, chat(), *never, *always)).status, 200)
                asked = self.stub.requests[-1]
                for row in always:
                    name, _, value = row.partition(":")
                    self.assertIn((name.lower(), value.strip()), asked.fields)
                self.assertEqual(asked.get("authorization"), "Bearer sk-upstream")
                self.assertEqual(asked.get("host"), "127.0.0.1:%d" % self.stub.port)
                for row in never:
                    if not row.startswith("Authorization"):
                        self.assertIsNone(asked.get(row.partition(":")[0].lower()), row)
                for hidden in (b"sk-caller", b"hush", b"10.1.2.3", b"proxy.test"):
                    self.assertNotIn(hidden, asked.head)

    def test_without_a_key_of_our_own_no_credential_goes_upstream(self):
        self.start()
        self.ask(call("sk-caller"))
        self.assertIsNone(self.stub.requests[0].get("authorization"))

    def test_the_encoding_of_a_metered_answer_stays_readable_and_others_are_the_callers_choice(self):
        self.start()
        for path, coding in ((CHAT, "identity"), ("/v1/files", "gzip")):
            self.ask(request("POST", path, chat(), "Accept-Encoding: gzip"))
            self.assertEqual(self.stub.requests[-1].get("accept-encoding"), coding)

    def test_nothing_in_a_request_chooses_where_it_goes(self):
        self.start(base="/v1")
        other = Stub(says())
        self.addCleanup(other.close)
        there = "127.0.0.1:%d" % other.port
        for data in (request("POST", CHAT, chat(), host=there),
                     request("GET", "http://%s/v1/x" % there, host=there),
                     request("GET", "//%s/x" % there), request("GET", "/@%s/x" % there),
                     request("GET", "/..//%s" % there),
                     request("POST", CHAT, chat(base_url="http://" + there), "X-Forwarded-Host: " + there)):
            self.ask(data)
        self.assertEqual(other.connections, 0)

    def test_a_base_with_a_path_replaces_a_leading_v1_and_a_bare_one_does_not(self):
        table = {
            "": {"/v1/models?x=1": "/v1/models?x=1", "/x": "/x", "/": "/", "/v1": "/v1"},
            "/": {"/v1/models": "/v1/models"},
            "/v1": {"/v1/models": "/v1/models", "/models": "/v1/models", "/v1": "/v1", "/v1/": "/v1/",
                    "/v10/x": "/v1/v10/x"},
            "/api/openai/": {"/v1/models?a=b&c": "/api/openai/models?a=b&c", "/x/v1/y": "/api/openai/x/v1/y",
                             "/": "/api/openai/"}}
        for base, targets in table.items():
            self.start(base=base)
            for path, target in targets.items():
                with self.subTest(base=base, path=path):
                    self.ask(request("GET", path))
                    self.assertEqual(self.stub.requests[-1].target, target)

    def test_a_base_model_replaces_the_callers_and_nothing_else(self):
        self.start(BASE_MODEL="gemma4")
        sent = {"messages": [{"role": "user", "content": "model ä \u2028"}], "temperature": 0.1,
                "x": [1, 10 ** 20, None]}
        for model in ({"model": "anything"}, {"model": None}, {"model": ["x"]}, {}):
            with self.subTest(model=model):
                self.ask(request("POST", CHAT, json.dumps({**model, **sent}).encode()))
                self.assertEqual(self.stub.requests[-1].json(), {"model": "gemma4", **sent})

    def test_without_a_base_model_a_body_passes_byte_for_byte(self):
        self.start()
        body = b' {"model":"m",  "messages":[{"content":"\\u00e4 \xc3\xa4"}],"n":1.0} \r\n'
        self.ask(request("POST", CHAT, body))
        self.assertEqual(self.stub.requests[0].body, body)

    def test_what_an_upstream_says_about_its_connection_and_its_address_is_not_passed_on(self):
        self.start()
        origin = "http://127.0.0.1:%d" % self.stub.port
        self.stub.answer = says(
            b"{}", "201 Made", "Connection: keep-alive, X-Private", "X-Private: hush",
            "Keep-Alive: timeout=5", "Trailer: X", "Proxy-Authenticate: Basic", "Upgrade: h2c",
            "Location: %s/v1/files/1?x" % origin, "Access-Control-Allow-Origin: https://only.example",
            "Access-Control-Allow-Credentials: true", "X-RateLimit-Limit: 5", "X-Request-ID: theirs",
            "X-Other: passed", "Set-Cookie: a=1", "Set-Cookie: b=2", "ETag: \"x\"", "Server: theirs/1",
            "Date: then")
        answered = self.ask(call())
        self.assertEqual((answered.status, answered.body), (201, b"{}"))
        for name in ("x-private", "keep-alive", "trailer", "proxy-authenticate", "upgrade",
                     "access-control-allow-credentials", "connection"):
            self.assertIsNone(answered.get(name), name)
        expected = {"location": "/v1/files/1?x", "access-control-allow-origin": "*",
                    "x-ratelimit-limit": "1000", "x-other": "passed",
                    "set-cookie": "a=1, b=2", "etag": '"x"', "server": "theirs/1", "date": "then",
                    "x-upstream-request-id": "theirs"}
        self.assertEqual({name: answered.get(name) for name in expected}, expected)

    def test_a_redirect_is_told_as_callers_know_the_endpoint(self):
        for base, path, told in (("", "/x", "/x"), ("/v1", "/v1/x", "/v1/x"),
                                 ("/api/v2", "/api/v2/x", "/v1/x"), ("/api", "/apix", "/apix"),
                                 ("/api", "/api", "/v1")):
            with self.subTest(base=base, path=path):
                self.start(base=base)
                self.stub.answer = says(b"", "307 Temporary Redirect",
                                        "Location: http://127.0.0.1:%d%s" % (self.stub.port, path))
                answered = self.ask(request("GET", "/v1/y"))
                self.assertEqual((answered.status, answered.get("location")), (307, told))
        self.stub.answer = says(b"", "302 Found", "Location: https://elsewhere.example/x")
        self.assertEqual(self.ask(request("GET", "/v1/y")).get("location"), "https://elsewhere.example/x")

    def test_upstream_times_are_told_in_unix_nanoseconds(self):
        self.start()
        before = time.time_ns()
        answered = self.ask(call())
        start, stop = (int(answered.get("x-upstream-request-" + name)) for name in ("start", "stop"))
        self.assertTrue(before <= start <= stop <= time.time_ns())


class UploadTest(ProxyCase):
    BLOCK = bytes(range(256)) * 256
    MULTIPART = "Content-Type: multipart/form-data; boundary=x"

    def upload(self, client, chunked, blocks=80):
        """Send a 5 MB upload; -> the SHA-256 of what was sent."""
        framing = CHUNKED if chunked else "Content-Length: %d" % (len(self.BLOCK) * blocks)
        client.send(unsized("/v1/audio/transcriptions", framing, self.MULTIPART))
        digest = hashlib.sha256()
        for _ in range(blocks):
            client.send(chunk(self.BLOCK) if chunked else self.BLOCK)
            digest.update(self.BLOCK)
        if chunked:
            client.send(LAST)
        return digest.hexdigest()

    def test_an_upload_of_any_framing_and_size_arrives_whole_and_unmetered(self):
        self.start(lambda asked: asked.send(answer(asked.digest.encode())), MAX_TOKENS=1, MAX_BODY_BYTES=1000)
        client = self.connect()
        for chunked in (False, True, False):
            with self.subTest(chunked=chunked):
                digest = self.upload(client, chunked)
                self.assertEqual(client.read().body.decode(), digest)
                asked = self.stub.requests[-1]
                self.assertEqual(asked.get("content-type"), "multipart/form-data; boundary=x")
                self.assertEqual((asked.get("content-length") is None, asked.size), (chunked, 5 << 20))
        self.assertEqual(self.left(), 1)

    def test_an_upload_is_passed_on_while_it_comes(self):
        self.start(None, reads=False)
        client = self.connect().send(unsized("/v1/files", CHUNKED))
        asked = self.stub.next()
        pieces = asked.reader.body(asked.fields)
        for piece in (b"one", b"two"):
            client.send(chunk(piece))
            self.assertEqual(next(pieces), piece)
        client.send(LAST)
        self.assertEqual(list(pieces), [])
        asked.send(answer())
        self.assertEqual(client.read().status, 200)

    def test_an_upstream_that_says_no_during_an_upload_is_heard(self):
        def refuse(asked):
            asked.reader.more()
            asked.send(answer(b'{"error": "too large"}', "413 Too Large", "Connection: close"))
            asked.sock.shutdown(socket.SHUT_WR)
            try:
                while asked.sock.recv(65536):
                    pass
            except OSError:
                pass
        self.start(refuse, reads=False)
        for chunked in (False, True):
            with self.subTest(chunked=chunked):
                client = self.connect()
                try:
                    self.upload(client, chunked, blocks=400)
                except OSError:
                    pass  # we were hung up on while sending, which is fine as long as the answer can be read
                answered = client.read()
                self.assertEqual((answered.status, answered.body), (413, b'{"error": "too large"}'))

    def test_broken_chunks_of_an_upload_end_it_on_both_sides(self):
        self.start(None, reads=False)
        client = self.connect().send(unsized("/v1/files", CHUNKED))
        asked = self.stub.next()
        client.send(b"3\r\nabcX")
        answered = client.read()
        self.assertEqual((answered.status, answered.error()["type"]), (400, "invalid_request_error"))
        asked.wait_for_hang_up()


class AddressesTest(ManyCase):
    def start_two(self, *answers, **settings):
        self.boxes = [Stub(answer) for answer in answers]
        for box in self.boxes:
            self.addCleanup(box.close)
        self.start(BASE_API_URL=",".join("http://127.0.0.1:%d/v1" % box.port for box in self.boxes), **settings)

    def test_a_call_goes_to_the_address_with_the_fewest_running_calls_in_turn_where_they_are_equal(self):
        self.start_two(None, None)
        clients = [self.connect().send(call()) for _ in range(6)]
        one, other = [[box.next() for _ in range(3)] for box in self.boxes]
        self.assertEqual(self.states()["base"], {"state": "closed", "in_flight": 6, "addresses": "2/2"})
        for asked in other:
            asked.send(answer())
            asked.finish()
        wait_for(lambda: self.states()["base"]["in_flight"] == 3)
        for _ in range(3):
            self.connect().send(call())
        self.assertEqual([self.boxes[1].next().method for _ in range(3)], ["POST"] * 3)
        self.assertEqual(self.boxes[0].calls, 3)
        for asked in one:
            asked.close()
        self.assertEqual(sorted(client.read().status for client in clients), [200] * 3 + [502] * 3)

    def test_an_address_that_refuses_is_passed_over_at_once_and_no_call_fails(self):
        self.start_two(says(), says())
        self.boxes[0].refuse_connections()
        self.assertEqual([self.ask(call()).status for _ in range(8)], [200] * 8)
        self.assertEqual(self.boxes[1].calls, 8)
        self.assertEqual(self.states()["base"]["in_flight"], 0)

    @unittest.skipUnless(sys.platform.startswith("linux"), "drops what a full queue of connections cannot take")
    def test_an_address_that_does_not_answer_is_passed_over_after_the_open_timeout(self):
        with socket.create_server(("127.0.0.1", 0), backlog=0) as silent, contextlib.ExitStack() as stack:
            for _ in range(4):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(silent.getsockname())
            box = self.stub_of("box")
            self.start(BASE_API_URL="http://127.0.0.1:%d/v1,http://127.0.0.1:%d/v1" % (
                silent.getsockname()[1], box.port), OPEN_TIMEOUT="0.2")
            self.assertEqual([self.came_from(call()) for _ in range(3)], ["box"] * 3)
            self.assertEqual((box.calls, self.left()), (3, 997))

    def test_a_call_that_may_have_run_is_never_sent_again(self):
        self.start_two(*[Asked.close] * 2)
        self.assertEqual(self.ask(call()).status, 502)
        self.assertEqual(sum(box.calls for box in self.boxes), 1)
        self.assert_ending("upstream_failed", left=1000)

    def test_when_one_of_two_boxes_is_killed_no_call_fails_but_those_that_ran_on_it(self):
        """And when it is back, it is used again."""
        self.start_two(says(), says(), BREAKER_SECONDS="0.2", MAX_TOKENS=10 ** 9)
        lost, kept = self.boxes
        ended, failed, over = [], [], threading.Event()

        def work():
            client = self.connect()
            while not over.is_set():
                status = client.send(call()).read().status
                (ended if status == 200 else failed).append(status)
        workers = [threading.Thread(target=work) for _ in range(8)]
        for worker in workers:
            worker.start()
        try:
            wait_for(lambda: lost.calls > 20 and kept.calls > 20)
            lost.close()
            seen, before = kept.calls, len(ended)
            wait_for(lambda: kept.calls > seen + 50 and len(ended) > before + 50)
            at_most = len(failed)
            back = Stub(says(), port=lost.port)
            self.addCleanup(back.close)
            wait_for(lambda: back.calls > 20)
        finally:
            over.set()
            for worker in workers:
                worker.join(PATIENCE)
        self.assertLessEqual(at_most, len(workers))
        self.assertEqual(len(failed), at_most)
        self.assertEqual(self.states()["base"], {"state": "closed", "in_flight": 0, "addresses": "2/2"})


class BreakerTest(ManyCase):
    def test_a_breaker_opens_after_so_many_failures_in_a_row_and_lets_one_call_try(self):
        breaker = llm_proxy.Breaker(3, 30)
        steps = (  # time, what happens, whether a call may then be made, state
            (0, False, True, "closed"), (0, False, True, "closed"), (0, True, True, "closed"),
            (1, False, True, "closed"), (1, None, True, "closed"), (1, False, True, "closed"),
            (2, False, False, "open"), (31, None, False, "open"), (32, "enter", False, "half_open"),
            (33, False, False, "open"), (62, None, False, "open"), (63, "enter", False, "half_open"),
            (64, None, True, "half_open"), (64, "enter", False, "half_open"), (93, "", False, "half_open"),
            (94, "", True, "half_open"), (94, "enter", False, "half_open"), (95, True, True, "closed"))
        for number, (now, what, allowed, state) in enumerate(steps):
            with self.subTest(number=number, now=now):
                if what == "enter":
                    breaker.enter(now)
                elif what != "":
                    breaker.judge(what, now)
                self.assertEqual((breaker.allows(now), breaker.state(now)), (allowed, state))

    def test_a_spare_connection_that_is_closed_under_a_call_says_nothing_of_the_address(self):
        self.start(None, BREAKER_FAILURES=1)
        client = self.connect().send(call())
        asked = self.stub.next()
        asked.send(answer())
        asked.finish()
        self.assertEqual(client.read().status, 200)
        for connections, state in ((1, "closed"), (2, "open")):
            client.send(call())
            self.stub.next().reset()
            self.assertEqual((client.read().status, self.stub.connections), (502, connections))
            self.assertEqual(self.states()["base"]["state"], state)

    def test_an_open_upstream_is_a_503_at_once_that_says_when_to_try_again_and_costs_nothing(self):
        clock = Clock()
        self.start(says(b"{}", "503 No"), clock=clock, BREAKER_FAILURES=2, BREAKER_SECONDS=30)
        self.assertEqual([self.ask(call()).status for _ in range(2)], [503, 503])
        clock.now += 10
        for data, field in ((call(), "type"), (request("POST", "/v1/messages", chat(max_tokens=1)), "type"),
                            (request("POST", "/v1beta/models/m:generateContent", b"{}"), "status")):
            answered = self.ask(data)
            self.assertEqual((answered.status, answered.get("retry-after")), (503, "20"))
            self.assertEqual(answered.get("x-llm-proxy-error-class"), "upstream_open")
            self.assertIn(field, answered.json()["error"])
        self.assertEqual((self.stub.calls, self.left()), (2, 1000))
        self.assertEqual(self.states()["base"], {"state": "open", "in_flight": 0, "addresses": "0/1"})
        clock.now += 21
        self.stub.answer = says()
        self.assertEqual(self.states()["base"]["state"], "half_open")
        self.assertEqual(self.ask(call()).status, 200)
        self.assertEqual(self.states()["base"]["state"], "closed")

    def test_what_counts_as_a_failure(self):
        def hangs_up(asked):
            asked.close()
        counts = {status: True for status in ("502 x", "503 x", "504 x", "529 x")}
        counts.update({status: False for status in ("200 OK", "400 x", "401 x", "404 x", "429 x", "500 x", "501 x")})
        table = [(name, says(b"{}", name), opens) for name, opens in counts.items()]
        table += [("a reset", Asked.reset, True), ("no answer", hangs_up, True), ("nonsense", sends(b"no\r\n\r\n"), False)]
        for name, act, opens in table:
            with self.subTest(name):
                self.start(act, BREAKER_FAILURES=2)
                for _ in range(3):
                    self.ask(call())
                self.assertEqual((self.states()["base"]["state"], self.stub.calls),
                                 ("open", 2) if opens else ("closed", 3))

    def test_a_first_byte_that_does_not_come_counts_and_a_caller_who_leaves_does_not(self):
        self.start(None, READ_TIMEOUT="0.2", BREAKER_FAILURES=2)
        for _ in range(3):
            client = self.connect().send(call())
            asked = self.stub.next()
            client.reset()
            asked.wait_for_hang_up()
        wait_for(lambda: self.states()["base"] == {"state": "closed", "in_flight": 0, "addresses": "1/1"})
        self.assertEqual([self.ask(call()).status for _ in range(3)], [504, 504, 503])

    def test_a_caller_who_leaves_while_its_call_tries_lets_the_next_one_try(self):
        clock = Clock()
        self.start(says(b"{}", "503 No"), clock=clock, BREAKER_FAILURES=1, BREAKER_SECONDS=30)
        self.ask(call())
        clock.now += 31
        self.stub.answer = None
        client = self.connect().send(call())
        asked = self.stub.next()
        self.assertEqual(self.ask(call()).status, 503)
        client.reset()
        asked.wait_for_hang_up()
        wait_for(lambda: self.states()["base"]["in_flight"] == 0)
        self.stub.answer = says()
        self.assertEqual(self.ask(call()).status, 200)

    def test_an_answer_that_asks_for_patience_is_asked_for_again_where_that_is_set(self):
        table = (  # retries, answers, status, calls
            (0, ("503 x", "Retry-After: 0"), 503, 1), (2, ("503 x", "Retry-After: 0"), 503, 3),
            (2, ("429 x", "Retry-After: 0"), 429, 3), (2, ("503 x",), 503, 1), (2, ("429 x", "Retry-After: 6"), 429, 1),
            (2, ("500 x", "Retry-After: 0"), 500, 1), (2, ("429 x", "Retry-After: soon"), 429, 1))
        for retries, told, status, calls in table:
            with self.subTest(retries=retries, told=told):
                self.start(says(b"{}", *told), UPSTREAM_RETRIES=retries)
                self.assertEqual((self.ask(call()).status, self.stub.calls, self.left()), (status, calls, 1000))
        answers = iter([answer(b"{}", "429 x", "Retry-After: 0"), answer(b"[]")])
        self.start(lambda asked: asked.send(next(answers)), UPSTREAM_RETRIES=1)
        self.assertEqual((self.ask(call()).body, self.stub.calls, self.left()), (b"[]", 2, 999))
        self.assertEqual(self.states()["base"]["in_flight"], 0)

    def test_the_log_says_when_an_address_is_left_alone_and_when_it_is_well_again(self):
        clock = Clock()
        self.start(says(b"{}", "503 No"), clock=clock, BREAKER_FAILURES=2, LOG_FORMAT="text")
        for _ in range(3):
            self.ask(call())
        clock.now += 31
        self.stub.answer = says()
        self.ask(call())
        here = "upstream base: http://127.0.0.1:%d " % self.stub.port
        self.assertEqual([wait_for(lambda: self.lines.text().count(here + what)) for what in (
            "failed 2 times in a row, left alone for 30 s\n", "is well again\n")], [1, 1])

    def test_a_list_of_models_neither_opens_nor_closes_a_breaker(self):
        clock = Clock()
        box = self.stub_of("box", says(b"{}", "503 No"))
        self.start_many({"box": box}, base=False, clock=clock, UPSTREAM_BOX_MODELS="*", BREAKER_FAILURES=2)
        for _ in range(3):
            self.ask(request("GET", "/v1/models"))
            clock.now += 61
        self.assertEqual(self.states()["box"]["state"], "closed")
        for _ in range(2):
            self.ask(call())
        clock.now += 31
        box.answer = says(b'{"data": [{"id": "m"}]}')
        self.assertEqual(self.ask(request("GET", "/v1/models")).json()["data"][0]["id"], "m")
        self.assertEqual(self.states()["box"]["state"], "half_open")

    def test_an_upstream_that_tires_of_a_callers_slow_upload_has_not_failed(self):
        self.start(Asked.close, reads=False, BREAKER_FAILURES=1)
        client = self.connect().send(unsized("/v1/files", "Content-Length: 10") + b"x")
        self.assertEqual(client.read().status, 502)
        self.assertEqual(self.states()["base"], {"state": "closed", "in_flight": 0, "addresses": "1/1"})

    def test_an_upload_is_not_asked_for_again(self):
        self.start(says(b"{}", "503 x", "Retry-After: 0"), UPSTREAM_RETRIES=3)
        self.assertEqual(self.ask(request("POST", "/v1/files", b"x" * 100)).status, 503)
        self.assertEqual(self.stub.calls, 1)


class RoutesTest(ManyCase):
    def test_a_prefix_names_an_upstream_and_is_stripped(self):
        box = self.stub_of("box")
        self.start_many({"box": box}, UPSTREAM_BOX_KEY="sk-box", BASE_API_KEY="sk-base")
        for path in ("/v1/chat/completions", "/v1/messages", "/v1/models", "/v1/files/1?a=b", "/other"):
            method = "POST" if path in (CHAT, "/v1/messages") else "GET"
            self.assertEqual(self.came_from(request(method, "/box" + path, chat(max_tokens=1) if method == "POST" else b"",
                                                    key="mine")), "box")
            self.assertEqual(box.requests[-1].target, "/v1/other" if path == "/other" else path)
            self.assertEqual((box.requests[-1].get("authorization") or "") + (box.requests[-1].get("x-api-key") or ""),
                             "sk-box" if path == "/v1/messages" else "Bearer sk-box")
        self.assertEqual(self.stub.calls, 0)
        self.assertEqual([entry["upstream"] for entry in self.lines.entries()][:1], ["box"])

    def test_a_prefix_spelled_otherwise_reaches_the_same_upstream_metered_or_no_named_one(self):
        box = self.stub_of("box")
        self.start_many({"box": box}, MAX_TOKENS=100)
        for number, path in enumerate(("/box//v1/chat/completions", "/box/v1/./chat/completions", "/%62ox/v1/chat/completions",
                                       "//box/v1/chat/completions", "/BOX/v1/chat/completions",
                                       "/box/v1/chat/completions/", "/box/v1/chat%2fcompletions")):
            with self.subTest(path=path):
                answered = self.ask(request("POST", path, chat()))
                self.assertIn(answered.status, (200, 400))
                self.assertEqual(self.left(), 100 - self.stub.calls - box.calls)

    def test_a_model_names_an_upstream_the_first_that_serves_it_else_the_base(self):
        one, two = self.stub_of("one"), self.stub_of("two")
        self.start_many({"one": one, "two": two}, UPSTREAM_ONE_MODELS="gpt-*,o3", UPSTREAM_TWO_MODELS="gpt-5,claude-*",
                        MODEL_ALIASES="fast=claude-5,slow=theirs", BASE_MODEL="gemma4")
        table = {"gpt-5": "one", "o3": "one", "claude-5": "two", "fast": "two", "GPT-5": "base", "o3-mini": "base",
                 "": "base", "slow": "base"}
        for model, name in table.items():
            with self.subTest(model=model):
                self.assertEqual(self.came_from(call(model=model)), name)
        self.assertEqual([asked.json()["model"] for asked in two.requests], ["claude-5", "claude-5"])
        self.assertEqual({asked.json()["model"] for asked in self.stub.requests}, {"gemma4"})
        self.assertEqual(self.came_from(request("POST", "/v1/audio/speech", b"{}")), "base")
        path = "/v1beta/models/%s:generateContent"
        self.assertEqual([self.came_from(request("POST", path % model, b"{}")) for model in ("gpt-5", "fast")], ["one", "two"])
        self.assertEqual((one.requests[-1].target, two.requests[-1].target),
                         ("/v1" + path % "gpt-5", "/v1" + path % "claude-5"))

    def test_a_model_that_no_upstream_serves_is_a_404_that_names_it(self):
        self.start_many({"one": self.stub_of("one")}, base=False, UPSTREAM_ONE_MODELS="gpt-*")
        answered = self.ask(call(model="claude-5"))
        self.assertEqual((answered.status, answered.error()["code"], answered.error()["type"]),
                         (404, "model_not_found", "invalid_request_error"))
        self.assertIn("'claude-5'", answered.error()["message"])
        answered = self.ask(request("POST", "/v1/messages", chat(model="claude-5", max_tokens=1)))
        self.assertEqual((answered.status, answered.json()["error"]["type"]), (404, "not_found_error"))
        self.assertEqual(self.ask(request("GET", "/v1/files")).status, 404)
        self.assertEqual(self.left(), 1000)

    def test_a_key_that_is_set_replaces_the_callers_and_passthrough_shows_it(self):
        table = {"sk-set": "sk-set", "passthrough": "mine", "": None}
        for key, sent in table.items():
            stubs = {name: self.stub_of(name) for name in ("openai", "anthropic", "gemini")}
            self.start_many(stubs, BASE_API_KEY="sk-base", **{
                "UPSTREAM_%s_KEY" % name.upper(): key for name in stubs})
            self.ask(request("POST", "/openai" + CHAT, chat(), key="mine"))
            self.ask(request("POST", "/anthropic/v1/messages", chat(max_tokens=1), "x-api-key: mine"))
            self.ask(request("POST", "/gemini/v1beta/models/m:generateContent?key=mine", b"{}"))
            with self.subTest(key=key):
                found = [(stub.requests[0].get("authorization"), stub.requests[0].get("x-api-key"),
                          stub.requests[0].get("x-goog-api-key")) for stub in stubs.values()]
                self.assertEqual(found, [(sent and "Bearer " + sent, None, None), (None, sent, None), (None, None, sent)])
                self.assertFalse(any("mine" in stub.requests[0].target for stub in stubs.values()))

    def test_a_caller_of_a_passthrough_upstream_is_its_own_credential(self):
        self.start_many({"openai": self.stub_of("openai")}, UPSTREAM_OPENAI_KEY="passthrough", MAX_TOKENS=5)
        self.ask(request("POST", "/openai" + CHAT, chat(), key="mine"))
        self.assertEqual((self.left("mine"), self.left("another")), (4, 5))

    def test_a_credential_cannot_spell_lines_of_its_own(self):
        openai = self.stub_of("openai")
        self.start_many({"openai": openai}, UPSTREAM_OPENAI_KEY="passthrough")
        for key in ("k%0d%0aX-Real-IP:%209.9.9.9", "k%0aX:y", "%00", "k%0d%0a%0d%0aGET%20/%20HTTP/1.1%0d%0a%0d%0a"):
            with self.subTest(key=key):
                self.assertEqual(self.ask(request("GET", "/openai/v1/models?key=" + key)).status, 400)
        self.assertEqual(openai.connections, 0)

    def test_a_field_that_is_set_for_an_upstream_is_the_only_one_of_its_name(self):
        box = self.stub_of("box")
        self.start_many({"box": box}, UPSTREAM_BOX_KEY="k", UPSTREAM_BOX_DIALECT="anthropic", UPSTREAM_BOX_MODELS="*",
                        UPSTREAM_BOX_HEADERS="anthropic-version: 1 | content-type: text/x | X-API-Key: other")
        self.ask(request("POST", "/box/v1/messages", chat(max_tokens=1), "anthropic-version: 2", "content-type: a/b"))
        self.ask(request("GET", "/v1/models"))
        for asked in box.requests:
            self.assertEqual([asked.get(name) for name in ("anthropic-version", "content-type", "x-api-key")],
                             ["1", "text/x", "other"])

    def test_a_redirect_keeps_the_prefix(self):
        box = self.stub_of("box")
        self.start_many({"box": box}, UPSTREAM_BOX_MODELS="m")
        box.answer = says(b"", "302 Found", "Location: http://127.0.0.1:%d/v1/other" % box.port)
        client = self.connect()
        found = [client.send(data).read(data[:4].decode().strip()).get("location") for data in (
            call(), request("GET", "/box/v1/files"), call())]
        self.assertEqual(found, ["/v1/other", "/box/v1/other", "/v1/other"])

    def test_a_callers_own_key_is_not_shown_to_a_second_vendor(self):
        stubs = {name: self.stub_of(name) for name in ("one", "two")}
        stubs["one"].refuse_connections()
        self.start_many(stubs, UPSTREAM_ONE_MODELS="m", UPSTREAM_TWO_MODELS="m", UPSTREAM_ONE_KEY="passthrough",
                        UPSTREAM_TWO_KEY="passthrough")
        self.assertEqual(self.ask(call("mine")).status, 502)
        self.assertEqual(stubs["two"].calls, 0)

    def test_one_connection_may_reach_many_upstreams_and_each_sees_its_own_key_and_model(self):
        """The same head may go to each of them: only the model in the body differs."""
        stubs = {name: self.stub_of(name) for name in ("one", "two")}
        settings = {"UPSTREAM_%s_%s" % (name.upper(), what): value % name for name in stubs
                    for what, value in (("KEY", "sk-%s"), ("MODELS", "%s-*"), ("MODEL", "served-by-%s"),
                                        ("HEADERS", "X-Box: %s"))}
        self.start_many(stubs, BASE_API_KEY="sk-base", **settings)
        client = self.connect()
        for model in ("one-a", "two-a", "xxx-a") * 3:
            client.send(call("mine", "X-Box: forged", model=model)).read()
        for name, stub in list(stubs.items()) + [("base", self.stub)]:
            for asked in stub.requests:
                self.assertEqual((asked.get("authorization"), asked.get("x-box"), asked.json()["model"]),
                                 ("Bearer sk-" + name, "forged" if name == "base" else name,
                                  "xxx-a" if name == "base" else "served-by-" + name))
            self.assertEqual(stub.calls, 3)

    def test_what_openai_clients_ask_of_gemini_goes_where_it_speaks_their_api(self):
        gemini = self.stub_of("gemini")
        self.start(UPSTREAM_GEMINI_URL="http://127.0.0.1:%d" % gemini.port, UPSTREAM_GEMINI_KEY="k",
                   UPSTREAM_GEMINI_MODELS="gemini-*")
        table = {("POST", "/gemini/v1/chat/completions"): ("/v1beta/openai/chat/completions", "authorization"),
                 ("POST", "/v1/chat/completions"): ("/v1beta/openai/chat/completions", "authorization"),
                 ("GET", "/gemini/v1/models"): ("/v1beta/openai/models", "authorization"),
                 ("GET", "/gemini/v1beta/models"): ("/v1beta/models", "x-goog-api-key"),
                 ("GET", "/gemini/v1beta/openai/models"): ("/v1beta/openai/models", "authorization"),
                 ("POST", "/gemini/v1/models/gemini-2:generateContent"): ("/v1/models/gemini-2:generateContent",
                                                                          "x-goog-api-key")}
        for (method, path), (target, header) in table.items():
            with self.subTest(method=method, path=path):
                shown = "mine" if header == "authorization" else None
                self.ask(request(method, path, chat(model="gemini-2") if method == "POST" else b"", key=shown))
                asked = gemini.requests[-1]
                self.assertEqual((asked.target, bool(asked.get(header))), (target, True))

    def test_a_name_that_gemini_spells_in_two_ways_is_one_model(self):
        gemini = self.stub_of("gemini")
        self.start_many({"gemini": gemini}, UPSTREAM_GEMINI_MODELS="gemini-*", LIMITS="model:gemini-2 1 requests per day")
        self.assertEqual(self.came_from(call(model="models/gemini-2")), "gemini")
        self.assertEqual(gemini.requests[0].json()["model"], "gemini-2")
        for model in ("gemini-2", "models/gemini-2"):
            self.assertIn("limit reached", self.ask(call(model=model)).body.decode())

    def test_what_is_asked_of_a_model_without_using_it_goes_where_the_model_is_and_is_free(self):
        stubs = {name: self.stub_of(name) for name in ("one", "two")}
        self.start_many(stubs, base=False, UPSTREAM_ONE_MODELS="claude-*", UPSTREAM_TWO_MODELS="gem-*", MAX_TOKENS=5,
                        MODEL_ALIASES="fast=claude-5")
        table = (("POST", "/v1/messages/count_tokens", chat(model="fast"), "one", "/v1/messages/count_tokens"),
                 ("POST", "/v1beta/models/gem-1:countTokens", b"{}", "two", "/v1/v1beta/models/gem-1:countTokens"),
                 ("GET", "/v1/models/fast", b"", "one", "/v1/models/claude-5"),
                 ("GET", "/v1/models/gem-1", b"", "two", "/v1/models/gem-1"))
        for method, path, body, name, target in table:
            with self.subTest(path=path):
                self.assertEqual(self.came_from(request(method, path, body)), name)
                self.assertEqual(stubs[name].requests[-1].target, target)
        self.assertEqual(stubs["one"].requests[0].json()["model"], "claude-5")
        self.assertEqual(self.ask(request("GET", "/v1/models/other")).error()["code"], "model_not_found")
        self.assertEqual(self.left(), 5)

    def test_content_that_is_null_beside_tool_calls_is_empty_text_for_those_that_need_it(self):
        message = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
        for name, content in (("deepseek", ""), ("other", None)):
            stub = self.stub_of(name)
            self.start_many({name: stub})
            self.ask(request("POST", "/" + name + CHAT, chat(messages=[message, {"role": "user", "content": None}])))
            first, second = stub.requests[0].json()["messages"]
            self.assertEqual((first, second["content"]), ({**message, "content": content}, None))

    def test_upstreams_of_one_model_are_tried_in_order_while_nothing_was_sent(self):
        stubs = {name: self.stub_of(name) for name in ("one", "two", "three")}
        models = {"UPSTREAM_%s_MODELS" % name.upper(): "m" for name in stubs}
        self.start_many(stubs, UPSTREAM_ORDER="one,two,three", BREAKER_FAILURES=1, UPSTREAM_ONE_MODEL="replaced",
                        UPSTREAM_TWO_MAX_CONCURRENCY=1, MAX_QUEUE=0, LIMITS="upstream:one 100 requests per day;"
                        "upstream:two 100 requests per day; upstream:three 1 requests per day", **models)
        self.assertEqual([self.came_from(call()), self.came_from(call())], ["one", "one"])
        stubs["one"].answer = says(b"{}", "503 No")
        self.assertEqual(self.ask(call()).status, 503)  # it was sent
        self.assertEqual(self.came_from(call()), "two")  # one is open
        stubs["two"].answer = None
        client = self.connect().send(call())
        asked = stubs["two"].next()
        self.assertEqual(self.came_from(call()), "three")  # two is at work
        self.assertIn("limit reached", self.ask(call()).body.decode())
        asked.send(answer())
        asked.finish()
        client.read()
        wait_for(lambda: self.states()["two"]["in_flight"] == 0)
        stubs["two"].close()
        stubs["three"].close()
        answered = self.ask(request("POST", "/two" + CHAT, chat()))
        self.assertEqual((answered.status, answered.get("x-llm-proxy-error-class")), (502, None))
        self.assertEqual([asked.json()["model"] for asked in stubs["two"].requests], ["m", "m"])
        levels = {key[0].split(" ")[0]: level[0] for key, level in self.proxy.limits.buckets.levels.items()}
        self.assertEqual(levels, {"upstream:one": 98, "upstream:two": 98, "upstream:three": 0})

    def test_no_field_of_a_call_reaches_another_host(self):
        trap, box = self.stub_of("trap"), self.stub_of("box")
        self.start_many({"box": box}, UPSTREAM_BOX_MODELS="m")
        there = "127.0.0.1:%d" % trap.port
        body = chat(base_url="http://" + there, api_base="http://" + there, url="http://" + there, proxy=there)
        heads = [request("POST", path, body, host=host) for path, host in (
            ("http://%s/v1/chat/completions" % there, there), ("http://%s/v1/chat/completions" % there, "proxy.test"),
            (CHAT, there), ("//%s/v1/chat/completions" % there, "x"), ("/@%s/v1/chat/completions" % there, "x"),
            ("/box/@%s/v1/chat/completions" % there, "x"), ("/box/http://%s/v1/chat/completions" % there, "x"),
            ("/http://%s/v1/chat/completions" % there, "x"), ("/box//%s/v1/chat/completions" % there, "x"),
            ("/box%%2f%%2f%s/v1/chat/completions" % there, "x"), ("/%s/v1/chat/completions" % there, "x"),
            ("/box:%d/v1/chat/completions" % trap.port, "x"), ("/box@%s/v1/chat/completions" % there, "x"),
            ("/box\\@%s/v1/chat/completions" % there, "x"), ("/box/v1/chat/completions?url=http://" + there, "x"),
            ("/box/v1/files?@" + there, "x"), ("/box/..//%s/v1/x" % there, "x"), ("*", there))]
        heads += [request("POST", CHAT, body, "%s: %s" % (name, there)) for name in (
            "X-Forwarded-Host", "Forwarded", "X-Original-URL", "X-Rewrite-URL", "X-Upstream", "Proxy", "X-Host")]
        heads += [b"CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n" % (there.encode(), there.encode())]
        for data in heads:
            with self.subTest(start=data.split(b"\r\n")[0]):
                self.ask(data)
        self.assertEqual(trap.connections, 0)

    def test_the_ledger_and_limits_know_the_upstream(self):
        with tempfile.TemporaryDirectory() as folder:
            self.start_many({"one": self.stub_of("one")}, UPSTREAM_ONE_MODELS="m", DATABASE=os.path.join(folder, "x.db"),
                            LIMITS="upstream:o* 1 requests per day; each 5 requests per day")
            self.assertEqual(self.came_from(call()), "one")
            self.assertIn("limit reached", self.ask(call()).body.decode())
            self.assertEqual([self.came_from(call(model="x")), self.came_from(call(model="x"))], ["base", "base"])
            self.entry(3)
            wait_for(lambda: not self.proxy.books.ledger.queue)
            rows = self.proxy.books.ledger.database.connection.execute(
                "SELECT upstream, outcome, count(*) FROM calls GROUP BY 1, 2 ORDER BY 1, 2").fetchall()
            self.assertEqual(rows, [("base", "ok", 2), ("one", "limited", 1), ("one", "ok", 1)])
            self.doCleanups()


class CatalogueTest(ManyCase):
    @staticmethod
    def lists(*names):
        return says(json.dumps({"object": "list", "data": [{"id": name} for name in names]}).encode())

    def ids(self, *fields):
        return [row["id"] for row in self.ask(request("GET", "/v1/models", b"", *fields)).json()["data"]]

    def test_the_lists_of_all_upstreams_are_one(self):
        stubs = {"one": self.stub_of("one", self.lists("gpt-5", "dall-e", "shared")),
                 "gemini": self.stub_of("gemini", self.lists("models/gemini-2")),
                 "anthropic": self.stub_of("anthropic", self.lists("claude-5")),
                 "down": self.stub_of("down"), "odd": self.stub_of("odd", says(b"[]")),
                 "private": self.stub_of("private", self.lists("hidden"))}
        stubs["down"].refuse_connections()
        self.start_many(stubs, self.lists("gemma4", "shared"), UPSTREAM_ONE_MODELS="gpt-*,shared", UPSTREAM_GEMINI_MODELS="*",
                        UPSTREAM_ANTHROPIC_MODELS="*", UPSTREAM_ANTHROPIC_KEY="k", UPSTREAM_DOWN_MODELS="*",
                        UPSTREAM_ODD_MODELS="*", MODEL_ALIASES="fast=gpt-5")
        self.assertEqual(self.ids(), ["gemma4", "shared", "claude-5", "gemini-2", "gpt-5", "fast"])
        asked = stubs["anthropic"].requests[0]
        self.assertEqual((asked.target, asked.get("x-api-key"), asked.get("anthropic-version")),
                         ("/v1/models?limit=1000", "k", "2023-06-01"))
        listed = self.ask(request("GET", "/v1/models", b"", "anthropic-version: 2023-06-01")).json()
        self.assertEqual((listed["first_id"], listed["has_more"], listed["data"][0]["type"]), ("gemma4", False, "model"))
        listed = self.ask(request("GET", "/v1beta/models", b"", "x-goog-api-key: k")).json()
        self.assertEqual(listed["models"][0]["name"], "models/gemma4")
        self.assertEqual((stubs["private"].calls, self.stub.calls), (0, 1))

    def test_an_upstream_at_its_limit_is_asked_and_one_that_fails_is_asked_again_soon(self):
        clock = Clock()
        box = self.stub_of("box")
        box.answer = None
        self.start_many({"box": box}, self.lists("b"), clock=clock, UPSTREAM_BOX_MODELS="*", UPSTREAM_BOX_MAX_CONCURRENCY=1)
        client = self.connect().send(call())
        asked = box.next()
        box.answer = self.lists("a")
        self.assertEqual(self.ids(), ["b", "a"])
        asked.send(answer())
        asked.finish()
        client.read()
        clock.now += 61
        box.answer = says(b"{}", "500 No")
        self.assertEqual(self.ids(), ["b", "a"])
        clock.now += 6
        box.answer = self.lists("c")
        self.assertEqual(self.ids(), ["b", "c"])

    def test_a_list_is_kept_for_a_minute_and_asked_for_once_by_many(self):
        clock = Clock()
        self.start_many({"one": self.stub_of("one", self.lists("a"))}, self.lists("b"), clock=clock, UPSTREAM_ONE_MODELS="*")
        threads = [threading.Thread(target=self.ids) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual((self.ids(), self.stub.calls), (["b", "a"], 1))
        clock.now += 61
        self.stub.answer = self.lists("c")
        self.assertEqual((self.ids(), self.stub.calls), (["c", "a"], 2))

    def test_an_upstream_that_does_not_answer_is_left_out_in_time(self):
        with mock.patch.object(llm_proxy.Catalogue, "ASK_SECONDS", 0.2):
            silent = self.stub_of("silent")
            silent.answer = None
            self.start_many({"silent": silent}, self.lists("b"), UPSTREAM_SILENT_MODELS="*")
            began = time.monotonic()
            self.assertEqual(self.ids(), ["b"])
            self.assertLess(time.monotonic() - began, 5)
        silent.next().wait_for_hang_up()

    def test_a_model_that_is_set_is_the_list(self):
        stubs = {name: self.stub_of(name) for name in ("one", "two")}
        self.start_many(stubs, BASE_MODEL="gemma4", UPSTREAM_ONE_MODEL="served", UPSTREAM_ONE_MODELS="fast,fa*",
                        UPSTREAM_TWO_MODELS="gpt-5,gpt-*", UPSTREAM_TWO_KEY="passthrough")
        self.assertEqual(self.ids(), ["gemma4", "fast", "gpt-5"])
        self.assertEqual([stub.calls for stub in stubs.values()], [0, 0])


class HttpsTest(ManyCase):
    """Upstreams that speak TLS, with a certificate that nobody vouches for."""

    def setUp(self):
        self.file = pem_file(self)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(self.file)
        self.box = Stub(says(), tls=tls)
        self.addCleanup(self.box.close)
        self.url = "https://127.0.0.1:%d/v1" % self.box.port

    def test_a_certificate_is_checked_unless_that_is_switched_off(self):
        table = (({}, 502), ({"UPSTREAM_CA_FILE": self.file}, 200), ({"UPSTREAM_TLS_VERIFY": "off"}, 200))
        for settings, status in table:
            with self.subTest(settings=list(settings)):
                self.start(BASE_API_URL=self.url, **settings)
                self.assertEqual(self.ask(call()).status, status)
                self.assertEqual(self.entry()["cause"], None if status == 200 else "certificate not trusted")

    def test_a_stream_comes_through_and_a_caller_who_leaves_closes_it(self):
        self.box.answer = None
        self.start(BASE_API_URL=self.url, UPSTREAM_CA_FILE=self.file)
        client = self.connect().send(call(stream=True))
        asked = self.box.next()
        asked.send(STREAM + chunk(event(1)))
        client.head()
        client.expect(event(1))
        client.reset()
        asked.wait_for_hang_up()
        self.assertEqual(self.entry()["outcome"], "caller_gone")

    def test_a_proxy_on_the_way_out_is_asked_to_connect_and_sees_nothing_else(self):
        def connects(asked):
            with socket.create_connection(("127.0.0.1", self.box.port)) as onward:
                asked.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
                there = threading.Thread(target=self.pump, args=(asked.sock, onward), daemon=True)
                there.start()
                self.pump(onward, asked.sock)
                there.join(PATIENCE)
        tunnel = self.stub_of("tunnel", connects)
        way_out = "http://user:hush@127.0.0.1:%d" % tunnel.port
        for no_proxy, calls in (("", 1), ("127.0.0.1", 0)):
            with self.subTest(no_proxy=no_proxy):
                tunnel.requests.clear()
                self.start(BASE_API_URL=self.url, UPSTREAM_CA_FILE=self.file, HTTPS_PROXY=way_out, NO_PROXY=no_proxy)
                self.assertEqual(self.ask(call("mine")).status, 200)
                self.assertEqual(tunnel.calls, calls)
                for asked in tunnel.requests:
                    self.assertEqual((asked.method, asked.target), ("CONNECT", "127.0.0.1:%d" % self.box.port))
                    self.assertEqual(asked.get("proxy-authorization"), "Basic dXNlcjpodXNo")
                self.assertIsNone(self.box.requests[-1].get("proxy-authorization"))
                self.proxy.routes.close_stale(everything=True)

    @staticmethod
    def pump(source, sink):
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                if not data:
                    break
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


# ------------------------------------------------------------------------------------------------------------
# Books
# ------------------------------------------------------------------------------------------------------------

class SettlingTest(ProxyCase):
    """What was held becomes what was used. The estimate of these calls is 3 for the prompt, and their maximum."""
    JSON = {"choices": [{"message": {"content": "x" * 40}}]}

    def start(self, answer=says(), **settings):
        super().start(answer, **{"TOKEN_COST_MODE": "usage", **settings})

    def test_a_surplus_is_given_back_and_a_shortfall_is_a_debt(self):
        table = [(TOLD, 24), ({"prompt_tokens": 1, "completion_tokens": 1}, 2),
                 ({"prompt_tokens": 900, "completion_tokens": 600}, 1500)]
        for told, cost in table:
            with self.subTest(told=told):
                self.start(says(json.dumps({**self.JSON, "usage": told}).encode()))
                answered = self.ask(call(max_tokens=50))
                self.assertEqual(answered.get("x-ratelimit-remaining"), str(max(0, 1000 - cost)))
                record, = self.proxy.limits.buckets.levels.values()
                self.assertEqual(record[0], 1000 - cost)
                self.assertEqual((self.entry()["cost"], self.entry()["estimated"]), (cost, False))

    def test_a_debt_is_waited_for(self):
        self.start(says(json.dumps({"usage": {"prompt_tokens": 1009, "completion_tokens": 1}}).encode()), REFILL_TOKENS=1,
                   REFILL_INTERVAL_SECONDS=60)
        self.ask(call(max_tokens=1))
        said = self.ask(call(max_tokens=1)).json()["choices"][0]["message"]["content"]
        self.assertEqual(said, "limit reached, wait 14 min")  # 10 of debt and 4 of estimate

    def test_an_answer_that_tells_nothing_is_charged_by_its_text_and_marked(self):
        self.start(says(json.dumps(self.JSON).encode()))
        answered = self.ask(call(max_tokens=50))
        self.assertEqual([answered.get("x-llm-" + name) for name in ("input-tokens", "output-tokens", "estimated")],
                         ["3", "10", "true"])
        self.assertEqual((self.entry()["cost"], self.entry()["estimated"]), (13, True))

    def test_how_many_characters_make_a_token_is_learned_by_model(self):
        told = {"prompt_tokens": 5, "completion_tokens": 20}  # 10 and 40 characters: 2 a token
        self.start(says(json.dumps({**self.JSON, "usage": told}).encode()))
        self.ask(call(model="learned"))
        self.stub.answer = says(json.dumps(self.JSON).encode())
        for model, used in (("learned", (5, 20)), ("other", (3, 10))):
            answered = self.ask(call(model=model))
            self.assertEqual([int(answered.get("x-llm-%s-tokens" % name)) for name in ("input", "output")], [*used])

    def test_a_stream_is_asked_for_its_usage_and_the_caller_does_not_see_it(self):
        shown = events(delta("hello"), LAST_DELTA, "[DONE]")
        whole = events(delta("hello"), LAST_DELTA, USAGE_EVENT, "[DONE]")
        table = [(None, True, shown), ({"other": 1}, True, shown), ({"include_usage": True}, True, whole),
                 ({"include_usage": False}, False, whole)]
        for options, asked, seen in table:
            with self.subTest(options=options):
                self.start(sends(STREAM + chunk(whole) + LAST, close=False))
                answered = self.ask(call(stream=True, **({"stream_options": options} if options else {})))
                self.assertEqual((answered.whole, answered.body), (True, seen))
                self.assertEqual(self.stub.requests[-1].json()["stream_options"], {**(options or {}), "include_usage": asked})
                self.assertEqual((self.entry()["cost"], self.left()), (24, 976))

    def test_the_question_changes_nothing_else_of_what_the_caller_wrote(self):
        self.start(sends(STREAM + LAST, close=False))
        body = b' {"stream":true, "temperature":1.0,"seed":1e2,"messages":[],"x":"\\u00e4" }'
        self.ask(request("POST", CHAT, body))
        self.assertEqual(self.stub.requests[-1].body, b'{"stream_options":{"include_usage":true},' + body[2:])

    def test_no_question_is_asked_where_no_rule_needs_the_answer_or_the_api_knows_none(self):
        for settings, path in (({"TOKEN_COST_MODE": "request"}, CHAT), ({"TOKEN_COST_MODE": "estimate"}, CHAT),
                               ({"LIMITS": "each 5 requests per day"}, CHAT), ({}, "/v1/responses"), ({}, "/v1/messages")):
            with self.subTest(settings=settings, path=path):
                self.start(sends(STREAM + LAST, close=False), **settings)
                self.ask(request("POST", path, chat(stream=True)))
                self.assertNotIn("stream_options", self.stub.requests[-1].json())

    def test_an_upstream_that_takes_the_question_for_an_error_is_asked_once_more_without_it_and_remembered(self):
        statuses = iter(("400 Bad Request", "422 No"))

        def strict(asked):
            if "stream_options" in asked.json():
                return asked.send(answer(b'{"error": "unknown field stream_options"}', next(statuses)))
            asked.send(STREAM + chunk(events(delta("hello"), "[DONE]")) + LAST)
        self.start(strict)
        for number, calls in enumerate((2, 3)):
            answered = self.ask(call(stream=True))
            self.assertEqual((answered.status, answered.body), (200, events(delta("hello"), "[DONE]")))
            self.assertEqual(self.stub.calls, calls)
            self.assertEqual((self.entry(number)["cost"], self.entry(number)["estimated"]), (3 + 2, True))

    def test_a_fault_of_another_kind_that_mentions_the_question_is_not_remembered(self):
        self.start(says(b'{"error": "stream_options and more"}', "400 Bad Request"))
        self.assertEqual(self.ask(call(stream=True)).status, 400)
        self.assertEqual((self.stub.calls, self.proxy.routes.base.without_options), (2, set()))

    def test_a_maximum_beyond_all_numbers_is_no_crash(self):
        self.start(LIMITS="each 100 tokens per day; all 1 usd per day")
        for limit in (10 ** 30, 10 ** 400):
            self.assertIn(b"the limit is 100", self.ask(call(max_tokens=limit, model="gpt-4o")).body)

    def test_another_400_is_passed_on_whole(self):
        self.start(says(b'{"error": "too long"}', "400 Bad Request"))
        answered = self.ask(call(stream=True))
        self.assertEqual((answered.status, answered.body, self.stub.calls), (400, b'{"error": "too long"}', 1))
        self.assert_ending("upstream_status", 1000)

    def test_an_event_with_a_length_around_it_is_hidden_too(self):
        whole = events(delta("hello"), LAST_DELTA, USAGE_EVENT, "[DONE]")
        for version in ("1.1", "1.0"):
            self.start(says(whole, "200 OK", "Content-Type: text/event-stream"))
            answered = self.ask(request("POST", CHAT, chat(stream=True), version=version))
            self.assertEqual((answered.whole, answered.body), (True, events(delta("hello"), LAST_DELTA, "[DONE]")))
            self.assertIsNone(answered.get("content-length"))

    def test_a_json_answer_in_pieces_tells_its_cost_in_its_head(self):
        for framing, pieces in (("sized", None), (CHUNKED, None)):
            self.start(None)
            client = self.connect().send(call())
            asked, body = self.stub.next(), json.dumps({**self.JSON, "usage": TOLD}).encode()
            if framing == "sized":
                data = answer(body)
            else:
                data = (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
                        + chunk(body[:9]) + chunk(body[9:]) + LAST)
            for at in range(0, len(data), 40):
                asked.send(data[at:at + 40])
            asked.finish()
            answered = client.read()
            self.assertEqual((answered.body, answered.get("x-llm-output-tokens")), (body, "4"))

    def test_a_json_answer_that_is_cut_is_a_502_and_costs_nothing(self):
        for data in (answer(b"x" * 50)[:-10], b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"):
            self.start(sends(data))
            self.assertEqual(self.ask(call()).status, 502)
            self.assert_ending("upstream_failed", 1000)

    def test_a_json_answer_that_takes_its_time_is_passed_on_as_it_comes(self):
        self.start(None)
        with mock.patch.object(llm_proxy.Reply, "WHOLE_SECONDS", 0.01):
            client = self.connect().send(call(max_tokens=1))
            asked = self.stub.next()
            body = json.dumps({**self.JSON, "usage": TOLD}).encode()
            asked.send(answer(body)[:-10])
            self.assertIsNone(client.head().get("x-llm-input-tokens"))
            asked.send(body[-10:])
            self.assertEqual(client.rest().body, body)
            asked.finish()
        self.assert_ending("ok", 1000 - 24)

    def test_an_answer_that_is_packed_although_nobody_asked_is_guessed_at(self):
        self.start(says(b"\x1f\x8b" + b"x" * 38, "200 OK", "Content-Encoding: gzip"))
        self.ask(call(max_tokens=5))
        self.assertEqual((self.entry()["input"], self.entry()["output"], self.entry()["estimated"]), (3, 10, True))

    def test_money_is_counted_in_millionths_of_millionths(self):
        self.start(says(json.dumps({"usage": {"prompt_tokens": 3, "completion_tokens": 1}}).encode()),
                   LIMITS="each 0.000002 usd per day", RESPONSE_TOKEN_RESERVE=1)
        answered = self.ask(call(model="gpt-4o-mini"))
        self.assertEqual(answered.get("x-llm-cost-usd"), "0.00000105")
        self.assertEqual([answered.get("x-ratelimit-" + name) for name in ("limit", "remaining")], ["0.000002", "0.00000095"])
        said = self.ask(call(model="gpt-4o-mini")).json()["choices"][0]["message"]["content"]
        self.assertIn("limit reached, wait", said)
        self.assertEqual(self.ask(call(model="free")).status, 200)


class BooksTest(ProxyCase):
    def test_a_json_line_tells_who_what_how_long_and_how_much(self):
        self.start(PROXY_API_KEYS="alice=sk-1", MAX_TOKENS=5)
        answered = self.ask(request("POST", CHAT + "?secret=hush", chat(), key="sk-1"))
        entry = self.entry()
        self.assertRegex(entry.pop("time"), r"^20[0-9]{2}-[0-9]{2}-[0-9]{2}T[0-9:]{8}\.[0-9]{3}Z$")
        first, whole = entry.pop("first_ms"), entry.pop("ms")
        self.assertTrue(0 <= first <= whole < PATIENCE * 1000)
        self.assertEqual(entry, {
            "id": answered.get("x-request-id"), "caller": "alice", "method": "POST", "path": CHAT,
            "model": "m", "upstream": "base", "status": 200, "outcome": "ok", "cause": None, "stream": False, "cost": 1,
            "remaining": 4, "input": 3, "output": 0, "estimated": True, "usd": None, "bytes": 14, "queue_ms": None})

    def test_a_text_line_tells_the_same(self):
        self.start(PROXY_API_KEYS="alice=sk-1", MAX_TOKENS=5, LOG_FORMAT="text")
        answered = self.ask(request("POST", CHAT + "?secret=hush", chat(stream=True), key="sk-1"))
        row = wait_for(self.lines.text)
        self.assertRegex(row, r"^20\S+Z alice POST /v1/chat/completions m 200 ok stream first=[0-9.]+ms"
                              r" all=[0-9.]+ms cost=1 left=4 in=~3 out=~0 bytes=14 upstream=base id=\S+\n$")
        self.assertIn(" id=%s\n" % answered.get("x-request-id"), row)

    def test_there_is_one_line_for_every_call_whatever_its_ending(self):
        self.start(MAX_TOKENS=1)
        client = self.connect()
        for data in (call(), call(), request("GET", "/v1/models"), request("POST", CHAT, b"{"),
                     request("OPTIONS", CHAT), b"nonsense\r\n\r\n"):
            client.send(data).read(data.split(b" ")[0].decode())
        rows = wait_for(lambda: self.lines.entries()[5:] and self.lines.entries())
        self.assertEqual([(row["status"], row["outcome"]) for row in rows], [
            (200, "ok"), (200, "limited"), (200, "ok"), (400, "refused"), (204, "ok"), (400, "refused")])
        self.assertEqual(len(self.lines.text().splitlines()), 6)

    def test_what_a_caller_sends_cannot_break_or_forge_a_line(self):
        models = ("a\nb", "a\r\x1b[31mred", "two words", "\x00", "ä€\U0001f600", '"quoted"', "x" * 256,
                  "", "-", "\u2028", "\x7f\x9b")
        for log_format in ("text", "json"):
            self.start(LOG_FORMAT=log_format)
            client = self.connect()
            for model in models:
                client.send(call(model=model)).read()
            wait_for(lambda: self.lines.data.count(b"id") >= len(models) and self.lines.data.endswith(b"\n"))
            rows = self.lines.text().split("\n")
            self.assertEqual(len(rows), len(models) + 1)
            for model, row in zip(models, rows):
                with self.subTest(log_format=log_format, model=model[:20]):
                    self.assertTrue(row.isascii() and row.isprintable(), row)
                    if log_format == "text":
                        self.assertEqual(len(row.split(" ")), 17, row)
                        self.assertLess(len(row), 1000)
                    else:
                        self.assertEqual(json.loads(row)["model"], model[:80])

    def test_a_log_that_nobody_reads_drops_lines_and_counts_them_but_blocks_no_call(self):
        self.start()
        log, gate, blocked = self.proxy.books.log, threading.Event(), threading.Event()
        self.addCleanup(gate.set)
        write = self.lines.write

        def stuck(data):
            blocked.set()
            gate.wait(PATIENCE)
            return write(data)
        self.lines.write, log.ROOM = stuck, 10
        client = self.connect()
        client.send(call()).read()
        self.assertTrue(blocked.wait(PATIENCE))
        for _ in range(25):
            self.assertEqual(client.send(call()).read().status, 200)
        wait_for(lambda: log.dropped == 15, "the last of them")
        gate.set()
        wait_for(lambda: "15 log lines dropped" in self.lines.text(), "the count")
        self.assertEqual(len(self.lines.entries()), 11)

    def test_a_log_that_takes_little_at_a_time_or_fails_is_no_reason_to_stop(self):
        self.start()
        write = self.lines.write
        self.lines.write = lambda data: write(data[:7])
        self.ask(call())
        self.assertEqual(self.entry()["status"], 200)

        def fail(_):
            failures.append(1)
            raise OSError(errno.ENOSPC, "no space left")
        failures, self.lines.write = [], fail
        self.assertEqual(self.ask(call()).status, 200)
        wait_for(lambda: failures)
        self.lines.write = write
        self.ask(call())
        self.assertEqual(self.entry(1)["status"], 200)

    def test_an_identity_of_a_call_is_a_random_uuid(self):
        found = {llm_proxy.new_identity() for _ in range(100)}
        self.assertEqual(len(found), 100)
        version_4 = "^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$"
        for identity in found:
            self.assertRegex(identity, version_4)


# ------------------------------------------------------------------------------------------------------------
# Proxy: how calls end, and what the bucket, the caller and the log are told then
# ------------------------------------------------------------------------------------------------------------

class LedgerCase(ProxyCase):
    def path(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        return os.path.join(folder.name, "llm_proxy.db")

    @staticmethod
    def rows(path):
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute("SELECT * FROM calls ORDER BY rowid")]

    def row(self, path, number=0):
        return wait_for(lambda: self.rows(path)[number:number + 1], "a row in the ledger")[0]


class LedgerTest(LedgerCase):
    def test_one_row_tells_all_of_a_call(self):
        path = self.path()
        told = {"prompt_tokens": 1000, "completion_tokens": 20, "total_tokens": 1020,
                "prompt_tokens_details": {"cached_tokens": 600}, "completion_tokens_details": {"reasoning_tokens": 5}}
        self.start(says(json.dumps({"usage": told}).encode()), DATABASE=path, BASE_MODEL="gpt-4o-mini",
                   PROXY_API_KEYS="alice=sk-1", LIMITS="each 100000 tokens per day; all 3 usd per day", IMAGE_TOKENS=7)
        answered = self.ask(request("POST", CHAT + "?a=b", chat(max_tokens=50), key="sk-1"))
        row = self.row(path)
        picodollars = (400 * 150000 + 600 * 75000 + 20 * 600000)
        self.assertAlmostEqual(row.pop("time"), time.time(), delta=PATIENCE)
        self.assertTrue(0 <= row.pop("first_ms") <= row.pop("ms") < PATIENCE * 1000)
        self.assertEqual(row, {
            "id": answered.get("x-request-id"), "caller": "alice", "address": "127.0.0.1", "method": "POST", "path": CHAT,
            "dialect": "openai", "model": "m", "served": "gpt-4o-mini", "upstream": "base", "status": 200, "outcome": "ok",
            "cause": None, "stream": 0, "input": 1000, "cached": 600, "cache_write": 0, "output": 20, "reasoning": 5,
            "estimated": 0, "usd": picodollars / 1e12, "picodollars": picodollars, "unpriced": 0, "held": 53,
            "charges": "each 100000 tokens per day=1020;all 3 usd per day=%d" % picodollars,
            "bytes": len(answered.body), "queue_ms": None})
        self.assertEqual([answered.get("x-llm-" + name) for name in ("input-tokens", "output-tokens", "cost-usd",
                                                                    "estimated")], ["1000", "20", "0.000117", None])
        self.assertEqual(answered.get("x-ratelimit-limit"), "100000")

    def test_a_file_of_before_a_column_was_added_is_widened_and_keeps_its_rows(self):
        path = self.path()
        with mock.patch.object(llm_proxy, "COLUMNS", llm_proxy.COLUMNS[:-1]), mock.patch.object(
                llm_proxy.Database, "SCHEMA", llm_proxy.Database.SCHEMA.replace(", queue_ms INTEGER", "")):
            database = llm_proxy.Database(path)
            database.connection.execute("INSERT INTO calls (id) VALUES ('old')")
            database.connection.close()
        llm_proxy.Database(path, reading=True).connection.close()
        self.start(DATABASE=path, MAX_CONCURRENCY=1)
        self.ask(call())
        wait_for(lambda: self.rows(path)[1:], "a new row")
        self.assertEqual([(row["id"] == "old", row["queue_ms"]) for row in self.rows(path)], [(True, None), (False, 0)])

    def test_a_row_for_every_ending_and_none_for_pages(self):
        path = self.path()
        self.start(None, DATABASE=path, MAX_TOKENS=1, PROXY_API_KEYS="sk-1")
        self.stub.answer = says(b"no", "503 Busy")
        for data in (call("sk-1"), request("GET", "/health"), request("OPTIONS", CHAT), call("wrong"), b"nonsense\r\n\r\n"):
            self.ask(data, "GET")
        self.stub.answer = says(json.dumps({"usage": TOLD}).encode())
        for data in (call("sk-1"), call("sk-1"), request("GET", "/v1/files", key="sk-1")):
            self.ask(data)
        self.row(path, 4)
        rows = [(row["status"], row["outcome"], row["input"], row["charges"] or "") for row in self.rows(path)]
        self.assertEqual(sorted(rows), [  # those of different connections come in any order
            (200, "limited", 0, ""), (200, "ok", 0, ""), (200, "ok", 20, "each 2 tokens per 300s burst 1=1"),
            (401, "refused", 0, ""), (503, "upstream_status", 0, "")])

    def test_models_that_no_file_could_hold_are_written_all_the_same(self):
        path = self.path()
        self.start(DATABASE=path)
        models = ["\ud800", "a\x00b", "\U0001f600", "'; DROP TABLE calls; --"]
        for model in models:
            self.assertEqual(self.ask(call(model=model)).status, 200)
        self.row(path, 3)
        self.assertEqual([row["model"] for row in self.rows(path)], ["\\ud800", *models[1:]])

    def test_buckets_survive_a_restart_with_the_refill_of_the_time_in_between(self):
        path, clock = self.path(), Clock()
        rules = "each 10 requests per 100s; all 100 tokens per day"
        told = json.dumps({"usage": {"prompt_tokens": 140, "completion_tokens": 10}}).encode()
        self.start(says(told), clock=clock, DATABASE=path, LIMITS=rules)
        for _ in range(3):
            self.ask(call("k", max_tokens=1)) if self.stub.calls == 0 else None
        self.proxy.books.close(PATIENCE)
        later = Clock(0.0)  # another boot: the monotonic clock begins again
        later.time_ns = lambda: clock.time_ns() + 5 * 10 ** 9
        self.start(says(told), clock=later, DATABASE=path, LIMITS=rules + "; address 5 requests per day")
        levels = {key[0]: self.proxy.limits.buckets.now(record[2], record, 0.0)[0]
                  for key, record in self.proxy.limits.buckets.levels.items()}
        self.assertEqual(levels["all 100 tokens per day"], -50)
        self.assertEqual(levels["each 10 requests per 100s"], 9)
        later.now += 5  # the tenth second
        self.assertEqual(self.ask(request("GET", "/health", key="k")).json()["quota"]["remaining"], 0)
        record = next(record for key, record in self.proxy.limits.buckets.levels.items() if key[0].startswith("each 10"))
        self.assertEqual(self.proxy.limits.buckets.now(record[2], record, later.now)[0], 10)

    def test_old_calls_are_removed_in_the_background(self):
        path = self.path()
        database = llm_proxy.Database(path)
        old = ("old", time.time() - 8 * 86400) + (None,) * (len(llm_proxy.COLUMNS) - 2)
        database.add([old] * 2500 + [("new", time.time() - 6 * 86400) + old[2:]])
        database.connection.close()
        self.start(DATABASE=path, LEDGER_DAYS=7)
        wait_for(lambda: [row["id"] for row in self.rows(path)] == ["new"], "the removal")

    def test_a_full_queue_waits_a_moment_then_drops_and_counts(self):
        path = self.path()
        self.start(DATABASE=path)
        ledger, gate, blocked = self.proxy.books.ledger, threading.Event(), threading.Event()
        self.addCleanup(gate.set)
        ledger.ROOM = 3
        with mock.patch.object(ledger, "turn", lambda: (blocked.set(), gate.wait(PATIENCE))):
            self.assertTrue(blocked.wait(PATIENCE))
            client = self.connect()
            for _ in range(6):
                self.assertEqual(client.send(call()).read().status, 200)
            wait_for(lambda: ledger.dropped == 3)
            self.assertEqual(self.ask(request("GET", "/health")).json()["ledger"], {"queued": 3, "dropped": 3})
        gate.set()
        self.row(path, 2)

    def test_a_full_queue_holds_up_nobody_else(self):
        self.start(DATABASE=self.path())
        ledger, gate, blocked = self.proxy.books.ledger, threading.Event(), threading.Event()
        self.addCleanup(gate.set)
        ledger.ROOM, ledger.PATIENCE = 1, PATIENCE
        with mock.patch.object(ledger, "turn", lambda: (blocked.set(), gate.wait(PATIENCE))):
            self.assertTrue(blocked.wait(PATIENCE))
            began = time.monotonic()
            for _ in range(4):
                self.ask(call())
            self.assertLess(time.monotonic() - began, PATIENCE / 2)
            gate.set()

    def test_what_cannot_be_written_is_told_once_and_tried_again(self):
        path = self.path()
        self.start(DATABASE=path)
        ledger = self.proxy.books.ledger
        with mock.patch.object(ledger.database, "add", side_effect=sqlite3.OperationalError("disk I/O error")):
            self.ask(call())
            wait_for(lambda: "the database cannot be written: disk I/O error" in self.lines.text())
        self.assertEqual(self.row(path)["status"], 200)
        self.assertEqual(self.lines.text().count("cannot be written"), 1)

    def test_the_same_entries_go_to_a_file_of_json_lines(self):
        path = self.path() + ".jsonl"
        self.start(says(json.dumps({"usage": TOLD}).encode()), USAGE_LOG=path)
        answered = self.ask(call())

        def read():
            with open(path, encoding="utf-8") as file:
                return [json.loads(row) for row in file]
        row, = wait_for(read)
        self.assertEqual((row["id"], row["input"], row["output"], row["estimated"]), (answered.get("x-request-id"), 20, 4, False))

    def test_a_file_of_json_lines_that_nobody_reads_holds_up_neither_the_ledger_nor_the_end(self):
        path, (reading, writing) = self.path(), os.pipe()
        self.addCleanup(os.close, reading)
        os.set_blocking(writing, False)
        os.close(os.dup(writing))
        stuck = llm_proxy.Log(open(writing, "wb", buffering=0), as_json=True)
        self.start(DATABASE=path)
        self.proxy.books.usage_log = stuck
        for _ in range(10):
            stuck.say("x" * 60000)
        self.ask(call())
        self.assertEqual(self.row(path)["status"], 200)
        stuck.close(0.2)
        stuck.stream.close()
        self.proxy.books.usage_log = None

    def test_a_foreign_or_damaged_file_is_left_as_it_is(self):
        path = self.path()
        llm_proxy.Database(path).connection.close()
        with open(path, "rb") as file:
            sound = file.read()
        with contextlib.closing(sqlite3.connect(path + "2")) as other:
            other.execute("CREATE TABLE calls (a)")
        with open(path + "2", "rb") as file:
            foreign = file.read()
        for name, data in (("text", b"hello"), ("foreign", foreign), ("cut", sound[:len(sound) // 2]),
                           ("pages overwritten", sound[:4096] + b"x" * (len(sound) - 4096))):
            with self.subTest(name):
                with open(path, "wb") as file:
                    file.write(data)
                for suffix in ("-wal", "-shm"):
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(path + suffix)
                with self.assertRaisesRegex(llm_proxy.DatabaseFault, "left as it is$"):
                    llm_proxy.Database(path)
                with open(path, "rb") as file:
                    self.assertEqual(file.read(), data)


class BalanceTest(LedgerCase):
    """The books balance: what is gone from every bucket is what the ledger says was charged to it."""
    RULES = ("each 1000000 requests per day; each 1000000000 tokens per day; key:k1 900000 output_tokens per hour;"
             "all 5000 usd per month; address 1000000000 input_tokens per week; model:gpt-4o* 500000 requests per hour")
    PATHS = (CHAT, "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/messages",
             "/v1beta/models/gemini-2.5-pro:generateContent", "/v1beta/models/gemini-2.5-pro:streamGenerateContent?alt=sse")
    KINDS = ("ok",) * 6 + ("untold", "error", "cut", "reset", "garbage", "gone", "gone early")

    def answer(self, asked):
        body = asked.json()
        kind, number = body["kind"], body["number"]
        if kind == "error":
            return asked.send(answer(b'{"usage": {"prompt_tokens": 5, "completion_tokens": 5}}', "%d No" % (400 + number % 200)))
        if kind == "garbage":
            asked.send(b"HTTP/9 what\r\n\r\n")
            return asked.close()
        if kind == "gone early":
            return asked.wait_for_hang_up()
        path = asked.target.partition("?")[0]
        if path == "/v1/messages":
            told = ANTHROPIC_EVENTS
            whole = {"content": [{"text": "x" * number}], "usage": {"input_tokens": number, "output_tokens": 3}}
        elif path == "/v1/responses":
            told, whole = RESPONSE_EVENTS, {"usage": {"input_tokens": number, "output_tokens": 9}}
        elif "models" in path:
            told, whole = GEMINI_EVENTS, {"usageMetadata": {"promptTokenCount": number, "candidatesTokenCount": 4}}
        else:
            told = [delta("word " * (number % 30)), LAST_DELTA] + ([USAGE_EVENT] if (
                body.get("stream_options") or {}).get("include_usage") else []) + ["[DONE]"]
            whole = {"choices": [{"message": {"content": "y" * number}}], "usage": {
                "prompt_tokens": number, "completion_tokens": number % 50, "prompt_tokens_details": {"cached_tokens": number // 2}}}
        if not (body.get("stream") or "stream" in path):
            if kind == "untold":
                whole = {"choices": [{"message": {"content": "y" * number}}]}
            if kind in ("ok", "untold"):
                return asked.send(answer(json.dumps(whole).encode()))
            asked.send(answer(json.dumps(whole).encode())[:-4])
            return asked.wait_for_hang_up() if kind == "gone" else asked.reset() if kind == "reset" else asked.close()
        if kind == "untold":
            told = [one for one in told if "usage" not in json.dumps(one)]
        pieces = events(*told)
        if kind in ("ok", "untold"):
            return asked.send(STREAM + b"".join(chunk(pieces[at:at + 90]) for at in range(0, len(pieces), 90)) + LAST)
        asked.send(STREAM + chunk(pieces[:len(pieces) * 2 // 3]))
        return asked.wait_for_hang_up() if kind == "gone" else asked.reset() if kind == "reset" else asked.close()

    def converse(self, seed, count):
        choose = random.Random(seed)
        client = None
        for number in range(count):
            path, kind = choose.choice(self.PATHS), choose.choice(self.KINDS)
            body = {"model": choose.choice(("gpt-4o", "gpt-4o-mini", "claude-sonnet-4", "gemma4")), "kind": kind,
                    "number": choose.randrange(1, 400), "stream": choose.random() < 0.6, "max_tokens": choose.randrange(50),
                    "input": "words " * choose.randrange(20)}
            if choose.random() < 0.2:
                body["stream_options"] = {"include_usage": choose.random() < 0.5}
            client = client or self.connect()
            client.send(request("POST", path, json.dumps(body).encode(), key="sk-%d" % choose.randrange(5)))
            if kind.startswith("gone"):
                if kind == "gone" and "stream" in path + str(body["stream"] and "stream"):
                    client.head()
                (client.reset if number % 2 else client.close)()
                client = None
                continue
            answered = client.read()
            if not answered.whole or answered.get("connection") == "close":
                client.close()
                client = None
        if client:
            client.close()

    def test_every_bucket_lacks_exactly_what_the_ledger_says(self):
        path, threads, each = self.path(), 50, 40
        keys = ",".join("k%d=sk-%d" % (number, number) for number in range(5))
        self.start(self.answer, DATABASE=path, LIMITS=self.RULES, PROXY_API_KEYS=keys, LOG_FORMAT="text")
        buckets = self.proxy.limits.buckets
        buckets.clock = Clock()  # nothing is refilled meanwhile
        running = [threading.Thread(target=self.converse, args=(seed, each)) for seed in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(60)
        wait_for(lambda: not self.server.open, "the end of every call")
        self.proxy.books.close(PATIENCE)
        rows = self.rows(path)
        self.assertEqual(len(rows), threads * each)
        self.assertEqual({"ok", "upstream_status", "upstream_failed", "upstream_cut", "caller_gone"},
                         {row["outcome"] for row in rows})
        charged = collections.Counter()
        for row in rows:
            for text, amount in (part.rsplit("=", 1) for part in (row["charges"] or "").split(";") if part):
                whose = (row["caller"] if text.startswith(("each", "key")) else
                         row["address"] if text.startswith("address") else None)
                charged[text, whose] += int(amount)
            if row["outcome"] in ("upstream_status", "upstream_failed"):
                self.assertEqual((row["charges"], row["input"]), ("", 0))
        names = {llm_proxy.Callers.digest("sk-%d" % number): "k%d" % number for number in range(5)}
        missing = collections.Counter()
        for key, (level, _, rule) in buckets.levels.items():
            whose = names[key[1][1]] if key[0].startswith(("each", "key")) else key[1][1] if len(key) > 1 else None
            missing[key[0], whose] = rule.capacity - level
        self.assertEqual(+charged, +missing)
        self.assertEqual(len(missing), 5 + 5 + 1 + 1 + 1 + 1)
        tokens = sum(row["input"] + row["output"] for row in rows)
        self.assertEqual(tokens, sum(amount for (text, _), amount in charged.items() if " tokens " in text))
        self.assertEqual(sum(row["picodollars"] for row in rows), charged["all 5000 usd per month", None])


class EndingsTest(ProxyCase):
    def test_an_answered_call_costs_its_fixed_price(self):
        self.start(MAX_TOKENS=10)
        self.assertEqual(self.ask(call()).get("x-ratelimit-remaining"), "9")
        self.assert_ending("ok", left=9)

    def test_an_answered_call_costs_its_estimate(self):
        self.start(TOKEN_COST_MODE="estimate")
        self.assertEqual(self.ask(call(max_tokens=7)).get("x-ratelimit-remaining"), "990")
        self.assert_ending("ok", left=990)
        self.assertEqual((self.entry()["cost"], self.entry()["remaining"]), (10, 990))

    def test_every_metered_answer_tells_the_bucket(self):
        self.start(sends(STREAM + chunk(event(1)) + LAST, close=False), clock=Clock(), MAX_TOKENS=10)
        answered = self.ask(call(stream=True))
        names = ("limit", "remaining", "refill-tokens", "refill-seconds", "reset-seconds")
        self.assertEqual([answered.get("x-ratelimit-" + name) for name in names],
                         ["10", "9", "2", "300", "300"])
        self.assertIsNone(self.ask(request("GET", "/v1/x")).get("x-ratelimit-limit"))

    def test_an_error_of_the_upstream_passes_untouched_and_costs_nothing(self):
        self.start(MAX_TOKENS=10)
        for number, (status, body, kind) in enumerate([
                ("400 Bad Request", b'{"error": {"message": "no"}}', "application/json"),
                ("429 Too Many Requests", b"slow down", "text/plain"),
                ("500 Internal Server Error", b"Internal Server Error", "text/plain; charset=utf-8"),
                ("599 Odd", b"", "text/html")]):
            with self.subTest(status=status):
                self.stub.answer = says(body, status, "Content-Type: " + kind, "Retry-After: 7")
                answered = self.ask(call())
                self.assertEqual((answered.status, answered.body), (int(status[:3]), body))
                self.assertEqual((answered.get("content-type"), answered.get("retry-after")), (kind, "7"))
                self.assertEqual(answered.get("x-ratelimit-remaining"), "10")
                self.assert_ending("upstream_status", left=10, number=number)

    def test_an_unknown_key_leaves_the_bucket_alone(self):
        self.start(PROXY_API_KEYS="sk-1")
        self.assertEqual(self.ask(call("sk-2")).status, 401)
        self.assert_ending("refused", left=1000)

    def test_a_limited_call_leaves_the_bucket_alone(self):
        self.start(MAX_TOKENS=10, REQUEST_TOKEN_COST=7)
        self.ask(call())
        self.entry()
        answered = self.ask(call())
        self.assertIn(b"limit reached", answered.body)
        self.assertEqual((answered.get("x-ratelimit-remaining"), self.stub.calls), ("3", 1))
        self.assert_ending("limited", left=3, number=1)
        self.assertEqual((self.entry(1)["cost"], self.entry(1)["remaining"]), (0, 3))

    def test_an_upstream_that_refuses_connections_is_a_502_and_costs_nothing(self):
        self.start()
        self.stub.refuse_connections()
        answered = self.ask(call())
        self.assertEqual((answered.status, answered.error()["type"]), (502, "upstream_error"))
        self.assertNotIn(b"127.0.0.1", answered.body)
        self.assert_ending("upstream_failed", left=1000)
        self.assertEqual(self.entry()["cause"], "connection refused")

    def test_a_silent_upstream_is_a_504_at_the_read_timeout_and_costs_nothing(self):
        self.start(None, READ_TIMEOUT="0.3")
        client = self.connect().send(call())
        asked = self.stub.next()
        answered = client.read()
        self.assertEqual((answered.status, answered.error()["type"]), (504, "timeout_error"))
        asked.wait_for_hang_up()
        self.assert_ending("upstream_failed", left=1000)
        self.assertGreaterEqual(self.entry()["ms"], 290)

    def test_the_read_timeout_runs_between_bytes_of_a_stream_and_not_over_all_of_it(self):
        clock = Clock()
        self.start(None, clock=clock, READ_TIMEOUT=100, REFILL_INTERVAL_SECONDS=1000)
        client = self.connect().send(call())
        asked = self.stub.next()
        asked.send(STREAM)
        client.head()
        for _ in range(5):
            clock.now += 70
            asked.send(chunk(event(1)))
            client.expect(event(1))
        clock.now += 101
        self.assertEqual(client.rest().whole, False)
        asked.wait_for_hang_up()
        self.assert_ending("upstream_cut", left=999)

    HEADS = {"chunked": (STREAM, chunk), "sized": (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", bytes)}
    UNTIL_CLOSE = (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", bytes)

    def test_what_came_before_an_upstream_was_cut_is_delivered_and_the_caller_sees_the_cut(self):
        """Charged is the prompt, 3 tokens, and the 6 characters that the model said, 2 tokens."""
        table = [(name, hang_up, *row)
                 for name, row in self.HEADS.items() for hang_up in (Asked.close, Asked.reset)]
        table.append(("until close", Asked.reset, *self.UNTIL_CLOSE))
        self.start(None, TOKEN_COST_MODE="estimate")
        cases = itertools.product(table, ("1.1", "1.0"))
        for number, ((name, hang_up, head, frame), version) in enumerate(cases):
            with self.subTest(name, hang_up=hang_up.__name__, version=version):
                key, body = "key-%d" % number, chat(stream=True, max_tokens=50)
                client = self.connect().send(request("POST", CHAT, body, key=key, version=version))
                asked = self.stub.next()
                asked.send(head + frame(event(1)))
                client.head()
                client.expect(event(1))
                hang_up(asked)
                answered = client.rest()
                self.assertEqual((answered.whole, answered.body), (False, event(1)))
                spoken = math.ceil(6 / 4) if b"event-stream" in head else math.ceil(len(event(1)) / 4)
                self.assert_ending("upstream_cut", 1000 - 3 - spoken, number, key)

    def test_an_upstream_that_breaks_its_own_framing_is_a_cut(self):
        self.start(None)
        client = self.connect().send(call())
        asked = self.stub.next()
        asked.send(STREAM + chunk(event(1)))
        client.head()
        client.expect(event(1))
        asked.send(b"XYZ\r\n" + event(2))
        answered = client.rest()
        self.assertEqual((answered.whole, answered.body), (False, event(1)))
        asked.wait_for_hang_up()
        self.assert_ending("upstream_cut", left=999)

    def test_a_caller_who_hangs_up_before_the_first_byte_closes_the_upstream(self):
        """Charged is the prompt. Where the system does not tell of hang-ups, the caller's thread looks."""
        for told in sorted({False, llm_proxy.PATIENT}):
            with mock.patch.object(llm_proxy, "PATIENT", told):
                self.start(None, TOKEN_COST_MODE="estimate")
            table = list(itertools.product((Client.close, Client.reset), (True, False)))
            for number, (hang_up, stream) in enumerate(table if told else table[1:3]):
                with self.subTest(told=told, hang_up=hang_up.__name__, stream=stream), (
                        mock.patch.object(llm_proxy, "PATIENT", told)):
                    client = self.connect().send(call("key-%d" % number, stream=stream))
                    asked = self.stub.next()
                    hang_up(client)
                    asked.wait_for_hang_up()
                    self.assert_ending("caller_gone", 1000 - 3, number, "key-%d" % number)

    def test_a_caller_who_half_closed_has_a_moment_for_each_of_its_calls(self):
        self.start(None)
        client = self.connect().send(call() + call())
        client.sock.shutdown(socket.SHUT_WR)
        asked = self.stub.next()
        asked.send(answer(b'{"first": 1}'))
        asked.finish()
        self.assertEqual(client.read().body, b'{"first": 1}')
        self.stub.next().wait_for_hang_up()
        wait_for(lambda: [entry["outcome"] for entry in self.lines.entries()] == ["ok", "caller_gone"])

    @unittest.skipUnless(llm_proxy.PATIENT, "where the system tells of hang-ups")
    def test_a_caller_whose_leaving_its_thread_saw_too_is_not_forgotten(self):
        self.start(None)
        client = self.connect().send(call())
        asked = self.stub.next()
        (watch,) = self.proxy.relay.watches.values()
        client.sock.shutdown(socket.SHUT_WR)
        wait_for(lambda: watch.left)
        watch.left += 0.1
        asked.wait_for_hang_up()

    @unittest.skipUnless(llm_proxy.PATIENT, "where the system tells of hang-ups")
    def test_news_of_a_hang_up_that_come_late_harm_no_other_caller(self):
        """A descriptor's number may be another connection's by then."""
        self.start(None)
        client = self.connect().send(call())
        asked = self.stub.next()
        relay = self.proxy.relay
        (descriptor, watch), = relay.watches.items()
        with mock.patch.object(relay, "hangups") as hangups:
            hangups.poll.return_value = [(descriptor, llm_proxy.HANGUP), (descriptor + 1000, llm_proxy.HANGUP)]
            relay.notice(0)
        self.assertEqual((watch.left, watch.gone), (None, False))
        asked.send(answer())
        self.assertEqual(client.read().status, 200)

    def test_a_caller_who_hangs_up_in_the_middle_of_an_answer_closes_the_upstream(self):
        """Charged is the prompt and what was sent."""
        self.start(None, TOKEN_COST_MODE="estimate")
        table = itertools.product((Client.close, Client.reset), self.HEADS.values())
        for number, (hang_up, (head, frame)) in enumerate(table):
            with self.subTest(hang_up=hang_up.__name__, head=head):
                client = self.connect().send(call("key-%d" % number, max_tokens=50, stream=True))
                asked = self.stub.next()
                asked.send(head + frame(event(1)))
                client.head()
                client.expect(event(1))
                hang_up(client)
                asked.wait_for_hang_up()
                spoken = math.ceil(6 / 4) if b"event-stream" in head else math.ceil(len(event(1)) / 4)
                self.assert_ending("caller_gone", 1000 - 3 - spoken, number, "key-%d" % number)

    def test_a_caller_who_hangs_up_while_its_whole_answer_is_awaited_closes_the_upstream(self):
        self.start(None, TOKEN_COST_MODE="estimate")
        for number, hang_up in enumerate((Client.close, Client.reset)):
            with self.subTest(hang_up=hang_up.__name__):
                client = self.connect().send(call("key-%d" % number, max_tokens=50))
                asked = self.stub.next()
                asked.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{12345")
                wait_for(lambda: self.proxy.routes.base.addresses[0].last is not None)
                hang_up(client)
                asked.wait_for_hang_up()
                self.assert_ending("caller_gone", 1000 - 3 - 2, number, "key-%d" % number)
                self.proxy.routes.base.addresses[0].last = None

    def test_a_caller_who_hangs_up_while_its_answer_keeps_coming_closes_the_upstream(self):
        self.start(None)
        for number, hang_up in enumerate((Client.close, Client.reset)):
            with self.subTest(hang_up=hang_up.__name__):
                client = self.connect().send(call())
                asked = self.stub.next()
                asked.send(STREAM)
                client.head()
                hang_up(client)
                with self.assertRaises(OSError):
                    end = time.monotonic() + PATIENCE
                    while time.monotonic() < end:
                        asked.send(chunk(event(1)))
                        time.sleep(0.005)
                self.assert_ending("caller_gone", left=1000 - (number + 1), number=number)

    def test_a_caller_who_hangs_up_during_its_upload_closes_the_upstream(self):
        self.start(None, reads=False)
        for hang_up in (Client.close, Client.reset):
            with self.subTest(hang_up=hang_up.__name__):
                client = self.connect().send(unsized("/v1/files", CHUNKED))
                asked = self.stub.next()
                client.send(chunk(b"x"))
                self.assertEqual(next(asked.reader.body(asked.fields)), b"x")
                hang_up(client)
                asked.wait_for_hang_up()
        self.assertEqual({self.entry(number)["outcome"] for number in (0, 1)}, {"caller_gone"})

    def test_a_caller_who_only_closed_its_sending_side_still_gets_a_prompt_answer(self):
        self.start()
        client = self.connect().send(call())
        client.sock.shutdown(socket.SHUT_WR)
        answered = client.read()
        self.assertEqual((answered.status, answered.whole), (200, True))
        self.assert_ending("ok", left=999)

    def test_a_bug_of_ours_is_a_500_with_one_traceback_in_the_log_and_costs_nothing(self):
        self.start()
        with mock.patch.object(self.proxy.routes, "find", side_effect=ZeroDivisionError("a bug")):
            answered = self.ask(call())
        self.tracebacks = 1
        self.assertEqual((answered.status, answered.error()["type"]), (500, "server_error"))
        self.assertNotIn(b"bug", answered.body)
        self.assert_ending("internal_error", left=1000)
        wait_for(lambda: "ZeroDivisionError: a bug" in self.lines.text())
        self.assertEqual(self.ask(call()).status, 200)

    def test_a_bug_of_ours_in_the_middle_of_an_answer_is_a_cut_and_costs_nothing(self):
        self.start(None)
        client = self.connect().send(call())
        asked = self.stub.next()
        asked.send(STREAM + chunk(event(1)))
        client.head()
        client.expect(event(1))
        with mock.patch.object(llm_proxy.Chunked, "feed", side_effect=ZeroDivisionError("a bug")):
            asked.send(chunk(event(2)))
            self.assertFalse(client.rest().whole)
        self.tracebacks = 1
        asked.wait_for_hang_up()
        self.assert_ending("internal_error", left=1000)

    @unittest.skipUnless(os.path.isdir("/proc/self/fd") and sys.implementation.name == "cpython",
                         "counts open descriptors")
    def test_a_caller_who_sent_much_ahead_and_hangs_up_is_noticed(self):
        for patient in {llm_proxy.PATIENT, False}:
            with self.subTest(patient=patient), mock.patch.object(llm_proxy, "PATIENT", patient):
                self.start(None)
                client = self.connect().send(call(stream=True))
                asked = self.stub.next()
                asked.send(STREAM + chunk(event(1)))
                client.head()
                client.expect(event(1))
                client.send(b"x" * 100000)
                wait_for(lambda: any(len(flow.caller.ahead) >= llm_proxy.MAX_AHEAD for flow in self.proxy.relay.flows))
                client.reset()
                asked.wait_for_hang_up()

    def test_no_ending_leaves_a_descriptor_or_a_thread_behind(self):
        self.start()
        self.ask(call())

        def settled():
            self.proxy.routes.close_stale(everything=True)
            gc.collect()
            return len(os.listdir("/proc/self/fd")), threading.active_count()
        wait_for(lambda: not self.server.open)
        before = wait_for(lambda: settled() == settled() and settled())
        for act in (says(), says(b"no", "500 No"), sends(b""), sends(b"nonsense\r\n\r\n"),
                    sends(STREAM + chunk(b"x")),
                    sends(STREAM + b"X"), sends(answer() + b"more", close=False)):
            self.stub.answer = act
            for _ in range(5):
                self.ask(call())
                self.connect().send(call()).reset()
        self.stub.refuse_connections()
        self.ask(call())
        wait_for(lambda: settled()[0] <= before[0] and settled()[1] <= before[1],
                 "the return to %d and %d" % before)


# ------------------------------------------------------------------------------------------------------------
# Pages
# ------------------------------------------------------------------------------------------------------------

class PagesTest(ProxyCase):
    def test_health_tells_the_version_the_model_and_the_callers_quota_and_names_no_upstream(self):
        clock = Clock()
        self.start(clock=clock, MAX_TOKENS=10, REQUEST_TOKEN_COST=3, BASE_MODEL="gemma4")
        for _ in range(3):
            self.ask(call("k"))
        clock.now += 100
        answered = self.ask(request("GET", "/health", key="k"))
        quota = {"limit": 10, "remaining": 1, "refill_tokens": 2, "refill_interval_seconds": 300,
                 "wait_seconds": 200}
        told = {"ok": True, "version": llm_proxy.VERSION, "model": "gemma4", "quota": quota,
                "upstreams": {"base": {"state": "closed", "in_flight": 0, "addresses": "1/1"}}}
        self.assertEqual(answered.json(), told)
        self.assertNotIn("127.0.0.1", str(answered.fields) + answered.body.decode())

    def test_health_charges_nothing_and_makes_no_bucket(self):
        self.start(MAX_TOKENS=10)
        for number in range(20):
            self.assertEqual(self.left("key-%d" % number), 10)
        self.assertEqual((len(self.proxy.limits.buckets.levels), self.stub.calls), (0, 0))

    def test_models_are_the_base_model_alone_where_there_is_one_and_the_upstreams_list_otherwise(self):
        self.start(BASE_MODEL="gemma4")
        for path in ("/v1/models", "/models"):
            listed = self.ask(request("GET", path)).json()
            self.assertEqual((listed["object"], [row["id"] for row in listed["data"]]), ("list", ["gemma4"]))
        self.assertEqual(self.stub.calls, 0)
        self.start(says(b'{"object": "list", "data": [{"id": "theirs"}]}'))
        self.assertEqual(self.ask(request("GET", "/v1/models")).json()["data"][0]["id"], "theirs")

    def test_head_of_a_page_is_its_head(self):
        self.start(BASE_MODEL="m")
        client = self.connect()
        for path in ("/health", "/v1/models"):
            full, head = (client.send(request(method, path)).read(method) for method in ("GET", "HEAD"))
            self.assertEqual((head.status, head.get("content-length"), head.body),
                             (200, str(len(full.body)), b""))

    def test_a_preflight_is_a_204_that_allows_what_was_asked_for(self):
        self.start(PROXY_API_KEYS="sk-1")
        answered = self.ask(request("OPTIONS", CHAT, b"", "Origin: https://chat.example",
                                    "Access-Control-Request-Headers: x-a, authorization"))
        self.assertEqual((answered.status, answered.get("content-length")), (204, None))
        self.assertEqual(answered.get("access-control-allow-origin"), "*")
        self.assertEqual(answered.get("access-control-allow-headers"), "x-a, authorization")
        self.assertIn("POST", answered.get("access-control-allow-methods"))
        self.assertEqual(self.stub.calls, 0)

    def test_every_answer_tells_browsers_who_may_read_it(self):
        one, other = "https://one.example", "https://other.example"
        table = {"*": {one: "*", None: "*"},
                 one + ", " + other: {one: one, other: other, "https://evil.example": None, None: None},
                 "off": {one: None}}
        for setting, answers in table.items():
            self.start(CORS_ORIGINS=setting)
            requests = (call(), request("GET", "/health"), request("POST", CHAT, b"{"))
            for (origin, allowed), data in itertools.product(answers.items(), requests):
                with self.subTest(setting=setting, origin=origin):
                    field = b"Origin: %b\r\n" % origin.encode() if origin else b""
                    answered = self.ask(data.replace(b"\r\n", b"\r\n" + field, 1))
                    self.assertEqual(answered.get("access-control-allow-origin"), allowed)
                    if setting.startswith("https"):
                        self.assertIn("Origin", answered.get("vary"))

    def test_a_request_id_is_a_uuid_unless_the_caller_sent_one_which_alone_goes_upstream(self):
        self.start()
        for data in (call(), request("GET", "/health"), b"nonsense\r\n\r\n"):
            self.assertRegex(self.ask(data, "GET").get("x-request-id"),
                             "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
        self.assertIsNone(self.stub.requests[0].get("x-request-id"))
        self.assertEqual(self.ask(call(None, "X-Request-ID: mine-1")).get("x-request-id"), "mine-1")
        self.assertEqual(self.stub.requests[1].get("x-request-id"), "mine-1")
        for odd in ("two words", "x" * 200, "\xe4", ""):
            answered = self.ask(call(None, "X-Request-ID: " + odd))
            self.assertRegex(answered.get("x-request-id"), "^[0-9a-f-]{36}$")


# ------------------------------------------------------------------------------------------------------------
# Handler
# ------------------------------------------------------------------------------------------------------------

class HandlerTest(ProxyCase):
    EXPECTING = "Expect: 100-continue"

    def test_a_connection_carries_one_request_after_another(self):
        self.start()
        client = self.connect()
        for data in (call(), request("GET", "/health"), request("POST", CHAT, b"{"), request("HEAD", "/v1/x"),
                     call(stream=True)):
            answered = client.send(data).read(data.split(b" ")[0].decode())
            self.assertIsNone(answered.get("connection"))

    def test_all_bodies_together_have_no_more_than_their_room(self):
        self.start(None)
        self.assertEqual(self.server.room.left, 256 << 20)
        self.server.room.left = room = 120000
        large = call(user="x" * 100000)
        client = self.connect().send(large)
        asked = self.stub.next()
        answered = self.ask(large)
        self.assertEqual((answered.status, answered.error()["type"]), (503, "server_error"))
        other = self.connect().send(call())
        for one, theirs in ((asked, client), (self.stub.next(), other)):
            one.send(answer())
            one.finish()
            self.assertEqual(theirs.read().status, 200)
        wait_for(lambda: self.server.room.left == room)
        self.connect().send(large[:90000]).reset()
        self.assertEqual(self.entry(3)["outcome"], "caller_gone")
        self.assertEqual(self.server.room.left, room)

    def test_a_caller_who_says_close_is_told_so_and_closed(self):
        self.start()
        for data in (call(None, "Connection: close"), call(None, "connection: x, CLOSE"),
                     request("GET", "/health", b"", version="1.0")):
            client = self.connect().send(data)
            self.assertEqual(client.read("GET").get("connection"), "close")
            self.assertEqual(client.ending(), "closed")

    def test_a_continue_comes_once_and_only_when_the_body_is_wanted(self):
        self.start()
        for path in (CHAT, "/v1/files"):
            with self.subTest(path=path):
                body = chat()
                client = self.connect().send(request("POST", path, body, self.EXPECTING)[:-len(body)])
                self.assertEqual(client.read().status, 100)
                self.send_apart(client, body[:10], body[10:])
                self.assertEqual(client.read().status, 200)
                self.assertEqual(client.send(call()).read().status, 200)
                self.assertIsNone(self.stub.requests[-1].get("expect"))

    def test_no_continue_comes_where_the_answer_is_no(self):
        self.start(PROXY_API_KEYS="sk-1", MAX_BODY_BYTES=1000)
        for key, length, status in (("sk-2", 5, 401), (None, 5, 401), ("sk-1", 1001, 413),
                                    ("sk-1", 10 ** 14, 413)):
            with self.subTest(key=key, length=length):
                client = self.connect().send(unsized(CHAT, self.EXPECTING, "Content-Length: %d" % length,
                                                     key=key))
                self.assertEqual(client.read().status, status)
                self.assertEqual(client.ending(), "closed")

    def test_a_body_that_comes_without_waiting_for_the_continue_is_taken(self):
        self.start()
        client = self.connect().send(call(None, self.EXPECTING))
        answered = client.read()
        if answered.status == 100:
            answered = client.read()
        self.assertEqual(answered.status, 200)

    def test_any_other_expectation_is_a_417(self):
        self.start()
        self.assertEqual(self.ask(call(None, "Expect: 200-ok")).status, 417)
        self.assertEqual(self.stub.calls, 0)

    def test_a_metered_body_in_a_coding_is_refused(self):
        self.start()
        self.assertEqual(self.ask(call(None, "Content-Encoding: gzip")).status, 415)
        self.assertEqual(self.ask(request("POST", "/v1/files", b"x", "Content-Encoding: gzip")).status, 200)
        self.assertEqual(self.stub.requests[0].get("content-encoding"), "gzip")

    def test_a_metered_body_that_is_too_large_is_a_413_in_both_framings(self):
        self.start(MAX_BODY_BYTES=1000)
        fits = chat()[:-1] + b" " * (1000 - len(chat())) + b"}"
        self.assertEqual(self.ask(request("POST", CHAT, fits)).status, 200)
        self.assertEqual(self.ask(request("POST", CHAT, fits + b" ")).status, 413)
        chunks = unsized(CHAT, CHUNKED)
        self.assertEqual(self.ask(chunks + chunk(fits) + LAST).status, 200)
        self.assertEqual(self.ask(chunks + chunk(fits) + chunk(b" ") + LAST).status, 413)
        self.assertEqual(self.stub.calls, 2)

    def test_a_body_may_come_one_byte_at_a_time_in_both_framings(self):
        self.start()
        client = self.connect()
        chunks = b"".join(chunk(bytes([byte])) for byte in chat()) + LAST
        for head, body in ((request("POST", CHAT, chat())[:-len(chat())], chat()),
                           (unsized(CHAT, CHUNKED), chunks)):
            client.send(head)
            for byte in body:
                client.send(bytes([byte]))
            self.assertEqual(client.read().status, 200)
            self.assertEqual(self.stub.requests[-1].body, chat())

    def test_an_early_answer_can_be_read_every_time(self):
        """3 MB of the body are on their way when the 401 is sent; a careless close would be a reset."""
        self.start(PROXY_API_KEYS="sk-1")
        data = request("POST", CHAT, b"x" * 3000000, key="sk-2")
        for number in range(20):
            client = self.connect()
            sender = threading.Thread(target=self.quietly, args=(client.send, data))
            sender.start()
            answered = client.read()
            self.assertEqual((answered.status, answered.whole, answered.get("connection")),
                             (401, True, "close"), number)
            sender.join(PATIENCE)
            client.close()

    @staticmethod
    def quietly(act, *arguments):
        try:
            act(*arguments)
        except OSError:
            pass

    def test_a_refused_body_that_came_whole_does_not_end_the_connection(self):
        self.start(PROXY_API_KEYS="sk-1")
        client = self.connect()
        chunks = unsized(CHAT, CHUNKED) + chunk(chat()) + LAST
        for data in (call("sk-2"), chunks):
            self.assertEqual(client.send(data).read().status, 401)
        self.assertEqual(client.send(call("sk-1")).read().status, 200)

    def test_a_refusal_does_not_wait_for_the_rest_of_a_chunk(self):
        self.start(PROXY_API_KEYS="sk-1")
        chunks = unsized(CHAT, CHUNKED)
        for start in (b"", b"5", b"5\r\nhel", b"5\r\nhello\r\n", b"5\r\nhello\r\n0\r\n"):
            with self.subTest(start=start):
                self.assertEqual(self.connect().send(chunks + start).read().status, 401)

    def test_broken_chunks_of_a_metered_call_are_a_400_that_ends_the_connection(self):
        self.start()
        chunks = unsized(CHAT, CHUNKED)
        for body in (b"5\nhello", b"+5\r\nhello\r\n", b"5\r\nhelloX\r\n", b"0\r\nX y\r\n\r\n"):
            with self.subTest(body=body):
                client = self.connect().send(chunks + body)
                self.assertEqual(client.read().status, 400)
                self.assertEqual(client.ending(), "closed")
        self.assertEqual((self.stub.calls, self.left()), (0, 1000))

    def test_a_caller_who_leaves_before_its_body_is_complete_is_charged_nothing(self):
        self.start()
        for hang_up in (Client.close, Client.reset):
            hang_up(self.connect().send(call()[:-5]))
        for number in (0, 1):
            self.assert_ending("caller_gone", left=1000, number=number)
        self.assertEqual(self.stub.calls, 0)

    def test_a_head_that_does_not_come_in_time_is_a_408(self):
        self.start()
        with mock.patch.object(llm_proxy.Handler, "HEAD_SECONDS", 0.5):
            client = self.connect().send(b"GET /health HTTP/1.1\r\nHost: x\r\n")
            self.assertEqual((client.read().status, client.ending()), (408, "closed"))

    def test_a_body_that_does_not_come_in_time_is_a_408(self):
        self.start()
        with mock.patch.object(llm_proxy.RequestBody, "FREE_SECONDS", 0.2):
            client = self.connect().send(call()[:-1])
            self.assertEqual((client.read().status, client.ending()), (408, "closed"))

    def test_an_idle_connection_is_closed_without_a_word(self):
        self.start()
        with mock.patch.object(llm_proxy.Handler, "IDLE_SECONDS", 0.1):
            client = self.connect()
            client.send(call()).read()
            self.assertEqual(client.ending(), "closed")

    def test_errors_do_not_tell_who_we_are(self):
        self.start()
        answered = self.ask(b"nonsense\r\n\r\n", "GET")
        self.assertIsNone(answered.get("server"))
        self.assertNotIn("python", (str(answered.fields) + answered.body.decode()).lower())


# ------------------------------------------------------------------------------------------------------------
# Server
# ------------------------------------------------------------------------------------------------------------

class ServerTest(ProxyCase):
    def assert_turned_away(self, client):
        answered = client.read()
        self.assertEqual((answered.status, answered.error()["type"], answered.whole),
                         (503, "server_error", True))
        self.assertEqual(client.ending(), "closed")

    def test_connections_beyond_the_cap_get_a_503_and_room_is_made_again(self):
        self.start(MAX_CONNECTIONS=2)
        first, second = self.connect(), self.connect()
        for client in (first, second):
            self.assertEqual(client.send(call()).read().status, 200)
        self.assert_turned_away(self.connect().send(call()))
        self.assertEqual(self.stub.calls, 2)
        self.assertEqual(second.send(call()).read().status, 200)
        first.close()
        wait_for(lambda: len(self.server.open) < 2)
        self.assertEqual(self.ask(call()).status, 200)

    def test_one_address_has_a_cap_of_its_own_unless_it_speaks_for_others(self):
        for settings, admitted in (({"MAX_CONNECTIONS_PER_ADDRESS": 2}, 2), ({}, 4),
                                   ({"MAX_CONNECTIONS_PER_ADDRESS": 2, "TRUSTED_PROXIES": "127.0.0.0/8"}, 4)):
            with self.subTest(settings=settings), mock.patch.object(llm_proxy.Server, "MOST_PER_ADDRESS", 2):
                self.start(**settings)
                clients = [self.connect().send(call()) for _ in range(4)]
                self.assertEqual([client.read().status for client in clients], [200] * admitted + [503] * (4 - admitted))
                clients[0].close()
                wait_for(lambda: len(self.server.open) < admitted)
                self.assertEqual(self.ask(call()).status, 200)
        wait_for(lambda: len(self.server.open) == 3)
        self.assertEqual(self.server.by_address, {"127.0.0.1": 3})

    @unittest.skipUnless(sys.platform == "linux", "only Linux has all of 127.0.0.0/8")
    def test_other_addresses_than_loopback_have_a_cap_by_default(self):
        self.start()
        found = {host: self.server.most_of(host, llm_proxy.address_of(host)) for host in (
            "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "192.0.2.1", "2001:db8::1")}
        self.assertEqual(list(found.values()), [math.inf] * 4 + [256] * 2)

    def test_where_no_thread_can_be_started_a_caller_gets_a_503_and_nothing_is_left_behind(self):
        self.start()
        with no_threads() as attempts:
            self.assert_turned_away(self.connect().send(call()[:-100]))  # a head that comes in pieces takes one
        self.assertEqual((len(self.server.open), len(attempts)), (0, 1))
        self.assertEqual(self.ask(call()).status, 200)

    @unittest.skipUnless(llm_proxy.PATIENT, "takes epoll")
    def test_calls_streams_and_bodies_that_come_in_pieces_take_no_thread(self):
        self.start(None)
        client = self.connect()
        with no_threads() as attempts:
            for data in (call(), call(stream=True), call(messages="x" * 50000)):
                client.send(data[:-5])
                self.send_apart(client, data[-5:-2], data[-2:])
                asked = self.stub.next()
                asked.send(STREAM)
                client.head()
                asked.send(chunk(event(1)) + LAST)
                asked.finish()
                self.assertTrue(client.rest().whole)
            self.assertEqual(client.send(request("GET", "/health")).read().status, 200)
        self.assertEqual(attempts, [])

    def test_where_no_descriptor_is_left_accepting_is_no_busy_loop(self):
        self.start()
        attempts = []

        def fail(_):
            attempts.append(time.monotonic())
            raise OSError(errno.EMFILE, "too many open files")
        with mock.patch.object(socketserver.TCPServer, "get_request", fail):
            client = self.connect().send(call())
            wait_for(lambda: len(attempts) >= 3)
        self.assertGreater(attempts[2] - attempts[0], 0.1)
        self.assertEqual(client.read().status, 200)

    def test_draining_closes_idle_connections_and_lets_a_running_stream_finish(self):
        self.start(None)
        idle, fresh, running = self.connect(), self.connect(), self.connect()
        idle.send(request("GET", "/health")).read()
        running.send(call())
        asked = self.stub.next()
        asked.send(STREAM + chunk(event(1)))
        running.head()
        running.expect(event(1))
        wait_for(lambda: len(self.server.open) == 3)
        cut = []
        drainer = threading.Thread(target=lambda: cut.append(self.server.drain(PATIENCE)))
        drainer.start()
        self.assertEqual((idle.ending(), fresh.ending()), ("closed", "closed"))
        with self.assertRaises(OSError):
            Client(self.address)
        asked.send(chunk(event(2)) + LAST)
        answered = running.rest()
        self.assertEqual((answered.whole, answered.body), (True, event(1) + event(2)))
        self.assertEqual(running.ending(), "closed")
        drainer.join(PATIENCE)
        self.assertEqual(cut, [0])

    def test_what_still_runs_when_the_time_is_up_is_cut(self):
        self.start(None)
        client = self.connect().send(call())
        asked = self.stub.next()
        asked.send(STREAM + chunk(event(1)))
        client.head()
        client.expect(event(1))
        self.assertEqual(self.server.drain(0.05), 1)
        self.assertFalse(client.rest().whole)
        asked.wait_for_hang_up()
        self.assertEqual(self.entry()["outcome"], "stopped")

    def test_a_burst_of_connections_is_taken(self):
        self.start()
        clients = [self.connect() for _ in range(100)]
        for client in clients:
            client.send(request("GET", "/health"))
        self.assertEqual({client.read().status for client in clients}, {200})


@unittest.skipUnless(llm_proxy.PATIENT, "takes epoll")
class ThreadlessTest(ProxyCase):
    """Calls in the Relay's thread, where they meet what makes them wait."""

    def test_a_request_that_its_upstream_takes_slowly_goes_on_in_a_thread(self):
        body = chat(messages="x" * 10_000_000)
        with mock.patch.object(llm_proxy.RequestBody, "AT_ONCE", len(body)):
            self.start()
            client = self.connect()
            for _ in range(2):
                self.assertEqual(client.send(request("POST", CHAT, body)).read().status, 200)
                self.assertEqual(self.stub.requests[-1].digest, hashlib.sha256(body).hexdigest())
        self.assertEqual(self.stub.connections, 1)

    def test_answers_that_are_taken_slowly_come_whole_and_in_their_order(self):
        bodies = [b"%d" % number * 40_000 for number in range(3)]
        answers = iter(bodies)
        with mock.patch.object(llm_proxy.Relay, "ROUND_SECONDS", 0):  # a step of one call in each round
            self.start(lambda asked: asked.send(answer(next(answers))))
            client = self.connect(receive_buffer=2048)
            wait_for(lambda: self.server.open)
            next(iter(self.server.open)).setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
            client.send(call() * len(bodies))
            other = self.connect()
            wait_for(lambda: any(watch.party.unsent for watch in list(self.proxy.relay.watches.values())))
            self.assertEqual(other.send(request("GET", "/health")).read().status, 200)
            self.assertEqual([client.read().body for _ in bodies], bodies)
            self.assertEqual(len(wait_for(lambda: len(self.lines.entries()) == 3 and self.lines.entries())), 3)

    def test_an_upload_that_was_answered_early_but_came_whole_loses_no_later_request(self):
        size, send = 100_000, llm_proxy.Watch.send

        def send_no_block(watch, wire, data, seconds):
            """As where the upstream has spoken and reads no more, while the caller has sent all."""
            if bytes(data[:1]) != b"x":
                return send(watch, wire, data, seconds)
            while len(watch.caller.ahead) < size - len(data):
                watch.caller.readable(PATIENCE)
                watch.caller.fill()
            return False
        self.start(says(b"{}", "403 No"), reads=False)
        client = self.connect()
        with mock.patch.object(llm_proxy.Watch, "send", send_no_block):
            self.assertEqual(client.send(request("POST", "/v1/files", b"x" * size)).read().status, 403)
        self.assertEqual(client.send(request("GET", "/health")).read().status, 200)

    def test_of_two_requests_that_came_before_the_end_both_are_answered(self):
        self.start(None)
        client = self.connect().send(call() * 2)
        asked = self.stub.next()
        drainer = threading.Thread(target=self.server.drain, args=(PATIENCE / 2,))
        drainer.start()
        wait_for(lambda: self.server.draining)
        for asked in (asked, None):
            asked = asked or self.stub.next()
            asked.send(answer())
            asked.finish()
            self.assertEqual(client.read().status, 200)
        drainer.join(PATIENCE)
        self.assertEqual(client.ending(), "closed")

    def test_a_connection_that_is_not_there_at_once_is_awaited_in_a_thread(self):
        self.start()
        with mock.patch.object(llm_proxy.Address, "open_at_once", return_value=None):
            self.assertEqual(self.ask(call()).status, 200)

    def test_a_bug_in_one_call_ends_that_call_alone(self):
        def bug(*_):
            raise ZeroDivisionError("a bug")
        self.start(None)
        for name in ("caller_left", "answered", "more_came", "attend"):
            with self.subTest(name):
                other = self.connect().send(call())
                others = self.stub.next()
                with mock.patch.object(llm_proxy.Handler, name, bug):
                    client = self.connect().send(call())
                    if name != "attend":
                        asked = self.stub.next()
                    if name == "caller_left":
                        client.reset()
                    elif name != "attend":
                        asked.send(answer())
                        asked.finish()
                    self.tracebacks += 1
                    wait_for(lambda: self.lines.data.count(b"Traceback") == self.tracebacks)
                wait_for(lambda: len(self.server.open) == 1)
                if name == "caller_left":
                    asked.wait_for_hang_up()
                others.send(answer())
                others.finish()
                self.assertEqual(other.read().status, 200)
                other.close()
                wait_for(lambda: not self.server.open)
                self.assertFalse(self.server.idle or self.proxy.relay.flows)
                self.assertEqual(self.proxy.routes.base.told()["in_flight"], 0)


class TlsTest(ProxyCase):
    """Callers that come by TLS."""

    def setUp(self):
        self.file = pem_file(self)
        self.context = ssl.create_default_context(cafile=self.file)

    def start_tls(self, *arguments, **settings):
        self.start(*arguments, TLS_CERT_FILE=self.file, **settings)

    def connect_tls(self, context=None):
        client = self.connect()
        client.sock = client.reader.sock = (context or self.context).wrap_socket(client.sock, server_hostname="127.0.0.1")
        return client

    def test_calls_streams_and_uploads_go_as_without_it(self):
        self.start_tls()
        client = self.connect_tls()
        for _ in range(2):
            self.assertEqual(client.send(call()).read().body, b'{"said": "hi"}')
        body = os.urandom(1 << 20)
        self.stub.answer = lambda asked: asked.send(answer(body))
        answered = client.send(request("POST", "/v1/audio", body)).read()
        self.assertEqual((answered.body == body, self.stub.requests[-1].digest), (True, hashlib.sha256(body).hexdigest()))
        events = b"".join(chunk(event(number)) for number in range(200))
        self.stub.answer = sends(STREAM + events + LAST, close=False)
        answered = client.send(call(stream=True)).read()
        self.assertEqual((answered.whole, answered.body), (True, b"".join(event(number) for number in range(200))))

    def test_a_caller_who_leaves_closes_the_upstream(self):
        self.start_tls(None)
        for data in (b"", STREAM + chunk(event(1))):
            for leave in (Client.close, Client.reset):
                client = self.connect_tls().send(call(stream=True))
                asked = self.stub.next()
                if data:
                    asked.send(data)
                    client.head()
                    client.expect(event(1))
                leave(client)
                asked.wait_for_hang_up()
                asked.finish()

    def test_the_end_of_a_body_without_a_length_is_told(self):
        self.start_tls(lambda asked: (asked.send(STREAM + chunk(event(1)) + LAST)))
        client = self.connect_tls()
        client.sock.suppress_ragged_eofs = False
        self.assertEqual(client.send(request("POST", CHAT, chat(stream=True), version="1.0")).read().body, event(1))

    def test_old_versions_are_refused(self):
        self.start_tls()
        old = ssl.create_default_context(cafile=self.file)
        with warnings.catch_warnings():  # Python advises against them, too
            warnings.simplefilter("ignore")
            with contextlib.suppress(ValueError):
                old.minimum_version = ssl.TLSVersion.TLSv1
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with self.assertRaises(OSError):
            self.connect_tls(old)
        self.assertEqual(self.connect_tls().send(call()).read().status, 200)

    def test_plain_http_is_told_what_is_wrong(self):
        self.start_tls()
        client = self.connect().send(call())
        answered = client.read()
        self.assertEqual((answered.status, answered.error()["message"]), (400, "This port speaks https"))
        self.assertEqual(client.ending(), "closed")
        wait_for(lambda: not self.server.open)

    def test_who_does_not_shake_hands_is_closed_in_time_and_holds_up_nobody(self):
        with mock.patch.object(llm_proxy.Handler, "HEAD_SECONDS", 0.2):
            self.start_tls()
            silent, nonsense = self.connect(), self.connect().send(b"\x16\x03\x01\x00\xff" + bytes(255))
            good = self.connect_tls()
            self.assertEqual(good.send(call()).read().status, 200)
            good.close()
            self.assertEqual(silent.ending(), "closed")
            with contextlib.suppress(AssertionError):  # an alert may come first
                nonsense.ending()
            wait_for(lambda: not self.server.open)

    def test_a_head_in_records_that_are_never_whole_has_no_more_time_than_another(self):
        with mock.patch.multiple(llm_proxy.Handler, HEAD_SECONDS=0.3, LINGER_SECONDS=0.1):
            self.start_tls()
            client, out = self.connect(), ssl.MemoryBIO()
            plain = client.sock
            inside = ssl.MemoryBIO()
            tls = self.context.wrap_bio(inside, out, server_hostname="127.0.0.1")
            while True:
                with contextlib.suppress(ssl.SSLWantReadError):
                    tls.do_handshake()
                    break
                plain.sendall(out.read())
                inside.write(plain.recv(65536))
            plain.sendall(out.read())
            tls.write(call())
            record, began = out.read(), time.monotonic()
            with contextlib.suppress(OSError):
                for letter in record[:-1]:
                    plain.sendall(bytes([letter]))
                    if select.select([plain], [], [], 0.02)[0] and not plain.recv(65536):
                        break
            self.assertLess(time.monotonic() - began, 3)
            self.assertEqual(self.stub.calls, 0)
            wait_for(lambda: not self.server.open)

    def test_certificates_are_read_again_and_bad_ones_are_not_taken(self):
        self.start_tls()
        client = self.connect_tls()
        before = self.server.tls
        self.server.reload()
        self.assertIsNot(self.server.tls, before)
        with open(self.file, "w", encoding="ascii") as file:
            file.write("nonsense")
        now = self.server.tls
        with self.assertRaises((OSError, ValueError)):
            self.server.reload()
        self.assertIs(self.server.tls, now)
        for one in (client, self.connect_tls()):
            self.assertEqual(one.send(call()).read().status, 200)

    def test_stopping_ends_an_idle_connection_as_tls_says(self):
        self.start_tls()
        client = self.connect_tls()
        client.sock.suppress_ragged_eofs = False
        self.assertEqual(client.send(call()).read().status, 200)
        self.assertEqual(self.server.drain(PATIENCE), 0)
        self.assertEqual(client.ending(), "closed")

    def test_stopping_does_not_wait_for_a_handshake(self):
        self.start_tls()
        client = self.connect()
        wait_for(lambda: self.server.idle)
        self.assertEqual(self.server.drain(PATIENCE), 0)
        self.assertEqual(client.ending(), "closed")


class AddressFamiliesTest(ProxyCase):
    def test_ipv6_and_ipv4_come_in_by_one_door_and_one_caller_is_one(self):
        try:
            with socket.create_server(("::1", 0), family=socket.AF_INET6):
                pass
        except OSError:
            self.skipTest("this machine has no IPv6")
        self.start(MAX_TOKENS=10)
        server = llm_proxy.Server(self.proxy, "::", 0, 100)
        accepting = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        accepting.start()
        try:
            for host, left in (("127.0.0.1", "9"), ("::1", "9"), ("127.0.0.1", "8")):
                with socket.create_connection((host, server.server_port)) as sock:
                    sock.settimeout(PATIENCE)
                    sock.sendall(call())
                    reader = Reader(sock)
                    answered = Answered(*reader.head()[1:])
                    self.assertEqual((answered.status, answered.get("x-ratelimit-remaining")), (200, left))
                    list(reader.body(answered.fields))
        finally:
            server.drain(0)
            accepting.join(PATIENCE)
            wait_for(lambda: not server.open)
        wait_for(lambda: self.lines.entries()[2:])
        self.assertEqual([entry["caller"] for entry in self.lines.entries()], ["127.0.0.1", "::1", "127.0.0.1"])


# ------------------------------------------------------------------------------------------------------------
# Commands, with the demo: the file as people start it
# ------------------------------------------------------------------------------------------------------------

class Process:
    """`python -I -S llm_proxy.py` as a process of its own, with no environment but the settings."""

    def __init__(self, *arguments, cwd="/", **settings):
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", FILE, *arguments],
            env={name: str(value) for name, value in {"DATABASE": "off", **settings}.items()}, cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
        self.rows = []
        self.reader = threading.Thread(target=lambda: self.rows.extend(iter(self.process.stderr.readline,
                                                                            "")), daemon=True)
        self.reader.start()

    def said(self, text):
        return any(text in row for row in self.rows)

    def wait(self):
        """-> exit code"""
        code = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return code

    def finish(self):
        """-> (exit code, standard output, standard error) of one that ends by itself"""
        out = self.process.stdout.read()
        return self.wait(), out, "".join(self.rows)

    def close(self):
        self.process.kill()
        self.wait()
        self.process.stdout.close()
        self.process.stderr.close()


class CommandsTest(unittest.TestCase):
    def stub(self, *arguments):
        stub = Stub(*arguments)
        self.addCleanup(stub.close)
        return stub

    def command(self, *arguments, **settings):
        process = Process(*arguments, **settings)
        self.addCleanup(process.close)
        return process

    def serve(self, *arguments, cwd="/", **settings):
        """Start a proxy on a free port. Where another process takes it in between, another one is tried."""
        for _ in range(5):
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            process = self.command(*arguments, cwd=cwd, HOST="127.0.0.1", PORT=port, **settings)
            wait_for(lambda: process.said("listens on") or process.process.poll() is not None, "the start")
            if process.process.poll() is None:
                break
        process.address = ("127.0.0.1", port)
        return process

    def connect(self, process):
        client = Client(process.address)
        self.addCleanup(client.reset)
        return client

    def test_help_names_every_setting_with_its_default_in_brackets(self):
        code, out, err = self.command("--help").finish()
        self.assertEqual((code, err), (0, ""))
        for setting in ALL_SETTINGS:
            with self.subTest(name=setting.name):
                row, = re.findall(r"^ +%s +(\S.*)$" % setting.name, out, re.MULTILINE)
                if setting.default is not None:
                    self.assertTrue(row.endswith(" [%s]" % setting.default), row)
        for group in SETTINGS:
            self.assertIn("\n%s:\n" % group, out)
        for option in ("--version", "--check", "--demo"):
            self.assertIn(option, out)

    def ledger(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        return os.path.join(folder.name, "books.db")

    @staticmethod
    def level(path):
        database = llm_proxy.Database(path, reading=True)
        with contextlib.closing(database.connection):
            return database.levels()[0][1]

    def test_usage_prints_who_used_what(self):
        path, now = self.ledger(), time.time()
        database = llm_proxy.Database(path)
        names = [name for name, _ in llm_proxy.COLUMNS]

        def row(**values):
            return tuple({"time": now, "input": 10, "cached": 1, "output": 2, "reasoning": 0, "estimated": 0, "unpriced": 0,
                          "picodollars": 0, "outcome": "ok", **values}.get(name) for name in names)
        database.add([row(caller="alice", served="m1", picodollars=5 * 10 ** 11), row(caller="alice", served="m2", estimated=1),
                      row(caller="bob", served="m1", upstream="base", unpriced=1),
                      row(caller="bob", outcome="refused", time=now - 3 * 86400)])
        database.connection.close()
        head = "calls,input,cached,output,reasoning,estimated,unpriced,usd"
        table = [
            (("--csv",), "caller,%s\nalice,2,20,2,4,0,1,0,0.5\nbob,2,20,2,4,0,0,1,0\n" % head),
            (("--csv", "--by", "model", "--since", "2d"), "model,%s\nm1,2,20,2,4,0,0,1,0.5\nm2,1,10,1,2,0,1,0,0\n" % head),
            (("--csv", "--by", "outcome"), "outcome,%s\nok,3,30,3,6,0,1,1,0.5\nrefused,1,10,1,2,0,0,0,0\n" % head),
            (("--csv", "--by", "upstream"), "upstream,%s\n-,3,30,3,6,0,1,0,0.5\nbase,1,10,1,2,0,0,1,0\n" % head)]
        for arguments, text in table:
            with self.subTest(arguments=arguments):
                self.assertEqual(self.command("usage", *arguments, DATABASE=path).finish(), (0, text, ""))
        code, out, _ = self.command("usage", "--json", DATABASE=path).finish()
        self.assertEqual(json.loads(out)[0], {"caller": "alice", "calls": 2, "input": 20, "cached": 2, "output": 4,
                                              "reasoning": 0, "estimated": 1, "unpriced": 0, "usd": "0.5"})
        code, out, _ = self.command("usage", "--by", "day", DATABASE=path).finish()
        self.assertEqual((code, len(out.splitlines())), (0, 3))
        self.assertRegex(out, r"^day +calls +input.*\n20\d\d-\d\d-\d\d +3 +30 ")

    def test_usage_says_what_is_wrong(self):
        path = self.ledger()
        code, out, err = self.command("usage", DATABASE=path).finish()
        self.assertEqual((code, out, err), (1, "", "no calls are recorded in %s (DATABASE)\n" % path))
        with open(path, "w", encoding="utf-8") as file:
            file.write("hello")
        code, out, err = self.command("usage", DATABASE=path).finish()
        self.assertEqual((code, out, len(err.splitlines())), (2, "", 1))
        self.assertEqual(self.command("usage", "--since", "soon", DATABASE=path).finish()[0], 2)

    def test_a_file_that_is_no_database_of_ours_ends_with_2_and_one_line(self):
        path = self.ledger()
        with open(path, "w", encoding="utf-8") as file:
            file.write("hello")
        code, out, err = self.command(BASE_API_URL="http://127.0.0.1:1", DATABASE=path).finish()
        self.assertEqual((code, err), (2, "%s is not a database of llm_proxy; it was left as it is\n" % path))
        code, out, err = self.command(BASE_API_URL="http://127.0.0.1:1", DATABASE="/nonexistent/x.db").finish()
        self.assertEqual((code, len(err.splitlines())), (2, 1))
        self.assertIn("DATABASE must be a file that can be written, or off (got '/nonexistent/x.db'", err)

    def test_where_the_usual_database_cannot_be_written_it_goes_on_without(self):
        process = self.serve(BASE_API_URL="http://127.0.0.1:1", DATABASE="", cwd="/proc")
        wait_for(lambda: process.said("warning: calls and buckets are kept in memory only"))
        client = self.connect(process)
        self.assertTrue(client.send(request("GET", "/health")).read("GET").json()["ok"])

    def test_a_signal_to_stop_loses_no_call_and_no_level_and_a_kill_at_most_the_last_second(self):
        path, stub = self.ledger(), self.stub(says(json.dumps({"usage": TOLD}).encode()))
        settings = {"BASE_API_URL": "http://127.0.0.1:%d" % stub.port, "DATABASE": path, "TOKEN_COST_MODE": "usage",
                    "MAX_TOKENS": 1000}
        for number, stop in enumerate((signal.SIGTERM, signal.SIGKILL, signal.SIGTERM)):
            process = self.serve(**settings)
            client = self.connect(process)
            for count in range(10):
                answered = client.send(call("k", max_tokens=1)).read()
                self.assertEqual(answered.get("x-ratelimit-remaining"), str(1000 - 24 * (10 * number + count + 1)))
            if stop == signal.SIGKILL:
                wait_for(lambda: LedgerCase.rows(path)[19:], "the rows of the last second")
                wait_for(lambda: self.level(path) == 1000 - 24 * 20, "the level")
            client.close()
            process.process.send_signal(stop)
            process.wait()
            self.assertEqual(len(LedgerCase.rows(path)), 10 * (number + 1))

    def test_version_is_told(self):
        self.assertEqual(self.command("--version").finish(), (0, "llm_proxy %s\n" % llm_proxy.VERSION, ""))

    def test_faults_are_told_one_a_line_and_end_with_2(self):
        code, out, err = self.command(PORT="99999", MAX_TOKENS="x").finish()
        self.assertEqual((code, out, len(err.splitlines())), (2, "", 3))
        self.assertIn("PORT must be between 1 and 65535 (got '99999')\n", err)
        self.assertIn("BASE_API_URL=http://", err)

    def test_dotenv_is_read_from_the_working_directory(self):
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, ".env"), "w", encoding="utf-8") as file:
                file.write("PORT=0\nBASE_API_URL=http://127.0.0.1:1\nnonsense\n")
            code, _, err = self.command(cwd=folder, PORT="99999").finish()
        self.assertEqual((code, len(err.splitlines())), (2, 2))
        self.assertIn("(got '99999')", err)
        self.assertIn(".env line 3", err)

    def test_check_prints_what_would_be_used_without_secrets_and_asks_for_the_models(self):
        stub = self.stub(says(b'{"object": "list", "data": [{"id": "one"}, {"id": "two"}]}'))
        code, out, err = self.command("--check", BASE_API_URL="http://127.0.0.1:%d/v1" % stub.port,
                                      BASE_API_KEY="sk-hush",
                                      PROXY_API_KEYS="alice=sk-hush-2").finish()
        self.assertEqual((code, err), (0, ""))
        self.assertIn("models of base at http://127.0.0.1:%d: one, two\n" % stub.port, out)
        self.assertNotIn("hush", out)
        for setting in ALL_SETTINGS:
            self.assertRegex(out, r"(?m)^%s +\S" % setting.name)
        self.assertEqual((stub.requests[0].target, stub.requests[0].get("authorization")),
                         ("/v1/models", "Bearer sk-hush"))

    def test_check_fails_where_there_is_no_upstream_or_no_list(self):
        good, stub = self.stub(says(b'{"data": []}')), self.stub(says(b'{"error": "no"}', "401 No"))
        there = "http://127.0.0.1:%d" % stub.port
        code, out, _ = self.command("--check", BASE_API_URL="http://127.0.0.1:%d,%s" % (good.port, there)).finish()
        self.assertEqual((code, out.count("models of base at ")), (1, 2))
        self.assertIn("%s: the upstream answered 401, and no list of models\n" % there, out)
        self.assertEqual(self.command("--check", BASE_API_URL=there).finish()[0], 1)
        stub.close()
        code, out, err = self.command("--check", BASE_API_URL=there).finish()
        self.assertEqual((code, err), (1, ""))
        self.assertNotIn("Traceback", out)

    def test_it_starts_without_a_home_in_a_directory_it_cannot_write_to(self):
        began = time.monotonic()
        folder = "/proc" if os.path.isdir("/proc") else "/"
        process = self.serve(cwd=folder, BASE_API_URL="http://127.0.0.1:1/v1", BASE_API_KEY="sk-hush")
        self.assertLess(time.monotonic() - began, 5)
        self.assertEqual(self.connect(process).send(request("GET", "/health")).read("GET").json()["ok"], True)
        wait_for(lambda: process.said("warning"))
        self.assertIn("llm_proxy %s listens on http://127.0.0.1:%d\n" % (llm_proxy.VERSION,
                                                                         process.address[1]), process.rows)
        self.assertEqual(sum("warning: callers are not checked" in row for row in process.rows), 1)
        self.assertTrue(process.said("http://127.0.0.1:1/v1") and process.said("holds 10 tokens"))
        self.assertFalse(process.said("hush"))

    def test_a_second_start_on_the_same_port_says_so_in_one_line(self):
        first = self.serve(BASE_API_URL="http://127.0.0.1:1")
        code, out, err = self.command(HOST="127.0.0.1", PORT=first.address[1],
                                      BASE_API_URL="http://127.0.0.1:1").finish()
        self.assertEqual((code, out, len(err.splitlines())), (1, "", 1), err)
        self.assertIn("cannot listen on 127.0.0.1 port %d" % first.address[1], err)

    def stream(self, process, stub):
        client = self.connect(process).send(call(stream=True))
        asked = stub.next()
        asked.send(STREAM + chunk(event(1)))
        client.head()
        client.expect(event(1))
        return client, asked

    def test_a_signal_lets_a_running_stream_finish_and_then_ends_with_0(self):
        stub = self.stub(None)
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number=number):
                process = self.serve(BASE_API_URL="http://127.0.0.1:%d" % stub.port)
                client, asked = self.stream(process, stub)
                process.process.send_signal(number)
                wait_for(lambda: process.said("stopping"))
                wait_for(lambda: self.refused(process.address), "the end of listening")
                asked.send(chunk(event(2)) + LAST)
                answered = client.rest()
                self.assertEqual((answered.whole, answered.body), (True, event(1) + event(2)))
                self.assertEqual(process.wait(), 0)
                self.assertFalse(process.said("Traceback"))

    @staticmethod
    def refused(address):
        try:
            Client(address).close()
        except OSError:
            return True
        return False

    def test_a_hang_up_signal_reads_the_certificates_again_and_ends_nothing(self):
        path = pem_file(self)
        process = self.serve(BASE_API_URL="http://127.0.0.1:1", TLS_CERT_FILE=path)
        self.assertTrue(process.said("listens on https://127.0.0.1:"))
        process.process.send_signal(signal.SIGHUP)
        wait_for(lambda: process.said("certificates were read again"))
        os.remove(path)
        process.process.send_signal(signal.SIGHUP)
        wait_for(lambda: process.said("certificates were not read again, the old ones stay"))
        self.assertEqual(process.process.poll(), None)

    def test_without_certificates_it_ends_with_its_terminal(self):
        process = self.serve(BASE_API_URL="http://127.0.0.1:1")
        process.process.send_signal(signal.SIGHUP)
        self.assertEqual(process.wait(), -signal.SIGHUP)

    def test_a_second_signal_ends_it_at_once(self):
        stub = self.stub(None)
        process = self.serve(BASE_API_URL="http://127.0.0.1:%d" % stub.port)
        client, _ = self.stream(process, stub)
        process.process.send_signal(signal.SIGTERM)
        wait_for(lambda: process.said("stopping"))
        process.process.send_signal(signal.SIGTERM)
        self.assertNotEqual(process.wait(), 0)
        self.assertFalse(client.rest().whole)

    def test_what_runs_longer_than_the_drain_time_is_cut(self):
        stub = self.stub(None)
        process = self.serve(BASE_API_URL="http://127.0.0.1:%d" % stub.port, DRAIN_SECONDS="0.1")
        client, _ = self.stream(process, stub)
        process.process.send_signal(signal.SIGTERM)
        self.assertFalse(client.rest().whole)
        self.assertEqual(process.wait(), 0)
        self.assertTrue(process.said("1 calls cut"))

    def test_the_demo_shows_a_stream_and_then_the_limit_reply(self):
        process = self.serve("--demo", MAX_TOKENS=3)
        wait_for(lambda: process.said("curl -N http://127.0.0.1:%d/v1/chat/completions" % process.address[1]))
        client = self.connect(process)
        models = client.send(request("GET", "/v1/models")).read("GET").json()
        self.assertEqual(models["data"][0]["id"], "demo")
        said = client.send(call()).read().json()["choices"][0]["message"]["content"]
        completion = client.send(request("POST", "/v1/completions", b'{"prompt": "x"}')).read().json()
        self.assertEqual(completion["choices"][0]["text"], said)
        answered = client.send(call(stream=True, stream_options={"include_usage": True})).read()
        events = answered.body.decode().split("\n\n")
        self.assertEqual((answered.whole, events[-2:]), (True, ["data: [DONE]", ""]))
        chunks = [json.loads(event[6:]) for event in events[:-2]]
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        self.assertEqual("".join(delta.get("content") or "" for delta in deltas).strip(), said)
        self.assertGreater(chunks[-1]["usage"]["completion_tokens"], 0)
        self.assertIn("limit reached", client.send(call()).read().json()["choices"][0]["message"]["content"])


# ------------------------------------------------------------------------------------------------------------
# Endurance: everything at its worst. Each test has a short form here, and a long one that prints its figures:
# `python test_llm_proxy.py --soak`, about ten minutes.
# ------------------------------------------------------------------------------------------------------------

class Hurried:
    """The real time, which a test may put forward."""
    ahead = 0

    def monotonic(self):
        return time.monotonic() + self.ahead

    def time_ns(self):
        return time.time_ns() + self.ahead * 10 ** 9


class EnduranceCase(ProxyCase):
    """Each test has a short form for the unit run and a long one, `python test_llm_proxy.py --soak`, which prints its
    figures."""
    LONG = False

    @classmethod
    def setUpClass(cls):
        if not cls.LONG:  # which takes the product as it is
            super().setUpClass()

    def size(self, short, long):
        return long if self.LONG else short

    def tell(self, text, *values):
        if self.LONG:
            sys.stderr.write("\n    %s ... " % (text % values))

    # a proxy in a process of its own
    command, serve = CommandsTest.command, CommandsTest.serve

    def held(self):
        """-> how many descriptors and threads this process has, when nothing is kept for later."""
        self.proxy.routes.close_stale(everything=True)
        gc.collect()
        counts = sys.implementation.name == "cpython" and os.path.isdir("/proc/self/fd")
        return len(os.listdir("/proc/self/fd")) if counts else 0, threading.active_count()

    def all_gone(self):
        """Whether no connection is left, not even one of those that are kept a moment after their last answer. The
        proxy must have a Hurried clock."""
        if self.server.turned_away and not self.server.open:
            self.clock.ahead += 2
        return not self.server.open and not self.server.turned_away

    def steadily_held(self):
        return wait_for(lambda: self.all_gone() and self.held() == self.held() and self.held(), "a steady state")

    def assert_nothing_left(self, before):
        wait_for(self.all_gone, "the end of every connection")
        wait_for(lambda: all(now <= then for now, then in zip(self.held(), before)), "the return to %d and %d" % before)
        self.assertEqual(self.in_flight(), 0)
        self.assertFalse(self.server.unstarted or self.server.idle or self.proxy.relay.flows)

    def deadlines(self, **seconds):
        """Shrink deadlines, `Class_NAME=seconds`, for this test."""
        for name, value in seconds.items():
            owner, _, constant = name.partition("_")
            patch = mock.patch.object(getattr(llm_proxy, owner), constant, value)
            patch.start()
            self.addCleanup(patch.stop)

    @contextlib.contextmanager
    def somebody_calling(self):
        """Meanwhile somebody calls as people do, each time on a new connection; -> the seconds of each call."""
        seconds, faults, over = [], [], threading.Event()

        def run():
            while not over.wait(0.01):
                began = time.monotonic()
                try:
                    with contextlib.closing(Client(self.address)) as client:
                        status = client.send(call()).read().status
                except Exception as fault:
                    status = repr(fault)
                seconds.append(time.monotonic() - began)
                if status != 200:
                    faults.append(status)
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield seconds
        finally:
            over.set()
            thread.join(PATIENCE)
        self.assertEqual(faults, [])
        self.assertGreater(len(seconds), 5)

    @staticmethod
    def slowest(seconds, share=0.99):
        """-> the milliseconds that this share of the calls stayed under."""
        return 1000 * sorted(seconds)[int(share * (len(seconds) - 1))]

    def launch(self, answer, **settings):
        """A proxy between a Stub and Clients: in this process in the short form, in one of its own in the long one."""
        settings = {"MAX_TOKENS": 10 ** 12, "LOG_FORMAT": "json", **settings}
        if not self.LONG:
            self.start(answer, **settings)
            self.pid, self.logged = os.getpid(), self.lines.text
            return
        self.stub = Stub(answer)
        self.addCleanup(self.stub.close)
        process = self.serve(BASE_API_URL="http://127.0.0.1:%d" % self.stub.port, **settings)
        self.pid, self.address = process.process.pid, process.address
        self.logged = lambda: "".join(process.rows)

    def resident(self):
        """MiB of memory that the proxy's process has, where the system tells; else 0."""
        with contextlib.suppress(OSError):
            with open("/proc/%d/status" % self.pid, encoding="ascii") as file:
                return int(re.search(r"VmRSS:\s+(\d+) kB", file.read())[1]) / 1024
        return 0

    def in_flight(self):
        """How many calls the upstreams are thought to run."""
        return sum(upstream.told()["in_flight"] for upstream in self.proxy.routes.all)

    def assert_within(self, seconds, took):
        """The short form runs beside whatever else the machine has to do; the long one takes no excuse."""
        self.assertLessEqual(took, seconds + self.size(2, 0))

    def seconds_until(self, condition):
        began = time.monotonic()
        wait_for(condition)
        return time.monotonic() - began


class StrictStub(Stub):
    """It keeps what its Reader could not accept, or `answer` found wrong."""

    def __init__(self, *arguments):
        self.faults = []
        super().__init__(*arguments)

    def converse(self, sock):
        try:
            super().converse(sock)
        except Exception as fault:
            self.faults.append(repr(fault))


class DoorTest(EnduranceCase):
    def drip(self, openings, data, every, deadline):
        """A client for each of `openings` sends that and then a byte of `data` every so many seconds, evenly spread,
        until it is closed, which must be at the deadline, with a 408; -> the seconds that each was borne."""
        clients = [self.connect() for _ in openings]
        began, got, borne = {}, {client: b"" for client in clients}, {}
        turns = itertools.chain(zip(clients, openings), (
            (client, bytes([byte])) for byte in data for client in clients))
        start = due = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for client in clients:
                selector.register(client.sock, selectors.EVENT_READ, client)
            while len(borne) < len(clients):
                now = time.monotonic()
                self.assertLess(now, start + deadline + every + PATIENCE, "nothing ended them")
                while due <= now:
                    client, piece = next(turns)
                    due += every / len(clients)
                    if client not in borne:
                        began.setdefault(client, now)
                        with contextlib.suppress(OSError):
                            client.send(piece)
                for key, _ in selector.select(max(0, due - time.monotonic())):
                    client = key.data
                    piece = client.sock.recv(65536)  # a reset is a failure
                    got[client] += piece
                    if not piece:
                        borne[client] = time.monotonic() - began[client]
                        selector.unregister(client.sock)
        for client in clients:
            client.close()
        self.assertEqual({answered.split(b" ")[1] for answered in got.values()}, {b"408"})
        self.assertGreaterEqual(min(borne.values()), deadline - 0.05)
        self.assertLess(max(borne.values()), deadline + 1)
        return list(borne.values())

    def test_heads_that_trickle_in_are_closed_at_the_deadline_and_nobody_else_feels_them(self):
        if not self.LONG:
            self.deadlines(Handler_HEAD_SECONDS=0.5)
        else:
            llm_proxy.raise_descriptor_limit()
        self.start(MAX_TOKENS=10 ** 9)
        with self.somebody_calling() as seconds:
            borne = self.drip([b"P"] * self.size(20, 300), request("OST", CHAT)[:-2] + b"X: " + b"x" * 1000,
                              self.size(0.05, 2), llm_proxy.Handler.HEAD_SECONDS)
        self.tell("%d heads were borne for %.2f to %.2f s; %d calls meanwhile, p50 %.1f ms, p99 %.1f ms, max %.1f ms",
                  len(borne), min(borne), max(borne), len(seconds), self.slowest(seconds, 0.5), self.slowest(seconds),
                  self.slowest(seconds, 1))
        if self.LONG:
            self.assertLess(self.slowest(seconds), 50)
        self.assertEqual(self.stub.calls, len(seconds))
        wait_for(lambda: not self.server.open, "the end of every connection")

    def test_bodies_that_trickle_in_are_closed_at_the_deadline_and_hold_no_place_at_the_upstream(self):
        if not self.LONG:
            self.deadlines(RequestBody_FREE_SECONDS=0.5)
        self.start(MAX_TOKENS=10 ** 9, MAX_CONCURRENCY=1, MAX_QUEUE=0)  # one slot that were held would be missed
        heads = [request("POST", CHAT, b"", "Content-Length: 5000").replace(b"Content-Length: 0\r\n", b""),
                 unsized(CHAT, CHUNKED) + b"1388\r\n"]
        with self.somebody_calling() as seconds:
            borne = self.drip(heads * self.size(5, 50), b'{"model": "m", "messages": [' + b" " * 1000,
                              self.size(0.05, 1), llm_proxy.RequestBody.FREE_SECONDS)
        self.tell("%d bodies were borne for %.2f to %.2f s; %d calls meanwhile, p99 %.1f ms", len(borne), min(borne),
                  max(borne), len(seconds), self.slowest(seconds))
        self.assertEqual({asked.body for asked in self.stub.requests}, {chat()})
        self.assertEqual((self.stub.calls, self.in_flight(), self.left()), (len(seconds), 0, 10 ** 9 - len(seconds)))

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "reads the CPU time of another process")
    def test_callers_for_whom_there_is_no_descriptor_cost_no_time_and_are_forgotten_when_they_leave(self):
        stub, start = Stub(says()), subprocess.Popen
        self.addCleanup(stub.close)

        def limited(arguments, **options):  # soft and hard: a soft one alone would be raised
            return start(["sh", "-c", 'ulimit -n 64 && exec "$@"', "sh", *arguments], **options)
        with mock.patch.object(subprocess, "Popen", limited):
            process = self.serve(BASE_API_URL="http://127.0.0.1:%d" % stub.port)

        def cpu():
            with open("/proc/%d/stat" % process.process.pid, encoding="ascii", errors="replace") as file:
                return sum(map(int, file.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")

        def descriptors():
            return len(os.listdir("/proc/%d/fd" % process.process.pid))
        before = cpu()
        clients = [Client(process.address) for _ in range(self.size(100, 200))]
        wait_for(lambda: descriptors() == 64, "the last descriptor")
        time.sleep(self.size(0.5, 5))  # the time that is measured
        spent = cpu() - before
        for client in clients:
            client.close()
        began = time.monotonic()
        client = Client(process.address)
        self.addCleanup(client.close)
        status = client.send(call()).read().status
        waited = time.monotonic() - began
        self.tell("%d connections cost %.2f s of CPU; the next call took %.3f s", len(clients), spent, waited)
        self.assertLessEqual(spent, 0.25)
        self.assertEqual(status, 200)
        self.assertLess(waited, 1)
        self.assertFalse(process.said("Traceback"))

    assert_turned_away = ServerTest.assert_turned_away

    def start_by_name(self, answer=None):
        """A proxy whose upstream has a name: it takes a thread to look that up."""
        self.clock, endpoint = Hurried(), Stub(answer)
        self.addCleanup(endpoint.close)
        self.start(clock=self.clock, BASE_API_URL="http://localhost:%d" % endpoint.port,
                   REFILL_INTERVAL_SECONDS=10 ** 9)
        return endpoint

    def test_where_no_thread_can_be_started_many_times_every_caller_is_told_and_nothing_is_left_behind(self):
        number = self.size(20, 100)
        endpoint = self.start_by_name()

        def usual_call():
            client = self.connect().send(call())
            asked = endpoint.next()
            asked.send(answer())
            asked.finish()
            self.assertEqual(client.read().status, 200)
            client.close()

        def nothing_left():
            self.assert_nothing_left(before)
            usual_call()
        usual_call()
        before = self.steadily_held()
        with self.subTest("for a connection"):
            with no_threads() as attempts:
                for client in [self.connect().send(call()[:-100]) for _ in range(number)]:
                    self.assert_turned_away(client)
                    client.close()
            self.assertEqual((len(attempts), endpoint.calls), (number, 1))
            nothing_left()
        with self.subTest("for a look-up"):
            clients = [self.connect() for _ in range(number)]
            wait_for(lambda: len(self.server.open) == number)
            self.proxy.routes.close_stale(everything=True)
            with no_threads() as attempts:
                for client in clients:
                    self.assert_turned_away(client.send(call()))
                    client.close()
            self.assertEqual((len(attempts), endpoint.calls), (number, 2))
            self.assertEqual(self.proxy.routes.base.addresses[0].breaker.failures, 0)
            nothing_left()
        with self.subTest("after a stream"):
            streams = []
            for _ in range(number):
                client = self.connect().send(call(stream=True))
                streams.append((client, endpoint.next()))
                streams[-1][1].send(STREAM + chunk(event(1)))
                client.head()
                client.expect(event(1))
            with no_threads() as attempts:
                for client, asked in streams:
                    asked.send(LAST)
                    asked.finish()
                    self.assertTrue(client.rest().whole)
                    self.assertEqual(client.send(request("GET", "/health")).read("GET").status, 200)
                    client.close()
            self.assertEqual(attempts, [])
            nothing_left()
        self.assertEqual(self.left(), 1000 - 4 - number)
        self.tell("%d times each for a connection, a look-up and after a stream: %d descriptors and %d threads before,"
                  " %d and %d after", number, *before, *self.steadily_held())

    def test_where_no_thread_can_be_started_the_list_of_models_is_a_503_and_no_bug_of_ours(self):
        endpoint = Stub(says(b'{"data": [{"id": "one"}]}'))
        self.addCleanup(endpoint.close)
        self.start(UPSTREAM_OTHER_URL="http://127.0.0.1:%d" % endpoint.port, UPSTREAM_OTHER_MODELS="*")
        client = self.connect().send(request("GET", "/health"))
        client.read("GET")
        with no_threads():
            self.assertEqual(client.send(request("GET", "/v1/models")).read("GET").status, 503)
        self.assertEqual(self.ask(request("GET", "/v1/models")).status, 200)

    def call_twice(self, address, number):
        """From an address of its own, of the 2 ** 24 of loopback: there is a token for the first call only."""
        with contextlib.closing(socket.socket()) as sock:
            sock.settimeout(PATIENCE)
            sock.bind(("127.%d.%d.%d" % (1 + (number >> 16), number >> 8 & 255, number & 255), 0))
            sock.connect(address)
            sock.sendall(self.TWO_CALLS)
            data, piece = b"", True
            while piece:
                piece = sock.recv(65536)
                data += piece
        if data.count(b"HTTP/1.1 200 OK\r\n") != 2 or data.count(b"limit reached") != 1 or b'"said"' not in data:
            return data
        return None

    TWO_CALLS = call() + call(None, "Connection: close")

    @unittest.skipUnless(sys.platform.startswith("linux"), "only there all of 127.0.0.0/8 can be called from")
    def test_callers_from_ever_new_addresses_do_not_fill_the_memory(self):
        batch, batches = self.size((150, 1), (20000, 5))
        faults = []

        def run(address, numbers):
            for number in numbers:
                with contextlib.suppress(Exception):
                    if not self.call_twice(address, number):
                        continue
                faults.append(number)
        self.start(MAX_TOKENS=1)
        self.stub.requests = collections.deque(maxlen=100)
        address, process = self.address, None
        limits = self.proxy.limits
        if self.LONG:
            process = self.serve(BASE_API_URL="http://127.0.0.1:%d" % self.stub.port, MAX_TOKENS=1)
            self.pid, address = process.process.pid, process.address
        else:
            limits.buckets.room = 50
            patch = mock.patch.object(llm_proxy.Limits, "MOST_KNOWN", 40)
            patch.start()
            self.addCleanup(patch.stop)
        sizes, began = [], time.monotonic()
        for done in range(0, batch * batches, batch):
            threads = [threading.Thread(target=run, args=(address, range(done + part, done + batch, 3)))
                       for part in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            sizes.append(self.resident() if process else 0)
        self.assertEqual(faults, [])
        if process:
            self.tell("MiB after each %d addresses: %s; %.0f s", batch, " ".join("%.1f" % size for size in sizes),
                      time.monotonic() - began)
            self.assertLess(max(sizes) - sizes[0], 5)
            self.assertFalse(process.said("Traceback"))
            return
        self.assertLessEqual(len(limits.buckets.levels), 50)
        self.assertLessEqual(len(limits.known), 40)
        wait_for(lambda: not self.server.open and not self.proxy.relay.watches, "the end of every connection")
        wait_for(lambda: len(self.lines.entries()) == 2 * batch, "the log")

    GEMINI = b'{"contents": [{"role": "user", "parts": [{"text": "hello"}]}]}'
    FORM = (b'--xyz\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--xyz\r\n'
            b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n'
            b'Content-Type: audio/wav\r\n\r\n\x00\xff\r\n\x80\n--xyz--\r\n')
    GOOD = (
        call("sk-1"), call(None, "X-A: 1", "X-A: 2", "Cookie: a=b", stream=True),
        unsized(CHAT, CHUNKED) + chunk(chat()[:20]) + chunk(chat()[20:]) + LAST,
        unsized(CHAT, CHUNKED, "Trailer: X-Sum") + b"0f;a=b\r\n" + chat()[:15] + b"\r\n" + chunk(chat()[15:])
        + b"0\r\nX-Sum: 1\r\n\r\n",
        unsized("/v1/files", CHUNKED) + chunk(b"\r\n0\r\n\r\n") + LAST,
        request("POST", "http://proxy.test" + CHAT, chat()),
        call(None, "Expect: 100-continue"), unsized(CHAT, CHUNKED, "Expect: 100-continue") + chunk(chat()) + LAST,
        call() + request("GET", "/health") + call(), request("GET", "/v1/x?key=sk-1&a=%2e%2e") + call(stream=True),
        request("POST", CHAT, chat(stream=True), "Connection: keep-alive", version="1.0"),
        request("GET", "/", version="1.0"),
        request("POST", "/v1beta/models/g:generateContent?key=sk-1", GEMINI),
        request("POST", "/v1beta/models/g:streamGenerateContent?alt=sse", GEMINI, "X-Goog-Api-Key: sk-1"),
        request("POST", "/v1/messages", chat(max_tokens=5), "X-Api-Key: sk-1", "Anthropic-Version: 2023-06-01"),
        request("POST", "/v1/audio/transcriptions", FORM, "Content-Type: multipart/form-data; boundary=xyz"),
        request("OPTIONS", CHAT, b"", "Origin: http://a.test", "Access-Control-Request-Headers: X-A"),
        request("HEAD", "/v1/files/1", b"", "Connection: X-Hop, close", "X-Hop: 1"))
    ODD_BYTES = (b"\r", b"\n", b"\0", b"\t", b" ", b":", b",", b"0", b"\r\n", b"\n\n", b"\r\n\r\n", b"\x0b", b"\x7f",
                 b"\x80", b"\xff")
    ODD_LINES = (
        b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity, chunked", b"Transfer_Encoding: chunked",
        b"Content-Length: 3", b"Content-Length: +3", b"Content-Length: 99999", b"Host: other.test", b" folded",
        b"Expect: 100-continue", b"Connection: content-length", b"Upgrade: h2c", b"TE: trailers",
        b"Content-Encoding: gzip", b"X: \xe9")

    def mutate(self, chance):
        """One of the good requests, with one to four things wrong, mostly one."""
        data = chance.choice(self.GOOD)
        for _ in range(chance.choice((1, 1, 1, 2, 3, 4))):
            place, kind = chance.randrange(len(data) + 1), chance.randrange(7)
            if chance.random() < 0.3:  # most bytes of a request matter less than those of its start
                place = min(place, chance.randrange(60))
            length = chance.choice((1, 1, 2, 8, 40))
            if kind == 0 and place < len(data):
                data = data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1:]
            elif kind == 1:
                data = data[:place] + data[place + length:]
            elif kind == 2:
                data = data[:place + length] + data[place:]
            elif kind == 3:
                data = data[:place] + chance.choice(self.ODD_BYTES) + data[place:]
            elif kind == 4:
                other = chance.choice(self.GOOD)
                data = data[:place] + other[chance.randrange(len(other)):]
            else:
                rows = data.split(b"\r\n")
                row = chance.choice(rows) if kind == 5 else chance.choice(self.ODD_LINES)
                rows.insert(chance.randrange(1, len(rows) + 1), row)
                data = b"\r\n".join(rows)
        return data or b"\0"

    def answer_strictly(self, asked):
        """What a request must be that is passed on, whatever it was when it came; and a fitting answer."""
        self.assertRegex(
            asked.head, rb"\A[A-Z][A-Z_-]* /[!-~]* HTTP/1\.1\r\n(?:[!-9;-~]+:[\t -~\x80-\xff]*\r\n)+\r\n\Z")
        names = [name for name, _ in asked.fields]
        self.assertEqual((names.count("host"), asked.get("host")), (1, "127.0.0.1:%d" % self.strict.port))
        self.assertFalse({"authorization", "x-api-key", "x-goog-api-key", "cookie", "te", "upgrade", "expect"}
                         & set(names))
        self.assertNotIn(asked.method, ("TRACE", "CONNECT"))
        if asked.method == "HEAD":
            asked.send(answer(b""))
        elif b'"stream": true' in asked.body:
            asked.send(STREAM + chunk(event(1)) + LAST)
        else:
            asked.send(answer(b'{"data": [{"id": "m"}]}'))

    def converse_at_once(self, requests, patience):
        """Send each request on a connection of its own, every other one with the end of what is sent behind it; ->
        what each was answered, None for a reset, and the seconds until the last one was closed."""
        answers, clients, began = {}, [], time.monotonic()
        with selectors.DefaultSelector() as selector:
            for number, data in enumerate(requests):
                clients.append(Client(self.address))
                answers[number] = b""
                selector.register(clients[-1].sock, selectors.EVENT_READ, number)
                with contextlib.suppress(OSError):  # it may have been refused by its first bytes
                    clients[-1].send(data)
                    if number % 2:
                        clients[-1].sock.shutdown(socket.SHUT_WR)
            while selector.get_map():
                left = began + patience - time.monotonic()
                hanging = [requests[key.data] for key in selector.get_map().values()] if left < 0 else []
                self.assertEqual(hanging, [], "nothing ended these")
                for key, _ in selector.select(left):
                    try:
                        piece = key.fileobj.recv(65536)
                        answers[key.data] += piece
                    except ConnectionError:
                        piece, answers[key.data] = b"", None
                    if not piece:
                        selector.unregister(key.fileobj)
        for client in clients:
            client.close()
        return [answers[number] for number in range(len(requests))], time.monotonic() - began

    def test_requests_with_random_faults_are_answered_or_closed_and_reach_the_upstream_only_sound(self):
        self.deadlines(Handler_HEAD_SECONDS=0.1, Handler_IDLE_SECONDS=0.05, Handler_LINGER_SECONDS=0.05,
                       RequestBody_FREE_SECONDS=0.1)
        self.strict, self.clock = StrictStub(self.answer_strictly), Hurried()
        self.addCleanup(self.strict.close)
        self.start(clock=self.clock, BASE_API_URL="http://127.0.0.1:%d" % self.strict.port, MAX_TOKENS=10 ** 9)
        chance, statuses, longest = random.Random(20240229), collections.Counter(), 0
        for data, answered in zip(self.GOOD, self.converse_at_once(self.GOOD, 5)[0]):  # they are, but for the mutations
            self.assertRegex(answered, rb"\AHTTP/1\.1 (100|20[04]) ", data)
        before = self.steadily_held()
        for _ in range(self.size(2, 100)):
            requests = [self.mutate(chance) for _ in range(100)]
            answers, seconds = self.converse_at_once(requests, 5)
            longest = max(longest, seconds)
            # who did not say that it sends no more is told what was wrong
            self.assertEqual([asked for asked, data in zip(requests[::2], answers[::2]) if not data], [])
            for data in answers:
                found = re.findall(rb"(?:\A|\n|\}|~)HTTP/1\.1 ([0-9]{3}) ", data or b"")
                statuses.update(found or [b"reset" if data is None else b"none"])
        self.assertEqual(self.strict.faults, [])
        self.assert_nothing_left(before)
        self.tell("%s; at the upstream %d; the slowest 100 took %.2f s; %d descriptors and %d threads before, %d and %d"
                  " after", " ".join("%s %d" % (status.decode(), count) for status, count in sorted(statuses.items())),
                  self.strict.calls, longest, *before, *self.held())
        allowed = {b"%d" % status for status in (100, 200, 204, 400, 404, 405, 408, 413, 414, 415, 417, 431, 501, 505)}
        self.assertLessEqual(set(statuses), allowed | {b"none"})
        self.assertGreater(len(statuses), 5)

    def test_a_refusal_among_pipelined_requests_can_be_read_every_time(self):
        self.start(MAX_BODY_BYTES=1000, MAX_TOKENS=10 ** 9)
        large = b"x" * 3000000
        table = (("unread", request("POST", CHAT, large), 413, "closed"),
                 ("unread chunks", unsized(CHAT, CHUNKED) + chunk(large) + LAST, 413, "closed"),
                 ("no head", request("GET", "/health", b"", "Host: other.test"), 400, "closed"),
                 ("no JSON", request("POST", CHAT, b"{"), 400, "goes on"))
        read = 0
        for name, refused, status, then in table:
            for number in range(self.size(10, 100)):
                with self.subTest(name, number=number):
                    position = number % 10
                    before = self.stub.calls
                    client = self.connect()
                    sender = threading.Thread(target=HandlerTest.quietly, args=(
                        client.send, call() * position + refused + call() * (9 - position)))
                    sender.start()
                    statuses = [client.read().status for _ in range(position + 1 if then == "closed" else 10)]
                    after = [200] * (9 - position) if then == "goes on" else []
                    self.assertEqual(statuses, [200] * position + [status] + after)
                    self.assertTrue(client.answered.whole)
                    if then == "closed":
                        self.assertEqual(client.ending(), "closed")
                    sender.join(PATIENCE)
                    client.close()
                    self.assertEqual(self.stub.calls - before, statuses.count(200))
                    read += 1
        self.tell("%d refusals of %d were read", read, len(table) * self.size(10, 100))

    def test_a_large_request_sent_ahead_of_an_answer_in_pieces_cuts_neither(self):
        self.start(None, MAX_BODY_BYTES=1000)
        whole = answer()
        table = [("stream", STREAM + chunk(event(1)), chunk(event(2)) + LAST)]
        if llm_proxy.PATIENT:  # else it shows nowhere how much was read ahead
            table += [("head in pieces", whole[:20], whole[20:]), ("body in pieces", whole[:-3], whole[-3:])]
        for name, first, rest in table:
            with self.subTest(name):
                client = self.connect()
                sender = threading.Thread(target=HandlerTest.quietly, args=(
                    client.send, call(stream=name == "stream") + request("POST", CHAT, b"x" * 3000000)))
                sender.start()
                asked = self.stub.next()
                asked.send(first)
                wait_for(self.has_begun if name == "body in pieces" else self.read_ahead)
                with contextlib.suppress(OSError):
                    asked.send(rest)
                asked.finish()
                answered = client.read()
                self.assertEqual((answered.status, answered.whole), (200, True))
                self.assertEqual((client.read().status, client.ending()), (413, "closed"))
                sender.join(PATIENCE)

    def read_ahead(self):
        """Whether as much was read ahead of a caller as ever is."""
        callers = [one.caller for one in [*self.proxy.relay.flows, *self.proxy.relay.watches.values()]]
        return any(len(caller.ahead) >= llm_proxy.MAX_AHEAD for caller in callers)

    def has_begun(self):
        """Whether the first piece of an answer that is awaited whole has come; its caller is not read from then."""
        replies = [watch.party.reply for watch in list(self.proxy.relay.watches.values())]
        return any(getattr(reply, "first", b"") for reply in replies)

    def test_draining_goes_on_with_connections_for_which_no_thread_could_be_started(self):
        TlsTest.setUp(self)
        TlsTest.start_tls(self, None)
        client, cut = TlsTest.connect_tls(self).send(call(stream=True)), []
        asked = self.stub.next()
        asked.send(STREAM + chunk(event(1)))
        client.head()
        drainer = threading.Thread(target=lambda: cut.append(self.server.drain(PATIENCE / 2)))
        with no_threads() as attempts:
            asked.send(LAST)
            asked.finish()
            wait_for(lambda: attempts)
            drainer.start()
            wait_for(lambda: CommandsTest.refused(self.address), "the end of accepting")
        drainer.join(PATIENCE)
        self.assertEqual((cut, len(self.server.open)), ([0], 0))
        self.assertEqual(self.entry()["outcome"], "ok")


class FaultsTest(EnduranceCase):

    # -- many connections

    @staticmethod
    def percentile(values, share):
        return sorted(values)[int(len(values) * share)]

    def begin_streams(self, address, number):
        """-> pairs of (Client, Asked) whose streams have begun."""
        pairs = []
        for _ in range(number):
            client = Client(address)
            self.addCleanup(client.reset)
            client.send(call(stream=True))
            asked = self.stub.next()
            asked.send(STREAM)
            client.head()
            pairs.append((client, asked))
        return pairs

    @staticmethod
    def pace(pairs, rate, go_on, idle=()):
        """Send `rate` events a second, to one stream after the other, and take them in: all in one thread, so that
        none waits for another. -> ([seconds that an event was under way], {idle Client: when its end came})"""
        selector, count, delays, ended, rest = selectors.DefaultSelector(), 0, [], {}, {}
        for client in [client for client, _ in pairs] + list(idle):
            client.sock.setblocking(False)
            selector.register(client.sock, selectors.EVENT_READ, client)
        began = now = time.monotonic()
        late = None
        while True:
            due = began + count / rate
            if late is None and not go_on(now, ended):
                late = now + PATIENCE  # what was sent has yet to arrive
            if late is not None and (len(delays) == count or now > late):
                break
            if late is None and now >= due:
                pairs[count % len(pairs)][1].send(chunk(b"data: %.9f\n\n" % time.monotonic()))
                count += 1
            for key, _ in selector.select(max(0, due - time.monotonic()) if late is None else 0.1):
                data = key.fileobj.recv(65536)
                now = time.monotonic()
                if not data:
                    ended[key.data] = now
                    selector.unregister(key.fileobj)
                    continue
                *lines, rest[key.data] = (rest.get(key.data, b"") + data).split(b"\n\n")
                delays += [now - float(line.rpartition(b": ")[2]) for line in lines]
            now = time.monotonic()
        selector.close()
        for client, _ in pairs:
            client.sock.settimeout(PATIENCE)
        assert len(delays) == count, "%d of %d events arrived" % (len(delays), count)
        return delays, ended

    def test_a_thousand_idle_connections_slow_no_stream_and_are_closed_on_time(self):
        number, streams, rate = self.size((50, 5, 200), (1000, 50, 1000))
        idle_seconds = self.size(0.3, llm_proxy.Handler.IDLE_SECONDS)
        if self.LONG:
            llm_proxy.raise_descriptor_limit()
        self.launch(None, MAX_CONNECTIONS=2000)
        self.stub.answer = lambda asked: (self.stub.waiting.put(asked), asked.over.wait())
        with mock.patch.object(llm_proxy.Handler, "IDLE_SECONDS", idle_seconds):
            there = self.begin_streams(("127.0.0.1", self.stub.port), streams)
            seconds = self.size(0.1, 5)
            direct, _ = self.pace(there, rate, lambda now, _, end=time.monotonic() + seconds: now < end)
            before = self.resident()
            pairs = self.begin_streams(self.address, streams)
            idle = {}
            for _ in range(number):
                client = self.connect()
                self.assertEqual(client.send(request("GET", "/health")).read("GET").status, 200)
                idle[client] = time.monotonic()
            during = self.resident()
            end = time.monotonic() + idle_seconds + PATIENCE
            delays, ended = self.pace(pairs, rate, lambda now, ended: now < end and len(ended) < number, idle)
            lives = [ended[client] - since for client, since in idle.items() if client in ended]
        for client, asked in there + pairs:
            asked.send(LAST)
            asked.over.set()
        self.assertEqual(len(lives), number)
        there, here = self.percentile(direct, 0.99), self.percentile(delays, 0.99)
        self.tell("p50 %.2f ms, p99 %.2f ms, worst %.2f ms of %d events; without the proxy p50 %.2f, p99 %.2f; memory"
                  " %.1f + %.1f MiB; idle ones closed after %.3f to %.3f s", self.percentile(delays, 0.5) * 1000,
                  here * 1000, max(delays) * 1000, len(delays), self.percentile(direct, 0.5) * 1000, there * 1000,
                  before, during - before, min(lives), max(lives))
        if self.LONG:  # on a busy machine, or in one process with its callers, neither says anything
            self.assertLessEqual(here - there, 0.020)
            self.assertLessEqual(during - before, 60)
        self.assertGreaterEqual(min(lives), idle_seconds - 0.1)  # the proxy began to wait a moment before we read
        self.assert_within(idle_seconds + 1, max(lives))

    # -- callers that leave

    @staticmethod
    def half_close_and_close(client):
        client.sock.shutdown(socket.SHUT_WR)
        client.close()

    PARTS = {  # of an answer: its head, and some of its body; by whether it is a stream
        False: (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n", b'{"choices":'),
        True: (STREAM, chunk(event(1)))}

    def during_its_upload(self, client, stream):
        """A stream stands for a body in chunks here."""
        framing, piece = (CHUNKED, chunk(b"x")) if stream else ("Content-Length: 1000", b"x")
        client.send(unsized("/v1/files", framing) + piece)
        asked = self.stub.next()
        self.assertEqual(next(asked.reader.body(asked.fields)), b"x")
        return asked

    def before_the_answer(self, client, stream):
        client.send(call(stream=stream))
        asked = self.stub.next()
        asked.read_body()
        return asked

    def before_the_first_byte(self, client, stream):
        asked, address = self.before_the_answer(client, stream), self.proxy.routes.base.addresses[0]
        address.last = None
        asked.send(self.PARTS[stream][0])
        wait_for(lambda: address.last is not None, "the reading of the head")
        if stream:  # else the proxy waits for the whole of it
            client.head()
        return asked

    def in_the_middle(self, client, stream):
        asked = self.before_the_first_byte(client, stream)
        asked.send(self.PARTS[stream][1])
        if stream:
            client.expect(event(1))
            self.assertEqual(client.reader.until(b"\r\n"), b"\r\n")  # unread bytes would make a RST of the FIN
        return asked

    def test_whoever_leaves_in_whatever_phase_its_upstream_is_closed_within_a_second(self):
        self.start(None, reads=False, MAX_TOKENS=10 ** 6)
        phases = (self.during_its_upload, self.before_the_answer, self.before_the_first_byte, self.in_the_middle)
        hang_ups = (self.half_close_and_close, Client.reset)
        worst = {}
        for turn in range(self.size(1, 20)):
            cases = {}
            for phase, hang_up, stream in itertools.product(phases, hang_ups, (False, True)):
                client = self.connect()
                cases[phase(client, stream).sock] = client, (phase.__name__, hang_up.__name__, stream), hang_up
            self.assertEqual(self.in_flight(), len(cases))
            watching, left, took = selectors.DefaultSelector(), {}, {}
            for sock, (client, case, hang_up) in cases.items():
                watching.register(sock, selectors.EVENT_READ, case)
                hang_up(client)
                left[case] = time.monotonic()
            while watching.get_map():
                found = watching.select(PATIENCE)
                self.assertTrue(found, "still open: %r" % [key.data for key in watching.get_map().values()])
                for key, _ in found:
                    data = b""
                    with contextlib.suppress(ConnectionError):
                        data = key.fileobj.recv(65536)
                    if not data:
                        took[key.data] = time.monotonic() - left[key.data]
                        watching.unregister(key.fileobj)
            watching.close()
            for case, seconds in took.items():
                worst[case] = max(seconds, worst.get(case, 0))
                with self.subTest(case, turn=turn):
                    self.assert_within(1, seconds)
            self.assert_within(1, self.seconds_until(lambda: not self.in_flight()))
            health = self.ask(request("GET", "/health")).json()
            self.assertEqual(health["upstreams"]["base"]["in_flight"], 0)
            wait_for(lambda: len(self.lines.entries()) == len(cases) * (turn + 1), "a line for each")
            for asked in self.stub.requests:
                asked.finish()
        self.assertEqual({entry["outcome"] for entry in self.lines.entries()}, {"caller_gone"})
        self.tell("the worst of %d endings, of %d kinds, took %.3f s: %r", len(worst) * (turn + 1), len(worst),
                  *max((took, case) for case, took in worst.items()))

    def test_whoever_leaves_within_a_metered_body_was_never_heard_of_upstream(self):
        self.start()
        cases = list(itertools.product((False, True), (self.half_close_and_close, Client.reset)))
        clients = [self.connect().send(call(None, "Expect: 100-continue", stream=stream)[:-5]) for stream, _ in cases]
        self.assertEqual([client.head().status for client in clients], [100] * 4)  # so their bodies are awaited
        for client, (_, hang_up) in zip(clients, cases):
            hang_up(client)
        self.assert_within(1, self.seconds_until(lambda: not self.server.open))
        wait_for(lambda: [entry["outcome"] for entry in self.lines.entries()] == ["caller_gone"] * 4)
        self.assertEqual((self.stub.connections, self.in_flight()), (0, 0))

    # -- upstreams that are killed

    ENDPOINT = """
import socket, sys, time
body = sys.stdin.buffer.read()
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
sock, heard = listener.accept()[0], b""
while not heard.endswith(b"}"):
    heard += sock.recv(65536 if sys.argv[1] == "all" else 20)
    if sys.argv[1] == "unread":
        break
for start in range(0, len(body), 1000):
    sock.sendall(body[start:start + 1000])
print("written", flush=True)
time.sleep(600)
"""

    def endpoint(self, reading, body):
        """An endpoint in a process of its own, which sends `body` for an answer and then waits to be killed."""
        process = subprocess.Popen([sys.executable, "-I", "-S", "-c", self.ENDPOINT, reading],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.addCleanup(lambda: (process.kill(), process.wait(), process.stdout.close()))
        process.stdin.write(body)
        process.stdin.close()
        return process

    def test_when_an_upstream_is_killed_its_caller_has_every_byte_and_sees_the_cut(self):
        """A killed endpoint closes with a FIN; one that left bytes unread, with a RST. By the first alone a body that
        only closing ends looks whole, to us as to everybody (RFC 9112 6.3)."""
        events = [event(number) for number in range(self.size(200, 20000))]
        body, ok = b"".join(events), b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        framings = {"chunked": STREAM + b"".join(map(chunk, events)), "until close": ok + b"\r\n" + body,
                    "sized": ok + b"Content-Length: %d\r\n\r\n%b" % (len(body) + 1, body)}
        cases = {(name, reading): self.endpoint(reading, data)
                 for name, data in framings.items() for reading in ("all", "unread")}
        worst = 0
        for (name, reading), process in cases.items():
            with self.subTest(name, reading=reading):
                self.start(BASE_API_URL="http://127.0.0.1:%d" % int(process.stdout.readline()))
                client = self.connect().send(call(stream=True))
                client.head()
                if reading == "unread" or self.LONG:  # some systems drop what stands before a RST
                    client.expect(body)
                self.assertEqual(process.stdout.readline(), b"written\n")
                process.kill()
                began = time.monotonic()
                answered = client.rest()
                took = time.monotonic() - began
                self.assertEqual(answered.body, body)
                self.assertEqual(answered.whole, (name, reading) == ("until close", "all"))
                self.assert_within(1, took)
                self.assert_within(1, self.seconds_until(lambda: not self.in_flight()))
                self.assertEqual(self.entry()["outcome"], "ok" if answered.whole else "upstream_cut")
                worst = max(worst, took)
        self.tell("the worst of %d cuts came after %.3f s, behind %d bytes", len(cases), worst, len(body))

    # -- upstreams that talk nonsense

    @staticmethod
    def again_and_again(start, piece):
        """A Stub's `answer` that goes on for as long as anybody listens."""
        def act(asked):
            asked.send(start)
            while True:
                asked.send(piece)
        return act

    @staticmethod
    def then(data, act):
        return lambda asked: (asked.send(data), act(asked))

    OK = b"HTTP/1.1 200 OK\r\n"
    CHUNKS = OK + b"Transfer-Encoding: chunked\r\n\r\n"
    TWO = b"Content-Length: 2\r\n\r\n{}"
    EVIL = b"X-Injected: evil"

    def right(self):
        """Answers that are odd, and understood all the same: -> {name: (what the Stub does, status, body, whether its
        connection may carry another call)}"""
        ok, two, chunks, good = self.OK, self.TWO, self.CHUNKS, answer(b"{}")
        hints = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n" + self.EVIL + b"\r\n\r\n"
        return {
            "a few 103s before": (sends(hints * 3 + good, close=False), 200, b"{}", True),
            "no status text": (sends(b"HTTP/1.1 200\r\n" + two, close=False), 200, b"{}", True),
            "an empty status text": (sends(b"HTTP/1.1 200 \r\n" + two, close=False), 200, b"{}", True),
            "white space around a length": (
                sends(ok + b"Content-Length: \t 2 \t\r\n\r\n{}", close=False), 200, b"{}", True),
            "trailers": (sends(
                chunks + chunk(b"{}") + b"0\r\n" + self.EVIL + b"\r\n\r\n", close=False), 200, b"{}", True),
            "what Python calls a line end": (sends(
                ok + b"X-A: b\x85" + self.EVIL + b"\r\n" + two, close=False), 200, b"{}", True),
            "an overlong body": (sends(ok + two + b"more", close=False), 200, b"{}", False),
            "more behind the last chunk": (sends(
                chunks + chunk(b"{}") + LAST + b"more", close=False), 200, b"{}", False),
            "two answers in one write": (sends(good + answer(b"poison", "200 OK", "X-Injected: evil"), close=False),
                                         200, b"{}", False),
            "a 204 with a body": (sends(b"HTTP/1.1 204 No\r\n" + two, close=False), 204, b"", False),
            "a 304 with a body": (sends(b"HTTP/1.1 304 No\r\n" + two, close=False), 304, b"", False),
            "no framing": (sends(ok + b"\r\n{}"), 200, b"{}", False),
            "an early answer": (lambda asked: (asked.send(good), asked.over.wait(PATIENCE), asked.read_body()),
                                200, b"{}", False)}

    def wrong(self):
        """Answers that are none, or come to a wrong end: -> {name: what the Stub does}"""
        ok, two, chunks, evil = self.OK, self.TWO, self.CHUNKS, self.EVIL
        return {
            "a short body": sends(ok + b"Content-Length: 5\r\n\r\n{}"),
            "a short body, then a reset": self.then(ok + b"Content-Length: 5\r\n\r\n{}", Asked.reset),
            "a reset where the end would be": self.then(ok + b"\r\n{}", Asked.reset),
            "a bad chunk size": sends(chunks + b"XYZ\r\n{}\r\n", close=False),
            "a negative chunk size": sends(chunks + b"-2\r\n{}\r\n", close=False),
            "a chunk without its line end": sends(chunks + b"2\r\n{}XX0\r\n\r\n", close=False),
            "chunks that end with LF": sends(chunks + b"2\n{}\n0\n\n", close=False),
            "a huge chunk size": sends(chunks + b"1" + b"0" * 16 + b"\r\n{}", close=False),
            "a huge chunk that ends": sends(chunks + b"F" * 16 + b"\r\n{}"),
            "no last chunk": sends(chunks + chunk(b"{}")),
            "half a last chunk": sends(chunks + chunk(b"{}") + b"0\r\n"),
            "an endless chunk extension": self.again_and_again(chunks + b"2;", b"x" * 500),
            "endless trailers": self.again_and_again(chunks + chunk(b"{}") + b"0\r\n", (evil + b"\r\n") * 50),
            "a trailer with a bare LF": sends(chunks + chunk(b"{}") + b"0\r\nX: y\n" + evil + b"\r\n\r\n", close=False),
            "two lengths": sends(ok + b"Content-Length: 3\r\n" + two, close=False),
            "a length with a sign": sends(ok + b"Content-Length: +2\r\n\r\n{}", close=False),
            "a length with a space": sends(ok + b"Content-Length: 0 2\r\n\r\n{}", close=False),
            "a list of lengths": sends(ok + b"Content-Length: 2, 2\r\n\r\n{}", close=False),
            "a huge length": sends(ok + b"Content-Length: %b\r\n\r\n{}" % (b"9" * 20), close=False),
            "chunks and a length": sends(
                chunks[:-2] + b"Content-Length: 12\r\n\r\n" + chunk(b"{}") + LAST, close=False),
            "another coding": sends(ok + b"Transfer-Encoding: gzip\r\n\r\n{}", close=False),
            "two codings": sends(chunks.replace(b"chunked", b"gzip, chunked") + chunk(b"{}") + LAST, close=False),
            "endless 103s": self.again_and_again(b"", b"HTTP/1.1 103 Early Hints\r\n" + evil + b"\r\n\r\n"),
            "a 101": sends(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n", close=False),
            "a header of 70 KB": sends(ok + b"X-A: " + b"x" * 70000 + b"\r\n" + two, close=False),
            "an endless head": self.again_and_again(ok, b"X-A: b\r\n"),
            "an endless start line": self.again_and_again(ok[:-2], b"x" * 1000),
            "bare LFs": sends((ok + two).replace(b"\r\n", b"\n"), close=False),
            "NUL in a value": sends(ok + b"X-A: b\x00c\r\n" + two, close=False),
            "a folded line": sends(ok + b"X-A: b\r\n " + evil + b"\r\n" + two, close=False),
            "a space before the colon": sends(ok + b"X-Injected : evil\r\n" + two, close=False),
            "status 99": sends(b"HTTP/1.1 99 No\r\n" + two, close=False),
            "status 1000": sends(b"HTTP/1.1 1000 No\r\n" + two, close=False),
            "HTTP/2.0": sends(b"HTTP/2.0 200 OK\r\n" + two, close=False),
            "HTTP/0.9": sends(b"<html>It works!</html>"),
            "another protocol": sends(b"SSH-2.0-OpenSSH_9.2\r\n", close=False),
            "an alert of TLS": sends(b"\x15\x03\x03\x00\x02\x02\x46"),
            "a handshake of TLS": sends(b"\x16\x03\x03\x00\x7a\x02\r\n\r\n\x03" + bytes(range(128)), close=False),
            "nothing": Asked.close,
            "a reset": Asked.reset,
            "half a head": sends(ok + b"X-A: b"),
            "half a head, then a reset": self.then(ok + b"X-A: b", Asked.reset),
            "a bare CR in a value": sends(ok + b"X-A: b\r" + evil + b"\r\n" + two, close=False),
            "a bare LF in a value": sends(ok + b"X-A: b\n" + evil + b"\r\n" + two, close=False),
            "a bare CR in the status text": sends(b"HTTP/1.1 200 OK\r" + evil + b"\r\n" + two, close=False),
            "a bare CR in a redirect": sends(
                b"HTTP/1.1 302 Found\r\nLocation: /x\r" + evil + b"\r\n" + two, close=False),
            "VT in a value": sends(ok + b"Content-Type: text/plain\x0b" + evil + b"\r\n" + two, close=False)}

    def test_a_malformed_upstream_is_a_502_or_a_cut_at_once_and_poisons_no_later_call(self):
        """A stream may have begun before the fault came; an answer that is waited for has not."""
        self.start(reads=False, MAX_TOKENS=10 ** 6, MAX_BODY_BYTES=1 << 24)
        table = [(name, *row) for name, row in self.right().items()]
        table += [(name, act, None, None, False) for name, act in self.wrong().items()]
        worst = 0
        for number, ((name, act, status, body, lasting), stream) in enumerate(itertools.product(table, (False, True))):
            with self.subTest(name, stream=stream):
                early, second = name == "an early answer", b'{"said": %d}' % number
                # of a body this long the sockets' buffers cannot hold all
                data = call(stream=stream, **{"pad": "x" * (8 << 20)} if early else {})
                acts = iter([act if early else lambda asked: (asked.read_body(), act(asked)),
                             lambda asked: (asked.read_body(), asked.send(answer(second)))])
                self.stub.answer = lambda asked: next(acts)(asked)
                calls, began = self.stub.calls, time.monotonic()
                answered = self.ask(data)
                took = time.monotonic() - began
                worst = max(worst, took)
                self.assert_within(1, took)
                self.assertNotIn("x-injected", [field for field, _ in answered.fields])
                self.assertNotIn(b"evil", answered.body)
                if status:
                    self.assertEqual((answered.status, answered.body, answered.whole), (status, body, True))
                elif answered.status != 502:
                    self.assertEqual((stream, answered.status, answered.whole), (True, 200, False))
                else:
                    self.assertEqual((answered.error()["type"], answered.whole), ("upstream_error", True))
                self.stub.requests[-1].over.set()
                answered = self.ask(call(stream=stream))
                self.assertEqual((answered.status, answered.body), (200, second))
                self.assertEqual(self.stub.calls, calls + 2)
                if not lasting:
                    self.assertIsNot(self.stub.requests[-1].sock, self.stub.requests[-2].sock)
        wait_for(lambda: not self.in_flight())
        self.tell("the worst of %d answers took %.3f s", 2 * len(table), worst)

    # -- a signal to stop

    def streams_of(self, number, **settings):
        """-> (a proxy in a process of its own, [(Client, Asked)] whose streams have begun)"""
        self.stub = Stub(None)
        self.addCleanup(self.stub.close)
        process = self.serve(BASE_API_URL="http://127.0.0.1:%d" % self.stub.port, MAX_TOKENS=1000, **settings)
        pairs = self.begin_streams(process.address, number)
        for number, (client, asked) in enumerate(pairs):
            asked.send(chunk(event(number)))
            client.expect(event(number))
        return process, pairs

    def test_a_signal_to_stop_refuses_callers_at_once_and_lets_every_stream_end(self):
        process, pairs = self.streams_of(self.size(5, 20))
        process.process.send_signal(signal.SIGTERM)
        refused = self.seconds_until(lambda: CommandsTest.refused(process.address))
        self.assert_within(0.2, refused)
        count = self.size(20, 1000)
        for turn in range(count):
            for number, (client, asked) in enumerate(pairs):
                asked.send(chunk(event(1000 * number + turn)))
        for number, (client, asked) in enumerate(pairs):
            asked.send(LAST)
            asked.finish()
            answered = client.rest()
            expected = event(number) + b"".join(event(1000 * number + turn) for turn in range(count))
            self.assertEqual((answered.whole, answered.body == expected), (True, True))
        began = time.monotonic()
        self.assertEqual(process.wait(), 0)
        took = time.monotonic() - began
        self.assert_within(0.5, took)
        self.assertFalse(process.said("Traceback"))
        self.tell("refused after %.3f s, over %.3f s after the last of %d streams", refused, took, len(pairs))

    def test_streams_that_outlive_the_drain_time_are_cut_so_that_nobody_takes_them_for_whole(self):
        drain = self.size(0.3, 1)
        process, pairs = self.streams_of(self.size(5, 20), DRAIN_SECONDS=drain)
        sent, over = [event(number) for number in range(len(pairs))], threading.Event()

        def go_on():
            while not over.wait(0.005):
                for number, (_, asked) in enumerate(pairs):
                    sent[number] += event(number)
                    with contextlib.suppress(OSError):
                        asked.send(chunk(event(number)))
        sender = threading.Thread(target=go_on, daemon=True)
        sender.start()
        began = time.monotonic()
        process.process.send_signal(signal.SIGTERM)
        for number, (client, _) in enumerate(pairs):
            answered = client.rest()
            self.assertEqual((answered.whole, sent[number].startswith(answered.body)), (False, True))
        cut = time.monotonic() - began
        self.assertEqual(process.wait(), 0)
        took = time.monotonic() - began
        over.set()
        sender.join(PATIENCE)
        self.assertGreaterEqual(cut, drain)
        self.assert_within(drain + 0.5, cut)
        self.assert_within(drain + 1, took)
        self.assertTrue(process.said("stopped, %d calls cut" % len(pairs)))
        self.assertFalse(process.said("Traceback"))
        self.tell("%d streams cut %.3f s after the signal, over after %.3f s", len(pairs), cut, took)

    # -- secrets

    @staticmethod
    def spellings(secret):
        """A secret as it is, escaped, in hexadecimal, and in base64 wherever it begins there."""
        data = secret.encode()
        found = {data, data.hex().encode(), data.hex().upper().encode(), urllib.parse.quote(secret, safe="").encode()}
        found |= {b"".join([form % byte for byte in data]) for form in (b"%%%02x", b"%%%02X", b"\\u%04x")}
        for shift, first in enumerate((0, 2, 3)):  # what stands before and behind colours the outermost letters
            text = base64.b64encode(bytes(shift) + data)[first:-4]
            found |= {text, text.translate(bytes.maketrans(b"+/", b"-_"))}
        return found

    def assert_silent(self, places, secrets):
        """None of the `secrets` stands in any of the `places`, {name: bytes}."""
        for place, data in places.items():
            for name, secret in secrets.items():
                with self.subTest(place, secret=name):
                    self.assertFalse([one for one in self.spellings(secret) if one in data], data)

    def told(self, data):
        """All that a caller is told, from the first byte to the end of the connection."""
        client = self.connect().send(data.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        with contextlib.suppress(Cut):
            while True:
                client.reader.more()
        client.close()
        return bytes(client.reader.data)

    def secret_calls(self, secrets):
        """-> {name: a request}, of every kind that comes to a different end; each carries as many secrets as it can."""
        key, wrong = secrets["key"], secrets["wrong key"]
        query = {name: urllib.parse.quote(secret, safe="") for name, secret in secrets.items()}
        cookie = "Cookie: session=%(cookie)s" % secrets, "Proxy-Authorization: Basic %(cookie)s" % secrets
        hidden = "token=%(query)s" % query

        def ask(path=CHAT, *fields, method="POST", shown=key, body=None, **payload):
            if body is None:
                body = chat(messages=[{"role": "user", "content": secrets["prompt"]}],
                            contents=[{"parts": [{"text": secrets["prompt"]}]}], **payload)
            return request(method, path + ("&" if "?" in path else "?") + hidden, body, *cookie, *fields, key=shown)
        found = {
            "good": ask(), "stream": ask(stream=True), "legacy": ask("/v1/completions", prompt=secrets["prompt"]),
            "unmetered": ask("/v1/files"), "a page": ask("/health", method="GET", body=b""),
            "a key in a query": ask(CHAT + "?key=" + query["key"], shown=None),
            "Anthropic": ask("/v1/messages", "X-Api-Key: " + key, "Anthropic-Version: 2023-06-01", shown=None),
            "Gemini": ask("/v1beta/models/m:generateContent", "X-Goog-Api-Key: " + key, shown=None),
            "Gemini, with a key in its query": ask(
                "/v1beta/models/m:streamGenerateContent?key=" + query["key"], shown=None),
            "limited": ask(max_tokens=10 ** 9), "limited stream": ask(stream=True, max_tokens=10 ** 9),
            "limited, Anthropic": ask("/v1/messages", "X-Api-Key: " + key, shown=None, max_tokens=10 ** 9),
            "refused above": ask(case="echo"), "failing above": ask(case="nonsense"),
            "cut above": ask(case="cut", stream=True),
            "down": ask("/dead/v1/chat/completions"), "no such path": ask("/dead/v1/files"),
            "no key": ask(shown=None), "a wrong key": ask(shown=wrong),
            "a wrong key in a query": ask("/v1/x?key=" + query["wrong key"], shown=None),
            "a wrong key, Anthropic": ask("/v1/messages", "X-Api-Key: " + wrong, shown=None),
            "a wrong key, Gemini": ask("/v1beta/models/m:generateContent", "X-Goog-Api-Key: " + wrong, shown=None),
            "two keys": ask(CHAT, "X-Api-Key: " + wrong),
            "a list with a wrong key": ask("/v1/models", method="GET", shown=wrong, body=b""),
            "a key with a line end": ask("/v1/x?key=%s%%0d%%0aX:" % query["wrong key"], shown=None),
            "another scheme": ask(
                CHAT, "Authorization: Basic " + base64.b64encode(wrong.encode()).decode(), shown=None),
            "no JSON": ask(body=b'{"messages": "%b' % secrets["prompt"].encode()),
            "a key twice": ask(body=b'{"a": "%b", "a": 1}' % secrets["prompt"].encode()),
            "a bad number": ask(max_tokens=secrets["prompt"]),
            "a bad model": ask(model=[secrets["prompt"]], max_tokens=-1),
            "a name in capitals": ask(MODEL=secrets["prompt"]), "a coded body": ask(CHAT, "Content-Encoding: gzip"),
            "a page before": ask("/health", method="OPTIONS", body=b""),
            "a forbidden method": ask("/x", method="TRACE", body=b"")}
        good = found["good"]
        found.update({
            "a folded line": good.replace(b"Cookie:", b"X: y\r\n Cookie:"), "two of a field": good.replace(
                b"Cookie", b"Authorization: Bearer %b\r\nCookie" % wrong.encode()),
            "a bad length": good.replace(b"Length: ", b"Length: +"),
            "a bad version": good.replace(b"HTTP/1.1", b"HTTP/3.1"),
            "a user in the target": good.replace(b" /v1", b" http://user:%b@proxy.test/v1" % wrong.encode(), 1),
            "a bad chunk": good.replace(b"Content-Length", b"Transfer-Encoding: chunked\r\nX-Length"),
            "no HTTP": secrets["prompt"].encode() + b"\r\n\r\n"})
        return found

    def act_on_secrets(self, asked):
        """The endpoint that shows its callers what it got, in any way it can."""
        case = asked.json().get("case") if b'"case"' in asked.body else None
        shown = asked.get("authorization") or ""
        if case == "echo":
            asked.send(answer(b'{"error": "you sent %b"}' % shown.encode(), "401 Unauthorized"))
        elif case == "nonsense":
            asked.send(b"HTTP/1.1 200 OK\r\nX-Key %b\r\n\r\n%b" % (shown.encode(), asked.body))
            asked.close()
        elif case == "cut":
            asked.send(STREAM + chunk(event(1)))
            asked.close()
        else:
            asked.send(answer(b'{"choices": [{"message": {"content": "fine"}}]}'))

    def test_no_secret_is_told_in_any_log_ledger_answer_or_page(self):
        kinds = ("base key", "key", "other key", "wrong key", "header", "prompt", "cookie", "query", "tunnel")
        secrets = {kind: "cnry+" + os.urandom(16).hex() for kind in kinds}  # the + has to be escaped in a URL
        with socket.socket() as bound, tempfile.TemporaryDirectory() as folder:
            bound.bind(("127.0.0.1", 0))  # and does not listen
            dead = "127.0.0.1:%d" % bound.getsockname()[1]
            settings = {"BASE_API_KEY": secrets["base key"], "PROXY_API_KEYS": "alice=" + secrets["key"],
                        "UPSTREAM_DEAD_URL": "http://" + dead, "UPSTREAM_DEAD_KEY": secrets["other key"],
                        "UPSTREAM_DEAD_HEADERS": "X-Secret: " + secrets["header"]}
            places = {}
            for form, reply in (("text", "assistant"), ("json", "error")):
                path, usage_log = (os.path.join(folder, form + name) for name in (".db", ".log"))
                self.start(self.act_on_secrets, LOG_FORMAT=form, LIMIT_REPLY=reply, DATABASE=path, USAGE_LOG=usage_log,
                           TOKEN_COST_MODE="estimate", RESPONSE_TOKEN_RESERVE=1, MAX_TOKENS=10 ** 6, **settings)
                for name, data in self.secret_calls(secrets).items():
                    told = self.told(data)
                    self.assertTrue(told.startswith(b"HTTP/1.1 "), name)
                    if name == "refused above":
                        # What an upstream says of the key it was shown is its own word, and passes untouched: its body
                        # alone is left out here, and must hold the key, or this call would test nothing.
                        head, _, body = told.partition(b"\r\n\r\n")
                        self.assertIn(secrets["base key"].encode(), body)
                        told = head
                    places["%s: %s" % (form, name)] = told
                self.ask(call(secrets["key"], "X-Request-ID: the-last"))
                wait_for(lambda: b"the-last" in self.lines.data, "the last line")
                self.proxy.books.close(PATIENCE)  # which writes the buckets, too
                self.assertEqual(LedgerCase.rows(path)[-1]["id"], "the-last")
                self.proxy.books.usage_log.stream.close()
                self.assertIn(b"the-last", self.contents(usage_log))
                places[form] = self.lines.data
            here = dict(settings, BASE_API_URL="http://127.0.0.1:%d/v1" % self.stub.port, BASE_MODEL="m")
            far = dict(here, UPSTREAM_FAR_URL="https://" + dead, UPSTREAM_FAR_KEY=secrets["other key"],
                       HTTPS_PROXY="http://user:%s@%s" % (secrets["tunnel"], dead))
            faulty = {name: secret + " \xe4" for name, secret in settings.items() if name != "UPSTREAM_DEAD_URL"}
            faulty.update(UPSTREAM_DEAD_HEADERS="X(Y): " + secrets["header"], UPSTREAM_FAR_URL="https://" + dead,
                          BASE_API_URL="http://user:%(base key)s@127.0.0.1/v1" % secrets,
                          HTTPS_PROXY="http://user:%(tunnel)s@:x" % secrets)
            commands = {"--help": self.command("--help", **far), "--check": self.command("--check", **far),
                        "faults": self.command("--check", **faulty),
                        "usage": self.command("usage", "--json", DATABASE=path)}
            serving = self.serve(**here)
            for path in ("/health", "/v1/models"):
                client = Client(serving.address)
                client.send(request("GET", path, b"", "Connection: close", key=secrets["key"]))
                places["process: " + path] = client.read("GET").body
                client.close()
            serving.process.send_signal(signal.SIGTERM)
            for name, process in [("a process", serving), *commands.items()]:
                _, out, err = process.finish()
                places[name] = (out + err).encode()
                self.assertNotEqual(places[name], b"")
            for name in os.listdir(folder):
                places[name] = self.contents(os.path.join(folder, name))
            self.assert_silent(places, secrets)
        asked = b"".join([asked.head + asked.body for asked in self.stub.requests])
        self.assertTrue(all(secrets[kind].encode() in asked for kind in ("base key", "prompt")))  # so they were there
        self.tell("%d places hold none of %d secrets", len(places), len(secrets))

    @staticmethod
    def contents(path):
        with open(path, "rb") as file:
            return file.read()

    # -- ways around a limit

    FORGED = ["X-Forwarded-For: ", "Forwarded: for=", "X-Real-IP: ", "True-Client-IP: ", "X-Client-IP: ",
              "CF-Connecting-IP: ", "X-Forwarded-For: 127.0.0.1, "]
    SPELLINGS = PathsTest.SAME_ENDPOINT + [
        "/openai/deployments/x/chat/completions", "/openai/deployments/x/chat/completions?api-version=1",
        "/base" + CHAT, "/base/v1//chat/completions", "/v1/v1/chat/completions", "/api/v1/chat/completions",
        "/v1/beta/chat/completions", "/V1/chat/completionS", "/v1/chat/%43OMPLETIONS", CHAT + "%2f%2e", CHAT + "/%00",
        "/v1/chat%2500/completions", "/v1/%5c/chat/completions", CHAT + ";a=1;b=2", CHAT + "%253Bx", "/v1/messages",
        "/v1/responses", "/v1/embeddings", "/v1beta/models/m:generateContent", "/v1/m:STREAMgeneratecontent"]

    def test_no_invented_key_forged_address_or_spelling_gets_more_than_the_rule_allows(self):
        self.start(LIMITS="address 5 requests per hour")
        number, seen = itertools.count(), []

        def invent():
            client = Client(self.address)
            for count in iter(number.__next__, None):
                if count >= self.size(60, 1000):
                    return client.close()
                forged = self.FORGED[count % len(self.FORGED)] + "10.1.%d.%d" % divmod(count, 256)
                client.send(call("invented-%d" % count if count % 3 else None, forged))
                seen.append(b"limit reached" in client.read().body)
        threads = [threading.Thread(target=invent, daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.assertEqual((self.stub.calls, seen.count(False), len(seen)), (5, 5, self.size(60, 1000)))
        body = chat(prompt="x", input="x", contents=[{"parts": [{"text": "x"}]}])
        for path in self.SPELLINGS:
            for version in ("1.1", "1.0"):
                with self.subTest(path=path, version=version):
                    data = request("POST", path, body, "X-Forwarded-For: 10.9.9.9", key="k" + version, version=version)
                    answered = self.ask(data)
                    self.assertIn("limit reached" if answered.status == 200 else '"error"', answered.body.decode())
                    self.assertEqual(self.stub.calls, 5)
        client = self.connect().send(call("a") * 20)  # in one segment
        self.assertEqual({client.read().status for _ in range(20)}, {200})
        self.assertEqual(self.stub.calls, 5)
        self.assertEqual(len(self.proxy.limits.buckets.levels), 1)  # that of 127.0.0.1, and none of a forged address
        self.assertEqual(self.left(), 0)

    def test_nobody_touches_the_bucket_of_a_caller_whose_name_or_address_is_spelled_as_a_key(self):
        self.start(MAX_TOKENS=10)
        ways = ([dict(key=text) for text in ("127.0.0.1", "address", "address=127.0.0.1", "('address', '127.0.0.1')")] +
                [dict(field=name + ": 127.0.0.1") for name in ("X-Api-Key", "X-Goog-Api-Key")] +
                [dict(path="?key=127.0.0.1"), dict(path="?KEY=127.0.0.1")] +
                [dict(key="mine", field=row + "127.0.0.1") for row in self.FORGED])
        for way in ways:
            for _ in range(3):
                fields = [way["field"]] if "field" in way else []
                self.ask(request("POST", CHAT + way.get("path", ""), chat(), *fields, key=way.get("key")))
            with self.subTest(**way):
                self.assertEqual(self.left(), 10)
        self.assertEqual(self.stub.calls, 10 + 3 * 3 + 10)  # 127.0.0.1 in five spellings, 3 more, and mine
        for row in self.FORGED * 3:  # and a victim cannot be somebody else either
            self.ask(call(None, row + "10.1.2.3"))
        self.assertEqual((self.stub.calls, self.left()), (29 + 10, 0))

    def test_no_spelling_of_a_maximum_gets_more_than_an_estimate_allows(self):
        """Each is refused (400), or limited as what it says costs more than there is. Read as nothing said, each would
        get in for a token: and an upstream in Go reads names in any case, with the long s and the sign for Kelvin."""
        self.start(TOKEN_COST_MODE="estimate", MAX_TOKENS=100, RESPONSE_TOKEN_RESERVE=1, LIMIT_REPLY="error")
        odd = (-1, -10 ** 30, 1.5, 1e2, -0.0, "1", "", True, False, [1], {}, {"x": 1})
        bodies = [chat(**{name: value}) for value in odd for name in ("max_tokens", "max_completion_tokens")]
        bodies += [chat(max_tokens=value) for value in (10 ** 30, 2 ** 31, 2 ** 63, 2 ** 64, 98)]
        bodies += [chat(**{name: 1000}) for name in (
            "MAX_TOKENS", "Max_Tokens", "max_Tokens", "max_to\u212aens", "max_token\u017f", "MAX_COMPLETION_TOKENS",
            "max_Completion_tokens", "Model", "MODEL", "Stream", "STREAM")]
        head, one, many = chat()[:-1], b', "max_tokens": 1', b', "max_tokens": 1000'
        bodies += [head + rest + b"}" for rest in (
            one + many, many + one, one + b', "max\\u005ftokens": 1000', one + b', "max_tokens": null',
            b', "max_tokens": NaN', b', "max_tokens": Infinity', b', "max_tokens": 1e999', b', "max_tokens": 01',
            b', "max_tokens": +1', b', "max_tokens": 0x1', one + b', "model": "other"',
            b', "max_tokens": ' + b"9" * 5000)]
        whole = chat(max_tokens=1)
        bodies += [whole + b"{}", b"[%b]" % whole, b"\xef\xbb\xbf" + whole, whole.decode().encode("utf-16"),
                   whole[:-1] + b",}", b"/**/" + whole]
        for body in bodies:
            with self.subTest(body=body[-80:]):
                answered = self.ask(request("POST", CHAT, body, key="attacker"))
                self.assertIn(answered.status, (400, 429))
                self.assertEqual((self.stub.calls, self.left("attacker")), (0, 100))
        self.assertEqual(self.ask(request("POST", CHAT, chat(max_tokens=47), key="attacker")).status, 200)
        self.assertEqual((self.stub.calls, self.left("attacker"), self.left()), (1, 50, 100))
        self.assertEqual(self.ask(request("POST", CHAT, chat(max_tokens=48), key="attacker")).status, 429)
        self.assertEqual(self.stub.calls, 1)

    # -- all of it at once

    FAULTS = {  # what goes wrong -> what the caller is told, or sees
        "refused": 502, "reset": 502, "500": 500, "cut": "cut", "malformed": 502, "slow": "right",
        "fin": "gone", "rst": "gone", "bad": 400, "half, fin": "gone", "half, rst": "gone"}

    @staticmethod
    def said(identity):
        """What the endpoint says to the call of this name: up to 35 KB that no other call is told."""
        digest = hashlib.sha256(identity.encode()).digest()
        return (b"data: " + digest.hex().encode() + b"\n\n") * (1 + int.from_bytes(digest[:2], "big") % 480), digest[2]

    def act(self, asked):
        """The endpoint, with every fault that one can have. It holds nothing of what is over."""
        fault, (body, kind) = asked.json().get("fault"), self.said(asked.get("x-request-id"))
        del self.stub.requests[:]
        half = STREAM + chunk(body[:len(body) // 2])
        if fault == "slow":
            time.sleep(0.05)
        if fault == "reset":
            asked.reset()
        elif fault == "500":
            asked.send(answer(body, "500 Internal Server Error"))
        elif fault == "malformed":
            sends(b"HTTP/1.1 2OO OK\r\n\r\n" + body)(asked)
        elif fault == "cut":
            asked.send(half)
            (Asked.close if kind % 2 else Asked.reset)(asked)
        elif fault in ("fin", "rst"):
            asked.send(half)
            asked.wait_for_hang_up()
            asked.close()
        elif kind % 3 == 0:
            asked.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        elif kind % 3 == 1:
            asked.send(STREAM + b"".join(map(chunk, body.splitlines(True))) + LAST)
        else:
            sends(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + body)(asked)

    def soaked_call(self, client, identity, fault):
        """-> what its caller saw: 'right', 'wrong', 'cut', 'gone', or a status that is not 200"""
        path, name = "/dead" + CHAT if fault == "refused" else CHAT, "X-Request-ID: " + identity
        body = chat(fault=fault, stream=self.said(identity)[1] % 2 == 0)
        data = request("POST", path, body, name, key=identity.partition(":")[0])
        if fault == "bad":
            return client.send(data.replace(b"Content-Length: ", b"Content-Length: +")).read().status
        if fault in ("half, fin", "half, rst"):
            client.send(request("POST", path, body, name, "Expect: 100-continue")[:-len(body)])
            assert client.head().status == 100  # so it waits for the body now
            client.send(body[:-5])
            (Client.reset if fault == "half, rst" else self.half_close_and_close)(client)
            return "gone"
        answered, (expected, _) = client.send(data).head(), self.said(identity)
        if fault in ("fin", "rst"):
            client.expect(expected[:len(expected) // 2])
            (Client.reset if fault == "rst" else self.half_close_and_close)(client)
            return "gone"
        client.rest()
        if answered.status != 200:
            return answered.status
        if not answered.whole:
            return "cut" if expected.startswith(answered.body) else "wrong"
        same = hashlib.sha256(answered.body).digest() == hashlib.sha256(expected).digest()
        return "right" if same else "wrong"

    def soak(self, number, end, seen):
        """One caller, until `end`. What it saw goes into `seen`: {identity of a call: (fault, what was seen)}"""
        chance, client = random.Random(number), None
        for count in itertools.count():
            if time.monotonic() > end:
                break
            fault = chance.choice(sorted(self.FAULTS)) if chance.random() < 0.1 else None
            identity = "soak-%d:%d" % (number, count)
            try:
                client = client or Client(self.address)
                seen[identity] = fault, self.soaked_call(client, identity, fault)
            except Exception as reason:
                seen[identity] = fault, "wrong: %r" % reason
            if fault or chance.random() < 0.1 or not seen[identity][1] == "right":
                client = client.close()
            time.sleep(chance.random() * self.size(0, 0.2))  # callers read, too
        if client:
            client.close()

    def left_open(self):
        """-> descriptors and threads of the proxy's process, where the system tells. Those that are only kept for a
        moment, so that a last answer can be read, do not count."""
        if not os.path.isdir("/proc/self/fd"):
            return 0, 0
        if not self.LONG:
            self.proxy.routes.close_stale(everything=True)
            gc.collect()
        kept = 0 if self.LONG else len(self.server.turned_away)
        return len(os.listdir("/proc/%d/fd" % self.pid)) - kept, len(os.listdir("/proc/%d/task" % self.pid))

    def test_a_tenth_of_faults_spoils_no_other_call_and_leaves_nothing_behind(self):
        seconds, seen, samples, threads = self.size(0.8, 300), {}, [], []
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))  # and does not listen
            self.launch(self.act, UPSTREAM_DEAD_URL="http://127.0.0.1:%d" % bound.getsockname()[1],
                        BREAKER_FAILURES=10 ** 6)
            before, end = self.left_open(), time.monotonic() + seconds
            for number in range(self.size(8, 50)):
                threads.append(threading.Thread(target=self.soak, args=(number, end, seen), daemon=True))
                threads[-1].start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(1)
                    samples.append(self.resident())
            wait_for(lambda: all(now <= then for now, then in zip(self.left_open(), before)),
                     "the return to %d and %d" % before)
        wrong = {identity: row for identity, row in seen.items() if row[1] != self.FAULTS.get(row[0], "right")}
        self.assertFalse(wrong)
        faults = collections.Counter(fault for fault, _ in seen.values())

        def lines():
            rows = [json.loads(row) for row in self.logged().splitlines(True) if row.endswith("\n")]
            return collections.Counter(row["id"] if row["path"] else "bad" for row in rows if "outcome" in row)
        expected = collections.Counter("bad" if fault == "bad" else identity for identity, (fault, _) in seen.items())
        wait_for(lambda: sum(lines().values()) >= len(seen), "a line for each call")
        self.assertEqual(lines(), expected)
        self.assertNotIn("Traceback", self.logged())
        growth = max(samples[60:] or [0]) - (samples[60:] or [0])[0]
        self.tell("%d calls, %d of them with faults: %s; memory %.1f MiB, %.1f at the end, at most %.1f more than after"
                  " a minute; descriptors and threads %r, then %r", len(seen), len(seen) - faults.pop(None, 0),
                  dict(faults), samples[0], samples[-1], growth, before, self.left_open())
        if self.LONG:
            self.assertLessEqual(growth, 10)


if __name__ == "__main__":
    if "--soak" in sys.argv:
        sys.argv.remove("--soak")
        EnduranceCase.LONG = True
        unittest.main(defaultTest=["DoorTest", "FaultsTest"], verbosity=2)
    unittest.main()
