#!/usr/bin/env python3
"""llm_proxy: one file that lets many people share an LLM endpoint fairly, and loses no token it streams.

    BASE_API_URL=http://127.0.0.1:8000/v1 python llm_proxy.py  # point OpenAI clients at http://HOST:8899/v1
    python llm_proxy.py --demo                                 # no endpoint at hand? this brings its own

It needs Python 3.9 or newer and nothing else. `--help` lists every setting.

One call, from its first byte to its last:

    caller ──> Handler ──> Proxy.serve ── identify ── route ── admit ── forward ── settle ──> one Entry
               strict      (the story     who is      where    any      to the     what it    in the log
               HTTP        of this file)  asking?     to?      room?    upstream   cost
    caller <── Relay <───────────────────────────────────────────────── upstream   chunk by chunk, unchanged

The words used here, one meaning each:

    Call      one request, understood: which endpoint and model, streamed or not, its payload
    Caller    who asks: a key or an address
    Dialect   the only place that knows an API's wire names: paths, prompt text, limit replies, errors
    Hold      tokens set aside for one call over all its buckets; ends exactly one way: settled or given back
    Upstream  where calls go: a name, a key, one or more addresses that can do the same
    Address   one of those: its spare connections, and a breaker that keeps calls from it while it fails
    Watch     the look-out for a caller's leaving, in every wait for its upstream
    Slot      a call's place at a busy upstream: in the line first, then among those that run
    Answer    what came back: status, headers, a body that is still arriving
    Usage     what a call used: input, cached, output, reasoning tokens; `estimated` when nobody told us
    Refusal   why not: raised at any depth, rendered in one place, in the caller's dialect
    Reply     the way back to the caller: begin, write, end, refuse
    Entry     what is written down of a call: filled on the way, recorded once, whatever the ending

Contents, in reading order; a section uses only what stands above it:

    Config      every setting, its default, its check, its line of help
    Refusals    every way to say no
    Callers     credentials -> Caller
    Limits      rules, buckets and holds
    Usage       tokens, prices, the estimate before and the cost after
    Dialects    the wire names of every API, limit replies, what answers tell of usage
    Wire        strict HTTP/1.1: heads, framing, connections, waiting for two sockets at once
    Relay       one thread that runs calls and carries bodies, and waits for sockets alone
    Line        the slots of a busy upstream, and the fair line before them
    Upstreams   addresses and their breakers, connections, answers; which call goes where
    Books       entries, the access log and the ledger
    Proxy       serve: the life of one call; build: the parts list
    Pages       health and models
    Handler     HTTP on the caller's side; in which thread a call goes on
    Server      threads, caps, draining
    Demo        a small endpoint to try things on
    Commands    the command line
"""
import _thread
import argparse
import base64
import collections
import contextlib
import copy
import csv
import ctypes
import decimal
import difflib
import errno
import fnmatch
import functools
import gc
import hashlib
import hmac
import http.client
import http.server
import ipaddress
import itertools
import json
import math
import os
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
import sys
import threading
import time
import traceback
import types
import urllib.parse
import urllib.request
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

VERSION = "0.1.0"


# ------------------------------------------------------------------------------------------------------------
# Config: one table of settings feeds the values, the checks, --help and the test that README names every one.
# It knows nothing of what the settings are used for, and it is the only place that reads their text.
# ------------------------------------------------------------------------------------------------------------

class Setting(NamedTuple):
    """One row of SETTINGS. `read` turns text into a value; its ValueError says what would be right ("must be
    ...")."""
    name: str
    default: Optional[str]
    read: Callable[[str], Any]
    sentence: str
    secret: bool = False


class Endpoint(NamedTuple):
    """A base URL, taken apart. `path` has no trailing slash and may be empty."""
    scheme: str
    host: str
    port: int
    path: str

    @property
    def origin(self) -> str:
        host = "[%s]" % self.host if ":" in self.host else self.host
        usual = {"http": 80, "https": 443}[self.scheme] == self.port
        return "%s://%s%s" % (self.scheme, host, "" if usual else ":%d" % self.port)


def whole(least: int, most: int) -> Callable[[str], int]:
    """A whole number; int() alone would also take '+5', '1_0' and ' 5 '."""
    def read(text):
        if re.fullmatch("[0-9]{1,15}", text) and least <= int(text) <= most:
            return int(text)
        raise ValueError("must be between %d and %d" % (least, most))
    return read


def seconds(least: float, most: float) -> Callable[[str], float]:
    def read(text):
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", text) and least <= float(text) <= most:
            return float(text)
        raise ValueError("must be a number of seconds between %g and %g" % (least, most))
    return read


def choice(*words: str) -> Callable[[str], str]:
    def read(text):
        if text in words:
            return text
        raise ValueError("must be " + " or ".join(words))
    return read


def line(text: str) -> str:
    if text.isprintable():
        return text
    raise ValueError("must be one line of printable text")


def host(text: str) -> str:
    return line(text).strip("[]")


def credential(text: str) -> str:
    if re.fullmatch("[!-~]+", text):
        return text
    raise ValueError("must be visible ASCII without spaces")


def endpoint(text: str) -> Endpoint:
    match = re.fullmatch(
        r"(https?)://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?"
        r"((?:/[A-Za-z0-9._~%@:+-]*)*)", text)
    if match and 0 < int(match[3] or 1) < 65536:
        port = int(match[3] or {"http": 80, "https": 443}[match[1]])
        return Endpoint(match[1], match[2].strip("[]"), port, match[4].rstrip("/"))
    raise ValueError("must be http://HOST[:PORT][/PATH] or https://..., without user, query or fragment")


def endpoints(text: str) -> List[Endpoint]:
    found = [endpoint(part.strip()) for part in text.split(",")]
    if len(set(found)) < len(found):
        raise ValueError("must not name the same address twice")
    return found


def networks(text: str) -> List[Any]:
    """'10.0.0.0/8, ::1' -> the networks."""
    try:
        found = [ipaddress.ip_network(part.strip()) for part in text.split(",")]
        return [ipaddress.ip_network((int(one[0]) & 0xffffffff, one.prefixlen - 96))
                if one.version == 6 and one.prefixlen >= 96 and one[0].ipv4_mapped else one for one in found]
    except ValueError:
        raise ValueError("must be addresses or networks such as 10.0.0.0/8 or ::1, separated by commas") from None


NEVER_SET = re.compile(r"(?i)host|content-length|transfer-encoding|connection|te|trailer|upgrade|expect|keep-alive")
MEANT_OTHERWISE = re.compile(
    NEVER_SET.pattern + r"|origin|cookie2?|user-agent|accept(-.*)?|content-.*|authorization|proxy-.*|access-control-.*"
    r"|anthropic-.*|openai-.*|x-(goog-)?api-key|x-request-id|x-forwarded-for|x-llm-proxy-.*")


def field_name(text: str) -> str:
    if re.fullmatch("[A-Za-z0-9-]{1,64}", text) and not MEANT_OTHERWISE.fullmatch(text):
        return text.lower()
    raise ValueError("must be the name of a header field that means nothing else")


def pairs(text: str, right: str) -> Dict[str, str]:
    """'a=b, c=d' -> {'a': 'b', 'c': 'd'}; `right` says what would be."""
    found = [tuple(word.strip() for word in part.partition("=")[::2]) for part in text.split(",")]
    if len(dict(found)) < len(found) or not all(name and value for name, value in found):
        raise ValueError(right)
    return dict(found)


def weights(text: str) -> Dict[str, int]:
    """'alice=3, bob=2' -> {'alice': 3, 'bob': 2}."""
    right = "must be name=weight, separated by commas, each name once, weights from 1 to 999"
    found = pairs(text, right)
    if not all(re.fullmatch("[1-9][0-9]{0,2}", weight) for weight in found.values()):
        raise ValueError(right)
    return {name: int(weight) for name, weight in found.items()}


def pem_file(text: str) -> str:
    try:
        with open(text, "rb") as file:
            if b"-----BEGIN " in file.read(1 << 20):
                return text
    except (OSError, ValueError):
        pass
    raise ValueError("must be a PEM file that can be read")


def globs(text: str) -> Tuple[str, ...]:
    """'gpt-*, o3' -> ('gpt-*', 'o3')."""
    found = tuple(part.strip() for part in text.split(","))
    if all(re.fullmatch("[!-+.-~-]+", part) for part in found):
        return found
    raise ValueError("must be models such as gpt-*, separated by commas, none empty")


def aliases(text: str) -> Dict[str, str]:
    """'fast=gemma4, smart=gpt-5' -> {'fast': 'gemma4', 'smart': 'gpt-5'}."""
    right = "must be alias=model, separated by commas, each alias once"
    found = pairs(text, right)
    if not all((name + model).isprintable() for name, model in found.items()):
        raise ValueError(right)
    if not found.keys().isdisjoint(found.values()):
        raise ValueError("must not make an alias of an alias")
    return found


def header_lines(text: str) -> Dict[str, str]:
    """'Name: value | Name: value' -> {'name': 'Name: value'}."""
    found = {}
    for part in text.split("|"):
        name, colon, value = part.strip().partition(":")
        if not (colon and re.fullmatch("[A-Za-z0-9_-]+", name) and re.fullmatch("[ -~]*", value)
                and not NEVER_SET.fullmatch(name)):
            raise ValueError("must be 'Name: value', several with | between, and nothing that frames a message")
        found[name.lower()] = "%s: %s" % (name, value.strip())
    return found


def ca_file(text: str) -> str:
    try:
        ssl.create_default_context(cafile=text)
    except (OSError, ValueError):
        raise ValueError("must be a file of certificates in PEM that can be read") from None
    return text


class Tunnel(NamedTuple):
    """A proxy on the way out; `fields` are shown to it alone."""
    host: str
    port: int
    fields: Dict[str, str]


def tunnel(text: str) -> Tunnel:
    match = re.fullmatch(r"(?:http://)?(?:([!-.0-~]*)@)?([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?/?", text)
    if not match or not 0 < int(match[3] or 80) < 65536:
        raise ValueError("must be http://[USER:PASSWORD@]HOST[:PORT]")
    user = base64.b64encode(urllib.parse.unquote(match[1] or "").encode()).decode()
    return Tunnel(match[2].strip("[]"), int(match[3] or 80),
                  {"Proxy-Authorization": "Basic " + user} if user else {})


def proxy_keys(text: str) -> Dict[str, Optional[str]]:
    """'alice=sk-1, sk-2' -> {'sk-1': 'alice', 'sk-2': None}. What stands before the first '=' is a name if it
    can be one."""
    keys = {}
    for part in text.split(","):
        match = re.fullmatch(r"(?:([A-Za-z0-9_.@-]{1,64})=)?(?!=*$)([!-~]+)", part.strip())
        if not match or (match[1] is None and "=" in match[2]):
            raise ValueError("must be keys or name=key, separated by commas, none empty;"
                             " a key with = in it needs a name")
        if match[2] in keys:
            raise ValueError("must not name the same key twice")
        keys[match[2]] = match[1]
    return keys


def origins(text: str) -> Tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(","))
    if found in (("*",), ("off",)) or all(
            re.fullmatch("[a-z][a-z0-9+.-]*://[!-+.-~]+", origin) for origin in found):
        return () if found == ("off",) else found
    raise ValueError("must be *, off, or origins such as https://chat.example.org separated by commas")


def affinity(text: str) -> Optional[int]:
    """-> a CPU number, -1 for 'auto', None for 'off'."""
    if text in ("auto", "off"):
        return -1 if text == "auto" else None
    if re.fullmatch("[0-9]{1,4}", text):
        return int(text)
    raise ValueError("must be auto, off or the number of a CPU")


PICODOLLARS = 10 ** 12  # money is counted in whole ones: a price of $0.000001 per million tokens is one a token
UNITS = ("requests", "tokens", "input_tokens", "output_tokens", "usd", "estimate")
DURATIONS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800, "month": 2592000,
             "s": 1, "m": 60, "h": 3600, "d": 86400}
SCOPE = re.compile(r"each|all|address|(?:key|model|upstream):[^\s,]{1,200}")


class Rule(NamedTuple):
    """One limit, as a kind of bucket: it holds `capacity`, gains `refill` every `interval` seconds; the
    capacity is None where the rule says `unlimited`. `scopes` are (kind, glob) pairs, `unit` is an index into
    UNITS, and `rate` is what the rule allows in which time, for people. Rules of one `family` are
    alternatives."""
    text: str
    scopes: Tuple[Tuple[str, str], ...]
    unit: int
    capacity: Optional[int]
    refill: int
    interval: float
    rate: Tuple[int, int]
    family: Tuple[Any, ...] = ()


def rules(text: str) -> List[Rule]:
    """'SCOPE AMOUNT UNIT per DURATION [burst N]', by semicolons or lines."""
    found = [rule(" ".join(part.split())) for part in re.split("[;\n]", text) if part.strip()]
    texts = [one.text for one in found]
    if not found:
        raise ValueError("must hold at least one rule such as 'each 60 requests per minute'")
    if len(set(texts)) < len(texts):
        raise ValueError("must not hold the same rule twice")
    return found


