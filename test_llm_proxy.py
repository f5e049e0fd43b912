"""Tests of llm_proxy.py, in the order of its sections.

    python -m unittest                      # all of them, in one to two minutes
    TESTED_BEFORE=yes python -m unittest    # without what one interpreter is enough for
    python -m unittest -k limit_reply       # those with this in their name
    python test_llm_proxy.py --soak         # those of the last section for minutes, with figures
    python test_llm_proxy.py --soak long    # attacks at random beside honest callers: half an hour

Most go through real sockets on loopback: a Client that is strict about what it gets, the proxy, and
a Stub in place of the endpoint, whose every byte the test decides. No test sleeps until a bucket is
refilled: the clock is an argument. What happens in another thread is awaited with `wait_for`, whose
bound only tells "never" from "not yet".
"""
import ast
import asyncio
import atexit
import base64
import bisect
import concurrent.futures
import datetime
import dis
import errno
import fcntl
import fractions
import gc
import gzip
import hashlib
import http.client
import importlib.util
import io
import itertools
import json
import math
import operator
import os
import pathlib
import pwd
import queue
import random
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
import threading
import time
import tokenize
import unittest
import urllib.parse
import uuid
import warnings
import zlib
import zoneinfo
from collections import Counter, defaultdict, deque
from contextlib import (ExitStack, closing, contextmanager, nullcontext, redirect_stderr,
                        redirect_stdout, suppress)
from decimal import Decimal
from functools import lru_cache, partial
from math import ceil, inf
from random import Random
from threading import Event, Thread
from types import SimpleNamespace
from unittest import mock
from unittest.mock import patch

import llm_proxy
from llm_proxy import (REDACTED, SETTINGS, SETTINGS_BY_NAME, UNITS, VERSION, Admin, Anthropic,
                       BadRequest, Batch, Buckets, Caller, CallerGone, Chunked, ClientConnection,
                       ConfigFaults, Context, Database, JsonBody, LedgerReader, LimitReached,
                       Limits, LinearPattern, Log, Malformed, Masks, OpenAI, Prices, Redactor,
                       Redis, RedisBuckets, RedisFault, RedisReader, Restorer, SSE, SelfTest,
                       Stream, Usage, build, json_before, read_config, read_price, read_rule,
                       read_usage, server_context, text_weight)

FILE = os.path.abspath(llm_proxy.__file__)
FOLDER = os.path.dirname(FILE)
PATIENCE = 60  # seconds after which what has not happened never will
CPYTHON = sys.implementation.name == "cpython"
CPU_SECONDS = 0.05 if CPYTHON else 0.5  # for a callback
# What hangs on Redis, a browser or chance is the same everywhere: PyPy leaves it out, and so does
# each interpreter that CI starts after its first. TESTED_BEFORE=no has PyPy test it, too.
IS_FIRST = os.environ.get("TESTED_BEFORE", "no" if CPYTHON else "yes") == "no"
tested_once = unittest.skipUnless(IS_FIRST, "one interpreter is enough for this")
CHAT = "/v1/chat/completions"
# Where files wait for no disk
QUICK = "/dev/shm" if os.path.isdir("/dev/shm") and os.access("/dev/shm", os.W_OK) and (
    shutil.disk_usage("/dev/shm").free > 1 << 30) else None
# In debug mode it warns of callbacks that took long by a Clock, or only since the machine is busy.
asyncio.log.logger.setLevel("ERROR")


# --------------------------------------------------------------------------------------------------
# Doubles: the clock, the log's stream, the caller, the endpoint
# --------------------------------------------------------------------------------------------------

def wait_for(condition, what="the condition"):
    """Returns the first true value of `condition()`."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.002)
    raise AssertionError("%s was not met within %d s" % (what, PATIENCE))


class Clock:
    """Time that passes when a test says so, which wakes the loops that run by it."""

    def __init__(self, now=1000.0):
        self.loops = []
        self.now = now

    def monotonic(self):
        return self.seconds

    def time_ns(self):
        return 1700000000 * 10 ** 9 + int(self.seconds * 10 ** 9)

    @property
    def now(self):
        return self.seconds

    @now.setter
    def now(self, seconds):
        self.seconds = seconds
        for loop in self.loops:
            with suppress(RuntimeError):  # it is closed
                loop.call_soon_threadsafe(id, None)


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
        """The access lines of LOG_FORMAT=json, but for those of /health, which tests ask."""
        rows = [json.loads(row) for row in self.text().splitlines(True) if row.endswith("\n")]
        return [row for row in rows if "outcome" in row and row["path"] != "/health"]


class Cut(Exception):
    """A connection ended where it must not: 'closed' by a FIN or 'reset' by a RST."""


class Reader:
    """Reads HTTP/1.1 strictly, for both doubles: neither accepts what the other may not send."""

    def __init__(self, sock):
        self.sock = sock
        self.data = bytearray()

    def more(self):
        try:
            data = self.sock.recv(65536)
        except ConnectionError:
            raise Cut("reset") from None
        if not data:
            raise Cut("closed")
        self.data += data

    def take(self, size):
        taken = bytes(self.data[:size])
        del self.data[:size]
        return taken

    def until(self, mark):
        end = self.data.find(mark)
        while end < 0:
            searched = max(0, len(self.data) - len(mark))
            self.more()
            end = self.data.find(mark, searched)
        return self.take(end + len(mark))

    def head(self):
        """Returns (the bytes as they came, the start line, [(lower-case name, value)])."""
        head = self.until(b"\r\n\r\n")
        start, *rows = head[:-4].decode("latin-1").split("\r\n")
        fields = []
        for row in rows:
            name, colon, value = row.partition(":")
            token = re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name)
            assert colon and token, "no header field: %r" % row
            fields.append((name.lower(), value.strip(" \t")))
        return head, start, fields

    def body(self, fields, at_the_end_of_stream=False):
        """Returns an iterator of the payload's pieces, which raises Cut where it is not whole."""
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
            piece = self.take(left)
            left -= len(piece)
            yield piece

    def chunked(self):
        size = True
        while size:
            line = self.until(b"\r\n")
            assert re.fullmatch(rb"[0-9A-Fa-f]+(;[^\r\n]*)?\r\n", line), "no size: %r" % line
            size = int(line.partition(b";")[0], 16)
            yield from self.sized(size)
            assert self.until(b"\r\n") == b"\r\n", "something stands between two chunks"

    def to_the_end(self):
        try:
            while True:
                yield self.take(len(self.data))
                self.more()
        except Cut as cut:
            if str(cut) != "closed":
                raise


class Message:
    """What a double has received: `fields` and `body`."""
    fields = ()
    body = b""

    def get(self, name):
        found = [value for key, value in self.fields if key == name.lower()]
        return ", ".join(found) if found else None

    def json(self):
        return json.loads(self.body.decode())


class Answered(Message):
    """What a Client got: status, fields, body, and whether the body came to its proper end."""

    def __init__(self, start, fields):
        assert re.fullmatch(r"HTTP/1\.1 [1-5][0-9][0-9] .*", start), start
        self.status = int(start.split(" ")[1])
        self.fields = fields
        self.whole = False

    def error(self):
        """Returns the four members of an OpenAI error, or fails."""
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        return error

    def tells(self, name, value):
        """A member of an OpenAI error must be this."""
        found = self.error()[name]
        assert found == value, found


def hang_up(sock):
    """Ends a connection with a RST."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Client:
    """A caller that sends exactly the bytes it is told to."""

    def __init__(self, address, receive_buffer=None, source="127.0.0.1"):
        self.sock = socket.socket()
        self.sock.bind((source, 0))
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(PATIENCE)
        try:
            self.sock.connect(address)
        except OSError:
            self.sock.close()
            raise
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reader = Reader(self.sock)
        self.pieces = iter(())

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
        with suppress(Cut):
            found.extend(self.pieces)
            self.answered.whole = True
        self.answered.body = b"".join(found)
        return self.answered

    def expect_cut(self):
        assert not self.rest().whole, "it is whole"

    def expect_end(self):
        assert self.rest().whole, "it was cut"

    def read(self, method="POST"):
        self.head(method)
        return self.rest()

    def exchange(self, data, method="POST"):
        """Send one request and read its answer."""
        return self.send(data).read(method)

    def answers(self, status, data=b""):
        """Send what there is to be sent; returns the answer, which must have this status."""
        answered = self.exchange(data) if data else self.read()
        assert answered.status == status, answered.status
        return answered

    def is_readable(self):
        """Returns whether bytes have come, or the end of the connection."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(0))

    def ending(self):
        """Wait for the end of the connection: 'closed' or 'reset'. Nothing may come before it."""
        try:
            self.reader.more()
        except Cut as cut:
            return str(cut)
        raise AssertionError("unexpected bytes: %r" % bytes(self.reader.data))

    def expect_close(self):
        ending = self.ending()
        assert ending == "closed", ending

    def close(self):
        self.sock.close()

    def reset(self):
        hang_up(self.sock)


class Asked(Message):
    """One request as the Stub got it, and the way to answer it."""

    def __init__(self, sock, reader):
        self.sock = sock
        self.reader = reader
        self.head, start, self.fields = reader.head()
        self.method, self.target, _ = start.split(" ")
        self.size = 0
        self.digest = None
        self.over = Event()
        self.kept = True

    def read_body(self):
        """Read the body: as a whole where it is small, as size and SHA-256 always."""
        digest = hashlib.sha256()
        for piece in self.reader.body(self.fields):
            digest.update(piece)
            self.size += len(piece)
            self.body = self.body + piece if self.size < 100000 else b""
        self.digest = digest.hexdigest()

    def send(self, data):
        self.sock.sendall(data)

    def stream(self, *payloads, end=False):
        """Begin a chunked event stream, and send these events."""
        self.chunks(*payloads, end=end, head=STREAM)

    def chunks(self, *payloads, end=False, head=b""):
        """Send more events of a stream that has begun."""
        self.send(head + b"".join(map(chunk, payloads)) + (LAST if end else b""))
        if end:
            self.finish()

    def answer(self, *arguments):
        """Send a whole answer, as `answer` has it."""
        self.send(answer(*arguments))
        self.finish()

    def finish(self):
        """The answer is complete; the connection waits for its next request."""
        self.over.set()

    def close(self):
        self.kept = False
        self.sock.shutdown(socket.SHUT_RDWR)
        self.over.set()

    def reset(self):
        self.kept = False
        hang_up(self.sock)
        self.over.set()

    def wait_for_hang_up(self, client=None):
        """Fails unless the proxy closes this connection, here where its Client hangs up."""
        if client:
            client.reset()
        with suppress(ConnectionError):
            while self.sock.recv(65536):
                pass


class Stub:
    """The endpoint, played by a test: it counts connections, keeps requests, and sends any answer.

    `answer` is called with each Asked, in the thread of its connection. Where it is None, the test
    takes the Asked from `next()` and answers in its own time, byte by byte if it likes. `reads`:
    whether bodies are read before that; `tls`: the SSLContext of one that speaks HTTPS."""

    def __init__(self, answer=None, reads=True, tls=None):
        self.answer = answer
        self.reads = reads
        self.tls = tls
        self.requests = []
        self.faults = []  # what the Reader could not accept, or `answer` found wrong
        self.connections = 0
        self.waiting = queue.Queue()
        self.kept = ExitStack()
        self.port = free_port(self.kept.callback)
        self.sockets = []
        self.threads = []
        self.listen()

    def listen(self):
        self.listener = socket.create_server(("127.0.0.1", self.port), backlog=512)
        self.thread = Thread(target=self.accept, daemon=True)
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
            thread = Thread(target=self.converse, args=(sock,), daemon=True)
            self.threads.append(thread)
            thread.start()

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
        except Exception as fault:
            self.faults.append(repr(fault))
            raise
        finally:
            sock.close()

    @property
    def url(self):
        return "http%s://127.0.0.1:%d" % ("s" * bool(self.tls), self.port)

    def next(self):
        return self.waiting.get(timeout=PATIENCE)

    @property
    def calls(self):
        return len(self.requests)

    @property
    def last(self):
        return self.requests[-1]

    def refuse_connections(self):
        """Until it listens again, if it does: the port is its own."""
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(PATIENCE)

    def hang_up(self):
        """Refuses new connections, and ends those that there are."""
        self.refuse_connections()
        for asked in self.requests:
            asked.over.set()
        for sock in self.sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(PATIENCE)

    def close(self):
        self.hang_up()
        self.kept.close()


def encoded(body):
    """Bytes as they are, and anything else as JSON."""
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def request(method="POST", path=CHAT, body=b"", *fields, key=None, host="proxy.test",
            version="1.1"):
    """A well-formed request. `fields` are whole lines, such as 'X-Name: value'."""
    body = encoded(body)
    rows = ["%s %s HTTP/%s" % (method, path, version), "Host: " + host, *fields]
    if key:
        rows.append("Authorization: Bearer " + key)
    if body or method == "POST":
        rows.append("Content-Length: %d" % len(body))
    return "\r\n".join(rows + ["", ""]).encode("latin-1") + body


HEALTH = request("GET", "/health")


def unsized(path, *fields, key=None):
    """The head of a POST whose framing is among `fields`; its body is up to the test."""
    return request("POST", path, b"", *fields, key=key).replace(b"Content-Length: 0\r\n", b"", 1)


def chat(**payload):
    """The body of a small chat call; its prompt has the 10 characters of 'user hello'."""
    messages = [{"role": "user", "content": "hello"}]
    return encoded({"model": "m", "messages": messages, **payload})


def call(key=None, *fields, **payload):
    return request("POST", CHAT, chat(**payload), *fields, key=key)


def answer(body=b'{"said": "hi"}', status="200 OK", *fields):
    """A well-formed answer, by Content-Length."""
    body = encoded(body)
    rows = ["HTTP/1.1 " + status, "Content-Length: %d" % len(body), *fields]
    if not any(row.startswith("Content-Type") for row in fields):
        rows.append("Content-Type: application/json")
    return "\r\n".join(rows + ["", ""]).encode("latin-1") + body


def says(*arguments):
    """A Stub's `answer` that always gives this answer."""
    return sends(answer(*arguments), close=False)


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


STREAM = (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
          b"Transfer-Encoding: chunked\r\n\r\n")
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


def free_port(add_cleanup):
    """Returns a port that nobody has, for a server that does not pick one itself.

    Linux keeps it until the cleanup: a socket that never listens hinders only those who ask for any
    port, or do not set SO_REUSEADDR."""
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    port = kept.getsockname()[1]
    if sys.platform == "linux":
        add_cleanup(kept.close)
    else:
        kept.close()
    return port


def new_path(case, name=""):
    """Makes a folder of its own for a test; returns it, or the path of a file there."""
    folder = tempfile.TemporaryDirectory(dir=QUICK)
    case.addCleanup(folder.cleanup)
    return os.path.join(folder.name, name)


def pem_file(case, text=KEY_AND_CERTIFICATE):
    """Makes a file of its own for a test; returns its path."""
    path = new_path(case, "file.pem")
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
    return path


def patch_until(add_cleanup, *patches):
    """Start these; they stop with the test or the class whose `add_cleanup` this is."""
    for one in patches:
        one.start()
        add_cleanup(one.stop)


class TableCase(unittest.TestCase):
    def each(self, rows, *others):
        """Go through a table: any rows, or a text: JSON, or a row a line, its cells between ->; of
        several tables through all combinations of their rows.

        Where the test fails, the row is printed. A subTest around the yield would not do: what the
        loop's body raises does not pass through it."""
        if others:
            rows = itertools.product(rows, *others)
        elif isinstance(rows, str) and rows.startswith("["):
            rows = json.loads(rows)
        elif isinstance(rows, str):
            rows = [row.strip().split(" -> ") for row in rows.splitlines() if row.strip()]
        current = []
        self.addCleanup(lambda: current and print("\nfailed at %.999r" % current, file=sys.stderr))
        for row in rows:
            current[:] = [row]
            yield row
        current.clear()

    @contextmanager
    def computing_within(self, seconds):
        """Fails where the block takes more of the CPU than this."""
        began = cpu_seconds()
        yield
        self.assertLess(cpu_seconds() - began, seconds)

    def assert_left(self, left, *whose):
        """So much is left in the bucket of a caller."""
        self.assertEqual(self.left(*whose), left)

    def patch_seconds(self, **seconds):
        """Set deadlines and other constants, `Class_NAME=value`, for this test."""
        for name, value in seconds.items():
            owner, _, constant = name.partition("_")
            patch_until(self.addCleanup, patch.object(getattr(llm_proxy, owner), constant, value))


COLLECTING = Counter()  # the CPU seconds of each thread that collected garbage


def note_collection(phase, _):
    now = time.thread_time()
    COLLECTING[threading.get_ident()] += now if phase == "stop" else -now


def cpu_seconds():
    """What this thread has taken but for collecting garbage."""
    return time.thread_time() - COLLECTING[threading.get_ident()]


getattr(gc, "callbacks", []).append(note_collection)  # PyPy has none
llm_proxy.tune_interpreter()
RUN, READ = asyncio.events.Handle._run, Stream.on_readable
# Linux counts those of a thread; PyPy waits for its lock without any.
SWITCHES = getattr(resource, "RUSAGE_THREAD", None) if hasattr(gc, "freeze") else None


def switches():
    """How often this thread has waited, and how often it was put off."""
    usage = resource.getrusage(SWITCHES)
    return usage.ru_nvcsw, usage.ru_nivcsw


def is_busy():
    """Whether more wants to run than there are CPUs: then threads wait for what others hold."""
    return os.getloadavg()[0] > os.cpu_count()


def measured(loop, callback, run, *arguments):
    """Runs what a loop calls, and keeps in its `held` what holds it too long.

    Who takes a second and little of the CPU has slept, unless it waited for Python's lock, which it
    tries again and again, or was put off by the system. (A virtual machine that stands still for
    a third of a second tells nobody.)"""
    held = getattr(loop, "held", None)
    if held is None:
        return run(*arguments)
    before = SWITCHES and switches()
    cpu, began = cpu_seconds(), time.monotonic()
    run(*arguments)
    cpu, took = cpu_seconds() - cpu, time.monotonic() - began
    slept = False
    if SWITCHES and took > 1:
        waited, put_off = map(int.__sub__, switches(), before)
        slept = waited < 10 and not put_off and not is_busy()
    if cpu > CPU_SECONDS or slept:
        held.append("%s: %.3f s of CPU, %.3f s" % (callback, cpu, took))


def run_and_measure(handle):
    measured(handle._loop, handle._callback, RUN, handle)


def read_and_measure(stream):
    measured(stream.loop, stream, READ, stream)


usual_prices = lru_cache(None)(llm_proxy.usual_prices)


class ProxyCase(TableCase):
    """`start` runs a proxy of this test's own, between a Stub and Clients, until the test ends; one
    that has none is started when it is first looked for."""

    def __getattr__(self, name):
        if name not in ("address", "lines", "path", "place", "proxy", "server", "stub"):
            raise AttributeError(name)
        self.start()
        return getattr(self, name)

    @classmethod
    def setUpClass(cls):
        # Most tests wait for the log, and many for a caller that closed to be taken for gone; that
        # a busy machine holds the loop is not what they expect there.
        patch_until(cls.addClassCleanup,
                    patch.object(llm_proxy.LoopWatch, "PERIOD", PATIENCE),
                    patch.object(llm_proxy, "usual_prices", usual_prices),
                    patch.object(Log, "PAUSE", 0.005),
                    patch.object(llm_proxy.Writer, "PAUSE", 0.01),
                    patch.object(llm_proxy.Ledger, "SUM_SECONDS", 0.05),
                    patch.object(Admin, "BEAT_SECONDS", 0.01),
                    patch.object(ClientConnection, "HALF_CLOSE_SECONDS", 0.02),
                    patch.object(RedisBuckets, "DRAIN_SECONDS", 0.05),
                    patch.object(Redis, "LONGEST_PAUSE", 0.05),
                    patch.object(asyncio.events.Handle, "_run", run_and_measure),
                    patch.object(Stream, "on_readable", read_and_measure))

    def start(self, answer=says(), clock=time, base="", reads=True, **settings):
        """`settings` are llm_proxy's; without others the log is JSON, and buckets are large. By
        the machine's own clock these gain nothing, however slow it is."""
        self.stub = Stub(answer, reads)
        self.addCleanup(self.stub.close)
        settings = {"BASE_API_URL": self.stub.url + base, "LOG_FORMAT": "json", "MAX_TOKENS": 1000,
                    "REFILL_INTERVAL_SECONDS": 10 ** 6 if clock is time else 300,
                    "DATABASE": "off", **settings}
        self.run_proxy(read_config({name: str(value) for name, value in settings.items()}), clock)

    def start_clock(self, answer=says(), **settings):
        """Starts one whose time passes when the test says so; returns its Clock."""
        clock = Clock()
        self.start(answer, clock=clock, **settings)
        return clock

    def run_proxy(self, config, clock):
        database = None
        if config.database != "off":
            before = vars(self).get("proxy")
            if before and before.config.database == config.database:  # a restart
                before.books.close(PATIENCE)
            database = llm_proxy.open_for_service(config.database)
        self.lines = Lines()
        self.tracebacks = 0
        self.proxy = build(config, self.lines, clock, database)
        self.server = llm_proxy.Server(self.proxy, llm_proxy.listen("127.0.0.1", 0))
        self.address = self.server.server_address[:2]
        self.proxy.loop.held = []
        if isinstance(clock, Clock):
            clock.loops.append(self.proxy.loop)
        threads = [Thread(target=self.proxy.loop.run_forever, name="loop"),
                   Thread(target=self.server.serve_forever, args=(0.002,), name="accept")]
        for thread in threads:
            thread.daemon = True
            thread.start()
        self.addCleanup(self.stop, self.proxy, self.server, threads, self.lines)

    def run_another(self):
        """Starts another proxy by the same settings."""
        texts = self.proxy.config.texts
        self.run_proxy(read_config({name: text for name, text in texts.items() if text}), time)

    def stop(self, proxy, server, threads, lines):
        loop = proxy.loop
        self.drain(0, server)
        wait_for(lambda: not server.open and not server.lingering, "the end of every connection")
        loop.call_soon_threadsafe(loop.stop)
        for thread in threads:
            thread.join(PATIENCE)
        for task in asyncio.all_tasks(loop):  # such as one that asks for models
            task.cancel()
            with suppress(asyncio.CancelledError):
                loop.run_until_complete(task)
        loop.run_until_complete(asyncio.sleep(0))  # a transport is closed in the round after
        self.assertEqual(len(loop._selector.get_map()), 1, "what is left but the loop's own")
        loop.close()
        proxy.books.close(PATIENCE)
        self.assertEqual(lines.data.count(b"Traceback"), self.tracebacks, lines.text())
        self.assertEqual(loop.held, [])

    def on_loop(self, act, *arguments):
        """Have the proxy's thread do this after its next pass, in which what was just answered is
        written down, and wait for it."""
        done, loop = Event(), self.proxy.loop
        loop.call_soon_threadsafe(loop.call_soon, lambda: (act(*arguments), done.set()))
        self.assertTrue(done.wait(PATIENCE))

    def drain(self, seconds, server=None):
        """Returns how many calls were cut."""
        server = server or self.server
        ending = asyncio.run_coroutine_threadsafe(server.drain(seconds), server.loop)
        return ending.result(PATIENCE + seconds)

    def awaiting(self, what):
        """Returns the Context of the connection that awaits this, as soon as there is one."""
        def find():
            contexts = [connection.context for connection in self.server.open.copy()]
            return [one for one in contexts if one.is_waiting() and what in one.what]
        return wait_for(find, what)[0]

    def expire(self, what):
        """Lets time pass until the deadline of who awaits this; returns the seconds."""
        clock, deadline = self.proxy.clock, self.awaiting(what).deadline
        seconds = deadline - clock.now
        clock.now = deadline
        return round(seconds, 6)

    def pass_seconds(self, seconds):
        """Lets time pass on the proxy's loop; returns when that did what was due."""
        self.proxy.clock.now += seconds
        for _ in range(2):  # in the first round it finds out what is due
            self.on_loop(int)

    def connect(self, **options):
        client = Client(self.address, **options)
        self.addCleanup(client.reset)
        return client

    def send(self, data):
        """Send this on a connection of its own; returns the Client."""
        return self.connect().send(data)

    def ask(self, data=None, method=None):
        """Send one request, or a call by this key, on a connection of its own; returns the
        Answered."""
        data = data if isinstance(data, bytes) else call(data)
        client = self.connect()
        answered = client.exchange(data, method or data.split(b" ", 1)[0].decode("latin-1"))
        client.close()
        return answered

    def get(self, path, *fields, key=None):
        return self.ask(request("GET", path, b"", *fields, key=key))

    def post(self, path, body=b"", *fields, key=None):
        return self.ask(request("POST", path, body, *fields, key=key))

    def assert_fields(self, message, *rows):
        """Its fields are these, 'name: value' each; without a value, there is none."""
        for row in rows:
            name, _, value = row.partition(":")
            self.assertEqual(message.get(name.lower()), value.strip() or None, name)

    def assert_status(self, status, data=call(), *fields, error=None):
        """Ask; returns the answer, which must have this status, fields and type of error."""
        answered = self.ask(data)
        self.assertEqual(answered.status, status)
        self.assert_fields(answered, *fields)
        if error:
            answered.tells("type", error)
        return answered

    def start_silent(self):
        """Starts one for whose Stub the test answers, where none runs."""
        if "address" not in vars(self):
            self.start(None)

    def ask_stub(self, data=call()):
        """Send a request whose answer the test sends itself; returns (Client, Asked)."""
        self.start_silent()
        client = self.send(data)
        return client, self.stub.next()

    def complete(self, client, asked=None, *arguments):
        """Answer this call, or else the next one; returns what its caller got, which is a 200."""
        (asked or self.stub.next()).answer(*arguments)
        client.answers(200)
        return client.answered

    def begin(self, *payloads, client=None, key=None, fields=(), head=STREAM, data=None,
              **payload):
        """Start a streamed call and read its head and `payloads`; returns (Client, Asked)."""
        self.start_silent()
        client = client or self.connect()
        client.send(data or call(key, *fields, **{"stream": True, **payload}))
        asked = self.stub.next()
        asked.chunks(*payloads, head=head)
        client.head()
        for one in payloads:
            client.expect(one)
        return client, asked

    def unread(self, client):
        """How many bytes of this Client's were not read; None where its connection is not open."""
        for connection in self.server.open.copy():
            sock = connection.client.sock
            with suppress(OSError, ValueError):  # it is closed by now
                if sock.getpeername() == client.sock.getsockname():
                    asked = (client.sock, termios.TIOCOUTQ), (sock, termios.FIONREAD)
                    return sum(struct.unpack("i", fcntl.ioctl(*one, bytes(4)))[0] for one in asked)
        return None

    def send_apart(self, client, *pieces):
        """Send each piece when the proxy has read the one before it."""
        wait_for(lambda: self.unread(client) is not None, "the connection")
        for piece in pieces:
            client.send(piece)
            wait_for(lambda: not self.unread(client), "the reading of %r" % piece)

    def entry(self, number=0):
        """The access line of the call with this number.

        Calls on different connections may be logged in any order: where it matters, wait for each.
        """
        return wait_for(lambda: self.lines.entries()[number:number + 1], "an access line")[0]

    def assert_entry(self, name, value, number=0):
        """The access line of the call with this number says so."""
        self.assertEqual(self.entry(number)[name], value)

    def assert_said(self, text):
        """The log, which a thread of its own writes, has this."""
        wait_for(lambda: text in self.lines.text(), text)

    def left(self, key=None):
        """What is left in a caller's bucket, by /health."""
        return self.get("/health", key=key).json()["quota"]["remaining"]

    def assert_calls(self, calls):
        """So many calls came to the Stub."""
        self.assertEqual(self.stub.calls, calls)

    def close_books(self):
        """Has all written that is queued."""
        self.proxy.books.close(PATIENCE)

    def outcome(self):
        return self.entry()["outcome"]

    def assert_spent(self, calls, left):
        """So many calls came to the Stub, and so much is left in the caller's bucket."""
        self.assertEqual((self.stub.calls, self.left()), (calls, left))

    def assert_ending(self, outcome, left, number=0, key=None):
        """How the call with this number ended, in the log, which comes last, and in the bucket."""
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
        for name, stub in stubs.items():
            settings.setdefault("UPSTREAM_%s_URL" % name.upper(), stub.url + "/v1")
        if not base:
            settings["BASE_API_URL"] = ""
        self.start(answer or says(b'{"from": "base"}'), clock, **settings)

    def relay(self, path, *fields):
        """Has a body be passed on while it comes; returns (Client, Asked)."""
        client, asked = self.ask_stub(unsized(path, CHUNKED, *fields))
        pieces = asked.reader.body(asked.fields)
        for piece in (b"{one", b"two" * 10):
            client.send(chunk(piece))
            self.assertEqual(next(pieces), piece)
        client.send(LAST)
        self.assertEqual(list(pieces), [])
        return client, asked

    def came_from(self, data):
        return self.ask(data).json()["from"]

    def assert_from(self, stub, data):
        self.assertEqual(self.came_from(data), stub)

    def states(self, key=None):
        """What /health says of the upstreams."""
        return self.get("/health", key=key).json()["upstreams"]

    def base(self, key=None):
        return self.states(key)["base"]


# --------------------------------------------------------------------------------------------------
# The file itself
# --------------------------------------------------------------------------------------------------

def source(path=FILE):
    with open(path, encoding="utf-8") as file:
        return file.read()


@lru_cache(None)
def tree():
    return ast.parse(source())


def functions():
    return [node for node in ast.walk(tree()) if isinstance(node, FUNCTIONS)]


def banners(text):
    """Returns [(line number, section)]."""
    found = re.finditer(r"^# -{20,}\n# (\w+): ", text, re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BRANCHES = (ast.If, ast.For, ast.While, ast.AsyncFor, ast.ExceptHandler, ast.IfExp, ast.Assert,
            ast.comprehension)
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER)


def lines_of_tokens(text):
    """Returns the line number of each token that is neither layout nor comment."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [token.start[0] for token in tokens if token.type not in LAYOUT]


def branches(function):
    nodes = list(ast.walk(function))
    words = sum(len(node.values) - 1 for node in nodes if isinstance(node, ast.BoolOp))
    return 1 + words + sum(isinstance(node, BRANCHES) for node in nodes)


def names_of(statement):
    """The global names that a statement of the module defines."""
    if isinstance(statement, FUNCTIONS + (ast.ClassDef,)):
        return [statement.name]
    return [node.id for node in ast.walk(statement)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def globals_in(code):
    """The global names that compiled code reads."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            yield instruction.argval
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            yield from globals_in(constant)


@unittest.skipUnless(CPYTHON, "another interpreter reads the same text")
class FileTest(TableCase):
    @classmethod
    def tearDownClass(cls):
        tree.cache_clear()  # who collects garbage would look at it again and again

    def test_the_table_of_contents_names_every_section_in_order(self):
        contents = ast.get_docstring(tree()).partition("Contents")[2]
        listed = re.findall(r"^ {4}(\w+) {2,}\S", contents, re.MULTILINE)
        self.assertGreater(len(listed), 10)
        self.assertEqual(listed, [name for _, name in banners(source())])

    def test_the_places_to_add_something_exist(self):
        places = ast.get_docstring(tree()).partition("To add")[2]
        names = re.findall(r"[A-Z]\w+(?:\.\w+)?|[A-Za-z]+_\w+", places)
        self.assertGreater(len(names), 10)
        for name in set(names) - {"API"}:
            with self.subTest(name):
                operator.attrgetter(name)(llm_proxy)

    def test_a_section_uses_only_names_from_sections_above_it(self):
        """Compiled code tells the names: locals and annotations in quotes do not count."""
        starts = [line for line, _ in banners(source())]
        homes = {}
        uses = []
        for statement in tree().body:
            section = sum(line <= statement.lineno for line in starts)
            for name in names_of(statement):
                homes.setdefault(name, section)
            code = compile(ast.Module([statement], []), FILE, "exec", dont_inherit=True)
            uses += [(section, name) for name in globals_in(code)]
        below = [(section, name) for section, name in uses if homes.get(name, 0) > section]
        self.assertEqual(below, [])

    def test_no_name_of_the_module_is_given_twice(self):
        """Each statement may use its own again, as in a comprehension."""
        names = [name for statement in tree().body
                 for name in set(names_of(statement)) if hasattr(llm_proxy, name)]
        twice = [name for name, count in Counter(names).items() if count > 1]
        self.assertEqual(twice, [])

    def test_no_class_gives_an_attribute_twice(self):
        """The second one would be that of both uses."""
        for one in ast.walk(tree()):
            if isinstance(one, ast.ClassDef):
                names = Counter(name.id for statement in one.body
                                for target in getattr(statement, "targets", ())
                                for name in ast.walk(target) if isinstance(name, ast.Name))
                self.assertEqual([name for name, count in names.items() if count > 1], [], one.name)

    @unittest.skipUnless(hasattr(sys, "stdlib_module_names"), "only Python 3.10+ knows its modules")
    def test_nothing_is_imported_but_the_standard_library(self):
        statements = re.findall(r"(?m)^ *(?:import ([\w., ]+)$|from (\w+)[\w.]* import )",
                                source() + source(__file__))
        roots = {name.strip().partition(".")[0]
                 for names in statements for name in "".join(names).split(",")}
        self.assertGreater(len(roots), 40)
        self.assertLessEqual(roots, sys.stdlib_module_names | {"llm_proxy"})

    def test_no_module_state_is_changed_by_a_global_statement(self):
        nodes = ast.walk(tree())
        self.assertEqual([node.lineno for node in nodes if isinstance(node, ast.Global)], [])

    def test_no_line_is_longer_than_100_columns(self):
        lines = (source() + source(__file__)).splitlines()
        self.assertEqual([line for line in lines if len(line) > 100], [])

    @unittest.skipIf(sys.version_info >= (3, 12), "an f-string is several tokens there")
    def test_the_file_and_each_function_stay_within_their_tokens_and_branches(self):
        lines = lines_of_tokens(source())
        self.assertLessEqual(len(lines), 126_000)
        heavy = [node.name for node in functions() if branches(node) > 15 or bisect.bisect_right(
            lines, node.end_lineno) - bisect.bisect_left(lines, node.lineno) > 250]
        self.assertEqual(heavy, [])

    def test_any_stands_for_json_and_clocks_only(self):
        """A bare `Any` is the type of these arguments, of *args and **kwargs, and of no other."""
        free = {"clock", "payload", "counts", "value", "_"}
        arguments = [one for function in functions() for one in function.args.args]
        hidden = {one.arg for one in arguments if getattr(one.annotation, "id", "") == "Any"}
        self.assertEqual(hidden - free, set())


# --------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------

HERE = {"BASE_API_URL": "http://127.0.0.1:8000/v1"}


def settings_of(text):
    """'NAME=value | NAME=value' -> {name: value}."""
    return dict(part.split("=", 1) for part in text.split(" | "))


def readme_rows():
    """The rows that README's tables of settings must have, one list for each table."""
    def cells(setting):
        default = "unset" if setting.default is None else "`%s`" % setting.default
        text = setting.sentence.replace("|", "\\|")
        sentence = re.sub(r"\b[A-Z]+(_[A-Z]+)+\b", r"`\g<0>`", text)
        return "| `%s` | %s | %s |" % (setting.name, default, sentence)

    for heading, settings in SETTINGS.items():
        yield ["| %s | default | |" % heading, "|---|---|---|", *map(cells, settings)]


class ConfigTest(TableCase):
    def faults(self, settings, dotenv=""):
        with self.assertRaises(ConfigFaults) as caught:
            read_config(settings, dotenv)
        return str(caught.exception).splitlines()

    def fault(self, settings, dotenv=""):
        fault, = self.faults(settings, dotenv)
        return fault

    def test_all_faults_are_reported_at_once_with_the_value_and_what_would_be_right(self):
        settings = settings_of("PORT=99999 | MAX_TOKENS=+5 | LOG_FORMAT=xml | READ_TIMEOUT=soon")
        self.assertEqual(self.faults({**HERE, **settings}), [
            "READ_TIMEOUT must be a number of seconds between 0.1 and 86400 (got 'soon')",
            "PORT must be between 1 and 65535 (got '99999')",
            "MAX_TOKENS must be between 1 and 1000000000000 (got '+5')",
            "LOG_FORMAT must be text or json (got 'xml')"])

    FAULTY_VALUES = """
        HOST  []  [  [::1]:80
        PORT  0  65536  -1  8_8  0x10  ²  8899.0  1e3
        MAX_TOKENS  0  1_0  ٣  10000000000000
        READ_TIMEOUT  0  -1  inf  nan  1e3
        TOKEN_COST_MODE  REQUEST  tokens
        BASE_API_KEY  two words  schlüssel  "sk-1"
        CORS_ORIGINS  chat.example.org  *,https://a.example  ,  https://a.example/b
        LIMIT_MESSAGE  two\\nlines
        CPU_AFFINITY  none  -1  10000
        UNPRICED  free  -1  1e3  1000000  .5
        PROXY_API_KEYS  a,,b  alice=  a b  same,same  x=same,y=same  c2VjcmV0==  sk/1=x  'sk-1'
        PROXY_API_KEYS  alice:sk-1  sk-1;sk-2  sk-1|sk-2  ["sk-1"]  alice=sk-1;bob=sk-2
        PROXY_API_KEYS  alice=sk-1;sk-2  alice=sk-1|sk-2  alice=sk-1&bob=2  alice=sk-1:bob=sk-2
        MODEL_ALIASES  fast  =m  fast=  a=b,a=c  a=b,,  a=b,b=c
        UPSTREAM_TLS_VERIFY  no
        UPSTREAM_CA_FILE  /nowhere.pem  FILE
        UPSTREAM_ORDER  openai
        UPSTREAM_X_URL  host  http://a,http://a
        UPSTREAM_OPENAI_MODELS  ,  two words
        UPSTREAM_OPENAI_DIALECT  OpenAI
        UPSTREAM_OPENAI_MAX_CONCURRENCY  -1
        UPSTREAM_OPENAI_HEADERS  X  X Y: z  Host: x  content-length: 1  X: a|  X: €
        MAX_CONCURRENCY  -1  many
        QUEUE_SECONDS  0
        STREAM_COMMENT_SECONDS  -1
        KEY_WEIGHTS  alice  alice=0  alice=1.5  alice=1,alice=2  =3  alice=1000
        MAX_CONNECTIONS_PER_ADDRESS  0
        TRUSTED_PROXIES  nginx  10.0.0.0/33  10.0.0.1/8  ,  0.0.0.0/0  ::/0  ::ffff:0:0/96
        CALLER_HEADER  X User  Authorization  Content-Length  X-Forwarded-For  X:  content-encoding
        CALLER_HEADER  TE  X-LLM-Proxy-Timeout-Ms  User-Agent  x-request-id  Proxy-Authorization
        TLS_CERT_FILE  /nowhere.pem  /
        TLS_KEY_FILE  /nowhere.pem
        BASE_API_URL  http://a,http://a  http://a,  localhost:8000  ftp://host  http://
        BASE_API_URL  http://user:pw@host  http://host?a=b  http://host#x  http://host:0
        BASE_API_URL  http://host:65536  http://host:  http://ho st  http://host/a b
        BASE_API_URL  http://host\\r\\nX: y
        """

    def test_values_that_int_or_a_url_parser_would_take_are_faults(self):
        text = self.FAULTY_VALUES.replace(" FILE", " " + FILE)
        rows = [row.split("  ") for row in text.strip().split("\n" + " " * 8)]
        for name, value in self.each((name, value) for name, *values in rows for value in values):
            value = value.replace("\\r", "\r").replace("\\n", "\n")
            self.assertEqual(self.fault({**HERE, name: value}).split(" ")[0], name)
        if llm_proxy.CPUS:  # where the system tells
            self.assertIn("this process may use", self.fault({**HERE, "CPU_AFFINITY": "9999"}))

    VALUES = """
        HOST= -> '0.0.0.0'
        HOST=[::1] -> '::1'
        PORT= -> 8899
        BASE_API_KEY= -> None
        BASE_MODEL=   -> None
        MAX_TOKENS= -> 10
        REFILL_TOKENS= -> 2
        REFILL_INTERVAL_SECONDS= -> 300
        TOKEN_COST_MODE= -> 'request'
        REQUEST_TOKEN_COST= -> 1
        RESPONSE_TOKEN_RESERVE= -> 256
        LIMIT_MESSAGE= -> 'limit reached, wait {wait}'
        OPEN_TIMEOUT= -> 10.0
        READ_TIMEOUT= -> 600.0
        MAX_BODY_BYTES= -> 33554432
        CORS_ORIGINS= -> ('local',)
        PROXY_API_KEYS=k | CORS_ORIGINS= -> ('*',)
        PROXY_API_KEYS=k | STORED= -> 'own'
        CORS_ORIGINS=local,https://*.example.org -> ('local', 'https://*.example.org')
        CORS_ORIGINS=HTTPS://My-Chat.example:443/,http://a:80,http://b:443 -> ('https://my-chat.exa\
mple', 'http://a', 'http://b:443')
        OTEL_EXPORTER_OTLP_HEADERS=x-team=a-b -> {'x-team': 'a-b'}
        LOG_FORMAT= -> 'text'
        DRAIN_SECONDS= -> 30.0
        MAX_CONNECTIONS= -> 1024
        PROXY_API_KEYS= -> None
        PROXY_API_KEYS=sk-1 -> {'sk-1': None}
        PROXY_API_KEYS=alice=sk-1, sk-2 -> {'sk-1': 'alice', 'sk-2': None}
        PROXY_API_KEYS=a=b=c -> {'b=c': 'a'}
        PROXY_API_KEYS=a=b:c== -> {'b:c==': 'a'}
        PROXY_API_KEYS=bob@x.org=c2VjcmV0== -> {'c2VjcmV0==': 'bob@x.org'}
        PROXY_API_KEYS=alice=Tr0ub4dor&3 -> {'Tr0ub4dor&3': 'alice'}
        PROXY_API_KEYS=alice=a;b,bob=a|b -> {'a;b': 'alice', 'a|b': 'bob'}
        PROXY_API_KEYS=alice=http://h/?a=b -> {'http://h/?a=b': 'alice'}
        PROXY_API_KEYS=alice=u:cGFzcw==,u:p -> {'u:cGFzcw==': 'alice', 'u:p': None}
        PROXY_API_KEYS=sk-1$;2 -> {'sk-1$;2': None}
        HTTPS_PROXY=socks5://host:1080 -> None
        HTTPS_PROXY=http:// -> None
        HTTPS_PROXY=http://host:0 -> None
        HTTPS_PROXY=http://user:pw@ -> None
        REDIS_URL=rediss://:a%2Fb@[::1]/3 -> Endpoint(scheme='rediss', host='::1', port=6379, path\
='/3', user='', password='a/b')
        REDIS_URL=unix:///a/b:c@d -> Endpoint(scheme='unix', host='', port=0, path='/a/b:c@d', use\
r='', password='')
        BASE_API_URL=https://x | HTTPS_PROXY=h:3128 -> Endpoint(scheme='http', host='h', port=3128\
, path='', user='', password='')
        """

    def test_a_value_and_a_default_are_the_documented_ones(self):
        """HTTPS_PROXY may be of any kind where no upstream is https: it is meant for others."""
        for text, value in self.each(self.VALUES):
            settings = settings_of(text)
            found = getattr(read_config({**HERE, **settings}), [*settings][-1].lower())
            self.assertEqual(repr(found), value)

    USUAL_DIALECTS = """
        UPSTREAM_GROQ_KEY=k -> openai
        UPSTREAM_ANTHROPIC_KEY=k -> anthropic
        UPSTREAM_OLLAMA_MODELS=m -> ollama
        UPSTREAM_OLLAMA_URL=http://box:11434 -> ollama
        UPSTREAM_OLLAMA_URL=http://box:11434/v1 -> openai
        UPSTREAM_AZURE_URL=https://gateway.example -> azure
        UPSTREAM_X_URL=https://me.openai.azure.com -> azure
        UPSTREAM_X_URL=https://me.OpenAI.azure.com/ -> azure
        UPSTREAM_X_URL=https://me.cognitiveservices.azure.com -> azure
        UPSTREAM_X_URL=https://me.services.ai.azure.com -> azure
        UPSTREAM_X_URL=https://me.openai.azure.com/openai/v1 -> openai
        UPSTREAM_X_URL=https://openai.azure.com.example -> openai
        UPSTREAM_X_URL=https://x | UPSTREAM_X_DIALECT=gemini -> gemini
        BASE_API_URL=https://me.openai.azure.com -> azure
        BASE_API_URL=https://me.openai.azure.com/openai/v1 -> None
        BASE_API_URL=http://box:11434 -> None"""

    def test_an_upstream_that_does_not_say_has_the_api_of_its_vendor_or_openais(self):
        for text, dialect in self.each(self.USUAL_DIALECTS):
            upstream = read_config(settings_of(text)).all_upstreams[-1]
            self.assertEqual(str(upstream.dialect), dialect)

    FAULTS = """
        BASE_API_URL= -> BASE_API_URL is not set. Start like this:  BASE_API_URL=http://127.0.0.1:8\
000/v1 python llm_proxy.py  (or try --demo)
        UPSTREAM_BOX_KEY=k -> UPSTREAM_BOX_URL is not set
        UPSTREAM_V1_URL=http://h -> UPSTREAM_V1_URL must have
        UPSTREAM_HEALTH_URL=http://h -> UPSTREAM_HEALTH_URL must have
        UPSTREAM__URL=http://h -> UPSTREAM__URL must have
        UPSTREAM_THREADS_URL=http://h -> UPSTREAM_THREADS_URL must have
        UPSTREAM_X_URL=http://h/openai/v1 | UPSTREAM_X_DIALECT=azure -> UPSTREAM_X_URL must end
        UPSTREAM_X_URL=http://h/v1 | UPSTREAM_X_DIALECT=ollama -> UPSTREAM_X_URL must end
        UPSTREAM_GROQ_KEY=passthrough | PROXY_API_KEYS=k -> UPSTREAM_GROQ_KEY must not be\
 passthrough
        BASE_API_KEY=passthrough | PROXY_API_KEYS=k -> BASE_API_KEY must not be passthrough
        LIMITS= ;  -> LIMITS must hold at least one rule
        LIMITS=all 1 usd per day;all  1 usd per day -> LIMITS must not hold the same rule twice
        BASE_API_URL=https://x | https_proxy=socks5://host:1080 -> HTTPS_PROXY must be http://
        BASE_API_URL=https://x | https_proxy=http:// -> HTTPS_PROXY must be http://
        UPSTREAM_GROQ_KEY=k | https_proxy=http://host:0 -> HTTPS_PROXY must be http://
        UPSTREAM_GROQ_KEY=k | https_proxy=http://user:pw@ -> HTTPS_PROXY must be http://
        """

    def test_settings_that_cannot_be_together_are_a_fault_that_names_one(self):
        for settings, words in self.each(self.FAULTS):
            fault = self.fault({**HERE, **settings_of(settings)})
            self.assertEqual(fault[:len(words)], words)

    def test_a_certificate_and_a_key_must_be_a_pair(self):
        both = pem_file(self)
        start = KEY_AND_CERTIFICATE.index("-----BEGIN CERT")
        certificate = pem_file(self, KEY_AND_CERTIFICATE[start:])
        read_config({**HERE, "TLS_CERT_FILE": both})
        read_config({**HERE, "TLS_CERT_FILE": certificate, "TLS_KEY_FILE": both})
        fault = self.fault({**HERE, "TLS_CERT_FILE": certificate})
        self.assertRegex(fault, "^TLS_CERT_FILE and TLS_KEY_FILE must be")
        fault = self.fault({**HERE, "TLS_KEY_FILE": both})
        self.assertRegex(fault, "^TLS_KEY_FILE needs TLS_CERT_FILE")

    def test_a_fault_in_a_secret_does_not_repeat_it(self):
        for name, value in self.each("""
                TLS_KEY_FILE -> PEM
                TLS_CERT_FILE -> PEM
                UPSTREAM_X_URL -> http://me:hush@x
                BASE_API_KEY -> hush hush
                PROXY_API_KEYS -> hush,, hush
                HTTPS_PROXY -> hush hush
                UPSTREAM_OPENAI_KEY -> hush hush
                UPSTREAM_OPENAI_HEADERS -> hush hush"""):
            value = value.replace("PEM", KEY_AND_CERTIFICATE)
            fault = self.fault({"BASE_API_URL": "https://x", name: value})
            self.assertRegex(fault, "^%s must " % name)
            self.assertNotRegex(fault, "hush|BEGIN")

    def test_the_environment_wins_over_dotenv(self):
        dotenv = "PORT=7000\nMAX_TOKENS=3\nBASE_API_URL=http://from.dotenv\n"
        config = read_config({"PORT": "8000", "MAX_TOKENS": ""}, dotenv)
        self.assertEqual((config.port, config.max_tokens), (8000, 3))
        self.assertEqual(config.base_api_url[0].host, "from.dotenv")

    def test_dotenv_understands_export_quotes_and_comments(self):
        text = """# a comment\n\nA=1\nexport B=2\nC = 'single # quoted'\nD="double"  # comment
            E=\nF=x#y # z\nG=a=b\r\nH='one\r\ntwo # three\r\n'"""
        values = settings_of("A=1 | B=2 | C=single # quoted | D=double | E= | F=x#y | G=a=b"
                             " | H=one\ntwo # three\n")
        self.assertEqual(llm_proxy.read_dotenv(text), (values, []))

    def test_a_bad_line_of_dotenv_is_reported_by_its_number_only(self):
        said = (".env line %d is not NAME=value; a value that begins with a quote must end with the"
                " next one")
        for row in self.each(("KEY sk-secret", 'KEY="sk-secret', "KEY='a'b", 'KEY="a\\"b"')):
            fault = self.fault({}, "BASE_API_URL=http://host\n\n%s\n" % row)
            self.assertEqual(fault, said % 3)
        fault = self.fault({}, "BASE_API_URL='http://host'\nA='\n\n'\n\nBASE_API_KEY sk-secret")
        self.assertEqual(fault, said % 6)

    HOSTS = """
        BASE_API_URL=http://127.0.0.1:8000/v1 -> 0.0.0.0
        BASE_API_URL=https://gpu.local/v1 | BASE_API_KEY=k -> 0.0.0.0
        BASE_API_URL=https://gpu:1/v1 | BASE_API_KEY=k -> 0.0.0.0
        BASE_API_URL=https://10.0.0.7/v1 | BASE_API_KEY=k -> 0.0.0.0
        BASE_API_URL=https://api.example.com/v1 -> 0.0.0.0
        BASE_API_URL=https://api.example.com/v1 | BASE_API_KEY=passthrough -> 0.0.0.0
        BASE_API_URL=https://api.example.com/v1 | BASE_API_KEY=k -> 127.0.0.1
        UPSTREAM_OPENAI_KEY=k -> 127.0.0.1
        UPSTREAM_OPENAI_KEY=k | PROXY_API_KEYS=sk-0123456789abcdef -> 0.0.0.0
        UPSTREAM_OPENAI_KEY=k | PROXY_API_KEYS=anyone -> 0.0.0.0
        UPSTREAM_OPENAI_KEY=k | HOST=10.0.0.1 -> 10.0.0.1
        """

    def test_where_anyone_could_spend_a_vendors_key_it_listens_here_alone_and_says_so(self):
        for settings, host in self.each(self.HOSTS):
            config = read_config({**HERE, **settings_of(settings)})
            said = [one for one in config.warnings() if "on this machine alone" in one]
            self.assertEqual((config.host, len(said)), (host, host == "127.0.0.1"))

    def test_of_a_list_the_one_at_fault_is_told_by_its_number(self):
        fault = self.fault({**HERE, "PROXY_API_KEYS": "alice=sk-1, hush hush, bob=sk-2"})
        self.assertRegex(fault, "^PROXY_API_KEYS must be .*; number 2 is at fault")
        self.assertNotIn("hush", fault)

    def test_a_guard_that_is_misspelt_in_dotenv_is_a_fault(self):
        for name, meant in self.each("""
                PROXY_API_KEY -> PROXY_API_KEYS
                API_KEYS -> PROXY_API_KEYS
                proxy_api_keys -> PROXY_API_KEYS
                LIMIT -> LIMITS
                CORS_ORIGIN -> CORS_ORIGINS"""):
            fault = self.fault(HERE, name + "=x")
            self.assertIn(".env: %s is not a setting: did you mean %s?" % (name, meant), fault)

    def test_beside_a_fault_a_name_in_dotenv_that_is_no_setting_is_told_too(self):
        _, said = self.faults({}, "BASE_URL=http://h")
        self.assertEqual(said, ".env: BASE_URL is not a setting: did you mean BASE_API_URL?")

    def test_an_upstream_is_made_of_the_settings_that_bear_its_name(self):
        self.assertEqual(read_config(HERE).upstreams, [])
        anthropic, box = read_config({
            "UPSTREAM_GPU_BOX_URL": "http://127.0.0.1:1/v1,http://127.0.0.1:2/v1",
            "UPSTREAM_GPU_BOX_MODELS": "gemma*, qwen3", "UPSTREAM_ANTHROPIC_KEY": "sk-1",
            "UPSTREAM_GPU_BOX_HEADERS": "X-A: b | X-C: d", "UPSTREAM_EMPTY_KEY": ""}).upstreams
        self.assertEqual((box.name, box.models), ("gpu_box", ("gemma*", "qwen3")))
        self.assertEqual([url.port for url in box.url], [1, 2])
        self.assertEqual(box.headers, {"x-a": "X-A: b", "x-c": "X-C: d"})
        self.assertEqual(anthropic.url[0].origin, "https://api.anthropic.com")
        found = (anthropic.key, anthropic.dialect, box.dialect)
        self.assertEqual(found, ("sk-1", "anthropic", "openai"))

    def test_upstreams_stand_in_the_order_of_upstream_order_then_dotenv_then_name(self):
        dotenv = "UPSTREAM_OPENAI_KEY=k\nUPSTREAM_GROQ_KEY=k\nUPSTREAM_MISTRAL_KEY=k"
        environ = settings_of(
            "UPSTREAM_OPENROUTER_KEY=k | UPSTREAM_GROK_KEY=k | UPSTREAM_ORDER=mistral, grok")
        names = [one.name for one in read_config(environ, dotenv).upstreams]
        self.assertEqual(names, ["mistral", "grok", "openai", "groq", "openrouter"])

    WARNINGS = """
        PROXY_API_KEYS= -> callers are not checked
        PROXY_API_KEYS= | HOST=::1 | TRUSTED_PROXIES=::1 -> callers are not checked
        PROXY_API_KEYS=alice=0123456789abcde -> the key alice in PROXY_API_KEYS has less than 16
        UPSTREAM_TLS_VERIFY=off -> (UPSTREAM_TLS_VERIFY=off)
        BASE_API_URL=http://h/v1/chat/completions -> has /chat/completions in its path
        UPSTREAM_BOX_URL=http://h//v1 -> the URL of box has // in its path
        MAX_CALL_SECONDS=300 -> MAX_CALL_SECONDS ends calls before FIRST_BYTE_TIMEOUT
        KEY_WEIGHTS=bob=2,alice=3 | PROXY_API_KEYS=alice=sk-0123456789abc -> KEY_WEIGHTS speaks of\
 'bob', which no key in PROXY_API_KEYS is named
        CALLER_HEADER=X-User -> CALLER_HEADER is believed from nobody: TRUSTED_PROXIES is unset
        LIMITS=model:gpt* 9 requests per day -> callers choose what the rule sees
        LIMITS=all 5 usd per day;each 9 requests per day -> callers choose what the rule sees
        TOKEN_COST_MODE=estimate -> RESPONSE_TOKEN_RESERVE 256 is above MAX_TOKENS 10
        REQUEST_TOKEN_COST=11 -> REQUEST_TOKEN_COST 11 is above MAX_TOKENS 10
        BASE_MODEL=m | UPSTREAM_OPENAI_KEY=k | LIMITS=upstream:opnai 5 usd per day;each 9 requests\
 per day ->\
 'upstream:opnai 5 usd per day' speaks of no upstream there is: base, openai
        UPSTREAM_OPENAI_KEY=k | BASE_API_URL= -> /openai/v1
        BASE_MODEL=m | LIMITS=each 5 usd per day -> no rule counts requests
        TOKEN_COST_MODE=usage | MAX_TOKENS=256 -> no rule counts requests
        MAX_TOKEN=1 -> MAX_TOKEN is not a setting
        PROXY_API_KEY=1 -> PROXY_API_KEY is not a setting: did you mean PROXY_API_KEYS? NOTHING
        BREAKER_SECOND=1 -> BREAKER_SECOND is not a setting
        UPSTREAM_OPENAI_MODLES=1 -> UPSTREAM_OPENAI_MODLES is not a setting
        UPSTREAM_MY-BOX_URL=1 -> UPSTREAM_MY-BOX_URL is not a setting
        """
    OLD_NAMES = """
        EARLY_STREAM_SECONDS=2 -> 2
        EARLY_STREAM_SECONDS=2 | STREAM_HEARTBEAT_SECONDS=1 -> 1
        EARLY_STREAM_SECONDS=0 | STREAM_HEARTBEAT_SECONDS=3 -> 3
        EARLY_STREAM_SECONDS=2 | STREAM_COMMENT_SECONDS=5 -> 5
        """

    def test_old_names_of_a_setting_go_on_and_are_warned_of(self):
        for text, seconds in self.each(self.OLD_NAMES):
            config = read_config({**HERE, **settings_of(text)})
            self.assertEqual(config.stream_comment_seconds, float(seconds))
            said = "EARLY_STREAM_SECONDS is now STREAM_COMMENT_SECONDS"
            self.assertIn(said, config.warnings())

    NO_WARNINGS = """
        PROXY_API_KEYS=sk-0123456789abcdef
        PROXY_API_KEYS=anyone
        PROXY_API_KEYS= | HOST=127.0.0.1
        PROXY_API_KEYS= | HOST=[::1]
        LIMITS=each 5 usd per day | UNKNOWN_CALLS=refuse | BASE_MODEL=m
        MAX_CALL_SECONDS=300 | FIRST_BYTE_TIMEOUT=100
        TOKEN_COST_MODE=estimate | MAX_TOKENS=256
        LIMITS=model:gpt* 9 requests per day | BASE_MODEL=gpt-5
        LIMITS=model:gpt* 9 requests per day | BASE_API_URL=https://api.openai.com/v1
        PATH=1 | HOSTNAME=1 | HTTP_PROXY=1 | http_proxy=1 | OLDPWD=1 | LOGNAME=1 | TOKENS=1
        DATABASE_URL=1 | SSL_CERT_FILE=1
        """

    def warnings(self, settings, dotenv=""):
        settings = {**HERE, "PROXY_API_KEYS": "sk-0123456789abcdef", **settings_of(settings)}
        return read_config(settings, dotenv).warnings()

    def test_what_would_come_to_nothing_or_is_unsafe_has_one_warning(self):
        for settings, words in self.each(self.WARNINGS):
            warning, = self.warnings(settings)
            self.assertIn(words, warning)
        for settings, in self.each(self.NO_WARNINGS):
            self.assertEqual(self.warnings(settings), [])

    def test_a_name_in_dotenv_that_is_no_setting_is_warned_of(self):
        dotenv = "MAX_TOKEN=3\nPORT=8000\nUPSTREAM_OPENAI_KEY=\nUPSTREAM_GROQ_KEY=k"
        first, second = self.warnings("UPSTREAM_GROQ_KYE=k", dotenv)
        self.assertRegex(first + second, "^MAX_TOKEN is not.*UPSTREAM_GROQ_KYE is not")

    def test_the_tables_of_readme_are_made_of_the_settings(self):
        readme = source(os.path.join(FOLDER, "README.md"))
        for rows in readme_rows():
            self.assertIn("\n%s\n\n" % "\n".join(rows), readme)

    def test_readme_is_short_but_for_its_tables(self):
        readme = source(os.path.join(FOLDER, "README.md")).splitlines()
        prose = [line for line in readme if not line.startswith("|")]
        self.assertLessEqual(len(prose), 300)
        self.assertEqual([line for line in prose if len(line) > 110], [])
        cells = [line for line in readme if line.startswith("|")]
        self.assertEqual([line[:80] for line in cells if len(line) > 430], [])

    def test_every_link_of_readme_leads_to_a_heading_of_it(self):
        readme = source(os.path.join(FOLDER, "README.md"))
        headings = [re.sub("[^a-z -]", "", line.lower()).replace(" ", "-")
                    for line in re.findall("^## (.*)", readme, re.M)]
        self.assertEqual(set(re.findall(r"\]\(#(.*?)\)", readme)) - set(headings), set())

    def test_the_examples_of_readme_are_without_a_fault(self):
        readme = source(os.path.join(FOLDER, "README.md"))

        def example(heading):
            text = readme[readme.index("\n## %s\n" % heading):]
            return textwrap.dedent(re.search("(?:\n    .*)+", text)[0])

        config = read_config({}, example("Five friends and a GPU"))
        self.assertEqual((len(config.proxy_api_keys), config.warnings()), (5, []))
        self.assertEqual(len(read_config(HERE, example("Rules")).limits), 8)


class RulesTest(TableCase):
    RULES = """
        each 60 requests per minute -> requests 60 1
        each 100000 tokens per day -> tokens 100000 0.864
        all 200 requests per minute burst 50 -> requests 50 0.3
        address 7 input_tokens per 7d -> input_tokens 7 86400
        model:gpt-4* 30 output_tokens per 30s -> output_tokens 30 1
        key:alice 0.5 usd per hour burst 2 -> usd 2000000000000 7.2e-09
        key:a*,model:gpt-4 1 requests per month -> requests 1 2.592e+06
        each unlimited tokens per week -> tokens None 0
        key:ci-* 5 running -> running 5 inf
        all unlimited running -> running None 0
        team:red 2 usd per day -> usd 2000000000000 4.32e-08
        each,team:* 3 tokens per day -> tokens 3 28800
        each 120 requests per 60s window -> requests 120 60 window
        team:red 2.5 usd per hour window -> usd 2500000000000 3600 window
        each 2 usd per calendar day -> usd 2000000000000 86400 day UTC
        all,model:a* 9 tokens per calendar week in Europe/Berlin -> tokens 9 604800 week \
Europe/Berlin
        key:a unlimited tokens per calendar month in UTC -> tokens None 0 month UTC
        """

    def test_a_rule_is_a_bucket(self):
        for text, bucket in self.each(self.RULES):
            rule, = llm_proxy.rules(text)
            seconds = rule.interval / (1 if rule.window else rule.refill) if rule.capacity else 0
            found = "%s %s %.6g %s %s" % (
                UNITS[rule.unit], rule.capacity, seconds, rule.window, rule.zone)
            self.assertEqual(found.rstrip(), bucket)
            self.assertEqual(rule.text, text)

    def test_rules_are_separated_by_semicolons_or_lines(self):
        one, two = llm_proxy.rules(" each  60 requests per minute;\n\nall 1 usd per day ; ")
        self.assertEqual((one.text, two.text), ("each 60 requests per minute", "all 1 usd per day"))

    FAULTY_RULES = """
        each 60 request per minute -> 'request'
        every 1 requests per day -> 'every'
        each x requests per day -> 'x'
        each 0 requests per day -> '0'
        each 1.5 requests per day -> '1.5'
        each -1 requests per day -> '-1'
        each 1 requests a day -> 'a'
        each 1 requests per fortnight -> 'fortnight'
        each 1 requests per 0s -> '0s'
        each 1 requests per day burst -> the end
        each 1 requests per day burst many -> 'many'
        each 1 requests per day now -> 'now'
        each 1 requests per day burst 2 3 -> '3'
        each 1 requests per day burst unlimited -> 'unlimited'
        key: 1 requests per day -> 'key:'
        each,key:a 1 requests per day -> 'each,key:a'
        all,address 1 requests per day -> 'all,address'
        team: 1 requests per day -> 'team:'
        each -> the end
        each 1 usd per day burst 0.0000001 -> '0.0000001'
        each 2 running per day -> 'per'
        each 2.5 running -> '2.5'
        each 2 running burst 3 -> 'burst'
        each 2 running window -> 'window'
        each 1 requests per day window 2 -> '2'
        each 1 requests per window -> 'window'
        each 1 requests per calendar -> the end
        each 1 requests per calendar hour -> 'hour'
        each 1 requests per calendar day burst 2 -> 'burst'
        each 1 requests per calendar day in -> the end
        each 1 requests per calendar day in Europe/../Berlin -> 'Europe/../Berlin'
        each 1 requests per calendar day in UTC now -> 'now'
        """

    def test_a_faulty_rule_is_named_with_the_word_that_is_wrong(self):
        for text, word in self.each(self.FAULTY_RULES):
            words = (re.escape(text), re.escape(word))
            pattern = "^LIMITS must be rules such as.* in '%s' .*%s" % words
            with self.assertRaisesRegex(ConfigFaults, pattern):
                read_config({**HERE, "LIMITS": "all 1 requests per day; " + text})

    def test_a_zone_that_is_not_known_is_named_and_so_is_a_machine_that_knows_none(self):
        text = "each 1 requests per calendar day in "
        for zone in self.each(("Europe/Atlantis", "Europe", "Europe/")):
            with self.assertRaisesRegex(ConfigFaults, "known here, which '%s' is not .got" % zone):
                read_config({**HERE, "LIMITS": text + zone})
        with patch("zoneinfo.ZoneInfo", side_effect=zoneinfo.ZoneInfoNotFoundError):
            read_config({**HERE, "LIMITS": text + "UTC"})
            with self.assertRaisesRegex(ConfigFaults, "no time zone data, install"):
                read_config({**HERE, "LIMITS": text + "Europe/Berlin"})


class PriceFileTest(TableCase):
    def read(self, text):
        return llm_proxy.price_file(pem_file(self, text))

    def test_both_shapes_are_read_exactly(self):
        costs = '{"input": 0.15, "output": 0.6, "cache_read": 0.075, "cache_write": 0.1875}'
        vendors = '{"openai": {"id": "x", "models": {"a": {"id": "a", "cost": %s}, "free": {}}}}'
        price = llm_proxy.Price(150000, 600000, 75000, 187500, 300000)
        self.assertEqual(self.read(vendors % costs), {"a": price})
        self.assertEqual(self.read('{"a": %s}' % costs), {"a": price})
        price = llm_proxy.Price(3000000, 0, 3000000, 3000000, 6000000)
        self.assertEqual(self.read('{"b*": {"input": 3}}'), {"b*": price})

    def test_a_price_may_depend_on_the_length_of_the_prompt_and_on_the_tier(self):
        own = """{"a": {"input": 1, "output": 2, "hour_write": 7,
                        "above": {"tokens": 100, "input": 3, "output": 4},
                        "tiers": {"Flex": 0.5, "fast": {"input": 9, "output": 10}}}}"""
        vendors = """{"google": {"models": {"a": {
            "cost": {"input": 1, "output": 2, "context_over_200k": {"input": 3, "output": 4}},
            "experimental": {"modes": {"fast": {
                "cost": {"input": 9, "output": 10},
                "provider": {"body": {"service_tier": "priority"}}}, "slow": {}}}}}}}"""
        exact = vendors.replace('"context', '"tiers": [%s], "context' % ", ".join([
            '{"tier": {"type": "context", "size": %d}, "input": %d}' % row
            for row in ((300, 8), (50, 6))]))
        for text, tokens, tiers in self.each((
                (own, [100], "flex fast"), (vendors, [200_000], "fast priority"),
                (exact, [50, 300], "fast priority"))):
            price = self.read(text)["a"]
            self.assertEqual(" ".join(price.tiers), tiers)
            self.assertEqual(price.tiers["fast"][:2], (9000000, 10000000))
            for most in tokens:
                self.assertEqual(price.above_tokens, most)
                price = price.above
            self.assertEqual((price.input, price.above), (3000000 if text != exact else 8000000,
                                                          None))

    def test_of_a_model_that_many_sell_the_makers_price_counts(self):
        found = self.read("""{
            "alibaba": {"models": {"a": {"cost": {"input": 7}}}},
            "reseller": {"models": {"a": {"cost": {"input": 9, "output": 9}},
                                    "b": {"cost": {"input": 0, "output": 0}}}},
            "openai": {"models": {"a": {"cost": {"input": 2, "output": 8}}}},
            "other": {"models": {"a": {"cost": {"input": 0, "output": 0}},
                                 "A": {"cost": {"input": 3, "output": 1}},
                                 "b": {"cost": {"input": 1, "output": 1}}}}}""")
        self.assertEqual((found["a"][0], found["b"][0]), (2000000, 1000000))

    def test_what_is_no_file_of_prices_is_a_fault(self):
        rows = """[] { 3 {"a":1} {"a":{"input":"1"}} {"a":{"output":1}} {"a":{"input":-1}}
            {"a":{"input":NaN}} {"a":{"models":3}} {"a":{"models":{"m":{"cost":1}}}}
            {"a":{"input":1,"above":3}} {"a":{"input":1,"above":{"input":1}}}
            {"a":{"input":1,"tiers":3}} {"a":{"input":1,"tiers":{"b":-1}}}
            {"a":{"input":1,"tiers":{"b":"x"}}} {"a":{"input":1,"tiers":{"b":{"input":"x"}}}}"""
        for text in self.each(["", "[" * 100000, *rows.split()]):
            with self.assertRaisesRegex(ValueError, "^must be a JSON file of prices"):
                self.read(text)
        with self.assertRaisesRegex(ValueError, "^must be a file that can be read"):
            llm_proxy.price_file("/nonexistent/prices.json")


# --------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------

class RefusalsTest(TableCase):
    def test_every_refusal_has_a_status_of_an_error(self):
        found = [llm_proxy.Refusal]
        for refusal in found:  # which grows meanwhile
            found += refusal.__subclasses__()
        self.assertGreater(len(found), 10)
        for refusal in self.each(found):
            self.assertIn(refusal.status, range(400, 600))


# --------------------------------------------------------------------------------------------------
# Callers
# --------------------------------------------------------------------------------------------------

class CallersTest(ProxyCase):

    def test_an_api_key_is_a_credential_where_an_upstream_is_azures(self):
        for dialect, left in self.each("""[["azure", [4, 5]], ["openai", [5, 4]]]"""):
            self.start(MAX_TOKENS=5, UPSTREAM_X_URL="http://127.0.0.1:1", UPSTREAM_X_KEY="sk-up",
                       UPSTREAM_X_DIALECT=dialect)
            self.ask(call(None, "api-key: k"))
            self.assertEqual([self.left("k"), self.left()], left)
            self.assertIsNone(self.stub.requests[0].get("api-key"))

    def test_two_different_credentials_are_refused(self):
        answered = self.assert_status(400, call("a", "X-Api-Key: b"))
        answered.tells("type", "invalid_request_error")
        self.assertEqual((self.stub.calls, self.outcome()), (0, "refused"))

    def test_without_a_credential_the_address_is_the_caller_and_no_bearer_can_be_it(self):
        self.start(MAX_TOKENS=5)
        self.ask()
        self.assertEqual((self.left(), self.left("k"), self.left("127.0.0.1")), (4, 5, 5))
        self.assert_entry("caller", "127.0.0.1")
        self.ask("127.0.0.1")
        self.assertEqual((self.left(), self.left("127.0.0.1")), (4, 4))

    def test_who_tries_many_keys_has_to_wait_but_a_right_one_always_passes(self):
        clock = Clock()
        self.patch_seconds(RefusalSums_SHOWN=99)
        self.start(clock=clock, PROXY_API_KEYS="alice=sk-1")
        for seconds, statuses in self.each("""[[0, "401 429"], [59, "429 429"], [1, "401 429"]]"""):
            clock.now += seconds
            found = [self.ask(call("sk-x%d" % number)) for number in range(11)]
            told = " ".join(str(one.status) for one in (found[0], found[10]))
            self.assertEqual(told, statuses)
            if statuses != "429 429":
                self.assertEqual(found[10].get("retry-after"), "60")
                self.assertEqual(found[10].get("x-should-retry"), "false")
            self.assert_status(200, call("sk-1"))
            self.assert_status(401)
            self.assert_status(200, request("GET", "/health", key="sk-x"))
        outcomes = [row for row in self.lines.text().splitlines() if '"path": "/health"' in row]
        self.assertIn('"outcome": "refused"', outcomes[-1])

    def test_an_unknown_key_is_refused_on_every_path_but_health_and_preflights(self):
        self.patch_seconds(WrongKeys_RULE=read_rule("address 99 requests per minute"))
        self.start(PROXY_API_KEYS="alice=sk-1", BASE_MODEL="m")
        paths = """POST /v1/chat/completions, POST /v1/completions, GET /v1/models, HEAD /v1/models,
            POST /v1/files, GET /, GET //health, DELETE /v1/files/1, GET /health/, POST /health"""
        keys = (None, "sk-2", "sk-1x", "alice", "alice=sk-1", "127.0.0.1")
        for path, key in self.each(paths.split(","), keys):
            method, path = path.split()
            body = chat() if method == "POST" else b""
            answered = self.ask(request(method, path, body, key=key))
            self.assertEqual((answered.status, answered.get("www-authenticate")), (401, "Bearer"))
            if method != "HEAD":
                error = answered.error()
                self.assertEqual(error["type"], "authentication_error")
                self.assertEqual(error["code"], "invalid_api_key")
        rows = [("GET", "/health", 200), ("HEAD", "/health", 200), ("OPTIONS", CHAT, 204)]
        for method, path, status in self.each(rows):
            self.assert_status(status, request(method, path))
        self.assert_calls(0)

    def test_a_key_outside_ascii_is_unknown_and_no_error(self):
        self.start(PROXY_API_KEYS="alice=sk-1")
        for field, in self.each("""
                Authorization: Bearer \xff\xe9
                Authorization: B\xe4r sk-1
                Authorization:
                X-Api-Key: \xff
                X-Api-Key:"""):
            self.assert_status(401, call(None, field))

    def test_a_known_key_is_let_in_and_logged_as_a_name_or_a_digest(self):
        self.start(PROXY_API_KEYS="alice=sk-alice-secret,sk-nameless-secret")
        found = []
        for number, key in enumerate(("sk-alice-secret", "sk-nameless-secret", "sk-wrong-secret")):
            found += [str(self.ask(key).status), self.entry(number)["caller"]]
        self.assertRegex(" ".join(found), "^200 alice 200 key:[0-9a-f]{8} 401 127.0.0.1$")
        self.assertNotIn("secret", self.lines.text())

    def test_two_proxies_log_the_same_key_under_different_digests(self):
        """So that a digest from a log cannot be looked up in a table."""
        labels = []
        for _ in range(2):
            self.start()
            self.ask("k")
            self.ask("k")
            labels.append({self.entry(0)["caller"], self.entry(1)["caller"]})
        self.assertEqual([*map(len, labels), len(labels[0] | labels[1])], [1, 1, 2])

    def test_a_bearer_token_and_an_api_key_header_of_the_same_text_share_a_bucket(self):
        self.start(MAX_TOKENS=3)
        for fields in self.each("""
                Authorization: Bearer k
                X-Api-Key: k
                authorization: bearer k -> x-api-key: k"""):
            self.assertEqual(self.ask(call(None, *fields)).body, b'{"said": "hi"}')
        self.assertEqual((self.left("k"), self.left("another")), (0, 3))


class TrustTest(ProxyCase):
    """Who is believed to speak for others. All tests come from 127.0.0.1."""

    def start(self, *arguments, **settings):
        streams = []
        self.addCleanup(lambda: streams.pop().close())  # after the proxy's end
        self.usage_log = pem_file(self, "")
        settings = {"USAGE_LOG": self.usage_log, "TRUSTED_PROXIES": "127.0.0.1", **settings}
        super().start(*arguments, **settings)
        streams.append(self.proxy.books.usage_log.stream)

    def rows(self):
        with open(self.usage_log, encoding="ascii") as file:
            return [json.loads(row) for row in file if row.endswith("\n")]

    def identified(self, *fields, key=None, status=200):
        """Returns (the caller, the address) that a call is booked under."""
        number = len(self.rows())
        self.assert_status(status, call(key, *fields))
        row = wait_for(lambda: self.rows()[number:])[0]
        return row["caller"], row["address"]

    def test_nobody_is_believed_who_calls_from_anywhere_else(self):
        names = "X-Forwarded-For Forwarded X-Real-IP True-Client-IP X-User".split()
        for trusted in ("", "10.0.0.0/8,::1"):
            self.start(TRUSTED_PROXIES=trusted, CALLER_HEADER="X-User")
            for name in self.each(names):
                self.assertEqual(self.identified(name + ": 192.0.2.1"), ("127.0.0.1", "127.0.0.1"))
                self.assertIsNone(self.stub.last.get(name))

    ADDRESSES = """
        X-Forwarded-For: 192.0.2.1 -> 192.0.2.1
        X-Forwarded-For: 203.0.113.9, 192.0.2.1 -> 192.0.2.1
        X-Forwarded-For: 192.0.2.1, 10.1.2.3 -> 192.0.2.1
        X-Forwarded-For: evil, 192.0.2.1, 10.1.2.3, 10.9.9.9 -> 192.0.2.1
        X-Forwarded-For: 192.0.2.1, evil -> 127.0.0.1
        X-Forwarded-For: evil, 10.1.2.3 -> 10.1.2.3
        X-Forwarded-For: 10.1.2.3 -> 10.1.2.3
        X-Forwarded-For:  -> 127.0.0.1
        X-Forwarded-For: , -> 127.0.0.1
        X-Forwarded-For: 192.0.2.1:4711 -> 192.0.2.1
        X-Forwarded-For: [2001:db8:1:2::3]:443 -> 2001:db8:1:2::/64
        X-Forwarded-For: 2001:db8:1:2::4 -> 2001:db8:1:2::/64
        X-Forwarded-For: ::ffff:192.0.2.7 -> 192.0.2.7
        X-Forwarded-For: 192.0.2.1 | X-Forwarded-For: 192.0.2.2 -> 192.0.2.2
        X-Forwarded-For: MANY -> 192.0.2.199
        X-Real-IP: 192.0.2.1 -> 127.0.0.1
        """

    def test_a_trusted_proxy_names_the_last_address_that_is_none(self):
        self.start(TRUSTED_PROXIES="10.0.0.0/8, 127.0.0.1")
        many = ", ".join("192.0.2.%d" % number for number in range(200))
        for fields, address in self.each(self.ADDRESSES.replace("MANY", many)):
            self.assertEqual(self.identified(*fields.split(" | ")), (address, address))

    def test_each_address_behind_it_has_a_bucket_of_its_own(self):
        self.start(LIMITS="address 1 requests per hour", LIMIT_REPLY="error")
        for field, status in self.each("""
                X-Forwarded-For: 192.0.2.1 -> 200
                X-Forwarded-For: 192.0.2.1 -> 429
                X-Forwarded-For: 192.0.2.2 -> 200
                X-Forwarded-For: 192.0.2.2, 192.0.2.1 -> 429"""):
            self.identified(field, key="k", status=int(status))

    def test_one_shared_key_splits_into_the_people_behind_it(self):
        self.start(
            CALLER_HEADER="X-OpenWebUI-User-Id", PROXY_API_KEYS="webui=sk-1,alice=sk-2",
            LIMITS="key:alice 9 requests per hour; key:webui/vip 2 requests per hour;"
                   "each 1 requests per hour", LIMIT_REPLY="error")
        for key, caller, statuses, *person in self.each("""
                sk-1 -> webui/u1 -> 200 429 -> u1
                sk-1 -> webui/u2 -> 200 429 -> u2
                sk-1 -> webui/alice -> 200 429 -> alice
                sk-1 -> webui/vip -> 200 200 429 -> vip
                sk-1 -> webui/J%F6rg%20von%20und%20zu -> 200 429 -> J\xf6rg von und zu
                sk-1 -> webui -> 200 429
                sk-2 -> alice/u1 -> 200 429 -> u1
                sk-2 -> alice -> 200 200
                wrong -> 127.0.0.1 -> 401 -> u1"""):
            fields = ["X-OpenWebUI-User-Id: " + name for name in person]
            for status in map(int, statuses.split()):
                self.assertEqual(self.identified(*fields, key=key, status=status)[0], caller)
        for asked in self.stub.requests:
            self.assertIsNone(asked.get("x-openwebui-user-id"))

    def test_people_are_told_apart_whatever_their_names_and_wherever_they_are(self):
        self.start(CALLER_HEADER="X-User", MAX_TOKENS=10)
        names = ["x" * 70 + "1", "x" * 70 + "2", "zoe"]
        callers = [self.identified("X-User: " + name)[0] for name in names]
        self.assertEqual((len(set(callers)), callers[2]), (3, "-/zoe"))
        elsewhere = self.identified("X-User: zoe", "X-Forwarded-For: 192.0.2.9")
        self.assertEqual(elsewhere, ("-/zoe", "192.0.2.9"))
        self.assert_entry("remaining", 8, 3)

    def test_a_mapped_address_may_be_trusted_too(self):
        for trusted in self.each(["::ffff:127.0.0.1", "::ffff:127.0.0.0/104"]):
            self.start(TRUSTED_PROXIES=trusted)
            found = self.identified("X-Forwarded-For: 192.0.2.1, fe80::1%eth0")
            self.assertEqual(found[1], "fe80::1")

    def test_two_people_are_not_one_because_their_key_and_name_join_alike(self):
        settings = {**HERE, "TRUSTED_PROXIES": "127.0.0.1", "CALLER_HEADER": "x-user"}
        callers = llm_proxy.Callers(read_config(settings), b"", llm_proxy.StoredKeys(b""))
        keys = [(Caller(("key", b"a"), None), "bc"),
                (Caller(("key", b"ab"), None), "c")]
        one, two = [callers.end_user({"x-user": name}, "127.0.0.1", key) for key, name in keys]
        self.assertNotEqual(one.key, two.key)

    def test_addresses_are_told_apart_as_their_owners_are(self):
        for host, address in self.each("""
                192.0.2.1 -> 192.0.2.1
                ::ffff:192.0.2.1 -> 192.0.2.1
                ::1 -> ::1
                2001:db8::1 -> 2001:db8::/64
                2001:db8:0:0:ffff::1 -> 2001:db8::/64
                fe80::1%eth0 -> fe80::1
                fd00:1:2:3:4::5 -> fd00:1:2:3::/64"""):
            self.assertEqual(llm_proxy.address_of(host), address)


# --------------------------------------------------------------------------------------------------
# Limits
# --------------------------------------------------------------------------------------------------


class ModelBucket:
    """What Buckets is compared with: the rule in its plainest form, tick by tick, in fractions."""

    def __init__(self, capacity, refill, interval):
        self.capacity = capacity
        self.refill = refill
        self.interval = interval
        self.level = capacity
        self.tick = None

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


def caller(name, kind="key"):
    return Caller((kind, name), name)


def costs(*amounts):
    """Costs in the order of UNITS; the last amount is also that of all units that follow."""
    return (amounts + amounts[-1:] * len(UNITS))[:len(UNITS)]


def awaited(coroutine):
    """What a coroutine returns that never waits."""
    with closing(coroutine):
        try:
            coroutine.send(None)
        except StopIteration as end:
            return end.value
    raise AssertionError("it waits")


class LimitsCase(TableCase):
    MESSAGE = "limit reached, wait {wait}"
    LONG = 10 ** 9  # seconds that a call may run
    STEPS = 500

    def start(self, text=None, capacity=10, refill=2, interval=300, message=MESSAGE, **options):
        """Limits by these rules, or by one with a bucket for each caller."""
        rule = llm_proxy.Rule("each N tokens", (("each", ""),), UNITS.index("tokens"), capacity,
                              refill, interval, (refill, interval))
        self.clock = Clock()
        self.store = self.new_store(**options)
        self.limits = Limits(llm_proxy.rules(text) if text else [rule], self.store, message)

    def new_store(self, **options):
        return Buckets(self.clock, **options)

    @property
    def buckets(self):
        """The store, once all is in it that was done."""
        return self.store

    def awaited(self, coroutine):
        return awaited(coroutine)

    def admit(self, *amounts, name="alice", address="1", model=""):
        """Returns the Hold of a call that costs `amounts`, or raises LimitReached."""
        return self.awaited(self.limits.admit(caller(name), address, model, costs(*amounts)))

    def refused(self, *amounts, **whom):
        """Returns the LimitReached of a call that costs `amounts`."""
        with self.assertRaises(LimitReached) as caught:
            self.admit(*amounts, **whom)
        return caught.exception

    def assert_refused(self, said, seconds):
        refusal = self.refused(1)
        self.assertEqual((str(refusal), refusal.fields), (said, {"Retry-After": seconds}))

    def peek(self, cost=0, name="alice"):
        """Returns (Quota, seconds until `cost` can be had)."""
        pairs = self.limits.matching(caller(name), "1", "")
        return self.buckets.peek(pairs, cost)

    def left(self, name="alice"):
        return self.peek(0, name)[0].remaining

    def levels(self):
        """Returns [(text of the rule, level)] of the buckets that are not full."""
        return sorted((key[0], found[0]) for key, found in self.buckets.snapshot(0).items())


class LimitsTest(LimitsCase):
    def test_it_gains_by_whole_intervals_from_the_moment_it_stopped_being_full(self):
        self.start()
        self.admit(10)
        for seconds, found in self.each("""
                0 -> 0, reset in 300
                299.875 -> 0, reset in 1
                0.125 -> 2, reset in 300
                299.5 -> 2, reset in 1
                0.5 -> 4, reset in 300
                900 -> 10, reset in 0
                9999 -> 10, reset in 0"""):
            self.clock.now += float(seconds)
            quota, _ = self.peek()
            self.assertEqual("%d, reset in %d" % (quota.remaining, quota.reset_seconds), found)

    def take_some(self, model, choose):
        """A call of any cost, which may also turn out to cost more or less."""
        cost = choose.randint(1, model.capacity)
        if model.level < cost:
            return self.refused(cost)
        hold = self.admit(cost)
        model.add(self.clock.now, -cost)
        if choose.random() < 0.3:
            back = choose.randint(-3, cost)
            hold.settle(costs(cost - back))
            model.add(self.clock.now, back)
        return hold

    def test_any_schedule_gives_what_the_exact_model_gives(self):
        choose = Random(20)
        rows = [(10, 2, 300), (7, 3, 1), (100, 7, 60), (1, 1, 5), (5, 100, 10)]
        for capacity, refill, interval in self.each(rows):
            self.start(None, capacity, refill, interval)
            model = ModelBucket(capacity, refill, interval)
            self.assert_left(capacity)
            self.clock.now = fractions.Fraction(1, 3)
            for step in range(self.STEPS):
                steps = choose.randrange(interval * 20)
                self.clock.now += fractions.Fraction(steps, choose.choice((7, 10, 40)))
                model.advance(self.clock.now)
                tightest = self.take_some(model, choose).tightest
                quota = tightest.quota
                self.assertEqual(quota.remaining, max(0, model.level), step)

    def test_no_wait_is_a_moment_too_short_or_too_long(self):
        choose = Random(3)
        for text, in self.each("""
                each 200 requests per minute
                each 7 requests per hour
                each 1000000 tokens per day
                each 0.3 usd per day
                each 10 requests per second"""):
            self.start(text)
            rule, = self.limits.rules
            for _ in range(self.STEPS):
                self.clock.now += choose.random() * rule.interval * 3
                cost = choose.randint(1, rule.capacity)
                seconds = self.peek(cost)[1]
                if not seconds:
                    self.admit(cost)
                    continue
                wait = self.refused(cost).wait
                self.assertEqual(seconds, ceil(wait))
                self.clock.now += wait - rule.interval / 2
                self.refused(cost)
                self.clock.now += rule.interval / 2
                self.admit(cost)

    def test_a_hold_ends_once(self):
        self.start()
        hold = self.admit(5)
        hold.settle(costs(3))
        hold.settle(costs(1))
        hold.give_back()
        self.assert_left(7)

    def test_a_call_that_cost_more_than_it_held_leaves_a_debt_that_is_waited_for(self):
        self.start()
        self.admit(10).settle(costs(13))
        quota, wait = self.peek(1)
        self.assertEqual((quota.remaining, wait), (0, 600))

    def test_a_cost_above_the_capacity_is_said_to_be_one_and_has_no_wait(self):
        self.start()
        refusal = self.refused(11)
        self.assertRegex(str(refusal), "11.*10")
        self.assertNotIn("wait", str(refusal))
        self.assertEqual((refusal.wait, refusal.fields), (None, {}))

    def test_a_limit_says_the_wait_in_the_words_of_the_operator(self):
        self.start(message="{wait}, {please}: 100%")
        self.admit(10)
        self.assert_refused("5 min, {please}: 100%", 300)

    def test_waits_are_rounded_up_in_the_words_of_people(self):
        texts = [llm_proxy.format_wait(wait) for wait in (
            0.2, 12, 59, 59.5, 61, 300, 300.1, 7200, 7201, 172800, 172801)]
        self.assertEqual(", ".join(texts), "1s, 12s, 59s, 1 min, 2 min, 5 min, 6 min, 120 min,"
                                           " 3 hours, 48 hours, 3 days")

    def test_any_number_of_keys_fits_into_a_bounded_table(self):
        self.start()
        for number in range(12000):
            self.admit(1, name=str(number))
        self.assertLessEqual(len(self.buckets.levels), 10000)
        self.assert_left(9, "11999")

    def test_the_least_recently_used_bucket_goes_first(self):
        self.start(room=3)
        for name in "abcabda":
            self.admit(1, name=name)
        self.assertEqual([self.left(name) for name in "abcd"], [7, 8, 10, 9])

    def test_a_flood_of_new_callers_fills_no_bucket_that_was_used_up(self):
        """Neither one's own nor one that all share."""
        self.start("each 10 tokens per day; all 5000 tokens per day", room=100)
        self.admit(10, name="greedy")
        for number in range(300):
            self.admit(1, name=str(number))
        self.assertLessEqual(len(self.buckets.levels), 101)
        self.assertEqual(self.left("greedy"), 0)
        self.assertEqual(self.buckets.levels["all 5000 tokens per day",].level, 5000 - 310)

    def test_a_snapshot_loses_no_refill(self):
        self.start()
        self.admit(10)
        self.clock.now += 700
        saved = self.buckets.snapshot(5000)
        self.assertEqual(self.buckets.snapshot(5000.006), saved)  # or all were written again
        self.assertNotEqual(self.buckets.snapshot(5000.02), saved)
        (key, (level, since)), = saved.items()
        found = self.peek(5)
        self.buckets.levels.clear()
        self.buckets.restore(self.limits.rules[0], key, level, 5000 - since)
        self.assertEqual((self.peek(5), found[0][1:]), (found, (4, 2, 300, 200)))


class RulesTogetherTest(LimitsCase):
    RULES = """key:alice unlimited requests per minute; key:b* 5 requests per 60s;
        each 2 requests per minute; each 9 tokens per minute; each 100 requests per day;
        model:gpt-4* 3 requests per minute; model:* 4 requests per minute;
        all 7 requests per minute; key:alice,model:o* 1 requests per hour"""

    def test_the_first_rule_of_a_family_that_matches_counts(self):
        self.start(self.RULES)
        order = [rule.text for rule in self.limits.rules]
        rows = """
            alice -> gpt-4o -> 3 4 5 7
            bob -> GPT-4 -> 1 3 4 5 7
            carl ->  -> 2 3 4 6 7
            alice -> o3 -> 3 4 6 7 8
            bob -> openai/gpt-4 -> 1 3 4 5 7
            """
        for name, model, numbers in self.each(rows * 2):  # the second time from memory
            found = self.limits.matching(caller(name), "10.0.0.1", model)
            places = sorted(order.index(rule.text) for rule, _ in found)
            self.assertEqual(" ".join(map(str, places)), numbers)

    SPELLINGS = """
        claude-sonnet-4.5 -> anthropic/Claude-Sonnet-4.5:beta
        claude-sonnet-4-5 -> us.anthropic.claude-sonnet-4-5-20250929-v1:0
        anthropic/claude-sonnet-4.5 -> claude-sonnet-4-5@20250929
        claude-*-4.5* -> claude-sonnet-4-5-latest
        gemini-2.0-flash -> publishers/google/models/gemini-2.0-flash-001
        gpt-4o-mini -> ft:gpt-4o-mini-2024-07-18:org::id
        gpt-4o-mini-2024-07-18 -> gpt-4o-mini
        deepseek-r1 -> deepseek/deepseek-r1:free
        """

    def test_a_rule_names_a_model_in_all_its_spellings(self):
        for glob, model in self.each(self.SPELLINGS):
            self.start("model:%s 1 requests per day; model:* 2 requests per day" % glob)
            (rule, _), = self.limits.matching(caller("a"), "10.0.0.1", model)
            self.assertEqual(rule, self.limits.rules[0])

    def test_a_spelling_that_a_rule_has_is_not_folded(self):
        self.start("model:gpt-4o 1 requests per day; model:openai/gpt-4o 2 requests per day")
        for model, number in self.each("""[["openai/gpt-4o", 1], ["azure/gpt-4o", 0]]"""):
            (rule, _), = self.limits.matching(caller("a"), "10.0.0.1", model)
            self.assertEqual(rule, self.limits.rules[number])

    def test_sizes_are_models_of_their_own(self):
        self.start("model:llama3:70b 1 requests per day")
        self.assertEqual(self.limits.matching(caller("a"), "10.0.0.1", "llama3:8b"), [])

    def test_no_name_is_folded_slowly(self):
        with self.computing_within(0.5):
            for part in ("-v1:0", "-001", "-00000000", "1-v1:0", "@", ":free", "us.", "1.1", "ft:"):
                llm_proxy.fold_model(part * (256 // len(part)) + "!")

    def test_a_call_that_several_models_may_serve_must_pass_the_rules_of_each(self):
        self.start("model:cheap 9 requests per day; model:dear* 2 requests per day;"
                   "all 50 requests per day")
        for others, numbers in self.each("""[
                [[], [0, 2]], [["dear-1", "cheap", "dear-2"], [0, 2, 1]]]"""):
            found = self.limits.matching(caller("a"), "10.0.0.1", "cheap", "base", others)
            self.assertEqual([self.limits.rules.index(rule) for rule, _ in found], numbers)

    def test_an_address_is_no_key_whatever_it_spells(self):
        self.start("key:* 1 requests per day")
        address = "10.0.0.1"
        self.assertEqual(self.limits.matching(caller(address, "address"), address, ""), [])

    def test_buckets_are_shared_by_those_whom_their_scope_names(self):
        scopes = ["address", "all", "each", "each,address", "model:a*"]
        self.start(";".join(scope + " 9 requests per day" for scope in scopes))
        for name, address, model in (("a", "1", "ab"), ("b", "1", "ac"), ("a", "2", "b")):
            self.admit(1, name=name, address=address, model=model)
        levels = ["%s %d" % (text.split(" ")[0], level) for text, level in self.levels()]
        self.assertEqual("; ".join(levels), "address 7; address 8; all 6; each 7; each 8; "
                         "each,address 8; each,address 8; each,address 8; model:a* 7")

    def test_a_call_refused_by_one_rule_leaves_every_other_bucket_untouched(self):
        self.start("all 50 requests per day; each 70 requests per day; each 90 tokens per day")
        held = [self.admit(1, 1) for _ in range(50)]
        for _ in range(5):
            self.refused(1, 1)
        self.assertEqual([level for _, level in self.levels()], [0, 20, 40])
        for hold in held:
            hold.give_back()
        self.assertEqual(self.levels(), [])

    def test_the_longest_wait_is_said_with_its_rule(self):
        text = "each 1 requests per minute; all 1 requests per hour; address 1 requests per second"
        self.start(text, message="{wait} {rule} {limit} {unit}")
        self.admit(1)
        self.assert_refused("60 min all 1 requests per hour 1 requests", 3600)

    def test_the_quota_is_that_of_the_tightest_bucket(self):
        self.start("each 100 requests per day; all 2.5 usd per day; each 50 tokens per day")
        hold = self.admit(1, 5, 0, 0, 10 ** 11)
        self.assertEqual(hold.tightest.quota, (50, 45, 50, 86400, 1728))
        hold.settle(costs(1, 5, 0, 0, 2 * 10 ** 12))
        self.assertEqual(hold.tightest.quota, ("2.5", "0.5", "2.5", 86400, 1))
        charges = "each 100 requests per day=1;all 2.5 usd per day=2000000000000;"
        self.assertEqual(hold.describe_charges(), charges + "each 50 tokens per day=5")


    def test_so_many_calls_run_at_once_and_each_gives_its_place_back(self):
        self.start("each 2 running; key:ci-* 3 running; key:root unlimited running")
        for name, places in self.each("""[["ci-1", 3], ["bob", 2]]"""):
            holds = [self.admit(1, name=name) for _ in range(places)]
            refusal = self.refused(1, name=name)
            self.assertEqual(str(refusal), "limit reached: %d running already" % places)
            self.assertEqual((refusal.wait, refusal.fields), (2, {"Retry-After": 2}))
            self.assertEqual(holds[-1].tightest.quota, (places, 0, 0, 0, 0))
            self.clock.now += self.LONG
            self.refused(1, name=name)
            self.assertEqual(self.levels(), [])  # nothing that a restart would find
            holds.pop().settle(costs(1))
            self.assertEqual(self.peek(1, name), ((places, 1, 0, 0, 0), 0))
            with self.admit(1, name=name):
                self.assertEqual(self.peek(1, name)[1], 2)
        for _ in range(20):
            self.admit(1, name="root")

    def test_a_bucket_of_running_calls_is_the_tightest_only_where_it_is_short_or_alone(self):
        self.start("each 2 running; each 9 requests per day; all 100 requests per day")
        holds = [self.admit(1).tightest.rule.capacity for _ in range(2)]
        self.assertEqual((holds, self.refused(1).tightest.rule.capacity), ([9, 9], 2))
        self.assertEqual([level for _, level in self.levels()], [98, 7])

    def test_what_was_guessed_takes_no_more_than_is_left(self):
        for cost, least, left in self.each("""[[4, 1, 2], [8, 1, 0], [80, 6, 0], [4, 7, null]]"""):
            self.start()
            self.admit(4)
            admission = self.limits.admit(
                caller("alice"), "1", "", costs(max(cost, least)), "base", costs(least))
            if left is None:
                self.assertRaises(LimitReached, self.awaited, admission)
                continue
            with self.awaited(admission):
                self.assert_left(left)
            self.assert_left(6)


class KeysRulesTest(LimitsCase):
    """Rules of teams, and of keys themselves."""

    def key(self, name, limits=None, team=None):
        rules = tuple(llm_proxy.rules(limits, "each ")) if limits else ()
        return llm_proxy.Key(name, team=team, limits=limits, subject=name.encode(), rules=rules)

    def caller(self, name, **fields):
        key = self.key(name, **fields)
        return Caller(("key", key.subject), name, stored_key=key)

    def ask(self, one, *amounts):
        return self.awaited(self.limits.admit(one, "1", "m", costs(*amounts)))

    def test_a_team_is_charged_beside_its_members(self):
        self.start("each 5 requests per hour; team:r* 3 requests per hour")
        for name, team, left in self.each("""[
                ["ann", "red", 2], ["ben", "red", 1], ["cem", "blue", 4], ["dan", null, 4]]"""):
            self.assertEqual(self.ask(self.caller(name, team=team), 1).tightest.level, left)
        self.ask(self.caller("ann", team="red"), 1)
        with self.assertRaises(LimitReached) as caught:
            self.ask(self.caller("ben", team="red"), 1)
        self.assertEqual(caught.exception.cause, "team:r* 3 requests per hour")

    def test_each_member_of_a_team_may_have_a_bucket(self):
        self.start("each,team:red 1 requests per hour")
        for name in ("ann", "ben"):
            self.ask(self.caller(name, team="red"), 1)
        self.ask(self.caller("cem"), 9)
        self.assertEqual([level for _, level in self.levels()], [0, 0])

    def test_a_keys_own_rule_replaces_the_general_one_of_its_unit_and_duration(self):
        self.start("each 5 requests per hour; key:ann 7 requests per hour; each 9 tokens per day;"
                   "all 99 requests per hour")
        for limits, expected in self.each("""
                3 requests per hour -> each 3 requests per hour, each 9 tokens per day
                unlimited requests per hour -> each 9 tokens per day
                3 requests per 1h; 1 usd per day -> each 3 requests per 1h, each 1 usd per day, \
each 9 tokens per day
                3 requests per day -> each 3 requests per day, key:ann 7 requests per hour, \
each 9 tokens per day"""):
            found = self.limits.matching(self.caller("ann", limits=limits), "1", "m")
            texts = [rule.text for rule, _ in found]
            self.assertEqual(texts[:-1], expected.split(", "))

    def test_the_one_bucket_of_the_plain_settings_is_a_general_rule_too(self):
        config = read_config({**HERE, "MAX_TOKENS": "5"})
        limits = llm_proxy.build_limits(config, Buckets(Clock()), {})
        one = self.caller("ann", limits="9 requests per 5m")
        texts = [rule.text for rule, _ in limits.matching(one, "1", "m")]
        self.assertEqual(texts, ["each 9 requests per 5m"])

    def change(self, old, new, general="each 10 requests per hour"):
        """What is left of 8 of 10 in ann's buckets when her key's limits are changed; ben has what
        she had before."""
        self.start(general)
        self.limits.take_keys({name: self.key("", old).rules for name in (b"ann", b"ben")}, 0)
        self.ask(self.caller("ann", limits=old), 2)
        self.limits.take_keys({b"ann": self.key("", new).rules, b"ben": self.key("", old).rules}, 0)
        return self.levels()

    def test_the_bucket_of_somebody_behind_a_key_goes_by_the_keys_rules_after_a_restart_too(self):
        self.start("each 10 requests per hour")
        self.limits.take_keys({b"webui": self.key("", "20 requests per hour").rules}, 0)
        saved = {("each 20 requests per hour", ("key", b"somebody")): (5, 0.0)}
        self.limits.restore(saved, 0)
        self.assertEqual(self.levels(), [("each 20 requests per hour", 5)])

    def test_what_was_given_goes_along_when_the_rule_is_changed(self):
        self.start("all 99 requests per hour")
        self.limits.take_keys({b"ann": self.key("", "5 requests per day").rules}, 0)
        self.ask(self.caller("ann", limits="5 requests per day"), 5)
        ann = self.caller("ann", limits="5 requests per day")
        self.limits.give(ann, "requests", 4, self.clock.now + 100)
        self.limits.take_keys({b"ann": self.key("", "10 requests per day").rules}, 0)
        ann = self.caller("ann", limits="10 requests per day")
        self.assertEqual(self.ask(ann, 0).tightest.level, 8)
        self.assertEqual([key[0] for key in self.buckets.given], ["each 10 requests per day"])

    def test_a_changed_rules_bucket_keeps_its_share(self):
        """Where a key has no rule of that unit and duration any more, the general one counts."""
        for old, new, left in self.each("""[
                ["10 requests per hour", "100 requests per hour", 80],
                ["20 requests per hour", "5 requests per day", 9],
                [null, "20 requests per hour", 16], ["20 requests per hour", null, 9],
                ["10 requests per hour", "10 requests per hour; 5 usd per day", 8]]"""):
            self.assertEqual([level for _, level in self.change(old, new)], [left])
        self.assertEqual(self.change("10 requests per day", "5 tokens per day"),
                         [("each 10 requests per hour", 8)])

    def test_what_is_given_is_beyond_the_rule_for_a_time(self):
        self.start("each 5 requests per hour")
        ann = self.caller("ann")
        self.ask(ann, 4)
        self.assertEqual(self.limits.give(ann, "requests", 6, self.clock.now + 100), 1)
        self.assertEqual(self.limits.give(ann, "usd", 6, self.clock.now + 100), 0)
        found = self.ask(ann, 1).tightest
        self.assertEqual((found.level, found.quota.limit, found.quota.remaining), (6, 6, 6))
        self.assertEqual([level for _, level in self.levels()], [6])  # and is saved, though full
        self.clock.now += 100
        self.assertEqual(self.ask(ann, 0).tightest.level, 5)
        self.assertEqual(self.buckets.given, {})

    def test_an_address_is_given_more_by_its_own_rule_and_nobody_by_one_that_others_share(self):
        self.start("address 5 requests per hour; all 9 usd per day")
        here = caller("192.0.2.1", "address")
        for unit, count in self.each("""[["requests", 1], ["usd", 0]]"""):
            self.assertEqual(self.limits.give(here, unit, 6, self.clock.now + 100), count)
        self.assertEqual(self.limits.own_buckets(self.caller("ann"), "requests"), [])

    def test_what_is_given_lifts_a_debt_and_ends_with_its_time(self):
        self.start("each 5 requests per 5h")
        ann = self.caller("ann")
        self.ask(ann, 5).settle(costs(9))
        self.limits.give(ann, "requests", 6, self.clock.now + 10)
        self.assertEqual(self.ask(ann, 1).tightest.level, 1)
        self.clock.now += 3600
        self.assertEqual(self.ask(ann, 1).tightest.level, 1)


class WindowsTest(LimitsCase):
    """Windows of a fixed length, and the calendar's."""
    TEN = "each 10 tokens per 60s window"
    CALENDAR = """
        day -> 2024-02-10T12:00:00 -> 43200 of 86400
        day in Europe/Berlin -> 2024-03-31T12:00:00 -> 36000 of 82800
        day in Europe/Berlin -> 2024-10-27T12:00:00 -> 39600 of 90000
        day in America/Havana -> 2024-11-03T05:30:00 -> 84600 of 90000
        day in Africa/Cairo -> 2024-04-25T22:00:00 -> 82800 of 82800
        day in Asia/Kathmandu -> 2024-05-05T18:14:59 -> 1 of 86400
        week -> 2024-02-25T23:59:59 -> 1 of 604800
        week in Europe/Berlin -> 2024-03-25T00:00:00 -> 597600 of 601200
        month -> 2024-02-01T00:00:00 -> 2505600 of 2505600
        month in America/New_York -> 2024-03-10T12:00:00 -> 1872000 of 2674800
        month -> 2024-12-31T23:59:59 -> 1 of 2678400
        """

    def at(self, text):
        """Sets the clocks to a moment, in UTC."""
        moment = datetime.datetime.fromisoformat(text + "+00:00").timestamp()
        self.clock.now = moment - 1700000000

    def steps(self, rows):
        """Passes seconds, takes an amount, or is refused it; expects what is left, the seconds to
        the end, and the wait."""
        for seconds, amount, expected in self.each(rows):
            self.clock.now += float(seconds)
            try:
                level = self.admit(int(amount)).tightest
                found = "%d left, ends in %d" % (level.quota.remaining, level.quota.reset_seconds)
            except LimitReached as refusal:
                found = "wait %g" % refusal.wait
            self.assertEqual(found, expected)

    def test_a_window_begins_with_its_first_call_and_is_full_again_when_it_is_over(self):
        self.start(self.TEN)
        self.steps("""
            5 -> 4 -> 6 left, ends in 60
            59.5 -> 6 -> 0 left, ends in 1
            0 -> 1 -> wait 0.5
            0.5 -> 9 -> 1 left, ends in 60
            200 -> 0 -> 10 left, ends in 0
            30 -> 1 -> 9 left, ends in 60""")

    def test_with_a_window_its_debts_are_over(self):
        self.start(self.TEN)
        self.admit(10).settle(costs(95))
        self.steps("""
            10 -> 10 -> wait 50
            49 -> 1 -> wait 1
            1 -> 10 -> 0 left, ends in 60""")

    def test_nothing_comes_back_of_what_an_earlier_window_gave(self):
        for cost, left in self.each("""[[0, 4], [8, 4], [13, 1]]"""):
            self.start(self.TEN)
            hold = self.admit(10)
            self.clock.now += 60
            self.admit(6)
            hold.settle(costs(cost))
            self.assert_left(left)

    def test_a_call_gives_back_to_its_own_window(self):
        for text in self.each((self.TEN, "each 10 tokens per calendar month in Asia/Tokyo")):
            self.start(text)
            hold = self.admit(10)
            self.clock.now += 59
            hold.settle(costs(3))
            self.assert_left(7)

    def test_a_calendars_period_ends_when_its_zone_says_so(self):
        for period, moment, expected in self.each(self.CALENDAR):
            self.start("each 3 tokens per calendar " + period)
            self.at(moment)
            quota = self.admit(3).tightest.quota
            self.assertEqual("%d of %d" % (quota.reset_seconds, quota.refill_seconds), expected)
            self.assertEqual(quota[:3], (3, 0, 3))
            self.clock.now += quota.reset_seconds - 0.5
            self.assertAlmostEqual(self.refused(1).wait, 0.5, 5)
            self.clock.now += 0.5
            self.assertEqual(self.admit(1).tightest.level, 2)

    def test_a_clock_that_is_set_begins_no_period_twice_and_one_that_slept_misses_none(self):
        self.start("each 3 tokens per calendar day")
        self.at("2024-02-10T23:59:59")
        self.admit(3)
        wall = self.clock.time_ns()
        for seconds, left in self.each((
                (0.5, 0), (1, 3), (0.9, 0), (2, 0), (86500, 3), (400 * 86400, 3), (90000, 3))):
            self.clock.time_ns = lambda: wall + int(seconds * 1e9)
            self.assert_left(left)
            if left:
                self.admit(3)

    def test_what_is_given_is_given_once_however_many_windows_begin(self):
        self.start(self.TEN)
        self.admit(10)
        self.assertEqual(self.limits.give(caller("alice"), "tokens", 5, self.clock.now + 300), 1)
        self.steps("""
            0 -> 1 -> 4 left, ends in 60
            60 -> 0 -> 10 left, ends in 0
            0 -> 10 -> 0 left, ends in 60""")

    def restarted(self, text, seconds):
        """What is left of 2 of 10 when it was saved, and started again later by another rule."""
        saved = self.buckets.snapshot(self.clock.time_ns() / 1e9)
        clock = self.clock
        self.start(text)
        self.clock.now = clock.now + seconds
        self.limits.restore(saved, self.clock.time_ns() / 1e9)
        return self.left()

    def test_a_window_outlives_a_restart_and_keeps_its_share_where_its_rule_is_changed(self):
        bucket, window = "each 10 tokens per day", "each 10 tokens per 1d window"
        utc, berlin = ["each 10 tokens per calendar day in " + zone
                       for zone in ("UTC", "Europe/Berlin")]
        for old, new, seconds, left in self.each((
                (window, window, 3600, 2), (window, window, 86400, 10),
                (utc, utc, 3600, 2), (utc, utc, 5401, 10),
                (berlin, berlin, 1799, 2), (berlin, berlin, 1801, 10),
                (bucket, window, 0, 2), (window, bucket, 0, 2), (bucket, utc, 5000, 2),
                (utc, berlin, 0, 2), (utc, "each 20 tokens per calendar day", 0, 4),
                (utc, "each 50 tokens per calendar month in Asia/Tokyo", 60, 10))):
            self.start(old)
            self.admit(8)
            self.assertEqual(self.restarted(new, seconds), left)

    def test_windows_count_beside_buckets_of_their_length(self):
        self.start("each 9 requests per day; each 8 requests per 24h window;"
                   "each 7 requests per calendar day;"
                   "each 6 requests per calendar day in Asia/Tokyo;"
                   "key:a 5 requests per calendar day in Asia/Tokyo")
        for name, numbers in self.each("""[["a", [0, 1, 4]], ["b", [0, 1, 2]]]"""):
            found = self.limits.matching(caller(name), "1", "")
            self.assertEqual([self.limits.rules.index(rule) for rule, _ in found], numbers)


class LimitsOverHttpTest(ProxyCase):

    def test_a_call_runs_until_it_has_ended_however_it_ends(self):
        self.start(None, LIMITS="each 1 running", LIMIT_REPLY="error")
        ends = {
            "answered": lambda client, asked: asked.chunks(event(1), end=True),
            "cut": lambda client, asked: asked.close(),
            "hung up": lambda client, asked: client.reset(),
        }
        for number, (name, end) in enumerate(self.each(ends.items())):
            client, asked = self.begin(event(1))
            answered = self.ask()
            self.assertEqual((answered.status, answered.get("retry-after")), (429, "2"), name)
            self.assertIn("1 running already", answered.error()["message"])
            end(client, asked)
            self.entry(2 * number + 1)
            self.assert_left(1)

    def test_a_limit_reply_tells_the_end_of_the_window(self):
        clock = Clock(0)  # Tuesday, 14 November 2023, 22:13:20 UTC
        for rule, wait, fields in self.each("""
                each 2 requests per 90s window -> 2 min -> 2 0 2 90 90
                each 2 requests per calendar day in Asia/Tokyo -> 17 hours -> 2 0 2 86400 60400"""):
            self.start(clock=clock, LIMITS=rule)
            for _ in range(3):
                answered = self.ask("k")
            self.assertIn(b"limit reached, wait %s" % wait.encode(), answered.body)
            self.assertEqual(" ".join(value for name, value in answered.fields
                                      if name.startswith("x-ratelimit-")), fields)

    def test_a_rule_for_a_name_with_a_colon_holds_for_all_of_it(self):
        self.start(LIMITS="model:llama3:8b 1 requests per hour", LIMIT_REPLY="error")
        models = ("llama3:8b", "llama3", "llama3", "llama3:8b")
        statuses = [self.ask(call(model=model)).status for model in models]
        self.assertEqual(statuses, [200, 200, 200, 429])

    def test_two_hundred_callers_at_a_bucket_of_fifty_make_fifty_calls(self):
        self.start(MAX_TOKENS=50)
        gate = threading.Barrier(200)

        def run(_):
            gate.wait(PATIENCE)
            return self.ask("k").body
        with concurrent.futures.ThreadPoolExecutor(200) as pool:
            bodies = list(pool.map(run, range(200)))
        limited = [body for body in bodies if b"limit reached" in body]
        self.assertEqual((len(limited), self.stub.calls), (150, 50))

    def test_a_refill_lets_the_next_calls_in(self):
        clock = Clock()
        self.start(clock=clock, MAX_TOKENS=2, REFILL_TOKENS=1, REFILL_INTERVAL_SECONDS=60)
        calls = []
        for seconds in (0, 0, 0, 59, 1, 0, 600, 0, 0):
            clock.now += seconds
            self.ask()
            calls.append(self.stub.calls)
        self.assertEqual(calls, [1, 2, 2, 2, 3, 3, 4, 5, 5])


# --------------------------------------------------------------------------------------------------
# Usage
# --------------------------------------------------------------------------------------------------

class UsageTest(ProxyCase):
    LENGTHS = """
        {} -> 0
        {"model": "long-name"} -> 0
        {"a": "abc"} -> 3
        {"a": "abc", "b": "de"} -> 6
        {"a": ""} -> 0
        {"a": ["", ""]} -> 1
        {"a": 1, "b": null, "c": true, "d": 1.5} -> 0
        {"model": "x", "a": {"model": "abc"}} -> 3
        {"messages": [{"role": "user", "content": "hello"}]} -> 10
        {"a": ["x", ["y", {"text": "w"}]]} -> 5
        {"tools": [{"parameters": {"properties": {"city": {"type": "string"}}}}]} -> 11
        {"input": [[1, 2.5], [3]], "seed": 4} -> 11
        {"a": "äöü€"} -> 4
        """

    def test_the_length_of_a_payload_is_that_of_its_words_joined_by_spaces_but_the_model(self):
        """Keys that only a tool knows are words too, and a number in a list is a token."""
        for payload, length in self.each(self.LENGTHS):
            found = llm_proxy.text_length(json.loads(payload))
            self.assertEqual(found[:2], (int(length), []))

    def test_plain_messages_are_as_long_as_any_way_to_count_them_says(self):
        """What is not plain is left to the other way."""
        plain = [{"role": "user", "content": "hello"}, {"content": CHINESE, "role": "system"}]
        rows = [
            (plain, True), ([], True), (plain + [{"role": "user", "content": []}], False),
            ([{"role": "user", "text": "a"}], False), ([{"role": 1, "content": "a"}], False),
            ([{"role": "user", "content": "a", "x": 1}, {"role": "user"}], False),
            (None, False), ("text", False), (["role"], False)]
        for messages, is_plain in self.each(rows):
            found = llm_proxy.chat_length(messages)
            self.assertEqual(found is not None, is_plain)
            if is_plain:
                self.assertEqual(found, llm_proxy.text_length({"messages": messages}))

    def test_prose_and_code_and_other_scripts_are_kinds_of_text(self):
        """And so is code by how it is indented; a text is judged by its beginning and middle."""
        rows = [("Well, it's 5 o'clock.", 0), ("", 0), ("na\u00efve", 0), ("a = b[key]", 1),
                (CODE * 9, 1), ("  x = y(z)\n" * 9, 2),
                ("        return found_value + other\n" * 9, 3), ("\t" * 9, 1),
                ("\u4e2d\u6587 etc.", 4), ("\ud800", 4), (ENGLISH * 9 + CHINESE * 99, 4)]
        for text, kind in self.each(rows):
            self.assertEqual(llm_proxy.kind_of_text(text).number, kind)

    def test_words_runs_of_signs_and_lines_of_code_weigh_as_much_as_tokens_of_prose(self):
        """What has fewer weighs less, within bounds."""
        rows = [(ENGLISH, 1), ("if x == 10: return y\n", 20 / 8 / 4), ("x+" * 99, 0.25),
                ("=" * 999, 1.2), (CHINESE, 1)]
        for text, scale in self.each(rows):
            self.assertAlmostEqual(llm_proxy.kind_of_text(text * 3).scale, scale, places=1)

    def test_a_fair_number_of_tokens_is_seen_in_texts_of_any_script(self):
        for text, times, tokens in self.each("""
                four -> 600 -> 600
                na\u00efve caf\u00e9 -> 4 -> 10
                \u043f\u0440\u0438\u0432\u0435\u0442\u0438\u043a -> 100 -> 200
                \u4e2d\u6587 -> 300 -> 400
                \u304b\u30ab -> 300 -> 400
                \ud55c\uae00 -> 300 -> 400
                \U0001f642 -> 60 -> 40
                \u201chm\u201d -> 8 -> 8"""):
            weight = text_weight(text * int(times))
            self.assertEqual(weight / llm_proxy.CHARACTERS_PER_TOKEN, int(tokens))
        self.assertEqual(text_weight("\ud800"), 2)  # half of a pair

    def assert_estimates(self, text, **words):
        """Rows of `text`: a path, else CHAT, a body and its cost. `words` stand for longer ones."""
        for word, value in words.items():
            text = text.replace(word, json.dumps(value))
        text = text.replace("GEMINI", "/v1beta/models/gemini-2.5-pro:generateContent")
        self.start(MAX_TOKENS=100000, TOKEN_COST_MODE="estimate", IMAGE_TOKENS=500)
        for number, (*path, body, cost) in enumerate(self.each(text)):
            data = request("POST", *path or [CHAT], body.encode(), key=str(number))
            self.assert_status(200, data)
            self.assertEqual(100000 - self.left(str(number)), int(cost))

    def test_an_estimate_is_the_prompt_and_the_output_it_may_have(self):
        self.assert_estimates("""
            {"messages": HELLO} -> 259
            {"messages": HELLO, "max_tokens": 7} -> 10
            {"messages": HELLO, "max_tokens": 7, "max_completion_tokens": 5} -> 10
            {"messages": HELLO, "max_tokens": 0} -> 3
            {"messages": HELLO, "max_tokens": 7, "max_completion_tokens": 0} -> 10
            {"messages": HELLO, "max_completion_tokens": 1, "max_tokens": 50000} -> 50003
            {"messages": HELLO, "max_tokens": 1, "n_predict": 500} -> 503
            {"messages": HELLO, "max_tokens": 1, "max_new_tokens": 500} -> 503
            {"messages": HELLO, "max_tokens": 1, "min_new_tokens": 500} -> 503
            {"messages": HELLO, "max_tokens": 1, "max_tokens_to_generate": 500} -> 503
            {"messages": HELLO, "max_tokens": 1, "maxOutputTokens": 500} -> 503
            {"messages": HELLO, "max_tokens": 1, "options": {"num_predict": 500}} -> 503
            {"messages": HELLO, "max_tokens": 7, "n": 128} -> 899
            {"messages": HELLO, "max_tokens": 7, "n": 2, "best_of": 5} -> 38
            {"messages": HELLO, "n": 2} -> 515
            /v1/completions -> {"prompt": PROMPTS, "max_tokens": 7} -> 660
            /v1/completions -> {"prompt": PROMPTS, "max_tokens": 7, "n": 2} -> 1220
            /v1/images/generations -> {"prompt": "four", "n": 3} -> 769
            /v1/images/generations -> {"prompt": "four", "n": "x", "options": []} -> 258
            GEMINI -> {"contents": "four", "generationConfig": {"candidateCount": 3}} -> 769
            GEMINI -> {"contents": "four", "generationConfig": THINKING} -> 916
            {"messages": HELLO, "max_tokens": 7, "reasoning": {"max_tokens": 500}} -> 510
            {"messages": HELLO, "max_tokens": 7, "reasoning": {"max_tokens": -1}} -> 10
            {"messages": HELLO, "max_tokens": 7, "thinking_budget": 500} -> 510
            {"messages": HELLO, "thinking_budget": 500} -> 259
            /v1/messages -> {"messages": HELLO, "max_tokens": 7, "thinking": BUDGET} -> 10
            /v1/chat/completions/batch -> {"messages": [HELLO, HELLO], "max_tokens": 7} -> 20
            /api/chat -> {"messages": HELLO, "options": {"num_predict": 100}} -> 103
            /api/generate -> {"prompt": "user hello", "options": {"num_predict": -1}} -> 259
            /v1/interactions -> {"input": "four", "generation_config": {"maxOutputTokens": 9}} -> 10
            {"messages": HELLO, "max_tokens": 100.0} -> 103
            {"messages": HELLO, "max_tokens": -1} -> 259
            {"messages": HELLO, "max_tokens": 7, "options": {"num_predict": -2}} -> 259
            {"messages": HELLO, "max_tokens": null} -> 259
            {"messages": HELLO, "max_tokens": 7, "max_completion_tokens": null} -> 10
            {"messages": "xxxxxxxx", "max_tokens": 1} -> 3
            {"messages": "xxxxxxxxx", "max_tokens": 1} -> 4
            {"messages": [], "max_tokens": 0} -> 1
            """, HELLO=[{"role": "user", "content": "hello"}],  # 'user hello' is 3 tokens
            THINKING={"maxOutputTokens": 7, "thinking_config": {"thinkingBudget": 900}},
            BUDGET={"budget_tokens": 6},
            PROMPTS=["four"] * 80)  # a hundred tokens, with the spaces between

    def test_images_and_the_like_count_a_fixed_number_and_never_their_length(self):
        """'user text 12345' is 4 tokens."""
        parts = """
            {"type": "image_url", "image_url": {"url": DATA}}
            {"type": "input_image", "image_url": DATA}
            {"type": "image", "source": {"type": "base64", "data": DATA}}
            {"inlineData": {"mimeType": "image/png", "data": DATA}}
            {"inline_data": {"data": DATA}}
            {"type": "input_audio", "input_audio": {"data": DATA}}
            {"type": "document", "source": {"data": DATA}}
            {"type": "input_file", "filename": "a.pdf", "file_data": DATA}
            {"type": "document_url", "document_url": DATA}
            {"type": "audio", "data": DATA}
            {"type": "video", "video": [DATA, DATA]}
            {"image": {"source": {"bytes": DATA}}}"""
        row = '{"max_tokens": 1, "messages": [{"role": "user", "content": [TEXT, %s]}]} -> 505'
        rows = [row % part for part in parts.strip().splitlines()]
        rows += ['/api/generate -> {"options": {"num_predict": 1}, "prompt": "text 12345",'
                 ' "images": [DATA, DATA]} -> 1004',
                 '/api/chat -> {"options": {"num_predict": 1}, "messages": [{"role": "user",'
                 ' "content": "text 12345", "images": [DATA, DATA]}]} -> 1005']
        self.assert_estimates("\n".join(rows), TEXT={"type": "text", "text": "12345"},
                              DATA="data:image/png;base64," + "x" * 100000)

    def test_text_in_what_looks_like_an_image_counts_where_it_is_more(self):
        """TEXT is 2,000 tokens, and 'user' another."""
        parts = """
            {"type": "text", "text": TEXT, "file_data": ""} -> 2003
            {"type": "document", "source": {"type": "text", "data": TEXT}} -> 2005
            {"type": "document", "source": {"data": TEXT}} -> 2004
            {"type": "image", "source": {"data": "AAAA"}, "title": TEXT} -> 2003
            {"type": "image_url", "image_url": {"url": TEXT}} -> 2004
            {"type": "file", "file_data": "AAAA", TEXT: 1} -> 2003
            {"inlineData": {"mimeType": "text/plain", "data": DATA}} -> 2004
            {"inlineData": {"mimeType": "application/json", "data": DATA}} -> 2006
            {"type": "input_file", "file_data": CSV} -> 25009
            {"type": "tool_use", "input": {TEXT: "file_data", "file_data": ""}} -> 2007"""
        row = '{"max_tokens": 0, "messages": [{"role": "user", "content": [%s]}]} -> %s'
        rows = [row % tuple(line.split(" -> ")) for line in parts.strip().splitlines()]
        self.assert_estimates("\n".join(rows), TEXT="words   " * 1000, DATA="A" * 8000,
                              CSV="data:text/csv;base64," + "A" * 100000)

    def test_an_estimate_cannot_be_talked_down(self):
        self.assert_estimates("""
            /v1/completions -> {"prompt": X40, "max_tokens": 500, "max_completion_tokens": 0} -> 510
            /v1/responses -> {"input": X40, "max_output_tokens": 4000, "max_tokens": 0} -> 4010
            /v1/completions -> {"prompt": RANGE, "max_tokens": 1} -> 2001
            /v1/completions -> {"prompt": LISTS, "max_tokens": 1} -> 40
            {"messages": [MESSAGE], "max_tokens": 1} -> 10001
            """, X40="x" * 40, RANGE=list(range(2000)), LISTS=[[1, 2, 3]] * 10,
            MESSAGE={"role": "user", "type": "file", "content": "x" * 39990})

    def test_a_fixed_price_is_the_same_for_every_call(self):
        self.start(REQUEST_TOKEN_COST=7)
        self.ask(call(messages="x" * 1000, max_tokens=5))
        self.assert_left(993)

    def test_a_maximum_that_is_no_whole_number_is_refused(self):
        self.start(TOKEN_COST_MODE="estimate")
        names = ("max_tokens", "max_completion_tokens", "n_predict", "n")
        values = json.loads('[true, false, "5", 1.5, [], {}, ""]')
        for name, value in self.each(names, values):
            answered = self.assert_status(400, call(**{name: value}))
            answered.tells("type", "invalid_request_error")
            self.assertIn(name, answered.error()["message"])
        self.assert_spent(0, 1000)

    def test_a_maximum_beyond_every_bucket_is_said_to_be_one(self):
        self.start(TOKEN_COST_MODE="estimate")
        answered = self.ask(call(max_tokens=10 ** 30))
        said = answered.json()["choices"][0]["message"]["content"]
        self.assertIn("the limit is 1000", said)
        self.assertNotIn("wait", said)
        self.assertIsNone(answered.get("retry-after"))
        self.assert_spent(0, 1000)


ENGLISH = """Many people share one machine and all of them want a turn. The proxy counts what each
has used, lets the next one in, and says how long the others have to wait. """
CODE = """def take(self, key, amount):\n    level = self.levels.get(key, self.capacity)
    if level < amount:\n        raise LimitReached("wait %d s" % self.wait(level, amount))\n"""
CHINESE = ("\u8bb8\u591a\u4eba\u5171\u7528\u4e00\u53f0\u673a\u5668\uff0c"
           "\u5927\u5bb6\u90fd\u60f3\u8f6e\u5230\u81ea\u5df1\u3002"
           "\u4ee3\u7406\u8bb0\u4e0b\u6bcf\u4e2a\u4eba\u7528\u4e86\u591a\u5c11\uff0c")
WORDS = re.compile(r" ?[a-z]{1,6}|[0-9]{1,3}|\s+|[^\sa-z0-9]")


def tokens_of(text):
    """How many tokens a simulated tokenizer makes of a text."""
    return len(WORDS.findall(text.lower()))


class LearningTest(ProxyCase):
    """A model whose tokenizer is simulated, with 9 tokens around each prompt. `said` is what it
    says, of which `hidden` more is not seen; whether it `tells` is for each test to say."""

    def start(self, said="", hidden=0, detail="reasoning_tokens", **settings):
        self.said, self.hidden, self.detail, self.tells = said, hidden, detail, True
        super().start(self.answer, **{
            "TOKEN_COST_MODE": "usage", "MAX_TOKENS": 10 ** 9, **settings})
        self.client = self.connect()

    def answer(self, asked):
        prompt = asked.json()["messages"][0]["content"]
        seen = tokens_of(self.said)
        usage = {"prompt_tokens": 9 + tokens_of(prompt), "completion_tokens": seen + self.hidden,
                 "completion_tokens_details": {self.detail: self.hidden}}
        asked.answer({"choices": [{"message": {"content": self.said}}],
                                 **({"usage": usage} if self.tells else {})})

    def used(self, prompt, key="alice", **payload):
        """The tokens of input and of output that a call is said to have used."""
        answered = self.client.exchange(
            call(key, messages=[{"role": "user", "content": prompt}], **payload))
        self.assertEqual(answered.status, 200)
        return [int(answered.get("x-llm-%s-tokens" % kind)) for kind in ("input", "output")]

    def held(self, prompt="hello", key="alice", **payload):
        """What would be held now: the costs of the call."""
        payload = {"messages": [{"role": "user", "content": prompt}], **payload}
        costs = []
        estimate = self.proxy.estimator.estimate

        def note(*arguments):
            costs.append(estimate(*arguments)[0])
            return estimate(*arguments)
        with patch.object(self.proxy.estimator, "estimate", note):
            self.ask(call(key, **payload))
        return costs[0]

    def errors_after_fifty(self, pairs, choose):
        """Returns lists of how far estimates of prompts, and of answers, are from what is right
        after 50 calls that told it: one of each for each pair of texts, which take turns."""
        errors = {pair: ([], []) for pair in pairs}
        for number, pair in zip(range(80), itertools.cycle(pairs)):
            self.tells = number < 50
            start = choose.randrange(100)
            prompt, self.said = [
                (text * 30)[start:start + choose.randrange(200, 3000)] for text in pair]
            found = self.used(prompt)
            exact = 9 + tokens_of(prompt), tokens_of(self.said)
            if not self.tells:
                for side, one, other in zip(errors[pair], found, exact):
                    side.append(abs(one / other - 1))
        return itertools.chain(*errors.values())

    def test_estimates_are_within_a_tenth_after_fifty_calls_in_any_language(self):
        """Also of one who mixes them, and where the answer is another kind of text."""
        every, choose = (ENGLISH, CODE, CHINESE), Random(13)
        alike = [(text, text) for text in every]
        for pairs in self.each((
                alike[:1], alike[1:2], alike[2:], alike[:2], alike,
                [(ENGLISH, text) for text in every], [(text, ENGLISH) for text in every])):
            self.start()
            for side in self.errors_after_fifty(pairs, choose):
                self.assertLess(statistics.median(side), 0.1)

    def test_what_is_held_for_a_prompt_is_learned_for_each_kind_of_text(self):
        for text in self.each((ENGLISH, CODE, CHINESE)):
            self.start()
            for _ in range(5):
                self.used(text * 9)
            exact = 9 + tokens_of(text * 9)
            self.assertAlmostEqual(self.held(text * 9)[2], exact, delta=exact / 50)

    def test_an_answer_that_does_not_tell_what_it_hid_is_charged_the_usual_share(self):
        """Also where only the sum was told."""
        for name in self.each(("reasoning_tokens", "other")):
            self.start("seen" + " seen" * 49, hidden=4950, detail=name)
            self.assertEqual(self.used("hi")[1], 5000)
            self.tells = False
            self.assertAlmostEqual(self.used("hi")[1], 5000, delta=200)
            self.said = "seen" + " seen" * 99
            self.assertAlmostEqual(self.used("hi")[1], 10000, delta=200)

    def test_a_share_that_others_showed_makes_no_more_of_a_long_answer_than_such_calls_use(self):
        """Nor more than the call allows."""
        self.start("seen", hidden=7999)
        self.used("hi", "alice")
        self.said = "seen " * 400
        self.tells = False
        self.assertEqual(self.used("hi", "bob")[1], 16000)
        self.assertEqual(self.used("hi", "bob", max_tokens=900)[1], 900)

    def test_reasoning_that_passes_is_not_taken_for_hidden(self):

        def answer(asked):
            usage = {"prompt_tokens": 9, "completion_tokens": 1000,
                     "completion_tokens_details": {"reasoning_tokens": 900}}
            message = {"reasoning_content": "why " * 900, "content": "seen" + " seen" * 99}
            asked.answer({"choices": [{"message": message}], **(
                {"usage": usage} if self.tells else {})})
        self.stub.answer = answer
        for tells in (True, False):
            self.tells = tells
            self.assertEqual(self.used("hi")[1], 1000)

    def test_nobody_teaches_what_others_pay(self):
        """Mallory's text is 16 characters a token, and then 1."""
        for said in self.each((" " * 6400, "+" * 400)):
            self.start("seen " * 400)
            self.tells = False
            before = self.used("hi", "alice")[1]
            self.tells = True
            for _ in range(5):
                self.used("hi", "alice")
            self.said = said
            for _ in range(100):
                self.used(said, "mallory")
            self.said = "seen " * 400
            self.tells = False
            self.assertAlmostEqual(self.used("hi", "alice")[1] / 400, 1, 1)
            stranger = self.used("hi", "stranger")[1]
            self.assertTrue(before * 4 / 6 <= stranger <= before * 4 / 2, stranger)

    def test_what_a_model_was_seen_to_say_is_held_where_no_maximum_is_named(self):
        self.start("seen" + " seen" * 4999)
        self.assertEqual(self.held()[3], 256)
        for key in ("alice", "bob"):
            self.assertEqual(self.held(key=key)[3], 5000)
        self.assertEqual(self.held(n=2)[3], 10000)
        self.assertEqual(self.held(max_tokens=7)[3], 7)
        self.said = "seen"
        held = [self.held()[3] for _ in range(22)]
        self.assertEqual((held[:10], held[-1]), ([5000] * 10, 256))

    def test_a_new_name_or_another_spelling_hides_nothing_of_what_is_known(self):
        self.start("seen" + " seen" * 4999)
        self.held(model="learned-1.5")
        for model in self.each(("new", "LEARNED-1-5", "x/learned-1.5:free", "")):
            self.assertEqual(self.held(model=model, max_tokens=None)[3], 5000)

    def test_calls_with_a_maximum_teach_nobody_that_little_is_said(self):
        self.start("seen" + " seen" * 4999)
        self.held(key="bob")
        self.said = "seen"
        for _ in range(30):
            self.held(key="alice", max_tokens=1)
        self.assertEqual(self.held(key="alice")[3], 5000)

    def test_who_hangs_up_before_the_end_pays_what_such_calls_use(self):
        """What comes is 2 tokens of 5,000; 5 are the prompt's."""
        self.start("seen", hidden=4999, MAX_TOKENS=50000)
        self.assertEqual(self.used("hi")[1], 5000)
        left = self.left("alice")
        for number, stream in enumerate(self.each((True, False))):
            self.stub.answer = None
            client, asked = self.ask_stub(call("alice", stream=stream))
            asked.send(STREAM + chunk(event(1)) if stream else answer(b"x" * 80)[:-1])
            if stream:
                client.head()
                client.expect(event(1))
            asked.wait_for_hang_up(client)
            entry = self.entry(number + 1)
            self.assertEqual((entry["outcome"], entry["output"]), ("caller_gone", 5000))
            left -= 5000 + entry["input"]
            self.assert_left(left, "alice")

    def test_sixty_calls_at_once_use_no_more_than_twice_the_bucket_once_ten_have_answered(self):
        self.start("seen " * 5071, LIMITS="all 10000 tokens per day", LIMIT_REPLY="error")
        gate = Event()
        used = []

        def answer(asked):
            gate.wait(PATIENCE)
            used.append(5080)
            self.answer(asked)
        clock = Clock()
        self.proxy.limits.buckets.clock = clock
        for _ in range(10):
            clock.now += 10 ** 6
            self.ask("teacher")
        clock.now += 10 ** 6
        self.stub.answer = answer
        with threads(partial(self.ask, call("k%d" % number)) for number in range(60)):
            wait_for(lambda: len(self.lines.entries()) >= 10 + 58, "all others")
            gate.set()
        self.assertEqual(sum(used), 10160)

    def test_what_is_known_of_models_and_callers_is_bounded(self):
        config = read_config({**HERE, "IMAGE_TOKENS": "500"})
        estimator = llm_proxy.CostEstimator(config, Prices(None), {"tokens"})
        source = mock.Mock(most_characters=lambda: 400, output_characters=lambda: 400,
                           kind=llm_proxy.TextKind(),
                           reported_usage=lambda whole: (Usage(100, 100), True))
        asked = llm_proxy.Call(OpenAI(), "chat", CHAT, "")
        for number in range(2000):
            asked.upstream_model = "m%d" % number if number < 1500 else "m"
            estimator.usage(asked, ("key", b"%d" % number), source, True, 0)
        self.assertEqual(len(estimator.models), llm_proxy.KNOWN_MODELS)
        self.assertEqual(len(estimator.models["m"].callers), llm_proxy.ModelHabits.CALLERS)


class PricesTest(TableCase):
    USED = Usage(input=1000, output=10, cached=300, cache_write=200, reasoning=5)

    def test_a_cost_is_exact_and_cached_tokens_have_their_own_price(self):
        prices = Prices({
            "m": llm_proxy.Price(3000000, 15000000, 1000000, 4000000, 9000000)})
        picodollars = (500 * 3 + 10 * 15 + 300 * 1 + 200 * 4) * 10 ** 6
        self.assertEqual(prices.cost(self.USED, "m"), (picodollars, True))
        used = self.USED._replace(hour_write=150)
        self.assertEqual(prices.cost(used, "m"), (picodollars + 150 * 5 * 10 ** 6, True))

    def test_a_thousandth_of_a_cent_is_not_lost(self):
        cost, _ = Prices(None).cost(Usage(1, 1), "gpt-4o-mini")
        self.assertEqual((cost, llm_proxy.format_usd(cost * 3)), (750000, "0.00000225"))

    def test_all_spellings_of_a_model_have_its_price_and_others_are_unpriced(self):
        prices = Prices(None)
        for name, same in self.each("""
                gpt-4o-2024-08-06 -> gpt-4o
                openai/gpt-4o -> gpt-4o
                GPT-4o -> gpt-4o
                claude-sonnet-4-5-20250929 -> claude-sonnet-4-5
                claude-sonnet-4.5 -> claude-sonnet-4-5
                us.anthropic.claude-sonnet-4-5-20250929-v1:0 -> claude-sonnet-4-5
                anthropic.claude-opus-4-6-v1 -> claude-opus-4-6
                claude-sonnet-4@20250514 -> claude-sonnet-4
                anthropic/claude-sonnet-4:thinking -> claude-sonnet-4
                anthropic/claude-sonnet-4:beta -> claude-sonnet-4
                anthropic.claude-3-haiku-20240307-v1:0:48k -> claude-3-haiku
                claude-sonnet-4-5[1m] -> claude-sonnet-4-5
                openai/gpt-4o:cheapest -> gpt-4o
                models/gemini-2.5-pro -> gemini-2.5-pro
                publishers/google/models/gemini-2.0-flash-001 -> gemini-2.0-flash
                ft:gpt-3.5-turbo:org::id -> gpt-3.5-turbo
                ft:gpt-4o-mini-2024-07-18:org::id -> ft:gpt-4o-mini
                claude-3-5-haiku-latest -> claude-3-5-haiku"""):
            self.assertIsNotNone(prices.find(name))
            self.assertEqual(prices.find(name), prices.find(same))
        for name in self.each(["", "gemma4", "gpt-4o-audio-preview", "gpt-4o:70b", "x" * 300]):
            self.assertEqual(prices.cost(self.USED, name), (0, False))
        for name in self.each(["openai/gpt-4o:free", "gemma4:free"]):
            self.assertEqual(prices.cost(self.USED, name), (0, True))

    def test_the_usual_prices_are_what_a_million_tokens_cost(self):
        rows = """
            gpt-6.2-astra -> 100000 -> 8 0.4 10 16 40
            gpt-6.2-astra -> 272001 -> 16 0.8 20 32 60
            gpt-6.1-terra -> 272001 -> 2 0.1 2.5 4 7.5
            gpt-5.5 -> 272000 -> 5 0.5 5 10 30
            claude-opus-5.5 -> 900000 -> 4 0.2 5 8 20
            claude-haiku-5-5 -> 100001 -> 0.5 0.05 0.625 1 2.5
            gemini-2.5-pro -> 200001 -> 2.5 0.25 2.5 5 15
            grok-4.7 -> 200000 -> 4 1 4 8 12"""
        for model, prompt, usd in self.each(rows):
            prompt = int(prompt)
            costs = [Prices().cost(Usage(prompt, *counts), model)[0]
                     for counts in ((0,), (0, prompt), (0, 0, prompt),
                                    (0, 0, prompt, 0, False, prompt), (prompt,))]
            costs[-1] -= costs[0]
            found = [llm_proxy.format_usd(cost * 10 ** 6 // prompt) for cost in costs]
            self.assertEqual(" ".join(found), usd)

    def test_the_operators_prices_go_before_the_usual_ones_and_may_be_globs(self):
        rows = {"gpt-*": 1, "gpt-4o": 2, "openai/gpt-4o": 3, "claude-*-4.5": 4, "kimi-k9:free": 5,
                "a/kimi-k8": 6, "kimi-k8": 7, "my-meta.x": 9, "GPT-4o-2024-05-13": 8, "sonnet*": 0}
        prices = Prices({
            name: read_price({"input": usd}) for name, usd in rows.items()})
        for name, usd in self.each("""
                gpt-4o -> 2
                GPT-4O-2024-11-20 -> 2
                gpt-4o-2024-05-13 -> 8
                openai/gpt-4o -> 3
                azure/gpt-4o -> 2
                gpt-4o-mini -> 1
                anthropic/claude-sonnet-4-5-20250929 -> 4
                x/kimi-k9:free -> 5
                x/kimi-k8 -> 7
                a/kimi-k8 -> 6
                b/kimi-k8:free -> 7
                sonnet-x -> 0"""):
            self.assertEqual(prices.find(name).input, int(usd) * 10 ** 6)
        for name in self.each(["kimi-k9", "my-x", "x"]):
            self.assertIsNone(prices.find(name))

    def test_the_model_that_served_is_paid_where_it_has_a_price_else_the_one_asked_for(self):
        prices = Prices({"a": read_price({"input": 1}),
                                   "b": read_price({"input": 2})})
        for asked, served, found in self.each("""[
                ["a", null, [1, true]], ["a", "b-2026-01-01", [2, true]], ["a", "x", [1, true]],
                ["x", "b", [2, true]], ["x", "y", [0, false]], ["x", "", [0, false]]]"""):
            cost, known = prices.cost(Usage(1, model=served), asked)
            self.assertEqual([cost / 10 ** 6, known], found)

    TIERS = """
        gpt-5.4 -> default -> 2.5
        gpt-5.4 -> flex -> 1.25
        gpt-5.4 -> BATCH -> 1.25
        gpt-5.4 -> priority -> 5
        gpt-5.5 -> fast -> 12.5
        gpt-6.2-sol -> ultrafast -> 6
        gemini-3.5-flash -> PRIORITY -> 2.7
        gemini-3.5-flash -> priority ON_DEMAND_PRIORITY -> 2.7
        gemini-3.5-flash -> ON_DEMAND_FLEX -> 0.75
        claude-opus-5 -> standard standard global -> 5
        claude-opus-5 -> priority standard not_available -> 5
        claude-opus-5 -> batch us -> 2.75
        claude-opus-5 -> fast us -> 11
        claude-opus-4-6 -> fast -> 30
        own -> fast -> 9
        own -> batch fast -> 4.5
        own -> flex -> 3
        """

    def test_how_it_was_served_is_paid(self):
        prices = Prices({"own": read_price({
            "input": 1, "tiers": {"flex": 3, "fast": {"input": 9}}})})
        for model, tiers, usd in self.each(self.TIERS):
            cost, _ = prices.cost(Usage(1, tiers=tuple(tiers.split())), model)
            self.assertEqual(llm_proxy.format_usd(cost * 10 ** 6), usd)

    def test_own_prices_keep_the_usual_tiers_and_a_tier_of_a_long_prompt_is_that_times_its_price(
            self):
        prices = Prices({"claude-opus-4.6": read_price({"input": 1})})
        for model, tokens, usd in self.each("""[
                ["claude-opus-4-6", 1, 6], ["gpt-5.4", 272001, 10]]"""):
            cost, _ = prices.cost(Usage(tokens, tiers=("fast",)), model)
            self.assertEqual(cost, tokens * usd * 10 ** 6)

    def test_what_others_did_is_added_and_what_the_upstream_tells_is_the_bill(self):
        prices = Prices({"a": read_price({"input": 1}),
                                   "b": read_price({"input": 5})})
        one = Usage(2, model="b")
        for others, told, found in self.each((
                ((one, one), None, (30, True)), ((one._replace(model=None),), None, (12, True)),
                ((one,), 7 * 10 ** 6, (7, True)), ((), 0, (0, True)))):
            used = Usage(10, model="a", others=others, picodollars=told)
            cost, known = prices.cost(used, "a")
            self.assertEqual((cost / 10 ** 6, known), found)
        cost = prices.cost(Usage(model="x", picodollars=1 << 80), "x")
        self.assertEqual(cost, (llm_proxy.MAX_COST, True))
        cost = prices.cost(Usage(1 << 39, 1 << 39, model="b"), "b")
        self.assertEqual(cost, (llm_proxy.MAX_COST, True))

    def test_a_search_of_the_web_costs_what_the_maker_asks_but_at_a_server_that_costs_nothing(self):
        for model, usd in self.each("""[
                ["gpt-4o", 0.0300025], ["gpt-4o:free", 0], ["gemini-3-flash-preview", 0.0420005],
                ["models/gemini-2.5-flash-001", 0.0350003]]"""):
            cost, _ = Prices(None).cost(Usage(1, searches=3), model)
            self.assertEqual(cost / llm_proxy.PICODOLLARS, usd)

    def test_invented_models_do_not_fill_the_memory(self):
        prices = Prices(None)
        for number in range(5000):
            prices.find("model-%d" % number)
            prices.cost(Usage(model="served-%d" % number), "m")
        for find in (prices.find, prices.find_served):
            self.assertLessEqual(find.cache_info().currsize, llm_proxy.KNOWN_MODELS)


# --------------------------------------------------------------------------------------------------
# Dialects
# --------------------------------------------------------------------------------------------------

def rows(text):
    """A table that is written as text: its lines."""
    return [row.strip() for row in text.strip().splitlines()]


class JsonTest(ProxyCase):
    REFUSED = [
        b"", b"  ", b"[]", b'"x"', b"1", b"null", b"{", b"\xff",
        b'{"a": NaN}', b'{"a": Infinity}', b'{"a": -Infinity}', b'{"a": 1e999}',
        b'{"a": 1, "a": 2}', b'{"x": [{"a": 1, "\\u0061": 2}]}',  # the same key twice
        '{"a": 1}'.encode("utf-16"), '{"a": 1}'.encode("utf-16-le"), b'{"a": "\xe4"}',
        b'\xef\xbb\xbf{"a": 1}',  # a byte order mark
        b'{} {}', b'{"a": 1,}', b'{"a": "\n"}', b"{'a': 1}", b'{} // x', b'{"a": "x',
        b'{"a": ' + b"[" * 128 + b"]" * 128 + b"}",  # 129 deep
        b'{"a": ' + b"[" * 100000 + b"]" * 100000 + b"}",
        b'{"a":' * 100000 + b"1" + b"}" * 100000,
        b"[" * 1000000,
        b'{"a": "\\"", "b": ' + b"[" * 200 + b"]" * 200 + b"}"]  # deep behind a quote

    def test_plain_objects_are_read(self):
        brackets_in_a_string = '{"a": "%s\\"["}' % ("[" * 1000)
        for text in self.each([
                '{}', ' {"a": [1, -2.5e3, true, null, "\\u00e4"]} ',
                '{"a": [%s-1]}' % ("12, 3," * 50000),
                '{"a": {"a": 1}, "b": {"a": 1}}', brackets_in_a_string]):
            self.assertEqual(JsonBody(text.encode()).parse(), json.loads(text))

    def test_so_many_escapes_as_would_hold_the_loop_are_not_read(self):
        text = '{"a": "%s"}'
        for escape in self.each(("\\n", '\\"', "\\\\")):
            many = escape * (1_000_000 // escape.count("\\"))
            self.assertEqual(len(JsonBody((text % many).encode()).parse()["a"]),
                             len(many) // len(escape))
            with self.assertRaises(BadRequest):
                JsonBody((text % (many + escape)).encode()).parse()

    def test_json_is_read_as_strictly_where_no_c_code_reads_it(self):
        with patch.object(llm_proxy, "HAS_SCANNER", False):
            self.assertEqual(JsonBody(b'{"a": "\\": ", "b": {"a": 1.5}}').parse(),
                             {"a": '": ', "b": {"a": 1.5}})
            for body in self.each(self.REFUSED):
                with self.assertRaises(BadRequest):
                    JsonBody(body).parse()

    def test_what_json_loads_would_take_or_choke_on_is_a_400_and_costs_nothing(self):
        for body in self.each(self.REFUSED):
            self.assert_status(400, request("POST", CHAT, body), error="invalid_request_error")
        self.assert_spent(0, 1000)

    def test_an_integer_of_5000_digits_is_no_crash(self):
        """Newer Pythons refuse to read it, older ones read it; both are fine."""
        self.start(TOKEN_COST_MODE="estimate")
        for name in self.each([b"max_tokens", b"seed"]):
            body = b'{"%b": %b}' % (name, b"9" * 5000)
            self.assertIn(self.post(CHAT, body).status, (200, 400))

    PICTURE = "data:image/png;base64," + "QUJD" * 30000

    def test_what_changes_is_spliced_into_what_the_caller_wrote(self):
        self.start(MODEL_ALIASES="fast=real", LIMITS="each 9 tokens per minute burst 999999")
        picture = '{"content": [{"type": "image_url", "image_url": {"url": "%s"}}]}' % self.PICTURE
        for text in self.each((
                '{"model": "fast",  "messages": [%s]}' % picture,
                ' {"messages": [%s, %s], "a": {"model": "fast"}, "model" : "fast"\n}' % (
                    picture, picture),
                '{"a": [%s], "model": "fast"}' % ", ".join(['{"model": "fast"}'] * 40),
                '{"x": "\\"model\\": \\"fast\\"", "y\\\\": ["model"], "model":"fast"}',
                '{"x": ["\\\\", "model"], "messages": [%s], "model": "fast", "e": "\\u00e4"}'
                % picture)):
            self.post(CHAT, text.encode())
            there = text[::-1].replace('"tsaf"', '"laer"', 1)[::-1]
            asked = self.stub.last
            self.assertEqual(asked.digest, hashlib.sha256(there.encode()).hexdigest())
        body = b' { "messages": [], "stream_options": {"a": [1]},"stream":true}'
        self.post(CHAT, body)
        body = body.replace(b'{"a": [1]}', b'{"a":[1],"include_usage":true}')
        self.assertEqual(self.stub.last.body, body)
        self.post(CHAT, b'{"\\u006dodel": "fast"}')
        self.assertEqual(self.stub.last.body, b'{"\\u006dodel": "real"}')

    @unittest.skipUnless(CPYTHON, "it asks CPython for memory")
    def test_a_long_string_takes_little_memory_though_it_is_all_escapes(self):
        import tracemalloc  # which PyPy has not
        text = '{"%s": 1, "model": "a"}' % ("\\n" * (1 << 17))
        masks = Masks(Redactor(["email"]))
        restorer = Restorer(masks, masks.redactor)
        usual = llm_proxy.usual_event(b'{"a": "b"}', "a", ())
        self.addCleanup(tracemalloc.stop)
        for look in self.each((
                lambda: JsonBody(text.encode()).with_value("model", "b"),
                lambda: finish(masks.mask_strings(text)),
                lambda: json_before(text),
                lambda: restorer.restore_json(text.encode(), True),
                lambda: usual.fullmatch(b'{"a": "%b"}' % (b"x" * len(text))))):
            tracemalloc.start()
            look()
            self.assertLess(tracemalloc.get_traced_memory()[1], 12 * len(text))
            tracemalloc.stop()

    def test_a_long_string_is_media_only_where_media_stand(self):
        self.start(says(b"{}"), TOKEN_COST_MODE="estimate", IMAGE_TOKENS=500, MAX_TOKENS=10 ** 6,
                   RESPONSE_TOKEN_RESERVE=1)
        picture = {"type": "image_url", "image_url": {"url": self.PICTURE}}
        for payload, least, most in self.each((
                ({"messages": [{"content": [picture, {"text": "x" * 400}]}]}, 600, 610),
                ({"messages": [{"content": self.PICTURE}]}, 30000, 30020),
                ({"messages": [{"url": "x" * 100000}]}, 25000, 25020),
                ({"prompt": ["a", "x" * 100000]}, 25000, 25020))):
            before = self.left()
            self.post(CHAT, {"model": "m", **payload})
            cost = before - self.left()
            self.assertTrue(least <= cost <= most, cost)

    def test_text_has_a_limit_of_its_own(self):
        self.start(MAX_TEXT_BYTES=100000)
        picture = {"type": "image_url", "image_url": {"url": self.PICTURE}}
        for content, status in self.each((([picture], 200), ("x" * 110000, 413))):
            answered = self.assert_status(
                status, call(messages=[{"role": "user", "content": content}]))
        self.assertIn("MAX_TEXT_BYTES", answered.error()["message"])

    def test_what_would_take_long_to_read_is_refused_soon(self):
        for body in self.each((
                b"[" * 65536, b"[" * (2 << 20), b"[" + b"[]," * 700000 + b"1]",
                b'{"a":[' + (b"1" * 4299 + b",") * 1000 + b"1]}",
                b'{"a":[' + b"1," * 60000 + b"1" * 700 + b"]}",
                b'{"a":[' + b'{"":0},' * 330000 + b"1]}")):
            with self.computing_within(CPU_SECONDS):
                with self.assertRaises(BadRequest):
                    JsonBody(body).parse()

    def test_a_key_in_another_case_is_refused_where_we_read_it(self):
        """An upstream in Go would take "MODEL" for "model", and we would have read another one."""
        table = ["Model", "MAX_TOKENS", "Stream", "max_Completion_tokens", "\u017ftream"]
        for key in self.each(table):
            self.assert_status(400, call(**{key: 1}))
        self.assert_status(200, call(Temperature=1))
        self.assert_calls(1)

    def test_a_model_has_at_most_256_characters(self):
        statuses = [self.ask(call(model="x" * size)).status for size in (256, 257)]
        self.assertEqual(statuses, [200, 400])

    def test_half_of_a_surrogate_pair_is_no_crash(self):
        self.start(MAX_TOKENS=1, LOG_FORMAT="text", BASE_MODEL="m")
        data = request("POST", CHAT, b'{"model": "\\ud800", "messages": [{"content": "\\udfff"}]}')
        self.assertEqual([self.ask(data).status for _ in range(2)], [200, 200])


class PathsTest(ManyCase):
    SAME_ENDPOINT = r"""
        /v1/chat/completions /v1/chat/completions?x=1 /v1/chat/completions/?x
        /v1/chat/completions/ /v1/chat/completions// //v1/chat/completions ///v1/chat/completions
        /v1//chat/completions /v1/chat//completions /v1/chat/completions/. /v1/chat/completions/./
        /./v1/chat/completions /v1/./chat/./completions /v1/%2e/chat/completions
        /v1/chat/%63ompletions /v1/%63hat/completions /%76%31/%63%68%61%74/completions
        /v1/chat/%2563ompletions /v1/chat/%252563ompletions /v1/chat/COMPLETION%53
        /v1%2fchat%2fcompletions /v1%2Fchat/completions /v1/chat%252Fcompletions
        /%2fv1/chat/completions /v1/chat/completions%2f /v1/chat/completions%2F%2F
        /v1/chat/completions/%2e /v1/chat/completions/%2E/
        /V1/CHAT/COMPLETIONS /v1/Chat/Completions
        /v1/chat/completions;x /v1/chat/completions;x=1 /v1/chat/completions/;x
        /v1/chat/completions%3bx=1 /v1;a/chat;b/completions;c
        /v1\chat\completions /v1/chat%5ccompletions \v1/chat/completions
        /v1/chat/completions\ /v1/chat/completions%5C
        /v1/x/../chat/completions /v1/chat/x/../completions /v1/x%3F/../chat/completions
        /v1/x%23/../../admin /v1/%2e%2e/v1/chat/completions /v1/.%2E/v1/chat/completions
        /v1/x/%252e%252e/chat/completions /v1/x/..;/chat/completions /v1/x/..\chat/completions
        /v1/chat/completions/x/..
        /v1/chat/completions%00 /v1/chat/completions%0a /v1/chat/completions%0d%0aX:%20y
        /v1/chat/completions%09 /%00/v1/chat/completions
        /v1/chat/completions%20 /v1/chat%20/completions
        /v1/chat/completions#x /v1/chat/completions%3f /v1/chat/completions%3Fx=1
        /v1/chat/completions%23x
        /chat/completions /chat//completions/ /openai/v1/chat/completions
        /any/prefix/v1/chat/completions /v1/engines/davinci/completions
        /v1/completions /v1/completions/ /v1//completions /v1/Completions /v1/%63ompletions
        /completions v1/chat/completions *
        http://proxy.test/v1/chat/completions HTTP://PROXY.test/v1//chat/completions
        https://proxy.test/v1/completions/ http://other.test/v1/chat/completions""".split()
    PLAIN_NAMES = """
        /v1/chat/completions?x=1 -> /v1/chat/completions?x=1
        /v1//chat/./completions/ -> /v1/chat/completions
        /V1/Chat/%43ompletions -> /v1/chat/completions
        /v1%2fcompletions;x -> /v1/completions
        /pre/v1/chat/completions -> /pre/v1/chat/completions
        http://proxy.test/v1/chat/completions -> /v1/chat/completions
        /chat/completions -> /chat/completions"""
    FORWARDED = """
        0 GET /v1/chat/completions
        1 PUT /v1/chat/completions
        0 DELETE /v1/chat/completions/x
        0 POST /v1/chat/completions/x/cancel
        0 POST /v1/threads/t/runs/r/cancel
        0 POST /v1beta/batches/b:cancel
        1 POST /v1/chat/completions/x/cancel/
        1 POST /v1/x/cancel
        1 PATCH /a/b?c=/v1/chat/completions
        1 POST /v1/xcompletions
        1 POST /v1/files
        0 HEAD /v1/files
        1 POST /v1/files/a%20b?x=%2f
        1 POST /v1//audio/./x
        0 GET /
        0 GET /v1/models
        1 QUERY /v1/x
        0 GET /x?a=b?c
        0 POST /tokenize
        0 POST /v1/responses/input_tokens
        0 POST /detokenize
        0 POST /apply-template
        0 POST /api/show
        0 POST /v1/messages/count_tokens
        0 POST /v1beta/models/m:countTokens"""
    # Whatever reaches a model by these costs something; what has a name in its path, by that.
    UNKNOWN = """
        POST /v1/chat/completions/batch, POST /v1/decisions, POST /v1/score, POST /score,
        POST /v1/reranking, POST /reranking, POST /invocations, POST /v1/audio/speech,
        POST /v1/audio/transcriptions, POST /v1/audio/translations, POST /v1/images/edits,
        POST /v1/images/variations, POST /v1/videos, POST /v1/batches, POST /v1/messages/batches,
        POST /v1beta/interactions, POST /v1beta/models/m:batchGenerateContent,
        POST /v1beta/models/m:predictLongRunning, POST /v1beta/models/m:predict, POST /completion,
        POST /infill, POST /embedding, POST /pooling, POST /classify, POST /generate,
        POST /v1/moderations, POST /v1/ocr, POST /v1/threads/t/runs, POST /v1/threads/t/messages,
        POST /v1/fine_tuning/jobs, PUT /v1/chat/completions, PATCH /v1/responses, POST /inference,
        POST /v1/uploads/u/parts, PROPFIND /v1/chat/completions, POST /v1//score/, POST /%76%31/x,
        POST /v1/chat/completions/x/messages
        """
    ADMIN = """
        POST /v1/realtime/client_secrets, POST /V1/Realtime/Client_Secrets, GET /slots, GET /slots/0
        POST /v1/realtime//client_secrets/, POST /v1/realtime/client%5fsecrets;x
        POST /v1/x/../slots
        POST /v1alpha/auth_tokens, POST /v1/realtime/sessions, POST /v1/realtime/calls
        GET /v1/stream/x, DELETE /v1/stream/x, POST /v1/streams/lookup, GET /stream/x
        POST /slots/0?action=save, POST /%73lots/0, POST /api/pull, POST /api/push, POST /api/create
        POST /api/copy, DELETE /api/delete, HEAD /api/blobs/sha256:1, POST /pull, POST /api//pull/
        POST /v1/load_lora_adapter, POST /v1/unload_lora_adapter, POST /sleep, POST /wake_up
        POST /reset_prefix_cache, POST /collective_rpc, POST /update_weights_from_disk
        POST /update_weights, GET /flush_cache, POST /start_profile, POST /models/load
        POST /models/unload, POST /lora-adapters, POST /props, POST /v1/model/load, PUT /props
        POST /api/v1/models/load, POST /models, DELETE /v1/models/m, GET /cors-proxy?url=x
        POST /slots/0:countTokens?action=erase, POST /slots/0/count_tokens
        POST /resume, GET /is_paused, POST /start_weight_update, POST /finish_weight_update
        POST /fault_tolerance/apply, POST /v1/chat/completions/control, PUT /hicache/storage-backend
        POST /v1/download, POST /v1/model/embedding/unload, POST /v1/sampling/override/switch
        POST /openai/realtimeapi/sessions, POST /generate_auth_token, POST /v1/auth/grant
        POST /v1/ephemeral-tokens
        POST /wakeup, GET /v1/api-key, GET /v1/users/me/balance, GET /v1/user/info
        GET /api/v1/credits, GET /api/v1/key, POST /api/v1/models/unload, GET /models/sse
        POST /tools, POST /v1/internal/model/load, GET /v1/organization/admin_api_keys""".replace(
            "\n", ",")
    MANAGED_AND_FREE = "GET /props, GET /lora-adapters, GET /v1/models, GET /v1/models/sleepy-1"

    def test_a_spelled_out_path_goes_upstream_under_its_plain_name(self):
        for path, plain in self.each(self.PLAIN_NAMES):
            self.assert_status(200, request("POST", path, chat()))
            self.assertEqual(self.stub.last.target, plain)
        self.assert_left(1000 - 7)

    def test_other_methods_and_paths_are_forwarded_as_they_are_and_cost_a_request_or_nothing(self):
        left = 1000
        for cost, method, path in self.each(map(str.split, self.FORWARDED.strip().splitlines())):
            body = b"" if method in ("GET", "HEAD") else b"not json"
            self.assert_status(200, request(method, path, body))
            asked = self.stub.last
            self.assertEqual((asked.method, asked.target, asked.body), (method, path, body))
            left -= int(cost)
            self.assert_left(left)

    def rows(self, text):
        return self.each([row.split() for row in text.split(",") if row.strip()])

    def test_what_is_unknown_gets_past_neither_an_empty_bucket_nor_a_full_queue(self):
        self.start(MAX_TOKENS=1)
        self.ask()
        for method, path in self.rows(self.UNKNOWN):
            answered = self.ask(request(method, path, chat()))
            limited = answered.status == 429 or b"limit reached" in answered.body
            self.assertEqual((limited, self.stub.calls), (True, 1))
        self.start(None, MAX_CONCURRENCY=1, MAX_QUEUE=0)
        _, running = self.ask_stub()
        for method, path in self.rows(self.UNKNOWN):
            answered = self.ask(request(method, path, chat()))
            self.assertEqual((answered.status, self.stub.calls), (503, 1))
        running.answer()

    def test_what_manages_an_upstream_is_not_passed_on_in_whatever_spelling(self):
        box = self.stub_of("box")
        self.start_many({"box": box}, UPSTREAM_BOX_URL=box.url)
        for method, path in self.rows(self.ADMIN):
            for prefix in ("", "/box"):
                answered = self.ask(request(method, prefix + path, chat()))
                self.assertIn(answered.status, (403, 400 if ".." in path else 403))
        self.assertEqual(self.stub.calls + box.calls, 0)
        for method, path in self.rows(self.MANAGED_AND_FREE):
            self.assert_status(200, request(method, "/box" + path))
        self.start(VENDOR_ADMIN_PATHS="on")
        self.assert_status(200, request("POST", "/api/pull"))

    def test_unknown_calls_are_free_or_refused_where_that_is_wanted(self):
        said = {"count": (200, 999), "pass": (200, 1000), "refuse": (403, 1000)}
        for setting, expected in self.each(said.items()):
            self.start(UNKNOWN_CALLS=setting)
            answered = self.post("/v1/score", chat())
            self.assertEqual((answered.status, self.left()), expected)
            self.assert_status(200, request("POST", "/v1/files", b"x"))
            batch = self.post("/v1/batches", b'{"input_file_id": "x"}')
            self.assertEqual(batch.status, answered.status)
            self.assert_left(expected[1] - 1 - (batch.status == 200))

    def test_an_unknown_call_is_estimated_by_its_json_and_settled_by_what_is_told(self):
        for mode, answered, cost, more in self.each("""[
                ["estimate", {}, 10, {}], ["estimate", {}, 60, {"n_predict": 50}],
                ["estimate", {}, 311,
                 {"sampling_params": {"max_new_tokens": 50, "n": 3}, "text": ["a", "b"]}],
                ["estimate", {}, 252,
                 {"sampling_params": [{"max_new_tokens": 10, "n": 3},
                                      {"max_new_tokens": 40, "n": 3}], "input_ids": [[1], [2]]}],
                ["estimate", {}, 84,
                 {"requests": [{"params": {"max_tokens": 35}}, {"params": {"max_tokens": 35}}]}],
                ["usage", {}, 11, {"options": 1, "n": "x", "stream": 1}],
                ["usage", {"text": "ten tokens, as they are counted: 40 long"}, 20, {}],
                ["usage", {"text": "ten tokens, as they are counted: 40 long",
                           "usage": {"prompt_tokens": 30, "completion_tokens": 5}}, 35, {}]]"""):
            self.start(says(answered), TOKEN_COST_MODE=mode)
            body = encoded({"model": "m", "input": "ten tokens" * 4, **more})
            self.post("/v1/score", body)
            self.assertEqual(1000 - self.left(), cost)

    def test_the_method_cannot_be_overridden_further_on(self):
        self.start(MAX_TOKENS=1)
        self.get(CHAT, "X-HTTP-Method-Override: POST")
        self.assertIsNone(self.stub.requests[0].get("x-http-method-override"))
        self.assert_status(400, request("post", CHAT, chat()))
        self.assert_calls(1)


class FormsTest(ManyCase):
    """Calls that are no JSON: what they name is found, and nothing else is changed."""
    PART = '--B\r\nContent-Disposition: form-data; name=%s\r\n\r\n%s\r\n'
    FILE = PART % ('"file"; filename="a.wav"\r\nContent-Type: audio/wav', "RIFF--B\0\xff")
    # The second part of a form, and the status
    FIELDS = [
        ('"model"', "fast", 200), ("model", "fast", 200), ('"model"; filename="x"', "fast", 200),
        ('"x"; filename="x"; name="model"', "fast", 400),
        ('"Model"', "fast", 400), ('"mod\\el"', "fast", 400), ('"x"; name="model"', "fast", 400),
        ('"model"\r\nContent-Transfer-Encoding: base64', "ZmFzdA==", 400),
        ('"model"\r\nContent-Disposition: form-data; name="x"', "fast", 400),
        ('"x"\nContent-Disposition: form-data; name="model"', "fast", 400),
        ('"model"', "m\r\n--BX\r\n", 400), ('"model"', "m\n--B\r\n", 400),
        ('"model"', "m" * 300, 400)]

    def start_routed(self):
        one = self.stub_of("one")
        self.start_many({"one": one}, UPSTREAM_ONE_MODELS="real", MODEL_ALIASES="fast=real")
        return one

    def form(self, *parts, boundary="B", end="--B--\r\n"):
        body = ("".join(parts) + end).encode("latin-1")
        kind = "Content-Type: multipart/form-data; boundary=" + boundary
        return request("POST", "/v1/audio/transcriptions", body, kind)

    def test_a_body_has_one_type(self):
        for kinds, status in self.each("""[
                [["a/b"], 200], [["audio/x", "multipart/form-data; boundary=x"], 400],
                [["a/b, c/d"], 400]]"""):
            fields = ["Content-Type: " + kind for kind in kinds]
            answered = self.post("/v1/audio/transcriptions", b"x", *fields)
            self.assertEqual((answered.status, self.stub.calls), (status, 1))

    def test_a_form_is_routed_by_its_model_whose_alias_is_replaced(self):
        one = self.start_routed()
        file = self.FILE.replace("--B\0", "-B\0")
        for name, model, status in self.each(self.FIELDS):
            field, calls = self.PART % (name, model), one.calls
            answered = self.ask(self.form(file, field))
            self.assertEqual((answered.status, one.calls - calls), (status, status == 200))
            if status == 200:
                asked, body = one.requests[-1], file + field.replace("fast", "real") + "--B--\r\n"
                self.assertEqual(asked.body, body.encode("latin-1"))
                self.assertEqual(asked.get("content-type"), "multipart/form-data; boundary=B")
        self.assert_left(1000 - 3)

    def test_a_form_that_two_readers_could_take_apart_differently_is_refused(self):
        model = self.PART % ('"model"', "m")
        for data in self.each((
                self.form(model, model), self.form(model, end=""), self.form(model, end="--B\r\n"),
                self.form("x", model), self.form(model, boundary="C"), self.form(self.FILE, model),
                self.form(model, boundary='B"'), self.form(model, boundary="B; boundary=C"),
                self.form(model, end="--B--\r\n" + model), self.form(model * 1001))):
            self.assert_status(400, data)
        self.assert_spent(0, 1000)

    def test_json_is_read_whatever_its_type_says_and_must_be_sound(self):
        one = self.start_routed()
        for fields, body, status in self.each((
                ((), b'{"model": "fast"}', 200),
                (("Content-Type: text/plain",), b' {"model": "fast"}', 200),
                (("Content-Type: application/x-www-form-urlencoded",), b'{"model": "fast"}', 200),
                (("Content-Type: application/json",), b"model=fast", 400),
                ((), b'{"model": "fast", "model": "m"}', 400), ((), b'{"Model": "fast"}', 400),
                ((), '{"model": "fast"}'.encode("utf-16"), 400), ((), b'["fast"]', 400))):
            self.assert_status(status, request("POST", "/v1/score", body, *fields))
            if status == 200:
                self.assertEqual(one.requests[-1].body.strip(), b'{"model": "real"}')
                self.assertEqual(one.requests[-1].get("content-type"), "application/json")
        kind = "Content-Type: application/x-www-form-urlencoded"
        self.post("/v1/score", b"a=%26&model=fast", kind)
        self.assertEqual(one.requests[-1].body, b"a=%26&model=real")
        self.assert_status(400, request("POST", "/x", b"model=a&model=b", kind))

    def test_sounds_are_relayed_as_they_come_and_what_is_no_json_as_it_is(self):
        self.start(None, reads=False, MAX_BODY_BYTES=10)
        kind = "Content-Type: audio/wav"
        client, asked = self.relay("/v1/x", kind, "Content-Encoding: br")
        asked.answer(b"x", "200 OK", "Content-Type: audio/mpeg")
        self.assertEqual(client.read().body, b"x")
        self.assertEqual((asked.get("content-type"), asked.get("content-encoding")),
                         ("audio/wav", "br"))
        self.assert_status(413, request("POST", "/v1/x", b"x" * 11))
        self.assert_left(999)


# Rows: an endpoint; what its API tells; input, output, cached, cache_write and reasoning tokens
USAGE_TABLE = json.loads("""[
    ["chat", {"prompt_tokens": 12, "completion_tokens": 2, "total_tokens": 14},
        [12, 2, 0, 0, 0]],
    ["chat", {"prompt_tokens": 12, "completion_tokens": 9, "total_tokens": 21,
                "prompt_tokens_details": {"cached_tokens": 8},
                "completion_tokens_details": {"reasoning_tokens": 5}},
        [12, 9, 8, 0, 5]],
    ["chat", {"input_tokens": 12, "input_tokens_details": {"cached_tokens": 8},
                "output_tokens": 9, "output_tokens_details": {"reasoning_tokens": 5},
                "total_tokens": 21},
        [12, 9, 8, 0, 5]],
    ["chat", {"prompt_tokens": 7, "total_tokens": 7},
        [7, 0, 0, 0, 0]],
    ["chat", {"total_tokens": 7},
        [7, 0, 0, 0, 0]],
    ["chat", {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 40},
        [10, 30, 0, 0, 0]],
    ["chat", {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12,
                "prompt_cache_hit_tokens": 4, "prompt_tokens_details": null},
        [10, 2, 4, 0, 0]],
    ["chat", {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12,
                "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 5}},
        [10, 2, 4, 5, 0]],
    ["chat", {"tokens_evaluated": 10, "tokens_predicted": 2, "tokens_cached": 11},
        [10, 2, 0, 0, 0]],
    ["chat", {"input_tokens": 10, "total_output_tokens": 5, "reasoning_output_tokens": 4},
        [10, 5, 0, 0, 4]],
    ["chat", {"prompt_tokens": -1, "completion_tokens": "2"}, null],
    ["chat", {"prompt_tokens": true}, null],
    ["chat", {"prompt_tokens": 1e300}, null],
    ["chat", {}, null],
    ["chat", {"prompt_tokens": 368, "completion_tokens": 19, "total_tokens": 10923,
                "cache_read_input_tokens": 10536},
        [10904, 19, 10536, 0, 0]],
    ["chat", {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 37,
                "cache_read_input_tokens": 20, "cache_creation_input_tokens": 10},
        [35, 2, 20, 10, 0]],
    ["chat", {"prompt_tokens": 25, "completion_tokens": 2, "total_tokens": 37,
                "cache_read_input_tokens": 20, "cache_creation_input_tokens": 10},
        [35, 2, 20, 10, 0]],
    ["chat", {"prompt_tokens": 35, "completion_tokens": 2, "total_tokens": 37,
                "cache_read_input_tokens": 20, "cache_creation_input_tokens": 10},
        [35, 2, 20, 10, 0]],
    ["chat", {"prompt_tokens": 5, "completion_tokens": 2, "cache_read_input_tokens": 20},
        [25, 2, 20, 0, 0]],
    ["chat", {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7,
                "prompt_tokens_details": {"cached_tokens": 20}},
        [25, 2, 20, 0, 0]],
    ["chat", {"prompt_tokens": 14, "completion_tokens": 9, "total_tokens": 255,
                "completion_tokens_details": {"reasoning_tokens": 232}},
        [14, 241, 0, 0, 232]],
    ["chat", {"prompt_tokens": 14, "completion_tokens": 9,
                "completion_tokens_details": {"reasoning_tokens": 232}},
        [14, 241, 0, 0, 232]],
    ["chat", {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 37,
                "cached_tokens": 20, "reasoning_tokens": 5},
        [30, 7, 20, 0, 5]],
    ["chat", {"prompt_tokens": 0, "completion_tokens": 2, "total_tokens": 37},
        [35, 2, 0, 0, 0]],
    ["chat", {"prompt_tokens": 12.0, "completion_tokens": 2.0},
        [12, 2, 0, 0, 0]],
    ["chat", {"inputTokens": 12, "outputTokens": 2, "cacheReadInputTokens": 5},
        [12, 2, 5, 0, 0]],
    ["chat", {"input_tokens": 10, "cache_read_input_tokens": 5, "output_tokens": 2},
        [15, 2, 5, 0, 0]],
    ["chat", {"input_tokens": 1000, "cache_creation_input_tokens": 100, "output_tokens": 2},
        [1100, 2, 0, 100, 0]],
    ["chat", {"promptTokens": 12, "completionTokens": 5, "totalTokens": 17},
        [12, 5, 0, 0, 0]],
    ["messages", {"input_tokens": 15, "cache_read_input_tokens": 5, "output_tokens": 2,
                   "total_tokens": 17},
        [15, 2, 5, 0, 0]],
    ["messages", {"input_tokens": 10, "output_tokens": 5},
        [10, 5, 0, 0, 0]],
    ["messages", {"input_tokens": 23000, "output_tokens": 1000, "iterations": [
                    {"type": "compaction", "input_tokens": 180000, "output_tokens": 3500},
                    {"type": "message", "input_tokens": 23000, "output_tokens": 1000}, "odd"]},
        [203000, 4500, 0, 0, 0]],
    ["messages", {"input_tokens": 23000, "output_tokens": 1000, "iterations": [
                    {"type": "compaction", "input_tokens": 7, "output_tokens": 5}]},
        [23000, 1000, 0, 0, 0]],
    ["messages", {"input_tokens": 1, "output_tokens": 5,
                   "output_tokens_details": {"thinking_tokens": 3}},
        [1, 5, 0, 0, 3]],
    ["messages", {"input_tokens": 10, "cache_read_input_tokens": 100,
                   "cache_creation_input_tokens": 20, "output_tokens": 5},
        [130, 5, 100, 20, 0]],
    ["generate", {"promptTokenCount": 10, "candidatesTokenCount": 5, "totalTokenCount": 15},
        [10, 5, 0, 0, 0]],
    ["generate", {"promptTokenCount": 10, "candidatesTokenCount": 5, "thoughtsTokenCount": 7,
                "cachedContentTokenCount": 4, "toolUsePromptTokenCount": 3,
                "totalTokenCount": 25},
        [13, 12, 4, 0, 7]],
    ["generate", {"candidatesTokenCount": 5}, null],
    ["interactions", {"total_input_tokens": 9, "total_output_tokens": 79,
                "total_thought_tokens": 12, "total_tokens": 100},
        [9, 91, 0, 0, 12]],
    ["interactions", {"total_input_tokens": 10, "total_output_tokens": 5,
                "total_cached_tokens": 4, "total_tool_use_tokens": 3,
                "input_tokens_by_modality": [{"modality": "text", "tokens": 10}]},
        [13, 5, 4, 0, 0]],
    ["ollama", {"prompt_eval_count": 26, "eval_count": 9, "total_duration": 5}, [26, 9, 0, 0, 0]],
    ["ollama", {"prompt_eval_count": 8, "eval_count": null}, [8, 0, 0, 0, 0]],
    ["ollama", {"prompt_eval_count": null, "eval_count": null}, null]]""")


def events(*payloads, end="\n\n"):
    """An event stream."""
    texts = [one if one == "[DONE]" else json.dumps(one) for one in payloads]
    return "".join("data: " + text + end for text in texts).encode()


def delta(text, **more):
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return {"id": "c", "choices": [choice], **more}


TOLD = {"prompt_tokens": 20, "completion_tokens": 4, "total_tokens": 24}
LAST_DELTA = {"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
USAGE_EVENT = {"id": "c", "choices": [], "usage": TOLD}
ANTHROPIC_EVENTS = json.loads("""[
    {"type": "message_start", "message": {"id": "m", "usage": {
        "input_tokens": 20, "cache_read_input_tokens": 5, "output_tokens": 1}}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0,
     "delta": {"type": "text_delta", "text": "hello you"}},
    {"type": "message_delta", "delta": {"stop_reason": null}, "usage": {"output_tokens": 3}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 7}},
    {"type": "message_stop"}]""")


def anthropic_events(first, last):
    """Those in which the first event tells some of the input, and the last one the rest."""
    start, *between, end, stop = ANTHROPIC_EVENTS
    return [{**start, "message": {"usage": {**first, "output_tokens": 1}}}, *between,
            {**end, "usage": {**last, "output_tokens": 7}}, stop]


RESPONSE_EVENTS = json.loads("""[
    {"type": "response.created",
     "response": {"id": "r", "usage": null, "tools": [{"usage": {"input_tokens": 1}}]}},
    {"type": "response.output_text.delta", "delta": "hello you"},
    {"type": "response.output_text.done", "text": "hello you"},
    {"type": "response.completed",
     "response": {"id": "r", "output": [{"content": [{"text": "hello you"}]}],
                  "usage": {"input_tokens": 25, "output_tokens": 7, "total_tokens": 32}}}]""")
GEMINI_EVENTS = json.loads("""[
    {"candidates": [{"content": {"parts": [{"text": "hello"}]}}],
     "usageMetadata": {"promptTokenCount": 25, "candidatesTokenCount": 1}},
    {"candidates": [{"content": {"parts": [{"text": " you"}]}, "finishReason": "STOP"}],
     "usageMetadata": {"promptTokenCount": 25, "candidatesTokenCount": 7}}]""")


INTERACTION_EVENTS = json.loads("""[
    {"event_type": "interaction.created", "interaction": {"id": "i", "status": "in_progress"}},
    {"event_type": "step.start", "index": 0, "step": {"type": "model_output"}},
    {"event_type": "step.delta", "index": 0, "delta": {"text": "hello you", "type": "text"}},
    {"event_type": "interaction.completed", "interaction": {"id": "i", "status": "completed",
     "usage": {"total_input_tokens": 25, "total_output_tokens": 4, "total_thought_tokens": 3}}}]""")
OLLAMA_LINES = json.loads("""[
    {"model": "m", "message": {"role": "assistant", "content": "hello"}, "done": false},
    {"model": "m", "message": {"role": "assistant", "content": " you"}, "done": false},
    {"model": "m", "message": {"role": "assistant", "content": ""}, "done_reason": "stop",
     "done": true, "total_duration": 9, "load_duration": 1, "prompt_eval_count": 25,
     "prompt_eval_duration": 2, "eval_count": 7, "eval_duration": 6}]""")


def lines_of(*payloads):
    """A stream of Ollama."""
    return b"".join(json.dumps(one, separators=(",", ":")).encode() + b"\n" for one in payloads)


class UsageReaderTest(ProxyCase):
    """What is understood of an answer, in whatever pieces it comes."""
    DIALECTS = {"messages": Anthropic(), "generate": llm_proxy.Gemini(),
                "interactions": llm_proxy.Interactions(), "ollama": llm_proxy.Ollama()}
    STREAMS = [  # endpoint, events, usage; of the first events: number, usage, characters
        ("chat", [delta("hello you"), LAST_DELTA, USAGE_EVENT, "[DONE]"],
         (20, 4), 1, None, 9),
        ("chat", [delta("hello", usage=None), delta(" you"), {**LAST_DELTA, "usage": TOLD},
                  "[DONE]"],
         (20, 4), 2, None, 9),
        ("responses", RESPONSE_EVENTS, (25, 7), 2, None, 9),
        ("messages", ANTHROPIC_EVENTS, (25, 7), 3, (25, 1), 9),
        ("messages", anthropic_events({"input_tokens": 20}, {"cache_read_input_tokens": 5}),
         (25, 7), 3, (20, 1), 9),
        ("messages", anthropic_events({"cache_read_input_tokens": 5}, {"input_tokens": 20}),
         (25, 7), 3, (5, 1), 9),
        ("generate", GEMINI_EVENTS, (25, 7), 1, (25, 1), 5),
        ("interactions", INTERACTION_EVENTS, (25, 7), 3, None, 9)]
    JSON_ANSWERS = """
        {"choices": [SAID], "usage": TOLD}
        {"usage": TOLD, "choices": [SAID]}
        {"choices": [SAID], "usage": TOLD, "metadata": PLANTED}
        {"usage": TOLD, "tools": [PLANTED]}
        {"choices": [SAID], "usage": TOLD, "timings": {"n": 1}}
        {"usage": TOLD, "data": [LONG]}"""

    def dialect(self, endpoint):
        return self.DIALECTS.get(endpoint) or OpenAI()

    def new_reader(self, endpoint="chat", streamed=True, dropping=False, packed=False, prompts=1):
        asked = llm_proxy.Call(self.dialect(endpoint), endpoint, CHAT, "")
        asked.limit = None, prompts
        self.reader = llm_proxy.UsageReader(asked, streamed, True, packed)
        self.readers = [self.reader]
        if dropping:
            self.readers.append(llm_proxy.Editor(
                asked.dialect.events, llm_proxy.HiddenUsage(asked.dialect)))
        return self.reader

    def feed(self, payload):
        """What goes on of a piece at once."""
        for reader in self.readers:
            payload = reader.feed(payload)
        return payload

    def hear(self, data, step=None, whole=True, **options):
        """What goes on of `data`; (input, output) tokens; whether they are final; characters."""
        reader = self.new_reader(**options)
        step = step or len(data)
        pieces = [data[at:at + step] for at in range(0, len(data), step)]
        passed = b"".join(map(self.feed, pieces)) + llm_proxy.flush_all(self.readers)
        used, final = reader.reported_usage(whole)
        return passed, used and used[:2], final, reader.output_characters()

    USUAL_ENDS = """
        {"model":"m","choices":[],TOLD} -> True
        {"model":"","choices":[],TOLD} -> False
        {"model":"other","choices":[],TOLD} -> False
        {"model":"other","metadata":{"model":"m"},TOLD} -> False
        {"model":"m","service_tier":"flex",TOLD} -> False
        {"model":"m",TOLD,"cached_tokens":5} -> False
        {"model":"m","choices":[{TOLD}]} -> False
        {"model":"m","choices":[],"usage":[]} -> False
        {"model":"m",TOLD,"system_fingerprint":"x"} -> False
        {"model":"m","choices":[{TOLD},{"a":1}]} -> False
        {"model":"m","choices":{TOLD}} -> False
        {"model":"m", TOLD } -> True
        {"model":"m","usage":{TOLD_COUNTS,"cost":1}} -> False
        {"model":"m","usage":{,TOLD_COUNTS}} -> False
        {"model":"m","choices":[],"usage":"prompt_tokens completion_tokens total_tokens"} -> False
        [{"model":"m","choices":[],TOLD}] -> False"""

    def test_the_end_of_an_answer_tells_what_all_of_it_does_or_all_of_it_is_read(self):
        told = '"usage":{"prompt_tokens":20,"completion_tokens":4,"total_tokens":24}'
        for text, is_usual in self.each(self.USUAL_ENDS):
            data = text.replace("TOLD_COUNTS", told[9:-1]).replace("TOLD", told).encode()
            usage = OpenAI().usual_usage(data, "m")
            self.assertEqual(str(usage is not None), is_usual)
            stream = events(delta("word")) + b"data: %b\n\ndata: [DONE]\n\n" % data
            for body in (data, stream):
                found = []
                for short in (usage, None):
                    reader = self.new_reader(streamed=body is not data)
                    reader.call.upstream_model = "m"
                    reader.feed(body)
                    with patch.object(OpenAI, "usual_usage", return_value=short):
                        told_usage = [reader.reported_usage(whole) for whole in (True, False)]
                    found.append((told_usage, reader.fault, reader.usual))
                self.assertEqual(found[0], (*found[1][:2], usage))

    def test_usage_is_read_in_every_dialect(self):
        for endpoint, told, expected in self.each(USAGE_TABLE):
            found = self.usage_of(told, dialect=self.dialect(endpoint))
            self.assertEqual(found and list(found[:5]), expected)

    FACTS = json.loads("""[
        [{"model": "served", "service_tier": "flex", "usage": {"prompt_tokens": 1}},
            {"model": "served", "tiers": ["flex"]}],
        [{"response": {"model": "served", "usage": {"input_tokens": 1, "total_tokens": 1}}},
            {"model": "served"}],
        [{"type": "message", "model": "served", "usage": {"input_tokens": 1, "speed": "fast",
            "service_tier": "standard", "inference_geo": "us"}},
            {"model": "served", "tiers": ["standard", "fast", "us"]}],
        [{"modelVersion": "served", "usageMetadata": {"promptTokenCount": 1}},
            {"model": "served"}],
        [{"model": 7, "service_tier": null, "usage": {"prompt_tokens": 1}}, {}],
        [{"usage": {"prompt_tokens": 1, "cost": 0.00014}}, {"picodollars": 140000000}],
        [{"usage": {"prompt_tokens": 1, "cost": 0}}, {"picodollars": 0}],
        [{"usage": {"prompt_tokens": 1, "cost_usd_total": 0.5}}, {"picodollars": 500000000000}],
        [{"object": "batch", "model": "served", "usage": {"input_tokens": 1, "total_tokens": 1}},
            {"model": "served", "tiers": ["batch"]}],
        [{"modelVersion": "served", "usageMetadata": {
            "promptTokenCount": 1, "serviceTier": "flex", "trafficType": "ON_DEMAND_FLEX"}},
            {"model": "served", "tiers": ["flex", "ON_DEMAND_FLEX"]}],
        [{"usage": {"prompt_tokens": 0, "completion_tokens": 4, "total_tokens": 4}},
            {"input": 0, "output": 4, "estimated": true}],
        [{"usage": {"completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 9}}},
            {"input": 9, "cached": 9, "output": 4, "estimated": true}],
        [{"generated_text": "x", "details": {"generated_tokens": 3}},
            {"input": 0, "output": 3, "estimated": true}],
        [{"Response": {"Usage": {"PromptTokens": 1, "CompletionTokens": 3, "TotalTokens": 4}}},
            {"output": 3}],
        [{"usage_metadata": {"prompt_token_count": 1, "candidates_token_count": 3,
            "total_token_count": 4}}, {"output": 3}],
        [{"token_usage": {"prompt_tokens": 1, "completion_tokens": 3}}, {"output": 3}],
        [{"type": "message", "usage": {"input_tokens": null, "output_tokens": 4}},
            {"input": 0, "output": 4, "estimated": true}],
        [{"usage": {"prompt_tokens": 1, "cost": -1}}, {}],
        [{"usage": {"prompt_tokens": 1, "cost": "$1"}}, {}],
        [{"usage": {"prompt_tokens": 1, "cost": "1.4e-4"}}, {"picodollars": 140000000}],
        [{"usage": {"prompt_tokens": 1, "cost": {"total_cost": "0.006"}}},
            {"picodollars": 6000000000}],
        [{"usage": {"prompt_tokens": 1, "cost": 0.01, "is_byok": true,
            "cost_details": {"upstream_inference_cost": 0.2}}}, {"picodollars": 210000000000}],
        [{"usage": {"prompt_tokens": 1, "cost": {"total_cost": 0.006}}},
            {"picodollars": 6000000000}],
        [{"usage": {"prompt_tokens": 1, "total_tokens": 9, "completion_tokens": 3,
            "prompt_audio_seconds": 2}}, {"input": 6, "output": 3}],
        [{"usage": {"prompt_tokens": 1, "total_tokens": 9, "completion_tokens": 3,
            "connector_tokens": 5, "connectors": {"web_search": 1}}}, {"input": 6, "output": 3}],
        [{"usage": {"prompt_tokens": 1, "server_tool_use": {"web_search_requests": 2}}},
            {"searches": 2}],
        [{"output": [{"type": "web_search_call", "action": {"type": "search"}},
                {"type": "web_search_call", "action": {"type": "open_page"}},
                {"type": "web_search_call"}, {"type": "message"}, null],
            "usage": {"input_tokens": 1, "total_tokens": 1}}, {"searches": 2}],
        [{"modelVersion": "g", "usageMetadata": {"promptTokenCount": 1}, "candidates": [
                {"finishReason": "STOP", "groundingMetadata": {"webSearchQueries": ["a", "b"]}},
                {"groundingMetadata": {"webSearchQueries": "c"}}, null]},
            {"model": "g", "searches": 2}],
        [{"object": "interaction", "usage": {"total_input_tokens": 1, "grounding_tool_count": [
                {"type": "google_search", "count": 3}, {"type": "google_maps", "count": 9},
                {"type": "google_search"}, null]}}, {"searches": 3}],
        [{"usage": {"prompt_tokens": 1, "cost_in_usd_ticks": 37756000}},
            {"picodollars": 3775600000}],
        [{"type": "message", "usage": {"input_tokens": 1,
            "cache_creation": {"ephemeral_1h_input_tokens": 5, "ephemeral_5m_input_tokens": 3}}},
            {"input": 9, "cache_write": 8, "hour_write": 5}]]""")

    def endpoint_of(self, told):
        for key, endpoint in (("type", "messages"), ("modelVersion", "generate"),
                              ("object", "interactions")):
            if key in told:
                return endpoint
        return "chat"

    def test_what_an_answer_says_of_how_it_was_served_is_part_of_its_usage(self):
        for told, facts in self.each(self.FACTS):
            endpoint = self.endpoint_of(told)
            last = {**self.LAST.get(endpoint, {}), **told}
            for data, streamed in ((encoded(told), False), (events(last), True)):
                self.hear(data, streamed=streamed, endpoint=endpoint)
                used, _ = self.reader.reported_usage(True)
                facts = {"input": 1, **facts, "tiers": tuple(facts.get("tiers", ()))}
                self.assertEqual(used, Usage(**facts))

    def test_how_a_stream_was_served_may_stand_in_any_of_its_events(self):
        flex, last = delta("word", model="m", service_tier="flex"), {**USAGE_EVENT, "model": "m"}
        for before, after, end in self.each(
                (0, 400), (0, 400), ([], ["[DONE]"])):
            reader = self.new_reader()
            reader.call.upstream_model = "m"
            for told in ([delta("word")] * before, [flex], [delta("word")] * after, [last], end):
                reader.feed(events(*told))
            usage, _ = reader.reported_usage(True)
            self.assertEqual((usage[:2], usage.tiers), ((20, 4), ("flex",)))

    LAST = {"generate": {"candidates": [{"finishReason": "STOP"}]},
            "interactions": {"event_type": "interaction.completed"}}

    @staticmethod
    def usage_of(told, model=None, dialect=Anthropic()):
        return dialect.usage(dialect.amounts_in(told), model)

    def test_what_another_model_did_for_a_call_is_told_apart(self):
        entry = {"type": "advisor_message", "model": "other", "input_tokens": 7, "output_tokens": 8}
        told = {"input_tokens": 20, "output_tokens": 4, "iterations": [entry]}
        used = self.usage_of(told, "served")
        other = Usage(7, 8, model="other")
        self.assertEqual(used, Usage(20, 4, model="served", others=(other,)))
        self.assertEqual(used.with_others(), Usage(27, 12, model="served"))
        steps = {**told, "server_tool_use": {"web_search_requests": 3}, "iterations": [
            {"input_tokens": 30, "output_tokens": 9}]}
        self.assertEqual(self.usage_of(steps, "served"),
                         Usage(30, 9, model="served", searches=3))
        for name, served in self.each("""[
                ["claude-sonnet-4.5", "claude-sonnet-4-5-20250929"], ["x", "X"], [null, "x"],
                ["x", null], [["x"], "x"], [7, null], ["a", "a"]]"""):
            told["iterations"] = [{**entry, "model": name}, {**entry, "input_tokens": 30}] if (
                served is None) else [{**entry, "model": name}]
            self.assertEqual(self.usage_of(told, served).others, ())

    ODD_PLACES = json.loads("""[
        {"choices": [{"index": 0, "finish_reason": "stop", "usage": "TOLD"}]},
        {"choices": [{"finish_reason": "stop", "delta": {}}], "x_groq": {"usage": "TOLD"}},
        {"choices": [{"finish_reason": "stop"}], "usage": {"t": 1}, "x_groq": {"usage": "TOLD"}},
        {"choices": [{"finish_reason": "stop", "message": {"usage": "TOLD"}}], "usage": null},
        {"meta": "TOLD"}, {"stats": "TOLD"}, {"metrics": "TOLD"}, {"details": "TOLD"},
        {"results": ["TOLD"]}, {"meta": {"billed_units": "TOLD"}},
        {"text": "", "meta_info": "TOLD"},
        {"cached_tokens": 7, "usage": "TOLD", "choices": []},
        {"choices": [], "prompt_cache_hit_tokens": 7, "usage": "TOLD"},
        {"choices": [{"finish_reason": "stop", "cached_tokens": 7, "usage": "TOLD"}]}]""")

    LISTED = [  # of answers, how each tells its usage
        ('"meta_info":{"prompt_tokens":5,"completion_tokens":2}', 4),
        ('"tokens_evaluated":5,"tokens_predicted":2', 4),
        ('"usage":{"prompt_tokens":5,"completion_tokens":2}', 4),
        ('"embeddings":{"statistics":{"token_count":5,"truncated":false}}', 0)]
    LISTS = ["[%s,%s]", "[\n %s,\n %s\n]\n", "%s\n%s", "%s\r\n%s\r\n", '{"results":[%s,%s]}',
             '{"predictions": [%s, %s], "metadata": {"input_tokens": 1}}']

    def test_answers_in_a_list_are_billed_together_however_large_it_is(self):
        for (told, output), whole, size in self.each(
                self.LISTED, self.LISTS, (0, 9000, 300_000)):
            one = '{"text":"%s",%s}' % ("x" * size, told)
            data = (whole % (one, one)).encode()
            found = self.hear(data, 16384, streamed=False, prompts=2)
            self.assertEqual(found[1:3], ((10, output), True))
            self.assertLessEqual(abs(found[3] - 2 * size), size // 4)

    def test_an_image_within_an_answer_of_several_is_no_text_and_the_last_one_tells_the_bill(self):
        """Unless that one does not tell."""
        image = {"inlineData": {"mimeType": "image/png", "data": "A" * 3_000_000}}
        told = [{"candidates": [{"content": {"parts": [part]}}], "usageMetadata": {
            "promptTokenCount": 20, "candidatesTokenCount": count}}
                for part, count in (({"text": "here it is"}, 3), (image, 1291), ({}, 1300))]
        untold = told[:1] + [{"candidates": told[1]["candidates"]}]
        answers = {"whole": told, "with an image last": told[:2], "without an end": untold}
        for name, streamed, output in self.each([
                ("whole", True, 1300), ("whole", False, 1300), ("with an image last", False, 1291),
                ("without an end", False, None)]):
            data = events(*answers[name], end="\r\n\r\n") if streamed else encoded(answers[name])
            _, used, final, characters = self.hear(
                data, 65536, endpoint="generate", streamed=streamed)
            self.assertEqual((used[1] if final else None, characters < 99), (output, True))

    def test_what_is_told_of_a_list_as_a_whole_is_its_bill_and_one_prompt_has_one_answer(self):
        told = '"usage":{"prompt_tokens":%d,"completion_tokens":%d}}'
        wholes = (('{"results":[ONE,ONE],' + told % (10, 4), (10, 4)), ("ONE\nONE\nONE", (5, 2)))
        for size, (whole, tokens) in self.each((0, 9000), wholes):
            one = '{"text":"%s","model":"mod\u00e8le",' % ("x" * size) + told % (5, 2)
            found = self.hear(whole.replace("ONE", one).encode(), 16384, streamed=False)
            self.assertEqual((*found[1:3], self.reader.model), (tokens, True, "mod\u00e8le"))

    def test_answers_of_a_batch_of_geminis_are_billed_together(self):
        one = {"response": {"usageMetadata": {"promptTokenCount": 5, "candidatesTokenCount": 2}}}
        self.hear(encoded({"response": {"inlinedResponses": [one, one]}}), streamed=False,
                  endpoint="generate")
        self.assertEqual(self.reader.reported_usage(True), (Usage(10, 4), True))

    def test_money_that_is_told_of_answers_in_a_list_is_added_up(self):
        one = '{"usage":{"prompt_tokens":5,"completion_tokens":2,"cost":%s}}'
        for text, tokens, usd in self.each((
                ("[%s,%s]" % (one % 0.5, one % 0.3), (10, 4), 0.8),
                ("[%s,%s]" % (one % '"0.5"', one % 0.3), (10, 4), 0.8),
                ('{"data":%s,"results":[%s]}' % (one % 0.5, one % 0.5), (5, 2), 0.5))):
            self.hear(text.encode(), streamed=False)
            used, _ = self.reader.reported_usage(True)
            self.assertEqual((used[:2], used.picodollars), (tokens, usd * 10 ** 12))

    def test_a_list_of_too_many_answers_is_read_in_part_and_what_is_no_list_is_text(self):
        one = b'{"usage":{"prompt_tokens":1,"completion_tokens":1}}'
        many = llm_proxy.UsageReader.MAX_ANSWERS
        found = self.hear(b"[%b{}]" % (b"%b," % one * 2 * many), streamed=False)
        self.assertEqual(found[1:3], ((2 * many, 2 * many), False))
        data = b"\xff" * 20000 + b"}\n{"
        self.assertEqual(self.hear(data, streamed=False)[3], len(data))

    def test_usage_of_the_prompt_alone_is_no_final_count_though_it_comes_first(self):
        told = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 0}}
        self.hear(events(told, delta("word " * 9), LAST_DELTA, "[DONE]"))
        self.assertFalse(self.reader.reported_usage(True)[1])

    def test_usage_is_found_wherever_a_response_has_it_and_not_in_what_a_caller_wrote(self):
        for told in self.each(self.ODD_PLACES):
            data = json.dumps(told).replace('"TOLD"', json.dumps(TOLD)).encode()
            for body, streamed in ((data, False), (b"data: %b\n\n" % data, True)):
                self.hear(body, 50, streamed=streamed)
                used, final = self.reader.reported_usage(True)
                self.assertEqual((used, final), (
                    Usage(20, 4, 7 * (b"cache" in data)), True))
        planted = {"usage": {"input_tokens": 1, "output_tokens": 1}}
        response = {"metadata": planted, "tools": [planted], "input": [planted], "text": planted}
        self.assert_nothing_told({"type": "response.completed", "response": response})
        self.assert_nothing_told({"choices": [{"finish_reason": "stop", "text": planted}]})

    def assert_nothing_told(self, payload):
        self.hear(events(payload))
        self.assertIsNone(self.reader.reported_usage(True)[0])

    def test_an_answer_with_searches_of_the_web_is_read_whole_though_it_is_large(self):
        text = "x" * 20_000
        for endpoint, told in self.each((
                ("responses", {"output": [{"type": "web_search_call"}, {"text": text}],
                               "usage": {"input_tokens": 1, "output_tokens": 1}}),
                ("generate", {"candidates": [{"groundingMetadata": {"webSearchQueries": ["a"]},
                                              "content": {"parts": [{"text": text}]}}],
                              "usageMetadata": {"promptTokenCount": 1, "totalTokenCount": 2}}))):
            self.hear(encoded(told), 16384, endpoint=endpoint, streamed=False)
            self.assertEqual(self.reader.reported_usage(True)[0].searches, 1)

    SGLANG = [  # number and tokens of each event's answer, whether it is the last; tokens of all
        ([(0, 1, False), (0, 9, True)], (5, 9)),
        ([(0, 1, False), (1, 1, False), (0, 9, True), (1, 2, False), (1, 4, True)], (10, 13)),
        ([(0, 1, False), (0, 2, False)], (5, 2))]

    def test_a_stream_of_sglangs_own_repeats_the_text_and_tells_of_each_answer(self):
        for told, usage in self.each(self.SGLANG):
            sent = events(*[
                {"index": number, "text": '"finish_reason":{' + "words " * 999, "meta_info": {
                    "finish_reason": {"type": "stop"} if last else None,
                    "prompt_tokens": 5, "completion_tokens": tokens}}
                for number, tokens, last in told], *["[DONE]"] * told[-1][2])
            for step in (None, 7000):
                found = self.hear(sent, step, endpoint="unknown", whole=False)
                self.assertEqual((found[1], found[3]), (usage, 0))

    def test_what_comes_later_erases_nothing(self):
        start, _, text, *_ = ANTHROPIC_EVENTS
        nothing = {"type": "message_delta", "delta": {"stop_reason": "end_turn"},
                   "usage": {"input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 50}}
        stop = {"type": "message_stop"}
        error = {"type": "error", "error": {"type": "overloaded_error"}}
        for after, output, final, ending in self.each([
                ([nothing, stop], 50, True, "ok"), ([nothing], 50, True, "ok"),
                ([stop], 1, False, "ok"), ([], 1, False, "upstream_cut"),
                ([error], 1, False, "upstream_status")]):
            reader = self.new_reader("messages")
            reader.feed(events(start, *[text] * 200, *after))
            self.assertEqual(reader.ending(True), ending)
            found = reader.reported_usage(ending == "ok")
            self.assertEqual((found[0][:3], found[1]), ((25, output, 5), final))
            self.assertEqual(reader.output_characters(), 1800)

    def test_money_that_was_told_is_not_erased(self):
        told = [{"usage": {"prompt_tokens": 1, "total_tokens": 2, "cost": cost}, "choices": []}
                for cost in ("0.5", 0.25, 0)]
        self.hear(events(delta("a"), *told, "[DONE]"))
        self.assertEqual(self.reader.reported_usage(True)[0].picodollars, 5 * 10 ** 11)

    def test_a_count_among_words_is_final_where_few_words_follow(self):
        early = {**delta("a"), "usage": {"prompt_tokens": 20, "completion_tokens": 1}}
        for number, final in self.each("""[[1, true], [0, true], [30, false], [999, false]]"""):
            told = [delta("b"), early, *[delta("word ")] * number, LAST_DELTA, "[DONE]"]
            told[-3:-2] = [] if number == 1 else told[-3:-2]
            self.hear(events(*told))
            self.assertEqual(self.reader.reported_usage(True)[1], final)

    ENDINGS = json.loads(r"""[
        ["chat", ["LAST_DELTA"], "ended ok"],
        ["chat", ["LAST_DELTA", "[DONE]"], "ended closed ok"],
        ["chat", ["USAGE_EVENT"], "ended ok"],
        ["chat", [{"type": "response.incomplete", "response": {}}], "ended closed ok"],
        ["messages", [{"type": "message_delta", "delta": {"stop_reason": "x"}}], "ended ok"],
        ["generate", [{"candidates": [{"finishReason": "STOP"}]}], "ended closed ok"],
        ["generate", [{"promptFeedback": {"blockReason": "SAFETY"}}], "ended closed ok"],
        ["other", ["text"], "ok"],
        ["chat", ["text"], "upstream_cut"],
        ["messages", ["text"], "upstream_cut"],
        ["generate", ["text"], "upstream_cut"],
        ["chat", [{"error": "no"}], "502 upstream_status"],
        ["chat", [{"error": {"code": "server_error"}}, "[DONE]"],
            "ended closed 502 upstream_status"],
        ["chat", [{"error": {"code": 400}}], "400 upstream_status"],
        ["chat", ["text", {"Error": {"code": 429}}, "[DONE]"],
            "ended closed 429 upstream_status"],
        ["chat", [{"error": {"type": "invalid_request_error"}}], "400 upstream_status"],
        ["chat", [{"choices": [{"finish_reason": "error"}]}], "ended 502 upstream_status"],
        ["chat", [{"type": "response.failed", "response": {"error": {"code": "x"}}}],
            "ended closed 502 upstream_status"],
        ["chat", ["LAST_DELTA", {"error": null}, "[DONE]"], "ended closed ok"],
        ["messages", [{"type": "error", "error": {"type": "overloaded_error"}}],
            "502 upstream_status"],
        ["chat", [{"type": "response.failed", "response": {"error": {"code": "invalid_prompt"}}}],
            "ended closed 400 upstream_status"],
        ["chat", [{"type": "conversation.response.error", "code": 3000}], "502 upstream_status"],
        ["generate", [{"error": {"code": 503, "status": "UNAVAILABLE"}}], "503 upstream_status"],
        ["interactions", ["text"], "upstream_cut"],
        ["interactions", [{"event_type": "interaction.completed"}], "ended closed ok"],
        ["interactions", [{"event_type": "error", "error": {"code": 429}}], "429 upstream_status"]
        ]""")
    NAMED = {"LAST_DELTA": LAST_DELTA, "USAGE_EVENT": USAGE_EVENT, "text": delta("hello")}

    def test_a_stream_says_how_it_ended(self):
        for endpoint, told, expected in self.each(self.ENDINGS):
            told = [self.NAMED.get(one, one) if isinstance(one, str) else one for one in told]
            for begun in (events(delta("a")), events(delta("a")) * 999):
                reader = self.new_reader(endpoint)
                for data in (begun, events(*told)):
                    reader.feed(data)
                self.assertEqual(self.how_it_ended(reader), expected)

    def test_lines_of_json_and_events_too_large_to_be_kept_say_how_they_ended(self):
        line = b'{"message": {"content": "a"}, "done": %b}\n'
        large = b'data: {"type": "response.completed", "response": {"output": "%b"}}\n\n'
        for endpoint, data, expected in self.each([
                ("ollama", line % b"false" * 999 + line % b"true", "ended closed ok"),
                ("ollama", line % b"false" * 999, "upstream_cut"),
                ("ollama", line % b"false" + b'{"error": "no"}\n', "502 upstream_status"),
                ("chat", large % (b"x" * 900_000), "ok")]):
            reader = self.new_reader(endpoint)
            for at in range(0, len(data), 16384):
                reader.feed(data[at:at + 16384])
            self.assertEqual(self.how_it_ended(reader), expected)

    def how_it_ended(self, reader):
        ending = reader.ending(True)
        words = "ended" * reader.ended, "closed" * reader.closed, str(reader.fault or ""), ending
        return " ".join(filter(None, words))

    ENDS_WITHOUT_JSON = (  # what came, the ending, the fault
        (b"event: error\ndata: no\n\n", "upstream_status", 502),
        (b'error: {"code": 500}\n\n', "upstream_status", 502),
        (b'data: {"error":\ndata: {}, "error": "no"}\n\n', "upstream_status", 502),
        (b'event: error\ndata: {"error": {"type": "rate_limit_error"}}\n\n', "upstream_status",
         429),
        (b'event:error\r: x\rdata:{"status_code": 500}\r\r', "upstream_status", 500),
        (b'{"error": {"code": 400}}', "upstream_status", 400),
        *[(data, "upstream_cut", 0) for data in (
            b"", b": ping\n\n", events("[DONE]"), events("[DONE]", "[DONE]"),
            b": ping\r\n\r\n" * 2000 + b"event: x\ndata:[DONE]\r\n\r\n")])

    def test_an_error_in_a_stream_may_be_no_json_and_no_stream_may_be_empty(self):
        for data, ending, fault in self.each(self.ENDS_WITHOUT_JSON):
            reader = self.new_reader()
            reader.feed(data)
            self.assertEqual((reader.ending(True), reader.said_nothing, reader.fault or 0),
                             (ending, True, fault))
        reader = self.new_reader(streamed=False)
        self.assertEqual((reader.ending(True), reader.said_nothing), ("upstream_cut", True))
        reader = self.new_reader()
        reader.feed(b"data: hello\n\ndata: [DONE]\n\n")
        self.assertEqual(reader.ending(True), "ok")

    ERRORS = """
        {"error": "no"} -> 502
        {"Error": {"Code": "x", "Message": "y"}} -> 502
        {"Error": {"code": 429}} -> 429
        {"fault": {"faultstring": "no"}} -> 502
        {"code": 1301, "msg": "no"} -> 502
        {"error": {"code": 429}} -> 429
        {"error": {"type": "rate_limit_error"}} -> 429
        {"error": {"code": "insufficient_quota"}} -> 429
        {"error": {"code": "invalid_api_key"}} -> 429
        {"error": {"code": "context_length_exceeded"}} -> 400
        {"error": "no", "code": 403} -> 403
        {"code": 500, "msg": "404 NOT_FOUND", "success": false} -> 500
        {"error_code": 17, "error_msg": "no"} -> 502
        {"status": "FAILED"} -> 502
        {"status": "failed", "error": {"code": "rate_limit_exceeded"}} -> 429
        {"success": true, "result": {}} -> 0
        {"code": "InvalidApiKey", "message": "x", "request_id": "y"} -> 429
        {"code": 20012, "message": "no such model", "data": null} -> 502
        {"detail": "Not Found"} -> 502
        {"message": {"content": "x"}} -> 0
        {"message": "x", "usage": {"prompt_tokens": 1, "total_tokens": 1}} -> 0
        {"message": "x", "choices": [{"message": {"content": "x"}}]} -> 0
        {"detail": "x", "response": "x"} -> 0
        {"message": "ok", "choices": [{"message": {"content": ""}, "finish_reason": "stop"}]} -> 0
        {"message": "ok", "output": "x"} -> 0
        {"message": "ok", "content": [{}]} -> 0
        {"message": "ok", "data": {"answer": "x"}} -> 0
        {"message": "no", "choices": [], "content": "", "output": null} -> 502
        {"results": [{"success": false}]} -> 0
        {"results": [{"success": false}, {"success": false}]} -> 0
        {"results": [{"error": "x"}, {"success": true}]} -> 0
        {"results": [{"error": "x"}, {"error": "x"}]} -> 502
        [{"x": 1}, {"error": "x"}] -> 0
        {"type": "error", "error": {"type": "overloaded_error"}} -> 502
        {"object": "error", "message": "no", "code": 404} -> 404
        {"errors": [{"code": 1000}], "success": false} -> 502
        {"base_resp": {"status_code": 1004}} -> 502
        {"status": "failed", "error": {"code": "server_error"}} -> 502
        {"choices": [{"error": {"code": 502}, "message": {}}]} -> 502
        [{"error": {"code": 503}}] -> 503
        {"choices": [], "error": null, "errors": []} -> 0
        {"choices": [], "base_resp": {"status_code": 0}} -> 0
        {"choices": [{"message": {"content": "\\"error\\": {}"}}]} -> 0
        {"content": [{"type": "tool_use", "input": {"error": "no"}}]} -> 0"""

    def test_json_that_is_an_error_is_one_whatever_its_status(self):
        for data, status in self.each(self.ERRORS):
            reader = self.new_reader(streamed=False)
            reader.feed(data.encode())
            ending = reader.ending(True)
            self.assertEqual((reader.fault, ending), (
                int(status), "upstream_status" if int(status) else "ok"))

    def test_a_message_at_the_end_of_an_answer_whose_text_is_lost_is_no_error(self):
        reader = self.new_reader(streamed=False)
        text = '{"choices": [{"message": {"content": "%s"}}]' % ("x" * reader.MAX_LINE)
        reader.feed(text.encode())
        reader.feed(b', "usage": null, "message": "x"}')
        self.assertEqual((reader.ending(True), reader.fault), ("ok", 0))

    def test_text_behind_an_event_that_is_too_long_is_counted(self):
        """Such as one that repeats the instructions: whoever leaves then pays for the text."""
        reader = self.new_reader()
        long = events({"instructions": "x" * 2 * reader.MAX_LINE})
        *_, seen = self.hear(long + events(delta("hello you")) * 20_000, 65536, whole=False)
        self.assertTrue(0.5 < seen / (9 * 20_000) < 2, seen)
        self.assertTrue(self.reader.lost)
        estimator = llm_proxy.CostEstimator(read_config(HERE), Prices(None), {"tokens"})
        used = estimator.usage(self.reader.call, ("key", b"a"), self.reader, False, 256)
        self.assertGreater(used.output, 9 * 20_000 / 8)

    def test_the_usage_of_a_stream_is_what_its_events_say_in_the_end(self):
        for row, end, step in self.each(
                self.STREAMS, ("\n\n", "\r\n\r\n"), (None, 1, 7, 64)):
            endpoint, told, usage, *_ = row
            data = b": ping" + end.encode() + events(*told, end=end)
            found = self.hear(data, step, endpoint=endpoint)
            self.assertEqual(found, (data, usage, True, 9))

    def test_the_usage_of_events_of_several_lines_is_that_of_the_last(self):
        before = {**USAGE_EVENT, "usage": {**TOLD, "completion_tokens": 1, "total_tokens": 21}}
        told = [delta("hello"), before, delta(" you"), USAGE_EVENT]
        data = "".join(["data: %s\n\n" % json.dumps(one, indent=1).replace("\n", "\ndata: ")
                        for one in told])
        self.assertEqual(self.hear(data.encode())[1:], ((20, 4), True, 9))

    def test_ollama_streams_lines_of_which_the_last_tells_the_usage(self):
        data = lines_of(*OLLAMA_LINES)
        for step in self.each((None, 1, 7, 64)):
            found = self.hear(data, step, endpoint="ollama")
            self.assertEqual(found, (data, (25, 7), True, 9))
        _, used, final, characters = self.hear(data[:-200], whole=False, endpoint="ollama")
        self.assertEqual((used, final, characters), (None, False, 9))
        for indent in self.each((None, 2)):
            whole = json.dumps({**OLLAMA_LINES[-1], **OLLAMA_LINES[0], "done": True}, indent=indent)
            found = self.hear(whole.encode(), endpoint="ollama", streamed=False)
            self.assertEqual(found[1:], ((25, 7), True, 5))

    def test_a_stream_of_lines_ends_with_the_one_that_is_done(self):
        """An error in it is a line, too."""
        error = {"error": "unexpected EOF"}
        for told, ending in self.each((
                (OLLAMA_LINES, "ok"), (OLLAMA_LINES[:2], "upstream_cut"),
                ([*OLLAMA_LINES[:2], error], "upstream_status"), ([error], "upstream_status"))):
            self.hear(lines_of(*told), endpoint="ollama")
            self.assertEqual(self.reader.ending(True), ending)

    def test_a_stream_that_was_cut_tells_what_it_told_and_how_much_was_said(self):
        for endpoint, told, _, number, *expected in self.each(self.STREAMS):
            data = events(*told[:number]) + b'data: {"choi'
            _, used, final, characters = self.hear(data, whole=False, endpoint=endpoint)
            self.assertEqual(([used, characters], final), (expected, False))

    def test_the_usage_of_json_is_that_of_the_answer_and_no_other(self):
        planted = '{"usage": {"prompt_tokens": 1, "completion_tokens": 0, "total_tokens": 1}}'
        words = {"PLANTED": planted, "SAID": json.dumps({"message": {"content": planted}}),
                 "TOLD": json.dumps(TOLD), "LONG": ", ".join(['{"embedding": [0.5]}'] * 200)}
        for row, in self.each(self.JSON_ANSWERS):
            told = json.loads(re.sub("[A-Z]+", lambda match: words[match[0]], row))
            compact = json.dumps(told, separators=(",", ":"))
            for text in (json.dumps(told), json.dumps(told, indent=2) + "\n", compact):
                self.hear(text.encode(), 50, streamed=False)
                self.assertEqual(self.reader.reported_usage(True), (Usage(20, 4), True))

    def test_a_stream_that_comes_under_another_type_is_read_as_one(self):
        told = [*[delta("word ")] * 99, LAST_DELTA, USAGE_EVENT, "[DONE]"]
        for data in self.each((events(*told), b": ping\r\n\r\n" + events(*told, end="\r\n\r\n"))):
            found = self.hear(data, 50, streamed=False)
            self.assertEqual(found, (data, (20, 4), True, 495))

    def test_a_stream_of_gemini_as_a_json_array_is_understood(self):
        for step, size in self.each(((30, 0), (5000, 50_000))):
            data = encoded([{"x": [0] * size}, *GEMINI_EVENTS])
            found = self.hear(data, step, endpoint="generate", streamed=False)
            self.assertEqual(found, (data, (25, 7), True, 9))

    def large_answers(self):
        """Rows: an answer, how much of it may be kept, characters of text, endpoint, streamed."""
        large = b"x" * (3 << 20)
        picture = (
            b'{"candidates": [{"content": {"parts": [{"inlineData": {"data": "%b"}}]}, '
            b'"finishReason": "STOP"}], '
            b'"usageMetadata": {"promptTokenCount": 20, "candidatesTokenCount": 4}}' % large)
        response = (
            b'data: {"type": "response.completed", "response": {"instructions": "%b", '
            b'"usage": {"input_tokens": 20, "output_tokens": 4, "total_tokens": 24}}}\n\n')
        usage = encoded(TOLD)
        many = events(*[delta("word ")] * 5000, USAGE_EVENT, "[DONE]")
        return [(many, 1 << 13, 25000, "chat", True),
                (b'{"data": ["%b"], "usage": %b}' % (large, usage), 2 << 20, 0, "other", False),
                (b'{"usage": %b, "data": ["%b"]}' % (usage, large), 2 << 20, 0, "other", False),
                (picture, 5 << 20, 0, "generate", False),
                (b"data: %b\n\n" % picture, 5 << 20, 0, "generate", True),
                (response % large, 5 << 20, 0, "responses", True),
                (response % large[:100000], 5 << 20, 0, "responses", True)]

    def test_large_answers_are_not_kept_and_tell_their_usage_all_the_same(self):
        """Pictures are not counted as text."""
        for data, most, expected, endpoint, streamed in self.each(self.large_answers()):
            passed, *found, characters = self.hear(
                data, 16384, endpoint=endpoint, streamed=streamed)
            self.assertEqual((passed == data, found), (True, [(20, 4), True]))
            self.assertLess(max(len(self.reader.kept), self.reader.compact_above), most)
            self.assertEqual(characters, expected)

    def test_what_is_not_told_of_a_text_too_large_to_be_kept_costs_what_was_held(self):
        counts = {"tokens_predicted": 40, "tokens_evaluated": 3}
        large = {"probs": ["x" * 900_000]}
        for size, told, charged in self.each((
                (1, {**counts, **large}, 43), (1, {"x": "\u00e4", **counts, **large}, 43),
                (1, {**large, **counts}, 503), (1, {"x": "x" * 20_000, **counts, **large}, 503),
                (1, {**counts, "probs": ["x"] * 9000}, 43), (5, {**counts, **large}, 215),
                (5, {"probs": ["x" * 2_000_000], **counts}, 2503))):
            self.start(says([told] * size if size > 1 else told), MAX_TOKENS=9000,
                       TOKEN_COST_MODE="usage")
            body = {"prompt": ["four char"] * size, "n_predict": 500}
            self.post("/completion", body)
            self.assertLessEqual(abs(9000 - self.left() - charged), 3 * size)

    def test_what_is_said_in_chunks_is_counted_as_a_parser_would(self):
        said = ["hello", "", "\n\t\"\\", "ä€\U0001f600", '"content": "x"', "\x7f", "a" * 1000]
        odd = json.loads(r"""[
            {"choices": [{"text": "more", "delta": {"content": null, "role": "assistant"}}]},
            {"choices": [{"delta": {
                "tool_calls": [{"function": {"name": "f", "arguments": "{\"a\": \"b\"}"}}],
                "reasoning_content": "why"}}]}]""")
        chunks = [*map(delta, said), *odd]
        expected = text_weight("".join([*said, "more", '{"a": "b"}', "why"]))
        for ascii_only in self.each([True, False]):
            texts = [json.dumps(one, ensure_ascii=ascii_only).encode() for one in chunks]
            data = b"".join(b"data: %b\n\n" % text for text in texts)
            found = OpenAI().said(data, "chat", True)
            self.assertEqual(sum(map(text_weight, found)), expected)

    def test_an_answer_nested_too_deeply_for_a_parser_is_no_crash(self):
        deep = b"[" * 100000
        closed = deep + b"]" * 100000
        for data in self.each([
                b'{"usage": %b}' % closed, deep, b'{"usage": {"a": ' + deep,
                b'{"a": %b, "usage": {"prompt_tokens": 1}, "x": 1}' % closed]):
            self.hear(b"data: %b\n\n" % data, dropping=True)
            self.hear(data, streamed=False)

    def test_what_json_tells_that_was_cut_is_not_believed(self):
        data = b'{"tools": [{"usage": {"input_tokens": 0, "output_tokens": 0}}], "usa'
        found = self.hear(data, whole=False, endpoint="responses", streamed=False)
        self.assertEqual(found[1:3], (None, False))

    def assert_usage_is_dropped(self, kept, *rows):
        """These are kept, whatever events end with, and in whatever steps they come."""
        for end, step in self.each(*rows):
            data = events(*kept, USAGE_EVENT, "[DONE]", end=end)
            found = self.hear(data, step, dropping=True)
            self.assertEqual(found[:3], (events(*kept, "[DONE]", end=end), (20, 4), True))

    def test_only_the_event_that_was_not_asked_for_is_kept_from_the_caller(self):
        azure = {"choices": [], "prompt_filter_results": []}
        kept = [azure, delta("a", usage=None), delta('"choices":[]'), LAST_DELTA]
        self.assert_usage_is_dropped(
            kept, ("\n\n", "\r\n\r\n"), (None, *range(1, 40), 200))

    LINE_ENDS = (r"\n\n \r\n\r\n \r\r \n\r\n \r\n\n \r\r\n \n\r \n \r \r\n"
                 .encode().decode("unicode_escape").split(" "))

    def test_an_event_may_end_with_any_line_ends_and_is_not_held_back(self):
        kept = [delta("a"), delta("b", usage=None), LAST_DELTA]
        self.assert_usage_is_dropped(kept, self.LINE_ENDS, (None, 1, 7, 64))
        for end in self.each(self.LINE_ENDS):
            self.new_reader(dropping=True)
            for one in (*kept, "[DONE]"):
                self.assertEqual(self.feed(events(one, end=end)), events(one, end=end))
            one = events(kept[0], end=end)
            self.assertEqual(self.feed(one + b"data: {"), one)  # what has only begun waits

    STRIPPED = """
        {"choices": [], "usage": {}, "model": "m", "citations": []} -> -
        {"usage": {}, "id": "c"} -> -
        {"choices": [], "usage": {}, "timings": {"n": 1}} -> {"choices":[NONE],"timings":{"n":1}}
        {"choices": [], "usage": {}, "citations": ["x"]} -> {"choices":[NONE],"citations":["x"]}
        {"usage": {}, "error": {"code": 1}} -> {"error":{"code":1}}
        {"choices": [{"delta": {}}], "usage": {}} -> {"choices": [{"delta": {}}], "usage": {}}
        {"choices": [], "usage": null} -> {"choices": [], "usage": null}
        {"choices": [], "a": {"usage": {}}} -> {"choices": [], "a": {"usage": {}}}
        """

    def test_what_an_event_says_besides_usage_is_shown(self):
        for told, shown in self.each(self.STRIPPED):
            shown = shown.replace("NONE", '{"index":0,"delta":{},"text":"","finish_reason":null}')
            shown = "" if shown == "-" else "event: x\ndata: %s\n\n" % shown
            for line in (told, told.replace(", ", ", \ndata: ", 1)):
                data = "event: x\ndata: %s\n\n" % line
                found = self.hear(data.encode() + b"data: [DONE]\n\n", 9, dropping=True)
                whole = shown if '"usage": ' not in shown else data
                self.assertEqual(found[0].decode(), whole + "data: [DONE]\n\n")

    def test_an_event_of_many_lines_that_has_text_loses_no_more_than_its_usage(self):
        told = {**delta("a"), "usage": TOLD}
        data = b"data: %b\n\n" % json.dumps(told, indent=1).replace("\n", "\ndata: ").encode()
        passed = self.hear(data, 9, dropping=True)[0]
        self.assertEqual(llm_proxy.SSE.payload(passed), {
            key: told[key] for key in told if key != "usage"})

    def test_what_is_packed_is_read_and_passes_as_it_is(self):
        data = events(*[delta("word ")] * 3000, LAST_DELTA, USAGE_EVENT, "[DONE]")
        packed = zlib.compress(data)
        for body, step in self.each(
                (gzip.compress(data), gzip.compress(data[:99]) + gzip.compress(data[99:]),
                 packed, packed[2:-4]), (None, 1, 1000)):
            found = self.hear(body, step, packed=True)
            self.assertEqual(found, (body, (20, 4), True, 15000))
        for body in self.each((b"\x1f\x8b" + b"x" * 38, gzip.compress(bytes(5 << 20)))):
            found = self.hear(body, packed=True)
            self.assertEqual(found, (body, None, False, len(body)))
            self.assertLess(len(self.reader.kept), 2 << 20)

    def test_what_cannot_be_read_is_not_held_back(self):
        asked = llm_proxy.Call(OpenAI(), "chat", CHAT, "")
        reader = llm_proxy.UsageReader(asked, True, False)
        self.assertEqual(reader.feed(b"\x0b\x02"), b"\x0b\x02")
        self.assertEqual((reader.ending(True), reader.output_characters()), ("ok", 2))

    def test_what_is_said_twice_is_counted_once_and_scripts_have_their_weight(self):
        for parts, weight in self.each([
                ({"reasoning": "think", "reasoning_content": "think", "content": None}, 5),
                ({"reasoning": "think", "reasoning_details": [{"text": "think"}]}, 5),
                ({"reasoning": "think", "content": "say"}, 8),
                ({"content": "\u4f60" * 600}, 1600)]):
            chunks = events({"choices": [{"delta": parts}]}) * 2
            self.assertEqual(self.hear(chunks)[3], 2 * weight)
            whole = encoded({"choices": [{"message": parts}]})
            self.assertEqual(self.hear(whole, streamed=False)[3], weight)


class DialectsTest(ProxyCase):
    GENERATE = "/v1beta/models/m:generateContent"
    METERED = """
        /v1/responses //v1/responses/ /v1/embeddings /v1/%65mbeddings
        /v1/messages /v1/Messages /messages /x/v1/messages
        /v1beta/models/m:generateContent /v1/models/m:streamGenerateContent
        /v1beta/tunedModels/m:generateContent /v1/rerank /v1/images/generations
        /v1/threads/t/messages
        /v1beta/interactions /v1/interactions/ /v1/fim/completions /v1/agents/completions
        /v1/chat/completions/batch /api/chat /api/generate /api/embed /API//embeddings
        /openai/deployments/m/chat/completions /openai/deployments/m/embeddings"""
    UNMETERED = """
        /v1/messages/count_tokens /v1beta/models/m:countTokens /v1/responses/r/cancel"""
    SHOWN = """
        /v1/chat/completions -> Authorization: Bearer sk-1
        /v1/chat/completions -> x-api-key: sk-1
        /v1/chat/completions -> x-goog-api-key: sk-1
        /v1/chat/completions?key=sk-1 -> X-A: b
        /v1/chat/completions?a=b&key=sk%2D1&c=d -> X-A: b
        /v1/chat/completions?k%65y=sk-1 -> x-api-key: sk-1"""
    ESTIMATES = json.loads("""[
        ["/v1/responses",
            {"input": "PROMPT", "max_output_tokens": 100}, 110],
        ["/v1/messages",
            {"messages": "PROMPT", "max_tokens": 100}, 110],
        ["/v1beta/models/m:generateContent",
            {"contents": "PROMPT", "generationConfig": {"maxOutputTokens": 100}}, 110],
        ["/v1beta/models/m:generateContent",
            {"contents": "PROMPT", "generation_config": {"max_output_tokens": 5}}, 15],
        ["/v1beta/models/m:generateContent",
            {"contents": "PROMPT"}, 266],
        ["/v1beta/interactions",
            {"input": "PROMPT", "generation_config": {"max_output_tokens": 100}}, 110],
        ["/v1/fim/completions",
            {"prompt": "PROMPT", "max_tokens": 100}, 110],
        ["/api/chat",
            {"messages": "PROMPT", "options": {"num_predict": 100}}, 110],
        ["/api/generate",
            {"prompt": "PROMPT", "options": null}, 266],
        ["/api/embed",
            {"input": "PROMPT"}, 266]]""".replace("PROMPT", "ten tokens" * 4))
    MISSPELLED = """
        /v1beta/models/m%3AgenerateContent /v1beta/models/m:generatecontent
        /v1beta//models/m:generateContent /openai/deployments/m//chat/completions"""

    def ask_at(self, path, *fields, key="k", **payload):
        return self.post(path, payload, *fields, key=key)

    def test_errors_come_in_the_shape_of_the_dialect(self):
        self.start(PROXY_API_KEYS="sk-1")
        for path, expected in self.each([
                ("/v1/messages", '{"type": "error", "error": {"type": "authentication_error"}}'),
                (self.GENERATE, '{"error": {"code": 401, "status": "UNAUTHENTICATED"}}'),
                ("/v1/responses", '{"error": {"type": "authentication_error", '
                                  '"code": "invalid_api_key", "param": null}}')]):
            answered = self.ask_at(path, key="wrong")
            told = answered.json()
            self.assertIn("API key", told["error"].pop("message"))
            self.assertEqual((answered.status, told), (401, json.loads(expected)))
        for path in self.each(["/api/chat", "/api/pull"]):
            told = self.ask_at(path, key="wrong").json()
            self.assertEqual(told, {"error": "Missing or invalid proxy API key"})
            self.assertEqual(answered.get("x-should-retry"), "false")

    def test_every_kind_of_credential_is_the_same_caller_and_none_goes_upstream(self):
        self.start(MAX_TOKENS=10)
        for number, row in enumerate(self.each(self.SHOWN)):
            answered = self.ask_at(*row, key=None, model="m")
            self.assertEqual(answered.get("x-ratelimit-remaining"), str(9 - number))
            asked = self.stub.last
            self.assertNotIn(b"sk-1", asked.head)
            self.assertNotIn("key", asked.target)
        self.assertEqual(self.stub.requests[4].target, CHAT + "?a=b&c=d")
        self.assertNotIn("sk-1", self.lines.text())
        self.assertEqual(self.ask_at(CHAT + "?key=sk-2", key="sk-1").status, 400)

    def test_every_api_is_metered_in_whatever_spelling_and_counting_tokens_is_not(self):
        self.start(MAX_TOKENS=1)
        for path in self.each(self.METERED.split()):
            self.ask_at(path, key=path, model="m")
            calls = self.stub.calls
            self.ask_at(path, key=path, model="m")
            self.assert_calls(calls)
        for path in self.each(self.MISSPELLED.split()):
            self.assertEqual(self.ask_at(path).status, 400)
        for path in self.each(self.UNMETERED.split() * 3):
            self.assertIsNone(self.ask_at(path, key=path).get("x-ratelimit-limit"))

    def test_the_model_is_replaced_wherever_it_stands(self):
        self.start(BASE_MODEL="real")
        for path in self.each("""/v1/responses /v1/messages /v1/embeddings /v1beta/interactions
                /api/chat /v1/chat/completions/batch""".split()):
            self.ask_at(path, model="asked")
            self.assertEqual(self.stub.last.json()["model"], "real")
        for target in self.each(["/v1beta/models/%s:streamGenerateContent?alt=sse",
                                 "/openai/deployments/%s/chat/completions?api-version=1"]):
            self.ask_at(target % "asked")
            self.assertEqual(self.stub.last.target, target % "real")

    def test_a_path_and_a_payload_cannot_name_two_models(self):
        self.start(MODEL_ALIASES="fast=gpt-5")
        for path, asked, served in self.each(
                ("/openai/deployments/%s/completions", "/OpenAI/Deployments/%s/completions"),
                ("fast", "gpt-5"), ("gpt-5",)):
            self.ask_at(path % asked, model="other")
            asked = self.stub.last
            self.assertEqual((asked.target, asked.json()), (path % served, {"model": served}))

    def test_estimates_know_each_api_s_maximum(self):
        for path, payload, cost in self.each(self.ESTIMATES):
            self.start(TOKEN_COST_MODE="estimate")
            self.assertEqual(self.ask_at(path, **payload).status, 200)
            self.assertEqual(1000 - self.left("k"), cost)
        self.assertEqual(self.ask_at(self.GENERATE, generationConfig=3).status, 400)

    def test_who_the_callers_user_is_does_not_go_upstream(self):
        self.ask(call("k", "X-OpenWebUI-User-Email: a@example.org"))
        self.assertNotIn(b"example.org", self.stub.last.head)


class LimitReplyTest(ProxyCase):
    """The assistant that says 'limit reached', in the shape of every API."""
    SAID = "limit reached, wait 5 min"
    GEMINI = "/v1beta/models/asked:"
    GEMINI_REPLY = """{
        "candidates": [{
            "content": {"parts": [{"text": "limit reached, wait 5 min"}], "role": "model"},
            "finishReason": "STOP", "index": 0}],
        "usageMetadata": {"promptTokenCount": 0, "candidatesTokenCount": 0,
                          "totalTokenCount": 0},
        "modelVersion": "asked", "responseId": "limit-ID"}"""
    WHOLE = {
        CHAT: """{
            "id": "chatcmpl-limit-ID", "created": 1700001000, "object": "chat.completion",
            "model": "asked",
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
            "choices": [{
                "index": 0, "logprobs": null, "finish_reason": "stop",
                "message": {"role": "assistant", "content": "limit reached, wait 5 min"}}]}""",
        "/v1/completions": """{
            "id": "cmpl-limit-ID", "created": 1700001000, "object": "text_completion",
            "model": "asked",
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
            "choices": [{"index": 0, "logprobs": null, "finish_reason": "stop",
                         "text": "limit reached, wait 5 min"}]}""",
        "/v1/responses": """{
            "id": "resp_limit_ID", "object": "response", "created_at": 1700001000,
            "status": "completed", "model": "asked",
            "output": [{
                "type": "message", "id": "msg_limit_ID", "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "limit reached, wait 5 min",
                             "annotations": [], "logprobs": []}]}],
            "error": null, "incomplete_details": null, "instructions": null, "metadata": {},
            "parallel_tool_calls": true, "temperature": null, "tool_choice": "auto",
            "tools": [], "top_p": null, "previous_response_id": null,
            "usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
                      "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                      "output_tokens_details": {"reasoning_tokens": 0}}}""",
        "/v1/messages": """{
            "id": "msg_limit_ID", "type": "message", "role": "assistant", "model": "asked",
            "content": [{"type": "text", "text": "limit reached, wait 5 min"}],
            "stop_reason": "end_turn", "stop_sequence": null,
            "usage": {"input_tokens": 0, "output_tokens": 0}}""",
        "/v1beta/models/asked:generateContent": GEMINI_REPLY,
        "/v1beta/models/asked:streamGenerateContent": "[%s]" % GEMINI_REPLY,
        "/openai/deployments/asked/completions": """{
            "id": "cmpl-limit-ID", "created": 1700001000, "object": "text_completion",
            "model": "asked",
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
            "choices": [{"index": 0, "logprobs": null, "finish_reason": "stop",
                         "text": "limit reached, wait 5 min"}]}""",
        "/v1beta/interactions": """{
            "id": "limit-ID", "object": "interaction", "model": "asked", "status": "completed",
            "role": "model", "created": "2023-11-14T22:30:00Z", "updated": "2023-11-14T22:30:00Z",
            "steps": [{"type": "model_output",
                       "content": [{"type": "text", "text": "limit reached, wait 5 min"}]}],
            "usage": {"total_input_tokens": 0, "total_output_tokens": 0, "total_thought_tokens": 0,
                      "total_cached_tokens": 0, "total_tool_use_tokens": 0, "total_tokens": 0}}""",
        "/api/chat": """{
            "model": "asked", "created_at": "2023-11-14T22:30:00Z",
            "message": {"role": "assistant", "content": "limit reached, wait 5 min"},
            "done": true, "done_reason": "stop", "total_duration": 0, "load_duration": 0,
            "prompt_eval_count": 0, "prompt_eval_duration": 0, "eval_count": 0,
            "eval_duration": 0}""",
        "/api/generate": """{
            "model": "asked", "created_at": "2023-11-14T22:30:00Z",
            "response": "limit reached, wait 5 min",
            "done": true, "done_reason": "stop", "total_duration": 0, "load_duration": 0,
            "prompt_eval_count": 0, "prompt_eval_duration": 0, "eval_count": 0,
            "eval_duration": 0}"""}
    CHOICES = {  # of each event of a stream
        CHAT: """[
            [{"index": 0, "logprobs": null, "finish_reason": null,
              "delta": {"role": "assistant", "content": ""}}],
            [{"index": 0, "logprobs": null, "finish_reason": null,
              "delta": {"content": "limit reached, wait 5 min"}}],
            [{"index": 0, "logprobs": null, "finish_reason": "stop", "delta": {}}]]""",
        "/v1/completions": """[
            [{"index": 0, "logprobs": null, "finish_reason": null,
              "text": "limit reached, wait 5 min"}],
            [{"index": 0, "logprobs": null, "finish_reason": "stop", "text": ""}]]"""}
    ODD_OPTIONS = """
        {"n": 0}
        {"n": -5}
        {"n": true}
        {"n": "3"}
        {"n": null}
        {"n": 1000000000}
        {"stream_options": []}
        {"response_format": null, "tool_choice": "auto", "grammar": "", "json_schema": {}}
        {"response_format": {"type": "text"}, "function_call": "none", "suffix": null}
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}}"""
    # What a machine parses, by path
    PARSED = {
        CHAT: """
            {"response_format": 1}
            {"response_format": {"type": "json_object"}}
            {"response_format": {"type": "json_schema", "json_schema": {}}}
            {"tool_choice": "required"}
            {"tool_choice": "any"}
            {"tool_choice": {"type": "function", "function": {"name": "f"}}}
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required"}}}
            {"function_call": {"name": "f"}}
            {"grammar": "root ::= x"}
            {"json_schema": {"type": "object"}}
            {"structured_outputs": {"choice": ["a"]}}
            {"guided_json": {"type": "object"}}
            {"guided_regex": "a+"}
            {"grammar_string": "root ::= x"}
            {"guided_choice": ["a", "b"]}
            {"guided_grammar": "root ::= x"}
            {"stream": true, "guided_regex": "a+"}""",
        "/v1/completions": """
            {"suffix": "def f"}
            {"prompt": "<|fim_prefix|>x<|fim_suffix|>y<|fim_middle|>"}
            {"prompt": "<|editable_region_start|>x<|user_cursor_is_here|>"}
            {"prediction": {"type": "content", "content": "x"}}
            {"guided_decoding": {"json": {}}}
            {"suffix": ""}
            {"grammar": "root ::= x"}""",
        "/v1/edit/completions": """
            {"messages": [{"role": "user", "content": "<|code_to_edit|>"}]}""",
        "/v1/responses": """
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}}
            {"text": {"format": {"type": "json_object"}}}
            {"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": []}}
            {"tool_choice": {"type": "file_search"}}""",
        "/v1/messages": """
            {"output_format": {"type": "json_schema", "schema": {}}}
            {"output_config": {"format": {"type": "json_schema", "schema": {}}}}
            {"tool_choice": {"type": "any"}}
            {"tool_choice": {"type": "tool", "name": "f"}}""",
        "/v1beta/models/asked:generateContent": """
            {"generationConfig": {"responseMimeType": "application/json"}}
            {"generationConfig": {"response_mime_type": "text/x.enum"}}
            {"generation_config": {"responseSchema": {"type": "OBJECT"}}}
            {"generationConfig": {"responseJsonSchema": {"type": "object"}}}
            {"toolConfig": {"functionCallingConfig": {"mode": "ANY"}}}
            {"tool_config": {"function_calling_config": {"mode": "ANY"}}}""",
        "/v1beta/interactions": """
            {"response_format": {"type": "text", "mime_type": "application/json"}}
            {"response_mime_type": "application/json"}
            {"generation_config": {"tool_choice": "any"}}
            {"background": true}""",
        "/v1/embeddings": """
            {"input": "x"}""",
        "/v1beta/models/asked:embedContent": """
            {"content": {"parts": [{"text": "x"}]}}""",
        "/v1/agents/completions": """
            {"tool_choice": "any"}""",
        "/v1/fim/completions": """
            {"prompt": "def f("}""",
        "/v1/chat/completions/batch": """
            {"messages": [[{"role": "user", "content": "hello"}]]}""",
        "/api/chat": """
            {"format": "json"}
            {"format": {"type": "object"}, "stream": false}""",
        "/api/generate": """
            {"suffix": "return"}
            {"raw": true}""",
        "/api/embed": """
            {"input": "hello"}"""}
    SPOKEN = {
        "/v1/responses": """
            {"text": {"format": {"type": "text"}, "verbosity": "low"}}
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}""",
        "/v1/messages": """
            {"output_config": {"effort": "low"}, "tool_choice": {"type": "auto"}}""",
        "/v1beta/models/asked:generateContent": """
            {"generationConfig": {"responseMimeType": "text/plain"}}
            {"toolConfig": {"functionCallingConfig": {"mode": "AUTO"}}}"""}
    MODES = """
        assistant -> X-A: b -> 200
        error -> X-A: b -> 429
        error -> User-Agent: Mozilla/5.0 (X11) -> 429
        auto -> X-A: b -> 429
        auto -> User-Agent: OpenAI/Python 1.0 -> 429
        auto -> User-Agent: Mozilla/5.0 (X11) -> 200
        auto -> User-Agent: claude-cli/2.0.1 (external, cli) -> 200
        auto -> User-Agent: codex_cli_rs/0.99.0 (Debian 12) -> 200
        auto -> User-Agent: codex-tui/0.150.1 (Mac OS 26.5.0) -> 200
        auto -> User-Agent: GeminiCLI/0.20.0/gemini-2.5-pro (linux; x64) -> 200
        auto -> User-Agent: opencode/1.0.1 ai-sdk/provider-utils/3.0 -> 200
        auto -> User-Agent: QwenCode/0.2.0 (linux; x64) -> 200
        auto -> User-Agent: KimiCLI/1.12.0 -> 200
        auto -> User-Agent: RooCode/3.36 -> 200
        auto -> X-OpenWebUI-User-Id: 7 -> 200"""
    EVENT_NAMES = {
        "/v1/responses": """
            response.created response.in_progress response.output_item.added
            response.content_part.added response.output_text.delta response.output_text.done
            response.content_part.done response.output_item.done response.completed""",
        "/v1/messages": """
            message_start content_block_start content_block_delta
            content_block_stop message_delta message_stop"""}

    def limited(self, path=CHAT, *fields, **payload):
        """The answer to a call at an empty bucket."""
        data = request("POST", path, {"model": "asked", **payload}, *fields)
        self.ask(data)
        answered = self.ask(data)
        self.assertEqual((answered.whole, self.stub.calls), (True, 1))
        return answered

    def start_empty(self, **settings):
        self.start_clock(MAX_TOKENS=1, **settings)
        self.ask()

    def events(self, answered):
        """[(the event's name or None, its data)] of a stream."""
        self.assertEqual(answered.get("content-type"), "text/event-stream")
        *blocks, rest = answered.body.decode().split("\n\n")
        self.assertEqual(rest, "")
        return [re.fullmatch("(?:event: (.*)\n)?data: (.*)", block).groups() for block in blocks]

    def chunks(self, *arguments, **payload):
        """The events of a stream that OpenAI's older endpoints give."""
        answered = self.limited(*arguments, stream=True, **payload)
        *found, done = self.events(answered)
        self.assertEqual((answered.status, done), (200, (None, "[DONE]")))
        return [json.loads(data) for _, data in found]

    def assert_reply(self, data, expected):
        data = re.sub("[0-9a-f]{24}", "ID", data)
        self.assertEqual(json.loads(data), json.loads(expected))

    def test_the_reply_of_each_api_as_json(self):
        self.start_empty()
        for path, expected in self.each(self.WHOLE.items()):
            answered = self.limited(path, stream=False)
            found = answered.status, answered.get("content-type"), answered.get("retry-after")
            self.assertEqual(found, (200, "application/json", "300"))
            self.assert_reply(answered.body.decode(), expected)

    def test_chat_and_completions_as_a_stream(self):
        self.start_empty()
        for path, choices in self.each(self.CHOICES.items()):
            chunks = self.chunks(path)
            self.assertEqual([one.pop("choices") for one in chunks], json.loads(choices))
            kind = "chat.completion.chunk" if path == CHAT else "text_completion"
            rest = {"id": chunks[0]["id"], "created": 1700001000, "object": kind, "model": "asked"}
            self.assertEqual(chunks, [rest] * len(chunks))

    def test_the_streams_of_responses_and_messages_name_their_events(self):
        self.start_empty()
        for path, kinds in self.each(self.EVENT_NAMES.items()):
            found = self.events(self.limited(path, stream=True))
            self.assertEqual([name for name, _ in found], kinds.split())
            told = [json.loads(data) for _, data in found]
            self.assertEqual([one["type"] for one in told], kinds.split())
            self.assertIn(self.SAID, json.dumps(told))

    def test_interactions_stream_named_events_and_an_end(self):
        self.start_empty()
        *found, end = self.events(self.limited("/v1beta/interactions", stream=True))
        self.assertEqual(end, (None, "[DONE]"))
        told = [json.loads(data) for _, data in found]
        self.assertEqual([name for name, _ in found], [one["event_type"] for one in told])
        self.assertEqual(told[2]["delta"], {"type": "text", "text": self.SAID})
        self.assertEqual(told[-1]["interaction"]["status"], "completed")

    def test_ollama_streams_lines_unless_it_is_told_not_to(self):
        self.start_empty()
        for path, payload in self.each(
                ("/api/chat", "/api/generate"), ({}, {"stream": True}, {"stream": None})):
            answered = self.limited(path, **payload)
            self.assertEqual(answered.get("content-type"), "application/x-ndjson")
            told = [json.loads(line) for line in answered.body.splitlines()]
            said = [one["response"] if path == "/api/generate" else one["message"]["content"]
                    for one in told]
            found = [(one["done"], text) for one, text in zip(told, said)]
            self.assertEqual(found, [(False, self.SAID), (True, "")])

    def test_gemini_streams_events_where_they_were_asked_for(self):
        self.start_empty()
        answered = self.limited(self.GEMINI + "streamGenerateContent?alt=sse")
        (_, data), = self.events(answered)
        self.assert_reply(data, self.GEMINI_REPLY)

    def test_a_stream_tells_its_usage_where_that_was_asked_for(self):
        self.start_empty()
        nothing = json.loads(self.WHOLE[CHAT])["usage"]
        for path in self.each([CHAT, "/v1/completions"]):
            *chunks, last = self.chunks(path, stream_options={"include_usage": True})
            self.assertEqual((last["choices"], last["usage"]), ([], nothing))
            self.assertEqual({one["usage"] for one in chunks}, {None})

    def test_as_many_choices_are_given_as_were_asked_for(self):
        self.start_empty()
        choices = self.limited(n=3).json()["choices"]
        self.assertEqual([choice["index"] for choice in choices], [0, 1, 2])
        choices = [choice for one in self.chunks(n=2) for choice in one["choices"]]
        self.assertEqual({choice["index"] for choice in choices}, {0, 1})
        payload = self.limited("/v1/completions", prompt=["a", "b"], n=2).json()
        self.assertEqual(len(payload["choices"]), 4)

    def test_a_small_call_does_not_make_a_large_reply(self):
        self.start_empty()
        chunks = self.chunks(n=128, model="m" * 256)
        self.assertEqual({one["model"] for one in chunks}, {"m" * 64})
        self.assertEqual(len(chunks), 12)

    def test_odd_options_do_not_break_it(self):
        self.start_empty()
        for odd, in self.each(self.ODD_OPTIONS):
            choices = self.limited(**json.loads(odd)).json()["choices"]
            self.assertEqual(choices[0]["message"]["content"], self.SAID)
            self.assertLessEqual(len(choices), 4)

    def test_where_a_machine_parses_the_words_the_limit_is_an_error(self):
        self.start_empty()
        for tables, status in ((self.PARSED, 429), (self.SPOKEN, 200)):
            rows = [(path, payload) for path, text in tables.items()
                    for payload in text.strip().splitlines()]
            for path, payload in self.each(rows):
                answered = self.limited(path, **json.loads(payload))
                self.assertEqual(answered.status, status)

    def test_where_no_assistant_can_speak_the_limit_is_an_error(self):
        self.start_empty()
        answered = self.limited("/v1/embeddings", input="x")
        answered.tells("type", "rate_limit_error")
        self.assertEqual((answered.status, answered.get("retry-after")), (429, "300"))

    def test_gemini_embeddings_are_metered_and_limited_by_an_error(self):
        for method in self.each(["embedContent", "batchEmbedContents"]):
            self.start(MAX_TOKENS=1)
            answered = self.limited(self.GEMINI + method, content={"parts": [{"text": "x" * 40}]})
            self.assert_entry("input", 10)
            found = answered.status, answered.json()["error"]["status"]
            self.assertEqual(found, (429, "RESOURCE_EXHAUSTED"))

    def test_programs_may_be_told_by_an_error(self):
        for mode, field, status in self.each(self.MODES):
            self.start_empty(LIMIT_REPLY=mode)
            answered = self.limited(CHAT, field, stream=True)
            found = answered.status, answered.get("retry-after"), answered.get("x-should-retry")
            expected = {"200": (200, "300", None), "429": (429, "300", "false")}
            self.assertEqual(found, expected[status])

    def test_programs_are_not_told_to_stop_trying_where_the_wait_is_short(self):
        self.start_empty(LIMIT_REPLY="error", REFILL_INTERVAL_SECONDS=60)
        answered = self.limited("/v1/messages")
        self.assertIsNone(answered.get("x-should-retry"))
        self.assertEqual(answered.json()["error"]["type"], "rate_limit_error")

    def test_codex_is_told_when_to_come_again_where_it_would_sleep_so_long(self):
        """It reads the error's type and resets_at; otherwise it sleeps as Retry-After says."""
        codex = "User-Agent: codex_cli_rs/0.99.0"
        for seconds, fields, wait, told in self.each([
                (3600, (codex,), None, ("usage_limit_reached", 1700004600)),
                (3600, (), "3600", ("rate_limit_error", None)),
                (30, (codex,), "30", ("rate_limit_error", None))]):
            self.start_empty(LIMIT_REPLY="error", REFILL_INTERVAL_SECONDS=seconds)
            answered = self.limited("/v1/responses", *fields)
            error = answered.json()["error"]
            found = answered.get("retry-after"), (error["type"], error.get("resets_at"))
            self.assertEqual((answered.status, *found), (429, wait, told))
        self.start(LIMIT_REPLY="error", LIMITS="each 5 tokens per day")
        answered = self.ask(call(None, codex, max_tokens=100))
        self.assertEqual(answered.json()["error"]["resets_at"], None)

    def test_geminis_clients_are_told_the_wait_as_google_tells_it(self):
        """Gemini CLI gives up at once where it is above 5 minutes."""
        self.start_empty(LIMIT_REPLY="error", REFILL_INTERVAL_SECONDS=3600)
        answered = self.limited(self.GEMINI + "generateContent")
        self.assertEqual(answered.json()["error"]["details"], [{
            "@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "3600s"}])

    def test_it_tells_the_bucket_in_its_header(self):
        self.start_empty()
        answered = self.limited()
        names = ("limit", "remaining", "refill-tokens", "refill-seconds", "reset-seconds")
        found = [answered.get("x-ratelimit-" + name) for name in names]
        self.assertEqual(found, ["1", "0", "2", "300", "300"])

    def test_a_message_of_the_operator_is_sent_whatever_it_contains(self):
        message = 'dis "donc" – {wait} \\ 100% {x}'
        self.start_empty(LIMIT_MESSAGE=message, REFILL_INTERVAL_SECONDS=7)
        said = self.limited().json()["choices"][0]["message"]["content"]
        self.assertEqual(said, message.replace("{wait}", "7s"))


# --------------------------------------------------------------------------------------------------
# Redaction: the way up
# --------------------------------------------------------------------------------------------------

KINDS = REDACTED
TRUE_ONES = """\
email -> write to bob@example.com. -> bob@example.com
email -> <o'neil+x_1.y@mail.co-op.example.museum>, -> o'neil+x_1.y@mail.co-op.example.museum
email -> mailto:a@b.co?x=1 -> a@b.co
email -> 收件人bob@example.com。 -> bob@example.com
email -> user=bob@example.com&x -> bob@example.com
email -> bob@example.com-x -> bob@example.com
email -> of bob@mail.example.org.1 -> bob@mail.example.org
card -> card 4111111111111111, -> 4111111111111111
card -> 4111 1111 1111 1111 123 -> 4111 1111 1111 1111
card -> in 2027 4111-1111-1111-1111 -> 4111-1111-1111-1111
card -> 卡号4111111111111111。 -> 4111111111111111
card -> 3782 822463 10005 -> 3782 822463 10005
card -> 4222 2222 2222 2; -> 4222 2222 2222 2
card -> 6304 0000 0000 0000 000 -> 6304 0000 0000 0000 000
iban -> DE89 3704 0044 0532 0130 00 AND -> DE89 3704 0044 0532 0130 00
iban -> GB29NWBK60161331926819. -> GB29NWBK60161331926819
phone -> call +49 171 1234567 -> +49 171 1234567
phone -> +1 (555) 234-5678, -> +1 (555) 234-5678
phone -> +33.1.23.45.67.89 -> +33.1.23.45.67.89
ssn -> 078-05-1120 -> 078-05-1120
ssn -> in 2027 219 09 9999. -> 219 09 9999
ip -> http://8.8.8.8:80/ -> 8.8.8.8
ip -> Lost connection 8.8.8.8 -> 8.8.8.8
ip -> ["8.8.4.4", 53] -> 8.8.4.4
ip -> ip=2.7.2.2, down -> 2.7.2.2
ip -> ("2.7.2.134", 53) -> 2.7.2.134
ip -> 2.7.2.2:53 -> 2.7.2.2
ip -> {"ip": "5.9.7.12"} -> 5.9.7.12
ip -> nameserver 1.0.0.1 -> 1.0.0.1
ip -> ping 5.9.7.12 -> 5.9.7.12
ip -> my IP 5.9.7.12 -> 5.9.7.12
ip -> client 5.9.7.12 port 22 -> 5.9.7.12
ip -> '4.2.2.2' -> 4.2.2.2
ip -> version 2, client 5.9.7.12 -> 5.9.7.12
ip -> version 2 runs at 5.9.7.12 -> 5.9.7.12
ip -> version 2 listens on 5.9.7.12 -> 5.9.7.12
ip -> 5.9.7.12 - - [10/Oct/2026:13:55:36] -> 5.9.7.12
ip -> from [2a00:1450:4001:81b::200e] -> 2a00:1450:4001:81b::200e
secrets -> sk-ant-api03-%(long)s -> sk-ant-api03-%(long)s
secrets -> key: ghp_%(long)s"; -> ghp_%(long)s
secrets -> AKIAIOSFODNN7EXAMPLE -> AKIAIOSFODNN7EXAMPLE
secrets -> eyJ%(long)s.eyJ%(long)s.%(long)s -> eyJ%(long)s.eyJ%(long)s.%(long)s
""" % {"long": "a1B2" * 9}
FALSE_ONES = """\
x = weights@self.weight(3)
git@github.com:owner/name.git
https://user:pass@example.com/
@decorator.name
a@b.c1
4111111111111112
1.4111111111111111
54111111111111111111
4111-1111-1111-1111-1111-1111
a4111111111111111 4111111111111111.5 41111111-1111-1111-1111-111111111111
4000 4100 4200 4300 4400 4500 4600 4700 4800 4900 5000 5100
DE88 3704 0044 0532 0130 00
DE89370400440532013000A XX89370400440532013000
1.0.0+4917112345678
+36450.6 +1234567890 x+4917112345678
000-12-3456 666-12-3456 912-12-3456 123-00-4567 123-45-0000 1-123-45-6789
x 1 219 09 9999 22
192.168.1.1 10.0.0.1 127.0.0.1 203.0.113.9 v8.8.8.8 ==8.8.8.8 1.2.3.4.5 256.1.1.1
OID 2.5.29.15, versions 2.7.2.2 1.1.4.3, e.g. ['7.1.4.34', 1806]
sections "8.2.4.44 Bogus" and "8.2.4.45 Markup"
pip 9.0.1.2 Chrome/8.8.8.8 version 8.8.8.8 "version": "8.8.8.8" 4.0.0.0 08.8.8.8
2001:db8::1 2024:05:12 dead::beef ::1 12:30:45
sk-toggleable-content-label-arrow disk-usage1234567890123456789 sk-short1
"""


class Drawn(Random):
    """Draws what is masked, as it is written."""

    def digits(self, count):
        return "".join(self.choices("0123456789", k=count))

    def letters(self, count, alphabet="abcdefghijkmnpqrstuvwxyz"):
        return "".join(self.choices(alphabet, k=count))

    def card(self):
        begin, size = self.choice((
            ("4", 16), ("51", 16), ("2221", 16), ("34", 15), ("6011", 16), ("62", 19)))
        number = begin + self.digits(size - len(begin) - 1)
        check = sum([sum(divmod(2 * int(one), 10)) for one in number[::-2]])
        return number + str(-(check + sum(map(int, number[-2::-2]))) % 10)

    def iban(self):
        country, size = self.choice((("DE", 22), ("FR", 27), ("NL", 18), ("NO", 15)))
        account = self.digits(size - 4)
        number = "".join([str(int(one, 36)) for one in account + country]) + "00"
        return "%s%02d%s" % (country, 98 - int(number) % 97, account)

    def grouped(self, text, between):
        """As it is, or in groups of four."""
        groups = between.join([text[at:at + 4] for at in range(0, len(text), 4)])
        return self.choice((text, groups))

    def phone(self):
        return self.choice((
            "+49 151 " + self.digits(8), "+1 415-555-" + self.digits(4), "+4479" + self.digits(8)))

    def ssn(self):
        return "%03d-%02d-%04d" % (
            self.randrange(1, 600), self.randrange(1, 100), self.randrange(1, 10_000))

    def secret(self):
        begin, size = self.choice((
            ("sk-proj-", 40), ("ghp_", 36), ("glpat-", 20), ("hf_", 34), ("AIza", 35)))
        return begin + self.letters(size, "aBcDeFgHiJkL0123456789")

    def sorts(self):
        """Returns {kind: what draws one}."""
        return {
            "email": lambda: "%s.%s@%s.example.org" % (
                self.letters(5), self.digits(3), self.letters(6)),
            "card": lambda: self.grouped(self.card(), self.choice(" -")),
            "iban": lambda: self.grouped(self.iban(), " "), "phone": self.phone,
            "ssn": self.ssn, "secrets": self.secret,
            "ip": lambda: "%d.%d.%d.%d" % (
                self.randrange(11, 100), *[self.randrange(1, 256) for _ in range(3)])}

def finish(steps):
    """Take all steps at once; returns what the last one returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class RedactionTest(ProxyCase):
    """What must not leave is found, and taken out of calls on their way up."""

    def found(self, text, kinds=KINDS, **options):
        redactor = Redactor(kinds, **options)
        return [(kind, text[start:end]) for start, end, kind in redactor.find(text)]

    def masked(self, payload, kinds=("email", "card")):
        """Returns the Masks of a payload, and what goes up of it."""
        masks = Masks(Redactor(kinds))
        body = encoded(payload)
        return masks, finish(masks.mask_payload(json.loads(body), body))

    def test_each_kind_is_found_as_it_is_written(self):
        for kind, text, value in self.each(TRUE_ONES):
            self.assertEqual(self.found(text), [(kind, value)])
            self.assertEqual(self.found(text, [kind]), [(kind, value)])
            self.assertEqual(self.found(text, set(KINDS) - {kind}), [])

    def test_what_only_looks_like_it_is_none(self):
        for text in self.each(FALSE_ONES.splitlines()):
            self.assertEqual(self.found(text), [])

    def test_an_address_is_found_whole_whatever_stands_before_it(self):
        for before, value in self.each("""
                {"url":"http://localhost:3000","email":" -> al@corp.com
                https://example.com:443?email= -> bob@corp.com
                (http://h:80)< -> dan@corp.com
                mail -> alice.smith+work+x@corp.com
                mail -> alice++x@corp.com
                mail -> bob%corp.com@relay.com
                mail -> data-user-profile-settings-primary-contact-address-al@corp.com"""):
            self.assertEqual(self.found("%s%s, too" % (before, " " * before.isalpha() + value)),
                             [("email", value)])
        far = "a-" * 40 + "bob@corp.com"
        self.assertTrue(self.found(far)[0][1].endswith("-bob@corp.com"))

    def test_a_private_key_is_found_in_lines_and_in_a_string_of_code(self):
        key = KEY_AND_CERTIFICATE.partition("-----BEGIN CERT")[0].strip()
        for one in self.each((key, key.replace("\n", "\\n"), key.partition("-----END")[0].strip())):
            self.assertEqual(self.found("x = '%s'" % one)[0][1].strip(), one)
        self.assertEqual(self.found('"-----BEGIN PRIVATE KEY-----" in text or text.starts()'), [])

    def test_numbers_of_phones_are_known_at_home(self):
        for country, number in self.each("""\
                US -> (555) 234-5678
                US -> 555-234-5678
                DE -> 0171/1234567
                FR -> 06 12 34 56 78
                ES -> 612 345 678
                DK -> 20 12 34 56"""):
            self.assertEqual(self.found("at %s," % number), [])
            self.assertEqual(
                self.found("at %s," % number, countries=[country]), [("phone", number)])

    def test_ten_thousand_ids_of_each_sort_stay(self):
        draw = Random(1)
        sorts = (
            lambda: str(uuid.UUID(int=draw.getrandbits(128), version=4)),
            lambda: "%040x" % draw.getrandbits(160),
            lambda: str(draw.randrange(10 ** 9, 2 * 10 ** 9) * 10 ** draw.choice((0, 3, 6, 9))),
            lambda: "%d.%d.%d+%d" % tuple(draw.choices(range(40), k=3) + [draw.getrandbits(40)]),
            lambda: "SKU-%08d-%04d" % (draw.getrandbits(26), draw.getrandbits(13)),
            lambda: self.product(draw.randrange(2 * 10 ** 11, 10 ** 12)),
            lambda: base64.b64encode(draw.getrandbits(512).to_bytes(64, "big")).decode())
        for sort in self.each(sorts):
            self.assertEqual(self.found("\n".join([sort() for _ in range(10_000)])), [])

    def test_five_hundred_true_ones_of_each_kind_are_found(self):
        draw = Drawn(2)
        for kind, sort in self.each(draw.sorts().items()):
            values = [sort() for _ in range(500)]
            found = self.found("".join(["see %s, or\n" % value for value in values]), [kind])
            self.assertEqual([value for _, value in found], values)

    @staticmethod
    def product(number):
        """The 13 digits of an EAN."""
        digits = "%012d" % number
        total = sum(map(int, digits[::2])) + 3 * sum(map(int, digits[1::2]))
        return digits + str(-total % 10)

    def test_a_search_in_slices_finds_what_lies_across_them(self):
        value = "bob@example.com"
        redactor = Redactor(["email", "card"])
        size = redactor.SLICE
        for at in (0, size - len(value), size - 7, size - 1, size, 2 * size - 3):
            text = " " * at + value + " " * (3 * size - at)
            self.assertEqual([one[:2] for one in redactor.find(text)], [(at, at + len(value))])

    def test_placeholders_are_numbered_in_the_order_in_which_a_prompt_is_read(self):
        masks, sent = self.masked({
            "messages": [{"role": "user", "content": "b@x.org c@x.org b@x.org [[EMAIL_2]]"}],
            "system": "a@x.org"})
        self.assertEqual(sent["system"], "[[EMAIL_1]]")
        self.assertEqual(sent["messages"][0]["content"],
                         "[[EMAIL_3]] [[EMAIL_4]] [[EMAIL_3]] [[EMAIL_2]]")
        self.assertEqual((masks.values.get("[[EMAIL_4]]"), masks.values.get("[[EMAIL_2]]")),
                         ("c@x.org", None))

    def test_what_somebody_wrote_is_masked_wherever_it_stands(self):
        for text, in self.each("""\
                {"messages": [{"content": "@"}]}
                {"messages": [{"content": [{"type": "text", "text": "@"}]}]}
                {"messages": [{"tool_calls": [{"function": {"arguments": "{\\"a\\": \\"@\\"}"}}]}]}
                {"messages": [{"role": "tool", "content": "@"}]}
                {"messages": [{"content": [{"type": "tool_use", "input": {"@": ["@"]}}]}]}
                {"messages": [{"content": [{"type": "tool_result", "content": [{"text": "@"}]}]}]}
                {"messages": [{"content": [{"source": {"type": "text", "data": "@"}}]}]}
                {"system": [{"type": "text", "text": "@"}]}
                {"tools": [{"function": {"description": "@"}}]}
                {"instructions": "@", "input": "@"}
                {"input": [{"type": "function_call_output", "call_id": "1", "output": "@"}]}
                {"contents": [{"parts": [{"text": "@"}]}]}
                {"contents": [{"parts": [{"functionResponse": {"response": {"id": "@"}}}]}]}
                {"systemInstruction": {"parts": [{"text": "@"}]}}
                {"prompt": ["@", "@"], "suffix": "@"}
                {"query": "@", "documents": ["@", {"text": "@"}]}
                {"user": "@", "user_id": "@", "metadata": {"user_id": "@"}}
                {"prompt": {"variables": {"id": "@"}}}
                {"input": [{"action": {"env": {"@": "1"}, "url": "https://h/?q=@"}}]}
                {"messages": [{"content": [{"file": {"filename": "@"}}, {"type": "refusal"}]}]}
                {"contents": [{"parts": [{"fileData": {"fileUri": "f", "displayName": "@"}}]}]}
                {"requests": [{"params": {"messages": [{"content": "@"}]}}]}"""):
            payload = json.loads(text.replace("@", "ann@example.com"))
            _, sent = self.masked(payload)
            self.assertEqual(sent, json.loads(text.replace("@", "[[EMAIL_1]]")))

    def test_names_ids_media_and_schemas_are_left_alone(self):
        for text, in self.each("""\
                {"model": "@", "messages": [{"role": "user", "id": "@", "tool_call_id": "@"}]}
                {"messages": [{"content": [{"image_url": {"url": "https://h/@"}}]}]}
                {"messages": [{"content": [{"source": {"type": "base64", "data": "data:@"}}]}]}
                {"contents": [{"parts": [{"inlineData": {"data": "@"}, "thoughtSignature": "@"}]}]}
                {"tools": [{"function": {"parameters": {"properties": {"@": {}}}}}]}
                {"input": [4111111111111111, 4111111111111111]}
                {"previous_response_id": "@", "images": ["@"]}"""):
            masks, sent = self.masked(json.loads(text.replace("@", "ann@example.com")))
            self.assertEqual((sent, masks.counts), (None, {}))

    def test_arguments_stay_json_and_spelled_as_they_were(self):
        for before, after in self.each(r"""
                {"n": 4111111111111111, "x":""} -> {"n": 4111111111111111, "x":""}
                {"n": 4.0,  "x": "a\u0040x.org"} -> {"n": 4.0,  "x": "[[EMAIL_1]]"}
                {"a": "\"\u00e9\" to a@x.org\n"} -> {"a": "\"\u00e9\" to [[EMAIL_1]]\n"}
                {"say": "é a@x.org", "path": "C:\\x"} -> {"say": "é [[EMAIL_1]]", "path": "C:\\x"}
                {"cut": "a@x.org -> {"cut": "[[EMAIL_1]]
                a@x.org -> [[EMAIL_1]]
                {"in": "{\"to\": \"a\\u0040x.org\"}"} -> {"in": "{\"to\": \"[[EMAIL_1]]\"}"}
                {"in": "a\n4111111111111111, 1"} -> {"in": "a\n[[CARD_1]], 1"}
                {"in": "\u003c\u0061\u0040x.org\u003e"} -> {"in": "\u003c[[EMAIL_1]]\u003e"}
                {"a@x.org": 1} -> {"[[EMAIL_1]]": 1}"""):
            _, sent = self.masked({"messages": [{"tool_calls": [{"function": {
                "arguments": before}}]}]})
            got = sent and sent["messages"][0]["tool_calls"][0]["function"]["arguments"]
            self.assertEqual(got or before, after)
            _, sent = self.masked({"input": [{"type": "function_call", "arguments": before}]})
            self.assertEqual(sent["input"][0]["arguments"] if sent else before, after)

    def test_a_pattern_of_ones_own_takes_no_quote_of_a_string_with_it(self):
        pattern = LinearPattern(r"[^@\s]+@corp\.example").compiled
        own = [llm_proxy.Shape("corp", "", pattern, llm_proxy.re.Match.end, "", 300)]
        masks = Masks(Redactor([], own))
        told, shown = '{"to":"bob@corp.example","n":1}', '{"to":"[[CORP_1]]","n":1}'
        self.assertEqual(finish(masks.mask_strings(told)), shown)
        restorer = Restorer(Masks(masks.redactor), masks.redactor)
        found = restorer.restore_json(told.encode(), True)
        self.assertEqual(found.decode(), shown.replace("_1", ""))

    def test_escapes_in_a_text_hide_nothing_and_stay(self):
        for before, after in self.each(r"""
                {"out": "Ann\na@x.org\t4111111111111111"} -> {"out": "Ann\n[[EMAIL_1]]\t[[CARD_1]]"}
                print("\n4111 1111 1111 1111\r\n") -> print("\n[[CARD_1]]\r\n")
                "\u003ca\u0040x.org\u003E, \u4ebaa@x.org" -> """
                r""""\u003c[[EMAIL_1]]\u003E, \u4eba[[EMAIL_1]]"
                [{\"to\": \"\\na@x.org\\u0040\"}] -> [{\"to\": \"\\n[[EMAIL_1]]\\u0040\"}]
                https:\/\/h\/?to=+a\u0040x.org\u0026 -> https:\/\/h\/?to=+[[EMAIL_1]]\u0026
                \u00 \u \ \x41 a@x.org\ -> \u00 \u \ \x41 [[EMAIL_1]]\
                """):
            masks, sent = self.masked({"messages": [{"content": before}]}, KINDS)
            self.assertEqual(sent["messages"][0]["content"], after)
            self.assertIn(masks.values.get("[[EMAIL_1]]"), (None, "a@x.org"))
        key = "-----BEGIN PRIVATE KEY-----\n%s\n" % ("MIIE" * 20)
        for text, value in self.each((
                (key, key), (json.dumps({"key": key}), key), ("k = %r" % key, repr(key)[1:-1]))):
            masks, _ = self.masked({"messages": [{"content": text}]}, ["secrets"])
            self.assertEqual(masks.values.get("[[SECRETS_1]]").rstrip(), value.rstrip())

    def test_nothing_is_passed_over_because_of_its_name_or_how_it_begins(self):
        for payload in self.each(r"""
                {"source": {"type": "text", "data": "https://x.org is it. Mail a@x.org"}}
                {"tools": [{"parameters": {"properties": {"id": {"description": "a@x.org"}}}}]}
                {"input": [{"type": "function_result", "result": {"id": "a@x.org"}}]}
                {"role": "tool", "content": "{\"to\": \"a\\u0040x.org\"}"}
                {"content": "a@x.org---- original"}
                {"content": "//contact:a@x.org"}
                """.split("\n")[1:-1]):
            masks, sent = self.masked({"messages": [json.loads(payload)]})
            self.assertEqual(masks.counts, {"email": 1})
            self.assertNotIn("x.org\"", json.dumps(sent).replace("https://x.org is", ""))

    def test_a_long_list_of_addresses_is_no_picture(self):
        text = ";".join(["joe%d@acme.com" % number for number in range(5000)])
        body = encoded({"model": "m", "input": ["x", text]})
        found = JsonBody(body).parse()
        self.assertEqual(found["input"][1], text)

    def test_signed_thoughts_hold_what_the_upstream_said(self):
        _, sent = self.masked({"messages": [
            {"role": "user", "content": "a@x.org"},
            {"role": "assistant", "content": [
                {"thinking": "a@x.org new@x.org", "signature": "s"}]}]})
        self.assertEqual(
            sent["messages"][1]["content"][0]["thinking"], "[[EMAIL_1]] new@x.org")

    def test_others_come_in_between_where_much_is_like_a_placeholder_or_arguments_are_large(self):
        for message in self.each((
                {"content": 10_000 * "[[A_1]]"},
                {"tool_calls": [{"function": {"arguments": "[%s0]" % (160_000 * "[0],")}}]})):
            masks = Masks(Redactor(["email", "card"]))
            payload = {"messages": [message]}
            with self.computing_within(CPU_SECONDS * 10):
                steps = list(masks.mask_payload(payload, encoded(payload)))
                self.assertGreater(len(steps), 10)
            self.assertEqual(masks.counts, {})

    def test_a_prompt_that_grows_begins_as_before(self):
        talk = [{"role": "user", "content": "a@x.org"}, {"role": "assistant", "content": "b@x.org"}]
        _, before = self.masked({"messages": talk, "system": "s@x.org"})
        more = [{"role": "user", "content": "c@x.org a@x.org"}]
        _, after = self.masked({"messages": talk + more, "system": "s@x.org"})
        self.assertEqual(after["messages"][:2], before["messages"])
        self.assertEqual(after["system"], before["system"])

    # What else to look for

    ORDINARY = r"""
        ORD-[0-9]+ ; [A-Z]{2,4}-\d{3,6} ; TICKET-\d+ ; (?i)jira-\d{1,6} ; \b[A-Z]{3}\d{6}\b
        EMP\d{5} ; @[a-z]{2}\d+
        [a-z0-9-]+\.corp\.example ; [a-z0-9.-]+\.internal\.example ; (?:[a-z0-9-]+\.)+corp\.example
        srv-[a-z]{3}-\d{2} ; host[0-9]{1,3}\.lan ; 10\.\d{1,3}\.\d{1,3}\.\d{1,3} ; K[0-9]{7}[A-Z]
        (?:MR|MRS|DR)\. [A-Z][a-z]+ ; INV/\d{4}/\d+ ; \d{4}-\d{2}-\d{2} ; [A-Z]{1,3} ?\d{1,4}[A-Z]
        CUST_[A-Za-z0-9]{8,20} ; #\d+ ; https?://wiki\.example/[^\s]+ ; PRJ-[A-Z]+-\d+ ; foo
        [A-F0-9]{8}-[A-F0-9]{4} ; (red|green|blue)-\d+ ; AB\d+(?:-\d+)? ; v\d+\.\d+\.\d+
        (?:\d{3}-){2}\d{4} ; \d+(?:\.\d+)? ; [^@\s]+@corp\.example ; P\d{2}[A-Z]{2}\d{3,} ; \w+
        \$[0-9]+\.[0-9]{2} ; X{3,5}Y ; acme-(?:dev|test|prod)-\d+ ; (?:[0-9A-F]{2}:){5}[0-9A-F]{2}
        S/N:? ?[A-Z0-9]{10} ; [\w.]+-secret ; ^BEGIN [A-Z]+$ ; Müller|Meier ; [а-я]+-\d+
        \w+@example\.com ; [A-Z]+_[0-9]+ ; case\s+\d+ ; (?:AB|CD)\d{4} ; [A-Z][a-z]+ GmbH
        id=[0-9a-f]{32} ; NL\d{9}B\d{2} ; DE\d{9} ; [1-9]\d{2} \d{3} \d{3} ; acct:\s*\d+
        \+49 ?\d{3,5} ?\d{4,9} ; 0\d{2,4}[-/ ]?\d{3,8} ; \d{1,3}[ -]?\d{3,4}[ -]?\d{4}
        [A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,} ; [a-z]+(?:-[a-z]+)*-\d+
        \+?\d{1,3}[ -]?\(?\d{3}\)?[ -]?\d{3}[ -]?\d{4} ; (?:[a-z0-9]+[-_])*[a-z0-9]+\.corp\.example
        [A-Z]:\\(?:[^\\\s]+\\)*[^\\\s]+ ; (?:0x)?[0-9a-fA-F]{40} ; (?:[a-z]+\.)+[a-z]+(?:/\w+)*"""
    SETS = r'a \d \w \s . [a-z] [^x] [A-Za-z0-9] [0-9a-f] \S [^"] [-\w] é \D [ab]'.split()
    CATASTROPHES = r"""
        (@+)+y (@*)*y (@+)*y (@+@+)+y @+@+y @*@*y (@+,?)+y (?:@{1,9}){2,9}y @+z?@+y (@+|b@+)+y
        @+(?:@+)?y (?:@@?)+y @*.@*y (?:@|@@)+y""".split()
    OTHERS = r"""(a)\1 (?P<q>a)(?P=q) (a)?(?(1)b|c) (?=a)b (?!a)b (?<=a)b (?<!a)b
        a{1,9}a{1,9} (?:a?a?)?a{40}a? a{1,3}a{1,3}b+c (?:a{1,2}b?a{1,2}){2} a?a?a?a?a?a?a?
        a{2,9}b?a{2,9}b?a{2,9}
        (?:ab)+(?:ab)+c a{1,1000} a{100} a* (|a)+y (a|a)+y (?:a|ab?)+c (ab|a|a)+y
        [^\x00-\xff]+[^\x00-\xff]+y (?:[^\W\x00-\xff]+)+y (?:[^\D\x00-\xff]+)+y
        (?:[^\S\x00-\xff]+)+y (?:[^\w\s\x00-\xff]+)+y (?:[^\x00-𠀁]+)+y
        [a.]+\.[a.]+y [a.]+\.(?:a\.)+y (?:[a.]+\.)?[a.]+\.b+y (?:[a.]+\.a)+y
        (?:(?:ab|a)(?:c|bc))+d (?:[a-z]+(?:-|x))+y
        (?:(?:(?:a+b)+c)+d)+y (?:[ab]+c)+(?:[ac]+b)+y""".split() + ["(?:ab|a)(?:c|bc)" * 9,
                                                              "(aa|a)" * 6,
                                                              "(?:" * 40 + "a" + "b)+" * 40]

    def test_fifty_ordinary_patterns_are_taken(self):
        patterns = re.split(" ; |\n", self.ORDINARY.strip())
        self.assertGreaterEqual(len(patterns), 50)
        patterns += ["a++b", "(?>a+)b"] * (sys.version_info >= (3, 11))
        for text in self.each(patterns):
            LinearPattern(text.strip())

    def test_two_hundred_catastrophic_patterns_are_refused(self):
        patterns = [shape.replace("@", one) for shape in self.CATASTROPHES for one in self.SETS]
        patterns += self.OTHERS
        patterns.append("a" * 301)
        self.assertGreater(len(patterns), 200)
        for text in self.each(patterns):
            with self.assertRaises(ValueError):
                LinearPattern(text)

    def test_a_pattern_that_is_taken_repeats_as_often_as_it_says(self):
        for shape, least, most in self.each("""[
                ["(?:ab){%d}c", 20, 20], ["(?:ab){1,%d}c", 1, 20], ["(?:ab)+c", 1, 16]]"""):
            pattern = LinearPattern(shape.replace("%d", "20")).compiled
            for times in (least, most):
                self.assertTrue(pattern.fullmatch("ab" * times + "c"))
            self.assertFalse(pattern.fullmatch("ab" * 21 + "c"))

    def test_a_pattern_that_is_taken_holds_nothing_up(self):
        for text in self.each(r"""[a-z0-9-]+\.x (?:[a-z0-9-]+\.)+x <[^>]*> \s*a \d+,
                (?:[a-z]+-)*[a-z]+\.x""".split()):
            pattern = LinearPattern(text).compiled
            for seed in ("a", "1", " ", "<", "a.", "a-"):
                with self.computing_within(CPU_SECONDS):
                    list(pattern.finditer(seed * 8192))

    def test_a_pattern_that_begins_with_a_repetition_is_found_in_a_word_of_any_length(self):
        pattern = LinearPattern(r"[^@\s]+@corp\.example").compiled
        found = pattern.search("%s,bob@corp.example" % ("x" * 99))
        self.assertTrue(found[0].endswith(",bob@corp.example"))

    def test_a_fault_says_which_pattern_and_which_part(self):
        for text, said in self.each(r"""
                order=\d+\d+ -> order must not have repetitions, .*, as in \\d\+\\d\+
                order=(?=a)b -> order must not look around or back: assert, as in \(\?=a\)b \(got
                a=b; order=(a*)b(.+)+-x* -> order must not have .*, as in \(a\*\)b\(.\+\)\+ \(got
                order=( -> order must be a regular expression: missing \)
                a=b;order= -> must be name=regex, by lines or ;, each name once
                email=x -> must be name=regex, by lines or ;, each name once
                order -> must be name=regex"""):
            with self.assertRaisesRegex(ConfigFaults, "REDACT_PATTERNS .*" + said):
                read_config({"BASE_API_URL": "http://h", "REDACT_PATTERNS": text})


# --------------------------------------------------------------------------------------------------
# Redaction: the way down
# --------------------------------------------------------------------------------------------------

CHOICE_END = '{"choices": [{"index": N, "delta": {}, "finish_reason": "stop"}]}'
CANDIDATE = '{"candidates": [{"index": N, %s}]}'
BLOCK_DELTA = '{"type": "content_block_delta", "index": N, "delta": {"type": "x", "%s": TEXT}}'
# Endpoint, an event with a piece of the text of the block N, and what ends that
TEXT_STREAMS = [
    *[("chat", '{"choices": [{"index": N, "delta": {%s}, "finish_reason": null}]}' % said, end)
      for said, end in [
          ('"content": TEXT', CHOICE_END), ('"reasoning_content": TEXT, "role": "assistant"', ""),
          ('"refusal": TEXT, "content": null', "[DONE]"),
          ('"function_call": {"arguments": TEXT}', CHOICE_END)]],
    ("chat", '{"choices": [{"delta": {"tool_calls": [{"index": N, "id": "c", "function":'
     ' {"name": "f", "arguments": TEXT}}]}}]}', CHOICE_END.replace("N", "0")),
    ("chat", '{"choices": [{"delta": {"tool_calls": [{"index": N, "custom": {"input": TEXT}}]}}]}',
     CHOICE_END.replace("N", "0")),
    ("completions", '{"choices": [{"index": N, "text": TEXT}]}', CHOICE_END),
    *[("responses", '{"type": "response.%s.delta", "output_index": %s, "delta": TEXT}' % kind,
       '{"type": "response.%s.done", "output_index": %s}' % kind)
      for kind in (("output_text", "N"), ("function_call_arguments", "N"),
                   ("reasoning_summary_text", '0, "summary_index": N'))],
    *[("messages", BLOCK_DELTA % key, end)
      for key, end in [("text", '{"type": "content_block_stop", "index": N}'),
                       ("content", '{"type": "content_block_stop", "index": N}'),
                       ("thinking", '{"type": "message_stop"}'),
                       ("partial_json", '{"type": "error", "error": {"type": "x"}}')]],
    *[(endpoint, CANDIDATE % ('"content": {"parts": [{%s}]}' % part),
       CANDIDATE % '"finishReason": "STOP"')
      for endpoint in ("generate", "array") for part in ('"text": TEXT',
                                                         '"text": TEXT, "thought": true',
                                                         '"functionCall": {"partialArgs": [{'
                                                         '"jsonPath": "$.a", "stringValue": TEXT}]}'
                                                         )],
    *[("interactions", '{"event_type": "step.delta", "index": N, "delta": {"%s": TEXT}}' % key,
       '{"event_type": "step.stop", "index": N}') for key in ("text", "arguments")],
    ("own", '{"content": TEXT, "stop": false}', '{"content": "", "stop": true}'),  # llama.cpp
    ("own", '{"token": {"id": 1, "text": TEXT}, "index": 7}', ""),  # TGI
    ("own", '{"event_type": "text-generation", "text": TEXT, "is_finished": false}',
     '{"event_type": "stream-end", "is_finished": true, "response": {}}'),  # Cohere
    ("own", '{"event_type": "tool-calls-chunk", "tool_call_delta": {"index": 0, "parameters":'
     ' TEXT}}', ""),
    ("own", '{"type": "content-delta", "delta": {"message": {"content": {"text": TEXT}}}}',
     '{"type": "content-end"}'),
    *[("ollama", '{"done": false, %s}' % said, end) for said, end in [
        ('"message": {"role": "assistant", "content": TEXT}', '{"done": true}'),
        ('"response": TEXT', '{"response": "", "done": true}')]]]
TEXT_KEYS = set("""content reasoning_content refusal arguments text thinking delta partial_json
    response input stringValue parameters""".split())


def spelled(value):
    """A value as it stands in a string of JSON."""
    return json.dumps(value, ensure_ascii=False)[1:-1]


class UnmaskingTest(ProxyCase):
    """What comes back for placeholders, in whatever pieces they come."""
    RANDOM_STREAMS = 300
    DIALECTS = {**UsageReaderTest.DIALECTS, "array": llm_proxy.Gemini(),
                "chat": OpenAI()}
    VALUES = {"[[EMAIL_1]]": "ann@example.com", "[[SECRETS_12]]": 'a"b\\c\nd\u00e9'}
    TEXTS = ["hi [[EMAIL_1]] x", "a[b[[SECRETS_12]][", "\u20ac[[EMAIL_2]]\U0001f600[["]
    JSON_TEXTS = ['{"a":"[[EMAIL_1]]","b":["[[SECRETS_12]]"]}', '{"k":[["x"]]}']

    def masks(self, *kinds):
        """Masks that know VALUES, and mask these kinds: addresses of mail by default."""
        masks = Masks(Redactor(kinds or ["email"]))
        for placeholder, value in self.VALUES.items():
            masks.placeholders[value] = placeholder
            masks.values[placeholder] = value
        return masks

    def editor(self, endpoint, answers=False, events=True, masks=None):
        dialect = self.DIALECTS.get(endpoint) or OpenAI()
        events = events and (llm_proxy.JSON_ARRAY if endpoint == "array" else dialect.events)
        masks = masks or self.masks()
        restorer = Restorer(masks, masks.redactor if answers else None)
        return llm_proxy.Editor(
            events or None, llm_proxy.Unmasking(dialect, events or None, restorer))

    def unmask(self, endpoint, data, step=None, *options, **more):
        """What a caller sees of a body that comes in pieces of this size."""
        editor = self.editor(endpoint, *options, **more)
        step = step or len(data) or 1
        pieces = [data[at:at + step] for at in range(0, len(data), step)]
        return b"".join(map(editor.feed, pieces)) + editor.flush()

    @staticmethod
    def stream(row, pieces):
        """A stream of this row; `pieces` are numbers of blocks, each with a text."""
        endpoint, event, end = row
        texts = [event.replace("N", str(number), 1).replace("TEXT", json.dumps(text))
                 for number, text in pieces]
        numbers = sorted({number for number, _ in pieces}) if "N" in end[2:] else [0]
        texts += [end if end == "[DONE]" else end.replace("N", str(number))
                  for number in numbers if end]
        if endpoint == "array":
            return ("[%s\n]" % ",\r\n".join(texts)).encode()
        return "".join(["%s\n" % text if endpoint == "ollama" else "data: %s\n\n" % text
                        for text in texts]).encode()

    @staticmethod
    def payloads(endpoint, data):
        if endpoint == "array":
            return json.loads(data)
        return [json.loads(line[line.index(b"{"):]) for line in data.splitlines() if b"{" in line]

    def texts(self, endpoint, data):
        """The texts of a stream, as a client has them in the end."""
        return [*self.said(self.payloads(endpoint, data)).values()]

    @classmethod
    def said(cls, value, path=(), found=None):
        """What a client takes the texts of a stream to be, by where they stand."""
        found = {} if found is None else found
        for one in value if type(value) is list else ():
            cls.said(one, path, found)
        if type(value) is dict:
            path += tuple(value[key] for key in value if key.endswith("index"))
            for key, one in value.items():
                if key in TEXT_KEYS and type(one) is str and one:
                    found[(*path, key)] = found.get((*path, key), "") + one
                cls.said(one, (*path, key), found)
        return found

    def restored(self, text, is_json):
        for placeholder, value in self.VALUES.items():
            text = text.replace(placeholder, spelled(value) if is_json else value)
        return text

    def assert_comes_back(self, row, pieces, step=None, answers=False):
        data = self.stream(row, pieces)
        shown = self.payloads(row[0], self.unmask(row[0], data, step, answers))
        came = self.payloads(row[0], data)
        expected = {path: self.restored(text, self.is_json(row))
                    for path, text in self.said(came).items()}
        self.assertEqual(self.said(shown), expected)

    def is_json(self, row):
        return "arguments" in row[1] or "partial_json" in row[1]

    def test_a_slice_that_goes_on_with_brackets_is_no_json_where_its_text_is_none(self):
        """A value with a quote would be spelled twice as in JSON."""
        text = "hello " + '{"a": 1} [[SECRETS_12]] ' * 999
        part = '{"choices":[{"index":0,"delta":{"content":%s}}]}'
        for extra in self.each(range(0, 24)):
            data = ("data: " + part % json.dumps(text + "x" * extra) + "\n\n").encode()
            shown = self.unmask("chat", data, 4000 + extra)
            self.assertEqual("".join(self.texts("chat", shown)),
                             self.restored(text, False) + "x" * extra)

    def test_a_placeholder_comes_back_wherever_it_is_split_in_two_and_in_three(self):
        steps = itertools.cycle((None, None, None, 61))
        for row in self.each(TEXT_STREAMS):
            for text in self.JSON_TEXTS if self.is_json(row) else self.TEXTS:
                size = len(text)
                cuts = [(cut, cut) for cut in range(size)]
                cuts += Random(size).sample(
                    list(itertools.combinations(range(size), 2)), 12)
                for first, second in cuts:
                    parts = text[:first], text[first:second], text[second:]
                    blocks = (0,) if "N" not in row[1] else (0, 1)
                    self.assert_comes_back(
                        row, [(block, part) for part in parts for block in blocks], next(steps))

    LEAKS = """ann@example.com bob.o'hara+x@mail.example.org 4111111111111111 5500-0000-0000-0004
        DE89370400440532013000 8.8.8.8 2606:4700:4700::1111 +14155552671 123-45-6789
        ghp_0123456789abcdefghijABCDEFGHIJ012345 AKIAIOSFODNN7EXAMPLE""".split()
    BESIDE = ["[", "[[", "]]", "[[EMAIL_1]]", " ", "\n", '"', "\\", "\u00e9", "\U0001f600", "word,",
              "(", "7", "[[IBAN_", "/"]

    def text_at_random(self, chance):
        """A text, and what must not leave of it."""
        said = [chance.choice(self.BESIDE) for _ in range(chance.randrange(12))]
        leaks = chance.choices(self.LEAKS, k=chance.randrange(4))
        for one in leaks:
            said.insert(chance.randrange(len(said) + 1), " is %s, " % one)
        return "".join(said), leaks

    def pieces_at_random(self, chance, texts):
        """Pieces of these texts, each with the number of its text."""
        pieces = []
        while any(texts):
            block = chance.choice([block for block, text in enumerate(texts) if text])
            size = chance.choice((1, 2, 3, 9, 30))
            pieces.append((block, texts[block][:size]))
            texts[block] = texts[block][size:]
        return pieces

    def stream_at_random(self, chance, redactor):
        """Has texts masked that a model repeats; returns the row of its stream, the texts, Masks,
        and what a caller sees of it."""
        row = chance.choice(TEXT_STREAMS)
        found = [self.text_at_random(chance) for _ in range(2 if "N" in row[1] else 1)]
        texts = [text for text, _ in found]
        if self.is_json(row):
            texts = [json.dumps({"k": [text]}, ensure_ascii=chance.random() < 0.5)
                     for text in texts]
        payload = {"messages": [{"role": "user", "content": text} for text in texts]}
        masks = Masks(redactor)
        sent = finish(masks.mask_payload(payload, encoded(payload)))
        seen = [one["content"] for one in (sent or payload)["messages"]]
        for (_, leaks), text in zip(found, seen):
            self.assertEqual([one for one in leaks if one in text], [], text)
        return row, texts, masks, self.stream(row, self.pieces_at_random(chance, seen))

    @tested_once
    def test_texts_at_random_in_streams_at_random_leak_nothing_and_come_back(self):
        chance, redactor = Random(17), Redactor(REDACTED)
        for _ in range(self.RANDOM_STREAMS):
            row, texts, masks, data = self.stream_at_random(chance, redactor)
            shown = self.unmask(row[0], data, chance.choice((None, 3, 50, 400)),
                                chance.random() < 0.3, masks=masks)
            self.assertEqual(sorted(self.texts(row[0], shown)), sorted(filter(None, texts)),
                             (row, data))

    def test_an_event_in_which_nothing_changes_passes_byte_for_byte(self):
        for data in self.each([
                b'data: {"choices": [ {"delta": {"content": "a [b] \\u00fc"}} ]}\n\n',
                b'event: x\nid: 5\ndata: {"choices": [{"delta": {"content": "[[EMAIL_7]] "}}]}\n\n',
                b": ping\n\n", b'data: {"type": "ping"}\n\n', b"data: [DONE]\n\n",
                b'data: {"choices": [], "usage": {"prompt_tokens": 1}}\n\n']):
            held = events({"choices": [{"index": 3, "delta": {"content": "[["}}]})
            self.assertEqual(self.unmask("chat", data), data)
            for many in (held + data, held + data * 2):
                found = self.unmask("chat", many)
                self.assertEqual(found.count(data), many.count(data))

    FIRST = {"id": "c", "choices": [{"index": 1, "delta": {
        "role": "assistant", "content": "a [["}, "logprobs": {}}], "usage": {"x": 1}}
    SHOWN = {**FIRST, "choices": [{**FIRST["choices"][0], "delta": {
        "role": "assistant", "content": "a "}}]}
    REST = {"id": "c", "choices": [{"index": 1, "delta": {"content": "[["}}]}
    # What follows FIRST, and how much of it comes before REST
    ENDS = """[
        [[{"choices": [{"index": 1, "delta": {}, "finish_reason": "stop"}]}], 0],
        [[{"error": {"message": "x"}}], 0], [["[DONE]"], 0], [[], 0],
        [[{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, "[DONE]"], 1],
        [[{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}], 1]]"""

    def test_what_waits_goes_on_before_what_ends_its_block_and_once_only(self):
        for ends, place in self.each(self.ENDS):
            found = self.unmask("chat", events(self.FIRST, *ends)).split(b"\n\n")[:-1]
            found = [one[6:].decode() for one in found]
            found = [one if one == "[DONE]" else json.loads(one) for one in found]
            self.assertEqual(found, [self.SHOWN, *ends[:place], self.REST, *ends[place:]])

    def test_what_waits_goes_on_before_the_end_of_a_text_at_cohere(self):
        said = events({"type": "content-delta", "delta": {"message": {"content": {"text": "x ["}}}},
                      {"type": "content-end"})
        found = self.payloads("own", self.unmask("own", said))
        self.assertEqual([one["type"] for one in found],
                         ["content-delta", "content-delta", "content-end"])

    def test_another_kind_of_text_ends_the_one_before_it(self):
        said = [{"reasoning": "think ["}, {"content": "say"}, {"content": " ["},
                {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}]
        found = self.payloads("chat", self.unmask("chat", events(
            *[{"choices": [{"index": 0, "delta": one}]} for one in said])))
        self.assertEqual([one["choices"][0]["delta"] for one in found], [
            {"reasoning": "think "}, {"reasoning": "["}, {"content": "say"}, {"content": " "},
            {"content": "["}, said[-1]])

    def test_a_large_event_holds_up_none_after_it(self):
        masks = self.masks()
        editor = llm_proxy.Editor(SSE, llm_proxy.Unmasking(
            OpenAI(), SSE, Restorer(masks)))
        large, small = b'data: {"said": "%s"}\n\n' % (5000 * b"[["), b'data: {"n": "[["}\n\n'
        for pieces in self.each((
                (large[:9000], large[9000:] + small + small[:4], small[4:]),
                (large[:9000], large[9000:], small + small[:4], small[4:]),
                (large[:9000], large[9000:-1], b"\n" + small + small[:4], small[4:]))):
            passed = b""
            for piece in pieces[:-1]:
                passed += editor.feed(piece)
            self.assertEqual(passed, large + small)
            self.assertEqual(editor.feed(pieces[-1]), small)

    def test_no_stream_is_looked_at_again_and_again(self):
        """Each took seconds that grew with the square of its length."""
        for data, step in self.each((
                (b"data: [[\n" + b"data:}\n" * 9000, 1 << 16),
                (b"data: [[\n" + b"data: x\n" * 8000, 8), (b"[" * 60_000, 10),
                (b"data: [[\n" + b"data:}\n" * 4000, 7), (b'[{"": "[[' + b"}" * 60_000, 3))):
            with self.computing_within(5):
                for endpoint in ("chat", "array"):
                    self.assertEqual(self.unmask(endpoint, data, step), data)

    def test_in_whole_json_values_stand_for_placeholders_and_the_rest_is_as_it_was(self):
        for told, shown in self.each(r"""
                {"content": "[[EMAIL_1]]", "n": 1.50} -> {"content": "ann@example.com", "n": 1.50}
                ["[[email_1]]", "[[Email_1]] [[EMAIL_01]]"] -> """
                r"""["ann@example.com", "ann@example.com [[EMAIL_01]]"]
                {"a": ["\u005b[EMAIL_1]] \u00e9"]} -> {"a": ["ann@example.com \u00e9"]}
                {"arguments" : "{\"k\":\"[[SECRETS_12]]\"}"} -> {"arguments" : ARGUMENTS}
                {"args": {"k": "[[SECRETS_12]]"}} -> {"args": {"k": VALUE}}
                {"\\": "\"[[EMAIL_1]]\\", "[[EMAIL_1]]": 1} -> """
                r"""{"\\": "\"ann@example.com\\", "ann@example.com": 1}
                {"data": [[1, 2], [[3]]], "text": "[[EMAIL_2]]"} -> SAME
                {"text": "[[EMAIL_1]], -> {"text": "ann@example.com,"""):
            value = self.VALUES["[[SECRETS_12]]"]
            arguments = json.dumps('{"k":"%s"}' % spelled(value))
            shown = shown.replace("SAME", told).replace("VALUE", json.dumps(value)).replace(
                "ARGUMENTS", arguments)
            for step in (None, 1):
                found = self.unmask("chat", told.encode(), step, events=False)
                self.assertEqual(found.decode(), shown)

    def unmask_json(self, *arguments, **options):
        return json.loads(self.unmask("chat", *arguments, events=False, **options))

    def test_what_is_too_large_to_be_awaited_whole_goes_on_in_pieces(self):
        told = json.dumps({"a": "[[EMAIL_1]]", "b": ["x" * 30, "y[[EMAIL_1]]"], "c": "[[EMAIL_1]]"})
        cards = [4111111111111111, "4111111111111111", "\u00e9 b@x.org"] * 3
        inner = json.dumps(["x" * 30, "[[SECRETS_12]]"])
        self.patch_seconds(Unmasking_MAX_SLICE=40)
        for step in self.each((23, 1, 41)):
            found = self.unmask("chat", told.encode(), step, events=False)
            self.assertEqual(found.decode(), told.replace("[[EMAIL_1]]", "ann@example.com"))
            found = self.unmask_json(encoded(cards), step, answers=True,
                                     masks=Masks(Redactor(KINDS)))
            self.assertEqual(found, [4111111111111111, "[[CARD]]", "\u00e9 [[EMAIL]]"] * 3)
            found = json.loads(self.unmask_json(encoded(inner), step))
            self.assertEqual(found[1], self.VALUES["[[SECRETS_12]]"])
            for large in (b"x" * 99, b"\"" + b"x" * 99):
                self.assertEqual(self.unmask("chat", large, step, events=False), large)

    def test_a_piece_may_end_within_a_character(self):
        self.patch_seconds(Unmasking_MAX_SLICE=40)
        for step, size in self.each((23, 1, 41), range(4)):
            said = size * "a" + 20 * "\u4f60\u597d[[EMAIL_1]]"
            wide = json.dumps({"a": said}, ensure_ascii=False).encode()
            self.assertEqual(self.unmask_json(wide, step), {
                "a": said.replace("[[EMAIL_1]]", "ann@example.com")})

    def test_of_many_blocks_and_large_events_nothing_waits(self):
        for count, size, waits in self.each(((64, 5, 64), (65, 5, 64), (1, 1 << 17, 0))):
            said = [delta("x" * size + "[") for _ in range(count)]
            for number, one in enumerate(said):
                one["choices"][0]["index"] = number
            shown = self.payloads("chat", self.unmask("chat", events(*said)))
            self.assertEqual(len(shown), count + waits)

    def test_an_answer_that_says_one_placeholder_again_and_again_does_not_grow_without_end(self):
        with patch.object(Restorer, "MAX_VALUES", 100):
            found = self.unmask("chat", b'["%b"]' % (b"[[EMAIL_1]]" * 50), events=False)
        self.assertEqual(found.count(b"@"), 100 // len("ann@example.com"))

    def test_what_the_model_says_of_its_own_accord_is_masked_for_good_where_that_is_asked_for(self):
        said = "[[EMAIL_1]], bob@example.org, ann@example.com 5@"
        shown = "ann@example.com, [[EMAIL]], ann@example.com 5@"
        for row in self.each([TEXT_STREAMS[0], TEXT_STREAMS[5], TEXT_STREAMS[9]]):
            for cut in range(len(said)):
                data = self.stream(row, [(0, said[:cut]), (0, said[cut:])])
                found = self.texts(row[0], self.unmask(row[0], data, answers=True))
                self.assertEqual(found, [shown])
        whole = json.dumps({"text": said + "\n", "args": {"a@b.example": 5}})
        found = self.unmask("chat", whole.encode(), answers=True, events=False)
        self.assertEqual(json.loads(found), {"text": shown + "\n", "args": {"[[EMAIL]]": 5}})

    def test_a_number_in_groups_is_masked_wherever_its_text_is_cut(self):
        for text in self.each(("call +49 171 1234567,see9 5 x", "at +49  171 1234567 now",
                               "+49/ 171 1234567. And", "+4+4(+49 171 1234567\u00e9 5 x")):
            cuts = [(at, at) for at in range(len(text))] + [
                (at, at + 1 + at % 7) for at in range(len(text))]
            for first, last in cuts:
                said = [delta(text[:first]), delta(text[first:last]), delta(text[last:])]
                masks = Masks(Redactor(["phone"]))
                found = self.unmask("chat", events(*said, "[DONE]"), answers=True, masks=masks)
                shown, = self.texts("chat", found)
                self.assertNotIn("1234567", shown, (first, last))

    def test_all_words_of_an_answer_are_masked_whatever_stands_beside_them(self):
        """@ are words, and # are none."""
        for endpoint, said in self.each(r"""
                ollama -> {"message": {"content": "TEXT", "tool_calls": [{"function": {"arguments":\
                    {"to": "@", "@": 1}}}]}, "created_at": "#"}
                chat -> {"id": "#", "citations": ["@"], "choices": [{"delta": {"content": "TEXT",\
                    "annotations": [{"title": "@", "url": "https://x/?#"}]}}]}
                chat -> {"choices": [{"delta": {"content": "TEXT"}, "message": {"tool_calls": [{\
                    "function": {"name": "f", "arguments": "{\"to\": \"a\\n@\"}"}}]}}]}
                responses -> {"type": "response.output_text.delta", "item_id": "#",\
                    "delta": "TEXT", "item": {"content": [{"text": "@", "id": "#"}]}}
                messages -> {"type": "content_block_delta", "delta": {"text": "TEXT"},\
                    "citation": {"cited_text": "@"}}
                messages -> {"type": "message_start", "message": {"model": "#", "content": [\
                    {"type": "tool_use", "input": {"id": "@"}, "id": "#"}]}}
                generate -> {"responseId": "#", "candidates": [{"content": {"parts": [{"text":\
                    "TEXT"}, {"functionCall": {"args": {"id": "@"}}}, {"thoughtSignature": "#",\
                    "inlineData": {"data": "#"}, "executableCode": {"code": "@"}}]}}]}
                interactions -> {"event_type": "step.delta", "delta": {"text": "TEXT"},\
                    "step": {"result": {"to": "@"}}}
                """.replace("\\\n" + 20 * " ", " ")):
            for text, seen in (("", ""), ("hi ", "hi "), ("[[EMAIL_1]] ", "ann@example.com ")):
                told, shown = [json.loads(
                    said.replace("@", one).replace("#", "bob@example.org").replace("TEXT", part))
                    for part, one in ((text, "bob@example.org"), (seen, "[[EMAIL]]"))]
                data = lines_of(told) if endpoint == "ollama" else events(told)
                for many in (data, 2 * data):
                    found = self.unmask(endpoint, many, answers=True)
                    self.assertEqual(self.payloads(endpoint, found)[-1], shown)
            found = self.unmask(endpoint, encoded(told), answers=True, events=False)
            self.assertEqual(json.loads(found), shown)

    def test_events_that_end_in_one_line_end_are_not_taken_for_one(self):
        for data in self.each((b"data: %b\ndata: %b\n\n", b"data: %b\ndata:%b\n\n")):
            data %= tuple(encoded(delta(one)) for one in ("to bob@exa", "mple.org "))
            self.assertNotIn(b"mple.org", self.unmask("chat", data, answers=True))

    def test_a_large_object_in_an_array_hides_nothing_of_the_next_one(self):
        pieces = [(0, "x"), (0, 30_000 * "x "), (0, "to [[EMA"), (0, "IL_1]] y")]
        for row in self.each([row for row in TEXT_STREAMS if row[0] == "array"]):
            self.assert_comes_back(row, pieces, 1448, answers=True)

    def test_each_object_in_an_array_goes_on_when_it_ends(self):
        row = next(row for row in TEXT_STREAMS if row[0] == "array")
        for size, step in self.each((1, 3000), (7, 100, 1448)):
            data = self.stream(row, [(0, "to [[EMAIL_1]] " * size)] * 3)
            editor = self.editor("array")
            pieces = [editor.feed(data[at:at + step]) for at in range(0, len(data), step)]
            came, shown = [
                [match.end() for match in re.finditer(rb"\}\]\}\}\]\}", one)]
                for one in (data, b"".join(pieces))]
            self.assertEqual((len(came), len(shown)), (3, 3))
            for number, sent in enumerate(itertools.accumulate(map(len, pieces)), 1):
                self.assertEqual(sum(end <= sent for end in shown),
                                 sum(end <= number * step for end in came))

    def test_what_is_no_text_stands_in_events_that_are_read(self):
        odd = b': "\xff": 1\n' + events(delta("an ordinary text "))
        self.assertIn(b"ordinary", self.unmask("chat", odd + events("[DONE]"), answers=True))

    def test_events_that_are_spelled_alike_but_for_ids_and_times_are_read_as_others_are(self):
        chance = Random(3)
        text = "to bob@example.org, \u4eba\n\"the\" fox [[EMAIL_1]] at 8.8.8.8 and so on. [["
        shown = text.replace("bob@example.org", "[[EMAIL]]")
        shown = shown.replace("[[EMAIL_1]]", "ann@example.com")
        for blocks in self.each("""[[0], [0, 1]]"""):
            said = [{"created": chance.randrange(9 ** 9), "id": "c" * chance.randrange(1, 9),
                     **delta(text[at:at + 3])} for at in range(0, len(text), 3) for _ in blocks]
            for number, one in enumerate(said):
                one["choices"] = [{**one["choices"][0], "index": number % len(blocks)}]
            found = self.payloads("chat", self.unmask("chat", events(*said), answers=True))
            self.assertEqual(set(self.said(found).values()), {shown})
            self.assertEqual([one["created"] for one in found[:len(said)]],
                             [one["created"] for one in said])

    def test_an_answer_that_is_no_stream_and_is_as_an_event_of_one_is_read_whole(self):
        masks, said = self.masks(), b'{"message": {"content": " bob@x.org"}, "done": false}\n'
        for streamed, count in self.each(((True, 3), (False, 1))):
            found = self.unmask("ollama", count * said, None, True, streamed, masks=masks)
            self.assertEqual(self.texts("ollama", found), [count * " [[EMAIL]]"])

    def test_quotes_without_an_end_and_thousands_of_strings_are_looked_at_once(self):
        """The former took half a minute."""
        for seed in self.each((b'\\" ', b'"', b'"abcdefgh",', b'{"a":"', b'"\\')):
            with self.computing_within(5):
                found = self.unmask("chat", seed * 20_000, 16384, True, False)
            self.assertEqual(found, seed * 20_000)

    NUMBER = "4111111111111111"
    NUMBERS = '[ {"n": [ -@, @, [], @, {"": @}], "s": "@ \\\\"}, {"m":@}]'.replace("@", NUMBER)

    def test_numbers_of_json_in_an_answer_stay(self):
        said = self.NUMBERS
        shown = json.loads(said.replace('"' + self.NUMBER, '"[[CARD]]'))
        whole = encoded({"arguments": said, "card": self.NUMBER})
        for row in self.each([row for row in TEXT_STREAMS if self.is_json(row)]):
            for at in range(len(said)):
                masks = Masks(Redactor(KINDS))
                data = self.stream(row, [(0, said[:at]), (0, said[at:])])
                found = self.unmask(row[0], data, answers=True, masks=masks)
                text, = self.texts(row[0], found)
                self.assertEqual(json.loads(text), shown)
            found = self.unmask_json(whole, answers=True, masks=masks)
            self.assertEqual((json.loads(found["arguments"]), found["card"]), (shown, "[[CARD]]"))

    NO_JSON = (
        '{"a": "{\\"n\\": @}"}', '{"a": "\\\\\\", [@"}', '{"a": ": @ "}', '{"a": 1} and "n": @ x',
        '[{"a": 1}, x @ ]', '[{"a": 1} @ ]', '{"a": [1], @ ', '{a: @ , "b" @ ',
        '```js\n{a:[ 1 @ ],"b" ,@ }')

    def test_numbers_in_what_only_holds_json_or_begins_as_such_are_masked(self):
        nested = '{"n": %s}' % self.NUMBER
        for text in self.each(self.NO_JSON):
            said, shown = [text.replace("@", one) for one in (self.NUMBER, "[[CARD]]")]
            for at in range(len(said)):
                masks = Masks(Redactor(KINDS))
                data = events(delta(said[:at]), delta(said[at:]))
                found = self.unmask("chat", data, answers=True, masks=masks)
                self.assertEqual(self.texts("chat", found), [shown])
            whole = {"content": said, "arguments": json.dumps({"content": nested}),
                     "input": {"content": [nested]}}
            found = self.unmask_json(encoded(whole), answers=True, masks=masks)
            self.assertEqual(found["content"], shown)
            self.assertNotIn(self.NUMBER, json.dumps(found))

    def test_numbers_in_a_large_text_that_begins_as_json_are_masked(self):
        large = encoded({"a": "[ " + self.NUMBER, "b": 20_000 * "x"})
        found = self.unmask("chat", large, answers=True, events=False,
                            masks=Masks(Redactor(KINDS)))
        self.assertNotIn(self.NUMBER.encode(), found)

    def test_no_probabilities_tell_what_is_masked(self):
        choice = {"logprobs": {"content": [{"token": "bob@", "top_logprobs": []}]}}
        for events_of in self.each((events, encoded)):
            data = events_of({"choices": [{**choice, "delta": {"content": "x "}}], "logprobs": []})
            shown = self.unmask("chat", data, answers=True, events=events_of is events)
            self.assertEqual(json.loads(shown.split(b"data: ")[-1]), {
                "choices": [{"logprobs": None, "delta": {"content": "x "}}], "logprobs": []})
            self.assertEqual(self.unmask("chat", data, events=events_of is events), data)
        listed = encoded([{"choices": [choice]}])
        self.assertEqual(json.loads(self.unmask("chat", listed, answers=True, events=False)),
                         [{"choices": [{"logprobs": None}]}])

    def test_in_a_text_that_begins_as_json_values_are_spelled_as_in_json(self):
        value = self.VALUES["[[SECRETS_12]]"]
        for told in self.each(
                ('{"k": "@"}', '[{"k": "@"}]', '["@"]', '```json\n{"k": "@"}\n```')):
            said = told.replace("@", "[[SECRETS_12]]")
            shown = told.replace("@", spelled(value))
            for cut in range(len(said)):
                found = self.unmask("chat", events(delta(said[:cut]), delta(said[cut:])))
                self.assertEqual(self.texts("chat", found), [shown])
            found = self.unmask("chat", encoded({"content": said}), events=False)
            self.assertEqual(json.loads(found), {"content": shown})

    TOKEN = "eyJ%s.eyJ%s.%s" % ("hbGci9" * 9, "zdWIi9" * 150, "SflKx9" * 9)
    PRIVATE_KEY = "-----BEGIN RSA PRIVATE KEY-----\n%s-----END RSA PRIVATE KEY-----" % (
        50 * ("MIIE" * 16 + "\n"))

    def test_long_secrets_are_masked_wherever_their_text_is_cut(self):
        block = self.PRIVATE_KEY.replace("RSA PRIVATE KEY", "PGP PRIVATE KEY BLOCK").replace(
            "\n", "\nVersion: GnuPG v2.0.22 (GNU/Linux)\nComment: https://x.org\n\n", 1)
        said = 'a "%s", %s %s, %s. 123-45-6789) %s' % (
            self.PRIVATE_KEY, "ya29." + "aB3_" * 110, block, self.TOKEN, "x" * 400)
        shown = 'a "[[SECRETS]]", [[SECRETS]] [[SECRETS]], [[SECRETS]]. [[SSN]]) %s' % ("x" * 400)
        for size in self.each((4, 5, 47, 800)):
            masks = Masks(Redactor(KINDS))
            found = self.unmask("chat", events(*[
                delta(said[at:at + size]) for at in range(0, len(said), size)], "[DONE]"),
                answers=True, masks=masks)
            self.assertEqual(self.texts("chat", found), [shown])

    def test_a_row_in_groups_is_masked_wherever_it_is_seen_whole(self):
        for value in self.each(("4111 1111 1111 1111", "+33 6 12 34 56 78", "123 45 6789",
                                "DE89 3704 0044 0532 0130 00")):
            for size in range(290, 325):
                said = delta("call (%s)%s" % (value, size * "x")), delta(" ok "), "[DONE]"
                found = self.unmask("chat", events(*said), answers=True,
                                    masks=Masks(Redactor(KINDS)))
                self.assertNotIn(value[-6:], str(self.payloads("chat", found)), size)

    def test_a_value_of_which_the_rest_comes_in_a_large_event_is_masked(self):
        for said, shown in self.each((("[[EMAIL", "_1]]"), ("bob@corp", ".com")),):
            found = self.unmask("chat", events(
                delta("to " + said), delta(shown + " x" * 60_000), "[DONE]"), 16384, answers=True)
            text, = self.texts("chat", found)
            self.assertIn(text.split()[1], ("ann@example.com", "[[EMAIL]]"))

    def test_in_parts_too_no_probabilities_tell_what_is_masked(self):
        tokens = [{"token": one, "top": [[], {}]} for one in ("]", "bob", "@corp", '"\\"', ".com")]
        choices = [{"message": {"content": size * "w "}, "logprobs": logprobs, "n": 1}
                   for size in (9, 40_000) for logprobs in ({"content": tokens}, tokens * 2000)]
        data = encoded({"choices": choices, "logprobs": None})
        for step in self.each((1448, 16384)):
            found = json.loads(self.unmask("chat", data, step, answers=True, events=False))
            self.assertEqual(found, {"logprobs": None, "choices": [
                {**one, "logprobs": None if type(one["logprobs"]) is dict else []}
                for one in choices]})

    LONG = "%s\n\u00e9 [[SECRETS]] [[EMAIL]] ann@example.com\t\\ [[CARD]]. "

    def long_text(self, size):
        """LONG as a model says it, again and again, with this many spaces."""
        said = (self.LONG % (size * "x ")).replace("[[EMAIL]]", "bob@corp.com").replace(
            "[[CARD]]", "4111 1111 1111 1111").replace("ann@example.com", "[[EMAIL_1]]")
        return "".join([said.replace("[[SECRETS]]", one)
                        for one in (self.TOKEN, self.PRIVATE_KEY) * (1 + 15_000 // size)])

    def test_of_long_texts_parts_go_on_without_what_must_not_be_seen(self):
        """In one piece of JSON, and in an event that repeats a text."""
        for size, (events_of, step) in self.each(
                (100, 16_000, 30_000), ((events, 16384), (encoded, 5000))):
            message = {"content": self.long_text(size)}
            data = events_of({"choices": [{"message": message, "n": 4111111111111111}]})
            masks, streamed = self.masks(*KINDS), events_of is events
            found = self.unmask("chat", data + events(delta("x")) * streamed, step, answers=True,
                                events=streamed, masks=masks)
            first = found.partition(b"\n")[0].rpartition(b"data: ")[2]
            choice = json.loads(first)["choices"][0]
            self.assertEqual(choice["n"], 4111111111111111)
            self.assertEqual(set(choice["message"]["content"].split(". ")),
                             {self.LONG[:-2] % (size * "x "), ""})
            self.assertEqual(masks.counts["opaque"], 0)

    def test_in_parts_too_a_number_of_a_tool_call_stays_and_its_strings_are_masked(self):
        said = {"n": 4111111111111111, "to": "bob@corp.com", "card": "4111111111111111"}
        shown = {**said, "to": "[[EMAIL]]", "card": "[[CARD]]"}
        for size, times, step in self.each((
                (9, 1, 16384), (20_000, 1, 16384), (8631, 1, 1448), (9, 999, 1448))):
            message = {"content": size * "w ", "tool_calls": [{"function": {
                "name": "f", "arguments": json.dumps([said] * times)}}]}
            data = encoded({"choices": [{"message": message}]})
            masks = self.masks(*KINDS)
            found = json.loads(self.unmask(
                "chat", data, step, answers=True, events=False, masks=masks))
            call_of, = found["choices"][0]["message"]["tool_calls"]
            self.assertEqual(json.loads(call_of["function"]["arguments"]), [shown] * times)

    UNIT = 'to bob@x.org, [[EMAIL_1]] \u00e9 4111 1111 1111 1111 "q"\n'
    TIMES = 100_000 // len(UNIT)
    LARGE_EVENTS = (
        *[(row[0], row[1].replace("N", "0", 1), 16384) for row in TEXT_STREAMS
          if "arguments" not in row[1] and "partial_json" not in row[1]],
        ("chat", '{"choices": [{"delta": {"content": TEXT}, "index": 0}]}', 1448),
        ("responses", '{"type": "response.completed", "response": {"output": [{"content": '
         '[{"type": "output_text", "text": TEXT}]}], "user": null}}', 16384),
        ("messages", '{"type": "message_start", "logprobs": [["bob@", "x.org"], {}],'
         ' "message": {"content": [{"text": TEXT}]}}', 16384))

    def small_and_large(self, endpoint, event):
        """Such an event with a small text, with a large one, and again; and the small text."""
        said = "at b" if "delta" in event else "x"
        small, large = [event.replace("TEXT", json.dumps(one))
                        for one in (said, self.TIMES * self.UNIT)]
        line = "%s\n" if endpoint == "ollama" else "event: x\ndata: %s\n\n"
        data = "".join([line % one for one in (small, large, small)])
        if endpoint == "array":
            data = "[%s]" % ",\n".join((small, large, small))
        return data.encode(), said

    def test_of_an_event_of_any_size_a_slice_is_looked_at_at_once(self):
        """Of a text in it that goes on, too; and nothing of it is passed over."""
        seen, find = [], Redactor.find
        shown = self.UNIT.replace("bob@x.org", "[[EMAIL]]").replace(
            "[[EMAIL_1]]", "ann@example.com").replace("4111 1111 1111 1111", "[[CARD]]")

        def look(redactor, text):
            seen.append(len(text))
            return find(redactor, text)
        patch_until(self.addCleanup, patch.object(Redactor, "find", look))
        for endpoint, event, step in self.each(self.LARGE_EVENTS):
            masks = self.masks(*KINDS)
            data, said = self.small_and_large(endpoint, event)
            found = self.unmask(endpoint, data, step, answers=True, masks=masks)
            texts = "".join(self.texts(endpoint, found))
            self.assertEqual(texts.replace(shown, ""), said + said)
            self.assertEqual((texts.count(shown), masks.counts["opaque"]), (self.TIMES, 0))
            self.assertLess(max(seen), 1 << 16)

    def test_what_is_no_json_is_masked_as_text_and_counted(self):
        said = b": bob@x.org\nevent: x\ndata: bob@x.org [[EMAIL_1]]\n\n"
        shown = b": [[EMAIL]]\nevent: x\ndata: [[EMAIL]] ann@example.com\n\n"
        commented = b": bob@x.org\n" + events(delta("x "))
        for opaque, passed in self.each((("pass", shown), ("refuse", b""))):
            masks = self.masks()
            masks.opaque = opaque
            found = self.unmask("chat", said + commented + b": bob@x.org\n\n" + events("[DONE]"),
                                answers=True, masks=masks)
            self.assertEqual(masks.counts, {"email": 2 + 2 * (opaque == "pass"), "opaque": 1})
            self.assertEqual(found, passed + commented.replace(b"bob@x.org", b"[[EMAIL]]")
                             + b": [[EMAIL]]\n\n" + events("[DONE]"))

    def test_much_that_is_no_json_is_masked_as_text_or_left_out(self):
        said = b"mail bob@x.org {\"%b\" ssn 123-45-6789" % (9_000 * b"word bob@x.org 'x', ")
        shown = said.replace(b"bob@x.org", b"[[EMAIL]]").replace(b"123-45-6789", b"[[SSN]]")
        for is_stream, step in self.each((True, False), (1448, 16384)):
            data = b"data: %b\n\n" % said if is_stream else said
            for opaque in ("pass", "refuse"):
                masks = Masks(Redactor(KINDS), opaque)
                after = events("[DONE]") if is_stream else b""
                found = self.unmask("chat", data + after, step, answers=True, events=is_stream,
                                    masks=masks)
                self.assertEqual(found, after if opaque == "refuse" else
                                 data.replace(said, shown) + after)
                self.assertGreater(masks.counts["opaque"], 0)

    def test_what_stands_beside_the_data_of_events_that_are_alike_is_masked(self):
        data = 6 * (b": bob@x.org\n" + events(delta("x ")))
        self.assertEqual(self.unmask("chat", data, answers=True),
                         data.replace(b"bob@x.org", b"[[EMAIL]]"))

    def test_a_list_stays_one_and_a_line_of_text_hides_no_event_after_it(self):
        said = [delta("bob@x.org "), delta("x ")]
        shown = [delta("[[EMAIL]] "), delta("x ")]
        for data, passed in self.each((
                (encoded(said), shown),
                (b"data: some words\n" + events("[DONE]", *[
                    delta(one) for one in ("mail bob@", "x.org ")], end="\n"), None))):
            found = self.unmask("chat", data, answers=True, events=not passed)
            self.assertNotIn(b"x.org", found)
            self.assertEqual(json.loads(found) if passed else None, passed)

    def test_a_row_of_values_without_a_space_is_masked_wherever_it_is_cut(self):
        for size in self.each((1, 7, 50)):
            said = [delta(("bob@x.org," * 90)[at:at + size]) for at in range(0, 900, size)]
            self.assertNotIn("@", str(self.said(self.payloads("chat", self.unmask(
                "chat", events(*said, "[DONE]"), answers=True)))))


class RedactedAnswersTest(ProxyCase):
    """The way down of a call whose prompt was masked, over HTTP."""
    MAIL = "ann@example.com"
    SAID = {"choices": [{"index": 0, "message": {"content": "to [[EMAIL_1]]"}}], "usage": TOLD}
    STREAM = [delta("to [[EM"), delta("AIL_1]]! ["), LAST_DELTA, USAGE_EVENT, "[DONE]"]

    def setUp(self):
        self.settings = {"REDACT": "email", "REDACT_UPSTREAMS": "*"}

    def told(self, answer, path=CHAT, version=b"1.1", **payload):
        """What a caller sees whose prompt has an address."""
        self.start(answer, **self.settings)
        body = encoded({"model": "m", "prompt": self.MAIL, **payload})
        data = request("POST", path, body).replace(b"HTTP/1.1", b"HTTP/" + version)
        return self.ask(data)

    def streamed(self, *payloads, kind="text/event-stream"):
        return says(events(*payloads), "200 OK", "Content-Type: " + kind)

    def test_an_answer_speaks_of_what_its_caller_said_and_the_vendor_never_sees_it(self):
        for status in self.each(("200 OK", "400 Bad Request")):
            for version in (b"1.1", b"1.0"):
                told = self.told(says(self.SAID, status), version=version)
                self.assertTrue(told.whole)
                self.assertEqual(told.body.decode(),
                                 json.dumps(self.SAID).replace("[[EMAIL_1]]", self.MAIL))
                asked = self.stub.requests[0].body
                self.assertEqual(json.loads(asked)["prompt"], "[[EMAIL_1]]")
                self.assert_entry("redacted", "email=1")

    def test_a_stream_does_so_too_without_the_usage_that_its_caller_did_not_ask_for(self):
        self.settings["TOKEN_COST_MODE"] = "usage"
        for version in self.each((b"1.1", b"1.0")):
            told = self.told(self.streamed(*self.STREAM), version=version, stream=True)
            self.assertTrue(told.whole)
            *found, done, nothing = told.body.decode().split("\n\n")
            self.assertEqual((done, nothing), ("data: [DONE]", ""))
            self.assertEqual([json.loads(one[6:]) for one in found], [
                delta("to "), delta(self.MAIL + "! "), delta("["), LAST_DELTA])
            self.assertEqual((self.entry()["input"], self.outcome()), (20, "ok"))

    def test_what_waits_is_let_go_where_a_stream_is_cut(self):
        self.start(None, **self.settings)
        client, asked = self.ask_stub(call(stream=True, messages=[{"content": self.MAIL}]))
        asked.stream(events(delta("a [["))[:-1])
        asked.close()
        client.head()
        rest = client.rest()
        self.assertFalse(rest.whole)
        found = [json.loads(one[6:]) for one in rest.body.split(b"\n\n") if one]
        self.assertEqual(UnmaskingTest.said(found), {
            ("choices", 0, "delta", "content"): "a [["})

    def test_the_rest_of_a_text_comes_before_what_ends_it_in_lines_of_any_kind(self):
        lines = [{"text": "to [[EMA", "is_finished": False}, {"text": "IL_1]] [", "is_finished":
                 False}, {"is_finished": True, "response": {"text": "to [[EMAIL_1]] ["}}]
        for kind in self.each(("application/stream+json", "application/x-ndjson")):
            told = self.told(says(lines_of(*lines), "200 OK", "Content-Type: " + kind),
                             "/v1/chat", model="m", stream=True)
            found = [json.loads(line) for line in told.body.splitlines()]
            self.assertEqual([one.get("text") for one in found],
                             ["to ", self.MAIL + " ", "[", None])
            self.assertEqual(found[-1]["response"]["text"], "to %s [" % self.MAIL)

    def test_lines_of_json_and_arrays_are_streams_as_well(self):
        lines = [{"response": "to [[EMA", "done": False}, {"response": "IL_1]]", "done": True}]
        told = self.told(says(lines_of(*lines), "200 OK", "Content-Type: application/x-ndjson"),
                         "/api/generate", model="m")
        self.assertEqual([json.loads(line)["response"] for line in told.body.splitlines()],
                         ["to ", self.MAIL])
        parts = [{"candidates": [{"content": {"parts": [{"text": text}]}}]}
                 for text in ("to [[EMA", "IL_1]]")]
        told = self.told(says(parts),
                         "/v1beta/models/m:streamGenerateContent")
        self.assertEqual(UnmaskingTest.said(told.json()), {
            ("candidates", "content", "parts", "text"): "to " + self.MAIL})

    def test_an_answer_that_cannot_be_read_is_counted_and_passed_or_refused(self):
        packed = gzip.compress(encoded(self.SAID))
        for body, field, opaque, status in self.each([
                (*answer, *way) for way in (("pass", 200), ("refuse", 502))
                for answer in ((packed, "Content-Encoding: gzip"),
                               (b"to [[EMAIL_1]]", "Content-Type: text/plain"))]):
            self.settings["REDACT_OPAQUE"] = opaque
            told = self.told(says(body, "200 OK", field))
            self.assertEqual((told.status, told.body == body), (status, status == 200))
            self.assert_entry("redacted", "email=1,opaque=1")

    def test_what_the_answer_alone_says_is_counted_where_it_is_masked(self):
        self.settings["REDACT_ANSWERS"] = "on"
        said = events(delta("[[EMAIL_1]] bob@exam"), delta("ple.org"), LAST_DELTA, "[DONE]")
        told = self.told(says(said, "200 OK", "Content-Type: text/event-stream"), stream=True)
        found = [json.loads(one[6:]) for one in told.body.split(b"\n\n") if b"{" in one]
        self.assertEqual(list(UnmaskingTest.said(found).values()), [self.MAIL + " [[EMAIL]]"])
        self.assert_entry("redacted", "email=2")


# --------------------------------------------------------------------------------------------------
# Wire
# --------------------------------------------------------------------------------------------------

def raw_head(text, body=b""):
    """A head written in one line, with ' | ' for every line end, and the body behind it."""
    return text.replace(" | ", "\r\n").encode("latin-1") + b"\r\n\r\n" + body


POST = "POST /v1/files HTTP/1.1 | "
USUAL = POST + "Host: x | Content-Length: 0 | "


class HeadTest(ProxyCase):
    TAKEN = """
        POST /v1/files HTTP/1.1 | Host: x | Content-Length: 0
        POST /v1/files HTTP/1.1 | Host:x | Content-Length:0
        POST /v1/files HTTP/1.1 | hOST: x | CONTENT-length: 0
        POST /v1/files HTTP/1.1 | Host: x | Content-Length: 0 | X-Empty:
        POST /v1/files HTTP/1.1 | Host: x | Content-Length: 0 | !#$%&'*+-.^_`|~09AZaz: x
        POST /v1/files HTTP/1.1 | Host: x | Content-Length: 0 | Accept: a | Accept: b
        POST /v1/files HTTP/1.1 | Host: x.example:8899 | Content-Length: 0
        POST /v1/files HTTP/1.1 | Host: [::1]:8899 | Content-Length: 0
        POST /v1/files HTTP/1.1 | Host: | Content-Length: 0
        POST http://x:1/v1/files HTTP/1.1 | Host: x:1 | Content-Length: 0
        POST /v1/files HTTP/1.0 | Host: x | Content-Length: 0
        POST /v1/files HTTP/1.0 | Content-Length: 0
        OPTIONS * HTTP/1.1 | Host: x"""
    TAKEN_TOO = [
        POST + "Host:\t x \t | Content-Length: 0",
        USUAL + "X-Name: \xe4\xff",
        USUAL + " | ".join("X-%d: x" % number for number in range(98)),
        USUAL + "X-Long: " + "x" * 8000,
        USUAL + "Authorization: Bearer " + "x" * 9000,
        USUAL + "Cookie: " + "x" * 32000,
        USUAL + " | ".join(["X-Long: " + "x" * 8000] * 7),
        "POST /v1/%s HTTP/1.1 | Host: x | Content-Length: 0" % ("x" * 8000)]
    REFUSED = """
        400 POST /v1/files HTTP/1.1 |  Host: x | Content-Length: 0
        400 POST /v1/files HTTP/1.1 | Host: x | Content-Length : 0
        400 POST /v1/files HTTP/1.1 | host: a | HOST: b | Content-Length: 0
        400 POST /v1/files HTTP/1.1 | Content-Length: 0
        400 POST /v1/files HTTP/1.1 | Host: x/y | Content-Length: 0
        400 POST /v1/files HTTP/1.1 | Host: a@x | Content-Length: 0
        400 POST /v1/files HTTP/1.1 | Host: a b | Content-Length: 0
        400 POST /v1/files HTTP/1.1 | Host: x | Content-Length: 5 | Content-Length: 5
        400 POST /v1/files HTTP/1.1 | Host: x | Content-Length: 5 | content-length: 6
        400 POST /v1/files HTTP/1.1 | Host: x | Content-Length: 5 | Transfer-Encoding: chunked
        400 POST /v1/files HTTP/1.1 | Host: x | Transfer-Encoding: chunked | Content-Length: 5
        400 POST /v1/x HTTP/1.1 | Host: x | Transfer-Encoding: chunked | Transfer-Encoding: chunked
        501 POST /v1/files HTTP/1.1 | Host: x | Transfer-Encoding: gzip
        501 POST /v1/files HTTP/1.1 | Host: x | Transfer-Encoding: gzip, chunked
        501 POST /v1/files HTTP/1.1 | Host: x | Transfer-Encoding: xchunked
        501 POST /v1/files HTTP/1.1 | Host: x | Transfer-Encoding:
        400 POST /v1/x HTTP/1.0 | Host: x | Transfer-Encoding: chunked
        400 GET / | Host: x
        400 GET / http/1.1 | Host: x
        400 GET  / HTTP/1.1 | Host: x
        400 GET / HTTP/1.1  | Host: x
        400 GET /a b HTTP/1.1 | Host: x
        400 GET /#x HTTP/1.1 | Host: x
        400 GET x HTTP/1.1 | Host: x
        400 GET http://y/ HTTP/1.1 | Host: x
        400 GET http://a@x/ HTTP/1.1 | Host: x
        400 GET * HTTP/1.1 | Host: x
        400 get / HTTP/1.1 | Host: x
        501 CONNECT x:443 HTTP/1.1 | Host: x
        505 GET / HTTP/2.0 | Host: x
        505 GET / HTTP/1.2 | Host: x"""
    REFUSED_TOO = [
        "GET / HTTP/1.1\nHost: x\n\n",
        "GET /v1/x HTTP/1.1\nHost: x",
        "GET\t/ HTTP/1.1 | Host: x",
        "A" * 33 + " / HTTP/1.1 | Host: x",
        "GET /\xe4 HTTP/1.1 | Host: x",
        "GET /\x01 HTTP/1.1 | Host: x",
        POST + "Host\t: x | Content-Length: 0",
        POST + "Host: x | Transfer-Encoding: \x0bchunked",
        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"]  # TLS
    REFUSED_FIELDS = [  # after the usual ones
        "X-A: b\nX-C: d", "X-A: b\rX-C: d", "X-A: b |  folded", "X-A", ": x", "X(A): x",
        "X-\xe4: x", "X-A: b\x00c", "X-A: b\x1bc", "X-A: b\x7fc", "Host: x",
        "Authorization: Bearer a | Authorization: Bearer b"]
    REFUSED_LENGTHS = [
        "+5", "-1", "-0", "1_0", "0x10", "5,5", "5, 5", "", "²", "5 5", "5;", "5.0", "9" * 27]
    TOO_LARGE = [
        ("431", USUAL + " | ".join("X-%d: x" % number for number in range(99))),
        ("431", USUAL + " | ".join(["X-A: " + "x" * 1000] * 70)),
        ("431", USUAL + "X-A: " + "x" * 10000),
        ("431", USUAL + "Cookie: " + "x" * 40000),
        ("431", USUAL + "X-A: " + "x" * 70000),
        ("414", "GET /%s HTTP/1.1 | Host: x" % ("x" * 10000)),
        ("414", "GET /%s HTTP/1.1 | Host: x" % ("x" * 70000))]

    def test_well_formed_heads_are_taken(self):
        table = [raw_head(text) for text in rows(self.TAKEN) + self.TAKEN_TOO]
        table += [b"\r\n" * number + table[0] for number in (1, 3)]
        table.append(raw_head(POST + "Host: x | Content-Length: 0002", b"{}"))
        for field in ("Transfer-Encoding: chunked", "transfer-encoding: CHUNKED"):
            table.append(raw_head(POST + "Host: x | " + field, chunk(b"{}") + LAST))
        for data in self.each(table):
            self.assertLess(self.ask(data, "POST").status, 300)

    def test_empty_lines_before_a_head_are_skipped_on_both_sides_and_bytes_may_come_singly(self):
        """Some clients send one after a body (RFC 9112 2.2)."""
        self.start(sends(b"\r\n" + answer(), close=False))
        client = self.connect()
        for data in self.each([call() + b"\r\n", call() + b"\r\n", b"\r\n\r\n" + call()]):
            client.answers(200, data)
        client = self.connect()
        for byte in b"\r\n\r\n" + call():
            client.send(bytes([byte]))
        self.assertEqual((client.read().status, self.stub.last.body), (200, chat()))
        self.connect().answers(400, b"\r\n" * 20 + call())
        self.patch_seconds(ClientConnection_HEAD_SECONDS=0.1)
        client.send(b"\r\n")
        client.expect_close()

    def test_an_answer_with_long_lines_and_many_fields_is_passed_on(self):
        fields = ["X-Long: " + "x" * 20000] + ["X-%d: x" % number for number in range(400)]
        self.start(says(b"{}", "200 OK", *fields))
        answered = self.ask()
        self.assertEqual((answered.get("x-long"), answered.get("x-399")), ("x" * 20000, "x"))

    def test_everything_else_is_refused_and_ends_the_connection(self):
        self.patch_seconds(RefusalSums_SHOWN=999)
        self.start()
        heads = self.REFUSED_TOO + [USUAL + field for field in self.REFUSED_FIELDS]
        heads += [POST + "Host: x | Content-Length: " + text for text in self.REFUSED_LENGTHS]
        table = self.TOO_LARGE + [("400", text) for text in heads]
        table += [row.split(" ", 1) for row in rows(self.REFUSED)]
        for status, text in self.each(table):
            client = self.connect()
            body = LAST if text.startswith("POST") else b""
            answered = client.answers(int(status), raw_head(text, body))
            answered.tells("type", "invalid_request_error")
            self.assertEqual(answered.get("connection"), "close")
            client.expect_close()
        self.assert_calls(0)
        wait_for(lambda: len(self.lines.entries()) == len(table), "a line for each")
        self.assertEqual({entry["outcome"] for entry in self.lines.entries()}, {"refused"})

    def test_a_line_that_cannot_be_right_is_refused_before_the_head_is_complete(self):
        for start in self.each([
                b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n", b"GET / HTTP/1.1\r\nHost: x\nX: y",
                b"GET / HTTP/1.1\nHost: x", b"GET / HTTP/1.1\r\n folded: x\r\n",
                b"GET / HTTP/1.1\r\nHost: x\rX", b"GET / HTTP/1.1\r\nX-A : x\r\nX", b"\r\n\n",
                b"\x16\x03\x01", b" GET", b"\r\nget"]):
            client = self.connect()
            client.answers(400, start)
            client.expect_close()

    def test_methods_that_make_an_upstream_echo_what_it_got_are_not_passed_on(self):
        self.start(BASE_API_KEY="sk-up")
        for method in self.each(["TRACE", "TRACK", "CONNECT"]):
            self.assert_status(405, request(method, "/v1/x"), error="invalid_request_error")
        self.assert_calls(0)

    def test_a_websocket_is_answered_by_what_to_do_instead_and_other_upgrades_are_ignored(self):
        for method, upgrade in self.each(
                ("GET", "POST"), ("websocket", "h2c, WebSocket/13")):
            fields = "Connection: Upgrade", "Upgrade: " + upgrade
            self.assert_status(426, request(method, "/v1/responses", b"", *fields),
                               "upgrade: HTTP/1.1", "connection: upgrade",
                               error="invalid_request_error")
        self.assertEqual((self.stub.calls, self.outcome()), (0, "refused"))
        fields = "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"
        self.assert_status(200, call(None, *fields))
        rows = "GET", "/v1/x", b"", "Upgrade: websocket"
        self.assert_status(200, request(*rows, version="1.0"))

    def test_a_head_may_come_in_any_three_pieces(self):
        """Each piece is sent when the one before it was read. Of all ways, each 13th is tried."""
        data = raw_head("GET /v1/x HTTP/1.1 | Host: x | X-A: b")
        ways = list(itertools.combinations(range(1, len(data)), 2))
        for first, second in self.each(ways[::13]):
            client = self.connect()
            self.send_apart(client, data[:first], data[first:second], data[second:])
            self.assertEqual(client.read("GET").status, 200)
            client.close()

    def test_a_caller_who_leaves_within_a_head_or_between_calls_is_no_error_of_ours(self):
        for hang_up in self.each([Client.close, Client.reset]):
            hang_up(self.send(b"POST /v1/x HTTP/1.1\r\nHost:"))
            client = self.connect()
            client.answers(200, call())
            hang_up(client)
        wait_for(lambda: not self.server.open, "the end of the connections")

    def test_ten_requests_in_one_segment_are_answered_in_order(self):
        self.start(lambda asked: asked.send(answer(asked.body)))
        client = self.connect()
        client.send(b"".join(request("POST", path, chat(seed=seed))
                             for seed in range(5) for path in (CHAT, "/v1/files")))
        seeds = [client.read().json()["seed"] for _ in range(10)]
        self.assertEqual(seeds, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4])


class RepeatedHeadTest(ProxyCase):
    """Nothing learned from one head of a connection is used for the next, however alike."""

    def test_the_framing_of_one_request_is_not_that_of_the_next(self):
        five = raw_head(POST + "Host: x | Content-Length: 5", b"hello")
        chunked = raw_head(POST + "Host: x | Transfer-Encoding: chunked", chunk(b"hello") + LAST)
        for first, fields, body, status in self.each([
                (five, " | Content-Length: 2", b"ho", 200),
                (five, "", b"", 200),
                (five, " | Content-Length: 2 | Content-Length:5", b"hello", 400),
                (five, " | Content-Length: +5", b"hello", 400),
                (chunked, " | Transfer-Encoding: chunked | Content-Length: 2", LAST, 400)]):
            self.start()
            client = self.connect()
            client.answers(200, first)
            second = client.exchange(raw_head(POST + "Host: x" + fields, body))
            self.assertEqual(second.status, status)
            bodies = [asked.body for asked in self.stub.requests]
            self.assertEqual(bodies, [b"hello", body][:1 + (status == 200)])

    def test_another_key_is_another_caller(self):
        client = self.connect()
        for key in "abb":
            client.exchange(call(key))
        self.assertEqual((self.left("a"), self.left("b")), (999, 998))

    def test_a_length_in_an_unusual_spelling_is_a_length_the_second_time_too(self):
        for field in self.each("""[
                "Content-length: 2", "CONTENT-LENGTH: 2", "Content-Length:2",
                "Content-Length:  2", "Content-Length: 2 ", "content-length: 2",
                "Content-Length: 02"]"""):
            self.start(sends(raw_head("HTTP/1.1 200 OK | " + field, b"{}"), close=False))
            client = self.connect()
            for _ in range(3):
                answered = client.exchange(request("GET", "/v1/files"), "GET")
                self.assertEqual((answered.get("content-length"), answered.body), ("2", b"{}"))
            self.assertEqual(self.stub.connections, 1)

    def test_the_length_of_an_answer_is_not_that_of_one_whose_head_came_while_it_was_read(self):
        self.start(None, LIMITS="each 1000 tokens per day")
        calls = []
        for length in (300, 60):
            client, asked = self.ask_stub(call(stream=True))  # is asked for usage
            head, _, body = answer(length * b"x", "400 No").partition(b"\r\n\r\n")
            asked.send(head + b"\r\n\r\n")
            calls.append((client, asked, body))
            wait_for(lambda: len(calls) == sum(["the body of" in connection.context.what
                                                for connection in self.server.open.copy()]))
        for client, asked, body in calls:
            asked.send(body)
            self.assertEqual(client.read().body, body)

    def test_the_length_of_one_answer_is_not_that_of_the_next(self):
        self.start(lambda asked: asked.send(answer(b"x" * int(asked.target[4:]))))
        client = self.connect()
        for length in self.each("""[1, 10, 9, 100, 0, 99]"""):
            answered = client.exchange(request("GET", "/v1/%d" % length), "GET")
            self.assertEqual(answered.body, b"x" * length)


class FramingTest(ProxyCase):
    """The framing of bodies: how they are read, and how they are passed on."""
    BODY = (b"5;name=value\r\nhello\r\n0006 ; x=\"y\"\r\n world\r\nA\r\n0123456789\r\n"
            b"0\r\nX-Trailer: x\r\n\r\n")
    PASSED = BODY.replace(b"X-Trailer: x\r\n", b"")
    PAYLOAD = b"hello world0123456789"
    BROKEN = [
        # sizes
        b"\r\nhello\r\n", b"5\nhello\r\n", b"+5\r\nhello\r\n", b"-5\r\nhello\r\n",
        b"0x5\r\nhello\r\n", b"0_5\r\nhello\r\n", b"g\r\n", b" 5\r\nhello\r\n",
        b"5 \r\nhello\r\n", b"00000000000000005\r\nhello\r\n", b"5,5\r\nhello\r\n",
        b"5\rhello\r\n",
        # extensions
        b"5;a\x00\r\nhello\r\n", b"5;a\rb\r\nhello\r\n", b"5;a\nb\r\nhello\r\n",
        b"5;" + b"x" * 2000,
        # the end of a chunk
        b"6\r\nhello\r\n0\r\n\r\n", b"4\r\nhello\r\n0\r\n\r\n", b"5\r\nhello0\r\n\r\n",
        b"5\r\nhello\n0\r\n\r\n", b"5\r\nhello\r0\r\n\r\n", b"5\r\nhelloX\r\n",
        # the end of the body
        b"0\n\n", b"0\r\n\n", b"0\r\nX: y\n\r\n", b"0\r\nno colon\r\n\r\n",
        b"0\r\nX: y\r\n z\r\n\r\n", b"0\r\nX : y\r\n\r\n", b"0\r\nX: \x00\r\n\r\n",
        b"0\r\n" + b"X: y\r\n" * 2000]

    def feed(self, *pieces):
        """(What was passed on, the payload); what comes after the end is `trailing`."""
        self.framing = framing = Chunked()
        passed = payload = b""
        for piece in pieces:
            if framing.ended:
                framing.trailing += piece
                continue
            same, part = framing.feed(piece)
            passed += same
            payload += part
        return passed, payload

    def ends(self):
        return self.framing.ended, self.framing.end_of_stream()

    def test_every_split_of_chunks_gives_the_same_payload_and_no_trailers(self):
        data = self.BODY + b"NEXT"
        every = range(len(data))
        ways = ((first, second) for first in every for second in every[first::5])
        for first, second in self.each(ways):
            found = self.feed(data[:first], data[first:second], data[second:])
            self.assertEqual(found, (self.PASSED, self.PAYLOAD))
            self.assertEqual((self.ends(), self.framing.trailing), ((True, True), b"NEXT"))
        found = self.feed(*(bytes([byte]) for byte in self.BODY))
        self.assertEqual(found, (self.PASSED, self.PAYLOAD))

    def test_chunks_that_stop_anywhere_have_not_ended(self):
        for size in self.each(range(len(self.BODY))):
            passed, _ = self.feed(self.BODY[:size])
            self.assertEqual(self.ends(), (False, False))
            self.assertFalse(passed.endswith(LAST), "the last chunk had not come")

    def test_broken_chunks_are_malformed_however_they_come(self):
        for data in self.each(self.BROKEN):
            step = 1 if len(data) < 100 else 97
            pieces = [data[at:at + step] for at in range(0, len(data), step)]
            self.assertRaises(Malformed, self.feed, data)
            self.assertRaises(Malformed, self.feed, *pieces)

    def test_a_body_until_the_close_ends_with_it(self):
        self.framing = framing = llm_proxy.UntilClose()
        self.assertEqual(framing.feed(b"hello"), (b"hello", b"hello"))
        self.assertEqual(self.ends(), (False, True))

    def test_framing_is_kept_dropped_or_made_as_the_two_sides_need_it(self):
        passage, until_close = llm_proxy.BodyAdapter, llm_proxy.UntilClose
        chunks = b"5\r\nhello\r\n1;x\r\n!\r\n" + LAST
        for framing, style, data, expected in self.each([
                (Chunked(), llm_proxy.AS_IS, chunks, chunks),
                (Chunked(), llm_proxy.PAYLOAD, chunks, b"hello!"),
                (llm_proxy.Sized(6), llm_proxy.AS_IS, b"hello!", b"hello!"),
                (until_close(), llm_proxy.AS_IS, b"hello!", b"hello!"),
                (until_close(), llm_proxy.CHUNKED, b"hello!", chunk(b"hello!") + LAST)]):
            one = passage(framing, style)
            found = one.feed(data)
            if not framing.ended:
                whole, rest = one.end_of_stream()
                self.assertTrue(whole)
                found += rest
            self.assertEqual((found, one.passed), (expected, 6))


# --------------------------------------------------------------------------------------------------
# Streams
# --------------------------------------------------------------------------------------------------

class StreamTest(ProxyCase):
    BODILESS = """
        HEAD HTTP/1.1 200 OK | Content-Length: 1000
        HEAD HTTP/1.1 200 OK
        HEAD HTTP/1.1 200 OK | Transfer-Encoding: chunked
        POST HTTP/1.1 204 No Content
        GET HTTP/1.1 304 Not Modified | ETag: x
        GET HTTP/1.1 304 Not Modified | Content-Length: 9
        POST HTTP/1.1 200 OK | Content-Length: 0"""

    def test_every_event_reaches_the_caller_before_the_next_one_is_sent(self):
        """Text that looks like the end of a stream does not end it."""
        client, asked = self.begin()
        payloads = [*map(event, range(20)), b"data: [DONE]\n\n", b"0\r\n\r\n",
                    b'data: {"text": " [DONE]"}\n\n']
        for payload in payloads:
            asked.chunks(payload)
            client.expect(payload)
        asked.chunks(end=True)
        answered = client.rest()
        self.assertEqual((answered.whole, answered.get("content-type")),
                         (True, "text/event-stream"))
        entry = self.entry()
        self.assertEqual((entry["bytes"], entry["stream"]), (sum(map(len, payloads)), True))

    def test_the_bytes_of_a_stream_pass_unchanged_chunk_by_chunk(self):
        client, asked = self.begin()
        chunks = (event(1) + event(2), event(3)[:7], event(3)[7:], b"data: [DONE]\n\n")
        body = b"2;x=y\r\n: \r\n" + b"".join(map(chunk, chunks)) + LAST
        for byte in body:
            asked.send(bytes([byte]))
        self.assertEqual(client.reader.until(b"\r\n0\r\n\r\n"), body)

    def test_answers_of_every_framing_reach_callers_of_both_versions(self):
        """Where the caller's version allows it, the connection carries another call."""
        payload = b"".join(map(event, range(50)))
        sized = "HTTP/1.0 200 OK | Content-Length: %d" % len(payload)
        answers = [
            sends(answer(payload), close=False),
            sends(STREAM + chunk(payload) + LAST, close=False),
            sends(raw_head("HTTP/1.1 200 OK", payload)),
            sends(raw_head("HTTP/1.0 200 OK", payload)),
            sends(raw_head(sized, payload))]
        for self.stub.answer, version in self.each(answers, ("1.1", "1.0")):
            client = self.connect()
            data = request("POST", CHAT, chat(), version=version)
            for _ in range(2 if version == "1.1" else 1):
                answered = client.exchange(data)
                self.assertEqual((answered.status, answered.whole), (200, True))
                self.assertEqual(answered.body, payload)
            if version == "1.0":
                self.assertIsNone(answered.get("transfer-encoding"))
                client.expect_close()

    def test_answers_without_a_body_end_with_their_head(self):
        for row in self.each(rows(self.BODILESS)):
            method, text = row.split(" ", 1)
            _, _, length = row.partition("Content-Length: ")
            self.stub.answer = sends(raw_head(text), close=False)
            client = self.connect()
            for _ in range(2):
                answered = client.exchange(request(method, "/v1/x"), method)
                self.assertEqual((answered.body, answered.whole), (b"", True))
                self.assertEqual(answered.get("content-length"), length or None)
                self.assertIsNone(answered.get("transfer-encoding"))

    def stream_pair(self):
        """Returns a loop, a Stream on it, and the socket at its other end."""
        loop, (ours, theirs) = llm_proxy.Loop(), socket.socketpair()
        stream = Stream(loop, ours)
        for one in (loop, theirs, stream):
            self.addCleanup(one.close)
        return loop, stream, theirs

    def test_what_is_posted_goes_with_the_loops_next_pass_or_before_what_follows_it(self):
        loop, stream, theirs = self.stream_pair()
        theirs.setblocking(False)
        stream.post(b"1")
        self.assertRaises(BlockingIOError, theirs.recv, 9)
        loop.run_until_complete(asyncio.sleep(0))
        self.assertEqual(theirs.recv(9), b"1")
        for act, sent in ((stream.write, b"23"), (stream.post, b"23"), (None, b"2")):
            stream.post(b"2")
            if act:
                act(b"3")
            else:
                stream.close()
            self.assertEqual(theirs.recv(9), sent)
        self.assertEqual(theirs.recv(9), b"")

    def test_an_idle_connection_is_looked_at_unless_the_loop_has_done_so_since(self):
        for came, look, silent in self.each((
                (b"", True, True), (b"", False, True), (b"x", True, False), (b"x", False, False))):
            loop, stream, theirs = self.stream_pair()
            stream.resume_reading()
            stream.idle_since = loop.selector.looks
            theirs.send(came)
            self.assertEqual(stream.is_silent(look), silent)
            loop.run_until_complete(asyncio.sleep(0))
            self.assertEqual(stream.is_silent(look), silent)

    def test_what_is_posted_and_is_not_little_goes_at_once(self):
        _, stream, theirs = self.stream_pair()
        stream.post(b"x" * 4097)
        self.assertEqual(len(theirs.recv(9999)), 4097)

    def tls_pair(self):
        """Returns a Stream before its handshake, and the socket at its other end."""
        ours, theirs = socket.socketpair()
        stream = Stream(self.loop, self.tls.wrap_socket(
            ours, server_side=True, do_handshake_on_connect=False))
        self.addCleanup(stream.sock.close)
        self.addCleanup(theirs.close)
        return stream, theirs

    def shake_hands(self, stream):
        self.loop.run_until_complete(stream.handshake(Context(self.loop), PATIENCE))

    def shaken(self):
        """The same after it, and the other end's number."""
        stream, sock = self.tls_pair()
        trusting, found = ssl.create_default_context(cafile=self.file), []
        with threads([lambda: found.append(trusting.wrap_socket(
                sock, server_hostname="127.0.0.1"))]):
            self.shake_hands(stream)
        self.addCleanup(found[0].close)
        return stream, found[0].fileno()

    def test_what_fails_on_one_tls_connection_is_not_taken_for_anothers_failure(self):
        """OpenSSL keeps failures by thread, and PyPy does not clear them."""
        self.loop, self.file = llm_proxy.Loop(), pem_file(self)
        self.addCleanup(self.loop.close)
        self.tls = server_context(self.file, None)
        healthy, _ = self.shaken()
        for bad in self.each((b"GET / HTTP/1.1\r\n\r\n", b"\x15\x03\x01\x00\x02\x02\x28")):
            stream, sock = self.tls_pair()
            sock.send(bad)
            with self.assertRaises(OSError):
                self.shake_hands(stream)
            broken, peer = self.shaken()
            os.write(peer, bad)
            for one in (healthy, broken, healthy):
                one.on_readable()
            self.assertEqual((healthy.ended, broken.ended), (False, True))

    def test_large_bodies_are_understood_one_by_one_and_callers_in_turn(self):
        loop, seen, rounds = llm_proxy.Loop(), [], []
        self.addCleanup(loop.close)
        turns, gone = llm_proxy.Turns(loop), Context(loop)

        def next_round():
            rounds.append(loop.call_soon(next_round))

        async def understand(name, context):
            await turns.take(name[0], context)
            seen.append((name, len(rounds)))

        async def understand_all():
            next_round()
            tasks = [loop.create_task(understand(name, gone if name == "a2" else
                     Context(loop))) for name in ("a1", "a2", "a3", "a4", "b1")]
            loop.call_soon(gone.end, CallerGone())
            return await asyncio.gather(*tasks, return_exceptions=True)
        ended = loop.run_until_complete(understand_all())
        self.assertEqual([name for name, _ in seen], ["a1", "b1", "a3", "a4"])
        self.assertEqual(len({number for _, number in seen}), 4)
        self.assertIsInstance(ended[1], CallerGone)
        self.assertFalse(turns.waiting)

    def test_trailers_are_dropped(self):
        trailers = b"0\r\nX-Trailer: y\r\nSet-Cookie: z\r\n\r\n"
        self.start(sends(STREAM + chunk(b"x") + trailers, close=False))
        client = self.send(call())
        client.head()
        self.assertEqual(client.reader.until(b"0\r\n\r\n"), chunk(b"x") + LAST)
        self.assertEqual(client.exchange(call()).body, b"x")

    def test_a_caller_may_send_its_next_request_while_a_stream_is_running(self):
        client, asked = self.begin(b"one")
        client.send(call(seed=2))
        asked.chunks(b"two")
        client.expect(b"two")
        self.assert_calls(1)
        asked.chunks(end=True)
        self.assertEqual(client.rest().body, b"onetwo")
        asked = self.stub.next()
        self.assertEqual(asked.json()["seed"], 2)
        asked.answer(b"three")
        self.assertEqual(client.read().body, b"three")

    def blocks(self, number=512):
        """So many blocks of 64 KiB, each of its own."""
        return (b"%08d" % one * 8192 for one in range(number))

    def flood(self, asked):
        """Send 32 MiB, as far as they are taken; -> ([bytes sent], the thread that sends)"""
        sent = [0]

        def run():
            with suppress(OSError):
                for block in self.blocks():
                    asked.chunks(block)
                    sent[0] += len(block)
                asked.chunks(end=True)
        thread = Thread(target=run, daemon=True)
        thread.start()
        return sent, thread

    def digest(self, pieces):
        found = hashlib.sha256()
        for piece in pieces:
            found.update(piece)
        return found.hexdigest()

    def test_a_caller_who_does_not_read_stops_its_own_upstream_and_nobody_elses(self):
        """What is on its way is bounded by socket buffers, not by what the upstream has."""
        self.start(None)
        slow, flooding = self.begin(client=self.connect(receive_buffer=65536))
        sent, thread = self.flood(flooding)
        quick, asked = self.begin()
        seen = list(range(-10, 0))
        while len(set(seen)) > 1:  # until nothing moved for a while, or all was taken
            seen = seen[1:] + [sent[0]]
            asked.chunks(event(1))
            quick.expect(event(1))
            time.sleep(0.02)
        self.assertLess(sent[0], 24 << 20)
        self.assertEqual(self.digest(slow.pieces), self.digest(self.blocks()))
        thread.join(PATIENCE)

    def test_a_caller_who_does_not_read_and_leaves_closes_its_upstream(self):
        self.start(None)
        for number, hang_up in self.each(enumerate([Client.close, Client.reset])):
            slow, flooding = self.begin(client=self.connect(receive_buffer=65536))
            sent, thread = self.flood(flooding)
            wait_for(lambda: sent[0] > 1 << 20)
            hang_up(slow)
            thread.join(PATIENCE)
            self.assertFalse(thread.is_alive())
            self.assertLess(sent[0], 32 << 20)
            self.assert_entry("outcome", "caller_gone", number)

    def test_a_large_download_passes_whole(self):
        def large(asked):
            asked.send(raw_head("HTTP/1.1 200 OK | Content-Length: %d" % (20 << 20)))
            for block in self.blocks(320):
                asked.send(block)
        self.start(large)
        client = self.send(request("GET", "/v1/files/1/content"))
        client.head("GET")
        self.assertEqual(self.digest(client.pieces), self.digest(self.blocks(320)))

    def test_many_streams_run_at_once(self):
        self.start(None, MAX_TOKENS=100)
        streams = [self.begin() for _ in range(40)]
        for number in range(5):
            for _, asked in streams:
                asked.chunks(event(number))
            for client, _ in streams:
                client.expect(event(number))
        for client, asked in streams:
            asked.chunks(end=True)
            client.expect_end()


# --------------------------------------------------------------------------------------------------
# Line
# --------------------------------------------------------------------------------------------------

class LineTest(ProxyCase):
    """Turns, as steps: who enters, who leaves, who runs then."""

    def start_line(self, most=1, queue=100, per_caller=100):
        self.limits = llm_proxy.QueueLimits(queue, per_caller, 30)
        self.line = llm_proxy.FairQueue(most, self.limits, Clock())
        self.running = []
        self.waiting = []
        return self.line

    def enter(self, key, weight=1):
        slot = self.line.enter(key, weight)
        (self.running if slot.running else self.waiting).append(slot)
        return slot

    def leave(self, number=0):
        """One of the running calls ends, the oldest first; -> the keys whose call begins then."""
        self.running.pop(number).leave()
        begun = [slot for slot in self.waiting if slot.running]
        for slot in begun:
            first = next(one for one in self.waiting if one.owner is slot.owner)
            self.assertIs(slot, first, "a call overtook another of its caller")
            self.waiting.remove(slot)
        self.running += begun
        return "".join(slot.owner.key for slot in begun)

    def assert_empty(self):
        line, limits = self.line, self.limits
        found = line.running, line.queues, limits.waiting, limits.by_caller
        self.assertEqual(found, (0, {}, 0, {}))

    def test_one_call_waits_for_at_most_one_call_whatever_another_caller_has_queued(self):
        for most in self.each([1, 2, 4]):
            self.start_line(most)
            for key in "a" * (50 + most) + "b":
                self.enter(key)
            self.assertEqual(len(self.waiting), 51)
            self.assertEqual(self.leave(), "b")

    def test_callers_take_turns(self):
        for weights, waiting, expected in self.each("""[
                [{}, "aaaabbbb", "babababa"], [{"a": 3}, "aaaaaabb", "baaabaaa"],
                [{}, "aaabbbccc", "bcabcabca"], [{"b": 2}, "aabbbb", "bababb"]]"""):
            self.start_line()
            for key in "a" + waiting:
                self.enter(key, weights.get(key, 1))
            self.assertEqual("".join(self.leave() for _ in waiting), expected)

    def test_nobody_is_starved_by_those_who_come_again_and_again_or_are_ever_new(self):
        for most, flood, weight in self.each((1, 2), (False, True), (1, 3)):
            line = self.start_line(most, 10 ** 6, 10 ** 6)
            begun = Counter()
            weights = {"a": weight, "b": 1, "c": 1}
            for key in "aaabc":
                self.enter(key, weights[key])
            for turn in range(3000):
                key = self.running[0].owner.key
                begun[key] += 1
                self.leave()
                if key in weights:
                    self.enter(key, weights[key])
                if flood and turn % 2:
                    self.enter("new %d" % turn)
                self.assertLess(len(line.queues), 20 + len(self.running + self.waiting))
            shares = [begun[key] / weights[key] for key in weights]
            self.assertGreater(min(shares), 0.6 * max(shares))
            self.assertGreater(min(shares), 50)

    def test_the_line_is_bounded_in_all_and_for_each(self):
        line = self.start_line(queue=3, per_caller=2)
        other = llm_proxy.FairQueue(1, self.limits, Clock())
        running = [one.enter("a", 1).running for one in (line, other, line, other)]
        self.assertEqual(running, [True, True, False, False])
        with self.assertRaisesRegex(llm_proxy.QueueRefused, "busy"):
            line.enter("a", 1)
        slot = line.enter("b", 1)
        with self.assertRaises(llm_proxy.QueueRefused):
            other.enter("b", 1)
        slot.leave()
        self.assertFalse(other.enter("c", 1).running)

    def test_in_a_full_line_who_has_most_waiting_makes_room_for_who_has_fewer(self):
        line = self.start_line(queue=6)
        for key in "aaaabbb":
            self.enter(key)
        for key, turned_away in self.each("""[["c", "a"], ["c", "b"], ["c", null], ["b", null]]"""):
            told = []
            for slot in self.waiting:
                slot.on_ready = partial(told.append, slot)
            if turned_away:
                self.enter(key)
            else:
                with self.assertRaises(llm_proxy.QueueRefused):
                    line.enter(key, 1)
            self.assertEqual([slot.owner.key for slot in told], list(turned_away or ""))
            self.assertTrue(all(slot.left for slot in told))
            self.waiting = [slot for slot in self.waiting if not slot.left]
            self.assertEqual(self.limits.waiting, 6)
        self.assertEqual("".join(self.leave() for _ in range(6)), "bcabca")
        self.running.pop().leave()
        self.assert_empty()

    def test_a_place_is_left_once_from_the_line_or_from_a_slot(self):
        line = self.start_line()
        first, second, third = slots = [self.enter(key) for key in "abc"]
        self.assertEqual([line.position(slot) for slot in slots], [0, 0, 1])
        second.leave()
        second.leave()
        self.assertEqual((line.position(third), self.limits.waiting), (0, 1))
        first.leave()
        first.leave()
        self.assertEqual((third.running, line.running, self.limits.waiting), (True, 1, 0))
        third.leave()
        self.assert_empty()

    def test_who_waits_is_called_once_when_its_turn_comes_or_the_line_is_closed(self):
        line = self.start_line()
        calls = []
        for key in "abc":
            self.enter(key).on_ready = partial(calls.append, key)
        self.leave()
        self.assertEqual(calls, ["b"])
        line.close()
        line.close()
        self.leave()
        self.assertEqual((calls, self.waiting[0].running), (["b", "c"], False))

    def test_no_slot_is_idle_while_somebody_waits_and_each_caller_is_served_in_order(self):
        chance = Random(7)
        for most in self.each([1, 3]):
            line = self.start_line(most)
            for _ in range(3000):
                if chance.random() < 0.5 and len(self.waiting) < 60:
                    self.enter(chance.choice("abcde"), chance.choice((1, 2)))
                elif self.waiting and chance.random() < 0.5:
                    self.waiting.pop(chance.randrange(len(self.waiting))).leave()
                elif self.running:
                    self.leave(chance.randrange(len(self.running)))
                found = line.running, self.limits.waiting
                self.assertEqual(found, (len(self.running), len(self.waiting)))
                self.assertFalse(self.waiting and len(self.running) < most)
            for slot in self.waiting + self.running:
                slot.leave()
            self.assert_empty()


class WaitingCase(ManyCase):
    """Calls that wait: for their turn, or for what their upstream sends."""
    COMMENT = b": waiting for the model\n\n"

    def start_busy(self, **settings):
        """A proxy that runs one call at a time, and runs one; -> (Client, Asked)"""
        self.start(None, **{"MAX_CONCURRENCY": 1, "MAX_TOKENS": 100, **settings})
        return self.ask_stub(call("busy"))

    def start_lines(self, *names, **settings):
        """Upstreams that run one call of model m at a time, in this order; -> their Stubs"""
        stubs = {name: self.silent_stub(name) for name in names}
        for name in names:
            settings["UPSTREAM_%s_MODELS" % name.upper()] = "m"
            settings["UPSTREAM_%s_MAX_CONCURRENCY" % name.upper()] = 1
        self.start_many(stubs, UPSTREAM_ORDER=",".join(names), **settings)
        return list(stubs.values())

    def line_up(self, key, number=1, **payload):
        """A call that is the one with this number in line; -> its Client"""
        client = self.send(call(key, **payload))
        self.wait_for_line(number, key)
        return client

    def wait_for_line(self, number, key=None):
        wait_for(lambda: self.base(key)["queue"]["waiting"] == number, "%d in line" % number)

    def wait_for_slot(self):
        wait_for(lambda: not self.proxy.routes.base.queue.running, "a free slot")

    def connect_slow(self):
        """A Client that takes little as long as nobody reads: its buffers are small."""
        self.server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        return self.connect(receive_buffer=2048)

    def assert_silent(self, client, seconds=0.1):
        """Nothing comes for a moment."""
        self.assertFalse(select.select([client.sock], [], [], seconds)[0])

    def assert_turned_away(self, answered, reason):
        found = answered.status, answered.get("x-llm-proxy-error-class")
        self.assertEqual(found, (503, reason))


class QueueTest(WaitingCase):
    """The line as callers meet it."""

    def test_one_runs_the_next_waits_and_is_told_how_long(self):
        first, asked = self.start_busy(clock=Clock())
        second = self.line_up("next")
        self.assertEqual((self.stub.calls, self.base()["in_flight"]), (1, 1))
        self.proxy.clock.now += 0.5
        self.assertEqual(self.base()["queue"]["longest_ms"], 500)
        self.assert_fields(self.complete(first, asked), "x-queue-ms: 0")
        self.assert_fields(self.complete(second), "x-queue-ms: 500")
        self.wait_for_line(0)
        self.entry(1)
        self.assertEqual(sorted(entry["queue_ms"] for entry in self.lines.entries()), [0, 500])

    def test_without_a_cap_nobody_is_told_of_a_line(self):
        self.assertIsNone(self.ask().get("x-queue-ms"))
        self.assertNotIn("queue", self.base())

    def order(self, *keys, **settings):
        """Whose call runs first, second and so on, of those that came in this order."""
        client, asked = self.start_busy(**settings)
        clients = [self.line_up(key, number, user=key) for number, key in enumerate(keys, 1)]
        found = []
        for _ in keys:
            asked.answer()
            asked = self.stub.next()
            found.append(asked.json()["user"])
        asked.answer()
        self.assertEqual({one.read().status for one in [client, *clients]}, {200})
        return found

    def test_a_named_key_has_as_many_turns_as_its_weight(self):
        found = self.order(*"aaabbb", PROXY_API_KEYS="alice=a,b,busy", KEY_WEIGHTS="alice=3")
        self.assertEqual("".join(found), "abaabb")

    def test_beyond_the_line_a_call_is_a_503_at_once_and_costs_nothing(self):
        for setting, most, key in self.each("""[
                ["MAX_QUEUE", 1, "other"], ["MAX_QUEUE_PER_CALLER", 1, "next"],
                ["MAX_QUEUE", 0, "other"]]"""):
            self.start_busy(**{setting: most})
            if most:
                self.line_up("next")
            answered = self.ask(call(key, stream=True))
            self.assert_turned_away(answered, "queue_full")
            found = answered.error()["type"], answered.get("retry-after")
            self.assertEqual(found, ("server_error", "5"))
            self.assert_ending("refused", left=100 - (key == "next"), key=key)
            self.assert_entry("cause", "queue full")

    def test_who_waits_too_long_gets_a_503_and_costs_nothing(self):
        self.start_busy(QUEUE_SECONDS="0.1")
        answered = self.ask("next")
        self.assert_turned_away(answered, "queue_timeout")
        self.assertGreaterEqual(int(answered.get("x-queue-ms")), 100)
        self.assert_ending("refused", left=100, key="next")
        self.assertEqual(self.base()["queue"], {"waiting": 0, "longest_ms": 0})

    def test_who_leaves_the_line_is_gone_from_it(self):
        for leave in self.each([Client.close, Client.reset]):
            first, asked = self.start_busy()
            second = self.line_up("next")
            third = self.line_up("third", 2)
            leave(second)
            self.wait_for_line(1)
            self.assert_ending("caller_gone", left=100, key="next")  # nothing was sent
            self.complete(first, asked)
            self.complete(third)
            self.assert_calls(2)

    def test_what_is_not_metered_does_not_wait(self):
        self.start_busy()
        client, asked = self.ask_stub(request("GET", "/v1/models"))
        self.complete(client, asked)

    def test_a_slot_is_free_again_after_every_ending(self):
        self.start(MAX_CONCURRENCY=1, BREAKER_FAILURES=100)
        for self.stub.answer in self.each([
                says(), says(b"{}", "500 No"), sends(b"nonsense\r\n\r\n"), Asked.close,
                sends(STREAM + chunk(event(1)))]):
            self.ask(call(stream=True))
            self.wait_for_slot()
        self.stub.answer = None
        for sent in self.each([b"", STREAM, STREAM + chunk(event(1))]):
            client, asked = self.ask_stub(call(stream=True))
            asked.send(sent)
            if sent:
                client.head()
            asked.wait_for_hang_up(client)
            asked.finish()
            self.wait_for_slot()
        self.assertEqual(self.proxy.routes.base.queue.queues, {})

    def test_a_slot_is_taken_until_the_upstream_has_noticed_that_the_caller_left(self):
        whole = answer(b"{}")
        for sent, end in self.each((
                (b"", Asked.close), (b"", Asked.reset), (b"", lambda asked: asked.send(whole)),
                (STREAM, Asked.close), (STREAM, lambda asked: asked.send(LAST)))):
            self.start(None, MAX_CONCURRENCY=1)
            client, asked = self.ask_stub(call(stream=True))
            if sent:
                asked.send(sent)
                client.head()
            asked.wait_for_hang_up(client)
            second = self.line_up("next")
            self.entry()
            self.assertEqual((self.stub.calls, self.base()["queue"]["waiting"]), (1, 1))
            end(asked)
            self.complete(second)
            asked.finish()
            self.wait_for_slot()

    def test_an_upstream_that_never_notices_keeps_its_slot_for_the_time_of_a_silent_one(self):
        clock = self.start_clock(None, MAX_CONCURRENCY=1, READ_TIMEOUT=20)
        client, asked = self.ask_stub(call(stream=True))
        asked.wait_for_hang_up(client)
        second = self.line_up("next")
        clock.now += 19
        self.wait_for_line(1)
        clock.now += 1
        self.complete(second)
        asked.finish()

    def test_an_upstream_that_is_deaf_learns_it_from_a_reset(self):
        clock = Clock()
        self.start(None, clock, MAX_CONCURRENCY=1)
        client, asked = self.begin(event(1))
        asked.wait_for_hang_up(client)
        second = self.line_up("next")
        clock.now += 1
        with suppress(OSError):
            asked.send(chunk(event(3)))
        self.complete(second)
        asked.finish()

    def test_the_end_of_a_drain_sends_nobody_who_stands_in_line_upstream(self):
        self.start_busy()
        for number in (1, 2, 3):
            self.line_up(str(number), number)
        self.assertEqual((self.drain(0.05), self.stub.calls), (4, 1))
        self.entry(3)
        found = sorted(entry["cost"] for entry in self.lines.entries())
        self.assertEqual(found, [0, 0, 0, 1])

    def test_before_an_upstream_that_is_left_alone_nobody_stands_in_line(self):
        first, asked = self.start_busy(BREAKER_FAILURES=1)
        asked.send(STREAM)
        first.head()
        self.stub.refuse_connections()
        self.assert_status(502, request("GET", "/v1/files"))
        self.assert_turned_away(self.ask("next"), "upstream_open")

    def test_a_slow_reader_holds_no_slot_once_the_upstream_has_done_its_part(self):
        self.start(None, MAX_CONCURRENCY=1)
        client, asked = self.begin(event(1), client=self.connect_slow())
        body = b"data: " + b"x" * 14000 + b"\n\n"
        asked.chunks(body, end=True)
        self.wait_for_slot()
        self.assertEqual(self.lines.entries(), [])  # its answer is still on the way
        answered = client.rest()
        self.assertEqual((answered.whole, answered.body), (True, event(1) + body))

    def test_who_finds_one_line_too_slow_goes_on_to_the_next_upstream_and_hears_of_it(self):
        busy, other = self.start_lines("a", "b", STREAM_COMMENT_SECONDS="3", QUEUE_SECONDS="1",
                                       clock=Clock())
        self.send(call())
        busy.next()
        client = self.send(call("next", stream=True))
        self.assertEqual(self.expire("its turn"), 1)
        asked = other.next()
        self.pass_seconds(2.01)
        client.head()
        client.expect(self.COMMENT)
        asked.stream(end=True)
        client.expect_end()

    def test_all_lines_together_take_no_longer_than_one_and_are_told_as_one(self):
        stubs = self.start_lines("one", "two", QUEUE_SECONDS="3", clock=Clock())
        for name in ("one", "two"):
            self.send(request("POST", "/%s%s" % (name, CHAT), chat()))
        asked = [stub.next() for stub in stubs]
        client = self.send(call("next"))
        self.assertEqual(self.expire("its turn at one"), 3)
        answered = client.read()
        self.assertEqual((answered.status, answered.get("x-queue-ms")), (503, "3000"))
        client.send(call("next"))
        self.awaiting("its turn at one")
        asked[1].answer()
        wait_for(lambda: not self.proxy.routes.by_name["two"].queue.running, "room at two")
        self.assertEqual(self.expire("its turn at one"), 3)
        stubs[1].next().answer()
        self.assertEqual(client.read().get("x-queue-ms"), "3000")

    def test_a_parting_that_is_cancelled_before_it_began_leaves_nothing_behind(self):
        client, asked = self.start_busy()
        part_with = llm_proxy.Address.part_with

        def part_and_cancel(address, *arguments):
            part_with(address, *arguments)
            for parting in address.partings:
                parting.cancel()
        self.patch_seconds(Address_part_with=part_and_cancel)
        asked.wait_for_hang_up(client)
        self.wait_for_slot()

    def test_people_behind_a_key_have_its_weight_and_addresses_have_none(self):
        webui = {"PROXY_API_KEYS": "webui=a", "CALLER_HEADER": "X-User",
                 "TRUSTED_PROXIES": "127.0.0.1"}
        for weights, settings, data, weight in self.each((
                ("webui=5", webui, call("a", "X-User: u"), 5), ("127.0.0.1=3", {}, call(), 1))):
            self.start(None, MAX_CONCURRENCY=1, KEY_WEIGHTS=weights, **settings)
            self.ask_stub(data)
            caller, = self.proxy.routes.base.queue.queues.values()
            self.assertEqual(caller.weight, weight)

    def test_a_caller_who_has_its_answer_may_call_again_at_once(self):
        self.start(MAX_CONCURRENCY=1, MAX_QUEUE=0)
        client = self.connect()
        for _ in range(20):
            client.answers(200, call())


class EarlyStreamTest(WaitingCase):
    """Comments in streams whose caller would hear nothing for long."""

    def start_early(self, **settings):
        self.start_clock(None, STREAM_COMMENT_SECONDS="0.05", **settings)

    def wait_early(self, data=None, client=None):
        """A stream of which nothing came but a comment; -> (Client, Asked)"""
        client = (client or self.connect()).send(data or call(stream=True))
        asked = self.stub.next()
        self.awaiting("the response of")
        self.pass_seconds(0.06)
        client.head()
        client.expect(self.COMMENT)
        return client, asked

    def assert_comments(self, client, number=2):
        """Comments come one after the other."""
        for _ in range(number):
            self.pass_seconds(0.06)
            client.expect(self.COMMENT)

    def hear(self, client, expected):
        """Read until this comes, with nothing but comments before it."""
        found = b""
        while not found.endswith(expected):
            found += next(client.pieces)
        self.assertEqual(found.replace(self.COMMENT, b""), expected)

    def rest(self, client):
        """(Whether it was whole, what came but for comments)."""
        answered = client.rest()
        return answered.whole, answered.body.replace(self.COMMENT, b"")

    def test_a_stream_that_waits_begins_with_comments_and_goes_on_unchanged(self):
        end = b"data: [DONE]\n\n"
        body = event(1) + event(2) + end
        chunked = STREAM + chunk(event(1)) + chunk(event(2) + end) + LAST
        sized = answer(body, "200 OK", "Content-Type: text/event-stream")
        for version, data in self.each([("1.1", chunked), ("1.1", sized), ("1.0", chunked)]):
            self.start_early()
            client, asked = self.wait_early(
                request("POST", CHAT, chat(stream=True), version=version))
            begun = client.answered
            found = begun.status, begun.get("content-type"), begun.get("x-ratelimit-remaining")
            self.assertEqual(found, (200, "text/event-stream", "999"))
            self.assert_comments(client)
            asked.send(data)
            asked.finish()
            self.assertEqual(self.rest(client), (True, body))
            self.assert_ending("ok", left=999)
            self.assert_entry("bytes", len(client.answered.body))
            if version == "1.1":  # the connection carries another call
                client.send(call())
                self.complete(client)

    def test_in_line_it_is_told_how_many_are_ahead(self):
        first, asked = self.start_busy(STREAM_COMMENT_SECONDS="0.05", clock=Clock())
        second, third = self.line_up("b"), self.line_up("c", 2, stream=True)
        self.pass_seconds(0.06)
        third.head()
        third.expect(b": waiting, 1 ahead\n\n")
        for client in (first, second):
            self.complete(client, asked)
            asked = self.stub.next()
        asked.stream(event(1), end=True)
        answered = third.rest()
        self.assertEqual((answered.whole, answered.body.endswith(event(1))), (True, True))

    TOLD = b'{"error":{"message":"too long","code":7}}'
    TOO_LONG = staticmethod(says(TOLD, "400 Bad Request"))
    ANTHROPIC = request("POST", "/v1/messages", chat(stream=True, max_tokens=1))

    def assert_told(self, number, data, act, expected, outcome="upstream_status"):
        """The stream of this call, whose upstream does that then, ends with an error event."""
        client, asked = self.wait_early(data)
        act(asked)
        asked.finish()
        whole, body = self.rest(client)
        self.assertEqual((whole, body[-2:]), (True, b"\n\n"))
        self.assertIn(expected, body)
        self.assert_ending(outcome, left=1000, number=number)
        entry = self.entry(number)
        self.assertEqual(entry["bytes"], len(client.answered.body))
        self.assertGreater(entry["first_ms"], 40)
        client.answers(200, HEALTH)  # it came to a proper end

    def test_what_goes_wrong_then_is_an_error_event_and_a_clean_end(self):
        """Where the stream broke off after it, Open WebUI would show that instead."""
        responses = request("POST", "/v1/responses", b'{"model": "m", "stream": true}')
        no_stream = b"did not answer with a stream"
        could_not = b"The upstream could not be reached or did not answer properly"
        self.start_early(BREAKER_FAILURES=100)
        for number, row in self.each(enumerate((
                (None, self.TOO_LONG, b"data: " + self.TOLD),
                (None, says(b"not JSON", "500 Oops"), no_stream),
                (None, says(b'{"choices": []}'), no_stream),
                (None, Asked.close, could_not, "upstream_failed"),
                (self.ANTHROPIC, self.TOO_LONG, b"event: error\ndata: " + self.TOLD),
                (responses, self.TOO_LONG,
                 b'event: response.failed\ndata: {"type": "response.failed"'),
                (self.ANTHROPIC, Asked.close, b'event: error\ndata: {"type": "error"',
                 "upstream_failed")))):
            self.assert_told(number, *row)

    def test_an_error_event_quotes_no_key_of_ours(self):
        quoting = self.TOLD.replace(b"too long", b"too long for sk-hush-hush")
        self.start_early(BREAKER_FAILURES=100, BASE_API_KEY="sk-hush-hush")
        for number, act in self.each(enumerate((
                says(quoting, "400 Bad Request"),
                says(gzip.compress(quoting), "400 Bad Request", "Content-Encoding: gzip")))):
            self.assert_told(number, None, act, b"data: " + quoting.replace(
                b"sk-hush-hush", b"*" * 12))

    def test_a_stream_that_breaks_off_later_is_told_so_between_two_events(self):
        """Half an event that was held back, to look for usage, is not mistaken for a whole one."""
        half = event(2)[:30]
        for mode, sent, told in self.each([
                ("request", b"", True), ("request", chunk(half), False),
                ("request", b"20\r\ndata", False), ("usage", chunk(half), False)]):
            self.start_early(TOKEN_COST_MODE=mode)
            client, asked = self.wait_early()
            asked.send(STREAM + chunk(event(1)) + sent)
            self.hear(client, event(1))
            asked.close()
            whole, body = self.rest(client)
            self.assertEqual((whole, b"upstream_error" in body), (told, told))
            self.assertTrue(told or body.endswith((half, b"data")))

    def test_nothing_is_put_into_what_a_caller_has_not_taken(self):
        self.start_early(MAX_CALL_SECONDS="0.5")
        client, asked = self.wait_early(client=self.connect_slow())
        asked.stream(event(1))
        self.hear(client, event(1))
        asked.chunks(b"data: " + b"x" * 14000 + b"\n\n")
        wait_for(lambda: [one for one in self.server.open.copy() if one.client.write_buffer])
        self.pass_seconds(0.06)
        self.expire("the body of the response")
        self.entry()
        whole, body = self.rest(client)
        self.assertEqual((whole, b"error" in body), (False, False))

    GEMINI = request("POST", "/v1beta/models/m:streamGenerateContent?alt=sse", b"{}")
    # What is asked, what of the answer comes before the time of a comment, and what after it
    WITHOUT_ROOM = (
        (GEMINI, b"", STREAM + LAST), (call(), b"", answer()),
        (GEMINI, STREAM + chunk(event(1)), LAST),
        (request("GET", "/v1/responses/r?stream=true", b"", "Accept-Encoding: gzip"),
         raw_head("HTTP/1.1 200 OK | Content-Type: text/event-stream | "
                  "Transfer-Encoding: chunked | Content-Encoding: gzip"),
         chunk(b"\x1f\x8b") + LAST),
        (call(stream=True), answer(event(1) + event(2))[:-len(event(2))], event(2)))

    def test_where_there_is_no_room_for_comments_there_are_none(self):
        """Gemini's clients would take them for data."""
        self.start_early()
        pairs = []
        for data, first, _ in self.each(self.WITHOUT_ROOM):
            client, asked = self.ask_stub(data)
            pairs.append((client, asked))
            asked.send(first)
            if first:
                client.head()
                client.expect(event(1) if event(1) in first else b"")
        self.pass_seconds(0.06)
        for (client, asked), (_, first, rest) in self.each(zip(pairs, self.WITHOUT_ROOM)):
            self.assert_silent(client, 0)
            asked.send(rest)
            asked.finish()
            answered = client.rest() if first else client.read()
            self.assertEqual((answered.whole, self.COMMENT in answered.body), (True, False))

    def test_what_comes_soon_stays_as_it_was(self):
        self.start(says(b"{}", "400 Bad Request"), STREAM_COMMENT_SECONDS="5")
        self.assert_status(400, call(stream=True))

    def test_a_caller_who_leaves_meanwhile_is_noticed(self):
        self.start_early()
        client, asked = self.wait_early()
        asked.wait_for_hang_up(client)
        self.assertEqual(self.outcome(), "caller_gone")

    def test_a_pause_in_a_running_stream_is_filled_between_two_events(self):
        body = event(1) + event(2)
        half = event(2)[:9]
        rest = event(2)[9:]
        kind = "Content-Type: text/event-stream"
        sized = answer(body, "200 OK", kind)[:-len(body)]
        self.start_early()
        for start, framed, last in self.each([
                (STREAM, chunk, LAST), (sized, bytes, b""),
                (raw_head("HTTP/1.1 200 OK | " + kind), bytes, b"")]):
            client, asked = self.ask_stub(call(stream=True))
            asked.send(start)
            client.head()
            self.awaiting("the body of the response")
            self.assert_comments(client, 1)
            asked.send(framed(event(1)))
            self.hear(client, event(1))
            self.assert_comments(client)
            asked.send(framed(half))
            self.hear(client, half)
            self.pass_seconds(0.06)
            self.assert_silent(client, 0)
            asked.send(framed(rest) + last)
            asked.close()
            self.assertEqual(self.rest(client), (True, rest))

    def test_the_end_of_a_drain_is_told_to_those_whose_stream_has_begun(self):
        self.start_early(MAX_CONCURRENCY=1)
        running, _ = self.wait_early()
        waiting = self.line_up("b", stream=True)
        self.pass_seconds(0.06)
        waiting.head()
        ending = asyncio.run_coroutine_threadsafe(self.server.drain(1), self.server.loop)
        wait_for(lambda: self.server.emptied, "the wait for running calls")
        self.pass_seconds(1.01)
        self.assertEqual(ending.result(PATIENCE), 2)
        for client in (running, waiting):
            answered = client.rest()
            self.assertTrue(answered.whole)
            self.assertIn(b"try again in a moment", answered.body)


class DeadlinesTest(WaitingCase):
    def in_time(self, milliseconds, **payload):
        """A call whose caller waits no longer than this."""
        return call(None, "X-LLM-Proxy-Timeout-Ms: %s" % milliseconds, **payload)

    def start(self, answer=says(), _=None, **settings):
        super().start(answer, Clock(), **settings)

    def late(self, data, seconds, what="the response of"):
        """What is answered when that does not come for so long."""
        client = self.send(data)
        self.assertEqual(self.expire(what), seconds)
        return client.read()

    def assert_cut(self, data, seconds):
        """A stream of which no more comes for so long."""
        client, _ = self.begin(event(1), data=data)
        self.awaiting("the body of the response")
        self.pass_seconds(seconds - 0.001)
        self.assert_silent(client, 0)
        self.pass_seconds(0.002)
        client.expect_cut()

    def test_the_first_byte_has_a_time_of_its_own(self):
        self.start(None, FIRST_BYTE_TIMEOUT="1", READ_TIMEOUT="5")
        self.assertEqual(self.late(call(), 1).status, 504)
        self.start(None, FIRST_BYTE_TIMEOUT="9", READ_TIMEOUT="5")
        self.assert_cut(call(stream=True), 5)
        self.assertEqual(self.outcome(), "upstream_cut")

    def test_a_caller_may_shorten_every_wait_and_lengthen_none(self):
        self.start(None, READ_TIMEOUT="5", BREAKER_FAILURES=1)
        answered = self.late(self.in_time(100), 0.1)
        answered.tells("type", "timeout_error")
        self.assertEqual(answered.status, 504)
        self.assertIsNone(self.stub.next().get("x-llm-proxy-timeout-ms"))
        self.assert_cut(self.in_time(200, stream=True), 0.2)  # no breaker is open
        self.start(None, READ_TIMEOUT="5")
        self.assertEqual(self.late(self.in_time(60000), 5).status, 504)

    def test_who_wants_to_wait_no_longer_pays_as_if_it_had_left(self):
        self.start(None, TOKEN_COST_MODE="usage", READ_TIMEOUT=5)
        self.assertEqual(self.late(self.in_time(100, max_tokens=50), 0.1).status, 504)
        self.assert_ending("upstream_failed", 1000 - 53)
        self.stub.next()
        self.assert_cut(self.in_time(200, stream=True, max_tokens=50), 0.2)
        self.assert_ending("upstream_cut", 1000 - 2 * 53, 1)
        self.start(None, TOKEN_COST_MODE="usage", READ_TIMEOUT="5")
        self.assertEqual(self.late(self.in_time(60000, max_tokens=50), 5).status, 504)
        self.assert_ending("upstream_failed", 1000)

    def test_nothing_is_sent_when_nobody_would_wait_for_the_answer(self):
        self.start(None)
        self.assertEqual(self.late(self.in_time(100)[:-5], 0.1, "body").status, 408)
        busy, other = self.start_lines("a", "b")
        self.send(call())
        busy.next()
        self.assertEqual(self.late(self.in_time(100), 0.1, "its turn").status, 504)
        self.assertEqual((busy.calls, other.calls, self.stub.calls), (1, 0, 0))

    def test_it_holds_for_an_error_whose_body_does_not_come(self):
        self.start(None, STREAM_COMMENT_SECONDS="0.05", READ_TIMEOUT="9")
        client, asked = self.ask_stub(self.in_time(200, stream=True))
        self.awaiting("the response of")
        self.proxy.clock.now += 0.06
        client.head()
        asked.send(raw_head("HTTP/1.1 500 No | Content-Length: 9"))
        self.assertEqual(self.expire("the body of"), 0.2)
        self.assertIn(b"did not answer in time", client.rest().body)

    def test_it_holds_for_one_call_alone(self):
        self.start(None)
        client = self.send(self.in_time(50))
        self.expire("the response of")
        client.answers(504)
        self.stub.next()
        client.send(call())
        asked = self.stub.next()
        self.assertGreater(self.awaiting("the response of").deadline - self.proxy.clock.now, 1)
        self.complete(client, asked)

    def test_it_counts_the_time_in_line(self):
        client, asked = self.start_busy()
        self.assertEqual(self.late(self.in_time(50), 0.05, "its turn").status, 504)
        self.complete(client, asked)

    def test_what_is_no_number_of_milliseconds_is_a_400(self):
        for text in self.each("""["", "0", "-1", "1.5", "soon", "9999999999"]"""):
            self.assert_status(400, self.in_time(text), error="invalid_request_error")

    def test_an_upload_and_a_reader_that_last_too_long_are_cut(self):
        self.start(None, MAX_CALL_SECONDS="2", MAX_CONCURRENCY=1)
        for data in self.each([request("POST", "/v1/files", b"x" * 10), call()]):
            self.assertEqual(self.late(data[:-5], 2, "body").status, 408)
        self.connect_slow().send(call())
        self.stub.next().send(answer(b"x" * 100000))
        self.expire("the client to take its answer")
        self.assert_entry("outcome", "caller_gone", 2)
        self.wait_for_slot()

    def test_a_call_that_lasts_too_long_is_cut(self):
        self.start(None, MAX_CALL_SECONDS="3")
        client, asked = self.begin(event(1))
        self.awaiting("the body of the response")
        for _ in range(2):
            self.proxy.clock.now += 1
            asked.chunks(event(1))
            client.expect(event(1))
        self.assertEqual(self.expire("the body of the response"), 1)
        client.expect_cut()
        self.assertEqual(self.outcome(), "upstream_cut")
        self.assertEqual(self.late(call(), 3).status, 504)


# --------------------------------------------------------------------------------------------------
# Stored
# --------------------------------------------------------------------------------------------------

class StoredTest(ManyCase):
    """What alice and bob made at the endpoint, and what the operator has there."""
    KEYS = {"PROXY_API_KEYS": "alice=a,bob=b"}
    # Path, body, answer, and the paths and references by which that is used
    MADE = """[
        ["/v1/files", null, {"id": "file-1"}, "/v1/files/file-1 /v1/files/file-1/content",
         [{"training_file": "file-1"},
          {"messages": [{"content": [{"file": {"file_id": "file-1"}}]}]},
          {"tools": [{"container": {"type": "auto", "file_ids": ["file-1"]}}]}]],
        ["/v1/responses", {}, {"id": "resp_1", "conversation": {"id": "conv_1"}},
         "/v1/responses/resp_1 /v1/responses/resp_1/input_items /v1/conversations/conv_1/items",
         [{"previous_response_id": "resp_1"}, {"conversation": "conv_1"},
          {"conversation": {"id": "conv_1"}},
          {"input": [{"type": "item_reference", "id": "resp_1"}]}]],
        ["/v1/responses", {}, {"id": "resp_2", "output": [{"type": "message", "id": "msg_1"}]},
         "/v1/responses/resp_2", [{"input": [{"type": "item_reference", "id": "msg_1"}]},
                                  {"input": ["x", {"id": "msg_1"}]},
                                  {"items": [{"type": null, "id": "msg_1"}]}]],
        ["/v1/skills", {}, {"id": "skill_1"}, "/v1/skills/skill_1",
         [{"tools": [{"environment": {"skills": [{"skill_id": "skill_1"}]}}]}]],
        ["/v1/evals", {}, {"id": "eval_1"}, "/v1/evals/eval_1/runs",
         [{"eval_id": "eval_1"}, {"source": {"type": "file_id", "id": "eval_1"}}]],
        ["/v1/batches", {}, {"id": "batch_1"}, "/v1/batches/batch_1", []],
        ["/v1/projects/p/locations/l/batchPredictionJobs", {},
         {"name": "projects/p/locations/l/batchPredictionJobs/7", "state": "JOB_STATE_PENDING"},
         "/v1/projects/p/locations/l/batchPredictionJobs/7", []],
        ["/v1/messages", {"tools": [{"type": "code_execution_20250825"}]},
         {"id": "msg_2", "container": {"id": "container_1"}}, "/v1/containers/container_1",
         [{"container": "container_1"}]],
        ["/v1/responses", {}, {"id": "resp_x=="}, "/v1/responses/resp_x==", []],
        ["/v1/messages/batches", {}, {"id": "msgbatch_1"},
         "/v1/messages/batches/msgbatch_1/results", []],
        ["/v1/chat/completions", {"store": true}, {"id": "chatcmpl-1"},
         "/v1/chat/completions/chatcmpl-1", []],
        ["/v1/chat/completions", {"deferred": true}, {"request_id": "r-1"},
         "/v1/chat/deferred-completion/r-1", []],
        ["/v1/vector_stores", {}, {"id": "vs_1"}, "/v1/vector_stores/vs_1/files",
         [{"tools": [{"vector_store_ids": ["vs_1"]}]}]],
        ["/upload/v1beta/files", null, {"file": {"name": "files/f1", "uri": "https://x/files/f1"}},
         "/v1beta/files/f1 /v1beta/files/f1:download",
         [{"contents": [{"parts": [{"fileData": {
             "fileUri": "https://generativelanguage.googleapis.com/v1beta/files/f1"}}]}]},
          {"input": [{"uri": "https://generativelanguage.googleapis.com/v1beta/files/f1"}]},
          {"batch": {"input_config": {"file_name": "files/f1"}}}]],
        ["/v1beta/cachedContents", {}, {"name": "cachedContents/c1"}, "/v1beta/cachedContents/c1",
         [{"cachedContent": "cachedContents/c1"},
          {"cachedContent": "projects/p/locations/l/cachedContents/c1"}]],
        ["/v1/sessions", {}, {"id": "sesn_1"}, "/v1/sessions/sesn_1/events", []],
        ["/v1/predictions", {}, {"id": "p1"}, "/v1/predictions/p1", []],
        ["/async/chat/completions", {}, {"id": "t1"}, "/async/chat/completions/t1", []],
        ["/v4/async/chat/completions", {}, {"id": "t2"}, "/v4/async-result/t2", []],
        ["/services/aigc/x", {}, {"output": {"task_id": "t3"}}, "/api/v1/tasks/t3", []],
        ["/v1/batch/jobs", {}, {"id": "j1", "output_file": "file-9"},
         "/v1/batch/jobs/j1 /v1/files/file-9", [{"validation_files": ["file-9"]}]],
        ["/v1/videos", {}, {"id": "video_1"}, "/v1/videos/video_1/content",
         [{"video": {"id": "video_1"}}, {"video": "video_1"}]],
        ["/v1/agents", {}, {"id": "agent_1"}, "/v1/agents/agent_1", [{"agent": "agent_1"}]],
        ["/v1beta/interactions", {}, {"id": "v1_x"}, "/v1beta/interactions/v1_x",
         [{"previous_interaction_id": "v1_x"}]],
        ["/v1beta/models/veo:predictLongRunning", {}, {"name": "models/veo/operations/o1"},
         "/v1beta/models/veo/operations/o1", []],
        ["/v1/threads/runs", {}, {"id": "run_1", "thread_id": "thread_1"},
         "/v1/threads/thread_1/runs/run_1", [{"thread_id": "thread_1"}]]]"""
    # Callers and their tools say anything here.
    NO_REFERENCES = """[
        {"messages": [{"content": [{"type": "tool_use", "input": {"file_id": "x"}}]}]},
        {"tools": [{"input_schema": {"properties": {"file_id": {"id": "x"}}}}]},
        {"metadata": {"file_id": "x"}}, {"client_metadata": {"thread_id": "codex"}},
        {"input": [{"type": "code_interpreter_call", "container_id": "cntr_1"}]},
        {"input": [{"content": [{"annotations": [{"file_id": "x"}]}]}]},
        {"messages": [{"content": "file_id: x"}]}, {"prompt": "hello"}, {"prompt": ["x", "y"]},
        {"container": {"skills": [{"type": "anthropic", "skill_id": "pptx"}]}},
        {"file_id": null}, {"contents": [{"fileUri": "https://youtu.be/x"}]},
        {"input": [{"type": "image", "uri": "https://example.com/files/x"}]},
        {"file_name": "report.pdf"}, {"video": "AAAA"}, {"agent": "deep-research"},
        {"plugins": [{"id": "web"}]}, {"prompt": "files/x of mine"},
        {"input": [{"id": "fc_1", "type": "function_call", "call_id": "x"}]}]"""

    def create(self, path, payload, key="a"):
        body = b"x" if payload is None else encoded({"model": "m", **payload})
        return self.post(path, body, key=key)

    def status(self, method, path, key="a"):
        return self.ask(request(method, path, key=key)).status

    def answers(self, payload):
        self.stub.answer = says(payload)

    def test_a_name_of_thousands_of_words_is_read_soon(self):
        for key, name in self.each((("file_id", "google" * 20000),
                                    ("uri", "google" * 10000 + "/" * 60000))):
            with self.computing_within(CPU_SECONDS):
                llm_proxy.names_of_things("https://" + name, key)

    def test_what_a_caller_made_is_its_own_and_everybody_else_s_is_a_404(self):
        self.start(**self.KEYS)
        for path, body, answered, paths, references in self.each(self.MADE):
            self.assertEqual(self.status("GET", paths.split()[0]), 404)
            self.answers(answered)
            self.assertEqual(self.create(path, body).status, 200)
            self.answers({})
            for one in paths.split():
                found = [self.status(method, one, key) for key in "ab"
                         for method in ("GET", "DELETE")]
                self.assertEqual(found, [200, 200, 404, 404])
            for one in references:
                found = [self.create("/v1/responses", one, key).status for key in "ab"]
                self.assertEqual(found, [200, 404])

    def test_lists_are_a_403_and_other_spellings_are_nobody_s(self):
        self.start(**self.KEYS)
        self.answers({"id": "file-1"})
        self.create("/v1/files", None)
        for status, paths in self.each("""
                403 -> /v1/files /v1/files/ /v1/Files?limit=1 /v1/chat/completions /v1/usage
                403 -> /v1beta/cachedContents /api/v1/generation?id=gen-1 /v1/credits /user/balance
                403 -> /v1/organization/costs /api/v1/key
                404 -> /v1/files/file%2D1 /v1//files/file-1 /v1/files/FILE-1
                200 -> /v1/files/file-1 /v1/models"""):
            found = [self.status("GET", path) for path in paths.split()]
            self.assertEqual({*found}, {int(status)}, found)
        self.assertEqual(self.create("/v1/files/file-2", {}).status, 404)
        escaped = b'{"file\\u005fid": "file-2"}'
        self.assert_status(404, request("POST", "/v1/responses", escaped, key="a"))
        self.assertEqual(self.create("/v1/responses", {"prompt": {"id": "pmpt_1"}}).status, 404)
        error = self.get("/v1/messages/batches/x", key="a").json()
        self.assertEqual(error["error"]["type"], "not_found_error")

    def test_a_form_may_speak_of_stored_things_too(self):
        self.start(**self.KEYS)
        self.answers({"id": "file-1"})
        self.create("/v1/files", None)
        part = '--B\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n--B--\r\n'
        for name, key, status in self.each("""[
                ["file_id", "a", 200], ["file_id", "b", 404], ["images[0][file_id]", "b", 404],
                ["file_ids[]", "b", 404], ["x", "b", 200]]"""):
            for body, kind in ((part % (name, "file-1"), "multipart/form-data; boundary=B"),
                               (name + "=file-1", "application/x-www-form-urlencoded")):
                answered = self.post("/v1/audio/transcriptions", body.encode(),
                                     "Content-Type: " + kind, key=key)
                self.assertEqual(answered.status, status)

    def test_evals_do_not_read_what_others_have_stored(self):
        self.start(**self.KEYS)
        self.answers({"id": "eval_1"})
        self.create("/v1/evals", {})
        for path, source, status in self.each("""[
                ["/v1/evals/eval_1/runs", {"type": "stored_completions"}, 404],
                ["/v1/evals/eval_1/runs", {"type": "responses", "model": "m"}, 404],
                ["/v1/evals/eval_1/runs", {"type": "responses", "source": {}}, 200],
                ["/v1/evals/eval_1/runs", {"type": "file_content"}, 200],
                ["/v1/responses", {"type": "responses"}, 200]]"""):
            self.assertEqual(self.create(path, {"data_source": source}).status, status)

    def test_a_run_is_not_found_under_the_eval_of_another(self):
        self.start(LIMITS="each 1000 tokens per day", **self.KEYS)
        for key in "ab":
            self.answers({"id": "eval_" + key})
            self.create("/v1/evals", {}, key)
        self.answers({"id": "run_a", "status": "queued"})
        self.create("/v1/evals/eval_a/runs", {"max_tokens": 500}, "a")
        before = self.left("a")
        self.answers({"status": "completed", "usage": {"prompt_tokens": 1, "total_tokens": 2}})
        for key, path, status in self.each("""
                b -> eval_b/runs/run_a -> 404
                b -> eval_b/runs/run_a/cancel -> 404
                b -> eval_b/runs/run_x -> 200"""):
            self.assertEqual(self.status("GET", "/v1/evals/" + path, key), int(status))
        self.assertEqual(self.left("a"), before)
        self.assertEqual(self.status("GET", "/v1/evals/eval_a/runs/run_a"), 200)
        self.assertGreater(self.left("a"), before + 400)

    def test_what_callers_and_their_tools_say_is_no_reference(self):
        self.start(**self.KEYS)
        for payload in self.each(self.NO_REFERENCES):
            self.assertEqual(self.create("/v1/responses", payload).status, 200)

    def test_a_stream_names_what_it_makes_in_its_first_event(self):
        self.start(None, **self.KEYS)
        client = self.send(request(
            "POST", "/v1/responses", b'{"model": "m", "stream": true}', key="a"))
        asked = self.stub.next()
        first = b'data: {"type": "response.created", "response": {"id": "resp_1"}}\n\n'
        asked.stream(first[:30], first[30:])
        client.head()
        client.expect(first)
        self.answers({})
        self.assertEqual(self.status("GET", "/v1/responses/resp_1"), 200)
        self.assertEqual(self.status("GET", "/v1/responses/resp_1", "b"), 404)
        asked.chunks(end=True)

    def test_the_last_event_of_a_stream_names_its_items(self):
        response = {"id": "resp_1", "output": [{"type": "reasoning", "id": "rs_1"}]}
        delta = {"type": "message_delta", "delta": {"container": {"id": "container_1"}}}
        for path, told, body, asked in self.each((
                ("/v1/responses", [{"type": "response.created", "response": {"id": "resp_1"}},
                                   {"type": "response.completed", "response": response}],
                 {}, {"input": [{"type": "item_reference", "id": "rs_1"}]}),
                ("/v1/messages", [{"type": "message_start", "message": {"id": "msg_1"}}, delta,
                                  {"type": "message_stop"}],
                 {"tools": [{"type": "web_fetch_20260209"}]}, {"container": "container_1"}))):
            self.start(says_events(*told), **self.KEYS)
            self.create(path, {"stream": True, **body})
            self.assertEqual([self.create(path, asked, key).status for key in "ab"], [200, 404])

    def test_an_event_in_the_midst_of_a_stream_names_the_files_that_a_tool_made(self):
        files = [[{"type": "bash_code_execution_output", "file_id": "file_%d" % number}]
                 for number in range(2)]
        blocks = [{"type": "content_block_start", "index": 1, "content_block": {
            "type": "bash_code_execution_tool_result", "content": {"content": one}}}
            for one in files]
        start, _, text, *end = ANTHROPIC_EVENTS
        message = start["message"]
        start = {**start, "message": {**message, "container": {"id": "container_1"}}}
        told = [start, *[text] * 99, blocks[0], *[text] * 99, blocks[1], text, *end]
        self.start(says_events(*told), **self.KEYS)
        self.create("/v1/messages", {
            "stream": True, "tools": [{"type": "code_execution_20250825"}]})
        for number in self.each(range(2)):
            path = "/v1/files/file_%d/content" % number
            self.assertEqual([self.status("GET", path, key) for key in "ab"], [200, 404])

    def test_an_answer_to_a_caller_with_tools_of_its_own_is_nothing_that_is_stored(self):
        self.start(says(b'{"id": "msg_1"}'), **self.KEYS)
        self.create("/v1/messages", {
            "tools": [{"name": "web_search"}, {"name": "code_execution_x"}]})
        self.assertEqual(self.proxy.stored.things, {})

    def test_the_results_of_a_batch_are_its_maker_s_but_nothing_else_that_is_only_read(self):
        self.start(says(b'{"id": "batch_1"}'), **self.KEYS)
        self.create("/v1/batches", {})
        for path, answered in self.each("""[
                ["/v1/batches/batch_1", {"id": "batch_1", "output_file_id": "file-2",
                                         "metadata": {"output_file_id": "file-3"}}],
                ["/v1/batches/batch_1/x", {"id": "file-3", "output_file_id": "file-3"}],
                ["/v1/files/file-2/content", {"id": "file-3"}]]"""):
            self.answers(answered)
            self.assertEqual(self.status("GET", path), 200)
        self.assertEqual(self.status("GET", "/v1/files/file-2", "b"), 404)
        self.assertEqual(self.status("GET", "/v1/files/file-3"), 404)

    def test_a_name_that_no_path_could_have_is_no_thing(self):
        for name in self.each(("\ud800", "a b", "x" * 300, "a\x00")):
            self.start(says({"id": name}), **self.KEYS)
            self.assertEqual(self.create("/v1/responses", {}).status, 200)
            self.assertEqual(len(self.proxy.stored.things), 0)

    def test_an_answer_cannot_make_a_thing_another_one_s(self):
        self.start(says(b'{"id": "resp_1"}'), **self.KEYS)
        for key in "ab":
            self.create("/v1/responses", {}, key)
        self.assertEqual([self.status("GET", "/v1/responses/resp_1", key) for key in "ab"],
                         [200, 404])

    def test_names_are_found_in_any_framing_and_beyond_the_first_megabyte(self):
        large = b'{"id": "resp_1", "x": "%s"}' % (b"x" * (1 << 21))
        self.patch_seconds(Reply_WHOLE_SECONDS=0)
        for data in self.each((
                answer(b'{\n"object": "response", "id": "resp_1"}\n'), answer(large),
                STREAM.replace(b"text/event-stream", b"application/json") + chunk(b'{"a": {}')
                + chunk(b',"id": "resp_1"}') + LAST)):
            self.start(sends(data, close=False), **self.KEYS)
            self.create("/v1/responses", {})
            self.assertEqual(self.status("GET", "/v1/responses/resp_1"), 200)
            self.assertEqual(self.status("GET", "/v1/responses/resp_2"), 404)

    def test_who_may_have_what_is_stored_is_a_setting(self):
        rows = [({}, "200 200 200"), ({"STORED": "own"}, "404 403 404"),
                ({"STORED": "refuse"}, "403 403 403"), (self.KEYS, "404 403 404"),
                ({"PROXY_API_KEYS": "anyone"}, "200 200 200"),
                ({"BASE_API_KEY": "passthrough"}, "404 403 404"),
                ({**self.KEYS, "STORED": "pass"}, "200 200 200")]
        for settings, expected in self.each(rows):
            self.start(**settings)
            found = (self.status("GET", "/v1/files/file-1"), self.status("GET", "/v1/files"),
                     self.create("/v1/responses", {"previous_response_id": "resp_1"}).status)
            self.assertEqual("%d %d %d" % found, expected)

    def test_calls_go_where_the_thing_they_speak_of_was_made(self):
        """One upstream has two addresses; that model serves nothing else."""
        first, second, other = map(self.stub_of, ("first", "second", "other"))
        self.start(says({"from": "base"}),
                   UPSTREAM_BOX_URL="%s/v1,%s/v1" % (first.url, second.url),
                   UPSTREAM_BOX_MODELS="m", UPSTREAM_OTHER_URL=other.url)

        def tell(member):
            for one in (first, second):
                one.answer = says({member: "resp_%d" % one.port})
        for stub in self.each((first, second) * 2):
            name = "resp_%d" % stub.port
            path = "/v1/responses/" + name
            tell("id")
            while self.create("/v1/responses", {}).json() != {"id": name}:
                pass
            tell("from")
            for data in (request("GET", path), request("DELETE", path),
                         request("POST", path + "/cancel"), request("GET", "/box" + path),
                         request("POST", "/v1/responses", {
                             "model": "x", "previous_response_id": name})):
                self.assert_from(name, data)
        self.assert_from("base", request("GET", "/v1/responses/resp_0"))
        self.assert_from("other", request("GET", "/other" + path))

    def test_only_the_last_things_are_remembered(self):
        self.patch_seconds(Stored_ROOM=2)
        self.start(**self.KEYS)
        for number in range(3):
            self.answers({"id": "resp_%d" % number})
            self.create("/v1/responses", {})
        found = [self.status("GET", "/v1/responses/resp_%d" % number) for number in range(3)]
        self.assertEqual(found, [404, 200, 200])

    def test_who_makes_much_has_nothing_of_others_forgotten(self):
        self.patch_seconds(Stored_SHARE=2)
        self.start(**self.KEYS)
        for number, key in enumerate("abbb"):
            self.answers({"id": "resp_%d" % number})
            self.create("/v1/responses", {}, key)
        found = [self.status("GET", "/v1/responses/resp_%d" % number, "ab"[number > 0])
                 for number in range(4)]
        self.assertEqual(found, [200, 404, 200, 200])


# --------------------------------------------------------------------------------------------------
# Upstreams
# --------------------------------------------------------------------------------------------------

HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"

PRIVATE_FIELDS = """\
Authorization: Bearer sk-caller
X-Api-Key: sk-caller
Api-Key: sk-caller
X-Goog-Api-Key: sk-caller
Cookie: session=hush
X-Forwarded-For: 10.1.2.3
Forwarded: for=10.1.2.3
X-Real-IP: 10.1.2.3
Via: 1.1 me
X-Forwarded-Host: x
X-Forwarded-Proto: https
Proxy-Authorization: Basic x
Connection: keep-alive, X-Private
X-Private: hush
Keep-Alive: timeout=5
TE: trailers
Trailer: X
Upgrade: h2c
OpenAI-Organization: org-1
OpenAI-Project: proj-1
X-Goog-User-Project: p
X-Conversation-Id: 1
X-Original-URL: /admin
Remote-User: root
Cf-Access-Jwt-Assertion: hush
X_Stainless_Lang: js
X-OpenWebUI-User-Email: a@example.org
Proxy-Connection: keep-alive""".splitlines()

PASSED_FIELDS = """\
Accept: text/event-stream
User-Agent: test/1
OpenAI-Beta: x
X-Stainless-Lang: js
Traceparent: 00-1-2-01
If-None-Match: "1"
X-Trace-Twice: a
X-Trace-Twice: b
X-Trace-Empty:
Accept-Language: \xe4""".splitlines()

ANSWER_FIELDS = """\
Connection: keep-alive, X-Private
X-Private: hush
Keep-Alive: timeout=5
Trailer: X
Proxy-Authenticate: Basic
Upgrade: h2c
Location: %s/v1/files/1?x
Access-Control-Allow-Origin: https://only.example
Access-Control-Allow-Credentials: true
X-RateLimit-Limit: 5
X-Request-ID: theirs
X-Other: passed
X-Twice: a=1
X-Twice: b=2
Set-Cookie: session=1
OpenAI-Organization: org-1
Anthropic-Organization-Id: 1
ETag: "x"
Server: theirs/1
Date: then"""


ANSWERED_FIELDS = """\
x-private:
keep-alive:
trailer:
proxy-authenticate:
upgrade:
access-control-allow-credentials:
connection:
location: /v1/files/1?x
access-control-allow-origin:
vary: Origin
x-ratelimit-limit: 1000
x-other: passed
x-twice: a=1, b=2
set-cookie:
openai-organization:
anthropic-organization-id:
llm_provider-openai-organization:
alt-svc:
strict-transport-security:
clear-site-data:
x-accel-redirect:
etag: "x"
server: theirs/1
date: then
x-upstream-request-id: theirs""".splitlines()


def table(text):
    """Rows of words, a row a line; a dash alone is an empty word."""
    rows = [row.split() for row in text.splitlines()]
    return [["" if word == "-" else word for word in row] for row in rows]


def levels(proxy):
    """What is left in the buckets that are not full: {(rule, *subject): level}."""
    return {key: level for key, (level, _) in proxy.limits.buckets.snapshot(0).items()}


@contextmanager
def threads(acts):
    """Meanwhile each of these runs in a thread; all are waited for."""
    running = [Thread(target=act) for act in acts]
    for thread in running:
        thread.start()
    yield
    for thread in running:
        thread.join(PATIENCE)


class CallCase(ManyCase):
    def start_named(self, names, text="", **settings):
        """A proxy with an upstream for each of these names; returns the Stub of each. `text` holds
        settings as in .env, none with a space in it."""
        settings.update(row.split("=", 1) for row in text.split())
        stubs = {name: self.stub_of(name) for name in names.split()}
        self.start_many(stubs, **settings)
        return list(stubs.values())

    def assert_base(self, state, in_flight=0, addresses="1/1"):
        expected = {"state": state, "in_flight": in_flight, "addresses": addresses}
        self.assertEqual(self.base(), expected)


class UpstreamsTest(CallCase):
    def assert_traffic(self, calls, connections):
        """What the upstream has seen so far."""
        self.assertEqual((self.stub.calls, self.stub.connections), (calls, connections))

    def test_calls_in_a_row_share_a_connection_and_interim_answers_are_skipped(self):
        for interim in self.each((b"", HINTS, HINTS * 5, b"HTTP/1.1 100 Continue\r\n\r\n")):
            self.start(sends(interim + answer(), close=False))
            client = self.connect()
            for _ in range(3):
                self.assertEqual(client.exchange(call()).body, b'{"said": "hi"}')
            self.entry(2)
            self.ask()
            self.assert_traffic(4, 1)

    def test_a_connection_is_used_again_after_a_stream_has_settled(self):
        """Some upstreams close after a stream although they promised not to."""
        self.patch_seconds(Address_REUSE_DELAY=0.01)
        self.start(sends(STREAM + LAST, close=False))
        self.ask()
        self.entry()
        time.sleep(0.02)
        self.ask()
        self.assert_traffic(2, 1)

    def test_after_an_answer_that_has_no_body_a_connection_must_have_been_silent_for_a_while(self):
        """Some upstreams send one all the same."""
        for method, status in self.each("""[
                ["HEAD", "200 x"], ["GET", "204 x"], ["GET", "304 x"]]"""):
            self.start(None)
            client, asked = self.ask_stub(request(method, "/v1/files/1"))
            asked.send(b"HTTP/1.1 %b\r\nETag: 1\r\n\r\n" % status.encode())
            self.assertEqual(client.read(method).status, int(status[:3]))
            asked.send(answer(b"of another"))
            client.send(call())
            self.assertEqual(self.complete(client, None, b"mine").body, b"mine")
            self.assert_traffic(2, 2)

    def test_nothing_is_connected_for_a_call_that_ended_before_a_thread_came_to_it(self):
        self.patch_seconds(Address_MAX_CONNECTING=2)
        self.start()
        address, = self.proxy.routes.base.addresses
        owner, free = mock.Mock(), Event()
        self.addCleanup(free.set)
        fails = patch.object(Thread, "start", side_effect=RuntimeError)
        ended = Context(self.proxy.loop)
        ended.end(CallerGone())
        with patch.object(address, "new_owner", return_value=owner):
            for context, failing, refusal in (
                    (Context(self.proxy.loop), fails, llm_proxy.Overloaded),
                    (ended, nullcontext(), CallerGone)):
                address.helpers.submit(free.wait, PATIENCE)
                with failing, self.assertRaises(refusal):
                    asyncio.run_coroutine_threadsafe(
                        address.connect_in_helper(context), self.proxy.loop).result(PATIENCE)
        free.set()
        wait_for(lambda: address.connecting == 0)
        owner.connect.assert_not_called()

    def test_a_connection_that_was_closed_or_spoke_while_idle_is_not_used_again(self):
        for late in self.each((b"", b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")):
            self.start(None)
            client, asked = self.ask_stub()
            asked.send(answer())
            client.read()
            self.entry()
            asked.send(late)
            if not late:
                asked.close()
            client.send(call())
            self.assertEqual(self.complete(client, None, b"second").body, b"second")
            self.assert_traffic(2, 2)

    # What is asked, what becomes of it, what the caller gets, and how many calls that takes
    STALE = (
        (request("GET", "/v1/x"), Asked.reset, 200, 3),
        (request("HEAD", "/v1/x"), Asked.close, 200, 3),
        (request("GET", "/v1/x"), sends(b"HTTP/1.1 2"), 502, 2),
        (request("DELETE", "/v1/x"), Asked.reset, 502, 2),
        (request("GET", "/v1/x", b"{}"), Asked.reset, 502, 2), (call(), Asked.reset, 502, 2))

    def test_a_question_that_met_a_stale_connection_is_asked_again_once(self):
        """But never what has a body, nor where the answer had begun."""
        for data, act, status, calls in self.each(self.STALE):
            self.start(None, BREAKER_FAILURES=1)
            client, asked = self.ask_stub()
            self.complete(client, asked)
            client.send(data)
            act(self.stub.next())
            if calls == 3:
                self.stub.next().answer(b"")
            self.assertEqual(client.read(data.partition(b" ")[0].decode()).status, status)
            self.assert_traffic(calls, calls - 1)
            self.assertEqual(self.base()["state"], "closed")

    def test_the_system_looks_after_silent_connections_of_both_sides(self):
        self.ask_stub()
        sockets = self.proxy.loop._selector.get_map()
        wait_for(lambda: len(sockets) == 3, "reading of both, and of the loop's own")
        found = []
        for descriptor in [*sockets]:
            with socket.socket(fileno=os.dup(descriptor)) as sock:
                sock.setblocking(False)  # PyPy changed that, for the proxy, too
                if sock.family == socket.AF_INET:
                    found.append((sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                                  sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)))
        self.assertEqual(found, [(1, 15)] * 2)

    def test_what_a_caller_sends_about_itself_and_its_connection_does_not_go_upstream(self):
        self.start(BASE_API_KEY="sk-upstream", PASS_HEADERS="X-Trace-*, cookie2")
        for path in self.each((CHAT, "/v1/files")):
            self.post(path, chat(), *PRIVATE_FIELDS, *PASSED_FIELDS)
            asked = self.stub.last
            for row in PASSED_FIELDS:
                name, _, value = row.partition(":")
                self.assertIn((name.lower(), value.strip()), asked.fields)
            self.assert_fields(asked, *[row.partition(":")[0] for row in PRIVATE_FIELDS[1:]])
            self.assert_fields(asked, "authorization: Bearer sk-upstream",
                               "host: 127.0.0.1:%d" % self.stub.port)
            for secret in (b"sk-caller", b"hush", b"10.1.2.3", b"proxy.test"):
                self.assertNotIn(secret, asked.head)

    def test_what_belongs_to_the_account_of_a_caller_goes_up_with_its_own_key(self):
        self.start(BASE_API_KEY="passthrough", PASS_HEADERS="*")
        self.ask(call("sk-caller", "OpenAI-Organization: org-1", "X-Api-Key:", "Cookie: a=b"))
        self.assert_fields(self.stub.last, "authorization: Bearer sk-caller",
                           "openai-organization: org-1", "cookie: a=b", "x-api-key")

    def test_a_metered_answer_stays_readable_and_the_coding_of_others_is_the_callers_choice(self):
        for path, coding in ((CHAT, "identity"), ("/v1/files", "identity"), ("/tokenize", "gzip")):
            self.post(path, chat(), "Accept-Encoding: gzip")
            self.assert_fields(self.stub.last, "accept-encoding: " + coding)

    BASES = table("""\
-              /v1/models?x=1     /v1/models?x=1
-              /x                 /x
-              /                  /
-              /v1                /v1
/              /v1/models         /v1/models
/v1            /v1/models         /v1/models
/v1            /models            /v1/models
/v1            /v1                /v1
/v1            /v1/               /v1/
/v1            /v10/x             /v1/v10/x
/v1beta        /v1beta/models/m   /v1beta/models/m
/v1beta        /v1/models         /v1beta/models
/v1            /v1beta/models     /v1/v1beta/models
/api/openai/   /v1/models?a=b&c   /api/openai/models?a=b&c
/api/openai/   /x/v1/y            /api/openai/x/v1/y
/api/openai/   /                  /api/openai/""")

    def test_a_base_with_a_path_replaces_a_leading_v1_and_a_bare_one_does_not(self):
        for base, path, target in self.each(self.BASES):
            self.start(base=base)
            self.get(path)
            self.assertEqual(self.stub.last.target, target)

    def test_a_base_model_replaces_the_callers_and_nothing_else(self):
        self.start(BASE_MODEL="gemma4")
        rest = {"messages": "model ä \u2028", "temperature": 0.1, "x": [10 ** 20, None]}
        for model in self.each("""[{"model": "any"}, {"model": null}, {"model": ["x"]}, {}]"""):
            self.post(CHAT, {**model, **rest})
            self.assertEqual(self.stub.last.json(), {"model": "gemma4", **rest})

    def test_without_a_base_model_a_body_passes_byte_for_byte(self):
        body = b' {"model":"m",  "messages":[{"content":"\\u00e4 \xc3\xa4"}],"n":1.0} \r\n'
        self.post(CHAT, body)
        self.assertEqual(self.stub.requests[0].body, body)

    def test_what_an_upstream_says_about_its_connection_and_its_address_is_not_passed_on(self):
        rows = (ANSWER_FIELDS % self.stub.url).splitlines()
        self.stub.answer = says(b"{}", "201 Made", *rows)
        answered = self.assert_status(201)
        self.assertEqual(answered.body, b"{}")
        self.assert_fields(answered, *ANSWERED_FIELDS)

    REDIRECTS = table("""\
-         /x          /x
/v1       /v1/x       /v1/x
/api/v2   /api/v2/x   /v1/x
/api      /apix       /apix
/api      /api        /v1""")

    def test_a_redirect_names_the_endpoint_as_callers_know_it(self):
        for base, path, location in self.each(self.REDIRECTS):
            self.start(base=base)
            here = self.stub.url
            self.stub.answer = says(b"", "307 Temporary Redirect", "Location: " + here + path)
            self.assert_status(307, request("GET", "/v1/y"), "location: " + location)
        elsewhere = "Location: https://elsewhere.example/x"
        self.stub.answer = says(b"", "302 Found", elsewhere)
        self.assert_status(302, request("GET", "/v1/y"), elsewhere)

    def test_upstream_times_are_unix_nanoseconds(self):
        before = time.time_ns()
        answered = self.ask()
        names = "x-upstream-request-start", "x-upstream-request-stop"
        start, stop = (int(answered.get(name)) for name in names)
        self.assertTrue(before <= start <= stop <= time.time_ns())


class UploadTest(CallCase):
    BLOCK = bytes(range(256)) * 256
    MULTIPART = "multipart/form-data; boundary=x"

    def upload(self, client, chunked, blocks=80):
        """Send an upload, which has 5 MB by default; returns the SHA-256 of what was sent."""
        body = self.BLOCK * blocks
        framing = CHUNKED if chunked else "Content-Length: %d" % len(body)
        fields = framing, "Content-Type: " + self.MULTIPART
        client.send(unsized("/v1/files", *fields))
        client.send(chunk(self.BLOCK) * blocks + LAST if chunked else body)
        return hashlib.sha256(body).hexdigest()

    def test_an_upload_of_any_framing_and_size_arrives_whole_and_costs_a_request(self):
        self.start(lambda asked: asked.send(answer(asked.digest.encode())),
                   MAX_TOKENS=4, MAX_BODY_BYTES=1000)
        client = self.connect()
        for chunked in self.each((False, True, False)):
            digest = self.upload(client, chunked)
            self.assertEqual(client.read().body.decode(), digest)
            self.assert_fields(self.stub.last, "content-type: " + self.MULTIPART,
                               "content-length:" + " 5242880" * (not chunked))
        self.assert_left(1)

    def test_an_upload_is_passed_on_while_it_comes(self):
        self.start(None, reads=False)
        client, asked = self.relay("/v1/files")
        self.complete(client, asked)

    def test_an_upload_of_a_caller_who_said_its_last_ends_once(self):
        self.patch_seconds(ClientConnection_HALF_CLOSE_SECONDS=PATIENCE)
        self.start()
        upload = unsized("/v1/files", CHUNKED) + chunk(b"x") + LAST
        client = self.send(call() + upload)
        client.sock.shutdown(socket.SHUT_WR)
        for _ in range(2):
            client.answers(200)
        self.assert_status(200)
        self.assertEqual((self.stub.connections, self.stub.faults), (1, []))

    def test_an_upstream_that_says_no_during_an_upload_is_heard(self):
        body = b'{"error": "too large"}'

        def refuse(asked):
            asked.reader.more()
            asked.send(answer(body, "413 Too Large", "Connection: close"))
            asked.sock.shutdown(socket.SHUT_WR)
            asked.wait_for_hang_up()
        self.start(refuse, reads=False)
        for chunked in self.each((False, True)):
            client = self.connect()
            with suppress(OSError):  # it may be hung up on, if it can read the answer
                self.upload(client, chunked, blocks=400)
            answered = client.read()
            self.assertEqual((answered.status, answered.body), (413, body))

    def test_broken_chunks_of_an_upload_end_it_on_both_sides(self):
        self.start(None, reads=False)
        client, asked = self.ask_stub(unsized("/v1/files", CHUNKED))
        client.answers(400, b"3\r\nabcX").tells("type", "invalid_request_error")
        asked.wait_for_hang_up()


class AddressesTest(CallCase):
    URLS = "http://127.0.0.1:%d/v1,http://127.0.0.1:%d/v1"

    def start_two(self, *answers, **settings):
        """A base with two addresses; returns the Stub of each."""
        one, other = self.stub_of("one"), self.stub_of("other")
        one.answer, other.answer = answers
        self.start(BASE_API_URL=self.URLS % (one.port, other.port), **settings)
        return one, other

    def test_a_call_goes_to_the_address_with_the_fewest_calls_in_turn_where_they_are_equal(self):
        one, other = self.start_two(None, None)
        clients = [self.send(call()) for _ in range(6)]
        kept, ended = ([box.next() for _ in range(3)] for box in (one, other))
        self.assert_base("closed", in_flight=6, addresses="2/2")
        for asked in ended:
            asked.answer()
        wait_for(lambda: self.base()["in_flight"] == 3)
        for _ in range(3):
            self.send(call())
            other.next()
        self.assertEqual(one.calls, 3)
        for asked in kept:
            asked.close()
        statuses = [client.read().status for client in clients]
        self.assertEqual(sorted(statuses), [200] * 3 + [502] * 3)

    def test_an_address_that_refuses_is_passed_over_at_once_and_no_call_fails(self):
        lost, kept = self.start_two(says(), says())
        lost.refuse_connections()
        for _ in range(8):
            self.assert_status(200)
        self.assertEqual((kept.calls, self.base()["in_flight"]), (8, 0))

    @unittest.skipUnless(sys.platform.startswith("linux"), "needs a full queue to drop connections")
    def test_an_address_that_does_not_answer_is_passed_over_after_the_open_timeout(self):
        box = self.stub_of("box")
        with ExitStack() as stack:
            silent = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
            for _ in range(4):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(silent.getsockname())
            urls = self.URLS % (silent.getsockname()[1], box.port)
            self.start(BASE_API_URL=urls, OPEN_TIMEOUT="0.1")
            self.assertEqual([self.came_from(call()) for _ in range(3)], ["box"] * 3)
            self.assertEqual((box.calls, self.left()), (3, 997))

    def test_a_call_that_may_have_run_is_never_sent_again(self):
        one, other = self.start_two(Asked.close, Asked.close)
        self.assert_status(502)
        self.assertEqual(one.calls + other.calls, 1)
        self.assert_ending("upstream_failed", left=1000)

    def test_when_one_of_two_boxes_is_killed_no_call_fails_but_those_that_ran_on_it(self):
        """When it is back, it is used again."""
        lost, kept = self.start_two(says(), says(), BREAKER_SECONDS="0.2", MAX_TOKENS=10 ** 9)
        workers, over, failed = [[] for _ in range(8)], Event(), []

        def work(statuses):
            client = self.connect()
            while not over.is_set():
                status = client.exchange(call()).status
                statuses.append(status)
                if status != 200:
                    failed.append(status)
        with threads([partial(work, one) for one in workers]), ExitStack() as stack:
            stack.callback(over.set)
            wait_for(lambda: lost.calls > 20 and kept.calls > 20)
            lost.hang_up()
            seen, calls = [*map(len, workers)], lost.calls
            wait_for(lambda: all(len(one) > count + 5 for one, count in zip(workers, seen)))
            ran = len(failed)
            lost.listen()
            wait_for(lambda: lost.calls > calls + 20)
        self.assertEqual(failed, [502] * ran)
        self.assertLessEqual(ran, 8)
        self.assert_base("closed", addresses="2/2")


def says_events(*payloads):
    """A Stub's `answer` that is a stream of these."""
    return sends(STREAM + (chunk(events(*payloads)) if payloads else b"") + LAST, close=False)


FAULTS_IN_200 = (
    says(b'{"error": {"message": "no"}}'), says_events({"error": {"message": "no"}}, "[DONE]"),
    says_events({"type": "response.failed", "response": {"error": {"code": "server_error"}}}),
    says_events(), says_events({"choices": [{"delta": {"role": "assistant", "content": ""}}]}))


class BreakerTest(CallCase):
    VERDICTS = {"fails": False, "answers": True, "leaves": None}
    STEPS = table("""\
0    fails     closed
0    fails     closed
0    answers   closed
1    fails     closed
1    leaves    closed
1    fails     closed
2    fails     open
31   leaves    open
32   enters    tried
33   fails     open
62   leaves    open
63   enters    tried
64   leaves    half_open
64   enters    tried
93   -         tried
94   -         half_open
94   enters    tried
95   answers   closed""")

    def test_a_breaker_opens_after_so_many_failures_in_a_row_and_lets_one_call_try(self):
        """It is tried while it is half open and its one call runs."""
        breaker = llm_proxy.Breaker(3, 30)
        for second, what, state in self.each(self.STEPS):
            now = int(second)
            if what in self.VERDICTS:
                breaker.judge(self.VERDICTS[what], now)
            elif what:
                breaker.enter(now)
            self.assertEqual(breaker.seconds_left(now) <= 0, state in ("closed", "half_open"))
            self.assertEqual(breaker.state(now), state.replace("tried", "half_open"))

    def test_a_spare_connection_that_is_closed_under_a_call_says_nothing_of_the_address(self):
        self.start(None, BREAKER_FAILURES=1)
        client, asked = self.ask_stub()
        self.complete(client, asked)
        for connections, state in ((1, "closed"), (2, "open")):
            client.send(call())
            self.stub.next().reset()
            self.assertEqual((client.read().status, self.stub.connections), (502, connections))
            self.assertEqual(self.base()["state"], state)

    def open_the_base(self, failures, **settings):
        """A proxy whose base has just failed so often that it is open; returns the Clock."""
        clock = self.start_clock(says(b"{}", "503 No"), BREAKER_FAILURES=failures, **settings)
        for _ in range(failures):
            self.assert_status(503)
        return clock

    def test_an_open_upstream_is_a_503_that_says_when_to_try_again_and_costs_nothing(self):
        clock = self.open_the_base(2)
        clock.now += 10
        rows = (
            (call(), "type"),
            (request("POST", "/v1/messages", chat(max_tokens=1)), "type"),
            (request("POST", "/v1beta/models/m:generateContent", b"{}"), "status"),
        )
        for data, field in self.each(rows):
            answered = self.assert_status(
                503, data, "retry-after: 20", "x-llm-proxy-error-class: upstream_open")
            self.assertIn(field, answered.json()["error"])
        self.assert_spent(2, 1000)
        self.assert_base("open", addresses="0/1")

    def test_many_keys_of_one_origin_crowd_out_neither_new_ones_nor_another_origin(self):
        breaker = llm_proxy.Breaker(2, 30)
        invented = [Caller(("key", b"%d" % number), None, origin=("address", "a"))
                    for number in range(150)]
        for one in invented:
            breaker.judge(False, 100, one)
        self.assertTrue(breaker.concerns(100, invented[-1]))
        self.assertFalse(breaker.concerns(100, caller(b"third")))
        for one in (caller(b"other"), *invented):
            breaker.judge(False, 100, one)
        self.assertTrue(breaker.concerns(100, caller(b"third")))

    def test_what_counts_as_a_failure(self):
        statuses = "200 400 401 404 429 500 501 502 503 504 529".split()
        rows = [(says(b"{}", status + " x"), status > "501") for status in statuses]
        rows += [(Asked.reset, True), (Asked.close, True), (sends(b"no\r\n\r\n"), False)]
        rows += [(act, True) for act in FAULTS_IN_200]
        rows += [(says(b'{"error": {"code": %d}}' % code), code > 501) for code in (400, 500, 503)]
        rows += [(says_events(delta("a"), {"error": {"type": "invalid_request_error"}}), False),
                 (says_events(delta("a")), False),
                 (says_events(delta("a"), LAST_DELTA, "[DONE]"), False)]
        for act, opens in self.each(rows):
            self.start(act, BREAKER_FAILURES=2)
            for _ in range(3):
                self.ask()
            expected = ("open", 2) if opens else ("closed", 3)
            self.assertEqual((self.base()["state"], self.stub.calls), expected)

    def test_who_calls_is_not_to_blame_for_a_key_of_ours_that_the_upstream_refuses(self):
        for key, status in self.each("""[["sk-hush", 502], [null, 401], ["passthrough", 401]]"""):
            self.start(says(b'{"error": "key hush"}', "401 No"), **{"BASE_API_KEY": key or ""})
            for data in (call("sk-caller"), call("sk-caller"), request("GET", "/v1/models")):
                answered = self.ask(data)
                self.assertEqual((answered.status, self.left("sk-caller")), (status, 1000))
            if status == 502:
                self.assert_said("UPSTREAM base REFUSES ITS KEY (status 401)")
                self.assertEqual(answered.json()["error"]["code"], "upstream_refused_our_key")
                self.assertNotIn(b"hush", answered.body + self.lines.data)
            self.assertEqual(self.lines.text().count("REFUSES ITS KEY"), status == 502)

    QUOTED, QUOTING = "sk-hush-hush", b'{"error": {"message": "no model for sk-hush-hush"}}'
    HIDDEN = QUOTING.replace(b"sk-hush-hush", b"*" * 12)

    QUOTES = (
        (says(QUOTING, "403 sk-hush-hush", "X-Key: " + QUOTED), 403),
        (says(gzip.compress(QUOTING), "403 No", "Content-Encoding: gzip"), 403),
        (says(zlib.compress(QUOTING), "500 No", "Content-Encoding: deflate"), 500),
        (says(QUOTING, "200 OK", "Content-Encoding: identity"), 200))

    def test_an_answer_that_quotes_a_key_of_ours_goes_on_without_it(self):
        for (act, status), redact in self.each(self.QUOTES, ("", "email")):
            self.start(act, REDACT=redact, BASE_API_KEY=self.QUOTED, REDACT_UPSTREAMS="*")
            for data in (call(system="a@x.org"), request("GET", "/v1/files/1")):
                answered = self.ask(data)
                self.assertEqual((answered.body, answered.status), (self.HIDDEN, status))
                self.assertIn(answered.get("content-encoding"), (None, "identity"))
                self.assertNotIn(self.QUOTED, str(answered.fields) + self.lines.text())

    def test_a_key_of_ours_is_hidden_wherever_an_answer_is_cut(self):
        editor = llm_proxy.Editor(None, llm_proxy.HiddenKey(self.QUOTED))
        pieces = [editor.feed(self.QUOTING[at:at + 7]) for at in range(0, len(self.QUOTING), 7)]
        self.assertEqual(b"".join(pieces) + editor.flush(), self.HIDDEN)
        key = self.QUOTED.encode()
        said = (1 << 20) * b"x" + key + 99 * b"x"
        pieces = [editor.feed(said[:at]) + editor.feed(said[at:]) + editor.flush()
                  for at in range(1 << 20, (1 << 20) + len(key))]
        self.assertNotIn(key, b"|".join(pieces))

    def test_a_key_that_comes_in_two_parts_of_a_large_error_does_not_go_on(self):
        said = b'{"error": "%b sk-hush-hush"}' % (30_000 * b"x")
        for redact in self.each(("", "email")):
            self.start(None, BASE_API_KEY="sk-hush-hush", REDACT=redact, REDACT_UPSTREAMS="*")
            client, asked = self.ask_stub(call(system="a@x.org"))
            asked.send(answer(said, "400 No")[:-8])
            client.head()
            begin = b""
            while len(begin) < 16_384:
                begin += next(client.pieces)
            asked.send(said[-8:])
            asked.finish()
            self.assertEqual(begin + client.rest().body, said.replace(b"sk-hush-hush", 12 * b"*"))

    def test_a_later_event_that_quotes_a_key_of_ours_goes_on_without_it(self):
        for redact in self.each(("", "email")):
            self.start(None, BASE_API_KEY=self.QUOTED, REDACT=redact, REDACT_UPSTREAMS="*")
            client, asked = self.ask_stub(call(system="a@x.org", stream=True))
            asked.stream(event(1))
            client.head()
            client.expect(event(1))
            asked.chunks(b"data: %b\n\n" % self.QUOTING)
            client.expect(b"data: %b\n\n" % self.HIDDEN)

    OF_KEY = b'{"error": "of sk-hush-hush"}'
    OF_STARS = OF_KEY.replace(b"sk-hush-hush", 12 * b"*")
    # The coding, the bytes, what is passed on: None where they cannot be read
    PACKED = (
        ("gzip", gzip.compress(OF_KEY[:9]) + gzip.compress(OF_KEY[9:]), OF_STARS),
        ("deflate", zlib.compress(OF_KEY)[2:-4], OF_STARS), ("gzip", b"", b""),
        ("br", OF_KEY, None), ("gzip, gzip", gzip.compress(gzip.compress(OF_KEY)), None),
        ("gzip", OF_KEY, None), ("gzip", gzip.compress(OF_KEY)[:-9], None),
        ("gzip", gzip.compress(70_000 * b"x"), None),
        ("gzip", 2 * gzip.compress(40_000 * b"x"), None), ("deflate", b"\3\0" * 9999, None))

    def test_an_error_that_is_packed_is_unpacked_or_keeps_its_status(self):
        for coding, data, text in self.each(self.PACKED):
            self.start(says(data, "429 No", "Retry-After: 7", "Content-Encoding: " + coding,
                            "Content-Type: text/x"), BASE_API_KEY=self.QUOTED)
            is_json = text is None and coding not in ("gzip", "deflate")
            for asked in (call(), request("GET", "/v1/models/x", b"", "Accept-Encoding: br")):
                answered = self.assert_status(
                    429, asked, "retry-after: 7", "content-encoding",
                    "content-type: " + ("application/json" if is_json else "text/x"))
                self.assertTrue(answered.whole)
                self.assert_fields(self.stub.last, "accept-encoding: identity")
                if text is None:
                    self.assertIn("cannot be read", answered.error()["message"])
                else:
                    self.assertEqual(answered.body, text)

    def test_what_stands_in_place_of_an_error_is_of_one_type_and_not_what_validators_say(self):
        self.start(None, BASE_API_KEY="sk-hush-hush")
        for coding, kind, said, begin in self.each("""
                br -> text/html -> application/json -> {"error
                gzip -> text/event-stream -> text/event-stream -> data: {"error"""):
            head = ("HTTP/1.1 404 No\r\nContent-Encoding: %s\r\nContent-Type: %s\r\nETag: x\r\n"
                    "Digest: x\r\nContent-Length: 5\r\n\r\n" % (coding, kind)).encode()
            for method, body in (("HEAD", b""), ("GET", b"hello"), ("HEAD", b"")):
                self.stub.answer = partial(Asked.send, data=head + body)
                answered = self.ask(request(method, "/v1/models/x"))
                types = [value for name, value in answered.fields if name == "content-type"]
                self.assertEqual(types, [said if body else kind])
                if body:
                    self.assert_fields(answered, "etag", "digest")
                    self.assertTrue(answered.body.startswith(begin.encode()))

    def test_a_first_byte_that_does_not_come_counts_and_a_caller_who_leaves_does_not(self):
        self.start_clock(None, BREAKER_FAILURES=2)
        for _ in range(3):
            client, asked = self.ask_stub()
            asked.wait_for_hang_up(client)
        wait_for(lambda: self.base()["in_flight"] == 0)
        self.assert_base("closed")
        for _ in range(2):
            client = self.send(call())
            self.expire("the response of")
            client.answers(504)
        self.assert_status(503)

    def test_a_caller_who_leaves_while_its_call_tries_lets_the_next_one_try(self):
        clock = self.open_the_base(1)
        clock.now += 31
        self.stub.answer = None
        client, asked = self.ask_stub()
        self.assert_status(503)
        asked.wait_for_hang_up(client)
        wait_for(lambda: self.base()["in_flight"] == 0)
        self.stub.answer = says()
        self.assert_status(200)

    RETRIES = table("""\
0   503   0      1
2   503   0      3
2   429   0      3
2   503   -      1
2   429   6      1
2   500   0      1
2   429   soon   1""")

    def test_an_answer_that_asks_for_patience_is_asked_for_again_where_that_is_set(self):
        for retries, status, wait, calls in self.each(self.RETRIES):
            fields = ["Retry-After: " + wait] if wait else []
            self.start(says(b"{}", status + " x", *fields), UPSTREAM_RETRIES=retries)
            self.assert_status(int(status))
            self.assert_spent(int(calls), 1000)

    def test_an_answer_to_a_retry_is_the_callers_and_is_charged(self):
        answers = iter([answer(b"{}", "429 x", "Retry-After: 0"), answer(b"[]")])
        self.start(lambda asked: asked.send(next(answers)), UPSTREAM_RETRIES=1)
        self.assertEqual((self.ask().body, self.stub.calls, self.left()), (b"[]", 2, 999))
        self.assert_base("closed")

    def test_an_open_upstream_is_closed_by_the_one_call_that_tries_it_and_the_log_says_so(self):
        clock = self.open_the_base(2, LOG_FORMAT="text")
        self.assert_status(503)
        clock.now += 31
        self.stub.answer = says()
        self.assertEqual(self.base()["state"], "half_open")
        self.assert_status(200)
        self.assert_base("closed")
        here = "upstream base: http://127.0.0.1:%d " % self.stub.port
        model = " with the model 'm'"
        for what in ("failed 2 times in a row%s, left alone by its one caller for 30 s\n" % model,
                     "is well again%s\n" % model):
            self.assertEqual(wait_for(lambda: self.lines.text().count(here + what)), 1)

    def test_what_fails_for_one_caller_or_one_model_is_closed_to_that_alone(self):
        bad = {"model": "bad"}
        clock = Clock(0)
        self.start(lambda asked: asked.answer(b"{}", "502 x" if b"bad" in asked.body else "200 OK"),
                   clock, BREAKER_FAILURES=2, PROXY_API_KEYS="mallory,alice,bob,eve")
        for second, key, payload, status in self.each((
                (0, "mallory", bad, 502), (9, "mallory", bad, 502), (9, "mallory", bad, 503),
                (9, "mallory", {}, 200), (9, "alice", {}, 200), (9, "alice", bad, 502),
                (9, "alice", bad, 503), (29, "bob", bad, 502), (29, "bob", bad, 503),
                (30, "eve", bad, 503), (30, "eve", {}, 200), (59, "eve", bad, 502),
                (59, "alice", bad, 503))):
            self.pass_seconds(second - clock.now)
            self.assert_status(status, call(key, **payload))

    def test_keys_that_anyone_can_invent_count_as_their_one_address(self):
        self.start_clock(says(b"{}", "502 x"), BREAKER_FAILURES=2)
        for key, seconds, status in self.each((
                ("a", 0, 502), ("b", 0, 502), ("b", 0, 503), ("c", 30, 502), ("c", 0, 503))):
            self.pass_seconds(seconds)
            self.assert_status(status, call(key))
        self.connect(source="127.0.0.2").answers(502, call("e"))
        self.assert_status(503, call("d"))

    def test_what_works_for_somebody_is_not_closed_to_all(self):
        clock = Clock()
        self.start(lambda asked: asked.answer(b"{}", "502 x" if b"bad" in asked.body else "200 OK"),
                   clock, BREAKER_FAILURES=2, PROXY_API_KEYS="mallory,malice,bob")
        for _ in range(3):
            for key, text, status in (("mallory", "bad", 502), ("malice", "bad", 502),
                                      ("malice", "bad", 503), ("bob", "good", 200)):
                self.assert_status(status, call(key, user=text))
                clock.now += 4

    def test_what_cannot_be_reached_is_closed_to_all(self):
        self.start(BREAKER_FAILURES=2)
        self.stub.refuse_connections()
        found = [self.ask(call(key, model=key)).status for key in ("a", "b", "c", "d")]
        self.assertEqual(found, [502, 502, 503, 503])

    def test_a_list_of_models_neither_opens_nor_closes_a_breaker(self):
        clock = self.open_the_base(2, UPSTREAM_X_URL="http://127.0.0.1:1")
        clock.now += 31
        self.stub.answer = says({"data": [{"id": "m"}]})
        self.assertIn(b'"m"', self.get("/v1/models").body)
        self.assertEqual(self.base()["state"], "half_open")
        self.assert_status(200)
        self.stub.answer = says(b"{}", "503 No")
        for _ in range(3):
            clock.now += 61
            self.get("/v1/models")
        self.assertEqual(self.base()["state"], "closed")

    def test_an_upstream_that_tires_of_a_callers_slow_upload_has_not_failed(self):
        self.start(Asked.close, reads=False, BREAKER_FAILURES=1)
        slow = unsized("/v1/files", "Content-Length: 10") + b"x"
        self.assert_status(502, slow)
        self.assert_base("closed")

    def test_an_upload_is_not_asked_for_again(self):
        self.start(says(b"{}", "503 x", "Retry-After: 0"), UPSTREAM_RETRIES=3)
        self.assert_status(503, request("POST", "/v1/files", b"x" * 100))
        self.assert_calls(1)


class RoutesTest(CallCase):
    ROUTED = """
        MODEL_ALIASES=fast=claude-5,slow=theirs BASE_MODEL=served BASE_API_KEY=k-base
        UPSTREAM_BOX_MODEL=boxed UPSTREAM_BOX_KEY=k-box
        UPSTREAM_ONE_MODELS=gpt-*,o3 UPSTREAM_ONE_KEY=k-one
        UPSTREAM_TWO_MODELS=gpt-5,claude-* UPSTREAM_TWO_KEY=k-two
        UPSTREAM_GEMINI_MODELS=gem-* UPSTREAM_GEMINI_KEY=k-gemini
        UPSTREAM_OLLAMA_MODELS=llama* UPSTREAM_OLLAMA_KEY=k-ollama
        UPSTREAM_AZURE_MODELS=deployed UPSTREAM_AZURE_KEY=k-azure"""
    # method, model, upstream, model there, its field of the key, cost, path, path there if another
    ROUTES = table("""\
POST m        box    boxed    authorization  1 /box/v1/chat/completions     -
POST m        box    boxed    x-api-key      1 /box/v1/messages             -
GET  -        box    -        authorization  0 /box/v1/models               -
GET  -        box    -        authorization  0 /box/v1/files/1?a=b          -
GET  -        box    -        authorization  0 /box/other                   -
POST gpt-5    one    gpt-5    authorization  1 /v1/chat/completions         -
POST GPT-5    base   served   authorization  1 /v1/chat/completions         -
POST gem-5    gemini gem-5    authorization  1 /v1/chat/completions         /oai/chat/completions
POST o3       one    o3       authorization  1 /v1/chat/completions         -
POST claude-5 two    claude-5 authorization  1 /v1/chat/completions         -
POST fast     two    claude-5 authorization  1 /v1/chat/completions         -
POST o3-mini  base   served   authorization  1 /v1/chat/completions         -
POST -        base   served   authorization  1 /v1/chat/completions         -
POST slow     base   served   authorization  1 /v1/chat/completions         -
POST m        base   served   authorization  1 /v1/audio/speech             -
POST fast     two    claude-5 authorization  1 /v1/audio/speech             -
POST o3       one    o3       authorization  1 /v1/score                    -
POST -        one    -        authorization  1 /v1beta/models/o3:predict    -
POST -        two    -        authorization  1 /v1beta/models/fast:predict  -
POST -        one    -        x-goog-api-key 1 /v1beta/models/o3:generateContent -
POST -        two    -        x-goog-api-key 1 /v1beta/models/fast:generateContent -
POST -        one    -        x-goog-api-key 0 /v1beta/models/o3:countTokens -
POST fast     two    claude-5 x-api-key      0 /v1/messages/count_tokens    -
GET  -        two    -        authorization  0 /v1/models/fast              -
GET  -        one    -        authorization  0 /v1/models/o3                -
POST gem-5    gemini gem-5    authorization  1 /gemini/v1/chat/completions  /oai/chat/completions
GET  -        gemini -        authorization  0 /gemini/v1/models            /oai/models
GET  -        gemini -        x-goog-api-key 0 /gemini/v1beta/models        -
GET  -        gemini -        authorization  0 /gemini/v1beta/openai/models -
POST -        gemini -        x-goog-api-key 1 /gemini/v1/models/m:generateContent -
POST gem-5    gemini gem-5    x-goog-api-key 1 /v1beta/interactions         -
POST llama3.2 ollama llama3.2 authorization  1 /api/chat                    -
POST m        ollama m        authorization  1 /ollama/api/generate         -
GET  -        ollama -        authorization  0 /ollama/api/tags             -
POST llama3.2 ollama llama3.2 authorization  1 /v1/chat/completions         -
POST m        ollama m        authorization  1 /ollama/chat/completions     /v1/chat/completions
POST m        ollama m        x-api-key      1 /ollama/v1/messages          -
POST m        azure  m        api-key        1 /azure/openai/deployments/m/chat/completions?a=b -
POST deployed azure  deployed api-key        1 /openai/deployments/deployed/embeddings -
POST deployed azure  deployed api-key        1 /v1/chat/completions         /azu/chat/completions
POST m        azure  m        api-key        1 /azure/openai/responses      -
POST -        azure  deployed api-key        1 /openai/deployments/deployed/audio/speech -
GET  -        azure  -        api-key        0 /azure/v1/models             /azu/models
GET  -        azure  -        api-key        0 /azure/openai/models?a=b     -
""".replace("/oai", "/v1beta/openai").replace("/azu/", "/openai/v1/"))
    CREDENTIALS = {"authorization", "x-api-key", "x-goog-api-key", "api-key"}

    def start_routed(self):
        """A proxy with the upstreams of ROUTES, without a path; returns {name: Stub}."""
        names = "one two box gemini ollama azure".split()
        stubs = {name: self.stub_of(name) for name in names}
        settings = dict(row.split("=", 1) for row in self.ROUTED.split())
        for name, stub in stubs.items():
            settings["UPSTREAM_%s_URL" % name.upper()] = stub.url
        self.start(says({"from": "base"}), **settings)
        return {"base": self.stub, **stubs}

    def test_the_next_upstream_is_sent_all_of_a_large_call(self):
        first, second = self.start_named(
            "one two", "UPSTREAM_ONE_MODELS=real,other UPSTREAM_TWO_MODELS=real,other",
            MODEL_ALIASES="fast=real,slow=other")
        first.refuse_connections()
        sent = {"model": "fast", "models": ["slow"], "messages": [{"content": "x " * 10000}] * 3}
        self.assert_status(200, request("POST", CHAT, sent))
        self.assertEqual((first.calls, second.calls), (0, 1))
        whole = json.dumps({**sent, "model": "real", "models": ["other"]}, separators=(",", ":"))
        asked = second.requests[0]
        self.assertEqual(asked.digest, hashlib.sha256(whole.encode()).hexdigest())

    def test_prefix_and_model_decide_where_a_call_goes_with_which_key_and_model_at_what_cost(self):
        """Of the upstreams that serve a model the first is asked, else the base. One connection
        may reach them all, even by the same head."""
        stubs, client = self.start_routed(), self.connect()
        for number, row in enumerate(self.each(self.ROUTES)):
            method, model, name, served, field, cost, path, target = row
            body = chat(model=model, max_tokens=1) if method == "POST" else b""
            bearer = "Bearer " * (field == "authorization")
            data = request(method, path, body, key="mine" if bearer else None)
            self.assertEqual(client.exchange(data).json(), {"from": name})
            asked = stubs[name].requests[-1]
            same = path.replace("/" + name, "").replace("fast", "claude-5")
            self.assertEqual(asked.target, target or same)
            self.assert_fields(asked, field + ": " + bearer + "k-" + name)
            self.assert_fields(asked, *self.CREDENTIALS - {field})
            if served:
                self.assertEqual(asked.json()["model"], served)
            entry = self.entry(number)
            self.assertEqual((entry["upstream"], entry["cost"] or 0), (name, int(cost)))

    def test_a_prefix_spelled_otherwise_is_metered_or_names_no_upstream(self):
        box, = self.start_named("box", MAX_TOKENS=100)
        paths = """
            /box//v1/chat/completions /box/v1/./chat/completions /%62ox/v1/chat/completions
            //box/v1/chat/completions /BOX/v1/chat/completions /box/v1/chat/completions/
            /box/v1/chat%2fcompletions"""
        for path in self.each(paths.split()):
            answered = self.post(path, chat())
            self.assertIn(answered.status, (200, 400))
            self.assert_left(100 - self.stub.calls - box.calls)

    def test_a_model_that_no_upstream_serves_is_a_404_that_names_it(self):
        self.start_named("one", "UPSTREAM_ONE_MODELS=gpt-*", base=False)
        answered = self.assert_status(404, call(model="claude-5"), error="invalid_request_error")
        answered.tells("code", "model_not_found")
        self.assertIn("'claude-5'", answered.error()["message"])
        body = chat(model="claude-5", max_tokens=1)
        answered = self.assert_status(404, request("POST", "/v1/messages", body))
        self.assertEqual(answered.json()["error"]["type"], "not_found_error")
        answered = self.assert_status(404, request("GET", "/v1/models/other"))
        answered.tells("code", "model_not_found")
        self.assert_status(404, request("GET", "/v1/files"))
        self.assert_left(1000)

    def test_a_key_that_is_set_replaces_the_callers_and_passthrough_passes_it_on(self):
        calls = {
            "authorization": request("POST", "/openai" + CHAT, chat(), key="mine"),
            "x-api-key": request(
                "POST", "/anthropic/v1/messages", chat(max_tokens=1), "x-api-key: mine"),
            "x-goog-api-key": request(
                "POST", "/gemini/v1beta/models/m:generateContent?key=mine", b"{}"),
        }
        for key, sent in self.each("""[
                ["sk-set", "sk-set"], ["passthrough", "mine"], ["", null]]"""):
            keys = "UPSTREAM_OPENAI_KEY=? UPSTREAM_ANTHROPIC_KEY=? UPSTREAM_GEMINI_KEY=?"
            stubs = self.start_named(
                "openai anthropic gemini", "BASE_API_KEY=sk-base " + keys.replace("?", key))
            for stub, (field, data) in zip(stubs, calls.items()):
                self.ask(data)
                asked = stub.requests[0]
                found = {name: asked.get(name) for name in calls if asked.get(name)}
                prefix = "Bearer " if field == "authorization" else ""
                self.assertEqual(found, {field: prefix + sent} if sent else {})
                self.assertNotIn("mine", asked.target)

    def test_azures_clients_may_bring_their_own_key(self):
        azure = self.stub_of("azure")
        self.start(UPSTREAM_AZURE_URL=azure.url, UPSTREAM_AZURE_KEY="passthrough")
        for field in self.each(("api-key: mine", "Authorization: Bearer mine")):
            path = "/azure/openai/deployments/m/embeddings"
            self.post(path, chat(), field)
            self.assert_fields(azure.requests[-1], "api-key: mine", "authorization")

    def test_whether_a_call_of_ollama_is_a_stream_is_logged(self):
        for number, (path, payload, stream) in enumerate(self.each("""[
                ["/api/chat", {}, true], ["/api/generate", {"stream": null}, true],
                ["/api/chat", {"stream": false}, false], ["/api/embed", {}, false]]""")):
            self.post(path, {"model": "m", **payload})
            self.assert_entry("stream", stream, number)

    def test_a_caller_of_a_passthrough_upstream_is_its_own_credential(self):
        self.start_named("openai", "UPSTREAM_OPENAI_KEY=passthrough MAX_TOKENS=5")
        self.post("/openai" + CHAT, chat(), key="mine")
        self.assertEqual((self.left("mine"), self.left("another")), (4, 5))

    def test_a_credential_cannot_spell_lines_of_its_own(self):
        openai, = self.start_named("openai", "UPSTREAM_OPENAI_KEY=passthrough")
        keys = ("k%0d%0aX-Real-IP:%209.9.9.9", "k%0aX:y", "%00",
                "k%0d%0a%0d%0aGET%20/%20HTTP/1.1%0d%0a%0d%0a")
        for key in self.each(keys):
            self.assert_status(400, request("GET", "/openai/v1/models?key=" + key))
        self.assertEqual(openai.connections, 0)

    def test_a_field_that_is_set_for_an_upstream_is_the_only_one_of_its_name(self):
        box, = self.start_named(
            "box", "UPSTREAM_BOX_KEY=k UPSTREAM_BOX_DIALECT=anthropic UPSTREAM_BOX_MODELS=*",
            UPSTREAM_BOX_HEADERS="anthropic-version: 1 | content-type: text/x | X-API-Key: other")
        self.post("/box/v1/messages", chat(max_tokens=1),
                  "anthropic-version: 2", "content-type: a/b")
        self.get("/v1/models")
        for asked in box.requests:
            self.assert_fields(
                asked, "anthropic-version: 1", "content-type: text/x", "x-api-key: other")

    def test_a_redirect_keeps_the_prefix(self):
        box, = self.start_named("box", "UPSTREAM_BOX_MODELS=m")
        there = box.url + "/v1/other"
        box.answer = says(b"", "302 Found", "Location: " + there)
        client = self.connect()
        for prefix in ("", "/box", ""):
            answered = client.exchange(request("POST", prefix + CHAT, chat()))
            self.assert_fields(answered, "location: %s/v1/other" % prefix)

    def test_a_callers_own_key_does_not_go_to_a_second_vendor(self):
        one, two = self.start_named(
            "one two", "UPSTREAM_ONE_MODELS=m UPSTREAM_ONE_KEY=passthrough"
                       " UPSTREAM_TWO_MODELS=m UPSTREAM_TWO_KEY=passthrough")
        one.refuse_connections()
        self.assert_status(502, call("mine"))
        self.assertEqual(two.calls, 0)

    def test_a_name_that_gemini_spells_in_two_ways_is_one_model(self):
        gemini, = self.start_named("gemini", "UPSTREAM_GEMINI_MODELS=gemini-*",
                                   LIMITS="model:gemini-2 1 requests per day")
        self.assert_from("gemini", call(model="models/gemini-2"))
        self.assertEqual(gemini.requests[0].json()["model"], "gemini-2")
        for model in ("gemini-2", "models/gemini-2"):
            self.assertIn(b"limit reached", self.ask(call(model=model)).body)

    def test_content_that_is_null_beside_tool_calls_is_empty_text_for_those_that_need_it(self):
        message = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
        plain = {"role": "user", "content": None}
        stubs = self.start_named("deepseek other")
        for name, stub, content in zip(("deepseek", "other"), stubs, ("", None)):
            self.post("/" + name + CHAT, chat(messages=[message, plain]))
            expected = [{**message, "content": content}, plain]
            self.assertEqual(stub.requests[0].json()["messages"], expected)

    def test_upstreams_of_one_model_are_tried_in_order_while_nothing_was_sent(self):
        """The model of the first is not the next one's."""
        one, two, three = self.start_named(
            "one two three",
            "UPSTREAM_ORDER=one,two,three UPSTREAM_ONE_MODEL=replaced UPSTREAM_ONE_MODELS=m"
            " UPSTREAM_TWO_MODELS=m UPSTREAM_THREE_MODELS=m UPSTREAM_TWO_MAX_CONCURRENCY=1"
            " MAX_QUEUE=0 BREAKER_FAILURES=1",
            LIMITS="upstream:three 1 requests per day; upstream:* 100 requests per day")
        self.assert_from("one", call())
        one.answer = says(b"{}", "503 No")
        self.assert_status(503)  # it was sent
        path = "/openai/deployments/m/chat/completions"
        self.assert_from("two", request("POST", path, chat()))  # one is open
        self.assertTrue(two.requests[0].target.endswith(path), two.requests[0].target)
        two.answer = None
        client = self.send(call())
        asked = two.next()
        self.assert_from("three", call())  # two is at work
        self.assertIn(b"limit reached", self.ask().body)
        self.complete(client, asked)
        self.assertEqual([asked.json()["model"] for asked in two.requests], ["m", "m"])
        found = {key[0].split()[0]: level for key, level in levels(self.proxy).items()}
        self.assertEqual(found, {"upstream:*": 97, "upstream:three": 0})

    def test_a_prefix_names_one_upstream_and_no_other_is_tried(self):
        one, two = self.start_named("one two", "UPSTREAM_ONE_MODELS=m UPSTREAM_TWO_MODELS=m")
        one.refuse_connections()
        answered = self.assert_status(502, request("POST", "/one" + CHAT, chat()))
        self.assert_fields(answered, "x-llm-proxy-error-class")
        self.assertEqual((two.calls, self.stub.calls, self.left()), (0, 0, 1000))

    FORGED_TARGETS = """\
http://%s/v1/chat/completions http://%s/v1/x //%s/v1/chat/completions //%s/x /@%s/x
/@%s/v1/chat/completions /box/@%s/v1/chat/completions /box/http://%s/v1/chat/completions
/http://%s/v1/chat/completions /box//%s/v1/chat/completions /%s/v1/chat/completions
/box%%2f%%2f%s/v1/chat/completions /box:%s/v1/chat/completions /box@%s/v1/chat/completions
/box\\@%s/v1/chat/completions /box/v1/chat/completions?url=http://%s /box/v1/files?@%s
/box/..//%s/v1/x /..//%s""".split()
    FORGED_FIELDS = """\
X-Forwarded-Host Forwarded X-Original-URL X-Rewrite-URL X-Upstream Proxy X-Host""".split()

    def test_nothing_in_a_request_chooses_where_it_goes_but_to_upstreams(self):
        trap, box = self.stub_of("trap"), self.stub_of("box")
        self.start(base="/v1", UPSTREAM_BOX_MODELS="m",
                   UPSTREAM_BOX_URL=box.url + "/v1")
        there = "127.0.0.1:%d" % trap.port
        names = "base_url", "api_base", "url"
        body = chat(proxy=there, **dict.fromkeys(names, "http://" + there))
        rows = [request("POST", path % there, body) for path in self.FORGED_TARGETS]
        rows += [request("GET", path % there) for path in self.FORGED_TARGETS]
        rows += [request("POST", CHAT, body, name + ": " + there) for name in self.FORGED_FIELDS]
        rows += [request("POST", path, body, host=there)
                 for path in (CHAT, "*", "http://%s/v1/x" % there)]
        rows.append(request("POST", "/box:%d/v1/chat/completions" % trap.port, body))
        rows.append(b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (there.encode(), there.encode()))
        for data in self.each(rows):
            self.ask(data)
        self.assertEqual(trap.connections, 0)


class HttpsTest(CallCase):
    """Upstreams that speak TLS, with a certificate that nobody vouches for."""

    def setUp(self):
        self.file = pem_file(self)
        self.tls = server_context(self.file, None)
        self.box = Stub(says(), tls=self.tls)
        self.addCleanup(self.box.close)

    def start(self, **settings):
        super().start(BASE_API_URL=self.box.url + "/v1", **settings)
        self.stub = self.box

    def test_a_certificate_is_checked_unless_that_is_switched_off(self):
        rows = (
            ({}, 502, "certificate not trusted"),
            ({"UPSTREAM_CA_FILE": self.file}, 200, None),
            ({"UPSTREAM_TLS_VERIFY": "off"}, 200, None),
        )
        for settings, status, cause in self.each(rows):
            self.start(**settings)
            self.assert_status(status)
            self.assert_entry("cause", cause)

    def test_authorities_are_not_read_where_nothing_is_checked(self):
        """OpenSSL would read their folder again for each connection."""
        with patch.object(ssl.SSLContext, "load_default_certs") as read:
            self.start(UPSTREAM_TLS_VERIFY="off")
            self.assert_status(200)
        read.assert_not_called()

    def test_a_stream_is_read_to_its_end_after_both_sides_have_said_goodbye(self):
        loop, pair = llm_proxy.Loop(), socket.socketpair()
        trusting = ssl.create_default_context(cafile=self.file)
        with concurrent.futures.ThreadPoolExecutor(1) as helper:
            connecting = helper.submit(trusting.wrap_socket, pair[0], server_hostname="127.0.0.1")
            stream = Stream(loop, self.tls.wrap_socket(pair[1], server_side=True))
            theirs = connecting.result()
        for one in (loop, theirs, stream):
            self.addCleanup(one.close)
        theirs.setblocking(False)
        with self.assertRaises(ssl.SSLWantReadError):
            theirs.unwrap()
        stream.shut_down_writing()
        theirs.close()
        stream.on_readable()
        self.assertTrue(stream.ended)

    def test_a_stream_comes_through_and_a_caller_who_leaves_closes_it(self):
        self.box.answer = None
        self.start(UPSTREAM_CA_FILE=self.file)
        client, asked = self.begin(event(1))
        asked.wait_for_hang_up(client)
        self.assertEqual(self.outcome(), "caller_gone")

    def tunnel(self, asked):
        """The proxy on the way out, and the upstream behind it."""
        asked.send(HINTS + b"HTTP/1.1 200 Connection established\r\n\r\n")
        with self.tls.wrap_socket(asked.sock, server_side=True) as sock:
            self.behind = Asked(sock, Reader(sock))
            self.behind.read_body()
            self.behind.send(answer())

    def test_a_proxy_on_the_way_out_is_asked_to_connect_and_sees_nothing_else(self):
        tunnel = self.stub_of("tunnel", self.tunnel)
        there = "127.0.0.1:%d" % self.box.port
        for who in self.each(("user:hush", ":hush")):
            way_out = "http://%s@127.0.0.1:%d" % (who, tunnel.port)
            self.start(UPSTREAM_CA_FILE=self.file, HTTPS_PROXY=way_out)
            self.assert_status(200)
            asked = tunnel.last
            self.assertEqual((asked.method, asked.target), ("CONNECT", there))
            shown = base64.b64encode(who.encode()).decode()
            self.assert_fields(asked, "proxy-authorization: Basic " + shown)
            self.assert_fields(self.behind, "proxy-authorization:", "host: " + there)
        self.start(UPSTREAM_CA_FILE=self.file, HTTPS_PROXY=way_out, NO_PROXY="127.0.0.1")
        self.assert_status(200)
        self.assertEqual((tunnel.calls, self.box.calls), (2, 1))


# --------------------------------------------------------------------------------------------------
# Books
# --------------------------------------------------------------------------------------------------

def completion(*used):
    """The body of an answer of 40 characters that reports these tokens of input and of output."""
    usage = dict(zip(("prompt_tokens", "completion_tokens"), used))
    reported = {"usage": usage} if used else {}
    return encoded({"choices": [{"message": {"content": "x" * 40}}], **reported})


class LedgerCase(CallCase):
    """A proxy with a ledger in the file `self.path`: an ending is in bucket, line and row."""

    def start(self, *arguments, **settings):
        self.path = settings.setdefault("DATABASE", new_path(self, "llm_proxy.db"))
        super().start(*arguments, **settings)

    @staticmethod
    def rows(path):
        with closing(sqlite3.connect(path)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute("SELECT * FROM calls ORDER BY rowid")]

    def wait_for_rows(self, count):
        return wait_for(lambda: self.rows(self.path)[count - 1:] and self.rows(self.path))

    def row(self, number=0):
        """What the ledger says of the call with this number."""
        return self.wait_for_rows(number + 1)[number]

    def assert_same(self, number=0):
        """Line and row say the same of the call with this number; returns both."""
        entry, row = self.entry(number), self.row(number)
        for name in (entry.keys() & row.keys()) - {"time", "usd"}:
            self.assertEqual(entry[name] or 0, row[name] or 0, name)
        self.assertEqual(float(entry["usd"] or 0), row["usd"])
        return entry, row

    def assert_ending(self, outcome, left, number=0, key=None):
        super().assert_ending(outcome, left, number, key)
        entry, row = self.assert_same(number)
        charge = (row["charges"] or "=").rpartition("=")[2]  # there is one rule
        self.assertEqual(charge, str(entry["cost"] or ""))

    @contextmanager
    def held_up(self, owner, name):
        """Meanwhile this method waits where it is called; returns an Event for when it is."""
        method, called, gate = getattr(owner, name), Event(), Event()
        self.addCleanup(gate.set)

        def wait(*arguments):
            called.set()
            gate.wait(PATIENCE)
            return method(*arguments)
        with patch.object(owner, name, wait):
            yield called
        gate.set()


class BooksTest(LedgerCase):
    KEYS = {"PROXY_API_KEYS": "alice=sk-1"}

    ROW = dict(table("""\
caller        alice
address       127.0.0.1
method        POST
path          /v1/chat/completions
dialect       openai
model         m
served        gpt-4o-mini
upstream      base
status        200
outcome       ok
cause         None
stream        0
input         1000
cached        600
cache_write   0
output        20
reasoning     5
estimated     0
usd           0.000117
picodollars   117000000
unpriced      0
held          53
queue_ms      None
team          None
tag           None
agent         curl/8\\x9b
redacted      None"""))
    CHARGES = "each 100000 tokens per day=1020;all 3 usd per day=117000000"
    USAGE = b"""{"usage": {
        "prompt_tokens": 1000, "prompt_tokens_details": {"cached_tokens": 600},
        "completion_tokens": 20, "completion_tokens_details": {"reasoning_tokens": 5}}}"""

    def test_a_row_tells_all_of_a_call(self):
        """It costs 400 * 0.15, 600 * 0.075 and 20 * 0.6 millionths of a dollar."""
        self.start(says(self.USAGE), BASE_MODEL="gpt-4o-mini", **self.KEYS,
                   LIMITS="each 100000 tokens per day; all 3 usd per day")
        data = request("POST", CHAT + "?a=hush", chat(max_tokens=50), "User-Agent: curl/8\x9b",
                       key="sk-1")
        answered = self.assert_status(
            200, data, "x-llm-input-tokens: 1000", "x-llm-output-tokens: 20",
            "x-llm-cost-usd: 0.000117", "x-llm-estimated:", "x-ratelimit-limit: 100000")
        entry, row = self.assert_same()
        found = entry["usd"], entry["cost"], entry["remaining"]
        self.assertEqual(found, ("0.000117", 1020, 98980))
        self.assertAlmostEqual(row.pop("time"), time.time(), delta=PATIENCE)
        found = [row.pop("connect_ms"), row.pop("first_ms"), row.pop("ms"), PATIENCE * 1000]
        self.assertEqual(found, sorted(found))
        found = row.pop("id"), row.pop("bytes"), row.pop("charges")
        self.assertEqual(found, (
            answered.get("x-request-id"), len(answered.body), self.CHARGES))
        self.assertEqual({name: str(value) for name, value in row.items()}, self.ROW)

    def test_a_text_line_tells_the_same(self):
        self.start(MAX_TOKENS=5, LOG_FORMAT="text", **self.KEYS)
        data = request("POST", CHAT + "?secret=hush", chat(stream=True), key="sk-1")
        answered = self.ask(data)
        row = wait_for(self.lines.text)
        self.assertRegex(row, r"^20\S+Z alice POST /v1/chat/completions m 200 ok stream "
                              r"first=[0-9.]+ms all=[0-9.]+ms cost=1 left=4 in=~3 out=~0 bytes=14 "
                              r"upstream=base id=\S+\n$")
        self.assertIn(" id=%s\n" % answered.get("x-request-id"), row)

    def test_a_line_tells_in_dollars_what_a_rule_in_dollars_was_charged(self):
        self.start(says(self.USAGE), BASE_MODEL="gpt-4o-mini", LIMITS="all 3 usd per day",
                   LOG_FORMAT="text", **self.KEYS)
        self.ask(call("sk-1", max_tokens=50))
        self.assertIn(" cost=0.000117 left=2.9998", wait_for(self.lines.text))

    CALLS = (  # what is asked, the status, outcome and remaining quota
        (call("sk-1"), 200, "ok", "3"),
        (call("sk-1"), 200, "limited", "3"),
        (call("wrong"), 401, "refused", ""),
        (request("POST", CHAT, b"{", key="sk-1"), 400, "refused", ""),
        (request("GET", "/v1/models", key="sk-1"), 200, "ok", ""),
        (request("OPTIONS", CHAT), 204, "ok", ""),
        (b"nonsense\r\n\r\n", 400, "refused", ""),
    )

    def test_each_call_is_one_line_and_one_row_but_pages_and_nonsense_have_no_row(self):
        self.start(MAX_TOKENS=10, REQUEST_TOKEN_COST=7, **self.KEYS)
        for number, (data, status, outcome, left) in enumerate(self.each(self.CALLS)):
            self.assert_status(status, data, "x-ratelimit-remaining: " + left)
            ProxyCase.assert_ending(self, outcome, 3, number, "sk-1")
            self.assert_entry("status", status, number)
        for number in range(5):
            self.assert_same(number)
        self.close_books()
        found = len(self.rows(self.path)), len(self.lines.entries()), self.stub.calls
        self.assertEqual(found, (5, 7, 2))

    def test_refusals_without_a_known_caller_are_summed_up(self):
        clock = self.start_clock(PROXY_API_KEYS="alice=sk-1", METRICS="open")
        for number in range(100):
            self.assertEqual(self.ask(call(None if number % 4 else "sk-x")).status,
                             401 if number % 4 or number < 40 else 429)
        self.ask("sk-1")
        clock.now += 1
        for _ in range(5):
            self.ask(b"nonsense\r\n\r\n")
        wait_for(lambda: len(self.lines.entries()) == 12, "the lines")
        self.assertEqual(len(self.wait_for_rows(11)), 11)  # the last had no head
        self.on_loop(self.proxy.books.refusals.report)
        self.assert_said("90 more were refused: 401 127.0.0.1 x75, 429 127.0.0.1 x15")
        self.assert_said("4 more were refused: 400 127.0.0.1 x4")
        clock.now += 9
        for _ in range(12):
            self.ask(call("wrong"))
        wait_for(lambda: len(self.lines.entries()) == 21, "the lines")
        self.assertRegex(self.get("/metrics").body.decode(),
                         r'requests_total\{[^}]*outcome="refused"\} 112\n')

    def test_what_a_caller_sends_cannot_break_or_forge_a_line(self):
        models = ("a\nb", "a\r\x1b[31mred", "two words", "\x00", "ä€\U0001f600", '"quoted"',
                  "x" * 256, "", "-", "\u2028", "\x7f\x9b")
        for log_format in ("text", "json"):
            self.start(LOG_FORMAT=log_format)
            client = self.connect()
            for model in models:
                client.exchange(call(model=model))
            wait_for(lambda: self.lines.data.count(b"\n") >= len(models))
            rows = self.lines.text().splitlines()
            self.assertEqual(len(rows), len(models))
            for model, row in self.each(zip(models, rows)):
                self.assertTrue(row.isascii() and row.isprintable(), row)
                if log_format == "json":
                    self.assertEqual(json.loads(row)["model"], model[:80])
                else:
                    self.assertEqual(len(row.split(" ")), 17, row)
                    self.assertLess(len(row), 1000)

    def test_a_log_that_nobody_reads_drops_lines_and_counts_them_but_blocks_no_call(self):
        log, client = self.proxy.books.log, self.connect()
        log.room = 10
        with self.held_up(self.lines, "write") as blocked:
            client.exchange(call())
            self.assertTrue(blocked.wait(PATIENCE))
            for _ in range(25):
                client.answers(200, call())
            wait_for(lambda: log.dropped == 15, "the last of them")
        wait_for(lambda: "15 log lines dropped" in self.lines.text(), "the count")
        self.assertEqual(len(self.lines.entries()), 11)
        client.exchange(call())
        self.entry(11)
        self.assertEqual((self.lines.text().count("dropped"), log.dropped), (1, 15))

    def test_nothing_in_a_log_moves_a_terminals_cursor(self):
        self.start(LOG_FORMAT="text")
        self.proxy.books.log.say("a\x1b[2J\rb\x7f\x9b\tc\nd\u20ac")
        said = rb"a\x1b[2J\x0db\x7f\x9b\x09c" + b"\n" + rb"d\u20ac" + b"\n"
        wait_for(lambda: said in self.lines.data, "the lines")

    def test_every_line_of_the_log_begins_with_its_time(self):
        moment = "2023-11-14T22:30:00.000Z"
        for kind, *lines in self.each((
                ("text", "%s hello\n", "%s 127.0.0.1 POST "),
                ("json", '{"time": "%s", "message": "hello"}\n', '{"time": "%s", "id": '))):
            self.start_clock(LOG_FORMAT=kind)
            self.proxy.books.log.say("hello")
            self.ask()
            for line in lines:
                self.assert_said(line % moment)

    def test_a_log_that_takes_little_at_a_time_or_fails_is_no_reason_to_stop(self):
        write = self.lines.write
        self.lines.write = lambda data: write(data[:7])
        self.ask()
        self.assert_entry("status", 200)
        full = mock.Mock(side_effect=OSError(errno.ENOSPC, "no space left"))
        self.lines.write = full
        self.assert_status(200)
        wait_for(lambda: full.called)
        self.lines.write = write
        self.ask()
        self.assert_entry("status", 200, 1)

    def test_lines_are_not_split_where_others_write_to_the_same_pipe(self):
        """Stdout and stderr are one for many a supervisor; a file takes all at once."""
        class Recorder(io.FileIO):
            def write(self, data):
                written.append(bytes(data))
                return len(data)

        reading, writing = os.pipe()
        ours, theirs = socket.socketpair()
        file = os.open(new_path(self, "log"), os.O_WRONLY | os.O_CREAT)
        self.addCleanup(os.close, reading)
        self.addCleanup(ours.close)
        most_of_pipe = llm_proxy.PIPE_BUF // 241 * 241
        for descriptor, most in self.each((
                (writing, most_of_pipe), (theirs.detach(), most_of_pipe), (file, 24100))):
            written = []
            with Recorder(descriptor, "w") as stream, patch.object(Log, "PAUSE", PATIENCE):
                log = Log(stream, False)
                for _ in range(100):
                    log.record("x" * 240)
                log.close(PATIENCE)
            self.assertEqual(b"".join(written), (b"x" * 240 + b"\n") * 100)
            self.assertEqual({one[-1:] for one in written}, {b"\n"})
            self.assertEqual(max(map(len, written)), most)

    def test_the_id_of_a_call_is_a_uuid_that_begins_with_the_time(self):
        clock = Clock()
        found = [llm_proxy.new_request_id(clock) for _ in range(100)]
        self.assertEqual(len({*found}), 100)
        for name in found:
            one = uuid.UUID(name)
            self.assertEqual((str(one), one.version, one.int >> 80),
                             (name, 7, clock.time_ns() // 10 ** 6))


class LedgerTest(LedgerCase):
    def test_a_file_of_before_a_column_was_added_is_widened_and_keeps_its_rows(self):
        path = new_path(self, "llm_proxy.db")
        schema = Database.SCHEMA
        for added in (", connect_ms INTEGER, redacted TEXT", ", redact TEXT"):
            self.assertIn(added, schema)
            schema = schema.replace(added, "")
        with patch.object(llm_proxy, "COLUMNS", llm_proxy.COLUMNS[:-2]), \
                patch.object(Database, "SCHEMA", schema):
            database = Database(path)
        database.connection.execute("INSERT INTO calls (id) VALUES ('old')")
        database.connection.close()
        Database(path, reading=True).connection.close()
        self.start(DATABASE=path)
        client = self.connect()
        for _ in range(2):
            client.exchange(call())
        old, new, spare = [row["connect_ms"] for row in self.wait_for_rows(3)]
        self.assertEqual((self.row()["id"], old, spare), ("old", None, None))
        self.assertGreaterEqual(new, 0)

    def test_an_old_file_gets_an_index_of_ids_where_there_is_room_for_it(self):
        path = new_path(self, "llm_proxy.db")
        with closing(Database(path)) as database:
            database.connection.executescript("""INSERT INTO calls (id) WITH RECURSIVE numbers(n)
                AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 20000)
                SELECT 'id-' || n FROM numbers; DROP INDEX calls_id; VACUUM""")
        connect = llm_proxy.connect

        def full(*arguments):
            connection = connect(*arguments)
            connection.execute("PRAGMA max_page_count = 1")  # and not fewer than it has
            return connection
        for opened, indexes in (full, 0), (connect, 1):
            with patch.object(llm_proxy, "connect", opened), closing(Database(path)) as database:
                found = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'calls_id'")
            self.assertEqual((len(found), LedgerReader(path).call("id-7")["row"]), (indexes, 7))

    def test_a_call_is_in_the_sums_seconds_after_its_end(self):
        self.start()
        reader, now = LedgerReader(self.path), time.time()
        for number in range(1, 3):
            self.ask()
            wait_for(lambda: [one.calls for one in reader.totals(
                "model", now - 900, now + 900).values()] == [number], "the sum")

    def test_models_that_no_file_could_hold_are_written_all_the_same(self):
        models = ["\ud800", "a\x00b", "\U0001f600", "'; DROP TABLE calls; --"]
        for model in models:
            self.assert_status(200, call(model=model))
        found = [row["model"] for row in self.wait_for_rows(4)]
        self.assertEqual(found, ["\\ud800", *models[1:]])

    def test_the_ledger_knows_who_served_and_what_others_did_for_the_call(self):
        part = {"type": "advisor_message", "model": "other", "input_tokens": 7, "output_tokens": 8}
        self.start()
        for served, written in self.each((
                ("m-2026", "m-2026"), ("m" * 99, "m" * 80), ("a\nb", "asked"), (7, "asked"))):
            self.stub.answer = says({"model": served, "usage": {
                "input_tokens": 20, "output_tokens": 4, "iterations": [part]}})
            self.post("/v1/messages", chat(model="asked", max_tokens=1))
            row = self.wait_for_rows(self.stub.calls)[-1]
            self.assertEqual((row["served"], row["model"]), (written, "asked"))
            used = (27, 12) if written != "asked" else (20, 4)  # nobody knows who the others are
            self.assertEqual((row["input"], row["output"]), used)

    def test_the_ledger_and_limits_know_the_upstream(self):
        self.start_named("one", UPSTREAM_ONE_MODELS="m",
                         LIMITS="upstream:o* 1 requests per day; each 5 requests per day")
        for model in ("m", "m", "x", "x"):
            self.ask(call(model=model))
        found = [(row["upstream"], row["outcome"]) for row in self.wait_for_rows(4)]
        base = "base", "ok"
        self.assertEqual(found, [("one", "ok"), ("one", "limited"), base, base])

    def test_buckets_survive_a_restart_with_the_refill_of_the_time_in_between(self):
        rules = "each 10 requests per 100s; all 100 tokens per day"
        act = says(completion(140, 10))
        clock, later = Clock(), Clock(0.0)  # another boot: the monotonic clock begins again
        later.time_ns = lambda: clock.time_ns() + 5 * 10 ** 9
        self.start(act, clock, LIMITS=rules)
        self.ask(call("k", max_tokens=1))
        self.close_books()
        self.start(act, later, DATABASE=self.path, LIMITS=rules + "; address 5 requests per day")
        found = {key[0]: level for key, level in levels(self.proxy).items()}
        self.assertEqual(found, {"all 100 tokens per day": -50, "each 10 requests per 100s": 9})
        later.now += 5  # the tenth second
        self.assertEqual([*levels(self.proxy).values()], [-50])
        self.assert_left(0, "k")

    def test_what_is_left_of_a_month_survives_a_restart_and_a_clock_that_slept(self):
        clock, later = Clock(), Clock(0.0)  # Tuesday, 14 November 2023, 22:30 UTC
        rules = ("each 100 tokens per calendar month in Europe/Berlin;"
                 "each 100 tokens per calendar day; all 100 tokens per 2h window")
        self.start(says(completion(140, 10)), clock, LIMITS=rules)
        self.ask(call("k", max_tokens=1))
        for hours, lost in self.each(((1, 3), (1.6, 2), (2.1, 1), (16 * 24, 1), (16 * 24 + 1, 0))):
            wall = clock.time_ns() + int(hours * 3600 * 1e9)
            self.close_books()
            later.time_ns = partial(int, wall)
            self.start(clock=later, DATABASE=self.path, LIMITS=rules)
            self.assertEqual([*levels(self.proxy).values()], [-50] * lost)

    def test_a_bucket_keeps_its_share_when_its_rule_is_changed(self):
        act, old = says(completion(60, 0)), "each 100 tokens per day; all 10 requests per 100s"
        for new, expected in self.each("""[
                ["each 1000 tokens per day", [400]], ["each 50 tokens per hour", [20]],
                ["each 1000 input_tokens per day", []], ["address 1000 tokens per day", []],
                ["all 20 requests per 100s; each 100 tokens per day", [18, 40]]]"""):
            clock = self.start_clock(act, LIMITS=old)
            self.ask(call("k", max_tokens=1))
            self.close_books()
            self.start(act, clock, DATABASE=self.path, LIMITS=new)
            self.assertEqual(sorted(levels(self.proxy).values()), expected)

    def test_levels_that_a_wrong_clock_saved_are_said_and_taken_as_of_now(self):
        clock, right = Clock(), Clock()
        clock.time_ns = lambda: right.time_ns() + 86400 * 10 ** 9
        self.start(clock=clock, MAX_TOKENS=10)
        self.ask("k")
        self.close_books()
        self.start(clock=right, MAX_TOKENS=10, DATABASE=self.path)
        self.assert_left(9, "k")
        said = "1 buckets were saved by a clock that was ahead"
        wait_for(lambda: said in self.lines.text(), "the line")

    def test_what_a_call_took_is_saved_with_its_row(self):
        self.start(clock=Clock(), MAX_TOKENS=10)
        for number in range(1, 4):
            self.ask("k")
            self.wait_for_rows(number)
            self.assertEqual(self.stored_levels(), [10 - number])

    def test_a_file_that_is_deleted_or_replaced_is_begun_anew(self):
        self.start(MAX_TOKENS=10)
        for number, act in enumerate(self.each((os.unlink, lambda path: os.replace(other, path)))):
            other = new_path(self, "other.db")
            Database(other).connection.close()
            self.ask("k")
            self.wait_for_rows(1 + number)
            for end in ("-wal", "-shm"):
                with suppress(FileNotFoundError):
                    os.unlink(self.path + end)
            self.proxy.books.ledger.reopen_at = 0
            act(self.path)
            wait_for(lambda: self.lines.text().count("deleted or replaced") == number + 1)
            wait_for(lambda: self.lines.text().count("are kept in " + self.path) == number + 1)
            self.ask("k")
            self.wait_for_rows(1)
            self.assertEqual(wait_for(self.stored_levels), [8 - 2 * number])

    def test_a_lost_lock_is_taken_again_and_what_another_service_has_is_left_to_it(self):
        lock, other = llm_proxy.lock_name(self.path), new_path(self, "other")
        os.unlink(lock)
        wait_for(lambda: os.path.exists(lock))
        self.assert_said("are kept in " + self.path)
        with self.assertRaises(llm_proxy.InUse):
            llm_proxy.lock_for_service(self.path)
        with llm_proxy.lock_for_service(other) as theirs:
            self.proxy.books.ledger.reopen_at = 0
            os.replace(theirs.name, lock)
            said = "in memory only: DATABASE %s is used by another llm_proxy" % self.path
            self.assert_said(said)

    def test_a_key_without_a_name_has_the_same_label_after_a_restart(self):
        labels = []
        for _ in range(2):
            self.start(**({"DATABASE": self.path} if labels else {}))
            self.ask("k")
            labels.append(self.entry()["caller"])
            self.close_books()
        self.assertRegex(labels[0], "^key:[0-9a-f]{8}$")
        self.assertEqual(labels[0], labels[1])
        self.start()
        self.ask("k")
        self.assertNotEqual(self.entry()["caller"], labels[0])

    def test_what_was_made_is_known_after_a_restart_as_far_as_there_is_room(self):
        path = new_path(self, "llm_proxy.db")
        schema = Database.SCHEMA
        with patch.object(Database, "SCHEMA", schema[:schema.rindex(";")]):
            Database(path).connection.close()  # of a version that knew no things
        self.patch_seconds(Stored_ROOM=2)
        keys = {"DATABASE": path, "PROXY_API_KEYS": "a,b"}
        names = iter(range(9))
        self.start(lambda asked: asked.send(answer(b'{"id": "resp_%d"}' % next(names))), **keys)
        for key in "baa":
            self.post("/v1/responses", b"{}", key=key)
        self.close_books()
        self.start(says(), **keys)
        found = [self.get("/v1/responses/resp_%d" % number, key=key).status
                 for key in "ab" for number in range(3)]
        self.assertEqual(found, [404, 200, 200, 404, 404, 404])

    def test_what_was_made_and_forgotten_at_once_is_not_saved(self):
        database = Database(new_path(self, "llm_proxy.db"))
        self.addCleanup(database.close)
        thing = llm_proxy.Thing(("key", b"a"), "base", "http://x")
        database.add_things([("one", thing), ("two", thing), ("one", None)], 9)
        self.assertEqual(list(database.things()), ["two"])

    def test_old_calls_are_removed_in_the_background(self):
        path = new_path(self, "llm_proxy.db")
        database = Database(path)
        rest = (None,) * (len(llm_proxy.COLUMNS) - 2)
        old, new = time.time() - 8 * 86400, time.time() - 6 * 86400
        database.add([("old", old, *rest)] * 2500 + [("new", new, *rest)])
        database.connection.close()
        self.patch_seconds(Ledger_FORGET_SECONDS=0)  # first they are added up
        self.start(DATABASE=path, LEDGER_DAYS=7)
        wait_for(lambda: [row["id"] for row in self.rows(path)] == ["new"], "the removal")

    def test_a_full_queue_drops_and_counts_and_holds_up_nobody(self):
        self.start()
        ledger = self.proxy.books.ledger
        ledger.room = 3
        with self.held_up(ledger, "write_queued") as blocked:
            self.assertTrue(blocked.wait(PATIENCE))
            began = time.monotonic()
            for _ in range(6):
                self.assert_status(200)
            self.assertLess(time.monotonic() - began, PATIENCE / 2)
            wait_for(lambda: ledger.dropped == 3)
            health = self.ask(HEALTH).json()
            self.assertEqual(health["ledger"], {"queued": 3, "dropped": 3})
        self.wait_for_rows(3)

    def test_what_cannot_be_written_is_logged_once_and_tried_again(self):
        database = self.proxy.books.ledger.database
        fault = sqlite3.OperationalError("disk I/O error")
        text = "the database cannot be written: disk I/O error"
        with patch.object(database, "add", side_effect=fault) as add:
            self.ask()
            wait_for(lambda: text in self.lines.text() and add.call_count > 1)
        self.assertEqual(self.row()["status"], 200)
        wait_for(lambda: "the database can be written again" in self.lines.text())
        self.assertEqual(self.lines.text().count("cannot be written"), 1)

    @contextmanager
    def small_disk(self):
        """Makes a folder on a disk of 1 MB, where that is allowed; returns the folder, or None."""
        folder = new_path(self)
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
        with suppress(OSError, subprocess.CalledProcessError):
            subprocess.run(mount, check=True, stderr=subprocess.DEVNULL)
            try:
                yield folder
            finally:
                subprocess.run(["umount", "-l", folder], check=True)
            return
        yield None

    @contextmanager
    def full_disk(self, folder):
        """Meanwhile nothing more can be written to `folder`, or, without one, to the ledger."""
        if folder:
            path = os.path.join(folder, "filler")
            with open(path, "wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
            yield
            os.remove(path)
        else:
            execute = self.proxy.books.ledger.database.connection.execute
            execute("PRAGMA max_page_count = 1").fetchall()
            yield
            execute("PRAGMA max_page_count = 1000000").fetchall()

    def drop_some(self, ledger):
        """Has 2,000 rows more come while nothing is written; returns how many were dropped."""
        entry, = self.ended
        with self.held_up(ledger, "write_queued") as held:
            self.assertTrue(held.wait(PATIENCE))
            for _ in range(2000):
                ledger.record(entry)
            dropped = self.ask(HEALTH).json()["ledger"]["dropped"]
        self.assertGreaterEqual(dropped, 1000)
        return dropped

    def start_full(self, path):
        """One that has answered a call, on a disk with little left; returns a Client."""
        self.start(DATABASE=path, USAGE_LOG=path + ".jsonl", MAX_TOKENS=10 ** 6)
        self.ask("k")
        self.wait_for_rows(1)
        self.proxy.books.ledger.room, self.ended = 1000, deque(maxlen=1)
        self.proxy.books.on_end.append(self.ended.append)
        self.write_aside(path)
        return self.connect()

    def stored_levels(self):
        with closing(sqlite3.connect(self.path)) as connection:
            return [level for level, in connection.execute("SELECT level FROM buckets")]

    def test_a_full_disk_holds_up_no_call_drops_and_counts_rows_and_comes_back_by_itself(self):
        with self.small_disk() as folder:
            path = os.path.join(folder or new_path(self), "llm_proxy.db")
            usage_log, client = pathlib.Path(path + ".jsonl"), self.start_full(path)
            with self.full_disk(folder):
                for _ in range(20):
                    client.answers(200, call("k"))
                self.assert_said("the database cannot be written: database or disk is full")
                dropped = self.drop_some(self.proxy.books.ledger)
            # Who reads the file meanwhile takes the room that is made in it.
            wait_for(lambda: not self.proxy.books.ledger.queue, "the writing of all rows")
            self.assertEqual(len(self.rows(self.path)), 2021 - dropped)
            self.ask(call("k", "X-Request-ID: the-last"))
            wait_for(lambda: b"the-last" in usage_log.read_bytes(), "the last line")
            self.assert_counted(usage_log.read_text("ascii").splitlines(), 22)
            self.close_books()
            self.assertEqual(self.stored_levels(), [10 ** 6 - 22])

    @staticmethod
    def write_aside(path):
        """Fills the half of a small disk with what SQLite writes beside the database."""
        with closing(sqlite3.connect(path)) as connection:
            for number in range(80):
                with connection:
                    connection.execute("INSERT OR REPLACE INTO facts VALUES ('x', ?)", (number,))

    def assert_counted(self, lines, calls):
        """Lines of a USAGE_LOG tell so many calls, or that they were dropped."""
        lost = [int(line.split()[3][1:]) for line in lines if line.endswith('dropped"}')]
        told = sum(line[:6] == '{"id":' for line in lines) + sum(lost)
        self.assertIn(told - calls, (0, 1) if lost else (0,))  # one may have been cut

    def test_the_same_entries_go_to_a_file_of_json_lines(self):
        path = new_path(self, "llm_proxy.db") + ".jsonl"
        self.start(says(completion(20, 4)), USAGE_LOG=path)
        self.ask()
        self.assertEqual(json.loads(wait_for(pathlib.Path(path).read_text)), self.row())
        self.proxy.books.usage_log.stream.close()

    def test_a_file_of_json_lines_that_nobody_reads_holds_up_neither_the_ledger_nor_the_end(self):
        reading, writing = os.pipe()
        self.addCleanup(os.close, reading)
        os.set_blocking(writing, False)
        with open(writing, "wb", buffering=0) as stream:
            full = Log(stream, as_json=True)
            self.start()
            self.proxy.books.usage_log = full
            for _ in range(10):
                full.say("x" * 60000)
            self.ask()
            self.assertEqual(self.row()["status"], 200)
            self.proxy.books.usage_log = None
            full.close(0.2)
            self.assertFalse(full.thread.is_alive())

    def test_a_foreign_or_damaged_file_is_left_as_it_is(self):
        path = pathlib.Path(new_path(self, "llm_proxy.db"))
        Database(str(path)).connection.close()
        sound = path.read_bytes()
        path.unlink()
        with closing(sqlite3.connect(path)) as other:
            other.execute("CREATE TABLE calls (a)")
        damaged = sound[:4096] + b"x" * (len(sound) - 4096)
        for data in self.each((b"hello", path.read_bytes(), sound[:len(sound) // 2], damaged)):
            path.write_bytes(data)
            with self.assertRaisesRegex(llm_proxy.DatabaseFault, "left as it is$"):
                Database(str(path))
            self.assertEqual(path.read_bytes(), data)


class KeysCase(LedgerCase):
    """A proxy with a ledger, whose keys are changed by another connection, as a command does."""
    ACTOR = llm_proxy.Actor("ida", "admin", "command line")

    def store(self, path=None, clock=None):
        database = Database(path or self.path)
        self.addCleanup(database.close)
        return llm_proxy.KeyStore(database.connection, clock or self.proxy.clock, self.ACTOR)

    def change(self, act, *arguments, **fields):
        """Changes keys; returns what came of it when the proxy knows."""
        before = self.proxy.callers
        result = getattr(self.store(), act)(*arguments, **fields)
        wait_for(lambda: self.proxy.callers is not before, "the change")
        return result

    def add(self, name="ann", **fields):
        """Returns the secret of a new key."""
        return self.change("add", name, **fields).secret

    def execute(self, *statements, path=None):
        with closing(sqlite3.connect(path or self.path)) as connection:
            found = [connection.execute(statement).fetchall() for statement in statements]
            connection.commit()
        return found[-1]

    def assert_statuses(self, statuses, *keys):
        self.assertEqual(self.statuses(*keys), statuses)

    def statuses(self, *keys):
        return [self.ask(key).status for key in keys]


class KeyStoreTest(KeysCase):
    def setUp(self):
        self.path, self.clock = new_path(self, "llm_proxy.db"), Clock()
        self.keys = self.store(clock=self.clock)

    def fails(self, said, act, *arguments, **fields):
        with self.assertRaisesRegex(llm_proxy.KeyFault, said):
            getattr(self.keys, act)(*arguments, **fields)

    FIELDS = {"role": "caller", "team": "red", "expires": "30d", "models": "gemma*,gpt-4*",
              "limits": "2 usd per day; 5 running", "upstream": "openai", "tag": "web-app",
              "redact": "email,card",
              "note": "ann's laptop"}

    def test_what_is_said_of_a_key_is_kept_and_can_be_changed_and_taken_away(self):
        made = self.keys.add("ann", **self.FIELDS)
        self.assertRegex(made.secret, "^sk-[A-Za-z0-9_-]{43}$")
        now = self.clock.time_ns() / 1e9
        expected = {"name": "ann", **self.FIELDS, "created": now, "expires": now + 30 * 86400,
                    "disabled": False, "last_used": None}

        def assert_kept(**changes):
            expected.update(changes)
            self.assertEqual(self.keys.find("ann").as_dict(), expected)
        assert_kept()
        self.assertEqual([key.as_dict() for key in self.keys.list()], [expected])
        self.clock.now += 99
        self.keys.set("ann", expires="1h", team="", models=None, limits="7 running")
        assert_kept(expires=now + 3600, team=None, models=None, limits="7 running")
        self.keys.set("ann", **dict.fromkeys(self.FIELDS, ""))
        assert_kept(**{**dict.fromkeys(self.FIELDS), "role": "caller"})

    def test_a_secret_that_is_good_no_more_is_forgotten_after_90_days(self):
        for name, days, left in self.each("""[["ann", 0, 2], ["ben", 89, 4], ["cem", 2, 5]]"""):
            self.clock.now += days * 86400
            self.keys.add(name)
            self.keys.rotate(name)
            self.assertEqual(self.execute("SELECT count(*) FROM secrets"), [(left,)])
        self.keys.remove("ben")
        self.keys.add("ben")
        good = self.execute("SELECT name FROM secrets WHERE valid_until IS NULL ORDER BY name")
        self.assertEqual(good, [("ann",), ("ben",), ("cem",)])

    def test_no_secret_is_stored(self):
        made = self.keys.add("ann")
        again = self.keys.rotate("ann", "1h")
        self.keys.connection.close()
        with open(self.path, "rb") as file:
            data = file.read()
        for secret in (made.secret, again.secret):
            self.assertNotIn(secret.encode(), data)
            self.assertIn(llm_proxy.digest(secret), data)

    FAULTS = r"""
        add -> "ann" -> {} -> stored already
        add -> "a b" -> {} -> name must be
        add -> "" -> {} -> name must be
        add -> "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" -> {} -> name
        add -> null -> {} -> name must be text
        add -> "ben" -> {"role": "root"} -> role must
        add -> "ben" -> {"expires": "soon"} -> expires must be such as
        add -> "ben" -> {"expires": 7} -> expires must be text
        add -> "ben" -> {"limits": "each 1 usd per day"} -> limits must be rules without a scope
        add -> "ben" -> {"models": "a,,b"} -> models must be
        add -> "ben" -> {"note": "a\nb"} -> note must be one line
        add -> "ben" -> {"tag": "web app"} -> tag must be 1 to 64
        add -> "ben" -> {"upstream": "A/B"} -> upstream must be
        add -> "ben" -> {"secret": "x"} -> no field secret
        set -> "ann" -> {"subject": "x"} -> no field subject
        set -> "ben" -> {} -> no key is stored by the name ben
        rotate -> "ben" -> {} -> no key
        rotate -> "ann" -> {"grace": "1x"} -> grace must
        revoke -> "ben" -> {} -> no key
        remove -> "ben" -> {} -> no key"""

    def test_what_is_wrong_is_said_and_changes_nothing(self):
        self.keys.add("ann")
        for act, name, fields, said in self.each(self.FAULTS):
            self.fails(said, act, json.loads(name), **json.loads(fields))
        for amount, unit, time in self.each("""[["0", "usd", null], ["1.5", "tokens", null],
                                             ["1", "running", null], ["1", "usd", "1x"],
                                             ["1", "usd", "10000d"]]"""):
            self.fails("must be", "give", "ann", amount, unit, time)
        self.assertEqual([key.name for key in self.keys.list()], ["ann"])
        self.assertEqual(self.execute("SELECT count(*) FROM audit"), [(1,)])

    def test_every_change_is_in_the_audit(self):
        self.keys.add("ann", team="red")
        for act, *arguments in (("revoke",), ("restore",), ("rotate", "1h"), ("reset",),
                                ("give", "2", "usd", "1h"), ("remove",)):
            getattr(self.keys, act)("ann", *arguments)
        rows = self.execute(
            "SELECT who, role, address, what, target, detail FROM audit ORDER BY id")
        self.assertEqual({row[:3] + row[4:5] for row in rows}, {(*self.ACTOR, "ann")})
        self.assertEqual([(row[3], row[5]) for row in rows], [
            ("add key", "team=red"), ("revoke key", ""), ("restore key", ""),
            ("rotate key", "grace 1h"), ("reset", ""), ("give", "2 usd for 1h"),
            ("remove key", "")])
        (found,), = self.execute("SELECT max(time) FROM audit")
        self.assertLess(abs(found - llm_proxy.wall_time(self.clock)), 60)

    def test_a_hundred_keys_made_at_once_are_all_there(self):
        made = []

        def make(number):
            keys = self.store(clock=self.clock)
            made.extend(keys.add("%d.%d" % (number, one)).secret for one in range(5))
        with threads([partial(make, number) for number in range(20)]):
            pass
        self.assertEqual((len(self.keys.list()), len(set(made))), (100, 100))
        digests = {row[0] for row in self.execute("SELECT digest FROM secrets")}
        self.assertEqual(digests, set(map(llm_proxy.digest, made)))

    def test_the_first_key_of_a_caller_closes_the_door_for_good(self):
        self.assertFalse(self.keys.add("boss", role="admin").closes)
        self.assertFalse(llm_proxy.is_closed(self.keys.connection.execute))
        self.assertTrue(self.keys.add("ann").closes)
        self.assertFalse(self.keys.add("ben").closes)
        for name in ("ann", "ben"):
            self.keys.remove(name)
        self.assertTrue(llm_proxy.is_closed(self.keys.connection.execute))


def columns_of(row):
    """A row of the ledger, with something at each column that is added up."""
    usual = {"outcome": "ok", "caller": "alice", "model": "m", "upstream": "base", "status": 200,
             "input": 10, "cached": 1, "output": 2, "reasoning": 0, "estimated": 0, "unpriced": 0,
             "picodollars": 10 ** 9, "ms": 5, "time": 0.0, "stream": 0}
    row = {**usual, **row}
    return tuple(row.get(name) for name, _ in llm_proxy.COLUMNS)


class SumsTest(TableCase):
    DAY = 1_800_057_600  # a midnight in UTC

    def setUp(self):
        self.path = new_path(self, "llm_proxy.db")
        self.database = Database(self.path)
        self.addCleanup(lambda: self.database.connection.close())
        self.reader = LedgerReader(self.path)
        self.random = Random(5)

    def add(self, *rows):
        """Adds calls, and these to the sums."""
        with self.database.transaction():
            self.database.add(list(map(columns_of, rows)))
        while self.database.add_new():
            pass

    def add_many(self, count, days=3):
        """Adds calls, in order of time."""
        choice, outcomes = self.random.choice, ("ok", "ok", "limited", "refused", "caller_gone")
        moments = sorted([self.DAY + self.random.random() * days * 86400 for _ in range(count)])
        self.add(*({
            "id": "id-%d" % number, "time": moment, "caller": choice("abc"), "ms": number % 1000,
            "team": choice("xy"), "served": choice(("m1", "m2")), "upstream": choice(("u", None)),
            "outcome": choice(outcomes)} for number, moment in enumerate(moments)))

    def counted(self, by, where="1"):
        """What the calls themselves come to: {group: (calls, failed, limited, tokens)}."""
        query = """SELECT %s, count(*), sum(%s), sum(outcome = 'limited'), sum(input + output)
            FROM calls WHERE %s GROUP BY 1""" % (by, llm_proxy.FAILED, where)
        return {name: tuple(counts) for name, *counts in self.database.connection.execute(query)}

    @staticmethod
    def told(groups):
        return {name: (one.calls, one.failed, one.limited, one.tokens())
                for name, one in groups.items()}

    def test_sums_tell_what_the_calls_do_by_whom_and_what_they_are_asked_for(self):
        self.add_many(2000)
        low, high = self.DAY + 7 * 900, self.DAY + 2 * 86400 + 5 * 900
        where = "time >= %d AND time < %d" % (low, high)
        for by, value in self.each(llm_proxy.SUM_KEYS.items()):
            self.assertEqual(self.told(self.reader.totals(by, low, high)),
                             self.counted(value, where))
            self.assertEqual(self.told(self.reader.totals(by, low, high, {"caller": "a"})),
                             self.counted(value, where + " AND caller = 'a'"))
        with self.assertRaises(BadRequest):
            self.reader.totals("1; DROP TABLE calls", low, high)

    def test_usage_has_groups_a_series_and_a_total_that_is_the_sum_of_both(self):
        self.add_many(500)
        self.add({"caller": "rich", "picodollars": 9e12, "time": self.DAY + 259200})
        for named, step in self.each("""[[200, "day"], [2, "hour"], [2, "month"]]"""):
            with patch.object(LedgerReader, "NAMED", named):
                found = self.reader.usage(
                    "caller", step, self.DAY, self.DAY + 345600, {"caller": ""})
            groups, total = found["groups"], found["total"]
            names = [group["name"] for group in groups]
            self.assertEqual((len(names), "other" in names), (4, False) if named > 2 else (3, True))
            self.assertEqual((names[0], groups[0]["usd"]), ("rich", "9"))
            points = [point for one in found["series"] for point in one["groups"].values()]
            for name, parts in itertools.product(("calls", "usd"), (groups, points)):
                self.assertEqual(sum(Decimal(one[name]) for one in parts), Decimal(total[name]))
            self.assertEqual(total["calls"], 501)

    STEPS = """\
        Europe/Berlin day 2026-03-28T23:00 2026-03-30T22:00 23 24
        Europe/Berlin day 2026-10-24T22:00 2026-10-26T23:00 25 24
        Europe/Berlin hour 2026-03-29T00:00 2026-03-29T02:00 1 1
        Europe/Berlin month 2026-02-28T23:00 2026-04-30T22:00 743 720
        Australia/Lord_Howe hour 2026-04-04T13:00 2026-04-04T15:30 1 1 0.5
        America/Sao_Paulo day 2018-11-03T03:00 2018-11-05T02:00 24 23
        Asia/Kathmandu day 2026-01-01T18:15 2026-01-02T18:15 24
        Asia/Kathmandu hour 2026-01-01T18:15 2026-01-01T19:30 1 0.25
        UTC quarter 2026-01-01T00:07 2026-01-01T00:31 0.25 0.25 0.25
        - day 2026-01-01T18:30 2026-01-02T18:30 24"""

    @staticmethod
    def seconds(text):
        return int(datetime.datetime.fromisoformat(text + "+00:00").timestamp())

    def test_days_and_months_are_those_of_the_viewer(self):
        for name, step, start, end, *hours in self.each(map(str.split, self.STEPS.splitlines())):
            zone = llm_proxy.read_time_zone(name, "330")
            if name not in ("-", "UTC") and not isinstance(zone, zoneinfo.ZoneInfo):
                continue  # this machine knows no time zones
            steps = llm_proxy.read_steps(step, self.seconds(start), self.seconds(end), zone)
            found = [(high - low) / 3600 for low, high in steps]
            self.assertEqual(found, list(map(float, hours)))
            self.assertEqual([low for low, _ in steps[1:]], [high for _, high in steps[:-1]])

    def add_in_march(self):
        """Adds 1,500 calls of eleven days in which clocks change twice; returns their begin."""
        begin, choice = self.seconds("2026-03-27T00:00"), self.random.choice
        hours = [self.random.randrange(24 * 11) for _ in range(1500)]
        self.add(*({
            "time": begin + (hour + self.random.random()) * 3600,
            "caller": choice("ab") if hour != 140 else "c", "served": choice("xy"),
            "picodollars": self.random.randrange(10 ** 13), "input": hour}
                   for hour in sorted(hours)))
        return begin

    def test_sums_of_days_and_ranges_are_those_of_their_quarters_in_any_zone(self):
        begin = self.add_in_march()
        for name in self.each((
                "UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Asia/Kathmandu",
                "Australia/Lord_Howe", "Asia/Tokyo")):
            zone = llm_proxy.read_time_zone(name)
            for _ in range(9):
                low, high = sorted(begin + self.random.randrange(11 * 86400) for _ in range(2))
                steps = [*llm_proxy.read_steps("day", low, high + 1, zone),
                         llm_proxy.whole_quarters(low, high)]
                for by, filters in (("caller", {}), ("model", {"caller": "a"})):
                    found = self.reader.add_up(by, steps, filters)
                    with patch.object(llm_proxy, "read_parts", lambda *step: [
                            (llm_proxy.QUARTER, *step, 1)]):
                        self.assertEqual(found, self.reader.add_up(by, steps, filters))

    def test_no_cell_of_a_table_is_computed_and_none_moves_a_cursor(self):
        cells = {"-": "-", "a,b": '"a,b"', "=1+1": "'=1+1", "-1": "'-1", " @x": "' @x",
                 "a;=b": "a;'=b", "\t=a": "'\\t=a", "\n+a": "'\\n+a", "\uff1da": "'\uff1da",
                 "a\x1b[2J": "a\\x1b[2J", "a\u202eb": "a\\u202eb", "\xe9": "\xe9"}
        for cell, text in self.each(cells.items()):
            self.assertEqual(llm_proxy.csv_of(["x"], [[cell]]), "x\n%s\n" % text)
        self.assertEqual(llm_proxy.csv_of(["x", "y"], [[-1, None]]), "x,y\n-1,\n")

    def test_zones_that_are_none_and_ranges_without_end_are_refused(self):
        utc = datetime.timezone.utc
        for name, offset in self.each((
                ("../../etc/passwd", ""), ("/etc/passwd", "x"), ("Europe", "1440"), ("", "1e3"),
                ("x" * 99, "99999"), ("a\0b", "\u0661"))):
            self.assertEqual(llm_proxy.read_time_zone(name, offset), utc)
        for step, start, end in self.each((
                ("week", 0, 900), ("day", 5, 5), ("day", -1, 900), ("hour", 0, 1 << 33),
                ("quarter", 0, 900 * 3001), ("day", 0, inf), ("day", math.nan, 900))):
            with self.assertRaises(BadRequest):
                llm_proxy.read_steps(step, start, end, utc)

    def test_a_caller_has_days_hours_and_a_last_call(self):
        self.add_many(300)
        now = self.DAY + 3 * 86400
        self.reader = self.reader._replace(now=now - 1)
        days = self.reader.days("a", 5)
        found = {one["at"]: one["calls"] for one in days if one["calls"]}
        expected = self.counted("CAST(time AS INTEGER) / 86400 * 86400", "caller = 'a'")
        self.assertEqual((len(days), found), (5, {at: one[0] for at, one in expected.items()}))
        hours = self.reader.hours()
        last = self.counted("caller", "time >= %d" % (now - 86400))
        self.assertEqual({name: sum(row) for name, row in hours.items()},
                         {name: one[3] for name, one in last.items()})
        self.assertEqual(self.told(self.reader.today()), last)
        expected = self.database.connection.execute(
            "SELECT caller, max(time) FROM calls GROUP BY 1").fetchall()
        self.assertEqual(self.reader.seen(), dict(expected))

    FILTERS = """\
        caller=a -> caller = 'a'
        team=x -> team = 'x'
        model=m2 -> served = 'm2'
        upstream=- -> upstream IS NULL
        outcome=refused -> outcome = 'refused'
        outcome=limited -> outcome = 'limited'
        outcome=ok -> outcome = 'ok'
        failed=1 -> outcome = 'refused'
        slow=990 -> ms >= 990
        id=id-77 -> id = 'id-77'
        model=rare -> served = 'rare'
        caller=a model=m1 slow=500 failed=1 -> caller = 'a' AND served = 'm1' AND ms >= 500 AND %s
        caller=nobody -> caller = 'nobody'
        outcome=stopped -> 0
        team= -> 1""" % llm_proxy.FAILED

    def pages(self, filters, limit):
        """All calls that match, page by page, and how many pages there are."""
        found, before, count = [], None, 0
        while before is not None or not count:
            page = self.reader.calls(before, limit, filters)
            found += [call["row"] for call in page["calls"]]
            before, count = page["next"], count + 1
        return found, count

    def filters(self):
        """Returns [({field: value}, the same in SQL)]."""
        rows = [row.split(" -> ") for row in self.FILTERS.splitlines()]
        return [(dict(part.split("=") for part in text.split()), where) for text, where in rows]

    def test_calls_are_found_page_by_page_by_what_they_are(self):
        self.add({"served": "rare", "time": self.DAY + 9})
        self.add_many(300)
        for hour in (99, 1, 50, 27, 0, 72, 26):  # of a clock that is set back and forth
            self.add(*({"time": self.DAY + hour * 3600 + number, "caller": "a", "served": "m2",
                        "ms": 999, "outcome": ("refused", "limited")[number % 2]}
                       for number in range(4)))
        for filters, where in self.each(self.filters()):
            query = "SELECT rowid FROM calls WHERE %s ORDER BY 1 DESC" % where
            rows = [row for row, in self.database.connection.execute(query)]
            for size in (1000, 3):
                self.assertEqual(self.pages(filters, size)[0], rows)
            with patch.object(LedgerReader, "LOOK", 20):
                self.assertEqual(self.pages(filters, 50)[0], rows)
        with self.assertRaises(BadRequest):
            self.reader.calls(None, 5, {"slow": "1 OR 1"})

    def test_calls_are_kept_in_order_whatever_they_have_in_common(self):
        kept = []
        for count in self.each((1, 2, 29, 1000)):
            rows = [columns_of({"id": "one", "agent": "x" * count, "queue_ms": number or None,
                                "team": "ab"[number % 2]}) for number in range(count)]
            with self.database.transaction():
                self.database.add(rows)
            kept += rows
            self.assertEqual(
                self.database.connection.execute("SELECT * FROM calls").fetchall(), kept)

    def test_a_call_is_told_as_the_ledger_has_it_but_for_its_money(self):
        self.add({"id": "one", "estimated": 1, "picodollars": 5 * 10 ** 11, "team": "t"})
        found = self.reader.call("one")
        self.assertEqual((found["row"], found["usd"], found["team"]), (1, "0.5", "t"))
        self.assertEqual((found["estimated"], found["stream"]), (True, False))
        fields = {"row", *llm_proxy.COLUMN_NAMES} - {"picodollars"}
        self.assertEqual(found.keys(), fields)
        self.assertIs(self.reader.call("two"), None)

    def questions(self, now):
        """Returns the statements of all that is asked of the calls."""
        asked, connect = [], llm_proxy.connect

        def traced(*arguments):
            connection = connect(*arguments)
            connection.set_trace_callback(asked.append)
            return connection
        with patch.object(llm_proxy, "connect", traced):
            for filters, _ in self.filters():
                self.reader.calls(None, 50, filters)
            self.reader = self.reader._replace(now=now)
            self.reader.usage("team", "day", self.DAY, now, {"caller": "a"})
            for question in (self.reader.hours, self.reader.today, lambda: self.reader.days("a")):
                question()
            self.assertTrue(self.reader.seen())
            for by in ("caller", "day"):
                options = SimpleNamespace(since="36h", by=[by], id=None, caller=None)
                read_usage(self.path, options, now)
        return [text for text in asked
                if text not in Database.PROBES and not text.startswith("PRAGMA")]

    def test_no_question_scans_the_calls(self):
        """SQLite tells how it would go about each statement."""
        self.add_many(2_000)
        self.database.note(summed=1_900)
        questions = self.questions(self.DAY + 3 * 86400)
        self.assertGreater(len(questions), 30)
        for text in self.each(questions):
            plan = self.database.connection.execute("EXPLAIN QUERY PLAN " + text).fetchall()
            self.assertEqual([step for *_, step in plan if re.match("SCAN (TABLE )?calls", step)],
                             [])

    def reopen(self):
        self.database.connection.close()
        self.database = Database(self.path)

    def make_old(self):
        """Has the database be one of a version that had no sums."""
        for statement in ("DROP TABLE sums", "DELETE FROM facts"):
            self.database.connection.execute(statement)
        self.reopen()

    def add_some(self, fault):
        """Adds up some calls more, which meets this fault, or none, when it is noted."""
        note = patch.object(self.database, "note", wraps=self.database.note, side_effect=fault)
        with suppress(KeyError), patch.object(Database, "BATCH", 220), note:
            self.database.add_new()

    def test_calls_of_an_older_version_are_added_up_once_whatever_happens(self):
        self.add_many(500, 1)
        whole = self.reader.totals("caller", self.DAY, self.DAY + 86400)
        self.make_old()
        with self.database.transaction():
            self.database.add([columns_of({"caller": "new", "time": self.DAY + 90000})])
        usages, options = [], SimpleNamespace(since="9999d", by=None, id=None, caller=None)
        for step in range(60):
            self.add_some(KeyError if step % 2 else None)
            usages.append(read_usage(self.path, options, self.DAY + 2 * 86400))
        self.assertEqual(usages, usages[:1] * 60)
        found = self.reader.totals("caller", self.DAY, self.DAY + 2 * 86400)
        self.assertEqual((found.pop("new").calls, found), (1, whole))
        self.assertEqual(self.reader.call("id-3")["row"], 4)

    def test_sums_of_an_older_version_that_were_not_finished_are_made_anew(self):
        self.add_many(200)
        whole = self.reader.totals("caller", self.DAY, self.DAY + 3 * 86400)
        for fact, lost in self.each((("rolled", "span > 900"), ("unsummed", "start % 1800 = 0"))):
            self.database.execute("DELETE FROM sums WHERE " + lost)
            self.database.note(**{fact: 7})
            self.reopen()
            self.add()
            self.assertEqual(self.reader.totals("caller", self.DAY, self.DAY + 3 * 86400), whole)

    def test_usage_is_told_of_an_older_file_that_no_proxy_has_opened_yet(self):
        self.add_many(50)
        options = SimpleNamespace(since="9999d", by=None, id=None, caller=None)
        usage = read_usage(self.path, options, self.DAY + 2 * 86400)
        for table in "sums", "facts":
            self.database.execute("DROP TABLE " + table)
        self.assertEqual(read_usage(self.path, options, self.DAY + 2 * 86400), usage)

    def quarter(self, by):
        """The sums of the first one of DAY."""
        return self.reader.totals(by, self.DAY, self.DAY + 900)

    def test_names_that_nobody_answered_for_make_no_sums_without_end(self):
        nothing = dict.fromkeys(("input", "cached", "output", "picodollars"), 0)
        with patch.object(llm_proxy.SumNames, "NAMES", 5):
            for number in range(20):
                self.add({"served": "junk%d" % number, "outcome": "refused", "time": self.DAY,
                          "caller": "10.0.0.%d" % number, **nothing})
            self.add({"served": "good", "time": self.DAY})
        for by, plain in self.each("""[["model", "good"], ["caller", "alice"]]"""):
            found = self.quarter(by)
            self.assertEqual((len(found), found["other"].calls, found[plain].calls), (7, 15, 1))
        self.assertEqual(len(self.pages({"model": "junk19"}, 5)[0]), 1)
        with patch.object(llm_proxy.SumNames, "MOST_NAMES", 8):
            self.add(*({"served": "s%d" % number, "time": self.DAY} for number in range(9)))
        found = self.quarter("model")
        self.assertEqual((len(found), found["other"].calls), (9, 22))

    def test_what_was_not_added_up_before_the_end_is_after_the_next_start(self):
        for number in range(3):
            with self.database.transaction():
                self.database.add([columns_of({"time": self.DAY})] * 7)
            self.reopen()
            with self.database.transaction():  # some calls that nobody kept in mind
                self.database.add([columns_of({"time": self.DAY})] * 4)
            with patch.object(Database, "BATCH", 3):
                self.add({"time": self.DAY})
            found = self.reader.totals("caller", self.DAY, self.DAY + 900)
            self.assertEqual(found["alice"].calls, 12 * (number + 1))

    def test_a_clock_that_was_set_back_leaves_no_sum_behind(self):
        self.add_many(50)
        for moment in self.each((self.DAY + 5000, self.DAY + 86400, 0)):
            self.add({"time": moment})
            found = self.reader.totals("upstream", 0, self.DAY + 9 * 86400)
            self.assertEqual(self.told(found), self.counted("coalesce(upstream, '-')"))

    def test_an_old_call_is_not_removed_before_it_is_in_the_sums(self):
        with self.database.transaction():
            self.database.add([columns_of({"time": self.DAY})] * 7)
        for left in self.each((7, 1)):
            self.database.forget(self.DAY + 9, self.DAY)
            (count,), = self.database.execute("SELECT count(*) FROM calls")
            self.assertEqual(count, left)
            self.add()

    def test_old_sums_are_removed_after_old_calls(self):
        now = self.DAY + 500 * 86400
        self.add(*({"time": self.DAY + day * 86400, "id": str(day)} for day in range(500)))
        while self.database.forget(now - 90 * 86400, now - 400 * 86400 + 7200):  # whole days
            pass
        execute = self.database.connection.execute
        for query, count in self.each("""[
                ["calls", 90], ["sums WHERE span = 86400", 400],
                ["sums WHERE span = 3600", 400], ["sums WHERE span = 900", 400]]"""):
            self.assertEqual(execute("SELECT count(*) FROM " + query).fetchone(), (count,))


@tested_once
class BalanceTest(LedgerCase):
    """The books balance: each bucket lacks exactly what the ledger says was charged to it."""
    RULES = ("each 1000000 requests per day; each 1000000000 tokens per day;"
             "all 1000 running; key:k1 900000 output_tokens per hour; all 5000 usd per month;"
             "address 1000000000 input_tokens per week; model:gpt-4o* 500000 requests per hour")
    MONEY = "all 5000 usd per month"
    GEMINI = "/v1beta/models/gemini-2.5-pro:"
    CHAT_API = (
        [delta("word " * 20), LAST_DELTA, USAGE_EVENT, "[DONE]"],
        """"usage": {"prompt_tokens": %d, "prompt_tokens_details": {"cached_tokens": 1},
                     "completion_tokens": 7}""")
    GEMINI_API = (
        GEMINI_EVENTS, '"usageMetadata": {"promptTokenCount": %d, "candidatesTokenCount": 4}')
    API = {  # path: (events of a stream, what a whole answer reports)
        CHAT: CHAT_API,
        "/v1/completions": CHAT_API,
        "/v1/embeddings": CHAT_API,
        "/v1/responses": (RESPONSE_EVENTS, '"usage": {"input_tokens": %d, "output_tokens": 9}'),
        "/v1/messages": (ANTHROPIC_EVENTS, '"usage": {"input_tokens": %d, "output_tokens": 3}'),
        GEMINI + "generateContent": GEMINI_API,
        GEMINI + "streamGenerateContent": GEMINI_API,
    }
    KINDS = ("ok",) * 6 + (
        "no usage", "too little", "fault", "error", "cut", "reset", "garbage", "gone", "gone early")
    MODELS = "gpt-4o", "gpt-4o-mini", "claude-sonnet-4", "gemma4"
    CALLERS, CALLS = 50, 7  # in the long form 40

    def payload(self, asked, body):
        """A whole answer."""
        parts, report = self.API[asked.target.partition("?")[0]]
        if body["kind"] == "no usage":
            parts = [part for part in parts if "usage" not in json.dumps(part)]
            report = '"usage": null, "number": %d'
        if body["stream"] or "stream" in asked.target:
            return STREAM + b"".join(chunk(events(part)) for part in parts) + LAST
        number = body["number"]
        whole = '{"choices": [{"message": {"content": "%s"}}], ' + report + "}"
        text = "y" * (4000 if body["kind"] == "too little" else number)
        return answer((whole % (text, number)).encode())

    def answer(self, asked):
        """Answer as the request says; where it is cut, after `number` bytes of the body."""
        body = asked.json()
        kind, number = body["kind"], body["number"]
        data = self.payload(asked, body)
        end = data.index(b"\r\n\r\n") + 4 + number
        asked.send({
            "ok": data,
            "no usage": data,
            "too little": data,
            "fault": answer(b'{"error": {"code": 400}}'),
            "error": answer(b'{"usage": {"prompt_tokens": 5}}', "%d No" % (400 + number % 200)),
            "garbage": b"HTTP/9 what\r\n\r\n",
            "gone early": b"",
        }.get(kind, data[:min(end, len(data) - 1)]))
        acts = {"cut": asked.close, "garbage": asked.close, "reset": asked.reset,
                "gone": asked.wait_for_hang_up, "gone early": asked.wait_for_hang_up}
        acts.get(kind, bool)()

    def random_call(self, choose):
        """Returns (path, payload)."""
        payload = {
            "model": choose.choice(self.MODELS),
            "kind": choose.choice(self.KINDS),
            "number": choose.randrange(1, 400),
            "stream": choose.random() < 0.6,
            "n": choose.choice((1, 1, 2, 4)),
            **({"max_tokens": choose.randrange(50)} if choose.random() < 0.6 else {}),
            "input": "words " * choose.randrange(20),
        }
        path = choose.choice([*self.API])
        return path + "?alt=sse" * ("stream" in path), payload

    def converse(self, seed):
        choose = Random(seed)
        client = self.connect()
        for _ in range(self.CALLS):
            path, payload = self.random_call(choose)
            kind, body = payload["kind"], encoded(payload)
            client.send(request("POST", path, body, key="sk-%d" % choose.randrange(5)))
            if kind == "gone" and (payload["stream"] or "stream" in path):
                client.head()
            ended = kind.startswith("gone")
            if not ended:
                answered = client.read()
                ended = not answered.whole or answered.get("connection") == "close"
            if ended:
                choose.choice((client.reset, client.close))()
                client = self.connect()
        client.close()

    @staticmethod
    def charged(rows):
        """What the ledger says was charged: a Counter of (rule, whose)."""
        fields = {"each": "caller", "key:k1": "caller", "address": "address"}
        charged = Counter()
        for row in rows:
            for charge in filter(None, (row["charges"] or "").split(";")):
                rule, amount = charge.rsplit("=", 1)
                charged[rule, row.get(fields.get(rule.split(" ")[0]))] += int(amount)
        return charged

    def missing(self):
        """What each bucket lacks: [(rule, amount)]."""
        capacities = {rule.text: rule.capacity for rule in self.proxy.limits.rules}
        return [(key[0], capacities[key[0]] - level) for key, level in levels(self.proxy).items()]

    def start_balanced(self, **settings):
        keys = ",".join("k%d=sk-%d" % (number, number) for number in range(5))
        self.start(self.answer, LIMITS=self.RULES, PROXY_API_KEYS=keys, LOG_FORMAT="text",
                   UNPRICED="0.5", **settings)

    def converse_all(self):
        with threads(partial(self.converse, seed) for seed in range(self.CALLERS)):
            pass

    def test_every_bucket_lacks_exactly_what_the_ledger_says(self):
        self.start_balanced()
        self.proxy.limits.buckets.clock = Clock()  # nothing is refilled meanwhile
        self.converse_all()
        wait_for(lambda: not self.server.open, "the end of every call")
        missing = sorted(self.missing())
        running = self.proxy.limits.buckets.levels["all 1000 running",]
        self.assertEqual(running[0], 1000)
        self.close_books()
        self.assert_balance(self.rows(self.path), missing)

    def assert_outcomes(self, rows):
        """What each ending was charged for."""
        outcomes = defaultdict(set)
        for row in rows:
            outcomes[row["outcome"]].add((row["charges"], row["input"]))
            if row["outcome"] == "upstream_status":
                at_fault = row["status"] in (200, *llm_proxy.CALLERS_FAULTS)
                self.assertEqual(" requests " in row["charges"], at_fault)
                self.assertNotRegex(row["charges"], "tokens|usd")
        self.assertEqual(outcomes.keys(), {
            "ok", "upstream_status", "upstream_failed", "upstream_cut", "caller_gone"})
        self.assertEqual(outcomes["upstream_failed"], {("", 0)})

    def assert_balance(self, rows, missing):
        unread = self.CALLERS * self.CALLS - len(rows)  # a caller's reset may erase its call
        self.assertIn(unread, range(self.CALLERS // 5))
        self.assert_outcomes(rows)
        charged = self.charged(rows)
        found = [(rule, amount) for (rule, _), amount in charged.items() if amount]
        self.assertEqual((sorted(found), len(found)), (missing, 5 + 5 + 1 + 1 + 1 + 1))
        tokens = sum(amount for (rule, _), amount in charged.items() if " tokens " in rule)
        self.assertEqual(sum(row["input"] + row["output"] for row in rows), tokens)
        picodollars = sum(row["picodollars"] for row in rows)
        self.assertEqual(picodollars, charged[self.MONEY, None])


# --------------------------------------------------------------------------------------------------
# Signals: metrics, traces, warnings
# --------------------------------------------------------------------------------------------------

METRIC_LINE = re.compile(
    r'# (?:HELP|TYPE) \w+ .+|(\w+(?:\{\w+="(?:[^"\\\n]|\\[\\n"])*"'
    r'(?:,\w+="(?:[^"\\\n]|\\[\\n"])*")*\})?) ([0-9.e+-]+)')


class SignalsCase(LedgerCase):
    KEYS = {"PROXY_API_KEYS": "alice=sk-1,bob=sk-2", "METRICS": "open"}

    def start(self, *arguments, **settings):
        self.patch_seconds(Poster_PAUSE=0.002, Poster_DELAYS=(0, 0, 0))
        super().start(*arguments, **settings)

    def scrape(self, *fields, **options):
        """What /metrics says: {name and labels: value}; fails where a line is none."""
        answered = self.ask(request("GET", "/metrics", b"", *fields, **options))
        self.assertEqual(answered.status, 200, answered.body)
        found = {}
        for line in answered.body.decode().splitlines():
            match = METRIC_LINE.fullmatch(line)
            self.assertTrue(match, line)
            if match[1]:
                self.assertNotIn(match[1], found)
                found[match[1]] = float(match[2])
        return found

    def sums(self, name, *words):
        """What the samples of this name with these words in their labels add up to."""
        return sum(value for key, value in self.scrape().items()
                   if key.startswith("llm_proxy_" + name + "{") and all(
                       word in key for word in words))


class MetricsTest(SignalsCase):
    STREAMED = events(delta("hello"), LAST_DELTA, USAGE_EVENT, "[DONE]")

    @staticmethod
    def answer_by_model(asked):
        bad = asked.json()["model"].startswith("bad")
        asked.answer(b"{}", "404 Not Found" if bad else "200 OK")

    def start_counted(self):
        """A proxy that has answered calls of two callers, limited one and refused another; returns
        their rows."""
        self.start(lambda asked: asked.answer(completion(1000, 20)), **self.KEYS,
                   LIMITS="each 3000 tokens per day; all 3 usd per day")
        for model, key in self.each("""
                gpt-4o-mini -> sk-1
                gpt-4o -> sk-1
                gpt-4o -> sk-2
                gpt-4o-mini -> sk-1
                gpt-4o-mini -> sk-1
                m -> wrong"""):
            self.ask(call(key, model=model, max_tokens=20))
        return self.wait_for_rows(6)

    def test_counters_are_the_sums_of_the_ledger(self):
        rows = self.start_counted()
        for kind, caller in self.each(
                ("input", "cached", "output", "reasoning"), ("alice", "bob")):
            found = self.sums("tokens_total", 'kind="%s"' % kind, 'caller="%s"' % caller)
            self.assertEqual(found, sum(row[kind] for row in rows if row["caller"] == caller))
        usd = sum(row["picodollars"] for row in rows) / 1e12
        self.assertGreater(usd, 0)
        self.assertAlmostEqual(self.sums("usd_total"), usd, 12)

    def test_calls_are_counted_by_how_they_ended(self):
        outcomes = Counter(row["outcome"] for row in self.start_counted())
        self.assertEqual(self.sums("requests_total"), 6)
        for outcome in self.each(("ok", "limited", "refused")):
            found = self.sums("requests_total", 'outcome="%s"' % outcome)
            self.assertEqual(found, outcomes[outcome])
        found = self.sums("refused_total", 'rule="each 3000 tokens per day"')
        self.assertEqual(found, outcomes["limited"])

    def test_doubts_are_counted_beside_money(self):
        self.start(says(), **self.KEYS)
        self.ask(call("sk-1", model="gpt-4o"))
        self.stub.answer = says(completion(10, 2))
        self.ask(call("sk-1", model="nobody-knows"))
        for name, models in self.each("""[
                ["unpriced", "nobody-knows"], ["estimated", "gpt-4o"]]"""):
            self.assertEqual(self.sums(name + "_total"), 1)
            self.assertEqual(self.sums(name + "_total", 'model="%s"' % models), 1)

    def test_models_and_callers_that_anyone_may_invent_make_one_series(self):
        self.start(self.answer_by_model, METRICS="open", DATABASE="off")
        client = self.connect()
        client.exchange(call(model="bad-good"))
        for number in range(300):
            client.exchange(call(model="bad-%d" % number))
        self.assertEqual(self.sums("requests_total", 'model="other"'), 301)
        self.proxy.watchers.metrics.MAX_NAMES = 5
        for number in range(10):
            client.exchange(call("key-%d" % number, model="good-%d" % number))
        found = {key: value for key, value in self.scrape().items() if "requests_total" in key}
        self.assertEqual(sum(found.values()), 311)
        for label, most in self.each("""[["caller", 6], ["model", 6]]"""):
            names = {re.search('%s="([^"]*)"' % label, key)[1] for key in found}
            self.assertEqual((len(names), "other" in names), (most, True), names)

    def test_a_failure_of_a_known_model_counts_as_its_own(self):
        self.start(**self.KEYS)
        for status in ("500 No", "200 OK", "500 No"):
            self.stub.answer = says(b"{}", status)
            self.ask(call("sk-1", model="m"))
        for model in self.each(("m", "other")):
            self.assertEqual(self.sums("requests_total", 'model="%s"' % model,
                                       'outcome="upstream_status"'), 1)

    def test_series_without_end_are_one(self):
        self.start(**self.KEYS)
        self.proxy.watchers.metrics.MAX_SERIES = 2
        for model in "abcd":
            self.ask(call("sk-1", model=model))
        self.assertEqual(self.sums("requests_total", 'caller="other",model="other"'), 2)
        self.assertEqual(self.sums("requests_total"), 4)

    def test_what_workers_have_counted_is_added_up_for_who_asks_and_not_every_second(self):
        self.patch_seconds(Server_BEAT_SECONDS=0.01)
        self.start(METRICS="open")
        tally = self.proxy.tally = llm_proxy.Tally(2)
        with patch.object(tally, "families") as families:
            self.ask()
            wait_for(lambda: tally.read(0).get("llm_proxy_requests_total"))
        families.assert_not_called()
        self.assertEqual(self.sums("requests_total"), 1)

    def test_keys_of_one_name_have_one_sample(self):
        self.start(METRICS="open", PROXY_API_KEYS="alice=sk-1,alice=sk-2", DATABASE="off",
                   LIMITS="each 9 requests per day")
        for key in ("sk-1", "sk-2"):
            self.ask(key)
        self.assertEqual(self.sums("requests_total", 'caller="alice"'), 2)
        self.assertEqual(self.sums("bucket_level"), 8)

    def test_labels_hold_whatever_a_caller_sends(self):
        models = ('a"b', "a\\b", "a\nb", "\x1b[31m\r\u20ac\ud800", "{,}=", "x" * 200)
        self.start(METRICS="open")
        for model in models:
            self.ask(call(model=model))
        self.ask(call(model="\\x1b[31m\\x0d\u20ac\\ud800"))  # looks the same
        found = [key for key in self.scrape() if "requests_total" in key]
        self.assertEqual(len(found), len(models))
        for shown in self.each((r'a\"b', r"a\\b", r"a\nb", r"\\x1b[31m\\x0d", "x" * 80 + '"')):
            self.assertTrue(any('model="%s' % shown in key for key in found), found)

    def test_metrics_are_for_viewers_unless_they_are_open(self):
        keys = {"ADMIN_KEY": "adm", "VIEWER_KEY": "view", "PROXY_API_KEYS": "sk-1"}
        self.start(**keys)
        for key, status in self.each("""[["adm", 200], ["view", 200], ["sk-1", 403], [null, 401],
                                      ["vie", 401]]"""):
            self.assert_status(status, request("GET", "/metrics", key=key))
        self.start(**keys, METRICS="open")
        self.assert_status(200, request("GET", "/metrics"),
                           "content-type: text/plain; version=0.0.4; charset=utf-8")
        self.assert_calls(0)

    def test_a_histogram_counts_what_is_at_most_its_bound(self):
        histogram = llm_proxy.Histogram("0.1 0.5 1")
        histogram.times.extend([.5, .05, .1, .7, 3])
        rows = {end.partition("le=")[2].strip('"}') or end: value
                for end, value in histogram.samples("{a=}")}
        self.assertEqual({name: float(value) for name, value in rows.items()}, {
            "0.1": 2, "0.5": 3, "1": 4, "+Inf": 5, "_sum{a=}": 4.35, "_count{a=}": 5})
        histogram.times.extend([.2] * 3)
        self.assertIn(('_bucket{a=,le="0.5"}', 6), histogram.samples("{a=}"))

    def test_times_are_those_of_the_call_without_what_it_waited_for(self):
        clock = self.start_clock(None, METRICS="open", MAX_CONCURRENCY=1)
        client, asked = self.begin(event(1))
        waiting = self.send(call("second"))
        wait_for(lambda: self.base()["queue"]["waiting"], "the line")
        clock.now += 20
        asked.chunks(self.STREAMED, end=True)
        client.expect_end()
        asked = self.stub.next()
        self.awaiting("the response of")
        clock.now += 3
        self.complete(waiting, asked)
        self.wait_for_rows(2)
        found = self.scrape()
        for name, sums in self.each("""[
                ["request_duration", 43], ["first_byte", 23], ["queue_wait", 20],
                ["overhead", 0]]"""):
            name = "llm_proxy_%s_seconds_" % name + '%s{upstream="base"}'
            self.assertAlmostEqual(found[name % "sum"], sums, 1)
            self.assertEqual(found[name % "count"], 2)
        self.assertGreater(found['llm_proxy_time_per_output_token_seconds_sum{upstream="base"}'], 1)

    NOW = {
        'llm_proxy_in_flight{upstream="base"}': 1,
        'llm_proxy_queue_length{upstream="base"}': 1,
        'llm_proxy_upstream_state{upstream="base",state="closed"}': 1,
        'llm_proxy_upstream_state{upstream="base",state="open"}': 0,
        'llm_proxy_dropped_total{what="ledger"}': 0,
        'llm_proxy_bucket_level{rule="each 100 requests per day",caller="alice"}': 99,
        'llm_proxy_bucket_capacity{rule="each 100 requests per day",caller="alice"}': 100,
        "llm_proxy_loop_held_seconds_total": 0}

    def test_what_is_now_is_told_when_it_is_asked_for(self):
        self.start(None, **self.KEYS, MAX_CONCURRENCY=1, LIMITS="each 100 requests per day")
        client, asked = self.ask_stub(call("sk-1"))
        second = self.send(call("sk-2"))
        wait_for(lambda: self.base("sk-1")["queue"]["waiting"], "the line")
        found = self.scrape()
        self.complete(client, asked)
        self.complete(second)
        self.wait_for_rows(2)
        found.update({key: value for key, value in self.scrape().items() if "bucket" in key})
        version = 'llm_proxy_build_info{version="%s",python="' % VERSION
        self.assertEqual([value for key, value in found.items() if key.startswith(version)], [1])
        for key, value in self.each(self.NOW.items()):
            self.assertEqual(found[key], value, key)
        self.assertGreater(found["process_resident_memory_bytes"], 1 << 20)
        self.assertGreater(found["process_open_fds"], 5)


class TracesTest(SignalsCase):
    PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

    def start_traced(self, answer=says(), taken=says(b"{}"), **settings):
        """A proxy with a collector, a Stub of its own."""
        self.collector = self.stub_of("collector", taken)
        self.start(answer, **self.KEYS, **{
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.collector.url + "/otlp/", **settings})

    def spans(self, count=1):
        """The spans that have come, and their attributes: [(span, {name: value})]."""
        def found():
            return [span for asked in self.collector.requests
                    for resource in asked.json()["resourceSpans"]
                    for scope in resource["scopeSpans"] for span in scope["spans"]]
        wait_for(lambda: len(found()) >= count, "%d spans" % count)
        return [(span, {one["key"]: next(iter(one["value"].values()))
                        for one in span["attributes"]}) for span in found()]

    TOLD = {
        "http.route": CHAT, "http.response.status_code": "200", "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai", "gen_ai.request.model": "gpt-4o-mini",
        "gen_ai.usage.input_tokens": "1000", "gen_ai.usage.output_tokens": "20",
        "gen_ai.usage.reasoning.output_tokens": "5",
        "gen_ai.usage.cache_read.input_tokens": "600", "llm_proxy.caller": "alice",
        "llm_proxy.usd": 0.000117}

    def test_a_span_tells_of_a_call_under_the_names_of_the_conventions(self):
        self.start_traced(says(BooksTest.USAGE))
        self.ask(call("sk-1", model="gpt-4o-mini"))
        (span, told), = self.spans()
        self.assertEqual(
            (span["name"], span["kind"], "status" in span), ("chat gpt-4o-mini", 3, False))
        took = int(span["endTimeUnixNano"]) - int(span["startTimeUnixNano"])
        self.assertTrue(0 < took < PATIENCE * 10 ** 9)
        self.assertRegex(span["traceId"] + span["spanId"], "^[0-9a-f]{48}$")
        self.assertNotIn("parentSpanId", span)
        for name, value in self.each(self.TOLD.items()):
            self.assertEqual(told[name], value, name)
        self.assertNotIn("error.type", told)

    def test_spans_go_where_the_settings_say_with_their_fields_and_name(self):
        self.start_traced(OTEL_SERVICE_NAME="gate",
                          OTEL_EXPORTER_OTLP_HEADERS="x-key=a%20b, x-other=2")
        self.ask("sk-1")
        self.spans()
        asked, = self.collector.requests
        self.assertEqual((asked.method, asked.target), ("POST", "/otlp/v1/traces"))
        self.assert_fields(asked, "content-type: application/json", "x-key: a b", "x-other: 2")
        self.assertIn({"key": "service.name", "value": {"stringValue": "gate"}},
                      asked.json()["resourceSpans"][0]["resource"]["attributes"])

    REASONS = json.loads(r"""[
        ["/v1/chat/completions", [{"choices": [{"finish_reason": "stop", "message": {
            "content": "\"finish_reason\": \"no\""}}, {"finish_reason": "stop"}]}],
            ["stop", "stop"]],
        ["/v1/chat/completions", ["LAST_DELTA", "LAST_DELTA", "[DONE]"], ["stop"]],
        ["/v1/completions", [{"choices": [{"text": "a", "finish_reason": "length"}]}], ["length"]],
        ["/v1/responses", [{"status": "completed", "output": [{"status": "completed"}]}],
            ["completed"]],
        ["/v1/responses", [{"type": "response.created", "response": {"status": "in_progress"}},
            {"type": "response.incomplete", "response": {"status": "incomplete",
            "incomplete_details": {"reason": "max_output_tokens"}}}], ["max_output_tokens"]],
        ["/v1/messages", [{"stop_reason": "tool_use"}], ["tool_use"]],
        ["/v1/messages", ["ANTHROPIC_EVENTS"], ["end_turn"]],
        ["/v1beta/models/m:generateContent", [{"candidates": [{"finishReason": "STOP"}]}],
            ["STOP"]],
        ["/v1beta/models/m:streamGenerateContent?alt=sse", ["GEMINI_EVENTS"], ["STOP"]],
        ["/v1beta/interactions", [{"status": "completed"}], ["completed"]],
        ["/v1beta/interactions", ["INTERACTION_EVENTS"], ["completed"]],
        ["/api/chat", [{"done": true, "done_reason": "stop"}], ["stop"]],
        ["/v1/chat/completions", [{"choices": [{"finish_reason": null}]}], []]]""")
    NAMED = {"LAST_DELTA": [LAST_DELTA], "ANTHROPIC_EVENTS": ANTHROPIC_EVENTS,
             "GEMINI_EVENTS": GEMINI_EVENTS, "INTERACTION_EVENTS": INTERACTION_EVENTS}

    def test_a_span_says_why_the_model_stopped(self):
        self.start_traced()
        for number, (path, told, reasons) in enumerate(self.each(self.REASONS), 1):
            told = [part for one in told for part in self.NAMED.get(str(one), [one])]
            streamed = len(told) > 1
            kind = "text/event-stream" if streamed else "application/json"
            self.stub.answer = says(events(*told) if streamed else encoded(told[0]),
                                    "200 OK", "Content-Type: " + kind)
            self.post(path, chat(), key="sk-1")
            found = self.spans(number)[-1][1].get("gen_ai.response.finish_reasons", {"values": []})
            self.assertEqual([one["stringValue"] for one in found["values"]], reasons)

    def test_a_guess_is_told_as_one_and_what_has_no_price_has_none(self):
        self.start_traced()
        self.ask("sk-1")
        (_, told), = self.spans()
        self.assertEqual(
            (told["llm_proxy.estimated"], "llm_proxy.usd" in told), (True, False))

    def test_what_went_wrong_is_told(self):
        self.start_traced(says(b"{}", "404 Not Found"), LIMITS="each 1 requests per day")
        for key in ("sk-1", "sk-1", "wrong"):
            self.ask(key)
        found = {told["llm_proxy.outcome"]: (span, told) for span, told in self.spans(3)}
        for outcome, error in self.each("""[["upstream_status", "404"], ["limited", "limited"],
                                         ["refused", "refused"]]"""):
            span, told = found[outcome]
            self.assertEqual((told["error.type"], span["status"]), (error, {"code": 2}))
        self.assertEqual(found["limited"][1]["llm_proxy.rule"], "each 1 requests per day")
        self.assertNotIn("gen_ai.usage.input_tokens", found["limited"][1])

    def test_the_callers_trace_is_joined_and_passed_on(self):
        self.start_traced()
        client = self.connect()
        for number in range(2):
            client.exchange(call("sk-1", "Traceparent: " + self.PARENT, "Tracestate: a=b"))
            span, _ = self.spans(number + 1)[number]
            asked = self.stub.requests[number]
            self.assertEqual((span["traceId"], span["parentSpanId"]),
                             (self.PARENT[3:35], self.PARENT[36:52]))
            self.assert_fields(asked, "tracestate: a=b", "traceparent: 00-%s-%s-01" % (
                span["traceId"], span["spanId"]))

    ODD = ("00-0-0-01", "", "ff" + PARENT[2:], PARENT.upper(), PARENT + "-more",
           "00-" + "0" * 32 + PARENT[35:], PARENT[:36] + "0" * 16 + "-01")

    def test_what_is_no_trace_begins_a_new_one(self):
        self.start_traced()
        for number, odd in enumerate(self.each(self.ODD)):
            self.ask(call("sk-1", "Traceparent: " + odd, "Tracestate: a=b"))
            span, _ = self.spans(number + 1)[number]
            self.assertNotIn("parentSpanId", span)
            self.assert_fields(self.stub.last, "tracestate:", "traceparent: 00-%s-%s-01" % (
                span["traceId"], span["spanId"]))

    def test_a_later_version_of_the_field_is_read_as_far_as_it_is_known(self):
        self.start_traced()
        self.ask(call("sk-1", "Traceparent: 01%s-more" % self.PARENT[2:]))
        self.assertEqual(self.spans()[0][0]["traceId"], self.PARENT[3:35])

    def test_without_traces_the_field_passes_as_it_came(self):
        self.start(**self.KEYS)
        self.ask(call("sk-1", "Traceparent: " + self.PARENT))
        self.assert_fields(self.stub.requests[0], "traceparent: " + self.PARENT)

    def test_the_names_of_stored_things_make_no_routes(self):
        self.start_traced(STORED="pass")
        self.get("/v1/files/file-123/content", key="sk-1")
        span, told = self.spans()[0]
        self.assertEqual((told["http.route"], span["name"]), ("/v1/files/{id}/content", "GET"))

    def test_a_collector_that_is_busy_is_asked_again_and_one_that_refuses_is_not(self):
        answers = [b"503 Busy", b"200 OK", b"400 Bad"]

        def answer(asked):
            asked.answer(b"{}", answers[min(2, self.collector.calls - 1)].decode())
        self.start_traced(taken=answer)
        self.ask("sk-1")
        wait_for(lambda: self.collector.calls == 2, "the second try")
        self.assertEqual(self.sums("dropped_total", 'what="traces"'), 0)
        self.ask("sk-1")
        wait_for(lambda: self.sums("dropped_total", 'what="traces"') == 1, "the loss")
        self.assertEqual(self.collector.calls, 3)
        self.assert_said("traces cannot be delivered: status 400")

    def test_a_collector_that_is_away_holds_up_nothing_and_its_address_is_not_told(self):
        self.start_traced(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1/secret-path")
        self.proxy.traces.room = 3
        client = self.connect()
        for _ in range(10):
            client.answers(200, call("sk-1"))
        wait_for(lambda: self.sums("dropped_total", 'what="traces"') == 10, "the count")
        self.assert_said("traces cannot be delivered: connection refused")
        self.assertNotIn("secret-path", self.lines.text())

    def test_a_collector_by_https_must_be_who_it_says(self):
        file = pem_file(self)
        for settings, outcome in self.each((({"UPSTREAM_CA_FILE": file}, None),
                                            ({}, "certificate not trusted"))):
            collector = self.stub_of("collector", tls=server_context(file, None))
            self.start(**self.KEYS, **settings, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
            self.ask("sk-1")
            wait_for(lambda: (outcome or "") in self.lines.text() if outcome else collector.calls)
            self.assertEqual(collector.calls, 0 if outcome else 1)


class WarningsTest(SignalsCase):
    def start_warned(self, answer=None, clock=None, **settings):
        self.hook = self.stub_of("hook", says(b""))
        self.clock = clock or Clock()
        self.start(answer or (lambda asked: asked.answer(completion(80, 5))), self.clock,
                   **{**self.KEYS, "WEBHOOK_URL": self.hook.url + "/hook?token=hush",
                      "WARN_AT": "80%,95%", **settings})

    def look(self):
        proxy = self.proxy
        proxy.watchers.warnings.look(
            proxy.routes, proxy.books.ledger, proxy.callers.stored.keys.values())

    def told(self):
        """What the page is told."""
        return [json.loads(one.partition(b"\ndata: ")[2])
                for one in self.proxy.watchers.feed.events if b"\nevent: warning\n" in one]

    def events(self, count):
        wait_for(lambda: len(self.hook.requests) >= count, "%d events" % count)
        return [asked.json() for asked in self.hook.requests]

    def test_a_limit_that_is_near_is_told_once_an_hour_everywhere(self):
        self.start_warned(LIMITS="each 100 tokens per day; each 100 requests per day",
                          WARN_AT="80%")
        first = self.assert_status(200, call("sk-1", max_tokens=5))
        second = self.ask(call("sk-1", max_tokens=5))
        self.assertEqual((first.get("x-ratelimit-warning"), second.get("x-ratelimit-limit")), (
            "85% of 'each 100 tokens per day' is used", "100"))
        quotas = [self.get("/v1/quota", key=key).json() for key in ("sk-1", "sk-2")]
        self.assertEqual([one["warning"] for one in quotas],
                         ["170% of 'each 100 tokens per day' is used", None])
        told, = self.events(1)
        self.assertEqual((self.hook.requests[0].target, told), ("/hook?token=hush", {
            "event": "limit_near", "caller": "alice", "rule": "each 100 tokens per day",
            "level": 15, "capacity": 100, "share": 0.85, "time": self.clock.time_ns() / 1e9}))
        self.assertEqual(self.told(), [told])
        self.assert_said("alice has used 85% of each 100 tokens per day")
        self.assertNotIn("hush", self.lines.text())

    def test_each_mark_each_caller_and_each_hour_has_a_warning(self):
        self.start_warned(lambda asked: asked.answer(completion(79, 1)),
                          LIMITS="each 100 tokens per hour")
        for key, used, later in self.each("""[["sk-1", 79, 0], ["sk-2", 79, 0], ["sk-1", 15, 1800],
                                           ["sk-1", 39, 1800], ["sk-1", 49, 0]]"""):
            self.stub.answer = says(completion(used, 1))
            self.ask(call(key, max_tokens=1))
            self.on_loop(int)  # it is written down
            self.clock.now += later
        self.wait_for_rows(5)
        wait_for(lambda: not self.proxy.watchers.warnings.webhook.queue, "the last of them")
        self.assertEqual(
            [(one["caller"], one["share"]) for one in self.events(4)],
            [("alice", 0.8), ("bob", 0.8), ("alice", 0.96), ("alice", 0.86)])

    def test_without_marks_no_answer_carries_a_warning(self):
        self.start_warned(says(completion(80, 5), "200 OK", "X-RateLimit-Warning: from upstream"),
                          WARN_AT="", LIMITS="each 100 tokens per day")
        self.assert_status(200, call("sk-1", max_tokens=5), "x-ratelimit-warning:")
        self.assertEqual((self.proxy.watchers.marks, self.stub.calls), (None, 1))

    def test_an_upstream_that_is_down_and_up_again_is_told_once(self):
        self.start_warned(BREAKER_FAILURES=1, BREAKER_SECONDS=1)
        self.stub.refuse_connections()
        for connection in self.stub.sockets:
            hang_up(connection)
        look = partial(self.on_loop, self.look)
        self.ask("sk-1")
        look()
        look()
        self.assertEqual([one["event"] for one in self.events(1)], ["upstream_down"])
        self.assertEqual(self.events(1)[0]["upstream"], "base")
        for address in self.proxy.routes.addresses():
            self.on_loop(address.breakers.connections.judge, True, self.clock.now)
        look()
        self.assertEqual([one["event"] for one in self.events(2)], ["upstream_down", "upstream_up"])
        address.breakers.connections.opened = self.clock.now
        look()
        self.clock.now += 3600
        look()
        self.assertEqual([one["event"] for one in self.events(3)][2:], ["upstream_down"])

    def test_a_key_is_told_of_once_a_day_before_it_expires(self):
        self.start_warned()
        now, day = self.clock.time_ns() / 1e9, 86400
        end = now + 5 * 3600
        keys = [llm_proxy.Key(name, created=now - 40 * day, expires=expires, disabled=off)
                for name, expires, off in (("soon", end, False), ("never", None, False),
                                           ("later", now + 2 * day, False),
                                           ("off", end, True), ("past", now - 1, False))]
        keys.append(llm_proxy.Key("short", created=now, expires=now + 900))
        self.proxy.callers.stored.keys = {key.name: key for key in keys}
        for _ in range(4):
            self.on_loop(self.look)
            self.clock.now += 3601
        told, = self.told()
        found = told["event"], told["key"], told["expires"]
        self.assertEqual(found, ("key_expires", "soon", end))
        self.assert_said("the key soon expires in 5 hours")

    def test_rows_that_the_ledger_lost_are_told(self):
        self.start_warned()
        ledger = self.proxy.books.ledger
        ledger.dropped += 7
        self.on_loop(self.look)
        told, = self.events(1)
        self.assertEqual((told["event"], told["rows"]), ("ledger_dropped", 7))

    def test_a_webhook_that_fails_is_tried_three_times(self):
        self.start_warned()
        self.hook.answer = says(b"", "500 No")
        self.on_loop(self.proxy.watchers.warnings.tell, "test", (), None)
        self.assert_said("webhook cannot be delivered: status 500")
        self.assertEqual(self.hook.calls, 3)
        self.assertEqual(self.sums("dropped_total", 'what="webhook"'), 1)


# --------------------------------------------------------------------------------------------------
# Shared: Redis
# --------------------------------------------------------------------------------------------------

class RedisServer:
    """A real redis-server in a folder of its own, on a unix socket; with `port`, what the option
    for a port is called, also on one that nobody has."""

    def __init__(self, case, *options, port=None):
        self.path = new_path(case, "socket")
        self.url = "unix://" + self.path
        self.options = ["--port", "0", *options]
        self.process = None
        case.addCleanup(self.kill)
        for _ in range(5):
            if self.process:
                return
            if port:  # below those that the system gives away; a cluster's has another, 10000 above
                self.port = random.randrange(12_000, 22_000)
                self.options = ["--port", "0", *options, port, str(self.port)]
                self.url = "redis://127.0.0.1:%d" % self.port
            self.start()

    def start(self):
        self.process = subprocess.Popen(
            ["redis-server", "--bind", "127.0.0.1", "--unixsocket", self.path, "--save", "",
             "--dir", os.path.dirname(self.path), "--repl-diskless-sync", "no", "--hz", "100",
             *self.options],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: self.process.poll() is not None or self.answers(), "redis-server")
        if self.process.poll() is not None:  # the port was taken
            self.process = None

    def answers(self):
        with suppress(OSError, AssertionError):
            reply = self.ask("PING")  # which may have to be asked for a password first
            return getattr(reply, "code", "") != "LOADING"

    def ask(self, *parts):
        """Returns the reply to one command, on a connection of its own."""
        reader, replies = RedisReader(), []
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(self.path)
            sock.sendall(llm_proxy.redis_command(parts))
            while not replies:
                replies = reader.feed(sock.recv(65536))
        return replies[0]

    def kill(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


class RedisReaderTest(TableCase):
    def test_replies_are_read_in_pieces_of_any_size(self):
        for data, replies in self.each([
                (b"+OK\r\n", [b"OK"]),
                (b":-7\r\n:9007199254740993\r\n", [-7, 9007199254740993]),
                (b"$5\r\na\r\nbc\r\n$0\r\n\r\n$-1\r\n", [b"a\r\nbc", b"", None]),
                (b"*0\r\n*-1\r\n", [[], None]),
                (b"*3\r\n:1\r\n*2\r\n*0\r\n$1\r\nx\r\n$-1\r\n+b\r\n",
                 [[1, [[], b"x"], None], b"b"]),
        ]):
            self.assertEqual(RedisReader().feed(data), replies)
            for cut in range(len(data)):
                reader = RedisReader()
                self.assertEqual(reader.feed(data[:cut]) + reader.feed(data[cut:]), replies)

    def test_errors_are_told_in_our_words(self):
        for line, words, place in self.each([
                (b"-OOM command not allowed", "is out of memory", None),
                (b"-WRONGPASS invalid pw hunter2", "does not take the user and password", None),
                (b"-ERR no such thing", "refuses a command", None),
                (b"-MOVED 866 10.0.0.1:7001", "is a cluster whose keys have moved",
                 ("10.0.0.1", 7001)),
                (b"-MOVED 866 a b:7", "is a cluster whose keys have moved", None)]):
            fault, = RedisReader().feed(line + b"\r\n")
            self.assertEqual((str(fault), fault.moved_to), (words, place))

    def test_what_is_not_resp2_or_too_much_is_a_fault(self):
        for data in self.each([
                (b"HTTP/1.1 400\r\n",), (b"\r\n",), (b"$x\r\n",), (b"$-2\r\n",), (b":+\r\n",),
                (b"$01\r\na\r\n",), (b"$1\r\nab\r\n",), (b"*1234567890\r\n",), (b":1_0\r\n",),
                (b"$99999999\r\n",), (b"*1\r\n" * 6,), (b"+" + b"a" * 9000,),
                (b"*9\r\n" + b"$4000000\r\n%b\r\n" % bytes(4000000) * 5,)]):
            with self.assertRaises(RedisFault):
                RedisReader().feed(*data)


class RedisCase(TableCase):
    """A client on a loop of the test's own. It waits for as long as a slow machine takes: tests of
    what is late say themselves what is."""
    PATIENT = dict.fromkeys(
        ("ANSWER_SECONDS", "CONNECT_SECONDS", "LATE_SECONDS", "SILENT_SECONDS"), PATIENCE)
    SECONDS = PATIENT
    EVERYWHERE = {"Redis_" + name: seconds for name, seconds in PATIENT.items()}

    def setUp(self):
        self.patch_seconds(Redis_LONGEST_PAUSE=0.05)
        self.loop = llm_proxy.Loop()
        self.addCleanup(self.loop.close)
        self.left = []

    def client(self, url, tls=None):
        redis = Redis(llm_proxy.redis_url(url), tls, self.loop, "test")
        vars(redis).update(self.SECONDS)
        redis.on_leave.append(lambda fault: self.left.append(str(fault)))
        redis.start()
        self.addCleanup(lambda: self.run_loop(redis.close()))
        self.addCleanup(vars(redis).pop, "ANSWER_SECONDS", None)  # closing waits no longer
        return redis

    def run_loop(self, coroutine):
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, PATIENCE))

    def wait_for(self, condition):
        async def wait():
            while not condition():
                await asyncio.sleep(0.002)
        self.run_loop(wait())

    def scripted(self, *answers):
        """A server whose connections get these answers, each in pieces, one for each read; then it
        is silent. Returns its URL."""
        async def serve(reader, writer):
            with suppress(OSError, asyncio.CancelledError):
                for answer in rows.pop(0) if rows else ():
                    self.seen.append(await reader.read(65536))
                    writer.write(answer)
                while await reader.read(65536):
                    pass
            writer.close()
        rows, self.seen = list(answers), []
        server = self.run_loop(asyncio.start_server(serve, "127.0.0.1", 0))
        self.addCleanup(server.close)
        return "redis://127.0.0.1:%d" % server.sockets[0].getsockname()[1]

    def faults(self, redis, *parts):
        """Returns (the words of the fault of a call, its milliseconds)."""
        began = time.monotonic()
        with self.assertRaises(RedisFault) as caught:
            self.run_loop(redis.call(*parts))
        return str(caught.exception), 1000 * (time.monotonic() - began)


class RedisFaultsTest(RedisCase):
    """A server that does what no server should."""

    def start(self, *answers):
        redis = self.client(self.scripted(*answers))
        self.wait_for(lambda: redis.available)
        return redis

    def test_nobody_there_is_a_fault_at_once_and_tried_again_and_again(self):
        redis = self.client("unix:///nowhere/socket")
        self.assertEqual(self.faults(redis, "PING")[0], "is away")
        self.wait_for(lambda: len(self.left) > 3)
        self.assertEqual(set(self.left), {"is not there"})

    def test_silence_and_half_a_reply_hold_nobody_for_long(self):
        for half in self.each([(b"",), (b"$100\r\nab",), (b"*2\r\n:1\r\n",)]):
            self.left.clear()
            redis = self.start([b"+OK\r\n", *half])
            del redis.ANSWER_SECONDS
            words, milliseconds = self.faults(redis, "GET", "a")
            self.assertEqual(words, "answers late")
            self.assertLess(milliseconds, 2000)
            self.assertTrue(redis.available)  # one that is late says little
            redis.SILENT_SECONDS = 0
            self.wait_for(lambda: self.left)
            self.assertEqual(set(self.left), {"does not answer"})

    def test_nonsense_ends_the_connection(self):
        for answer, words in self.each([
                (b"HTTP/1.1 200 OK\r\n", "does not speak RESP2"),
                (b":1\r\n:2\r\n", "answers what it was not asked")]):
            self.left.clear()
            redis = self.start([b"+OK\r\n", answer])
            self.assertEqual(self.faults(redis, "GET", "a")[0], "is away")
            self.assertEqual(self.left[:1] or [str(redis.reason)], [words])

    def test_what_is_asked_for_at_once_travels_at_once(self):
        redis = self.start([b"+OK\r\n", b":1\r\n:2\r\n"])

        async def both():
            return await asyncio.gather(redis.call("A"), redis.call("B", 7))
        self.assertEqual(self.run_loop(both()), [1, 2])
        self.assertEqual(self.seen[1], b"*1\r\n$1\r\nA\r\n*2\r\n$1\r\nB\r\n$1\r\n7\r\n")

    def test_what_is_sent_meanwhile_goes_when_it_is_there_and_is_bounded(self):
        redis = self.client(self.scripted([b"+OK\r\n", b"+PONG\r\n"]))
        redis.on_connect.append(lambda: redis.ask_and_wait("PING"))
        with patch.object(Redis, "MOST_COMMANDS", 2):
            for name in "abc":
                redis.ask(None, "SET", name)
            self.assertEqual((len(redis.unsent), redis.dropped), (2, 1))
            self.wait_for(lambda: redis.available)  # though there is room for no more
        self.wait_for(lambda: not redis.unsent)

    def test_three_late_answers_in_a_row_are_too_many(self):
        self.SECONDS = {**self.SECONDS, "TICK_SECONDS": PATIENCE}  # the test says what is late
        redis = self.start([b"+OK\r\n"] + [b":1\r\n"] * 9)

        async def call(is_late):
            calling = self.loop.create_task(redis.call("A"))
            while not redis.asked:
                await asyncio.sleep(0)
            redis.late = is_late
            await calling
        for is_late in (True, True, False, True, True):
            self.run_loop(call(is_late))
        self.assertTrue(redis.available)
        with self.assertRaises(RedisFault):
            for _ in range(2):
                self.run_loop(call(True))
        self.wait_for(lambda: self.left)
        self.assertEqual(self.left[0], "answers late")

    def test_a_call_waits_in_all_for_as_long_as_for_one_answer(self):
        clock, words, now = Clock(), [], self.loop.time
        patch_until(self.addCleanup, patch.object(
            self.loop, "time", lambda: now() + clock.seconds))
        redis = self.start([b"+OK\r\n"])
        redis.ANSWER_SECONDS, redis.SILENT_SECONDS = 80, 800

        async def call():
            redis.begin_call()
            for _ in range(3):
                try:
                    await redis.call("A")
                except RedisFault as fault:
                    words.append(str(fault))
        calling = self.loop.create_task(call())
        for seconds, reply, told in self.each((
                (60, b":1\r\n", 0), (10, b"", 0), (20, b"", 2))):
            self.wait_for(lambda: redis.asked)
            clock.seconds += seconds
            redis.data_received(reply)
            redis.tick()
            self.run_loop(asyncio.sleep(0.001))
            self.assertEqual(words, told * ["answers late"])
        self.run_loop(calling)
        self.assertFalse(redis.is_late())  # for others

    def test_a_cluster_says_where_to_go(self):
        self.patch_seconds(Redis_STEADY_SECONDS=0)
        there = self.scripted(*[[b"+OK\r\n", b"+PONG\r\n"]] * 2)
        port = int(there.rpartition(":")[2])
        redis = self.client(self.scripted([b"+OK\r\n", b"-MOVED 1 127.0.0.1:%d\r\n" % port]))

        async def greet():
            await redis.ask_and_wait("PING")
        redis.on_connect.append(greet)
        for lost in self.each(([], ["has closed the connection"])):  # it stays there
            self.wait_for(lambda: redis.available)
            self.assertEqual(redis.transport.get_extra_info("peername")[1], port)
            self.assertEqual(self.left, ["is a cluster whose keys have moved", *lost])
            redis.transport.abort()
            self.wait_for(lambda: not redis.available)

    def test_where_a_cluster_sends_us_in_vain_is_left_for_where_we_began(self):
        self.patch_seconds(Redis_STEADY_SECONDS=0.01)
        self.SECONDS = {**self.SECONDS, "CONNECT_SECONDS": 0.02}
        redis, tried = self.client("redis://127.0.0.1:1"), []

        async def connect(place):
            tried.append(place or None)
            if not place:
                raise RedisFault("is a cluster", "MOVED", ("down", 7000))
            await self.loop.create_future()

        redis.open_connection = connect
        self.wait_for(lambda: len(tried) > 3)
        self.assertEqual(tried[:4], [None, ("down", 7000)] * 2)

    def test_nodes_that_send_each_other_everything_are_away(self):
        answers = [b"+OK\r\n"] * 3
        url = self.scripted(*[answers] * 9)
        answers.append(b"-MOVED 1 127.0.0.1:%s\r\n" % url.rpartition(":")[2].encode())
        buckets = RedisBuckets(Clock(), self.client(url), "test", "share", 1)
        self.wait_for(lambda: buckets.state == "away")
        self.assertEqual(buckets.reason, "is a cluster whose keys have moved")


HAS_REDIS = unittest.skipUnless(shutil.which("redis-server"), "there is no redis-server")


def needs_redis(tests):
    """Marks tests of what is done in Redis; those of the way there run everywhere."""
    return tested_once(HAS_REDIS(tests))


@HAS_REDIS
class RedisTest(RedisCase):
    def test_user_password_database_and_name_are_told(self):
        server = RedisServer(self, "--user", *"app on >p@ss:w ~* +@all".split(),
                             port="--port")
        redis = self.client("redis://app:p%%40ss%%3Aw@127.0.0.1:%d/3" % server.port)
        self.wait_for(lambda: redis.available)
        self.assertEqual(self.run_loop(redis.call("ACL", "WHOAMI")), b"app")
        clients = self.run_loop(redis.call("CLIENT", "LIST"))
        self.assertIn(b" name=test ", clients)
        self.assertIn(b" db=3 ", clients)

    def test_a_wrong_password_is_said_without_it(self):
        server = RedisServer(self, "--requirepass", "right", port="--port")
        self.client("redis://:hunter2@127.0.0.1:%d" % server.port)
        self.wait_for(lambda: self.left)
        self.assertEqual(self.left[0], "does not take the user and password")

    def test_check_asks_it_and_leaves_nothing_there(self):
        self.patch_seconds(**self.EVERYWHERE)
        server = RedisServer(self, "--requirepass", "right", port="--port")
        for password, said in (("right", None), ("wrong", "does not take the user and password")):
            config = read_config(
                {**HERE, "REDIS_URL": "redis://:%s@127.0.0.1:%d" % (password, server.port)})
            fault = self.run_loop(llm_proxy.fault_of_redis(config))
            self.assertEqual(fault and str(fault), said)
        redis = self.client("redis://:right@127.0.0.1:%d" % server.port)
        self.wait_for(lambda: redis.available)
        self.assertEqual(self.run_loop(redis.call("KEYS", "*")), [])

    def test_it_comes_back_when_the_server_does(self):
        server = RedisServer(self)
        redis = self.client(server.url)
        self.wait_for(lambda: redis.available)
        server.kill()
        self.wait_for(lambda: not redis.available)
        redis.ask(None, "SET", "a", "later")
        server.start()
        began = time.monotonic()
        self.wait_for(lambda: redis.available)
        self.assertLess(time.monotonic() - began, PATIENCE / 4)
        self.assertEqual(self.run_loop(redis.call("GET", "a")), b"later")

    def test_a_script_goes_by_its_digest_until_that_is_forgotten(self):
        server = RedisServer(self)
        script = llm_proxy.RedisScript("return KEYS[1] .. ARGV[1]")
        redis = self.client(server.url)
        redis.scripts.append(script)
        self.wait_for(lambda: redis.available)
        self.assertTrue(script.is_loaded)
        self.assertEqual(self.run_loop(redis.call(*script.parts(["a"], ["b"]))), b"ab")

    def test_certificates_are_checked(self):
        path = pem_file(self)
        server = RedisServer(self, "--tls-cert-file", path, "--tls-key-file", path,
                             "--tls-ca-cert-file", path, "--tls-auth-clients", "no",
                             port="--tls-port")
        url = "rediss://127.0.0.1:%d" % server.port
        redis = self.client(url, ssl.create_default_context())
        self.wait_for(lambda: self.left)
        self.assertEqual(self.left[0], "has a certificate that is not trusted")
        self.run_loop(redis.close())  # PyPy takes errors of one TLS connection for another's
        redis = self.client(url, ssl.create_default_context(cafile=path))
        self.wait_for(lambda: redis.available)
        self.assertEqual(self.run_loop(redis.call("PING")), b"PONG")


@needs_redis
class LossesTest(RedisCase):
    """Redis loses all again and again, while not every process has noticed the last time."""
    STEPS = 150
    RULE = read_rule("each 1 requests per 365d burst 1000")
    KEYED_RULES = [(RULE, (RULE.text,))]
    OTHER = read_rule("all 1 tokens per 365d burst 1000"), ("all",)

    def take_part(self, store, act):
        if act == "call":
            self.run_loop(store.take(self.KEYED_RULES, costs(1)))
        elif act == "lose":
            self.server.ask("FLUSHALL")
        else:
            store.beat_timer.cancel()
            store.beat()
            self.run_loop(asyncio.sleep(0.001))

    def test_a_loss_is_made_good_though_the_answer_that_told_of_it_was_lost(self):
        self.server = RedisServer(self)
        store = RedisBuckets(Clock(), self.client(self.server.url), "test", "share", 1)
        self.left_done([store])
        self.take_part(store, "call")
        self.left_done([store])
        with patch.object(store, "read_beat", side_effect=RedisFault("is away")):
            self.take_part(store, "lose")
            self.take_part(store, "beat")
            self.wait_for(lambda: len(self.left) > 2)
        self.left_done([store])
        self.assert_stored(store, 999)

    def lose_answer(self, store, then=lambda: None):
        """Redis does what is sent next, and the answer is lost with the connection."""
        def lose(batch, number, reply):
            del store.on_answer
            then()
            store.redis.leave(RedisFault("is away"))
            store.on_answer(batch, number, RedisFault("is away"))
        store.on_answer = lose

    def assert_stored(self, store, level):
        name, _ = store.describe(*self.KEYED_RULES[0])
        self.assertEqual(self.server.ask("GET", name).split()[0], b"%d" % level)

    def test_first_takes_whose_answers_are_lost_are_done_once(self):
        self.server = RedisServer(self)
        store = RedisBuckets(Clock(), self.client(self.server.url), "test", "share", 1)
        self.left_done([store])
        self.lose_answer(store)
        self.run_loop(store.take([*self.KEYED_RULES, self.OTHER], costs(1)))
        self.left_done([store])
        self.assert_stored(store, 999)

    def test_what_comes_back_does_so_once_though_its_bucket_seemed_full_by_that(self):
        self.patch_seconds(RedisBuckets_BEAT_SECONDS=PATIENCE)
        self.server = RedisServer(self)
        one, two = [RedisBuckets(Clock(), self.client(self.server.url), "test", "share", 2)
                    for _ in range(2)]
        self.left_done([one, two])
        self.take_part(one, "call")
        self.take_part(two, "call")
        one.settle(self.KEYED_RULES, llm_proxy.NO_COST, costs(1), 0.0)
        one.store([one.level_of(*self.OTHER)])  # in whose favour full ones are dropped
        self.lose_answer(one)
        self.left_done([one])
        self.assert_stored(one, 999)

    def test_what_came_back_before_its_bucket_was_full_does_so_no_more(self):
        self.patch_seconds(RedisBuckets_BEAT_SECONDS=PATIENCE)
        self.server = RedisServer(self)
        one, two = [RedisBuckets(time, self.client(self.server.url), "test", "share", 2)
                    for _ in range(2)]
        self.left_done([one, two])
        self.take_part(one, "call")
        one.settle(self.KEYED_RULES, llm_proxy.NO_COST, costs(1), 0.0)
        self.lose_answer(one)
        with patch.object(one.redis, "open_connection", side_effect=OSError):
            self.wait_for(lambda: one.state == "away")
            self.take_part(two, "call")
        self.left_done([one])
        self.assert_stored(one, 999)

    def test_a_call_that_leaves_when_its_answer_is_lost_runs_no_longer(self):
        self.server = RedisServer(self)
        store = RedisBuckets(Clock(), self.client(self.server.url), "test", "share", 1)
        self.left_done([store])
        rule = read_rule("each 2 running")
        taking = self.loop.create_task(store.take([(rule, (rule.text,))], costs(1)))
        self.lose_answer(store, taking.cancel)
        with self.assertRaises(asyncio.CancelledError):
            self.run_loop(taking)
        self.left_done([store])
        self.assertEqual(self.server.ask("KEYS", "*:r:*"), [])

    def test_a_first_charge_is_done_once_though_another_process_alone_was_told_of_it(self):
        self.patch_seconds(Redis_LONGEST_PAUSE=0, RedisBuckets_BEAT_SECONDS=PATIENCE)
        self.server = RedisServer(self)
        one, two = [RedisBuckets(Clock(), self.client(self.server.url), "test", "open", 2)
                    for _ in range(2)]
        self.left_done([one, two])
        self.take_part(two, "call")
        self.lose_answer(one)
        with patch.object(one.redis, "open_connection", side_effect=OSError):
            self.take_part(one, "call")
            self.take_part(two, "beat")
            self.take_part(two, "lose")
        with patch.object(one, "MOST_BATCHES", 0):
            self.wait_for(lambda: one.state == "here")
            self.take_part(two, "beat")
            self.left_done([two])
        one.redis.flush()
        self.left_done([one])
        self.assert_stored(one, 998)

    def test_no_call_is_forgotten_nor_charged_twice(self):
        self.patch_seconds(Redis_LONGEST_PAUSE=0, RedisBuckets_BEAT_SECONDS=PATIENCE)
        self.server, clock = RedisServer(self), Clock()
        stores = [RedisBuckets(clock, self.client(self.server.url), "test", "share", 3)
                  for _ in range(3)]
        self.left_done(stores)
        stores[0].LOOKS = 0  # it sees no charges of the others but by its own
        chance = Random(3)
        acts = chance.choices(["call", "lose", "beat"], [10, 3, 4], k=self.STEPS)
        for store, act in [*((chance.choice(stores), act) for act in acts),
                           *((store, "beat") for store in 2 * stores)]:
            self.take_part(store, act)
            self.left_done(stores)
        self.assert_stored(stores[0], 1000 - acts.count("call"))

    def left_done(self, stores):
        self.wait_for(lambda: all(map(is_done, stores)))


# -- the same buckets, in Redis: what holds in memory holds there

def is_done(buckets):
    """Tells whether all that was charged is in Redis."""
    return buckets.state == "here" and not (
        buckets.unsent or buckets.acts or buckets.unanswered)


class SharedClock(Clock):
    """Before time passes, all is done that was asked for."""
    before = staticmethod(lambda: None)

    @property
    def now(self):
        return self.seconds

    @now.setter
    def now(self, seconds):
        self.before()
        self.seconds = seconds


class InRedis:
    """Has the tests of a LimitsCase run in Redis, by the same clock."""
    LONG = 20  # after 30 s one has to say that it runs
    STEPS = 100
    TIME = "redis.call('TIME')", "redis.call('HVALS', '{test}:now')"

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.server = RedisServer(SimpleNamespace(addCleanup=cls.addClassCleanup))
        for name in ("LUA_BATCH", "LUA_BEAT"):
            text = getattr(llm_proxy, name).replace(*cls.TIME)
            patch_until(cls.addClassCleanup, patch.object(llm_proxy, name, text))

    def new_store(self, room=10_000):
        self.clock = SharedClock()
        self.server.ask("FLUSHALL")
        loop = llm_proxy.Loop()
        self.addCleanup(loop.close)
        url = llm_proxy.redis_url(self.server.url)
        self.redis = redis = Redis(url, None, loop, "test")
        store = RedisBuckets(self.clock, redis, "test", "share", 1)
        store.room = room
        redis.LATE_SECONDS = redis.SILENT_SECONDS = PATIENCE
        redis.ANSWER_SECONDS = store.BEAT_SECONDS = PATIENCE
        self.set_time()
        redis.start()
        self.addCleanup(lambda: loop.run_until_complete(redis.close()))
        self.pass_while(lambda: store.state != "here")
        self.clock.before = lambda: self.buckets
        return store

    def set_time(self):
        seconds, rest = divmod(self.clock.time_ns(), 10 ** 9)
        self.server.ask("HSET", "{test}:now", "seconds", seconds, "microseconds", rest // 1000)

    def pass_while(self, condition):
        async def wait():
            while condition():
                await asyncio.sleep(0)
        self.redis.loop.run_until_complete(asyncio.wait_for(wait(), PATIENCE))

    @property
    def buckets(self):
        store = self.store
        self.set_time()
        self.pass_while(lambda: not is_done(store))
        return store

    def awaited(self, coroutine):
        self.assertEqual(self.buckets.state, "here")
        return self.redis.loop.run_until_complete(coroutine)


@needs_redis
class LimitsInRedisTest(InRedis, LimitsTest):
    def answer_to(self, number, *acts, process="me"):
        """What Redis says to a batch of this number."""
        store = self.buckets
        store.number = number - 1
        with patch.object(self.redis, "process", process), patch.object(
                store, "marker", "{test}:p:" + process):
            parts = store.command(Batch([(word, *self.pair, *rest) for word, *rest in acts]))
        return self.redis.loop.run_until_complete(self.redis.call(*parts))

    def start_with_a_bucket(self):
        self.start()
        self.pair, = self.limits.matching(caller("alice"), "1", "")

    def test_a_batch_that_comes_again_or_too_early_is_not_done(self):
        self.start_with_a_bucket()
        for number, level in self.each(((1, b"8"), (1, None), (3, None), (2, b"6"))):
            with nullcontext() if level else self.assertRaises(RedisFault) as caught:
                self.assertEqual(self.answer_to(number, ("charge", 2, 0)).split()[1], level)
            self.assertEqual(level or caught.exception.code, level or "GAP")

    def test_what_each_has_taken_is_charged_once_whoever_puts_back_what_it_saw(self):
        self.start_with_a_bucket()
        texts, number = {}, 0
        for process, act, level in self.each("""[
                ["a", ["charge", 1, 0], 9], ["b", ["charge", 2, 0], 7], ["c", ["look"], 7],
                ["a", ["charge", 2, 0], 5], ["b", ["put", "own"], 5],
                ["lost", null, null],
                ["new", ["charge", 1, 0], 9], ["c", ["put", "back"], 6], ["c", ["put", "new"], 6],
                ["a", ["put", "back"], 4], ["b", ["put", "back"], 4], ["b", ["charge", 1, 0], 3],
                ["lost", null, null],
                ["b", ["put", "back"], 3], ["c", ["put", "back"], 3], ["a", ["put", "back"], 3],
                ["new", ["put", "back"], 3], ["a", ["charge", -3, 0], 6],
                ["b", ["charge", -3, 0], 9], ["new", ["charge", -1, 0], 10],
                ["a", ["charge", 4, 0], 6], ["b", ["put", "own"], 6]]"""):
            if not act:
                name, _ = self.buckets.describe(*self.pair)
                self.server.ask("DEL", name)
                continue
            number += 1
            self.server.ask("SET", "{test}:p:" + process, number - 1)
            self.clock.now += 0.001
            acts = [act + [texts.get(process, "-")] if act[0] == "put" else act, ["look"]]
            answer = self.answer_to(number, *acts, process=process).split(b"\n")[1]
            self.assertEqual(answer.split()[0], b"%d" % level)
            texts[process] = answer.decode().replace(" ", ",")

    def test_what_a_call_has_taken_that_leaves_as_it_is_answered_comes_back(self):
        self.start("each 3 requests per hour; each 2 running")
        store, finish = self.buckets, self.store.finish_take
        admitting = self.redis.loop.create_task(self.limits.admit(caller("a"), "1", "", costs(1)))

        def finish_and_leave(*arguments):
            finish(*arguments)
            admitting.cancel()
        with patch.object(store, "finish_take", finish_and_leave):
            with self.assertRaises(asyncio.CancelledError):
                self.awaited(admitting)
        self.assertEqual((self.buckets.running, self.server.ask("KEYS", "*:[br]:*")), ({}, []))

    def test_of_many_processes_only_the_sum_is_kept(self):
        self.start_with_a_bucket()
        for process in range(40):
            answer = self.answer_to(1, ("charge", 1, 0), process="p%d" % process)
        self.assertEqual(answer.split()[1], b"-30")
        self.assertEqual(sorted(answer.split(b"|")[1].split()), [
            b"-=32", *[b"p%d=1" % process for process in range(32, 40)]])

    def test_settings_that_are_read_again_move_buckets_whose_rules_are_gone_and_no_others(self):
        self.start("each 10 tokens per hour")
        self.admit(4)
        name, _ = self.buckets.describe(*self.limits.matching(caller("alice"), "1", "")[0])
        self.server.ask("DEL", name)  # others gave all of it back
        self.limits.take_over(0)
        self.assertEqual(self.buckets.state, "here")
        self.assertEqual(self.server.ask("EXISTS", name), 0)
        self.limits.rules = llm_proxy.rules("each 20 tokens per hour")
        self.limits.take_over(0)
        self.assertEqual(self.levels(), [("each 20 tokens per hour", 12)])

    def test_who_has_died_is_counted_for_less_than_five_seconds(self):
        self.start()
        store, counted = self.buckets, []
        for process in ["dead"] + 9 * ["a"]:
            with patch.object(self.redis, "process", process):
                store.read_beat(self.redis.loop.run_until_complete(
                    self.redis.call(*store.beat_parts())))
            counted.append(store.processes)
            self.clock.now += 0.5
            self.set_time()
        self.assertEqual((min(counted[1:5]), counted[9]), (3, 1))


@needs_redis
class RulesInRedisTest(InRedis, RulesTogetherTest):
    pass


@needs_redis
class KeysRulesInRedisTest(InRedis, KeysRulesTest):
    # What was given stays with the old rule's bucket.
    test_what_was_given_goes_along_when_the_rule_is_changed = None


@needs_redis
class WindowsInRedisTest(InRedis, WindowsTest):
    def test_what_is_taken_while_redis_is_away_is_of_its_own_window(self):
        """Each takes 90, and uses 10 after so many seconds."""
        for rule, settled_in, left, reset in self.each("""[
                ["60s window", [9, 9], 80, 42], ["60s window", [9], 90, 51],
                ["60s window", [61, 9], 90, 51], ["60s window", [9, 61], 100, 0],
                ["calendar day", [9, 20], 80, 7171], ["calendar day", [7205, 20], 90, 86375],
                ["calendar day", [7195, 20], 100, 0]]"""):
            self.start("each 100 tokens per " + rule)
            self.at("2024-02-10T22:00:00")
            for number, seconds in enumerate(settled_in, 1):
                with patch.object(self.buckets if number == 1 else self.store, "state", "away"):
                    hold = self.redis.loop.run_until_complete(
                        self.limits.admit(caller("alice"), "1", "", costs(90)))
                    self.clock.seconds += seconds
                    if number < len(settled_in):
                        hold.settle(costs(10))
            hold.settle(costs(10))
            quota, _ = self.peek()
            self.assertEqual((quota.remaining, quota.reset_seconds), (left, reset))


@needs_redis
class SharedLimitsTest(ProxyCase):
    """Proxies of one process, or of several, that share their limits."""
    RULE = "each 10 requests per hour"

    @classmethod
    def setUpClass(cls):
        """Starts a cluster, which takes two seconds to be one, for the last of these tests."""
        super().setUpClass()
        case = SimpleNamespace(addCleanup=cls.addClassCleanup)
        cls.nodes = [RedisServer(case, "--cluster-enabled", "yes", port="--port")
                     for _ in range(3)]
        for number, node in enumerate(cls.nodes):
            slots = range(number * 5462, min(16384, number * 5462 + 5462))
            node.ask("CLUSTER", "ADDSLOTS", *slots)
            node.ask("CLUSTER", "MEET", "127.0.0.1", cls.nodes[0].port)

    def setUp(self):
        self.redis = RedisServer(self, *self.OPTIONS)
        self.patch_seconds(RedisBuckets_BEAT_SECONDS=0.02)
        self.proxies = []

    OPTIONS = ()

    def start(self, answer=says(), limits=RULE, **settings):
        settings = {"REDIS_URL": self.redis.url, "LIMITS": limits, "METRICS": "open", **settings}
        super().start(answer, **settings)
        self.proxies.append(self.address)
        return self.proxy.limits.buckets

    def start_here(self, *arguments, **settings):
        buckets = self.start(*arguments, **settings)
        self.is_back(buckets)
        return buckets

    def is_back(self, buckets):
        wait_for(lambda: is_done(buckets), "Redis")

    def is_away(self, buckets):
        wait_for(lambda: buckets.state == "away", "the absence of Redis")

    def admitted(self, calls, key=None):
        """How many of so many calls in a row are let in."""
        outcomes = [self.ask(call(key)).body == b'{"said": "hi"}' for _ in range(calls)]
        return sum(outcomes)

    def assert_admitted(self, admitted, *calls):
        self.assertEqual(self.admitted(*calls), admitted)

    def stored(self):
        """The levels in Redis."""
        found = [self.redis.ask("GET", name) for name in self.redis.ask("KEYS", "*:b:*")]
        return sorted(int(text.split()[0]) for text in found if text)

    def wait_for_stored(self, *levels):
        wait_for(lambda: self.stored() == [*levels], "%r in Redis" % (levels,))

    def test_two_proxies_share_a_bucket(self):
        one = self.start_here()
        self.assert_admitted(6, 6)
        two = self.start_here()
        self.assert_admitted(4, 6)
        self.assertEqual(self.stored(), [0])
        self.is_back(one)
        wait_for(lambda: one.processes == two.processes == 2)
        health = self.get("/health").json()
        self.assertEqual(health["limits"], {
            "shared_by": 2, "degraded": False, "redis": "is there", "dropped": 0})

    def test_of_200_calls_at_once_at_four_proxies_exactly_100_get_in_by_three_rules(self):
        self.patch_seconds(**RedisCase.EVERYWHERE)
        for _ in range(4):
            self.start_here(limits="all 100 requests per hour; each 60 requests per hour;"
                                   "all 1000 running")
        clients = []
        for number in range(200):
            self.address = self.proxies[number % 4]
            clients.append(self.send(call("sk-%d" % (number // 4 % 2))))
        let_in = [client.read().body == b'{"said": "hi"}' for client in clients]
        self.assertEqual(sum(let_in), 100)
        self.assertEqual(self.stored()[0], 0)

    def test_what_a_call_did_not_use_can_be_had_by_the_other(self):
        told = says({"usage": {"prompt_tokens": 10, "completion_tokens": 20}})
        for left in ("970", "940"):
            buckets = self.start_here(told, "each 1000 tokens per hour", RESPONSE_TOKEN_RESERVE=900)
            self.assertEqual(self.ask().get("x-ratelimit-remaining"), left)
            self.is_back(buckets)

    @contextmanager
    def soon(self):
        """What is done meanwhile may not take long."""
        began = time.monotonic()
        yield
        self.assertLess(time.monotonic() - began, PATIENCE / 4)

    def test_while_redis_is_away_each_has_its_share_and_that_is_charged_later(self):
        one, two = self.start_here(), self.start_here()
        wait_for(lambda: one.processes == two.processes == 2)
        for self.address in reversed(self.proxies):
            self.assertEqual(self.admitted(1), 1)
        wait_for(lambda: [found.level for found in two.seen()] == [8])
        self.address = self.proxies[1]
        self.redis.kill()
        self.is_away(two)
        one.beats = two.beats = two.START_BEATS  # after which Redis is said to be there
        with self.soon():
            self.assert_admitted(4, 6)  # of the 8 that are left
        self.assert_said(": this process goes by its share of the limits, one of 2")
        self.assertIn("llm_proxy_limits_degraded 1", self.get("/metrics").body.decode())
        wait_for(lambda: self.ask(HEALTH).json()["limits"]["redis"] == "is not there")
        self.redis.start()
        with self.soon():
            self.is_back(one)
            self.is_back(two)
        self.assert_said("Redis is there again: ")
        self.wait_for_stored(4)
        self.assert_admitted(4, 6)

    def test_charges_that_find_no_room_are_counted_and_running_calls_end_all_the_same(self):
        self.patch_seconds(RedisBuckets_MOST_KEPT=1)
        buckets = self.start_here(limits=self.RULE + "; each 2 running")
        self.redis.kill()
        self.is_away(buckets)
        self.assertEqual(self.admitted(4), 4)
        wait_for(lambda: not buckets.running)
        self.assertGreater(self.ask(HEALTH).json()["limits"]["dropped"], 3)

    def test_open_lets_all_in_meanwhile_and_closed_none(self):
        for policy, admitted, status, stored in self.each("""[["closed", 0, 503, []],
                                                           ["open", 12, 200, [-2]]]"""):
            buckets = self.start_here(REDIS_AWAY=policy)
            self.redis.kill()
            self.is_away(buckets)
            self.assert_admitted(admitted, 12)
            self.assert_status(status, call("b"))
            self.redis.start()
            self.is_back(buckets)
            self.assertEqual(self.stored()[:1], stored)

    def test_flushall_opens_no_gate(self):
        buckets = self.start_here(limits=self.RULE + "; each 2 running; all 99 requests per day")
        self.assert_admitted(7, 7)
        self.stub.answer, before = None, self.stub.answer
        client, asked = self.ask_stub()
        self.stub.answer = before
        self.is_back(buckets)
        self.redis.ask("FLUSHALL")
        self.assert_admitted(2, 5)
        self.wait_for_stored(0, 89)
        self.assertEqual(self.redis.ask("KEYS", "*:r:*")[1:], [])
        asked.answer()
        client.head()

    def test_what_is_lost_is_put_back_though_nobody_calls(self):
        one, two = self.start_here(), self.start_here()
        self.assert_admitted(7, 7, "sk-1")
        wait_for(lambda: one.processes == two.processes == 2)
        self.redis.ask("FLUSHALL")
        self.wait_for_stored(3)
        self.assert_admitted(3, 4, "sk-1")
        self.assertFalse(one.is_degraded or two.is_degraded)

    def test_scripts_that_redis_was_made_to_forget_are_told_again(self):
        buckets = self.start_here(MAX_CONCURRENCY=1, SHARE_SLOTS="on")
        for _ in range(2):
            self.redis.ask("SCRIPT", "FLUSH")
            self.assert_admitted(3, 3)
            self.is_back(buckets)
            self.assertTrue(buckets.batch_script.is_loaded)
        self.assertEqual(self.stored(), [4])

    def test_what_others_have_written_there_stops_nothing(self):
        for text in self.each([
                ("nonsense",), ("inf inf inf",), (bytes(range(256)),), ("1e300 -1",)]):
            buckets = self.start_here()
            self.assert_admitted(1, 1)
            self.is_back(buckets)
            name, = self.redis.ask("KEYS", "*:b:*")
            self.redis.ask("SET", name, *text)
            self.assert_status(200)
            self.redis.ask("DEL", name)
            self.redis.ask("LPUSH", name, "a list")
            self.is_back(buckets)
            self.assert_status(200)
            self.redis.ask("FLUSHALL")

    def test_a_number_of_batches_that_somebody_has_changed_stops_nothing(self):
        buckets = self.start_here()
        self.assert_admitted(1, 1)
        self.redis.ask("SET", buckets.marker, 10 ** 9)
        self.assert_status(200)
        self.redis.ask("FLUSHALL")
        self.is_back(buckets)
        self.assertNotIn("Traceback", self.lines.text())

    def test_a_wrong_password_is_told_and_shown_nowhere(self):
        self.redis.ask("CONFIG", "SET", "requirepass", "right")
        buckets = self.start(REDIS_URL="redis://:hunter2@127.0.0.1:1")
        self.is_away(buckets)
        with patch.object(buckets.redis, "url", llm_proxy.Endpoint(
                "unix", "", 0, self.redis.path, password="hunter2")):
            wait_for(lambda: buckets.reason == "does not take the user and password")
            self.assert_admitted(10, 11)
        self.assertNotIn("hunter2", self.lines.text() + repr(self.ask(HEALTH).body))

    def test_a_server_that_refuses_to_write_is_away_until_it_does_not(self):
        buckets = self.start_here()
        wrong, right = [partial(self.redis.ask, "CONFIG", "SET", "maxmemory", size)
                        for size in ("1", "0")]
        replica = partial(self.redis.ask, "REPLICAOF")
        for refuse, stop, words in self.each((
                (wrong, right, "is out of memory"),
                (lambda: replica("127.0.0.1", "1"), lambda: replica("NO", "ONE"), "is read-only"))):
            refuse()
            self.is_away(buckets)
            self.assertEqual(buckets.reason, words)
            self.assertTrue(self.admitted(1))
            stop()
            self.is_back(buckets)
        self.assertEqual(self.stored(), [8])

    def test_a_server_that_stands_still_holds_no_call_for_long(self):
        buckets = self.start_here(limits="each 5 requests per hour")
        self.assertLess(buckets.redis.ANSWER_SECONDS + buckets.redis.TICK_SECONDS, 0.1)
        with patch.object(Redis, "begin_call") as begin:
            self.assertEqual(self.admitted(1), 1)
        begin.assert_called_once_with()
        self.redis.process.send_signal(signal.SIGSTOP)
        seconds = []
        for _ in range(4):
            began = time.monotonic()
            self.assert_admitted(1, 1)
            seconds.append(time.monotonic() - began)
        # Redis is not away yet, but those after the first one do not wait for it.
        self.assertLess(min(seconds[1:3]), buckets.redis.ANSWER_SECONDS)
        self.assertLess(min(seconds), 0.1 + 0.05)  # 50 ms are this machine's,
        self.assertLess(max(seconds), PATIENCE / 4)    # which may have much to do
        self.is_away(buckets)
        self.redis.process.send_signal(signal.SIGCONT)
        began = time.monotonic()
        self.is_back(buckets)
        self.assertLess(time.monotonic() - began, PATIENCE / 4)
        self.assertEqual(self.stored(), [0])  # nothing twice
        self.assert_admitted(0, 1)

    def test_no_call_waits_for_longer_whatever_redis_and_its_connection_do(self):
        self.patch_seconds(Redis_SILENT_SECONDS=PATIENCE)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            buckets = self.start(REDIS_URL="redis://127.0.0.1:%d" % silent.getsockname()[1],
                                 limits="each 3 requests per hour")
            self.assertEqual(self.admitted(4), 3)
            self.assertEqual(buckets.state, "returning")

    def start_with_replica(self):
        """Returns a name of a server, its replica, which has six of ten, and two that use it."""
        old, new = self.redis, _ = [RedisServer(self, port="--port") for _ in range(2)]
        link = new_path(self, "link")
        os.symlink(old.path, link)
        new.ask("REPLICAOF", "127.0.0.1", old.port)
        both = [self.start_here(REDIS_URL="unix://" + link) for _ in range(2)]
        wait_for(lambda: [one.processes for one in both] == [2, 2])
        self.assert_admitted(4, 4)
        self.redis = new
        self.wait_for_stored(6)
        return old, new, link, both

    @staticmethod
    def move(link, server):
        os.symlink(server.path, link + ".new")
        os.replace(link + ".new", link)

    def test_a_server_that_is_lost_is_replaced_by_its_replica(self):
        old, new, link, both = self.start_with_replica()
        old.kill()
        for one in both:
            self.is_away(one)
        self.move(link, new)
        for one in both:
            wait_for(lambda: one.reason == "is read-only")
        self.assert_admitted(3, 9)
        new.ask("REPLICAOF", "NO", "ONE")
        for one in both:
            self.is_back(one)
        self.assertEqual(self.stored(), [3])
        self.assert_admitted(3, 9)

    def test_a_replica_that_takes_over_knows_all_or_is_told(self):
        for lost, left in self.each("""[[0, 6], [2, 4]]"""):
            old, new, link, both = self.start_with_replica()
            new.ask("REPLICAOF", "NO", "ONE")
            self.assert_admitted(lost, lost)  # as the old one knows alone
            old.ask("REPLICAOF", "127.0.0.1", new.port)
            for one in both:
                wait_for(lambda: one.reason == "is read-only")
            self.assert_admitted(left // 2, 9)
            self.move(link, new)
            for one in both:
                self.is_back(one)
            self.assertEqual(self.stored(), [left - left // 2])
            self.assert_admitted(left - left // 2, 9)

    def test_what_was_charged_while_redis_was_away_is_told_at_the_end(self):
        for seconds in self.each((2, 0)):
            buckets = self.start_here()
            self.redis.kill()
            self.is_away(buckets)
            self.assert_admitted(2, 2)
            buckets.DRAIN_SECONDS = seconds
            with threads([self.redis.start] if seconds else []):
                self.drain(0)
            if seconds:
                self.assertEqual(self.stored(), [8])
            buckets.DRAIN_SECONDS = 0  # when the test ends, nobody answers
        self.assert_said("Redis is not told of all charges: it ")

    def test_who_follows_a_process_that_died_while_redis_is_away_has_what_comes_in(self):
        for rule, admitted in self.each(((self.RULE, 0), ("each 2 running", 2),
                                         ("each 90000 requests per hour", 1))):
            self.redis.kill()
            buckets = self.start(limits=rule)
            buckets.replaces_dead = True
            self.is_away(buckets)
            self.admitted(1)  # its buckets are there from then on
            time.sleep(0.045)
            self.assertGreaterEqual(self.admitted(2), admitted)
            self.redis.start()
            self.is_back(buckets)
            self.assertFalse(buckets.replaces_dead)

    def test_a_take_that_comes_too_late_is_given_back(self):
        buckets = self.start_here(limits="each 3 requests per hour; each 2 running")
        with patch.object(buckets.redis, "ANSWER_SECONDS", 0), patch.object(
                buckets, "policy", "closed"):
            self.redis.process.send_signal(signal.SIGSTOP)
            self.assert_status(503)
            self.redis.process.send_signal(signal.SIGCONT)
            self.is_back(buckets)
        wait_for(lambda: not buckets.running and not self.stored())

    def test_what_is_decided_here_goes_by_what_was_seen_last(self):
        buckets = self.start_here(limits="each 3 requests per hour")
        for late, in_time in self.each("""[[1, 2], [0, 0]]"""):
            with patch.object(buckets.redis, "ANSWER_SECONDS", 0):
                self.redis.process.send_signal(signal.SIGSTOP)
                self.assert_admitted(late, 1)
                self.redis.process.send_signal(signal.SIGCONT)
                self.is_back(buckets)
            self.assert_admitted(in_time, 4)

    def test_what_is_given_and_filled_is_so_for_all(self):
        one, two = self.start_for_ann(), self.start_for_ann()
        loop = one.redis.loop
        self.assert_admitted(10, 12, "sk-1")
        loop.call_soon_threadsafe(one.fill, self.ANN)
        self.wait_for_stored()
        self.assert_admitted(10, 12, "sk-1")
        self.give_at(one, 3, 60)
        self.wait_for_stored(3)
        self.assert_admitted(3, 12, "sk-1")
        self.assertEqual([amount for (amount, _), in two.given.values()], [3])
        loop.call_soon_threadsafe(one.fill, self.ANN)
        wait_for(lambda: self.stored() != [0])
        self.assert_admitted(1, 1, "sk-1")
        self.redis.ask("FLUSHALL")
        self.wait_for_stored(12)
        self.assert_admitted(12, 15, "sk-1")

    def test_what_is_given_before_all_have_put_back_what_they_saw_stays(self):
        one, two = self.start_here(), self.start_here()
        self.assert_admitted(3, 3)
        with self.without_beats(two):
            self.redis.ask("FLUSHALL")
            self.is_back(one)
            self.address = self.proxies[0]
            self.assert_admitted(1, 1)
            seen, = two.seen()
            one.redis.loop.call_soon_threadsafe(
                one.give, seen.rule, seen.key, 5, time.monotonic() + 60)
            wait_for(lambda: max(self.stored(), default=0) >= 5)
            self.notice_loss(two)
        self.assertEqual(self.stored(), [11])

    def test_what_is_charged_between_two_losses_is_not_forgotten_when_others_put_back(self):
        """The second proxy does not notice the first loss."""
        for order in self.each(((0, 1), (1, 0))):
            self.proxies = []
            both = one, _ = self.start_here(), self.start_here()
            one.LOOKS = 0  # it knows nothing of what the second one lets in
            self.assert_admitted(3, 3)
            self.address = self.proxies[0]
            with self.without_beats(*both):
                self.redis.ask("FLUSHALL")
                self.notice_loss(one)
                self.assert_admitted(1, 1)
                self.is_back(one)
                self.redis.ask("FLUSHALL")
                for place in order:
                    self.notice_loss(both[place])
                self.assert_admitted(1, 1)
                self.is_back(one)
            self.assertEqual(self.stored(), [5])
            self.redis.ask("FLUSHALL")

    def test_no_charge_is_put_back_twice_however_often_all_is_lost(self):
        one, stub = self.start_here(), self.stub
        two = self.start_here()
        one.LOOKS = 0
        self.assert_admitted(3, 3)
        self.address = self.proxies[0]
        with self.without_beats(one, two):
            for status, left in self.each("""[
                    ["200 OK", 6], ["200 OK", 5], ["200 OK", 4], ["", 4], ["503 No", 4]]"""):
                stub.answer = says(b"{}", status)
                if status:
                    self.assert_status(int(status[:3]))
                self.is_back(one)
                self.redis.ask("FLUSHALL")
                for buckets in (one, two):
                    self.notice_loss(buckets)
                self.assertEqual(self.stored(), [left])

    @contextmanager
    def without_beats(self, *stores):
        """Meanwhile none of these does anything by itself."""
        with ExitStack() as stack:
            for buckets in stores:
                stack.enter_context(patch.object(buckets, "BEAT_SECONDS", PATIENCE))
                vars(buckets.redis).update(RedisCase.PATIENT)  # it notices no loss by being slow
            for buckets in stores:
                loop = buckets.redis.loop
                wait_for(lambda: buckets.beat_timer.when() > loop.time() + 1)
            yield

    def notice_loss(self, buckets):
        lost, loop = buckets.redis.lost, buckets.redis.loop
        loop.call_soon_threadsafe(buckets.beat_timer.cancel)
        loop.call_soon_threadsafe(buckets.beat)
        wait_for(lambda: buckets.redis.lost is not lost and is_done(buckets))

    def give_at(self, buckets, amount, seconds):
        """Gives more to the key of start_for_ann, at this proxy."""
        buckets.redis.loop.call_soon_threadsafe(
            buckets.give, self.proxy.limits.rules[0], (self.RULE, self.ANN), amount,
            time.monotonic() + seconds)

    ANN = "key", hashlib.sha256(b"sk-1").digest()

    def start_for_ann(self):
        return self.start_here(PROXY_API_KEYS="ann=sk-1")

    def assert_given(self, buckets, level, *gifts):
        """So much is there and stored, of it these gifts, (amount, seconds) each."""
        self.is_back(buckets)
        self.wait_for_stored(level)
        wait_for(lambda: [[(amount, round(until - time.monotonic(), -1)) for amount, until in row]
                          for row in buckets.given.values()] == [list(gifts)])

    def test_each_gift_is_put_back_once_with_its_own_end(self):
        buckets = self.start_for_ann()
        self.assert_admitted(1, 1, "sk-1")
        for amount, seconds, level in self.each(((5, 600, 14), (7, 3600, 21))):
            self.give_at(buckets, amount, seconds)
            self.wait_for_stored(level)
        gifts = (5, 600), (7, 3600)
        self.redis.ask("FLUSHALL")
        self.assert_given(buckets, 21, *gifts)
        self.redis.kill()
        self.is_away(buckets)
        self.give_at(buckets, 3, 1800)
        self.redis.start()
        self.assert_given(buckets, 24, *gifts, (3, 1800))
        self.assert_admitted(24, 26, "sk-1")

    def test_running_calls_of_all_count_and_those_of_a_dead_process_end(self):
        rules = "each 3 running"
        self.start_here(None, rules)
        running = [self.ask_stub() for _ in range(2)]
        self.start_here(None, rules)
        running.append(self.ask_stub())
        self.assertIn(b"3 running already", self.ask().body)
        name, = self.redis.ask("KEYS", "*:r:*")
        rows = self.redis.ask("GET", name).split()
        self.assertEqual(sorted(rows[1::3]), [b"1", b"2"])
        self.assertLessEqual(self.redis.ask("PTTL", name), 31000)
        for client, asked in running:
            asked.answer()
            client.head()
        wait_for(lambda: not self.redis.ask("KEYS", "*:r:*"))
        self.redis.ask("SET", name, "dead 3 1")  # it has said nothing for 30 s
        for client, asked in [self.ask_stub() for _ in range(3)]:
            asked.answer()
            client.head()

    def test_a_box_that_starts_while_redis_is_away_knows_how_many_there_were(self):
        path = new_path(self, "one.db")
        self.start_here(DATABASE=path)
        ledger = self.proxy.books.ledger
        self.start_here()
        wait_for(lambda: ledger.database.facts.get("processes") == 2)
        ledger.close(PATIENCE)
        self.redis.kill()
        for settings, admitted in self.each((({"DATABASE": path}, 5), ({"PEERS": 3}, 3))):
            self.is_away(self.start(**settings))
            self.assert_admitted(admitted, 7)

    def test_wherever_one_comes_to_a_cluster_of_three_nodes_it_is_one_store(self):
        wait_for(lambda: all(b"cluster_state:ok" in node.ask("CLUSTER", "INFO")
                             and b"known_nodes:3" in node.ask("CLUSTER", "INFO")
                             for node in self.nodes), "the cluster")
        for node, admitted in zip(self.nodes, (4, 4, 2)):
            buckets = self.start_here(REDIS_URL=node.url)
            buckets.redis.STEADY_SECONDS = 0
            self.assert_admitted(admitted, 4)
            lost = buckets.redis.lost
            for one in self.nodes:
                one.ask("CLIENT", "KILL", "TYPE", "normal")
            wait_for(lambda: buckets.redis.lost is not lost)
            self.is_back(buckets)
            self.assertNotIn("goes by its share", self.lines.text())


@needs_redis
class BalanceInRedisTest(BalanceTest):
    """The same with three proxies, while their connections to Redis are cut again and again: what
    Redis has is, to the unit, what all ledgers say."""
    RULES = ("each 1 requests per 365d burst 1000000; each 1 tokens per 365d burst 1000000000;"
             "all 1000 running; key:k1 1 output_tokens per 365d burst 900000;"
             "all 0.000001 usd per 365d burst 5000;"
             "address 1 input_tokens per 365d burst 1000000000;"
             "model:gpt-4o* 1 requests per 365d burst 500000")
    MONEY = "all 0.000001 usd per 365d burst 5000"

    def connect(self):
        self.address = random.choice(self.addresses)
        return super().connect()

    def missing(self):
        rules = {llm_proxy.short_digest(rule.text): rule for rule in self.proxy.limits.rules}
        found = []
        for name in self.redis.ask("KEYS", "*:b:*"):
            rule = rules[name.decode().rpartition(":")[2]]
            level = int(self.redis.ask("GET", name).split()[0])
            capacity = llm_proxy.stored_amount(rule, rule.capacity)
            scale = llm_proxy.NANODOLLAR if rule.unit == llm_proxy.USD else 1
            found.append((rule.text, scale * (capacity - level)))
        return found

    def start_three(self):
        """Returns the server and the path of the ledger of each."""
        self.redis, self.addresses, started = RedisServer(self), [], []
        for _ in range(3):
            path = new_path(self, "calls.db")
            self.start_balanced(DATABASE=path, REDIS_URL=self.redis.url)
            started.append((self.server, path))
            self.addresses.append(self.address)
            wait_for(lambda: self.proxy.limits.buckets.state == "here")
        return started

    def close_when_done(self, server):
        wait_for(lambda: not server.open, "the end of every call")
        buckets = server.proxy.limits.buckets
        # A call may have its slot until its upstream has closed.
        wait_for(lambda: is_done(buckets) and not (buckets.pending or buckets.running), "Redis")
        server.proxy.books.close(PATIENCE)

    def test_every_bucket_lacks_exactly_what_the_ledger_says(self):
        started, over = self.start_three(), Event()

        def cut():
            while not over.wait(0.1):
                self.redis.ask("CLIENT", "KILL", "TYPE", "normal")
        with threads([cut]):
            self.converse_all()
            over.set()
        for server, _ in started:
            self.close_when_done(server)
        self.assert_balance([row for _, path in started for row in self.rows(path)],
                            sorted(self.missing()))


@needs_redis
class SharedQueueTest(RedisCase):
    """Lines of several processes before slots that they share."""

    def setUp(self):
        super().setUp()
        self.server = RedisServer(self)
        self.queues, self.clients = [], []
        self.patch_seconds(SharedQueue_TELL_MS=0)

    def queue(self, most=1, waiting=100, part=lambda most: 1):
        redis = self.client(self.server.url)
        self.clients.append(redis)
        limits = llm_proxy.QueueLimits(waiting, 20, 30)
        queue = llm_proxy.SharedQueue(most, limits, time, redis, "{t}:slots:x", part)
        self.queues.append(queue)
        self.wait_for(lambda: redis.available)
        return queue

    def running(self):
        return [queue.running for queue in self.queues]

    def wait_until(self, *running):
        self.wait_for(lambda: self.running() == list(running))

    def taken(self):
        rows = self.server.ask("HVALS", "{t}:slots:x:taken")
        return sum(int(row.split()[0]) for row in rows)

    def rest(self):
        """Lets what is asked come to its end."""
        self.run_loop(asyncio.sleep(0.05))

    def test_never_more_run_than_there_are_slots_and_all_come_to_run(self):
        queues = [self.queue(3) for _ in range(3)]
        left = [queue.enter("k%d" % (number % 4), 1) for number in range(12) for queue in queues]
        while left:
            self.wait_for(lambda: sum(self.running()) == min(3, len(left)))
            self.assertLessEqual(self.taken(), 3)
            running = [ticket for ticket in left if ticket.running]
            self.assertEqual(len(running), min(3, len(left)))
            running[0].leave()
            left.remove(running[0])
        self.wait_for(lambda: not self.taken())

    def test_the_process_that_waited_for_longer_comes_first(self):
        first, second = self.queue(), self.queue()
        ticket = first.enter("a", 1)
        self.wait_until(1, 0)
        second.enter("b", 1)
        self.rest()
        first.enter("a", 1)
        self.rest()
        ticket.leave()
        self.wait_until(0, 1)

    def test_a_call_that_comes_while_another_one_gets_its_slot_is_asked_for_too(self):
        queue = self.queue(2)
        ask = queue.redis.ask

        def ask_and_enter(*arguments):
            ask(*arguments)
            queue.redis.ask = ask
            queue.enter("b", 1)
        queue.redis.ask = ask_and_enter
        queue.enter("a", 1)
        self.wait_until(2)

    def test_slots_of_a_dead_process_come_back_and_those_of_a_living_one_stay(self):
        self.patch_seconds(SharedQueue_HOLDS_MS=200)
        first, second = self.queue(2), self.queue(2)
        tickets = [one.enter("a", 1) for one in (first, second)]
        self.wait_until(1, 1)
        tickets.append(second.enter("b", 1))
        # The second tells meanwhile that it is there, and the first does not.
        self.wait_for(lambda: second.tell_soon() or self.running() == [1, 2])
        first.tell_soon()  # it was not dead but slow: nobody is cut
        self.wait_for(lambda: self.taken() == 3)
        tickets[1].leave()
        second.enter("c", 1)
        self.rest()
        self.assertEqual(self.running(), [1, 1])

    def test_while_redis_is_away_each_has_its_part(self):
        first, second = self.queue(4, part=lambda most: most // 2), self.queue(4)
        tickets = [first.enter("a", 1) for _ in range(6)]
        self.wait_until(4, 0)
        self.server.kill()
        self.wait_for(lambda: not any(one.available for one in self.clients))
        second.enter("b", 1)
        self.wait_until(4, 1)
        for ticket in tickets[:3]:
            ticket.leave()
        self.assertEqual(self.running(), [2, 1])
        self.server.start()
        self.wait_for(lambda: all(one.available for one in self.clients))
        self.wait_until(3, 1)
        self.assertEqual(self.taken(), 4)

    def test_while_redis_is_late_nobody_gets_a_slot_that_is_taken_and_each_waits_on(self):
        first, second = self.queue(2), self.queue(2)
        tickets = [first.enter("a", 1) for _ in range(2)]
        self.wait_until(2, 0)
        second.tell_soon()
        self.rest()
        with patch.object(second.redis, "ask", side_effect=self.too_late) as ask:
            second.enter("b", 1)
            self.wait_for(lambda: ask.call_count > 1)
            second.enter("c", 1)
            self.assertEqual(self.running(), [2, 0])
        tickets[0].leave()
        self.wait_until(1, 1)

    @staticmethod
    def too_late(answer, *_):
        answer(RedisFault("answers late"))

    def test_while_redis_is_late_each_has_what_is_free_of_its_part(self):
        self.SECONDS = {**self.SECONDS, "ANSWER_SECONDS": 0.08}
        first, second = [self.queue(3, part=lambda most: 2) for _ in range(2)]
        first.enter("a", 1)
        self.wait_until(1, 0)
        second.tell_soon()
        self.rest()
        self.server.process.send_signal(signal.SIGSTOP)
        for _ in range(3):
            second.enter("b", 1)
        self.wait_until(1, 2)
        self.server.process.send_signal(signal.SIGCONT)
        self.wait_for(lambda: self.taken() == 3)

    def test_a_connection_that_is_cut_costs_no_slot(self):
        queue = self.queue(2)
        ticket = queue.enter("a", 1)
        self.wait_until(1)
        self.server.ask("CLIENT", "KILL", "TYPE", "normal")
        self.wait_for(lambda: self.left and queue.redis.available)
        queue.enter("b", 1)
        self.wait_until(2)
        self.assertEqual(self.taken(), 2)
        ticket.leave()
        self.wait_for(lambda: self.taken() == 1)

    def test_slots_that_redis_forgets_are_told_again_and_nobody_has_more_than_its_part_before(self):
        first, second = [self.queue(3, part=lambda most: 1) for _ in range(2)]
        tickets = [first.enter("a", 1) for _ in range(3)]
        self.wait_until(3, 0)
        self.patch_seconds(SharedQueue_TELL_MS=60_000)
        self.server.ask("FLUSHALL")
        for _ in range(2):
            second.enter("b", 1)
        self.wait_until(3, 1)
        first.tell_soon()
        self.wait_for(lambda: self.taken() == 4)
        for ticket in tickets[:2]:
            ticket.leave()
        self.rest()
        self.assertEqual(self.running(), [1, 1])
        self.patch_seconds(SharedQueue_TELL_MS=0)
        self.wait_until(1, 2)

    def test_who_finds_no_slot_waits_only_where_it_may(self):
        queue = self.queue(1, waiting=0)
        tickets = [queue.enter("a", 1) for _ in range(3)]
        self.wait_for(lambda: [ticket.left for ticket in tickets] == [False, True, True])
        self.wait_for(lambda: not queue.short)  # which nobody knows for long
        late = queue.enter("b", 1)
        self.wait_for(lambda: late.left)
        tickets[0].leave()
        self.wait_for(lambda: not queue.short)
        queue.enter("b", 1)
        self.wait_until(1)

    def test_who_leaves_while_redis_is_asked_takes_no_slot_along(self):
        queue = self.queue()
        queue.enter("a", 1).leave()
        self.rest()
        self.assertEqual((self.taken(), self.running(), queue.most), (0, [0], 0))


@needs_redis
class SharedKeysTest(KeysCase):
    """Keys of several boxes, each with a DATABASE of its own."""

    def setUp(self):
        self.redis = RedisServer(self)
        self.assertLess(llm_proxy.SharedKeys.LOOK_SECONDS, 0.5)
        self.patch_seconds(SharedKeys_LOOK_SECONDS=0.03)
        self.boxes = []

    def box(self):
        path = new_path(self, "box.db")
        self.start_box(path)
        return self.boxes[-1]

    def start_box(self, path):
        self.start(DATABASE=path, REDIS_URL=self.redis.url, PROXY_API_KEYS="x")
        self.boxes.append((self.proxy, self.address, path))

    def keys(self, path, act, *arguments, **fields):
        return getattr(self.store(path, time), act)(*arguments, **fields)

    def until(self, secret, *statuses):
        """Waits until the boxes answer so to calls with a key."""
        def found():
            result = []
            for _, self.address, _ in self.boxes:
                status = self.ask(secret).status
                result.append(401 if status == 429 else status)  # which was asked for too often
            return tuple(result)
        wait_for(lambda: found() == statuses, "%r of all" % (statuses,))

    def test_what_is_done_with_a_key_on_one_box_holds_on_all_within_a_second(self):
        (_, _, here), (_, _, there) = self.box(), self.box()
        wait_for(lambda: all(proxy.redis.available for proxy, _, _ in self.boxes))
        secret = self.keys(here, "add", "ann", team="red").secret
        self.until(secret, 200, 200)
        for path, act, statuses in self.each((
                (there, "revoke", (401, 401)), (here, "restore", (200, 200)),
                (here, "remove", (401, 401)))):
            self.keys(path, act, "ann")
            self.until(secret, *statuses)
        what = [row[0] for row in self.execute("SELECT what FROM audit ORDER BY id", path=there)]
        self.assertEqual(what, ["add key", "revoke key", "restore key", "remove key"])

    def test_the_last_change_counts_though_the_clock_of_the_one_before_was_ahead(self):
        (_, _, here), (_, _, there) = self.box(), self.box()
        wait_for(lambda: all(proxy.redis.available for proxy, _, _ in self.boxes))
        self.execute("CREATE TRIGGER ahead AFTER INSERT ON audit BEGIN"
                     " UPDATE audit SET time = time + 60 WHERE id = new.id; END", path=here)
        secret = self.keys(here, "add", "ann").secret
        self.until(secret, 200, 200)
        self.keys(there, "revoke", "ann")
        self.until(secret, 401, 401)

    def test_a_box_that_starts_while_redis_is_away_goes_by_its_copy(self):
        self.box(), self.box()
        wait_for(lambda: all(proxy.redis.available for proxy, _, _ in self.boxes))
        secret = self.keys(self.boxes[0][2], "add", "ann").secret
        self.until(secret, 200, 200)
        self.redis.kill()
        path = self.boxes.pop()[2]
        self.close_books()
        self.start_box(path)
        self.until(secret, 200, 200)
        self.keys(path, "revoke", "ann")
        self.until(secret, 200, 401)
        self.redis.start()  # and it has forgotten all
        self.until(secret, 401, 401)

    def test_what_nobody_of_us_has_written_is_no_key(self):
        proxy, _, path = self.box()
        wait_for(lambda: proxy.redis.available)
        row = '"created": 1.0, "disabled": 0, "role": "caller", "subject": "%s"' % ("00" * 32)
        for record, in self.each("""
                NOTHING
                {
                []
                [[], [], []]
                [[9e9, GOOD], ["ann"], []]
                [[9e9, "a", "b", "c", "give", "ann", ""], [{"name": "ann", ROW}], []]
                [[9e9, GOOD], [{"name": "ann", ROW, "subject": "00"}], []]
                [[9e9, GOOD], [{"name": "a b", ROW}], []]
                [[9e9, GOOD], [{"name": "ann", ROW}], [["xx", null]]]
                [[[], GOOD], [{"name": "ann", ROW}], []]""".replace(
                    "GOOD", '"a", "b", "c", "add key", "ann", ""').replace("ROW", row)):
            record = record.replace("NOTHING", "")
            self.redis.ask("HSET", "{llm_proxy}:keys", "ann", "9000000000.0 " + record)
            self.redis.ask("INCR", "{llm_proxy}:keys:changes")
        self.keys(path, "add", "ben")
        wait_for(lambda: self.redis.ask("HEXISTS", "{llm_proxy}:keys", "ben"))
        self.assertEqual([key.name for key in self.keys(path, "list")], ["ben"])


@needs_redis
class SharedSumsTest(ProxyCase):
    """Books of several boxes, each with a DATABASE of its own."""

    def setUp(self):
        self.redis = RedisServer(self)

    def box(self, path=None, **settings):
        path = path or new_path(self, "box.db")
        settings = {"REDIS_URL": self.redis.url, **settings}
        self.start(says({"usage": {"prompt_tokens": 20, "completion_tokens": 3}}),
                   DATABASE=path, PROXY_API_KEYS="ann=sk-a", **settings)
        wait_for(lambda: not self.proxy.redis or self.proxy.redis.available)
        return self.address, path

    def call_at(self, box, count):
        self.address, _ = box
        for _ in range(count):
            self.ask("sk-a")

    @staticmethod
    def totals(path):
        now = time.time()
        found = LedgerReader(path).totals("caller", now - 900, now + 1)
        return [(name, one.calls, one.tokens()) for name, one in found.items()]

    def assert_told(self, calls, *boxes):
        for _, path in boxes:
            wait_for(lambda: self.totals(path) == [("ann", calls, 23 * calls)],
                     lambda: self.totals(path))

    def test_each_box_tells_what_all_have_used_and_keeps_the_rows_of_its_own_calls(self):
        one, two = self.box(), self.box()
        self.call_at(one, 3)
        self.call_at(two, 2)
        self.assert_told(5, one, two)
        for _, path in one, two:
            reader = LedgerReader(path, time.time())
            with closing(sqlite3.connect(path)) as connection:
                (own,), = connection.execute("SELECT count(*) FROM calls").fetchall()
            self.assertEqual(len(reader.calls(None, 9, {"caller": "ann"})["calls"]), own)
            found = reader.usage("caller", "hour", reader.now - 900, reader.now, {})
            self.assertEqual(found["total"]["calls"], 5)
            options = SimpleNamespace(since="1d", by=None, id=None, caller=None)
            with redirect_stderr(io.StringIO()) as said:
                _, (row,) = read_usage(path, options, time.time())
            self.assertEqual((row[:2], said.getvalue()),
                             (("ann", 5), "with what 1 other boxes have told\n"))

    def test_a_box_that_has_sums_from_before_it_shared_any_tells_those_too_and_once(self):
        two = self.box()
        one = self.box(REDIS_URL="")
        self.call_at(one, 3)
        self.assert_told(3, one)
        for _ in range(2):
            self.close_books()
            one = self.box(one[1])
            self.assert_told(3, one, two)

    def test_what_was_used_while_redis_or_a_box_was_away_is_told_later_and_once(self):
        one, two = self.box(), self.box()
        self.call_at(two, 2)
        self.assert_told(2, one, two)
        self.redis.kill()
        self.call_at(one, 1)
        self.call_at(two, 1)
        self.assert_told(3, one, two)
        self.redis.start()
        self.assert_told(4, one, two)
        two = self.box(two[1])  # which is started again
        self.patch_seconds(SharedSums_AT_ONCE=1)
        self.call_at(one, 1)
        self.call_at(two, 1)
        self.assert_told(6, one, two)

    def test_sums_of_which_nobody_knows_whether_they_were_told_are_told_again(self):
        async def late(*arguments):
            await ask(*arguments)
            raise RedisFault("answers late")
        one, two, ask = self.box(), self.box(), Redis.call
        with patch.object(Redis, "call", late):
            self.call_at(one, 2)
            wait_for(lambda: self.redis.ask("XLEN", "{llm_proxy}:sums") > 1)
        self.assert_told(2, one, two)

    def test_a_file_in_the_place_of_another_tells_its_sums_by_higher_numbers(self):
        """By lower ones the others would take them for sums that they know."""
        moment = time.time_ns() // 10 ** 6
        database = Database(new_path(self, "box.db"))
        for before in range(2):
            database.begin_to_tell()
            database.insert("INSERT INTO untold(sum) VALUES %s", [["[]"]])
            number = database.untold(9)[before][0]
            self.assertTrue(moment < number < moment + 60_000, number)
        database.close()

    def test_as_many_sums_wait_to_be_told_as_there_is_room_for_whatever_their_numbers(self):
        database = Database(new_path(self, "box.db"))
        database.insert(database.TELL, [["before"]])
        database.begin_to_tell()  # from a higher number on
        added = [[0, *"abcde", *[1] * 13]]
        database.MOST_UNTOLD = 2
        for first in self.each(("before", json.dumps(added[0]))):
            database.add_sums(added, {}, added)
            self.assertEqual((len(database.untold(9)), database.untold(1)[0][1]), (2, first))
        database.close()

    def test_what_is_no_sum_is_left_out(self):
        one, add = self.box(), partial(self.redis.ask, "XADD", "{llm_proxy}:sums", "*")
        counts = [*"abcde", *[1] * 13]
        good = [0, *counts]
        for row in self.each(("", "{", "{}", "[]", "[" * 9999, good[:-1],
                              [*good[:-1], -1], [*good[:-1], "1"],
                              [*good[:-1], 10 ** 19], [1.5, *counts], [None, *counts])):
            text = row if type(row) is str else json.dumps(row)
            add("other", "1 " + text)
            add("other", text, "and", "more")
        add("another", "1 " + json.dumps([int(time.time() // 900) * 900, *counts]))
        wait_for(lambda: self.totals(one[1]) == [("a", 1, 2)], lambda: self.totals(one[1]))


@needs_redis
class SharedStoredTest(ProxyCase):
    """What one process has noted, another one finds."""
    KEYS = {"PROXY_API_KEYS": "ann=sk-a,ben=sk-b"}

    def start_two(self, **settings):
        """Two proxies before one stub."""
        self.patch_seconds(**RedisCase.EVERYWHERE)
        redis, self.addresses = RedisServer(self), []
        super().start(**self.KEYS, REDIS_URL=redis.url, **settings)
        self.addresses.append(self.address)
        self.proxies = [self.proxy]
        wait_for(lambda: self.proxy.redis.available)
        self.run_another()
        self.addresses.append(self.address)
        self.proxies.append(self.proxy)
        wait_for(lambda: self.proxy.redis.available)
        return redis

    def ask_at(self, place, *arguments, **options):
        self.address = self.addresses[place]
        return self.ask(request(*arguments, **options))

    def test_who_made_a_thing_has_it_everywhere_and_nobody_else(self):
        redis = self.start_two()
        self.stub.answer = says({"id": "file-1"})
        self.ask_at(0, "POST", "/v1/files", b"x", key="sk-a")
        wait_for(lambda: redis.ask("KEYS", "*:thing:*"))
        for place, key, status in self.each("""[
                [1, "sk-b", 404], [1, "sk-a", 200], [0, "sk-b", 404], [0, "sk-a", 200]]"""):
            self.assertEqual(self.ask_at(place, "GET", "/v1/files/file-1", key=key).status, status)
        body = b'{"model": "m", "previous_response_id": "resp_1", "input": "hi"}'
        self.stub.answer = says({"id": "resp_1"})
        self.assertEqual(self.ask_at(1, "POST", "/v1/responses", body, key="sk-a").status, 404)
        self.ask_at(0, "POST", "/v1/responses", b'{"model": "m", "input": "hi"}', key="sk-a")
        wait_for(lambda: len(redis.ask("KEYS", "*:thing:*")) == 2)
        for key, status in self.each("""[["sk-b", 404], ["sk-a", 200]]"""):
            self.assertEqual(self.ask_at(1, "POST", "/v1/responses", body, key=key).status, status)

    def test_that_a_limit_is_near_is_told_by_one_alone(self):
        redis = self.start_two(LIMITS="each 400 tokens per day", WARN_AT="20%,60%",
                               TOKEN_COST_MODE="usage", MAX_TOKENS=1)
        self.stub.answer = says(completion(80, 5))
        for place, told in self.each("""[[0, [1, 0]], [1, [1, 0]], [0, [2, 0]], [1, [2, 1]]]"""):
            self.ask_at(place, "POST", CHAT, b'{"max_tokens": 1}', key="sk-a")
            wait_for(lambda: [sum(b'data: {"event": "limit_near"' in one
                                  for one in list(proxy.watchers.feed.events))
                              for proxy in self.proxies] == told)
            wait_for(lambda: redis.process is None or all(
                is_done(proxy.limits.buckets) for proxy in self.proxies))
            if told == [2, 0]:
                self.assertEqual([0 < redis.ask("TTL", name) <= 3600 for name in redis.ask(
                    "KEYS", "*:told:*")], [True] * 2)
                redis.kill()
                wait_for(lambda: not self.proxies[1].redis.available)

    def start_owing(self):
        """Has a call in the background made, of which 500 tokens are held."""
        redis = self.start_two(LIMITS="each 100000 tokens per day")
        self.stub.answer = says({"id": "resp_1", "usage": None})
        self.ask_at(0, "POST", "/v1/responses", b'{"background": true, "max_output_tokens": 500}',
                    key="sk-a")
        wait_for(lambda: redis.ask("KEYS", "*:bill:*"), "the bill")
        return redis

    def left(self, redis):
        return [redis.ask("GET", name).split()[0] for name in redis.ask("KEYS", "*:b:*")]

    POLL = request("GET", "/v1/responses/resp_1", key="sk-a")
    USED = {"usage": {"input_tokens": 20, "output_tokens": 3000}}

    def test_a_call_in_the_background_is_charged_once_whoever_is_asked(self):
        redis, ask = self.start_owing(), Redis.call

        async def late(*arguments):
            await ask(*arguments)
            raise RedisFault("answers late")
        for place, told, left, answer in self.each((
                (1, self.USED, 99500, late), (1, {"status": "queued"}, 99500, ask),
                (0, {"usage": None}, 99500, ask), (1, self.USED, 96980, late),
                (0, self.USED, 96980, ask), (1, self.USED, 96980, ask))):
            wait_for(lambda: redis.ask("KEYS", "*:bill:*") or left == 96980, "the bill")
            self.stub.answer = says(told)
            with patch.object(Redis, "call", answer):
                self.ask_at(place, "GET", "/v1/responses/resp_1", key="sk-a")
            wait_for(lambda: self.left(redis) == [b"%d" % left], left)
        wait_for(lambda: not redis.ask("KEYS", "*:bill:*"))

    def test_batches_and_runs_of_evals_are_settled_by_whoever_is_asked(self):
        """What ends without usage costs what was held."""
        redis = self.start_two(LIMITS="each 100000 tokens per day")
        self.stub.answer = says({"id": "eval_1"})
        self.ask_at(0, "POST", "/v1/evals", b"{}", key="sk-a")
        used = {"per_model_usage": [{"prompt_tokens": 20, "total_tokens": 70}]}
        for path, name, told, left in self.each((
                ("/v1/batches", "b", {"object": "batch", "status": "completed"}, b"99400"),
                ("/v1/evals/eval_1/runs", "r", {"status": "completed", **used}, b"99330"))):
            self.stub.answer = says({"id": name})
            self.ask_at(0, "POST", path, b'{"max_tokens": 600}', key="sk-a")
            wait_for(lambda: redis.ask("KEYS", "*:bill:*"), "the bill")
            self.stub.answer = says(told)
            self.ask_at(1, "GET", f"{path}/{name}", key="sk-a")
            wait_for(lambda: not redis.ask("KEYS", "*:bill:*"))
            wait_for(lambda: self.left(redis) == [left])

    def polled(self):
        """Returns the entries of what asked for results, at both processes."""
        return [entry for proxy in self.proxies
                for entry in proxy.books.log.stream.entries() if entry["method"] == "GET"]

    def test_of_calls_that_ask_at_once_one_is_charged_whichever_is_told(self):
        for places, order, told in self.each("""[
                [[0, 0], [1, 0], [0]], [[0, 0], [0, 1], [1]], [[0, 0], [1, 0], [0, 1]],
                [[0, 0, 0], [1, 2, 0], [0, 2]]]"""):
            redis, polls = self.start_owing(), []
            self.stub.answer = None
            for place in places:
                self.address = self.addresses[place]
                polls.append(self.ask_stub(self.POLL))
            for number in order:
                client, asked = polls[number]
                asked.answer(self.USED if number in told else {"usage": None})
                client.head()
            wait_for(lambda: not redis.ask("KEYS", "*:bill:*"))
            wait_for(lambda: self.left(redis) == [b"96980"])
            for proxy in self.proxies:
                wait_for(lambda: is_done(proxy.limits.buckets))
            self.assertEqual(self.left(redis), [b"96980"])
            wait_for(lambda: len(self.polled()) == len(order), "what is written down")
            self.assertEqual([one["input"] for one in self.polled() if one["input"]], [20])


# --------------------------------------------------------------------------------------------------
# Proxy: what a call costs, and how it ends
# --------------------------------------------------------------------------------------------------

class SettlingTest(LedgerCase):
    """What was held becomes what was used. Estimated are 3 tokens of prompt, and the maximum."""
    WHOLE = events(delta("hello"), LAST_DELTA, USAGE_EVENT, "[DONE]")
    SEEN = events(delta("hello"), LAST_DELTA, "[DONE]")  # without the event that we asked for

    def start(self, answer=says(), **settings):
        super().start(answer, **{"TOKEN_COST_MODE": "usage", **settings})

    def assert_used(self, answered, *used):
        """Tokens of input and of output, and whether they are estimated."""
        fields = "x-llm-input-tokens: %s", "x-llm-output-tokens: %s", "x-llm-estimated: %s"
        self.assert_fields(answered, *[field % one for field, one in zip(fields, used)])

    def test_a_surplus_is_given_back_and_a_shortfall_is_a_debt(self):
        for used in self.each("""[[20, 4], [1, 1], [900, 600]]"""):
            self.start(says(completion(*used)))
            level = 1000 - sum(used)
            left = max(0, level)
            self.assert_status(200, call(max_tokens=50), "x-ratelimit-remaining: %d" % left)
            self.assertEqual([*levels(self.proxy).values()], [level])
            self.assert_ending("ok", left)
            self.assertFalse(self.entry()["estimated"])

    def test_an_input_of_which_only_what_was_in_a_cache_is_told_is_estimated_as_that_at_least(self):
        for cached, charged in self.each(((9, "9"), (1, "3"))):
            self.start(says({"usage": {
                "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": cached}}}))
            self.assert_used(self.assert_status(200), charged, "4", "true")

    # The call, its answer, its path, where the answer is polled
    POLLED = """[
        [{"background": true, "max_output_tokens": 500}, {"id": "resp_1", "usage": null},
         "/v1/responses", "/v1/responses/resp_1"],
        [{"deferred": true, "max_tokens": 500}, {"request_id": "r-1"},
         "/v1/chat/completions", "/v1/chat/deferred-completion/r-1"],
        [{"background": true, "generation_config": {"max_output_tokens": 500}}, {"id": "v1_x"},
         "/v1beta/interactions", "/v1beta/interactions/v1_x"]]"""

    def test_a_call_in_the_background_is_settled_once_when_its_usage_is_told(self):
        used = {"input_tokens": 20, "output_tokens": 3,
                "total_input_tokens": 20, "total_output_tokens": 3}
        for body, answered, path, poll in self.each(self.POLLED):
            self.start(says(answered))
            self.post(path, body)
            self.assert_ending("ok", 500)
            for number, (told, left) in enumerate((
                    ({"status": "queued"}, 500), ({"usage": None}, 500),
                    ({"usage": used}, 1000 - 23), ({"usage": used}, 1000 - 23)), 1):
                self.stub.answer = says(told)
                self.get(poll)
                self.assert_ending("ok", left, number)
            self.assertEqual([row["charges"].rpartition("=")[2] for row in self.rows(self.path)],
                             ["500", "", "", "-477", ""])
            self.assertEqual([row["input"] for row in self.rows(self.path)], [0, 0, 0, 20, 0])

    # What is told where the answer is asked for, each in turn; what is charged at last. @ is a text
    # of ten tokens.
    ENDED = """[
        [[{"status": "failed", "error": {"code": "server_error"}}], 0],
        [[{"status": "failed", "error": {"code": "invalid_image"}}], 0],
        [[{"status": "cancelled"}], 0], [[{"status": "incomplete"}, {"status": "failed"}], 0],
        [[{"status": "in_progress"}], 500], [[{"status": ["failed"]}], 500],
        [[{"status": "IN_PROGRESS"}, {"status": "FAILED"}], 0],
        [[{"status": "running", "usage": {"input_tokens": 9, "total_tokens": 9}}], 500],
        [[{"status": "cancelled", "output": [{"text": "@"}]}], 10],
        [[{"status": "in_progress", "text": "@@@@@@@@@@"}, {"status": "failed"}], 100],
        [[{"status": "completed", "text": "%s"}], 500]]""" % ("@" * 100)

    def test_a_call_in_the_background_that_ends_without_usage_is_charged_what_was_seen(self):
        for told, charged in self.each(self.ENDED.replace("@", "x" * 40)):
            self.start(says({"id": "resp_1", "usage": None}))
            body = b'{"background": true, "max_output_tokens": 500}'
            self.post("/v1/responses", body)
            for number, payload in enumerate(told, 1):
                for path in ("/v1/responses/resp_1/input_items", "/v1/responses/resp_1"):
                    self.stub.answer = says({"id": "resp_1", **payload})
                    self.get(path)
            self.assertEqual(1000 - self.left(), charged)

    BATCHES = [  # path, body, what is answered, where it is polled
        ("/v1/messages/batches", {"requests": [{"params": {"max_tokens": 50, "model": "m"}}] * 10},
         {"id": "msgbatch_1"}, "/v1/messages/batches/msgbatch_1"),
        ("/v1beta/models/m:batchGenerateContent", {"batch": {"requests": [
            {"request": {"generationConfig": {"maxOutputTokens": 50}}}] * 10}},
         {"name": "batches/b1", "metadata": {}}, "/v1beta/batches/b1"),
        ("/v1/evals/e/runs", {"data_source": {"sampling_params": {"max_completion_tokens": 600}}},
         {"id": "evalrun_1", "status": "queued"}, "/v1/evals/e/runs/evalrun_1"),
        ("/v1/batch/jobs", {"requests": [{"body": {"max_tokens": 600}}]},
         {"id": "j1", "status": "QUEUED"}, "/v1/batch/jobs/j1"),
        ("/async/chat/completions", {"request": {"max_tokens": 600}},
         {"id": "t1", "status": "CREATED"}, "/async/chat/completions/t1")]

    def test_a_batch_is_charged_what_its_calls_may_use_until_that_is_told(self):
        for path, body, answered, poll in self.each(self.BATCHES):
            self.start(says(answered))
            self.post(path, body)
            self.assertLess(self.left(), 500)
            self.stub.answer = says({
                "usageMetadata": {"promptTokenCount": 20, "totalTokenCount": 25},
                "per_model_usage": [{"prompt_tokens": 16, "total_tokens": 20},
                                    {"prompt_tokens": 4, "total_tokens": 5}]})
            self.get(poll)
            self.assert_left(975)

    def test_a_batch_is_charged_what_its_results_tell_together(self):
        path, body, answered, poll = self.BATCHES[0]
        line = {"custom_id": "x", "result": {"type": "succeeded", "message": {
            "content": [{"text": "x" * 9000}], "usage": {"input_tokens": 20, "output_tokens": 5}}}}
        failed = {"custom_id": "y", "result": {"type": "errored", "error": {"type": "error"}}}
        one, other = [{**line, "result": {"message": {**line["result"]["message"], "model": model}}}
                      for model in ("cheap", "dear")]
        for told, left in self.each((
                ([line], 975), ([line, failed, line, line], 925), ([one, line, one], 925),
                ([other, one], 477))):  # as it was held
            self.start(says(answered))
            self.post(path, body)
            self.stub.answer = says(lines_of(*told), "200 OK", "Content-Type: application/x-jsonl")
            for _ in range(2):
                self.get(poll + "/results")
                self.assert_left(left)

    def test_a_part_of_the_results_of_a_batch_settles_nothing(self):
        path, body, answered, poll = self.BATCHES[0]
        line = {"result": {"message": {"usage": {"input_tokens": 20, "output_tokens": 5}}}}
        self.start(says(answered))
        self.post(path, body)
        for status, left in self.each((("206 Partial Content", 477), ("200 OK", 975))):
            self.stub.answer = says(lines_of(line), status, "Content-Type: application/x-jsonl")
            self.get(poll + "/results", "Range: bytes=0-99")
            self.assert_left(left)
            self.assertIsNone(self.stub.last.get("range"))

    def test_a_batch_costs_what_its_model_does_or_the_dearest_that_it_names(self):
        path, _, answered, poll = self.BATCHES[0]
        body = {"requests": [{"params": {"max_tokens": 50, "model": model}}
                             for model in ("claude-haiku-4.5", "claude-opus-4.5")]}
        message = {"usage": {"input_tokens": 1000, "output_tokens": 1000}}
        for model, usd in self.each((("claude-haiku-4.5", 0.006), (None, 0.03))):
            self.start(says(answered), LIMITS="each 1 usd per day")
            self.post(path, body)
            self.stub.answer = says({"result": {"message": {**message, "model": model}}})
            self.get(poll + "/results")
            self.assertAlmostEqual(float(self.left()), 1 - usd, 5)
        body["requests"][0]["params"]["model"] = "nobody-knows"
        self.start(says(answered))
        self.post(path, body)
        self.stub.answer = says({"result": {"message": message}})
        self.get(poll + "/results")
        self.assertEqual(self.row(1)["unpriced"], 1)

    # How a batch is made, what answers that, where it is asked for; what is told then and is left
    ENDED_BATCHES = """[
        ["/v1/batches", {"id": "b"}, "/v1/batches/b",
         [{"object": "batch", "status": "completed"}, 400],
         [{"object": "batch", "status": "expired"}, 400],
         [{"object": "batch", "status": "cancelled"}, 400],
         [{"object": "batch", "status": "in_progress"}, 400],
         [{"object": "batch", "status": "failed"}, 1000]],
        ["/v1/projects/p/batchPredictionJobs", {"name": "projects/p/batchPredictionJobs/b"},
         "/v1/projects/p/batchPredictionJobs/b", [{"state": "JOB_STATE_SUCCEEDED"}, 400],
         [{"state": "JOB_STATE_RUNNING", "error": {"code": 13, "message": "x"}}, 400],
         [{"state": "JOB_STATE_FAILED", "error": {"code": 13, "message": "x"}}, 1000]],
        ["/v1beta/models/m:batchGenerateContent", {"name": "batches/b"}, "/v1/batches/b",
         [{"metadata": {"state": "BATCH_STATE_FAILED"},
           "error": {"code": 13, "message": "x"}}, 1000]]]"""

    def test_a_batch_that_ends_without_usage_costs_what_was_held_but_not_if_it_failed(self):
        for path, answered, poll, *ends in self.each(self.ENDED_BATCHES):
            for told, left in ends:
                self.start(says(answered))
                self.post(path, b'{"max_tokens": 600}')
                self.stub.answer = says({**answered, **told})
                for _ in range(2):
                    self.get(poll)
                self.assertEqual(round(self.left(), -2), left, told)

    def test_an_answer_that_is_owed_for_is_asked_for_plainly(self):
        self.start(says({"id": "resp_1"}))
        self.post("/v1/responses", b'{"background": true}')
        for path in self.each(("/v1/responses/resp_1/", "/v1//responses/resp_1")):
            self.assert_status(404, request("GET", path))
        self.start(says({"id": "resp_1", "usage": None}))
        client = self.connect()
        poll = request("GET", "/v1/responses/resp_1", b"", "Accept-Encoding: br")
        for coding in ("br", "identity"):
            client.answers(200, poll)
            self.assert_fields(self.stub.last, "accept-encoding: " + coding)
            self.post("/v1/responses", b'{"background": true}')

    def test_a_batch_that_names_no_limit_holds_what_one_call_does(self):
        path = "/v1beta/models/m:batchGenerateContent"
        for target, least in self.each(((path, 256), ("/v1/score", 0))):
            self.start(says({"name": "batches/b1"}))
            self.post(target, b'{"x": 1}')
            self.assertEqual(1000 - self.left(), least)

    def test_a_call_in_the_background_runs_no_more_when_its_first_answer_came(self):
        self.start(says({"id": "resp_1"}), LIMITS="each 1 running; each 900 tokens per day")
        body = b'{"background": true, "max_output_tokens": 400}'
        for _ in range(2):
            self.post("/v1/responses", body)
        self.assertEqual(list(levels(self.proxy).values()), [100])

    def test_a_stream_in_the_background_may_tell_its_usage_at_once_or_to_who_takes_it_up(self):
        begun = events({"type": "response.created", "response": {"id": "resp_1"}})
        ended = events({"type": "response.completed", "response": {
            "id": "resp_1", "usage": {"input_tokens": 20, "output_tokens": 3}}})
        body = b'{"background": true, "stream": true, "max_output_tokens": 500}'
        for whole in self.each((True, False)):
            self.start(None)
            client, asked = self.ask_stub(request("POST", "/v1/responses", body))
            asked.stream(begun, *[ended] * whole, end=whole)
            client.head()
            client.expect(begun)
            if whole:
                client.rest()
            client.close()
            self.assert_ending("ok" if whole else "caller_gone", 1000 - 23 if whole else 500)
            client, asked = self.ask_stub(request("GET", "/v1/responses/resp_1?stream=true"))
            asked.stream(ended, end=True)
            client.read("GET")
            self.assert_ending("ok", 1000 - 23, 1)

    def test_a_stream_in_the_background_that_is_cancelled_costs_what_it_had_said(self):
        begun = events({"type": "response.created", "response": {"id": "resp_1"}}, {
            "type": "response.output_text.delta", "delta": "x" * 400})
        self.start(None)
        body = b'{"background": true, "stream": true, "max_output_tokens": 500}'
        client, asked = self.ask_stub(request("POST", "/v1/responses", body))
        asked.stream(begun)
        client.head()
        client.expect(begun)
        client.close()
        self.assert_ending("caller_gone", 500)
        for query, state, count, left in (  # what came before is told again, or not
                ("", "queued", 400, 500), ("?starting_after=9", "queued", 40, 500),
                ("", "cancelled", 440, 1000 - 110)):
            output = [{"content": [{"text": "x" * count}]}]
            self.stub.answer = says({"status": state, "usage": None, "output": output})
            self.get("/v1/responses/resp_1" + query)
            self.assert_left(left)

    def test_a_debt_is_waited_for(self):
        self.start(says(completion(1009, 1)), REFILL_TOKENS=1, REFILL_INTERVAL_SECONDS=60)
        self.ask(call(max_tokens=1))
        answered = self.ask(call(max_tokens=1))  # 10 of debt and 4 of estimate
        self.assertIn(b'"limit reached, wait 14 min"', answered.body)

    def test_an_answer_that_reports_nothing_or_is_packed_is_charged_by_its_text_and_marked(self):
        packed = says(b"\x1f\x8b" + b"x" * 38, "200 OK", "Content-Encoding: gzip")
        for act in self.each((says(completion()), packed)):
            self.start(act)
            self.assert_used(self.ask(call(max_tokens=50)), "3", "10", "true")
            self.assert_ending("ok", 1000 - 13)
            self.assertTrue(self.entry()["estimated"])

    def test_a_stream_is_asked_for_its_usage_and_the_caller_does_not_see_it(self):
        rows = (  # the caller's options, what it sees
            ({}, self.SEEN),
            ({"other": 1}, self.SEEN),
            ({"include_usage": True}, self.WHOLE),
            ({"include_usage": False}, self.SEEN),
            ({"include_usage": None}, self.SEEN),
        )
        for options, seen in self.each(rows):
            self.start(sends(STREAM + chunk(self.WHOLE) + LAST, close=False))
            answered = self.ask(call(stream=True, **{"stream_options": options} if options else {}))
            self.assertEqual((answered.whole, answered.body), (True, seen))
            asked = self.stub.requests[0].json()
            self.assertEqual(asked["stream_options"], {**options, "include_usage": True})
            self.assert_ending("ok", 1000 - 24)

    def test_who_asks_in_openrouters_way_sees_what_it_asked_for(self):
        self.start(sends(STREAM + chunk(self.WHOLE) + LAST, close=False))
        answered = self.ask(call(stream=True, usage={"include": True}))
        self.assertEqual(answered.body, self.WHOLE)
        self.assert_ending("ok", 1000 - 24)

    def test_whether_a_stream_is_asked_for_is_said_plainly(self):
        paths = (CHAT, "/v1/messages", "/v1/responses", "/api/chat")
        for path, value in self.each(paths, ("true", 1, 0, [], {}, "")):
            self.assert_status(400, request("POST", path, chat(stream=value)))
        self.assert_calls(0)
        self.assert_status(200, call(stream=None))

    def test_nobody_makes_an_upstream_of_googles_leave_out_usage(self):
        path = "/v1beta/models/m:generateContent?"
        for query, left in self.each("""[
                ["fields=candidates", ""], ["alt=media", "alt=media"],
                ["alt=sse&%24fields=candidates&a=b", "alt=sse&a=b"],
                ["f%69elds=x&fields", ""], ["myfields=x", "myfields=x"],
                ["alt=proto&$callback=x&alt", ""], ["a=b&%24alt=json", "a=b&%24alt=json"]]"""):
            self.post(path + query, b"{}", "X-Goog-FieldMask: candidates")
            asked = self.stub.last
            self.assertEqual(asked.target, (path + left).rstrip("?"))
            self.assertNotIn(b"fieldmask", asked.head.lower())
        path = "/v1beta/interactions/i"  # what is owed for it would not be told
        self.get(path + "?$fields=status", "X-Goog-FieldMask: status")
        self.assertEqual(self.stub.last.target, path)
        self.assertNotIn(b"fieldmask", self.stub.last.head.lower())

    def test_no_query_makes_a_free_request_another_one(self):
        path = "/v1beta/models/m:generateContent?"
        for query, left in self.each("""[
                ["$httpMethod=POST", ""], ["a=b&%24HTTPMethod=POST", "a=b"], ["a=b", "a=b"],
                ["$httpHeaders=x&%24ct=y", ""], ["_method=POST", ""], ["x;_method=POST", ""],
                ["X-HTTP-Method-Override=POST&ct=x", "ct=x"]]"""):
            for method in ("GET", "POST"):
                self.ask(request(method, path + query, b"{}", "X-HTTP-Method-Override: POST"))
                asked = self.stub.requests[-1]
                self.assertEqual(asked.target, (path + left).rstrip("?"))
                self.assertNotIn(b"override", asked.head.lower())

    def test_what_is_packed_though_nobody_asked_is_read_and_passes_as_it_came(self):
        packed = gzip.compress(self.WHOLE)
        head = STREAM.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
        self.start(sends(head + chunk(packed[:20]) + chunk(packed[20:]) + LAST, close=False))
        self.assertEqual(self.ask(call(stream=True)).body, packed)
        self.assert_ending("ok", 1000 - 24)
        names = ("none|utf-8|Identity|gzip|deflate|binary|8bit|7BIT|chunked|identity, identity"
                 "|identity,gzip|deflate , Identity").split("|")
        for number, name in enumerate(self.each(names)):
            body = completion(20, 4)
            body = gzip.compress(body) if "gzip" in name else (
                zlib.compress(body) if "deflate" in name else body)
            self.stub.answer = says(body, "200 OK", "Content-Encoding: " + name)
            self.assert_used(self.ask(), "20", "4", "")
            self.assert_ending("ok", 1000 - 24 * (number + 2), number + 1)

    def test_the_question_changes_nothing_else_of_what_the_caller_wrote(self):
        self.start(sends(STREAM + LAST, close=False))
        body = b' {"stream":true, "temperature":1.0,"seed":1e2,"messages":[],"x":"\\u00e4" }'
        self.post(CHAT, body)
        expected = b'{"stream_options":{"include_usage":true},' + body[2:]
        self.assertEqual(self.stub.requests[0].body, expected)

    def test_no_question_is_asked_where_no_rule_needs_the_answer_or_the_api_knows_none(self):
        rows = (
            ({"TOKEN_COST_MODE": "request"}, CHAT),
            ({"TOKEN_COST_MODE": "estimate"}, CHAT),
            ({"LIMITS": "each 5 requests per day"}, CHAT),
            ({}, "/v1/responses"),
            ({}, "/v1/messages"),
        )
        for settings, path in self.each(rows):
            self.start(sends(STREAM + LAST, close=False), **settings)
            self.post(path, chat(stream=True))
            self.assertNotIn("stream_options", self.stub.requests[0].json())

    def test_an_upstream_that_takes_the_question_for_an_error_is_asked_once_more_without_it(self):
        plain = events(delta("hello"), "[DONE]")
        statuses = iter(("400 Bad Request", "422 No"))

        def strict(asked):
            if "stream_options" in asked.json():
                body = b'{"error": "unknown field stream_options"}'
                return asked.send(answer(body, next(statuses)))
            asked.send(STREAM + chunk(plain) + LAST)
        self.start(strict)
        for number, calls in enumerate((2, 3)):
            answered = self.ask(call(stream=True))
            self.assertEqual((answered.body, self.stub.calls), (plain, calls))
            self.assert_ending("ok", 1000 - 5 * (number + 1), number)
            self.assertTrue(self.entry(number)["estimated"])

    def test_a_400_of_another_kind_is_passed_on_whole_and_not_remembered(self):
        for text, calls in self.each("""[
                ["too long", [1, 2]], ["stream_options and more", [2, 4]]]"""):
            body = encoded({"error": text})
            self.start(says(body, "400 Bad Request"))
            for number in (0, 1):
                self.assertEqual(self.assert_status(400, call(stream=True)).body, body)
                self.assert_calls(calls[number])
                self.assert_ending("upstream_status", 1000, number)

    def test_an_event_with_a_length_around_it_is_hidden_too(self):
        self.start(says(self.WHOLE, "200 OK", "Content-Type: text/event-stream"))
        for version in ("1.1", "1.0"):
            answered = self.ask(request("POST", CHAT, chat(stream=True), version=version))
            self.assertEqual((answered.whole, answered.body), (True, self.SEEN))
            self.assertIsNone(answered.get("content-length"))

    def test_a_json_answer_in_pieces_tells_its_cost_in_its_head(self):
        body = completion(20, 4)
        head = STREAM.replace(b"text/event-stream", b"application/json")
        for data in self.each((answer(body), head + chunk(body[:9]) + chunk(body[9:]) + LAST)):
            client, asked = self.ask_stub()
            for at in range(0, len(data), 40):
                asked.send(data[at:at + 40])
            asked.finish()
            answered = client.read()
            self.assertEqual(answered.body, body)
            self.assert_used(answered, "20", "4", "")

    def test_a_json_answer_that_takes_its_time_is_passed_on_as_it_comes(self):
        self.patch_seconds(Reply_WHOLE_SECONDS=0.01)
        self.start(None)
        client, asked = self.ask_stub(call(max_tokens=1))
        body = completion(20, 4)
        asked.send(answer(body)[:-10])
        self.assert_used(client.head(), "", "", "")
        asked.send(body[-10:])
        self.assertEqual(client.rest().body, body)
        asked.finish()
        self.assert_ending("ok", 1000 - 24)

    def test_lines_of_json_pass_as_they_come_at_endpoints_that_are_not_known(self):
        self.patch_seconds(Reply_WHOLE_SECONDS=1000)
        self.start(None)
        line = chunk(b'{"status": "half of it"}\n')
        for kind in self.each((b"application/x-ndjson", b"Application/stream+json; a=b")):
            client, asked = self.ask_stub(request("POST", "/v1/other", b"{}"))
            asked.send(STREAM.replace(b"text/event-stream", kind) + line)
            self.assert_used(client.head(), "", "", "")
            asked.send(line + LAST)
            self.assertEqual(client.rest().body, line.split(b"\r\n")[1] * 2)
            asked.finish()

    def test_what_was_told_is_believed_up_to_what_passed(self):
        """Rows are outputs, the answer's text in characters, tokens told, tokens used."""
        for outputs, characters, told, used, marked in self.each("""[
                [4, 3200, 225, 800, "true"], [4, 3200, 401, 401, ""], [4, 400, 1, 100, "true"],
                [4, 256, 0, 0, ""], [4, 1000, 190, 190, ""],
                [2, 1600, 200, 400, "true"], [2, 1100, 200, 200, ""], [3, 2400, 200, 600, "true"],
                [1, 1600, 200, 200, ""]]"""):
            body = encoded({"usage": {"prompt_tokens": 3, "completion_tokens": told},
                               "choices": [{"message": {"content": "x" * characters}}]})
            self.start(says(body), MAX_TOKENS=5000)
            self.assert_used(self.ask(call(n=outputs)), "3", str(used), marked)
            self.assert_ending("ok", 5000 - 3 - used)

    TIERS = """
        {} -> 1
        {"service_tier": "flex"} -> 1
        {"service_tier": "Priority"} -> 2
        {"service_tier": ["priority"]} -> 1
        {"speed": "fast"} -> 2
        {"inference_geo": "us", "service_tier": "priority"} -> 2.2
        """

    def test_the_dearer_way_of_serving_that_is_asked_for_is_held(self):
        for asked, times in self.each(self.TIERS):
            self.start(None, LIMITS="each 1 usd per day", UNPRICED="1")
            path = "/v1/messages" if "geo" in asked or "speed" in asked else CHAT
            client, up = self.ask_stub(request("POST", path, chat(
                max_tokens=100000, **json.loads(asked))))
            level, = levels(self.proxy).values()
            self.assertEqual(round((10 ** 12 - level) / 10 ** 11, 2), float(times))
            up.answer()
            client.read()


class KeysTest(KeysCase):
    def test_the_first_key_closes_the_door_and_keys_of_the_settings_go_on_working(self):
        self.assert_statuses([200, 200], "x", None)
        ann = self.add()
        self.assert_statuses([200, 401, 401], ann, "x", None)
        self.assert_said("nobody may call without one from now on")
        self.assertEqual([row["caller"] for row in self.wait_for_rows(5)][2], "ann")
        self.close_books()
        self.start(PROXY_API_KEYS="old=sk-old", DATABASE=self.path)
        self.assert_statuses([200, 200, 401], ann, "sk-old", "x")

    def test_the_door_stays_open_where_anyone_may_call(self):
        self.start(PROXY_API_KEYS="anyone", LIMITS="key:ann 1 requests per day",
                   LIMIT_REPLY="error")
        ann = self.add()
        self.assert_statuses([200, 200, 200, 429], "x", None, ann, ann)

    def test_the_door_is_closed_at_the_next_start_too(self):
        self.add()
        self.change("remove", "ann")
        self.assert_statuses([401], "x")
        self.close_books()
        self.start(DATABASE=self.path)
        self.assertEqual((self.statuses("x"), self.proxy.stored.policy), ([401], "own"))
        self.assertEqual(self.proxy.config.cors_origins, ("*",))

    def test_a_vendors_key_is_not_kept_to_this_machine_once_keys_are_stored(self):
        settings = {"UPSTREAM_OPENAI_KEY": "sk", "UPSTREAM_OPENAI_MODELS": "*"}
        config = read_config(settings)
        self.assertEqual(config.host, "127.0.0.1")
        config.choose_defaults(True)
        self.assertEqual(config.host, "0.0.0.0")
        self.assertEqual(config.warnings(), [])
        self.assertEqual(config.take(read_config(settings)), [])  # nothing has changed

    def test_what_nobody_has_set_is_not_said_to_need_a_new_start(self):
        config, keys = read_config(HERE), {"PROXY_API_KEYS": "a-key-of-16-chars-or-more"}
        self.assertEqual(config.take(read_config({**HERE, **keys})), [])
        self.assertEqual(config.take(read_config({**HERE, **keys, "STORED": "own"})), ["STORED"])

    def test_what_ends_a_key_is_a_401_on_the_next_call_of_its_connection(self):
        for policy, act in self.each(
                ("", "anyone"), ("revoke", "remove", "rotate", "set")):
            clock = self.start_clock(PROXY_API_KEYS=policy)
            ann = self.add(expires="30d")
            client = self.connect()
            client.answers(200, call(ann))
            clock.now += 60
            self.change(act, "ann", **{"expires": "1m"} if act == "set" else {})
            client.answers(401, call(ann))
            self.assert_calls(1)

    def test_a_key_that_expires_is_a_401_from_then_on(self):
        clock = self.start_clock()
        ann, client = self.add(expires="1m"), self.connect()
        for seconds, status in self.each("""[[0, 200], [59, 200], [1, 401], [60, 401]]"""):
            clock.now += seconds
            client.answers(status, call(ann))
        self.change("set", "ann", expires="never")
        client.answers(200, call(ann))

    def test_rotation_changes_the_secret_and_nothing_else(self):
        self.start_clock(MAX_TOKENS=10)
        first = self.add(team="red")
        self.ask(first)
        second = self.change("rotate", "ann").secret
        third = self.change("rotate", "ann", "1h").secret
        self.assert_statuses([401, 200, 200], first, second, third)
        self.assertEqual((self.left(second), self.left(third)), (7, 7))
        rows = self.wait_for_rows(4)
        self.assertEqual([row["caller"] for row in rows], ["ann", "127.0.0.1", "ann", "ann"])
        self.proxy.clock.now += 3600
        self.assert_statuses([401, 200], second, third)

    def test_the_log_says_why_a_key_is_refused(self):
        self.start(PROXY_API_KEYS="anyone", **self.STEERING)
        ann, ben = self.add(models="n", upstream="base"), self.add("ben", upstream="gone")
        old = self.add("cem")
        self.change("revoke", "cem")
        for number, (key, caller, cause) in enumerate(self.each((
                (ann, "ann", "model_not_allowed"), (ben, "ben", "upstream_not_allowed"),
                (self.STEERING["VIEWER_KEY"], "VIEWER_KEY", "key_not_for_calls"),
                (old, "127.0.0.1", "key of cem ended")))):
            self.ask(key)
            entry = self.entry(number)
            self.assertEqual((entry["caller"], entry["cause"]), (caller, cause))

    STEERING = {"ADMIN_KEY": "sk-admin-0123456789", "VIEWER_KEY": "sk-viewer-0123456789"}

    def test_keys_of_viewers_and_admins_make_no_calls_and_never_go_upstream(self):
        for settings in self.each("""[{"PROXY_API_KEYS": "anyone"}, {"BASE_API_KEY": "passthrough"},
                                   {"PROXY_API_KEYS": "ann=sk-1"}]"""):
            self.start(**self.STEERING, **settings)
            stored = [self.add(role, role=role) for role in ("viewer", "admin")]
            for key in [*self.STEERING.values(), *stored]:
                for data in (call(key), request("GET", "/v1/files", key=key)):
                    self.assertEqual(self.ask(data).error()["code"], "key_not_for_calls")
            self.assert_calls(0)
            self.assertFalse(self.execute("SELECT * FROM facts WHERE name = 'closed'"))

    def test_a_stored_key_never_goes_up_where_callers_show_their_own(self):
        stubs = self.start_named("free", "UPSTREAM_FREE_MODELS=m BASE_API_KEY=passthrough"
                                 " PROXY_API_KEYS=anyone")
        ann = self.add()
        self.assertEqual(self.ask(call(ann, model="x")).error()["code"], "upstream_not_allowed")
        self.assert_statuses([200], ann)
        self.assertEqual((self.stub.calls, stubs[0].requests[0].get("authorization")), (0, None))

    def start_page(self, role, **settings):
        """A page at /v1/x for a role."""
        self.start(**{**self.STEERING, **settings})

        async def page(request, reply):
            self.proxy.require_role(request, reply.entry, role)
            reply.send(200, encoded({"who": reply.entry.caller.label}))
        self.server.pages.find = lambda request: page

    def test_a_page_asks_for_a_role(self):
        for role, statuses in self.each("""[
                ["caller", [200, 200, 200]], ["viewer", [403, 200, 200]],
                ["admin", [403, 403, 200]]]"""):
            self.start_page(role)
            keys = [self.add(one, role=one) for one in llm_proxy.ROLES]
            for three in (keys, [keys[0], *reversed([*self.STEERING.values()])]):
                self.assert_statuses(statuses, *three)
        self.assertEqual(self.ask(call(self.STEERING["ADMIN_KEY"])).json(), {"who": "ADMIN_KEY"})

    def test_wrong_keys_are_counted_at_pages_too_even_where_anyone_may_call(self):
        for policy in self.each(("anyone", "ann=sk-1")):
            self.start_page("viewer", PROXY_API_KEYS=policy)
            self.assert_statuses([401], None)
            found = self.statuses(*["sk-x%d" % number for number in range(11)])
            self.assertEqual(found, [401] * 10 + [429])
            self.assert_statuses([200, 401], self.STEERING["VIEWER_KEY"], None)

    def test_a_key_that_is_no_more_opens_no_page(self):
        self.start_page("admin")
        secret = self.add("boss", role="admin")
        new = self.change("rotate", "boss").secret
        self.assert_statuses([401, 200], secret, new)
        self.change("revoke", "boss")
        self.assert_statuses([401], new)

    MODELS = """[
        ["gemma-3", 200], ["GEMMA-3", 200], ["google/gemma-3", 200], ["gpt-4o", 200],
        ["openai/gpt-4o-2024-08-06", 200], ["gpt-4o-mini", 403], ["llama", 403], [null, 403],
        ["cheap", 200], ["dear", 403]]"""

    def test_a_key_may_use_its_models_alone_in_every_spelling(self):
        self.start(MODEL_ALIASES="cheap=gemma-3,dear=gpt-5")
        ann, ben = self.add(models="gemma*,gpt-4o"), self.add("ben")
        for model, status in self.each(self.MODELS):
            answered = self.assert_status(status, call(ann, model=model))
            if status == 403:
                answered.tells("code", "model_not_allowed")
        called = self.stub.calls
        for payload in self.each("""[
                {"models": ["gemma-3", "llama"]}, {"fallbacks": ["llama"]},
                {"fallbacks": [{"model": "llama"}]}]"""):
            self.assert_status(403, call(ann, model="gemma-3", **payload))
        for path in self.each("""["/v1/messages", "/v1/responses", "/v1/embeddings", "/v1/unknown",
                               "/v1beta/models/llama:generateContent", "/api/chat"]"""):
            self.assert_status(403, request("POST", path, chat(model="llama"), key=ann))
        self.assert_status(403, request("POST", "/v1/files", b"x", key=ann))
        self.assert_calls(called)
        self.assert_statuses([200], ben)

    def test_the_list_of_models_shows_what_a_key_may_use(self):
        listed = {"object": "list", "data": [{"id": name} for name in ("gemma-3", "llama")]}
        self.start(says(listed))
        ann, ben, bound = self.add(models="gemma*"), self.add("ben"), self.add(
            "cem", upstream="base")
        for key, names in self.each(((ann, ["gemma-3"]), (ben, ["gemma-3", "llama"]),
                                     (bound, ["gemma-3", "llama"]))):
            for path in ("/v1/models", "/models"):
                found = self.get(path, key=key).json()
                self.assertEqual([one["id"] for one in found["data"]], names)

    def test_the_list_of_an_upstream_by_its_prefix_shows_what_a_key_may_use(self):
        box, = self.start_named("box")
        box.answer = says({"data": [{"id": name} for name in ("gemma-3", "llama")]})
        keys = [self.add(models="gemma*"), self.add("ben"),
                self.add("cem", models="gemma*", upstream="base")]
        for key, status, names in self.each(zip(keys, (200, 200, 403), (
                ["gemma-3"], ["gemma-3", "llama"], []))):
            answered = self.assert_status(status, request("GET", "/box/v1/models", key=key))
            self.assertEqual([one["id"] for one in answered.json().get("data", ())], names)
        box.answer = says(b"<html>", "500 No")
        answered = self.get("/box/v1/models", key=keys[0])
        self.assertEqual([one["id"] for one in answered.json()["data"]], ["gemma-3"])  # as before

    def test_who_is_bound_to_an_upstream_sees_the_list_that_others_see_by_its_prefix(self):
        box, = self.start_named("box")
        box.answer = says({"data": [{"id": "gemma-3"}]})
        for upstream, names in self.each("""[["box", ["gemma-3"]], [null, []], ["gone", []]]"""):
            key = self.add(str(upstream), upstream=upstream)
            answered = self.get("/v1/models", key=key)
            self.assertEqual([one["id"] for one in answered.json()["data"]], names)

    def test_a_key_bound_to_an_upstream_goes_there_alone_with_that_ones_secret(self):
        one, two = self.start_named("one two", "UPSTREAM_ONE_MODELS=m UPSTREAM_TWO_KEY=sk-two")
        ann, base, lost = self.add(upstream="two"), self.add("b", upstream="base"), self.add(
            "c", upstream="gone")
        for key, path, expected in self.each((
                (ann, CHAT, "two"), (ann, "/two" + CHAT, "two"), (ann, "/one" + CHAT, 403),
                (base, CHAT, "base"), (base, "/two" + CHAT, 403), (lost, CHAT, 403))):
            answered = self.post(path, chat(), key=key)
            found = answered.json()["from"] if answered.status == 200 else answered.status
            self.assertEqual(found, expected)
        self.assertEqual(two.requests[0].get("authorization"), "Bearer sk-two")
        self.assertEqual(one.calls, 0)

    def test_limits_of_a_key_and_of_its_team_hold_at_once(self):
        self.start(LIMITS="each 9 requests per day; team:red 3 requests per day",
                   LIMIT_REPLY="error")
        ann, ben = self.add(team="red"), self.add("ben", team="red")
        self.assert_statuses([200, 200, 200, 429], ann, ann, ben, ben)
        self.change("set", "ann", team="", limits="4 requests per day")
        self.assert_statuses([200, 200, 200, 429], *[ann] * 4)  # 7 of 9 were left
        self.change("set", "ann", reset=True)
        self.assert_statuses([200], ann)

    def test_a_keys_rule_may_count_what_no_other_does(self):
        self.start(says(completion(60, 0)), clock=Clock(), LIMITS="each 9 requests per day")
        ann = self.add(limits="100 tokens per day")
        self.ask(call(ann, max_tokens=1))
        self.assert_left(40, ann)
        self.close_books()
        self.start(DATABASE=self.path, clock=self.proxy.clock, LIMITS="each 9 requests per day")
        self.assert_left(40, ann)

    def test_what_is_given_and_reset_counts_at_once_and_after_a_restart(self):
        self.start_clock(LIMITS="each 2 requests per day", LIMIT_REPLY="error",
                         PROXY_API_KEYS="old=sk-old")
        ann = self.add()
        self.assert_statuses([200, 200, 429], ann, ann, ann)
        self.change("give", "ann", "5", "requests")
        threads, given_to = set(), Buckets.given_to

        def noted(*arguments):
            threads.add(threading.current_thread().name)
            return given_to(*arguments)
        with patch.object(Buckets, "given_to", noted):
            self.assert_statuses([200, 200, 200, 429], ann, "sk-old", "sk-old", "sk-old")
            self.wait_for_rows(7)
        self.assertNotIn("ledger", threads)  # or what is looked at by two threads might be lost
        self.change("reset", "old")
        self.assert_statuses([200], "sk-old")
        self.close_books()
        self.start(clock=self.proxy.clock, DATABASE=self.path, LIMITS="each 2 requests per day")
        self.assert_left(4, ann)
        self.proxy.clock.now += 86400
        self.assert_left(2, ann)

    def test_an_order_that_nobody_has_a_bucket_for_is_said(self):
        self.change("give", "nobody", "5", "usd")
        self.assert_said("nobody has no bucket in usd: it was given nothing")

    def test_orders_that_somebody_else_has_written_are_not_carried_out(self):
        ann = self.add()
        self.execute("INSERT INTO orders (caller, unit, amount, until, done) VALUES"
                     " ('ann', 'requests', 'x', 1e12, 0), ('ann', 'requests', 5, 'soon', 0),"
                     " ('ann', 'requests', NULL, NULL, 0), (x'00', NULL, NULL, NULL, 0)")
        self.store().give("ann", "5", "requests")
        wait_for(lambda: self.left(ann) == 1005)
        self.close_books()
        self.execute("INSERT INTO orders (caller, unit, amount, until, done) VALUES"
                     " ('ann', 'requests', 'x', 1e12, 1)")
        self.start(DATABASE=self.path)
        self.assert_left(1005, ann)

    def test_a_key_that_somebody_edited_into_nonsense_lets_nobody_in(self):
        for column, value in self.each("""[
                ["role", "root"], ["role", null], ["limits", "x"], ["models", "a,,b"],
                ["expires", "soon"], ["subject", "x, but 32 characters as of bytes"],
                ["disabled", "no"], ["created", null], ["team", "a b"]]"""):
            self.start(PROXY_API_KEYS="anyone")
            ann, ben = self.add(), self.add("ben")
            before = self.proxy.callers
            self.execute("UPDATE keys SET %s = %s WHERE name = 'ann'" % (
                column, "NULL" if value is None else repr(value)))
            wait_for(lambda: self.proxy.callers is not before)
            self.assert_statuses([401, 200], ann, ben)
            self.assert_said("in DATABASE cannot be read: it lets nobody in")

    def test_keys_that_cannot_be_read_any_more_change_nothing(self):
        ann = self.add()
        self.execute("ALTER TABLE keys RENAME TO old")
        self.assert_said("the keys in DATABASE cannot be read")
        self.assert_statuses([200, 401], ann, "x")
        self.assertEqual(len(self.wait_for_rows(2)), 2)
        self.execute("ALTER TABLE old RENAME TO keys")
        self.add("ben")
        self.assert_statuses([200, 401], ann, "x")

    def test_keys_that_cannot_be_read_at_the_start_let_nobody_in(self):
        ann = self.add()
        self.close_books()
        with patch.object(Database, "key_rows", side_effect=sqlite3.DatabaseError):
            self.start(DATABASE=self.path)
            self.assert_statuses([401, 401], ann, "x")
        wait_for(lambda: self.statuses(ann) == [200])

    def test_a_database_that_is_deleted_opens_no_door(self):
        ann = self.add()
        os.remove(self.path)
        wait_for(lambda: self.statuses(ann) == [401])
        self.assert_statuses([401], "x")
        self.assert_statuses([200], self.add("ben"))

    def test_keys_of_a_file_that_can_only_be_read_by_a_later_try_hold_too(self):
        ledger, lock = self.proxy.books.ledger, llm_proxy.lock_name(self.path)
        ledger.reopen_at = inf
        os.unlink(lock)
        os.mkdir(lock)
        wait_for(lambda: ledger.database is None)
        ann = self.store().add("ann").secret
        self.assert_statuses([200], "x")
        ledger.reopen_at = 0
        wait_for(lambda: self.statuses(ann) == [200] and self.proxy.callers.stored.closed)
        self.assert_statuses([401, 401, 200], "x", None, ann)
        self.assert_said("in memory only: DATABASE must be")

    def test_when_a_key_was_used_is_known_to_the_minute(self):
        clock = self.start_clock()
        ann, keys = self.add(), self.store()
        for seconds, used in self.each("""[[0, 1000], [59, 1000], [2, 1061]]"""):
            clock.now += seconds
            self.ask(ann)
            wait_for(lambda: keys.find("ann").last_used == 1700000000 + used)

    def test_a_stored_key_has_the_turns_of_its_name(self):
        self.start(None, MAX_CONCURRENCY=1, KEY_WEIGHTS="ann=5")
        self.ask_stub(call(self.add()))
        queues = self.proxy.routes.base.queue.queues.values()
        self.assertEqual([one.weight for one in queues], [5])

    def test_people_behind_a_key_have_what_it_may(self):
        self.start(CALLER_HEADER="X-User", TRUSTED_PROXIES="127.0.0.1")
        ann, client = self.add(models="gemma", team="red", expires="1h"), self.connect()
        client.answers(403, call(ann, "X-User: u"))
        client.answers(200, call(ann, "X-User: u", model="gemma"))
        self.assertEqual(self.wait_for_rows(2)[1]["caller"], "ann/u")
        self.change("revoke", "ann")
        client.answers(401, call(ann, "X-User: u", model="gemma"))

    def test_changes_of_keys_leave_nothing_behind_in_a_connection(self):
        self.start()
        ann, client = self.add(), self.connect()
        for number in range(3):
            client.answers(200, call(ann))
            self.change("set", "ann", note=str(number))
        connection, = self.server.open
        sizes = {len(connection.last.cache)}
        client.exchange(call(ann))
        self.assertEqual(sizes, {len(connection.last.cache)})

    def test_settings_that_are_read_again_leave_stored_keys_as_they_are(self):
        self.start_clock(LIMITS="each 9 requests per day")
        ann = self.add(limits="5 requests per day")
        self.ask(ann)
        new = {**self.proxy.config.texts, "LIMITS": "each 7 requests per day"}
        config = read_config({name: text for name, text in new.items() if text})
        self.on_loop(llm_proxy.rebuild, self.proxy, config)
        self.assertEqual((self.left(ann), self.statuses("x")), (4, [401]))


class FallbackTest(CallCase):
    RULES = "model:dear 1 requests per day; model:cheap 5 requests per day"

    def test_what_a_call_names_to_fall_back_to_counts_like_what_it_asks_for(self):
        for payload in self.each("""[
                {"models": ["cheap", "dear"]}, {"fallbacks": ["dear"], "route": "fallback"},
                {"fallbacks": [{"model": "dear"}]}, {"tools": [{"type": "x", "model": "dear"}]},
                {"plugins": [{"id": "x", "model": "dear"}]},
                {"plugins": [{"id": "x", "analysis_models": ["dear"]}]}]"""):
            self.start(LIMITS=self.RULES, LIMIT_REPLY="error")
            statuses = [self.ask(call(model="cheap", **payload)).status for _ in range(2)]
            self.assertEqual(statuses + [self.ask(call(model="cheap")).status], [200, 429, 200])

    # What a call names, and what goes up where the model is pinned, and where "a" stands for "b"
    RENAMED = json.loads("""[
        [{"models": ["a", "c"]}, {}, {"models": ["b", "c"]}],
        [{"fallbacks": [{"model": "a", "x": 1}, 7]}, {},
         {"fallbacks": [{"model": "b", "x": 1}, 7]}],
        [{"models": "a", "fallbacks": null}, {}, {"models": "a", "fallbacks": null}],
        [{"tools": [{"type": "x", "model": "a"}, {"type": "y"}]},
         {"tools": [{"type": "x"}, {"type": "y"}]},
         {"tools": [{"type": "x", "model": "b"}, {"type": "y"}]}],
        [{"plugins": [{"id": "x", "analysis_models": ["a"]}]}, {"plugins": [{"id": "x"}]},
         {"plugins": [{"id": "x", "analysis_models": ["b"]}]}]]""")

    def test_a_pin_holds_for_other_models_too_and_so_do_aliases(self):
        paths = CHAT, "/v1/score", "/v1/responses"
        for pinned, settings in ((1, {"BASE_MODEL": "m"}), (2, {"MODEL_ALIASES": "a=b"})):
            self.start(**settings)
            for row, path in self.each(self.RENAMED, paths):
                body = encoded({"model": "m", **row[0]})
                self.post(path, body)
                self.assertEqual(self.stub.last.json(), {"model": "m", **row[pinned]})

    def test_the_models_of_a_batch_of_calls_count_and_are_replaced_too(self):
        batch = {"requests": [{"params": {"model": "a"}}, {"params": {"model": 7}}]}
        for settings, model in self.each("""[
                [{"BASE_MODEL": "m"}, "m"], [{"MODEL_ALIASES": "a=b"}, "b"], [{}, "a"]]"""):
            self.start(LIMITS="model:b 9 requests per day; each 1 usd per day", UNPRICED="1",
                       **settings)
            self.post("/v1/messages/batches", batch)
            asked = self.stub.last.json()["requests"]
            self.assertEqual([one["params"]["model"] for one in asked], [model, 7])
            self.assertEqual(len(levels(self.proxy)), 1 + (model == "b"))
        self.start(LIMITS="each 1 usd per day")
        body = encoded(batch)
        self.assert_status(403, request("POST", "/v1/messages/batches", body))

    def test_what_names_no_model_is_left_alone_and_too_many_are_refused(self):
        self.start(LIMITS=self.RULES)
        for payload in self.each("""[{"models": "dear"}, {"models": [1, null, ["dear"]]},
                                  {"tools": [{"model": 3}]}, {"fallbacks": {"model": "dear"}}]"""):
            self.assert_status(200, call(model="x", **payload))
        for payload in self.each(({"models": ["m%d" % number for number in range(17)]},
                                  {"models": ["m" * 5000]})):
            self.assert_status(400, call(model="x", **payload))


class UnpricedTest(CallCase):
    REFUSED = (
        (CHAT, {}, ("error", "code"), "model_has_no_price"),
        ("/v1/messages", {"max_tokens": 1}, ("error", "type"), "permission_error"),
        ("/v1beta/models/m:generateContent", {}, ("error", "status"), "PERMISSION_DENIED"))

    def test_where_money_is_counted_a_model_without_a_price_is_refused_in_each_dialect(self):
        self.start(LIMITS="each 5 usd per day; all 9 requests per day")
        for path, payload, keys, said in self.each(self.REFUSED):
            answered = self.assert_status(403, request("POST", path, chat(model="m", **payload)))
            self.assertEqual(llm_proxy.dig(json.loads(answered.body), *keys), said)
        self.assert_entry("cause", "model_has_no_price")
        self.assert_status(403, call(model="gpt-4o", models=["m"]))
        self.assert_status(403, call(model=None))
        self.assert_status(403, request("POST", "/v1/audio/speech", chat(model="m")))
        self.assertEqual((self.stub.calls, self.levels()), (0, []))

    def levels(self):
        return [found.level for found in self.proxy.limits.buckets.levels.values()]

    def test_it_may_pass_by_the_operators_word_by_its_price_or_where_no_money_is_counted(self):
        path = pem_file(self, '{"m": {"input": 0}}')
        day = "each %s per day"
        for settings, level in self.each((
                ({"LIMITS": day % "5 usd", "UNPRICED": "allow"}, 5),
                ({"LIMITS": day % "5 usd", "UNPRICED": "1000.5"}, 5 - 4 * 1000.5 / 10 ** 6),
                ({"LIMITS": day % "5 usd", "PRICES": path}, 5),
                ({"LIMITS": "model:x %s; each unlimited usd per day" % (day % "5 usd")[5:]}, None),
                ({"LIMITS": day % "5 tokens"}, None))):
            self.start(says(completion(3, 1)), RESPONSE_TOKEN_RESERVE=1, **settings)
            self.assert_status(200, call(model="m"))
            if level:
                self.assertEqual(self.levels(), [round(level * llm_proxy.PICODOLLARS)])


class EndingsTest(LedgerCase):
    """The 6 characters that `event` says are 2 tokens, and a prompt is 3."""
    EVENT = event(1)
    CHUNKED = STREAM + chunk(EVENT)
    SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + EVENT
    UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + EVENT
    HALF = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{12345"
    TEXT = ceil(len(EVENT) / 4)  # tokens, where it is not known for an event
    HANG_UPS = Client.close, Client.reset

    def test_an_answered_call_costs_its_fixed_price_or_its_estimate(self):
        rows = (({}, {}, 999), ({"TOKEN_COST_MODE": "estimate"}, {"max_tokens": 7}, 990))
        for settings, payload, left in self.each(rows):
            self.start(**settings)
            self.assert_status(200, call(**payload), "x-ratelimit-remaining: %d" % left)
            self.assert_ending("ok", left)
            self.assert_entry("remaining", left)

    def test_every_metered_answer_tells_the_bucket(self):
        self.start_clock(MAX_TOKENS=10)
        self.stub.answer = sends(STREAM + chunk(events(delta("a"), "[DONE]")) + LAST, close=False)
        self.assert_status(
            200, call(stream=True), "x-ratelimit-limit: 10", "x-ratelimit-remaining: 9",
            "x-ratelimit-refill-tokens: 2", "x-ratelimit-refill-seconds: 300",
            "x-ratelimit-reset-seconds: 300")
        self.assert_status(200, request("GET", "/v1/x"), "x-ratelimit-limit:")

    def test_an_error_of_the_upstream_passes_untouched_and_costs_no_more_than_the_request(self):
        """And that only where the request was at fault."""
        self.start(REQUEST_TOKEN_COST=7)
        for number, (status, body, kind, left) in enumerate(self.each("""
                400 Bad Request -> {"error": {"message": "no"}} -> application/json -> 993
                401 Unauthorized -> {} -> application/json -> 1000
                403 Forbidden -> {} -> application/json -> 1000
                404 Not Found ->  -> text/plain -> 993
                413 Content Too Large -> {} -> application/json -> 993
                422 Unprocessable Content -> {} -> application/json -> 993
                429 Too Many Requests -> slow down -> text/plain -> 1000
                500 Internal Server Error -> Internal -> text/plain; charset=utf-8 -> 1000
                599 Odd ->  -> text/html -> 1000""")):
            body, key, left = body.encode(), str(number), int(left)
            self.stub.answer = says(body, status, "Content-Type: " + kind, "Retry-After: 7")
            answered = self.assert_status(int(status[:3]), call(key), "content-type: " + kind,
                                          "retry-after: 7", "x-ratelimit-remaining: %d" % left)
            self.assertEqual(answered.body, body)
            self.assert_ending("upstream_status", left, number, key)

    def test_a_fault_of_the_callers_costs_neither_tokens_nor_money(self):
        self.start(says(b"{}", "400 Bad Request"), LIMITS="each 100 requests per day;"
                   "each 900 tokens per day; all 5 usd per day")
        for _ in range(200):
            self.ask(call(model="gpt-4o"))
        self.assert_calls(100)
        self.assertEqual([*levels(self.proxy).values()], [0])
        row = self.row()
        self.assertEqual((row["charges"], row["picodollars"]), ("each 100 requests per day=1", 0))

    def test_an_upstream_that_refuses_connections_is_a_502_and_costs_nothing(self):
        self.stub.refuse_connections()
        answered = self.assert_status(502, error="upstream_error")
        self.assertNotIn(b"127.0.0.1", answered.body)
        self.assert_ending("upstream_failed", left=1000)
        self.assert_entry("cause", "connection refused")

    def test_a_silent_upstream_is_a_504_at_the_read_timeout_and_costs_nothing(self):
        self.start(None, Clock(), READ_TIMEOUT="30")
        client = self.send(call())
        self.assertEqual(self.expire("the response of"), 30)
        answered = client.read()
        self.assertEqual((answered.status, answered.error()["type"]), (504, "timeout_error"))
        self.stub.next().wait_for_hang_up()
        self.assert_ending("upstream_failed", left=1000)
        self.assert_entry("ms", 30000)

    def test_the_read_timeout_runs_between_bytes_of_a_stream_and_not_over_all_of_it(self):
        clock = self.start_clock(None, READ_TIMEOUT=100, REFILL_INTERVAL_SECONDS=1000)
        client, asked = self.begin()
        for _ in range(5):
            clock.now += 70
            asked.chunks(event(1))
            client.expect(event(1))
        clock.now += 101
        client.expect_cut()
        asked.wait_for_hang_up()
        self.assert_ending("upstream_cut", left=999)

    def test_an_error_inside_a_200_costs_nothing_and_passes_as_it_came(self):
        for act, mode in self.each(FAULTS_IN_200, ("request", "usage")):
            self.start(act, TOKEN_COST_MODE=mode)
            answered = self.assert_status(200, call(stream=True))
            self.assertTrue(answered.whole)
            self.left()
            self.assertIn(self.outcome(), ("upstream_status", "upstream_cut"))
            self.assert_ending(self.outcome(), left=1000)

    def test_an_error_inside_a_200_that_is_the_callers_fault_costs_its_request(self):
        for code, mode, left in self.each("""[
                [400, "request", 999], [422, "request", 999], [429, "request", 1000],
                [400, "usage", 1000]]"""):
            self.start(says(b'{"error": {"code": %d}}' % code), TOKEN_COST_MODE=mode)
            self.assert_status(200, call())
            self.assert_ending("upstream_status", left)

    def test_an_error_that_tells_what_it_used_costs_that(self):
        used = {"input_tokens": 20, "output_tokens": 4}
        failed = {"type": "response.failed", "response": {"error": {"code": "x"}, "usage": used}}
        self.start(says_events(failed), TOKEN_COST_MODE="usage")
        self.post("/v1/responses", chat(stream=True))
        self.assert_ending("upstream_status", left=1000 - 24)

    def test_an_error_after_text_costs_the_prompt_and_that_text(self):
        text = delta("word 1")
        for told, outcome in self.each([
                ([text, {"error": {"message": "no"}}], "upstream_status"),
                ([text, {"error": {"message": "no"}}, "[DONE]"], "upstream_status"),
                ([text], "upstream_cut")]):
            self.start(says_events(*told), TOKEN_COST_MODE="usage")
            answered = self.assert_status(200, call(stream=True))
            self.assertEqual((answered.whole, answered.body), (True, events(*told)))
            self.assert_ending(outcome, left=1000 - 3 - 2)
            cause = "ended without its mark" if outcome == "upstream_cut" else None
            self.assert_entry("cause", cause)

    LAST_WORDS = [  # path, the last event, outcome
        (CHAT, [LAST_DELTA, USAGE_EVENT, "[DONE]"], "ok"),
        (CHAT, [LAST_DELTA], "caller_gone"),
        (CHAT, [], "caller_gone"),
        ("/v1/responses", RESPONSE_EVENTS, "ok"),
        ("/v1/messages", ANTHROPIC_EVENTS, "ok"),
        ("/v1beta/models/m:streamGenerateContent?alt=sse", GEMINI_EVENTS, "ok")]

    def test_a_caller_who_leaves_after_the_streams_own_end_missed_nothing(self):
        self.start(None)
        rows = itertools.product(self.LAST_WORDS, self.HANG_UPS)
        for number, ((path, told, outcome), hang_up) in enumerate(self.each(rows)):
            client = self.send(request("POST", path, chat(stream=True)))
            asked = self.stub.next()
            asked.send(STREAM + chunk(self.EVENT + events(*told)))
            client.head()
            client.expect(self.EVENT + events(*told))
            hang_up(client)
            asked.wait_for_hang_up()
            self.assert_entry("outcome", outcome, number)

    def test_the_last_chunk_may_come_before_or_after_a_caller_has_left(self):
        told = events(LAST_DELTA, "[DONE]")
        for number, hang_up in enumerate(self.each(self.HANG_UPS * 5)):
            client, asked = self.begin(told)
            hang_up(client)
            with suppress(OSError):
                asked.chunks(b": a\n\n")
                asked.send(LAST)
            self.assert_entry("outcome", "ok", number)
            asked.finish()

    def test_a_caller_who_could_not_be_sent_the_last_event_missed_it(self):
        last = events(LAST_DELTA, "[DONE]")
        self.start(None)
        for number, (sent, unsent, outcome) in enumerate(self.each((
                (self.EVENT, last, "caller_gone"),
                (self.EVENT + last[:-5], last[-5:], "caller_gone"),
                (self.EVENT + last, b": a\n\n", "ok")))):
            client, asked = self.begin(sent)
            with patch.object(Stream, "write", Stream.fail_writing):
                asked.chunks(unsent)
                self.assert_entry("outcome", outcome, number)
            client.close()
            asked.over.set()

    CUTS = (  # what the upstream has sent, how it breaks off, tokens of output
        (CHUNKED, Asked.close, 2),
        (CHUNKED, Asked.reset, 2),
        (CHUNKED, lambda asked: asked.send(b"XYZ\r\n" + chunk(event(2))), 2),
        (SIZED, Asked.close, TEXT),
        (SIZED, Asked.reset, TEXT),
        (UNTIL_CLOSE, Asked.reset, 2),
    )

    def test_what_came_before_an_upstream_was_cut_is_delivered_and_the_caller_sees_the_cut(self):
        self.start(None, TOKEN_COST_MODE="estimate")
        cases = itertools.product(self.CUTS, ("1.1", "1.0"))
        for number, ((begun, cut, output), version) in enumerate(self.each(cases)):
            key, body = "key-%d" % number, chat(stream=True, max_tokens=50)
            client, asked = self.ask_stub(request("POST", CHAT, body, key=key, version=version))
            asked.send(begun)
            client.head()
            client.expect(self.EVENT)
            cut(asked)
            answered = client.rest()
            self.assertEqual((answered.whole, answered.body), (False, self.EVENT))
            self.assert_ending("upstream_cut", 1000 - 3 - output, number, key)

    def test_a_caller_who_hangs_up_closes_the_upstream_and_pays_what_was_held(self):
        """Or what came, where that is more: 50 tokens may come, and nobody knows how many did."""
        rows = (  # whether it is a stream, what the upstream has sent, the maximum, the charge
            (False, b"", 50, 50),
            (True, b"", 50, 50),
            (True, self.CHUNKED, 50, 50),
            (True, self.CHUNKED, 1, 2),
            (True, self.SIZED, 50, 50),
            (True, self.SIZED, 1, self.TEXT),
            (False, self.HALF, 50, 50),
        )
        self.start(None, TOKEN_COST_MODE="usage")
        cases = itertools.product(rows, self.HANG_UPS)
        for number, ((stream, begun, most, output), hang_up) in enumerate(self.each(cases)):
            key = "key-%d" % number
            client, asked = self.ask_stub(call(key, stream=stream, max_tokens=most))
            asked.send(begun)
            if stream and begun:
                client.head()
                client.expect(self.EVENT)
            self.left()  # answered after what came before it
            hang_up(client)
            asked.wait_for_hang_up()
            self.assert_ending("caller_gone", 1000 - 3 - output, number, key)

    def test_who_hangs_up_when_the_first_of_several_answers_has_ended_pays_what_was_held(self):
        for n, cost in self.each(((1, 3), (2, 3 + 100))):
            self.start(None, TOKEN_COST_MODE="usage")
            client, asked = self.begin(events(LAST_DELTA), n=n, max_tokens=50)
            asked.wait_for_hang_up(client)
            self.assert_ending("caller_gone", 1000 - cost)

    def test_a_caller_who_hangs_up_while_its_answer_keeps_coming_closes_the_upstream(self):
        for number, hang_up in enumerate(self.each(self.HANG_UPS)):
            client, asked = self.begin()
            hang_up(client)
            with self.assertRaises(OSError):
                for _ in range(2000):
                    asked.chunks(event(1))
                    time.sleep(0.005)
            self.assert_ending("caller_gone", left=999 - number, number=number)

    def test_a_caller_who_sent_much_ahead_and_hangs_up_is_noticed(self):
        client, asked = self.begin(event(1))
        client.sock.settimeout(0.02)
        with self.assertRaises(OSError):  # it is not read on
            client.send(b"x" * (64 << 20))
        asked.wait_for_hang_up(client)

    def test_a_caller_who_half_closed_has_a_moment_for_each_of_its_calls(self):
        self.start_clock(None)
        client, asked = self.ask_stub(call() + call())
        client.sock.shutdown(socket.SHUT_WR)
        connection, = self.server.open
        wait_for(lambda: connection.leave_timer, "the end of what it sends")
        self.pass_seconds(ClientConnection.HALF_CLOSE_SECONDS - 0.001)
        asked.answer(b'{"first": 1}')
        answered = client.read()
        self.assertEqual((answered.whole, answered.body), (True, b'{"first": 1}'))
        asked = self.stub.next()
        self.awaiting("the response of")
        self.pass_seconds(ClientConnection.HALF_CLOSE_SECONDS + 0.001)
        asked.wait_for_hang_up()
        self.assert_ending("ok", left=998)
        self.assert_ending("caller_gone", left=998, number=1)

    def test_a_bug_of_ours_is_a_500_with_one_traceback_that_ends_its_call_alone_for_nothing(self):
        client, asked = self.begin(event(1))
        bug = ZeroDivisionError("a bug")
        with patch.object(self.proxy.routes, "find", side_effect=bug):
            answered = self.assert_status(500, error="server_error")
        self.tracebacks = 1
        self.assertNotIn(b"bug", answered.body)
        self.assert_ending("internal_error", left=999)  # and one for the stream
        self.assert_said("ZeroDivisionError: a bug")
        asked.chunks(event(2), end=True)
        self.assertEqual(client.rest().body, event(1) + event(2))
        wait_for(lambda: self.proxy.routes.base.stats()["in_flight"] == 0)

    def test_a_bug_of_ours_in_the_middle_of_an_answer_is_a_cut_and_costs_nothing(self):
        client, asked = self.begin(event(1))
        with patch.object(Chunked, "feed", side_effect=ZeroDivisionError("a bug")):
            asked.chunks(event(2))
            client.expect_cut()
        self.tracebacks = 1
        asked.wait_for_hang_up()
        self.assert_ending("internal_error", left=1000)

    def test_a_slow_reader_that_goes_on_is_not_cut_and_pays_for_what_it_took(self):
        """It reads 20 KB a second, of 4 MB; if the system took more than 60 of those ahead, the
        reader would be silent for longer than a reader may be."""
        clock = Clock()
        data = chunk(events(delta("word " * 200))) * 4000 + chunk(events(LAST_DELTA, "[DONE]"))
        costs = []
        for number, (share, outcome) in enumerate(self.each("""[
                [1, "ok"], [0.2, "caller_gone"]]""")):
            if not number:
                self.start(sends(STREAM + data + LAST, close=False), clock, TOKEN_COST_MODE="usage",
                           MAX_TOKENS=10 ** 8)
            client = self.connect(receive_buffer=32768)
            client.send(call(stream=True, max_tokens=1)).head()
            found = client.reader.data
            while len(found) < 0.9 * share * len(data) or share == 1 and found[-5:] != LAST:
                clock.now += 1
                part = client.sock.recv(20000)
                self.assertTrue(part, "it was cut")
                found += part
            client.reset()
            row = self.row(number)
            self.assertEqual(row["outcome"], outcome)
            costs.append(row["output"])
            self.assertLess(row["bytes"] - len(found), 400000)
        self.assertLess(costs[1], 0.3 * costs[0])


class EveryAwaitTest(WaitingCase):
    """A caller who leaves, a deadline and a bug of ours, at every await of a call.

    Rows: what is awaited; how the call ends where one of the three comes then: its outcome, its
    cost, and `kept` where its connection to the upstream is. `-`: nothing is written down."""
    FAULTS = (
        lambda client, context: client.reset(),
        lambda client, context: (setattr(context, "deadline", 0), context.on_timer()),
        lambda client, context: context.future.set_exception(ZeroDivisionError("a bug")),
    )
    LARGE = b"data: " + b"x" * 14000 + b"\n\ndata: [DONE]\n\n"  # more than a slow reader takes
    CHUNKS = STREAM + chunk(LARGE) + LAST

    def send_part(self):
        self.client.send(next(self.parts, b""))

    def asked(self):
        """What the upstream was asked by the call, if it was."""
        self.requests = self.requests or [self.stub.next()]
        return self.requests[0]

    def end_busy(self):
        busy, asked = self.busy
        if not asked.over.is_set():
            asked.answer(b"{}", "200 OK", "Connection: close")
            busy.read()
            busy.close()

    ACTS = {  # what ends each wait
        "a request": send_part,
        "the request's head": send_part,
        "the request's body": send_part,
        "its turn at": end_busy,
        "a connection to": lambda self: self.may_connect.set(),
        "room for the request": lambda self: self.asked().read_body(),
        "the lists of models": lambda self: None,
        "the response of": lambda self: self.asked().send(self.first),
        "the body of": lambda self: self.asked().send(self.rest),
        "the client": lambda self: self.client.read(),
    }

    def setUp(self):
        self.patch_seconds(Catalogue_KEEP_SECONDS=0, Catalogue_AGAIN_SECONDS=0)
        self.may_connect = Event()
        self.waits = []
        self.busy_context = None
        wait, connect = Context.wait, http.client.HTTPConnection.connect

        def record(context, future, seconds, what):
            # Only a slow machine makes the next large body wait.
            counts = context is not self.busy_context and "its turn to be" not in what
            if counts and [(context, what)] != self.waits[-1:]:
                self.waits.append((context, what))
            return wait(context, future, seconds, what)

        def connect_later(owner):
            self.may_connect.wait(PATIENCE)
            connect(owner)
            # A body need not be large to wait for room.
            owner.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        patch_until(self.addCleanup,
                    patch.object(Context, "wait", record),
                    patch.object(llm_proxy.Address, "connect_at_once", lambda _: None),
                    patch.object(http.client.HTTPConnection, "connect", connect_later))

    def begin_call(self, data, rows):
        self.stub.waiting = queue.Queue()  # what was not answered is in the old one
        self.requests = []
        if self.proxy.routes.base.queue:
            self.may_connect.set()
            self.busy = self.ask_stub(call("busy", model="busy"))
            self.busy_context = self.waits[-1][0]
        in_parts = any(row[0] == "the request's head" for row in rows)
        self.parts = iter([data[:30], data[30:-5], data[-5:]] if in_parts else [data])
        self.may_connect.clear()
        del self.waits[:]
        self.client = self.connect_slow()

    def spoil(self, rows, number, fault):
        """Go on to the await with this number, and have it end by this fault."""
        for count, (what, *_) in enumerate(rows[:number + 1]):
            context, found = wait_for(lambda: self.waits[count:], what)[0]
            self.assertEqual(found[:len(what)], what)
            if count < number:
                self.ACTS[what](self)
        wait_for(lambda: not self.unread(self.client), "the reading of all")
        self.on_loop(bool)  # what was read has been taken, then
        self.on_loop(self.FAULTS[fault], self.client, context)
        self.on_loop(bool)  # the call has met it, then
        if "kept" in rows[number][1 + fault]:  # the upstream hears nothing of it
            with suppress(OSError, Cut):
                for what, *_ in rows[number:]:
                    self.ACTS[what](self)

    def what_is_held(self, seen):
        """Returns how the calls ended but for the first `seen`, and numbers of what is held."""
        base, server = self.proxy.routes.base, self.server
        address, = base.addresses
        entries = self.lines.entries()
        lacking = sum(1000 - level for level in levels(self.proxy).values())
        return {
            "endings": ["%s %d" % (entry["outcome"], entry["cost"] or 0)
                        for entry in entries[seen:] if entry["model"] != "busy"],
            "spares": len(address.spares),
            "tokens": lacking - sum(entry["cost"] or 0 for entry in entries),
            "calls": address.running + (base.queue.running if base.queue else 0),
            "connections": len(server.open) + len(server.lingering) + address.connecting,
            "tasks": len(asyncio.all_tasks(self.proxy.loop)),
            "bytes": server.common.budget.free - self.budget,
        }

    def assert_rest(self, seen, ending):
        """What is written down is right, and nothing is held any more."""
        outcome, kept, _ = ending.partition(" kept")
        if outcome != "-":
            wait_for(lambda: self.what_is_held(seen)["endings"], outcome)
        self.may_connect.set()
        self.client.close()
        is_in_line = self.proxy.routes.base.queue is not None
        if is_in_line:
            self.end_busy()
        expected = dict.fromkeys(self.what_is_held(seen), 0)
        expected["endings"] = [outcome] if outcome != "-" else []
        expected["spares"] = int(kept != "")
        with suppress(AssertionError):
            # Slots are free when the upstream has noticed who left, which may hear of it late.
            wait_for(lambda: is_in_line and self.end_all() or self.what_is_held(seen) == expected)
        self.assertEqual(self.what_is_held(seen), expected, self.lines.entries()[seen:])
        self.on_loop(self.proxy.routes.close_stale, True)
        wait_for(self.is_closed, "the end of sockets")

    def end_all(self):
        """Has the upstream go on with what it was asked so far: it sees who left."""
        for asked in self.stub.requests:
            asked.over.set()

    def is_closed(self):
        """Whether the proxy has closed all that it opened, and the upstream has seen it: else the
        next call would be taken for this one."""
        self.end_all()
        unseen, *_ = select.select([self.stub.listener], [], [], 0)
        return not unseen and len(os.listdir("/dev/fd")) <= self.descriptors

    def spoil_each(self, data, payload, text, **settings):
        self.start(None, reads=False, MAX_BODY_BYTES=1 << 23, BREAKER_FAILURES=100, **settings)
        self.stub.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        self.budget = self.server.common.budget.free
        self.descriptors = len(os.listdir("/dev/fd"))
        end = payload.index(b"\r\n\r\n") + 20
        self.first, self.rest = payload[:end], payload[end:]
        rows = [row.strip().split(" | ") for row in text.strip().splitlines()]
        for number, fault in self.each(range(len(rows)), range(3)):
            seen = len(self.lines.entries())
            self.begin_call(data, rows)
            self.spoil(rows, number, fault)
            self.assert_rest(seen, rows[number][1 + fault])
        self.tracebacks = len(rows)

    def test_a_json_call_may_be_spoiled_at_any_await(self):
        self.spoil_each(call(pad="x" * (1 << 19)), answer(self.LARGE), """
            a request | - | - | -
            the request's head | - | refused 0 | internal_error 0
            the request's body | caller_gone 0 | refused 0 | internal_error 0
            a connection to | caller_gone 0 | upstream_failed 0 | internal_error 0
            room for the request | caller_gone 1 | upstream_failed 0 | internal_error 0
            the response of | caller_gone 1 | upstream_failed 0 | internal_error 0
            the body of | caller_gone 1 | ok 1 kept | internal_error 0
            the client | caller_gone 1 kept | caller_gone 1 kept | internal_error 1 kept
            a request | ok 1 kept | ok 1 kept | ok 1 kept""")

    STREAM_ROWS = """
        a request | - | - | -
        the request's head | - | refused 0 | internal_error 0
        the request's body | caller_gone 0 | refused 0 | internal_error 0
        a connection to | caller_gone 0 | upstream_failed 0 | internal_error 0
        the response of | caller_gone 1 | upstream_failed 0 | internal_error 0
        the body of | caller_gone 1 | upstream_cut 1 | internal_error 0
        the client | caller_gone 1 kept | caller_gone 1 kept | internal_error 0 kept
        a request | ok 1 kept | ok 1 kept | ok 1 kept"""

    def test_a_stream_may_be_spoiled_at_any_await(self):
        self.spoil_each(call(stream=True), self.CHUNKS, self.STREAM_ROWS)

    def test_a_stream_that_began_early_may_be_spoiled_at_any_await(self):
        self.spoil_each(call(stream=True), self.CHUNKS, self.STREAM_ROWS,
                        STREAM_COMMENT_SECONDS="0.01")

    def test_a_call_in_line_may_be_spoiled_at_any_await(self):
        self.spoil_each(call(), answer(self.LARGE), """
            a request | - | - | -
            its turn at | caller_gone 0 | refused 0 | internal_error 0
            a connection to | caller_gone 0 | upstream_failed 0 | internal_error 0
            the response of | caller_gone 1 | upstream_failed 0 | internal_error 0
            the body of | caller_gone 1 | ok 1 kept | internal_error 0
            the client | caller_gone 1 kept | caller_gone 1 kept | internal_error 1 kept
            a request | ok 1 kept | ok 1 kept | ok 1 kept""", MAX_CONCURRENCY=1)

    def test_an_upload_may_be_spoiled_at_any_await(self):
        self.spoil_each(request("POST", "/v1/files", self.LARGE), answer(self.LARGE), """
            a request | - | - | -
            the request's head | - | refused 0 | internal_error 0
            a connection to | caller_gone 0 | upstream_failed 0 | internal_error 0
            the request's body | caller_gone 1 | refused 0 | internal_error 0
            the response of | caller_gone 1 | upstream_failed 0 | internal_error 0
            the body of | caller_gone 1 | upstream_cut 1 | internal_error 0
            the client | caller_gone 1 kept | caller_gone 1 kept | internal_error 0 kept
            a request | ok 1 kept | ok 1 kept | ok 1 kept""")

    def test_a_list_of_models_may_be_spoiled_at_any_await(self):
        data = answer(b'{"data": [{"id": "m"}]}')
        self.spoil_each(request("GET", "/v1/models"), data, """
            a request | - | - | -
            the lists of models | caller_gone 0 kept | ok 0 kept | internal_error 0 kept
            a connection to | caller_gone 0 kept | ok 0 | internal_error 0
            the response of | caller_gone 0 kept | ok 0 | internal_error 0
            the body of | caller_gone 0 kept | ok 0 | internal_error 0
            a request | ok 0 kept | ok 0 kept | ok 0 kept""", MODEL_ALIASES="a=b")


class RedactedCallsTest(KeysCase):
    """What goes up of a call, what comes down, and what is written of it."""
    SECRET = "sk-upstream-0123456789"

    def redact(self, answer=None, **settings):
        self.start(answer, **{
            "REDACT": "email,card", "REDACT_UPSTREAMS": "base", "METRICS": "open", **settings})

    def exchange(self, data, said=b'{"said": "hi"}'):
        """Returns what goes up, and the answer."""
        client, asked = self.ask_stub(data)
        asked.answer(said)
        return asked.body, client.read()

    def test_a_value_is_hidden_from_the_endpoint_and_told_to_the_caller(self):
        self.redact()
        body, answered = self.exchange(
            call(messages=[{"role": "user", "content": "mail ann@example.com"}]),
            b'{"choices": [{"message": {"content": "to [[EMAIL_1]]"}}]}')
        self.assertEqual(json.loads(body)["messages"][0]["content"], "mail [[EMAIL_1]]")
        self.assertEqual(answered.json()["choices"][0]["message"]["content"], "to ann@example.com")
        entry, row = self.assert_same()
        self.assertEqual((entry["redacted"], row["redacted"]), ("email=1", "email=1"))
        self.assertIn(b'llm_proxy_redacted_total{kind="email"} 1',
                      self.get("/metrics").body)
        self.assertNotIn("ann@", self.lines.text() + str(self.rows(self.path)))
        self.redact(LOG_FORMAT="text")
        self.exchange(call(messages=[{"role": "user", "content": "mail ann@example.com"}]))
        wait_for(lambda: " redacted=email=1\n" in self.lines.text(), "a line")

    def test_a_body_with_nothing_in_it_goes_up_byte_for_byte(self):
        self.redact()
        body = b'{ "model":"m", "temperature": 1.0, "messages":[{"content":"caf\\u00e9"}]}'
        self.assertEqual(self.exchange(request("POST", CHAT, body))[0], body)
        self.assertIsNone(self.row()["redacted"])

    def test_media_that_were_cut_out_go_up_whole(self):
        self.redact()
        image = "data:image/png;base64," + "iVBO" * 20_000
        parts = [{"type": "image_url", "image_url": {"url": image}}, {"text": "a@x.org"}]
        body, _ = self.exchange(call(messages=[{"role": "user", "content": parts}]))
        sent = json.loads(body)["messages"][0]["content"]
        self.assertEqual(sent, [parts[0], {"text": "[[EMAIL_1]]"}])

    def test_block_names_kinds_and_places_in_the_dialect_and_never_values(self):
        self.redact(REDACT_MODE="block")
        for path in self.each((CHAT, "/v1/messages", "/v1beta/models/m:generateContent")):
            answered = self.assert_status(
                400, request("POST", path, chat(system="a@x.org 4111111111111111")))
            self.assertIn("email, card, at system", answered.json()["error"]["message"])
            self.assertNotIn(b"x.org", answered.body)
        self.assertEqual(self.row()["redacted"], "email=1,card=1")
        self.assertEqual(self.exchange(call())[1].status, 200)

    def test_report_counts_and_changes_nothing(self):
        self.redact(REDACT_MODE="report")
        data = call(system="a@x.org [[EMAIL_1]]")
        body, answered = self.exchange(data, b'{"said": "[[EMAIL_1]]"}')
        self.assertTrue(data.endswith(body))
        self.assertEqual((answered.json(), self.row()["redacted"]), (
            {"said": "[[EMAIL_1]]"}, "email=1"))

    def test_an_endpoint_nearby_is_told_all_unless_it_is_named(self):
        for host, far in self.each("""[
                ["http://127.0.0.1", false], ["http://10.1.2.3", false], ["http://vllm", false],
                ["http://box.local", false], ["https://api.openai.com", true],
                ["http://8.8.8.8", true], ["http://[fd00::1]", false],
                ["http://h.example", true]]"""):
            config = read_config({"BASE_API_URL": host, "REDACT": "email"})
            self.assertEqual(config.redacted_upstreams(), {"base"} if far else set())
        config = read_config({"UPSTREAM_OPENAI_KEY": "k", "UPSTREAM_NEAR_URL": "http://h",
                              "REDACT": "email", "REDACT_UPSTREAMS": "ne*"})
        self.assertEqual(config.redacted_upstreams(), {"near"})

    def test_a_start_says_what_must_not_leave_and_for_whom(self):
        settings = {"BASE_API_URL": "http://10.0.0.1", "REDACT": "email",
                    "REDACT_PATTERNS": "order=O-[0-9]+"}
        for more, said in self.each((
                ({}, "must not leave for nobody: email, order (mask)"),
                ({}, "warning: REDACT takes nothing out: no upstream is far from here"
                     " (REDACT_UPSTREAMS)"),
                ({"REDACT_UPSTREAMS": "*", "REDACT_MODE": "block"},
                 "must not leave for base: email, order (block)"))):
            self.assertIn(said, llm_proxy.greeting(read_config({**settings, **more})))

    def test_a_call_that_is_blocked_at_one_upstream_goes_to_the_next(self):
        far, near = self.start_named(
            "far near", "REDACT=email REDACT_MODE=block REDACT_UPSTREAMS=far BASE_API_URL="
            " UPSTREAM_FAR_MODELS=* UPSTREAM_NEAR_MODELS=* UPSTREAM_ORDER=far,near")
        self.assertEqual(self.came_from(call()), "far")
        self.assertEqual(self.came_from(call(system="a@x.org")), "near")
        self.assertEqual(near.requests[0].json()["system"], "a@x.org")

    def test_what_may_leave_is_left(self):
        self.redact(REDACT_ALLOW="*@Example.com, 4111*")
        body, _ = self.exchange(call(system="Ann@example.com b@x.org 4111111111111111"))
        self.assertEqual(json.loads(body)["system"], "Ann@example.com [[EMAIL_1]] 4111111111111111")

    def test_keys_of_ours_never_leave(self):
        caller, odd = "caller-key-0123456789", "odd.key/=+0123"
        self.redact(REDACT="email", BASE_API_KEY=self.SECRET, ADMIN_KEY="admin-key-0123456789",
                    PROXY_API_KEYS="ann=%s, bob=%s" % (caller, odd))
        stored = self.add("cem")
        text = "%s (%s) '%s' key=%s %s-x" % (self.SECRET, caller, odd, stored, caller)
        body, _ = self.exchange(call(caller, system=text))
        self.assertEqual(json.loads(body)["system"], "[[SECRETS_1]] ([[SECRETS_2]]) '[[SECRETS_3]]'"
                         " key=[[SECRETS_4]] %s-x" % caller)

    def test_patterns_of_ones_own_are_looked_for(self):
        self.redact(REDACT="", REDACT_PATTERNS="order=ORD-[0-9]+; ticket=T-[0-9]{3}")
        body, _ = self.exchange(call(system="ORD-123 T-001 ORD-9 a@x.org"))
        self.assertEqual(
            json.loads(body)["system"], "[[ORDER_1]] [[TICKET_1]] [[ORDER_2]] a@x.org")

    def test_a_pattern_of_ones_own_is_found_across_steps(self):
        self.redact(REDACT="", REDACT_PATTERNS="code=K(?:-[0-9]{24}){16}; pin=[a-f]{32}")
        for value, mask in self.each((("K" + 16 * ("-" + 24 * "1"), "[[CODE_1]]"),
                                      (2 * (16 * "ab"), "[[PIN_1]][[PIN_1]]"))):
            body, _ = self.exchange(call(system=501 * " " + value + 600 * " "))
            self.assertEqual(json.loads(body)["system"].strip(), mask)

    def test_a_pattern_of_ones_own_holds_nobody_up(self):
        """Each step took a tenth of a second."""
        self.redact(REDACT="", REDACT_PATTERNS=r"slow=(?:[a-z]+\.)+[a-z]+(?:/\w+)*!")
        for times in self.each((60, 200)):
            body, _ = self.exchange(call(system=times * (63 * "a" + ".") + "aa.a!"))
            self.assertTrue(json.loads(body)["system"].endswith("[[SLOW_1]]"))

    def test_a_key_says_its_own(self):
        self.redact(REDACT="")
        plain, careful = self.add("ann"), self.add("ben", redact="email")
        for key, seen in self.each(((plain, "a@x.org"), (careful, "[[EMAIL_1]]"))):
            body, _ = self.exchange(call(key, system="a@x.org"))
            self.assertEqual(json.loads(body)["system"], seen)
        self.change("set", "ben", redact="off")
        self.assertEqual(
            json.loads(self.exchange(call(careful, system="a@x.org"))[0])["system"], "a@x.org")
        self.assertIsNotNone(self.proxy.redaction)
        self.change("set", "ben", redact="")
        wait_for(lambda: self.proxy.redaction is None)

    def test_what_cannot_be_read_is_counted_or_refused(self):
        form = "Content-Type: multipart/form-data; boundary=x"
        opaque = [request("POST", "/v1/files", b"data", form),
                  request("POST", "/v1/audio/transcriptions", b"--x--\r\n", form),
                  request("POST", "/v1/responses", chat(previous_response_id="resp_1")),
                  request("POST", "/v1/responses", chat(background=True)),
                  request("POST", "/v1beta/models/m:generateContent", chat(
                      cachedContent="cachedContents/1"))]
        self.redact(says())
        for number, data in enumerate(self.each(opaque)):
            self.assert_status(200, data)
            self.assertEqual(self.row(number)["redacted"], "opaque=1")
        self.redact(says(), REDACT_OPAQUE="refuse")
        for data in self.each(opaque):
            self.assert_status(400, data)
        for data in self.each((call(), request("GET", "/v1/models/m"), request(
                "POST", "/v1/responses/resp_1/cancel"))):
            self.assert_status(200, data)

    def test_what_only_counts_is_read_too(self):
        self.redact()
        body, _ = self.exchange(
            request("POST", "/v1/messages/count_tokens", chat(system="a@x.org")))
        self.assertEqual(json.loads(body)["system"], "[[EMAIL_1]]")

    def test_others_come_in_between_while_a_large_prompt_is_searched(self):
        self.redact(says(), REDACT=",".join(REDACTED))
        text = "8.8.8.8 a@b.co 4111111111111111 %s "
        self.ask(call(system=text * 20_000))
        counts = self.row()["redacted"]
        self.assertEqual(counts, "ip=20000,email=20000,card=20000")


# --------------------------------------------------------------------------------------------------
# Pages
# --------------------------------------------------------------------------------------------------

class PagesTest(CallCase):
    HEALTH = """{
        "ok": true, "version": "%s", "model": "gemma4",
        "quota": {"limit": 10, "remaining": 1, "refill_tokens": 2, "refill_interval_seconds": 300,
                  "wait_seconds": 200},
        "upstreams": {"base": {"state": "closed", "in_flight": 0, "addresses": "1/1"}}}"""

    def test_health_tells_version_model_and_the_callers_quota_and_names_no_upstream(self):
        clock = self.start_clock(MAX_TOKENS=10, REQUEST_TOKEN_COST=3, BASE_MODEL="gemma4")
        for _ in range(3):
            self.ask("k")
        clock.now += 100
        answered = self.get("/health", key="k")
        self.assertEqual(answered.json(), json.loads(self.HEALTH % VERSION))
        self.assertNotIn("127.0.0.1", str(answered.fields) + answered.body.decode())

    def test_health_charges_nothing_and_makes_no_bucket(self):
        self.start(MAX_TOKENS=10)
        for number in range(20):
            self.assert_left(10, "key-%d" % number)
        self.assertEqual((len(self.proxy.limits.buckets.levels), self.stub.calls), (0, 0))

    def test_checks_tell_whether_it_lives_and_whether_calls_can_go_anywhere(self):
        self.start_named("spare", "BREAKER_FAILURES=1 PROXY_API_KEYS=sk-1 OPEN_TIMEOUT=1")
        client = self.connect()
        for address in (None, *self.proxy.routes.addresses()):
            client.answers(200, request("GET", "/readyz"))
            if address:
                self.on_loop(address.breakers.connections.judge, False, time.monotonic())
        client.answers(503, request("GET", "/readyz"))
        answered = client.exchange(request("GET", "/healthz"))
        self.assertEqual((answered.status, answered.body, self.stub.calls), (200, b"ok\n", 0))

    def test_a_model_that_fails_leaves_the_proxy_ready(self):
        self.start(says(b"{}", "503 No"), BREAKER_FAILURES=1)
        for key in ("a", "b"):
            self.ask(key)
        self.assert_base("open", addresses="0/1")
        self.assert_status(200, request("GET", "/readyz"))

    def test_head_of_a_page_is_its_head(self):
        self.start(BASE_MODEL="m")
        client = self.connect()
        for path in self.each(("/health", "/v1/models")):
            full = client.exchange(request("GET", path))
            head = client.exchange(request("HEAD", path), "HEAD")
            self.assertEqual((head.status, head.body), (200, b""))
            self.assert_fields(head, "content-length: %d" % len(full.body))

    def test_a_preflight_is_a_204_that_allows_what_was_asked_for(self):
        self.start(PROXY_API_KEYS="sk-1")
        data = request("OPTIONS", CHAT, b"", "Origin: https://chat.example",
                       "Access-Control-Request-Headers: x-a, authorization")
        answered = self.assert_status(
            204, data, "content-length:", "access-control-allow-origin: *",
            "access-control-allow-headers: x-a, authorization")
        self.assertIn("POST", answered.get("access-control-allow-methods"))
        self.assert_calls(0)

    ORIGINS = table("""\
*                               https://one.example     *
*                               -                       *
https://one.example,https://b   https://one.example     https://one.example
https://one.example,https://b   https://b               https://b
https://one.example,https://b   https://evil.example    -
https://one.example,https://b   -                       -
https://*.example               https://a.b.example     https://a.b.example
https://*.example               https://evil.test/.example  -
local                           https://one.example     -
local                           null                    -
local                           http://localhost:3000   http://localhost:3000
local                           http://192.168.1.7      http://192.168.1.7
local                           http://100.64.1.7:80    http://100.64.1.7:80
local                           http://8.8.8.8          -
local                           http://[fe80::1]:1      http://[fe80::1]:1
local                           http://[2606:4700::1]   -
local                           https://gpu.local       https://gpu.local
local                           https://gpu             https://gpu
local                           https://gpu.local.evil.example  -
local                           chrome-extension://abc  chrome-extension://abc
local                           tauri://localhost       tauri://localhost
local                           evil://localhost        -
local,https://one.example       https://one.example     https://one.example
-                               https://one.example     -
-                               http://127.0.0.1:8080   http://127.0.0.1:8080
off                             https://one.example     -
off                             http://localhost        -""")

    def test_every_answer_tells_browsers_who_may_read_it(self):
        too_long = "local", "http://" + "a" * 300, ""
        last = None
        for setting, origin, allowed in self.each([too_long, *self.ORIGINS]):
            if setting != last:
                self.start(CORS_ORIGINS=setting)
            last, before = setting, self.stub.calls
            field = b"\r\nOrigin: %b\r\n" % origin.encode() if origin else b"\r\n"
            for data in (call(), HEALTH, request("POST", CHAT, b"{")):
                answered = self.ask(data.replace(b"\r\n", field, 1))
                self.assert_fields(answered, "access-control-allow-origin: " + allowed)
                if setting not in ("*", "off"):
                    self.assertIn("Origin", answered.get("vary"))
            self.assertEqual(self.stub.calls - before, not origin or bool(allowed))

    def test_a_page_that_may_not_call_is_told_so_before_its_body_is_read(self):
        self.start(None)
        for method, path in self.each((("POST", CHAT), ("PUT", "/x"), ("DELETE", "/v1/files/1"))):
            client = self.send(request(
                method, path, b"", "Origin: http://gpu.evil.example:8899", "Expect: 100-continue",
                host="gpu.evil.example:8899").replace(b"Length: 0", b"Length: 9"))
            answered = client.answers(403)
            self.assertIn("CORS_ORIGINS", answered.json()["error"]["message"])
        self.assert_spent(0, 1000)

    def test_where_keys_are_asked_for_any_page_may_call_with_one(self):
        for settings in self.each("""[
                {"PROXY_API_KEYS": "sk-1"}, {"BASE_API_KEY": "passthrough"}]"""):
            self.start(**settings)
            answered = self.assert_status(200, call("sk-1", "Origin: https://one.example"))
            self.assert_fields(answered, "access-control-allow-origin: *")

    def test_every_answer_is_dated_once(self):
        now = "Tue, 14 Nov 2023 22:30:00 GMT"
        self.start_clock(PROXY_API_KEYS="k", MAX_TOKENS=1)
        there = "Mon, 13 Nov 2023 22:30:00 GMT"
        for data, field, date in self.each([
                (HEALTH, "X: y", now), (request("GET", "/v1/x", key="k"), "X: y", now),
                (request("GET", "/v1/x", key="k"), "Date: " + there, there), (call(), "X: y", now),
                (call("k"), "X: y", now), (call("k"), "X: y", now)]):
            self.stub.answer = says(b"{}", "200 OK", field)
            self.assertEqual(self.ask(data).get("date"), date)

    def test_no_server_in_between_is_to_hold_events_back(self):
        self.start_clock(None, MAX_TOKENS=2, STREAM_COMMENT_SECONDS="0.05")
        for field in self.each(["X: y", "X-Accel-Buffering: yes"]):
            head = raw_head("HTTP/1.1 200 OK | Content-Type: text/event-stream | " + CHUNKED
                            + " | " + field)
            client, asked = self.begin(event(1), head=head, key="k")
            asked.chunks(end=True)
            self.assert_fields(client.answered, "x-accel-buffering: no")
        self.assert_fields(self.ask(call("k", stream=True)), "x-accel-buffering: no")
        self.assert_fields(self.ask("k"), "x-accel-buffering:")
        client, asked = self.ask_stub(call("early", stream=True))
        self.awaiting("the response of")
        self.pass_seconds(0.06)
        self.assert_fields(client.head(), "x-accel-buffering: no")
        asked.close()

    def test_a_request_id_is_a_uuid_unless_the_caller_sent_one_which_alone_goes_upstream(self):
        odd = ("two words", "x" * 200, "\xe4", "")
        rows = [call(), HEALTH, b"nonsense\r\n\r\n"]
        rows += [call(None, "X-Request-ID: " + name) for name in odd]
        names = []
        for data in self.each(rows):
            names.append(self.ask(data, "GET").get("x-request-id"))
            self.assertRegex(names[-1], "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
        self.assertEqual(names, sorted({*names}))  # else the ledger would write far more pages
        self.assert_fields(self.stub.requests[0], "x-request-id:")
        mine = "X-Request-ID: mine-1"
        self.assert_status(200, call(None, mine), mine)
        self.assert_fields(self.stub.last, mine)


class CatalogueTest(CallCase):
    @staticmethod
    def lists(names):
        return says({"object": "list", "data": [{"id": name} for name in names.split()]})

    def listed(self, *fields, path="/v1/models"):
        return self.get(path, *fields).json()

    def assert_listed(self, names):
        self.assertEqual([row["id"] for row in self.listed()["data"]], names.split())

    def test_the_lists_of_all_upstreams_are_one(self):
        one, gemini, anthropic, down, odd, private = self.start_named(
            "one gemini anthropic down odd private",
            "MODEL_ALIASES=fast=gpt-5 UPSTREAM_ANTHROPIC_KEY=k UPSTREAM_ANTHROPIC_MODELS=*"
            " UPSTREAM_ONE_MODELS=gpt-*,shared UPSTREAM_GEMINI_MODELS=* UPSTREAM_ODD_MODELS=*"
            " UPSTREAM_DOWN_MODELS=*", answer=self.lists("gemma4 shared"))
        one.answer = self.lists("gpt-5 dall-e shared")
        gemini.answer = self.lists("models/gemini-2")
        anthropic.answer = self.lists("claude-5")
        odd.answer = says(b"[]")
        down.refuse_connections()
        self.assert_listed("gemma4 shared claude-5 gemini-2 gpt-5 fast")
        asked = anthropic.requests[0]
        self.assertEqual(asked.target, "/v1/models?limit=1000")
        self.assert_fields(asked, "x-api-key: k", "anthropic-version: 2023-06-01")
        listed = self.listed("anthropic-version: 2023-06-01")
        self.assertEqual((listed["first_id"], listed["has_more"]), ("gemma4", False))
        self.assertEqual(listed["data"][0]["type"], "model")
        listed = self.listed("x-goog-api-key: k", path="/v1beta/models")
        self.assertEqual(listed["models"][0]["name"], "models/gemma4")
        self.assertEqual((private.calls, self.stub.calls), (0, 1))

    def test_what_an_upstream_tells_of_its_models_stays_with_them_and_with_their_aliases(self):
        facts = {"created": 7, "owned_by": "vllm", "max_model_len": 4096, "meta": {"n": 1}}
        rows = {"object": "list", "data": [{"id": "m", "object": "model", **facts}]}
        claude, = self.start_named("anthropic", "MODEL_ALIASES=fast=m,none=x"
                                   " UPSTREAM_ANTHROPIC_MODELS=*", answer=says(rows))
        claude.answer = says({"data": [{"id": "c", "display_name": "Claude"}]})
        nothing = {"object": "model", "created": 0, "owned_by": "llm-proxy"}
        self.assertEqual(self.listed()["data"], [
            {"id": "m", "object": "model", **facts}, {"id": "c", **nothing},
            {"id": "fast", "object": "model", **facts}, {"id": "none", **nothing}])
        names = [row["display_name"] for row in self.listed("anthropic-version: x")["data"]]
        self.assertEqual(names, ["m", "Claude", "fast", "none"])

    def test_the_list_of_a_lone_upstream_is_in_the_clients_api(self):
        self.start(self.lists("theirs"))
        listed = self.listed("anthropic-version: 2023-06-01")
        self.assertEqual((listed["first_id"], listed["data"][0]["type"]), ("theirs", "model"))
        listed = self.listed("x-goog-api-key: k", path="/v1beta/models")
        self.assertEqual(listed["models"][0]["name"], "models/theirs")
        own = b'{"data": "of a kind of its own"}'
        self.start(lambda asked: asked.send(
            answer(own) if asked.get("x-api-key") else answer(b"{}", "401 No")), BASE_API_KEY="k")
        self.assertEqual(self.listed("anthropic-version: x"), json.loads(own))

    def test_an_upstream_at_its_limit_is_asked_and_one_that_fails_is_asked_again_soon(self):
        clock = Clock()
        box, = self.start_named(
            "box", "UPSTREAM_BOX_MODELS=* UPSTREAM_BOX_MAX_CONCURRENCY=1",
            answer=self.lists("b"), clock=clock)
        box.answer = None
        client = self.send(call())
        asked = box.next()
        box.answer = self.lists("a")
        self.assert_listed("b a")
        self.complete(client, asked)
        clock.now += 61
        box.answer = says(b"{}", "500 No")
        self.assert_listed("b a")
        clock.now += 6
        box.answer = self.lists("c")
        self.assert_listed("b c")

    def test_ollamas_list_is_asked_for_and_given_in_its_own_api(self):
        rows = [{"name": name, "model": name, "size": 7, "details": {"family": "llama"}}
                for name in ("llama3.2:latest", "other")]
        ollama = self.stub_of("ollama", says({"models": rows}))
        self.start(self.lists("theirs"), UPSTREAM_OLLAMA_URL=ollama.url,
                   UPSTREAM_OLLAMA_MODELS="llama*", MODEL_ALIASES="fast=llama3.2:latest")
        self.assert_listed("theirs llama3.2:latest fast")
        self.assertEqual(ollama.requests[0].target, "/api/tags")
        found = [(row["name"], row["model"], row["size"], row["details"])
                 for row in self.listed(path="/api/tags")["models"]]
        self.assertEqual(found, [
            ("theirs", "theirs", 0, {}),
            *((name, name, 7, {"family": "llama"}) for name in ("llama3.2:latest", "fast"))])
        self.start(says({"models": rows}))
        self.assertEqual(self.listed(path="/api/tags"), {"models": rows})

    def test_a_list_is_kept_for_a_minute_and_asked_for_once_by_many(self):
        clock = Clock()
        one, = self.start_named("one", "UPSTREAM_ONE_MODELS=*", answer=self.lists("b"), clock=clock)
        one.answer = self.lists("a")
        with threads([self.listed] * 8):
            pass
        self.assert_listed("b a")
        self.assert_calls(1)
        clock.now += 61
        self.stub.answer = self.lists("c")
        self.assert_listed("c a")
        self.assert_calls(2)

    def test_an_upstream_that_does_not_answer_is_left_out_in_time(self):
        silent, = self.start_named("silent", answer=self.lists("b"), UPSTREAM_SILENT_MODELS="*",
                                   clock=Clock())
        silent.answer = None
        client = self.send(request("GET", "/v1/models"))
        self.awaiting("the lists of models")
        wait_for(lambda: silent.calls and self.server.admin.lists.get("base"), "the other's list")
        self.pass_seconds(llm_proxy.Catalogue.ASK_SECONDS)
        self.assertEqual([row["id"] for row in client.read("GET").json()["data"]], ["b"])
        silent.next().wait_for_hang_up()

    def test_a_model_that_is_set_is_the_list(self):
        stubs = self.start_named(
            "one two", "BASE_MODEL=gemma4 UPSTREAM_ONE_MODEL=served UPSTREAM_ONE_MODELS=fast,fa*"
                       " UPSTREAM_TWO_MODELS=gpt-5,gpt-* UPSTREAM_TWO_KEY=passthrough")
        self.assert_listed("gemma4 fast gpt-5")
        self.assertEqual([stub.calls for stub in stubs], [0, 0])

    def test_the_list_of_the_base_alone_is_its_model_where_that_is_set_and_else_its_own(self):
        self.start(BASE_MODEL="gemma4")
        listed = self.listed(path="/models")
        self.assertEqual((listed["object"], listed["data"][0]["id"]), ("list", "gemma4"))
        self.assert_listed("gemma4")
        self.assert_calls(0)
        self.start(self.lists("theirs"))
        self.assert_listed("theirs")


# --------------------------------------------------------------------------------------------------
# Admin
# --------------------------------------------------------------------------------------------------

ADMIN = "an-admins-key-of-24-char"
VIEWER = "a-viewers-key-of-24-char"


class AdminCase(ManyCase):
    def start(self, *arguments, **settings):
        super().start(*arguments, **{"ADMIN_KEY": ADMIN, "VIEWER_KEY": VIEWER, **settings})

    def admin(self, method, path, payload=None, key=ADMIN, *fields):
        """Ask the admin API; returns the Answered."""
        body = b"" if payload is None else encoded(payload)
        return self.ask(request(method, "/admin/api" + path, body, *fields, key=key))

    def look(self, path, key=VIEWER):
        """Returns what a page says."""
        answered = self.admin("GET", path, key=key)
        self.assertEqual(answered.status, 200, answered.body)
        return answered.json()


class AdminTest(AdminCase):
    def test_pages_are_for_viewers_and_changes_for_admins(self):
        keys = {"nobody": None, "wrong": "nobody's", "viewer": VIEWER, "admin": ADMIN}
        for method, path, who, status in self.each("""
                GET -> /summary -> nobody -> 401
                GET -> /summary -> wrong -> 401
                GET -> /nothing -> nobody -> 401
                GET -> /nothing -> viewer -> 404
                GET -> /upstreams -> viewer -> 200
                GET -> /upstreams -> admin -> 200
                HEAD -> /upstreams -> viewer -> 200
                HEAD -> /events -> viewer -> 405
                DELETE -> /upstreams -> admin -> 405
                POST -> /upstreams/base/disable -> viewer -> 403
                POST -> /upstreams/none/disable -> admin -> 404
                POST -> /upstreams/base/enable -> admin -> 200"""):
            self.assertEqual(self.admin(method, path, key=keys[who]).status, int(status))

    def test_wrong_keys_are_counted_with_those_at_the_front_door(self):
        self.start_clock(PROXY_API_KEYS="sk-1")
        found = [self.admin("GET", "", key="wrong-%d" % number).status for number in range(4)]
        found += [self.get("/metrics", key="more-%d" % number).status for number in range(4)]
        found += [self.ask("guess-%d" % number).status for number in range(4)]
        self.assertEqual(found, [401] * 10 + [429] * 2)
        for path in ("/admin/api", "/metrics"):
            self.assert_status(200, request("GET", path, key=ADMIN))

    def test_the_contents_name_every_page_and_who_asks(self):
        found = self.look("")
        self.assertEqual(found["you"], {"name": "VIEWER_KEY", "role": "viewer"})
        self.assertIn("/admin/api/upstreams/NAME/test", [row["path"] for row in found["endpoints"]])

    def test_the_readme_has_the_same_list(self):
        rows = ["| `%s /admin/api%s` | %s | %s |" % (row.method, row.path, row.role, row.does)
                for row in llm_proxy.ADMIN_PAGES]
        self.assertIn("\n".join(rows), source(os.path.join(FOLDER, "README.md")))

    def test_a_page_of_ours_may_ask_whatever_its_origin(self):
        self.start(CORS_ORIGINS="off")
        for origin, status in self.each("""[
                ["http://proxy.test", 200], ["http://evil.test", 403]]"""):
            answered = self.admin("POST", "/upstreams/base/enable", {}, ADMIN, "Origin: " + origin)
            self.assertEqual(answered.status, status)

    def test_what_is_posted_must_be_a_small_json_object(self):
        for body, status in self.each((
                (b"", 200), (b"{}", 200), (b"[]", 400), (b"{", 400), (b"x" * 70000, 413))):
            data = request("POST", "/admin/api/upstreams/base/enable", body, key=ADMIN)
            self.assert_status(status, data)

    def test_a_request_without_a_host_is_told_what_it_lacks(self):
        data = request("GET", "/admin/api", key=VIEWER, version="1.0").replace(
            b"Host: proxy.test\r\n", b"")
        self.assert_status(200, data)

    def test_an_upstream_that_is_disabled_is_asked_no_more(self):
        self.assertEqual(self.admin("POST", "/upstreams/base/disable").status, 200)
        self.assert_status(404)
        state = self.look("/upstreams")["upstreams"][0]
        self.assertEqual((state["name"], state["state"]), ("base", "disabled"))
        self.admin("POST", "/upstreams/base/enable")
        self.assert_status(200)
        self.assert_calls(1)

    def test_the_next_upstream_of_a_model_serves_it_while_the_first_is_disabled(self):
        self.start_many({"other": self.stub_of("other")}, UPSTREAM_OTHER_MODELS="m")
        self.assert_from("other", call())
        self.admin("POST", "/upstreams/other/disable")
        self.assert_from("base", call())
        self.assert_status(404, request("POST", "/other" + CHAT, chat()))

    def test_an_upstream_is_tested_by_its_list_of_models(self):
        self.start(says(b'{"data": [{"id": "gemma"}]}'))
        found = self.admin("POST", "/upstreams/base/test").json()
        self.assertEqual((found["ok"], found["models"]), (True, ["gemma"]))
        self.stub.answer = says(b"{}", "500 Broken")
        found = self.admin("POST", "/upstreams/base/test").json()
        self.assertEqual((found["ok"], found["models"]), (False, []))

    def test_the_settings_are_shown_without_secrets(self):
        self.start(BASE_API_KEY="sk-of-the-upstream")
        answered = self.admin("GET", "/config")
        rows = {row["name"]: row for row in answered.json()["settings"]}
        self.assertEqual(rows["ADMIN_KEY"]["value"], "set, not shown")
        self.assertEqual(rows["MAX_TOKENS"]["value"], "1000")
        self.assertEqual(rows["PORT"]["value"], rows["PORT"]["default"])
        for secret in (ADMIN, VIEWER, "sk-of-the-upstream"):
            self.assertNotIn(secret.encode(), answered.body)

    def test_the_bases_own_paths_of_the_same_name_are_below_base(self):
        self.start(base="/v1")
        self.get("/base/admin/api")
        self.post("/base" + CHAT, chat())
        found = [asked.target for asked in self.stub.requests]
        self.assertEqual(found, ["/v1/admin/api", "/v1/chat/completions"])


class AdminBooksTest(AdminCase):
    def start(self, *arguments, **settings):
        self.path = new_path(self, "llm_proxy.db")
        super().start(*arguments, **{"DATABASE": self.path, **settings})

    def wait_for_rows(self, count):
        wait_for(lambda: self.look("/usage")["total"]["calls"] == count, "rows in the ledger")

    def change(self, method, path, payload=None, status=200):
        """Returns what an admin is told of a change: the proxy goes by it then."""
        answered = self.admin(method, path, payload)
        self.assertEqual(answered.status, status, answered.body)
        return answered.json()

    def add(self, name="ann", **fields):
        return self.change("POST", "/keys", {"name": name, **fields}, 201)

    def test_refused_pages_are_summed_up_like_refusals_without_a_known_caller(self):
        self.patch_seconds(RefusalSums_SHOWN=0)
        self.start()
        for _ in range(3):
            self.assertEqual(self.admin("GET", "/nothing", key=VIEWER).status, 404)
        self.ask(call())
        self.wait_for_rows(1)
        self.on_loop(self.proxy.books.refusals.report)
        self.assert_said("3 more were refused: 404 127.0.0.1 x3")
        self.assertIn("VIEWER_KEY", [row["name"] for row in self.look("/callers")["callers"]])

    def test_a_key_is_made_shown_changed_and_removed(self):
        made = self.add(team="red", limits="5000 tokens per day")
        self.assert_status(200, call(made["key"]))
        self.assert_status(401, call("another"))
        self.change("PATCH", "/keys/ann", {"tag": "web", "team": ""})
        found = self.look("/keys/ann")
        self.assertEqual((found["tag"], found["team"], found["limits"]), (
            "web", None, "5000 tokens per day"))
        self.assertNotIn("key", found)
        self.change("DELETE", "/keys/ann")
        self.assertEqual(self.look("/keys"), {"keys": []})
        self.assert_status(401, call(made["key"]))

    def test_a_key_is_revoked_restored_and_rotated(self):
        first = self.add()["key"]
        self.change("POST", "/keys/ann/revoke")
        self.assert_status(401, call(first))
        self.change("POST", "/keys/ann/restore")
        self.assert_status(200, call(first))
        keys = [first]
        for grace, found in (("1h", [200, 200]), (None, [401, 401, 200])):
            keys.append(self.change("POST", "/keys/ann/rotate", {"grace": grace})["key"])
            self.assertEqual([self.ask(key).status for key in keys], found)

    def test_a_change_of_keys_is_answered_though_the_ledger_is_hindered(self):
        with patch.object(Admin, "READ_SECONDS", 0.01), \
                patch.object(llm_proxy.Ledger, "read_news"):
            self.assertEqual(self.admin("POST", "/keys", {"name": "ann"}).status, 201)

    def test_what_is_wrong_with_a_key_is_told(self):
        self.add()
        for method, path, payload, status, said in self.each("""
                POST -> /keys -> {"name": "ann"} -> 400 -> stored already
                POST -> /keys -> {} -> 400 -> name must be
                POST -> /keys -> {"name": "a b"} -> 400 -> name must be
                POST -> /keys -> {"name": "b", "limits": "3 cows"} -> 400 -> limits must be
                POST -> /keys -> {"name": "b", "self": "x"} -> 400 -> no field self
                POST -> /keys -> {"name": "b", "note": 3} -> 400 -> must be text
                PATCH -> /keys/bob -> {"note": "x"} -> 404 -> no key is stored
                GET -> /keys/bob -> null -> 404 -> no key is stored
                POST -> /keys/ann/give -> {"amount": "2", "unit": "cow"} -> 400 -> amount must
                POST -> /keys/ann/give -> {"amount": "2", "unit": "usd"} -> 400 -> counts usd
                POST -> /callers/bob/reset -> null -> 404 -> Nobody of this name"""):
            answered = self.admin(method, path, json.loads(payload))
            self.assertEqual(answered.status, int(status))
            self.assertIn(said, answered.error()["message"])

    def test_a_window_is_seen_where_buckets_are(self):
        self.start_clock(says(completion(150, 0)), METRICS="open", WARN_AT="80%",
                         LIMITS="each 200 tokens per calendar month in Europe/Berlin")
        secret = self.add()["key"]
        self.ask(call(secret, max_tokens=1))
        self.admin("PATCH", "/keys/ann", {"limits": "100 tokens per 60s window"})
        self.ask(call(secret, max_tokens=1))
        row, = self.look("/callers")["callers"]
        found = {one["rule"]: (one["level"], one["refill"], one["interval"], one["full_in"])
                 for one in row["buckets"]}
        self.assertEqual(found, {
            "each 200 tokens per calendar month in Europe/Berlin":
                (-100, 300, 30 * 86400, 16 * 86400 + 1800),
            "each 100 tokens per 60s window": (-50, 150, 60, 60)})
        text = self.get("/metrics").body.decode()
        self.assertIn('rule="each 100 tokens per 60s window",caller="ann"} -50', text)
        self.assert_said("150% of each 100 tokens per 60s window")
        self.change("POST", "/keys/ann/reset")
        self.assert_left(100, secret)

    def test_a_caller_is_given_more_and_its_buckets_are_filled(self):
        self.start(LIMITS="each 2 requests per day", METRICS="open")
        secret = self.add()["key"]
        self.assertEqual([self.left(secret) for _ in range(2) if self.ask(secret)], [1, 0])
        self.change("POST", "/callers/ann/give", {"amount": 5, "unit": "requests"})
        self.assert_left(5, secret)
        bucket, = self.look("/callers")["callers"][0]["buckets"]
        self.assertEqual((bucket["level"], bucket["capacity"]), (5, 7))
        self.assertGreater(bucket["full_in"], 3600)
        self.assertIn('bucket_capacity{rule="each 2 requests per day",caller="ann"} 7',
                      self.get("/metrics").body.decode())
        self.change("POST", "/keys/ann/reset")
        self.assertGreaterEqual(self.left(secret), 2)

    def test_every_write_is_in_the_audit_and_in_the_log(self):
        self.add()
        self.admin("POST", "/upstreams/base/disable")
        self.change("POST", "/keys/ann/revoke")
        rows = self.look("/audit")["rows"]
        self.assertEqual([(row["who"], row["what"], row["target"]) for row in rows], [
            ("ADMIN_KEY", "revoke key", "ann"), ("ADMIN_KEY", "disable upstream", "base"),
            ("ADMIN_KEY", "add key", "ann")])
        self.assert_said("ADMIN_KEY of 127.0.0.1 did POST /admin/api/keys/ann/revoke")
        self.assertEqual(len(self.look("/audit?before=%d" % rows[1]["id"])["rows"]), 1)

    def test_an_upstream_stays_disabled_after_a_new_start(self):
        self.admin("POST", "/upstreams/base/disable")
        copied = new_path(self, "copy.db")
        with closing(sqlite3.connect(self.path)) as source:
            with closing(sqlite3.connect(copied)) as target:
                source.backup(target)
        self.run_proxy(read_config({"BASE_API_URL": self.stub.url, "DATABASE": copied}), time)
        self.assert_status(404)

    def test_calls_and_their_sums_are_told(self):
        for key in ("k1", "k1", "k2"):
            self.ask(key)
        self.wait_for_rows(3)
        first = self.look("/calls?limit=2")
        rest = self.look("/calls?limit=2&before=%d" % first["next"])
        self.assertEqual((len(first["calls"]), len(rest["calls"])), (2, 1))
        one = first["calls"][0]
        self.assertEqual(self.look("/calls/" + one["id"]), one)
        usage = self.look("/usage?by=caller&step=hour")
        found = [row["calls"] for row in (*usage["groups"], usage["total"])]
        self.assertEqual(found, [2, 1, 3])
        table = self.admin("GET", "/usage?format=csv").body
        self.assertTrue(table.startswith(b"name,calls,failed,limited,"))
        callers = self.look("/callers")["callers"]
        self.assertEqual([row["today"]["calls"] for row in callers], [1, 2])
        self.assertEqual(callers[0]["buckets"][0]["capacity"], 1000)
        self.assertEqual(self.look("/summary")["today"]["calls"], 3)

    def test_a_caller_sees_its_own_use_and_nobody_elses(self):
        self.start(PROXY_API_KEYS="ann=sk-ann, ben=sk-ben")
        self.ask("sk-ann")
        self.wait_for_rows(1)
        for key, calls in self.each("""[["sk-ann", 1], ["sk-ben", 0]]"""):
            found = self.get("/v1/quota", key=key).json()
            self.assertEqual((len(found["calls"]), found["today"]["calls"]), (calls, calls))
            self.assertEqual(found["buckets"][0]["level"], 1000 - calls)
        self.assert_status(401, request("GET", "/v1/quota"))

    def test_what_is_near_its_end_is_told_as_it_is_now(self):
        clock = self.start_clock(LIMITS="each 10 requests per minute")
        for _ in range(9):
            self.ask("k")
        self.assertEqual([row["level"] for row in self.look("/summary")["near"]], [1])
        clock.now += 60
        self.assertEqual(self.look("/summary")["near"], [])

    def test_a_line_before_the_database_is_bounded(self):
        leaves = Event()

        def slow(*_):
            leaves.wait(PATIENCE)
            return {}

        with patch.object(LedgerReader, "usage", slow):
            clients = [self.send(request("GET", "/admin/api/usage", key=VIEWER))
                       for _ in range(self.server.admin.reading.most)]
            wait_for(lambda: sum(self.server.admin.reading.owners.values()) == len(clients))
            self.assertEqual(self.admin("GET", "/calls").status, 503)
            self.assertEqual(self.admin("POST", "/keys", {"name": "ann"}).status, 201)
            for client in clients:
                client.reset()
            # Those that have begun count until they end, though nobody waits for them.
            wait_for(lambda: sum(self.server.admin.reading.owners.values()) == 2)
            self.on_loop(int)
            self.assertEqual(sum(self.server.admin.reading.owners.values()), 2)
            leaves.set()
        wait_for(lambda: not self.server.admin.reading.owners, "the end of all jobs")

    def test_what_no_thread_can_be_started_for_is_a_503_and_does_not_count(self):
        self.start()
        with patch.object(Thread, "start", side_effect=RuntimeError):
            self.assertEqual(self.admin("GET", "/calls").status, 503)
        self.assertFalse(self.server.admin.reading.owners)

    def test_a_program_may_make_many_keys_at_once(self):
        self.start()
        clients = [self.send(request(
            "POST", "/admin/api/keys", b'{"name": "k%d"}' % number, key=ADMIN))
            for number in range(2 * self.server.admin.reading.most)]
        self.assertEqual({client.read().status for client in clients}, {201})

    def test_without_a_database_there_is_what_the_process_knows(self):
        self.start(DATABASE="off")
        self.ask("k")
        self.assertEqual(len(self.look("/callers")["callers"]), 1)
        self.assertTrue(self.look("/summary")["has_calls"])
        self.assertEqual(self.get("/v1/quota", key="k").json()["calls"], [])
        for path in self.each(("/keys", "/calls", "/usage", "/audit")):
            answered = self.admin("GET", path)
            self.assertEqual(answered.status, 503)
            self.assertIn("DATABASE is off", answered.error()["message"])

    def test_who_leaves_before_the_database_has_answered_leaves_nothing_behind(self):
        asked, leaves = Event(), Event()

        def slow(*_):
            asked.set()
            leaves.wait(PATIENCE)
            raise sqlite3.OperationalError("disk I/O error")

        self.patch_seconds(LedgerReader_usage=slow)
        client = self.send(request("GET", "/admin/api/usage", key=VIEWER))
        self.assertTrue(asked.wait(PATIENCE))
        client.reset()
        wait_for(lambda: not self.server.open, "its end")
        leaves.set()
        self.assertEqual(self.admin("GET", "/usage").status, 503)

    def test_what_is_asked_for_wrongly_is_told(self):
        for path in self.each("""/calls?before=x  /calls?slow=x  /usage?step=year  /usage?by=x
                /usage?from=9&to=3  /usage?step=quarter&from=0""".split()):
            self.assertEqual(self.admin("GET", path).status, 400)


class EventsTest(AdminCase):
    def listen(self, *fields):
        client = self.connect()
        client.send(request("GET", "/admin/api/events", b"", *fields, key=VIEWER)).head("GET")
        client.text = ""
        return client

    @staticmethod
    def hear(client, name):
        """Read on to an event; returns what came before it, and what it says."""
        shape = re.compile(r"(?s)(.*?)event: %s\ndata: (.*?)\n\n" % name)
        while not shape.match(client.text):
            client.text += next(client.pieces).decode()
        found = shape.match(client.text)
        client.text = client.text[found.end():]
        return found[1], json.loads(found[2])

    def busy_pulse(self, client):
        """Returns the next pulse, if it tells of calls."""
        _, pulse = self.hear(client, "pulse")
        return pulse["calls"] and pulse

    def test_calls_are_told_as_they_begin_and_end(self):
        client, self.stub.answer = self.listen(), None
        running, asked = self.ask_stub(call("k", model="m"))
        _, begun = self.hear(client, "begin")
        self.complete(running, asked)
        _, ended = self.hear(client, "end")
        self.assertEqual(begun["model"], "m")
        self.assertIn(begun["state"], ("connecting", "first byte"))
        self.assertEqual((ended["id"], ended["outcome"]), (begun["id"], "ok"))

    def test_a_listener_that_comes_back_is_told_what_it_missed(self):
        client = self.listen()
        self.ask("k")
        before, first = self.hear(client, "end")
        number = re.findall("id: ([0-9]+)", before)[-1]
        client.close()
        self.ask("k")
        before, second = self.hear(self.listen("Last-Event-ID: " + number), "end")
        self.assertNotIn("event: end", before)
        self.assertNotEqual(first["id"], second["id"])
        self.hear(self.listen("Last-Event-ID: 1"), "lost")

    def test_a_pulse_a_second_tells_what_was_in_it(self):
        self.patch_seconds(Server_BEAT_SECONDS=0.05)
        self.start()
        client = self.listen()
        self.ask("k")
        pulse = wait_for(lambda: self.busy_pulse(client))
        self.assertEqual((pulse["calls"], pulse["failed"], pulse["line"]), (1, 0, 0))

    def test_who_stops_listening_has_made_no_call(self):
        self.listen().reset()
        wait_for(lambda: self.outcome(), "its line")
        self.assertEqual(self.outcome(), "ok")
        self.assertEqual(self.proxy.watchers.metrics.totals()[0], 0)

    def test_who_may_look_no_more_hears_no_more(self):
        client = self.listen()
        self.on_loop(setattr, self.proxy, "callers", llm_proxy.Callers(
            read_config({"BASE_API_URL": self.stub.url}), b"", llm_proxy.StoredKeys(b"")))
        self.ask("k")
        with self.assertRaises(Cut):
            self.hear(client, "pulse")
        self.assertNotIn("event: end", client.text)

    def test_listeners_do_not_hold_up_the_end(self):
        self.listen()
        began = time.monotonic()
        self.drain(PATIENCE)
        self.assertLess(time.monotonic() - began, PATIENCE)


@needs_redis
class SharedEventsTest(AdminCase):
    """What the page of one process shows of all."""
    listen, hear = EventsTest.listen, staticmethod(EventsTest.hear)
    busy_pulse = EventsTest.busy_pulse

    def start(self, *arguments, **settings):
        self.redis = RedisServer(self)
        self.patch_seconds(Server_BEAT_SECONDS=0.05)
        super().start(*arguments, REDIS_URL=self.redis.url, **settings)
        wait_for(lambda: self.proxy.redis.available)

    def start_two(self):
        self.start()
        first = self.proxy, self.address
        self.run_another()
        wait_for(lambda: self.proxy.redis.available)
        return first, (self.proxy, self.address)

    def test_calls_at_another_process_are_told(self):
        (one, here), (two, there) = self.start_two()
        self.address = here
        client = self.listen()
        wait_for(lambda: two.watchers.feed.elsewhere and one.watchers.feed.read_to,
                 "the interest")
        self.address = there

        self.ask("k")
        (_, begun), (_, ended) = [self.hear(client, name) for name in ("begin", "end")]
        self.assertEqual((ended["id"], ended["outcome"]), (begun["id"], "ok"))
        pulse = wait_for(lambda: self.busy_pulse(client))
        self.assertEqual((pulse["calls"], len(pulse["upstreams"])), (1, 1))
        self.assertIn(self.redis.ask("TTL", "{llm_proxy}:pulses"), range(50, 61))
        client.close()
        wait_for(lambda: not two.watchers.feed.elsewhere, "the end of it")
        self.assertEqual(two.watchers.feed.listeners, 0)

    def lone_feed(self):
        """A feed that Redis has left."""
        return llm_proxy.SharedFeed(Clock(), SimpleNamespace(available=False, process=""), "x:")

    def told_of_a_second(self, one, rows):
        """What is told when others counted this meanwhile, (calls, dollars) each."""
        one.on_entries([[b"x:pulses", [[b"7-%d" % number, [b"other", encoded({
            "calls": calls, "tokens": 2 * calls, "failed": 0, "usd": usd, "looking": False,
            "happened": []})]] for number, (calls, usd) in enumerate(rows)]]])
        found = one.added_up({"calls": 0, "tokens": 0, "failed": 0, "usd": "0"})
        one.pulse({})
        return found["calls"], found["tokens"], found["usd"]

    def test_what_others_counted_is_told_once_whether_or_not_each_second_was_read(self):
        one = self.lone_feed()
        for rows, told in self.each((
                ([(5, "1")], (5, 10, "1")), ([], (0, 0, "0")),
                ([(0, "0"), (2, "0.5")], (2, 4, "0.5")), ([(9, "nan!")], (0, 0, "0")))):
            self.assertEqual(self.told_of_a_second(one, rows), told)
        self.told_of_a_second(one, [(10 ** 99, "1e9999999")])  # is no fault

    def test_what_others_count_while_redis_is_away_is_not_told_as_of_one_second(self):
        one = self.lone_feed()
        self.told_of_a_second(one, [(5, "1")])
        one.exchange({})
        self.assertIsNone(one.read_to)

    def test_what_others_told_before_a_process_came_is_not_counted_whatever_its_clock_says(self):
        asked = []
        one = llm_proxy.SharedFeed(Clock(), SimpleNamespace(
            available=True, process="",
            ask=lambda answer, *parts: answer and asked.append((answer, *parts))), "x:")
        for reads in self.each(([], [b"9-7"])):
            one.exchange({})
            (told, *_), *found = asked
            told(b"9-%d" % (7 + len(reads)))  # what this process tells is called
            self.assertEqual([parts[-1] for _, *parts in found], reads)
            asked.clear()

    def test_calls_that_ran_elsewhere_before_anybody_looked_are_told_whole(self):
        (_, here), (_, there) = self.start_two()
        self.stub.answer, self.address = None, there
        running, asked = self.ask_stub(call("k", model="m"))
        self.address = here
        client, rows = self.listen(), []
        while not rows:
            _, pulse = self.hear(client, "pulse")
            rows = pulse["running"]
        self.assertEqual([(row["model"], row["state"], row["upstream"]) for row in rows],
                         [("m", "first byte", "base")])
        self.complete(running, asked)

    def test_what_nobody_of_us_has_told_does_no_harm(self):
        (one, _), _ = self.start_two()
        client = self.listen()
        for text in self.each(("", "[]", "{}", '{"now": "x"}', '{"now": 9e9}',
                               '{"calls": "x", "looking": 1, "usd": "x"}',
                               '{"calls": 1, "tokens": 1, "failed": 1, "usd": "1"}',
                               '{"calls": 1, "tokens": 1, "failed": 1, "usd": "1", '
                               '"happened": [["end"], 7, ["end", []]]}')):
            self.redis.ask("XADD", "{llm_proxy}:pulses", "*", "x", text)
            self.redis.ask("XADD", "{llm_proxy}:pulses", "*", "x", encoded({
                "calls": 1, "tokens": 1, "failed": 1, "usd": "1", "happened": text}))
        self.hear(client, "pulse")
        self.hear(client, "pulse")


# --------------------------------------------------------------------------------------------------
# Dashboard: the page, in a real browser
# --------------------------------------------------------------------------------------------------

class Browser:
    """Chromium without a window, driven by WebDriver (https://www.w3.org/TR/webdriver2/)."""
    PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")
    DRIVER = shutil.which("chromedriver")
    OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               "--window-size=1200,900"]

    def __init__(self, folder):
        for _ in range(9):
            self.process = subprocess.Popen(
                [self.DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
            said = next((row for row in self.process.stdout if " successfully on port " in row), "")
            if said:
                break
            self.process.communicate()  # the port that IPv4 gave it was taken in IPv6
        self.port = int(said.split()[-1].rstrip("."))
        self.session = "/session"
        wait_for(self.is_ready, "chromedriver")
        options = {"binary": self.PROGRAM, "args": [*self.OPTIONS, "--user-data-dir=" + folder]}
        made = self.do("POST", "", {"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}}})
        self.session += "/" + made["sessionId"]

    def is_ready(self):
        with suppress(OSError):
            return self.ask("GET", "/status")["ready"]

    def ask(self, method, path, payload=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with closing(connection):
            connection.request(method, path, None if payload is None else json.dumps(payload))
            found = json.loads(connection.getresponse().read())["value"]
        if isinstance(found, dict) and "error" in found:
            raise LookupError("%s: %s" % (payload, found["message"].split("\n")[0]))
        return found

    def do(self, method, path, payload=None):
        return self.ask(method, self.session + path, payload)

    def open(self, address):
        self.do("POST", "/url", {"url": address})

    def run(self, script):
        """Returns what an expression in the page is."""
        return self.do("POST", "/execute/sync", {"script": "return " + script, "args": []})

    def find(self, path):
        """Returns an element by its XPath. Raises LookupError."""
        found = self.do("POST", "/element", {"using": "xpath", "value": path})
        return "/element/" + "".join(found.values())

    def log(self, kind):
        """Returns what was logged since the last time."""
        return self.do("POST", "/se/log", {"type": kind})

    def close(self):
        with suppress(OSError, LookupError):
            self.do("DELETE", "")
        self.process.terminate()
        self.process.communicate(timeout=PATIENCE)


class DashboardTest(AdminCase):
    """What needs no browser."""

    def test_the_page_may_run_nothing_but_its_own_script(self):
        for path in self.each(("/dashboard", "/me")):
            first, second = [self.get(path) for _ in range(2)]
            policy = first.get("content-security-policy")
            nonce = re.search("script-src 'nonce-([0-9a-f]{32})'", policy)[1]
            self.assertEqual(first.body.count(b'nonce="%b"' % nonce.encode()), 2)
            self.assertNotIn(nonce.encode(), second.body)
            self.assertIn("default-src 'none'", policy)
            self.assertEqual(first.get("cache-control"), "no-store")
            self.assertEqual(first.get("content-type"), "text/html; charset=utf-8")

    def test_paths_that_are_nearly_those_of_the_page_lead_to_it(self):
        for path, place in self.each("""[["/admin", "dashboard"], ["/admin/", "../dashboard"],
                                      ["/dashboard/", "../dashboard"], ["/me/", "../me"]]"""):
            answered = self.get(path)
            self.assertEqual((answered.status, answered.get("location")), (307, place))

    def test_the_page_is_small_and_makes_no_markup_of_text(self):
        page = llm_proxy.DASHBOARD
        self.assertLess(len(page.encode()), 100_000)
        self.assertLessEqual(page.count("\n"), 900)
        for word in self.each(r"""["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write",
                               "eval(", "setAttribute(\"style", "http://", "https://"]"""):
            text = page.replace("http://www.w3.org/2000/svg", "")
            self.assertNotIn(word, text)

    @staticmethod
    def luminance(colour):
        """https://www.w3.org/TR/WCAG21/#dfn-relative-luminance"""
        parts = [int(colour[at:at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = [
            part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    def contrast(self, *colours):
        low, high = sorted(map(self.luminance, colours))
        return (high + 0.05) / (low + 0.05)

    def test_text_stands_out_from_what_is_behind_it(self):
        rows = re.findall(r"--(\w+): light-dark\((#\w+), (#\w+)\)", llm_proxy.DASHBOARD)
        colours = {name: pair for name, *pair in rows}
        self.assertEqual(len(colours), 15)
        for name, least in self.each((
                *[(name, 4.5) for name in ("text", "muted", "accent", "good", "warn", "bad")],
                *[("s%d" % number, 3) for number in range(6)])):
            for behind in ("page", "surface"):
                for ours, theirs in zip(colours[name], colours[behind]):
                    self.assertGreater(self.contrast(ours, theirs), least, (ours, theirs))


@unittest.skipUnless(Browser.PROGRAM and Browser.DRIVER, "there is no chromium and chromedriver")
@tested_once
class PageTest(AdminCase):
    KEY = "//main//tr[td[1]//*[.='ann']]"

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        quick = llm_proxy.DASHBOARD.replace("resolve, 2000", "resolve, 50").replace(
            "> 500 && show()", "> 50 && show()")
        patch_until(cls.addClassCleanup,
                    patch.object(llm_proxy, "DASHBOARD", quick),
                    patch.object(llm_proxy.Server, "BEAT_SECONDS", 0.1))
        folder = tempfile.mkdtemp(dir=QUICK)
        cls.addClassCleanup(shutil.rmtree, folder, ignore_errors=True)  # the browser may write yet
        cls.browser = Browser(folder)
        cls.addClassCleanup(cls.browser.close)

    def start(self, *arguments, **settings):
        settings = {"DATABASE": new_path(self, "llm_proxy.db"), **settings}
        super().start(*arguments, **settings)
        self.place = "http://127.0.0.1:%d" % self.address[1]
        self.addCleanup(self.leave)

    def call(self, *arguments, **payload):
        """Make a call, and wait until it is in the books."""
        calls = self.look("/usage")["total"]["calls"]
        self.ask(call(*arguments, **payload))
        wait_for(lambda: self.look("/usage")["total"]["calls"] > calls, "the row")

    def leave(self):
        """Nothing was wrong in the browser, and nobody else was asked."""
        self.browser.open("about:blank")
        wrong = [row["message"] for row in self.browser.log("browser") if row["level"] == "SEVERE"]
        self.assertEqual([text for text in wrong if "the server responded with" not in text], [])
        events = [json.loads(row["message"])["message"] for row in self.browser.log("performance")]
        asked = [event["params"]["request"]["url"] for event in events
                 if event["method"] == "Network.requestWillBeSent"]
        self.assertEqual([url for url in asked if not url.startswith((
            self.place + "/", "chrome:", "about:", "data:"))], [])

    def until(self, act):
        """Returns what `act` does, once it can be done."""
        fault, end = "it is not so", time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                found = act()
                if found is not False:
                    return found
            except LookupError as failure:
                fault = failure
            time.sleep(0.02)
        self.fail("%s; the page: %s" % (fault, self.text()))

    def text(self):
        return self.browser.run("document.body.innerText")

    def see(self, *texts):
        for text in texts:
            self.until(lambda: text in self.text())

    CLICK = """(one => {
        one?.scrollIntoView({block: "center", behavior: "instant"});
        const {x, y, width, height} = one?.getBoundingClientRect() ?? {};
        const isOnTop = one?.contains(document.elementFromPoint(x + width / 2, y + height / 2));
        if (isOnTop) one.click();
        return !!isOnTop;
    })(document.evaluate(%s, document, null, 9).singleNodeValue)"""

    def click(self, name, within="//*"):
        """Click on the button or link of this name. (WebDriver's click takes ten times as long.)"""
        path = within + "//*[self::button or self::a or self::summary][normalize-space()='%s']"
        self.until(lambda: self.browser.run(self.CLICK % json.dumps(path % name)))

    def count(self, what):
        return self.browser.run("document.querySelectorAll('main tbody %s').length" % what)

    def open_row(self, number, rows):
        """Click on this row of a table, as soon as that has so many."""
        self.until(lambda: self.count("tr") == rows)
        row = self.browser.find("//main//tbody/tr[%d]" % number)
        self.browser.do("POST", row + "/click", {})

    ENTER = """(field => {
        field?.focus(); field?.select();
        return !!field && document.execCommand("insertText", false, %s);
    })(document.querySelector("main input[name=%s]"))"""

    def enter(self, name, text):
        """Put text into the field of this name. (WebDriver's keys take ten times as long.)"""
        self.until(lambda: self.browser.run(self.ENTER % (json.dumps(text), name)))

    def log_in(self, view="", key=ADMIN, path="/dashboard"):
        """Log in at this view: the overview by default."""
        self.browser.open(self.place + path + "#" + view)
        self.enter("key", key)
        self.click("Log in")
        self.see("Log out")

    def test_a_call_is_seen_while_it_runs_and_opened_when_it_has_ended(self):
        self.stub.answer = None
        self.log_in()
        self.see("0 running calls", "No call has come yet")
        client, asked = self.begin(event(1), key="ann", model="gemma")
        self.see("1 running call", "gemma", "base\tstreaming")
        asked.send(chunk(b"data: [DONE]\n\n") + LAST)
        client.rest()
        self.see("ended: ok", "0 running calls")
        self.click("Calls")
        self.see("gemma")
        self.open_row(1, 1)
        self.see("Mostly streaming", "to first byte", "Request id")
        self.assertNotIn("Cached", self.text())

    def made_key(self):
        self.see("The key of ann, shown only now")
        return self.browser.run("document.querySelector('pre').textContent")

    def make_key(self, **settings):
        """Logs in and makes ann a key with two limits on the page; returns it."""
        self.start(**settings)
        self.log_in("keys")
        self.enter("name", "ann")
        self.enter("limits", "5 requests per day; 2 running")
        self.click("Make key")
        return self.made_key()

    def test_a_key_is_made_used_and_filled(self):
        key = self.make_key(LIMITS="all 90000 tokens per day")
        self.assert_status(200, call(key))
        self.click("Callers")
        self.see("4 of 5 requests", "0 running, room for 2 more", "Refused since the start")
        self.ask(key)
        self.see("3 of 5 requests")
        self.click("Give", self.KEY)
        self.assertEqual(self.browser.run("document.querySelector('main select').innerText"),
                         "requests")
        self.assertEqual(self.browser.run("getSelection().toString()"), "5")
        self.enter("amount", "1")
        self.click("Give", self.KEY + "//form")
        self.see("4 of 5 requests", "ann got 1 requests more for 1d.")

    def test_a_bucket_that_callers_share_is_shown_once_by_its_rule_and_drains(self):
        self.start(LIMITS="all 5 requests per day; each 9 requests per day")
        self.call("ann")
        self.log_in("callers")
        for left, key in self.each("""[["4", "ann"], ["3", "bob"], ["2", "ann"]]"""):
            self.see("%s of 5 requests" % left)
            self.assertEqual(self.text().count(" of 5 requests"), 1)
            self.ask(key)

    def test_a_key_is_paused_and_rotated(self):
        first = self.make_key()
        self.click("Callers")
        self.click("Pause", self.KEY)
        self.see("0 running calls of ann will go on; new ones get 401.")
        self.click("Pause", self.KEY + "//form")
        self.see("ann is paused.")
        self.assert_status(401, call(first))
        self.click("Resume", self.KEY)
        self.see("ann may call again.")
        self.assert_status(200, call(first))
        self.click("Keys")
        self.click("Rotate", self.KEY)
        self.click("Rotate", self.KEY + "//form")
        second = self.made_key()
        self.assertEqual([self.ask(key).status for key in (first, second)], [200, 200])
        self.click("Audit")
        self.see("ADMIN_KEY", "ann")

    def test_the_call_that_is_shown_with_a_new_key_goes_to_a_model_that_it_may_use(self):
        self.start(says(b'{"data": [{"id": "gpt-5"}, {"id": "gemma"}]}'))
        self.log_in("keys")
        self.click("More")
        self.enter("name", "ann")
        self.enter("models", "gem*")
        self.click("Make key")
        self.see('"model":"gemma"')

    def test_an_upstream_is_tested_and_disabled(self):
        self.start(says(b'{"data": [{"id": "gemma"}]}'))
        self.log_in("upstreams")
        self.click("Test")
        self.see("1 model")
        self.click("Disable")
        self.click("Disable", "//main//form")
        self.see("base disabled")
        self.assert_status(404)
        self.click("Enable")
        self.see("base up")

    def test_usage_is_drawn_for_the_range_that_was_chosen(self):
        self.start(says(b'{"usage": {"prompt_tokens": 1000, "completion_tokens": 234}}'))
        self.call("ann")
        self.log_in("usage")
        self.click("day")
        self.click("tokens")
        self.see("Tokens by caller, last 24 hours", "1,234", "so far")
        self.assertIn("range=day", self.browser.run("location.hash"))
        self.assertTrue(self.browser.run("!!document.querySelector('#chart rect[style*=s1]')"))
        chart = self.browser.find("//main//*[@id='chart']")
        self.browser.do("POST", chart + "/value", {"text": "\ue012"})  # the arrow to the left
        self.see("Total")

    def test_usage_of_many_is_that_of_the_first_and_of_all_others_together(self):
        for number in range(23):
            self.ask("key%d" % number)
        wait_for(lambda: self.look("/usage")["total"]["calls"] == 23, "the rows")
        self.log_in("usage?measure=calls")
        self.see("all others\t3\t", "Total\t23\t")
        self.assertEqual(self.count("tr"), 22)

    def test_usage_of_calls_without_a_team_says_so(self):
        self.call("ann")
        self.log_in("usage?measure=calls&by=team")
        self.see("none\t1\t")

    def test_usage_is_drawn_for_chosen_days(self):
        self.start(says(b'{"usage": {"prompt_tokens": 1000, "completion_tokens": 234}}'))
        self.call("ann")
        self.log_in("usage?range=custom&measure=tokens")
        self.see("Tokens by caller, chosen days", "1,234")
        self.browser.run(
            "[...document.forms[0].elements].slice(0, 2).map(one => one.value = '2020-02-0' + 2)")
        self.click("Show")
        self.see("There was no call.")
        self.assertIn("from=2020-02-02&to=2020-02-02", self.browser.run("location.hash"))

    @contextmanager
    def slow_summary(self):
        """Holds back the summary until the end of the block."""
        held, tell = [], Admin.summary

        async def summary(admin, ask):
            held.append(ask.reply.context.loop.create_future())
            await held[-1]
            return await tell(admin, ask)

        with patch.object(Admin, "summary", summary):
            yield held
            for future in held:
                self.on_loop(Stream.wake, future)

    def test_the_next_log_in_has_nothing_of_the_one_before(self):
        self.log_in()
        with self.slow_summary() as held:
            self.admin("POST", "/upstreams/base/enable")
            wait_for(lambda: held, "the question")
            self.click("Log out")
        self.enter("key", VIEWER)
        self.click("Log in")
        self.see("VIEWER_KEY (viewer)", "0 running calls")
        self.assert_listens_once()

    def test_who_goes_on_before_the_first_view_is_there_sees_the_second(self):
        self.browser.open(self.place + "/dashboard")
        with self.slow_summary() as held:
            self.enter("key", ADMIN)
            self.click("Log in")
            wait_for(lambda: held, "the question")
            self.browser.run("location.hash = '#audit'")
        self.see("ADMIN_KEY (admin)", "Nothing was changed yet")
        self.assertNotIn("running calls", self.text())
        self.assert_listens_once()

    def assert_listens_once(self):
        feed = self.proxy.watchers.feed
        wait_for(lambda: feed.listeners == 1, "one listener")
        self.ask("ann")
        self.click("Now")
        self.see("3 in a minute")  # tokens

    IN_PIECES = """window.TextDecoderStream = function () {
        return new TransformStream({transform(bytes, pieces) {
            for (let at = 0; at < bytes.length; at += 16384)
                pieces.enqueue(new TextDecoder().decode(bytes.slice(at, at + 16384)));
        }});
    }"""

    def test_an_event_that_comes_in_many_pieces_keeps_nobody_waiting(self):
        self.log_in()
        self.browser.run(self.IN_PIECES)
        self.browser.run("void document.onvisibilitychange()")  # which begins the stream anew
        self.see("0 running calls")
        begun = time.monotonic()
        for told in (("x\n" * 50000, {}), ("warning", {"event": "it_came"})):
            self.on_loop(self.proxy.watchers.feed.tell, *told)
        self.see("it came")
        took = time.monotonic() - begun
        self.assertTrue(took < 6 or is_busy(), took)

    def test_a_list_of_calls_that_grew_long_begins_anew(self):
        self.log_in("calls")
        self.see("No call has come yet")
        rows = 0
        for number in range(10):
            for one in range(10):
                self.on_loop(self.proxy.watchers.feed.tell, "end", {
                    "id": "%d.%d" % (number, one), "time": 1.0, "key": 0, "outcome": "ok"})
            self.until(lambda: self.count("tr") != rows)
            before, rows = rows, self.count("tr")
            if rows < before:
                break
        self.assertLess(rows, before)

    def test_a_call_that_was_limited_shows_its_rule_and_no_charge(self):
        self.start(LIMITS="each 1 requests per day")
        for _ in range(2):
            self.call("ann")
        self.log_in("calls?outcome=limited")
        self.open_row(1, 1)
        self.see("Rule\neach 1 requests per day")
        self.assertNotIn("Charged", self.text())

    def test_a_call_that_was_refused_for_want_of_a_price_says_what_gives_one(self):
        self.start(LIMITS="each 1 usd per day")
        self.call("ann", model="unheard-of")
        self.log_in("calls")
        self.open_row(1, 1)
        self.see("PRICES or UNPRICED can give it one")

    def test_a_small_budget_is_told_as_exactly_as_it_is_spent(self):
        self.start(LIMITS="each 0.02 usd per day")
        self.call("ann")
        self.log_in("callers")
        self.see(" of 0.0200 USD")

    def test_the_focus_is_again_where_a_form_was_opened(self):
        self.start(PROXY_API_KEYS="ben=ben")
        self.admin("POST", "/keys", {"name": "ann"})
        self.log_in("keys")
        for name, field in self.each((("Edit", "limits"), ("Pause", ""), ("Rotate", ""))):
            self.click(name, self.KEY)
            self.assertEqual(self.browser.run("document.activeElement.name"), field)
            self.assertEqual(self.browser.run("!!document.querySelector('main [name=name]')"),
                             name != "Edit")
            self.assertLessEqual(self.browser.run(  # the lines that the buttons stand on
                "new Set([...document.querySelectorAll('.ask button')]"
                ".map(one => one.offsetTop)).size"), 1)
            self.browser.run("document.activeElement.dispatchEvent("
                             "new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}))")
            self.assertEqual(self.browser.run("document.activeElement.textContent"), name)

    def test_calls_of_one_id_have_a_row_each(self):
        for _ in range(2):
            self.ask(call("ann", "X-Request-ID: twice"))
        wait_for(lambda: len(self.look("/calls")["calls"]) == 2, "the rows")
        self.log_in("calls")
        self.ask(call("ann", "X-Request-ID: twice"))
        self.open_row(2, 3)
        self.see("Request id")
        self.assertEqual((self.count("tr"), self.count("tr.open dl")), (4, 1))

    def test_a_call_that_is_told_twice_has_one_row(self):
        self.start(PROXY_API_KEYS="ann=ann")
        self.call("ann")
        self.log_in("calls?caller=ann")
        self.until(lambda: self.count("tr") == 1)
        self.on_loop(self.proxy.watchers.feed.tell, "end", {**self.look("/calls")["calls"][-1]})
        self.ask("ann")
        self.open_row(2, 2)
        self.see("Request id")
        self.assertEqual((self.count("tr"), self.count("tr.open dl")), (3, 1))

    def test_a_live_call_is_found_by_the_model_that_answered_it(self):
        self.start(says(b'{"model": "gemma-2", "usage": {"prompt_tokens": 7}}'))
        self.log_in("calls?model=gemma-2")
        self.see("No such call")
        self.ask(call("ann", model="gemma"))
        self.until(lambda: self.count("tr") == 1)

    def test_who_watches_a_caller_sees_its_call_run_and_end(self):
        self.start(PROXY_API_KEYS="ann=ann,ben=ben")
        self.stub.answer = None
        self.log_in("calls?caller=ann")
        self.see("No such call so far")
        (client, asked), _ = [self.begin(event(1), key=key) for key in ("ann", "ben")]
        self.until(lambda: (self.count("tr"), "streaming" in self.text()) == (1, True))
        self.enter("text", "failed")
        self.browser.run("document.querySelector('#filter').form.requestSubmit()")
        self.see("No such call so far")
        self.click("failed ×")
        asked.send(chunk(b"data: [DONE]\n\n") + LAST)
        client.rest()
        self.until(lambda: (self.count("tr"), "ok" in self.text()) == (1, True))

    def test_a_search_that_is_not_at_its_end_says_so(self):
        self.log_in()
        pages = [{"calls": [], "next": 5}, {"calls": [], "next": None}]
        self.patch_seconds(LedgerReader_calls=lambda *_: pages.pop(0))
        self.browser.run("location.hash = '#calls?outcome=stopped'")
        self.see("None among the latest calls so far.")
        self.click("Look further back")
        self.see("No such call")

    def test_a_viewer_sees_nothing_that_changes_anything(self):
        self.call("ann")
        self.log_in(key=VIEWER)
        for tab, text in self.each("""[["Callers", "1 caller"], ["Keys", "keys add alice"],
                                    ["Upstreams", "base"], ["Audit", "Nothing was changed"]]"""):
            self.click(tab)
            self.see(text)
            found = self.browser.run(
                "[...document.querySelectorAll('main button')].map(one => one.textContent)")
            self.assertIn(found, ([], ["Copy command"]))

    def test_a_wrong_key_and_that_of_a_caller_are_told_so(self):
        self.start(PROXY_API_KEYS="ann=sk-ann")
        self.browser.open(self.place + "/dashboard")
        for key, text in (("guess", "No such key"), ("sk-ann", "may call, but not look here")):
            self.enter("key", key)
            self.click("Log in")
            self.see(text)

    def test_a_caller_sees_what_it_has_left(self):
        self.start(PROXY_API_KEYS="ann=sk-ann", LIMITS="each 5 requests per day")
        self.call("sk-ann")
        self.log_in("", "sk-ann", "/me")
        self.see("What ann has left", "4 of 5 requests, full in", "1 call", "Last calls")

    EVIL = "<img src=x onerror=alert(1)></script>\"'>"

    def test_what_others_said_is_text(self):
        self.start(says({"error": {"message": self.EVIL}}, "400 Bad"))
        self.call("ann", "User-Agent: " + self.EVIL, model=self.EVIL)
        self.log_in("calls")
        self.see(self.EVIL, "upstream said 400")
        self.open_row(1, 1)
        self.see("Agent", "Request id")
        self.click("Usage")
        self.click("model")
        self.see(self.EVIL)
        self.admin("POST", "/keys", {"name": "ann", "note": self.EVIL})
        self.click("Keys")
        self.see(self.EVIL)
        self.assertEqual(self.browser.run("document.querySelectorAll('main img').length"), 0)

    def test_nothing_that_is_long_makes_the_page_scroll_sideways(self):
        self.call("ann", model="m" * 200)
        self.log_in()
        for place in self.each(("calls?model=%s", "usage?by=model&model=%s")):
            self.browser.run("location.hash = '#%s'" % (place % ("m" * 200)))
            self.see("model: " + "m" * 200)
            self.until(lambda: self.count("tr"))
            self.assertLessEqual(self.browser.run(
                "document.documentElement.scrollWidth - innerWidth"), 0)

    def test_a_lost_connection_is_told_and_found_again(self):
        self.log_in()
        self.see("0 running calls")
        feed = self.proxy.watchers[0]
        with patch.object(Admin, "events", side_effect=llm_proxy.Overloaded):
            self.on_loop(setattr, feed, "closed", True)
            self.see("reconnecting, as of")
        self.on_loop(setattr, feed, "closed", False)
        self.until(lambda: "reconnecting" not in self.text())
        self.ask("ann")
        self.see("ended: ok")


# --------------------------------------------------------------------------------------------------
# Server: connections of clients
# --------------------------------------------------------------------------------------------------

class ServerCase(ProxyCase):
    """What tests of connections, of TLS and of whole processes share."""
    EXPECTING = "Expect: 100-continue"

    def assert_last_answer(self, client, status):
        """Fails unless the next answer is whole, has this status and ends the connection. Returns
        it."""
        answered = client.read()
        found = answered.status, answered.whole, client.ending()
        self.assertEqual(found, (status, True, "closed"))
        return answered

    @contextmanager
    def sending(self, client, data):
        """Sends `data` in a thread, as far as it is taken."""
        def send():
            with suppress(OSError):
                client.send(data)
        sender = Thread(target=send, daemon=True)
        sender.start()
        yield
        sender.join(PATIENCE)

    @contextmanager
    def draining(self):
        """Stops the server meanwhile. Returns a list that gets the number of cut calls."""
        cut = []
        drainer = Thread(target=lambda: cut.append(self.drain(PATIENCE)), daemon=True)
        drainer.start()
        wait_for(self.refuses, "the end of accepting")
        yield cut
        drainer.join(PATIENCE)

    def refuses(self):
        """Returns whether nothing listens at the proxy's address."""
        try:
            Client(self.address).close()
        except OSError:
            return True
        return False

    def start_tls(self, *arguments, **settings):
        self.file = pem_file(self)
        self.context = ssl.create_default_context(cafile=self.file)
        self.start(*arguments, TLS_CERT_FILE=self.file, **settings)

    def connect_tls(self, context=None):
        client, context = self.connect(), context or self.context
        client.sock = context.wrap_socket(client.sock, server_hostname="127.0.0.1")
        client.reader.sock = client.sock
        return client

    def in_flight(self, client=None):
        """Returns how many calls run at the upstreams, by /health."""
        client = client or self.connect()
        upstreams = client.exchange(HEALTH).json()["upstreams"]
        client.close()
        return sum(upstream["in_flight"] for upstream in upstreams.values())


def read_to_the_end(client):
    """Returns all that comes until the connection ends, None where that is a reset."""
    try:
        while True:
            client.reader.more()
    except Cut as cut:
        client.close()
        return bytes(client.reader.data) if str(cut) == "closed" else None


class ClientConnectionTest(ServerCase):
    def test_a_connection_carries_one_request_after_another(self):
        client = self.connect()
        for data in self.each((
                call(), HEALTH, request("POST", CHAT, b"{"),
                request("GET", "/v1/x", b"", "Content-Encoding: gzip"),  # it has no body
                request("HEAD", "/v1/x"), call(stream=True))):
            answered = client.exchange(data, data.split(b" ")[0].decode())
            self.assertIsNone(answered.get("connection"))
        self.assertEqual(self.stub.connections, 2)  # the stub answers HEAD with a body
        client.send(HEALTH * 2000)  # which must not hold the loop

    def test_a_caller_who_says_close_is_told_so_and_closed(self):
        for data in self.each((
                call(None, "Connection: close"), call(None, "connection: x, CLOSE"),
                request("GET", "/health", version="1.0"))):
            client = self.send(data)
            answered = self.assert_last_answer(client, 200)
            self.assertEqual(answered.get("connection"), "close")

    def start_with_room(self):
        """One with room for eight bodies, the least that there is; returns what makes a call with
        one, of this key."""
        self.patch_seconds(Server_BODY_MEMORY=0)
        self.start(None, MAX_BODY_BYTES=70000)
        return partial(call, user="x" * 69000)

    def test_all_bodies_together_have_no_more_than_their_room(self):
        """No caller has more than half of it."""
        large = self.start_with_room()
        held = [self.ask_stub(large("a")) for _ in range(4)]
        self.assert_status(503, large("a"), error="server_error")
        held += [self.ask_stub(large("b")) for _ in range(4)]
        self.assert_status(503, large("c"), error="server_error")
        for pair in [self.ask_stub(), *held]:
            self.complete(*pair)

    def test_the_room_of_bodies_comes_back(self):
        large = self.start_with_room()
        self.send(large("a")[:69000]).reset()
        self.assert_entry("outcome", "caller_gone")
        for _ in range(2):
            for pair in [self.ask_stub(large(key)) for key in "aaaabbbb"]:
                self.complete(*pair)
        wait_for(lambda: self.server.common.budget.held == {}, "the return of it all")

    def test_a_body_is_given_up_when_it_is_silent_or_slow_in_its_last_minute(self):
        much, pace = 1 << 20, 16384
        for steps, taken in self.each((
                ([(0, much), (29, 1), (31, 0)], False),
                ([(0, much), (29, 1), (29, 1), (4, 0)], False),
                ([(0, 1), *[(20, 20 * pace)] * 9, (20, 0)], True))):
            clock = self.start_clock()
            total = sum(size for _, size in steps) + (not taken)
            client = self.send(request("POST", CHAT, b"x" * total)[:-total])
            for seconds, size in steps:
                clock.now += seconds
                self.send_apart(client, b"x" * size)
                for _ in range(3):  # what was read has been taken, then
                    self.on_loop(bool)
            self.assertEqual(client.read().status, 400 if taken else 408)

    def test_a_continue_comes_once_and_only_when_the_body_is_wanted(self):
        body = chat()
        for path in self.each((CHAT, "/v1/files")):
            head = request("POST", path, body, self.EXPECTING)[:-len(body)]
            client = self.connect()
            client.answers(100, head)
            self.send_apart(client, body[:10], body[10:])
            client.answers(200)
            self.assertIsNone(self.stub.last.get("expect"))
            client.answers(200, call())

    def test_no_continue_comes_where_the_answer_is_no(self):
        self.start(PROXY_API_KEYS="sk-1", MAX_BODY_BYTES=1000)
        for key, length, status in self.each((
                ("sk-2", 5, 401), (None, 5, 401), ("sk-1", 1001, 413), ("sk-1", 10 ** 14, 413))):
            fields = self.EXPECTING, "Content-Length: %d" % length
            client = self.send(unsized(CHAT, *fields, key=key))
            self.assert_last_answer(client, status)

    def test_a_body_that_comes_without_waiting_for_the_continue_is_taken(self):
        client = self.send(call(None, self.EXPECTING, "Connection: close"))
        self.assertIn(b"HTTP/1.1 200 ", read_to_the_end(client))

    def test_large_or_coded_metered_bodies_and_odd_expectations_are_refused(self):
        self.start(MAX_BODY_BYTES=1000)
        fits = chat().ljust(1000)
        chunks = unsized(CHAT, CHUNKED) + chunk(fits)
        for data, status in self.each((
                (request("POST", CHAT, fits), 200), (request("POST", CHAT, fits + b" "), 413),
                (chunks + LAST, 200), (chunks + chunk(b" ") + LAST, 413),
                (call(None, "Expect: 200-ok"), 417))):
            self.assert_status(status, data)
        self.assert_calls(2)

    def test_compressed_metered_bodies_are_read(self):
        self.start(MAX_BODY_BYTES=3000000)
        body, large = chat(), chat(user="x" * 2900000)
        for coding, sent in self.each((
                ("gzip", gzip.compress(body)), ("X-GZIP", gzip.compress(body)),
                ("identity", body), ("", body), ("deflate", zlib.compress(body)),
                ("deflate", zlib.compress(large)), ("deflate", zlib.compress(body)[2:-4]))):
            packed = request("POST", CHAT, sent, "Content-Encoding: " + coding)
            self.assert_status(200, packed, "accept-encoding")
        self.assertEqual({asked.get("content-encoding") for asked in self.stub.requests}, {None})
        self.assertEqual([asked.body for asked in self.stub.requests[:5]], [body] * 5)

    def test_compressed_metered_bodies_that_cannot_be_read_are_refused(self):
        self.start(MAX_BODY_BYTES=3000000)
        packed, known = gzip.compress(chat()), "accept-encoding: gzip, deflate"
        for coding, sent, status in self.each((
                ("deflate", zlib.compress(b"x" * 3000001), 413), ("gzip", chat(), 400),
                ("gzip", packed[:-1], 400), ("gzip", packed + b"x", 400), ("gzip", b"", 400),
                ("zstd", packed, 415), ("br", packed, 415), ("gzip, gzip", packed, 415))):
            self.assert_status(status, request("POST", CHAT, sent, "Content-Encoding: " + coding),
                               known if status == 415 else "accept-encoding")
        self.assert_calls(0)

    def test_other_compressed_bodies_are_passed_as_they_are(self):
        self.post("/v1/files", b"packed", "Content-Encoding: gzip")
        asked, = self.stub.requests
        self.assertEqual((asked.get("content-encoding"), asked.body), ("gzip", b"packed"))

    def test_what_a_compressed_body_becomes_has_its_room(self):
        self.start_with_room()
        packed = request("POST", CHAT, zlib.compress(chat(user="x" * 69000)),
                         "Content-Encoding: deflate")
        held = [self.ask_stub(packed) for _ in range(4)]  # half of it is for one caller
        self.assert_status(503, packed)
        for pair in held:
            self.complete(*pair)

    def test_a_body_may_come_one_byte_at_a_time_in_both_framings(self):
        client, body = self.connect(), chat()
        chunks = b"".join(chunk(bytes([byte])) for byte in body) + LAST
        for head, sent in self.each((
                (request("POST", CHAT, body)[:-len(body)], body),
                (unsized(CHAT, CHUNKED), chunks))):
            client.send(head)
            for byte in sent:
                client.send(bytes([byte]))
            client.answers(200)
            self.assertEqual(self.stub.last.body, body)

    def test_an_early_answer_can_be_read_every_time(self):
        """3 MB of the body are on their way when the 401 is sent: closing at once would reset."""
        self.patch_seconds(WrongKeys_RULE=read_rule("address 99 requests per minute"))
        self.start(PROXY_API_KEYS="sk-1")
        data = request("POST", CHAT, b"x" * 3000000, key="sk-2")
        for _ in self.each(range(20)):
            client = self.connect()
            with self.sending(client, data):
                answered = client.read()
            found = answered.status, answered.whole, answered.get("connection")
            self.assertEqual(found, (401, True, "close"))
            client.close()

    def test_an_upload_that_is_answered_early_loses_no_later_request(self):
        """The connection ends only where its answer says so."""
        self.start(says(b"{}", "403 No"), reads=False)
        for size, endings in self.each("""[[1000, [null]], [100000, [null, "close"]]]"""):
            client = self.connect()
            answered = client.answers(403, request("POST", "/v1/files", b"x" * size))
            self.assertIn(answered.get("connection"), endings)
            if answered.get("connection") is None:
                client.answers(200, HEALTH)

    def test_a_refused_body_that_came_whole_does_not_end_the_connection(self):
        self.start(PROXY_API_KEYS="sk-1")
        chunks = unsized(CHAT, CHUNKED) + chunk(chat()) + LAST
        bad = request("POST", CHAT, b"{", key="sk-1")
        client = self.send(call("sk-2") + chunks + bad + call("sk-1"))
        self.assertEqual([client.read().status for _ in range(4)], [401, 401, 400, 200])

    def test_a_refusal_does_not_wait_for_the_rest_of_a_chunk(self):
        self.start(PROXY_API_KEYS="sk-1")
        chunks = b"5\r\nhello\r\n0\r\n"
        for end in self.each((0, 1, 6, 10, len(chunks))):
            data = unsized(CHAT, CHUNKED) + chunks[:end]
            self.connect().answers(401, data)

    def test_broken_chunks_of_a_metered_call_are_a_400_that_ends_the_connection(self):
        for body in self.each((
                b"5\nhello", b"+5\r\nhello\r\n", b"5\r\nhelloX\r\n", b"0\r\nX y\r\n\r\n")):
            client = self.send(unsized(CHAT, CHUNKED) + body)
            self.assert_last_answer(client, 400)
        self.assert_spent(0, 1000)

    def test_a_head_or_a_body_that_does_not_come_in_time_is_a_408(self):
        """Single bytes give a head no more time."""
        self.start_clock()
        for start, more, what, seconds in self.each((
                (b"GET /health HTTP/1.1\r\nHost: ", b"x", "head", 6),
                (call()[:-2], call()[-2:-1], "body", 30))):
            client = self.connect()
            self.send_apart(client, start)
            self.pass_seconds(9)
            self.send_apart(client, more)
            self.on_loop(bool)  # it has been taken
            self.assertEqual(self.expire(what), seconds)
            self.assert_last_answer(client, 408)

    def test_an_idle_connection_is_closed_without_a_word(self):
        self.patch_seconds(ClientConnection_IDLE_SECONDS=0.1)
        self.start()
        client = self.connect()
        client.exchange(call())
        client.expect_close()

    def test_pipelined_answers_that_are_taken_slowly_come_in_order_and_hold_up_nobody(self):
        bodies = [b"%d" % number * 3000000 for number in range(3)]
        answers = iter(bodies)
        self.start(lambda asked: asked.answer(next(answers)))
        client = self.connect(receive_buffer=2048).send(call() * len(bodies))
        wait_for(lambda: self.stub.calls, "the first call")
        self.assert_status(200, HEALTH)
        for body in bodies:
            self.assertTrue(client.read().body == body)
        self.entry(2)

    def test_what_matters_on_a_bad_day_says_where_it_stands(self):
        self.start(None, MAX_CONCURRENCY=1, TOKEN_COST_MODE="usage", LOG_FORMAT="text")
        _, asked = self.begin(event(1))
        connection, = self.server.open
        wait_for(lambda: "awaits the body" in repr(connection))
        entry, upstream = connection.reply.entry, self.proxy.routes.base
        there = self.stub.url
        awaits = "awaits the body of the response of %s for 0.0s" % there
        parts = {
            connection: "127.0.0.1 POST %s 0.0s upstream=base %s unsent=0" % (CHAT, awaits),
            connection.context: awaits,
            connection.client:
                "<Stream %d open unread=0 unsent=0>" % connection.client.descriptor,
            upstream.addresses[0]:
                "<Address %s running=1 connecting=0 spare=0 breaker closed>" % there,
            upstream.queue: "<FairQueue 1 of 1 run, {'waiting': 0, 'longest_ms': 0}>",
            entry: "<Entry %s POST %s ok>" % (entry.request_id, CHAT),
            entry.call: "<Call openai chat, model 'm' as 'm', streamed>",
            entry.hold: "<Hold %s=259>" % self.proxy.limits.rules[0].text,
            entry.caller: "<Caller 127.0.0.1>",
            self.proxy.books.log: "<log: 0 queued, 0 dropped>"}
        found = [re.sub(r"\b\d\.\ds", "0.0s", repr(part)) for part in parts]
        self.assertEqual(found, [*parts.values()])
        asked.close()

    def test_errors_do_not_tell_who_we_are(self):
        answered = self.ask(b"nonsense\r\n\r\n")
        self.assertIsNone(answered.get("server"))
        self.assertNotIn(b"python", (str(answered.fields).encode() + answered.body).lower())


# --------------------------------------------------------------------------------------------------
# Server: accepting, TLS, and the way to stop
# --------------------------------------------------------------------------------------------------

class ServerTest(ServerCase):
    def test_connections_beyond_the_cap_get_a_503_and_room_is_made_again(self):
        self.start(None, MAX_CONNECTIONS=2)
        (first, asked), (second, _) = [self.ask_stub() for _ in range(2)]
        answered = self.assert_last_answer(self.send(call()), 503)
        answered.tells("type", "server_error")
        self.assert_calls(2)
        self.complete(first, asked)
        first.close()
        self.stub.answer = says()
        wait_for(lambda: self.ask().status == 200, "room for another")
        second.reset()

    def test_where_no_connection_is_left_the_longest_idle_one_of_who_has_most_goes(self):
        self.start(MAX_CONNECTIONS=4)
        clients = []
        for source in ("127.0.0.2",) + 5 * ("127.0.0.1",):
            clients.append(self.connect(source=source))
            clients[-1].answers(200, call())
        few, first, second, *others = clients
        self.assertEqual([first.ending(), second.ending()], ["closed", "closed"])
        for client in (few, *others):
            client.answers(200, call())

    def test_a_head_that_is_not_whole_keeps_nobody_out(self):
        self.start(MAX_CONNECTIONS=2)
        first = self.connect()
        self.send_apart(first, b"GET /")
        self.send_apart(self.connect(), b"GET /")
        self.connect(source="127.0.0.2").answers(200, call())
        first.expect_close()

    def test_a_connection_whose_request_has_just_come_is_not_idle(self):
        client = self.connect()
        client.answers(200, call())
        connection, = self.server.open
        self.awaiting("a request")

        def make_room():
            client.send(call())
            connection.client.on_readable()
            self.assertFalse(self.server.end_an_idle_one())

        self.on_loop(make_room)
        client.answers(200)

    def test_one_address_has_a_cap_of_its_own_unless_it_speaks_for_others(self):
        two = {"MAX_CONNECTIONS_PER_ADDRESS": 2}
        self.patch_seconds(Server_MAX_PER_ADDRESS=2)  # which does not concern loopback
        for settings, taken in self.each((
                (two, 2), ({}, 4), ({**two, "TRUSTED_PROXIES": "127.0.0.0/8"}, 4))):
            self.start(**settings)
            clients = [self.send(call()) for _ in range(4)]
            statuses = [client.read().status for client in clients]
            self.assertEqual(statuses, [200] * taken + [503] * (4 - taken))
            clients[0].close()
            wait_for(lambda: self.ask().status == 200, "room for another")

    def test_other_addresses_than_loopback_have_a_cap_by_default(self):
        hosts = "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "192.0.2.1", "2001:db8::1"
        most = [self.server.most_of(host) for host in hosts]
        self.assertEqual(most, [inf] * 4 + [256] * 2)

    def test_a_burst_of_connections_is_taken(self):
        clients = [self.connect() for _ in range(100)]
        for client in clients:
            client.send(HEALTH)
        self.assertEqual({client.read().status for client in clients}, {200})

    def test_what_holds_the_loop_is_named_in_the_log(self):
        self.patch_seconds(LoopWatch_PERIOD=0.01, Log_QUIET_SECONDS=0)
        self.start()
        find = self.proxy.routes.find
        said = re.compile(r"the event loop was held for 0\.\d\d s by route, line \d+:"
                          r" the process had 0\.\d\d s of CPU")

        def find_slowly(*arguments):
            time.sleep(0.05)  # which nothing on the loop may do
            return find(*arguments)
        with patch.object(self.proxy.routes, "find", find_slowly):
            wait_for(lambda: self.ask() and said.search(self.lines.text()), "its line")

    def test_draining_closes_idle_connections_and_lets_a_running_stream_finish(self):
        self.start(None)
        idle, fresh = self.connect(), self.connect()
        idle.exchange(HEALTH)
        client, asked = self.begin(event(1))
        with self.draining() as cut:
            self.assertEqual((idle.ending(), fresh.ending()), ("closed", "closed"))
            asked.chunks(event(2), end=True)
            answered = client.rest()
            self.assertEqual((answered.whole, answered.body), (True, event(1) + event(2)))
            client.expect_close()
        self.assertEqual(cut, [0])

    def test_of_two_requests_that_came_before_a_drain_both_are_answered(self):
        client, asked = self.ask_stub(call() * 2)
        with self.draining() as cut:
            self.complete(client, asked)
            self.stub.next().answer()
            self.assert_last_answer(client, 200)
        self.assertEqual(cut, [0])

    def test_what_still_runs_when_the_time_is_up_is_cut(self):
        for seconds in self.each((0, 0.05)):
            self.start(None)
            self.connect()
            client, asked = self.begin(event(1))
            wait_for(lambda: len(self.server.open) == 2, "a connection without a call")
            self.assertEqual(self.drain(seconds), 1)
            client.expect_cut()
            asked.wait_for_hang_up()
            self.assertEqual(self.outcome(), "stopped")


class TlsTest(ServerCase):
    """Callers that come by TLS."""

    def connect_many(self, number):
        clients = [self.connect() for _ in range(number)]
        wait_for(lambda: len(self.server.open) == number, "the connections")
        return clients

    def test_an_address_has_20_handshakes_a_second_and_then_waits(self):
        clock = Clock()
        self.start_tls(clock=clock)
        clients = self.connect_many(22)
        waiting = partial(lambda: sorted(
            round(one.context.deadline - clock.now, 2) for one in self.server.open.copy()
            if one.context.what == "its turn for a TLS handshake"))
        wait_for(lambda: waiting() == [0.05, 0.1], "who waits")
        clock.now += 0.06
        self.assertEqual(wait_for(lambda: waiting()[1:] == [] and waiting(), "a turn"), [0.04])
        self.assertEqual(len(clients), 22)

    def test_who_leaves_while_it_waits_for_a_handshake_is_let_go(self):
        clock = Clock()
        self.start_tls(clock=clock)
        self.connect_many(40)[-1].close()
        clock.now += ClientConnection.HANG_UP_SECONDS  # a second before its turn
        wait_for(lambda: len(self.server.open) == 39, "one less")

    def test_where_all_connections_are_used_an_idle_one_makes_room(self):
        self.start_tls(MAX_CONNECTIONS=1)
        for _ in range(3):
            self.assertEqual(self.connect_tls().exchange(call()).status, 200)

    def test_a_client_that_does_not_trust_us_has_a_line(self):
        self.start_tls()
        with self.assertRaises(ssl.SSLError):
            self.connect_tls(ssl.create_default_context()).exchange(call())
        entry = self.entry()
        self.assertRegex(entry["cause"], "^TLS failed: .*unknown ca")

    def test_calls_streams_and_uploads_go_as_without_it(self):
        self.start_tls()
        client, body = self.connect_tls(), b"RIFF" + os.urandom(1 << 20)  # nothing like JSON
        self.assertEqual(client.exchange(call()).body, b'{"said": "hi"}')
        self.stub.answer = says(body)
        answered = client.exchange(request("POST", "/v1/audio", body))
        digest = hashlib.sha256(body).hexdigest()
        self.assertTrue(answered.body == body and self.stub.last.digest == digest)
        events = [event(number) for number in range(200)]
        self.stub.answer = lambda asked: asked.stream(*events, end=True)
        answered = client.exchange(call(stream=True))
        self.assertEqual((answered.whole, answered.body), (True, b"".join(events)))

    def test_who_leaves_closes_its_upstream(self):
        self.start_tls(None)
        for number, leave in enumerate(self.each(EndingsTest.HANG_UPS)):
            client, asked = self.begin(event(1), client=self.connect_tls())
            leave(client)
            asked.wait_for_hang_up()
            self.assert_entry("outcome", "caller_gone", number)

    def test_the_end_of_a_body_without_a_length_is_told(self):
        self.start_tls(lambda asked: asked.stream(event(1), end=True))
        client = self.connect_tls()
        client.sock.suppress_ragged_eofs = False
        data = request("POST", CHAT, chat(stream=True), version="1.0")
        self.assertEqual(client.exchange(data).body, event(1))

    def test_old_versions_are_refused(self):
        self.start_tls()
        old = ssl.create_default_context(cafile=self.file)
        with warnings.catch_warnings():  # Python advises against them, too
            warnings.simplefilter("ignore")
            with suppress(ValueError):
                old.minimum_version = ssl.TLSVersion.TLSv1
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with self.assertRaises(OSError):
            self.connect_tls(old)
        self.connect_tls().answers(200, call())

    def test_plain_http_is_told_what_is_wrong(self):
        self.start_tls()
        answered = self.assert_last_answer(self.send(call()), 400)
        answered.tells("message", "This port speaks https")

    def test_who_does_not_shake_hands_is_closed_in_time_and_holds_up_nobody(self):
        self.start_tls(clock=Clock())
        silent = self.connect()
        nonsense = self.send(b"\x16\x03\x01\x00\xff" + bytes(255))
        self.connect_tls().answers(200, call())
        self.assertEqual(self.expire("the TLS handshake"), ClientConnection.HEAD_SECONDS)
        silent.expect_close()
        read_to_the_end(nonsense)  # an alert may come first

    def test_a_head_in_a_record_that_is_never_whole_has_no_more_time_than_another(self):
        self.start_tls(clock=Clock())
        client = self.connect_tls()
        with socket.socket(fileno=client.sock.detach()) as client.sock:
            client.reader.sock = client.sock
            client.sock.settimeout(PATIENCE)
            self.awaiting("a request")
            self.send_apart(client, b"\x17\x03\x03\x10\x00")  # begins a record of 4 KiB
            for _ in range(2):
                self.pass_seconds(7)
                self.send_apart(client, b"x")
            self.assertEqual(self.expire("the request's head"), ClientConnection.HEAD_SECONDS - 14)
            read_to_the_end(client)
        self.assert_calls(0)

    def test_who_connects_too_often_waits_for_a_turn_but_never_long(self):
        clock, waits = Clock(), []
        turns = llm_proxy.Handshakes(clock)
        for _ in range(1000):
            with suppress(llm_proxy.QuietEnd):
                waits.append(turns.seconds_to_turn("a"))
        self.assertEqual([round(waits[number], 2) for number in (0, 19, 29, -1)], [0, 0, .5, 5])
        clock.now += 1
        for _ in range(20):
            turns.seconds_to_turn("a")
        self.assertRaises(llm_proxy.QuietEnd, turns.seconds_to_turn, "a")
        self.assertEqual(turns.seconds_to_turn("b"), 0)

    def test_certificates_are_read_again_and_bad_ones_are_not_taken(self):
        self.start_tls()
        client, before = self.connect_tls(), self.server.tls
        self.server.reload()
        now = self.server.tls
        self.assertIsNot(now, before)
        with open(self.file, "w", encoding="ascii") as file:
            file.write("nonsense")
        with patch.object(llm_proxy, "rebuild") as rebuild:
            self.proxy.config.reread = lambda: self.proxy.config
            self.on_loop(llm_proxy.reload, self.server)
        self.assertIs(self.server.tls, now)
        self.assertFalse(rebuild.called)
        for one in (client, self.connect_tls()):
            one.answers(200, call())

    def test_stopping_ends_an_idle_connection_as_tls_says_and_awaits_no_handshake(self):
        self.start_tls()
        silent, client = self.connect(), self.connect_tls()
        client.sock.suppress_ragged_eofs = False
        client.answers(200, call())
        self.assertEqual(self.drain(PATIENCE), 0)
        self.assertEqual((client.ending(), silent.ending()), ("closed", "closed"))


# --------------------------------------------------------------------------------------------------
# Commands, with the demo: the file as people start it
# --------------------------------------------------------------------------------------------------

def compiled():
    """Returns the path of the file as bytecode, which its import has left: to compile it takes most
    of a start. Where that could not be written, it is the file itself."""
    path = importlib.util.cache_from_source(FILE)
    is_new = os.path.exists(path) and os.path.getmtime(path) >= os.path.getmtime(FILE)
    return path if is_new else FILE


@lru_cache(None)
def template():
    """Returns the socket of a process that has read the file and forks one for each message."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", Forked.PROGRAM, str(theirs.fileno()), compiled()],
            env={}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()])

    def close():
        ours.close()
        process.wait(PATIENCE)
    atexit.register(close)
    return ours


class Forked:
    """Stands in for subprocess.Popen: Python's start and the imports take a tenth of a second, on
    PyPy half of one, and are done once."""
    PROGRAM = textwrap.dedent("""\
        import importlib.util, json, os, signal, socket, sys
        orders = socket.socket(fileno=int(sys.argv[1]))
        spec = importlib.util.spec_from_file_location("llm_proxy", sys.argv[2])
        llm_proxy = sys.modules["llm_proxy"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(llm_proxy)
        llm_proxy.Log.PAUSE = llm_proxy.Server.LOOK_SECONDS = 0.005
        llm_proxy.RedisBuckets.BEAT_SECONDS = 0.1
        llm_proxy.Redis.LONGEST_PAUSE = 0.05
        llm_proxy.LoopWatch.PERIOD = 60  # or a busy machine would be told of,
        for name in ("ANSWER_SECONDS", "LATE_SECONDS", "SILENT_SECONDS"):
            setattr(llm_proxy.Redis, name, 60)  # and its Redis left alone
        llm_proxy.parse_arguments([])  # for what is compiled and kept once
        llm_proxy.read_config({"BASE_API_URL": "http://127.0.0.1:1"})
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            message, files, *_ = socket.recv_fds(orders, 1 << 16, 4)
            if not message:
                sys.exit()
            if not os.fork():  # a parent that tells how its child ends
                break
            for file in files:
                os.close(file)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        arguments, folder, settings, pause = json.loads(message)
        llm_proxy.Writer.PAUSE = pause or llm_proxy.Writer.PAUSE
        child = os.fork()
        if child:
            for file in files[:3]:
                os.close(file)
            os.write(files[3], child.to_bytes(4, "big"))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os.write(files[3], code.to_bytes(4, "big", signed=True))
            os._exit(0)
        for number, file in enumerate(files[:3]):
            os.dup2(file, number)
        os.closerange(3, 64)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(settings)
        sys.stdout = open(1, "w", closefd=False)
        sys.exit(llm_proxy.main(arguments))
        """)
    returncode = None

    def __init__(self, arguments, folder, settings, stdin, pause):
        self.status, told = socket.socketpair()
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        with open(os.devnull) as nothing, told:
            files = nothing.fileno() if stdin is None else stdin, out_end, err_end, told.fileno()
            message = json.dumps([arguments, folder, settings, pause])
            socket.send_fds(template(), [message.encode()], files)
        os.close(out_end)
        os.close(err_end)
        self.stdout, self.stderr = open(out), open(err)
        self.pid = int.from_bytes(self.status.recv(4), "big")

    def wait(self, seconds):
        """Returns the exit code, None where it has not ended."""
        if self.returncode is None and select.select([self.status], [], [], seconds)[0]:
            self.returncode = int.from_bytes(self.status.recv(4), "big", signed=True)
            self.status.close()
        return self.returncode

    def poll(self):
        return self.wait(0)

    def send_signal(self, number):
        with suppress(ProcessLookupError):  # it has just ended
            if self.poll() is None:
                os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Process:
    """`llm_proxy.py` as a process of its own, with no environment but the settings."""

    def __init__(self, *arguments, cwd="/", before=(), program=None, stdin=None, pause=None,
                 **settings):
        """`before` are words of a command that starts this one, `program` is what runs instead of
        the file; `pause` is Writer.PAUSE of one without either."""
        settings = {"DATABASE": "off", **settings}
        settings = {name: str(value) for name, value in settings.items()}
        if before or program:
            file = ["-c", program] if program else [compiled()]
            self.process = subprocess.Popen(
                [*before, sys.executable, "-I", "-S", *file, *arguments], cwd=cwd, env=settings,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True)
        else:
            self.process = Forked(arguments, cwd, settings, stdin, pause)
        self.rows = []
        self.reader = Thread(
            target=lambda: self.rows.extend(self.process.stderr), daemon=True)
        self.reader.start()

    def said(self, text):
        return any(text in row for row in self.rows)

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self

    def wait(self):
        """Returns the exit code."""
        code = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return code

    def finish(self):
        """Returns (exit code, standard output, standard error) when it has ended by itself."""
        out = self.process.stdout.read()
        return self.wait(), out, "".join(self.rows)

    def close(self):
        self.process.kill()
        self.wait()
        self.process.stdout.close()
        self.process.stderr.close()


class ProcessCase(ServerCase):
    """A proxy in a process of its own, in front of `self.stub`."""
    PAUSE = None  # of its writers, where a test waits for them

    def command(self, *arguments, **settings):
        settings = {"PORT": free_port(self.addCleanup), **settings}
        process = Process(*arguments, pause=self.PAUSE, **settings)
        self.addCleanup(process.close)
        return process

    def finish(self, *arguments, cwd="/", **settings):
        """Returns (exit code, standard output, standard error). A command needs no process."""
        if not arguments:
            return self.command(cwd=cwd, **settings).finish()
        out, err = [io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2)]
        here, port = os.getcwd(), free_port(self.addCleanup)
        settings = {"DATABASE": "off", "PORT": port, **settings}
        with patch.dict(os.environ, {name: str(one) for name, one in settings.items()},
                             clear=True):
            os.chdir(cwd)
            try:
                with redirect_stdout(out), redirect_stderr(err):
                    code = llm_proxy.main(arguments)
            except SystemExit as end:
                code = end.code
            finally:
                os.chdir(here)
        for stream in (out, err):
            stream.flush()
        return code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()

    def new_stub(self, answer=says()):
        self.stub = Stub(answer)
        self.addCleanup(self.stub.close)
        return self.stub.url

    def serve(self, *arguments, answer=says(), **settings):
        """Starts one that answers at `self.address`."""
        self.address = "127.0.0.1", free_port(self.addCleanup)
        process = self.command(*arguments, **{
            "HOST": "127.0.0.1", "PORT": self.address[1], "BASE_API_URL": self.new_stub(answer),
            **settings})
        wait_for(lambda: process.said("listens on") or process.process.poll() is not None)
        self.assertIsNone(process.process.poll(), process.rows)
        return process


class KeysCommandTest(ProcessCase):
    PAUSE = 0.01

    def setUp(self):
        self.folder = new_path(self)
        self.settings = {"DATABASE": os.path.join(self.folder, "keys.db")}
        Database(self.settings["DATABASE"]).close()

    def keys(self, *arguments, **settings):
        """Returns (exit code, standard output, standard error) of `keys` with these arguments."""
        return self.finish("keys", *arguments, **{**self.settings, **settings})

    def status(self, key):
        return self.ask(key).status

    def test_a_command_beside_the_running_service_holds_soon(self):
        self.serve(**self.settings)
        self.assertEqual(self.status("x"), 200)
        code, out, err = self.keys("add", "ann", "--models", "m,n")
        self.assertEqual((code, err), (
            0, llm_proxy.CLOSED + "\ndone: add name=ann models=m,n\n"))
        ann = out.strip()
        for act, key, status in self.each((
                ((), "x", 401), (("set", "ann", "--models", "n"), ann, 403),
                (("revoke", "ann"), ann, 401), (("restore", "ann"), ann, 403))):
            if act:
                self.assertEqual(self.keys(*act)[:2], (0, ""))
            # Ten wrong keys were counted, maybe, while this waited.
            wait_for(lambda: self.status(key) in (status, 429 if status == 401 else status))

    def test_a_look_at_keys_by_the_api_does_not_part_the_service_from_its_file(self):
        """Whoever closes a file drops all locks that its process has on it: a command would take
        itself for the last one there, and clear away what the service writes."""
        process = self.serve(**self.settings, ADMIN_KEY=ADMIN)
        _, out, _ = self.keys("add", "ann")
        wait_for(lambda: self.status(out.strip()) == 200)
        for method, path, body in (("GET", "", b""), ("PATCH", "/ann", b'{"note": "x"}')):
            data = request(method, "/admin/api/keys" + path, body, key=ADMIN)
            self.assert_status(200, data)
        for act in (("list",), ("revoke", "ann")):
            self.assertEqual(self.command("keys", *act, **self.settings).finish()[0], 0)
        wait_for(lambda: self.status(out.strip()) == 401)
        held = os.listdir("/proc/%d/fd" % process.process.pid) if os.path.isdir("/proc") else []
        links = ["/proc/%d/fd/%s" % (process.process.pid, one) for one in held]
        self.assertEqual([os.readlink(one) for one in links
                          if os.path.islink(one) and "(deleted)" in os.readlink(one)], [])

    def test_check_knows_that_keys_are_stored(self):
        settings = {"UPSTREAM_OPENAI_URL": "https://api.openai.invalid/v1",
                    "UPSTREAM_OPENAI_KEY": "sk", "OPEN_TIMEOUT": "0.1", **self.settings}
        for host, stored in self.each("""[["127.0.0.1", "pass"], ["0.0.0.0", "own"]]"""):
            _, out, _ = self.finish("--check", **settings)
            self.assertRegex(out, r"(?m)^HOST +%s$" % host)
            self.assertRegex(out, r"(?m)^STORED +%s$" % stored)
            self.assertEqual("on this machine alone" in out, stored == "pass")
            self.keys("add", "ann")

    def test_keys_can_be_listed_and_shown(self):
        self.assertEqual(self.keys("list"), (0, "no keys yet\n", ""))
        self.keys("add", "ann", "--note", "\x1b[2J" "x")
        self.keys("add", "ann", "--note", "her laptop", "--expires", "30d")
        _, out, _ = self.keys("list")
        self.assertRegex(out, r"\Aname +role .*\nann +caller +- +20\d\d-.* her laptop +-\n\Z")
        self.assertRegex(self.keys("show", "ann")[1], r"(?m)^note +her laptop$")
        self.keys("revoke", "ann")
        self.assertRegex(self.keys("show", "ann")[1], r"(?m)^disabled +yes$")
        self.keys("restore", "ann")
        found, = json.loads(self.keys("list", "--json")[1])
        self.assertEqual((found["name"], found["disabled"]), ("ann", False))
        self.assertEqual(found["expires"] - found["created"], 30 * 86400)

    def test_a_database_that_no_proxy_has_is_said(self):
        code, out, err = self.keys("list", DATABASE=os.path.join(self.folder, "other.db"))
        self.assertEqual((code, out), (0, "no keys yet\n"))
        self.assertRegex(err, r"\ADATABASE \S+other.db is made now: no proxy that runs has it\n\Z")

    def test_only_a_new_secret_is_on_standard_output(self):
        for arguments in self.each("""[["add", "ann"], ["rotate", "ann", "--grace", "1h"]]"""):
            code, out, err = self.keys(*arguments, PROXY_API_KEYS="old=sk-old")
            self.assertRegex(out, r"\Ask-\S{43}\n\Z")
            self.assertRegex(err, r"\Adone: %s name=ann.*\n\Z" % arguments[0])
            self.assertEqual(code, 0)

    def test_what_is_wrong_is_said(self):
        self.keys("add", "ann")
        for code, said, *arguments in self.each(r"""[
                [1, "stored already", "add", "ann"],
                [1, "expires must be", "add", "b", "--expires", "x"],
                [1, "no key is stored by the name b", "give", "b", "2", "usd"],
                [0, "done: set name=ann note=x\n", "set", "ann", "--note", "x"],
                [0, "done: give name=old amount=2 unit=usd", "give", "old", "2", "usd"],
                [0, "done: reset name=192.0.2.1", "reset", "192.0.2.1"],
                [1, "amount must be", "give", "ann", "x", "usd"],
                [2, "invalid choice", "give", "ann", "2", "running"]]"""):
            found = self.keys(*arguments, PROXY_API_KEYS="old=sk-old")
            self.assertEqual(found[:2], (code, ""))
            self.assertIn(said, found[2])

    def test_what_does_not_go_with_the_settings_that_are_here_is_said(self):
        """Without any, those of the proxy are elsewhere."""
        here = {"LIMITS": "each 1 usd per day", "UPSTREAM_BOX_URL": "http://127.0.0.1:1",
                "PROXY_API_KEYS": "old=a-key-of-16-chars-or-more"}
        self.keys("add", "ann", "--limits", "9 tokens per day")
        for are_here, code, said, arguments in self.each("""[
                [true, 1, "no rule counts requests", "give ann 2 requests"],
                [true, 0, "done", "give ann 2 usd"],
                [true, 0, "done", "give ann 2 tokens"],
                [true, 1, "no rule counts tokens", "give old 2 tokens"],
                [true, 0, "done", "give 192.0.2.1 2 usd"],
                [false, 0, "done", "give ann 2 requests"],
                [true, 0, "there is no upstream 'nope'", "add b --upstream nope"],
                [true, 0, "done", "add c --upstream box"],
                [false, 0, "done", "add d --upstream nope"]]"""):
            found = self.keys(*arguments.split(), **here if are_here else {})
            self.assertEqual((found[0], found[2].startswith(said)), (code, True), found)

    def test_the_audit_has_who_gave_the_command_though_the_environment_has_no_name(self):
        nobody = patch("pwd.getpwuid", side_effect=KeyError)
        for settings, found, who in self.each((
                ({"USER": "ida"}, nullcontext(), "ida"),
                ({}, nullcontext(), pwd.getpwuid(os.getuid()).pw_name),
                ({}, nobody, "uid %d" % os.getuid()))):
            with found:
                self.keys("add", "ann", **settings)
                self.keys("remove", "ann", **settings)
            with closing(sqlite3.connect(self.settings["DATABASE"])) as connection:
                rows = connection.execute("SELECT who FROM audit ORDER BY id DESC LIMIT 2")
                self.assertEqual(rows.fetchall(), [(who,)] * 2)

    def test_an_admins_key_is_made_at_each_start_and_ends_with_it(self):
        file, keys = self.settings["DATABASE"] + ".admin-key", set()
        for _ in range(2):
            process = self.serve(**self.settings)
            wait_for(lambda: process.said(
                "dashboard: http://127.0.0.1:%d/dashboard with the key in %s" % (
                    self.address[1], file)))
            self.assertEqual(os.stat(file).st_mode & 0o777, 0o600)
            with open(file, encoding="ascii") as stream:
                key = stream.read().strip()
            keys.add(key)
            error = self.ask(key).error()
            self.assertEqual(error["code"], "key_not_for_calls")
            self.assertFalse(process.said(key))
            process.stop().wait()
            self.assertFalse(os.path.exists(file))
        self.assertEqual(len(keys), 2)

    def test_no_admins_key_is_made_where_there_is_one_or_no_place_for_it(self):
        for settings, said in self.each(r"""[
                [{"DATABASE": "off"}, "needs ADMIN_KEY to be set"],
                [{"ADMIN_KEY": "sk-0123456789abcdef"}, "/dashboard\n"],
                [{"PUBLIC_URL": "https://llm.example.org"},
                 "dashboard: https://llm.example.org/dashboard with the key in /"]]"""):
            process = self.serve(**{**self.settings, **settings})
            wait_for(lambda: process.said(said))
            file = self.settings["DATABASE"] + ".admin-key"
            self.assertEqual(os.path.exists(file), "PUBLIC_URL" in settings)
            process.stop().wait()
        self.keys("add", "boss", "--role", "admin")
        process = self.serve(**self.settings)
        wait_for(lambda: process.said("/dashboard\n"))

    def test_the_file_of_an_admins_key_is_no_other_file(self):
        file, other = self.settings["DATABASE"] + ".admin-key", os.path.join(self.folder, "other")
        with open(other, "w", encoding="ascii") as stream:
            stream.write("mine")
        os.symlink(other, file)
        process = self.serve(**self.settings)
        wait_for(lambda: process.said("with the key in /"))
        self.assertFalse(os.path.islink(file))
        with open(other, encoding="ascii") as stream:
            self.assertEqual(stream.read(), "mine")

    def test_an_admins_key_is_told_on_a_terminal(self):
        config = read_config({**HERE, "DATABASE": "off", "HOST": "::", "PORT": "81"})
        told = llm_proxy.offer_dashboard(read_config({**HERE, "HOST": "fd00::1"}), True, None)
        self.assertEqual(told, "dashboard: http://[fd00::1]:8899/dashboard")
        with patch.object(os, "isatty", lambda descriptor: True):
            words = llm_proxy.offer_dashboard(config, False, None)
        page = re.escape("dashboard: http://[::1]:81/dashboard with the key ")
        self.assertRegex(words, "^%s%s$" % (page, r"sk-\S{43}"))
        callers = llm_proxy.Callers(config, b"", llm_proxy.StoredKeys(b""))
        found = callers.known_by(llm_proxy.digest(words.split()[-1]))
        self.assertEqual((found.role, found.label), ("admin", "ADMIN_KEY"))


class BenchTest(ProcessCase):
    """`bench` and `selftest`."""

    def setUp(self):
        super().setUp()
        patch_until(self.addCleanup, patch.object(llm_proxy, "raise_descriptor_limit"),
                    patch.object(llm_proxy, "tune_interpreter"))

    def bench(self, *arguments, url=None, code=0, **settings):
        """Returns what `bench` reports, as JSON."""
        url = url or "http://%s:%d" % self.address
        found, out, err = self.finish("bench", url, "--output", "json", *arguments, **settings)
        self.assertEqual((found, err), (code, ""))
        return json.loads(out)

    def test_calls_are_timed_as_a_whole_and_in_their_parts(self):
        self.start(says(completion(1, 1)))
        report = self.bench("--model", "m", "--requests", "40", "--concurrency", "4")
        self.assertEqual((report["requests"], report["failures"]), (40, 0))
        self.assertEqual((report["statuses"], self.stub.calls), ({"200": 40}, 40))
        self.assertLessEqual(self.stub.connections, 4)
        self.assertAlmostEqual(report["per_second"] * report["seconds"], 40, delta=4)
        times = report["milliseconds"]
        self.assertEqual([*times], ["whole", "upstream", "proxy"])
        self.assertGreaterEqual(times["whole"]["mean"] + 0.01,
                                times["upstream"]["mean"] + times["proxy"]["mean"])
        for row in times.values():
            self.assertEqual([*row][1:], ["min", "p50", "p90", "p99", "max"])
            self.assertEqual(sorted([*row.values()][1:]), [*row.values()][1:])

    def test_what_goes_wrong_is_counted_by_what_it_was(self):
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"
        for act, status in self.each((
                (says(b"{}", "429 Busy"), "429"), (sends(b""), "closed without an answer"),
                (sends(head + b"half"), "answer was cut"), (sends(b"SSH-2.0\r\n\r\n"), None))):
            report = self.bench("--model", "m", "--requests", "3", url=self.new_stub(act), code=1)
            self.assertEqual(report["failures"], 3)
            self.assertEqual([*report["statuses"].values()], [3])
            self.assertIn(status or [*report["statuses"]][0], report["statuses"])

    def test_a_stream_has_a_first_byte_and_jitter_between_its_events(self):
        def answer(asked):
            for number in range(3):
                asked.chunks(event(number), head=b"" if number else STREAM, end=number == 2)
                time.sleep(0.05)
        self.start(answer)
        times = self.bench("--stream", "--model", "m", "--requests", "4")["milliseconds"]
        self.assertEqual([*times], ["whole", "upstream", "proxy", "first byte", "jitter"])
        self.assertLess(times["first byte"]["min"], times["whole"]["min"])
        self.assertLess(times["jitter"]["min"], 500)
        self.assertTrue(self.stub.last.json()["stream"])

    def test_an_endpoint_that_closes_after_a_stream_fails_no_call(self):
        """llama.cpp does, a moment later and without a word."""
        def answer(asked):
            asked.chunks(event(1), head=STREAM, end=True)
            time.sleep(0.005)
            asked.sock.shutdown(socket.SHUT_RDWR)
        url = self.new_stub(answer)
        report = self.bench("--stream", "--model", "m", "--requests", "20", "--concurrency", "1",
                            url=url)
        self.assertEqual(report["statuses"], {"200": 20})

    def test_what_is_asked_is_as_the_options_say(self):
        url, listed = self.new_stub(), b'{"data": [{"id": "first"}, {"id": "second"}]}'
        self.stub.answer = says(listed)
        for options, model, target in self.each("""
                --model m -> m -> /v1/chat/completions
                --output json -> first -> /v1/chat/completions
                --payload {"model":"own","input":"x"} --endpoint /v1/embeddings -> """
                """own -> /v1/embeddings
                --payload {"model":"own"} --model m -> m -> /v1/chat/completions"""):
            self.bench("--key", "sk-1", "--requests", "1", *options.split(), url=url)
            asked = self.stub.last
            self.assertEqual((asked.json()["model"], asked.target), (model, target))
            self.assertEqual(asked.get("authorization"), "Bearer sk-1")

    def test_the_key_of_the_settings_is_sent_nowhere_else(self):
        url = self.new_stub()
        self.bench("--model", "m", "--requests", "1", url=url, BASE_API_KEY="sk-vendor",
                   BASE_API_URL="https://api.openai.com/v1")
        self.assertNotIn(b"sk-vendor", self.stub.last.head)

    def test_https_is_checked_as_the_settings_say(self):
        file = pem_file(self)
        stub = Stub(says(), tls=server_context(file, None))
        self.addCleanup(stub.close)
        for settings, code, status in self.each((
                ({"UPSTREAM_CA_FILE": file}, 0, "200"), ({}, 1, "certificate not trusted"))):
            options = "--model", "m", "--requests", "2", "--concurrency", "1"
            report = self.bench(*options, url=stub.url, code=code, **settings)
            self.assertEqual([*report["statuses"]], [status])
            _, out, _ = self.finish("bench", stub.url, *options, **settings)
            self.assertEqual("milliseconds" in out, status == "200")

    def test_what_is_wrong_with_the_options_is_told(self):
        url = self.new_stub()
        for arguments, said in self.each("""
                ftp://x -> URL must be http
                http://user:secret@x -> (got a value not shown here)
                URL --requests 0 -> between 1 and
                URL --concurrency many -> between 1 and
                URL --payload [] -> a JSON object
                URL --payload { -> line 1
                URL -> no list of models
                http://127.0.0.1:1 -> could not be reached"""):
            code, out, err = self.finish("bench", *[
                url if one == "URL" else one for one in arguments.split()])
            self.assertEqual((code, out), (2, ""))
            self.assertIn(said, err)

    def test_people_get_tables_and_at_a_terminal_a_line_while_it_runs(self):
        url = self.new_stub()
        screen, out = io.StringIO(), io.TextIOWrapper(io.BytesIO(), "utf-8")
        screen.isatty = lambda: True
        with redirect_stderr(screen), redirect_stdout(out):
            llm_proxy.main(["bench", url, "--model", "m", "--requests", "5"])
        self.assertIn("0 of 5 calls, 0 failed", screen.getvalue())
        out = out.buffer.getvalue().decode()
        for row in (r"requests +failures +seconds", r" +5 +0 +", r"answered +calls", r"200 +5",
                    r"milliseconds +mean +min +p50 +p90 +p99 +max", r"whole +[0-9.]+ "):
            self.assertRegex(out, "(?m)^" + row)

    def test_a_bench_that_is_interrupted_tells_what_it_saw(self):
        def answer(asked):
            asked.answer()
            if self.stub.calls > 20:
                asked.wait_for_hang_up()
        url = self.new_stub(answer)
        process = self.command("bench", url, "--model", "m", "--concurrency", "2")
        wait_for(lambda: self.stub.calls > 20)
        code, out, err = process.stop().finish()
        self.assertEqual((code, err), (0, ""))
        self.assertRegex(out, r"(?m)^200 +2[0-9]$")

    def test_a_signal_amid_a_call_ends_all_of_them_without_a_word(self):
        async def work(number):
            if number == 1:
                os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(PATIENCE)

        async def work_all():
            await asyncio.gather(*map(work, range(3)))
        with redirect_stderr(io.StringIO()) as said:
            self.assertIsNone(llm_proxy.run_unless_stopped(work_all()))
            gc.collect()
        self.assertEqual(said.getvalue(), "")

    def selftest(self, **patches):
        """Returns (exit code, standard output, standard error) of a short one; nothing of it is
        left."""
        folder = new_path(self)
        self.patch_seconds(
            SelfTest_STREAMS={10: 5}, SelfTest_IDLE=10, SelfTest_CALL_SECONDS=0.05,
            SelfTest_HANG_UPS=5, SelfTest_PAUSE=0.1, Demo_WORD_SECONDS=0.004, **patches)
        started = []

        def start(test, *arguments):
            started.append(begin(test, *arguments))
            return started[0]
        begin = SelfTest.start
        with patch.object(tempfile, "tempdir", folder), \
                patch.object(llm_proxy, "__file__", compiled()), \
                patch.object(SelfTest, "start", start):
            found = self.finish("selftest")
        self.assertIsNotNone(started[0].returncode)
        self.assertEqual(os.listdir(folder), [])
        return found

    def test_a_selftest_says_a_verdict_a_line_and_leaves_nothing(self):
        code, out, err = self.selftest()
        self.assertEqual(err, "", err)
        found = re.findall(r"(?m)^(.+?)  +-?[0-9.]+ (ms|KiB|a second|%) +(good|POOR)$", out)
        self.assertEqual([what for what, _, _ in found], [
            "memory of an idle connection", "added to the first byte", "calls",
            "added to an event, 10 streams", "memory of a running stream",
            "delivered of what is billed after 50 hang-ups"])
        self.assertEqual(code, int("POOR" in out))
        if not is_busy():
            self.assertEqual(found[-1][2], "good")

    @unittest.skipUnless(sys.platform == "linux", "nothing else keeps a port for others")
    def test_the_port_of_a_selftest_is_kept_for_its_proxy(self):
        test = SelfTest()
        with test.kept, test.demo.listening, socket.socket() as other:
            self.assertRaises(OSError, other.bind, test.place)
            llm_proxy.listen(*test.place).close()

    def test_a_selftest_whose_proxy_does_not_start_says_so(self):
        settings = {**SelfTest.SETTINGS, "LIMITS": "none"}
        code, out, err = self.selftest(SelfTest_SETTINGS=settings, SelfTest_START_TRIES=2)
        self.assertEqual((code, out), (1, ""))
        self.assertIn("connection refused", err)

    def test_a_selftest_that_is_stopped_leaves_nothing(self):
        folder = new_path(self)
        process = self.command("selftest", TMPDIR=folder)
        wait_for(lambda: list(pathlib.Path(folder).glob("*/*.db")), "the proxy's files")
        code, _, err = process.stop().finish()
        self.assertEqual((code, err, os.listdir(folder)), (1, "", []))

    def test_a_selftest_that_is_killed_leaves_no_proxy(self):
        folder = pathlib.Path(new_path(self))
        process = self.command("selftest", TMPDIR=folder)
        database, = wait_for(lambda: list(folder.glob("*/*.db")), "the proxy's files")

        def is_used():
            try:
                llm_proxy.lock_for_service(database).close()
            except llm_proxy.InUse:
                return True
        self.assertTrue(is_used())
        process.process.kill()
        wait_for(lambda: not is_used(), "the end of the proxy")


class CommandsTest(ProcessCase):
    NOWHERE = "http://127.0.0.1:1"

    def assert_fails(self, code, number, text, *arguments, **settings):
        """Fails unless it ends with this code and so many lines of errors, `text` among them."""
        found, out, err = self.finish(*arguments, **settings)
        self.assertEqual((found, out, len(err.splitlines())), (code, "", number), err)
        self.assertIn(text, err)

    def test_help_names_every_setting_with_its_default_in_brackets(self):
        code, out, err = self.finish("--help")
        self.assertEqual((code, err), (0, ""))
        for setting in self.each(SETTINGS_BY_NAME.values()):
            row, = re.findall(r"^ +%s +(\S.*)$" % setting.name, out, re.MULTILINE)
            if setting.default is not None:
                self.assertTrue(row.endswith(" [%s]" % setting.default), row)
        for group in SETTINGS:
            self.assertIn("\n%s:\n" % group, out)
        for option in ("--version", "--check", "--demo"):
            self.assertIn(option, out)
        self.assertIn("how many calls [1000]\n", self.finish("bench", "--help")[1])

    def test_run_local_serves_this_machine_alone_and_gives_way_to_the_environment(self):
        settings = {"PYTHON": sys.executable, "DATABASE": "off", "BASE_API_URL": self.NOWHERE,
                    "MAX_TOKENS": ""}
        found = subprocess.run(
            ["sh", os.path.join(FOLDER, "run_local.sh"), "--check"], cwd="/",
            env={"PATH": os.environ["PATH"], **settings}, stdout=subprocess.PIPE, text=True)
        rows = [row.split() for row in found.stdout.splitlines()]
        for row in self.each(("HOST 127.0.0.1", "BASE_API_URL " + self.NOWHERE, "MAX_TOKENS 10",
                              "REFILL_TOKENS 1", "BASE_API_KEY not set")):
            self.assertIn(row.split(), rows)

    def test_grafana_prints_a_dashboard_of_metrics_that_there_are(self):
        code, out, err = self.command("grafana").finish()
        self.assertEqual((code, err), (0, ""))
        board = json.loads(out)
        self.start(METRICS="open", DATABASE="off")
        there = {name for name in re.findall(
            r"^# TYPE (\w+)", self.get("/metrics").body.decode(), re.MULTILINE)}
        places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
        self.assertEqual(len(set(places)), len(places))
        for panel in self.each(board["panels"]):
            self.assertEqual(panel["datasource"]["uid"], "${source}")
            for target in panel["targets"]:
                names = re.findall(r"\b(?:llm_proxy|process)_\w+", target["expr"])
                self.assertTrue(names, target)
                self.assertLessEqual({name.replace("_bucket", "") if name.endswith(
                    "seconds_bucket") else name for name in names}, there)

    def test_version_is_told(self):
        digest = hashlib.sha256(source().encode()).hexdigest()
        said = "llm_proxy %s, sha256 %s, %s %s\n" % (
            VERSION, digest, sys.implementation.name, sys.version.split(" ")[0])
        self.assertEqual(self.finish("--version"), (0, said, ""))

    CALLS = (
        {"caller": "alice", "served": "m1", "picodollars": 5 * 10 ** 11},
        {"caller": "alice", "served": "m2", "estimated": 1},
        {"caller": "bob", "served": "m1", "upstream": "base", "unpriced": 1},
        {"caller": "bob", "outcome": "refused", "time": -3 * 86400})
    USAGE = r"""[
        ["", "caller,%s\nalice,2,20,2,4,0,1,0,0.5\nbob,2,20,2,4,0,0,1,0\n"],
        ["--by model --since 2d", "model,%s\nm1,2,20,2,4,0,0,1,0.5\nm2,1,10,1,2,0,1,0,0\n"],
        ["--by outcome", "outcome,%s\nok,3,30,3,6,0,1,1,0.5\nrefused,1,10,1,2,0,0,0,0\n"],
        ["--by team --by tag", "team,tag,%s\n-,-,4,40,4,8,0,1,1,0.5\n"],
        ["--by team,tag --by caller --caller bob",
         "team,tag,caller,%s\n-,-,bob,2,20,2,4,0,0,1,0\n"],
        ["--by upstream", "upstream,%s\n-,3,30,3,6,0,1,0,0.5\nbase,1,10,1,2,0,0,1,0\n"],
        ["--by model --caller alice", "model,%s\nm1,1,10,1,2,0,0,0,0.5\nm2,1,10,1,2,0,1,0,0\n"],
        ["--by caller --by outcome --since 2d",
         "caller,outcome,%s\nalice,ok,2,20,2,4,0,1,0,0.5\nbob,ok,1,10,1,2,0,0,1,0\n"],
        ["--caller nobody", "caller,%s\n"]]"""
    SUMS = "calls,input,cached,output,reasoning,estimated,unpriced,usd"

    def ledger(self, *more):
        """Returns the path of a ledger with CALLS and more."""
        path = new_path(self, "books.db")
        database = Database(path)
        usual = {"input": 10, "cached": 1, "output": 2, "reasoning": 0, "estimated": 0,
                 "unpriced": 0, "picodollars": 0, "outcome": "ok"}
        for row in self.CALLS + more:
            values = {**usual, **row, "time": time.time() + row.get("time", 0)}
            database.add([tuple(values.get(name) for name, _ in llm_proxy.COLUMNS)])
        database.connection.close()
        return path

    def test_prices_prints_the_operators_prices_and_then_the_others(self):
        own = """{"gpt-5.5": {"input": 0.1}, "m": {"input": 1, "output": 2,
            "above": {"tokens": 9, "input": 3}, "tiers": {"fast": {"input": 5}, "us": 1.5}}}"""
        path = pem_file(self, own)
        code, out, err = self.finish("prices", PRICES=path)
        self.assertEqual((code, err), (0, ""))
        rows = [row.split() for row in out.splitlines()]
        self.assertEqual(rows[0][:4] + rows[0][-2:], "model from input output above tiers".split())
        self.assertEqual(rows[1][:4], "gpt-5.5 PRICES 0.1 0".split())
        self.assertEqual(rows[2], "m PRICES 1 2 1 1 2 9: 3 0 fast 5 us 1.5".split())
        self.assertNotIn(["gpt-5.5", "built"], [row[:2] for row in rows])
        self.assertIn(["gpt-4o", "built", "in", "2.5", "10"], [row[:5] for row in rows])
        self.assert_fails(2, 1, "PRICES must be", "prices", PRICES=path + "x")

    def test_prices_are_fetched_into_a_file_when_asked_and_what_fails_leaves_it(self):
        good = b'{"openai": {"models": {"a": {"cost": {"input": 1, "output": 2}}}}}'
        path = new_path(self, "prices.json")
        for body, status, said in self.each((
                (good, "200 OK", "1 prices"), (b"{}", "200 OK", "no price"),
                (b"<html>", "200 OK", "must be a JSON file"), (b"", "503 Busy", "503"))):
            url = self.new_stub(says(body, status)) + "/api.json"
            code, out, err = self.finish("prices", "--update", path, url)
            self.assertEqual(code, 0 if said == "1 prices" else 2)
            self.assertIn(said, out + err)
            self.assertEqual(list(llm_proxy.price_file(path)), ["a"])
            self.assertEqual(os.listdir(os.path.dirname(path)), ["prices.json"])
        for url, said in self.each((("file:///etc/passwd", "URL must be"),
                                    (self.NOWHERE, "not updated"))):
            self.assert_fails(2, 1, said, "prices", "--update", path, url)
        self.assert_fails(2, 1, "at most", "prices", "--update", path, "a", "b")

    def test_usage_prints_who_used_what_as_csv(self):
        path = self.ledger()
        for arguments, text in self.each(self.USAGE):
            found = self.finish("usage", "--csv", *arguments.split(), DATABASE=path)
            self.assertEqual(found, (0, text % self.SUMS, ""))

    def test_usage_prints_who_used_what_as_json_and_for_people(self):
        path = self.ledger()
        _, out, _ = self.finish("usage", "--json", DATABASE=path)
        row = json.loads(out)[0]
        self.assertEqual(",".join(row), "caller," + self.SUMS)
        self.assertEqual(list(row.values()), ["alice", 2, 20, 2, 4, 0, 1, 0, "0.5"])
        _, out, _ = self.finish("usage", "--by", "day", DATABASE=path)
        day = r"20\d\d-\d\d-\d\d"
        lines = r"\Aday +calls +input .*\n%s +3 +30 .*\n%s +1 +10 .*\n\Z"
        self.assertRegex(out, lines % (day, day))
        _, out, _ = self.finish("usage", "--caller", "nobody", DATABASE=path)
        self.assertEqual(out, "no calls yet\n")

    def test_usage_tells_all_of_one_call(self):
        path = self.ledger({"id": "one", "caller": "=cmd()", "model": "a\x1b[2Jb"})
        usage = partial(self.finish, "usage", DATABASE=path)
        _, out, _ = usage("--id", "one")
        for line in self.each((r"caller  +=cmd\(\)", r"model  +a\\x1b\[2Jb", "output  +2")):
            self.assertRegex(out, "(?m)^%s$" % line)
        _, out, _ = usage("--id", "one", "--json")
        self.assertEqual(json.loads(out)[0]["model"], "a\x1b[2Jb")
        _, out, _ = usage("--id", "one", "--csv")
        self.assertIn(",'=cmd(),", out)
        self.assertIn("a\\x1b[2Jb", out)
        self.assertEqual(usage("--id", "two"), (0, "no such call\n", ""))

    def test_what_is_wrong_with_settings_or_a_database_ends_with_few_lines(self):
        folder = new_path(self)
        none, text = os.path.join(folder, "none"), os.path.join(folder, "text")
        with open(text, "w", encoding="utf-8") as file:
            file.write("hello")
        for code, number, said, arguments, settings in self.each(r"""[
                [2, 3, "BASE_API_URL=http://", "", {"PORT": "99999", "MAX_TOKENS": "x"}],
                [2, 1, "TEXT is not a database of llm_proxy; it was left as it is\n", "",
                 {A_URL, "DATABASE": "TEXT"}],
                [2, 1, "must be a file that can be read and written, or off (got '/nonexistent/x'",
                 "", {A_URL, "DATABASE": "/nonexistent/x"}],
                [2, 1, "the word '\\x1b[2J'", "", {A_URL, "LIMITS": "\u001b[2J 1"}],
                [2, 1, "USAGE_LOG must be", "", {A_URL, "USAGE_LOG": "/nonexistent/x"}],
                [2, 1, "--requests must be", "bench NOWHERE --requests 0", {}],
                [2, 1, "calls and keys are kept in DATABASE, and that is off\n", "usage", {}],
                [2, 1, "calls and keys are kept in DATABASE, and that is off\n", "keys list", {}],
                [1, 1, "no calls are recorded in NONE (DATABASE)\n", "usage", {"DATABASE": "NONE"}],
                [2, 1, "TEXT is not a database of llm_proxy; it was left as it is\n", "usage",
                 {"DATABASE": "TEXT"}],
                [2, 1, "--by must be caller, team, ", "usage --by day,x", {"DATABASE": "NONE"}],
                [2, 1, "--since", "usage --since soon", {"DATABASE": "NONE"}]]""".replace(
                    "A_URL", '"BASE_API_URL": "NOWHERE"').replace("NOWHERE", self.NOWHERE).replace(
                        "TEXT", text).replace("NONE", none)):
            self.assert_fails(code, number, said, *arguments.split(), **settings)

    def test_arguments_are_utf_8(self):
        for arguments in self.each((("usage", "--caller"), ("keys", "show"), ("bench",))):
            code, _, err = self.finish(*arguments, "\udcff")
            self.assertEqual((code, err.splitlines()[-1]), (
                2, "llm_proxy.py: error: arguments must be UTF-8"))

    def test_dotenv_is_read_from_the_working_directory(self):
        folder = new_path(self)
        with open(os.path.join(folder, ".env"), "w", encoding="utf-8") as file:
            file.write("PORT=0\nBASE_API_URL=http://127.0.0.1:1\nnonsense\n")
        for said in ("PORT must be between 1 and 65535 (got '99999')\n", ".env line 3"):
            self.assert_fails(2, 2, said, "--check", cwd=folder, PORT="99999")

    def test_check_prints_what_would_be_used_without_secrets_and_asks_for_the_models(self):
        there = self.new_stub(says(b'{"object": "list", "data": [{"id": "one"}, {"id": "two"}]}'))
        code, out, err = self.finish(
            "--check", BASE_API_URL=there + "/v1", BASE_API_KEY="sk-hush",
            PROXY_API_KEYS="alice=sk-hush-2",
            LIMITS="each 9 requests per day;\n  all 5 usd per day")
        self.assertEqual((code, err), (0, ""))
        for row in self.each(("LIMITS each 9 requests per day; all 5 usd per day",
                              "CORS_ORIGINS *", "STORED own", "HOST 0.0.0.0")):
            self.assertIn(row.split(), [line.split() for line in out.splitlines()])
        self.assertIn("models of base at %s: one, two\n" % there, out)
        self.assertNotIn("hush", out)
        for name in SETTINGS_BY_NAME:
            if not name.startswith("UPSTREAM_NAME_"):
                self.assertRegex(out, r"(?m)^%s +\S" % name)
        asked = self.stub.requests[0]
        self.assertEqual(asked.target, "/v1/models")
        self.assertEqual(asked.get("authorization"), "Bearer sk-hush")

    @unittest.skipUnless(os.path.exists("/dev/full"), "there is no /dev/full here")
    def test_a_full_disk_is_said_in_a_line(self):
        full = "sh", "-c", 'exec "$@" >/dev/full', "sh"
        for arguments in self.each((("--check",), ("grafana",))):
            process = self.command(*arguments, before=full, BASE_API_URL=self.NOWHERE)
            self.assertEqual(process.finish(), (1, "", "No space left on device\n"))

    def test_check_fails_where_there_is_no_upstream_or_no_list(self):
        good = self.new_stub(says(b'{"data": []}'))
        bad = self.new_stub(says(b'{"error": "no"}', "401 No"))
        for url, number in self.each(((good + "," + bad, 2), (bad, 1))):
            code, out, _ = self.finish("--check", BASE_API_URL=url)
            self.assertEqual((code, out.count("models of base at ")), (1, number))
            self.assertIn(bad + ": the upstream answered 401, and no list of models\n", out)
        self.stub.refuse_connections()
        code, out, err = self.finish("--check", BASE_API_URL=bad)
        self.assertEqual((code, err, out.count("Traceback")), (1, "", 0))

    def test_check_says_what_a_start_would(self):
        there = self.new_stub(says(b'{"data": []}'))
        used, foreign = new_path(self, "used.db"), new_path(self, "foreign.db")
        with open(foreign, "w", encoding="utf-8") as file:
            file.write("hello")
        self.serve(BASE_API_URL=there, DATABASE=used)
        for said, settings in self.each((
                ("foreign.db is not a database of llm_proxy", {"DATABASE": foreign}),
                ("is used by another llm_proxy", {"DATABASE": used}),
                ("x.db': no such folder", {"DATABASE": "/nonexistent/x.db"}),
                ("x.db': no such folder", {"DATABASE": "/proc/x.db"}),
                ("REDIS_URL: Redis is not there", {"REDIS_URL": "unix:///nonexistent"}),
                ("USAGE_LOG must be", {"USAGE_LOG": "/nonexistent/x.log"}),
                ("USAGE_LOG must be", {"USAGE_LOG": os.path.dirname(os.path.abspath(__file__))}),
                ("cannot listen on 0.0.0.0 port", {"PORT": self.address[1]}))):
            code, out, _ = self.finish("--check", BASE_API_URL=there, **settings)
            self.assertEqual(code, 1)
            self.assertRegex(out, "(?m)^fault: .*" + re.escape(said))

    def test_check_knows_that_a_start_goes_without_the_usual_database(self):
        for path, is_usual in self.each("""[["", true], ["x.db", false]]"""):
            config, out = read_config({**HERE, "DATABASE": path}), io.StringIO()
            nowhere = patch("tempfile.TemporaryFile", side_effect=PermissionError)
            with redirect_stdout(out), nowhere, patch.object(llm_proxy, "listen"):
                faults = list(llm_proxy.faults_of_start(config))
            self.assertEqual((not faults, "in memory only" in out.getvalue()), (is_usual,) * 2)

    def usual_database(self):
        """Returns the settings of a start with the usual database, and its path, where nothing can
        be written."""
        path = new_path(self, "llm_proxy.db")
        os.mkdir(llm_proxy.lock_name(path))
        config = read_config({**HERE, "DATABASE": ""})
        config.database = path
        return config, path

    def test_the_usual_database_is_read_where_it_cannot_be_written(self):
        for closed, statement in self.each((
                (None, ""), (True, llm_proxy.CLOSE_DOOR), (False, "SELECT 1"),
                (False, "DELETE FROM facts; DROP TABLE keys"),  # of an earlier version
                (True, "ALTER TABLE keys RENAME COLUMN role TO x"))):
            config, path = self.usual_database()
            if statement:
                with closing(Database(path)) as database:
                    secret = database.secret()
                    database.connection.executescript(statement)
            database = llm_proxy.open_database(config, [])
            self.assertEqual(database is None, closed is None)
            if database:
                found = llm_proxy.file_secret(database)
                self.assertEqual(found == secret, "DELETE" not in statement)
                with closing(database):
                    keys = llm_proxy.stored_keys(database, found, print)
                self.assertEqual(keys.closed, closed)

    def test_the_usual_database_that_cannot_be_read_is_a_fault_unless_the_settings_have_keys(self):
        for keys, said in self.each((
                (None, "be read"), ({}, "in memory only"), ({"k": "k"}, "in memory only"))):
            config, path = self.usual_database()
            Database(path).close()
            config.proxy_api_keys = keys
            out, remarks, found = io.StringIO(), [], None
            with patch.object(llm_proxy, "connect", side_effect=PermissionError), (
                    patch.object(llm_proxy, "listen")), redirect_stdout(out):
                faults = list(llm_proxy.faults_of_start(config))
                try:
                    self.assertIsNone(llm_proxy.open_database(config, remarks))
                except llm_proxy.DatabaseFault as fault:
                    found = fault
            self.assertEqual((type(found), len(faults)), (
                (type(None), 0) if keys is not None else (llm_proxy.DatabaseFault, 1)))
            self.assertIn(said, str(found or remarks))
            self.assertIn(said, "".join(faults) or out.getvalue())

    def test_a_closed_door_stays_closed_where_the_usual_database_cannot_be_written(self):
        settings = [{}]
        if shutil.which("redis-server"):
            settings.append({"WORKERS": 2, "REDIS_URL": RedisServer(self).url})
        for more in self.each(settings):
            _, path = self.usual_database()
            with closing(Database(path)) as database:
                keys = llm_proxy.KeyStore(database.connection, time, KeysCase.ACTOR)
                ann = keys.add("ann").secret
            self.serve(cwd=os.path.dirname(path), DATABASE="", **more)
            self.assertEqual([self.ask(key).status for key in (None, "x", ann)], [401, 401, 200])

    def test_an_upstream_that_is_not_there_is_told_at_the_start(self):
        good, gone = self.new_stub(), Stub()
        self.addCleanup(gone.close)
        gone.refuse_connections()
        process = self.serve(BASE_API_URL=good + "," + gone.url, OPEN_TIMEOUT="0.3",
                             UPSTREAM_BOX_URL=good.replace("http", "https"))
        rows = wait_for(lambda: [row for row in process.rows if " upstream http" in row][1:]
                        and "".join(process.rows), "the lines")
        self.assertIn("upstream %s: connection refused\n" % gone.url, rows)
        self.assertRegex(rows, r"upstream https.*: (timed out|TLS failed) \(does it speak")

    def test_it_starts_without_a_home_in_a_directory_it_cannot_write_to(self):
        folder = "/proc" if os.path.isdir("/proc") else "/"
        process = self.serve(cwd=folder, DATABASE="", BASE_API_URL=self.NOWHERE + "/v1",
                             BASE_API_KEY="sk-hush", REQUEST_TOKEN_COST=11)
        self.assertTrue(self.ask(HEALTH).json()["ok"])
        for said in self.each((
                "llm_proxy %s listens on http://127.0.0.1:%d\n" % (
                    VERSION, self.address[1]),
                self.NOWHERE + "/v1", "holds 10 tokens", "warning: REQUEST_TOKEN_COST 11",
                "warning: calls and buckets are kept in memory only")):
            found = wait_for(lambda: [row for row in process.rows if said in row])
            self.assertEqual(len(found), 1)
        self.assertFalse(process.said("hush"))

    @unittest.skipUnless(hasattr(os, "sched_getaffinity") and os.path.isdir("/proc/self/task"),
                         "this system keeps no thread on a CPU")
    def test_the_loop_stays_on_one_cpu_and_what_writes_is_free(self):
        pid = self.serve(DATABASE=new_path(self, "books.db")).process.pid
        found = {int(task): os.sched_getaffinity(int(task))
                 for task in os.listdir("/proc/%d/task" % pid)}
        self.assertEqual(len(found.pop(pid)), 1)
        self.assertGreaterEqual(list(found.values()).count(os.sched_getaffinity(0)), 2)

    def test_it_runs_with_its_standard_files_closed(self):
        closed = "sh", "-c", 'exec "$@" <&- >&-', "sh"
        path = self.ledger()
        self.assertEqual(self.command("usage", before=closed, DATABASE=path).finish(), (0, "", ""))
        process = self.serve(before=closed)
        self.assert_status(200)
        self.assertEqual(process.stop().wait(), 0)
        self.assertFalse(process.said("Traceback"))

    def test_two_services_never_have_one_database(self):
        path = new_path(self, "books.db")
        first = self.serve(BASE_API_URL=self.NOWHERE, DATABASE=path)
        said = "DATABASE %s is used by another llm_proxy that runs\n"
        os.symlink(path, path + ".link")
        for name in self.each((path, path + ".link")):
            self.assert_fails(1, 1, said % name, BASE_API_URL=self.NOWHERE, DATABASE=name)
        self.assertEqual(self.command("usage", DATABASE=path).finish(), (0, "no calls yet\n", ""))
        first.stop()
        first.finish()
        self.serve(BASE_API_URL=self.NOWHERE, DATABASE=path).stop()

    def test_a_locked_database_is_waited_for(self):
        path = new_path(self, "books.db")
        with closing(Database(path).connection) as connection:
            stream = io.StringIO()
            with patch.object(llm_proxy, "WAIT_SECONDS", 0.01), (
                    redirect_stderr(stream)):
                connection.execute("BEGIN EXCLUSIVE")
                with self.assertRaisesRegex(llm_proxy.InUse, "locked"):
                    llm_proxy.open_patiently(path, None)
                self.assertEqual(stream.getvalue().count("locked by another"), 11)

    def test_a_second_start_on_the_same_port_says_so_in_one_line(self):
        self.serve()
        host, port = self.address
        said = "cannot listen on 127.0.0.1 port %d" % port
        self.assert_fails(1, 1, said, HOST=host, PORT=port, BASE_API_URL=self.NOWHERE)

    def test_ipv6_and_ipv4_come_in_by_one_door_and_one_caller_is_one(self):
        try:
            with socket.create_server(("::1", 0), family=socket.AF_INET6):
                pass
        except OSError:
            self.skipTest("this machine has no IPv6")
        process = self.serve(HOST="::", LOG_FORMAT="json")
        for host, left in self.each("""[["127.0.0.1", "9"], ["::1", "9"], ["127.0.0.1", "8"]]"""):
            client = self.connect()
            client.sock.close()
            client.sock = socket.create_connection((host, self.address[1]), PATIENCE)
            client.reader.sock = client.sock
            answered = client.exchange(call())
            self.assertEqual(answered.get("x-ratelimit-remaining"), left)
            wait_for(lambda: process.said('"caller": "%s"' % host))

    @staticmethod
    def level(path):
        """Returns what is left in the one bucket of a ledger, 10 ** 6 where none was saved."""
        database = Database(path, reading=True)
        with closing(database.connection):
            return next((level for level, _ in database.levels().values()), 10 ** 6)

    def test_a_stop_loses_no_call_and_no_level_and_a_kill_at_most_the_last_second(self):
        path = new_path(self, "books.db")
        told, done = says({"usage": TOLD}), 0
        for stop in self.each((signal.SIGTERM, signal.SIGKILL, signal.SIGTERM)):
            process = self.serve(
                answer=told, DATABASE=path, TOKEN_COST_MODE="usage", MAX_TOKENS=1000)
            client = self.connect()
            for done in range(done + 1, done + 11):
                answered = client.exchange(call("k", max_tokens=1))
                left = 1000 - done * TOLD["total_tokens"]
                self.assertEqual(answered.get("x-ratelimit-remaining"), str(left))
            if stop == signal.SIGKILL:
                wait_for(lambda: len(LedgerCase.rows(path)) == done, "the rows of the last second")
                wait_for(lambda: self.level(path) == left, "the level")
            client.close()
            process.stop(stop).wait()
            self.assertEqual(len(LedgerCase.rows(path)), done)

    def test_a_kill_loses_the_last_quarter_second_of_calls_at_most_and_levels_match_the_rows(self):
        """The machine may stand still for longer, but not each time, unless it is busy."""
        self.assertTrue(any(self.kill_and_count() < 0.4 for _ in range(5)) or is_busy())

    def kill_and_count(self):
        """Returns of how many seconds a killed proxy has lost its calls."""
        path, ended = new_path(self, "books.db"), []
        process = self.serve(DATABASE=path, MAX_TOKENS=10 ** 6)
        client, end = self.connect(), time.monotonic() + 0.5
        while time.monotonic() < end:
            client.answers(200, call("k"))
            ended.append(time.monotonic())
        killed = time.monotonic()
        process.stop(signal.SIGKILL).wait()
        rows = len(LedgerCase.rows(path))
        # No call has a row that was not charged, and none is charged that was not made, but for one
        # that may have been running.
        charged = 10 ** 6 - self.level(path)
        self.assertTrue(rows <= charged <= len(ended) + 1, (rows, charged, len(ended)))
        return killed - (ended + [killed])[rows]

    def test_a_hang_up_signal_reads_the_certificates_again_and_ends_nothing(self):
        path = pem_file(self)
        process = self.serve(TLS_CERT_FILE=path)
        self.assertTrue(process.said("listens on https://127.0.0.1:"))
        self.read_again(process, "settings and certificates were read again")
        os.remove(path)
        self.read_again(process, "were not read again, the old ones stay: TLS_CERT_FILE")
        self.assertIsNone(process.process.poll())

    @staticmethod
    def read_again(process, said):
        """Has a process read its settings again, and wait until it says this."""
        seen = len(process.rows)
        process.stop(signal.SIGHUP)
        wait_for(lambda: any(said in row for row in process.rows[seen:]), said)

    def serve_dotenv(self, *rows, **settings):
        """Starts one with these rows in `self.dotenv`, its .env file."""
        self.dotenv = pathlib.Path(new_path(self, ".env"))
        self.dotenv.write_text("\n".join(rows), "utf-8")
        return self.serve(cwd=str(self.dotenv.parent), **settings), self.connect()

    def test_a_hang_up_signal_reads_keys_limits_and_prices_again(self):
        usage_log = pathlib.Path(new_path(self, "usage.jsonl"))
        process, client = self.serve_dotenv(
            "PROXY_API_KEYS=a", "LIMITS=each 100 requests per day", USAGE_LOG=usage_log)
        client.answers(200, call("a"))
        wait_for(usage_log.read_bytes, "a row")
        usage_log.rename(usage_log.with_suffix(".old"))
        self.dotenv.write_text(
            "PROXY_API_KEYS=b\nLIMITS=each 10 requests per day\nMAX_QUEUE=7", "utf-8")
        self.read_again(process, "warning: the key without a name in PROXY_API_KEYS has less than")
        self.assertTrue(process.said("MAX_QUEUE was changed: it needs a new start"))
        client.answers(401, call("a"))
        answered = client.exchange(call("b"))
        self.assertEqual((answered.status, answered.get("x-ratelimit-limit")), (200, "10"))
        wait_for(lambda: usage_log.exists() and usage_log.read_bytes().count(b"\n") == 2)

    def test_settings_that_are_wrong_at_a_hang_up_signal_change_nothing(self):
        process, client = self.serve_dotenv("PROXY_API_KEYS=b")
        for text, said, status in self.each(r"""[
                ["PROXY_API_KEYS=b\nLIMITS=nonsense", "the old ones stay: LIMITS must", 401],
                ["LIMITS=each 10 requests per day", "PROXY_API_KEYS must not be unset", 401],
                ["PROXY_API_KEYS=anyone", "were read again; each caller's bucket holds 10",
                 200]]"""):
            self.dotenv.write_text(text, "utf-8")
            self.read_again(process, said)
            found = [client.exchange(call(key)).status for key in "bc"]
            self.assertEqual(found, [200, status])

    def test_a_signal_has_each_running_call_told_in_a_line(self):
        process = self.serve(answer=None, MAX_CONCURRENCY=1)
        self.begin(event(1))
        process.stop(signal.SIGUSR1)
        wait_for(lambda: process.said("running calls: 1\n"))
        self.send(call("k"))
        wait_for(lambda: b'"waiting": 1' in self.ask(HEALTH).body, "a call in line")
        process.stop(signal.SIGUSR1)
        for said in self.each((
                "running calls: 2\n",
                "127.0.0.1 POST %s " % CHAT,
                "s upstream=base awaits the body of the response of http://127.0.0.1:",
                "s upstream=base awaits its turn at base for ")):
            wait_for(lambda: process.said(said))

    def test_without_certificates_it_drains_and_ends_with_its_terminal(self):
        ours, theirs = os.openpty()
        self.addCleanup(os.close, ours)
        process = self.serve(stdin=theirs)
        os.close(theirs)
        self.assertEqual(process.stop(signal.SIGHUP).wait(), 0)
        self.assertTrue(process.said("stopped"))

    def test_a_second_signal_ends_it_at_once_unless_it_is_the_first_one_again(self):
        """GNU's `timeout` signals a process and then its group."""
        process = self.serve(answer=None)
        client, asked = self.begin(event(1))
        process.stop(signal.SIGINT).stop(signal.SIGTERM)
        wait_for(lambda: process.said("stopping"))
        asked.chunks(event(2))
        client.expect(event(2))
        wait_for(lambda: process.stop().process.poll() is not None)
        self.assertNotEqual(process.wait(), 0)
        client.expect_cut()

    @unittest.skipUnless(sys.platform == "linux", "reads /proc")
    def test_pypy_begins_anew_once_with_a_larger_nursery_and_cpython_never(self):
        begun = []
        for is_pypy in (True, False):
            with patch.object(llm_proxy, "IS_PYPY", is_pypy), \
                    patch.object(os, "execve", lambda *given: begun.append(given)):
                llm_proxy.enlarge_nursery({"PORT": "1"})
                llm_proxy.enlarge_nursery({"PYPY_GC_NURSERY": "1M"})
        [(program, arguments, environ)] = begun
        self.assertEqual((program, environ), (
            sys.executable, {"PORT": "1", "PYPY_GC_NURSERY": "32M"}))
        with open("/proc/self/cmdline", "rb") as file:
            self.assertEqual(b"".join(one + b"\0" for one in arguments), file.read())

    @staticmethod
    def spoken(chunks):
        """The text of a stream of chat."""
        return "".join([choice["delta"].get("content") or ""
                        for one in chunks for choice in one["choices"]]).strip()

    def test_the_demo_brings_its_own_endpoint(self):
        process = self.serve("--demo", MAX_TOKENS=2)
        wait_for(lambda: process.said("curl -N http://127.0.0.1:%d%s" % (self.address[1], CHAT)))
        self.assertEqual(self.get("/v1/models").json()["data"][0]["id"], "demo")
        self.assertIn(b"built-in demo endpoint", self.ask().body)
        asked = [{"content": "x"}, {"content": [{"type": "text", "text": 'say: "a\\b"  c\n'}]}]
        told = self.ask(call(
            stream=True, stream_options={"include_usage": True}, messages=asked))
        *events, done, nothing = told.body.decode().split("\n\n")
        self.assertEqual((told.whole, done, nothing), (True, "data: [DONE]", ""))
        chunks = [json.loads(event[6:]) for event in events]
        self.assertEqual(self.spoken(chunks), '"a\\b"  c')
        self.assertGreater(chunks[-1]["usage"]["completion_tokens"], 0)
        self.assertIn(b"limit reached", self.ask().body)

    def test_an_answer_of_the_demo_begins_when_it_is_told_to(self):
        process = self.serve("--demo", DEMO_FIRST_MS=50_000, FIRST_BYTE_TIMEOUT=0.2)
        wait_for(lambda: process.said("curl -N"))
        self.assert_status(504, call(stream=True))



class WorkersTest(ProcessCase):
    """Several processes on one port."""
    PAUSE = 0.01

    def start(self, count=4, answer=says(), **settings):
        if not shutil.which("redis-server"):
            self.skipTest("there is no redis-server")
        self.redis = RedisServer(self)
        self.path = new_path(self, "books.db")
        self.process = self.serve(answer=answer, **{
            "WORKERS": count, "REDIS_URL": self.redis.url, "DATABASE": self.path,
            "MAX_TOKENS": 10 ** 6, "ADMIN_KEY": ADMIN, **settings})
        wait_for(lambda: sum(map(self.hears, self.workers())) == count, "the workers")
        return self.process

    @staticmethod
    def hears(pid):
        """Returns whether a worker serves, which is when it catches signals."""
        text = pathlib.Path("/proc/%d/status" % pid).read_text("ascii")
        blocked, caught = [int(re.search(name + r":\t(\w+)", text)[1], 16)
                           for name in ("SigBlk", "SigCgt")]
        return bool(caught & ~blocked & 1 << signal.SIGUSR1 - 1)

    def workers(self):
        """Returns the processes that the parent has."""
        pid = self.process.process.pid
        with open("/proc/%d/task/%d/children" % (pid, pid), encoding="ascii") as file:
            return list(map(int, file.read().split()))

    def scrape(self, name):
        text = self.get("/metrics", key=ADMIN).body.decode()
        return sum(float(row.split()[-1]) for row in text.splitlines()
                   if row.startswith("llm_proxy_" + name))

    def test_a_killed_worker_takes_its_own_calls_along_and_is_started_again(self):
        self.start(answer=None)
        streams = [self.begin(event(1)) for _ in range(24)]
        killed = max(self.workers(), key=lambda pid: len(os.listdir("/proc/%d/fd" % pid)))
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: self.process.said("(SIGKILL): it is started again\n"), "no pause")
        wait_for(lambda: len(self.workers()) == 4 and killed not in self.workers(), "a new one")
        cut = [client for client, _ in streams if client.is_readable()]
        self.assertIn(len(cut), range(1, 24))
        for client, asked in streams:
            if client in cut:
                asked.wait_for_hang_up()
                client.expect_cut()
            else:
                asked.chunks(event(2), end=True)
                client.expect_end()
        self.assertEqual(self.process.stop().wait(), 0)

    def test_counts_add_up_and_never_go_back(self):
        for _ in range(40):
            self.assert_status(200, call("k"))
        wait_for(lambda: self.scrape("requests_total") == 40, "all counts")
        with closing(sqlite3.connect(self.path)) as connection:
            wait_for(lambda: connection.execute("SELECT count(*) FROM calls").fetchall() == [(40,)])
        before = self.workers()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: pid not in self.workers() and len(self.workers()) == 4)
            self.assertEqual(self.scrape("requests_total"), 40)
        self.ask("k")
        wait_for(lambda: self.scrape("request_duration_seconds_count") == 41)
        self.process.stop().wait()
        _, out, _ = self.command("usage", "--csv", DATABASE=self.path).finish()
        self.assertIn(",41,", out)

    def test_what_one_does_all_go_by(self):
        process = self.start(PROXY_API_KEYS="first-key-of-all-workers")
        made = self.post("/admin/api/keys", b'{"name": "ann"}', key=ADMIN)
        secret = made.json()["key"]

        def statuses():
            return {self.ask(secret).status for _ in range(20)}
        wait_for(lambda: statuses() == {200}, "the key")
        self.post("/admin/api/keys/ann/revoke", b"", key=ADMIN)
        wait_for(lambda: statuses() <= {401, 429}, "its end")
        for act, status in self.each("""[["disable", 404], ["enable", 200]]"""):
            self.post("/admin/api/upstreams/base/" + act, b"", key=ADMIN)
            wait_for(lambda: {self.ask("first-key-of-all-workers").status
                              for _ in range(20)} == {status}, act)
        for number, said in self.each((
                (signal.SIGUSR1, ": running calls: "), (signal.SIGHUP, "were read again"))):
            process.stop(number)
            wait_for(lambda: sum(said in row for row in process.rows) == 4, said)

    def test_they_share_the_slots_of_an_upstream(self):
        self.start(answer=None, MAX_CONCURRENCY=2)
        clients = [self.send(call()) for _ in range(9)]
        for _ in clients:
            asked = self.stub.next()
            wait_for(lambda: self.redis.ask("ZCARD", "{llm_proxy}:slots:base:line") > 0
                     or len(self.stub.requests) >= 8, "others to wait")
            self.assertLessEqual(sum(not one.over.is_set() for one in self.stub.requests), 2)
            asked.answer()
        self.assertEqual({client.read().status for client in clients}, {200})

    def test_one_signal_drains_all(self):
        process = self.start(answer=None)
        streams = [self.begin(event(1)) for _ in range(12)]
        process.stop()
        wait_for(self.refuses, "the end of accepting")
        for client, asked in streams:
            asked.chunks(event(2), end=True)
            client.expect_end()
        self.assertEqual(process.wait(), 0)
        told = [sum(word in row for row in process.rows) for word in (": stopping", ": stopped\n")]
        self.assertEqual(told[0], told[1])  # one that has not begun to serve says nothing
        self.assertGreater(told[0], 0)

    def test_one_that_dies_while_redis_is_away_gives_no_more_than_its_share(self):
        process = self.start(3, LIMITS="all 9 requests per day")
        self.assertTrue(process.said("3 workers share the port"))
        wait_for(lambda: sum(": Redis is there, shared by " in row
                             for row in process.rows) == 3, "the others")
        self.redis.kill()
        wait_for(lambda: sum("goes by its share of the limits, one of 3" in row
                             for row in process.rows) == 3, "the absence of Redis")
        admitted = itertools.accumulate(
            self.ask().body == b'{"said": "hi"}' for _ in itertools.count())
        wait_for(lambda: next(admitted) == 9, "all that there is")
        for pid in self.workers():
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: sum(": it serves again" in row for row in process.rows) == 3, "others")
        self.assertEqual([next(admitted) for _ in range(30)], [9] * 30)

    def test_workers_end_with_their_parent(self):
        process = self.start(2)
        left = self.workers()
        process.stop(signal.SIGKILL)
        wait_for(lambda: not any(map(self.runs, left)), "their end")

    @staticmethod
    def runs(pid):
        """Returns whether it has not ended; whether somebody has noted that does not matter."""
        with suppress(OSError), open("/proc/%d/stat" % pid, encoding="ascii") as file:
            return file.read().rpartition(") ")[2][0] != "Z"

    def test_lines_of_all_are_whole(self):
        process = self.start(LOG_FORMAT="json")
        path = "/v1/" + 30 * "\u20ac"
        target = urllib.parse.quote(path)
        with threads([lambda: [self.post(target, b"{}", key="k") for _ in range(25)]] * 8):
            pass
        process.stop().wait()
        rows = [json.loads(row) for row in process.rows]
        self.assertEqual(sum("outcome" in row for row in rows), 200)

    def test_who_cannot_start_is_not_tried_for_ever(self):
        code, _, err = self.finish(WORKERS=3, REDIS_URL="unix:///nowhere", USAGE_LOG="/nowhere/log",
                                   BASE_API_URL="http://127.0.0.1:1", HOST="127.0.0.1")
        self.assertEqual((code, "/nowhere/log" in err), (2, True), err)

    def test_who_dies_again_and_again_waits_longer_and_longer(self):
        clock, said = Clock(), []
        workers = llm_proxy.Workers(1, None, clock, said.append)
        pauses = []
        for lives in self.each("""[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0]"""):
            workers.start_again(0, clock.now - lives, -9)
            pauses.append(round(workers.due[0] - clock.now, 1))
        self.assertEqual(pauses, [0, .4, .8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30, 0, .4])
        self.assertIn("worker 1 has ended (SIGKILL): it is started again in 0.4 s", said)

    def test_what_was_half_written_is_not_read(self):
        tally = llm_proxy.Tally(2)
        name = "llm_proxy_overhead_seconds"
        for number in (0, 1, 0):
            tally.begin(number)
            tally.write({name: [("_count", 1), ("_sum", "0.5")]})
        self.assertEqual(asyncio.run(tally.families()), {name: [("_count", 3), ("_sum", 1.5)]})
        (_, length, at), _ = tally.halves(0)
        tally.memory[at + 5:at + length] = bytes(length - 5)
        self.assertEqual(asyncio.run(tally.families()), {name: [("_count", 2), ("_sum", 1.0)]})


# --------------------------------------------------------------------------------------------------
# Endurance: everything at its worst. Each test has a short form here, and those with a `size` have
# a long one: `python test_llm_proxy.py --soak`, about 15 minutes, prints their figures.
# `--soak long [SECONDS]` runs attacks at random beside honest callers alone, for half an hour.
# --------------------------------------------------------------------------------------------------

class EnduranceCase(ProcessCase):
    LONG, pid = False, os.getpid()

    @classmethod
    def setUpClass(cls):
        if cls.LONG:  # which takes the product as it is
            llm_proxy.raise_descriptor_limit()
        else:
            super().setUpClass()

    def size(self, short, long):
        return long if self.LONG else short

    def report(self, text, *values):
        if self.LONG:
            sys.stderr.write("\n    %s ... " % (text % values))

    @staticmethod
    def p99_milliseconds(seconds):
        """Returns the milliseconds that 99 of 100 stayed under."""
        return 1000 * sorted(seconds)[len(seconds) * 99 // 100]

    def launch(self, answer, **settings):
        """Starts a proxy in this process, or in one of its own in the long form."""
        settings = {"MAX_TOKENS": 10 ** 12, "LOG_FORMAT": "json", **settings}
        if self.LONG:
            process = self.serve(answer=answer, **settings)
            self.pid, self.logged = process.process.pid, lambda: "".join(process.rows)
        else:
            self.start(answer, **settings)
            self.logged = self.lines.text

    def resident(self):
        """Returns the MiB of memory of the proxy's process, 0 where the system has no /proc."""
        with suppress(OSError), open("/proc/%d/statm" % self.pid) as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20
        return 0

    def left_open(self):
        """Returns how many descriptors and threads the proxy's process has, where there is a /proc.
        Connections that are kept a moment, for a next call or until a last answer is read, do not
        count."""
        if not os.path.isdir("/proc/self/fd"):
            return 0, 0
        kept = 0
        if self.pid == os.getpid():
            self.proxy.routes.close_stale(everything=True)
            gc.collect()
            kept = len(self.server.lingering)
        found = [len(os.listdir("/proc/%d/%s" % (self.pid, kind))) for kind in ("fd", "task")]
        return found[0] - kept, found[1]

    def assert_nothing_left(self, before):
        wait_for(lambda: all(now <= then for now, then in zip(self.left_open(), before)),
                 "the return to %d descriptors and %d threads" % before)

    @contextmanager
    def within(self, seconds):
        """Fails where the block takes longer. The short form has 8 s more, for a busy machine."""
        end = time.monotonic() + seconds + self.size(8, 0)
        yield
        self.assertLessEqual(time.monotonic(), end)

    @contextmanager
    def meanwhile(self, act):
        """Calls `act` again and again, in a thread."""
        over = Event()

        def run():
            while not over.wait(0.005):
                act()
        thread = Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(PATIENCE)

    @contextmanager
    def steady_calls(self):
        """Makes one call after the other meanwhile, each on a new connection; all must be answered.
        Returns the list of their seconds."""
        seconds, statuses = [], []

        def act():
            began = time.monotonic()
            statuses.append("failed")
            statuses[-1] = self.ask().status
            seconds.append(time.monotonic() - began)
        with self.meanwhile(act):
            yield seconds
        self.assertEqual(set(statuses), {200})
        self.assertGreater(len(statuses), self.size(0, 5))


class Fuzz:
    """Requests with faults, from a generator of random numbers with a seed."""
    GEMINI = b'{"contents": [{"role": "user", "parts": [{"text": "hello"}]}]}'
    FORM = (b'--xyz\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--xyz\r\n'
            b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n'
            b'Content-Type: audio/wav\r\n\r\n\x00\xff\n\x80\r\n--xyz--\r\n')
    METHODS = "GET", "HEAD", "PUT", "POST", "DELETE", "OPTIONS"
    MARK = b"12345678"  # stands for the number of its connection
    MARKED = chat(user="mark-" + MARK.decode())
    NAMED = "X-Request-ID: mark-" + MARK.decode()
    GOOD = (
        call("sk-1"), call(None, "X-A: 1", "X-A: 2", "Cookie: a=b", stream=True),
        unsized(CHAT, CHUNKED) + chunk(chat()[:20]) + chunk(chat()[20:]) + LAST,
        unsized(CHAT, CHUNKED, "Trailer: X-Sum") + b"0f;a=b\r\n" + chat()[:15] + b"\r\n"
        + chunk(chat()[15:]) + b"0\r\nX-Sum: 1\r\n\r\n",
        unsized("/v1/files", CHUNKED) + chunk(b"\r\n0\r\n\r\n") + LAST,
        request("POST", "http://proxy.test" + CHAT, chat()), call(None, "Expect: 100-continue"),
        unsized(CHAT, CHUNKED, "Expect: 100-continue") + chunk(chat()) + LAST,
        call() + HEALTH + call(),
        request("GET", "/v1/x?key=sk-1&a=%2e%2e") + call(stream=True),
        request("POST", CHAT, chat(stream=True), "Connection: keep-alive", version="1.0"),
        request("GET", "/", version="1.0"),
        request("POST", "/v1beta/models/g:generateContent?key=sk-1", GEMINI),
        request("POST", "/v1beta/models/g:streamGenerateContent?alt=sse", GEMINI,
                "X-Goog-Api-Key: sk-1"),
        request("POST", "/v1/messages", chat(max_tokens=5), "X-Api-Key: sk-1",
                "Anthropic-Version: 2023-06-01"),
        request("POST", "/v1/audio/transcriptions", FORM,
                "Content-Type: multipart/form-data; boundary=xyz"),
        request("OPTIONS", CHAT, b"", "Origin: http://a.test",
                "Access-Control-Request-Headers: X-A"),
        request("POST", CHAT, MARKED, NAMED),
        unsized(CHAT, CHUNKED, NAMED) + chunk(MARKED) + LAST,
        request("POST", CHAT, MARKED, NAMED) + request("POST", CHAT, MARKED) * 2,
        request("POST", "/v1/files", call("sk-1") + call("sk-1")),  # one within another
        request("HEAD", "/v1/files/1", b"", "Connection: X-Hop, close", "X-Hop: 1"))
    SPELLINGS = (  # what is replaced by what: framing, line ends, folding, methods, targets
        (rb"Content-Length: \d+|Transfer-Encoding: chunked", (
            b"Content-Length: -1|Content-Length: 0|Content-Length: 1|Content-Length:|"
            b"Content-Length: 5, 5|Content-Length: 0x5|Content-Length: 1e1|Content-Length : 5|"
            b"Content-Length: 99999999999999999999|Transfer-Encoding : chunked|"
            b"Transfer-Encoding: chunked, chunked|Transfer-Encoding: xchunked|"
            b"Transfer-Encoding:\x0bchunked|Transfer-Encoding: chunked;q=1|"
            b"Transfer-Encoding: gzip, chunked|Transfer-Encoding: Chunked|Transfer-Encoding:")),
        (rb"\r\n", b"\n|\r|\r\r\n|\n\r|\r\n\r\n|\r\n |\r\n\t|\0\r\n| \r\n|\xc2\x85"),
        (rb"(?<=\r\n)[0-9a-f]+(?=[\r;])", (
            b"0|00|+5|-1|0x5|5 |\t5|5_0|1;a=\"\n\"|ffffffffffffffff|10000000000000000|5\x00|5;|G")),
        (rb": ", b":|: \t|:  |\t: | : |:\r\n |: \x00|: ,"),
        (rb"\A[A-Z]+", b"GET|HEAD|PUT|post|TRACE|CONNECT|PRI|M-SEARCH|POST\t|DELETE|X|QUERY"),
        (rb"(?<= )/\S*", (
            b"*|//evil.test/|/../health|/v1/%2e%2e/x|/v1/x?a b|http://a@proxy.test/v1/x|/v1/\xe9|"
            b"proxy.test:80|/v1/x#y|\\v1|/%00|/v1/x%0d%0aX:y|/health|/" + b"a" * 9000)),
        (rb"HTTP/1\.[01]", b"HTTP/1.0|HTTP/0.9|HTTP/1.2|HTTP/2.0|HTTP/1,1|http/1.1||HTTP/01.1"),
        (rb"Host: [a-z.]+", b"Host:|Host: a, b|Host: x\r\nHost: x|Host: a@b|Host: a/b|X: y"))
    ODD_BYTES = (b"\r|\n|\0|\t| |:|,|0|\r\n|\n\n|\r\n\r\n|\x0b|\x7f|\x80|\xff").split(b"|")
    ODD_LINES = (
        b"Transfer-Encoding: chunked|Transfer-Encoding: identity, chunked|Content-Length: 3|"
        b"Transfer_Encoding: chunked|Content-Length: +3|Content-Length: 99999|Host: other.test|"
        b" folded|Expect: 100-continue|Connection: content-length|Upgrade: h2c|TE: trailers|"
        b"Content-Encoding: gzip|X: \xe9").split(b"|")

    APPLICATION = '''
import os, re
def echo(name, target, body):
    with open(os.environ["NAMES"], "ab") as file:
        file.write(name + b"\\n")
    marks = re.findall(rb"mark-[0-9]{8}", body)
    return b'{"echo": "%b %b"}' % (name, b" ".join(marks))
async def asgi(scope, receive, send):
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        event = await receive()
        body, more = body + event.get("body", b""), event.get("more_body")
    told = echo(dict(scope["headers"]).get(b"x-request-id", b"none"), scope["raw_path"], body)
    fields = [(b"content-length", b"%d" % len(told)), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.body", "body": told})
def wsgi(environ, start):
    body = environ["wsgi.input"].read()
    told = echo(environ.get("HTTP_X_REQUEST_ID", "none").encode("latin-1"), b"", body)
    start("200 OK", [("Content-Length", str(len(told))), ("Content-Type", "application/json")])
    return [told]
'''
    NODE = '''
const fs = require("fs");
require("http").createServer((asked, answer) => {
  const parts = [], name = asked.headers["x-request-id"] || "none";
  asked.on("data", part => parts.push(part)).on("end", () => {
    fs.appendFileSync(process.env.NAMES, name + "\\n");
    const marks = Buffer.concat(parts).toString("latin1").match(/mark-[0-9]{8}/g) || [];
    const body = JSON.stringify({echo: name + " " + marks.join(" ")});
    answer.writeHead(200, {"Content-Type": "application/json", "Content-Length": body.length});
    answer.end(body);
  });
}).listen(+process.argv[2], "127.0.0.1");
'''

    @staticmethod
    def echo(name, *parts):
        """Returns what tells a request's name, and by which connection it came."""
        marks = re.findall(rb"mark-\d{8}", b"".join(parts))
        return b'{"echo": "%b %b"}' % (name.encode(), b" ".join(marks))

    @classmethod
    def mutate(cls, chance):
        """Returns one of the good requests with one to four faults, mostly one."""
        data = chance.choice(cls.GOOD)
        for _ in range(chance.choice((1, 1, 1, 2, 3, 4))):
            data = chance.choice((cls.spell_otherwise, cls.damage))(data, chance) or b"\0"
        return data

    @classmethod
    def spell_otherwise(cls, data, chance):
        """Replaces, or doubles, one of the parts that say where a request ends or goes."""
        shape, others = chance.choice(cls.SPELLINGS)
        found = list(re.finditer(shape, data))
        if not found:
            return cls.damage(data, chance)
        match, other = chance.choice(found), chance.choice(others.split(b"|"))
        if chance.random() < 0.2:
            other = match[0] + b"\r\n" + other
        return data[:match.start()] + other + data[match.end():]

    @classmethod
    def damage(cls, data, chance):
        """Changes any bytes, or inserts a line."""
        # Most bytes of a request matter less than those of its start.
        place = min(len(data) - 1, chance.randrange(chance.choice((60, 500, 500))))
        end = place + chance.choice((1, 1, 2, 8, 40))
        before, behind = data[:place], data[place:]
        other, rows = chance.choice(cls.GOOD), data.split(b"\r\n")
        row = chance.choice(cls.ODD_LINES + rows)
        rows.insert(chance.randrange(1, len(rows) + 1), row)
        return chance.choice((
            before + bytes([behind[0] ^ 1 << chance.randrange(8)]) + behind[1:],
            before + data[end:],
            data[:end] + behind,
            before + chance.choice(cls.ODD_BYTES) + behind,
            before + other[chance.randrange(len(other)):],
            b"\r\n".join(rows)))


class DoorTest(EnduranceCase):
    """Connections and requests of callers."""

    def start_box(self, number):
        """A proxy by TLS, and the Stub of an upstream by TLS that runs so many calls at a time."""
        path = pem_file(self)
        box = Stub(None, tls=server_context(path, None))
        self.addCleanup(box.close)
        self.start_tls(None, UPSTREAM_BOX_URL=box.url, UPSTREAM_BOX_MAX_CONCURRENCY=number,
                       UPSTREAM_CA_FILE=path, MAX_QUEUE_PER_CALLER=number)
        return box

    def test_whatever_runs_has_no_thread_but_those_that_connect(self):
        """Streams, calls in line and to https upstreams, trickling heads, idle connections."""
        before = threading.enumerate()  # some of another test may be about to end
        self.patch_seconds(Handshakes_RULE=read_rule("address 999 requests per second"))
        number = self.size(10, 100)
        box = self.start_box(number)
        boxed = request("POST", "/box" + CHAT, chat())
        for data in [call(stream=True)] * 4 + [boxed] * 2 + [b"POST / HTTP/1.1\r\n", b""]:
            for _ in range(number):
                self.connect_tls().send(data)
        queue = self.proxy.routes.by_name["box"].queue
        wait_for(lambda: queue.limits.waiting == number and box.calls == number
                 and self.stub.calls == 4 * number)
        names = [thread.name.partition("_")[0]
                 for thread in {*threading.enumerate()}.difference(before)]
        names = Counter(name for name in names if "Thread" not in name)
        self.assertLessEqual(names.pop("connect"), 2 * llm_proxy.Address.MAX_CONNECTING)
        self.assertEqual(names, {"loop": 1, "accept": 1, "log": 1})

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "looks at another process")
    def test_callers_for_whom_there_is_no_descriptor_cost_no_time_and_are_forgotten(self):
        limited = "sh", "-c", 'ulimit -n 64 && exec "$@"', "sh"  # hard: a soft one would be raised
        process = self.serve(before=limited)
        pid = process.process.pid

        def busy():
            """Returns the share of the next 50 ms in which the process computes."""
            clock = ~pid << 3 | 2  # that of its CPU time, on Linux
            before = time.clock_gettime(clock)
            time.sleep(0.05)  # is measured
            return (time.clock_gettime(clock) - before) / 0.05
        clients = [self.send(call()) for _ in range(100)]
        wait_for(lambda: len(os.listdir("/proc/%d/fd" % pid)) == 64, "the last descriptor")
        wait_for(lambda: busy() < 0.2, "rest")
        with self.within(1):
            for client in clients[:-1]:
                client.close()
            self.assertEqual(clients[-1].read().status, 200)  # who waited all the time
        self.assertFalse(process.said("Traceback"))

    def call_from(self, number):
        """Calls twice from one of the 2 ** 24 addresses of loopback. Returns what came back."""
        source = "127.%d.%d.%d" % (1 + (number >> 16), number >> 8 & 255, number & 255), 0
        with socket.create_connection(self.address, PATIENCE, source) as sock:
            sock.sendall(call() + call(None, "Connection: close"))
            return sock.makefile("rb").read()

    @unittest.skipUnless(sys.platform == "linux", "only there 127.0.0.0/8 can be called from")
    def test_callers_from_ever_new_addresses_do_not_fill_the_memory(self):
        self.patch_seconds(Limits_MAX_KNOWN=40)
        self.start(MAX_TOKENS=1)
        limits = self.proxy.limits
        limits.buckets.room = 50
        for number in range(self.size(150, 20000)):  # each has a token, for one of its calls
            self.assertRegex(self.call_from(number), (
                rb'(?s)\AHTTP/1.1 200 .*"said": .*HTTP/1.1 200 .*limit reached'))
            self.stub.requests.clear()
        self.assertLessEqual(len(limits.buckets.levels), 50)
        self.assertLessEqual(len(limits.known), 40)

    ALLOWED = {100, 200, 204, 400, 403, 404, 405, 408, 413, 414, 415, 417, 431, 501, 505}
    ONLY_OURS = {"authorization", "x-api-key", "x-goog-api-key", "cookie", "te", "upgrade",
                 "expect"}

    def answer_strictly(self, asked):
        """Fails unless a request that was passed on is sound, whatever the caller sent. Answers."""
        self.assertRegex(
            asked.head, rb"\A[A-Z][A-Z_-]* /[!-~]* HTTP/1\.1\r\n"
                        rb"(?:[!-9;-~]+:[\t -~\x80-\xff]*\r\n)+\r\n\Z")
        names = [name for name, _ in asked.fields]
        self.assertEqual(names.count("host"), 1)
        self.assertEqual(asked.get("host"), "127.0.0.1:%d" % self.stub.port)
        self.assertFalse(self.ONLY_OURS & set(names))
        self.assertNotIn(asked.method, ("TRACE", "CONNECT"))
        if asked.method == "HEAD":
            return asked.answer(b"")
        said = Fuzz.echo(asked.get("x-request-id") or "none", asked.body)
        if b'"stream": true' in asked.body:
            asked.stream(b"data: %b\n\n" % said, end=True)
        else:
            asked.answer(said)

    def converse(self, requests):
        """Sends each request on a connection of its own; every other caller closes its sending
        side. Returns the answers as bytes, None for a reset."""
        clients = []
        for number, data in enumerate(requests):
            clients.append(self.connect())  # its time for a head begins
            data = data.replace(Fuzz.MARK, b"%08d" % number)
            with suppress(OSError):  # it may have been refused by its first bytes
                clients[number].send(data)
                if number % 2:
                    clients[number].sock.shutdown(socket.SHUT_WR)
        return [read_to_the_end(client) for client in clients]

    def start_strictly(self, seconds=0.3, **settings):
        self.patch_seconds(ClientConnection_HEAD_SECONDS=seconds,
                           ClientConnection_HALF_CLOSE_SECONDS=seconds,
                           ClientConnection_IDLE_SECONDS=0.05,
                           ClientConnection_LINGER_SECONDS=0.05, RequestBody_FREE_SECONDS=seconds)
        self.start(self.answer_strictly, MAX_TOKENS=10 ** 9, **settings)

    def assert_none_was_smuggled(self, answers):
        """Fails unless each answer of the upstream went to the request that it belongs to."""
        for number, data in enumerate(answers):
            for mark in re.findall(rb"mark-(\d{8})", data or b""):
                if int(mark) < len(answers):  # else it was damaged
                    self.assertEqual(int(mark), number, data)
            for told, body in re.findall(
                    rb"(?i)x-request-id: (\S+)\r\n(?:\S.*\r\n)*\r\n(.*)", data or b""):
                if b'"echo"' in body and b"none" not in body:
                    self.assertIn(told, body)

    def assert_each_was_logged(self, names):
        """Fails unless each request that an upstream got is one line of the log. Returns what was
        sent to an upstream. `names` are the requests' own, or "none"."""
        wait_for(lambda: not self.server.open, "the end of every connection")
        self.proxy.books.log.say("the last line")
        wait_for(lambda: "the last line" in self.lines.text(), "the last line")
        names = Counter(name or "none" for name in names)
        rows = map(json.loads, self.lines.text().splitlines())
        entries = [row for row in rows if row.get("upstream")]
        logged = Counter(
            entry["id"] if entry["id"] in names else "none" for entry in entries)
        self.assertEqual(names - logged, Counter())
        return entries

    def test_requests_of_every_sound_form_are_answered(self):
        self.start_strictly(PATIENCE)
        for data, answered in self.each(zip(Fuzz.GOOD, self.converse(Fuzz.GOOD))):
            self.assertRegex(answered, rb"\AHTTP/1\.1 (100|20[04]) ")
        self.assertEqual(self.stub.faults, [])

    def faulty_answers(self, chance):
        """Returns all statuses that many requests with faults get; checks each answer."""
        statuses = Counter()
        for _ in range(self.size(2, 100)):
            requests = [Fuzz.mutate(chance) for _ in range(100)]
            with self.within(2):
                answers = self.converse(requests)
            self.assert_none_was_smuggled(answers)
            # A caller that did not close its sending side is answered.
            open_ones = list(zip(requests, answers))[::2]
            self.assertEqual([row for row in open_ones if not row[1]], [])
            for data in filter(None, answers):
                found = re.findall(rb"(?:\A|\n|\}|~)HTTP/1\.1 ([0-9]{3}) ", data)
                statuses.update(map(int, found))
        return statuses

    def test_requests_with_random_faults_are_answered_or_closed_and_go_on_only_sound(self):
        self.start_strictly(self.size(0.3, 0.6))
        before = self.left_open()
        statuses = self.faulty_answers(Random(20240229))
        self.assertEqual(self.stub.faults, [])
        self.assertLessEqual(set(statuses), self.ALLOWED)
        self.assertGreater(len(statuses), self.size(0, 5))
        self.assert_nothing_left(before)
        self.assertEqual(self.in_flight(), 0)
        self.assert_each_was_logged([asked.get("x-request-id") for asked in self.stub.requests])
        self.report("%r; %d at the upstream", statuses, self.stub.calls)

    def start_server(self, path, address, *command, **environ):
        """Runs a real server that writes the ids of its requests to this path."""
        server = subprocess.Popen(
            [part % {"port": address[1]} for part in command], cwd=os.path.dirname(path),
            env={**os.environ, "NAMES": path, **environ},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(server.wait)
        self.addCleanup(server.kill)
        wait_for(lambda: self.is_there(address), "the server")

    def assert_sound_before(self, *command, **environ):
        """Has requests with faults go to a real server: fails as before the strict stub, and where
        that server found fault with what it was sent."""
        address = "127.0.0.1", free_port(self.addCleanup)
        path, chance = new_path(self, "names"), Random(14)
        self.start_strictly(self.size(0.3, 0.6), BASE_API_URL="http://127.0.0.1:%d" % address[1])
        self.start_server(path, address, *command, **environ)
        for _ in range(self.size(1, 60)):
            requests = [Fuzz.mutate(chance) for _ in range(100)]
            self.assert_none_was_smuggled(self.converse(requests))
        names = wait_for(lambda: self.names_in(path), "a request that came there")
        entries = self.assert_each_was_logged(names)
        self.report("%d requests came there: %r", len(names), Counter(
            (entry["status"], entry["outcome"]) for entry in entries))
        faults = [entry for entry in entries if entry["outcome"].startswith("upstream")
                  and entry["method"] in Fuzz.METHODS]  # they refuse those that they do not know
        self.assertEqual(faults, [])

    @staticmethod
    def names_in(path):
        with suppress(FileNotFoundError):
            return pathlib.Path(path).read_text("latin-1").splitlines()

    @staticmethod
    def is_there(address):
        with suppress(OSError):
            socket.create_connection(address, PATIENCE).close()
            return True
        return False

    def write_application(self, text, name):
        path = new_path(self, name)
        pathlib.Path(path).write_text(text, "ascii")
        return path

    def python_server(self, name):
        """Returns the folder of an application for it, where it is installed."""
        if not importlib.util.find_spec(name):
            self.skipTest("%s is not installed" % name)
        return os.path.dirname(self.write_application(Fuzz.APPLICATION, "echo_all.py"))

    @tested_once
    def test_nothing_is_smuggled_to_uvicorn(self):
        folder = self.python_server("uvicorn")
        for parser in self.each(filter(importlib.util.find_spec, ("h11", "httptools"))):
            self.assert_sound_before(
                sys.executable, "-m", "uvicorn", "echo_all:asgi", "--port", "%(port)d",
                "--http", parser, PYTHONPATH=folder)

    @tested_once
    def test_nothing_is_smuggled_to_gunicorn(self):
        self.assert_sound_before(
            sys.executable, "-m", "gunicorn", "echo_all:wsgi", "-b", "127.0.0.1:%(port)d",
            "-k", "gthread", "--threads", "8", PYTHONPATH=self.python_server("gunicorn"))

    @tested_once
    def test_nothing_is_smuggled_to_node(self):
        if not shutil.which("node"):
            self.skipTest("node is not installed")
        path = self.write_application(Fuzz.NODE, "echo.js")
        self.assert_sound_before("node", path, "%(port)d")

    def test_a_refusal_among_pipelined_requests_can_be_read_every_time(self):
        self.start(MAX_BODY_BYTES=1000, MAX_TOKENS=10 ** 9)
        large = b"x" * 3000000
        table = ((request("GET", "/health", b"", "Host: other.test"), 400),
                 (request("POST", CHAT, large), 413),
                 (unsized(CHAT, CHUNKED) + chunk(large) + LAST, 413))
        for (refused, status), number in itertools.product(table, range(self.size(10, 100))):
            before, calls = number % 10, self.stub.calls
            with self.subTest(refused=refused[:99], before=before):
                client = self.connect()
                with self.sending(client, call() * before + refused + call() * (9 - before)):
                    found = [client.read().status for _ in range(before)]
                    self.assertEqual(found, [200] * before)
                    self.assert_last_answer(client, status)
                client.close()
                self.assertEqual(self.stub.calls - calls, before)

    def test_a_large_request_sent_ahead_of_an_answer_in_pieces_cuts_neither(self):
        self.start(None, MAX_BODY_BYTES=1000)
        whole, stream = answer(), STREAM + chunk(event(1))
        for first, rest in self.each((
                (stream, chunk(event(2)) + LAST), (whole[:20], whole[20:]),
                (whole[:-3], whole[-3:]))):
            client, large = self.connect(), request("POST", CHAT, b"x" * 3000000)
            with self.sending(client, call(stream=first == stream) + large):
                asked = self.stub.next()
                asked.send(first)
                time.sleep(0.05)  # as much of the large one as ever is read ahead comes meanwhile
                asked.send(rest)
                asked.finish()
                answered = client.read()
                self.assertEqual((answered.status, answered.whole), (200, True))
                self.assert_last_answer(client, 413)

    def drip(self, starts, deadline):
        """Sends each of `starts` on a connection of its own, and then single bytes, until each
        connection was closed with a 408, which must be at the deadline: once a request that came
        after it is answered, none is open."""
        began = time.monotonic()
        waiting = clients = [self.send(start) for start in starts]
        self.ask(HEALTH)  # they were accepted before it
        late = time.monotonic() + deadline + 0.1
        while waiting:
            is_late = time.monotonic() > late
            for client in waiting:
                with suppress(OSError):
                    client.send(b"x")
            time.sleep(0.05)
            self.ask(HEALTH)
            waiting = [client for client in waiting if not client.is_readable()]
            self.assertFalse(is_late and waiting)
            if waiting != clients:
                self.assertGreater(time.monotonic(), began + deadline - 0.05)
        for client in clients:
            self.assert_last_answer(client, 408)

    def test_what_trickles_in_is_closed_at_its_deadline_and_nobody_else_feels_it(self):
        seconds, number = self.size((0.3, 5), (15, 100))
        self.patch_seconds(ClientConnection_HEAD_SECONDS=seconds, RequestBody_FREE_SECONDS=seconds)
        # A body that held a place at the upstream would be missed.
        self.start(MAX_TOKENS=10 ** 9, MAX_CONCURRENCY=1, MAX_QUEUE=0)
        starts = [b"POST /v1/x HTTP/1.1\r\nHost: x\r\nX: ",
                  unsized(CHAT, "Content-Length: 5000"),
                  unsized(CHAT, CHUNKED) + b"1388\r\n"]
        with self.steady_calls() as took:
            self.drip(starts * number, seconds)
        self.assertEqual({asked.body for asked in self.stub.requests}, {chat()})
        self.assertEqual((self.stub.calls, self.in_flight()), (len(took), 0))
        self.assert_left(10 ** 9 - len(took))
        self.report("%d calls meanwhile, p99 %.1f ms", len(took), self.p99_milliseconds(took))


@needs_redis
class ProcessesTest(EnduranceCase):
    """Several processes whose limits are in one Redis."""
    RULES = ("all 1 requests per 365d burst %d; each 1 tokens per 365d burst 1000000;"
             "all 900 running")
    USED = staticmethod(says({"usage": {"prompt_tokens": 10, "completion_tokens": 20}}))

    def setUp(self):
        # What it has said is in its file, before it is said: a kill loses nothing.
        self.redis = RedisServer(self, "--appendonly", "yes", "--appendfsync", "no")

    def launch_all(self, count, room, **settings):
        """Starts so many; `addresses` are theirs."""
        self.addresses, self.processes = [], []
        for _ in range(count):
            self.processes.append(self.serve(
                answer=self.USED, REDIS_URL=self.redis.url, LIMITS=self.RULES % room,
                **settings))
            self.addresses.append(self.address)
            wait_for(lambda: self.ask(HEALTH).json()["limits"]["degraded"] is False)

    def call_all(self, calls, workers):
        """Makes so many calls by so many threads; returns (how many were let in, the seconds that
        each took)."""
        outcomes, seconds = [], []

        def act(number):
            for turn in range(calls // workers):
                client = Client(self.addresses[(number + turn) % len(self.addresses)])
                began = time.monotonic()
                answered = client.exchange(call(max_tokens=5))
                seconds.append(time.monotonic() - began)
                outcomes.append(b"usage" in answered.body and b"limit reached" not in answered.body)
                client.close()
        with threads(partial(act, number) for number in range(workers)):
            pass
        return sum(outcomes), seconds

    def missing(self, room):
        """What each bucket lacks."""
        found = []
        for name in self.redis.ask("KEYS", "*:b:*"):
            level = int(self.redis.ask("GET", name).split()[0])
            found.append((room if b":b::" in name else 1000000) - level)  # that of all has no owner
        return sorted(found)

    def test_as_many_are_let_in_as_there_is_room_for(self):
        for _ in range(self.size(1, 5)):
            self.redis.ask("FLUSHALL")
            self.launch_all(4, 100)
            admitted, seconds = self.call_all(200, 200)
            self.assertEqual(admitted, 100)
            wait_for(lambda: self.missing(100) == [100, 3000], "the balance")
            self.report("4 processes, 200 calls at 100: %d let in, p99 %.1f ms", admitted,
                        self.p99_milliseconds(seconds))
            for process in self.processes:
                process.close()

    def test_redis_may_be_killed_again_and_again(self):
        self.launch_all(3, 100000)
        over, totals, seconds = Event(), [], []

        def load():
            while not over.is_set():
                admitted, took = self.call_all(40, 8)
                totals.append(admitted)
                seconds.extend(took)
        with threads([load]):
            for _ in range(self.size(1, 5)):
                time.sleep(self.size(0.2, 2))
                self.redis.kill()
                wait_for(lambda: all(process.said("goes by its share") for process
                                     in self.processes))
                time.sleep(self.size(0.1, 2))
                self.redis.start()
                wait_for(lambda: all(process.said("is there again") for process in self.processes))
            over.set()
        wait_for(lambda: self.missing(100000) == sorted((sum(totals), 30 * sum(totals))),
                 "the balance of %d calls" % sum(totals))
        self.report("%d calls, p99 %.1f ms, longest %.1f ms", len(seconds),
                    self.p99_milliseconds(seconds), 1000 * max(seconds))


class RedactionCostTest(EnduranceCase):
    """What it costs to look for what must not leave."""
    WORST = """\
        email -> a@b.co
        email -> a@b.b.
        card -> 4111
        card -> 4111111111111112
        card -> 4111111111111111
        iban -> NO9386011117948
        phone -> +49 171 1234567
        ssn -> 078-05-1120
        ip -> 8.8.8.8
        ip -> 1.2.3.4
        ip -> 2a00::1
        secrets -> sk-
        secrets -> eyJ
        secrets -> -----BEGIN PRIVATE KEY-----
        email -> a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a@b.b.b.b.b.b.b
        email -> a-a+a-a-a-a-a-a-a-a-a-a-a-a-a-a-a-a-a-a-a-a-a-a-a-a-a-a@b-b
        card -> \\n
        card -> \\u0040
        card -> \\
        email -> \\\\u0040"""

    def steps(self, kind, text):
        """Returns the seconds that each step of a search takes."""
        took = []
        steps = iter(Redactor([kind]).search(text))
        while True:
            began = cpu_seconds()
            found = next(steps, None)
            took.append(cpu_seconds() - began)
            if found is None:
                return took

    def test_each_step_of_a_search_is_short_and_all_of_them_are(self):
        size = self.size(100_000, 1 << 20)
        for kind, seed in self.each(self.WORST):
            for text in (seed, seed + " "):
                took = self.steps(kind, text * (size // len(text)))
                self.report("%s in %r: %.0f ms, at once %.1f ms", kind, text, 1000 * sum(took),
                            1000 * max(took))
                self.assertLess(max(took), CPU_SECONDS * 4)

    def test_to_tell_an_address_from_a_version_takes_as_long_as_to_find_one(self):
        """It took six times as long."""
        plain, short = [min([sum(self.steps("ip", text * 5000)) for _ in range(5)])
                        for text in ("8.8.8.8 ", "1.2.3.4 ")]
        self.assertLess(short, 4 * plain)

    ANSWERS = (
        (OpenAI(), None, '{"choices": [{"message": {"content": @}}]}'),
        (OpenAI(), SSE,
         'data: {"choices": [{"index": 0, "delta": {"content": @}}]}\n\n'),
        (llm_proxy.Gemini(), llm_proxy.JSON_ARRAY,
         '[{"candidates": [{"content": {"parts": [{"text": @}]}}]}]'))

    def reads(self, dialect, events, data):
        """Returns the seconds that each read of an answer takes, of which all is masked."""
        masks = Masks(Redactor(REDACTED))
        masks.values["[[SECRETS_1]]"] = "-----BEGIN PRIVATE KEY-----\n%s" % ("MIIE" * 3400)
        restorer = Restorer(masks, masks.redactor)
        editor = llm_proxy.Editor(events, llm_proxy.Unmasking(dialect, events, restorer))
        took = []
        for at in range(0, len(data), llm_proxy.BLOCK):
            began = cpu_seconds()
            editor.feed(data[at:at + llm_proxy.BLOCK])
            took.append(cpu_seconds() - began)
        return took

    def test_each_read_of_an_answer_is_gone_through_soon_whatever_it_says(self):
        """Objects of an array were awaited whole, 1 MiB of brackets in one for 7 s."""
        size = self.size(200_000, 1 << 20)
        for seed in self.each(["a@b.co ", "8.8.8.8 ", "[[SECRETS_1]]", "{", "\\"]):
            texts = seed * (size // len(seed)), [seed] * (size // (len(seed) + 4))
            for (dialect, events, shape), said in itertools.product(self.ANSWERS, texts):
                data = shape.replace("@", json.dumps(said)).encode()
                took = self.reads(dialect, events, data)
                self.report("%r: %.0f ms, at once %.1f ms", seed, 1000 * sum(took),
                            1000 * max(took))
                self.assertLess(max(took), CPU_SECONDS * 4)


class FaultsTest(EnduranceCase):
    """Calls that go wrong once they were let in."""

    # -- many connections

    # -- callers that leave

    @staticmethod
    def half_close(client):
        client.sock.shutdown(socket.SHUT_WR)
        client.close()

    def test_whoever_leaves_within_a_metered_body_was_never_heard_of_upstream(self):
        hang_ups = self.half_close, Client.reset
        for number, leave in self.each(enumerate(hang_ups * 2)):
            client = self.connect()
            client.send(call(None, self.EXPECTING, stream=number > 1)[:-5])
            self.assertEqual(client.head().status, 100)  # so its body is awaited
            leave(client)
            with self.within(1):
                self.assert_ending("caller_gone", 1000, number)
        self.assertEqual((self.stub.connections, self.in_flight()), (0, 0))

    def test_when_an_upstream_breaks_off_its_caller_has_every_byte_and_sees_the_cut(self):
        """A FIN makes a body whole that only closing ends (RFC 9112 6.3)."""
        events = [*map(event, range(2000)), b"data: [DONE]\n\n"]
        body, ok = b"".join(events), b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        framings = {
            "chunked": STREAM + b"".join(map(chunk, events)),
            "sized": ok + b"Content-Length: %d\r\n\r\n%b" % (len(body) + 1, body),
            "until close": ok + b"\r\n" + body}
        for framing, hang_up in self.each(framings, (Asked.close, Asked.reset)):
            self.start(None)
            client, asked = self.ask_stub(call(stream=True))
            asked.send(framings[framing])
            client.head()
            if hang_up == Asked.reset:  # some systems drop what stands before a RST
                client.expect(body)
            with self.within(1):
                hang_up(asked)
                answered = client.rest()
            whole = (framing, hang_up) == ("until close", Asked.close)
            self.assertEqual((answered.whole, answered.body == body), (whole, True))
            self.assert_ending("ok" if whole else "upstream_cut", left=999)

    # -- upstreams that break off, or talk nonsense

    OK = b"HTTP/1.1 200 OK\r\n"
    # What an upstream says, | at the end of each line, and what it does then: it closes, resets, or
    # says more of the same. It may be understood as 200 and {}, the connection lasts then or is for
    # once, or as this status and nothing, or is wrong.
    NONSENSE = r"""
        lasts -> $HINTS$HINTS$HINTS$OK$TWO
        lasts -> HTTP/1.1 200|$TWO
        lasts -> HTTP/1.1 200 |$TWO
        lasts -> $OKContent-Length: \t 2 \t||{}
        lasts -> $OKX-A: b\x85X-Injected: evil|$TWO
        lasts -> $CHUNKS2|{}|0|X-Injected: evil||
        once -> $OK$TWOmore
        once -> $OK$TWO$OKContent-Length: 6|X-Injected: evil||poison
        once -> $OKConnection: close|$TWO
        once -> $OKConnection: x, Close|$TWO
        once -> HTTP/1.0 200 OK|$TWO
        once -> $CHUNKS2|{}|0||HTTP/1.1 200
        204 -> HTTP/1.1 204 No|$TWO
        304 -> HTTP/1.1 304 No|$TWO
        once -> $OK|{} -> close
        wrong -> HTTP/1.1 99 No|$TWO
        wrong -> HTTP/1.1 099 No|$TWO
        wrong -> HTTP/1.1 20 OK|$TWO
        wrong -> HTTP/1.1 1000 No|$TWO
        wrong -> HTTP/1.1 OK|$TWO
        wrong -> HTTP/1.1  200 OK|$TWO
        wrong -> HTTP/2.0 200 OK|$TWO
        wrong -> HTTP/2 200 OK|$TWO
        wrong -> 200 OK|$TWO
        wrong -> ICY 200 OK|$TWO
        wrong -> |$TWO
        wrong -> HTTP/1.1 200 OK\rX-Injected: evil|$TWO
        wrong -> HTTP/1.1 302 Found|Location: /x\rX-Injected: evil|$TWO
        wrong -> HTTP/1.1 101 Switching|Upgrade: h2c|Connection: upgrade|$TWO
        wrong -> $OKContent-Length: 3|$TWO
        wrong -> $OKContent-Length: 2|$TWO
        wrong -> $OKTransfer-Encoding: chunked|$TWO
        wrong -> $OKX-A: b\x00c|$TWO
        wrong -> $OKX-A: b| X-Injected: evil|$TWO
        wrong -> $OKX-Injected : evil|$TWO
        wrong -> $OKX-A: b\rX-Injected: evil|$TWO
        wrong -> $OKX-A: b\nX-Injected: evil|$TWO
        wrong -> $OKContent-Type: text/plain\x0bX-Injected: evil|$TWO
        wrong -> $OKContent-Length: +2||{}
        wrong -> $OKContent-Length: 0 2||{}
        wrong -> $OKContent-Length: 2, 2||{}
        wrong -> $OKContent-Length: 99999999999999999999||{}
        wrong -> $CHUNKSXYZ|{}|
        wrong -> $CHUNKS-2|{}|
        wrong -> $CHUNKS2|{}XX0||
        wrong -> $CHUNKS2\n{}\n0\n\n
        wrong -> $CHUNKS10000000000000000|{}
        wrong -> $CHUNKS2|{}|0|X: y\nX-Injected: evil||
        wrong -> HTTP/1.1 200 OK\nContent-Length: 2\n\n{}
        wrong -> $OKTransfer-Encoding: gzip||{}
        wrong -> $OKTransfer-Encoding: gzip, chunked||2|{}|0||
        wrong -> HTTP/1.0 200 OK|Transfer-Encoding: chunked||0||
        wrong -> SSH-2.0-OpenSSH_9.2|
        wrong -> \x15\x03\x03\x00\x02\x02F -> close
        wrong -> <html>It works!</html> -> close
        wrong -> HTTP/1.1 100 Continue|| -> close
        wrong ->  -> close
        wrong ->  -> reset
        wrong -> $OKX-A: b -> close
        wrong -> $OKX-A: b -> reset
        wrong -> $OKContent-Length: 5||{} -> close
        wrong -> $OKContent-Length: 5||{} -> reset
        wrong -> $OK|{} -> reset
        wrong -> $CHUNKS2|{}| -> close
        wrong -> $CHUNKS2|{}|0| -> close
        wrong -> $CHUNKSFFFFFFFFFFFFFFFF|{} -> close
        wrong -> $CHUNKS2; -> xxxx
        wrong -> $CHUNKS2|{}|0| -> X-Injected: evil|
        wrong ->  -> $HINTS
        wrong -> $OK -> X-A: b|
        wrong -> HTTP/1.1 200 OK -> xxxx
        wrong -> $OKX-A: $LONG|$TWO
        wrong -> $OK$MANY$TWO
        wrong -> \x16\x03\x03\x00z\x02||\x03\x00\x01"""
    SHORT = {"$CHUNKS": "$OKTransfer-Encoding: chunked||", "$OK": "HTTP/1.1 200 OK|",
             "$HINTS": "HTTP/1.1 103 Early Hints|X-Injected: evil||",
             "$TWO": "Content-Length: 2||{}", "$LONG": "x" * 70000, "$MANY": "X: y|" * 501}

    @staticmethod
    def say(asked, data, then):
        """Sends `data`, then calls `then`; where `then` is bytes, sends them again and again until
        the proxy hangs up."""
        asked.send(data)
        while isinstance(then, bytes):
            asked.send(then)
        if then:
            then(asked)

    def said(self, text):
        """The bytes of a text of NONSENSE."""
        for short, long in self.SHORT.items():
            text = text.replace(short, long)
        return text.replace("|", "\r\n").encode().decode("unicode_escape").encode("latin-1")

    def nonsense(self):
        """Yields rows of (data and then, as for `say`, expected, whether the connection may carry
        another call); expected is (status, body, whole), or None for a 502 or a cut."""
        acts = {"close": Asked.close, "reset": Asked.reset}
        for kind, text, *then in [row.split(" -> ") for row in rows(self.NONSENSE)]:
            act = acts.get(then[0]) or self.said(then[0]) if then else None
            right = (int(kind), b"", True) if kind.isdigit() else (200, b"{}", True)
            yield self.said(text), act, right if kind != "wrong" else None, kind == "lasts"

    def assert_upstream_error(self, answered):
        self.assertEqual((answered.status, answered.whole), (502, True))
        answered.tells("type", "upstream_error")
        for told in (b"127.0.0.1", b"%d" % self.stub.port):
            self.assertNotIn(told, answered.body)

    def assert_understood(self, answered, expected, stream):
        self.assertNotIn("x-injected", dict(answered.fields))
        self.assertNotIn(b"evil", answered.body)
        if expected:
            self.assertEqual((answered.status, answered.body, answered.whole), expected)
        elif stream and answered.status == 200:
            self.assertFalse(answered.whole)
        else:
            self.assert_upstream_error(answered)

    def test_a_malformed_upstream_is_a_502_or_a_cut_at_once_and_poisons_no_later_call(self):
        """Only a stream may be cut: an answer that is awaited whole has not begun."""
        self.start(MAX_TOKENS=10 ** 6)
        rows = list(itertools.product(self.nonsense(), (False, True)))
        for (data, then, expected, lasting), stream in self.each(rows):
            acts = iter([lambda asked: self.say(asked, data, then),
                         lambda asked: asked.answer(b"the next")])
            self.stub.answer = lambda asked: next(acts)(asked)
            with self.within(1):
                answered = self.ask(call(stream=stream))
            self.assert_understood(answered, expected, stream)
            self.stub.last.over.set()
            self.assertEqual(self.ask(call(stream=stream)).body, b"the next")
            one, other = self.stub.requests[-2:]
            self.assertTrue(lasting or one.sock is not other.sock)
        wait_for(lambda: self.in_flight() == 0)
        self.assert_failed_calls_cost_nothing(2 * len(rows))

    def assert_failed_calls_cost_nothing(self, number):
        entries = wait_for(lambda: len(self.lines.entries()) == number and self.lines.entries())
        failed = [entry for entry in entries if entry["status"] == 502]
        for entry in failed:
            self.assertEqual(entry["outcome"], "upstream_failed")
            self.assertTrue(entry["cause"])
        self.assert_left(10 ** 6 - (number - len(failed)))

    def test_an_answer_to_a_request_that_is_not_taken_whole_is_passed_on(self):
        self.start(None, reads=False)
        self.stub.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        data = call(pad="x" * (4 << 20))  # the sockets' buffers cannot hold all of it
        client, asked = self.ask_stub(data)
        asked.send(answer(b"early"))
        self.assertEqual(client.read().body, b"early")
        client, other = self.ask_stub()
        self.assertIsNot(other.sock, asked.sock)
        other.answer()
        client.answers(200)

    def test_a_signal_to_stop_refuses_callers_at_once_and_lets_every_stream_end(self):
        for number in self.each((signal.SIGTERM, signal.SIGINT)):
            process = self.serve(answer=None, MAX_TOKENS=1000)
            pairs = [self.begin(event(1)) for _ in range(self.size(5, 20))]
            with self.within(0.2):
                process.stop(number)
                wait_for(self.refuses, "the end of listening")
            wait_for(lambda: process.said("stopping"))
            count = self.size(20, 1000)
            for theirs, (_, asked) in enumerate(pairs):
                asked.chunks(*[event(theirs)] * count, end=True)
            for theirs, (client, _) in enumerate(pairs):
                answered = client.rest()
                same = answered.body == event(1) + event(theirs) * count
                self.assertEqual((answered.whole, same), (True, True))
            with self.within(0.5):
                self.assertEqual(process.wait(), 0)
            self.assertFalse(process.said("Traceback"))

    # -- a signal to stop

    def test_streams_that_outlive_the_drain_time_are_cut_so_that_none_looks_whole(self):
        drain = self.size(0.3, 1)
        process = self.serve(answer=None, MAX_TOKENS=1000, DRAIN_SECONDS=drain)
        pairs = [self.begin(event(1)) for _ in range(self.size(5, 20))]

        def go_on():
            for _, asked in pairs:
                with suppress(OSError):
                    asked.chunks(event(1))
        began = time.monotonic()
        with self.within(drain + 1), self.meanwhile(go_on):
            process.stop()
            for client, _ in pairs:
                client.expect_cut()
                self.assertTrue((event(1) * 1000).startswith(client.answered.body))
            self.assertGreaterEqual(time.monotonic(), began + drain)
            self.assertEqual(process.wait(), 0)
        self.assertTrue(process.said("stopped, %d calls cut" % len(pairs)))

    # -- secrets

    KINDS = ("base key", "key", "other key", "wrong key", "header", "prompt", "cookie", "query",
             "tunnel")

    @staticmethod
    def spellings(secret):
        """Returns a secret as it is, escaped, in hexadecimal, and in base64 at each of the three
        places where it may begin; all in lower case."""
        data = secret.encode()
        found = {data, data.hex().encode(), urllib.parse.quote(secret, safe="").lower().encode()}
        found |= {b"".join([form % byte for byte in data]) for form in (b"%%%02x", b"\\u%04x")}
        # The outermost letters of base64 depend on what stands before and behind.
        for shift, first in enumerate((0, 2, 3)):
            text = base64.b64encode(bytes(shift) + data)[first:-4].lower()
            found |= {text, text.translate(bytes.maketrans(b"+/", b"-_"))}
        return found

    def secret_request(self, path=CHAT, *fields, method="POST", key="key", body=None, **payload):
        """Returns a request with as many secrets as it can carry. `path` and `fields` name secrets
        as in %(key)s."""
        escaped = {kind: urllib.parse.quote(one, safe="") for kind, one in self.secrets.items()}
        path += ("&" if "?" in path else "?") + "token=%(query)s"
        fields = ("Cookie: session=%(cookie)s", "Proxy-Authorization: Basic %(cookie)s", *fields)
        if body is None:
            prompt = self.secrets["prompt"]
            body = chat(messages=[{"role": "user", "content": prompt}],
                        contents=[{"parts": [{"text": prompt}]}], **payload)
        return request(method, path % escaped, body, *[row % self.secrets for row in fields],
                       key=key and self.secrets[key])

    def keyed_calls(self, kind):
        """Returns calls with the key of this kind in each place that a key may have."""
        key, ask = "%%(%s)s" % kind, self.secret_request
        gemini = "/v1beta/models/m:generateContent"
        return [ask(key=kind), ask(CHAT + "?key=" + key, key=None),
                ask("/v1/models", method="GET", key=kind, body=b""),
                ask("/v1/messages", "X-Api-Key: " + key, key=None),
                ask(gemini, "X-Goog-Api-Key: " + key, key=None),
                ask(gemini + "?key=" + key, key=None)]

    def secret_calls(self):
        """Returns requests of every kind that ends differently."""
        return [*self.heard_calls(), *self.refused_calls(), *self.malformed_calls()]

    def heard_calls(self):
        """Those that are answered, limited, or fail above."""
        ask = self.secret_request
        return [
            *self.keyed_calls("key"), ask(stream=True),
            ask("/v1/completions", prompt=self.secrets["prompt"]), ask("/v1/files"),
            ask("/health", method="GET", body=b""), ask(max_tokens=10 ** 9),
            ask(stream=True, max_tokens=10 ** 9),
            ask("/v1/messages", "X-Api-Key: %(key)s", key=None, max_tokens=10 ** 9),
            ask(case="echo"), ask(case="nonsense"), ask(case="cut", stream=True),
            ask("/dead/v1/chat/completions"), ask("/dead/v1/files")]

    def refused_calls(self):
        """Those that are refused for their key, or for what they say."""
        ask, prompt = self.secret_request, self.secrets["prompt"]
        basic = base64.b64encode(self.secrets["wrong key"].encode()).decode()
        return [
            *self.keyed_calls("wrong key"), ask(key=None), ask(CHAT, "X-Api-Key: %(wrong key)s"),
            ask("/v1/x?key=%(wrong key)s%%0d%%0aX:", key=None),
            ask(CHAT, "Authorization: Basic " + basic, key=None),
            ask(body=b'{"messages": "' + prompt.encode()), ask(MODEL=prompt),
            ask(body=b'{"a": "%b", "a": 1}' % prompt.encode()), ask(max_tokens=prompt),
            ask(model=[prompt], max_tokens=-1), ask(CHAT, "Content-Encoding: gzip"),
            ask("/health", method="OPTIONS", body=b""), ask("/x", method="TRACE", body=b"")]

    def malformed_calls(self):
        good, wrong = self.secret_request(), self.secrets["wrong key"].encode()
        return [
            good.replace(b"Cookie:", b"X: y\r\n Cookie:"),
            good.replace(b"Cookie", b"Authorization: Bearer %b\r\nCookie" % wrong),
            good.replace(b"Length: ", b"Length: +"), good.replace(b"HTTP/1.1", b"HTTP/3.1"),
            good.replace(b" /v1", b" http://user:%b@proxy.test/v1" % wrong, 1),
            good.replace(b"Content-Length", b"Transfer-Encoding: chunked\r\nX-Length"),
            self.secrets["prompt"].encode() + b"\r\n\r\n"]

    def act_on_secrets(self, asked):
        """Answers with what the endpoint was sent, in any way it can."""
        case = asked.json().get("case") if b'"case"' in asked.body else None
        shown = (asked.get("authorization") or "").encode()
        if case == "echo":
            asked.answer(b'{"error": "you sent %b"}' % shown, "403 Forbidden")
        elif case == "nonsense":
            self.say(asked, self.OK + b"X-Key %b\r\n\r\n%b" % (shown, asked.body), Asked.close)
        elif case == "cut":
            self.say(asked, STREAM + chunk(event(1)), Asked.close)
        else:
            asked.answer(b'{"choices": [{"message": {"content": "fine"}}]}')

    def received_by(self, data):
        """Returns all that a caller receives who sends this."""
        data = data.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        told = read_to_the_end(self.send(data)) or b""
        self.assertTrue(told.startswith(b"HTTP/1.1 "), data)
        return told

    def output_of_a_proxy(self, settings, **ways):
        """Returns all that a proxy answers, logs and stores."""
        folder = new_path(self)
        self.ledger = os.path.join(folder, "ledger")
        self.start(self.act_on_secrets, DATABASE=self.ledger, USAGE_LOG=self.ledger + ".log",
                   TOKEN_COST_MODE="estimate", RESPONSE_TOKEN_RESERVE=1, MAX_TOKENS=10 ** 6,
                   **ways, **settings)
        found = [self.received_by(data) for data in self.secret_calls()]
        asked = b"".join([asked.head + asked.body for asked in self.stub.requests])
        for kind in ("base key", "prompt"):  # so they were there
            self.assertIn(self.secrets[kind].encode(), asked)
        self.ask(call(self.secrets["key"], "X-Request-ID: the-last"))
        self.assert_said("the-last")
        self.close_books()  # which writes the buckets, too
        self.proxy.books.usage_log.stream.close()
        found += [path.read_bytes() for path in pathlib.Path(folder).iterdir()]
        self.assertGreaterEqual(sum(b"the-last" in data for data in found), 2)
        return found + [self.lines.data]

    def output_of_commands(self, settings, dead):
        """Returns what each of the commands prints, and what a process that serves prints."""
        tunnel = "http://user:%(tunnel)s@" % self.secrets
        here = {**settings, "BASE_API_URL": self.new_stub(), "BASE_MODEL": "m"}
        far = {**here, "UPSTREAM_FAR_URL": "https://" + dead, "HTTPS_PROXY": tunnel + dead,
               "UPSTREAM_FAR_KEY": self.secrets["other key"]}
        faulty = {name: value + " \xe4" for name, value in settings.items()}
        faulty.update(UPSTREAM_DEAD_HEADERS="X(Y): " + self.secrets["header"],
                      UPSTREAM_FAR_URL="https://" + dead, HTTPS_PROXY=tunnel + ":x",
                      BASE_API_URL="http://user:%(base key)s@127.0.0.1/v1" % self.secrets)
        processes = [self.command("--check", **far), self.serve(**here)]
        processes[-1].stop()
        ends = [self.finish("--help", **far), self.finish("--check", **faulty),
                self.finish("usage", "--json", DATABASE=self.ledger)]
        ends += [process.finish() for process in processes]
        said = ["".join(end[1:]).encode() for end in ends]
        self.assertNotIn(b"", said)
        return said

    def test_no_secret_is_told_in_any_log_ledger_answer_or_page(self):
        # The + has to be escaped in a URL.
        self.secrets = {kind: "cnry+" + os.urandom(16).hex() for kind in self.KINDS}
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))  # and does not listen
            dead = "127.0.0.1:%d" % bound.getsockname()[1]
            settings = {"BASE_API_KEY": self.secrets["base key"],
                        "PROXY_API_KEYS": "alice=" + self.secrets["key"],
                        "UPSTREAM_DEAD_URL": "http://" + dead,
                        "UPSTREAM_DEAD_KEY": self.secrets["other key"],
                        "UPSTREAM_DEAD_HEADERS": "X-Secret: " + self.secrets["header"]}
            places = self.output_of_a_proxy(settings, LOG_FORMAT="text", LIMIT_REPLY="assistant")
            places += self.output_of_a_proxy(settings, LOG_FORMAT="json", LIMIT_REPLY="error")
            places += self.output_of_commands(settings, dead)
        for (kind, secret), data in itertools.product(self.secrets.items(), places):
            found = [one for one in self.spellings(secret) if one in data.lower()]
            self.assertEqual(found, [], (kind, data))

    # -- ways around a limit

    FORGED = ("X-Forwarded-For: ", "Forwarded: for=", "X-Real-IP: ", "True-Client-IP: ",
              "X-Client-IP: ", "CF-Connecting-IP: ", "X-Forwarded-For: 127.0.0.1, ")
    SPELLINGS = PathsTest.SAME_ENDPOINT + [
        "/openai/deployments/x/chat/completions",
        "/openai/deployments/x/chat/completions?api-version=1", "/base" + CHAT,
        "/base/v1//chat/completions", "/v1/v1/chat/completions", "/api/v1/chat/completions",
        "/v1/beta/chat/completions", "/V1/chat/completionS", "/v1/chat/%43OMPLETIONS",
        CHAT + "%2f%2e", CHAT + "/%00", "/v1/chat%2500/completions", "/v1/%5c/chat/completions",
        CHAT + ";a=1;b=2", CHAT + "%253Bx", "/v1/messages", "/v1/responses", "/v1/embeddings",
        "/v1beta/models/m:generateContent", "/v1/m:STREAMgeneratecontent"]

    @staticmethod
    def at_once(act, number, meanwhile=lambda: None):
        """Runs `act(0)`, `act(1)` ... each in a thread, and `meanwhile` every second."""
        threads = [Thread(target=act, args=(one,), daemon=True) for one in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(1)
                meanwhile()

    def test_no_invented_key_or_forged_address_gets_more_than_the_rule_allows(self):
        self.start(LIMITS="address 5 requests per hour")
        total, limited = self.size(60, 1000), []

        def invent(first):
            client = Client(self.address)
            for count in range(first, total, 8):
                forged = self.FORGED[count % len(self.FORGED)] + "10.1.%d.%d" % divmod(count, 256)
                answered = client.exchange(call("no-%d" % count if count % 3 else None, forged))
                limited.append(b"limit reached" in answered.body)
            client.close()
        self.at_once(invent, 8)
        self.assertEqual((limited.count(False), len(limited)), (5, total))
        client = self.send(call("a") * 20)  # in one segment
        self.assertEqual({client.read().status for _ in range(20)}, {200})
        self.assert_spent(5, 0)
        # The one bucket is that of 127.0.0.1.
        self.assertEqual(len(self.proxy.limits.buckets.levels), 1)

    def test_no_spelling_of_a_path_gets_more_than_the_rule_allows(self):
        """Each is limited, in the assistant's words, or refused."""
        self.start(LIMITS="address 1 requests per hour")
        self.ask()
        body = chat(prompt="x", input="x", contents=[{"parts": [{"text": "x"}]}])
        forged = "X-Forwarded-For: 10.9.9.9"
        for path, version in self.each(self.SPELLINGS, ("1.1", "1.0")):
            answered = self.ask(request("POST", path, body, forged, key="k", version=version))
            self.assertIn(answered.status, (200, 400, 404, 429))
            said = b"limit reached" if answered.status == 200 else b'"error"'
            self.assertIn(said, answered.body)
            self.assert_calls(1)

    def test_nobody_touches_the_bucket_of_a_caller_whose_address_is_spelled_as_a_key(self):
        self.start(MAX_TOKENS=10)
        keys = "127.0.0.1", "address", "address=127.0.0.1", "('address', '127.0.0.1')"
        ways = [call(key) for key in keys]
        ways += [call(None, name + ": 127.0.0.1") for name in ("X-Api-Key", "X-Goog-Api-Key")]
        ways += [request("POST", CHAT + "?%s=127.0.0.1" % name, chat()) for name in ("key", "KEY")]
        ways += [call("mine", row + "127.0.0.1") for row in self.FORGED]
        for data in self.each(ways):
            for _ in range(3):
                self.ask(data)
            self.assert_left(10)
        # The key 127.0.0.1 in its five places shares 10, three keys have 3 calls each, mine 10.
        self.assert_calls(10 + 3 * 3 + 10)
        for row in self.FORGED * 3:  # and a victim cannot be somebody else either
            self.ask(call(None, row + "10.1.2.3"))
        self.assert_spent(29 + 10, 0)

    MAXIMA = b"""1.5 -1.5 1e2 100.0 "1" "" true false [1] {}
        {"x":1} NaN Infinity 1e999 01 +1 0x1 98 2147483648 9223372036854775808 18446744073709551616
        1000000000000000000000000000000""".split()
    NAMES = """MAX_TOKENS Max_Tokens max_Tokens max_to\u212aens max_token\u017f Model MODEL Stream
        STREAM MAX_COMPLETION_TOKENS max_Completion_tokens""".split()
    TWICE = (b'"max_tokens": 1000, "max_tokens": 1', b'"max_tokens": 1, "max_tokens": 1000',
             b'"max_tokens": 1, "max\\u005ftokens": 1000', b'"max_tokens": 1, "max_tokens": null',
             b'"max_tokens": 1, "model": "other"', b'"max_tokens": ' + b"9" * 5000)

    def odd_maxima(self):
        """Returns bodies of calls that ask for more tokens than there are, or are invalid."""
        rows = [b'"%b": %b' % (name, value) for value in self.MAXIMA
                for name in (b"max_tokens", b"max_completion_tokens")]
        whole = chat(max_tokens=1)
        return [
            *[chat()[:-1] + b", " + row + b"}" for row in (*rows, *self.TWICE)],
            *[chat(**{name: 1000}) for name in self.NAMES],
            whole + b"{}", b"[%b]" % whole, b"\xef\xbb\xbf" + whole,
            whole.decode().encode("utf-16"), whole[:-1] + b",}", b"/**/" + whole]

    def test_no_spelling_of_a_maximum_gets_more_than_an_estimate_allows(self):
        """Each is refused (400), or limited as it costs more than there is (429). If the maximum
        were overlooked, each would get in for a token; and an upstream in Go matches names in any
        case, with the long s and the Kelvin sign."""
        self.start(TOKEN_COST_MODE="estimate", MAX_TOKENS=100, RESPONSE_TOKEN_RESERVE=1,
                   LIMIT_REPLY="error")
        for body in self.each(self.odd_maxima()):
            answered = self.post(CHAT, body, key="attacker")
            self.assertIn(answered.status, (400, 429))
            self.assertEqual((self.stub.calls, self.left("attacker")), (0, 100))
        for number, status in self.each("""[[47, 200], [48, 429]]"""):
            self.assert_status(status, call("attacker", max_tokens=number))
            self.assertEqual((self.stub.calls, self.left("attacker"), self.left()), (1, 50, 100))

    # -- all of it at once

    FAULTS = {  # what goes wrong, and what its caller sees
        "refused": 502, "reset": 502, "500": 500, "cut": "cut", "malformed": 502, "slow": "right",
        "fin": "gone", "rst": "gone", "bad": 400, "half, fin": "gone", "half, rst": "gone"}

    @staticmethod
    def words_of(identity):
        """Returns what the endpoint sends to the call of this name alone, up to 35 KB, and a number
        that chooses the framing."""
        digest = hashlib.sha256(identity.encode()).digest()
        times = 1 + int.from_bytes(digest[:2], "big") % 480
        return b"data: %b\n\n" % digest.hex().encode() * times, digest[2]

    def act(self, asked):
        """Answers like an endpoint with every fault that one can have."""
        fault, (body, kind) = asked.json().get("fault"), self.words_of(asked.get("x-request-id"))
        del self.stub.requests[:]
        half = STREAM + chunk(body[:len(body) // 2])
        whole = (
            (self.OK + b"Content-Length: %d\r\n\r\n%b" % (len(body), body), None),
            (STREAM + b"".join(map(chunk, body.splitlines(True))) + LAST, None),
            (self.OK + b"Content-Type: text/event-stream\r\n\r\n" + body, Asked.close))
        faults = {
            "reset": (b"", Asked.reset), "500": (answer(body, "500 Internal Server Error"), None),
            "malformed": (b"HTTP/1.1 2OO OK\r\n\r\n" + body, Asked.close),
            "cut": (half, Asked.close if kind % 2 else Asked.reset),
            "fin": (half, Asked.wait_for_hang_up), "rst": (half, Asked.wait_for_hang_up)}
        if fault == "slow":
            time.sleep(0.05)
        self.say(asked, *faults.get(fault, whole[kind % 3]))

    def soaked_call(self, client, identity, fault):
        """Returns what the caller saw: 'right', 'wrong', 'cut', 'gone', or a status above 200."""
        expected, kind = self.words_of(identity)
        path = "/dead" + CHAT if fault == "refused" else CHAT
        fields = ["X-Request-ID: " + identity] + [self.EXPECTING] * fault.startswith("half")
        data = request("POST", path, chat(fault=fault, stream=kind % 2 == 0), *fields,
                       key=identity.partition(":")[0])
        leave = {"fin": self.half_close, "rst": Client.reset}.get(fault[-3:])
        if fault.startswith("half"):
            assert client.send(data[:-5]).head().status == 100  # so it waits for the body now
            leave(client)
            return "gone"
        if fault == "bad":
            data = data.replace(b"Content-Length: ", b"Content-Length: +")
        answered = client.send(data).head()
        if leave:
            client.expect(expected[:len(expected) // 2])
            leave(client)
            return "gone"
        client.rest()
        if answered.status != 200:
            return answered.status
        if not answered.whole and expected.startswith(answered.body):
            return "cut"
        return "right" if answered.whole and answered.body == expected else "wrong"

    def soak(self, number, end, seen):
        """Calls until `end`. Puts what the caller saw into `seen`, {name of a call: (fault, what
        was seen)}."""
        chance, client = Random(number), None
        for count in itertools.count():
            if time.monotonic() > end:
                break
            fault = chance.choice(sorted(self.FAULTS)) if chance.random() < 0.1 else ""
            identity = "soak-%d:%d" % (number, count)
            try:
                client = client or Client(self.address)
                found = self.soaked_call(client, identity, fault)
            except Exception as reason:
                found = "wrong: %r" % reason
            seen[identity] = fault, found
            if fault or found != "right" or chance.random() < 0.1:
                client = client.close()
            time.sleep(chance.random() * self.size(0, 0.05))  # callers read, too
        if client:
            client.close()

    def logged_calls(self):
        """Returns how often each call was logged, by its name, or 'bad' where it has none."""
        rows = [json.loads(row) for row in self.logged().splitlines(True) if row.endswith("\n")]
        names = [row["id"] if row["path"] else "bad" for row in rows if "outcome" in row]
        summed = re.findall(r"(\d+) more were refused", self.logged())
        return Counter(names + ["bad"] * sum(map(int, summed)))

    def run_soak(self):
        """Returns {name of a call: (fault, what was seen)}, and the MiB after each second."""
        seen, sizes, end = {}, [], time.monotonic() + self.size(0.8, 300)
        self.at_once(lambda number: self.soak(number, end, seen), self.size(8, 50),
                     lambda: sizes.append(self.resident()))
        return seen, sizes

    @tested_once
    def test_a_tenth_of_faults_spoils_no_other_call_and_leaves_nothing_behind(self):
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))  # and does not listen
            dead = "http://127.0.0.1:%d" % bound.getsockname()[1]
            self.launch(self.act, UPSTREAM_DEAD_URL=dead, BREAKER_FAILURES=10 ** 6)
            before = self.left_open()
            seen, sizes = self.run_soak()
            self.assert_nothing_left(before)
        for name, (fault, found) in seen.items():
            self.assertEqual(found, self.FAULTS.get(fault, "right"), (name, fault))
        expected = Counter(
            "bad" if fault == "bad" else name for name, (fault, _) in seen.items())
        wait_for(lambda: sum(self.logged_calls().values()) >= len(seen), "a line for each call")
        self.assertEqual(self.logged_calls(), expected)
        self.assertNotIn("Traceback", self.logged())
        settled = sizes[60:] or [0]  # after a minute
        self.report("%d calls; %.1f MiB, then at most %.1f; descriptors and threads %r",
                    len(seen), settled[0], max(settled), before)
        if self.LONG:
            self.assertLessEqual(max(settled) - settled[0], 10)

    @staticmethod
    def seconds_of_an_event(client, asked):
        began = time.monotonic()
        asked.chunks(event(1))
        client.expect(event(1))
        return time.monotonic() - began

    def test_many_idle_connections_slow_no_stream_and_are_closed_on_time(self):
        number, seconds = self.size((50, 0.3), (1000, ClientConnection.IDLE_SECONDS))
        self.patch_seconds(ClientConnection_IDLE_SECONDS=seconds)
        self.launch(lambda asked: (self.stub.waiting.put(asked), asked.over.wait()),
                    MAX_CONNECTIONS=2000)
        streams = itertools.cycle([self.begin() for _ in range(self.size(5, 50))])
        clients, delays = [self.connect() for _ in range(number)], []
        began = time.monotonic()
        for client in clients:
            client.answers(200, HEALTH)
        late = time.monotonic() + seconds + self.size(8, 1)
        for client in clients:
            while not client.is_readable():
                self.assertLess(time.monotonic(), late)
                delays.append(self.seconds_of_an_event(*next(streams)))
            self.assertGreater(time.monotonic(), began + seconds - 0.1)
            client.expect_close()
        self.report("%d events, p99 %.1f ms", len(delays), self.p99_milliseconds(delays))


class Attacker:
    """A hostile caller that runs in a process of its own: `test_llm_proxy.py --attack` reads the
    name of an attack, a port and seconds from each line of stdin, and prints what it was answered.
    Its first line tells the port of the endpoint that its calls go to, by the path /sink."""
    KEY = "a-key-of-the-attacker"
    EMPTY_KEY = "a-key-that-used-up-its-bucket"
    LARGE = (32 << 20) - 4096
    KINDS = {  # of bodies: what stands before, again and again, and behind
        "pairs": (b'{"model": "m", "messages": [', b'{"":0},', b"0]}"),
        "open": (b"", b"[", b""),
        "brackets": (b'{"model": "m", "messages": [', b"[],", b"0]}"),
        "digits": (b'{"model": "fast", "messages": [', b"9" * 4299 + b",", b"0]}"),
        "text": (b'{"model": "m", "messages": [{"role": "user", "content": "', b"word ", b'"}]}'),
        "lines": (b'{"model": "m", "messages": [{"role": "user", "content": "', b"a\\n", b'"}]}'),
        "picture": (
            b'{"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url",'
            b' "image_url": {"url": "data:image/png;base64,', b"iVBORw0KGgo+", b'"}}]}]}')}
    BODIES = {  # an attack of these: the kind, bytes of each, how many at once, key
        "40 bodies of 2.3 MB of pairs": ("pairs", 2300000, 40, KEY),
        "the same with an empty bucket": ("pairs", 2300000, 40, EMPTY_KEY),
        "400 bodies of 64 KB of pairs": ("pairs", 65000, 400, KEY),
        "64 KB of [[[": ("open", 65000, 1, KEY),
        "2 MB of brackets": ("brackets", 2 << 20, 1, KEY),
        "32 MB of 4,299-digit integers": ("digits", LARGE, 1, KEY),
        "32 MB of text": ("text", LARGE, 1, KEY),
        "8.3 MB of text": ("text", 8_300_000, 1, KEY),
        "3 MB of lines of one letter": ("lines", 2_999_000, 1, KEY),
        "a 32 MB picture": ("picture", LARGE, 1, KEY)}
    SINK = "/sink" + CHAT

    def __init__(self):
        self.seen = Counter()
        self.chance = Random(14)
        self.attacks = {**self.attacks_by_connections(), **self.attacks_by_calls()}

    def attacks_by_connections(self):
        return {
            "nothing": lambda: time.sleep(self.end - time.monotonic()),
            "8,000 wrong keys a second": self.guess,
            "TLS handshakes without end": self.shake_hands,
            "bodies that stop early": lambda: self.hold(
                request("POST", self.SINK, b"x" * 2000000, key=self.KEY)[:-4096], 12),
            "idle connections": lambda: self.hold(b"", 200),
            "heads that stop early": lambda: self.hold(b"POST / HTTP/1.1\r\nX: ", 200),
            "calls that leave": self.leave}

    def attacks_by_calls(self):
        return {
            **{name: partial(self.send_bodies, *row) for name, row in self.BODIES.items()},
            "a full line": lambda: self.at_once(self.ask_many, 30, [call_at("/line" + CHAT)]),
            "a model that fails": lambda: self.at_once(self.ask_many, 2, [
                call(self.KEY, model="broken")]),
            "slow readers": lambda: self.at_once(self.read_slowly, 10),
            "foreign pages and fields": lambda: self.at_once(self.ask_many, 4, [
                call_at(self.SINK, field) for field in self.FIELDS]),
            "malformed requests": lambda: self.at_once(self.send_malformed, 4)}

    FIELDS = ("Origin: http://foreign.test", "Origin: null", "OpenAI-Organization: x",
              "X-Original-URL: /admin", "Remote-User: root", "Cookie: a=b", "X: " + "y" * 60000)

    # -- its process

    def main(self):
        os.nice(10)  # whoever measures comes first

        def answer_late(asked):
            time.sleep(0.5)  # so that what came at once is held at once
            asked.answer(b"x" * (4 << 20) if b'"large": true' in asked.body else b"{}")
            self.sink.requests.clear()
        self.sink = Stub(answer_late)
        print(self.sink.port, flush=True)
        for row in sys.stdin:
            name, port, seconds = json.loads(row)
            self.address, self.end = ("127.0.0.1", port), time.monotonic() + seconds
            self.seen.clear()
            self.attacks[name]()
            print(json.dumps(dict(self.seen)), flush=True)

    # -- attacks

    def connect(self, number=0):
        """From one of several addresses: each may have 256 connections."""
        client = Client(self.address, source="127.0.0.%d" % (2 + number // 128))
        client.sock.settimeout(60)
        return client

    def at_once(self, act, number, *arguments):
        """Has `act(number, *arguments)` called again and again to the end, in so many threads."""
        def run(one):
            while time.monotonic() < self.end:
                self.note(act, one, *arguments)
        FaultsTest.at_once(run, number)

    def note(self, act, *arguments):
        """Counts what an act was answered, or how it failed."""
        try:
            answered = act(*arguments)
            if answered:
                self.seen[answered.status] += 1
        except (Cut, OSError, AssertionError) as failure:
            self.seen[type(failure).__name__] += 1
            time.sleep(0.01)

    def ask_many(self, number, requests):
        client = self.connect(number)
        with closing(client):
            while time.monotonic() < self.end:
                answered = client.exchange(self.chance.choice(requests))
                self.seen[answered.status] += 1
                if answered.get("connection") == "close":
                    break

    def send_bodies(self, kind, size, number, key):
        """Sends bodies of this kind, so many at once."""
        start, part, rest = self.KINDS[kind]
        data = request("POST", self.SINK, start + part * (size // len(part)) + rest, key=key)

        def send(number):
            with closing(self.connect(number)) as client:
                try:
                    client.send(data[:-1])
                    with suppress(threading.BrokenBarrierError):
                        together.wait(20)  # so that all are there when the last byte comes
                    client.send(data[-1:])
                except OSError:
                    together.abort()  # it was refused before
                self.note(client.read)
        while time.monotonic() < self.end:
            together = threading.Barrier(number)
            FaultsTest.at_once(send, number)

    def guess(self):
        """Sends 80 requests each 10 ms, over eight connections, whatever is answered."""
        clients, turn = [], time.monotonic()
        while turn < self.end:
            for place in range(8):
                try:
                    if place == len(clients):
                        clients.append(self.connect())
                        clients[place].sock.setblocking(False)
                    clients[place].sock.send(b"".join(
                        call("wrong-%d" % self.chance.getrandbits(60)) for _ in range(10)))
                    self.seen["sent"] += 10
                    found = clients[place].sock.recv(1 << 18)
                    for status in re.findall(rb"HTTP/1.1 (\d+)", found):
                        self.seen[int(status)] += 1
                except BlockingIOError:
                    pass
                except OSError:
                    clients[place:place + 1] = []
            turn += 0.01
            time.sleep(max(0, turn - time.monotonic()))
        for client in clients:
            client.close()

    def shake_hands(self):
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

        def act(number):
            with closing(self.connect()) as client:
                client.sock.settimeout(2)
                client.sock = context.wrap_socket(client.sock)
                self.seen["handshakes"] += 1
        self.at_once(act, 100)

    def hold(self, data, number):
        """Begins so many requests, and goes on with none."""
        clients = [self.connect(place) for place in range(number)]
        for client in clients:
            with suppress(OSError):
                client.send(data)
        time.sleep(max(0, self.end - time.monotonic()))
        for client in clients:
            client.close()

    def leave(self):
        def act(number):
            with closing(self.connect(number)) as client:
                client.send(call_at(self.SINK, stream=self.chance.random() < 0.5))
                time.sleep(self.chance.random() * 0.2)
                if self.chance.random() < 0.5:
                    client.reset()
        self.at_once(act, 10)

    def read_slowly(self, number):
        with closing(self.connect(number)) as client:
            client.send(call_at(self.SINK, large=True))
            while time.monotonic() < self.end:
                client.sock.recv(1000)
                time.sleep(0.1)

    def send_malformed(self, number):
        with closing(self.connect(number)) as client:
            client.sock.settimeout(1)
            client.send(Fuzz.mutate(self.chance))
            self.seen[len(read_to_the_end(client) or b"") > 0] += 1


def call_at(path, *fields, **payload):
    return request("POST", path, chat(**payload), *fields, key=Attacker.KEY)


class Metronome:
    """An upstream and its callers in one thread: streams with an event each 10 ms. `latest`: the
    seconds that the latest event took, `lag`: by how much it was late itself."""
    PERIOD = 0.01
    STAMP = re.compile(rb"data: (\d{8}\.\d{6})\n\n")

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = "http://127.0.0.1:%d" % self.listener.getsockname()[1]
        self.asked, self.clients = [], {}

    def begin(self, client):
        client.send(request("POST", "/beat" + CHAT, chat(stream=True), key="an-honest-caller-0"))
        asked = None
        while not asked:
            sock, _ = self.listener.accept()
            with suppress(Cut):  # it was the probe at the start
                asked = Asked(sock, Reader(sock))
        asked.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        asked.read_body()
        asked.stream(event(1))
        client.head()
        client.expect(event(1))
        client.sock.setblocking(False)
        self.asked.append(asked)
        self.clients[client.sock.fileno()] = client.sock

    def close(self):
        for sock in (self.listener, *self.clients.values(), *[one.sock for one in self.asked]):
            sock.close()

    def beat(self):
        for asked in self.asked:
            asked.chunks(b"data: %015.6f\n\n" % time.monotonic())

    def read(self, number):
        with suppress(BlockingIOError, ssl.SSLWantReadError):
            data = self.clients[number].recv(1 << 20)
            assert data, "a stream was cut"
            now = time.monotonic()
            for stamp in self.STAMP.findall(data):
                self.latest = max(self.latest, now - float(stamp))

    def run(self, until, look):
        """Goes on until this file can be read, and a second longer; looks at each beat."""
        poll, over, turn = select.poll(), inf, time.monotonic()
        for number in (until, *self.clients):
            poll.register(number, select.POLLIN)
        self.latest = self.lag = 0
        while turn < over:
            self.beat()
            look()
            turn += self.PERIOD
            while time.monotonic() < turn:
                for number, _ in poll.poll(max(0, 1000 * (turn - time.monotonic()))):
                    if number == until:
                        poll.unregister(until)
                        over = time.monotonic() + 1
                    else:
                        self.read(number)
            self.lag = max(self.lag, time.monotonic() - turn)


class HostileTest(EnduranceCase):
    """Honest callers beside hostile ones, for `--soak` alone."""
    STREAMS = 20
    LATEST = 0.05 if CPYTHON else 0.1  # seconds
    MEMORY = 300  # MiB
    SECONDS = 30  # of attacks at random
    KEYS = ["an-honest-caller-%d" % number for number in range(10)]
    # Has the product write down each callback that held its loop for longer than any before.
    MEASURING = """
import asyncio, os, sys, time
sys.path.insert(0, os.environ["FOLDER"])
import llm_proxy
longest = 0
def measure(kind, name):
    run = getattr(kind, name)
    setattr(kind, name, lambda *them: timed(run, *them))
def timed(run, one, *events):
    global longest
    text, began = str(getattr(one, "_callback", one)), time.thread_time()
    run(one, *events)
    took = time.thread_time() - began
    if took > longest:
        longest = took
        with open(os.environ["LONGEST"], "w") as file:
            file.write("%.4f %s" % (took, text))
measure(asyncio.events.Handle, "_run")
measure(llm_proxy.Stream, "on_readable")
measure(llm_proxy.Stream, "flush")
sys.exit(llm_proxy.main())
"""
    RULES = ("key:empty 1 requests per month; each 1 requests per month burst 100000000;"
             "all 1 tokens per month burst 100000000000")

    def setUp(self):
        if not self.LONG:
            self.skipTest("it takes minutes: --soak")

    def start_attacker(self):
        self.attacker = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--attack"], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.addCleanup(self.attacker.communicate)
        self.addCleanup(self.attacker.kill)
        return "http://127.0.0.1:" + self.attacker.stdout.readline().strip()

    def attack(self, name, seconds):
        self.attacker.stdin.write(json.dumps([name, self.address[1], seconds]) + "\n")
        self.attacker.stdin.flush()

    def answered(self):
        """Returns what the attack that runs was answered, when it is over."""
        return json.loads(self.attacker.stdout.readline())

    def serve_both(self, sink, **settings):
        keys = ["honest%d=%s" % row for row in enumerate(self.KEYS)]
        keys += ["evil=" + Attacker.KEY, "sk=sk-1", "empty=" + Attacker.EMPTY_KEY]
        process = self.serve(**{
            "UPSTREAM_SINK_URL": sink, "UPSTREAM_LINE_URL": sink,
            "UPSTREAM_LINE_MAX_CONCURRENCY": 2, "MODEL_ALIASES": "fast=m",
            "PROXY_API_KEYS": ",".join(keys), "LIMITS": self.RULES,
            "LOG_FORMAT": "json", **settings})
        self.pid = process.process.pid
        self.ask(call(Attacker.EMPTY_KEY))  # which is all that this bucket held
        return process

    def begin_streams(self, sink, **settings):
        """Returns a Metronome whose streams go through a new proxy."""
        metronome = Metronome()
        self.addCleanup(metronome.close)
        self.longest = new_path(self, "longest")
        return metronome, self.serve_both(
            sink, UPSTREAM_BEAT_URL=metronome.url, program=self.MEASURING, FOLDER=FOLDER,
            LONGEST=self.longest, **settings)

    def test_no_request_makes_the_events_of_others_late_or_fills_the_memory(self):
        sink, path = self.start_attacker(), pem_file(self)
        self.context = ssl.create_default_context(cafile=path)
        rows = dict.fromkeys(("nothing", *Attacker.BODIES, "8,000 wrong keys a second"),
                             (self.connect, {}))
        rows["TLS handshakes without end"] = self.connect_tls, {"TLS_CERT_FILE": path}
        faults = []
        for number, (name, (connect, settings)) in enumerate(rows.items()):
            metronome, process = self.begin_streams(sink, **settings)
            for _ in range(self.STREAMS):
                metronome.begin(connect())
            memory = self.MEMORY if 0 < number < 4 else inf
            faults += self.measure(metronome, name, memory)
            process.stop(signal.SIGKILL).wait()
        self.assertEqual(faults, [])

    def measure(self, metronome, name, memory, seconds=5):
        """Yields what is wrong with the events beside an attack, or with the memory."""
        before, sizes = self.resident(), []
        self.attack(name, seconds)
        metronome.run(self.attacker.stdout.fileno(), lambda: sizes.append(self.resident()))
        longest, callback = pathlib.Path(self.longest).read_text().split(" ", 1)
        self.report("%-30s latest event %6.1f ms (own lag %4.1f), longest callback %5.1f ms of CPU;"
                    " MiB %5.1f, %6.1f, %6.1f; %r", name, 1000 * metronome.latest,
                    1000 * metronome.lag, 1000 * float(longest), before, max(sizes),
                    self.resident(), self.answered())
        # A busy machine makes the metronome itself late, and all others.
        late = metronome.latest - metronome.lag if metronome.lag < self.LATEST / 2 else 0
        if max(late, float(longest)) > self.LATEST:
            yield "%s: an event took %.0f ms, %s %.0f ms of CPU" % (
                name, 1000 * metronome.latest, callback, 1000 * float(longest))
        if max(sizes) > memory:
            yield "%s: %.0f MiB" % (name, max(sizes))

    # -- many attacks at random

    def answer_honestly(self, asked):
        """Answers each call by its own name, streams and others; notes how long that took."""
        began, name = time.monotonic(), asked.get("x-request-id") or ""
        del self.stub.requests[:]
        if b'"broken"' in asked.body:
            return asked.answer(b"{}", "503 Busy")
        body, stream = self.words_of(name)
        data = STREAM + b"".join(map(chunk, body.splitlines(True))) + LAST if stream else \
            answer(body)
        self.took[name] = time.monotonic() - began
        asked.send(data)
        asked.finish()

    @staticmethod
    def words_of(name):
        """Returns what is sent to the call of this name alone, and whether as a stream."""
        body, kind = FaultsTest.words_of(name)
        return body + b"data: [DONE]\n\n", kind % 2 == 1

    def ask_honestly(self, number):
        """Makes a call each 50 ms to the end; notes those that went wrong, and the seconds to the
        first byte that the proxy added."""
        client, chance = self.connect(), Random(number)
        for count in itertools.count():
            if time.monotonic() > self.end:
                return
            name = "honest-%d:%d" % (number, count)
            body, stream = self.words_of(name)
            began = time.monotonic()
            try:
                client.send(call(self.KEYS[number], "X-Request-ID: " + name, stream=stream))
                client.head()
                took = time.monotonic() - began - self.took.pop(name, 0)
                self.added[self.running].append(took)
                answered = client.rest()
                found = answered.status, answered.whole, answered.body == body
            except Exception as failure:
                found, client = repr(failure), self.connect()
            if found != (200, True, True):
                self.wrong.append((name, found))
            until = time.monotonic() + chance.random() * 0.1
            time.sleep(max(0, until - time.monotonic()))  # callers read, too
            self.lags.append(time.monotonic() - until)

    def run_attacks(self):
        """Has attacks follow at random to the end, each once before any comes again."""
        chance, seconds = Random(14), min(5, self.SECONDS / 40)
        names = [name for name in Attacker().attacks if name not in (
            "nothing", "TLS handshakes without end")]
        rounds = (chance.sample(names, len(names)) for _ in itertools.count())
        for self.running in itertools.chain.from_iterable(rounds):
            left = self.end - time.monotonic()
            if left < 0:
                return
            self.attack(self.running, min(seconds, max(0.1, left)))
            self.answered()

    # Of what was freed the C library keeps up to 64 MiB, and gives that back sooner or later.
    GIVES_BACK = "env", "MALLOC_TRIM_THRESHOLD_=131072"

    def test_every_honest_call_is_right_beside_attacks_at_random_and_the_books_balance(self):
        sink, path = self.start_attacker(), new_path(self, "llm_proxy.db")
        self.took, self.wrong, self.lags, sizes = {}, [], [], []
        self.added, self.running = defaultdict(list), "nothing"
        process = self.serve_both(
            sink, answer=self.answer_honestly, DATABASE=path, before=self.GIVES_BACK)
        self.end = time.monotonic() + self.SECONDS
        acts = [partial(self.ask_honestly, number) for number in range(10)]
        acts.append(self.run_attacks)
        FaultsTest.at_once(lambda number: acts[number](), len(acts),
                           lambda: sizes.append(self.resident()))
        self.assertEqual(process.stop().wait(), 0)
        self.assert_books_balance(path)
        self.assertEqual(self.wrong[:3], [])
        self.assertFalse(process.said("Traceback"))
        self.assert_memory_stays(sizes)
        added = self.p99_added()
        if self.p99_milliseconds(self.lags) < 20:  # else the machine is busy: all are late
            self.assertLess(added, 50)

    def p99_added(self):
        for name, seconds in self.added.items():
            self.report("%-30s p99 of what was added %6.1f ms, latest %6.1f ms, %d calls", name,
                        self.p99_milliseconds(seconds), 1000 * max(seconds), len(seconds))
        added = list(itertools.chain(*self.added.values()))
        p99 = self.p99_milliseconds(added)
        self.report("%d calls, p99 %.1f ms, own lag %.1f ms", len(added), p99,
                    self.p99_milliseconds(self.lags))
        return p99

    def assert_memory_stays(self, sizes):
        """From when each attack has come once."""
        fifth = len(sizes) // 5
        floors = [min(sizes[place:place + fifth]) for place in (2 * fifth, 4 * fifth)]
        self.report("MiB at most %.1f, at least %.1f and at last %.1f", max(sizes), *floors)
        self.assertLess(floors[1] - floors[0], 30)

    def assert_books_balance(self, path):
        charged = BalanceTest.charged(LedgerCase.rows(path))
        rules = read_config({"BASE_API_URL": "http://x", "LIMITS": self.RULES}).limits
        capacities = {rule.text: rule.capacity for rule in rules}
        with closing(Database(path, reading=True).connection) as connection:
            rows = connection.execute("SELECT rule, level FROM buckets").fetchall()
        missing = [(rule, capacities[rule] - level) for rule, level in rows]
        self.assertEqual(sorted(missing), sorted(
            (rule, amount) for (rule, _), amount in charged.items() if amount))


if __name__ == "__main__":
    if "--attack" in sys.argv:
        Attacker().main()
    elif "--soak" in sys.argv:
        EnduranceCase.LONG = True
        BalanceTest.CALLS = 40
        UnmaskingTest.RANDOM_STREAMS = 20_000
        names = ["UnmaskingTest", "BalanceTest", "BalanceInRedisTest", "ProcessesTest", "DoorTest",
                 "FaultsTest", "HostileTest"]
        if "long" in sys.argv:
            HostileTest.SECONDS = int((sys.argv + ["1800"])[sys.argv.index("long") + 1])
            names = [name for name in dir(HostileTest) if name.startswith("test_every_honest_call")]
            names = ["HostileTest." + name for name in names]
        unittest.main(argv=sys.argv[:1] + names, verbosity=2)
    else:
        unittest.main()