def rule(text: str) -> Rule:
    def fault(word, right):
        return ValueError("must be rules such as 'each 60 requests per minute'; in '%s' %s should be %s"
                          % (text, "the word '%s'" % word if word else "the end", right))

    words = text.split(" ") + [""] * 7
    scopes = tuple(part.partition(":")[::2] for part in words[0].split(","))
    kinds = ["caller" if kind in ("each", "key") else kind for kind, _ in scopes]
    for part in words[0].split(","):
        if not SCOPE.fullmatch(part):
            raise fault(part, "each, all, address, key:GLOB, model:GLOB or upstream:GLOB")
    if len(set(kinds)) < len(kinds) or ("all" in kinds and set(kinds) - {"all", "model", "upstream"}):
        raise fault(words[0], "scopes that can be joined")
    if words[2] not in UNITS[:5]:
        raise fault(words[2], "requests, tokens, input_tokens, output_tokens or usd")
    scale, shape = (PICODOLLARS, r"[0-9]{1,6}(\.[0-9]{1,6})?") if words[2] == "usd" else (1, "[0-9]{1,12}")
    if words[5] not in ("", "burst") or any(words[7:]):
        raise fault(words[5] if words[5] != "burst" else words[7], "burst N or the end")
    amounts = []
    for word in [words[1]] + ([words[6]] if words[5] else []):
        good = re.fullmatch(shape, word) and decimal.Decimal(word) > 0
        if not good and (word != "unlimited" or amounts):
            raise fault(word, "an amount above 0" + ("" if amounts else ", or unlimited"))
        amounts.append(int(decimal.Decimal(word) * scale) if good else None)
    if words[3] != "per":
        raise fault(words[3], "per")
    length = re.fullmatch("(second|minute|hour|day|week|month)|([1-9][0-9]{0,5})([smhd])", words[4])
    if not length:
        raise fault(words[4], "second, minute, hour, day, week, month or such as 30s, 5m, 12h, 7d")
    seconds_long = DURATIONS[length[1] or length[3]] * int(length[2] or 1)
    family = (tuple(sorted(kinds)), words[2], seconds_long)
    amount = amounts[0] or 1
    refill = max(1, amount // (seconds_long * 1000))  # a step of a millisecond or more: clocks are no finer
    return Rule(text, scopes, UNITS.index(words[2]), amounts[-1] if amounts[0] else None, refill,
                seconds_long * refill / amount, (amounts[0] or 0, seconds_long), family)


class Price(NamedTuple):
    """Picodollars a token. `cache_read` and `cache_write` are for the parts of the input that a cache gave or
    took."""
    input: int
    output: int
    cache_read: int
    cache_write: int


def price(cost: Any) -> Price:
    """{input, output, cache_read, cache_write}, each in USD per million tokens; a cached token costs what
    another one does where nothing else is said."""
    values = [cost.get(name, cost.get("input")) for name in ("input", "output", "cache_read", "cache_write")]
    if "output" not in cost:
        values[1] = 0
    if not all(isinstance(value, (int, decimal.Decimal)) and 0 <= value < 10 ** 6 for value in values):
        raise ValueError("not a price")
    return Price(*[int((value * 10 ** 6).quantize(1) if isinstance(value, decimal.Decimal) else value * 10 ** 6)
                   for value in values])


MAKERS = ("openai", "anthropic", "google", "deepseek", "mistral", "xai")


def price_file(path: str) -> Dict[str, Price]:
    """models.dev's api.json, {provider: {models: {id: {cost: {...}}}}}, or {model glob: {input, output, ...}};
    -> {glob: Price}."""
    try:
        with open(path, encoding="utf-8") as file:
            table = json.load(file, parse_float=decimal.Decimal)
        if any("models" in row for row in table.values()):
            makers = sorted(table, key=lambda provider: provider not in MAKERS)
            rows = [(name, model["cost"]) for provider in makers for name, model in table[provider]["models"].items()
                    if "cost" in model]
            # many sell a model under the same name, some for nothing: its maker's price counts, else the first
            table = dict(reversed([row for row in rows if any(price(row[1]))] or rows))
            table = {**dict(rows), **table}
        return {name: price(cost) for name, cost in table.items()}
    except OSError as failure:
        raise ValueError("must be a file that can be read: %s" % failure.strerror) from None
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        raise ValueError("must be a JSON file of prices, as models.dev has it or as {model: {input, output}}"
                         ) from None


DEFAULT_DATABASE = "llm_proxy.db"

SETTINGS = {
    "Where calls go": (
        Setting("BASE_API_URL", None, endpoints,
                "the endpoint, or several addresses of it by commas; its path replaces a leading /v1 of the call's"),
        Setting("BASE_API_KEY", None, credential,
                "the endpoint's key, sent in the header of each call's API; callers never see it", secret=True),
        Setting("BASE_MODEL", None, line, "replaces the model that metered calls ask for"),
        Setting("MODEL_ALIASES", None, aliases, "other names of models, as alias=model by commas"),
        Setting("UPSTREAM_ORDER", None, globs, "named upstreams in the order in which they are tried, by commas"),
        Setting("OPEN_TIMEOUT", "10", seconds(0.1, 3600), "seconds to connect to an upstream"),
        Setting("FIRST_BYTE_TIMEOUT", None, seconds(0.1, 86400),
                "seconds to wait for the first byte of its answer; unset: READ_TIMEOUT"),
        Setting("READ_TIMEOUT", "600", seconds(0.1, 86400), "seconds to wait between its bytes"),
        Setting("MAX_CALL_SECONDS", "0", seconds(0, 10 ** 6), "seconds after which a call is cut; 0: never"),
        Setting("BREAKER_FAILURES", "5", whole(1, 10 ** 6),
                "failures in a row after which an address is left alone"),
        Setting("BREAKER_SECONDS", "30", seconds(0.1, 86400), "for how long, before one call tries it again"),
        Setting("UPSTREAM_RETRIES", "0", whole(0, 10),
                "how often a 429 or 503 is asked again that says Retry-After 5 s or less"),
        Setting("UPSTREAM_CA_FILE", None, ca_file, "certificates (PEM) that https upstreams are checked against"),
        Setting("UPSTREAM_TLS_VERIFY", "on", choice("on", "off"),
                "off: do not check them; whoever is in between reads all"),
        Setting("HTTPS_PROXY", None, tunnel,
                "proxy through which https upstreams are reached, by CONNECT", secret=True),
        Setting("NO_PROXY", None, line, "hosts that are reached without it, by commas"),
    ),
    "Before a busy upstream": (
        Setting("MAX_CONCURRENCY", "0", whole(0, 10 ** 6),
                "metered calls that the endpoint runs at once; the others stand in a fair line; 0: any number"),
        Setting("MAX_QUEUE", "100", whole(0, 10 ** 5), "calls that may stand in line; beyond: 503"),
        Setting("MAX_QUEUE_PER_CALLER", "20", whole(0, 10 ** 5), "and those of one caller"),
        Setting("QUEUE_SECONDS", "30", seconds(0.1, 86400), "how long a call stands there at most; then: 503"),
        Setting("KEY_WEIGHTS", None, weights, "turns in the line, as name=weight by commas; else 1"),
        Setting("EARLY_STREAM_SECONDS", "0", seconds(0, 86400),
                "a stream that waited so long begins with comments, so that nobody gives up; 0: off"),
        Setting("STREAM_HEARTBEAT_SECONDS", "0", seconds(0, 86400),
                "a comment in every pause of a stream that is so long; 0: off"),
    ),
    "Where callers come in": (
        Setting("HOST", "0.0.0.0", host, "address to listen on; ::, for IPv6 and IPv4"),
        Setting("PORT", "8899", whole(1, 65535), "port to listen on"),
        Setting("PROXY_API_KEYS", None, proxy_keys,
                "keys that may call, as key or name=key, by commas; unset: anyone", secret=True),
        Setting("MAX_BODY_BYTES", "33554432", whole(1, 1 << 40), "largest body of a metered call"),
        Setting("MAX_CONNECTIONS", "1024", whole(1, 65535), "callers' connections at once; beyond: 503"),
        Setting("MAX_CONNECTIONS_PER_ADDRESS", None, whole(1, 65535),
                "and of one address (an IPv6 /64) [256, loopback any number]"),
        Setting("TLS_CERT_FILE", None, pem_file, "certificates (PEM) to speak https to callers; read again on SIGHUP"),
        Setting("TLS_KEY_FILE", None, pem_file, "their key, where it is not in the same file"),
        Setting("TRUSTED_PROXIES", None, networks,
                "addresses or networks by commas whose X-Forwarded-For and CALLER_HEADER are believed"),
        Setting("CALLER_HEADER", None, field_name,
                "field in which those name the caller, such as X-OpenWebUI-User-Id"),
        Setting("DRAIN_SECONDS", "30", seconds(0, 86400),
                "on a signal to stop, how long running calls may go on"),
        Setting("CORS_ORIGINS", "*", origins, "web pages that may call: *, origins by commas, or off"),
    ),
    "What a caller may use": (
        Setting("MAX_TOKENS", "10", whole(1, 10 ** 12), "what a caller's bucket holds; it starts full"),
        Setting("REFILL_TOKENS", "2", whole(1, 10 ** 12), "what it gains every interval"),
        Setting("REFILL_INTERVAL_SECONDS", "300", whole(1, 10 ** 9), "the interval"),
        Setting("TOKEN_COST_MODE", "request", choice("request", "estimate", "usage"),
                "a call costs a fixed number, its estimated tokens, or those it really used"),
        Setting("REQUEST_TOKEN_COST", "1", whole(1, 10 ** 12),
                "the fixed number, for TOKEN_COST_MODE=request"),
        Setting("RESPONSE_TOKEN_RESERVE", "256", whole(0, 10 ** 12),
                "expected output of a call that names no maximum"),
        Setting("IMAGE_TOKENS", "1000", whole(0, 10 ** 9), "what an image in a prompt is estimated at"),
        Setting("LIMITS", None, rules,
                "rules instead of that one bucket: SCOPE AMOUNT UNIT per DURATION [burst N]; ..."),
        Setting("LIMIT_MESSAGE", "limit reached, wait {wait}", line,
                "what a limited caller's assistant says; also {rule}, {limit}, {unit}"),
        Setting("LIMIT_REPLY", "assistant", choice("assistant", "error", "auto"),
                "an assistant says so, or error 429; auto: error for programs, the assistant for people"),
        Setting("PRICES", None, price_file, "JSON file of prices, in USD per million tokens"),
    ),
    "What is remembered": (
        Setting("DATABASE", DEFAULT_DATABASE, line, "SQLite file of calls and buckets, or off"),
        Setting("LEDGER_DAYS", "90", whole(1, 36500), "days that a call stays in it"),
        Setting("USAGE_LOG", None, line, "file for the same entries as JSON lines, or - for stdout"),
    ),
    "How it runs": (
        Setting("LOG_FORMAT", "text", choice("text", "json"),
                "one line per call on stderr, for people or for programs"),
        Setting("CPU_AFFINITY", "auto", affinity,
                "CPU to run on: a second one gains nothing and costs a tenth; auto, off or a number"),
    ),
}


def every_setting() -> List[Setting]:
    return [setting for group in SETTINGS.values() for setting in group]


# What can be said of one more upstream; NAME is yours to choose, and the prefix of its paths.
UPSTREAM_SETTINGS = (
    Setting("UPSTREAM_NAME_URL", None, endpoints, "its URL, as BASE_API_URL; a vendor known by NAME needs none"),
    Setting("UPSTREAM_NAME_KEY", None, credential,
            "its key; passthrough: callers show their own", secret=True),
    Setting("UPSTREAM_NAME_MODELS", None, globs, "models it serves on paths without its prefix, such as gpt-*,o3"),
    Setting("UPSTREAM_NAME_MODEL", None, line, "replaces the model that calls ask it for"),
    Setting("UPSTREAM_NAME_DIALECT", None, choice("openai", "anthropic", "gemini"), "the API it speaks [openai]"),
    Setting("UPSTREAM_NAME_MAX_CONCURRENCY", "0", whole(0, 10 ** 6), "as MAX_CONCURRENCY"),
    Setting("UPSTREAM_NAME_HEADERS", None, header_lines,
            "header fields for it, 'Name: value | Name: value'", secret=True),
)
UPSTREAM_BY_SUFFIX = {setting.name[len("UPSTREAM_NAME_"):]: setting for setting in UPSTREAM_SETTINGS}
UPSTREAM_VARIABLE = re.compile("UPSTREAM_([A-Z0-9_]*?)_(%s)" % "|".join(UPSTREAM_BY_SUFFIX))
VENDORS = {  # name -> URL, API
    "openai": ("https://api.openai.com/v1", "openai"), "anthropic": ("https://api.anthropic.com/v1", "anthropic"),
    "gemini": ("https://generativelanguage.googleapis.com", "gemini"),
    "deepseek": ("https://api.deepseek.com/v1", "openai"), "grok": ("https://api.x.ai/v1", "openai"),
    "mistral": ("https://api.mistral.ai/v1", "openai"), "groq": ("https://api.groq.com/openai/v1", "openai"),
    "openrouter": ("https://openrouter.ai/api/v1", "openai"), "ollama": ("http://localhost:11434/v1", "openai")}
# they begin paths of our own, or of the APIs
RESERVED = ("", "base", "v1", "v1beta", "health", "models", "metrics", "chat", "completions", "messages", "responses",
            "embeddings", "rerank", "generations", "images", "audio", "files", "threads")
PASSTHROUGH = "passthrough"


class UpstreamConfig(NamedTuple):
    """What is set of one upstream."""
    name: str
    url: List[Endpoint]
    key: Optional[str] = None
    models: Tuple[str, ...] = ()
    model: Optional[str] = None
    dialect: Optional[str] = None
    max_concurrency: int = 0
    headers: Dict[str, str] = {}


def is_secret(name: str) -> bool:
    """Whether the text of a setting, of an upstream's too, is nobody's to see."""
    match = UPSTREAM_VARIABLE.fullmatch(name)
    return UPSTREAM_BY_SUFFIX[match[2]].secret if match else any(
        setting.secret for setting in every_setting() if setting.name == name)


def spell_fault(name: str, setting: Setting, text: str, fault: ValueError) -> str:
    return "%s %s (got %s)" % (
        name, fault, "a value not shown here" if setting.secret or "@" in text or "-----" in text else repr(text))


def read_upstreams(found: Dict[str, str], faults: List[str]) -> Tuple[List[UpstreamConfig], Dict[str, str]]:
    """Of {name of a variable: its text}, in order, the named upstreams; and the texts of all their settings.
    What is wrong is added to `faults`."""
    told: Dict[str, Dict[str, Any]] = {}
    texts = {}
    for variable, text in found.items():
        match = UPSTREAM_VARIABLE.fullmatch(variable)
        if not match or not text:
            continue
        texts[variable] = text
        values = told.setdefault(match[1].lower(), {})
        setting = UPSTREAM_BY_SUFFIX[match[2]]
        try:
            values[match[2].lower()] = setting.read(text)
        except ValueError as fault:
            faults.append(spell_fault(variable, setting, text, fault))
            values[match[2].lower()] = None
    upstreams = []
    for name, values in told.items():
        url, dialect = VENDORS.get(name, (None, "openai"))
        if "url" not in values and url:
            values["url"] = endpoints(url)
        if name in RESERVED:
            faults.append("UPSTREAM_%s_%s must have another name%s" % (
                name.upper(), next(iter(values)).upper(), "; the base is set by BASE_API_URL, BASE_API_KEY ..."
                if name == "base" else ": /%s is a path of its own" % name if name else ""))
        elif "url" not in values:
            faults.append("UPSTREAM_%s_URL is not set; only these need none: %s" % (name.upper(), ", ".join(VENDORS)))
        else:
            upstreams.append(UpstreamConfig(name, **{"dialect": dialect, **values}))
    return upstreams, texts


HOW_TO_START = ("BASE_API_URL is not set. Start like this:"
                "  BASE_API_URL=http://127.0.0.1:8000/v1 python llm_proxy.py  (or try --demo)")


class Config(types.SimpleNamespace):
    """The values of SETTINGS, by lower-case name; unset ones without a default are None. `texts`: name -> as
    it was set; `unknown`: names in .env that are no settings."""

    def all_upstreams(self) -> List[UpstreamConfig]:
        """The base first, where there is one."""
        base = UpstreamConfig("base", self.base_api_url, self.base_api_key, model=self.base_model,
                              max_concurrency=self.max_concurrency)
        return ([base] if base.url else []) + self.upstreams

    @property
    def scheme(self) -> str:
        """What callers speak."""
        return "https" if self.tls_cert_file else "http"

    def speaks_https(self) -> bool:
        return any(url.scheme == "https" for upstream in self.all_upstreams() for url in upstream.url)

    def warnings(self) -> List[str]:
        found = ["%s is not a setting" % name for name in self.unknown]
        names = [upstream.name for upstream in self.all_upstreams()]
        found += ["the rule '%s' speaks of no upstream there is: %s" % (rule.text, ", ".join(names))
                  for rule in self.limits or () for kind, glob in rule.scopes
                  if kind == "upstream" and not fnmatch.filter(names, glob)]
        if not self.base_api_url and not any(upstream.models for upstream in self.upstreams):
            found.append("only paths with a prefix, such as /%s/v1, lead anywhere: neither BASE_API_URL nor"
                         " UPSTREAM_..._MODELS is set" % names[0])
        if self.upstream_tls_verify == "off":
            found.append("certificates of https upstreams are not checked (UPSTREAM_TLS_VERIFY=off): whoever is in"
                         " between reads all, keys included")
        found += ["KEY_WEIGHTS speaks of '%s', which no key in PROXY_API_KEYS is named" % name
                  for name in self.key_weights or () if name not in (self.proxy_api_keys or {}).values()]
        if 0 < self.max_call_seconds <= (self.first_byte_timeout or self.read_timeout):
            found.append("MAX_CALL_SECONDS ends calls before FIRST_BYTE_TIMEOUT (unset: READ_TIMEOUT) does:"
                         " an upstream that is silent never counts as failing")
        if self.caller_header and not self.trusted_proxies:
            found.append("CALLER_HEADER is believed from nobody: TRUSTED_PROXIES is unset")
        if not self.proxy_api_keys:
            found.append("callers are not checked: whoever reaches this port can call, and every invented key"
                         " has a bucket of its own (PROXY_API_KEYS is unset)")
        if self.limits:
            return found
        if self.token_cost_mode != "request" and self.response_token_reserve > self.max_tokens:
            found.append("RESPONSE_TOKEN_RESERVE %d is above MAX_TOKENS %d:"
                         " a call that names no max_tokens can never be let in"
                         % (self.response_token_reserve, self.max_tokens))
        if self.token_cost_mode == "request" and self.request_token_cost > self.max_tokens:
            found.append("REQUEST_TOKEN_COST %d is above MAX_TOKENS %d: no call can ever be let in"
                         % (self.request_token_cost, self.max_tokens))
        return found


def server_context(certificates: str, key: Optional[str]) -> ssl.SSLContext:
    """For callers' TLS. Raises OSError, ValueError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)  # nobody needs it, and it makes writes wait for reads
    # an encrypted key must not ask a terminal that is not there
    context.load_cert_chain(certificates, key, password=lambda: "")
    return context


class ConfigFaults(Exception):
    """Everything that is wrong with the settings, one line each."""


def read_dotenv(text: str) -> Tuple[Dict[str, str], List[str]]:
    """NAME=value lines; `export `, quotes and # comments are understood. -> (values, faults)"""
    values, faults = {}, []
    for number, row in enumerate(text.splitlines(), 1):
        row = row.strip()
        if not row or row.startswith("#"):
            continue
        match = re.fullmatch(
            r"""(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*="""
            r"""(?:\s*"([^"]*)"|\s*'([^']*)'|(.*?))(?:\s+#.*)?""", row)
        if match:
            values[match[1]] = next(value for value in match.groups()[1:] + ("",) if value is not None)
        else:
            faults.append(".env line %d is not NAME=value" % number)
    return values, faults


def misspelt(name: str) -> bool:
    """Whether a name in the environment, which holds much that is not for us, looks as if it was."""
    return name.startswith("UPSTREAM_") or (not name.upper().endswith("_PROXY") and bool(
        difflib.get_close_matches(name, [setting.name for setting in every_setting()], 1, 0.9)))


def read_config(environ: Dict[str, str], dotenv: str = "") -> Config:
    """The environment wins over `.env`; an empty value counts as unset. Raises ConfigFaults with all faults
    at once."""
    written, faults = read_dotenv(dotenv)
    values, texts = {}, {}
    environ = {**{name: environ.get(name.lower(), "") for name in ("HTTPS_PROXY", "NO_PROXY")}, **environ}
    named = {**written, **{name: environ[name] for name in sorted(environ) if environ[name].strip()}}
    upstreams, upstream_texts = read_upstreams({name: text.strip() for name, text in named.items()}, faults)
    if not any(one.scheme == "https" for upstream in upstreams for one in upstream.url or ()) and (
            "https:" not in (environ.get("BASE_API_URL") or written.get("BASE_API_URL", ""))):
        environ["HTTPS_PROXY"] = written["HTTPS_PROXY"] = ""  # it is meant for others, and may be of any kind
    for setting in every_setting():
        text = ((environ.get(setting.name) or "").strip() or written.get(setting.name, "").strip()
                or setting.default)
        texts[setting.name] = text
        try:
            values[setting.name.lower()] = None if text is None else setting.read(text)
        except ValueError as fault:
            faults.append(spell_fault(setting.name, setting, text, fault))
    order = values.get("upstream_order") or ()
    names = [upstream.name for upstream in upstreams]
    faults += ["UPSTREAM_ORDER must be among %s (got '%s')" % (", ".join(names) or "named upstreams", name)
               for name in order if name not in names]
    upstreams.sort(key=lambda upstream: order.index(upstream.name) if upstream.name in order else len(order))
    if "base_api_url" in values and values["base_api_url"] is None and not upstreams:
        faults.append(HOW_TO_START)
    if values.get("proxy_api_keys"):
        keys = {"BASE_API_KEY": values.get("base_api_key"),
                **{"UPSTREAM_%s_KEY" % upstream.name.upper(): upstream.key for upstream in upstreams}}
        faults += ["%s must not be passthrough where PROXY_API_KEYS is set: a caller shows one key only" % name
                   for name, key in keys.items() if key == PASSTHROUGH]
    if values.get("tls_cert_file"):
        try:
            server_context(values["tls_cert_file"], values.get("tls_key_file"))
        except (OSError, ValueError) as failure:
            faults.append("TLS_CERT_FILE and TLS_KEY_FILE must be a certificate and its key, not encrypted: %s"
                          % failure)
    elif values.get("tls_key_file"):
        faults.append("TLS_KEY_FILE needs TLS_CERT_FILE")
    if faults:
        raise ConfigFaults("\n".join(faults))
    texts.update(upstream_texts)
    unknown = [name for name in {**written, **environ} if name not in texts and (
        name in written or misspelt(name)) and not UPSTREAM_VARIABLE.fullmatch(name)]
    return Config(texts=texts, unknown=unknown, upstreams=upstreams, **values)


# ------------------------------------------------------------------------------------------------------------
# Refusals: every way to say no. A Refusal is raised at any depth, so no step can forget to stop, and it is
# rendered in one place. Its class tells status, kind and the outcome that is logged; its sentence is
# constant. No wire bodies here.
# ------------------------------------------------------------------------------------------------------------

class Refusal(Exception):
    """`fields` are extra header fields of the answer; `closing` ends the connection, because its framing is
    lost."""
    status, kind, outcome, code, closing = 400, "invalid_request_error", "refused", None, False
    sentence = "The request was refused"
    cause: Optional[str] = None  # for the operator's eyes only
    unsent = False               # nothing of the call went upstream: another one may be asked
    body: Optional[bytes] = None  # how an upstream said it, where that is known

    def __init__(self, sentence: Optional[str] = None, **fields: Any):
        super().__init__(sentence or self.sentence)
        self.fields = {name.replace("_", "-"): value for name, value in fields.items()}


class BadRequest(Refusal):
    """What came is no HTTP, or no call that could be understood."""


class Malformed(BadRequest):
    """Bytes that are not HTTP/1.1 as RFC 9112 has it, from either side; whose fault it is, the reader of them
    decides."""
    sentence, closing = "The request is not valid HTTP/1.1", True

    def __init__(self, sentence=None, status=400):
        super().__init__(sentence)
        self.status = status


class TooLargeHead(Malformed):
    def __init__(self, status):
        super().__init__("The request head is too large", status)


class BrokenBody(BadRequest):
    sentence, closing = "The request body is not framed as its head says", True


class Unsupported(Refusal):
    status = 415
    sentence = "The body of a metered call must be sent without a Content-Encoding"


class Unexpected(Refusal):
    status = 417
    sentence = "The only expectation understood is 100-continue"


class NotAllowed(Refusal):
    status = 405
    sentence = "The method is not passed on"


class Unauthorized(Refusal):
    status, kind, code = 401, "authentication_error", "invalid_api_key"
    sentence = "Missing or invalid proxy API key"

    def __init__(self):
        super().__init__(WWW_Authenticate="Bearer")


class TooSlow(Refusal):
    status, kind, closing = 408, "timeout_error", True
    sentence = "The request did not arrive in time"


class TooLarge(Refusal):
    status = 413
    sentence = "The request body is larger than this proxy accepts"


class Overloaded(Refusal):
    status, kind, closing = 503, "server_error", True
    sentence = "The proxy is busy, try again in a moment"


class InternalError(Refusal):
    status, kind, outcome, closing = 500, "server_error", "internal_error", True
    sentence = "The proxy failed to handle this request"


OUR_OWN_LACK = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # of descriptors, or memory


class UpstreamFailed(Refusal):
    """`failure` is what happened: it goes to the log, in a few words, and never to a caller. `silent` says that
    the connection ended before a proper answer began."""
    status, kind, outcome = 502, "upstream_error", "upstream_failed"
    sentence = "The upstream could not be reached or did not answer properly"

    def __init__(self, failure: Any, unsent: bool = False):
        super().__init__()
        self.unsent = unsent
        self.silent = isinstance(failure, OSError) and failure.errno not in OUR_OWN_LACK
        self.cause = failure if isinstance(failure, str) else CAUSES.get(type(failure)) or "connection failed"


CAUSES = {
    ConnectionRefusedError: "connection refused",
    ConnectionResetError: "connection reset",
    BrokenPipeError: "connection reset",
    ConnectionAbortedError: "closed without an answer",
    socket.gaierror: "name not found",
    ssl.SSLCertVerificationError: "certificate not trusted",
    ssl.SSLError: "TLS failed",
    Malformed: "answer is not HTTP"}


class UpstreamTimeout(Refusal):
    status, kind, outcome, cause = 504, "timeout_error", "upstream_failed", "timed out"
    sentence = "The upstream did not answer in time"

    def __init__(self, unsent: bool = False):
        super().__init__()
        self.unsent = unsent


class UpstreamOpen(Refusal):
    """Every address that could be asked has failed too often."""
    status, kind, outcome, cause, unsent = 503, "upstream_error", "upstream_failed", "breaker open", True
    sentence = "The upstream is failing, try again in a moment"

    def __init__(self, wait: float):
        super().__init__(Retry_After=max(1, math.ceil(wait)), X_LLM_Proxy_Error_Class="upstream_open")


class NotInTurn(Refusal):
    """The line before the upstream is too long, or did not move in time."""
    status, kind, unsent = 503, "server_error", True
    sentence = "The upstream is busy and the line before it is long, try again in a moment"

    def __init__(self, cause: str):
        super().__init__(Retry_After=5, X_LLM_Proxy_Error_Class=cause.replace(" ", "_"))
        self.cause = cause


class LateAnswer(Refusal):
    """What came is no stream, and the caller's has begun; `body` is an error in its own words."""
    kind, outcome = "upstream_error", "upstream_status"
    sentence = "The upstream did not answer with a stream"

    def __init__(self, status: int, body: Optional[bytes]):
        super().__init__()
        self.cause, self.body = "status %d" % status, body


class NotServed(Refusal):
    status, code = 404, "model_not_found"

    def __init__(self, model: Optional[str]):
        super().__init__("No upstream serves the model '%s'" % model if model else "No upstream serves this path")


class LimitReached(Refusal):
    """The bucket is short. `wait` is in seconds; None means that the call costs more than the bucket ever
    holds."""
    status, kind, outcome, code = 429, "rate_limit_error", "limited", "rate_limit_exceeded"

    def __init__(self, sentence: str, wait: Optional[float], tightest: Any):
        super().__init__(sentence)
        take = tightest[0]
        self.wait, self.cause = wait, take.rule.text
        self.tightest = (take._replace(cost=0),) + tightest[1:]  # as in a Hold
        if wait is not None:
            self.fields["Retry-After"] = math.ceil(wait)


class CallerGone(Exception):
    """The caller hung up: nobody is left to answer."""


# ------------------------------------------------------------------------------------------------------------
# Callers: the one place that decides who is calling. Keys are known by digest and compared in constant time;
# nobody above or below sees a raw key, but for upstreams that callers show their own. It does not know what a
# caller may use.
# ------------------------------------------------------------------------------------------------------------

CREDENTIAL_FIELDS = ("authorization", "x-api-key", "x-goog-api-key")


def split_query(query: str) -> Tuple[List[str], str]:
    """-> the keys in a query, as Google's clients may send them, and the query without them."""
    if "=" not in query:
        return [], query
    parts = [(part, *(urllib.parse.unquote_plus(text, "latin-1") for text in part.partition("=")[::2]))
             for part in query.split("&")]
    return ([value for _, name, value in parts if name.strip().lower() == "key"],
            "&".join([part for part, name, _ in parts if name.strip().lower() != "key"]))


HOP = re.compile(r"\s*(?:\[([^]]+)\](?::\d+)?|([\d.]+)(?::\d+)?|([0-9A-Fa-f:.]+(?:%[\w.]+)?))\s*")


def plain_ip(host: str) -> Any:
    """An IP address; one of IPv4 that was mapped into IPv6 is one of IPv4. Raises ValueError."""
    ip = ipaddress.ip_address(host.partition("%")[0])
    return getattr(ip, "ipv4_mapped", None) or ip


def address_of(host: str) -> str:
    """Who stands behind an address: of IPv6 its /64, which is what one customer has (RFC 6177); but all neighbours
    share the link-local one."""
    if ":" not in host:
        return host
    ip = plain_ip(host)
    if ip.version == 4 or ip.is_loopback or ip.is_link_local:
        return str(ip)
    return str(ipaddress.ip_network((int(ip) >> 64 << 64, 64)))


class Caller:
    """`key` finds the caller's bucket: ('key', SHA-256 of the credential) or ('address', IP). A bearer that
    spells an IP is therefore not that IP."""
    __slots__ = ("key", "name", "key_name", "label")

    def __init__(self, key: Tuple[str, Any], name: Optional[str], secret: bytes = b"", key_name: Optional[str] = None):
        """`key_name` is what PROXY_API_KEYS calls the key, which people may share."""
        self.key, self.name, self.key_name = key, name, key_name
        # For logs: a name, the address, or key:1a2b3c4d, a digest that nobody without `secret` can test guesses
        # against.
        self.label = name or "key:%08x" % (hash(secret + key[1]) & 0xffffffff)


class Callers:
    MAX_HOPS = 32

    def __init__(self, keys: Optional[Dict[str, Optional[str]]], label_secret: bytes, trusted: Iterable[Any] = (),
                 caller_header: Optional[str] = None):
        """`keys`: {key: its name or None}, or None where anyone may call. `trusted` are the networks of proxies that
        are believed who they speak for: which address, and, in `caller_header`, which of the people that share a
        key."""
        self.trusted, self.caller_header = list(trusted), caller_header
        self.names = None if keys is None else {self.digest(key): name for key, name in keys.items()}
        self.label_secret = label_secret

    @staticmethod
    def digest(key: str) -> bytes:
        return hashlib.sha256(key.encode("latin-1")).digest()

    @staticmethod
    def shown(head: Any, query: str) -> Optional[str]:
        """-> the credential that a request shows, in whichever field or as ?key=; None without one. `head` is a
        mapping of fields. Who asks is decided by its digest; only an upstream that callers show their own key is
        told it."""
        scheme, _, token = head.get("authorization", "").partition(" ")
        shown = [token.strip() if scheme.lower() == "bearer" else ""]
        shown += [head.get(name, "") for name in CREDENTIAL_FIELDS[1:]] + split_query(query)[0]
        different = set(filter(None, shown))
        if len(different) > 1:
            raise BadRequest("The request carries two different credentials")
        if any(re.search(r"[\x00-\x1f\x7f]", one) for one in different):  # an escape may have spelled a line end
            raise BadRequest("The credential holds control characters")
        return different.pop() if different else None

    @classmethod
    def credential(cls, head: Any, query: str) -> Optional[bytes]:
        """-> the digest of what is `shown`."""
        shown = cls.shown(head, query)
        return None if shown is None else cls.digest(shown)

    def trusts(self, host: str) -> bool:
        if not self.trusted:
            return False
        try:
            ip = plain_ip(host)
        except ValueError:
            return False
        return any(ip in network for network in self.trusted)

    def address(self, head: Any, peer: str) -> str:
        """Whose address counts: the peer's, or, where that is a trusted proxy, the last one in X-Forwarded-For that
        is none. What was written before that could be anybody's words."""
        if not self.trusts(peer):
            return address_of(peer)
        host = peer
        for hop in reversed(head.get("x-forwarded-for", "").split(",")[-self.MAX_HOPS:]):
            match = HOP.fullmatch(hop)
            try:
                host = str(plain_ip(match[1] or match[2] or match[3]))
            except (TypeError, ValueError):
                break  # no address: what stands before it is worth no more
            if not self.trusts(host):
                break
        return address_of(host)

    def person(self, head: Any, peer: str, caller: Caller) -> Caller:
        """Whom a trusted proxy speaks for: a caller of its own, named KEY/PERSON, or -/PERSON without a key."""
        name = head.get(self.caller_header, "") if self.caller_header and self.trusts(peer) else ""
        if not name:
            return caller
        key, label = (caller.key, caller.label) if caller.key[0] == "key" else (None, "-")
        digest = hashlib.sha256(repr((key, name)).encode())
        if len(name) > 64:
            name = "%s~%s" % (name[:55], digest.hexdigest()[:8])
        name = urllib.parse.quote(name, safe="@:+~", encoding="latin-1")
        return Caller(("key", digest.digest()), "%s/%s" % (label, name), key_name=caller.key_name)

    def identify(self, credential: Optional[bytes], address: str) -> Caller:
        """Raises Unauthorized where keys are asked for and `credential` is none of them."""
        if self.names is not None:
            # All are compared, always, so that the time taken tells nothing about how close a guess was.
            known = [hmac.compare_digest(credential or b"", one) for one in self.names]
            if not any(known):
                raise Unauthorized()
        if credential is None:
            return Caller(("address", address), address)
        name = self.names and self.names[credential]
        return Caller(("key", credential), name, self.label_secret, name)


# ------------------------------------------------------------------------------------------------------------
# Limits: a bucket holds at most `capacity` tokens, gains `refill` every whole `interval` seconds and starts
# full. Taking is all or nothing and atomic. It knows neither HTTP nor what a token stands for.
# ------------------------------------------------------------------------------------------------------------

class Quota(NamedTuple):
    """One bucket as seen at one moment; amounts in the rule's unit, times in whole seconds. `reset_seconds` is
    the time to the next refill, 0 when full."""
    limit: Any
    remaining: Any
    refill_tokens: Any
    refill_seconds: int
    reset_seconds: int


def spell_usd(picodollars: int) -> str:
    """12_500_000 -> '0.0000125'."""
    if not picodollars:
        return "0"
    text = "%d.%012d" % divmod(picodollars, PICODOLLARS)
    return text.rstrip("0").rstrip(".")


def shown(rule: Rule, amount: int) -> Any:
    """An amount as people and headers are told it: in dollars where the rule counts money."""
    return spell_usd(amount) if UNITS[rule.unit] == "usd" else amount


FREE = (0,) * len(UNITS)


class Take(NamedTuple):
    """What one call wants of one bucket."""
    rule: Rule
    key: Tuple[Any, ...]
    cost: int


class Hold:
    """Amounts set aside for one call in all its buckets. Ends once: settled, or given back, which is also what
    leaving the with-block does. `tightest` is the emptiest bucket as it was last seen: (what is taken of it,
    level, time of its last refill, time of looking)."""
    __slots__ = ("buckets", "takes", "costs", "held", "tightest", "ended")

    def __init__(self, buckets: Optional["Buckets"] = None, takes: Any = (), costs: Tuple[int, ...] = FREE,
                 tightest: Any = None):
        self.buckets, self.takes, self.costs, self.tightest, self.ended = buckets, takes, costs, tightest, False
        self.held = tightest[0].cost if tightest else 0

    def settle(self, costs: Tuple[int, ...]) -> None:
        """The call cost `costs`, by unit: the rest goes back, a shortfall becomes a debt."""
        if not self.ended:
            self.ended = True
            for take in self.takes:
                if costs[take.rule.unit] != take.cost:
                    self.takes, self.tightest = self.buckets.settle(self.takes, costs)
                    break

    def give_back(self) -> None:
        self.settle(FREE)

    @property
    def amount(self) -> int:
        """What is taken of the tightest bucket."""
        return self.tightest[0].cost if self.tightest else 0

    @property
    def remaining(self) -> Any:
        if self.tightest:
            take, level, _, _ = self.tightest
            return shown(take.rule, max(0, level))
        return None

    @property
    def quota(self) -> Optional[Quota]:
        return self.tightest and quota_of(self.tightest[0].rule, *self.tightest[1:])

    def charges(self) -> str:
        """What every bucket was charged, for the books."""
        return ";".join([f"{take.key[0]}={take.cost}" for take in self.takes if take.cost])

    def __enter__(self) -> "Hold":
        return self

    def __exit__(self, *_: Any) -> None:
        if not self.ended:
            self.give_back()


def quota_of(rule: Rule, level: int, stamp: float, now: float) -> Quota:
    reset = 0 if level >= rule.capacity else max(0, math.ceil(stamp + rule.interval - now))
    amounts, length = (rule.capacity, max(0, level), rule.rate[0]), rule.rate[1]
    if UNITS[rule.unit] == "usd":
        amounts = map(spell_usd, amounts)
    return Quota(*amounts, length, reset)


class Buckets:
    """Every bucket of every rule. A full one says nothing that an absent one would not, so the table keeps few
    of them."""

    def __init__(self, clock: Any, room: int = 10_000):
        self.clock, self.room = clock, room
        # key -> (level, time of the last refill, rule); least recently used first
        self.levels: "collections.OrderedDict[Any, Tuple[int, float, Rule]]" = collections.OrderedDict()
        self.lock = threading.Lock()

    @staticmethod
    def now(rule: Rule, record: Optional[Tuple[int, float, Rule]], now: float) -> Tuple[int, float]:
        """-> (level, time of the last refill) at `now`. The time moves by whole intervals, so nothing drifts;
        it starts when the bucket stops being full, which makes a full bucket and no bucket the same thing."""
        if record is None or record[0] >= rule.capacity:
            return rule.capacity, now
        level, stamp, _ = record
        steps = int((now - stamp + 1e-6) / rule.interval)  # a microsecond for what floats lose
        if steps > 0:
            level += steps * rule.refill
            if level >= rule.capacity:
                return rule.capacity, now
            stamp += steps * rule.interval
        return level, stamp

    def take(self, takes: List[Take]) -> Tuple[List[Tuple[float, Take]], Any]:
        """All or nothing. -> ((seconds until it could be had, what) where it is short, the tightest bucket
        afterwards)."""
        short, found = [], []
        with self.lock:
            now, levels = self.clock.monotonic(), self.levels
            for take in takes:
                rule, key, cost = take
                record = levels.get(key)
                level, stamp = self.now(rule, record, now)
                if level < cost:
                    short.append((self.missing(rule, level, stamp, cost) - now, take))
                found.append((take, level - cost, stamp, now))
            if not short:
                for take, level, stamp, _ in found:
                    known = take.key in levels
                    levels[take.key] = level, stamp, take.rule
                    if known:
                        levels.move_to_end(take.key)
                    else:
                        self.make_room(now)
                return short, self.tightest(found)
        _, worst = max(short, key=lambda pair: pair[0])
        return short, next((take, level + take.cost, stamp, now)
                           for take, level, stamp, now in found if take is worst)

    def settle(self, takes: List[Take], costs: Tuple[int, ...]) -> Tuple[List[Take], Any]:
        """Charge `costs` instead of what was taken; -> what was charged, and the tightest bucket."""
        found = []
        with self.lock:
            now, levels = self.clock.monotonic(), self.levels
            for rule, key, held in takes:
                cost = costs[rule.unit]
                level, stamp = self.now(rule, levels.get(key), now)
                if cost != held:
                    level = min(rule.capacity, level + held - cost)
                    levels[key] = level, stamp, rule
                found.append((Take(rule, key, cost), level, stamp, now))
        return [one[0] for one in found], self.tightest(found)

    @staticmethod
    def tightest(found: List[Any]) -> Any:
        """The bucket that is emptiest, as a share of what it holds."""
        return found[0] if len(found) == 1 else min(found, key=lambda one: one[1] / one[0].rule.capacity)

    def peek(self, takes: List[Take]) -> Tuple[Quota, int]:
        """The tightest bucket as it is, and the whole seconds until all costs could be had; looking makes
        none."""
        found, wait = [], 0.0
        with self.lock:
            now = self.clock.monotonic()
            for take in takes:
                level, stamp = self.now(take.rule, self.levels.get(take.key), now)
                found.append((take, level, stamp, now))
                if level < take.cost:
                    wait = max(wait, self.missing(take.rule, level, stamp, take.cost) - now)
        take, *rest = self.tightest(found)
        return quota_of(take.rule, *rest), math.ceil(wait)

    @staticmethod
    def missing(rule: Rule, level: int, stamp: float, cost: int) -> float:
        """When `cost` can be had."""
        return stamp + -(-(cost - level) // rule.refill) * rule.interval

    def make_room(self, now: float) -> None:
        """Drop old buckets that are full by now: two for each one that is added, so this never takes long.
        Beyond `room` the least recently used goes even when it is not full, which errs in its caller's
        favour."""
        for _ in range(min(2, len(self.levels))):
            key, record = next(iter(self.levels.items()))
            rule = record[2]
            if self.now(rule, record, now)[0] < rule.capacity and len(self.levels) <= self.room:
                break
            del self.levels[key]

    def snapshot(self, wall: float) -> Dict[Any, Tuple[int, float]]:
        """-> {key: (level, wall-clock time of the last refill)} of the buckets that are not full."""
        with self.lock:
            now = self.clock.monotonic()
            return {key: (record[0], stamp + wall - now) for key, record in self.levels.items()
                    for level, stamp in [self.now(record[2], record, now)] if level < record[2].capacity}

    def restore(self, rule: Rule, key: Any, level: int, since: float) -> None:
        """A bucket as it was `since` seconds ago."""
        self.levels[key] = level, self.clock.monotonic() - max(0, since), rule


def spell_wait(wait: float) -> str:
    """300 -> '5 min', 61 -> '2 min', 12 -> '12s'."""
    whole_seconds = math.ceil(wait)
    return "%ds" % whole_seconds if whole_seconds < 60 else "%d min" % math.ceil(wait / 60)


class Limits:
    """Which rules a call must pass. Of each family the first that matches counts, so that the special may stand
    before the general."""
    MOST_KNOWN = 4_000

    def __init__(self, rules: List[Rule], buckets: Buckets, message: str):
        self.rules, self.buckets, self.message = rules, buckets, message
        kinds = {kind for rule in rules for kind, _ in rule.scopes}
        self.by_address, self.by_model, self.by_upstream = (kind in kinds for kind in ("address", "model", "upstream"))
        # (caller, address, model, upstream) -> [(rule, key of its bucket)]
        self.known: Dict[Any, List[Tuple[Rule, Tuple[Any, ...]]]] = {}

    def units(self) -> set:
        return {UNITS[rule.unit] for rule in self.rules}

    def matching(self, caller: Caller, address: str, model: Optional[str],
                 upstream: str = "base") -> List[Tuple[Rule, Tuple[Any, ...]]]:
        asked = (caller.key, caller.name, address if self.by_address else None, model if self.by_model else None,
                 upstream if self.by_upstream else None)
        found = self.known.get(asked)
        if found is None:
            families: Dict[Any, Tuple[Rule, Tuple[Any, ...]]] = {}
            for rule in self.rules:
                if all(self.speaks_of(kind, glob, caller, model, upstream) for kind, glob in rule.scopes):
                    kinds = [kind for kind, _ in rule.scopes]
                    whose = ((caller.key,) if "each" in kinds or "key" in kinds else ()) + (
                        (("address", address),) if "address" in kinds else ())
                    families.setdefault(rule.family, (rule, (rule.text,) + whose))
            found = [pair for pair in families.values() if pair[0].capacity is not None]
            if len(self.known) >= self.MOST_KNOWN:
                self.known.clear()
            self.known[asked] = found
        return found

    @staticmethod
    def speaks_of(kind: str, glob: str, caller: Caller, model: Optional[str], upstream: str) -> bool:
        if kind == "key":
            return caller.key[0] == "key" and fnmatch.fnmatchcase(caller.name or "", glob)
        if kind == "model":  # "GPT-4" must not pass where an upstream takes it for "gpt-4"
            return fnmatch.fnmatchcase((model or "").casefold(), glob.casefold())
        if kind == "upstream":
            return fnmatch.fnmatchcase(upstream, glob)
        return True

    def admit(self, caller: Caller, address: str, model: Optional[str], costs: Tuple[int, ...],
              upstream: str = "base") -> Hold:
        """Set what the call costs aside, by every rule that counts, or raise LimitReached. A cost of 0 everywhere
        is free: it touches no bucket."""
        takes = [Take(rule, key, costs[rule.unit])
                 for rule, key in self.matching(caller, address, model, upstream)]
        if not takes or costs is FREE:
            return Hold(costs=costs)
        short, tightest = self.buckets.take(takes)
        if not short:
            return Hold(self.buckets, takes, costs, tightest)
        for _, (rule, _, cost) in short:
            if cost > rule.capacity:
                unit = rule.text.split(" ")[2].replace("_", " ")
                raise LimitReached("this call would cost %s %s, and the limit is %s: ask for less" % (
                    shown(rule, cost), unit, shown(rule, rule.capacity)), None, tightest)
        wait, (rule, _, _) = max(short, key=lambda pair: pair[0])
        text = self.message
        for word, value in (("{wait}", spell_wait(wait)), ("{rule}", rule.text),
                            ("{limit}", str(shown(rule, rule.rate[0]))), ("{unit}", rule.text.split(" ")[2])):
            text = text.replace(word, value)
        raise LimitReached(text, wait, tightest)


# ------------------------------------------------------------------------------------------------------------
# Usage: what a call will use, told from its payload, what it used, and what that costs. It knows no wire names
# and no sockets.
# ------------------------------------------------------------------------------------------------------------

CHARACTERS_PER_TOKEN = 4


def text_length(payload: Any, but: str, is_media: Callable[[Dict[str, Any]], bool]) -> Tuple[int, int]:
    """-> characters of every string value anywhere in `payload`, joined by spaces, without the top-level key
    `but`; and how many parts `is_media`, which are counted instead of looked into."""
    characters = media = 0
    todo = list({**payload, but: None}.values())
    for value in todo:  # which grows meanwhile
        kind = type(value)
        if kind is str:
            characters += len(value) + 1
        elif kind is list:
            todo += value
        elif kind is dict:
            if is_media(value):
                media += 1
            else:
                todo += value.values()
    return max(0, characters - 1), media


class Usage(NamedTuple):
    """Tokens of one call. `input` counts all of the prompt; `cached` and `cache_write` are the parts of it that
    a cache gave or took. `output` counts all that was generated; `reasoning` is the part of it that was not
    shown. `estimated`: nobody told, so it was guessed from the text."""
    input: int = 0
    output: int = 0
    cached: int = 0
    cache_write: int = 0
    reasoning: int = 0
    estimated: bool = False


# USD per million tokens: input, output, read from cache, written to cache. List prices as published for text and
# short prompts, collected on 2026-11-20; of older models, as they were last listed.
USUAL_PRICES = """
gpt-5.5 5 30 .5; gpt-5.4 2.5 15 .25; gpt-5.4-mini .75 4.5 .075; gpt-5.4-nano .2 1.25 .02
claude-opus-5-5 4 20 .2 5; claude-opus-5 5 25 .5 6.25; claude-opus-4-7 5 25 .5 6.25; claude-opus-4-6 5 25 .5 6.25
claude-sonnet-5-5 2 10 .1 2.5; claude-sonnet-5 2 10 .2 2.5; claude-haiku-5-5 .1 .5 .01 .125
gpt-5.1 1.25 10 .125; gpt-5 1.25 10 .125; gpt-5-mini .25 2 .025; gpt-5-nano .05 .4 .005; gpt-4.1 2 8 .5
gpt-4.1-mini .4 1.6 .1; gpt-4.1-nano .1 .4 .025; gpt-4o 2.5 10 1.25; gpt-4o-mini .15 .6 .075; o3 2 8 .5
o4-mini 1.1 4.4 .275; o3-mini 1.1 4.4 .55; text-embedding-3-small .02 0; text-embedding-3-large .13 0
claude-opus-4-5 5 25 .5 6.25; claude-opus-4-1 15 75 1.5 18.75; claude-opus-4 15 75 1.5 18.75
claude-sonnet-4-5 3 15 .3 3.75; claude-sonnet-4 3 15 .3 3.75; claude-haiku-4-5 1 5 .1 1.25
claude-3-5-haiku .8 4 .08 1; claude-3-haiku .25 1.25 .03 .3
gemini-2.5-pro 1.25 10 .125; gemini-2.5-flash .3 2.5 .03; gemini-2.5-flash-lite .1 .4 .01
gemini-2.0-flash .1 .4 .025; deepseek-chat .28 .42 .028; deepseek-reasoner .28 .42 .028"""
DATED = re.compile(r"(?:-\d{4}-\d\d-\d\d|-\d{8}|-latest|@.*|:.*)$")
MOST_TOKENS = 1 << 40  # of one call; whoever tells or asks for more is wrong
MOST_COST = PICODOLLARS * 10 ** 6  # of one call; whoever tells more is wrong
KNOWN_MODELS = 1000  # of which a price or a ratio is remembered: callers may invent names


def usual_prices() -> Dict[str, Price]:
    names = ("input", "output", "cache_read", "cache_write")
    rows = [row.split() for row in re.split("[;\n]", USUAL_PRICES) if row.strip()]
    return {row[0]: price(dict(zip(names, map(decimal.Decimal, row[1:])))) for row in rows}


class Prices:
    """What models cost, and therefore calls. The operator's own prices go before the usual ones; a model that
    has none costs nothing, and is said to be unpriced."""

    def __init__(self, own: Optional[Dict[str, Price]]):
        self.own = {name.casefold(): found for name, found in (own or {}).items()}
        self.globs = [(re.compile(fnmatch.translate(glob)), found) for glob, found in self.own.items()
                      if re.search(r"[*?[]", glob)]
        self.usual = usual_prices()
        self.known: Dict[str, Optional[Price]] = {}

    def find(self, model: str) -> Optional[Price]:
        found = self.known.get(model, self)
        if found is self:
            name = model.casefold()  # an upstream may not mind the case, and would not be paid
            found = self.own.get(name) or next((found for glob, found in self.globs if glob.match(name)), None)
            found = found or self.usual.get(DATED.sub("", name.rpartition("/")[2]))
            if len(self.known) >= KNOWN_MODELS:
                self.known.clear()
            self.known[model] = found
        return found

    def cost(self, usage: Usage, model: str) -> Tuple[int, bool]:
        """-> picodollars, exactly; and whether the model has a price."""
        found = self.find(model)
        if found is None:
            return 0, False
        plain = max(0, usage.input - usage.cached - usage.cache_write)
        return min(MOST_COST, plain * found.input + usage.cached * found.cache_read
                   + usage.cache_write * found.cache_write + usage.output * found.output), True


class Meter:
    """What calls cost, by unit: guessed before, known after. A guess counts characters; how many of them make a
    token is learned, model by model, from calls that told their usage."""

    def __init__(self, prices: Prices, request_cost: int, reserve: int, media_tokens: int, units: set):
        """`units` are those that rules count in: what none asks for is spared."""
        self.prices, self.request_cost, self.reserve = prices, request_cost, reserve
        self.media_tokens = media_tokens
        self.ratios: Dict[str, float] = {}
        self.plain = (request_cost,) + FREE[1:]
        self.guessing, self.counting = units != {"requests"}, bool(units - {"requests", "estimate"})
        self.pricing = "usd" in units

    def before(self, call: "Call") -> Tuple[int, ...]:
        """What to hold for a call, by unit."""
        if not self.guessing:
            return self.plain
        output = call.output_limit()
        prompt = self.prompt(call, CHARACTERS_PER_TOKEN)
        output = self.reserve if output is None else min(output, MOST_TOKENS)
        used = Usage(prompt, output)
        picodollars = self.prices.cost(used, call.served)[0] if self.pricing else 0
        return self.costs(used, picodollars, max(1, prompt + output))

    def prompt(self, call: "Call", ratio: float) -> int:
        characters, media = call.prompt_length()
        return math.ceil(characters / ratio) + media * self.media_tokens

    def costs(self, usage: Usage, picodollars: int, estimate: int) -> Tuple[int, ...]:
        """In the order of UNITS."""
        return (self.request_cost, usage.input + usage.output, usage.input, usage.output, picodollars, estimate)

    def after(self, call: "Call", heard: Optional["Listener"], whole: bool) -> Usage:
        """What the call used: as it was told, else guessed from its prompt and the text that came. An answer that
        is not `whole` may have told its input alone."""
        told, final = heard.told(whole) if heard else (None, False)
        if not final:
            ratio = self.ratios.get(call.served, CHARACTERS_PER_TOKEN)
            output = math.ceil(heard.spoken() / ratio) if heard else 0
            if told is None:
                return Usage(self.prompt(call, ratio), output, estimated=True)
            return told._replace(output=max(told.output, output), estimated=True)
        if told.output >= 16 and (call.served not in self.ratios or random.random() < 0.05):
            self.learn(call.served, told, heard.spoken())
        return told

    def learn(self, model: str, told: Usage, spoken: int) -> None:
        tokens = told.output - told.reasoning
        if not spoken or tokens < 16:
            return
        ratio = min(8.0, max(1.0, spoken / tokens))
        if len(self.ratios) >= KNOWN_MODELS:
            self.ratios.clear()
        before = self.ratios.get(model)
        self.ratios[model] = ratio if before is None else before + (ratio - before) / 8


# ------------------------------------------------------------------------------------------------------------
# Dialects: the only place that knows an API's wire names: which paths are metered, where the prompt stands,
# what a limit reply, an error and a list of models look like. It knows no sockets and no buckets.
# ------------------------------------------------------------------------------------------------------------

# CPython 3.13's parser overruns a thread's stack long before it raises RecursionError
MAX_JSON_DEPTH = 128
# values: a body of nothing but short ones takes 40 times its size in memory
MAX_JSON_PARTS = 1_000_000
NO_BRACKETS, SQUARE = bytes(set(range(256)) - set(b"[]{}")), bytes.maketrans(b"{}", b"[]")
PLAIN_PATH = re.compile(r"(?:/[A-Za-z0-9_~:@-][A-Za-z0-9_.~:@-]*)+")
ESCAPE = re.compile("%[0-9A-Fa-f]{2}")


def too_deep(body: bytes) -> bool:
    """Whether JSON is nested beyond MAX_JSON_DEPTH, not even balanced, or of too many parts;
    each step is one linear pass, whatever the body."""
    opened = body.count(b"[") + body.count(b"{")
    if len(body) > MAX_JSON_PARTS and opened + body.count(b",") + body.count(b'"') // 2 > MAX_JSON_PARTS:
        return True
    if opened <= MAX_JSON_DEPTH:
        return False
    outside_strings = b"".join(body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    brackets = outside_strings.translate(SQUARE, NO_BRACKETS)
    if 2 * brackets.count(b"[") != len(brackets):
        return True
    for _ in range(MAX_JSON_DEPTH):
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


def unique(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    """Two parsers may disagree on which of two equal keys counts, so neither does."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("a number is out of range")
    return number


def no_constant(text: str) -> None:
    raise ValueError("%s is not JSON" % text)


PLAIN_JSON = json.JSONDecoder()
STRICT_JSON = json.JSONDecoder(object_pairs_hook=unique, parse_float=finite, parse_constant=no_constant)


def parse_json(body: bytes) -> Dict[str, Any]:
    """A JSON object in UTF-8, as RFC 8259 has it; BadRequest for anything else that json.loads would take or
    choke on."""
    if too_deep(body):
        raise BadRequest("The request body is nested too deeply, or not valid JSON")
    try:
        text = body.decode().strip(" \t\r\n")
        payload, end = STRICT_JSON.scan_once(text, 0)
        if end < len(text):
            raise ValueError("something follows")
    except (ValueError, StopIteration, RecursionError):
        raise BadRequest("The request body is not valid JSON") from None
    if not isinstance(payload, dict):
        raise BadRequest("The request body must be a JSON object")
    return payload


def fold_path(path: str) -> List[str]:
    """The segments of a path as the most forgiving upstream might read them: escapes decoded, again and
    again, back slashes turned, parameters, empty and dot segments dropped, lower case."""
    for _ in range(8):
        path, before = ESCAPE.sub(lambda match: chr(int(match[0][1:], 16)), path), path
        if path == before:
            break
    path = path.replace("\\", "/").lower()
    if any(re.split("[;?#]", segment)[0].strip() == ".." for segment in path.split("/")):
        raise BadRequest("The path must not contain dot segments")
    path = path.partition("?")[0].partition("#")[0]
    segments = [segment.partition(";")[0].strip() for segment in path.split("/")]
    return [segment for segment in segments if segment not in ("", ".")]


class Call:
    """One request, understood. `endpoint` is None where nothing is metered; then there is no payload either.
    `prefix` names the upstream where the path did. `model` is what the caller asked for, `wanted` what that stands
    for, and `served` what the upstream is asked for, with the body `outgoing`; `added` says that we ask for usage
    there, and the caller did not."""
    __slots__ = ("dialect", "endpoint", "free", "prefix", "path", "query", "payload", "body", "model", "wanted",
                 "served", "outgoing", "stream", "added")

    def __init__(self, dialect: "Dialect", endpoint: Optional[str], path: str, query: str,
                 prefix: Optional[str] = None):
        self.dialect, self.endpoint, self.prefix, self.path, self.query = dialect, endpoint, prefix, path, query
        self.free = endpoint in (None, "count")  # which is read for its model alone
        self.payload: Dict[str, Any] = {}
        self.body: Optional[bytes] = None
        self.outgoing: Optional[bytes] = None
        self.model: Optional[str] = None
        self.wanted = self.served = ""
        self.stream = self.added = False

    def aim(self, model: str, mend: Optional[Callable[[Dict[str, Any]], Dict[str, Any]]]) -> None:
        """Fit a call that was read to an upstream: `model` is the one to ask it for, and `mend` gives what else of
        the payload must differ there."""
        self.served, self.outgoing, self.added = model, self.body, False
        if self.dialect.MODEL_IN_PATH:
            before, _, last = self.path.rpartition("/")
            method = last.rpartition(":")[2]
            self.path = "%s/%s:%s" % (before, urllib.parse.quote(self.served, safe="@:"), method)
            return
        payload = self.payload
        if self.served and self.served != payload.get("model"):
            payload = {**payload, "model": self.served}
        if mend:
            payload = mend(payload)
        if payload is not self.payload:
            self.outgoing = compact(payload)

    def prompt_length(self) -> Tuple[int, int]:
        """-> characters of the prompt, and how many images and the like are in it. Where it is spelled in token
        ids, each stands for CHARACTERS_PER_TOKEN."""
        characters, media = text_length(self.payload, "model", is_media)
        for name in ("prompt", "input"):
            value = self.payload.get(name)
            if type(value) is list and value and type(value[0]) in (int, list):
                ids = [one for part in value for one in (part if type(part) is list else (part,))]
                characters += CHARACTERS_PER_TOKEN * sum([type(one) is int for one in ids])
        return characters, media

    def output_limit(self) -> Optional[int]:
        """The most output tokens the call asks for, None where it does not say; null counts as unsaid, as at
        OpenAI."""
        holder = self.payload
        if self.dialect.LIMIT_HOLDERS:
            holder = next((holder[name] for name in self.dialect.LIMIT_HOLDERS if holder.get(name)), {})
            if not isinstance(holder, dict):
                raise BadRequest("%s must be an object" % self.dialect.LIMIT_HOLDERS[0])
        for key in self.dialect.OUTPUT_LIMITS.get(self.endpoint, ()):
            limit = holder.get(key)
            if limit is not None:
                if type(limit) is not int or limit < 0:
                    raise BadRequest("%s must be an integer of at least 0" % key)
                return limit
        return None

    def add_usage(self) -> None:
        """Ask for the usage of a stream, unless the caller said whether it wants it."""
        options = self.payload.get("stream_options")
        if options is None and "stream_options" not in self.payload:
            # spliced in: nothing of what the caller wrote changes
            self.outgoing = b'{"stream_options":{"include_usage":true},' + self.outgoing.lstrip()[1:]
        elif isinstance(options, dict) and "include_usage" not in options:
            self.outgoing = compact({**json.loads(self.outgoing),
                                     "stream_options": {**options, "include_usage": True}})
        else:
            return
        self.added = True

    def asked_for_usage(self) -> bool:
        options = self.payload.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True


MEDIA_TYPES = frozenset((  # of parts of a prompt: what is in them is no text
    "image_url", "input_image", "image", "input_audio", "file", "input_file", "document", "video_url",
    "audio_url"))
MEDIA_KEYS = frozenset(("inlineData", "inline_data", "fileData", "file_data"))


def is_media(part: Dict[str, Any]) -> bool:
    kind = part.get("type")
    return (isinstance(kind, str) and kind in MEDIA_TYPES and "role" not in part) or (
        not MEDIA_KEYS.isdisjoint(part))


def compact(payload: Any) -> bytes:
    return json.dumps(payload, separators=(",", ":")).encode()


def number(counts: Any, *names: str) -> Optional[int]:
    """The first of these counts that is there and can be one."""
    if type(counts) is dict:
        for name in names:
            value = counts.get(name)
            if type(value) is int and 0 <= value < MOST_TOKENS:
                return value
    return None


def event_stream(events: List[Any], named: bool = False) -> bytes:
    """Server-sent events; `named` ones say their type in a line of its own."""
    return "".join([
        ("event: %s\n" % event["type"] if named else "")
        + "data: %s\n\n" % (event if isinstance(event, str) else json.dumps(event)) for event in events]).encode()


def random_name(prefix: str) -> str:
    return "%s%024x" % (prefix, random.getrandbits(96))


class Dialect:
    """What the dialects have in common. Each knows its API's wire names; nobody else does."""
    name = ""
    # the keys of the most output tokens by endpoint; the first that is set counts,
    OUTPUT_LIMITS: Dict[str, Tuple[str, ...]] = {}
    # in one of these objects, or in the payload itself
    LIMIT_HOLDERS: Tuple[str, ...] = ()
    CREDENTIAL = "Authorization: Bearer %s\r\n"  # how this API is shown a key
    VERSION_LINES: Tuple[str, ...] = ()          # what it wants to be told besides
    MODELS_QUERY = ""        # for a list of models that is whole
    MODEL_IN_PATH = False
    TAKES_COMMENTS = True    # its official clients do, in event streams
    SPOKEN = frozenset(("content", "reasoning_content", "reasoning", "refusal", "arguments", "text", "delta"))

    def error(self, refusal: Refusal, status: int) -> bytes:
        raise NotImplementedError

    def error_event(self, body: bytes) -> bytes:
        """An error in a stream that has begun; `body` is what it would be without one."""
        return b"data: %b\n\n" % body

    def models(self, names: List[str]) -> bytes:
        """The list of these."""
        raise NotImplementedError

    def limit_reply(self, call: Call, text: str, created: int) -> Optional[bytes]:
        """A whole answer in which the assistant says `text`: JSON, or an event stream when one was asked for;
        None where no assistant can speak."""
        raise NotImplementedError

    def limit_type(self, call: Call) -> str:
        return "text/event-stream" if call.stream else "application/json"

    def counts(self, payload: Dict[str, Any]) -> Tuple[Any, bool]:
        """-> what an answer or an event says of usage, in the API's own names, if anything; and whether nothing
        more will come."""
        raise NotImplementedError

    def usage(self, counts: Dict[str, Any]) -> Optional[Usage]:
        """None where `counts` says nothing."""
        raise NotImplementedError

    def spoken(self, payload: Any) -> int:
        """Characters that the model said in an answer or an event. Events that only repeat what others brought
        count nothing."""
        kind = payload.get("type") if isinstance(payload, dict) else None
        if isinstance(kind, str) and kind.startswith(("response.", "content_block_start")) and (
                not kind.endswith(".delta")):
            return 0
        characters, todo = 0, [payload]
        while todo:
            value = todo.pop()
            if isinstance(value, list):
                todo += value
            elif isinstance(value, dict):
                for name, part in value.items():
                    if isinstance(part, str):
                        characters += len(part) if name in self.SPOKEN else 0
                    else:
                        todo.append(part)
        return characters


STRUCTURED = ("json_schema", "json_object")  # answers that clients parse; a limit reply is none, and says so


class OpenAI(Dialect):
    """The OpenAI API and all that resembles it (https://platform.openai.com/docs/api-reference)."""
    name = "openai"
    OUTPUT_LIMITS = {"chat": ("max_completion_tokens", "max_tokens"), "completions": ("max_tokens",),
                     "responses": ("max_output_tokens",)}

    def error(self, refusal, status):
        return json.dumps({"error": {
            "message": str(refusal), "type": refusal.kind, "param": None, "code": refusal.code}}).encode()

    def models(self, names):
        rows = [{"id": name, "object": "model", "created": 0, "owned_by": "llm-proxy"} for name in names]
        return json.dumps({"object": "list", "data": rows}).encode()

    def counts(self, payload):
        response = payload.get("response")  # in the last event of the responses API
        return (response if isinstance(response, dict) else payload).get("usage"), True

    def usage(self, counts):
        prompt, output, total = map(counts.get, ("prompt_tokens", "completion_tokens", "total_tokens"))
        if (len(counts) == 3 and type(prompt) is type(output) is type(total) is int
                and 0 <= prompt and 0 <= output and prompt + output == total < MOST_TOKENS):
            return Usage(prompt, output)  # what most servers tell
        prompt, total = number(counts, "prompt_tokens", "input_tokens"), number(counts, "total_tokens")
        output = number(counts, "completion_tokens", "output_tokens") or 0
        if prompt is None:
            if total is None:
                return None
            prompt = max(0, total - output)
        elif total is not None and total > prompt + output:
            output = total - prompt  # some count reasoning in the total alone
        taken = counts.get("prompt_tokens_details") or counts.get("input_tokens_details")
        given = counts.get("completion_tokens_details") or counts.get("output_tokens_details")
        cached = number(taken, "cached_tokens") or number(counts, "prompt_cache_hit_tokens") or 0
        cached = min(cached, prompt)
        written = min(number(taken, "cache_write_tokens") or 0, prompt - cached)
        return Usage(prompt, output, cached, written, min(number(given, "reasoning_tokens") or 0, output))

    def limit_reply(self, call, text, created):
        if call.endpoint == "responses":
            return self.response(call, text, created)
        if call.endpoint not in ("chat", "completions"):
            return None
        chat, payload = call.endpoint == "chat", call.payload
        usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        common = {"id": random_name("chatcmpl-limit-" if chat else "cmpl-limit-"),
                  "created": created, "object": "chat.completion" if chat else "text_completion",
                  "model": call.model or call.served}
        message = {"role": "assistant", "content": text}
        shape = payload.get("response_format")
        if isinstance(shape, dict) and shape.get("type") in STRUCTURED:
            message["refusal"] = text  # tells SDKs that parse the content not to: this is no such JSON
        if not call.stream:
            choice = {"message": message} if chat else {"text": text}
            return json.dumps({**common, "usage": usage, "choices": [
                {"index": index, **choice, "logprobs": None, "finish_reason": "stop"}
                for index in self.choices(payload)]}).encode()
        if chat:
            common["object"] = "chat.completion.chunk"
            steps = [({"delta": {"role": "assistant", "content": ""}}, None),
                     ({"delta": {**message}}, None),
                     ({"delta": {}}, "stop")]
            del steps[1][0]["delta"]["role"]
        else:
            steps = [({"text": text}, None), ({"text": ""}, "stop")]
        chunks = [{**common, "choices": [{"index": index, **step, "logprobs": None, "finish_reason": reason}]}
                  for step, reason in steps for index in self.choices(payload)]
        if call.asked_for_usage():
            chunks = ([{**chunk, "usage": None} for chunk in chunks]
                      + [{**common, "choices": [], "usage": usage}])
        return event_stream(chunks + ["[DONE]"])

    @staticmethod
    def choices(payload: Dict[str, Any]) -> range:
        """As many as were asked for, for clients that count on it."""
        count, prompt = payload.get("n"), payload.get("prompt")
        prompts = len(prompt) if isinstance(prompt, list) and all(
            isinstance(one, (str, list)) for one in prompt) else 1
        return range(max(1, min(128, (count if type(count) is int else 1) * prompts)))

    @staticmethod
    def response(call: Call, text: str, created: int) -> bytes:
        """The responses API's limit reply; streamed, with all the events of a real one."""
        options = call.payload.get("text")
        shape = options.get("format") if isinstance(options, dict) else None
        if isinstance(shape, dict) and shape.get("type") in STRUCTURED:
            part, kind, key, more = {"type": "refusal", "refusal": text}, "refusal", "refusal", {}
        else:
            part, kind, key, more = ({"type": "output_text", "text": text, "annotations": [], "logprobs": []},
                                     "output_text", "text", {"logprobs": []})
        item = {"type": "message", "id": random_name("msg_limit_"), "role": "assistant", "status": "completed",
                "content": [part]}
        whole_response = {
            "id": random_name("resp_limit_"), "object": "response", "created_at": created, "status": "completed",
            "model": call.model or call.served, "output": [item], "error": None, "incomplete_details": None,
            "instructions": None, "metadata": {}, "parallel_tool_calls": True, "temperature": None,
            "tool_choice": "auto", "tools": [], "top_p": None, "previous_response_id": None,
            "usage": {"input_tokens": 0, "output_tokens": 0,
                      "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                      "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 0}}
        if not call.stream:
            return json.dumps(whole_response).encode()
        begun = {**whole_response, "status": "in_progress", "output": [], "usage": None}
        place = {"output_index": 0, "item_id": item["id"], "content_index": 0}
        events = [
            ("created", {"response": begun}), ("in_progress", {"response": begun}),
            ("output_item.added", {"output_index": 0, "item": {**item, "status": "in_progress", "content": []}}),
            ("content_part.added", {**place, "part": {**part, key: ""}}),
            (kind + ".delta", {**place, **more, "delta": text}), (kind + ".done", {**place, **more, key: text}),
            ("content_part.done", {**place, "part": part}),
            ("output_item.done", {"output_index": 0, "item": item}), ("completed", {"response": whole_response})]
        return event_stream([{"type": "response." + name, "sequence_number": index, **event}
                             for index, (name, event) in enumerate(events)], named=True)


class Anthropic(Dialect):
    """The Anthropic messages API (https://docs.anthropic.com/en/api/messages)."""
    name = "anthropic"
    OUTPUT_LIMITS = {"messages": ("max_tokens",)}
    CREDENTIAL = "x-api-key: %s\r\n"
    VERSION_LINES, MODELS_QUERY = ("anthropic-version: 2023-06-01",), "limit=1000"
    SPOKEN = frozenset(("text", "thinking", "partial_json"))
    ERRORS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
              413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}

    def error(self, refusal, status):
        kind = self.ERRORS.get(status, "invalid_request_error" if status < 500 else "api_error")
        return json.dumps({"type": "error", "error": {"type": kind, "message": str(refusal)}}).encode()

    def error_event(self, body):
        return b"event: error\ndata: %b\n\n" % body

    def models(self, names):
        rows = [{"type": "model", "id": name, "display_name": name, "created_at": "1970-01-01T00:00:00Z"}
                for name in names]
        return json.dumps({"data": rows, "has_more": False, "first_id": names[0] if names else None,
                           "last_id": names[-1] if names else None}).encode()

    def counts(self, payload):
        """message_start tells the input; the last message_delta, which is cumulative, the rest."""
        message = payload.get("message")
        if payload.get("type") == "message_start" and isinstance(message, dict):
            return message.get("usage"), False
        return payload.get("usage"), True

    def usage(self, counts):
        plain, output = number(counts, "input_tokens"), number(counts, "output_tokens")
        if plain is None and output is None:
            return None
        read = number(counts, "cache_read_input_tokens") or 0
        written = number(counts, "cache_creation_input_tokens") or 0
        thinking = number(counts.get("output_tokens_details"), "thinking_tokens") or 0
        return Usage((plain or 0) + read + written, output or 0, read, written, min(thinking, output or 0))

    def limit_reply(self, call, text, created):
        options = call.payload.get("output_config")
        if call.payload.get("output_format") or (isinstance(options, dict) and options.get("format")):
            return None  # the client would parse it, and there is no other way to say no
        message = {
            "id": random_name("msg_limit_"), "type": "message", "role": "assistant",
            "model": call.model or call.served, "content": [{"type": "text", "text": text}],
            "stop_reason": "end_turn", "stop_sequence": None, "usage": {"input_tokens": 0, "output_tokens": 0}}
        if not call.stream:
            return json.dumps(message).encode()
        return event_stream([
            {"type": "message_start", "message": {**message, "content": [], "stop_reason": None}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}},
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None},
             "usage": {"output_tokens": 0}},
            {"type": "message_stop"}], named=True)


class Gemini(Dialect):
    """The Gemini API (https://ai.google.dev/api/generate-content). The model stands in the path, and so does
    whether to stream; a stream without ?alt=sse is a JSON array."""
    name = "gemini"
    OUTPUT_LIMITS = {"generate": ("maxOutputTokens", "max_output_tokens")}
    LIMIT_HOLDERS = ("generationConfig", "generation_config")
    CREDENTIAL = "x-goog-api-key: %s\r\n"
    MODEL_IN_PATH = True
    TAKES_COMMENTS = False  # google-genai takes them for data, and fails
    SPOKEN = frozenset(("text",))
    ERRORS = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND",
              429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 504: "DEADLINE_EXCEEDED"}
    METHODS = {"generateContent": False, "streamGenerateContent": True, "embedContent": False,
               "batchEmbedContents": False}  # -> whether it streams

    def error(self, refusal, status):
        kind = self.ERRORS.get(status, "INVALID_ARGUMENT" if status < 500 else "UNAVAILABLE")
        return json.dumps({"error": {"code": status, "message": str(refusal), "status": kind}}).encode()

    def models(self, names):
        return json.dumps({"models": [{"name": "models/" + name, "displayName": name} for name in names]}).encode()

    def counts(self, payload):
        """Every event tells what was used so far; the one that says why it ended tells it all."""
        candidates = payload.get("candidates")
        return payload.get("usageMetadata"), isinstance(candidates, list) and any(
            "finishReason" in one for one in candidates if isinstance(one, dict))

    def usage(self, counts):
        prompt = number(counts, "promptTokenCount")
        if prompt is None:
            return None
        prompt += number(counts, "toolUsePromptTokenCount") or 0
        thoughts = number(counts, "thoughtsTokenCount") or 0
        return Usage(prompt, (number(counts, "candidatesTokenCount") or 0) + thoughts,
                     min(prompt, number(counts, "cachedContentTokenCount") or 0), 0, thoughts)

    def limit_reply(self, call, text, created):
        if call.endpoint != "generate":
            return None
        answer = {
            "candidates": [{"content": {"parts": [{"text": text}], "role": "model"}, "finishReason": "STOP",
                            "index": 0}],
            "usageMetadata": {"promptTokenCount": 0, "candidatesTokenCount": 0, "totalTokenCount": 0},
            "modelVersion": call.model or call.served, "responseId": random_name("limit-")}
        if self.limit_type(call) == "text/event-stream":
            return event_stream([answer])
        return json.dumps([answer] if call.stream else answer).encode()

    def limit_type(self, call):
        events = call.stream and "alt=sse" in call.query.lower().split("&")
        return "text/event-stream" if events else "application/json"


DIALECTS: Dict[str, Dialect] = {dialect.name: dialect for dialect in (OpenAI(), Anthropic(), Gemini())}


ONE_MODEL = re.compile("(/v1(?:beta)?/models/)([A-Za-z0-9_.@-]+)")
OPENAI_AT_GEMINI = "/v1beta/openai/"  # https://ai.google.dev/gemini-api/docs/openai


class Dialects:
    """Finds the dialect, and the endpoint, of a request, and reads it. What any upstream could take for a metered
    endpoint is that endpoint, under its plain name; what cannot be named plainly is refused."""
    # An upstream in Go would take "MODEL" for "model", and we would have read another one.
    READ_KEYS = frozenset(("model", "stream", "stream_options", "max_tokens", "max_completion_tokens",
                           "max_output_tokens"))
    MAX_MODEL = 256
    METERED = {"/v1/chat/completions": "chat", "/v1/completions": "completions", "/v1/responses": "responses",
               "/v1/messages": "messages", "/v1/embeddings": "other"}
    LAST = {"completions": "completions", "responses": "responses", "messages": "messages", "embeddings": "other",
            "rerank": "other", "generations": "other"}

    GEMINI_METHODS = {method.lower() for method in Gemini.METHODS}

    def __init__(self, aliases: Dict[str, str], names: Dict[str, str]):
        """`aliases` of models; `names` of upstreams, with the dialect of each."""
        self.aliases, self.names = aliases, names
        self.openai, self.anthropic, self.gemini = map(DIALECTS.get, ("openai", "anthropic", "gemini"))

    def split(self, path: str) -> Tuple[Optional[str], str]:
        """-> the upstream that a path names by its first segment, and the path without it."""
        name = path[1:].partition("/")[0]
        return (name, path[len(name) + 1:] or "/") if name in self.names else (None, path)

    def guess(self, request: Any) -> Dialect:
        """For what is not metered: the shape of errors, and the header of our key."""
        if request is not None:
            prefix, path = self.split(request.path)
            rows, path = request.head.rows, path.lower()
            before, messages, _ = path.partition("/messages")
            if "anthropic-version" in rows or (messages and "/threads" not in before):
                return self.anthropic
            google = "x-goog-api-key" in rows and "authorization" not in rows
            beta = path.startswith("/v1beta/") and not path.startswith(OPENAI_AT_GEMINI)
            if google or beta or path.rpartition(":")[2] in self.GEMINI_METHODS:
                return self.gemini
            if prefix and "authorization" not in rows:
                return DIALECTS[self.names[prefix]]
        return self.openai

    def endpoint(self, method: str, path: str) -> Tuple[Optional[str], str]:
        """-> (which endpoint, None for one that is not metered; the path to use)."""
        if method == "POST" and path in self.METERED:
            return self.METERED[path], path
        if PLAIN_PATH.fullmatch(path):
            segments = path.lower().split("/")[1:]
        else:
            segments = fold_path(path)
            if any(" " > letter or letter == "\x7f" for segment in segments for letter in segment):
                raise BadRequest("The path must not contain control characters")
        last = segments[-1] if segments and method == "POST" else ""
        if self.names and re.search("(^count_|:count)tokens$", last) and PLAIN_PATH.fullmatch(path):
            return "count", path
        if ":" in last and last.rpartition(":")[2] in self.GEMINI_METHODS:
            if not PLAIN_PATH.fullmatch(path) or path.rpartition(":")[2] not in Gemini.METHODS:
                raise BadRequest("The path must be spelled plainly")
            return ("embed" if "embed" in last.rpartition(":")[2] else "generate"), path
        endpoint = "other" if segments[-2:] == ["responses", "compact"] else self.LAST.get(last)
        if not endpoint or (endpoint == "messages" and segments[-3:-2] == ["threads"]):
            return None, path
        tail = "/chat/completions" if segments[-2:] == ["chat", "completions"] else "/" + last
        plain = path if path.endswith(tail) else "/" + "/".join(segments)
        if not PLAIN_PATH.fullmatch(plain):
            raise BadRequest("The path must be spelled plainly")
        return ("chat" if tail == "/chat/completions" else endpoint), plain

    def read(self, request: Any, body: Callable[[], Any]) -> Any:
        """Understand a request; -> the Call. `body` is only called, and the payload only parsed, where the call is
        metered; it may yield while it waits."""
        endpoint, path = self.endpoint(request.method, request.path)
        prefix, path = self.split(path) if self.names else (None, path)
        query = split_query(request.query)[1] if request.query else ""
        if endpoint is None:
            call = Call(self.guess(request), None, path, query, prefix)
            named = ONE_MODEL.fullmatch(path) if self.names and request.method == "GET" else None
            if named:
                call.model, call.wanted = named[2], self.aliases.get(named[2], named[2])
                call.path = named[1] + urllib.parse.quote(call.wanted, safe="@")
            return call
        if endpoint == "count":
            dialect = self.gemini if ":" in path else self.anthropic
        else:
            dialect = (self.anthropic if endpoint == "messages" else
                       self.gemini if endpoint in ("generate", "embed") else self.openai)
        call = Call(dialect, endpoint, path, query, prefix)
        call.body = yield from body()
        call.payload = payload = parse_json(call.body)
        for key in payload.keys() - self.READ_KEYS:
            if key.casefold() in self.READ_KEYS:
                raise BadRequest("The key %s must be spelled in lower case" % key.casefold())
        if call.dialect.MODEL_IN_PATH:  # .../models/MODEL:METHOD
            asked, _, method = path.rpartition("/")[2].rpartition(":")
            call.stream = Gemini.METHODS.get(method, False)
        else:
            asked, call.stream = payload.get("model"), payload.get("stream") is True
        if isinstance(asked, str):
            if len(asked) > self.MAX_MODEL:
                raise BadRequest("The name of the model is too long")
            call.model, call.wanted = asked, self.aliases.get(asked, asked)
        return call


WORDLESS = (None, "count", "other", "embed")  # endpoints at which no assistant speaks
USAGE_KEY = re.compile(rb'"(usage(?:Metadata)?)"\s*:\s*\{')
SPOKEN_TEXT = re.compile(r'"(?:%s)"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"' % "|".join(sorted(OpenAI.SPOKEN)))
NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
EVENT_END = re.compile(rb"\r?\n\r?\n")


class Listener:
    """Hears a copy of an answer on its way past, and understands it when it has ended. Whole JSON is kept up to
    MAX_JSON, then its end alone; events are kept up to MAX_EVENTS, then taken in. `hiding` keeps the one event
    from the caller that it did not ask for."""
    MAX_JSON, JSON_END, MAX_EVENTS, MAX_HELD = 1 << 18, 8192, 65536, 16384

    size = characters = 0
    final = dropped = False
    held = b""
    density: Optional[float] = None  # characters of text per byte of events
    counts: Optional[Dict[str, Any]] = None

    def __init__(self, call: Call, streamed: bool, readable: bool):
        self.dialect, self.endpoint, self.streamed, self.readable = call.dialect, call.endpoint, streamed, readable
        self.hiding = streamed and call.added
        self.pieces: List[bytes] = []
        self.room = self.MAX_EVENTS if streamed else self.MAX_JSON

    def feed(self, payload: bytes) -> bytes:
        """-> what of it goes on to the caller."""
        self.pieces.append(payload)
        self.size += len(payload)
        if self.size > self.room:
            self.digest()
        return self.hide(payload) if self.hiding else payload

    def rest(self) -> bytes:
        """What is still held back at the end."""
        held, self.held = self.held, b""
        return b"" if held and self.is_ours(held) else held  # its last line end may be missing

    def hide(self, payload: bytes) -> bytes:
        """An event is held back until its end is here: nobody could have used it before."""
        data = self.held + payload if self.held else payload
        if data.endswith(b"\n\n") and (b'"usage' not in data or not NO_CHOICES.search(data)):  # as nearly all
            self.held = b""
            return data
        end = max(data.rfind(b"\n\n") + 2, data.rfind(b"\r\n\r\n") + 4)
        end = 0 if end < 4 else end
        self.held = data[end:]
        if len(self.held) > self.MAX_HELD:
            end, self.held = len(data), b""
        passing, start = [], 0
        for match in EVENT_END.finditer(data, 0, end):
            event = data[start:match.end()]
            if not (NO_CHOICES.search(event) and USAGE_KEY.search(event) and self.is_ours(event)):
                passing.append(event)
            start = match.end()
        return b"".join(passing) + data[start:end]

    @staticmethod
    def is_ours(event: bytes) -> bool:
        found = parse_event(event)
        return found.get("choices") == [] and isinstance(found.get("usage"), dict)

    def digest(self) -> None:
        """Take in what was kept, all but an event that is not whole, or the end of a large JSON body."""
        data = b"".join(self.pieces)
        if self.streamed:
            end = data.rfind(b"\n") + 1
            self.take_in(data[:end])
            if self.density is None:  # the rest of a long stream will be like its beginning
                self.density = self.count(data[:end]) / end if end else None
            self.characters += int(end * (self.density or 0))
            data = data[end:]
        if len(data) > self.MAX_JSON:  # what is so large is no text: pictures
            data, self.dropped = data[-self.JSON_END:], True
        self.pieces, self.size = [data], len(data)
        if self.streamed:
            self.room = self.MAX_EVENTS + 2 * len(data)

    def take_in(self, data: bytes) -> None:
        """Find the events that tell usage: the first and the last, for those that tell it in parts or more than
        once."""
        if b'"usage' not in data:  # far sooner known than by an expression
            return
        found = [match.start() for match in USAGE_KEY.finditer(data)]
        for start in found[:1] + found[1:][-1:]:
            end = data.find(b"\n", start)
            line = data[data.rfind(b"\n", 0, start) + 1:end if end >= 0 else len(data)]
            self.note(parse_event(line) or usage_of_json(line))

    def note(self, payload: Dict[str, Any]) -> None:
        counts, final = self.dialect.counts(payload)
        if type(counts) is dict:
            if self.counts:  # what is told later adds to what was told before
                counts = {**self.counts, **{name: value for name, value in counts.items() if value is not None}}
            self.counts, self.final = counts, final

    def told(self, whole: bool) -> Tuple[Optional[Usage], bool]:
        """-> the usage that was told, if it was; and whether nothing is missing from it. What an answer that is not
        `whole` tells is believed of events alone: in JSON it could be anybody's."""
        if self.readable and (whole or self.streamed):
            data = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
            self.pieces = [data]
            if self.streamed:
                self.take_in(data)
            else:
                self.note(usage_of_json(data))
        usage = self.dialect.usage(self.counts) if self.counts else None
        return usage, usage is not None and (whole or self.final)

    def spoken(self) -> int:
        """Characters of text that passed."""
        data = b"".join(self.pieces)
        self.pieces, self.size = [], 0
        if self.endpoint in WORDLESS:  # numbers and pictures are no text
            return 0
        self.characters += 0 if self.dropped else self.count(data) if self.readable else len(data)
        return self.characters

    def count(self, data: bytes) -> int:
        if self.streamed:
            if self.endpoint in ("chat", "completions"):
                return spoken_in_chunks(data)
            return sum([self.dialect.spoken(parse_event(line)) for line in data.split(b"\n")
                        if line[:5] == b"data:"])
        try:
            return self.dialect.spoken(parse_answer(data))
        except (ValueError, RecursionError):
            return len(data)


def spoken_in_chunks(data: bytes) -> int:
    """As OpenAI.spoken, for all chunks at once: when many streams end together, parsing each would hold up those
    that still run."""
    texts = SPOKEN_TEXT.findall(data.decode("utf-8", "replace"))
    return sum(map(len, texts)) - sum([len(text) - len(unescape(text)) for text in texts if "\\" in text])


def unescape(text: str) -> str:
    try:
        return json.loads('"%s"' % text)
    except ValueError:
        return text


def parse_answer(data: bytes) -> Any:
    """JSON from upstream. Raises ValueError; a parser that recurses must not end the process."""
    if too_deep(data):
        raise ValueError("nested too deeply")
    return json.loads(data)


def parse_event(event: bytes) -> Dict[str, Any]:
    """The JSON object in an event's data line; {} where there is none."""
    start = event.find(b"data:")
    line_end = event.find(b"\n", start)
    try:
        found = parse_answer(event[start + 5:line_end if line_end >= 0 else len(event)])
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def usage_of_json(data: bytes) -> Dict[str, Any]:
    """The answer, or as much of it as tells its usage. An object that ends where the answer ends, but for its
    last brace, is one of the answer's own values, so most need not be parsed whole."""
    start, match = len(data), None
    while not match:
        start = data.rfind(b'"usage', 0, start)
        if start < 0:
            return {}
        match = USAGE_KEY.match(data, start)
    tail, told = data[match.end() - 1:], {}
    if tail.count(b"{") + tail.count(b"[") <= MAX_JSON_DEPTH:
        try:
            text = tail.decode()
            counts, end = PLAIN_JSON.scan_once(text, 0)
        except (ValueError, StopIteration, RecursionError):
            return {}
        told = {match[1].decode(): counts}
        if text.endswith("}", end) and (len(text) == end + 1 or not text[end:-1].strip()):
            return told
    try:
        answer = parse_answer(data)
    except (ValueError, RecursionError):
        return told  # only its end was kept, or it was cut
    if isinstance(answer, list) and answer:  # Gemini's stream
        answer = answer[-1]
    return answer if isinstance(answer, dict) else {}


# ------------------------------------------------------------------------------------------------------------
# Wire: HTTP/1.1 in bytes, strict, one parser for both sides (RFC 9110, RFC 9112). Heads are matched whole or
# not at all; bodies are followed through their framing. It does not know what an LLM is.
# ------------------------------------------------------------------------------------------------------------

MAX_HEAD = 65536        # bytes of one head
MAX_LINE = 8192         # bytes of one line of it
MAX_FIELDS = 100        # fields of one head
MAX_AHEAD = 65536       # bytes that are read ahead of a caller while its answer is running
MAX_CHUNK_LINE = 1024   # bytes of a chunk's size and extensions
MAX_TRAILERS = 8192     # bytes of fields after the last chunk; they are read and dropped
BLOCK = 16384           # bytes to read at once: PyPy pays for what it could have read

TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
REQUEST_LINE = re.compile(r"([A-Z][A-Z_-]{0,31}) ([!-~]+) HTTP/1\.([01])")
STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([\t -~\x80-\xff]*))?")
FIELD_LINES = re.compile(r"(?:%s:[\t -~\x80-\xff]*\r\n)*" % TOKEN)
BARE_LINE_END = re.compile(rb"(?:[^\r]|^)\n|\r[^\n]")
HOST = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t -~\x80-\xff]*)?\r\n")
CHUNK_LINE_START = re.compile(rb"[0-9A-Fa-f]{0,16}(?:(?<=[0-9A-Fa-f])[ \t]*(?:;[\t -~\x80-\xff]*)?)?\r?")
TRAILER_LINES = re.compile(FIELD_LINES.pattern.encode("latin-1"))
TRAILERS = re.compile(TRAILER_LINES.pattern + rb"\r\n")
LAST_CHUNK = b"0\r\n\r\n"

HOP_BY_HOP = frozenset((  # RFC 9110 7.6.1: they speak of one connection, not of the message
    "close", "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection",
    "te", "trailer", "transfer-encoding", "upgrade"))
SINGLE = frozenset((      # a second one would leave the choice to whoever reads it next
    "host", "content-length", "transfer-encoding", "authorization", "x-api-key", "expect"))

READ, WRITE = getattr(select, "POLLIN", 1), getattr(select, "POLLOUT", 4)
WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
# Linux tells of hang-ups without being read from, and bounds a read's time by itself (socket(7), epoll_ctl(2)).
PATIENT = hasattr(select, "epoll") and hasattr(socket, "MSG_DONTWAIT") and struct.calcsize("l") == 8
HANGUP = 0x2000  # EPOLLRDHUP and POLLRDHUP: PyPy has no names for them


if hasattr(select, "poll"):
    def ready(wait: float, *wanted: Tuple[int, int]) -> Dict[int, int]:
        """Wait for at most `wait` seconds until one of (descriptor, READ | WRITE | 0) is ready; ->
        {descriptor: for what}. Errors and hang-ups show as further bits, asked for or not."""
        poller = select.poll()
        for descriptor, events in wanted:
            poller.register(descriptor, events)
        return dict(poller.poll(int(wait * 1000) + 1 if wait > 0 else 0))

    def reader(descriptor: int) -> Callable[[int], Any]:
        """-> a function that waits for so many milliseconds until there is something to read."""
        poller = select.poll()
        poller.register(descriptor, READ)
        return poller.poll
else:
    def ready(wait: float, *wanted: Tuple[int, int]) -> Dict[int, int]:
        """As above, where there is only select()."""
        reading, writing, failed = select.select(
            [descriptor for descriptor, events in wanted if events & READ],
            [descriptor for descriptor, events in wanted if events & WRITE],
            [descriptor for descriptor, _ in wanted], max(0, wait))
        found = {
            descriptor: (READ if descriptor in reading or descriptor in failed else 0)
            | (WRITE if descriptor in writing else 0)
            for descriptor, _ in wanted}
        return {descriptor: events for descriptor, events in found.items() if events}

    def reader(descriptor: int) -> Callable[[int], Any]:
        return lambda milliseconds: ready(milliseconds / 1000, (descriptor, READ))


class Connection:
    """A socket, and the bytes read from it that nobody has used yet. Nothing but `listen` and `readable` ever
    blocks."""
    __slots__ = ("sock", "descriptor", "ahead", "encrypted", "patient", "flags", "step", "dropping", "poll", "act",
                 "events")
    STEP = 15  # seconds; Linux lets longer timeouts pass by seconds, as much as an eighth of them

    def __init__(self, sock: socket.socket):
        self.poll: Any = None
        self.sock, self.descriptor, self.ahead = sock, sock.fileno(), b""
        self.dropping = False  # nobody will ever use what comes: the rest of a refused body
        self.act: Optional[Callable[[int], None]] = None  # what the Relay calls when it stirs,
        self.events = 0                                   # and for which of READ and WRITE it asks the system
        self.encrypted = isinstance(sock, ssl.SSLSocket)
        self.patient = PATIENT and not self.encrypted  # can wait and read in one system call
        self.flags, self.step = socket.MSG_DONTWAIT if self.patient else 0, None
        sock.setblocking(self.patient)

    def readable(self, wait: float) -> bool:
        """Wait for at most `wait` seconds for something to read, an end or an error."""
        if self.poll is None:
            self.poll = reader(self.descriptor)
        return bool(self.poll(int(wait * 1000) + 1 if wait > 0 else 0))

    def listen(self, seconds: float, clock: Any) -> bool:
        """Wait for the next bytes and read them into `ahead`, which is empty; False at the end of the stream.
        Raises TimeoutError after `seconds`."""
        step, end = min(seconds, self.STEP), None
        while True:
            if step != self.step:
                self.step = step
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack(
                    "ll", int(step), int(step % 1 * 1e6)))
            try:
                self.ahead = self.sock.recv(BLOCK)
                return bool(self.ahead)
            except BlockingIOError:
                now = clock.monotonic()
                end = now + seconds - step if end is None else end
                if now >= end:
                    raise TimeoutError() from None
                step = max(0.001, min(end - now, self.STEP))

    def receive(self) -> bytes:
        """What has arrived, b"" at the end. Raises one of WOULD_BLOCK when nothing has."""
        data = self.sock.recv(BLOCK, self.flags)
        # decrypted bytes in wait make no descriptor ready
        while self.encrypted and data and self.sock.pending():
            data += self.sock.recv(BLOCK)
        return data

    def send(self, data: Any) -> Any:
        """Send what can be sent now; -> the rest. Raises one of WOULD_BLOCK when nothing can."""
        sent = self.sock.send(data, self.flags)
        return memoryview(data)[sent:] if sent < len(data) else b""

    def fill(self) -> bool:
        """Read what has arrived into `ahead`; False at the end of the stream."""
        try:
            data = self.receive()
        except WOULD_BLOCK:
            return True
        self.ahead = b"" if self.dropping else self.ahead + data
        return bool(data)

    def take(self) -> bytes:
        """What was read ahead."""
        ahead, self.ahead = self.ahead, b""
        return ahead

    def close(self) -> None:
        self.sock.close()


class Head:
    """A start line and header fields. `rows`: lower-case name -> the line as it came, ready to be passed on;
    lines of the same name are joined by their line end. `options` are those of Connection. `derived` is room
    for what others derive from the head alone."""
    __slots__ = ("start", "rows", "options", "shape", "derived")

    def __init__(self, data: bytes):
        """`data` runs from the start line through the blank line. Raises Malformed."""
        self.shape, self.derived = shape(data), {}
        self.start, _, block = data[:-2].decode("latin-1").partition("\r\n")
        if not FIELD_LINES.fullmatch(block):
            raise Malformed()
        lines = block.split("\r\n")
        lines.pop()
        if len(data) > MAX_LINE and max(map(len, [self.start] + lines)) > MAX_LINE:
            raise TooLargeHead(414 if len(self.start) > MAX_LINE else 431)
        self.rows = {row[:row.index(":")].lower(): row for row in lines}
        if len(self.rows) < len(lines):
            self.rows = self.joined(lines)
        if len(lines) > MAX_FIELDS:
            raise TooLargeHead(431)
        self.options = ()
        if "connection" in self.rows:
            self.options = [option.strip(" \t") for option in self.get("connection").lower().split(",")]

    @staticmethod
    def joined(lines: List[str]) -> Dict[str, str]:
        rows: Dict[str, str] = {}
        for row in lines:
            name = row[:row.index(":")].lower()
            if name in rows:
                if name in SINGLE:
                    raise Malformed()
                row = rows[name] + "\r\n" + row
            rows[name] = row
        return rows

    def get(self, name: str, default: Optional[str] = None) -> Optional[str]:
        """The value of a field; repeated ones are joined by ", " (RFC 9110 5.3)."""
        rows = self.rows.get(name)
        if rows is None:
            return default
        if "\r\n" in rows:
            return ", ".join([row.partition(":")[2].strip(" \t") for row in rows.split("\r\n")])
        return rows.partition(":")[2].strip(" \t")

    def end_to_end(self, without: frozenset) -> List[str]:
        """The lines to pass on: not those of this connection, nor those it names as such, nor `without`."""
        dropped = without.union(self.options) if self.options and self.options != ["keep-alive"] else without
        return [row for name, row in self.rows.items() if name not in dropped]

    @staticmethod
    def length(text: str) -> int:
        """1*DIGIT (RFC 9110 8.6), and no more of them than make sense."""
        if len(text) < 16 and text.isdigit() and text.isascii():  # isdigit alone would take superscripts
            return int(text)
        raise Malformed()

    def content_length(self) -> Optional[int]:
        return self.length(self.get("content-length")) if "content-length" in self.rows else None


def length_like(last: Optional[Head], data: bytes) -> Optional[int]:
    """The length in `data`, where that differs from the head `last` in nothing else; -1 where neither has one,
    None where they differ. Either side sends the same head again and again, but for that: what was checked once
    need not be checked again. The length stands in the same place; one more beside another framing would be a door
    for smuggling."""
    if last is not None:
        before, behind = last.shape
        if not behind:
            return -1 if data == before else None
        if data.startswith(before) and data.endswith(behind):
            length = data[len(before):-len(behind)]
            if length.isdigit() and len(length) < 16:
                return int(length)
    return None


def shape(data: bytes) -> Tuple[bytes, bytes]:
    """What stands before and behind the length, for length_like; all, and nothing, where it is not spelled as
    usual."""
    start = max(data.find(b"\r\nContent-Length: "), data.find(b"\r\ncontent-length: ")) + 18
    end = data.find(b"\r\n", start)
    return (data[:start], data[end:]) if start > 18 and data[start:end].isdigit() else (data, b"")


def read_head(connection: Connection, start_line: Any, more: Callable[..., bool], *arguments: Any) -> Optional[bytes]:
    """-> the bytes of one head, blank line included; None if the stream ends before its first byte. `more`, called
    with `arguments`, reads on, and is False at the end. What can no longer become a head that begins with
    `start_line` is Malformed at once."""
    if not connection.ahead and not more(*arguments):
        return None
    checked = scanned = 0  # bytes of whole lines that were judged; bytes that were looked at
    while True:
        ahead = connection.ahead
        end = ahead.find(b"\r\n\r\n", max(0, checked - 2)) + 4
        if 4 <= end <= MAX_HEAD:
            connection.ahead = ahead[end:]
            return ahead[:end]
        line_end = ahead.find(b"\r\n", max(checked, scanned - 1))
        if len(ahead) > MAX_HEAD or (line_end < 0 and len(ahead) - checked > MAX_LINE):
            raise TooLargeHead(431 if checked else 414)
        if BARE_LINE_END.search(ahead, max(0, scanned - 1)):
            raise Malformed()
        scanned = len(ahead)
        lines = ahead[checked:ahead.rfind(b"\r\n") + 2].decode("latin-1") if line_end >= 0 else ""
        if lines and not checked:
            start, _, lines = lines.partition("\r\n")
            if not start_line.fullmatch(start):
                raise Malformed()
            checked = len(start) + 2
        if not FIELD_LINES.fullmatch(lines):
            raise Malformed()
        checked += len(lines)
        if not more(*arguments):
            raise Malformed()


class Request:
    """A request head that every RFC 9112 reader would read the same way. `path` and `query` come from its
    target; `length` is None for a chunked body."""
    __slots__ = ("head", "method", "path", "query", "version", "length", "closing")

    def __init__(self, data: bytes):
        self.head = head = Head(data)
        match = REQUEST_LINE.fullmatch(head.start)
        if not match:
            raise Malformed(status=self.odd_start(head.start))
        self.method, target, self.version = match[1], match[2], int(match[3])
        host = head.get("host")
        if (host is None and self.version) or not HOST.fullmatch(host or ""):
            raise Malformed()
        if target[0] != "/" or "#" in target:
            target = self.origin_form(target, host)
        self.path, _, self.query = target.partition("?")
        self.length = self.body_length()
        self.closing = not self.version or "close" in head.options

    @classmethod
    def read(cls, data: bytes, last: Optional["Request"]) -> "Request":
        """`last` again, where `data` differs from it in nothing but the length."""
        length = length_like(last and last.head, data)
        if length is None:
            last = cls(data)
        elif length >= 0:
            last.length = length
        return last

    @staticmethod
    def odd_start(start: str) -> int:
        return 505 if re.fullmatch(r"[A-Z]+ [!-~]+ HTTP/[0-9]\.[0-9]", start) else 400

    def origin_form(self, target: str, host: Optional[str]) -> str:
        """RFC 9112 3.2. The absolute form is taken when it names the Host; nothing in it ever chooses where a
        call goes."""
        match = re.fullmatch(r"https?://([^/?#@]+)((?:[/?][!-~]*)?)", target, re.IGNORECASE)
        if "#" in target:
            raise Malformed()
        if match and match[1].lower() == (host or "").lower():
            return match[2] if match[2][:1] == "/" else "/" + match[2]
        if target == "*" and self.method == "OPTIONS":
            return target
        raise Malformed(status=501 if self.method == "CONNECT" else 400)

    def body_length(self) -> Optional[int]:
        """RFC 9112 6.3: both kinds of framing, or a coding that is not exactly chunked, would be a door for
        smuggling."""
        coding = self.head.get("transfer-encoding")
        length = self.head.content_length()
        if coding is None:
            return length or 0
        if length is not None or not self.version:
            raise Malformed()
        if coding.lower() != "chunked":
            raise Malformed("Only the chunked transfer coding is understood", 501)
        return None


class Sized:
    """Framing by Content-Length. `feed` -> (what can be passed on as it is, the payload in it)."""
    __slots__ = ("left", "ended", "excess")

    def __init__(self, length: int):
        self.left, self.ended, self.excess = length, length == 0, b""

    def feed(self, data: bytes) -> Tuple[bytes, bytes]:
        if len(data) > self.left:
            data, self.excess = data[:self.left], data[self.left:]
        self.left -= len(data)
        self.ended = not self.left
        return data, data

    def end_of_stream(self) -> bool:
        """The sender closed; -> whether the body is whole."""
        return self.ended


class UntilClose(Sized):
    """Framing by the end of the connection: every end looks like the right one."""
    __slots__ = ()

    def __init__(self):
        super().__init__(1 << 62)

    def end_of_stream(self) -> bool:
        self.ended = True
        return True


class Chunked:
    """Framing by chunks (RFC 9112 7.1). What `feed` passes on ends at the last byte that was checked, so
    nothing malformed ever goes through; trailers are dropped, and the last chunk is passed on only when the
    sender's has come."""
    __slots__ = ("left", "ended", "excess", "held")

    def __init__(self):
        self.left, self.ended, self.excess, self.held = 0, False, b"", b""

    def feed(self, data: bytes) -> Tuple[bytes, bytes]:
        if self.held:
            data, self.held = self.held + data, b""
        position, size, payload, left = 0, len(data), b"", self.left
        while position < size:
            if not left:  # at a chunk's size line
                match = CHUNK_LINE.match(data, position)
                if not match:
                    if size - position > MAX_CHUNK_LINE or not CHUNK_LINE_START.fullmatch(data, position):
                        raise Malformed()
                    break
                left = int(match[1], 16)
                if not left:
                    return self.last(data, position, match.end(), payload)
                position, left = match.end(), left + 2
            if size - position >= left:  # the chunk is here, with the line end behind it
                end = position + left
                if data[end - 2:end] != b"\r\n":
                    raise Malformed()
                payload = payload + data[position:end - 2] if payload else data[position:end - 2]
                position, left = end, 0
            else:
                end = min(size, position + left - 2)
                payload = payload + data[position:end] if payload else data[position:end]
                left -= end - position
                position = end
                if left == 2 and position < size and data[position] != 13:
                    raise Malformed()
                break
        self.left, self.held = left, data[position:]
        return (data[:position] if self.held else data), payload

    def between(self) -> bool:
        """Whether what was passed on ends with a chunk."""
        return not self.left

    def last(self, data: bytes, position: int, end: int, payload: bytes) -> Tuple[bytes, bytes]:
        self.left = 0
        match = TRAILERS.match(data, end)
        if match:
            self.ended, self.excess = True, data[match.end():]
            return data[:position] + LAST_CHUNK, payload
        lines = max(end, data.rfind(b"\r\n") + 2)
        if (len(data) - end > MAX_TRAILERS or not TRAILER_LINES.fullmatch(data, end, lines)
                or BARE_LINE_END.search(data, lines - 1)):
            raise Malformed()
        self.held = data[position:]
        return data[:position], payload

    def end_of_stream(self) -> bool:
        return self.ended


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""


class Passage:
    """The body of an answer on its way to the caller: `feed` turns what came into what goes out. Chunked
    stays chunked, byte for byte, and sized stays sized; `style` says otherwise where the two sides' framing
    differs. A `listener` is fed the payload, and says what of it goes on where the style is not AS_IS."""
    __slots__ = ("framing", "style", "listener", "passed", "tail")
    AS_IS, PLAIN, CHUNKED = range(3)

    def __init__(self, framing: Any, style: int = AS_IS, listener: Any = None):
        self.framing, self.style, self.listener, self.passed = framing, style, listener, 0
        self.tail: Optional[bytes] = None  # of the payload that went on, where something may be put in between

    def feed(self, data: bytes) -> bytes:
        """Raises Malformed as soon as the framing is broken."""
        same, payload = self.framing.feed(data)
        if self.listener and payload:
            payload = self.listener.feed(payload)
        if self.tail is not None:
            self.tail = (self.tail + payload)[-4:]
        if self.style == self.AS_IS:
            self.passed += len(payload)
            return same
        ended = self.framing.ended
        if ended and self.listener:
            payload += self.listener.rest()
        self.passed += len(payload)
        return payload if self.style == self.PLAIN else chunk(payload) + (LAST_CHUNK if ended else b"")

    def between(self, event: bytes) -> bytes:
        """`event`, as it can be put in here: between two events, and two chunks; else nothing."""
        if self.tail is None or (self.tail and not self.tail.endswith((b"\n\n", b"\r\n\r\n"))):
            return b""
        if self.style == self.AS_IS and not (isinstance(self.framing, Chunked) and self.framing.between()):
            return b""
        return event if self.style == self.PLAIN else chunk(event)

    def end_of_stream(self, reset: bool = False) -> Tuple[bool, bytes]:
        """The upstream closed; -> (whether that is a proper end, what is left to send)."""
        whole_body = not reset and self.framing.end_of_stream()
        rest = self.listener.rest() if self.listener else b""
        self.passed += len(rest)
        if self.tail is not None:
            self.tail = (self.tail + rest)[-4:]
        if self.style == self.CHUNKED:
            rest = chunk(rest) + (LAST_CHUNK if whole_body else b"")
        return whole_body, rest


def hung_up(connection: Connection) -> bool:
    """Whether the other side closed it, as far as that shows while nothing is read."""
    return bool(ready(0, (connection.descriptor, HANGUP if PATIENT else 0)))


THREAD = object()  # what a call yields before it does what may wait for anything but its two sockets


def run_through(steps: Any) -> Any:
    """What they come to, in a thread: there they wait by themselves, and yield nothing but THREAD."""
    while True:
        try:
            if next(steps) is not THREAD:
                raise AssertionError("nobody waits for this here")
        except StopIteration as end:
            return end.value


class Watch:
    """A caller under observation: every wait for its upstream goes through here, so that its leaving is noticed
    in each, and the Relay asks here until when its calls wait. A caller that only closed its sending side looks the
    same as one that left; it is given HALF_CLOSE_SECONDS more. One that should hear meanwhile that its call is alive
    does so from here, too."""
    HALF_CLOSE_SECONDS = 0.5
    SPEAK_SECONDS = 10

    def __init__(self, caller: Optional[Connection], clock: Any, until: float = math.inf):
        """Without a `caller` nobody can leave. No wait goes on beyond `until`."""
        self.caller, self.clock = caller, clock
        # Whether the call has a thread, in which it may wait; else it runs in the Relay's, and yields what it waits
        # for: a Connection to read from, until `deadline`, or THREAD.
        self.in_thread, self.deadline = True, math.inf
        self.party: Any = None             # whom the Relay tells what happens to it there,
        self.alarm = math.inf              # and when
        self.left: Optional[float] = None  # when the end of what it sends was seen
        self.relay: Any = None             # which sees the caller leave while a thread listens elsewhere
        self.listening: Optional[Connection] = None
        self.pausing: Optional[threading.Event] = None
        self.gone = False
        self.bound(until)

    def renew(self) -> None:
        """Another request is awaited: what is half closed has its moment again."""
        if self.bounded:
            self.bound()
        if self.left is not None or self.gone:
            self.left, self.gone = None, False
            if self.relay:
                self.relay.look_after(self)

    def bound(self, until: float = math.inf, speak_at: float = math.inf,
              speak: Optional[Callable[[], None]] = None) -> None:
        """No wait goes on beyond `until`; `speak` is called when one lasts until `speak_at`, and every SPEAK_SECONDS
        from then on."""
        self.until, self.speak_at, self.speak = until, speak_at, speak
        self.bounded = min(until, speak_at) < math.inf

    def due(self, deadline: float) -> float:
        """When a wait until `deadline` has to look up."""
        return min(deadline, self.until, self.speak_at)

    def has_left(self, now: float) -> bool:
        """Whether it closed its sending side so long ago that it is gone."""
        return self.left is not None and now >= self.left + self.HALF_CLOSE_SECONDS

    def lapse(self, deadline: float) -> None:
        """A wait has lasted until something was due. Raises TimeoutError at `deadline`."""
        now = self.clock.monotonic()
        if now >= min(deadline, self.until):
            raise TimeoutError()
        if now >= self.speak_at:
            self.speak_at = now + self.SPEAK_SECONDS
            self.speak()

    def listen(self, connection: Connection, seconds: float) -> None:
        """Read the first bytes of an answer into `connection.ahead`, by one system call where the Relay looks
        after the caller meanwhile (who then is all that could end it sooner); else leave it to `more`. Raises as
        `wait` does."""
        if self.relay is None or not connection.patient:
            return
        self.listening = connection
        try:
            if self.bounded:
                self.listen_aloud(connection, self.clock.monotonic() + seconds)
            elif not self.gone:
                connection.listen(seconds, self.clock)
        finally:
            self.listening = None
        if self.gone:  # looked at last: `caller_left` may have come in between
            raise CallerGone()

    def listen_aloud(self, connection: Connection, deadline: float) -> None:
        while not self.gone:
            try:
                left = self.due(deadline) - self.clock.monotonic()
                return connection.listen(max(0.001, left), self.clock)
            except TimeoutError:
                self.lapse(deadline)

    def caller_left(self) -> None:
        """The Relay saw it."""
        self.gone = True
        if not self.in_thread:
            return self.party.caller_left()
        connection, pausing = self.listening, self.pausing
        if connection:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)  # wakes its reader
        if pausing:
            pausing.set()

    def leave_to_relay(self, connection: Connection, data: bytes) -> None:
        """Have the Relay, in whose thread this is, send all of `data`."""
        self.relay.outgoing.append((self.party, connection, data))

    def coming(self, connection: Connection, deadline: float) -> Any:
        """Wait for more of it; -> False at its end. Raises as `wait` does."""
        if self.in_thread:
            return self.more(connection, deadline)
        self.deadline = deadline
        return (yield connection)

    def more(self, connection: Connection, deadline: float) -> bool:
        """For read_head."""
        self.wait(connection, READ, deadline)
        return connection.fill()

    def wait(self, connection: Connection, events: int, deadline: float) -> int:
        """Wait until `connection` is ready; -> for what. Raises TimeoutError at `deadline`, CallerGone when
        it left."""
        while True:
            until = self.due(deadline)
            wanted, listening = [(connection.descriptor, events)], False
            if self.caller:
                until = until if self.left is None else min(until, self.left + self.HALF_CLOSE_SECONDS)
                listening = self.left is None and len(self.caller.ahead) < MAX_AHEAD
                wanted.append((self.caller.descriptor, READ if listening else 0))
            found = ready(until - self.clock.monotonic(), *wanted)
            if connection.descriptor in found:
                return found[connection.descriptor]
            if found:
                self.look(listening)
            elif self.has_left(self.clock.monotonic()):
                raise CallerGone()
            else:
                self.lapse(deadline)

    def look(self, listening: bool) -> None:
        """The caller stirred: it sent more, closed its side, or is gone."""
        if not listening:
            raise CallerGone()
        try:
            if not self.caller.fill():
                self.left = self.clock.monotonic()
        except OSError:
            raise CallerGone() from None

    def pause(self, done: threading.Event, deadline: float) -> bool:
        """Wait for something that has no descriptor; -> whether it is done. Where nobody else looks after the caller,
        it is looked at 20 times a second."""
        self.pausing = done if self.relay else None
        try:
            while not self.gone:
                left = self.due(deadline) - self.clock.monotonic()
                if done.wait(max(0, left if self.relay else min(left, 0.05))) and not self.gone:
                    return True
                if not self.relay:
                    self.glance()
                if not self.gone:
                    self.lapse(deadline)
        except TimeoutError:
            return False
        finally:
            self.pausing = None
        raise CallerGone()

    def glance(self) -> None:
        if self.caller and self.left is None:
            if len(self.caller.ahead) >= MAX_AHEAD:
                if hung_up(self.caller):
                    raise CallerGone()
            elif self.caller.readable(0):
                self.look(True)
        if self.has_left(self.clock.monotonic()):
            raise CallerGone()

    def send(self, connection: Connection, data: bytes, seconds_without_progress: float) -> bool:
        """Send all of `data`; -> False if the peer spoke first and does not read on. Raises OSError,
        TimeoutError, CallerGone. In the Relay's thread it is left to the Relay."""
        if not self.in_thread:
            self.leave_to_relay(connection, data)
            return True
        while data:
            try:
                data = connection.send(data)
            except WOULD_BLOCK:
                found = self.wait(connection, READ | WRITE, self.clock.monotonic() + seconds_without_progress)
                if not found & WRITE and (not connection.fill() or connection.ahead):
                    return False
        return True


# ------------------------------------------------------------------------------------------------------------
# Relay: one thread that runs every call as long as all it waits for is its two sockets, and carries every answer's
# body. A thread for each would pay a wake-up and a fight for the interpreter lock on every event. What must wait
# for something else goes on in a thread of its own, and comes back. Nothing here may wait. Whoever runs a call is
# its party, and is told of what concerns it by carried, caller_left, overdue, stuck and fail. It knows framing,
# deadlines, slow readers and hang-ups; no heads, LLMs or buckets.
# ------------------------------------------------------------------------------------------------------------

READABLE, WRITABLE = selectors.EVENT_READ, selectors.EVENT_WRITE
WAITING = b": waiting for the model\n\n"  # a comment in an event stream (WHATWG HTML, 9.2.6)


class Flow:
    """One body on its way. When it has ended, the party is told how, by `carried`: ok, upstream_cut, caller_gone,
    stopped (by us, to end) or internal_error."""
    SLOW_READER_SECONDS = 60

    __slots__ = ("relay", "upstream", "caller", "passage", "read_timeout", "until", "pulse", "heard", "spoke", "left",
                 "unsent", "ending", "party", "all_here")

    def __init__(self, upstream: Connection, caller: Connection, passage: Passage, read_timeout: float,
                 until: float = math.inf, pulse: float = math.inf):
        """It is cut at `until`. A pause of `pulse` seconds gets a comment, where the passage has room for it."""
        self.upstream, self.caller, self.passage, self.read_timeout = upstream, caller, passage, read_timeout
        self.until, self.pulse, self.spoke = until, pulse, 0.0
        self.relay: Optional["Relay"] = None
        self.party: Any = None  # whom it tells how it ended
        # called when the upstream has done its part, though a slow caller has not taken all of it
        self.all_here: Callable[[], None] = bool
        # when the upstream last sent, or a slow caller last took, something
        self.heard = 0.0
        # when the caller closed its sending side
        self.left: Optional[float] = None
        # read from upstream, not yet taken by the caller; while there is any, no more is read
        self.unsent = b""
        self.ending: Optional[str] = None

    def start(self) -> None:
        self.heard = self.relay.now
        self.watch()

    def watch(self) -> None:
        """Register each side for what is wanted of it now: a caller that does not take what came stops its
        own upstream."""
        listening = self.left is None and len(self.caller.ahead) < MAX_AHEAD
        self.relay.watch(self.upstream, 0 if self.unsent or self.ending else READABLE, self.from_upstream)
        self.relay.watch(self.caller, (READABLE if listening else 0) | (WRITABLE if self.unsent else 0),
                         self.at_caller)

    def from_upstream(self, _: int) -> None:
        """The hot path: one read, one look at the framing, one write."""
        try:
            data = self.upstream.receive()
        except WOULD_BLOCK:
            return
        except OSError:
            data = None  # a reset
        self.heard = self.relay.now
        if data:
            try:
                out = self.passage.feed(data)
            except Malformed:
                return self.end("upstream_cut")
            if self.passage.framing.ended:
                self.ending = "ok"
        else:
            whole_body, out = self.passage.end_of_stream(reset=data is None)
            self.ending = "ok" if whole_body else "upstream_cut"
        if out:
            self.send(out)
        elif self.ending:
            self.end(self.ending)

    def send(self, data: bytes) -> None:
        try:
            sent = self.caller.sock.send(data, self.caller.flags)
        except WOULD_BLOCK:
            sent = 0
        except OSError:
            return self.end("caller_gone")
        if sent == len(data):
            if self.ending:
                return self.end(self.ending)
            if not self.unsent:
                return
        if sent:
            self.heard = self.relay.now
        self.unsent = data[sent:]
        if self.ending:
            self.all_here()
        self.watch()

    def stuck(self, rest: Any) -> None:
        """The caller did not take all of the head; `rest` is None where it is gone."""
        if rest is None:
            self.end("caller_gone")
        elif self.party:
            self.unsent = rest
            self.watch()

    def at_caller(self, events: int) -> None:
        """The caller can take more, or stirred: it sent its next request ahead, closed its side, or is
        gone."""
        if events & READABLE:
            try:
                if not self.caller.fill():
                    self.left = self.relay.now
            except OSError:
                return self.end("caller_gone")
            self.watch()
        if events & WRITABLE and self.unsent:
            self.send(self.unsent)

    def check(self, now: float) -> None:
        """The deadlines, looked at a few times a second."""
        if self.left is not None and now >= self.left + Watch.HALF_CLOSE_SECONDS:
            self.end("caller_gone")
        elif self.unsent and now >= self.heard + self.SLOW_READER_SECONDS:
            self.end("caller_gone")
        elif self.left is None and len(self.caller.ahead) >= MAX_AHEAD and hung_up(self.caller):
            self.end("caller_gone")  # nobody reads what it sends, so it is looked at
        elif now >= self.until or (not self.unsent and now >= self.heard + self.read_timeout):
            self.end("upstream_cut")
        elif not self.unsent and now >= max(self.heard, self.spoke) + self.pulse:
            self.spoke = now
            comment = self.passage.between(WAITING)
            if comment:
                self.send(comment)

    def end(self, ending: str) -> None:
        """Let go of both sockets and tell the party, once, a moment later."""
        party, self.party = self.party, None
        if party is None:
            return
        if self.unsent:
            self.passage.tail = None  # what the caller has ends anywhere: nothing more can be put in
        self.unsent, self.ending = b"", ending
        self.relay.flows.discard(self)
        self.relay.later.append((party, functools.partial(party.carried, ending)))
        self.relay.watch(self.upstream, 0)
        self.relay.watch(self.caller, 0)

    def fail(self) -> None:
        """A bug of ours ended it."""
        self.end("internal_error")


class Relay:
    TICK = 0.2                    # seconds between two looks at the deadlines
    ROUND_SECONDS = 0.001         # for the heads and answers of one round, at whose end they are sent together,
    SHORT_ROUND_SECONDS = 0.0005  # and while there are bodies to carry, which would have to wait

    def __init__(self, clock: Any, report: Callable[[], None]):
        """`report` is called inside an except block, for a bug of ours that ends one call."""
        self.clock, self.report, self.now = clock, report, clock.monotonic()
        self.due = self.now + self.TICK  # the next look at the deadlines
        self.selector = selectors.DefaultSelector()
        self.seats: Dict[int, Connection] = {}  # what the selector knows, by descriptor
        self.flows: set = set()
        # what can wait a moment: whose it is, what
        self.later: "collections.deque[Tuple[Any, Callable[[], None]]]" = collections.deque()
        # to be sent at the end of a round: whose it is, where to, what. The first send wakes the other side, on
        # another processor, which costs as much as all the rest of it; the next ones find it awake.
        self.outgoing: List[Tuple[Any, Connection, bytes]] = []
        self.bell, self.ear = socket.socketpair()
        self.bell.setblocking(False)
        self.ear.setblocking(False)
        self.selector.register(self.ear, READABLE, types.SimpleNamespace(act=self.hear))
        self.watches: Dict[int, Watch] = {}  # by the caller's descriptor
        self.leaving: "collections.deque[Tuple[float, Watch]]" = collections.deque()
        self.hangups = select.epoll() if PATIENT else None
        if self.hangups:
            self.selector.register(self.hangups, READABLE, types.SimpleNamespace(act=self.notice))
        self.thread = threading.Thread(target=self.run, name="relay", daemon=True)
        self.thread.start()

    def carry(self, flow: Flow, party: Any) -> None:
        """Carry a body to its end, for a call that is in a thread."""
        self.post(functools.partial(self.begin, flow, party))

    def post(self, act: Callable[[], None], party: Any = None) -> None:
        """Have it done in the Relay's thread."""
        self.later.append((party or self, act))
        try:
            self.bell.send(b"!")
        except OSError:
            pass  # the bell's buffer is full: it is ringing anyway

    def hear(self, _: int) -> None:
        self.ear.recv(4096)

    # -- what the Relay's own thread asks for

    def watch(self, connection: Connection, events: int, act: Optional[Callable[[int], None]] = None) -> None:
        """Call `act` whenever `connection` is ready for one of `events`."""
        connection.act = act
        if events == connection.events:
            return
        connection.events, descriptor = events, connection.descriptor
        seat = self.seats.get(descriptor)
        if seat is connection and events:
            return self.selector.modify(descriptor, events, connection)
        if seat is connection or (seat and events):  # which was closed, and its number is another one's now
            self.selector.unregister(descriptor)
            del self.seats[descriptor]
        if events:
            self.selector.register(descriptor, events, connection)
            self.seats[descriptor] = connection

    def wake_at(self, watch: Watch, when: float) -> None:
        """Tell its party at that time."""
        watch.alarm = when
        if when < self.due:
            self.due = when

    def flush(self) -> None:
        """Send what is to be sent."""
        while self.outgoing:
            outgoing, self.outgoing = self.outgoing, []
            for party, connection, data in outgoing:
                try:
                    data = connection.send(data)
                except WOULD_BLOCK:
                    pass
                except OSError:
                    data = None
                if data is None or data:
                    self.guard(party, party.stuck, connection, data)

    # -- hang-ups

    def look_after(self, watch: Watch) -> None:
        """From now on, notice when a caller leaves: at once where its connection broke, a moment later where only
        its sending side is closed."""
        if self.hangups:
            watch.relay, descriptor = self, watch.caller.descriptor
            known = self.watches.get(descriptor) is watch
            self.watches[descriptor] = watch
            (self.hangups.modify if known else self.hangups.register)(descriptor, HANGUP | select.EPOLLET)

    def forget(self, descriptor: int) -> None:
        """To be called before it is closed."""
        self.watches.pop(descriptor, None)

    def notice(self, _: int) -> None:
        for descriptor, _ in self.hangups.poll(0):
            watch = self.watches.get(descriptor)
            # looked at again: it may have been closed meanwhile, and its number be another's
            found = ready(0, (descriptor, HANGUP)).get(descriptor, 0) if watch else 0
            if found & ~HANGUP:
                self.guard(watch.party, watch.caller_left)
            elif found:
                watch.left = self.now
                self.leaving.append((self.now, watch))
                self.due = min(self.due, self.now + Watch.HALF_CLOSE_SECONDS)

    def check_leaving(self, now: float) -> None:
        while self.leaving and now >= self.leaving[0][0] + Watch.HALF_CLOSE_SECONDS:
            _, watch = self.leaving.popleft()
            left = watch.left
            if watch.has_left(now):
                self.guard(watch.party, watch.caller_left)
            elif left is not None:  # its own thread saw it later, or it has another moment
                self.leaving.append((left, watch))

    # -- its life

    def begin(self, flow: Flow, party: Any) -> None:
        flow.relay, flow.party = self, party
        self.flows.add(flow)
        self.guard(flow, flow.start)

    def cut_all(self) -> None:
        """End every flow now, without a proper end."""
        self.post(self.stop_all)

    def stop_all(self) -> None:
        for flow in list(self.flows):
            self.guard(flow, flow.end, "stopped")

    def guard(self, party: Any, act: Callable[..., None], *arguments: Any) -> None:
        """A bug met by one call ends that call, not the thread."""
        try:
            act(*arguments)
        except Exception:
            self.report()
            if party is not self:
                party.fail()

    def run(self) -> None:
        while True:
            idle = not (self.flows or self.leaving or self.watches)
            found = self.selector.select(0 if self.later else None if idle else max(0, self.due - self.now))
            self.now = now = self.clock.monotonic()
            end = now + (self.SHORT_ROUND_SECONDS if self.flows else self.ROUND_SECONDS)
            in_time = True
            for key, events in found:
                act = key.data.act
                if act is None:  # nobody waits for it
                    self.watch(key.data, 0)
                    continue
                party = act.__self__
                if type(party) is Flow:
                    self.guard(party, act, events)
                elif in_time:  # else it is still ready in the next round
                    self.guard(party, act, events)
                    in_time = self.clock.monotonic() < end
            self.flush()  # first: what comes later wants to know what was taken
            for _ in range(len(self.later)):
                self.guard(*self.later.popleft())
                if self.clock.monotonic() >= end:
                    break
            self.flush()
            if now >= self.due:
                self.due = now + self.TICK
                self.check(now)
                self.flush()

    def check(self, now: float) -> None:
        """The deadlines."""
        self.check_leaving(now)
        for flow in list(self.flows):
            self.guard(flow, flow.check, now)
        for watch in list(self.watches.values()):
            if now >= watch.alarm:
                watch.alarm = math.inf
                self.guard(watch.party, watch.party.overdue)
            if watch.alarm < self.due:
                self.due = watch.alarm


# ------------------------------------------------------------------------------------------------------------
# Line: the slots of a busy upstream, and the fair line before them. It knows callers by a key and a weight, and
# what they wait for not at all.
# ------------------------------------------------------------------------------------------------------------

class Crowd:
    """All who wait, in whatever line: never more than `most`, nor more than `per_caller` of one, nor longer than
    `seconds`. Its lock is that of every Line."""

    def __init__(self, most: int, per_caller: int, seconds: float):
        self.most, self.per_caller, self.seconds = most, per_caller, seconds
        self.lock, self.waiting, self.closed = threading.Lock(), 0, False
        self.by_caller: Dict[Any, int] = {}

    def add(self, caller: Any, number: int) -> None:
        self.waiting += number
        self.by_caller[caller] = self.by_caller.get(caller, 0) + number
        if not self.by_caller[caller]:
            del self.by_caller[caller]

    def is_full(self, caller: Any) -> bool:
        return self.closed or self.waiting >= self.most or self.by_caller.get(caller, 0) >= self.per_caller


class Guest:
    """A caller with calls that run, wait or were let in just now. `due` is when its next one begins, on the Line's own
    clock; `last` is the number of the last that began."""
    __slots__ = ("key", "weight", "due", "last", "running", "waiting")

    def __init__(self, key: Any, weight: int, due: float):
        self.key, self.weight, self.due, self.last, self.running = key, weight, due, 0, 0
        self.waiting: "collections.deque[Slot]" = collections.deque()

    def turn(self) -> Tuple[float, int, int]:
        """Who has the least begins next: of those due at once, whose last turn is longest ago, then who came first."""
        return round(self.due, 6), self.last, self.waiting[0].number  # sums of fractions are not exact


class Slot:
    """One call's place: in the line until it is `ready`, then one of those that run, until it leaves."""
    __slots__ = ("line", "clock", "guest", "number", "since", "ready", "running")

    def __init__(self, line: "Line", guest: Guest, number: int, since: float):
        self.line, self.clock, self.guest, self.number, self.since = line, line.clock, guest, number, since
        self.ready, self.running = threading.Event(), False

    def wait(self, watch: Watch) -> None:
        """Until it is its turn. Raises NotInTurn, UpstreamTimeout, Overloaded, CallerGone."""
        if self.running:
            return
        if not watch.pause(self.ready, self.since + self.line.crowd.seconds):
            raise UpstreamTimeout(unsent=True) if self.clock.monotonic() >= watch.until else NotInTurn("queue timeout")
        if not self.running:
            raise Overloaded()  # the line is closed

    def waited(self) -> int:
        """How long it has stood in line, in milliseconds."""
        return int((self.clock.monotonic() - self.since) * 1000)

    def leave(self) -> None:
        """It may be called again, and does nothing then."""
        line, self.line = self.line, None
        if line:
            line.leave(self)


class Line:
    """Lets `most` calls run at once. The others wait, each caller's in the order they came, and callers take turns:
    as many as their weight says. It is fair queueing (Demers, Keshav and Shenker, 1989) with calls that all cost the
    same: the Line's clock goes one step while each caller that runs or waits has one turn, so who is new comes before
    whoever had a turn of late, but a stream of new ones does not keep the others waiting for ever."""

    def __init__(self, most: int, crowd: Crowd, clock: Any):
        self.most, self.crowd, self.clock = most, crowd, clock
        self.running, self.now = 0, 0.0
        self.numbers = itertools.count(1)  # of calls that come, and of those that begin
        self.guests: Dict[Any, Guest] = {}

    def enter(self, caller: Any, weight: int, waited: float = 0) -> Slot:
        """-> a place, in the line or already beyond it, for a call that has `waited` in another line for so many
        seconds. Raises NotInTurn where the line is full."""
        with self.crowd.lock:
            guest = self.guests.get(caller) or Guest(caller, weight, self.now)
            slot = Slot(self, guest, next(self.numbers), self.clock.monotonic() - waited)
            full = self.running >= self.most
            if full and self.crowd.is_full(caller):
                raise NotInTurn("queue full")
            self.guests[caller] = guest
            if not guest.waiting:
                guest.due = max(guest.due, self.now)
            if full:
                guest.waiting.append(slot)
                self.crowd.add(caller, 1)
            else:  # then nobody waits
                self.start(slot)
            return slot

    def start(self, slot: Slot) -> None:
        guest = slot.guest
        guest.running += 1
        self.running += 1
        turn = 1 / sum([one.weight for one in self.guests.values() if one.running or one.waiting])
        before, self.now = self.now, max(self.now, guest.due) + turn
        guest.due = max(guest.due + 1 / guest.weight, before)  # who fell behind has no two turns before who is new
        guest.last, slot.running = next(self.numbers), True
        slot.ready.set()

    def leave(self, slot: Slot) -> None:
        guest = slot.guest
        with self.crowd.lock:
            if slot.running:
                self.running -= 1
            else:
                guest.waiting.remove(slot)
                self.crowd.add(guest.key, -1)
            while self.running < self.most and not self.crowd.closed:
                first = min([one for one in self.guests.values() if one.waiting], key=Guest.turn, default=None)
                if not first:
                    break
                self.crowd.add(first.key, -1)
                self.start(first.waiting.popleft())
            guest.running -= slot.running  # only now: it was one of those who take turns
            # who comes again has had its turn, as long as others wait for theirs
            for one in list(self.guests.values()):
                if not (one.running or one.waiting or (one.due > self.now and self.running >= self.most)):
                    del self.guests[one.key]

    def close(self) -> None:
        """Nobody's turn comes any more, in any line of the Crowd; who waits in this one is told."""
        with self.crowd.lock:
            self.crowd.closed = True
            for guest in self.guests.values():
                for slot in guest.waiting:
                    slot.ready.set()

    def ahead(self, slot: Slot) -> int:
        """How many calls will begin before it, as it looks now."""
        with self.crowd.lock:
            guest = slot.guest
            if slot.running or slot not in guest.waiting:
                return 0
            ahead, order = guest.waiting.index(slot), guest.turn()[1:]
            due = guest.due + ahead / guest.weight
            for one in self.guests.values():
                if one is not guest and one.waiting:
                    turns, first = (due - one.due) * one.weight, one.turn()[1:] < order
                    turns = math.floor(turns + 1e-6) + 1 if first else math.ceil(turns - 1e-6)
                    ahead += min(len(one.waiting), max(0, turns))
            return ahead

    def told(self) -> Dict[str, int]:
        """For /health."""
        with self.crowd.lock:
            return {"waiting": sum([len(one.waiting) for one in self.guests.values()]),
                    "longest_ms": max([one.waiting[0].waited() for one in self.guests.values() if one.waiting],
                                      default=0)}


# ------------------------------------------------------------------------------------------------------------
# Upstreams: the one place that opens sockets, and only to configured addresses: no header, path or body of
# a caller can change host, port or scheme. http.client opens and owns connections; answers are read by Wire.
# An Address knows connections; an Upstream which of its addresses to ask; Routes which upstreams a call has.
# It knows no callers (but for watching one while it waits) and no buckets.
# ------------------------------------------------------------------------------------------------------------

# the caller's secrets, what we write ourselves, and what would name it
NEVER_UPSTREAM = HOP_BY_HOP.union(CREDENTIAL_FIELDS, (
    "api-key", "x-goog-api-key", "cookie", "cookie2", "host", "content-length", "expect", "x-http-method",
    "x-http-method-override", "x-method-override", "forwarded", "via", "x-forwarded-for", "x-forwarded-host",
    "x-forwarded-proto", "x-forwarded-port", "x-real-ip", "true-client-ip", "cf-connecting-ip"))
IDENTIFYING = "x-openwebui-"  # and what begins like this: who the caller's user is,
OUR_FIELDS = "x-llm-proxy-"   # or what is meant for us
TIMEOUT_FIELD = OUR_FIELDS + "timeout-ms"
REWRITTEN_FOR_CALLS = NEVER_UPSTREAM | {"content-type", "accept-encoding"}
MAX_INTERIM = 16        # 1xx answers before the real one


class AnswerHead(Head):
    """The head of an answer, checked; `lasting` says that the connection can carry another one, `streamed`
    that an event stream follows."""
    __slots__ = ("status", "reason", "chunked", "lasting", "streamed")

    def __init__(self, data: bytes):
        super().__init__(data)
        match = STATUS_LINE.fullmatch(self.start)
        if not match:
            raise Malformed()
        self.status, self.reason = int(match[2]), match[3] or ""
        coding = self.get("transfer-encoding")
        self.chunked = coding is not None
        # RFC 9112 6.3. An ambiguous length is Malformed, as it is for nginx.
        if self.chunked and ("content-length" in self.rows or coding.lower() != "chunked" or match[1] == "0"):
            raise Malformed()
        self.lasting = match[1] == "1" and "close" not in self.options
        self.streamed = self.get("content-type", "").lower().startswith("text/event-stream")

    @classmethod
    def read(cls, data: bytes, last: Optional["AnswerHead"]) -> Tuple["AnswerHead", Optional[int]]:
        """-> `last` again, where `data` differs from it in nothing but the length; and the length."""
        length = length_like(last, data)
        if length is None:
            last = cls(data)
        return last, length if length is not None and length >= 0 else last.content_length()


class Answer:
    """An upstream's answer: a checked head, and a body that is still arriving. As a with-block it keeps the
    connection for the next call if, and only if, the answer came whole and nothing came after it."""
    __slots__ = ("upstream", "slot", "address", "link", "head", "status", "length", "framing", "reusable")

    def __init__(self, address: "Address", link: "Link", head: AnswerHead, length: Optional[int], method: str,
                 whole_request: bool):
        self.address, self.link, self.head, self.length = address, link, head, length
        self.status = status = head.status
        self.upstream: Any = None  # whose running call ends with it,
        self.slot: Optional[Slot] = None  # and that call's place
        if method == "HEAD" or status < 200 or status in (204, 304):
            self.framing = Sized(0)
        elif length is not None:
            self.framing = Sized(length)
        else:
            self.framing = Chunked() if head.chunked else UntilClose()
        self.reusable = whole_request and head.lasting and not isinstance(self.framing, UntilClose)

    def __enter__(self) -> "Answer":
        return self

    def leave(self) -> None:
        """It came whole, or nobody wants it any more: the upstream has one call less."""
        if self.upstream:
            self.upstream.leave(self.address)
            self.upstream = None
        if self.slot:
            self.slot.leave()

    def __exit__(self, *_: Any) -> None:
        framing = self.framing
        self.leave()
        if self.reusable and framing.ended and not framing.excess and not self.link.wire.ahead:
            self.address.keep(self.link, self.head.streamed)
        else:
            self.link.close()


class Link(NamedTuple):
    """An open connection to an upstream: http.client's, which owns the socket, and ours, which reads and
    writes it."""
    owner: http.client.HTTPConnection
    wire: Connection

    def close(self) -> None:
        self.owner.close()


class Breaker:
    """Keeps calls from an address that fails. `most` failures in a row open it for `seconds`; then one call tries
    whether it can be closed. One that takes longer than that to find out does not keep others from trying, too.
    Upstream.lock guards it."""

    def __init__(self, most: int, seconds: float):
        self.most, self.seconds = most, seconds
        self.failures, self.opened, self.trying = 0, None, False

    def allows(self, now: float) -> bool:
        return self.opened is None or now >= self.opened + self.seconds

    def enter(self, now: float) -> None:
        """A call is made."""
        if self.opened is not None:
            self.opened, self.trying = now, True

    def judge(self, good: Optional[bool], now: float) -> None:
        """A call went well, or failed, or (None) ended before that was known."""
        if self.trying and good is None:
            self.opened = now - self.seconds  # the next one may try
        self.trying = False
        if good:
            self.failures, self.opened = 0, None
        elif good is False:
            self.failures += 1
            if self.opened is not None or self.failures >= self.most:
                self.opened = now

    def state(self, now: float) -> str:
        return "closed" if self.opened is None else "half_open" if self.trying or self.allows(now) else "open"


class Way(NamedTuple):
    """How upstreams are reached: timeouts in seconds, TLS for those that speak it, and the proxy on the way out."""
    open_timeout: float
    first_byte_timeout: float
    read_timeout: float
    tls: Optional[ssl.SSLContext] = None
    tunnel: Optional[Tunnel] = None
    no_tunnel: str = ""


class Address:
    """One address of an upstream: its spare connections, and how it fared lately."""
    NEAR_SECONDS = 0.05      # how long a connection to an address may take in a call's own thread,
    HERE_SECONDS = 0.001     # and one to this machine in the Relay's
    SPARE_SECONDS = 3        # below the 5 s after which uvicorn, Node and llama.cpp close an idle connection
    SETTLING_SECONDS = 0.05  # llama.cpp closes after a stream although it promised to keep the connection

    def __init__(self, endpoint: Endpoint, way: Way, breaker: Breaker, clock: Any):
        self.endpoint, self.breaker, self.clock, self.running = endpoint, breaker, clock, 0
        self.open_timeout, self.first_byte_timeout = way.open_timeout, way.first_byte_timeout
        self.read_timeout = way.read_timeout
        # (usable from, link), oldest left
        self.spares: "collections.deque[Tuple[float, Link]]" = collections.deque()
        self.last: Optional[AnswerHead] = None
        self.tls = way.tls if endpoint.scheme == "https" else None
        self.tunnel = way.tunnel if self.tls and not urllib.request.proxy_bypass_environment(
            endpoint.host, {"no": way.no_tunnel}) else None
        # An address needs no look-up: it is there at once, or the patient way finds out.
        self.near = self.tls is None and re.fullmatch(r"[0-9.]+|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*", endpoint.host)
        self.here = self.near and re.fullmatch(r"127\.[0-9.]+|::1", endpoint.host)
        self.host_line = "Host: %s\r\n" % endpoint.origin.partition("://")[2]

    def target(self, path: str, query: str = "") -> str:
        """A base with a path replaces a leading /v1 of the call; a bare host gets the call's path as it
        is."""
        if self.endpoint.path and (path == "/v1" or path.startswith("/v1/")):
            path = path[3:]
        return (self.endpoint.path + path or "/") + ("?" + query if query else "")

    def ask(self, link: Link, method: str, head: bytes, body: Any, watch: Watch) -> Any:
        """Send one request and wait for the head of its answer. Raises UpstreamFailed, UpstreamTimeout,
        CallerGone, and what `body` raises."""
        try:
            return (yield from self.exchange(link, method, head, body, watch))
        except BaseException as failure:
            link.close()
            if isinstance(failure, TimeoutError):
                raise UpstreamTimeout() from None
            if isinstance(failure, (OSError, Malformed)):
                raise UpstreamFailed(failure) from None
            raise

    def exchange(self, link: Link, method: str, head: bytes, body: Any, watch: Watch) -> Any:
        wire, there = link.wire, True
        try:
            if isinstance(body, bytes):
                framing = (b"Content-Length: %d\r\n\r\n" % len(body)
                           if body or method in ("POST", "PUT", "PATCH") else b"\r\n")
                whole_request = self.send(wire, b"%b%b%b" % (head, framing, body), watch)
            else:
                whole_request = self.upload(wire, head, body, watch)
        except (BrokenPipeError, ConnectionResetError):
            whole_request = False  # it may have answered before it stopped reading (RFC 9112 9.5)
        deadline = self.clock.monotonic() + self.first_byte_timeout
        if not watch.in_thread:
            watch.deadline = deadline
            there = yield wire
            if watch.in_thread:  # `there` is what the Relay could not send
                whole_request, there = self.send(wire, there, watch), True
                deadline = self.clock.monotonic() + self.first_byte_timeout
        elif not wire.ahead:
            watch.listen(wire, self.first_byte_timeout)
        for _ in range(MAX_INTERIM):
            if there and not watch.in_thread and b"\r\n\r\n" not in wire.ahead:
                yield THREAD  # to read on
            data = read_head(wire, STATUS_LINE, watch.more, wire, deadline)
            if data is None:
                break
            answer, length = AnswerHead.read(data, self.last)
            self.last = answer
            if answer.status >= 200:
                return Answer(self, link, answer, length, method, whole_request)
            if answer.status == 101:
                break  # nobody asked for it: upgrades are not passed on
        raise UpstreamFailed("no final answer" if data else ConnectionAbortedError())

    def send(self, wire: Connection, data: bytes, watch: Watch) -> bool:
        """-> whether it took all: it may have answered before it stopped reading (RFC 9112 9.5)."""
        try:
            return watch.send(wire, data, self.read_timeout)
        except (BrokenPipeError, ConnectionResetError):
            return False

    def upload(self, wire: Connection, head: bytes, body: "RequestBody", watch: Watch) -> bool:
        """Relay a body of any size in blocks; -> False if the upstream answered before it was all sent."""
        framing = (b"Transfer-Encoding: chunked\r\n\r\n" if body.length is None
                   else b"Content-Length: %d\r\n\r\n" % body.length)
        watch.send(wire, head + framing, self.read_timeout)
        for block in body.blocks(wire):
            if not watch.send(wire, chunk(block) if body.length is None else block, self.read_timeout):
                break
        else:
            if body.ended:
                return body.length is not None or watch.send(wire, LAST_CHUNK, self.read_timeout)
        watch.caller.dropping = not body.skip()  # else it is all here, and what comes is the next request
        return False

    def spare(self) -> Optional[Link]:
        """A spare connection that is still silent, the newest first; None where there is none."""
        now, settling = self.clock.monotonic(), []
        try:
            while len(settling) < 16:
                usable, link = self.spares.pop()
                if usable > now:
                    settling.append((usable, link))
                elif now - usable < self.SPARE_SECONDS and self.silent(link):
                    return link
                else:
                    link.close()
        except IndexError:
            pass  # none is left
        finally:
            self.spares.extend(reversed(settling))
        return None

    @staticmethod
    def silent(link: Link) -> bool:
        """Whether nothing came on an idle connection: neither its end, nor bytes that the next caller would
        take for its answer."""
        if not link.wire.readable(0):
            return True
        try:
            # a TLS record that carries no data is silence, too
            return link.wire.fill() and not link.wire.ahead
        except OSError:
            return False

    def open_at_once(self, seconds: float) -> Optional[Link]:
        """Connect to an address, which needs no look-up; -> None where that takes longer."""
        owner = http.client.HTTPConnection(self.endpoint.host, self.endpoint.port, timeout=seconds)
        try:
            owner.connect()
            return Link(owner, Connection(owner.sock))
        except OSError as failure:
            owner.close()
            if isinstance(failure, (TimeoutError, socket.timeout)):
                return None
            raise UpstreamFailed(failure, unsent=True) from None

    def open(self, watch: Watch) -> Link:
        """Connect: at once where that can be, else in a thread of its own, because name look-ups and handshakes
        know neither our deadline nor the caller's leaving."""
        link = self.open_at_once(self.NEAR_SECONDS) if self.near else None
        if link:
            return link
        host, port = self.endpoint.host, self.endpoint.port
        if self.tunnel:
            owner = http.client.HTTPSConnection(
                self.tunnel.host, self.tunnel.port, timeout=self.open_timeout, context=self.tls)
            owner.set_tunnel(host, port, self.tunnel.fields)
        elif self.tls:
            owner = http.client.HTTPSConnection(host, port, timeout=self.open_timeout, context=self.tls)
        else:
            owner = http.client.HTTPConnection(host, port, timeout=self.open_timeout)
        done, abandoned, failures = threading.Event(), threading.Event(), []

        def run():
            try:
                owner.connect()
            except Exception as failure:
                failures.append(failure)
            done.set()
            if abandoned.is_set():
                owner.close()

        try:
            _thread.start_new_thread(run, ())
        except RuntimeError:  # can't start new thread
            raise Overloaded() from None
        try:
            if not watch.pause(done, self.clock.monotonic() + self.open_timeout):
                raise UpstreamTimeout(unsent=True)
        except BaseException:
            abandoned.set()
            if done.is_set():
                owner.close()
            raise
        if failures:
            owner.close()
            raise (UpstreamTimeout(unsent=True) if isinstance(failures[0], (TimeoutError, socket.timeout))
                   else UpstreamFailed(failures[0], unsent=True))
        return Link(owner, Connection(owner.sock))

    def keep(self, link: Link, settling: bool) -> None:
        self.spares.append((self.clock.monotonic() + (self.SETTLING_SECONDS if settling else 0), link))

    def close_stale(self, everything: bool = False) -> None:
        """Close spare connections that are too old to be used again; called once in a while."""
        oldest = self.clock.monotonic() - self.SPARE_SECONDS
        while True:
            try:
                usable, link = self.spares.popleft()
            except IndexError:
                return
            if usable >= oldest and not everything:
                return self.spares.appendleft((usable, link))
            link.close()

    def location(self, value: str, prefix: str) -> str:
        """A redirect to the endpoint itself, as callers know it: its address is not theirs to learn."""
        if not (value + "/").startswith(self.endpoint.origin + "/"):
            return value
        path = value[len(self.endpoint.origin):] or "/"
        base = self.endpoint.path
        return prefix + ("/v1" + path[len(base):] if base and (path + "/").startswith(base + "/") else path)


FAILING = (502, 503, 504, 529)  # statuses by which an address says that it cannot work
MOST_RETRY_SECONDS = 5


def content_never_null(payload: Dict[str, Any]) -> Dict[str, Any]:
    """For upstreams that refuse "content": null beside tool calls."""
    messages = payload.get("messages")
    if not isinstance(messages, list) or not any(map(lacks_content, messages)):
        return payload
    return {**payload, "messages": [{**one, "content": ""} if lacks_content(one) else one for one in messages]}


def lacks_content(message: Any) -> bool:
    return isinstance(message, dict) and bool(message.get("tool_calls")) and message.get("content") is None


QUIRKS = {"deepseek": content_never_null}


class Upstream:
    """Where calls go: one name, one key, one or more addresses that can do the same."""

    def __init__(self, config: UpstreamConfig, way: Way, retries: int, breaking: Tuple[int, float], crowd: Crowd,
                 clock: Any, say: Callable[[str], None]):
        """`breaking` is (failures in a row, seconds) of the breakers; `say` is called with what the operator should
        know."""
        self.name, self.key, self.globs, self.model = config.name, config.key, config.models, config.model
        self.dialect, self.headers = config.dialect, config.headers
        self.line = Line(config.max_concurrency, crowd, clock) if config.max_concurrency else None
        self.header_lines = "".join([row + "\r\n" for row in config.headers.values()])
        self.mend, self.retries, self.clock, self.say = QUIRKS.get(config.name), retries, clock, say
        self.addresses = [Address(endpoint, way, Breaker(*breaking), clock) for endpoint in config.url]
        self.turn, self.lock = 0, threading.Lock()
        self.without_options: set = set()  # models for which stream_options are an error here

    def serves(self, model: str) -> bool:
        return any(fnmatch.fnmatchcase(self.name_of(model), glob) for glob in self.globs)

    def name_of(self, model: str) -> str:
        """Gemini takes models/NAME for NAME; limits and prices must not."""
        prefixed = self.dialect == "gemini" and model.startswith("models/")
        return model[len("models/"):] if prefixed else model

    def place(self, path: str, dialect: Dialect, metered: bool) -> Tuple[str, Dialect]:
        """Where a call goes, and which API it finds there. Gemini has a place of its own for calls of OpenAI's."""
        if self.dialect == "gemini":
            if dialect.name == "openai" and path.startswith("/v1/"):
                path = OPENAI_AT_GEMINI + path[len("/v1/"):]
            if path.startswith(OPENAI_AT_GEMINI):
                return path, DIALECTS["openai"]
        return path, dialect if metered or not self.dialect else DIALECTS[self.dialect]

    # -- which address

    def enter(self, failed: List[Address], beyond: bool) -> Optional[Address]:
        """-> the address with the fewest running calls, which has one more now; None where none can be asked.
        `beyond`: it tells nothing of how calls fare there."""
        with self.lock:
            address = self.addresses[0]
            if failed or len(self.addresses) > 1 or address.breaker.opened is not None:
                now = self.clock.monotonic()
                address = self.choose(failed, now)
                if address is None:
                    return None
                if not beyond:
                    address.breaker.enter(now)
            address.running += 1
            return address

    def choose(self, failed: List[Address], now: float) -> Optional[Address]:
        able = [one for one in self.addresses if one.breaker.allows(now) and one not in failed]
        self.turn += 1
        turned = self.turn % max(1, len(able))
        return min(able[turned:] + able[:turned], key=lambda one: one.running, default=None)

    def leave(self, address: Address) -> None:
        """A call of its is over."""
        with self.lock:
            address.running -= 1

    def judge(self, address: Address, good: Optional[bool]) -> None:
        breaker = address.breaker
        if not good or breaker.failures or breaker.opened is not None:
            with self.lock:
                before = breaker.opened
                breaker.judge(good, self.clock.monotonic())
                after = breaker.opened
            if (before is None) != (after is None):
                self.say("upstream %s: %s %s" % (
                    self.name, address.endpoint.origin, "is well again" if after is None else
                    "failed %d times in a row, left alone for %g s" % (breaker.failures, breaker.seconds)))

    def may_be_asked(self) -> bool:
        now = self.clock.monotonic()
        with self.lock:
            return any([one.breaker.allows(now) for one in self.addresses])

    def wait(self) -> float:
        """Seconds until the first breaker may be tried."""
        now = self.clock.monotonic()
        with self.lock:
            return min([one.breaker.opened + one.breaker.seconds - now for one in self.addresses
                        if one.breaker.opened is not None], default=0)

    def told(self) -> Dict[str, Any]:
        """For /health."""
        now = self.clock.monotonic()
        with self.lock:
            states = [one.breaker.state(now) for one in self.addresses]
            running = sum([one.running for one in self.addresses])
        told = {"state": min(states, key=("closed", "half_open", "open").index), "in_flight": running,
                "addresses": "%d/%d" % (states.count("closed"), len(states))}
        return {**told, "queue": self.line.told()} if self.line else told

    # -- what is asked

    def forward(self, method: str, head: Callable[[Address], bytes], body: Any, watch: Watch) -> Any:
        """Send one request and wait for the head of its answer. `head` gives the request's, but for the lines that
        frame its body; `body` is bytes, or a RequestBody to relay in blocks. An answer that asks for patience is
        asked for again, where that is set. Raises UpstreamFailed, UpstreamTimeout, UpstreamOpen, CallerGone."""
        answer = yield from self.ask(method, head, body, watch)
        for _ in range(self.retries):
            if answer.status not in (429, 503) or not isinstance(body, bytes):
                break
            patience = answer.head.get("retry-after", "")
            if not re.fullmatch("[0-9]", patience) or int(patience) > MOST_RETRY_SECONDS:
                break
            with answer:
                pass  # it is left unread
            yield THREAD
            watch.pause(threading.Event(), self.clock.monotonic() + int(patience))
            answer = yield from self.ask(method, head, body, watch)
        return answer

    def ask(self, method: str, head: Callable[[Address], bytes], body: Any, watch: Watch,
            beyond: bool = False) -> Any:
        """As `forward`, once. An address that cannot be reached was sent nothing, so the next one is asked."""
        failed: List[Address] = []
        failure: Optional[Refusal] = None
        while True:
            if watch.bounded and self.clock.monotonic() >= watch.until:
                raise UpstreamTimeout()  # nobody would wait for the answer
            address = self.enter(failed, beyond)
            if address is None:
                raise failure or UpstreamOpen(self.wait())
            answer = good = spare = None
            try:
                if address.tls or not isinstance(body, bytes):
                    yield THREAD
                link = address.spare()
                spare = link is not None
                if link is None and address.here and not watch.in_thread:
                    link = address.open_at_once(address.HERE_SECONDS)
                if link is None:
                    yield THREAD
                    link = address.open(watch)
                answer = yield from address.ask(link, method, head(address), body, watch)
                answer.upstream, good = self, answer.status not in FAILING
                return answer
            except (UpstreamFailed, UpstreamTimeout) as refusal:
                # what talks nonsense is there, all the same; a caller's own deadline says nothing, nor does a spare
                # connection that was closed at that moment
                bad = isinstance(refusal, UpstreamTimeout) or (refusal.silent and not spare)
                good = False if bad and self.clock.monotonic() < watch.until else None
                if not refusal.unsent:
                    if not isinstance(body, bytes) and not body.ended:
                        good = None  # it may have tired of waiting for the caller
                    raise
                failure = refusal
                failed.append(address)
            finally:
                if not beyond:  # a list of models says nothing of how calls fare, and its time is short
                    self.judge(address, good)
                if answer is None:
                    self.leave(address)

    def own_lines(self, address: Address, dialect: Dialect, shown: Optional[str] = None) -> str:
        """What we say to it ourselves; `shown` is the key of the caller's own, for those that want to see it."""
        key = shown if self.key == PASSTHROUGH else self.key
        if not key or dialect.CREDENTIAL.partition(":")[0].lower() in self.headers:
            return address.host_line + self.header_lines
        return address.host_line + dialect.CREDENTIAL % key + self.header_lines

    def without_ours(self, rows: Any) -> List[str]:
        """Header lines, but for those that are set for this upstream."""
        return [row for row in rows if row.partition(":")[0].lower() not in self.headers]

    def models(self, watch: Watch) -> List[str]:
        """The names of its models. Raises UpstreamFailed, UpstreamTimeout, UpstreamOpen, and ValueError where it
        answers with something else."""
        if self.model is not None or self.key == PASSTHROUGH:  # it has but one, or we have no key to ask with
            plain = [name for name in self.globs if not re.search(r"[*?[]", name)]
            return plain or ([self.model] if self.model else [])
        path, dialect = self.place("/v1/models", DIALECTS["openai"], metered=False)

        def head(address):
            return ("GET %s HTTP/1.1\r\n%s%sAccept: application/json\r\nAccept-Encoding: identity\r\n" % (
                address.target(path, dialect.MODELS_QUERY), self.own_lines(address, dialect),
                "".join([row + "\r\n" for row in self.without_ours(dialect.VERSION_LINES)]))).encode("latin-1")
        with run_through(self.ask("GET", head, b"", watch, beyond=True)) as answer:
            body = self.whole(answer, watch)
            try:
                names = [str(row["id"]) for row in parse_answer(body)["data"]]
            except (ValueError, LookupError, TypeError, RecursionError):
                raise ValueError("the upstream answered %d, and no list of models" % answer.status) from None
        names = [self.name_of(name) for name in names]
        return [name for name in names if self.serves(name)] if self.globs else names

    def whole(self, answer: Answer, watch: Watch, most: int = 1 << 22, seconds: float = math.inf) -> bytes:
        """The body of an answer, of at most `most` bytes, awaited for at most so many `seconds`."""
        wire, passage, body = answer.link.wire, Passage(answer.framing, Passage.PLAIN), b""
        deadline = self.clock.monotonic() + min(seconds, answer.address.read_timeout)
        try:
            while len(body) <= most:
                body += passage.feed(wire.take())
                if passage.framing.ended:
                    return body
                watch.wait(wire, READ, deadline)
                if not wire.fill():
                    if passage.end_of_stream()[0]:
                        return body
                    break
        except TimeoutError:
            raise UpstreamTimeout() from None
        except (OSError, Malformed) as failure:
            raise UpstreamFailed(failure) from None
        raise UpstreamFailed("answer was cut or too long")

    def mentions(self, answer: Answer, words: bytes, watch: Watch, most: int = 65536) -> bool:
        """Whether the body of an answer speaks of `words`. It is read, and stays to be passed on."""
        wire, deadline = answer.link.wire, self.clock.monotonic() + min(5, answer.address.read_timeout)
        while True:
            try:
                framing = copy.copy(answer.framing)
                _, payload = framing.feed(wire.ahead)
                if words in payload or framing.ended or len(wire.ahead) > most:
                    return words in payload
                watch.wait(wire, READ, deadline)
                if not wire.fill():
                    return False
            except (Malformed, OSError):  # TimeoutError is one, too
                return False


class Routes:
    """Finds the upstreams of a call: those that its path or its model names, in the order they are tried, or the
    base."""

    def __init__(self, base: Optional[Upstream], named: List[Upstream]):
        self.base, self.named = base, named
        self.all = ([base] if base else []) + named
        self.by_name = {upstream.name: upstream for upstream in named}
        self.known: Dict[str, List[Upstream]] = {}

    def find(self, call: Call) -> List[Upstream]:
        """Raises NotServed."""
        if call.prefix:
            return [self.by_name[call.prefix]]
        if self.base and not call.wanted:
            return [self.base]
        found = self.known.get(call.wanted)
        if found is None:
            found = [upstream for upstream in self.named if upstream.serves(call.wanted)]
            # nobody's own key is for a second vendor
            found = found[:1] + [upstream for upstream in found[1:] if upstream.key != PASSTHROUGH]
            found = found or ([self.base] if self.base else [])
            if len(self.known) >= KNOWN_MODELS:
                self.known.clear()
            self.known[call.wanted] = found
        if not found:
            raise NotServed(call.model)
        return found

    def close_lines(self) -> None:
        for upstream in self.all:
            if upstream.line:
                upstream.line.close()

    def close_stale(self, everything: bool = False) -> None:
        for upstream in self.all:
            for address in upstream.addresses:
                address.close_stale(everything)


# ------------------------------------------------------------------------------------------------------------
# Books: what is written down of every call. Entries are filled on the way and recorded once; lines are
# formatted and written by a thread of their own, so that a log nobody reads never blocks a call. It knows no
# sockets.
# ------------------------------------------------------------------------------------------------------------

IDENTITY = re.compile("[!-~]{1,128}")  # of a request, where the caller names it


def new_identity() -> str:
    """A random UUID (RFC 9562 5.4); it is no secret, so no system call is spent on it."""
    digits = "%030x" % random.getrandbits(120)
    return f"{digits[:8]}-{digits[8:12]}-4{digits[12:15]}-a{digits[15:18]}-{digits[18:]}"


PLAIN_WORD = re.compile(r"[!-\[\]-~]{1,80}")


class Entry:
    """What is written down of one request. `started`, `first_byte` and `ended` are monotonic seconds, `wall`
    is the end in unix nanoseconds; `queued` are milliseconds in line, None where there was none; `passed` counts
    bytes of body sent to the caller. `outcome` is one of ok, limited, refused, upstream_status, upstream_failed,
    upstream_cut, caller_gone, stopped, internal_error."""
    __slots__ = ("identity", "address", "started", "first_byte", "ended", "wall", "caller", "method", "path",
                 "status", "outcome", "cause", "call", "upstream", "hold", "passed", "listener", "usage",
                 "picodollars", "priced", "peer", "queued")

    def __init__(self, address: str, peer: str):
        """`peer` is where the connection comes from, `address` who that stands for."""
        self.address, self.peer, self.queued = address, peer, None
        self.identity = self.caller = self.method = self.path = self.call = self.upstream = self.hold = None
        self.first_byte = self.started = self.cause = self.listener = self.usage = self.priced = None
        self.status, self.outcome, self.passed, self.picodollars = 0, "ok", 0, 0

    def close(self, clock: Any) -> "Entry":
        """It is complete; what it no longer needs may be large."""
        self.ended, self.wall = clock.monotonic(), clock.time_ns()
        if self.started is None:
            self.started = self.ended  # it had no head to start with
        if self.call:
            self.listener = self.call.payload = self.call.body = self.call.outgoing = None
        return self

    def as_row(self) -> Tuple[Any, ...]:
        """In the order of COLUMNS. Of a call that reached no answer there is no usage."""
        call, hold, first = self.call, self.hold, self.first_byte
        usage = self.usage or NO_USAGE
        return (self.identity, self.wall / 1e9, self.caller.label if self.caller else self.address, self.address,
                self.method, self.path[:200], call and call.dialect.name, call and clean(call.model),
                call and clean(call.served), self.upstream, self.status, self.outcome, self.cause,
                bool(call and call.stream), usage.input, usage.cached, usage.cache_write, usage.output,
                usage.reasoning, usage.estimated, self.picodollars / PICODOLLARS, self.picodollars,
                self.priced is False, hold and hold.held, hold and hold.charges(),
                first and int((first - self.started) * 1000), int((self.ended - self.started) * 1000),
                self.passed, self.queued)

    def as_dict(self, moment: str) -> Dict[str, Any]:
        """`moment` is the end of the call, as text. Cost and remaining are None where no bucket was touched."""
        call, hold, usage = self.call, self.hold, self.usage
        held = hold and hold.tightest
        return {
            "time": moment, "id": self.identity, "caller": self.caller.label if self.caller else self.address,
            "method": self.method, "path": self.path and self.path[:200], "status": self.status,
            "model": call and call.model and call.model[:80], "upstream": self.upstream,
            "outcome": self.outcome, "cause": self.cause, "stream": bool(call and call.stream),
            "first_ms": self.first_byte and int((self.first_byte - self.started) * 1000),
            "ms": int((self.ended - self.started) * 1000),
            "queue_ms": self.queued, "cost": held and hold.amount,
            "remaining": held and hold.remaining, "input": usage and usage.input,
            "output": usage and usage.output, "estimated": usage and usage.estimated,
            "usd": spell_usd(self.picodollars) if self.priced else None, "bytes": self.passed}

    def as_text(self, moment: str) -> str:
        """One line of printable ASCII, whatever the caller sent; a ~ marks what was estimated."""
        call, hold, usage = self.call, self.hold, self.usage
        held, model = hold and hold.tightest, call and call.model
        if model and not PLAIN_WORD.fullmatch(model):
            model = ascii(model[:80]).replace(" ", "\\x20")
        first = "-" if self.first_byte is None else f"{int((self.first_byte - self.started) * 1000)}ms"
        cause = " cause=" + self.cause.replace(" ", "_") if self.cause else ""
        queue = f" queue={self.queued}ms" if self.queued else ""
        guess = "~" if usage and usage.estimated else ""
        tokens = f" in={guess}{usage.input} out={guess}{usage.output}" if usage else ""
        usd = " usd=" + spell_usd(self.picodollars) if self.priced else ""
        return (
            f"{moment} {self.caller.label if self.caller else self.address} {self.method or '-'} "
            f"{self.path[:200] if self.path else '-'} {model or '-'} {self.status} {self.outcome} "
            f"{'stream' if call and call.stream else '-'} first={first} "
            f"all={int((self.ended - self.started) * 1000)}ms cost={hold.amount if held else '-'} "
            f"left={hold.remaining if held else '-'}{tokens}{usd} bytes={self.passed} "
            f"upstream={self.upstream or '-'} id={self.identity or '-'}{queue}{cause}")


NO_USAGE = Usage()


def clean(text: Optional[str]) -> Optional[str]:
    """Text that any file can hold: JSON may spell half a character."""
    return text if text is None or text.isascii() else text.encode("utf-8", "backslashreplace").decode()


class Log:
    """Lines on stderr, spelled and written by one thread from a bounded queue; what does not fit is dropped and
    counted."""
    ROOM, BATCH, PAUSE = 10_000, 16, 0.05  # lines, lines, seconds

    def __init__(self, stream: Any, as_json: bool):
        """`stream` is a raw binary one: no lock of it can be held by a blocked writer when the process
        ends."""
        self.stream, self.as_json = stream, as_json
        self.queue: "collections.deque[Any]" = collections.deque()  # of lines, and entries to be spelled
        self.dropped, self.stop, self.work = 0, threading.Event(), threading.Event()
        self.second, self.moment = 0, ""
        self.thread = threading.Thread(target=self.run, name="log", daemon=True)
        self.thread.start()

    def spell(self, entry: Entry) -> str:
        """One line for one request."""
        second, rest = divmod(entry.wall, 10 ** 9)
        if second != self.second:
            self.moment = time.strftime("%Y-%m-%dT%H:%M:%S.%%03dZ", time.gmtime(second))
            self.second = second
        moment = self.moment % (rest // 10 ** 6)
        return json.dumps(entry.as_dict(moment)) if self.as_json else entry.as_text(moment)

    def say(self, row: str) -> None:
        """Queue one line."""
        self.record(json.dumps({"message": row}) if self.as_json and row[:1] != "{" else row)

    def record(self, row: Any) -> None:
        """Queue a line, or an Entry; never waits."""
        if len(self.queue) >= self.ROOM:
            self.dropped += 1
            return
        self.queue.append(row)
        if not self.work.is_set():
            self.work.set()

    def report(self) -> None:
        """A bug of ours, called inside an except block: its traceback, once."""
        self.say(traceback.format_exc().rstrip())

    def run(self) -> None:
        while self.queue or not self.stop.is_set():
            self.work.wait()
            self.work.clear()
            # lines are spelled by the dozen, which is quicker, but not by the thousand: calls wait meanwhile
            rows = [self.queue.popleft() for _ in range(min(len(self.queue), self.BATCH))]
            if self.queue:
                self.work.set()
            rows = [self.spell(row) if isinstance(row, Entry) else row for row in rows]
            if self.dropped:
                dropped, self.dropped = self.dropped, 0
                rows.append(('{"message": "%d log lines dropped"}' if self.as_json
                             else "%d log lines dropped") % dropped)
            data = memoryview("\n".join(rows + [""]).encode("ascii", "backslashreplace"))
            try:
                while data:
                    written = self.stream.write(data)
                    if written is None:  # a pipe that does not block, and is full
                        if self.stop.wait(0.05):
                            break
                    data = data[written or 0:]
            except (OSError, ValueError):
                pass  # a closed or full log is no reason to stop serving
            if not self.work.is_set():
                self.stop.wait(self.PAUSE)  # batches cost less than lines

    def close(self, wait: float) -> None:
        self.stop.set()
        self.work.set()
        self.thread.join(wait)


COLUMNS = (
    ("id", "TEXT"), ("time", "REAL"), ("caller", "TEXT"), ("address", "TEXT"), ("method", "TEXT"),
    ("path", "TEXT"), ("dialect", "TEXT"), ("model", "TEXT"), ("served", "TEXT"), ("upstream", "TEXT"),
    ("status", "INTEGER"), ("outcome", "TEXT"), ("cause", "TEXT"), ("stream", "INTEGER"), ("input", "INTEGER"),
    ("cached", "INTEGER"), ("cache_write", "INTEGER"), ("output", "INTEGER"), ("reasoning", "INTEGER"),
    ("estimated", "INTEGER"), ("usd", "REAL"), ("picodollars", "INTEGER"), ("unpriced", "INTEGER"),
    ("held", "INTEGER"), ("charges", "TEXT"), ("first_ms", "INTEGER"), ("ms", "INTEGER"), ("bytes", "INTEGER"),
    ("queue_ms", "INTEGER"))  # what is new comes last: files of before are widened


class DatabaseFault(Exception):
    """Why a file cannot be the database: it is something else."""


class Unwritable(DatabaseFault):
    """It, or its folder, cannot be read or written."""


class Database:
    """The SQLite file of calls and bucket levels. A file that is not ours, or damaged, is never written to."""
    APPLICATION = 0x6C6C6D70  # "llmp", where SQLite keeps the name of a file's maker (fileformat2, 1.3)
    SMALL = 1 << 24           # bytes that are checked in no time
    ROWS = 999 // len(COLUMNS)  # of a statement: SQLite before 3.32 takes 999 values
    SCHEMA = """CREATE TABLE IF NOT EXISTS calls (%s);
        CREATE INDEX IF NOT EXISTS calls_time ON calls (time);
        CREATE TABLE IF NOT EXISTS buckets (rule TEXT, subject TEXT, level INTEGER, since REAL,
        PRIMARY KEY (rule, subject));
        """ % ", ".join(map(" ".join, COLUMNS))

    def __init__(self, path: str, reading: bool = False):
        """Raises DatabaseFault; FileNotFoundError where there is nothing to read."""
        self.path = path
        try:
            new = not self.is_ours(path)
            if new and reading:
                raise FileNotFoundError(path)
            if not new:
                self.check(path)
            if reading:
                self.connection = self.connect(path, "ro")
                return
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # it tells who called what
            self.connection = self.connect(path, "rwc")
            if new:
                self.connection.executescript("BEGIN IMMEDIATE; PRAGMA application_id = %d; %s COMMIT"
                                              % (self.APPLICATION, self.SCHEMA))
            self.connection.execute("PRAGMA journal_mode = WAL").fetchall()  # PyPy keeps it open else
            self.connection.execute("PRAGMA synchronous = NORMAL")
            self.connection.execute("BEGIN IMMEDIATE")
            there = len(self.connection.execute("PRAGMA table_info(calls)").fetchall())
            for column in COLUMNS[there:]:
                self.connection.execute("ALTER TABLE calls ADD COLUMN %s %s" % column)
            self.connection.execute("COMMIT")
        except (OSError, sqlite3.Error) as failure:
            if reading and isinstance(failure, FileNotFoundError):
                raise
            raise Unwritable("DATABASE must be a file that can be written, or off (got '%s': %s)" % (
                path, getattr(failure, "strerror", None) or failure)) from None

    @staticmethod
    def connect(path: str, mode: str) -> sqlite3.Connection:
        if mode == "ro" and not os.path.exists(path + "-wal"):
            mode = "ro&immutable=1"  # nobody writes it now, and we may be allowed to read it alone
        connection = sqlite3.connect("file:%s?mode=%s" % (urllib.parse.quote(os.path.abspath(path)), mode), uri=True,
                                     timeout=5, isolation_level=None, check_same_thread=False)
        connection.text_factory = lambda text: text.decode("utf-8", "replace")
        return connection

    def is_ours(self, path: str) -> bool:
        """False where there is no file yet."""
        try:
            with open(path, "rb") as file:
                head = file.read(100)
        except FileNotFoundError:
            return False
        if head and (head[:16] != b"SQLite format 3\0" or head[68:72] != self.APPLICATION.to_bytes(4, "big")):
            raise DatabaseFault("%s is not a database of llm_proxy; it was left as it is" % path)
        return bool(head)

    def check(self, path: str) -> None:
        with contextlib.closing(self.connect(path, "ro")) as connection:
            try:
                columns = [row[1] for row in connection.execute("PRAGMA table_info(calls)")]
                sound = bool(columns) and columns == [name for name, _ in COLUMNS][:len(columns)]
                connection.execute("SELECT rule, subject, level, since FROM buckets").fetchall()
                if sound and os.path.getsize(path) < self.SMALL:
                    sound = connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
            except sqlite3.DatabaseError as failure:
                if "unable to open" in str(failure) or "locked" in str(failure):
                    raise
                sound = False
        if not sound:
            raise DatabaseFault("%s is damaged, or of another version; it was left as it is" % path)

    def add(self, rows: Iterable[Tuple[Any, ...]]) -> None:
        """Many by one statement: after each, this thread must wait for its turn again. Rows are made by the dozen,
        too, where they are made on the way: calls wait meanwhile."""
        rows, row = iter(rows), "(%s)" % ",".join("?" * len(COLUMNS))
        while True:
            some = list(itertools.islice(rows, self.ROWS))
            if not some:
                return
            self.connection.execute("INSERT INTO calls VALUES " + ",".join([row] * len(some)),
                                    list(itertools.chain.from_iterable(some)))

    def save(self, changed: Dict[Any, Tuple[int, float]], gone: List[Any]) -> None:
        self.connection.executemany("DELETE FROM buckets WHERE rule = ? AND subject = ?", map(self.spell, gone))
        self.connection.executemany(
            "INSERT OR REPLACE INTO buckets VALUES (?, ?, ?, ?)",
            [self.spell(key) + (max(-1 << 62, level), since) for key, (level, since) in changed.items()])

    @staticmethod
    def spell(key: Tuple[Any, ...]) -> Tuple[str, str]:
        return key[0], " ".join("%s=%s" % (kind, name.hex() if kind == "key" else name) for kind, name in key[1:])

    def levels(self) -> List[Tuple[Tuple[Any, ...], int, float]]:
        """-> (key, level, wall-clock time of the last refill), as they were saved."""
        found = []
        for rule_text, subject, level, since in self.connection.execute("SELECT * FROM buckets"):
            try:
                parts = [part.partition("=")[::2] for part in subject.split(" ") if part]
                whose = tuple((kind, bytes.fromhex(name) if kind == "key" else name) for kind, name in parts)
                found.append(((rule_text,) + whose, int(level), float(since)))
            except (ValueError, TypeError, AttributeError):
                pass  # written by somebody else: as good as a full bucket
        return found

    def forget(self, before: float, most: int) -> int:
        """Remove up to `most` calls that are older than `before`; -> how many there were."""
        return self.connection.execute("DELETE FROM calls WHERE rowid IN (SELECT rowid FROM calls WHERE time < ?"
                                       " LIMIT ?)", (before, most)).rowcount


class Ledger:
    """One row per call and the levels of buckets, written by one thread in batches from a bounded queue."""
    ROOM, PATIENCE = 10_000, 0.05
    BATCH_SECONDS, SAVE_SECONDS, FORGET_SECONDS = 0.25, 3, 600

    def __init__(self, database: Database, limits: Limits, clock: Any, days: int, log: Log):
        self.database, self.limits, self.clock, self.days, self.log = database, limits, clock, days, log
        self.queue: "collections.deque[Any]" = collections.deque()
        self.dropped, self.failed, self.stop = 0, 0.0, threading.Event()
        self.saved: Dict[Any, Tuple[int, float]] = {}
        self.restore()
        self.saving = self.forgetting = clock.monotonic()
        self.thread = threading.Thread(target=self.run, name="ledger", daemon=True)

    def restore(self) -> None:
        """Levels as they were, with the refill of the time in between; those of rules that are no more are
        forgotten."""
        by_text = {rule.text: rule for rule in self.limits.rules}
        now = self.clock.time_ns() / 1e9
        for key, level, since in self.database.levels():
            self.saved[key] = level, since
            if key[0] in by_text and by_text[key[0]].capacity is not None:
                self.limits.buckets.restore(by_text[key[0]], key, level, now - since)

    def is_full(self) -> bool:
        return len(self.queue) >= self.ROOM

    def record(self, entry: Entry) -> None:
        """Queue one row. A full queue waits a moment, then drops."""
        if self.is_full():
            end = time.monotonic() + self.PATIENCE
            while self.is_full() and time.monotonic() < end:
                time.sleep(0.005)
            if self.is_full():
                self.dropped += 1
                return
        self.queue.append(entry)

    def run(self) -> None:
        while not self.stop.wait(self.BATCH_SECONDS):
            self.turn()
        self.saving = 0
        self.turn()
        self.database.connection.close()

    def turn(self) -> None:
        """Write what is there. What cannot be written stays in the queue, until that is full."""
        now = self.clock.monotonic()
        batch = list(itertools.islice(self.queue, self.ROOM))
        try:
            self.write(batch, now)
        except sqlite3.Error as failure:
            if now > self.failed + 60 or not self.failed:
                self.failed = now
                self.log.say("the database cannot be written: %s" % failure)
            return
        except Exception:
            self.log.report()  # and go on without these
        for _ in batch:
            self.queue.popleft()

    def write(self, entries: List[Entry], now: float) -> None:
        saving, forgetting = now >= self.saving, now >= self.forgetting
        if not (entries or saving or forgetting):
            return
        database, wall = self.database, self.clock.time_ns() / 1e9
        if saving:
            self.saving = now + self.SAVE_SECONDS
            levels = self.limits.buckets.snapshot(wall)
            changed = {key: value for key, value in levels.items()
                       if key not in self.saved or self.saved[key][0] != value[0]
                       or abs(self.saved[key][1] - value[1]) > 0.01}
            gone = [key for key in self.saved if key not in levels]
            if not (entries or changed or gone or forgetting):
                return
        database.connection.execute("BEGIN IMMEDIATE")
        try:
            database.add(entry.as_row() for entry in entries)
            if saving:
                database.save(changed, gone)
            if forgetting and database.forget(wall - self.days * 86400, 1000) < 1000:
                self.forgetting = now + self.FORGET_SECONDS
            database.connection.execute("COMMIT")
        except BaseException:
            if database.connection.in_transaction:
                database.connection.execute("ROLLBACK")
            raise
        if saving:
            self.saved = levels

    def close(self, wait: float) -> None:
        self.stop.set()
        if self.thread.ident:
            self.thread.join(wait)


def open_usage_log(path: str) -> Log:
    """Raises OSError."""
    return Log(open(1 if path == "-" else path, "ab", buffering=0, closefd=path != "-"), as_json=True)


class Books:
    """The log, the ledger, and the file of JSON lines; each has a thread of its own, so that none waits for
    another."""

    def __init__(self, log: Log, ledger: Optional[Ledger], usage_log: Optional[Log]):
        self.log, self.ledger, self.usage_log = log, ledger, usage_log

    def open(self) -> None:
        """To be called when it is sure that this process will serve: two must not write the same levels."""
        if self.ledger:
            self.ledger.thread.start()

    def are_full(self) -> bool:
        """Whether `record` would have to wait a moment."""
        return self.ledger is not None and self.ledger.is_full()

    def record(self, entry: Entry) -> None:
        self.log.record(entry)
        # a page is no call, and neither is what had no head
        if (self.ledger or self.usage_log) and entry.method and (entry.call or entry.outcome != "ok"):
            if self.ledger:
                self.ledger.record(entry)
            if self.usage_log:
                self.usage_log.say(json.dumps(dict(zip([name for name, _ in COLUMNS], entry.as_row()))))

    def close(self, wait: float) -> None:
        for part in (self.ledger, self.usage_log, self.log):
            if part:
                part.close(wait)


# ------------------------------------------------------------------------------------------------------------
# Proxy: `serve` is the life of one call; `build` is the parts list, the only place where constructors meet.
# It does not know http.server.
# ------------------------------------------------------------------------------------------------------------

class Proxy:
    def __init__(self, config: Config, clock: Any, callers: Callers, limits: Limits, prices: Prices, meter: Meter,
                 dialects: Dialects, routes: Routes, relay: Relay, books: Books):
        self.config, self.clock, self.callers, self.limits = config, clock, callers, limits
        self.prices, self.meter, self.dialects, self.routes = prices, meter, dialects, routes
        self.relay, self.books = relay, books
        self.weights = config.key_weights or {}

    def serve(self, request: Request, reply: Any, entry: Entry) -> Any:
        """The life of one call, in five verbs. Every step may refuse by raising; what refuses before anything was
        sent leaves the call to the next upstream that it may go to. It yields what it waits for: THREAD, before it
        may wait for anything but its sockets; a Connection, to be told whether more of it came; a Flow, to be told
        how that ended."""
        caller = self.identify(request, entry)                                                      # identify
        if self.config.max_call_seconds or TIMEOUT_FIELD in request.head.rows:
            reply.bound()
        call = reply.call = entry.call = yield from self.dialects.read(request, reply.whole_body)
        if self.config.early_stream_seconds and call.stream and reply.may_begin_early():
            yield THREAD
            reply.begin_early()
        upstreams = self.routes.find(call)                                                          # route
        for upstream in upstreams:
            try:
                return (yield from self.ask(upstream, caller, request, call, reply, entry))
            except Refusal as refusal:
                if not refusal.unsent or upstream is upstreams[-1]:
                    raise

    def ask(self, upstream: Upstream, caller: Caller, request: Request, call: Call, reply: Any, entry: Entry) -> Any:
        """The rest of its life, at one upstream. Both with-blocks undo what they hold."""
        entry.upstream = upstream.name
        if call.endpoint is not None:
            call.aim(upstream.model or upstream.name_of(call.wanted), upstream.mend)
        with self.admit(caller, entry.address, call, upstream) as hold:                             # admit
            entry.hold = hold
            try:
                with (yield from self.forward(upstream, request, call, reply)) as answer:           # forward
                    passage = yield from reply.receive(answer)
                    if passage.framing.ended:
                        answer.leave()  # before the caller knows, who may call again at once
                    if answer.status >= 400:
                        hold.give_back()
                        entry.outcome = "upstream_status"
                    elif passage.framing.ended:
                        self.settle(entry, "ok")
                    reply.begin(answer, passage)
                    ending = "ok"
                    if not passage.framing.ended:
                        ending = yield reply.flow(answer, passage)
                    entry.passed = passage.passed
            except CallerGone:
                self.settle(entry, "caller_gone")
                raise
            self.settle(entry, ending)                                                              # settle
            if ending != "ok":
                entry.outcome = ending
                reply.cut(passage, Overloaded() if ending == "stopped" else UpstreamFailed("cut"))

    def identify(self, request: Request, entry: Entry) -> Caller:
        """Who asks, and from where, decided once for each head that a connection repeats."""
        derived = request.head.derived
        if "who" not in derived:
            callers, head = self.callers, request.head
            entry.address = callers.address(head, entry.peer)  # which is told of a stranger, too
            caller = callers.identify(callers.credential(head, request.query), entry.address)
            derived["who"] = callers.person(head, entry.peer, caller), entry.address
        entry.caller, entry.address = derived["who"]
        return entry.caller

    def admit(self, caller: Caller, address: str, call: Call, upstream: Upstream) -> Hold:
        costs = FREE if call.free else self.meter.before(call)
        return self.limits.admit(caller, address, call.served, costs, upstream.name)

    def forward(self, upstream: Upstream, request: Request, call: Call, reply: Any) -> Any:
        """Send the call upstream, after its turn where there is a line. What is not metered does not wait."""
        if upstream.line is None or call.free:
            return (yield from self.send_up(upstream, request, call, reply))
        slot = yield from self.stand_in_line(upstream, reply)
        try:
            answer = yield from self.send_up(upstream, request, call, reply)
        except BaseException:
            slot.leave()
            raise
        answer.slot = slot
        return answer

    def stand_in_line(self, upstream: Upstream, reply: Any) -> Any:
        if not upstream.may_be_asked():
            raise UpstreamOpen(upstream.wait())
        entry, caller = reply.entry, reply.entry.caller
        before = entry.queued or 0  # in the line of another upstream
        slot = reply.slot = upstream.line.enter(caller.key, self.weights.get(caller.key_name, 1), before / 1000)
        try:
            if not slot.running:
                yield THREAD
            slot.wait(reply.watch)
            return slot
        except BaseException:
            slot.leave()
            entry.hold.give_back()  # nothing was sent, and who leaves the line pays nothing
            raise
        finally:
            reply.slot, entry.queued = None, slot.waited()

    def send_up(self, upstream: Upstream, request: Request, call: Call, reply: Any) -> Any:
        """A stream tells its usage only when asked; an upstream that takes the question for an error is not asked
        again."""
        head = functools.partial(self.head_up, request, call, upstream)
        body = plain = call.outgoing if call.endpoint else b"" if reply.body.ended else reply.body
        if call.stream and self.meter.counting and call.endpoint in ("chat", "completions") and (
                call.served not in upstream.without_options):
            call.add_usage()
            body = call.outgoing
        answer = yield from upstream.forward(request.method, head, body, reply.watch)
        if call.added and answer.status in (400, 422):
            with contextlib.ExitStack() as stack:
                stack.push(answer)
                yield THREAD
                if not upstream.mentions(answer, b"stream_options", reply.watch):
                    stack.pop_all()
                    return answer
            call.added = False
            answer = yield from upstream.forward(request.method, head, plain, reply.watch)
            if answer.status < 400 and len(upstream.without_options) < KNOWN_MODELS:
                upstream.without_options.add(call.served)  # else the fault was another one
        return answer

    def settle(self, entry: Entry, ending: str) -> None:
        """Charge what the call used, and write that down. The second time, it does nothing."""
        call, hold = entry.call, entry.hold
        if call.free or hold.ended:
            return
        if ending == "internal_error":
            return hold.give_back()
        usage = entry.usage = self.meter.after(call, entry.listener, ending == "ok")
        entry.picodollars, entry.priced = self.prices.cost(usage, call.served)
        estimate = hold.costs[-1]
        if ending != "ok":
            estimate = min(estimate, max(1, usage.input + usage.output))
        hold.settle(self.meter.costs(usage, entry.picodollars, estimate))

    def head_up(self, request: Request, call: Call, upstream: Upstream, address: Address) -> bytes:
        """What goes upstream before the body, but for its framing. A metered answer must stay readable, so it is
        asked for plain."""
        derived, metered, path = request.head.derived, call.endpoint is not None, call.path
        known = derived.get(address)
        if known and known[0] == path:
            return known[1]
        dropped = REWRITTEN_FOR_CALLS if metered else NEVER_UPSTREAM
        if not IDENTITY.fullmatch(request.head.get("x-request-id", "")):
            dropped = dropped | {"x-request-id"}
        # CGI-like upstreams take a_b for a-b: names with "_" would pass what the others may not.
        dropped = dropped.union([name for name in request.head.rows
                                 if "_" in name or name.startswith((IDENTIFYING, OUR_FIELDS))
                                 or name == self.callers.caller_header])
        rows = request.head.end_to_end(dropped)
        place, dialect = upstream.place(path, call.dialect, metered)
        if dialect.name == upstream.dialect and "anthropic-version" not in request.head.rows:
            rows += dialect.VERSION_LINES
        if metered:
            rows += ["Content-Type: application/json", "Accept-Encoding: identity"]
        shown = Callers.shown(request.head, request.query) if upstream.key == PASSTHROUGH else None
        head = "%s %s HTTP/1.1\r\n%s%s" % (
            request.method, address.target(place, call.query), upstream.own_lines(address, dialect, shown),
            "".join([row + "\r\n" for row in upstream.without_ours(rows)]))
        derived[address] = path, head.encode("latin-1")
        return derived[address][1]


def default_rule(config: Config) -> Rule:
    """The plain settings, as a rule: whole intervals, several tokens each."""
    unit = {"request": "requests", "estimate": "estimate", "usage": "tokens"}[config.token_cost_mode]
    text = "each %d tokens per %ds burst %d" % (
        config.refill_tokens, config.refill_interval_seconds, config.max_tokens)
    return Rule(text, (("each", ""),), UNITS.index(unit), config.max_tokens, config.refill_tokens,
                config.refill_interval_seconds, (config.refill_tokens, config.refill_interval_seconds))


def build(config: Config, stream: Any, clock: Any = time, database: Any = None) -> Proxy:
    """Put the parts together. `clock` has monotonic() and time_ns(), as the module `time` has; `database` is an
    open Database, or None to keep everything in memory."""
    log = Log(stream, config.log_format == "json")
    limits = Limits(config.limits or [default_rule(config)], Buckets(clock), config.limit_message)
    prices = Prices(config.prices)
    meter = Meter(prices, 1 if config.limits else config.request_token_cost, config.response_token_reserve,
                  config.image_tokens, limits.units())
    ledger = Ledger(database, limits, clock, config.ledger_days, log) if database else None
    usage_log = open_usage_log(config.usage_log) if config.usage_log else None
    return Proxy(
        config, clock,
        Callers(config.proxy_api_keys, os.urandom(32), config.trusted_proxies or (), config.caller_header),
        limits, prices, meter,
        Dialects(config.model_aliases or {}, {one.name: one.dialect for one in config.upstreams}),
        build_routes(config, clock, log.say), Relay(clock, log.report), Books(log, ledger, usage_log))


def build_routes(config: Config, clock: Any, say: Callable[[str], None]) -> Routes:
    tls = None
    if config.speaks_https():
        tls = ssl.create_default_context(cafile=config.upstream_ca_file)
        if config.upstream_tls_verify == "off":
            tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    way = Way(config.open_timeout, config.first_byte_timeout or config.read_timeout, config.read_timeout, tls,
              config.https_proxy, config.no_proxy or "")
    breaking = config.breaker_failures, config.breaker_seconds
    crowd = Crowd(config.max_queue, config.max_queue_per_caller, config.queue_seconds)
    made = [Upstream(one, way, config.upstream_retries, breaking, crowd, clock, say) for one in config.all_upstreams()]
    return Routes(made.pop(0) if config.base_api_url else None, made)


# ------------------------------------------------------------------------------------------------------------
# Pages: what a person, a browser or a monitor asks us and not the upstream. They charge nothing and name no
# address.
# ------------------------------------------------------------------------------------------------------------

class Page(NamedTuple):
    status: int
    body: bytes = b""
    lines: Tuple[str, ...] = ()


class Catalogue:
    """The models of all upstreams. They are asked side by side, and what they say is kept for a minute; who does
    not answer in time is asked again soon, and what it said before holds until then. Of a named upstream only
    those count that its calls need no prefix for."""
    ASK_SECONDS, KEEP_SECONDS, AGAIN_SECONDS = 5, 60, 5

    def __init__(self, routes: Routes, clock: Any):
        self.upstreams = [upstream for upstream in routes.all if upstream.globs or upstream is routes.base]
        self.clock, self.lock = clock, threading.Lock()
        self.lists: List[Optional[List[str]]] = [None] * len(self.upstreams)
        self.good_until = -math.inf

    def names(self) -> List[str]:
        # whoever waits for another one's question takes what that brings
        if self.lock.acquire(timeout=self.ASK_SECONDS + 0.5):
            try:
                now = self.clock.monotonic()
                if now >= self.good_until:
                    found = self.ask(now)
                    self.lists = [new if new is not None else old for new, old in zip(found, self.lists)]
                    self.good_until = now + (self.AGAIN_SECONDS if None in found else self.KEEP_SECONDS)
            finally:
                self.lock.release()
        return [name for names in self.lists for name in names or ()]

    def ask(self, now: float) -> List[Optional[List[str]]]:
        """-> what each tells, None where it does not."""
        lists: List[Optional[List[str]]] = [None] * len(self.upstreams)
        watch = Watch(None, self.clock, now + self.ASK_SECONDS)

        def run(number, upstream):
            try:
                lists[number] = upstream.models(watch)
            except (Refusal, ValueError):
                pass  # left out

        threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(self.upstreams)]
        for thread in threads:
            try:
                thread.start()
            except RuntimeError:  # can't start new thread
                raise Overloaded() from None
        for thread in threads:
            thread.join(max(0, now + self.ASK_SECONDS - self.clock.monotonic()))
        return list(lists)


class Pages:
    CORS_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"

    def __init__(self, proxy: Proxy):
        self.proxy, self.catalogue = proxy, Catalogue(proxy.routes, proxy.clock)
        # else the list is that of the only upstream
        self.lists = bool(proxy.config.base_model or proxy.routes.named or proxy.config.model_aliases)

    def find(self, request: Request) -> Optional[Callable[[Request, Entry], Page]]:
        """-> the page that answers this request, None where it is the upstream's."""
        if request.method == "OPTIONS":
            return self.preflight
        if request.method in ("GET", "HEAD"):
            if request.path == "/health":
                return self.health
            if self.lists and (request.path in ("/v1/models", "/models")
                               or (request.path == "/v1beta/models" and self.proxy.routes.named)):
                return self.models
        return None

    def preflight(self, request: Request, entry: Entry) -> Page:
        asked = request.head.get("access-control-request-headers", "Authorization, Content-Type")
        return Page(204, lines=(
            "Access-Control-Allow-Methods: " + self.CORS_METHODS,
            "Access-Control-Allow-Headers: " + asked,
            "Access-Control-Max-Age: 86400") if self.proxy.config.cors_origins else ())

    def health(self, request: Request, entry: Entry) -> Page:
        """Open to all; whoever shows no valid credential is told the quota of the address."""
        proxy = self.proxy
        try:
            proxy.identify(request, entry)
        except Refusal:
            entry.caller = Caller(("address", entry.address), entry.address)
        limits, books, config = proxy.limits, proxy.books, proxy.config
        takes = [Take(rule, key, min(rule.capacity, config.request_token_cost) if not config.limits else 1)
                 for rule, key in limits.matching(entry.caller, entry.address, config.base_model)]
        told = {"ok": True, "version": VERSION, "model": config.base_model}
        if takes:
            quota, wait = limits.buckets.peek(takes)
            told["quota"] = {
                "limit": quota.limit, "remaining": quota.remaining, "refill_tokens": quota.refill_tokens,
                "refill_interval_seconds": quota.refill_seconds, "wait_seconds": wait}
        told["upstreams"] = {upstream.name: upstream.told() for upstream in proxy.routes.all}
        if books.ledger:
            told["ledger"] = {"queued": len(books.ledger.queue), "dropped": books.ledger.dropped}
        return Page(200, json.dumps(told).encode())

    def models(self, request: Request, entry: Entry) -> Page:
        self.proxy.identify(request, entry)
        names = self.catalogue.names() + list(self.proxy.config.model_aliases or ())
        return Page(200, self.proxy.dialects.guess(request).models(list(dict.fromkeys(names))))


# ------------------------------------------------------------------------------------------------------------
# Handler: HTTP on the caller's side, one request after another: in the Relay's thread, in one of its own where that
# would have to wait, never in both at once. It knows neither tokens nor prices.
# ------------------------------------------------------------------------------------------------------------

RATE_FIELDS = (  # in the order of Quota
    "X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Refill-Tokens", "X-RateLimit-Refill-Seconds",
    "X-RateLimit-Reset-Seconds")
ANY_ORIGIN = "Access-Control-Allow-Origin: *\r\nAccess-Control-Expose-Headers: *\r\n"
RATE_LINES = "".join(name + ": %s\r\n" for name in RATE_FIELDS)
CRLF = "\r\n"
REPLACED = HOP_BY_HOP.union(  # fields of an answer that we write ourselves
    ["content-length", "location", "content-location", "x-request-id", "x-upstream-request-start",
     "x-upstream-request-stop", "x-llm-input-tokens", "x-llm-output-tokens", "x-llm-cost-usd", "x-llm-estimated",
     "x-queue-ms"] + [name.lower() for name in RATE_FIELDS])
REPLACED_WITH_CORS = REPLACED.union("access-control-" + name for name in (
    "allow-origin", "allow-headers", "allow-methods", "allow-credentials", "expose-headers", "max-age",
    "allow-private-network"))
REASONS = {status: phrase for status, (phrase, _) in http.server.BaseHTTPRequestHandler.responses.items()}


class Room:
    """Memory for all bodies that are held at once, in bytes. Small ones are not counted: there is one at most for each
    connection."""
    SMALL = 65536

    def __init__(self, size: int):
        self.left, self.lock = size, threading.Lock()

    def take(self, size: int) -> None:
        """Raises Overloaded where there is not so much."""
        with self.lock:
            if size > self.left:
                raise Overloaded()
            self.left -= size

    def give(self, size: int) -> None:
        with self.lock:
            self.left += size


class RequestBody:
    """What a caller sends after its head, read in blocks or whole. It has FREE_SECONDS, and more only for
    what really arrives: a trickle does not keep it open. 100 Continue is sent when, and only if, somebody
    wants to read."""
    FREE_SECONDS, BYTES_PER_SECOND = 60, 16384
    AT_ONCE = 65536  # bytes that are read and parsed in no time

    def __init__(self, caller: Connection, request: Request, most: int, room: Room, clock: Any):
        self.caller, self.most, self.room, self.clock, self.held = caller, most, room, clock, 0
        self.length = request.length
        self.framing = Chunked() if self.length is None else Sized(self.length)
        self.coded = "content-encoding" in request.head.rows
        self.awaited = "expect" in request.head.rows and request.version == 1
        if self.awaited and request.head.get("expect").lower() != "100-continue":
            raise Unexpected()
        self.started, self.taken, self.until = clock.monotonic(), 0, math.inf

    @property
    def ended(self) -> bool:
        return self.framing.ended

    def read(self, upstream: Optional[Connection] = None) -> Optional[bytes]:
        """-> the next bytes; None if `upstream` speaks first. Raises BrokenBody, TooSlow, CallerGone."""
        while True:
            payload = self.take() if self.caller.ahead else b""
            if payload or self.framing.ended:
                return payload
            if not self.wait(upstream):
                return None

    def take(self) -> bytes:
        """Unwrap what has come already."""
        data, self.caller.ahead = self.caller.ahead, b""
        try:
            _, payload = self.framing.feed(data)
        except Malformed:
            raise BrokenBody() from None
        if self.framing.ended:
            self.caller.ahead = self.framing.excess
        self.taken += len(payload)
        return payload

    def invite(self) -> None:
        if self.awaited:
            self.awaited = False
            self.caller.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def due(self) -> float:
        """When the next bytes must have come."""
        return min(self.started + self.FREE_SECONDS + self.taken / self.BYTES_PER_SECOND, self.until)

    def wait(self, upstream: Optional[Connection]) -> bool:
        try:
            self.invite()
            left = self.due() - self.clock.monotonic()
            wanted = [(self.caller.descriptor, READ)] + ([(upstream.descriptor, READ)] if upstream else [])
            found = ready(left, *wanted)
            if not found and left <= 0:
                raise TooSlow()
            if self.caller.descriptor in found and not self.caller.fill():
                raise CallerGone()
        except OSError:
            raise CallerGone() from None
        return not (upstream and upstream.descriptor in found and (not upstream.fill() or upstream.ahead))

    def await_more(self, watch: Watch) -> Any:
        """As `wait`, wherever the call runs."""
        if watch.in_thread:
            return self.wait(None)
        try:
            self.invite()
            watch.deadline = self.due()
            if not (yield self.caller):
                raise CallerGone()
        except TimeoutError:
            raise TooSlow() from None
        except OSError:
            raise CallerGone() from None

    def blocks(self, upstream: Connection) -> Any:
        while not self.ended:
            block = self.read(upstream)
            if block is None:
                return
            yield block

    def whole(self, watch: Watch) -> Any:
        """The body of a metered call, at most `most` bytes. It yields as Proxy.serve does."""
        if self.coded:
            raise Unsupported()
        if self.length is not None and self.length > self.most:
            raise TooLarge()
        blocks, ahead = [], self.caller.ahead
        if self.length is not None and self.length <= len(ahead):  # it came with its head
            self.framing.left, self.framing.ended = 0, True
            self.caller.ahead = ahead[self.length:]
            return ahead[:self.length]
        while not self.ended:
            if not watch.in_thread and max(self.length or 0, self.taken) > self.AT_ONCE:
                yield THREAD  # to read and parse it takes a while
            if not self.caller.ahead:
                yield from self.await_more(watch)
            blocks.append(self.take())
            if self.taken > self.most:
                raise TooLarge()
            if self.taken > self.held + self.room.SMALL:
                self.room.take(self.taken - self.held)
                self.held = self.taken
        return b"".join(blocks)

    def forget(self) -> None:
        """Nobody needs it any more."""
        if self.held:
            self.room.give(self.held)
            self.held = 0

    def skip(self) -> bool:
        """Whether nothing of the body is left, after dropping what has come already."""
        if not self.ended and self.caller.ahead and not self.awaited:
            try:
                self.take()
            except BrokenBody:
                pass
        return self.ended


class Reply:
    """The way back to one caller: begin an answer that came from upstream, or send one of ours; `closing`
    says that the connection cannot carry another request."""
    WHOLE_SECONDS, MAX_WHOLE = 10, 1 << 18

    begun = early = answering = closing = unframed = reset = False
    request: Optional[Request] = None
    body: Optional[RequestBody] = None
    call: Optional[Call] = None
    slot: Optional[Slot] = None  # its place in line
    patience = end = math.inf    # seconds that the caller has for a wait; when the call is to be over
    pulse = math.inf             # seconds of a pause after which a comment fills it
    started = 0                  # unix nanoseconds, when the request's head was there

    def __init__(self, caller: Connection, watch: Watch, proxy: Proxy, room: Room, entry: Entry):
        self.caller, self.watch, self.proxy, self.room, self.entry = caller, watch, proxy, room, entry

    def take(self, request: Request) -> None:
        """Take the head of the request that is to be answered."""
        self.started = self.proxy.clock.time_ns()
        self.request, self.closing = request, request.closing
        if "x-request-id" in request.head.rows:
            shown = request.head.get("x-request-id")
            self.entry.identity = shown if IDENTITY.fullmatch(shown) else None
        self.entry.method, self.entry.path = request.method, request.path
        self.body = RequestBody(
            self.caller, request, self.proxy.config.max_body_bytes, self.room, self.proxy.clock)

    # -- while nothing comes

    def bound(self) -> None:
        """Set the deadlines of this call."""
        seconds, started = self.proxy.config.max_call_seconds, self.entry.started
        text = self.request.head.get(TIMEOUT_FIELD)
        if text is not None:
            if not re.fullmatch("[0-9]{1,9}", text) or not int(text):
                raise BadRequest("X-LLM-Proxy-Timeout-Ms must be a whole number of milliseconds, at least 1")
            self.patience = int(text) / 1000
        if seconds:
            self.end = started + seconds
        self.body.until = min(self.end, started + self.patience)
        self.watch.bound(self.body.until)

    def may_begin_early(self) -> bool:
        """Whether the caller's client knows what comments are."""
        return self.call.dialect.TAKES_COMMENTS and self.call.endpoint not in WORDLESS

    def begin_early(self) -> None:
        """A stream that waits long begins with comments."""
        self.watch.bound(self.body.until, self.entry.started + self.proxy.config.early_stream_seconds, self.speak)

    def speak(self) -> None:
        """Tell the caller of a stream that its call is alive, after a head where there was none yet."""
        comment, slot, head = WAITING, self.slot, b""
        if slot:
            comment, self.entry.queued = b": waiting, %d ahead\n\n" % slot.line.ahead(slot), slot.waited()
        if not self.begun:
            self.early = True
            if self.request.version == 0:
                self.closing = self.unframed = True
            head = self.head(200, "OK", "Content-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
                             + ("" if self.unframed else "Transfer-Encoding: chunked\r\n"))
        self.write(head + self.framed(comment))

    def framed(self, event: bytes) -> bytes:
        """An event of ours, in a stream whose head was ours."""
        return event if self.unframed else chunk(event)

    def error_event(self, refusal: Refusal) -> bytes:
        dialect = self.call.dialect
        return dialect.error_event(refusal.body or dialect.error(refusal, refusal.status))

    # -- what comes from upstream

    def whole_body(self) -> Any:
        return self.body.whole(self.watch)

    def receive(self, answer: Answer) -> Any:
        """Take in what has come of a body; -> the way it will go. A metered answer that is no stream is waited
        for, so that its head can say what it cost, unless it is large or takes its time."""
        call, head, framing = self.call, answer.head, answer.framing
        if self.watch.bounded:
            self.watch.bound(self.end)
        plain = head.get("content-encoding", "identity") == "identity"
        if self.early and not (answer.status == 200 and head.streamed and plain):
            raise self.late(answer)  # which waits: what began early is in a thread
        listener = self.entry.listener = None if call.free or answer.status >= 400 else Listener(
            call, head.streamed, plain)
        if head.streamed and plain and call.dialect.TAKES_COMMENTS:
            config = self.proxy.config
            self.pulse = config.stream_heartbeat_seconds or (
                Watch.SPEAK_SECONDS if config.early_stream_seconds else math.inf)
        style, self.framing_line = Passage.AS_IS, ""
        hiding = listener is not None and listener.hiding and not framing.ended
        if hiding or self.early or self.pulse < math.inf or isinstance(framing, (Chunked, UntilClose)):
            if self.request.version == 0:
                # HTTP/1.0 knows no chunks: closing ends the body
                style, self.closing, self.unframed = Passage.PLAIN, True, True
            else:
                style = Passage.AS_IS if isinstance(framing, Chunked) and not hiding else Passage.CHUNKED
                self.framing_line = "Transfer-Encoding: chunked\r\n"
        elif answer.length is not None and answer.status != 204:
            self.framing_line = "Content-Length: %d\r\n" % answer.length
        passage = Passage(framing, style, listener)
        if self.pulse < math.inf:
            passage.tail = b""
        try:
            self.first = passage.feed(answer.link.wire.take())
            if listener and not call.stream and not head.streamed and not framing.ended:
                yield from self.await_rest(answer, passage)
        except (Malformed, OSError) as failure:
            raise UpstreamFailed(failure) from None
        return passage

    def late(self, answer: Answer) -> LateAnswer:
        """What an answer says that is no stream, for a caller whose stream has begun."""
        body = answer.upstream.whole(answer, self.watch, 65536, self.patience)
        try:
            found = parse_answer(body)
        except (ValueError, RecursionError):
            found = None
        return LateAnswer(answer.status, compact(found) if isinstance(found, dict) and answer.status >= 400 else None)

    def flow(self, answer: Answer, passage: Passage) -> Flow:
        flow = Flow(answer.link.wire, self.caller, passage, min(answer.address.read_timeout, self.patience), self.end,
                    self.pulse)
        flow.all_here = answer.leave
        return flow

    def await_rest(self, answer: Answer, passage: Passage) -> Any:
        wire, clock = answer.link.wire, self.proxy.clock
        deadline = clock.monotonic() + min(self.WHOLE_SECONDS, answer.address.read_timeout, self.patience)
        while not passage.framing.ended and len(self.first) < self.MAX_WHOLE:
            try:
                there = yield from self.watch.coming(wire, deadline)
            except TimeoutError:
                return
            if there:
                self.first += passage.feed(wire.take())
                continue
            whole_body, rest = passage.end_of_stream()
            if not whole_body:
                raise UpstreamFailed("closed in the middle of its answer")
            self.first += rest

    def begin(self, answer: Answer, passage: Passage) -> None:
        """Send the head of an answer, together with what has come of its body."""
        clock, entry, usage = self.proxy.clock, self.entry, self.entry.usage
        entry.first_byte, self.answering = clock.monotonic(), True
        if self.early:
            return self.write(self.first)
        lines = (f"{self.lines_down(answer)}{self.framing_line}X-Upstream-Request-Start: {self.started}\r\n"
                 f"X-Upstream-Request-Stop: {clock.time_ns()}\r\n")
        if usage and not self.call.stream:
            lines += (f"X-LLM-Input-Tokens: {usage.input}\r\nX-LLM-Output-Tokens: {usage.output}\r\n"
                      f"X-LLM-Cost-USD: {spell_usd(entry.picodollars)}\r\n"
                      f"{'X-LLM-Estimated: true' + CRLF if usage.estimated else ''}")
        self.write(self.head(answer.status, answer.head.reason, lines) + self.first)

    def lines_down(self, answer: Answer) -> str:
        """The header lines of an answer that are passed on as they came, or nearly."""
        head = answer.head
        if "down" not in head.derived or "location" in head.rows or "content-location" in head.rows:
            rows = head.end_to_end(REPLACED_WITH_CORS if self.proxy.config.cors_origins else REPLACED)
            prefix = "/" + self.call.prefix if self.call.prefix else ""
            for name in ("location", "content-location"):
                if name in head.rows:
                    rows.append("%s: %s" % (name.title(), answer.address.location(head.get(name), prefix)))
            if "x-request-id" in head.rows:
                rows.append("X-Upstream-Request-ID: " + head.get("x-request-id"))
            head.derived["down"] = "".join([row + "\r\n" for row in rows])
        return head.derived["down"]

    def cut(self, passage: Optional[Passage] = None, why: Optional[Refusal] = None) -> None:
        """End an answer that is not whole so that nobody takes it for whole: no last chunk, or too few bytes,
        or, where only closing ends the body, a reset. A stream whose head was ours is told `why`, where `passage` has
        room for that."""
        self.closing = True
        if self.early and passage:
            self.write(passage.between(self.error_event(why)))
        if self.unframed:
            self.reset = True
            self.caller.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    # -- what comes from us

    def send(self, status: int, body: bytes, lines: Tuple[str, ...] = (),
             content_type: str = "application/json") -> None:
        if status != 204:
            lines += ("Content-Type: " + content_type, "Content-Length: %d" % len(body))
        with_body = self.request is None or self.request.method != "HEAD"
        self.entry.passed = len(body) if with_body else 0
        head = self.head(status, REASONS.get(status, "Error"), "".join([row + "\r\n" for row in lines]))
        self.write(head + (body if with_body else b""))

    def refuse(self, refusal: Refusal) -> None:
        """Say no: a limited call gets an assistant that says so, everybody else an error."""
        self.entry.outcome, self.entry.cause = refusal.outcome, refusal.cause
        if self.begun:
            if self.early and not self.answering:
                self.write(self.framed(self.error_event(refusal)))
            return self.cut()
        self.closing = self.closing or refusal.closing
        call, fields = self.call, dict(refusal.fields)
        dialect = call.dialect if call else self.proxy.dialects.guess(self.request)
        reply = None
        if isinstance(refusal, LimitReached):
            self.entry.hold = Hold(tightest=refusal.tightest)
            if not self.for_programs():
                reply = dialect.limit_reply(call, str(refusal), self.started // 10 ** 9)
            if reply is None and (refusal.wait is None or refusal.wait > 60):
                fields["x-should-retry"] = "false"  # SDKs would ask three times
        if reply is not None and dialect.limit_type(call) == "text/event-stream":
            fields["Cache-Control"] = "no-cache"
        lines = tuple("%s: %s" % field for field in fields.items())
        if reply is not None:
            return self.send(200, reply, lines, dialect.limit_type(call))
        self.send(refusal.status, dialect.error(refusal, refusal.status), lines)

    def for_programs(self) -> bool:
        """Whether a limited caller is told by an error: LIMIT_REPLY."""
        asked, rows = self.proxy.config.limit_reply, self.request.head.rows
        people = "mozilla/" in rows.get("user-agent", "").lower() or any(
            name.startswith(IDENTIFYING) for name in rows)
        return asked == "error" or (asked == "auto" and not people)

    # -- both

    def head(self, status: int, reason: str, lines: str) -> bytes:
        """`lines` are header lines, each with its line end."""
        self.begun = True
        entry, hold, origins = self.entry, self.entry.hold, self.proxy.config.cors_origins
        entry.status = status
        if entry.identity is None:
            entry.identity = new_identity()
        if self.body is None or not self.body.skip():
            # What is left of the body would be taken for the next request.
            self.closing = self.caller.dropping = True
        return "".join((
            f"HTTP/1.1 {status} {reason}\r\n{lines}X-Request-ID: {entry.identity}\r\n",
            RATE_LINES % hold.quota if hold and hold.tightest else "",
            "" if entry.queued is None else f"X-Queue-Ms: {entry.queued}{CRLF}",
            ANY_ORIGIN if origins == ("*",) else self.cors(self.request) if origins else "",
            "Connection: close\r\n\r\n" if self.closing else "\r\n")).encode("latin-1")

    def cors(self, request: Optional[Request]) -> str:
        allowed = self.proxy.config.cors_origins
        origin = request and request.head.get("origin")
        if origin in allowed:
            return ("Access-Control-Allow-Origin: %s\r\nAccess-Control-Expose-Headers: *\r\nVary: Origin\r\n"
                    % origin)
        return "Vary: Origin\r\n"

    def write(self, data: bytes) -> None:
        """Send all of `data`, however slowly it is taken; in the Relay's thread it is left to the Relay. Raises
        CallerGone."""
        if not self.watch.in_thread:
            if data:
                self.watch.leave_to_relay(self.caller, data)
            return
        while data:
            try:
                data = self.caller.send(data)
            except WOULD_BLOCK:
                left = min(Flow.SLOW_READER_SECONDS, self.end - self.proxy.clock.monotonic())
                if not ready(left, (self.caller.descriptor, WRITE)):
                    raise CallerGone() from None
            except OSError:
                raise CallerGone() from None


class QuietEnd(Exception):
    """An idle connection is closed without a word."""


class Handler:
    """One caller's connection: idle, running, awaiting more bytes, carrying a body, stuck with an answer, in a thread,
    or over. Each way out of these is a method below. By TLS, and where the system tells of no hang-ups, it is in a
    thread, or carrying."""
    HEAD_SECONDS = 15        # from a head's first byte to its last; also for the first byte of a connection
    IDLE_SECONDS = 75        # between two requests
    LINGER_SECONDS = 5       # without a byte, after an answer that came before the request was whole
    LINGER_TOTAL_SECONDS = 30
    MAX_LINGER_BYTES = 64 << 20

    def __init__(self, request: socket.socket, client_address: Any, server: "Server"):
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.request, self.peer, self.address = request, client_address[0], address_of(client_address[0])
        self.server, self.clock, self.relay = server, server.proxy.clock, server.proxy.relay
        self.caller = Connection(request)
        self.watch = Watch(self.caller, self.clock)
        self.watch.party = self
        self.relay.look_after(self.watch)
        self.served, self.begun, self.last = False, None, None
        self.over = self.unrecorded = False
        self.reply: Optional[Reply] = None
        self.life: Any = None  # the exchange that is running, and what it goes on with: a value, or a fault
        self.result: Tuple[Any, Optional[BaseException]] = (None, None)
        # in the Relay's thread:
        self.awaited: Optional[Connection] = None  # which is to stir next
        self.flow: Optional[Flow] = None           # the body that is carried
        self.unsent: Any = b""                     # of an answer, what the caller has not taken yet

    def advance(self) -> Any:
        """Go on until something must be waited for; -> what: a Flow, a Connection, THREAD, or None when the exchange
        is over."""
        if self.life is None:
            self.reply = Reply(self.caller, self.watch, self.server.proxy, self.server.room,
                               Entry(self.address, self.peer))
            self.life = self.exchange(self.reply)
        reply, (value, fault), self.result = self.reply, self.result, (None, None)
        try:
            return self.life.throw(fault) if fault else self.life.send(value)
        except StopIteration:
            pass
        except QuietEnd:
            self.life, self.reply, self.over = None, None, True
            return None
        except Exception as reason:
            self.refuse(reply, reason)
        self.life, self.served, self.over, self.unrecorded = None, True, reply.closing, True
        return None

    def record(self) -> None:
        """What was asked has been answered, and that was sent."""
        if self.unrecorded:
            self.unrecorded, reply = False, self.reply
            if reply.body:
                reply.body.forget()
            self.server.proxy.books.record(reply.entry.close(self.clock))

    def patience(self) -> float:
        """Seconds that the next request's first byte may take."""
        return self.IDLE_SECONDS if self.served else self.HEAD_SECONDS

    def work(self) -> Optional[Flow]:
        """Do, in a thread, what the Relay's could not: serve until a body is to be carried (-> the Flow), or, where the
        Relay can go on, until one answer is sent; or wait for room in the ledger."""
        if self.unrecorded:
            self.record()
            return None
        while not self.over:
            wanted = self.advance()
            if isinstance(wanted, Flow):
                return wanted
            self.record()
            if self.caller.patient and self.life is None:
                break
        return None

    # -- in the Relay's thread, which must not wait

    def expect(self, connection: Connection, events: int, act: Callable[[int], None], until: float) -> None:
        """Wait for `connection` to be ready, and `act` then; at `until` it is overdue."""
        self.awaited = connection
        self.relay.wake_at(self.watch, until)
        self.relay.watch(connection, events, act)

    def rest(self) -> None:
        """Wait for nothing more."""
        if self.awaited:
            self.awaited.act = None
        self.awaited, self.watch.alarm = None, math.inf

    def attend(self) -> None:
        """Wait for the next request."""
        self.watch.in_thread, self.reply = False, None
        if self.caller.ahead:
            return self.head_came()
        self.server.idle.add(self.request)
        if self.server.draining:
            return self.part()
        self.expect(self.caller, READABLE, self.caller_stirred, self.clock.monotonic() + self.patience())

    def caller_stirred(self, _: int) -> None:
        try:
            alive = self.caller.fill()
        except OSError:
            alive = False
        if not alive:
            self.part()
        elif self.caller.ahead:
            self.head_came()

    def head_came(self) -> None:
        """At least a part of it."""
        self.rest()
        self.server.idle.discard(self.request)
        if b"\r\n\r\n" in self.caller.ahead:
            self.step()
        elif self.server.draining:
            self.part()
        else:
            self.take_thread()

    def step(self) -> None:
        wanted = self.advance()
        if wanted is None:
            self.relay.later.append((self, self.answered))  # when the answer was sent, or got stuck
        elif wanted is THREAD:
            self.take_thread()
        elif isinstance(wanted, Flow):
            self.flow = wanted
            self.relay.begin(wanted, self)
        elif self.watch.gone:
            self.go_on(None, CallerGone())
        else:
            self.expect(wanted, READABLE, self.more_came, self.watch.due(self.watch.deadline))

    def more_came(self, _: int) -> None:
        """From where it was awaited."""
        connection = self.awaited
        try:
            alive = connection.fill()
        except OSError as failure:
            return self.go_on(None, failure)
        if connection.ahead or not alive:
            self.go_on(alive)

    def go_on(self, value: Any, fault: Optional[BaseException] = None) -> None:
        """What was awaited is there, or will not come."""
        self.rest()
        self.result = value, fault
        self.step()

    def caller_left(self) -> None:
        if self.life and self.awaited:
            self.go_on(None, CallerGone())

    def overdue(self) -> None:
        if self.life:
            self.go_on(None, TimeoutError())
        elif self.unsent:
            self.untaken()
            self.answered()
        else:
            self.part()

    def carried(self, ending: str) -> None:
        """A body has ended."""
        self.result, self.flow = (ending, None), None
        if self.life is None:
            return
        if self.caller.patient:
            self.watch.in_thread = False
            self.step()
        else:
            self.server.resume(self)

    def stuck(self, connection: Connection, rest: Any) -> None:
        """The Relay could not send all; `rest` is None where the connection is broken."""
        if connection is not self.caller:
            if rest and connection is self.awaited:  # else it hears of that by itself
                self.result = rest, None
                self.take_thread()
        elif self.flow:
            self.flow.stuck(rest)
        elif rest:
            self.unsent = rest
        else:
            self.untaken()

    def untaken(self) -> None:
        """The caller did not take its answer."""
        self.unsent, self.over, self.reply.reset = b"", True, True
        self.reply.entry.outcome = "stopped" if self.server.cutting else "caller_gone"

    def answered(self) -> None:
        """After an exchange, when its answer was taken."""
        if self.unsent:
            return self.expect(self.caller, WRITABLE, self.caller_takes,
                               min(self.clock.monotonic() + Flow.SLOW_READER_SECONDS, self.reply.end))
        if self.unrecorded and self.server.proxy.books.are_full():
            return self.take_thread()
        self.record()
        if self.over:
            self.part()
        else:
            self.attend()

    def caller_takes(self, _: int) -> None:
        """What was left of an answer."""
        try:
            self.unsent = self.caller.send(self.unsent)
        except WOULD_BLOCK:
            return
        except OSError:
            self.untaken()
        self.answered()

    def take_thread(self) -> None:
        """Go on where it can be waited for anything."""
        self.rest()
        self.watch.in_thread = True
        if self.server.start_thread(self):
            return
        self.watch.in_thread = False
        if self.life:
            self.result = None, Overloaded()
            self.step()
        elif self.over or self.unrecorded:
            self.record()
            self.server.dismiss_later(self.request)
        else:
            self.server.turn_away(self.request)

    def part(self) -> None:
        """The connection is over."""
        self.rest()
        self.over = True
        self.server.idle.discard(self.request)
        if self.lingers():
            self.take_thread()
        else:
            self.server.end(self)

    def fail(self) -> None:
        """A bug of ours ended it."""
        self.rest()
        life, flow, self.life, self.flow, self.over, self.unsent = self.life, self.flow, None, None, True, b""
        if flow:
            flow.end("internal_error")  # `carried` has nothing left to go on with
        self.server.idle.discard(self.request)
        self.server.shutdown_request(self.request)
        if life:
            life.close()  # gives back what it holds

    # -- one request

    def exchange(self, reply: Reply) -> Any:
        """One request and its answer; yields as Proxy.serve does."""
        self.begun = None
        self.watch.renew()
        try:
            data = read_head(self.caller, REQUEST_LINE, self.more)
        except OSError:
            raise QuietEnd() from None  # reset between two requests
        if data is None:
            raise QuietEnd()
        reply.entry.started = self.clock.monotonic()
        self.last = request = Request.read(data, self.last)
        reply.take(request)
        reply.closing = reply.closing or self.server.draining
        if request.method in ("TRACE", "TRACK", "CONNECT"):
            raise NotAllowed()  # an upstream that echoes what it got would show its key
        page = self.server.pages.find(request)
        if page:
            if page == self.server.pages.models:
                yield THREAD  # upstreams may have to be asked
            reply.send(*page(request, reply.entry))
        else:
            yield from self.server.proxy.serve(request, reply, reply.entry)

    def refuse(self, reply: Reply, reason: Exception) -> None:
        """Turn what was raised into an answer, if there is anybody to take it."""
        try:
            if isinstance(reason, CallerGone):
                raise reason
            if not isinstance(reason, Refusal):
                self.server.proxy.books.log.report()
                reason = InternalError()
            reply.refuse(reason)
        except CallerGone:
            reply.entry.outcome = "stopped" if self.server.cutting else "caller_gone"
            reply.closing = True
            reply.entry.status = reply.entry.status or 499  # nothing was sent; nginx's number for it

    def more(self) -> bool:
        """For read_head: read on, within the deadline that holds now. Until its head is whole a request is no call
        yet, and does not hold up the end of the server."""
        caller, server = self.caller, self.server
        server.idle.add(self.request)
        try:
            if server.draining:
                raise QuietEnd()
            if not caller.ahead and self.begun is None:
                if not caller.readable(self.patience()) or server.draining:
                    raise QuietEnd()  # an end of ours must not be read as one of theirs
                alive = caller.fill()
                if not caller.ahead:
                    self.begun = self.clock.monotonic()  # of TLS, a record that is not whole
            else:
                now = self.clock.monotonic()
                self.begun = self.begun or now
                if not caller.readable(self.begun + self.HEAD_SECONDS - now):
                    raise TooSlow()
                alive = caller.fill()
        finally:
            server.idle.discard(self.request)
        if server.draining:
            raise QuietEnd()
        return alive

    def spoke_last(self) -> bool:
        """Whether its last words were an answer, which a reset could still erase."""
        reply = self.reply
        return bool(reply and reply.begun and not reply.reset)

    def lingers(self) -> bool:
        """Whether the caller may still be sending what it was refused."""
        return self.spoke_last() and not (self.reply.body and self.reply.body.ended)

    def finish(self) -> bool:
        """Before closing, read on where the caller may still be sending: closing on unread bytes sends a
        reset, and that could erase our last answer (RFC 9112 9.6). -> whether it can be closed at once."""
        if self.caller.encrypted and not (self.reply and self.reply.reset):
            with contextlib.suppress(OSError, ValueError):
                self.request.unwrap()  # says that this is the end; nobody waits for the other side to say so, too
        if not self.lingers():
            return not self.spoke_last()
        try:
            self.request.shutdown(socket.SHUT_WR)
            now = self.clock.monotonic()
            end, taken = now + self.LINGER_TOTAL_SECONDS, 0
            while now < end and taken < self.MAX_LINGER_BYTES and not self.server.draining:
                if not self.caller.readable(min(self.LINGER_SECONDS, end - now)):
                    break
                data = self.caller.receive()
                if not data:
                    break
                taken, now = taken + len(data), self.clock.monotonic()
        except (OSError, ValueError):
            pass
        return True


# ------------------------------------------------------------------------------------------------------------
# Server: threads, caps, TLS, draining. Who owns which lock: Buckets.lock guards the table of levels; Server.lock
# guards the open connections; Upstream.lock guards running calls and breakers; Crowd.lock guards the lines;
# Room.lock guards a number; the Relay's flows and seats belong to its thread alone, and a Handler to the thread that
# runs it, which start_thread and Relay.post hand on; queues and events guard themselves. The Relay's thread takes
# these locks, too, but never Catalogue.lock.
# No lock is held while another is taken, or while anything waits, but for Catalogue.lock: whoever wants the list
# waits for the one who asks for it.
# ------------------------------------------------------------------------------------------------------------

class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024
    allow_reuse_address = os.name == "posix"  # elsewhere it would let two servers share a port
    allow_reuse_port = False
    WELCOMED = 4  # new connections that may wait for the Relay, while more are accepted
    TURNED_AWAY = 128  # refused connections that are kept a moment, so that their answer can be read
    MOST_PER_ADDRESS = 256  # connections, where nothing else is set
    ROOM = 256 << 20  # bytes of bodies of metered calls that are held at once

    def __init__(self, proxy: Proxy, host: str, port: int, most: int):
        self.proxy, self.pages, self.most = proxy, Pages(proxy), most
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.room = Room(max(self.ROOM, 8 * proxy.config.max_body_bytes))
        self.tls: Optional[ssl.SSLContext] = None
        self.reload()
        self.lock = threading.Condition()
        self.open: Dict[socket.socket, str] = {}    # every caller's socket, and its address
        self.by_address: Dict[str, int] = {}        # how many are open of each
        self.idle: set = set()       # those between two requests
        self.draining = self.cutting = False
        self.welcomed = self.greeted = 0  # new connections, counted by who accepts and by the Relay
        self.turned_away: "collections.deque[Tuple[float, socket.socket]]" = collections.deque()
        self.swept = proxy.clock.monotonic()
        self.unstarted: "collections.deque[Handler]" = collections.deque()
        super().__init__((host, port), Handler)
        proxy.books.open()

    def server_bind(self) -> None:
        """As TCPServer does: HTTPServer would ask the DNS for our name here, and wait for it."""
        if self.server_address[0] == "::":
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # IPv4, too
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def get_request(self) -> Tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as failure:
            if failure.errno in OUR_OWN_LACK:
                time.sleep(0.1)  # accept would fail again at once, and again: a busy loop
            raise

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        peer, address = client_address[0], address_of(client_address[0])
        most = self.most_of(peer, address)
        with self.lock:
            number = self.by_address.get(address, 0)
            full = len(self.open) >= self.most or number >= most
            if not full:
                self.open[request] = address
                self.by_address[address] = number + 1
        if full:
            return self.turn_away(request)
        if PATIENT and not self.tls:
            return self.welcome(request, client_address)
        try:
            # Thread.start returns when the thread runs: in a burst of callers that leaves the Relay its share.
            threading.Thread(target=self.process_request_thread, args=(request, client_address),
                             daemon=True).start()
        except RuntimeError:  # can't start new thread
            self.turn_away(request)

    def most_of(self, peer: str, address: str) -> float:
        """How many connections may come from there; one that speaks for many may have any number."""
        most = self.proxy.config.max_connections_per_address
        if self.proxy.callers.trusts(peer) or (not most and (address == "::1" or address.startswith("127."))):
            return math.inf
        return most or self.MOST_PER_ADDRESS

    def welcome(self, request: socket.socket, client_address: Any) -> None:
        """Leave a new connection to the Relay's thread."""
        try:
            handler = self.RequestHandlerClass(request, client_address, self)
        except OSError:  # gone before it began
            return self.shutdown_request(request)
        self.welcomed += 1
        self.proxy.relay.post(functools.partial(self.greet, handler), handler)
        for _ in range(100):  # who accepts would keep the interpreter's lock, and the Relay from what it carries
            if self.welcomed - self.greeted <= self.WELCOMED:
                break
            time.sleep(0.001)

    def greet(self, handler: Handler) -> None:
        self.greeted += 1
        handler.attend()

    def hand_back(self, handler: Handler) -> None:
        """The Relay's thread can run it again."""
        self.proxy.relay.post(handler.attend, handler)

    def process_request_thread(self, request: socket.socket, client_address: Any) -> None:
        try:
            if self.tls:
                request = self.encrypt(request, self.tls)
                if request is None:
                    return
            self.converse(self.RequestHandlerClass(request, client_address, self))
        except Exception as failure:
            if not isinstance(failure, OSError):  # gone before it began
                self.proxy.books.log.report()
            self.shutdown_request(request)

    # -- TLS

    def reload(self) -> None:
        """Read the certificates again; connections that are open keep theirs. Raises OSError, ValueError."""
        config = self.proxy.config
        if config.tls_cert_file:
            self.tls = server_context(config.tls_cert_file, config.tls_key_file)

    def encrypt(self, request: socket.socket, context: ssl.SSLContext) -> Optional[ssl.SSLSocket]:
        """The handshake, which has as long as a head has; -> None where there was none. Raises OSError."""
        request.setblocking(False)
        encrypted = context.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        with self.lock:  # the old one is empty now
            self.open[encrypted] = self.open.pop(request)
        end = self.proxy.clock.monotonic() + Handler.HEAD_SECONDS
        self.idle.add(encrypted)
        try:
            while not self.draining:
                try:
                    encrypted.do_handshake()
                    return encrypted
                except ssl.SSLWantReadError:
                    wanted = READ
                except ssl.SSLWantWriteError:
                    wanted = WRITE
                if not ready(end - self.proxy.clock.monotonic(), (encrypted.fileno(), wanted)):
                    break
        except ssl.SSLError as failure:
            if failure.reason == "HTTP_REQUEST":  # told past the encryption, which is not there yet
                self.answer_plainly(functools.partial(socket.socket.send, encrypted),
                                    BadRequest("This port speaks https"))
            self.dismiss_later(encrypted)
            return None
        except OSError:
            pass
        finally:
            self.idle.discard(encrypted)
        self.shutdown_request(encrypted)
        return None

    def converse(self, handler: Handler) -> None:
        """Run a connection in this thread, until it is over or the Relay has work for it."""
        try:
            flow = handler.work()
            if flow:
                self.proxy.relay.carry(flow, handler)
            elif handler.over:
                self.end(handler)
            else:
                self.hand_back(handler)
        except Exception:
            self.proxy.books.log.report()
            self.shutdown_request(handler.request)

    def end(self, handler: Handler) -> None:
        at_once, handler.reply = handler.finish(), None  # which may be large, and is part of a cycle
        if at_once:
            self.shutdown_request(handler.request)
        else:
            self.dismiss_later(handler.request)

    def start_thread(self, handler: Handler) -> bool:
        """Have it go on in a thread of its own; False where none can be started."""
        try:
            # threading.Thread would make the Relay wait for its start
            _thread.start_new_thread(self.converse, (handler,))
        except RuntimeError:
            return False
        return True

    def resume(self, handler: Handler) -> None:
        """As start_thread; if need be, later. Only those come here that the Relay cannot run."""
        if not self.start_thread(handler):
            self.unstarted.append(handler)  # service_actions tries again

    def shutdown_request(self, request: socket.socket) -> None:
        self.forget(request)
        self.close_request(request)

    def forget(self, request: socket.socket) -> None:
        self.proxy.relay.forget(request.fileno())
        with self.lock:
            address = self.open.pop(request, None)
            if address is not None:
                self.by_address[address] -= 1
                if not self.by_address[address]:
                    del self.by_address[address]
            if not self.open:
                self.lock.notify_all()

    def turn_away(self, request: socket.socket) -> None:
        """Answer 503 without a thread; where callers speak TLS, that takes one, so they are told nothing."""
        request.setblocking(False)
        if not self.tls:
            self.answer_plainly(request.send, Overloaded(), "Retry-After: 1\r\n")
        self.dismiss_later(request)

    def answer_plainly(self, send: Callable[[bytes], int], refusal: Refusal, lines: str = "") -> None:
        """A connection's first and last words, where it has no Handler."""
        body = self.proxy.dialects.openai.error(refusal, refusal.status)
        head = "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%sConnection: close\r\n\r\n"
        with contextlib.suppress(OSError):
            send((head % (refusal.status, REASONS[refusal.status], len(body), lines)).encode() + body)

    def dismiss_later(self, request: socket.socket) -> None:
        """Close a connection a moment after its last answer, when that has been read: closing on bytes that
        came meanwhile would reset it."""
        self.forget(request)
        try:
            request.setblocking(False)
            request.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        self.turned_away.append((self.proxy.clock.monotonic(), request))
        if len(self.turned_away) > self.TURNED_AWAY:
            self.dismiss(self.turned_away.popleft()[1])

    def dismiss(self, request: socket.socket) -> None:
        try:
            request.recv(BLOCK)
        except OSError:
            pass
        self.close_request(request)

    def service_actions(self) -> None:
        """Called between two connections, and ten times a second, in the thread that accepts: a bug here must
        not end it."""
        try:
            self.sweep(self.proxy.clock.monotonic())
        except Exception:
            self.proxy.books.log.report()

    def sweep(self, now: float) -> None:
        while self.turned_away and self.turned_away[0][0] < now - 1:
            self.dismiss(self.turned_away.popleft()[1])
        self.try_again()
        if now > self.swept + 1:
            self.swept = now
            self.proxy.routes.close_stale()

    def try_again(self) -> None:
        """Start the threads that could not be started before."""
        for _ in range(len(self.unstarted)):
            self.resume(self.unstarted.popleft())

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.proxy.books.log.report()

    def drain(self, wait: float) -> int:
        """Stop accepting, close what is idle, let running calls finish for `wait` seconds, then cut them; ->
        how many were cut."""
        self.draining = True
        self.shutdown()
        self.server_close()
        end = self.proxy.clock.monotonic() + wait
        with self.lock:
            for request in list(self.idle):
                try:
                    # wakes the Relay, or its thread, to whom all of TLS belongs
                    socket.socket.shutdown(request, socket.SHUT_RD)
                except OSError:
                    pass
            while self.open and self.proxy.clock.monotonic() < end:
                self.lock.wait(min(0.1, end - self.proxy.clock.monotonic()))
                self.try_again()
            left = len(self.open)
        if left:
            self.cutting = True
            self.proxy.routes.close_lines()
            self.proxy.relay.cut_all()
            with self.lock:
                self.lock.wait_for(lambda: not self.open, 0.5)
                for request in list(self.open):
                    try:
                        socket.socket.shutdown(request, socket.SHUT_RDWR)
                    except OSError:
                        pass
                self.lock.wait_for(lambda: not self.open, 1)
        self.proxy.routes.close_stale(everything=True)
        while self.turned_away:
            self.dismiss(self.turned_away.popleft()[1])
        return left


# ------------------------------------------------------------------------------------------------------------
# Demo: a small endpoint on loopback, for the first minute without a model. It stands in for a real one and is
# no part of the proxy.
# ------------------------------------------------------------------------------------------------------------

class DemoHandler(http.server.BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    MODEL, WORD_SECONDS = "demo", 0.05
    TEXT = ("This is the built-in demo endpoint of llm_proxy."
            " It answers every call with these words, one after another.")

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            return self.send_error(404)
        self.answer({"object": "list", "data": [
            {"id": self.MODEL, "object": "model", "created": 0, "owned_by": "demo"}]})

    def do_POST(self) -> None:
        call = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        chat = "messages" in call
        words = [word + " " for word in self.TEXT.split()]
        usage = {"prompt_tokens": len(json.dumps(call)) // 4, "completion_tokens": len(words)}
        usage["total_tokens"] = sum(usage.values())
        frame = {"id": "demo-1", "object": "chat.completion" if chat else "text_completion",
                 "created": int(time.time()), "model": self.MODEL}
        if not call.get("stream"):
            said = {"message": {"role": "assistant", "content": self.TEXT}} if chat else {"text": self.TEXT}
            return self.answer({
                **frame, "choices": [{"index": 0, **said, "finish_reason": "stop"}], "usage": usage})
        frame["object"] += ".chunk" if chat else ""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for word in ([""] if chat else []) + words + [None]:
            delta = ({} if word is None else {"content": word} if word
                     else {"role": "assistant", "content": ""})
            said = {"delta": delta} if chat else {"text": word or ""}
            self.event(json.dumps({**frame, "choices": [
                {"index": 0, **said, "finish_reason": "stop" if word is None else None}]}))
            time.sleep(self.WORD_SECONDS if word else 0)
        if (call.get("stream_options") or {}).get("include_usage"):
            self.event(json.dumps({**frame, "choices": [], "usage": usage}))
        self.event("[DONE]")
        self.wfile.write(LAST_CHUNK)

    def event(self, data: str) -> None:
        self.wfile.write(chunk(b"data: %b\n\n" % data.encode()))

    def answer(self, value: Dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class DemoServer(http.server.ThreadingHTTPServer):
    """Answers to loopback only, on a port the system picks."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), DemoHandler)
        threading.Thread(target=self.serve_forever, name="demo", daemon=True).start()

    def server_bind(self) -> None:
        Server.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the proxy hung up, as it should when its caller does


# ------------------------------------------------------------------------------------------------------------
# Commands: the command line. `main` comes last.
# ------------------------------------------------------------------------------------------------------------

def describe(config: Config) -> List[str]:
    """What the proxy is about to do, in a few lines without secrets."""
    cost = {"request": "%d" % config.request_token_cost,
            "estimate": "its estimated tokens, %d for an answer without a maximum" % config.response_token_reserve,
            "usage": "the tokens it used"}[config.token_cost_mode]
    return ["upstream %s %s, key %s, %s" % (
                one.name, " ".join([url.origin + url.path for url in one.url]),
                "of the caller" if one.key == PASSTHROUGH else "set" if one.key else "not set",
                ("model %s" % one.model if one.model else "models %s" % " ".join(one.models) if one.models
                 else "model as asked for" if one.name == "base" else "by its prefix alone")
                + (", calls at once: %d" % one.max_concurrency if one.max_concurrency else ""))
            for one in config.all_upstreams()] + [
            "limits " + "; ".join(rule.text for rule in config.limits) if config.limits else
            "each caller's bucket holds %d tokens and gains %d every %d s; a call costs %s" % (
                config.max_tokens, config.refill_tokens, config.refill_interval_seconds, cost)]


def settings_help() -> str:
    rows = ["settings, from the environment or from .env in the working directory:"]
    for group, settings in SETTINGS.items():
        rows += ["", group + ":"]
        for setting in settings:
            rows.append("  %-24s %s%s" % (
                setting.name, setting.sentence, "" if setting.default is None else " [%s]" % setting.default))
    rows += ["", "One more upstream; NAME is the prefix of its paths, or a vendor: %s:" % ", ".join(VENDORS)]
    rows += ["  %-29s %s" % (setting.name, setting.sentence) for setting in UPSTREAM_SETTINGS]
    return "\n".join(rows)


def check(config: Config, stream: Any) -> int:
    """Print what would be used, ask the upstream for its models; -> exit code."""
    for name, text in config.texts.items():
        stream.write("%-24s %s\n" % (
            name, "not set" if text is None else "set, not shown" if is_secret(name) else text))
    for warning in config.warnings():
        stream.write("warning: %s\n" % warning)
    sound = True
    for upstream in build_routes(config, time, lambda row: None).all:
        upstream.model = None  # its own list is asked for
        for address in upstream.addresses[:]:
            upstream.addresses = [address]
            try:
                names = upstream.models(Watch(None, time, time.monotonic() + 10))
                told = ", ".join(map(clean, names)) or "none that would be asked of it"
            except Refusal as reason:
                sound, told = False, "%s (%s)" % (reason, reason.cause)
            except ValueError as reason:
                sound, told = False, str(reason)
            stream.write("models of %s at %s: %s\n" % (upstream.name, address.endpoint.origin, told))
    return 0 if sound else 1


def take_one_cpu(wanted: Optional[int], port: int) -> None:
    """Stay on one CPU. Threads that share an interpreter lock gain nothing from a second one and lose by passing the
    lock from CPU to CPU: measured, a tenth of the calls per second, and a fifth on PyPy. The port picks the CPU, so
    that two proxies differ. Raises OSError for a CPU that is not there."""
    if (wanted is None or not sys.platform.startswith("linux")
            or not getattr(sys, "_is_gil_enabled", lambda: True)()):
        return
    libc = ctypes.CDLL(None, use_errno=True)  # PyPy has no os.sched_setaffinity
    allowed = (ctypes.c_uint8 * 128)()
    if libc.sched_getaffinity(0, len(allowed), allowed) < 0:
        return
    cpus = [cpu for cpu in range(8 * len(allowed)) if allowed[cpu // 8] >> cpu % 8 & 1]
    cpu = cpus[port % len(cpus)] if wanted < 0 else wanted
    only = (ctypes.c_uint8 * 128)()
    if cpu in cpus:
        only[cpu // 8] = 1 << cpu % 8
    if libc.sched_setaffinity(0, len(only), only) < 0 and wanted >= 0:
        raise OSError(ctypes.get_errno(), "no such CPU")


def relax_garbage_collection() -> None:
    """Calls leave hardly any cycles behind, so CPython may look for them less often, but not so seldom that a look
    would halt the streams. PyPy sizes its nursery by the CPU's cache, too small for what 50 running calls hold: it is
    told at start, so the process becomes a new one with the same number. Measured: 4 % more calls per second, and a
    third on PyPy."""
    if hasattr(gc, "freeze"):
        gc.freeze()
        gc.set_threshold(10_000, 20, 20)
    elif sys.platform.startswith("linux") and "PYPY_GC_NURSERY" not in os.environ:
        with open("/proc/self/cmdline", "rb") as file:
            arguments = file.read().split(b"\0")[:-1]
        os.execve(sys.executable, arguments, {**os.environ, "PYPY_GC_NURSERY": "32M"})


def raise_descriptor_limit() -> None:
    """A call needs two descriptors, and the usual soft limit is 1024."""
    if os.name == "posix":
        import resource
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            pass  # macOS has a lower limit of its own


DEMO_HINT = """\
try this until the limit is reached (add -H 'Authorization: Bearer KEY' where keys are asked for):
  curl -N %s://127.0.0.1:%d/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model":"demo","max_tokens":1,"messages":[{"role":"user","content":"hello"}],"stream":true}'"""


def open_database(config: Config) -> Tuple[Optional[Database], List[str]]:
    """-> the database, and what is to be said. Where only the default one cannot be written, nothing is
    remembered."""
    if config.database == "off":
        return None, []
    try:
        return Database(config.database), []
    except Unwritable as fault:
        if config.texts["DATABASE"] != DEFAULT_DATABASE:
            raise
        return None, ["warning: calls and buckets are kept in memory only: %s" % fault]


def run(config: Config, log_stream: Any, hint: str) -> int:
    """Serve until a signal says stop; -> exit code."""
    try:
        take_one_cpu(config.cpu_affinity, config.port)
    except OSError:
        log_stream.write(b"CPU_AFFINITY must be a CPU this process may use (got '%d')\n"
                         % config.cpu_affinity)
        return 2
    raise_descriptor_limit()
    threading.stack_size(512 * 1024)  # of calls that wait: 8 MiB each is more than strict systems lend
    try:
        database, remarks = open_database(config)
        proxy = build(config, log_stream, database=database)
    except (DatabaseFault, OSError) as fault:
        log_stream.write(("%s\n" % fault).encode("ascii", "backslashreplace"))
        return 2
    try:
        server = Server(proxy, config.host, config.port, config.max_connections)
    except OSError as failure:
        proxy.books.log.say("cannot listen on %s port %d: %s; choose another with HOST= or PORT=" % (
            config.host, config.port, failure.strerror or failure))
        proxy.books.log.close(1)
        return 1
    stop, stopper = socket.socketpair()
    stopper.setblocking(False)
    signal.set_wakeup_fd(stopper.fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop_once(server))
    hang_up = getattr(signal, "SIGHUP", None)
    if hang_up and config.tls_cert_file:  # else it means that the terminal was closed
        signal.signal(hang_up, lambda *_: None)  # it comes by way of the wake-up descriptor
    proxy.books.log.say("llm_proxy %s listens on %s://%s:%d" % (
        VERSION, config.scheme, "[%s]" % config.host if ":" in config.host else config.host, config.port))
    for row in (describe(config) + remarks + ["warning: " + warning for warning in config.warnings()]
                + ([hint] if hint else [])):
        proxy.books.log.say(row)
    threading.Thread(target=server.serve_forever, args=(0.1,), name="accept", daemon=True).start()
    while stop.recv(1)[0] == hang_up:
        try:
            server.reload()
            proxy.books.log.say("certificates were read again")
        except (OSError, ValueError) as failure:
            proxy.books.log.say("certificates were not read again, the old ones stay: %s" % failure)
    proxy.books.log.say("stopping: running calls have %g s" % config.drain_seconds)
    cut = server.drain(config.drain_seconds)
    proxy.books.log.say("stopped, %d calls cut" % cut if cut else "stopped")
    proxy.books.close(5)
    return 0


def stop_once(server: Server) -> Callable[[int, Any], None]:
    """The first signal wakes `run` by way of the wake-up descriptor; the second ends the process at once."""
    seen: List[int] = []

    def handle(number, _):
        if seen:
            os._exit(1)
        seen.append(number)
    return handle


USAGE_OF = {"caller": "caller", "model": "coalesce(served, model, '-')", "upstream": "coalesce(upstream, '-')",
            "outcome": "outcome", "day": "date(time, 'unixepoch')"}
SUMS = ("calls", "input", "cached", "output", "reasoning", "estimated", "unpriced", "usd")


def usage(options: argparse.Namespace, path: str, stream: Any) -> int:
    """Print who used what, from the ledger; -> exit code."""
    since = 0.0
    if options.since:
        number, unit = options.since[:-1], options.since[-1:]
        if not re.fullmatch("[0-9]{1,6}", number) or unit not in DURATIONS:
            print("--since must be such as 30m, 12h or 7d (got %r)" % options.since, file=sys.stderr)
            return 2
        since = time.time() - int(number) * DURATIONS[unit]
    try:
        database = Database(path, reading=True)
    except FileNotFoundError:
        print("no calls are recorded in %s (DATABASE)" % path, file=sys.stderr)
        return 1
    except DatabaseFault as fault:
        print(fault, file=sys.stderr)
        return 2
    with contextlib.closing(database.connection) as connection:
        found = connection.execute(
            "SELECT %s, count(*), sum(input), sum(cached), sum(output), sum(reasoning), sum(estimated),"
            " sum(unpriced), sum(picodollars / 1000000), sum(picodollars %% 1000000)"
            " FROM calls WHERE time >= ? GROUP BY 1 ORDER BY 9 DESC, 10 DESC, 2 DESC, 1"
            % USAGE_OF[options.by], (since,)).fetchall()
    rows = [dict(zip((options.by,) + SUMS, row[:-2] + (spell_usd(row[-2] * 1000000 + row[-1]),))) for row in found]
    if options.json:
        print(json.dumps(rows, indent=2), file=stream)
        return 0
    lines = [(options.by,) + SUMS] + [tuple(str(value) for value in row.values()) for row in rows]
    if options.csv:
        csv.writer(stream, lineterminator="\n").writerows(lines)
        return 0
    widths = [max(map(len, column)) for column in zip(*lines)]
    for row in lines:
        print("  ".join([ascii(row[0])[1:-1].ljust(widths[0])]
                        + [text.rjust(width) for text, width in zip(row[1:], widths[1:])]), file=stream)
    return 0


def parse_arguments(arguments: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="llm_proxy.py", epilog=settings_help(), formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Let many people share an LLM endpoint fairly."
                    "  BASE_API_URL=http://127.0.0.1:8000/v1 python llm_proxy.py")
    parser.add_argument("--version", action="version", version="llm_proxy " + VERSION)
    parser.add_argument("--check", action="store_true",
                        help="print what would be used, ask the endpoint for its models, and exit")
    parser.add_argument("--demo", action="store_true", help="run in front of a small built-in endpoint")
    commands = parser.add_subparsers(dest="command", metavar="usage")
    report = commands.add_parser("usage", help="print who used what, from DATABASE; see usage --help")
    report.add_argument("--by", choices=list(USAGE_OF), default="caller")
    report.add_argument("--since", metavar="7d", help="only the last minutes (30m), hours (12h) or days (7d)")
    report.add_argument("--json", action="store_true")
    report.add_argument("--csv", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: Optional[List[str]] = None) -> int:
    options = parse_arguments(arguments)
    if arguments is None and not options.check and not options.command:
        relax_garbage_collection()
    try:
        log_stream = open(2, "wb", buffering=0, closefd=False)
    except OSError:
        log_stream = open(os.devnull, "wb", buffering=0)  # started with stderr closed
    environ = dict(os.environ)
    try:
        with open(".env", encoding="utf-8-sig") as file:
            dotenv = file.read()
    except FileNotFoundError:
        dotenv = ""
    except (OSError, ValueError) as failure:
        print(".env cannot be read: %s" % failure, file=sys.stderr)
        return 2
    if options.command:
        path = environ.get("DATABASE") or read_dotenv(dotenv)[0].get("DATABASE") or DEFAULT_DATABASE
        sys.stdout.reconfigure(errors="backslashreplace")
        return usage(options, path, sys.stdout)
    if options.demo:
        environ["BASE_API_URL"] = "http://127.0.0.1:%d/v1" % DemoServer().server_port
        environ.setdefault("DATABASE", "off")  # so that every demo begins with a full bucket
    try:
        config = read_config(environ, dotenv)
    except ConfigFaults as faults:
        print(faults, file=sys.stderr)
        return 2
    if options.check:
        return check(config, sys.stdout)
    return run(config, log_stream, DEMO_HINT % (config.scheme, config.port) if options.demo else "")


if __name__ == "__main__":
    sys.exit(main())
